"""The frozen base of a flow: its adapter switched off, or a copy of its network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

from torch import nn

from tiltflow.flows.field import Wrapper
from tiltflow.flows.flow import AnyFloats, Flow

_OFF: WeakSet[Any] = WeakSet()
"""The networks whose adapter is switched off."""


def is_off(network: object) -> bool:
    """True in the context in which a network's adapter is switched off, as that of the base."""
    return network in _OFF


def has_adapter(network: object) -> bool:
    """True if a network, or the one it is compiled from, has an adapter that can be switched off, as those of peft have."""
    return hasattr(network, "disable_adapter")


@dataclass(frozen=True)
class AdapterOff(Wrapper):
    """The base of an adapter fine-tune: the same network with its adapter switched off, so no second copy.

    `flow.network` must have peft's `disable_adapter()`. Merged adapters cannot be switched.
    """

    flow: Flow

    @property
    def network(self) -> Any:
        """The one network of the tuned flow and of its base."""
        return self.flow.network

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """The adapter is off in this context; nested entry is a no-op."""
        network = self.network
        if network in _OFF:
            yield
            return
        _OFF.add(network)
        try:
            with network.disable_adapter():
                yield
        finally:
            _OFF.discard(network)


class WithoutAdapter(AnyFloats):
    """A network with an adapter, called with the adapter switched off."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any) -> Any:
        with self.network.disable_adapter():
            return self.network(*arguments)


def base_of(flow: Flow) -> Flow | AdapterOff:
    """The frozen base of `flow` as it is now: its adapter switched off where it has one, else one frozen copy."""
    if has_adapter(flow.network):
        return AdapterOff(flow)
    network = copy.deepcopy(flow.network)
    if isinstance(network, nn.Module):
        network.requires_grad_(False).eval()
    return replace(flow, network=network)
