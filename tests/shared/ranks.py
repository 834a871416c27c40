"""Several processes for the tests of torch.distributed, started once and used by one test after the other."""

import faulthandler
import importlib
import multiprocessing
import os
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

LIMIT = 900.0  # seconds after which ranks hang, on whatever machine; a case takes one or two
DEVICE = os.environ.get("MOMENTUM_DISTILL_DEVICE", "cpu")
"""Where the ranks compute: "cuda" has them speak over nccl, all on one GPU if there are not enough."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.tensor.debug", "momentum_distill"])  # a second for each


class Ranks:
    """Worker processes that wait for work. A case that hangs or dies takes them with it, and the next starts anew."""

    def __init__(self) -> None:
        self.workers: list = []
        self.cases = 0
        self.folder = TemporaryDirectory()

    def run(self, world: int, function: str, *args: object, limit: float = LIMIT) -> list:
        """Call `module:function(*args)` on `world` ranks; what each returns, in rank order.

        Raises:
            AssertionError: With the traceback of the first rank that failed, or where the ranks hang.
        """
        while len(self.workers) < world:
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        self.cases += 1
        store = Path(self.folder.name) / f"store{self.cases}"
        for rank, (_, pipe) in enumerate(self.workers[:world]):
            pipe.send((function, args, rank, world, store.as_uri(), limit))
        deadline = time.monotonic() + limit
        answers: list = []
        for process, pipe in self.workers[:world]:
            try:
                arrived = pipe.poll(max(0.0, deadline - time.monotonic()))
                answers.append(pipe.recv() if arrived else ("failed", f"no answer within {limit:g} s"))
            except (EOFError, ConnectionError):
                process.join(timeout=5)
                answers.append(("failed", f"the process ended with code {process.exitcode}"))
        failed = [f"rank {rank} of {world}: {answer}" for rank, (how, answer) in enumerate(answers) if how == "failed"]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End all processes and forget what they shared."""
        self.folder.cleanup()
        self.stop()

    def stop(self) -> None:
        """End all processes."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def _work(pipe) -> None:
    """What a worker does until its pipe is closed."""
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    while True:
        try:
            function, args, rank, world, store, limit = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(limit - 2)
        try:
            torch.manual_seed(0)
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            if DEVICE == "cuda":
                # NCCL refuses two ranks of one host on one GPU: let it think that each has a host of its own.
                os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo")
                torch.cuda.set_device(rank % torch.cuda.device_count())
            backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[DEVICE]
            dist.init_process_group(
                os.environ.get("MOMENTUM_DISTILL_BACKEND", backend),
                init_method=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=limit),
            )
            dist.barrier()  # a rank with nothing to say would else be gone before the last one is connected
            module, _, name = function.partition(":")
            answer = "returned", getattr(importlib.import_module(module), name)(*args)
        except BaseException:
            answer = "failed", traceback.format_exc()
        finally:
            faulthandler.cancel_dump_traceback_later()
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
