"A wheel, installed where there are no notebook tools, imports and trains with torch, numpy, safetensors and tqdm alone."
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ["torch", "numpy", "safetensors", "tqdm"]
TRAIN = """
import sys, torch, xxact
from xxact.bench import bench_train, record
from xxact.fusion import XxaCT
from xxact.materials import MaterialSet
from xxact.trainer import Supervised, predict, train
data = MaterialSet.load(sys.argv[1])
model = XxaCT("nano", targets=data.target_names); model.fit_scale(data.targets)
train(Supervised(model), data, torch.arange(len(data)), sys.argv[2], epochs=1, batch_size=8, device="cpu")
assert predict(model, data, torch.arange(8)).targets.shape == (8, len(data.target_names))
result = bench_train(data, "pretrain", "nano", "cpu", batch_size=8, steps=1, rounds=1)
assert result["materials_per_s"] > 0 and record(result, sys.argv[2]).exists()
absent = {"polars", "pymatgen", "matplotlib", "nbdev", "papermill", "IPython"}
assert not absent & set(sys.modules)
for name in absent:
    try: __import__(name)
    except ImportError: continue
    raise SystemExit(f"{name} is installed: the environment is not the one to test")
print(xxact.__version__)
"""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    from xxact.materials import MaterialSet
    from xxact.reproduce import load_table
    folder = tmp_path_factory.mktemp("data")
    MaterialSet.from_table(load_table("prototypes:40", cache=folder), ["volume_per_atom"]).save(folder / "set.safetensors")
    return folder / "set.safetensors"


def test_wheel(tmp_path, data_file):
    def pip(python, *arguments):
        pinned = ["-c", str(ROOT / "constraints.txt"), *shlex.split(os.environ.get("PIP_ARGS", ""))]
        subprocess.run([python, "-m", "pip", *arguments, "-q", *pinned], check=True)

    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    pip(python, "install", *NEEDED)
    pip(python, "install", "--no-deps", *tmp_path.glob("*.whl"))
    out = subprocess.run([python, "-c", TRAIN, data_file, tmp_path / "run"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    from xxact import __version__
    assert out.stdout.strip().endswith(__version__)


def test_import_is_cheap():
    heavy, figures = "{'torch', 'polars', 'pymatgen', 'matplotlib'}", "{'polars', 'pymatgen', 'matplotlib'}"
    subprocess.run([sys.executable, "-c", f"import sys, xxact; assert not {heavy} & set(sys.modules)"], check=True)
    subprocess.run([sys.executable, "-c", f"import sys, xxact.trainer; assert not {figures} & set(sys.modules)"], check=True)
