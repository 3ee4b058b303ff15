"""Time by phase and peak memory: exclusive, of training alone, and the same in the lines, the summary and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_recipe
from torch import Tensor, nn

from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.runs.run_files import read_records
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream
from tiltflow.timing import PHASES, Clock, phase
from tiltflow.training.memory import peak_memory
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.records import of_machine, speed
from tiltflow.training.trainer import train

Tick = Callable[[float], None]


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Tick:
    """Moves the clock on, which stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr("tiltflow.timing.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def moves(seconds: float) -> None:
        now[0] += seconds

    return moves


def none_but(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PHASES, 0.0) | seconds


def test_a_phase_inside_another_is_not_counted_in_it(tick: Tick) -> None:
    @phase("reward")
    def reward() -> None:
        tick(2)

    with Clock(torch.device("cpu")) as clock:
        tick(100)
        with phase("adjoint"):
            tick(1)
            reward()
            tick(10)
            with phase("adjoint"):
                tick(20)
            with phase("update"), pytest.raises(ZeroDivisionError), phase("reward"):
                tick(5) or 1 / 0
        tick(100)
        with clock.paused(), phase("rollout"):
            tick(100)
        with Clock(torch.device("cpu")) as inner:
            reward()
        with phase("rollout"):
            tick(40)
        assert inner.taken() == none_but(reward=2)
        assert clock.taken() == none_but(adjoint=31, reward=7, rollout=40)
        assert clock.taken() == none_but()
    with phase("rollout"):  # nobody listens
        tick(100)
    assert clock.taken() == none_but()


class Slow(nn.Module):
    """x -> a multiple of x, in so many seconds."""

    def __init__(self, tick: Tick, seconds: float):
        super().__init__()
        self.scale, self.tick, self.seconds = nn.Parameter(torch.full((), -0.5)), tick, seconds

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.tick(self.seconds)
        return self.scale * x


OF_METHODS: dict[str, tuple[Any, dict[str, float]]] = {
    # 5 steps, the last without noise: 4 of the tuned network, 5 of the base and a reward, and 4 in micro-batches
    "adjoint matching": (AdjointMatching(num_inference_steps=5), none_but(rollout=4, adjoint=500, reward=1e4, update=4)),
    # 3 steps of Heun in a rollout, of two evaluations each but for the last, and 1 of both networks in the regression
    "orw-cfm-w2": (
        OrwCfmW2(solver="heun", num_inference_steps=3, num_passes=1, alpha=0.5),
        none_but(rollout=5, reward=1e4, update=101),
    ),
    # 4 steps of two evaluations, but for the last, without noise, which the base takes alone; 2 passes of the tuned network
    "path-reweighted": (
        PathReweighted(num_inference_steps=4, path_steps=4, proposal="mixture", num_passes=2, beta=9.0),
        none_but(rollout=706, reward=1e4, update=2),
    ),
}


@pytest.mark.parametrize("name", OF_METHODS)
def test_phases_of_methods(name: str, tick: Tick) -> None:
    """Each evaluation of the tuned network takes 1 second, of the base 100, of the reward 10,000: how many there are in each
    phase can be read off. What a receiver of records computes is not counted."""
    method, expected = OF_METHODS[name]
    tuned, base = Flow(Slow(tick, 1.0)), Flow(Slow(tick, 100.0).requires_grad_(False))

    def reward(x: Tensor) -> Tensor:
        tick(1e4)
        return -x.square().sum(1)

    draws = train(
        tuned,
        base,
        method,
        reward,
        lambda generator: torch.randn(8, 2, generator=generator),
        max_train_steps=2 * getattr(method, "num_passes", 1),
        optimizer=Optimizer(learning_rate=1e-3),
    )
    found = []
    for record in draws:
        found.append(record.seconds_by_phase)
        sample(base, torch.zeros(1, 2), Sampling(num_inference_steps=2), stream(0))
    whole = {name: sum(each[name] for each in found) for name in PHASES}
    assert whole == {name: 2 * seconds for name, seconds in expected.items()}


def test_a_critic_is_updated_in_the_phase_of_updates(tick: Tick) -> None:
    tuned, base = Flow(Slow(tick, 1.0)), Flow(Slow(tick, 100.0).requires_grad_(False))
    critic = {"network": {"name": "mlp", "dimension": 2, "outputs": 1, "hidden": 4, "layers": 1}, "num_steps": 3}
    method = ScoreAsAction(num_inference_steps=3, critic=critic)
    (record,) = train(
        tuned,
        base,
        method,
        lambda x: -x.square().sum(1),
        lambda generator: torch.randn(8, 2, generator=generator),
        max_train_steps=1,
    )
    assert record.seconds_by_phase["rollout"] > 0
    assert record.seconds_by_phase["update"] > 0


def test_the_peak_of_the_process_is_a_peak() -> None:
    cpu, size = torch.device("cpu"), 300_000_000
    before = peak_memory(cpu)
    if before is None:
        pytest.skip("the operating system does not say")
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    del_me = torch.ones(size, dtype=torch.uint8)
    after = peak_memory(cpu)
    assert after is not None
    assert after >= max(before, resident + size - 10_000_000)
    del del_me
    assert peak_memory(cpu) == pytest.approx(after, rel=0.02)


# ---- what is told ----


def row(step: int, seconds: float, evaluations: int, drawn: int, **others: float) -> dict[str, Any]:
    return {"step": step, "seconds": seconds, "network_evaluations": evaluations, "samples_drawn": drawn, **others}


def test_rates_are_those_after_the_first_batch_and_its_calibration() -> None:
    """Two steps for each batch of 64 samples, in 4 seconds; the first took 10 more, and 5,000 evaluations before it."""
    rows = [
        row(1, 12.0, 5400, 64, seconds_rollout=1.0, seconds_update=0.5, peak_memory_bytes=100),
        row(2, 14.0, 5800, 64, seconds_update=0.5, peak_memory_bytes=300),
        row(3, 16.0, 6200, 128, seconds_rollout=1.5, seconds_update=0.5, peak_memory_bytes=200),
        row(4, 18.0, 6600, 128, seconds_update=0.5),
    ]
    assert speed(rows) == {
        "seconds_by_phase": {"rollout": 2.5, "adjoint": 0.0, "reward": 0.0, "update": 2.0, "other": 13.5},
        "samples_per_second": 16.0,
        "network_evaluations_per_second": 200.0,
        "peak_memory_bytes": 300,
    }
    assert speed(rows[:2])["samples_per_second"] is None  # there is no second batch
    earlier = [{"step": 9, "seconds": 1.0, "network_evaluations": 1}]  # of a version that counted none of this
    assert set(speed(earlier).values()) == {None}


def test_lines_summary_and_report_of_a_run(tmp_path: Path) -> None:
    summary = run(validate(Recipe, read_yaml(tiny_recipe(tmp_path)), "recipe"), tmp_path / "run")
    rows = read_records(tmp_path / "run")
    for each in rows:
        assert all(each[f"seconds_{name}"] > 0 for name in PHASES)
        assert each["peak_memory_bytes"] > 1e7
        assert {key for key in each if of_machine(key)} == {
            "seconds", "peak_memory_bytes", *(f"seconds_{name}" for name in PHASES)
        }  # fmt: skip
    parts = summary["seconds_by_phase"]
    assert sum(parts.values()) == pytest.approx(rows[-1]["seconds"], abs=1e-3)
    assert summary["samples_per_second"] == pytest.approx(4 * 3 / (rows[-1]["seconds"] - rows[0]["seconds"]))
    page = (tmp_path / "run" / "report.html").read_text()
    table = page[page.index("Speed and memory") : page.index(">Run<")]
    for title in ("Samples per second", "Network evaluations per second", "Time of rewards", "Time of all else", "Peak memory"):
        assert f"<th>{title}</th>" in table
    assert f"{summary['peak_memory_bytes'] / 1e6:.1f} MB" in table or " GB" in table
    again = evaluate_run(tmp_path / "run")
    assert {key: again[key] for key in speed(rows)} == json.loads(json.dumps({key: summary[key] for key in speed(rows)}))
