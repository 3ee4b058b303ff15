"""Recipes of stages: a utility of the whole law is what is tuned toward, in place of a reward."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from tiltflow.rewards import NamedReward
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.staged.of_law import no_one_shot
from tiltflow.runs.staged.settings import Stages
from tiltflow.utilities import NamedUtility


class StagedRecipe(CommonRecipe):
    """Stages, complete: each is a training run of its own."""

    OWN: ClassVar[tuple[str, ...]] = ("utility", "rewards", "stages")
    """What a recipe of one run has not."""

    utility: NamedUtility
    """What is tuned toward, in place of `reward`, which makes the recipe one of stages: `tiltflow settings` lists the
    utilities."""
    rewards: dict[str, NamedReward] = Field(default_factory=dict)
    """The rewards that the utility is made of, by the names that it has for them: {reward: .., cost: ..}; `reward: ..` beside
    the utility is short for the one called reward."""
    stages: Stages = Stages()
    """The outer loop."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, tree: Any) -> Any:
        """`reward` is that of `rewards`; stages train the whole network of a pipeline, unless its adapter is asked for."""
        if not isinstance(tree, dict):
            return tree
        tree = dict(tree)
        if "reward" in tree:
            rewards = tree.get("rewards") or {}
            if not isinstance(rewards, dict) or "reward" in rewards:
                raise ValueError("reward and rewards.reward both give the reward; give it once")
            tree["rewards"] = {"reward": tree.pop("reward"), **rewards}
        if isinstance(tree.get("model"), dict) and "diffusers" in tree["model"]:
            tree["model"] = {"adapter": None, **tree["model"]}
        return tree

    @model_validator(mode="after")
    def _fit(self) -> StagedRecipe:
        if self.source.adapter is not None:
            raise ValueError("model.adapter: stages tune the whole network, beside that of an earlier stage; leave it out")
        if self.training.resume_from_checkpoint not in (None, "latest"):
            raise ValueError("training.resume_from_checkpoint: stages go on from the latest checkpoint; give latest")
        if self.stages.warm and self.method.needs.begins_as_base:
            raise ValueError(f"stages.warm: {self.method.name} counts its law from where it begins; leave it out")
        if self.stages.one_shot and (why := no_one_shot(self.utility, self.method, self.training)):
            raise ValueError(f"stages.one_shot: {why}")
        return self

    @property
    def runs(self) -> int:
        assert self.stages.count is not None
        return self.stages.count

    @property
    def reward_name(self) -> str:
        return f"first variation of {self.utility.name}"

    @property
    def reward_description(self) -> str:
        return f"first variation of a utility that prefers {self.utility.words}"

    @property
    def alpha(self) -> float:
        """The price of the KL from the first model, as caveats of the utility are told it."""
        return self.stages.price if self.stages.base == "last" else self.method.temperature or 0.0
