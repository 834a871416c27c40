"""States of a training as files: the newest that is whole, and the one before it in case it is damaged."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mtmd.files.checks import shown
from mtmd.files.reading import read_json
from mtmd.files.tensors import load_tensors, pair, write_tensors
from mtmd.files.writing import replacing, sweep, write_text

KEPT_STATES = 2  # the newest and, in case it is damaged, the one before
STATE_FORMAT = 2  # since the random state is that of each process
STATE_FILES = f"state_{'[0-9]' * 9}"


class OtherFormatError(ValueError):
    """A state that is whole, but written by another version of this code."""


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Store a state beside the one before it, and drop those that are older.

    The JSON is written last and makes the state valid: a kill before leaves the one before as the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older = state_descriptions(folder)
    if older:  # A step that ends an epoch is saved twice. What is valid stays until the new one is: another number.
        step = max(step, int(older[-1].stem.removeprefix("state_")) + 1)
    weights, description = pair(folder / f"state_{step:09d}")
    values_sha256 = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    try:
        with replacing(weights) as part:
            tensors_sha256 = write_tensors(part, tensors)
        content = {"format": STATE_FORMAT, "sha256": [tensors_sha256, values_sha256], "values": values}
        write_text(description, json.dumps(content) + "\n")
    except BaseException:
        with suppress(OSError):
            sweep_states(folder)  # tensors without their JSON would fill a disk that is full already
        raise
    for old in older[: 1 - KEPT_STATES]:
        old.unlink()  # before its tensors, so that no JSON is without
    sweep_states(folder)


def state_descriptions(folder: Path) -> list[Path]:
    """The JSON of each state, the newest last."""
    return sorted(folder.glob(f"{STATE_FILES}.json"))


def sweep_states(folder: Path) -> None:
    """Remove what makes no state: temporary files, and tensors without their JSON."""
    sweep(folder)
    for weights in folder.glob(f"{STATE_FILES}.safetensors"):
        if not pair(weights)[1].exists():
            weights.unlink(missing_ok=True)


def load_state(folder: Path, on_note: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest state that is whole, or None; `on_note` is told of those that are not. Sweeps up what has no use.

    Only what is damaged or half gone is deleted. A state of another format, or one that cannot be read now, may be of
    use yet: that is an error.
    """
    if not folder.is_dir():
        return None
    found = None
    descriptions = state_descriptions(folder)
    for description in reversed(descriptions):
        weights = pair(description)[0]
        try:
            found = read_state(weights, description)
        except OtherFormatError:
            raise
        except (ValueError, FileNotFoundError) as error:
            on_note(f"a damaged state is deleted: {error}")
            description.unlink()
            continue
        break
    if found is None and descriptions:
        on_note(f"{folder}: no state is left, the run begins anew")
    sweep_states(folder)
    return found


def read_state(weights: Path, description: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = read_json(description)
    found = content.get("format") if isinstance(content, dict) else None
    if found not in (None, STATE_FORMAT):
        raise OtherFormatError(
            f"{description}: expected a training state of format {STATE_FORMAT}, got {shown(found)}; go on with the "
            "version that wrote it, or choose another --out"
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
    """Delete the states in `folder`, and the folder if nothing else is in it; a link to one stays."""
    if not folder.is_dir():
        return
    for description in state_descriptions(folder):
        description.unlink()
    sweep_states(folder)
    if not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
