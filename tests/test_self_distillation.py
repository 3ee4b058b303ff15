"""Self-distillation: its minimiser is the field of the samples' law, condition by condition, at the times asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.memory import PeakMemory
from tiltflow.training.self_distillation import self_distillation

pytestmark = pytest.mark.usefixtures("double")


def test_the_gradient_vanishes_at_the_field_of_the_samples() -> None:
    """Samples of N(0.5, 0.2) in two dimensions, whose field is affine: z-scores of the gradient along a constant and along x,
    and what they are for a field that is off by a little."""

    class Affine(nn.Module):
        def __init__(self, *away: float) -> None:
            super().__init__()
            self.away = nn.Parameter(torch.tensor(away))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t = t.reshape(-1, 1)
            slope = (0.2 * t - (1 - t)) / (0.2 * t**2 + (1 - t) ** 2)
            return 0.5 + slope * (x - 0.5 * t) + self.away[0] + self.away[1] * x

    for away, right in (((0.0, 0.0), True), ((0.1, 0.0), False), ((0.0, 0.1), False)):
        found = []
        for seed in range(25):
            field = Affine(*away)
            x1 = 0.5 + 0.2**0.5 * torch.randn(60, 2, generator=stream(seed))
            batch = Batch(x1, FunctionField(field), FunctionField(field), lambda x: x[:, 0], stream(seed, "noise"))
            self_distillation(batch, x1, torch.arange(60).repeat(3), Sampling(), end=0.5, scale=1.0)
            found.append(field.away.grad)
        z = torch.stack(found).mean(0) / (torch.stack(found).std(0) / 5)
        assert (z.abs().max() < 4) == right


def test_samples_teach_their_own_condition_alone() -> None:
    """Those of label 0 are all 1, those of label 1 all -3: the exact fields (x_1 - x) / (1 - t) have no gradient, times go from
    the first of the sampler to the end asked for, and each point counts once."""
    labels = torch.tensor([0, 1, 0, 1, 1])
    ends = torch.tensor([1.0, -3.0])

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.times = nn.Parameter(torch.zeros(())), []

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            self.times.append(t)
            t = t.reshape(-1, 1)
            return (ends[label][:, None] - x) / (1 - t) + self.c

    network = Labelled()
    field = Flow(network).bind(labels)
    x1 = ends[labels][:, None].expand(5, 3).contiguous()
    batch = Batch(x1, field, field, lambda x: x[:, 0], stream(0), start=0.1, micro_batch_size=4)
    which = torch.tensor([0, 1, 1, 2, 3, 4, 4])
    self_distillation(batch, x1, which, Sampling(num_inference_steps=5), end=0.4, scale=2.0)
    assert abs(network.c.grad.item()) < 1e-12
    times = torch.cat([t.reshape(-1) for t in network.times]).sort().values
    parts = 0.1 + 0.3 * torch.arange(8) / 7
    assert ((times >= parts[:-1]) & (times <= parts[1:])).all()
    network.c.data.fill_(0.5)
    self_distillation(batch, x1, which, Sampling(num_inference_steps=5), end=0.4, scale=2.0)
    assert network.c.grad.item() == pytest.approx(2 * 2.0 * 0.5 * 3 * 7 / 5)


def test_each_process_keeps_the_noise_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same state, the gradients of any number of processes sum to that of one, and what each of them has while its
    network is called shrinks with its share: of 10 points 10, 5 and 3, of which four processes have some twice."""
    size, dimensions = 10, 500
    which = torch.arange(4).repeat(3)[:size]
    x1 = torch.randn(4, dimensions, generator=stream(1))

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.kept = nn.Parameter(torch.tensor(0.3)), list[int]()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.kept.append(memory.now)
            return self.slope * x * t.reshape(-1, 1)

    found, kept = [], []
    for count in (1, 2, 4):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        monkeypatch.setattr(processes, "total", lambda value, device: value)
        network = Watched()
        for index in range(count):
            monkeypatch.setattr(processes, "index", lambda index=index: index)
            batch = Batch(x1, FunctionField(network), FunctionField(network), lambda x: x[:, 0], stream(0), micro_batch_size=1)
            with PeakMemory() as memory:
                self_distillation(batch, x1, which, Sampling(), end=0.5, scale=1.0)
        found.append(network.slope.grad)
        kept.append(network.kept[0] / (8 * dimensions))  # in points, those of the one that is there included
    torch.testing.assert_close(torch.stack(found), found[0].expand(3), rtol=1e-12, atol=0)
    assert kept[0] - kept[1] == pytest.approx(5, abs=0.1)
    assert kept[0] - kept[2] == pytest.approx(7, abs=0.1)
