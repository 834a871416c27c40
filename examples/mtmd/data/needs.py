"""What a model needs of its data: every command asks here whether it can read a file, and `check` whether one could.

Audio and vision are a key of a fold each. Text has three forms, of which any one is enough that the encoder can read:

- `text`, features, where `--text-encoder` is `features`;
- `text_bert`, the token ids of uncased BERT, for a BERT-type model with that vocabulary;
- `raw_text`, words, for any BERT-type model: where there are no such ids, or where the model has other ones.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mtmd.data.fold import FORMS, DataError, Fold, one_text
from mtmd.data.text import texts_before, tokenize
from mtmd.model import PretrainedTextEncoder, load_transformers, text_positions
from mtmd.settings.config import MODALITIES, TEACHER, Config

NAMES = {"text": "text (features)", "text_bert": "text_bert (token ids)", "raw_text": "raw_text (words)"}
UNCASED_BERT = {"[CLS]": 101, "[SEP]": 102, "movie": 3185, "##s": 2015, "good": 2204}


class TextReader(NamedTuple):
    """How a model reads text."""

    name: str  # of its encoder, or "features"
    forms: tuple[str, ...] = ("text",)  # the keys that it can read; the first that is there is read
    tokenizer: Any = None
    limits: tuple[int | None, int | None, int | None] = (None, None, None)  # words, segments, positions; None: no limit
    context: int = 0  # how many texts before its own are read with a text


def text_reader(config: Config, encoder: PretrainedTextEncoder | None = None) -> TextReader:
    """How the model of `config` reads text.

    Args:
        config: The settings.
        encoder: The text encoder that will read, if it is there already.

    Raises:
        ValueError: If `config.text_encoder` is no BERT-type model.
    """
    name = config.text_encoder
    if not config.reads_tokens or TEACHER not in config.used:
        return TextReader("features")
    check_encoder(config)
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        settings = AutoConfig.from_pretrained(name).to_dict() if encoder is None else {}
    except (OSError, ValueError) as error:
        raise ValueError(
            "--text-encoder: expected the name or the directory of a BERT-type model, "
            f"got {name}: {str(error).strip().splitlines()[0]}"
        ) from error
    if encoder is None:
        load_transformers()
        with torch.device("meta"):  # what it is made of, without its weights
            encoder = PretrainedTextEncoder(name, settings, max_tokens=config.max_tokens)
    is_uncased_bert = tokenizer.convert_tokens_to_ids(list(UNCASED_BERT)) == list(UNCASED_BERT.values())
    segments = encoder.bert.config.type_vocab_size if encoder.has_segments else None
    limits = (encoder.bert.get_input_embeddings().num_embeddings, segments, text_positions(encoder.bert))
    forms = ("text_bert", "raw_text") if is_uncased_bert and not config.context else ("raw_text",)
    return TextReader(name, forms, tokenizer, limits, config.context)


def check_encoder(config: Config) -> None:
    """Refuse, before any data are read, what looks like the path of a text encoder and is none. A name has one slash.

    Raises:
        ImportError: If transformers, which reads a BERT-type model, is not installed.
        ValueError: If there is no such folder.
    """
    name, path = config.text_encoder, Path(config.text_encoder)
    if not config.reads_tokens or TEACHER not in config.used:
        return
    importlib.import_module("transformers")
    if not path.is_dir() and (path.is_absolute() or len(path.parts) > 2 or name.startswith((".", "~"))):
        raise ValueError(
            f"--text-encoder: expected a BERT-type model's name or directory, got {name}: no such directory"
        )


# Which keys


def keys_of(fold: Fold) -> dict[str, bool]:
    """The keys of a fold that hold a modality, with whether any sample has something there."""
    return {key: bool(rows.any()) for key, rows in fold.filled.items()}


def lack(modalities: Sequence[str], there: Mapping[str, bool], reader: TextReader) -> str:
    """What a model of these modalities lacks in a fold with these keys, in a sentence; empty where it lacks nothing."""
    for name in modalities:
        forms = reader.forms if name == TEACHER else FORMS[name]
        read = next((form for form in forms if form in there), None)
        if read is None:
            by = f", which --text-encoder {reader.name} reads" if name == TEACHER else ""
            found = ", ".join(NAMES.get(key, key) for key in there) or "nothing"
            return f"{name}: expected {' or '.join(NAMES.get(form, form) for form in forms)}{by}; there is: {found}"
        if not there[read]:
            return f"{name}: expected samples that have it, got {read} in which it is missing from each"
    return ""


def advice(modalities: Sequence[str], there: Mapping[str, bool], reader: TextReader) -> str:
    """The options with which a model can be trained where it lacks something; empty where there are none."""
    if there.get("raw_text") and there.get("text_bert", True):
        encoder = "MODEL (a BERT-type one)"
    elif there.get("text_bert"):
        encoder = "MODEL (one with the vocabulary of uncased BERT)"
    else:
        encoder = "features" if there.get("text") else ""
    usable = [name for name in MODALITIES if (encoder if name == TEACHER else there.get(name))]
    names = [name for name in modalities if name in usable] or usable
    options = [] if not names or names == [*modalities] else [f"--modalities {' '.join(names)}"]
    if TEACHER in names and lack([TEACHER], there, reader):
        options.append(f"--text-encoder {encoder}")
    return " ".join(options)


def as_read(folds: dict[str, Fold], config: Config, source: str) -> dict[str, Fold]:
    """The folds with text in the form that the model of `config` reads.

    Raises:
        DataError: If it cannot be trained on them; the message begins with `source`.
        ValueError: If `config.text_encoder` is no BERT-type model.
    """
    modalities, there, reader = config.used, keys_of(folds["train"]), text_reader(config)
    fault = lack(modalities, there, reader)
    if fault:
        options = advice(modalities, there, reader)
        raise DataError(f"{source}: {fault}" + (f"; it can be trained on with {options}" if options else ""))
    if TEACHER not in modalities:
        return folds
    return {name: with_text(fold, reader, config.max_tokens, f"{source}: {name}") for name, fold in folds.items()}


# Tokens


def with_text(fold: Fold, reader: TextReader, max_tokens: int, where: str) -> Fold:
    """The fold with its text as `reader` reads it, of which `lack` finds no lack.

    Raises:
        DataError: If there are tokens that the encoder does not know; the message begins with `where`.
    """
    if reader.tokenizer is None:
        return one_text(fold, tokens=False)
    form = next(form for form in reader.forms if form in fold.filled)
    if form == "text_bert":
        tokens = fold.text_bert
    else:
        before = texts_before(fold, reader.context) if reader.context else None
        tokens = tokenize(fold.raw_text, reader.tokenizer, max_tokens, before=before)
    check_tokens(tokens, reader, f"{where}: {form}")
    return replace(one_text(fold, tokens=True), text_bert=tokens)


def check_tokens(tokens: np.ndarray, reader: TextReader, where: str) -> None:
    """Refuse tokens (n, 3, L) that the encoder has no embedding for."""
    words, segments, positions = reader.limits
    used = np.flatnonzero(tokens[:, 1].any(axis=0))
    longest = int(used[-1]) + 1 if len(used) else 1  # what lies behind is never looked up
    for kind, part, limit in (("token ids", 0, words), ("segment ids", 2, segments)):
        largest = tokens[:, part, :longest].max(axis=1)
        if limit is not None and largest.max() >= limit:
            got = f"{largest.max()} in row {largest.argmax()}"
            raise DataError(f"{where}: expected {kind} below {limit}, which {reader.name} knows, got {got}")
    if positions is not None and longest > positions:
        row = tokens[:, 1, longest - 1].argmax()
        raise DataError(
            f"{where}: expected at most {positions} tokens, as {reader.name} reads, got {longest} in row {row}"
        )
