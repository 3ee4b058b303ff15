"""Prompts from every kind of file, the part that is held out, and mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path

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
        ("p.csv", "a,b", r"must be a .txt, .jsonl or .json file"),
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
