"""The plainest loop of a paper, written once more without anything that a library has: what `benchmarks/speed.py` holds the
methods against. One iteration at a call, on a network (x, t) -> velocity, with the reward mean(x)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.control.timesteps import Stratum
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.draft import Draft
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.tilt_matching import TiltMatching

Loop = Callable[[], None]
TRAINED, PASSES = 6, 4


def _sgd(network: nn.Module) -> Callable[[], None]:
    adam = torch.optim.AdamW(network.parameters(), 1e-4)

    def step() -> None:
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def _at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t)


def adjoint_matching(network: nn.Module, batch: int, event: tuple[int, ...], steps: int) -> Loop:
    base, step, h = copy.deepcopy(network).requires_grad_(False), _sgd(network), 1 / steps

    def iterate() -> None:
        x, path = torch.randn(batch, *event), []
        with torch.no_grad():
            for k in range(steps):  # the memoryless SDE: sigma^2 = 2 (1 - t) / t, from the first step on
                t = (k + 1) * h - h / 2
                path.append((t, x))
                sigma = (2 * (1 - t) / t) ** 0.5
                x = x + h * (2 * network(x, _at(t, x)) - x / t) + sigma * h**0.5 * torch.randn_like(x)
        a, adjoints = -torch.full_like(x, 1.0 / x[0].numel()), []
        for t, now in reversed(path):  # the lean adjoint
            y = now.detach().requires_grad_()
            drift = 2 * base(y, _at(t, y)) - y / t
            a = a + h * torch.autograd.grad(drift, y, a)[0]
            adjoints.append(a)
        for i in torch.randperm(steps)[:TRAINED].tolist():
            (t, now), adjoint = path[i], adjoints[-1 - i]
            sigma = (2 * (1 - t) / t) ** 0.5
            with torch.no_grad():
                fixed = base(now, _at(t, now))
            loss = (2 / sigma * (network(now, _at(t, now)) - fixed) + sigma * adjoint).square().flatten(1).sum(1).mean()
            (loss / TRAINED).backward()
        step()

    return iterate


def orw_cfm_w2(network: nn.Module, batch: int, event: tuple[int, ...], steps: int) -> Loop:
    base, step = copy.deepcopy(network).requires_grad_(False), _sgd(network)

    def iterate() -> None:
        x = heun(network, batch, event, steps // 2)
        weight = (x.flatten(1).mean(1)).softmax(0) * batch
        for _ in range(PASSES):
            t, at, u = noised(x)
            v = network(at, t)
            with torch.no_grad():
                fixed = base(at, t)
            each = (v - u).square().flatten(1).mean(1) * weight + 0.1 * (v - fixed).square().flatten(1).mean(1)
            each.mean().backward()
            step()

    return iterate


def tilt_matching(network: nn.Module, batch: int, event: tuple[int, ...], steps: int) -> Loop:
    base, step = copy.deepcopy(network).requires_grad_(False), _sgd(network)

    def iterate() -> None:
        x = heun(network, batch, event, steps // 2)
        weight = (x.flatten(1).mean(1).softmax(0) * batch).view(-1, 1, 1, 1)
        for _ in range(PASSES):
            t, at, u = noised(x)
            v = network(at, t)
            with torch.no_grad():
                target = v + (base(at, t) - v) + (weight - 1) * (u - v)
            (v - target).square().mean().backward()
            step()

    return iterate


def draft(network: nn.Module, batch: int, event: tuple[int, ...], steps: int) -> Loop:
    step = _sgd(network)

    def iterate() -> None:
        x = torch.randn(batch, *event)
        for k in range(steps):
            with torch.set_grad_enabled(k == steps - 1):
                x = x + network(x, _at(k / steps, x)) / steps
        (-x.flatten(1).mean(1)).mean().backward()
        step()

    return iterate


def noised(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times, points on paths to the samples, and the velocities of these."""
    t, x0 = torch.rand(len(x)), torch.randn_like(x)
    s = t.view(-1, 1, 1, 1)
    return t, s * x + (1 - s) * x0, x - x0


@torch.no_grad()
def heun(network: nn.Module, batch: int, event: tuple[int, ...], steps: int) -> Tensor:
    x, h = torch.randn(batch, *event), 1 / steps
    for k in range(steps):
        v = network(x, _at(k * h, x))
        x = x + h / 2 * (v + network(x + h * v, _at((k + 1) * h, x)))
    return x


LOOPS: Mapping[str, Callable[[nn.Module, int, tuple[int, ...], int], Loop]] = {
    "adjoint-matching": adjoint_matching,
    "orw-cfm-w2": orw_cfm_w2,
    "tilt-matching": tilt_matching,
    "draft": draft,
}
METHODS: Mapping[str, Callable[[int], Any]] = {
    "adjoint-matching": lambda steps: AdjointMatching(num_inference_steps=steps, train_timesteps=(Stratum(count=TRAINED),)),
    "orw-cfm-w2": lambda steps: OrwCfmW2(num_inference_steps=steps // 2, num_passes=PASSES),
    "tilt-matching": lambda steps: TiltMatching(num_inference_steps=steps // 2, num_passes=PASSES, replay=1, neighbours=1),
    "draft": lambda steps: Draft(num_inference_steps=steps, solver="euler", truncation=1),
}
"""The same methods at the settings of the loops."""
