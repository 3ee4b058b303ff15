"""Export of a tuned model into a folder with a model card: plain diffusers loads a pipeline, tiltflow any other model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.files import filling, trusted
from tiltflow.models.pipeline_files import SAMPLING
from tiltflow.models.pipelines import families
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.reports.plots import curves
from tiltflow.runs.card import card, measured_at
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.fingerprints import check_unchanged
from tiltflow.runs.lock import working_in
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import load_run, read_run
from tiltflow.runs.run_files import MODEL, claim, read_records
from tiltflow.runs.staged.folder import stage_folder
from tiltflow.runs.staged.results import is_staged, load_stage, read_staged

KEPT = ("recipe.yaml", "summary.json", "report.html")
"""Files of a run that are copied, beside its pictures."""


@dataclass(frozen=True)
class Tuned:
    """What is exported of a run, or of stages.

    Args:
        recipe: of the run, or of all stages.
        model: the folder of the tuned model.
        load: loads it, on a device.
        before, after: the runs whose pictures before and after show what was tuned.
    """

    recipe: CommonRecipe
    model: Path
    load: Callable[[str], Any]
    before: Path
    after: Path

    @classmethod
    def of(cls, run: Path) -> Tuned:
        """Of the folder of a run, or of stages. Raises InputError if there is no tuned model."""
        if not is_staged(run):
            recipe = read_run(run)
            return cls(recipe, run / MODEL, lambda device: load_run(recipe, run, device)[1], run, run)
        staged, rows = read_staged(run)
        last, count = stage_folder(run, len(rows)), len(rows)
        return cls(staged, last / MODEL, lambda device: load_stage(staged, run, count, device)[1], stage_folder(run, 1), last)

    def pictures(self) -> list[Path]:
        """Those that there are."""
        given = [(self.before, "before"), (self.after, "after")]
        return [path for run, side in given for kind in ("png", "gif") if (path := run / f"{side}.{kind}").exists()]


def export_run(run: Path, output: Path, *, push_to_hub: str | None = None, device: str = "cpu") -> dict[str, Any]:
    """Write the tuned model of a run, or of its last stage, into `output`, which must be new or empty, with the pictures and
    the recipe of the run and a model card, README.md, with the code that loads it. Returns `output`, the `kind` and, after an
    upload, its `url`.

    For a pipeline that is `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(output)` accepts, or where the
    pipeline has no such method, what `peft.PeftModel` reads, or the whole pipeline if all of the denoiser was tuned; scheduler/
    and sampling.json have the scheduler and the arguments with which plain diffusers draws what the run measured. For any other
    model it is the folder that `tiltflow.load` reads.

    Args:
        push_to_hub: the name of a repository on the hub to upload the folder to.

    Raises InputError, with nothing written, if `run` is not a run with a tuned model.
    """
    tuned = Tuned.of(run)
    check_unchanged(run, tuned.recipe, only="model")
    with working_in(output):
        claim(output)
        with filling(output) as folder:
            kind = _write(tuned, folder, device)
            for path in (*(run / name for name in KEPT if (run / name).exists()), *tuned.pictures()):
                shutil.copy(path, folder / path.name)
            if isinstance(tuned.recipe, Recipe):
                (folder / "curves.svg").write_text(curves(read_records(run), ["reward"]), encoding="utf-8")
            with trusted(run / "summary.json"):
                about = card(tuned.recipe, folder, push_to_hub or ".")
            (folder / "README.md").write_text(about, encoding="utf-8")
    url = None if push_to_hub is None else upload(output, push_to_hub)
    return {"output": str(output), "kind": kind, "url": url}


def _write(made: Tuned, folder: Path, device: str) -> str:
    """Write the model. Returns its kind: a network, a LoRA or a full pipeline."""
    source = made.recipe.source
    if isinstance(source, Diffusers):
        write_pipeline(made, source, folder, device)
        return "full" if source.adapter is None else "lora"
    shutil.copytree(made.model, folder, dirs_exist_ok=True)
    return "network"


def write_pipeline(made: Tuned, source: Diffusers, folder: Path, device: str) -> None:
    """Write what plain diffusers loads, and the scheduler and arguments with which it draws what the run measured."""
    if source.adapter is not None and (made.model / SAMPLING).exists():
        shutil.copytree(made.model, folder, dirs_exist_ok=True)
    else:
        tuned = made.load(device)
        if source.adapter is not None:  # a run of an earlier version
            tuned.save(folder)
        else:
            setattr(tuned.pipeline, tuned.family.denoiser, tuned.denoiser.network)
            tuned.pipeline.scheduler = tuned.exported_scheduler
            tuned.pipeline.save_pretrained(folder)
            tuned.save_sampling(folder)
    point, sampling = measured_at(made.recipe), json.loads((folder / SAMPLING).read_text(encoding="utf-8"))
    family = families().get(sampling.pop("pipeline", "FluxPipeline"))  # runs of earlier versions do not say which
    if family is not None and point.guidance_scale is not None:
        guided = family.guided_by(point.guidance_scale)
        sampling |= guided if guided.keys() <= sampling.keys() else {}
    if family is not None and {"height", "width"} <= sampling.keys():
        sampling |= family.arguments((sampling["height"], sampling["width"]), point.num_inference_steps)
    sampling["num_inference_steps"] = point.num_inference_steps
    if point.solver == "tcd":
        sampling["eta"] = point.eta
    (folder / SAMPLING).write_text(json.dumps(sampling) + "\n", encoding="utf-8")


def upload(folder: Path, repository: str) -> str:
    """Upload a folder to a repository on the hub, which is created if necessary. Returns its URL. Raises InputError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))
    except (OSError, HfHubHTTPError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--push-to-hub {repository}: {reason}; the folder {folder} is complete") from None
