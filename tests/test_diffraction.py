"Reflections: parity with pymatgen on real structures, and what must not change them."
import json
import math
import os
import platform
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.diffraction.xrd import XRDCalculator
from pymatgen.core import Lattice, Structure

from xxact import diffraction
from xxact.diffraction import (LN_Q, CU_KA, MEASUREMENTS, N_PEAKS, N_WINDOWS, NARROWEST, RADIUS, TWO_THETA, WAVELENGTHS, WINDOW, Augmentation,
                               Crystal, Measurement, Reflections, batch_reflections, crystal_reflections, draw, draw_measurement, hide, ln_q_of,
                               lorentz_polarisation, observe, peak_shape, peaks, perturb, reflections, render, structure_reflections, to_grid,
                               two_theta_of, window_pattern)
from xxact.reproduce import main, speed_table

REAL = os.environ.get("XXACT_REAL_DATA")


def differences(structure: Structure, radiation: str) -> tuple[float, float]:
    "Largest differences from pymatgen in position (degrees) and intensity (of the strongest), peaks above 0.1 %, lists merged within 2e-3 degrees."
    low, high = TWO_THETA
    wavelength = WAVELENGTHS[radiation]
    reference = XRDCalculator(radiation).get_pattern(structure, two_theta_range=(low, high))
    d_min = wavelength / 2 / math.sin(math.radians(high / 2))
    d, i = (torch.tensor(a, dtype=torch.float64) for a in structure_reflections(structure, d_min=d_min, weakest=0))
    angle, mine = two_theta_of(d, wavelength).numpy(), (i * lorentz_polarisation(d, wavelength)).numpy()
    angle, mine = angle[angle >= low], mine[angle >= low]
    x = np.concatenate([reference.x, angle])
    group = np.empty(len(x), int)
    group[x.argsort()] = np.cumsum(np.diff(np.sort(x), prepend=-9) > 2e-3) - 1
    lists = (group[: len(reference.x)], reference.x, reference.y), (group[len(reference.x) :], angle, mine)
    areas = [np.bincount(g, y, group.max() + 1) for g, _, y in lists]
    places = [np.bincount(g, x * y, group.max() + 1) / np.maximum(area, 1e-30) for (g, x, y), area in zip(lists, areas, strict=True)]
    areas = [area / area.max() for area in areas]
    place = np.where(areas[0] > 0, *places)
    strong = (np.maximum(*areas) > 1e-3) & (place > low + 2e-3) & (place < high - 2e-3)
    common = strong & (np.minimum(*areas) > 0)
    return np.abs(places[0] - places[1])[common].max(initial=0), np.abs(areas[0] - areas[1])[strong].max(initial=0)


def real_structures(n: int, at_most: int):
    import polars as pl
    table = pl.read_parquet(Path(REAL) / "mp/structures.parquet").filter(pl.col("n_sites") <= at_most).sample(n, seed=0)
    for row in table.iter_rows(named=True):
        yield row["material_id"], Structure(np.reshape(row["lattice"], (3, 3)), row["atomic_numbers"], np.reshape(row["frac_coords"], (-1, 3)))


@pytest.mark.skipif(not REAL, reason="XXACT_REAL_DATA is not set")
@pytest.mark.parametrize("radiation, n, at_most", [("CuKa", 60, 200), *((r, 8, 8) for r in ("MoKa", "CoKa", "CrKa", "FeKa", "AgKa"))])
def test_parity_with_pymatgen_on_real_structures(radiation, n, at_most):
    for name, structure in real_structures(n, at_most):
        position, intensity = differences(structure, radiation)
        assert position < 1e-3 and intensity < 1e-4, (name, position, intensity)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="XXACT_REAL_DATA is not set")
@pytest.mark.parametrize("radiation", ["CuKa", "MoKa", "CoKa", "CrKa", "FeKa", "AgKa"])
def test_parity_with_pymatgen_on_many_real_structures(radiation):
    test_parity_with_pymatgen_on_real_structures(radiation, 300, 200)


def random_crystal(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lattice = Lattice.from_parameters(*rng.uniform(3, 7, 3), *rng.uniform(70, 110, 3)).matrix
    n = rng.integers(1, 6)
    return lattice, rng.random((n, 3)), rng.integers(1, 90, n)


def same(a, b, eps=2e-4):
    "Equal lists, up to lines at the threshold of the weakest."
    edges = np.unique(np.concatenate([a[0], b[0]]))
    edges = edges[np.diff(edges, prepend=0) > eps * edges]  # lines closer than this count as one
    areas = [np.bincount(np.searchsorted(edges, d * (1 + eps / 2)) - 1, i * d**2, len(edges)) for d, i in (a, b)]
    return np.abs(areas[0] / areas[0].max() - areas[1] / areas[1].max()).max() < 1e-3


@given(st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_description_does_not_matter(seed):
    lattice, x, z = random_crystal(seed)
    rng = np.random.default_rng(seed + 1)
    expected = reflections(lattice, x, z)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    order = rng.permutation(len(z))
    assert same(reflections(lattice @ rotation, x + rng.integers(-2, 3, x.shape) + rng.random(3), z), expected)
    assert same(reflections(lattice, x[order], z[order]), expected)
    doubled = np.concatenate([x / [2, 1, 1], x / [2, 1, 1] + [0.5, 0, 0]])
    assert same(reflections(lattice * [[2], [1], [1]], doubled, np.tile(z, 2)), expected)
    sheared = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    assert same(reflections(sheared @ lattice, x @ np.linalg.inv(sheared), z), expected)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
@settings(max_examples=15, deadline=None)
def test_crystals_done_together_are_as_done_alone(seeds):
    crystals = [Crystal(*random_crystal(s)) for s in seeds]
    for (d, i), crystal in zip(crystal_reflections(crystals), crystals, strict=True):
        d_alone, i_alone = reflections(*crystal)
        np.testing.assert_array_equal(d, d_alone)
        np.testing.assert_allclose(i, i_alone, atol=1e-6)


def test_thermal_motion_damps_by_the_debye_waller_factor():
    crystal = random_crystal(1)
    (d, still), (d_hot, hot) = (reflections(*crystal, b_iso=b, weakest=0) for b in (0, 2.0))
    ratio = hot / still / np.exp(-2 * 2.0 / (4 * d**2))  # exp(-2 B s²), up to the scale of the strongest
    visible = still > 1e-3
    assert np.allclose(d, d_hot) and np.allclose(ratio[visible], ratio[visible][0], rtol=1e-3)


@pytest.mark.parametrize("cells", [(17, 17, 17), (50, 50, 2), (1250, 2, 2)])
def test_thousands_of_sites(cells):
    x = np.stack(np.meshgrid(*(np.arange(n) / n for n in cells)), -1).reshape(-1, 3)  # a supercell: the crystal of one site
    tracemalloc.start()
    d, i = reflections(np.diag(cells) * 3.0, x, np.full(len(x), 29))
    assert tracemalloc.get_traced_memory()[1] < 2e9
    tracemalloc.stop()
    d_one, i_one = reflections(np.eye(3) * 3, [[0, 0, 0]], [29])
    assert len(d) == len(d_one) and np.allclose(d, d_one, rtol=1e-5) and np.allclose(i, i_one, atol=1e-4)


def test_extinct_lines_are_none():
    tungsten = [np.eye(3) * 3.165, [[0, 0, 0], [0.5, 0.5, 0.5]], [74, 74]]
    with pytest.raises(ValueError, match="no reflection"): reflections(*tungsten, d_min=2.3)  # (100) is extinct, (110) is at 2.24 Å
    d, _ = reflections(*tungsten, weakest=0)
    assert np.allclose(d, 3.165 / np.sqrt([2, 4, 6, 8]), rtol=1e-5)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_line_at_the_end_of_the_range_is_in_it_however_the_cell_is_turned(seed):
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    assert reflections(5.25 * turn, [[0, 0, 0]], [29])[0][-1] == np.float32(1.05)  # (500)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_a_batch_is_its_members(seeds):
    lists = [reflections(*random_crystal(s)) for s in seeds]
    together = peaks(batch_reflections(lists))
    assert together.intensity.shape == (len(seeds), N_PEAKS)
    for i, one in enumerate(lists):
        alone = peaks(batch_reflections([one]))
        assert torch.allclose(together.ln_q[i], alone.ln_q[0], atol=1e-6) and torch.allclose(together.intensity[i], alone.intensity[0], atol=1e-6)


@pytest.mark.parametrize("change, message", [
    (dict(lattice=np.zeros((3, 3))), "singular"),
    (dict(frac_coords=[[0, 0, np.nan]]), "NaN"),
    (dict(occupancies=[-0.5]), "occupancies"),
    (dict(atomic_numbers=[0]), "scattering factors"),
    (dict(atomic_numbers=[], frac_coords=np.empty((0, 3))), "without atoms"),
    (dict(d_min=0), "d_min"),
    (dict(d_min=50), "no reflection"),
    (dict(d_max=math.inf), "d_max"),
    (dict(weakest=2), "weakest"),
    (dict(b_iso=math.nan), "b_iso"),
    (dict(d_min="1"), "must be numbers"),
    (dict(lattice=np.eye(3) * 1e6), "axes too long"),
    (dict(occupancies=1.0), "must be \\(n,\\), not \\(1,\\) and \\(\\)"),
    (dict(atomic_numbers=29), "must be \\(n,\\)"),
])
def test_bad_input(change, message):
    good = dict(lattice=np.eye(3) * 4, frac_coords=[[0, 0, 0]], atomic_numbers=[29])
    with pytest.raises(ValueError, match=message): reflections(**good | change)


def test_the_bad_one_of_many_is_named():
    good = Crystal(np.eye(3) * 4, [[0, 0, 0]], [29])
    with pytest.raises(ValueError, match="crystal 1: fractional coordinates are NaN"):
        crystal_reflections([good, good._replace(frac_coords=[[0, np.nan, 0]]), good])


def bragg(angle: float, wavelength: float = WAVELENGTHS["CuKa"]) -> float: return wavelength / 2 / math.sin(math.radians(angle / 2))


def line(angle: float, **kwargs) -> Reflections:
    "One reflection of intensity 3."
    return Reflections(torch.tensor([bragg(angle, **kwargs)]).log(), torch.tensor([3.0]), torch.zeros(1, dtype=torch.long), 1)


def seeded(seed: int) -> torch.Generator: return torch.Generator().manual_seed(seed)


def a_measurement(seed: int) -> Measurement:
    "One of a preset, settled, without what is random or not a peak."
    m = draw_measurement(("lab", "synchrotron", "harsh")[seed % 3], 1, seeded(seed))
    plain = dict(texture=0.0, background=0.0, hump=0.0, counts=math.inf, second_phase=0.0, two_theta_min=0.0, two_theta_max=180.0)
    return Measurement(*(float(v) for v in m))._replace(**plain)


def written_out(r: Reflections, m: Measurement, two_theta: torch.Tensor, step: float) -> torch.Tensor:
    "The sum of all pseudo-Voigts of one pattern, in double precision."
    settled = Measurement(*(v.double() for v in draw_measurement(m, 1)))
    d, y = r.ln_d.double().exp() * (1 + m.strain), torch.zeros(len(two_theta), dtype=torch.float64)
    for wavelength, share in ((m.wavelength, 1), (m.wavelength * (1 + m.kalpha2_shift), m.kalpha2)):
        angle = two_theta_of(d, wavelength)
        angle = angle + m.zero_shift - torch.rad2deg(2 * m.displacement / RADIUS * torch.deg2rad(angle / 2).cos())
        fwhm, eta = (t[0] for t in peak_shape(angle[None], settled, NARROWEST * step))
        u = (two_theta.double()[:, None] - angle) / fwhm
        shape = eta * 2 / math.pi / (1 + 4 * u**2) + (1 - eta) * 2 * math.sqrt(math.log(2) / math.pi) * torch.exp(-4 * math.log(2) * u**2)
        y += (shape / fwhm * r.intensity * share * lorentz_polarisation(d, wavelength, m.monochromator)).nan_to_num().sum(1)
    return y


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_pattern_is_the_sum_of_its_peaks(seed):
    r, m = batch_reflections([reflections(*random_crystal(seed))]), a_measurement(seed)
    x, y, *_ = render(r, m, scaled=False, d_min=0.1)
    exact = written_out(r, m, x, float(x[1] - x[0]))
    assert (y[0] - exact).abs().max() < 0.02 * exact.max()
    assert abs(float(y.sum() / exact.sum()) - 1) < 0.01


@pytest.mark.parametrize("fwhm, step", [(0.1, 0.02), (0.02, 0.01)])
def test_what_leaves_one_end_of_the_grid_does_not_come_in_at_the_other(fwhm, step):
    "A peak at an end is half a Gaussian; one outside is not there."
    n, grid = 300, step * np.arange(300)
    zero = lambda m: torch.zeros(m, dtype=torch.int64)
    alone = lambda *at: draw(torch.tensor(at, dtype=torch.float32), torch.ones(len(at)), zero(len(at)), 1, 0.0, step, n, fwhm)[0].numpy()
    for at in (0.0, (n - 1) * step):
        exact = np.exp(-4 * np.log(2) * ((grid - at) / fwhm) ** 2) * 2 * np.sqrt(np.log(2) / np.pi) / fwhm
        np.testing.assert_allclose(alone(at), exact, atol=0.02 * exact.max())
    assert (alone(-2 * step, (n + 1) * step) == 0).all()


@given(st.floats(8, 85), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_area_of_a_peak_is_its_intensity(angle, seed):
    m = a_measurement(seed)._replace(kalpha2=0.0, microstrain=0.0, crystallite_size=math.inf)  # Gaussian: all of it is on the grid
    r = line(angle, wavelength=m.wavelength)
    d = r.ln_d.exp() * (1 + m.strain)
    x, y, *_ = render(r, m, scaled=False, d_min=0.1)
    assert abs(float(y.sum() * (x[1] - x[0])) / (3 * float(lorentz_polarisation(d, m.wavelength, m.monochromator))) - 1) < 0.01
    moved = float(two_theta_of(d, m.wavelength)) + m.zero_shift - math.degrees(2 * m.displacement / RADIUS * math.cos(math.radians(angle / 2)))
    assert abs(float(x[y[0].argmax()]) - moved) <= float(x[1] - x[0])


@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_a_weak_peak_keeps_its_area(share):
    d = torch.tensor([bragg(30.0), bragg(60.0)])
    intensity = torch.tensor([1.0, share]) / lorentz_polarisation(d)
    x, y, *_ = render(Reflections(d.log(), intensity, torch.zeros(2, dtype=torch.int64), 1), Measurement(caglioti_w=0.04), scaled=False)
    assert abs(float(y[0, x > 45].sum() * (x[1] - x[0])) / share - 1) < 2e-3


def test_nothing_is_drawn_where_nothing_is_measured():
    r = batch_reflections([reflections(*random_crystal(3))])
    drawn = render(r, Measurement(two_theta_min=5.0, two_theta_max=90.0, background=0.1), n_points=142, generator=seeded(0))
    assert float(drawn.two_theta[-1]) > 90 and not drawn.measured[0, -1] and (drawn.intensity[~drawn.measured] == 0).all()


def test_a_peak_outside_the_grid_leaves_only_its_tail():
    alone = [line(19.7), line(60)]  # in front of a grid that begins at 20°, and far from it
    near, far = (render(r, Measurement(crystallite_size=20.0), two_theta=(20, 40), scaled=False).intensity[0] for r in alone)
    narrow = render(line(29.9), Measurement(caglioti_w=0.04), two_theta=(30, 32), n_points=500, scaled=False).intensity[0]
    peak = 3 * float(lorentz_polarisation(torch.tensor(bragg(29.9)))) * 2 * math.sqrt(math.log(2) / math.pi) / 0.2
    assert abs(float(narrow[0]) / (peak * 2 ** (-4 * 0.25)) - 1) < 0.01  # half a width from the top
    assert narrow[-1] < 1e-5 * peak
    assert 0 < near[0] and (near.diff() < 1e-4 * near[0]).all() and near[-1] < 3e-3 * near[0]
    assert far.max() < 3e-3 * near[0]


@pytest.mark.parametrize("preset", MEASUREMENTS)
def test_a_pattern_depends_on_its_generator_and_not_on_the_others(preset):
    r = batch_reflections([reflections(*random_crystal(s)) for s in range(4)])
    one, same_again, other = (render(r, preset, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one.intensity, same_again.intensity) and one.intensity.isfinite().all()
    assert torch.equal(one.intensity, other.intensity) == (preset == "ideal")
    assert one.intensity.amin() >= 0 and torch.allclose(one.intensity.amax(1), torch.ones(4)) and (one.intensity[~one.measured] == 0).all()
    p = peaks(r, measurement=preset, generator=seeded(0))
    there = p.intensity > 0
    assert ((p.ln_q >= p.limits[:, :1]) & (p.ln_q <= p.limits[:, 1:]))[there].all()


def top_and_width(m: Measurement, angle: float) -> tuple[float, float]:
    "Position of the top of a line, and its full width at half maximum, on a fine grid; degrees."
    x, y, *_ = render(line(angle), m, two_theta=(angle - 2, angle + 2), n_points=4001, scaled=False)
    above = x[y[0] > y[0].max() / 2]
    return float((y[0] * x)[y[0] > 0.9 * y[0].max()].sum() / y[0][y[0] > 0.9 * y[0].max()].sum()), float(above[-1] - above[0])


@pytest.mark.parametrize("change, shift", [  # at 2θ = 60°
    (dict(zero_shift=0.1), 0.1),
    (dict(displacement=0.3), math.degrees(-2 * 0.3 * math.cos(math.radians(30)) / 200)),
    (dict(strain=0.002), math.degrees(-2 * 0.002 * math.tan(math.radians(30)))),
    (dict(wavelength=1.5456), math.degrees(2 * (1.5456 / 1.54184 - 1) * math.tan(math.radians(30)))),
])
def test_where_a_line_goes(change, shift):
    assert abs(top_and_width(Measurement()._replace(**change), 60)[0] - 60 - shift) < 2e-3
    p = peaks(line(60), measurement=Measurement()._replace(**change))
    apparent = 2 * math.degrees(math.asin(math.exp(float(p.ln_q[0, 0])) * change.get("wavelength", WAVELENGTHS["CuKa"]) / 4 / math.pi))
    assert abs(apparent - 60 - shift) < 2e-3


@pytest.mark.parametrize("change, angle, width", [
    (dict(caglioti_w=0.04), 60, 0.2),
    (dict(caglioti_u=0.3, caglioti_w=1e-6), 60, math.sqrt(0.3) * math.tan(math.radians(30))),
    (dict(crystallite_size=20.0, caglioti_w=1e-6), 40, 0.4228),  # 0.9 × 1.54184 Å / (200 Å × cos 20°)
    (dict(microstrain=0.003, caglioti_w=1e-6), 60, math.degrees(4 * 0.003 * math.tan(math.radians(30)))),
    (dict(crystallite_size=20.0, caglioti_w=0.4228**2), 40, 0.4228 * 11.67117 ** 0.2),  # Thompson, Cox and Hastings for equal widths
])
def test_how_wide_a_line_is(change, angle, width):
    assert abs(top_and_width(Measurement()._replace(**change), angle)[1] / width - 1) < 0.015


def test_the_second_line_of_a_tube():
    m = Measurement(WAVELENGTHS["CuKa1"], kalpha2=0.5, caglioti_w=4e-4)
    x, y, *_ = render(line(80, wavelength=m.wavelength), m, two_theta=(78, 82), scaled=False)
    second = 2 * math.degrees(math.asin(1.54439 / 1.54056 * math.sin(math.radians(40))))
    ratio = y[0][(x - second).abs() < 0.08].sum() / y[0][(x - 80).abs() < 0.08].sum()
    assert abs(float(x[(x > 80.1) & (y[0] > 0)][y[0][(x > 80.1) & (y[0] > 0)].argmax()]) - second) < 3e-3 and abs(float(ratio) - 0.5) < 0.01


def test_polarisation_of_a_monochromator():
    pair = Reflections(torch.tensor([bragg(30), bragg(90)]).log(), torch.ones(2), torch.zeros(2, dtype=torch.long), 1)
    heights = []
    for angle in (0.0, 60.0):
        x, y, *_ = render(pair, Measurement(monochromator=angle), two_theta=(20, 100), d_min=0.5, scaled=False)
        heights.append([float(y[0][(x - at).abs() < 1].sum()) for at in (30, 90)])
    (a, b), (c, d) = heights
    assert abs(c / a - (1 + 0.25 * 0.75) / (1 + 0.75)) < 3e-3 and abs(d / b - 1) < 3e-3  # cos² 30° = 0.75, cos² 90° = 0


def test_a_second_phase_is_the_next_material():
    lists = [reflections(*random_crystal(s)) for s in range(3)]
    alone = render(batch_reflections(lists), scaled=False).intensity
    mixed = render(batch_reflections(lists), Measurement(second_phase=0.3), scaled=False).intensity
    assert torch.allclose(mixed, alone + 0.3 * alone.roll(-1, 0), atol=1e-4 * float(alone.max()))
    stronger = [(d, i * 10.0**k) for k, (d, i) in enumerate(lists)]  # a share is of lines, whatever their unit
    scaled = render(batch_reflections(stronger), Measurement(second_phase=0.3), scaled=False).intensity / torch.tensor([[1], [10], [100]])
    assert torch.allclose(scaled, mixed, rtol=1e-3, atol=1e-4 * float(mixed.max()))
    with pytest.raises(ValueError, match="only one"): render(batch_reflections(lists[:1]), Measurement(second_phase=0.3))


def test_noise_background_and_transforms():
    r = batch_reflections([reflections(*random_crystal(5))] * 200)
    still = render(r, Measurement(), n_points=1000).intensity[0]
    noisy = render(r, Measurement(counts=1e4), n_points=1000, generator=seeded(0)).intensity
    some = still > 0.2
    variance, own = float(noisy[:, some].var(0).mean()), float(still[some].mean()) / 1e4
    assert own < variance < own + 1.1 * float(still[some].square().mean()) / 1e4  # and some of the strongest point's
    lifted = render(r, Measurement(background=0.5), n_points=1000, generator=seeded(0), transform="none").intensity
    assert (lifted.amin(1) >= 0).all() and 0.05 < lifted.median(1).values.mean() < 0.5
    humped = render(r, Measurement(hump=0.5), n_points=1000, generator=seeded(0)).intensity - still
    where = torch.linspace(*TWO_THETA, 1000)[humped.argmax(1)]
    assert (where > 16).all() and (where < 31).all() and torch.allclose(humped.amax(1), torch.tensor(0.5), atol=0.2)
    for name, form in dict(sqrt=lambda y: y**0.5, log=lambda y: np.log1p(1000 * y) / np.log(1001)).items():
        assert np.allclose(render(r, n_points=1000, transform=name).intensity[0], form(still.numpy()), atol=1e-5)


def test_a_hump_is_as_wide_in_q_at_any_wavelength():
    ends = []
    for wavelength, grid in ((CU_KA, (2, 60)), (0.4, (0.5, 16))):
        x, y, *_ = render(line(80), Measurement(wavelength, hump=0.5), grid, generator=seeded(0))
        half = x[y[0] > y[0].max() / 2]
        ends.append(torch.deg2rad(half[[0, -1]] / 2).sin() / wavelength)
    assert torch.allclose(ends[0], ends[1], rtol=0.05)


def test_lines_without_intensity_are_no_peaks():
    d = np.concatenate([np.linspace(60, 20, 50), [5, 4, 3]])  # the first fifty are below the model's range
    assert peaks(batch_reflections([(d, np.ones(53))]), weakest=0.0).intensity.count_nonzero() == 3


def test_what_was_not_measured_is_marked():
    r = batch_reflections([reflections(*random_crystal(5))])
    x, _, measured, _ = render(r, Measurement(two_theta_min=20.0, two_theta_max=70.0))
    assert torch.equal(measured[0], (x >= 20) & (x <= 70))
    x, y, measured, _ = render(r, Measurement(wavelength=0.5))
    assert torch.equal(measured[0], x <= 2 * math.degrees(math.asin(0.25 / 1.05))) and (y[~measured] == 0).all()  # stored lines end at 1.05 Å
    x, _, measured, _ = render(r, Measurement(wavelength=0.5, strain=0.01, zero_shift=-0.1))
    assert torch.equal(measured[0], x <= 2 * math.degrees(math.asin(0.25 / 1.05 / 1.01)) - 0.1)


@pytest.mark.parametrize("two_theta, n_points", [
    *((TWO_THETA, n) for n in (33, 130, 257, 4096, 9000, 20000)), ((30, 60), 4096), ((30, 40), 1000), ((35, 37), 4096), ((90, 178), 6000)])
def test_any_grid_is_as_exact(two_theta, n_points):
    r, m = batch_reflections([reflections(*random_crystal(7), d_min=0.772)]), Measurement(caglioti_w=1e-6, caglioti_u=1e-4)
    x, y, measured, _ = render(r, m, two_theta, n_points, d_min=0.772, scaled=False)
    exact = written_out(r, m, x, float(x[1] - x[0])) * measured[0]
    assert (y[0] - exact).abs().max() < 0.02 * exact.max() and abs(float(y.sum() / exact.sum()) - 1) < 0.01


@pytest.mark.parametrize("kind", ["lab", "synchrotron"])
def test_patterns_drawn_in_lots_are_as_those_drawn_at_once(kind):
    r, m = batch_reflections([reflections(*random_crystal(seed)) for seed in range(9)] * 3), MEASUREMENTS[kind]
    lots, whole = (render(r, m._replace(second_phase=share), (10, 60), 150_000, generator=seeded(1)) for share in (0.0, 1e-30))  # two phases: at once
    assert torch.equal(lots.measured, whole.measured) and torch.allclose(lots.intensity, whole.intensity, atol=1e-5)
    assert lots.intensity.shape == (27, 150_000)


def test_each_pattern_can_have_a_measurement_of_its_own():
    r, sizes = batch_reflections([reflections(*random_crystal(seed)) for seed in range(3)]), [5.0, math.inf, 40.0]
    strain = np.array([-0.01, 0.0, 0.02])
    together = render(r, Measurement(crystallite_size=sizes, strain=strain, displacement=torch.tensor([0.1, 0.0, -0.1])))
    for i, (size, e, d) in enumerate(zip(sizes, strain, (0.1, 0.0, -0.1), strict=True)):
        alone = render(batch_reflections([reflections(*random_crystal(i))]), Measurement(crystallite_size=size, strain=float(e), displacement=d))
        assert (together.intensity[i] - alone.intensity[0]).abs().max() < 0.02  # the axis is as fine as the sharpest of a batch needs
    backwards = np.array([0.02, 0.0, -0.01], ">f8")[::-1]  # neither of which torch takes
    backwards = render(r, Measurement(crystallite_size=sizes, strain=backwards, displacement=[0.1, 0.0, -0.1]))
    assert torch.equal(backwards.intensity, together.intensity)
    ends = draw_measurement(Measurement(two_theta_min=[10, 50, 10], two_theta_max=[40, 90, 40]), 3)
    assert ends.two_theta_max.tolist() == [40, 90, 40]
    again = render(r, together.measurement)
    assert torch.equal(again.intensity, together.intensity)
    lab = render(r, "harsh", generator=seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(render(r, lab.measurement, generator=seeded(1)).measurement, lab.measurement, strict=True))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(strain=[0.0, 0.01]), "strain has the shape (2,); (3,), one a pattern,"), (dict(wavelength=torch.zeros(3)), "wavelength from 0 to 0"),
    (dict(hump=np.array([0, 1, math.nan])), "hump="), (dict(microstrain=[0.0, 0.0, math.inf]), "microstrain from 0 to inf must be finite"),
    (dict(texture=[0.0, 20.0, 0.0]), "texture from 0 to 20 must be at most 10"), (dict(strain=torch.zeros(3, 1)), "strain has the shape (3, 1)"),
    (dict(strain=[0.0, "a", 0.0]), "strain must be numbers, one for each pattern"), (dict(strain=[]), "strain has the shape (0,)"),
    (dict(strain=np.ma.masked_array([0, 9, 0.01], [0, 1, 0])), "strain="), (dict(wavelength=torch.tensor(1.5)), "wavelength has the shape ()"),
    (dict(two_theta_min=[10, 50, 10], two_theta_max=[40, 50, 40]), "two_theta_max must be above two_theta_min in each pattern"),
])
def test_measurements_of_each_pattern_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)): draw_measurement(Measurement(**changes), 3)


def test_patterns_of_a_batch_are_its_members():
    lists = [reflections(*random_crystal(s)) for s in range(5)]
    together = render(batch_reflections(lists)).intensity
    for i, one in enumerate(lists): assert torch.allclose(together[i], render(batch_reflections([one])).intensity[0], atol=1e-5)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_the_gpu_draws_the_same(kind):
    r = batch_reflections([reflections(*random_crystal(s)) for s in range(64)])
    m = Measurement(*(float(v) for v in draw_measurement(kind, 1, seeded(0))))._replace(texture=0.0, background=0.0, hump=0.0, counts=math.inf)
    there = r.to(torch.device("cuda"))
    for what in (lambda r: render(r, m).intensity, lambda r: render(r, m, transform="log").intensity, lambda r: peaks(r, measurement=m).intensity,
                 lambda r: peaks(r, measurement=m).ln_q, lambda r: window_pattern(r) ** 2):
        assert torch.allclose(what(r), what(there).cpu(), atol=1e-4)


@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_drawing_stays_on_its_device(kind, monkeypatch):
    "Shown on `meta`, which has no values to wait for, and most of whose operations refuse tensors of another device."
    monkeypatch.setattr(diffraction, "_on", lambda generator, device: None)  # it draws nothing
    there = batch_reflections([reflections(*random_crystal(s)) for s in range(8)]).to(torch.device("meta"))
    assert render(there, kind, generator=seeded(0)).intensity.is_meta
    assert peaks(there, measurement=kind, generator=seeded(0)).intensity.is_meta


PAGES = """
import resource
import numpy as np, torch
from xxact.diffraction import Crystal, batch_reflections, crystal_reflections, render
torch.set_num_threads(1)
rng, seeded = np.random.default_rng(0), torch.Generator().manual_seed
def each(work, pages=()):
    for _ in range(6):
        work()
        pages = *pages, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(pages[5] - pages[2])
"""
WORK = dict(
    render="lists = [(np.linspace(8, 1.1, 90), np.ones(90))] * 400; each(lambda: render(batch_reflections(lists), 'lab', generator=seeded(0)))",
    reflections="""
crystals = [Crystal(np.diag(c), rng.random((20, 3)), rng.integers(1, 90, 20)) for c in rng.uniform(4, 12, (300, 3))]
each(lambda: crystal_reflections(crystals))""",
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("work", WORK)
def test_memory_is_kept_from_batch_to_batch(work):
    "Where the heap lies badly, as here, tens of thousands of pages a batch would be had anew, which takes a fifth to half of the time."
    badly = os.environ | dict(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    done = subprocess.run([sys.executable, "-c", PAGES + WORK[work]], stdout=subprocess.PIPE, text=True, check=True, env=badly)
    assert int(done.stdout) < 10_000


LARGE = dict(
    render=(700, "lists = [(np.linspace(8, 1.1, 90), np.ones(90))] * 4096", "render(batch_reflections(lists), 'lab', generator=seeded(0))"),
    to_grid=(150, "x, y = torch.linspace(5, 90, 8500), torch.ones(3000, 8500)", "to_grid(x, y)"),
)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in kB on Linux")
@pytest.mark.parametrize("most, given, work", LARGE.values(), ids=LARGE)
def test_large_batches_take_little_memory(most, given, work):
    most_now = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    code = "\n".join([PAGES, "from xxact.diffraction import to_grid", given, f"before = {most_now}", work, f"print({most_now} - before)"])
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) / 1024 < most


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_drawing_does_not_wait_for_the_gpu(kind, compile):
    there = batch_reflections([reflections(*random_crystal(s)) for s in range(64)]).to(torch.device("cuda"))
    draw = lambda: (render(there, kind, generator=seeded(0), compile=compile), peaks(there, measurement=kind, generator=seeded(0)))
    if compile: draw()  # what compiles may wait
    torch.cuda.set_sync_debug_mode("error")
    try: draw()
    finally: torch.cuda.set_sync_debug_mode("default")


def compiled_as_drawn(device, kind, **options):
    "Patterns of batches with other numbers of reflections, of which only the first may be compiled."
    torch.compiler.reset()
    for first in (0, 8, 16):
        r = batch_reflections([reflections(*random_crystal(s)) for s in range(first, first + 8)]).to(torch.device(device))
        with torch._dynamo.config.patch(error_on_recompile=first > 0):
            plain, compiled = (render(r, kind, generator=seeded(first), compile=c, **options) for c in (False, True))
        assert torch.allclose(plain.intensity, compiled.intensity, atol=1e-4 * float(plain.intensity.max()))
        assert torch.equal(plain.measured, compiled.measured)


@pytest.mark.parametrize("options", [{}, dict(two_theta=np.array([10, 50]), n_points=np.int64(200), scaled=False)])
@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_what_can_be_compiled_is_captured_whole_and_once(kind, options, monkeypatch):
    "torch.compile without the compiler, which takes long."
    captured = torch.compile(diffraction._drawn, dynamic=False, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(diffraction, "_compiled", lambda: captured)
    compiled_as_drawn("cpu", kind, **options)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_compiled_patterns_are_as_the_others(kind, device):
    compiled_as_drawn(device, kind, transform="log")


@pytest.mark.parametrize("angle", [19.58, 19.6, 19.62])
def test_a_line_keeps_its_place_between_the_points_of_the_grid(angle):
    x = torch.linspace(15, 25, 20_001)
    seen = to_grid(x, torch.exp(-(((x - angle) / 0.003) ** 2))).pattern.flatten() ** 2
    place = float((seen * torch.arange(len(seen))).sum() / seen.sum())
    assert abs(place - ((ln_q_of(angle) - LN_Q[0]) / (LN_Q[1] - LN_Q[0]) * len(seen) - 0.5)) < 0.05


def test_thermal_motion_makes_no_line_extinct():
    lists = [reflections(np.eye(3) * 4, [[0, 0, 0]], [29], b_iso=b, d_min=0.5, weakest=0)[0] for b in (0, 20)]
    assert np.array_equal(*lists)


@pytest.mark.parametrize("two_theta", [(30, 35), (31.8, 32.2), (60, 80)])
def test_broad_lines_leave_their_tails_in_narrow_grids(two_theta):
    r, m = batch_reflections([reflections(*random_crystal(7))]), Measurement(crystallite_size=5.0)
    x, y, *_ = render(r, m, two_theta, 1000, scaled=False)
    top = written_out(r, m, torch.linspace(*TWO_THETA, 2000), 0.04).max()
    assert (y[0] - written_out(r, m, x, float(x[1] - x[0]))).abs().max() < 0.01 * top


@given(st.integers(0, 10**6), st.floats(0.5, 1.8), st.integers(5000, 9000))
@settings(max_examples=20, deadline=None)
def test_round_trip_to_the_grid(seed, wavelength, n_points):
    r = batch_reflections([reflections(*random_crystal(seed), d_min=0.9)])
    low, high = (2 * math.degrees(math.asin(min(1, wavelength / 2 / d))) for d in (9.0, 1.3))
    x, y, *_ = render(r, Measurement(wavelength, caglioti_w=4e-4), two_theta=(low, high), n_points=n_points, scaled=False)
    grid = to_grid(x, y, wavelength)
    centre = LN_Q[0] + WINDOW * (torch.arange(N_WINDOWS) + 0.5)
    limits = torch.tensor([2 * math.pi / 9.0, 2 * math.pi / 1.3]).log()
    assert torch.equal(grid.measured[0], (centre - WINDOW / 2 >= limits[0]) & (centre + WINDOW / 2 <= limits[1]))
    assert torch.allclose(grid.limits[0], limits, atol=1e-4)
    inner = grid.measured[0] & grid.measured[0].roll(1) & grid.measured[0].roll(-1)  # an edge may lose a tail
    wanted = window_pattern(r)[0] * grid.measured[0][:, None]
    if float(wanted[inner].max()) < float(wanted.max()): return  # the strongest line lies at an edge
    difference = (grid.pattern[0] - wanted / wanted.max())[inner]
    assert difference.abs().max() < 0.12 and difference.square().mean().sqrt() < 0.03


def test_the_grid_marks_gaps():
    r = batch_reflections([reflections(*random_crystal(3))])
    x, y, *_ = render(r, scaled=False)
    y = y.masked_fill((x > 30) & (x < 32), math.nan)
    measured = to_grid(x, y).measured[0]
    gap = [math.log(4 * math.pi * math.sin(math.radians(a / 2)) / WAVELENGTHS["CuKa"]) for a in (30, 32)]
    low, high = (int((v - LN_Q[0]) / WINDOW) for v in gap)
    assert not measured[low : high + 1].any() and measured[: low - 1].all() and measured[high + 2 :].all()


def test_many_patterns_are_put_on_the_grid_as_each_alone():
    x = torch.linspace(5, 90, 2000)
    y = torch.rand(150, 2000, generator=torch.Generator().manual_seed(0)).where(torch.arange(150)[:, None] * 10 < torch.arange(2000), math.nan)
    together = to_grid(x, y)
    for i in (0, 63, 64, 149):
        for a, b in zip(together, to_grid(x, y[i]), strict=True): assert torch.allclose(a[i].double(), b[0].double(), atol=1e-6)
    y[100] = y[120] = 0
    with pytest.raises(ValueError, match="in 2 of 150 patterns; the first is pattern 100"): to_grid(x, y)


def test_the_grid_leaves_out_what_is_masked():
    r = batch_reflections([reflections(*random_crystal(3))])
    x, y = (t.squeeze().numpy() for t in render(r)[:2])
    dead = (x > 30) & (x < 32)
    masked, gaps = to_grid(x, np.ma.masked_array(np.where(dead, 1e9, y), dead)), to_grid(x, np.where(dead, math.nan, y))
    assert all(torch.equal(a, b) for a, b in zip(masked, gaps, strict=True)) and not masked.measured.all()


SALT = Structure.from_spacegroup(225, Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("change, message", [
    (dict(two_theta=(5, 180)), "180"),
    (dict(two_theta=(30, 20)), "must rise"),
    (dict(n_points=1), "n_points"),
    (dict(transform="cube"), "choose from none, sqrt, log"),
    (dict(measurement="kitchen"), "choose from ideal, lab"),
    (dict(measurement="lab"), "give a generator"),
    (dict(measurement=Measurement(wavelength=0)), "wavelength=0 must be positive"),
    (dict(measurement=Measurement(wavelength=math.nan)), "number or a range"),
    (dict(measurement=Measurement(texture=0.2)), "texture is random"),
    (dict(measurement=Measurement(background=-1)), "not be negative"),
    (dict(measurement=Measurement(wavelength=math.inf)), "must be finite"),
    (dict(measurement=Measurement(wavelength="Cu")), "number or a range"),
    (dict(measurement=Measurement(zero_shift=(0.1, -0.1))), "number or a range"),
    (dict(measurement=None), "must be a Measurement, or one of ideal"),
    (dict(measurement=Measurement(strain=-1)), "strain"),
    (dict(measurement=Measurement(two_theta_min=50.0, two_theta_max=40.0)), "two_theta_max=40.0 must be above all of two_theta_min, 50"),
    (dict(measurement=Measurement(texture=30.0)), "texture=30.0 must be at most 10"),
    (dict(d_min=0), "d_min"),
    (dict(d_min="1"), "d_min=1 Å must be a positive number"),
    (dict(two_theta=90), "must be two angles"),
    (dict(two_theta=("low", "high")), "must be two angles"),
    (dict(two_theta=(30, 30.01)), "at least 0.1°"),
    (dict(n_points=4096.0), "a whole number"),
    (dict(measurement="lab", generator=0), "must be a torch.Generator"),
])
def test_bad_measurements(change, message):
    r = batch_reflections([reflections(*random_crystal(0))])
    with pytest.raises(ValueError, match=message): render(r, **change)


@pytest.mark.parametrize("seed", range(5))
def test_ranges_that_overlap_are_told_whatever_is_drawn(seed):
    m = Measurement(two_theta_min=(5.0, 50.0), two_theta_max=(40.0, 90.0))
    with pytest.raises(ValueError, match="must be above all of two_theta_min, 50"): draw_measurement(m, 1, seeded(seed))


@pytest.mark.parametrize("call, message", [
    (lambda r: peaks(r, n_peaks=0), "n_peaks=0 must be a whole number from 1"),
    (lambda r: peaks(r, resolution=0.0), "resolution=0.0 in degrees"),
    (lambda r: peaks(r, weakest=math.nan), "weakest=nan from 0 to 1"),
    (lambda r: perturb(r, Augmentation(strain=math.nan), torch.Generator()), "must be 0 or a positive number"),
    (lambda r: perturb(r, Augmentation(loss=1.5), torch.Generator()), "loss at most 1"),
    (lambda r: window_pattern(r, fwhm=math.nan), "a positive width in ln q"),
    (lambda r: hide(r, torch.ones(1, 3, dtype=torch.bool)), r"it must be \(1, "),
    (lambda r: observe(r, draw_measurement("ideal", 2)), "2 measurements of 1 materials"),
    (lambda r: observe(r, "lab"), "settled by `draw_measurement`"),
    (lambda r: observe(r, Measurement()), "settled by `draw_measurement`"),
    (lambda r: perturb(r, "lab", torch.Generator()), "an Augmentation is needed"),
    (lambda r: render(structure_reflections(SALT)), "as `batch_reflections` makes them, not a tuple"),
    (lambda r: peaks(SALT), "as `batch_reflections` makes them, not a Structure"),
    (lambda r: window_pattern(None), "as `batch_reflections` makes them"),
    (lambda r: batch_reflections(structure_reflections(SALT)), r"material 0: a pair \(d_spacing, intensity\)"),
    (lambda r: batch_reflections([SALT]), r"material 0: a pair \(d_spacing, intensity\)"),
    (lambda r: batch_reflections([([[3.0, 2.0]], [[1.0, 0.5]])]), r"material 0: a pair \(d_spacing, intensity\)"),
    (lambda r: structure_reflections("NaCl.cif"), "Structure is needed"),
    (lambda r: crystal_reflections([SALT]), "a Crystal is needed, not a Structure; structure_reflections takes"),
    (lambda r: peaks(r, measurement="ideal", limits=torch.tensor([[0.5, 1.0]])), "give one of the two"),
    (lambda r: peaks(r, limits=torch.tensor([5.0, 90.0])), r"it must be \(1, 2\)"),
    (lambda r: render(r, n_points=10**10), "2 to 10⁶"),
    (lambda r: window_pattern(r, points=2.5), "points=2.5 must be a whole number"),
    (lambda r: two_theta_of(torch.tensor([2.0]), 0.0), "wavelength=0.0 must be a positive number"),
    (lambda r: lorentz_polarisation(torch.tensor([2.0]), -1.54), "wavelength=-1.54 must be"),
    (lambda r: ln_q_of(30.0, 0.0), "wavelength=0.0 must be"),
    (lambda r: ln_q_of(0.0), "2θ=0.0 must be within"),
    (lambda r: structure_reflections(Structure(Lattice.cubic(3), [], [])), "without atoms"),
])
def test_settings_of_reflections_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message): call(line(30))


def test_numpy_numbers_measure_too():
    ours, plain = (render(line(30), Measurement(wavelength=w)).intensity for w in (np.float32(1.5), 1.5))
    assert torch.equal(ours, plain)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="without reflections"): batch_reflections([(np.empty(0), np.empty(0))])
    nothing = Reflections(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.long), 0)
    for r in (nothing, line(30)._replace(n=2)):
        with pytest.raises(ValueError, match="no reflections to draw"): render(r)


@pytest.mark.parametrize("change, message", [
    (dict(wavelength=-1.0), "wavelength"),
    (dict(wavelength="CuKa"), "a positive number of Å"),
    (dict(points=2.5), "points=2.5 a whole number"),
    (dict(two_theta=torch.linspace(5, 190, 100)), "within 0 to 180"),
    (dict(two_theta=torch.linspace(90, 5, 100)), "90° is followed by 89.1414°"),
    (dict(two_theta=torch.cat([torch.linspace(5, 90, 99), torch.tensor([math.nan])])), "must be numbers"),
    (dict(intensity=torch.ones(1, 99)), "must be"),
    (dict(intensity=torch.full((1, 100), math.nan)), "positive intensity"),
    (dict(wavelength=0.01), "within the model's range"),
])
def test_bad_patterns(change, message):
    with pytest.raises(ValueError, match=message): to_grid(**dict(two_theta=torch.linspace(5, 90, 100), intensity=torch.ones(1, 100)) | change)


@pytest.mark.parametrize(("options", "measured"), [
    (["diffraction", "--structures", "10"],
     ("reflections_ratio_to_pymatgen", "reflections_per_s", "render_patterns_per_s", "n_structures", "mean_sites")),
    pytest.param(["diffraction", "--structures", "10", "--compile", "on"],
                 ("render_patterns_per_s", "compiled_patterns_per_s"), marks=pytest.mark.slow),
    (["train", "--size", "nano", "--batch-size", "8", "--steps", "1", "--rounds", "1", "--device", "cpu"],
     ("materials_per_s", "ratio_to_bare_step", "render_share", "mfu", "peak_memory_mb", "projected_seconds_epoch_5m", "parameters")),
    (["predict", "--patterns", "8", "--candidates", "500", "--rounds", "1"],
     ("predictions_per_s", "predictions_with_formula_per_s", "ratio_to_bare_network", "search_ms", "search_ratio_to_product", "first_answer_s")),
])
def test_bench_prints_one_line_of_json_last(options, measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs/experiments").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *options, "--dataset", "prototypes:30"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(result[k] > 0 for k in measured)
    (file,) = (tmp_path / "figures/bench").glob("*.jsonl")
    assert file.name.startswith(options[0]) and json.loads(file.read_text())["hardware"]
    shown = speed_table("", tmp_path).splitlines()
    assert len(shown) > 2 and not any("| 0 |" in line for line in shown)


def test_a_speed_of_prototypes_does_not_replace_that_of_real_structures(tmp_path):
    (tmp_path / "figures/bench").mkdir(parents=True)
    row = dict(bench="diffraction", render_patterns_per_s=100, hardware="a machine", commit="abc")
    rows = [row | dict(reflections_per_s=n, reflections_ratio_to_pymatgen=n, dataset=name) for n, name in ((50, "real"), (10, "prototypes:30"))]
    (tmp_path / "figures/bench/diffraction-2026-01-01.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = speed_table("", tmp_path)
    assert "reflections of real structures | 50 | 50 times" in shown and "reflections of prototypes | 10 | 10 times" in shown


def test_dense_lines_do_not_make_a_chain():
    lattice = Lattice.from_parameters(61, 67, 71, 83, 97, 101).matrix  # 280,000 Å³: some 800,000 lines, closer than the tolerance
    d, _ = reflections(lattice, [[0, 0, 0], [0.21, 0.37, 0.43]], [29, 8], d_min=1.2, weakest=0)
    gap = -np.diff(d) / d[1:]
    assert gap[d[1:] < 1.5].max() < 5e-5  # no hole where a chain was drawn together


@pytest.mark.parametrize(("lists", "message"), [
    ([([3., 2., 1.5], [1., .5]), ([2.5, 2.], [.7, .6, .5])], "differ in length"),
    ([([3., 2.], [1., math.nan])], "both finite"),
    ([([3., math.nan], [1., .5])], "both finite"),
    ([([3., -2.], [1., .5])], "positive"),
    ([([2., 3.], [1., .5])], "descending"),
    ([([3., 2.], [1., -.5])], "not negative"),
    ([([3.], [1.]), ([], [])], "without reflections"),
])
def test_lists_that_are_no_reflections(lists, message):
    with pytest.raises(ValueError, match=message): batch_reflections([tuple(np.array(a) for a in pair) for pair in lists])


@pytest.mark.parametrize(("changes", "message"), [
    (dict(fwhm=math.nan), "fwhm=nan"), (dict(fwhm=-1), "fwhm=-1"), (dict(monochromator=math.nan), "monochromator=nan"), (dict(points=0), "points=0"),
    (dict(intensity=torch.zeros(1, 2000)), "positive intensity"), (dict(intensity=-torch.ones(1, 2000)), "positive intensity"),
    (dict(intensity=torch.ones(0, 2000)), "there is no pattern"),
])
def test_grids_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        to_grid(**dict(two_theta=torch.linspace(5, 90, 2000), intensity=torch.ones(1, 2000)) | changes)


def test_a_jump_between_two_scans_is_not_measured():
    two_theta = torch.cat([torch.linspace(5, 30, 1000), torch.linspace(50, 90, 1000)])
    measured = to_grid(two_theta, torch.ones(1, 2000)).measured[0]
    whole = to_grid(torch.linspace(5, 90, 2000), torch.ones(1, 2000)).measured[0]
    assert whole.all() and 0 < measured.sum() < len(measured) - 3
    assert to_grid(torch.linspace(10, 80, 5), torch.ones(1, 5)).measured.sum() == 0


@pytest.mark.parametrize("two_theta", [(33, 40), (33, 42), (20, 25), (15, 26), (58, 64), (36.8, 39)])
@pytest.mark.parametrize("n_points", [200, 4096, 20_000])
def test_where_no_line_is_near_there_is_nothing(two_theta, n_points):
    drawn = render(batch_reflections([structure_reflections(SALT)]), "ideal", two_theta=two_theta, n_points=n_points)
    assert (drawn.intensity == 0).all()


def test_arrays_of_another_shape_or_kind():
    for shape, z, message in (((3, 2), [55, 17], "must be"), ((2, 3), [11.7, 17], "whole"), ((2, 3), ["Na", "Cl"], "whole")):
        with pytest.raises(ValueError, match=message): reflections(np.eye(3) * 4, np.zeros(shape), z)
