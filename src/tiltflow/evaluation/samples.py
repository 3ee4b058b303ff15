"""What an evaluation looks at: which samples are asked for, what they are measured with, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiltflow.conditions.prompts import Prompt
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.evaluation.estimates import ImportanceWeights, in_batches
from tiltflow.evaluation.features import Features, feature_extractor, features_of
from tiltflow.evaluation.settings import Evaluation
from tiltflow.models.model_folder import ClassifierConfig, load_classifier
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import NonFiniteRewards, Reward, given, score

Kind = Literal["sample", "class", "prompt"]


@dataclass(frozen=True)
class Asked:
    """The samples that are asked for, in groups of equal size one after another: each has a target law of its own.

    Args:
        items: what each sample is asked for [n].
        names: of the groups; one for a model without conditions, whose samples have one law.
        kind: what a group is. Classes are all that there are (strata), prompts a sample of more.
    """

    items: tuple[Prompt, ...]
    names: tuple[str, ...] = ("",)
    kind: Kind = "sample"

    @classmethod
    def of_samples(cls, count: int) -> Asked:
        """So many samples of a model without conditions."""
        return cls((Prompt(""),) * count)

    @classmethod
    def of_classes(cls, classes: Sequence[Prompt], count: int) -> Asked:
        """About so many samples, as many of each class as of another, two at least."""
        each = max(2, count // len(classes))
        return cls(tuple(one for one in classes for _ in range(each)), tuple(one.text for one in classes), "class")

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], each: int) -> Asked:
        """So many samples of each prompt."""
        return cls(tuple(one for one in prompts for _ in range(each)), tuple(one.text for one in prompts), "prompt")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def groups(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Samples of a group."""
        return len(self.items) // self.groups

    @property
    def strata(self) -> bool:
        """Whether the groups are all that there are."""
        return self.kind == "class"

    @property
    def together(self) -> int:
        """How many samples in a row belong together for a standard error: those of a prompt; one otherwise."""
        return self.size if self.kind == "prompt" else 1

    def tell(self, reward: Reward) -> Reward:
        """The reward of these samples, if it asks what they are and the model has conditions."""
        if self.kind == "sample":
            return reward
        return given(reward, [item.text for item in self.items], [item.metadata for item in self.items])

    def some(self, each: int) -> Asked:
        """The first samples of each group."""
        kept = [item for i in range(self.groups) for item in self.items[i * self.size : i * self.size + each]]
        return replace(self, items=tuple(kept))

    def halves(self, most: int) -> tuple[Tensor, Tensor]:
        """Indices of the first samples of each group and of the last ones: up to half, and `most` in all."""
        half = max(1, min(self.size // 2, most // self.groups))
        starts = torch.arange(self.groups)[:, None] * self.size
        first = starts + torch.arange(half)
        return first.flatten(), (first + self.size - half).flatten()


@dataclass(frozen=True)
class Judge:
    """A classifier that was never part of the reward, with features."""

    name: str
    network: nn.Module
    config: ClassifierConfig

    @classmethod
    def load(cls, settings: Evaluation, device: str) -> Judge:
        """The judge of an evaluation that has one. Raises InputError if it does not know a class of the group."""
        assert settings.judge is not None
        network, config = load_classifier(settings.judge, device)
        if settings.group and max(settings.group) >= len(config.class_names):
            raise InputError(
                f"evaluation.group names class {max(settings.group)}, the judge knows 0 to {len(config.class_names) - 1}"
            )
        return cls(settings.judge, network, config)

    def probabilities(self, x: Tensor) -> Tensor:
        """[batch, classes] of images."""
        p: Tensor = self.network(x).softmax(1)
        return p

    def features(self, x: Tensor) -> Tensor:
        """[batch, width] of images."""
        compute: Any = self.network.features
        found: Tensor = compute(x)
        return found


@dataclass(frozen=True)
class Instruments:
    """What samples are measured with.

    Args:
        rewards: by name; the first one is that of the training, the others are held out.
        extract: features in which samples are compared.
        non_finite: what happens where a reward is NaN or infinite.
    """

    rewards: dict[str, Reward]
    judge: Judge | None
    extract: Features | None
    batch_size: int
    device: str
    non_finite: NonFiniteRewards = "error"

    @classmethod
    def build(
        cls, reward: Reward, name: str, settings: Evaluation, device: str, non_finite: NonFiniteRewards = "error"
    ) -> Instruments:
        """Raises InputError for what cannot be had."""
        names = numbered([name, *(part.name for part in settings.rewards)])
        rewards = [reward, *(part.build(device) for part in settings.rewards)]
        judge = None if settings.judge is None else Judge.load(settings, device)
        extract = None if settings.features is None else feature_extractor(settings.features, device)
        return cls(dict(zip(names, rewards, strict=True)), judge, extract, settings.at_once, device, non_finite)

    @property
    def own(self) -> str:
        """The name of the training's reward."""
        return next(iter(self.rewards))

    def scores(self, x: Tensor, asked: Asked) -> dict[str, Tensor]:
        """Of each reward the values for samples x [n, *event]: [n] on the CPU, not finite where one is and is to be dropped."""
        told = {name: asked.tell(reward) for name, reward in self.rewards.items()}
        return {name: score(each, x, self.batch_size, self.device, self.non_finite) for name, each in told.items()}

    def look(self, function: Features, x: Tensor) -> Tensor:
        """`function` over samples, a batch at a time; on the CPU."""
        return in_batches(function, x, self.batch_size, self.device)

    def features(self, x: Tensor, extract: Features) -> Tensor:
        """Features [n, width] of samples."""
        return features_of(x, extract, self.batch_size, self.device)


@dataclass(frozen=True)
class Samples:
    """The samples of the base and the tuned model that an evaluation measures: those whose rewards are finite.

    Args:
        base, tuned: [n, *event] and [m, *event].
        base_rewards, tuned_rewards: by name, [n] and [m].
        log_tilt: log weights of the base samples toward the target law, up to a constant of each group [n].
        asked: the groups of the base samples.
        left_out: how many samples are not of them: of the base, of the tuned model.
    """

    base: Tensor
    tuned: Tensor
    base_rewards: dict[str, Tensor]
    tuned_rewards: dict[str, Tensor]
    log_tilt: Tensor
    asked: Asked
    left_out: tuple[int, int] = (0, 0)

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Of the base, and of the tuned model."""
        return self.base, self.tuned

    @property
    def weights(self) -> ImportanceWeights:
        """The weights of the base samples."""
        return ImportanceWeights.from_log_tilt(self.log_tilt, self.asked.groups, strata=self.asked.strata)


def kept(asked: Asked, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Asked]:
    """Which samples stand for the laws where rewards are not finite: (indices in the base, in the tuned model, their groups).

    Of each group equally many, the first of those with finite rewards, which are as good a sample as any others. Of prompts,
    as many of each in both models as keeps the most samples in all; prompts that have fewer are left out.

    Args:
        base, tuned: rewards by name, [n] each.

    Raises NonFiniteError if no prompt, or not each class, has two in both.
    """
    finite = [torch.stack([each.isfinite() for each in one.values()]).all(0).reshape(asked.groups, -1) for one in (base, tuned)]
    if asked.kind != "prompt":
        sizes = [int(each.sum(1).min()) for each in finite]
        for each, size in zip(finite, sizes, strict=True):
            if size < 2:
                raise NonFiniteError(f"the reward is not finite for {int((~each).sum())} of {each.numel()} samples")
        first, second = (
            (each & (each.cumsum(1) <= size)).flatten().nonzero()[:, 0] for each, size in zip(finite, sizes, strict=True)
        )
        return first, second, asked.some(sizes[0])
    fewest = torch.stack([each.sum(1) for each in finite]).amin(0)
    counts = {count: int((fewest >= count).sum()) for count in range(2, asked.size + 1)}
    best = max(counts, key=lambda count: (count * counts[count], count))
    if not counts[best]:
        raise NonFiniteError("the rewards are finite for at most one picture of each prompt")
    chosen = (fewest >= best).nonzero()[:, 0].tolist()
    first, second = (torch.cat([i * asked.size + each[i].nonzero()[:best, 0] for i in chosen]) for each in finite)
    prompts = [asked.items[i * asked.size] for i in chosen]
    return first, second, Asked.of_prompts(prompts, best)


def samples_of(
    asked: Asked,
    x_base: Tensor,
    x: Tensor,
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    tilted: Tensor,
    log_tilt: Callable[[Tensor], Tensor],
) -> Samples:
    """The samples that count, of all that were drawn.

    Args:
        tilted: what the target law tilts by, of the base samples [n]: rewards, or normalised ones.
        log_tilt: of these the log weights.

    Raises NonFiniteError if there are too few.
    """
    own = next(iter(base))
    left_out = int((~base[own].isfinite()).sum()), int((~tuned[own].isfinite()).sum())
    first, second, groups = kept(asked, base, tuned)
    if len(first) == len(second) == len(asked):
        return Samples(x_base, x, dict(base), dict(tuned), log_tilt(tilted), asked)
    return Samples(
        x_base[first],
        x[second],
        {name: values[first] for name, values in base.items()},
        {name: values[second] for name, values in tuned.items()},
        log_tilt(tilted[first]),
        groups,
        left_out,
    )


@dataclass(frozen=True)
class Seen:
    """What a metric is measured from.

    Args:
        samples: of both models, at the first way to sample.
        models: the base and the tuned model.
        generator: of the bootstrap, in the order of the metrics.
    """

    samples: Samples
    instruments: Instruments
    settings: Evaluation
    models: tuple[GenerativeModel, GenerativeModel]
    generator: torch.Generator


def numbered(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again.

    >>> numbered(["clip-score", "hps", "clip-score"])
    ['clip-score', 'hps', 'clip-score 2']
    """
    counts = [list(names[: i + 1]).count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(names, counts, strict=True)]
