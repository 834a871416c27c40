"""Which processes a block works with, and all that crosses between them.

A loss sums a few numbers over the ranks (:func:`sum_over_ranks`), a queue gathers rows (:func:`gather_rows`). Both take
a number of collectives that never depends on the data, and both carry a checksum of what has to be the same on all
ranks: what is wrong on one raises the same error on every one, and none is left waiting.

What bounds a wait is the timeout of the process group. Gathering has to know how many rows each rank brings, for which
the host waits for the other ranks; with a backend for the CPU (`"cpu:gloo,cuda:nccl"`) not for the accelerator.
"""

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from momentum_distill._checks import check_device, describe, in_transform, may_ask, wrong_type, wrong_value

Group: TypeAlias = dist.ProcessGroup | Literal["auto"] | None


class Ranks(NamedTuple):
    """Several processes that work together, as seen by one of them."""

    group: dist.ProcessGroup
    size: int
    rank: int


def check_group(group: object) -> None:
    """Refuse what is neither "auto", None nor a process group that this process belongs to."""
    if group is None or (isinstance(group, str) and group == "auto"):
        return
    if not isinstance(group, dist.ProcessGroup):
        got = describe(group)
        if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
            got = "what new_group() returns to a rank that is not in the group"
        wrong_type("group", "'auto', None or a torch.distributed process group that holds this rank", got)


def find_ranks(group: Group) -> Ranks | None:
    """Who works together, or None for this process alone.

    Asked at every step, since a process group may be initialised after a block was built.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    chosen = dist.group.WORLD if isinstance(group, str) else group
    assert chosen is not None
    size = dist.get_world_size(chosen)
    return Ranks(chosen, size, dist.get_rank(chosen)) if size > 1 else None


def describe_group(group: Group) -> str:
    """The argument and what it stands for now, for a `repr`."""
    name = repr(group) if group is None or isinstance(group, str) else "process group"
    ranks = find_ranks(group)
    return f"{name} (this process alone)" if ranks is None else f"{name} (rank {ranks.rank} of {ranks.size})"


# --------------------------------------------------------------------------------------------------------------------
# Sums
# --------------------------------------------------------------------------------------------------------------------

SLOTS = 6
"""Numbers that a sum carries, whichever loss asks: ranks that disagree about the loss must not disagree about this."""


def sum_over_ranks(ranks: Ranks | None, signature: str, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of at most six numbers of shape `()`, summed over the ranks in one collective; the same bits on all.

    They are gathered in float64 and added in rank order. The gradient is that of a mean over ranks, as DDP takes it:
    what a rank passes back, times the number of ranks. `signature` says in words what has to be the same on all ranks,
    compared where that is free: on the CPU.
    """
    if ranks is None:
        return values
    if in_transform():
        wrong_value("group", "None inside a transform of torch.func", f"one of {ranks.size} processes")
    totals = _Sum.apply(torch.stack([value.to(torch.float64) for value in values]), ranks, signature)
    return tuple(total.to(value.dtype) for total, value in zip(totals.unbind(), values, strict=True))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks, signature: str) -> Tensor:  # noqa: ANN401
        ctx.size = ranks.size
        return sum_vector_over_ranks(ranks, signature, F.pad(values, (0, SLOTS - len(values))))[: len(values)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return grad * ctx.size, None, None


def sum_vector_over_ranks(ranks: Ranks | None, signature: str, values: Tensor) -> Tensor:
    """The same of a vector, with its length for the slots, and without a gradient."""
    if ranks is None:
        return values
    sent = F.pad(values.to(torch.float64), (2, 0))  # 0 for "no error", then the checksum
    sent[1].fill_(_checksum(signature))
    return _exchange(ranks, sent, signature)[:, 2:].sum(dim=0).to(values.dtype)


def errors_shared_by_sum(ranks: Ranks | None, like: object, slots: int = SLOTS) -> AbstractContextManager[None]:
    """Inside, check what the loss is given; what is raised reaches all ranks, by taking part in the sum they make.

    On an accelerator the others get a loss of NaN instead of the error: reading it would make every step wait.
    """
    return nullcontext() if ranks is None else _errors_shared(partial(_fail_sum, slots), ranks, like)


def _fail_sum(slots: int, ranks: Ranks, device: torch.device, error: Exception) -> None:
    sent = torch.full((2 + slots,), torch.nan, dtype=torch.float64, device=device)
    sent[0].fill_(1)
    _exchange(ranks, sent, "", error)


def _exchange(ranks: Ranks, sent: Tensor, signature: str, error: Exception | None = None) -> Tensor:
    """What all ranks sent, with the signatures compared where that is free."""
    came = all_gather(ranks, sent)
    if may_ask(sent):
        _compare(ranks, came.tolist(), signature, sent.device, error)
    return came


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def gather_rows(tensors: Mapping[str, Tensor], *, group: Group = "auto") -> dict[str, Tensor]:
    r"""The rows of all ranks, in rank order, with gradient: so that a batch's keys are those of the whole batch.

    Every rank may bring another number of rows, or none. All tensors travel together in two collectives, one that tells
    how many rows there are and one with their bytes; the backward pass takes one more. All ranks get the same bits.

    The gradient that a row gets is the sum over the ranks of what they passed back to it. With losses that have the
    same `group`, gradients after DDP's averaging are those of one process that saw all rows.

    Args:
        tensors: By name, each of shape `(N, ...)` with the rank's own `N`; names, the other sizes and dtypes are the
            same on all ranks, and which of them require a gradient.
        group: `"auto"`, None (returns the tensors as they are) or a process group.

    Returns:
        By name, the rows of all ranks, each of shape `(sum of N, ...)`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: On all ranks, if shapes or devices do not fit together, or tensors differ in more than `N`.

    Example:
        >>> import torch
        >>> batch = {"keys": torch.eye(2), "labels": torch.tensor([0, 1])}
        >>> everyone = gather_rows(batch)  # the rows of all ranks; here of one
        >>> everyone["labels"]
        tensor([0, 1])
    """
    check_group(group)
    ranks = find_ranks(group)
    like = next(iter(tensors.values()), None) if isinstance(tensors, Mapping) else None
    with errors_shared_by_gather(ranks, like):
        _check_rows(tensors)
    return dict(tensors) if ranks is None else gather(ranks, dict(tensors), about="tensors")


def gather(ranks: Ranks, tensors: dict[str, Tensor], *, about: str) -> dict[str, Tensor]:
    """:func:`gather_rows` of checked tensors; `about` says what has to be the same on all ranks beside them."""
    first = next(iter(tensors.values()))
    learned = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors.values()]
    kinds = {
        name: (*tensor.shape[1:], str(tensor.dtype).removeprefix("torch."), *(["with gradient"] if learns else []))
        for (name, tensor), learns in zip(tensors.items(), learned, strict=True)
    }
    sizes = _tell_rows(ranks, len(first), f"{about}: {kinds}", first.device)
    if any(learned):
        return dict(zip(tensors, _Gather.apply(ranks, sizes, *tensors.values()), strict=True))
    return dict(zip(tensors, _gather_bytes(ranks, sizes, list(tensors.values())), strict=True))


def errors_shared_by_gather(ranks: Ranks | None, like: object) -> AbstractContextManager[None]:
    """Inside, check what is to be gathered; what is raised is raised on all ranks."""
    return nullcontext() if ranks is None else _errors_shared(_fail_gather, ranks, like)


def _fail_gather(ranks: Ranks, device: torch.device, error: Exception) -> None:
    _tell_rows(ranks, 0, "", device, error)


def _tell_rows(
    ranks: Ranks, rows: int, signature: str, device: torch.device, error: Exception | None = None
) -> list[int]:
    """How many rows each rank brings; with a backend for the CPU nobody's accelerator is waited for."""
    device = _host_device(ranks, device)
    sent = torch.tensor([int(error is not None), _checksum(signature), rows], device=device)
    came = all_gather(ranks, sent).tolist()
    _compare(ranks, came, signature, device, error)
    return [row[2] for row in came]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, sizes: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.ranks, ctx.sizes = ranks, sizes
        gathered = _gather_bytes(ranks, sizes, list(tensors))
        wanted = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(rows for rows, want in zip(gathered, wanted, strict=True) if not want))
        return tuple(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        ranks, sizes = ctx.ranks, ctx.sizes
        wanted = ctx.needs_input_grad[2:]
        chosen = [grad for grad, want in zip(grads, wanted, strict=True) if want]
        # Narrow gradients are added in float32. Where a rank brings fewer rows than another, zeros make up for it.
        wide = torch.float64 if any(grad.dtype == torch.float64 for grad in chosen) else torch.float32
        widths = [grad.shape[1:].numel() for grad in chosen]
        flat = [grad.reshape(len(grad), width).to(wide) for grad, width in zip(chosen, widths, strict=True)]
        whole = torch.cat(flat, dim=1)
        longest = max(1, *sizes)
        padded = torch.cat([F.pad(part, (0, 0, 0, longest - len(part))) for part in torch.split(whole, sizes)])
        own = _reduce_scatter(ranks, padded)[: sizes[ranks.rank]]
        pieces = (
            piece.reshape(len(own), *grad.shape[1:]).to(grad.dtype)
            for piece, grad in zip(torch.split(own, widths, dim=1), chosen, strict=True)
        )
        return None, None, *(next(pieces) if want else None for want in wanted)


def _gather_bytes(ranks: Ranks, sizes: list[int], tensors: list[Tensor]) -> list[Tensor]:
    """The rows of all ranks, all tensors in one collective, whatever their dtypes."""
    parts = [_as_bytes(tensor) for tensor in tensors]
    packed = torch.cat(parts, dim=1)
    longest = max(1, *sizes)
    came = all_gather(ranks, F.pad(packed, (0, 0, 0, longest - len(packed))))
    kept = torch.cat([rows[:size] for rows, size in zip(came, sizes, strict=True)])
    columns = torch.split(kept, [part.shape[1] for part in parts], dim=1)
    return [
        # A copy begins at its own address, where it may be read as any dtype.
        part.clone(memory_format=torch.contiguous_format).view(-1).view(tensor.dtype).view(len(kept), *tensor.shape[1:])
        for part, tensor in zip(columns, tensors, strict=True)
    ]


def _as_bytes(tensor: Tensor) -> Tensor:
    """Its rows as bytes, shape `(N, bytes)`."""
    rows, width = len(tensor), tensor.shape[1:].numel()
    # A contiguous tensor may have any stride where its size is 1, which a view as bytes does not take.
    return tensor.detach().contiguous().as_strided((rows, width), (width, 1)).view(torch.uint8)


def _check_rows(tensors: object) -> None:
    """A mapping from names to tensors of as many rows, on one device."""
    if not isinstance(tensors, Mapping):
        wrong_type("tensors", "a mapping from name to tensor", describe(tensors))
    if not tensors:
        wrong_value("tensors", "at least one tensor", "an empty mapping")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            wrong_type("tensors", "names that are strings", describe(name))
        if not isinstance(tensor, Tensor):
            wrong_type(f"tensors[{name!r}]", "a tensor", describe(tensor))
        if tensor.is_complex():
            wrong_type(f"tensors[{name!r}]", "a real tensor (torch.view_as_real makes one)", describe(tensor))
        if tensor.ndim == 0:
            wrong_value(f"tensors[{name!r}]", "at least one dimension", "a tensor of shape ()")
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if len(tensor) != len(first):
            wrong_value(f"tensors[{name!r}]", f"{len(first)} rows as {first_name!r}", str(len(tensor)))
        check_device(f"tensors[{name!r}]", tensor, first.device, like=repr(first_name))


# --------------------------------------------------------------------------------------------------------------------
# Whether the ranks agree
# --------------------------------------------------------------------------------------------------------------------


def require_in_sync(ranks: Ranks | None, tensors: Mapping[str, Tensor], *, what: str) -> None:
    """A RuntimeError, on all ranks, naming the first tensor that is not the same, bit for bit, on all of them."""
    if ranks is None:
        return
    digests = [hashlib.sha256(repr(list(tensors)).encode()).digest(), *map(_digest, tensors.values())]
    device = _host_device(ranks, next(iter(tensors.values())).device)
    everyone, _ = _gather_uneven(ranks, torch.tensor([int.from_bytes(digest[:7]) for digest in digests], device=device))
    everyone = everyone.cpu()
    if not (everyone[:, 0] == everyone[0, 0]).all():
        raise RuntimeError(f"{what}: expected tensors of the same names on all ranks, got others")
    for index, name in enumerate(tensors, start=1):
        others = (everyone[:, index] != everyone[0, index]).nonzero().flatten().tolist()
        if others:
            shown = ", ".join(map(str, others))
            raise RuntimeError(f"{what}: expected the same bits on all ranks, got another {name!r} on rank {shown}")


def _digest(tensor: Tensor) -> bytes:
    """A digest of shape, dtype and content."""
    digest = hashlib.sha256(repr((tuple(tensor.shape), tensor.dtype)).encode())
    content = tensor.detach().cpu().contiguous()
    if content.nbytes:
        digest.update((ctypes.c_ubyte * content.nbytes).from_address(content.data_ptr()))
    return digest.digest()


def _checksum(signature: str) -> int:
    """A number that float64 holds exactly; torch.compile cannot see into zlib or hashlib."""
    prime, number = 2**31 - 1, signature.encode()
    if not torch.compiler.is_compiling():
        return int.from_bytes(number, "big") % prime
    total = 0
    for byte in number:  # the same, slower, for torch before 2.13
        total = (256 * total + byte) % prime
    return total


@contextmanager
def _errors_shared(
    fail: Callable[[Ranks, torch.device, Exception], None], ranks: Ranks, like: object
) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        fail(ranks, like.device if isinstance(like, Tensor) else _host_device(ranks), error)
        raise


def _compare(
    ranks: Ranks, came: list[list[float]], signature: str, device: torch.device, error: Exception | None
) -> None:
    """Raise the same error on all ranks if one has failed or their signatures differ."""
    failed = [rank for rank, row in enumerate(came) if row[0]]
    if not failed and all(row[1] == came[0][1] for row in came):
        return
    texts = _exchange_text(ranks, signature if error is None else f"{type(error).__name__}\n{error}", device)
    if failed:
        kind, _, message = texts[failed[0]].partition("\n")
        raise (TypeError if kind == "TypeError" else ValueError)(f"{message} (on rank {failed[0]})") from error
    other = next(rank for rank, text in enumerate(texts) if text != texts[0])
    raise ValueError(f"{texts[0]} on rank 0: expected the same on all ranks, got {texts[other]} on rank {other}")


def _exchange_text(ranks: Ranks, text: str, device: torch.device) -> list[str]:
    """What each rank has to say."""
    letters = torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8, device=device)
    came, lengths = _gather_uneven(ranks, letters)
    return [bytes(row[:length].tolist()).decode() for row, length in zip(came, lengths, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# torch.distributed
# --------------------------------------------------------------------------------------------------------------------

# Newer versions of torch have these collectives under new names, and warn of the old ones.
_gather_into = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_scatter_into = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


def all_gather(ranks: Ranks, sent: Tensor) -> Tensor:
    """What each rank sent, all of one shape: `(ranks, ...)`."""
    assert _gather_into is not None
    came = sent.new_empty((ranks.size * sent.shape[0], *sent.shape[1:]))
    _gather_into(came, sent.contiguous(), group=ranks.group)
    return came.view(ranks.size, *sent.shape)


def _gather_uneven(ranks: Ranks, sent: Tensor) -> tuple[Tensor, list[int]]:
    """What each rank sent, of any length, filled up with zeros: `(ranks, longest)`; and how long it was."""
    lengths = all_gather(ranks, torch.tensor([len(sent)], device=sent.device))[:, 0].tolist()
    return all_gather(ranks, F.pad(sent, (0, max(1, *lengths) - len(sent)))), lengths


def _reduce_scatter(ranks: Ranks, sent: Tensor) -> Tensor:
    """Of what each rank sent, `(ranks * N, d)`, the sum of the N rows that are this rank's."""
    assert _scatter_into is not None
    came = sent.new_empty((len(sent) // ranks.size, *sent.shape[1:]))
    _scatter_into(came, sent.contiguous(), group=ranks.group)
    return came


def _host_device(ranks: Ranks, device: torch.device | None = None) -> torch.device:
    """Where the group exchanges what the host waits for: on the CPU if it can, else on `device`, if that is known."""
    if "cpu:" in dist.get_backend_config(ranks.group):
        return torch.device("cpu")
    return device or torch.device("cuda", torch.cuda.current_device())
