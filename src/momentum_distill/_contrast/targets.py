r"""Momentum targets that do not gather on a few keys: centred as in DINO, balanced as in SwAV and DINOv2.

Both are $U_i = \mathrm{softmax}_j(s'_{ij} + b_j)$ with $s'_{ij} = \bar q_i'^\top \bar k_j' / \tau'$ and one number for
each key. The engine is given other queries and keys, so that no way through the keys knows of them.
"""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from momentum_distill._checks import may_ask
from momentum_distill._contrast import engine
from momentum_distill._contrast.matrices import ready
from momentum_distill._contrast.problem import Part, Prepare, Problem, changed, masked
from momentum_distill._contrast.tiles import tile_size
from momentum_distill._group import Ranks, all_gather, sum_over_ranks
from momentum_distill._precision import as_variable

Targets: TypeAlias = Literal["softmax", "centred", "sinkhorn"]
TARGETS = ("softmax", "centred", "sinkhorn")

ITERATIONS = 3
"""Of Sinkhorn-Knopp, as in SwAV and DINOv2."""


def centred(problem: Problem, centre: Tensor) -> Problem:
    r"""$b_j = -c^\top \bar k_j' / \tau'$: the logits of the query $\bar q_i' - c$."""
    assert problem.momentum_query is not None
    present = masked(problem).present
    query = ready(problem.query, present, problem.prepare)
    momentum = ready(problem.momentum_query.detach(), present, problem.prepare) - centre.detach().to(query.dtype)
    return changed(problem, query, problem.keys, momentum, Prepare(query.dtype, normalize=False))


def balanced(problem: Problem, ranks: Ranks | None) -> Problem:
    r"""$b_j$ so that all keys get as much: one more entry of the momentum keys, where momentum queries have a 1."""
    assert problem.momentum_query is not None
    known = masked(problem)
    query = ready(problem.query, known.present, problem.prepare)
    momentum = ready(problem.momentum_query.detach(), known.present, problem.prepare)
    online = [ready(part.online, part.present, part.prepare) for part in known.keys]
    others = [_momentum_rows(part, rows) for part, rows in zip(known.keys, online, strict=True)]
    temperature = problem.momentum_temperature
    temperature = temperature.detach() if isinstance(temperature, Tensor) else temperature
    bias = _key_biases(known, momentum / temperature, others, ranks) * temperature
    columns = bias[:, None].split_with_sizes([rows.shape[0] for rows in others])
    parts = []
    for part, rows, other, column in zip(known.keys, online, others, columns, strict=True):
        keys = torch.cat([rows, column], dim=1)  # an entry for which students have a 0
        momentum_keys = keys if part.momentum is part.online else torch.cat([other, column], dim=1)
        parts.append(
            Part(keys, momentum_keys, part.labels, Prepare(part.prepare.dtype, normalize=False), part.own, part.targets)
        )
    one = query.new_ones(query.shape[0], 1)
    query, momentum = torch.cat([query, one * 0], dim=1), torch.cat([momentum, one], dim=1)
    return changed(problem, query, parts, momentum, Prepare(query.dtype, normalize=False))


def _momentum_rows(part: Part, online: Tensor) -> Tensor:
    """The momentum keys prepared, which may be the online ones."""
    if part.momentum is None or part.momentum is part.online:
        return online.detach()
    return ready(part.momentum.detach(), part.present, part.prepare)


@torch.no_grad()
def _key_biases(problem: Problem, queries: Tensor, keys: list[Tensor], ranks: Ranks | None) -> Tensor:
    r"""$b$ (Q,) of prepared momentum queries, divided by the temperature, and prepared momentum keys.

    Sinkhorn-Knopp in logarithms, from $a = 0$:

    $$b_j \leftarrow \log\tfrac NQ - \log\sum_i e^{s'_{ij} + a_i}, \qquad
      a_i \leftarrow -\log\sum_j e^{s'_{ij} + b_j}$$

    over the rows of all ranks and the keys that are there. The last $a$ is the softmax that the loss takes.
    """
    rows, absent = queries.shape[0], None if problem.present is None else ~problem.present
    seen = [part.labels.shape[0] if part.present is None else part.present.sum() for part in problem.keys]
    there = as_variable(rows, queries) if problem.present is None else problem.present.sum()
    signature = "" if ranks is None else _signature(problem)
    (there,) = sum_over_ranks(ranks, signature, there.to(queries.dtype))
    share = torch.log(there.clamp(min=1) / as_variable(sum(seen), queries).clamp(min=1)).to(queries.dtype)
    bias = queries.new_zeros(sum(part.shape[0] for part in keys))
    if not bias.shape[0]:
        return bias

    def sweep() -> Iterator[Tensor]:
        return _logits(problem, queries, keys)

    kept = list(sweep()) if engine.is_small(problem) else None
    scale = queries.new_zeros(rows)
    for turn in range(ITERATIONS):
        if turn:
            scale = torch.full_like(scale, -torch.inf)
            start = 0
            for logits in kept or sweep():
                found = (logits + bias[start : start + logits.shape[1]]).logsumexp(dim=1)
                scale, start = torch.logaddexp(scale, found), start + logits.shape[1]
            scale = _negated(scale)
        if absent is not None:
            scale = scale.masked_fill(absent, -torch.inf)
        sums = [(logits + scale[:, None]).logsumexp(dim=0) for logits in kept or sweep()]
        total = torch.cat(sums)
        if ranks is not None:
            total = all_gather(ranks, total).logsumexp(dim=0)
        bias = _negated(total - share)
    return bias


def _logits(problem: Problem, queries: Tensor, keys: list[Tensor]) -> Iterator[Tensor]:
    """Momentum logits (N, B), some keys at a time; minus infinity where a row does not see a key."""
    for part, rows in zip(problem.keys, keys, strict=True):
        count = max(1, -(-rows.shape[0] // tile_size(queries)))  # the only number that a compiler takes for a constant
        number = torch.arange(rows.shape[0], device=rows.device)
        for tile, here in zip(rows.chunk(count), number.chunk(count), strict=True):
            logits = queries @ tile.T
            if part.present is not None:
                logits = logits.masked_fill(~part.present[here], -torch.inf)
            if part.own:
                logits = logits.masked_fill(number[:, None] == here, -torch.inf)
            yield logits


def _negated(log_sum: Tensor) -> Tensor:
    """Of a sum over nothing, 0: a key that no row sees, or a row that sees no key."""
    return torch.where(log_sum == -torch.inf, 0.0, -log_sum)


def _signature(problem: Problem) -> str:
    """What has to be the same on all ranks; where the labels of the keys can be read, those by a number."""
    labels = torch.cat([part.labels for part in problem.keys])
    number = ""
    if may_ask(labels):
        number = f" whose labels, by place, add up to {int((labels * torch.arange(1, len(labels) + 1)).sum())}"
    return f"SupConDistillLoss with momentum_targets='sinkhorn' and {len(labels)} keys{number}"
