"""Prompts from every kind of file, the part that is held out, and mistakes in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tiltflow.conditions.prompts import Prompts, read_prompts
from tiltflow.errors import InputError


def texts(settings: Prompts, seed: int = 0) -> tuple[list[str], list[str]]:
    one, other = read_prompts(settings, seed)
    return [p.text for p in one], [p.text for p in other]


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "tag": 1}, {"prompt": "a dog", "tag": 2}, {"prompt": "a cat", "tag": 1}]
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog  \na cat\n")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for name in ("p.txt", "p.jsonl", "p.json"):
        prompts, _ = read_prompts(Prompts(path=str(tmp_path / name), validation=0))
        assert [p.text for p in prompts] == ["a cat", "a dog"]  # each once
        assert prompts[0].metadata == ({} if name == "p.txt" else {"tag": 1})


def test_tables(tmp_path: Path) -> None:
    """Quoted fields of a .csv may hold separators, quotes and line ends; in a .tsv quotes are letters (PartiPrompts.tsv)."""
    (tmp_path / "p.csv").write_text('prompt,tag\r\n"a red, ""big"" cat",1\r\na dog,\r\n\r\n"two\nlines",2\r\n', newline="")
    (tmp_path / "p.tsv").write_text('Prompt\tCategory\n"A" red, big cat\tAnimals\na dog\tAnimals\n')
    prompts, _ = read_prompts(Prompts(path=str(tmp_path / "p.csv"), validation=0))
    assert [p.text for p in prompts] == ['a red, "big" cat', "a dog", "two\nlines"]
    assert [p.metadata for p in prompts] == [{"tag": "1"}, {"tag": ""}, {"tag": "2"}]
    prompts, _ = read_prompts(Prompts(path=str(tmp_path / "p.tsv"), column="Prompt", validation=0))
    assert [(p.text, p.metadata) for p in prompts] == [
        ('"A" red, big cat', {"Category": "Animals"}),
        ("a dog", {"Category": "Animals"}),
    ]


class Served:
    """Stands for the package `datasets`: what `load_dataset` gives for names, by splits."""

    def __init__(self, sets: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
        self.sets, self.asked = sets, list[tuple[Any, ...]]()

    class Dataset:
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            self.rows = rows

    def load_dataset(self, name: str, subset: str | None) -> Any:
        self.asked.append((name, subset))
        if name not in self.sets:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(offline)")
        return {split: self.Dataset(rows) for split, rows in self.sets[name].items()}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    two = {"train": [{"caption": "a cat", "n": 1}, {"caption": "a dog", "n": 2}], "test": [{"caption": "a bird", "n": 3}]}
    found = Served({"me/two": two, "me/one": {"train": two["train"]}})
    monkeypatch.setitem(sys.modules, "datasets", found)  # type: ignore[arg-type]
    monkeypatch.setattr("tiltflow.conditions.prompts._rows", lambda data, *more: data.rows)
    return found


def test_a_data_set_by_its_name(served: Served) -> None:
    source = {"dataset": "me/two", "split": "train", "column": "caption"}
    test = {"dataset": "me/two", "split": "test", "column": "caption", "subset": "small"}
    train, held = read_prompts(Prompts.model_validate(source | {"validation": test}))
    assert [(p.text, p.metadata) for p in train] == [("a cat", {"n": 1}), ("a dog", {"n": 2})]
    assert [p.text for p in held] == ["a bird"]
    assert served.asked == [("me/two", None), ("me/two", "small")]
    assert texts(Prompts(dataset="me/one", column="caption", validation=0))[0] == ["a cat", "a dog"]  # it has one split


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"dataset": "me/two"}, "prompts.dataset me/two: has the splits train, test; set prompts.split"),
        ({"dataset": "me/two", "split": "trian"}, "prompts.split: me/two has no 'trian', did you mean 'train'"),
        ({"dataset": "me/one", "column": "captoin"}, "me/one, row 1: has no 'captoin', did you mean 'caption'"),
        ({"dataset": "me/none"}, r"prompts.dataset me/none: cannot be loaded \(Couldn't reach 'me/none' on the Hub\)$"),
        ({"dataset": "me/one", "path": "p.txt"}, "either a path or texts, or a dataset"),
        ({"texts": ["a"], "validation": {}}, "prompts.validation: give either a path or a dataset"),
        ({"texts": ["a"], "validation": {"dataset": "me/two"}}, "has the splits train, test; set prompts.validation.split"),
        ({"path": "p.txt", "split": "train"}, "prompts.split 'train': is that of a dataset"),
    ],
)
def test_mistakes_in_data_sets(source: dict[str, Any], message: str, served: Served) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts(Prompts.model_validate(source))


@pytest.mark.parametrize(("package", "source"), [("datasets", {"dataset": "me/two"}), ("pyarrow", {"path": "p.parquet"})])
def test_a_package_that_is_not_installed(package: str, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"needs the package {package}: pip install {package}"):
        read_prompts(Prompts.model_validate(source))


def test_tables_without_their_pictures(tmp_path: Path) -> None:
    """Binary columns, also inside others, are not read: data sets of prompts can come with gigabytes of pictures."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "a cat", "tags": ["x"], "png": b"..", "image": {"bytes": b"..", "path": "1.png"}, "more": [b"."]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    prompts, _ = read_prompts(Prompts(path=str(tmp_path / "p.parquet"), validation=0))
    assert [(p.text, p.metadata) for p in prompts] == [("a cat", {"tags": ["x"]})]
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"p.parquet: cannot be read \("):
        read_prompts(Prompts(path=str(tmp_path / "p.parquet")))


def test_a_line_ends_where_it_ends(tmp_path: Path) -> None:
    """Not at the other characters that str.splitlines splits at; a byte order mark is no letter; space around is none."""
    for code in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"):
        prompt = f"a red{code}cat"
        (tmp_path / "p.txt").write_bytes(f"\ufeff  {prompt} \r\n\r\na blue dog\n{prompt}".encode())
        rows = [{"prompt": f" {prompt}"}, {"prompt": ""}, {"prompt": "a blue dog\t"}, {"prompt": prompt}]
        lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "p.jsonl").write_bytes(f"\ufeff{lines}".encode())
        (tmp_path / "p.json").write_bytes(f"\ufeff{json.dumps(rows, ensure_ascii=False, indent=1)}".encode())
        for name in ("p.txt", "p.jsonl", "p.json"):
            assert texts(Prompts(path=str(tmp_path / name), validation=0))[0] == [prompt, "a blue dog"]
    assert texts(Prompts(texts=(" a", "a\n", " "), validation=0))[0] == ["a"]


def test_a_prompt_with_other_metadata_is_another_and_held_out_with_its_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "tags": [j]} for i in range(20) for j in (1, 1, 2)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held = read_prompts(Prompts(path=str(tmp_path / "p.jsonl"), validation=0.25))
    assert len(held) == 2 * 5
    assert len(train) == 2 * 15
    assert [p.metadata["tags"] for p in train[:4]] == [[1], [2], [1], [2]]
    assert not {p.text for p in train} & {p.text for p in held}
    alone = texts(Prompts(texts=tuple(f"prompt {i}" for i in range(20)), validation=0.25))[1]
    assert list(dict.fromkeys(p.text for p in held)) == alone


def test_a_data_set_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a cat"}, {"text": "a dog"}]).save_to_disk(tmp_path / "set")
    assert texts(Prompts(path=str(tmp_path / "set"), column="text", validation=0))[0] == ["a cat", "a dog"]


def test_a_part_is_held_out_by_the_seed() -> None:
    names = tuple(f"prompt {i}" for i in range(40))
    train, held = texts(Prompts(texts=names, validation=0.25))
    assert len(held) == 10
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(names)
    assert texts(Prompts(texts=names, validation=0.25)) == (train, held)
    assert texts(Prompts(texts=names, validation=0.25), seed=1)[1] != held
    assert [len(part) for part in texts(Prompts(texts=("a", "b"), validation=0.01))] == [1, 1]
    assert [len(part) for part in texts(Prompts(texts=("a", "b"), validation=0.99))] == [1, 1]
    assert texts(Prompts(texts=("a",))) == (["a"], ["a"])


def test_a_file_of_its_own_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("c\nd\n")
    assert texts(Prompts(texts=("a", "b"), validation=str(tmp_path / "held.txt"))) == (["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "there are none in"),
        ("p.xls", "a,b", r"must be a .txt, .json, .jsonl, .csv, .tsv or .parquet file"),
        ("p.csv", "a,b", "there are none in"),
        ("p.csv", "prmopt,b\na cat,1", "row 1: has no 'prompt', did you mean 'prmopt'"),
        ("p.csv", "prompt,b\na cat,1\na red, big cat,1", "row 2: has 3 fields, the first line 2"),
        ("p.tsv", "prompt\tb\na cat", "row 1: has 1 fields, the first line 2"),
        ("p.csv", 'prompt\n"a cat', r"is not a table of text .*unexpected end of data"),
        ("p.csv", "prompt\n" + "a" * 200_000, "is not a table of text .*field larger"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2: is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompts": "b"}', "row 2: has no 'prompt', did you mean 'prompts'"),
        ("p.jsonl", '{"prompt": 3}', "must be a text"),
        ("p.json", "{}", "must be a list"),
        ("p.json", "[1]", "row 1: has no 'prompt'"),
        ("p.json", "[", "is not JSON"),
        ("p.json", "[" * 100_000, "is not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: is not JSON"),
        ("p.json", '[{"prompt": "\\ud800"}]', "row 1: '.ud800' has an unpaired surrogate"),
    ],
)
def test_mistakes(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_prompts(Prompts(path=str(tmp_path / name)))


def test_neither_or_both_sources(tmp_path: Path) -> None:
    for settings in (Prompts(), Prompts(path="x.txt", texts=("a",))):
        with pytest.raises(InputError, match="either a path or texts"):
            read_prompts(settings)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(Prompts(path=str(tmp_path / "none.txt")))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(Prompts(path=str(tmp_path / "latin.txt")))
