"A run that is killed, ended, damaged or shared between processes ends like one that was not."
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from xxact import diffraction, trainer
from xxact.diffraction import AUGMENTATIONS
from xxact.fusion import XxaCT
from xxact.materials import MaterialSet
from xxact.reproduce import load_table
from xxact.trainer import REQUEUE, Pretraining, Supervised, compile_objective, draws, held_out_losses, launch, read_log, train

TASKS = ("pretrain", "finetune")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    MaterialSet.from_table(load_table("prototypes:120", cache=folder), ["volume_per_atom"]).save(folder / "set.safetensors")
    return folder / "set.safetensors"


def objective(task, data, **options):
    "An untrained objective, always the same."
    torch.manual_seed(0)
    if task == "pretrain": return Pretraining(XxaCT("nano", **options), 0.01)
    model = XxaCT("nano", targets=data.target_names, **options)
    model.fit_scale(data.targets.cpu())
    return Supervised(model, modality_dropout=0.1)


def test_what_a_kill_left_is_cleared(data_file, tmp_path):
    (tmp_path / ".state.pt.123").write_bytes(b"half")
    trained("finetune", MaterialSet.load(data_file), tmp_path)
    assert not list(tmp_path.glob(".state.pt.*"))


def trained(task, data, folder, **options):
    "Weights and losses of a short run."
    it = objective(task, data)
    train(it, data, data.indices("train"), folder, **dict(epochs=2, batch_size=16, log_every=1, checkpoint_every=1e9, device="cpu") | options)
    return [p.detach().cpu() for p in it.parameters()], [row["loss"] for row in read_log(folder / "log.jsonl") if "loss" in row]


def arguments(task, data_file, folder, **options):
    chosen = dict(size="nano", epochs=8, batch_size=16, device="cpu", log_every=2, checkpoint_every=0, timeout=1.0) | options
    return [task, str(data_file), str(folder), *(f"--{k.replace('_', '-')}={v}" for k, v in chosen.items())]


def start(*args, **environment):
    return subprocess.Popen([sys.executable, "-m", "xxact.trainer", *args], stderr=subprocess.PIPE, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1") | environment)


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


def test_ten_kills_in_a_row(data_file, tmp_path, uncut):
    task, whole, cut, rng = uncut[0], tmp_path / "whole", tmp_path / "cut", random.Random(0)
    command = lambda folder: arguments(task, data_file, folder, epochs=30)
    assert start(*command(whole)).wait() == 0
    for _ in range(10):
        goal = steps(cut) + rng.choice((1, 3))
        process = start(*command(cut))
        while process.poll() is None and steps(cut) < goal: time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, "it was done before ten kills"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert steps(cut) >= goal, "it was killed before it trained"
    assert start(*command(cut)).wait() == 0
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
    early = start(*arguments(task, data_file, tmp_path / "early"))
    while not int(re.search(r"SigCgt:\s*(\w+)", open(f"/proc/{early.pid}/status").read())[1], 16) >> 14 & 1: time.sleep(0.001)
    early.send_signal(signal.SIGTERM)
    assert early.wait() == REQUEUE
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


def test_a_flipped_byte_in_a_checkpoint_is_found(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    whole, losses = trained("finetune", data, tmp_path / "whole", checkpoint_every=0)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    state = bytearray((tmp_path / "cut/state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (tmp_path / "cut/state.pt").write_bytes(state)
    with pytest.warns(UserWarning, match="state.pt is damaged.*going on from previous_state.pt"):
        again, _ = trained("finetune", data, tmp_path / "cut", checkpoint_every=0)
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_a_log_of_something_else_is_left_alone(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    trained("finetune", data, tmp_path, checkpoint_every=0)
    (tmp_path / "log.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="is no log of a training"): trained("finetune", data, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == "[1]\n"


@pytest.mark.parametrize("wrong", [dict(warmup=5), dict(ema=2), dict(grad_clip=-1)])
def test_a_schedule_that_cannot_be_is_refused(wrong, data_file, tmp_path):
    with pytest.raises(ValueError, match="must be from 0 to 1"): trained("finetune", MaterialSet.load(data_file), tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_a_file_in_place_of_the_folder(data_file, tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is a file"): trained("finetune", MaterialSet.load(data_file), tmp_path / "x")


def test_other_data_or_other_first_weights_are_another_run(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    trained("finetune", data, tmp_path)
    it = objective("finetune", data)
    with torch.no_grad(): it.model.head.weight += 1
    with pytest.raises(ValueError, match="belongs to a run with first_weights="):
        train(it, data, data.indices("train"), tmp_path, epochs=2, batch_size=16, device="cpu", log_every=1)
    data.targets = data.targets * 3
    with pytest.raises(ValueError, match="belongs to a run with"): trained("finetune", data, tmp_path)


def test_targets_without_labels_are_left_out_and_said(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    unknown = torch.full((len(data), 1), torch.nan)
    data.targets, data.target_names = torch.cat([data.targets, unknown], 1), ("volume_per_atom", "band_gap")
    data.save(tmp_path / "set.safetensors")
    process = start(*arguments("finetune", tmp_path / "set.safetensors", tmp_path / "run", epochs=1))
    assert "without labels, so not learned: band_gap" in process.communicate()[1] and process.returncode == 0
    for targets, message in (("band_gap", "has 0 labels in the training split; at least 2"), ("density", "the set has no target 'density'")):
        process = start(*arguments("finetune", tmp_path / "set.safetensors", tmp_path / "other", targets=targets))
        assert message in process.communicate()[1] and process.returncode == 2


def test_a_sigterm_does_not_save_what_has_gone_wrong(data_file, tmp_path):
    class Poisoned(Supervised):
        def forward(self, p):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 6: os.kill(os.getpid(), signal.SIGTERM)
            losses = super().forward(p)
            return losses | dict(loss=losses["loss"] * (math.nan if self.calls % 6 == 4 else 1))  # the fourth step, when repeated too

    data = MaterialSet.load(data_file)
    it = Poisoned(objective("finetune", data).model)
    with pytest.raises(ValueError, match="is nan at step 4"):
        train(it, data, data.indices("train"), tmp_path, epochs=8, batch_size=16, log_every=50, checkpoint_every=1e9, device="cpu")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 0


def test_a_full_disk_keeps_the_last_checkpoint(data_file, tmp_path, monkeypatch):
    data = MaterialSet.load(data_file)
    saved, calls = torch.save, []

    def full(content, path):
        calls.append(path)
        if len(calls) < 3: return saved(content, path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint of step 4 could not be written.*No space left.*that of step 2 is good"):
        train(objective("finetune", data), data, torch.arange(64), tmp_path, epochs=2, batch_size=8, log_every=2, checkpoint_every=0, device="cpu")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    assert not list(tmp_path.glob(".state*"))


def test_the_materials_of_a_bad_step_are_named(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    it = objective("finetune", data)
    poisoned = data.targets.clone()
    poisoned[37] = 1e30
    data.targets = poisoned
    with pytest.raises(ValueError, match=r"volume_per_atom|grad_norm|loss"):
        train(it, data, torch.arange(64), tmp_path, epochs=4, batch_size=8, log_every=8, checkpoint_every=0, device="cpu", lr=1e30)
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
        near = 1e-5 if one["step"] <= 10 else 1e-2  # of two tokens as large, rounding decides which one gets the pooling's gradient
        for k in one:
            if k != "seconds": assert one[k] == pytest.approx(two[k], abs=near, rel=near), (k, one["step"])


def test_a_sigterm_saves_under_torchrun(data_file, tmp_path):
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xxact.trainer",
               *arguments("finetune", data_file, cut, epochs=100, checkpoint_every=1e9)]
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | dict(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"))
    while agent.poll() is None and steps(cut) < 6: time.sleep(0.01)
    agent.send_signal(signal.SIGTERM)
    assert "SIGTERM, saved at step" in agent.communicate(timeout=300)[1]
    assert torch.load(cut / "state.pt", weights_only=True)["step"] >= 6


@pytest.mark.parametrize("machines", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_process_is_started_again(machines, data_file, tmp_path):
    launch(2, *arguments("finetune", data_file, tmp_path / "whole"))
    cut = tmp_path / "cut"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    several = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *(several if machines == 2 else ["--standalone"]), f"--nproc-per-node={2 // machines}",
               "--max-restarts=3", "-m", "xxact.trainer", *arguments("finetune", data_file, cut)]
    environment = os.environ | dict(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    if machines == 2: environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agents = [subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) for _ in range(machines)]
    while agents[0].poll() is None and steps(cut) < 6: time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(agents[-1].pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert [agent.wait(timeout=600) for agent in agents] == [0] * machines
    assert log_of(cut) == log_of(tmp_path / "whole") and same_weights(cut, tmp_path / "whole")


@pytest.mark.parametrize(("changes", "message"), [
    (dict(batch_size=100_000), "larger than the training split"),
    (dict(batch_size=0), "must be at least 1"),
    (dict(size="huge"), "choose from nano"),
    (dict(device="cuda"), "no GPU here"),
    (dict(pretrained="missing.safetensors"), "holds no xxact weights"),
    (dict(modalities="smell"), "choose from both"),
    (dict(precision="fp8"), "choose from auto, fp32, bf16"),
    (dict(compile="maybe"), "choose from auto, on, off"),
    (dict(patience=-1), "must not be negative"),
    (dict(tokeniser="wavelets"), "choose from peaks, patches"),
    (dict(targets="nonsense"), "no target 'nonsense'"),
    (dict(targets="volume_per_atom,volume_per_atom"), "each can be given once"),
    (dict(seed=2**64), "must be from 0"),
    (dict(checkpoint_every=math.nan), "not negative"),
    (dict(augment="foggy"), "choose from ideal"),
])
def test_settings_that_cannot_work_are_one_line(changes, message, data_file, tmp_path):
    if changes.get("device") == "cuda" and torch.cuda.is_available(): pytest.skip("there is a GPU")
    process = start(*arguments("finetune", data_file, tmp_path / "x", **changes))
    error = process.communicate()[1].strip().splitlines()
    assert process.returncode == 2 and len(error) == 1 and message in error[0]


def test_a_target_without_labels_and_a_file_of_something_else(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    data.targets, data.space_group = data.targets * torch.nan, data.space_group * 0
    data.save(tmp_path / "empty.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, message in (("empty", "no target and no space group has labels"), ("other", "is no MaterialSet"), ("missing", "is no MaterialSet")):
        process = start(*arguments("finetune", tmp_path / f"{name}.safetensors", tmp_path / "x"))
        assert message in process.communicate()[1] and process.returncode == 2


def test_a_folder_of_other_parameters_is_left_alone(data_file, tmp_path):
    quiet = start(*arguments("pretrain", data_file, tmp_path), TQDM_DISABLE="1")
    assert quiet.communicate()[1] == "" and quiet.returncode == 0
    before = (tmp_path / "log.jsonl").read_text()
    for changes, message in ((dict(lr=1e-4), "belongs to a run with lr="), (dict(size="small"), "belongs to a run with size=nano, not small"),
                             (dict(log_every=3), "belongs to a run with log_every=2"), (dict(targets="band_gap"), "are of finetune")):
        process = start(*arguments("pretrain", data_file, tmp_path, **changes))
        assert message in process.communicate()[1] and process.returncode == 2
    assert (tmp_path / "log.jsonl").read_text() == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", TASKS)
def test_materials_gathered_ahead_are_the_same(task, device, data_file, tmp_path):
    data = MaterialSet.load(data_file)
    (a, losses), (b, other) = (trained(task, data, tmp_path / f"{on}", on_device=on, device=device, compile="off") for on in (True, False))
    assert losses == other and all(torch.equal(x, y) for x, y in zip(a, b)) if device == "cpu" else losses == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("task", TASKS)
def test_bf16_follows_fp32(task, data_file, tmp_path):
    data = MaterialSet.load(data_file)
    (_, exact), (_, rounded) = (trained(task, data, tmp_path / p, precision=p) for p in ("fp32", "bf16"))
    assert exact != rounded and exact[:3] == pytest.approx(rounded[:3], abs=0.03)


@pytest.fixture
def captured(monkeypatch):
    "torch.compile without the compiler: the network is captured, differentiated, and run as it is."
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode: whole(f, backend="aot_eager", fullgraph=True))
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("tokeniser", ["peaks", "patches"])
@pytest.mark.parametrize("task", TASKS)
def test_the_network_is_captured_whole(task, tokeniser, data_file, tmp_path, captured):
    data = MaterialSet.load(data_file)
    it, plain = (objective(task, data, tokeniser=tokeniser) for _ in range(2))
    batches = [plain.prepare(data.batch(torch.arange(i, i + 16)), draws(0, i)) for i in range(0, 64, 16)]
    assert len({b.batch.atomic_numbers.shape[1] for b in batches}) > 1
    assert compile_objective(it, batches[0])
    torch._dynamo.config.error_on_recompile = True
    try: losses = [it(b)["loss"].item() for b in batches]
    finally: torch._dynamo.config.error_on_recompile = False
    assert losses == pytest.approx([plain(b)["loss"].item() for b in batches], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_compiled_runs_are_as_the_others(task, n, data_file, tmp_path):
    logs = []
    for compile in ("off", "on"):
        launch(n, *arguments(task, data_file, tmp_path / compile, compile=compile, epochs=2, log_every=1, timeout=10.0))
        logs.append([row["loss"] for row in read_log(tmp_path / compile / "log.jsonl") if "loss" in row])
    assert logs[0] == pytest.approx(logs[1], abs=1e-3)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_compiler_that_fails_is_done_without(where, data_file, tmp_path, monkeypatch):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()

        @staticmethod
        def backward(ctx, gradient): raise RuntimeError("no compiler found")

    def broken(function, mode):
        def compiled(p):
            if where == "forward": raise RuntimeError("no compiler found")
            out = function(p)
            return out._replace(targets=Fails.apply(out.targets))
        return compiled

    data = MaterialSet.load(data_file)
    plain, _ = trained("finetune", data, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="torch.compile does not work here.*no compiler found.*without"):
        weights, _ = trained("finetune", data, tmp_path / "tried", compile="on")
    assert all(torch.equal(a, b) for a, b in zip(plain, weights))


@pytest.mark.parametrize("tokeniser", ["peaks", "patches"])
@pytest.mark.parametrize("task", TASKS)
def test_padding_changes_nothing(task, tokeniser, data_file, monkeypatch):
    data = MaterialSet.load(data_file)
    it, results = objective(task, data, tokeniser=tokeniser), []
    prepared = it.prepare(data.batch(torch.arange(24)), draws(0, 0))
    for padded in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda padded=padded: padded)
        it.zero_grad()
        loss = it(prepared)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in it.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


class NoQuestions(TorchDispatchMode):
    "Refuses what makes Python wait for a device: reading a number, or a shape that depends on numbers."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mask = function is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if mask or function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("augment", ["lab", "measured"])
@pytest.mark.parametrize("tokeniser", ["peaks", "patches"])
def test_nothing_is_asked_of_a_device_without_values(tokeniser, augment, data_file, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # so that padding is computed, as on a GPU
    monkeypatch.setattr("xxact.diffraction._on", lambda generator, device: generator if device.type == "cpu" else None)  # it has no generators
    data, device = MaterialSet.load(data_file), torch.device("meta")
    it = objective("finetune", data, tokeniser=tokeniser).to(device)
    it.augment = augment
    loss = it(it.prepare(data.batch(torch.arange(16)).to(device), draws(0, 0)))["loss"]
    loss.backward()
    assert loss.is_meta


@contextlib.contextmanager
def no_waiting(device):
    if device == "cpu":
        with NoQuestions(): yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_asks_the_device_nothing(task, device, data_file, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # so that padding is computed, as on a GPU
    data = MaterialSet.load(data_file).to(device)
    it = objective(task, data).to(device)
    optimiser = torch.optim.AdamW(it.parameters(), fused=True)
    for step in range(2):
        batch, generator = data.batch(torch.arange(16)), draws(0, step)
        with no_waiting(device):
            losses = it(it.prepare(batch, generator))
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(it.parameters(), 1.0)
            optimiser.step()
    with pytest.raises((AssertionError, RuntimeError)), no_waiting(device): losses["loss"].item()


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_stays_on_its_device(task, augment, data_file, monkeypatch):
    "Shown on `meta`, most of whose operations refuse tensors of another device."
    monkeypatch.setattr(diffraction, "_on", lambda generator, device: None)  # it draws nothing,
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # and knows no precisions
    data, meta = MaterialSet.load(data_file), torch.device("meta")
    it = objective(task, data).to(meta)
    it.augment = augment
    loss = it(it.prepare(data.batch(torch.arange(16)).to(meta), draws(0, 0)))["loss"]
    loss.backward()
    assert loss.is_meta


@pytest.mark.parametrize("task", TASKS)
def test_columns_without_elements_change_nothing(task, data_file):
    data, index = MaterialSet.load(data_file), torch.arange(16)
    batches = data.batch(index), data.batch(index, 12)
    assert batches[0].fractions.shape[1] < batches[1].fractions.shape[1] == 12 and (batches[1].atomic_numbers[:, -1] == 0).all()
    it = objective(task, data).eval()
    one, other = (it(it.prepare(batch, draws(0, 0))) for batch in batches)
    assert {k: v.item() for k, v in one.items()} == pytest.approx({k: v.item() for k, v in other.items()}, abs=1e-5)


def test_the_best_weights_so_far_are_kept(data_file, tmp_path):
    data = MaterialSet.load(data_file)
    index, held_out = data.indices("train"), data.indices("val")
    settings = dict(epochs=40, batch_size=16, lr=3e-3, schedule="constant", ema=0.5, device="cpu", held_out=held_out, log_every=2, checkpoint_every=0)
    it = objective("finetune", data)
    train(it, data, index, tmp_path / "whole", patience=3, **settings)
    rows = [row for row in read_log(tmp_path / "whole/log.jsonl") if "val_loss" in row]
    losses = [row["val_loss"] for row in rows]
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 40  # stopped three evaluations after the best
    assert rows[-1]["val_best_step"] == rows[best]["step"]
    assert held_out_losses(it, data, held_out, 16)["loss"] == pytest.approx(min(losses), abs=1e-6)

    class Killed(Exception): "Stands for anything that ends a run."

    calls = []

    def killed_after_the_best() -> dict:
        calls.append(1)
        if len(calls) == best + 2: raise Killed
        return {}

    with pytest.raises(Killed):
        train(objective("finetune", data), data, index, tmp_path / "cut", patience=3, evaluate=killed_after_the_best, **settings)
    again = objective("finetune", data)
    train(again, data, index, tmp_path / "cut", patience=3, **settings)
    assert all(torch.equal(a, b) for a, b in zip(it.parameters(), again.parameters()))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")


def test_a_checkpoint_of_another_recipe_is_refused(data_file, tmp_path):
    assert start(*arguments("finetune", data_file, tmp_path, epochs=1)).wait() == 0
    whole = torch.load(tmp_path / "state.pt", weights_only=True)
    for changed, message in ((whole | dict(settings=whole["settings"] | dict(recipe=1)), "belongs to a run with recipe=1, not"),
                             (whole | dict(objective={"strange": torch.zeros(1)}), "was written by another version of the code")):
        torch.save(changed, tmp_path / "state.pt")
        process = start(*arguments("finetune", data_file, tmp_path, epochs=1))
        error = process.communicate()[1].strip().splitlines()
        assert process.returncode == 2 and len(error) == 1 and message in error[0]


def test_tensorboard_shows_the_log(data_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, losses = trained("finetune", MaterialSet.load(data_file), tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_again(device, data_file, tmp_path):
    data = MaterialSet.load(data_file)
    runs = [trained("finetune", data, tmp_path / f"{i}", device=device, deterministic=True) for i in range(2)]
    assert runs[0][1] == runs[1][1] and all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0]))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of a GPU"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_short_of_memory_says_what_to_lower(error, data_file, tmp_path, monkeypatch):
    def full(*_): raise error

    monkeypatch.setattr(XxaCT, "forward", full)
    for size, advice in ((16, "batch_size=8"), (1, "a smaller size")):
        with pytest.raises(RuntimeError, match=f"out of memory with batch_size={size}; try {advice}"):
            trained("finetune", MaterialSet.load(data_file), tmp_path / advice, batch_size=size)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", TASKS)
def test_attention_is_fused(task, device, data_file):
    data = MaterialSet.load(data_file)
    it = objective(task, data).to(device)
    prepared = it.prepare(data.batch(torch.arange(16)).to(torch.device(device)), draws(0, 0))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]): it(prepared)["loss"].backward()  # fails where none fits


def test_augmentation_in_pretraining(data_file):
    data, seen = MaterialSet.load(data_file), []
    batch = data.batch(torch.arange(16))
    for augment in ("ideal", "lab"):
        torch.manual_seed(0)
        prepared = Pretraining(XxaCT("nano"), 0.01, augment=augment).prepare(batch, draws(0, 0))
        seen.append(prepared)
    assert torch.equal(seen[0].visible, seen[1].visible) and not torch.equal(seen[0].truth, seen[1].truth)
    with pytest.raises(ValueError, match="augment='foggy'"): Pretraining(XxaCT("nano"), 0.01, augment="foggy")


def test_held_out_losses_use_every_material(data_file):
    data = MaterialSet.load(data_file)
    it, index = objective("finetune", data), torch.arange(37)
    it.augment, it.modality_dropout = "ideal", 0  # nothing is drawn
    whole, parts = held_out_losses(it.eval(), data, index, 64), held_out_losses(it, data, index, 5)
    assert whole["volume_per_atom"] == pytest.approx(parts["volume_per_atom"], abs=1e-5)


def test_a_checkpoint_that_cannot_be_read_now_is_kept(data_file, tmp_path, monkeypatch):
    data = MaterialSet.load(data_file)
    trained("finetune", data, tmp_path, epochs=1)
    kept = (tmp_path / "state.pt").read_bytes()
    def broken(*args, **kwargs): raise OSError(5, "Input/output error")
    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(OSError, match="Input/output"): trained("finetune", data, tmp_path, epochs=1)
    assert (tmp_path / "state.pt").read_bytes() == kept


@pytest.mark.parametrize("wrong", [dict(mxm_weight=math.nan), dict(contrastive_weight=math.inf), dict(mask_share=0), dict(mask_share=1.0)])
def test_settings_are_refused_before_a_folder_is_taken(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Pretraining(XxaCT("nano"), 1.0, **wrong)


@pytest.mark.parametrize("wrong", [dict(symmetry_weight=math.nan), dict(modality_dropout=1.5)])
def test_supervision_is_refused_before_a_folder_is_taken(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): Supervised(XxaCT("nano", targets=["band_gap"]), **wrong)


@pytest.mark.parametrize("task", TASKS)
def test_a_loss_that_goes_wrong_is_found_before_patience_ends_the_run(task, data_file, tmp_path):
    process = start(*arguments(task, data_file, tmp_path / "x", epochs=8, log_every=1000, lr=1e30, patience=1))
    error = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 2 and "lower lr" in error
    assert not (tmp_path / "x/model.safetensors").exists()


def test_two_processes_judge_alike_what_is_held_out(data_file, tmp_path):
    held_out, logs = MaterialSet.load(data_file).indices("val"), []
    assert any(len(part) % 2 for part in held_out.tensor_split(-(-len(held_out) // 8))), "no part has shares of two sizes"
    for n in (1, 2):
        launch(n, *arguments("pretrain", data_file, tmp_path / f"{n}", epochs=2, batch_size=8, checkpoint_every=1e9, patience=5), restarts=0)
        logs.append([row["val_loss"] for row in read_log(tmp_path / f"{n}/log.jsonl") if "val_loss" in row])
    assert len(logs[0]) == 2 and logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_folder_is_one_process_s_and_one_run_s(data_file, tmp_path):
    first = start(*arguments("finetune", data_file, tmp_path / "x", epochs=200))
    while first.poll() is None and steps(tmp_path / "x") < 2: time.sleep(0.01)
    second = start(*arguments("finetune", data_file, tmp_path / "x", epochs=200))
    assert "another process trains in" in second.communicate()[1] and second.returncode == 2
    first.kill(), first.wait()
    for name in ("state.pt", "previous_state.pt"): (tmp_path / "x" / name).unlink(missing_ok=True)
    log = (tmp_path / "x/log.jsonl").read_text()
    third = start(*arguments("finetune", data_file, tmp_path / "x"))
    assert "but no checkpoint" in third.communicate()[1] and third.returncode == 2
    assert (tmp_path / "x/log.jsonl").read_text() == log


def test_a_damaged_log_is_told(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.warns(UserWarning, match="line 2 is damaged; it and the 1 after it"): assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def test_evaluation_is_done_without_the_compiled_network(data_file, tmp_path, monkeypatch):
    data = MaterialSet.load(data_file)

    def compiled(function, mode):
        def run(prepared):
            assert torch.is_grad_enabled(), "it would be compiled again"
            return function(prepared)
        return run

    monkeypatch.setattr(torch, "compile", compiled)
    it = objective("finetune", data)
    train(it, data, data.indices("train"), tmp_path, epochs=1, batch_size=16, compile="on", held_out=data.indices("val"), device="cpu")
