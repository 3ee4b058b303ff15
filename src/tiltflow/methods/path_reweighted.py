r"""Path-reweighted flow matching: what a chain of Gaussian steps leaves of a tilt, importance weights of its paths supply.

The best control of a memoryless chain of K Gaussian steps does not reach p_base(x) exp(r(x) / beta)
(`tiltflow.laws.chain_optimum`). But how much likelier each of its paths is than under the base is known in closed form, so its
ends can be weighted (`tiltflow.control.path_weights`), and conditional flow matching learns the law of weighted samples:

    loss = E[ W |v(x_t, t) - (x_1 - x_0)|^2 ],     W = exp(r(x_1) / beta) dP_base / dP_drawn (path),    x_0 fresh noise.

One round is

    1.  draw paths of the base's chain, of the tuned one, or of both, and the rewards of their ends
    2.  weigh them, and put them with those of earlier rounds
    3.  regress, for several optimizer steps, on samples drawn by their weights, with fresh noise and times.

The law is p_base(x) exp(r(x) / beta), whichever chain draws, with p_base the law of the ends of the base's own chain. Steps of
the memoryless SDE leave an error of O(1 / K) in it. Two modes of `tiltflow verify mixture`, one-dimensional, W2 to the exact
tilt by quadrature: K = 15 .048, 40 .019, 80 .009, against .232, .112, .064 of the best control of the same chains. In many
dimensions the errors of all coordinates change the weights of modes that are told apart by the norm. So paths step by Heun's
method with the same noise (`tiltflow.samplers.heun_chain`), an error of O(1 / K^2): 15 .018, 30 .006. As the number of steps of
a path changes nothing else, paths have `path_steps`, be the sampler's fewer.

Any proposal gives that law; they differ in the number of samples that the weights leave. The better the tuned chain, the more
even are its weights, up to what its Gaussian steps cannot do; those of the base do not depend on it. So a run begins with
another method (`first`), or with the base's paths, and takes the shares of both that leave the most.

Plain regression on x_1 - x_0, and not a residual of the present model's velocity: that is anchored where the model's own law is
that of the samples, and neither the base's field nor a control that was learned on a chain is the field of the chain's ends.
"""

# Mutation tests: test_path_reweighted.py

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.control.path_weights import WeightedPaths, draw_paths, log_proposal, relative_sizes
from tiltflow.errors import CollapseError, NonFiniteError
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.flows import conditions
from tiltflow.flows.field import VelocityField, Which
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Tempered, Tilting
from tiltflow.rewards.functions.checked import finite_only
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start, split
from tiltflow.samplers.heun_chain import heun_chain
from tiltflow.samplers.sampling import MemorylessSolver, Sampling
from tiltflow.streams import Noise
from tiltflow.training.batch import Batch
from tiltflow.training.method import NamedMethod, Needs, Stateful
from tiltflow.training.noising import noising, resampled, smoothed
from tiltflow.training.scoring import Scoring

Count = Annotated[int, Field(ge=1)]
SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0)
"""The shares of base paths that a round may have."""
LOOK_AGAIN = 8
"""Rounds of base paths alone after which the tuned chain is examined again."""


@dataclass(frozen=True)
class Pool:
    """Paths of several rounds, the oldest first.

    Args:
        ends: [count, *event].
        rewards: of the ends [count].
        log_drawn: log of the density of the paths, as their round drew them, over that of the base's: float64 [count].
        condition: of the ends, as `VelocityField.condition`.
    """

    ends: Tensor
    rewards: Tensor
    log_drawn: Tensor
    condition: Any

    def __len__(self) -> int:
        return len(self.rewards)

    def select(self, which: Which) -> Pool:
        """Some of the paths."""
        condition = conditions.select(self.condition, which)
        return Pool(self.ends[which], self.rewards[which], self.log_drawn[which], condition)

    def then(self, later: Pool, size: int) -> Pool:
        """These paths and later ones, the latest `size` of them; the later ones alone if their conditions have another shape,
        as prompts may have."""
        try:
            condition = conditions.joined([self.condition, later.condition])
        except ValueError:
            return later
        together = Pool(
            torch.cat([self.ends, later.ends]),
            torch.cat([self.rewards, later.rewards]),
            torch.cat([self.log_drawn, later.log_drawn]),
            condition,
        )
        return together.select(slice(-max(size, len(later)), None))


@dataclass
class State:
    """The state of the first method, the number of rounds, the share of base paths in the next one, and the paths that are
    learned from."""

    first: Any = None
    rounds: int = 0
    share: float = 0.5
    pool: Pool | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        first = self.first.state_dict() if isinstance(self.first, Stateful) else {}
        pool = None if self.pool is None else vars(self.pool)
        return {"first": first, "rounds": self.rounds, "share": self.share, "pool": pool}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        if isinstance(self.first, Stateful):
            self.first.load_state_dict(state["first"])
        self.rounds, self.share = state["rounds"], state["share"]
        self.pool = None if state["pool"] is None else Pool(**state["pool"])


class PathReweighted(Tilting):
    """Path-reweighted flow matching. Any reward, no gradient; aims at p_base(x) exp(r(x) / beta), exactly. Alone, or after
    another method."""

    name: Literal["path-reweighted"] = "path-reweighted"
    first: NamedMethod | None = None
    """Another method with a beta with which the run begins, such as {name: adjoint-matching}, or tilt-matching, which needs no
    gradient. Its temperature is this one's; it has this number of steps too, unless it is given one."""
    first_steps: Annotated[float, Field(gt=0)] = 0.5
    """How long `first` lasts: below 1 a share of the run, from 1 on a number of optimizer steps."""

    solver: MemorylessSolver = "memoryless"
    """The sampler whose grid the paths have; any memoryless solver of `Sampling`."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 40
    """Steps of the sampler, from noise to data."""
    paths: Literal["heun", "sampler"] = "heun"
    """How paths step: heun is Heun's method with the noise of the memoryless SDE, two evaluations a step, whose ends have the
    law of the base's ODE but for an error of the square of a step; sampler is the sampler's own step, for models of few steps,
    with an error of the order of a step, the larger the more dimensions there are."""
    path_steps: Count = 30
    """Steps of the paths that are weighted, at least: where they are more, each of the sampler's is split into as many equal
    ones as that takes. The law of the base's own chain is off by what shrinks with their number, and that error stays."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, more steps are near the noise; see `time_grid`. The times of the regression are spread in the same way."""
    proposal: Literal["auto", "base", "tuned", "mixture"] = "auto"
    """Whose paths are drawn: the base's, the tuned chain's, or some of each; auto takes, round by round, the shares with the
    largest effective sample size."""

    num_passes: Count = 16
    """Optimizer steps for each round of paths, each with fresh noise and times."""
    regression_batch_size: Count | None = None
    """Samples in each of these steps; by default as many as a round has paths."""
    neighbours: Count = 256
    """Samples of a step that are seen together: the target at a point is its mean over those of them that could have led there,
    which has the same mean and less noise. 1: that of the point's own sample."""
    pool_size: Count = 65_536
    """Paths to keep: those of the latest rounds, all weighted toward the same law. Their number bounds the accuracy."""
    min_effective_sample_size: Annotated[float, Field(ge=1)] = 2.0
    """Stop when the effective number of samples that are learned from, (sum w)^2 / sum w^2, is less than this."""

    @model_validator(mode="before")
    @classmethod
    def _first_has_our_temperature(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("first") is None:
            return values
        first, shared_keys = values["first"], {key: values[key] for key in ("beta", "num_inference_steps") if key in values}
        if isinstance(first, str):
            first = {"name": first}
        if isinstance(first, dict):
            return {**values, "first": {**shared_keys, **first}}
        if isinstance(first, Tempered):
            own = {key: value for key, value in shared_keys.items() if key not in first.model_fields_set}
            return {**values, "first": first.model_copy(update=own)}
        return values

    @model_validator(mode="after")
    def _check(self) -> PathReweighted:
        if self.first is None:
            return self
        if not isinstance(self.first, Tempered) or self.first.name == self.name:
            raise ValueError("first must be another method with a beta, such as adjoint-matching or tilt-matching")
        if self.first.beta != self.beta:
            raise ValueError(f"first.beta is {self.first.beta:g} and beta {self.beta:g}: leave the first one out")
        return self

    @property
    def opening(self) -> Any:
        """The first method at this temperature, whatever that has become; None if there is none."""
        return None if self.first is None else self.first.model_copy(update={"beta": self.beta})

    @property
    def needs(self) -> Needs:
        """Those of the first method."""
        first = Needs() if self.first is None else self.first.needs
        passes = self.num_passes if self.first is None else first.passes
        return Needs(
            reward_gradient=first.reward_gradient,
            critic_of_condition=first.critic_of_condition,
            begins_as_base=first.begins_as_base,
            without_critic=first.without_critic,
            passes=passes,
            warmup_steps=first.warmup_steps,
            exact_trajectories=first.exact_trajectories,
            trajectory_copies=first.trajectory_copies,
            batches_kept=first.batches_kept,
        )

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """Those of the first method."""
        return {} if self.first is None else self.first.optimizer_defaults

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: a single weight, normalised, is 1 whatever the reward."""
        if group > 1:
            return None if self.first is None else self.first.learns_nothing(group)
        return "weights are normalised among the samples of a prompt, a class or a batch, and that of a single one is always 1"

    @property
    def sampling(self) -> Sampling:
        """The sampler whose chain is weighted."""
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps, shift=self.shift)

    def chain(self, start: Start = 0.0) -> Chain:
        """The chain whose paths are weighted, on the grid of `sampling`, its steps split."""
        if self.paths == "sampler":
            return self.sampling.chain(start, substeps=self.substeps)
        return heun_chain(split(self.sampling.times(start), self.substeps))

    @property
    def substeps(self) -> int:
        """Into how many each step of the sampler is split where paths are weighted."""
        return math.ceil(self.path_steps / self.num_inference_steps)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), p_base being the law of the base's chain."""
        of_step = "the square of a step" if self.paths == "heun" else "a step, and the larger the more dimensions there are,"
        count = self.substeps * self.num_inference_steps
        return exponential_tilt(
            self.beta,
            [f"The base of the law is that of its own chain of {count} steps: an error of the order of {of_step} stays in it."],
        )

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between rounds."""
        return State(None if self.first is None else self.first.new_state(event_shape, seed, device))

    def is_first(self, batch: Batch) -> bool:
        """True while the first method goes on."""
        until = self.first_steps if self.first_steps >= 1 else self.first_steps * batch.max_train_steps
        return self.first is not None and batch.step < until

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """An iteration of the first method, or a round of paths: yields once for each of its optimizer steps, the gradient
        accumulated. Where the flow is bound to conditions, weights are normalised among the samples of each.

        Args:
            state: kept between iterations; changed in place.

        Raises CollapseError if too few paths carry the weight; NonFiniteError if a weight is not finite.
        """
        if self.is_first(batch):
            yield from self.opening.gradients(batch, state.first)
            return
        drawn, measured = self._draw(batch, state)
        pool = state.pool = drawn if state.pool is None else state.pool.then(drawn, self.pool_size)
        flow = batch.tuned.bind(pool.condition)
        members = flow.groups(len(pool), pool.ends.device)
        weights, of_weights = self._weights(pool, members, state.rounds)
        for _ in range(self.num_passes):
            yield {**of_weights, **measured, **self._regress(batch, flow, pool.ends, weights, members)}

    def _draw(self, batch: Batch, state: State) -> tuple[Pool, dict[str, float]]:
        """The paths of a round; chooses the share of the base's in the next one."""
        share = self._share(state)
        of_base, shares = dealt(batch.tuned.groups(len(batch), batch.x.device), share, batch.generator)
        tuned = None if share == 1 else batch.whole(batch.actor or batch.tuned)
        base, chain, size = batch.whole(batch.base), self.chain(batch.start), len(batch)

        def draw(part: slice, noise: Noise) -> WeightedPaths:
            some = None if tuned is None else tuned.select(part)
            return draw_paths(chain, some, base.select(part), batch.x[part], of_base[part], noise)

        with Scoring(batch) as scoring:
            paths = WeightedPaths.joined(scoring.drawn(size, batch.generator, draw, lambda paths: paths.ends))
            rewards = scoring.rewards()
        if (kept := finite_only(rewards)) is not None:
            batch, paths = batch.select(kept), paths.select(kept)
            rewards, of_base, shares = (part[kept] for part in (rewards, of_base, shares))
        state.rounds += 1
        measured = {
            "base_share": of_base.double().mean().item(),
            **({} if kept is None else {"dropped": float(size - len(kept))}),
        }
        log_drawn = torch.zeros_like(paths.costs)
        if paths.log_ratio is not None:
            log_drawn = log_proposal(paths.log_ratio, shares)
            members = batch.tuned.groups(len(batch), batch.x.device)
            sizes = relative_sizes(rewards.double() / self.beta, paths.log_ratio, log_drawn, SHARES, members)
            state.share = self._best(sizes)
            measured |= {"relative_size_of_base": sizes[-1].item(), "relative_size_of_tuned": sizes[0].item()}
        if not bool(of_base.all()):
            measured["path_kl"] = paths.costs[~of_base].mean().item()
            rewards_of_model = rewards[~of_base]
            measured |= {"reward": rewards_of_model.mean().item(), "reward_std": rewards_of_model.std(correction=0).item()}
        return Pool(paths.ends, rewards, log_drawn, batch.tuned.condition), measured

    def _share(self, state: State) -> float:
        """The share of the base's paths in the round that comes."""
        if self.proposal in ("base", "tuned"):
            return float(self.proposal == "base")
        look_again = state.share == 1 and state.rounds % LOOK_AGAIN == 0
        return SHARES[-2] if look_again else state.share

    def _best(self, sizes: Tensor) -> float:
        """The share with the largest of the effective `sizes` of SHARES; one of the shares inside for a mixture."""
        if self.proposal == "mixture":
            return SHARES[1 + int(sizes[1:-1].argmax())]
        return SHARES[int(sizes.argmax())]

    def _weights(self, pool: Pool, members: list[Tensor], rounds: int) -> tuple[Tensor, dict[str, float]]:
        """Weights [count] of the pool, of sum 1, normalised within each group; and what is to be known of them."""
        log_tilt = pool.rewards.double() / self.beta
        logs = log_tilt - pool.log_drawn
        if not bool(logs.isfinite().all()):
            bad = (~logs.isfinite()).nonzero()[:, 0].tolist()
            raise NonFiniteError(
                f"round {rounds}: the weights of {len(bad)} of {len(pool)} paths are not finite: has the tuned model diverged?",
                {"what": "weight", "samples": bad},
            )
        weights, divergence = torch.empty_like(logs), 0.0
        for group in members:
            part = len(group) / len(pool)
            weights[group] = torch.softmax(logs[group], 0) * part
            log_mean = torch.logsumexp(logs[group], 0) - math.log(len(group))
            divergence += float(weights[group] @ log_tilt[group] - part * log_mean)
        effective = ImportanceWeights(weights).effective_sample_size
        largest = float(weights.max()) * len(pool)
        if effective < self.min_effective_sample_size:
            raise CollapseError(
                f"round {rounds}: the weights of {len(pool)} paths rest on {effective:.1f} of them (largest {largest:.3g} times"
                f" the mean): raise method.beta ({self.beta:g}) or training.train_batch_size, take more steps"
                f" (method.num_inference_steps {self.num_inference_steps}), or begin with another method (method.first, or"
                " tilt-matching, which anneals)"
            )
        mean = float(weights @ pool.rewards.double())
        return weights, {
            "reward": mean,
            "reward_std": float(weights @ (pool.rewards.double() - mean).square()) ** 0.5,
            "effective_sample_size": effective,
            "relative_size": effective / len(pool),
            "largest_weight": largest,
            "kl": divergence,
        }

    def _regress(
        self, batch: Batch, flow: VelocityField, ends: Tensor, weights: Tensor, members: list[Tensor]
    ) -> dict[str, float]:
        """Accumulate the gradient of the loss over samples drawn from `ends` by their weights, with fresh noise and times.

        Args:
            flow: the tuned one, bound to the conditions of the ends.
            members: the indices of each group of ends that share a condition.
        """
        size, generator = self.regression_batch_size or len(batch), batch.generator
        which = resampled(weights, size, generator)
        pairs = noising(flow, ends, which, self.sampling, generator, start=batch.start)
        number = torch.zeros(len(ends), dtype=torch.long, device=ends.device)
        for i, group in enumerate(members):
            number[group] = i
        ones = torch.ones(size, dtype=torch.float64, device=ends.device)
        among = smoothed(pairs, ones[:, None], ones, number[which], self.neighbours)

        def terms_of(part: slice) -> dict[str, Tensor]:
            (i, x, t, _), _, target, _ = among.part(part)
            scale = flow.prediction_scale(t).to(x) ** 2 / x[0].numel()  # in the network's own prediction, as in pretraining
            return {"loss": scale * (flow.select(i)(x, t) - target).flatten(1).square().sum(1)}

        return batch.accumulate(terms_of, size, over=size)


def dealt(members: list[Tensor], share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which paths are the base's [batch], a `share` of each group as near as its size allows, and the share that they really
    have in their group, float64 [batch].

    Args:
        members: the indices of each group.
    """
    size, device = sum(map(len, members)), members[0].device
    of_base = torch.zeros(size, dtype=torch.bool, device=device)
    shares = torch.empty(size, dtype=torch.float64, device=device)
    for group in members:
        count = round(share * len(group))
        order = torch.randperm(len(group), generator=generator, device=device)
        of_base[group[order[:count]]] = True
        shares[group] = count / len(group)
    return of_base, shares
