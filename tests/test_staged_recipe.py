"""Recipes of stages: what is refused before the first step, and that the command line trains what Python does, bit for bit."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from torch import Tensor
from typer.testing import CliRunner

import tiltflow
import tiltflow.commands.terminal.app
from tiltflow.errors import InputError, Interrupted
from tiltflow.flows.flow import Flow
from tiltflow.networks.mlp import Mlp
from tiltflow.runs import evaluate as of_runs
from tiltflow.runs.doctor import Finding, examine, foresee
from tiltflow.runs.doctor.utility import first_stage, first_variation
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import read_recipe
from tiltflow.runs.staged import folder as stages_folder
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.run import run_stages
from tiltflow.settings import dump_yaml, parse_yaml
from tiltflow.streams import new_network
from tiltflow.utilities.mean_variance import MeanVariance

NETWORK = Mlp(hidden=8, layers=1)
TRAINING = {"max_train_steps": 4, "train_batch_size": 4, "checkpointing_steps": 2}
RESUMING = TRAINING | {"resume_from_checkpoint": "latest"}


def height(x: Tensor) -> Tensor:
    return x[:, 1]


def twice(x: Tensor) -> Tensor:
    return 2 * x[:, 0]


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def near(x: Tensor, weights: Tensor) -> Tensor:
    """Minus the squared distance of the mean from (1, 0); it writes into what it is given."""
    x -= torch.tensor([1.0, 0.0])
    return -(weights.to(x) @ x).square().sum()


def half(x: Tensor, weights: Tensor) -> Tensor:
    """E |x|^2 with half of its gradient."""
    return (weights.to(x) @ (x.detach() * x)).sum()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def _no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, which test_report.py has, take most of the time of runs so short."""
    monkeypatch.setattr(of_runs, "write_report", lambda folder: folder)
    monkeypatch.setattr(stages_folder, "write_stages_report", lambda folder: folder)


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two light stages in the plane for a mean less a variance."""
    if not (folder / "flow").exists():
        sampling = tiltflow.Sampling(num_inference_steps=3)
        tiltflow.Model(Flow(new_network(NETWORK, 0)), (2,), sampling, NETWORK).save(folder / "flow")
    return {
        "description": "tiny",
        "model": str(folder / "flow"),
        "utility": {"name": "mean-variance", "aversion": 0.5},
        "reward": {"name": "function", "path": "test_staged_recipe:height"},
        "stages": {"count": 2, "num_samples": 40, "price": 0.5},
        "method": {"name": "adjoint-matching", "beta": 1.0, "num_inference_steps": 3},
        "optimizer": {"learning_rate": 1e-2},
        "training": TRAINING,
        "sampling": {"num_inference_steps": 3},
        "evaluation": {"num_samples": 16},
    } | changes


def recipe(folder: Path, **changes: Any) -> StagedRecipe:
    found = read_recipe(tree(folder, **changes), "mine")
    assert isinstance(found, StagedRecipe)
    return found


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.flow.network.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def last(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "stage-02" / "model" / "model.safetensors")


# ---- reading ----


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewards": {"reward": "ink"}}, "mine: reward and rewards.reward both give the reward; give it once"),
        ({"utility": "superquantle"}, "utility: there is no utility 'superquantle', did you mean 'superquantile'"),
        ({"utility": {"name": "cvar", "share": 1.5}}, "utility.share must be less than 1 (got 1.5)"),
        ({"utility": {"name": "cvar", "share": 0.0}}, "utility.share must be greater than 0 (got 0.0)"),
        ({"utility": {"name": "cvar", "level": 0.9}}, "utility.level is not a setting"),
        ({"stages": {"cuont": 2}}, "stages.cuont is not a setting, did you mean 'count'"),
        (
            {"stages": {"base": "first", "price": 1.0}},
            "stages: from the first model the temperature of the method is the price",
        ),
        ({"stages": {"warm": True}}, "stages: warm is of stages from the first model"),
        (
            {"stages": {"warm": True, "base": "first"}, "method": "tilt-matching"},
            "stages.warm: tilt-matching counts its law from where it begins",
        ),
        ({"stages": {"mixing": 0.5}}, "stages: mixing is of stages from the first model"),
        ({"stages": {"one_shot": True}}, "stages.one_shot: of mean-variance no reward of one stage is known, but of cvar, "),
        (
            {"stages": {"one_shot": True, "count": 2}, "utility": "cvar"},
            "stages: one_shot is one stage from the first model; leave count out",
        ),
        (
            {"stages": {"one_shot": True}, "utility": "cvar", "training": {"target_kl": 1.0}},
            "stages.one_shot: the reward is computed for the temperature of the method, which training.target_kl changes",
        ),
        ({"model": {"path": "digits-flow", "adapter": {}}}, "model.adapter: stages tune the whole network"),
        ({"training": {"resume_from_checkpoint": "step-00000002"}}, "stages go on from the latest checkpoint"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as error:
        recipe(tmp_path, **changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_utility_is_what_makes_a_recipe_one_of_stages(tmp_path: Path) -> None:
    for name in ("rewards", "stages"):
        rest = {key: each for key, each in tree(tmp_path).items() if key in (name, "model", "method")}
        with pytest.raises(InputError, match="mine: utility is missing"):
            read_recipe({**rest, name: {}}, "mine")
    found = recipe(tmp_path)
    assert read_recipe(found.model_dump(mode="json"), "again") == found
    one = recipe(tmp_path, utility="cvar", stages={"one_shot": True})
    assert (one.stages.count, one.stages.base, one.alpha) == (1, "first", 1.0)
    assert read_recipe(one.model_dump(mode="json"), "again") == one


def test_the_recipe_of_the_documentation_is_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "utilities.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = read_recipe(parse_yaml(text, "utilities.md"), "utilities.md")
    assert isinstance(found, StagedRecipe)
    assert found.stages.stop == tiltflow.Stop(patience=2)


COST = {"name": "function", "path": "test_staged_recipe:twice"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"utility": {"name": "log-barrier", "limit": 9.0}}, "log-barrier needs a reward for 'cost'"),
        (
            {"utility": {"name": "log-barrier", "limit": -9.0}, "rewards": {"cost": COST}},
            r"the mean cost, -?[\d.]+ ± [\d.]+, is not below the limit -9",
        ),
        ({"utility": "entropy"}, "entropy has no reward 'reward'; it is made of none"),
        ({"utility": {"name": "superquantile", "share": 0.001}}, "the tail with share 0.001 of 40 samples has less than one"),
        (
            {"utility": "entropy", "reward": None, "method": {"name": "tilt-matching"}},
            "known by its gradient alone, and tilt-matching learns from values",
        ),
        ({"reward": {"name": "jpeg-size"}}, "reward 'jpeg-size' has no gradient, and method 'adjoint-matching' needs one"),
        ({"reward": {"name": "function", "path": "test_staged_recipe:heigth"}}, "has no 'heigth', did you mean 'height'"),
        ({"utility": {"name": "function", "path": "test_staged_recipe:height"}, "reward": None}, "must return one number"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    given = tree(tmp_path, **changes)
    found = read_recipe({key: each for key, each in given.items() if each is not None}, "mine")
    assert isinstance(found, StagedRecipe)
    with pytest.raises(InputError, match=says) as error:
        run_stages(found, tmp_path / "out", callbacks=[lambda record: pytest.fail("a step was taken")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_no_pages")
def test_what_has_no_optimum_says_so_before_the_first_step(tmp_path: Path) -> None:
    said: list[str] = []
    given = {**tree(tmp_path, utility="entropy", stages={"count": 1, "num_samples": 40}), "reward": None}
    found: Any = read_recipe({key: each for key, each in given.items() if each is not None}, "mine")
    seen: list[int] = []
    summary = run_stages(found, tmp_path / "out", note=said.append, callbacks=[lambda record: seen.append(len(said))])
    assert seen[0] == 1
    assert "has no optimum" in said[0]
    assert summary["caveats"] == said
    assert not recipe(tmp_path, utility={"name": "sum", "utilities": [{"utility": "entropy"}]}).utility.caveats(0.5)


# ---- training ----


def in_python(folder: Path, **options: Any) -> list[Any]:
    """The stages of `tree`."""
    method = tiltflow.AdjointMatching(beta=1.0, num_inference_steps=3)
    training = tiltflow.Training(max_train_steps=4, train_batch_size=4)
    sampling = tiltflow.Sampling(num_inference_steps=3)
    utility = tiltflow.OfLaw(MeanVariance(aversion=0.5), reward=height, num_samples=40, sampling=sampling)
    options |= {"optimizer": tiltflow.Optimizer(learning_rate=1e-2)}
    return list(tiltflow.stages(tiltflow.load(folder / "flow"), utility, method, training, count=2, **options))


@pytest.mark.usefixtures("_no_pages")
def test_a_recipe_and_python_give_the_same_models_bit_for_bit(tmp_path: Path) -> None:
    summary = run_stages(recipe(tmp_path), tmp_path / "out")
    found = in_python(tmp_path, price=0.5)
    assert same(weights(found[1].model), last(tmp_path / "out"))
    assert not same(weights(found[0].model), last(tmp_path / "out"))
    assert [(row["before"], row["after"]) for row in summary["stages"]] == [
        (each.before.value, each.after.value) for each in found if each.before and each.after
    ]
    other = recipe(tmp_path, utility={"name": "mean-variance", "aversion": 0.25}, training=RESUMING)
    with pytest.raises(InputError, match=r"started with another recipe: .*utility\.aversion 0\.5 -> 0\.25"):
        run_stages(other, tmp_path / "out")


def stopped_by(stop: Callable[[], object], at: int) -> Callable[[Any], None]:
    return lambda record: stop() if record.step == at else None  # type: ignore[func-returns-value, return-value]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pages")
def test_stages_resume_bit_for_bit_after_a_signal_in_a_stage_and_between_stages(tmp_path: Path) -> None:
    """With a start in the weights of the last stage, which is loaded when the second one goes on."""
    warm = {"count": 2, "num_samples": 40, "base": "first", "mixing": 0.5, "warm": True}
    run_stages(recipe(tmp_path, stages=warm), tmp_path / "whole")

    def interrupt(stage: Any) -> None:
        raise KeyboardInterrupt

    again = recipe(tmp_path, stages=warm, training=RESUMING)
    raised = stopped_by(lambda: signal.raise_signal(signal.SIGTERM), 3)
    with pytest.raises(Interrupted):
        run_stages(again, tmp_path / "out", callbacks=[raised], handle_signals=True)
    assert (tmp_path / "out" / "recipe.yaml").exists()
    with pytest.raises(KeyboardInterrupt):
        run_stages(again, tmp_path / "out", watch=interrupt)
    with pytest.raises(Interrupted):
        run_stages(again, tmp_path / "out", callbacks=[raised], handle_signals=True)
    run_stages(again, tmp_path / "out")
    assert same(last(tmp_path / "out"), last(tmp_path / "whole"))
    assert not same(weights(in_python(tmp_path, base="first", mixing=0.5)[1].model), last(tmp_path / "whole"))


@pytest.mark.usefixtures("_no_pages")
def test_one_shot_is_one_stage_for_the_best_tail(tmp_path: Path) -> None:
    """The threshold of the tail is that of the best law at the temperature, and not that of the base."""
    tail = {"name": "superquantile", "share": 0.25}
    training = {"max_train_steps": 2, "train_batch_size": 16}
    shot = recipe(tmp_path, utility=tail, stages={"one_shot": True, "num_samples": 40}, training=training)
    run_stages(shot, tmp_path / "out")
    (row,) = json.loads((tmp_path / "out" / "stages.json").read_text())["stages"]
    model = tiltflow.load(tmp_path / "flow")
    utility = tiltflow.OfLaw(shot.utility, reward=height, num_samples=40, sampling=shot.evaluation.first.sampling)
    options: dict[str, Any] = {"method": shot.method, "training": tiltflow.Training(**training)}
    (stage,) = tiltflow.stages(model, utility, **options, count=1, one_shot=True, optimizer=shot.optimizer)
    assert same(weights(stage.model), load_file(tmp_path / "out" / row["folder"] / "model" / "model.safetensors"))
    at = utility.known(model, model, (), tiltflow.runs.staged.outer_loop.stream(0, "law", 1).initial_seed())
    x = torch.linspace(-3, 3, 13)[:, None].expand(-1, 2)
    assert torch.equal(stage.reward(x), utility.one_shot(at, 1.0)(x))
    assert not torch.equal(stage.reward(x), utility.first_variation(at)(x))
    for count, other, says in ((1, MeanVariance(), "no reward of one stage is known"), (2, shot.utility, "leave count out")):
        with pytest.raises(InputError, match=says):
            list(tiltflow.stages(model, tiltflow.OfLaw(other, reward=height), **options, count=count, one_shot=True))


@pytest.mark.slow
@pytest.mark.usefixtures("_no_pages")
def test_stages_of_a_pipeline(tmp_path: Path) -> None:
    """A reward of its pictures, and the model of the last stage with its prompts."""
    tiny_pipeline("stable-diffusion", tmp_path).save_pretrained(tmp_path / "pipeline")
    given = {
        "model": {"diffusers": str(tmp_path / "pipeline"), "height": 16, "width": 16},
        "prompts": {"texts": ["a red cat", "a blue dog"], "validation": 0},
        "utility": {"name": "mean-variance"},
        "reward": {"name": "function", "path": "test_staged_recipe:brightness"},
        "stages": {"count": 2, "num_samples": 4},
        "method": {"name": "adjoint-matching", "num_inference_steps": 3},
        "training": {"max_train_steps": 1, "prompts_per_step": 1, "num_generations": 2, "guidance_mode": "none"},
        "sampling": {"num_inference_steps": 3},
        "evaluation": {"num_prompts": 1, "num_generations": 2},
    }
    found: Any = read_recipe(given, "mine")
    assert {each.check: each.level for each in examine(found)}["parts"] == "green"
    models: list[Any] = []
    summary = run_stages(found, tmp_path / "out", watch=lambda stage: models.append(stage.model))
    assert summary["path_kl"] is not None
    again = tiltflow.load(tmp_path / "out")
    assert same(weights(again), weights(models[1]))
    assert again.sample(["a red cat"]).shape == (1, 3, 16, 16)
    assert tiltflow.evaluate(tmp_path / "out")["utility_after"] == summary["utility_after"]
    export_run(tmp_path / "out", tmp_path / "exported")
    assert (tmp_path / "exported" / "model_index.json").exists()
    with pytest.raises(InputError, match=r"model\.adapter: stages tune the whole network"):
        read_recipe(given | {"model": {**given["model"], "adapter": {"rank": 2}}}, "mine")


# ---- the doctor ----


def test_the_doctor_looks_at_the_utility(tmp_path: Path) -> None:
    found = {each.check: each for each in examine(recipe(tmp_path, stages={"count": 3, "num_samples": 300}))}
    assert [*found][:2] == ["batch", "parts"]
    assert found.keys() >= {"reward", "gradient", "utility", "first variation", "memory"}
    assert {found[name].level for name in ("reward", "gradient", "utility", "first variation")} == {"green"}
    said = re.fullmatch(r"mean-variance (\S+) ± (\S+) at the first model, by 300 samples", found["utility"].text)
    assert said is not None
    assert abs(float(said[1]) + 0.5) < 4 * float(said[2])  # of N(0, 1) and the aversion 0.5
    assert found["first variation"].text.endswith("has a gradient at 100.0% of samples: 4.0 of a batch of 4")
    assert "not concave" in found["optimum"].text
    assert "of a stage" in found["iteration"].text
    assert "for all 3 stages" in found["iteration"].text
    assert {each.check: each.level for each in examine(recipe(tmp_path, utility="entropy"))}["parts"] == "red"


def test_a_forecast_from_configs_is_of_one_run(tmp_path: Path) -> None:
    found = {each.check: each for each in foresee(recipe(tmp_path))}
    assert found["memory"].level == "red"
    assert "recipes of one run" in found["memory"].text


def test_the_doctor_holds_a_first_variation_against_the_value(tmp_path: Path) -> None:
    def finding(utility: dict[str, Any], reward: Any = None) -> Finding:
        given = tree(tmp_path, utility=utility, stages={"num_samples": 2000}, reward=reward)
        found: Any = read_recipe({key: each for key, each in given.items() if each is not None}, "mine")
        (only,) = first_variation(first_stage(found, "cpu"))
        return only

    tail = finding({"name": "superquantile", "share": 0.1}, tree(tmp_path)["reward"])
    assert tail.level == "amber"
    assert re.search(r"at (9|10)\.\d% of samples: 0\.4 of a batch of 4", tail.text)
    assert finding({"name": "function", "path": "test_staged_recipe:near"}).level == "green"
    wrong = finding({"name": "function", "path": "test_staged_recipe:half"})
    assert wrong.level == "red"
    assert "gradient" in wrong.text


# ---- the command line ----


def command(*arguments: str) -> str:
    done = CliRunner().invoke(tiltflow.commands.terminal.app.app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output or done.exception
    return done.output


def test_stages_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_runs, "write_report", lambda folder: folder)
    (tmp_path / "mine.yaml").write_text(dump_yaml(tree(tmp_path)))
    out = str(tmp_path / "out")
    trained = command(
        "train", str(tmp_path / "mine.yaml"), "--output", out, "--set", "stages.num_samples=30", "--device", "cpu"
    )
    assert re.search(r"^stage 2 of 2: utility \S+ ± \S+ -> ", trained, re.MULTILINE)
    assert re.search(r"^2 +\S+ ± \S+ +\S+ ± ", trained, re.MULTILINE)
    assert "nats from the first model" in trained
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_samples"] == 30
    assert summary["iterations"] == 8
    assert summary["path_kl"] > 0
    assert len(summary["stages"]) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The utility from stage to stage" in page
    assert '<p class="lede">tiny</p>' in page
    assert all(html.escape(caveat) in page for caveat in summary["caveats"])
    assert summary["caveats"]
    measured = json.loads(command("evaluate", out, "--num-samples", "50", "--device", "cpu", "--json").splitlines()[-1])
    assert measured["num_samples"] == 50
    assert measured["utility_before"] != summary["utility_before"]
    command("sample", out, "--num-samples", "5", "--output", str(tmp_path / "x.npz"), "--device", "cpu")
    model = tiltflow.load(tmp_path / "out")
    first = weights(tiltflow.load(tmp_path / "flow"))
    start, half_way = (weights(tiltflow.load(tmp_path / "out", tilt_strength=strength)) for strength in (0, 0.5))
    assert same(start, first)
    assert all(torch.allclose(half_way[name], (first[name] + each) / 2) for name, each in weights(model).items())
    assert same(weights(model), last(tmp_path / "out"))
    with np.load(tmp_path / "x.npz") as archive:
        np.testing.assert_array_equal(archive["samples"], model.sample(5).numpy())
    assert model.sampling.num_inference_steps == 3
    command("export", out, "--output", str(tmp_path / "exported"))
    assert same(weights(tiltflow.load(tmp_path / "exported")), weights(model))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| utility mean-variance |" in card
    assert "in stages" in card
    of_stage = json.loads(command("evaluate", f"{out}/stage-01", "--device", "cpu", "--json").splitlines()[-1])
    again = json.loads(command("evaluate", f"{out}/stage-02", "--device", "cpu", "--json").splitlines()[-1])
    assert again["utility_after"] == summary["utility_after"]
    assert of_stage["utility_before"] == summary["utility_before"]
    assert of_stage["utility_after"] not in (summary["utility_before"], summary["utility_after"])
    assert of_stage["stages"] == summary["stages"][:1]
    assert json.loads((tmp_path / "out" / "stage-01" / "utility.json").read_text()) == of_stage
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == measured
    shutil.copytree(tmp_path / "out" / "stage-01", tmp_path / "out" / "stage-03")
    (tmp_path / "alone").mkdir()
    shutil.copytree(tmp_path / "out" / "stage-01", tmp_path / "alone" / "stage-01")
    sweep = ["sweep", "--seeds", "2", "--output", str(tmp_path / "sweep")]
    for verb, of, says in (
        (["evaluate"], "out/stage-03", "this stage is not finished; rerun `tiltflow train` with --resume"),
        (["evaluate"], "alone/stage-01", "of stages: give the folder that holds them"),
        (sweep, "mine.yaml", "recipe of stages"),
    ):
        done = CliRunner().invoke(tiltflow.commands.terminal.app.app, [*verb, str(tmp_path / of)])
        assert isinstance(done.exception, InputError)
        assert says in str(done.exception)
