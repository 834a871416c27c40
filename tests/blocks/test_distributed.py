"""Many processes are one: the same losses, gradients, weights, averages and queues."""

import pytest
import torch

import rank_cases
from rank_cases import SPLITS, Case

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.grid
@pytest.mark.parametrize("world", [1, 2, 3, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("together", [True, False], ids=["auto", "None"])
@pytest.mark.parametrize("streaming", [True, False], ids=["tiles", "matrices"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_that_of_one_process(ranks, world, split, together, streaming, accumulate):
    case = Case(tuple(SPLITS[split](world)), together, streaming, accumulate)
    trained = ranks.run(world, "rank_cases:train", case)
    for rank, (ours, expected) in enumerate(zip(trained, rank_cases.train_alone(case), strict=True)):
        for field in ("weights", "average", "queue", "losses"):
            torch.testing.assert_close(
                getattr(ours, field),
                getattr(expected, field),
                rtol=1e-12,
                atol=1e-12,
                msg=lambda text, rank=rank, field=field: f"{field} of rank {rank}: {text}",
            )
        same_on_all = ("weights", "average", "queue", "losses") if together else ("weights", "average")
        for field in same_on_all:
            torch.testing.assert_close(getattr(ours, field), getattr(trained[0], field), rtol=0, atol=0)
