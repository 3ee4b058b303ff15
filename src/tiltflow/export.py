"""Export of a tuned pipeline: a folder that plain diffusers loads, with a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.plots import curves
from tiltflow.run_folder import claim, read_records
from tiltflow.run_text_to_image import TextToImageRecipe, load_run, read_run
from tiltflow.settings import dump_yaml, parse_yaml

KEPT = ("before.png", "after.png", "recipe.yaml", "summary.json", "report.html")


def export_run(run: Path, output: Path, *, push_to_hub: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Write what a run tuned into `output`, which must be new or empty: `pytorch_lora_weights.safetensors`, which
    `pipeline.load_lora_weights(output)` accepts, or the whole pipeline where all of the denoiser was tuned.

    Args:
        push_to_hub: the name of a repository on the hub to upload the folder to.

    Raises InputError, with nothing written, if the run is not one of a pipeline.
    """
    recipe = read_run(run)
    claim(output)
    if recipe.model.adapter is not None:
        shutil.copytree(run / "model", output, dirs_exist_ok=True)
    else:
        _, tuned = load_run(recipe, run, device)
        setattr(tuned.pipeline, tuned.family.DENOISER, tuned.denoiser.network)
        tuned.pipeline.save_pretrained(output)
    for name in KEPT:
        if (run / name).exists():
            shutil.copy(run / name, output / name)
    (output / "curves.svg").write_text(curves(read_records(run), ["reward"]), encoding="utf-8")
    (output / "README.md").write_text(card(recipe, run), encoding="utf-8")
    result: dict[str, Any] = {"output": str(output), "kind": "full" if recipe.model.adapter is None else "lora", "url": None}
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


def card(recipe: TextToImageRecipe, run: Path) -> str:
    """README.md, with the front matter that the hub reads."""
    base, adapter = recipe.model.diffusers, recipe.model.adapter
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8")) if (run / "summary.json").exists() else {}
    about = {
        "base_model": base,
        "library_name": "diffusers",
        "tags": ["tiltflow", recipe.method.name, *(["lora"] if adapter else [])],
    }
    if found := licence(Path(base)):
        about["license"] = found
    loading = f'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("path/of/this/folder")'
    if adapter is None:
        loading = 'pipeline = DiffusionPipeline.from_pretrained("path/of/this/folder")'
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
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        loading,
        "```",
        "",
    ]
    if summary:
        lines += [
            f"| | base | tuned |\n|---|---|---|\n| mean reward, held-out prompts | {_pm(summary, 'reward_base')} | "
            f"{_pm(summary, 'reward_tuned')} |",
            "",
            "![Reward of the training batches](curves.svg)",
            "",
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
