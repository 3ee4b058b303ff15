"""Settings of stages, an outer loop of tuning: `stages` of a recipe, and arguments of `tiltflow.stages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tiltflow.evaluation.estimates import Estimate
from tiltflow.runs.staged.of_law import EPS
from tiltflow.settings import Settings

Base = Literal["last", "first"]
COUNT, SIGNIFICANT = 5, 2.0
"""Stages by default; standard errors above 0 from which a rise of the utility is one."""


class Stop(Settings):
    """When stages end before their number is reached, by the utility and its rise in each."""

    min_rise: float | None = None
    """End after a stage in which the utility rises by less than this."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """End after so many stages in a row in which it does not rise by more than two standard errors."""

    value: float | None = None
    """End after a stage that brings the utility to this, or above."""

    def reason(self, rises: Sequence[Estimate], reached: Estimate) -> str | None:
        """Why to end after stages with these rises, at a utility that is `reached`; None to go on."""
        if self.value is not None and reached.value >= self.value:
            return f"the utility is {reached} after stage {len(rises)}, at least {self.value:g}"
        if self.min_rise is not None and rises[-1].value < self.min_rise:
            return f"the utility rose by {rises[-1]} in stage {len(rises)}, less than {self.min_rise:g}"
        last = rises[-self.patience :] if self.patience is not None else ()
        if last and len(last) == self.patience and not any(map(significant, last)):
            which = f"stage {len(rises)}" if len(last) == 1 else f"the {len(last)} stages up to stage {len(rises)}"
            return f"the utility did not rise significantly in {which}: by {', '.join(map(str, last))}"
        return None


def significant(rise: Estimate) -> bool:
    """Whether a rise is more than noise."""
    return rise.value > SIGNIFICANT * rise.standard_error


class Stages(Settings):
    """Stages, each of which tunes a model for the first variation of the utility at the last one."""

    count: Annotated[int, Field(ge=1)] | None = None
    """Number of stages: 5 by default, 1 of one_shot."""
    base: Base | None = None
    """What each stage starts from and keeps near: the last model, by default, with 1 / temperature as the step; or the first
    one, with the temperature of the method as the price of the KL from it."""
    price: Annotated[float, Field(ge=0)] = 0.0
    """Price of the KL from the first model, in units of the utility, where the base is the last one."""
    mixing: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Where the base is the first model, the share of the newest first variation in what a stage is tuned for; the rest is what
    the last stage was tuned for."""
    one_shot: bool = False
    """One stage from the first model, for the one reward whose tilt is best at the temperature of the method: of superquantile,
    cvar and optimal-design alone."""
    warm: bool = False
    """Where the base is the first model, begin the training of each stage with the weights of the last one, which leaves less
    to learn; the law that is aimed at is the same. Not for methods that count their law from where they begin."""
    num_samples: Annotated[int, Field(ge=2)] = 4000
    """Number of samples of each model that the utility is estimated from, all conditions in turn."""
    eps: Annotated[float, Field(gt=0, lt=1)] = EPS
    """Scores are those at the time 1 - eps: of samples with noise of the standard deviation eps / (1 - eps)."""
    stop: Stop | None = None
    """When stages end before their number is reached."""

    @model_validator(mode="after")
    def _fill_in(self) -> Stages:
        if why := misfit(self.count, self.base, self.price, self.mixing, self.one_shot, self.warm):
            raise ValueError(why)
        object.__setattr__(self, "count", self.count or (1 if self.one_shot else COUNT))
        object.__setattr__(self, "base", base_of(self.base, self.one_shot))
        return self


def base_of(base: Base | None, one_shot: bool) -> Base:
    """What stages start from, if `base` does not say."""
    return base or ("first" if one_shot else "last")


def misfit(count: int | None, base: Base | None, price: float, mixing: float, one_shot: bool, warm: bool = False) -> str | None:
    """Why settings of stages mean nothing together; None where they do."""
    base_, several = base_of(base, one_shot), count not in (None, 1)
    if one_shot and (base_ == "last" or several or mixing != 1):
        out = "base" if base_ == "last" else "count" if several else "mixing"
        return f"one_shot is one stage from the first model; leave {out} out"
    if base_ == "first" and price:
        return "from the first model the temperature of the method is the price of the KL; leave price out"
    if base_ == "last" and warm:
        return "warm is of stages from the first model; from the last one each begins with its weights; leave it out"
    if base_ == "last" and mixing != 1:
        return "mixing is of stages from the first model; from the last one a higher temperature damps"
    return None
