"""What the ranks of the tests in test_distributed_blocks.py do.

Most of it one process can do as well: without a process group the same function works on the rows of all ranks, and
returns what each of them is to return.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import momentum_distill as md
from loss_cases import POSITIVES, bits
from momentum_distill import _group
from momentum_distill import functional as F
from momentum_distill._contrast import engine
from ranks import DEVICE

CLASSES = 3


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_part(sizes: Sequence[int]) -> slice:
    """The rows of this rank, each having so many; one process has all."""
    rank, world = rank_and_world()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) if world > 1 else slice(None)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The collectives of this library, one word each."""
    calls: list[str] = []
    real = {name: getattr(_group, name) for name in ("_gather_into", "_scatter_into")}

    def noted(name: str) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(name.strip("_").removesuffix("_into"))
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(_group, name, noted(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(_group, name, function)


def digest(module: nn.Module) -> str:
    """Of all parameters and buffers, bit by bit."""
    found = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found.update(repr((name, tensor.dtype, tensor.shape)).encode())
        found.update(bits(tensor))
    return found.hexdigest()


def raised(call: Callable[[], object]) -> tuple[str, str]:
    """The type and the text of the error of a call that is to fail."""
    try:
        call()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# --------------------------------------------------------------------------------------------------------------------
# The queue
# --------------------------------------------------------------------------------------------------------------------

SLOTS, DIMS, FED = 7, {"text": 3, "audio": 5}, 12


class QueueCase(NamedTuple):
    options: dict
    dtype: torch.dtype = torch.float32  # of the batches


class Fed(NamedTuple):
    digests: list[str]  # of the queue after each batch
    calls: list[list[str]]  # collectives of each batch
    shown: str


def queue_batch(case: QueueCase, step: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Labels, features and masks of this rank, or of all; how the rows are divided is left to chance."""
    g = torch.Generator().manual_seed(step)
    rows = [0, 1, 3, 6, 10, 2 * SLOTS + 3][int(torch.randint(6, (), generator=g))]
    labels = torch.randint(-2, CLASSES, (rows,), generator=g)
    features = {name: torch.randn(rows, width, generator=g).to(case.dtype) for name, width in DIMS.items()}
    valid = {name: torch.rand(rows, generator=g) > 0.2 for name in DIMS}
    for name, mask in valid.items():
        features[name][~mask] = torch.nan
    rank, world = rank_and_world()
    cuts = [0, *torch.randint(rows + 1, (world - 1,), generator=g).sort().values.tolist(), rows]
    mine = slice(cuts[rank], cuts[rank + 1])
    # Who lacks nothing gives no mask.
    masks = {name: mask[mine] for name, mask in valid.items() if not mask[mine].all()}
    return (
        labels[mine].to(DEVICE),
        {name: rows[mine].to(DEVICE) for name, rows in features.items()},
        {name: mask.to(DEVICE) for name, mask in masks.items()},
    )


def feed(case: QueueCase, start: int = 0, stop: int = FED, saved: Path | None = None) -> Fed:
    """Some of the batches, into a new queue or, if not from the first on, into the one saved; the end is saved."""
    queue = md.ClassQueue(SLOTS, DIMS, num_classes=CLASSES, **case.options).to(DEVICE)
    if start and saved:
        queue.load_state_dict(torch.load(saved))
        queue.check_in_sync()
    fed = Fed([], [], repr(queue))
    for step in range(start, stop):
        labels, features, valid = queue_batch(case, step)
        with counted() as calls:
            queue.enqueue(labels, features, valid=valid or None)
        fed.digests.append(digest(queue))
        fed.calls.append(calls)
    queue.check_in_sync()
    if stop < FED and saved and rank_and_world()[0] == 0:
        torch.save(queue.state_dict(), saved)
    return fed


def subset(members: list[int]) -> tuple[str, str, float]:
    """A queue and a mean of some ranks, beside others that have their own."""
    rank, world = rank_and_world()
    assert repr(md.ClassQueue(SLOTS, DIMS)).endswith(f"group='auto' (rank {rank} of {world}))")
    group = dist.new_group(members)
    if rank not in members:
        kind, text = raised(lambda: md.ClassQueue(SLOTS, DIMS, group=group))
        assert kind == "TypeError", kind
        assert text.endswith(", got what new_group() returns to a rank that is not in the group"), text
        group = None
    queue = md.ClassQueue(SLOTS, DIMS, group=group).to(DEVICE)
    for step in range(3):
        queue.enqueue(*own_rows(rank, step))
    values = torch.full((rank + 1,), float(rank), dtype=torch.float64, device=DEVICE, requires_grad=True)
    mean = F.mean_rows(values, group=group)
    rows = md.gather_rows({"x": values}, group=group)["x"]
    (grad,) = torch.autograd.grad((rank + 1) * rows.sum(), [values])
    assert grad.tolist() == [float(sum(r + 1 for r in (members if group else [rank])))] * (rank + 1)
    dist.barrier()
    return digest(queue), repr(queue), mean.item()


def own_rows(rank: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """As many rows as the rank's number and one; labels in a dtype of its own."""
    labels = torch.full((rank + 1,), rank, dtype=torch.int32 if rank == 2 else torch.int64, device=DEVICE)
    return labels, {
        name: numbers(10 * step + rank, rank + 1, width, dtype=torch.float32) for name, width in DIMS.items()
    }


def change_one_queue(where: str) -> tuple[str, str]:
    """On rank 1, one number of one buffer."""
    queue = md.ClassQueue(SLOTS, DIMS).to(DEVICE)
    queue.enqueue(*own_rows(2, 0))
    queue.check_in_sync()
    if rank_and_world()[0] == 1:
        buffer = queue.read("audio", padded=True)[0] if where == "keys_audio" else queue.get_buffer(where)
        buffer.view(-1)[0] += 1
    return raised(queue.check_in_sync)


# --------------------------------------------------------------------------------------------------------------------
# The losses
# --------------------------------------------------------------------------------------------------------------------


SINKHORN = ["gather"] * 4  # whether the ranks agree, and a number for each key in each iteration


class LossCase(NamedTuple):
    sizes: tuple[int, ...]  # rows of each rank
    dtype: torch.dtype = torch.float64
    streaming: bool = False
    blind: bool = False  # the rows of rank 0 are all absent
    autocast: bool = False


class Outputs(NamedTuple):
    """What the losses are given, on this rank."""

    query: Tensor  # (n, 5)
    momentum: Tensor  # (n, 5)
    labels: Tensor  # (n,)
    mask: Tensor  # (n,) bool
    targets: Tensor  # (n,)
    keys: Tensor  # (n, 5)
    here: dict[str, Tensor]  # keys, momentum, labels, targets and rank of all ranks' rows
    past: dict[str, Tensor]  # the same of a queue
    temperature: Tensor
    alpha: Tensor


LEAVES = ("query", "key", "log_temperature", "alpha")


def leaves(case: LossCase) -> dict[str, Tensor]:
    """What is learned, the same on all ranks."""
    found = {"query": numbers(1, 4, 5), "key": numbers(2, 4, 5)}
    found |= {"log_temperature": torch.tensor(-0.7), "alpha": torch.tensor(0.3)}
    return {name: tensor.to(DEVICE, case.dtype).requires_grad_() for name, tensor in found.items()}


def outputs(case: LossCase, learned: dict[str, Tensor]) -> Outputs:
    rank, _ = rank_and_world()
    total = sum(case.sizes)
    mine = own_part(case.sizes)
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(-2, CLASSES, (total,), generator=g).to(DEVICE)
    mask = (torch.rand(total, generator=g) > 0.3).to(DEVICE)
    if case.blind:
        labels[: case.sizes[0]] = -1
        mask[: case.sizes[0]] = False
    x = numbers(4, total, 4, dtype=case.dtype)[mine]
    momentum = numbers(5, total, 5, dtype=case.dtype)[mine]
    keys = x @ learned["key"]
    past = {"keys": numbers(6, 6, 5, dtype=case.dtype), "momentum": numbers(7, 6, 5, dtype=case.dtype)}
    return Outputs(
        x @ learned["query"],
        momentum,
        labels[mine],
        mask[mine],
        numbers(8, total, dtype=case.dtype)[mine],
        keys,
        md.gather_rows(
            {"keys": keys, "momentum": momentum, "labels": labels[mine], "rank": torch.full_like(labels[mine], rank)}
            | {"targets": numbers(8, total, dtype=case.dtype)[mine]}
        ),
        {
            **past,
            "labels": torch.tensor([0, 1, 2, -1, -2, 0], device=DEVICE),
            "targets": numbers(9, 6, dtype=case.dtype),
        },
        learned["log_temperature"].exp(),
        learned["alpha"],
    )


def supcon(o: Outputs, *, batch: bool = True, **options: object) -> F.SupConTerms:
    """With the keys of the batch, or those of the queue alone."""
    parts = [o.here, o.past] if batch else [o.past]
    return F.supcon_distill_terms(
        o.query,
        tuple(part["keys"] for part in parts),
        o.labels,
        tuple(part["labels"] for part in parts),
        temperature=o.temperature,
        momentum_query=o.momentum,
        momentum_keys=tuple(part["momentum"] for part in parts),
        alpha=o.alpha,
        group="auto",
        **options,
    )


def without_self(o: Outputs, **options: object) -> Tensor:
    """No row sees its own key: the rows of this rank are the first part, and absent from that of all ranks."""
    others = o.here["labels"].masked_fill(o.here["rank"] == rank_and_world()[0], -1)
    return F.supcon_distill_loss(
        o.query,
        (o.keys, o.here["keys"]),
        o.labels,
        (o.labels, others),
        temperature=o.temperature,
        momentum_query=o.momentum,
        momentum_keys=(o.momentum, o.here["momentum"]),
        alpha=o.alpha,
        exclude_self=True,
        group="auto",
        **options,
    )


def sigmoid(o: Outputs, *, batch: bool = True, bias: float = -1.0, **options: object) -> Tensor:
    """Over the same keys."""
    parts = [o.here, o.past] if batch else [o.past]
    return F.sigmoid_distill_loss(
        o.query,
        tuple(part["keys"] for part in parts),
        o.labels,
        tuple(part["labels"] for part in parts),
        temperature=o.temperature,
        bias=bias,
        momentum_query=o.momentum,
        momentum_keys=tuple(part["momentum"] for part in parts),
        alpha=o.alpha,
        group="auto",
        **options,
    )


def response(o: Outputs, task: str, **options: object) -> Tensor:
    columns = 0 if task == "regression" else slice(CLASSES)
    student, teacher = o.query[:, columns], o.query.flip(1)[:, columns]
    momentum = o.momentum[:, columns]
    return F.response_distill_loss(
        student, teacher, momentum, task=task, mask=o.mask, alpha=o.alpha, group="auto", **options
    )


def hard_sample(o: Outputs, *, scores: bool = True, **options: object) -> Tensor:
    parts = {"student_logits": o.query[:, :CLASSES], "fused_logits": o.query.flip(1)[:, :CLASSES], "labels": o.labels}
    if scores:
        parts |= {"student_scores": o.query[:, 0], "fused_scores": o.momentum[:, 0], "targets": o.targets}
    return F.hard_sample_fusion_loss(**parts, mask=o.mask, group="auto", **options)


GATHERED: dict[str, Callable[[Outputs], Tensor]] = {
    **{
        f"supcon {positives} {reduction}": lambda o, p=positives, r=reduction: supcon(o, positives=p, reduction=r).total
        for positives in POSITIVES
        for reduction in ("mean", "sum")
    },
    "supcon, centred": lambda o: supcon(o, momentum_targets="centred", centre=o.past["keys"][1] / 3).total,
    "supcon, sinkhorn": lambda o: supcon(o, momentum_targets="sinkhorn", momentum_temperature=0.3).total,
    "supcon without self": without_self,
    "supcon without self, inside": lambda o: without_self(o, positives="inside", reduction="sum"),
    "supcon by distance": lambda o: (
        supcon(
            o,
            query_targets=o.targets,
            key_targets=(o.here["targets"], o.past["targets"]),
            positives_from="distance",
            width=0.5,
            hardness=2.0,
        ).total
    ),
    "supervised": lambda o: supcon(o).supervised,
    "distill": lambda o: supcon(o, reduction="sum").distill,
    "sigmoid": sigmoid,
    "sigmoid sum, mean of keys": lambda o: sigmoid(o, reduction="sum", key_reduction="mean"),
    "all terms": lambda o: torch.stack(supcon(o, positives="inside")[:3]) @ o.query.new_tensor([0.5, 2.0, 3.0]),
}
"""By name; these see the batch's keys of all ranks."""

SMOOTH: dict[str, Callable[[Outputs], Tensor]] = {
    **{
        f"supcon {positives} of a queue": lambda o, p=positives: supcon(o, batch=False, positives=p).total
        for positives in POSITIVES
    },
    "supervised of a queue": lambda o: supcon(o, batch=False, reduction="sum").supervised,
    "sigmoid of a queue": lambda o: sigmoid(o, batch=False),
    "classification": lambda o: response(o, "classification", temperature=2.0, detach_teacher=False),
    "hard sample of classes": lambda o: hard_sample(o, scores=False, detach_teacher=False),
    "mean of squares": lambda o: F.mean_rows(o.query[:, 0].square(), mask=o.mask, group="auto"),
}
"""These have a second derivative."""

LOSSES: dict[str, Callable[[Outputs], Tensor]] = {
    **GATHERED,
    **SMOOTH,
    **{f"regression {r}": lambda o, r=r: response(o, "regression", reduction=r) for r in ("mean", "sum")},
    "classification sum": lambda o: response(o, "classification", reduction="sum"),
    **{
        f"hard sample {weight} {reduction}": lambda o, w=weight, r=reduction: hard_sample(
            o, class_weight=w, reduction=r
        )
        for weight in F.CLASS_WEIGHTS
        for reduction in ("mean", "sum")
    },
    "hard sample without attention": lambda o: hard_sample(o, hard_attention=False),
    "mean of rows": lambda o: F.mean_rows(o.query[:, 0], group="auto"),
}

ROW_BY_ROW: dict[str, tuple[Callable[[Outputs], Tensor], list[str]]] = {
    "supcon": (lambda o: supcon(o, reduction="none").total, []),
    "supcon, sinkhorn": (lambda o: supcon(o, momentum_targets="sinkhorn", reduction="none").total, SINKHORN),
    "sigmoid": (lambda o: sigmoid(o, reduction="none"), []),
    "regression": (lambda o: response(o, "regression", reduction="none"), []),
    "classification": (lambda o: response(o, "classification", reduction="none"), []),
    "hard sample": (lambda o: hard_sample(o, reduction="none"), ["gather"]),  # for the weight of the classes
}
"""With the collectives they take."""


class Answer(NamedTuple):
    value: float
    grads: dict[str, list[float] | None]  # after averaging; flat
    forward: list[str]  # collectives
    backward: list[str]


def averaged(grads: dict[str, Tensor | None]) -> dict[str, list[float] | None]:
    """As DDP does it."""
    _, world = rank_and_world()
    given = [grad.double().reshape(-1) for grad in grads.values() if grad is not None]
    if world > 1:
        flat = torch.cat(given)
        dist.all_reduce(flat)
        given = list(torch.split(flat / world, [len(grad) for grad in given]))
    found = iter(given)
    return {name: None if grad is None else next(found).tolist() for name, grad in grads.items()}


@contextmanager
def settings(case: LossCase) -> Iterator[None]:
    before = engine.DENSE_SCORES
    engine.DENSE_SCORES = -1 if case.streaming else 2**62
    try:
        with torch.autocast(DEVICE, torch.bfloat16) if case.autocast else nullcontext():
            yield
    finally:
        engine.DENSE_SCORES = before


def losses(case: LossCase) -> dict[str, Answer]:
    """Each loss, by itself."""
    found = {}
    with settings(case):
        for name, loss_fn in LOSSES.items():
            learned = leaves(case)
            given = outputs(case, learned)
            with counted() as forward:
                loss = loss_fn(given)
            with counted() as backward:
                grads = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
            found[name] = Answer(
                float(loss.detach()), averaged(dict(zip(LEAVES, grads, strict=True))), forward, backward
            )
    return found


def second_derivatives(case: LossCase) -> dict[str, Answer]:
    """The gradient of each gradient, times some numbers."""
    found = {}
    with settings(case):
        for name, loss_fn in SMOOTH.items():
            learned = leaves(case)
            loss = loss_fn(outputs(case, learned))
            grads = torch.autograd.grad(loss, list(learned.values()), allow_unused=True, create_graph=True)
            terms = [
                (grad * numbers(9, *grad.shape, dtype=case.dtype)).sum()
                for grad in grads
                if grad is not None and grad.requires_grad
            ]
            seconds = torch.autograd.grad(sum(terms), list(learned.values()), allow_unused=True)
            found[name] = Answer(float(loss.detach()), averaged(dict(zip(LEAVES, seconds, strict=True))), [], [])
    return found


def row_by_row(case: LossCase) -> dict[str, tuple[list[float], list[str]]]:
    """The rows of this rank, and the collectives."""
    found = {}
    for name, (loss_fn, _) in ROW_BY_ROW.items():
        given = outputs(case, leaves(case))
        with counted() as calls:
            found[name] = loss_fn(given).tolist(), calls
    return found


def centre(sizes: tuple[int, ...]) -> tuple[list[float], list[str]]:
    """That of a loss after three steps, in which no row of the first and of another rank is there at times."""
    loss_fn = md.SupConDistillLoss(momentum_targets="centred", reduction="sum")
    mine = own_part(sizes)
    with counted() as calls:
        for step in range(3):
            labels = (torch.arange(sum(sizes), device=DEVICE) % CLASSES).masked_fill_(
                numbers(step, sum(sizes)) > 0.5, -1
            )
            labels = torch.full_like(labels, -1) if step == 1 else labels
            query, momentum = (numbers(step + seed, sum(sizes), 4, dtype=torch.float32)[mine] for seed in (10, 20))
            keys, key_labels = numbers(30, 6, 4, dtype=torch.float32), torch.arange(6, device=DEVICE)
            soft = {"momentum_query": momentum, "momentum_keys": keys}
            loss_fn(query.requires_grad_(), keys, labels[mine], key_labels, **soft).backward()
    return loss_fn.centre.tolist(), calls


class AllLosses(nn.Module):
    """Every loss at once, for DDP to wrap."""

    def __init__(self, case: LossCase) -> None:
        super().__init__()
        self.case = case
        self.learned = nn.ParameterDict({name: nn.Parameter(leaf.detach()) for name, leaf in leaves(case).items()})

    def forward(self) -> Tensor:
        given = outputs(self.case, dict(self.learned.items()))
        return sum(loss_fn(given) for loss_fn in LOSSES.values())


def losses_under_ddp(case: LossCase) -> dict[str, list[float] | None]:
    """The gradients of a second step: if a parameter had gone without at the first, DDP would say so."""
    model = AllLosses(case)
    wrapped = DistributedDataParallel(model) if rank_and_world()[1] > 1 else model
    for _ in range(2):
        wrapped.zero_grad()
        wrapped().backward()
    return {name: None if leaf.grad is None else leaf.grad.reshape(-1).tolist() for name, leaf in model.learned.items()}


def compiled(case: LossCase, fused_scores: int, names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Value of each loss in one graph, and how far value and gradients are from those without a compiler.

    The contrastive loss is an operator of that graph for more than `fused_scores` scores.
    """
    found = {}
    for name in names:
        given = outputs(case, leaves(case))
        query, temperature, alpha = (
            tensor.detach().requires_grad_() for tensor in (given.query, given.temperature, given.alpha)
        )
        here = {name: rows.detach() for name, rows in given.here.items()}
        given = given._replace(query=query, temperature=temperature, alpha=alpha, here=here)
        answers = []
        for loss_fn in (LOSSES[name], torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")):
            with warnings.catch_warnings(), mock.patch.object(engine, "FUSED_SCORES", fused_scores):
                warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own, about what it does itself
                loss = loss_fn(given)
            inputs = [query, temperature, alpha]
            grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            answers.append([loss.detach(), *(grad.detach() for grad in grads)])
        far = max(float((a - b).abs().max()) for a, b in zip(*answers, strict=True))
        found[name] = float(answers[1][0]), far
    return found


def compiled_rows() -> tuple[bool, bool, bool, bool]:
    """Whether gathering and storing, with a compiler, give the value, gradient, labels and keys they give without."""
    rank, _ = rank_and_world()
    labels = torch.arange(2 + rank)
    queues = [md.ClassQueue(7, {"x": 3}, dtype=torch.float64) for _ in range(2)]

    def step(x: Tensor, queue: md.ClassQueue) -> Tensor:
        rows = md.gather_rows({"x": x, "labels": labels})
        queue.enqueue(labels, {"x": x})
        return rows["x"].pow(3).sum() * rows["labels"].sum()

    answers = []
    for queue, run in zip(queues, (step, torch.compile(step, backend="aot_eager")), strict=True):
        x = numbers(rank, 2 + rank, 3).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above, and at graph breaks
            value = run(x, queue)
        answers.append((value.detach(), *torch.autograd.grad(value, x), queue.labels, queue.state_dict()["keys_x"]))
        queue.check_in_sync()
    return tuple(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*answers, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# gather_rows
# --------------------------------------------------------------------------------------------------------------------

ROWS: dict[str, Callable[[int, int], Tensor]] = {
    "flags": lambda n, seed: numbers(seed, n) > 0,
    "marks": lambda n, seed: (numbers(seed, n, 1) * 50).to(torch.int8),
    "ids": lambda n, seed: (numbers(seed, n) * 1e6).long(),
    "half": lambda n, seed: numbers(seed, n, 3, dtype=torch.bfloat16),
    "wide": lambda n, seed: numbers(seed, n, 2, 2),
    "nothing": lambda n, seed: numbers(seed, n, 0),
    "turned": lambda n, seed: numbers(seed, 5, n, dtype=torch.float32).T,
    "column": lambda n, seed: numbers(seed, 4, n + 1, dtype=torch.float16).T[:n, :1],
    "skipped": lambda n, seed: (numbers(seed, 3 * n) * 1e6).long()[::3],
    "repeated": lambda n, seed: numbers(seed, 1, 3, dtype=torch.float32).expand(n, 3),
}
"""Tensors of n rows in all dtypes, shapes and strides."""


def gather_all_kinds(sizes: tuple[int, ...]) -> tuple[dict[str, str], list[str]]:
    """A digest of what comes out of each tensor, in one call; and the collectives."""
    rank, world = rank_and_world()
    if world == 1:
        found = {name: torch.cat([make(n, seed) for seed, n in enumerate(sizes)]) for name, make in ROWS.items()}
        return {name: describe(rows) for name, rows in found.items()}, []
    with counted() as calls:
        found = md.gather_rows({name: make(sizes[rank], rank) for name, make in ROWS.items()})
    assert all(rows.is_contiguous() and not rows.requires_grad for rows in found.values())
    return {name: describe(rows) for name, rows in found.items()}, calls


def describe(rows: Tensor) -> str:
    return f"{rows.dtype} {tuple(rows.shape)} {hashlib.sha256(bits(rows)).hexdigest()}"


WANTED = ("wide", "narrow", "deep")


def gather_gradient(sizes: tuple[int, ...], nested: bool) -> tuple[dict[str, list[float]], list[str]]:
    """The gradient of the sum of what all ranks make of the rows, each its own; and the collectives of the way back."""
    rank, world = rank_and_world()
    makers = {"wide": (3,), "narrow": (2,), "deep": (2, 2), "plain": (1,)}
    dtypes = {"wide": torch.float64, "narrow": torch.float32, "deep": torch.float64, "plain": torch.float64}
    mine = [rank] if world > 1 else range(len(sizes))
    batch = {
        name: torch.cat([numbers(seed, sizes[seed], *shape, dtype=dtypes[name]) for seed in mine])
        for name, shape in makers.items()
    }
    for name in WANTED:
        batch[name].requires_grad_()
    rows = md.gather_rows(batch)
    if nested:  # every rank brings all rows, so that they are there as often as there are ranks
        again = {name: rows[name].square() for name in WANTED}
        copies = len(sizes) if world == 1 else 1
        rows |= {name: torch.cat([x] * copies) for name, x in md.gather_rows(again).items()}
    flat = [rows[name].double().flatten(1) for name in WANTED]
    losses = [sum((x * (seed + 1)).sin().sum(dim=1) @ x[:, 0] for x in flat) for seed in mine]
    with counted() as calls:
        grads = torch.autograd.grad(sum(losses), [batch[name] for name in WANTED])
    assert not rows["plain"].requires_grad
    return {name: grad.double().reshape(-1).tolist() for name, grad in zip(WANTED, grads, strict=True)}, calls


def gather_unused() -> list[list[float]]:
    """A gradient for one of two tensors, then twice through one graph."""
    rank, _ = rank_and_world()
    a, b = (torch.ones(2, 1, requires_grad=True) for _ in range(2))
    rows = md.gather_rows({"a": a, "b": b})
    first = torch.autograd.grad((rows["a"] * (rank + 1)).sum(), [a, b], retain_graph=True)
    second = torch.autograd.grad((rows["b"] * rows["a"]).sum(), [a, b])
    return [grad.flatten().tolist() for grad in (*first, *second)]


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


def eye(n: int = 2, width: int = 3, **options: object) -> Tensor:
    return torch.eye(n, width, **options)


def wrong_enqueue(rank: int, everywhere: dict | None = None, **change: object) -> None:
    """A good batch, but for what rank 1 changes; `everywhere` are options of all ranks."""
    options = {"size": 4, "dims": {"a": 3, "b": 2}, "labels": torch.tensor([0, 1]), "a": eye(), "b": eye(2, 2)}
    options |= {"valid": None, "validate": False, "balanced": False, "dtype": torch.float32, "normalize": True}
    options |= (everywhere or {}) | (change if rank == 1 else {})
    names = ("size", "dims", "validate", "balanced", "dtype", "normalize")
    queue = md.ClassQueue(num_classes=3, **{name: options[name] for name in names})
    features = {name: options[name] for name in options["dims"]}
    before = digest(queue)
    try:
        queue.enqueue(options["labels"], features, valid=options["valid"])
    finally:
        assert digest(queue) == before, "an error has changed the queue"


CONTRAST = {"query": eye(), "keys": eye(4), "query_labels": torch.tensor([0, 1]), "key_labels": torch.arange(4)}
MOMENTUM = {"momentum_query": eye(), "momentum_keys": eye(4)}


def wrong_supcon(rank: int, **change: object) -> None:
    options = CONTRAST | {"temperature": 0.5, "group": "auto"}
    F.supcon_distill_loss(**options | (change if rank == 1 else {}))


def wrong_balance(rank: int, **change: object) -> None:
    options = CONTRAST | MOMENTUM | {"momentum_targets": "sinkhorn", "reduction": "none"}
    F.supcon_distill_loss(temperature=0.5, group="auto", **options | (change if rank == 1 else {}))


def lone_error() -> tuple[str, str]:
    """Of a call that makes no collective, so that nobody could be told, nor may wait."""
    labels = torch.tensor([0, 1]) if rank_and_world()[0] else torch.tensor([0, -7])
    options = {"temperature": 0.5, "momentum_targets": "sinkhorn", "reduction": "none", "group": "auto"}
    return raised(lambda: F.supcon_distill_loss(eye(), eye(4), labels, torch.arange(4), **options))


def wrong_centred_rows(rank: int, **change: object) -> None:
    options = CONTRAST | MOMENTUM | {"query": eye(requires_grad=True)}
    md.SupConDistillLoss(momentum_targets="centred", reduction="none")(**options | (change if rank == 1 else {}))


def wrong_centre(rank: int, **change: object) -> None:
    options = {"momentum_query": eye(), "query_labels": torch.tensor([0, 1]), **(change if rank == 1 else {})}
    F.centre_update(torch.zeros(3), group="auto", **options)


def wrong_sigmoid(rank: int, **change: object) -> None:
    options = CONTRAST | {"temperature": 0.5, "bias": -1.0, "group": "auto"}
    F.sigmoid_distill_loss(**options | (change if rank == 1 else {}))


def wrong_response(rank: int, **change: object) -> None:
    options = {"student": eye(), "teacher": eye(), "task": "classification", "group": "auto"}
    F.response_distill_loss(**options | (change if rank == 1 else {}))


def wrong_fusion(rank: int, **change: object) -> None:
    options = {"student_logits": eye(), "fused_logits": eye(), "labels": torch.tensor([0, 1]), "group": "auto"}
    F.hard_sample_fusion_loss(**options | (change if rank == 1 else {}))


def wrong_mean(rank: int, **change: object) -> None:
    F.mean_rows(**{"values": torch.ones(2), "group": "auto"} | (change if rank == 1 else {}))


def wrong_rows(rank: int, change: object) -> None:
    md.gather_rows(change if rank == 1 else {"a": eye(), "b": torch.arange(2)})


def other_call(rank: int) -> None:
    (wrong_mean if rank == 1 else wrong_response)(rank)


TOO_HIGH = {"labels": torch.tensor([0, 9])}
OWN_KEYS = {"keys": eye(), "momentum_keys": eye(), "key_labels": torch.tensor([0, 1]), "exclude_self": True}

# By name: what the ranks call, what rank 1 has of its own, and the error on all of them.
WRONG: dict[str, tuple[Callable, dict, str, str]] = {
    "label dtype": (wrong_enqueue, {"labels": torch.ones(2)}, "TypeError", r"^labels: .* \(on rank 1\)$"),
    "label shape": (wrong_enqueue, {"labels": torch.ones(2, 1).long()}, "ValueError", r"^labels: .* \(on rank 1\)$"),
    "no labels": (wrong_enqueue, {"labels": None}, "TypeError", r"^labels: .* \(on rank 1\)$"),
    "width": (wrong_enqueue, {"a": eye(2, 4)}, "ValueError", r"^features\['a'\]: .* \(on rank 1\)$"),
    "width of the queue": (
        wrong_enqueue,
        {"a": eye(2, 4), "dims": {"a": 4, "b": 2}},
        "ValueError",
        "'a': 4.*on rank 1",
    ),
    "feature dtype": (wrong_enqueue, {"a": eye(dtype=torch.bfloat16)}, "ValueError", "bfloat16.* on rank 1$"),
    "stream names": (wrong_enqueue, {"dims": {"a": 3, "c": 2}, "c": eye(2, 2)}, "ValueError", r"'c'.* on rank 1$"),
    "order of streams": (wrong_enqueue, {"dims": {"b": 2, "a": 3}}, "ValueError", r"on rank 0: expected the same"),
    "size": (wrong_enqueue, {"size": 5}, "ValueError", r"size=4.* on rank 0: .*size=5.* on rank 1$"),
    "balanced": (wrong_enqueue, {"balanced": True}, "ValueError", r"balanced=True.* on rank 1$"),
    "normalize": (wrong_enqueue, {"normalize": False}, "ValueError", r"normalize=False.* on rank 1$"),
    "dtype of the queue": (wrong_enqueue, {"dtype": torch.float64}, "ValueError", r"float64.* on rank 1$"),
    "mask": (wrong_enqueue, {"valid": {"a": torch.ones(3, dtype=torch.bool)}}, "ValueError", r"^valid\['a'\]: "),
    "mask name": (wrong_enqueue, {"valid": {"z": torch.ones(2, dtype=torch.bool)}}, "ValueError", r"^valid: .*'z'"),
    "label value": (wrong_enqueue, TOO_HIGH, "ValueError", r"^labels: .*\(on rank 1\)$"),
    "query label value": (wrong_supcon, {"query_labels": torch.tensor([0, -100])}, "ValueError", r"^query_labels: "),
    "key label value": (wrong_supcon, {"key_labels": torch.tensor([0, 1, 0, -3])}, "ValueError", r"^key_labels: "),
    "fusion label value": (wrong_fusion, {"labels": torch.tensor([0, 9])}, "ValueError", r"^labels: .*\(on rank 1\)$"),
    "hardness": (wrong_supcon, {"hardness": 1.0}, "ValueError", r"'mean' on rank 0: .*hardness=1 on rank 1$"),
    "positives_from": (wrong_supcon, {"positives_from": "overlap"}, "ValueError", r"^query_targets: .* \(on rank 1\)$"),
    "exclude_self": (wrong_supcon, {"exclude_self": True}, "ValueError", r"^keys: .* \(on rank 1\)$"),
    "label beyond the classes": (
        wrong_enqueue,
        {**TOO_HIGH, "everywhere": {"balanced": True}},
        "ValueError",
        r"^labels: expected classes below 3, .* got 9 in row 1 \(on rank 1\)$",
    ),
    "NaN": (wrong_enqueue, {"a": eye() * torch.nan, "validate": True}, "ValueError", r"NaN.* \(on rank 1\)$"),
    "query shape": (wrong_supcon, {"query": eye(2, 4)}, "ValueError", r"^keys: .* \(on rank 1\)$"),
    "query type": (wrong_supcon, {"query": [[1.0]]}, "TypeError", r"^query: .* \(on rank 1\)$"),
    "query labels": (wrong_supcon, {"query_labels": torch.ones(2)}, "TypeError", r"^query_labels: .* \(on rank 1\)$"),
    "temperature": (wrong_supcon, {"temperature": 0.0}, "ValueError", r"^temperature: .* \(on rank 1\)$"),
    "loss width": (wrong_supcon, {"query": eye(2, 4), "keys": eye(4, 4)}, "ValueError", r"width 4.* on rank 1$"),
    "loss dtype": (wrong_supcon, {"query": eye(dtype=torch.float64)}, "ValueError", r"float64.* on rank 1$"),
    "momentum": (wrong_supcon, MOMENTUM, "ValueError", r"without momentum.* on rank 0: .* with momentum.* on rank 1$"),
    "half a momentum": (wrong_supcon, {"momentum_query": eye()}, "ValueError", r"^momentum_keys: .* \(on rank 1\)$"),
    "positives": (wrong_supcon, {"positives": "inside"}, "ValueError", r"positives='inside'.* on rank 1$"),
    "reduction": (wrong_supcon, {"reduction": "sum"}, "ValueError", r"'mean' on rank 0.*'sum' on rank 1$"),
    "no reduction": (wrong_supcon, {"reduction": "most"}, "ValueError", r"^reduction: .* \(on rank 1\)$"),
    "other targets": (
        wrong_balance,
        {"momentum_targets": "softmax", "reduction": "mean"},
        "ValueError",
        "'sinkhorn' and 4 keys",
    ),
    "no targets": (
        wrong_balance,
        {"momentum_targets": "sinkhorn_knopp"},
        "ValueError",
        r"^momentum_targets: .* \(on rank 1\)$",
    ),
    "other keys": (
        wrong_balance,
        {"key_labels": torch.tensor([0, 1, 3, 2])},
        "ValueError",
        r"to 20 on rank 0: .* to 19 on ",
    ),
    "own keys": (wrong_balance, OWN_KEYS, "ValueError", r"^exclude_self: .*on rank 1\)$"),
    "centre": (wrong_centre, {"momentum_query": eye(2, 4)}, "ValueError", r"^momentum_query: .* \(on rank 1\)$"),
    "decay of a centre": (
        wrong_centre,
        {"decay": 0.8},
        "ValueError",
        r"decay=0.9.* on rank 0: .*decay=0.8.*on rank 1$",
    ),
    "rows with a centre": (wrong_centred_rows, {"key_labels": None}, "TypeError", r"^key_labels: .* \(on rank 1\)$"),
    "bias": (wrong_sigmoid, {"bias": "0"}, "TypeError", r"^bias: .* \(on rank 1\)$"),
    "reduction of keys": (wrong_sigmoid, {"key_reduction": "mean"}, "ValueError", r"'sum' on rank 0.*'mean' on rank"),
    "loss NaN": (wrong_supcon, {"query": eye() * torch.nan, "validate": True}, "ValueError", r"^query: .*NaN"),
    "teacher": (wrong_response, {"teacher": eye(2, 4)}, "ValueError", r"^teacher: .* \(on rank 1\)$"),
    "task": (
        wrong_response,
        {"student": eye()[:, 0], "teacher": eye()[:, 0], "task": "regression"},
        "ValueError",
        r"'classification'.* on rank 0: .*'regression'.* on rank 1$",
    ),
    "response reduction": (wrong_response, {"reduction": "sum"}, "ValueError", r"'sum' on rank 1$"),
    "classes": (wrong_fusion, {"student_logits": eye(2, 4), "fused_logits": eye(2, 4)}, "ValueError", r"4 classes"),
    "class weight": (wrong_fusion, {"class_weight": "error_rate"}, "ValueError", r"'error_rate'.* on rank 1$"),
    "fusion reduction": (wrong_fusion, {"reduction": "none"}, "ValueError", r"'none' on rank 1$"),
    "scores instead of logits": (
        wrong_fusion,
        {
            "student_logits": None,
            "fused_logits": None,
            "labels": None,
            "student_scores": torch.ones(2),
            "fused_scores": torch.ones(2),
            "targets": torch.ones(2),
        },
        "ValueError",
        r"of logits of 3 classes, .* on rank 0: .* of scores, .* on rank 1$",
    ),
    "scores beside logits": (
        wrong_fusion,
        {"student_scores": torch.ones(2), "fused_scores": torch.ones(2), "targets": torch.ones(2)},
        "ValueError",
        r"of scores and logits of 3 classes, .* on rank 1$",
    ),
    "no labels beside logits": (wrong_fusion, {"labels": None}, "ValueError", r"^labels: .* \(on rank 1\)$"),
    "mean": (wrong_mean, {"values": torch.ones(2, 1)}, "ValueError", r"^values: .* \(on rank 1\)$"),
    "mean of nothing": (wrong_mean, {"values": None}, "TypeError", r"^values: .* \(on rank 1\)$"),
    "another call": (other_call, {}, "ValueError", r"^ResponseDistillLoss.* on rank 0: .*mean_rows on rank 1$"),
    "rows of one": (wrong_rows, {"change": {"a": eye(), "b": torch.arange(3)}}, "ValueError", r"^tensors\['b'\]: "),
    "no tensors": (wrong_rows, {"change": {}}, "ValueError", r"^tensors: .* \(on rank 1\)$"),
    "no mapping": (wrong_rows, {"change": eye()}, "TypeError", r"^tensors: .* \(on rank 1\)$"),
    "no tensor": (wrong_rows, {"change": {"a": 3}}, "TypeError", r"^tensors\['a'\]: .* \(on rank 1\)$"),
    "a number": (wrong_rows, {"change": {"a": torch.tensor(1.0)}}, "ValueError", r"^tensors\['a'\]: "),
    "complex": (wrong_rows, {"change": {"a": eye().to(torch.complex64)}}, "TypeError", r"^tensors\['a'\]: .*real"),
    "name": (
        wrong_rows,
        {"change": {"a": eye(), "c": torch.arange(2)}},
        "ValueError",
        r"'b'.* on rank 0.*'c'.* on rank 1",
    ),
    "one tensor more": (wrong_rows, {"change": {"a": eye(), "b": torch.arange(2), "c": eye()}}, "ValueError", "'c'"),
    "row width": (wrong_rows, {"change": {"a": eye(2, 4), "b": torch.arange(2)}}, "ValueError", r"\(3, .*\(4, "),
    "row dtype": (wrong_rows, {"change": {"a": eye(), "b": torch.arange(2).int()}}, "ValueError", r"int64.*int32"),
    "gradient": (
        wrong_rows,
        {"change": {"a": eye(requires_grad=True), "b": torch.arange(2)}},
        "ValueError",
        r"with gradient.* on rank 1$",
    ),
}


def errors() -> dict[str, tuple[str, str, float]]:
    """What each wrong call says here; after it, a good one shows that all ranks are where they were."""
    rank, world = rank_and_world()
    found = {}
    for name, (call, change, _, _) in WRONG.items():
        says = raised(lambda call=call, change=change: call(rank, **change))
        found[name] = *says, float(F.mean_rows(torch.full((rank + 1,), float(rank)), group="auto"))
    md.gather_rows({"a": eye(world)})
    return found


# --------------------------------------------------------------------------------------------------------------------
# Averages
# --------------------------------------------------------------------------------------------------------------------


def average_of_ddp(compile_it: bool) -> tuple[str, int, float]:
    """A few steps under DDP; a digest of the average, the collectives of its updates, and how far it is from Eq. 6."""
    rank, _ = rank_and_world()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).to(DEVICE)
    wrapped = DistributedDataParallel(model)
    wrapped = torch.compile(wrapped, backend="eager") if compile_it else wrapped
    average = md.EMAWrapper(wrapped, decay=0.9)
    expected = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    traffic = 0
    for step in range(3):
        optimizer.zero_grad()
        wrapped(numbers(10 * step + rank, 2 + rank, 4, dtype=torch.float32)).square().mean().backward()
        optimizer.step()
        with CommDebugMode() as mode, counted() as calls:
            average.update(wrapped)
        traffic += mode.get_total_counts() + len(calls)
        expected = [0.9 * old + 0.1 * weight.detach() for old, weight in zip(expected, model.parameters(), strict=True)]
    average.check_in_sync()
    average.check_in_sync(group=dist.group.WORLD)
    pairs = zip(average.module.parameters(), expected, strict=True)
    return digest(average), traffic, max(float((a - b).abs().max()) for a, b in pairs)


def change_one_average(where: str) -> tuple[str, str]:
    """On all ranks but the first, one number of one tensor, or the number of updates."""
    torch.manual_seed(0)
    average = md.EMAWrapper(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    average.check_in_sync()
    if rank_and_world()[0] and where == "number of updates":
        average.set_extra_state(torch.tensor(3))
    elif rank_and_world()[0]:
        average.module.state_dict()[where].view(-1)[0] += 1
    return raised(average.check_in_sync)


def rename_one_average() -> tuple[str, str]:
    rank, _ = rank_and_world()
    return raised(md.EMAWrapper(nn.Sequential(*[nn.Linear(2, 2)] * (1 + (rank == 1)))).check_in_sync)


def average_of_replicas() -> tuple[str, str]:
    """Of DTensors that every rank holds whole, then with one changed."""
    rank, world = rank_and_world()
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Replicate()]))
    nn.init.zeros_(model.bias)
    average = md.EMAWrapper(model)
    average.check_in_sync()
    average.module.weight.to_local()[0, 0] += rank == 1
    return raised(average.check_in_sync)


def sharded(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of FSDP2 whose rows no number of ranks divides; on four, one has no row of the last layer."""
    from torch.distributed.fsdp import fully_shard

    model = whole(seed).to(dtype)
    fully_shard(model[0])
    fully_shard(model)
    return model


def whole(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def full(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


def average_of_shards(dtype: torch.dtype, saved: Path | None) -> tuple[int, list[str]]:
    """Collectives of updates, and what differs from the average of the whole model, step by step."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    rank, _ = rank_and_world()
    student, teacher = sharded(1, dtype), sharded(1)
    average = md.EMAWrapper(student, decay=0.75, teacher=teacher)
    reference = md.EMAWrapper(whole(1), decay=0.75)
    reference.module.load_state_dict(full(teacher))
    own = [parameter.to_local().clone() for parameter in teacher.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    traffic, wrong = 0, []
    for step in range(3):
        x = numbers(10 * step + rank, 2 + rank, 5, dtype=torch.float32)
        if step:  # leaves whole weights in place of shards, which an update must not take for them
            average(x)
        optimizer.zero_grad()
        student(x.to(dtype)).float().square().mean().backward()
        optimizer.step()
        if step == 2:
            with torch.no_grad():
                student(x.to(dtype))
        with CommDebugMode() as mode, counted() as calls:
            average.update(student)
        traffic += mode.get_total_counts() + len(calls)
        for old, new in zip(own, student.parameters(), strict=True):
            old.lerp_(new.detach().to_local().float(), 0.25)
        online = whole(1).to(dtype)
        online.load_state_dict(full(student))
        reference.update(online)
        named = zip(teacher.named_parameters(), own, strict=True)
        wrong += [f"shard {name} at {step}" for (name, shard), mine in named if not torch.equal(shard.to_local(), mine)]
        gathered, expected = full(teacher), reference.module.state_dict()
        wrong += [f"{name} at {step}" for name in expected if not torch.equal(gathered[name], expected[name])]
        wrong += [] if torch.allclose(average(x), reference(x)) else [f"output at {step}"]
    average.check_in_sync()
    if saved is not None:
        state = get_model_state_dict(average, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            torch.save(state, saved)
    return traffic, wrong


def copied_shards(dtype: torch.dtype) -> list[bool]:
    """Whether the shards are the student's after an update that copies: by a number, and by a schedule's first."""
    found = []
    for decay in (0.0, md.schedules.PowerFunction(0.1)):
        student, teacher = sharded(1, dtype), sharded(2)
        md.EMAWrapper(student, decay=decay, teacher=teacher).update(student)
        pairs = zip(teacher.parameters(), student.parameters(), strict=True)
        found += [torch.equal(old.to_local(), new.to_local().float()) for old, new in pairs]
    return found


def restore_shards(saved: Path) -> tuple[int, dict[str, list[float]]]:
    """The number of updates and the weights of a saved average, shared out anew."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    average = md.EMAWrapper(sharded(2), teacher=sharded(3))
    set_model_state_dict(average, torch.load(saved), options=StateDictOptions(full_state_dict=True))
    return average.step, {name: tensor.flatten().tolist() for name, tensor in full(average.module).items()}


def swap_shards() -> list[str]:
    """What is wrong inside a swap and after it, where passes through the models make whole weights of the shards."""
    student, average = sharded(1), md.EMAWrapper(sharded(1), teacher=sharded(2))
    x = numbers(1, 3, 5, dtype=torch.float32)
    with torch.no_grad():
        own, averaged_ = student(x), average(x)
        with average.swap(student):
            inside = student(x)
        after = student(x)
        average.copy_to(student)
        copied = student(x)
    pairs = {"inside": (inside, averaged_), "after": (after, own), "copied": (copied, averaged_)}
    return [name for name, (a, b) in pairs.items() if not torch.equal(a, b)]


def loss_beside_shards(sizes: tuple[int, ...]) -> tuple[list[float], float]:
    """Gradients of a sharded student, and of the temperature of a loss that DDP holds, for FSDP2 takes no scalars."""
    from torch.distributed.fsdp import fully_shard

    _, world = rank_and_world()
    torch.manual_seed(1)
    student, loss_fn = nn.Linear(4, 3).double(), md.SupConDistillLoss().double()
    mine = own_part(sizes)
    wrapped = loss_fn
    if world > 1:
        fully_shard(student)
        wrapped = DistributedDataParallel(loss_fn)
    labels = (torch.arange(sum(sizes)) % CLASSES)[mine]
    here = md.gather_rows({"keys": student(numbers(1, sum(sizes), 4)[mine]), "labels": labels})
    wrapped(student(numbers(2, sum(sizes), 4)[mine]), here["keys"], labels, here["labels"]).backward()
    grad = student.weight.grad
    grad = grad.full_tensor() if world > 1 else grad
    return grad.flatten().tolist(), float(loss_fn.log_temperature_ratio.grad)


# --------------------------------------------------------------------------------------------------------------------
# Everything inside one module
# --------------------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Student, its average, queue and loss as parts of one module, whose buffers DDP may broadcast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.student = nn.Linear(4, 3).double()
        self.average = md.EMAWrapper(self.student, decay=0.8)
        self.queue = md.ClassQueue(9, {"online": 3, "momentum": 3}, dtype=torch.float64)
        self.contrast = md.SupConDistillLoss().double()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        query, momentum = self.student(x), self.average(x)
        here = md.gather_rows({"online": query, "momentum": momentum, "labels": labels})
        past = {name: self.queue.read(name, padded=True) for name in self.queue.streams}
        return self.contrast(
            query,
            (here["online"], past["online"][0]),
            labels,
            (here["labels"], past["online"][1]),
            momentum_query=momentum,
            momentum_keys=(here["momentum"], past["momentum"][0]),
        )

    @torch.no_grad()
    def after_step(self, x: Tensor, labels: Tensor) -> None:
        self.average.update(self.student)
        self.queue.enqueue(labels, {"online": self.student(x), "momentum": self.average(x)})


def sync_buffers(whether: bool) -> dict[str, bool]:
    """The option of DDP, whose name has changed."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": whether}


def train_everything(sizes: tuple[int, ...], accumulate: int, options: dict) -> tuple[str, dict[str, list[float]]]:
    """A digest of the module after five steps, and its numbers."""
    _, world = rank_and_world()
    model = Everything().to(DEVICE)
    ddp = DistributedDataParallel(model, **options) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    mine = own_part(sizes)
    for step in range(5):
        optimizer.zero_grad()
        for turn in range(accumulate):
            x = numbers(10 * step + turn, sum(sizes), 4)[mine]
            labels = (numbers(100 + 10 * step + turn, sum(sizes)) * 2).long().clamp(min=-2)[mine]
            # static_graph has to see its first pass back without no_sync.
            sync = turn == accumulate - 1 or step == 0 or world == 1
            with nullcontext() if sync else ddp.no_sync():
                (ddp(x, labels) / accumulate).backward()
        optimizer.step()
        model.after_step(x, labels)
    state = {name: tensor.double().flatten().tolist() for name, tensor in model.state_dict().items()}
    return digest(model), state
