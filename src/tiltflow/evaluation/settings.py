"""The settings of an evaluation, for every kind of model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tiltflow.errors import InputError
from tiltflow.rewards import NamedReward
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.settings import External, Labels, PathOrName, Settings

Count = Annotated[int, Field(ge=1)]

SAMPLES, BATCH_SIZE = 1024, 256
"""Defaults of num_samples and batch_size without prompts."""
PROMPTS, GENERATIONS, PICTURES_AT_A_TIME = 16, 4, 8
"""Defaults of num_prompts, num_generations and batch_size with prompts."""
OF_PROMPTS = ("num_prompts", "num_generations")
"""Settings of models with prompts only."""


class Point(Sampling):
    """A sampling point: a row of the table of an evaluation."""

    solver: SolverName = "euler"
    num_inference_steps: Count = 50
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Scale of classifier-free guidance; the model's own by default, 1 is no guidance."""

    @property
    def sampling(self) -> Sampling:
        """The sampling without the guidance scale."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class Evaluation(Settings):
    """Evaluation after training, of the base and the tuned model from the same noise."""

    num_samples: Annotated[int, Field(ge=2)] | None = None
    """Number of samples of each of the two models: 1024 by default; with prompts, num_prompts x num_generations."""
    num_prompts: Count | None = None
    """Largest number of held-out prompts; 16 by default."""
    num_generations: Annotated[int, Field(ge=2)] | None = None
    """Number of samples of each prompt; 4 by default."""
    batch_size: Count | None = None
    """Number of samples at a time: 256 by default, 8 with prompts. The samples depend on it."""
    points: Annotated[tuple[Point, ...], Field(min_length=1)] | None = None
    """Sampling points. The first one, which can be given as `sampling` of a recipe instead, is that of the pictures and of the
    report's numbers."""
    rewards: tuple[NamedReward, ...] = ()
    """Held-out rewards, which training does not use."""
    judge: PathOrName | None = None
    """Classifier that is not part of the reward; its class histogram is compared with the target's."""
    group: Labels = ()
    """Classes of the judge that are reported together."""
    data: PathOrName | None = None
    """Real images, an .npz file or a folder, to which the Fréchet distance of samples is computed in the judge's features; for
    molecules a file of SMILES, among which they are looked up: others are new."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability of the likeliest class above which the judge counts as sure of a sample."""
    features: PathOrName | None = None
    """Features for diversity and the distance to the base; pixels by default. A CLIP model, by folder or name on the hub, or
    your `package.module:function` of images [batch, channels, height, width] in [-1, 1], such as DreamSim's."""
    reference: Annotated[str, External(but=("base",))] | None = None
    """Reference pictures of FID and KID, in the features: an .npz file, a folder, or `base` for fresh samples of the base."""
    grid: Count = 64
    """Largest number of samples in the pictures before and after."""

    @model_validator(mode="after")
    def _reference_has_features(self) -> Evaluation:
        if self.reference is not None and self.features is None:
            raise ValueError("reference needs features, in which pictures are compared")
        return self

    def for_samples(self, sampling: Sampling | None = None) -> Evaluation:
        """Return the settings with the defaults of a model without prompts, and `sampling` as the first point.

        Raises InputError for a setting of models with prompts, and if `sampling` differs from the first of `points`.
        """
        for name in OF_PROMPTS:
            if (value := getattr(self, name)) is not None:
                raise InputError(f"evaluation.{name} ({value}): this model has no prompts; set num_samples instead")
        sizes = {"num_samples": self.num_samples or SAMPLES, "batch_size": self.batch_size or BATCH_SIZE}
        return self._sampled(sampling, Sampling(), sizes)

    def for_prompts(self, sampling: Sampling | None = None) -> Evaluation:
        """Return the settings with the defaults of a model with prompts, and `sampling` as the first point.

        Raises InputError for a setting of models without prompts, and if `sampling` differs from the first of `points`.
        """
        if self.num_samples is not None:
            raise InputError("evaluation.num_samples: this model has prompts; set num_prompts and num_generations instead")
        sizes = {
            "num_prompts": self.num_prompts or PROMPTS,
            "num_generations": self.num_generations or GENERATIONS,
            "batch_size": self.batch_size or PICTURES_AT_A_TIME,
        }
        return self._sampled(sampling, Point(), sizes)

    def _sampled(self, sampling: Sampling | None, default: Sampling, sizes: dict[str, int]) -> Evaluation:
        points = self.points
        if points is None:
            chosen = default if sampling is None else sampling
            points = (Point(**{name: getattr(chosen, name) for name in Sampling.model_fields}),)
        elif sampling is not None and sampling != points[0].sampling:
            raise InputError("sampling: differs from the first of evaluation.points; give only one of the two")
        if points[0].scheduler is not None:
            raise InputError("evaluation.points: the first one is that of a solver; give those of a scheduler after it")
        return self.model_copy(update={**sizes, "points": points})

    @property
    def first(self) -> Point:
        """First point, that of the pictures and the report's numbers; `for_samples` or `for_prompts` fills it in."""
        assert self.points is not None
        return self.points[0]

    @property
    def at_once(self) -> int:
        """`batch_size`; `for_samples` or `for_prompts` fills it in."""
        assert self.batch_size is not None
        return self.batch_size
