"""Tiny image models with random weights, written to disk as the real ones are: no training, no data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model
from tiltflow.models.model_folder import ClassifierConfig, save_model
from tiltflow.networks.residual_classifier import ResidualClassifier
from tiltflow.networks.unet import Unet
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import dump_yaml
from tiltflow.streams import new_network
from tiltflow.training.batch import Batch

UNET = Unet(channels=(8, 8), blocks=(1, 1), embedding=8)


def tiny_flow(folder: Path) -> Path:
    network = new_network(UNET, 0)
    Model(Flow(network), (1, 8, 8), Sampling(num_inference_steps=4), UNET).save(folder)
    return folder


def tiny_classifier(folder: Path, seed: int = 1) -> Path:
    settings = ResidualClassifier(channels=(8, 8), classes=3)
    config = ClassifierConfig(network=settings, class_names=("a", "b", "c"))
    save_model(folder, config, new_network(settings, seed), "")
    return folder


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of a second, on models in `folder`."""
    tree = {
        "description": "tiny",
        "model": str(tiny_flow(folder / "flow")),
        "reward": {"name": "class-log-odds", "classifier": str(tiny_classifier(folder / "classifier")), "classes": [0]},
        "method": {"name": "adjoint-matching", "num_inference_steps": 4, "beta": 0.1},
        "training": {"max_train_steps": 4, "train_batch_size": 4, "ema_decay": 0.5},
        "sampling": {"num_inference_steps": 4},
        "evaluation": {
            "num_samples": 32,
            "judge": str(tiny_classifier(folder / "judge", 2)),
            "group": [0, 2],
            "grid": 4,
            "batch_size": 16,
        },
    } | changes
    if "method" not in changes:
        tree.setdefault("optimizer", {"learning_rate": 1e-3})
    path = folder / "recipe.yaml"
    path.write_text(dump_yaml(tree))
    return path


def iterate(
    method: Any, tuned: Any, base: Any, reward: Any, x: Tensor, generator: torch.Generator, state: Any, **options: Any
) -> Iterator[dict[str, float]]:
    """The optimizer steps of a method on one batch."""
    updates: Iterator[dict[str, float]] = method.gradients(Batch(x, tuned, base, reward, generator, **options), state)
    return updates
