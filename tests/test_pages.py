"""The Python and the recipes of README and docs run, on what is small; and what pages compute is so."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import norm
from test_policy import a_policy

import tiltflow
from tiltflow import load
from tiltflow.flows.flow import Flow
from tiltflow.models.text_to_image import TextToImage
from tiltflow.problems.mixture import Mixture
from tiltflow.runs.recipe import read_recipe
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import parse_yaml

ROOT = Path(__file__).parent.parent
HERE = {
    "class-conditional.md": 1,
    "compare.md": 1,
    "control.md": 1,
    "from-trl.md": 3,
    "score-as-action.md": 1,
    "start.md": 1,
    "steering.md": 1,
    "text-to-image.md": 3,
    "utilities.md": 2,
    "your-own-reward.md": 3,
}
ELSEWHERE = {"text-to-image.md": 2, "your-own-model.md": 15}
"""Blocks that other files run: test_features.py and test_text_to_image.py, test_your_own_model.py."""


def test_every_block_of_python_is_run_somewhere() -> None:
    found = {page.name: len(blocks(page.name)) for page in (ROOT / "docs").glob("*.md")}
    known = {page: HERE.get(page, 0) + ELSEWHERE.get(page, 0) for page in {*HERE, *ELSEWHERE}}
    assert {page: count for page, count in found.items() if count} == known


def loaded_to_sample_fast(name: str) -> Any:
    """A model whose pictures are drawn in 5 steps, not in 50, by default and in the evaluation."""
    model = load(name)
    if not isinstance(model, TextToImage):
        return model
    return replace(model, sampling=Sampling(solver=model.sampling.solver, num_inference_steps=5))


def test_the_python_of_the_readme_runs() -> None:
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)  # _: test_your_own_model
    names: dict[str, Any] = {}
    for old, new in {"max_train_steps=20": "max_train_steps=1", "sample(64": "sample(2", "steps=10": "steps=3"}.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, names)
    assert names["images"].shape == (2, 1, 28, 28)


def blocks(page: str) -> list[str]:
    """The Python of a page of docs, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def run_page(page: str, *which: int, given: dict[str, Any] | None = None, **changes: str) -> dict[str, Any]:
    """The names that blocks of Python of a page leave, one after the other, with fewer steps and samples.

    Args:
        given: what the reader has.
    """
    code = "\n".join(blocks(page)[i] for i in which)
    for old, new in changes.items():
        assert f"{old}=" in code
        code = re.sub(rf"\b{old}=[\d.e]+", f"{old}={new}", code)
    names = dict(given or {})
    exec(code, names)
    return names


@pytest.mark.filterwarnings("ignore:this network is not the velocity field")  # nobody has trained it
def test_the_python_of_the_page_on_classes_runs() -> None:
    assert run_page("class-conditional.md", 0, max_train_steps="1")["cats"].shape == (8, 2)


def test_the_python_of_the_page_on_pipelines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiltflow, "load", loaded_to_sample_fast)
    fewer = {"max_train_steps": "1", "num_inference_steps": "3", "num_generations": "2", "prompts_per_step": "1"}
    names = run_page("text-to-image.md", 1, **fewer)
    assert names["images"].shape == names["before"].shape == (2, 3, 32, 32)
    assert (tmp_path / "runs" / "red" / "model" / "pytorch_lora_weights.safetensors").exists()


def test_the_recipe_of_the_page_on_pipelines_can_be_read() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "text-to-image.md").read_text(), re.DOTALL)
    read_recipe(parse_yaml(text, "text-to-image.md"), "text-to-image.md")


def small_model() -> tiltflow.Model:
    """Three modes in two dimensions, with weights to train."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return Mixture(dimension=2, modes=3, scale=0.4).base().velocity(x, t) + self.bias

    return tiltflow.Model(Flow(Net()), event_shape=(2,), sampling=Sampling(num_inference_steps=5))


def first_number(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def test_the_python_of_the_start_runs() -> None:
    names = run_page("start.md", 0, max_train_steps="1", train_batch_size="2", num_inference_steps="3")
    assert names["after"].shape == (16, 1, 28, 28)


def test_the_page_on_rewards_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(tiltflow, "load", loaded_to_sample_fast)
    names = run_page("your-own-reward.md", 0, 1, 2, max_train_steps="1", num_inference_steps="3")
    assert names["red_if_asked"](torch.ones(2, 3, 4, 4), ["a red cat", "a cat"]).tolist() == [0, 0]


def test_the_page_for_those_who_come_from_trl_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiltflow, "load", loaded_to_sample_fast)
    names = run_page("from-trl.md", 0, 1, 2, max_train_steps="1", num_inference_steps="3")
    assert (tmp_path / "runs" / "ddpo" / "model" / "pytorch_lora_weights.safetensors").exists()
    assert names["tuned"].sample(names["prompts"]).shape == (2, 3, 32, 32)


def test_what_the_page_on_trl_says_of_defaults() -> None:
    """`Ddpo` and the preset of AlignProp have TRL's."""
    ddpo, alignprop = tiltflow.Ddpo(), tiltflow.Draft(preset="alignprop")
    assert (ddpo.num_inference_steps, ddpo.clip_range, ddpo.num_passes) == (50, 1e-4, 1)
    expected = {"learning_rate": 3e-4, "adam_beta2": 0.999, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0}
    assert {key: ddpo.optimizer_defaults[key] for key in expected} == expected
    assert (alignprop.solver, alignprop.eta, alignprop.num_inference_steps, alignprop.truncation) == ("ddim", 1, 50, "random")
    assert alignprop.optimizer_defaults["learning_rate"] == 1e-3


def test_the_recipe_for_those_who_come_from_flow_grpo_can_be_read() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "from-flow-grpo.md").read_text(), re.DOTALL)
    recipe = read_recipe(parse_yaml(text, "from-flow-grpo.md"), "from-flow-grpo.md")
    assert recipe.method.eta == pytest.approx(0.8 / math.sqrt(2), abs=1e-3)


def test_names_of_settings_on_pages_for_those_who_come_exist() -> None:
    """`Training.this`, `Ddpo.that`; in recipes `training.this` and `method.that`."""
    classes = {name: getattr(tiltflow, name) for name in ("Training", "Ddpo", "Draft", "Optimizer", "Adapter")}
    sections = {"training": tiltflow.Training, "method": tiltflow.FlowGrpo, "evaluation": tiltflow.Evaluation}
    for page in ("from-trl.md", "from-flow-grpo.md", "choosing-beta.md", "troubleshooting.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name, kind in (classes | sections).items():
            for field in re.findall(rf"`(?:--set )?{name}\.(\w+)", text):
                assert field in kind.model_fields or (name == "method" and field in ("name", "beta")), (page, name, field)


def test_the_table_of_budgets() -> None:
    """Of a normal reward: KL d^2 / 2 where the mean moves by d standard deviations."""
    text = (ROOT / "docs" / "choosing-beta.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) \| .*?by ([\d.]+).*\| ([\d.]+) % \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for nats, moved, share in rows:
        assert float(nats) == pytest.approx(float(moved) ** 2 / 2, abs=0.01)
        assert float(share) == pytest.approx(100 * norm.sf(float(moved)), rel=0.4 if share == "0.1" else 0.05)


def test_the_python_of_the_page_on_pipelines_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the small pipeline in place of Stable Diffusion 1.5 and of a run."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(tiltflow, "from_diffusers", lambda name, guidance_scale: loaded_to_sample_fast("tiles-pipeline"))
    monkeypatch.setattr(tiltflow, "load", lambda folder: folder)
    assert run_page("text-to-image.md", 0)["images"].shape == (2, 3, 32, 32)


def test_the_python_of_the_page_on_edits_runs() -> None:
    """The pipeline is that of test_editing.py: here the call alone."""
    model = SimpleNamespace(sample=lambda *given, **more: inspect.signature(TextToImage.sample).bind(None, *given, **more))
    names = run_page("text-to-image.md", 2, given={"model": model})
    assert names["near"](torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)).tolist() == [-1, -1]


def test_the_python_of_the_page_on_steering_runs() -> None:
    names = run_page("steering.md", 0, given={"tiltflow": tiltflow, "model": small_model(), "reward": first_number})
    assert names["found"].samples.shape == (16, 2)


def test_the_solver_of_the_page_on_score_as_action_is_of_second_order() -> None:
    solver = run_page("score-as-action.md", 0)["midpoint"]
    ends = [solver(lambda x, t: x, torch.ones(1, 1), torch.linspace(0, 1, n + 1))[-1].item() for n in (10, 20)]
    coarse, fine = (abs(end - math.e) for end in ends)
    assert coarse / fine == pytest.approx(4, rel=0.1)


def test_the_python_of_the_page_on_control_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiltflow, "load", lambda folder: a_policy())
    names = run_page("control.md", 0, given={"observations": torch.zeros(4, 3)})
    assert len(names["actions"]) == 4


def test_the_python_of_the_page_on_utilities_runs() -> None:
    given = {"model": small_model(), "my_reward": first_number}
    assert run_page("utilities.md", 0, given=given)["reward"](torch.zeros(3, 2)).shape == (3,)


@pytest.mark.slow  # a hundred steps of forty evaluations
def test_the_stages_of_the_page_on_utilities_run() -> None:
    run_page("utilities.md", 1, given={"model": small_model(), "my_reward": first_number}, count="1", num_samples="500")


@pytest.mark.slow  # two trainings and their tuning
def test_the_python_of_the_page_on_comparing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiltflow, "compare", partial(tiltflow.compare, seeds=1, num_samples=200))
    assert run_page("compare.md", 0, given={"tiltflow": tiltflow}, network_evaluations="6e5")["found"]
