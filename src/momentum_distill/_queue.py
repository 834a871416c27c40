"""A labelled ring of features in several streams that stay in step."""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from momentum_distill._checks import (
    check_bool,
    check_classes,
    check_device,
    check_device_name,
    check_finite,
    check_floating,
    check_int,
    check_labels,
    check_mask,
    check_names,
    describe,
    may_ask,
    wrong_type,
    wrong_value,
)
from momentum_distill._group import (
    Group,
    Ranks,
    check_group,
    describe_group,
    errors_shared_by_gather,
    find_ranks,
    gather,
    require_in_sync,
)
from momentum_distill._precision import WideModule
from momentum_distill._rows import normalize_rows, row_lengths, shortest

EMPTY = -1
"""Label of a slot that holds nothing, the `ignore_index` of the losses."""


class ClassQueue(WideModule):
    r"""The most recent `size` samples: a label and one feature row per stream each (Section III-E.2).

    Slot $j$ is the same sample in all streams, as Eq. 11 needs when it compares the similarities to online and momentum
    keys slot by slot. Any batch goes in: of any size, wrapping around, larger than the queue (the newest stay), empty.
    Rows are stored detached and L2-normalised. The queue starts empty; empty slots have the label -1, which the losses
    ignore. Every field is a buffer of fixed shape: a restored queue goes on bit for bit.

    Args:
        size: Number of slots $Q$, at least 1 (`balanced`: one per class). Paper: 1,024 (MOSI), 8,192 (MOSEI).
        dims: `{stream: width}`, widths of at least 1, say `{"text": 128, "audio": 128, "audio_momentum": 128}`.
        num_classes: Number of classes $C$, at least 1; needed for `balanced`, else it only says which labels are wrong.
        balanced: Give each class its own share of the ring, `size // C` slots (one more for the first `size % C`
            classes), so that a rare class does not starve. Unlabelled samples (-2) have no share and are not stored.
        normalize: L2-normalise rows on entry.
        dtype: Floating dtype of the stored rows, whatever the batches have; `.half()` on a parent does not change it.
        device: Where the queue lives; `.to()` moves it.
        group: Whose rows the queue holds: `"auto"` (those of torch.distributed's default group where there is one, else
            of this process), None (of this process) or a process group. The batches of all ranks are stored in rank
            order, uneven and empty ones too, so that every rank holds the same queue, bit for bit, as one process
            would that is given all rows.
        validate: Also check values at every call, which makes the host wait for the device: finite rows, and labels on
            an accelerator too (on the CPU they always are).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number or name is wrong, or `balanced` lacks `num_classes`.

    Example:
        >>> import torch
        >>> queue = ClassQueue(3, {"text": 2})
        >>> queue.enqueue(torch.tensor([0, 1]), {"text": torch.tensor([[2.0, 0.0], [0.0, 4.0]])})
        >>> keys, labels = queue.read("text")
        >>> keys, labels
        (tensor([[1., 0.],
                [0., 1.]]), tensor([0, 1]))
        >>> queue.read("text", padded=True)[1]
        tensor([ 0,  1, -1])

    References:
        MTMD (Lin and Hu, 2023), Section III-E.2; MoCo (He et al., 2020). The paper has one queue per stream and does
        not say how a rare class fares: `docs/paper_map.md`.
    """

    count: Tensor
    labels: Tensor
    share: Tensor
    first_slot: Tensor

    def __init__(
        self,
        size: int,
        dims: Mapping[str, int],
        *,
        num_classes: int | None = None,
        balanced: bool = False,
        normalize: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        group: Group = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__()
        check_int("size", size, minimum=1)
        _check_dims(dims)
        check_bool("balanced", balanced)
        check_bool("normalize", normalize)
        if not isinstance(dtype, torch.dtype):
            wrong_type("dtype", "a torch.dtype", describe(dtype))
        if not dtype.is_floating_point:
            wrong_value("dtype", "a floating dtype", str(dtype))
        check_device_name(device)
        check_group(group)
        check_bool("validate", validate)
        if num_classes is not None:
            check_int("num_classes", num_classes, minimum=1)
        elif balanced:
            wrong_value("num_classes", "an int beside balanced=True", "None")
        groups = num_classes if balanced and num_classes is not None else 1
        if size < groups:
            wrong_value("size", f"at least one slot for each of {groups} classes", str(size))
        self.size = size
        self.dims: dict[str, int] = dict(dims)
        self.num_classes = num_classes
        self.balanced = balanced
        self.normalize = normalize
        self.dtype = dtype
        self.group = group
        self.validate = validate

        self.register_load_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_restore_dtype)  # type: ignore[no-untyped-call]

        # A ring per class (one ring in all unless balanced): where it starts, how long it is, how many samples it was
        # ever given. The next slot is `first_slot + count % share`, on the device: no host knows how many rows of a
        # batch are stored.
        share = torch.full((groups,), size // groups, device=device)
        share[: size % groups] += 1
        self.register_buffer("share", share, persistent=False)
        self.register_buffer("first_slot", share.cumsum(0) - share, persistent=False)
        self.register_buffer("count", torch.zeros(groups, dtype=torch.int64, device=device))
        # Slot `size` is where rows go that are not stored: always zeros and -1, never read. With it every write has a
        # fixed shape. Row s of `labels` belongs to stream s: a stream that misses a sample has -1 there.
        self.register_buffer("labels", torch.full((len(dims), size + 1), EMPTY, dtype=torch.int64, device=device))
        for stream, width in dims.items():
            self.register_buffer(_buffer_name(stream), torch.zeros(size + 1, width, dtype=dtype, device=device))

    @property
    def streams(self) -> tuple[str, ...]:
        """The names of the streams."""
        return tuple(self.dims)

    @torch.no_grad()
    def enqueue(
        self,
        labels: Tensor,
        features: Mapping[str, Tensor],
        *,
        valid: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store a batch, the oldest samples giving way. Makes no device wait.

        With several ranks this is for all of them to call: their batches travel in two collectives, one with the
        number of rows and one with labels, masks and streams in one piece.

        Call it after the loss: keys of the batch itself are passed to the loss as a part of their own.

        Args:
            labels: Integer, shape `(N,)`: class, -1 (absent: not stored) or -2 (stored as unlabelled).
            features: `{stream: (N, d_stream)}` with exactly the streams of the queue, floating, with or without
                gradient.
            valid: `{stream: (N,)}` bool for some of the streams: False where the sample lacks this modality. The slot
                is then empty for this stream alone, and what the row holds does not matter. Give streams that are
                compared slot by slot (online and momentum) the same.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If names, shapes or devices are wrong, or a label is below -2 or reaches `num_classes` (where
                one may look: on the CPU outside `torch.compile`, or with `validate`; in a balanced queue an accelerator
                asserts on its own). Of several ranks all raise what one does, or where names, widths or dtypes differ.
                The queue is then unchanged.

        Example:
            >>> import torch
            >>> queue = ClassQueue(4, {"text": 2, "audio": 2})
            >>> rows = {"text": torch.eye(2), "audio": torch.eye(2)}
            >>> queue.enqueue(torch.tensor([0, 1]), rows, valid={"audio": torch.tensor([True, False])})
            >>> queue.read("text")[1], queue.read("audio")[1]
            (tensor([0, 1]), tensor([0]))
        """
        ranks = find_ranks(self.group)
        valid = {} if valid is None else valid
        with errors_shared_by_gather(ranks, self._buffer("labels")):
            self._check(labels, features, valid)
        if ranks is not None:
            labels, features, valid = self._gather(ranks, labels, features, valid)
        if labels.shape[0] == 0:
            return

        labels = marks = labels.to(torch.int64)  # marks: (N,), or (streams, N) where a stream misses a sample
        rows = [features[stream] for stream in self.dims]
        if valid:
            masks = [valid.get(stream) for stream in self.dims]
            marks = torch.stack([labels if mask is None else torch.where(mask, labels, EMPTY) for mask in masks])
            pairs = zip(rows, masks, strict=True)  # an invalid row may hold anything, NaN for one
            rows = [row if mask is None else torch.where(mask[:, None], row, 0.0) for row, mask in pairs]
        if self.normalize:
            rows = _unit_rows(rows)
        banks = [self._buffer(_buffer_name(stream)) for stream in self.dims]
        run = self._run(labels)
        if run is not None:
            for bank, new in zip(banks, rows, strict=True):
                bank[run] = new
            self._buffer("labels")[:, run] = marks
            self._buffer("count").add_(len(labels))
            return
        slots, stored, given = self._slots(labels)
        for bank, new in zip(banks, rows, strict=True):
            bank.index_copy_(0, slots, new.to(bank.dtype))
        torch._foreach_zero_([bank[self.size] for bank in banks])
        self.labels.index_copy_(1, slots, torch.where(stored, marks, EMPTY).expand(len(banks), -1))
        self.count.add_(given)

    def _gather(
        self, ranks: Ranks, labels: Tensor, features: Mapping[str, Tensor], valid: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The batch of all ranks. A rank may give other masks than the next, so every stream travels with one."""
        everyone = torch.ones_like(labels, dtype=torch.bool)
        sent = {f"features[{stream!r}]": features[stream] for stream in self.dims}
        sent |= {f"valid[{stream!r}]": valid.get(stream, everyone) for stream in self.dims}
        came = gather(ranks, {"labels": labels.to(torch.int64), **sent}, about=f"ClassQueue({self._settings()})")
        return (
            came["labels"],
            {stream: came[f"features[{stream!r}]"] for stream in self.dims},
            {stream: came[f"valid[{stream!r}]"] for stream in self.dims},
        )

    def check_in_sync(self) -> None:
        """Refuse a queue that is not the same, bit for bit, on all ranks of its group; all of them have to call it.

        Reads all of it: for tests, and after loading.

        Raises:
            RuntimeError: On all ranks, naming the first buffer that differs.

        Example:
            >>> ClassQueue(4, {"text": 2}).check_in_sync()  # one process: nothing to compare with
        """
        require_in_sync(find_ranks(self.group), dict(self.named_buffers()), what="ClassQueue")

    def _run(self, labels: Tensor) -> slice | None:
        """The slots of a batch that is stored whole and in one piece, or None where it is not, or one may not ask.

        That is the usual batch, and slices write it on the CPU in half the time that an index takes.
        """
        if self.balanced or not may_ask(labels) or EMPTY in labels.tolist():
            return None
        start = int(self._buffer("count")) % self.size
        stop = start + len(labels)
        return slice(start, stop) if stop <= self.size else None

    def _slots(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row goes (N,), which rows are stored (N,), and how many each ring is given (groups,)."""
        if not self.balanced:
            given = labels != EMPTY
            order = given.cumsum(dim=0)  # the how-manieth of the batch, from 1
            total = order[-1:]
            # Of more rows than a ring holds, the newest stay.
            stored = given if len(labels) <= self.size else given & (order > total - self.size)
            slots = (order + (self.count - 1)) % self.size
        else:
            given = labels >= 0
            ring = labels.clamp(min=0)
            member = given[:, None] & (ring[:, None] == torch.arange(len(self.share), device=labels.device))
            order = member.cumsum(dim=0)
            total = order[-1]
            order = order.gather(1, ring[:, None])[:, 0]
            share = self.share[ring]
            stored = given & (order > total[ring] - share)
            slots = self.first_slot[ring] + (self.count[ring] + order - 1) % share
        return torch.where(stored, slots, self.size), stored, total

    def _buffer(self, name: str) -> Tensor:
        """A buffer, without the detour of attribute access, which takes as long as a small operation."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def read(self, stream: str, *, padded: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and labels of one stream.

        Args:
            stream: Name of the stream.
            padded: False: a copy of what the queue holds, oldest first (class by class in a balanced queue), which no
                later `enqueue` touches; asks the device how much that is. True: all slots in their places,
                without a copy and without waiting, in static shapes for `torch.compile`. These are live views: a
                gradient that was to flow through them after the next `enqueue` is refused by autograd
                (`SupConDistillLoss` has its gradient after the forward pass: the order does not matter to it).

        Returns:
            Keys `(M, d)` and labels `(M,)` with M the slots that hold something for this stream; or `(Q, d)` and
            `(Q,)`, labels -1 where empty.

        Raises:
            TypeError: If `stream` is not a string, or `padded` not a bool.
            ValueError: If there is no such stream.

        Example:
            >>> import torch
            >>> queue = ClassQueue(3, {"text": 2})
            >>> queue.enqueue(torch.tensor([5]), {"text": torch.tensor([[0.0, 2.0]])})
            >>> queue.read("text")
            (tensor([[0., 1.]]), tensor([5]))
            >>> queue.read("text", padded=True)[1]
            tensor([ 5, -1, -1])
        """
        if not isinstance(stream, str):
            wrong_type("stream", "a name", describe(stream))
        if stream not in self.dims:
            wrong_value("stream", f"one of {sorted(self.dims)}", describe(stream))
        check_bool("padded", padded)
        keys = self._buffer(_buffer_name(stream))[: self.size]
        labels = self._buffer("labels")[self.streams.index(stream)][: self.size]
        if padded:
            return keys, labels
        order = self._oldest_first()
        order = order[labels[order] != EMPTY]
        return keys[order], labels[order]

    def _oldest_first(self) -> Tensor:
        """All slots, ring by ring, the one written next at the front of its ring."""
        slots = torch.arange(self.size, device=self.labels.device)
        ring = torch.searchsorted(self.first_slot, slots, right=True) - 1
        start, share = self.first_slot[ring], self.share[ring]
        return start + (slots - start + self.count[ring]) % share

    def __len__(self) -> int:
        """How many slots are filled. Makes the host wait for the device."""
        return int(torch.minimum(self.count, self.share).sum())

    def reset(self) -> None:
        """Empty the queue.

        Example:
            >>> import torch
            >>> queue = ClassQueue(3, {"text": 2})
            >>> queue.enqueue(torch.tensor([5]), {"text": torch.ones(1, 2)})
            >>> queue.reset()
            >>> len(queue)
            0
        """
        self.count.zero_()
        self.labels.fill_(EMPTY)
        for stream in self.dims:
            self._buffer(_buffer_name(stream)).zero_()

    @override
    def get_extra_state(self) -> Tensor:
        """The streams in their order, which is that of the rows of `labels`."""
        return torch.tensor(list(json.dumps(self.streams).encode()), dtype=torch.uint8)

    @override
    def set_extra_state(self, state: Tensor) -> None:
        saved = _saved_streams(state)
        if saved != list(self.streams):
            self.labels = self.labels[[saved.index(stream) for stream in self.streams]]

    def _check(self, labels: Tensor, features: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> None:
        """Names, shapes, dtypes, devices and labels of a batch, and with `validate` its values."""
        device = self._buffer("labels").device
        check_labels("labels", labels, shape=("N",))
        check_device("labels", labels, device, like="the queue")
        wide, classes = labels.to(torch.int64), math.inf if self.num_classes is None else self.num_classes
        check_classes("labels", wide, absent=EMPTY, classes=classes, validate=self.validate)
        if not isinstance(features, Mapping):
            wrong_type("features", "a mapping from stream to tensor", describe(features))
        check_names("features", features, self.dims)
        if not isinstance(valid, Mapping):
            wrong_type("valid", "a mapping from stream to bool tensor, or None", describe(valid))
        rows = labels.shape[0]
        for stream, mask in valid.items():
            if stream not in self.dims:
                wrong_value("valid", f"names among {sorted(self.dims)}", describe(stream))
            check_mask(f"valid[{stream!r}]", mask, shape=(rows,))
            check_device(f"valid[{stream!r}]", mask, device, like="the queue")
        for stream, width in self.dims.items():
            name = f"features[{stream!r}]"
            check_floating(name, features[stream], shape=(rows, width))
            check_device(name, features[stream], device, like="the queue")
            if self.validate:
                kept = wide != EMPTY
                check_finite(name, features[stream], kept & valid[stream] if stream in valid else kept)

    def _settings(self) -> str:
        """What has to be the same on all ranks, in words."""
        return (
            f"size={self.size}, dims={self.dims}, num_classes={self.num_classes}, "
            f"balanced={self.balanced}, normalize={self.normalize}, dtype={self.dtype}"
        )

    @override
    def extra_repr(self) -> str:
        return f"{self._settings()}, group={describe_group(self.group)}"


def _unit_rows(rows: list[Tensor]) -> list[Tensor]:
    """L2-normalised rows of each stream; streams of one width and dtype together, in fewer and larger operations."""
    unit = list(rows)
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for place, x in enumerate(rows):
        alike.setdefault((x.shape[1], x.dtype), []).append(place)
    for places in alike.values():
        raw = torch.cat([rows[place] for place in places])
        eps, wide = shortest(raw), torch.float64 if raw.dtype == torch.float64 else torch.float32
        stacked = raw.to(wide)
        # Where one may ask whether squares would overflow or vanish, most rows need no scaling against it. In place,
        # for this is a copy, which is still in the cache.
        stacked = stacked.div_(row_lengths(stacked, eps)) if may_ask(stacked) else normalize_rows(stacked, eps)
        for place, part in zip(places, stacked.chunk(len(places)), strict=True):
            unit[place] = part
    return unit


def _check_state(queue: ClassQueue, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state of other streams or sizes before anything of it is copied."""
    extra = state_dict.get(f"{prefix}_extra_state")
    if extra is not None and set(saved := _saved_streams(extra)) != set(queue.streams):
        wrong_value("state_dict", f"streams {list(queue.streams)}", f"{saved}")
    for name in ("count", "labels", *map(_buffer_name, queue.streams)):
        tensor, shape = state_dict.get(prefix + name), tuple(queue.get_buffer(name).shape)
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != shape:
            wrong_value("state_dict", f"shape {shape} for {prefix + name!r}", f"{tuple(tensor.shape)}")


def _saved_streams(extra: Tensor) -> list[str]:
    saved: list[str] = json.loads(bytes(extra.tolist()))
    return saved


def _restore_dtype(queue: ClassQueue, incompatible_keys: object) -> None:
    """Give the rows their dtype again: after `load_state_dict(..., assign=True)` they are the checkpoint's own."""
    del incompatible_keys
    for stream in queue.dims:
        name = _buffer_name(stream)
        setattr(queue, name, queue.get_buffer(name).to(queue.dtype))


def _buffer_name(stream: str) -> str:
    return f"keys_{stream}"


def _check_dims(dims: object) -> None:
    """A mapping from stream names, usable in buffer names, to widths."""
    if not isinstance(dims, Mapping):
        wrong_type("dims", "a mapping from stream to width", describe(dims))
    if not dims:
        wrong_value("dims", "at least one stream", "an empty mapping")
    for stream, width in dims.items():
        if not isinstance(stream, str):
            wrong_type("dims", "stream names that are strings", describe(stream))
        if not stream or "." in stream:
            wrong_value("dims", "stream names without '.'", describe(stream))
        check_int(f"dims[{stream!r}]", width, minimum=1)
