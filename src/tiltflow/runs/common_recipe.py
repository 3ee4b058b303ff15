"""What all recipes of `tiltflow train` have: a model, what it is asked for, a method, and how it is trained and measured."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from tiltflow.conditions import Conditions, NamedConditions
from tiltflow.conditions.labels import Labels
from tiltflow.conditions.observations import Observations
from tiltflow.conditions.prompts import Prompts
from tiltflow.evaluation.settings import Evaluation
from tiltflow.models.sources import ModelName, ModelSource, source_of
from tiltflow.models.sources.policy import Policy
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.training.method import NamedMethod, fewest_samples
from tiltflow.training.optimizer import Optimizer, fill_optimizer
from tiltflow.training.settings import Training


class CommonRecipe(Settings):
    """All of a training run but what is tuned toward."""

    description: str = ""
    """A line for people: it is shown when the run begins, and in its report."""
    model: ModelName
    """A model that ships with tiltflow, or a model folder; `{path: .., adapter: ..}` trains a LoRA in it; `{diffusers: ..}` is
    a pipeline of diffusers."""
    prompts: Prompts | None = None
    """What a pipeline is asked for: `conditions` of the kind `prompts`."""
    conditions: NamedConditions | None = None
    """What samples are asked for, of any kind; by default all classes of a class-conditional model."""
    method: NamedMethod
    """How it is tuned: `tiltflow settings` lists the methods."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its schedule."""
    training: Training = Training()
    """The loop."""
    sampling: Sampling | None = None
    """How the models are sampled for the evaluation: the first of evaluation.points."""
    evaluation: Evaluation = Evaluation()
    """What is measured after training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        prompted = self.source.prompted
        if self.prompts is not None and self.conditions is not None:
            raise ValueError("prompts and conditions both say what samples are asked for; give one of the two")
        if isinstance(self.source, Policy) and not isinstance(self.conditions, Observations):
            raise ValueError("conditions: a policy draws actions for observations; give {name: observations, data: ..}")
        if prompted and self.prompts is None and self.conditions is None:
            raise ValueError("prompts is missing")
        if not prompted and isinstance(self.asked_for, Prompts):
            raise ValueError("prompts: are for a pipeline, `model: {diffusers: ..}`, and this model is none; leave them out")
        if self.conditions is not None and self.training.classes:
            raise ValueError("training.classes and conditions both say what samples are asked for; give one of the two")
        guided = not isinstance(self.asked_for, Observations)
        training = self.training.for_prompts(guided=guided) if prompted else self.training.for_samples()
        evaluation = self.evaluation.for_prompts(self.sampling) if prompted else self.evaluation.for_samples(self.sampling)
        object.__setattr__(self, "optimizer", fill_optimizer(self.method, self.optimizer))
        object.__setattr__(self, "training", training)
        object.__setattr__(self, "evaluation", evaluation)
        object.__setattr__(self, "sampling", None)  # it is the first of evaluation.points now
        name = "num_generations" if prompted else "train_batch_size"
        if why := self.method.learns_nothing(size := getattr(training, name)):
            raise ValueError(f"training.{name} {size} teaches nothing: {why}; give {fewest_samples(self.method)} or more")
        return self

    @property
    def asked_for(self) -> Conditions:
        """What samples are asked for."""
        return self.conditions or self.prompts or Labels(classes=self.training.classes)

    @property
    def source(self) -> ModelSource[Any]:
        """Where the model comes from."""
        return source_of(self.model)

    @property
    def model_name(self) -> str:
        """The model, as a report says it."""
        return self.source.title

    @property
    def runs(self) -> int:
        """How many trainings it is."""
        return 1

    @property
    def reward_name(self) -> str:
        """The reward of a training, as a report says it."""
        raise NotImplementedError

    @property
    def reward_description(self) -> str:
        """The same in a sentence."""
        raise NotImplementedError
