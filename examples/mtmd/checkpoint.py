"""What is stored so that a kill at any moment leaves it whole: models, and the state of a training to go on from.

A file is written beside its place under another name, synced to disk, then renamed: there is the old one or the new
one, never half of one. The old one stays as well where the disk is full or may not be written to; the error names it. A
link in place of a file is replaced and what it points to left alone; a link in place of a folder is followed.

Tensors lie in safetensors, all else in JSON; nothing is pickled. Each JSON knows the SHA-256 of what belongs to it.
"""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtmd.config import Config
from mtmd.data import MODALITIES, DataError, Dataset, Standardizer
from mtmd.files import COUNT, NAME, OBJECT, Rule, check_layout, is_plain, read_json, reason, shown
from mtmd.model import MTMD, TEACHER, load_transformers, used_modalities

if TYPE_CHECKING:
    from mtmd.training import Run

DESCRIPTION = {  # what is read of the JSON beside a model
    "config": OBJECT,
    "encoder": Rule("an object or null", lambda value: value is None or OBJECT.fits(value)),
    "widths": Rule(
        "a width for some of text, audio, vision",
        lambda value: OBJECT.fits(value) and set(value) <= set(MODALITIES) and all(map(COUNT.fits, value.values())),
    ),
    "classes": Rule(
        "three names", lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_plain, value))
    ),
    "data_sha256": NAME,
    "sha256": NAME,
}
KEPT_STATES = 2  # the newest and, in case it is damaged, the one before
STATE_FORMAT = 2  # since the random state is that of each process
STATE_FILES = f"state_{'[0-9]' * 9}"
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


class OtherFormatError(ValueError):
    """A state that is whole, but written by another version of this code."""


# Writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, to be written to inside the context; it becomes `path` at the end, or never.

    Raises:
        OSError: If the disk refuses, with `path` in it and nothing changed.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        part.unlink(missing_ok=True)  # of a killed writer; and were it a link, its target would be written to
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # what went wrong first is what to tell
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(part)):  # a full disk names no file
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise
    sync_folder(path.parent)


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Whether a file, or a folder of files, can be written at `path`, tried before any work. Nothing is left there.

    Raises:
        OSError: If not, with `path` in it.
    """
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        places = [path, *path.parents] if folder else path.parents
        there = next(place for place in places if os.path.lexists(place))  # the others would be made
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut, where the system lets one: the new file is there in any case."""
    if os.name == "posix":
        with suppress(OSError):
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


def load_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    if sha256 is not None and file_sha256(path) != sha256:
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


# Models


def save_checkpoint(path: Path, run: "Run", config: Config, standardizer: Standardizer, dataset: Dataset) -> None:
    """The model and its feature scaling as safetensors, what is needed to read them as JSON beside.

    Two files cannot be renamed at once. The description goes first and still holds the one that it replaces, for the
    weights that are there until the new ones are.
    """
    weights, description = pair(path)
    tensors = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    tensors |= {f"standardizer.{name}": torch.from_numpy(np.array(v)) for name, v in standardizer.state().items()}
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
    }
    with suppress(FileNotFoundError, ValueError):  # none there, or a damaged one
        about["replaced"] = read_description(weights, description)
    with replacing(weights) as part:
        about["sha256"] = write_tensors(part, tensors)
        write_json(description, about)


def load_checkpoint(path: Path) -> tuple[MTMD, Standardizer, dict[str, Any]]:
    """What :func:`save_checkpoint` wrote: the model in eval mode, the feature scaling, and the JSON beside them.

    Args:
        path: With the ending of either file, or without.

    Raises:
        ValueError: If the files do not hold a checkpoint, or are damaged.
        OSError: If they cannot be read.
    """
    if Path(path).is_dir():
        found = sorted(file.stem for file in Path(path).glob("checkpoint_seed*.safetensors"))
        raise ValueError(f"{path}: expected a checkpoint, got a folder, which has {', '.join(found) or 'none'}")
    weights, description = pair(Path(path))
    missing = [file for file in (weights, description) if not file.exists()]
    if len(missing) == 2:
        raise FileNotFoundError(f"{path}: expected a checkpoint, found no such file")
    if missing:
        raise FileNotFoundError(f"{path}: expected a checkpoint, two files, found none called {missing[0].name}")
    about = read_description(weights, description)
    for key in ("config", "widths", "encoder"):
        if key not in about:
            raise ValueError(f"{description}: expected the description of a checkpoint, got none of its {key!r}")
    check_layout(about, DESCRIPTION, str(description))
    tensors = load_tensors(weights, about["sha256"])
    model = build_model(about, section(tensors, "model."), weights, description)
    scaling = section(tensors, "standardizer.")
    if any(value.dtype != torch.float64 for value in scaling.values()):
        raise ValueError(f"{weights}: standardizer: expected float64 numbers, got others")
    try:
        standardizer = Standardizer.from_state({name: value.numpy() for name, value in scaling.items()})
    except DataError as error:
        raise ValueError(f"{weights}: standardizer: {error}") from error
    if {name: len(mean) for name, mean in standardizer.mean.items()} != about["widths"]:
        raise ValueError(f"{weights}: standardizer: expected the widths that {description.name} gives")
    return model.eval(), standardizer, about


def build_model(about: dict[str, Any], state: dict[str, Tensor], weights: Path, description: Path) -> MTMD:
    """The model that is described, with these weights; they are compared before memory is taken for it."""
    config = Config.from_json(about["config"], source=f"{description}: config")
    encoder = about["encoder"]
    try:
        if config.layers > len(state):
            raise ValueError(f"layers is {shown(config.layers)}, with {len(state)} tensors")
        reads_tokens = config.text_encoder != "features" and TEACHER in used_modalities(config)
        if reads_tokens is (encoder is None):  # transformers would fetch a model by its name
            raise ValueError(f"text_encoder is {shown(config.text_encoder)}, encoder is {shown(encoder)}")
        if encoder is not None:
            load_transformers()
            encoder = known_settings(encoder, state)
        with torch.device("meta"):
            expected = MTMD(config, about["widths"], encoder_config=encoder).state_dict()
    except ModuleNotFoundError:  # transformers
        raise
    except Exception as error:  # whatever torch and transformers raise for a size or a name that is none
        raise ValueError(f"{description}: expected a model that can be built, got another: {reason(error)}") from error
    for name in sorted({*expected, *state}):
        there, here = ((tuple(of[name].shape), of[name].dtype) if name in of else None for of in (expected, state))
        if there != here:
            raise ValueError(
                f"{weights}: expected the weights that {description.name} describes, got others; the first is "
                f"{shown(name)}: {there} is described, {here} is there"
            )
        if state[name].is_floating_point() and not state[name].isfinite().all():
            raise ValueError(f"{weights}: {name}: expected finite weights, got NaN or infinite ones")
    model = MTMD(config, about["widths"], encoder_config=encoder)
    model.load_state_dict(state)
    return model


def known_settings(encoder: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Of the settings of a text encoder those that describe it. Others might make transformers fetch code.

    Raises:
        ValueError: If one is larger than these weights allow: building the model might not end.
    """
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[encoder["model_type"]]().to_dict()
    settings = {name: value for name, value in encoder.items() if name in known}
    weights = sum(value.numel() for value in state.values())
    for name, value in settings.items():
        if isinstance(value, int) and value > (len(state) if "layers" in name else weights):
            raise ValueError(f"{name} is {shown(value)}, with {weights} weights in {len(state)} tensors")
    return settings


def read_description(weights: Path, description: Path) -> dict[str, Any]:
    """What describes the weights that are there: the JSON, or what it replaced if a kill came before its weights."""
    about = read_json(description)
    if not isinstance(about, dict):
        raise ValueError(f"{description}: expected the description of a checkpoint, got {type(about).__name__}")
    replaced = about.pop("replaced", None)
    if isinstance(replaced, dict) and about.get("sha256") != file_sha256(weights) == replaced.get("sha256"):
        return replaced
    return about


# States of a training


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
