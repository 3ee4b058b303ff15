"""Schedulers against diffusers: what a pipeline draws by its own steps, and which of them are not ours."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
import diffusers
from tiny_pipelines import STABLE_DIFFUSION, tiny_pipeline

from tiltflow import from_diffusers
from tiltflow.errors import InputError
from tiltflow.flows.interpolant import Linear
from tiltflow.models.schedules import Schedule, path_of, prediction_of_normal, schedule_of
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream

DIFFUSION = {**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False}
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def make(name: str, **options: Any) -> Any:
    """A scheduler of diffusers, with Stable Diffusion's schedule where it takes one."""
    kind = getattr(diffusers, f"{name}Scheduler")
    return kind(**options) if name.startswith("FlowMatch") else kind.from_config({**DIFFUSION, **options})


def drawn(pipeline: Any, latents: Tensor, steps: int) -> Tensor:
    """The latents of the pipeline itself, by its own scheduler."""
    images: Tensor = pipeline(
        ["a red cat"], num_inference_steps=steps, guidance_scale=2.0, latents=latents.clone(), output_type="latent",
        height=16, width=16, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images


EULER = "EulerDiscrete"
SCHEDULERS: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    # family, scheduler, settings, steps, and what is said where its pictures are not ours
    *(("stable-diffusion", EULER, {"timestep_spacing": s}, 7, None) for s in ("leading", "trailing", "linspace")),
    ("stable-diffusion", EULER, {"use_karras_sigmas": True}, 7, None),
    ("stable-diffusion", EULER, {"final_sigmas_type": "sigma_min"}, 7, None),
    ("stable-diffusion", EULER, {"interpolation_type": "log_linear"}, 7, "because of interpolation_type: log_linear"),
    (
        "stable-diffusion",
        EULER,
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        7,
        "timestep_type: continuous",
    ),
    ("stable-diffusion", "DDIM", {"timestep_spacing": "leading"}, 7, None),
    ("stable-diffusion", "DDIM", {"timestep_spacing": "trailing"}, 8, None),
    ("stable-diffusion", "DDIM", V_ZERO_SNR, 8, None),
    ("stable-diffusion", "DDIM", V_ZERO_SNR, 7, "because of timestep_spacing: trailing"),
    ("stable-diffusion", "DDIM", {"timestep_spacing": "linspace"}, 8, "because of timestep_spacing: linspace"),
    ("stable-diffusion", "DDIM", {"clip_sample": True}, 8, "because of clip_sample: true"),
    ("stable-diffusion", "DDIM", {"thresholding": True}, 8, "because of thresholding: true"),
    ("stable-diffusion", "PNDM", {"skip_prk_steps": True}, 8, "PNDMScheduler: at 8 steps it draws other latents"),
    ("stable-diffusion", "DPMSolverMultistep", {}, 8, "DPMSolverMultistepScheduler: at 8 steps it draws other latents"),
    ("stable-diffusion", "EulerAncestralDiscrete", {}, 8, "ours goes from each of EulerDiscreteScheduler's times to the next"),
    ("stable-diffusion-3", "FlowMatchEulerDiscrete", {"shift_terminal": 0.1}, 8, None),
    ("stable-diffusion-3", "FlowMatchEulerDiscrete", {"stochastic_sampling": True}, 8, "of stochastic_sampling: true"),
    ("stable-diffusion-3", "UniPCMultistep", FLOW, 8, "UniPCMultistepScheduler: at 8 steps it draws other latents"),
    ("stable-diffusion-3", "UniPCMultistep", {**FLOW, "solver_order": 1, "disable_corrector": list(range(8))}, 8, None),
    ("stable-diffusion-3", "DPMSolverMultistep", FLOW, 8, "DPMSolverMultistepScheduler: at 8 steps it draws other latents"),
    ("stable-diffusion-3", "DPMSolverMultistep", {**FLOW, "solver_order": 1}, 8, None),
]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: tiny_pipeline(name, tmp_path_factory.mktemp(name)) for name in ("stable-diffusion", "stable-diffusion-3")}


@pytest.mark.parametrize(("family", "name", "settings", "steps", "said"), SCHEDULERS)
def test_a_scheduler_whose_pictures_differ_is_named(
    family: str, name: str, settings: dict[str, Any], steps: int, said: str | None, pipelines: dict[str, Any]
) -> None:
    """By the pipeline itself: what is said is said of those schedulers, and of those alone, whose latents are not ours."""
    pipeline = pipelines[family]
    pipeline.scheduler = make(name, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the 50 steps at which it is looked at when it is loaded
        model = from_diffusers(pipeline)
    latents = torch.randn(1, *model.event_shape, generator=stream(0, "latents"))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        sampling = Sampling(solver="euler", num_inference_steps=steps)
        ours = model.sample_latents(["a red cat"], latents=latents, sampling=sampling, guidance_scale=2.0)
    theirs = drawn(pipeline, latents, steps)
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    about = [str(warning.message) for warning in heard if "draws other latents" in str(warning.message)]
    if said is None:
        assert apart < 1e-4
        assert not about
    else:
        assert apart > 1e-4
        assert len(about) == 1
        assert said in about[0]


def test_euler_from_pure_noise() -> None:
    """Zero terminal SNR, which Euler's scheduler makes a sigma of 4096. There its own float32 rounds to 2e-4, which a network
    with random weights makes 6e-4 of, so the law whose prediction is known says it."""
    schedule = schedule_of(make(EULER, **V_ZERO_SNR))
    assert schedule.times(50)[0].item() == pytest.approx(1 / 4097, rel=1e-3)
    assert schedule.difference(50, schedule.own) < 1e-5


def test_it_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    said = "DDIMScheduler: at 50 steps it draws other latents than our sampler, by .* because of thresholding: true"
    with pytest.warns(UserWarning, match=said):
        from_diffusers(tiny_pipeline("stable-diffusion", tmp_path, thresholding=True))


def test_a_cause_that_is_a_default_is_named(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    with pytest.warns(UserWarning, match="because of clip_sample: true"):
        from_diffusers(pipeline)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ("DDIM", EULER, "PNDM", "DPMSolverMultistep", "EulerAncestralDiscrete")),
        *((name, FLOW) for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")),
    ],
)
def test_the_plain_scheduler_takes_our_steps(name: str, settings: dict[str, Any]) -> None:
    """What an export comes with, whatever the pipeline had."""
    schedule = schedule_of(make(name, **settings))
    assert schedule.difference(10, schedule.plain) < 1e-5


def test_a_perfect_prediction_is_that_of_the_law() -> None:
    """On the linear path, data N(m, 1/4): E[x_1 - x_0 | x_t] by the covariances, t / 4 of x_1 and 1 - t of x_0 with x_t."""
    t, mean, x = 0.3, torch.full((1, 1), 2.0).double(), torch.tensor([[1.1], [-0.4]])
    found = prediction_of_normal(x, torch.tensor(t), mean=mean, path=Linear(), prediction="velocity")
    variance = t**2 / 4 + (1 - t) ** 2
    expected = 2 + (t / 4 - (1 - t)) / variance * (x - t * 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("timestep", "prediction"), [(999, "epsilon"), (400, "epsilon"), (400, "v"), (0, "x1")])
def test_a_perfect_prediction_at_a_timestep(timestep: int, prediction: Any) -> None:
    """Of data N(2, 1/4), at the noise level of diffusers' table: alpha and beta of it, and E[x_1 | x], by the covariances."""
    square = make("DDIM").alphas_cumprod.double()[timestep]
    alpha, beta = square.sqrt(), (1 - square).sqrt()
    x, mean = torch.tensor([[1.1], [-0.4]]).double(), torch.full((1, 1), 2.0).double()
    x1 = 2 + alpha / 4 / (square / 4 + 1 - square) * (x - 2 * alpha)
    x0 = (x - alpha * x1) / beta
    expected = {"epsilon": x0, "v": alpha * x0 - beta * x1, "x1": x1}[prediction]
    path, _ = path_of(make("DDIM"))
    found = prediction_of_normal(x, torch.tensor(timestep), mean=mean, path=path, prediction=prediction)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            lambda: make("FlowMatchHeunDiscrete", shift=3.0),
            "FlowMatchHeunDiscreteScheduler: its noise schedule is not supported",
        ),
        (lambda: make("FlowMatchLCM"), "FlowMatchLCMScheduler: its noise schedule is not supported"),
        (lambda: make("UniPCMultistep", prediction_type="flow_prediction"), "or flow_prediction with use_flow_sigmas"),
        (lambda: make("DDPM", trained_betas=[0.1, 0.2, 0.3]), "DDPMScheduler: its noise schedule is not supported"),
        (lambda: make("DDPM", beta_schedule="sigmoid"), "DDPMScheduler: its noise schedule is not supported"),
    ],
)
def test_schedulers_that_are_not_known(scheduler: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedule_of(scheduler())


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (lambda: make("DDIM"), 1000, "the times of DDIMScheduler do not all increase"),  # timestep 1000 of 0 to 999
        (lambda: make("DDIM"), 1001, "DDIMScheduler refuses it .* cannot be larger"),
        (lambda: make(EULER, timestep_spacing="leading"), 1000, "the times of EulerDiscreteScheduler do not all increase"),
        (lambda: make("FlowMatchEulerDiscrete", invert_sigmas=True), 4, "do not all increase from noise to data"),
    ],
)
def test_grids_that_do_not_run_from_noise_to_data(scheduler: Any, steps: int, message: str) -> None:
    with pytest.raises(InputError, match=f"num_inference_steps {steps}: .*{message}"):
        schedule_of(scheduler()).times(steps)


def test_all_timesteps_are_a_grid() -> None:
    """The largest number of steps: each timestep once, and the data."""
    schedule: Schedule = schedule_of(make("DDIM", timestep_spacing="trailing", set_alpha_to_one=True))
    times = schedule.times(1000)
    square = times**2 / (times**2 + (1 - times) ** 2)
    assert len(times) == 1001
    torch.testing.assert_close(square[:-1], make("DDIM").alphas_cumprod.flip(0).double(), rtol=1e-5, atol=1e-7)
    assert times[-1] == 1


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_a_dynamic_shift_is_linear_in_the_tokens(tokens: int, mu: float) -> None:
    """sigma -> e^mu / (e^mu + 1 / sigma - 1), mu from 0.5 at 256 tokens to 1.15 at 4096."""
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    schedule = schedule_of(make("FlowMatchEulerDiscrete", use_dynamic_shifting=True), tokens, lambda steps: sigmas[:steps])
    expected = 1 - math.exp(mu) / (math.exp(mu) + 1 / sigmas - 1)
    torch.testing.assert_close(schedule.times(4)[:-1], expected, rtol=0, atol=1e-6)


def test_noise_in_the_coordinates_of_a_diffusion_is_longer_on_the_linear_path() -> None:
    """x / (alpha + beta), with alpha / beta = t / (1 - t) and alpha^2 + beta^2 = 1."""
    t, beta = torch.tensor(0.3, dtype=torch.float64), 0.7 / math.hypot(0.3, 0.7)
    assert schedule_of(make("DDIM")).start_scale(t) == pytest.approx(1 / (0.3 / 0.7 * beta + beta))
    assert schedule_of(make("FlowMatchEulerDiscrete")).start_scale(t) == 1
