"""Trained models as files: tensors in safetensors, all else in JSON beside them; nothing is pickled."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mtmd.data.fold import MODALITIES, DataError, Dataset, data_sha256
from mtmd.data.scaling import Standardizer
from mtmd.files.checks import COUNT, NAME, OBJECT, Rule, check_layout, is_plain, reason, shown
from mtmd.files.reading import read_json
from mtmd.files.tensors import load_tensors, pair, section, write_tensors
from mtmd.files.writing import file_sha256, replacing, write_json
from mtmd.model import MTMD, load_transformers
from mtmd.settings.config import TEACHER, Config

if TYPE_CHECKING:
    from mtmd.train import Run

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
        "data_sha256": data_sha256(dataset.folds, labels=True),  # the same in a pickle and in a folder
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
    config = Config.from_values(about["config"], source=f"{description}: config")
    encoder = about["encoder"]
    try:
        if config.layers > len(state):
            raise ValueError(f"layers is {shown(config.layers)}, with {len(state)} tensors")
        reads_tokens = config.reads_tokens and TEACHER in config.used
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
