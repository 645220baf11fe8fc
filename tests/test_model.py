"What the model must do with any input: order, padding, missing labels, missing modalities."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xxact.composition import N_ELEMENTS, SYMBOLS, composition_key, formula_amounts, parse_formula, reduced_formula, split_of, tokens
from xxact.diffraction import LN_Q, N_WINDOWS, WINDOW
from xxact.encoders import CompositionEncoder, pool
from xxact.fusion import FUSIONS, XxaCT, load_model, save_model, start_from
from xxact.materials import MaterialSet
from xxact.mxm import hide_windows
from xxact.reproduce import load_table
from xxact.trainer import Pretraining, Supervised, draws, predict, share_of

amounts = st.dictionaries(st.sampled_from(SYMBOLS[1:]), st.integers(1, 30), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return MaterialSet.from_table(load_table("prototypes:48", cache=tmp_path_factory.mktemp("data")), ["volume_per_atom", "lattice_energy_per_atom"])


@given(amounts, st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_composition_knows_no_order_and_no_unit(a, k):
    written = "".join(f"{s}{n * k}" for s, n in reversed(a.items()))
    assert composition_key(written) == composition_key(reduced_formula(a)) == composition_key("".join(f"{s}{n}" for s, n in a.items()))
    z, f = parse_formula(written)
    assert list(z) == sorted(z) and abs(f.sum() - 1) < 1e-5 and formula_amounts(written).keys() == a.keys()
    assert split_of(composition_key(written)) in ("train", "val", "test")


@given(amounts)
@settings(max_examples=20, deadline=None)
def test_encoder_is_order_invariant_and_exact_to_20_elements(a):
    torch.manual_seed(0)
    encoder = CompositionEncoder(32, 2, 2).eval()
    z, f = (torch.from_numpy(t)[None] for t in tokens(a))
    order = torch.randperm(z.shape[1])
    padded = [torch.nn.functional.pad(t[:, order], (0, 20 - z.shape[1])) for t in (z.long(), f)]
    with torch.no_grad(): assert torch.allclose(pool(encoder(z.long(), f)), pool(encoder(*padded)), atol=1e-4)


def test_too_many_elements():
    with pytest.raises(ValueError, match="at most 20"): tokens(dict.fromkeys(SYMBOLS[1:22], 1.0))
    assert len(SYMBOLS) == N_ELEMENTS + 1


@pytest.mark.parametrize("modalities, fusion", [("both", f) for f in FUSIONS] + [("composition", "cross"), ("xrd", "cross")])
@pytest.mark.parametrize("tokeniser", ["peaks", "patches"])
def test_unknown_labels_weigh_nothing(data, modalities, fusion, tokeniser):
    torch.manual_seed(0)
    model = XxaCT("nano", modalities, fusion, tokeniser, data.target_names)
    model.fit_scale(data.targets)
    objective, batch = Supervised(model, augment="ideal").eval(), data.batch(torch.arange(8))
    some = batch.targets.clone()
    some[:4] = math.nan
    labels = torch.where(torch.arange(8) < 4, 0, batch.space_group)
    losses = objective(objective.prepare(batch._replace(targets=some, space_group=labels), draws(0, 0)))
    rest = objective(objective.prepare(data.batch(torch.arange(4, 8)), draws(0, 0)))
    for k in losses: assert torch.allclose(losses[k], rest[k], atol=1e-4), k
    nothing = objective(objective.prepare(batch._replace(targets=some * math.nan, space_group=labels * 0), draws(0, 0)))
    assert all(nothing[k] == 0 for k in nothing if k != "loss")
    nothing["loss"].backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_dropped_modality_cannot_be_seen(data):
    torch.manual_seed(0)
    model = XxaCT("nano", targets=data.target_names).eval()
    other = data.batch(torch.arange(8, 16))
    batch = data.batch(torch.arange(8))
    mixed = batch._replace(reflections=other.reflections)
    only = torch.tensor([[True, False]] * 8)
    with torch.no_grad():
        assert torch.allclose(model(batch, only).targets, model(mixed, only).targets, atol=1e-5)
        assert not torch.allclose(model(batch).targets, model(mixed).targets, atol=1e-3)


def test_weights(tmp_path, data):
    model = XxaCT("nano", targets=data.target_names)
    save_model(model, tmp_path / "m.safetensors")
    index = torch.arange(10)
    assert (predict(load_model(tmp_path / "m.safetensors"), data, index).targets == predict(model, data, index).targets).all()
    with pytest.raises(ValueError, match="size=nano, the model size=small"): start_from(XxaCT("small"), tmp_path / "m.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:5000])
    for bad in ("cut.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match="holds no xxact weights"): load_model(tmp_path / bad)
    model.config["size"] = "small"  # not what the weights are
    save_model(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors: weights of another size") as caught: load_model(tmp_path / "other.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("formula", ["Na.0Cl", "Na 0 Cl", "Na1e-9Cl", "Na0.000000001Cl", "Na1Cl1Na-1", "[NaCl]0O2", "(H2O) 0 NaCl", "[H2O]0OH"])
def test_no_element_of_a_formula_is_lost(formula):
    with pytest.raises(ValueError, match="positive"): formula_amounts(formula)


@pytest.mark.parametrize("tokeniser", ["peaks", "patches"])
@given(st.integers(0, 10**6), st.floats(0.1, 0.9))
@settings(max_examples=10, deadline=None)
def test_hidden_windows_cannot_be_seen(data, tokeniser, seed, share):
    torch.manual_seed(0)
    objective = Pretraining(XxaCT("nano", tokeniser=tokeniser), 1.0).eval()
    batch, visible = data.batch(torch.arange(8)), hide_windows(8, share, draws(seed, 0))
    r = batch.reflections
    place = ((math.log(2 * math.pi) - r.ln_d - LN_Q[0]) / WINDOW).long()
    hidden = (place >= 0) & (place < N_WINDOWS) & ~visible[r.row, place.clamp(0, N_WINDOWS - 1)]
    noise = torch.rand(len(hidden), generator=draws(seed, 1)) * 5
    other = batch._replace(reflections=r._replace(intensity=torch.where(hidden, r.intensity * noise, r.intensity)))
    with torch.no_grad(): a, b = objective.reconstruct(batch, visible), objective.reconstruct(other, visible)
    assert torch.allclose(a[0], b[0], atol=1e-5) and torch.equal(a[1], b[1])
    assert not (a[1] & visible).any()


@pytest.mark.parametrize("tokeniser", ["peaks", "patches"])
def test_what_was_not_measured_cannot_be_seen(data, tokeniser):
    torch.manual_seed(0)
    model, batch = XxaCT("nano", tokeniser=tokeniser, targets=data.target_names).eval(), data.batch(torch.arange(8))
    limits = LN_Q[0] + WINDOW * torch.stack([torch.linspace(0, 12, 8), torch.linspace(20, N_WINDOWS, 8)], 1)
    r = batch.reflections
    ln_q = math.log(2 * math.pi) - r.ln_d
    outside = (ln_q < limits[r.row, 0]) | (ln_q > limits[r.row, 1])
    other = r._replace(intensity=torch.where(outside, 0.5 * r.intensity, r.intensity))
    seen = [model.see(x, limits=v) for x, v in ((r, limits), (other, limits), (r, None))]
    with torch.no_grad(): a, b, whole = (model(batch._replace(reflections=s)).embedding for s in seen)
    assert torch.equal(a, b) and not torch.allclose(a, whole, atol=1e-3)


def test_measured_samples_are_those_of_the_whole_batch(data):
    objective, chosen = Supervised(XxaCT("nano", targets=data.target_names), modality_dropout=0.2, augment="measured"), torch.arange(9)
    batch = data.batch(chosen)
    whole = objective.prepare(batch, draws(1, 2))
    parts = [objective.prepare(batch, draws(1, 2), share_of(data, chosen, rank, 2)) for rank in (0, 1)]
    for field in ("ln_q", "intensity", "limits"):
        assert torch.equal(torch.cat([getattr(p.batch.reflections, field) for p in parts]), getattr(whole.batch.reflections, field))
    assert torch.equal(torch.cat([p.keep for p in parts]), whole.keep)
    assert (whole.batch.reflections.limits.std(0) > 0.01).all()
