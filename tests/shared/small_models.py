"""Small models for the tests of averages, and what fills and reads their parameters."""

import pytest
import torch
from torch import nn

FLOAT_DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, id="float16"),
]


class Normed(nn.Module):
    """Parameters, floating buffers and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.lin(x)))


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def flat(module):
    """All parameters of a module as one float64 vector (a copy)."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


@torch.no_grad()
def redraw(module, generator, centre=0.3):
    """New parameter values of the same order of magnitude, as a training step would leave them."""
    for p in module.parameters():
        p.copy_(centre + torch.rand(p.shape, generator=generator) - 0.5)


@torch.no_grad()
def redraw_all(module, generator):
    """New parameters and floating buffers; integer buffers count on."""
    redraw(module, generator)
    for b in module.buffers():
        if b.is_floating_point():
            b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
        else:
            b.add_(1)


class Branches(nn.Module):
    """Several submodules of one shape: matching by position instead of name goes unnoticed."""

    def __init__(self, names=("first", "last")):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


@torch.no_grad()
def fill(module, value):
    for p in module.parameters():
        p.fill_(value)


@torch.no_grad()
def number_parameters(module):
    """Parameter k is filled with k + 1, so that a mix-up shows."""
    for k, p in enumerate(module.parameters()):
        p.fill_(k + 1.0)


def values(module):
    """One number per parameter."""
    return [p.detach().flatten()[0].item() for p in module.parameters()]


def all_modes(module):
    return {m.training for m in module.modules()}


def known():
    model = Branches()
    model.running = nn.BatchNorm1d(2)
    return model


def float_dtypes(module):
    tensors = [*module.parameters(), *module.buffers()]
    return {t.dtype for t in tensors if t.is_floating_point()}


def pointers(module):
    return [t.data_ptr() for t in [*module.parameters(), *module.buffers()]]
