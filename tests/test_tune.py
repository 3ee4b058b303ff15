"""`tune` on a user's own networks: whatever mode they are in, and every setting is honoured or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_flow
from torch import Tensor, nn

import tiltflow
from tiltflow.api import evaluate as evaluate_folder
from tiltflow.errors import InputError, UserCodeError
from tiltflow.evaluation.monitor import read_looks
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.flow import Flow
from tiltflow.optimization import adamw
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import given
from tiltflow.runs.checkpoint import checkpoints
from tiltflow.runs.recipe import read_recipe
from tiltflow.runs.run_files import read_records
from tiltflow.settings import read_yaml
from tiltflow.streams import stream
from tiltflow.training.settings import NEED_A_FOLDER

METHODS: dict[str, tuple[Any, str]] = {
    "adjoint-matching": (tiltflow.AdjointMatching(num_inference_steps=4), "path_kl"),
    "score-as-action": (tiltflow.ScoreAsAction(num_inference_steps=4), "path_kl"),
    "orw-cfm-w2": (tiltflow.OrwCfmW2(num_inference_steps=4), "velocity_distance"),
}


class Net(nn.Module):
    """In train mode but for one part, which its owner has put in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(3, 16), nn.Linear(16, 2)
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.BatchNorm1d(16).eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.drop(self.frozen(self.norm(torch.tanh(self.enter(torch.cat([x, t[:, None]], 1)))))))


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in network.named_modules()}


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def reward(x: Tensor) -> Tensor:
    return -(x - 1).square().sum(1)


def test_eval_mode_puts_every_mode_back() -> None:
    network, other = Net(), nn.Dropout()
    before = modes(network)
    assert before["drop"]
    assert not before["frozen"]
    seen = []

    def fail() -> None:
        with eval_mode(network, lambda x: x, other, network):
            seen.extend([*modes(network).values(), other.training])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(seen)
    assert modes(network) == before
    assert other.training


def test_samples_of_a_network_in_train_mode() -> None:
    network = Net()
    model = tiltflow.Model(Flow(network), (2,))
    before, held, draws = modes(network), buffers(network), torch.random.get_rng_state()
    x = model.sample(4, seed=0)
    assert torch.equal(x, model.sample(4, seed=0))
    assert modes(network) == before
    assert all(torch.equal(buffer, held[name]) for name, buffer in network.named_buffers())
    assert torch.equal(draws, torch.random.get_rng_state())
    assert torch.equal(x, tiltflow.Model(Flow(network.eval()), (2,)).sample(4, seed=0))


@pytest.mark.parametrize("name", METHODS)
def test_tuning_a_network_in_train_mode(name: str) -> None:
    method, distance = METHODS[name]
    network = Net()
    base = tiltflow.Model(Flow(network), (2,))
    before, held, draws = modes(network), buffers(network), torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        rows: list[Any] = []
        tuned = tiltflow.tune(
            base, reward, method, tiltflow.Training(max_train_steps=2, train_batch_size=16), callbacks=[rows.append]
        )
        runs.append((tuned, [row.metrics for row in rows]))
        torch.rand(3)  # somebody else draws from torch's own generator
    assert runs[0][1][0][distance] == pytest.approx(0, abs=1e-10)  # before the first update
    assert runs[0][1] == runs[1][1]
    for a, b in zip(runs[0][0].flow.parameters(), runs[1][0].flow.parameters(), strict=True):
        assert torch.equal(a, b)
    for each in (network, tuned.flow.network):
        assert modes(each) == before  # type: ignore[arg-type]
    assert all(torch.equal(buffer, held[key]) for key, buffer in network.named_buffers())
    torch.random.set_rng_state(draws)


def test_an_error_puts_the_modes_back_too() -> None:
    network = Net()
    before = modes(network)

    def broken(x: Tensor) -> Tensor:
        raise KeyError

    with pytest.raises(UserCodeError, match="the reward raised KeyError"):
        tiltflow.tune(tiltflow.Model(Flow(network), (2,)), broken, METHODS["score-as-action"][0])
    assert modes(network) == before


def test_a_reward_in_train_mode_is_one_function() -> None:
    """A reward that is a module, with dropout: the run is that of the reward in eval mode, and its mode is its owner's."""

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x).sum(1)

    score, found = Score(), []
    for one in (score, Score().eval(), lambda x: x.sum(1)):
        rows: list[Any] = []
        training = tiltflow.Training(max_train_steps=1, train_batch_size=8)
        tiltflow.tune(tiltflow.Model(Flow(Net()), (2,)), one, METHODS["adjoint-matching"][0], training, callbacks=[rows.append])
        found.append(rows[0].metrics)
    assert found[0] == found[1] == found[2]
    assert score.drop.training


def test_a_module_is_one_function_with_and_without_prompts() -> None:
    """Wherever it is asked: in the evaluation, the monitor and the doctor too."""

    class OfImages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, images: Tensor) -> Tensor:
            return self.norm(images).sum(1)

    class OfBoth(OfImages):
        def forward(self, images: Tensor, prompts: Any) -> Tensor:
            return self.norm(images).sum(1) + len(prompts[0])

    x = torch.randn(3, 2, generator=stream(0, "x"))
    for kind, expected in ((OfImages, x.sum(1)), (OfBoth, x.sum(1) + 5)):
        module = kind()
        value = evaluate(given(from_function(module), ["a cat"] * 3), x)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)  # BatchNorm adds 1e-5 to the variance
        assert module.norm.training
        assert module.norm.num_batches_tracked == 0


# ---- every setting is honoured or refused ----

SHORT = tiltflow.AdjointMatching(num_inference_steps=4)
FAST = tiltflow.Optimizer(learning_rate=1e-2, lr_scheduler="constant", lr_warmup_steps=0)


@dataclass
class Tuned:
    """What came of `tune` with some settings."""

    model: Any
    rows: list[dict[str, float]]

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.flow.network.parameters()])


def tuned(reward: Any = reward, method: Any = SHORT, seed: int = 0, **settings: Any) -> Tuned:
    output = settings.pop("output", None)
    rows: list[Any] = []
    training = tiltflow.Training(**{"max_train_steps": 4, "train_batch_size": 8} | settings)
    base = tiltflow.Model(Flow(Net()), (2,), tiltflow.Sampling(num_inference_steps=4))
    options = {"output": output, "seed": seed, "callbacks": [rows.append]}
    model = tiltflow.tune(base, reward, method, training, optimizer=FAST, **options)
    return Tuned(model, [row.metrics for row in rows])


def differs(**settings: Any) -> None:
    assert not torch.equal(tuned(**settings).weights, tuned().weights)


def check_resume(folder: Path) -> None:
    whole = tuned(max_train_steps=6)
    tuned(output=folder / "run", checkpointing_steps=2)
    on = tuned(output=folder / "run", checkpointing_steps=2, max_train_steps=6, resume_from_checkpoint="latest")
    assert torch.equal(on.weights, whole.weights)
    assert on.rows == whole.rows[4:]
    assert [row["step"] for row in read_records(folder / "run")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match=r"the run was started with another recipe: seed 0 -> 1"):
        tuned(output=folder / "run", seed=1, resume_from_checkpoint="latest")


def check_checkpoints(folder: Path, limit: int | None, expected: list[str]) -> None:
    tuned(output=folder / f"{limit}", checkpointing_steps=1, checkpoints_total_limit=limit)
    assert [path.name for path in checkpoints(folder / f"{limit}" / "checkpoints")] == expected


def check_deterministic(folder: Path) -> None:
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return reward(x)

    for wanted in (False, True):
        seen.clear()
        tuned(watched, deterministic=wanted)
        assert set(seen) == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


def check_monitor(folder: Path) -> None:
    run = tuned(output=folder, monitor={"steps": 2, "num_samples": 16})
    assert [look["step"] for look in read_looks(folder)] == [0, 2, 4]
    assert torch.equal(run.weights, tuned().weights)
    assert (folder / "best" / "model.safetensors").exists()


def check_report(folder: Path) -> None:
    tuned(output=folder, report_to="tensorboard")
    assert list((folder / "logs").rglob("*tfevents*"))


def check_micro_batches(folder: Path) -> None:
    whole, parts = tuned(), tuned(micro_batch_size=3)
    torch.testing.assert_close(parts.weights, whole.weights)
    assert not torch.equal(parts.weights, whole.weights)  # sums in another order


def check_trainable(folder: Path) -> None:
    network, before = tuned(trainable="leave").model.flow.network, Net()
    assert torch.equal(network.enter.weight, before.enter.weight)
    assert not torch.equal(network.leave.weight, before.leave.weight)


def check_non_finite(folder: Path) -> None:
    def broken(x: Tensor) -> Tensor:  # for one of eight samples, of seven for none
        return torch.where((torch.arange(len(x)) == 1) & (len(x) == 8), torch.nan, -x.square().sum(1))

    with pytest.raises(tiltflow.NonFiniteError):
        tuned(broken)
    assert tuned(broken, non_finite_rewards="drop").rows[0]["dropped"] == 1


def check_skipped(folder: Path) -> None:
    calls = iter(range(1000))

    def once_broken(x: Tensor) -> Tensor:
        return -x.square().sum(1) * (torch.nan if next(calls) == 1 else 1.0)

    assert "skipped" in tuned(once_broken, max_skipped_steps=1).rows[1]


def check_calibration(folder: Path) -> None:
    beta = tiltflow.AdjointMatching(num_inference_steps=4, beta=50.0)
    assert "beta" in tuned(method=beta, calibration_samples=256).rows[0]
    assert "beta" not in tuned(method=beta).rows[0]


def check_budget(folder: Path) -> None:
    assert tuned(target_kl=0.05).rows[0]["beta"] == tiltflow.AdjointMatching().beta
    assert "beta" not in tuned().rows[0]
    for wrong, message in (
        (
            {"target_kl": 0.5, "calibration_samples": 256},
            r"target_kl and training\.calibration_samples both set the temperature",
        ),
        ({"target_kl": 0.5, "method": tiltflow.OrwCfmW2(alpha=0)}, r"orw-cfm-w2 with these settings works at no temperature"),
        ({"target_kl": 0.5, "method": tiltflow.ScoreAsAction(preset="ddpo")}, r"score-as-action with .* reaches no tilted law"),
    ):
        with pytest.raises(InputError, match=message):
            tuned(**wrong)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"target_kl must be (greater than 0|a finite number)"):
            tuned(target_kl=wrong)


def check_classes(folder: Path) -> None:  # what it does for a class-conditional model: see test_labels
    with pytest.raises(InputError, match=r"training\.classes: this model is not class-conditional"):
        tuned(classes=[0])


def check_refused(name: str, value: Any) -> Callable[[Path], None]:
    """A setting that means nothing for a model without prompts."""

    def check(folder: Path) -> None:
        with pytest.raises(InputError, match=rf"training\.{name} \(.*\): this model has no prompts; leave it out"):
            tuned(**{name: value})

    return check


def check_normalization(folder: Path) -> None:  # of classes: see test_every_kind
    with pytest.raises(InputError, match=r"training\.per_prompt_normalization: this model has neither prompts nor classes"):
        tuned(per_prompt_normalization=4)


def check_8bit_adam(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked: list[bool] = []
        patch.setattr("tiltflow.runs.prepare.eight_bit_adam", lambda: asked.append(True) or adamw)
        tuned(use_8bit_adam=True)
    assert asked


def check_compile(folder: Path) -> None:
    """See test_compiled."""
    graphs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiltflow.models.compiled.BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
        torch.testing.assert_close(tuned(compile="whole").weights, tuned().weights)
        assert graphs
        with pytest.raises(InputError, match=r"training\.compile: regional is of the denoisers of pipelines"):
            tuned(compile="regional")


def check_tf32(folder: Path) -> None:
    asked = []

    def tf32(allowed: bool, device: torch.device) -> Any:
        asked.append((allowed, device.type))
        return nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiltflow.runs.prepare.tf32", tf32)
        tuned(allow_tf32=True)
        assert asked == [(True, "cpu")]
    with pytest.raises(InputError, match="deterministic multiplies float32 in float32"):
        tuned(allow_tf32=True, deterministic=True)


def check_same_bits(**settings: Any) -> None:
    """Where tensors lie changes nothing else; that they lie there: see test_offload and test_trajectories."""
    assert torch.equal(tuned(**settings).weights, tuned().weights)


CHECKS: dict[str, Callable[[Path], None]] = {
    "compile": check_compile,
    "allow_tf32": check_tf32,
    "prompts_per_step": check_refused("prompts_per_step", 2),
    "num_generations": check_refused("num_generations", 2),
    "prompt_order": check_refused("prompt_order", "epochs"),
    "decode_batch_size": check_refused("decode_batch_size", 2),
    "guidance_mode": check_refused("guidance_mode", "rollout"),
    "offload": lambda folder: check_same_bits(offload=True),
    "trajectory_dtype": lambda folder: differs(trajectory_dtype="bfloat16"),
    "trajectory_device": lambda folder: check_same_bits(trajectory_device="cpu"),
    "per_prompt_normalization": check_normalization,
    "use_8bit_adam": check_8bit_adam,
    "max_train_steps": lambda folder: differs(max_train_steps=5),
    "train_batch_size": lambda folder: differs(train_batch_size=9),
    "micro_batch_size": check_micro_batches,
    "ema_decay": lambda folder: differs(ema_decay=0.5),
    "trainable": check_trainable,
    "calibration_samples": check_calibration,
    "target_kl": check_budget,
    "classes": check_classes,
    "mixed_precision": lambda folder: differs(mixed_precision="bf16"),
    "deterministic": check_deterministic,
    "non_finite_rewards": check_non_finite,
    "max_skipped_steps": check_skipped,
    "checkpointing_steps": lambda folder: check_checkpoints(folder, None, [f"step-0000000{i}" for i in (1, 2, 3, 4)]),
    "checkpoints_total_limit": lambda folder: check_checkpoints(folder, 3, [f"step-0000000{i}" for i in (2, 3, 4)]),
    "resume_from_checkpoint": check_resume,
    "report_to": check_report,
    "monitor": check_monitor,
}


def test_no_setting_is_forgotten() -> None:
    assert set(CHECKS) == set(tiltflow.Training.model_fields)


@pytest.mark.parametrize("name", tiltflow.Training.model_fields)
def test_every_setting_is_honoured(name: str, tmp_path: Path) -> None:
    """Each changes what `tune` does, as it says; with a folder where it needs one."""
    CHECKS[name](tmp_path / "run")


OTHER = {
    "checkpointing_steps": 1,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": "latest",
    "report_to": "tensorboard",
    "monitor": {"steps": 1},
}


@pytest.mark.parametrize("name", OTHER)
def test_what_needs_a_folder_is_refused_without_one(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"^training\.{name} \(.*\) needs a folder to write to: give tune\(\.\., output=\.\.\)$"
    ):
        tuned(**{name: OTHER[name]})
    assert set(OTHER) == set(NEED_A_FOLDER)


def test_the_folder_of_tune(tmp_path: Path) -> None:
    """The same run as without it; a network of the user's leaves its weights, one of tiltflow's a model that loads."""
    run = tuned(output=tmp_path / "mine")
    assert torch.equal(run.weights, tuned().weights)
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    written = {"recipe.yaml", "fingerprints.json", "metrics.jsonl", "checkpoints", "model", "summary.json", "report.html"}
    assert names == written | {"before.png", "after.png"}
    saved = load_file(tmp_path / "mine" / "model" / "model.safetensors")
    assert torch.equal(saved["enter.weight"], run.model.flow.network.enter.weight)
    with pytest.raises(InputError, match="already holds something"):
        tuned(output=tmp_path / "mine")
    with pytest.raises(InputError, match="began this run, in a program that has its model and reward"):
        read_recipe(read_yaml(tmp_path / "mine" / "recipe.yaml"), "recipe.yaml")
    with pytest.raises(InputError, match=r"recipe\.yaml: tiltflow\.tune began this run, in a program"):
        evaluate_folder(tmp_path / "mine")

    base = tiltflow.load(tiny_flow(tmp_path / "flow"))
    training = tiltflow.Training(max_train_steps=2, train_batch_size=4)
    model = tiltflow.tune(base, lambda x: x.mean((1, 2, 3)), SHORT, training, optimizer=FAST, output=tmp_path / "own")
    assert torch.equal(tiltflow.load(tmp_path / "own").sample(2), model.sample(2))


def test_a_run_of_another_base_is_not_gone_on_with(tmp_path: Path) -> None:
    """The program has the base: its weights are known by their content."""
    tuned(output=tmp_path / "run", checkpointing_steps=2)
    other, training = Net(), tiltflow.Training(max_train_steps=6, train_batch_size=8, resume_from_checkpoint="latest")
    other.leave.bias.data.add_(1)
    base = tiltflow.Model(Flow(other), (2,), tiltflow.Sampling(num_inference_steps=4))
    with pytest.raises(InputError, match="what model names has changed since the run was started"):
        tiltflow.tune(base, reward, SHORT, training, optimizer=FAST, output=tmp_path / "run")
    with tiltflow.accept_changes():
        tiltflow.tune(base, reward, SHORT, training, optimizer=FAST, output=tmp_path / "run")


def test_a_run_that_is_cut_off_leaves_what_was_tuned(tmp_path: Path) -> None:
    def stop(record: Any) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    base = tiltflow.Model(Flow(Net()), (2,))
    training = tiltflow.Training(max_train_steps=9, train_batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        tiltflow.tune(base, reward, SHORT, training, optimizer=FAST, output=tmp_path, callbacks=[stop])
    two = tuned(max_train_steps=2)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["leave.weight"], two.model.flow.network.leave.weight)


def test_steps_are_those_of_tune() -> None:
    base = tiltflow.Model(Flow(Net()), (2,), tiltflow.Sampling(num_inference_steps=4))
    training = tiltflow.Training(max_train_steps=4, train_batch_size=8)
    model, records = tiltflow.steps(base, reward, SHORT, training, optimizer=FAST)
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert torch.equal(Tuned(model, []).weights, tuned().weights)
    seen: list[bool] = []

    def watching(x: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return reward(x)

    wanted = training.model_copy(update={"deterministic": True, "max_train_steps": 1})
    list(tiltflow.steps(base, watching, SHORT, wanted, optimizer=FAST)[1])
    assert all(seen)
    assert seen
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(InputError, match="needs a folder to write to"):
        tiltflow.steps(base, reward, SHORT, training.model_copy(update={"checkpointing_steps": 1}))


@pytest.mark.parametrize("output", [None, "run"])
def test_a_callback_can_end_the_training(output: str | None, tmp_path: Path) -> None:
    """All callbacks see every record; the weights are those of so many steps, and a folder has a checkpoint of them."""
    seen: list[int] = []
    folder = None if output is None else tmp_path / output
    training = tiltflow.Training(max_train_steps=9, train_batch_size=8)
    base = tiltflow.Model(Flow(Net()), (2,), tiltflow.Sampling(num_inference_steps=4))
    callbacks = [lambda record: record.step == 3, lambda record: seen.append(record.step)]
    model = tiltflow.tune(base, reward, SHORT, training, optimizer=FAST, output=folder, callbacks=callbacks)
    assert seen == [1, 2, 3]
    assert torch.equal(Tuned(model, []).weights, tuned(max_train_steps=3).weights)
    if folder is not None:
        assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-00000003"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompts_per_step": 3},
            r"training.prompts_per_step \(3\): this model has no prompts; leave it out",
        ),
        ({"guidance_mode": "full"}, r"training.guidance_mode \('full'\): this model has no prompts; leave it out"),
    ],
)
def test_settings_of_the_other_kind_of_model(settings: dict[str, Any], message: str) -> None:
    base = tiltflow.Model(Flow(Net()), (2,))
    with pytest.raises(InputError, match=message):
        tiltflow.tune(base, reward, SHORT, tiltflow.Training(**settings))
    shared = tiltflow.Training(max_train_steps=1, ema_decay=0.5)
    with pytest.raises(InputError, match="conditions: this model has none; leave them out"):
        tiltflow.tune(base, reward, SHORT, shared, conditions=["a"])
    with pytest.raises(InputError, match=r"evaluation\.num_prompts \(3\): this model has no prompts"):
        tiltflow.tune(base, reward, SHORT, shared, evaluation=tiltflow.Evaluation(num_prompts=3), output="run")
