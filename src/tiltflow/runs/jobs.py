"""Jobs in parallel processes: what a sweep and a comparison do with their many runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from typing import TypeVar

from tiltflow.plugins import allow_code, code_allowed

J = TypeVar("J")
R = TypeVar("R")


def run_all(work: Callable[[J], R], jobs: Sequence[J], processes: int = 1) -> Iterator[tuple[J, R]]:
    """Yield each job with its result, as they are done: of one process, this one, in order. `work` and jobs can be pickled.

    An exception of a job, or Ctrl-C, ends it: what has not begun is not begun.
    """
    if processes == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(min(processes, max(len(jobs), 1)), multiprocessing.get_context("spawn")) as pool:
        begun = {pool.submit(_with_threads, work, job, threads, code_allowed()): job for job in jobs}
        try:
            for done in as_completed(begun):
                yield begun[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _with_threads(work: Callable[[J], R], job: J, threads: int, code_of_runs: bool) -> R:
    """Work on so many threads, in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    with allow_code() if code_of_runs else nullcontext():
        return work(job)
