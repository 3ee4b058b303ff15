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
"""Without prompts, where a recipe says nothing."""
PROMPTS, GENERATIONS, PICTURES_AT_A_TIME = 16, 4, 8
"""With prompts."""
OF_PROMPTS = ("num_prompts", "num_generations")
"""Settings that mean something only for a model with prompts."""


class Point(Sampling):
    """A way to sample, of which there is a row in the table."""

    solver: SolverName = "euler"
    num_inference_steps: Count = 50
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """The model's own by default; 1 is none."""

    @property
    def sampling(self) -> Sampling:
        """Without the guidance."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


class Evaluation(Settings):
    """What is measured after training: of the base and the tuned model alike, from the same noise."""

    num_samples: Annotated[int, Field(ge=2)] | None = None
    """Of each of the two models, 1024 by default; with prompts, num_prompts x num_generations."""
    num_prompts: Count | None = None
    """Held-out prompts, at most; 16 by default."""
    num_generations: Annotated[int, Field(ge=2)] | None = None
    """Samples of each of them, 4 by default."""
    batch_size: Count | None = None
    """Samples at a time: 256 by default, 8 with prompts. It is part of what they depend on."""
    points: Annotated[tuple[Point, ...], Field(min_length=1)] | None = None
    """How samples are drawn; the first one, which `sampling` of a recipe gives too, is that of the pictures and the report's
    numbers."""
    rewards: tuple[NamedReward, ...] = ()
    """Held-out rewards, which training has not seen."""
    judge: PathOrName | None = None
    """A classifier that was never part of the reward: its class histogram is compared with the target's."""
    group: Labels = ()
    """Classes of the judge to report together."""
    data: PathOrName | None = None
    """Real images, an .npz file or a folder: samples are then compared with them, in the judge's features, by the Frechet
    distance."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A sample is one that the judge is sure of if its likeliest class has more than this probability."""
    features: PathOrName | None = None
    """In which features samples are compared, for diversity and the distance to the base: a CLIP model, a folder or a name on
    the hub, or yours, `package.module:function` of images [batch, channels, height, width] in [-1, 1], such as DreamSim's.
    Without it, in pixels."""
    reference: Annotated[str, External(but=("base",))] | None = None
    """Pictures that FID and KID compare with, in the features: an .npz file, a folder, or `base`, fresh ones of the base."""
    grid: Count = 64
    """Samples in the before and after pictures, at most."""

    @model_validator(mode="after")
    def _reference_has_features(self) -> Evaluation:
        if self.reference is not None and self.features is None:
            raise ValueError("reference needs features, in which pictures are compared with it")
        return self

    def for_samples(self, sampling: Sampling | None = None) -> Evaluation:
        """The settings with the defaults of a model without prompts, and `sampling` as the first way to sample.

        Raises InputError for a setting that such a model gives no meaning, or a first way that is another.
        """
        for name in OF_PROMPTS:
            if (value := getattr(self, name)) is not None:
                raise InputError(f"evaluation.{name} ({value}): this model has no prompts; num_samples says how many are drawn")
        sizes = {"num_samples": self.num_samples or SAMPLES, "batch_size": self.batch_size or BATCH_SIZE}
        return self._sampled(sampling, Sampling(), sizes)

    def for_prompts(self, sampling: Sampling | None = None) -> Evaluation:
        """The settings with the defaults of a model with prompts, and `sampling` as the first way to sample.

        Raises InputError for a setting that such a model gives no meaning, or a first way that is another.
        """
        if self.num_samples is not None:
            raise InputError(
                "evaluation.num_samples: with prompts there are num_prompts x num_generations samples; give these instead"
            )
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
            raise InputError("sampling: is the first of evaluation.points, and they differ; give one of the two")
        return self.model_copy(update={**sizes, "points": points})

    @property
    def first(self) -> Point:
        """The way to sample of the pictures and the report's numbers, once `for_samples` or `for_prompts` has filled it in."""
        assert self.points is not None
        return self.points[0]

    @property
    def at_once(self) -> int:
        """`batch_size`, once it is filled in."""
        assert self.batch_size is not None
        return self.batch_size
