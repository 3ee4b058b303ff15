"""The doctor: a healthy recipe is green, and each planted fault has its colour and its remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.settings import Evaluation
from tiltflow.flows.flow import Flow
from tiltflow.runs.doctor import Finding, Patient, admit, examine, iteration, network, reward, sampler, target, verdict
from tiltflow.runs.doctor import memory as needed
from tiltflow.runs.recipe import Recipe
from tiltflow.settings import read_yaml, validate
from tiltflow.training import memory

TRAINING = {"max_train_steps": 4, "train_batch_size": 8}


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    method = {"name": "adjoint-matching", "num_inference_steps": 4, "beta": 0.5}
    tree = {"training": TRAINING, "method": method, "optimizer": {"learning_rate": 1e-3}} | changes
    return validate(Recipe, read_yaml(tiny_recipe(folder, **tree)), "recipe")


def patient_for(folder: Path, **changes: Any) -> Patient:
    return admit(recipe_for(folder, **changes), "cpu")


def the(findings: Any, check: str) -> Finding:
    found = {finding.check: finding for finding in findings}
    return found[check]


def test_a_healthy_recipe_is_green(tmp_path: Path) -> None:
    findings = list(examine(recipe_for(tmp_path)))
    assert [finding.check for finding in findings] == [
        "batch", "parts", "denoising", "temperature", "reward", "gradient", "ratio", "memorylessness", "memory", "iteration",
    ]  # fmt: skip
    # eight samples of a random network say little of a temperature or of a correlation: these two are tested below
    assert {f.level for f in findings if f.check not in ("denoising", "temperature", "memorylessness")} == {"green"}, findings
    assert "for all 4," in findings[-1].text
    assert not (tmp_path / "run").exists()


def test_the_command_line(tmp_path: Path) -> None:
    recipe_for(tmp_path)
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "recipe.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["verdict"] in ("green", "amber")
    assert {"check", "level", "text", "remedy", "numbers"} == set(found["findings"][0])
    wrong = CliRunner().invoke(app, ["doctor", str(tmp_path / "recipe.yaml"), "--set", "method.bta=1"])
    assert wrong.exit_code == 1
    assert "method.bta is not a setting, did you mean 'beta'?" in wrong.output
    missing = CliRunner().invoke(app, ["doctor", str(tmp_path / "recipe.yaml"), "--set", "model=nowhere"])
    assert missing.exit_code == 1
    assert "there is no model 'nowhere'" in missing.output


# ---- planted faults ----


def test_a_reward_that_is_not_deterministic(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    patient = replace(
        patient_for(tmp_path), reward=lambda x: x.mean((1, 2, 3)) + 1e-3 * torch.randn(len(x), generator=generator)
    )
    finding = the(reward.reward_itself(patient), "reward")
    assert finding.level == "amber"
    assert "Two calls on the same samples differ" in finding.text


def test_a_reward_that_looks_at_the_batch(tmp_path: Path) -> None:
    patient = replace(patient_for(tmp_path), reward=lambda x: x.mean((1, 2, 3)) - x.mean())
    finding = the(reward.reward_itself(patient), "reward")
    assert finding.level == "red"
    assert "another value when it is alone" in finding.text


class StraightThrough(torch.autograd.Function):
    """Rounded on the way there, and not on the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def test_a_gradient_that_is_not_the_slope(tmp_path: Path) -> None:
    patient = patient_for(tmp_path)
    wrong = replace(patient, reward=lambda x: StraightThrough.apply(x.mean((1, 2, 3))))  # type: ignore[no-untyped-call, no-any-return]
    assert the(reward.reward_gradient(wrong), "gradient").level == "red"
    zero = replace(patient, reward=lambda x: (x - x.detach()).mean((1, 2, 3)) * 0)
    assert the(reward.reward_gradient(zero), "gradient").text == "the gradient of the reward is zero"
    right = replace(patient, reward=lambda x: x.sin().mean((1, 2, 3)))
    assert the(reward.reward_gradient(right), "gradient").level == "green"


class Dropping(nn.Module):
    """A network with dropout that is on."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.dropout = network, nn.Dropout(0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.network(x, time))
        return out


def test_a_network_that_trains_otherwise_than_it_samples(tmp_path: Path) -> None:
    patient = patient_for(tmp_path)
    torch.manual_seed(0)
    broken = replace(patient, tuned=Flow(Dropping(patient.tuned.network)))  # type: ignore[arg-type]
    finding = the(network.ratio(broken), "ratio")
    assert finding.level == "red"
    assert "eval()" in finding.remedy


def test_a_model_that_does_not_begin_as_its_base(tmp_path: Path) -> None:
    patient = patient_for(tmp_path)
    with torch.no_grad():
        for parameter in patient.tuned.parameters():
            parameter += 0.1
    finding = the(network.ratio(patient), "ratio")
    assert finding.level == "amber"
    assert "from the base" in finding.text


@pytest.mark.parametrize(("method", "level"), [({"solver": "memoryless"}, "green"), ({"solver": "ddim", "eta": 0.2}, "amber")])
def test_a_sampler_that_remembers_its_noise(method: dict[str, Any], level: str, tmp_path: Path) -> None:
    """On a Gaussian whose ODE maps noise to data one to one."""
    from tiltflow.laws.gaussian_mixture import ExactVelocity
    from tiltflow.problems.gaussian import Gaussian

    settings = {"name": "score-as-action", "num_inference_steps": 30} | method
    patient = patient_for(tmp_path, method=settings)
    exact = Flow(ExactVelocity(Gaussian(dimension=2).base()))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    patient = replace(patient, base=exact, tuned=exact, batch=replace(patient.batch, x=x), start=0.0)
    finding = the(sampler.memoryless(patient), "memorylessness")
    assert finding.level == level, finding
    if level == "amber":
        assert float(finding.text.split()[5]) > 0.3


def test_too_strong_and_too_weak_a_tilt(tmp_path: Path) -> None:
    patient = patient_for(tmp_path)
    found = {}
    for beta in (1e-9, 0.5, 1e9):
        method = patient.recipe.method.model_copy(update={"beta": beta})
        recipe = patient.recipe.model_copy(update={"method": method})
        found[beta] = the(target.temperature(replace(patient, recipe=recipe)), "temperature")
    assert found[1e-9].level == "amber"
    assert "so strong a tilt" in found[1e-9].text
    assert "nearly the base" in found[1e9].text
    assert "method.first" not in str(found[1e-9].remedy)
    rounds = patient_for(tmp_path, method={"name": "tilt-matching", "beta": 1e-9})
    assert "path-reweighted end (method.first)" in str(the(target.temperature(rounds), "temperature").remedy)
    constant = replace(patient, reward=lambda x: torch.ones(len(x)))
    assert the(target.temperature(constant), "temperature").level == "red"


def test_a_kl_budget_that_the_reward_cannot_spend(tmp_path: Path) -> None:
    """Base samples say at which temperature it is spent, and that a reward of two values has a largest tilt."""
    patient = patient_for(tmp_path, training=TRAINING | {"train_batch_size": 64, "target_kl": 0.5})

    def asking(patient: Patient, budget: float) -> Patient:
        training = patient.recipe.training.model_copy(update={"target_kl": budget})
        return replace(patient, recipe=patient.recipe.model_copy(update={"training": training}))

    found = list(target.temperature(patient))
    assert [finding.check for finding in found] == ["KL budget", "temperature"]
    rewards = patient.rewards(patient.samples()).double()
    beta = target.temperature_of(0.5, [rewards])
    assert beta is not None
    assert f"{beta:.3g}" in found[0].text
    assert ImportanceWeights.from_rewards(rewards, beta).divergence().value == pytest.approx(0.5)
    half = replace(patient, reward=lambda x: (x.mean((1, 2, 3)) > x.mean((1, 2, 3)).median()).float())
    assert the(target.temperature(half), "KL budget").level == "green"
    finding = the(target.temperature(asking(half, 0.8)), "KL budget")
    assert finding.level == "red"
    assert "50% of 64 base samples have the largest reward, and the most that can be spent is 0.693" in finding.text
    finding = the(target.temperature(asking(patient, 5.0)), "KL budget")
    assert finding.level == "amber"
    assert "64 base samples are too few" in finding.text


def test_an_evaluation_too_small_to_know_its_target(tmp_path: Path) -> None:
    """A share of the base's samples carries the weight; so many of them are needed for 100 of the target, and for ten of each
    prompt: what the evaluation itself asks for."""
    pixels = recipe_for(tmp_path).evaluation.model_copy(update={"num_samples": 300})
    assert target.too_few_to_know(pixels, 0.4) is None
    said, remedy = target.too_few_to_know(pixels, 0.25) or ("", "")
    assert "evaluation's 300 that would be 75" in said
    assert remedy.startswith("evaluation.num_samples=400 ")
    pictures = Evaluation(num_generations=16)
    assert target.too_few_to_know(pictures, 0.7) is None
    said, remedy = target.too_few_to_know(pictures, 0.5) or ("", "")
    assert "16 pictures of a prompt that would be 8.0" in said
    assert remedy.startswith("evaluation.num_generations=20 ")
    tiny = patient_for(tmp_path)  # 32 samples can never weigh as much as 100
    finding = the(target.temperature(tiny), "temperature")
    assert finding.level == "amber"


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = patient_for(tmp_path)
    monkeypatch.setattr(needed, "free_memory", lambda device: 1 << 10)
    finding = the(needed.memory(patient), "memory")
    assert finding.level == "red"
    assert "training.micro_batch_size (now 8): the result is the same" in finding.remedy


def recipe_of_pipeline(folder: Path, **training: Any) -> Any:
    pytest.importorskip("diffusers")
    from test_run_text_to_image import recipe_for as pipeline_recipe

    from tiltflow.runs.recipe import Recipe

    tree = pipeline_recipe(folder, "stable-diffusion", training.pop("name", "adjoint-matching"))
    tree["model"] |= {"height": 32, "width": 32, **training.pop("model", {})}
    tree["method"] |= training.pop("method", {})
    tree["training"] |= training
    return validate(Recipe, tree, "recipe")


def test_less_is_decoded_at_once(tmp_path: Path) -> None:
    """With the same gradient."""
    norms = []
    for size in (4, 1):
        training = {"micro_batch_size": 4, "decode_batch_size": size, "method": {"num_inference_steps": 2}}
        loop = admit(recipe_of_pipeline(tmp_path, **training), "cpu").loop()
        norms.append(next(loop).metrics["gradient_norm"])
        loop.close()
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


REAL = """
import ctypes, gc, re, sys, torch
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_doctor import recipe_of_pipeline
from tiltflow.runs.doctor import admit
from tiltflow.runs.doctor.forecast import of_patient
torch.set_num_threads(1)

def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))

model, method = {"height": 96, "width": 96}, {"num_inference_steps": 4}
changes = {"model": model, "micro_batch_size": 8, "num_generations": 4, "method": method}
patient = admit(recipe_of_pipeline(Path(sys.argv[1]), **changes), "cpu")
found = of_patient(patient)
said, loop = found.most - found.phases[found.worst].parts["weights"], patient.loop()
next(loop)  # what is loaded and allocated once
loop.close()
loop = patient.loop()
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
next(loop)
print(said, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux says it")
def test_the_forecast_is_what_the_process_needs(tmp_path: Path) -> None:
    """Against what the system says: PeakMemory could miss what is not a tensor."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REAL, str(tmp_path), str(Path(__file__).parent)],
        check=True, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
    )  # fmt: skip
    said, measured = (int(value) for value in found.stdout.split()[-2:])
    assert said / 1.5 < measured < 1.5 * said


def test_what_lives_is_counted() -> None:
    """Not what was there before or is a view of it; what is computed once more on the way back too."""
    x, n = torch.randn(1000, requires_grad=True), 4000
    with memory.PeakMemory() as counted:
        y = x.detach().exp()
        y.view(10, 100)
        z = y * 2
        del y
        z + 1
    assert (counted.peak, counted.now) == (2 * n, n)

    def layer(x: Tensor) -> Tensor:
        return x.sin().sin().sin()

    peaks = []
    for recompute in (False, True):
        with memory.PeakMemory() as counted:
            kept = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            once = counted.now
            (gradient,) = torch.autograd.grad(kept.sum(), x)
        peaks.append((once // n, counted.peak // n))
        del kept, gradient
    assert peaks[0][0] == 3  # the two inputs that are kept, and the output
    assert peaks[1][0] == 1
    assert peaks[1][1] >= 4  # there they are again


def test_an_iteration_that_learns_nothing(tmp_path: Path) -> None:
    patient = patient_for(tmp_path)

    def loop() -> Any:
        from tiltflow.training.trainer import Record

        for step in (1, 2):
            yield Record(step, {"reward": 1.0, "loss": 0.0, "gradient_norm": 0.0}, 2.0 * step, 0)

    finding = the(iteration.iteration(replace(patient, loop=loop)), "iteration")
    assert finding.level == "red"
    assert "2.0 s for 1 step, 8.0 s for all 4," in finding.text


def test_a_warm_up_of_the_critic_is_no_fault(tmp_path: Path) -> None:
    """The policy stays in it, so its gradient is zero."""
    method = {"name": "score-as-action", "num_inference_steps": 4, "critic_warmup_steps": 3, "num_passes": 2}
    finding = the(iteration.iteration(patient_for(tmp_path, method=method)), "iteration")
    assert finding.level == "green", finding


def test_an_iteration_that_is_left_out(tmp_path: Path) -> None:
    """The loop skips it, and the doctor does not."""
    patient = patient_for(tmp_path, training=TRAINING | {"max_skipped_steps": 9})

    def loop() -> Any:
        from tiltflow.training.trainer import Record

        yield Record(1, {"skipped": 1.0}, 2.0, 0)
        yield Record(2, {"skipped": 1.0}, 4.0, 0)

    finding = the(iteration.iteration(replace(patient, loop=loop)), "iteration")
    assert finding.level == "red"
    assert "was not finite" in finding.text


def test_a_missing_part_ends_the_examination(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, reward={"name": "function", "path": "nowhere:reward"})
    findings = list(examine(recipe))
    assert [finding.check for finding in findings] == ["batch", "parts"]
    assert verdict(findings) == "red"
    assert "there is no module 'nowhere'" in findings[-1].text


def test_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from test_run_text_to_image import recipe_for as pipeline_recipe

    from tiltflow.runs.recipe import Recipe

    tree = pipeline_recipe(tmp_path, "stable-diffusion")
    tree["method"] |= {"num_inference_steps": 2}
    findings = list(examine(validate(Recipe, tree, "recipe")))
    assert the(findings, "batch").text == "4 samples in an iteration = 2 prompts x 2 generations, 2 at a time, 2 times"
    assert the(findings, "parity").level == "green"
    assert the(findings, "ratio").level == "green"
    assert the(findings, "iteration").level == "green", the(findings, "iteration")


def patient_of(family: str, folder: Path, **changes: Any) -> Patient:
    """A pipeline, for checks of its own."""
    pytest.importorskip("diffusers")
    from test_run_text_to_image import recipe_for as pipeline_recipe

    from tiltflow.runs.recipe import Recipe

    tree = pipeline_recipe(folder, family)
    for key, value in changes.items():
        tree[key] |= value
    return admit(validate(Recipe, tree, "recipe"), "cpu")


def test_parity_is_at_equal_guidance(tmp_path: Path) -> None:
    """FLUX.1-dev takes the scale as an input: at 3 on both sides the latents, so the pictures, are the same."""
    finding = the(sampler.parity(patient_of("flux", tmp_path)), "parity")
    assert finding.level == "green"
    assert float(finding.text.split()[-1]) < 1e-5


def test_parity_in_16_bits(tmp_path: Path) -> None:
    """The decoder stays in float32, which the pipeline itself could not use: what is compared is before it."""
    assert the(sampler.parity(patient_of("stable-diffusion", tmp_path, model={"dtype": "bfloat16"})), "parity").level == "green"


@pytest.mark.filterwarnings("ignore:scheduler DDIMScheduler")
def test_parity_of_a_scheduler_with_other_steps(tmp_path: Path) -> None:
    """Two and four steps divide a thousand, six do not; a solver with noise is none of the pipeline's anyway."""
    points = [{"num_inference_steps": 2}, {"num_inference_steps": 6}, {"solver": "memoryless", "num_inference_steps": 7}]
    changes = {"model": {"scheduler": {"timestep_spacing": "trailing"}}, "evaluation": {"points": points}}
    finding = the(sampler.parity(patient_of("stable-diffusion", tmp_path, **changes)), "parity")
    assert finding.level == "amber"
    assert "of the largest at 6" in finding.text
    assert not any(f"of the largest at {steps}" in finding.text for steps in (2, 3, 7))


def test_samples_are_weighed_within_their_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five of six pictures, three of one prompt and two of another: a reward that is a constant of the prompt has weights
    1/6 and 1/4, so 1 / (3 / 36 + 2 / 16) = 4.8 of 5 count, where one law for all would leave 3 or 2."""
    monkeypatch.setattr("tiltflow.runs.doctor.patient.MOST", 5)
    patient = patient_of("stable-diffusion", tmp_path, training={"num_generations": 3, "micro_batch_size": 6})
    monkeypatch.setattr(Patient, "rewards", lambda self, x: torch.tensor([0.0, 0.0, 0.0, 50.0, 50.0]))
    (finding,) = target.temperature(patient)
    assert finding.text.startswith("4.8 of 5 base samples")
