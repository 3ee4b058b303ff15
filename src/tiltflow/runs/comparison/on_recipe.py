"""Methods on a recipe: its model, reward and training, with each method's own settings in place of the recipe's."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.evaluation.samples import Instruments
from tiltflow.evaluation.settings import Point
from tiltflow.evaluation.table import BaseSamples
from tiltflow.files import write_rows
from tiltflow.laws.target import TILTED
from tiltflow.runs.comparison.subject import Chosen, Law, OnBatchEnd, at_temperature, sampled_by
from tiltflow.runs.evaluate import evaluate, glance
from tiltflow.runs.prepare import check_reward
from tiltflow.runs.recipe import Recipe, find_recipe, read_one_run, read_recipe_tree
from tiltflow.runs.run import Ready, ready
from tiltflow.runs.run_files import RECIPE, write_yaml
from tiltflow.samplers.grid import Start
from tiltflow.settings import apply_overrides
from tiltflow.training.determinism import deterministic
from tiltflow.training.records import METRICS, line_of
from tiltflow.training.trainer import Record

RUNS = "runs"
NO_FOLDER = {"monitor": None, "report_to": None, "resume_from_checkpoint": None}


@dataclass(frozen=True)
class OnRecipe:
    """A recipe of one run.

    Args:
        tree: its settings, not validated.
        settings: overrides of the recipe that are in them already, `key=value`.
    """

    name: str
    beta: float
    tree: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    law = TILTED

    @classmethod
    def named(cls, name_or_path: str, settings: tuple[str, ...], beta: float | None) -> OnRecipe:
        """The recipe of this name or in this file, with overrides `key=value`, at the temperature of its own method unless
        `beta` is given.

        Raises InputError if there is none, it is not valid, or it has no temperature.
        """
        path = find_recipe(name_or_path, "train")
        tree = read_recipe_tree(path, settings)
        recipe = read_one_run(tree, name_or_path)
        own = beta or recipe.method.temperature
        if own is None:
            raise InputError(f"compare: {name_or_path}: its method has no temperature; give that of the target law by --beta")
        name = path.parent.name if path.name == RECIPE else path.stem
        return cls(name, own, tree, settings)

    @property
    def black_box(self) -> bool:
        """See `Subject`."""
        return not read_one_run(self.tree, self.name).reward.differentiable

    def read(self, chosen: Chosen) -> Recipe:
        """The recipe of a training: the method has its own defaults, its optimizer too, and samples are drawn by its solver."""
        kept = {key: value for key, value in self.tree.items() if key != "optimizer"}
        tree = {**kept, "method": {"name": chosen.name}, "seed": chosen.seed}
        where = f"{self.name} by {chosen.name}"
        first = read_one_run(apply_overrides(tree, [placed(text) for text in chosen.settings]), where)
        method = at_temperature(first.method, self.beta)
        optimizer = first.optimizer.model_copy(update={"learning_rate": first.optimizer.learning_rate * chosen.factor})
        none = {"calibration_samples": 0, "target_kl": None} if method.temperature is None else {}
        training = first.training.model_copy(update=NO_FOLDER | none | {"max_train_steps": chosen.steps})
        point = first.evaluation.first
        points = (Point(**point.model_copy(update=sampled_by(method)).model_dump()),)
        evaluation = first.evaluation.model_copy(update={"points": points})
        changed = {"method": method, "optimizer": optimizer, "training": training, "evaluation": evaluation}
        return first.model_copy(update=changed)

    def admit(self, chosen: Chosen) -> None:
        """See `Subject`."""
        recipe = self.read(chosen)
        check_reward(recipe.reward, recipe.method)

    def trial(self, chosen: Chosen, device: str) -> RecipeTrial:
        """See `Subject`."""
        recipe = self.read(chosen)
        return RecipeTrial(self, recipe, ready(recipe, device), device)

    def as_tree(self) -> Mapping[str, Any]:
        """See `Subject`."""
        return {"recipe": dict(self.tree), "settings": list(self.settings), "beta": self.beta}


def placed(override: str) -> str:
    """An override of a method, in a recipe: one of the recipe stays as it is, any other is of the method.

    >>> placed("num_passes=2"), placed("optimizer.learning_rate=1e-3")
    ('method.num_passes=2', 'optimizer.learning_rate=1e-3')
    """
    return override if override.partition("=")[0].partition(".")[0] in Recipe.model_fields else f"method.{override}"


class RecipeTrial:
    """See `tiltflow.runs.comparison.subject.Trial`."""

    def __init__(self, subject: OnRecipe, recipe: Recipe, these: Ready, device: str):
        self.subject, self.recipe, self.these, self.device = subject, recipe, these, device
        self.method, self.learning_rate = recipe.method, recipe.optimizer.learning_rate
        self.records: list[dict[str, Any]] = []
        self.base_samples: BaseSamples = {}

    @property
    def start(self) -> Start:
        """See `Trial`."""
        start: Start = self.these.parts.untuned.grid
        return start

    def loop(self, on_batch_end: OnBatchEnd) -> Generator[Record, None, None]:
        """See `Trial`."""
        with deterministic(self.recipe.training.deterministic):
            for record in self.these.parts.loop(on_batch_end=on_batch_end):
                self.records.append(line_of(record))
                yield record

    def measure(self, keep: Path | None, *, whole: bool) -> dict[str, Any]:
        """See `Trial`: the evaluation of the recipe, as `tiltflow evaluate` does it, against p_base exp(r / beta); on the way
        its reward and diversity alone."""
        law = Law(name=self.method.name, beta=self.subject.beta, drawn=self.method.sampling)
        recipe = self.recipe.model_copy(update={"method": law})
        models, asked, instruments = self.these.in_precision(self.recipe), self.these.asked, self.these.instruments
        if not whole:
            own = replace(instruments, rewards={instruments.own: instruments.rewards[instruments.own]})
            return row_of(glance(recipe, self.records[-1], *models, asked, own, base_samples=self.base_samples), own)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if keep is not None:
                folder = keep / RUNS / self.subject.name / f"{self.method.name},seed={recipe.seed}"
                folder.mkdir(parents=True, exist_ok=True)
                write_yaml(folder / RECIPE, self.recipe.model_dump(mode="json"))
            write_rows(folder / METRICS, self.records)
            found = evaluate(recipe, folder, *models, asked, instruments, base_samples=self.base_samples)
            return row_of(found, instruments)


def row_of(summary: Mapping[str, Any], instruments: Instruments) -> dict[str, Any]:
    """What a comparison keeps of a summary, or of the part of it that `glance` gives."""
    base, tuned = summary["table"][:2]
    others = [name for name in instruments.rewards if name != instruments.own]
    return {
        "reward": summary["reward_tuned"],
        "reward_error": summary["reward_tuned_error"],
        "reward_base": summary["reward_base"],
        "reward_target": summary.get("reward_target"),
        "held_out": {name: tuned[name] for name in others},
        "held_out_base": {name: base[name] for name in others},
        "distance": summary.get("target_distance"),
        "floor": summary.get("target_distance_floor"),
        "distance_base": summary.get("target_distance_base"),
        "diversity": tuned.get("vendi"),
        "diversity_base": base.get("vendi"),
        "diversity_target": None,
        **{key: summary.get(key) for key in ("achieved_tilt", "achieved_tilt_error", "path_kl", "effective_sample_size")},
    }
