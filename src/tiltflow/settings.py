"""Settings: the base class of everything that a recipe can describe, and the strict reading of YAML into it.

A typo, a wrong type or a value out of range is one line that names the key and what would be right.
"""

from __future__ import annotations

import copy
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from tiltflow.errors import InputError, SettingsError, did_you_mean, redacted

MOST_CHARACTERS, MOST_DEPTH, MOST_DIGITS = 1 << 18, 64, 1000
"""Limits on the length and the nesting of a YAML file: far more than any recipe needs, and parsed in seconds."""


class _OneLine(type(BaseModel)):  # type: ignore[misc]
    """Metaclass that raises a SettingsError of one line in place of pydantic's error."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:
        if values:
            first = next((name for name in cls.model_fields if name != "name"), "setting")
            raise SettingsError(f"{cls.__name__}: settings are given by name, as in {cls.__name__}({first}=..)")
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            raise SettingsError(f"{cls.__name__}: {first_problem(cls, error)}") from None


if TYPE_CHECKING:
    _Checked = BaseModel  # whose own metaclass tells type checkers the arguments
else:

    class _Checked(BaseModel, metaclass=_OneLine):
        pass


class Settings(_Checked):
    """Base class of settings: frozen, without unknown keys, and strict about types: "3" and true are no integers. Constructed
    in Python or read from a recipe, they are checked alike; SettingsError says in one line what is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        """Convert the lists of YAML and JSON to tuples, and NumPy's numbers to Python's."""
        return _tuples(values) if isinstance(values, dict) else values


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class External:
    """Mark of a setting, a text, that names something outside the recipe: a file or folder, something that ships with tiltflow,
    a name on the hub, or a function, `package.module:function`. See `tiltflow.runs.fingerprints`.

    Args:
        only_functions: only functions are outside; other values are names of tiltflow's own.
        but: values that name nothing outside.
        repo_type: what it names on the hub: model or dataset.
    """

    only_functions: bool = False
    but: tuple[str, ...] = ()
    repo_type: str = "model"


PathOrName = Annotated[str, External()]
FunctionOrName = Annotated[str, External(only_functions=True)]


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    if isinstance(value, np.generic):  # a number out of an array
        return value.item()
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _compiled(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression ({type(error).__name__}: {error})") from None


Pattern = Annotated[re.Pattern[str], BeforeValidator(_compiled)]
"""A regular expression."""


def _different(labels: tuple[int, ...]) -> tuple[int, ...]:
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label} is given twice")
    return labels


Labels = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_different)]
"""Distinct classes of a classifier, by index from 0."""

# the core schema of YAML 1.2, with `_` between digits
WORDS: dict[str, Any] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
INTEGER = re.compile(r"[-+]?\d+(?:_\d+)*|0o[0-7]+|0x[0-9a-fA-F]+", re.ASCII)
FLOAT = re.compile(r"[-+]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", re.ASCII)
NO_DIGITS = re.compile(r"\.(?=[iInN])")
"""The point of .inf and .nan, which Python writes without."""
KIND = re.compile(r"(?:constrained-)?(?:str|int|float|bool)|(?:tuple|list|dict|literal)\[.*", re.DOTALL)
"""How pydantic calls one of the kinds of value that a setting may have, in the place of an error."""
NUMBERS = re.compile(r"(?:\s*[-+]?[\d.][\w.+-]*\s*,)+(?:\s*[-+]?[\d.][\w.+-]*\s*)?", re.ASCII)
ZERO_LED = re.compile(r"[-+]?0[\d_]+(?:\.\d*)?(?:[eE][-+]?\d+)?", re.ASCII)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML 1.2 document: mappings with text as keys, lists, and the scalars of the core schema.

    `1e-4` is a number; `no`, `on` and `1:30` are text. Numbers with a leading zero and repeated keys are refused, as they are
    ambiguous; so are tags, anchors and aliases, for which recipes have no use.

    Raises InputError, with `where` and the line, if it is not valid.
    """
    line = 1
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{where}: is longer than {MOST_CHARACTERS} characters")

    def events() -> Iterator[Event]:
        nonlocal line
        for event in YAML(typ="safe", pure=True).parse(text):
            line = event.start_mark.line + 1
            yield event

    try:
        return _document(events())
    except InputError as error:
        problem = str(error)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else line
        said = str(getattr(error, "problem", None) or error).splitlines()
        problem = f"not valid YAML ({said[0] if said else type(error).__name__})"
    except (ValueError, OverflowError) as error:  # of \\U00110000, and of numbers with thousands of digits
        problem = f"not valid YAML ({error})"
    raise InputError(f"{where}:{line}: {problem}" if "\n" in text.strip() else f"{where}: {problem}")


def _document(events: Iterator[Event]) -> Any:
    content = None
    for event in events:
        if isinstance(event, DocumentStartEvent):
            if event.version not in (None, (1, 2)):
                raise InputError("must be YAML 1.2; leave %YAML out")
            content = _node(next(events), events, 0)
            next(events)  # the end of the document
            if not isinstance(next(events), StreamEndEvent):
                raise InputError("must be one document; a second one begins here")
    return content


def _node(event: Event, events: Iterator[Event], depth: int) -> Any:
    """Build the value that begins with `event`; `events` has the rest of it next."""
    if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor is not None):
        raise InputError(f"anchors and aliases are not read; write out what {shown(event.anchor)} stands for, or quote it")
    if isinstance(event, (ScalarEvent, MappingStartEvent, SequenceStartEvent)) and event.ctag is not None:
        raise InputError(f"tags are not read; leave {str(event.ctag)[:40]!r} out, or quote it")
    if depth > MOST_DEPTH:
        raise InputError(f"nested deeper than {MOST_DEPTH} levels")
    if isinstance(event, SequenceStartEvent):
        items = []
        while not isinstance(item := next(events), SequenceEndEvent):
            items.append(_node(item, events, depth + 1))
        return items
    if isinstance(event, MappingStartEvent):
        tree: dict[str, Any] = {}
        while not isinstance(key := next(events), MappingEndEvent):
            if not isinstance(key, ScalarEvent) or key.anchor is not None or key.ctag is not None:
                raise InputError("a key must be a word, without tags and anchors")
            if key.value in tree:
                raise InputError(f"{shown(key.value)} is given twice")
            tree[key.value] = _node(next(events), events, depth + 1)
        return tree
    assert isinstance(event, ScalarEvent)
    return event.value if event.style else _scalar(event.value)


def _scalar(text: str) -> Any:
    """Value of a scalar without quotes."""
    if text in WORDS:
        return WORDS[text]
    if ZERO_LED.fullmatch(text):
        raise InputError(f"{text[:40]} begins with a zero; write it without, 0o.. if it is octal, or in quotes if it is a word")
    if INTEGER.fullmatch(text):
        if len(text) > MOST_DIGITS:
            raise InputError(f"{text[:40]}.. is an integer of {len(text)} characters; the most are {MOST_DIGITS}")
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(NO_DIGITS.sub("", text))
    return text


class _Representer(SafeRepresenter):
    """Writes what readers of YAML 1.1, of 1.2 and of `parse_yaml` understand alike."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        plain = data.isprintable() and data[:1] not in AMBIGUOUS_BEGINNINGS and data.lower() not in AMBIGUOUS
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')

    def represent_float(self, data: float) -> ScalarNode:
        text = super().represent_float(data).value
        return self.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)
AMBIGUOUS_BEGINNINGS = ("", *"0123456789+-.~=<")
AMBIGUOUS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")


def dump_yaml(tree: Any) -> str:
    """Write mappings, lists and scalars as YAML; a text that a reader could take for anything else is in quotes."""
    writer = YAML(typ="safe", pure=True)
    writer.Representer = _Representer
    writer.default_flow_style = writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = sys.maxsize  # a quoted text that is folded just before a backslash would come back with a space in it
    text = io.StringIO()
    writer.dump(tree, text)
    return text.getvalue()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file or a pipe, which is opened once.

    Raises InputError if it is missing, unreadable or no mapping.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping of settings, got {type(content).__name__}")
    return content


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Copy `tree` with each `a.b=value` set; values are read as YAML, so `1e-4`, `[0, 2]` and `true` work, and `0,2` is a
    list of numbers too: no shell needs it in quotes. `0,` is a list of one."""
    result = copy.deepcopy(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override}: must read key=value, for example optimizer.learning_rate=1e-4")
        *parents, last = key.strip().split(".")
        node = result
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise InputError(f"--set {override}: {name!r} has no settings below it")
            node = child
        node[last] = parse_yaml(f"[{text}]" if NUMBERS.fullmatch(text) else text, f"--set {key}")
    return result


def validate(kind: type[S], tree: Mapping[str, Any], where: str) -> S:
    """Make an instance of `kind` from `tree`. Raises InputError of one line for the first thing that is wrong."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(kind, error)}") from None


def first_problem(kind: type[BaseModel], error: ValidationError) -> str:
    """Describe, in one line with the dotted name of the setting, the problem that most likely explains the others."""
    problems = error.errors(include_url=False)
    # an unknown key is most often the cause of the other complaints
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), _closest(problems))
    path, _ = _walk(kind, problem["loc"])
    dotted, message = ".".join(path), problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    match problem["type"]:
        case "part":
            return f"{dotted}.{message}"
        case "extra_forbidden":
            key = str(problem["loc"][-1])
            path, models = _walk(kind, problem["loc"][:-1])
            return f"{'.'.join([*path, key])} is not a setting{did_you_mean(key, [n for m in models for n in m.model_fields])}"
        case "missing":
            return f"{dotted} is missing"
        case "value_error":
            return f"{dotted}: {message}" if dotted else message
        case "tuple_type":
            return f"{dotted} must be a list, such as [1, 2] (got {shown(problem['input'])})"
        case "too_short":
            return f"{dotted} must have at least {problem['ctx']['min_length']} of them (got {shown(problem['input'])})"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{dotted} must be a mapping of settings (got {shown(problem['input'])})"
        case "literal_error" | "union_tag_invalid":
            near = did_you_mean(str(problem["input"]), re.findall(r"'([^']*)'", message))
            return f"{dotted} must be {message}{near if near.startswith(', did') else ''} (got {shown(problem['input'])})"
        case _:
            return f"{dotted} must be {message} (got {shown(problem['input'])})"


def _closest(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first problem; where it is one kind of value that a setting may have, that of the kind of which most is right."""
    place = problems[0]["loc"]
    if place and KIND.fullmatch(str(place[-1])):
        place = place[:-1]
    return max((p for p in problems if p["loc"][: len(place)] == place), key=lambda p: len(p["loc"]))


def shown(value: Any) -> str:
    """Show a value in an error: as it was written, without secrets, in at most 80 characters.

    >>> shown((1, "a"))
    "[1, 'a']"
    """
    text = redacted(repr(list(value) if isinstance(value, tuple) else value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _walk(kind: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """Names of the settings along a location, without the tags of unions, and the models that the last one may be."""
    path: list[str] = []
    models = [kind]
    for part in location:
        fields = [model.model_fields[str(part)].annotation for model in models if str(part) in model.model_fields]
        named = [model for model in models if model.model_fields.get("name") and model.model_fields["name"].default == part]
        if named and not fields:
            models = named
            continue
        if KIND.fullmatch(str(part)) and not fields:
            continue
        path.append(str(part))
        models = [model for annotation in fields for model in _models_in(annotation)] if fields else models
    return path, models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every settings class inside an annotation such as `tuple[A, ...] | B`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
