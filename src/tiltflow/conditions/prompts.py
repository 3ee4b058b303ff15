"""Prompts: read from a file of text, tables or JSON, or from a data set of `datasets`; some are held out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from tiltflow.conditions import Item
from tiltflow.errors import InputError, did_you_mean
from tiltflow.pictures import IMAGE, Picture, edited, picture_of, stored
from tiltflow.settings import External, PathOrName, Settings
from tiltflow.streams import stream
from tiltflow.user_code import refused

MOST_CHARACTERS = 1 << 28  # of a file
TABLES: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ",", "strict": True},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # a prompt may begin with a quotation, as in PartiPrompts.tsv
}
"""How tables of text are read, whose first line has the names of the columns."""
SUFFIXES = (".txt", ".json", ".jsonl", *TABLES, ".parquet")


class Source(Settings):
    """A file or a data set of prompts."""

    path: PathOrName | None = None
    """A .txt file with a prompt on each line, a .jsonl file with an object on each, a .json file with a list of objects, a
    .csv, .tsv (where quotes are letters) or .parquet table, or a folder of `Dataset.save_to_disk`. UTF-8; a line ends with
    \\n or \\r\\n, and space around a prompt is removed."""
    dataset: Annotated[str, External(repo_type="dataset")] | None = None
    """The name of a data set on the hub, instead of a path; needs the package `datasets`."""
    subset: str | None = None
    """Its configuration, if it has several."""
    split: str | None = None
    """Its split, such as train, if it has several."""
    column: str = "prompt"
    """Key of the prompt, where there are others: they are metadata, but for pictures and other binary columns."""
    image_column: str | None = None
    """Key of the picture that is edited, of a pipeline that edits: a path, which begins in the folder of the file of prompts,
    or the pictures themselves in a data set or a .parquet table."""

    def read(self, where: str) -> list[Item]:
        """Read the prompts. Raises InputError if there are none, or if they cannot be read."""
        if self.dataset is None:
            for name in ("subset", "split"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(f"{where}.{name} {value!r}: is that of a dataset; leave it out")
            found = read_file(Path(str(self.path)), self.column, self.image_column)
        else:
            rows = _from_hub(self.dataset, self.subset, self.split, where, self.image_column)
            found = from_rows(rows, self.column, self.dataset, self.image_column)
        if not any(prompt.text for prompt in found):
            raise InputError(f"{where}: there are none in {self.dataset or self.path}")
        return found


class Prompts(Source):
    """Source of prompts."""

    name: Literal["prompts"] = "prompts"
    texts: tuple[str, ...] = ()
    """The prompts themselves, instead of a path."""
    validation: Annotated[float, Field(ge=0, lt=1)] | PathOrName | Source = 0.1
    """Share of the prompts that is held out for the evaluation; or the path of a file with others, or a source with its own
    `path` or `dataset`, and columns. A single prompt is never held out."""

    def items(self, class_names: Sequence[str], seed: int) -> tuple[list[Item], list[Item]]:
        """Read the prompts; see `read_prompts`."""
        return read_prompts(self, seed)


def read_prompts(settings: Prompts, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Return (prompts for training, prompts held out), each once.

    Held out are the texts, each with its picture if it has one, that a seeded shuffle puts first; if nothing can be held out,
    both lists are all prompts.

    Raises InputError if there are no prompts, or if a line or a column cannot be read as prompts.
    """
    if sum([settings.path is not None, settings.dataset is not None, bool(settings.texts)]) != 1:
        raise InputError("prompts: give either a path or texts, or a dataset")
    if settings.texts:
        given = from_rows([{settings.column: text} for text in settings.texts], settings.column, "texts")
        if not any(prompt.text for prompt in given):
            raise InputError("prompts: there are none in texts")
    else:
        given = settings.read("prompts")
    prompts, validation = unique(given), settings.validation
    if isinstance(validation, str):
        validation = Source(path=validation, column=settings.column, image_column=settings.image_column)
    if isinstance(validation, Source):
        if (validation.path is None) == (validation.dataset is None):
            raise InputError("prompts.validation: give either a path or a dataset")
        return prompts, unique(validation.read("prompts.validation"))
    what = [(prompt.text, edited(prompt.metadata)) for prompt in prompts]
    different = list(dict.fromkeys(what))
    if len(different) == 1 or validation == 0:
        return prompts, prompts
    count = min(max(1, round(validation * len(different))), len(different) - 1)
    order = torch.randperm(len(different), generator=stream(seed, "held out")).tolist()
    held = {different[i] for i in order[:count]}
    parts: tuple[list[Item], list[Item]] = ([], [])
    for key, prompt in zip(what, prompts, strict=True):
        parts[key in held].append(prompt)
    return parts


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


def read_file(path: Path, column: str, image_column: str | None = None) -> list[Item]:
    """Read the prompts of one file or folder. Raises InputError if it cannot be read."""
    return from_rows(
        _rows_of(path, column, image_column), column, str(path), image_column, path if path.is_dir() else path.parent
    )


def _rows_of(path: Path, column: str, image_column: str | None) -> list[Any]:
    if path.is_dir():
        return _data_set(path, image_column)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"prompts {path}: must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or a folder of a data set"
        )
    if path.suffix == ".parquet":
        return _parquet(path, image_column)
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
        return rows
    if path.suffix in TABLES:
        return from_table(text, TABLES[path.suffix], str(path))
    lines = text.split("\n")  # splitlines() would split at U+2028 and others too, which are part of a prompt
    if path.suffix == ".txt":
        return [{column: line} for line in lines]
    return [from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def from_table(text: str, form: dict[str, Any], where: str) -> list[Any]:
    """Parse a table of text with the names of its columns in the first line. Raises InputError for a row of another length."""
    reader = csv.DictReader(io.StringIO(text, newline=""), **form)
    with refused(f"prompts {where}: is not a table of text"):
        rows: list[Any] = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            got = len(row) - 1 + len(row[None]) if None in row else sum(value is not None for value in row.values())
            raise InputError(f"prompts {where}, row {number}: has {got} fields, the first line {len(reader.fieldnames or ())}")
    return rows


def from_json(text: str, where: str) -> Any:
    """Parse JSON. Raises InputError if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"prompts {where}: is not JSON ({error})") from None


def from_rows(rows: list[Any], column: str, where: str, image_column: str | None = None, folder: str | Path = "") -> list[Item]:
    """Make prompts of mappings. Raises InputError, with the number of the row, for a row without a text in `column`, and for
    what is no picture in `image_column`.

    Args:
        folder: in which the paths of pictures begin.
    """
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
        metadata = {key: value for key, value in row.items() if key not in (column, image_column)}
        if image_column is not None:
            if row.get(image_column) is None:
                raise InputError(f"prompts {where}, row {number}: has no picture {image_column!r}; set prompts.image_column")
            metadata[IMAGE] = picture_of(row[image_column], f"prompts {where}, row {number}", folder)
        prompts.append(Item(text, metadata))
    return prompts


def _data_set(folder: Path, image_column: str | None) -> list[Any]:
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
    return _rows(loaded, image_column, str(folder))


def _from_hub(name: str, subset: str | None, split: str | None, where: str, image_column: str | None) -> list[Any]:
    """The rows of a data set of `datasets`. Raises InputError if it cannot be loaded, or the split is not clear."""
    try:
        from datasets import Dataset, load_dataset
    except ImportError:
        raise InputError(f"{where}.dataset {name}: needs the package datasets: pip install datasets") from None
    with refused(f"{where}.dataset {name}: cannot be loaded"):
        loaded: Any = load_dataset(name, subset)
    if isinstance(loaded, Dataset):
        return _rows(loaded, image_column, name)
    splits = list(loaded)
    if split is None and len(splits) > 1:
        raise InputError(f"{where}.dataset {name}: has the splits {', '.join(splits)}; set {where}.split")
    if split is not None and split not in splits:
        raise InputError(f"{where}.split: {name} has no {split!r}{did_you_mean(split, splits)}")
    return _rows(loaded[split or splits[0]], image_column, f"{name}, {split or splits[0]}")


def _rows(data: Any, image_column: str | None, name: str) -> list[Any]:
    """The rows of a data set of `datasets`, without binary columns, but for the pictures that are asked for, each of which is
    read when it is needed."""
    readable = _readable(data.features.arrow_schema)
    rows: list[Any] = data.select_columns(readable).to_list()
    if image_column is None or image_column in readable or image_column not in data.column_names:
        return rows
    table = data.select_columns(image_column).with_format("arrow")

    def picture(i: int) -> Picture:
        return Picture(f"row {i + 1} of {name}", lambda: stored(table[i][image_column][0].as_py()))

    return [{**row, image_column: picture(i)} for i, row in enumerate(rows)]


def _parquet(path: Path, image_column: str | None) -> list[Any]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"prompts {path}: a .parquet file needs the package pyarrow: pip install pyarrow") from None
    with refused(f"prompts {path}: cannot be read"):
        schema = parquet.read_schema(path)
        columns = {*_readable(schema), *([image_column] if image_column in schema.names else [])}
        rows: list[Any] = parquet.read_table(path, columns=sorted(columns, key=schema.names.index)).to_pylist()
    return rows


def _readable(schema: Any) -> list[str]:
    """The names of the columns that hold no pictures or other binary data."""
    from pyarrow import types

    def binary(kind: Any) -> bool:
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            return True
        return any(binary(kind.field(i).type) for i in range(kind.num_fields))

    return [field.name for field in schema if not binary(field.type)]
