"""The report: whole, self-contained, deterministic, and working in a real browser where there is one."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pandas as pd
import pytest
from make_records import HERE, METHODS, Planted, write_records, write_run

from analysis import report


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The report on a planted profile, with one diverged run, one failed and one foreign folder beside it."""
    tasks = ["autoencoder_curves_small", "gcn_sbm"]
    root = write_records(tmp_path_factory.mktemp("results") / "test", tasks=tasks)
    profile = {"name": "test", "tasks": tasks, "seeds": 3}
    write_run(root, "gcn_sbm", "sgd", 0, Planted(diverges=True), profile=profile)
    write_run(root, "gcn_sbm", "sgd", 1, METHODS["sgdm"], status="failed", profile=profile)
    (root / "runs" / "gcn_sbm" / "sgd" / "foreign").mkdir()
    return report.build(root)


class Page(HTMLParser):
    """Collects links, ids and images."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.images = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[key] for key in ("href", "src") if attributes.get(key)]
        if tag == "img":
            self.images.append(attributes)


def test_every_link_resolves_and_nothing_is_remote(built):
    text = built.read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and len(page.links) > 60
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif not link.startswith("data:"):
            assert (built.parent / unquote(link)).is_file(), link
    for path in (built, *built.parent.glob("page.*")):
        assert "https://" not in path.read_text() and "//cdn" not in path.read_text()


def test_figures_have_files_and_alternative_text(built):
    page = Page(built.read_text())
    assert len(page.images) == 2 + 2 * (3 + 3)
    for image in page.images:
        assert len(image["alt"]) > 60
        for end in (".png", ".pdf", ".csv"):
            assert (built.parent / image["src"]).with_suffix(end).stat().st_size > 100


def test_first_screen_and_lists(built):
    text = built.read_text()
    assert "5 methods on 2 tasks, 1–3 seeds each: 25 final runs (1 diverged) and 16 tuning trials" in text
    assert text.index('id="claims"') < text.index('id="autoencoder"') < text.index('id="runs"')
    for words in ("diverged", "failed", "gcn_sbm/sgd/foreign", "not a record: no summary.json"):
        assert words in text[text.index('id="runs"') :]
    assert "python -m runners.train task=gcn_sbm optimizer=sgd seed=0 profile=test " in text
    assert len(json.loads((built.parent / "claims.json").read_text())) == 14
    assert {path.name for path in (built.parent / "tables").iterdir()} >= {
        "results.csv", "results.tex", "results.md", "settings.csv", "runs.csv", "costs_to_target.csv",
        "results_gcn_sbm.tex", "claims.csv", "claims.tex", "searches.csv", "searches.tex", "hyperparameters.csv",
        "hyperparameters.tex",
    }  # fmt: skip


def test_what_has_no_table_is_told_not_drawn(built):
    text = built.read_text()
    for path in ("study/linear_convergence.csv", "study/estimators.csv", "bench"):
        assert f"{built.parents[1].name}/{path}" in text or f"/{path}</code>" in text
    assert "docs/figures.md" in text and "make bench" in text


def test_the_paper_has_every_figure_and_table_and_compiles(built, tmp_path):
    folder = shutil.copytree(built.parent, tmp_path / "report")
    text = (folder / "paper.tex").read_text()
    pictures = re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", text)
    assert sorted(pictures) == sorted(path.name for path in (folder / "figures").glob("*.pdf"))
    tables = re.findall(r"\\input\{tables/(.*?)\}", text)
    assert set(tables) == {"claims.tex", "results_autoencoder_curves_small.tex", "results_gcn_sbm.tex", "searches.tex",
                           "hyperparameters.tex"}  # fmt: skip
    for source in (text, *((folder / "tables" / name).read_text() for name in tables)):
        assert source.isascii() and source.count("{") == source.count("}")
        begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", source) for word in ("begin", "end"))
        assert sorted(begun) == sorted(ended)
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex on this machine: the text was checked, not compiled")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, errors="replace")
    assert done.returncode == 0, done.stdout[-800:]


def test_tables_of_settings_hold_every_field_once(built):
    folder = built.parent / "tables"
    settings = pd.read_csv(folder / "settings.csv")
    searched = settings[settings.trials > 0]
    searches = pd.read_csv(folder / "searches.csv")
    assert len(searches) == len(searched) == 4  # sgdm and adamw on two tasks
    assert set(searches.Selected.astype(float)) == {0.1} and set(searches.Searched) == {"0.001 – 1"}
    fixed = dict(pd.read_csv(folder / "hyperparameters.csv").to_numpy())
    for row in settings[settings.trials == 0].itertuples():
        assert f"{row.field} {row.value}" in fixed[row.method]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def some_figures(monkeypatch, *names):
    """Draw these alone: these tests are not about figures, which take most of a build's time."""
    every = report.figures.jobs
    monkeypatch.setattr(report.figures, "jobs", lambda records: {n: j for n, j in every(records).items() if n in names})


def test_the_same_records_give_the_same_bytes(tmp_path, monkeypatch):
    some_figures(monkeypatch, "cost", "curves_epoch_gcn_sbm", "step_sizes_gcn_sbm")
    shutil.copytree(HERE / "records", tmp_path / "results")
    first = digests(report.build(tmp_path / "results").parent)
    assert digests(report.build(tmp_path / "results").parent) == first and len(first) == 5 + 3 * 3 + 17
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"report", "runs", "tuning"}


def test_a_failing_build_keeps_the_old_report(tmp_path, monkeypatch):
    some_figures(monkeypatch)
    root = write_records(tmp_path / "r", tasks=["gcn_sbm"], methods={"sgdm": METHODS["sgdm"]}, seeds=2, trials=0)
    before = digests(report.build(root).parent)

    def fail(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(report.claims, "write", fail)
    with pytest.raises(RuntimeError):
        report.build(root)
    assert digests(root / "report") == before
    assert {path.name for path in root.iterdir()} == {"report", "runs"}


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="not a report"):
        report.build(HERE / "records", tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no results folder"):
        report.build(tmp_path / "nowhere")


def test_no_records_make_an_honest_page(tmp_path):
    index = report.build(tmp_path)
    text = index.read_text()
    assert "0 final runs" in text and "No final runs yet" in text
    for link in Page(text).links:
        assert link.startswith(("#", "data:")) or (index.parent / link).is_file(), link


# ---- in a browser --------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000"
)
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const chart = document.querySelector(".chart"), seen = {};
  const lines = () => chart.querySelectorAll(".panel:first-child .curve").length;
  seen.lines = lines();
  for (const input of chart.querySelectorAll(".axes input")) {
    input.click();
    const texts = [...chart.querySelectorAll("svg[role=img] text")].map((t) => t.textContent);
    seen[input.value] = [texts.includes(input.parentNode.textContent.trim()),
      [...chart.querySelectorAll("[data-axis]")].filter(
        (n) => n.offsetParent && !n.dataset.axis.includes(input.value)).length,
      chart.querySelector(".curve").getAttribute("points")];
  }
  chart.querySelector(".chips .chip").click();
  seen.hidden = lines();
  seen.pressed = chart.querySelector(".chips .chip").getAttribute("aria-pressed");
  chart.querySelector(".chips .chip").click();
  chart.querySelectorAll(".chips .kind")[1].click();
  seen.group = [...chart.querySelectorAll(".panel:first-child [data-method]")].map((g) => g.dataset.method).sort();
  chart.querySelectorAll(".chips .kind")[1].click();
  seen.whole = lines();
  location.hash = "LW-1";
  seen.static = [...chart.querySelectorAll(".links")].filter((n) => n.offsetParent).length;
  const svg = chart.querySelector(".panel svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 20, clientY: box.top + 50}));
  seen.tip = chart.querySelector(".tip").textContent;
  seen.labelled = svg.getAttribute("aria-label");
  seen.opened = document.querySelector("#LW-1 details").open;
  seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
}, 300));
</script>"""


def browse(page, profile, *flags):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on this machine")
    command = [browser, *FLAGS.split(), f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()]
    environment = os.environ | {"HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_works_in_a_browser(built, tmp_path, width):
    probed = built.with_name(f"probe-{width}.html")
    probed.write_text(built.read_text().replace("</body>", PROBE + "</body>"))
    try:
        dom, console = browse(probed, tmp_path, f"--window-size={width},1000")
    finally:
        probed.unlink()
    assert not console
    start = dom.index('<pre id="probe">') + len('<pre id="probe">')
    seen = json.loads(dom[start : dom.index("</pre>", start)].replace("&amp;", "&").replace("&gt;", ">"))
    assert seen["lines"] == 4 and seen["hidden"] == 3 and seen["pressed"] == "false"
    points = set()
    for axis in ("epoch", "train_seconds", "gradient_equivalents", "step"):
        labelled, others, drawn = seen[axis]
        assert labelled and others == 0
        points.add(drawn)
    assert len(points) >= 2  # epochs and steps have the same shape; times do not
    assert seen["whole"] == 4 and seen["group"] == ["adamw", "lw_adamw", "lw_sgdm", "sgdm"]
    assert seen["static"] == 1
    assert "LW-AdamW" in seen["tip"] and "Training loss against step" in seen["labelled"]
    assert seen["wide"] <= 0  # nothing overflows sideways


def test_a_folder_without_records_is_no_results_folder(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"error: there is no record in .*other: name the folder that has runs"):
        report.main()
    assert not list((tmp_path / "other").iterdir())
