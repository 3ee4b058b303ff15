"""The strength of a tilt: the base at 0, what was tuned at 1, from the same noise; in a Gaussian what lies between is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from affine import LINEAR, MEAN, TILTED_MEAN, TILTED_VARIANCE, VARIANCE, slope, velocity
from tiny import tiny_flow
from torch import Tensor, nn
from typer.testing import CliRunner

from tiltflow import load
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model
from tiltflow.models.strength import at_strength
from tiltflow.models.trainable import Adapter, merged
from tiltflow.runs.run import load_run, read_run
from tiltflow.runs.strength import load_both
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream

FINE = Sampling(solver="heun", num_inference_steps=400)


class TwoLaws(nn.Module):
    """Velocities of two Gaussians, N(m, s) by s and m, mixed by the weights: linear in these."""

    def __init__(self, weights: tuple[float, float], mean: float, variance: float):
        super().__init__()
        self.weights, self.other = nn.Parameter(torch.tensor(weights, dtype=torch.float64)), (mean, variance)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None].double()
        return self.weights[0] * velocity(x, t) + self.weights[1] * velocity(x, t, *self.other)


def law_at(strength: float, mean: float, variance: float) -> tuple[float, float]:
    """Mean and standard deviation of the ODE's samples between N(MEAN, VARIANCE) and N(mean, variance), from its affine map."""
    base, tuned = (Model(Flow(TwoLaws(w, mean, variance)), (1,)) for w in ((1.0, 0.0), (0.0, 1.0)))
    ends = sample(
        at_strength(base, tuned, strength).flow, torch.tensor([[0.0], [1.0]]).double(), FINE, stream(0, "none"), start=0.0
    )
    return ends[0].item(), (ends[1] - ends[0]).item()


def test_a_linear_reward_of_a_gaussian_is_tilted_as_at_beta_over_the_strength() -> None:
    """Where the tilt moves a Gaussian, and does not change its variance, the law at strength s is that at beta / s exactly."""
    for strength in (0.0, 0.3, 1.0, 1.7):
        mean, std = law_at(strength, MEAN + VARIANCE * LINEAR, VARIANCE)
        assert mean == pytest.approx(MEAN + strength * VARIANCE * LINEAR, abs=1e-4)
        assert std == pytest.approx(VARIANCE**0.5, abs=1e-4)


def test_between_two_variances_lies_their_geometric_mean() -> None:
    """At beta / s it would be the harmonic one, which is smaller. d log std / dt is the slope of the field, which is mixed: so
    std^2 = VARIANCE^(1 - s) TILTED_VARIANCE^s; the mean is that of the linear equation, by quadrature."""
    for strength in (0.0, 0.25, 0.5, 1.0, 1.5):
        mean, std = law_at(strength, TILTED_MEAN, TILTED_VARIANCE)
        assert std**2 == pytest.approx(VARIANCE ** (1 - strength) * TILTED_VARIANCE**strength, rel=1e-4)
        assert mean == pytest.approx(mean_between(strength), abs=1e-4)
    at_half_beta = 1 / (0.5 / VARIANCE + 0.5 / TILTED_VARIANCE)
    assert law_at(0.5, TILTED_MEAN, TILTED_VARIANCE)[1] ** 2 > at_half_beta + 0.005


def mean_between(strength: float) -> float:
    """m' = A_s m + b_s of the mixed field, by variation of constants and the trapezoidal rule."""
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    slopes, pushes = torch.zeros_like(t), torch.zeros_like(t)
    for weight, mean, variance in ((1 - strength, MEAN, VARIANCE), (strength, TILTED_MEAN, TILTED_VARIANCE)):
        slopes += weight * slope(t, variance)
        pushes += weight * mean * (1 - t * slope(t, variance))
    grown = torch.cumulative_trapezoid(slopes, t)
    rest = (grown[-1] - torch.cat([torch.zeros(1), grown])).exp()
    return torch.trapezoid(pushes * rest, t).item()


def test_a_lora_that_was_merged_is_scaled() -> None:
    """Weights between a base and a merged LoRA are those of the LoRA at this scale, as peft merges it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Model(Flow(TimeFree(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))), (3,))
    _, adapted = base.trainable(Adapter(rank=2), seed=0)
    adapter: Any = adapted.flow.network
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=stream(0, "B"))
    tuned = replace(base, flow=Flow(merged(adapter)))
    x, t = torch.randn(5, 3, generator=stream(0, "x")), torch.tensor(0.5)
    for layer in adapter.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.3)
    assert torch.allclose(at_strength(base, tuned, 0.3).flow(x, t), Flow(adapter)(x, t), atol=1e-6)
    assert not torch.allclose(base.flow(x, t), Flow(adapter)(x, t), atol=1e-2)


class TimeFree(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 3}, pytest.param({"lora_alpha": 3, "use_rslora": True}, marks=pytest.mark.slow)]
)
def test_the_lora_of_a_pipeline_is_scaled(settings: dict[str, Any], tmp_path: Path) -> None:
    """As diffusers scales it in `set_adapters`, above a LoRA of the base, which keeps its own strength."""
    pytest.importorskip("diffusers")
    from test_adapters import distance, moved
    from test_adapters import velocity as of_pipeline
    from test_text_to_image import PROMPTS, euler, latents_of
    from tiny_pipelines import tiny_pipeline

    from tiltflow.models.from_diffusers import from_diffusers
    from tiltflow.models.text_to_image import with_adapter

    moved(with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), rank=2)).save(tmp_path / "below")
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.load_lora_weights(tmp_path / "below", adapter_name="below")
    pipeline.set_adapters(["below"], [0.7])
    tuned = moved(with_adapter(from_diffusers(pipeline), rank=4, **settings))
    base = tuned.base()
    before, after, half = of_pipeline(base), of_pipeline(tuned), of_pipeline(at_strength(base, tuned, 0.5))
    assert at_strength(base, tuned, 0.0) is base
    assert torch.equal(of_pipeline(tuned), after)  # what is scaled for a call is as it was afterwards
    assert torch.equal(of_pipeline(base), before)
    assert min(distance(half, before), distance(half, after)) > 1e-3
    latents, steps = latents_of(tuned), euler(2)
    drawn = at_strength(base, tuned, 0.5).sample_latents(PROMPTS, sampling=steps, guidance_scale=2.0, latents=latents)
    pipeline.set_adapters(["below", tuned.denoiser.adapter], [0.7, 0.5])
    assert torch.equal(of_pipeline(tuned), half)
    expected = tuned.sample_latents(PROMPTS, sampling=steps, guidance_scale=2.0, latents=latents)
    assert distance(drawn, expected) < 1e-5


def test_a_dora_has_no_strength(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tiny_pipelines import tiny_pipeline

    from tiltflow.models.from_diffusers import from_diffusers
    from tiltflow.models.text_to_image import with_adapter

    tuned = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), use_dora=True)
    with pytest.raises(InputError, match="a DoRA scales the weights of the base too"):
        at_strength(tuned.base(), tuned, 0.5)
    assert at_strength(tuned.base(), tuned, 1) is tuned


def test_a_run_at_0_is_its_base_and_at_1_what_was_tuned_bit_for_bit(parted_run: Path) -> None:
    base, tuned = load_run(read_run(parted_run), parted_run)
    drawn = {strength: load(parted_run, tilt_strength=strength).sample(3, seed=4) for strength in (0.0, 0.5, 1.0)}
    assert torch.equal(drawn[0.0], base.sample(3, seed=4))
    assert torch.equal(drawn[1.0], tuned.sample(3, seed=4))
    assert torch.equal(drawn[1.0], load(parted_run).sample(3, seed=4))
    assert not torch.equal(drawn[0.0], drawn[1.0])
    first, last = (model.flow.network.state_dict() for model in (base, tuned))
    half = load(parted_run, tilt_strength=0.5).flow.network.state_dict()
    assert all(torch.allclose(half[key], (first[key] + last[key]) / 2, atol=1e-6) for key in half)
    both = load_both(parted_run)
    at_strength(*both, 0.5)
    assert torch.equal(both[1].sample(3, seed=4), drawn[1.0])  # neither is changed by one between them


def test_strength_on_the_command_line(parted_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.npz"
    command = [
        "sample",
        str(parted_run),
        "--tilt-strength",
        "0.5",
        "-n",
        "2",
        "-o",
        str(out),
        "--json",
        "--quiet",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, command)
    assert json.loads(done.stdout)["tilt_strength"] == 0.5
    expected = load(parted_run, tilt_strength=0.5).sample(2)
    assert torch.equal(torch.from_numpy(np.load(out)["samples"]), expected)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    flow = tiny_flow(tmp_path / "flow")
    with pytest.raises(InputError, match="is no training run, and so has no base"):
        load(flow, tilt_strength=0.5)
    with pytest.raises(InputError, match="is no training run, and so has no base"):
        load("digits-flow", tilt_strength=0.5)
    for wrong in (-0.1, float("nan"), float("inf"), "1", True):
        with pytest.raises(InputError, match="tilt strength: must be a number of 0"):
            load(flow, tilt_strength=wrong)  # type: ignore[arg-type]
    other = Model(Flow(nn.Linear(2, 2)), (2,))
    with pytest.raises(InputError, match="other weights than its base"):
        at_strength(load(flow), other, 0.5)
