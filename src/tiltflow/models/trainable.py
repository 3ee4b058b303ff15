"""Trainable parameters: those of a copy of a network whose names match a pattern, or of a new LoRA of peft in any network."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import nn

from tiltflow.errors import InputError, did_you_mean, not_installed
from tiltflow.flows.adapter import has_adapter
from tiltflow.flows.flow import Flow
from tiltflow.settings import PathOrName, Settings
from tiltflow.streams import stream

Count = Annotated[int, Field(ge=1)]


class Adapter(Settings):
    """A LoRA of peft in the network that is tuned."""

    rank: Count = 16
    """Rank of the LoRA's matrices."""
    lora_alpha: Count | None = None
    """The adapter's output is scaled by lora_alpha / rank; `rank` by default."""
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the adapted layers; by default the attention of a pipeline, and all linear and convolutional layers
    of another network. Those of text encoders are not tuned."""
    use_rslora: bool = False
    """Scale its output by lora_alpha / sqrt(rank), as in peft."""
    use_dora: bool = False
    """DoRA, as in peft: the length of each row of a weight is trained too, and the LoRA turns it."""
    continue_from: PathOrName | None = None
    """LoRA that training starts from, as `pipeline.load_lora_weights` reads it, with its own rank, scale and layers. The base
    is the pipeline without it; `model.loras` makes one a part of the base."""

    @model_validator(mode="after")
    def _the_file_says(self) -> Adapter:
        for name, field in type(self).model_fields.items():
            if self.continue_from is not None and name != "continue_from" and getattr(self, name) != field.default:
                raise ValueError(f"{name}: the LoRA that adapter.continue_from names has its own; leave it out")
        return self

    def config(self, targets: Sequence[str]) -> Any:
        """Return peft's configuration, for the layers `targets` if the adapter names none. Raises InputError if peft is
        missing."""
        try:
            from peft import LoraConfig
        except ImportError:
            raise not_installed("peft", "diffusers") from None
        alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        chosen = list(targets if self.target_modules is None else self.target_modules)
        return LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=chosen,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


def trainable_copy(flow: Flow, trainable: str | re.Pattern[str] = "") -> Flow:
    """Return `flow` with a copy of its network in which some parameters require gradients.

    Args:
        trainable: regular expression; parameters whose names contain a match require gradients. Empty for all.

    Raises InputError if no name matches, if the network is not a torch module with parameters, or if it cannot be copied.
    """
    if not isinstance(flow.network, nn.Module) or not any(True for _ in flow.network.parameters()):
        raise InputError("nothing can be trained: the network must be a torch module with parameters")
    try:
        network = copy.deepcopy(flow.network)
    except Exception as error:  # whatever a user's module raises
        raise InputError(
            f"the network cannot be copied, and training works on a copy ({str(error).splitlines()[0]})"
        ) from error
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(re.search(trainable, name) is not None)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        parts = ", ".join(name for name, _ in network.named_children())
        pattern = re.compile(trainable).pattern
        raise InputError(f"training.trainable: no parameter name matches {pattern!r}; the network's parts are {parts}")
    return replace(flow, network=network)


def check_layers(network: nn.Module, adapter: Adapter) -> None:
    """Raise InputError for an end of names that no layer's name has. peft leaves it out, if it finds layers for another one."""
    names = [f".{name}" for name, _ in network.named_modules()]
    for target in adapter.target_modules or ():
        if not any(name.endswith(f".{target}") for name in names):
            parts = target.count(".") + 1
            ends = {".".join(name.split(".")[-parts:]) for name in _layers(network)}
            raise InputError(f"adapter.target_modules: no layer's name ends with {target!r}{did_you_mean(target, ends)}")


def _layers(network: nn.Module) -> list[str]:
    """The names of linear and convolutional layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, layer in network.named_modules() if isinstance(layer, kinds)]


def adapted(network: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """Return a copy of a network with a new LoRA: only the LoRA is trainable, and the function is unchanged.

    Raises InputError if peft is not installed, or if no layer has such a name.
    """
    layers = _layers(network)
    if not layers and adapter.target_modules is None:
        raise InputError("adapter: this network has no linear or convolutional layer; name others in adapter.target_modules")
    if adapter.continue_from is not None:
        raise InputError("adapter.continue_from: LoRAs of pipelines are continued, and this model is a network")
    check_layers(network, adapter)
    config = adapter.config(layers)
    from peft import get_peft_model

    copied: Any = copy.deepcopy(network)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "adapter").initial_seed())
            added: nn.Module = get_peft_model(copied, config)
    except ValueError as error:
        raise InputError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None
    return added.eval()


def merged(network: nn.Module) -> nn.Module:
    """Return the same function without an adapter: a copy with the adapter merged into its weights, or the network itself."""
    if not has_adapter(network):
        return network
    whole: Any = copy.deepcopy(network)
    without: nn.Module = whole.merge_and_unload()
    return without
