"""What is compared: methods, problems and recipes, seeds, a budget, and the rule of tuning; checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tiltflow.errors import InputError, did_you_mean
from tiltflow.methods import MethodSettings
from tiltflow.plugins import find, names
from tiltflow.runs.comparison.budget import Budget
from tiltflow.runs.comparison.on_problem import OnProblem
from tiltflow.runs.comparison.on_recipe import OnRecipe
from tiltflow.runs.comparison.subject import Subject

Tuning = Literal["learning-rate", "none"]
TUNING: tuple[Tuning, ...] = ("learning-rate", "none")
FACTORS = (1.0, 1 / 3, 3.0)
"""Candidates of tuning, in units of the learning rate that the method has by default."""
SHARE_OF_TUNING = 0.25
"""The part of the budget that each candidate gets."""
MOST_SEEDS = 1000
"""The seed of tuning, which none that is compared is."""


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Args:
        methods: by name, each with its overrides `key=value`.
        seeds: how many, from 0 on.
    """

    methods: Mapping[str, tuple[str, ...]]
    subjects: tuple[Subject, ...]
    seeds: int
    budget: Budget
    tune: Tuning = "learning-rate"

    @classmethod
    def of(
        cls,
        methods: Sequence[str],
        problems: Sequence[str] = (),
        recipes: Sequence[str] = (),
        *,
        seeds: int,
        budget: Budget,
        tune: str = "learning-rate",
        beta: float | None = None,
        num_samples: int = 4000,
        settings: Sequence[str] = (),
    ) -> Plan:
        """Raises InputError, of one line, for what cannot be compared.

        Args:
            beta: temperature of the target law; 1 for problems and that of its own method for a recipe by default.
            num_samples: of each measurement on a problem.
            settings: overrides `NAME.key=value` of a method, a problem or a recipe.
        """
        for name in methods:
            known_method(name)
        refuse_unknown(problems, names("problems"), "problem")
        refuse_twice([*methods, *problems, *recipes])
        if not methods:
            raise InputError(f"compare: give methods to compare, such as --methods {','.join(names('methods')[:2])}")
        if not problems and not recipes:
            raise InputError(f"compare: give --problems, such as {names('problems')[0]}, or --recipes to compare them on")
        if not 1 <= seeds <= MOST_SEEDS:
            raise InputError(f"compare: --seeds must be 1 to {MOST_SEEDS}, is {seeds}")
        if beta is not None and beta <= 0:
            raise InputError(f"compare: --beta must be positive, is {beta:g}")
        if num_samples < 100:
            raise InputError(f"compare: --num-samples must be 100 or more, is {num_samples}")
        if tune not in TUNING:
            raise InputError(f"compare: --tune {tune}: must be one of {', '.join(TUNING)}{did_you_mean(tune, TUNING)}")
        own = of_names(settings, [*methods, *problems, *recipes])
        posed = [OnProblem(name, own[name], beta or 1.0, num_samples) for name in problems]
        for each in posed:
            each.check()
        read = [OnRecipe.named(name, own[name], beta) for name in recipes]
        subjects: list[Subject] = [*posed, *read]
        refuse_twice([each.name for each in subjects])
        return cls(
            {name: own[name] for name in methods}, tuple(subjects), seeds, budget, "none" if tune == "none" else "learning-rate"
        )

    def as_tree(self) -> dict[str, Any]:
        """All that the results depend on."""
        return {
            "methods": {name: list(settings) for name, settings in self.methods.items()},
            "subjects": {each.name: each.as_tree() for each in self.subjects},
            "seeds": self.seeds,
            "budget": {"kind": self.budget.kind, "amount": self.budget.amount},
            "tune": self.tune,
        }


def known_method(name: str) -> type[MethodSettings]:
    """The class of a method. Raises InputError, with the nearest name, if there is none."""
    try:
        found: type[MethodSettings] = find("methods", name)
    except InputError as error:
        raise InputError(f"compare: {error}") from None
    return found


def refuse_unknown(given: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise InputError for the first name that is not known."""
    for name in given:
        if name not in known:
            raise InputError(f"compare: there is no {what} {name!r}{did_you_mean(name, known)}")


def refuse_twice(given: Sequence[str]) -> None:
    """Raise InputError for a name that is given twice."""
    for name in given:
        if given.count(name) > 1:
            raise InputError(f"compare: {name!r} is there twice")


def of_names(settings: Sequence[str], known: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Overrides `NAME.key=value` by name.

    >>> of_names(["mixture.dimension=16", "draft.learning_rate=1e-3"], ["draft", "mixture"])["mixture"]
    ('dimension=16',)

    Raises InputError for one of no name, and for settings that the comparison itself makes.
    """
    found: dict[str, list[str]] = {name: [] for name in known}
    for text in settings:
        key, equals, value = text.partition("=")
        name = next((each for each in sorted(known, key=len, reverse=True) if key.startswith(f"{each}.")), None)
        if name is None or not equals:
            raise InputError(
                f"--set {text}: must read NAME.key=value, NAME one that is compared{did_you_mean(key.split('.')[0], known)}"
            )
        own = key.removeprefix(f"{name}.")
        if own.split(".")[-1] in MADE:
            raise InputError(f"--set {text}: {own} is {MADE[own.split('.')[-1]]}")
        found[name].append(f"{own}={value}")
    return {name: tuple(each) for name, each in found.items()}


MADE = {
    "beta": "that of the target law, for all methods: --beta",
    "seed": "that of the comparison: --seeds",
    "iterations": "as many as the budget has",
    "max_train_steps": "as many as the budget has",
}
"""Settings that a comparison makes, and how."""
