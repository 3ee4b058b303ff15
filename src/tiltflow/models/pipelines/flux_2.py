"""FLUX.2-dev: a flow-matching transformer on 2x2 patches of latents, whose channels the decoder normalises, and prompts that a
language model reads. It was distilled to take the guidance scale as an input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.models.pipelines import Condition, TextOptions
from tiltflow.models.pipelines.flux import Flux


class Flux2(Flux):
    """`Flux2Pipeline`. A state is a picture of patches [channels, rows, columns]."""

    pipeline_class = "Flux2Pipeline"
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    target_modules = (*Flux.target_modules, "to_qkv_mlp_proj")
    guidance_scale = 4.0

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, ...]:
        patch = self.patch * pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // patch, width // patch

    def shift(self, image_tokens: int, num_inference_steps: int) -> float:
        """Linear in the tokens at 10 and at 200 steps, and in the steps between; of large pictures as at 200."""
        many, few = 0.00016927 * image_tokens + 0.45666666, 8.73809524e-05 * image_tokens + 1.89833333
        return many if image_tokens > 4300 else many + (many - few) * (num_inference_steps - 200) / 190

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        length = options.max_sequence_length or self.max_sequence_length
        embeds, _ = pipeline.encode_prompt(prompts, device=pipeline.device, max_sequence_length=length)
        return {"encoder_hidden_states": embeds}, None

    def written(self, pipeline: Any, prompt: str) -> str:
        system, user = ([{"type": "text", "text": text}] for text in (pipeline.system_message, prompt))
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return str(pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        _, rows, columns = self.latent_shape(pipeline, *size)
        places = torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), torch.arange(1), indexing="ij")
        return partial(predict, img_ids=torch.stack(places, -1).reshape(-1, 4))

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        mean, std = moments(pipeline.vae, latents)
        return F.pixel_shuffle(latents * std + mean, 2)

    def returned(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return latents.mT.unflatten(2, self.latent_shape(pipeline, *size)[1:])  # type: ignore[no-any-return]


def moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means and standard deviations [channels, 1, 1] of patches, which a decoder keeps as those of a batch norm."""
    mean, variance = (part.to(like)[:, None, None] for part in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition, *, img_ids: Tensor) -> Tensor:
    """Return the velocity from noise to data at times [batch]; the transformer's own time runs from data to noise."""
    txt_ids = F.pad(torch.arange(condition["encoder_hidden_states"].shape[1], device=x.device)[:, None], (3, 0))
    patches: Tensor = transformer(
        x.flatten(2).mT, timestep=1 - time, img_ids=img_ids.to(x.device), txt_ids=txt_ids, **condition, return_dict=False
    )[0]
    return -patches.mT.reshape(x.shape)
