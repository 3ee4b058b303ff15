"""Shared by all training loops: AdamW itself, the moving average of weights, and checks for numbers that are
not finite."""

# Mutation tests: test_optimization.py test_trainer.py

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import NonFiniteError


class Numbers:
    """Base of a method's state that is a dataclass of numbers."""

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {key: value for key, value in vars(self).items() if isinstance(value, (int, float))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        vars(self).update(state)


def adamw(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """AdamW, fused where the device has that: the step of a large network is bound by memory bandwidth."""
    several = list(parameters)
    fused = all(p.device.type in ("cpu", "cuda") and p.dtype in (torch.float32, torch.float64) for p in several)
    return torch.optim.AdamW(several, fused=fused or None, **options)


class StoredWeights:
    """Other values of parameters, which can take their place.

    Args:
        values: of each parameter; a copy of what they are by default.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], values: Sequence[Tensor] | None = None):
        self.parameters, self.in_place = list(parameters), False
        self.values = [p.detach().clone() for p in self.parameters] if values is None else list(values)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the parameters have these values. Memory is swapped, not copied; nested entry is a no-op."""
        if self.in_place:
            yield
            return
        self._swap()
        self.in_place = True
        try:
            yield
        finally:
            self._swap()
            self.in_place = False

    def _swap(self) -> None:
        for i, parameter in enumerate(self.parameters):
            if processes.is_sharded(parameter):  # FSDP keeps its own reference to the memory of the shard
                before = parameter.detach().clone()
                parameter.detach().copy_(self.values[i])
                self.values[i] = before
            else:
                parameter.data, self.values[i] = self.values[i], parameter.data
        processes.weights_changed()

    @torch.no_grad()
    def store(self) -> None:
        """Write the values into the parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)
        processes.weights_changed()


class WeightAverage(StoredWeights):
    """The exponential moving average of parameters, with a smaller decay at the start, so that the first values do not
    dominate it. With a decay of 0 it is the parameters themselves, and costs nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        super().__init__(parameters if decay else ())
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 10))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.updates = state["updates"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(processes.part_like(saved, value))


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer in the memory layout of its parameters: another layout may round differently."""
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own = torch.empty_like(parameter, dtype=value.dtype)
                state[key] = own.copy_(processes.part_like(value, own))


def gradient_norm(
    parameters: Sequence[nn.Parameter], limit: float | None, step: int, names: Sequence[str] | None = None
) -> float:
    """Clip the gradients to a global norm of `limit`, and return the norm before. Raises NonFiniteError, naming the
    parameters, if the norm is not finite."""
    norm = processes.full(nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf)).item()
    if not math.isfinite(norm):
        gradients = {i: processes.full(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
        bad = [i for i, gradient in gradients.items() if not bool(gradient.isfinite().all())]
        where = {"what": "gradient", "parameters": [names[i] if names else str(i) for i in bad]}
        tensors = {f"gradient of {name}": gradients[i] for i, name in zip(bad[:8], where["parameters"], strict=False)}
        raise NonFiniteError(f"step {step}: the gradient norm is {norm}; the weights are as before this step", where, tensors)
    return norm


@contextmanager
def located(part: slice) -> Iterator[None]:
    """A context in which NonFiniteError counts samples from the first of the batch, not of the part, and names those that any
    process has found."""
    try:
        yield
    except NonFiniteError as error:
        error.where["samples"] = [i + (part.start or 0) for i in error.where.get("samples", [])]
        found = processes.exchanged({"message": str(error), "where": error.where})
        finder = next((i for i, one in enumerate(found) if one["where"]["samples"]), 0)
        together = {i for one in found for i in one["where"]["samples"]}
        where = {**found[finder]["where"], "samples": sorted(together), "process": finder}
        raise NonFiniteError(found[finder]["message"], where, error.tensors) from None


def all_finite(values: Sequence[Tensor] | Tensor, what: str, times: Tensor) -> None:
    """`values` [steps, batch, ...]. Raises NonFiniteError, in all processes, naming steps, times and samples, if one is not
    finite."""
    # step by step: there is no room for a copy; a sum is finite if all that is in it is, unless it overflows
    sums = torch.stack([step.sum(dtype=torch.promote_types(step.dtype, torch.float32)) for step in values])
    finite = bool(sums.isfinite().all()) or all(bool(step.isfinite().all()) for step in values)
    if not processes.greatest(int(not finite), sums.device):
        return
    if finite:
        raise NonFiniteError(f"{what} is not finite in another process", {"what": what})
    bad = torch.stack([(~step.isfinite()).reshape(len(step), -1).any(1) for step in values])
    steps, samples = bad.any(1).nonzero()[:, 0].tolist(), bad.any(0).nonzero()[:, 0].tolist()
    t = [round(times[k].item(), 6) for k in steps]
    raise NonFiniteError(
        f"{what} is not finite at {len(steps)} of {len(values)} steps (t = {t[0]:g} to {t[-1]:g}) for {len(samples)} of"
        f" {bad.shape[1]} samples",
        {"what": what, "sampler_steps": steps, "times": t, "samples": samples},
        {what: torch.stack([step[samples[:4]] for step in values])},
    )


def refuse_non_finite(tensors: Mapping[str, Tensor], what: str, step: int | None = None) -> None:
    """Raises NonFiniteError, in all processes, naming the tensors that hold a NaN or an infinity.

    Args:
        what: their owner, such as "the tuned model".
        step: the number of optimizer steps taken, if known.
    """
    bad = [name for name, tensor in tensors.items() if not _is_finite(processes.local(tensor.detach()))]
    bad = list(dict.fromkeys(name for found in processes.exchanged(bad) for name in found))
    if bad:
        more = f" and {len(bad) - 1} other tensors" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"{'' if step is None else f'step {step}: '}{bad[0]}{more} of {what} {'are' if more else 'is'} not finite, so it is"
            " not saved; is the learning rate too high?",
            {"what": what, "parameters": bad, **({} if step is None else {"step": step})},
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if there is one
    return math.isfinite(low) and math.isfinite(high)


def finite(value: Tensor | float, what: str, step: int) -> float:
    """`value` as a float. Raises NonFiniteError if it is NaN or infinite."""
    number = value.item() if isinstance(value, Tensor) else value
    if not math.isfinite(number):
        raise NonFiniteError(f"step {step}: {what} is {number}; the weights are as before this step", {"what": what})
    return number
