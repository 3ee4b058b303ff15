"""Values as lines of JSON and back, to the last bit: what `workers.py` asks and answers. Data alone: nothing in it is run."""

# Mutation tests: test_messages.py

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import numpy as np

OURS = "tiltflow."
"""Modules whose data classes are known here begin with it."""


def written(value: Any) -> bytes:
    """A line for None, numbers, texts, arrays, data classes of tiltflow, and lists, tuples and dictionaries of texts to these.

    Raises TypeError for anything else.
    """
    return json.dumps(_tree(value)).encode() + b"\n"


def read(line: bytes) -> Any:
    """The value of a line. Raises ValueError for another text, and for a class that is no data class of tiltflow."""
    return _value(json.loads(line))


def _tree(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_tree(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_tree(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": {key: _tree(each) for key, each in value.items()}}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype), "shape": value.shape}
    kind = type(value)
    if not _ours(kind):
        raise TypeError(f"{kind.__name__} cannot be sent to another process")
    fields = {field.name: _tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class": [kind.__module__, kind.__qualname__], "fields": fields}


def _value(tree: Any) -> Any:
    match tree:
        case list():
            return [_value(each) for each in tree]
        case {"tuple": several}:
            return tuple(_value(each) for each in several)
        case {"dict": some}:
            return {key: _value(each) for key, each in some.items()}
        case {"array": numbers, "dtype": dtype, "shape": shape}:
            return np.array(numbers, dtype=dtype).reshape(shape)
        case {"class": [module, name], "fields": fields}:
            kind = getattr(importlib.import_module(module), name, None) if module.startswith(OURS) else None
            if not _ours(kind):
                raise ValueError(f"{module}.{name} is no data class of tiltflow")
            return kind(**{key: _value(each) for key, each in fields.items()})  # type: ignore[misc]
        case dict():
            raise ValueError(f"not a message: {', '.join(tree)}")
    return tree


def _ours(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__.startswith(OURS)
