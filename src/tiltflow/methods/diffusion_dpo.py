r"""Diffusion-DPO: the preferred sample of a pair is made more likely than the other, beside the base (Wallace et al., arXiv
2311.12908; for flows and online pairs, arXiv 2409.08861, appendix).

With P how likely a is preferred to b, and z what the model says of it,

    loss = - P log sigmoid(z) - (1 - P) log sigmoid(-z),      z = D(a) - D(b),

    D(x_1) = - E w(t) ( |v(x_t, t) - u|^2 - |v_base(x_t, t) - u|^2 ),      u = x_1 - x_0,

on fresh noise x_0 and times t, which both samples of a pair and both models share. With w = t / (1 - t) and squares summed over
dimensions D is log p_tuned / p_base of the samples, by Girsanov's theorem along their noising, if both are the fields of their
laws (`likelihood`). The published w is constant and squares are means over dimensions (`uniform`): a temperature that depends
on the time.

With P = sigmoid((r(a) - r(b)) / beta) and that D the loss is least where D(a) - D(b) = (r(a) - r(b)) / beta for all pairs: at
p_base exp(r / beta), whatever law the pairs are of. With P = 1 for the better sample (`hard`), and beta times that z, there is
no minimum where the better one is always the same; of people who choose by the Bradley-Terry model of a reward it is that law.
A mean over few draws inside the sigmoid is noise that is paid for by a weaker tilt: hence `num_draws`.
"""

# Mutation tests: test_diffusion_dpo.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from tiltflow import processes
from tiltflow.data import Pairs, load_pairs
from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.field import VelocityField
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Positive, Tempered, from_preset
from tiltflow.methods.regressions.drawn_samples import Count, DrawnSamples, Rounds
from tiltflow.rewards.serving.votes import PAIRS, Votes
from tiltflow.samplers.grid import Start, spread_times
from tiltflow.settings import PathOrName
from tiltflow.streams import normal
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs

# `paper`: of Stable Diffusion 1.5, on pairs of Pick-a-Pic, batches of 2,048; of SDXL 5,000. The learning rate is its rule,
# 2.048e-8 times 2,000 / strength. `online`: the comparison of arXiv 2409.08861, on pairs of the model itself, whose number, in
# 4,000 to 10,000, is twice this one.
PUBLISHED: dict[str, Any] = {"log_ratio": "uniform", "num_draws": 1, "num_passes": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**PUBLISHED, "labels": "hard", "strength": 2000.0},
    "online": {**PUBLISHED, "labels": "soft", "strength": 5000.0},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "paper": {
        "learning_rate": 2.048e-8,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2,
        "lr_scheduler": "constant",
    },
}
"""The optimizer of each preset that has published one."""


class Compared(NamedTuple):
    """Pairs of samples.

    Args:
        x: [pairs, 2, *event].
        preferred: how likely the first is preferred to the second [pairs], float64.
        where: a sample of the batch that has their condition [pairs].
    """

    x: Tensor
    preferred: Tensor
    where: Tensor


@dataclass
class State(Rounds):
    """The number of batches, and the pairs of a file."""

    pairs: Pairs | None = None


class DiffusionDpo(DrawnSamples, Tempered):
    """Diffusion-DPO. Any reward, no gradient, or pairs of a file; aims at p_base(x) exp(r(x) / beta) with many draws."""

    name: Literal["diffusion-dpo"] = "diffusion-dpo"
    preset: Literal["paper", "online"] | None = None
    """Start from a published setting; keys given beside it win."""
    beta: Positive = 1.0
    """Temperature of the tilt, in units of reward. With hard labels it multiplies the log ratio, and is in units of the reward
    by which people choose, as the Bradley-Terry model has it."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: the better of two samples is preferred with the probability sigmoid((r_a - r_b) / beta). hard: always; so are the
    winners of a file."""
    log_ratio: Literal["likelihood", "uniform"] = "likelihood"
    """likelihood: that of the laws, by weights t / (1 - t). uniform: as published, without weights, of means over dimensions,
    times half of `strength`."""
    strength: Positive = 5000.0
    """Of a uniform log ratio: the published beta, 2,000 to 5,000."""
    num_draws: Count = 16
    """Noises and times whose mean is the log ratio of a sample: fewer of them are a weaker tilt. 1 as published."""
    data: PathOrName | None = None
    """Pairs to learn from, in place of the model's own: an .npz file of `winners` and `losers`, a folder of two of these names,
    or one of `tiltflow vote`; with prompts each pair counts for its own. By default two samples of the model are compared by
    the reward."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return from_preset(PRESETS, values)

    @model_validator(mode="after")
    def _check_labels(self) -> DiffusionDpo:
        if self.data is not None and self.labels == "soft":
            raise ValueError("data have winners and no rewards: use labels 'hard'")
        return self

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings of the preset."""
        return OPTIMIZERS.get(self.preset or "", {})

    @property
    def needs(self) -> Needs:
        """Takes any reward."""
        return Needs(passes=self.num_passes)

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: a single sample has none to be compared with, except those of a file."""
        return None if self.data is not None else super().learns_nothing(group)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), of soft labels and likelihoods, as the number of draws grows."""
        caveats = []
        if self.log_ratio == "uniform":
            caveats.append("The published log ratio is not that of the laws: its temperature depends on the time of the path.")
        if self.data is not None:
            caveats.append("What is learned are the choices of the data: beta is in units of the reward behind these.")
        elif self.labels == "hard":
            caveats.append("The better sample is always preferred: the loss falls without end, and there is no law at its end.")
        if caveats:
            return exponential_tilt(self.beta, caveats, reaches="none")
        few = f"The mean of {self.num_draws} draws inside the sigmoid is noisy, which makes the tilt weaker than beta says."
        return exponential_tilt(self.beta, [few])

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between batches. Raises InputError if the data cannot be read or are of another shape."""
        if self.data is None:
            return State(device)
        of_votes = (Path(self.data) / PAIRS).is_file()
        pairs = Votes.open(Path(self.data)).decided() if of_votes else load_pairs(self.data)
        if pairs.winners.shape[1:] != event_shape:
            raise InputError(
                f"method.data: pairs of shape {list(pairs.winners.shape[1:])}, but samples of {list(event_shape)}; of a model"
                " with latents they have to be latents"
            )
        return State(device, pairs=pairs.to(device))

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One batch of pairs: yields once for each of `num_passes` optimizer steps, its gradient accumulated. Of its own
        samples, those of a prompt, class or batch are compared two by two, in order; of a file, one pair for each sample.

        Raises InputError if all rewards of the first batch are equal, or if the file has no pair of a prompt.
        """
        measured: dict[str, float] = {}
        if state.pairs is None:
            x, rewards, batch, left_out = self._rated(batch, batch.actor or batch.tuned, first=state.batches == 0)
            compared = self._among(x, rewards, batch.tuned.groups(len(rewards), rewards.device))
            measured = {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(), **left_out}
        else:
            compared = self._of_file(batch, state.pairs)
        for _ in range(self.num_passes):
            yield {**measured, **self._prefer(batch, compared)}
        state.batches += 1

    def _among(self, x: Tensor, rewards: Tensor, members: list[Tensor]) -> Compared:
        """The samples of each condition two by two; of an odd number the last is left out."""
        pairs = torch.cat([some[: len(some) // 2 * 2].reshape(-1, 2) for some in members])
        if not len(pairs):
            raise InputError("diffusion-dpo: no condition of the batch has two samples with finite rewards to compare")
        gap = rewards.double()[pairs].diff(dim=1)[:, 0].neg()
        preferred = torch.sigmoid(gap / self.beta) if self.labels == "soft" else (gap.sign() + 1) / 2
        return Compared(x[pairs], preferred, pairs[:, 0])

    @staticmethod
    def _of_file(batch: Batch, pairs: Pairs) -> Compared:
        """A pair for each sample of the batch, of its prompt where the file has prompts."""
        count, generator = len(batch), batch.generator
        device = generator.device
        if pairs.prompts is None:
            which = torch.randint(len(pairs), (count,), generator=generator, device=device)
        else:
            chosen = []
            for text in batch.texts:
                some = pairs.of_prompt(text)
                if not some:
                    raise InputError(f"method.data: has no pair of the prompt {text!r}{did_you_mean(text, pairs.prompts)}")
                chosen.append(some[int(torch.randint(len(some), (), generator=generator, device=device))])
            which = torch.tensor(chosen, device=device)
        x = torch.stack([pairs.winners[which], pairs.losers[which]], 1).to(batch.x)
        return Compared(x, torch.ones(count, dtype=torch.float64, device=x.device), torch.arange(count, device=x.device))

    def _prefer(self, batch: Batch, compared: Compared) -> dict[str, float]:
        """Accumulate the gradient of the loss with fresh noise and times. The log ratios of all draws of a pair are inside one
        sigmoid: they are computed first, without gradients, and the gradient is that of each draw times what it counts for."""
        count, draws, device = len(compared.preferred), self.num_draws, batch.x.device
        own = processes.shares(count)[0]
        event = compared.x.shape[2:]
        x0 = normal((count * draws, *event), batch.generator, compared.x.dtype).reshape(count, draws, *event)[own]
        t, weights = self._times(batch, count)
        i, k, s = (each.flatten() for each in torch.meshgrid(*map(torch.arange, (len(x0), draws, 2)), indexing="ij"))
        i, k, s = (each.to(device) for each in (i, k, s))  # of each row: the pair of this process, its draw, its sample
        pair = i + own.start

        def misfit(field: VelocityField, rows: Tensor | slice) -> Tensor:
            where, time = compared.where[pair[rows]], t[pair[rows], k[rows]]
            bound = field.select(where)
            noise, x1 = bound.project(x0[i[rows], k[rows]]), compared.x[pair[rows], s[rows]]
            at = time.to(x1).reshape(-1, *[1] * len(event))
            x = (1 - at) * noise + at * x1
            squares = (bound(x, time) - (x1 - noise)).flatten(1).square().sum(1)
            if self.log_ratio == "likelihood":
                return squares
            return squares * bound.prediction_scale(time).to(squares) ** 2 / x1[0].numel()

        with torch.no_grad():
            parts = processes.cut(slice(0, len(pair)), batch.micro_batch_size)
            gaps = torch.cat([(misfit(batch.tuned, rows) - misfit(batch.base, rows)).double() for rows in parts])
        each = -weights[pair, k] / draws * (1 - 2 * s)  # d z / d gap
        z = torch.zeros(len(x0), dtype=torch.float64, device=device).index_add_(0, i, each * gaps)
        preferred = compared.preferred[own]
        slope = (torch.sigmoid(z) - preferred)[i] * each  # d loss / d gap
        counts = torch.arange(own.start, own.stop, device=device) >= processes.first_counted(count)
        surrogate = batch.accumulate_own(
            lambda rows: {"loss": slope[rows].to(compared.x) * misfit(batch.tuned, rows)}, counts[i], over=count
        )
        losses = F.binary_cross_entropy_with_logits(z, preferred, reduction="none")
        agrees = (z.sign() == (preferred - 0.5).sign()).double()
        found = {"loss": losses, "preference_accuracy": agrees}
        return surrogate | {key: processes.total((counts * of).sum().item(), device) / count for key, of in found.items()}

    def _times(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """Times [count, draws], one in each of as many parts of the time axis, and the weight of each draw in D, float64."""
        draws, generator = self.num_draws, batch.generator
        order = torch.randperm(count, generator=generator, device=generator.device)
        part = (torch.arange(draws, device=order.device) * count + order[:, None]).double()
        uniform = torch.rand(part.shape, generator=generator, device=generator.device, dtype=torch.float64)
        known = self.sampling.times(batch.start)
        first, last = known[0].item(), known[-2].item()
        low, t, high = (
            first + (1 - first) * spread_times(some / (count * draws), shift=self.sampling.shift)
            for some in (part, part + uniform, part + 1)
        )
        lengths = (high - low) * count * draws  # a mean with these is that over uniform times
        if self.log_ratio == "uniform":
            scale = self.strength / 2 * (self.beta if self.labels == "hard" else 1.0)
            return t, scale * lengths
        # nothing after the last time at which the sampler asks for a velocity
        ratio = torch.where(t <= last, lengths * t / (1 - t), 0.0)
        return t, ratio * (self.beta if self.labels == "hard" else 1.0)
