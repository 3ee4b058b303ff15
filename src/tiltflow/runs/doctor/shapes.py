"""Tensors that have shapes and no memory, and what calls on them would need of it."""

# Mutation tests: none: forecasts

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from tiltflow.timing import current_phase
from tiltflow.training.memory import PeakMemory

SHAPES = FakeTensorMode(allow_non_fake_inputs=True)
"""Makes tensors without memory, and computes the shapes of what becomes of them."""
aten = torch.ops.aten
T = TypeVar("T")


def shaped(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    with SHAPES:
        return torch.empty(tuple(shape), dtype=dtype)


def shaped_like(tree: Any) -> Any:
    """Nested tensors without memory, all on the CPU, whose kernels need what those of a GPU do."""
    return tree_map_only(Tensor, lambda part: shaped(part.shape, part.dtype), tree)


def copy_of_shapes(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a module whose weights have no memory.

    Args:
        dtype: of those that are no integers; their own by default.
    """
    memo: dict[int, Any] = {}
    loose = [part for each in module.modules() for part in vars(each).values() if isinstance(part, Tensor)]  # not registered
    for tensor in (*module.parameters(), *module.buffers(), *loose):
        like = shaped(tensor.shape, dtype if dtype and tensor.is_floating_point() else tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            like = nn.Parameter(like, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = like
    return copy.deepcopy(module, memo)


class _OfShapes(TorchFunctionMode):
    """Tensors that are copied in this context are tensors without memory; `size` is what they would need."""

    size = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in (Tensor.__deepcopy__, Tensor.clone):  # the latter is of parameters
            return func(*args, **(kwargs or {}))
        self.size += bytes_of(args[0])
        return shaped_like(args[0])


def deep_copy_of_shapes(thing: T) -> tuple[T, int]:
    """A copy of an object, such as a reward with its network and data, whose tensors have no memory; and the bytes of those."""
    with _OfShapes() as tensors:
        return copy.deepcopy(thing), tensors.size


def network_of_shapes(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A frozen network whose weights have no memory, of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with SHAPES:
            made = make()
    finally:
        torch.set_default_dtype(before)
    return copy_of_shapes(made.requires_grad_(False).eval())  # torch keeps references to weights that were initialised


def bytes_of(tree: Any) -> int:
    """Bytes of nested tensors."""
    return sum(part.numel() * part.element_size() for part in tree_leaves(tree) if isinstance(part, Tensor))


class Shapes(TorchDispatchMode):
    """The context in which programs run on tensors without memory: what they ask of numbers that are not there is answered as
    in a training that goes well. A number is 0, a condition holds, a mask selects all, what is searched for is not there, and
    noise has no numbers.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if func in (aten.randn.default, aten.randn.generator):
            with SHAPES:
                return func(*args, **kwargs)
        if not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 1
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func is aten.nonzero.default:
            return shaped((0, args[0].ndim), torch.int64)
        if func is aten.unique_dim.default:  # all differ
            return args[0], torch.arange(len(args[0])), torch.ones(len(args[0]), dtype=torch.int64)
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _positions(index)])
        return func(*args, **kwargs)


def _positions(index: Tensor | None) -> Sequence[Tensor | None]:
    """The positions that a mask selects; all, if its numbers are not there. What is no mask is returned as it is."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        return [shaped([index.numel()], torch.int64) for _ in index.shape]
    return index.nonzero().unbind(1)


@contextmanager
def alone() -> Iterator[PeakMemory]:
    """The memory that is needed in this context, which no other counter sees."""
    with _disable_current_modes(), Shapes(), PeakMemory() as memory:
        yield memory


# ---- calls that are measured once ----


@dataclass(frozen=True)
class Peak:
    """The largest memory of a phase in bytes: of the calls of the network, the decoder and the reward, with what these keep for
    their gradients, and of all the rest."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())


class Counter(PeakMemory):
    """Counts memory, and what it is for at the peak of each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, int] = {}
        self.peaks: dict[str, Peak] = {}

    def needs(self, size: int, what: str = "rest") -> None:
        """So many bytes more are needed for a moment, for what is called so."""
        super().needs(size)
        name = current_phase() or ""
        if name not in self.peaks or self.now + size > self.peaks[name].total:
            parts = {"rest": self.now - sum(self.kept.values()), **self.kept}
            self.peaks[name] = Peak({**parts, what: parts.get(what, 0) + size})

    def keep(self, size: int, what: str) -> Tensor:
        """So many bytes that are needed for what is called so, until nothing refers to the tensor that is returned."""
        self.kept[what] = self.kept.get(what, 0) + size
        kept = shaped((size,), torch.uint8)
        weakref.finalize(kept.untyped_storage(), self._let_go, size, what)
        self._made(kept.untyped_storage())
        return kept

    def _let_go(self, size: int, what: str) -> None:
        self.kept[what] -= size


@dataclass(frozen=True)
class Cost:
    """What a call needs beside its arguments, in bytes: until its backward pass, `kept`; for a moment, `forward`, and, with
    what is kept not counted, `backward`.

    Args:
        result: shape and dtype.
        gradient: whether the result has one.
    """

    result: tuple[torch.Size, torch.dtype]
    gradient: bool
    kept: int
    forward: int
    backward: int


@dataclass
class Replayed:
    """A function of (x, ..) -> tensor that is called once for each kind of call; then only its memory is needed, and counted.

    Args:
        function: differentiable.
        memory: the counter.
        what: the name under which its memory is counted.
        parameters: those that its result depends on and that are trained, as it is called now.
        known: what calls need, by their kinds; several of the same functions can share it.
        numbers: whether its results have numbers, which differ; methods look at rewards before they go on.
        otherwise: what a call with x needs, with a gradient or without, if the function cannot be called without numbers.
        within: the context in which it is called.
        contexts: those in which it needs less, and how often what it needs there counts; the sum is what it needs.
    """

    function: Callable[..., Tensor]
    memory: Counter
    what: str
    parameters: Callable[[], Sequence[nn.Parameter]] = tuple
    known: dict[Any, Cost] = field(default_factory=dict)
    numbers: bool = False
    otherwise: Callable[[Tensor, bool], Cost] | None = None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    contexts: Callable[[], Sequence[tuple[int, AbstractContextManager[Any]]]] = lambda: [(1, nullcontext())]

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        parameters = list(self.parameters()) if torch.is_grad_enabled() else []
        leaves = tree_leaves((x, arguments, options))
        kind = (
            self.what,
            *((part.shape, part.dtype) if isinstance(part, Tensor) else str(part) for part in leaves),
            torch.is_grad_enabled() and x.requires_grad,
            len(parameters),
            torch.is_autocast_enabled("cpu"),
        )
        if kind not in self.known:
            try:
                self.known[kind] = self._measured(x, arguments, options, parameters)
            except Exception:  # whatever a function of the user raises that wants to see numbers
                if self.otherwise is None:
                    raise
                with _disable_current_modes():
                    self.known[kind] = self.otherwise(x, torch.is_grad_enabled() and x.requires_grad)
        cost = self.known[kind]
        anchor = shaped(()).requires_grad_() if parameters else None
        result: Tensor = _Replay.apply(x, anchor, cost, self, parameters)  # type: ignore[no-untyped-call]
        return result

    def _measured(self, x: Tensor, arguments: Any, options: Any, parameters: Sequence[nn.Parameter]) -> Cost:
        """Call the function, and take its gradient as a training does, in each of its contexts."""
        costs = list[tuple[int, Cost]]()
        for times, context in self.contexts():
            with self.within(), context:
                costs.append((times, self._once(x, arguments, options, parameters)))
        first = costs[0][1]
        sizes = (sum(times * getattr(cost, name) for times, cost in costs) for name in ("kept", "forward", "backward"))
        return Cost(first.result, first.gradient, *sizes)

    def _once(self, x: Tensor, arguments: Any, options: Any, parameters: Sequence[nn.Parameter]) -> Cost:
        """Call the function, and take its gradient: of x, if that has one, else of the parameters, to which gradients of other
        samples are there already."""
        with alone() as memory:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            own = x.detach().requires_grad_(x.requires_grad)
            before = memory.peak = memory.now
            out = self.function(own, *arguments, **options)
            forward, size = memory.peak - before, bytes_of(out)
            kept, backward = memory.now - before - size, 0
            if out.requires_grad:
                cotangent = torch.empty_like(out)
                before = memory.peak = memory.now
                if own.requires_grad:
                    torch.autograd.grad(out, own, cotangent)
                else:
                    out.backward(cotangent)
                backward = memory.peak - before
            for parameter in parameters:
                parameter.grad = None
        return Cost((out.shape, out.dtype), out.requires_grad, max(kept, 0), forward, backward)


class _Replay(torch.autograd.Function):
    """A call of which only the memory is left."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, anchor: Tensor | None, cost: Cost, call: Replayed, parameters: Sequence[nn.Parameter]
    ) -> Tensor:
        call.memory.needs(cost.forward, call.what)
        shape, dtype = cost.result
        out = torch.linspace(0, 1, shape.numel(), dtype=dtype).reshape(shape) if call.numbers else shaped(shape, dtype)
        if cost.gradient:
            context.kept = call.memory.keep(cost.kept, call.what)
            context.rest = cost, call, parameters, (x.shape, x.dtype) if x.requires_grad else None
        else:
            context.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cost, call, parameters, of_x = context.rest
        for parameter in parameters:
            if parameter.grad is None:
                kept = call.memory.keep(bytes_of(parameter), "gradients")
                parameter.grad = kept.view(parameter.dtype).view(parameter.shape)
        call.memory.needs(cost.backward, call.what)
        context.kept = None
        return None if of_x is None else shaped(*of_x), None, None, None, None
