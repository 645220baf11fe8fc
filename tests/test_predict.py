"Predictor: what comes in, calibration that holds on other materials, retrieval, and one line for what cannot be read."

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from xxact.composition import SYMBOLS, composition_key, parse_formula, split_of
from xxact.diffraction import LN_Q, WAVELENGTHS, Peaks, Reflections
from xxact.fusion import XxaCT, save_model
from xxact.materials import CRYSTAL_SYSTEMS, MaterialSet
from xxact.patterns import Measured, Pattern, as_pattern, to_reflections
from xxact.predict import (
    AXIS_STRAIN,
    CASES,
    KEPT_PEAKS,
    SYSTEM_OF_GROUP,
    Index,
    Input,
    Predictor,
    Raw,
    as_inputs,
    as_measured,
    ask,
    fit_case,
    formula_of,
    make_index,
    make_predictor,
    measured_set,
    mix,
    of_systems,
    peak_match,
    probabilities,
    random_lines,
    read_references,
    score_references,
    spread_of,
    strain_axes,
)
from xxact.reproduce import load_table, main, ship

X = np.linspace(10, 80, 3501)
Y = 50 + sum(h * np.exp(-(((X - c) / 0.08) ** 2)) for c, h in ((27.4, 1000), (36.1, 400), (41.2, 150), (54.3, 600), (69.0, 200)))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return load_table("prototypes:500", cache=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(table):
    return MaterialSet.from_table(table, ["volume_per_atom", "lattice_energy_per_atom"])


@pytest.fixture(scope="module")
def predictor(data, table):
    torch.manual_seed(0)
    model = XxaCT("nano", targets=data.target_names)
    model.fit_scale(data.targets[data.indices("train")])
    return make_predictor(model.eval(), data, make_index(table))


def test_one_or_many_of_any_kind(predictor, tmp_path):
    np.savetxt(tmp_path / "a.xy", np.c_[X, Y])
    pattern = as_pattern(X, Y, "CuKa")
    columns = ["formula", "volume_per_atom", "volume_per_atom_std", "lattice_energy_per_atom", "lattice_energy_per_atom_std", "crystal_system",
               "crystal_system_p", "space_group", "space_group_p", "in_domain", "nearest_match", "nearest", "nearest_formula"]  # fmt: skip
    one = predictor.predict("TiO2", tmp_path / "a.xy", "CuKa")
    assert one.columns == columns and one.height == 1
    many = predictor.predict(["TiO2", None, "TiO2", "TiO2", "Ti0.5O"], [pattern, (X, Y), None, str(tmp_path / "a.xy"), (list(X), list(Y))], "CuKa")
    assert many.columns == columns and many.height == 5
    wide = ["volume_per_atom", "volume_per_atom_std", "crystal_system_p", "space_group_p"]
    for row in (0, 3, 4):
        np.testing.assert_allclose(many[row].select(wide).to_numpy(), one.select(wide).to_numpy(), rtol=1e-4)
    assert many["crystal_system"].is_in(CRYSTAL_SYSTEMS).all() and many["space_group"].is_between(1, 230).all()
    assert (many.select("volume_per_atom_std", "lattice_energy_per_atom_std").to_numpy() > 0).all()
    assert predictor.embed("TiO2").shape == (1, 128) and predictor.embed(None, [pattern] * 3).shape == (3, 128)
    assert not np.allclose(predictor.embed("TiO2"), predictor.embed("TiO2", pattern))
    scan = Pattern(X, Y, 1.54)
    assert predictor.embed(None, (scan, scan)).shape == (2, 128)  # two patterns, not a pair of columns
    with pytest.warns(UserWarning, match="own wavelength 1.54 Å is used, not MoKa"): predictor.embed(None, scan, "MoKa")
    with pytest.raises(ValueError, match="wavelength 'foo'"): predictor.embed("NaCl", None, "foo")
    assert predictor.search([X, Y], top=np.int64(3), wavelength="CuKa").height == 3
    for several in ((scan, scan), ("a.xy", "b.xy"), [scan]):
        with pytest.raises(ValueError, match="one pattern at a time"): predictor.search(several)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("formula, pattern, reason", [
    (None, None, "give a formula, a pattern, or both"), ([], None, "give a formula, a pattern, or both"), ("Xx2", None, "Xx"),
    (["NaCl", "Q"], None, "input 1: "),
    (["NaCl"], [(X, Y)] * 2, "1 formulas and 2 patterns"), (["NaCl", None], None, "input 1: neither a formula nor a pattern"),
    (None, (X, Y[:9]), "two columns of one length"), (None, (X, 0 * Y), "no intensity is above 0"), (None, "nowhere.xy", "nowhere.xy: no such file"),
    (["NaCl", "KCl"], [(X, Y), "nowhere.xy"], "input 1: nowhere.xy: no such file"),
    (3, None, "formula=3 is no formula"), ({"Na": 1}, None, "is no formula"), ("CaSO4.2H2O", None, "a dot before H2O"),
    ("NaCl.2H2O", None, "a dot before H2O"), ("Fe3O4@SiO2", None, "'@' joins two materials"), ("MgCl2.6(H2O)", None, "a dot before H2O"),
    (["NaCl", 3], None, "input 1: formula 3 must be text"), (None, 3.5, "pattern=3.5 is no pattern"),
    (None, [(X, Y, X)], "a path, a Pattern, or a pair"), (None, [object()], "a path, a Pattern, or a pair"), (None, (X, None), "numbers|columns"),
    (None, Pattern(X, Y * np.nan, 1.54, {}), "points are numbers"), (None, Pattern(X, Y[:9], 1.54, {}), "two columns of one length"),
    (None, Pattern(X, -Y, 1.54, {}), "no intensity is above 0|no peak"), (None, Pattern(X, Y, -1.0, {}), "wavelength"),
    (None, Pattern(X, Y, 1.54, dict(kalpha2="1.544")), "kalpha2='1.544' must be"), (None, Pattern(X, Y, 1.54, dict(kalpha2=9.0)), "up to 2 % above"),
    (None, pl.DataFrame(dict(x=X, y=Y)), "not Series"),
])  # fmt: skip
def test_what_cannot_be_read_says_why(predictor, formula, pattern, reason):
    with pytest.raises(ValueError, match=reason) as e:
        predictor.predict(formula, pattern)
    assert "\n" not in str(e.value)


def test_many_are_read_ahead_and_answered_in_order(predictor):
    "Inputs of which a thread reads some while others are predicted, the first of them without a pattern, the last without a formula."
    formulas, threads = [*["TiO2", "NaCl", "MgO"] * 50, *[None] * 150], torch.get_num_threads()
    patterns = [None] * 150 + [Measured(np.array([3.2, 2.1, 1.5 + i / 1000]), np.array([1, 0.5, 0.3]), (LN_Q[0], LN_Q[1])) for i in range(150)]
    many, slow = predictor.predict(formulas, patterns), predictor.table(as_inputs(formulas, patterns))
    assert many["formula"].to_list() == formulas and many.schema == slow.schema
    for name in ("crystal_system_p", "space_group_p", "volume_per_atom_std"):
        np.testing.assert_allclose(many[name], slow[name], rtol=1e-4)
    last = patterns[-1]
    for bad, said in ((last._replace(d_spacing=np.arange(1.0, 4)), "d_spacing above 0 Å, falling"), (last._replace(limits=(2, 1)), "limits")):
        with pytest.raises(ValueError, match=f"input 299: .*{said}"): predictor.predict(formulas, [*patterns[:299], bad])
    with pytest.raises(ValueError, match="input 290: 'Qq'"): predictor.predict([*formulas[:290], "Qq", *formulas[291:]], patterns)
    assert torch.get_num_threads() == threads


def test_a_missing_modality_is_not_seen(predictor):
    "The stand-in for what is missing must not matter."
    a, b = (ask(predictor.model, as_inputs([f, None], [None, (X, Y)], "CuKa")) for f in ("NaCl", "KBr"))
    assert torch.equal(a.embedding[1], b.embedding[1]) and not torch.allclose(a.embedding[0], b.embedding[0])
    alone = ask(predictor.model, as_inputs("NaCl"))
    torch.testing.assert_close(alone.embedding[0], a.embedding[0], rtol=1e-4, atol=1e-5)


def test_unimodal_weights_answer_what_they_can(data):
    torch.manual_seed(0)
    p = make_predictor(XxaCT("nano", "composition", targets=data.target_names).eval(), data)
    assert set(p.cases) == {"formula"} and p.predict(["NaCl", "MgO"]).height == 2
    with pytest.raises(ValueError, match="these weights need a formula"):
        p.predict(None, (X, Y), "CuKa")


def made_up(n: int, seed: int) -> tuple[Raw, torch.Tensor, torch.Tensor]:
    "Predictions whose errors grow along one direction of the embedding, and whose classes are too sure of themselves; truth and space groups."
    g = torch.Generator().manual_seed(seed)
    embedding, noise = torch.randn(n, 16, generator=g), torch.randn(n, 2, generator=g)
    targets = torch.randn(n, 2, generator=g)
    truth = targets + noise * torch.stack([0.3 * (0.7 * embedding[:, 0]).exp(), torch.full((n,), 0.3)], 1)
    truth[::7, 1] = torch.nan
    logits = torch.randn(n, 230, generator=g)
    group = 1 + torch.distributions.Categorical(logits=logits).probs.multinomial(1, generator=g).squeeze(1)
    system = torch.zeros(n, 7).index_add_(1, SYSTEM_OF_GROUP, logits.softmax(1)).log()
    return Raw(targets, 3 * system, 3 * logits, embedding, embedding), truth, group


def test_intervals_and_probabilities_hold_on_other_materials():
    case = fit_case(*made_up(3000, 0), made_up(3000, 2)[0].embedding)
    raw, truth, group = made_up(3000, 1)
    std, far = spread_of(raw, case)
    inside, known = (raw.targets - truth).abs() <= 1.645 * std, truth.isfinite()
    assert ((inside & known).sum(0) / known.sum(0) - 0.9).abs().max() < 0.02
    first = std[:, 0].argsort().chunk(3)
    assert all(abs(float(inside[rows, 0].float().mean()) - 0.9) < 0.05 for rows in first)  # also where it is sure, and where it is not
    assert std[first[2], 0].mean() > 2 * std[first[0], 0].mean() and 0.9 < case["temperature"][1] / 3 < 1.1
    assert (
        abs(float((far > 1).float().mean()) - 0.01) < 0.01
        and (spread_of(raw._replace(embedding=5 + 5 * raw.embedding), case)[1] > 1).float().mean() > 0.99
    )
    system, space = probabilities(raw, case["temperature"])
    assert torch.allclose(space.sum(1), torch.ones(3000), atol=1e-5)
    sure, hit = space.amax(1), (space.argmax(1) == group - 1).float()
    assert abs(float(sure.mean() - hit.mean())) < 0.03
    with pytest.raises(ValueError, match="too few to calibrate on; at least 40"):
        fit_case(*made_up(30, 0), torch.randn(99, 16))


def test_a_measured_pattern_finds_its_material(predictor, data, table):
    index = torch.arange(0, len(data), 40)
    first = 0
    for i, p in zip(index.tolist(), as_measured(data, index, seed=3), strict=True):
        found = predictor.search(p, top=5)
        assert found["match"].is_sorted(descending=True) and found.height == 5
        first += found["space_group"][0] == table["space_group"][i]
        own = predictor.search(p, formula=table["formula"][i])
        assert data.material_ids[i] in own["material_id"].to_list()
    assert first > 0.6 * len(index)  # of the untrained model's 200 candidates the peaks find the structure


def test_known_materials_have_a_say(predictor, data, table):
    "With its own composition among the known ones a pattern's space group is found; left out, others stand in for it."
    index = data.indices("test")[:60]
    patterns, truth = as_measured(data, index, seed=5), data.space_group[index].long() - 1
    formulas = [table["formula"][i] for i in index.tolist()]
    inputs = [Input(None, p) for p in patterns]
    network = probabilities(ask(predictor.model, inputs), predictor.cases["pattern"]["temperature"])
    known, unknown = predictor.symmetry(inputs), predictor.symmetry(inputs, formulas)
    right = [float((group.argmax(1) == truth).float().mean()) for _, group in (network, unknown, known)]
    assert right[0] < right[1] < right[2] and right[2] > 0.8, right
    for system, group in (known, unknown):
        torch.testing.assert_close(group.sum(1), torch.ones(len(index)), rtol=0, atol=1e-5)
        torch.testing.assert_close(system, of_systems(group), rtol=0, atol=1e-5)
    nearest = predictor.table(inputs, formulas)["nearest_formula"]
    assert not any(composition_key(m) == composition_key(f) for m, f in zip(nearest, formulas))
    assert predictor.table([Input("NaCl", None)])["nearest"].to_list() == [None]


def test_axes_are_strained_as_far_as_the_crystal_system_lets_them():
    "Of a cubic cell all lines move alike; of others each by its own share, none by more than the axes do; the same again from the same seed."
    groups = torch.tensor([225, 136, 62, 2, 0])
    r = Reflections(torch.linspace(1, -0.5, 200).repeat(5), torch.ones(1000), torch.arange(5).repeat_interleave(200), 5)
    moved = [strain_axes(r, groups, torch.Generator().manual_seed(s)).ln_d - r.ln_d for s in (0, 0, 1)]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    spread = moved[0].view(5, 200).std(1)
    assert spread[0] < 1e-6 and (spread[1:] > 1e-4).all() and moved[0].abs().max() < 5 * AXIS_STRAIN


def test_votes_and_network_are_mixed():
    network = torch.full((1, 230), 1 / 230)
    places = torch.tensor([[225, 62]])
    votes = dict(lines=torch.tensor([20.0]), match=torch.tensor([[0.9, 0.5]]), own=torch.tensor([[False, True]]), space_group=places)
    mixed = lambda *weights, **other: mix(network, **votes | other, weights=torch.tensor(weights))
    assert mixed(3.0, 0.0, -50.0, 0.0, 0.0)[0, 224] > 0.99
    assert mixed(3.0, 0.8, -50.0, 0.0, 0.0)[0, 61] > 0.99  # of its own composition
    torch.testing.assert_close(mixed(3.0, 0.0, 80.0, 0.0, 0.0), network)  # where the network is surer
    few, many = (mixed(3.0, 0.0, 30.0, 0.0, -5.0, lines=torch.tensor([n]))[0, 224] for n in (3.0, 60.0))
    assert few < many  # a match of many lines counts more
    unknown = mixed(3.0, 0.0, -50.0, 0.0, 0.0, space_group=torch.zeros(1, 2))
    torch.testing.assert_close(unknown, network)  # materials without a space group have no vote


def test_an_index_may_be_smaller_than_what_is_left_of_it(predictor):
    few = Predictor(predictor.model, predictor.cases, predictor.elements, predictor.index.take(torch.tensor([0, 1])))
    one = [Input(None, m) for m in as_measured_once()]
    alone = few.symmetry(one, [few.index.formula[0]])[1]
    for without in ([few.index.formula[0]] * 2, [few.index.formula[0], "XeF2"]):  # what is left out for another changes nothing
        torch.testing.assert_close(few.symmetry(one * 2, without)[1][:1], alone)
    none = Predictor(predictor.model, predictor.cases, predictor.elements, predictor.index.take(torch.tensor([0])))
    table = none.table(one, [none.index.formula[0]])
    assert table["nearest"].to_list() == [None] and table["space_group_p"].is_finite().all()


def test_all_of_its_own_composition_are_compared(predictor):
    "However many polymorphs a composition has, none is lost to the shortlist."
    own = torch.arange(5, 25)
    hits = predictor.index.compare(as_measured_once(), [own], shortlist=3, kept=40)
    assert set(hits.row[hits.own].tolist()) == set(own.tolist()) and (hits.row[~hits.own] > 0).sum() <= 3


@pytest.mark.parametrize("leave_out", [False, True])
def test_patterns_are_compared_one_by_one_or_together(predictor, leave_out):
    "What stands beside a pattern changes nothing, whatever its range and how many materials have its composition."
    rng, whole = np.random.default_rng(0), as_measured_once()[0]
    ends = [whole.limits, (LN_Q[0], LN_Q[0] + 1), (whole.limits[0] + 0.3, LN_Q[1]), whole.limits]
    patterns = [random_lines(whole._replace(limits=e), rng) for e in ends] * 5
    own = [torch.arange(n % 7) for n in range(len(patterns))]
    kept = len(predictor.index.formula) + 5
    together = predictor.index.compare(patterns, own, leave_out, kept=kept)
    for i, (one, of) in enumerate(zip(patterns, own)):
        alone = predictor.index.compare([one], [of], leave_out, kept=kept)
        torch.testing.assert_close(together.match[i], alone.match[0], atol=1e-5, rtol=0)
        assert set(together.row[i][together.own[i]].tolist()) == (set() if leave_out else set(of.tolist()))


def test_the_match_of_peaks_is_a_cosine_of_what_both_show():
    "Gaussians of √-intensity, moved against each other; lines beyond the measured range do not count."
    rng, k, fwhm, step = np.random.default_rng(1), KEPT_PEAKS, 0.01, 0.002
    low, high = LN_Q[0] + 0.4, LN_Q[1] - 0.5
    mine, theirs = np.sort(rng.uniform(low + 0.05, high - 0.05, k)), np.sort(rng.uniform(*LN_Q, (5, k)), 1)
    theirs[0] = mine + 0.012  # the same, a little larger
    heights, others = rng.uniform(0.1, 1, k), rng.uniform(0.1, 1, (5, k))
    others[0] = heights
    tensor = lambda x: torch.tensor(x, dtype=torch.float32)[None]
    found = peak_match(Peaks(tensor(mine), tensor(heights), tensor((low, high))), tensor(theirs), tensor(others))[0]
    x = np.arange(low, high, step)
    drawn = lambda at, y: (np.sqrt(y) * np.exp(-4 * np.log(2) * ((x[:, None] - at) / fwhm) ** 2)) @ ((at >= low) & (at < high - step))
    cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))
    for i in range(5):
        of = drawn(theirs[i], others[i])
        best = max(cosine(drawn(mine + s * step, heights), of) for s in range(-15, 16))
        assert found[i] == pytest.approx(best, abs=0.02), i
    assert found[0] > 0.98 > 0.8 > found[1:].max()


def as_measured_once(): return [as_inputs(None, (X, Y), "CuKa")[0].pattern]


def test_what_is_missing_of_a_predictor(predictor, tmp_path):
    predictor.save(tmp_path)
    whole = load_file(tmp_path / "calibration.safetensors")
    for change, said in ((lambda t: t.pop("both.temperature"), "a part of calibration"), (lambda t: t.pop("pattern.mix"), "a part of calibration"),
                         (lambda t: t["pattern.scale"].fill_(torch.nan), "not finite")):
        part = {k: v.clone() for k, v in whole.items()}
        change(part)
        save_file(part, tmp_path / "calibration.safetensors")
        with pytest.raises(ValueError, match=said): Predictor.load(tmp_path)
    save_file(whole, tmp_path / "calibration.safetensors")
    (tmp_path / "index.safetensors").unlink()
    with pytest.raises(ValueError, match="index.safetensors.* is missing"): Predictor.load(tmp_path)
    with pytest.raises(ValueError, match="path='' must be a folder"): Predictor.load("")


@pytest.mark.skipif(not os.environ.get("XXACT_REAL_DATA"), reason="set XXACT_REAL_DATA to the folder of real data")
def test_the_card_says_what_the_shipped_files_do():
    shipped, folder = Predictor.load(), Path(os.environ["XXACT_REAL_DATA"]) / "xrd"
    said = shipped.card["measured"]["RRUFF A"]
    found = score_references(shipped, *read_references(folder))["RRUFF A"]
    assert found == pytest.approx(said, abs=0.015)  # two of 155 patterns, on another processor


def test_combs_are_not_like_the_training_data(predictor):
    rng = np.random.default_rng(0)
    combs = [Measured(2 * np.pi / np.exp(np.sort(rng.uniform(*LN_Q, 60))), rng.uniform(0.01, 1, 60), LN_Q) for _ in range(40)]
    assert predictor.table([Input(None, c) for c in combs])["in_domain"].mean() < 0.1


def test_random_lists_are_out_of_the_domain_and_measured_minerals_are_not():
    rng, shipped = np.random.default_rng(0), Predictor.load()
    angles = [np.sort(rng.uniform(10, 88, n)) for n in rng.integers(6, 81, 60)]
    lists = [Measured(0.7703 / np.sin(np.radians(x / 2)), rng.uniform(0.02, 1, len(x)), LN_Q) for x in angles]  # not made as those it learned from
    assert shipped.table([Input(None, one) for one in lists])["in_domain"].mean() < 0.2
    if not os.environ.get("XXACT_REAL_DATA"): pytest.skip("set XXACT_REAL_DATA to the folder of real data for the other half")
    labels, scans = read_references(Path(os.environ["XXACT_REAL_DATA"]) / "xrd")
    found = [to_reflections(s) for s in scans]
    assert shipped.table([Input(None, one) for one in found])["in_domain"].mean() > 0.9
    assert shipped.table([*map(Input, labels["formula"], found)])["in_domain"].mean() > 0.8


def test_search_says_what_it_lacks(predictor, tmp_path):
    with pytest.raises(ValueError, match="none of the 5\\d\\d known materials has just these elements"):
        predictor.search((X, Y), elements=["Xe"], wavelength="CuKa")
    with pytest.raises(ValueError, match="none of the 5\\d\\d known materials has the composition NaCl9"):
        predictor.search((X, Y), formula="NaCl9", wavelength="CuKa")
    for wrong, said in ((dict(elements=[]), "must be a list"), (dict(elements="CO"), "must be a list"), (dict(top="3"), "top=3 must be a whole")):
        with pytest.raises(ValueError, match=said): predictor.search((X, Y), wavelength="CuKa", **wrong)
    with pytest.raises(ValueError, match="top=0 must be a whole number, at least 1"):
        predictor.search((X, Y), top=0, wavelength="CuKa")
    with pytest.raises(ValueError, match="there is no element 'Q'"):
        predictor.search((X, Y), elements=["Q"], wavelength="CuKa")
    with pytest.raises(ValueError, match="formula=NaCl does not consist of just K, Cl"):
        predictor.search((X, Y), formula="NaCl", elements=["K", "Cl"], wavelength="CuKa")
    bare = Predictor(predictor.model, predictor.cases, predictor.elements)
    with pytest.raises(ValueError, match="has no index of materials"):
        bare.search((X, Y), wavelength="CuKa")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no index of materials"):
        Index.load(tmp_path / "a.safetensors")
    predictor.index._replace(ln_q=predictor.index.ln_q[:, :32], intensity=predictor.index.intensity[:, :32]).save(tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="keeps 32 peaks a material, not 64"):
        Index.load(tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="at least one pattern"):
        predictor.index.compare([])


def test_a_folder_keeps_everything(predictor, tmp_path):
    predictor.save(tmp_path / "a")
    again = Predictor.load(tmp_path / "a")
    a, b = (p.predict(["NaCl", None], [None, (X, Y)], "CuKa") for p in (predictor, again))
    np.testing.assert_allclose(
        a.select("volume_per_atom", "volume_per_atom_std").to_numpy(), b.select("volume_per_atom", "volume_per_atom_std").to_numpy(), rtol=1e-5
    )
    assert again.search((X, Y), wavelength="CuKa")["material_id"].equals(predictor.search((X, Y), wavelength="CuKa")["material_id"])
    for name in ("card.json", "calibration.safetensors", "model.safetensors"):
        (tmp_path / "a" / name).write_bytes(b"{")
        with pytest.raises(ValueError, match="holds no"):
            Predictor.load(tmp_path / "a")
    with pytest.raises(ValueError, match="holds no predictor"):
        Predictor.load(tmp_path)


def test_a_model_of_another_size_is_no_part_of_a_predictor(predictor, tmp_path):
    predictor.save(tmp_path)
    save_model(XxaCT("small", targets=predictor.model.config["targets"]), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="belongs to another model"):
        Predictor.load(tmp_path)


def test_a_file_without_peaks_is_named(predictor, tmp_path):
    np.savetxt(tmp_path / "flat.xy", np.c_[X, 0 * X + 7])
    with pytest.raises(ValueError, match="flat.xy: no peak"):
        predictor.predict(None, tmp_path / "flat.xy", "CuKa")


def test_unknown_elements_are_out_of_the_domain(predictor, data, table):
    strange = SYMBOLS[1 + int((~predictor.elements).int().argmax())]
    assert predictor.predict(f"{strange}O2")["in_domain"].to_list() == [False]
    formulas = [table["formula"][i] for i in data.indices("train").tolist()]
    known = [f for f in formulas if all(predictor.elements[z - 1] for z in parse_formula(f)[0])]
    assert len(known) > 20 and predictor.predict(known)["in_domain"].mean() > 0.7


def test_formulas_come_back_as_fractions(data, table):
    for i in (0, 77, 200):
        (z, x), (other_z, other_x) = parse_formula(formula_of(data, i)), parse_formula(table["formula"][i])
        np.testing.assert_array_equal(z, other_z), np.testing.assert_allclose(x, other_x, atol=1e-5)


def test_nothing_measured_is_no_input():
    assert Input(None, Measured(np.ones(1), np.ones(1), LN_Q)).case == "pattern" and list(CASES) == ["formula", "pattern", "both"]


def test_what_is_shipped_has_not_seen_what_scores_it(tmp_path, table):
    dataset, measured = tmp_path / "table.parquet", tmp_path / "measured.parquet"
    table.write_parquet(dataset)
    out = table["formula"].filter(table["formula"].map_elements(lambda f: split_of(composition_key(f)) == "train", pl.Boolean)).unique().sort()[:40]
    pl.DataFrame({"formula": out}).write_parquet(measured)
    p = ship(str(dataset), tmp_path / "weights", leave_out=[measured], size="nano", epochs=1, device="cpu", runs=tmp_path / "runs")
    assert p.card["left_out"] == f"{table['formula'].is_in(out.implode()).sum()} materials of 40 compositions"
    [params] = (tmp_path / "runs").glob("*/params.json")
    assert json.loads(params.read_text())["augment"] == "measured"
    again = Predictor.load(tmp_path / "weights")
    assert again.card["test"] == p.card["test"] and set(p.card["test"]) == {"formula", "pattern", "both"}
    assert len(again.index.formula) == len(table) and again.card["licence"] and again.card["citation"] and again.card["not_for"]
    assert {"mix", "least_match"} <= set(again.cases["both"]) and "crystal_system/accuracy/known" in p.card["test"]["pattern"]
    anew = ship(str(dataset), tmp_path / "anew", leave_out=[measured], weights=tmp_path / "weights", runs=tmp_path / "nowhere")
    assert anew.card["test"] == p.card["test"] and anew.card["training"] == p.card["training"] and "--size nano" in p.card["training"]["command"]
    pl.DataFrame({"formula": [*out, table["formula"].filter(~table["formula"].is_in(out.implode()))[0]]}).write_parquet(measured)
    with pytest.raises(ValueError, match="was trained with 1 of the compositions to leave out"):
        ship(str(dataset), tmp_path / "anew", leave_out=[measured], weights=tmp_path / "weights", runs=tmp_path / "nowhere")
    for case, scored in p.card["test"].items():
        assert scored["n"] > 20 and 0 <= scored["volume_per_atom/coverage"] <= 1 and 0 <= scored["crystal_system/calibration_error"] < 1, case
    with pytest.raises(ValueError, match="is no Parquet table with a column formula"):
        ship(str(dataset), tmp_path / "weights", leave_out=[params], runs=tmp_path / "runs")


@pytest.mark.parametrize("options, message", [
    (dict(epochs=-1), "epochs=-1 must be at least 1"), (dict(size="huge"), "size='huge' does not exist; choose from nano"),
    (dict(copies=0), "copies=0 and workers=1 must be at least 1"), (dict(device="tpu"), "tpu")])
def test_what_cannot_be_shipped_is_told_before_data_are_read(options, message, tmp_path):
    with pytest.raises(ValueError, match=message): ship("nowhere.parquet", tmp_path / "weights", **options)


@pytest.fixture(scope="module")
def weights(predictor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    predictor.save(folder)
    return str(folder)


def test_the_command_answers_for_files_and_formulas(weights, predictor, tmp_path, capsys):
    good, bad = tmp_path / "a.xy", tmp_path / "bad.xy"
    np.savetxt(good, np.c_[X, Y]), bad.write_text("a story")
    assert main(["predict", str(good), "--formula", "TiO2", "--wavelength", "CuKa", "--weights", weights, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row == dict(file=str(good), warnings=[], wavelength=WAVELENGTHS["CuKa"]) | predictor.predict("TiO2", good, "CuKa").to_dicts()[0]
    assert main(["predict", str(good), "--weights", weights, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert "Cu Kα (1.54184 Å) is taken" in " ".join(row["warnings"]) and row["wavelength"] == WAVELENGTHS["CuKa"]
    assert main(["predict", str(good), str(bad), "--wavelength", "1.5406", "--weights", weights, "--json"]) == 2
    said = capsys.readouterr()
    assert [("error" in r, "no two columns" in r.get("error", "")) for r in json.loads(said.out)] == [(False, False), (True, True)]
    assert said.err.count("bad.xy") == 1 and "1 of 2 files failed" in said.err
    assert main(["predict", str(good), str(good), "--weights", weights, "--json"]) == 0  # as many answers as files
    assert [len(r["warnings"]) for r in json.loads(capsys.readouterr().out)] == [1, 1]
    assert main(["predict", "--formula", "TiO2", "--weights", weights, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["file"] is None and row["nearest"] is None
    q = tmp_path / "q.xy"
    np.savetxt(q, np.c_[4 * np.pi * np.sin(np.radians(X / 2)) / 1.5406, Y])
    found = []
    for options in ([str(q), "--unit", "q"], [str(good), "--kalpha2", "keep"], [str(good), "--kalpha2", "strip"]):
        assert main(["predict", *options, "--wavelength", "1.5406", "--weights", weights, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["volume_per_atom"])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[1] != pytest.approx(found[2], rel=1e-6)
    assert main(["predict", "--formula", "TiO2", "--weights", weights]) == 0
    said = capsys.readouterr().out
    assert "crystal system" in said and "volume (Å³/atom)" in said and "±" in said
    twin = tmp_path / "other" / good.name
    twin.parent.mkdir()
    shutil.copy(good, twin)
    shutil.copy(good, tmp_path / "c.xy")
    assert main(["predict", str(good), str(twin), str(tmp_path / "c.xy"), "--wavelength", "1.5406", "--weights", weights]) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert names == [str(good), str(twin), "c.xy"]  # equal names with their folders


def test_a_terminal_that_has_no_greek_letters(weights, tmp_path, monkeypatch):
    np.savetxt(tmp_path / "a.xy", np.c_[X, Y])
    for options in ([], ["--json"]):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", out), monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(["predict", str(tmp_path / "a.xy"), "--weights", weights, *options]) == 0
        said = out.buffer.getvalue().decode("ascii")
    assert "Cu Kα" in json.loads(said)[0]["warnings"][0]


def test_the_command_searches(weights, predictor, table, tmp_path, capsys):
    formula = table["formula"].value_counts(sort=True)["formula"][0]
    np.savetxt(tmp_path / "a.xy", np.c_[X, Y]), np.savetxt(tmp_path / "b.xy", np.c_[X, Y])
    files = [str(tmp_path / "a.xy"), str(tmp_path / "b.xy")]
    assert main(["search", *files, "--formula", formula, "--top", "2", "--wavelength", "CuKa", "--weights", weights, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    expected = predictor.search(files[0], formula=formula, top=2, wavelength="CuKa")
    assert [a["file"] for a in answers] == files and {a["wavelength"] for a in answers} == {WAVELENGTHS["CuKa"]}
    for a in answers:
        assert [f["material_id"] for f in a["found"]] == expected["material_id"].to_list()
        assert [f["match"] for f in a["found"]] == pytest.approx(expected["match"].to_list(), abs=1e-4)
    few = table.filter(pl.col("formula") == formula)
    few.write_parquet(tmp_path / "few.parquet")
    assert main(["search", files[0], "--candidates", str(tmp_path / "few.parquet"), "--wavelength", "CuKa", "--weights", weights, "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)
    assert {f["material_id"] for f in answer["found"]} == set(few["material_id"][:10]) or len(few) > 10
    (tmp_path / "bad.xy").write_text("a story")
    assert main(["search", files[0], str(tmp_path / "bad.xy"), "--formula", "NaCl9", "--weights", weights, "--json"]) == 2
    said = capsys.readouterr()
    assert ["composition NaCl9" in a["error"] for a in json.loads(said.out)] == [True, False] and "2 of 2 files failed" in said.err
    assert main(["search", files[0], "--elements", "Ti,Q", "--weights", weights]) == 2
    assert "there is no element 'Q'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, reason", [
    (["predict"], "give a file, --formula, or both"), (["predict", "--formula", "Qq"], "Qq"), (["predict", "no.xy"], "no.xy: no such file"),
    (["predict", "no.xy", "--weights", "nowhere"], "nowhere does not exist"), (["search", "no.xy", "--candidates", "no.parquet"], "no.parquet"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(weights, arguments, reason, capsys):
    assert main([*arguments, *([] if "--weights" in arguments else ["--weights", weights])]) == 2
    said = capsys.readouterr()
    assert reason in said.err and len(said.err.strip().splitlines()) == 1 and not said.out


def test_drawn_patterns_differ_by_seed_and_not_by_processes(data):
    some = torch.arange(100)
    one, again, many, other = (as_measured(data, some, seed=s, workers=w) for s, w in ((1, 1), (1, 1), (1, 2), (2, 1)))
    same = lambda a, b: all((p is None) == (q is None) and (p is None or np.array_equal(p.d_spacing, q.d_spacing)) for p, q in zip(a, b))
    assert same(one, again) and same(one, many) and not same(one, other)
    drawn = measured_set(data, 2, seed=1)
    counts = [len(data.indices(s)) for s in ("train", "val", "test")]
    assert [len(drawn.indices(s)) for s in ("train", "val", "test")] == [2 * counts[0], *counts[1:]]
    ids = drawn.material_ids
    assert ids[: counts[0]] == ids[counts[0] : 2 * counts[0]]
    first, second = (drawn.batch(torch.tensor([i])).reflections.ln_d for i in (0, counts[0]))
    assert len(first) != len(second) or not torch.equal(first, second)


def test_the_index_knows_elements_and_lines(predictor, table):
    index = predictor.index
    for row in range(0, len(table), 37):
        numbers = parse_formula(table["formula"][row])[0]
        held = index.holds([int(z) for z in numbers])
        assert held[row] and all(set(parse_formula(index.formula[i])[0]) == set(numbers) for i in held.nonzero().squeeze(1).tolist())
        d, y = index.lines(row)
        assert len(d) and y.max() == 1 and np.abs(np.log(table["d_spacing"][row].to_numpy()[:, None] / d)).min(0).max() < 2e-3
