"Readers of measured patterns: every format to the same numbers, real files to what their headers say, and nothing but one line for the rest."

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xxact.diffraction import (LN_Q, MEASUREMENTS, WAVELENGTHS, Measurement, batch_reflections, ln_q_of, lorentz_polarisation, reflections,
                               render)
from xxact.patterns import Pattern, as_pattern, even_grid, find_peaks, read_pattern, to_reflections, tube_lines, without_kalpha2
from xxact.reproduce import main

REAL = os.environ.get("XXACT_REAL_DATA")
needs_real = pytest.mark.skipif(not REAL, reason="set XXACT_REAL_DATA to the folder of real data")
X, Y = 10 + 0.02 * np.arange(300), np.random.default_rng(0).poisson(100, 300) + 1


def rows(form: str) -> str:
    return "".join(form.format(x, y) for x, y in zip(X, Y))


def zipped(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def raw4() -> bytes:
    tube = struct.pack("<2I", 30, 136) + bytes(72) + struct.pack("<2d", 1.5406, 1.54439) + bytes(20) + b"Cu\0\0" + bytes(16)
    head = bytearray(160)
    for at, form, value in ((4, "<I", len(X)), (72, "<d", 10.0), (80, "<d", 0.02), (136, "<I", 4), (140, "<I", 5)):
        struct.pack_into(form, head, at, value)
    return b"RAW4.00".ljust(61, b"\0") + tube + bytes(head) + bytes(5) + Y.astype("<f4").tobytes()


AXES = '<ScanAxes><ScanAxisInfo AxisId="TwoTheta"/><ScanAxisInfo AxisId="Theta"/></ScanAxes>'
DATA = "".join(f"<Datum>1,1,{x:.4f},{x / 2:.4f},{y}</Datum>" for x, y in zip(X, Y))
RANGE = f"_pd_meas_2theta_range_min {X[0]}\n_pd_meas_2theta_range_inc 0.02"
FILES = {
    "a.xy": rows("{:.2f} {}\n"),
    "a.xye": rows("{:.2f}\t{}\t1.0\n"),
    "a.csv": "2theta;counts\n" + rows("{:.2f};{}\n").replace(".", ","),
    "b.csv": "angle (deg), intensity (cps)\r\n" + rows("{:.2f},{}\r\n"),
    "a.txt": "# comment\n" + rows("  {:.2f}   {}\n").replace(".", ","),
    "falling.dat": "".join(reversed(rows("{:.2f} {}\n").splitlines(keepends=True))),
    "latin.xy": "Größe der Körner 5 µm\n".encode("cp1252") + rows("{:.2f} {}\n").encode(),
    "wide.xy": rows("{:.2f} {}\n").encode("utf-16"),
    "q.csv": "q (1/nm),I\n" + "".join(f"{40 * np.pi * np.sin(np.radians(x / 2)) / 1.5406:.9f},{y}\n" for x, y in zip(X, Y)),
    "a.xrdml": '<x:xrdMeasurements xmlns:x="u"><usedWavelength><kAlpha1>1.5406</kAlpha1><kAlpha2>1.54439</kAlpha2></usedWavelength><scan><dataPoints>'
    f'<positions axis="2Theta"><startPosition>{X[0]}</startPosition><endPosition>{X[-1]}</endPosition></positions>'
    f"<intensities>{' '.join(map(str, Y))}</intensities></dataPoints></scan></x:xrdMeasurements>",
    "a.ras": '*RAS_DATA_START\n*HW_XG_WAVE_LENGTH_ALPHA1 "1.5406"\n*RAS_INT_START\n'
    + "".join(f"{x:.4f} {y / 4} 4.0\n" for x, y in zip(X, Y))
    + "*RAS_INT_END\n",
    "a.asc": f"*TARGET = 29\n*WAVE_LENGTH1 = 1.5406\n*BEGIN\n*START = 10\n*STEP = 0.02\n*COUNT = {len(X)}\n" + ", ".join(map(str, Y)) + "\n*END\n",
    "a.uxd": "_FILEVERSION=2\n_WL1=1.5406\n_START=10\n_STEPSIZE=0.02\n_COUNTS\n" + "\n".join(map(str, Y)),
    "b.uxd": "_FILEVERSION=2\n_WL1=1.5406\n_2THETACOUNTS\n" + rows("{:.2f} {}\n"),
    "a.gsas": f"title\nBANK 1 {len(X)} {len(X) // 10} CONST 1000 2 0 0 STD\n"
    + "\n".join("".join(f"{y:8d}" for y in Y[i : i + 10]) for i in range(0, len(X), 10)),
    "b.gsas": f"title\nBANK 1 {len(X)} {len(X) // 5} CONST 1000 2 0 0 ESD\n"
    + "\n".join("".join(f"{y:8d}{1:8d}" for y in Y[i : i + 5]) for i in range(0, len(X), 5)),
    "a.fxye": f"title\nBANK 1 {len(X)} {len(X)} CONS 1000 2 0 0 FXYE\n" + "".join(f"{100 * x:.4f} {y} 1\n" for x, y in zip(X, Y)),
    "a.cif": f"data_x\n_diffrn_radiation_wavelength 1.5406\n{RANGE}\nloop_\n_pd_meas_counts_total\n"
    + "".join(f"{y}({i % 9})\n" for i, y in enumerate(Y)),
    "b.cif": "data_x\nloop_\n_pd_meas_2theta_scan\n_pd_proc_intensity_total\n" + rows("{:.2f} {}\n"),
    "a.brml": zipped({"Experiment0/RawData0.xml": f"<RawData>{AXES}<WaveLengthAlpha1 Value='1.5406'/>{DATA}</RawData>"}),
    "a.rasx": zipped(
        {"Data0/Profile0.txt": rows("{:.4f}\t{}\t1\n"), "Data0/MesurementConditions0.xml": "<a><WavelengthKalpha1>1.5406</WavelengthKalpha1></a>"}
    ),
    "a.raw": raw4(),
}


def write(folder: Path, name: str) -> Path:
    data = FILES[name]
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FILES)
def test_every_format_reads_to_the_same_scan(tmp_path, name):
    p = read_pattern(write(tmp_path, name), wavelength=1.5406)
    np.testing.assert_allclose(p.two_theta, X, atol=1e-6)
    np.testing.assert_array_equal(p.intensity, Y)
    assert p.wavelength == 1.5406
    write(tmp_path, name).rename(tmp_path / "wrong.cif")  # told by what is in it, not by its name
    np.testing.assert_array_equal(read_pattern(tmp_path / "wrong.cif", wavelength=1.5406).intensity, Y)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(10, 60),
    st.floats(0.1, 40),
    st.floats(0.001, 1),
    st.sampled_from(["\t", ";", " ", "  ", ",", ", "]),
    st.booleans(),
    st.integers(0, 2**31),
)
@pytest.mark.filterwarnings("ignore:.*2θ ends at")
def test_columns_come_back_whatever_separates_them(tmp_path_factory, n, low, step, separator, commas, seed):
    x, y = low + step * np.arange(n), np.random.default_rng(seed).normal(0, 100, n)
    text = "".join(f"{a:.6f}{separator}{b:.4e}\n" for a, b in zip(x, y))
    if commas and "," not in separator:
        text = text.replace(".", ",")
    path = tmp_path_factory.mktemp("columns") / "a.txt"
    path.write_text(text)
    p = read_pattern(path, "CuKa")
    np.testing.assert_allclose(p.two_theta, x, atol=1e-6)
    np.testing.assert_allclose(p.intensity, y, rtol=1e-4)


REAL_FILES = {  # points, first and last angle, first and last intensity, Å: from the headers and the text of the files
    "CG20396_jdb12-1.xrdml": (7181, 5.00835563, 124.99526689, 1678, 113, 1.540598),
    "Scan_C1.xrdml": (7181, 5.00475563, 124.99166689, 374, 158, 1.540598),
    "MB120718Si3.ras": (1401, 2.0, 30.0, 7994, 1150, 1.540593),
    "2Theta.asc": (7601, 4.0, 80.0, 767, 570, 1.54059),
    "JO_KL_16_ZF_3_60deg_0.02step_12degpermin_001.rasx": (2851, 3.0, 60.0, 2589, 119, 1.540593),
    "TiOF.brml": (2469, 9.998839261, 60.01277602, 4471, 692, 1.5406),
    "BT86-siemens.uxd": (2374, 3.0, 39.999816, 187, 269, 1.5406),
    "TiO2.raw": (1647, 10.0, 70.0411, 557, 328, 1.5406),
    "bruker.raw": (4059, 37.0001, 120.0046, 7264, 7043, 1.5418),
    "FAP-laboratory.gsas": (5753, 15.0, 130.04, 609, 0, None),
    "NIST660CBI.gsas": (8378, 15.0066, 124.9991, 2364, 370, None),
    "11bmb_8716.fxye": (49494, 0.5, 49.98643179, 505.41741, 265.230908, 0.413259),
    "data.cif": (3728, 8.0, 89.994, 1733, 202, 1.540598),
    "example_bmb.xye": (575, 0.5, 1.073103125, 662.407183, 196.446337, 0.414581),
    "example_evadiffract.xy": (28, 5.0001, 5.2743, 4.852, 4.324, 1.54184),
    "example_mac.xye": (598, 0.001, 0.598, 11.345, 113.272, None),
    "example_mythen.dat": (730, 2.084, 5.0, 2866.694378, 3259.561469, None),
    "example_ocx.xy": (1876, 5.0, 80.0, 2.732, 0.272, None),
    "data.dat": (2600, 3.0, 54.98, 0, 0, 1.23984),
    "single.csv": (3048, 30.00313028, 110.0656187, 232, 133, None),
}


@needs_real
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_read_to_what_their_headers_say(name):
    n, low, high, first, last, wavelength = REAL_FILES[name]
    p = read_pattern(Path(REAL) / "xrd/formats" / name)
    assert len(p.two_theta) == n and (np.diff(p.two_theta) > 0).all()
    np.testing.assert_allclose([*p.two_theta[[0, -1]], *p.intensity[[0, -1]]], [low, high, first, last], atol=6e-5)
    assert abs(p.wavelength - (wavelength or 1.54184)) < 1e-5 or name == "bruker.raw"  # whose tube block says Kα1, its range the mean


@needs_real
def test_scans_are_the_patterns_of_the_table():
    table = pl.read_parquet(Path(REAL) / "xrd/rruff.parquet").rows_by_key("pattern_id", named=True, unique=True)
    scans = sorted(Path(REAL).glob("xrd/scans/*_rruff-*.xy"))
    assert len(scans) == 8
    for path in scans:
        p = read_pattern(path, wavelength=1.5418)
        np.testing.assert_allclose(p.two_theta, 5 + 0.01 * np.arange(8500), atol=1e-6)
        np.testing.assert_allclose(p.intensity, table[path.stem.partition("_")[2]]["intensity"], atol=1e-3)


@needs_real
@pytest.mark.skipif(not shutil.which("xyconv"), reason="xylib's command xyconv is not installed")
def test_old_binary_files_read_like_their_text():
    binary, text = (read_pattern(Path(REAL) / "xrd/formats" / name) for name in ("BT86.raw", "BT86-siemens.uxd"))
    np.testing.assert_allclose(binary.two_theta, text.two_theta, atol=6e-4)
    np.testing.assert_array_equal(binary.intensity, text.intensity)
    assert binary.wavelength == text.wavelength == 1.5406


@needs_real
def test_a_format_that_no_library_reads_is_named():
    with pytest.raises(ValueError, match="stoe.raw: is STOE's raw format"):
        read_pattern(Path(REAL) / "xrd/formats/stoe.raw")


def result_or_one_line(path: Path) -> None:
    "Read a file that may be anything."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            p = read_pattern(path, wavelength=1.5406)
        except ValueError as e:
            assert str(e).startswith(f"{path}: ") and "\n" not in str(e) and len(str(e)) > len(str(path)) + 5
            return
        assert (
            np.isfinite(p.two_theta).all()
            and np.isfinite(p.intensity).all()
            and (np.diff(p.two_theta) > 0).all()
            and 0 < p.two_theta[0] < p.two_theta[-1] < 180
        )
        try:
            to_reflections(p)
        except ValueError as e:
            assert "\n" not in str(e)


def damage(data: bytes, draw: st.DrawFn) -> bytes:
    "Cut off, and with some bits turned over."
    data = bytearray(data[: draw(st.integers(1, len(data)))] if draw(st.booleans()) else data)
    for _ in range(draw(st.integers(0, 12))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(data)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_files_give_a_result_or_one_line(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(FILES)))
    path = write(tmp_path_factory.mktemp("damaged"), name)
    path.write_bytes(damage(path.read_bytes(), data.draw))
    result_or_one_line(path)


@needs_real
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_real_files_give_a_result_or_one_line(tmp_path_factory, data):
    source = data.draw(st.sampled_from(sorted(Path(REAL).glob("xrd/formats/*"))))
    path = tmp_path_factory.mktemp("damaged") / source.name
    path.write_bytes(damage(source.read_bytes(), data.draw))
    result_or_one_line(path)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([b"", b"RAW4.00", b"PK\3\4", b"<?xml", b"*RAS_DATA_START\n", b"BANK 1 10 1 ", b"data_x\n", b"_COUNTS\n", b"*BEGIN\n"]),
    st.binary(max_size=400),
)
def test_noise_gives_one_line(tmp_path_factory, begin, noise):
    path = tmp_path_factory.mktemp("noise") / "noise.xy"
    path.write_bytes(begin + noise)
    result_or_one_line(path)


@pytest.mark.parametrize(
    "text, reason",
    {
        "": "is empty",
        "  \n \n": "is empty",
        "1\n2\n3\n": "no two columns of numbers",
        "a story\n" * 3: "no two columns of numbers",
        rows("{:.2f} {}\n").replace("11.00", "eleven"): "line 51: 'eleven' is no number",
        rows("{:.2f} {}\n").replace("11.00 ", "11.00x"): "line 51 has not 2 columns",
        "5 1\n6 2\n" * 30: "up and down",
        "5 1\n5 2\n" * 30: "only 1 different",
        "1 2\n3 4\n": "only 2 points",
        "".join(f"{i} 1\n" for i in range(170, 200)): "2θ up to 199° cannot be",
        "".join(f"{i // 9},{i},{i},1\n" for i in range(90)): "different angles",
        "".join(f"{i} nan\n" for i in range(1, 90)): "only 0 of 89 points are numbers",
        '<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>': "declares entities",
        "<x><y>": "no element found",
        "<x/>": "no scan over 2Theta",
    }.items(),
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_pattern_says_why(tmp_path, text, reason):
    path = tmp_path / "bad.xy"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.xy: .*{reason}"):
        read_pattern(path)


def test_paths_and_archives_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_pattern(tmp_path / "nothing.xy")
    with pytest.raises(ValueError, match="is a directory"):
        read_pattern(tmp_path)
    for name in ("a.brml", "a.rasx"):
        path = write(tmp_path, name)
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(ValueError, match=f"{name}: "):
            read_pattern(path)
    (tmp_path / "a.xy.gz").write_bytes(b"\x1f\x8b" + bytes(99))
    with pytest.raises(ValueError, match="a.xy.gz: is compressed; unpack it first"):
        read_pattern(tmp_path / "a.xy.gz")
    with pytest.raises(ValueError, match="wavelength 'red' must be 0.01 to 10 Å"):
        read_pattern(write(tmp_path, "a.xy"), "red")
    with pytest.warns(UserWarning, match="a.xy: no wavelength in the file: Cu Kα"):
        read_pattern(tmp_path / "a.xy")
    with pytest.warns(UserWarning, match="the file's own wavelength 1.5406 Å is used"):
        read_pattern(write(tmp_path, "a.uxd"), "MoKa")


def test_bombs_stay_small(tmp_path):
    (tmp_path / "bomb.rasx").write_bytes(zipped({"Data0/Profile0.txt": "0" * 300_000_000}))
    (tmp_path / "bomb.brml").write_bytes(zipped({"RawData0.xml": "<a>" * 30_000_000}))
    tracemalloc.start()
    for name in ("bomb.rasx", "bomb.brml"):
        with pytest.raises(ValueError, match=f"{name}: .*unpacks to more than 8 MB"):
            read_pattern(tmp_path / name)
    (tmp_path / "long.brml").write_bytes(zipped({"RawData0.xml": "<a/>"}) + bytes(9 << 20))  # as one with a hundred thousand members
    with pytest.raises(ValueError, match="long.brml: is larger than 8 MB"): read_pattern(tmp_path / "long.brml")
    assert tracemalloc.get_traced_memory()[1] < 250e6
    tracemalloc.stop()


@pytest.mark.parametrize("name, text", {
    "a.ras": "*RAS_DATA_START\n" + "*RAS_INT_START\n" * 500_000, "b.ras": "*RAS_DATA_START\n" + "*RAS_INT_START\n" + "\n" * 5_000_000,
    "a.xrdml": "<xrd>" + "<scan>" * 900_000, "b.xrdml": "<x>" + "<scan><positions axis='2Theta'/>" * 200_000,
    "a.xy": "1 2 " * 20_000 + "\n" + ("7 " * 40_000 + "\n") * 600, "a.cif": "data_x\nloop_\n_pd_meas_counts_total\n" + "1 " * 4_000_000,
}.items(), ids=lambda v: v if len(v) < 9 else "")
def test_what_is_made_to_be_slow_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    code = """import sys, resource; from xxact.patterns import read_pattern; import pymatgen.io.cif
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = memory()
try: read_pattern(sys.argv[1])
except ValueError as e: print(e)
print((memory() - before) / 1024)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, timeout=120)
    said, megabytes = done.stdout.splitlines()
    assert name in said and float(megabytes) < 500, done


def test_names_in_an_archive_are_short(tmp_path):
    (tmp_path / "a.rasx").write_bytes(zipped({"1/" * 30_000 + "Profile0.txt": "1 2\n", "Data0/Profile" + "9" * 60_000 + ".txt": "1 2\n"}))
    with pytest.raises(ValueError, match="a.rasx: no Profile in the archive"): read_pattern(tmp_path / "a.rasx")


@pytest.mark.slow
def test_ten_million_points_are_read(tmp_path):
    path = tmp_path / "long.xy"
    angles = [np.round(5 + 8.5e-6 * np.arange(100_000) + 0.85 * k, 5) for k in range(100)]  # of which about one in seven is the one before
    with path.open("w") as f:
        for k, piece in enumerate(angles):
            f.writelines(f"{x:.5f} {100 + i % 7}\n" for i, x in enumerate(piece, k))
        f.write("89.99999 nan\n")
    tracemalloc.start()
    with pytest.warns(UserWarning, match="1 of 10000001 points are no numbers"): p = read_pattern(path, "CuKa")
    assert tracemalloc.get_traced_memory()[1] < 230e6
    tracemalloc.stop()
    x, place, count = np.unique(np.concatenate(angles), return_inverse=True, return_counts=True)
    i = np.arange(10_000_000)
    y = np.bincount(place, 100 + (i // 100_000 + i % 100_000) % 7) / count
    assert len(x) < 8_600_000
    np.testing.assert_allclose(p.two_theta, x)
    np.testing.assert_allclose(p.intensity, y)


@given(
    st.lists(st.integers(1, 3), min_size=5, max_size=40).flatmap(lambda n: st.permutations(n + [1] * 2 * len(n))),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_repeated_angles_are_averaged_and_what_is_no_number_left_out(times, seed, falling):
    rng = np.random.default_rng(seed)
    angles = 5 + np.arange(len(times)) * 0.1
    x, y = np.repeat(angles, times), rng.random(sum(times))
    mean = [y[x == a].mean() for a in angles]
    lost = rng.integers(0, len(x) + 1, 3)  # places where lines without numbers stand between
    x, y = np.insert(x, lost, np.nan), np.insert(y, lost, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p = as_pattern(x[::-1], y[::-1], "CuKa") if falling else as_pattern(x, y, "CuKa")
    np.testing.assert_allclose(p.two_theta, angles)
    np.testing.assert_allclose(p.intensity, mean)


# ---- from a scan to reflections


def scan(
    wavelength: float = 1.54056, two_theta: tuple[float, float] = (5, 90), n_points: int = 4096, seed: int = 0, **changes: float
) -> tuple[Pattern, torch.Tensor, torch.Tensor]:
    "A rendered pattern of a made-up material, its lines' d-spacings and their intensities with Lorentz-polarisation."
    g = np.random.default_rng(seed)
    d = np.sort(1.1 + 4 * g.random(25) ** 2)[::-1].astype(np.float32)
    r = batch_reflections([(d, (0.2 + g.random(25)).astype(np.float32) * d**-2)])
    m = MEASUREMENTS["ideal"]._replace(**dict(wavelength=wavelength, caglioti_w=0.006, crystallite_size=80.0) | changes)
    drawn = render(r, m, two_theta, n_points, generator=torch.Generator().manual_seed(seed))
    metadata = dict(kalpha2=wavelength * (1 + 2.486e-3)) if changes.get("kalpha2") else {}
    return (
        Pattern(drawn.two_theta.double().numpy(), 1e4 * drawn.intensity[0].double().numpy(), wavelength, metadata),
        r,
        r.intensity * lorentz_polarisation(r.ln_d.exp()),
    )


@pytest.mark.parametrize(
    "changes",
    [{}, dict(kalpha2=0.5), dict(kalpha2=0.5, background=0.2, hump=0.05, counts=1e4), dict(wavelength=0.7, caglioti_w=0.001), dict(wavelength=1.7)],
)
def test_lines_are_found_where_they_are(changes):
    two_theta = (3, 40) if changes.get("wavelength") == 0.7 else (5, 90)
    for seed in range(5):
        p, r, y = scan(two_theta=two_theta, seed=seed, **changes)
        m = to_reflections(p)
        ln_d, found = r.ln_d.double().numpy(), np.log(m.d_spacing)
        alone = np.array([np.sort(np.abs(ln_d - v))[1] > 0.012 for v in ln_d])
        seen = (
            (y > 0.03 * y.max()).numpy()
            & alone
            & (np.log(2 * np.pi) - ln_d < np.log(4 * np.pi * np.sin(np.radians(two_theta[1] / 2 - 0.5)) / p.wavelength))
        )
        assert seen.sum() > 5
        nearest = np.abs(ln_d[seen, None] - found).argmin(1)
        assert np.abs(ln_d[seen] - found[nearest]).max() < 6e-4
        ratio = m.intensity[nearest] / r.intensity[torch.from_numpy(seen)].numpy()
        assert ratio.std() / ratio.mean() < 0.15  # the areas, whatever the wavelength
        strange = np.abs(ln_d[:, None] - found).min(0) > 6e-3
        weight = m.intensity * lorentz_polarisation(torch.from_numpy(m.d_spacing)).numpy()
        assert weight[strange].max(initial=0) < 0.025 * weight.max()


def test_order_and_spacing_of_the_points_do_not_matter():
    p, *_ = scan(n_points=8000, kalpha2=0.5)
    reference = to_reflections(p)
    keep = np.random.default_rng(0).random(8000) > 0.2
    keep[[0, -1]] = True
    for q in (
        as_pattern(p.two_theta[::-1], p.intensity[::-1], p.wavelength, metadata=p.metadata),
        as_pattern(p.two_theta[keep], p.intensity[keep], p.wavelength, metadata=p.metadata),
        as_pattern(4 * np.pi * np.sin(np.radians(p.two_theta / 2)) / p.wavelength, p.intensity, p.wavelength, "q", p.metadata),
    ):
        m, strong = to_reflections(q), reference.intensity > 0.05
        nearest = np.abs(reference.d_spacing[strong, None] - m.d_spacing).argmin(1)
        np.testing.assert_allclose(m.d_spacing[nearest], reference.d_spacing[strong], rtol=3e-4)
        np.testing.assert_allclose(m.intensity[nearest], reference.intensity[strong], rtol=0.1)


def test_the_measured_range_goes_with_the_reflections():
    p, *_ = scan(two_theta=(20, 60))
    np.testing.assert_allclose(to_reflections(p).limits, [ln_q_of(t, p.wavelength) for t in (20, 60)], atol=1e-6)
    p, *_ = scan(two_theta=(2, 140))
    assert to_reflections(p).limits == LN_Q
    hard = as_pattern(np.linspace(50, 90, 2000), np.random.default_rng(0).poisson(100, 2000), 0.4)
    with pytest.raises(ValueError, match="misses the model's range, q = 0.36 to 5.76 Å⁻¹"):
        to_reflections(hard)


@pytest.mark.parametrize("y", [np.full(2000, 7.0), np.zeros(2000), np.arange(2000.0), -np.ones(2000)])
def test_without_a_peak_there_is_nothing_to_see(y):
    with pytest.raises(ValueError, match="no peak|no intensity is above 0"):
        to_reflections(as_pattern(np.linspace(5, 90, 2000), y, "CuKa1"))


def test_counts_below_zero_are_no_obstacle():
    p, *_ = scan(kalpha2=0.5, background=0.2, counts=1e4)
    (place, area), below = find_peaks(p), find_peaks(p._replace(intensity=p.intensity - np.median(p.intensity) * 1.1))
    strong = place[area > 0.1 * area.max()]
    assert np.abs(strong[:, None] - below[0]).min(1).max() < 0.02


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-3, 8e-3), st.floats(0, 0.6), st.floats(5, 60))
def test_kalpha2_is_taken_out_as_it_was_put_in(seed, shift, ratio, low):
    rng, x = np.random.default_rng(seed), np.linspace(low, low + 60, 3000)
    places, heights = rng.uniform(low + 1, low + 60, (20, 1)), rng.exponential(size=(20, 1))
    single = lambda at: (heights * np.exp(-(((at - places) / 0.1) ** 2))).sum(0)
    both = single(x) + ratio * single(np.degrees(2 * np.arcsin(np.sin(np.radians(x / 2)) / (1 + shift))))
    known = np.degrees(2 * np.arcsin(np.sin(np.radians(x / 2)) / (1 + shift) ** 8)) > low  # nearer to the first point, what lies before it is missing
    np.testing.assert_allclose(without_kalpha2(x, both, shift, ratio)[known], single(x)[known], atol=0.01 * single(x).max())


def test_kalpha2_is_weaker_than_kalpha1():
    with pytest.raises(ValueError, match="ratio=1 of Kα2 to Kα1 must be"): without_kalpha2(X, Y, ratio=1.0)


@pytest.mark.parametrize("move", [lambda x, rng: x.round(4), lambda x, rng: x.round(3), lambda x, rng: x + 0.004 * rng.uniform(-1, 1, len(x))])
def test_angles_that_are_not_quite_even_show_no_more_lines(move):
    true, false = [], []
    for seed in range(8):
        rng, even = np.random.default_rng(seed), np.arange(10, 80, 0.0131303)
        places, heights = rng.uniform(15, 75, 10), rng.uniform(100, 1500, (10, 1))
        for x in (even, move(even, rng)):
            y = rng.poisson(60 + (heights * np.exp(-(((x - places[:, None]) / 0.085) ** 2))).sum(0))
            found = find_peaks(as_pattern(x, y.astype(float), 1.5406))[0]
            true.append((np.abs(found[:, None] - places).min(0) < 0.05).sum())
            false.append((np.abs(found[:, None] - places).min(1) > 0.05).sum())
    assert sum(true[1::2]) > 0.95 * sum(true[::2]) and sum(false[1::2]) < 1.3 * sum(false[::2])


@pytest.mark.parametrize("step", [1e-4, 3e-8, 1e-10])
def test_a_scan_over_next_to_nothing_takes_no_memory(step):
    tracemalloc.start()
    to_reflections(as_pattern(20 + step * np.arange(400), 100 + 1000 * np.exp(-(((np.arange(400) - 200) / 8) ** 2)), "CuKa1"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_tubes_are_known_by_their_wavelength():
    p = Pattern(X, Y.astype(float), 1.54184)
    assert abs(tube_lines(p)[0] - 1.54056) < 1e-4 and tube_lines(p)[1] == 2.486e-3
    assert tube_lines(p._replace(wavelength=1.54056)) == (1.54056, 0) and tube_lines(p._replace(wavelength=0.4)) == (0.4, 0)
    assert abs(tube_lines(p._replace(wavelength=0.7093, metadata=dict(kalpha2=0.71359)))[1] - 6.05e-3) < 1e-4
    assert tube_lines(p._replace(wavelength=1.5406), True) == (1.5406, 2.486e-3)
    with pytest.raises(ValueError, match="no tube has a Kα1 of 0.4 Å"): to_reflections(p._replace(wavelength=0.4), strip_kalpha2=True)


def test_kalpha2_is_stripped_where_only_kalpha1_is_named():
    p, *_ = scan(kalpha2=0.5)
    named, bare = to_reflections(p), p._replace(metadata={})
    stripped, kept = to_reflections(bare, strip_kalpha2=True), to_reflections(bare)
    assert len(stripped.d_spacing) == len(named.d_spacing) < len(kept.d_spacing)


def test_a_long_scan_is_averaged_and_a_short_one_is_not():
    p = Pattern(X, Y.astype(float))
    x, y, step = even_grid(p)
    np.testing.assert_allclose(x, X), np.testing.assert_allclose(y, Y)
    x, y, step = even_grid(p, 30)
    assert len(x) <= 30 and abs(y.mean() / Y.mean() - 1) < 0.05 and abs(step - np.ptp(X) / 30) < 1e-9


def test_a_level_below_zero_takes_no_peak_away():
    x = np.linspace(10, 80, 3501)
    y = 50 + sum(1000 * np.exp(-(((x - c) / 0.08) ** 2)) for c in (27.4, 36.1, 54.3)) + np.random.default_rng(0).normal(0, 3, len(x))
    found = [find_peaks(Pattern(x, y - level, WAVELENGTHS["CuKa1"]))[0] for level in (0, 60, 950, 1045)]
    for places in found:
        for c in (27.4, 36.1, 54.3): assert np.abs(places - c).min() < 0.01


def test_files_of_any_format_become_columns(tmp_path, capsys):
    names = ["a.xrdml", "a.brml", "q.csv", "bad.xy", "a.xy"]
    for name in names:
        if name in FILES:
            write(tmp_path, name)
    (tmp_path / "bad.xy").write_text("a story")
    out = tmp_path / "out"
    assert main(["convert", *(str(tmp_path / n) for n in names), "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out.split() == [str(out / n) for n in ("a.xrdml.xy", "a.brml.xy", "q.xy", "a.xy.xy")]  # of one stem, so by their whole names
    assert "bad.xy: no two columns" in said.err and said.err.strip().splitlines()[-1] == "xxact: 1 of 5 files failed"
    assert main(["convert", str(tmp_path / "q.csv"), "--out", str(out)]) == 2 and "q.xy exists already" in capsys.readouterr().err
    p = read_pattern(out / "a.xrdml.xy")
    np.testing.assert_allclose(p.two_theta, X, atol=1e-6), np.testing.assert_array_equal(p.intensity, Y)
    assert (p.wavelength, p.metadata["kalpha2"]) == (1.5406, 1.54439)
    assert main(["convert", str(tmp_path / "q.csv"), "--wavelength", "1.5406", "--out", str(tmp_path / "other")]) == 0
    np.testing.assert_allclose(read_pattern(tmp_path / "other" / "q.xy").two_theta, X, atol=1e-5)
    with pytest.warns(UserWarning, match="own wavelength 1.54184 Å is used"): read_pattern(out / "q.xy", "MoKa")  # assumed, but the angles hang on it


def test_files_of_one_name_are_converted_apart(tmp_path, capsys):
    files = [tmp_path / folder / "a.xy" for folder in ("one", "two")]
    for k, file in enumerate(files):
        file.parent.mkdir()
        np.savetxt(file, np.c_[X, Y + k])
    assert main(["convert", *map(str, files), "--wavelength", "CuKa", "--out", str(tmp_path / "out")]) == 0
    for k, name in enumerate(("one_a.xy.xy", "two_a.xy.xy")):
        np.testing.assert_array_equal(read_pattern(tmp_path / "out" / name).intensity, Y + k)


@pytest.mark.parametrize("at", [5, 20, 150])
@pytest.mark.filterwarnings("ignore:2 ranges that overlap")
def test_a_step_back_is_put_in_order(at):
    x, y = X.copy(), Y.astype(float)
    x[[at, at + 1]], y[[at, at + 1]] = x[[at + 1, at]], y[[at + 1, at]]
    with pytest.warns(UserWarning, match="2 ranges that overlap are joined"): p = as_pattern(x, y, "CuKa")
    np.testing.assert_array_equal(p.two_theta, X), np.testing.assert_array_equal(p.intensity, Y)
    again = np.append(x, X), np.append(y, Y + 1)  # and the whole scan once more
    with pytest.warns(UserWarning, match="the first of 2 scans is read"): p = as_pattern(*again, "CuKa")
    np.testing.assert_array_equal(p.two_theta, X), np.testing.assert_array_equal(p.intensity, Y)


def test_masked_points_are_left_out():
    angles = np.ma.masked_inside(X, 11, 12)
    with pytest.warns(UserWarning) as told: p = as_pattern(angles, Y, "CuKa")
    assert "are no numbers and are left out" in str(told[0].message) and "there are no points between" in str(told[1].message)
    np.testing.assert_array_equal(p.two_theta, angles.compressed())
    for bad in ({}, ["a"] * 20, [[1], [2, 3]]):
        with pytest.raises(ValueError, match="two columns"): as_pattern(bad, bad, "CuKa")


def test_angles_that_are_rather_q_are_told(tmp_path):
    np.savetxt(tmp_path / "a.xy", np.c_[4 * np.pi * np.sin(np.radians(X / 2)) / 1.5406, Y])
    with pytest.warns(UserWarning, match="a.xy: 2θ ends at .*; if the column is q or d, give the unit"): read_pattern(tmp_path / "a.xy", "CuKa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pattern(tmp_path / "a.xy", "CuKa", "q"), read_pattern(tmp_path / "a.xy", "MoKa"), read_pattern(tmp_path / "a.xy", "CuKa", "two_theta")


def test_a_row_that_is_cut_is_told(tmp_path):
    file = tmp_path / "cut.uxd"
    file.write_text(FILES["b.uxd"][: FILES["b.uxd"].rindex(" ")])
    with pytest.raises(ValueError, match="cut.uxd: is cut off or damaged"): read_pattern(file)


@pytest.mark.parametrize("text, reason", {
    "10.0,908\n" * 5 + "10.5,1,130\n" * 5: "line 6 has not 2 columns",
    "2Theta;Int\n" + "29,5;908\n" * 5 + "30,0;1.130\n" * 9: "with points and with commas",
    "".join(f"{10 + i / 2:.3f}\t1,{100 + i}\n" for i in range(50)): "with points and with commas",
    "".join(f"{10 + i // 2},{50 * (i % 2):02d},{i},1\n" for i in range(90)): "different angles",
    "10 0.5 60\n" + rows("{:.2f} {}\n"): "line 2 has not 3 columns",
    "Energy (keV),Counts\n" + rows("{:.2f},{}\n"): "the columns are named 'Energy",
    "2Theta (rad),I\n" + rows("{:.2f},{}\n"): "2θ in degrees",
    "1 2 " * 60_000: "a line of 100,000 characters",
    **{f"{title}\n" + rows("{:.2f} {}\n"): "the columns are named" for title in ("#  r_mm   I", "r (mm)  I", "# d*2_A^-2  I", "radius\tI")},
}.items())  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_read_wrongly_in_silence(tmp_path, text, reason):
    path = tmp_path / "odd.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"odd.csv: .*{reason}"):
        read_pattern(path)


TABLE = list(zip(X, Y))


@pytest.mark.parametrize("text", {
    "excel": '\ufeff"2Theta","Intensity"\r\n' + rows('"{:.2f}","{}"\r\n'),
    "index": ",0,1\n" + "".join(f"{i},{x:.2f},{y}\n" for i, (x, y) in enumerate(TABLE)),
    "both": "Theta,2Theta,Intensity\n" + "".join(f"{x / 2:.2f},{x:.2f},{y}\n" for x, y in TABLE),
    "comments": rows("{:.2f} {}\n").replace("11.00", "% pause\n11.00"),
    "tabs": rows("\t{:.2f}\t\t{}\t\n"),
    "whole first": rows("{:.2f} {}\n").replace("10.00 ", "10 ").replace(".", ","),
    "thousands": '2theta,counts\n' + rows('{:.2f},"0,{:03d}"\n'),
    "quoted decimal commas": "".join(f'"{x:.2f}"'.replace(".", ",") + f',"{y},0"\n' for x, y in TABLE),
    "words with one blank": "2 theta   Ycalc   Yobs\n" + rows("{:.2f} 7 {}\n"),
    "spec": "#L TwoTheta  Epoch  Detector\n" + rows("{:.2f} 7 {}\n"), "pixels": "2theta pixels\tI_radius\n" + rows("{:.2f}\t{}\n"),
    "pixel and angle": "Pixel,2Theta,Intensity\n" + "".join(f"{i},{x:.2f},{y}\n" for i, (x, y) in enumerate(TABLE)),
    **{words: f"# {words}\n" + rows("{:.2f} {}\n") for words in ("Time: 1s", "omega coupled", "Sample A-1", "Sample Q", "run 1/a")},
    "dos": rows("{:.2f} {}\r\n") + "\x1a",
    "fit2d": "frame_0001.tif\n2-Theta Angle (Degrees)\nIntensity\n  " + f"{len(X)} 1\n" + rows("{:.2f} {}\n"),
}.values())  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_what_people_export_is_read(tmp_path, text):
    path = tmp_path / "export.txt"
    path.write_text(text)
    p = read_pattern(path)
    np.testing.assert_allclose(p.two_theta, X, atol=1e-6), np.testing.assert_array_equal(p.intensity, Y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line, wavelength, kalpha2", [
    ("Wavelength (nm) = 0.154056", 1.54056, None), ("wavelength: 0.4 A", 0.4, None), ("K-Alpha1 wavelength,1.78901", 1.78901, None),
    ("WAVE_LENGTH = 0.71073", 0.71073, None), ("K-Alpha2 wavelength 1.54439\n# K-Alpha1 wavelength 1.54056", 1.54056, 1.54439),
    ("wavelength 1.54056 1.54439", 1.54056, 1.54439), ("Anode material,Co", 1.79026, None), ("lambda = 1.5406e-10 m", 1.5406, None),
    ("λ = 0.7093 Å", 0.7093, None), ("wavelength_range: 0.50 - 2.00", 1.54184, None), ("Radiation: Mo Ka", 0.71073, None),
    ("Energy = 17.48 keV", 12.39842 / 17.48, None), ("energy (eV): 30000", 12.39842 / 30, None), ("photon energy=15keV", 12.39842 / 15, None),
    ("Threshold energy: 8 keV", 1.54184, None), ("Anode: Co\n# Energy discriminator: 5.0 - 11.0 keV", 1.79026, None),
    ("Anode: Co\n# Energy 9.5 keV", 1.79026, None), ("electron energy 8 GeV, 40 keV", 1.54184, None),
    ('{\n#     "poni1": 0.1,\n#     "wavelength": 4.133e-11\n# }', 0.4133, None), ('{"dist": 0.2, "wavelength": 1e-10}', 1.0, None),
    ("E = 30.0 keV", 12.39842 / 30, None), ("ring energy 3 GeV, photon energy: 30 keV, 200 mA", 12.39842 / 30, None),
    ("energy = 30 keV, edge energy = 7.112 keV", 12.39842 / 30, None), ("Energy (keV), 20.0", 12.39842 / 20, None),
    ("Energy, 20 keV", 12.39842 / 20, None), ("wavelength [1e-10m]: 0.7", 0.7, None), ("lambda tolerance 1e-10", 1.54184, None),
    *((words, 1.54184, None) for words in ("Detector threshold, E = 8 keV", "Storage ring, energy 6 keV",
                                           "Delta E = 10 keV", "scan E: 10 keV to 20 keV", "edge E = 11.1 keV")),
    ('{"detector": "Eiger", "dist": 0.2, "wavelength": 4.133e-11}', 0.4133, None), ("wavelength (x1e-10 m) = 1.5406", 1.5406, None),
])  # fmt: skip
def test_the_header_says_the_wavelength(tmp_path, line, wavelength, kalpha2):
    path = tmp_path / "a.xy"
    path.write_text(f"# {line}\n" + rows("{:.2f} {}\n"))
    p = read_pattern(path)
    assert abs(p.wavelength - wavelength) < 1e-9 and p.metadata.get("kalpha2") == kalpha2


@pytest.mark.parametrize("mark", [0.0, -1.0, -10.0])
def test_gaps_of_a_detector_are_told(mark):
    r, g = batch_reflections([reflections(np.eye(3) * 4.0, [[0, 0, 0]], [55])]), torch.Generator().manual_seed(0)
    x, y = (t.squeeze().double().numpy() for t in render(r, Measurement(background=0.2, counts=1e4), generator=g)[:2])
    gaps = np.abs((x - 12.5) % 10) < 0.1
    y = np.where(gaps, mark, y + 0.2)
    with pytest.warns(UserWarning, match=f"{gaps.sum()} points are {mark:g}, far below all others: make them NaN"): as_pattern(x, y, "CuKa")
    with pytest.warns(UserWarning, match="no numbers") as said: as_pattern(x, np.where(gaps, np.nan, y), "CuKa")
    assert len(said) == 1


@pytest.mark.parametrize("y", {
    "low counts": np.random.default_rng(0).poisson(2, 2000), "rounded": np.round(20 * np.exp(-(((np.arange(2000) % 200 - 100) / 60) ** 2))),
    "stripped": np.random.default_rng(0).normal(0, 1, 2000).clip(0) + 50 * (np.arange(2000) % 300 < 9), "sticks": 9.0 * (np.arange(2000) % 200 == 0),
    "one zero": np.arange(2000) % 500 + np.r_[0, np.full(1999, 100)], "constant": np.zeros(2000),
    "small multiples": 7.0 * (1 + np.random.default_rng(0).poisson(9, 2000)) * (np.arange(2000) % 400 > 9),
    "fading": np.exp(-np.arange(2000) / 200) * (np.arange(2000) < 1900),
}.values())  # fmt: skip
def test_zeros_that_are_intensities_are_not_told(y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_pattern(np.linspace(5, 90, 2000), y, "CuKa")


@pytest.mark.parametrize("where", [0, 200, 399])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_d_spacing_of_nothing_is_refused(where, value):
    d = np.linspace(10, 1, 400)
    d[where] = value
    with pytest.raises(ValueError, match=f"d from {value:g} to .* is not in reach"): as_pattern(d, np.arange(400) + 5.0, 1.54184, "d")


@pytest.mark.parametrize("data", [b"\x89HDF\r\n\x1a\n" + bytes(99), b"\x93NUMPY\x01\0" + bytes(99)])
def test_arrays_in_files_are_told(data, tmp_path):
    (tmp_path / "scan.h5").write_bytes(data)
    with pytest.raises(ValueError, match="scan.h5: is HDF5 or NumPy; give its arrays to `as_pattern`"): read_pattern(tmp_path / "scan.h5")


def test_noise_is_no_peak():
    x, g = np.linspace(5, 90, 4000), np.random.default_rng(0)
    for counts in (100, 1000, 10_000):
        with pytest.raises(ValueError, match="no peak stands out of the noise"):
            find_peaks(as_pattern(x, g.poisson(counts, 4000), "CuKa1"))


@pytest.mark.parametrize("name, old, new", [
    ("a.ras", "*RAS_INT_START", '*MEAS_SCAN_AXIS_X "Omega"\n*RAS_INT_START'), ("a.asc", "*STEP", "*SCAN_AXIS = Phi\n*STEP"),
    ("a.uxd", "_START", "_DRIVE='THETA'\n_START"),
])  # fmt: skip
def test_scans_over_other_axes_are_refused(tmp_path, name, old, new):
    (tmp_path / name).write_text(FILES[name].replace(old, new, 1))
    with pytest.raises(ValueError, match=f"{name}: a scan over .*; one over 2θ is needed"):
        read_pattern(tmp_path / name)


def test_kbeta_in_a_cif_is_not_the_wavelength(tmp_path):
    lines = "loop_\n_diffrn_radiation_wavelength\n1.54439\n1.5406\n1.39222\n"
    (tmp_path / "a.cif").write_text(FILES["a.cif"].replace("_diffrn_radiation_wavelength 1.5406\n", lines))
    p = read_pattern(tmp_path / "a.cif")
    assert (p.wavelength, p.metadata["kalpha2"]) == (1.5406, 1.54439)


def test_a_monochromator_has_an_angle():
    with pytest.raises(ValueError, match="monochromator=nan must be within 0 to 180"):
        to_reflections(as_pattern(X, Y, "CuKa"), monochromator=float("nan"))


@pytest.mark.parametrize(("line", "wavelength"), [("# Co tube, Fe filter", 1.79026), ("# filter Ni 0.5 lambda 1.5406", 1.5406),
                                                  ("# Kalpha1=1.54056 Kalpha2=1.54439", 1.54056), ("# lambda detector 2.5 mm", 1.54184),
                                                  ("# wavelength selector 2.50 mm slit", 1.54184), ("# nm-sized; wavelength 0.7093", 0.7093),
                                                  ("# wavelength 0.7093 (step 0.02)", 0.7093),
                                                  ("# wavelength = 0.050000 Å", 0.05)])  # fmt: skip
def test_a_filter_or_a_detector_is_no_tube(tmp_path, line, wavelength):
    (tmp_path / "a.xy").write_text(line + "\n" + "".join(f"{x:.2f} {5 + x % 7:.1f}\n" for x in np.arange(10, 80, 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert abs(read_pattern(tmp_path / "a.xy").wavelength / wavelength - 1) < 2e-3


@pytest.mark.parametrize("title", ["Wavevector Q (A-1),Int", "Wave vector\tI", "Q / \\AA^-1\tcounts", "Momentum transfer\tI", "Q\tI\nA^-1\ta.u.",
                                   "Ni.chi\nQ (A^-1)\nIntensity\n   800", "Ni.chi\nQ Space (Inverse Angstroms)\nIntensity\n   800"])  # fmt: skip
def test_an_abscissa_that_is_q_in_any_words(tmp_path, title):
    q = np.linspace(0.5, 6, 800)
    (tmp_path / "a.dat").write_text(title + "\n" + "".join(f"{x:.4f}\t{10 + 100 * np.exp(-(((x - 2) / 0.02) ** 2)):.3f}\n" for x in q))
    with pytest.warns(UserWarning, match="column 1 is taken for q in Å⁻¹"): p = read_pattern(tmp_path / "a.dat", "CuKa1")
    if "Int" not in title and "\tI" not in title:  # a guess, which who knows better overrules
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_pattern(tmp_path / "a.dat", "CuKa1", "two_theta").two_theta[-1] == 6
    assert abs(p.two_theta[-1] - np.degrees(2 * np.arcsin(6 * 1.54056 / (4 * np.pi)))) < 0.01


def test_a_scan_that_stands_still_in_two_theta_is_passed_over(tmp_path):
    at = '<positions axis="2Theta"><commonPosition>30</commonPosition></positions>'
    still = f"<scan><dataPoints>{at}<intensities>1 2 3</intensities></dataPoints></scan>"
    whole = FILES["a.xrdml"]
    (tmp_path / "two.xrdml").write_text(re.sub("(<scan)", still + r"\1", whole, count=1)), (tmp_path / "a.xrdml").write_text(whole)
    two, one = read_pattern(tmp_path / "two.xrdml"), read_pattern(tmp_path / "a.xrdml")
    np.testing.assert_array_equal(two.two_theta, one.two_theta), np.testing.assert_array_equal(two.intensity, one.intensity)
    (tmp_path / "still.xrdml").write_text(f"<xrd>{still}</xrd>")
    with pytest.raises(ValueError, match="no scan over 2Theta"): read_pattern(tmp_path / "still.xrdml")


def test_kalpha2_is_not_taken_out_of_what_has_none():
    x = np.arange(30, 90, 0.02)
    lines = sum(h * np.exp(-4 * np.log(2) * ((x - at) / 0.1) ** 2) for at, h in ((40, 500), (66, 900), (75.3, 1000), (84.1, 800)))
    second = sum(h * np.exp(-4 * np.log(2) * ((x - np.degrees(2 * np.arcsin(1.002486 * np.sin(np.radians(at / 2))))) / 0.1) ** 2)
                 for at, h in ((40, 250), (66, 450), (75.3, 500), (84.1, 400)))  # fmt: skip
    for y in (lines, lines + second):
        at, area = find_peaks(as_pattern(x, y + 50, "CuKa"))
        np.testing.assert_allclose(at[area > 0.05 * area.max()], [40, 66, 75.3, 84.1], atol=0.02)


def test_the_second_half_of_a_line_has_none_of_its_own():
    x = np.arange(20, 140, 0.02)  # with chromium the halves lie so far apart that the last is a line by itself
    angle = lambda d, shift: np.degrees(2 * np.arcsin(WAVELENGTHS["CrKa"] / (1 + 1.7e-3 / 3) * (1 + shift) / 2 / d))
    peak = lambda at: np.exp(-4 * np.log(2) * ((x - at) / 0.3) ** 2)
    silicon = 5.431 / np.sqrt([3, 8, 11, 16, 19])
    y = 50 + 1e4 * sum(h * (peak(angle(d, 0)) + peak(angle(d, 1.7e-3)) / 2) for d, h in zip(silicon, (1, 0.9, 0.6, 0.2, 0.5)))
    found = to_reflections(as_pattern(x, y, "CrKa"))
    np.testing.assert_allclose(found.d_spacing[found.intensity > 0.02], silicon, rtol=2e-4)


@pytest.mark.parametrize("title", ["q (nm^-1) intensity", "# q (nm^-1)  intensity", "q [nm-1]\tI", "Q (1/nm)   Intensity (a.u.)"])
def test_a_unit_may_stand_apart_from_its_name(title, tmp_path):
    between = "\t" if "\t" in title else " "
    (tmp_path / "a.dat").write_text(f"{title}\n" + "".join(f"{1 + 0.02 * i:.2f}{between}{i % 7}\n" for i in range(2000)))
    p = read_pattern(tmp_path / "a.dat", wavelength=0.18)
    assert abs(p.two_theta[-1] - np.degrees(2 * np.arcsin(4.098 * 0.18 / (4 * np.pi)))) < 1e-6


def test_points_below_zero_are_left_out_with_a_word():
    x = np.arange(-15, 70, 0.02)
    with pytest.warns(UserWarning, match="750 points below 2θ = 0 are left out"): p = as_pattern(x.round(2), np.ones(len(x)), "CuKa")
    assert len(p.two_theta) == len(x) - 751  # and that at 0


def test_infinite_numbers_are_points_that_are_not_known(tmp_path):
    (tmp_path / "a.xy").write_text("".join(f"{10 + 0.02 * i:.2f} {'inf' if i < 10 else i % 7}\n" for i in range(3000)))
    with pytest.warns(UserWarning, match="10 of 3000"): read_pattern(tmp_path / "a.xy", "CuKa")


@pytest.mark.parametrize("call, message", [
    (lambda p: to_reflections("scan.xy"), "a Pattern is needed, as `read_pattern` returns it, not a str"),
    (lambda p: to_reflections(p, strip_kalpha2="keep"), "strip_kalpha2='keep' must be None, True or False")])
def test_what_is_no_pattern_or_setting(call, message):
    with pytest.raises(ValueError, match=message): call(as_pattern(X, Y, "CuKa"))


def test_a_line_that_is_named_without_a_number_is_one_warning(tmp_path):
    (tmp_path / "a.xy").write_text("# Mo Kalpha radiation\n" + rows("{:.2f} {}\n"))
    with pytest.warns(UserWarning) as said: read_pattern(tmp_path / "a.xy")
    assert ["Mo is named" in str(w.message) for w in said] == [True]


def test_a_word_in_a_comment_is_a_hint_that_an_argument_overrules(tmp_path):
    rows = "\n".join(f"{5 + 0.02 * i:.2f} {i % 7}" for i in range(3000))
    (tmp_path / "a.xy").write_text(f"# Fe anode after 10 cycles\n{rows}\n")
    with pytest.warns(UserWarning, match="Fe is named: its Kα is taken"): assert read_pattern(tmp_path / "a.xy").wavelength == WAVELENGTHS["FeKa"]
    assert read_pattern(tmp_path / "a.xy", "CuKa").wavelength == WAVELENGTHS["CuKa"]
    (tmp_path / "b.xy").write_text(f"data_monday\n{rows}\n")
    assert len(read_pattern(tmp_path / "b.xy", "CuKa").two_theta) == 3000


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.xy", "5" * 99_000 + "x 1\n", "no two columns"),
    ("b.uxd", "_FILEVERSION=1\n_START=5\n_STEPSIZE=0.02\n_COUNTS\n" + "\n" * 100_000 + "1 2 3\n", "only 3 points"),
    ("c.xrdml", f'<a xmlns="{"u" * 2000}">' + "".join(f"<b{i}/>" for i in range(2000)) + "</a>", "namespace"),
])
def test_what_would_take_a_parser_forever_is_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said): read_pattern(tmp_path / name, "CuKa")
