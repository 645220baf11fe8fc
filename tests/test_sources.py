"""Checks of `xxact.sources` that would not read well as a lesson. Those on real data need XXACT_REAL_DATA."""

import bz2
import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxact import sources as S

CIF = """data_CsCl
_cell_length_a   4.12
_cell_length_b   4.12
_cell_length_c   4.12
_cell_angle_alpha   90.0
_cell_angle_beta   90.0
_cell_angle_gamma   90.0
loop_
 _symmetry_equiv_pos_as_xyz
  'x, y, z'
loop_
 _atom_site_type_symbol
 _atom_site_label
 _atom_site_fract_x
 _atom_site_fract_y
 _atom_site_fract_z
 _atom_site_occupancy
  Cs  Cs0  0.0  0.0  0.0  1
  Cl  Cl1  0.5  0.5  0.5  1
"""
OPERATIONS = "loop_\n _symmetry_equiv_pos_as_xyz\n  'x, y, z'\n"
CUBE = 4.12 * np.eye(3)
CENTRED = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
real = pytest.mark.skipif("XXACT_REAL_DATA" not in os.environ, reason="XXACT_REAL_DATA is not set")


def real_data() -> Path:
    return Path(os.environ["XXACT_REAL_DATA"])


def record(**changes):
    return S.make_record("x", "s", CUBE, CENTRED, [55, 17]) | changes


def reasons(result):
    return [item["reason"] for item in result if "reason" in item]


# --- structures -------------------------------------------------------------------------------------------------------------------


def brute_force_pairs(lattice, x, radius):
    shifts = np.array(list(itertools.product(range(-6, 7), repeat=3)))
    found = set()
    for i in range(len(x)):
        for j in range(i, len(x)):
            distance = np.linalg.norm((x[i] - x[j] + shifts) @ lattice, axis=1)
            hits = int((distance < radius).sum()) - (i == j)
            found |= {(i, j)} if hits else set()
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.3, 2.5))
def test_close_pairs_agrees_with_brute_force(seed, n, radius):
    rng = np.random.default_rng(seed)
    lattice = np.diag(rng.uniform(1.5, 5, 3)) + np.tril(rng.uniform(-3, 3, (3, 3)), -1)
    x = rng.uniform(-1, 2, (n, 3))
    x = x - np.floor(x)
    i, j, distance = S.close_pairs(lattice, x, radius)
    assert (distance < radius).all()
    assert set(zip(i.tolist(), j.tolist())) == brute_force_pairs(lattice, x, radius)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frac_coords": np.zeros((0, 3)), "atomic_numbers": np.zeros(0, int)}, "no sites"),
        ({"frac_coords": np.zeros((2001, 3)), "atomic_numbers": np.full(2001, 11)}, "too many sites"),
        ({"atomic_numbers": np.array([55])}, "lengths differ"),
        ({"occupancies": np.array([1.0])}, "lengths differ"),
        ({"lattice": np.zeros((3, 3))}, "singular lattice"),
        ({"lattice": np.array([[4.0, 0, 0], [0, 4, 0], [4, 4, 0]])}, "singular lattice"),
        ({"lattice": np.eye(3) * 1.4}, "absurd density: 1.37 Å3 an atom"),
        ({"lattice": CUBE * math.nan}, "not finite"),
        ({"frac_coords": np.array([[0, 0, 0], [0.5, 0.5, math.nan]])}, "not finite"),
        ({"frac_coords": np.array([[0, 0, 0], [0.99, 0.0, 0.05]])}, "overlapping sites"),
        ({"lattice": np.diag([0.4, 9, 9])}, "overlapping sites"),
        ({"atomic_numbers": np.array([0, 17])}, "unknown element"),
        ({"atomic_numbers": np.array([119, 17])}, "unknown element"),
        ({"occupancies": np.array([-0.1, 1])}, "occupancy outside 0..1"),
        ({"occupancies": np.array([0.0, 1])}, "occupancy outside 0..1"),
        ({"occupancies": np.array([1, 1.2])}, "occupancy outside 0..1"),
        ({"targets": {"formation_energy_per_atom": -45.0}}, "absurd formation energy"),
        ({"targets": {"hardness": 1.0}}, "unknown target"),
        ({"lattice": CUBE * 1e3}, "cell too large"),
        ({"lattice": CUBE * 1e120}, "cell too large"),
    ],
)
def test_bad_structures_are_refused_with_the_reason(changes, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        S.material_row(record(**changes))
    assert "\n" not in str(caught.value)


def test_shared_and_partial_sites():
    thirds = record(frac_coords=np.zeros((3, 3)), atomic_numbers=np.array([26, 27, 28]), occupancies=np.array([0.334, 0.334, 0.334]))
    row = S.material_row(thirds)
    assert (row["n_sites"], row["space_group"]) == (1, 221)
    with pytest.raises(ValueError, match="overlapping"):
        S.material_row(thirds | {"occupancies": np.array([0.5, 0.5, 0.5])})
    split = record(frac_coords=np.array([[0.03, 0, 0], [-0.03, 0, 0]]), occupancies=np.array([0.5, 0.5]))
    assert S.material_row(split)["n_sites"] == 2


def test_shared_sites_in_another_order_have_the_same_symmetry():
    x = np.array([[0, 0, 0], [0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    body_centred = record(frac_coords=x, atomic_numbers=np.array([26, 27, 27, 26]), occupancies=np.full(4, 0.5))
    assert S.material_row(body_centred)["space_group"] == 229


def test_no_symmetry_found_leaves_the_row(monkeypatch):
    import spglib

    monkeypatch.setattr(spglib, "get_symmetry_dataset", lambda *a, **k: None)
    assert S.material_row(record())["space_group"] is None
    assert pl.DataFrame([S.material_row(record())], schema=S.table_schema())["space_group"].null_count() == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_choice_of_origin_order_and_cell_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    order, origin = rng.permutation(2), rng.uniform(size=3)
    doubled = np.concatenate([CENTRED * [0.5, 1, 1], CENTRED * [0.5, 1, 1] + [0.5, 0, 0]])
    first = S.material_row(record())
    for other in (
        record(frac_coords=CENTRED[order] + origin, atomic_numbers=np.array([55, 17])[order]),
        record(lattice=CUBE * [[2], [1], [1]], frac_coords=doubled, atomic_numbers=np.array([55, 17] * 2)),
    ):
        row = S.material_row(other)
        for name in ("formula", "space_group"):
            assert row[name] == first[name]
        for name in ("fractions", "volume_per_atom", "density", "d_spacing", "intensity"):
            np.testing.assert_allclose(row[name], first[name], rtol=2e-3, atol=1e-5)


@given(st.dictionaries(st.sampled_from([*S.COLUMNS, "spg"]), st.one_of(st.none(), st.sampled_from(["", "n/a", "1e3"]), st.floats())))
def test_labels_are_read_or_told_as_nan(columns):
    for target, value in S.read_targets(columns, 2).items():
        assert target in S.TARGETS
        assert isinstance(value, float)


# --- files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.json.bz2", b"", "is empty"),
        ("a.json.bz2", b"<!DOCTYPE html><html></html>", "web page"),
        ("a.json.gz", b"\n <html></html>", "web page"),
        ("a.json.bz2", b"{}", "not compressed"),
        ("a.csv", b"formula,gap\nNaCl,1\n", "without a `cif` column"),
        ("a.xyz", b"2\n\nNa 0 0 0\n", "unknown layout"),
        ("a.parquet", b"garbage", "unknown layout"),
    ],
)
def test_unrecognised_files_say_what_they_are(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        S.read_source(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_unrecognised_places(tmp_path):
    cases = (tmp_path, "nothing"), (tmp_path / "no", "no such file"), ("prototypes:x", "N at least 1"), ("prototypes:0", "N at least 1")
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            S.read_source(path)
    pl.DataFrame({"material_id": ["a"], "d_spacing": [[1.0]]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="already a material table"):
        S.read_source(tmp_path / "t.parquet")


def alexandria(n):
    sites = [{"species": [{"element": "Cs", "occu": 1}], "abc": [0, 0, 0]}, {"species": [{"element": "Cl", "occu": 1}], "abc": [0.5] * 3}]
    structure = {"lattice": {"matrix": CUBE.tolist()}, "sites": sites}
    return {"entries": [{"data": {"mat_id": f"agm{i}", "e_form": -1.0}, "structure": structure} for i in range(n)]}


def test_alexandria_compressions_and_folder(tmp_path):
    text = json.dumps(alexandria(3)).encode()
    for name, content in (("a.json", text), ("b.json.gz", gzip.compress(text)), ("c.json.bz2", bz2.compress(text))):
        (tmp_path / name).write_bytes(content)
        assert [r["material_id"] for r in S.read_source(tmp_path / name)] == ["agm0", "agm1", "agm2"]
    assert len(list(S.read_source(tmp_path))) == 9


@pytest.mark.parametrize(
    "content", [bz2.compress(b"x" * 10**5)[:-20], bz2.compress(b"{"), bz2.compress(b"[]"), bz2.compress(b'{"a": 1}'), b"BZh9" + b"\0" * 50]
)
def test_broken_files_become_rejects(tmp_path, content):
    (tmp_path / "a.json.bz2").write_bytes(content)
    (reject,) = S.read_source(tmp_path / "a.json.bz2")
    assert reject["material_id"] == "a.json.bz2"
    assert reject["reason"].startswith("broken file: ")


def test_alexandria_entries_of_any_shape(tmp_path):
    document = alexandria(1)
    good = document["entries"][0]
    deuterium = json.loads(json.dumps(good).replace('"Cs"', '"D"'))
    document["entries"] += [
        None,
        3,
        {},
        {"data": {}, "structure": {}},
        deuterium,
        good | {"structure": {"lattice": {"matrix": [1]}, "sites": []}},
    ]
    (tmp_path / "a.json").write_text(json.dumps(document))
    result = list(S.read_source(tmp_path / "a.json"))
    assert len(result) == 7
    assert len(reasons(result)) == 6
    assert "'D' is not an element" in result[5]["reason"]


def test_cif_deuterium_partial_occupancy_and_several_blocks(tmp_path):
    for name, text in {
        "d": CIF.replace("Cs  Cs0", "D  D0"),
        "partial": CIF.replace("Cs0  0.0  0.0  0.0  1", "Cs0  0.0  0.0  0.0  0.6") + "  Rb  Rb2  0.0  0.0  0.0  0.4\n",
        "two": CIF + CIF.replace("data_CsCl", "data_second"),
        "full": CIF,
        "over": CIF.replace("0.5  0.5  0.5  1", "0.5  0.5  0.5  3"),
        "garbage": "loop_\n\0\x01 _ '''",
        "blank": " \n",
        "group": CIF.replace(OPERATIONS, "_symmetry_space_group_name_H-M 'R -3 c :H'\n"),
        "number": CIF.replace(OPERATIONS, "_symmetry_Int_Tables_number 999\n"),
        "known": CIF.replace(OPERATIONS, "_symmetry_Int_Tables_number 221\n"),
        "volume": CIF.replace("loop_", "_cell_volume 100(2)\nloop_", 1),
        "overlap": CIF + "  Rb  Rb2  0.0  0.0  0.0  1\n",
        "cut": CIF.rstrip()[:-12],
        "flat": re.sub(r"(_cell_angle_gamma\s+)\S+", r"\g<1>0", CIF),
        "empty": CIF[: CIF.rstrip().rindex("_atom_site")] + "_atom_site_occupancy\n",
    }.items():
        (tmp_path / f"{name}.cif").write_text(text)
    found = {r["material_id"]: r for r in S.read_source(tmp_path)}
    assert "deuterium" in found["d"]["reason"]
    assert "several structures" in found["two"]["reason"]
    assert "no CIF text" in found["blank"]["reason"]
    assert "reason" in found["over"]
    assert "unreadable CIF" in found["garbage"]["reason"]
    assert "reason" not in found["known"]
    for name, why in dict(group="no space group that is known (R -3 c :H)", number="known (999)", volume="differs from the stated volume of 100",
                          overlap="sites overlap", cut="the text is cut", flat="the cell is missing, flat", empty="no atoms").items():
        assert why in found[name]["reason"], found[name]
    np.testing.assert_allclose(sorted(found["partial"]["occupancies"]), [0.4, 0.6, 1.0])
    assert S.material_row(found["partial"])["n_sites"] == 2
    assert "occupancies" not in found["full"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(CIF)), st.integers(0, 40), st.text("_'#;?0.5 \nCsx", max_size=8))
def test_damaged_cif_never_crashes(at, length, text):
    entry = {"material_id": "x", "source": "s", "cif": CIF[:at] + text + CIF[at + length :], "columns": {}}
    ((item, _),) = S.prepare_chunk([entry], 1.05)
    assert "reason" in item or item["d_spacing"].size
    assert "\n" not in item.get("reason", "")


def test_csv_rows_of_any_shape(tmp_path):
    (tmp_path / "val.csv").write_text(f'material_id,cif,e_form\na,"{CIF}",-1\nb\nc,,\nd,"{CIF}",inf,extra,columns\n', encoding="utf-8-sig")
    result = list(S.read_source(tmp_path / "val.csv"))
    assert [r["material_id"] for r in result] == ["a", "b", "c", "d"]
    assert len(reasons(result)) == 3
    assert result[0]["source"] == tmp_path.name
    (tmp_path / "bare.csv").write_text("cif\n")
    with pytest.raises(ValueError, match="no material could be prepared: the sources are empty"):
        S.prepare([tmp_path / "bare.csv"], tmp_path / "t.parquet", progress=False)
    assert pl.read_parquet(tmp_path / "t.rejects.parquet").height == 0
    assert not (tmp_path / "t.parquet").exists()


def structures(n, **columns):
    same = {"lattice": [CUBE.ravel().tolist()] * n, "frac_coords": [CENTRED.ravel().tolist()] * n, "atomic_numbers": [[55, 17]] * n}
    return pl.DataFrame({"material_id": [f"m{i}" for i in range(n)], **same, **columns})


def test_structure_table_batches_sources_and_nulls(tmp_path):
    path = tmp_path / "s.parquet"
    structures(10, source=["a", "b"] * 5, total_magnetization=[None, 4.0] * 5).write_parquet(path)
    assert [r["material_id"] for r in S.read_structure_table(path, None, batch=5)] == [f"m{i}" for i in range(10)]
    assert [r["material_id"] for r in S.read_structure_table(path, "b", batch=3)] == ["m1", "m3", "m5", "m7", "m9"]
    assert next(S.read_source(path, "b"))["targets"] == {"magnetization_per_atom": 2.0}
    with pytest.raises(ValueError, match="no rows of source 'c'; it has a, b"):
        S.read_source(path, "c")
    structures(2).with_columns(lattice=pl.Series([None, [1.0] * 8], dtype=pl.List(pl.Float64))).write_parquet(path)
    assert len(reasons(S.read_source(path))) == 2
    structures(2).with_columns(material_id=pl.lit(None, pl.String)).write_parquet(path)
    assert [r["material_id"] for r in S.read_source(path)] == ["s-0", "s-1"]
    structures(2).write_parquet(path)
    assert {r["source"] for r in S.read_source(path)} == {"s"}
    assert {r["source"] for r in S.read_source(path, "mine")} == {"mine"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("perov5_val.csv", "perov5"),
        ("mp_20/train.csv", "mp20"),
        ("mpts_52/test.csv", "mpts52"),
        ("mine.parquet", "mine"),
        ("a.json.bz2", "a"),
    ],
)
def test_source_names(path, name):
    assert S.source_name(Path(path)) == name


# --- prepare ----------------------------------------------------------------------------------------------------------------------


def test_processes_give_the_same_table_in_the_same_order(tmp_path):
    structures(600, source=["a", "b", "a"] * 200, band_gap=[1.0, math.nan, math.inf] * 200).write_parquet(tmp_path / "s.parquet")
    before = dict(os.environ)
    summaries = [S.prepare([tmp_path / "s.parquet"] * 2, tmp_path / f"{w}.parquet", workers=w, progress=False) for w in (1, 2)]
    assert dict(os.environ) == before | ({"SPGLIB_WARNING": "OFF"} if "SPGLIB_WARNING" in os.environ else {})
    one, two = (pl.read_parquet(tmp_path / f"{w}.parquet") for w in (1, 2))
    assert one.equals(two)
    assert one["material_id"].to_list() == [f"m{i}" for i in range(600)]
    assert one.schema == pl.Schema(S.table_schema())
    for summary in summaries:
        assert (summary["entries"], summary["rows"], summary["duplicates"]) == (1200, 600, 600)
        assert summary["nan_labels"] == {"band_gap": 400}
    metadata = pl.read_parquet_metadata(tmp_path / "1.parquet")
    assert "a: unknown" in metadata["licence"]
    assert metadata["d_min"] == "1.05"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.parquet", "1.rejects.parquet", "2.parquet", "2.rejects.parquet", "s.parquet"]


@pytest.mark.parametrize(("old", "new", "reason"), [
    ("0.5  0.5  0.5  1", "0.5  0.5  0.5  .", "occupancy not positive"),
    ("0.5  0.5  0.5  1", "0.5  0.5  0.5  0.0", "occupancy not positive"),
    ("0.5  0.5  0.5  1", "0.5  0.5  0.5  -0.5", "occupancy not positive"),
    ("0.5  0.5  0.5  1", ".  0.5  0.5  1", "coordinate missing"),
    ("  Cl  Cl1", "  OH  Cl1", "unknown element: 'OH'"),
    ("  Cl  Cl1", "  2H  Cl1", "unknown element: '2H'"),
    ("  Cl  Cl1", "  Va  Cl1", "unknown element: 'Va'"),
    ("  Cl  Cl1", "  Uuo  Cl1", "unknown element: 'Uuo'"),
    ("  Cl  Cl1  0.5  0.5  0.5  1\n", "", "atoms differ from the stated formula"),
    ("0.5  0.5  0.5  1", "0.5  0.5  0.5  x", "occupancy not positive: of 'x'"),
    ("'x, y, z'", "'x, y, q'", "symmetry operation 'x, y, q' is none"),
    ("'x, y, z'", "'x, y'", "symmetry operation 'x, y' is none"),
])
def test_what_the_cif_parser_would_pass_over_is_refused(old, new, reason):
    cif = CIF.replace("_cell_length_a", "_chemical_formula_sum 'Cs1 Cl1'\n_cell_length_a")
    assert old in cif
    with pytest.raises(ValueError, match=reason): S.parse_cif(cif.replace(old, new))
    for good in (cif, cif.replace("0.5  1\n", "0.5  1.0(1)\n"), cif.replace("  Cl  Cl1", "  Cl1-  Cl1").replace("  Cs  Cs0", "  Cs+  Cs0")):
        assert S.parse_cif(good)[2].tolist() == [55, 17]


def test_a_missing_atom_of_an_element_is_refused():
    atom = "  Cs  Cs0  0.0  0.0  0.0  1\n"
    cif = CIF.replace("_cell_length_a", "_chemical_formula_sum Cs2\n_cell_formula_units_Z 2\n_cell_length_a", 1).replace("  Cl  Cl1", "  Cs  Cs1")
    assert atom in cif and S.parse_cif(cif)[2].tolist() == [55, 55]
    with pytest.raises(ValueError, match="atoms differ from the stated formula: 1 in the cell, but 'Cs2' and 2"): S.parse_cif(cif.replace(atom, ""))
    assert S.parse_cif(CIF.replace("  Cs  Cs0", "  Cs1+  Cs0"))[2].tolist() == [55, 17]  # without a formula there is nothing to compare


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(range(256)) * 8)
    with pytest.raises(ValueError, match="a damaged Parquet file") as caught:
        S.prepare([tmp_path / "a.parquet"], tmp_path / "t.parquet", progress=False)
    assert "\n" not in str(caught.value)


def test_half_a_download_and_foreign_files_are_refused(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "alexandria_000.json").write_text(json.dumps(alexandria(2)))
    (raw / "alexandria_001.json.bz2.part").write_bytes(b"BZh9")
    with pytest.raises(ValueError, match="half a download"): S.prepare([raw], tmp_path / "out", workers=1, progress=False)
    (tmp_path / "mine.parquet").write_text("hi")
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "other.parquet")
    for out, message in (("mine.parquet", "no Parquet file"), ("other.parquet", "not made by"), ("table.txt", "named like one")):
        with pytest.raises(ValueError, match=message): S.prepare(["prototypes:3"], tmp_path / out, workers=1, progress=False)
    assert (tmp_path / "mine.parquet").read_text() == "hi" and not (tmp_path / "table.txt").exists()


def test_same_identifier_from_another_source_is_another_row(tmp_path):
    structures(4, source=["a", "b", "a", "a"]).with_columns(material_id=pl.Series(["x", "x", "x", "y"])).write_parquet(
        tmp_path / "s.parquet"
    )
    summary = S.prepare([tmp_path / "s.parquet"], tmp_path / "t.parquet", progress=False)
    assert (summary["rows"], summary["duplicates"]) == (3, 1)


def test_an_unexpected_failure_of_a_library_is_a_reject(tmp_path, monkeypatch):
    computed = S.crystal_reflections

    def fails_for_one(crystals, d_min):
        if any(crystal.atomic_numbers[0] == 19 for crystal in crystals):
            raise RuntimeError("deep\ninside")
        return computed(crystals, d_min)

    monkeypatch.setattr(S, "crystal_reflections", fails_for_one)
    structures(3).with_columns(atomic_numbers=pl.Series([[55, 17], [19, 17], [37, 17]])).write_parquet(tmp_path / "s.parquet")
    summary = S.prepare([tmp_path / "s.parquet"], tmp_path / "t.parquet", progress=False)
    assert summary["rejects"] == {"RuntimeError": 1}
    assert pl.read_parquet(tmp_path / "t.rejects.parquet")["reason"].to_list() == ["RuntimeError: deep inside"]
    assert pl.read_parquet(tmp_path / "t.parquet")["formula"].to_list() == ["CsCl", "RbCl"]


def test_a_wrong_path_is_an_error_before_any_work(tmp_path):
    structures(3).write_parquet(tmp_path / "s.parquet")
    with pytest.raises(ValueError, match="no such file"):
        S.prepare([tmp_path / "s.parquet", tmp_path / "absent.csv"], tmp_path / "t.parquet", progress=False)
    with pytest.raises(ValueError, match="no sources"):
        S.prepare([], tmp_path / "t.parquet", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


def test_a_script_without_a_guard_is_told_so(tmp_path):
    structures(S.CHUNK + 1).write_parquet(tmp_path / "s.parquet")
    (tmp_path / "script.py").write_text(
        "from xxact.sources import prepare\nprepare(['s.parquet'], 't.parquet', workers=2, progress=False)\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "a worker process ended" in done.stderr


def test_import_needs_neither_pymatgen_nor_spglib():
    code = "import sys, xxact.sources; print([m for m in ('pymatgen', 'spglib', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- what a table can teach -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["NaCl", "Na2Cl2", "TiO2"]), st.one_of(st.none(), st.floats(-5, 5))), max_size=30
    )
)
def test_floor_is_leave_one_out(rows):
    table = pl.DataFrame(rows, schema={"source": pl.String, "formula": pl.String, "band_gap": pl.Float64}, orient="row")
    groups: dict[tuple[str, str], list[float]] = {}
    for source, formula, value in rows:
        if value is not None:
            groups.setdefault((source, formula.replace("Na2Cl2", "NaCl")), []).append(value)
    errors: dict[str, list[float]] = {"mae_median": [], "mae_mean": []}
    for values in groups.values():
        for i, value in enumerate(values):
            if others := values[:i] + values[i + 1 :]:
                errors["mae_median"].append(abs(value - float(np.median(others))))
                errors["mae_mean"].append(abs(value - float(np.mean(others))))
    floor = S.composition_floor(table, "band_gap")
    assert floor["rows"] == len(errors["mae_mean"])
    for name, values in errors.items():
        assert floor[name] == pytest.approx(np.mean(values), abs=1e-9) if values else math.isnan(floor[name])


def test_card_of_small_tables():
    row = S.material_row(record())
    for rows in ([row], [row | {"space_group": None}, row], [row, row | {"material_id": "y"}]):
        card = S.data_card(pl.DataFrame(rows, schema=S.table_schema()))
        assert "nan" not in card
    assert "1 pairs" in card


# --- real data --------------------------------------------------------------------------------------------------------------------


@real
def test_real_structures_have_the_symmetry_that_their_table_states(tmp_path):
    path = real_data() / "mp" / "structures.parquet"
    sample = pl.read_parquet(path).sample(300, seed=0)
    sample.write_parquet(tmp_path / "s.parquet")
    summary = S.prepare([tmp_path / "s.parquet"], tmp_path / "t.parquet", workers=2, progress=False)
    assert summary["rows"] >= 299
    both = pl.read_parquet(tmp_path / "t.parquet").join(sample, on="material_id", suffix="_stated")
    assert (both["space_group"] == both["space_group_stated"]).mean() > 0.99
    assert (both["n_sites"] == both["n_sites_stated"]).all()
    volume = both["volume"] / both["n_sites"]
    assert ((both["volume_per_atom"] / volume - 1).abs() < 1e-4).all()
    agrees = both.filter(pl.col("total_magnetization").is_not_null())
    assert (agrees["magnetization_per_atom"] - agrees["total_magnetization"] / agrees["n_sites"]).abs().max() < 1e-4


@real
def test_real_files_of_every_layout(tmp_path):
    expected = {"cif_folder": ("cif_folder", 200), "alexandria/alexandria_sample.json": ("alexandria", 3)}
    for path, (source, count) in expected.items():
        summary = S.prepare([real_data() / path], tmp_path / "t.parquet", progress=False)
        table = pl.read_parquet(tmp_path / "t.parquet")
        assert (summary["entries"], summary["rows"], table["source"].unique().to_list()) == (count, count, [source])
        assert table["formation_energy_per_atom"].null_count() == 0
    head = list(itertools.islice(S.read_source(real_data() / "mp20_style" / "perov5_val.csv"), 20))
    assert not reasons(head)
    assert set(head[0]["targets"]) == {"formation_energy_per_atom", "band_gap", "band_gap_direct"}


@real
def test_alexandria_space_groups_and_units():
    entries = json.loads((real_data() / "alexandria" / "alexandria_sample.json").read_text())["entries"]
    for entry, item in zip(entries, S.read_source(real_data() / "alexandria" / "alexandria_sample.json")):
        data, row = entry["data"], S.material_row(item | {"space_group": None})  # found again
        assert item["space_group"] == data["spg"]
        assert (row["material_id"], row["space_group"], row["n_sites"]) == (data["mat_id"], data["spg"], data["nsites"])
        assert row["dos_at_fermi"] == pytest.approx(data["dos_ef"] / data["nsites"])


@pytest.mark.parametrize("group, cell, x, reason", [
    ("F d -3 m", (5.431, 5.431, 5.431, 90), 0.125, "space group F d -3 m has two origins, and no symmetry operations say which"),
    ("R -3 m", (4.746, 4.746, 4.746, 57.23), 0.234, "the cell contradicts its symmetry operations, or the space group's usual setting"),
    ("F m -3 m", (5.15, 5.21, 5.31, 90), 0.0, "the cell contradicts its symmetry operations"),
    ("F m -3 m", (5.15, 5.15, 5.15, 90), 0.0, None),
    ("F m -3 m :X'\n_space_group_name_H-M_alt 'F m -3 m", (5.15, 5.15, 5.15, 90), 0.0, None),
    ("?'\n_symmetry_Int_Tables_number '227", (5.431, 5.431, 5.431, 90), 0.125, "space group 227 has two origins"),
    ("F d -3 m :2'\n_space_group_IT_number '227", (5.431, 5.431, 5.431, 90), 0.125, "space group F d -3 m :2 has two origins"),
    ("P 21/n'\n_space_group_IT_number '14", (5.431, 5.431, 5.431, 90), 0.125, r"a setting of space group 14 that is not known \(P 21/n\)"),
])
def test_a_cif_whose_setting_cannot_be_known_is_refused(group, cell, x, reason):
    *edges, angle = cell
    lines = [f"_cell_length_{k} {v}" for k, v in zip("abc", edges)] + [f"_cell_angle_{k} {angle}" for k in ("alpha", "beta", "gamma")]
    sites = "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nBi1 Bi"
    cif = "\n".join(["data_x", *lines, f"_symmetry_space_group_name_H-M '{group}'", f"{sites} {x} {x} {x}"])
    if reason is None: assert len(S.parse_cif(cif)[2]) == 4; return
    with pytest.raises(ValueError, match=reason): S.parse_cif(cif)
