"""The rewards by scoring models against their formulas, on small random weights: an own forward pass, Pillow, transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
from tiny_scorers import HEAD, WIDTH, tiny_aesthetic_head, tiny_clip, tiny_image_reward, tiny_open_clip

from tiltflow.errors import InputError
from tiltflow.rewards.aesthetic import Aesthetic
from tiltflow.rewards.backbones.clip import MEAN, STD, Clip, resized
from tiltflow.rewards.clip_score import ClipScore
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.rewards.functions.prompted import given
from tiltflow.rewards.hps import Hps
from tiltflow.rewards.image_reward import ImageReward, read_weights
from tiltflow.rewards.named_colour import NamedColour
from tiltflow.rewards.pick_score import PickScore
from tiltflow.streams import stream

PROMPTS = ["a red cat", "two dogs"]


def pictures(count: int = 2, height: int = 40, width: int = 48) -> Tensor:
    """Smooth ones: pixels that jump lose to the rounding of a file."""
    coarse = torch.rand(count, 3, 6, 6, generator=stream(0, "pictures")) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(-1, 1)


def test_pictures_are_shown_as_pillow_would_resize_them() -> None:
    for height, width in ((40, 48), (100, 64), (20, 20)):
        images = pictures(2, height, width)
        for image, found in zip(images, resized(images, 32), strict=True):
            scale = 32 / min(height, width)
            pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            size = (max(32, round(width * scale)), max(32, round(height * scale)))
            small = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
            expected = torch.from_numpy(np.asarray(small.crop((left, top, left + 32, top + 32))) / 255).permute(2, 0, 1)
            back = found * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
            assert (back - expected).abs().max() < 2.5 / 255


def test_similarities_are_those_of_transformers(tmp_path: Path) -> None:
    """CLIPModel's own logits are exp(logit_scale) cos, which is PickScore; HPS is the cosine, CLIPScore a hundred times it."""
    path = str(tiny_clip(tmp_path))
    clip = Clip.load(path)
    tokens = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clip.model(pixel_values=resized(pictures(), 32), **tokens).logits_per_image.diagonal()
    cosines = logits / clip.model.logit_scale.exp()
    rewards: dict[Any, Tensor] = {
        PickScore(model=path, tokenizer=None): logits,
        Hps(model=path, tokenizer=None): cosines,
        ClipScore(model=path): 100 * cosines,
    }
    for settings, expected in rewards.items():
        found = given(settings.build(), PROMPTS)(pictures())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cosines[0] != cosines[1]


def test_prompts_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, read = Clip.load(str(tiny_clip(tmp_path))), []
    original = clip.model.get_text_features
    monkeypatch.setattr(
        clip.model, "get_text_features", lambda **tokens: read.append(len(tokens["input_ids"])) or original(**tokens)
    )
    clip.text_features(["a", "b", "a"])
    clip.text_features(["b", "c"])
    assert read == [2, 1]


def test_the_aesthetic_rating_is_that_of_its_layers(tmp_path: Path) -> None:
    path, head = str(tiny_clip(tmp_path)), tiny_aesthetic_head(tmp_path)
    weights: dict[str, Tensor] = torch.load(head, weights_only=True)
    x = Clip.load(path).image_features(pictures())
    torch.testing.assert_close(x.norm(dim=1), torch.ones(2))
    for i in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{i}.weight"].T + weights[f"layers.{i}.bias"]
    torch.testing.assert_close(Aesthetic(model=path, head=str(head)).build()(pictures()), x[:, 0])


def test_the_real_aesthetic_head_is_read() -> None:
    path = Path(__file__).parents[2] / "shared/data/weights/aesthetic_sac+logos+ava1-l14-linearMSE.pth"
    if not path.exists():
        pytest.skip("the published weights are not on this machine")
    from tiltflow.rewards.aesthetic import load_head

    head = load_head(path)
    assert [layer.out_features for layer in head] == [1024, 128, 64, 16, 1]  # type: ignore[union-attr]


# ---- ImageReward, by hand ----


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One head of width 64."""
    scores = q @ k.mT / HEAD**0.5
    return (scores if mask is None else scores.masked_fill(~mask[:, None, :], -torch.inf)).softmax(-1) @ v


def by_hand(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    v = "blip.visual_encoder"
    x = F.conv2d(pixels, weights[f"{v}.patch_embed.proj.weight"], weights[f"{v}.patch_embed.proj.bias"], stride=8)
    x = torch.cat([weights[f"{v}.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + weights[f"{v}.pos_embed"]
    for i in range(2):
        block = f"{v}.blocks.{i}"
        x = x + linear(
            f"{block}.attn.proj", attention(*linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1))
        )
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{v}.norm", x, 1e-6)

    t = "blip.text_encoder"
    y = (
        weights[f"{t}.embeddings.word_embeddings.weight"][ids]
        + weights[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    )
    y = norm(f"{t}.embeddings.LayerNorm", y, 1e-12)
    for i in range(2):
        layer = f"{t}.encoder.layer.{i}"
        for name, other, their_mask in (("attention", None, mask), ("crossattention", seen, None)):
            source = y if other is None else other
            q, k, w = (
                linear(f"{layer}.{name}.self.{part}", z) for part, z in (("query", y), ("key", source), ("value", source))
            )
            y = norm(
                f"{layer}.{name}.output.LayerNorm",
                y + linear(f"{layer}.{name}.output.dense", attention(q, k, w, their_mask)),
                1e-12,
            )
        inner = F.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", y + linear(f"{layer}.output.dense", inner), 1e-12)
    z = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        z = linear(f"mlp.layers.{i}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_the_published_computation(tmp_path: Path) -> None:
    path, tokenizer = tiny_image_reward(tmp_path)
    weights, images = load_file(path), pictures()
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    expected = by_hand(weights, resized(images, 16), words.input_ids, words.attention_mask.bool())
    reward = ImageReward(model=str(path), tokenizer=str(tokenizer)).build()
    torch.testing.assert_close(given(reward, PROMPTS)(images), expected, rtol=1e-4, atol=1e-4)
    assert (given(reward, PROMPTS[::-1])(images) - expected).abs().min() > 1e-3


# ---- HPS from open_clip's file, by hand ----


def tower(weights: dict[str, Tensor], prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Blocks of a transformer with torch's own attention, which is what open_clip has."""
    for i in range(2):
        part = {k.removeprefix(f"{prefix}transformer.resblocks.{i}."): v for k, v in weights.items()}
        attend = torch.nn.MultiheadAttention(128, 2, batch_first=True)
        attend.load_state_dict({k.removeprefix("attn."): v for k, v in part.items() if k.startswith("attn.")})
        y = F.layer_norm(x, (128,), part["ln_1.weight"], part["ln_1.bias"])
        x = x + attend(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.layer_norm(x, (128,), part["ln_2.weight"], part["ln_2.bias"])
        y = F.gelu(y @ part["mlp.c_fc.weight"].T + part["mlp.c_fc.bias"])
        x = x + y @ part["mlp.c_proj.weight"].T + part["mlp.c_proj.bias"]
    return x


def test_hps_is_the_published_computation(tmp_path: Path) -> None:
    path, tokenizer = tiny_open_clip(tmp_path)
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    images = pictures()
    with torch.no_grad():
        x = F.conv2d(resized(images, 32), weights["visual.conv1.weight"], stride=8).flatten(2).mT
        x = torch.cat([weights["visual.class_embedding"].expand(2, 1, -1), x], 1) + weights["visual.positional_embedding"]
        x = F.layer_norm(x, (128,), weights["visual.ln_pre.weight"], weights["visual.ln_pre.bias"])
        x = tower(weights, "visual.", x, None)[:, 0]
        x = F.layer_norm(x, (128,), weights["visual.ln_post.weight"], weights["visual.ln_post.bias"]) @ weights["visual.proj"]

        from transformers import CLIPTokenizer

        words = CLIPTokenizer.from_pretrained(tokenizer)
        ids = torch.zeros(2, 77, dtype=torch.long)  # open_clip fills up with 0
        for row, prompt in zip(ids, PROMPTS, strict=True):
            tokens = words(prompt).input_ids
            row[: len(tokens)] = torch.tensor(tokens)
        y = weights["token_embedding.weight"][ids] + weights["positional_embedding"]
        y = tower(weights, "", y, torch.full((77, 77), -torch.inf).triu(1))
        y = F.layer_norm(y, (128,), weights["ln_final.weight"], weights["ln_final.bias"])
        y = y[torch.arange(2), ids.argmax(1)] @ weights["text_projection"]
    expected = F.cosine_similarity(x, y)
    reward = Hps(model=str(path), tokenizer=str(tokenizer)).build()
    torch.testing.assert_close(given(reward, PROMPTS)(images), expected, rtol=1e-4, atol=1e-5)
    assert expected[0] != expected[1]


def test_the_versions_of_hps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own published file, which is looked for where the process runs."""
    monkeypatch.chdir(tmp_path)
    assert [Hps(**given).model for given in ({}, {"version": "v2"}, {"model": "mine"})] == [  # type: ignore[arg-type]
        "HPS_v2.1_compressed.pt",
        "HPS_v2_compressed.pt",
        "mine",
    ]
    with pytest.raises(InputError, match=r"there is no file HPS_v2_compressed.pt; it is one of xswu/HPSv2 on the hub"):
        Hps(version="v2").build()
    with pytest.raises(InputError, match=r"model a/HPS_v2_compressed.pt is HPS v2, not v2.1; set version: v2"):
        Hps(model="a/HPS_v2_compressed.pt")
    path, tokenizer = tiny_open_clip(tmp_path)
    path.rename(tmp_path / "HPS_v2_compressed.pt")
    assert given(Hps(version="v2", tokenizer=str(tokenizer)).build(), PROMPTS)(pictures()).shape == (2,)


def test_gradients_are_those_of_finite_differences(tmp_path: Path) -> None:
    """In float64: the second-order error of the difference is all that is left."""
    clip, (blip, bert), (hps, words) = str(tiny_clip(tmp_path)), tiny_image_reward(tmp_path), tiny_open_clip(tmp_path)
    rewards: list[Any] = [
        ClipScore(model=clip, dtype="float64"),
        PickScore(model=clip, tokenizer=None, dtype="float64"),
        Hps(model=str(hps), tokenizer=str(words), dtype="float64"),
        Aesthetic(model=clip, head=str(tiny_aesthetic_head(tmp_path)), dtype="float64"),
        ImageReward(model=str(blip), tokenizer=str(bert), dtype="float64"),
        NamedColour(),
    ]
    images = pictures().double() * 0.9  # inside the cut
    direction = torch.randn(images.shape, generator=stream(0, "direction"), dtype=torch.float64)
    for settings in rewards:
        reward = given(settings.build(), PROMPTS if settings.name != "named-colour" else ["a red cat", "a blue dog"])
        value, gradient = value_and_gradient(reward, images)
        assert value.dtype == gradient.dtype == torch.float64
        h = 1e-5
        difference = (reward(images + h * direction) - reward(images - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), difference, rtol=1e-5, atol=1e-8)
        assert difference.abs().min() > 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_is_near(dtype: Any, tmp_path: Path) -> None:
    path = str(tiny_clip(tmp_path))
    exact, half = (given(ClipScore(model=path, dtype=d).build(), PROMPTS)(pictures()) for d in ("float32", dtype))
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 3


# ---- what cannot work ----


def test_weights_that_are_missing_or_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CLIP model nowhere/clip: cannot be loaded"):
        ClipScore(model="nowhere/clip").build()
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    for name, message in (
        ("x.safetensors", "cannot be read"),
        ("none.pt", "cannot be read"),
        ("other.pt", "is not ImageReward"),
    ):
        with pytest.raises(InputError, match=message):
            ImageReward(model=str(tmp_path / name)).build()
    with pytest.raises(InputError, match=r"other.pt: is no CLIP model of open_clip, it has no visual.conv1"):
        Hps(model=str(tmp_path / "other.pt")).build()
    torch.save({"text_projection": torch.ones(1), "visual.conv1.weight": torch.ones(1)}, tmp_path / "part.pt")
    with pytest.raises(InputError, match=r"part.pt: is no CLIP model of open_clip"):
        Hps(model=str(tmp_path / "part.pt")).build()
    clip = str(tiny_clip(tmp_path))
    with pytest.raises(InputError, match="is not the aesthetic predictor"):
        Aesthetic(model=clip, head=str(tmp_path / "other.pt")).build()
    with pytest.raises(InputError, match="takes features of width 7"):
        Aesthetic(model=clip, head=str(tiny_aesthetic_head(tmp_path, 7))).build()


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"blip.visual_encoder.cls_token": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"is refused|cannot be read"):
        ImageReward(model=str(tmp_path / "evil.pt")).build()
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("tensor", ["blip.visual_encoder.cls_token", "mlp.layers.0.weight"])
def test_half_of_image_reward_is_not_it(tensor: str, tmp_path: Path) -> None:
    save_file({tensor: torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="is not ImageReward, it has no"):
        read_weights(tmp_path / "half.safetensors")
