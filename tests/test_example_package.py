"""Somebody else's package: its parts are found like tiltflow's own, by the entry points of its pyproject.toml."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from tiny import UNET, tiny_recipe
from typed import apart, typed

from tiltflow import plugins
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.model import Model
from tiltflow.settings import dump_yaml, read_yaml
from tiltflow.streams import new_network

PACKAGE = Path(__file__).parents[1] / "examples" / "package"


def installed(site: Path, broken: str = "") -> Path:
    """What an installer leaves of the package in `site`: the files, and the metadata that says which parts it has."""
    groups = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in parts.items()) for group, parts in groups.items()]
    metadata = site / "tiltflow_example-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiltflow-example\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines) + broken + "\n")
    (site / "tiltflow_example").symlink_to(PACKAGE / "tiltflow_example")
    return site


def train(folder: Path) -> list[str]:
    return ["train", str(folder / "example.yaml"), "--output", str(folder / "run"), "--threads", "1"]


def test_a_recipe_uses_the_parts_of_another_package(tmp_path: Path) -> None:
    """A reward, a method, a solver and a metric in one run; a command; a network among the settings that are listed."""
    site = installed(tmp_path / "site")
    tree = read_yaml(tiny_recipe(tmp_path))
    tree |= {"reward": {"name": "bowl", "level": 0.5}, "method": "best-of", "optimizer": {"learning_rate": 1e-3}}
    tree["sampling"] = {"solver": "midpoint", "num_inference_steps": 3}
    (tmp_path / "example.yaml").write_text(dump_yaml(tree))
    done, greeting, listed = typed(train(tmp_path), ["greet", "you"], ["settings", "linear-field"], site=site)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["reward"]) == ("best-of", "bowl")
    assert summary["limits"][0] == "No law is known that the best half of each batch leads to."
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["kept"] >= tree["training"]["train_batch_size"] / 2
    assert "Samples of the batch that the model learned." in (tmp_path / "run" / "report.html").read_text()
    assert greeting.stdout == "hello, you\n"
    assert "dimension" in listed.stdout, listed.stderr


def test_a_recipe_uses_the_conditions_of_another_package(tmp_path: Path) -> None:
    """The classes that it names are tuned and measured, and no other."""
    site = installed(tmp_path / "site")
    network = UNET.model_copy(update={"classes": 4})
    model = Model(Flow(new_network(network, 0)), (1, 8, 8), network_settings=network, class_names=("a", "b", "c", "d"))
    model.save(tmp_path / "classes")
    tree = read_yaml(tiny_recipe(tmp_path)) | {"model": str(tmp_path / "classes"), "conditions": "odd", "reward": "ink"}
    (tmp_path / "example.yaml").write_text(dump_yaml(tree))
    misspelt = ["doctor", str(tmp_path / "example.yaml"), "--set", "conditions=od"]
    done, unknown = typed(train(tmp_path), misspelt, site=site)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_samples"] == 32
    assert summary["effective_sample_size_of_group"] == pytest.approx(summary["effective_sample_size"] / 2)  # two classes
    assert "there is no condition 'od', did you mean 'odd'?" in unknown.stdout + unknown.stderr


def test_verify_uses_the_problem_of_another_package(tmp_path: Path) -> None:
    """It is listed, meant by a name that is nearly its own, and verified with a method of tiltflow and of the package."""
    site = installed(tmp_path / "site")
    small = ("num_samples=200", "num_samples_w2=100", "draws=2", "hidden=8", "distance=3", "method.num_inference_steps=5")
    settings = [part for one in small for part in ("--set", one)]
    methods = ("adjoint-matching", "best-of")
    said, misspelt, *verified = typed(
        ["verify", "--help"],
        ["verify", "pairs"],
        *(["verify", "pair", "--method", method, "--iterations", "2", *settings, "--json"] for method in methods),
        site=site,
    )
    assert "mixture, pair, two-modes" in said.stdout
    assert "did you mean 'pair'" in misspelt.stderr
    for method, done in zip(methods, verified, strict=True):
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert (found["problem"], found["method"], found["dimension"]) == ("pair", method, 1)
        assert found["reward_base"] == pytest.approx(0.5 * (2 * 1.5 - 1.5) / 3)
        assert f"{method} on pair" in done.stderr


def test_a_family_of_pipelines_of_another_package(tmp_path: Path) -> None:
    """A pipeline of its class is a model, and a LoRA adapts the layers that the family names."""
    pytest.importorskip("diffusers")
    assert apart(layers_with_a_lora, tmp_path, site=installed(tmp_path / "site")) == {"2.to_k", "2.to_v"}


def layers_with_a_lora(folder: Path) -> set[str]:
    from diffusers import StableDiffusionPipeline
    from tiny_pipelines import tiny_pipeline

    from tiltflow import Adapter, from_diffusers

    class RenamedPipeline(StableDiffusionPipeline):
        pass

    components = tiny_pipeline("stable-diffusion", folder).components
    _, tuned = from_diffusers(RenamedPipeline(**components, requires_safety_checker=False)).trainable(Adapter(rank=2))
    trained = [name for name, parameter in tuned.denoiser.named_parameters() if parameter.requires_grad]
    return {name.split(".attn")[1].split(".lora")[0] for name in trained}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package.lost", "'lost': no_such_package.lost cannot be imported (No module"),
        ("json.decoder", "'lost': json.decoder has no 'Lost'"),
        ("json:loads", "'lost': json:loads must be a module"),
    ],
)
def test_a_broken_part_of_another_package_is_one_line(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a name that is not there, for which its own are among those that may be meant."""
    entry = EntryPoint("lost", value, "tiltflow.rewards")
    monkeypatch.setattr(plugins, "entries", lambda package: {"lost": entry} if package == "rewards" else {})
    with pytest.raises(InputError) as raised:
        plugins.find("rewards", "lost")
    assert str(raised.value).startswith(f"entry point tiltflow.rewards {message}")
    with pytest.raises(InputError, match="did you mean 'lost'"):
        plugins.find("rewards", "losst")


def test_a_broken_command_of_another_package_is_named_and_the_others_work(tmp_path: Path) -> None:
    site = installed(tmp_path / "site", "\n[tiltflow.commands]\nlost = tiltflow_example.lost")
    (done,) = typed(["greet", "you"], site=site)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello, you\n"
