"""Pretraining of a small text-to-image pipeline, Stable Diffusion in miniature, from captioned pictures.

A byte-pair tokenizer is learned from the captions, then an autoencoder, then the denoiser together with its text encoder. The
result is a folder of diffusers' own classes, which `DiffusionPipeline.from_pretrained` reads without tiltflow.
"""

# Mutation tests: none: a model for the tests, made once

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tiltflow.data import CaptionedImages, fingerprint, load_captioned
from tiltflow.files import filling
from tiltflow.flows.interpolant import expand, interior, mixture_weights
from tiltflow.models.schedules import path_of
from tiltflow.pretraining.pretrain import Optimization, Progress, learn
from tiltflow.runs.lock import working_in
from tiltflow.runs.run_folder import claim
from tiltflow.settings import Settings
from tiltflow.streams import stream

Count = Annotated[int, Field(ge=1)]
Byte = Annotated[int, Field(ge=0, le=255)]


class PipelinePretraining(Settings):
    """A text-to-image pipeline on captioned pictures with transparent parts."""

    task: Literal["text-to-image"] = "text-to-image"
    """What is trained."""
    description: str = ""
    """A line for people: it is shown when the run begins."""
    include: tuple[str, ...] = ()
    """Only pictures whose name begins so."""
    least_opaque: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only pictures of which this share is not transparent."""
    backgrounds: dict[str, tuple[Byte, Byte, Byte]] = Field(default={"white": (255, 255, 255)}, min_length=1)
    """What is put under the transparent pixels, drawn anew each time; the caption names it: `.. on a white background`."""

    vocabulary: Count = 1024
    """Tokens of the byte-pair encoding."""
    latent_channels: Count = 4
    """Of the autoencoder's code."""
    vae_channels: tuple[Count, ...] = (32, 64)
    """Of the autoencoder's levels; each but the first halves the picture."""
    unet_channels: tuple[Count, ...] = (64, 128)
    """Of the denoiser's levels, all but the first with cross-attention."""
    layers_per_block: Count = 1
    """Residual layers at each level of the denoiser."""
    text_width: Count = 128
    """Of the text encoder."""
    text_layers: Count = 2
    """Of the text encoder."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the captions that are left empty, for classifier-free guidance."""

    autoencoder: Optimization = Optimization(max_train_steps=1500, train_batch_size=32, learning_rate=2e-3)
    """Optimizer and schedule of the autoencoder, which is trained first."""
    training: Optimization = Optimization()
    """Those of the denoiser and the text encoder."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""


def caption(words: str, background: str) -> str:
    """The prompt of a picture."""
    return f"{words} on a {background} background"


def compose(data: CaptionedImages, index: Tensor, under: Tensor) -> Tensor:
    """Pictures [batch, 3, height, width] in [-1, 1] on backgrounds [batch, 3]."""
    rgb, opacity = data.images[index].split([3, 1], 1)
    opacity = (opacity + 1) / 2
    picture: Tensor = opacity * rgb + (1 - opacity) * under[:, :, None, None]
    return picture


def build(recipe: PipelinePretraining, captions: list[str], size: tuple[int, int], folder: Path) -> Any:
    """An untrained pipeline, with the tokenizer of the captions; `folder` is where the tokenizer's files are put."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = learn_tokenizer(captions, recipe.vocabulary, folder)
    levels, factor = len(recipe.unet_channels), 2 ** (len(recipe.vae_channels) - 1)
    with torch.random.fork_rng():
        torch.manual_seed(stream(recipe.seed, "network").initial_seed())
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.text_width,
                intermediate_size=2 * recipe.text_width,
                num_hidden_layers=recipe.text_layers,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            latent_channels=recipe.latent_channels,
            block_out_channels=recipe.vae_channels,
            down_block_types=("DownEncoderBlock2D",) * len(recipe.vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(recipe.vae_channels),
            norm_num_groups=8,
            sample_size=size[0],
            mid_block_add_attention=False,
        )
        unet = UNet2DConditionModel(
            sample_size=size[0] // factor,
            in_channels=recipe.latent_channels,
            out_channels=recipe.latent_channels,
            block_out_channels=recipe.unet_channels,
            layers_per_block=recipe.layers_per_block,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
            cross_attention_dim=recipe.text_width,
            attention_head_dim=8,
            norm_num_groups=16,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


def learn_tokenizer(captions: list[str], vocabulary: int, folder: Path) -> Any:
    """A CLIP tokenizer whose byte pairs are learned from the captions."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learned.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    learned.model.save(str(folder))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)


def backgrounds_of(recipe: PipelinePretraining, data: CaptionedImages) -> Tensor:
    """Their colours in [-1, 1]: [backgrounds, 3]."""
    return torch.tensor(list(recipe.backgrounds.values()), device=data.images.device) / 127.5 - 1


def train_autoencoder(recipe: PipelinePretraining, vae: Any, data: CaptionedImages) -> Iterator[Progress]:
    """Absolute and squared error, and a small KL that keeps the latents near a unit Gaussian."""
    colours, device = backgrounds_of(recipe, data), data.images.device
    generator, count = stream(recipe.seed, "autoencoder", device=device), recipe.autoencoder.train_batch_size

    def loss_of() -> Tensor:
        index, under = (torch.randint(len(part), (count,), generator=generator, device=device) for part in (data, colours))
        images = compose(data, index, colours[under])
        posterior = vae.encode(images).latent_dist
        kl: Tensor = posterior.kl()
        decoded: Tensor = vae.decode(posterior.sample(generator=generator)).sample
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 1e-4 * kl.mean() / images[0].numel()

    yield from learn([vae], recipe.autoencoder, loss_of, device)


@torch.no_grad()
def latents_of(recipe: PipelinePretraining, vae: Any, data: CaptionedImages) -> Tensor:
    """Of every picture on every background: [backgrounds, pictures, *event], scaled to a standard deviation of 1, which the
    autoencoder is told."""
    index = torch.arange(len(data), device=data.images.device)
    parts = [
        torch.cat([vae.encode(compose(data, part, colour.expand(len(part), 3))).latent_dist.mean for part in index.split(256)])
        for colour in backgrounds_of(recipe, data)
    ]
    latents: Tensor = torch.stack(parts)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    scale: float = vae.config.scaling_factor
    return latents * scale


def train_denoiser(recipe: PipelinePretraining, pipeline: Any, data: CaptionedImages, latents: Tensor) -> Iterator[Progress]:
    """Squared error of the prediction at uniform timesteps, the captions left out now and then."""
    device, names, count = latents.device, list(recipe.backgrounds), recipe.training.train_batch_size
    generator = stream(recipe.seed, "denoiser", device=device)
    path, prediction = path_of(pipeline.scheduler)
    steps, most = pipeline.scheduler.config.num_train_timesteps, pipeline.tokenizer.model_max_length
    texts = [["", *(caption(words, name) for words in data.captions)] for name in names]
    tokens = torch.stack(
        [
            pipeline.tokenizer(some, padding="max_length", max_length=most, truncation=True, return_tensors="pt").input_ids
            for some in texts
        ]
    ).to(device)

    def loss_of() -> Tensor:
        under, index = (torch.randint(size, (count,), generator=generator, device=device) for size in latents.shape[:2])
        x1 = latents[under, index]
        kept = torch.rand(count, generator=generator, device=device) >= recipe.prompt_dropout
        embeds = pipeline.text_encoder(tokens[under, kept * (index + 1)])[0]
        timestep = torch.randint(steps, (count,), generator=generator, device=device)
        c = path(interior(1 - (timestep.double() + 1) / steps))
        x0 = torch.randn(x1.shape, generator=generator, device=device)
        x = expand(c.alpha, x1) * x1 + expand(c.beta, x1) * x0
        a, b = (expand(weight, x1) for weight in mixture_weights(prediction, c))
        predicted = pipeline.unet(x, timestep, encoder_hidden_states=embeds).sample
        return F.mse_loss(predicted.float(), a * x1 + b * x0)

    yield from learn([pipeline.unet, pipeline.text_encoder], recipe.training, loss_of, device)


def run_pipeline_pretraining(
    recipe: PipelinePretraining,
    path: Path,
    folder: Path,
    *,
    name: str,
    device: str = "cpu",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train on the data at `path` and write a pipeline folder, its card included. Returns the scores.

    Raises InputError, with nothing written, if the folder is occupied or the data do not fit.
    """
    with working_in(folder):
        claim(folder)
        data = load_captioned(path, include=recipe.include, least_opaque=recipe.least_opaque).to(device)
        captions = [caption(words, background) for words in data.captions for background in recipe.backgrounds]
        height, width = data.images.shape[2:]
        with filling(folder) as draft:
            pipeline = build(recipe, captions, (height, width), draft / "tokenizer").to(device)
            scores, seconds, done = {}, 0.0, 0
            for stage in ("autoencoder", "denoiser"):
                if stage == "autoencoder":
                    records = train_autoencoder(recipe, pipeline.vae, data)
                else:
                    records = train_denoiser(recipe, pipeline, data, latents_of(recipe, pipeline.vae, data))
                progress = None
                for progress in records:
                    watch(replace(progress, step=done + progress.step, seconds=seconds + progress.seconds))
                assert progress is not None
                scores[f"{stage}_loss"] = progress.loss
                seconds, done = seconds + progress.seconds, done + progress.step
            pipeline.to("cpu").save_pretrained(draft)
            about = card(recipe, name, path, data, pipeline, seconds, device, scores)
            (draft / "README.md").write_text(about, encoding="utf-8")
            return scores


def card(
    recipe: PipelinePretraining,
    name: str,
    path: Path,
    data: CaptionedImages,
    pipeline: Any,
    seconds: float,
    device: str,
    scores: dict[str, float],
) -> str:
    """The model card: what it is, from which data and command."""
    parts = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in ("unet", "vae", "text_encoder")}
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device
    lines = [
        f"# {name}",
        "",
        f"{recipe.description[:1].upper()}{recipe.description[1:]}.",
        "",
        f"- data: `{path.name}` (sha256 {fingerprint(path)}..), {len(data):,} pictures, {len(recipe.backgrounds)} backgrounds",
        f"- prompts: `{caption(data.captions[0], next(iter(recipe.backgrounds)))}`",
        f"- command: `tiltflow pretrain {name} --data {path.name} --output {name}`, seed {recipe.seed}",
        f"- training: {recipe.autoencoder.max_train_steps:,} steps of the autoencoder, "
        f"{recipe.training.max_train_steps:,} of the denoiser, {seconds / 60:.0f} minutes on {where}",
        "- parameters: " + ", ".join(f"{part} {count:,}" for part, count in parts.items()),
        "- " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items()),
        "",
    ]
    return "\n".join(lines)
