"""A labelled ring of features in several streams that stay in step."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from momentum_distill._checks import (
    check_bool,
    check_classes,
    check_device_name,
    check_finite,
    check_floating,
    check_int,
    check_labels,
    check_mask,
    check_names,
    describe,
    has_numbers,
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
from momentum_distill._precision import WideModule, is_16_bit
from momentum_distill._rows import normalize_rows, row_lengths, shortest

EMPTY = -1
"""Label of a slot that holds nothing, the `ignore_index` of the losses."""


class ClassQueue(WideModule):
    r"""The most recent `size` samples: a label and one feature row per stream each (Section III-E.2).

    Slot $j$ is the same sample in all streams, as Eq. 11 needs when it compares the similarities to online and momentum
    keys slot by slot. Any batch goes in: of any size, wrapping around, larger than the queue (the newest stay), empty.
    Rows are stored detached and L2-normalised. The queue starts empty; empty slots have the label -1, which the losses
    ignore. Every field is a buffer of fixed shape: a restored queue goes on bit for bit. It has no lock: of several
    threads one at a time may use it.

    Args:
        size: Number of slots $Q$, at least 1 (`balanced`: one per class). Paper: 1,024 (MOSI), 8,192 (MOSEI).
        dims: `{stream: width}`, widths of at least 1, say `{"text": 128, "audio": 128, "audio_momentum": 128}`.
        num_classes: Number of classes $C$, at least 1; needed for `balanced`, else it only says which labels are wrong.
        balanced: Give each class its own share of the ring, `size // C` slots (one more for the first `size % C`
            classes), so that a rare class does not starve. Unlabelled samples (-2) have no share and are not stored.
        normalize: L2-normalise rows on entry: of all streams (True), of those named here, or of none (False). A stream
            that is not normalised may carry what belongs to the samples, their scores for one.
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
        normalize: bool | Collection[str] = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        group: Group = "auto",
        validate: bool = False,
    ) -> None:
        super().__init__()
        check_int("size", size, minimum=1)
        _check_dims(dims)
        check_bool("balanced", balanced)
        unit = _unit_streams(normalize, dims)
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
        self.normalize: bool | tuple[str, ...] = normalize if isinstance(normalize, bool) else tuple(normalize)
        self.dtype = dtype
        self.group = group
        self.validate = validate

        self.register_load_state_dict_pre_hook(_load_keys)  # type: ignore[no-untyped-call]

        # A ring per class (one ring in all unless balanced): where it starts, how long it is, how many samples it was
        # ever given. The next slot is `first_slot + count % share`, on the device: no host knows how many rows of a
        # batch are stored.
        share, first_slot = _rings(size, groups, device)
        self.register_buffer("share", share, persistent=False)
        self.register_buffer("first_slot", first_slot, persistent=False)
        self.register_buffer("count", torch.zeros(groups, dtype=torch.int64, device=device))
        # Slot `size` is where rows go that are not stored: always zeros and -1, never read. With it every write has a
        # fixed shape. Row s of `labels` belongs to stream s: a stream that misses a sample has -1 there.
        self.register_buffer("labels", torch.full((len(dims), size + 1), EMPTY, dtype=torch.int64, device=device))
        # Streams of a width, if both are normalised or neither, share a bank, (streams, size + 1, width), which is
        # written at once. In a state each has its own keys: see `_save_to_state_dict` and `_load_keys`.
        self._banks: dict[str, list[str]] = {}
        for stream, width in dims.items():
            self._banks.setdefault(f"bank_{width}" if stream in unit else f"raw_bank_{width}", []).append(stream)
        self._rows = {stream: row for row, stream in enumerate(dims)}
        self._places = {stream: (bank, i) for bank, streams in self._banks.items() for i, stream in enumerate(streams)}
        for bank, streams in self._banks.items():
            shape = len(streams), size + 1, dims[streams[0]]
            self.register_buffer(bank, torch.zeros(shape, dtype=dtype, device=device), persistent=False)

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
            whole = self._check(labels, features, valid)
        if ranks is not None:
            labels, features, valid = self._gather(ranks, labels, features, valid)
            whole = False  # nobody has looked at the labels of the others
        if labels.shape[0] == 0:
            return

        labels = marks = labels.to(torch.int64)  # marks: (N,), or (streams, N) where a stream misses a sample
        if valid:  # an invalid row may hold anything, NaN for one
            masks = [valid.get(stream) for stream in self.dims]
            marks = torch.stack([labels if mask is None else torch.where(mask, labels, EMPTY) for mask in masks])
            features = dict(features) | {s: torch.where(mask[:, None], features[s], 0.0) for s, mask in valid.items()}
        banks = [
            (self._buffer(bank), [features[s] for s in streams], bank.startswith("bank"))
            for bank, streams in self._banks.items()
        ]
        if has_numbers(marks):  # else memory has no address
            own = {self._buffer(name).untyped_storage().data_ptr() for name in ("labels", *self._banks)}
            marks = _apart(marks, own)
            banks = [(bank, [_apart(x, own) for x in rows], unit) for bank, rows, unit in banks]
        start = int(self._buffer("count")) % self.size if whole else self.size
        if start + len(labels) <= self.size:  # the usual batch on the CPU: slices write it in half the time of an index
            run = slice(start, start + len(labels))
            for bank, rows, unit in banks:
                _write(bank[:, run], rows, unit=unit)
            self._buffer("labels")[:, run] = marks
            self._buffer("count").add_(len(labels))
            return
        slots, stored, count = self._slots(labels)
        for bank, rows, unit in banks:
            bank.index_copy_(1, slots, _stack(rows, unit=unit).to(bank.dtype))
        torch._foreach_zero_([bank[:, self.size] for bank, *_ in banks])
        marks = marks if stored is None else torch.where(stored, marks, EMPTY)
        self._buffer("labels").index_copy_(1, slots, marks.expand(len(self.dims), -1))
        self._buffer("count").copy_(count)

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
        require_in_sync(find_ranks(self.group), self.state_dict(), what="ClassQueue")

    def _slots(self, labels: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Where each row goes (N,), which rows are stored (N,), and the count of each ring afterwards (groups,).

        None for which are stored if that is all that have another label than -1.
        """
        before, shares, starts = map(self._buffer, ("count", "share", "first_slot"))
        if not self.balanced:
            stored = labels != EMPTY
            counts = torch.cat([before, stored]).cumsum(dim=0)  # before each row, and after the last
            slots, count = counts[:-1] % self.size, counts[-1:]
            if len(labels) <= self.size:
                return torch.where(stored, slots, shares), None, count
            stored = stored & (counts[1:] > count - self.size)  # of more rows than a ring holds, the newest stay
        else:
            given = labels >= 0
            ring = labels.clamp(min=0)
            member = given[:, None] & (ring[:, None] == torch.arange(len(shares), device=labels.device))
            order = member.cumsum(dim=0)  # the how-manieth of the batch, from 1
            total = order[-1]
            order, share, count = order.gather(1, ring[:, None])[:, 0], shares[ring], before + total
            stored = given & (order > total[ring] - share)
            slots = starts[ring] + (before[ring] + order - 1) % share
        return torch.where(stored, slots, self.size), stored, count

    def _buffer(self, name: str) -> Tensor:
        """A buffer, without the detour of attribute access, which takes as long as a small operation."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer

    def _keys(self, stream: str, slots: int) -> Tensor:
        """The first slots of a stream: (slots, width). There are `size`, and one that is never read.

        Like `bank[place][:slots]`, in one view instead of two, each of which takes as long as a small operation. Banks,
        and labels, are never a part of another tensor.
        """
        (bank, place), width = self._places[stream], self.dims[stream]
        return self._buffer(bank).as_strided((slots, width), (width, 1), place * (self.size + 1) * width)

    def read(self, stream: str, *, padded: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and labels of one stream.

        Args:
            stream: Name of the stream.
            padded: False: a copy of what the queue holds, oldest first (class by class in a balanced queue), which no
                later `enqueue` touches; asks the device how much that is. True: all slots in their places,
                without a copy and without waiting, in static shapes for `torch.compile`. These are live views: a
                gradient that was to flow through them after the next `enqueue` is refused by autograd
                (`SupConDistillLoss` has its gradient after the forward pass: the order does not matter to it, but where
                `torch.compile` fuses few scores).

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
        keys = self._keys(stream, self.size)
        labels = self._buffer("labels").as_strided((self.size,), (1,), self._rows[stream] * (self.size + 1))
        if padded:
            return keys, labels
        slots = torch.arange(self.size, device=labels.device)
        count, shares, starts = map(self._buffer, ("count", "share", "first_slot"))
        ring = torch.searchsorted(starts, slots, right=True) - 1
        start, share = starts[ring], shares[ring]
        order = start + (slots - start + count[ring]) % share  # of a ring, the slot written next comes first
        order = order[labels[order] != EMPTY]
        return keys[order], labels[order]

    def __len__(self) -> int:
        """How many slots are filled. Makes the host wait for the device."""
        return int(torch.minimum(self._buffer("count"), self._buffer("share")).sum())

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
        self._restore_rings()
        self.count.zero_()
        self.labels.fill_(EMPTY)
        for bank in self._banks:
            self._buffer(bank).zero_()

    def _restore_rings(self) -> None:
        """What no state holds, and `to_empty` leaves unwritten."""
        share, first_slot = _rings(self.size, len(self.count), self.count.device)
        self.share.copy_(share)
        self.first_slot.copy_(first_slot)

    @override
    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """What a state holds has an attribute of its name, for which torch.distributed.checkpoint asks."""
        stream = name.removeprefix("keys_")
        if stream != name and stream in self.__dict__.get("dims", ()):
            return self._keys(stream, self.size + 1)
        return super().__getattr__(name)

    @override
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        extra = destination.pop(f"{prefix}_extra_state")
        for stream in self.dims:  # copies: safetensors, for one, refuses tensors that share their memory
            destination[f"{prefix}keys_{stream}"] = self._keys(stream, self.size + 1).clone()
        destination[f"{prefix}_extra_state"] = extra

    @override
    def get_extra_state(self) -> Tensor:
        """The streams in their order, which is that of the rows of `labels`."""
        return torch.tensor(list(json.dumps(self.streams).encode()), dtype=torch.uint8, device="cpu")

    @override
    def set_extra_state(self, state: Tensor) -> None:
        saved = _saved_streams(state)
        if saved != list(self.streams):
            self.labels = self.labels[[saved.index(stream) for stream in self.streams]]

    def _check(self, labels: Tensor, features: Mapping[str, Tensor], valid: Mapping[str, Tensor]) -> bool:
        """Names, shapes, dtypes, devices and labels of a batch, and with `validate` its values.

        Returns whether the batch is known to be stored whole: where one may look, in a queue that is not balanced.
        """
        like = ("the queue", self._buffer("labels"))
        check_labels("labels", labels, shape=("N",), like=like)
        wide, classes = labels.to(torch.int64), math.inf if self.num_classes is None else self.num_classes
        seen = check_classes("labels", wide, absent=EMPTY, classes=classes, validate=self.validate)
        whole = seen is not None and may_ask(labels) and (seen[0] >= 0 or EMPTY not in labels.tolist())
        if not isinstance(features, Mapping):
            wrong_type("features", "a mapping from stream to tensor", describe(features))
        check_names("features", features, self.dims)
        if not isinstance(valid, Mapping):
            wrong_type("valid", "a mapping from stream to bool tensor, or None", describe(valid))
        rows = labels.shape[0]
        for stream, mask in valid.items():
            if stream not in self.dims:
                wrong_value("valid", f"names among {sorted(self.dims)}", describe(stream))
            check_mask(f"valid[{stream!r}]", mask, shape=(rows,), like=like)
        for stream, width in self.dims.items():
            name = f"features[{stream!r}]"
            check_floating(name, features[stream], shape=(rows, width), like=like)
            if self.validate:
                kept = wide != EMPTY
                check_finite(name, features[stream], kept & valid[stream] if stream in valid else kept)
        return whole and not self.balanced

    def _settings(self) -> str:
        """What has to be the same on all ranks, in words."""
        return (
            f"size={self.size}, dims={self.dims}, num_classes={self.num_classes}, "
            f"balanced={self.balanced}, normalize={self.normalize}, dtype={self.dtype}"
        )

    @override
    def extra_repr(self) -> str:
        return f"{self._settings()}, group={describe_group(self.group)}"


def _rings(size: int, groups: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """How long the ring of each class is, and where it starts."""
    share = torch.full((groups,), size // groups, device=device)
    share[: size % groups] += 1
    return share, share.cumsum(0) - share


def _apart(given: Tensor, own: Collection[int]) -> Tensor:
    """A tensor, or a copy where it lies in memory that is to be written: what `read` returned, say."""
    return given.clone() if given.untyped_storage().data_ptr() in own else given


def _write(slots: Tensor, rows: list[Tensor], *, unit: bool) -> None:
    """Write rows of streams of one width to their slots, (streams, N, width), if possible with no copy between."""
    if unit and (is_16_bit(slots.dtype) or any(x.dtype != slots.dtype for x in rows)):
        slots.copy_(_stack(rows, unit=unit))
        return
    torch._foreach_copy_(slots.unbind(), rows)
    if unit and (normalized := _unit_rows(slots, shortest(slots))) is not slots:
        slots.copy_(normalized)


def _stack(rows: list[Tensor], *, unit: bool) -> Tensor:
    """Rows of streams of one width as they are stored, (streams, N, width)."""
    if not unit:
        return torch.stack(rows)
    if any(x.dtype != rows[0].dtype for x in rows):  # what counts as zero depends on the dtype
        return torch.cat([_stack([x], unit=unit) for x in rows])
    wide = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    return _unit_rows(torch.stack(rows).to(wide), shortest(rows[0]))


def _unit_rows(rows: Tensor, eps: float) -> Tensor:
    """The rows of a stack of matrices, L2-normalised; in place where one may ask how long they are."""
    return rows.div_(row_lengths(rows, eps)) if may_ask(rows) else normalize_rows(rows, eps)


def _load_keys(
    queue: ClassQueue,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    *_: object,
) -> None:
    """Before `load_state_dict`: refuse a state of other streams or sizes, and put the keys of each stream in its place.

    With `assign=True` a bank is made of the keys that come, in the dtype of the queue.
    """
    del strict
    extra = state_dict.get(f"{prefix}_extra_state")
    if extra is not None and set(saved := _saved_streams(extra)) != set(queue.streams):
        wrong_value("state_dict", f"streams {list(queue.streams)}", f"{saved}")
    slots = state_dict.get(f"{prefix}labels")
    if isinstance(slots, Tensor) and slots.ndim == 2 and slots.shape[1] != queue.size + 1:
        got = f"{slots.shape[1] - 1}; leave the queue's state out, and it fills again"
        wrong_value("state_dict", f"size {queue.size}", got)
    own = {f"keys_{stream}": queue._keys(stream, queue.size + 1) for stream in queue.dims}
    for name, buffer in {"count": queue.count, "labels": queue.labels, **own}.items():
        tensor = state_dict.get(prefix + name)
        if isinstance(tensor, Tensor) and tensor.shape != buffer.shape:
            wrong_value("state_dict", f"shape {tuple(buffer.shape)} for {prefix + name!r}", f"{tuple(tensor.shape)}")
    missing_keys += [prefix + name for name in own if prefix + name not in state_dict]
    came = {name: state_dict.pop(prefix + name, buffer) for name, buffer in own.items()}
    if local_metadata.get("assign_to_params_buffers", False):
        for bank, streams in queue._banks.items():
            setattr(queue, bank, torch.stack([came[f"keys_{stream}"] for stream in streams]).to(queue.dtype))
        if isinstance(labels := state_dict.get(f"{prefix}labels"), Tensor):
            state_dict[f"{prefix}labels"] = labels.clone(memory_format=torch.contiguous_format)
            queue.share, queue.first_slot = _rings(queue.size, len(queue.count), labels.device)
        return
    with torch.no_grad():
        queue._restore_rings()
        for name, buffer in own.items():
            buffer.copy_(came[name])


def _saved_streams(extra: Tensor) -> list[str]:
    saved: list[str] = json.loads(bytes(extra.tolist()))
    return saved


def _unit_streams(normalize: object, dims: Mapping[str, int]) -> Collection[str]:
    """The streams whose rows are normalised."""
    if isinstance(normalize, bool):
        return dims if normalize else ()
    if isinstance(normalize, str) or not isinstance(normalize, Collection):
        wrong_type("normalize", "True, False or a collection of streams", describe(normalize))
    for stream in normalize:
        if stream not in dims:
            wrong_value("normalize", f"names among {sorted(dims)}", describe(stream))
    return normalize


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
