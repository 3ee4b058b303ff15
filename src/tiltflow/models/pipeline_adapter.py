"""A new LoRA in the denoiser of a pipeline, in place, above the LoRAs that are loaded already."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, SettingsError
from tiltflow.flows.precision import GRADIENT_SCALE
from tiltflow.models.denoiser import Denoiser, floating_dtype
from tiltflow.models.quantization import TEXT_ENCODER
from tiltflow.models.trainable import Adapter, check_layers
from tiltflow.streams import stream


class AdaptedDenoiser(Denoiser):
    """A denoiser with a new adapter that can be switched off.

    Args:
        adapter: name of the new adapter in the network; only its parameters require gradients.
        below: names of the adapters that were active before and stay active while the new one is off.
    """

    def __init__(self, network: nn.Module, predict: Callable[..., Tensor], adapter: str, below: Sequence[str] = ()):
        super().__init__(network, predict)
        self.adapter, self.below = adapter, tuple(below)
        self.layers = layers_of_adapters(network)  # found once: networks have thousands of modules, and this is done often

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switch the new adapter off in this context."""
        self.switch(on=False)
        try:
            yield
        finally:
            self.switch(on=True)

    def switch(self, *, on: bool) -> None:
        """Switch the new adapter on or off."""
        if self.below:
            self.activate((*self.below, self.adapter) if on else self.below)
            return
        self.switch_layers(on=on)

    def switch_layers(self, *, on: bool) -> None:
        """Switch all adapters on or off."""
        for layer in self.layers:
            layer.enable_adapters(on)

    def activate(self, names: Sequence[str]) -> None:
        """Activate exactly these adapters. peft makes every active adapter trainable, so those below are frozen again."""
        for layer in self.layers:
            layer.set_adapter(list(names))
        if self.below:
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and self.adapter in name.split("."))


@runtime_checkable
class HasAdapters(Protocol):
    """A network of diffusers into which peft has put adapters."""

    peft_config: Mapping[str, Any]


def loaded_adapters(network: nn.Module) -> Mapping[str, Any]:
    """Return peft's configurations of the adapters in a network, by name."""
    return network.peft_config if isinstance(network, HasAdapters) else {}


def layers_of_adapters(network: nn.Module) -> list[Any]:
    """Return the layers of a network that adapters change."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


def active_adapters(network: nn.Module) -> list[str]:
    """Return the names of the active adapters of a network.

    Raises InputError if one is fused into the weights and still loaded: peft would remove it from them when another adapter is
    added.
    """
    layers = layers_of_adapters(network)
    if any(layer.merged for layer in layers):
        raise InputError(
            "a LoRA is fused into the pipeline and still loaded: call pipeline.unload_lora_weights() first; it stays fused"
        )
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))


def add_adapter(denoiser: Denoiser, adapter: Adapter, targets: Sequence[str], seed: int) -> AdaptedDenoiser:
    """Add a new LoRA in float32 to the network of a denoiser, in place; it changes no prediction yet.

    Args:
        targets: ends of the names of the layers, if the adapter names none.

    Raises InputError if peft is not installed, if no layer has such a name, or if a LoRA is fused into the weights and still
    loaded.
    """
    denoiser_alone(adapter)
    check_layers(denoiser.network, adapter)
    config = adapter.config(targets)

    def put(network: Any, name: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, "adapter").initial_seed())
            inject(network, config, name)

    added = adapted_by(put, denoiser)
    for layer in added.layers if adapter.use_dora else ():
        measure_again(layer, added.adapter)
    return added


def denoiser_alone(adapter: Adapter | None) -> None:
    """Raise SettingsError for an adapter that names layers of text encoders: prompts are encoded once, before training."""
    for name in (adapter and adapter.target_modules) or ():
        if name.startswith(TEXT_ENCODER):
            raise SettingsError(
                f"adapter.target_modules: {name!r}: text encoders are not tuned, the denoiser alone is; what was tuned"
                " elsewhere is a part of the base, a LoRA by model.loras, a whole encoder by model.components"
            )


def inject(network: Any, config: Any, name: str) -> None:
    """Put a LoRA of a configuration of peft into a network. Raises InputError if no layer has such a name."""
    from peft import inject_adapter_in_model

    try:
        if hasattr(network, "add_adapter"):
            network.add_adapter(config, name)
        else:  # some classes of diffusers know nothing of adapters
            inject_adapter_in_model(config, network, name)
    except ValueError as error:
        raise InputError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None


def adapted_by(put: Callable[[Any, str], None], denoiser: Denoiser) -> AdaptedDenoiser:
    """Let `put(network, name)` put one more LoRA into the network of a denoiser, above those that are active, and make it the
    only one that is trained, in float32.

    Raises InputError if a LoRA is fused into the weights and still loaded.
    """
    network: Any = denoiser.network
    below, taken, computed = active_adapters(network), loaded_adapters(network), floating_dtype(network)
    name = next(name for i in itertools.count() if (name := f"tiltflow_{i}" if i else "default") not in taken)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # it is wanted
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")  # to merge into quantized weights; nothing does
        put(network, name)
    adapted = AdaptedDenoiser(network, denoiser.predict, name, below)
    adapted.switch_layers(on=True)
    adapted.activate((*below, name))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if computed == torch.float16:
                parameter.register_hook(lambda gradient: gradient / GRADIENT_SCALE)
    return adapted


@torch.no_grad()
def measure_again(layer: Any, name: str) -> None:
    """Measure the magnitudes of a new DoRA in float32, the dtype in which they are divided by: peft rounds them to that of the
    weights, and in 16 bits the model would not start as its base."""
    magnitude, first, second = (part[name] for part in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B))
    parameter = magnitude.weight
    magnitude.update_layer(
        base_layer=layer.get_base_layer(), lora_A=first.weight, lora_B=second.weight, scaling=layer.scaling[name]
    )
    parameter.data, magnitude.weight = magnitude.weight.data, parameter  # with its hooks
