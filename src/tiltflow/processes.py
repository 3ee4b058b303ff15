"""Several processes, each with a device of its own, that work on one run: `accelerate launch -m tiltflow train ..`.

Every process runs the same algorithm on the same batch with the same random numbers. The expensive part, evaluating networks
and rewards, is split: each process evaluates its `shares` of the batch, and the results are `gathered`. So a method computes
a mean, a weight or an advantage among the samples of a prompt from the samples of all processes, and its result is that of one
process up to rounding. What is large and of a sample alone, such as its trajectory, only the process has whose share it is in.
Gradients are all-reduced once for each optimizer step.

Weights are replicated (data parallelism), or sharded (FSDP2) where accelerate is configured so. The main process (rank 0)
alone writes files, except for the shards of a checkpoint.

With one process, every function here is a no-op. With several, all of them must call each function, in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiltflow.errors import InputError, TiltflowError, not_installed

_SHARDED: WeakSet[Any] = WeakSet()
"""Modules whose weights are sharded."""


def launched() -> int:
    """The number of processes that a launcher, such as accelerate or torchrun, has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def begin(device: str) -> str:
    """Join the other processes, if a launcher has started several. Returns the device of this one.

    Raises InputError if accelerate is not installed, or is configured for DeepSpeed or FSDP1.
    """
    if launched() == 1:
        return device
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":  # its engine would do the optimizer's steps, unchecked
        raise InputError(
            "DeepSpeed is not supported; FSDP2 shards the same: accelerate launch --use_fsdp --fsdp_version 2"
            " --fsdp_reshard_after_forward true (as ZeRO-3) or false (as ZeRO-2)"
        )
    try:
        from accelerate import Accelerator
    except ImportError:
        raise not_installed("several processes: accelerate", "accelerate") from None
    if (plugin := _sharding()) is not None and plugin.fsdp_version != 2:
        raise InputError("FSDP1 is not supported: accelerate launch --use_fsdp --fsdp_version 2")
    own = Accelerator(cpu=device == "cpu", mixed_precision="no").device  # the recipe sets the precision
    return "cpu" if own.type == "cpu" else str(own)


def _sharding() -> Any:
    """Accelerate's configuration of FSDP, or None if weights are not sharded."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


def end() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """The number of processes of this run (world size)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """True in the main process (rank 0), which alone writes files and prints."""
    return index() == 0


# ---- shares of a batch ----


def share_of(size: int) -> int:
    """The number of rows, of `size`, that each process evaluates: the same for all, so that all call their networks equally
    often."""
    return -(-size // count())


def _first(process: int, size: int) -> int:
    """The first row of a process's share. The last shares are moved back to stay inside, and overlap with those before."""
    return min(process * share_of(size), size - share_of(size))


def shares(size: int, at_most: int | None = None) -> list[slice]:
    """The rows of a batch of `size` that this process evaluates, in micro-batches of at most `at_most`.

    >>> shares(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    begin = _first(index(), size)
    return cut(slice(begin, begin + share_of(size)), at_most)


def cut(rows: slice, at_most: int | None) -> list[slice]:
    """These rows, at most `at_most` at a time."""
    most = at_most or max(rows.stop - rows.start, 1)
    return [slice(i, min(i + most, rows.stop)) for i in range(rows.start, rows.stop, most)]


def first_counted(size: int) -> int:
    """The first row of this process's share that no process before it evaluates: where a sum over rows begins."""
    return index() * share_of(size)


def gathered(parts: Sequence[Tensor], size: int, dim: int = 0) -> Tensor:
    """All-gather the results of all processes for their `shares` of `size` rows, in order along `dim`."""
    own = torch.cat(list(parts), dim)
    if count() == 1:
        return own
    own = own.detach().contiguous()
    each = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(each, own)
    whole = own.new_empty((*own.shape[:dim], size, *own.shape[dim + 1 :]))
    for process, part in enumerate(each):
        whole.narrow(dim, _first(process, size), part.shape[dim]).copy_(part)
    return whole


# ---- agreement ----


def total(value: float, device: torch.device) -> float:
    """All-reduce a number by its sum over processes."""
    return value if count() == 1 else _reduced(value, device, dist.ReduceOp.SUM)


def greatest(value: int, device: torch.device) -> int:
    """All-reduce a number by its maximum over processes."""
    return value if count() == 1 else int(_reduced(value, device, dist.ReduceOp.MAX))


def _reduced(value: float, device: torch.device, operation: Any) -> float:
    cell = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(cell, operation)
    return cell.item()


def exchanged(value: Any) -> list[Any]:
    """All-gather a JSON value, in rank order. As JSON, so that nothing received is executed."""
    if count() == 1:
        return [value]
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    said = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor(len(said), device=device))
    longest = int(torch.stack(sizes).max())
    each = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(count())]
    dist.all_gather(each, torch.cat([said, said.new_zeros(longest - len(said))]))
    return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(each, sizes, strict=True)]


def wait() -> None:
    """Wait for all processes (a barrier)."""
    exchanged(None)


def by_main(write: Callable[[], None]) -> None:
    """Let the main process write files, while the others wait."""
    if is_main():
        write()
    wait()


def from_main(work: Callable[[], object]) -> None:
    """Let the main process do something that all processes depend on. A TiltflowError that it raises is raised in all."""
    problem: TiltflowError | None = None
    if is_main():
        try:
            work()
        except TiltflowError as error:
            problem = error
    said = exchanged(None if problem is None else [isinstance(problem, InputError), str(problem)])[0]
    if problem is not None:
        raise problem
    if said is not None:
        raise InputError(said[1]) if said[0] else TiltflowError(said[1])


# ---- gradients and sharded weights ----


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce the gradients; FSDP has already reduced sharded ones."""
    sum_up([p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)])


def sum_up(tensors: Sequence[Tensor]) -> None:
    """All-reduce tensors by their sum over processes, in place, many in one message."""
    if count() == 1:
        return
    for run in _joined(tensors):
        flat = torch.cat([tensor.flatten() for tensor in run])
        dist.all_reduce(flat)
        for tensor, summed in zip(run, flat.split([tensor.numel() for tensor in run]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def _joined(tensors: Sequence[Tensor], at_most: int = 2**23) -> Iterator[list[Tensor]]:
    """Cut into runs of one type and device, with at most so many elements in all where there are several."""
    run, elements = list[Tensor](), 0
    for tensor in tensors:
        alike = not run or (tensor.dtype, tensor.device) == (run[0].dtype, run[0].device)
        if run and not (alike and elements + tensor.numel() <= at_most):
            yield run
            run, elements = [], 0
        run.append(tensor)
        elements += tensor.numel()
    if run:
        yield run


def distribute(*networks: Any) -> None:
    """Shard the weights of these networks, in place, if accelerate is configured for FSDP2. Raises InputError if they are
    quantized."""
    if count() == 1 or (plugin := _sharding()) is None:
        return
    roots = [getattr(network, "network", network) for network in networks]
    if any(type(parameter) is not nn.Parameter for root in roots for parameter in root.parameters()):
        raise InputError("FSDP does not shard quantized weights: leave model.quantization out, or launch without --use_fsdp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    for network in {id(network): network for network in networks}.values():
        root = getattr(network, "network", network)  # a pipeline's network is inside a wrapper that knows how to call it
        mesh = init_device_mesh(next(root.parameters()).device.type, (count(),))
        blocks = plugin.transformer_cls_names_to_wrap or getattr(root, "_no_split_modules", None) or ()
        for parameter in root.parameters():
            parameter.data = parameter.data.contiguous()  # FSDP takes no other layout
        for module in reversed(list(root.modules())):  # the inner ones first
            if module is root or type(module).__name__ in blocks:
                sharded = fully_shard(module, mesh=mesh, **options)
                sharded.set_force_sum_reduction_for_comms(True)
                sharded.set_gradient_divide_factor(1.0)  # a sum, not a mean
                _SHARDED.add(sharded)


def weights_changed() -> None:
    """Drop gathered copies of sharded weights. Call this after writing to sharded weights other than by an optimizer after a
    backward pass: a copy that an earlier forward pass has gathered would be used again."""
    for module in _SHARDED:
        module.reshard()


@contextmanager
def whole(network: Any) -> Iterator[None]:
    """In this context, the state_dict of a network with sharded weights gives whole tensors in the main process."""
    if count() == 1 or _sharding() is None:
        yield
        return
    root = getattr(network, "network", network)
    tensors = {}
    for name, value in root.state_dict().items():
        tensor = full(value)  # a collective, one tensor at a time
        if is_main():
            tensors[name] = tensor.cpu()

    def put(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        for name, tensor in tensors.items():
            state[prefix + name] = tensor

    hook = root.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        hook.remove()


def is_sharded(tensor: Tensor) -> bool:
    """True if a tensor is sharded, so that this process has only a part of it."""
    if count() == 1:
        return False
    from torch.distributed.tensor import DTensor  # slow to import

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or the tensor itself if it is not sharded."""
    part: Any = tensor
    return part.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, all-gathered on every process if it is sharded."""
    part: Any = tensor
    return part.full_tensor() if is_sharded(tensor) else tensor


def part_like(saved: Tensor, own: Tensor) -> Tensor:
    """Shard a whole tensor as `own` is sharded."""
    if not is_sharded(own):
        return saved
    from torch.distributed.tensor import distribute_tensor

    like: Any = own
    part: Tensor = distribute_tensor(saved.to(own.device, own.dtype), like.device_mesh, like.placements, src_data_rank=None)
    return part
