"""Pipelines that were distilled to few steps: what they are known by, their own steps beside ours, and what is said of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
import diffusers
from test_run_text_to_image import recipe_for, train
from tiny_pipelines import STABLE_DIFFUSION, tiny_pipeline

import tiltflow
from tiltflow import from_diffusers
from tiltflow.errors import Note
from tiltflow.flows.interpolant import Linear
from tiltflow.models.few_steps import few_steps_in_words
from tiltflow.models.pipelines import families
from tiltflow.models.schedules import drawn_by, schedule_of
from tiltflow.runs.export import export_run
from tiltflow.samplers.grid import OwnGrid
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.solvers.consistency import consistency
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.solvers.tcd import Tcd

LCM = {**STABLE_DIFFUSION, "set_alpha_to_one": False}
TURBO = {**STABLE_DIFFUSION, "timestep_spacing": "trailing"}


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("scheduler", "solver"),
    [
        (diffusers.LCMScheduler(**LCM), "consistency"),
        (diffusers.EulerAncestralDiscreteScheduler(**TURBO), "ddpm"),
        (diffusers.SCMScheduler(), "consistency"),
        *[(diffusers.TCDScheduler(**LCM), f"tcd {eta}") for eta in (0.0, 0.3, 1.0)],
    ],
)
def test_our_steps_are_those_of_the_scheduler(scheduler: Any, solver: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise and a network that is not linear, from the same latents to the same end."""
    noises = torch.randn(steps + 1, 2, 3, generator=torch.Generator().manual_seed(0))
    schedule, (solver, _, eta) = schedule_of(scheduler), solver.partition(" ")
    unit = 0.3 if isinstance(schedule.path, Linear) else 300

    def predict(x: Tensor, time: Tensor) -> Tensor:
        return torch.sin(3 * x) + x.flip(-1) * torch.cos(time.double().mean() / unit)

    sampling = Sampling(solver=solver, num_inference_steps=steps, eta=float(eta or 1))
    chain = sampling.chain(OwnGrid(schedule.times, schedule.clock))
    flow = tiltflow.Flow(predict, schedule.prediction, schedule.path)
    x = noises[0].double() * schedule.start_scale(chain.times[0])
    for k in range(steps):
        v = flow(x, chain.times[k])
        x = chain.x_scale[k] * x + chain.v_scale[k] * v + chain.std[k] * noises[k + 1]
    ours = x * schedule.end_scale(chain.times[-1])

    drawn = iter(noises[1:])
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *rest, **options: next(drawn))
    schedule.set_timesteps(scheduler, steps)
    theirs = drawn_by(scheduler, predict, noises[0], **({"eta": float(eta)} if eta else {}))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("steps", [2, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 3))])
def test_sana_sprint_draws_what_its_pipeline_draws(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise, at two scales of its guidance."""
    model = from_diffusers(tiny_pipeline("sana-sprint", tmp_path), height=32, width=32)
    assert (model.guidance_scale, model.sampling) == (4.5, Sampling(solver="consistency", num_inference_steps=2))
    noises = torch.randn(steps + 1, 1, *model.event_shape, generator=torch.Generator().manual_seed(0))
    module, ends = type(model.pipeline.scheduler).__module__, []
    for scale in (4.5, 1.5):
        drawn = iter(noises[1:])
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *rest, drawn=drawn, **options: next(drawn))
        theirs = model.pipeline(
            "a red cat", latents=noises[0], num_inference_steps=steps, guidance_scale=scale, output_type="latent",
            **model.size_options, **model.family.arguments(model.size, steps),
        ).images  # fmt: skip
        chain = Sampling(solver="consistency", num_inference_steps=steps).chain(model.own_grid)
        flow, x = model.guided(["a red cat"], scale)(model.flow), noises[0]
        with torch.no_grad():
            for k in range(steps):
                v = flow(x, chain.times[k])
                x = chain.mean(k, x, v) + chain.std[k].item() * noises[k + 1]
        assert (x - theirs).abs().max() < 1e-4 * theirs.abs().max()
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() > 1e-2 * ends[0].abs().max()


def test_tcd_is_between_euler_and_consistency() -> None:
    """At both ends it is one of them; between, the noise that is left and the fresh one are together that of the path."""
    times = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    for eta, other in ((0.0, euler(times)), (1.0, consistency(times))):
        chain = Tcd(eta).chain(times)
        for part in ("x_scale", "v_scale", "std"):
            torch.testing.assert_close(getattr(chain, part), getattr(other, part), rtol=0, atol=1e-15)
    chain, (t, s) = Tcd(0.3).chain(times), (times[:-1], times[1:])
    # x = t x_1 + (1 - t) x_0 and v = x_1 - x_0: the factors of x_1 and of x_0 after a step
    of_data, of_noise = chain.x_scale * t + chain.v_scale, chain.x_scale * (1 - t) - chain.v_scale
    torch.testing.assert_close(of_data, s, rtol=0, atol=1e-15)
    torch.testing.assert_close(of_noise**2 + chain.std**2, (1 - s) ** 2, rtol=0, atol=1e-15)
    assert (chain.std[:-1] > 0).all()
    assert chain.std[-1] == 0
    inner = 0.3 + 0.7 * s  # nearer to data by 0.3 of what is left: the noise there, scaled as the data is on the way back
    torch.testing.assert_close(of_noise / of_data, (1 - inner) / inner, rtol=0, atol=1e-12)


def test_a_consistency_model_keeps_its_law() -> None:
    """x1hat(x, t) = m + s (x - t m) / sqrt(t^2 s^2 + (1 - t)^2) takes N(t m, ..) at any time to N(m, s^2): so does every step,
    and where x1hat is a mean, E[x_1 | x], the variance is too small."""
    mean, deviation = 0.7, 0.5
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    chain = consistency(times)
    for exact in (True, False):
        m, s2 = torch.zeros(()), torch.ones(())
        for k, t in enumerate(times[:-1]):
            spread = (t**2 * deviation**2 + (1 - t) ** 2).sqrt()
            slope = deviation / spread if exact else t * deviation**2 / spread**2
            # v = (x1hat - x) / (1 - t), of which the chain's step is linear
            factor = chain.x_scale[k] + chain.v_scale[k] * (slope - 1) / (1 - t)
            m = factor * m + chain.v_scale[k] * (mean - slope * t * mean) / (1 - t)
            s2 = factor**2 * s2 + chain.std[k] ** 2
        assert (m - mean).abs() < 1e-12
        assert abs(s2 - deviation**2) < 1e-12 if exact else s2 < 0.9 * deviation**2


SIGNS: dict[str, tuple[str, Any, str]] = {
    "LCM": ("stable-diffusion", diffusers.LCMScheduler(**LCM), "LCMScheduler: this model was distilled to few"),
    "TCD": ("stable-diffusion", diffusers.TCDScheduler(**LCM), "TCDScheduler: this model was distilled to few"),
    "Turbo": (
        "stable-diffusion-xl",
        diffusers.EulerAncestralDiscreteScheduler(**TURBO),
        "EulerAncestralDiscreteScheduler with timestep_spacing: trailing: this model was",
    ),
    "Lightning": (
        "stable-diffusion-xl",
        diffusers.EulerDiscreteScheduler(**TURBO),
        "timestep_spacing: trailing, 3 steps and no guidance: if this model was",
    ),
    "SANA-Sprint": ("sana-sprint", None, "SCMScheduler: this model was distilled to few"),
    "schnell": ("flux", None, "a FluxPipeline without guidance: this model was"),
    "many steps": ("stable-diffusion-xl", diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION), ""),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("TCD", "SANA-Sprint"))) for name in SIGNS]
)
def test_what_is_known_is_said_before_the_first_step(name: str, tmp_path: Path) -> None:
    family, scheduler, sign = SIGNS[name]
    pipeline = tiny_pipeline(family, tmp_path, **({"guidance_embeds": False} if family == "flux" else {}))
    pipeline.scheduler = scheduler or pipeline.scheduler
    model = from_diffusers(pipeline, guidance_scale=None if family in ("flux", "sana-sprint") else 1.0)
    heard: list[str] = []

    def reward(images: Tensor) -> Tensor:
        if images.requires_grad:  # for the only update: what was said until then
            heard[:] = [str(one.message) for one in caught]
        return brightness(images)

    training = tiltflow.Training(max_train_steps=1, prompts_per_step=1, num_generations=2, guidance_mode="none")
    solver = {"TCD": "tcd", "LCM": "consistency", "SANA-Sprint": "consistency", "Turbo": "ddpm"}.get(name, "memoryless")
    method = tiltflow.AdjointMatching(num_inference_steps=3, solver=solver)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Note)
        tiltflow.tune(model, reward, method, training, conditions=["a red cat"])
    about = [text for text in heard if "no velocity field whose ODE or SDE" in text]
    assert len(about) == bool(sign)
    if sign:
        assert about[0].startswith(sign)
        assert about[0].endswith(f"the law that is tilted is the one that the solver {solver} makes in 3 steps.")


def test_defaults_where_the_scheduler_is_for_few_steps(tmp_path: Path) -> None:
    """Without guidance, in few steps, by the solver that does what the scheduler does; what is asked for stays."""
    for name, solver, eta in (("LCM", "consistency", 1.0), ("Turbo", "ddpm", 1.0), ("TCD", "tcd", 0.3)):
        pipeline = tiny_pipeline("stable-diffusion", tmp_path)
        pipeline.scheduler = SIGNS[name][1]
        model = from_diffusers(pipeline)
        assert (model.guidance_scale, model.sampling) == (1.0, Sampling(solver=solver, eta=eta, num_inference_steps=4))
        assert from_diffusers(pipeline, guidance_scale=2.0).guidance_scale == 2.0
    assert from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)).guidance_scale == 7.5


def test_a_latent_consistency_model(tmp_path: Path) -> None:
    """In its only step without noise, that of its own pipeline, at two scales; and its files are read back."""
    parts = tiny_pipeline("stable-diffusion", tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = type(parts.unet).from_config(parts.unet.config, time_cond_proj_dim=8)
    pipeline = diffusers.LatentConsistencyModelPipeline(
        parts.vae, parts.text_encoder, parts.tokenizer, unet, diffusers.LCMScheduler(**LCM), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "lcm")
    model = from_diffusers(tmp_path / "lcm", height=16, width=16)
    assert (model.guidance_scale, model.sampling.solver) == (8.5, "consistency")
    latents = torch.randn(1, *model.event_shape, generator=torch.Generator().manual_seed(0))
    one, drawn = Sampling(solver="consistency", num_inference_steps=1), []
    for scale in (8.5, 2.0):
        theirs = model.pipeline("a red cat", 16, 16, 1, latents=latents, guidance_scale=scale, output_type="latent").images
        drawn.append(model.sample_latents(["a red cat"], sampling=one, latents=latents, guidance_scale=scale))
        assert (drawn[-1] - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert not torch.allclose(*drawn, atol=1e-3)


@pytest.mark.filterwarnings("ignore:EulerAncestralDiscreteScheduler", "ignore:TCDScheduler")
@pytest.mark.parametrize(
    ("name", "solver", "said"),
    [
        ("Turbo", "ddpm", "of the same law"),
        pytest.param("Turbo", "memoryless", "which diffusers does not have", marks=pytest.mark.slow),
        pytest.param("TCD", "tcd", "of the same law", marks=pytest.mark.slow),
    ],
)
def test_an_export_comes_with_the_scheduler_whose_steps_were_taken(name: str, solver: str, said: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.scheduler = SIGNS[name][1]
    pipeline.save_pretrained(tmp_path / "stable-diffusion")
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["evaluation"]["points"] = [{"num_inference_steps": 2, "solver": solver, "eta": 0.3, "guidance_scale": 1}]
    tree["training"] |= {"max_train_steps": 1, "guidance_mode": "none"}
    tree["model"]["guidance_scale"] = 1.0
    summary = train(tree, tmp_path / "run")
    assert any("no velocity field whose ODE or SDE samples its law" in limit for limit in summary["limits"])
    export_run(tmp_path / "run", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f'{type(SIGNS[name][1]).__name__}.from_pretrained(".", subfolder="scheduler")' in card
    assert ('"eta": 0.3' in card) == (name == "TCD")
    assert said in card


@pytest.mark.parametrize(("steps", "scale", "said"), [(8, 1.0, True), (9, 1.0, False), (8, 1.5, False)])
def test_trailing_timesteps_are_a_sign_of_few_steps_without_guidance_alone(
    steps: int, scale: float, said: bool, tmp_path: Path
) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**TURBO)
    sampling = Sampling(solver="euler", num_inference_steps=steps)
    assert bool(few_steps_in_words(pipeline, families()["StableDiffusionPipeline"], scale, sampling)) == said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:SCMScheduler")
@pytest.mark.parametrize("method", ["adjoint-matching", "score-as-action", "orw-cfm-w2"])
def test_sana_sprint_is_tuned_and_exported(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own solver; in its only step without noise the code of the card draws what we draw."""
    tiny_pipeline("sana-sprint", tmp_path).save_pretrained(tmp_path / "sana-sprint")
    tree = recipe_for(tmp_path, "sana-sprint", method)
    tree["model"] |= {"height": 32, "width": 32}
    tree["method"] |= {"num_inference_steps": 3} | ({} if method == "orw-cfm-w2" else {"solver": "consistency"})
    tree["training"] |= {"guidance_mode": "none"}
    tree["evaluation"]["points"] = [{"num_inference_steps": 1, "solver": "consistency"}]
    summary = train(tree, tmp_path / "run")
    assert summary["iterations"] == 3
    assert any("no velocity field whose ODE or SDE samples its law" in limit for limit in summary["limits"])
    export_run(tmp_path / "run", tmp_path / "exported")
    monkeypatch.chdir(tmp_path / "exported")
    said = dict[str, Any]()
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], said)
    assert said["sampling"]["intermediate_timesteps"] is None
    tuned = tiltflow.load_text_to_image(tmp_path / "run")
    latents = torch.randn(1, *tuned.event_shape, generator=torch.Generator().manual_seed(0))
    theirs = said["pipeline"]("a red cat", latents=latents.clone(), output_type="pt", **said["sampling"]).images
    ours = tuned.sample(["a red cat"], sampling=Sampling(solver="consistency", num_inference_steps=1), latents=latents)
    assert (ours.clamp(-1, 1) - (2 * theirs - 1)).abs().max() < 1e-4
