"""Rewards of latents: nothing is decoded for them in training, and they are what they would be through any decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("diffusers")
from tiny_pipelines import tiny_pipeline

import tiltflow
from tiltflow.commands.serve_reward import serve_reward
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.samples import Asked, Instruments, with_latents
from tiltflow.evaluation.settings import Evaluation, Point
from tiltflow.evaluation.table import draw_all
from tiltflow.flows.flow import Flow
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards.function import Function
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient
from tiltflow.rewards.functions.latents import seen_by
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.sum import Sum, WeightedSum
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.base_statistics import LEAST_STD, normalizer
from tiltflow.training.draw import Decoded

ITEMS = [Item("a red cat"), Item("a blue dog")]


class Still(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0 * x


def quadratic(latents: Tensor) -> Tensor:
    return -2 * (latents - 0.3).square().flatten(1).mean(1)


def of_words(prompts: list[str], latents: Tensor) -> Tensor:
    return quadratic(latents) + torch.tensor([float(len(prompt)) for prompt in prompts])


def brightness(images: Tensor) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextToImage:
    folder = tmp_path_factory.mktemp("pipeline")
    return tiltflow.from_diffusers(tiny_pipeline("stable-diffusion", folder), height=16, width=16)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many latents were decoded, call by call."""
    counts, decode = list[int](), TextToImage.decode

    def counted(model: TextToImage, latents: Tensor, **options: Any) -> Tensor:
        counts.append(len(latents))
        return decode(model, latents, **options)

    monkeypatch.setattr(TextToImage, "decode", counted)
    return counts


def test_value_and_gradient_are_those_of_the_latents(model: TextToImage, decoded: list[int]) -> None:
    """The gradient in closed form; in a sum, with that of the pictures through the decoder."""
    x, of_latents = torch.randn(3, *model.event_shape, generator=stream(0)), from_function(quadratic)
    value, gradient = value_and_gradient(Decoded(model, of_latents, 2), x)
    assert_close(value, quadratic(x))
    assert_close(gradient, -4 * (x - 0.3) / x[0].numel())
    assert not decoded
    of_pictures, of_picture = value_and_gradient(Decoded(model, from_function(brightness), 3), x)
    terms: Any = [{"reward": {"name": "function", "path": f"a:{name}"}, "weight": w} for name, w in (("b", 0.5), ("c", 3.0))]
    both = WeightedSum(tuple(zip(Sum(rewards=terms).rewards, (of_latents, from_function(brightness)), strict=True)))
    found = value_and_gradient(Decoded(model, both, 3), x)
    assert_close(found[0], 0.5 * value + 3 * of_pictures)
    assert_close(found[1], 0.5 * gradient + 3 * of_picture)


def test_training_decodes_nothing(model: TextToImage, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rehearsal, whose pictures are drawn for all that looks at them."""
    told = list[tuple[list[str], int]]()

    def reward(latents: Tensor, prompts: list[str]) -> Tensor:
        told.append((list(prompts), len(decoded)))
        return quadratic(latents)

    settings = tiltflow.Training(max_train_steps=2, prompts_per_step=2, num_generations=1, guidance_mode="none")
    method = tiltflow.AdjointMatching(num_inference_steps=2)
    tiltflow.tune(model, reward, method, settings, conditions=[item.text for item in ITEMS])
    assert len(told) > 2
    assert sorted(told[-1][0]) == sorted(item.text for item in ITEMS)
    assert len(decoded) == told[1][1]


def test_an_evaluation_measures_the_latents_of_its_pictures(model: TextToImage) -> None:
    """Of a reward alone, in a sum, and normalised by the base."""
    short = Sampling(solver="euler", num_inference_steps=2)
    options: dict[str, Any] = {"seed": 3, "batch_size": 2, "sampling": short}
    x, latents = with_latents([from_function(of_words)], model, ITEMS, **options)
    assert latents is not None
    assert torch.equal(x, model.draw(ITEMS, **options))
    assert torch.equal(latents, model.sample_latents([item.text for item in ITEMS], **options))
    assert with_latents([brightness], model, ITEMS, **options)[1] is None
    both = Instruments({"words": from_function(of_words), "light": brightness}, None, None, 1, "cpu")
    found = both.scores(x, Asked(tuple(ITEMS), ("a", "b"), "prompt"), latents)
    assert_close(found["words"], quadratic(latents) + torch.tensor([9.0, 10.0]))
    assert_close(found["light"], brightness(x))
    training = tiltflow.Training(per_prompt_normalization=4, guidance_mode="none").for_prompts()
    make = normalizer(training, short, from_function(quadratic), 0)
    assert make is not None
    normalised: Any = make(model)
    mean, std = normalised.statistics(["a red cat"])
    of_base = model.sample_latents(
        ["a red cat"] * 4,
        seed=stream(0, "baseline", "a red cat").initial_seed(),
        sampling=short,
        guidance_scale=1,
        batch_size=16,
    )
    assert_close(mean[0], quadratic(of_base).double().mean())
    assert_close(std[0], quadratic(of_base).double().std() + LEAST_STD)
    found_there = evaluate(Decoded(model, normalised.given(["a red cat"] * 4), 4), of_base)
    assert_close(found_there, ((quadratic(of_base).double() - mean) / std).float())


def test_samples_that_are_kept_are_drawn_again_for_a_reward_that_looks_at_latents(model: TextToImage) -> None:
    asked = Asked(tuple(item for item in ITEMS for _ in range(2)), tuple("ab"), "prompt")
    settings, kept = Evaluation(batch_size=2, points=(Point(solver="euler", num_inference_steps=2),)), dict[int, Any]()

    def of_base(rewards: dict[str, Any], kept: dict[int, Any] | None) -> dict[str, Tensor]:
        instruments = Instruments({name: from_function(reward) for name, reward in rewards.items()}, None, None, 2, "cpu")
        return draw_all(settings, model, model, asked, instruments, seed=3, base_samples=kept)[1][0].rewards

    of_base({"light": brightness}, kept)
    assert kept[0][1] is None
    both = {"light": brightness, "words": of_words}
    assert_close(of_base(both, kept), of_base(both, None))
    assert kept[0][1] is not None


def test_samples_of_a_network_without_a_decoder_are_its_latents() -> None:
    x, reward = torch.randn(4, 2, generator=stream(0)), from_function(quadratic)
    assert seen_by(reward) == {"latents"}
    assert torch.equal(evaluate(reward, x), quadratic(x))
    assert with_latents([reward], tiltflow.Model(Flow(Still()), (2,)), [Item("")] * 3)[1] is None


def test_what_cannot_look_at_latents_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"has the arguments \(images, latents\); it can have the images, .*, or `latents`"):
        from_function(lambda images, latents: images)
    (tmp_path / "mine_of_latents.py").write_text("def mine(latents):\n    return latents.flatten(1).mean(1)\n")
    (tmp_path / "reward.yaml").write_text("reward: {name: function, path: 'mine_of_latents:mine'}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert seen_by(Function(path="mine_of_latents:mine").build()) == {"latents"}
    with pytest.raises(InputError, match="reward function: looks at latents, and pictures are what is sent"):
        serve_reward(tmp_path / "reward.yaml", device="cpu")
