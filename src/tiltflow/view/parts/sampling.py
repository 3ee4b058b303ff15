"""Samples drawn on the page: of one run at a time, at any strength of its tilt."""

from __future__ import annotations

import base64
import io
import shlex
import time
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

from pydantic import Field

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.models.model_folder import FlowConfig, model_folder, read_config
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.sources.network import Network
from tiltflow.models.sources.policy import Policy
from tiltflow.models.strength import at_strength
from tiltflow.models.text_to_image import TextToImage
from tiltflow.reports.drawn import can_be_drawn, drawn
from tiltflow.runs.ballot import prompts_of_run
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.run import read_run
from tiltflow.runs.run_files import MODEL
from tiltflow.runs.staged.folder import stage_folder
from tiltflow.runs.staged.results import is_staged, read_staged
from tiltflow.runs.strength import load_both
from tiltflow.settings import Settings, validate
from tiltflow.user_code import refused
from tiltflow.view.request import Answer, Request, Route, View

MOST_SAMPLES = 64


class Asked(Settings):
    """What the page asks for."""

    tilt_strength: Annotated[float, Field(ge=0, le=10)] = 1.0
    """0 is the base, 1 what was tuned."""
    condition: str | None = None
    """Prompt of a pipeline, or name of a class; all classes in turn by default."""
    num_samples: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] = 16
    """Number of samples."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of solver steps; the model's own by default."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the noise, which is the same at every strength."""

    def items(self, model: GenerativeModel) -> list[Item]:
        """What each sample is asked for. Raises InputError for no prompt, and for a class that the model does not have."""
        if isinstance(model, TextToImage):
            if not self.condition:
                raise InputError("a pipeline needs a prompt")
            return [Item(self.condition)] * self.num_samples
        names: Sequence[str] = model.class_names
        if self.condition is not None and self.condition not in names:
            raise InputError(f"there is no class {self.condition!r}")
        chosen = range(len(names)) if self.condition is None else [names.index(self.condition)]
        if not names:
            return [Item("")] * self.num_samples
        return [Item(names[k], {"label": k}) for i in range(self.num_samples) for k in [chosen[i % len(chosen)]]]

    def command(self, folder: Path, model: GenerativeModel) -> str:
        """The command that draws the same samples."""
        words = ["tiltflow", "sample", str(folder), "--tilt-strength", f"{self.tilt_strength:g}"]
        if self.condition is not None:
            words += ["--prompt" if isinstance(model, TextToImage) else "--label", self.condition]
        words += ["--num-samples", str(self.num_samples), "--seed", str(self.seed)]
        if self.num_inference_steps is not None:
            words += ["--num-inference-steps", str(self.num_inference_steps)]
        return shlex.join(words)


class Sampler:
    """The models of the run that was sampled last, loaded when it is first asked for. Requests wait for one another.

    Made where the consent of the user is known, such as `tiltflow.allow_code`: threads that answer requests do not have it.
    """

    def __init__(self, device: str) -> None:
        self.device, self.lock, self.consent = device, Lock(), copy_context()
        self.known: tuple[Any, tuple[Any, Any]] | None = None

    def draw(self, folder: Path, asked: Asked) -> dict[str, Any]:
        """A picture of the samples, and the command that draws them. Raises InputError for what cannot be had."""
        with self.lock:
            return self.consent.run(self._draw, folder, asked)

    def _draw(self, folder: Path, asked: Asked) -> dict[str, Any]:
        with refused(f"{folder}: cannot be sampled"):
            model = at_strength(*self._both(folder), asked.tilt_strength)
            items, began = asked.items(model), time.perf_counter()
            steps = asked.num_inference_steps or model.sampling.num_inference_steps
            sampling = model.sampling.model_copy(update={"num_inference_steps": steps})
            samples = model.draw(items, seed=asked.seed, sampling=sampling)
            seconds = time.perf_counter() - began
            picture = io.BytesIO()
            drawn(samples, max(1, round(len(items) ** 0.5))).save(picture, "PNG")
        data = base64.b64encode(picture.getvalue()).decode()
        return {"picture": f"data:image/png;base64,{data}", "command": asked.command(folder, model), "seconds": seconds}

    def _both(self, folder: Path) -> tuple[Any, Any]:
        """(base, tuned), loaded again if there is another tuned model now."""
        tuned = model_of(folder)
        key = (tuned, tuned.stat().st_mtime_ns if tuned.exists() else 0)
        if self.known is None or self.known[0] != key:
            self.known = None  # before the next is loaded: there may not be room for two
            self.known = key, load_both(folder, self.device)
        return self.known[1]


def model_of(folder: Path) -> Path:
    """The folder of the tuned model of a run, or of its last stage."""
    return (stage_folder(folder, len(read_staged(folder)[1])) if is_staged(folder) else folder) / MODEL


def options(folder: Path) -> dict[str, Any]:
    """What a run can be asked for, without loading it. Raises InputError for one whose samples cannot be drawn."""
    recipe: CommonRecipe = read_staged(folder)[0] if is_staged(folder) else read_run(folder)
    known: dict[str, Any] = {"classes": [], "prompts": None, "num_inference_steps": recipe.evaluation.first.num_inference_steps}
    if isinstance(recipe.source, Policy):
        raise InputError(f"{folder}: a policy draws actions for observations, and no pictures")
    if recipe.source.prompted:
        return known | {"prompts": prompts_of_run(folder), "num_samples": 4}
    config = read_config(model_folder(model_of(folder)))
    assert isinstance(config, FlowConfig)
    if config.decoder is None and not can_be_drawn(config.event_shape):
        raise InputError(f"{folder}: its samples are no pictures, videos or molecules; `tiltflow sample -o x.npz` writes them")
    if isinstance(recipe.source, Network) and not is_staged(folder):
        known["num_inference_steps"] = config.sampling.num_inference_steps
    return known | {"classes": config.class_names, "num_samples": 16}


def routes(view: View) -> Mapping[str, Route]:
    """The routes of this part."""
    sampler = Sampler(view.device)

    def ask(request: Request) -> Answer:
        folder = view.place(request).path
        try:
            return options(folder)
        except InputError as error:  # no mistake of the page, which asks this of each run
            return {"none": str(error)}

    def draw(request: Request) -> Answer:
        return sampler.draw(view.place(request).path, validate(Asked, request.settings, "sample"))

    return {"GET sampling/options": ask, "POST sampling/draw": draw}
