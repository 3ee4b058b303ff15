"""Rewards on another machine, asked for while sampling goes on: the same numbers, less time, errors that are heard."""

from __future__ import annotations

import _thread
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from servers import replying
from torch import Tensor, nn

from tiltflow.errors import InputError, NonFiniteError, UserCodeError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.normalised import PerPrompt
from tiltflow.rewards.http import Http
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import validate
from tiltflow.streams import Noise, Rows, new_network, normal, stream
from tiltflow.training.batch import Batch
from tiltflow.training.draw import Decoded, at_once
from tiltflow.training.scoring import Line, Scoring
from tiltflow.training.trainer import train


@dataclass(frozen=True)
class Away:
    """A reward as one on another machine: it is told which rows it has, and remembers what it was asked."""

    request_size: int = 2
    rows: tuple[int, ...] = tuple(range(12))
    asked: list[tuple[int, ...]] = field(default_factory=list)
    value: Callable[[Tensor], Tensor] = lambda x: (x.flatten(1) * 1.7).sin().sum(1)

    def select(self, which: Any) -> Away:
        rows = self.rows[which] if isinstance(which, slice) else tuple(self.rows[i] for i in which.tolist())
        return replace(self, rows=rows)

    def __call__(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() or threading.current_thread() is threading.main_thread()
        for i in range(0, len(x), self.request_size):
            self.asked.append(self.rows[i : i + self.request_size])
        return torch.cat([self.value(part) for part in x.split(self.request_size)])


class Plain:
    """`Away` as any other reward: nothing says that it is on another machine."""

    def __init__(self, inner: Away):
        self.inner = inner

    def select(self, which: Any) -> Plain:
        return Plain(self.inner.select(which))

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x, t.expand(len(x))[:, None].to(x)], 1))
        return out


class NetSettings:
    def build(self) -> nn.Module:
        return Net()


PATIENCE = 60
"""Seconds after which what is waited for is taken not to come."""
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "orw": (OrwCfmW2, {"num_inference_steps": 3, "min_effective_sample_size": 1}),
    "orw from two models": (OrwCfmW2, {"num_inference_steps": 3, "online_fraction": 0.6, "min_effective_sample_size": 1}),
    "tilt matching": (TiltMatching, {"num_inference_steps": 3, "beta": 1.0}),
    "paths": (PathReweighted, {"num_inference_steps": 3, "beta": 1.0, "min_effective_sample_size": 1}),
    "score as action": (ScoreAsAction, {"num_inference_steps": 3}),
}


def tuned(name: str, reward: Reward, micro: int | None) -> tuple[list[Tensor], list[dict[str, float]]]:
    kind, settings = METHODS[name]
    network, base = (Flow(new_network(NetSettings(), 0)) for _ in range(2))
    records = list(
        train(
            network,
            base,
            validate(kind, settings, "method"),
            reward,
            lambda generator: normal((12, 3), generator),
            max_train_steps=3,
            micro_batch_size=micro,
        )
    )
    return [p.detach().clone() for p in network.network.parameters()], [record.metrics for record in records]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_the_same_bit_for_bit(name: str) -> None:
    """Micro-batches of 3 and requests of 2, which fit neither each other nor the two parts of a batch."""
    here, away = Plain(Away()), Away()
    known, weights = tuned(name, here, 3), tuned(name, away, 3)
    assert weights[1] == known[1]
    assert all(torch.equal(a, b) for a, b in zip(known[0], weights[0], strict=True))
    assert not torch.equal(known[0][0], new_network(NetSettings(), 0).layers[0].weight)  # type: ignore[union-attr, index]
    assert away.asked == here.inner.asked  # the same requests, in the same order
    assert {len(rows) for rows in away.asked} == {2}


def test_rows_of_a_batch_have_the_noise_of_the_whole() -> None:
    whole = normal((7, 2, 3), stream(0, "x"), torch.float64)
    generator = stream(0, "x")
    part = normal((3, 2, 3), Rows(generator, 7, slice(2, 5)), torch.float64)
    assert torch.equal(part, whole[2:5])
    assert torch.equal(normal((2,), generator), (normal((7, 2, 3), again := stream(0, "x")), normal((2,), again))[1])


def test_what_is_sent_together() -> None:
    """Parts of a batch are whole requests and whole batches of the decoder."""
    assert at_once(Plain(Away())) is None
    assert at_once(Away(6)) == 6
    assert at_once(PerPrompt(Away(6), None)) == 6  # type: ignore[arg-type]
    assert at_once(Decoded(None, Away(6), 4)) == 12  # type: ignore[arg-type]
    assert at_once(Decoded(None, Plain(Away(6)), 4)) is None  # type: ignore[arg-type]


# ---- at the same time ----


def pictures(reward: Reward) -> Batch:
    """Six micro-batches of two pictures, each sampled in two steps."""
    flow = FunctionField(lambda x, t: -x)
    return Batch(normal((12, 3, 4, 4), stream(0, "x")), flow, flow, reward, stream(0, "noise"), micro_batch_size=2)


def scored(batch: Batch, heard: Callable[[slice], None] = lambda part: None) -> Tensor:
    sampling, flow = Sampling(solver="euler", num_inference_steps=2), batch.whole(batch.tuned)
    with Scoring(batch) as scoring:

        def draw(part: slice, noise: Noise) -> Tensor:
            heard(part)
            return sample(flow.select(part), batch.x[part], sampling, noise)

        scoring.drawn(len(batch), batch.generator, draw)
        return scoring.rewards()


def test_a_server_answers_while_the_next_samples_are_drawn() -> None:
    """Each answer waits until the next micro-batch is begun, and that micro-batch until the server has been asked: one after
    the other, both would wait for ever."""
    begun, asked = ([threading.Event() for _ in range(6)] for _ in range(2))
    numbers = iter(range(6))

    def reply(path: str, body: bytes) -> tuple[int, bytes]:
        number = next(numbers)
        asked[number].set()
        met = number == 5 or begun[number + 1].wait(PATIENCE)
        return 200 if met else 404, json.dumps({"rewards": [number] * len(json.loads(body)["images"])}).encode()

    def heard(part: slice) -> None:
        number = part.start // 2
        begun[number].set()
        assert number == 0 or asked[number - 1].wait(PATIENCE)

    with replying(reply) as url:
        found = scored(pictures(Http(url=url, batch_size=2, format="npy").build()), heard)
    assert found.tolist() == [number for number in range(6) for _ in range(2)]


# ---- what goes wrong ----


def test_an_error_of_the_server_ends_the_sampling_and_the_requests() -> None:
    asking, drawn = SimpleQueue[threading.Thread](), list[int]()

    def value(x: Tensor) -> Tensor:
        asking.put(threading.current_thread())
        raise InputError("reward server: not there")

    def heard(part: slice) -> None:
        drawn.append(part.start)
        if len(drawn) == 2:
            asking.get(timeout=PATIENCE).join(PATIENCE)

    reward = Away(value=value)
    with pytest.raises(InputError, match="reward server: not there"):
        scored(pictures(reward), heard)
    assert len(drawn) == 2  # what is known to be useless is not sampled
    assert len(reward.asked) == 1


def test_an_error_of_the_last_request_is_raised() -> None:
    calls = iter(range(6))

    def value(x: Tensor) -> Tensor:
        if next(calls) == 5:
            raise KeyError("score")
        return x.flatten(1).sum(1)

    with pytest.raises(UserCodeError, match="the reward raised KeyError"):
        scored(pictures(Away(value=value)))


def test_a_number_that_is_not_finite_is_named_by_its_place_in_the_batch() -> None:
    reward = Away(value=lambda x: x.flatten(1).sum(1) / 0)
    with pytest.raises(NonFiniteError, match="not finite for 12 of 12"):
        scored(pictures(reward))


def test_an_error_of_the_sampling_ends_the_requests() -> None:
    asking, left = SimpleQueue[threading.Thread](), threading.Event()

    def value(x: Tensor) -> Tensor:
        asking.put(threading.current_thread())
        left.wait(PATIENCE)
        return x.flatten(1).sum(1)

    reward, workers = Away(value=value), list[threading.Thread]()

    def heard(part: slice) -> None:
        if part.start == 8:
            workers.append(asking.get(timeout=PATIENCE))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(pictures(reward), heard)
    left.set()
    workers[0].join(PATIENCE)
    assert len(reward.asked) == 1  # the one on its way, of four


@pytest.mark.parametrize(
    "interrupt", [lambda: os.kill(os.getpid(), signal.SIGINT), _thread.interrupt_main], ids=["wait", "before"]
)
def test_ctrl_c_is_heard_while_an_answer_is_waited_for(interrupt: Callable[[], None]) -> None:
    """Also where it comes in the instant before: then it is noted, and ends no wait."""
    line, answer = Line(), threading.Event()

    def wait() -> Tensor:
        answer.wait(PATIENCE)
        return torch.zeros(1)

    line.begin(wait)
    threading.Timer(0.05, interrupt).start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        line.results()
    assert time.perf_counter() - begin < PATIENCE / 2
    line.close()
    answer.set()
