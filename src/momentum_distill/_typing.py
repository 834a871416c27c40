"""Calls that type checkers see into: `nn.Module` passes no arguments of `forward` on to them."""

from typing import TYPE_CHECKING, Protocol

from torch import nn
from typing_extensions import ParamSpec, TypeVar

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class HasForward(Protocol[P, R_co]):
    """What is called as its `forward` is."""

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class TypedModule(nn.Module):
    """A module that takes and returns what its `forward` does."""

    if TYPE_CHECKING:

        def __call__(self: HasForward[P, R_co], *args: P.args, **kwargs: P.kwargs) -> R_co: ...
