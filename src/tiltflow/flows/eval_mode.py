"""Networks in eval mode: a flow, or a reward, is one function while it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*networks: object) -> Iterator[None]:
    """Networks are in eval mode in this context, so dropout draws nothing and batch statistics stay as they are; afterwards
    every submodule is in its own mode again, also after an exception. Anything that is no nn.Module is left alone."""
    modules = [network for network in networks if isinstance(network, nn.Module)]
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
