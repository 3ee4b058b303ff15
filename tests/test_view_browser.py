"""The page in a browser, headless Chromium: what its scripts draw, and what keys, clicks and narrow screens do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import SUMMARY, write
from test_view import served, several

from tiltflow.reports import plots
from tiltflow.reports.report import write_report
from tiltflow.runs.lock import HOLDER, Holder
from tiltflow.view import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: the page is not looked at in a browser")

DRIVER = """
(async () => {
  const wait = (time) => new Promise((done) => setTimeout(done, time)), $ = (name) => document.querySelector(name);
  const $$ = (name) => [...document.querySelectorAll(name)];
  const press = (key, on = document.body) =>
    on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const painted = () => $$(".chart canvas").filter((each) => {  // in the colours of curves: axes are grey
    const {data} = each.getContext("2d").getImageData(0, 0, each.width, each.height);
    for (let i = 0; i < data.length; i += 4) {
      const [red, green, blue, alpha] = data.slice(i, i + 4);
      if (alpha === 255 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60) return true;
    }
    return false;
  }).length;
  const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent.trim());
  const found = {};
  try {
    await wait(300);
    %s
  } catch (error) { found.error = String(error.stack); }
  parent.postMessage(found, "*");
  document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
})();
"""
OUTER = """<!doctype html><iframe src="%s" style="width: %dpx; height: 900px; border: 0"></iframe><pre id="found"></pre>
<script>onmessage = (event) => { document.getElementById("found").textContent = JSON.stringify(event.data); };</script>"""


def browse(address: str, folder: Path, *, width: int = 1280, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What the driver of a page has found there, and what the console says."""
    assert CHROMIUM is not None
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
    ]
    options += [f"--window-size={width},900", "--virtual-time-budget=9000", "--dump-dom"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=120, check=True)
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert text is not None
    assert text[1], done.stderr
    found = json.loads(unescape(text[1]))
    assert "error" not in found, found["error"]
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def in_frame(report: Path, steps: str, width: int, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Drive a report in a frame as wide as a phone: a window is not as narrow."""
    driven = report.with_name("driven.html")
    driven.write_text(report.read_text().replace("</body>", f"<script>{DRIVER % steps}</script></body>"))
    outer = report.with_name("outer.html")
    outer.write_text(OUTER % (driven.name, width))
    return browse(outer.as_uri(), report.parent, **options)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """The report of a run with curves, looks, and pairs of two prompts."""
    folder = tmp_path / "even"
    write(folder, SUMMARY)
    lines = [
        {"step": i, "seconds": i, "network_evaluations": i, "reward": i % 7, "reward_std": 1, "loss": 1 / i}
        for i in range(1, 101)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    looks = [
        {"step": 50 * i, "measures": {"reward": [i, 0.1], "variance": [3 - i, 0.2]}, "alarm": "fell" if i else None}
        for i in (0, 1)
    ]
    (folder / "monitor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in looks))
    for name in ("before", "after"):
        plots.image_grid(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 4).save(folder / f"{name}.png")
    rewards = {"before": [0.0] * 8, "after": [1.0, 3, 2, 4, 0, 0, 0, 0]}
    about = {"rows": 2, "columns": 4, "prompts": ["a cat", "a dog"], "rewards": rewards}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"pictures": about}))
    return write_report(folder)


STEPS = """
    found.charts = $$(".chart").length; found.painted = painted();
    found.too_wide = document.documentElement.scrollWidth - innerWidth;
    found.paper = getComputedStyle(document.body).backgroundColor;
    press("d"); await wait(100);
    found.other_paper = getComputedStyle(document.body).backgroundColor; found.painted_again = painted();
    found.smoothing = $(".controls output").textContent;
    press("s"); found.smoother = $(".controls output").textContent;
    found.mean = tiltflow.charts.get($(".chart[data-name=loss]")).data.at(-1)[49];
    press("?"); found.help = $("#help").open; found.keys = $$("#help kbd").map((each) => each.textContent); press("?");
    const plot = $(".chart[data-name=loss] .plot"), value = () => plot.querySelectorAll(".u-value")[1].textContent;
    found.last = value();
    plot.focus(); press("ArrowRight", plot); await wait(50); found.first = value();
    const chart = tiltflow.charts.get(plot.closest(".chart")), over = plot.querySelector(".u-over");
    const box = over.getBoundingClientRect();
    const mouse = (name, share) => over.dispatchEvent(new MouseEvent(name, {
      clientX: box.left + share * box.width, clientY: box.top + 20, bubbles: true, button: 0, movementX: 9, view: window}));
    for (const [name, share] of [["enter", .25], ["move", .25], ["down", .25], ["move", .5], ["move", .75], ["up", .75]]) {
      mouse(`mouse${name}`, share); await wait(50);
    }
    await wait(50); found.zoomed = [chart.scales.x.min, chart.scales.x.max];
    press("z"); await wait(50); found.whole = [chart.scales.x.min, chart.scales.x.max];
    $("#prompt").value = "DOG"; $("#prompt").dispatchEvent(new Event("input"));
    found.rows = $$(".pair").map((row) => row.hidden);
    $("#prompt").value = ""; $("#prompt").dispatchEvent(new Event("input"));
    $("#order").value = "rise"; $("#order").dispatchEvent(new Event("change"));
    found.rises = $$(".cell").map((cell) => Number(cell.dataset.rise));
    $(".cell").click(); found.large = $$("#pair img").length; found.said = $("#pair .note").textContent;
    press("ArrowRight", $("#pair")); found.next = $("#pair .note").textContent; $("#pair").close();
"""


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (390, False),
        pytest.param(1280, False, marks=pytest.mark.slow),
        pytest.param(1280, True, marks=pytest.mark.slow),
        pytest.param(390, True, marks=pytest.mark.slow),
    ],
)
def test_a_report_in_a_browser(report: Path, width: int, dark: bool) -> None:
    found, console = in_frame(report, STEPS, width, dark=dark)
    assert console == []
    assert found["charts"] == found["painted"] == found["painted_again"] == 4
    assert found["too_wide"] <= 0
    papers = ["rgb(20, 24, 29)", "rgb(247, 246, 243)"]
    assert [found["paper"], found["other_paper"]] == (papers if dark else papers[::-1])
    assert found["smoothing"] != found["smoother"]
    assert found["smoother"] == "mean of 11"
    assert found["mean"] == pytest.approx(sum(1 / i for i in range(45, 56)) / 11, rel=1e-4)  # at iteration 50
    assert found["help"]
    assert {"?", "d", "s", "z", "x", "p", "/"} <= set(found["keys"])
    assert found["last"] != found["first"]
    low, high = found["zoomed"]
    assert 15 < low < 35
    assert 65 < high < 85
    assert found["whole"] == [1, 100]
    assert found["rows"] == [True, False]
    assert found["rises"] == [4, 3, 2, 1, 0, 0, 0, 0]
    assert (found["large"], found["said"], found["next"]) == (2, "reward 0.00 → 4.00", "reward 0.00 → 3.00")


def test_a_served_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is sorted by a click, and a run that is being trained grows."""
    folder = several(tmp_path / "runs")
    write(folder / "also", SUMMARY | {"reward_tuned": -7.0})
    growing = folder / "growing"
    write(growing, SUMMARY)
    (growing / "summary.json").unlink()
    (growing / HOLDER).write_text(json.dumps(asdict(replace(Holder.this(), host="elsewhere"))))
    place_data, scripts = page.place_data, page.scripts

    def grown(place: Any) -> Any:
        with (growing / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "seconds": 4, "network_evaluations": 4, "reward": 9, "loss": 9}) + "\n")
        return place_data(place)

    steps = """
    const table = $$("table.sortable").at(-1), button = table.tHead.rows[0].cells[4].querySelector("button");
    found.runs = column(table, 0); button.click(); found.up = column(table, 4); button.click(); found.down = column(table, 4);
    found.painted = [painted(), $$(".chart").length];
    $(".swatch").click(); found.pressed = $(".swatch").getAttribute("aria-pressed");
    const steps = () => tiltflow.data.runs.find((run) => run.name === "growing").axes.step.length;
    found.before = steps(); await wait(3000); found.after = steps(); found.state = $("#state").textContent;
    """
    monkeypatch.setattr(page, "scripts", lambda: [*scripts(), DRIVER % steps])
    monkeypatch.setattr(page, "place_data", grown)
    with served(folder) as port:
        found, console = browse(f"http://127.0.0.1:{port}/", tmp_path)
    assert console == []
    assert found["runs"] == ["also", "even", "growing"]
    assert [text.split()[0] for text in found["up"]] == ["−7.00", "3.25", "–"]
    assert [text.split()[0] for text in found["down"]] == ["3.25", "−7.00", "–"]
    assert found["painted"][0] == found["painted"][1] > 0
    assert found["pressed"] == "false"
    assert (found["before"], found["after"]) == (3, 4)
    assert found["state"] == "training: growing"
