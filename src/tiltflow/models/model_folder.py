"""Model folders: config.json describes the network, model.safetensors holds its weights, README.md is its card.

The decoder of a model of latents is in config.json too, and its weights in decoder.safetensors.

The digit models that ship with tiltflow are such folders, and so is the `model/` of every training run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.flow import TimeDirection
from tiltflow.flows.interpolant import Interpolant, Linear, PredictionType
from tiltflow.networks.factory import Factory
from tiltflow.plugins import code_allowed, part_of
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings, validate
from tiltflow.shipped import INDEX, asset, assets
from tiltflow.tensor_file import write_tensors

CONFIG, WEIGHTS, DECODER, CARD = "config.json", "model.safetensors", "decoder.safetensors", "README.md"

NetworkSettings = Annotated[Any, BeforeValidator(part_of("networks"))]


class FlowConfig(Settings):
    """config.json of a generative model: network, prediction type, interpolant, shape of one sample."""

    kind: Literal["flow"] = "flow"
    network: NetworkSettings
    prediction: PredictionType = "velocity"
    interpolant: Annotated[Interpolant, Field(discriminator="name")] = Linear()
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    time_direction: TimeDirection = "noise-to-data"
    event_shape: tuple[Annotated[int, Field(ge=1)], ...]
    decoder: NetworkSettings | None = None
    """Network that makes samples of states, of a model of latents; null where a state is the sample itself."""
    class_names: tuple[str, ...] = ()
    """Names of the classes of a class-conditional model; empty for another."""
    sampling: Sampling = Sampling()
    """Default sampling."""


class ClassifierConfig(Settings):
    """config.json of a classifier: logits over `class_names` for an image in [-1, 1]."""

    kind: Literal["classifier"] = "classifier"
    network: NetworkSettings
    class_names: tuple[str, ...]


def load_classifier(name_or_path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ClassifierConfig]:
    """Load a classifier by shipped name or folder, with its config. Raises InputError as `load` does."""
    folder = model_folder(name_or_path)
    config = read_config(folder)
    if not isinstance(config, ClassifierConfig):
        raise InputError(f"{name_or_path}: is a flow; must be a classifier")
    return load_network(folder, config, device), config


def shipped_models() -> list[str]:
    """Return the names of the models that ship with tiltflow."""
    return list(assets(CONFIG))


def model_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a shipped model by name, or of a model or run on disk. Raises InputError if there is none."""
    if shipped := asset(name_or_path, "model", CONFIG):
        return shipped
    path = Path(name_or_path)
    for folder in (path, path / "model"):
        if (folder / CONFIG).exists():
            return folder
    if asset(name_or_path, "pipeline", INDEX) or (path / INDEX).exists():
        raise InputError(f"{path}: is a diffusers pipeline; in a recipe write `model: {{diffusers: {path}}}`")
    if (path / "model").is_dir():
        raise InputError(
            f"{path}: its model/ has no {CONFIG}: that of a diffusers pipeline, or of a network that tiltflow cannot build"
        )
    if path.exists():
        raise InputError(f"{path}: is neither a model folder nor a run: it has no {CONFIG} and no model/{CONFIG}")
    raise InputError(
        f"there is no model {str(name_or_path)!r}{did_you_mean(str(name_or_path), shipped_models())}; or give a folder"
    )


def read_config(folder: Path) -> FlowConfig | ClassifierConfig:
    """Read the `config.json` of a model folder. Raises InputError if it is not valid."""
    path = folder / CONFIG
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    match tree.get("kind") if isinstance(tree, dict) else None:
        case "flow":
            return validate(FlowConfig, tree, str(path))
        case "classifier":
            return validate(ClassifierConfig, tree, str(path))
        case _:
            raise InputError(f"{path}: must have kind: 'flow' or 'classifier'")


def save_model(
    folder: Path, config: FlowConfig | ClassifierConfig, network: nn.Module, card: str, decoder: nn.Module | None = None
) -> None:
    """Write a model folder. The weights are written last, so a folder with weights is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
    if decoder is not None:
        save_weights(decoder, folder / DECODER)
    save_weights(network, folder / WEIGHTS)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's state_dict as safetensors; devices and memory layouts do not matter."""
    write_tensors(path, network.state_dict())


def load_network(folder: Path, config: FlowConfig | ClassifierConfig, device: torch.device | str) -> nn.Module:
    """Build the network of a model folder and load its weights, on `device`, frozen and in eval mode.

    Raises InputError if it is built by code without consent, if it cannot be built, or if the weights do not fit.
    """
    return _loaded(config.network, "network", folder, WEIGHTS, device)


def load_decoder(folder: Path, config: FlowConfig, device: torch.device | str) -> nn.Module | None:
    """Build the decoder of a model folder as `load_network` does its network; None if there is none."""
    return None if config.decoder is None else _loaded(config.decoder, "decoder", folder, DECODER, device)


def _loaded(settings: Any, role: str, folder: Path, file: str, device: torch.device | str) -> nn.Module:
    """Build a network and load its weights."""
    if isinstance(settings, Factory) and not code_allowed():
        raise InputError(
            f"{folder / CONFIG}: its {role} is built by {settings.path}, which is code; if you trust the folder, add"
            " --allow-code, or in Python with tiltflow.allow_code():"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # of the initial weights, which are replaced
            network: nn.Module = settings.build()
    except (RuntimeError, MemoryError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{folder / CONFIG}: its {role} cannot be built ({str(error).splitlines()[0]})") from None
    path = folder / file
    try:
        weights = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read ({error})") from None
    expected = network.state_dict()
    for key in sorted(expected.keys() ^ weights.keys()):
        raise InputError(
            f"{path}: {'lacks' if key in expected else 'has an unexpected'} tensor {key!r}; does {CONFIG} belong to it?"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise InputError(f"{path}: {key!r} is {list(value.shape)}, {CONFIG} says {list(expected[key].shape)}")
    network.load_state_dict(weights)
    # a network of the user's keeps the layout that it had when it was saved: another one rounds differently
    layout = torch.preserve_format if isinstance(settings, Factory) else torch.channels_last
    return network.to(device).to(memory_format=layout).requires_grad_(False).eval()  # type: ignore[call-overload, no-any-return]
