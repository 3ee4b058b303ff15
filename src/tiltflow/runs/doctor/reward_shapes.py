"""Rewards without weights: what their networks, whose sizes are published, need for a picture and its gradient."""

# Mutation tests: none: facts about published models

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip, resized
from tiltflow.rewards.image_reward import LONGEST
from tiltflow.runs.doctor.shapes import network_of_shapes

Sizes = dict[str, Any]


def _transformer(width: int, layers: int, heads: int) -> Sizes:
    """Sizes of a transformer whose layers are four times as wide inside."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


CLIP_L: Sizes = {
    "projection_dim": 768,
    "vision_config": {**_transformer(1024, 24, 16), "patch_size": 14},
    "text_config": _transformer(768, 12, 12),
}
"""openai/clip-vit-large-patch14."""
CLIP_H: Sizes = {
    "projection_dim": 1024,
    "vision_config": {**_transformer(1280, 32, 16), "patch_size": 14},
    "text_config": _transformer(1024, 24, 16),
}
"""CLIP ViT-H/14 of laion, which PickScore and HPS v2.1 are."""
CLIPS: Mapping[str, Mapping[str, Any]] = {"clip-score": CLIP_L, "aesthetic": CLIP_L, "pick-score": CLIP_H, "hps": CLIP_H}
BLIP: Sizes = {**_transformer(1024, 24, 16), "image_size": 224, "patch_size": 16}
BERT: Sizes = {**_transformer(768, 12, 12), "encoder_hidden_size": 1024, "vocab_size": 30524, "is_decoder": True}
"""BLIP's vision transformer L/16 and its BERT, which ImageReward is."""


def reward_of_shapes(settings: Any) -> tuple[Reward, dict[str, nn.Module]]:
    """A reward of samples without numbers, and its networks by name. Raises InputError for one that would be loaded, and whose
    networks are not published."""
    if settings.name in CLIPS:
        return _clip(CLIPS[settings.name], getattr(torch, settings.dtype), settings.name)
    if settings.name == "image-reward":
        return _image_reward(getattr(torch, settings.dtype))
    if settings.name == "sum":
        terms = [reward_of_shapes(term.reward) for term in settings.rewards]
        networks = {f"{name} {i + 1}": part for i, (_, parts) in enumerate(terms) for name, part in parts.items()}
        return (lambda x: torch.stack([reward(x) for reward, _ in terms]).sum(0)), networks
    if settings.differentiable and settings.name not in ("named-colour", "ink", "function"):
        raise InputError(f"reward {settings.name}: --config-only does not know its networks; leave it out")
    return _pixels, {}


def _pixels(x: Tensor) -> Tensor:
    """A reward of the pixels alone."""
    return x.square().flatten(1).mean(1)


def _clip(config: Mapping[str, Any], dtype: torch.dtype, name: str) -> tuple[Reward, dict[str, nn.Module]]:
    from transformers import CLIPConfig, CLIPModel

    network = network_of_shapes(lambda: CLIPModel(CLIPConfig(**config)), dtype)
    clip = Clip(network, None)
    return (lambda x: clip.image_features(x).sum(1)), {f"reward {name}": network}


def _image_reward(dtype: torch.dtype) -> tuple[Reward, dict[str, nn.Module]]:
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.initialization import no_init_weights
    from transformers.models.blip.modeling_blip import BlipTextModel, BlipVisionModel

    with no_init_weights():  # that of BLIP draws until no number is too large
        vision: Any = network_of_shapes(lambda: BlipVisionModel(BlipVisionConfig(**BLIP)), dtype)
        text: Any = network_of_shapes(lambda: BlipTextModel(BlipTextConfig(**BERT), add_pooling_layer=False), dtype)

    def reward(x: Tensor) -> Tensor:
        seen = vision(resized(x, vision.config.image_size).to(dtype)).last_hidden_state
        words = torch.zeros(len(x), LONGEST, dtype=torch.int64)
        read = text(input_ids=words, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        rating: Tensor = read[:, 0].float().sum(1)
        return rating

    return reward, {"reward image-reward": nn.ModuleList([vision, text])}
