"""Text-to-image pipelines against diffusers itself, on small pipelines of the real classes with random weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import NEWER, PIPELINES, tiny_pipeline, vae, with_safety_checker

from tiltflow import from_diffusers
from tiltflow.errors import InputError
from tiltflow.flows.adapter import AdapterOff, base_of
from tiltflow.flows.guided import Guided
from tiltflow.flows.linearize import linearize
from tiltflow.models import from_diffusers as constructor
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.pipelines import families
from tiltflow.models.text_to_image import TextToImage, with_adapter
from tiltflow.runs.doctor.sampler import difference_to_pipeline
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.memory import PeakMemory

PROMPTS = ["a red cat", "two dogs on a sofa", "a red cat"]
SLOW_OF_NEWER = [pytest.param(name, marks=[pytest.mark.slow] * (name in NEWER)) for name in PIPELINES]


def latents_of(model: TextToImage, count: int = 3) -> Tensor:
    return torch.randn(count, *model.event_shape, generator=stream(0, "latents"))


def euler(steps: int) -> Sampling:
    return Sampling(solver="euler", num_inference_steps=steps)


def theirs(model: TextToImage, latents: Tensor, steps: int, scale: float, output: str = "latent") -> Tensor:
    """What the pipeline itself draws, called as an export says."""
    options = dict(zip(("height", "width"), model.size, strict=True)) | dict(model.family.call)
    images: Tensor = model.pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=scale, latents=latents.clone(), output_type=output, **options
    ).images
    return images


@pytest.mark.parametrize(("steps", "wide"), [(4, False), (10, True)])
@pytest.mark.parametrize(
    ("name", "scale"),
    [pytest.param(n, s, marks=[pytest.mark.slow] * (s == 1 and n in NEWER)) for n in PIPELINES for s in (1.0, 5.0)],
)
def test_parity_with_the_pipeline(name: str, steps: int, wide: bool, scale: float, tmp_path: Path) -> None:
    """At two sizes, with prompts of different length."""
    pipeline = tiny_pipeline(name, tmp_path)
    model = from_diffusers(pipeline)
    if wide:
        model = from_diffusers(pipeline, width=2 * model.size[1])
    latents = latents_of(model)
    expected = theirs(model, latents, steps, scale)
    found = model.sample_latents(PROMPTS, sampling=euler(steps), guidance_scale=scale, latents=latents)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    images = model.sample(PROMPTS, sampling=euler(steps), guidance_scale=scale, latents=latents, batch_size=2)
    assert (images.clamp(-1, 1) - (2 * theirs(model, latents, steps, scale, "pt") - 1)).abs().max() < 1e-4
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)  # the latents and the prompts matter


@pytest.mark.parametrize("name", [one for one in SLOW_OF_NEWER if one.values != ("flux",)])
def test_guidance_at_and_below_1_is_none(name: str, tmp_path: Path) -> None:
    """As in diffusers: no guidance, not the negative prompt. In flux the scale is an input of the network, 0 too."""
    pipeline = tiny_pipeline(name, tmp_path)
    latents = None
    for scale in (0.0, 0.5, 1.0):
        model = from_diffusers(pipeline, guidance_scale=scale)
        assert model.guidance_scale == scale
        latents = latents_of(model)
        expected = theirs(model, latents, 4, scale)
        for given in (None, scale):  # the model's own, and one that is asked for
            found = model.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=given, latents=latents)
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_guidance_of_0_as_an_input_of_the_network(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("flux", tmp_path)
    model = from_diffusers(pipeline, guidance_scale=0.0)
    latents = latents_of(model)
    expected = theirs(model, latents, 4, 0.0)
    found = model.sample_latents(PROMPTS, sampling=euler(4), latents=latents)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.equal(found, model.sample_latents(PROMPTS, sampling=euler(4), latents=latents, guidance_scale=3.5))


@pytest.mark.parametrize("scale", [-3.0, float("nan"), float("inf")])
def test_guidance_that_cannot_be(scale: float, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    with pytest.raises(InputError, match=r"guidance_scale .*: must be a number from 0 on"):
        from_diffusers(pipeline, guidance_scale=scale)
    with pytest.raises(InputError, match=r"guidance_scale .*: must be a number from 0 on"):
        from_diffusers(pipeline).sample(PROMPTS[:1], sampling=euler(2), guidance_scale=scale)


def test_the_decoder_is_not_rounded(tmp_path: Path) -> None:
    """Not even where everything else is in 16 bits: bfloat16 keeps 8 of the 24 bits of a weight."""
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.save_pretrained(tmp_path / "pipeline")
    for key in ("dtype", "torch_dtype"):
        model = from_diffusers(tmp_path / "pipeline", **{key: torch.bfloat16})
        assert model.pipeline.unet.dtype == model.pipeline.text_encoder.dtype == torch.bfloat16
        for ours, exact in zip(model.pipeline.vae.parameters(), pipeline.vae.parameters(), strict=True):
            assert torch.equal(ours, exact)


def test_each_component_in_its_dtype(tmp_path: Path) -> None:
    """As its file has it, and not rounded to that of the others on the way; again when text encoders come back."""
    pipeline = tiny_pipeline("stable-diffusion-3", tmp_path)
    pipeline.save_pretrained(tmp_path / "pipeline")
    kinds = {"default": torch.bfloat16, "text_encoder_3": torch.float32, "vae": torch.float16}
    model = from_diffusers(tmp_path / "pipeline", dtype=kinds, height=16, width=16)
    expected = {
        "transformer": torch.bfloat16,
        "text_encoder": torch.bfloat16,
        "text_encoder_3": torch.float32,
        "vae": torch.float16,
    }
    for again in range(2):
        for name, dtype in expected.items():
            ours, theirs = getattr(model.pipeline, name), getattr(pipeline, name)
            for one, exact in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.equal(one, exact.to(dtype)), name
        if not again:
            model.encoder.encode_ahead(PROMPTS, model.device)
            model.encode(["new"])
    adapted = with_adapter(model, rank=2)
    assert {p.dtype for p in adapted.denoiser.parameters() if p.requires_grad} == {torch.float32}
    latents = latents_of(model).requires_grad_()
    pictures = adapted.decode(latents)
    assert pictures.dtype == torch.float32
    assert torch.autograd.grad(pictures.sum(), latents)[0].dtype == torch.float32
    assert adapted.sample(PROMPTS[:1], sampling=euler(2)).isfinite().all()
    assert difference_to_pipeline(model) is None
    for wrong, message in (
        ({"vea": torch.float16}, "model.dtype: StableDiffusion3Pipeline has no 'vea', did you mean 'vae'"),
        ("bfloat16", "dtype of default: must be a dtype of torch"),
    ):
        with pytest.raises(InputError, match=message):
            from_diffusers(tmp_path / "pipeline", dtype=wrong)


def test_what_is_not_needed_is_never_loaded(tmp_path: Path) -> None:
    """Nor could be: the weights of a safety checker and an image encoder are deleted."""
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    expected = from_diffusers(pipeline).sample(PROMPTS[:1], sampling=euler(2))
    with_safety_checker(pipeline, tmp_path / "pipeline")
    for name in ("safety_checker", "image_encoder"):
        (tmp_path / "pipeline" / name / "model.safetensors").unlink()
    model = from_diffusers(tmp_path / "pipeline")
    assert {name for name, part in model.pipeline.components.items() if part is None} == {
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    }
    assert not model.pipeline.config.requires_safety_checker  # or diffusers would warn that there is none
    assert (model.sample(PROMPTS[:1], sampling=euler(2)) - expected).abs().max() < 1e-5
    model.pipeline.save_pretrained(tmp_path / "again")  # and loads in plain diffusers
    assert type(pipeline).from_pretrained(tmp_path / "again").safety_checker is None


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
def test_a_unet_that_takes_the_scale_as_an_input(name: str, tmp_path: Path) -> None:
    """As those of latent consistency models do: its embedding is that of the pipeline, and no prompt leads away."""
    pipeline = tiny_pipeline(name, tmp_path)
    torch.manual_seed(0)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=8)
    model = from_diffusers(pipeline, guidance_scale=6.0)
    latents = latents_of(model)
    for scale in (6.0, 1.5):
        found = model.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=scale, latents=latents)
        expected = theirs(model, latents, 4, scale)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(found, model.sample_latents(PROMPTS, sampling=euler(4), latents=latents), atol=1e-3)
    with pytest.raises(InputError, match=r"negative_prompt: .* takes none"):
        from_diffusers(pipeline, negative_prompt="a dog")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stable-diffusion", {"prediction_type": "v_prediction"}),
        (
            "stable-diffusion",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
        ("stable-diffusion", {"set_alpha_to_one": True, "timestep_spacing": "trailing"}),
        ("stable-diffusion-xl", {"prediction_type": "v_prediction"}),
        ("stable-diffusion-3", {"shift": 1.0}),
        ("stable-diffusion-3", {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}),
        ("flux", {"use_dynamic_shifting": False, "shift": 1.0, "guidance_embeds": False}),
        ("lumina2", {"use_dynamic_shifting": True, "shift": 1.0}),
    ],
)
def test_the_scheduler_decides_the_path_and_the_grid(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    pipeline = tiny_pipeline(name, tmp_path, **options)
    model = from_diffusers(pipeline)
    latents = latents_of(model)
    expected = theirs(model, latents, 4, 3.0)
    scale = None if name == "flux" else 3.0
    found = model.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=scale, latents=latents)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:prompt .* of its")  # eight tokens are few
@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("stable-diffusion", {"negative_prompt": "a blue dog"}),
        ("stable-diffusion-xl", {"negative_prompt": "a blue dog"}),
        ("stable-diffusion-3", {"negative_prompt": "a blue dog", "max_sequence_length": 8}),
        ("flux", {"max_sequence_length": 8}),
        ("pixart-sigma", {"negative_prompt": "a blue dog", "max_sequence_length": 8}),
        ("sana", {"negative_prompt": "a blue dog", "max_sequence_length": 8}),
        ("lumina2", {"negative_prompt": "a blue dog", "max_sequence_length": 200}),
    ],
)
def test_settings_of_the_text_encoders(name: str, encoding: dict[str, Any], tmp_path: Path) -> None:
    pipeline = tiny_pipeline(name, tmp_path)
    model, plain = from_diffusers(pipeline, **encoding), from_diffusers(pipeline)
    latents = latents_of(model)
    options = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}
    lists = {key: [value] * len(PROMPTS) if isinstance(value, str) else value for key, value in encoding.items()}
    options |= dict(zip(("height", "width"), model.size, strict=True)) | dict(model.family.call)
    expected = pipeline(PROMPTS, latents=latents.clone(), **options, **lists).images
    found, other = (
        one.sample_latents(PROMPTS, sampling=euler(4), latents=latents, guidance_scale=3.0) for one in (model, plain)
    )
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - other).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "encoding"),
    [("flux", {"negative_prompt": "a blue dog"}), ("stable-diffusion", {"max_sequence_length": 8})],
)
def test_settings_that_the_text_encoders_do_not_have(name: str, encoding: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{next(iter(encoding))}: pipeline .* takes none"):
        from_diffusers(tiny_pipeline(name, tmp_path), **encoding)


def test_weights_that_are_packed_into_bytes() -> None:
    """As bitsandbytes does it: the first parameter is of integers, and the network computes in the dtype of the others."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.tensor([[3, 0], [0, 5]], dtype=torch.uint8), requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(0.25, dtype=torch.bfloat16), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            return x @ (self.scale * self.packed)

    denoiser = Denoiser(Packed(), lambda network, x, time, condition: network(x))
    x = torch.tensor([[0.5, -0.75]])
    assert torch.equal(denoiser(x, torch.zeros(1), {}), torch.tensor([[0.375, -0.9375]]))


def test_the_prompt_and_its_guidance_matter(tmp_path: Path) -> None:
    for name in PIPELINES:
        model = from_diffusers(tiny_pipeline(name, tmp_path))
        latents = latents_of(model, 1).expand(2, *model.event_shape)
        one, other = model.sample_latents(PROMPTS[:2], sampling=euler(4), latents=latents)
        assert (one - other).abs().max() > 1e-3, name
        stronger = model.sample_latents(PROMPTS[:2], sampling=euler(4), latents=latents, guidance_scale=20)
        assert (stronger[0] - one).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_from_disk_is_the_same(name: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(name, tmp_path)
    pipeline.save_pretrained(tmp_path / "pipeline")
    height, width = from_diffusers(pipeline).size
    here, there = (from_diffusers(source, height=height, width=width) for source in (pipeline, tmp_path / "pipeline"))
    for ours, theirs in zip(here.flow.network.parameters(), there.flow.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    a, b = (model.sample(PROMPTS[:1], sampling=euler(2), seed=3) for model in (here, there))
    assert (a - b).abs().max() < 1e-5  # not bit for bit: weights at another place in memory may be summed in another order


def test_grids_end_at_data_where_they_are_tuned(tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path))
    own, tuned = model.own_grid(10), model.grid(10)
    assert torch.equal(own[:-1], tuned[:-1])
    assert own[-1] < tuned[-1] == 1
    # timesteps 901, 801, .. 1 and the first one, whose alpha^2 is 1 - beta_start
    alpha = math.sqrt(1 - 0.00085)
    assert own[-1].item() == pytest.approx(alpha / (alpha + math.sqrt(0.00085)))
    assert "of the data's variance" in Sampling(num_inference_steps=10).limits(model.grid)[0]
    with pytest.raises(InputError, match="its own time grid"):
        Sampling(shift=2.0).times(model.grid)


def test_prompts_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = from_diffusers(tiny_pipeline("stable-diffusion-xl", tmp_path)), []
    original = type(model.pipeline).encode_prompt
    monkeypatch.setattr(
        type(model.pipeline),
        "encode_prompt",
        lambda self, prompt, **rest: asked.append(prompt) or original(self, prompt, **rest),
    )
    condition, _ = model.encode(PROMPTS)
    model.encode([PROMPTS[1], "new"])
    assert asked == [["a red cat"], ["two dogs on a sofa"], ["new"]]
    assert condition["encoder_hidden_states"].shape[0] == condition["added_cond_kwargs"]["time_ids"].shape[0] == 3
    assert torch.equal(condition["encoder_hidden_states"][0], condition["encoder_hidden_states"][2])


def test_the_conditions_of_the_last_prompts_are_kept(tmp_path: Path) -> None:
    """Those that were used last, and the negative one, which all share, though the prompt that it came with is gone."""
    two = 2.5 * 77 * 16 * 4  # bytes: a tiny prompt has 77 tokens of 16 numbers
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path), prompt_cache_gb=two / 2**30)
    first = model.encode(["one", "two", "three"])  # more at once than are kept
    assert list(model.encoder.cache) == ["two", "three"]
    model.encode(["two"])
    model.encode(["four"])
    assert list(model.encoder.cache) == ["two", "four"]
    again = model.encode(["one", "two", "three"])
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before["encoder_hidden_states"], after["encoder_hidden_states"])  # type: ignore[index]


def test_a_prompt_that_is_too_long_warns(tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path))
    with pytest.warns(UserWarning, match="tokenizer takes 77 of its 102 tokens"):
        model.encode(["a" * 100])


def test_a_prompt_that_only_t5_takes_in_full(tmp_path: Path) -> None:
    """CLIP takes 77 tokens, T5 as many as it is told; the tiny ones have one for each letter."""
    pipeline = tiny_pipeline("stable-diffusion-3", tmp_path)
    with pytest.warns(UserWarning, match="tokenizer takes 77 of its 102 tokens, the rest is seen by tokenizer_3 alone"):
        from_diffusers(pipeline).encode(["a" * 100])
    with pytest.warns(UserWarning, match="tokenizer takes 77 of its 102 tokens, the rest is not seen"):
        from_diffusers(pipeline, max_sequence_length=90).encode(["a" * 100])
    pipeline.text_encoder_3 = None
    with pytest.warns(UserWarning, match="the rest is not seen"):
        from_diffusers(pipeline).encode(["a" * 100])


def test_decoding_in_parts_changes_nothing_but_memory(tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("stable-diffusion-3", tmp_path))
    gradients = []
    for size in (3, 1):
        latents = latents_of(model).requires_grad_()
        model.decode(latents, batch_size=size).square().sum().backward()
        gradients.append(latents.grad)
    assert gradients[0].abs().min() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def larger(folder: Path, **options: Any) -> Any:
    """Stable Diffusion with a decoder of four blocks, for pictures of 64 pixels from latents of 8."""
    pipeline = tiny_pipeline("stable-diffusion", folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder = vae(blocks=4, sample_size=32)
    pipeline.save_pretrained(folder / "base")
    decoder.save_pretrained(folder / "vae")
    return from_diffusers(folder / "base", components={"vae": folder / "vae"}, height=64, width=64, **options)


def peak_of_decoding(model: TextToImage, batch_size: int, grad: bool = True) -> tuple[int, Tensor]:
    """Bytes at the peak, and the gradient, or the pictures."""
    latents = latents_of(model, 2).requires_grad_(grad)
    with PeakMemory() as memory, torch.set_grad_enabled(grad):
        pictures = model.decode(latents, batch_size=batch_size)
        found = torch.autograd.grad(pictures.square().sum(), latents)[0] if grad else pictures
    return memory.peak, found


def test_the_decoder_recomputes_its_blocks(tmp_path: Path) -> None:
    """With the same bits, at about half the peak: the four blocks are wide alike, and the last has all pixels."""
    model = larger(tmp_path)
    for batch_size in (2, 1):
        ours, gradient = peak_of_decoding(model, batch_size)
        model.pipeline.vae.disable_gradient_checkpointing()
        before, same = peak_of_decoding(model, batch_size)
        model.pipeline.vae.enable_gradient_checkpointing()
        assert ours < 0.7 * before
        assert torch.equal(gradient, same)


def test_tiles_and_slices_of_the_decoder(tmp_path: Path) -> None:
    """Those of diffusers, with their gradient, in less memory."""
    plain, tiled, sliced = larger(tmp_path), larger(tmp_path, vae_tiling=True), larger(tmp_path, vae_slicing=True)
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae")
    theirs.enable_tiling()
    latents = latents_of(plain, 2)
    with torch.no_grad():
        expected = theirs.decode(latents / theirs.config.scaling_factor).sample
        assert torch.allclose(tiled.decode(latents), expected, atol=1e-5)
        assert not torch.allclose(plain.decode(latents), expected, atol=1e-4)
        assert torch.allclose(sliced.decode(latents), plain.decode(latents), atol=1e-5)
    for grad, most in ((True, 0.7), (False, 0.5)):
        whole, of_plain = peak_of_decoding(plain, 2, grad)
        in_tiles, of_tiles = peak_of_decoding(tiled, 2, grad)
        assert in_tiles < most * whole
        assert of_plain.shape == of_tiles.shape
        assert of_tiles.abs().min() > 0
    assert peak_of_decoding(sliced, 2, grad=False)[0] < 0.6 * peak_of_decoding(plain, 2, grad=False)[0]
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    del pipeline.vae.use_tiling
    with pytest.raises(InputError, match=r"model\.vae_tiling: AutoencoderKL has none"):
        from_diffusers(pipeline, vae_tiling=True)


# ---- adapters ----


@pytest.mark.parametrize("name", SLOW_OF_NEWER)
def test_the_base_is_the_network_without_its_adapter(name: str, tmp_path: Path) -> None:
    """One copy in memory, and its law is that of the pipeline before."""
    model = from_diffusers(tiny_pipeline(name, tmp_path))
    before = model.sample_latents(PROMPTS, sampling=euler(3), latents=latents_of(model))
    weights = {id(p) for p in model.flow.network.parameters()}  # type: ignore[attr-defined]
    adapted = with_adapter(model, rank=4)
    base = base_of(adapted.flow)
    assert isinstance(base, AdapterOff)
    assert base.flow.network is adapted.flow.network
    trained = list(adapted.flow.parameters())
    assert {id(p) for p in adapted.flow.network.parameters()} == weights | {id(p) for p in trained}  # type: ignore[attr-defined]
    assert trained
    assert not weights & {id(p) for p in trained}

    def draw() -> Tensor:
        return adapted.sample_latents(PROMPTS, sampling=euler(3), latents=latents_of(model))

    assert torch.equal(draw(), before)  # a new adapter is nothing
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.5
    assert not torch.allclose(draw(), before, atol=1e-2)
    x, condition = latents_of(model), adapted.encode(PROMPTS)[0]
    assert torch.equal(
        base.bind(condition)(x, torch.tensor(0.5)), model_without(name, tmp_path).bind(condition)(x, torch.tensor(0.5))
    )
    assert not torch.equal(adapted.flow.bind(condition)(x, torch.tensor(0.5)), base.bind(condition)(x, torch.tensor(0.5)))


def model_without(name: str, folder: Path) -> Any:
    return from_diffusers(tiny_pipeline(name, folder)).flow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """A cotangent of 1e-6, which float16 would round to a few of its smallest numbers: the gradients, of the adapter and of the
    latents, are those of float32 to the precision of the weights."""
    found = {}
    for kind in (torch.float32, dtype):
        pipeline = tiny_pipeline("stable-diffusion", tmp_path)
        pipeline.unet.to(kind)
        model = with_adapter(from_diffusers(pipeline, height=16, width=16), rank=2)
        condition, _ = model.encode(["a red cat"])
        x = torch.randn(1, *model.event_shape, generator=stream(0, "x")).requires_grad_()
        v = model.flow.bind(condition)(x, torch.tensor(0.5))
        (1e-6 * v.square()).sum().backward()
        adapter = {name: p.grad for name, p in model.denoiser.named_parameters() if p.grad is not None}
        found[kind] = {"x": x.grad} | {name: g for name, g in adapter.items() if "lora_B" in name}
    assert len(found[dtype]) > 4
    for name, exact in found[torch.float32].items():
        half = found[dtype][name]
        assert exact is not None
        assert half is not None
        assert exact.abs().max() < 1e-4
        assert half.dtype == torch.float32
        assert (half - exact).norm() < (0.02 if dtype == torch.float16 else 0.1) * exact.norm(), name


def test_a_guided_adapter_is_off_on_both_sides(tmp_path: Path) -> None:
    model = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)))
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter += 0.5
    x, t = latents_of(model), torch.tensor(0.5)
    off, plain = (
        model.guided(PROMPTS, 3.0)(flow) for flow in (base_of(model.flow), model_without("stable-diffusion", tmp_path))
    )
    assert isinstance(off, Guided)
    assert torch.equal(off(x, t), plain(x, t))
    with off.own_weights():  # as during a pullback
        assert torch.equal(off(x, t), plain(x, t))
    assert not torch.equal(model.guided(PROMPTS, 3.0)(model.flow)(x, t), plain(x, t))


def style(folder: Path, name: str = "stable-diffusion") -> Path:
    """A LoRA that changes the pictures, as others train it."""
    pipeline = tiny_pipeline(name, folder)
    network = getattr(pipeline, DENOISERS[name])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_k", "to_q"]))
    layers = {f"{DENOISERS[name]}_lora_layers": get_peft_model_state_dict(network)}
    type(pipeline).save_lora_weights(folder / "style", **layers)
    return folder / "style"


DENOISERS = {"stable-diffusion": "unet", "stable-diffusion-3": "transformer"}
STATES: dict[str, Callable[[Any], None]] = {
    "as it was loaded": lambda pipeline: None,
    "at half strength": lambda pipeline: pipeline.set_adapters(pipeline.get_active_adapters(), [0.5]),
    "switched off": lambda pipeline: pipeline.disable_lora(),
}


@pytest.mark.parametrize(
    ("name", "adapter", "state"),
    [
        *(("stable-diffusion", adapter, state) for adapter in (None, "default") for state in STATES),
        ("stable-diffusion-3", None, "as it was loaded"),
    ],
)
def test_a_lora_that_is_there_already_stays(name: str, adapter: str | None, state: str, tmp_path: Path) -> None:
    """Below the new adapter, in base and tuned alike: a fresh one changes nothing, a trained one leaves its base alone, and
    both files together, in plain diffusers, are the tuned model."""
    place, named = style(tmp_path, name), {} if adapter is None else {"adapter_name": adapter}
    pipeline = tiny_pipeline(name, tmp_path)
    plain = from_diffusers(pipeline)
    latents = latents_of(plain)

    def draw(model: TextToImage) -> Tensor:
        return model.sample_latents(PROMPTS, sampling=euler(3), latents=latents, guidance_scale=2.0)

    without = draw(plain)
    pipeline.load_lora_weights(place, **named)
    STATES[state](pipeline)
    model = from_diffusers(pipeline)
    before = draw(model)
    assert torch.equal(before, without) == (state == "switched off")
    tuned = with_adapter(model, rank=2)
    assert torch.equal(draw(tuned), before)
    assert torch.equal(draw(tuned.base()), before)
    trained = dict(tuned.flow.named_parameters())  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.2
    after = draw(tuned)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.equal(draw(tuned.base()), before)
    assert torch.equal(draw(tuned), after)
    assert dict(tuned.flow.named_parameters()).keys() == trained.keys()  # type: ignore[union-attr]
    own = [key for key in trained if "lora_A" in key]
    assert len(trained) == 2 * len(own)
    assert all(trained[key].shape[0] == 2 for key in own)  # those of the new one alone, whose rank is 2

    said = pytest.warns(UserWarning, match="was trained on top of 'default.*load that too")
    with nullcontext() if state == "switched off" else said:
        tuned.save(tmp_path / "new")
    strength = {"as it was loaded": 1.0, "at half strength": 0.5, "switched off": 0.0}[state]
    fresh = tiny_pipeline(name, tmp_path)
    fresh.load_lora_weights(place, adapter_name="style")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft: there is one already
        fresh.load_lora_weights(tmp_path / "new", adapter_name="new")
    fresh.set_adapters(["style", "new"], [strength, 1.0])
    assert (draw(from_diffusers(fresh)) - after).abs().max() < 1e-5

    with torch.no_grad():
        for parameter in trained.values():
            parameter *= 0
    tuned.load_weights(tmp_path / "new")
    assert torch.equal(draw(tuned), after)


def test_an_adapter_above_ours(tmp_path: Path) -> None:
    """A tuned model can be tuned on: its own adapter is that of the base."""
    model = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), rank=2)
    with torch.no_grad():
        for parameter in model.flow.parameters():  # type: ignore[union-attr]
            parameter += 0.2
    before = model.sample_latents(PROMPTS, sampling=euler(2), latents=latents_of(model))
    above = with_adapter(model, rank=3)
    for one in (above, above.base()):
        assert torch.equal(one.sample_latents(PROMPTS, sampling=euler(2), latents=latents_of(model)), before)
    assert all(3 in parameter.shape for parameter in above.flow.parameters())  # type: ignore[union-attr]


def test_the_gradient_of_an_adapter_above_another(tmp_path: Path) -> None:
    """It is there for the new one alone, and the pullback of the base is that of the model before."""
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.load_lora_weights(style(tmp_path))
    model = from_diffusers(pipeline)
    x, t, condition = latents_of(model), torch.tensor(0.4), model.encode(PROMPTS)[0]
    v, pullback = linearize(model.flow.bind(condition), x, t)
    expected = pullback(v)
    tuned = with_adapter(model)
    with torch.no_grad():
        for parameter in tuned.flow.parameters():  # type: ignore[union-attr]
            parameter += 0.2
    found, back = linearize(base_of(tuned.flow).bind(condition), x, t)  # type: ignore[arg-type]
    assert torch.equal(found, v)
    assert torch.equal(back(found), expected)
    tuned.flow.bind(condition)(x, t).square().sum().backward()
    with_gradient = {name for name, p in tuned.denoiser.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in tuned.flow.named_parameters()}  # type: ignore[union-attr]


def test_a_lora_that_is_fused(tmp_path: Path) -> None:
    """Unloaded it is part of the weights; still loaded, peft would take it out of them, so it is refused."""
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.load_lora_weights(style(tmp_path))
    pipeline.fuse_lora()
    model = from_diffusers(pipeline)
    before = model.sample_latents(PROMPTS, sampling=euler(2), latents=latents_of(model))
    with pytest.raises(InputError, match=r"call pipeline.unload_lora_weights\(\) first"):
        with_adapter(model)
    pipeline.unload_lora_weights()
    model = from_diffusers(pipeline)
    tuned = with_adapter(model)
    for one in (tuned, tuned.base()):
        assert torch.equal(one.sample_latents(PROMPTS, sampling=euler(2), latents=latents_of(model)), before)


def test_a_lora_in_a_network_that_is_tuned_in_full_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.load_lora_weights(style(tmp_path), adapter_name="style")
    with pytest.raises(InputError, match=r"it has a LoRA loaded \(style\): call pipeline.fuse_lora"):
        from_diffusers(pipeline).trainable()


# ---- what cannot work ----


def test_a_class_that_is_not_known_names_those_that_are() -> None:
    class StableDifusionPipeline:
        pass

    with pytest.raises(InputError, match=r"did you mean 'StableDiffusionPipeline'\?; docs"):
        from_diffusers(StableDifusionPipeline())
    known = {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"}
    assert known <= set(families())


def test_a_class_that_is_not_known_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its index alone: from a folder, whose weights are not read, and from the hub, of which no other file is asked for."""
    index, asked = tmp_path / "model_index.json", list[Any]()

    def fetch(repository: str, **options: Any) -> str:
        asked.append((repository, options["filename"], options["revision"]))
        return str(index)

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", fetch)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *rest, **options: pytest.fail("it was fetched"))
    for name, said in (
        ("FluxxPipeline", "did you mean 'FluxPipeline'"),
        ("Unheard", "known: .*FluxPipeline.*StableDiffusionXL"),
    ):
        index.write_text(f'{{"_class_name": "{name}", "_diffusers_version": "0.42.1"}}')
        for path in (tmp_path, "someone/else"):
            with pytest.raises(InputError, match=f"{name} is not known.*{said}.*how to add a family"):
                from_diffusers(path, revision="main")
    assert asked == 2 * [("someone/else", "model_index.json", "main")]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.vae = None
    with pytest.raises(InputError, match="StableDiffusionPipeline: has no vae"):
        from_diffusers(pipeline)
    with pytest.raises(InputError, match="has no model_index"):
        from_diffusers(tmp_path)


def test_weights_that_are_pickles_are_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(InputError, match="cannot be loaded"):
        from_diffusers(tmp_path / "pickled")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stable-diffusion", {"height": 17}, "multiples of 2, got 17 and 16"),
        ("stable-diffusion", {"height": 0}, "multiples of 2, got 0 and 16"),
        ("flux", {"width": 18}, "multiples of 4, got 16 and 18"),
    ],
)
def test_sizes_that_do_not_divide(name: str, options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        from_diffusers(tiny_pipeline(name, tmp_path), **options)


def test_guidance_of_a_model_that_takes_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="distilled without guidance"):
        from_diffusers(tiny_pipeline("flux", tmp_path, guidance_embeds=False), guidance_scale=3.5)


def test_layers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target_modules"):
        with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), target_modules=["to_z"])


# ---- the documented example of a new family ----


@pytest.mark.parametrize("sample_size", [8, 128])
def test_the_documented_family_works(sample_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/text-to-image.md, on PixArt-Alpha: parity with its pipeline, which tells networks of 128 latents the
    size of the picture."""
    import importlib.util

    from diffusers import DDIMScheduler, PixArtAlphaPipeline
    from tiny_pipelines import STABLE_DIFFUSION, pixart_transformer, t5, vae

    page = (Path(__file__).parents[1] / "docs/text-to-image.md").read_text(encoding="utf-8")
    code = page.split("## Adding a family")[1].split("```python\n")[1].split("```")[0]
    path = tmp_path / "pixart_alpha.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("pixart_alpha", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    family, known = module.PixartAlpha(), families()
    monkeypatch.setattr(constructor, "families", lambda: {**known, family.pipeline_class: family})

    torch.manual_seed(0)
    tokenizer, encoder = t5()
    transformer, scheduler = pixart_transformer(sample_size=sample_size), DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False)
    model = from_diffusers(PixArtAlphaPipeline(tokenizer, encoder, vae(), transformer, scheduler), height=16, width=32)
    latents = latents_of(model)
    expected = theirs(model, latents, 4, 3.0)
    found = model.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=3.0, latents=latents)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
