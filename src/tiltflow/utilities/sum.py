"""The weighted sum of several utilities: a reward, and a price of what else matters of the law."""

# Mutation tests: test_utilities.py

from __future__ import annotations

import functools
import operator
from typing import Literal, Self

from pydantic import field_validator

from tiltflow.evaluation.estimates import Estimate
from tiltflow.settings import Settings
from tiltflow.utilities import NamedUtility, Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation
from tiltflow.utilities.estimation.known import Known, Need


class Term(Settings):
    """One utility and its weight in the sum."""

    utility: NamedUtility
    """Any of the utilities."""
    weight: float = 1.0
    """Units of the sum per unit of this utility; below 0 it is made low."""


class Sum(Utility):
    """weight_1 F_1 + weight_2 F_2 + .., each of the same law; utilities that name the same reward share it."""

    name: Literal["sum"] = "sum"
    utilities: tuple[Term, ...]
    """The terms, each with `utility` (a name, or a mapping with a name) and `weight`: at least one."""

    @field_validator("utilities")
    @classmethod
    def _some(cls, utilities: tuple[Term, ...]) -> tuple[Term, ...]:
        if not utilities:
            raise ValueError("needs at least one term, for example [{utility: expected-reward}]")
        return utilities

    @property
    def words(self) -> str:
        return " + ".join(f"{term.weight:g} × ({term.utility.words})" for term in self.utilities)

    @property
    def reward_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for term in self.utilities for name in term.utility.reward_names))

    @property
    def needs(self) -> tuple[Need, ...]:
        return tuple(dict.fromkeys(need for term in self.utilities for need in term.utility.needs))

    @property
    def value_needs(self) -> tuple[Need, ...]:
        return tuple(dict.fromkeys(need for term in self.utilities for need in term.utility.value_needs))

    @property
    def concave(self) -> bool:
        return all(term.utility.concave and term.weight >= 0 for term in self.utilities)

    def caveats(self, alpha: float) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each for term in self.utilities for each in term.utility.caveats(alpha)))

    def after(self, at: Known) -> Self:
        terms = tuple(term.model_copy(update={"utility": term.utility.after(at)}) for term in self.utilities)
        return self.model_copy(update={"utilities": terms})

    def _value(self, at: Known) -> Estimate:
        """The error is at most the sum of those of the terms, whose samples are the same."""
        values = [(term.weight, term.utility.value(at)) for term in self.utilities]
        error = sum(abs(weight) * each.standard_error for weight, each in values)
        return Estimate(sum(weight * each.value for weight, each in values), error)

    def _first_variation(self, at: Known) -> FirstVariation:
        return functools.reduce(operator.add, (term.utility.first_variation(at) * term.weight for term in self.utilities))
