"""Pretraining of a small text-to-image pipeline, Stable Diffusion in miniature, from captioned pictures.

A byte-pair tokenizer is learned from the captions, then an autoencoder, then the denoiser together with its text encoder. The
result is a folder of diffusers' own classes, which `DiffusionPipeline.from_pretrained` reads without tiltflow.
"""

# Mutation tests: none: a model for the tests, made once

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.data import CaptionedImages, load_captioned
from tiltflow.flows.interpolant import interior
from tiltflow.models.model_folder import CARD
from tiltflow.models.schedules import path_of
from tiltflow.pretraining.loop import Optimization, Stage
from tiltflow.pretraining.recipe import Pretraining, Scores
from tiltflow.pretraining.regression import point_and_target
from tiltflow.streams import stream

Count = Annotated[int, Field(ge=1)]
Byte = Annotated[int, Field(ge=0, le=255)]


class PipelinePretraining(Pretraining):
    """A text-to-image pipeline on captioned pictures with transparent parts."""

    ELSEWHERE: ClassVar = {
        "network": "a pipeline has a denoiser, an autoencoder and a text encoder, sized by `unet_channels`, `vae_channels`, ..",
        **dict.fromkeys(("prediction", "interpolant", "sampling"), "the scheduler of the pipeline has it"),
        "judge": "the pictures have captions and no classes, and their file has no test split",
    }

    task: Literal["text-to-image"] = "text-to-image"
    include: tuple[str, ...] = ()
    """Beginnings of the names of the pictures that are used; all of them if there are none."""
    least_opaque: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a picture that must not be transparent; others are left out."""
    backgrounds: dict[str, tuple[Byte, Byte, Byte]] = Field(default={"white": (255, 255, 255)}, min_length=1)
    """Colours put under the transparent pixels, drawn anew each time; the caption names it: `.. on a white background`."""

    vocabulary: Count = 1024
    """Tokens of the byte-pair encoding."""
    latent_channels: Count = 4
    """Channels of the latents."""
    vae_channels: tuple[Count, ...] = (32, 64)
    """Channels of the autoencoder's levels; each but the first halves the picture."""
    unet_channels: tuple[Count, ...] = (64, 128)
    """Channels of the denoiser's levels, all but the first with cross-attention."""
    layers_per_block: Count = 1
    """Residual layers at each level of the denoiser."""
    text_width: Count = 128
    """Width of the text encoder."""
    text_layers: Count = 2
    """Layers of the text encoder."""
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the captions that are left empty, for classifier-free guidance."""

    autoencoder: Optimization = Optimization(max_train_steps=1500, train_batch_size=32, learning_rate=2e-3)
    """Optimizer and schedule of the autoencoder, which is trained first; `training` is that of the denoiser and the text
    encoder."""

    @property
    def schedules(self) -> Mapping[str, Optimization]:
        return {"autoencoder": self.autoencoder, "denoiser": self.training}

    def prepare(self, path: Path, device: str) -> PipelineTask:
        data = load_captioned(path, include=self.include, least_opaque=self.least_opaque).to(device)
        return PipelineTask(self, build(self, data).to(device), data)


RECIPE = PipelinePretraining


def caption(words: str, background: str) -> str:
    """The prompt of a picture."""
    return f"{words} on a {background} background"


def compose(data: CaptionedImages, index: Tensor, under: Tensor) -> Tensor:
    """Pictures [batch, 3, height, width] in [-1, 1] on backgrounds [batch, 3]."""
    rgb, opacity = data.images[index].split([3, 1], 1)
    opacity = (opacity + 1) / 2
    picture: Tensor = opacity * rgb + (1 - opacity) * under[:, :, None, None]
    return picture


def build(recipe: PipelinePretraining, data: CaptionedImages) -> Any:
    """Build an untrained pipeline, with a tokenizer that is learned from the captions."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer, size = learn_tokenizer(captions_of(recipe, data), recipe.vocabulary), data.images.shape[2]
    with torch.random.fork_rng():
        torch.manual_seed(stream(recipe.seed, "network").initial_seed())
        text, vae, unet = build_text_encoder(recipe, tokenizer), build_autoencoder(recipe, size), build_denoiser(recipe, size)
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


def build_text_encoder(recipe: PipelinePretraining, tokenizer: Any) -> Any:
    """Build an untrained text encoder for the tokens of a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
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


def build_autoencoder(recipe: PipelinePretraining, size: int) -> Any:
    """Build an untrained autoencoder of pictures of this height."""
    from diffusers import AutoencoderKL

    levels = len(recipe.vae_channels)
    return AutoencoderKL(
        latent_channels=recipe.latent_channels,
        block_out_channels=recipe.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def build_denoiser(recipe: PipelinePretraining, size: int) -> Any:
    """Build an untrained denoiser of the latents of pictures of this height."""
    from diffusers import UNet2DConditionModel

    more = len(recipe.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=size // 2 ** (len(recipe.vae_channels) - 1),
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=recipe.unet_channels,
        layers_per_block=recipe.layers_per_block,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * more,
        up_block_types=("CrossAttnUpBlock2D",) * more + ("UpBlock2D",),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def learn_tokenizer(captions: list[str], vocabulary: int) -> Any:
    """Learn the byte pairs of a CLIP tokenizer from captions, alike in every process."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learned.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words = [learned.pre_tokenizer.pre_tokenize_str(learned.normalizer.normalize_str(text)) for text in captions]
    # the trainer numbers the ends of words as it meets them, in the order of a hash that is seeded anew in each process
    ends = sorted({f"{word[-1]}</w>" for pieces in words for word, _ in pieces})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|startoftext|>", "<|endoftext|>", *ends],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    with TemporaryDirectory() as folder:
        vocabulary_file, merges_file = learned.model.save(folder)
        return CLIPTokenizer(vocabulary_file, merges_file, model_max_length=24)


@dataclass(frozen=True)
class PipelineTask:
    """A pipeline, and the pictures on coloured backgrounds that it is trained on."""

    recipe: PipelinePretraining
    pipeline: Any
    pictures: CaptionedImages

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        pipeline = self.pipeline
        return {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}

    def data(self) -> str:
        return f"{len(self.pictures):,} pictures, {len(self.recipe.backgrounds)} backgrounds"

    def remarks(self) -> list[str]:
        return [f"Prompts are such as `{captions_of(self.recipe, self.pictures)[0]}`."]

    def stages(self) -> Iterator[Stage]:
        yield autoencoder_stage(self.recipe, self.pipeline, self.pictures)
        yield denoiser_stage(
            self.recipe, self.pipeline, self.pictures, latents_of(self.recipe, self.pipeline.vae, self.pictures)
        )

    def save(self, folder: Path, card: str) -> None:
        self.pipeline.save_pretrained(folder)
        (folder / CARD).write_text(card, encoding="utf-8")

    def scores(self) -> Scores:
        return {}


def captions_of(recipe: PipelinePretraining, data: CaptionedImages) -> list[str]:
    """Prompts of every picture on every background."""
    return [caption(words, background) for words in data.captions for background in recipe.backgrounds]


def backgrounds_of(recipe: PipelinePretraining, data: CaptionedImages) -> Tensor:
    """Colours of the backgrounds in [-1, 1]: [backgrounds, 3]."""
    return torch.tensor(list(recipe.backgrounds.values()), device=data.images.device) / 127.5 - 1


def autoencoder_stage(recipe: PipelinePretraining, pipeline: Any, data: CaptionedImages) -> Stage:
    """Absolute and squared error of the decoded pictures, and a small KL that keeps the latents near a unit Gaussian."""
    vae, colours, device = pipeline.vae, backgrounds_of(recipe, data), data.images.device
    generator, count = stream(recipe.seed, "autoencoder", device=device), recipe.autoencoder.train_batch_size

    def loss() -> Tensor:
        index, under = (torch.randint(len(part), (count,), generator=generator, device=device) for part in (data, colours))
        images = compose(data, index, colours[under])
        posterior = vae.encode(images).latent_dist
        kl: Tensor = posterior.kl()
        decoded: Tensor = vae.decode(posterior.sample(generator=generator)).sample
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 1e-4 * kl.mean() / images[0].numel()

    return Stage("autoencoder", (vae,), recipe.autoencoder, loss)


@torch.no_grad()
def latents_of(recipe: PipelinePretraining, vae: Any, data: CaptionedImages) -> Tensor:
    """Latents of every picture on every background, [backgrounds, pictures, *event], scaled to a standard deviation of 1; the
    factor is written into the configuration of the autoencoder."""
    index = torch.arange(len(data), device=data.images.device)
    parts = [
        torch.cat([vae.encode(compose(data, part, colour.expand(len(part), 3))).latent_dist.mean for part in index.split(256)])
        for colour in backgrounds_of(recipe, data)
    ]
    latents: Tensor = torch.stack(parts)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    scale: float = vae.config.scaling_factor
    return latents * scale


def denoiser_stage(recipe: PipelinePretraining, pipeline: Any, data: CaptionedImages, latents: Tensor) -> Stage:
    """Squared error of the prediction at uniform timesteps, with some of the captions left empty."""
    device, count = latents.device, recipe.training.train_batch_size
    generator = stream(recipe.seed, "denoiser", device=device)
    path, prediction = path_of(pipeline.scheduler)
    steps, tokens = pipeline.scheduler.config.num_train_timesteps, tokens_of(recipe, pipeline.tokenizer, data).to(device)

    def loss() -> Tensor:
        under, index = (torch.randint(size, (count,), generator=generator, device=device) for size in latents.shape[:2])
        kept = torch.rand(count, generator=generator, device=device) >= recipe.prompt_dropout
        embeds = pipeline.text_encoder(tokens[under, kept * (index + 1)])[0]
        timestep = torch.randint(steps, (count,), generator=generator, device=device)
        c, x1 = path(interior(1 - (timestep.double() + 1) / steps)), latents[under, index]
        x0 = torch.randn(x1.shape, generator=generator, device=device)
        x, target = point_and_target(c, prediction, x0, x1)
        predicted = pipeline.unet(x, timestep, encoder_hidden_states=embeds).sample
        return F.mse_loss(predicted.float(), target)

    return Stage("denoiser", (pipeline.unet, pipeline.text_encoder), recipe.training, loss)


def tokens_of(recipe: PipelinePretraining, tokenizer: Any, data: CaptionedImages) -> Tensor:
    """Tokens [backgrounds, 1 + pictures, length] of the captions, after the empty one."""
    texts = [["", *(caption(words, name) for words in data.captions)] for name in recipe.backgrounds]
    length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return torch.stack([tokenizer(some, return_tensors="pt", **length).input_ids for some in texts])
