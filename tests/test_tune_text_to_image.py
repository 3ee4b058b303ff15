"""`tune` on a pipeline: the run of a recipe from Python, and every setting is honoured or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")
from test_run_text_to_image import recipe_for
from tiny_pipelines import tiny_pipeline

import tiltflow
from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import read_looks
from tiltflow.models.text_to_image import TextToImage, with_adapter
from tiltflow.optimization import adamw
from tiltflow.rewards.named_colour import NamedColour
from tiltflow.runs.checkpoint import checkpoints
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.runs.run_files import read_records
from tiltflow.settings import validate
from tiltflow.training.records import of_machine
from tiltflow.training.settings import NEED_A_FOLDER

PROMPTS = ["a red cat", "a blue dog", "a green hat"]
METHOD = tiltflow.AdjointMatching(num_inference_steps=3)
FAST = tiltflow.Optimizer(learning_rate=5e-2, lr_scheduler="constant", lr_warmup_steps=0)
SMALL = {"max_train_steps": 1, "prompts_per_step": 2, "num_generations": 2, "guidance_mode": "none"}
MEASURED = tiltflow.Evaluation.model_validate({"num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 2}]})


def pipeline(folder: Path) -> TextToImage:
    """A small one, the same each time, as nothing has been added to it yet."""
    model = tiny_pipeline("stable-diffusion", folder)
    return tiltflow.from_diffusers(model, height=16, width=16, guidance_scale=3.0)


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@dataclass
class Tuned:
    """What came of `tune` with some settings."""

    model: TextToImage
    rows: list[dict[str, float]]

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.denoiser.parameters() if p.requires_grad])


Run = Callable[..., Tuned]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tokenizer")

    def run(
        reward: Any = brightness, *, model: TextToImage | None = None, output: Path | None = None, **settings: Any
    ) -> Tuned:
        rows: list[Any] = []
        training = tiltflow.Training.model_validate(SMALL | settings)
        model = tiltflow.tune(
            model or pipeline(folder),
            reward,
            METHOD,
            training,
            optimizer=FAST,
            conditions=PROMPTS,
            evaluation=None if output is None else MEASURED,
            output=output,
            callbacks=[rows.append],
        )
        return Tuned(model, [row.metrics for row in rows])

    return run


@pytest.fixture(scope="module")
def plain(tuned: Run) -> Tensor:
    """The weights of a run with no setting but the small ones."""
    return tuned().weights


def test_tune_is_the_run_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: metrics, weights, and what it leaves in its folder."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    tree = recipe_for(tmp_path, "stable-diffusion", prompts={"texts": PROMPTS, "validation": 0})
    recipe = validate(Recipe, tree, "recipe")
    run(recipe, tmp_path / "recipe")
    model = tiltflow.from_diffusers(tmp_path / "stable-diffusion", height=16, width=16, guidance_scale=3.0)
    before = model.sample(PROMPTS[:1])
    tuned = tiltflow.tune(
        model,
        NamedColour().build(),
        recipe.method,
        recipe.training,
        optimizer=recipe.optimizer,
        conditions=PROMPTS,
        adapter=recipe.source.adapter,
        output=tmp_path / "tune",
    )
    ours, theirs = (load_file(tmp_path / name / "model" / "pytorch_lora_weights.safetensors") for name in ("tune", "recipe"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows, others = (
        [{key: value for key, value in row.items() if not of_machine(key)} for row in read_records(tmp_path / name)]
        for name in ("tune", "recipe")
    )
    assert rows == others
    assert isinstance(tuned, TextToImage)
    assert torch.equal(tuned.base().sample(PROMPTS[:1]), before)
    assert not torch.equal(tuned.sample(PROMPTS[:1]), before)
    loaded = tiltflow.load(tmp_path / "recipe")
    assert isinstance(loaded, TextToImage)
    assert torch.equal(tuned.sample(PROMPTS[:1], sampling=loaded.sampling), loaded.sample(PROMPTS[:1]))


def test_what_is_tuned(tmp_path: Path, tuned: Run) -> None:
    """A new LoRA; the one that the model has; or the whole denoiser, in a copy."""
    ranks = {p.shape[0] for name, p in tuned().model.denoiser.named_parameters() if "lora_A" in name}
    assert ranks == {16}
    own = with_adapter(pipeline(tmp_path), rank=2)
    again = tuned(model=own).model
    assert again.denoiser is own.denoiser
    assert {p.shape[0] for name, p in again.denoiser.named_parameters() if "lora_A" in name} == {2}
    model = pipeline(tmp_path)
    before = [p.clone() for p in model.denoiser.parameters()]
    training = tiltflow.Training.model_validate(SMALL)
    full = tiltflow.tune(
        model,
        brightness,
        METHOD,
        training,
        optimizer=FAST,
        conditions=PROMPTS,
        adapter=None,
        output=tmp_path / "full",
        evaluation=MEASURED,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.denoiser.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, full.denoiser.parameters(), strict=True))
    assert (tmp_path / "full" / "model" / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_rewards_are_told_prompts_and_metadata(tmp_path: Path) -> None:
    seen = []

    def of_both(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        seen.extend(zip(prompts, metadata, strict=True))
        return images.mean((1, 2, 3))

    prompts = [{"prompt": "a red cat", "colour": "red"}, "a dog"]
    training = tiltflow.Training.model_validate(SMALL)
    tiltflow.tune(pipeline(tmp_path), of_both, METHOD, training, optimizer=FAST, conditions=prompts)
    assert {(prompt, tuple(more.items())) for prompt, more in seen} == {("a red cat", (("colour", "red"),)), ("a dog", ())}


# ---- every setting is honoured or refused ----


def check_resume(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    whole = tuned(max_train_steps=2)
    tuned(output=folder, checkpointing_steps=1)
    on = tuned(output=folder, checkpointing_steps=1, max_train_steps=2, resume_from_checkpoint="latest")
    assert torch.equal(on.weights, whole.weights)
    assert on.rows == whole.rows[1:]


def check_deterministic(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(images: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return brightness(images)

    tuned(watched, deterministic=True)
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()


def check_checkpoints(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((None, ["step-00000001", "step-00000002"]), (1, ["step-00000002"])):
        tuned(output=folder / str(limit), checkpointing_steps=1, checkpoints_total_limit=limit, max_train_steps=2)
        assert [path.name for path in checkpoints(folder / str(limit) / "checkpoints")] == expected


def check_report(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    tuned(output=folder, report_to="tensorboard")
    assert list((folder / "logs").rglob("*tfevents*"))


def check_monitor(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Looks at the prompts that are tuned, there being no others."""
    tuned(output=folder, monitor={"steps": 1}, max_train_steps=2)
    looks = read_looks(folder)
    assert [row["step"] for row in looks] == [0, 1, 2]
    assert set(looks[0]["measures"]) == {"reward", "variety", "edge energy", "colour entropy"}


def check_non_finite(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    def broken(images: Tensor) -> Tensor:  # for one of four pictures, of three for none
        return torch.where((torch.arange(len(images)) == 1) & (len(images) == 4), torch.nan, brightness(images))

    with pytest.raises(tiltflow.NonFiniteError):
        tuned(broken)
    assert tuned(broken, non_finite_rewards="drop").rows[0]["dropped"] == 1


def check_skipped(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    batches: list[Tensor] = []

    def once_broken(images: Tensor) -> Tensor:  # the first batch of the run, after what is tried before
        batches.extend([images] * (len(images) == 4))
        return brightness(images) * (torch.nan if len(batches) == len(images) - 3 == 1 else 1.0)

    assert "skipped" in tuned(once_broken, max_skipped_steps=1, max_train_steps=2).rows[0]


def check_micro_batches(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    whole, parts = tuned(max_train_steps=1), tuned(max_train_steps=1, micro_batch_size=2)
    torch.testing.assert_close(parts.rows[0]["loss"], whole.rows[0]["loss"], rtol=1e-4, atol=0)
    assert parts.rows[0]["gradient_norm"] != whole.rows[0]["gradient_norm"]  # sums in another order


def check_decoding(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    decode, asked = TextToImage.decode, list[int]()

    def watched(self: TextToImage, latents: Tensor, *, batch_size: int = 4) -> Tensor:
        asked.append(batch_size)
        return decode(self, latents, batch_size=batch_size)

    patch.setattr(TextToImage, "decode", watched)
    tuned(max_train_steps=1, decode_batch_size=3)
    assert 3 in asked


def check_8bit_adam(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    asked = []

    def eight_bit_adam() -> Any:
        asked.append(True)
        return adamw

    patch.setattr("tiltflow.runs.prepare.eight_bit_adam", eight_bit_adam)
    tuned(use_8bit_adam=True)
    assert asked


DIFFERENT: dict[str, Any] = {
    "max_train_steps": 2,
    "prompts_per_step": 3,
    "num_generations": 3,
    "prompt_order": "epochs",
    "guidance_mode": "rollout",
    "per_prompt_normalization": 2,
    "ema_decay": 0.5,
    "mixed_precision": "bf16",
    "trajectory_dtype": "bfloat16",
}
"""Settings that change the weights."""


def check_batch_size(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    assert torch.equal(tuned(train_batch_size=4, max_train_steps=1).weights, tuned(max_train_steps=1).weights)
    with pytest.raises(InputError, match="there are 2 prompts x 2 generations = 4 pictures"):
        tuned(train_batch_size=6)


def check_trainable(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Of the whole denoiser; see `test_what_does_not_fit_is_one_line` for an adapter."""
    training = tiltflow.Training.model_validate(SMALL | {"trainable": "conv_in"})
    base = pipeline(folder.parent / "another")
    model = tiltflow.tune(base, brightness, METHOD, training, optimizer=FAST, conditions=PROMPTS[:2], adapter=None)
    before, after = (dict(one.denoiser.network.named_parameters()) for one in (base, model))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("conv_in" in name for name in changed)


def check_calibration(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Of one prompt, whose target law is one."""
    training = tiltflow.Training.model_validate(SMALL | {"calibration_samples": 128, "prompts_per_step": 1})
    method, rows = METHOD.model_copy(update={"beta": 50.0}), list[Any]()
    tiltflow.tune(
        pipeline(folder.parent / "one"), brightness, method, training, conditions=PROMPTS[:1], callbacks=[rows.append]
    )
    assert "beta" in rows[0].metrics


def check_budget(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """One temperature for all prompts."""
    training, rows = tiltflow.Training.model_validate(SMALL | {"target_kl": 0.05}), list[Any]()
    tiltflow.tune(pipeline(folder.parent / "one"), brightness, METHOD, training, conditions=PROMPTS, callbacks=[rows.append])
    assert rows[0].metrics["beta"] == METHOD.beta


def check_classes(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"training\.classes: this model has prompts"):
        tuned(classes=(0,))


def check_compile(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """See test_compiled."""
    graphs = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    patch.setattr("tiltflow.models.compiled.BACKEND", backend)
    torch.testing.assert_close(tuned(max_train_steps=1, compile="regional").weights, tuned(max_train_steps=1).weights)
    assert graphs


def check_tf32(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    asked = []

    def tf32(allowed: bool, device: torch.device) -> Any:
        asked.append((allowed, device.type))
        return nullcontext()

    patch.setattr("tiltflow.runs.prepare.tf32", tf32)
    tuned(max_train_steps=1, allow_tf32=True)
    assert asked == [(True, "cpu")]


def check_same_bits(tuned: Run, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Where tensors lie changes nothing else; that they lie there: see test_offload and test_trajectories."""
    settings = {"offload": True, "trajectory_device": "cpu"}
    assert torch.equal(tuned(max_train_steps=1, **settings).weights, tuned(max_train_steps=1).weights)


CHECKS: dict[str, Callable[[Run, Path, pytest.MonkeyPatch], None]] = {
    "compile": check_compile,
    "allow_tf32": check_tf32,
    "train_batch_size": check_batch_size,
    "trainable": check_trainable,
    "calibration_samples": check_calibration,
    "target_kl": check_budget,
    "classes": check_classes,
    "micro_batch_size": check_micro_batches,
    "decode_batch_size": check_decoding,
    "use_8bit_adam": check_8bit_adam,
    "deterministic": check_deterministic,
    "non_finite_rewards": check_non_finite,
    "max_skipped_steps": check_skipped,
    "checkpointing_steps": check_checkpoints,
    "checkpoints_total_limit": check_checkpoints,
    "resume_from_checkpoint": check_resume,
    "report_to": check_report,
    "monitor": check_monitor,
    "offload": check_same_bits,
    "trajectory_device": check_same_bits,
}


def test_no_setting_is_forgotten() -> None:
    assert {*DIFFERENT, *CHECKS} == set(tiltflow.Training.model_fields)


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_setting_that_changes_the_weights(name: str, tuned: Run, plain: Tensor) -> None:
    assert not torch.equal(tuned(**{name: DIFFERENT[name]}).weights, plain)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "compile" else ())  # see test_compiled
        for name in CHECKS
        if name not in ("checkpoints_total_limit", "trajectory_device")
    ],
)
def test_every_setting_is_honoured(name: str, tuned: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CHECKS[name](tuned, tmp_path / "run", monkeypatch)


@pytest.mark.parametrize(
    "settings", [{"checkpointing_steps": 1}, {"resume_from_checkpoint": "latest"}, {"monitor": {"steps": 1}}]
)
def test_what_needs_a_folder_is_refused_before_the_pipeline_is_touched(settings: dict[str, Any], tmp_path: Path) -> None:
    (name,) = settings
    assert name in NEED_A_FOLDER
    model = pipeline(tmp_path)
    training = tiltflow.Training.model_validate(SMALL | settings)
    with pytest.raises(InputError, match=rf"training\.{name} \(.*\) needs a folder to write to"):
        tiltflow.tune(model, brightness, METHOD, training, optimizer=FAST, conditions=PROMPTS)
    assert not hasattr(model.denoiser.network, "peft_config")


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    model = pipeline(tmp_path)
    for options, message in (
        ({}, "a pipeline needs conditions"),
        ({"conditions": [" "]}, "all prompts are blank"),
        ({"conditions": [{"text": "a cat"}]}, "row 1: has no 'prompt'"),
        (
            {"conditions": PROMPTS, "training": tiltflow.Training(calibration_samples=8)},
            "there is one working temperature, and each prompt would need its own",
        ),
        (
            {"conditions": PROMPTS, "training": tiltflow.Training(train_batch_size=8)},
            "training.train_batch_size 8: there are 4 prompts x 4 generations = 16 pictures; leave it out",
        ),
        ({"conditions": PROMPTS, "training": tiltflow.Training(classes=(0,))}, "training.classes: this model has prompts"),
        (
            {"conditions": PROMPTS, "training": tiltflow.Training(trainable="attn")},  # type: ignore[arg-type]
            "with an adapter only the adapter is trained",
        ),
    ):
        with pytest.raises(InputError, match=message):
            tiltflow.tune(model, brightness, METHOD, **options)  # type: ignore[call-overload]
    assert not hasattr(model.denoiser.network, "peft_config")
