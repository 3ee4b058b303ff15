"""Pipelines of diffusers from their configs alone: networks whose weights have no memory, and tokenizers that have no words.

The configs are those of a folder, or of published models, whose numbers ship with tiltflow.
"""

# Mutation tests: none: facts about published models

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, not_installed
from tiltflow.models.components import names_in
from tiltflow.models.pipeline_files import NOT_NEEDED, check_components, dtypes, quantizable
from tiltflow.models.pipelines import families, family_named
from tiltflow.models.quantization import check_kinds
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.models.text_to_image import TextToImage
from tiltflow.runs.doctor.shapes import network_of_shapes
from tiltflow.shipped import ASSETS, INDEX, asset
from tiltflow.user_code import refused

FACTS = ASSETS / "architectures"
TINY = {"madebyollin/taesd": 4, "madebyollin/taesdxl": 4, "madebyollin/taesd3": 16, "madebyollin/taef1": 16}
"""Published decoders of the class AutoencoderTiny, which differ in the channels of their latents."""


@dataclass(frozen=True)
class Architecture:
    """What the configs of a pipeline say.

    Args:
        pipeline: class of the pipeline, `_class_name`, its own settings, and the names of components that it does without.
        components: class, `_class_name`, and settings of each component.
        published: numbers of parameters that others have published, by component.
    """

    pipeline: Mapping[str, Any]
    components: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, float]


def facts() -> dict[str, dict[str, Any]]:
    """Facts about published models, by the names of their files."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FACTS.glob("*.json"))}


def architecture(source: str) -> Architecture:
    """The configs of a pipeline: of a folder with model_index.json, a pipeline that ships with tiltflow, or a published model,
    by its name on the hub. Nothing is fetched. Raises InputError if they are not known, or not there."""
    for name, fact in facts().items():
        if source in (name, *fact["names"]):
            return Architecture(fact["pipeline"], fact["components"], fact["published"])
    folder = Path(asset(source, "pipeline", INDEX) or source)
    if source.startswith((".", "/")) and not folder.exists():
        raise InputError(f"model.diffusers {source}: there is no such folder")
    if not (folder / INDEX).is_file():
        known = ", ".join(name for fact in facts().values() for name in fact["names"])
        raise InputError(
            f"model.diffusers {source}: --config-only reads a folder with {INDEX} and the config.json of each component, or"
            f" knows {known}"
        )
    index = _json(folder / INDEX)
    components = {}
    for name, value in index.items():
        if not isinstance(value, list) or value[1:] in ([], [None]):
            continue
        found = [path for path in (folder / name).glob("*config.json") if path.name != "generation_config.json"]
        components[name] = {**(_json(found[0]) if found else {}), "_class_name": value[1]}
    own = {key: value for key, value in index.items() if key not in components}
    return Architecture(own, components, {})


def _json(path: Path) -> dict[str, Any]:
    with refused(f"model.diffusers: {path} cannot be read"):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def model_from_configs(source: Diffusers) -> TextToImage:
    """The untuned model of a recipe, of its configs alone. Raises InputError if they are not known, or no such pipeline can be
    made of them."""
    try:
        import diffusers
    except ImportError:
        raise not_installed("diffusers", "diffusers") from None
    found = architecture(source.diffusers)
    family = family_named(str(found.pipeline.get("_class_name")), families())
    index = {**found.pipeline, **{name: ["", ""] for name in found.components}}
    check_components(set(source.replaced) - set(NOT_NEEDED), index)
    check_kinds(source.quantization, quantizable(family, index), family.pipeline_class)
    kinds = dtypes({name: getattr(torch, dtype) for name, dtype in source.dtypes.items()}, index)
    parts: dict[str, Any] = {}
    for name, config in found.components.items():
        if name in source.replaced and source.replaced[name] is None:
            parts[name] = None
            continue
        if name in source.replaced:
            config = replacement(str(source.replaced[name]), name)
        with refused(f"model.diffusers {source.diffusers}: {name} cannot be made of its config"):
            parts[name] = component(config, kinds.get(name, kinds["default"]))
    kind = getattr(diffusers, family.pipeline_class)
    taken = inspect.signature(kind.__init__).parameters
    left_out = {*NOT_NEEDED}.difference(family.components) | {*names_in(found.pipeline)}
    unused = {name: None for name in taken if name in left_out}
    settings = {name: value for name, value in found.pipeline.items() if name in taken and name not in unused}
    if "requires_safety_checker" in taken:
        settings["requires_safety_checker"] = False
    with refused(f"model.diffusers {source.diffusers}: cannot be made of its configs"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of the schedule is said when the weights are there
        pipeline = kind(**{**{name: part for name, part in parts.items() if name in taken}, **settings, **unused})
        # torch cannot move tied weights that have no memory; nothing else is asked to move them
        pipeline.to = lambda *arguments, **options: pipeline
        return source.model_copy(update={"text_encoders": "keep"}).model(pipeline, lambda there: pipeline, "cpu")


def replacement(source: str, name: str) -> Mapping[str, Any]:
    """The config of a component from elsewhere. Raises InputError if it is not known, or in a folder."""
    if source in TINY:
        return {"_class_name": "AutoencoderTiny", "latent_channels": TINY[source]}
    for folder in (Path(source), Path(source) / name):
        if (folder / "config.json").is_file():
            return _json(folder / "config.json")
    raise InputError(f"model.components: --config-only finds no config.json of {name} in {source}")


def component(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A component by its config: a network whose weights have no memory, a scheduler, or a tokenizer without words."""
    import diffusers
    import transformers

    name = config.get("_class_name") or (config.get("architectures") or ["Tokenizer"])[0]
    if "Tokenizer" in name or "Processor" in name or not (set(config) - {"_class_name", "model_max_length"}):
        return Tokenizer(int(min(config.get("model_max_length") or 10**6, 10**6)))
    if hasattr(diffusers, name):
        kind: Any = getattr(diffusers, name)
        if not issubclass(kind, nn.Module):
            return kind.from_config(dict(config))
        return network_of_shapes(partial(kind.from_config, dict(config)), dtype)
    kind = getattr(transformers, name)
    return network_of_shapes(lambda: kind(kind.config_class.from_dict(dict(config))), dtype)


class Tokenizer:
    """A tokenizer without words: every text has as many tokens as are taken."""

    added_tokens_encoder: Mapping[str, int] = {}
    bos_token_id = eos_token_id = pad_token_id = 0
    padding_side = "right"

    def __init__(self, longest: int):
        self.model_max_length = longest

    def tokenize(self, text: str) -> list[str]:
        """No token is one that was added."""
        return []

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        """Nothing was cut off."""
        return []

    def apply_chat_template(self, *arguments: Any, tokenize: bool = True, **options: Any) -> Any:
        """A chat of one text."""
        return self([""], **options) if tokenize else ""

    def __call__(self, texts: str | Sequence[Any], *arguments: Any, max_length: int | None = None, **options: Any) -> Any:
        from transformers import BatchEncoding

        count = 1 if isinstance(texts, str) else len(texts)
        if max_length is None and not options.get("truncation"):  # asked how long a text is
            return BatchEncoding({"input_ids": torch.zeros(count, 1, dtype=torch.int64)})
        length = min(max_length or self.model_max_length, self.model_max_length)
        ids = torch.zeros(count, length, dtype=torch.int64)
        ids[:, -1] = 1
        masks: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return BatchEncoding(masks)
