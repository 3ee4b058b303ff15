"""The conditions of a batch: which part of them belongs to which sample.

A condition is anything that a network takes as its third argument. A tensor [batch, ..], or a mapping of such tensors, holds
one for each sample; anything else is for all.
"""

# Mutation tests: test_conditions.py test_orw_cfm_w2.py

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.flows.field import Which


def select(condition: Any, which: Which) -> Any:
    """The conditions of these samples, where there is one for each."""
    if isinstance(condition, Mapping):
        return {key: select(value, which) for key, value in condition.items()}
    return condition[which] if isinstance(condition, Tensor) and condition.ndim > 0 else condition


def joined(parts: Sequence[Any]) -> Any:
    """The conditions of several batches as those of one, the samples of the first before those of the second. What is for all
    samples is that of the first.

    Prompts may differ in length: in a mapping with a mask [batch, length], which has `mask` in its name, the shorter ones get
    zeros, and so does the mask. Raises ValueError for other tensors of different shapes.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: joined(values) for key, values in _of_one_length(parts).items()}
    if not isinstance(first, Tensor) or first.ndim == 0:
        return first
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"conditions of shapes {', '.join(sorted({str(list(part.shape[1:])) for part in parts}))}")
    return torch.cat(list(parts))


def _of_one_length(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values of mappings by name, those that are as long as a mask with zeros after them, up to the longest."""
    values = {key: [part[key] for part in parts] for key in parts[0]}

    def lengths(of: Sequence[Any]) -> list[int]:
        return [value.shape[1] for value in of if isinstance(value, Tensor) and value.ndim > 1]

    wanted = next((found for key in values if "mask" in key and (found := lengths(values[key]))), [])
    for key, of in values.items():
        if wanted and lengths(of) == wanted:
            values[key] = [F.pad(v, (*[0, 0] * (v.ndim - 2), 0, max(wanted) - v.shape[1])) for v in of]
    return values


def groups(condition: Any, count: int, device: torch.device) -> list[Tensor]:
    """The indices of those of `count` samples that share a condition, for each condition; of all where there is one for all."""
    rows = _rows(condition)
    if rows is None:
        return [torch.arange(count, device=device)]
    _, member = torch.unique(rows, dim=0, return_inverse=True)
    return [(member == i).nonzero()[:, 0].to(device) for i in range(int(member.max()) + 1)]


def name_of(condition: Any, which: int) -> str:
    """A name for the condition of a sample, the same in every batch, however long the others in it are: a hash of its numbers,
    without the zeros at the end of each tensor; "" where there is one for all."""
    parts, name = _parts(condition), hashlib.sha256()
    for part in parts:
        numbers = np.trim_zeros(part[which].double().cpu().numpy().ravel(), "b").tobytes()
        name.update(len(numbers).to_bytes(8, "big") + numbers)
    return name.hexdigest() if parts else ""


def _rows(condition: Any) -> Tensor | None:
    """What tells the conditions of samples apart, [batch, ..]; None where there is one for all."""
    parts = _parts(condition)
    if isinstance(condition, Mapping):
        parts = [torch.cat([part.flatten(1).float() for part in parts], 1)] if parts else []
    return parts[0] if parts else None


def _parts(condition: Any) -> list[Tensor]:
    """The tensors of a condition that tell samples apart, each [batch, ..]."""
    if isinstance(condition, Mapping):
        return [value for value in condition.values() if isinstance(value, Tensor) and value.ndim > 1]
    return [condition] if isinstance(condition, Tensor) and condition.ndim > 0 else []
