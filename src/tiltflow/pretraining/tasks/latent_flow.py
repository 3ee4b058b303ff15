"""Pretraining of a generative model of images in the latents of a variational autoencoder, which is trained first."""

# Mutation tests: test_latents.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.data import ImageData
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model
from tiltflow.networks.image_decoder import ImageDecoder, ImageDecoderModule
from tiltflow.networks.image_encoder import ImageEncoder
from tiltflow.pretraining.images import batches, load_splits
from tiltflow.pretraining.loop import Optimization, Stage
from tiltflow.pretraining.recipe import Scores
from tiltflow.pretraining.tasks.flow import GenerativePretraining, about_judge, flow_loss, judged, load_judge
from tiltflow.streams import new_network, stream


class LatentFlowPretraining(GenerativePretraining):
    """A variational autoencoder, then a flow of its latents. The encoder is not saved: only training needs it."""

    ELSEWHERE: ClassVar = {
        "prompt_dropout": "a flow of latents is unconditional",
        "latent_channels": "latents are a vector; its length is encoder.latents",
        "vae_channels": "the autoencoder is sized by encoder.channels and decoder.channels",
    }

    task: Literal["latent-flow"] = "latent-flow"
    encoder: ImageEncoder = ImageEncoder()
    """The network from images to latents."""
    decoder: ImageDecoder = ImageDecoder()
    """The network from latents to images."""
    kl_weight: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the KL divergence of an image's latents from a unit Gaussian, in nats, beside the cross-entropy of all pixels:
    1 is the bound on the likelihood; less gives sharper images, and latents with a law of more detail."""
    autoencoder: Optimization = Optimization()
    """Optimizer and schedule of the autoencoder, which is trained first; `training` is that of the flow."""

    @property
    def schedules(self) -> Mapping[str, Optimization]:
        return {"autoencoder": self.autoencoder, "flow": self.training}

    def prepare(self, path: Path, device: str) -> LatentFlowTask:
        data, test = load_splits(path)
        shape = tuple(data.images.shape[1:])
        for part, settings in (("encoder", self.encoder), ("decoder", self.decoder)):
            own = (settings.image_channels, settings.image_size, settings.image_size)
            if own != shape:
                raise InputError(f"{path}: images are {list(shape)}, those of {part} are {list(own)}")
        if self.encoder.latents != self.decoder.latents:
            raise InputError(f"encoder.latents is {self.encoder.latents}, decoder.latents {self.decoder.latents}")
        if self.judge is not None:
            load_judge(self.judge, shape)
        network, encoder, decoder = (
            new_network(each, self.seed).to(device) for each in (self.network, self.encoder, self.decoder)
        )
        z = torch.zeros(2, self.encoder.latents, device=device)
        try:
            fits = network(z, z[:, 0]).shape == z.shape
        except (RuntimeError, TypeError):
            fits = False
        if not fits:
            raise InputError(f"network: must take latents [batch, {self.encoder.latents}], and times, and return such latents")
        return LatentFlowTask(self, network, encoder, decoder, data.to(device), test)


RECIPE = LatentFlowPretraining


@dataclass(frozen=True)
class LatentFlowTask:
    """A flow, an autoencoder, the images that they are trained on, and those that samples are compared with."""

    recipe: LatentFlowPretraining
    network: nn.Module
    encoder: nn.Module
    decoder: nn.Module
    train: ImageData
    test: ImageData

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {self.recipe.network.name: self.network, self.recipe.decoder.name: self.decoder}

    @property
    def model(self) -> Model:
        """The flow and the decoder as a model that can be sampled and saved."""
        recipe = self.recipe
        flow = Flow(self.network, recipe.prediction, recipe.interpolant)
        return Model(
            flow,
            (recipe.encoder.latents,),
            recipe.sampling,
            recipe.network,
            decoder=self.decoder,
            decoder_settings=recipe.decoder,
        )

    def stages(self) -> Iterator[Stage]:
        recipe, images = self.recipe, self.train.images
        generator = stream(recipe.seed, "noise", device=images.device)
        order = batches(len(images), recipe.autoencoder.train_batch_size, stream(recipe.seed, "order"))
        decoder = cast(ImageDecoderModule, self.decoder)
        parts = (self.encoder, self.decoder)
        yield Stage(
            "autoencoder",
            parts,
            recipe.autoencoder,
            lambda: autoencoder_loss(self.encoder, decoder, images[next(order).to(images.device)], generator, recipe.kl_weight),
        )
        means, deviations = latents_of(self.encoder, images)
        count, device = recipe.training.train_batch_size, images.device

        def loss() -> Tensor:
            index = torch.randint(len(means), (count,), generator=generator, device=device)
            return flow_loss(recipe, self.network, drawn(means[index], deviations[index], generator), generator)

        yield Stage("flow", (self.network,), recipe.training, loss)

    def save(self, folder: Path, card: str) -> None:
        self.model.save(folder, card)

    def scores(self) -> Scores:
        return {} if self.recipe.judge is None else judged(self.model, self.recipe.judge, self.test)

    def data(self) -> str:
        return f"{len(self.train):,} training images"

    def remarks(self) -> list[str]:
        return about_judge(self.recipe.judge)


def drawn(means: Tensor, deviations: Tensor, generator: torch.Generator) -> Tensor:
    """Latents [batch, latents] of images, from the Gaussian of each."""
    noise = torch.randn(means.shape, generator=generator, device=means.device)
    return means + deviations * noise


def autoencoder_loss(
    encoder: nn.Module, decoder: ImageDecoderModule, images: Tensor, generator: torch.Generator, kl_weight: float
) -> Tensor:
    """Cross-entropy of the pixels, whose grey is the probability of white, and `kl_weight` times the KL divergence of the
    latents from N(0, 1), per pixel: with 1 the negative evidence lower bound (Kingma and Welling, 1312.6114, eq. 10).

    Args:
        images: [batch, channels, height, width] in [-1, 1].
    """
    mean, log_variance = encoder(images)
    log_odds = decoder.log_odds(drawn(mean, (log_variance / 2).exp(), generator))
    kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
    entropy = F.binary_cross_entropy_with_logits(log_odds, (images + 1) / 2)
    total: Tensor = entropy + kl_weight * kl / images.numel()
    return total


@torch.no_grad()
def latents_of(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations [images, latents] of the latents of all images."""
    means, log_variances = zip(*(encoder(part) for part in images.split(500)), strict=True)
    return torch.cat(means), (torch.cat(log_variances) / 2).exp()
