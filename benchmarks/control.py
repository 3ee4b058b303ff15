"""Success rates of policies on a task of OGBench, by several methods on the same critics, data and episodes.

    python benchmarks/control.py run --output runs/control --seeds 0 1 2                 # goes on when it is run again
    python benchmarks/control.py run --output runs/control --updates 2000 --episodes 150 # small
    python benchmarks/control.py table --output runs/control                             # what is there, in Markdown
    python benchmarks/control.py speed                                                   # an update over its network calls

`run` generates the data, clones the behaviour of each seed, trains each method and plays its policy. All of it are commands of
`tiltflow`, which it prints, each into a folder of its own; what is there already is not done again, and a training that was
stopped goes on from its last checkpoint. `speed` prints CPU seconds of an update of Q-learning with Adjoint Matching, with all
optimizer steps, over those of the bare network calls that it makes, one thread, in turn with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tiltflow.conditions.observations import Observations
from tiltflow.flows.flow import Flow
from tiltflow.formatting import percent
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.models.policy import Policy
from tiltflow.networks.critic_ensemble import CriticEnsembleModule
from tiltflow.networks.policy_mlp import PolicyMlp, PolicyMlpModule
from tiltflow.rewards.functions.bradley_terry import share_interval
from tiltflow.rewards.q_function import QFunction
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network
from tiltflow.training.draw import batches
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.settings import Training
from tiltflow.training.trainer import train

METHODS: dict[str, list[str]] = {
    "qam": [],
    "bam": ["method.adjoint=full", "method.beta=1.0"],
    "ifql": ["method=hold", "reward.best_of=8", "training.prompts_per_step=2"],
    "fql": ["method=fql", "sampling.num_inference_steps=1", "reward.num_inference_steps=1"],
    "fbrac": ["method=fbrac"],
    "rebrac": [
        "method=rebrac",
        "sampling.num_inference_steps=1",
        "reward.num_inference_steps=1",
        "reward.distance_price=0.01",
    ],
    "fawac": ["method=rwr", "training.prompts_per_step=32", "training.num_generations=8"],
}
"""Changes to the recipe of each method, after those that are asked for."""
BEST_OF = {"ifql": 8}
"""Chunks that are chosen from when it is played."""


def tiltflow(*words: str | Path) -> None:
    """Run a command, and print it."""
    command = ["tiltflow", *map(str, words)]
    print(" ".join(command), flush=True)
    if code := subprocess.run([sys.executable, "-m", *command], stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)  # it has said why


def run(options: argparse.Namespace) -> None:
    """Do what is not there yet."""
    root, environment, task = options.output, options.environment, str(options.task)
    root.mkdir(parents=True, exist_ok=True)
    data = root / f"{environment}-task{task}.npz"
    sparse = ["--sparse"] if options.sparse else []
    if not data.exists():
        played = ["--task", task, "--episodes", str(options.data_episodes), *sparse]
        tiltflow("generate-ogbench", environment, *played, "--output", data, "--quiet")
    recipe = f"ogbench-{environment}"
    for seed in options.seeds:
        behaviour = root / f"behaviour-{seed}"
        if not behaviour.exists():
            cloned = ["--set", f"seed={seed}", "--set", f"training.max_train_steps={options.cloning}"]
            tiltflow(
                "pretrain", "behaviour-policy", "--data", data, "--output", behaviour, *cloned, "--threads", "1", "--quiet"
            )
        play(options, behaviour, root / f"bc-{seed}.json", seed, sparse)
        for method in options.methods:
            folder = root / f"{method}-{seed}"
            own = [f"model.path={behaviour}", f"conditions.data={data}", f"reward.data={data}", f"seed={seed}"]
            own += [f"reward.seed={seed}", f"training.max_train_steps={options.updates}", *options.set, *METHODS[method]]
            if not (folder / "summary.json").exists():
                changes = [word for each in own for word in ("--set", each)]
                tiltflow("train", recipe, "--output", folder, *changes, "--resume", "--threads", "1", "--quiet")
            play(options, folder, root / f"{method}-{seed}.json", seed, sparse, BEST_OF.get(method, 1))


def play(options: argparse.Namespace, policy: Path, to: Path, seed: int, sparse: list[str], best_of: int = 1) -> None:
    """Play the episodes of a policy, if they are not there."""
    if to.exists():
        return
    words = ["evaluate-policy", str(policy), "--environment", options.environment, "--task", str(options.task), *sparse]
    words += ["--episodes", str(options.episodes), "--seed", str(seed), "--best-of", str(best_of), "--threads", "1", "--json"]
    words += ["--no-base", "--films", "0"]  # the clone is played on its own
    print(" ".join(["tiltflow", *words]), flush=True)
    done = subprocess.run([sys.executable, "-m", "tiltflow", *words, "--quiet"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    to.write_text(done.stdout)


def table(options: argparse.Namespace) -> None:
    """Print the success rates that are there."""
    print("| method | seeds | updates | success | 95 %, of all episodes | value at the start | discounted return |")
    print("|---|---|---|---|---|---|---|")
    for method in ("bc", *METHODS):
        found = [json.loads(place.read_text()) for place in sorted(options.output.glob(f"{method}-*.json"))]
        if not found:
            continue
        successes, episodes = (sum(each[key] for each in found) for key in ("successes", "episodes"))
        low, high = share_interval(successes, episodes)
        value, returned = (
            f"{statistics.mean(each[key] for each in found):.1f}" if key in found[0] else "–"
            for key in ("value", "discounted_return")
        )
        cells = [
            method,
            str(len(found)),
            "0" if method == "bc" else updates_of(options.output, method),
            percent(successes / episodes),
        ]
        print(f"| {' | '.join([*cells, f'{percent(max(low, 0))} to {percent(min(high, 1))}', value, returned])} |")


def updates_of(root: Path, method: str) -> str:
    """The number of optimizer steps of the runs of a method."""
    steps = {len((each / "metrics.jsonl").read_text().splitlines()) for each in root.glob(f"{method}-*") if each.is_dir()}
    return " to ".join(f"{number:,}" for number in sorted({min(steps), max(steps)}))


# ---- speed ----


class Updates:
    """Updates of Q-learning with Adjoint Matching on random transitions, one at a call."""

    def __init__(self, data: Path, hidden: int, layers: int, members: int):
        settings = PolicyMlp(observation_dim=28, action_dim=5, horizon=5, hidden=hidden, layers=layers)
        base, self.tuned = new_network(settings, 0).requires_grad_(False), new_network(settings, 0)
        sampling = Sampling(solver="euler", num_inference_steps=10)
        policy = Policy(Flow(base), settings.event_shape, sampling, settings, observation_dim=28, horizon=5)
        self.reward = QFunction(data=str(data), members=members, hidden=hidden, layers=layers).build()
        method, training = AdjointMatching(num_inference_steps=10), Training(prompts_per_step=256, num_generations=1)
        items, _ = Observations(data=str(data)).items(())
        self.records = train(
            Flow(self.tuned),
            policy.flow,
            method,
            self.reward,
            batches(policy, items, self.reward, method, training.for_prompts(guided=False)),
            max_train_steps=10**6,
            optimizer=Optimizer(learning_rate=3e-4, lr_scheduler="constant", lr_warmup_steps=0, max_grad_norm=1.0),
            micro_batch_size=2560,
        )

    def __call__(self) -> None:
        next(self.records)

    def calls(self) -> list[tuple[str, nn.Module, list[Tensor]]]:
        """The calls of networks in an update, in order: forward, vjp or trained; the network; its arguments."""
        found = []

        def hook(network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if isinstance(network, PolicyMlpModule | CriticEnsembleModule):
                kind = "forward" if not torch.is_grad_enabled() else "vjp" if arguments[0].requires_grad else "trained"
                found.append((kind, network, [each.detach().clone() for each in arguments]))

        handle = nn.modules.module.register_module_forward_pre_hook(hook)
        self()
        handle.remove()
        return found

    def bare(self) -> Callable[[], None]:
        """The same calls in the same order, and nothing else: a network called often in a row has its weights in a cache."""
        calls = self.calls()

        def call() -> None:
            for kind, network, (x, *more) in calls:
                if kind == "forward":
                    with torch.no_grad():
                        network(x, *more)
                elif kind == "vjp":
                    y = x.detach().requires_grad_()
                    torch.autograd.grad(network(y, *more).sum(), y)
                else:
                    network(x, *more).sum().backward()
            self.tuned.zero_grad()
            self.reward.network.zero_grad()

        return call


def cpu_seconds(function: Callable[[], None]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def speed(options: argparse.Namespace) -> None:
    """Print the ratio of two sizes: of the recipes, and as published."""
    torch.set_num_threads(1)
    rng, rows = np.random.default_rng(0), 20_000
    with tempfile.TemporaryDirectory() as folder:
        data, ends = Path(folder) / "data.npz", (np.arange(rows) % 200 == 199).astype(np.float32)
        seen, taken = (rng.normal(size=(rows, count)).astype(np.float32) for count in (28, 5))
        rewards, masks = rng.normal(size=rows).astype(np.float32), np.ones(rows, np.float32)
        np.savez(data, observations=seen, actions=np.tanh(taken), terminals=ends, rewards=rewards, masks=masks)
        for name, size in (("256 x 3, 2 critics", (256, 3, 2)), ("512 x 4, 10 critics", (512, 4, 10))):
            update = Updates(data, *size)
            update()
            bare = update.bare()
            bare()
            turns = [(cpu_seconds(update), cpu_seconds(bare)) for _ in range(options.repeats)]
            lower, middle, upper = statistics.quantiles((own / other for own, other in turns), n=4, method="inclusive")
            print(f"{name}: {min(own for own, _ in turns):.3f} s, {middle:.2f} x the bare calls ({lower:.2f} to {upper:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table", "speed"))
    parser.add_argument("--output", type=Path, default=Path("runs/control"))
    parser.add_argument("--environment", default="cube-single", help="one that has a recipe, ogbench-NAME")
    parser.add_argument("--task", type=int, default=1)
    parser.add_argument("--sparse", action="store_true", help="rewards of -1 until the task is over")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["qam", "bam", "ifql", "fql"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further changes to all recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data-episodes", type=int, default=1000, help="episodes of play")
    parser.add_argument("--cloning", type=int, default=30_000, help="optimizer steps of the clone")
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--episodes", type=int, default=50, help="episodes that each policy plays")
    parser.add_argument("--repeats", type=int, default=12, help="turns of speed, at least 2")
    options = parser.parse_args()
    {"run": run, "table": table, "speed": speed}[options.what](options)


if __name__ == "__main__":
    main()
