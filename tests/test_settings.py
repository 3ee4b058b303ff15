"""What a user can write wrong in a recipe, and the one line that says so."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BeforeValidator, Field

from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.interpolant import Cosine, DiscreteVariancePreserving, Interpolant
from tiltflow.plugins import find, names, part_of
from tiltflow.runs.recipe import Recipe, find_recipe
from tiltflow.settings import Settings, apply_overrides, dump_yaml, parse_yaml, read_yaml, validate


class Inner(Settings):
    rate: Annotated[float, Field(gt=0)] = 1.0
    kind: Literal["constant", "cosine"] = "cosine"


class Outer(Settings):
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    some: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)
    path: Annotated[Interpolant, Field(discriminator="name")] = Cosine()
    method: Annotated[Any, BeforeValidator(part_of("methods"))] = None
    count: Annotated[int, Field(ge=1)] = 1
    scale: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = 1.0
    needed: str


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"inner": {"rat": 1}}, "here: inner.rat is not a setting, did you mean 'rate'?"),
        ({"inner": {"rate": -1}}, "here: inner.rate must be greater than 0 (got -1)"),
        ({"scale": float("inf")}, "here: scale must be a finite number (got inf)"),
        ({"scale": -1.0}, "here: scale must be greater than 0 (got -1.0)"),
        ({"scale": [1.0, float("nan")]}, "here: scale.1 must be a finite number (got nan)"),
        ({"scale": [-1.0, "x"]}, "here: scale.0 must be greater than 0 (got -1.0)"),
        ({"scale": "x"}, "here: scale must be a valid number (got 'x')"),
        ({"inner": {"kind": "cosin"}}, "here: inner.kind must be 'constant' or 'cosine', did you mean 'cosine'? (got 'cosin')"),
        ({"many": [{"rate": 1}, {"rats": 2}]}, "here: many.1.rats is not a setting, did you mean 'rate'?"),
        ({"count": "many"}, "here: count must be a valid integer (got 'many')"),
        ({"many": 3}, "here: many must be a list, such as [1, 2] (got 3)"),
        ({"some": []}, "here: some must have at least 1 of them (got [])"),
        ({"inner": [1]}, "here: inner must be a mapping of settings (got [1])"),
        ({"count": 0}, "here: count must be greater than or equal to 1 (got 0)"),
        ({"cuont": 3}, "here: cuont is not a setting, did you mean 'count'?"),
        ({"path": {"name": "linear", "beta_min": 1}}, "here: path.beta_min is not a setting; known: name"),
        (
            {"path": {"name": "variance-preserving", "beta_mn": 1}},
            "here: path.beta_mn is not a setting, did you mean 'beta_min'?",
        ),
        (
            {"method": {"name": "adjoint-matchng"}},
            "here: method: there is no method 'adjoint-matchng', did you mean 'adjoint-matching'?",
        ),
        ({"method": {"name": "adjoint-matching", "bta": 1}}, "here: method.bta is not a setting, did you mean 'beta'?"),
        ({"method": {"beta": 1}}, f"here: method: needs a name; known: {', '.join(names('methods'))}"),
        ({}, "here: needed is missing"),
    ],
)
def test_one_line_says_what_is_wrong_and_what_would_be_right(tree: dict[str, Any], message: str) -> None:
    full = tree if message.endswith("is missing") else {"needed": "x", **tree}
    with pytest.raises(InputError) as error:
        validate(Outer, full, "here")
    assert str(error.value) == message


def test_settings_are_frozen_and_reject_nan() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().rate = 2.0  # type: ignore[misc]
    with pytest.raises(InputError, match=r"inner\.rate must be a finite number"):
        validate(Outer, {"needed": "x", "inner": {"rate": float("nan")}}, "here")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("3", 3),
        ("-0", 0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        (".info", ".info"),
        ("0.5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o17", 15),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("=", "="),
        ("<<", "<<"),
        ("true", True),
        ("null", None),
        ("'3'", "3"),
        ("007 times", "007 times"),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)
    assert parse_yaml(dump_yaml({"a": [value]}), "here") == {"a": [value]}


def test_yaml_has_a_word_for_what_is_no_number() -> None:
    for text in (".nan", ".NaN", ".NAN"):
        assert math.isnan(parse_yaml(text, "here"))


@pytest.mark.parametrize("text", ["010", "0755", "-01", "00", "01.5", "0_1", "1:30", "true", "1.5", "10.0", "'10'", "1e1"])
def test_what_is_no_integer_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(InputError, match=r"^here: (0|-01).* begins with a zero|^here: count must be a valid integer \(got"):
        validate(Outer, {"needed": "x", "count": parse_yaml(text, "here")}, "here")


def test_a_number_out_of_an_array_is_one() -> None:
    built = Outer(needed="x", count=np.arange(3)[2], inner=Inner(rate=np.float32(0.5)))
    assert (built.count, built.inner.rate) == (2, 0.5)
    assert type(built.count) is int
    with pytest.raises(ValueError, match="valid integer"):
        Outer(needed="x", count=np.bool_(True))


def test_a_number_is_no_word_and_a_word_no_number() -> None:
    for tree in (
        {"needed": 3},
        {"needed": True},
        {"inner": {"rate": "1"}},
        {"inner": {"rate": True}},
        {"inner": {"kind": ["cosine"]}},
    ):
        with pytest.raises(InputError, match="must be"):
            validate(Outer, {"needed": "x"} | tree, "here")
    assert validate(Outer, {"needed": "x", "inner": {"rate": 1}}, "here").inner.rate == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "r:1: anchors and aliases are not read; write out what 'x' stands for"),
        ("a: [1]\nb: *x", "r:2: anchors and aliases are not read"),
        ("&x a: 1", "r: a key must be a word"),
        ("a: !!int ''", "r: tags are not read; leave 'tag:yaml.org,2002:int' out"),
        ("a: 1\nb: !!float x", "r:2: tags are not read"),
        ("? [a, b]\n: c", "r:1: a key must be a word"),
        ("a: 1\n---\nb: 2", "r:2: must be one document"),
        ("%YAML 1.1\n---\na: 1", r"r:\d: must be YAML 1.2"),
        ("[" * 2000, "r: nested deeper than 64 levels"),
        (
            "0x" + "9" * 5000,
            "r: 0x99999999999999999999999999999999999999.. is an integer of 5002 characters; the most are 1000",
        ),
        ("a:\n  b: 1\n  b: 2", "r:3: 'b' is given twice"),
        ("a: 1\n'a': 2", "r:2: 'a' is given twice"),
        ('a: "\\U00110000"', "r: not valid YAML"),
        ("a: " + "9" * 6000, "r: 9{40}.. is an integer of 6000 characters; the most are 1000"),
        ("x" * (1 << 18) + "y", "r: is longer than 262144 characters"),
    ],
)
def test_yaml_that_is_refused_says_the_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as error:
        parse_yaml(text, "r")
    assert "\n" not in str(error.value)


def test_written_yaml_means_the_same_to_every_reader() -> None:
    """To ours, to one of YAML 1.1 (PyYAML), and, in one line, to one of JSON."""
    yaml = pytest.importorskip("yaml")
    words = ["no", "y", "ON", "1:30", "010", "1e-4", "0o17", "1_0", "2024-01-01", "~", "", "<<", "=", "null", "a: b", "# a"]
    words += ["@x", "two\nlines\n", " lead", "trail ", "tab\there", "\x1b[31m", "\u2028", "\x85", "\ufeff", "é", "long " * 60]
    words += ["- a", "[x", "!x", "&x", "9" * 200 + "\\x, a", "a" * 300 + " \\ b", "long: " * 60]
    shared = [1, 2]
    tree = {"words": {word: word for word in words}, "numbers": [1, -2, 1e-5, 1e300, 0.5, -0.0], "rest": [None, True, [], {}]}
    tree |= {"b": shared, "a": shared}
    text = dump_yaml(tree)
    assert parse_yaml(text, "r") == tree == yaml.safe_load(text)
    assert list(parse_yaml(text, "r")) == list(tree)
    assert parse_yaml(json.dumps(tree), "r") == tree


def test_a_recipe_can_be_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=(tmp_path / "pipe").write_text, args=("\ufeffa: 1\n",), kwargs={"encoding": "utf-8"})
    thread.start()
    assert find_recipe(str(tmp_path / "pipe"), "train") == tmp_path / "pipe"
    assert read_yaml(tmp_path / "pipe") == {"a": 1}
    thread.join()
    with pytest.raises(InputError, match="is longer than"):
        read_yaml(Path("/dev/zero"))


def test_no_problem_of_a_recipe_is_a_traceback() -> None:
    """What a check of a setting meets before its type is checked."""
    recipes = [
        {"method": {"name": "adjoint-matching", "preset": ["a"]}},
        {"method": {"name": "score-as-action", "preset": {}, "solver": 3}},
        {"method": {"name": "score-as-action", "solver": []}},
        {"reward": {"name": "ink", "ink": 3}},
        {"training": {"trainable": "(" * 5000 + ")" * 5000}},
        {"training": {"trainable": "a)"}},
        {"evaluation": {"group": [0, 0, 0, 0]}},
        {"evaluation": {"group": [-1]}},
        {"reward": {"name": "class-log-odds", "classes": [1, 1]}},
        {"reward": {"name": "class-probability", "classes": [-1]}},
    ]
    whole = {"model": "digits-flow", "reward": "ink", "method": {"name": "adjoint-matching"}}
    for tree in recipes:
        with pytest.raises(InputError, match=f"^r: {next(iter(tree))}") as error:
            validate(Recipe, whole | tree, "r")
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 400


def test_yaml_refuses_repeated_keys_bad_syntax_and_objects(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="here:2: 'a' is given twice"):
        parse_yaml("a: 1\na: 2\n", "here")
    with pytest.raises(InputError, match="here:2: not valid YAML"):
        parse_yaml("a: 1\n  b: [2\n", "here")
    with pytest.raises(InputError, match="tags are not read"):
        parse_yaml("!!python/object/apply:os.system ['true']", "here")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="must be a mapping"):
        read_yaml(tmp_path / "list.yaml")
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")


def test_overrides_change_a_copy_and_are_read_as_yaml() -> None:
    tree = {"a": {"b": 1}, "c": [1]}
    changed = apply_overrides(tree, ["a.b=1e-4", "a.new=[0, 2]", "d.e.f=true"])
    assert changed == {"a": {"b": 1e-4, "new": [0, 2]}, "c": [1], "d": {"e": {"f": True}}}
    for text, value in {"1,3": [1, 3], "1,": [1], "-1, 0.5,1e-3": [-1, 0.5, 1e-3], "1,a": "1,a", "a,1": "a,1", "1": 1}.items():
        assert apply_overrides(tree, [f"c={text}"])["c"] == value
    with pytest.raises(InputError, match="--set c: 000 begins with a zero"):
        apply_overrides(tree, ["c=1,000"])
    assert tree == {"a": {"b": 1}, "c": [1]}
    with pytest.raises(InputError, match="must read key=value"):
        apply_overrides(tree, ["a.b"])
    with pytest.raises(InputError, match="'c' has no settings below it"):
        apply_overrides(tree, ["c.d=1"])


def test_a_part_is_found_by_the_name_of_its_file() -> None:
    assert "adjoint-matching" in names("methods")
    for package in ("methods", "networks", "rewards"):
        for name in names(package):
            part = find(package, name)
            assert part.model_fields["name"].default == name


def test_a_part_keeps_its_type_in_python() -> None:
    schedule = DiscreteVariancePreserving(num_train_timesteps=10)
    assert validate(Outer, {"needed": "x", "path": schedule}, "here").path == schedule


def test_did_you_mean_lists_the_names_when_none_is_near() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("zzz", []) == ""
