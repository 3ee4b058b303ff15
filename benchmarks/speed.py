"""Speed and memory, as ratios measured side by side in one run: `make bench`.

    python benchmarks/speed.py --methods tilt-matching --repeats 20      # a machine that does other work: more turns

overhead  for every method, CPU seconds of one iteration over those of the bare network calls that it makes (forwards,
          vector-Jacobian products, trained steps forward and backward; of a critic too), on batches of the same size and one
          thread. The calls are counted by hooks while the iteration runs, and timed in turn with it, now the one first and now
          the other: the median of the turns' ratios, with their quartiles; and the ratio of the least seconds of both.
memory    peak resident memory of an iteration over that of what it cannot do without: one frozen and one trained
          copy of the network with its gradients and optimizer state, and one step's activations.
import    seconds of `import tiltflow` over those of `import torch`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.control.timesteps import Stratum
from tiltflow.control.value import Critic
from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.networks.image_critic import ImageCriticModule
from tiltflow.networks.unet import Unet, UnetModule
from tiltflow.streams import new_network, stream
from tiltflow.training.trainer import train

Calls = Counter[tuple[str, nn.Module, int]]
"""How often: (forward, vjp or trained; the network; the batch size)."""
NETWORKS = {"digit flow": Unet(), "wider": Unet(channels=(64, 192), blocks=(1, 3))}
BATCH, SHAPE, STEPS, TRAINED = 64, (1, 28, 28), 20, 6
LIMIT_OVERHEAD, LIMIT_IMPORT = 1.03, 0.3


def ink(x: Tensor) -> Tensor:
    """A reward that costs nothing beside the network."""
    return x.flatten(1).mean(1)


METHODS: dict[str, Any] = {
    "adjoint-matching": AdjointMatching(num_inference_steps=STEPS, train_timesteps=(Stratum(count=TRAINED),)),
    "score-as-action": ScoreAsAction(
        num_inference_steps=STEPS, train_timesteps=(Stratum(count=TRAINED),), num_passes=1, critic=Critic(train_batch_size=16)
    ),
    "orw-cfm-w2": OrwCfmW2(num_inference_steps=STEPS // 2, num_passes=1),
    "tilt-matching": TiltMatching(num_inference_steps=STEPS // 2, num_passes=4),
    # paths of both in each round, so that every one has as many calls
    "path-reweighted": PathReweighted(num_inference_steps=STEPS, path_steps=STEPS, num_passes=4, proposal="mixture"),
}


class Iterations:
    """A method on a network, one iteration at a call."""

    def __init__(self, settings: Unet, method: Any):
        self.passes = method.needs.passes
        self.base = Flow(new_network(settings, 0).requires_grad_(False))
        self.tuned = Flow(new_network(settings, 0))
        self.records = train(
            self.tuned, self.base, method, ink, lambda g: torch.randn(BATCH, *SHAPE, generator=g), max_train_steps=10**6
        )

    def __call__(self) -> None:
        for _ in range(self.passes):
            next(self.records)

    def count(self) -> Calls:
        """The network calls of one iteration."""
        calls: Calls = Counter()

        def hook(network: nn.Module, arguments: tuple[Any, ...]) -> None:
            if isinstance(network, UnetModule | ImageCriticModule):
                x = arguments[0]
                kind = "forward" if not torch.is_grad_enabled() else "vjp" if x.requires_grad else "trained"
                calls[kind, network, len(x)] += 1

        handle = nn.modules.module.register_module_forward_pre_hook(hook)
        self()
        handle.remove()
        return calls


def bare(calls: Calls) -> Callable[[], None]:
    """The same network calls and nothing else."""
    generator = stream(0, "bench")
    inputs = {size: (torch.randn(size, *SHAPE, generator=generator), torch.full((size,), 0.5)) for _, _, size in calls}

    def run() -> None:
        for (kind, network, size), times in calls.items():
            x, t = inputs[size]
            for _ in range(times):
                if kind == "forward":
                    with torch.no_grad():
                        network(x, t)
                elif kind == "vjp":
                    y = x.detach().requires_grad_()
                    torch.autograd.grad(network(y, t).sum(), y)
                else:
                    network(x, t).sum().backward()
        for _, network, _ in calls:
            network.zero_grad()

    return run


def cpu_seconds(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def overhead(settings: Unet, method: Any, repeats: int) -> dict[str, Any]:
    iterate = Iterations(settings, method)
    iterate()
    calls = iterate.count()
    reference = bare(calls)
    reference()
    turns = [turn(iterate, reference, swapped=bool(i % 2)) for i in range(repeats)]
    ours, theirs = zip(*turns, strict=True)
    lower, middle, upper = statistics.quantiles((own / other for own, other in turns), n=4, method="inclusive")
    return {
        "calls": {
            f"{name} {kind}": sum(n for (k, network, _), n in calls.items() if k == kind and isinstance(network, which))
            for name, which in (("flow", UnetModule), ("critic", ImageCriticModule))
            for kind in ("forward", "vjp", "trained")
        },
        "cpu_seconds": min(ours),
        "ratio": middle,
        "ratio_of_least": min(ours) / min(theirs),
        "lower_quartile": lower,
        "upper_quartile": upper,
    }


def turn(ours: Callable[[], None], theirs: Callable[[], None], swapped: bool) -> tuple[float, float]:
    """CPU seconds of both, the second one measured first if `swapped`."""
    if swapped:
        seconds = cpu_seconds(theirs)
        return cpu_seconds(ours), seconds
    return cpu_seconds(ours), cpu_seconds(theirs)


def peak_memory(settings: Unet, what: str) -> None:
    """Print the peak of resident memory in MB, above what the imports take, of an iteration or its necessary part (Linux)."""
    torch.set_num_threads(1)
    before = _resident("VmRSS")
    if what == "iteration":
        iterate = Iterations(settings, METHODS["adjoint-matching"])
        for _ in range(2):
            iterate()
    else:
        frozen, trained = new_network(settings, 0).requires_grad_(False), new_network(settings, 0)
        optimizer = torch.optim.AdamW(trained.parameters())
        for _ in range(2):
            bare(Counter({("forward", trained, BATCH): 1, ("vjp", frozen, BATCH): 1, ("trained", trained, BATCH): 1}))()
            for parameter in trained.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def child(*arguments: str) -> str:
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=environment).stdout


def import_seconds(repeats: int) -> float:
    """Median seconds that `import tiltflow` and its main names take on top of `import torch`."""
    code = "import time, torch; began = time.perf_counter(); import tiltflow; print(time.perf_counter() - began)"
    return statistics.median(float(child("-c", code)) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="turns, at least 2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--peak-memory", nargs=2, metavar=("NETWORK", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        peak_memory(NETWORKS[options.peak_memory[0]], options.peak_memory[1])
        return

    torch.set_num_threads(1)
    results: dict[str, Any] = {"import_seconds": import_seconds(5)}
    print(f"import tiltflow: {results['import_seconds']:.3f} s after torch (at most {LIMIT_IMPORT})")
    print(
        f"\n{'method':18}{'network':12}{'calls: forward + vjp + trained (critic)':42}"
        f"{'CPU s':>7}{'overhead (quartiles)':>24}{'of least':>10}{'memory':>18}"
    )
    for method, name in product(options.methods, options.networks):
        settings = NETWORKS[name]
        row = overhead(settings, METHODS[method], options.repeats)
        if method == "adjoint-matching" and os.path.exists("/proc/self/status"):
            peaks = [float(child(__file__, "--peak-memory", name, what)) for what in ("iteration", "necessary")]
            row |= {"memory_mb": peaks[0], "memory_necessary_mb": peaks[1]}
        memory = f"{row['memory_mb']:.0f} / {row['memory_necessary_mb']:.0f} MB" if "memory_mb" in row else "-"
        counts = [str(count) for count in row["calls"].values()]
        calls = " + ".join(counts[:3]) + (f" ({' + '.join(counts[3:])})" if any(int(n) for n in counts[3:]) else "")
        quartiles = f"({row['lower_quartile']:.3f}-{row['upper_quartile']:.3f})"
        print(
            f"{method:18}{name:12}{calls:42}{row['cpu_seconds']:7.2f}{row['ratio']:10.3f} {quartiles}"
            f"{row['ratio_of_least']:10.3f}{memory:>18}",
            flush=True,
        )
        results[f"{method}, {name}"] = row
    print(
        f"\noverhead at most {LIMIT_OVERHEAD}: batch {BATCH}, {STEPS} steps, {TRAINED} trained, "
        f"one thread, {options.repeats} turns"
    )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
