"""Finding recipes: YAML files inside the package by name, or the user's own by path."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from tiltflow.errors import InputError, did_you_mean
from tiltflow.plugins import run_around
from tiltflow.settings import apply_overrides, read_yaml
from tiltflow.shipped import by_name
from tiltflow.training.optimizer import move_old_keys

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


def is_text_to_image(tree: Any) -> bool:
    """Whether a training recipe, as it was read, is one of a diffusers pipeline."""
    return isinstance(tree, dict) and isinstance(tree.get("model"), dict)
