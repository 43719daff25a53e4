"""One run over several processes: what each needs to know of the others. With one process all of it is the identity.

Every process holds the same agents, an equal share of each member's environments, and an equal share of each
minibatch. So the mean of a gradient over the processes is the gradient of the whole minibatch, provided that whatever
else enters the loss (the ESS, the scale of the advantages) is computed over the whole minibatch too. The functions here
ensure that. They are called under `vmap` and compiled together with the surrounding code, which torch's own collectives
cannot be; all processes must call them in the same order.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils import _pytree as pytree

from ess_rl.contract import Tree


def world_size() -> int:
    """Number of processes that share the run: K."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_world_size() -> int:
    """Number of the run's processes on this machine, this one included."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 and "LOCAL_WORLD_SIZE" in os.environ else 1


def all_sum(x: Tensor) -> Tensor:
    """Element-wise sum over the processes. No gradient flows through."""
    return _all_reduce(x, "sum") if world_size() > 1 else x


def all_max(x: Tensor) -> Tensor:
    """Element-wise maximum over the processes. No gradient flows through."""
    return _all_reduce(x, "max") if world_size() > 1 else x


def mean(x: Tensor) -> Tensor:
    """Mean of all elements of all processes. No gradient flows between processes."""
    return all_mean(x.mean())


def all_samples(x: Tensor) -> Tensor:
    """The samples [n, ...] of all processes, concatenated: [K n, ...]. No gradient flows through."""
    return _all_gather(x).flatten(0, 1) if world_size() > 1 else x


def all_mean(tree: Tree) -> Tree:
    """Element-wise mean of each leaf over the processes, in one message. All leaves have the same dtype."""
    if world_size() == 1:
        return tree
    leaves, spec = pytree.tree_flatten(tree)
    flat = all_sum(torch.cat([leaf.flatten() for leaf in leaves])) / world_size()
    parts = flat.split([leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)], spec)


def pooled(samples: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and variance (dividing by n) of the samples of all processes, from those of each process."""
    if world_size() == 1:
        return samples, mean, var
    of_all = all_mean(mean)
    return samples * world_size(), of_all, all_mean(var + (mean - of_all).square())


def share(x: Tensor, dim: int) -> Tensor:
    """This process's equal part of `x` along `dim`, the axis of the environments of all processes."""
    return x.chunk(world_size(), dim)[rank()]


def gathered(x: Tensor, dim: int) -> Tensor:
    """The parts of all processes joined along `dim`, on every process: the inverse of `share`."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def broadcast(tree: Tree) -> Tree:
    """The first process's leaves, on every process; shapes and dtypes are the same on all of them."""
    if world_size() == 1:
        return tree
    leaves, spec = pytree.tree_flatten(tree)
    copies = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
    for copy in copies:
        dist.broadcast(copy, src=0)
    return pytree.tree_unflatten(copies, spec)


def first_word(word: str | None) -> str | None:
    """The message of the first process that has one; None if none has."""
    words: list[str | None] = [word]
    if world_size() > 1:
        words = [None] * world_size()
        dist.all_gather_object(words, word)
    return next((said for said in words if said is not None), None)


_told = False  # whether the other processes have been given their task


def join() -> None:
    """Connect to the other processes of torchrun: over Gloo, and over NCCL for tensors on a GPU."""
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


def tell(task: Any) -> None:
    """Send the first process's task to all others, whose `hear` returns it. Once; JSON-like, or None: nothing to do."""
    global _told
    if world_size() > 1 and not _told:
        _told = True
        dist.broadcast_object_list([task], src=0)


def hear() -> Any:
    """Wait for the task that the first process sends, and return it."""
    task = [None]
    dist.broadcast_object_list(task, src=0)
    return task[0]


def leave() -> None:
    """Leave the group. The first process releases the others, in case they still wait for a task."""
    if rank() == 0:
        tell(None)
    dist.destroy_process_group()


@torch.library.custom_op("ess_rl::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, how: str) -> Tensor:
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return result


@_all_reduce.register_fake
def _(x: Tensor, how: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_all_reduce.register_vmap
def _(info: Any, in_dims: tuple[int | None, None], x: Tensor, how: str) -> tuple[Tensor, int | None]:
    return _all_reduce(x, how), in_dims[0]  # element-wise: an extra axis makes no difference


@torch.library.custom_op("ess_rl::all_gather", mutates_args=())
def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


@_all_gather.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(world_size(), *x.shape)


@_all_gather.register_vmap
def _(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return _all_gather(x), None if in_dims[0] is None else in_dims[0] + 1  # the axis of processes comes first
