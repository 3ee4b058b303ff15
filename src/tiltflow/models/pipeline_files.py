"""Files of a pipeline: loading it, and writing and reading what was tuned as plain diffusers reads it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tiltflow.errors import InputError, Note, did_you_mean, not_installed
from tiltflow.models.components import load_component, names_in
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.pipeline_adapter import AdaptedDenoiser
from tiltflow.models.pipeline_folder import check_pipeline_folder, check_weights
from tiltflow.models.pipelines import Family, families, family_named
from tiltflow.models.quantization import TEXT_ENCODER, check_quantization, config_of
from tiltflow.shipped import INDEX, asset
from tiltflow.user_code import refused

OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Options of `from_pretrained` that say what is fetched, and from where."""
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that look at pictures, finished or given: never loaded, nor fetched, unless a family has them."""
LORA, SAMPLING = "pytorch_lora_weights.safetensors", "sampling.json"
PEFT_LORA, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
"""File and prefix of `peft.PeftModel`, which reads the LoRAs of pipelines that have no `load_lora_weights`."""


def load_pipeline(
    path: str | Path,
    options: Mapping[str, Any],
    components: Mapping[str, str | None] | None = None,
    quantization: Mapping[str, str] | None = None,
) -> Any:
    """Load a pipeline that ships with tiltflow, from a folder or from the hub, without what it does not need.

    Args:
        options: of `DiffusionPipeline.from_pretrained`.
        components: where components come from that are not the pipeline's own, by their names; None is not loaded. Those that
            are among the options are taken from there.
        quantization: in what the weights of networks are kept, by the names of components; see `tiltflow.models.quantization`.

    Raises InputError if diffusers is not installed, if the pipeline's class is not known, before anything but its index is
    fetched, or if it cannot be loaded.
    """
    try:
        import diffusers
    except ImportError:
        raise not_installed("diffusers", "diffusers") from None
    path = asset(path, "pipeline", INDEX) or path
    if os.path.isabs(path) and not Path(path).exists():
        raise InputError(f"model.diffusers {path}: there is no such folder")
    if Path(path).is_dir():
        check_pipeline_folder(Path(path))
    with refused(f"model.diffusers {path}: cannot be loaded"):  # of the hub's files this one alone is fetched
        index = diffusers.DiffusionPipeline.load_config(
            str(path), **{key: options[key] for key in OF_THE_HUB if key in options}
        )
    family = family_named(str(index.get("_class_name")), families())
    family.check(index)
    unused = dict.fromkeys(name for name in NOT_NEEDED if name in index and name not in family.components)
    if "requires_safety_checker" in index:
        unused["requires_safety_checker"] = False
    options = {"use_safetensors": True, **unused, **options}
    options["dtype"] = dtypes(
        options.pop("torch_dtype", options.get("dtype", torch.float32)), index
    )  # the first is the older name
    kinds = dict(quantization or {})
    check_quantization(kinds, quantizable(family, index), family.pipeline_class)
    configs = {
        name: config_of(name, kind, options["dtype"].get(name, options["dtype"]["default"])) for name, kind in kinds.items()
    }
    check_components(components or {}, index)
    for name, source in (components or {}).items():
        if name not in options:
            dtype = options["dtype"].get(name, options["dtype"]["default"])
            options[name] = None if source is None else load_component(name, source, index, str(path), dtype, configs.get(name))
    check_packages(index, options, str(path))
    if configs:
        from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=configs)
    with refused(f"model.diffusers {path}: cannot be loaded"):
        # the class itself: DiffusionPipeline would load optional components that are said to be None
        pipeline = getattr(diffusers, family.pipeline_class, diffusers.DiffusionPipeline).from_pretrained(str(path), **options)
        if Path(path).is_dir():
            check_weights(Path(path), {name: part for name, part in pipeline.components.items() if name not in options})
    return pipeline


def quantizable(family: Family, index: Mapping[str, Any]) -> list[str]:
    """The names of the networks that can be quantized: the denoiser and the text encoders."""
    return [family.denoiser, *(name for name in names_in(index) if name.startswith(TEXT_ENCODER))]


def check_components(names: Iterable[str], index: Mapping[str, Any]) -> None:
    """Raise InputError for a name that is none of the pipeline's components."""
    for name in names:
        if name not in names_in(index):
            raise InputError(
                f"model.components: {index.get('_class_name')} has no {name!r}{did_you_mean(name, names_in(index))}"
            )


def check_packages(index: Mapping[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Raise InputError if a component of transformers needs a package that is not installed, such as torchvision for processors
    of pictures, before more than the index is fetched.

    Args:
        given: components that are not loaded, by their names.
    """
    import transformers

    for name in names_in(index):
        library, kind = index[name]
        if library == "transformers" and name not in given:
            stand_in = getattr(transformers, kind, None)  # of a class that cannot be imported without them
            if missing := getattr(stand_in, "_backends", None):
                needed = " ".join(missing)
                raise InputError(f"model.diffusers {path}: its {name}, {kind}, needs {needed}: pip install {needed}")


def dtypes(dtype: Any, index: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Return the dtypes of components by name, and of all others as `default`, in which they are loaded from their files: what
    is once rounded to 16 bits stays rounded. Without a word the decoder is in float32, as are all components.

    Args:
        index: of the pipeline.

    Raises InputError for what is no dtype, or no component.
    """
    given = dict(dtype) if isinstance(dtype, Mapping) else {"default": dtype}
    known = ["default", *names_in(index)]
    for name, kind in given.items():
        if name not in known:
            raise InputError(f"model.dtype: {index.get('_class_name')} has no {name!r}{did_you_mean(name, known)}")
        if not isinstance(kind, torch.dtype):
            raise InputError(f"dtype of {name}: must be a dtype of torch, such as torch.bfloat16, is {kind!r}")
    return {"default": torch.float32, "vae": torch.float32, **given}


def save_weights(pipeline: Any, denoiser: Denoiser, component: str, folder: Path) -> None:
    """Write what was tuned: an adapter as `pipeline.load_lora_weights(folder)` reads it, or `peft.PeftModel` where the pipeline
    has no such method, or the denoiser as its class does.

    An adapter above others is written alone, and a warning names those that it needs below it.

    Args:
        component: name of the denoiser in the pipeline.
    """
    network: Any = denoiser.network
    if not isinstance(denoiser, AdaptedDenoiser):
        network.save_pretrained(folder / component)
        return
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(network, adapter_name=denoiser.adapter)
    config = network.peft_config[denoiser.adapter]
    if hasattr(pipeline, "save_lora_weights"):
        metadata = {f"{component}_lora_adapter_metadata": config.to_dict()}
        pipeline.save_lora_weights(folder, **{f"{component}_lora_layers": layers}, **metadata)
    else:
        config.save_pretrained(folder)
        save_file({PEFT_PREFIX + key: value for key, value in layers.items()}, folder / PEFT_LORA, {"format": "pt"})
    if denoiser.below:
        names = ", ".join(map(repr, denoiser.below))
        warnings.warn(
            f"{folder}: holds the new adapter alone, which was trained on top of {names}: load that too", Note, stacklevel=3
        )


def load_weights(denoiser: Denoiser, component: str, folder: Path) -> None:
    """Load what `save_weights` wrote into a denoiser that was made in the same way.

    Raises InputError if the weights cannot be read, or belong to another model or adapter.
    """
    network: Any = denoiser.network
    adapter = denoiser.adapter if isinstance(denoiser, AdaptedDenoiser) else None
    lora = PEFT_LORA if (folder / PEFT_LORA).exists() else LORA
    path = folder / (f"{component}/diffusion_pytorch_model.safetensors" if adapter is None else lora)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read ({error})") from None
    if adapter is None:
        with refused(f"{path}: is not the denoiser of this model"):
            network.load_state_dict(weights)
        return
    from peft import set_peft_model_state_dict

    wrong = f"{path}: is not an adapter of this model; are rank and target_modules those of the recipe?"
    with refused(wrong):
        own = {key.removeprefix(PEFT_PREFIX if lora == PEFT_LORA else f"{component}."): value for key, value in weights.items()}
        result: Any = set_peft_model_state_dict(network, own, adapter_name=adapter)
    if result.unexpected_keys or any(adapter in key.split(".") for key in result.missing_keys):
        raise InputError(wrong)
