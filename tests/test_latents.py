"""Models of latents: pretraining of an autoencoder and a flow, decoding, saving, and runs that tune them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.consistency import consistency
from tiltflow.models.model import Model, load
from tiltflow.models.model_folder import DECODER
from tiltflow.networks.image_decoder import ImageDecoder, ImageDecoderModule
from tiltflow.networks.residual_mlp import ResidualMlp
from tiltflow.pretraining.loop import Optimization, train
from tiltflow.pretraining.run import run_pretraining
from tiltflow.pretraining.tasks.latent_flow import LatentFlowPretraining, autoencoder_loss, drawn, latents_of
from tiltflow.runs.fingerprints import digest
from tiltflow.runs.recipe import find_recipe, read_one_run, read_recipe_tree
from tiltflow.runs.run import evaluate_run, run
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network, stream

TINY = {
    "network": {"name": "residual-mlp", "dimension": 2, "hidden": 16, "blocks": 1},
    "encoder": {"image_size": 8, "latents": 2, "channels": 4},
    "decoder": {"image_size": 8, "latents": 2, "channels": 4},
}
FEW = Sampling(solver="heun", num_inference_steps=4)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Dark and bright images, 8x8."""
    rng = np.random.default_rng(0)
    bright = rng.integers(0, 2, 64)
    images = (bright[:, None, None] * 150 + rng.integers(0, 100, (64, 8, 8))).astype(np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=bright, x_test=images[:32], y_test=bright[:32])
    return tmp_path / "data.npz"


def tiny_latent_model(**changes: Any) -> Model:
    network, decoder = ResidualMlp(dimension=2, hidden=16, blocks=1), ImageDecoder(image_size=8, latents=2, channels=4)
    model = Model(
        Flow(new_network(network, 0).eval()),
        (2,),
        FEW,
        network,
        decoder=new_network(decoder, 1).requires_grad_(False).eval(),
        decoder_settings=decoder,
    )
    return replace(model, **changes)


# ---- the model ----


def test_samples_are_decoded_states_and_are_saved_with_their_decoder(tmp_path: Path) -> None:
    model = tiny_latent_model()
    assert isinstance(model.decoder, nn.Module)
    assert (model.event_shape, model.sample_shape, model.has_decoder) == ((2,), (1, 8, 8), True)
    states = replace(model, decoder=None).sample(6, seed=1)
    assert states.shape == (6, 2)
    x = model.sample(6, seed=1)
    torch.testing.assert_close(x, model.decoder(states))
    assert not x.requires_grad
    model.save(tmp_path / "m")
    again = tiltflow.load(tmp_path / "m")
    assert torch.equal(again.sample(6, seed=1), x)
    before = digest(tmp_path / "m")
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
    model.save(tmp_path / "other")
    assert digest(tmp_path / "other") != before  # the decoder is a part of what a model is
    (tmp_path / "m" / DECODER).unlink()
    with pytest.raises(InputError, match=r"decoder\.safetensors: the weights cannot be read"):
        load(tmp_path / "m")


def test_the_gradient_through_the_decoder_does_not_depend_on_its_parts() -> None:
    model = tiny_latent_model()
    gradients = []
    for size in (0, 2, 5):
        states = torch.randn(5, 2, generator=stream(0, "states")).requires_grad_()
        model.decode(states, batch_size=size).square().sum().backward()
        gradients.append(states.grad)
    assert gradients[0] is not None
    assert gradients[0].abs().min() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_a_model_is_checked_in_its_latents() -> None:
    """Whatever they are decoded into: the field of latents that are N(0, 1) is right, and minus it is not."""

    def exact(x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None]
        return x * (2 * t - 1) / (t**2 + (1 - t) ** 2)

    model = Model(Flow(exact), (2,), decoder=lambda z: z.mean(1, keepdim=True))
    assert not consistency(model).wrong
    assert consistency(replace(model, flow=Flow(lambda x, time: -exact(x, time)))).wrong


def test_mistakes_about_decoders() -> None:
    with pytest.raises(InputError, match="decoder must be a function of states, such as a torch module, got 3"):
        tiny_latent_model(decoder=3)
    with pytest.raises(InputError, match="this model's decoder is not one of tiltflow's own"):
        tiny_latent_model(decoder=lambda z: z).save("nowhere")

    def broken(z: Tensor) -> Tensor:
        raise ValueError("no such picture")

    with pytest.raises(InputError, match="the model's decoder raised ValueError: no such picture"):
        tiny_latent_model(decoder=broken).sample(2)


def test_a_run_tunes_latents_and_is_measured_and_sampled_from_its_folder(tmp_path: Path) -> None:
    """Only the flow learns: the decoder of the tuned model is that of the base."""
    model = tiny_latent_model()
    model.save(tmp_path / "latents")
    changes: dict[str, Any] = {"model": str(tmp_path / "latents"), "sampling": FEW.model_dump()}
    path = tiny_recipe(tmp_path, **changes)
    summary = run(read_one_run(read_recipe_tree(path, []), str(path)), tmp_path / "run")
    assert math.isfinite(summary["reward_tuned"])
    tuned = tiltflow.load(tmp_path / "run")
    assert isinstance(tuned.decoder, nn.Module)
    for new, old in zip(tuned.decoder.parameters(), model.decoder.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(new, old)
    assert not torch.equal(tuned.sample(4), model.sample(4))
    assert evaluate_run(tmp_path / "run")["reward_tuned"] == summary["reward_tuned"]


@pytest.mark.slow
def test_the_demo_reaches_its_law_at_the_temperature_that_it_states(tmp_path: Path) -> None:
    """A quarter of its steps."""
    tree = read_recipe_tree(find_recipe("digits-even", "train"), ["training.max_train_steps=640", "evaluation.grid=16"])
    summary = run(read_one_run(tree, "digits-even"), tmp_path / "run")
    judge = summary["judge"]
    assert summary["working_beta"] is None
    assert summary["target_distance_base"] > 10 * summary["target_distance_floor"]
    assert summary["target_distance"] < 1.5 * summary["target_distance_floor"]
    assert abs(judge["group"]["tuned"] - judge["group"]["target"]) < 0.03
    assert judge["sure_tuned"] > judge["sure_base"] - 0.005


# ---- networks ----


def test_a_residual_perceptron_begins_at_zero_and_sees_the_time_and_each_sample_alone() -> None:
    network = ResidualMlp(dimension=3, hidden=16, blocks=2).build()
    x, t = torch.randn(5, 3, generator=stream(0, "x")), torch.linspace(0, 1, 5)
    assert not network(x, t).any()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=stream(0, "weights"))
    out = network(x, t)
    torch.testing.assert_close(network(x[:2], t[:2]), out[:2])
    assert (network(x, t + 0.01) - out).abs().amin(1).min() > 0
    assert (network(x, 1 - t)[[0, 1, 3, 4]] - out[[0, 1, 3, 4]]).abs().amax(1).min() > 1e-3  # no period within the path


# ---- pretraining ----


class FixedEncoder(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(images), 2), 0.7), torch.full((len(images), 2), -0.4)


class FixedDecoder(ImageDecoderModule):
    """Log-odds that do not depend on the latents."""

    def __init__(self, log_odds: Tensor):
        super().__init__(ImageDecoder(image_size=4, latents=2, channels=4))
        self.fixed = log_odds

    def log_odds(self, z: Tensor) -> Tensor:
        self.seen = z
        return self.fixed


def test_the_loss_of_the_autoencoder_is_cross_entropy_and_the_kl_of_the_latents(double: None) -> None:
    log_odds = torch.randn(3, 1, 4, 4, generator=stream(0, "x")).requires_grad_()
    decoder, images = FixedDecoder(log_odds), 2 * torch.rand(3, 1, 4, 4, generator=stream(0, "y")) - 1
    loss = autoencoder_loss(FixedEncoder(), decoder, images, stream(0, "noise"), 0.5)
    white, p = (images + 1) / 2, torch.sigmoid(log_odds)
    entropy = -(white * p.log() + (1 - white) * (1 - p).log()).sum()
    mean, std = torch.tensor(0.7), torch.tensor(-0.4).exp().sqrt()
    kl = 3 * 2 * kl_divergence(Normal(mean, std), Normal(torch.tensor(0.0), torch.tensor(1.0)))
    torch.testing.assert_close(loss, (entropy + 0.5 * kl) / images.numel())
    many = FixedDecoder(torch.zeros(20_000, 1, 4, 4))
    autoencoder_loss(FixedEncoder(), many, torch.zeros(20_000, 1, 4, 4), stream(0, "noise"), 0.5)
    assert (many.seen.mean(0) - mean).abs().max() < 4 * std / 20_000**0.5
    assert (many.seen.std(0) - std).abs().max() < 4 * std / 40_000**0.5
    # the image of a decoder is where its loss is least
    own = decoder(torch.zeros(3, 2)).detach()
    (slope,) = torch.autograd.grad(autoencoder_loss(FixedEncoder(), decoder, own, stream(0, "noise"), 0.5), log_odds)
    assert slope.abs().max() < 1e-12


def test_latents_are_those_of_the_encoder_in_the_order_of_the_images() -> None:
    class Encoder(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            mean = images.flatten(1)[:, :1]
            return mean, 2 * math.log(0.5) + 0 * mean

    images = torch.arange(1200.0).reshape(-1, 1, 1, 1)
    means, deviations = latents_of(Encoder(), images)
    assert means[:, 0].tolist() == images.flatten().tolist()
    torch.testing.assert_close(deviations, torch.full_like(deviations, 0.5))
    z = drawn(torch.full((40_000, 1), 3.0), torch.full((40_000, 1), 0.5), stream(0, "latents"))
    assert abs(z.mean() - 3) < 4 * 0.5 / 200
    assert abs(z.std() - 0.5) < 4 * 0.5 / (2 * 40_000) ** 0.5


def test_an_autoencoder_and_a_flow_learn_and_are_written(npz: Path, tmp_path: Path) -> None:
    """Bright and dark images come back as they are, and samples of the flow are some of each."""
    steps = {"max_train_steps": 200, "train_batch_size": 64, "learning_rate": 1e-2, "lr_warmup_steps": 5, "ema_decay": 0.9}
    recipe = LatentFlowPretraining.model_validate(TINY | {"kl_weight": 0.1, "autoencoder": steps, "training": steps})
    scores = run_pretraining(recipe, npz, tmp_path / "m", name="mine")
    assert set(scores) == {"autoencoder_loss", "flow_loss"}
    model = load(tmp_path / "m")
    assert (model.event_shape, model.sample_shape) == ((2,), (1, 8, 8))
    light = model.sample(400, sampling=Sampling(solver="heun", num_inference_steps=10)).mean((1, 2, 3))
    data = torch.from_numpy(np.load(npz)["x_train"]).double().mean((1, 2)) / 127.5 - 1
    bright = (data > 0).double().mean().item()
    assert abs((light > 0).double().mean() - bright) < 0.1
    for side in (True, False):
        assert abs(light[(light > 0) == side].mean() - data[(data > 0) == side].mean()) < 0.08
    card = (tmp_path / "m" / "README.md").read_text()
    assert "autoencoder 200 steps of 64 samples, flow 200 steps of 64 samples" in card
    assert "residual-mlp" in card
    assert "image-decoder" in card
    assert json.loads((tmp_path / "m" / "config.json").read_text())["decoder"]["latents"] == 2


def test_the_same_seed_is_the_same_model_bit_for_bit(npz: Path) -> None:
    recipe = LatentFlowPretraining.model_validate(TINY)
    few = recipe.model_copy(update=dict.fromkeys(("autoencoder", "training"), Optimization(max_train_steps=2)))
    weights = []
    for _ in range(2):
        task = few.prepare(npz, "cpu")
        assert [progress.stage for progress in train(task.stages(), few.seed)] == ["autoencoder"] * 2 + ["flow"] * 2
        weights.append(torch.cat([p.flatten() for network in task.networks.values() for p in network.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"latents": 2}}, r"images are \[1, 8, 8\], those of encoder are \[1, 28, 28\]"),
        ({"decoder": {"image_size": 8, "latents": 3}}, "encoder.latents is 2, decoder.latents 3"),
        ({"network": {"name": "residual-mlp", "dimension": 5}}, r"network: must take latents \[batch, 2\]"),
        ({"network": {"name": "unet"}}, r"network: must take latents \[batch, 2\]"),
        ({"judge": "digits-judge"}, r"judge digits-judge: does not take samples of shape \[1, 8, 8\]"),
    ],
)
def test_parts_that_do_not_fit_are_found_before_training(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("tiltflow.pretraining.run.train", lambda *arguments: pytest.fail("trained"))
    with pytest.raises(InputError, match=message) as error:
        run_pretraining(LatentFlowPretraining.model_validate(TINY | changes), npz, tmp_path / "m", name="mine")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists()
