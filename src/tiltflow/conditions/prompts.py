"""Prompts: read from a text file, a .json or .jsonl file with metadata, or a data set of `datasets`; some are held out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from tiltflow.conditions import Item
from tiltflow.errors import InputError, did_you_mean
from tiltflow.settings import PathOrName, Settings
from tiltflow.streams import stream

MOST_CHARACTERS = 1 << 28  # of a file


class Prompts(Settings):
    """Source of prompts."""

    name: Literal["prompts"] = "prompts"
    path: PathOrName | None = None
    """A .txt file with a prompt on each line, a .jsonl file with an object on each, a .json file with a list of objects, or a
    folder of `Dataset.save_to_disk`. UTF-8; a line ends with \\n or \\r\\n, and space around a prompt is removed."""
    texts: tuple[str, ...] = ()
    """The prompts themselves, instead of a path."""
    column: str = "prompt"
    """Key of the prompt in a .json or .jsonl file or a data set; all other keys are metadata."""
    validation: Annotated[float, Field(ge=0, lt=1)] | PathOrName = 0.1
    """Share of the prompts that is held out for the evaluation, or the path of a file with others. A single prompt is
    never held out."""

    def items(self, class_names: Sequence[str], seed: int) -> tuple[list[Item], list[Item]]:
        """Read the prompts; see `read_prompts`."""
        return read_prompts(self, seed)


def read_prompts(settings: Prompts, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Return (prompts for training, prompts held out), each once.

    Held out are the texts that a seeded shuffle puts first; if nothing can be held out, both lists are all prompts.

    Raises InputError if there are no prompts, or if a line or a column cannot be read as prompts.
    """
    if (settings.path is None) == (not settings.texts):
        raise InputError("prompts: give either a path or texts")
    given = [{settings.column: text} for text in settings.texts]
    prompts = unique(
        from_rows(given, settings.column, "texts") if settings.path is None else read_file(Path(settings.path), settings.column)
    )
    if not prompts:
        raise InputError(f"prompts: there are none in {settings.path or 'texts'}")
    if isinstance(settings.validation, str):
        held_out = unique(read_file(Path(settings.validation), settings.column))
        if not held_out:
            raise InputError(f"prompts.validation: there are none in {settings.validation}")
        return prompts, held_out
    different = list(dict.fromkeys(prompt.text for prompt in prompts))
    if len(different) == 1 or settings.validation == 0:
        return prompts, prompts
    count = min(max(1, round(settings.validation * len(different))), len(different) - 1)
    order = torch.randperm(len(different), generator=stream(seed, "held out")).tolist()
    held = {different[i] for i in order[:count]}
    return [p for p in prompts if p.text not in held], [p for p in prompts if p.text in held]


def unique(prompts: list[Item]) -> list[Item]:
    """Remove blank prompts and repetitions of the same text with the same metadata; the order stays."""
    first: dict[Any, Item] = {}
    for prompt in prompts:
        if prompt.text:
            first.setdefault((prompt.text, key_of(prompt.metadata)), prompt)
    return list(first.values())


def key_of(metadata: Mapping[str, Any]) -> str:
    """Return a text that differs for different metadata.

    >>> key_of({"b": [1], "a": 2})
    '{"a": 2, "b": [1]}'
    """
    return json.dumps(metadata, sort_keys=True, default=repr)


def read_file(path: Path, column: str) -> list[Item]:
    """Read the prompts of one file or folder. Raises InputError if it cannot be read."""
    if path.is_dir():
        return from_rows(_data_set(path), column, str(path))
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise InputError(f"prompts {path}: must be a .txt, .jsonl or .json file, or a folder of a data set")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"prompts {path}: is longer than {MOST_CHARACTERS} characters")
    if path.suffix == ".json":
        rows = from_json(text, str(path))
        if not isinstance(rows, list):
            raise InputError(f"prompts {path}: must be a list of objects")
        return from_rows(rows, column, str(path))
    lines = text.split("\n")  # splitlines() would split at U+2028 and others too, which are part of a prompt
    if path.suffix == ".txt":
        return from_rows([{column: line} for line in lines], column, str(path))
    rows = [from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return from_rows(rows, column, str(path))


def from_json(text: str, where: str) -> Any:
    """Parse JSON. Raises InputError if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"prompts {where}: is not JSON ({error})") from None


def from_rows(rows: list[Any], column: str, where: str) -> list[Item]:
    """Make prompts of mappings. Raises InputError, with the number of the row, for a row without a text in `column`."""
    prompts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            known = list(row) if isinstance(row, dict) else []
            hint = did_you_mean(column, known) if column not in known else ", its value must be a text"
            raise InputError(f"prompts {where}, row {number}: has no {column!r}{hint}; set prompts.column")
        text = row[column].strip()
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InputError(
                f"prompts {where}, row {number}: {ascii(text)[:60]} has an unpaired surrogate, which UTF-8 cannot encode"
            )
        prompts.append(Item(text, {key: value for key, value in row.items() if key != column}))
    return prompts


def _data_set(folder: Path) -> list[Any]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError:
        raise InputError(f"prompts {folder}: a folder needs the package datasets: pip install datasets") from None
    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"prompts {folder}: is not a data set of `datasets` ({error})") from None
    if not isinstance(loaded, Dataset):
        raise InputError(f"prompts {folder}: has several splits, {', '.join(loaded)}; give the folder of one of them")
    rows: list[Any] = loaded.to_list()
    return rows
