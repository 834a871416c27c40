"""ClassQueue: one step of five streams, storing a batch and reading all streams, against other memory banks.

    python benchmarks/bench_queue.py            all sizes, a minute
    python benchmarks/bench_queue.py --full     the same, more rounds

The bound is one copy of the batch: rows and labels of all streams. Only ours and the one of pytorch-metric-learning
keep labels; only ours normalises what it stores, in the first of its two rows.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import momentum_distill as md
from common import Case, Contender, Options, Run, import_part, parse_options, run_cases, write_results

STREAMS = ("text", "audio", "vision", "audio_momentum", "vision_momentum")
DIM, CLASSES = 128, 3
SIZES = {"quick": [(4, 16)], "small": [(n, q) for q in (1024, 65536) for n in (64, 512)]}
SIZES["full"] = SIZES["small"]


def make_batch(rows: int, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels (N,) and unit rows (N, d) of each stream."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(CLASSES, (rows,), generator=generator).to(device)
    features = {name: F.normalize(torch.randn(rows, DIM, generator=generator), dim=1).to(device) for name in STREAMS}
    return labels, features


def build_copy(rows: int, size: int, device: str) -> Run:
    del size
    source = torch.ones(len(STREAMS) * rows * (DIM + 2), device=device)  # a label is as long as two numbers
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def build_ours(rows: int, size: int, device: str, *, normalize: bool) -> Run:
    labels, features = make_batch(rows, device)
    queue = md.ClassQueue(size, dict.fromkeys(STREAMS, DIM), normalize=normalize, device=device)

    def run() -> list[tuple[Tensor, Tensor]]:
        queue.enqueue(labels, features)
        return [queue.read(name, padded=True) for name in STREAMS]

    return run


def build_ring(rows: int, size: int, device: str, *, normalize: bool) -> Run:
    """The least code that is right: a ring for all streams, one for the labels, written in at most two slices."""
    labels, features = make_batch(rows, device)
    bank = {name: torch.zeros(size, DIM, device=device) for name in STREAMS}
    ids = torch.full((size,), -1, device=device)
    start = 0

    def run() -> list[tuple[Tensor, Tensor]]:
        nonlocal start
        first = min(rows, size - start)
        for taken, slot, length in ((0, start, first), (first, 0, rows - first)):
            if length:
                ids[slot : slot + length] = labels[taken : taken + length]
                for name in STREAMS:
                    some = features[name][taken : taken + length]
                    bank[name][slot : slot + length] = F.normalize(some, dim=1) if normalize else some
        start = (start + rows) % size
        return [(bank[name], ids) for name in STREAMS]

    return run


def build_moco(rows: int, size: int, device: str) -> Run:
    """The pattern of MoCo and ALBEF: (d, Q) banks, cloned when read, the pointer a tensor; no labels."""
    _, features = make_batch(rows, device)
    bank = {name: torch.zeros(DIM, size, device=device) for name in STREAMS}
    pointer = torch.zeros(1, dtype=torch.long, device=device)

    def run() -> list[Tensor]:
        read = [bank[name].clone() for name in STREAMS]
        start = int(pointer)
        for name in STREAMS:
            bank[name][:, start : start + rows] = features[name].T
        pointer[0] = (start + rows) % size
        return read

    return run


def build_lightly(rows: int, size: int, device: str) -> Run:
    packages = ("lightly.models", "lightly.models.modules")
    module = import_part("lightly.models.modules.memory_bank", bare=packages)
    _, features = make_batch(rows, device)
    banks = {name: module.MemoryBankModule((size, DIM)).to(device) for name in STREAMS}
    return lambda: [banks[name](features[name], update=True) for name in STREAMS]


def build_pml(rows: int, size: int, device: str) -> Run:
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss

    labels, features = make_batch(rows, device)
    banks = {name: CrossBatchMemory(SupConLoss(), DIM, memory_size=size) for name in STREAMS}
    for bank in banks.values():
        bank.embedding_memory, bank.label_memory = bank.embedding_memory.to(device), bank.label_memory.to(device)

    def run() -> list[tuple[Any, Any]]:
        for name, bank in banks.items():
            bank.add_to_memory(features[name], labels, rows)
        return [(bank.embedding_memory, bank.label_memory) for bank in banks.values()]

    return run


CONTENDERS = (
    Contender("one copy of the batch", build_copy, role="bound"),
    Contender("momentum-distill", functools.partial(build_ours, normalize=True), role="ours", computes="normalises"),
    Contender("momentum-distill, normalize=False", functools.partial(build_ours, normalize=False), role="ours"),
    Contender("ring of slices and views", functools.partial(build_ring, normalize=False), role="reference"),
    Contender(
        "the same ring, F.normalize",
        functools.partial(build_ring, normalize=True),
        role="reference",
        computes="normalises",
    ),
    Contender("MoCo / ALBEF pattern", build_moco, role="reference", computes="no labels"),
    Contender("lightly MemoryBankModule", build_lightly, computes="no labels", needs="lightly"),
    Contender("pytorch-metric-learning CrossBatchMemory.add_to_memory", build_pml, needs="pytorch_metric_learning"),
)


def make_cases(options: Options) -> list[Case]:
    return [
        Case(
            f"step of {len(STREAMS)} streams, N={rows}, Q={size}",
            CONTENDERS,
            {"rows": rows, "size": size, "device": options.device},
        )
        for rows, size in SIZES[options.size]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(__doc__ or "", arguments)
    write_results("queue", *run_cases(make_cases(options), options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
