"""What stays in 32 bits or more when the model around it is cast to 16, or runs under autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from momentum_distill._typing import TypedModule

# Asked once: older versions of torch.compile cannot ask inside a graph.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia") if torch.amp.is_autocast_available(name)
)


def is_16_bit(dtype: torch.dtype) -> bool:
    """A floating dtype too narrow to accumulate in: float16, bfloat16 and the 8-bit floats."""
    return dtype.is_floating_point and dtype.itemsize < 4


def wide_dtype(tensor: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which a tensor is averaged: for floats `dtype` if there is one, and never less than 32 bits."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return dtype or (torch.float32 if is_16_bit(tensor.dtype) else tensor.dtype)


def sum_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that a loss is computed in: float64 if anything is, else float32."""
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def default_wide() -> torch.dtype:
    """The default dtype, but 32 bits where that is narrower: for what is learned in small steps."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off for the device of `tensor`: a bfloat16 matrix product would round the logits."""
    device = tensor.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device_type=device, enabled=False)


def blend(first: Tensor, second: Tensor, alpha: float | Tensor) -> Tensor:
    """(1 - alpha) first + alpha second, in the dtype of `first`."""
    if isinstance(alpha, Tensor) or torch.compiler.is_compiling():
        # In that dtype, in which 1 - alpha loses nothing.
        alpha = as_variable(alpha, first).to(first.dtype)
    return torch.lerp(first, second, alpha)


def as_variable(value: float | Tensor, like: Tensor) -> Tensor:
    """A tensor of shape (); of a number in the dtype and on the device of `like`, and to a compiler one of any."""
    # A product: what a tensor is filled with becomes a constant of the graph, and the next number a new graph.
    return value if isinstance(value, Tensor) else like.new_ones(()) * value


class WideModule(TypedModule):
    """A module whose wide floats never become narrow: `.half()`, `.bfloat16()` and `.to(dtype)` leave them alone.

    An average, a queue or a learned temperature in 16 bits stands still: one step of it is smaller than the spacing of
    the numbers. So casting the model around it must not reach it. Devices change as asked.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            cast = moved.dtype != tensor.dtype and tensor.is_floating_point()
            return tensor.to(moved.device) if cast and is_16_bit(moved.dtype) else moved

        super()._apply(keep_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """With `assign=True` as well."""
        for name, own in (self._parameters | self._buffers).items():
            came = state_dict.get(prefix + name)
            if isinstance(came, Tensor) and is_16_bit(came.dtype) and own is not None and not is_16_bit(own.dtype):
                state_dict[prefix + name] = came.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)
