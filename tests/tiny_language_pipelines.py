"""Small text-to-image pipelines whose prompts a language model reads, of the real classes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

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


LANGUAGE_PIPELINES: dict[str, Callable[..., Any]] = {"qwen-image": qwen_image}


def tiny_language_pipeline(name: str, **options: Any) -> Any:
    """A pipeline by the name of its family, the same for every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = LANGUAGE_PIPELINES[name](**options)
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None  # so large that prompts matter
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
