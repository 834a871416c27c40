"""The argument checks shared by all blocks: shapes, dtypes, devices, ranges and choices.

Every message reads ``argument: expected X, got Y``. Most of these checks read no value of a tensor, so that none makes
the host wait for an accelerator. Labels are looked at where that is free (:func:`may_ask`), on an accelerator only with
``validate=True``; and only with it are the values of features and logits.
"""

import math
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

Shape: TypeAlias = Sequence[int | str]
"""Sizes; a letter stands for any: `("N", 3)` is any (N, 3), `("N", "d")` any matrix."""

Named: TypeAlias = tuple[str, Tensor]
"""An argument: its name and its value."""

REDUCTIONS = ("none", "mean", "sum")

FEW = 64
"""So many numbers are looked at in Python as fast as by an operation."""

LARGEST = torch.finfo(torch.float64).max
COLDEST, HOTTEST = 1e-12, 1e12
"""Temperatures by which 32 bits divide twice, and multiply: far outside of them a loss or its gradient is NaN."""

UNLABELLED = -2
"""Label of a sample that is there but has no class: nobody's positive, while the momentum terms stand."""


def in_transform() -> bool:
    """Whether a transform of `torch.func` (grad, jvp, vmap) is at work; those inside `torch.compile` are its own."""
    return torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether `torch.compile` or a transform of `torch.func` stands between this call and the numbers.

    Both deal in tensors without values, and neither sees into an `autograd.Function`.
    """
    return torch.compiler.is_compiling() or in_transform()


def has_numbers(tensor: Tensor) -> bool:
    """Whether it has numbers; tensors of another type may have none, as those that tracing works with."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and not is_traced()


def may_ask(tensor: Tensor) -> bool:
    """Whether values may be looked at: free on the CPU, while an accelerator would have to be waited for."""
    return tensor.is_cpu and has_numbers(tensor)


def bounds(labels: Tensor) -> tuple[float, float]:
    """The smallest and the largest of at least one label. Waits for the device."""
    if labels.numel() <= FEW:
        values = labels.tolist()
        return min(values), max(values)
    low, high = labels.aminmax()
    return low.item(), high.item()


def within(tensor: Tensor, low: float, high: float) -> bool:
    """Whether there are numbers, and all in [low, high], where NaN is not. Waits for the device."""
    if not tensor.numel():
        return False
    if tensor.numel() <= FEW:
        numbers = tensor.flatten().tolist()
        return bool(sum(numbers) == sum(numbers) and low <= min(numbers) and max(numbers) <= high)
    least, most = tensor.aminmax()
    return bool(low <= least.item() and most.item() <= high)


def describe(value: object) -> str:
    """What came, in a few words: shape and dtype of a tensor, else a short `repr` in one line with the type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def wrong_value(name: str, expected: str, got: str) -> NoReturn:
    """Raise the ValueError for an argument of the right type with a wrong shape, range, device or name."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def wrong_type(name: str, expected: str, got: str) -> NoReturn:
    """Raise the TypeError for an argument of a wrong type or dtype."""
    raise TypeError(f"{name}: expected {expected}, got {got}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of a closed set of strings."""
    if not isinstance(value, str) or value not in choices:
        wrong_value(name, "one of " + ", ".join(repr(choice) for choice in choices), describe(value))


def check_bool(name: str, value: object) -> None:
    """A Python bool."""
    if not isinstance(value, bool):
        wrong_type(name, "True or False", describe(value))


def check_int(name: str, value: object, *, minimum: int | None = None) -> None:
    """A Python int (not a bool), at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        wrong_type(name, "an int", describe(value))
    if minimum is not None and value < minimum:
        wrong_value(name, f"an int of at least {minimum}", str(value))


def check_number(name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """A finite Python number in [low, high], or in (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (float, Real)):  # Real alone takes seven times as long
        wrong_type(name, "a number", describe(value))
    number = math.inf if isinstance(value, int) and abs(value) > LARGEST else float(value)
    finite = -math.inf < number < math.inf  # not math.isfinite, which torch.compile cannot trace
    if not finite or number > high or number < low or (open_low and number == low):
        left = "(" if open_low or math.isinf(low) else "["
        right = ")" if math.isinf(high) else "]"
        wrong_value(name, f"a finite number in {left}{low:g}, {high:g}{right}", str(value))


def check_scalar(name: str, value: object, *, low: float, high: float = math.inf) -> None:
    """A number as in :func:`check_number`, or a floating tensor of shape () whose value is not read."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            wrong_type(name, "a floating tensor of shape () or a number", describe(value))
        if value.ndim != 0:
            wrong_value(name, "a tensor of shape () or a number", describe(value))
        return
    check_number(name, value, low=low, high=high)


def check_floating(name: str, value: object, *, shape: Shape | None = None, like: Named | None = None) -> None:
    """A floating tensor, of any shape without `shape`, and on the device of the argument `like`."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        wrong_type(name, "a floating tensor", describe(value))
    if shape is not None:
        check_shape(name, value, shape, like)


def check_labels(name: str, value: object, *, shape: Shape, like: Named | None = None) -> None:
    """An integer (not bool) tensor of `shape`, on the device of the argument `like`."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        wrong_type(name, "an integer tensor", describe(value))
    check_shape(name, value, shape, like)


def check_mask(name: str, value: object, *, shape: Shape, like: Named | None = None) -> None:
    """A bool tensor of `shape`, on the device of the argument `like`."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        wrong_type(name, "a torch.bool tensor", describe(value))
    check_shape(name, value, shape, like)


def check_shape(name: str, value: Tensor, shape: Shape, like: Named | None = None) -> None:
    """Exactly these sizes, and the device of the argument `like`, if there is one."""
    actual = value.shape
    fits = len(actual) == len(shape)
    if fits and actual != shape:
        for axis, size in enumerate(shape):
            fits = fits and (isinstance(size, str) or size == actual[axis])
    if not fits:
        sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        wrong_value(name, f"shape ({sizes})", str(tuple(actual)))
    if like is not None:
        check_device(name, value, like[1].device, like=like[0])


def check_device(name: str, value: Tensor, device: torch.device, *, like: str) -> None:
    """On the same device as the argument called `like`."""
    if value.device != device:
        wrong_value(name, f"device {device} as {like}", str(value.device))


def check_module(name: str, value: object) -> None:
    """A module."""
    if not isinstance(value, nn.Module):
        wrong_type(name, "a torch.nn.Module", describe(value))


def check_device_name(device: object) -> None:
    """None, a torch.device or a string that names one."""
    if device is None or isinstance(device, torch.device):
        return
    if not isinstance(device, str):
        wrong_type("device", "a torch.device, its name or None", describe(device))
    try:
        torch.device(device)
    except RuntimeError:
        wrong_value("device", "the name of a torch device", repr(device))


def check_names(name: str, value: Collection[Any], expected: Collection[str]) -> None:
    """A mapping with exactly these keys."""
    if set(value) != set(expected):
        wrong_value(name, f"exactly the names {sorted(expected)}", f"{sorted(value, key=str)}")


def check_validate(value: object) -> None:
    """A Python bool, and not True where there are no values to look at."""
    check_bool("validate", value)
    if value and in_transform():
        wrong_value("validate", "False inside a transform of torch.func, which hides values", "True")


def check_classes(
    name: str, labels: Tensor, *, absent: int, classes: float = math.inf, keep: Tensor | None = None, validate: bool
) -> tuple[float, float] | None:
    """Each label, int64, is a class in [0, classes), `absent` or -2, in the rows that `keep` (bool, (N,)) keeps.

    Looks where that is free, or to `validate`; returns the smallest and the largest label where it does.
    """
    if not labels.numel() or not (validate or may_ask(labels)):
        return None
    low, high = bounds(labels)
    if high < classes and (low >= 0 or (low >= UNLABELLED and absent == -1)):
        return low, high
    wrong = ((labels < 0) | (labels >= classes)) & (labels != absent) & (labels != UNLABELLED)
    rows = (wrong if keep is None else wrong & keep).nonzero().flatten().tolist()
    if not rows:
        return low, high
    label, allowed = int(labels[rows[0]]), "of at least 0" if math.isinf(classes) else f"below {classes:g}"
    others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    hint = (
        f"; torch's ignore_index is {absent} here: labels.masked_fill(labels == -100, {absent}), "
        f"or {UNLABELLED} for what is there and has no class"
    )
    wrong_value(
        name,
        f"classes {allowed}, {absent} (absent) or {UNLABELLED} (unlabelled)",
        f"{label} in row {rows[0]}{others}{hint if label == -100 else ''}",
    )


def check_finite(name: str, value: Tensor, keep: Tensor) -> None:
    """No NaN and no infinity in the rows that `keep` (bool, (N,)) keeps. Reads values: `validate=True` only."""
    finite = torch.isfinite(value.detach())
    if finite.ndim > 1:
        finite = finite.flatten(1).all(dim=1)
    finite = finite | ~keep
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        wrong_value(name, "finite values", f"NaN or infinity in {len(rows)} rows, first {rows[0]}")


def check_logits(name: str, value: Tensor, keep: Tensor) -> None:
    """Not probabilities, (N, C), in every row that `keep` (bool, (N,)) keeps. Reads values: `validate=True` only."""
    rows = value.detach()[keep].float()
    if rows.shape[0] and rows.shape[1] > 1 and bool((rows >= 0).all() & ((rows.sum(dim=1) - 1).abs() < 0.01).all()):
        wrong_value(
            name,
            "logits, whose softmax is taken here",
            "probabilities (at least 0, summing to 1) in every row: pass what came before your softmax, or their "
            "logarithm",
        )
