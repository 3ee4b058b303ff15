"""Recipes: everything that a training run depends on, as a YAML file in the package, by name, or the user's own, by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Protocol

from tiltflow.errors import InputError, did_you_mean
from tiltflow.evaluation.settings import Evaluation
from tiltflow.plugins import run_around
from tiltflow.rewards import NamedReward
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.settings import apply_overrides, read_yaml, validate
from tiltflow.shipped import by_name
from tiltflow.training.method import Method
from tiltflow.training.optimizer import Optimizer, move_old_keys
from tiltflow.training.settings import Training

Kind = Literal["train", "pretrain"]
RECIPES = Path(str(resources.files("tiltflow"))) / "recipes"


def shipped_recipes(kind: Kind) -> dict[str, Path]:
    """The recipes inside the package, by name."""
    return {path.stem: path for path in sorted((RECIPES / kind).glob("*.yaml"))}


def find_recipe(name_or_path: str, kind: Kind) -> Path:
    """The file of a shipped recipe by name, or the user's own by path. Raises InputError if there is none."""
    shipped = shipped_recipes(kind)
    if found := by_name(name_or_path, shipped, "recipe"):
        return found
    path = Path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").exists():
        return path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        return path  # a pipe too
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"{path}: no such file")
    other: Kind = "pretrain" if kind == "train" else "train"
    if name_or_path in shipped_recipes(other):
        raise InputError(f"{name_or_path!r} is a recipe for `tiltflow {other}`")
    raise InputError(f"there is no recipe {name_or_path!r}{did_you_mean(name_or_path, shipped)}; or give a .yaml file")


def read_recipe_tree(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings in a recipe file with `a.b=value` overrides applied, not yet validated."""
    tree = read_yaml(path)
    in_run = path.name == "recipe.yaml" and run_around(path.parent) == path.parent
    return apply_overrides(move_old_keys(tree) if in_run else tree, overrides)


class Recipe(CommonRecipe):
    """A training run, complete."""

    reward: NamedReward
    """What is tuned toward: `tiltflow settings` lists the rewards."""

    @property
    def reward_name(self) -> str:
        return self.reward.name

    @property
    def reward_description(self) -> str:
        return self.reward.description


class RunSettings(Protocol):
    """What is written down of a training run, whether a recipe or a program began it."""

    description: str
    method: Method
    optimizer: Optimizer
    training: Training
    evaluation: Evaluation
    seed: int

    @property
    def model_name(self) -> str: ...

    @property
    def reward_name(self) -> str: ...

    @property
    def reward_description(self) -> str: ...


def read_recipe(tree: Mapping[str, Any], where: str) -> Recipe | StagedRecipe:
    """A training recipe from its settings; with a utility it is one of stages. Raises InputError, naming `where`, for the first
    thing that is wrong."""
    if "begun_by" in tree:
        stages = " (of stages: give the folder that holds them)" if Path(where).parent.name.startswith("stage-") else ""
        began = f"{tree['begun_by']} began this run{stages}, in a program that has its model and reward; go on there"
        raise InputError(f"{where}: {began}")
    staged = any(name in tree for name in StagedRecipe.OWN)
    return validate(StagedRecipe, tree, where) if staged else validate(Recipe, tree, where)


def read_one_run(tree: Mapping[str, Any], where: str) -> Recipe:
    """A recipe of one run. Raises InputError for what is wrong, and for a recipe of stages."""
    recipe = read_recipe(tree, where)
    if isinstance(recipe, StagedRecipe):
        raise InputError(f"{where}: is a recipe of stages, which are several runs; this takes a recipe of one run")
    return recipe
