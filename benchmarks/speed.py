"""Speed and memory, as ratios measured side by side in one run: `make bench`.

    python benchmarks/speed.py --methods tilt-matching --repeats 20      # a machine that does other work: more turns
    python benchmarks/speed.py --check                                   # exit code 1 if a method takes 20 % more than stored

overhead  for every method, CPU seconds of one iteration over those of the bare network calls that it makes (forwards,
          vector-Jacobian products, trained steps forward and backward; of a critic and a value network too), on batches of the
          same size and one thread. The calls are counted by hooks while the iteration runs, and timed in turn with it, now the
          one first and now the other: the median of the turns' ratios, with their quartiles. Beside it, over the same calls
          and the steps of the optimizer that they are there for: PyTorch's AdamW, and clipping.
plain     CPU seconds of one iteration over those of the plainest loop of the same paper (`benchmarks/plain.py`).
scaling   the overhead at half and twice the batch, the steps and the side of the pictures.
memory    peak resident memory of an iteration over that of what it cannot do without: one frozen and one trained copy of the
          network with its gradients and optimizer state, and one step's activations.
import    seconds of `import tiltflow` over those of `import torch`.

`benchmarks/speed.json` has, for each kind of machine, what an iteration takes in units of one forward pass of its batch:
`--store` adds this machine, `--check` compares.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import plain
import torch
from torch import Tensor, nn

from tiltflow.control.timesteps import Stratum
from tiltflow.control.value import Critic
from tiltflow.flows.flow import Flow
from tiltflow.networks.image_critic import ImageCriticModule
from tiltflow.networks.unet import Unet, UnetModule
from tiltflow.plugins import find, names
from tiltflow.streams import new_network, stream
from tiltflow.training.trainer import train

Calls = Counter[tuple[str, nn.Module, int]]
"""How often: (forward, vjp, trained, or both of these; the network; the batch size)."""
KINDS = ("forward", "vjp", "trained", "both")
NETWORKS = {"digit flow": Unet(), "wider": Unet(channels=(64, 192), blocks=(1, 3))}
MAIN = ("adjoint-matching", "score-as-action", "orw-cfm-w2", "tilt-matching", "path-reweighted")
"""The methods that are measured on the wider network too."""
BATCH, SIDE, STEPS, TRAINED = 64, 28, 20, 6
LIMIT_OVERHEAD, LIMIT_IMPORT, LIMIT_SLOWER = 1.03, 0.3, 1.2
STORED = Path(__file__).with_suffix(".json")


def ink(x: Tensor) -> Tensor:
    """A reward that costs nothing beside the network."""
    return x.flatten(1).mean(1)


def settings_of(method: str, steps: int = STEPS) -> Any:
    """A method at a size that takes a second: so many evaluations along a path, few of its steps trained, few passes."""
    strata, small = (Stratum(count=TRAINED),), Critic(train_batch_size=16)
    own: Mapping[str, Mapping[str, Any]] = {
        "adjoint-matching": {"train_timesteps": strata},
        "score-as-action": {"train_timesteps": strata, "num_passes": 1, "critic": small},
        "dxmi": {"train_timesteps": strata, "critic": small.model_copy(update={"loss": "td"})},
        # paths of both in each round, so that every one has as many calls
        "path-reweighted": {"path_steps": steps, "num_passes": 4, "proposal": "mixture"},
        "vgg-flow": {"network": Unet()},
    }
    cls = find("methods", method)
    chosen: dict[str, Any] = {"num_inference_steps": steps}
    if cls.model_fields.get("solver") is not None and cls.model_fields["solver"].default == "heun":
        chosen["num_inference_steps"] = steps // 2  # two evaluations a step
    if "num_passes" in cls.model_fields and cls().num_passes > 4:
        chosen["num_passes"] = 4
    return cls(**chosen | dict(own.get(method, {})))


class Iterations:
    """A method on a network, one iteration at a call."""

    def __init__(self, settings: Unet, method: Any, batch: int = BATCH, side: int = SIDE):
        self.passes, self.shape = method.needs.passes, (batch, 1, side, side)
        self.base = Flow(new_network(settings, 0).requires_grad_(False))
        self.tuned = Flow(new_network(settings, 0))
        self.records = train(
            self.tuned, self.base, method, ink, lambda g: torch.randn(self.shape, generator=g), max_train_steps=10**6
        )

    def __call__(self) -> None:
        for _ in range(self.passes):
            self.record = next(self.records)

    def count(self) -> Calls:
        """The network calls of one iteration."""
        calls: Calls = Counter()

        def hook(network: nn.Module, arguments: tuple[Any, ...]) -> None:
            if isinstance(network, UnetModule | ImageCriticModule):
                calls[kind_of(network, arguments[0]), network, len(arguments[0])] += 1

        handle = nn.modules.module.register_module_forward_pre_hook(hook)
        self()
        handle.remove()
        return calls


def kind_of(network: nn.Module, x: Tensor) -> str:
    """What a call of a network at x is for."""
    if not torch.is_grad_enabled():
        return "forward"
    trained = next(network.parameters()).requires_grad
    return "both" if trained and x.requires_grad else "vjp" if x.requires_grad else "trained" if trained else "forward"


def bare(calls: Calls, event: tuple[int, ...], optimizer_steps: int = 0) -> Callable[[], None]:
    """The same network calls and nothing else; or, after them, steps of AdamW with clipped gradients on what they train."""
    generator = stream(0, "bench")
    inputs = {size: (torch.randn(size, *event, generator=generator), torch.full((size,), 0.5)) for _, _, size in calls}
    trained = {network for kind, network, _ in calls if kind in ("trained", "both") and isinstance(network, UnetModule)}
    parameters = [p for network in trained for p in network.parameters()]
    adam = torch.optim.AdamW(parameters, lr=0.0, fused=True)  # which leaves the weights of the method as they are

    def run() -> None:
        for (kind, network, size), times in calls.items():
            x, t = inputs[size]
            for _ in range(times):
                if kind == "forward":
                    with torch.no_grad():
                        network(x, t)
                elif kind == "trained":
                    network(x, t).sum().backward()
                else:
                    y = x.detach().requires_grad_()
                    (torch.autograd.grad(network(y, t).sum(), y) if kind == "vjp" else network(y, t).sum().backward())
        for _ in range(optimizer_steps):
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
        for _, network, _ in calls:
            network.zero_grad()

    return run


def cpu_seconds(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def in_turn(functions: Sequence[Callable[[], None]], repeats: int) -> list[list[float]]:
    """CPU seconds of each function in each of the turns, which begin now with the one and now with another."""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats):
        for i in range(len(functions)):
            which = (turn + i) % len(functions)
            seconds[which].append(cpu_seconds(functions[which]))
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The median of the turns' ratios, with their quartiles, and the ratio of the least seconds of both."""
    lower, middle, upper = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4, method="inclusive")
    return {"ratio": middle, "lower": lower, "upper": upper, "of_least": min(ours) / min(theirs)}


def measure(settings: Unet, method: Any, repeats: int, batch: int = BATCH, side: int = SIDE) -> dict[str, Any]:
    """An iteration beside its bare network calls, beside these with the optimizer's steps, and in units of a forward pass."""
    iterate = Iterations(settings, method, batch, side)
    iterate()
    calls, event = iterate.count(), iterate.shape[1:]
    x, t = torch.randn(iterate.shape), torch.full((batch,), 0.5)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(5):
            iterate.base.network(x, t)

    network_alone, with_adam = bare(calls, event), bare(calls, event, iterate.passes)
    ours, theirs, stepped, forward = in_turn((iterate, network_alone, with_adam, forwards), repeats)
    counted = Counter({kind: sum(n for (k, network, _), n in calls.items() if k == kind) for kind in KINDS})
    return {
        "calls": {kind: n for kind, n in counted.items() if n},
        "cpu_seconds": min(ours),
        "over_calls": ratio(ours, theirs),
        "over_calls_and_adamw": ratio(ours, stepped),
        "forwards": statistics.median(own / (other / 5) for own, other in zip(ours, forward, strict=True)),
    }


def against_plain(name: str, repeats: int) -> dict[str, float]:
    """An iteration of a method over that of the plainest loop of the same paper, at the same settings."""
    loop = plain.LOOPS[name](new_network(NETWORKS["digit flow"], 0), BATCH, (1, SIDE, SIDE), STEPS)
    ours, theirs = in_turn((Iterations(NETWORKS["digit flow"], plain.METHODS[name](STEPS)), loop), repeats)
    return ratio(ours, theirs)


def slower(stored: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """A line for each method that takes more than 20 % more than stored, in units of a forward pass."""
    return [
        f"{name}: {now[name]:.1f} forward passes, {now[name] / before:.2f} times the {before:.1f} that are stored"
        for name, before in stored.items()
        if name in now and now[name] > LIMIT_SLOWER * before
    ]


def machine() -> str:
    """The kind of machine: the model of its processor, and the version of torch."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, one thread, torch {torch.__version__.split('+')[0]}"


def peak_memory(method: str, what: str) -> None:
    """Print the peak of resident memory in MB, above what the imports take, of an iteration or its necessary part (Linux)."""
    torch.set_num_threads(1)
    settings = NETWORKS["digit flow"]
    before = _resident("VmRSS")
    if what == "iteration":
        iterate = Iterations(settings, settings_of(method))
        for _ in range(2):
            iterate()
    else:
        frozen, trained = new_network(settings, 0).requires_grad_(False), new_network(settings, 0)
        kinds = {("forward", trained, BATCH): 1, ("vjp", frozen, BATCH): 1, ("trained", trained, BATCH): 1}
        for _ in range(2):
            bare(Counter(kinds), (1, SIDE, SIDE), 1)()
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


def shown(found: Mapping[str, float]) -> str:
    return f"{found['ratio']:.3f} ({found['lower']:.3f}-{found['upper']:.3f})"


def overheads(methods: Sequence[str], networks: Sequence[str], repeats: int) -> dict[str, Any]:
    rows = {}
    print(f"\n{'method':32}{'network':12}{'calls':44}{'CPU s':>7}{'forwards':>10}{'over calls':>22}{'and AdamW':>22}")
    for method, name in product(methods, networks):
        if name != "digit flow" and method not in MAIN:
            continue
        row = rows[f"{method}, {name}"] = measure(NETWORKS[name], settings_of(method), repeats)
        calls = " + ".join(f"{n} {kind}" for kind, n in row["calls"].items())
        print(
            f"{method:32}{name:12}{calls:44}{row['cpu_seconds']:7.2f}{row['forwards']:10.1f}{shown(row['over_calls']):>22}"
            f"{shown(row['over_calls_and_adamw']):>22}",
            flush=True,
        )
    return rows


def scaled(repeats: int) -> dict[str, Any]:
    """Overheads at other sizes."""
    rows = {}
    sizes = [
        ("as above", BATCH, STEPS, SIDE),
        ("half the batch", BATCH // 2, STEPS, SIDE),
        ("twice the batch", 2 * BATCH, STEPS, SIDE),
    ]
    sizes += [
        ("half the steps", BATCH, STEPS // 2, SIDE),
        ("twice the steps", BATCH, 2 * STEPS, SIDE),
        ("half the side", BATCH, STEPS, SIDE // 2),
    ]
    sizes += [("twice the side", BATCH // 4, STEPS, 2 * SIDE)]
    print(f"\n{'scaling':32}{'size':32}{'CPU s':>7}{'over calls':>22}")
    for method, (what, batch, steps, side) in product(("adjoint-matching", "tilt-matching"), sizes):
        row = rows[f"{method}, {what}"] = measure(NETWORKS["digit flow"], settings_of(method, steps), repeats, batch, side)
        size = f"{what} ({batch}, {steps}, {side})"
        print(f"{method:32}{size:32}{row['cpu_seconds']:7.2f}{shown(row['over_calls']):>22}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="turns, at least 2")
    parser.add_argument("--methods", nargs="+", choices=names("methods"), default=names("methods"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--only", nargs="+", choices=("overhead", "plain", "scaling", "memory", "import"))
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--store", action="store_true", help=f"write what an iteration takes into {STORED.name}")
    parser.add_argument("--check", action="store_true", help="overheads alone, beside those that are stored")
    parser.add_argument("--peak-memory", nargs=2, metavar=("METHOD", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        peak_memory(*options.peak_memory)
        return

    torch.set_num_threads(1)
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    if options.check and machine() not in stored:
        parser.error(f"nothing is stored for {machine()}; run with --store on a state of the code that is known to be fast")
    wanted = (
        ["overhead"] if options.check or options.store else options.only or ["import", "overhead", "plain", "scaling", "memory"]
    )
    networks = ["digit flow"] if options.check or options.store else options.networks
    results: dict[str, Any] = {"machine": machine(), "repeats": options.repeats}
    print(f"{machine()}; batch {BATCH}, {STEPS} steps, {TRAINED} trained, {options.repeats} turns")
    if "import" in wanted:
        results["import_seconds"] = import_seconds(5)
        print(f"import tiltflow: {results['import_seconds']:.3f} s after torch (at most {LIMIT_IMPORT})")
    if "overhead" in wanted:
        results["overhead"] = overheads(options.methods, networks, options.repeats)
        print(f"at most {LIMIT_OVERHEAD} over the calls")
    if "plain" in wanted:
        results["plain"] = {name: against_plain(name, options.repeats) for name in plain.LOOPS if name in options.methods}
        print("\nover the plainest loop of the same paper")
        for name, row in results["plain"].items():
            print(f"{name:32}{shown(row)}")
    if "scaling" in wanted:
        results["scaling"] = scaled(max(options.repeats // 2, 2))
    if "memory" in wanted and os.path.exists("/proc/self/status"):
        least = float(child(__file__, "--peak-memory", options.methods[0], "necessary"))
        print(f"\npeak memory of an iteration; models, gradients, optimizer and one step's activations take {least:.0f} MB")
        results["memory_mb"] = {m: float(child(__file__, "--peak-memory", m, "iteration")) for m in options.methods}
        for name, peak in results["memory_mb"].items():
            print(f"{name:32}{peak:7.0f} MB, {peak / least:.2f} times")
    if options.store or options.check:
        now = {name.split(",")[0]: row["forwards"] for name, row in results["overhead"].items()}
    if options.store:
        stored[machine()] = {**stored.get(machine(), {}), **{name: round(value, 2) for name, value in now.items()}}
        STORED.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(results))
    if options.check and (lines := slower(stored[machine()], now)):
        print("\nslower than stored:", *lines, sep="\n  ")
        sys.exit(1)


if __name__ == "__main__":
    main()
