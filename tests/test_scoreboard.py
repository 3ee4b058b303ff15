"""The scoreboard: what it keeps of a comparison, the tables that are made of it, and what advice says by it."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tiltflow.commands.compare import split
from tiltflow.commands.terminal.app import app
from tiltflow.runs.advice.scoreboard import FILE, command_of, floors, in_words, lines_of, measured, read
from tiltflow.runs.comparison.budget import Budget
from tiltflow.runs.comparison.plan import Plan

ROOT = Path(__file__).parents[1]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts/scoreboard.py"))


def reached(method: str, distance: float, *stopped: str) -> dict[str, Any]:
    number = {"mean": distance, "error": 0.01}  # of the seeds that did not stop
    return {"method": method, "stopped": list(stopped), "distance": number, "floor": {"mean": 0.1, "error": 0.0}}


def line(name: str, dimension: int, *methods: dict[str, Any], kind: str = "problem") -> dict[str, Any]:
    budget = {"kind": "network_evaluations", "amount": 400_000.0}
    head = {"comparison": name, "subject": name, "seeds": 5, "budget": budget, "kind": kind}
    return head | {"dimension": dimension, "references": {"distance_base": 1.0}, "methods": list(methods)}


def test_the_pages_are_those_that_the_file_makes() -> None:
    """`python scripts/scoreboard.py --write` would change nothing; where this fails, run it."""
    for path, text in SCRIPT["pages"]().items():
        assert path.read_text(encoding="utf-8") == text, path
    assert set(re.findall(r"<!-- scoreboard: (\S+) begin -->", SCRIPT["PAGE"].read_text())) == {
        each["comparison"] for each in read()
    }


def test_a_table_of_other_numbers_is_another_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file says is what the page shows."""
    text = FILE.read_text(encoding="utf-8")
    for each in (one for one in read() if one["kind"] == "problem"):
        shown = SCRIPT["block"](each["comparison"], read())
        for method in each["methods"]:
            row = next(row for row in shown.splitlines() if row.startswith(f"| `{method['method']}`"))
            assert len(row.split("|")) == len(SCRIPT["COLUMNS"]) + 3
    assert text.count("\n") == len(read())


def test_every_command_of_the_file_makes_its_own_plan() -> None:
    for each in (one for one in read() if one["kind"] != "steering"):
        words = each["command"]
        assert f"--output runs/{each['comparison']}" in words
        assert {method["method"] for method in each["methods"]} == set(split(re.findall(r"--methods (\S+)", words)[0]))


def test_the_command_of_a_comparison_is_the_one_that_made_it(tmp_path: Path) -> None:
    """From comparison.json alone: read back, it is the same plan; and a line has the means of it."""
    sets = ["gaussian.train_batch_size=32", "gaussian.hidden=8", "gaussian.linear=[1,.5]", "draft.num_inference_steps=5"]
    words = ["--methods", "draft", "--problems", "gaussian", "--seeds", "1", "--network-evaluations", "3000"]
    words += ["--beta", "0.5", "--num-samples", "100", "--tune", "none"]
    result = CliRunner().invoke(
        app, ["compare", *words, *(w for s in sets for w in ("--set", s)), "-o", str(tmp_path / "small")]
    )
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "small/comparison.json").read_text())
    command = command_of(content, "small")
    assert command.startswith("tiltflow compare --methods draft --problems gaussian --seeds 1 --network-evaluations 3000")
    assert command.endswith("--output runs/small")
    plan = Plan.of(
        ["draft"], ["gaussian"], seeds=1, budget=Budget("network_evaluations", 3000), tune="none", beta=0.5, num_samples=100,
        settings=[text.strip("'") for text in re.findall(r"--set ('[^']*'|\S+)", command)],
    )  # fmt: skip
    assert json.loads(json.dumps(plan.as_tree())) == {key: content[key] for key in plan.as_tree()}
    (kept,) = lines_of(content, "small", {"gaussian": 2})
    (method,) = content["results"][0]["methods"]
    assert kept["methods"][0]["distance"]["mean"] == pytest.approx(method["distance"]["mean"], rel=1e-5)
    assert floors(kept["methods"][0]) == pytest.approx(method["distance"]["mean"] / method["floor"]["mean"], rel=1e-4)
    assert (kept["kind"], kept["dimension"], kept["command"]) == ("problem", 2, command)
    number = {"mean": 0.8761, "error": 0.0123, "n": 1}  # with a reward that was held out
    found = content["results"][0] | {"held_out_base": {"validity": number | {"mean": 0.9431}}}
    found["methods"] = [method | {"held_out": {"validity": number}, "path_kl": number | {"mean": 3.25, "error": 0.5}}]
    head, _, row = list(SCRIPT["table"](lines_of(content | {"results": [found]}, "small", {"gaussian": 2})[0]))[-3:]
    assert head.endswith("| rate | path KL | validity |")
    assert row.endswith("| 3.25 ± 0.50 | 0.876 ± 0.012 |")


def test_a_temperature_that_is_not_the_recipes_own_is_in_the_command() -> None:
    recipe = {"recipe": {"method": {"name": "dpok", "beta": 3.0}}, "settings": ["model=other"]}
    budget = {"kind": "network_evaluations", "amount": 3000.0}
    same = {"seeds": 1, "budget": budget, "tune": "learning-rate", "methods": {"dpok": []}}
    for beta, words in ((3.0, "3000 --set"), (60.0, "3000 --beta 60 --set")):
        assert f"{words} some.model=other" in command_of(same | {"subjects": {"some": recipe | {"beta": beta}}}, "one")


def test_advice_names_what_was_measured_in_as_many_dimensions() -> None:
    lines = [
        line("flat", 2, reached("adjoint-matching", 0.15), reached("draft", 0.12), reached("ddpo", 0.11, "seed 0: lost")),
        line("high", 20, reached("adjoint-matching", 0.3), reached("tilt-matching", 0.2), reached("draft", 0.9)),
        line("drawn", 2, reached("smc", 0.1), kind="steering"),
    ]
    said = in_words("adjoint-matching", 2, ["draft", "ddpo", "tilt-matching"], lines)
    assert "On flat in 2 dimensions, with 400,000 network evaluations" in said
    assert "1.5 times the floor of the distance to the target law, draft at 1.2 (5 seeds)" in said
    assert "tilt-matching at 2.0" in in_words("adjoint-matching", 16, ["draft", "tilt-matching"], lines)
    assert "draft" not in in_words("adjoint-matching", 2, ["tilt-matching"], lines)
    assert in_words("adjoint-matching", 784, ["draft"], lines) == ""  # nothing was measured in so many
    assert in_words("ddpo", 2, ["draft"], lines) == ""  # it stopped
    found = measured(10, ("draft", "tilt-matching"), lines)
    assert found is not None
    assert (found[0]["comparison"], found[1]["draft"]) == ("high", pytest.approx(9.0))
    assert measured(2, ("adjoint-matching", "tilt-matching"), lines) is None  # both, or nothing


def test_a_black_box_is_advised_by_what_was_measured_of_black_boxes() -> None:
    """Where there is none in about as many dimensions, by others; and no law of a chain stands for a tilted one."""
    lines = [
        line("smooth", 16, reached("tilt-matching", 0.2), reached("adjoint-matching", 0.3)),
        line("box", 20, reached("tilt-matching", 0.4), reached("ddpo", 0.7), kind="recipe") | {"black_box": True},
        line("chain", 17, reached("tilt-matching", 0.1)) | {"law": "the end of a chain"},
    ]
    others = ["adjoint-matching", "ddpo"]
    said = in_words("tilt-matching", 17, others, lines, black_box=True)
    assert "On box, a black box, in 20 dimensions" in said
    assert "4.0 times the floor of the distance to the target law, ddpo at 7.0" in said
    assert "On smooth in 16 dimensions" in in_words("tilt-matching", 17, others, lines)
    assert "On smooth in 16 dimensions" in in_words("tilt-matching", 17, others, lines[:1], black_box=True)
    assert in_words("tilt-matching", 17, others, lines[2:]) == ""
    assert "**box**, a black box, 20 dimensions" in next(SCRIPT["table"](full(lines[1])))
    assert "black box" not in next(SCRIPT["table"](full(lines[0])))


def test_what_gamed_its_reward_advises_nothing() -> None:
    """It lost more than a tenth of a reward that was held out, be it below zero."""
    for base, kept, lost in ((0.9, 0.85, 0.5), (-2.0, -2.1, -2.5)):
        methods = [reached("tilt-matching", 0.2), reached("score-as-action", 0.1)]
        some = line("molecules", 100, *methods) | {"held_out_base": {"validity": {"mean": base, "error": 0.01}}}
        for method, value in zip(methods, (kept, lost), strict=True):
            method["held_out"] = {"validity": {"mean": value, "error": 0.01}}
        found = measured(100, ("tilt-matching",), [some])
        assert found is not None
        assert set(found[1]) == {"tilt-matching"}
        assert "score-as-action" not in in_words("tilt-matching", 100, ["score-as-action"], [some])


def full(some: dict[str, Any]) -> dict[str, Any]:
    """A line with what a table shows of its references."""
    return some | {"references": dict.fromkeys(("reward_base", "distance_base", "diversity_base"), 1.0)}


def test_the_table_of_the_readme_says_who_ran_away() -> None:
    """By the base's distance, 1 here; methods without a row are empty, and come last."""
    some = [line("mixture", 2, reached("adjoint-matching", 0.15), reached("draft", 3.0), reached("refl", 0.2, "seed 0: lost"))]
    some[0]["methods"].append(reached("dpok", 0.1) | {"distance": {"mean": None, "error": None}})
    text = SCRIPT["which_method"](some, "docs/")
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("|")]
    assert rows[0] == ["your reward", "method", "aims at", "ring, 2-d"]
    found = {re.findall("`(.*)`", row[1])[0]: row for row in rows[2:]}
    assert found["adjoint-matching"] == rows[2]
    named = "[`adjoint-matching`](docs/adjoint-matching.md) (arXiv 2409.08861)"
    assert rows[2] == ["differentiable", named, "p_base exp(r/β)", "1.5"]
    assert (found["draft"][-1], found["refl"][-1]) == ("away", "away")
    assert not {"1.0", "away"} & set(found["dpok"])  # of one seed it is not known
    assert [row[0] for row in rows[2:]] == sorted((row[0] for row in rows[2:]), key=lambda words: words == "any")
