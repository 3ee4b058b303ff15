"""Export of what a run tuned: a folder with a model card that plain diffusers loads, or of a network, tiltflow."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.evaluation.settings import Point
from tiltflow.files import filling, read_json, trusted
from tiltflow.models.pipeline_files import SAMPLING
from tiltflow.models.schedules import TOLERANCE, schedule_of
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.reports.plots import curves
from tiltflow.runs.fingerprints import check_unchanged
from tiltflow.runs.lock import working_in
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import load_run, read_run
from tiltflow.runs.run_files import claim, read_records
from tiltflow.settings import dump_yaml, parse_yaml
from tiltflow.shipped import INDEX, assets, by_name

KEPT = ("before.png", "after.png", "recipe.yaml", "summary.json", "report.html")


def export_run(run: Path, output: Path, *, push_to_hub: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Write what a run tuned into `output`, which must be new or empty, with its pictures, its recipe and a card, README.md,
    that has the code to load it.

    Of a pipeline that is `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output)` accepts, or the whole
    pipeline where all of the denoiser was tuned; with it come the scheduler, in scheduler/, and the arguments, in
    sampling.json, with which plain diffusers draws what the run measured. Of another network it is the folder that
    `tiltflow.load` reads.

    Args:
        push_to_hub: the name of a repository on the hub to upload the folder to.

    Raises InputError, with nothing written, if `run` is no run with a tuned model.
    """
    recipe = read_run(run)
    source = recipe.source
    check_unchanged(run, recipe, only="model")
    with working_in(output):
        claim(output)
        with filling(output) as folder:
            if isinstance(source, Diffusers):
                kind = "full" if source.adapter is None else "lora"
                write_pipeline(recipe, source, run, folder, device)
            else:
                kind = "network"
                shutil.copytree(run / "model", folder, dirs_exist_ok=True)
            for name in KEPT:
                if (run / name).exists():
                    shutil.copy(run / name, folder / name)
            (folder / "curves.svg").write_text(curves(read_records(run), ["reward"]), encoding="utf-8")
            with trusted(run / "summary.json"):
                about = card(recipe, run, folder, push_to_hub or ".")
            (folder / "README.md").write_text(about, encoding="utf-8")
    result: dict[str, Any] = {"output": str(output), "kind": kind, "url": None}
    if push_to_hub is not None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi()
        try:
            api.create_repo(push_to_hub, exist_ok=True)
            result["url"] = str(api.upload_folder(repo_id=push_to_hub, folder_path=str(output)))
        except (OSError, HfHubHTTPError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--push-to-hub {push_to_hub}: {reason}; the folder {output} is complete") from None
    return result


def write_pipeline(recipe: Recipe, source: Diffusers, run: Path, folder: Path, device: str) -> None:
    """Write what plain diffusers loads, and how it draws what the run measured."""
    if source.adapter is not None and (run / "model" / SAMPLING).exists():
        shutil.copytree(run / "model", folder, dirs_exist_ok=True)
    else:
        _, tuned = load_run(recipe, run, device)
        if source.adapter is not None:  # of a run that an earlier version made
            tuned.save(folder)
        else:
            setattr(tuned.pipeline, tuned.family.denoiser, tuned.denoiser.network)
            tuned.pipeline.scheduler = tuned.schedule.plain
            tuned.pipeline.save_pretrained(folder)
            tuned.save_sampling(folder)
    point, sampling = measured_at(recipe), json.loads((folder / SAMPLING).read_text(encoding="utf-8"))
    if point.guidance_scale is not None and "guidance_scale" in sampling:
        sampling["guidance_scale"] = point.guidance_scale
    sampling["num_inference_steps"] = point.num_inference_steps
    (folder / SAMPLING).write_text(json.dumps(sampling) + "\n", encoding="utf-8")


def measured_at(recipe: Recipe) -> Point:
    """The point of the evaluation that plain diffusers can repeat: the first one of the solver euler, or else the first one."""
    points = recipe.evaluation.points or ()
    return next((point for point in points if point.solver == "euler"), recipe.evaluation.first)


def scheduler_of(output: Path) -> Any:
    """The scheduler that an export comes with. Raises InputError if it is none of diffusers'."""
    import diffusers

    path = output / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise InputError(f"{path}: {config.get('_class_name')!r} is no scheduler of diffusers")
    return kind.from_config(config)


def usage(recipe: Recipe, output: Path, place: str) -> str:
    """Python code, of diffusers alone where it is a pipeline, that draws what the run measured, from what `export_run` has
    written into `output`.

    Args:
        place: the folder, or its name on the hub, as the code says it.
    """
    model, quoted = recipe.source, partial(json.dumps, ensure_ascii=False)
    if not isinstance(model, Diffusers):
        folder = quoted(place) if place == "." else f"snapshot_download({quoted(place)})"
        lines = [] if place == "." else ["from huggingface_hub import snapshot_download", ""]
        return "\n".join(["import tiltflow", *lines, f"model = tiltflow.load({folder})", "samples = model.sample(16)"])
    scheduler = type(scheduler_of(output)).__name__
    sampling = json.loads((output / SAMPLING).read_text(encoding="utf-8"))
    lines = ["import torch"] if model.adapter is not None and model.dtype != "float32" else []
    lines += [f"from diffusers import {', '.join(sorted({'DiffusionPipeline', scheduler}))}", ""]
    if model.adapter is None:
        lines += [f"pipeline = DiffusionPipeline.from_pretrained({quoted(place)})"]
    else:
        if by_name(model.diffusers, assets(INDEX), "pipeline"):
            lines += [f"# the folder tiltflow/assets/{model.diffusers} of the package tiltflow"]
        options = [f"{key}={quoted(value)}" for key in ("revision", "variant") if (value := getattr(model, key)) is not None]
        options += [f"{part}=None" for part in model.without]
        options += [f"dtype=torch.{model.dtype}"] if model.dtype != "float32" else []
        lines += [
            f"pipeline = DiffusionPipeline.from_pretrained({', '.join([quoted(model.diffusers), *options])})",
            f'pipeline.scheduler = {scheduler}.from_pretrained({quoted(place)}, subfolder="scheduler")',
        ]
        if model.loras:
            names = [*(f"lora_{i}" for i in range(len(model.loras))), "tuned"]
            for name, path in zip(names, [*(lora.path for lora in model.loras), place], strict=True):
                lines += [f"pipeline.load_lora_weights({quoted(path)}, adapter_name={quoted(name)})"]
            lines += [f"pipeline.set_adapters({quoted(names)}, {[*(lora.strength for lora in model.loras), 1.0]})"]
        else:
            lines += [f"pipeline.load_lora_weights({quoted(place)})"]
    texts = recipe.prompts.texts if recipe.prompts is not None else ()
    prompt = (texts or ["a photograph"])[0]
    lines += [f"sampling = {quoted(sampling)}", f"image = pipeline({quoted(prompt)}, **sampling).images[0]"]
    return "\n".join(lines)


def reservations(recipe: Recipe, output: Path) -> list[str]:
    """Why plain diffusers may draw other pictures than those that were measured: one sentence for each reason."""
    if not isinstance(recipe.source, Diffusers):
        return []
    scheduler, point, reasons = scheduler_of(output), measured_at(recipe), []
    if point.solver != "euler":
        reasons.append(
            f"The pictures that were measured were drawn by the solver {point.solver}, which diffusers does not have."
        )
    if (apart := schedule_of(scheduler).own_difference(point.num_inference_steps)) > TOLERANCE:
        reasons.append(
            f"At {point.num_inference_steps} steps {type(scheduler).__name__} draws other latents than were measured, by"
            f" {apart:.2g} of the largest on a normal law."
        )
    if recipe.source.dtype != "float32":
        reasons.append(
            f"The run decoded pictures, and kept its adapter, in float32; this pipeline is all in {recipe.source.dtype}."
        )
    return reasons


def card(recipe: Recipe, run: Path, output: Path, place: str) -> str:
    """README.md, with the front matter that the hub reads."""
    base, pipeline = recipe.model_name, isinstance(recipe.source, Diffusers)
    summary = read_json(run / "summary.json") if (run / "summary.json").exists() else {}
    about = {
        "base_model": base,
        "library_name": "diffusers" if pipeline else "tiltflow",
        "tags": ["tiltflow", recipe.method.name, *(["lora"] if pipeline and recipe.source.adapter else [])],
    }
    if found := licence(Path(base)):
        about["license"] = found
    lines = [
        "---",
        dump_yaml(about).strip(),
        "---",
        "",
        f"# {base}, tuned by {recipe.method.name}",
        "",
        recipe.description,
        "",
        f"Reward: {recipe.reward.description}. Aims at {summary.get('target_law', 'a tilted law')}"
        + (f" with beta = {summary['beta']:g}." if summary.get("beta") is not None else "."),
        *(f"{limit}" for limit in summary.get("limits", [])),
        "",
        "What the run measured, in this folder:" if place == "." else "What the run measured:",
        "",
        "```python",
        usage(recipe, output, place),
        "```",
        "",
        *(f"{reason}\n" for reason in reservations(recipe, output)),
    ]
    if summary:
        of_what = ", held-out prompts" if recipe.prompts is not None else ""
        lines += [
            f"| | base | tuned |\n|---|---|---|\n| mean reward{of_what} | {_pm(summary, 'reward_base')} | "
            f"{_pm(summary, 'reward_tuned')} |",
            "",
            "![Reward of the training batches](curves.svg)",
            "",
        ]
    if (run / "before.png").exists():
        lines += [
            "Before and after, from the same noise:",
            "",
            "![Pictures of the base](before.png) ![Pictures of the tuned model](after.png)",
            "",
        ]
    lines += [
        "The licence of the base model applies to what is derived from it" + (f": {found}." if found else "; see its card."),
        "",
        "The recipe, for `tiltflow train`:",
        "",
        "```yaml",
        (run / "recipe.yaml").read_text(encoding="utf-8").strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def licence(folder: Path) -> str | None:
    """What the card of a pipeline on disk says its licence is."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    head = path.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        found = parse_yaml(head[1], str(path)) if len(head) > 2 and not head[0].strip() else None
    except InputError:
        return None
    return str(found["license"]) if isinstance(found, dict) and "license" in found else None


def _pm(summary: dict[str, Any], key: str) -> str:
    return f"{summary[key]:.3g} ± {summary[key + '_error']:.2g}"
