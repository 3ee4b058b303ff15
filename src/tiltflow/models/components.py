"""Components of a pipeline from elsewhere: another autoencoder, denoiser, text encoder or scheduler."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiltflow.errors import InputError
from tiltflow.models.pipeline_folder import check_config, check_weights
from tiltflow.shipped import INDEX
from tiltflow.user_code import refused


class Place(NamedTuple):
    """Where a component is: a folder, a name on the hub or a single file, and the subfolder in it."""

    path: str
    subfolder: str = ""


def names_in(index: Mapping[str, Any]) -> list[str]:
    """Return the names of the components in the index of a pipeline."""
    return [name for name, value in index.items() if isinstance(value, (list, tuple))]


def place_of(name: str, source: str) -> Place:
    """Return where a component is; of a whole pipeline the one of the same name.

    Args:
        source: a .safetensors file, a folder, or a name on the hub, which may go on with a subfolder: `owner/model/vae`.

    Raises InputError if there is no such file or folder.
    """
    where = f"model.components.{name} {source}"
    if Path(source).is_file():
        if not source.endswith(".safetensors"):
            raise InputError(f"{where}: must be a .safetensors file, a folder, or a name on the hub")
        return Place(source)
    if Path(source).is_dir():
        return Place(source, name if (Path(source) / INDEX).exists() else "")
    parts = source.split("/")
    if os.path.isabs(source) or len(parts) < 2:
        raise InputError(f"{where}: there is no such file or folder")
    repository, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    return Place(repository, subfolder or (name if _is_pipeline(repository) else ""))


def _is_pipeline(repository: str) -> bool:
    from diffusers import DiffusionPipeline

    try:
        DiffusionPipeline.load_config(repository)
    except OSError:
        return False
    return True


def load_component(
    name: str, source: str, index: Mapping[str, Any], base: str, dtype: torch.dtype, quantization: Any = None
) -> Any:
    """Load a component: a model or a scheduler of diffusers of the class that its own config names, a single file as the class
    that the pipeline has, and a part of transformers as the class that the pipeline has.

    Args:
        index: of the pipeline.
        base: folder or name of the pipeline, whose config a single file is read with.
        quantization: its configuration, if weights are quantized.

    Raises InputError if it cannot be loaded.
    """
    import diffusers
    import transformers

    where, (library, kind_name) = f"model.components.{name} {source}", index[name]
    with refused(where):
        place = place_of(name, source)
    folder = Path(place.path, place.subfolder)
    quantized = {} if quantization is None else {"quantization_config": quantization}
    own: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(kind_name), None)
    if own is None:
        raise InputError(f"{where}: the pipeline names no class of diffusers or transformers for it")
    if folder.is_dir():
        for config in folder.glob("*config.json"):
            check_config(config)
    with refused(f"{where}: cannot be loaded"):
        if folder.is_file():
            if not hasattr(own, "from_single_file"):
                raise InputError(f"{where}: {own.__name__} is read from a folder alone, not from a single file")
            return own.from_single_file(str(folder), config=base, subfolder=name, torch_dtype=dtype, **quantized)
        if library == "diffusers":
            scheduler = issubclass(own, diffusers.SchedulerMixin)
            config = (own if scheduler else diffusers.AutoModel).load_config(place.path, subfolder=place.subfolder)
            kind = diffusers.SchedulerMixin if scheduler else diffusers.ModelMixin
            own = getattr(diffusers, str(config.get("_class_name")), None)
            if not (isinstance(own, type) and issubclass(own, kind)):
                wanted = "scheduler" if scheduler else "model"
                raise InputError(f"{where}: its class {config.get('_class_name')!r} is not a {wanted} of diffusers")
        read: Any = own.from_pretrained
        if not issubclass(own, torch.nn.Module):  # a scheduler or a tokenizer
            return read(place.path, subfolder=place.subfolder)
        found = read(place.path, subfolder=place.subfolder, dtype=dtype, use_safetensors=True, **quantized)
        if folder.is_dir():
            check_weights(folder.parent, {folder.name: found})
    return found
