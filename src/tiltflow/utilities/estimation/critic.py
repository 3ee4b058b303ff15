r"""A network as the dual potential of the distance W1: the critic of a Wasserstein GAN with a gradient penalty (1704.00028).

W1(p, q) = max_f E_p f - E_q f over functions whose slope in the metric d(x, y) = |A (x - y)| is at most 1: |A^-T grad f| <= 1.
With f(x) = h(A x) that is |grad h| <= 1, so h is learned in the coordinates z = A x, where the penalty is the Euclidean one. An
unpenalised Euclidean bound on grad f itself would allow only moves at the price of the cheapest direction. Only a slope above
1 is penalised (1709.08894): were a smaller one too, a critic on the line that begins with a slope of the wrong sign would keep
it, as its way leads over 0.
"""

# Mutation tests: test_utility_transport.py

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiltflow.streams import stream
from tiltflow.utilities.estimation.transport import Metric, stretched

BATCH = 256


@dataclass(frozen=True)
class Critic:
    """f(x) = s h((A x - centre) / s), whose slope is that of h."""

    network: nn.Module
    metric: Metric
    centre: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        z = (stretched(x, self.metric, torch.float32) - self.centre) / self.scale
        heights: Tensor = self.network(z)[:, 0]
        return (self.scale * heights).to(x.dtype)


def train(
    x: Tensor,
    p: Tensor,
    y: Tensor,
    metric: Metric,
    *,
    steps: int,
    width: int,
    penalty: float,
    learning_rate: float,
    seed: int,
) -> Critic:
    """Learn the potential between x [n, *event] with probabilities p [n] and y [m, *event]. The penalty is on the slope at
    points between the samples of both, in units of the distance."""
    ours, theirs = (stretched(each, metric, torch.float32) for each in (x, y))
    centre, scale = theirs.mean(0), torch.cat([ours, theirs]).std(0).norm()
    ours, theirs = (ours - centre) / scale, (theirs - centre) / scale
    draw = stream(seed, "critic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "critic", "weights").initial_seed())
        network = nn.Sequential(
            nn.Linear(ours.shape[1], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        ).to(x.device)
    optimizer = torch.optim.Adam(network.parameters(), learning_rate, (0.5, 0.9))
    weights, equal = p.cpu(), torch.ones(len(theirs))
    with torch.enable_grad():
        for _ in range(steps):
            a = ours[torch.multinomial(weights, BATCH, replacement=True, generator=draw).to(x.device)]
            b = theirs[torch.multinomial(equal, BATCH, replacement=True, generator=draw).to(x.device)]
            share = torch.rand((BATCH, 1), generator=draw).to(a)
            between = (share * a + (1 - share) * b).requires_grad_()
            (slope,) = torch.autograd.grad(network(between).sum(), between, create_graph=True)
            loss = network(b).mean() - network(a).mean() + penalty * (slope.norm(dim=1) - 1).relu().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Critic(network.requires_grad_(False), metric, centre, scale)
