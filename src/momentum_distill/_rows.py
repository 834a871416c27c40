"""Rows of unit length, in a dtype wide enough to sum in; and rows that are left out."""

import torch
from torch import Tensor

from momentum_distill._checks import may_ask, within


def keep_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Zeros in masked rows, before any arithmetic: a NaN there must reach neither the value nor a gradient."""
    return torch.where(mask if values.ndim == 1 else mask[:, None], values, 0.0)


def shortest(raw: Tensor) -> float:
    """Rows in which no magnitude reaches this have no direction: their gradient would leave the range of the dtype."""
    return 1e-3 if raw.dtype == torch.float16 else 1e-6


def normalize_rows(x: Tensor, eps: float) -> Tensor:
    """Rows of any stack of matrices over their lengths, by operations that have derivatives; see `l2_normalize`."""
    if x.shape[-1] == 0:
        return x
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    largest.masked_fill_(largest < eps, torch.inf)  # makes zeros of a row that is too short; NaN stays NaN
    scaled = x / largest
    squares = scaled.square().sum(dim=-1, keepdim=True)  # at least 1, or 0 in a row of zeros
    return scaled * squares.clamp(min=0.5).rsqrt_()


def row_lengths(rows: Tensor, eps: float) -> Tensor:
    """Euclidean lengths (..., 1); infinite for a row in which no magnitude reaches `eps`, so that it becomes zero."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if may_ask(lengths) and are_ordinary(lengths, eps, rows.shape[-1]):
        return lengths
    largest = rows.abs().amax(dim=-1, keepdim=True) if rows.shape[-1] else lengths
    scaled = largest * torch.linalg.vector_norm(rows / torch.where(largest == 0, 1.0, largest), dim=-1, keepdim=True)
    return torch.where(largest < eps, torch.inf, scaled)


def are_ordinary(lengths: Tensor, eps: float, width: int) -> bool:
    """Whether all rows of these lengths have a direction, and their squares did not overflow. Waits for the device."""
    # The largest magnitude is at least the length over the root of the width.
    return width > 0 and within(lengths, eps * width**0.5, 1e15)
