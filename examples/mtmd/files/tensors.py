"""Tensors as safetensors, which nothing in them can run, beside a JSON file that knows their SHA-256."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtmd.files.checks import reason
from mtmd.files.writing import file_sha256

DTYPES = {  # what safetensors calls them, in the order in which it lays them: each tensor starts aligned
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pair(path: Path) -> tuple[Path, Path]:
    """The safetensors and the JSON file of one name, given with either ending or none."""
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(name + ".safetensors"), path.with_name(name + ".json")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write the bytes that safetensors would; their SHA-256.

    Its `save_file` writes to yet another file, whose random name nobody could sweep after a kill and which its owner
    alone may read; its `save` takes twice the memory of the tensors.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(content: bytes | np.ndarray) -> None:
            digest.update(content)
            file.write(content)

        write(len(text).to_bytes(8, "little"))
        write(text)
        for name in names:
            write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    if file_sha256(path) != sha256:
        known = f"its SHA-256 is not that in {pair(path)[1].name}"
        raise ValueError(f"{path}: expected the file that was written, got one cut short or changed ({known})")
    try:
        return load_file(path)
    except (OSError, MemoryError):  # no fault of the file, which must not be taken for damaged
        raise
    except Exception as error:  # a type that torch does not have, say
        raise ValueError(
            f"{path}: expected a safetensors file, got one that cannot be read: {reason(error)}"
        ) from error


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
