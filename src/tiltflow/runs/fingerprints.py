"""What a recipe names outside itself, by content: the base, prompts, the reward's weights and code.

A name can come to mean something else: a relative path in another folder, a file that was changed, a model on the hub that was
updated. So a run writes paths down as absolute ones, and keeps a fingerprint of what each name led to: the sha256 of a file; of
the files of a folder, their names and contents; of the module that a function lies in (not of what that imports); of a model on
the hub the commit that was loaded. What has changed since is refused where the run is gone on with or used, unless
`accept_changes` says otherwise.

Hashing reads everything once: 1 to 2 GB a second where the disk and the processor allow it. A file that is as long and as old
as it was is not read again by the same process.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from pydantic.fields import FieldInfo
from torch import nn

from tiltflow.errors import InputError, Note
from tiltflow.files import read_json, reason
from tiltflow.flows.adapter import has_adapter
from tiltflow.models.model_folder import CONFIG, WEIGHTS
from tiltflow.settings import External, Settings, validate
from tiltflow.shipped import INDEX, assets

FILE, BASE = "fingerprints.json", "base"
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_CONTENT = re.compile(r"\..*|.*\.md|LICEN[CS]E.*", re.IGNORECASE)
"""Files of a folder that change nothing: cards, licences, what is hidden."""
Prints = Mapping[str, str]
"""Fingerprints by the dotted names of settings."""
S = TypeVar("S", bound=Settings)

_accepted: ContextVar[bool] = ContextVar("accepted changes", default=False)
_known: dict[tuple[str, int, int], str] = {}
"""sha256 of files, by path, size and time of the last change."""


@contextmanager
def accept_changes() -> Iterator[None]:
    """Within it, a run is gone on with and used although what its recipe names has changed. What has, is said.

    >>> with accept_changes():
    ...     pass
    """
    token = _accepted.set(True)
    try:
        yield
    finally:
        _accepted.reset(token)


# ---- the settings that name something ----


def externals(settings: Settings, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str, External]]:
    """Every value of a recipe that names something outside it: where it stands, what it says and how it is meant."""
    for name, field in type(settings).model_fields.items():
        value, here = getattr(settings, name), (*path, name)
        if isinstance(value, Settings):
            yield from externals(value, here)
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                if isinstance(part, Settings):
                    yield from externals(part, (*here, i))
        elif isinstance(value, str) and (marker := _marker(field)) is not None and value not in marker.but:
            yield here, value, marker


def _marker(field: FieldInfo) -> External | None:
    """How a field says that it names something; in `Path | None` and `float | Path` the marker is inside."""
    inside = [metadata for part in get_args(field.annotation) for metadata in getattr(part, "__metadata__", ())]
    return next((metadata for metadata in (*field.metadata, *inside) if isinstance(metadata, External)), None)


def absolute(recipe: S) -> S:
    """The recipe with the paths in it as absolute ones, so that it means the same from every folder."""
    tree, changed = recipe.model_dump(mode="json"), False
    for path, value, marker in externals(recipe):
        place = _place(value, marker)
        if place is not None and not FUNCTION.fullmatch(value) and not _shipped(value) and value != str(place):
            put(tree, path, str(place))
            changed = True
    return validate(type(recipe), tree, "recipe") if changed else recipe


def put(tree: Any, path: tuple[str | int, ...], value: str) -> None:
    """Put a value where it stands in nested mappings and lists."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def dotted(path: tuple[str | int, ...]) -> str:
    """
    >>> dotted(("reward", "rewards", 0, "path"))
    'reward.rewards.0.path'
    """
    return ".".join(map(str, path))


# ---- what they lead to ----


def _shipped(value: str) -> Path | None:
    """What ships with tiltflow under this name."""
    return None if os.sep in value else (assets(INDEX) | assets(CONFIG)).get(value)


def _place(value: str, marker: External) -> Path | None:
    """The file or folder that a value leads to, absolute; None if that is none, as for a name on the hub."""
    if match := FUNCTION.fullmatch(value):
        return module_file(match[1])
    if marker.only_functions:
        return None
    path = Path(os.path.abspath(value))
    try:
        return _shipped(value) or (path if path.exists() else None)
    except OSError:
        return None


def module_file(name: str) -> Path | None:
    """The file of a module, found without running anything of it; None if there is none."""
    search: Any = [*sys.path, os.getcwd()]
    spec = None
    for i, _ in enumerate(name.split("."), 1):
        spec = PathFinder.find_spec(".".join(name.split(".")[:i]), search)
        if spec is None:
            return None
        search = spec.submodule_search_locations or []
    return Path(spec.origin) if spec is not None and spec.origin and os.path.isfile(spec.origin) else None


def fingerprint(value: str, marker: External, revision: str | None = None) -> str | None:
    """Of what a value leads to; None if it leads to nothing that is known here.

    Raises InputError if a file of it cannot be read.
    """
    place = _place(value, marker)
    if place is not None:
        return f"sha256:{digest(place)}"
    return None if marker.only_functions or FUNCTION.fullmatch(value) else _commit(value, revision)


def digest(place: Path) -> str:
    """sha256 of a file, or of the names and contents of the files in a folder: of a model or a run of tiltflow those that are
    loaded, of others all but what is hidden, cards and licences. Where the folder lies and when it was written does not matter.

    Raises InputError if one cannot be read.
    """
    if place.is_file():
        return _sha256(place)
    if not (place / CONFIG).exists() and (place / "model" / CONFIG).exists():
        place = place / "model"  # a run, of which the tuned model is meant
    if (place / CONFIG).exists() and (place / WEIGHTS).exists():
        inside = [place / CONFIG, place / WEIGHTS]
    else:
        inside = sorted(
            path
            for path in place.rglob("*")
            if path.is_file() and not any(NOT_CONTENT.fullmatch(part) for part in path.relative_to(place).parts)
        )
    whole = hashlib.sha256()
    for path in inside:
        whole.update(f"{path.relative_to(place).as_posix()}\0{_sha256(path)}\n".encode())
    return whole.hexdigest()


def of_network(network: nn.Module) -> str:
    """The fingerprint of a network in memory: of the names and contents of its tensors. Of one with an adapter those that are
    frozen, so that it is the same before the adapter is added and however far that is trained."""
    adapter = has_adapter(network)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad} if adapter else set()
    whole = hashlib.sha256()
    frozen = {name: tensor for name, tensor in network.state_dict().items() if name not in trained}
    for name, tensor in sorted((name.replace(".base_layer.", "."), tensor) for name, tensor in frozen.items()):
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\n".encode())
        whole.update(content)
    return f"sha256:{whole.hexdigest()}"


def _sha256(path: Path) -> str:
    try:
        status = path.stat()
        key = (os.path.realpath(path), status.st_size, status.st_mtime_ns)
        if key not in _known:
            with open(path, "rb") as file:
                _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    return _known[key]


def _commit(name: str, revision: str | None) -> str | None:
    """Which commit of a model on the hub lies in the cache; None if none does."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return f"commit:{revision}"
    try:
        path = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "refs", revision or "main")
        return f"commit:{path.read_text(encoding='ascii').strip()}"
    except (OSError, ValueError):
        return None


# ---- of a run ----


def fingerprints(recipe: Settings, only: str = "") -> dict[str, str]:
    """Of what a recipe names, by the dotted name of the setting; but of what is free to change, the evaluation.

    Args:
        only: of the settings whose name begins so.
    """
    found = {}
    for path, value, marker in externals(recipe):
        if path[0] != "evaluation" and dotted(path).startswith(only):
            revision = getattr(getattr(recipe, "model", None), "revision", None) if path == ("model", "diffusers") else None
            if (known := fingerprint(value, marker, revision)) is not None:
                found[dotted(path)] = known
    return found


def read_fingerprints(folder: Path) -> dict[str, str] | None:
    """What a run has written down; None if it was begun by a version that did not, or, with a warning, if that is damaged."""
    if not (folder / FILE).exists():
        return None
    try:
        return {key: str(value) for key, value in read_json(folder / FILE).items()}
    except InputError as error:
        warnings.warn(str(error), Note, stacklevel=2)
        return None


def compare(where: Path, then: Prints | None, now: Prints) -> list[str]:
    """What a person should know of differences between fingerprints, in sentences.

    Raises InputError, naming the run as `where`, if something has changed and that is not accepted.
    """
    if then is None:
        return ["the run has no fingerprints: whether base, prompts and reward are what they were is not known"]
    changed = [key for key in sorted(then) if key in now and then[key] != now[key]]
    if not changed:
        return []
    what = f"what {', '.join(changed)} {'names' if len(changed) == 1 else 'name'} is not what it was when the run was begun"
    if not _accepted.get():
        raise InputError(f"{where}: {what}; put it back, or accept it: --accept-changes")
    return [f"accepted: {what}"]


def check_unchanged(folder: Path, recipe: Settings, *, only: str = "") -> None:
    """`compare` for a run that is used, what is accepted being a warning; nothing for a run that has no fingerprints. The base
    that lies in the folder is looked at in place of the one that it was copied from.

    Args:
        only: of the settings whose name begins so.
    """
    then = read_fingerprints(folder)
    if then is None:
        return
    now = fingerprints(recipe, only)
    if (folder / BASE).is_dir():
        now["model.path" if "model.path" in then else "model"] = f"sha256:{digest(folder / BASE)}"
    for sentence in compare(folder, then, now):
        warnings.warn(sentence, Note, stacklevel=3)
