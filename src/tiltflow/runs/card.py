"""The model card of an export: README.md, with the code that draws what the run measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.evaluation.settings import Point
from tiltflow.files import read_json
from tiltflow.models.components import place_of
from tiltflow.models.few_steps import OWN_SAMPLING
from tiltflow.models.pipeline_files import PEFT_LORA, SAMPLING
from tiltflow.models.quantization import CONFIGS, OF_TORCHAO, TEXT_ENCODER
from tiltflow.models.schedules import TOLERANCE, schedule_of
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.pictures import IMAGE
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.settings import dump_yaml, parse_yaml
from tiltflow.shipped import INDEX, asset

quoted = partial(json.dumps, ensure_ascii=False)


def card(recipe: CommonRecipe, output: Path, place: str) -> str:
    """Write the card, with the front matter that the hub reads.

    Args:
        output: the export, which has the recipe, the summary and the pictures of the run.
        place: the folder of the export, or its name on the hub, for the code.
    """
    summary = read_json(output / "summary.json") if (output / "summary.json").exists() else {}
    found = licence(Path(recipe.model_name))
    lines = [
        *_front_matter(recipe, found),
        f"# {recipe.model_name}, tuned by {recipe.method.name}",
        "",
        recipe.description,
        "",
        _aim(recipe, summary),
        *(f"{limit}" for limit in summary.get("limits", [])),
        "",
        "What the run measured, in this folder:" if place == "." else "What the run measured:",
        "",
        "```python",
        usage(recipe, output, place),
        "```",
        "",
        *(f"{reason}\n" for reason in reservations(recipe, output)),
        *_results(recipe, output, summary),
        "The licence of the base model applies to what is derived from it" + (f": {found}." if found else "; see its card."),
        "",
        "The recipe, for `tiltflow train`:",
        "",
        "```yaml",
        (output / "recipe.yaml").read_text(encoding="utf-8").strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(recipe: CommonRecipe, found: str | None) -> list[str]:
    """The YAML at the head of a card, from the recipe and the licence of the base."""
    pipeline = isinstance(recipe.source, Diffusers)
    about = {
        "base_model": recipe.model_name,
        "library_name": "diffusers" if pipeline else "tiltflow",
        "tags": ["tiltflow", recipe.method.name, *(["lora"] if pipeline and recipe.source.adapter else [])],
    }
    if found:
        about["license"] = found
    return ["---", dump_yaml(about).strip(), "---", ""]


def _aim(recipe: CommonRecipe, summary: Mapping[str, Any]) -> str:
    """What was tuned for, in a sentence or two."""
    if isinstance(recipe, StagedRecipe):
        return f"Utility of the law: {recipe.utility.words}, in stages that each tune for its first variation."
    assert isinstance(recipe, Recipe)
    law = f"Reward: {recipe.reward.description}. Aims at {summary.get('target_law', 'a tilted law')}"
    return law + (f" with beta = {summary['beta']:g}." if summary.get("beta") is not None else ".")


def _results(recipe: CommonRecipe, output: Path, summary: Mapping[str, Any]) -> list[str]:
    """The mean rewards and their curve, or the utility, and the pictures of a run, where it has them."""
    lines = []
    if isinstance(recipe, StagedRecipe):
        if summary and summary["utility_before"] is not None and summary["utility_after"] is not None:
            sides = " | ".join(_pm(summary, f"utility_{side}") for side in ("before", "after"))
            lines = ["| | first model | last stage |", "|---|---|---|", f"| utility {recipe.utility.name} | {sides} |", ""]
    elif summary:
        of_what = ", held-out prompts" if recipe.prompts is not None else ""
        lines += [
            f"| | base | tuned |\n|---|---|---|\n| mean reward{of_what} | {_pm(summary, 'reward_base')} | "
            f"{_pm(summary, 'reward_tuned')} |",
            "",
            "![Reward of the training batches](curves.svg)",
            "",
        ]
    kind = "gif" if (output / "before.gif").exists() else "png"
    if (output / f"before.{kind}").exists():
        lines += [
            "Before and after, from the same noise:",
            "",
            f"![Pictures of the base](before.{kind}) ![Pictures of the tuned model](after.{kind})",
            "",
        ]
    return lines


def _pm(summary: Mapping[str, Any], key: str) -> str:
    return f"{summary[key]:.3g} ± {summary[key + '_error']:.2g}"


def licence(folder: Path) -> str | None:
    """The licence in the model card of a pipeline on disk, if it has one."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    head = path.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        found = parse_yaml(head[1], str(path)) if len(head) > 2 and not head[0].strip() else None
    except InputError:
        return None
    return str(found["license"]) if isinstance(found, dict) and "license" in found else None


# ---- the code ----


def usage(recipe: CommonRecipe, output: Path, place: str) -> str:
    """Python code that loads an export and draws what the run measured; of diffusers alone for a pipeline.

    Args:
        place: the folder, or its name on the hub, as the code is to name it.
    """
    model = recipe.source
    if not isinstance(model, Diffusers):
        folder = quoted(place) if place == "." else f"snapshot_download({quoted(place)})"
        lines = [] if place == "." else ["from huggingface_hub import snapshot_download", ""]
        return "\n".join(["import tiltflow", *lines, f"model = tiltflow.load({folder})", "samples = model.sample(16)"])
    scheduler = type(scheduler_of(output)).__name__
    sampling = json.loads((output / SAMPLING).read_text(encoding="utf-8"))
    lines = ["import torch"] if model.adapter is not None and _names_dtype(model) else []
    lines += ["import transformers"] if any(name.startswith(TEXT_ENCODER) for name in model.quantization) else []
    own = any(source is not None and _in_card(name, source) for name, source in model.replaced.items())
    imported = {"DiffusionPipeline", scheduler} | ({"AutoModel"} if own and model.adapter is not None else set())
    imported |= {"PipelineQuantizationConfig"} if model.quantization else set()
    imported |= {CONFIGS[kind] for name, kind in model.quantization.items() if not name.startswith(TEXT_ENCODER)}
    lines += [f"from diffusers import {', '.join(sorted(imported))}"]
    lines += ["from peft import PeftModel"] if (output / PEFT_LORA).exists() else []
    lines += [f"from torchao.quantization import {', '.join(parts)}"] if (parts := of_torchao(model)) else []
    lines += [""]
    if model.adapter is None:
        lines += [f"pipeline = DiffusionPipeline.from_pretrained({quoted(place)})"]
    else:
        lines += _base_with_loras(model, scheduler, place, by_peft=(output / PEFT_LORA).exists())
    lines += [f"pipeline.vae.enable_{part}()" for part in ("tiling", "slicing") if getattr(model, f"vae_{part}")]
    texts = recipe.prompts.texts if recipe.prompts is not None else ()
    prompt = (texts or ["a photograph"])[0]
    given, picture = f"prompt={quoted(prompt)}", sampling.pop(IMAGE, None)
    arguments = (f"{quoted(key)}: {quoted(value) if isinstance(value, str) else value}" for key, value in sampling.items())
    lines += [f"sampling = {{{', '.join(arguments)}}}"]
    if picture is not None:
        size = f"{sampling['height']}, {sampling['width']}"
        lines[0:0] = ["from diffusers.utils import load_image"]
        lines += [f"picture = pipeline.image_processor.resize(load_image({quoted(picture)}), {size})"]
        given = f"image=picture, {given}"
    drawn = f"pipeline({given}, **sampling)"
    lines += [f"frames = {drawn}.frames[0]" if "num_frames" in sampling else f"image = {drawn}.images[0]"]
    return "\n".join(lines)


def _base_with_loras(model: Diffusers, scheduler: str, place: str, *, by_peft: bool) -> list[str]:
    """Code that loads the base pipeline, the scheduler of the export, and the LoRAs, the tuned one last; by peft where the
    pipeline does not load any itself."""
    lines = []
    if folder := asset(model.diffusers, "pipeline", INDEX):
        lines += [f"# the folder {folder.parent.name}/{folder.name}, which comes with tiltflow"]
    named = {"revision": model.revision, "variant": model.variant}
    options = [f"{key}={quoted(value)}" for key, value in named.items() if value is not None]
    options += [
        f"{name}={_component(model, name, source)}" for name, source in model.replaced.items() if _in_card(name, source)
    ]
    options += [f"dtype=torch.{model.dtypes['default']}"] if _names_dtype(model) else []
    if model.quantization:
        mapping = ", ".join(f"{quoted(name)}: {_quantization(model, name)}" for name in model.quantization)
        lines += [f"quantization = PipelineQuantizationConfig(quant_mapping={{{mapping}}})"]
        options += ["quantization_config=quantization"]
    lines += [
        f"pipeline = DiffusionPipeline.from_pretrained({', '.join([quoted(model.diffusers), *options])})",
        f'pipeline.scheduler = {scheduler}.from_pretrained({quoted(place)}, subfolder="scheduler")',
    ]
    if by_peft:
        return [*lines, f"pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, {quoted(place)})"]
    if not model.loras:
        return [*lines, f"pipeline.load_lora_weights({quoted(place)})"]
    names = [*(f"lora_{i}" for i in range(len(model.loras))), "tuned"]
    for name, path in zip(names, [*(lora.path for lora in model.loras), place], strict=True):
        lines += [f"pipeline.load_lora_weights({quoted(path)}, adapter_name={quoted(name)})"]
    return [*lines, f"pipeline.set_adapters({quoted(names)}, {[*(lora.strength for lora in model.loras), 1.0]})"]


def _names_dtype(model: Diffusers) -> bool:
    """Whether the code says the dtype of the pipeline: diffusers' own is float32, and bfloat16 beside torchao."""
    return model.dtypes["default"] != "float32" or bool(model.quantization)


def _in_card(name: str, source: str | None) -> bool:
    """Whether the code loads a component from elsewhere: models of diffusers from folders; the export has the scheduler."""
    models = name.startswith(("vae", "unet", "transformer"))
    return source is None or (models and not source.endswith(".safetensors"))


def _component(model: Diffusers, name: str, source: str | None) -> str:
    if source is None:
        return "None"
    place = place_of(name, source)
    subfolder = f", subfolder={quoted(place.subfolder)}" if place.subfolder else ""
    quantized = f", quantization_config={_quantization(model, name)}" if name in model.quantization else ""
    return f"AutoModel.from_pretrained({quoted(place.path)}{subfolder}{quantized})"


def of_torchao(model: Diffusers) -> list[str]:
    """The configurations of torchao that the weights of a recipe's base are quantized with."""
    return sorted({OF_TORCHAO[kind] for kind in model.quantization.values() if kind in OF_TORCHAO})


def _quantization(model: Diffusers, name: str) -> str:
    """Code of the configuration that a component is quantized with; see `models.quantization.config_of`."""
    kind, library = model.quantization[name], "transformers." if name.startswith(TEXT_ENCODER) else ""
    if kind in OF_TORCHAO:
        return f"{library}{CONFIGS[kind]}({OF_TORCHAO[kind]}())"
    dtype = model.dtypes.get(name, model.dtypes["default"])
    options = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{dtype}'
    return f"{library}{CONFIGS[kind]}({options})"


# ---- what plain diffusers draws ----


def measured_at(recipe: CommonRecipe) -> Point:
    """The point of the evaluation that plain diffusers can repeat: the first one of the solver euler, or else the first one."""
    points = recipe.evaluation.points or ()
    return next((point for point in points if point.solver == "euler" and point.scheduler is None), recipe.evaluation.first)


def scheduler_of(output: Path) -> Any:
    """Load the scheduler of an export. Raises InputError if it is not a scheduler of diffusers."""
    import diffusers

    path = output / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise InputError(f"{path}: {config.get('_class_name')!r} is not a scheduler of diffusers")
    return kind.from_config(config)


def reservations(recipe: CommonRecipe, output: Path) -> list[str]:
    """The reasons why plain diffusers may draw other pictures than were measured, one sentence each."""
    if not isinstance(recipe.source, Diffusers):
        return []
    scheduler, point, reasons = scheduler_of(output), measured_at(recipe), []
    own = OWN_SAMPLING.get(type(scheduler).__name__)
    same_law = own is not None and own.solver == point.solver
    if same_law:
        reasons.append(
            f"The pictures that were measured were drawn by the solver {point.solver}, which takes the steps of"
            f" {type(scheduler).__name__} with other noise: of the same law, they are others."
        )
    elif point.solver != "euler":
        reasons.append(
            f"The pictures that were measured were drawn by the solver {point.solver}, which diffusers does not have."
        )
    if not same_law and (apart := schedule_of(scheduler).own_difference(point.num_inference_steps)) > TOLERANCE:
        reasons.append(
            f"At {point.num_inference_steps} steps {type(scheduler).__name__} draws other latents than were measured, by"
            f" {apart:.2g} of the largest on a normal law."
        )
    for name, source in recipe.source.replaced.items() if recipe.source.adapter is not None else ():
        if name != "scheduler" and not _in_card(name, source):
            reasons.append(f"The run had {name} from {source}, which this code does not load.")
    dtypes = recipe.source.dtypes
    if {*dtypes.values()} != {"float32"}:
        others = "".join(f", its {name} in {dtype}" for name, dtype in dtypes.items() if name != "default")
        decoded = "kept" if "vae" in dtypes else "decoded pictures, and kept"
        reasons.append(f"The run {decoded} its adapter in float32{others}; this pipeline is all in {dtypes['default']}.")
    return reasons
