"""Folders of shards: killed, damaged, repeated, on a cluster, with a full disk. The result is always the table of an undisturbed run."""

import bz2
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxact import sources as S
from xxact.bench import read_records, write_alexandria
from xxact.reproduce import main

XXACT = [sys.executable, "-m", "xxact.reproduce"]
real = pytest.mark.skipif("XXACT_REAL_DATA" not in os.environ, reason="XXACT_REAL_DATA is not set")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    records = read_records("prototypes:120")
    for i in range(4): write_alexandria(records, folder / f"alexandria_{i:03d}.json.bz2", 700, seed=i)
    return folder


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "table"
    S.prepare([raw], folder, workers=1, progress=False)
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def copy_of(raw, folder):
    folder.mkdir()
    for p in raw.iterdir(): (folder / p.name).write_bytes(p.read_bytes())
    return folder


def test_shards_are_one_table_whoever_makes_them(raw, undisturbed, tmp_path):
    S.prepare([raw], tmp_path / "shards", workers=2, progress=False)
    assert contents(tmp_path / "shards") == contents(undisturbed)
    S.prepare([raw], tmp_path / "one.parquet", workers=1, progress=False)
    assert S.pl.concat([pl.read_parquet(p) for p in sorted(undisturbed.glob("*0?.parquet"))]).equals(pl.read_parquet(tmp_path / "one.parquet"))


def test_finished_shards_are_kept_and_changed_ones_made_anew(raw, tmp_path):
    raw, out = copy_of(raw, tmp_path / "raw"), tmp_path / "out"
    assert S.prepare([raw], out, workers=1, progress=False)["found_finished"] == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    again = S.prepare([raw], out, workers=1, progress=False)
    assert (again["found_finished"], again["entries"], again["rows"]) == (4, 2800, 2800)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    write_alexandria(read_records("prototypes:120"), raw / "alexandria_002.json.bz2", 10, seed=9)
    changed = S.prepare([raw], out, workers=1, progress=False)
    assert (changed["found_finished"], changed["rows"]) == (3, 2110)
    assert S.prepare([raw], out, d_min=1.2, workers=1, progress=False)["found_finished"] == 0


def test_a_damaged_file_fails_after_the_others_are_finished(raw, undisturbed, tmp_path):
    raw, out = copy_of(raw, tmp_path / "raw"), tmp_path / "out"
    good = (raw / "alexandria_001.json.bz2").read_bytes()
    text = bz2.decompress(good)
    for damaged in (good[: len(good) // 2], bz2.compress(text[: len(text) // 2]), good[:5000] + bytes([good[5000] ^ 64]) + good[5001:]):
        (raw / "alexandria_001.json.bz2").write_bytes(damaged)
        message = r"1 of 4 files failed, 3 are finished and stay; alexandria_001.json.bz2: broken file: .*entries"
        with pytest.raises(RuntimeError, match=message) as caught:
            S.prepare([raw], out, workers=1, progress=False)
        assert "\n" not in str(caught.value)
        assert sorted(p.name for p in out.glob("alexandria_00?.parquet")) == [f"alexandria_00{i}.parquet" for i in (0, 2, 3)]
    (raw / "alexandria_001.json.bz2").write_bytes(good)
    assert S.prepare([raw], out, workers=1, progress=False)["found_finished"] == 3
    assert contents(out) == contents(undisturbed)


def test_killed_at_any_moment_the_same_command_goes_on(raw, undisturbed, tmp_path):
    command = [*XXACT, "prepare", str(raw), "--out", str(tmp_path / "out"), "--workers", "1"]
    for shards in (0, 1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "out").glob("alexandria_00?.parquet"))) < shards + 1 and process.poll() is None:
            if shards == 0 and list((tmp_path / "out").glob(".*.parts")): break
            time.sleep(0.01)
        process.kill()
        process.wait()
        for p in (tmp_path / "out").glob("alexandria_00?.parquet"): assert p.read_bytes() == (undisturbed / p.name).read_bytes()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "rows: 2800" in done.stdout
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_terminated_it_leaves_no_process_and_the_same_command_goes_on(raw, undisturbed, tmp_path):
    command = [*XXACT, "prepare", str(raw), "--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob(".*.parts")) and process.poll() is None: time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert "xxact: terminated; the same command goes on" in process.communicate(timeout=120)[1] and process.returncode == 143
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_a_material_of_several_files_is_kept_once(raw, tmp_path):
    raw, out = copy_of(raw, tmp_path / "raw"), tmp_path / "out"
    write_alexandria(read_records("prototypes:120")[:30], raw / "alexandria_004.json.bz2", 60, seed=0)  # all of them are in the first
    write_alexandria(read_records("prototypes:120")[:30], raw / "alexandria_005.json.bz2", 60, seed=1)
    first = S.prepare([raw], out, workers=2, progress=False)
    assert (first["entries"], first["rows"], first["duplicates"]) == (2920, 2800, 120)
    before = contents(out)
    again = S.prepare([raw], out, workers=2, progress=False)
    assert (again["entries"], again["rows"], again["duplicates"], again["found_finished"]) == (2920, 2800, 120, 6)
    shard = out / "alexandria_004.parquet"  # as if killed after the rejects were written and before the table was
    S.prepare([raw / "alexandria_004.json.bz2"], tmp_path / "alone", workers=1, progress=False)
    shard.write_bytes((tmp_path / "alone" / shard.name).read_bytes())
    assert S.prepare([raw], out, workers=1, progress=False)["duplicates"] == 120
    assert contents(out) == before


def test_two_sources_of_one_name_and_foreign_tables_are_refused(raw, tmp_path):
    other = copy_of(raw, tmp_path / "other")
    with pytest.raises(ValueError, match="another source would also be written to alexandria_000.parquet"):
        S.prepare([raw, other], tmp_path / "out", workers=1, progress=False)
    assert not (tmp_path / "out").exists()
    pl.DataFrame({"mine": [1]}).write_parquet(other / "alexandria_000.parquet")
    with pytest.raises(RuntimeError, match="was not made by"):
        S.prepare([other / "alexandria_000.json.bz2"], other, workers=1, progress=False)
    assert pl.read_parquet(other / "alexandria_000.parquet").columns == ["mine"]
    with pytest.raises(ValueError, match="no dask scheduler answers|pip install"):
        S.prepare([raw], tmp_path / "out", scheduler="tcp://127.0.0.1:1", progress=False)


def test_a_web_page_among_the_files_is_an_error_before_any_work(raw, tmp_path):
    raw = copy_of(raw, tmp_path / "raw")
    (raw / "alexandria_003.json.bz2").write_text("<!DOCTYPE html><html>503</html>")
    done = subprocess.run([*XXACT, "prepare", str(raw), "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and "alexandria_003.json.bz2: a web page" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_one_line(raw, tmp_path, monkeypatch, capsys):
    def refuse(folder): raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert main(["prepare", str(raw), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert "Permission denied" in error and str(raw) in error and "\n" not in error


def test_a_full_disk_leaves_finished_shards_and_nothing_half(raw, undisturbed, tmp_path):
    out = tmp_path / "out"
    S.prepare([raw / "alexandria_000.json.bz2"], out, workers=1, progress=False)
    limited = ("import resource; from xxact.reproduce import main; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
               "raise SystemExit(main())")
    done = subprocess.run([sys.executable, "-c", limited, "prepare", str(raw), "--out", str(out), "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "3 of 4 files failed, 1 are finished and stay" in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert sorted(contents(out)) == ["alexandria_000.parquet", "alexandria_000.rejects.parquet"]
    assert (out / "alexandria_000.parquet").read_bytes() == (undisturbed / "alexandria_000.parquet").read_bytes()


def test_a_cluster_that_loses_a_worker_makes_the_same_table(raw, undisturbed, tmp_path):
    pytest.importorskip("distributed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    start = lambda *args: subprocess.Popen([sys.executable, "-m", "distributed.cli." + args[0], *args[1:]], cwd=tmp_path,
                                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port = address.rpartition(":")[2]
    processes = [start("dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")]
    processes += [start("dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(2)]
    try:
        prepare = subprocess.Popen([*XXACT, "prepare", str(raw), "--out", "out", "--scheduler", address], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        at_work = f".*.{processes[1].pid}.*.parts"
        while not list((tmp_path / "out").glob(at_work)) and prepare.poll() is None: time.sleep(0.01)
        processes[1].send_signal(signal.SIGKILL)
        processes[1].wait()
        assert list((tmp_path / "out").glob(at_work)), "the worker had nothing to lose"
        output, _ = prepare.communicate(timeout=300)
    finally:
        for process in processes: process.kill()
    assert prepare.returncode == 0, output
    assert "rows: 2800" in output
    assert contents(tmp_path / "out") == contents(undisturbed)


# --- the record parser --------------------------------------------------------------------------------------------------------------


def prepared(path):
    """Rows and rejects of a file, whatever is in it, by way of the table on disk."""
    out = path.with_name("table.parquet")
    try: summary = S.prepare([path], out, workers=1, progress=False)
    except ValueError as error:
        assert "no material could be prepared" in str(error) and "\n" not in str(error)
        return [], pl.read_parquet(path.with_name("table.rejects.parquet")).to_dicts()
    rows, rejects = pl.read_parquet(out).to_dicts(), pl.read_parquet(path.with_name("table.rejects.parquet")).to_dicts()
    assert summary["entries"] == len(rows) + len(rejects)
    return rows, rejects


@real
@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_flipped_bit_in_a_real_record_costs_that_record_alone(tmp_path_factory, data):
    text = bytearray((Path(os.environ["XXACT_REAL_DATA"]) / "alexandria/alexandria_sample.json").read_bytes())
    starts = [m.start() for m in S.ENTRY.finditer(text.decode())] + [text.rindex(b"]")]
    hit = data.draw(st.integers(0, 2))
    at = data.draw(st.integers(8 * starts[hit], 8 * (starts[hit + 1] - 2 * (hit < 2)) - 1))  # not the comma between two
    path = tmp_path_factory.mktemp("flip") / "a.json"
    path.write_bytes(text)
    whole, _ = prepared(path)
    path.with_name("table.parquet").unlink()
    text[at // 8] ^= 1 << at % 8
    path.write_bytes(text)
    rows, rejects = prepared(path)
    for i in {0, 1, 2} - {hit}: assert whole[i] in rows
    assert len(rows) == 3 or rejects


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x), max_leaves=5)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_entries_of_any_shape(tmp_path_factory, data):
    site = {"species": [{"element": "Cs", "occu": 1}], "abc": [0, 0, 0]}
    entry = {"data": {"mat_id": "x", "e_form": -1.0, "spg": 221}, "structure": {"lattice": {"matrix": (4.1 * np.eye(3)).tolist()}, "sites": [site]}}
    place, keys = entry, data.draw(st.sampled_from([
        ("data",), ("structure",), ("data", "mat_id"), ("data", "e_form"), ("data", "spg"), ("structure", "lattice"), ("structure", "sites"),
        ("structure", "lattice", "matrix"), ("structure", "lattice", "matrix", 0), ("structure", "sites", 0), ("structure", "sites", 0, "abc"),
        ("structure", "sites", 0, "species"), ("structure", "sites", 0, "species", 0, "element"), ("structure", "sites", 0, "species", 0, "occu"),
    ]))
    for key in keys[:-1]: place = place[key]
    place[keys[-1]] = data.draw(anything)
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_text(json.dumps({"entries": [entry, data.draw(anything)]}))
    assert sum(map(len, prepared(path))) == 2


@pytest.mark.parametrize(("text", "entries", "broken"), [
    ('{"entries": [E, E]}', 2, False),
    ('{"entries": [E, {"@module": "m" "broken"}]}', 2, True),  # what is behind the last damaged one, nobody knows
    ('{"entries": [E, {"@module": "m", "n": N}, E]}', 3, False),  # a number of thousands of digits
    ('{"entries": [E, [[[[, E]}', 3, False),
    ('{"entries": [E, B, E]}', 3, False),  # brackets without end
    ('{"entries": [E]}{"entries": [E]}', 2, True),  # two files in one
    ('{"entries": [E}], E]}', 2, False),
    ('{"entries": [E, Z, E]}', 2, True),  # zeros
    ('{"entries": []}', 0, False),
    ('{"entries": [E, ', 2, True),
])
def test_damage_of_many_kinds(text, entries, broken, tmp_path):
    one = lambda i: json.dumps({"@module": "m", "@class": "ComputedStructureEntry", "data": {"mat_id": f"a{i}"}})
    for i in range(text.count("E")): text = text.replace("E", one(i).replace("E", "€"), 1)
    text = text.replace("€", "E").replace("N", "1" * 5000).replace("B", "[" * 10_000).replace("Z", "\0" * 2**21)
    (tmp_path / "a.json").write_text(text)
    items = list(S.read_source(tmp_path / "a.json"))
    assert len(items) == entries and any("broken file" in item["reason"] for item in items) == broken


def test_odd_identifiers_and_space_groups_are_stored(tmp_path):
    write_alexandria(read_records("prototypes:5"), tmp_path / "a.json", 3)
    document = json.loads((tmp_path / "a.json").read_text())
    for entry, spg, name in zip(document["entries"], (225.0, True, 10**30), ("\ud800", "a\nb", 7)): entry["data"] |= {"spg": spg, "mat_id": name}
    (tmp_path / "a.json").write_text(json.dumps(document))
    rows, rejects = prepared(tmp_path / "a.json")
    assert [row["material_id"] for row in rows] == ["?", "a b", "7"] and not rejects


def test_shards_made_at_different_times_keep_each_material_once(tmp_path):
    records = read_records("prototypes:15")
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    write_alexandria(records[:10], raw / "a.json", 10)
    write_alexandria(records, raw / "b.json", 15)  # the same ten, and five more
    for file in ("a.json", "b.json"): S.prepare([raw / file], out, workers=1, progress=False)
    rows = lambda: sum(pl.read_parquet(out / f"{name}.parquet").height for name in "ab")
    assert rows() == 15
    write_alexandria(records[:4], raw / "a.json", 4)  # what b lost to a comes back
    assert S.prepare([raw], out, workers=1, progress=False)["rows"] == rows() == 15


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(0, 3), st.booleans())
def test_windows_of_any_size_give_the_same_entries(size, blanks, cut):
    entries = [{"@module": "m", "@class": "ComputedStructureEntry", "text": 'a "quoted" } ]', "number": -1.5e-7, "list": [1, [2]], "ü": None}] * 3
    text = json.dumps({"entries": entries}, indent=blanks or None)

    class Short:
        def __init__(self): self.at = 0

        def read(self, n):  # fewer characters than were asked for, as sockets do
            self.at += min(n, size)
            return text[: len(text) - 5 * cut][self.at - min(n, size) : self.at]

    if size < text.index("[") + 1:
        return
    if cut:
        with pytest.raises(ValueError, match="ends in the middle"): list(S.decode_entries(Short(), size))
    else:
        assert list(S.decode_entries(Short(), size)) == entries
