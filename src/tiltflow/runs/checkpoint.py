"""Checkpoints: the state that a run resumes from, in a folder that is complete or not there.

step-00001234/
    state.safetensors   every tensor
    shards-00001-of-00002.safetensors, ..
                        the shards of each process, if tensors are sharded over several
    state.json          every number, with references to the tensors
    manifest.json       written last: the format, the versions, and size and sha256 of the other files

A checkpoint is written into a folder of another name, each file flushed onto the disk, and renamed: a killed process, a full
disk or a power cut leaves the earlier checkpoints unchanged. A folder is never written to again. A checkpoint that differs from
its manifest is not used. No file is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiltflow import __version__, processes
from tiltflow.errors import CheckpointError
from tiltflow.files import flush, reason, writing
from tiltflow.tensor_file import Tree, write_tensors

FORMAT = 1
FOLDER, TENSORS, NUMBERS, MANIFEST = "checkpoints", "state.safetensors", "state.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
SHARDS = re.compile(r"shards-(\d{5})-of-(\d{5})\.safetensors")
LITTER = re.compile(r"(step-\d{8,})\.(tmp|old)-[0-9a-f]{8}")
"""Names of folders that a process leaves when it is killed while it writes or deletes."""
TENSOR, INTEGER = "tensor:", "int:"


def save_checkpoint(root: Path, step: int, state: Mapping[str, Any], *, total_limit: int | None = None) -> Path:
    """Write `state` as `root/step-...` and verify it; then delete the oldest checkpoints beyond `total_limit`.

    Raises CheckpointError, with the other checkpoints unchanged, if it cannot be written.
    """
    final = root / f"step-{step:08d}"
    draft = _Draft(final, root / f"{final.name}.tmp-{processes.exchanged(uuid.uuid4().hex[:8])[0]}", step)
    numbers, tensors, shards = _split(state)
    draft.together(draft.create)
    draft.together(lambda: draft.write(numbers, tensors, shards))
    written = {name: entry for found in processes.exchanged(draft.own) for name, entry in found.items()}
    draft.together(lambda: draft.publish(written))
    if processes.is_main():
        older = [folder for folder in checkpoints(root) if step_of(folder) <= step]
        for old in older[: -total_limit if total_limit else 0]:
            delete_checkpoint(old)
    return final


@dataclass
class _Draft:
    """A checkpoint that all processes write, in a folder of another name until it is complete."""

    final: Path
    folder: Path
    step: int
    own: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Bytes and sha256 of each file that this process has written."""

    def together(self, phase: Callable[[], None]) -> None:
        """Run a phase in all processes. Raises CheckpointError in all of them, and deletes the draft, if it fails in one."""
        reasons = [found for found in processes.exchanged(_reason_against(phase)) if found is not None]
        if reasons:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise CheckpointError(
                f"{self.final}: the checkpoint cannot be written ({reasons[0]}); earlier checkpoints are unchanged"
            )

    def create(self) -> None:
        """Create the folder, in the main process."""
        if processes.is_main():
            self.folder.mkdir(parents=True)

    def write(self, numbers: Any, tensors: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
        """Write the shards of this process and, in the main process, everything else but the manifest."""
        if shards:
            name = f"shards-{processes.index() + 1:05d}-of-{processes.count():05d}.safetensors"
            self.own[name] = write_tensors(self.folder / name, shards)
        if processes.is_main():
            self.own[TENSORS] = write_tensors(self.folder / TENSORS, tensors)
            self.own[NUMBERS] = _write_numbers(self.folder / NUMBERS, numbers)

    def publish(self, written: Mapping[str, tuple[int, str]]) -> None:
        """Write the manifest, rename the folder and verify it, in the main process.

        Args:
            written: bytes and sha256 of the files of all processes.
        """
        if not processes.is_main():
            return
        root = self.final.parent
        files = {name: {"bytes": count, "sha256": digest} for name, (count, digest) in sorted(written.items())}
        manifest = {"format": FORMAT, "tiltflow": __version__, "torch": torch.__version__, "step": self.step, "files": files}
        _write_numbers(self.folder / MANIFEST, manifest)
        flush(self.folder)
        aside = root / f"{self.final.name}.old-{uuid.uuid4().hex[:8]}"
        if self.final.exists():  # kept until the new one is verified
            self.final.rename(aside)
        self.folder.rename(self.final)
        flush(root)
        verify_checkpoint(self.final)
        shutil.rmtree(aside, ignore_errors=True)


def _write_numbers(path: Path, content: Any) -> tuple[int, str]:
    """Write JSON and flush it onto the disk. Returns the bytes and the sha256 of the file."""
    text = (json.dumps(content, indent=1) + "\n").encode()
    path.write_bytes(text)
    flush(path)
    return len(text), hashlib.sha256(text).hexdigest()


def tensors_in(tree: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors in nested mappings and lists, by their path, such as `loop/parameters/weight`."""
    if isinstance(tree, Tensor):
        return {path: tree}
    nodes = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {
        name: tensor for key, node in nodes for name, tensor in tensors_in(node, f"{path}/{key}" if path else str(key)).items()
    }


def _reason_against(write: Callable[[], None]) -> str | None:
    """Write files. Returns the reason if that fails."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return reason(error)
    return None


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, renaming it first, so that a partial deletion does not look like one. Raises CheckpointError."""
    try:
        doomed = folder.rename(folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}"))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be deleted ({reason(error)})") from None
    shutil.rmtree(doomed, ignore_errors=True)


def saved_in(run: Path) -> bool:
    """Whether there is a checkpoint of a run, or of one of the stages in a folder."""
    return any(checkpoints(folder / FOLDER) for folder in (run, *run.glob("stage-*")))


def checkpoints(root: Path) -> list[Path]:
    """The folders with names of checkpoints, the oldest first."""
    return sorted((folder for folder in root.glob("step-*") if NAME.fullmatch(folder.name) and folder.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint."""
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def remove_litter(root: Path) -> None:
    """Delete the drafts of killed processes, and put back a checkpoint that they had moved aside and not replaced."""
    for folder in list(root.glob("step-*")):
        if match := LITTER.fullmatch(folder.name):
            place = root / match[1]
            if match[2] == "old" and not place.exists():
                with writing(place):
                    folder.rename(place)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def latest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and the reason why each newer one was skipped.

    Raises CheckpointError if one was written by a later version of tiltflow: to skip it would lose it silently.
    """
    skipped = []
    for folder in reversed(checkpoints(root)):
        try:
            verify_checkpoint(folder)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a later version of tiltflow."""


def verify_checkpoint(folder: Path) -> Tree:
    """Compare the files of a checkpoint with its manifest, and return that. Raises CheckpointError for the first difference."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: not a complete checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error})") from None
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise NewerFormatError(
            f"{folder}: has format {written}, this tiltflow {__version__} reads up to {FORMAT}; it was written by tiltflow"
            f" {manifest.get('tiltflow')}"
        )
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(written, int) or not isinstance(files, dict) or not _complete(set(files)):
        raise CheckpointError(f"{folder / MANIFEST}: is not the manifest of a checkpoint")
    found: Tree = manifest
    for name, expected in files.items():
        try:
            size, digest = (folder / name).stat().st_size, _sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from None
        if not isinstance(expected, dict) or (size, digest) != (expected.get("bytes"), expected.get("sha256")):
            raise CheckpointError(f"{folder / name}: is not what was written ({size} bytes, sha256 {digest[:12]}..)")
    return found


def _complete(files: set[str]) -> bool:
    """True if these are the files of a checkpoint: the two, and all shards or none.

    >>> _complete({TENSORS, NUMBERS}), _complete({TENSORS, NUMBERS, "shards-00001-of-00001.safetensors"})
    (True, True)
    >>> _complete({TENSORS, NUMBERS, "shards-00002-of-00002.safetensors"}), _complete({NUMBERS})
    (False, False)
    """
    found = [SHARDS.fullmatch(name) for name in sorted(files - {TENSORS, NUMBERS})]
    numbers = [tuple(map(int, match.groups())) if match else None for match in found]
    return {TENSORS, NUMBERS} <= files and numbers == [(i + 1, len(found)) for i in range(len(found))]


def load_checkpoint(folder: Path) -> Tree:
    """Read the state in a checkpoint, with its tensors on the CPU. Raises CheckpointError if it is damaged."""
    files = verify_checkpoint(folder)["files"]
    try:
        tensors = load_file(folder / TENSORS)
        parts = [load_file(folder / name) for name in sorted(files) if SHARDS.fullmatch(name)]
        tensors |= {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        numbers = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        state: Tree = _join(numbers, tensors)
    except (OSError, ValueError, KeyError, SafetensorError, RecursionError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from None
    return state


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(tree: Any) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Replace each tensor in a tree by a reference. Returns the tree, the tensors that this process writes, and its shards of
    sharded ones, both by their path."""
    tensors: dict[str, Tensor] = {}
    shards: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            if processes.is_sharded(node):
                shards[path] = processes.local(node)
            elif processes.is_main():
                tensors[path] = node
            return TENSOR + path
        if isinstance(node, Mapping):
            names = {(f"{INTEGER}{key}" if isinstance(key, int) else key): value for key, value in node.items()}
            return {name: walk(value, f"{path}/{name}" if path else name) for name, value in names.items()}
        if isinstance(node, (list, tuple)):
            return [walk(value, f"{path}/{i}") for i, value in enumerate(node)]
        if isinstance(node, str) and node.startswith(TENSOR):
            raise ValueError(f"{path}: a string that begins with {TENSOR!r} cannot be saved")
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{path}: {type(node).__name__} cannot be saved")

    return walk(tree, ""), tensors, shards


def _join(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_split`."""
    if isinstance(node, str) and node.startswith(TENSOR):
        return tensors[node.removeprefix(TENSOR)]
    if isinstance(node, dict):
        return {
            (int(key.removeprefix(INTEGER)) if key.startswith(INTEGER) else key): _join(value, tensors)
            for key, value in node.items()
        }
    return [_join(value, tensors) for value in node] if isinstance(node, list) else node
