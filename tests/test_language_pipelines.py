"""Pipelines whose prompts a language model reads, and are as long as they are, against diffusers itself: their pictures, the
methods, and what is exported."""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from test_run_text_to_image import recipe_for, slow_unless, train
from test_text_to_image import euler, latents_of
from tiny_language_pipelines import LANGUAGE_PIPELINES, tiny_language_pipeline

import tiltflow
from tiltflow import from_diffusers, load_text_to_image
from tiltflow.conditions import Item
from tiltflow.errors import InputError, Note
from tiltflow.flows.guided import Guided
from tiltflow.models.pipelines.flux_2 import Flux2
from tiltflow.models.text_to_image import TextToImage
from tiltflow.runs.doctor.sampler import difference_to_pipeline
from tiltflow.runs.export import export_run
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.draw import batches

SHORT, LONG = "a red cat", "two blue dogs on a sofa beside a window"
SIZES = [(16, 16), (16, 32)]

LENGTHS = {"flux-2": 256, "flux-2-klein": 64, "flux-2-klein, distilled": 64}
"""Tokens of a prompt, with what the pipeline writes around it, where all prompts are made as long as the longest could be."""

pipeline_of = cache(tiny_language_pipeline)


def model_of(name: str, pipeline: Any = None, size: tuple[int, int] = (16, 16)) -> TextToImage:
    return from_diffusers(pipeline or pipeline_of(name), height=size[0], width=size[1], max_sequence_length=LENGTHS.get(name))


def theirs(model: TextToImage, prompts: list[str], latents: Tensor, scale: float, output: str) -> Tensor:
    """What the pipeline itself draws in four steps, asked as an export asks it."""
    encoding = {k: [v] * len(prompts) if isinstance(v, str) else v for k, v in model.encoding.items()}
    images: Tensor = model.pipeline(
        prompt=list(prompts), latents=latents.clone(), num_inference_steps=4, output_type=output, height=model.size[0],
        width=model.size[1], **model.family.guided_by(scale), **encoding,
    ).images  # fmt: skip
    return images


def ours(model: TextToImage, prompts: list[str], latents: Tensor, scale: float) -> Tensor:
    return model.sample_latents(prompts, sampling=euler(4), guidance_scale=scale, latents=latents)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_parity_with_the_pipeline(name: str, size: tuple[int, int]) -> None:
    """With and without guidance, of a batch of prompts of different length, and of each of them alone."""
    model = model_of(name, size=size)
    latents = latents_of(model, 2)
    for scale in (1.0, 4.0):
        drawn = theirs(model, [SHORT, LONG], latents, scale, "latent")
        expected = model.family.returned(model.pipeline, drawn, model.size)
        found = ours(model, [SHORT, LONG], latents, scale)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        images = model.sample([SHORT, LONG], sampling=euler(4), guidance_scale=scale, latents=latents)
        pictures = 2 * theirs(model, [SHORT, LONG], latents, scale, "pt") - 1
        assert (images.clamp(-1, 1) - pictures).abs().max() < 1e-4
        alone = torch.cat([ours(model, [p], x, scale) for p, x in zip([SHORT, LONG], latents.split(1), strict=True)])
        assert (alone - expected).abs().max() < 1e-4 * expected.abs().max()
        other = ours(model, [LONG, SHORT], latents, scale)
        assert (other - expected).abs().amax(tuple(range(1, other.ndim))).min() > 1e-2 * expected.abs().max()
    own = Sampling(scheduler="default", num_inference_steps=4)
    by_its_own = model.sample_latents([SHORT, LONG], sampling=own, guidance_scale=4.0, latents=latents)
    assert (by_its_own - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:prompt .* of its")
@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_settings_of_the_text_encoders(name: str) -> None:
    """What guidance leads away from, and how much of a prompt is seen; as in the pipeline."""
    size, latents = {"height": 16, "width": 16}, latents_of(model_of(name), 2)
    for encoding in ({"negative_prompt": LONG}, {"max_sequence_length": 24}):
        model = from_diffusers(pipeline_of(name), **size, **encoding)
        expected = model.family.returned(model.pipeline, theirs(model, [SHORT, LONG], latents, 4.0, "latent"), model.size)
        found = ours(model, [SHORT, LONG], latents, 4.0)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (found - ours(model_of(name), [SHORT, LONG], latents, 4.0)).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_a_prompt_is_kept_alone_and_padded_in_a_batch(name: str) -> None:
    """Its velocity does not depend on the prompts beside it, and its own length is what is kept."""
    model = model_of(name)
    x, t = latents_of(model, 2), torch.tensor(0.3)
    guided = model.guided([SHORT, LONG], 4.0)(model.flow)
    together = guided(x, t)
    assert isinstance(guided, Guided) != model.distilled
    for i, prompt in enumerate((SHORT, LONG)):
        alone = model.guided([prompt], 4.0)(model.flow)
        assert (alone(x[i : i + 1], t) - together[i]).abs().max() < 1e-4 * together.abs().max()
        assert alone.name_of(0) == guided.name_of(i)
        assert torch.allclose(guided.select(slice(i, i + 1))(x[i : i + 1], t), together[i], rtol=1e-4, atol=1e-4)
    kept = [next(iter(model.encoder.cache[prompt][0].values())) for prompt in (SHORT, LONG)]
    assert kept[1].shape[1] - kept[0].shape[1] == (0 if name in LENGTHS else len(LONG) - len(SHORT))


METHODS: dict[str, Any] = {
    "adjoint-matching": tiltflow.AdjointMatching(num_inference_steps=3),
    "score-as-action": tiltflow.ScoreAsAction(num_inference_steps=3, estimator="return-minus-value"),
    "orw-cfm-w2": tiltflow.OrwCfmW2(num_inference_steps=3, min_effective_sample_size=1),
}


ALIKE = ("flux-2", "flux-2-klein, distilled")
"""Their states, and what they do with them, are those of flux-2-klein."""
EVERY = [
    pytest.param(name, method, marks=slow_unless(method == "adjoint-matching" or name not in ALIKE))
    for name in LANGUAGE_PIPELINES
    for method in METHODS
]


@pytest.mark.filterwarnings("ignore:a Flux2KleinPipeline without guidance")
@pytest.mark.parametrize(("name", "method"), EVERY)
def test_every_method_and_what_plain_diffusers_draws_of_it(name: str, method: str, tmp_path: Path) -> None:
    """Two updates, of Score as Action with its critic; then the LoRA in the pipeline's own hands, which draws what we do."""
    model, rows = model_of(name, tiny_language_pipeline(name)), list[Any]()
    mode = "none" if model.distilled else "rollout"
    training = tiltflow.Training(max_train_steps=2, prompts_per_step=2, num_generations=2, guidance_mode=mode)  # type: ignore[arg-type]
    tuned = tiltflow.tune(
        model, lambda images: images.mean((1, 2, 3)), METHODS[method], training,
        optimizer=tiltflow.Optimizer(learning_rate=1e-2, lr_warmup_steps=0), conditions=[SHORT, LONG],
        adapter=tiltflow.Adapter(rank=2), callbacks=[rows.append],
    )  # fmt: skip
    assert [row.step for row in rows] == [1, 2]
    assert all(("critic_loss" in row.metrics) == (method == "score-as-action") for row in rows)
    tuned.save(tmp_path / "lora")
    plain, latents = model_of(name, tiny_language_pipeline(name)), latents_of(tuned, 1)
    before = theirs(plain, [LONG], latents, 4.0, "pt")
    plain.pipeline.load_lora_weights(tmp_path / "lora")
    after = theirs(plain, [LONG], latents, 4.0, "pt")
    drawn = tuned.sample([LONG], sampling=euler(4), guidance_scale=4.0 if tuned.takes_guidance else None, latents=latents)
    assert (drawn.clamp(-1, 1) - (2 * after - 1)).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a Flux2KleinPipeline without guidance")
@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_a_run_and_its_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe; the code of its card draws in plain diffusers what the run measured."""
    pipeline_of(name).save_pretrained(tmp_path / name)
    tree, model = recipe_for(tmp_path, name), model_of(name)
    tree["model"] |= {"max_sequence_length": LENGTHS.get(name)}
    tree["prompts"] = {"texts": [SHORT, LONG, "a green x"], "validation": 0.34}
    tree["evaluation"] = {"num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 2, "guidance_scale": 2.5}]}
    if model.distilled:
        tree["training"]["guidance_mode"] = "none"
    if not model.takes_guidance:
        del tree["model"]["guidance_scale"], tree["evaluation"]["points"][0]["guidance_scale"]
    summary = train(tree, tmp_path / "run")
    assert summary["reward_tuned"] != summary["reward_base"]
    export_run(tmp_path / "run", tmp_path / "exported")
    tuned = load_text_to_image(tmp_path / "run")
    latents, said = latents_of(tuned, 1), dict[str, Any]()
    monkeypatch.chdir(tmp_path / "exported")
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code, said)
    assert said["image"].size == (16, 16)
    pictures = said["pipeline"](prompt=LONG, latents=latents.clone(), output_type="pt", **said["sampling"]).images
    drawn = tuned.sample([LONG], sampling=euler(2), latents=latents)
    assert (drawn.clamp(-1, 1) - (2 * pictures - 1)).abs().max() < 1e-4


@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_a_prompt_that_is_too_long_with_what_is_written_around_it(name: str) -> None:
    """One of as many tokens as are seen does not warn, and one of one more does; what is kept has as many."""
    pipeline = pipeline_of(name)
    most = len(pipeline.tokenizer(from_diffusers(pipeline, height=16, width=16).family.written(pipeline, LONG)).input_ids)
    for length, said in ((most, nullcontext()), (most - 1, pytest.warns(Note, match=f"{most - 1} of its {most} tokens"))):
        model = from_diffusers(pipeline, height=16, width=16, max_sequence_length=length)
        with said:
            model.encode([LONG])
        assert next(iter(model.encoder.cache[LONG][0].values())).shape[1] == length


def test_a_processor_of_pictures_needs_a_package(tmp_path: Path) -> None:
    """FLUX.2-dev's own, which tokenizes too: one line, before more than the index is read."""
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    parts = {name: ["diffusers", "x"] for name in ("scheduler", "transformer", "vae")}
    texts = {
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "PixtralProcessor"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline", **parts, **texts}))
    for name in (*parts, *texts):
        (tmp_path / name).mkdir()
    said = r"its tokenizer, PixtralProcessor, needs torchvision: pip install torchvision$"
    with pytest.raises(InputError, match=said):
        from_diffusers(tmp_path)


def test_training_is_guided_as_pictures_are() -> None:
    """With the norm kept, where the family keeps it."""
    model = model_of("qwen-image")
    training = tiltflow.Training(prompts_per_step=1, num_generations=2, guidance_mode="rollout")
    draw = batches(model, [Item(LONG)], torch.mean, METHODS["adjoint-matching"], training.for_prompts())
    batch, t = draw(stream(0, "batch")), torch.tensor(0.4)
    assert batch.guide is not None
    guided, expected = batch.guide(batch.bind(model.flow)), model.guided([LONG, LONG])(model.flow)
    v = batch.bind(model.flow)(batch.x, t)
    assert torch.allclose(guided(batch.x, t), expected(batch.x, t), rtol=1e-4, atol=1e-5)
    assert torch.allclose(guided(batch.x, t).norm(dim=-1), v.norm(dim=-1), rtol=1e-4)
    assert not torch.allclose(guided(batch.x, t), v, atol=1e-2)


@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_the_doctor_compares_with_the_pipeline(name: str) -> None:
    """From its latents, whatever their form, at the guidance of the model, whatever its name."""
    assert difference_to_pipeline(model_of(name)) < 1e-5


def test_the_shift_of_flux_2() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for tokens in (16, 1024, 4096, 4300, 4301, 16384):
        for steps in (4, 10, 28, 200):
            assert Flux2().shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Masks stay what they are, and velocities are near those of float32, at a time of 16 bits: the networks round it."""
    exact, half = model_of(name), model_of(name, tiny_language_pipeline(name).to(dtype))
    x, t = latents_of(exact, 2), torch.tensor(0.5)
    v, near = (model.flow.bind(model.encode([SHORT, LONG])[0])(x, t) for model in (exact, half))
    assert near.dtype == torch.float32
    assert (near - v).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * v.norm()


@pytest.mark.parametrize("name", LANGUAGE_PIPELINES)
def test_decoding_has_its_gradient(name: str) -> None:
    """In parts, whose activations are computed again, as in one."""
    model = model_of(name)
    gradients = []
    for size in (2, 1):
        latents = latents_of(model, 2).requires_grad_()
        model.decode(latents, batch_size=size).square().sum().backward()
        assert latents.grad is not None
        gradients.append(latents.grad)
    assert gradients[0].abs().amax(tuple(range(1, gradients[0].ndim))).min() > 0
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)
