"""SupConDistillLoss, forward and backward, against the dense formula and the losses of other libraries.

    python benchmarks/bench_supcon.py            (N, Q) up to (128, 8192), a few minutes
    python benchmarks/bench_supcon.py --full     up to (512, 262144), and Q up to a million: an hour, 8 GiB

The bound is the time of the multiplications alone at the full rate of the machine: four products (both score matrices,
online and momentum, and both weighted sums of keys), which is all that a loss with its query gradient needs of the
keys. The rate of a CPU is that of one large `torch.mm`, timed in the same rounds; that of a GPU is the peak of its
tensor cores by the data sheet. Each contender's loss and gradient are compared with the formula in float64, where it
computes the same.

The cases named "module" have what a training has: raw keys, so that both sides are normalised, and a learned
temperature, whose gradient is taken too.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (
    Case,
    Contender,
    Options,
    Run,
    device_name,
    import_part,
    parse_options,
    peak_rate,
    run_cases,
    write_results,
)
from momentum_distill import SupConDistillLoss
from momentum_distill.functional import supcon_distill_loss

TEMPERATURE, ALPHA, CLASSES, DIM = 0.07, 0.4, 3, 128
SQUARE = {"cpu": 512, "cuda": 8192}  # of the product that gives the rate; on one core larger ones were 5 % slower

SIZES = {
    "quick": [(4, 32)],
    "small": [(16, 64), (64, 1024), (128, 8192)],
    "full": [(16, 64), (64, 1024), (128, 8192), (256, 65536), (512, 262144)],
}
TWO_DIRECTIONS = {"quick": [(4, 32)], "small": [(64, 1024)], "full": [(64, 1024), (256, 65536)]}
SCALING_KEYS = {
    "quick": [32, 64],
    "small": [2**10, 2**12, 2**14, 2**16],
    "full": [2**10, 2**12, 2**14, 2**16, 2**18, 2**20],
}
SCALING_ROWS = {"quick": [4, 8], "small": [16, 64, 256], "full": [16, 64, 256, 1024]}


class Side(NamedTuple):
    """The inputs of one direction. Keys are unit rows, as a queue keeps them, unless raw; queries are not."""

    query: Tensor  # (N, d)
    keys: Tensor  # (Q, d)
    labels: Tensor  # (N,)
    key_labels: Tensor  # (Q,)
    momentum_query: Tensor  # (N, d)
    momentum_keys: Tensor  # (Q, d)


@functools.lru_cache(maxsize=1)
def make_sides(rows: int, keys: int, directions: int, device: str, dtype: str, raw: bool = False) -> list[Side]:
    """Random inputs, the same for every contender; nobody writes into them."""
    generator = torch.Generator().manual_seed(rows + keys)
    kind = getattr(torch, dtype)

    def unit(count: int) -> Tensor:
        return F.normalize(torch.randn(count, DIM, generator=generator), dim=1).to(device, kind)

    sides = []
    for _ in range(directions):
        # A momentum model is a little behind its online model: close, not equal.
        query, online = torch.randn(rows, DIM, generator=generator), unit(keys)
        behind = F.normalize(online.float() + 0.05 * unit(keys).float(), dim=1).to(kind)
        labels = torch.randint(CLASSES, (rows + keys,), generator=generator).to(device)
        momentum_query = (query + 0.5 * torch.randn(rows, DIM, generator=generator)).to(device, kind)
        query = query.to(device, kind).requires_grad_()
        if raw:
            lengths = (0.5 + torch.rand(keys, 1, generator=generator)).to(device, kind)
            online, behind = online * lengths, behind * lengths
        sides.append(Side(query, online, labels[:rows], labels[rows:], momentum_query, behind))
    return sides


def forward_and_backward(loss: Any, sides: list[Side], learned: Sequence[Tensor] = ()) -> Run:
    """A run that returns the mean loss of the directions and the gradients of the queries and of what is learned."""

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        value = sum(loss(side) for side in sides) / len(sides)
        return value.detach(), torch.autograd.grad(value, [*(side.query for side in sides), *learned])

    return run


# -------------------------------------------------------------------------------------------------- contenders


def build_bound(*, device: str, dtype: str, **_: Any) -> Run:
    """One product of the size at which the machine is fastest."""
    left, right = torch.ones(2, SQUARE[device], SQUARE[device], device=device, dtype=getattr(torch, dtype))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)


def reckon_bound(seconds: float, *, device: str, dtype: str, **parameters: Any) -> float:
    """Of the four products of a case, at the peak of the device or the rate of the product that took `seconds`."""
    peak = None if device == "cpu" else peak_rate(device_name(device), dtype)
    return flops(**parameters) / (peak or 2 * SQUARE[device] ** 3 / seconds)


def flops(*, rows: int, keys: int, directions: int, **_: Any) -> int:
    """Of the four products: two for each multiplication, which comes with an addition."""
    return 4 * 2 * rows * keys * DIM * directions


def ours_loss(side: Side, *, momentum: bool = True, loss: Any = supcon_distill_loss, **settings: Any) -> Tensor:
    """The loss of one direction, of this block or of another that takes the same."""
    momentum_inputs = {"momentum_query": side.momentum_query, "momentum_keys": side.momentum_keys}
    settings = {"temperature": TEMPERATURE, "alpha": ALPHA, "normalize": "query", **settings}
    settings |= momentum_inputs if momentum else {}
    return loss(side.query, side.keys, side.labels, side.key_labels, **settings)


def build_ours(*, momentum: bool, **parameters: Any) -> Run:
    return forward_and_backward(functools.partial(ours_loss, momentum=momentum), make_sides(**parameters))


def build_module(*, compiled: bool = False, **parameters: Any) -> Run:
    module = SupConDistillLoss(temperature=TEMPERATURE, alpha=ALPHA, group=None).to(parameters["device"])
    loss = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module

    def of(side: Side) -> Tensor:
        momentum_inputs = {"momentum_query": side.momentum_query, "momentum_keys": side.momentum_keys}
        return loss(side.query, side.keys, side.labels, side.key_labels, **momentum_inputs)

    return forward_and_backward(of, make_sides(**parameters), list(module.parameters()))


def dense_loss(side: Side, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """The formula as ALBEF's retrieval model has it: N×Q logits, targets and log-softmax."""
    logits = (F.normalize(side.query, dim=1) @ side.keys.T).float() / temperature
    with torch.no_grad():
        seen = (F.normalize(side.momentum_query, dim=1) @ side.momentum_keys.T).float() / temperature
        positive = (side.labels[:, None] == side.key_labels).float()
        targets = ALPHA * F.softmax(seen, dim=1) + (1 - ALPHA) * positive / positive.sum(dim=1, keepdim=True)
    return -(F.log_softmax(logits, dim=1) * targets).sum(dim=1).mean()


def build_dense(**parameters: Any) -> Run:
    return forward_and_backward(dense_loss, make_sides(**parameters))


def build_compiled(**parameters: Any) -> Run:
    return forward_and_backward(torch.compile(dense_loss, fullgraph=True, dynamic=False), make_sides(**parameters))


def by_chunks(loss: Any, side: Side) -> tuple[Tensor, tuple[Tensor]]:
    """An eighth of the rows at a time, each with its gradient at once: the same loss, for no row knows of another."""
    total, gradients = torch.zeros((), device=side.query.device), []
    for rows in torch.arange(len(side.query), device=side.query.device).tensor_split(8):
        if len(rows):
            query = side.query.detach()[rows].requires_grad_()
            some = side._replace(query=query, labels=side.labels[rows], momentum_query=side.momentum_query[rows])
            value = loss(some) * (len(rows) / len(side.query))
            gradients += torch.autograd.grad(value, query)
            total += value.detach()
    return total, (torch.cat(gradients),)


def build_chunked(loss: Any = dense_loss, **parameters: Any) -> Run:
    (side,) = make_sides(**parameters)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    return lambda: by_chunks(compiled, side)


class DenseModule(nn.Module):
    """The same with raw keys and a learned temperature, which is kept in the range of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.log_ratio = nn.Parameter(torch.zeros(()))

    def forward(self, side: Side) -> Tensor:
        temperature = (TEMPERATURE * self.log_ratio.exp()).clamp(0.01, 10.0)
        keys, momentum_keys = (F.normalize(keys, dim=1) for keys in (side.keys, side.momentum_keys))
        return dense_loss(side._replace(keys=keys, momentum_keys=momentum_keys), temperature)


def build_dense_module(*, compiled: bool = False, **parameters: Any) -> Run:
    module = DenseModule().to(parameters["device"])
    loss = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    return forward_and_backward(loss, make_sides(**parameters), list(module.parameters()))


def pml_loss() -> nn.Module:
    """For rows of unit length, so that it does not normalise the keys once more."""
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE, distance=DotProductSimilarity(normalize_embeddings=False))


def build_pml(**parameters: Any) -> Run:
    loss = pml_loss()

    def of(side: Side) -> Tensor:
        return loss(F.normalize(side.query, dim=1), side.labels, ref_emb=side.keys, ref_labels=side.key_labels)

    return forward_and_backward(of, make_sides(**parameters))


def build_pml_memory(**parameters: Any) -> Run:
    from pytorch_metric_learning.losses import CrossBatchMemory

    sides = make_sides(**parameters)
    memories = {}
    for side in sides:
        memory = CrossBatchMemory(pml_loss(), DIM, memory_size=parameters["keys"])
        memory.embedding_memory = memory.embedding_memory.to(side.keys)
        memory.label_memory = memory.label_memory.to(side.keys.device)
        memory.add_to_memory(side.keys, side.key_labels, parameters["keys"])
        memories[id(side)] = memory
    return forward_and_backward(lambda side: memories[id(side)](F.normalize(side.query, dim=1), side.labels), sides)


def build_lightly(**parameters: Any) -> Run:
    packages = ("lightly.loss", "lightly.models", "lightly.models.modules")
    module = import_part("lightly.loss.ntx_ent_loss", bare=packages)
    sides = make_sides(**parameters)
    bank = (parameters["keys"], DIM)
    kind = getattr(torch, parameters["dtype"])
    losses = {id(side): module.NTXentLoss(TEMPERATURE, bank).to(parameters["device"], kind) for side in sides}
    return forward_and_backward(lambda side: losses[id(side)](side.query, side.momentum_query), sides)


def build_ours_compiled(**parameters: Any) -> Run:
    return forward_and_backward(torch.compile(ours_loss, fullgraph=True, dynamic=False), make_sides(**parameters))


def build_captured(build: Callable[..., Run], **parameters: Any) -> Run:
    """Forward and backward as one CUDA graph, replayed: what starting each operation by itself costs falls away."""
    run = build(**parameters)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        return result

    return replay


BOUND = Contender("four products at the full rate", build_bound, role="bound", reckon=reckon_bound)
OURS = Contender("momentum-distill", functools.partial(build_ours, momentum=True), role="ours")
OURS_SUPERVISED = Contender(
    "momentum-distill, no momentum targets",
    functools.partial(build_ours, momentum=False),
    role="ours",
    computes="supervised part alone",
)
OURS_COMPILED = Contender("momentum-distill, under torch.compile", build_ours_compiled, role="ours", compiler=True)
DENSE = Contender("dense formula (ALBEF), eager", build_dense, role="reference")
COMPILED = Contender("dense formula (ALBEF), torch.compile", build_compiled, role="reference")
CHUNKED = Contender("dense formula (ALBEF), torch.compile, by eighths of the rows", build_chunked, role="reference")
CAPTURED = tuple(
    Contender(f"{each.name}, in a CUDA graph", functools.partial(build_captured, each.build), each.role, memory=False)
    for each in (OURS, DENSE, COMPILED)
)
MODULE = Contender(OURS.name, build_module, role="ours")
MODULE_COMPILED = Contender(
    OURS_COMPILED.name, functools.partial(build_module, compiled=True), role="ours", compiler=True
)
DENSE_MODULE = Contender(DENSE.name, build_dense_module, role="reference")
DENSE_MODULE_COMPILED = Contender(COMPILED.name, functools.partial(build_dense_module, compiled=True), role="reference")
PML = Contender(
    "pytorch-metric-learning SupConLoss",
    build_pml,
    computes="supervised part alone",
    needs="pytorch_metric_learning",
)
PML_MEMORY = Contender(
    "pytorch-metric-learning CrossBatchMemory",
    build_pml_memory,
    computes="supervised part alone, and the queue",
    needs="pytorch_metric_learning",
)
LIGHTLY = Contender(
    "lightly NTXentLoss", build_lightly, computes="one positive per row, and the queue", needs="lightly"
)

EVERYONE = (BOUND, OURS, OURS_SUPERVISED, DENSE, COMPILED, PML, LIGHTLY)
AS_MODULE = (BOUND, MODULE, MODULE_COMPILED, DENSE_MODULE, DENSE_MODULE_COMPILED)
IN_SCALING = (BOUND, OURS, DENSE, COMPILED, PML, LIGHTLY)


# ---------------------------------------------------------------------------------------------------- agreement


def check_agreement(contender: Contender, parameters: dict[str, Any], value: object) -> dict[str, Any]:
    """Loss, its error and that of the gradient, both relative to float64, where the contender computes the formula."""
    if contender.role == "bound":
        return {}
    loss, gradients = value
    row = {"loss": float(loss), "loss_error": None, "gradient_error": None}
    if contender not in (PML_MEMORY, LIGHTLY):
        momentum = contender not in (OURS_SUPERVISED, PML)
        expected, cross_entropy, expected_gradients = exact(momentum, *sorted(parameters.items()))
        # The dense formula leaves out the entropy of the momentum targets, which has no gradient.
        expected = cross_entropy if contender.role == "reference" else expected
        row["loss_error"] = abs(float(loss) - expected) / abs(expected)
        differences = [
            (mine.double() - theirs.to(mine.device)).norm()
            for mine, theirs in zip(gradients, expected_gradients, strict=True)
        ]
        row["gradient_error"] = float(sum(differences) / sum(theirs.norm() for theirs in expected_gradients))
    return row


@functools.lru_cache(maxsize=2)
def exact(momentum: bool, *parameters: tuple[str, Any]) -> tuple[float, float, list[Tensor]]:
    """Loss with KL, loss with cross-entropy, and gradients in float64, some rows at a time.

    With raw keys the last gradient is that of the logarithm of the temperature.
    """
    sides, raw = make_sides(**dict(parameters)), dict(parameters).get("raw", False)
    with_kl = with_cross_entropy = 0.0
    gradients = []
    of_log_temperature = torch.zeros((), dtype=torch.double)
    for side in sides:
        rows = len(side.query)
        parts = []
        at_a_time = max(1, 2**22 // len(side.keys))
        keys, momentum_keys = side.keys.double(), side.momentum_keys.double()
        if raw:
            keys, momentum_keys = F.normalize(keys, dim=1), F.normalize(momentum_keys, dim=1)
        for start in range(0, rows, at_a_time):
            some = slice(start, start + at_a_time)
            query = side.query[some].detach().double().requires_grad_()
            log_ratio = torch.zeros((), dtype=torch.double, device=query.device, requires_grad=True)
            logits = F.normalize(query, dim=1) @ keys.T / TEMPERATURE
            log_probs = F.log_softmax(logits / log_ratio.exp(), dim=1)
            positive = (side.labels[some, None] == side.key_labels).double()
            loss = -(log_probs * positive).sum(dim=1) / positive.sum(dim=1)
            entropy = torch.zeros(())
            if momentum:
                seen = F.normalize(side.momentum_query[some].double(), dim=1) @ momentum_keys.T / TEMPERATURE
                targets = F.softmax(seen, dim=1)
                entropy = -(targets * F.log_softmax(seen, dim=1)).sum()
                loss = (1 - ALPHA) * loss - ALPHA * (targets * log_probs).sum(dim=1)
            loss = loss.sum() / rows / len(sides)
            grads = torch.autograd.grad(loss, [query, log_ratio])
            parts.append(grads[0])
            of_log_temperature += grads[1].cpu()
            with_cross_entropy += float(loss.detach())
            with_kl += float(loss.detach()) - ALPHA * float(entropy) / rows / len(sides)
        gradients.append(torch.cat(parts))
    return with_kl, with_cross_entropy, [*gradients, *([of_log_temperature] if raw else [])]


# --------------------------------------------------------------------------------------------------------- main


def make_cases(options: Options) -> list[Case]:
    kind = options.rest.dtype
    named = "" if kind == "float32" else f", {kind}"
    captured = CAPTURED if options.device == "cuda" else ()
    common = {"device": options.device, "dtype": kind}
    sizes = [(rows, keys, 1) for rows, keys in SIZES[options.size]]
    sizes += [(rows, keys, 2) for rows, keys in TWO_DIRECTIONS[options.size]]
    cases = [
        Case(
            f"loss, N={rows}, Q={keys}, {directions} direction{'s' if directions > 1 else ''}{named}",
            (
                *EVERYONE,
                *((PML_MEMORY,) if keys < 65536 else ()),  # half the time of all, at those
                *((OURS_COMPILED, CHUNKED) if directions == 1 else ()),
                *captured,
            ),
            {"rows": rows, "keys": keys, "directions": directions, **common},
            check_agreement,
            rounds=10 if rows * keys == 2**24 else 3,  # of which the page on performance speaks first
        )
        for rows, keys, directions in sizes
    ]
    cases += [
        Case(
            f"module, raw keys, N={rows}, Q={keys}{named}",
            AS_MODULE,
            {"rows": rows, "keys": keys, "directions": 1, **common, "raw": True},
            check_agreement,
        )
        for rows, keys in SIZES[options.size][:4]
    ]
    few, many = (4, 32) if options.size == "quick" else (64, 8192)
    scaling = [("keys", few, keys) for keys in SCALING_KEYS[options.size]]
    scaling += [("rows", rows, many) for rows in SCALING_ROWS[options.size]]
    cases += [
        Case(
            f"scaling with {'Q' if along == 'keys' else 'N'}, N={rows}, Q={keys}",
            IN_SCALING,
            {"rows": rows, "keys": keys, "directions": 1, **common},
            check_agreement,
        )
        for along, rows, keys in scaling
    ]
    return cases


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(
        __doc__ or "",
        arguments,
        lambda parser: parser.add_argument(
            "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of all features"
        ),
    )
    block = "supcon" if options.rest.dtype == "float32" else f"supcon_{options.rest.dtype}"
    write_results(block, *run_cases(make_cases(options), options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
