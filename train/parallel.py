"""Several processes: who is who, how a model is spread over them, and the few collectives that the loop needs.

Everything is applied from outside: model files know nothing of it. ``ddp`` keeps a whole copy in every process and
averages gradients; ``fsdp`` (FSDP2, ``fully_shard``) shards parameters, gradients and optimizer state block by block.
Both *average* gradients over processes, so the loop multiplies its sum-normalised loss by the number of processes.
Parameters, gradients and their reduction are float32 in both: bfloat16 comes from autocast, so that the arithmetic of
a run does not depend on how it is spread.
"""

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from .split import Batch

logger = logging.getLogger("palimpsest.train")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among ``size`` processes, and the device that it computes on."""

    rank: int
    size: int
    device: torch.device
    owner: bool = False  # this object started the process group, and ends it

    @property
    def first(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the process group that ``torchrun`` describes in the environment, or stand alone when there is none.

    Args:
        device: ``auto`` (a GPU when there is one), ``cpu`` or ``cuda``. Collectives run on gloo for CPU tensors and
            on nccl for GPU ones.

    Raises:
        ValueError: ``cuda`` without a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device was 'cuda'; it must be 'cpu' or 'auto' on a machine without a GPU")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(where)
    owner = False
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", **_fresh_store())
        owner = True
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), where, owner)
    return World(0, 1, where)


def _fresh_store() -> dict[str, Any]:
    """Arguments for a process group that ``torchrun`` starts again: a store in which no earlier attempt has written.

    torchrun keeps one store for all attempts on a machine, and in it the addresses of processes that have ended: gloo
    would try to reach those. On several machines attempts are counted differently; there it is for torchrun to make a
    new store each time, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.
    """
    environment = os.environ
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not shared or environment.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    place = {"rank": int(environment["RANK"]), "world_size": int(environment["WORLD_SIZE"])}
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), **place}


def stop(world: World) -> None:
    """End the process group if :func:`start` began it."""
    if world.owner and dist.is_initialized():
        dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_group() -> dist.ProcessGroup | None:
    """A group of all processes on gloo, whose collectives may run in a thread beside those of the loop; None alone."""
    return dist.new_group(backend="gloo") if rank_and_size()[1] > 1 else None


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The picklable values of all processes, in order of rank, in every process."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The first process's value, in every process."""
    _, size = rank_and_size()
    if size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def total(values: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch in main memory, on a device. To a GPU it goes through pinned memory, so that the host need not wait."""
    if device.type != "cuda":
        return batch.to(device)
    borders = None if batch.cu_seqlens is None else batch.cu_seqlens.pin_memory()
    return Batch(batch.tokens.pin_memory(), batch.targets.pin_memory(), borders).to(device, non_blocking=True)


def checkpoint_blocks(blocks: nn.ModuleList, again: Collection[int] | None = None, **options: Any) -> None:
    """Keep only each block's inputs for the backward pass and run the block again there: memory for one more forward.

    Args:
        again: the numbers of the blocks that this is done with (:mod:`.recompute` chooses); None: all.
        options: those of ``torch.utils.checkpoint.checkpoint``.

    The block's ``forward`` is replaced rather than the block wrapped, so that no parameter changes its name.
    """
    for number, block in enumerate(blocks):
        if again is None or number in again:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def distribute(model: nn.Module, blocks: nn.ModuleList, kind: str, world: World, shard: int | None = None) -> nn.Module:
    """The model as the loop calls it, spread over the processes.

    Args:
        model: the same weights in every process, on ``world.device``.
        blocks: its repeated layers, each of which ``fsdp`` shards on its own.
        kind: ``none``, ``ddp`` or ``fsdp``.
        shard: with ``fsdp``, the number of processes that share one copy of the parameters; the groups of that size
            are replicas of each other (a hybrid mesh). None: all processes share one copy.

    Raises:
        ValueError: ``none`` with several processes, or ``shard`` that does not divide their number.
    """
    if kind == "none" and world.size > 1:
        raise ValueError(f"train.parallel was 'none' with {world.size} processes; it must be 'ddp' or 'fsdp'")
    if kind != "none" and world.size == 1:
        logger.info("train.parallel=%s with one process: nothing to spread, the model stays whole", kind)
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    if kind == "fsdp":
        if shard is not None and world.size % shard:
            raise ValueError(f"train.fsdp_shard was {shard}; it must divide the number of processes, {world.size}")
        if shard is None or shard == world.size:
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
        else:
            shape = (world.size // shard, shard)
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


@contextmanager
def accumulate(model: nn.Module, last: bool, *, sharded: bool = False) -> Iterator[None]:
    """Run one micro batch: gradients stay local until the ``last``, which sums them up over the processes.

    Args:
        sharded: with ``fsdp``, let each micro batch sum them up over the processes that share a copy, so that none
            keeps more of the gradients than its share: one reduction a micro batch for memory. Replicas wait for the
            last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or sharded)
        model.set_requires_all_reduce(last)
        yield
        return
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
        yield


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode; afterwards training mode, with parameters sharded as they were.

    FSDP leaves the root's parameters whole after a forward, for the backward pass that here never comes.
    """
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
        if isinstance(model, FSDPModule):
            model.reshard()
