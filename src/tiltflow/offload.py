"""Networks on the CPU while nothing needs them: the decoder, those of rewards, and the frozen weights of a denoiser.

Not by the hooks of accelerate: these see calls of `forward` alone, and a reward may call other methods of its networks. So the
doors through which all calls go, of rewards and of the decoder, bring them to the device.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from torch import nn


@dataclass
class Offload:
    """What is on the CPU while nothing needs it.

    Args:
        scorers: the decoder and the networks of rewards.
        base: the frozen copy of the denoiser, if there is one.
        device: where they are needed.
        adapted: the denoiser with an adapter, whose frozen weights make room for the scorers.
    """

    scorers: tuple[nn.Module, ...]
    base: nn.Module | None
    device: torch.device
    adapted: nn.Module | None = None
    thread: int = field(default_factory=get_ident)
    """That of the loop: what another one asks for is computed beside it, and the denoiser may be at work."""
    inside: int = 0
    """How many calls need the scorers now."""
    lock: Any = field(default_factory=RLock)
    """A reward may be asked by a thread of its own."""


_NOW: list[Offload] = []
"""The innermost one is last."""


@contextmanager
def offloaded(offload: Offload) -> Iterator[None]:
    """In this context networks are on the CPU while nothing needs them; afterwards all are on the device."""
    bring = None if offload.base is None else offload.base.register_forward_pre_hook(lambda base, _: move(base, offload.device))
    networks = [*offload.scorers, *(() if offload.base is None else (offload.base,))]
    for network in networks:
        move(network, "cpu")
    _NOW.append(offload)
    try:
        yield
    finally:
        _NOW.pop()
        if bring is not None:
            bring.remove()
        for network in networks:
            move(network, offload.device)


def makes_room() -> bool:
    """True if the frozen weights of the denoiser are elsewhere while samples are scored: then nothing that its gradient needs
    should wait for the reward."""
    return bool(_NOW) and _NOW[-1].adapted is not None


@contextmanager
def scoring() -> Iterator[None]:
    """In this context, or in a function that it decorates, the decoder and the networks of rewards are on the device."""
    if not _NOW:
        yield
        return
    offload = _NOW[-1]
    adapted = offload.adapted if offload.thread == get_ident() and not offload.inside else None
    with offload.lock:
        offload.inside += 1
        if adapted is not None:
            move_frozen(adapted, "cpu")
        for network in offload.scorers:
            move(network, offload.device)
    try:
        yield
    finally:
        with offload.lock:
            offload.inside -= 1
            if not offload.inside:
                for network in offload.scorers:
                    move(network, "cpu")
            if adapted is not None:
                move_frozen(adapted, offload.device)


def learning() -> None:
    """From here on, until it is called again, the frozen copy of the denoiser is not needed."""
    if _NOW and (base := _NOW[-1].base) is not None:
        move(base, "cpu")


def move(network: nn.Module, device: torch.device | str) -> None:
    """Move a network; nothing is done where it is there already."""
    network.to(device)


def move_frozen(network: nn.Module, device: torch.device | str) -> None:
    """Move the weights of a network that are not trained."""
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(device)


def networks_in(thing: object) -> list[nn.Module]:
    """The networks that a reward holds: in its attributes, and in those of what it holds, or in the scope of a function.
    Those that are global variables of its module are not found."""
    found: dict[int, nn.Module] = {}
    seen, left = set[int](), [thing]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type, types.ModuleType, torch.Tensor)):
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            found[id(one)] = one
        else:
            left += _held_by(one)
    return list(found.values())


def _held_by(thing: Any) -> Iterable[object]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
        return [*cells, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    return list(getattr(thing, "__dict__", {}).values())
