"""The report: complete in itself, escaped, the same every time, and written whatever a run has measured."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from tiltflow.reports import plots
from tiltflow.reports.page import headline, tilt
from tiltflow.reports.report import TEMPLATES, write_report

STYLE = TEMPLATES / "page.css"
VOID = {"meta", "img", "input", "br", "hr", "link"}
SUMMARY: dict[str, Any] = {
    "tiltflow": "0.1.0", "name": "even", "description": "tilt <script>alert(1)</script>", "model": "digits-flow",
    "method": "adjoint-matching", "beta": 2.0, "target_law": "p_base(x) exp(r(x) / beta)", "reward": "class-log-odds",
    "reward_description": "log-odds of a & b", "iterations": 2, "seed": 0, "num_samples": 100, "reward_base": -0.4,
    "reward_base_error": 0.2, "reward_tuned": 3.25, "reward_tuned_error": 0.1, "reward_target": 3.5,
    "reward_target_error": 0.15,
    "target_distance": 0.0625, "target_distance_error": 0.01, "target_distance_base": 0.47, "target_distance_floor": 0.03,
    "target_distance_kind": "total variation", "reward_distance": 0.05, "reward_distance_error": 0.01,
    "achieved_tilt": 0.8, "achieved_tilt_error": 0.04, "achieved_tilt_r2": 0.9, "achieved_tilt_r2_error": 0.02,
    "effective_sample_size": 81.0, "path_kl": 0.9, "path_kl_error": 0.02, "path_kl_target": 0.8, "path_kl_target_error": 0.03,
    "verdict": {"tone": "fair", "text": "1 of 3 tests tells <b>them</b> apart: share of class 0 & 1."},
    "tests": [
        {"statistic": "share of <class> 0", "unit": "share", "base": 0.48, "tuned": 0.91, "tuned_error": 0.01, "target": 0.95,
         "target_error": 0.01, "z": -2.83, "p": 0.005, "p_base": 0.0, "counted": True, "p_holm": 0.015, "rejected": True,
         "detectable": 0.043},
        {"statistic": "mean reward", "unit": "", "base": -0.4, "tuned": 3.25, "tuned_error": 0.1, "target": 3.5,
         "target_error": 0.15, "z": -1.4, "p": 0.16, "p_base": 0.0, "counted": False, "p_holm": None, "rejected": False,
         "detectable": 0.6},
    ],
    "target_unknown": None, "seconds": 12.0,
    "network_evaluations": 1234,
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
        lines = [
            {"step": i, "seconds": i, "network_evaluations": i, "reward": i, "reward_std": 1, "loss": 1 / i, "path_kl": i / 9}
            for i in (1, 2, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("before.png", "after.png"):
            plots.image_grid(torch.zeros(4, 1, 8, 8), 2).save(folder / name)
    return write_report(folder).read_text(encoding="utf-8")


def words(page: str) -> str:
    """What is read on a page."""
    return re.sub(r"<[^>]*>", " ", re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL))


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    page = write(tmp_path / "run", SUMMARY)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.sources
    assert all(source.startswith(("data:", "#")) for source in parser.sources)
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;" in page
    text = words(page)
    for number in ("91", "48", "94", "0.06", "81"):
        assert number in text


def luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        weight * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for weight, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def test_words_and_marks_stand_out_in_both_colour_schemes() -> None:
    """WCAG 2.1 AA: 4.5 for text, 3 for what must be seen of a picture."""
    both = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", STYLE.read_text())
    light, dark = {name: one for name, one, _ in both}, {name: other for name, _, other in both}
    assert len(light) == len(dark) == 27
    assert not re.findall(r"#\w{6}\b", STYLE.read_text().split("}", 1)[1])  # no colour without its name
    assert {name: light[name] for name in plots.COLOURS if name != "line"} | {"line": plots.COLOURS["line"]} == plots.COLOURS
    series = [f"s{i}" for i in range(len(plots.SERIES))]
    assert [light[name] for name in series] == list(plots.SERIES)
    assert (1 + 0.05) / (luminance("#767676") + 0.05) == pytest.approx(4.54, abs=0.01)  # the usual example
    for scheme in (light, dark):
        for least, names in (
            (4.5, ("ink", "soft")),
            (3.0, ("base", "tuned", "target", "good", "fair", "poor", "edged", *"CNOF", *series)),
        ):
            for name in names:
                for background in ("paper", "card", "warm"):
                    low, high = sorted((luminance(scheme[name]), luminance(scheme[background])))
                    assert (high + 0.05) / (low + 0.05) >= least, (name, background)
    used = set(re.findall(r"[^-]color: ([^;]*)", STYLE.read_text()))
    assert used <= {"var(--ink)", "var(--soft)"}  # of text


def test_each_row_of_pictures_stands_above_the_same_row_after_tuning_with_its_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, SUMMARY)
    pictures = torch.linspace(-1, 1, 12).reshape(12, 1, 1, 1).expand(12, 3, 8, 8)
    for name, images in (("before", pictures), ("after", pictures.flip(0))):
        plots.image_grid(images, 4).save(folder / f"{name}.png")
    prompts = ["a <red> cat", "a dog & a fox", "rain"]
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"pictures": {"rows": 3, "prompts": prompts}}))
    page = write_report(folder).read_text()
    shown = re.findall(
        r'<figcaption>([^<]*)</figcaption>|class="(before|after)[^"]*" src="data:image/png;base64,([^"]*)"', page
    )
    order = [html.unescape(prompt) or side for prompt, side, _ in shown]
    assert order == [word for prompt in prompts for word in (prompt, "before", "after")]
    grey = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[4:18, 4:18, 0].mean() for _, side, data in shown if side]
    first = (np.arange(0, 12, 4) / 11 * 255).round()  # of each row
    assert np.allclose(grey[::2], first, atol=1)
    assert np.allclose(grey[1::2], 255 - first, atol=1)


def test_each_sample_stands_beside_the_same_one_after_tuning_with_both_rewards(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, SUMMARY)
    pictures = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    for name, images in (("before", pictures), ("after", pictures.flip(0))):
        plots.image_grid(images, 3).save(folder / f"{name}.png")
    rewards = {"before": [0.0, 1, 2, 3, 4, 5], "after": [0.5, 3, 2, None, 4, 9]}
    about = {"rows": 2, "columns": 3, "prompts": ["a cat", "a dog"], "rewards": rewards}
    (folder / "summary.json").write_text(json.dumps(SUMMARY | {"pictures": about}))
    page = write_report(folder).read_text()
    cells = re.findall(
        r'<button type="button" class="cell" data-what="([^"]*)"(?: data-rise="([^"]*)")?>(.*?)</button>', page, re.S
    )
    assert [(what, rise) for what, rise, _ in cells] == [
        ("a cat", "0.5"), ("a cat", "2"), ("a cat", "0"), ("a dog", ""), ("a dog", "0"), ("a dog", "4"),
    ]  # fmt: skip
    words_of = [re.sub(r"<[^>]*>", "", cell).strip() for _, _, cell in cells]
    assert words_of[:4] == ["0.00 → 0.50", "1.00 → 3.00", "2.00 → 2.00", "3.00 → –"]
    encoded = [re.findall(r'class="(before|after)[^"]*" src="data:image/png;base64,([^"]*)"', cell) for _, _, cell in cells]
    assert all([side for side, _ in both] == ["before", "after"] for both in encoded)
    grey = [[np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for _, data in both] for both in encoded]
    steps = (np.arange(6) / 5 * 255).round()
    for i, (before, after) in enumerate(grey):
        assert before.shape[:2] == (16, 16)  # without the padding
        assert np.abs(before.astype(int) - steps[i]).max() <= 1
        assert np.abs(after.astype(int) - steps[5 - i]).max() <= 1


def test_every_class_stands_in_a_table_with_its_error(tmp_path: Path) -> None:
    page = write(tmp_path / "run", SUMMARY)
    rows = re.findall(r'<tr><th scope="row">(\w)</th><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td></tr>', page)
    assert rows == [("0", "50.0 ± 5.0%", "90.0 ± 3.0%", "94.0 ± 1.0%"), ("1", "50.0 ± 5.0%", "10.0 ± 3.0%", "6.0 ± 1.0%")]


def test_words(tmp_path: Path) -> None:
    """No capital of a symbol, no raw name of a key, no change where none can be read, one iteration."""
    extra = {"max_train_steps": 2, "working_beta": 1.4, "w2_base": 3.0, "w2_space": "samples", "some_count": 4}
    page = write(tmp_path / "run", SUMMARY | extra)
    text = words(page)
    assert "Β" not in text  # a Greek capital
    assert "β" in text
    assert "Some count" in text
    assert not re.findall(r"\b(?!p_base|target_kl)[A-Za-z]\w*_\w+", text.replace("digits_", ""))
    same = {"reward_base": 0.431, "reward_tuned": 0.434, "judge": None, "iterations": 1}
    assert headline(SUMMARY | same) == "The mean reward stayed at 0.43; under the target law it is 3.50."
    page = write(tmp_path / "run", SUMMARY | same)
    assert "0.43 →" not in page
    assert "1 iteration<" in page
    assert "2 iterations<" in write(tmp_path / "run", SUMMARY)


def test_the_same_run_is_the_same_page(tmp_path: Path) -> None:
    assert write(tmp_path / "run", SUMMARY) == write(tmp_path / "run", SUMMARY)


@pytest.mark.parametrize(
    "missing", [["judge"], ["target_distance_floor", "path_kl"], ["reward_target", "effective_sample_size"]]
)
def test_what_was_not_measured_is_left_out(tmp_path: Path, missing: list[str]) -> None:
    assert "<html" in write(tmp_path / "run", {key: value for key, value in SUMMARY.items() if key not in missing})
    assert "<html" in write(tmp_path / "bare", SUMMARY | {"judge": None}, rows=False)


def test_the_verdict_and_the_tests_of_the_summary_are_on_the_page(tmp_path: Path) -> None:
    """Word for word, escaped, with both numbers of each test: the page has no opinion of its own."""
    page = write(tmp_path / "run", SUMMARY)
    assert '<p class="verdict fair">1 of 3 tests tells &lt;b&gt;them&lt;/b&gt; apart: share of class 0 &amp; 1.</p>' in page
    rows = [re.sub(r"<[^>]*>", "|", row) for row in page.split("<h2>Tests</h2>")[1].split("</table>")[0].split("<tr>")]
    differs, aside = rows[2:]
    for cell in ("share of &lt;class&gt; 0", "91.0 ± 1.0%", "95.0 ± 1.0%", "−2.8", "0.015", "4.30 points", "yes"):
        assert f"|{cell}|" in differs, cell
    assert "|not counted|" in aside
    assert "0.900 ± 0.020 nats; the KL divergence of the target law is 0.800 ± 0.030 nats" in page


def test_a_target_that_is_not_known_is_marked_and_has_no_numbers(tmp_path: Path) -> None:
    numbers = [key for key in SUMMARY if key.startswith(("reward_target", "target_distance", "reward_distance", "path_kl_t"))]
    judge = SUMMARY["judge"] | {"target": None, "target_error": None}
    judge["group"] = judge["group"] | {"target": None, "target_error": None}
    verdict = {"tone": "fair", "text": "No verdict: the target law is unknown."}
    unknown = {"target_unknown": "Too few.", "verdict": verdict, "tests": [], "judge": judge}
    page = write(tmp_path / "run", SUMMARY | dict.fromkeys(numbers) | unknown)
    assert "The target law is unknown." in page
    assert "No verdict" in page
    assert "<h2>Tests</h2>" not in page
    assert "target 9" not in page
    assert "<h2>Judge</h2>" in page  # base and tuned, without the target


def test_no_path_kl_says_why(tmp_path: Path) -> None:
    absent = {"path_kl": None, "path_kl_error": None, "path_kl_absent": "The solver <euler> has no noise."}
    assert "There is no path KL. The solver &lt;euler&gt; has no noise." in write(tmp_path / "run", SUMMARY | absent)


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


def test_the_number_of_a_tile_is_narrow_enough_for_a_phone(tmp_path: Path) -> None:
    page = write(tmp_path / "run", SUMMARY)
    assert "± 0.040; 1 is the target law; R² 0.900 ± 0.020" in page
    numbers = re.findall(r'class="big"[^>]*>(.*?)</', page)
    assert any("0.800" in number for number in numbers)
    assert not any("±" in number for number in numbers)


def test_the_achieved_tilt_is_told_in_words(tmp_path: Path) -> None:
    page = write(tmp_path / "run", SUMMARY)
    assert "The achieved tilt is <b>0.800 ± 0.040</b> of the one that was asked for, and R² 0.900 ± 0.020: it" in page
    assert tilt(SUMMARY) == (
        "it is tilted less than the target law, as at a temperature of 2.50 for 2; 10% of the variance of how its log density"
        " has changed is no tilt by the reward."
    )
    assert tilt({"achieved_tilt": 1.05, "achieved_tilt_error": 0.04}).startswith("within two standard errors")
    assert tilt({"achieved_tilt": 1.2, "achieved_tilt_error": 0.04}) == "it is tilted more than the target law."
    assert tilt({"achieved_tilt": None}) == ""
    why = SUMMARY | {"achieved_tilt": None, "achieved_tilt_absent": "It is <not> known."}
    assert "The achieved tilt is not known. It is &lt;not&gt; known." in write(tmp_path / "absent", why)


def test_a_report_may_load_nothing(tmp_path: Path) -> None:
    """By its own policy, and in fact: what it names of other hosts is the source of its charts, in a comment."""
    page = write(tmp_path / "run", SUMMARY)
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"\s+content="([^"]*)"', page)
    assert policy is not None
    allowed = dict(part.strip().split(" ", 1) for part in policy[1].split(";"))
    assert allowed == {
        "default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'", "script-src": "'unsafe-inline'",
    }  # fmt: skip
    assert re.findall(r"https?://[^\s\"'<>)]*", page.replace("http://www.w3.org/", "")) == ["https://github.com/leeoniya/uPlot"]
    assert not re.findall(r"url\((?!#)", page)
    assert "Copyright (c) 2022 Leon Sorokin" in page  # the licence of what is inlined asks for it


def test_other_rewards_of_relaxed_molecules_are_a_table(tmp_path: Path) -> None:
    relaxed = {"others_relaxed_base": {"dipole": [2.613, 0.071]}, "others_relaxed_tuned": {"dipole": [4.118, 0.094]}}
    page = words(write(tmp_path / "run", SUMMARY | {"molecules": relaxed}))
    assert re.search(r"Other rewards, relaxed.*dipole\s+2\.613 ± 0\.071\s+4\.118 ± 0\.094", page, re.DOTALL)
    assert "Other rewards, relaxed" not in words(
        write(tmp_path / "other", SUMMARY | {"molecules": {"others_relaxed_base": {}}})
    )


def test_a_report_of_a_long_run_is_small(tmp_path: Path) -> None:
    """Eight curves of 5,000 steps are means of 10 steps each."""
    write(tmp_path / "run", SUMMARY)
    keys = ("reward", "loss", "path_kl", "gradient_norm", "effective_sample_size", "largest_weight", "kl", "step_kl")
    lines = [
        {"step": i, "seconds": i / 3, "network_evaluations": 9 * i, **dict.fromkeys(keys, i * 7919 % 1000 / 3)}
        for i in range(1, 5001)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path / "run").read_text()
    assert "the mean of 10 iterations" in page
    assert len(page) < 250_000
