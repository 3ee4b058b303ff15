"""Small scoring models with random weights, on disk, in the formats that are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_pipelines import clip_tokenizer
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

WIDTH, HEAD = 64, 64


def tiny_clip(folder: Path) -> Path:
    """A CLIP model and its tokenizer."""
    tokenizer = clip_tokenizer(folder / "files")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder / "clip"


def tiny_open_clip(folder: Path) -> tuple[Path, Path]:
    """A CLIP model in open_clip's format, as HPS is published, and its tokenizer."""
    tokenizer = clip_tokenizer(folder / "files")
    tokenizer.save_pretrained(folder / "open-clip-tokenizer")
    generator, width = torch.Generator().manual_seed(3), 128
    weights: dict[str, Tensor] = {}

    def normal(name: str, *shape: int) -> None:
        weights[name] = torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.3)

    def tower(prefix: str) -> None:
        for i in range(2):
            block = f"{prefix}transformer.resblocks.{i}"
            for name in ("ln_1", "ln_2"):
                normal(f"{block}.{name}.weight", width)
                normal(f"{block}.{name}.bias", width)
            for name, *shape in (
                ("attn.in_proj_weight", 3 * width, width), ("attn.in_proj_bias", 3 * width),
                ("attn.out_proj.weight", width, width), ("attn.out_proj.bias", width),
                ("mlp.c_fc.weight", 96, width), ("mlp.c_fc.bias", 96),
                ("mlp.c_proj.weight", width, 96), ("mlp.c_proj.bias", width),
            ):  # fmt: skip
                normal(f"{block}.{name}", *shape)  # type: ignore[arg-type]

    normal("visual.conv1.weight", width, 3, 8, 8)
    normal("visual.class_embedding", width)
    normal("visual.positional_embedding", 17, width)
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        normal(f"{name}.weight", width)
        normal(f"{name}.bias", width)
    tower("visual.")
    normal("visual.proj", width, 12)
    normal("token_embedding.weight", len(tokenizer), width)
    normal("positional_embedding", 77, width)
    tower("")
    normal("text_projection", width, 12)
    weights["logit_scale"] = torch.tensor(4.6)
    torch.save({"epoch": 3, "state_dict": weights}, folder / "hps.pt")
    return folder / "hps.pt", folder / "open-clip-tokenizer"


def tiny_aesthetic_head(folder: Path, width: int = 12) -> Path:
    """Its layers, as the authors' file has them."""
    generator, sizes = torch.Generator().manual_seed(1), (width, 8, 6, 5, 4, 1)
    weights = {}
    for i, a, b in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        weights[f"layers.{i}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        weights[f"layers.{i}.bias"] = torch.randn(b, generator=generator)
    torch.save(weights, folder / "head.pth")
    return folder / "head.pth"


def tiny_image_reward(folder: Path) -> tuple[Path, Path]:
    """The authors' tensors, small, as safetensors, and a tokenizer."""
    generator = torch.Generator().manual_seed(2)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)

    weights: dict[str, Tensor] = {}

    def linear(name: str, inside: int, outside: int) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = normal(outside, inside), normal(outside)

    def norm(name: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + normal(WIDTH), normal(WIDTH)

    v = "blip.visual_encoder"
    weights[f"{v}.cls_token"], weights[f"{v}.pos_embed"] = normal(1, 1, WIDTH), normal(1, 5, WIDTH)
    weights[f"{v}.patch_embed.proj.weight"], weights[f"{v}.patch_embed.proj.bias"] = normal(WIDTH, 3, 8, 8), normal(WIDTH)
    for i in range(2):
        linear(f"{v}.blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{v}.blocks.{i}.attn.proj", WIDTH, WIDTH)
        linear(f"{v}.blocks.{i}.mlp.fc1", WIDTH, 80)
        linear(f"{v}.blocks.{i}.mlp.fc2", 80, WIDTH)
        norm(f"{v}.blocks.{i}.norm1")
        norm(f"{v}.blocks.{i}.norm2")
    norm(f"{v}.norm")
    t = "blip.text_encoder"
    weights[f"{t}.embeddings.word_embeddings.weight"] = normal(len(words), WIDTH)
    weights[f"{t}.embeddings.position_embeddings.weight"] = normal(40, WIDTH)
    weights[f"{t}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{t}.embeddings.LayerNorm")
    for i in range(2):
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                linear(f"{t}.encoder.layer.{i}.{attention}.self.{part}", WIDTH, WIDTH)
            linear(f"{t}.encoder.layer.{i}.{attention}.output.dense", WIDTH, WIDTH)
            norm(f"{t}.encoder.layer.{i}.{attention}.output.LayerNorm")
        linear(f"{t}.encoder.layer.{i}.intermediate.dense", WIDTH, 80)
        linear(f"{t}.encoder.layer.{i}.output.dense", 80, WIDTH)
        norm(f"{t}.encoder.layer.{i}.output.LayerNorm")
    for i, a, b in ((0, WIDTH, 10), (2, 10, 8), (4, 8, 6), (6, 6, 4), (7, 4, 1)):
        linear(f"mlp.layers.{i}", a, b)
    save_file(weights, folder / "ImageReward.safetensors")

    tokenizer = folder / "bert"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join(words) + "\n")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    BertTokenizer(str(tokenizer / "vocab.txt")).save_pretrained(tokenizer)
    return folder / "ImageReward.safetensors", tokenizer
