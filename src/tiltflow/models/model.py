"""A model of tensors: any network as a flow that can be sampled, tuned, saved and loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tiltflow.conditions import Item
from tiltflow.conditions.labels import as_labels
from tiltflow.errors import InputError
from tiltflow.flows.adapter import WithoutAdapter, has_adapter
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.flow import Flow, in_float32
from tiltflow.flows.noise import noise
from tiltflow.models.model_folder import FlowConfig, load_decoder, load_network, model_folder, read_config, save_model
from tiltflow.models.trainable import Adapter, adapted, merged, trainable_copy
from tiltflow.networks import Projected
from tiltflow.networks.factory import Factory
from tiltflow.networks.policy_mlp import PolicyMlp
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.settings import Settings
from tiltflow.streams import stream
from tiltflow.user_code import check_device, explained, tried, whole_number


@dataclass(frozen=True)
class Model:
    """A generative model of tensors that can be sampled, tuned and saved.

    Any `network(x [batch, *event], time [batch]) -> prediction [batch, *event]` will do. With `class_names` the model is
    class-conditional: its network is called as network(x, time, labels), labels int64 [batch] being indices of `class_names`,
    and each class has a law of its own. With a `decoder` it is a model of latents, as those of large pictures are: states are
    [batch, *event], and samples, which rewards see, are what the decoder makes of them.

    Args:
        flow: the network, its prediction type, interpolant and time convention.
        event_shape: shape of one state, which is the sample itself if there is no decoder.
        sampling: default sampling.
        network_settings: settings that build the network, with which `save` needs no factory.
        class_names: names of the classes of a class-conditional model.
        decoder: states [batch, *event] -> samples [batch, *sample], each of its own state alone; differentiable, and frozen.
        decoder_settings: settings that build the decoder, needed by `save`.

    Raises InputError for arguments of other types.

    >>> Model(Flow(lambda x, time: -x), event_shape=(2,)).sample(5).shape
    torch.Size([5, 2])
    """

    flow: Flow
    event_shape: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    network_settings: Settings | None = None
    class_names: tuple[str, ...] = ()
    decoder: Callable[[Tensor], Tensor] | None = None
    decoder_settings: Settings | None = None

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)  # whatever the annotations say
        flow, shape = given["flow"], given["event_shape"]
        if not isinstance(flow, Flow):
            raise InputError(f"Model: flow must be a Flow(network), got {type(flow).__name__}")
        if isinstance(shape, (str, int)) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise InputError(f"Model: event_shape must be the sizes of one sample, as in (3, 32, 32) or (2,), got {shape!r}")
        if not isinstance(given["sampling"], Sampling):
            raise InputError(f"Model: sampling must be a Sampling(solver=.., ..), got {given['sampling']!r}")
        if not (self.decoder is None or callable(self.decoder)):
            raise InputError(f"Model: decoder must be a function of states, such as a torch module, got {self.decoder!r}")
        object.__setattr__(self, "event_shape", tuple(shape))

    @property
    def device(self) -> torch.device:
        network = self.flow.network
        parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def grid(self) -> float:
        """Time of the noise end, at which grids start."""
        return self.flow.noise_time

    @property
    def own_grid(self) -> float:
        """`grid`: sampling and training use the same times."""
        return self.grid

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: that of a state, or of what the decoder makes of it."""
        if self.decoder is None:
            return self.event_shape
        with torch.no_grad():
            return tuple(self.decode(torch.zeros(1, *self.event_shape, device=self.device)).shape[1:])

    @property
    def has_decoder(self) -> bool:
        """True for a model of latents; otherwise a state is the sample itself."""
        return self.decoder is not None

    @property
    def prompted(self) -> bool:
        """False: the conditions are classes, if any."""
        return False

    @property
    def guidance_scale(self) -> float:
        """1: no guidance."""
        return 1.0

    def start(self, num_samples: int, generator: torch.Generator, t: Tensor | None = None) -> Tensor:
        """Draw starting points [num_samples, *event] at the noise end, in float64 if the weights are, else in float32.

        Args:
            t: ignored: the model knows the time of its noise end.
        """
        x = noise(self.flow, (num_samples, *self.event_shape), generator)
        return x.double() if self.flow.dtype == torch.float64 else x

    def noise(self, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
        """Draw starting points [len(items), *event]: noise, in the part of the space in which that of the item lies."""
        return self.bound(self.conditions(items)[0]).project(self.start(len(items), generator, t))

    def bound(self, labels: Tensor | None) -> Flow:
        """Return the flow bound to labels [batch]; the flow itself for None."""
        return self.flow if labels is None else self.flow.bind(labels.to(self.device))

    def conditions(self, items: Sequence[Item]) -> tuple[Tensor | None, None]:
        """Return (labels [batch], None), read from `label` in the items' metadata; (None, None) for a model without classes."""
        if not self.class_names:
            return None, None
        return torch.tensor([item.metadata["label"] for item in items], device=self.device), None

    def decode(self, x: Tensor, *, batch_size: int = 0) -> Tensor:
        """Return what the decoder makes of states x [batch, *event], at most `batch_size` at a time (0 for all); x itself if
        there is none. Differentiable: where there are several parts, activations are recomputed in the backward pass."""
        decoder = self.decoder
        if decoder is None:
            return x
        parts = x.split(batch_size or len(x))
        with explained("the model's decoder"):
            if len(parts) > 1 and torch.is_grad_enabled() and x.requires_grad:
                return torch.cat([checkpoint(decoder, part, use_reentrant=False) for part in parts])
            return torch.cat([decoder(part) for part in parts])

    def draw(
        self,
        items: Sequence[Item],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw one sample of each item; see `sample`. `guidance_scale` is ignored."""
        labels = [item.metadata["label"] for item in items] if self.class_names else None
        return self.sample(len(items), labels=labels, seed=seed, sampling=sampling, batch_size=batch_size)

    def trainable(
        self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0
    ) -> tuple[Self, Self]:
        """Return (base, model to train): a copy; a copy with a new LoRA; or, if the network has an adapter, the model itself.

        Args:
            pattern: regular expression; parameters of the copy whose names contain a match are trained, the others are frozen.

        Raises InputError for a pattern that matches no name, and for a pattern together with an adapter, whose parameters are
        the only ones trained.
        """
        given = has_adapter(self.flow.network)
        if (given or adapter is not None) and re.compile(pattern).pattern:
            raise InputError("training.trainable: with an adapter only the adapter is trained; leave it out")
        if given:
            return self.base(), self
        base = replace(self, flow=in_float32(self.flow))
        if adapter is None:
            return base, replace(base, flow=trainable_copy(base.flow, pattern))
        if not isinstance(base.flow.network, nn.Module):
            raise InputError("adapter: the network must be a torch module")
        tuned = replace(base, flow=replace(base.flow, network=adapted(base.flow.network, adapter, seed)))
        return base, tuned

    def base(self) -> Self:
        """Return the model with its adapter switched off; the model itself if it has none."""
        if not has_adapter(self.flow.network):
            return self
        return replace(self, flow=replace(self.flow, network=WithoutAdapter(self.flow.network)))

    def in_precision(self, dtype: torch.dtype | None) -> Self:
        """Return the model with its network evaluated in this dtype; None is the dtype of its weights."""
        return replace(self, flow=replace(self.flow, autocast=dtype))

    def labels(self, num_samples: int, labels: Any = None) -> Tensor | None:
        """Return labels [num_samples] for a class-conditional model, see `as_labels`; None for another.

        Raises InputError for labels of a model without classes, and for a class that it does not have.
        """
        if self.class_names:
            return as_labels(labels, num_samples, self.class_names)
        if labels is not None:
            raise InputError("labels: this model is not class-conditional; leave them out")
        return None

    def example_conditions(self, count: int) -> Tensor | None:
        """Conditions [count, ..] to try the network with: all classes in turn; None for a model without."""
        return self.labels(count)

    def sample(
        self,
        num_samples: int,
        *,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        seed: int = 0,
        sampling: Sampling | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw samples [num_samples, *sample], on the CPU, with the network in eval mode. A sample depends only on the seed,
        its index, its label and `batch_size`.

        Args:
            labels: for a class-conditional model: one class, by number or name, for all samples, or one per sample; all classes
                in turn by default.

        Raises InputError for arguments that do not fit the model, and for a network that fails or returns another shape.
        """
        num_samples, batch_size = whole_number(num_samples, "num_samples", 1), whole_number(batch_size, "batch_size", 1)
        seed, known = whole_number(seed, "seed"), self.labels(num_samples, labels)
        return self.drawn(num_samples, known, seed=seed, sampling=sampling, batch_size=batch_size)

    def drawn(
        self, num_samples: int, conditions: Tensor | None, *, seed: int, sampling: Sampling | None, batch_size: int
    ) -> Tensor:
        """`sample` of conditions [num_samples, ..] as the network takes them."""
        check_sampling(sampling)
        parts = []
        with tried(), eval_mode(self.flow.network), torch.no_grad():
            for i, begin in enumerate(range(0, num_samples, batch_size)):
                generator = stream(seed, "sample", i, device=self.device)
                flow = self.bound(None if conditions is None else conditions[begin : begin + batch_size])
                x = flow.project(self.start(min(batch_size, num_samples - begin), generator))
                x = sample(in_chunks(flow), x, sampling or self.sampling, generator, start=self.flow.noise_time)
                parts.append(self.decode(x).cpu())
        return torch.cat(parts)

    def save(
        self, folder: str | Path, card: str = "", *, factory: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Write a folder that `tiltflow.load` reads: config.json, and the weights in safetensors.

        Args:
            card: text of README.md.
            factory: `package.module:function` that builds the network; needed for a network that is not tiltflow's own. The
                folder then names code, and is loaded only with consent: `with tiltflow.allow_code():`, or --allow-code.
            arguments: keyword arguments of the factory.

        Raises InputError for a network that is not tiltflow's own without a factory, and for a factory that builds another one.
        """
        network, settings = self.flow.network, self.network_settings
        if factory is not None:
            settings = Factory(path=factory, arguments=dict(arguments or {}))
        if settings is None or not isinstance(network, nn.Module):
            raise InputError(
                "this model's network is not one of tiltflow's own: give factory='package.module:function' that builds it, or"
                " save its state_dict() instead"
            )
        decoder = self.decoder
        if decoder is not None and (self.decoder_settings is None or not isinstance(decoder, nn.Module)):
            raise InputError("this model's decoder is not one of tiltflow's own: save the state_dict() of its network instead")
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
            decoder=self.decoder_settings,
            class_names=self.class_names,
            sampling=self.sampling,
        )
        save_model(Path(folder), config, network, card, decoder)


def check_same(settings: Factory, network: nn.Module) -> None:
    """Raise InputError if a factory builds a network with other tensors than this one."""
    with torch.random.fork_rng(devices=[]):
        built = settings.build().state_dict()
    own = network.state_dict()
    for key in sorted(built.keys() | own.keys()):
        if key not in own or key not in built:
            raise InputError(
                f"factory {settings.path}: builds another network: only {'it' if key in built else 'this model'} has {key}"
            )
        if built[key].shape != own[key].shape:
            shapes = f"{list(built[key].shape)}, this model's is {list(own[key].shape)}"
            raise InputError(f"factory {settings.path}: builds another network: its {key} is {shapes}")


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a generative model: one that ships with tiltflow, a model folder, or the tuned model of a run folder.

    Raises InputError if there is no such model, if it is a classifier or a policy, or if its files cannot be read.
    """
    model = read_model(name_or_path, device)
    if isinstance(model.network_settings, PolicyMlp):
        raise InputError(f"{name_or_path}: is a policy; in a recipe write `model: {{name: policy, path: {name_or_path}}}`")
    return model


def read_model(name_or_path: str | Path, device: torch.device | str = "cpu") -> Model:
    """`load`, of a policy too, whose network is called with observations."""
    check_device(device)
    folder = model_folder(name_or_path)
    config = read_config(folder)
    if not isinstance(config, FlowConfig):
        raise InputError(f"{name_or_path}: is a classifier; must be a flow")
    network = load_network(folder, config, device)
    flow = Flow(
        network,
        config.prediction,
        config.interpolant,
        time_scale=config.time_scale,
        time_direction=config.time_direction,
        projection=network.project if isinstance(network, Projected) else None,
    )
    return Model(
        flow,
        config.event_shape,
        config.sampling,
        config.network,
        config.class_names,
        load_decoder(folder, config, device),
        config.decoder,
    )
