"""The batch that a method sees, and the values that it starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tiltflow import offload, processes
from tiltflow.control.objective import Objective, RunningReward
from tiltflow.flows.at_weights import AtWeights
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import VelocityField, Which
from tiltflow.flows.guided import Guide, Guided
from tiltflow.optimization import StoredWeights, all_finite, located
from tiltflow.rewards import LearnedReward, NonFiniteRewards, Reward, select
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Act, Trajectory, rollout
from tiltflow.samplers.stored import AS_COMPUTED, Storage, Stored
from tiltflow.streams import Noise, Rows
from tiltflow.timing import phase

Result = TypeVar("Result")


@dataclass(frozen=True)
class Drawn:
    """The start of an iteration.

    Args:
        x: starting points [batch, *event].
        bind: binds the conditions of the batch to a flow; may guide it (`guidance_mode: full`).
        guide: guides the flow that draws the samples, and not what is learned from them (`guidance_mode: rollout`).
        reward: the reward of these samples, if it is bound to their prompts.
        texts: what each sample is asked for.
    """

    x: Tensor
    bind: Callable[[VelocityField], VelocityField] = lambda flow: flow
    guide: Guide | None = None
    reward: Reward | None = None
    texts: Sequence[str] = ()


@runtime_checkable
class Ordered(Protocol):
    """A function that draws batches, which depend on how many samples were drawn before."""

    def at(self, drawn: int) -> Callable[[torch.Generator], Tensor | Drawn]:
        """Return the function that draws the batch after so many samples."""
        ...


@dataclass(frozen=True)
class Batch:
    """All that a method needs for an iteration. It handles conditions, guidance, micro-batches and processes.

    Args:
        x: starting points [batch, *event] at time `start`.
        tuned, base: the velocity fields, bound to the conditions of the batch.
        reward: the reward of these samples.
        actor: the field that the samples are drawn from, if it is not `tuned`: an average of its weights, which settles at
            the same fixed point.
        guide: guides the field that draws the samples, where they are guided and what is learned from them is not
            (`guidance_mode: rollout`).
        running: the running reward; only methods whose `Needs` have `running_reward` get one.
        micro_batch_size: how many samples a network sees at once. It changes the memory needed, not the result.
        non_finite: `drop` leaves out samples whose reward is NaN or infinite, and counts them as `dropped`.
        parameters: the parameters of `tuned` that are trained.
        step: optimizer steps taken before this batch.
        max_train_steps: optimizer steps of the whole run.
        storage: how trajectories are stored.
        texts: what each sample is asked for, such as its prompt; none for a model without conditions.
    """

    x: Tensor
    tuned: VelocityField
    base: VelocityField
    reward: Reward
    generator: torch.Generator
    start: Start = 0.0
    actor: VelocityField | None = None
    guide: Guide | None = None
    micro_batch_size: int | None = None
    non_finite: NonFiniteRewards = "error"
    running: RunningReward | None = None
    parameters: Sequence[nn.Parameter] = ()
    step: int = 0
    max_train_steps: int = 1
    storage: Storage = AS_COMPUTED
    texts: Sequence[str] = ()

    @property
    def objective(self) -> Objective:
        """The rewards of the paths of these samples."""
        return Objective(self.reward, self.running)

    def __len__(self) -> int:
        return len(self.x)

    def whole(self, flow: VelocityField) -> VelocityField:
        """Evaluate `flow` on the whole batch, a micro-batch at a time, shared out among the processes."""
        return in_chunks(flow, self.micro_batch_size)

    def copy_of_weights(self) -> list[Tensor]:
        """The present values of the parameters that are trained, for `tuned_at`."""
        return [p.detach().clone() for p in self.parameters]

    def tuned_at(self, weights: Sequence[Tensor]) -> VelocityField:
        """`tuned` at earlier weights, from `copy_of_weights`."""
        return AtWeights(self.tuned, StoredWeights(self.parameters, weights))

    def select(self, which: Which) -> Batch:
        """The part of the batch with these samples."""
        actor = None if self.actor is None else self.actor.select(which)
        tuned, base = self.tuned.select(which), self.base.select(which)
        some = replace(self, x=self.x[which], tuned=tuned, base=base, reward=select(self.reward, which), actor=actor)
        if not self.texts:
            return some
        rows = range(len(self))[which] if isinstance(which, slice) else which.tolist()
        return replace(some, texts=[self.texts[i] for i in rows])

    def map(self, function: Callable[[Batch, slice], tuple[Tensor, ...]], dims: Sequence[int] = (0,)) -> tuple[Tensor, ...]:
        """Call `function` with each micro-batch and its place in the batch, shared out among the processes; see `own_part`.

        Args:
            dims: for each result of `function`, the dimension that runs over samples.

        Returns the results, joined. Raises NonFiniteError, with samples counted from the first of the batch.
        """
        parts = self._each(function)
        return tuple(processes.gathered([results[i] for results in parts], len(self), dim=dim) for i, dim in enumerate(dims))

    def _each(self, function: Callable[[Batch, slice], Result]) -> list[Result]:
        results = []
        for part in processes.shares(len(self), self.micro_batch_size):
            with located(part):
                results.append(function(self.select(part), part))
        return results

    def learn(self, samples: Tensor) -> dict[str, float]:
        """Let a reward that learns do so, from these samples [batch, *event] of the tuned model or from that. Returns what it
        measured; nothing for another reward. To be called once the method has the rewards that it needs."""
        if not isinstance(self.reward, LearnedReward):
            return {}
        return self.reward.learn(samples, self.tuned, self.generator)

    # ---- the samples of this process, whose trajectories it alone has ----

    @property
    def own(self) -> slice:
        """The samples of this process, as many as every other one has; some of them another one may have too."""
        return processes.shares(len(self))[0]

    @property
    def own_noise(self) -> Noise:
        """Draws the noise of these samples: that which they have where the noise of all is drawn."""
        return self.generator if processes.count() == 1 else Rows(self.generator, len(self), self.own)

    def own_part(self, part: slice) -> slice:
        """The place of a part of the batch, from `map`, among these samples."""
        return slice(part.start - self.own.start, part.stop - self.own.start)

    def map_own(self, function: Callable[[Batch, slice], Tensor]) -> Tensor:
        """Call `function` with each micro-batch of these samples and its place among them. Returns the results, joined."""
        return torch.cat(self._each(lambda some, part: function(some, self.own_part(part))))

    def own_field(self, flow: VelocityField) -> tuple[VelocityField, Guided | None]:
        """A field at these samples, a micro-batch at a time; and the guided one, where samples are drawn with guidance."""
        field = in_chunks(flow, self.micro_batch_size, own=True)
        return field.select(self.own), None if self.guide is None else self.guide(field).select(self.own)

    def own_actor(self) -> tuple[VelocityField, Act | None]:
        """The field that these samples are drawn from, and what guides it."""
        actor, guided = self.own_field(self.actor or self.tuned)
        return actor, None if guided is None else guided.guide

    @torch.no_grad()
    def own_paths(self, chain: Chain, *, to_the_end: bool = False) -> Trajectory:
        """The paths of these samples from their starting points; see `rollout`."""
        actor, act = self.own_actor()
        x = self.x[self.own]
        return rollout(chain, actor, x, self.own_noise, act=act, to_the_end=to_the_end, storage=self.storage)

    def own_finite(self, values: Sequence[Tensor] | Tensor, what: str, times: Tensor) -> None:
        """Raises NonFiniteError, in all processes, if one of these values of its own samples is not finite."""
        with located(self.own):
            all_finite(values, what, times)

    def own_of(self, values: Stored, which: Tensor) -> Stored:
        """What this process has of these samples of the batch, once they are all of it: from what each process had of its own,
        step by step and in place."""
        if processes.count() == 1:
            return values.keep(which)
        own = which[processes.shares(len(which))[0]]
        return values.exchange(len(own), lambda k: processes.gathered([values[k]], len(self))[own])

    def together(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        """The numbers [steps, batch] of all samples, or of those that are kept, of which this process has its own."""
        whole = processes.gathered([values], len(self), dim=1)
        return whole if kept is None else whole[:, kept]

    def apart(self, values: Tensor, kept: Tensor | None = None) -> Tensor:
        """From the numbers [count, batch] of all samples, or of those that are kept, those of its own ones; numbers of another
        sample where one is left out: see `counted`."""
        if kept is None:
            return values[:, self.own]
        places = torch.zeros(len(self), dtype=torch.long, device=values.device)
        places[kept] = torch.arange(len(kept), device=values.device)
        return values[:, places[self.own]]

    def counted(self, kept: Tensor | None = None) -> Tensor:
        """Which of its own samples this process counts [own]: not those that are left out, nor those of an earlier process."""
        rows = torch.arange(len(self), device=self.x.device)
        counts = rows >= processes.first_counted(len(self))
        return (counts if kept is None else counts & torch.isin(rows, kept))[self.own]

    # ---- gradients ----

    def accumulate(self, terms_of: Callable[[slice], Mapping[str, Tensor]], count: int, over: int) -> dict[str, float]:
        """Add the gradient of a loss to the parameters, a micro-batch at a time and shared out among the processes.

        Args:
            terms_of: a slice of the `count` summands -> their terms [part], by name: of the `loss`, whose gradient is taken,
                and of anything else to sum.
            over: what the sums are divided by.

        Returns the sums by name, each summand counted once.
        """
        counted = torch.arange(count, device=self.x.device) >= processes.first_counted(count)
        return self._accumulate(terms_of, processes.shares(count)[0], counted, over)

    def accumulate_own(self, terms_of: Callable[[Tensor], Mapping[str, Tensor]], used: Tensor, over: int) -> dict[str, float]:
        """As `accumulate`, for summands of the samples of this process: the `used` ones [count] of them, at least one.

        Args:
            terms_of: gets the indices of some of the summands.
        """
        which = used.nonzero()[:, 0]
        most = processes.greatest(len(which), used.device)  # all processes must call their networks equally often
        padded = torch.cat([which, which.new_zeros(most - len(which))])
        counted = torch.arange(most, device=used.device) < len(which)
        return self._accumulate(lambda part: terms_of(padded[part]), slice(0, most), counted, over)

    @phase("update")
    def _accumulate(
        self, terms_of: Callable[[slice], Mapping[str, Tensor]], own: slice, counted: Tensor, over: int
    ) -> dict[str, float]:
        offload.learning()
        sums: dict[str, float] = {}
        for part in processes.cut(own, self.micro_batch_size or processes.share_of(over)):
            terms = {name: (counted[part] * each).sum() for name, each in terms_of(part).items()}
            loss = terms.pop("loss") / over
            loss.backward()
            sums["loss"] = sums.get("loss", 0.0) + loss.item()
            for name, each in terms.items():
                sums[name] = sums.get(name, 0.0) + each.item() / over
        return {name: processes.total(value, self.x.device) for name, value in sums.items()}
