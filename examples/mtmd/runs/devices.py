"""Where to compute, and what can be computed there."""

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mtmd.files.checks import reason
from mtmd.model import SequenceEncoder
from mtmd.runs.processes import everywhere
from mtmd.settings.config import Config


def choose_device(name: str) -> torch.device:
    """Where this process computes; "auto": on CUDA if there is one.

    Raises:
        ValueError: If it has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a device that is there, got cuda without a CUDA device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def precision_of(config: Config, device: torch.device) -> str:
    """What training computes in: bfloat16 where it is asked for and every process can."""
    with deterministic_mode(config.deterministic):  # which cuBLAS has to know before it is used for the first time
        return "bfloat16" if everywhere(config.amp and not no_bfloat16(device)) else "float32"


@functools.cache
def no_bfloat16(device: torch.device) -> str:
    """Why a device cannot train this model in bfloat16, empty if it can: what the model is made of is tried, once.

    oneDNN has no bfloat16 LSTM for a CPU without AVX-512, and an old GPU no bfloat16 at all.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # weights and dropout of a run stay what they are
            encoder, linear = SequenceEncoder(4, 4, layers=1, heads=1, dropout=0.0), nn.Linear(4, 4)
        encoder.to(device), linear.to(device)
        steps, lengths = torch.ones(2, 3, 4, device=device), torch.tensor([3, 1], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = linear(encoder(steps, lengths)).float().sum()
            with torch.no_grad():  # as the momentum models
                encoder.eval()(steps, lengths)
        loss.backward()
        loss.item()  # waits for what a GPU has to say
    except RuntimeError as error:
        return reason(error).partition(". ")[0]
    return ""


def check_compiler(device: torch.device) -> None:
    """Say at once what torch.compile would say in the middle of a traceback."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile: expected a C++ compiler (g++, clang++ or what CXX names), found none")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "--compile: expected the package triton, which compiles for CUDA, found none; "
            'pip install "momentum-distill[triton]" brings it'
        )


@contextmanager
def deterministic_mode(on: bool) -> Iterator[None]:
    """Inside, torch uses operations that give the same bits each time, or says which has none."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]
