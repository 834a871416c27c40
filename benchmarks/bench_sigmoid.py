"""SigmoidDistillLoss, forward and backward, against the dense formula of SigLIP and against SupConDistillLoss.

    python benchmarks/bench_sigmoid.py            (N, Q) up to (128, 8192), a minute
    python benchmarks/bench_sigmoid.py --full     up to (512, 262144), ten minutes, 4 GiB

Inputs and bound are those of bench_supcon.py. Each loss and gradient is compared with the formula in float64.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_supcon import ALPHA, BOUND, SIZES, Side, build_chunked, forward_and_backward, make_sides, ours_loss
from common import Case, Contender, Options, Run, parse_options, run_cases, write_results
from momentum_distill.functional import sigmoid_distill_loss

TEMPERATURE, BIAS = 0.1, -10.0  # SigLIP's first values

sigmoid_loss = functools.partial(ours_loss, loss=sigmoid_distill_loss, temperature=TEMPERATURE, bias=BIAS)


def dense_loss(side: Side, *, momentum: bool) -> Tensor:
    """The formula as open_clip has it, -logsigmoid of the signed logits, and the KL term in the same way."""

    def logits(query: Tensor, keys: Tensor) -> Tensor:
        return F.normalize(query, dim=1) @ keys.T / TEMPERATURE + BIAS

    z, match = logits(side.query, side.keys), side.labels[:, None] == side.key_labels
    supervised = -F.logsigmoid(torch.where(match, z, -z)).sum() / len(z)
    if not momentum:
        return supervised
    with torch.no_grad():
        target = logits(side.momentum_query, side.momentum_keys)
        share, entropy = target.sigmoid(), F.binary_cross_entropy_with_logits(target, target.sigmoid(), reduction="sum")
    cross_entropy = F.binary_cross_entropy_with_logits(z, share, reduction="sum")
    return (1 - ALPHA) * supervised + ALPHA * (cross_entropy - entropy) / len(z)


def build(loss: Any, *, compiled: bool = False, **parameters: Any) -> Run:
    momentum = parameters.pop("momentum")
    loss = functools.partial(loss, momentum=momentum)
    loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
    return forward_and_backward(loss, make_sides(**parameters))


def build_by_eighths(*, momentum: bool, **parameters: Any) -> Run:
    return build_chunked(functools.partial(dense_loss, momentum=momentum), **parameters)


OURS = Contender("momentum-distill", functools.partial(build, sigmoid_loss), role="ours")
DENSE = Contender("dense formula (SigLIP), eager", functools.partial(build, dense_loss), role="reference")
COMPILED = Contender(
    "dense formula (SigLIP), torch.compile", functools.partial(build, dense_loss, compiled=True), role="reference"
)
CHUNKED = Contender("dense formula (SigLIP), torch.compile, by eighths of the rows", build_by_eighths, role="reference")
SOFTMAX = Contender(
    "momentum-distill, SupConDistillLoss", functools.partial(build, ours_loss), role="ours", computes="a softmax"
)


def check_agreement(contender: Contender, parameters: dict[str, Any], value: object) -> dict[str, Any]:
    """Loss, its error and that of the gradient, both relative to float64."""
    if contender.role == "bound":
        return {}
    loss, (gradient,) = value
    row = {"loss": float(loss), "loss_error": None, "gradient_error": None}
    if contender is not SOFTMAX:
        expected, exact_gradient = exact(*sorted(parameters.items()))
        row["loss_error"] = abs(float(loss) - expected) / abs(expected)
        row["gradient_error"] = float((gradient.double() - exact_gradient).norm() / exact_gradient.norm())
    return row


@functools.lru_cache(maxsize=1)
def exact(*parameters: tuple[str, Any]) -> tuple[float, Tensor]:
    """Loss and gradient in float64, some rows at a time."""
    given = dict(parameters)
    momentum = given.pop("momentum")
    (side,) = make_sides(**given)
    doubled = Side(*(x.detach().double() if x.is_floating_point() else x for x in side))
    total, gradients = 0.0, []
    for rows in torch.arange(len(side.query)).split(max(1, 2**22 // len(side.keys))):
        query = doubled.query[rows].requires_grad_()
        some = doubled._replace(query=query, labels=side.labels[rows], momentum_query=doubled.momentum_query[rows])
        loss = dense_loss(some, momentum=momentum) * len(rows) / len(side.query)
        gradients += torch.autograd.grad(loss, query)
        total += loss.item()
    return total, torch.cat(gradients)


def make_cases(options: Options) -> list[Case]:
    common = {"directions": 1, "device": options.device, "dtype": "float32"}
    return [
        Case(
            f"sigmoid loss, N={rows}, Q={keys}{'' if momentum else ', no momentum targets'}",
            (BOUND, OURS, DENSE, COMPILED, CHUNKED, SOFTMAX),
            {"rows": rows, "keys": keys, "momentum": momentum, **common},
            check_agreement,
            rounds=10 if rows * keys == 2**24 else 3,
        )
        for rows, keys in SIZES[options.size]
        for momentum in (True, False)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(__doc__ or "", arguments)
    write_results("sigmoid", *run_cases(make_cases(options), options), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
