"""The cost of sampling and training: how many samples networks are evaluated on."""

# Mutation tests: test_flow.py test_networks_of_others.py

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class CountEvaluations:
    """Counts how many samples networks are evaluated on, while it is the context: `with CountEvaluations(network) as count`.

    `poll` is called before each evaluation.
    """

    def __init__(self, *networks: object, poll: Callable[[], None] = lambda: None):
        self.poll = poll
        self.networks = {id(network): network for network in networks if isinstance(network, nn.Module)}
        self.total, self.counting = 0, True

    def __enter__(self) -> CountEvaluations:
        self.hooks = [network.register_forward_pre_hook(self._count) for network in self.networks.values()]
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations in this context are not counted, and `total` is right inside it too."""
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.poll()
        if self.counting:
            self.total += len(arguments[0])

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
