r"""Stages: an outer loop of tuning, for a utility of the whole law.

A reward is a number of each sample. A utility U is one of the law p: its diversity, its distance to another law, the reward of
its worst tenth. Near p_k it is linear, with the slope r_k = dU/dp (p_k), its first variation, which is a reward. One stage
tunes the last model for r_k and keeps near it, at the temperature beta of its method:

    p_{k+1} = argmax_q E_q[r_k] - beta KL(q || p_k),      p_{k+1}(x) proportional to p_k(x) exp(r_k(x) / beta),

which is mirror ascent on U with the step 1 / beta (arXiv 2511.22640). If U is the mean of a reward, r_k is that reward in every
stage, and K stages at the temperature K beta are one tilt of p_0 at beta.

With a price alpha of the KL from the first model, U - alpha KL(p || p_0), there are two ways to the same laws. The base is the
last model, and r_k is dU/dp - alpha log(p_k / p_0), known by the gradient of its second term alone, of scores of both networks.
Or the base is the first model and beta = alpha, so that the KL is exact and no score is asked for: each stage goes from p_0 to

    p_{k+1}(x) proportional to p_0(x) exp(g_k(x) / alpha),    g_k = (1 - w) g_{k-1} + w r_k,    g_0 = 0,

where the mixing w damps what would be a fixed-point iteration at w = 1. It is a stage from the last model at beta = alpha / w.
"""

# Mutation tests: test_stages.py

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast, get_args, runtime_checkable

from torch import nn

from tiltflow.api import Condition, check_arguments, items_of, tune
from tiltflow.errors import InputError, did_you_mean
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.settings import Evaluation
from tiltflow.flows.adapter import has_adapter
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.runs.fingerprints import of_network
from tiltflow.runs.staged.folder import StagesFolder
from tiltflow.runs.staged.of_law import EPS, OfLaw, kl_variation, no_one_shot
from tiltflow.runs.staged.settings import Base, Stop, base_of, misfit
from tiltflow.streams import stream
from tiltflow.training.callbacks import Callback
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.settings import Training
from tiltflow.user_code import explained, whole_number
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known

M = TypeVar("M", bound=GenerativeModel)
Of = TypeVar("Of", bound=GenerativeModel, contravariant=True)


@runtime_checkable
class Utility(Protocol[Of]):
    """A utility of the law of a model."""

    def first_variation(self, model: Of, seed: int, /) -> Callable[..., Any]:
        """dU/dp (p) at the law p of `model`, up to a constant: a reward as `tiltflow.tune` takes it. `seed` is for the samples
        that it draws."""
        ...


@dataclass(frozen=True)
class Stage(Generic[M]):
    """What a stage has made.

    Args:
        number: from 1.
        model: the tuned model, and the base of the next stage if that is the last one.
        reward: what it was tuned for: the first variation, with the price of the KL, or mixed with earlier ones.
        before, after: the utility at the model before and after, from other samples; None where its value is not known.
        stopped: why this is the last stage, if the utility says so.
    """

    number: int
    model: M
    reward: Callable[..., Any]
    before: Estimate | None = None
    after: Estimate | None = None
    stopped: str | None = None

    @property
    def rise(self) -> Estimate | None:
        """What the stage has added to the utility."""
        if self.before is None or self.after is None:
            return None
        return Estimate(self.after.value - self.before.value, math.hypot(self.before.standard_error, self.after.standard_error))


def stages(
    model: M,
    utility: OfLaw | Utility[M],
    method: Any,
    training: Training | None = None,
    *,
    count: int,
    base: Base | None = None,
    price: float = 0.0,
    mixing: float = 1.0,
    one_shot: bool = False,
    warm: bool = False,
    stop: Stop | None = None,
    optimizer: Optimizer | None = None,
    conditions: Sequence[Condition] | None = None,
    callbacks: Sequence[Callback] = (),
    evaluation: Evaluation | None = None,
    output: str | Path | None = None,
    description: str = "",
    note: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
    handle_signals: bool = False,
    seed: int = 0,
) -> Generator[Stage[M], None, None]:
    """Yield a `Stage` after each of `count` stages: `tune` of a model for the first variation of `utility` at the last one.

    The whole network is trained, in a copy: of a pipeline too. Two calls with the same seed give the same models.

    Args:
        utility: one of `tiltflow.utilities` with what it is estimated from, `OfLaw`; or one of your own, `Utility`.
        method, training, optimizer, conditions: of each stage, as in `tune`; the temperature is that of one stage.
        base: what each stage starts from and keeps near: the last model, by default, with 1 / temperature as the step; or the
            first one, with the temperature as the price of the KL from it.
        price: of the KL from the first model, in units of the utility, where the base is the last one.
        mixing: where the base is the first model, the share of the newest first variation in what a stage is tuned for, above 0
            and at most 1; the rest is what the last stage was tuned for.
        one_shot: in one stage from the first model, tune for the one reward whose tilt is best at the temperature of the
            method, `utility.one_shot`, of utilities that are `OneShot`.
        warm: where the base is the first model, begin the training of each stage with the weights of the last one, which leaves
            less to learn; the law that is aimed at is the same.
        stop: when to end earlier.
        callbacks: called with every record of every stage; one that returns True ends its stage.
        evaluation: what is measured after each stage, for its report in `output`.
        output: a folder, new or empty, for a run of each stage, stages.json and a report (`tiltflow.runs.staged.folder`). With
            Training(resume_from_checkpoint="latest") a call goes on with the stages there, bit for bit: those that are finished
            are loaded, and the one that was being trained goes on from its last checkpoint.
        description: what the stages are for, in the report.
        note: is told what a person should know, as by `tune`, and the caveats of the utility before the first step.
        progress, handle_signals: of each stage, as in `tune`.

    Raises InputError for a model with an adapter, which cannot be both the base and what is trained; for a first variation that
    the method cannot use; and what `tune` raises.
    """
    if isinstance(model, GenerativeModel) and has_adapter(model.flow.network):
        raise InputError(
            "stages: the base of a stage is an earlier model, and this one has an adapter, which would be trained in place;"
            " merge it into the network first (merge_and_unload of peft)"
        )
    if isinstance(utility, type) or not isinstance(utility, OfLaw | Utility):
        raise InputError(
            "stages: utility must have first_variation(model, seed) -> reward, or be OfLaw(Superquantile(..), reward=..) or the"
            f" like, is {utility!r}"
        )
    count, seed = whole_number(count, "stages: count", 1), whole_number(seed, "stages: seed")
    base = checked_base(count, base, price, mixing, one_shot, warm)
    check_arguments(model, lambda x: x, method, training, None)
    given = training or Training()
    if one_shot:
        if not isinstance(utility, OfLaw):
            raise InputError("stages: one_shot asks for what is known of the law, which OfLaw(..) tells alone")
        if why := no_one_shot(utility.utility, method, given):
            raise InputError(f"stages: one_shot: {why}")
    alpha: float = price if base == "last" else method.temperature or 0.0
    caveats = utility.utility.caveats(alpha) if isinstance(utility, OfLaw) else ()
    items = items_of(model, conditions, given)
    if stop is not None and not isinstance(utility, OfLaw):
        raise InputError("stages: stop asks for the value of the utility, which is known of OfLaw(..) alone")

    def loop(place: StagesFolder | None = None) -> Generator[Stage[M], None, None]:
        last, own, mixed, rises = model, utility, None, list[Estimate]()
        for caveat in caveats:
            note(caveat)
        at = law(own, last, 1)
        before = known_value(own, at)
        for number in range(1, count + 1):
            reward = slope(own, last, at, number)
            if mixing < 1:
                mixed = lifted(reward) * mixing if mixed is None else lifted(reward) * mixing + mixed * (1 - mixing)
                reward = mixed
            check_reward(reward, method, training)
            last = tuned(place, model if base == "first" else last, last if warm else None, reward, number)
            at = law(own, last, number + 1)
            stage = Stage(number, last, reward, before, known_value(own, at))
            rises += [] if stage.rise is None else [stage.rise]
            if stop is not None and stage.after is not None and stage.rise is not None:
                stage = replace(stage, stopped=stop.reason(rises, stage.after))
            if place is not None:
                place.add(number, {"before": stage.before, "after": stage.after, "rise": stage.rise}, stage.stopped)
            yield stage
            if stage.stopped is not None:
                note(stage.stopped)
                return
            if isinstance(own, OfLaw) and at is not None:
                adapted = replace(own, utility=own.utility.after(at))
                before = stage.after if adapted.utility == own.utility else known_value(adapted, at)
                own = adapted

    def tuned(place: StagesFolder | None, from_: M, start: M | None, reward: Callable[..., Any], number: int) -> M:
        """The model of a stage, trained from a base and, if it is another, a start, or loaded if it is there."""
        own_seed, folder, more, loop_of = stream(seed, "stage", number).initial_seed(), None, callbacks, training
        if place is not None:
            if place.finished(number):
                return place.load(number, from_, given, own_seed)
            folder, more = place.folder(number), [place.begun, *callbacks]
            if not folder.exists():
                loop_of = given.model_copy(update={"resume_from_checkpoint": None})
        return tune(
            from_,
            reward,
            method,
            loop_of,
            optimizer=optimizer,
            conditions=conditions,
            adapter=None,
            start=start,
            evaluation=evaluation,
            output=folder,
            seed=own_seed,
            callbacks=more,
            note=note,
            progress=progress,
            handle_signals=handle_signals,
        )

    def loop_in(path: Path) -> Generator[Stage[M], None, None]:
        network = model.flow.network
        settings = {
            "utility": own_settings(utility),
            "base": base,
            "price": price,
            "mixing": mixing,
            **{name: True for name, asked in (("one_shot", one_shot), ("warm", warm)) if asked},
            "seed": seed,
            "conditions": [item.text for item in items],
            "model": of_network(network) if isinstance(network, nn.Module) else "",
            "method": method.model_dump(mode="json"),
            "optimizer": None if optimizer is None else optimizer.model_dump(mode="json"),
            "training": given.model_dump(mode="json"),
        }
        about = {"description": description, "caveats": list(caveats)}
        with StagesFolder.begin(path, settings, about, given, note) as place:
            yield from loop(place)

    def law(own: Any, last: M, number: int) -> Known | None:
        """What is known of the law of the model that stage `number` begins at."""
        if not isinstance(own, OfLaw):
            return None
        return own.known(last, model, items, stream(seed, "law", number).initial_seed())

    def slope(own: Any, last: M, at: Known | None, number: int) -> Callable[..., Any]:
        """The first variation there, less the price of the KL."""
        if isinstance(own, OfLaw):
            assert at is not None
            found: Callable[..., Any] = own.one_shot(at, alpha) if one_shot else own.first_variation(at)
        else:
            with explained("the utility"):
                found = own.first_variation(last, stream(seed, "first variation", number).initial_seed())
        if price == 0:
            return found
        return lifted(found) + kl_variation(last, model, own.eps if isinstance(own, OfLaw) else EPS) * price

    return loop() if output is None else loop_in(Path(output))


def own_settings(utility: Any) -> Any:
    """What can be written down of a utility."""
    if not isinstance(utility, OfLaw):
        return type(utility).__name__
    sampling = None if utility.sampling is None else utility.sampling.model_dump(mode="json")
    return {
        **utility.utility.model_dump(mode="json"),
        "num_samples": utility.num_samples,
        "eps": utility.eps,
        "sampling": sampling,
        "rewards": [getattr(each, "__qualname__", type(each).__qualname__) for each in utility.named.values()],
    }


def checked_base(count: int, base: Any, price: Any, mixing: Any, one_shot: bool, warm: bool) -> Base:
    """What stages start from. Raises InputError for a base, a price and a mixing that are none, or mean nothing together."""
    if base not in (None, *get_args(Base)):
        raise InputError(f"stages: base must be 'last' or 'first', is {base!r}{did_you_mean(str(base), get_args(Base))}")
    if isinstance(price, bool) or not isinstance(price, (int, float)) or not 0 <= price < math.inf:
        raise InputError(f"stages: price must be a number, 0 or more, is {price!r}")
    if isinstance(mixing, bool) or not isinstance(mixing, (int, float)) or not 0 < mixing <= 1:
        raise InputError(f"stages: mixing must be above 0 and at most 1, is {mixing!r}")
    if why := misfit(count, base, price, mixing, one_shot, warm):
        raise InputError(f"stages: {why}")
    return base_of(base, one_shot)


def check_reward(reward: Callable[..., Any], method: Any, training: Training | None) -> None:
    """Raise InputError for a first variation whose gradient alone is known, where its values are asked for."""
    if not isinstance(reward, FirstVariation) or reward.valued:
        return
    known = "the first variation is known by its gradient alone"
    if not method.needs.reward_gradient:
        raise InputError(f"stages: {known}, and {method.name} learns from values; take a method such as adjoint-matching")
    for name in ("calibration_samples", "per_prompt_normalization", "monitor"):
        if training is not None and getattr(training, name):
            raise InputError(f"training.{name} asks for values of the reward, and {known}; leave it out")


def lifted(reward: Callable[..., Any]) -> FirstVariation:
    """A first variation that can be added to others."""
    return reward if isinstance(reward, FirstVariation) else of_samples(cast(Any, from_function(reward)))


def known_value(own: Any, at: Known | None) -> Estimate | None:
    """The utility there, if it has a value that is known: behind a barrier, for example, it has none."""
    if not isinstance(own, OfLaw) or at is None:
        return None
    return own.known_value(at)
