"""What only a GPU can show, in a quarter of an hour: does all of it run there, how fast, and in how much memory.

Each check is a process of its own with a time limit, so that one that fails, or hangs, loses nothing of the others; what each
finds is in results.json of the folder as soon as it ends. On one H100 with 16 CPU cores the rows of `speed` took 40 to 73 s
each, one after another, and the other checks 35 to more than 140 s, four at a time: `--budget` is for all of them, and what
does not matter can be left out by `--only`. In this order:

speed       Adjoint Matching on the U-Net of Stable Diffusion 1.5 at the authors' setting, row by row of benchmarks/pipelines.py
memory      peaks of each phase of an iteration of Stable Diffusion 1.5 and SDXL, random weights, in several settings, and what
            the device has lost beside tensors
digits      `digits-even-pixels` in small: train, resume bit for bit, evaluate, sample, doctor
tiles       the same of `tiles-colour`, a pipeline
settings    settings of memory and of speed, one at a time, on a small pipeline: the weights beside those without the setting
attention   implementations of attention in bfloat16 beside float32: velocities of a small FLUX, and their gradients
methods     two updates by each method, of a small network and of a small pipeline
quantized   frozen weights in nf4, int8 and float8: three updates of a LoRA, samples, and how far predictions move
parity      velocities and their gradients beside those of a CPU

    python benchmarks/on_a_gpu.py --output runs/gpu
    python benchmarks/on_a_gpu.py --output runs/small --device cpu --small     # finds mistakes of this file without a GPU
    python benchmarks/on_a_gpu.py --output runs/gpu --forecast                 # afterwards, anywhere: the doctor beside it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "tests")]

Found = Iterator[dict[str, Any]]
GIGABYTE = 2**30


# ---- speed ----


def speed(row: str, options: argparse.Namespace, folder: Path) -> Found:
    """A row of benchmarks/pipelines.py."""
    import pipelines

    sizes = {"network": "small", "steps": 6, "batch": 2, "latents": 8}
    full = {"network": "sd15", "steps": 50, "batch": 5, "latents": 64}
    settings = argparse.Namespace(**(sizes if options.small else full), device=options.device)
    settings.repeats = 1 if row == "LoRA, bfloat16" else 0
    found = pipelines.measure(settings, pipelines.ROWS[row])
    passes = pipelines.ROWS[row].get("passes", 1)
    yield {
        "what": row,
        **found,
        **(of_device() if options.device == "cuda" else {}),
        "steps_per_second": 1 / found["seconds"],
        "pictures_per_second": settings.batch / (passes * found["seconds"]),
    }


# ---- memory ----


def of_device() -> dict[str, Any]:
    """Bytes that torch has reserved at its peak, and that the device has given to this process beside it."""
    import torch

    found: dict[str, Any] = {"peak_reserved": torch.cuda.max_memory_reserved(), "reserved": torch.cuda.memory_reserved()}
    words = ["nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        lines = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        used = {int(pid): float(size) * 2**20 for pid, _, size in (line.partition(",") for line in lines)}
        if os.getpid() in used:
            found["beside_torch"] = used[os.getpid()] - found["reserved"]
    return found


SD15, SDXL, SD35 = "stable-diffusion-v1-5", "stable-diffusion-xl", "stable-diffusion-3.5-medium"
MEMORY: dict[str, dict[str, Any]] = {
    "LoRA, bfloat16": {"model": {"dtype": "bfloat16"}},
    "LoRA, float32": {},
    "LoRA, bfloat16, decoded one by one": {"model": {"dtype": "bfloat16"}, "training": {"decode_batch_size": 1}},
    "LoRA, bfloat16, checkpointing": {
        "model": {"dtype": {"default": "bfloat16", "vae": "bfloat16"}, "gradient_checkpointing": True},
        "training": {"micro_batch_size": 1},
    },
    "LoRA, bfloat16, offload": {"model": {"dtype": "bfloat16"}, "training": {"offload": True, "decode_batch_size": 1}},
    "full, float32": {"model": {"adapter": None}, "training": {"decode_batch_size": 1}},
    "full, autocast, average": {
        "model": {"adapter": None},
        "training": {"mixed_precision": "bf16", "ema_decay": 0.9, "decode_batch_size": 1},
    },
    "LoRA, bfloat16, trajectories on the CPU, 20 steps": {
        "model": {"dtype": "bfloat16"},
        "method": {"num_inference_steps": 20},
        "training": {"trajectory_device": "cpu", "decode_batch_size": 1},
    },
    "score-as-action": {"model": {"dtype": "bfloat16"}, "method": {"name": "score-as-action", "preset": "ddpo"}},
    "SD3.5 medium, LoRA, bfloat16, 512 pixels": {
        "pipeline": SD35,
        "model": {"dtype": {"default": "bfloat16", "vae": "bfloat16"}, "components": {"text_encoder_3": None}},
        "training": {"micro_batch_size": 2},
    },
    "SDXL, LoRA, bfloat16, 512 pixels": {
        "pipeline": SDXL,
        "model": {"dtype": {"default": "bfloat16", "vae": "bfloat16"}},
        "training": {"micro_batch_size": 1},
    },
}
"""Settings whose peaks are measured: four pictures of 512 pixels toward a colour, four steps, of which one is in the loss."""


EVALUATED = ("LoRA, bfloat16", "SDXL, LoRA, bfloat16, 512 pixels")
"""Those of which the evaluation is measured too."""


def recipe_of(name: str, small: bool, folder: Path) -> Any:
    """The recipe of such a setting; `small` is of a pipeline that is random and tiny, of 64 pixels."""
    from tiltflow.runs.doctor.architecture import facts
    from tiltflow.runs.recipe import Recipe
    from tiltflow.settings import validate

    changes = MEMORY[name]
    pipeline, side = changes.get("pipeline", SD15), 64 if small else 512
    kind = {SD15: "stable-diffusion", SDXL: "stable-diffusion-xl", SD35: "stable-diffusion-3"}[pipeline]
    source = str(tiny(kind, folder)) if small else facts()[pipeline]["names"][0]
    sizes = {
        "max_train_steps": 8,
        "prompts_per_step": 2,
        "num_generations": 2,
        "micro_batch_size": 4,
        "guidance_mode": "rollout",
    }
    method = {"name": "adjoint-matching", "num_inference_steps": 4, **changes.get("method", {})}
    if method["name"] == "adjoint-matching":
        method |= {"train_timesteps": [{"count": 1}]}
    tree = {
        "model": {
            "diffusers": source, "height": side, "width": side, "guidance_scale": 3.0, "adapter": {"rank": 16},
            "text_encoders": "keep", **changes.get("model", {}),
        },
        "prompts": {"texts": ["a red cat", "a blue dog", "a green hat"], "validation": 0.34},
        "reward": "named-colour",
        "method": method,
        "training": {**sizes, **changes.get("training", {})},
        "evaluation": {"num_prompts": 1, "num_generations": 2, "batch_size": 1, "points": [{"num_inference_steps": 2}]},
    }  # fmt: skip
    return validate(Recipe, tree, name)


def random_pipeline(source: Any, device: str) -> Any:
    """The model of a pipeline with random weights, of its configs alone."""
    import torch

    from tiltflow.runs.doctor import architecture

    def network(make: Callable[[], Any], dtype: torch.dtype) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                made = make()
        finally:
            torch.set_default_dtype(before)
        return made.to(device, dtype).requires_grad_(False).eval()

    with mock.patch.object(architecture, "network_of_shapes", network):
        model = architecture.model_from_configs(source)
    del model.pipeline.to  # which does nothing, as a forecast has nothing to move
    return model


def patient_of(recipe: Any, model: Any) -> tuple[Any, Any]:
    """The recipe with its parts and this model, and the run that it would be."""
    from tiltflow.runs.doctor import patient_of
    from tiltflow.runs.prepare import build_reward
    from tiltflow.runs.run import make_ready

    items, held_out = recipe.asked_for.items((), recipe.seed)
    reward = build_reward(recipe.reward, recipe.method, str(model.device), decoded=True)
    trainable = partial(model.trainable, recipe.source.adapter, recipe.training.trainable, seed=recipe.seed)
    made = make_ready(recipe, model, trainable, reward, items, held_out, rehearsed=False)
    return patient_of(recipe, made, items, recipe.reward.unit), made


def peaks_of(patient: Any) -> dict[str, int]:
    """Bytes of tensors at the peak of each phase of the second iteration, whose optimizer has moments."""
    import torch

    from tiltflow.timing import Clock
    from tiltflow.training.memory import PeakMemory

    loop, found = patient.loop(), dict[str, int]()
    passes = patient.method.needs.passes
    if patient.device.type != "cuda":
        with PeakMemory() as memory:
            for _ in range(2):
                memory.by_phase.clear()
                for _ in range(passes):
                    next(loop)
            loop.close()
        return memory.by_phase
    charge = Clock._charge

    def charged(clock: Clock) -> None:
        charge(clock)  # waits for the device
        name = clock.open[-1] if clock.open else ""
        found[name] = max(found.get(name, 0), torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    with mock.patch.object(Clock, "_charge", charged):
        for _ in range(2):
            found.clear()
            for _ in range(passes):
                next(loop)
        loop.close()
    return found


def peak_of_evaluation(recipe: Any, made: Any, folder: Path) -> int:
    """Bytes of tensors at the peak of an evaluation."""
    import torch

    from tiltflow.runs.evaluate import evaluate
    from tiltflow.training.memory import PeakMemory

    folder.mkdir()
    record = {"step": 2, "seconds": 1.0, "network_evaluations": 1, "samples_drawn": 1, "reward": 0.0, "loss": 0.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    on_gpu = made.parts.tuned.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with nullcontext() if on_gpu else PeakMemory() as counted:
        evaluate(recipe, folder, *made.in_precision(recipe), made.asked, made.instruments, seconds=1.0)
    peak: int = torch.cuda.max_memory_allocated() if counted is None else counted.peak
    return peak


def memory_of(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peaks of a setting, and what the device has lost."""
    import gc

    import torch

    recipe = recipe_of(name, options.small, folder)
    began = time.perf_counter()
    patient, made = patient_of(recipe, random_pipeline(recipe.source, options.device))
    ready = time.perf_counter() - began
    found: dict[str, Any] = {"phases": peaks_of(patient), "seconds_to_load": ready}
    if name in EVALUATED:
        try:
            found["phases"]["evaluation"] = peak_of_evaluation(recipe, made, folder / f"evaluation {name}")
        except Exception as error:  # the phases of the iteration are known
            traceback.print_exc()
            found["evaluation_failed"] = str(error)[:300]
    if patient.device.type == "cuda":
        found |= of_device()
    found |= {"peak": max(found["phases"].values()), "seconds": time.perf_counter() - began - ready}
    del patient, made
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found["left"] = torch.cuda.memory_allocated()
    return found


def memory(options: argparse.Namespace, folder: Path) -> Found:
    yield from each(MEMORY, lambda name: memory_of(name, options, folder))


def forecast(options: argparse.Namespace) -> None:
    """Print what the doctor forecasts, from configs, beside what was measured."""
    from tiltflow.runs.doctor.forecast import Known, of_recipe

    results = json.loads((options.output / "results.json").read_text())
    known: Known = {}
    print(f"{'':50}{'phase':>9}{'measured':>10}{'forecast':>10}{'error':>8}")
    for row in results["checks"].get("memory", {}).get("found", []):
        if "phases" not in row:
            continue
        recipe = recipe_of(row["what"], options.small, options.output / "work")
        peaks = of_recipe(recipe, known=known).phases
        without = results["about"]["asked"] == "cpu"  # there tensors that are made are counted, and weights were made before
        said = {name: peak.total - without * peak.parts["weights"] for name, peak in peaks.items()}
        row["forecast"] = said
        of_iteration = {name: said[name] for name in said if name in row["phases"]}
        lines = {name: (row["phases"][name], of_iteration[name]) for name in of_iteration}
        lines["peak"] = row["peak"], max(of_iteration.values())
        for name, (measured, expected) in lines.items():
            numbers = f"{measured / GIGABYTE:10.3f}{expected / GIGABYTE:10.3f}{100 * (expected / measured - 1):+7.1f}%"
            print(f"{row['what']:50}{name:>9}{numbers}", flush=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1))


# ---- whole runs ----


class Killed(BaseException):
    """Stands for the end of a process."""


def run_both_ways(recipe: str, overrides: list[str], kill_at: int, options: argparse.Namespace, folder: Path) -> Found:
    """Train a shipped recipe, and again killed and resumed; evaluate, sample, and ask the doctor."""
    from safetensors.torch import load_file
    from torch import equal

    from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree
    from tiltflow.runs.run import run
    from tiltflow.runs.run_files import read_records
    from tiltflow.training.records import of_machine

    prompt = ["--prompt", "potion on a red background"] if recipe == "tiles-colour" else []
    sets = [part for each in overrides for part in ("--set", each)]
    deterministic = ["--set", "training.deterministic=true"]

    def weights(name: str) -> Mapping[str, Any]:
        (path,) = sorted((folder / name / "model").glob("*.safetensors"))
        return load_file(path)

    def rows(name: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if not of_machine(key)} for row in read_records(folder / name)]

    def trained(name: str, *more: str) -> dict[str, Any]:
        began = time.perf_counter()
        command("train", recipe, "--output", str(folder / name), "--device", options.device, *sets, *more)
        records = read_records(folder / name)
        last = {key: value for key, value in records[-1].items() if of_machine(key)}
        return {"wall": time.perf_counter() - began, "steps": len(records), "last_record": last, "summary": summary(name)}

    def summary(name: str) -> dict[str, Any]:
        kept = ("reward_base", "reward_tuned", "seconds_by_phase", "peak_memory_bytes", "steps_per_second", "seconds")
        found = json.loads((folder / name / "summary.json").read_text())
        return {key: found[key] for key in kept if key in found}

    def resumed() -> dict[str, Any]:
        settings: Any = read_recipe(
            read_recipe_tree(find_recipe(recipe, "train"), [*overrides, "training.deterministic=true"]), recipe
        )

        def watch(record: Any) -> None:
            if record.step >= kill_at:
                raise Killed

        with suppress(Killed):
            run(settings, folder / "resumed", device=options.device, callbacks=[watch])
        command(
            "train", recipe, "--output", str(folder / "resumed"), "--device", options.device, *sets, *deterministic, "--resume"
        )
        one, other = weights("whole"), weights("resumed")
        same = {"weights": all(equal(one[name], other[name]) for name in one), "metrics": rows("whole") == rows("resumed")}
        return {"ok": all(same.values()), "same_bits": same}

    def repeated() -> dict[str, Any]:
        """Without deterministic kernels, twice."""
        found = trained("plain"), trained("plain again")
        one, other = weights("plain"), weights("plain again")
        return {"first": found[0], "same_bits": all(equal(one[name], other[name]) for name in one)}

    def doctor() -> dict[str, Any]:
        said = command("doctor", recipe, "--device", options.device, *sets, "--json", fails=True)
        findings = json.loads(said.splitlines()[-1])["findings"]
        levels = {one["check"]: one["level"] for one in findings}
        return {"ok": "red" not in levels.values(), "levels": levels, "texts": {one["check"]: one["text"] for one in findings}}

    def timed(*words: str) -> dict[str, Any]:
        began = time.perf_counter()
        command(*words, "--device", options.device)
        return {"wall": time.perf_counter() - began}

    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "train, deterministic": lambda: trained("whole", *deterministic),
        "resume, bit for bit": resumed,
        "evaluate": lambda: timed("evaluate", str(folder / "whole")),
        "sample": lambda: timed("sample", str(folder / "whole"), "-o", str(folder / "samples.png"), "-n", "2", *prompt),
        "train twice": repeated,
        "doctor": doctor,
    }
    yield from each(steps, lambda name: steps[name]())


def command(*words: str, fails: bool = False) -> str:
    """Run a command of tiltflow, and return what it printed."""
    from typer.testing import CliRunner

    from tiltflow.commands.terminal.app import app

    found = CliRunner().invoke(app, list(words))
    if found.exit_code and not fails:
        if found.exception and not isinstance(found.exception, SystemExit):
            raise found.exception
        raise RuntimeError(f"tiltflow {' '.join(words)}: exit {found.exit_code}: {' '.join(found.output.split())[-300:]}")
    return found.stdout


def digits(options: argparse.Namespace, folder: Path) -> Found:
    sizes = ["train_batch_size=16", "calibration_samples=0"] if options.small else ["train_batch_size=128"]
    training = [f"training.{each}" for each in ("max_train_steps=6", "checkpointing_steps=3", *sizes)]
    samples = 32 if options.small else 512
    evaluation = [f"evaluation.num_samples={samples}", "evaluation.grid=16"]
    yield from run_both_ways("digits-even-pixels", [*training, *evaluation], 5, options, folder)


def tiles(options: argparse.Namespace, folder: Path) -> Found:
    sizes = ["prompts_per_step=2", "num_generations=2"] if options.small else ["prompts_per_step=8"]
    training = [f"training.{each}" for each in ("max_train_steps=4", "checkpointing_steps=2", *sizes)]
    evaluation = [
        "evaluation.num_prompts=2",
        "evaluation.num_generations=4",
        *(["method.num_inference_steps=6"] * options.small),
    ]
    yield from run_both_ways("tiles-colour", [*training, *evaluation], 3, options, folder)


# ---- settings, one at a time ----


def tiny(kind: str, folder: Path) -> Path:
    """The folder of a small random pipeline of a family."""
    from tiny_pipelines import tiny_pipeline

    place = folder / kind
    if not place.exists():
        tiny_pipeline(kind, folder).save_pretrained(place)
    return place


def small_run(place: Path, to: Path, device: str, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Three updates on a pipeline in a folder, and its evaluation. Returns weights, seconds and the peak."""
    from safetensors.torch import load_file

    from tiltflow.runs.recipe import Recipe
    from tiltflow.runs.run import run
    from tiltflow.runs.run_files import read_records
    from tiltflow.settings import validate

    sizes = {"max_train_steps": 3, "prompts_per_step": 2, "num_generations": 2, "micro_batch_size": 2, "guidance_mode": "none"}
    tree = {
        "model": {"diffusers": str(place), "height": 16, "width": 16, "adapter": {"rank": 4}, **changes.get("model", {})},
        "prompts": {"texts": ["a red cat", "a blue dog", "a green hat"], "validation": 0.34},
        "reward": "named-colour",
        "method": {"name": "adjoint-matching", "num_inference_steps": 4, **changes.get("method", {})},
        "optimizer": {"learning_rate": 1e-3},
        "training": {**sizes, **changes.get("training", {})},
        "evaluation": {"num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 2}]},
    }
    began = time.perf_counter()
    summary = run(validate(Recipe, tree, "recipe"), to, device=device)
    records = read_records(to)
    weights: dict[str, Any] = {}
    for path in (to / "model").rglob("*.safetensors"):
        weights |= load_file(path)
    numbers = {"seconds": time.perf_counter() - began, "peak_memory_bytes": records[-1].get("peak_memory_bytes")}
    assert len(records) == 3
    return {"weights": weights, **numbers, "reward_tuned": summary["reward_tuned"]}


DETERMINISTIC = {"deterministic": True}
SETTINGS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "plain": ("", {"training": DETERMINISTIC}),
    "offload": ("plain", {"training": DETERMINISTIC | {"offload": True}}),
    "trajectory_device: cpu": ("plain", {"training": DETERMINISTIC | {"trajectory_device": "cpu"}}),
    "text_encoders: keep": ("plain", {"training": DETERMINISTIC, "model": {"text_encoders": "keep"}}),
    "text_encoders: cpu": ("plain", {"training": DETERMINISTIC, "model": {"text_encoders": "cpu"}}),
    "decode_batch_size: 1": ("plain", {"training": DETERMINISTIC | {"decode_batch_size": 1}}),
    "gradient_checkpointing": ("plain", {"training": DETERMINISTIC, "model": {"gradient_checkpointing": True}}),
    "whole": ("", {"training": DETERMINISTIC, "model": {"adapter": None}}),
    "whole, offload": ("whole", {"training": DETERMINISTIC | {"offload": True}, "model": {"adapter": None}}),
    "trajectory_dtype: bfloat16": ("plain", {"training": {"trajectory_dtype": "bfloat16"}}),
    "not deterministic": ("plain", {}),
    "allow_tf32": ("plain", {"training": {"allow_tf32": True}}),
    "mixed_precision: bf16": ("plain", {"training": {"mixed_precision": "bf16"}}),
    "dtype: bfloat16": ("plain", {"model": {"dtype": "bfloat16"}}),
    "use_8bit_adam": ("plain", {"training": {"use_8bit_adam": True}}),
}
"""Each beside which other one, and its changes."""


def settings(options: argparse.Namespace, folder: Path) -> Found:
    place = tiny("stable-diffusion", folder)
    weights: dict[str, Mapping[str, Any]] = {}

    def beside(name: str) -> dict[str, Any]:
        other, changes = SETTINGS[name]
        found = small_run(place, folder / name.replace(": ", "-").replace(", ", "-"), options.device, changes)
        weights[name] = found.pop("weights")
        return found | (difference(weights[name], weights[other]) if other else {})

    yield from each(SETTINGS, beside)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How far weights are apart, as a share of their norm."""
    from torch import cat, equal

    a, b = (cat([each[name].float().flatten() for name in sorted(other)]) for each in (one, other))
    return {"same_bits": all(equal(one[name], other[name]) for name in other), "moved": relative(a, b)}


def relative(found: Any, expected: Any) -> float:
    """The norm of a difference, over that of what is expected."""
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


FEW = {"min_effective_sample_size": 1, "num_passes": 2}
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "adjoint-matching, calibrated": {"method": {"beta": 5.0}, "training": {"calibration_samples": 256}},
    "adjoint-matching, normalised": {"training": {"per_prompt_normalization": 4}},
    "adjoint-matching, monitor": {"training": {"monitor": {"steps": 1, "num_samples": 8}}},
    "adjoint-matching, late": {
        "method": {"control_from": 0.4, "num_passes": 2, "reweight_passes": True, "control_variate": True}
    },
    "adjoint-matching, pool": {"method": {"bootstrap": 0.5, "pool": {"tail": 3}}},
    "endpoint-adjoint-matching": {"method": {"num_passes": 2}},
    "score-as-action": {"method": {"critic": {"num_steps": 2, "train_batch_size": 2}, "num_passes": 2}},
    "score-as-action, ddpo": {"method": {"preset": "ddpo", "num_passes": 2}},
    "orw-cfm-w2": {"method": {"alpha": 0.3, **FEW}},
    "orw-cfm-w2, offline": {"method": {"online_fraction": 0.5, **FEW}},
    "tilt-matching": {"method": {"replay": 2, **FEW}},
    "tilt-matching, implicit": {
        "method": {"preset": "implicit", "batches_per_round": 2, "num_passes": 1, "min_effective_sample_size": 1}
    },
    "path-reweighted": {"method": {"path_steps": 3, "num_passes": 1, "min_effective_sample_size": 1, "num_inference_steps": 3}},
}
OF_PIPELINES = ("normalised", "ddpo", "orw-cfm-w2", "tilt-matching", "path-reweighted", "monitor")


def methods(options: argparse.Namespace, folder: Path) -> Found:
    from tiny import tiny_recipe

    from tiltflow.runs.recipe import Recipe
    from tiltflow.runs.run import run
    from tiltflow.runs.run_files import read_records
    from tiltflow.settings import read_yaml, validate

    def of_network(name: str) -> dict[str, Any]:
        changes = METHODS[name]
        place = folder / f"network {name}"
        place.mkdir()
        method = {"num_inference_steps": 4, **changes.get("method", {}), "name": name.partition(",")[0]}
        training = {"max_train_steps": 4, "train_batch_size": 8, "ema_decay": 0.5, **changes.get("training", {})}
        evaluation = {"num_samples": 8, "grid": 4, "batch_size": 8}
        tree = read_yaml(tiny_recipe(place, method=method, training=training, evaluation=evaluation))
        run(validate(Recipe, tree, name), place / "run", device=options.device)
        return {"steps": len(read_records(place / "run"))}

    def of_pipeline(name: str) -> dict[str, Any]:
        changes = METHODS[name]
        method = {"num_inference_steps": 3, **changes.get("method", {}), "name": name.partition(",")[0]}
        settings = {"method": method, "training": changes.get("training", {})}
        found = small_run(tiny("stable-diffusion-3", folder), folder / f"pipeline {name}", options.device, settings)
        return {"ok": all(bool(tensor.isfinite().all()) for tensor in found.pop("weights").values()), **found}

    several = [name for name in METHODS if any(part in name for part in OF_PIPELINES) and "offline" not in name]
    yield from each([name for name in METHODS if "normalised" not in name], of_network, "network ")
    yield from each(several, of_pipeline, "pipeline ")


TRAINING = "native, as in training"
BACKENDS = (TRAINING, "_native_math", "_native_efficient", "_native_flash", "native", "_native_cudnn")


def attention(options: argparse.Namespace, folder: Path) -> Found:
    """Of FLUX, in bfloat16: velocities and their gradients beside those in float32, four times, as some kernels' vary."""
    import torch

    from tiltflow.flows.linearize import linearize
    from tiltflow.flows.precision import without_cudnn_attention
    from tiltflow.models.sources.diffusers import Diffusers

    place, device = tiny("flux", folder), torch.device(options.device)

    def linearized(name: str, dtype: str) -> Callable[[], tuple[Any, Any]]:
        backend: Any = {"dtype": dtype, "attention_backend": name}
        model = Diffusers(diffusers=str(place), height=64, width=64, **backend).load(options.device)
        condition, _ = model.encode(["a red cat", "a blue dog"])
        x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0)).to(device)

        def call() -> tuple[Any, Any]:
            v, pullback = linearize(model.flow.bind(condition), x, torch.tensor(0.4))
            return v, pullback(x)

        return call

    exact = linearized("_native_math", "float32")()

    def of(name: str) -> dict[str, Any]:
        call = linearized(name.partition(",")[0], "bfloat16")
        with without_cudnn_attention(device) if name == TRAINING else nullcontext():
            found = [call() for _ in range(4)]
        moved = [max(relative(each[i], exact[i]) for each in found) for i in range(2)]
        bad = [sum(int((~each[i].isfinite()).sum()) for each in found) for i in range(2)]
        return {"ok": not any(bad) and max(moved) < 0.1, "moved": moved, "not_finite": bad}

    yield from each(BACKENDS, of)


# ---- quantized ----


def wide(folder: Path) -> Path:
    """A Stable Diffusion 3 with a transformer of 256 channels."""
    import torch
    from diffusers import SD3Transformer2DModel
    from tiny_pipelines import tiny_pipeline

    place = folder / "wide"
    if not place.exists():
        pipeline = tiny_pipeline("stable-diffusion-3", folder)
        torch.manual_seed(0)
        config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
        sizes = {"num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 8, "caption_projection_dim": 256}
        pipeline.register_modules(transformer=SD3Transformer2DModel(**{**config, **sizes}))
        pipeline.save_pretrained(place)
    return place


KINDS = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}


def quantized(options: argparse.Namespace, folder: Path) -> Found:
    import torch

    from tiltflow import from_diffusers
    from tiltflow.models.quantization import stored
    from tiltflow.samplers.sampling import Sampling

    places = {
        "stable-diffusion-3": wide(folder),
        "flux": tiny("flux", folder),
        "stable-diffusion": tiny("stable-diffusion", folder),
    }
    known: dict[str, Any] = {}

    def velocities(place: Path | str, part: str, kind: str | None) -> Any:
        """Along straight paths, in bfloat16, and the bytes of the network."""
        quantization = {} if kind is None else {part: kind}
        shipped = place == "tiles-pipeline"
        size = {} if shipped else {"height": 32, "width": 32}
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        quantization = {} if kind == "float32" else quantization
        model = from_diffusers(place, device=options.device, dtype=dtype, quantization=quantization, **size)
        prompts = ["potion on a white background", "armour on a black background"] if shipped else ["a red cat", "a blue dog"]
        x = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0)).to(options.device)
        with torch.no_grad():
            flow = model.flow.bind(model.encode(prompts)[0])
            v = torch.stack([flow(x, t) for t in torch.linspace(0.1, 0.9, 5).to(options.device)])
        drawn = model.sample(prompts, sampling=Sampling(solver="euler", num_inference_steps=3), guidance_scale=1.0)
        assert bool(drawn.isfinite().all())
        network = model.denoiser.network
        return v, sum(part.nbytes for parameter in network.parameters() for part in stored(parameter))

    def moves(name: str) -> dict[str, Any]:
        family, kind = name.rsplit(", ", 1)
        part = "unet" if family in ("tiles-pipeline", "stable-diffusion") else "transformer"
        place = places.get(family, family)
        for other in (None, "float32"):
            if (family, other) not in known:
                known[family, other] = velocities(place, part, other)
        v, size = velocities(place, part, kind)
        whole, bytes_of_whole = known[family, None]
        exact = known[family, "float32"][0]
        moved = {
            "moved": relative(v, whole),
            "from_float32": relative(v, exact),
            "bfloat16_from_float32": relative(whole, exact),
        }
        return {**moved, "bytes": size, "bytes_in_bfloat16": bytes_of_whole}

    def trains(name: str) -> dict[str, Any]:
        family, kind = name.rsplit(", ", 1)
        part = "unet" if family == "stable-diffusion" else "transformer"
        changes = {"model": {"dtype": "bfloat16", "quantization": {part: kind}}}
        found = small_run(places[family], folder / f"{family}-{kind}", options.device, changes)
        weights = found.pop("weights")
        moved = any(bool(tensor.abs().sum() > 0) for name, tensor in weights.items() if "lora_B" in name or "lora.up" in name)
        return {"ok": moved and all(bool(tensor.isfinite().all()) for tensor in weights.values()), **found}

    yield from each(
        [f"{family}, {kind}" for family in ("stable-diffusion-3", "tiles-pipeline") for kind in KINDS], moves, "moves "
    )
    yield from each([f"{family}, {kind}" for kind in KINDS for family in places], trains, "trains ")


# ---- parity ----


def parity(options: argparse.Namespace, folder: Path) -> Found:
    """Of the digits' flow and of the tiles' U-Net: with TF32 in convolutions, as torch has it by default, and without; in
    bfloat16; each beside float32 on the CPU."""
    import torch

    import tiltflow
    from tiltflow.flows.flow import Flow
    from tiltflow.flows.linearize import linearize

    def field(name: str, device: str) -> tuple[Any, Any]:
        model = tiltflow.load(name, device=device)
        if name == "tiles-pipeline":
            return model, model.flow.bind(model.encode(["potion on a white background"] * 4)[0])
        return model, model.flow

    def at(flow: Any, x: Any, dtype: Any, device: str) -> tuple[Any, Any]:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            v, pullback = linearize(flow, x, torch.tensor(0.4, dtype=x.dtype, device=x.device))
            return v.detach(), pullback(x)

    def beside(name: str) -> dict[str, Any]:
        which, how = name.split(", ")
        model, flow = field(which, options.device)
        assert isinstance(model.flow, Flow)
        x = torch.randn(4, *model.event_shape, generator=torch.Generator().manual_seed(0))
        _, exact = field(which, "cpu")
        cpu = at(exact, x, torch.float32, "cpu")
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = how == "TF32 in convolutions"
        try:
            found = at(flow, x.to(options.device), torch.bfloat16 if how == "bfloat16" else torch.float32, options.device)
        finally:
            torch.backends.cudnn.allow_tf32 = before
        return {"moved": [relative(a, b) for a, b in zip(found, cpu, strict=True)]}

    ways = ("float32", "TF32 in convolutions", "bfloat16")
    yield from each([f"{which}, {how}" for which in ("digits-flow", "tiles-pipeline") for how in ways], beside)


# ---- the checks ----


@dataclass(frozen=True)
class Check:
    """A check.

    Args:
        find: yields what is found, with the name of each as `what`.
        limit: seconds.
        alone: whether nothing else may run beside it.
    """

    find: Callable[[argparse.Namespace, Path], Found]
    limit: int
    alone: bool = False


ROWS = (
    "the authors' loop, float32",
    "LoRA, bfloat16, 4 passes",
    "full, bfloat16",
    "full, float32",
    "LoRA, float32",
    "LoRA, bfloat16",
)
COMPILED = "LoRA, bfloat16, 4 passes, regional"
CHECKS: dict[str, Check] = {
    **{f"speed: {row}": Check(partial(speed, row), 120, alone=True) for row in ROWS},
    "memory": Check(memory, 300),
    "digits": Check(digits, 100),
    "quantized": Check(quantized, 150),
    "settings": Check(settings, 240),
    "tiles": Check(tiles, 300),
    "methods": Check(methods, 150),
    "attention": Check(attention, 90),
    "parity": Check(parity, 60),
    f"speed: {COMPILED}": Check(partial(speed, COMPILED), 300, alone=True),
}
"""In the order in which they are run: those that need the machine alone one after another, the others between them together."""


def each(names: Any, find: Callable[[str], dict[str, Any]], prefix: str = "") -> Found:
    """What is found of each of these, or how it failed, with the seconds it took."""
    for name in names:
        began = time.perf_counter()
        try:
            found = find(name)
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        yield {"what": prefix + name, "took": round(time.perf_counter() - began, 2), **found}


def child(options: argparse.Namespace) -> None:
    """Run one check: what it finds is written line by line. The parent says when the GPU is free."""
    import torch

    import tiltflow.api
    import tiltflow.runs.run  # noqa: F401

    warnings.simplefilter("ignore")
    if options.check.startswith("speed"):
        import pipelines  # noqa: F401
    sys.stdin.readline()
    folder = options.work / options.check.split(":")[0] / str(os.getpid())
    folder.mkdir(parents=True, exist_ok=True)
    for row in CHECKS[options.check].find(options, folder):
        print(json.dumps(row, default=float), flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Running:
    """A process that has begun to import, and waits for its turn."""

    name: str
    options: argparse.Namespace

    def __post_init__(self) -> None:
        self.out, self.err = (self.options.work / f"{self.name.replace(':', '')}.{end}" for end in ("out", "err"))
        words = [sys.executable, __file__, "--check", self.name, "--output", self.options.output, "--work", self.options.work]
        words += ["--device", self.options.device, *(["--small"] if self.options.small else [])]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen([*map(str, words)], stdin=subprocess.PIPE, stdout=out, stderr=err, text=True)

    def finish(self, limit: float) -> dict[str, Any]:
        """Let it begin, wait, and return what it found."""
        began = time.perf_counter()
        assert self.process.stdin is not None
        status = "ok"
        try:
            self.process.communicate("go\n", timeout=max(limit, 1))
            if self.process.returncode:
                lines = self.err.read_text().strip().splitlines()
                status = f"exit {self.process.returncode}: {lines[-1][:300] if lines else ''}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = f"stopped after {limit:.0f} s"
        lines = [line for line in self.out.read_text().splitlines() if line.startswith("{")]
        found = [json.loads(line) for line in lines]
        return {"status": status, "seconds": round(time.perf_counter() - began, 1), "found": found}


def parent(options: argparse.Namespace) -> None:
    """Run all checks and write what they find as it comes."""
    began = time.perf_counter()
    results: dict[str, Any] = {"about": {}, "checks": {}}
    chosen, lock = [name for name in CHECKS if any(part in name for part in options.only)], Lock()

    def write(name: str, found: dict[str, Any], log: str) -> None:
        with lock:
            results["checks"][name] = found
            path = options.output / "results.json"
            path.with_suffix(".new").write_text(json.dumps(results, indent=1))
            path.with_suffix(".new").replace(path)
            with (options.output / "log.txt").open("a") as file:
                file.write(f"==== {name}: {found['status']}\n{log[-20000:]}\n")
        print(f"{time.perf_counter() - began:5.0f} s  {name}: {found['status']}, {found['seconds']} s", flush=True)

    def do(running: Running) -> None:
        left = options.budget - (time.perf_counter() - began)
        limit = min(CHECKS[running.name].limit * options.patience, left)
        found = running.finish(limit)
        write(running.name, found, running.err.read_text())

    groups: list[list[str]] = []  # of one that is alone, or of several that are run together
    for name in chosen:
        if groups and not CHECKS[name].alone and not CHECKS[groups[-1][0]].alone:
            groups[-1].append(name)
        else:
            groups.append([name])
    ahead = [Running(name, options) for name in groups[0][: options.jobs]] if groups else []
    results["about"] = about(options)
    for i, group in enumerate(groups):
        first, ahead = ahead, []
        waiting = group[len(first) :]
        if i + 1 < len(groups) and len(group) == 1:
            ahead = [Running(name, options) for name in groups[i + 1][: options.jobs]]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda one: do(one if isinstance(one, Running) else Running(one, options)), [*first, *waiting]))
        if i + 1 < len(groups) and not ahead:
            ahead = [Running(name, options) for name in groups[i + 1][: options.jobs]]
    table(results)


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Versions, the device, and what torch does by default."""
    code = """
import json, sys, importlib.metadata as m, torch
names = "torch triton diffusers transformers peft accelerate huggingface_hub bitsandbytes torchao numpy pydantic".split()
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
found = {"python": sys.version.split()[0], **{name: version(name) for name in names}, "threads": torch.get_num_threads()}
found["cudnn.allow_tf32"], found["matmul"] = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
if torch.cuda.is_available():
    found["device"] = torch.cuda.get_device_name()
    found["memory"] = torch.cuda.mem_get_info()
    found["capability"] = torch.cuda.get_device_capability()
    found["cudnn"] = torch.backends.cudnn.version()
print(json.dumps(found))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said: dict[str, Any] = json.loads(found.stdout) if not found.returncode else {"failed": found.stderr[-300:]}
    print(said, flush=True)
    return said | {"small": options.small, "asked": options.device}


def table(results: Mapping[str, Any]) -> None:
    """Print a line for each thing that was found."""
    rows = {row["what"]: row for name, check in results["checks"].items() if name.startswith("speed") for row in check["found"]}
    first = rows.get(ROWS[0])
    print(f"\n{'':38}{'s / step':>9}{'steps / s':>10}{'img / s':>9}{'GB':>7}{'speed':>8}{'memory':>8}{'overhead':>10}")
    for name, row in rows.items():
        numbers = f"{row['seconds']:9.3f}{row['steps_per_second']:10.3f}{row['pictures_per_second']:9.2f}"
        numbers += f"{row['megabytes'] / 1024:7.2f}"
        if first:
            numbers += f"{first['seconds'] / row['seconds']:8.2f}{row['megabytes'] / first['megabytes']:8.2f}"
        print(f"{name:38}{numbers}{row['overhead']:10.3f}")
    for name, check in results["checks"].items():
        if not name.startswith("speed"):
            print(f"{name}: {check['status']}, {check['seconds']} s")
            for row in check["found"]:
                print(f"    {row['what'][:48]:48} {in_short(row)}")
        elif check["status"] != "ok":
            print(f"{name}: {check['status']}")


def in_short(row: Mapping[str, Any]) -> str:
    """What was found, in a few words."""
    if "failed" in row:
        return f"FAILED {row['failed'][:110]}"
    words = ["NOT OK"] if row.get("ok") is False else []
    if "phases" in row:
        words += [f"{name or 'other'} {size / GIGABYTE:.2f}" for name, size in row["phases"].items()]
        words += [f"beside torch {row['beside_torch'] / GIGABYTE:.2f}"] if "beside_torch" in row else []
        return ", ".join(words) + " GB"
    for key in ("same_bits", "moved", "not_finite", "from_float32", "bfloat16_from_float32", "bytes", "levels"):
        value = row.get(key)
        if isinstance(value, list):
            words.append(f"{key} {[f'{one:.2g}' for one in value]}")
        elif value is not None:
            words.append(f"{key} {f'{value:.2g}' if isinstance(value, float) else value}")
    return " ".join(map(str, words)) or f"{row.get('wall') or row.get('seconds') or row['took']:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json and log.txt")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks, few steps")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of the checks to run")
    parser.add_argument("--jobs", type=int, default=4, help="checks that are run together, where they may")
    parser.add_argument("--budget", type=float, default=1200, help="seconds for all; what has not ended by then is stopped")
    parser.add_argument("--patience", type=float, default=1, help="factor of the time limit of each check")
    parser.add_argument("--work", type=Path, help="folder for the runs; by default in --output")
    parser.add_argument("--forecast", action="store_true", help="forecast the memory of what results.json has measured")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work or options.output / "work"
    for folder in (options.output, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    if options.forecast:
        forecast(options)
    elif options.check:
        child(options)
    else:
        parent(options)


if __name__ == "__main__":
    main()
