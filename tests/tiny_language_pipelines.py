"""Small text-to-image pipelines whose prompts a language model reads, of the real classes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import vae
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}


def tokenizer() -> Qwen2Tokenizer:
    """One token for each character."""
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate([*special, *characters])}, merges=[], extra_special_tokens=special[1:]
    )
    made.chat_template = template
    return made


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}


def qwen_image(**scheduler: Any) -> QwenImagePipeline:
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={**SMALL, "num_hidden_layers": 2, "rope_parameters": rope}, vision_config=vision,
                image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
            )
        ),
        tokenizer=tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, **scheduler}),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


def flux_2_klein(*, is_distilled: bool = False, **scheduler: Any) -> Flux2KleinPipeline:
    text = Qwen3Config(**SMALL, head_dim=8, num_hidden_layers=27, bos_token_id=None, eos_token_id=2)
    pipeline = Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**FLUX_2, guidance_embeds=False), vae=flux_2_vae(),
        text_encoder=Qwen3ForCausalLM(text), tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, **scheduler}), is_distilled=is_distilled,
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


def flux_2(**scheduler: Any) -> Flux2Pipeline:
    """With a tokenizer in place of the processor of texts and pictures, which needs torchvision and tokenizes as this does."""
    words = tokenizer()
    words.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}
    text = {**SMALL, "head_dim": 8, "num_hidden_layers": 30, "bos_token_id": None, "eos_token_id": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text}, vision_config={"model_type": "pixtral", "patch_size": 8, **vision},
        image_token_index=120,
    )  # fmt: skip
    pipeline = Flux2Pipeline(
        transformer=Flux2Transformer2DModel(**FLUX_2), vae=flux_2_vae(), text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=words, scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, **scheduler}),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


FLUX_2: dict[str, Any] = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 48, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
}  # fmt: skip


def flux_2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def z_image(**scheduler: Any) -> ZImagePipeline:
    text = Qwen3Config(**SMALL, head_dim=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=2)
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
        ),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3ForCausalLM(text), tokenizer=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{**DYNAMIC, **scheduler}),
    )  # fmt: skip


LANGUAGE_PIPELINES: dict[str, Callable[..., Any]] = {
    "qwen-image": qwen_image,
    "flux-2": flux_2,
    "flux-2-klein": flux_2_klein,
    "flux-2-klein, distilled": partial(flux_2_klein, is_distilled=True),
    "z-image": z_image,
}


def tiny_language_pipeline(name: str, **options: Any) -> Any:
    """A pipeline by the name of its family, the same for every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = LANGUAGE_PIPELINES[name](**options)
        for parameter in pipeline.transformer.parameters():
            if parameter.ndim > 1:  # so large that prompts matter, and not so that rounding does
                torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
