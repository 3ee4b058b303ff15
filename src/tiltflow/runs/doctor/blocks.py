"""Networks of many blocks that are alike, as transformers are: what a call needs is known of few, as each further one adds the
same."""

# Mutation tests: none: forecasts

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

FEW = 2
"""Blocks in a row from which on one more adds the same."""

Shortened = Sequence[tuple[int, AbstractContextManager[None]]]
"""Contexts in which a network is shorter, and how often what a call needs there counts: the sum is what all blocks need."""


def shortened(network: nn.Module) -> Callable[[], Shortened]:
    """Makes the contexts in which a network has few of its blocks, in each but the first one more of one kind. A network
    without many blocks that are alike stays as it is, in a single context."""
    root = getattr(network, "network", network)  # a pipeline's network is inside a wrapper that knows how to call it
    rows = {name: part for name, part in root.named_children() if isinstance(part, nn.ModuleList) and _alike(part)}
    further = {name: len(blocks) - FEW for name, blocks in rows.items()}

    def contexts() -> Shortened:
        few = dict.fromkeys(rows, FEW)
        more = [(times, _with(root, rows, {**few, name: FEW + 1})) for name, times in further.items()]
        return [(1 - sum(further.values()), _with(root, rows, few)), *more]

    return contexts


def _alike(blocks: nn.ModuleList) -> bool:
    """Whether these are many, and all of one kind."""
    kinds = {(str(block), *((name, p.shape, p.dtype) for name, p in block.named_parameters())) for block in blocks}
    return len(blocks) > FEW + 1 and len(kinds) == 1


@contextmanager
def _with(root: Any, rows: Mapping[str, nn.ModuleList], counts: Mapping[str, int]) -> Iterator[None]:
    """A network has so many of the blocks of each row in this context."""
    for name, blocks in rows.items():
        setattr(root, name, blocks[: counts[name]])
    try:
        yield
    finally:
        for name, blocks in rows.items():
            setattr(root, name, blocks)
