"""Rewards of the samples of a batch. What is computed elsewhere is asked for in the background, while sampling goes on."""

# Mutation tests: test_scoring.py

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

import torch
from torch import Tensor

from tiltflow import processes
from tiltflow.rewards import Reward, select
from tiltflow.rewards.functions.checked import Answered, evaluate, shared, values_of
from tiltflow.rewards.functions.counting import count_rewards
from tiltflow.rewards.functions.prompted import prompts_of
from tiltflow.streams import Noise, Rows
from tiltflow.timing import phase
from tiltflow.training.batch import Batch
from tiltflow.training.draw import Decoded, at_once

Drawn = TypeVar("Drawn")


class Scoring:
    """The rewards of all samples of a batch, for methods that need no gradient of it. The samples are added as they are drawn:

        with Scoring(batch) as scoring:
            x = joined(scoring.drawn(len(batch), batch.generator, lambda part, noise: ..))
            rewards = scoring.rewards()

    A reward on another machine is asked by a thread, one request after another, for each part of the batch that is there, while
    the next is sampled. Networks, decoder and server see the same parts as if all were sampled first, with the same noise: so
    every number is the same. Other rewards, and those of several processes, are computed once all samples are there.
    """

    def __init__(self, batch: Batch):
        self.batch = batch
        self.size = at_once(batch.reward) if processes.count() == 1 else None
        """How many samples are sent together, if the reward is on another machine."""
        self.samples: list[Tensor] = []
        self.asked = 0
        self.found: Tensor | None = None
        self.line = Line()

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *error: object) -> None:
        self.line.close()

    def drawn(
        self,
        count: int,
        generator: torch.Generator,
        draw: Callable[[slice, Noise], Drawn],
        ends: Callable[[Drawn], Tensor] = lambda drawn: cast(Tensor, drawn),
    ) -> list[Drawn]:
        """Draw the next `count` samples, and add them: micro-batch after micro-batch if they are sent, all together if not.

        Args:
            draw: draws the samples of this part, with this noise.
            ends: the samples [part, *event] among what it returns.
        """
        if self.size is None or self.batch.micro_batch_size is None:
            found = draw(slice(0, count), generator)
            self.add(ends(found))
            return [found]
        before, results = generator.get_state(), []
        for part in processes.shares(count, self.batch.micro_batch_size):
            generator.set_state(before)  # every part draws the noise of all, and takes its own
            results.append(draw(part, Rows(generator, count, part)))
            self.add(ends(results[-1]))
        return results

    def add(self, x: Tensor) -> None:
        """Add samples [part, *event], the next ones of the batch."""
        self.samples.append(x)
        there, whole = sum(map(len, self.samples)), len(self.batch)
        if self.size is None:
            if there == whole:
                self.found = self._checked(shared(self.batch.reward))
            return
        while self.asked < there and min(self.asked + self.size, whole) <= there:
            part = slice(self.asked, min(self.asked + self.size, whole))
            self._ask(select(self.batch.reward, part), joined(self.samples)[part])
            self.asked = part.stop

    def _ask(self, reward: Reward, x: Tensor) -> None:
        if isinstance(reward, Decoded):  # here: the decoder is a network, and two threads do not share its device well
            with phase("reward"):
                x = reward.decoded(x)
            reward = reward.reward
        count_rewards(len(x))  # the thread is in no context
        self.line.begin(lambda: values_of(reward, x))

    @phase("reward")
    def rewards(self) -> Tensor:
        """The rewards [batch] of all samples, waited for. Raises what `evaluate` does."""
        if self.found is None:
            self.found = self._checked(Answered(torch.cat(self.line.results()), prompts_of(self.batch.reward)))
        return self.found

    def _checked(self, reward: Reward) -> Tensor:
        return evaluate(reward, joined(self.samples), self.batch.non_finite).detach()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All rows of all parts; of a single one no copy is made."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class Line:
    """Functions that are called in a thread, one after another. The first error ends it."""

    def __init__(self) -> None:
        self.waiting: SimpleQueue[Callable[[], Tensor] | None] = SimpleQueue()
        self.answers: SimpleQueue[Tensor | BaseException] = SimpleQueue()
        self.count = 0
        self.error: BaseException | None = None
        self.ended = False

    def begin(self, function: Callable[[], Tensor]) -> None:
        """Call this function after those before it. Raises the error of one of these."""
        if self.error is not None:
            raise self.error
        if not self.count:
            threading.Thread(target=self._work, daemon=True).start()
        self.count += 1
        self.waiting.put(function)

    def results(self) -> list[Tensor]:
        """The results of all functions, in order. Raises the first error."""
        found = []
        for _ in range(self.count):
            answer = self._next()
            if isinstance(answer, BaseException):
                raise answer
            found.append(answer)
        return found

    def _next(self) -> Tensor | BaseException:
        """Waits in short turns: Ctrl-C is not heard by a wait that begins in the instant in which it comes."""
        while True:
            with suppress(Empty):
                return self.answers.get(timeout=1)

    def close(self) -> None:
        """Call no function any more."""
        self.ended = True
        self.waiting.put(None)

    def _work(self) -> None:
        while (function := self.waiting.get()) is not None and not self.ended:
            try:
                with torch.no_grad():  # a thread begins with gradients
                    self.answers.put(function())
            except BaseException as error:
                self.error = error
                self.answers.put(error)
                return
