"""Seconds and peak memory of an Adjoint Matching step on the U-Net of Stable Diffusion 1.5, with random weights.

The setting is that of the authors' code: 50 steps, 4 of them in the loss, 5 pictures; `--steps`, `--batch`, `--latents` and
`--network small` make it fit a CPU. Each row is a process of its own:

overhead  time of an iteration, without the optimizer's own step, over that of the bare network calls that it makes, counted by
          hooks and timed in turn with it
optimizer time of the optimizer's step, over that of the same network calls; nothing at the authors' setting, and not on latents
          so small that a network of this size has hardly anything to do
speed     optimizer steps a second, over those of the first row
memory    peak, above what the imports take, over that of the first row

--pairs  their loop and full tuning in float32 in turn, in one process, as often as it says: the time of ours over theirs. How
         far back our adjoint runs is drawn, theirs runs back all steps; so the ratio is read off the line of least squares at
         the number of products with the Jacobian that is drawn on average

The first row is no code of theirs: `AuthorsLoop` is the loop that their paper and repository describe, two networks in float32
and everything else off, in plain diffusers and torch. All rows are without guidance and without a decoder.

    python benchmarks/pipelines.py --network small --steps 10          # minutes on a CPU
    python benchmarks/pipelines.py                                     # a GPU
    python benchmarks/pipelines.py --network small --latents 16 --pairs 12      # beside the authors' loop
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tiltflow.control.timesteps import Stratum
from tiltflow.flows.adapter import AdapterOff, base_of
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import DiscreteVariancePreserving
from tiltflow.flows.precision import without_cudnn_attention
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.models.compiled import compiled
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.pipeline_adapter import AdaptedDenoiser
from tiltflow.models.pipelines.stable_diffusion import StableDiffusion, predict
from tiltflow.models.trainable import trainable_copy
from tiltflow.training.batch import Drawn
from tiltflow.training.trainer import train

ROWS: dict[str, dict[str, Any]] = {
    "the authors' loop, float32": {"loop": True},
    "full, float32": {},
    "full, bfloat16": {"autocast": True},
    "LoRA, float32": {"lora": True},
    "LoRA, bfloat16": {"lora": True, "dtype": "bfloat16"},
    "LoRA, bfloat16, 4 passes": {"lora": True, "dtype": "bfloat16", "passes": 4},
    "LoRA, bfloat16, 4 passes, regional": {"lora": True, "dtype": "bfloat16", "passes": 4, "compile": "regional"},
    "LoRA, bfloat16, 4 passes, compiled": {"lora": True, "dtype": "bfloat16", "passes": 4, "compile": "whole"},
}
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},
    "small": {
        "cross_attention_dim": 64,
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}


class AuthorsLoop:
    """One optimizer step at a call, as microsoft/soc-fine-tuning-sd describes it (arXiv 2409.08861, Algorithm 2): DDIM, eta 1,
    trajectories joined state by state, a vector-Jacobian product of the base at every step, the base's predictions kept for
    the loss, whose four steps are one batch, and AdamW."""

    passes = 1

    def __init__(self, options: argparse.Namespace):
        from diffusers import DDIMScheduler, UNet2DConditionModel

        torch.manual_seed(0)
        self.device, self.count_of_steps = options.device, options.steps
        with torch.device(self.device):
            self.tuned: Any = UNet2DConditionModel(**SIZES[options.network], sample_size=options.latents)
        self.base = copy.deepcopy(self.tuned).requires_grad_(False).eval()
        self.shape = (options.batch, 4, options.latents, options.latents)
        self.embeds = torch.randn(options.batch, 77, SIZES[options.network]["cross_attention_dim"], device=self.device)
        scheduler = DDIMScheduler(beta_start=0.002, beta_end=0.009, beta_schedule="scaled_linear", timestep_spacing="trailing")
        scheduler.set_timesteps(options.steps)
        self.times = scheduler.timesteps.to(self.device)
        alphas = scheduler.alphas_cumprod.to(self.device)
        self.alphas = torch.cat([alphas[self.times], (1 + alphas[self.times[-1:]]) / 2])
        self.optimizer = torch.optim.AdamW(self.tuned.parameters(), lr=3e-6, betas=(0.9, 0.95), weight_decay=0.0)
        self.lengths: Counter[tuple[str, nn.Module, int]] = Counter()

    def predict(self, network: Any, x: Tensor, k: int | Tensor, kind: str) -> Tensor:
        self.lengths[kind, network, len(x)] += 1
        embeds = self.embeds.repeat(len(x) // self.shape[0], 1, 1)
        predicted: Tensor = network(x, self.times[k], encoder_hidden_states=embeds).sample
        return predicted

    def deviation(self, k: int | Tensor) -> Tensor:
        now, after = self.alphas[k], self.alphas[k + 1]
        return ((1 - after) / (1 - now) * (1 - now / after)).sqrt()

    def mean(self, x: Tensor, epsilon: Tensor, k: int) -> Tensor:
        now, after = self.alphas[k], self.alphas[k + 1]
        clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        return after.sqrt() * clean + (1 - after - self.deviation(k) ** 2).sqrt() * epsilon

    def slope(self, k: Tensor) -> Tensor:
        """Of the mean of step k in the prediction."""
        now, after = self.alphas[k], self.alphas[k + 1]
        return (1 - after - self.deviation(k) ** 2).sqrt() - ((1 - now) * after / now).sqrt()

    def __call__(self) -> None:
        self.lengths.clear()
        states = torch.randn(self.shape, device=self.device)[None]
        with torch.no_grad():
            for k in range(self.count_of_steps):
                x = states[-1]
                drift = self.mean(x, self.predict(self.tuned, x, k, "forward"), k)
                states = torch.cat([states, (drift + self.deviation(k) * torch.randn_like(x))[None]])
        last = states[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(last.flatten(1).mean(1).sum(), last)
        adjoints, predictions = -100 * gradient[None], states[:0]
        for k in reversed(range(self.count_of_steps)):
            x = states[k].clone().requires_grad_()
            epsilon = self.predict(self.base, x, k, "vjp")
            (gradient,) = torch.autograd.grad(((self.mean(x, epsilon, k) - x) * adjoints[0]).sum(), x)
            adjoints = torch.cat([(adjoints[0] + gradient)[None], adjoints])
            predictions = torch.cat([epsilon.detach()[None], predictions])
        early = int(0.6 * self.count_of_steps)
        chosen = torch.cat([torch.randperm(early)[:2], early + torch.randperm(self.count_of_steps - early)[:2]])
        steps = chosen.to(self.device).repeat_interleave(self.shape[0])
        tuned = self.predict(self.tuned, states[chosen].flatten(0, 1), steps, "trained")
        deviation, slope = (each[:, None, None, None] for each in (self.deviation(steps), self.slope(steps)))
        control = slope * (tuned - predictions[chosen].flatten(0, 1)) / deviation
        (control + deviation * adjoints[chosen].flatten(0, 1)).square().flatten(1).sum(1).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self) -> Counter[tuple[str, nn.Module, int]]:
        """The network calls of a step, as `Iterations.count`."""
        self()
        return self.lengths.copy()

    def bare(self, calls: Counter[tuple[str, nn.Module, int]]) -> None:
        """The same network calls and nothing else."""
        for (kind, network, size), times in calls.items():
            x, k = torch.randn(size, *self.shape[1:], device=self.device), torch.zeros(size, dtype=torch.long)
            for _ in range(times):
                if kind == "forward":
                    with torch.no_grad():
                        self.predict(network, x, k, kind)
                elif kind == "vjp":
                    torch.autograd.grad(self.predict(network, x.requires_grad_(), k, kind).sum(), x)
                else:
                    self.predict(network, x, k, kind).sum().backward()
        self.optimizer.zero_grad()


class Iterations:
    """One optimizer step at a call."""

    def __init__(self, options: argparse.Namespace, row: dict[str, Any]):
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        torch.manual_seed(0)
        self.device = options.device
        dtype = getattr(torch, row.get("dtype", "float32"))
        with torch.device(self.device):
            unet: Any = UNet2DConditionModel(**SIZES[options.network], sample_size=options.latents).to(dtype)
        unet.requires_grad_(False).eval()
        path = DiscreteVariancePreserving(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        autocast = torch.bfloat16 if row.get("autocast") else None
        if row.get("lora"):
            unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(StableDiffusion.target_modules)))
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            tuned = Flow(AdaptedDenoiser(unet, predict, "default"), "epsilon", path)
            base: Flow | AdapterOff = base_of(tuned)
        else:
            base = Flow(Denoiser(unet, predict), "epsilon", path, autocast=autocast)
            tuned = trainable_copy(base)
        self.compiled = ExitStack()  # until the process ends
        self.compiled.enter_context(without_cudnn_attention(torch.device(self.device)))
        self.compiled.enter_context(compiled(row.get("compile"), tuned.network, base.network))
        shape = (options.batch, 4, options.latents, options.latents)
        embeds = torch.randn(options.batch, 77, SIZES[options.network]["cross_attention_dim"], device=self.device, dtype=dtype)
        self.condition, self.shape, self.passes = {"encoder_hidden_states": embeds}, shape, row.get("passes", 1)
        self.dtype, self.autocast = dtype, autocast
        method = AdjointMatching(
            preset="official-code",
            num_inference_steps=options.steps,
            train_timesteps=(Stratum(start=0, end=0.6, count=2), Stratum(start=0.6, end=1, count=2)),
            num_passes=self.passes,
        )

        def bound(flow: VelocityField) -> VelocityField:
            return flow.bind(self.condition)

        self.records = train(
            tuned,
            base,
            method,
            lambda x: x.flatten(1).mean(1),
            lambda g: Drawn(torch.randn(shape, generator=g, device=g.device), bound),
            max_train_steps=10**6,
            start=tuned.noise_time,
        )

    def __call__(self) -> None:
        """All the optimizer steps on a batch of trajectories."""
        for _ in range(self.passes):
            next(self.records)

    def count(self) -> Counter[tuple[str, nn.Module, int]]:
        """The network calls of it: (forward, vjp or trained; the network; the batch size)."""
        calls: Counter[tuple[str, nn.Module, int]] = Counter()

        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if isinstance(module, Denoiser):
                x = arguments[0]
                kind = "forward" if not torch.is_grad_enabled() else "vjp" if x.requires_grad else "trained"
                calls[kind, module, len(x)] += 1

        handle = nn.modules.module.register_module_forward_pre_hook(hook)
        self()
        handle.remove()
        return calls

    def bare(self, calls: Counter[tuple[str, nn.Module, int]]) -> None:
        """The same network calls and nothing else."""
        for (kind, network, size), times in calls.items():
            x, t = torch.randn(size, *self.shape[1:], device=self.device), torch.full((size,), 500.0, device=self.device)
            repeated = -(-size // self.shape[0])
            condition = {key: torch.cat([value] * repeated)[:size] for key, value in self.condition.items()}
            off = kind == "vjp" and isinstance(network, AdaptedDenoiser)
            for _ in range(times):
                with network.disable_adapter() if off else nullcontext():  # type: ignore[operator]
                    self.call(kind, network, x, t, condition)
        for _, network, _ in calls:
            network.zero_grad()

    def call(self, kind: str, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> None:
        def evaluate(x: Tensor) -> Tensor:
            with torch.autocast(torch.device(self.device).type, self.autocast, enabled=self.autocast is not None):
                out: Tensor = network(x, t, condition)
                return out.float()

        if kind == "forward":
            with torch.no_grad():
                evaluate(x)
        elif kind == "vjp":
            y = x.requires_grad_()
            torch.autograd.grad(evaluate(y).sum(), y)
        else:
            evaluate(x).sum().backward()


def seconds(function: Any, device: str) -> float:
    """CPU seconds of this process, which a busy machine does not blur; of the clock on a GPU. Of a function, or since the start
    if there is none."""
    began = clock(device) if function else 0.0
    if function:
        function()
    return clock(device) - began


def clock(device: str) -> float:
    """See `seconds`."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def resident(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(options: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    before = resident("VmRSS") if options.device == "cpu" else 0.0
    iterate = AuthorsLoop(options) if row.get("loop") else Iterations(options, row)
    first = seconds(iterate, options.device)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    calls: Counter[tuple[str, nn.Module, int]] = Counter()
    second = seconds(lambda: calls.update(iterate.count()), options.device)
    peak = resident("VmHWM") - before if options.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    if not options.repeats:
        unknown = dict.fromkeys(("optimizer", "overhead", "lowest", "highest"), math.nan)
        return {"seconds": second / iterate.passes, "first": first, "megabytes": peak, "calls": _by_kind(calls), **unknown}
    iterate.bare(calls)
    stepping: list[float] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *arguments: stepping.append(-seconds(None, options.device))),
        register_optimizer_step_post_hook(lambda *arguments: stepping.append(seconds(None, options.device))),
    ]
    triples = []
    for _ in range(options.repeats):
        stepping.clear()
        calls.clear()  # which steps are in the loss is drawn anew each time, and decides how far back the adjoint goes
        whole = seconds(lambda: calls.update(iterate.count()), options.device)
        triples.append((whole, sum(stepping), seconds(lambda: iterate.bare(calls), options.device)))
    for handle in handles:
        handle.remove()
    ratios = sorted((ours - step) / theirs for ours, step, theirs in triples)
    return {
        "seconds": statistics.median(ours for ours, _, _ in triples) / iterate.passes,
        "first": first,
        "optimizer": statistics.median(step / theirs for _, step, theirs in triples),
        "overhead": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "megabytes": peak,
        "calls": dict(Counter(dict.fromkeys(("forward", "vjp", "trained"), 0)) + _by_kind(calls)),
    }


def _by_kind(calls: Counter[tuple[str, nn.Module, int]]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for (kind, _, _), times in calls.items():
        kinds[kind] += times
    return kinds


def beside(options: argparse.Namespace) -> str:
    """The time of an iteration of full tuning in float32 over that of the authors' loop, in turn with it."""
    theirs, ours = AuthorsLoop(options), Iterations(options, ROWS["full, float32"])
    theirs(), ours()
    early = int(0.6 * options.steps)
    expected = options.steps - ((early + 1) / 3 - 1)  # the mean of the smaller of two of 0 .. early - 1 is (early + 1) / 3 - 1
    found: list[tuple[float, float]] = []
    for _ in range(options.pairs):
        calls: Counter[tuple[str, nn.Module, int]] = Counter()
        other = seconds(theirs, options.device)
        own = seconds(partial(_count, ours, calls), options.device)
        found.append((own / other, _by_kind(calls)["vjp"]))
        print(f"ours {own:.2f} s / theirs {other:.2f} s = {own / other:.3f} with {found[-1][1]} products", flush=True)
    ratios, products = torch.tensor(found, dtype=torch.float64).T
    centred, away = products - products.mean(), expected - products.mean()
    slope = centred @ ratios / centred.square().sum()
    variance = (ratios - ratios.mean() - slope * centred).square().sum() / (len(ratios) - 2)
    error = (variance * (1 / len(ratios) + away**2 / centred.square().sum())).sqrt()
    return f"ours / theirs with {expected:.1f} products: {ratios.mean() + slope * away:.3f} +- {error:.3f}"


def _count(iterations: Iterations, calls: Counter[tuple[str, nn.Module, int]]) -> None:
    calls.update(iterations.count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SIZES, default="sd15")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--latents", type=int, default=64, help="side of the latents; 64 is a picture of 512 pixels")
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0 times one iteration, and not its bare calls")
    parser.add_argument("--rows", nargs="*", help="parts of the names of the rows to measure", default=[""])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--pairs", type=int, default=0, help="compare the times of the first two rows, in so many turns; at least 3"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs:
        print(beside(options))
        return
    if options.row:
        print(json.dumps(measure(options, ROWS[options.row])))
        return
    chosen = [name for name in ROWS if any(part in name for part in options.rows)]
    heads = f"{'s / step':>9}{'overhead':>10}{'range':>15}{'optimizer':>11}{'speed':>8}{'MB':>8}{'memory':>8}"
    print(f"{'':38}{heads}   forward + vjp + trained", flush=True)
    results: dict[str, Any] = {}
    for name in chosen:
        same = [f"--{key}={getattr(options, key)}" for key in ("network", "steps", "batch", "latents", "repeats", "device")]
        child = subprocess.run([sys.executable, __file__, *same, "--row", name], capture_output=True, text=True)
        if child.returncode:
            print(f"{name:38}failed: {child.stderr.strip().splitlines()[-1][:90]}")
            continue
        found = results[name] = json.loads(child.stdout.splitlines()[-1])
        first = next(iter(results.values()))
        print(
            f"{name:38}{found['seconds']:9.2f}{found['overhead']:10.3f}{found['lowest']:8.3f}-{found['highest']:.3f}{found['optimizer']:11.3f}"
            f"{first['seconds'] / found['seconds']:8.2f}{found['megabytes']:8.0f}{found['megabytes'] / first['megabytes']:8.2f}"
            f"   {' + '.join(str(found['calls'].get(kind, 0)) for kind in ('forward', 'vjp', 'trained'))}",
            flush=True,
        )
    print(
        f"\n{options.network}, {options.steps} steps, 4 in the loss, {options.batch} pictures of {options.latents}x"
        f"{options.latents} latents, {options.device}, {torch.get_num_threads()} threads"
    )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
