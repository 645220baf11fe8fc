"A run that is killed, ended, damaged or shared between processes ends like one that was not."
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from xxact import trainer
from xxact.fusion import XxaCT
from xxact.materials import MaterialSet
from xxact.reproduce import load_table
from xxact.trainer import REQUEUE, Pretraining, Supervised, launch, read_log, train

TASKS = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    MaterialSet.from_table(load_table("prototypes:120", cache=folder), ["volume_per_atom"]).save(folder / "set.safetensors")
    return folder / "set.safetensors"


def arguments(task, data_file, folder, **options):
    chosen = dict(size="nano", epochs=4, batch_size=16, device="cpu", log_every=2, checkpoint_every=0, timeout=1.0) | options
    return [task, str(data_file), str(folder), *(f"--{k.replace('_', '-')}={v}" for k, v in chosen.items())]


def start(*args): return subprocess.Popen([sys.executable, "-m", "xxact.trainer", *args], stderr=subprocess.PIPE, text=True,
                                          env=os.environ | dict(OMP_NUM_THREADS="1"))


def log_of(folder): return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder / "log.jsonl")]


def steps(folder) -> int: return max((row["step"] for row in read_log(folder / "log.jsonl")), default=0)


def same_weights(a, b) -> bool:
    a, b = (load_file(f / "model.safetensors") for f in (a, b))
    return all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module", params=TASKS)
def uncut(request, data_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "uncut"
    assert start(*arguments(request.param, data_file, folder)).wait() == 0
    return request.param, folder


def test_ten_kills_in_a_row(uncut, data_file, tmp_path):
    (task, whole), cut, kills = uncut, tmp_path / "cut", 0
    rng = random.Random(0)
    while kills < 10:
        process, before = start(*arguments(task, data_file, cut)), steps(cut)
        while process.poll() is None and steps(cut) < before + rng.choice((0, 2)): time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        if process.poll() is not None: break  # it was done before ten kills
        process.send_signal(signal.SIGKILL)
        kills += 1
        process.wait()
    assert kills >= 3
    assert start(*arguments(task, data_file, cut)).wait() == 0
    assert log_of(cut) == log_of(whole) and same_weights(cut, whole)


def test_sigterm_saves_and_asks_to_be_queued_again(uncut, data_file, tmp_path):
    (task, whole), cut = uncut, tmp_path / "cut"
    if task == "pretrain": pytest.skip("the signal is the same for both tasks")
    process = start(*arguments(task, data_file, cut, checkpoint_every=1e9))
    while process.poll() is None and steps(cut) < 4: time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == REQUEUE == 75
    assert "saved at step" in process.stderr.read()
    saved = torch.load(cut / "state.pt", weights_only=True)["step"]
    assert saved >= 4
    resumed = start(*arguments(task, data_file, cut))
    assert resumed.wait() == 0
    assert log_of(cut) == log_of(whole) and same_weights(cut, whole)


def test_a_damaged_checkpoint_is_passed_over(uncut, data_file, tmp_path):
    (task, whole), cut = uncut, tmp_path / "cut"
    if task == "pretrain": pytest.skip("the checkpoint is the same for both tasks")
    process = start(*arguments(task, data_file, cut))
    while process.poll() is None and steps(cut) < 10: time.sleep(0.01)
    process.kill(); process.wait()
    assert sorted(p.name for p in cut.glob("*state.pt")) == ["previous_state.pt", "state.pt"]
    state = (cut / "state.pt").read_bytes()
    (cut / "state.pt").write_bytes(state[: len(state) // 2])
    resumed = start(*arguments(task, data_file, cut))
    assert resumed.wait() == 0
    assert "state.pt is damaged" in resumed.stderr.read()
    assert log_of(cut) == log_of(whole) and same_weights(cut, whole)
    for name in ("state.pt", "previous_state.pt"): (cut / name).write_bytes(b"PK\x03\x04 nonsense")
    hopeless = start(*arguments(task, data_file, cut))
    assert hopeless.wait() == 2 and "delete it to start the run again" in hopeless.stderr.read()


def test_a_full_disk_keeps_the_last_checkpoint(data_file, tmp_path, monkeypatch):
    data = MaterialSet.load(data_file)
    model = XxaCT("nano", targets=data.target_names)
    model.fit_scale(data.targets)
    saved, calls = torch.save, []

    def full(content, path):
        calls.append(path)
        if len(calls) < 3: return saved(content, path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint of step 4 could not be written.*No space left.*that of step 2 is good"):
        train(Supervised(model), data, torch.arange(64), tmp_path, epochs=2, batch_size=8, log_every=2, checkpoint_every=0, device="cpu")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob(".state*"))


def test_the_materials_of_a_bad_step_are_named(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    model = XxaCT("nano", targets=data.target_names)
    model.fit_scale(data.targets)
    poisoned = data.targets.clone()
    poisoned[37] = 1e30
    data.targets = poisoned
    with pytest.raises(ValueError, match=r"volume_per_atom|grad_norm|loss"):
        train(Supervised(model), data, torch.arange(64), tmp_path, epochs=4, batch_size=8, log_every=8, checkpoint_every=0, device="cpu", lr=1e30)
    bad = json.loads((tmp_path / "bad_step.json").read_text())
    assert bad["materials"] == [data.material_ids[i] for i in trainer.batch_indices(torch.arange(64), 8, 0, bad["step"] - 1)]
    assert bad["step"] < 8  # found between two readings


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_train_as_one(task, data_file, tmp_path):
    logs = []
    for n in (1, 2):
        launch(n, *arguments(task, data_file, tmp_path / f"{n}", epochs=4, log_every=1, checkpoint_every=1e9))
        logs.append([row for row in read_log(tmp_path / f"{n}" / "log.jsonl") if "loss" in row])
    assert len(logs[0]) == len(logs[1]) >= 20
    for one, two in zip(*logs):
        for k in one:
            if k != "seconds": assert one[k] == pytest.approx(two[k], abs=1e-5, rel=1e-5), (k, one["step"])


@pytest.mark.slow
def test_a_killed_process_is_started_again(data_file, tmp_path):
    launch(2, *arguments("finetune", data_file, tmp_path / "whole"))
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", "-m", "xxact.trainer"]
    process = subprocess.Popen([*command, *arguments("finetune", data_file, cut)], stderr=subprocess.DEVNULL,
                               env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})
    while process.poll() is None and steps(cut) < 6: time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=600) == 0
    assert log_of(cut) == log_of(tmp_path / "whole") and same_weights(cut, tmp_path / "whole")


@pytest.mark.parametrize(("changes", "message"), [
    (dict(batch_size=100_000), "larger than the training split"),
    (dict(batch_size=0), "must be at least 1"),
    (dict(size="huge"), "choose from nano"),
    (dict(device="cuda"), "no GPU here"),
    (dict(pretrained="missing.safetensors"), "holds no xxact weights"),
    (dict(modalities="smell"), "choose from both"),
])
def test_settings_that_cannot_work_are_one_line(changes, message, data_file, tmp_path):
    if changes.get("device") == "cuda" and torch.cuda.is_available(): pytest.skip("there is a GPU")
    process = start(*arguments("finetune", data_file, tmp_path / "x", **changes))
    error = process.communicate()[1].strip().splitlines()
    assert process.returncode == 2 and len(error) == 1 and message in error[0]


def test_a_target_without_labels_and_a_file_of_something_else(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    data.targets = data.targets * torch.nan
    data.save(tmp_path / "empty.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, message in (("empty", "0 labels in the training split"), ("other", "is no MaterialSet file"), ("missing", "is no MaterialSet file")):
        process = start(*arguments("finetune", tmp_path / f"{name}.safetensors", tmp_path / "x"))
        assert message in process.communicate()[1] and process.returncode == 2


def test_a_folder_of_other_parameters_is_left_alone(data_file, tmp_path):
    assert start(*arguments("pretrain", data_file, tmp_path)).wait() == 0
    before = (tmp_path / "log.jsonl").read_text()
    process = start(*arguments("pretrain", data_file, tmp_path, lr=1e-4))
    assert "belongs to a run with lr=" in process.communicate()[1] and process.returncode == 2
    assert (tmp_path / "log.jsonl").read_text() == before
    assert isinstance(Pretraining(XxaCT("nano"), 0.01), torch.nn.Module)
