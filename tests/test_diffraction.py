"Reflections: parity with pymatgen on real structures, and what must not change them."
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.diffraction.xrd import XRDCalculator
from pymatgen.core import Lattice, Structure

from xxact.diffraction import (N_PEAKS, TWO_THETA, WAVELENGTHS, Crystal, batch_reflections, crystal_reflections, lorentz_polarisation, peaks,
                               reflections, structure_reflections, two_theta_of)

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
    strong = (np.maximum(*areas) > 1e-3) & (places[0] > low + 2e-3) & (places[0] < high - 2e-3)
    return np.abs(places[0] - places[1])[strong].max(initial=0), np.abs(areas[0] - areas[1])[strong].max(initial=0)


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


def test_thousands_of_sites():
    x = np.stack(np.meshgrid(*[np.arange(17) / 17] * 3), -1).reshape(-1, 3)  # a supercell of 4913 sites: the crystal of one
    d, i = reflections(np.eye(3) * 17 * 3, x, np.full(len(x), 29))
    d_one, i_one = reflections(np.eye(3) * 3, [[0, 0, 0]], [29])
    assert len(d) == len(d_one) and np.allclose(d, d_one, rtol=1e-5) and np.allclose(i, i_one, atol=1e-4)


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
])
def test_bad_input(change, message):
    good = dict(lattice=np.eye(3) * 4, frac_coords=[[0, 0, 0]], atomic_numbers=[29])
    with pytest.raises(ValueError, match=message): reflections(**good | change)


def test_the_bad_one_of_many_is_named():
    good = Crystal(np.eye(3) * 4, [[0, 0, 0]], [29])
    with pytest.raises(ValueError, match="crystal 1: fractional coordinates are NaN"):
        crystal_reflections([good, good._replace(frac_coords=[[0, np.nan, 0]]), good])
