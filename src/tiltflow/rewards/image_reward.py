"""ImageReward: how well people would rate a picture of its prompt."""

# Mutation tests: test_scorers.py

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, not_installed
from tiltflow.flows.precision import Dtype, at_least_float32
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import depth, resized
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import PathOrName, Settings
from tiltflow.tensor_file import read_tensors
from tiltflow.user_code import refused

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and std of the ratings that the authors trained on: published scores are standardised by them."""
LONGEST = 35  # tokens of a prompt

VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)", r"encoder.layers.\1.layer_norm\2"),
    (r"^blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"^blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
)
"""Names in the authors' vision transformer, and in that of transformers."""


class ImageReward(Settings):
    """ImageReward (2304.05977): linear layers on the first token of BLIP's text encoder, which looks at the picture; about -2
    to 2, 0 the mean of the rated pictures."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "standard deviations"

    name: Literal["image-reward"] = "image-reward"
    model: PathOrName
    """The published file `ImageReward.pt`, or its tensors as safetensors."""
    tokenizer: PathOrName = "google-bert/bert-base-uncased"
    """The tokenizer: a folder or a name on the hub."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @property
    def description(self) -> str:
        return "rating that ImageReward predicts for a picture of its prompt, in standard deviations around 0"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        scorer = Scorer.load(Path(self.model), self.tokenizer, device, getattr(torch, self.dtype))
        return OfPrompts(of_frames(scorer))


@dataclass(frozen=True)
class Scorer:
    """BLIP and the layers on it."""

    vision: Any
    text: Any
    layers: nn.Module
    tokenizer: Any

    @classmethod
    def load(cls, path: Path, tokenizer: str, device: torch.device | str, dtype: torch.dtype) -> Scorer:
        """Load the authors' weights. Raises InputError if they cannot be loaded."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise not_installed("transformers", "diffusers") from None
        with refused(f"reward.model {path}: is not ImageReward"):
            vision, text, layers = (
                part.to(device, dtype).requires_grad_(False).eval() for part in networks(read_weights(path))
            )
        with refused(f"reward.tokenizer {tokenizer}: cannot be loaded"):
            return cls(vision, text, layers, AutoTokenizer.from_pretrained(tokenizer))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [batch] of images [batch, 3, height, width] in [-1, 1], with their gradient."""
        pixels = resized(images, self.vision.config.image_size).to(self.vision.dtype)
        seen = self.vision(pixels).last_hidden_state
        words = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(images.device)
        read = self.text(
            input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        rating: Tensor = at_least_float32(self.layers(read[:, 0]).squeeze(1))
        return (rating - MEAN) / STD


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The authors' tensors. Raises InputError if they cannot be read, or are those of another model."""
    weights = read_tensors(path, "reward.model")
    if "blip.visual_encoder.cls_token" not in weights or "mlp.layers.0.weight" not in weights:
        raise InputError(f"reward.model {path}: is not ImageReward, it has no blip.visual_encoder and mlp.layers")
    return weights


def networks(weights: Mapping[str, Tensor]) -> tuple[nn.Module, nn.Module, nn.Sequential]:
    """The vision transformer, the text encoder and the layers on it, of the sizes of the weights."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipTextModel, BlipVisionModel

    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
    for key, value in weights.items():
        for prefix, part in parts.items():
            if key.startswith(prefix) and not key.endswith("position_ids"):
                part[key.removeprefix(prefix)] = value
    seen, read, top = parts.values()
    for pattern, name in VISION:
        seen = {re.sub(pattern, name, key): value for key, value in seen.items()}

    width, patch = seen["embeddings.patch_embedding.weight"].shape[0], seen["embeddings.patch_embedding.weight"].shape[-1]
    tokens = seen["embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth(seen, "encoder.layers."),
            num_attention_heads=max(1, width // 64),
            image_size=round(tokens**0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
    )
    words = read["embeddings.word_embeddings.weight"]
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words.shape[0],
            hidden_size=words.shape[1],
            encoder_hidden_size=read["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=depth(read, "encoder.layer."),
            num_attention_heads=max(1, words.shape[1] // 64),
            max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
            layer_norm_eps=1e-12,
            is_decoder=True,  # which is what transformers calls a model with cross-attention
        ),
        add_pooling_layer=False,
    )
    vision.load_state_dict(seen)
    text.load_state_dict(read)
    layers = []
    for i in sorted({int(key.split(".")[0]) for key in top}):
        layer = nn.Linear(top[f"{i}.weight"].shape[1], top[f"{i}.weight"].shape[0])
        layer.load_state_dict({part: top[f"{i}.{part}"] for part in ("weight", "bias")})
        layers.append(layer)
    return vision, text, nn.Sequential(*layers)
