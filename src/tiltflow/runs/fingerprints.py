"""Fingerprints of what a recipe names outside itself: the base, prompts, the reward's weights and code.

A name can come to mean something else: a relative path in another folder, a file that was changed, a model on the hub that was
updated. So a run stores absolute paths, and a fingerprint of what each name refers to: the sha256 of a file; of the names and
contents of the files in a folder; of the module that defines a function (not of what that imports); for a model on the hub, the
commit that was loaded. A run whose fingerprints have changed is neither resumed nor used, unless `accept_changes` allows it.

Hashing reads everything once, at 1 to 2 GB a second where the disk and the processor allow it. A file of the same size and
modification time is not read again by the same process.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from pydantic.fields import FieldInfo
from torch import nn

from tiltflow.conditions import Item
from tiltflow.conditions.prompts import Prompts
from tiltflow.errors import InputError, Note
from tiltflow.files import read_json, reason
from tiltflow.flows.adapter import has_adapter
from tiltflow.models.model_folder import CONFIG, DECODER, WEIGHTS
from tiltflow.models.quantization import stored
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.pictures import edited
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.settings import External, Settings, validate
from tiltflow.shipped import INDEX, assets

FILE, BASE = "fingerprints.json", "base"
FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_CONTENT = re.compile(r"\..*|.*\.md|LICEN[CS]E.*", re.IGNORECASE)
"""Files in a folder that do not count: model cards, licences, hidden files."""
Prints = Mapping[str, str]
"""Fingerprints, by the dotted names of settings."""
S = TypeVar("S", bound=Settings)

_accepted: ContextVar[bool] = ContextVar("accepted changes", default=False)
_known: dict[tuple[str, int, int], str] = {}
"""sha256 of files, by path, size and modification time."""


@contextmanager
def accept_changes() -> Iterator[None]:
    """In this context, runs are resumed and used although what their recipes name has changed; a note says what.

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
    """Yield every setting of a recipe that names something outside it: its path in the recipe, its value and its mark."""
    for name, field in type(settings).model_fields.items():
        value, here = getattr(settings, name), (*path, name)
        if isinstance(value, Settings):
            yield from externals(value, here)
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                if isinstance(part, Settings):
                    yield from externals(part, (*here, i))
        elif isinstance(value, dict) and any(isinstance(part, Settings) for part in value.values()):
            for key, part in value.items():
                yield from externals(part, (*here, key))
        elif (marker := _marker(field)) is not None:
            named = {(*here, key): part for key, part in value.items()} if isinstance(value, dict) else {here: value}
            for place, one in named.items():
                if isinstance(one, str) and one not in marker.but:
                    yield place, one, marker


def _marker(field: FieldInfo) -> External | None:
    """The mark of a field that names something, if it has one; in `Path | None` and `dict[str, Path]` it is inside."""
    return next(
        (metadata for metadata in (*field.metadata, *_inside(field.annotation)) if isinstance(metadata, External)), None
    )


def _inside(annotation: Any) -> Iterator[Any]:
    """The marks in an annotation."""
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from _inside(part)


def absolute(recipe: S) -> S:
    """Make the paths in a recipe absolute, so that it means the same in every working directory."""
    tree, changed = recipe.model_dump(mode="json"), False
    for path, value, marker in externals(recipe):
        place = _place(value, marker)
        if place is not None and not FUNCTION.fullmatch(value) and not _shipped(value) and value != str(place):
            put(tree, path, str(place))
            changed = True
    return validate(type(recipe), tree, "recipe") if changed else recipe


def put(tree: Any, path: tuple[str | int, ...], value: str) -> None:
    """Set the value at a path of nested mappings and lists, in place."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def dotted(path: tuple[str | int, ...]) -> str:
    """Join a path with dots.

    >>> dotted(("reward", "rewards", 0, "path"))
    'reward.rewards.0.path'
    """
    return ".".join(map(str, path))


# ---- what they refer to ----


def _shipped(value: str) -> Path | None:
    """The folder of what ships with tiltflow under this name, if anything does."""
    return None if os.sep in value else assets(INDEX, CONFIG).get(value)


def _place(value: str, marker: External) -> Path | None:
    """The absolute file or folder that a value refers to; None if there is none, as for a name on the hub."""
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
    """Find the file of a module without running any code; None if there is none."""
    search: Any = [*sys.path, os.getcwd()]
    spec = None
    for i, _ in enumerate(name.split("."), 1):
        spec = PathFinder.find_spec(".".join(name.split(".")[:i]), search)
        if spec is None:
            return None
        search = spec.submodule_search_locations or []
    return Path(spec.origin) if spec is not None and spec.origin and os.path.isfile(spec.origin) else None


def fingerprint(value: str, marker: External, revision: str | None = None) -> str | None:
    """The fingerprint of what a value refers to; None if that is not known on this machine.

    Raises InputError if a file of it cannot be read.
    """
    place = _place(value, marker)
    if place is not None:
        return f"sha256:{digest(place)}"
    return None if marker.only_functions or FUNCTION.fullmatch(value) else _commit(value, revision, marker.repo_type)


def digest(place: Path) -> str:
    """sha256 of a file, or of the names and contents of the files in a folder: for a model or a run of tiltflow those that are
    loaded, otherwise all but hidden files, model cards and licences. The folder's own path and times do not count.

    Raises InputError if one cannot be read.
    """
    if place.is_file():
        return _sha256(place)
    if not (place / CONFIG).exists() and (place / "model" / CONFIG).exists():
        place = place / "model"  # a run stands for its tuned model
    if (place / CONFIG).exists() and (place / WEIGHTS).exists():
        inside = [path for name in (CONFIG, DECODER, WEIGHTS) if (path := place / name).exists()]
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
    """The fingerprint of a network in memory: of the names and contents of its tensors; with an adapter, of the frozen ones, so
    that adding and training the adapter does not change it."""
    adapter = has_adapter(network)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad} if adapter else set()
    whole = hashlib.sha256()
    frozen = {name: tensor for name, tensor in network.state_dict().items() if name not in trained}
    for name, tensor in sorted((name.replace(".base_layer.", "."), tensor) for name, tensor in frozen.items()):
        for part in stored(tensor.detach()):
            content: Any = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            whole.update(f"{name}\0{part.dtype}\0{list(part.shape)}\n".encode())
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


def _commit(name: str, revision: str | None, repo_type: str = "model") -> str | None:
    """The commit of a model or a data set on the hub that is in the cache; None if none is."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return f"commit:{revision}"
    try:
        path = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type), "refs", revision or "main")
        return f"commit:{path.read_text(encoding='ascii').strip()}"
    except (OSError, ValueError):
        return None


# ---- of a run ----


def fingerprints(recipe: Settings, only: str = "") -> dict[str, str]:
    """The fingerprints of what a recipe names, by the dotted name of the setting; except in the evaluation, which may change.

    Args:
        only: restricts them to settings whose name begins with this.
    """
    source = recipe.source if isinstance(recipe, CommonRecipe) else None
    found = {}
    for path, value, marker in externals(recipe):
        if path[0] != "evaluation" and dotted(path).startswith(only):
            revision = source.revision if isinstance(source, Diffusers) and path == ("model", "diffusers") else None
            if (known := fingerprint(value, marker, revision)) is not None:
                found[dotted(path)] = known
    if not only and isinstance(recipe, CommonRecipe) and isinstance(recipe.asked_for, Prompts):
        with suppress(InputError):  # what is wrong with the prompts is said where they are needed
            train, held_out = recipe.asked_for.items((), recipe.seed)
            found |= of_pictures([*train, *held_out])
    return found


def of_pictures(items: Iterable[Item]) -> dict[str, str]:
    """The fingerprint of the files that items edit, of all of them together; nothing where there are none."""
    names = {picture.name for item in items if (picture := edited(item.metadata)) is not None}
    contents = sorted(_sha256(Path(name)) for name in names if os.path.isfile(name))
    return {"prompts.images": f"sha256:{hashlib.sha256(' '.join(contents).encode()).hexdigest()}"} if contents else {}


def read_fingerprints(folder: Path) -> dict[str, str] | None:
    """The fingerprints stored in a run; None if an early version wrote none or, with a warning, if the file is damaged."""
    if not (folder / FILE).exists():
        return None
    try:
        return {key: str(value) for key, value in read_json(folder / FILE).items()}
    except InputError as error:
        warnings.warn(str(error), Note, stacklevel=2)
        return None


def compare(where: Path, then: Prints | None, now: Prints) -> list[str]:
    """Compare fingerprints. Returns notes for the user.

    Raises InputError, naming the run as `where`, if something has changed and that is not accepted.
    """
    if then is None:
        return ["the run has no fingerprints: changes of base, prompts and reward cannot be detected"]
    changed = [key for key in sorted(then) if key in now and then[key] != now[key]]
    if not changed:
        return []
    what = f"what {', '.join(changed)} {'names' if len(changed) == 1 else 'name'} has changed since the run was started"
    if not _accepted.get():
        raise InputError(f"{where}: {what}; restore it, or accept the change: --accept-changes")
    return [f"accepted: {what}"]


def check_unchanged(folder: Path, recipe: Settings, *, only: str = "") -> None:
    """`compare` for a run that is used: an accepted change is a warning. A run without fingerprints is not checked, and a base
    that was copied into the folder is checked instead of the original.

    Args:
        only: restricts the check to settings whose name begins with this.

    Raises InputError if something has changed and that is not accepted.
    """
    then = read_fingerprints(folder)
    if then is None:
        return
    now = fingerprints(recipe, only)
    if (folder / BASE).is_dir():
        now["model.path" if "model.path" in then else "model"] = f"sha256:{digest(folder / BASE)}"
    for sentence in compare(folder, then, now):
        warnings.warn(sentence, Note, stacklevel=3)
