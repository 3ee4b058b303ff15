"""The page in a browser, headless Chromium: what its scripts draw, and what keys, clicks and narrow screens do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, browser, needs_chromium
from test_compare import outcomes, plan_of
from test_report import SUMMARY, write
from test_view import served, several

from tiltflow.reports import plots
from tiltflow.reports.comparison import write_comparison_report
from tiltflow.reports.report import write_report
from tiltflow.runs.comparison.results import results
from tiltflow.runs.lock import HOLDER, Holder
from tiltflow.view import page

pytestmark = needs_chromium

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
  await wait(300);
  %s
  return found;
})()
"""
PHONE = (390, 844)


def width_of(tab: Browser) -> int:
    """How wide the page is that is shown: more than the screen if it has to be scrolled."""
    width: int = tab.value("document.documentElement.scrollWidth")
    return width


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with browser() as tab:
        yield tab


@pytest.fixture
def tab(opened: Browser) -> Iterator[Browser]:
    """A tab whose console has nothing to say."""
    opened.begin()
    yield opened
    assert opened.console == []


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
def test_a_report_in_a_browser(report: Path, tab: Browser, width: int, dark: bool) -> None:
    tab.show(width, 900, dark)
    tab.go(report.as_uri())
    assert width_of(tab) <= width
    found = tab.value(DRIVER % STEPS)
    assert width_of(tab) <= width
    assert found["charts"] == found["painted"] == found["painted_again"] == 4
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


def test_a_served_page_in_a_browser(tmp_path: Path, tab: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is sorted by a click, and a run that is being trained grows."""
    folder = several(tmp_path / "runs")
    write(folder / "also", SUMMARY | {"reward_tuned": -7.0})
    growing = folder / "growing"
    write(growing, SUMMARY)
    (growing / "summary.json").unlink()
    (growing / HOLDER).write_text(json.dumps(asdict(replace(Holder.this(), host="elsewhere"))))
    place_data = page.place_data

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
    found.before = steps();
    for (let i = 0; i < 200 && steps() === found.before; i++) await wait(50);
    found.after = steps(); found.state = $("#state").textContent;
    """
    monkeypatch.setattr(page, "place_data", grown)
    with served(folder) as port:
        tab.go(f"http://127.0.0.1:{port}/")
        found = tab.value(DRIVER % steps)
    assert found["runs"] == ["also", "even", "growing"]
    assert [text.split()[0] for text in found["up"]] == ["−7.00", "3.25", "–"]
    assert [text.split()[0] for text in found["down"]] == ["3.25", "−7.00", "–"]
    assert found["painted"][0] == found["painted"][1] > 0
    assert found["pressed"] == "false"
    assert (found["before"], found["after"]) == (3, 4)
    assert found["state"] == "training: growing"


def test_pages_fit_a_phone(parted_run: Path, tmp_path: Path, tab: Browser) -> None:
    """Nothing is wider than the screen; tables and plots that are scroll within themselves."""
    folder = several(tmp_path / "runs")
    found = results(
        plan_of(("draft", "flow-grpo", "dpok")), outcomes(**{"draft": (0.5, 9.0), "flow-grpo": (0.4, 2.0), "dpok": (0.2, 1.0)})
    )
    (folder / "compare" / "comparison.json").write_text(json.dumps(found))
    frozen = write_comparison_report(folder / "compare")
    tab.show(*PHONE)
    with served(folder, parted_run) as port:
        pages = [f"http://127.0.0.1:{port}/?at={key}" for key in ("runs", "run", "runs/sweep", "runs/compare", "runs/stages")]
        for address in (
            *pages,
            *(path.as_uri() for path in (frozen, folder / "even" / "report.html", parted_run / "report.html")),
        ):
            tab.go(address)
            assert width_of(tab) == PHONE[0], address
            assert tab.value("[...document.images].every((each) => each.complete)")


def test_a_tap_reads_a_curve(report: Path, tab: Browser) -> None:
    tab.show(*PHONE)
    tab.go(report.as_uri())
    tab.value("document.querySelector('.chart[data-name=loss]').scrollIntoView({block: 'center'})")
    over = "document.querySelector('.chart[data-name=loss] .u-over').getBoundingClientRect()"
    box = tab.value(f"(({{left, top, width, height}}) => ({{left, top, width, height}}))({over})")
    read = "document.querySelector('.chart[data-name=loss] .u-value').textContent"
    for share in (0.25, 0.75):
        tab.tap(box["left"] + share * box["width"], box["top"] + 0.5 * box["height"])
        tab.wait(f"Math.abs({read} - {1 + 99 * share}) < 2")
