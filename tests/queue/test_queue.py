"""ClassQueue: one named test for each mistake found in other queues.

Long random sequences of calls are in test_queue_stateful.py, wrong arguments in ../blocks/test_bad_inputs.py.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode

import momentum_distill as md
from module_state import assert_same_state, clone_state
from momentum_distill import _checks, _queue

DIMS = {"t": 4, "a": 3, "a_momentum": 3}


def make_queue(size=6, **kwargs):
    return md.ClassQueue(size, DIMS, **kwargs)


def batch(n, seed=0, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    features = {s: torch.randn(n, d, generator=generator).to(dtype) for s, d in DIMS.items()}
    return labels, features


def numbered(numbers):
    """A batch for a queue of one stream of width 1: sample k has label k and feature k."""
    numbers = torch.as_tensor(numbers)
    return numbers, {"t": numbers[:, None].float()}


def number_queue(size, **kwargs):
    return md.ClassQueue(size, {"t": 1}, normalize=False, **kwargs)


def contents(queue, stream="t"):
    return queue.read(stream)[1].tolist()


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


# ---------------------------------------------------------------------------------------------
# First in, first out
# ---------------------------------------------------------------------------------------------


def test_enqueue_larger_than_queue_keeps_newest():
    queue = number_queue(10)
    queue.enqueue(*numbered(range(15)))
    assert contents(queue) == list(range(5, 15))
    queue.enqueue(*numbered(range(15, 50)))
    assert contents(queue) == list(range(40, 50))


def test_a_batch_that_does_not_divide_the_size_is_legal():
    queue, expected = number_queue(7), []
    for start in range(0, 60, 3):
        queue.enqueue(*numbered(range(start, start + 3)))
        expected = (expected + list(range(start, start + 3)))[-7:]
        assert contents(queue) == expected


def test_empty_batch_changes_nothing():
    queue = make_queue()
    queue.enqueue(*batch(4))
    before = clone_state(queue)
    queue.enqueue(*batch(0))
    queue.enqueue(*batch(0), valid={"a": torch.zeros(0, dtype=torch.bool)})
    assert_same_state(clone_state(queue), before)
    assert len(queue) == 4


def test_reset_empties_the_queue_for_good():
    queue = make_queue(normalize=False)
    fresh = clone_state(queue)
    queue.enqueue(*batch(9))
    queue.reset()
    assert len(queue) == 0
    assert_same_state(clone_state(queue), fresh)


# ---------------------------------------------------------------------------------------------
# What is empty, absent or unlabelled is never handed out as data
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True])
def test_an_empty_queue_hands_out_no_random_rows(balanced):
    queue = make_queue(balanced=balanced, num_classes=3)
    for stream, dim in DIMS.items():
        keys, labels = queue.read(stream)
        assert keys.shape == (0, dim)
        assert labels.shape == (0,)
        keys, labels = queue.read(stream, padded=True)
        assert torch.equal(keys, torch.zeros(6, dim))
        assert labels.tolist() == [-1] * 6


def test_valid_false_everywhere_does_not_turn_zeros_into_data():
    queue = make_queue()
    labels, features = batch(9)
    nobody = torch.zeros(9, dtype=torch.bool)
    queue.enqueue(labels, features, valid=dict.fromkeys(DIMS, nobody))
    for stream in DIMS:
        assert contents(queue, stream) == []
        keys, padded = queue.read(stream, padded=True)
        assert padded.tolist() == [-1] * 6
        assert torch.equal(keys, torch.zeros_like(keys))


def test_label_minus_one_is_not_stored_and_takes_no_slot():
    queue = number_queue(3)
    features = numbered([5, 6, 7, 8, 9])[1]
    queue.enqueue(torch.tensor([5, -1, 7, -1, 9]), features)
    assert contents(queue) == [5, 7, 9]
    assert queue.read("t")[0].flatten().tolist() == [5, 7, 9]
    queue.enqueue(torch.full((5,), -1), features)
    assert contents(queue) == [5, 7, 9]


def test_label_minus_two_is_stored_as_unlabelled():
    queue = number_queue(3)
    queue.enqueue(torch.tensor([4, -2, 6]), numbered([4, 5, 6])[1])
    assert contents(queue) == [4, -2, 6]
    assert queue.read("t")[0].flatten().tolist() == [4, 5, 6]
    assert sorted(queue.read("t", padded=True)[1].tolist()) == [-2, 4, 6]


def test_a_batch_larger_than_the_queue_keeps_the_newest_that_are_stored():
    queue = number_queue(3)
    labels = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1])
    queue.enqueue(labels, numbered(range(8))[1])
    assert contents(queue) == [1, 2, 3]


def test_a_missing_modality_skips_the_slot_in_its_stream_only():
    queue = make_queue(4, normalize=False)
    labels, features = torch.tensor([0, 1, 2]), batch(3)[1]
    queue.enqueue(labels, features, valid={"a": torch.tensor([True, False, True])})
    assert len(queue) == 3
    assert contents(queue, "t") == contents(queue, "a_momentum") == [0, 1, 2]
    assert contents(queue, "a") == [0, 2]
    assert torch.equal(queue.read("a")[0], features["a"][[0, 2]])
    by_label = dict(zip(queue.read("t", padded=True)[1].tolist(), range(4), strict=True))
    assert queue.read("a", padded=True)[1][by_label[1]].item() == -1


def test_a_slot_overwritten_by_a_missing_modality_forgets_the_old_row():
    queue = make_queue(2, normalize=False)
    queue.enqueue(torch.tensor([0, 1]), batch(2)[1])
    nobody = torch.zeros(2, dtype=torch.bool)
    queue.enqueue(torch.tensor([2, 3]), batch(2, seed=1)[1], valid={"a": nobody})
    assert contents(queue, "a") == []
    assert torch.equal(queue.read("a", padded=True)[0], torch.zeros(2, 3))
    assert contents(queue, "t") == [2, 3]


def test_nan_in_a_valid_row_is_kept_loudly():
    queue = make_queue()
    labels, features = batch(3)
    features["t"][1, 2] = torch.nan
    queue.enqueue(labels, features)
    assert queue.read("t")[0].isnan().any(dim=1).tolist() == [False, True, False]
    assert queue.read("t", padded=True)[0].isnan().any()
    query = torch.randn(2, 4, requires_grad=True)
    loss = md.SupConDistillLoss()(query, queue.read("t")[0], labels[:2], labels)
    assert loss.isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_whatever_an_invalid_row_holds_is_zeroed(value, normalize):
    queue = make_queue(normalize=normalize)
    labels, features = batch(3)
    features["t"][1] = value
    queue.enqueue(labels, features, valid={"t": torch.tensor([True, False, True])})
    keys, padded = queue.read("t", padded=True)
    assert torch.isfinite(keys).all()
    assert torch.equal(keys[padded == -1], torch.zeros(4, 4))
    assert contents(queue) == labels[[0, 2]].tolist()


@pytest.mark.parametrize("n", [3, 20], ids=["smaller", "larger than the queue"])
def test_nan_of_an_ignored_sample_reaches_no_slot(n):
    queue = make_queue()
    labels, features = batch(n)
    labels[n // 2] = -1
    for rows in features.values():
        rows[n // 2] = torch.nan
    queue.enqueue(labels, features)
    assert torch.isfinite(queue.read("t", padded=True)[0]).all()
    assert len(queue) == min(6, n - 1)


# ---------------------------------------------------------------------------------------------
# Rows: normalised, detached, in the queue's own dtype
# ---------------------------------------------------------------------------------------------


def test_rows_of_any_length_are_stored_as_unit_rows_and_a_zero_row_as_it_is():
    queue = make_queue()
    labels, features = batch(5)
    lengths = torch.tensor([[10.0], [1e-3], [1e4], [1e30], [0.0]])  # the square of 1e30 overflows
    expected = torch.where(lengths > 0, unit(features["t"]), 0.0)
    queue.enqueue(labels, features | {"t": features["t"] * lengths})
    torch.testing.assert_close(queue.read("t")[0], expected)


def test_normalize_false_stores_rows_as_they_are():
    queue = make_queue(normalize=False)
    labels, features = batch(3)
    queue.enqueue(labels, features)
    for stream in DIMS:
        assert torch.equal(queue.read(stream)[0], features[stream])


@pytest.mark.parametrize("incoming", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_of_a_batch_does_not_recast_the_memory(incoming, stored):
    queue = make_queue(dtype=stored)
    queue.enqueue(*batch(4))
    old = queue.read("t")[0]
    labels, features = batch(2, seed=1, dtype=incoming)
    queue.enqueue(labels, features)
    keys, _ = queue.read("t")
    assert keys.dtype == queue.read("t", padded=True)[0].dtype == stored
    assert torch.equal(keys[:4], old)
    expected = unit(features["t"].double()).to(stored)
    torch.testing.assert_close(keys[4:], expected)


def test_rows_of_16_bit_are_normalised_in_full_precision():
    queue = make_queue()
    labels, features = batch(4, dtype=torch.float16)
    features["t"] *= 100  # squares overflow float16
    queue.enqueue(labels, features)
    expected = unit(features["t"].double()).float()
    torch.testing.assert_close(queue.read("t")[0], expected, rtol=0, atol=1e-6)


def test_enqueue_under_autocast_is_the_same():
    plain, cast = make_queue(), make_queue()
    plain.enqueue(*batch(4))
    with torch.autocast("cpu", torch.bfloat16):
        cast.enqueue(*batch(4))
        read = cast.read("t")[0]
    assert torch.equal(read, plain.read("t")[0])
    assert_same_state(clone_state(cast), clone_state(plain))


CASTS = {"half": nn.Module.half, "bfloat16": nn.Module.bfloat16, "parent.half": None}


@pytest.mark.parametrize("cast", CASTS)
def test_half_keeps_the_dtype_and_the_values(cast):
    queue = make_queue()
    queue.enqueue(*batch(4))
    before = clone_state(queue)
    parent = nn.ModuleDict({"queue": queue})
    parent.half() if cast == "parent.half" else CASTS[cast](queue)
    assert_same_state(clone_state(queue), before)
    queue.enqueue(*batch(4, seed=1))
    assert queue.read("t")[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64], ids=str)
def test_labels_of_any_signed_integer_dtype_are_stored_as_int64(dtype):
    queue = make_queue()
    labels, features = batch(4)
    queue.enqueue(labels.to(dtype), features)
    assert torch.equal(queue.read("t")[1], labels)
    assert queue.read("t")[1].dtype == torch.int64


def test_stored_rows_carry_no_gradient():
    queue = make_queue()
    labels, features = batch(4)
    leaves = {s: x.requires_grad_() for s, x in features.items()}
    queue.enqueue(labels, {s: 2 * x for s, x in leaves.items()})
    for padded in (False, True):
        keys, _ = queue.read("t", padded=padded)
        assert not keys.requires_grad
        assert keys.grad_fn is None
    (queue.read("t")[0] * torch.ones(4, 4, requires_grad=True)).sum().backward()
    assert all(x.grad is None for x in leaves.values())
    assert not any(b.requires_grad for b in queue.buffers())
    assert list(queue.parameters()) == []


def test_enqueue_does_not_change_or_share_what_it_was_given():
    queue = make_queue(normalize=False)
    labels, features = batch(4)
    copies = {s: x.clone() for s, x in features.items()}
    queue.enqueue(labels, features)
    for stream, x in features.items():
        assert torch.equal(x, copies[stream])
        x.fill_(9.0)
    labels.fill_(9)
    assert torch.equal(queue.read("t")[0], copies["t"])
    assert 9 not in contents(queue)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_what_a_queue_gave_may_come_back(normalize, shift):
    queue = md.ClassQueue(4, {"a": 2, "b": 2, "c": 3}, normalize=normalize)
    rows = {"a": torch.eye(2), "b": -torch.eye(2), "c": torch.eye(2, 3)}
    for labels in (torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5])):
        queue.enqueue(labels, {stream: x[: len(labels)] for stream, x in rows.items()})
    read = {stream: queue.read(stream, padded=True) for stream in rows}
    given = {"a": read["b"][0], "b": read["a"][0], "c": read["c"][0]}
    given = {
        stream: x.as_strided((2, x.shape[1]), x.stride(), x.storage_offset() + shift) for stream, x in given.items()
    }
    labels = read["a"][1][1:3]
    copies = labels.clone(), {stream: x.clone() for stream, x in given.items()}
    other = copy.deepcopy(queue)
    queue.enqueue(labels, given)
    other.enqueue(*copies)
    assert_same_state(clone_state(queue), clone_state(other))


def test_non_contiguous_and_expanded_inputs_are_legal():
    queue = md.ClassQueue(6, {"t": 4}, normalize=False)
    rows = torch.arange(8.0).reshape(4, 2).T
    queue.enqueue(torch.tensor(3).expand(2), {"t": rows})
    queue.enqueue(torch.arange(6)[::3], {"t": torch.ones(4).expand(2, 4)})
    assert contents(queue) == [3, 3, 0, 3]
    assert torch.equal(queue.read("t")[0], torch.cat([rows, torch.ones(2, 4)]))


# ---------------------------------------------------------------------------------------------
# Reads and backward
# ---------------------------------------------------------------------------------------------


def test_compact_read_is_a_copy_that_later_enqueues_do_not_reach():
    queue = make_queue(4)
    queue.enqueue(*batch(4))
    keys, labels = queue.read("t")
    before = keys.clone(), labels.clone()
    queue.enqueue(*batch(4, seed=1))
    assert torch.equal(keys, before[0])
    assert torch.equal(labels, before[1])
    keys.zero_()
    labels.zero_()
    assert not torch.equal(queue.read("t")[0], keys)


@pytest.mark.parametrize("filled", [2, 6, 9], ids=["part", "full", "wrapped"])
def test_padded_read_is_a_live_view_of_one_storage(filled):
    queue = make_queue(6)
    keys, labels = queue.read("t", padded=True)
    places = keys.data_ptr(), labels.data_ptr()
    queue.enqueue(*batch(filled))
    again = queue.read("t", padded=True)
    assert (again[0].data_ptr(), again[1].data_ptr()) == places
    assert again[0].shape == keys.shape == (6, 4)
    assert again[1].shape == labels.shape == (6,)
    assert torch.equal(keys, again[0])  # the earlier read sees the later rows
    assert torch.equal(labels, again[1])
    assert (labels >= 0).sum() == min(6, filled)


@pytest.mark.parametrize("filled", [2, 6, 9], ids=["part", "full", "wrapped"])
def test_a_padded_read_may_be_stored_again(filled):
    queue, other = make_queue(6), make_queue(6)
    for each in (queue, other):
        each.enqueue(*batch(filled))
    reads = {stream: queue.read(stream, padded=True) for stream in DIMS}
    copies = {stream: keys.clone() for stream, (keys, _) in reads.items()}
    labels = reads["t"][1]
    other.enqueue(labels.clone(), copies)
    queue.enqueue(labels, {stream: keys for stream, (keys, _) in reads.items()})
    assert_same_state(clone_state(queue), clone_state(other))


@pytest.mark.parametrize("stream", DIMS)
def test_every_stream_keeps_its_storage(stream):
    queue = make_queue(6)
    places = [b.data_ptr() for b in queue.buffers()]
    for k in range(5):
        queue.enqueue(*batch(k + 1), valid={stream: torch.arange(k + 1) % 2 == 0})
    queue.load_state_dict(copy.deepcopy(queue.state_dict()))
    queue.reset()
    assert [b.data_ptr() for b in queue.buffers()] == places


def queries(n=3):
    torch.manual_seed(5)
    return torch.randn(n, 4, requires_grad=True)


def test_compact_read_then_enqueue_then_backward_gives_the_right_gradient():
    queue = make_queue(6)
    queue.enqueue(*batch(6))
    q = queries()
    (q @ queue.read("t")[0].T).exp().sum().backward()
    expected, q.grad = q.grad, None
    loss = (q @ queue.read("t")[0].T).exp().sum()
    queue.enqueue(*batch(6, seed=1))
    loss.backward()
    assert torch.equal(q.grad, expected)


def test_padded_read_then_enqueue_then_backward_is_refused_loudly_by_autograd():
    queue = make_queue(6)
    queue.enqueue(*batch(6))
    q = queries()
    loss = (q @ queue.read("t", padded=True)[0].T).exp().sum()
    queue.enqueue(*batch(6, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("momentum", [False, True], ids=["supervised", "with momentum targets"])
@pytest.mark.parametrize("parts", [False, True], ids=["queue", "batch and queue"])
@pytest.mark.parametrize("positives", ["outside", "inside", "inside_per_positive"])
def test_padded_read_then_enqueue_then_backward_works_through_the_loss(momentum, parts, positives):
    loss_fn = md.SupConDistillLoss(normalize="query", positives=positives)
    queue = make_queue(6)
    queue.enqueue(*batch(6))
    labels, features = batch(3, seed=2)
    own = unit(features["t"])

    def gradients(enqueue):
        q = queries()
        keys, key_labels = queue.read("t", padded=True)
        target_keys = keys
        if parts:
            keys, key_labels, target_keys = (own, keys), (labels, key_labels), (own, keys)
        extra = {"momentum_query": q.detach() + 0.1, "momentum_keys": target_keys}
        loss_fn.zero_grad()
        loss = loss_fn(q, keys, labels, key_labels, **(extra if momentum else {}))
        if enqueue:
            queue.enqueue(labels, features)
            queue.enqueue(*batch(6, seed=3))
        loss.backward()
        return [loss.detach(), q.grad, *(p.grad.clone() for p in loss_fn.parameters())]

    expected = gradients(enqueue=False)
    actual = gradients(enqueue=True)
    assert len(actual) == 3
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_backward_first_then_enqueue_is_fine_for_a_padded_read():
    queue = make_queue(6)
    q = queries()
    for seed in range(3):
        (q @ queue.read("t", padded=True)[0].T).exp().sum().backward()
        queue.enqueue(*batch(4, seed=seed))
    assert torch.isfinite(q.grad).all()


def test_padded_and_compact_reads_give_the_same_loss():
    queue, loss_fn = make_queue(6), md.SupConDistillLoss()
    labels = torch.tensor([0, 1, 2])
    for n in (0, 2, 2, 9):
        queue.enqueue(*batch(n, seed=n), valid={"t": torch.arange(n) % 3 != 1})
        q = queries()
        compact, padded = (queue.read("t", padded=p) for p in (False, True))
        a = loss_fn(q, compact[0], labels, compact[1])
        b = loss_fn(q, padded[0], labels, padded[1])
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# Balanced classes
# ---------------------------------------------------------------------------------------------


def test_a_rare_class_is_not_starved_in_a_balanced_queue():
    balanced = number_queue(6, balanced=True, num_classes=3)
    plain = number_queue(6)
    labels = torch.tensor([1] + [0, 2] * 20)
    rows = {"t": torch.arange(41.0)[:, None]}
    for queue in (balanced, plain):
        queue.enqueue(labels, rows)
    assert contents(balanced) == [0, 0, 1, 2, 2]
    assert balanced.read("t")[0].flatten().tolist() == [37, 39, 0, 38, 40]
    assert 1 not in contents(plain)


@pytest.mark.parametrize(
    ("size", "shares"), [(6, [2, 2, 2]), (7, [3, 2, 2]), (8, [3, 3, 2]), (11, [4, 4, 3]), (3, [1, 1, 1])]
)
def test_balanced_shares_add_up_to_the_size(size, shares):
    queue = number_queue(size, balanced=True, num_classes=3)
    queue.enqueue(torch.arange(60) % 3, {"t": torch.arange(60.0)[:, None]})
    assert [contents(queue).count(c) for c in range(3)] == shares
    assert len(queue) == size
    expected = [60 - 3 * k + c for c, share in enumerate(shares) for k in range(share, 0, -1)]
    assert queue.read("t")[0].flatten().tolist() == expected


@pytest.mark.parametrize("label", [-1, -2])
def test_a_sample_without_a_class_is_not_stored_in_a_balanced_queue(label):
    queue = number_queue(6, balanced=True, num_classes=3)
    queue.enqueue(torch.tensor([0, label, 2]), numbered([7, 8, 9])[1])
    assert contents(queue) == [0, 2]
    assert queue.read("t")[0].flatten().tolist() == [7, 9]


def test_num_classes_alone_does_not_divide_the_ring():
    queue = number_queue(4, num_classes=9)
    for _ in range(3):
        queue.enqueue(*numbered([0, 8, 8]))
    assert contents(queue) == [8, 0, 8, 8]


def test_repr_shows_the_settings():
    shown = repr(make_queue(6, balanced=True, num_classes=3))
    for setting in ("size=6", "num_classes=3", "balanced=True", "a_momentum"):
        assert setting in shown


def test_balanced_queue_fed_bit_by_bit_is_the_one_fed_at_once():
    labels, features = batch(50, seed=1)
    at_once = make_queue(8, balanced=True, num_classes=3)
    at_once.enqueue(labels, features)
    in_parts = make_queue(8, balanced=True, num_classes=3)
    for i in range(0, 50, 7):
        in_parts.enqueue(labels[i : i + 7], {s: x[i : i + 7] for s, x in features.items()})
    for stream in DIMS:
        for a, b in zip(at_once.read(stream), in_parts.read(stream), strict=True):
            assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------


def through_torch_save(queue, path, **kwargs):
    torch.save(queue.state_dict(), path / "queue.pt")
    fresh = make_queue(**kwargs)
    fresh.load_state_dict(torch.load(path / "queue.pt", weights_only=True), strict=True)
    return fresh


def assigned(queue, _, **kwargs):
    fresh = make_queue(**kwargs)
    fresh.load_state_dict(copy.deepcopy(queue.state_dict()), assign=True)
    return fresh


COPIES = {
    "torch.save": through_torch_save,
    "assign": assigned,
    "pickle": lambda queue, _, **__: pickle.loads(pickle.dumps(queue)),
    "deepcopy": lambda queue, _, **__: copy.deepcopy(queue),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("filled", [0, 4, 6, 9])
@pytest.mark.parametrize("kwargs", [{}, {"balanced": True, "num_classes": 3}], ids=["ring", "balanced"])
def test_pointer_and_fill_are_not_lost_on_reload(way, filled, kwargs, tmp_path):
    queue = make_queue(**kwargs)
    queue.enqueue(*batch(filled))
    twin = COPIES[way](queue, tmp_path, **kwargs)
    assert len(twin) == len(queue)
    assert_same_state(clone_state(twin), clone_state(queue))
    frozen = clone_state(queue)
    for seed in range(4):
        twin.enqueue(*batch(4, seed=seed + 1))
    assert_same_state(clone_state(queue), frozen)  # the two share nothing
    for seed in range(4):
        queue.enqueue(*batch(4, seed=seed + 1))
    assert_same_state(clone_state(twin), clone_state(queue))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_checkpoint_of_another_dtype_does_not_recast_the_memory(assign):
    source, queue = make_queue(), make_queue()
    source.enqueue(*batch(4))
    state = source.state_dict()
    narrow = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    queue.load_state_dict(narrow, assign=assign)
    assert queue.read("t")[0].dtype == torch.float32
    torch.testing.assert_close(queue.read("t")[0], source.read("t")[0], rtol=0, atol=2**-8)
    queue.enqueue(*batch(2, seed=1))
    torch.testing.assert_close(queue.read("t")[0][4:], unit(batch(2, seed=1)[1]["t"]))


def test_a_state_may_be_parts_of_other_tensors_in_any_layout():
    source, queue = make_queue(), make_queue()
    source.enqueue(*batch(4), valid={"a": torch.tensor([True, False, True, True])})
    state = dict(source.state_dict())
    for name in ("labels", "keys_t", "keys_a", "keys_a_momentum"):
        room = torch.full((state[name].shape[1] + 1, state[name].shape[0] + 1), 7, dtype=state[name].dtype)
        room[1:, 1:] = state[name].T
        state[name] = room[1:, 1:].T
    queue.load_state_dict(state, assign=True)
    assert_same_state(clone_state(queue), clone_state(source))


OTHERS = {
    "more slots": (md.ClassQueue(7, DIMS), "size 6, got 7; leave the queue's state out, and it fills again"),
    "more rings": (make_queue(balanced=True, num_classes=2), r"shape \(1,\) for '(queue\.)?count', got \(2,\)"),
    "a wider stream": (md.ClassQueue(6, DIMS | {"a": 9}), r"shape \(7, 3\) for '(queue\.)?keys_a', got \(7, 9\)"),
    "a stream more": (md.ClassQueue(6, DIMS | {"z": 2}), r"streams \[.*'a_momentum'\], got \[.*'z'\]"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_state_that_does_not_fit_is_refused_before_anything_of_it_is_copied(other, message, strict):
    queue = make_queue(6)
    queue.enqueue(*batch(4))
    before = {name: tensor.clone() for name, tensor in queue.state_dict().items()}
    for module, state in ((queue, other), (nn.ModuleDict({"queue": queue}), nn.ModuleDict({"queue": other}))):
        with pytest.raises(ValueError, match=rf"^state_dict: expected {message}$"):
            module.load_state_dict(state.state_dict(), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in queue.state_dict().items())


# ---------------------------------------------------------------------------------------------
# No wait for a device, compiled, deterministic
# ---------------------------------------------------------------------------------------------

KINDS = {
    "ring": {},
    "balanced": {"balanced": True, "num_classes": 3},
    "raw": {"normalize": False},
    "16 bits": {"dtype": torch.bfloat16},
}


def hot_path(queue, device=None, sizes=(4, 6, 15, 0, 1)):
    for n in sizes:
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        features = {s: torch.ones(n, d, device=device) for s, d in DIMS.items()}
        queue.enqueue(labels, features)
        queue.enqueue(labels, features, valid={"a": labels == 0})
        for stream, dim in DIMS.items():
            keys, key_labels = queue.read(stream, padded=True)
            assert keys.shape == (6, dim)
            assert key_labels.shape == (6,)


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_enqueue_and_padded_read_look_at_no_value(kwargs):
    """Tensors without values: anything that waited for a device to hand one over would raise."""
    with FakeTensorMode():
        hot_path(make_queue(**kwargs))


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_enqueue_and_padded_read_run_on_the_meta_device(kwargs):
    queue = make_queue(device="meta", **kwargs)
    assert {b.device.type for b in queue.buffers()} == {"meta"}
    hot_path(queue, device="meta")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_a_queue_without_numbers_gets_them_from_a_state(kwargs, assign):
    """As a large model is built: on the device meta, then with whatever memory holds, then from a file."""
    queue, source = make_queue(device="meta", **kwargs), make_queue(**kwargs)
    source.enqueue(*batch(4))
    if not assign:
        queue = queue.to_empty(device="cpu")
        for buffer in queue.buffers():
            buffer.fill_(77)
    queue.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert_same_state(clone_state(queue), clone_state(source))
    for each in (queue, source):
        each.enqueue(*batch(4, seed=3))
    assert_same_state(clone_state(queue), clone_state(source))
    for buffer in queue.buffers():
        buffer.fill_(77)
    queue.reset()
    source.reset()
    assert len(queue) == 0
    for each in (queue, source):
        each.enqueue(*batch(4, seed=4))
    assert_same_state(clone_state(queue), clone_state(source))


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_the_state_is_what_distributed_checkpoints_ask_for(kwargs):
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, other = (nn.ModuleDict({"queue": make_queue(**kwargs)}) for _ in range(2))
    source["queue"].enqueue(*batch(4))
    state = get_model_state_dict(source)
    assert state.keys() == source.state_dict().keys()
    assert set_model_state_dict(other, state) == ([], [])
    assert_same_state(clone_state(other["queue"]), clone_state(source["queue"]))
    for wrong in ("keys_", "keys_z", "key", "keys"):
        with pytest.raises(AttributeError, match=wrong):
            getattr(source["queue"], wrong)


@pytest.mark.parametrize(
    "look",
    [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero()],
    ids=["item", "bool", "mask", "nonzero"],
)
def test_tensors_without_values_do_catch_what_waits(look):
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        look(torch.ones(3) * 2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        look(torch.ones(3, device="meta"))


def compiled_step(queue, loss_fn, query, labels, features):
    keys, key_labels = queue.read("t", padded=True)
    target_keys, _ = queue.read("t", padded=True)
    loss = loss_fn(
        query,
        (features["t"], keys),
        labels,
        (labels, key_labels),
        momentum_query=query.detach() + 0.1,
        momentum_keys=(features["t"], target_keys),
    )
    queue.enqueue(labels, features, valid={"a": labels != 1})
    return loss


@pytest.mark.parametrize(("kind", "normalize"), [("ring", True), ("balanced", "query")])
def test_compiled_step_equals_eager_and_does_not_recompile_from_the_third_step_on(kind, normalize):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    queues = [make_queue(10, **KINDS[kind]) for _ in range(2)]
    loss_fns = [md.SupConDistillLoss(normalize=normalize) for _ in range(2)]
    steps = [compiled_step, torch.compile(compiled_step, fullgraph=True, backend=counter)]
    for k in range(7):
        labels, features = batch(4, seed=k)
        features["t"] = unit(features["t"])
        results = []
        stance = "fail_on_recompile" if k >= 2 else "default"
        for step, queue, loss_fn in zip(steps, queues, loss_fns, strict=True):
            q = queries(4)
            with torch.compiler.set_stance(stance):
                loss = step(queue, loss_fn, q, labels, features)
            loss_fn.zero_grad()
            loss.backward()
            results.append([loss.detach(), q.grad, *(p.grad.clone() for p in loss_fn.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        # In eager mode on the CPU ordinary rows are normalised in fewer operations, which round differently.
        torch.testing.assert_close(clone_state(queues[1]), clone_state(queues[0]), rtol=0, atol=2e-7)
    assert 1 <= counter.frame_count <= 2
    assert len(queues[1]) > 5


WRITES = {"index_copy_": 3, "copy_": 1, "_foreach_copy_": 1}
"""The operations that write into a bank, and which argument of them is the source, or the sources."""


class Results(TorchDispatchMode):
    """Which operations run and how many elements each result has; of a write, how many the source has."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in WRITES:
            source = args[WRITES[name]]
            sources = source if isinstance(source, (list, tuple)) else [source]
            self.seen.append((name, sum(x.numel() for x in sources)))
        elif not name.endswith("_") and not func.is_view and isinstance(result, torch.Tensor):
            self.seen.append((name, result.numel()))
        elif not func.is_view:
            self.seen.append((name, None))
        return result


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_a_step_writes_as_much_in_a_large_queue_as_in_a_small_one(kwargs):
    seen = []
    for size in (20, 2000):
        queue = make_queue(size, **kwargs)
        with Results() as results:
            labels, features = batch(4)
            for ignored in (0, 1):  # a whole batch, and one with a row that is not stored
                labels[:ignored] = -1
                queue.enqueue(labels, features, valid={"a": torch.tensor([True, False, True, True])})
            for stream in DIMS:
                queue.read(stream, padded=True)
        seen.append(results.seen)
    small, large = seen
    assert small == large
    widths = set(DIMS.values())  # streams of a width are written together
    assert sum(name in WRITES for name, _ in small) <= 2 * (len(widths) + 1) + len(widths)  # one masked row is scaled
    assert max(elements or 0 for _, elements in small) <= 4 * sum(DIMS.values())


@pytest.mark.parametrize(("normalize", "most"), [(True, 20), (False, 10)])
def test_a_step_on_an_accelerator_starts_few_operations_and_waits_for_none(normalize, most, monkeypatch):
    """Counted on the CPU, where nothing may be asked: five streams of one width, 64 rows, as most use it."""
    monkeypatch.setattr(_checks, "may_ask", lambda _: False)
    monkeypatch.setattr(_queue, "may_ask", lambda _: False)
    queue = md.ClassQueue(1024, dict.fromkeys("abcde", 8), normalize=normalize)
    labels, features = torch.zeros(64, dtype=torch.int64), {stream: torch.randn(64, 8) for stream in "abcde"}
    with Results() as results:
        queue.enqueue(labels, features)
        for stream in "abcde":
            queue.read(stream, padded=True)
    started = [name for name, _ in results.seen]
    assert not {"_local_scalar_dense", "nonzero"} & set(started), "the host waits"
    assert len(started) <= most, started


@pytest.mark.parametrize("kwargs", [{}, {"normalize": False}, {"dtype": torch.float16}], ids=str)
def test_slices_write_what_an_index_writes(kwargs, monkeypatch):
    """Batches that fit in one piece are written by slices where one may ask, all others by index."""
    asked, unasked, sliced = make_queue(10, **kwargs), make_queue(10, **kwargs), []
    monkeypatch.setattr(unasked, "_check", lambda *_: False)
    for seed, n in enumerate((4, 4, 4, 8, 10, 25, 8, 0, 1)):
        labels, features = batch(n, seed)
        labels[::3] = -2
        if seed == 6:
            labels[2] = -1
        valid = {"a": torch.arange(n) % 2 == 0} if seed % 2 else None
        for queue in (asked, unasked):
            with Results() as results:
                queue.enqueue(labels.to(torch.int32), features, valid=valid)
            sliced.append("index_copy_" not in dict(results.seen))
        assert_same_state(clone_state(asked), clone_state(unasked))
    # One wraps around, one ends at the end, one fills the ring, one is too large, one has a row that is not stored. One
    # is empty, and written by neither.
    assert sliced[::2] == [True, True, False, True, True, False, False, True, True]
    assert sliced[1::2] == [False, False, False, False, False, False, False, True, False]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_change_nothing(kwargs):
    queues = [make_queue(**kwargs) for _ in range(2)]
    for queue, mode in zip(queues, (True, False), strict=True):
        torch.use_deterministic_algorithms(mode)
        for n in (4, 15, 1):
            queue.enqueue(*batch(n, seed=n), valid={"a": torch.arange(n) % 2 == 0})
    assert_same_state(clone_state(queues[0]), clone_state(queues[1]))


def test_inference_tensors_can_be_stored_and_read_into_a_graph():
    queue = make_queue()
    with torch.inference_mode():
        queue.enqueue(*batch(4))
    q = queries()
    (q @ queue.read("t")[0].T).sum().backward()
    assert torch.isfinite(q.grad).all()


def test_enqueue_uses_no_random_numbers():
    before = torch.get_rng_state()
    queue = make_queue()
    queue.enqueue(*batch(4))
    queue.read("t")
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------
# What `validate` finds; states, stream by stream
# ---------------------------------------------------------------------------------------------


def test_wrong_values_are_found_on_request_and_nothing_is_stored():
    queue = make_queue(validate=True)
    queue.enqueue(*batch(4))
    before = clone_state(queue)
    labels, features = batch(3, seed=1)
    features["a"][1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^features(\[.+?\])?: expected .*, got "):
        queue.enqueue(labels, features)
    assert_same_state(clone_state(queue), before)
    queue.enqueue(labels, features, valid={"a": torch.tensor([True, False, True])})
    assert len(queue) == 6


def test_a_state_holds_what_changes_and_the_streams():
    assert list(md.ClassQueue(6, {"text": 4, "audio": 4}).state_dict()) == [
        "count",
        "labels",
        "keys_text",
        "keys_audio",
        "_extra_state",
    ]


def test_a_state_goes_to_its_streams_in_whatever_order_they_stand():
    saved = md.ClassQueue(6, {"text": 4, "audio": 4})
    heard = torch.tensor([True, False, True, True, False])
    features = {"text": torch.randn(5, 4), "audio": torch.randn(5, 4)}
    saved.enqueue(torch.arange(5), features, valid={"audio": heard})
    loaded = md.ClassQueue(6, {"audio": 4, "text": 4})
    loaded.load_state_dict(saved.state_dict())
    for stream in saved.streams:
        for padded in (False, True):
            for one, two in zip(saved.read(stream, padded=padded), loaded.read(stream, padded=padded), strict=True):
                assert torch.equal(one, two)
    assert loaded.read("audio")[1].tolist() == [0, 2, 3]


def test_a_state_shares_no_memory_within_itself_or_with_the_queue():
    """As safetensors wants it, and `accelerate`, which saves with it."""
    queue = md.ClassQueue(4, {"text": 2, "audio": 2, "video": 3})
    queue.enqueue(torch.arange(2), {name: torch.ones(2, width) for name, width in queue.dims.items()})
    keys = {name: x for name, x in queue.state_dict().items() if "keys_" in name}
    assert len(keys) == 3
    assert len({x.untyped_storage().data_ptr() for x in keys.values()}) == 3
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in keys.values())
    before = keys["keys_text"].clone()
    queue.reset()
    assert torch.equal(keys["keys_text"], before)


@pytest.mark.parametrize("order", [("t", "a"), ("a", "t")])
def test_rows_of_one_stream_may_be_stored_in_another(order):
    """Also where the batch wraps around, and other streams are written first."""
    streams = {"t": 1, "a": 1, "wide": 2}
    queue, other = (md.ClassQueue(4, streams, normalize=False) for _ in range(2))
    first = {
        "t": torch.tensor([[1.0], [2.0], [3.0]]),
        "a": torch.tensor([[4.0], [5.0], [6.0]]),
        "wide": torch.eye(3)[:, :2],
    }
    for each in (queue, other):
        each.enqueue(torch.tensor([1, 2, 3]), first)
    views = {stream: queue.read(source, padded=True)[0][:3] for stream, source in zip(("t", "a"), order, strict=True)}
    rows = {**views, "wide": queue.read("wide", padded=True)[0][:3]}
    other.enqueue(torch.tensor([1, 2, 3]), {stream: x.clone() for stream, x in rows.items()})
    queue.enqueue(torch.tensor([1, 2, 3]), rows)
    assert_same_state(clone_state(queue), clone_state(other))


def test_half_leaves_a_bfloat16_queue_as_it_is():
    queue = md.ClassQueue(4, {"t": 2}, dtype=torch.bfloat16).half()
    assert queue.read("t")[0].dtype == queue.dtype == torch.bfloat16
