"""A comparison of methods, into one folder: rows.jsonl, of which each line is a training, comparison.json and report.html.

compare.yaml     the plan: the same one again, or one of more methods, problems, recipes or seeds, goes on
rows.jsonl       a line for each training that is done, and for each look at what a step costs
comparison.json  the table: means over seeds, and differences to the best
report.html      the same, with curves and pictures, made from the folder alone
pictures/        of samples of problems of one or two numbers, of seed 0
runs/            of recipes, the evaluation of seed 0, each with its own report
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tiltflow.errors import InputError, TiltflowError
from tiltflow.files import append_row, reason, write_json, write_rows
from tiltflow.reports.comparison import write_comparison_report
from tiltflow.runs.comparison.budget import Budget, Cost
from tiltflow.runs.comparison.plan import FACTORS, MOST_SEEDS, SHARE_OF_TUNING, Plan
from tiltflow.runs.comparison.results import best_factor, results
from tiltflow.runs.comparison.subject import Chosen, Subject
from tiltflow.runs.comparison.training import Job, Moved, key_of, nowhere, work
from tiltflow.runs.jobs import run_all
from tiltflow.runs.lock import working_in
from tiltflow.runs.run_files import claim, write_yaml
from tiltflow.settings import read_yaml

PLAN, ROWS, RESULT = "compare.yaml", "rows.jsonl", "comparison.json"
Watch = Callable[[str, str, float], None]
"""Is told the title of each job, how it ended, and the part of a whole training that it was, 0 for a look at costs."""
Moving = Callable[[str, float, float], None]
"""Is told the title of the job that is under way, the share of its budget that is spent, and the part of a whole training that
it is; where there is one process."""
Row = dict[str, Any]
R = TypeVar("R", covariant=True)


class Work(Protocol[R]):
    """Work on a job; `moved` is told how far it is."""

    def __call__(self, job: Job, moved: Moved = nowhere, /) -> R: ...


def compare(
    plan: Plan,
    folder: Path,
    *,
    processes: int = 1,
    device: str = "cpu",
    watch: Watch = lambda title, what, part: None,
    moving: Moving = lambda title, share, part: None,
) -> dict[str, Any]:
    """Run what is missing, and write the results. Returns the content of comparison.json, with `failed`, the errors of
    trainings that could not be done, by title: the next call tries them again.

    Raises InputError, before anything is trained, if a method does not fit, one step of it costs more than the budget, or the
    folder holds something else.
    """
    with working_in(folder):
        known = folder / PLAN
        if not known.exists():
            claim(folder)
        elif not continues(read_yaml(known), plan.as_tree()):
            raise InputError(
                f"{folder}: holds another comparison; give a new --output, or the methods, budget and settings of {known}"
            )
        table = Rows(folder, plan, processes, device, watch, moving)
        for subject, chosen in table.pairs():
            subject.admit(chosen)
        costs = table.costs()
        write_yaml(known, plan.as_tree())
        table.run(table.tunings(costs))
        table.run(table.trainings(costs))
        found = results(plan, table.rows) | {"failed": table.failed}
        write_json(folder / RESULT, found)
        write_comparison_report(folder)
        return found


def continues(before: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """True if a plan has all of an earlier one, with the same settings, and perhaps more methods, subjects and seeds.

    >>> old = {"methods": {"a": []}, "subjects": {"s": {}}, "seeds": 2, "budget": {"amount": 1}, "tune": "none"}
    >>> continues(old, old | {"seeds": 3}), continues(old, old | {"seeds": 1}), continues(old, old | {"tune": "learning-rate"})
    (True, False, False)
    """
    plan = json.loads(json.dumps(plan))
    try:
        same = all(before[key] == plan[key] for key in ("budget", "tune"))
        parts = all(before[key][name] == plan[key].get(name) for key in ("methods", "subjects") for name in before[key])
        return bool(same and parts and before["seeds"] <= plan["seeds"])
    except (KeyError, TypeError, AttributeError):
        return False


class Rows:
    """The rows of a comparison, and the running of those that are missing."""

    def __init__(self, folder: Path, plan: Plan, processes: int, device: str, watch: Watch, moving: Moving):
        self.folder, self.plan, self.processes, self.device = folder, plan, processes, device
        self.watch, self.moving = watch, moving
        self.rows = read_known(folder / ROWS)
        self.failed: dict[str, str] = {}

    @property
    def by_key(self) -> dict[tuple[str, str, str, float, int], Row]:
        """The rows, by the key of their job."""
        return {key_of(row): row for row in self.rows}

    def pairs(self) -> list[tuple[Subject, Chosen]]:
        """Each subject with each method."""
        methods = [Chosen(name, settings) for name, settings in self.plan.methods.items()]
        return [(subject, chosen) for subject in self.plan.subjects for chosen in methods]

    def job(self, purpose: str, subject: Subject, chosen: Chosen, budget: Budget, cost: Cost | None = None) -> Job:
        """A job in this folder."""
        return Job(purpose, subject, chosen, budget, self.folder, self.device, cost)

    def costs(self) -> dict[tuple[str, str], Cost]:
        """What steps cost, by subject and method; measured where it is not known yet, and written once all are known to fit.

        Raises InputError if a method does not fit or one step costs more than the budget, or the part of it that a candidate of
        tuning gets.
        """
        jobs = [self.job("cost", subject, chosen, self.plan.budget) for subject, chosen in self.pairs()]
        known = self.by_key
        new = []
        for job, row in run_all(self.told(work), [job for job in jobs if job.key not in known], self.processes):
            new.append(row)
            steps = Cost(**row["cost"]).steps_within(self.plan.budget.amount)
            self.watch(job.title, f"{steps:,} steps are within {self.plan.budget}", part_of(job))
        rows = known | {key_of(row): row for row in new}
        found = {}
        for job in jobs:
            cost = Cost(**rows[job.key]["cost"])
            least = self.plan.budget.share(1.0 if self.plan.tune == "none" else SHARE_OF_TUNING)
            of_tuning = "" if self.plan.tune == "none" else ", for a candidate of tuning"
            cost.require(least, f"{job.subject.name} by {job.chosen.name}{of_tuning}")
            found[job.subject.name, job.chosen.name] = cost
        for row in new:
            self.add(row)
        return found

    def tunings(self, costs: Mapping[tuple[str, str], Cost]) -> list[Job]:
        """The trainings of all candidates."""
        if self.plan.tune == "none":
            return []
        budget = self.plan.budget.share(SHARE_OF_TUNING)
        return [
            self.job("tuning", s, replace(c, factor=factor, seed=MOST_SEEDS), budget, costs[s.name, c.name])
            for s, c in self.pairs()
            for factor in FACTORS
        ]

    def trainings(self, costs: Mapping[tuple[str, str], Cost]) -> list[Job]:
        """The trainings that are compared, at the learning rates that were chosen; all methods of a seed before the next."""
        chosen = [(s, replace(c, factor=best_factor(self.rows, s.name, c.name))) for s, c in self.pairs()]
        return [
            self.job("run", s, replace(c, seed=seed), self.plan.budget, costs[s.name, c.name])
            for seed in range(self.plan.seeds)
            for s, c in chosen
        ]

    def run(self, jobs: Sequence[Job]) -> None:
        """Run those that have no row yet."""
        known = self.by_key
        for job in jobs:
            if job.key in known:
                self.watch(job.title, "already done", part_of(job))
        todo = [job for job in jobs if job.key not in known]
        for job, row in run_all(self.told(attempt), todo, self.processes):
            if isinstance(row, str):
                self.failed[job.title] = row
                self.watch(job.title, row, part_of(job))
            else:
                self.add(row)
                self.watch(job.title, in_words(row), part_of(job))

    def told(self, do: Work[R]) -> Callable[[Job], R]:
        """The work on a job that says how far it is, where it is not in another process."""
        if self.processes > 1:
            return do
        return lambda job: do(job, lambda share: self.moving(job.title, share, part_of(job)))

    def add(self, row: Row) -> None:
        """One more row, written at once."""
        append_row(self.folder / ROWS, row)
        self.rows.append(row)


def attempt(job: Job, moved: Moved = nowhere) -> Row | str:
    """The row of a job, or the error that it ended with."""
    try:
        return work(job, moved)
    except TiltflowError as error:
        return str(error)


def part_of(job: Job) -> float:
    """The part of a whole training that a job is."""
    return {"cost": 0.0, "tuning": SHARE_OF_TUNING}.get(job.purpose, 1.0)


def units(plan: Plan) -> float:
    """All jobs of a plan, in whole trainings."""
    pairs = len(plan.methods) * len(plan.subjects)
    return pairs * (plan.seeds + (0 if plan.tune == "none" else SHARE_OF_TUNING * len(FACTORS)))


def trainings(plan: Plan) -> int:
    """How many trainings a plan has, those of tuning with them."""
    return len(plan.methods) * len(plan.subjects) * (plan.seeds + (0 if plan.tune == "none" else len(FACTORS)))


def in_words(row: Mapping[str, Any]) -> str:
    """How a training ended."""
    if row["stopped"] is not None:
        return f"stopped: {row['stopped']}"
    point = row["points"][-1]
    distance = "" if point["distance"] is None else f", distance {point['distance']:.3f} (floor {point['floor']:.3f})"
    return f"reward {point['reward']:.3f}{distance}, {row['steps']} steps, {row['seconds']:.0f} s"


def read_known(path: Path) -> list[Row]:
    """The intact rows of a file; a line that was cut off is taken out of it.

    Raises InputError if it cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    rows = [row for line in lines if (row := parsed(line)) is not None]
    if lines and (lines[-1] or len(rows) < len(lines) - 1):
        write_rows(path, rows)
    return rows


def parsed(line: bytes) -> Row | None:
    """The row of a line; None if it is damaged."""
    try:
        row = json.loads(line)
        key_of(row)
    except (ValueError, KeyError, TypeError):
        return None
    return row if isinstance(row, dict) else None
