r"""The log ratio log p_tuned(x) / p_base(x) of the laws of two velocity fields, without either density.

Mixing a sample x_1 with noise, x_t = t x_1 + (1 - t) x_0, u = x_1 - x_0, and comparing both fields there says how much more
likely tuning has made it:

    log p_tuned(x_1) / p_base(x_1) = -E int_0^1 t / (1 - t) (|v_tuned(x_t, t) - u|^2 - |v_base(x_t, t) - u|^2) dt,

the mean over x_0, |.|^2 the sum over dimensions. It is Girsanov's formula along the memoryless path that ends in x_1, exact
where each field is that of the law that it samples. It takes forward passes alone, in any dimension and for any prediction.

In a few dimensions the ODE with its divergence has no noise. It is solved by a method of order 2: with the divergence of
Euler's method a perfect model would seem to have a fifth less of the tilt at 20 steps, and a tenth at 40.
"""

# Mutation tests: test_achieved_tilt.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow import processes
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.streams import normal

DRAWS = 4
"""Times of each of two estimates for a sample, each with a noise and its opposite."""
EVALUATIONS = 4 * DRAWS
"""Of either field, for a sample."""
END = 1 - 1 / 128
"""Last time at which exact fields are compared: what is left out is of order (1 - END)^2, below a thousandth of the tilt of a
normal law."""
ODE_STEPS = 40


@torch.no_grad()
def by_flow_matching(
    tuned: VelocityField,
    base: VelocityField,
    x1: Tensor,
    generator: torch.Generator,
    *,
    start: float = 0.0,
    end: float = END,
    draws: int = DRAWS,
    batch_size: int | None = None,
) -> Tensor:
    """Estimate the log ratio of samples x1 [n, *event] twice, from independent noise: [2, n], float64, on the CPU.

    Args:
        tuned, base: bound to the conditions of the samples.
        start: time at which both models start from pure noise.
        end: last time at which the fields are compared: the last one at which their sampler asks for them. After it, networks
            have learned nothing, and their errors, which do not vanish at data as the difference of exact fields does, would
            count without limit.
        draws: equidistant times of each estimate, from a random first one; each with a noise and its opposite.
        batch_size: samples that a network sees at once.
    """
    ours, theirs = (in_chunks(field, batch_size) for field in (tuned, base))
    found = torch.zeros(2, len(x1), dtype=torch.float64, device=x1.device)
    for estimate in found:
        first = torch.rand(len(x1), generator=generator, device=generator.device, dtype=torch.float64)
        for k in range(draws):
            t = start + (end - start) * (k + first) / draws
            noise = tuned.project(normal(x1.shape, generator, x1.dtype))
            weight = (end - start) / draws * t / (1 - t)
            for x0 in (noise, -noise):
                x, u = expand(t, x1) * x1 + expand(1 - t, x1) * x0, (x1 - x0).double()
                v, origin = ours(x, t).double(), theirs(x, t).double()
                # |v - u|^2 - |origin - u|^2 without the cancellation
                estimate -= weight / 2 * ((v - origin) * (v + origin - 2 * u)).flatten(1).sum(1)
    return found.cpu()


def by_ode(
    tuned: VelocityField,
    base: VelocityField,
    x1: Tensor,
    *,
    steps: int = ODE_STEPS,
    batch_size: int | None = None,
) -> Tensor:
    """Compute the log ratio of samples x1 [n, *event] from the densities of both ODEs, which start from standard normal noise
    at time 0: [n], float64, on the CPU. It takes as many backward passes a step as x has dimensions. Arguments as of
    `by_flow_matching`."""
    parts = []
    for part in processes.shares(len(x1), batch_size):
        ours, theirs = (log_density(field.select(part), x1[part], steps) for field in (tuned, base))
        parts.append(ours - theirs)
    return processes.gathered(parts, len(x1)).cpu()


def log_density(field: VelocityField, x: Tensor, steps: int) -> Tensor:
    """Compute log p(x) of x [n, *event] up to the constant of the normal law: [n], float64. Back along the ODE, each step by
    the velocity in its middle; the ends of the path, where some predictions are singular, are not asked for."""
    h, total = 1 / steps, torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for k in reversed(range(steps)):
        t = torch.tensor((k + 0.5) * h, dtype=torch.float64)
        with torch.no_grad():
            middle = x - h / 2 * field(x, t)
        v, divergence = with_divergence(field, middle, t)
        x = x - h * v
        total -= h * divergence
    return total - x.double().flatten(1).square().sum(1) / 2


def with_divergence(field: VelocityField, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the velocity at (x [n, *event], t), and its exact divergence [n], float64."""
    x = x.detach().requires_grad_()
    with field.own_weights(), torch.enable_grad():
        v = field(x, t)
        rows = v.flatten(1).sum(0)
        parts = [torch.autograd.grad(row, x, retain_graph=True)[0].flatten(1)[:, i] for i, row in enumerate(rows)]
    return v.detach(), torch.stack(parts).double().sum(0)
