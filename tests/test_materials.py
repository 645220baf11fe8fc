"The material table and `MaterialSet`: shards, filters, split, memory. Those on real data need XXACT_REAL_DATA."
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import xxact.materials as M
from xxact import composition
from xxact.composition import SPLITS, composition_hash, composition_key, split_of
from xxact.materials import TARGETS, MaterialSet, read_table, table_metadata, table_schema, write_table
from xxact.reproduce import load_table

FORMULAS = ["NaCl", "MgO", "LiF", "BaTiO3", "Ca(OH)2", "Fe2O3", "Fe4O6", "SiO2", "CsCl", "Al2O3", "GaAs", "ZnS"]


def make_table(n: int, seed: int = 0) -> pl.DataFrame:
    "A table of made-up rows; labels, space groups and lengths vary."
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        formula, m = FORMULAS[rng.integers(len(FORMULAS))], int(rng.integers(1, 30))
        z, x = composition.parse_formula(formula)
        rows.append(dict(
            material_id=f"m{i}-é", source="ab"[i % 2], formula=formula, atomic_numbers=z.tolist(), fractions=x.tolist(),
            composition=composition_hash(composition_key(formula)), d_spacing=rng.uniform(0.5, 20, m), intensity=rng.uniform(0, 1, m),
            space_group=int(rng.integers(1, 231)) if i % 5 else None, n_sites=int(rng.integers(1, 40)),
            energy_above_hull=float(rng.exponential(0.1)) if i % 3 else None))
    return pl.DataFrame(rows, schema=table_schema())


TABLE = make_table(60)
FILTERS = [None, pl.col("atomic_numbers").list.contains(8), pl.col("n_sites") <= 20, pl.col("energy_above_hull") < 0.1, pl.col("source") == "a",
           (pl.col("source") == "b") | ~pl.col("atomic_numbers").list.contains(8), pl.col("composition") % 2 == 0,
           pl.col("energy_above_hull") < pl.col("energy_above_hull").mean(), pl.col("composition").is_first_distinct()]


def same(a: MaterialSet, b: MaterialSet) -> bool:
    return a.target_names == b.target_names and all(t.dtype == b.tensors()[k].dtype and t.equal(b.tensors()[k]) or
                                                    k == "targets" and t.allclose(b.targets, 0, 0, equal_nan=True) for k, t in a.tensors().items())


# --- one shard or thousands -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, 59), max_size=12), where=st.sampled_from(FILTERS), piece=st.integers(1, 70), old=st.booleans(), data=st.data())
def test_any_shards_any_filter_any_piece(tmp_path_factory, cuts, where, piece, old, data):
    folder = tmp_path_factory.mktemp("shards")
    edges = [0, *sorted(cuts), len(TABLE)]
    for k, (i, j) in enumerate(zip(edges, edges[1:])):
        shard = TABLE[i:j]
        if old and data.draw(st.booleans(), label=f"shard {k} has no composition hash"): shard = shard.drop("composition")
        if data.draw(st.booleans(), label=f"shard {k} has no band_gap"): shard = shard.drop("band_gap")
        write_table(shard, folder / f"{k:03}.parquet")
    assert_frame_equal(read_table(folder), TABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M, "_PIECE", piece)
        opened = MaterialSet.open(folder, where=where)
        assert len(opened.tensors()["names"]) and same(opened, MaterialSet.from_table(TABLE if where is None else TABLE.filter(where)))
    opened.save(folder / "set.safetensors")
    loaded = MaterialSet.load(folder / "set.safetensors")
    assert same(loaded, opened) and loaded.fingerprint() == opened.fingerprint() and loaded.metadata == opened.metadata


def test_hundreds_of_tiny_shards(tmp_path):
    table = make_table(300)
    for i in range(300): write_table(table[i:i + 1], tmp_path / f"{i:03}.parquet", d_min="1.05", licence="CC0")
    pl.DataFrame({"material_id": ["x"], "reason": ["none"]}).write_parquet(tmp_path / "000.rejects.parquet")
    data = MaterialSet.open(tmp_path)
    assert same(data, MaterialSet.from_table(table)) and data.metadata == {"d_min": "1.05", "licence": "CC0"}
    files = sorted(tmp_path.glob("[0-9][0-9][0-9].parquet"))
    assert len(MaterialSet.open([tmp_path, *files])) == 600
    assert same(data, MaterialSet.open(files)) and same(data, MaterialSet.open([str(tmp_path)]))


def test_columns_of_wider_types_and_names_with_brackets(tmp_path):
    wide = TABLE.with_columns(pl.col("atomic_numbers").cast(pl.List(pl.Int64)), pl.col("space_group", "n_sites").cast(pl.Int64),
                              pl.col("energy_above_hull").cast(pl.Float64).fill_null(float("nan")), extra=pl.lit(1))
    write_table(wide[:30], tmp_path / "part[1].parquet")
    write_table(TABLE[30:], tmp_path / "part[2].parquet")
    assert_frame_equal(read_table(tmp_path).drop("extra"), TABLE)
    assert len(MaterialSet.open(tmp_path, [], pl.col("extra") == 1)) == 30
    assert same(MaterialSet.open(tmp_path), MaterialSet.from_table(TABLE))
    assert same(MaterialSet.from_table(wide), MaterialSet.from_table(TABLE))


# --- what cannot be used ----------------------------------------------------------------------------------------------------------


def refused(call, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error: call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("broken", [b"", b"no table", "half", "tail"])
def test_a_broken_shard_is_named(tmp_path, broken):
    for i in range(3): write_table(TABLE, tmp_path / f"{i}.parquet")
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes({"half": whole[:len(whole) // 2], "tail": whole[len(whole) // 2:]}.get(broken, broken))
    for read in (read_table, MaterialSet.open):
        refused(lambda read=read: read(tmp_path), "cannot be read|1.parquet is not a Parquet table")


def test_folders_and_lists_without_a_table(tmp_path):
    (tmp_path / "empty").mkdir()
    TABLE.drop("intensity").write_parquet(tmp_path / "lacks.parquet")
    TABLE.clear().write_parquet(tmp_path / "none.parquet")
    for read in (read_table, MaterialSet.open):
        refused(lambda read=read: read(tmp_path / "empty"), "holds no .parquet files")
        refused(lambda read=read: read([]), "the list of paths is empty")
        refused(lambda read=read: read(tmp_path / "absent"), "does not exist")
        refused(lambda read=read: read(tmp_path / "lacks.parquet"), "lacks.parquet is no material table, it lacks intensity")
        refused(lambda read=read: read(tmp_path / "none.parquet"), "none.parquet is empty")


def test_filters_that_do_not_work(tmp_path):
    write_table(TABLE, path := tmp_path / "t.parquet")
    refused(lambda: MaterialSet.open(path, where=pl.col("n_sites") > 99), "n_sites.* is empty: no materials")
    refused(lambda: MaterialSet.open(path, where=pl.col("sites") > 9), 'unable to find column "sites"')
    refused(lambda: MaterialSet.open(path, where=pl.col("n_sites")), "must be of type `Boolean`")
    refused(lambda: MaterialSet.open(path, where=pl.col("n_sites") > "x"), "cannot compare string with numeric")
    refused(lambda: MaterialSet.open(path, where="n_sites > 9"), "must be a polars expression")
    refused(lambda: MaterialSet.open(path, ["hardness"]), "no target 'hardness'; it has energy_above_hull$")
    refused(lambda: MaterialSet.open(path, "band_gap"), r"must be a list of names: \['band_gap'\]")


def test_shards_of_different_d_min(tmp_path):
    for name, d_min in dict(a="1.05", b="1.05", c="0.8").items(): write_table(TABLE, tmp_path / f"{name}.parquet", d_min=d_min)
    write_table(TABLE, tmp_path / "d.parquet")
    for read in (read_table, MaterialSet.open):
        refused(lambda read=read: read(tmp_path), r"a.parquet has reflections down to d_min=1.05 Å, .*c.parquet down to 0.8 Å")
    assert len(MaterialSet.open([tmp_path / f"{k}.parquet" for k in "abd"])) == 3 * len(TABLE)


def replaced(column: str, value) -> pl.DataFrame:
    "The table with another value in row 7."
    values = TABLE[column].to_list()
    values[7] = value
    return TABLE.with_columns(pl.Series(column, values, TABLE.schema[column]))


@pytest.mark.parametrize("column, value, why", [
    ("d_spacing", None, "has no reflections"), ("d_spacing", [], "has no reflections"), ("intensity", None, "d_spacing and intensity differ"),
    ("intensity", [0.5] * 99, "d_spacing and intensity differ"), ("atomic_numbers", [], "has no elements"),
    ("fractions", [1 / 99] * 99, "atomic_numbers and fractions differ"), ("atomic_numbers", None, "has no elements")])
def test_a_row_without_its_parts_is_named(tmp_path, column, value, why):
    write_table(replaced(column, value), tmp_path / "t.parquet")
    for read in (lambda: MaterialSet.open(tmp_path), lambda: MaterialSet.from_table(replaced(column, value))): refused(read, f"m7-é: .*{why}")
    assert len(MaterialSet.open(tmp_path, where=pl.col("material_id") != "m7-é")) == len(TABLE) - 1


@pytest.mark.parametrize("column, bad", [
    ("d_spacing", 0.2), ("d_spacing", 91.0), ("d_spacing", float("nan")), ("d_spacing", None), ("intensity", -0.1), ("intensity", 1.1),
    ("atomic_numbers", 0), ("atomic_numbers", 104), ("atomic_numbers", None), ("fractions", 1.5), ("fractions", None)])
def test_a_value_out_of_range_is_named(column, bad):
    table = replaced(column, [bad, *TABLE[column][7].to_list()[1:]])
    refused(lambda: MaterialSet.from_table(table), f"m7-é: {column} must be within .* not {'nan' if bad is None else f'{bad:g}'}")


@pytest.mark.parametrize("column, bad, why", [
    ("fractions", [0.0] + [1.0] * 98, "fractions must be positive"), ("fractions", [0.3] * 99, "fractions must sum to 1"),
    ("space_group", 231, "space_group must be a number from 1 to 230")])
def test_compositions_and_groups_that_cannot_be(column, bad, why):
    value = bad[: len(TABLE["atomic_numbers"][7])] if isinstance(bad, list) else bad
    refused(lambda: MaterialSet.from_table(replaced(column, value)), f"m7-é: {why}")


@pytest.mark.parametrize("bad", [None, "two\nlines"])
def test_identifiers(bad): refused(lambda: MaterialSet.from_table(replaced("material_id", bad)), "material_id must be a line of text, not")


def test_a_formula_that_is_none(tmp_path):
    write_table(replaced("formula", "Xx2").drop("composition"), tmp_path / "t.parquet")
    for read in (read_table, MaterialSet.open): refused(lambda read=read: read(tmp_path), "Xx2.*unknown element 'Xx'")


# --- split ------------------------------------------------------------------------------------------------------------------------


EDGES = [int(share * 2**64) + shift for share in (0.8, 0.9) for shift in (-2048, -1025, -1024, -1023, -1, 0, 1, 1023, 1024, 1025, 2048)]


@settings(max_examples=500)
@given(hashes=st.lists(st.one_of(st.integers(0, 2**64 - 1), st.sampled_from(EDGES)), min_size=1, max_size=50))
def test_the_hash_gives_the_side_of_split_of(hashes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "composition_hash", int)
        expected = [split_of(str(h)) for h in hashes]
    assert [SPLITS[i] for i in M.sides(np.array(hashes, np.uint64))] == expected


def test_all_edges_of_the_split():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composition, "composition_hash", int)
        for edge in (int(0.8 * 2**64), int(0.9 * 2**64)):
            hashes = np.arange(edge - 5000, edge + 5000, dtype=np.uint64)
            sides = M.sides(hashes)
            assert [SPLITS[i] for i in sides] == [split_of(str(h)) for h in hashes] and len(set(sides)) == 2


def test_side_and_hash_of_formulas():
    for data in (MaterialSet.from_table(TABLE), MaterialSet.from_table(TABLE.drop("composition"))):
        keys = [composition_key(f) for f in TABLE["formula"]]
        assert [SPLITS[i] for i in data.split] == [split_of(k) for k in keys]
        assert data.composition.numpy().view(np.uint64).tolist() == [composition_hash(k) for k in keys]


def test_a_table_with_hashes_parses_no_formula(tmp_path, monkeypatch):
    write_table(TABLE, tmp_path / "new.parquet")
    write_table(TABLE.with_columns(composition=pl.when(pl.col("source") == "a").then("composition")), tmp_path / "half.parquet")
    parsed = []
    monkeypatch.setattr(M, "composition_key", lambda f: parsed.append(f) or composition_key(f))
    new = MaterialSet.open(tmp_path / "new.parquet")
    assert not parsed
    assert same(MaterialSet.open(tmp_path / "half.parquet"), new)
    assert sorted(parsed) == sorted(set(TABLE.filter(pl.col("source") == "b")["formula"]))


# --- the file ---------------------------------------------------------------------------------------------------------------------


def test_licence_travels(tmp_path):
    write_table(TABLE[:20], tmp_path / "a.parquet", d_min="1.05", licence="mp: CC BY 4.0\nwbm: MIT; data CC BY 4.0", version="1")
    write_table(TABLE[20:], tmp_path / "b.parquet", d_min="1.05", licence="wbm: MIT; data CC BY 4.0\nown: none", version="2")
    expected = {"d_min": "1.05", "licence": "mp: CC BY 4.0\nwbm: MIT; data CC BY 4.0\nown: none", "version": "1\n2"}
    data = MaterialSet.open(tmp_path)
    data.save(tmp_path / "set.safetensors")
    MaterialSet.from_table(read_table(tmp_path), metadata=table_metadata(tmp_path)).save(tmp_path / "other.safetensors")
    for kept in (data, data.to("cpu"), *(MaterialSet.load(tmp_path / f"{k}.safetensors") for k in ("set", "other"))): assert kept.metadata == expected


LOAD = """
import sys, torch
from xxact.materials import MaterialSet
def private(): return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) if sys.platform == "linux" else 0
before = private()
data = MaterialSet.load(sys.argv[1])
grown = private() - before
assert data.nbytes > 60e6 and grown < 10_000, f"{data.nbytes} bytes, {grown} kB of private memory more"
batch = data.batch(torch.tensor([5, 0, len(data) - 1]))
assert len(batch.targets) == 3 and data.metadata == {"licence": "CC0"}
assert not {"polars", "pymatgen"} & set(sys.modules)
"""


def test_a_file_is_mapped_and_needs_no_table_library(tmp_path):
    table = pl.concat([TABLE] * 50)
    wide = table.with_columns(pl.col("d_spacing", "intensity").list.first().repeat_by(6000))
    MaterialSet.from_table(wide, metadata={"licence": "CC0"}).save(tmp_path / "set.safetensors")
    subprocess.run([sys.executable, "-c", LOAD, tmp_path / "set.safetensors"], check=True)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_broken_file_is_refused(tmp_path, cut):
    MaterialSet.from_table(TABLE).save(path := tmp_path / "set.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    refused(lambda: MaterialSet.load(path), "set.safetensors is no MaterialSet file")


def test_bytes():
    data = MaterialSet.from_table(TABLE, ["band_gap"])
    reflections, elements = TABLE["d_spacing"].list.len().sum(), TABLE["fractions"].list.len().sum()
    names = sum(len(i.encode()) for i in TABLE["material_id"]) + len(TABLE) - 1
    assert data.nbytes == 4 * reflections + 5 * elements + 2 * 8 * (len(TABLE) + 1) + len(TABLE) * (4 + 1 + 8 + 1) + names


@pytest.mark.skipif("XXACT_REAL_DATA" not in os.environ, reason="XXACT_REAL_DATA is not set")
def test_at_most_1_kb_a_material_on_real_rows(tmp_path):
    from xxact.sources import prepare
    structures = pl.scan_parquet(Path(os.environ["XXACT_REAL_DATA"]) / "mp/structures.parquet").filter(pl.col("source") == "wbm").collect()
    structures.sample(300, seed=0).write_parquet(tmp_path / "s.parquet")
    prepare([tmp_path / "s.parquet"], tmp_path / "table.parquet", workers=1, progress=False)
    data = MaterialSet.open(tmp_path / "table.parquet")
    assert len(data) == 300 and data.nbytes / 300 < 1000 and "wbm" in data.metadata["licence"]
    assert data.target_names == tuple(TARGETS) and torch.isfinite(data.targets[:, data.target_names.index("formation_energy_per_atom")]).all()


def test_other_reflections_keep_everything_else(tmp_path):
    data = MaterialSet.from_table(load_table("prototypes:40", cache=tmp_path), ["volume_per_atom"])
    index = torch.tensor([7, 3, 7, 0])
    lines = [(np.array([3.0, 2.0]), np.array([1.0, 4.0])), (np.array([5.0]), np.array([2.0])), (np.array([4.0, 1.5]), np.array([1.0, 1.0]))] * 2
    other, batch = data.with_reflections(index, lines[:4]), data.batch(index)
    seen = other.batch(torch.arange(4))
    for field in ("atomic_numbers", "fractions", "targets", "space_group", "composition"):
        assert torch.equal(getattr(seen, field), getattr(batch, field))
    assert other.material_ids == [data.material_ids[i] for i in index] and torch.equal(other.split, data.split[index])
    for row, (d, y) in enumerate(lines[:4]):
        mine = seen.reflections.row == row
        np.testing.assert_allclose(seen.reflections.ln_d[mine].exp(), d, rtol=1e-4)
        np.testing.assert_allclose(seen.reflections.intensity[mine], y / y.max(), atol=1e-4)
    other.save(tmp_path / "other.safetensors")
    assert MaterialSet.load(tmp_path / "other.safetensors").fingerprint() == other.fingerprint()


def test_fingerprint_knows_the_data_but_not_the_processor(tmp_path):
    data = MaterialSet.from_table(load_table("prototypes:60", cache=tmp_path), ["volume_per_atom"])
    changed = lambda **fields: replace(data, **fields).fingerprint()
    flips = torch.randint(-1, 2, data.sqrt_intensity.shape, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    assert changed(sqrt_intensity=data.sqrt_intensity + flips * (data.sqrt_intensity < 32767)) == data.fingerprint()  # the last of 16 bits
    targets, group = data.targets.clone(), data.space_group.clone()
    targets[7] *= 1 + 1e-6; group[7] = 1
    others = [changed(targets=targets), changed(space_group=group), changed(ln_d=data.ln_d + 10), changed(ln_d=data.ln_d.flip(0)),
              changed(split=1 - data.split.clamp(max=1)), data.with_targets([]).fingerprint()]  # fmt: skip
    assert len({data.fingerprint(), *others}) == len(others) + 1
