"""The scoreboard: what methods reached at equal cost, as `tiltflow compare` wrote it, of which tables and advice are made.

scoreboard.jsonl has a line for each problem or recipe of each comparison: the command, what the base and the target law have,
and of each method the means over seeds with their standard errors, `points` being those at a quarter and at half of the budget.
`python scripts/scoreboard.py add FOLDER` writes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltflow.laws.target import TILTED
from tiltflow.runs.comparison.results import MEASURED, REFERENCES

FILE = Path(__file__).with_name("scoreboard.jsonl")
Line = Mapping[str, Any]
KEPT = ("method", "aims_at", "n", "stopped", "near", "learning_rate", "steps", *MEASURED)
"""Of each method."""
LOST = 0.1
"""The part of a held-out reward of the base that a method may lose: one that loses more has gamed its own."""
CLOSE = 3.0
"""Dimensions that differ by no more than this factor are much alike."""


def read(path: Path = FILE) -> list[Line]:
    """The lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lines_of(content: Line, name: str, dimensions: Mapping[str, int | None]) -> list[Line]:
    """The lines of a comparison.

    Args:
        content: of comparison.json.
        name: of the comparison.
        dimensions: numbers of a sample, by problem or recipe; None where that is not known.
    """
    command = command_of(content, name)
    return [
        {
            "comparison": name,
            "command": command,
            "seeds": content["seeds"],
            "budget": content["budget"],
            "subject": found["subject"],
            "kind": "recipe" if "recipe" in content["subjects"][found["subject"]] else "problem",
            "dimension": dimensions[found["subject"]],
            "beta": found["beta"],
            "law": found["law"],
            "black_box": found["black_box"],
            "references": {key: rounded(found["references"][key]["mean"]) for key in REFERENCES},
            "held_out_base": means(found["held_out_base"]),
            "methods": [
                {key: kept(method[key]) for key in KEPT}
                | {"held_out": means(method["held_out"])}
                | {"points": [on_the_way(each) for each in method["points"][:2]]}
                for method in found["methods"]
            ],
        }
        for found in content["results"]
    ]


def kept(value: Any) -> Any:
    """A value of a method; of one over seeds the mean and its standard error, in six digits."""
    return {key: rounded(value[key]) for key in ("mean", "error")} if isinstance(value, Mapping) else value


def means(rewards: Line) -> Line:
    """Of each reward that was held out its mean and standard error."""
    return {name: kept(value) for name, value in rewards.items()}


def on_the_way(point: Line) -> Line:
    """What a method had reached at a share of the budget."""
    return {"share": point["share"], **{key: kept(point[key]) for key in ("reward", "distance", "diversity")}}


def rounded(value: float | None) -> float | None:
    """
    >>> rounded(0.123456789), rounded(None)
    (0.123457, None)
    """
    return None if value is None else float(f"{value:.6g}")


def command_of(content: Line, name: str) -> str:
    """The command of a comparison, from what comparison.json says of it."""
    subjects: Mapping[str, Line] = content["subjects"]
    problems, recipes = ([key for key, each in subjects.items() if ("recipe" in each) is has] for has in (False, True))
    kind, amount = content["budget"]["kind"], content["budget"]["amount"]
    words = ["tiltflow", "compare", "--methods", ",".join(content["methods"])]
    for option, some in (("--problems", problems), ("--recipes", recipes)):
        words += [option, ",".join(some)] if some else []
    words += ["--seeds", str(content["seeds"]), f"--{kind.replace('_', '-')}", f"{amount:.10g}"]
    words += ["--tune", content["tune"]] if content["tune"] != "learning-rate" else []
    given = [each["beta"] for each in subjects.values() if each["beta"] != usual_beta(each)]
    words += ["--beta", f"{given[0]:g}"] if given else []
    for each in (subjects[problem] for problem in problems[:1]):
        words += ["--num-samples", str(each["num_samples"])] if each["num_samples"] != 4000 else []
    own = {**{key: each["settings"] for key, each in subjects.items()}, **content["methods"]}
    words += [word for key, settings in own.items() for text in settings for word in ("--set", f"{key}.{text}")]
    return shlex.join([*words, "--output", f"runs/{name}"])


def usual_beta(subject: Line) -> float | None:
    """The temperature of a subject where none is given; None where its recipe does not say it.

    >>> usual_beta({"beta": 2, "num_samples": 100}), usual_beta({"recipe": {"method": {"name": "dpok", "beta": 3.0}}})
    (1.0, 3.0)
    """
    method = subject["recipe"]["method"] if "recipe" in subject else {"beta": 1.0}
    return method.get("beta") if isinstance(method, Mapping) else None


def floors(method: Line) -> float | None:
    """The distance of a method to the target law in units of that of two exact samples, its floor: 1 is the target law. None
    where it is not known.

    >>> floors({"distance": {"mean": 0.3, "error": 0.1}, "floor": {"mean": 0.2, "error": 0.0}})
    1.5
    """
    distance, floor = method["distance"]["mean"], method["floor"]["mean"]
    return None if distance is None or not floor else round(distance / floor, 6)


def measured(
    dimension: int, names: Sequence[str], lines: Sequence[Line] | None = None, *, black_box: bool = False
) -> tuple[Line, dict[str, float]] | None:
    """The line with all these methods, of a tilted law, and its distances in floors by method: of a black box if this reward is
    one, of the nearest dimension, of a recipe before one of a problem, in this order. None where they were not measured in
    about as many dimensions."""
    tilted = (line for line in (read() if lines is None else lines) if line.get("law", TILTED) == TILTED)
    found = [(line, of_methods(line)) for line in tilted if line["dimension"]]
    found = [each for each in found if set(names) <= set(each[1]) and apart(each[0]["dimension"], dimension) <= CLOSE]

    def rank(each: tuple[Line, dict[str, float]]) -> tuple[bool, float, bool]:
        line = each[0]
        return is_black_box(line) != black_box, apart(line["dimension"], dimension), line["kind"] != "recipe"

    return min(found, key=rank, default=None)


def is_black_box(line: Line) -> bool:
    """Whether the reward of a line has no gradient; lines that do not say so have one."""
    return bool(line.get("black_box"))


def in_words(
    name: str, dimension: int, others: Sequence[str], lines: Sequence[Line] | None = None, *, black_box: bool = False
) -> str:
    """A sentence of what a method reached in about as many dimensions, at equal cost, beside the best of the others; empty
    where it was not measured.

    Args:
        others: methods that could be chosen instead.
    """
    found = measured(dimension, (name,), lines, black_box=black_box)
    if found is None:
        return ""
    line, reached = found
    rivals = sorted((value, other) for other, value in reached.items() if other != name and other in others)
    beside = f", {rivals[0][1]} at {rivals[0][0]:.1f}" if rivals else ""
    kind = line["budget"]["kind"].replace("_", " ")
    where = f"On {line['subject']}{', a black box,' * is_black_box(line)}"
    return (
        f"{where} in {line['dimension']} dimensions, with {line['budget']['amount']:,.0f} {kind}, it ended at"
        f" {reached[name]:.1f} times the floor of the distance to the target law{beside} ({line['seeds']} seeds)."
    )


def of_methods(line: Line) -> dict[str, float]:
    """The distances of a line in floors, by method, of those that are known and of trainings none of which stopped, without
    methods that gamed the reward."""
    methods = line["methods"] if line["kind"] != "steering" else []
    known = ((method["method"], floors(method)) for method in methods if not method["stopped"] and not gamed(line, method))
    return {name: value for name, value in known if value is not None}


def gamed(line: Line, method: Line) -> bool:
    """Whether a reward that was held out fell by more than `LOST` of the base's.

    >>> gamed({"held_out_base": {"validity": {"mean": 0.9}}}, {"held_out": {"validity": {"mean": 0.5}}}), gamed({}, {})
    (True, False)
    """
    base = line.get("held_out_base", {})
    return any(method["held_out"][name]["mean"] < each["mean"] - LOST * abs(each["mean"]) for name, each in base.items())


def apart(one: int, other: int) -> float:
    """The factor between two numbers of dimensions.

    >>> apart(2, 16), apart(16, 2)
    (8.0, 8.0)
    """
    return max(one, other) / min(one, other)
