"""Samples of an evaluation: the items they are drawn for, the instruments that measure them, and those that are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiltflow.conditions import Item
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.evaluation.estimates import in_batches
from tiltflow.evaluation.features import Features, feature_extractor, features_of
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.settings import Evaluation, Point
from tiltflow.models.model_folder import ClassifierConfig, load_classifier
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import NonFiniteRewards, Reward
from tiltflow.rewards.functions.checked import score
from tiltflow.rewards.functions.failures import Failures
from tiltflow.rewards.functions.latents import decoded_from, seen_by
from tiltflow.rewards.functions.prompted import told

Kind = Literal["sample", "class", "prompt"]


@dataclass(frozen=True)
class Asked:
    """Items of the samples to draw, in consecutive groups of equal size, each with a target law of its own.

    Args:
        items: one per sample [n].
        names: of the groups; a model without conditions has one group.
        kind: kind of the groups. Classes are all that exist (strata), prompts a sample of more.
    """

    items: tuple[Item, ...]
    names: tuple[str, ...] = ("",)
    kind: Kind = "sample"

    @classmethod
    def of_samples(cls, count: int) -> Asked:
        """Return `count` samples of a model without conditions."""
        return cls((Item(""),) * count)

    @classmethod
    def of_classes(cls, classes: Sequence[Item], count: int) -> Asked:
        """Return about `count` samples, equally many of each class, at least two."""
        each = max(2, count // len(classes))
        return cls(tuple(one for one in classes for _ in range(each)), tuple(one.text for one in classes), "class")

    @classmethod
    def of_prompts(cls, prompts: Sequence[Item], each: int) -> Asked:
        """Return `each` samples of each prompt."""
        return cls(tuple(one for one in prompts for _ in range(each)), tuple(one.text for one in prompts), "prompt")

    def __len__(self) -> int:
        return len(self.items)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.names)

    @property
    def size(self) -> int:
        """Number of samples of a group."""
        return len(self.items) // self.groups

    @property
    def strata(self) -> bool:
        """True if the groups are all that exist."""
        return self.kind == "class"

    @property
    def together(self) -> int:
        """Number of consecutive samples that are one unit of a standard error: those of a prompt; one otherwise."""
        return self.size if self.kind == "prompt" else 1

    def tell(self, reward: Reward) -> Reward:
        """Bind a reward to the prompts and metadata of these samples, if the model has conditions."""
        if self.kind == "sample":
            return reward
        return told(reward, self.items)

    def some(self, each: int) -> Asked:
        """Return the first `each` samples of each group."""
        kept = [item for i in range(self.groups) for item in self.items[i * self.size : i * self.size + each]]
        return replace(self, items=tuple(kept))

    def halves(self, most: int) -> tuple[Tensor, Tensor]:
        """Return the indices of the first and of the last samples of each group: up to half of it, and up to `most` in all."""
        half = max(1, min(self.size // 2, most // self.groups))
        starts = torch.arange(self.groups)[:, None] * self.size
        first = starts + torch.arange(half)
        return first.flatten(), (first + self.size - half).flatten()


@dataclass(frozen=True)
class Judge:
    """A classifier with features that is not part of the reward."""

    name: str
    network: nn.Module
    config: ClassifierConfig

    @classmethod
    def load(cls, settings: Evaluation, device: str) -> Judge:
        """Load the judge of an evaluation. Raises InputError if it cannot be loaded or does not have a class of `group`."""
        assert settings.judge is not None
        network, config = load_classifier(settings.judge, device)
        if settings.group and max(settings.group) >= len(config.class_names):
            raise InputError(
                f"evaluation.group names class {max(settings.group)}, the judge has 0 to {len(config.class_names) - 1}"
            )
        return cls(settings.judge, network, config)

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the class probabilities [batch, classes] of images x."""
        p: Tensor = self.network(x).softmax(1)
        return p

    def features(self, x: Tensor) -> Tensor:
        """Return the features [batch, width] of images x."""
        compute: Any = self.network.features
        found: Tensor = compute(x)
        return found


@dataclass(frozen=True)
class Instruments:
    """Rewards, judge and features that measure samples.

    Args:
        rewards: by name; the first is that of the training, the others are held out.
        judge: independent classifier.
        extract: images -> features, in which samples are compared.
        batch_size: number of samples at a time.
        device: where they are measured.
        non_finite: treatment of NaN and infinite rewards.
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
        """Build the instruments of an evaluation. Raises InputError if one cannot be loaded."""
        names = numbered([name, *(part.name for part in settings.rewards)])
        rewards = [reward, *(part.build(device) for part in settings.rewards)]
        judge = None if settings.judge is None else Judge.load(settings, device)
        extract = None if settings.features is None else feature_extractor(settings.features, device)
        return cls(dict(zip(names, rewards, strict=True)), judge, extract, settings.at_once, device, non_finite)

    @property
    def own(self) -> str:
        """Name of the training's reward."""
        return next(iter(self.rewards))

    @property
    def see_latents(self) -> bool:
        """Whether a reward looks at what samples are decoded from."""
        return see_latents(self.rewards.values())

    def draw(
        self, model: GenerativeModel, items: Sequence[Item], point: Point, *, seed: int, batch_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """Draw samples of these items; see `with_latents`."""
        return with_latents(
            self.rewards.values(),
            model,
            items,
            seed=seed,
            sampling=point.sampling,
            guidance_scale=point.guidance_scale,
            batch_size=batch_size,
        )

    def scores(self, x: Tensor, asked: Asked, latents: Tensor | None) -> dict[str, Tensor]:
        """Return the values [n] of each reward for samples x [n, *event], on the CPU; non-finite ones are kept if `non_finite`
        allows.

        Args:
            latents: what the samples are decoded from; None where no reward looks at it, or nothing is decoded.
        """
        return self.scored(x, asked, latents)[0]

    def scored(self, x: Tensor, asked: Asked, latents: Tensor | None) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return `scores`, and for how many samples each reward could not be computed, but has a value for failures."""
        found, failed = dict[str, Tensor](), dict[str, int]()
        for name, reward in self.rewards.items():
            told = decoded_from(asked.tell(reward), latents)
            with Failures(self.device) as failures:
                found[name] = score(told, x, self.batch_size, self.device, self.non_finite)
            failed[name] = int(failures.taken().get("failed", 0))
        return found, failed

    def look(self, function: Features, x: Tensor) -> Tensor:
        """Apply `function` to samples in batches; the result is on the CPU."""
        return in_batches(function, x, self.batch_size, self.device)

    def features(self, x: Tensor, extract: Features) -> Tensor:
        """Return the features [n, width] of samples."""
        return features_of(x, extract, self.batch_size, self.device)


def see_latents(rewards: Iterable[Reward]) -> bool:
    """Whether one of these rewards looks at what samples are decoded from."""
    return any("latents" in seen_by(reward) for reward in rewards)


def with_latents(
    rewards: Iterable[Reward], model: GenerativeModel, items: Sequence[Item], **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Draw samples of these items, and return what they are decoded from too, if a reward looks at it; None otherwise.

    Args:
        options: of the model's `draw`.

    Raises InputError if a reward looks at latents and the model is no pipeline, whose latents are known.
    """
    if not model.has_decoder or not see_latents(rewards):
        return model.draw(items, **options), None
    if not isinstance(model, TextToImage):
        raise InputError(
            f"the reward asks for latents, which {type(model).__name__}.draw does not give; it can have the samples"
        )
    return model.draw_both(items, **options)


@dataclass(frozen=True)
class Samples:
    """Samples of the base and the tuned model that an evaluation measures: those with finite rewards.

    Args:
        base, tuned: [n, *event] and [m, *event].
        base_rewards, tuned_rewards: by name, [n] and [m].
        log_tilt: log weights of the base samples toward the target law, up to a constant of each group [n].
        asked: the groups of the base samples.
        left_out: numbers of samples without a finite reward: of the base, of the tuned model.
        absent: why the log weights say nothing, where the reward has no values.
    """

    base: Tensor
    tuned: Tensor
    base_rewards: dict[str, Tensor]
    tuned_rewards: dict[str, Tensor]
    log_tilt: Tensor
    asked: Asked
    left_out: tuple[int, int] = (0, 0)
    absent: str | None = None

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Samples of the base and of the tuned model."""
        return self.base, self.tuned

    @property
    def weights(self) -> ImportanceWeights:
        """Importance weights of the base samples."""
        weights = ImportanceWeights.from_log_tilt(self.log_tilt, self.asked.groups, strata=self.asked.strata)
        return replace(weights, absent=self.absent)


def kept(asked: Asked, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Asked]:
    """Select samples with finite rewards: (indices in the base, indices in the tuned model, groups of the base samples).

    Of each group, the first samples with finite rewards are kept, equally many per group. For prompts, the number per prompt is
    the same in both models and keeps the most samples in all; prompts with fewer are left out.

    Args:
        base, tuned: rewards by name, [n] each.

    Raises NonFiniteError if a class, or every prompt, has fewer than two samples with finite rewards.
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
    """Select the samples with finite rewards of all that were drawn.

    Args:
        x_base, x: samples of the base and of the tuned model [n, *event].
        base, tuned: their rewards by name, [n] each.
        tilted: (normalised) rewards [n] of the base samples that the target law tilts by.
        log_tilt: function of these to log weights.

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
    """Input of the function `measure` of a family of metrics.

    Args:
        samples: of both models, at the first sampling point.
        instruments: measure them.
        settings: of the evaluation.
        generator: for bootstraps; the metrics use it in their order.
    """

    samples: Samples
    instruments: Instruments
    settings: Evaluation
    generator: torch.Generator


def numbered(names: Sequence[str]) -> list[str]:
    """Number the repetitions of a name.

    >>> numbered(["clip-score", "hps", "clip-score"])
    ['clip-score', 'hps', 'clip-score 2']
    """
    counts = [list(names[: i + 1]).count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(names, counts, strict=True)]
