"""The folder of stages: a run for each, stages.json, and a report; what it resumes from.

stage-01/, stage-02/ ..     the run of each stage, as `tiltflow.tune` writes it; see `tiltflow.runs.run`
stages.json                 settings, a description, caveats, and a row for each finished stage: utility with errors, path KL,
                            seconds of training
report.html                 a row and a picture for each of them
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors.torch import load_file
from torch import nn

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.files import read_json, trusted, write_json
from tiltflow.models.model_folder import WEIGHTS
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.reports.stages import DAMAGED, FILE, read_stages, write_stages_report
from tiltflow.runs.lock import working_in
from tiltflow.runs.resume import FREE_TO_CHANGE, flat
from tiltflow.runs.run_files import MODEL, claim, inside
from tiltflow.training.settings import Training
from tiltflow.training.trainer import Record
from tiltflow.user_code import refused

M = TypeVar("M", bound=GenerativeModel)
STAGE = re.compile(r"stage-(\d+)")
"""The name of the folder of a stage, and its number."""


def stage_folder(path: Path, number: int) -> Path:
    """The run of a stage in the folder of stages."""
    return path / f"stage-{number:02d}"


@dataclass
class StagesFolder:
    """The folder of stages, which this process has locked.

    Args:
        settings: all that the stages depend on and that can be written down.
        about: the description and the caveats, for the report.
        rows: of stages.json, of the stages that are finished.
    """

    path: Path
    settings: dict[str, Any]
    about: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def begin(
        cls,
        path: Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        training: Training,
        note: Callable[[str], None],
    ) -> Iterator[StagesFolder]:
        """Begin in a new folder, or go on in one with stages: a context in which no other process works there.

        Raises InputError if it holds something else, or stages with other settings, or is not to be resumed.
        """
        wanted = training.resume_from_checkpoint
        if wanted not in (None, "latest"):
            raise InputError(
                f"training.resume_from_checkpoint {wanted!r}: stages go on from the latest checkpoint; give 'latest'"
            )
        with working_in(path, note):
            place = cls(path, json.loads(json.dumps(settings)), about)
            if (path / FILE).exists():
                if wanted is None:
                    raise InputError(
                        f"{path}: already holds stages; to go on with them give Training(resume_from_checkpoint='latest');"
                        " nothing was overwritten"
                    )
                place._resume()
            elif wanted is None or [each for each in inside(path) if each != place.folder(1)]:
                claim(path)
            processes.wait()  # until all have looked, before one writes
            yield place

    def _resume(self) -> None:
        content = read_stages(self.path)
        with trusted(self.path / FILE, DAMAGED):
            then, self.rows = flat(content["settings"]), list(content["stages"])
        now = flat(self.settings)
        changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        unsafe = [key for key in changed if not key.startswith(FREE_TO_CHANGE)]
        if unsafe:
            listed = "; ".join(f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in unsafe[:5])
            raise InputError(
                f"{self.path}: the stages were begun with other settings: {listed}; change it back, or give a new output"
            )

    def folder(self, number: int) -> Path:
        """The run of a stage."""
        return stage_folder(self.path, number)

    def begun(self, record: Record) -> None:
        """A callback: once a step has shown that the settings work, they are written."""
        if not (self.path / FILE).exists():
            self._write()

    def finished(self, number: int) -> bool:
        """Whether a stage needs no training any more."""
        return number <= len(self.rows)

    def load(self, number: int, start: M, training: Training, seed: int) -> M:
        """The tuned model of a finished stage, whose base is `start`, bit for bit.

        Raises InputError if it cannot be read.
        """
        _, tuned = start.trainable(None, training.trainable, seed=seed)
        folder, network = self.folder(number) / MODEL, cast(nn.Module, tuned.flow.network)
        if isinstance(tuned, TextToImage):
            tuned.load_weights(folder)
        else:
            with refused(f"{folder}: is not the model of stage {number}"):
                network.load_state_dict(load_file(folder / WEIGHTS, device=str(start.device)))
        return tuned

    def add(self, number: int, estimates: Mapping[str, Estimate | None], stopped: str | None) -> None:
        """Write the row of a stage, and the report. Of one that was finished before only `stopped` may be another."""
        if self.finished(number):
            if self.rows[number - 1]["stopped"] != stopped:
                self.rows[number - 1]["stopped"] = stopped
                processes.by_main(self._write)
            return
        summary = read_json(self.folder(number) / "summary.json")
        row: dict[str, Any] = {"stage": number, "folder": self.folder(number).name}
        for name, each in estimates.items():
            row |= {name: None, f"{name}_error": None} if each is None else each.named(name)
        row |= {name: summary.get(name) for name in ("path_kl", "path_kl_error", "iterations", "seconds")}
        self.rows.append({**row, "stopped": stopped})
        processes.by_main(self._write)

    def _write(self) -> None:
        write_json(self.path / FILE, {"settings": self.settings, **self.about, "stages": self.rows})
        write_stages_report(self.path)
