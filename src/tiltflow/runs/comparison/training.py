"""One training of a comparison: what a step costs, training within a budget, and measurements on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tiltflow.errors import CollapseError, NonFiniteError
from tiltflow.laws.target import TILTED
from tiltflow.runs.comparison.budget import MOST_TRIED, TRIED, Budget, Cost, Meter, Spent
from tiltflow.runs.comparison.subject import Chosen, Subject, Trial
from tiltflow.training.trainer import BatchEnd

SHARES = (0.25, 0.5)
"""Of the budget, at which a training is measured on its way."""


@dataclass(frozen=True)
class Job:
    """One training, or the look at its cost.

    Args:
        purpose: cost; tuning, of a learning rate; run, one that is compared.
        budget: of this training, which for tuning is a part of the whole.
        cost: of its steps, where that is known.
        keep: the folder of the comparison.
    """

    purpose: str
    subject: Subject
    chosen: Chosen
    budget: Budget
    keep: Path
    device: str = "cpu"
    cost: Cost | None = None

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What tells it from all others of a comparison. The learning rate of what is compared follows from the tuning."""
        factor = self.chosen.factor if self.purpose == "tuning" else 1.0
        return self.purpose, self.subject.name, self.chosen.name, factor, self.chosen.seed

    @property
    def title(self) -> str:
        """For people."""
        what = {"cost": "cost of a step", "tuning": f"learning rate x {self.chosen.factor:.3g}"}
        return f"{self.subject.name}, {self.chosen.name}, {what.get(self.purpose, f'seed {self.chosen.seed}')}"


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str, float, int]:
    """The `Job.key` of a row. Raises KeyError and TypeError for what is no row."""
    factor = float(row["factor"]) if row["purpose"] == "tuning" else 1.0
    return row["purpose"], row["subject"], row["method"], factor, int(row["seed"])


Moved = Callable[[float], None]


def nowhere(share: float) -> None:
    """Told how far a job is, does nothing."""


def work(job: Job, moved: Moved = nowhere) -> dict[str, Any]:
    """The row of a job; `moved` is told the share of its budget that is spent, from 0 on.

    Raises InputError if the method does not fit, and what else training raises but numbers that are not finite, and weights
    that have collapsed: these are how a method can fail, and the row says so.
    """
    moved(0.0)
    head = {
        "purpose": job.purpose,
        "subject": job.subject.name,
        "method": job.chosen.name,
        "seed": job.chosen.seed,
        "factor": job.chosen.factor,
    }
    if job.purpose == "cost":
        trial = job.subject.trial(job.chosen, job.device)
        return head | {"cost": asdict(cost_of(trial, job.budget)), "aims_at": aim(trial, job.subject.law)}
    assert job.cost is not None
    steps = job.cost.require(job.budget, f"{job.subject.name} by {job.chosen.name}")
    trial = job.subject.trial(replace(job.chosen, steps=steps), job.device)
    keep = job.keep if job.purpose == "run" and job.chosen.seed == 0 else None
    return head | {"learning_rate": trial.learning_rate, "steps_planned": steps} | trained(trial, job, keep, moved)


def aim(trial: Trial, law: str) -> str:
    """What a method aims at, in words: `law`, that of the subject, where it is the tilted law as far as the method knows."""
    target = trial.method.target(100, trial.start)
    beta = "" if target.beta is None or target.maximises else f", beta = {target.beta:g}"
    words = f"{law if target.words == TILTED else target.words}{beta}"
    return words if target.reaches != "none" or target.maximises else f"no law ({words})"


def cost_of(trial: Trial, budget: Budget) -> Cost:
    """What optimizer steps cost, of the first few."""
    meter, spent, passes = Meter(), list[float](), trial.method.needs.passes
    count = max(TRIED, passes + 1) if passes <= MOST_TRIED else TRIED
    with meter, closing(trial.loop(lambda end: None)) as records:
        for record in islice(records, count):
            spent.append(meter.see(record).of(budget.kind))
    return Cost.measured(spent, passes)


def trained(trial: Trial, job: Job, keep: Path | None, moved: Moved) -> dict[str, Any]:
    """Train within the budget, and measure. Returns the entries of the row that say how it went."""
    assert job.cost is not None
    looks = Looks(trial, job.budget, SHARES if job.purpose == "run" else ())
    steps, stopped, last = 0, None, Spent()
    try:
        with looks.meter, closing(trial.loop(looks.on_batch_end)) as records:
            for record in records:
                steps, last = record.step, looks.meter.see(record)
                moved(min(last.of(job.budget.kind) / job.budget.amount, 1.0))
                if last.of(job.budget.kind) + job.cost.next(steps) > job.budget.amount:
                    break
        measured = trial.measure(keep, whole=job.purpose == "run")
        looks.points.append({"share": 1.0, **asdict(last), **measured})
    except (NonFiniteError, CollapseError) as error:
        stopped = str(error)
    return {"steps": steps, **asdict(last), "stopped": stopped, "points": looks.points}


class Looks:
    """Measures a training on its way, after the last batch that ends within each share of the budget."""

    def __init__(self, trial: Trial, budget: Budget, shares: Sequence[float]):
        self.trial, self.budget, self.meter = trial, budget, Meter()
        self.before, self.waiting = 0.0, list(shares)
        self.points: list[dict[str, Any]] = []

    def on_batch_end(self, end: BatchEnd) -> None:
        """Measure where this batch ends within a share, and the next one, if it costs as much, beyond it."""
        spent, amount = self.meter.spent, self.budget.amount
        now = spent.of(self.budget.kind)
        beyond, self.before = 2 * now - self.before, now
        due = [share for share in self.waiting if beyond > share * amount]
        self.waiting = [share for share in self.waiting if share not in due]
        within = [share for share in due if now <= share * amount]
        if within and not end.stopping:
            with self.meter.paused(), end.averaged():
                measured = self.trial.measure(None, whole=False)
            self.points.append({"share": within[0], **asdict(spent), **measured})
