"One page of results, and the site of all notebooks: every link leads somewhere, every picture loads, and what is missing is said."
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from xxact.pages import markdown, site_pages, write_index, write_site
from xxact.reproduce import experiments, main

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in ("nbs", "figures"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "smoke"))
    for name in ("README.md", "settings.ini", "LICENSE", "CITATION.cff", "xxact/weights/card.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(clone): return write_site("_docs", clone)


def lost_links(page: Path) -> list[str]:
    "Links and pictures of a page that lead nowhere."
    text = re.sub(r"<(style|script|pre)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [html.unescape(v) for v in re.findall(r'<(?:a|img)\b[^>]*?\b(?:href|src)="([^"]*)"', text)]
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    local = [v for v in found if not re.match(r"[a-z]+:", v)]
    return [v for v in local if (v[1:] not in ids if v.startswith("#") else not (page.parent / unquote(v.partition("#")[0])).exists())]


def seen_by_a_browser(page: Path, width: int) -> dict:
    "What a browser makes of a page in a frame of this width; its own windows are not as narrow as a telephone."
    script = """<script>addEventListener("load", () => { const p = [...document.images];
      parent.postMessage(JSON.stringify({images: p.length, broken: p.filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80)),
      width: innerWidth, needed: document.documentElement.scrollWidth}), "*") })</script>"""
    copy, frame = (page.with_name(f"{kind}-{page.name}") for kind in ("check", "frame"))
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    frame.write_text(f"""<title></title><script>addEventListener("message", e => document.title = e.data)</script>
      <iframe src="{copy.name}" style="border: 0; width: {width}px; height: 900px"></iframe>""")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={page.parent / 'browser'}", "--window-size=1400,900", "--virtual-time-budget=20000"]
    dom = subprocess.run([BROWSER, *flags, "--dump-dom", frame.resolve().as_uri()], capture_output=True, text=True, timeout=300).stdout
    copy.unlink(), frame.unlink()
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))


def test_every_page_of_the_site_is_linked(site, clone):
    pages = list(site.parent.rglob("*.html"))
    assert len(pages) >= len(site_pages(clone)) > 25
    assert {p.relative_to(site.parent).as_posix(): lost for p in pages if (lost := lost_links(p))} == {}
    everything = "".join(p.read_text(encoding="utf-8") for p in pages)
    assert "<math" in everything and not re.search(r'<(script|link|img)\b[^>]*\b(src|href)="(https?:)?//', everything)  # nothing is fetched


def test_the_page_of_results_shows_all_there_is(clone):
    page = write_index("laptop", clone)
    text = page.read_text(encoding="utf-8")
    assert lost_links(page) == []
    pictures = sorted(p.name for p in (clone / "figures/laptop").glob("[0-9]*.png"))
    assert [Path(v).name for v in re.findall(r'<img src="([^"]*)"', text)] == pictures
    for verdict in (clone / "figures/laptop").glob("*.md"): assert verdict.read_text()[2:8] in text
    for name in experiments(clone): assert f"xxact reproduce --only {name} PROFILE=laptop" in text


@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_pages(site, clone, width):
    some = ("01_diffraction", "11_predict", "experiments/11_measured")
    for page in [write_index("laptop", clone), site, *(site.parent / "nbs" / f"{name}.html" for name in some)]:
        seen = seen_by_a_browser(page, width)
        assert seen["broken"] == [] and (seen["images"] > 0 or page.stem == "11_predict"), (page, seen)
        assert seen["width"] == width and seen["needed"] <= width, (page, seen)


def test_what_is_missing_or_damaged_is_said(clone, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns("_docs", "runs"))
    figures, runs = folder / "figures/laptop", folder / "runs/laptop"
    runs.mkdir(parents=True)
    (runs / "01_data.ipynb").write_text('{"cells": [')
    whole = json.loads((folder / "nbs/experiments/02_pretrain.ipynb").read_text())
    whole["metadata"]["papermill"] = dict(parameters=dict(profile="laptop", epochs=77))
    (runs / "02_pretrain.ipynb").write_text(json.dumps(whole))
    cut = figures / "03_parity.png"
    cut.write_bytes(cut.read_bytes()[:-100])
    (figures / "04_convergence.md").unlink(), (figures / "04_speed_up.csv").unlink(), (figures / "results.csv").write_text("no,table\n")
    for f in figures.glob("06_*"): f.unlink()
    page = write_index("laptop", folder)
    text = page.read_text(encoding="utf-8")
    for said in ("copy 01_data.ipynb is half-written", "EPOCHS=77", "03_parity.png is cut off", "04_convergence.md, its verdict, is missing",
                 "04_speed_up.csv is missing", "No table of results", "Not run with the profile laptop"):
        assert said in text, said
    assert lost_links(page) == []
    with pytest.raises(ValueError, match="profile='dream'"): write_index("dream", folder)
    (figures / "05_data_scaling.md").write_bytes(b"**\xff**"), (figures / "05_strange.png").mkdir()
    (folder / "nbs/experiments/06_accuracy.ipynb").write_text("{")
    assert "06_accuracy.ipynb is no notebook" in write_index("laptop", folder).read_text(encoding="utf-8")
    (folder / "mine").mkdir(), (folder / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no site of ours"): write_site("mine", folder)
    assert (folder / "mine/thesis.txt").exists()
    (folder / "nbs/00_composition.ipynb").write_text("{")
    with pytest.raises(ValueError, match="00_composition.ipynb cannot be rendered"): write_site("_docs", folder)


def test_the_commands(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    assert main(["page", "--profile", "laptop"]) == 0 and capsys.readouterr().out.strip() == "runs/laptop/index.html"
    assert main(["page", "--profile", "dream"]) == 2 and "choose from" in capsys.readouterr().err


def test_money_and_code_are_no_formulas():
    shown = markdown("It costs 5$ or 7$, `$x$`; $x^2$ and\n\n$$a = b$$\n\n```\n$y$\n```\n")
    assert shown.count("<math") == 2 and "5$ or 7$" in shown and "$x$" in shown and "$y$" in shown
