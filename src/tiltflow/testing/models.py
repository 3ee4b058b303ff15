"""A model as a velocity field: of each sample alone, the same twice, and the field of the law that it samples."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.flows.eval_mode import eval_mode
from tiltflow.models.consistency import WRONG_CLOCK, consistency
from tiltflow.models.model import Model
from tiltflow.streams import stream


@torch.no_grad()
def check_model(model: Model, data: Tensor | None = None) -> None:
    """Check that the network of a model gives each sample a velocity of its own, the same twice, and that it is used as it was
    trained: on the right clock, in the right direction, as the right prediction.

    Args:
        data: 32 or more samples [n, *event] that it was trained on. Without them it is held against its own samples.

    Raises AssertionError; InputError for a network that cannot be called.
    """
    x = model.start(4, stream(0, "check model", device=model.device))
    flow = model.bound(model.example_conditions(4))
    with eval_mode(model.flow.network):
        for t in (0.2, 0.7):
            time = torch.full((4,), t, dtype=torch.float64, device=x.device)
            v, again = flow(x, time), flow(x, time)
            assert v.isfinite().all(), f"velocities at t = {t} are not finite"
            assert torch.equal(v, again), (
                "the network gives different velocities for the same input: does it draw random numbers?"
            )
            alone = torch.cat([flow.select(slice(i, i + 1))(x[i : i + 1], time[:1]) for i in range(4)])
            worst, size = (v - alone).abs().max().item(), v.abs().max().item()
            assert worst <= 1e-3 * (1 + size), (
                f"the velocity of a sample changes by up to {worst:.2g} when it is evaluated alone"
            )
    found = consistency(model, data)
    assert not found.wrong, f"the network is not the velocity field of the law that it samples: {WRONG_CLOCK}"
