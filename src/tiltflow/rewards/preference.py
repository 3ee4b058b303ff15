"""A reward learned from votes: which of two pictures people choose."""

# Mutation tests: test_preference.py

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import InputError, Note
from tiltflow.models.model_folder import load_classifier
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.bradley_terry import fit, held_out, share_interval, spanned, strength
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.serving.votes import Votes
from tiltflow.settings import PathOrName, Settings
from tiltflow.streams import stream
from tiltflow.user_code import refused

Features = Callable[[Tensor], Tensor]
FEWEST = 10
"""Votes for one of the two below which nothing is learned."""
AT_A_TIME = 64


class Preference(Settings):
    """w . features(x), fitted to votes of `tiltflow vote` when it is loaded: the difference between two pictures is the
    log-odds that people choose the one (Bradley-Terry). A tie counts as half a vote for either."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "nats"

    name: Literal["preference"] = "preference"
    votes: PathOrName
    """The folder of the votes."""
    classifier: PathOrName | None = None
    """Features: those of a classifier that ships with tiltflow, such as digits-classifier, or lies in this folder; not those of
    the judge, who would then be part of the reward."""
    clip: PathOrName | None = None
    """Or those of pictures by a CLIP model: a folder or a name on the hub."""
    l2: Annotated[float, Field(gt=0)] | None = None
    """Penalty on w, in units in which differences of features have mean square 1; by default the one of fifteen, from 0.001 to
    10,000, under which votes that are left out, one at a time, are likeliest."""

    @model_validator(mode="after")
    def _one_backbone(self) -> Preference:
        if (self.classifier is None) == (self.clip is None):
            raise ValueError("give either classifier or clip, whose features it is learned in")
        return self

    @property
    def description(self) -> str:
        return f"log-odds that people who voted in {self.votes} choose a picture, up to a constant"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Fit it, and say how well it predicts votes that are held out. Raises InputError if there are too few votes, or if the
        votes or the backbone cannot be read."""
        votes, features = Votes.open(Path(self.votes)), self._features(device)
        learned = learn(votes, features, self.l2, device)
        warnings.warn(f"reward preference: {learned.words}", Note, stacklevel=2)
        w = learned.weights.to(device=device, dtype=torch.float32)
        return of_frames(lambda x: features(x) @ w)

    def _features(self, device: torch.device | str) -> Features:
        if self.clip is not None:
            return Clip.load(self.clip, device).image_features
        assert self.classifier is not None
        network: Any = load_classifier(self.classifier, device)[0]
        return lambda x: network.features(x.to(next(network.parameters()).dtype)).flatten(1).float()


@dataclass(frozen=True)
class Learned:
    """A reward that was fitted to votes.

    Args:
        weights: of the features, float64 [width].
        votes, ties: how many there were.
        accuracy: share of the held-out votes without ties that it predicts, and its interval of 95 %.
        l2: penalty that was chosen.
    """

    weights: Tensor
    votes: int
    ties: int
    accuracy: float
    interval: tuple[float, float]
    l2: float

    @property
    def words(self) -> str:
        """What to expect of it, in one sentence."""
        low, high = self.interval
        told = (
            f"{self.votes} votes, {self.ties} of them ties; of held-out votes it predicts {self.accuracy:.0%}"
            f" ({low:.0%} to {high:.0%})"
        )
        return told if low > 0.5 else f"{told}, which chance explains: there are too few votes, or these features do not tell"


@torch.no_grad()
def learn(votes: Votes, features: Features, l2: float | None = None, device: torch.device | str = "cpu") -> Learned:
    """Fit weights of `features` to votes. Raises InputError if there are fewer than FEWEST without ties."""
    outcomes = votes.outcomes()
    decided = outcomes != 0.5
    if (count := int(decided.sum())) < FEWEST:
        raise InputError(
            f"{votes.folder}: {count} votes for one of two pictures; at least {FEWEST} are needed, and about 100 to learn much"
        )

    def of_side(side: int) -> Tensor:
        return torch.cat([features(part.to(device)).double().cpu() for part in votes.pictures(side).split(AT_A_TIME)])

    with refused(f"{votes.folder}: its pictures do not fit the features"):
        differences = of_side(0) - of_side(1)
    scale = differences.square().sum(1).mean().sqrt().clamp(min=1e-300)
    differences = differences / scale
    margins = held_out(differences, outcomes, stream(votes.seed, "held out"), l2=l2)[decided]
    right = float(((margins > 0) == (outcomes[decided] > 0.5)).sum())
    some, basis = spanned(differences)
    chosen = strength(some, outcomes) if l2 is None else l2
    weights = basis @ fit(some, outcomes, chosen) / scale
    return Learned(weights, len(outcomes), len(outcomes) - count, right / count, share_interval(right, count), chosen)
