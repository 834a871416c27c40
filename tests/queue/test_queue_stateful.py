"""ClassQueue against `collections.deque`: any sequence of enqueues, copies, saves and resets."""

import copy
import io
import pickle
import random
from collections import Counter, deque

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import momentum_distill as md
from tiers import times

DIMS = {"t": 3, "a": 2, "v": 1, "a_momentum": 2}


class DequeQueue:
    """What ClassQueue has to do, said with deques of Python objects."""

    def __init__(self, size, streams, num_classes):
        self.streams = streams
        if num_classes is None:
            self.deques = {None: deque(maxlen=size)}
        else:
            shares = [size // num_classes + (c < size % num_classes) for c in range(num_classes)]
            self.deques = {c: deque(maxlen=share) for c, share in enumerate(shares)}

    def enqueue(self, labels, rows, valid):
        for i, label in enumerate(labels):
            share = None if None in self.deques else label
            if label == -1 or share not in self.deques:
                continue
            stored = {s: rows[s][i] if valid[s][i] else None for s in self.streams}
            self.deques[share].append((label, stored))

    def slots(self):
        """(label, {stream: row or None}) share by share, oldest first within each."""
        return [slot for share in self.deques.values() for slot in share]

    def read(self, stream):
        return [(label, rows[stream]) for label, rows in self.slots() if rows[stream] is not None]

    def reset(self):
        for share in self.deques.values():
            share.clear()


class QueueMachine(RuleBasedStateMachine):
    """One ClassQueue and one DequeQueue that get the same calls."""

    @initialize(
        size=st.integers(1, 9),
        streams=st.lists(st.sampled_from(sorted(DIMS)), min_size=1, max_size=4, unique=True),
        classes=st.none() | st.integers(1, 4),
        normalize=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
    )
    def make(self, size, streams, classes, normalize, dtype):
        classes = min(classes, size) if classes else None
        self.arguments = {
            "num_classes": classes,
            "balanced": classes is not None,
            "normalize": normalize,
            "dtype": dtype,
        }
        self.size, self.streams = size, streams
        self.normalize, self.dtype, self.classes = normalize, dtype, classes
        self.queue = self.fresh()
        self.model = DequeQueue(size, streams, classes)
        self.generator = torch.Generator().manual_seed(0)
        self.shapes = {k: (v.shape, v.dtype) for k, v in self.tensors().items()}

    def fresh(self):
        return md.ClassQueue(self.size, {s: DIMS[s] for s in self.streams}, **self.arguments)

    def tensors(self):
        state = self.queue.state_dict()
        return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}

    # ---- what can happen -------------------------------------------------------------------

    @rule(data=st.data())
    def enqueue(self, data):
        top = 2 if self.classes is None else self.classes - 1
        labels = data.draw(st.lists(st.integers(-2, top), max_size=3 * self.size), label="labels")
        n = len(labels)
        flags = st.lists(st.booleans(), min_size=n, max_size=n)
        named = data.draw(st.lists(st.sampled_from(self.streams), unique=True), label="named")
        self.put(labels, {s: data.draw(flags, label=s) for s in named})

    @rule(seed=st.integers(0, 2**16))
    def enqueue_several(self, seed):
        """Drawn batches are small and few: rings hardly go around in them, least of all those of classes."""
        draw = random.Random(seed)
        for n in draw.choices(range(2 * self.size), k=4):
            labels = draw.choices(range(-1, self.classes or 3), k=n)
            named = draw.sample(self.streams, k=draw.randint(0, len(self.streams)))
            self.put(labels, {s: draw.choices([False, True], k=n) for s in named})

    def put(self, labels, valid):
        """Into both: rows of all streams, which streams that are named in `valid` have only where it says so."""
        n = len(labels)
        features = {s: torch.randn(n, DIMS[s], generator=self.generator, dtype=self.dtype) for s in self.streams}
        rows = {s: self.stored(features[s]) for s in self.streams}
        everywhere = {s: valid.get(s, [True] * n) for s in self.streams}
        masks = {s: torch.tensor(flags, dtype=torch.bool) for s, flags in valid.items()}
        for s, mask in masks.items():  # what is not there may hold anything
            features[s][~mask] = torch.nan
        self.queue.enqueue(torch.tensor(labels, dtype=torch.int64), features, **({"valid": masks} if masks else {}))
        self.model.enqueue(labels, rows, everywhere)

    def stored(self, features):
        if not self.normalize:
            return features.clone()
        return features / features.double().norm(dim=1, keepdim=True)

    @rule()
    def save_and_restore(self):
        file = io.BytesIO()
        torch.save(self.queue.state_dict(), file)
        file.seek(0)
        self.queue = self.fresh()
        self.queue.load_state_dict(torch.load(file, weights_only=True), strict=True)

    @rule()
    def restore_over_other_content(self):
        saved = copy.deepcopy(self.queue.state_dict())
        other = self.fresh()
        n = self.size + 2
        labels = torch.zeros(n, dtype=torch.int64)
        other.enqueue(labels, {s: torch.ones(n, DIMS[s]) for s in self.streams})
        other.load_state_dict(saved)
        self.queue = other

    @rule()
    def go_through_pickle(self):
        self.queue = pickle.loads(pickle.dumps(self.queue))

    @rule()
    def go_on_with_a_deepcopy(self):
        original, self.queue = self.queue, copy.deepcopy(self.queue)
        original.reset()  # must not reach the copy

    @precondition(lambda self: len(self.queue) > 0)
    @rule()
    def reset(self):
        self.queue.reset()
        self.model.reset()

    # ---- what has to hold after each -----------------------------------------------------------

    @invariant()
    def length_is_the_number_of_filled_slots(self):
        assert len(self.queue) == len(self.model.slots())

    @invariant()
    def compact_reads_are_the_deque_oldest_first(self):
        for stream in self.streams:
            keys, labels = self.queue.read(stream)
            expected = self.model.read(stream)
            assert labels.tolist() == [label for label, _ in expected]
            assert keys.shape == (len(expected), DIMS[stream])
            assert keys.dtype == self.dtype
            if expected:
                self.assert_rows(keys, torch.stack([row for _, row in expected]))

    def assert_rows(self, actual, expected):
        if self.normalize:
            tolerance = 1e-6 if self.dtype == torch.float32 else 1e-14
            torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)
        else:
            assert torch.equal(actual, expected)

    @invariant()
    def padded_reads_hold_the_same_samples_slot_by_slot(self):
        padded = {s: self.queue.read(s, padded=True) for s in self.streams}
        for stream, (keys, labels) in padded.items():
            assert keys.shape == (self.size, DIMS[stream])
            assert labels.shape == (self.size,)
            assert torch.equal(keys[labels == -1], torch.zeros_like(keys[labels == -1]))
        if self.normalize:  # rows are compared as stored, bit for bit, so via the compact read
            found = Counter(
                (s, label, tuple(row))
                for s, (keys, labels) in padded.items()
                for label, row in zip(labels.tolist(), keys.tolist(), strict=True)
                if label != -1
            )
            compact = {s: self.queue.read(s) for s in self.streams}
            assert found == Counter(
                (s, label, tuple(row))
                for s, (keys, labels) in compact.items()
                for label, row in zip(labels.tolist(), keys.tolist(), strict=True)
            )
            return
        slots = Counter()
        for j in range(self.size):
            present = {s: labels[j].item() != -1 for s, (_, labels) in padded.items()}
            if any(present.values()):
                found = {padded[s][1][j].item() for s in self.streams if present[s]}
                assert len(found) == 1, "the streams disagree about the label of a slot"
                rows = [tuple(padded[s][0][j].tolist()) if present[s] else None for s in present]
                slots[(found.pop(), *rows)] += 1
        expected = Counter(
            (label, *(None if rows[s] is None else tuple(rows[s].tolist()) for s in self.streams))
            for label, rows in self.model.slots()
            if any(row is not None for row in rows.values())
        )
        assert slots == expected

    @invariant()
    def saved_shapes_and_dtypes_never_change(self):
        assert {k: (v.shape, v.dtype) for k, v in self.tensors().items()} == self.shapes


QueueMachine.TestCase.settings = settings(max_examples=times(20, 80, 2_000), stateful_step_count=15)
TestQueueAgainstDeque = pytest.mark.repeated(QueueMachine.TestCase)


def test_the_reference_itself_keeps_the_newest():
    """The oracle, by hand, so that a mistake in it cannot hide one in the queue."""
    reference = DequeQueue(3, ["t"], None)
    reference.enqueue([5, -1, 6, -2, 7], {"t": list("abcde")}, {"t": [True] * 4 + [False]})
    assert reference.slots() == [(6, {"t": "c"}), (-2, {"t": "d"}), (7, {"t": None})]
    assert reference.read("t") == [(6, "c"), (-2, "d")]


def test_the_balanced_reference_itself_keeps_a_share_for_each_class():
    reference = DequeQueue(5, ["t"], 3)
    assert [share.maxlen for share in reference.deques.values()] == [2, 2, 1]
    reference.enqueue([0, 0, 0, 2, -2, 2], {"t": list("abcdef")}, {"t": [True] * 6})
    assert reference.read("t") == [(0, "b"), (0, "c"), (2, "f")]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_pair_of_batch_sizes(size):
    """All (first, second) batch sizes up to three times the queue, not only drawn ones."""
    for first in range(3 * size + 1):
        for second in range(3 * size + 1):
            queue = md.ClassQueue(size, {"t": 1}, normalize=False)
            numbers = torch.arange(first + second)
            for part in (numbers[:first], numbers[first:]):
                queue.enqueue(part, {"t": part[:, None].float()})
            keys, labels = queue.read("t")
            expected = numbers[-size:] if first + second else numbers
            assert torch.equal(labels, expected)
            assert torch.equal(keys[:, 0].long(), expected)
            assert len(queue) == len(expected)
