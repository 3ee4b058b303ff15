"""Settings: the base class of everything that a recipe can describe, and the strict reading of YAML into it.

A typo, a wrong type or a value out of range is one line that names the key and what would be right.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tiltflow.errors import InputError, did_you_mean


class Settings(BaseModel):
    """Frozen, unknown keys forbidden. Construct it in Python, or from a recipe; both are checked alike."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=False)


S = TypeVar("S", bound=Settings)


class _StrictLoader(yaml.SafeLoader):
    """YAML without its three traps: `1e-4` is a number, `no` and `on` are words, a repeated key is an error."""


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def _no_repeated_keys(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise InputError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
        seen.add(key)
    return dict(loader.construct_pairs(node, deep=True))


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _no_repeated_keys)


def parse_yaml(text: str, where: str) -> Any:
    """The content of strict YAML. Raises InputError, naming `where`, if it is not valid."""
    try:
        return _StrictLoader(text).get_single_data()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:  # PyYAML raises all of them
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()
        raise InputError(f"{where}{line}: not valid YAML ({problem[0] if problem else type(error).__name__})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError if the file is missing, unreadable or not a mapping."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of settings, got {type(content).__name__}")
    return content


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with each `a.b=value` set; values are read as YAML, so `1e-4`, `[0, 2]` and `true` work."""
    result = copy.deepcopy(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override}: must read key=value, for example method.learning_rate=1e-4")
        *parents, last = key.strip().split(".")
        node = result
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise InputError(f"--set {override}: {name!r} has no settings below it")
            node = child
        node[last] = parse_yaml(text, f"--set {key}")
    return result


def validate(kind: type[S], tree: Mapping[str, Any], where: str) -> S:
    """`tree` as an instance of `kind`. Raises InputError with one line for the first thing that is wrong."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(kind, error)}") from None


def first_problem(kind: type[BaseModel], error: ValidationError) -> str:
    """One line for the problem that most likely explains the others, with the dotted name of the setting."""
    problems = error.errors(include_url=False)
    # an unknown key is most often the cause of the other complaints
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path, models = _walk(kind, problem["loc"])
    dotted, message = ".".join(path), problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    match problem["type"]:
        case "part":
            return f"{dotted}.{message}"
        case "extra_forbidden":
            return (
                f"{dotted} is not a setting{did_you_mean(path[-1], [name for model in models for name in model.model_fields])}"
            )
        case "missing":
            return f"{dotted} is missing"
        case "value_error":
            return f"{dotted}: {message}" if dotted else message
        case "literal_error" | "union_tag_invalid":
            near = did_you_mean(str(problem["input"]), re.findall(r"'([^']*)'", message))
            return f"{dotted} must be {message}{near if near.startswith(', did') else ''} (got {problem['input']!r})"
        case _:
            return f"{dotted} must be {message} (got {problem['input']!r})"


def _walk(kind: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The settings along a location, without the tags that pydantic adds for unions, and the models that hold the last."""
    path: list[str] = []
    models, holders = [kind], [kind]
    for part in location:
        fields = [model.model_fields[str(part)].annotation for model in models if str(part) in model.model_fields]
        named = [model for model in models if model.model_fields.get("name") and model.model_fields["name"].default == part]
        if named and not fields:
            models = holders = named
            continue
        path.append(str(part))
        holders = models
        models = [model for annotation in fields for model in _models_in(annotation)] if fields else models
    return path, holders


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every settings class inside an annotation such as `tuple[A, ...] | B`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
