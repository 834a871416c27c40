"""Averages and queues after any calls are what a closed form and a plain list say."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import momentum_distill as md
from loss_cases import DTYPES
from momentum_distill import functional as F
from property_cases import (
    LAYOUTS,
    PROPERTY,
    assert_accurate,
    dtypes_around,
    labels,
    laid,
    mask,
    matrix,
    no_direction,
    unit,
)

pytestmark = pytest.mark.repeated

DECAYS = st.sampled_from([0.0, 0.25, 0.9, 0.995, 1.0])


def average_of(start, values, decays):
    """The start times all decays, plus each value times what its own step and the later ones left of it."""
    shares = [math.prod(decays), *((1 - decay) * math.prod(decays[k + 1 :]) for k, decay in enumerate(decays))]
    return sum(share * value.double() for share, value in zip(shares, [start, *values], strict=True))


def assert_averaged(actual, start, values, decays):
    """Within the bar, as a share of the largest number that went in."""
    largest = max(1.0, *(float(x.double().abs().max()) for x in (start, *values)))
    expected = {"average": average_of(start, values, decays)}
    assert_accurate(({"average": actual}, {}), (expected, {}), sums=actual.dtype, floors=(largest, 1.0))


# --- averages ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A parameter under two names, a floating buffer and one of integers."""

    def __init__(self, weight, statistics):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.tied = self.weight
        self.register_buffer("statistics", statistics.clone())
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x):
        return self.weight * x


def warm_up(step):
    return 1 - 1 / (step + 2)


OWN_DECAYS = st.sampled_from([0.9, 0.995, warm_up])
BUFFERS = st.sampled_from(["copy", ["statistics"], "frozen"])
UPDATES = st.lists(st.tuples(st.none() | DECAYS, st.sampled_from(["", "save", "pickle", "copy", "swap"])), max_size=6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@PROPERTY
def test_ema_after_any_updates_is_the_closed_form(dtype, data):
    updates, decay, buffers = data.draw(UPDATES), data.draw(OWN_DECAYS), data.draw(BUFFERS)
    weights, statistics = (matrix(data.draw, len(updates) + 1, 3).to(dtype) for _ in range(2))
    model = Model(weights[0], statistics[0])
    ema = md.EMAWrapper(model, decay=decay, buffers=buffers)
    decays = []
    for step, (override, event) in enumerate(updates):
        with torch.no_grad():
            model.weight.copy_(weights[step + 1])
            model.statistics.copy_(statistics[step + 1])
            model.batches.fill_(step + 1)
        ema.update(model, decay=override)
        own = decay(step) if callable(decay) else decay
        decays.append(own if override is None else override)
        ema = after(event, ema, model, decay, buffers)

    average = ema.module
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {average.weight.dtype, average.statistics.dtype} == {wide}
    assert average.tied is average.weight
    assert ema.step == len(updates)
    assert_averaged(average.weight, weights[0], weights[1:], decays)
    assert int(average.batches) == len(updates)
    if buffers == ["statistics"]:
        assert_averaged(average.statistics, statistics[0], statistics[1:], decays)
    else:
        assert torch.equal(average.statistics, statistics[-1 if buffers == "copy" else 0].to(wide))


def after(event, ema, model, decay, buffers):
    """The wrapper to go on with, once something happened that must not matter."""
    if event == "save":
        fresh = md.EMAWrapper(model, decay=decay, buffers=buffers)
        fresh.load_state_dict(ema.state_dict())
        return fresh
    if event == "pickle":
        return pickle.loads(pickle.dumps(ema))
    if event == "copy":
        return copy.deepcopy(ema)
    if event == "swap":
        own = model.weight.detach().clone()
        with ema.swap(model):
            assert torch.equal(model.weight, ema.module.weight.to(own.dtype))
        assert torch.equal(model.weight, own)
    return ema


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@PROPERTY
def test_ema_update_is_one_step_for_any_tensors(dtype, data):
    kinds = data.draw(dtypes_around(dtype, 4))
    layouts = data.draw(st.tuples(st.sampled_from(["contiguous", "strided"]), st.sampled_from(LAYOUTS)))
    decay, rows = data.draw(DECAYS), data.draw(st.integers(0, 4))
    average = [laid(matrix(data.draw, rows, 2).to(kind), layouts[0]) for kind in kinds[:2]]
    online = [laid(matrix(data.draw, rows, 2).to(kind), layouts[1]) for kind in kinds[2:]]
    before, places = [x.clone() for x in average], [x.data_ptr() for x in average]
    F.ema_update(average, online, decay=decay)
    assert [x.data_ptr() for x in average] == places
    for now, old, new in zip(average, before, online, strict=True):
        if rows:
            assert_averaged(now, old, [new.to(old.dtype)], [decay])


# --- the queue --------------------------------------------------------------------------------------------------------

STREAMS = {"t": 3, "a": 2}
QUEUES = st.tuples(st.integers(3, 8), st.booleans(), st.booleans(), st.sampled_from(DTYPES))
INTEGERS = st.sampled_from([torch.int64, torch.int32, torch.int8])
BATCHES = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(LAYOUTS), st.booleans(), INTEGERS), max_size=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@PROPERTY
def test_queue_holds_what_a_list_says_slot_by_slot(dtype, data):
    size, balanced, normalize, stored_as = data.draw(QUEUES)
    classes = 3 if balanced else None
    queue = md.ClassQueue(size, STREAMS, num_classes=classes, balanced=balanced, normalize=normalize, dtype=stored_as)
    shares = [size // 3 + (c < size % 3) for c in range(3)] if balanced else [size]
    given = [[] for _ in shares]  # by ring: all samples it ever got, each a label and a row or None by stream
    sums = torch.float64
    for n, layout, some_missing, integer in data.draw(BATCHES):
        kinds = data.draw(dtypes_around(dtype, 2))
        batch_labels = laid(labels(data.draw, n).to(integer), layout)
        raw = {
            s: laid(matrix(data.draw, n, d).to(kind), layout)
            for (s, d), kind in zip(STREAMS.items(), kinds, strict=True)
        }
        if torch.float64 not in kinds or kinds[0] != kinds[1]:
            sums = torch.float32
        valid = {"a": laid(mask(data.draw, n), layout)} if some_missing else {}
        rows = {s: unit(x.double(), no_direction(x)) if normalize else x.double() for s, x in raw.items()}
        queue.enqueue(batch_labels, raw, valid=valid or None)
        for i, label in enumerate(batch_labels.tolist()):
            if label == -1 or (balanced and label < 0):
                continue
            there = {s: rows[s][i] if s not in valid or valid[s][i] else None for s in STREAMS}
            given[label if balanced else 0].append((label, there))

    first = 0
    slots = {}  # slot: sample, oldest first ring by ring
    for ring, share in zip(given, shares, strict=True):
        slots |= {first + k % share: sample for k, sample in list(enumerate(ring))[-share:]}
        first += share
    assert len(queue) == len(slots)
    for stream, width in STREAMS.items():
        held = {slot: (label, there[stream]) for slot, (label, there) in slots.items() if there[stream] is not None}
        keys, compact_labels = queue.read(stream)
        padded, padded_labels = queue.read(stream, padded=True)
        assert compact_labels.tolist() == [label for label, _ in held.values()]
        assert torch.equal(keys, padded[list(held)])
        assert padded_labels.tolist() == [held[slot][0] if slot in held else -1 for slot in range(size)]
        assert not padded[padded_labels == -1].any()
        expected = (
            torch.stack([row for _, row in held.values()]) if held else torch.zeros(0, width, dtype=torch.float64)
        )
        if not normalize:
            assert torch.equal(keys, expected.to(stored_as))
        assert_accurate(({"keys": keys}, {}), ({"keys": expected}, {}), sums=sums)
