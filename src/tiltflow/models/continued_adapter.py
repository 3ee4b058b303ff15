"""A LoRA that exists already as the start of the adapter that is trained, with its own rank, scale and layers.

The base stays the pipeline without it: what is aimed at is p_base exp(r / beta) of that base, wherever training starts. A LoRA
that is to be a part of the base is loaded before, by `model.loras`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.pipeline_adapter import AdaptedDenoiser, adapted_by, inject, loaded_adapters
from tiltflow.models.pipeline_files import load_weights
from tiltflow.user_code import refused


def continue_adapter(pipeline: Any, denoiser: Denoiser, component: str, source: str) -> AdaptedDenoiser:
    """Load a LoRA into the denoiser of a pipeline, in place, as the adapter that is trained.

    Args:
        component: name of the denoiser in the pipeline.
        source: file, folder, or name on the hub.

    Raises InputError if it cannot be loaded, belongs to another model, or has parts in the text encoders.
    """
    where = f"adapter.continue_from {source}"
    if not hasattr(pipeline, "load_lora_weights"):
        return _of_peft(denoiser, component, source)
    with refused(f"{where}: cannot be loaded"):
        found = pipeline.lora_state_dict(source, use_safetensors=True)
    weights = found[0] if isinstance(found, tuple) else found
    if others := sorted({key.split(".")[0] for key in weights} - {component}):
        raise InputError(
            f"{where}: has weights of {', '.join(others)}, and the {component} alone is trained; model.loras takes them all"
        )

    def put(network: Any, name: str) -> None:
        with refused(f"{where}: cannot be loaded"):
            pipeline.load_lora_weights(source, adapter_name=name, use_safetensors=True)
        if name not in loaded_adapters(network):
            raise InputError(f"{where}: has no weights of the {component}")

    added = adapted_by(put, denoiser)
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft import set_peft_model_state_dict

    own = {key.removeprefix(f"{component}."): weight for key, weight in weights.items()}
    if not any("lora_A" in key for key in own):
        own = convert_unet_state_dict_to_peft(own)
    with refused(f"{where}: cannot be loaded"):  # once more, as diffusers rounds a LoRA to the dtype of the network
        set_peft_model_state_dict(added.network, own, adapter_name=added.adapter)
    return added


def _of_peft(denoiser: Denoiser, component: str, source: str) -> AdaptedDenoiser:
    """Load what `peft.PeftModel` reads, a folder, where the pipeline loads no LoRAs itself."""
    from peft import LoraConfig

    with refused(f"adapter.continue_from {source}: cannot be loaded"):
        config = LoraConfig.from_pretrained(source)
    added = adapted_by(lambda network, name: inject(network, config, name), denoiser)
    load_weights(added, component, Path(source))
    return added
