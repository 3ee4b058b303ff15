"""Methods on a problem with a known answer: the distance to exact samples of p_base exp(r / beta)."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.errors import InputError, NonFiniteError
from tiltflow.evaluation import achieved_tilt
from tiltflow.evaluation.distances import distances_to_law
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.evaluation.log_ratio import END
from tiltflow.evaluation.metrics.diversity import diversity, squared_distance
from tiltflow.evaluation.samples import Asked
from tiltflow.files import write_file
from tiltflow.laws.target import TILTED
from tiltflow.problems import Comparable, Exact
from tiltflow.problems.verification.exact_base import MOST
from tiltflow.problems.verification.verify import Verification, loop, read_verification
from tiltflow.reports.points import are_points, draw, frame
from tiltflow.rewards import Reward
from tiltflow.runs.comparison.subject import Chosen, OnBatchEnd, at_temperature, sampled_by
from tiltflow.samplers.rollout import sample
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn
from tiltflow.training.optimizer import fill_optimizer
from tiltflow.training.trainer import Record

PICTURES = "pictures"
FEWEST = 30
"""Samples of each group that a distance can be of."""
DRAWS = 4
"""Exact samples behind each distance and each floor."""


@dataclass(frozen=True)
class OnProblem:
    """A problem of `tiltflow verify`.

    Args:
        settings: overrides of the problem and of its run, `key=value`.
        num_samples: of each measurement.
    """

    name: str
    settings: tuple[str, ...] = ()
    beta: float = 1.0
    num_samples: int = 4000

    black_box = False
    """Rewards of problems have gradients."""

    @property
    def problem(self) -> Comparable:
        """The problem. Raises InputError for one that methods cannot be compared on, and for wrong settings."""
        return problem_of(read_verification(self.name, None, self.settings))

    @property
    def law(self) -> str:
        """See `Subject`."""
        return self.problem.law_in_words

    def check(self) -> None:
        """Raise InputError for a problem that methods cannot be compared on, for wrong settings, and for too few samples."""
        self.problem.tilted_sampler(self.beta)
        groups = self.problem.groups
        if self.num_samples < FEWEST * groups:
            raise InputError(
                f"compare: --num-samples must be {FEWEST * groups} or more for the {groups} observations of {self.name}, "
                f"is {self.num_samples}"
            )

    def read(self, chosen: Chosen) -> Verification:
        """The settings of a training, with the method's own optimizer filled in. Raises InputError for a method that cannot be
        trained on the problem."""
        of_run = (f"seed={chosen.seed}", f"iterations={chosen.steps}")
        settings = read_verification(self.name, chosen.name, [*self.settings, *chosen.settings, *of_run])
        method = at_temperature(settings.method, self.beta)
        problem_of(settings).admit(method)
        optimizer = fill_optimizer(method, settings.optimizer)
        scaled = optimizer.model_copy(update={"learning_rate": optimizer.learning_rate * chosen.factor})
        return settings.model_copy(update={"method": method, "optimizer": scaled})

    def admit(self, chosen: Chosen) -> None:
        """See `Subject`."""
        self.read(chosen)

    def trial(self, chosen: Chosen, device: str) -> ProblemTrial:
        """See `Subject`; always on the CPU."""
        return ProblemTrial(self, self.read(chosen))

    def as_tree(self) -> Mapping[str, Any]:
        """See `Subject`."""
        return {"settings": list(self.settings), "beta": self.beta, "num_samples": self.num_samples}


class ProblemTrial:
    """See `tiltflow.runs.comparison.subject.Trial`."""

    def __init__(self, subject: OnProblem, settings: Verification):
        self.subject, self.settings, self.problem = subject, settings, problem_of(settings)
        self.method, self.learning_rate = settings.method, settings.optimizer.learning_rate
        self.base, self.tuned = self.problem.base_flow(), self.problem.tuned_flow(settings.seed)

    @property
    def start(self) -> float:
        """See `Trial`."""
        return self.base.noise_time

    def loop(self, on_batch_end: OnBatchEnd) -> Generator[Record, None, None]:
        """See `Trial`."""
        return loop(self.settings, self.tuned, self.base, on_batch_end)

    @torch.no_grad()
    def measure(self, keep: Path | None, *, whole: bool) -> dict[str, Any]:
        """See `Trial`. Distances are sliced W2 to fresh exact samples; diversity is the Vendi score; of several groups both
        are means over these.

        Raises NonFiniteError if samples are not finite.
        """
        problem, seed, groups = self.problem, self.settings.seed, self.problem.groups
        count = self.subject.num_samples // groups * groups
        generator, exact = stream(seed, "evaluation"), problem.tilted_sampler(self.subject.beta)
        sampling = problem.sampling.model_copy(update=sampled_by(self.method))
        drawn = problem.draw(count, generator)
        drawn = drawn if isinstance(drawn, Drawn) else Drawn(drawn)
        reward = drawn.reward or problem.reward()
        x = sample(drawn.bind(self.tuned), drawn.x, sampling, generator, start=self.start).double()
        if not x.isfinite().all():
            raise NonFiniteError("samples of the tuned model are not finite")
        x_base = problem.base_sampler()(count, stream(seed, "base"))
        x_target = exact(count, stream(seed, "target"))
        found: dict[str, Any] = {
            **mean_estimate(reward(x)).named("reward"),
            "reward_base": reward(x_base).mean().item(),
            "reward_target": reward(x_target).mean().item(),
            **self._distances(x, x_base, exact),
        }
        size = count // groups
        scales = [squared_distance(x_base[group::groups], size) for group in range(groups)]
        for name, each in (("", x), ("_base", x_base), ("_target", x_target)):
            of_groups = (diversity(each[i::groups], Asked.of_samples(size), scale) for i, scale in enumerate(scales))
            found[f"diversity{name}"] = statistics.mean(of_group["vendi"] for of_group in of_groups)
        if whole:
            found |= self._tilt(x, drawn, reward)
        if keep is not None and groups == 1 and are_points(x):
            self._draw(keep / PICTURES / self.subject.name, x, x_base, x_target)
        return found

    def _distances(self, x: Tensor, x_base: Tensor, exact: Exact) -> dict[str, float]:
        """Distances to the target, of which `exact` draws, means over groups."""
        groups = self.problem.groups
        of_exact, directions = (stream(self.settings.seed, name) for name in ("exact", "directions"))
        found = [
            distances_to_law(
                [each[group::groups] for each in (x, x_base)],
                lambda n, generator, group=group: exact(n * groups, generator)[group::groups],  # type: ignore[misc]
                of_exact,
                directions=directions,
                draws=DRAWS,
            )
            for group in range(groups)
        ]
        return {
            "distance": statistics.mean(of_x.distance for of_x, _ in found),
            "floor": statistics.mean(of_x.floor for of_x, _ in found),
            "distance_base": statistics.mean(of_base.distance for _, of_base in found),
        }

    def _tilt(self, x: Tensor, drawn: Drawn, reward: Reward) -> dict[str, Any]:
        """The achieved tilt, and the KL to the target by it; unknown where the law is not the base tilted by the reward."""
        if self.subject.law != TILTED:
            return dict.fromkeys(achieved_tilt.KEYS)
        groups, times = self.problem.groups, self.problem.sampling.times(self.base.noise_time)
        some = torch.arange(min(MOST, len(x)) // groups * groups).reshape(-1, groups).T.flatten()  # one group after the other
        found = achieved_tilt.measure(
            drawn.bind(self.tuned).select(some),
            drawn.bind(self.base).select(some),
            x[some].float(),
            reward(x.float())[some].double() / self.subject.beta,
            stream(self.settings.seed, "achieved tilt"),
            groups=groups,
            start=times[0].item(),
            end=min(END, times[-2].item()),
        )
        return dict.fromkeys(achieved_tilt.KEYS) if found is None else found.entries()

    def _draw(self, folder: Path, x: Tensor, x_base: Tensor, x_target: Tensor) -> None:
        """Pictures of samples, all in the same frame: of seed 0 they are the same whatever the method."""
        folder.mkdir(parents=True, exist_ok=True)
        limits = frame([x_base, x_target])
        reward = self.problem.reward()
        for name, each, colour in (("base", x_base, "base"), ("target", x_target, "target"), (self.method.name, x, "tuned")):
            write_file(folder / f"{name}.png", draw(each, limits, colour, lambda points: reward(points.double())))


def problem_of(settings: Verification) -> Comparable:
    """The problem. Raises InputError for one that methods cannot be compared on."""
    if not isinstance(settings.problem, Comparable):
        raise InputError(
            f"compare: problem {settings.problem.name!r} has no law of its own that all methods can be measured by"
        )
    return settings.problem
