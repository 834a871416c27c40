"""What the ranks of the tests in test_distributed.py do, and the one process that they are compared with.

`Study` is the smallest model with every block in it. `train` runs it on one rank of several under DDP, `train_alone` in
one process that sees the batches of all ranks.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import momentum_distill as md
from momentum_distill._contrast import engine
from ranks import DEVICE

WIDTH, CLASSES, STEPS, QUEUE = 5, 3, 20, 11

SPLITS = {
    "even": lambda world: [4] * world,
    "uneven": lambda world: [2 + 3 * rank for rank in range(world)],
    "one empty": lambda world: [0, *[3] * (world - 1)] if world > 1 else [0],
    "one row": lambda world: [*[4] * (world - 1), 1],
}


class Case(NamedTuple):
    """How a model is trained."""

    sizes: tuple[int, ...]  # rows of each rank
    together: bool  # group="auto", else None
    streaming: bool
    accumulate: int
    dtype: torch.dtype = torch.float64
    steps: int = STEPS


class Batch(NamedTuple):
    text: Tensor  # (N, 4)
    audio: Tensor  # (N, 6)
    scores: Tensor  # (N,)
    labels: Tensor  # (N,), some absent, some unlabelled
    present: Tensor  # (N,) bool: samples that have audio

    def rows(self, chosen: slice) -> "Batch":
        return Batch(*(field[chosen] for field in self))

    def to(self, device: str) -> "Batch":
        return Batch(*(field.to(device) for field in self))


class Study(nn.Module):
    """A teacher (text), a student (audio) with its momentum model, a fusion, and every loss between them."""

    def __init__(self, group) -> None:
        super().__init__()
        self.group = group
        self.text, self.audio = nn.Linear(4, WIDTH), nn.Linear(6, WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, 1 + CLASSES) for name in ("text", "audio", "fused")})
        self.factors = md.MomentumFusionFactors(["text", "audio"], decay=0.8)
        self.contrast = md.SupConDistillLoss(group=group)
        self.scores = md.ResponseDistillLoss(task="regression", group=group)
        self.classes = md.ResponseDistillLoss(task="classification", group=group)
        self.fusion = md.HardSampleFusionLoss(group=group)

    def forward(self, batch: Batch, momentum: Tensor, past: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        text, audio = self.text(batch.text), self.audio(batch.audio)
        weighted = self.factors({"text": text, "audio": audio})
        out = {"text": text, "audio": audio, "fused": weighted["text"] + weighted["audio"]}
        out = {name: self.heads[name](features) for name, features in out.items()}
        heard = torch.where(batch.present, batch.labels, -1)
        here = {"text": text, "audio": audio, "momentum": momentum, "labels": batch.labels, "heard": heard}
        here = md.gather_rows(here, group=self.group)

        def keys(name: str, marks: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
            return (here[name], past[name][0]), (here[marks], past[name][1])

        audio_keys, audio_labels = keys("audio", "heard")
        text_keys, text_labels = keys("text", "labels")
        momentum_keys, _ = keys("momentum", "heard")
        terms = self.contrast.terms(
            text, audio_keys, heard, audio_labels, momentum_query=text, momentum_keys=momentum_keys
        )
        back = self.contrast(
            audio, text_keys, heard, text_labels, momentum_query=momentum, momentum_keys=text_keys, alpha=0.3
        )
        losses = (
            terms.total,
            terms.supervised.detach(),
            terms.rows.to(text.dtype),
            back,
            self.scores(out["audio"][:, 0], out["text"][:, 0], momentum[:, 0], mask=batch.present),
            self.classes(out["audio"][:, 1:], out["text"][:, 1:], mask=batch.present),
            self.fusion(
                student_scores=out["audio"][:, 0],
                student_logits=out["audio"][:, 1:],
                fused_scores=out["fused"][:, 0],
                fused_logits=out["fused"][:, 1:],
                targets=batch.scores,
                labels=batch.labels,
                mask=batch.present,
            ),
            # Of the truth, which these losses know as a teacher.
            self.scores(out["fused"][:, 0], batch.scores, mask=batch.labels != -1),
            self.scores(out["text"][:, 0], batch.scores, mask=batch.labels != -1),
        )
        learned = [loss for loss in losses if loss.requires_grad]
        return sum(learned), torch.stack([loss.detach() for loss in losses])


def data(case: Case) -> list[Batch]:
    """What all ranks see together: one batch for each step and turn of accumulation, in rank order."""
    g = torch.Generator().manual_seed(sum(case.sizes))
    total = sum(case.sizes)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)

    return [
        Batch(
            numbers(total, 4),
            numbers(total, 6),
            numbers(total),
            torch.randint(-2, CLASSES, (total,), generator=g),
            torch.rand(total, generator=g) > 0.2,
        ).to(DEVICE)
        for _ in range(case.steps * case.accumulate)
    ]


class Trained(NamedTuple):
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    queue: dict[str, Tensor]
    losses: Tensor  # (steps * accumulate, number of losses)


def parts(case: Case) -> list[slice]:
    """The rows of each rank."""
    ends = torch.tensor([0, *case.sizes]).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def build(case: Case, group) -> tuple[Study, md.EMAWrapper, md.ClassQueue]:
    torch.manual_seed(3)
    model = Study(group).to(DEVICE, case.dtype)
    average = md.EMAWrapper(model.audio, decay=0.9)
    dims = dict.fromkeys(("text", "audio", "momentum"), WIDTH)
    queue = md.ClassQueue(QUEUE, dims, dtype=case.dtype, group=group)
    return model, average, queue.to(DEVICE)


def enqueue(queue: md.ClassQueue, model: Study, average: md.EMAWrapper, batch: Batch) -> None:
    with torch.no_grad():
        features = {"text": model.text(batch.text), "audio": model.audio(batch.audio), "momentum": average(batch.audio)}
    queue.enqueue(batch.labels, features, valid={"audio": batch.present, "momentum": batch.present})


def read(queue: md.ClassQueue) -> dict[str, tuple[Tensor, Tensor]]:
    return {stream: queue.read(stream, padded=True) for stream in queue.streams}


def train(case: Case, **ddp_options: object) -> Trained:
    """On this rank, under DDP."""
    with streaming(case):
        model, average, queue = build(case, "auto" if case.together else None)
        ddp = DistributedDataParallel(model, **ddp_options)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
        mine = parts(case)[dist.get_rank()]
        batches = [batch.rows(mine) for batch in data(case)]
        losses = []
        for step in range(case.steps):
            group = batches[step * case.accumulate : (step + 1) * case.accumulate]
            optimizer.zero_grad()
            for turn, batch in enumerate(group, start=1):
                with nullcontext() if turn == case.accumulate else ddp.no_sync():
                    total, values = ddp(batch, average(batch.audio), read(queue))
                    (total / case.accumulate).backward()
                losses.append(values)
            optimizer.step()
            average.update(model.audio)
            model.factors.update()
            for batch in group:
                enqueue(queue, model, average, batch)
        if case.together:
            queue.check_in_sync()
        average.check_in_sync()
        return Trained(*map(detached, (model, average, queue)), torch.stack(losses).cpu())


def train_alone(case: Case) -> list[Trained]:
    """In this process: what every rank is to end with.

    Together: one model, one queue, whole batches. Each for itself: the losses of a rank are of its own rows and queue,
    and the model takes the mean of their gradients.
    """
    with streaming(case):
        groups = [slice(None)] if case.together else parts(case)
        model, average, _ = build(case, None)
        queues = [build(case, None)[2] for _ in groups]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        batches = data(case)
        losses: list[list[Tensor]] = [[] for _ in groups]
        for step in range(case.steps):
            group = batches[step * case.accumulate : (step + 1) * case.accumulate]
            optimizer.zero_grad()
            for batch in group:
                for index, rows in enumerate(groups):
                    total, values = model(batch.rows(rows), average(batch.rows(rows).audio), read(queues[index]))
                    (total / case.accumulate / len(groups)).backward()
                    losses[index].append(values)
            optimizer.step()
            average.update(model.audio)
            model.factors.update()
            for batch in group:
                for queue, rows in zip(queues, groups, strict=True):
                    enqueue(queue, model, average, batch.rows(rows))
        trained = [
            Trained(*map(detached, (model, average, queue)), torch.stack(values).cpu())
            for queue, values in zip(queues, losses, strict=True)
        ]
        return trained * len(case.sizes) if case.together else trained


@contextmanager
def streaming(case: Case) -> Iterator[None]:
    """The contrastive loss tile by tile, or through the matrices."""
    before = engine.DENSE_SCORES
    engine.DENSE_SCORES = -1 if case.streaming else 2**62
    try:
        yield
    finally:
        engine.DENSE_SCORES = before


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.cpu().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
