"""torch.compile of the networks of a training, in place and for its duration: names, copies and what is saved do not change.

A network is compiled below the hooks that count its evaluations and ask whether to stop, and torch compiles it anew for each
way in which it is called: with and without a gradient, with its adapter on and off, in each precision. Before the first step
`try_compiled` calls it as training will, and compares with the same network not compiled.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, UserCodeError
from tiltflow.flows.counting import CountEvaluations
from tiltflow.flows.field import VelocityField
from tiltflow.flows.linearize import linearize
from tiltflow.models.denoiser import Denoiser

Compile = Literal["regional", "whole"]

BACKEND = "inductor"
"""Backend of torch.compile; `aot_eager` needs no compiler, and is no faster than without."""
VARIANTS = 64
"""Most ways in which one network is compiled: beyond them torch goes on without compiling."""
TOLERANCE = 0.05
"""Largest difference of a compiled network from itself, as a share of its largest number: 16 bits are rounded otherwise."""


class CompiledForward:
    """The compiled forward pass of a module, in the place of its own; a copy of the module has its own, not compiled."""

    def __init__(self, module: nn.Module):
        self.module, self.call = module, torch.compile(module.forward, backend=BACKEND)
        functools.update_wrapper(self, module.forward)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.call(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.module)]  # the copy that this becomes a part of
        return types.MethodType(type(copied).forward, copied)


@contextmanager
def compiled(how: Compile | None, *networks: Any) -> Iterator[None]:
    """Networks are compiled in this context.

    Raises InputError, of one line, for `regional` of a network that does not say which of its blocks are repeated, and for what
    is no module of torch.
    """
    if how is None:
        yield
        return
    distinct = {id(network): network for network in networks}.values()
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=VARIANTS))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
        for network in distinct:
            stack.enter_context(_regional(network) if how == "regional" else _whole(network))
        yield


@contextmanager
def _whole(network: Any) -> Iterator[None]:
    """The network is compiled as a whole, below its own hooks."""
    module = network.network if isinstance(network, Denoiser) else network
    if not isinstance(module, nn.Module):
        raise InputError("training.compile: the network is no torch module, and cannot be compiled; leave it out")
    before = vars(module).get("forward")
    vars(module)["forward"] = CompiledForward(module)
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


@contextmanager
def _regional(network: Any) -> Iterator[None]:
    """The blocks of a denoiser that its class names as repeated are compiled, once for all of them."""
    if not isinstance(network, Denoiser):
        raise InputError("training.compile: regional is of the denoisers of pipelines; use whole for this network")
    module: Any = network.network
    if not getattr(module, "_repeated_blocks", None):
        name = type(module).__name__
        raise InputError(f"training.compile: {name} does not say which of its blocks are repeated; use whole")
    before = [(part, part._compiled_call_impl) for part in module.modules()]
    module.compile_repeated_blocks(backend=BACKEND)
    try:
        yield
    finally:
        for part, call in before:
            part._compiled_call_impl = call


def try_compiled(flow: VelocityField, network: object, x: Tensor) -> None:
    """Compile a network, by calling it as an adjoint does, at the states x [batch, *event].

    Args:
        flow: of the network, bound to conditions.

    Raises InputError, of one line, if it cannot be compiled here, or computes something else or unseen by hooks then.
    """
    t, cotangent = torch.tensor(0.5), torch.ones_like(x)
    with torch.compiler.set_stance("force_eager"):
        expected = _value_and_product(flow, x, t, cotangent)
    with CountEvaluations(network) as count:
        try:
            found = _value_and_product(flow, x, t, cotangent)
        except (UserCodeError, InputError) as error:  # it could be called before
            raise InputError(f"training.compile: cannot be compiled here ({_reason(error)}); leave it out") from error
    for what, one, other in zip(("the value", "the gradient"), expected, found, strict=True):
        far = (one - other).abs().max().item() / max(one.abs().max().item(), 1e-30)
        if not far <= TOLERANCE:
            raise InputError(f"training.compile: changes {what} of the network, by {far:.2g} of its size; leave it out")
    if count.total != len(x):
        raise InputError("training.compile: hides evaluations of the network from hooks; leave it out")


def _value_and_product(flow: VelocityField, x: Tensor, t: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    v, pullback = linearize(flow, x, t)
    return v, pullback(cotangent)


def _reason(error: BaseException) -> str:
    """What torch says, in one line."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("backend=")), type(error.__cause__ or error).__name__)
