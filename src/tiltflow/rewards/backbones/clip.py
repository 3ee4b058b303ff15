"""CLIP models of transformers, for rewards and judges: features of pictures, with gradient, and of prompts."""

# Mutation tests: test_scorers.py

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.errors import InputError, not_installed
from tiltflow.flows.precision import at_least_float32
from tiltflow.tensor_file import read_tensors
from tiltflow.user_code import refused

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

OPEN_CLIP = (
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""Names of open_clip -> names of transformers."""
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104}
"""Of the vision transformers H, g and G; it is 64 in the smaller ones, and in all text transformers but G's."""


@dataclass(frozen=True)
class Clip:
    """A CLIP model and its tokenizer; features are of length 1, in float32 at least."""

    model: Any
    tokenizer: Any
    texts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Features of the prompts seen so far."""

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu", dtype: str = "float32", tokenizer: str | None = None) -> Clip:
        """Load a folder or a name on the hub. Raises InputError if it cannot be loaded."""
        CLIPModel, words = _transformers().CLIPModel, load_tokenizer(tokenizer or path, f"CLIP model {path}")
        with refused(f"CLIP model {path}: cannot be loaded"):
            model: Any = CLIPModel.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True)
        return cls(model.to(device).requires_grad_(False).eval(), words)

    @classmethod
    def load_open_clip(
        cls, path: str, device: torch.device | str = "cpu", dtype: str = "float32", tokenizer: str | None = None
    ) -> Clip:
        """Load a file of open_clip's tensors, and a tokenizer of transformers. Raises InputError if they cannot be loaded."""
        with refused(f"CLIP model {path}: is none of open_clip"):
            model: Any = from_open_clip(read_tensors(Path(path), "CLIP model"), path)
        words = load_tokenizer(tokenizer or str(Path(path).parent), f"CLIP model {path}")
        return cls(model.to(device, getattr(torch, dtype)).requires_grad_(False).eval(), words)

    def image_features(self, images: Tensor) -> Tensor:
        """Features [batch, width] of images [batch, 3, height, width] in [-1, 1], with their gradient."""
        side = self.model.config.vision_config.image_size
        pixels = resized(images, side).to(self.model.dtype)
        return F.normalize(at_least_float32(pooled(self.model.get_image_features(pixel_values=pixels))), dim=1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features [len(prompts), width]. Each prompt is computed once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            tokens = self.tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            features = F.normalize(at_least_float32(pooled(self.model.get_text_features(**tokens))), dim=1)
            self.texts.update(zip(new, features, strict=True))
        return torch.stack([self.texts[prompt] for prompt in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of the angle between the features of a picture and of its prompt: [batch]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(1)

    @property
    def temperature(self) -> float:
        """The model's factor on cosines: exp(logit_scale)."""
        scale: float = self.model.logit_scale.exp().item()
        return scale


def load_tokenizer(path: str, what: str) -> Any:
    """CLIP's tokenizer, from a folder or a name on the hub. Raises InputError if it cannot be loaded."""
    with refused(f"{what}: cannot be loaded"):
        return _transformers().CLIPTokenizer.from_pretrained(path)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise not_installed("transformers", "diffusers") from None
    return transformers


def from_open_clip(weights: Mapping[str, Tensor], where: str) -> Any:
    """A CLIPModel of transformers with the weights of a CLIP model of open_clip whose activations are exact GELUs.

    Raises InputError, naming `where`, if they are those of another model.
    """
    from transformers import CLIPConfig, CLIPModel

    needed = (
        "visual.conv1.weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "token_embedding.weight",
        "text_projection",
    )
    if missing := [name for name in needed if name not in weights]:
        raise InputError(f"{where}: is no CLIP model of open_clip, it has no {missing[0]}")
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = key
        for pattern, theirs in OPEN_CLIP:
            name = re.sub(pattern, theirs, name)
        if name in ("visual_projection.weight", "text_projection.weight"):
            value = value.T.contiguous()  # transformers has layers where open_clip has matrices
        if ".attn.in_proj_" in name:
            layer, kind = name.split(".attn.in_proj_")
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = third.contiguous()
        elif name != "attn_mask":
            renamed[name] = value

    patches, words = renamed["vision_model.embeddings.patch_embedding.weight"], weights["token_embedding.weight"]
    tokens = renamed["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    config = CLIPConfig(
        vision_config={
            "hidden_size": patches.shape[0],
            "patch_size": patches.shape[-1],
            "image_size": round(tokens**0.5) * patches.shape[-1],
            "intermediate_size": renamed["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": depth(renamed, "vision_model.encoder.layers."),
            "num_attention_heads": patches.shape[0] // HEAD_WIDTH.get(patches.shape[0], 64),
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "max_position_embeddings": weights["positional_embedding"].shape[0],
            "intermediate_size": renamed["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": depth(renamed, "text_model.encoder.layers."),
            "num_attention_heads": words.shape[1] // 64,
            "hidden_act": "gelu",
            "eos_token_id": words.shape[0] - 1,
            "bos_token_id": words.shape[0] - 2,
        },
        projection_dim=renamed["visual_projection.weight"].shape[0],
    )
    model = CLIPModel(config)
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:  # torch raises it for wrong names or shapes
        raise InputError(f"{where}: is no CLIP model of open_clip ({str(error).strip().splitlines()[-1].strip()})") from None
    return model


def depth(weights: Mapping[str, Tensor], prefix: str) -> int:
    """The number of layers with this prefix."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix))


def pooled(output: Any) -> Tensor:
    """The features of transformers' `get_image_features`, which are a tensor or, in later versions, in an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def resized(images: Tensor, side: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Images [batch, 3, height, width] in [-1, 1], preprocessed as for CLIP's training: shorter side resized to `side`
    (bicubic, with antialiasing), centre cropped, normalised. Values outside of [-1, 1] are clipped, as in a picture on disk."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [max(side, round(length * scale)) for length in (height, width)]
    x = F.interpolate((images.clamp(-1, 1) + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    x = x[..., top : top + side, left : left + side]
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
