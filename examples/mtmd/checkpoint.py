"""What is stored so that a kill at any moment leaves it whole: models, and the state of a training to go on from.

A file is written beside its place under another name, synced to disk, then renamed: there is the old one or the new
one, never half of one. Tensors lie in safetensors, all else in JSON; nothing is pickled. Each JSON knows the SHA-256 of
what belongs to it.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtmd.config import Config
from mtmd.data import Dataset, Standardizer
from mtmd.model import MTMD

if TYPE_CHECKING:
    from mtmd.training import Run

KEPT_STATES = 2  # the newest and, in case it is damaged, the one before
STATE_FORMAT = 1


class OtherFormatError(ValueError):
    """A state that is whole, but written by another version of this code."""


# Writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written to inside the context; it becomes `path` at the end, or never."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut, where the system lets one."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n")


def sweep(folder: Path) -> None:
    """Remove what a killed writer left under temporary names."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite_or_none(value: Any) -> Any:
    """The value for JSON, which has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def pair(path: Path) -> tuple[Path, Path]:
    """The safetensors and the JSON file of one name, given with either ending or none."""
    name = path.name.removesuffix(".safetensors").removesuffix(".json")
    return path.with_name(name + ".safetensors"), path.with_name(name + ".json")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors; the SHA-256 of the file."""
    with replacing(path) as part:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, part)
        return file_sha256(part)


def load_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    if sha256 is not None and file_sha256(path) != sha256:
        raise ValueError(f"{path}: expected the file that was written, got one cut short or changed (SHA-256 differs)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that cannot be read: {error}") from error


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# Models


def save_checkpoint(path: Path, run: "Run", config: Config, standardizer: Standardizer, dataset: Dataset) -> None:
    """The model and its feature scaling as safetensors, what is needed to read them as JSON beside."""
    weights, description = pair(path)
    tensors = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    tensors |= {f"standardizer.{name}": torch.from_numpy(np.array(v)) for name, v in standardizer.state().items()}
    description.unlink(missing_ok=True)  # an older one would not fit the new weights
    digest = save_tensors(weights, tensors)
    about = {
        "config": config.as_json(),
        "seed": run.seed,
        "best_epoch": run.best_epoch,
        "widths": dataset.widths,
        "encoder": run.model.encoder_config(),
        "dataset": dataset.name,
        "classes": list(dataset.classes),
        "synthetic": dataset.synthetic,
        "data_sha256": dataset.fingerprint,
        "valid": run.metrics["valid"],
        "sha256": digest,
    }
    write_json(description, about)


def load_checkpoint(path: Path) -> tuple[MTMD, Standardizer, dict[str, Any]]:
    """What :func:`save_checkpoint` wrote: the model in eval mode, the feature scaling, and the JSON beside them.

    Args:
        path: With the ending of either file, or without.

    Raises:
        ValueError: If the files do not hold a checkpoint, or are damaged.
        OSError: If they cannot be read.
    """
    weights, description = pair(Path(path))
    about = read_json(description)
    for key in ("config", "widths", "encoder"):
        if not isinstance(about, dict) or key not in about:
            raise ValueError(f"{description}: expected the description of a checkpoint, got none of its {key!r}")
    tensors = load_tensors(weights, about.get("sha256"))
    model = MTMD(Config.from_json(about["config"]), about["widths"], encoder_config=about["encoder"])
    try:
        model.load_state_dict(section(tensors, "model."))
    except RuntimeError as error:
        raise ValueError(f"{weights}: expected the weights that {description.name} describes: {error}") from error
    scaling = {name: value.numpy() for name, value in section(tensors, "standardizer.").items()}
    return model.eval(), Standardizer.from_state(scaling), about


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a JSON file, got one that cannot be read: {error}") from error


# States of a training


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Store a state beside the one before it, and drop those that are older.

    The JSON is written last and makes the state valid: a kill before leaves the one before as the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, description = pair(folder / f"state_{step:09d}")
    description.unlink(missing_ok=True)
    digest = save_tensors(weights, tensors)
    text = json.dumps(values)
    content = {"format": STATE_FORMAT, "sha256": [digest, hashlib.sha256(text.encode()).hexdigest()], "values": values}
    write_text(description, json.dumps(content) + "\n")
    for old in sorted(folder.glob("state_*.json"))[:-KEPT_STATES]:
        old.unlink()  # first, so that no JSON is without its tensors
        pair(old)[0].unlink(missing_ok=True)


def load_state(folder: Path, on_note: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state that is whole, or None; `on_note` is told of those that are not. Sweeps up what has no use.

    Only what is damaged or half gone is deleted. A state of another format, or one that cannot be read now, may be of
    use yet: that is an error.
    """
    if not folder.is_dir():
        return None
    sweep(folder)
    found = None
    descriptions = sorted(folder.glob("state_*.json"), reverse=True)
    for description in descriptions:
        weights = pair(description)[0]
        try:
            found = read_state(weights, description)
        except OtherFormatError:
            raise
        except (ValueError, FileNotFoundError) as error:
            on_note(f"a damaged state is deleted: {error}")
            description.unlink()
            weights.unlink(missing_ok=True)
            continue
        break
    if found is None and descriptions:
        on_note(f"{folder}: no state is left, the run begins anew")
    for weights in folder.glob("state_*.safetensors"):
        if not pair(weights)[1].exists():  # killed between the two files
            weights.unlink()
    return found


def read_state(weights: Path, description: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = read_json(description)
    found = content.get("format") if isinstance(content, dict) else None
    if found not in (None, STATE_FORMAT):
        raise OtherFormatError(
            f"{description}: expected a training state of format {STATE_FORMAT}, got {found!r}; go on with the version "
            "that wrote it, or choose another --out"
        )
    try:
        tensors_sha256, values_sha256 = content["sha256"]
        values = content["values"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{description}: expected a training state, got something else") from error
    if hashlib.sha256(json.dumps(values).encode()).hexdigest() != values_sha256:
        raise ValueError(f"{description}: expected the file that was written, got one that was changed")
    return load_tensors(weights, tensors_sha256), values


def remove_states(folder: Path) -> None:
    """Delete the states in `folder`, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for description in folder.glob("state_*.json"):
        description.unlink()
    for weights in folder.glob("state_*.safetensors"):
        weights.unlink()
    sweep(folder)
    if not any(folder.iterdir()):
        folder.rmdir()
