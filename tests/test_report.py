"""The report: complete in itself, escaped, the same every time, and written whatever a run has measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from tiltflow import plots
from tiltflow.report import verdict, write_report

VOID = {"meta", "img", "input", "br", "hr", "link"}
SUMMARY: dict[str, Any] = {
    "tiltflow": "0.1.0", "name": "even", "description": "tilt <script>alert(1)</script>", "model": "digits-flow",
    "method": "adjoint-matching", "beta": 2.0, "target_law": "p_base(x) exp(r(x) / beta)", "reward": "class-log-odds",
    "reward_description": "log-odds of a & b", "iterations": 2, "seed": 0, "num_samples": 100, "reward_base": -0.4,
    "reward_base_error": 0.2, "reward_tuned": 3.25, "reward_tuned_error": 0.1, "reward_target": 3.5,
    "reward_target_error": 0.15,
    "target_distance": 0.0625, "target_distance_error": 0.01, "target_distance_base": 0.47, "target_distance_floor": 0.03,
    "target_distance_kind": "total variation", "reward_distance": 0.05, "reward_distance_error": 0.01,
    "effective_sample_size": 81.0, "path_kl": 0.9, "seconds": 12.0, "network_evaluations": 1234,
    "judge": {
        "model": "judge", "class_names": ["0", "1"], "base": [0.5, 0.5], "tuned": [0.9, 0.1], "target": [0.94, 0.06],
        "target_error": [0.01, 0.01], "confidence_base": 0.98, "confidence_tuned": 0.97,
        "group": {"label": "0", "base": 0.48, "tuned": 0.91, "target": 0.94, "tuned_error": 0.01, "target_error": 0.01},
    },
}  # fmt: skip


class Balanced(HTMLParser):
    """Checks that tags nest, and collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for key, value in attrs if key in ("src", "href") and tag not in ("use", "a")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def write(folder: Path, summary: dict[str, Any], *, rows: bool = True) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("model: digits-flow\n")
    if rows:
        lines = [{"step": i, "seconds": i, "reward": i, "reward_std": 1, "loss": 1 / i, "path_kl": i / 9} for i in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("before.png", "after.png"):
            plots.image_grid(torch.zeros(4, 1, 8, 8), 2).save(folder / name)
    return write_report(folder).read_text(encoding="utf-8")


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    page = write(tmp_path / "run", SUMMARY)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.sources
    assert all(source.startswith(("data:", "#")) for source in parser.sources)
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;" in page
    text = re.sub(r"<[^>]*>", " ", page)
    for number in ("91", "48", "94", "0.06", "81"):
        assert number in text


def test_the_same_run_is_the_same_page(tmp_path: Path) -> None:
    assert write(tmp_path / "run", SUMMARY) == write(tmp_path / "run", SUMMARY)


@pytest.mark.parametrize(
    "missing", [["judge"], ["target_distance_floor", "path_kl"], ["reward_target", "effective_sample_size"]]
)
def test_what_was_not_measured_is_left_out(tmp_path: Path, missing: list[str]) -> None:
    assert "<html" in write(tmp_path / "run", {key: value for key, value in SUMMARY.items() if key not in missing})
    assert "<html" in write(tmp_path / "bare", SUMMARY | {"judge": None}, rows=False)


def test_a_target_known_from_few_samples_is_marked(tmp_path: Path) -> None:
    few, many = (write(tmp_path / "run", SUMMARY | {"effective_sample_size": size}) for size in (12.0, 500.0))
    assert few.count("warn") > many.count("warn")


def test_a_grid_puts_each_image_in_its_cell() -> None:
    images = torch.full((3, 1, 2, 2), -1.0)
    images[1] = 1.0
    pixels = np.asarray(plots.image_grid(images, 2, scale=1).convert("L")).astype(int)
    rows, columns = np.nonzero(pixels == 255)
    assert len(rows) == 4
    assert rows.max() < pixels.shape[0] / 2  # first row
    assert columns.min() >= pixels.shape[1] / 2 - 1  # second column


def test_plots_are_valid_svg() -> None:
    names = ["0", "1"]
    ElementTree.fromstring(plots.class_histogram([0.5, 0.5], [0.9, 0.1], [0.94, 0.06], [0.01, 0.01], names))


def test_what_too_few_samples_say_of_the_target_is_no_good_verdict() -> None:
    """One sample that carries all the weight is near anything."""
    measured = {"target_distance": 0.01, "target_distance_base": 0.8, "target_distance_error": 0.1}
    assert verdict({**measured, "effective_sample_size": 500.0})[0] == "good"
    level, words = verdict({**measured, "effective_sample_size": 1.0})
    assert level == "fair"
    assert "too few to say" in words
