"""A trained model from its checkpoint, and what it says about a fold.

Widths, scaling and what text is read as come from the checkpoint, never from the data.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mtmd.data.fold import FOLDS, FORMS, DataError, Fold, drop_modalities
from mtmd.data.needs import TextReader, check_encoder, keys_of, lack, text_reader, with_text
from mtmd.data.scaling import Standardizer
from mtmd.model import MTMD
from mtmd.results.scores import Said, score_fold
from mtmd.runs.checkpoint import load_checkpoint
from mtmd.runs.devices import choose_device
from mtmd.settings.config import TEACHER, Config
from mtmd.settings.options import a_path, choice

BATCH_SIZE = 64
CHECKPOINT = "checkpoint_seed*.safetensors of an experiment"


@dataclass(frozen=True)
class Trained:
    """A checkpoint: the model in eval mode and what is needed to feed it."""

    model: MTMD
    standardizer: Standardizer
    config: Config
    widths: dict[str, int]  # of the features in the data it was trained on
    classes: tuple[str, ...]
    data_sha256: str
    device: torch.device

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model has a branch for."""
        return self.model.modalities

    @property
    def reads_tokens(self) -> bool:
        """Whether text comes as tokens for a pretrained encoder; if not, as features."""
        return "text" in self.modalities and self.config.reads_tokens

    @property
    def read_widths(self) -> dict[str, int]:
        """Widths of the features that the model reads."""
        names = [name for name in self.modalities if not (name == "text" and self.reads_tokens)]
        return {name: self.widths[name] for name in names}


def load_trained(path: Path, *, text_encoder: str | None = None, device: str = "cpu") -> Trained:
    """Load a checkpoint.

    Args:
        path: Of its .safetensors or .json file, or without the ending.
        text_encoder: Where the tokenizer of the text encoder lies now, if not where it lay in training.
        device: "cpu", "cuda" or "auto".
    """
    place = choose_device(device)
    if text_encoder is not None:
        check_encoder(Config(text_encoder=text_encoder))
    model, standardizer, about = load_checkpoint(path)
    config = Config.from_values(about["config"], source=str(path))
    if text_encoder is not None:
        if not config.reads_tokens:
            raise ValueError("--text-encoder: expected none, for this checkpoint reads text as features")
        config = dataclasses.replace(config, text_encoder=text_encoder)
    return Trained(
        model=model.to(place).requires_grad_(False),
        standardizer=standardizer,
        config=config,
        widths=about["widths"],
        classes=tuple(about["classes"]),
        data_sha256=about["data_sha256"],
        device=place,
    )


def prepare_fold(fold: Fold, trained: Trained, *, source: str = "data", complete: bool = False) -> Fold:
    """The fold as the model reads it: scaled, tokenised, without what it does not know, missing where there is nothing.

    Args:
        fold: What to read.
        trained: The model.
        source: Begins error messages.
        complete: Whether there must be every modality of the model, as in training.

    Raises:
        ValueError: If features have another width than in training, or the text is in a form the model cannot read.
    """
    there, text = keys_of(fold), TextReader("features")
    asked = [name for name in trained.modalities if complete or any(there.get(form) for form in FORMS[name])]
    if trained.reads_tokens and TEACHER in asked:
        text = text_reader(trained.config, trained.model.branches[TEACHER].encoder)
    fault = lack(asked, dict.fromkeys(there, True), text)
    if fault:
        raise DataError(f"{source}: {fault}")
    features, lengths = {}, {}
    for name, width in trained.read_widths.items():
        if name in fold.features:
            features[name], lengths[name] = fold.features[name], fold.lengths[name]
        else:
            features[name] = np.zeros((len(fold), 1, width), np.float32)
            lengths[name] = np.zeros(len(fold), np.int64)
    if TEACHER in asked:
        fold = with_text(fold, text, trained.config.max_tokens, source)
    else:
        no_tokens = np.zeros((len(fold), 3, 1), np.int64)
        fold = dataclasses.replace(fold, text_bert=no_tokens if trained.reads_tokens else None)
    try:
        return trained.standardizer.apply(dataclasses.replace(fold, features=features, lengths=lengths))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def ask(trained: Trained, fold: Fold) -> Said:
    """What the model says about a prepared fold."""
    return score_fold(trained.model, fold, BATCH_SIZE, trained.device)


def without_modalities(trained: Trained, said: Said, fold: Fold) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """A function of which samples have which modality (n,) that gives the fused scores (n,).

    A missing modality is left out at fusion and changes nothing else, so the branches need not run again.
    """
    if trained.model.fusion is None:  # a single modality: there is what the model says without it, or with it
        (only,) = trained.modalities
        blind = ask(trained, drop_modalities(fold, {only: 1.0}, seed=0)).scores
        return lambda present: np.where(present[only], said.scores, blind)

    @torch.no_grad()
    def fuse(present: Mapping[str, np.ndarray]) -> np.ndarray:
        masks = {name: torch.from_numpy(present[name]).to(trained.device) for name in said.features}
        return trained.model.fusion(said.features, masks).scores.float().cpu().numpy()

    return fuse


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("checkpoint", type=a_path, help=CHECKPOINT)
    model.add_argument(
        "--text-encoder",
        default=None,
        help="name or directory of the text encoder whose tokenizer to use (default: as in training)",
    )
    model.add_argument(
        "--device", default="cpu", **choice("cpu", "cuda", "auto"), help="where to run the model (default: cpu)"
    )


def add_fold_argument(group: argparse._ArgumentGroup, default: str | None, text: str) -> None:
    group.add_argument("--fold", default=default, **choice(*FOLDS), help=text)
