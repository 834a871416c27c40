"""What several processes send each other in a training step of MTMD: collectives, bytes and time, by block.

    python benchmarks/bench_ranks.py                 1 to 4 processes on this machine, gloo; about two minutes
    python benchmarks/bench_ranks.py --rows 8        rows that each process has of a batch

Counted inside the library, at the two functions through which everything goes, and in DDP. The processes share the
cores of one machine, so the times show what a collective costs here, not how training scales.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import commit, device_name
from momentum_distill import _group

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from mtmd.data.batches import batches
from mtmd.data.synthetic import synthetic_dataset
from mtmd.runs.processes import place
from mtmd.runs.training import shared
from mtmd.settings import cli
from mtmd.settings.config import Config
from mtmd.settings.options import config_from
from mtmd.train import begin, prepare, train_step

STEPS, WARM_UP = 12, 2


class Counter:
    """Collectives by kind: how many, how many bytes a process sends in, how long it waits for them."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)
        self.seconds = 0.0

    def watch(self) -> None:
        """Count what the library sends from now on."""
        for name, kind in (("_gather_into", "gather"), ("_scatter_into", "reduce-scatter")):
            real = getattr(_group, name)

            def counted(came: Tensor, sent: Tensor, *, group: object, real=real, kind=kind) -> None:
                self.add(kind, sent.nbytes)
                started = time.perf_counter()
                real(came, sent, group=group)
                self.seconds += time.perf_counter() - started

            setattr(_group, name, counted)

    def add(self, kind: str, size: int) -> None:
        label = kind if kind != "gather" else {64: "sum", 24: "sizes"}.get(size, "rows")
        self.calls[label] += 1
        self.bytes[label] += size

    def reset(self) -> None:
        self.calls.clear()
        self.bytes.clear()
        self.seconds = 0.0


def work(rank: int, world: int, config: Config, folder: str) -> None:
    """One process: train a few steps and write what was counted in one of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"{Path(folder).as_uri()}/store{world}", rank=rank, world_size=world)
    counter = Counter()
    counter.watch()
    dataset = synthetic_dataset(seed=0)
    folds, _ = prepare(dataset, config)
    state = shared(begin(config, folds, dataset.widths, 1, torch.device("cpu")))
    if isinstance(state.step_module, DistributedDataParallel):

        def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            counter.add("gradients (DDP)", bucket.buffer().nbytes)
            done = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
            return done.then(lambda future: future.value()[0])

        state.step_module.register_comm_hook(None, hook)
    stream = batches(folds["train"], config.batch_size, place=place())
    seconds, waiting, calls, sizes = [], [], {}, {}
    for number, batch in zip(range(WARM_UP + STEPS), stream, strict=False):
        counter.reset()
        started = time.perf_counter()
        train_step(state, [batch])
        if number == 1:  # a whole batch, with the queue in use; the last one of the fold has fewer rows
            calls, sizes = dict(counter.calls), dict(counter.bytes)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - started)
            waiting.append(counter.seconds)
    if rank == 0:
        answer = {
            "processes": world,
            "rows": config.batch_size // world,
            "collectives": calls,
            "bytes_sent": sizes,
            "step_ms": 1000 * statistics.median(seconds),
            "collectives_ms": 1000 * statistics.median(waiting),
        }
        (Path(folder) / f"answer{world}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch that each process has (default: 16)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    options = parser.parse_args(arguments)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for world in options.processes:
            _, parsed, _ = cli.parse(["train", f"--batch-size={options.rows * world}"], "")
            mp.spawn(work, (world, config_from(parsed), folder), nprocs=world)
            results.append(json.loads((Path(folder) / f"answer{world}.json").read_text()))
            print(json.dumps(results[-1]))
    about = {"date": date.today().isoformat(), "commit": commit(), "device": device_name("cpu")}
    content = {**about, "torch": torch.__version__, "backend": "gloo", "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ranks-cpu.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
