"The experiment notebooks, small; the runner; and the command line."
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import polars as pl
import pytest

from xxact.composition import composition_key
from xxact.materials import TARGETS, MaterialSet, sides
from xxact.predict import formula_of
from xxact.reproduce import (
    NotebookFailed,
    changes_table,
    change_said,
    compare_models,
    finetune,
    keep_row,
    load_table,
    main,
    parameters,
    read_results,
    reproduce,
    results_table,
    update_readme,
)

ROOT = Path(__file__).parents[1]
TINY = dict(dataset="prototypes:240", epochs="1", pretrain_epochs="1", batch_size="16", pretrain_batch_size="16")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "The notebooks and settings, in a folder of their own."
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "nbs/experiments", folder / "nbs/experiments", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "README.md"): shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(autouse=True)
def inside(clone, monkeypatch): monkeypatch.chdir(clone)


def test_notebooks_run_and_are_not_repeated(clone, capsys):
    copies = reproduce("smoke", overrides=TINY)
    assert [c.name for c in copies] == ["01_data.ipynb", "02_pretrain.ipynb", "03_finetune.ipynb"]
    for c in copies:
        assert c.exists() and c.with_suffix(".html").stat().st_size > 10_000
        assert not [o for cell in nbformat.read(c, 4).cells if cell.cell_type == "code" for o in cell.outputs if o.output_type == "error"]
    pictures = sorted((clone / "figures/smoke").glob("*.png"))
    assert len(pictures) >= 7 and all(p.with_suffix(".csv").exists() for p in pictures)
    rows = pl.read_parquet(clone / "figures/smoke/runs.parquet")
    assert rows["experiment"].to_list() == ["pretrain"] + ["finetune"] * 5
    for run in rows.iter_rows(named=True):
        folder = clone / "runs" / run["experiment"] / run["id"]
        needed = {"params.json", "log.jsonl", "model.safetensors", "results.json"}
        assert needed <= {p.name for p in folder.iterdir()} and not (folder / "state.pt").exists()
    results = read_results("smoke", clone)
    predicted = dict(np.load(clone / "runs/finetune" / results["id"][-1] / "predictions.npz"))
    table = load_table("prototypes:240")
    truth = dict(zip(table["material_id"], table["volume_per_atom"]))
    errors = [abs(truth[name.decode()] - v) for name, v in zip(predicted["material_id"], predicted["volume_per_atom"])]
    assert np.mean(errors) == pytest.approx(results["volume_per_atom/mae"][-1], rel=1e-4)
    assert "| both-pretrained |" in results_table("smoke", clone)
    changes = pl.read_csv(clone / "figures/smoke/changes.csv").filter(pl.col("target") == "lattice_energy_per_atom")
    mae = dict(results.select("model", "lattice_energy_per_atom/mae").iter_rows())
    for row in changes.iter_rows(named=True):
        assert row["change"] == pytest.approx(mae[row["model"]] / mae[row["against"]] - 1, abs=1e-3) and row["low"] <= row["change"] <= row["high"]
    capsys.readouterr()
    times = [c.stat().st_mtime_ns for c in copies]
    assert main(["reproduce", *(f"{k.upper()}={v}" for k, v in TINY.items())]) == 0
    shown = capsys.readouterr().out
    assert [c.stat().st_mtime_ns for c in copies] == times and shown.count("nothing has changed") == 3 and "| dummy |" in shown


CLAIMS = ["04_convergence", "05_data_scaling", "06_accuracy"]


def test_sweeps_give_verdicts_and_survive_a_lost_machine(clone, capsys):
    tiny = TINY | dict(steps="6", evaluations="3", min_steps="5", pretrain_min_steps="4", seeds="0,1", shares="0.5,1")
    reproduce("smoke", CLAIMS, tiny)
    figures = clone / "figures/smoke"
    for name in ("04_convergence", "04_speed_up", "05_scaling", "06_comparison", "06_parity", "06_residuals"):
        assert (figures / f"{name}.png").exists() and pl.read_csv(figures / f"{name}.csv").height
    for name in CLAIMS: assert (figures / f"{name}.md").read_text().startswith("**")
    rows = pl.read_parquet(figures / "runs.parquet").filter(pl.col("experiment") == "scaling")
    half, whole = sorted(set(rows["training_materials"]))
    assert whole == 2 * half and len(rows) == 2 * 2 * 3
    accuracy = read_results("smoke", clone, "06_accuracy")
    assert set(accuracy["split"]) == {"composition", "chemistry"} and {"dummy", "boosted trees", "both"} <= set(accuracy["model"])
    fewer = dict(splits="chemistry", models="composition,xrd,both", models_by_chemistry="composition,both", reuse="true")
    reproduce("smoke", ["06_accuracy"], TINY | dict(seeds="0,1") | fewer)
    assert set(read_results("smoke", clone, "06_accuracy")["model"]) == {"dummy", "boosted trees", "composition", "both"}
    exponents, count = (figures / "05_exponents.csv").read_text(), len(pl.read_parquet(figures / "runs.parquet"))
    shutil.rmtree(clone / "runs")  # the rows and predictions in figures/ are left
    reproduce("smoke", CLAIMS, tiny | dict(reuse="true"))
    assert not list((clone / "runs").rglob("model.safetensors"))
    assert (figures / "05_exponents.csv").read_text() == exponents and len(pl.read_parquet(figures / "runs.parquet")) == count


def test_what_was_learned(clone, capsys):
    learned = ["07_representations", "08_ablations", "09_attention", "10_robustness"]
    tiny = TINY | dict(seeds="0", factors="elements,hidden width", arms="random,both,scratch", test_materials="12", levels="1")
    tiny.pop("batch_size"), tiny.pop("pretrain_batch_size")
    reproduce("smoke", learned, tiny)
    figures = clone / "figures/smoke"
    for name in ("07_probes", "07_map", "08_ablations", "09_attention", "09_occlusion", "10_robustness"):
        assert (figures / f"{name}.png").exists() and pl.read_csv(figures / f"{name}.csv").height
    for name in learned: assert (figures / f"{name}.md").read_text().startswith("**")
    effects = pl.read_csv(figures / "08_effects.csv")
    assert set(effects["factor"]) == {"elements", "hidden width (pretrained)"} and effects["change"].is_finite().all()
    probes = pl.read_csv(figures / "07_probes.csv")
    assert set(probes["arm"]) == {"random", "both", "scratch"} and set(probes["probe"]) == {"linear", "nearest"}
    robust = pl.read_csv(figures / "10_robustness.csv")
    assert robust["factor"].n_unique() == 6 and robust["crystal_system/mean"].is_between(0, 1).all()
    ids = pl.read_parquet(figures / "runs.parquet").filter(pl.col("experiment") == "ablation")["id"]
    assert ids.n_unique() == len(ids) == 6  # the default, two of the elements; the default pretrained, two of the hidden width
    assert main(["page"]) == 0 and "07_probes" in (clone / "runs/smoke/index.html").read_text()


def test_without_space_groups_the_rest_is_shown(tmp_path, clone):
    table = load_table("prototypes:240").with_columns(space_group=pl.lit(None, pl.UInt8))
    table.write_parquet(tmp_path / "nameless.parquet")
    tiny = dict(dataset=str(tmp_path / "nameless.parquet"), epochs="1", pretrain_epochs="1", seeds="0", arms="random,both", test_materials="12",
                levels="1")
    reproduce("smoke", ["07_representations", "08_ablations", "09_attention", "10_robustness"], tiny | dict(factors="elements"))
    assert "crystal_system" not in set(pl.read_csv(clone / "figures/smoke/07_probes.csv")["measure"])
    few = TINY | dict(dataset=tiny["dataset"], seeds="0", shares="0.5,1", min_steps="5", steps="6", evaluations="3", splits="composition")
    for name in CLAIMS:
        reproduce("smoke", [name], {k: v for k, v in few.items() if k in parameters(clone, "smoke", {})[name]})
        verdict = (clone / f"figures/smoke/{name}.md").read_text()
        assert "crystal system" not in verdict
        assert dict(zip(CLAIMS, ("so without a range", "intervals over test materials only", "so without their spread")))[name] in verdict  # one seed


def test_two_sweeps_at_once_make_each_run_once(tmp_path):
    code = f"""if True:
        from pathlib import Path
        from xxact.materials import TARGETS, MaterialSet, sides
        from xxact.reproduce import finetune, keep_row, load_table
        folder = Path({str(tmp_path)!r})
        data = MaterialSet.from_table(load_table("prototypes:120", cache=folder), ["volume_per_atom"])
        for seed in (0, 1):
            run = finetune(data, folder, "composition", size="nano", epochs=3, batch_size=16, seed=seed, device="cpu")
            keep_row(folder / "runs.parquet", "test", run)
        print(run.results["hardware"])"""
    subprocess.run([sys.executable, "-c", code.partition("for seed")[0]], check=True)  # the table is there
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    rows = pl.read_parquet(tmp_path / "runs.parquet")
    assert rows["seed"].sort().to_list() == [0, 1]
    for name in rows["id"]:
        steps = [json.loads(line)["step"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(steps) and steps.count(steps[-1]) == 2  # training and validation, once


def test_failing_notebook_stops_the_run(clone):
    bad = clone / "nbs/experiments/00_fails.ipynb"
    source = "profile = 'smoke'\ndataset = 'prototypes:30'"
    cells = [nbformat.v4.new_code_cell(source, metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3"))), bad)
    try:
        expected = "(?s)00_fails.ipynb, cell.*ZeroDivisionError: division by zero.*executed copy: .*00_fails.ipynb"
        with pytest.raises(NotebookFailed, match=expected): reproduce("smoke", ["00_fails"])
    finally: bad.unlink()


@pytest.mark.parametrize("arguments, message", [
    (["reproduce", "PROFILE=huge"], "profile='huge' does not exist; choose from smoke, laptop"),
    (["reproduce", "EPOCH=3"], "did you mean 'epochs'?"),
    (["reproduce", "EPOCHS=many"], "epochs='many' must be a whole number"),
    (["reproduce", "--only", "99_none"], "choose from 01_data"),
    (["reproduce", "epochs"], "write NAME=VALUE"),
    (["reproduce", "ONLY=01_data"], "no experiment has a parameter 'only'"),
    (["reproduce", "SIZE=medium"], "size='medium' does not exist; choose from nano"),
    (["reproduce", "BATCH_SIZE=0"], "batch_size=0 must be at least 1"),
    (["reproduce", "SEEDS=0,x"], "must be whole numbers"),
    (["reproduce", "SEEDS="], "seeds is empty"),
    (["reproduce", "MODELS=,"], "models is empty"),
    (["reproduce", "SYMMETRY_WEIGHT=nan"], "must be finite"),
    (["reproduce", "--all", "SHARES=5,20,100"], "must be numbers above 0 and up to 1"),
    (["reproduce", "--all", "ARMS=mxn"], "arms='mxn' does not exist; choose from scratch"),
    (["reproduce", "--only", "04_convergence", "ARMS=scratch"], "nothing to compare without mxm or contrastive or both"),
    (["reproduce", "--only", "06_accuracy", "SPLITS=random"], "choose from composition, chemistry"),
    (["reproduce", "--only", "06_accuracy", "MODELS_BY_CHEMISTRY=all"], "models_by_chemistry='all' does not exist; choose from composition, xrd"),
    (["reproduce", "--only", "06_accuracy", "SEEDS=0,00"], "seeds='0,00' has one twice"),
    (["reproduce", "--only", "05_data_scaling", "DATASET=prototypes:30", "BATCH_SIZE=8", "ARMS=xrd,both", "SHARES=1,0.9999"],
     "is one size; a power law needs two or more"),
    (["reproduce", "--only", "05_data_scaling", "DATASET=prototypes:30", "BATCH_SIZE=8", "ARMS=xrd,both-same", "SHARES=0.5,1"],
     "fewer than pretrain_batch_size=64"),
    (["reproduce", "--only", "03_finetune", "DATASET=prototypes:30", "MATERIALS=8"], "materials: 8, fewer than batch_size=32"),
    (["reproduce", "--only", "06_accuracy", "DATASET=prototypes:30"], "the training materials are"),
    (["reproduce", "--only", "06_accuracy", "DATASET=prototypes:30", "BATCH_SIZE=8"], "fewer than pretrain_batch_size=64"),
    (["reproduce", "--only", "06_accuracy", "DATASET=prototypes:30", "BATCH_SIZE=8", "PRETRAIN_SOURCE=mp"], "has no source mp"),
    (["reproduce", "--only", "06_accuracy", "MODELS=xrd,xrd"], "has one twice"),
    (["reproduce", "--only", "06_accuracy", "DATASET="], "dataset is empty"),
    (["reproduce", "--only", "04_convergence", "ARMS="], "arms is empty"),
    (["reproduce", "--only", "04_convergence", "SEEDS=4294967296"], "below 2³²"),
    (["reproduce", "--only", "04_convergence", "DATASET=prototypes:30", "SHARES=0.001,1"], "fewer than batch_size=32"),
    (["reproduce", "--only", "04_convergence", "DATASET=prototypes:30", "SHARES=1", "BATCH_SIZE=8", "VALIDATION_MATERIALS=1500"],
     "validation_materials=1500, but there are"),
    (["reproduce", "--only", "03_finetune", "DATASET=prototypes:30", "MATERIALS=5000"], "materials=5000, but there are"),
    (["reproduce", "SHARES=1"], "01_data, 02_pretrain, 03_finetune has no parameter 'shares'"),
    (["reproduce", "MODELS=all"], "choose from composition, xrd"),
    (["reproduce", "DATASET=nowhere.parquet"], "nowhere.parquet: no such file"),
    (["reproduce", "DATASET=prototypes:30", "TARGETS=band_gap"], "has no values of band_gap; it has those of volume_per_atom"),
    (["reproduce", "DATASET=nowhere.parquet", "TARGETS=band_gap,gap"], "target='gap' does not exist; choose from formation_energy_per_atom"),
    (["prepare", "prototypes:30", "--out", "README.md"], "give the name of a new .parquet file, or a folder"),
    (["download", "alexandria", "--files", "3-1"], "write numbers from 0 to 999"),
    (["download", "alexandria", "--functional", "b3lyp"], "known are pbe"),
    (["download", "mp20", "--base-url", "nowhere"], "not an address"),
    (["prepare", "prototypes:30", "--out", "t.parquet", "--workers", "0"], "workers=0 must be at least 1"),
    (["bench", "prepare", "--dataset", "prototypes:30", "--entries", "0"], "at least one of each is needed"),
    (["bench", "diffraction", "--dataset", "prototypes:30", "--structures", "31"], "from 1 to 30 can be taken"),
    (["bench", "diffraction", "--dataset", "nowhere.parquet"], "no such file"),
    (["bench", "train", "--dataset", "prototypes:30", "--size", "medium"], "choose from nano"),
    (["bench", "train", "--dataset", "prototypes:30", "--steps", "-1"], "must not be negative"),
    (["bench", "train", "--dataset", "README.safetensors"], "is no MaterialSet file"),
    (["bench", "sweeps", "--dataset", "prototypes:30", "--profile", "desk"], "choose from smoke, laptop"),
    (["bench", "sweeps", "--dataset", "prototypes:30", "--labelled", "-3"], "must be numbers of materials"),
    (["prepare", "missing.csv", "--out", "t.parquet"], "missing.csv: no such file"),
    (["data", "card", "missing.parquet"], "does not exist; `xxact prepare"),
    (["data", "card", "settings.ini"], "is not a Parquet table"),
])
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line and "materials/s" not in line]  # without a progress bar
    assert len(said) == 1 and said[0].startswith("xxact: ") and message in said[0]


def test_command_line_shows_no_traceback():
    out = subprocess.run([sys.executable, "-m", "xxact.reproduce", "reproduce", "PROFILE=huge"], capture_output=True, text=True)
    assert out.returncode == 2 and len(out.stderr.strip().splitlines()) == 1


def test_interrupted_run_stops_at_once_and_goes_on(clone):
    slow = clone / "nbs/experiments/00_slow.ipynb"
    source = "profile = 'smoke'\ndataset = 'prototypes:30'"
    cells = [nbformat.v4.new_code_cell(source, metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell("import pathlib, time\npathlib.Path('begun').touch()\nif not pathlib.Path('go').exists(): time.sleep(600)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3"))), slow)
    command = [sys.executable, "-m", "xxact.reproduce", "reproduce", "--only", "00_slow"]
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (clone / "begun").exists() and process.poll() is None: time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert "interrupted; the same command goes on" in process.communicate(timeout=60)[1] and process.returncode == 130
        (clone / "go").touch()
        assert subprocess.run(command, capture_output=True).returncode == 0
    finally: slow.unlink()


def test_help_lists_profiles_experiments_and_parameters(capsys):
    with pytest.raises(SystemExit) as stopped: main(["reproduce", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for word in ("smoke", "laptop", "gpu", "paper", "01_data", "02_pretrain", "03_finetune", "mask_share = 0.4", "modality_dropout = 0.0"):
        assert word in shown


def test_prepare_and_card(clone, capsys):
    assert main(["prepare", "prototypes:30", "--out", "table.parquet"]) == 0
    assert "entries: 30" in capsys.readouterr().out
    assert main(["data", "card", "table.parquet"]) == 0
    assert "Composition floor" in capsys.readouterr().out


def test_defaults_are_the_smoke_profile():
    for name, params in parameters(ROOT, "smoke", {}).items():
        builtin = params["patterns"] == "" if name == "11_measured" else params["dataset"].startswith("prototypes:")
        assert params["profile"] == "smoke" and builtin, name


def test_a_hash_of_digits_stays_text(tmp_path):
    (tmp_path / "figures/p").mkdir(parents=True)
    head = "model,id,commit,data,pretrained,seed,training_materials,seconds,crystal_system/accuracy"
    (tmp_path / "figures/p/results.csv").write_text(f"{head}\nxrd,1234567890,1234567,12e4567,,0,10,1.0,0.5\n")
    assert results_table("p", tmp_path).splitlines()[-1].endswith("| 50.0 % | 1 | 10 | 1 | 1234567 |")


def test_labels_and_finished_runs_are_looked_at_before_training(tmp_path, clone, capsys):
    table = load_table("prototypes:240")
    test = np.flatnonzero(sides(table["composition"].to_numpy()) == 2)
    few = np.where(np.isin(np.arange(len(table)), test), 1.0, np.nan).astype(np.float32)
    table.with_columns(band_gap=pl.Series(few)).write_parquet(tmp_path / "few.parquet")
    unlabelled = table.with_columns(pl.lit(None, pl.Float32).alias(t) for t in TARGETS)
    unlabelled.write_parquet(tmp_path / "unlabelled.parquet")
    ask = ["reproduce", "--only", "06_accuracy", "BATCH_SIZE=16"]
    for name, target, message in (("few", "band_gap", "known of 0 materials of the training side"), ("unlabelled", "", "has no values of"),
                                  ("unlabelled", "density", "it has those of no target")):
        assert main([*ask, f"DATASET={tmp_path / name}.parquet", f"TARGETS={target}"]) == 2
        assert message in capsys.readouterr().err
    rows = clone / "figures/smoke/runs.parquet"
    rows.parent.mkdir(parents=True, exist_ok=True)
    before = rows.read_bytes() if rows.exists() else None
    try:
        for broken in (b"not a table", None):
            if broken: rows.write_bytes(broken)
            else: pl.DataFrame(dict(a=[1])).write_parquet(rows)
            assert main([*ask, "DATASET=prototypes:240"]) == 2
            assert "runs.parquet is no table of runs" in capsys.readouterr().err
    finally: rows.write_bytes(before) if before else rows.unlink()


def test_a_run_without_its_predictions_is_made_again(tmp_path):
    data = MaterialSet.from_table(load_table("prototypes:120", cache=tmp_path), ["volume_per_atom"])
    train = lambda where: finetune(data, tmp_path / where, "composition", size="nano", epochs=1, batch_size=16, rows=tmp_path / "runs.parquet")
    keep_row(tmp_path / "runs.parquet", "test", train("first"))
    assert not train("second").folder.exists()
    kept = next((tmp_path / "predictions").glob("*.npz"))
    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged; without it the run is made again"): _ = train("second").predictions
    kept.unlink()
    assert (train("second").folder / "predictions.npz").exists()


def test_changes_of_errors(tmp_path):
    data = MaterialSet.from_table(load_table("prototypes:100", cache=tmp_path), ["volume_per_atom"])
    truth = data.targets[data.indices("test"), 0].numpy()
    wrong_by = lambda factor: SimpleNamespace(id="r", predictions=pl.DataFrame(dict(volume_per_atom=truth * factor)))
    found = compare_models({"composition": [wrong_by(1.2)], "both": [wrong_by(1.1), wrong_by(1 / 1.1)], "xrd": [wrong_by(1.5)]}, data)
    changes = dict(zip(found["model"], found["change"], strict=True))  # of those that are always compared, and of the last
    assert changes == pytest.approx({m: math.log(f) / math.log(1.2) - 1 for m, f in (("both", 1.1), ("xrd", 1.5))})
    assert set(found["against"]) == {"composition"} and len(compare_models({"xrd": [wrong_by(2)]}, data)) == 0
    wrong = truth * 1.2
    wrong[0] *= 50  # one composition decides
    far_off = SimpleNamespace(id="r", predictions=pl.DataFrame(dict(volume_per_atom=wrong)))
    alone = compare_models({"composition": [far_off], "both": [wrong_by(1.1)]}, data)
    place = int(data.indices("test")[0])
    assert composition_key(alone["heaviest"][0]) == composition_key(formula_of(data, place))
    assert alone["without"][0] == pytest.approx(changes["both"], abs=1e-4) and alone["change"][0] < alone["without"][0] - 0.1
    assert f"; without {alone['heaviest'][0]} " in change_said(alone.row(0, named=True))
    lost = SimpleNamespace(id="lost", predictions=None)
    with pytest.raises(ValueError, match="run lost is known by its row alone"): compare_models({"composition": [lost], "both": [lost]}, data)


def test_a_table_of_changes_has_each_target_in_its_column(tmp_path):
    (tmp_path / "figures/p").mkdir(parents=True)
    file, head = tmp_path / "figures/p/06_changes.csv", "model,against,target,materials,change,low,high,split\n"
    file.write_text(head + "a,b,volume_per_atom,9,0.1,0,0.2,composition\na,b,band_gap,9,-0.1,-0.2,0,chemistry\n")
    first, _, *rows = changes_table("p", tmp_path).splitlines()
    assert first.split(" | ")[-2:] == ["ln volume", "band gap |"]
    assert [["%" in cell for cell in row.split("|")[4:6]] for row in rows] == [[True, False], [False, True]]
    file.write_text(head)
    assert len(changes_table("p", tmp_path).splitlines()) == 2
    with pytest.raises(ValueError, match="make reproduce PROFILE=p"): changes_table("p", tmp_path, "changes")


def test_readme_says_what_the_files_say(tmp_path):
    shutil.copytree(ROOT / "figures", tmp_path / "figures")
    (tmp_path / "xxact/weights").mkdir(parents=True)
    for name in ("README.md", "xxact/weights/card.json"): shutil.copy(ROOT / name, tmp_path / name)
    assert "predictor" in update_readme(tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `make readme`"


def test_readme_examples_run(tmp_path, monkeypatch):
    import re
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"<!-- example -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    scope: dict = {}
    assert len(examples) == 4
    for example in examples:
        assert len(example.strip().splitlines()) <= 12
        exec(example, scope)
    assert json.dumps(list(map(float, scope["output"].targets[0]))) and scope["output"].crystal_system.shape == (1, 7)
    assert scope["patterns"].intensity.shape == (8, 4096) and scope["grid"].measured.any()
    assert abs(scope["seen"].d_spacing - 2.82).min() < 2e-3  # 200 of rock salt
