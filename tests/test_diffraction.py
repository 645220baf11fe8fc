"Reflections: parity with pymatgen on real structures, and what must not change them."
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.diffraction.xrd import XRDCalculator
from pymatgen.core import Lattice, Structure

from xxact.diffraction import N_PEAKS, TWO_THETA, batch_reflections, lorentz_polarisation, peaks, reflections, structure_reflections, two_theta_of

REAL = os.environ.get("XXACT_REAL_DATA")


def patterns(structure: Structure, width: float = 2e-3):
    "Both peak lists merged within `width` degrees, percent of the strongest."
    reference = XRDCalculator("CuKa").get_pattern(structure, two_theta_range=TWO_THETA)
    d, i = (torch.tensor(a, dtype=torch.float64) for a in structure_reflections(structure))
    angle, mine = two_theta_of(d).numpy(), (i * lorentz_polarisation(d)).numpy()
    inside = (angle >= TWO_THETA[0]) & (angle <= TWO_THETA[1])
    x = np.concatenate([reference.x, angle[inside]])
    order = np.argsort(x)
    group = np.empty(len(x), int)
    group[order] = np.cumsum(np.diff(x[order], prepend=-9) > width) - 1
    theirs = np.bincount(group, np.concatenate([reference.y, np.zeros(inside.sum())]))
    ours = np.bincount(group, np.concatenate([np.zeros(len(reference.y)), mine[inside]]))
    return 100 * ours / ours.max(), 100 * theirs / theirs.max()


@pytest.mark.skipif(not REAL, reason="XXACT_REAL_DATA is not set")
def test_parity_with_pymatgen_on_real_structures():
    import polars as pl
    table = pl.read_parquet(Path(REAL) / "mp/structures.parquet").sample(60, seed=0)
    for row in table.iter_rows(named=True):
        s = Structure(np.reshape(row["lattice"], (3, 3)), row["atomic_numbers"], np.reshape(row["frac_coords"], (-1, 3)))
        ours, theirs = patterns(s)
        strong = theirs > 0.1
        assert np.abs(ours - theirs)[strong].max() < 0.02, row["material_id"]


def random_crystal(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lattice = Lattice.from_parameters(*rng.uniform(3, 7, 3), *rng.uniform(70, 110, 3)).matrix
    n = rng.integers(1, 6)
    return lattice, rng.random((n, 3)), rng.integers(1, 90, n)


def same(a, b, eps=2e-4):
    "Equal lists, up to lines at the threshold of the weakest."
    strong = [i * d**2 > 3e-4 * (i * d**2).max() for d, i in (a, b)]
    (da, ia), (db, ib) = ((d[s], i[s]) for (d, i), s in zip((a, b), strong))
    return np.isclose(da[:, None], db, rtol=eps).any(1).mean() > 0.97 and abs(ia.sum() - ib.sum()) < 0.02 * ia.sum()


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
])
def test_bad_input(change, message):
    good = dict(lattice=np.eye(3) * 4, frac_coords=[[0, 0, 0]], atomic_numbers=[29])
    with pytest.raises(ValueError, match=message): reflections(**good | change)
