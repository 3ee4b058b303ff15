"""What a user can write wrong in a recipe, and the one line that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field

from tiltflow.errors import InputError, did_you_mean
from tiltflow.interpolant import Cosine, DiscreteVariancePreserving, Interpolant
from tiltflow.plugins import find, names, part_of
from tiltflow.settings import Settings, apply_overrides, parse_yaml, read_yaml, validate


class Inner(Settings):
    rate: Annotated[float, Field(gt=0)] = 1.0
    kind: Literal["constant", "cosine"] = "cosine"


class Outer(Settings):
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    path: Annotated[Interpolant, Field(discriminator="name")] = Cosine()
    method: Annotated[Any, BeforeValidator(part_of("methods"))] = None
    count: Annotated[int, Field(ge=1)] = 1
    needed: str


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"inner": {"rat": 1}}, "here: inner.rat is not a setting, did you mean 'rate'?"),
        ({"inner": {"rate": -1}}, "here: inner.rate must be greater than 0 (got -1)"),
        ({"inner": {"kind": "cosin"}}, "here: inner.kind must be 'constant' or 'cosine', did you mean 'cosine'? (got 'cosin')"),
        ({"many": [{"rate": 1}, {"rats": 2}]}, "here: many.1.rats is not a setting, did you mean 'rate'?"),
        ({"count": "many"}, "here: count must be a valid integer, unable to parse string as an integer (got 'many')"),
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
        ({"method": {"beta": 1}}, "here: method: needs a name; known: adjoint-matching, orw-cfm-w2, score-as-action"),
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
    [("1e-4", 1e-4), ("-2.5E+3", -2500.0), (".5", 0.5), ("3", 3), ("no", "no"), ("on", "on"), ("true", True), ("1_000", 1000)],
)
def test_yaml_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_yaml_refuses_repeated_keys_bad_syntax_and_objects(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="here: line 2: 'a' is given twice"):
        parse_yaml("a: 1\na: 2\n", "here")
    with pytest.raises(InputError, match="here:2: not valid YAML"):
        parse_yaml("a: 1\n  b: [2\n", "here")
    with pytest.raises(InputError, match="not valid YAML"):
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
