"""Descriptions of settings: name, type, default, and the sentence below the setting in the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from tiltflow.errors import InputError, did_you_mean
from tiltflow.plugins import find, member, names
from tiltflow.settings import Settings

PARTS = {
    "methods": "method",
    "rewards": "reward",
    "networks": "network",
    "conditions": "conditions",
    "utilities": "utility",
    "steering": "steering",
}
SECTIONS = ("prompts", "stages", "optimizer", "training", "sampling", "evaluation")
"""Sections of a recipe; their settings, and those of a model, have dotted names, as `--set` takes them."""
Topic = tuple[str, Callable[[], type[Settings]]]
"""A title, and a function that imports the class of settings."""


@dataclass(frozen=True)
class Setting:
    """A setting, as `--set` and a recipe take it."""

    name: str
    """Dotted: `critic.loss` is `loss` within `critic`."""
    type: str
    default: str
    """In YAML; "required" if there is none."""
    description: str


def topics() -> dict[str, list[Topic]]:
    """The topics of `settings_of`, by name."""
    found: dict[str, list[Topic]] = {}
    for package, what in PARTS.items():
        for name in names(package):
            found.setdefault(name, []).append((f"{what} {name}", partial(find, package, name)))
    found["recipe"] = [("recipe of `tiltflow train`", _recipe), ("in place of `reward`, in a recipe of stages", _staged)]
    found["model"] = [(f"model in a recipe: {name}", partial(find, "models.sources", name)) for name in names("models.sources")]
    for section in SECTIONS:
        found[section] = [(f"{section} in a recipe", partial(_section, section))]
    for name in names("problems"):
        found[name] = [(f"problem {name} of `tiltflow verify`", partial(find, "problems", name))]
    for name in names("pretraining.tasks"):
        found[name] = [(f"recipe of `tiltflow pretrain`, task {name}", partial(member, "pretraining.tasks", name, "RECIPE"))]
    return found


def settings_of(topic: str) -> dict[str, tuple[str, list[Setting]]]:
    """Describe everything of that name: its title -> a paragraph, and its settings. Raises InputError if there is none."""
    known = topics()
    if topic not in known:
        raise InputError(f"there are no settings of {topic!r}{did_you_mean(topic, known)}")
    prefix = f"{topic}." if topic in ("model", *SECTIONS) else ""
    shared = _staged().model_fields.keys() & _recipe().model_fields.keys()
    return {
        title: (_paragraph(kind := get()), list(listed(kind, prefix, without=shared if kind is _staged() else ())))
        for title, get in known[topic]
    }


def listed(kind: type[Settings], prefix: str = "", *, without: Collection[str] = ()) -> Iterator[Setting]:
    """Yield the settings of a class; after a setting that is itself a class of settings, those of that class.

    Args:
        without: fields that are left out.
    """
    schema, said = kind.model_json_schema(), sentences(kind)
    for name, field in kind.model_fields.items():
        if name == "name" or name in without:
            continue  # `name` selects this class
        yield Setting(
            prefix + name, type_in_words(schema["properties"][name], schema), _default(field), _one_line(said.get(name, ""))
        )
        several = any(get_origin(part) is tuple for part in (field.annotation, *get_args(field.annotation)))
        for inner in _inner(field):
            yield from listed(inner, f"{prefix}{name}{'[]' if several else ''}.")


@cache
def sentences(kind: type[Settings]) -> dict[str, str]:
    """The string below each field in the code of a class and its bases."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if issubclass(part, Settings):
            body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, below in pairwise(body.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = text
    return found


def type_in_words(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Describe a JSON schema in words.

    >>> type_in_words({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}, {})
    'integer >= 1, or null'
    >>> type_in_words({"type": "array", "items": {"enum": ["a", "b"]}}, {})
    'list of (a | b)'
    """
    if "$ref" in schema:
        return type_in_words(whole["$defs"][schema["$ref"].rsplit("/", 1)[1]], whole)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return ", or ".join(dict.fromkeys(type_in_words(part, whole) for part in schema[key]))
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    match schema.get("type"):
        case "array":
            if "prefixItems" in schema:
                return f"[{', '.join(type_in_words(part, whole) for part in schema['prefixItems'])}]"
            items = type_in_words(schema.get("items", {}), whole)
            return f"list of {f'({items})' if '|' in items or ',' in items else items}"
        case "integer" | "number" as kind:
            signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
            bounds = " and ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)
            return f"{kind} {bounds}".strip()
        case "boolean":
            return "true | false"
        case "string":
            return "regular expression" if schema.get("format") == "regex" else "text"
        case "object":
            return "mapping"
        case "null":
            return "null"
        case _:
            return "name, or mapping with a name"  # a method, a reward, a network


def _inner(field: FieldInfo) -> list[type[Settings]]:
    """The classes of settings in the type of a field."""

    def within(annotation: Any) -> list[type[Settings]]:
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            return [annotation]
        return [kind for part in get_args(annotation) for kind in within(part)]

    return within(field.annotation)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Settings):
        return value.model_dump_json(exclude_defaults=True)
    if isinstance(value, tuple) and any(isinstance(part, Settings) for part in value):
        return json.dumps([part.model_dump(mode="json", exclude_defaults=True) for part in value])
    return json.dumps(value.pattern if isinstance(value, re.Pattern) else value, ensure_ascii=False)


def _paragraph(kind: type[Settings]) -> str:
    """The first paragraph of the docstring of a class, or of its module."""
    said = kind.__doc__ or inspect.getmodule(kind).__doc__ or ""
    return _one_line(inspect.cleandoc(said).split("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _recipe() -> type[Settings]:
    from tiltflow.runs.recipe import Recipe

    return Recipe


def _staged() -> type[Settings]:
    from tiltflow.runs.staged.recipe import StagedRecipe

    return StagedRecipe


def _section(section: str) -> type[Settings]:
    return _inner((_recipe().model_fields | _staged().model_fields)[section])[0]
