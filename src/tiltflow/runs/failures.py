"""Diagnostics of a failed run, and advice where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import NonFiniteError, OutOfMemoryError, TiltflowError, UserCodeError
from tiltflow.files import write_json, write_text, writing
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.run_files import DIAGNOSTICS, TRACEBACK
from tiltflow.settings import Settings
from tiltflow.tensor_file import write_tensors
from tiltflow.training.settings import Training
from tiltflow.user_code import out_of_memory


@contextmanager
def diagnosed(path: Path, recipe: Settings, training: Training, note: Callable[[str], None]) -> Iterator[None]:
    """While a run trains in this context, write diagnostics of a number that is not finite and the traceback of an exception of
    user code into its folder; turn an error of missing memory into an OutOfMemoryError with advice.

    Args:
        note: is told where the traceback is, and of what could not be written.
    """
    try:
        yield
    except NonFiniteError as error:
        if error.where.get("process", 0) == processes.index():
            without_hiding(partial(diagnose, path, error), note)
        raise
    except UserCodeError as error:
        without_hiding(partial(_keep_traceback, path, error.traceback, note), note)
        raise
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemoryError(advice(error, recipe, training)) from None


def without_hiding(write: Callable[[], None], note: Callable[[str], None]) -> None:
    """Call `write` while another error ends the run: an error of its own is noted, and does not replace the first one."""
    try:
        write()
    except TiltflowError as error:
        note(str(error))


def diagnose(path: Path, error: NonFiniteError) -> None:
    """Write what is known of a number that is not finite into diagnostics/."""
    folder = path / DIAGNOSTICS / f"step-{error.where.get('step', 0):08d}"
    tensors = {key: value for key, value in error.tensors.items() if isinstance(value, Tensor)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if tensors:
            write_tensors(folder / "tensors.safetensors", tensors)
    write_json(folder / "report.json", {"error": str(error), **error.where, "tensors": sorted(tensors)})


def _keep_traceback(path: Path, text: str, note: Callable[[str], None]) -> None:
    file = path / DIAGNOSTICS / TRACEBACK
    with writing(file):
        file.parent.mkdir(exist_ok=True)
    write_text(file, text)
    note(f"the traceback is in {file}")


def advice(error: Exception, recipe: Settings, training: Training) -> str:
    """Advice on what to change where memory runs out; first what keeps the result the same."""
    size = training.micro_batch_size or training.samples_per_step
    half = next((part for part in range(size // 2, 0, -1) if training.samples_per_step % part == 0), None)
    remedies = []
    if half is not None:
        remedies.append(f"training.micro_batch_size={half} (now {size}) gives the same result in less memory")
    source = recipe.source if isinstance(recipe, CommonRecipe) else None
    if isinstance(source, Diffusers) and not source.gradient_checkpointing:
        remedies.append("model.gradient_checkpointing=true too, in a third more time")
    remedies = remedies or ["a smaller model, or a device with more memory, is needed"]
    return f"out of memory ({str(error).strip().splitlines()[0][:120]}). {'; '.join(remedies)}"
