"""Checks of `xxact.download` against a real server on the loopback address, which cuts connections, lies and fails as told."""

import bz2
import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from xxact import download as D

BODY = bytes(range(251)) * 4000  # a million bytes; with a period of 251, blocks at the wrong place do not fit
HALF = len(BODY) // 2
QUICK = dict(wait=0.001, progress=False)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        site = self.server.site
        self.asked = dict(path=self.path, range=self.headers.get("Range"), if_range=self.headers.get("If-Range"), sent=0, **{"headers": self.headers})
        site.asked.append(self.asked)
        self.close_connection = True
        try: (site.plan.pop(0) if site.plan else serve)(self)
        except (BrokenPipeError, ConnectionResetError): pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "Connection": "close"} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            if value is not None: self.send_header(name, str(value))
        self.end_headers()
        self.send(body)

    def send(self, body):
        self.wfile.write(body)
        self.wfile.flush()
        self.asked["sent"] += len(body)

    def log_message(self, *args): pass


class Site:
    "Files by path, what to do with the next requests, and a record of them."

    def __init__(self):
        self.files, self.plan, self.asked = {"/file.bin": BODY}, [], []
        self.etag = self.date = None  # None: made from the file; "": not sent
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.site = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()

    def mark(self, body):
        etag = f'"{hashlib.md5(body).hexdigest()}"' if self.etag is None else self.etag
        return {k: v for k, v in (("ETag", etag), ("Last_Modified", self.date or "")) if v}


def pieces(handler, ranges=True):
    "Status, headers and body of an honest answer; None where there is no such file."
    site = handler.server.site
    body = site.files.get(handler.path)
    if body is None: return None
    mark, asked = site.mark(body), handler.asked
    if not ranges or not asked["range"] or asked["if_range"] not in (None, *mark.values()): return 200, mark, body
    start = int(asked["range"].removeprefix("bytes=").removesuffix("-"))
    if start >= len(body): return 416, {"Content_Range": f"bytes */{len(body)}"}, b""
    return 206, mark | {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, body[start:]


def serve(handler, ranges=True):
    found = pieces(handler, ranges)
    if found is None: return handler.answer(404)
    status, headers, body = found
    handler.answer(status, body, **headers)


def cut(after, ranges=True):
    "Announce everything, send so many bytes, hang up."
    def behave(handler):
        status, headers, body = pieces(handler, ranges)
        handler.answer(status, **headers | {"Content_Length": len(body)})
        handler.send(body[:after])
    return behave


def say(status, body=b"", **headers): return lambda handler: handler.answer(status, body, **headers)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


def get(site, path, name="file.bin", **options):
    return D.fetch(f"{site.url}/{name}", path, **QUICK | options)


def is_whole(path, entry, body=BODY):
    "The file is there, so is its line in the manifest, and nothing else is left."
    assert path.read_bytes() == body
    assert (entry["bytes"], entry["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert D.read_manifest(path.parent)[path.name] == entry
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "manifest.jsonl"])


# --- one file ---------------------------------------------------------------------------------------------------------------------


def test_plain(site, tmp_path):
    path = tmp_path / "raw/deep/file.bin"
    entry = get(site, path, sha256=hashlib.sha256(BODY).hexdigest(), bytes=len(BODY))
    is_whole(path, entry)
    assert entry["url"] == f"{site.url}/file.bin" and entry["date"][:2] == "20" and "note" not in entry
    assert site.asked[0]["range"] is None and site.asked[0]["headers"]["Accept-Encoding"] == "identity"


def test_good_file_is_not_fetched_again(site, tmp_path):
    path = tmp_path / "file.bin"
    entry, before = get(site, path), path.stat().st_mtime_ns
    assert get(site, path) == entry and len(site.asked) == 1 and path.stat().st_mtime_ns == before


def test_cut_and_resumed(site, tmp_path):
    site.plan = [cut(HALF)]
    entry = get(site, tmp_path / "file.bin")
    is_whole(tmp_path / "file.bin", entry)
    first, second = site.asked
    assert first["range"] is None and first["sent"] == HALF
    assert second["range"] == f"bytes={HALF}-" and second["if_range"] and second["sent"] == len(BODY) - HALF


def test_a_line_that_breaks_often_but_gets_on(site, tmp_path):
    site.plan = [cut(70_000)] * 12
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin", retries=1))
    assert sum(a["sent"] for a in site.asked) == len(BODY)


def test_goes_on_in_a_later_call(site, tmp_path):
    site.plan = [cut(HALF)]
    with pytest.raises(D.DownloadFailed, match="by hand"): get(site, tmp_path / "file.bin", retries=0)
    assert not (tmp_path / "file.bin").exists() and (tmp_path / "file.bin.part").stat().st_size == HALF
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert site.asked[1]["sent"] == len(BODY) - HALF


def test_weak_etag_is_no_mark_but_the_date_is(site, tmp_path):
    site.etag, site.date, site.plan = 'W/"1"', formatdate(0, usegmt=True), [cut(HALF)]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert site.asked[1]["if_range"] == site.date and site.asked[1]["sent"] == len(BODY) - HALF


def test_without_any_mark_it_starts_afresh(site, tmp_path):
    site.etag, site.plan = "", [cut(HALF)]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert site.asked[1]["range"] is None


def test_server_without_ranges(site, tmp_path):
    site.plan = [cut(HALF, ranges=False), lambda handler: serve(handler, ranges=False)]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert site.asked[1]["range"] and site.asked[1]["sent"] == len(BODY)


@pytest.mark.parametrize("heeds", [True, False], ids=["If-Range heeded", "If-Range ignored"])
def test_file_changed_between_attempts(site, tmp_path, heeds):
    new = BODY[::-1]

    def changed(handler):
        site.files["/file.bin"] = new
        if not heeds: handler.asked["if_range"] = None
        serve(handler)

    site.plan = [cut(HALF), changed]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"), new)


def test_part_of_another_address_is_not_built_on(site, tmp_path):
    site.files["/other.bin"], site.etag, site.plan = BODY[::-1], '"the same"', [cut(HALF)]
    with pytest.raises(D.DownloadFailed): get(site, tmp_path / "file.bin", retries=0)
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin", "other.bin"), BODY[::-1])


def test_part_that_is_whole_already(site, tmp_path):
    site.plan = [cut(HALF)]
    with pytest.raises(D.DownloadFailed): get(site, tmp_path / "file.bin", retries=0)
    (tmp_path / "file.bin.part").write_bytes(BODY)
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert len(site.asked) == 1


def test_part_that_is_too_long(site, tmp_path):
    site.plan = [cut(HALF)]
    with pytest.raises(D.DownloadFailed): get(site, tmp_path / "file.bin", retries=0)
    (tmp_path / "file.bin.part").write_bytes(BODY + b"more")
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))  # 416, then afresh


def test_chunked_without_length(site, tmp_path):
    def chunked(complete):
        def behave(handler):
            handler.answer(200, Content_Length=None, Transfer_Encoding="chunked", ETag='"1"')
            handler.send(b"%x\r\n%s\r\n" % (HALF, BODY[:HALF]))
            if complete: handler.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY) - HALF, BODY[HALF:]))
        return behave

    site.plan = [chunked(False), chunked(True)]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))


def test_redirect(site, tmp_path):
    site.plan = [say(302, Location="/file.bin")]
    entry = get(site, tmp_path / "file.bin", "elsewhere")
    is_whole(tmp_path / "file.bin", entry)
    assert entry["url"].endswith("/elsewhere")


# --- servers that lie -------------------------------------------------------------------------------------------------------------


def too_short(handler): handler.answer(200, Content_Length=len(BODY) + 1000, ETag='"1"'); handler.send(BODY)
def begins_elsewhere(handler): handler.answer(206, BODY[HALF - 7 :], Content_Range=f"bytes {HALF - 7}-{len(BODY) - 1}/{len(BODY)}")
def says_half_sends_else(handler): handler.answer(206, BODY[:HALF], Content_Range="bytes 0-1/2")
def another_total(handler): handler.answer(206, BODY[HALF:], Content_Range=f"bytes {HALF}-{len(BODY) - 1}/{len(BODY) + 5}")
def no_content_range(handler): handler.answer(206, BODY[HALF:])


@pytest.mark.parametrize("lie", [begins_elsewhere, says_half_sends_else, another_total, no_content_range])
def test_lie_about_the_range(site, tmp_path, lie):
    site.plan = [cut(HALF), lie]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert site.asked[2]["range"] is None


def test_lie_about_the_length(site, tmp_path):
    site.plan = [too_short]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))


def test_lie_for_ever(site, tmp_path):
    site.plan = [too_short, say(416)] * 20
    with pytest.raises(D.DownloadFailed, match="did not come"): get(site, tmp_path / "file.bin", retries=3)
    assert not (tmp_path / "file.bin").exists() and len(site.asked) < 8


@pytest.mark.parametrize("published", [dict(bytes=len(BODY) + 1), dict(sha256="0" * 64)], ids=["bytes", "sha256"])
def test_not_as_published(site, tmp_path, published):
    with pytest.raises(D.DownloadFailed, match="published"): get(site, tmp_path / "file.bin", retries=2, **published)
    assert list(tmp_path.iterdir()) == [] and len(site.asked) == 3


def test_once_not_as_published(site, tmp_path):
    site.plan = [say(200, BODY[::-1])]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin", sha256=hashlib.sha256(BODY).hexdigest()))


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_web_page(site, tmp_path, kind):
    site.plan = [say(200, b"\n <!DOCTYPE html><html>please log in</html>", Content_Type=kind)]
    with pytest.raises(D.DownloadFailed, match="web page"): get(site, tmp_path / "file.csv")
    assert list(tmp_path.iterdir()) == [] and len(site.asked) == 1


def test_web_page_in_place_of_the_rest(site, tmp_path):
    site.plan = [cut(HALF), say(200, b"<html></html>", Content_Type="text/html")]
    with pytest.raises(D.DownloadFailed, match="web page"): get(site, tmp_path / "file.bin")
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin"))
    assert site.asked[2]["sent"] == len(BODY) - HALF  # what had arrived was kept


@pytest.mark.parametrize("content, reason", [(b"", "empty"), (b"plain", "not a .bz2")])
def test_wrong_content(site, tmp_path, content, reason):
    site.files["/a.json.bz2"] = content
    with pytest.raises(D.DownloadFailed, match=reason): get(site, tmp_path / "a.json.bz2", "a.json.bz2")
    assert list(tmp_path.iterdir()) == []


def test_compressed_though_asked_not_to(site, tmp_path):
    site.plan = [say(200, BODY, Content_Encoding="gzip")]
    with pytest.raises(D.DownloadFailed, match="gzip"): get(site, tmp_path / "file.bin")


# --- servers that fail ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch):
    taken = []
    monkeypatch.setattr(D.time, "sleep", taken.append)
    return taken


def test_retry_after(site, tmp_path, pauses):
    site.plan = [say(503, Retry_After="7"), say(429, Retry_After=formatdate(time.time() + 100, usegmt=True)), say(503, Retry_After="soon")]
    is_whole(tmp_path / "file.bin", get(site, tmp_path / "file.bin", wait=1.0))
    assert pauses[0] == 7 and 2 < pauses[1] <= 100 and pauses[2] == 4 and len(site.asked) == 4


def test_unavailable_for_ever(site, tmp_path, pauses):
    site.plan = [say(503)] * 99
    path = tmp_path / "sub/file.bin"
    with pytest.raises(D.DownloadFailed) as e: get(site, path, wait=1.0)
    assert f"fetch {site.url}/file.bin by hand and save it as {path}" in str(e.value) and "503" in str(e.value) and "\n" not in str(e.value)
    assert pauses == [1, 2, 4, 8, 16] and len(site.asked) == 6 and list(path.parent.iterdir()) == []


def test_asked_to_come_back_tomorrow(site, tmp_path, pauses):
    site.plan = [say(503, Retry_After="86400")]
    with pytest.raises(D.DownloadFailed, match="86400 s"): get(site, tmp_path / "file.bin")
    assert pauses == []


@pytest.mark.parametrize("status", [403, 404, 410, 204])
def test_not_there(site, tmp_path, status):
    site.plan = [say(status)]
    with pytest.raises(D.DownloadFailed, match=str(status)) as e: get(site, tmp_path / "file.bin")
    assert e.value.status == status and len(site.asked) == 1 and str(tmp_path / "file.bin") in str(e.value)


def test_a_server_that_falls_silent(site, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "TIMEOUT", 0.2)
    release = threading.Event()

    def stall(handler): cut(HALF)(handler); release.wait(60)

    site.plan = [stall]
    entry = get(site, tmp_path / "file.bin")
    release.set()
    is_whole(tmp_path / "file.bin", entry)
    assert site.asked[1]["range"] == f"bytes={HALF}-"


def test_unreachable(site, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed: port = closed.server_port
    with pytest.raises(D.DownloadFailed, match="by hand"): D.fetch(f"http://127.0.0.1:{port}/a.csv", tmp_path / "a.csv", retries=1, **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["", "example.org/a", "ftp://example.org/a", "http:///a", "http://a:b/"])
def test_no_address(tmp_path, url):
    with pytest.raises(ValueError, match="not an address"): D.fetch(url, tmp_path / "a", **QUICK)


# --- files that are there ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [BODY[:-1], BODY[:-1] + b"?"], ids=["short", "same length"])
def test_damaged_file_is_not_touched(site, tmp_path, damage):
    path = tmp_path / "file.bin"
    get(site, path)
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="move it away"): get(site, path)
    assert path.read_bytes() == damage and len(site.asked) == 1
    path.unlink()
    is_whole(path, get(site, path))


def test_file_put_there_by_hand(site, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(BODY)
    entry = get(site, path, bytes=len(BODY))
    is_whole(path, entry)
    assert entry["note"] == "put there by hand" and site.asked == []


@pytest.mark.parametrize("content, reason", [(b"<html>404</html>", "web page"), (b"", "empty"), (b"PK\x03\x04", "not a .bz2")])
def test_wrong_file_put_there_by_hand(site, tmp_path, content, reason):
    path = tmp_path / "a.json.bz2"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason): get(site, path)
    assert path.read_bytes() == content and not (tmp_path / "manifest.jsonl").exists()


def test_file_by_hand_not_as_published(site, tmp_path):
    (tmp_path / "file.bin").write_bytes(BODY)
    with pytest.raises(ValueError, match="published"): get(site, tmp_path / "file.bin", sha256="0" * 64)


@pytest.mark.parametrize("line", ["{", "3", "[]", '{"file": "a"}', "\u00e4"])
def test_damaged_manifest(site, tmp_path, line):
    get(site, tmp_path / "file.bin")
    with open(tmp_path / "manifest.jsonl", "a") as f: f.write(line + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged"): get(site, tmp_path / "file.bin")


# --- disks and processes ----------------------------------------------------------------------------------------------------------


def test_full_disk(site, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"

    def small_disk(name, mode="r", **options):
        f = open(name, mode, **options)
        if str(name).endswith(".bin.part") and mode != "rb":
            write = f.write

            def limited(data):
                if f.tell() + len(data) > HALF: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(data)

            f.write = limited
        return f

    other = get(site, tmp_path / "other/file.bin")
    monkeypatch.setattr(D, "open", small_disk, raising=False)
    with pytest.raises(OSError, match="No space left") as e: get(site, path)
    assert e.value.errno == errno.ENOSPC and str(path) in str(e.value) and not path.exists()
    is_whole(tmp_path / "other/file.bin", other)
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    entry = get(site, path)
    assert path.read_bytes() == BODY and D.read_manifest(tmp_path)["file.bin"] == entry
    assert 0 < int(site.asked[-1]["range"].removeprefix("bytes=").removesuffix("-")) <= HALF


def test_folder_without_permission(site, tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere
        def denied(name, mode="r", **options):
            if "w" in mode: raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
            return open(name, mode, **options)

        monkeypatch.setattr(D, "open", denied, raising=False)
    with pytest.raises(PermissionError, match="Permission denied.*locked"): get(site, folder / "file.bin")
    assert list(folder.iterdir()) == []


def test_folder_that_is_a_file(site, tmp_path):
    (tmp_path / "raw").write_text("")
    with pytest.raises(OSError, match="raw"): get(site, tmp_path / "raw/file.bin")


def test_killed(site, tmp_path):
    path, release = tmp_path / "file.bin", threading.Event()

    def stall(handler): cut(HALF)(handler); release.wait(120)

    site.plan = [stall]
    code = "import sys; from xxact.download import fetch; fetch(sys.argv[1], sys.argv[2], progress=False)"
    child = subprocess.Popen([sys.executable, "-c", code, f"{site.url}/file.bin", path], cwd=Path(D.__file__).parents[1])
    part, deadline = tmp_path / "file.bin.part", time.monotonic() + 120
    while not (part.exists() and part.stat().st_size > HALF // 2) and time.monotonic() < deadline: time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    release.set()
    have = part.stat().st_size
    assert HALF // 2 < have <= HALF and not path.exists() and not (tmp_path / "manifest.jsonl").exists()
    is_whole(path, get(site, path))
    assert site.asked[1]["range"] == f"bytes={have}-" and site.asked[1]["sent"] == len(BODY) - have


def test_killed_between_manifest_and_name(site, tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    replace = os.replace

    def killed(source, target):
        if Path(target) == path: raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as m:
        m.setattr(D.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt): get(site, path)
    entry = get(site, path)
    is_whole(path, entry)
    assert len(site.asked) == 1 and "note" not in entry


def test_import_is_cheap():
    code = "import sys, xxact.download; assert not {'httpx', 'torch', 'polars', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(D.__file__).parents[1])


# --- sources ----------------------------------------------------------------------------------------------------------------------


def test_parse_files():
    assert D.parse_files("0-3") == [0, 1, 2, 3]
    assert D.parse_files(" 0, 2 ,5-7,6") == [0, 2, 5, 6, 7]
    assert D.parse_files("057") == [57]


@pytest.mark.parametrize("text", ["", ",", "3-", "-3", "3-0", "a", "0;1", "1.5", "0-3-5", "1000", "0,,2", "²", "٣"])
def test_bad_files(text):
    with pytest.raises(ValueError, match="for example 0-3"): D.parse_files(text)


def add_alexandria(site, numbers, folder="pbe/2025.07.02", stem="alexandria"):
    for i in numbers: site.files[f"/{folder}/{stem}_{i:03d}.json.bz2"] = bz2.compress(b'{"entries": [%d]}' % i)


def test_a_gap_in_the_series_is_no_end(site, tmp_path):
    add_alexandria(site, (0, 1, 3))
    with pytest.raises(D.DownloadFailed, match="alexandria_002.json.bz2 is not on the server, though alexandria_003.json.bz2 is"):
        D.alexandria(tmp_path, base_url=site.url, **QUICK)


def test_alexandria_all(site, tmp_path):
    add_alexandria(site, range(3))
    site.plan = [serve, cut(10)]
    paths = D.alexandria(tmp_path, base_url=site.url + "/", **QUICK)
    assert paths == [tmp_path / f"alexandria/pbe/2025.07.02/alexandria_{i:03d}.json.bz2" for i in range(3)]
    assert [bz2.decompress(p.read_bytes()) for p in paths] == [b'{"entries": [%d]}' % i for i in range(3)]
    assert list(D.read_manifest(paths[0].parent)) == [p.name for p in paths]
    site.asked.clear()
    assert D.alexandria(tmp_path, base_url=site.url, **QUICK) == paths
    assert [a["path"] for a in site.asked] == [f"/pbe/2025.07.02/alexandria_00{i}.json.bz2" for i in (3, 4)]  # two that are not there are the end


def test_alexandria_folder_is_ready_for_prepare(site, tmp_path):
    from xxact.sources import alexandria_files, recognise

    add_alexandria(site, range(2))
    paths = D.alexandria(tmp_path, files="0-1", base_url=site.url, **QUICK)
    assert recognise(paths[0].parent) == "folder" and alexandria_files(paths[0].parent) == paths


def test_alexandria_some(site, tmp_path):
    add_alexandria(site, range(6))
    assert [p.name[11:14] for p in D.alexandria(tmp_path, files="0,2,4-5", base_url=site.url, **QUICK)] == ["000", "002", "004", "005"]
    with pytest.raises(D.DownloadFailed, match="404"): D.alexandria(tmp_path, files="5-7", base_url=site.url, **QUICK)


@pytest.mark.parametrize("functional, snapshot, folder, stem", [
    ("pbe", "", "pbe", "alexandria"), ("pbe", "2024.12.15", "pbe/2024.12.15", "alexandria"), ("pbe_2d", None, "pbe_2d", "alexandria_2d"),
    ("pbe_1d", None, "pbe_1d", "alexandria_1d"), ("pbesol", None, "pbesol", "alexandria_ps"), ("scan", None, "scan", "alexandria_scan")])  # fmt: skip
def test_alexandria_addresses(site, tmp_path, functional, snapshot, folder, stem):
    add_alexandria(site, [0], folder, stem)
    (path,) = D.alexandria(tmp_path, functional, snapshot=snapshot, base_url=site.url, **QUICK)
    assert path == tmp_path / "alexandria" / folder / f"{stem}_000.json.bz2"


def test_alexandria_nothing_there(site, tmp_path):
    with pytest.raises(D.DownloadFailed, match="404"): D.alexandria(tmp_path, base_url=site.url, **QUICK)


def test_alexandria_fails_half_way(site, tmp_path):
    add_alexandria(site, range(5))
    site.plan = [serve, serve] + [say(500)] * 9
    with pytest.raises(D.DownloadFailed, match="--files 0-1 takes the 2 files"): D.alexandria(tmp_path, base_url=site.url, retries=1, **QUICK)
    site.plan, offline = [], "http://127.0.0.1:1"
    assert len(D.alexandria(tmp_path, files="0-1", base_url=offline, **QUICK)) == 2
    assert len(D.alexandria(tmp_path, base_url=site.url, **QUICK)) == 5


@pytest.mark.parametrize("wrong, said", [(dict(functional="lda"), "known are pbe"), (dict(snapshot="../.."), "2025.07.02"),
                                         (dict(files="x"), "for example"), (dict(base_url="alexandria"), "not an address")])  # fmt: skip
def test_alexandria_bad_input(tmp_path, wrong, said):
    with pytest.raises(ValueError, match=said): D.alexandria(tmp_path, **wrong, **QUICK)


def test_mp20(site, tmp_path):
    from xxact.sources import source_name

    for split in ("train", "val", "test"): site.files[f"/mp_20/{split}.csv"] = f"material_id,cif\n{split},\n".encode()
    paths = D.mp20(tmp_path, site.url + "/mp_20", **QUICK)
    assert [p.read_text().split()[1] for p in paths] == ["train,", "val,", "test,"] and {source_name(p) for p in paths} == {"mp20"}


MEGNET = {"MEGNet-1/": "", "MEGNet-1/data.py": "x", "MEGNet-1/data/": "", "MEGNet-1/data/id_prop.csv": "0,-1,0.5\n", "MEGNet-1/data/0.cif": "data_0",
          "MEGNet-1/data_elasticity/811.cif": "data_811", "MEGNet-1/data/sub/1.cif": "data_1"}  # fmt: skip


def make_zip(files):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in files.items(): z.writestr(name, text)
    return memory.getvalue()


def test_mp36k(site, tmp_path):
    from xxact.sources import recognise, source_name

    site.files["/HEAD.zip"] = make_zip(MEGNET)
    for _ in range(2): (folder,) = D.mp36k(tmp_path, site.url + "/HEAD.zip", **QUICK)
    assert sorted(p.name for p in folder.iterdir()) == ["0.cif", "id_prop.csv"] and (folder / "0.cif").read_text() == "data_0"
    assert (recognise(folder), source_name(folder), len(site.asked)) == ("cif", "mp36k", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.jsonl", "mp36k", "mp36k.zip"]
    (folder / "0.cif").write_text("data_?")
    with pytest.raises(ValueError, match="1 files differ"): D.mp36k(tmp_path, site.url + "/HEAD.zip", **QUICK)


@pytest.mark.parametrize("name", ["MEGNet-1/data/../../../evil.cif", "/etc/evil.cif", "../evil.cif", "MEGNet-1/data/..\\evil.cif", "M/../evil"])
def test_zip_slip(tmp_path, name):
    (tmp_path / "mp36k.zip").write_bytes(make_zip(MEGNET | {name: "evil"}))
    with pytest.raises(ValueError, match="leads out"): D.mp36k(tmp_path, "http://127.0.0.1:1/x.zip", **QUICK)
    assert not [p for p in tmp_path.parent.rglob("*evil*") if p.is_file()] and not (tmp_path / "mp36k").exists()


@pytest.mark.parametrize("left_out", ["MEGNet-1/data/id_prop.csv", "MEGNet-1/data/0.cif"])
def test_another_zip(tmp_path, left_out):
    (tmp_path / "mp36k.zip").write_bytes(make_zip({k: v for k, v in MEGNET.items() if k != left_out}))
    with pytest.raises(ValueError, match="no folder data/"): D.mp36k(tmp_path, "http://127.0.0.1:1/x.zip", **QUICK)


def test_broken_zips(tmp_path):
    "Whatever byte is wrong: one of our errors, or the right files."
    good = make_zip(MEGNET)
    (tmp_path / "a.zip").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="broken archive"): D.unpack(tmp_path / "a.zip", tmp_path / "a")
    for i in range(len(good)):
        (tmp_path / "a.zip").write_bytes(good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1 :])
        folder = tmp_path / f"a{i}"
        try: assert {p.read_text() for p in D.unpack(tmp_path / "a.zip", folder).iterdir()} <= set(MEGNET.values())
        except ValueError as e: assert str(tmp_path / "a.zip") in str(e) and not folder.exists(), e


def test_full_disk_while_unpacking(tmp_path, monkeypatch):
    (tmp_path / "mp36k.zip").write_bytes(make_zip(MEGNET))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_space(path, data): raise full

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", no_space)
        with pytest.raises(OSError, match="No space left.*mp36k"): D.mp36k(tmp_path, "http://127.0.0.1:1/x.zip", **QUICK)
    assert not (tmp_path / "mp36k").exists()
    (folder,) = D.mp36k(tmp_path, "http://127.0.0.1:1/x.zip", **QUICK)
    assert (folder / "0.cif").read_text() == "data_0" and not (tmp_path / "mp36k.part").exists()


def test_terms():
    assert {name: "CC BY 4.0" in D.terms(name) for name in D.DOWNLOADS} == dict.fromkeys(D.DOWNLOADS, True)
