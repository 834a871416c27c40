"""Random inputs for the losses, and one place for the tolerances."""

import dataclasses
import reprlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from momentum_distill._contrast import autograd

# Relative error against the float64 loops fed with the same, already rounded, inputs.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
DTYPES = list(RTOL)
POSITIVES = ["outside", "inside", "inside_per_positive"]
REDUCTIONS = ["mean", "sum", "none"]

numbers_alone = pytest.mark.filterwarnings(r"ignore:\w+ trains no model:UserWarning")
"""For tests that compare what losses return, for which nothing has to require a gradient."""


def lists(x: Tensor | None) -> list | float | None:
    """A tensor as Python numbers; floats in double precision, None stays None."""
    if x is None:
        return None
    x = x.detach()
    return (x.double() if x.is_floating_point() else x).tolist()


def assert_close(actual: Tensor, expected: object, dtype: torch.dtype = torch.float64) -> None:
    """Relative error within `RTOL[dtype]`; below 0.1 it is absolute, as such values are differences."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).abs()
    bound = RTOL[dtype] * expected.abs().clamp_min(0.1)
    assert (error <= bound).all(), differs(actual, expected, error, bound)


def assert_gradient_close(actual: Tensor, expected: object, dtype: torch.dtype) -> None:
    """Length of the error against length of the gradient, within `RTOL[dtype]`."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    error = (actual.detach().double() - expected).norm()
    bound = RTOL[dtype] * expected.norm().clamp_min(1e-3)
    assert error <= bound, differs(actual, expected, error, bound)


def differs(actual: Tensor, expected: Tensor, error: Tensor, bound: Tensor) -> str:
    """The wrong numbers and the right ones."""
    numbers = {"got": actual.detach(), "expected": expected, "error": error, "bound": bound}
    return ", ".join(f"{name} {reprlib.repr(x.tolist())}" for name, x in numbers.items())


@dataclasses.dataclass
class SupConCase:
    """Arguments of one call of the contrastive loss."""

    query: Tensor
    keys: Tensor | tuple[Tensor, ...]
    query_labels: Tensor
    key_labels: Tensor | tuple[Tensor, ...]
    momentum_query: Tensor | None
    momentum_keys: Tensor | tuple[Tensor, ...] | None

    @property
    def args(self) -> tuple:
        return self.query, self.keys, self.query_labels, self.key_labels

    @property
    def momentum(self) -> dict:
        return {"momentum_query": self.momentum_query, "momentum_keys": self.momentum_keys}

    @property
    def reference(self) -> tuple[tuple, dict]:
        """Positional and momentum arguments as lists."""
        momentum = {name: lists(x) for name, x in self.momentum.items()}
        return tuple(lists(x) for x in self.args), momentum

    def map(self, f) -> "SupConCase":
        """The case with `f` applied to its features."""
        names = ("query", "keys", "momentum_query", "momentum_keys")
        old = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{name: None if x is None else f(x) for name, x in old.items()})

    def split(self, *sizes: int) -> "SupConCase":
        """The case with its keys in parts of these sizes; what is given for them as well."""
        parts = {name: getattr(self, name) for name in ("keys", "key_labels", "momentum_keys")}
        return dataclasses.replace(self, **{name: None if x is None else x.split(sizes) for name, x in parts.items()})

    def requires_grad(self) -> "SupConCase":
        """Fresh leaves: queries and keys with gradient, the momentum side without."""
        case = self.map(lambda x: x.detach().clone())
        case.query.requires_grad_()
        case.keys.requires_grad_()
        return case


def supcon_case(
    seed: int = 0,
    n: int = 6,
    q: int = 10,
    d: int = 4,
    *,
    classes: int = 3,
    ignored: float = 0.0,
    unlabelled: float = 0.0,
    momentum: bool = True,
    dtype: torch.dtype = torch.float64,
) -> SupConCase:
    """Gaussian features and uniform labels, some of them -1 (ignored) or -2 (unlabelled)."""
    generator = torch.Generator().manual_seed(seed)

    def features(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype)

    def labels(rows: int) -> Tensor:
        out = torch.randint(classes, (rows,), generator=generator)
        fate = torch.rand(rows, generator=generator)
        out[fate < ignored + unlabelled] = -2
        out[fate < ignored] = -1
        return out

    query, keys = features(n), features(q)
    momentum_query = query + 0.3 * features(n) if momentum else None
    momentum_keys = keys + 0.3 * features(q) if momentum else None
    return SupConCase(query, keys, labels(n), labels(q), momentum_query, momentum_keys)


def without_asking(patch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: nobody looks at the values of a tensor."""
    for name, module in list(sys.modules.items()):
        if name.startswith("momentum_distill") and hasattr(module, "may_ask"):
            patch.setattr(module, "may_ask", lambda _: False)


def by_autograd(patch: pytest.MonkeyPatch) -> None:
    """Plain autograd through the N×Q matrices, as the transforms of `torch.func` have it."""
    patch.setattr(autograd, "in_transform", lambda: True)


def logits_case(
    seed: int = 0, n: int = 6, classes: int = 3, dtype: torch.dtype = torch.float64, count: int = 3
) -> Iterator[Tensor]:
    """`count` tensors of logits, shape (n, classes), or of scores, shape (n,), with `classes=0`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, classes) if classes else (n,)
    return ((2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(count))


def bits(x: Tensor) -> bytes:
    """The memory of a tensor, so that NaN, -0.0 and the last digit count."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = {t.untyped_storage().data_ptr(): t for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for pointer, tensor in made.items():
            if pointer not in given:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out
