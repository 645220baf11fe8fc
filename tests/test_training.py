"A run that is killed ends like one that was not."
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from xxact.materials import MaterialSet
from xxact.reproduce import load_table
from xxact.trainer import read_log

RUN = """
import sys, torch
from xxact.fusion import XxaCT, save_model
from xxact.materials import MaterialSet
from xxact.trainer import Pretraining, Supervised, train
torch.set_num_threads(1)
kind, data, folder = sys.argv[1], MaterialSet.load(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model = XxaCT("nano", targets=data.target_names); model.fit_scale(data.targets)
objective = Supervised(model, modality_dropout=.2) if kind == "supervised" else Pretraining(model, 0.01)
train(objective, data, torch.arange(len(data)), folder, epochs=6, batch_size=8, device="cpu", log_every=2, checkpoint_every=0)
save_model(model, folder + "/model.safetensors")
"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    MaterialSet.from_table(load_table("prototypes:48", cache=folder), ["volume_per_atom"]).save(folder / "set.safetensors")
    return folder / "set.safetensors"


def steps(folder) -> int:
    rows = read_log(folder / "log.jsonl")
    return rows[-1]["step"] if rows else 0


@pytest.mark.parametrize("kind", ["supervised", "pretraining"])
def test_killed_and_resumed_equals_uncut(tmp_path, data_file, kind):
    command = lambda folder: [sys.executable, "-c", RUN, kind, str(data_file), str(folder)]
    subprocess.run(command(tmp_path / "uncut"), check=True)
    cut, kills = tmp_path / "cut", 0
    for at in (4, 18):
        process = subprocess.Popen(command(cut))
        while process.poll() is None and steps(cut) < at: time.sleep(0.01)
        if process.poll() is None: process.send_signal(signal.SIGKILL); kills += 1
        process.wait()
    assert kills > 0
    subprocess.run(command(cut), check=True)
    uncut, resumed = (load_file(tmp_path / f / "model.safetensors") for f in ("uncut", "cut"))
    assert all(torch.equal(v, resumed[k]) for k, v in uncut.items())
    strip = lambda folder: [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder / "log.jsonl")]
    assert strip(tmp_path / "uncut") == strip(cut)
