"""A utility of the law of a model: what must be known of the law is drawn from the model, and asked of its network."""

# Mutation tests: test_stages.py

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError, did_you_mean
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.log_ratio import ODE_STEPS, log_density
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.field import VelocityField, Which
from tiltflow.models.protocol import GenerativeModel
from tiltflow.plugins import find, names
from tiltflow.rewards import Metadata
from tiltflow.rewards.functions.checked import score
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import told
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.settings import Settings
from tiltflow.streams import stream
from tiltflow.training.method import Method
from tiltflow.training.settings import Training
from tiltflow.user_code import whole_number
from tiltflow.utilities import OneShot, Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, Surrogate, of_samples
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.estimation.scores import Score

MOST_DIMENSIONS = 64
"""Of samples of which the log ratio to the base is computed: each of 40 steps of the ODE takes as many backward passes."""
BATCH = 256
EPS = 0.02
"""Scores are asked for at the time 1 - EPS."""


@dataclass(frozen=True)
class OfLaw:
    """A utility of `tiltflow.utilities`, and what it is estimated from at the law of a model.

    Args:
        utility: its settings.
        reward, rewards: the reward that it is made of, or several by the names that it has for them, such as {"reward": ..,
            "cost": ..}; functions as `tiltflow.tune` takes them.
        num_samples: drawn of each model, all conditions in turn.
        eps: scores are those at the time 1 - eps: of samples with noise of the standard deviation eps / (1 - eps).
        sampling: how they are drawn; by default as the model says.
        reference: samples [m, *event] of a law that is to be near or far; by default as many of the first model.
        log_odds: log p(x | class) for each class, x -> [batch, classes], up to a number that is the same for all, such as the
            log-probabilities of a classifier; differentiable.

    Raises InputError for a reward that the utility does not have, and for one that is missing.
    """

    utility: Utility
    reward: Callable[..., Any] | None = None
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    num_samples: int = 4000
    eps: float = EPS
    sampling: Sampling | None = None
    reference: Tensor | None = None
    log_odds: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        given: Any = self.utility
        if not isinstance(given, Utility):
            raise InputError(f"OfLaw: utility must be the settings of one, such as Superquantile(share=0.01), is {given!r}")
        if self.reward is not None and "reward" in self.rewards:
            raise InputError("OfLaw: reward and rewards both give 'reward'; give it once")
        if why := misnamed(self.utility, self.named):
            raise InputError(f"OfLaw: {why}")
        for name, each in self.named.items():
            if isinstance(each, Settings):
                raise InputError(f"OfLaw: {name}: give what the settings build: {type(each).__name__}(..).build()")
            from_function(each, f"OfLaw: the reward for {name!r}")
        whole_number(self.num_samples, "OfLaw: num_samples", 2)
        check_sampling(self.sampling)
        if not 0 < self.eps < 1:
            raise InputError(f"OfLaw: eps must be above 0 and below 1, is {self.eps!r}")

    @property
    def named(self) -> dict[str, Callable[..., Any]]:
        """The rewards by name."""
        return {**({} if self.reward is None else {"reward": self.reward}), **self.rewards}

    def known(self, model: GenerativeModel, first: GenerativeModel, items: Sequence[Item], seed: int) -> Known:
        """What the utility needs of the law of `model`, the base being `first`.

        Args:
            items: what samples are asked for; none for a model without conditions.

        Raises InputError for what cannot be known of such a model.
        """
        needs = {*self.utility.needs, *self.utility.value_needs}
        scores = needs & {"score", "base_score", "log_ratio"}
        if scores:
            refuse_decoded(model, f"utility {self.utility.name}")
        asked = self.asked(items)
        draw = partial(_draw, items=asked, sampling=self.sampling)
        x = draw(model, stream(seed, "samples").initial_seed())
        ours = OfModel.of(model, 1 - self.eps, asked if items else ())
        theirs = OfModel.of(first, 1 - self.eps, asked if items else ())
        lifted = {name: from_function(each) for name, each in self.named.items()}
        reference = self.reference
        if reference is None and "reference" in needs:
            reference = draw(first, stream(seed, "reference").initial_seed())
        labels = [item.metadata["label"] for item in asked if "label" in item.metadata]
        return Known(
            x,
            reward=lifted,
            rewards={name: score(told(each, asked), x, BATCH, x.device) for name, each in lifted.items()},
            score=ours if scores else None,
            base_score=theirs if scores else None,
            log_ratio=LogRatio(ours, theirs) if "log_ratio" in needs and x[0].numel() <= MOST_DIMENSIONS else None,
            log_odds=self.log_odds,
            labels=torch.tensor(labels, device=x.device) if len(labels) == len(x) else None,
            reference=None if reference is None else reference.to(x),
            seed=stream(seed, "utility").initial_seed(),
        )

    def asked(self, items: Sequence[Item]) -> list[Item]:
        """What each sample is asked for."""
        return [(items or [Item("")])[i % max(1, len(items))] for i in range(self.num_samples)]

    def value(self, at: Known) -> Estimate:
        """The utility of the law, with its standard error."""
        return self.utility.value(at)

    def known_value(self, at: Known) -> Estimate | None:
        """The same, or None where it has none: behind a barrier, for example."""
        try:
            return self.value(at)
        except InputError:
            return None

    def first_variation(self, at: Known) -> FirstVariation:
        """The reward of a stage, at a law of which `known` has told. A log ratio that only the value needs is left out: methods
        would ask for it with every batch, and it costs much."""
        return self.utility.first_variation(at if "log_ratio" in self.utility.needs else replace(at, log_ratio=None))

    def one_shot(self, at: Known, alpha: float) -> FirstVariation:
        """The reward whose tilt of the law, at the temperature alpha, has the highest utility less alpha KL."""
        assert isinstance(self.utility, OneShot)  # `no_one_shot` has said so
        return self.utility.one_shot(at, alpha)


def misnamed(utility: Utility, given: Collection[str]) -> str | None:
    """Why rewards of these names are not those that a utility is made of; None where they are."""
    own = utility.reward_names
    for name in given:
        if name not in own:
            has = f"its rewards are {', '.join(own)}" if own else "it is made of none"
            return f"{utility.name} has no reward {name!r}{did_you_mean(name, own)}; {has}"
    missing = [name for name in own if name not in given]
    return f"{utility.name} needs a reward for {missing[0]!r}" if missing else None


def no_one_shot(utility: Utility, method: Method, training: Training) -> str | None:
    """Why no one reward of the first model is the best to tune for; None where one is."""
    if not isinstance(utility, OneShot):
        known = [name for name in names("utilities") if issubclass(find("utilities", name), OneShot)]
        return f"of {utility.name} no reward of one stage is known, but of {', '.join(known)}; leave it out"
    if method.temperature is None:
        return f"{method.name} has no temperature, the price of the KL that the reward is computed for; take another method"
    for name in ("calibration_samples", "target_kl"):
        if getattr(training, name):
            return f"the reward is computed for the temperature of the method, which training.{name} changes; leave it out"
    return None


def kl_variation(model: GenerativeModel, first: GenerativeModel, eps: float) -> FirstVariation:
    """The first variation of -KL(law of `model` | law of `first`): the gradient s_first - s, of scores at the time 1 - eps."""
    refuse_decoded(model, "a price of the KL beside the last model as the base")
    ours, theirs = OfModel.of(model, 1 - eps), OfModel.of(first, 1 - eps)
    return of_samples(Surrogate(theirs), valued=False) + of_samples(Surrogate(ours), valued=False) * -1


def refuse_decoded(model: GenerativeModel, what: str) -> None:
    """Raise InputError for a model whose samples are decoded: its field knows the score of its states."""
    if model.has_decoder:
        raise InputError(f"{what} needs scores of samples, and this model decodes its samples from states: it has none of them")


def _draw(model: GenerativeModel, seed: int, items: Sequence[Item], sampling: Sampling | None) -> Tensor:
    return model.draw(items, seed=seed, sampling=sampling).to(model.device)


@dataclass(frozen=True)
class OfModel:
    """The score of the law of a model, which can be asked for samples of any items.

    Args:
        field: the velocity of the model, bound to the conditions of the samples, if it has any.
        time: as of `Score`.
    """

    model: GenerativeModel
    time: float
    field: VelocityField

    @classmethod
    def of(cls, model: GenerativeModel, time: float, items: Sequence[Item] = ()) -> OfModel:
        """Of samples of these items, one for each; none for a model without conditions, and where `given` will tell."""
        condition = model.conditions(items)[0] if items else None
        return cls(model, time, model.flow if condition is None else model.flow.bind(condition))

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> OfModel:
        """The score of samples of these prompts."""
        more = metadata or [{} for _ in prompts]
        return OfModel.of(self.model, self.time, [Item(text, dict(each)) for text, each in zip(prompts, more, strict=True)])

    def select(self, which: Which) -> OfModel:
        """The score of these samples of the batch."""
        return replace(self, field=self.field.select(which))

    def __call__(self, x: Tensor) -> Tensor:
        with eval_mode(self.model.flow.network):
            return Score(self.field, self.time)(x)


@dataclass(frozen=True)
class LogRatio:
    """log p(x) / p_base(x), [batch], by the ODE of both fields."""

    ours: OfModel
    theirs: OfModel

    def __call__(self, x: Tensor) -> Tensor:
        with eval_mode(self.ours.model.flow.network, self.theirs.model.flow.network):
            return log_density(self.ours.field, x, ODE_STEPS) - log_density(self.theirs.field, x, ODE_STEPS)

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> LogRatio:
        """The ratio for samples of these prompts."""
        return LogRatio(self.ours.given(prompts, metadata), self.theirs.given(prompts, metadata))

    def select(self, which: Which) -> LogRatio:
        """The ratio for these samples of the batch."""
        return replace(self, ours=self.ours.select(which), theirs=self.theirs.select(which))
