"""Models, in memory and on disk: config.json says what a network predicts, model.safetensors holds its weights, README.md is
its card.

The digit models that ship with the package are such folders, and so is the `model/` of every training run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tiltflow.conditions.labels import as_labels
from tiltflow.conditions.prompts import Prompt
from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.adapter import WithoutAdapter, has_adapter
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.flow import Flow, TimeDirection, in_float32
from tiltflow.flows.interpolant import Interpolant, Linear, PredictionType
from tiltflow.flows.noise import noise
from tiltflow.models.trainable import Adapter, adapted, merged, trainable_copy
from tiltflow.networks.factory import Factory
from tiltflow.plugins import code_allowed, part_of
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.settings import Settings, validate
from tiltflow.shipped import INDEX, assets, by_name
from tiltflow.streams import stream
from tiltflow.tensor_file import write_tensors
from tiltflow.user_code import check_device, tried, whole_number

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

NetworkSettings = Annotated[Any, BeforeValidator(part_of("networks"))]


class FlowConfig(Settings):
    """A generative model: a network, what it predicts, the path it was trained on, and the shape of one sample."""

    kind: Literal["flow"] = "flow"
    network: NetworkSettings
    prediction: PredictionType = "velocity"
    interpolant: Annotated[Interpolant, Field(discriminator="name")] = Linear()
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    time_direction: TimeDirection = "noise-to-data"
    event_shape: tuple[Annotated[int, Field(ge=1)], ...]
    class_names: tuple[str, ...] = ()
    """Of a class-conditional model."""
    sampling: Sampling = Sampling()
    """How to sample it where nothing else is asked for."""


class ClassifierConfig(Settings):
    """A classifier: logits over `class_names` for an image in [-1, 1]."""

    kind: Literal["classifier"] = "classifier"
    network: NetworkSettings
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A generative model that can be sampled, tuned and saved: a flow, the shape of one sample, and how to sample it.

    Any `network(x, time) -> prediction` can be one; only models with `network_settings` can be saved as a folder. With
    `class_names` it is class-conditional: its network is called as network(x, time, labels), labels int64 [batch] being the
    numbers of these names from 0, and each class has a law of its own.

    >>> Model(Flow(lambda x, time: -x), event_shape=(2,)).sample(5).shape
    torch.Size([5, 2])
    """

    flow: Flow
    event_shape: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    network_settings: Settings | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)  # whatever the annotations say
        flow, shape = given["flow"], given["event_shape"]
        if not isinstance(flow, Flow):
            raise InputError(f"Model: flow must be a Flow(network), is {type(flow).__name__}")
        if isinstance(shape, (str, int)) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise InputError(f"Model: event_shape must be the sizes of one sample, as in (3, 32, 32) or (2,), is {shape!r}")
        if not isinstance(given["sampling"], Sampling):
            raise InputError(f"Model: sampling must be a Sampling(solver=.., ..), is {given['sampling']!r}")
        object.__setattr__(self, "event_shape", tuple(shape))

    @property
    def device(self) -> torch.device:
        network = self.flow.network
        parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def grid(self) -> float:
        """The time of the noise end, from which grids are spread."""
        return self.flow.noise_time

    @property
    def own_grid(self) -> float:
        """`grid`: samples are drawn on the same times as a training's trajectories."""
        return self.grid

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample: a state is the sample itself."""
        return self.event_shape

    @property
    def has_decoder(self) -> bool:
        """False: a state is the sample itself."""
        return False

    @property
    def prompted(self) -> bool:
        """False: samples are asked for by classes, or by nothing."""
        return False

    @property
    def guidance_scale(self) -> float:
        """1: samples are drawn without guidance."""
        return 1.0

    def start(self, num_samples: int, generator: torch.Generator, t: Tensor | None = None) -> Tensor:
        """Starting points [num_samples, *event] at the model's noise end, in float32 or, if its weights are, in float64.

        Args:
            t: the time of the noise end, which the model knows.
        """
        x = noise(self.flow, (num_samples, *self.event_shape), generator)
        return x.double() if self.flow.dtype == torch.float64 else x

    def noise(self, items: Sequence[Prompt], generator: torch.Generator, t: Tensor) -> Tensor:
        """`start`, the same for every item."""
        return self.start(len(items), generator, t)

    def bound(self, labels: Tensor | None) -> Flow:
        """The flow of samples with these labels [batch]; for an unconditional model, of any."""
        return self.flow if labels is None else self.flow.bind(labels.to(self.device))

    def conditions(self, items: Sequence[Prompt]) -> tuple[Tensor | None, None]:
        """The labels [batch] of samples of these classes, whose numbers are `label` of their metadata; None for a model without
        classes."""
        if not self.class_names:
            return None, None
        return torch.tensor([item.metadata["label"] for item in items], device=self.device), None

    def decode(self, x: Tensor, *, batch_size: int = 0) -> Tensor:
        """x: a state is the sample itself."""
        return x

    def draw(
        self,
        items: Sequence[Prompt],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """`sample`, one of each of these items: classes, or anything of an unconditional model. There is no guidance."""
        labels = [item.metadata["label"] for item in items] if self.class_names else None
        return self.sample(len(items), labels=labels, seed=seed, sampling=sampling, batch_size=batch_size)

    def trainable(
        self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0
    ) -> tuple[Model, Model]:
        """(base, what is going to be trained): a copy; a copy with a new LoRA; or, if its network has an adapter, the model.

        Args:
            pattern: of a copy, the parameters in whose name this regular expression is found; the others stay as they are.

        Raises InputError for a pattern of names that fits no parameter, or is given beside an adapter, which is trained alone.
        """
        given = has_adapter(self.flow.network)
        if (given or adapter is not None) and re.compile(pattern).pattern:
            raise InputError("training.trainable: with an adapter the adapter alone is trained; leave it out")
        if given:
            return self.base(), self
        base = replace(self, flow=in_float32(self.flow))
        if adapter is None:
            return base, replace(base, flow=trainable_copy(base.flow, pattern))
        if not isinstance(base.flow.network, nn.Module):
            raise InputError("adapter: the network is no torch module")
        tuned = replace(base, flow=replace(base.flow, network=adapted(base.flow.network, adapter, seed)))
        return base, tuned

    def base(self) -> Model:
        """The model with its adapter switched off; a model without one is itself."""
        if not has_adapter(self.flow.network):
            return self
        return replace(self, flow=replace(self.flow, network=WithoutAdapter(self.flow.network)))

    def in_precision(self, dtype: torch.dtype | None) -> Model:
        """The model with its network evaluated in this dtype; None is that of its weights."""
        return replace(self, flow=replace(self.flow, autocast=dtype))

    def labels(self, num_samples: int, labels: Any = None) -> Tensor | None:
        """Labels [num_samples] of the samples of a class-conditional model, see `as_labels`; None for another.

        Raises InputError for labels of a model without classes, or a class that it does not have.
        """
        if self.class_names:
            return as_labels(labels, num_samples, self.class_names)
        if labels is not None:
            raise InputError("labels: this model is not class-conditional; leave them out")
        return None

    def sample(
        self,
        num_samples: int,
        *,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """[num_samples, *event] samples on the CPU, from the network in eval mode. A sample depends on the seed, its number,
        its label and `batch_size` alone.

        Args:
            labels: of a class-conditional model: a class, by number or name, for all samples, or one for each; by default each
                class in turn.

        Raises InputError for what does not fit, and for a network that cannot be called, or returns something else.
        """
        num_samples, batch_size = whole_number(num_samples, "num_samples", 1), whole_number(batch_size, "batch_size", 1)
        seed = whole_number(seed, "seed")
        check_sampling(sampling)
        parts, known = [], self.labels(num_samples, labels)
        with tried(), eval_mode(self.flow.network):
            for i, begin in enumerate(range(0, num_samples, batch_size)):
                generator = stream(seed, "sample", i, device=self.device)
                x = self.start(min(batch_size, num_samples - begin), generator)
                flow = in_chunks(self.bound(None if known is None else known[begin : begin + batch_size]))
                parts.append(sample(flow, x, sampling or self.sampling, generator, start=self.flow.noise_time).cpu())
        return torch.cat(parts)

    def save(
        self, folder: str | Path, card: str = "", *, factory: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Write the folder that `tiltflow.load` reads: config.json, and the weights in safetensors.

        Args:
            card: README.md.
            factory: `package.module:function` that builds the network, for one that is not tiltflow's own. The folder then
                names code, and is loaded with consent only: `with tiltflow.allow_code():`, or --allow-code.
            arguments: what the factory is called with, by name.

        Raises InputError for a network of somebody else without a factory, and for a factory that builds another one.
        """
        network, settings = self.flow.network, self.network_settings
        if factory is not None:
            settings = Factory(path=factory, arguments=dict(arguments or {}))
        if settings is None or not isinstance(network, nn.Module):
            raise InputError(
                "this model's network is not one of tiltflow's own: give factory='package.module:function', which builds it, or"
                " save its state_dict() instead"
            )
        network = merged(network)
        if isinstance(settings, Factory):
            check_same(settings, network)
        config = FlowConfig(
            network=settings,
            prediction=self.flow.prediction,
            interpolant=self.flow.interpolant,
            time_scale=self.flow.time_scale,
            time_direction=self.flow.time_direction,
            event_shape=self.event_shape,
            class_names=self.class_names,
            sampling=self.sampling,
        )
        save_model(Path(folder), config, network, card)


def check_same(settings: Factory, network: nn.Module) -> None:
    """Raise InputError if a factory does not build a network with the tensors of this one."""
    with torch.random.fork_rng(devices=[]):
        built = settings.build().state_dict()
    own = network.state_dict()
    for key in sorted(built.keys() | own.keys()):
        if key not in own or key not in built:
            raise InputError(
                f"factory {settings.path}: builds another network, {key} is in {'it' if key in built else 'this'} alone"
            )
        if built[key].shape != own[key].shape:
            shapes = f"{list(built[key].shape)}, here it is {list(own[key].shape)}"
            raise InputError(f"factory {settings.path}: builds another network, its {key} is {shapes}")


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> Model:
    """A generative model: one that ships with tiltflow, a model folder, or the tuned model of a run folder.

    Raises InputError if there is none, if it is a classifier, or if its files cannot be read.
    """
    check_device(device)
    folder = model_folder(name_or_path)
    config = read_config(folder)
    if not isinstance(config, FlowConfig):
        raise InputError(f"{name_or_path}: is a classifier, a flow is needed here")
    flow = Flow(
        _load_network(folder, config, device),
        config.prediction,
        config.interpolant,
        time_scale=config.time_scale,
        time_direction=config.time_direction,
    )
    return Model(flow, config.event_shape, config.sampling, config.network, config.class_names)


def load_classifier(name_or_path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ClassifierConfig]:
    """A classifier by shipped name or folder, and its config. Raises InputError as `load` does."""
    folder = model_folder(name_or_path)
    config = read_config(folder)
    if not isinstance(config, ClassifierConfig):
        raise InputError(f"{name_or_path}: is a flow, a classifier is needed here")
    return _load_network(folder, config, device), config


def shipped_models() -> list[str]:
    """The names of the models inside the package."""
    return list(assets(CONFIG))


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of a shipped model by name, or of a model or run on disk. Raises InputError if there is none."""
    if shipped := by_name(name_or_path, assets(CONFIG), "model"):
        return shipped
    path = Path(name_or_path)
    for folder in (path, path / "model"):
        if (folder / CONFIG).exists():
            return folder
    if by_name(name_or_path, assets(INDEX), "pipeline") or (path / INDEX).exists():
        raise InputError(f"{path}: is a pipeline of diffusers; in a recipe it is `model: {{diffusers: {path}}}`")
    if (path / "model").is_dir():
        raise InputError(
            f"{path}: its model/ has no {CONFIG}: it is of a diffusers pipeline, or of a network that tiltflow cannot describe"
        )
    if path.exists():
        raise InputError(f"{path}: neither a model folder nor a run, it has no {CONFIG} and no model/{CONFIG}")
    raise InputError(
        f"there is no model {str(name_or_path)!r}{did_you_mean(str(name_or_path), shipped_models())}; or give a folder"
    )


def read_config(folder: Path) -> FlowConfig | ClassifierConfig:
    """The checked `config.json` of a model folder."""
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
            raise InputError(f"{path}: needs kind: 'flow' or 'classifier'")


def save_model(folder: Path, config: FlowConfig | ClassifierConfig, network: nn.Module, card: str) -> None:
    """Write a model folder. The weights come last, so a folder with weights is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
    save_weights(network, folder / WEIGHTS)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's tensors, whatever their device and layout."""
    write_tensors(path, network.state_dict())


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote: tensors alone, no code of a pickle is run.

    Raises InputError, naming the file as `what`, if it cannot be read or holds anything else.
    """
    try:
        safe = path.suffix == ".safetensors"
        weights: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError) as error:
        raise InputError(f"{what} {path}: cannot be read ({str(error).strip().splitlines()[0]})") from None
    except Exception as error:  # what torch raises for a file with code is no public name
        raise InputError(f"{what} {path}: is refused ({str(error).strip().splitlines()[0]})") from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]  # what stands beside it is how it was trained
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{what} {path}: holds no tensors by name")
    return weights


def _load_network(folder: Path, config: FlowConfig | ClassifierConfig, device: torch.device | str) -> nn.Module:
    if isinstance(config.network, Factory) and not code_allowed():
        raise InputError(
            f"{folder / CONFIG}: its network is built by {config.network.path}, which is code; if you trust the folder, add"
            " --allow-code, or in Python with tiltflow.allow_code():"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights, which are replaced
            network: nn.Module = config.network.build()
    except (RuntimeError, MemoryError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{folder / CONFIG}: its network cannot be built ({str(error).splitlines()[0]})") from None
    path = folder / WEIGHTS
    try:
        weights = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read ({error})") from None
    expected = network.state_dict()
    for key in sorted(expected.keys() ^ weights.keys()):
        raise InputError(
            f"{path}: {'lacks' if key in expected else 'has an unexpected'} tensor {key!r}; is {CONFIG} the right one?"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise InputError(f"{path}: {key!r} is {list(value.shape)}, {CONFIG} says {list(expected[key].shape)}")
    network.load_state_dict(weights)
    return network.to(device).to(memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload, no-any-return]
