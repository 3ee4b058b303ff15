"""Peak memory: of a computation, counted as it runs on any device, and of this process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiltflow.timing import current_phase


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live tensors that were made in its context: `with PeakMemory() as memory: ..`.

    Includes what activation checkpointing recomputes in the backward pass; excludes the workspace of kernels. `by_phase` are
    the peaks in each phase of `tiltflow.timing`, and "" outside of all. Tensors that have shapes and no memory count as if they
    had it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.by_phase: dict[str, int] = {}
        self.known: set[int] = set()

    def needs(self, size: int) -> None:
        """So many bytes more are needed for a moment."""
        name = current_phase() or ""
        self.by_phase[name] = max(self.by_phase.get(name, 0), self.now + size)
        self.peak = max(self.peak, self.now + size)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for part in tree_leaves((args, kwargs)):
            if isinstance(part, Tensor):  # made before the context, or a view of what was
                storage = part.untyped_storage()
                if (key := storage._cdata) not in self.known:
                    self.known.add(key)
                    weakref.finalize(storage, self.known.discard, key)  # another storage may be there later
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            if isinstance(part, Tensor):
                self._made(part.untyped_storage())
        return out

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.needs(0)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(run: Callable[[int], object], count: int) -> int:
    """Peak bytes of `run(count)`, extrapolated linearly from `run(1)` and `run(2)`."""
    peaks: list[int] = []
    for few in range(1, min(count, 2) + 1):
        with PeakMemory() as memory:
            run(few)
        peaks.append(memory.peak)
    return peaks[0] + (count - 1) * max(peaks[-1] - peaks[0], 0)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of this process: of tensors on a GPU, since `forget_peak`; else resident ones, since it began. None where the
    operating system does not say."""
    if device.type == "cuda":
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
    except OSError:  # not on Linux
        return None


def forget_peak(device: torch.device) -> None:
    """Let the peak of a GPU begin at what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except OSError:  # not on Linux
        return 1 << 62
