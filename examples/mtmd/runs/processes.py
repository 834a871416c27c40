"""torchrun: one process of several, each with its rows of every batch.

    torchrun --nproc-per-node=2 examples/mtmd_mosi.py --data mosi.pkl --text-encoder bert-base-uncased

Rank 0 leads: it alone reads and writes results, scores folds and talks. The others train along. The losses and the
queue of momentum_distill, and DDP, make of their steps what one process would make of the whole batch.
"""

import gc
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

COMMANDS = ("train",)  # what torchrun may run


@contextmanager
def started(command: str) -> Iterator[None]:
    """Inside, the processes of torchrun know each other; with a single one nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if command not in COMMANDS:
        raise ValueError(f"torchrun: expected the command {' or '.join(COMMANDS)}, got {command!r}, for one process")
    backends = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backends += ",cuda:nccl"
    dist.init_process_group(backends)  # named, for some versions of torch take nccl alone where there are GPUs
    try:
        yield
        dist.barrier()  # nobody goes while another still listens
    finally:
        gc.collect()  # DDP holds on to the group
        dist.destroy_process_group()
    # gloo's threads may outlive the group, and end a process that is done with SIGABRT: leave before they can.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def place() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this is the process that reads, writes and talks."""
    return place()[0] == 0


def in_parallel(module: nn.Module) -> DistributedDataParallel:
    """The module under DDP. Its buffers (averages, queue) are the same in all processes without being sent around."""
    # Newer versions of torch have a new name for this option, and warn of the old one.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(module, **{option: False})


def from_leader(number: float) -> float:
    """What rank 0 has; a float64."""
    if place()[1] == 1:
        return number
    sent = torch.tensor([number], dtype=torch.float64)
    dist.broadcast(sent, 0)
    return sent.item()


def everywhere(yes: bool) -> bool:
    """Whether it holds in all processes."""
    if place()[1] == 1:
        return yes
    answer = torch.tensor(int(yes))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)
