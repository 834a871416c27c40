"""Each block on several ranks is that of one process, takes a fixed number of collectives, and fails on all or none."""

import re
from pathlib import Path

import pytest
import torch

import rank_blocks
from pinned import read
from rank_blocks import FED, LossCase, QueueCase

pytestmark = pytest.mark.xdist_group("ranks")

# --------------------------------------------------------------------------------------------------------------------
# The queue
# --------------------------------------------------------------------------------------------------------------------

QUEUES = {
    "plain": QueueCase({}),
    "balanced": QueueCase({"balanced": True, "validate": True}),
    "bfloat16 batches": QueueCase({}, torch.bfloat16),
    "float64": QueueCase({"dtype": torch.float64}, torch.float64),
    "float16, not normalised": QueueCase({"dtype": torch.float16, "normalize": False}, torch.float16),
}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("case", QUEUES.values(), ids=QUEUES)
def test_after_every_batch_each_rank_holds_the_queue_of_one_process(ranks, world, case):
    alone = rank_blocks.feed(case)
    assert alone.calls == [[]] * FED
    for fed in ranks.run(world, "rank_blocks:feed", case):
        assert fed.digests == alone.digests
        assert fed.calls == [["gather", "gather"]] * FED


def test_a_queue_for_this_process_alone_takes_no_part(ranks):
    for rank, fed in enumerate(ranks.run(2, "rank_blocks:feed", QueueCase({"group": None}))):
        assert fed.calls == [[]] * FED, rank
        assert fed.shown.endswith("group=None (this process alone))")


def test_one_rank_takes_no_collective(ranks):
    (fed,) = ranks.run(1, "rank_blocks:feed", QUEUES["plain"])
    assert fed.calls == [[]] * FED
    assert fed.digests == rank_blocks.feed(QUEUES["plain"]).digests


def test_a_queue_of_some_ranks_beside_one_that_is_not_among_them(ranks):
    def queue_of(*ranks_in_order):
        queue = rank_blocks.md.ClassQueue(rank_blocks.SLOTS, rank_blocks.DIMS).to(rank_blocks.DEVICE)
        for step in range(3):
            batches = [rank_blocks.own_rows(rank, step) for rank in ranks_in_order]
            labels = torch.cat([labels for labels, _ in batches])
            queue.enqueue(labels, {name: torch.cat([rows[name] for _, rows in batches]) for name in rank_blocks.DIMS})
        return rank_blocks.digest(queue)

    together, apart = queue_of(0, 2), queue_of(1)
    answers = ranks.run(3, "rank_blocks:subset", [0, 2])
    assert [held for held, _, _ in answers] == [together, apart, together]
    shown = ["process group (rank 0 of 2)", "None (this process alone)", "process group (rank 1 of 2)"]
    for (_, text, _), group in zip(answers, shown, strict=True):
        assert text.endswith(f"group={group})")
    assert [mean for _, _, mean in answers] == [1.5, 1.0, 1.5]  # one 0, three 2; two 1


@pytest.mark.parametrize("kind", ["plain", "balanced"])
def test_a_queue_saved_on_two_ranks_goes_on_bit_for_bit_on_others(ranks, tmp_path, kind):
    case, saved = QUEUES[kind], tmp_path / "queue.pt"
    expected = rank_blocks.feed(case).digests
    ranks.run(2, "rank_blocks:feed", case, 0, 6, saved)
    for world in (1, 4):
        for fed in ranks.run(world, "rank_blocks:feed", case, 6, FED, saved):
            assert fed.digests == expected[6:]


@pytest.mark.parametrize("where", ["count", "labels", "keys_audio"])
def test_a_queue_that_one_rank_has_changed_is_found_out(ranks, where):
    for kind, text in ranks.run(3, "rank_blocks:change_one_queue", where):
        assert kind == "RuntimeError"
        assert text == f"ClassQueue: expected the same bits on all ranks, got another {where!r} on rank 1"


# --------------------------------------------------------------------------------------------------------------------
# The losses
# --------------------------------------------------------------------------------------------------------------------

LOSSES = {
    "uneven": LossCase((3, 5)),
    "uneven, tiles": LossCase((3, 5), streaming=True),
    "one blind": LossCase((4, 3, 2), blind=True),
    "one empty, tiles": LossCase((5, 0, 1, 2), streaming=True),
    "none has any": LossCase((0, 0)),
    "float32": LossCase((1, 4, 2), torch.float32),
    "float32, tiles": LossCase((6, 0), torch.float32, streaming=True),
    "autocast": LossCase((3, 5), torch.float32, autocast=True),
}


def close(actual, expected, tolerance, name):
    """Both None, or the same numbers: relative to the largest, absolute below 1."""
    if actual is None or expected is None:
        assert actual is expected, name
        return
    actual, expected = (torch.tensor(numbers, dtype=torch.float64) for numbers in (actual, expected))
    bound = tolerance * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}")


def tolerances(case):
    """Of values and of gradients."""
    if case.autocast:
        return 1e-2, 3e-2
    return (1e-14, 1e-12) if case.dtype == torch.float64 else (1e-6, 1e-5)


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_value_and_gradients_of_each_loss_are_those_of_one_process(ranks, case):
    alone = rank_blocks.losses(case)
    everyone = ranks.run(len(case.sizes), "rank_blocks:losses", case)
    for_values, for_gradients = tolerances(case)
    for name, expected in alone.items():
        assert not expected.forward + expected.backward
        for answers in everyone:
            answer = answers[name]
            assert answer.value == everyone[0][name].value, name
            close([answer.value], [expected.value], for_values, name)
            for leaf, grad in expected.grads.items():
                close(answer.grads[leaf], grad, for_gradients, f"{name}, {leaf}")
            assert answer.forward == [*(rank_blocks.SINKHORN if "sinkhorn" in name else []), "gather"], name
            # The way back of the keys, which is not the loss's.
            assert answer.backward == (["scatter"] if name in rank_blocks.GATHERED else []), name


@pytest.mark.parametrize("case", [LossCase((3, 5)), LossCase((4, 0, 2), streaming=True)], ids=["two", "three"])
def test_second_derivatives_are_those_of_one_process(ranks, case):
    alone = rank_blocks.second_derivatives(case)
    for answers in ranks.run(len(case.sizes), "rank_blocks:second_derivatives", case):
        for name, expected in alone.items():
            close([answers[name].value], [expected.value], 1e-14, name)
            for leaf, grad in expected.grads.items():
                close(answers[name].grads[leaf], grad, 1e-12, f"{name}, {leaf}")


def test_rows_are_those_of_each_rank_and_cost_nothing(ranks):
    case = LossCase((3, 0, 4))
    alone = rank_blocks.row_by_row(case)
    answers = ranks.run(3, "rank_blocks:row_by_row", case)
    for name, (_, collectives) in rank_blocks.ROW_BY_ROW.items():
        assert [len(answer[name][0]) for answer in answers] == list(case.sizes)
        close([row for answer in answers for row in answer[name][0]], alone[name][0], 1e-14, name)
        assert [answer[name][1] for answer in answers] == [collectives] * 3, name


def test_a_centre_is_that_of_the_rows_of_all_ranks(ranks):
    alone, _ = rank_blocks.centre((3, 0, 4))
    for centre, calls in (answers := ranks.run(3, "rank_blocks:centre", (3, 0, 4))):
        assert centre == answers[0][0]
        close(centre, alone, 1e-6, "centre")
        assert calls == ["gather"] * 6


@pytest.mark.parametrize("case", [LossCase((4, 3), blind=True), LossCase((0, 3, 2))], ids=["blind", "empty"])
def test_a_rank_without_rows_gives_ddp_every_gradient(ranks, case):
    alone = rank_blocks.losses_under_ddp(case)
    for grads in ranks.run(len(case.sizes), "rank_blocks:losses_under_ddp", case):
        for leaf, expected in alone.items():
            assert grads[leaf] is not None
            close(grads[leaf], expected, 1e-12, leaf)


FORMULAS, OPERATOR = 2**14, -1


@pytest.mark.parametrize(
    ("fused_scores", "names"),
    [
        (FORMULAS, ("supcon, centred", "mean of rows")),
        (OPERATOR, ("supcon, sinkhorn",)),
        pytest.param(
            FORMULAS,
            ("supcon inside mean", "supcon, sinkhorn", "supervised", "classification", "hard sample distance mean"),
            marks=pytest.mark.long,
        ),
        pytest.param(OPERATOR, ("supcon inside mean", "supcon, centred", "supervised"), marks=pytest.mark.long),
    ],
    ids=["formulas", "operator", "more formulas", "more of the operator"],
)
def test_losses_compile_to_one_graph(fused_scores, names, ranks):
    case = LossCase((3, 5))
    first, second = ranks.run(2, "rank_blocks:compiled", case, fused_scores, names)
    alone = rank_blocks.losses(case)
    for name, (value, far) in first.items():
        assert value == second[name][0]
        assert max(far, second[name][1]) <= 1e-12, name
        close([value], [alone[name].value], 1e-14, name)


@pytest.mark.long
def test_rows_gathered_and_stored_by_compiled_code_are_the_same(ranks):
    assert ranks.run(2, "rank_blocks:compiled_rows") == [(True,) * 4] * 2


# --------------------------------------------------------------------------------------------------------------------
# gather_rows
# --------------------------------------------------------------------------------------------------------------------

SIZES = {
    "uneven": (2, 5),
    "empty": (3, 0, 1),
    "one row in all": (0, 1, 0),
    "none": (0, 0),
    "one row each": (1, 1, 1, 1),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_of_any_kind_come_out_in_rank_order(ranks, sizes):
    expected, _ = rank_blocks.gather_all_kinds(sizes)
    for found, calls in ranks.run(len(sizes), "rank_blocks:gather_all_kinds", sizes):
        assert found == expected
        assert calls == ["gather", "gather"]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["once", "nested"])
def test_a_row_gets_the_gradients_of_all_ranks(ranks, sizes, nested):
    expected, _ = rank_blocks.gather_gradient(sizes, nested)
    answers = ranks.run(len(sizes), "rank_blocks:gather_gradient", sizes, nested)
    for name, tolerance in {"wide": 1e-12, "narrow": 1e-5, "deep": 1e-12}.items():
        close([number for grads, _ in answers for number in grads[name]], expected[name], tolerance, name)
    assert all(calls == ["scatter"] * (1 + nested) for _, calls in answers)


def test_a_tensor_that_a_loss_does_not_use_gets_zeros_and_a_graph_may_be_used_twice(ranks):
    # First a times 1 on one rank and 2 on the other, then a times b on both.
    expected = [[3.0, 3.0], [0.0, 0.0], [2.0, 2.0], [2.0, 2.0]]
    assert ranks.run(2, "rank_blocks:gather_unused") == [expected] * 2


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


MESSAGES = Path(__file__).with_name("rank_error_messages.json")


def messages(ranks):
    """What each wrong call says on two ranks; `python tests/pin.py` writes it down."""
    return {name: text for name, (_, text, _) in ranks.run(2, "rank_blocks:errors")[0].items()}


@pytest.mark.parametrize("world", [2, 3])
def test_what_is_wrong_on_one_rank_is_the_same_error_on_all_and_none_is_lost(ranks, world):
    pinned = read(MESSAGES)
    assert pinned.keys() == rank_blocks.WRONG.keys(), "`python tests/pin.py`, and read the difference"
    answers = ranks.run(world, "rank_blocks:errors")
    mean = sum(rank * (rank + 1) for rank in range(world)) / sum(range(1, world + 1))
    for name, (_, _, kind, pattern) in rank_blocks.WRONG.items():
        for answer in answers:
            got, text, after = answer[name]
            assert (got, text) == answers[0][name][:2], name
            assert got == kind, f"{name}: {text}"
            assert re.search(pattern, text), f"{name}: {text}"
            assert world != 2 or text == pinned[name]
            assert after == pytest.approx(mean), name


def test_an_error_where_no_collective_is_made_is_that_of_its_rank(ranks):
    first, second = ranks.run(2, "rank_blocks:lone_error")
    assert first[0] == "ValueError"
    assert second == ("nothing", "")


# --------------------------------------------------------------------------------------------------------------------
# Averages
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "compile_it"), [(2, False), (4, False), (3, True)], ids=["2", "4", "3, compiled"])
def test_averages_under_ddp_are_the_same_without_traffic(ranks, world, compile_it):
    answers = ranks.run(world, "rank_blocks:average_of_ddp", compile_it)
    assert answers == [answers[0]] * world
    _, traffic, far = answers[0]
    assert traffic == 0
    assert far < 1e-6


@pytest.mark.parametrize("where", ["0.weight", "1.running_var", "1.num_batches_tracked", "number of updates"])
def test_an_average_that_some_ranks_have_changed_is_found_out(ranks, where):
    for kind, text in ranks.run(3, "rank_blocks:change_one_average", where):
        assert kind == "RuntimeError"
        assert text == f"EMAWrapper: expected the same bits on all ranks, got another {where!r} on rank 1, 2"


def test_averages_of_other_models_are_found_out(ranks):
    for kind, text in ranks.run(2, "rank_blocks:rename_one_average"):
        assert kind == "RuntimeError"
        assert text == "EMAWrapper: expected tensors of the same names on all ranks, got others"


def test_replicas_of_dtensor_are_compared(ranks):
    for kind, text in ranks.run(2, "rank_blocks:average_of_replicas"):
        assert (kind, text.partition("got ")[2]) == ("RuntimeError", "another 'weight' on rank 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_update_of_shards_may_copy(ranks, dtype):
    for found in ranks.run(2, "rank_blocks:copied_shards", dtype):
        assert found == [True] * 12


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_shards_of_the_average_are_the_average_of_the_shards(ranks, world, dtype):
    for traffic, wrong in ranks.run(world, "rank_blocks:average_of_shards", dtype, None):
        assert traffic == 0
        assert not wrong


def test_an_average_saved_from_three_shards_is_restored_on_other_numbers(ranks, tmp_path):
    saved = tmp_path / "average.pt"
    ranks.run(3, "rank_blocks:average_of_shards", torch.float32, saved)
    plain = rank_blocks.md.EMAWrapper(rank_blocks.whole(4))
    plain.load_state_dict(torch.load(saved))
    expected = plain.step, {name: tensor.flatten().tolist() for name, tensor in plain.module.state_dict().items()}
    assert expected[0] == 3
    for world in (1, 2, 4):
        for restored in ranks.run(world, "rank_blocks:restore_shards", saved):
            assert restored == expected


def test_shards_are_swapped_whole_and_back(ranks):
    assert ranks.run(3, "rank_blocks:swap_shards") == [[], [], []]


def test_gradients_of_a_sharded_student_are_those_of_one_process(ranks):
    sizes = (3, 0, 5)
    expected, temperature = rank_blocks.loss_beside_shards(sizes)
    for grad, of_temperature in ranks.run(3, "rank_blocks:loss_beside_shards", sizes):
        close(grad, expected, 1e-12, "weight")
        close([of_temperature], [temperature], 1e-12, "temperature")


# --------------------------------------------------------------------------------------------------------------------
# Options of DDP
# --------------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "buffers sent": rank_blocks.sync_buffers(True),
    "buffers kept": rank_blocks.sync_buffers(False),
    "static graph": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


@pytest.mark.parametrize(("sizes", "accumulate"), [((3, 4), 1), ((0, 5, 2), 3)], ids=["each step", "accumulated"])
def test_all_blocks_inside_one_module_train_alike_whatever_ddp_does(ranks, sizes, accumulate):
    _, expected = rank_blocks.train_everything(sizes, accumulate, {})
    for name, options in OPTIONS.items():
        answers = ranks.run(len(sizes), "rank_blocks:train_everything", sizes, accumulate, options)
        assert len({held for held, _ in answers}) == 1, name
        for tensor, values in answers[0][1].items():
            close(values, expected[tensor], 1e-12, f"{name}, {tensor}")
