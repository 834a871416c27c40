"""Which processes a block works with: the `group` argument of losses and queue."""

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch.distributed as dist

from momentum_distill._checks import describe, wrong_type

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Literal['auto'] | None"


def check_group(group: object) -> None:
    """Refuse what is neither "auto", None nor a process group."""
    if group is None or group == "auto":
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        wrong_type("group", "'auto', None or a torch.distributed process group", describe(group))


def require_single_process(group: Group) -> None:
    """Refuse a group of several ranks: gathering across ranks is not there yet.

    Called by every step, since a process group may be initialised after the block was built.

    Raises:
        NotImplementedError: If `group` stands for more than one rank.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return
    ranks = dist.get_world_size(None if group == "auto" else group)
    if ranks > 1:
        raise NotImplementedError(
            f"group: expected one process, got a group of {ranks} ranks. This version does not gather across "
            "ranks yet; pass group=None to work with the rows of this process alone."
        )
