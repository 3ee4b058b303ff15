"""Pictures in the own steps of a scheduler of diffusers: as a plain pipeline draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
import diffusers
from test_run_text_to_image import recipe_for, train
from tiny_pipelines import PIPELINES, STABLE_DIFFUSION, tiny_pipeline

from tiltflow import Evaluation, from_diffusers
from tiltflow.errors import InputError
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.models.text_to_image import TextToImage, with_adapter
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream

pytestmark = pytest.mark.filterwarnings("ignore::tiltflow.errors.Note")  # that our sampler takes other steps
PROMPTS = ["a red cat", "two dogs on a sofa", "a red cat"]
CHANGED = {"beta_start": 0.002, "beta_end": 0.009, "timestep_spacing": "trailing", "set_alpha_to_one": True}


def by(name: str, steps: int = 5, **options: Any) -> Sampling:
    return Sampling(scheduler=name, num_inference_steps=steps, **options)


def latents_of(model: TextToImage) -> Tensor:
    return torch.randn(3, *model.event_shape, generator=stream(0, "latents"))


def drawn(model: TextToImage, sampling: Sampling, latents: Tensor | None = None, **options: Any) -> Tensor:
    return model.sample_latents(PROMPTS, sampling=sampling, latents=latents, **options)


def theirs(model: TextToImage, latents: Tensor, steps: int, **options: Any) -> Tensor:
    """What the pipeline draws in one call; its steps draw their noise from the generator that ours have."""
    options = dict(zip(("height", "width"), model.size, strict=True)) | dict(model.family.call) | options
    generator = stream(0, "sample", 0)
    found: Tensor = model.pipeline(
        PROMPTS, num_inference_steps=steps, latents=latents.clone(), generator=generator, output_type="latent", **options
    ).images
    return found


def close(ours: Tensor, plain: Tensor) -> bool:
    return bool((ours - plain).abs().max() < 1e-4 * plain.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelines_own_scheduler(name: str, tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline(name, tmp_path))
    latents = latents_of(model)
    ours = drawn(model, by("default"), latents, guidance_scale=5.0, batch_size=3)
    assert close(ours, theirs(model, latents, 5, guidance_scale=5.0))


@pytest.mark.parametrize(
    ("name", "eta"),
    [
        ("default", 0.0),
        ("EulerAncestralDiscreteScheduler", 0.0),
        *(
            pytest.param(name, eta, marks=pytest.mark.slow)
            for name, eta in (
                ("DDIMScheduler", 0.0),
                ("DDIMScheduler", 1.0),
                ("DDPMScheduler", 0.0),
                ("DPMSolverMultistepScheduler", 0.0),
                ("UniPCMultistepScheduler", 0.0),
                ("HeunDiscreteScheduler", 0.0),
            )
        ),
    ],
)
def test_a_scheduler_takes_its_own_steps(name: str, eta: float, tmp_path: Path) -> None:
    """With its noise and orders, and the pipeline's betas, whatever the recipe changes in the scheduler that training follows.
    The pipeline's is that of the published one of Stable Diffusion 1.5."""
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.scheduler = diffusers.PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    source = {"diffusers": str(tmp_path / "pipeline"), "scheduler": CHANGED, "height": 16, "width": 16}
    model = Diffusers.model_validate(source).load("cpu")
    latents, options = latents_of(model), {"eta": eta} if eta else {}
    ours = drawn(model, by(name, **options), latents, batch_size=3)
    before, config = model.pipeline.scheduler, diffusers.PNDMScheduler.load_config(tmp_path / "pipeline" / "scheduler")
    with model.encoder.encoders.whole() as whole:
        whole.scheduler = getattr(diffusers, name if name != "default" else "PNDMScheduler").from_config(config)
        assert close(ours, theirs(model, latents, 5, eta=eta))
        whole.scheduler = before
    assert not close(ours, drawn(model, Sampling(solver="euler", num_inference_steps=5), latents))


@pytest.mark.slow
def test_a_flow_in_steps_of_a_higher_order(tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("sana", tmp_path))
    own, latents = model.pipeline.scheduler, latents_of(model)
    assert own.config.solver_order == 1
    model.pipeline.scheduler = type(own).from_config(own.config, solver_order=2)
    changed = from_diffusers(model.pipeline)
    ours = drawn(changed, by("default"), latents, batch_size=3)
    assert close(ours, theirs(changed, latents, 5, guidance_scale=changed.guidance_scale))
    assert not close(ours, drawn(model, by("default"), latents, batch_size=3))


def test_base_and_tuned_have_the_same_noise(tmp_path: Path) -> None:
    """Of the latents and of the steps: a fresh adapter changes nothing, a trained one does, in the tuned pictures alone."""
    tuned = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)))
    base, sampling = tuned.base(), by("EulerAncestralDiscreteScheduler", 3)
    before = drawn(base, sampling, seed=3)
    assert torch.equal(drawn(tuned, sampling, seed=3), before)
    with torch.no_grad():
        for parameter in tuned.flow.parameters():  # type: ignore[union-attr]
            parameter.add_(0.3)
    assert torch.equal(drawn(base, sampling, seed=3), before)
    assert not close(drawn(tuned, sampling, seed=3), before)
    assert not close(drawn(base, sampling, seed=4), before)


@pytest.mark.slow
def test_the_half_of_a_table_under_the_default_scheduler(tmp_path: Path) -> None:
    points = [{"num_inference_steps": 3}, {"scheduler": "default", "num_inference_steps": 3}]
    points += [{"scheduler": "UniPCMultistepScheduler", "num_inference_steps": 4}, {"scheduler": "DDIMScheduler", "eta": 1.0}]
    tree = recipe_for(tmp_path, "stable-diffusion", evaluation={"num_prompts": 1, "num_generations": 2, "points": points})
    tree["evaluation"]["points"][-1]["num_inference_steps"] = 3
    tree["training"]["max_train_steps"] = 1
    tree["model"]["scheduler"] = CHANGED
    table = train(tree, tmp_path / "run")["table"]
    assert [row["solver"] for row in table[::2]] == ["euler", "DDIMScheduler", "UniPCMultistepScheduler", "DDIMScheduler"]
    assert [row["eta"] for row in table[::2]] == [1.0, 0.0, 0.0, 1.0]
    assert len({row["named-colour"] for row in table[::2]}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "PNDMSchedulr"}, "diffusers has no 'PNDMSchedulr', did you mean 'PNDMScheduler'"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "is not for a model of DDIMScheduler"),
        ({"scheduler": "DPMSolverMultistepScheduler", "eta": 0.5}, "takes no eta"),
        ({"scheduler": "default", "num_inference_steps": 2000}, "num_inference_steps 2000: DDIMScheduler refuses it"),
        ({"scheduler": "default", "solver": "heun"}, "a scheduler takes its own steps; leave solver out"),
        ({"scheduler": "default", "shift": 2.0}, "leave shift out"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path))
    with pytest.raises(InputError, match=message):
        drawn(model, Sampling(**{"num_inference_steps": 2, **options}))


def test_where_there_is_none() -> None:
    with pytest.raises(InputError, match="only pipelines of diffusers have one"):
        by("default").times()
    with pytest.raises(InputError, match="the first one is that of a solver"):
        Evaluation(points=({"scheduler": "default"},)).for_prompts()  # type: ignore[arg-type]
