"""Networks on the CPU while nothing needs them: who is where when, and the same bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from tiny_pipelines import tiny_pipeline

import tiltflow
from tiltflow import offload
from tiltflow.models.text_to_image import TextToImage
from tiltflow.offload import networks_in
from tiltflow.training.batch import Batch

PROMPTS = ["a red cat", "a blue dog"]


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def score(self, images: Tensor) -> Tensor:  # not `forward`, which hooks would see
        return images.mean((2, 3)) @ self.weight


def tuned_weights(folder: Path, reward: Any, adapter: Any = None, **training: Any) -> list[Tensor]:
    model = tiltflow.from_diffusers(tiny_pipeline("stable-diffusion", folder), height=16, width=16)
    settings = tiltflow.Training(
        max_train_steps=2, prompts_per_step=2, num_generations=1, guidance_mode="none", micro_batch_size=1, **training
    )
    method = tiltflow.AdjointMatching(num_inference_steps=2)
    tuned = tiltflow.tune(model, reward, method, settings, conditions=PROMPTS, adapter=adapter)
    return [parameter.detach().clone() for parameter in tuned.denoiser.parameters()]


def test_each_network_is_on_the_device_while_it_is_needed_and_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the moves, as there is one device here."""
    network, there, begun, scored, learned = Mean(), set[str](), list[bool](), list[set[str]](), list[set[str]]()

    def reward(images: Tensor) -> Tensor:
        scored.append(set(there))
        return network.score(images)

    def move(part: nn.Module, device: Any) -> None:
        begun.append(True)
        (there.discard if device == "cpu" else there.add)(type(part).__name__)

    accumulate = Batch._accumulate

    def accumulating(batch: Batch, terms_of: Any, *sizes: Any, **named: Any) -> Any:
        def terms(part: slice) -> Any:
            learned.append(set(there))
            return terms_of(part)

        return accumulate(batch, terms, *sizes, **named)

    expected = tuned_weights(tmp_path, reward)
    assert not begun  # it is off by default
    scored.clear()
    monkeypatch.setattr(offload, "move", move)
    monkeypatch.setattr(Batch, "_accumulate", accumulating)
    found = tuned_weights(tmp_path, reward, offload=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    of_training = [names for names in scored if names]
    assert len(of_training) == 4 < len(scored)  # the first is a rehearsal, before training begins
    assert all({"Mean", "AutoencoderKL"} <= names for names in of_training)
    assert learned == 4 * [set()]
    assert there == {"Mean", "AutoencoderKL", "Denoiser"}  # afterwards all are back


def test_the_frozen_weights_of_an_adapter_make_room_for_the_scorers_and_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are moved, for one device stands in for two: what is read of a weight that is away is not a number."""
    scored, away, kept = list[bool](), list[bool](), dict[int, Tensor]()

    def reward(images: Tensor) -> Tensor:
        scored.append(bool(kept))
        return images.mean((1, 2, 3))

    def move_frozen(network: nn.Module, device: Any) -> None:
        frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
        if device == "cpu":
            assert not kept
            kept.update({id(parameter): parameter.data for parameter in frozen})
            away.append(len(frozen) < len(list(network.parameters())))
        for parameter in frozen:
            whole = kept[id(parameter)]
            parameter.data = torch.full_like(whole, torch.nan) if device == "cpu" else whole
        if device != "cpu":
            kept.clear()

    expected = tuned_weights(tmp_path, reward, tiltflow.Adapter(rank=2))
    scored.clear()
    monkeypatch.setattr(offload, "move_frozen", move_frozen)
    model_device = torch.device("cpu", 0)  # another name than that of where they make room
    monkeypatch.setattr(TextToImage, "device", property(lambda self: model_device))
    found = tuned_weights(tmp_path, reward, tiltflow.Adapter(rank=2), offload=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert away == 4 * [True]
    assert scored == [False, *4 * [True]]  # the first is a rehearsal
    assert not kept


def test_networks_of_a_reward_are_found_where_it_holds_them() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)

    class Holder:
        def __init__(self) -> None:
            self.parts = {"a": [one], "myself": self}

        def score(self, x: Tensor) -> Tensor:
            return x

    def closed(x: Tensor, *, also: nn.Module = other) -> Tensor:
        return holder.score(x)

    holder = Holder()
    for thing in (closed, partial(closed), [closed]):
        assert {id(network) for network in networks_in(thing)} == {id(one), id(other)}
    assert networks_in(holder.score) == [one]
    assert networks_in(lambda x: x) == []
