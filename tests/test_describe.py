"""Every setting is there, under the name that a recipe takes, with its type, default and sentence."""

from __future__ import annotations

import json

import pytest

from tiltflow.errors import InputError
from tiltflow.laws.lqg import Lqg
from tiltflow.plugins import names
from tiltflow.rewards.sum import Sum
from tiltflow.runs.describe import listed, sentences, settings_of, topics
from tiltflow.runs.recipe import Recipe, shipped_recipes
from tiltflow.settings import read_yaml


def test_every_setting_has_a_type_and_a_sentence() -> None:
    for topic in topics():
        for title, (said, settings) in settings_of(topic).items():
            assert said.endswith((".", ")")) or title.startswith("network"), title
            for setting in settings:
                assert setting.type, (title, setting)
                assert setting.description.endswith((".", ";", ")")), (title, setting)
                assert "\n" not in setting.description


def test_every_key_of_the_shipped_recipes_is_listed() -> None:
    """Nothing that a recipe can say is missing."""
    settings = [setting for _, own in settings_of("recipe").values() for setting in own]
    for name, path in shipped_recipes("train").items():
        tree = read_yaml(path)
        of_model = [setting for _, kind in settings_of("model").values() for setting in kind]
        known = {setting.name.replace("[]", "") for setting in (*settings, *of_model)}
        named = {part: tree[part] for part in ("method", "reward", "utility", "conditions") if part in tree}
        named |= {f"rewards.{name}": each for name, each in tree.get("rewards", {}).items()}
        for part, chosen in named.items():
            topics_of = settings_of(chosen if isinstance(chosen, str) else chosen["name"])
            (inner,) = (own for title, (_, own) in topics_of.items() if title.startswith(part.split("s.")[0]))
            known |= {part, "model.name", f"{part}.name", *(f"{part}.{setting.name.replace('[]', '')}" for setting in inner)}
        loose = (
            "model.scheduler.",
            "model.dtype.",
            "model.components.",
            "model.quantization.",
            "reward.rewards.reward.",
            "utility.utilities.utility.",
            "evaluation.rewards.",
            "reward.network.",
        )
        for key in keys(tree):
            assert key in known or key.startswith(loose), (name, key)


def keys(tree: object, prefix: str = "") -> set[str]:
    if isinstance(tree, dict):
        return {key for name, value in tree.items() for key in {prefix + name, *keys(value, f"{prefix}{name}.")}}
    if isinstance(tree, list):
        return {key for value in tree for key in keys(value, prefix)}
    return set()


def test_types_and_defaults_are_those_of_the_code() -> None:
    found = {setting.name: setting for setting in listed(Recipe)}
    assert found["model"].default == "required"
    assert found["training.train_batch_size"].type == "integer >= 1, or null"
    assert found["training.micro_batch_size"].type == "integer >= 1, or null"
    assert found["training.micro_batch_size"].default == "null"
    assert found["training.mixed_precision"].type == "no | bf16 | auto"
    assert found["training.ema_decay"].type == "number >= 0 and < 1"
    assert found["training.monitor.stop"].default == "false"
    assert found["evaluation.group"].type == "list of integer >= 0"
    assert found["training.trainable"].type == "regular expression"
    of_sum = {setting.name: setting for setting in listed(Sum)}
    assert of_sum["rewards[].clip"].type == "[number, or null, number, or null]"
    for setting in found.values():
        if setting.default != "required":
            json.loads(setting.default)


def test_every_problem_is_there() -> None:
    for name in names("problems"):
        assert f"problem {name} of `tiltflow verify`" in settings_of(name)


def test_a_sentence_is_the_one_below_its_field() -> None:
    assert sentences(Lqg)["k"] == "Its intercept."
    assert "name" not in sentences(Lqg)


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(InputError, match="there are no settings of 'adjoint-macthing', did you mean 'adjoint-matching'"):
        settings_of("adjoint-macthing")
