"""The tables of docs/scoreboard.md and of the README, made of what `tiltflow compare` wrote.

python scripts/scoreboard.py add runs/mixture    keep the results of this comparison, in place of earlier ones of its name
python scripts/scoreboard.py steer mixture       steer the base of a problem without training, and keep the results
python scripts/scoreboard.py --write             write the tables
python scripts/scoreboard.py                     print them
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltflow.commands.terminal.console import make_console
from tiltflow.commands.terminal.progress import Jobs, jobs_progress
from tiltflow.files import read_json, write_text
from tiltflow.formatting import decimal, told_apart
from tiltflow.models.model import load
from tiltflow.plugins import find, own_names
from tiltflow.problems.verification.steering import read_steered, verify_steering
from tiltflow.problems.verification.verify import read_verification
from tiltflow.runs.advice.scoreboard import FILE, Line, floors, is_black_box, kept, lines_of, read
from tiltflow.runs.comparison.on_problem import problem_of
from tiltflow.runs.comparison.results import mean_of
from tiltflow.streams import stream

ROOT = Path(__file__).resolve().parents[1]
PAGE, README, METHODS = ROOT / "docs/scoreboard.md", ROOT / "README.md", ROOT / "docs/methods.md"
HUGE = 1e4
"""Numbers from here on are of what ran away, and are shown by their size alone."""
COLUMNS = ("distance", "in floors", "at a quarter", "mean reward", "achieved tilt", "diversity", "steps", "rewards", "rate")
OF_STEERING = ("steering", "its law", "distance", "in floors", "mean reward", "network evaluations", "reward evaluations")
SEEDS = 5
SHOWN = {
    "mixture": "ring",
    "lqg": "Gaussian",
    "mixture-16": "three modes",
    "mixture-64": "three modes",
    "linear-quadratic": "policy",
    "digits-even": "digits",
    "digits-png": "digits, a black box",
}
"""Comparisons of which the README has a column, and its head."""
CAPTION = (
    "Numbers: the distance to p_base exp(r/β) after training at [equal cost]({page}), over that of two exact samples, so 1 is"
    " that law; away: further from it than the base, or not finite; empty: not measured."
)
LAWS = {"exact": "p_base exp(r/β)", "first-order": "near it for weak tilts", "none": "no tilt of the base"}
"""What a method aims at, in words, by what it reaches."""


# ---- the file ----


def add(folder: Path) -> None:
    """Keep the results of a comparison."""
    content = read_json(folder / "comparison.json")
    dimensions = {name: dimension(name, each) for name, each in content["subjects"].items()}
    keep(folder.name, lines_of(content, folder.name, dimensions))


def keep(name: str, lines: Sequence[Line]) -> None:
    """Write the file with the lines of a comparison in place of its earlier ones, in the order of names."""
    others = [line for line in read() if line["comparison"] != name] if FILE.exists() else []
    ordered = sorted([*others, *lines], key=lambda line: (line["comparison"], line["subject"]))
    write_text(FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered))


def dimension(name: str, subject: Line) -> int | None:
    """Numbers of a sample; None for a pipeline."""
    if "recipe" in subject:
        source = subject["recipe"]["model"]
        return math.prod(load(source).event_shape) if isinstance(source, str) else None
    problem = problem_of(read_verification(name, None, subject["settings"]))
    return problem.base_sampler()(1, stream(0, "dimension")).shape[1]


def steer(problem: str, settings: Sequence[str]) -> None:
    """Steer the base of a problem by every kind of steering, and keep the means over seeds."""
    methods, kinds = [], own_names("steering")
    with jobs_progress(make_console(as_json=False), False, len(kinds) * SEEDS, len(kinds) * SEEDS) as jobs:
        drawn = {kind: [steered_once(problem, kind, settings, seed, jobs) for seed in range(SEEDS)] for kind in kinds}
    for kind, found in drawn.items():
        per_sample = {key: found[0][key] / found[0]["num_samples"] for key in ("network_evaluations", "reward_evaluations")}
        means = {key: kept(mean_of([each[key] for each in found])) for key in ("distance", "floor", "reward")}
        methods.append({"method": kind, "aims_at": found[0]["law"], "stopped": [], **means, **per_sample})
    line = {
        "comparison": f"steering-{problem}",
        "command": f"python scripts/scoreboard.py steer {problem}",
        "seeds": SEEDS,
        "subject": problem,
        "kind": "steering",
        "dimension": dimension(problem, {"settings": settings}),
        "methods": methods,
    }
    keep(f"steering-{problem}", [line])


def steered_once(problem: str, kind: str, settings: Sequence[str], seed: int, jobs: Jobs) -> Line:
    """What was found of one kind of steering with one seed."""
    name = f"{problem}, {kind}, seed {seed}"
    jobs.moved(name, 0.0, 1.0)
    found = verify_steering(read_steered(problem, kind, [*settings, f"seed={seed}"])).values
    jobs.ended(name, f"reward {found['reward']:.3f}, distance {found['distance']:.3f} (floor {found['floor']:.3f})", 1.0)
    return found


# ---- tables ----


def block(name: str, lines: Sequence[Line]) -> str:
    """The command of a comparison and its tables."""
    some = [line for line in lines if line["comparison"] == name]
    tables = ["\n".join(steered(line) if line["kind"] == "steering" else table(line)) for line in some]
    return "\n\n".join([f"```sh\n{some[0]['command']}\n```", *tables])


def size(line: Line) -> str:
    """The numbers of a sample, and the seeds, in words."""
    return f"{line['dimension']} dimension{'s' * (line['dimension'] != 1)}, {line['seeds']} seeds"


def table(line: Line) -> Iterator[str]:
    """The table of a problem or recipe, the nearest method first."""
    known, said = line["references"], []
    for key, title in (("distance", "distance"), ("reward", "mean reward"), ("diversity", "diversity")):
        sides = [(side, known.get(f"{key}_{side}")) for side in ("base", "target")]
        numbers = {side: value for side, value in sides if value is not None}
        words = [f"{text} of the {side}" for side, text in zip(numbers, told_apart([*numbers.values()]), strict=True)]
        words += [f"{decimal(floor)} of two exact samples, the floor" for floor in floors_of(line)[: key == "distance"]]
        said += [f"{title} {', '.join(words)}"] if words else []
    others = line.get("held_out_base", {})
    said += [f"{name} {decimal(each['mean'])} of the base" for name, each in others.items()]
    box = ", a black box" * is_black_box(line)
    yield f"**{line['subject']}**{box}, {size(line)}: {'; '.join(said)}."
    yield ""
    own = ["path KL"] if any(mean_of_paths(method)["mean"] is not None for method in line["methods"]) else []
    rows = ([*row(method), *more(method, [*own, *others])] for method in sorted(line["methods"], key=order))
    yield from markdown(("method", *COLUMNS, *own, *others), rows)


def floors_of(line: Line) -> list[float]:
    """The floors of the distance, of methods that have one."""
    return [method["floor"]["mean"] for method in line["methods"] if method["floor"]["mean"] is not None]


def order(method: Line) -> tuple[bool, float]:
    """Those of which no seed stopped first, the nearest first; by reward where no distance is known."""
    value = floors(method)
    return bool(method["stopped"]), -(method["reward"]["mean"] or 0.0) if value is None else value


def mean_of_paths(method: Line) -> Mapping[str, float | None]:
    """The path KL of a method, which earlier lines do not have."""
    found: Mapping[str, float | None] = method.get("path_kl", {"mean": None, "error": None})
    return found


def more(method: Line, heads: Sequence[str]) -> list[str]:
    """The cells of a method in columns that not all tables have: its path KL, and rewards that were held out."""
    if method["stopped"]:
        return [""] * len(heads)
    return [shown(mean_of_paths(method) if head == "path KL" else method["held_out"][head]) for head in heads]


def row(method: Line) -> list[str]:
    """The cells of a method."""
    name, stopped, value = f"`{method['method']}`", len(method["stopped"]), floors(method)
    if stopped:
        words = f"{stopped} of {stopped + method['n']} seeds stopped: a number was not finite"
        return [name, words, *[""] * (len(COLUMNS) - 1)]
    return [
        name,
        shown(method["distance"]),
        "–" if value is None else f"{value:.1f}" if value < HUGE else large(value),
        shown(method["points"][0]["distance"]),
        *(shown(method[key]) for key in ("reward", "achieved_tilt", "diversity")),
        f"{method['steps']:,.0f}",
        f"{method['reward_evaluations']['mean']:,.0f}",
        f"{method['learning_rate']:.2g}",
    ]


def steered(line: Line) -> Iterator[str]:
    """The table of what needs no training, the nearest first."""
    yield f"**{line['subject']}**, {size(line)}; costs are those of a sample."
    yield ""
    rows = (
        [
            f"`{each['method']}`",
            each["aims_at"],
            shown(each["distance"]),
            f"{floors(each):.1f}",
            shown(each["reward"]),
            f"{each['network_evaluations']:,.0f}",
            f"{each['reward_evaluations']:,.1f}",
        ]
        for each in sorted(line["methods"], key=order)
    )
    yield from markdown(OF_STEERING, rows)


def shown(number: Mapping[str, float | None]) -> str:
    """Mean ± standard error; of what ran away the size."""
    mean, error = number["mean"], number["error"]
    if mean is None:
        return "–"
    return large(mean) if abs(mean) >= HUGE else decimal(mean, error)


def large(number: float) -> str:
    """A number by its size: 3.2e16 is 3·10^16."""
    digit, _, power = f"{number:.0e}".partition("e")
    return f"{digit}·10^{int(power)}".replace("-", "−")


def markdown(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


# ---- which method for which reward ----


def which_method(lines: Sequence[Line], docs: str) -> str:
    """The table of all methods: what a method needs, the law that it aims at, and where it ended, in floors.

    Args:
        docs: the way to the docs from the page that it is on.
    """
    known = {line["comparison"]: line for line in lines}
    columns = [known[name] for name in SHOWN if name in known]
    heads = ["your reward", "method", "aims at", *(f"{SHOWN[each['comparison']]}, {each['dimension']}-d" for each in columns)]
    rows = []
    for name in own_names("methods"):
        method = find("methods", name)()
        law, any_reward = method.target(1).reaches, not method.needs.reward_gradient
        cells = [ended(line, name) for line in columns]
        words = ["any" if any_reward else "differentiable", link(name, docs), LAWS[law], *cells]
        rows.append((any_reward, list(LAWS).index(law), rank(cells), words))
    table_of_all = "\n".join(markdown(heads, (words for *_, words in sorted(rows))))
    return f"{table_of_all}\n\n{CAPTION.format(page=docs + 'scoreboard.md')}"


def link(name: str, docs: str) -> str:
    """A method with a link to its page and its paper, as docs/methods.md has them."""
    found = re.search(rf"^\| `{name}` \| (\S+) \|.*\]\((.*)\) \|$", METHODS.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, name
    paper, page = found.groups()
    return f"[`{name}`]({docs}{page})" + ("" if paper == "–" else f" (arXiv {paper})")


def ended(line: Line, name: str) -> str:
    """Where a method ended, in floors: away, where that is further than the base or it stopped; empty where it is not known."""
    found = next((method for method in line["methods"] if method["method"] == name), None)
    if found is None:
        return ""
    value, base = floors(found), line["references"]["distance_base"]
    if found["stopped"]:
        return "away"
    return "" if value is None else "away" if found["distance"]["mean"] > base else f"{value:.1f}"


def rank(cells: Sequence[str]) -> float:
    """To sort by: the mean of the floors, away being very many; what was not measured at all comes last."""
    known = [1e3 if cell == "away" else float(cell) for cell in cells if cell]
    return sum(known) / len(known) if known else 1e6


# ---- pages ----


def filled(text: str, begin: str, end: str, content: str) -> str:
    """A page with other content between two markers. Raises ValueError where it lacks them."""
    before, found, rest = text.partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        raise ValueError(f"there are no {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def pages() -> dict[Path, str]:
    """The pages with their tables as they are now; a README without markers stays as it is."""
    lines, text, readme = read(), PAGE.read_text(encoding="utf-8"), README.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- scoreboard: (\S+) begin -->", text):
        text = filled(text, f"<!-- scoreboard: {name} begin -->", f"<!-- scoreboard: {name} end -->", block(name, lines))
    begin, end = "<!-- methods: begin -->", "<!-- methods: end -->"
    text = filled(text, begin, end, which_method(lines, ""))
    return {PAGE: text, README: filled(readme, begin, end, which_method(lines, "docs/")) if begin in readme else readme}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into the pages")
    commands = parser.add_subparsers(dest="what")
    commands.add_parser("add").add_argument("folders", nargs="+", type=Path)
    commands.add_parser("steer").add_argument("problem")
    given: Any = parser.parse_args(arguments)
    if given.what == "add":
        for folder in given.folders:
            add(folder)
    elif given.what == "steer":
        steer(given.problem, ())
    else:
        for path, text in pages().items():
            path.write_text(text, encoding="utf-8") if given.write else print(text)


if __name__ == "__main__":
    main()
