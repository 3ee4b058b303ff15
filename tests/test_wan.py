"""Videos: Wan against diffusers itself, its videos, the methods, and what is exported."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from test_run_text_to_image import train
from test_text_to_image import euler, latents_of
from tiny_pipelines import tiny_pipeline
from tiny_scorers import tiny_clip
from tiny_videos import FLOW, wan
from typer.testing import CliRunner

import tiltflow
from tiltflow import from_diffusers, load_text_to_image
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError, Note
from tiltflow.evaluation.monitor import read_looks
from tiltflow.models.text_to_image import TextToImage
from tiltflow.runs.doctor.sampler import difference_to_pipeline
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import shipped_recipes
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import read_yaml

SHORT, LONG = "a red cat", "two blue dogs on a sofa beside a window"
SIZES = [(16, 16, 5), (16, 32, 3)]

pipeline_of = cache(wan)


def model_of(pipeline: Any = None, size: tuple[int, int, int] = SIZES[0]) -> TextToImage:
    return from_diffusers(pipeline or pipeline_of(), height=size[0], width=size[1], num_frames=size[2])


def theirs(model: TextToImage, prompts: list[str], latents: Tensor, scale: float, output: str) -> Tensor:
    """What the pipeline itself draws in four steps, asked as an export asks it."""
    frames: Tensor = model.pipeline(
        prompts, latents=latents.clone(), num_inference_steps=4, guidance_scale=scale, output_type=output, **model.size_options
    ).frames
    return frames


@pytest.mark.parametrize(
    "options", [pytest.param({}, id="2.1"), pytest.param({"ti2v": True}, id="2.2-TI2V-5B", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("size", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
def test_parity_with_the_pipeline(size: tuple[int, int, int], options: dict[str, Any]) -> None:
    """With and without guidance, of a batch of prompts of different length, and of each of them alone."""
    height, width, frames = size
    model = model_of(pipeline_of(**options), (2 * height, 2 * width, frames) if options else size)
    latents = latents_of(model, 2)
    for scale in (1.0, 5.0):
        expected = theirs(model, [SHORT, LONG], latents, scale, "latent")
        found = model.sample_latents([SHORT, LONG], sampling=euler(4), guidance_scale=scale, latents=latents)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        other = model.sample_latents([LONG, SHORT], sampling=euler(4), guidance_scale=scale, latents=latents)
        assert (other - expected).abs().amax((1, 2, 3, 4)).min() > 1e-2 * expected.abs().max()
    videos = model.sample([SHORT, LONG], sampling=euler(4), guidance_scale=5.0, latents=latents)
    assert videos.shape == (2, *model.sample_shape) == (2, frames, 3, *model.size)
    pictures = 2 * theirs(model, [SHORT, LONG], latents, 5.0, "pt") - 1
    assert (videos.clamp(-1, 1) - pictures).abs().max() < 1e-4
    assert (videos[:, 0] - videos[:, -1]).abs().max() > 1e-2
    alone = [model.sample([p], sampling=euler(4), latents=x) for p, x in zip([SHORT, LONG], latents.split(1), strict=True)]
    assert (torch.cat(alone) - videos).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:prompt .* of its")
def test_settings_of_the_text_encoders() -> None:
    """What guidance leads away from, and how much of a prompt is seen; as in the pipeline."""
    height, width, frames = SIZES[0]
    options: dict[str, Any] = {"negative_prompt": "blurred", "max_sequence_length": 8}
    model = from_diffusers(pipeline_of(), height=height, width=width, num_frames=frames, **options)
    latents = latents_of(model, 2)
    frames_of = model.pipeline(
        [SHORT, LONG], latents=latents.clone(), num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        **model.size_options, **options,
    ).frames  # fmt: skip
    found, other = (
        one.sample_latents([SHORT, LONG], sampling=euler(4), guidance_scale=5.0, latents=latents) for one in (model, model_of())
    )
    assert (found - frames_of).abs().max() < 1e-4 * frames_of.abs().max()
    assert (found - other).abs().max() > 1e-3 * frames_of.abs().max()


def test_the_schedulers_of_wan() -> None:
    """Its own is of the second order and draws others than our steps, which is said, and which a sampling point can have; the
    one of Euler's method draws ours."""
    with pytest.warns(Note, match="UniPCMultistepScheduler.* draws other latents than our sampler"):
        second = model_of(wan(UniPCMultistepScheduler(**FLOW)))
    first = model_of(wan(FlowMatchEulerDiscreteScheduler(shift=5.0)))
    for model, sampling in ((second, Sampling(scheduler="default", num_inference_steps=4)), (first, euler(4))):
        latents = latents_of(model, 1)
        expected = theirs(model, [LONG], latents, 5.0, "latent")
        found = model.sample_latents([LONG], sampling=sampling, latents=latents)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_doctor_compares_with_the_pipeline() -> None:
    assert difference_to_pipeline(model_of()) < 1e-5  # type: ignore[operator]


def test_the_number_of_frames(tmp_path: Path) -> None:
    for wrong in (4, 0):
        with pytest.raises(InputError, match=f"num_frames {wrong}: must be a multiple of 2 and 1 more, such as .* or"):
            model_of(size=(16, 16, wrong))
    assert model_of(size=(16, 16, 1)).event_shape == (4, 1, 2, 2)
    own = from_diffusers(pipeline_of())
    assert own.sample_shape == (81, 3, 480, 832)
    with pytest.raises(InputError, match="num_frames: pipeline StableDiffusionPipeline draws pictures; leave it out"):
        from_diffusers(tiny_pipeline("stable-diffusion", tmp_path), num_frames=5)


def test_two_transformers_are_refused_before_their_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": None}
    monkeypatch.setattr("diffusers.WanPipeline.from_pretrained", lambda *rest, **options: pytest.fail("it was read"))
    for more in ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, {"boundary_ratio": 0.875}):
        (tmp_path / "model_index.json").write_text(json.dumps(index | more))
        with pytest.raises(InputError, match=r"WanPipeline: has a second transformer.*as Wan 2.2-A14B; supported are"):
            from_diffusers(tmp_path)
    with pytest.raises(InputError, match="has a second transformer"):
        from_diffusers(wan(transformer_2=pipeline_of().transformer))


def test_decoding_has_its_gradient() -> None:
    """In parts, whose activations are computed again, as in one: every frame of the latents has one."""
    model, gradients = model_of(), []
    for size in (2, 1):
        latents = latents_of(model, 2).requires_grad_()
        model.decode(latents, batch_size=size).square().sum().backward()
        assert latents.grad is not None
        gradients.append(latents.grad)
    assert gradients[0].abs().amax((1, 3, 4)).min() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


METHODS: dict[str, Any] = {
    "adjoint-matching": tiltflow.AdjointMatching(num_inference_steps=3),
    "score-as-action": tiltflow.ScoreAsAction(num_inference_steps=3, estimator="return-minus-value"),
    "orw-cfm-w2": tiltflow.OrwCfmW2(num_inference_steps=3, min_effective_sample_size=1),
    "tilt-matching": tiltflow.TiltMatching(num_inference_steps=3, min_effective_sample_size=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_what_plain_diffusers_draws_of_it(method: str, whole: bool, tmp_path: Path) -> None:
    """Three updates, of Score as Action with its critic; then the pipeline's own videos, which are ours."""
    model, rows = model_of(wan()), list[Any]()
    tuned = tiltflow.tune(
        model, lambda videos: videos.mean((1, 2, 3, 4)), METHODS[method],
        tiltflow.Training(max_train_steps=3, prompts_per_step=2, num_generations=2, guidance_mode="rollout"),
        optimizer=tiltflow.Optimizer(learning_rate=1e-2, lr_warmup_steps=0), conditions=[SHORT, LONG],
        adapter=None if whole else tiltflow.Adapter(rank=2), callbacks=[rows.append],
    )  # fmt: skip
    assert [row.step for row in rows] == [1, 2, 3]
    assert all(("critic_loss" in row.metrics) == (method == "score-as-action") for row in rows)
    tuned.save(tmp_path)
    plain, latents = model_of(wan()), latents_of(tuned, 1)
    before = theirs(plain, [LONG], latents, 5.0, "pt")
    if whole:
        plain.pipeline.transformer = type(plain.pipeline.transformer).from_pretrained(tmp_path / "transformer")
    else:
        plain.pipeline.load_lora_weights(tmp_path)
    after = theirs(plain, [LONG], latents, 5.0, "pt")
    drawn = tuned.sample([LONG], sampling=euler(4), latents=latents)
    assert (drawn.clamp(-1, 1) - (2 * after - 1)).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-3


def first_frames(videos: Tensor) -> Tensor:
    """Features of the user, of whole videos."""
    return videos[:, 0].flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
def test_a_run_and_its_export(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe, with a reward of pictures, features and looks; the code of its card draws in plain diffusers what the run
    measured; and files of samples."""
    wan().save_pretrained(tmp_path / "wan")
    tree = {
        "model": {
            "diffusers": str(tmp_path / "wan"), "height": 16, "width": 16, "num_frames": 5,
            "adapter": None if whole else {"rank": 2},
        },
        "prompts": {"texts": ["a red cat", "a blue dog", "a green hat"], "validation": 0.34},
        "reward": "named-colour",
        "method": {"name": "adjoint-matching", "num_inference_steps": 3},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_train_steps": 3, "prompts_per_step": 2, "num_generations": 2, "monitor": {"steps": 2}},
        "evaluation": {
            "num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 2}], "rewards": ["png-size"],
            "features": "test_wan:first_frames", "reference": "base",
        },
    }  # fmt: skip
    summary = train(tree, tmp_path / "run")
    assert summary["reward_tuned"] != summary["reward_base"]
    assert {**summary["pictures"], "rewards": None} == {
        "rows": 1, "prompts": summary["pictures"]["prompts"], "frames": 5, "columns": 1, "rewards": None,
    }  # fmt: skip
    assert all(row["fid"] > 0 and row["png-size"] < 0 for row in summary["table"])
    assert "fid_per_prompt" not in summary["table"][0]  # there is one prompt
    assert "data:image/gif" in (tmp_path / "run" / "report.html").read_text()
    export_run(tmp_path / "run", tmp_path / "exported")
    assert (tmp_path / "exported" / "before.gif").exists()
    tuned = load_text_to_image(tmp_path / "run")
    latents, said = latents_of(tuned, 1), dict[str, Any]()
    monkeypatch.chdir(tmp_path / "exported")
    card = Path("README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0], said)
    assert said["frames"].shape == (5, 16, 16, 3)
    assert "(before.gif)" in card
    videos = said["pipeline"](prompt=LONG, latents=latents.clone(), output_type="pt", **said["sampling"]).frames
    drawn = tuned.sample([LONG], sampling=euler(2), latents=latents)
    assert (drawn.clamp(-1, 1) - (2 * videos - 1)).abs().max() < 1e-4
    for name in ("x.gif", "x.png"):
        arguments = ["sample", str(tmp_path / "run"), "--prompt", LONG, "-n", "2", "--num-inference-steps", "2", "-o", name]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert "2 videos in" in result.output
    with Image.open("x.gif") as gif, Image.open("x.png") as png:
        assert gif.n_frames == 5  # type: ignore[attr-defined]
        assert png.width / png.height > 2  # 2 rows of 5 frames


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scheduler UniPCMultistepScheduler.*draws other latents")
def test_the_recipe_runs_on_a_small_pipeline(tmp_path: Path) -> None:
    """And says that its settings are guesses."""
    path = shipped_recipes("train")["wan-clip-score"]
    assert "# Guesses: everything else." in path.read_text()
    tree: Any = read_yaml(path)
    wan(UniPCMultistepScheduler(**FLOW)).save_pretrained(tmp_path / "wan")
    clip = str(tiny_clip(tmp_path))
    tree["model"] |= {"diffusers": str(tmp_path / "wan"), "height": 16, "width": 16, "num_frames": 5, "dtype": "float32"}
    tree["reward"] = {"name": "clip-score", "model": clip}
    tree["method"] |= {"num_inference_steps": 3, "num_passes": 2, "regression_batch_size": 2}
    tree["training"] |= {"max_train_steps": 8, "monitor": {"steps": 4}}
    tree["evaluation"] |= {"num_generations": 2, "features": clip}
    tree["evaluation"]["rewards"] = [{"name": "pick-score", "model": clip, "tokenizer": None}]
    tree["evaluation"]["points"] = [{**point, "num_inference_steps": 2} for point in tree["evaluation"]["points"]]
    summary = train(tree, tmp_path / "run")
    assert summary["iterations"] == 8
    assert {"variance", "vendi", "clip-score", "pick-score"} <= set(summary["table"][0])
    assert summary["pictures"]["rows"] == 2
    looked_at = {"reward", "pick-score", "variety", "edge energy", "colour entropy", "motion"}
    assert set(read_looks(tmp_path / "run")[-1]["measures"]) == looked_at


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Velocities are near those of float32, at a time of 16 bits: the networks round it."""
    exact, half = model_of(), model_of(wan().to(dtype))
    x, t = latents_of(exact, 2), torch.tensor(0.5)
    v, near = (model.flow.bind(model.encode([SHORT, LONG])[0])(x, t) for model in (exact, half))
    assert near.dtype == torch.float32
    assert (near - v).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * v.norm()
