"""Every setting of a run, in one place: name, default, unit or reason. The command line is made from this."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints


def setting(default: Any, text: str, *, choices: tuple[str, ...] = (), many: bool = False) -> Any:
    """A field with the text that `--help` shows."""
    metadata = {"help": text, "choices": choices, "many": many}
    if many:
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Settings; "paper" marks those of Lin and Hu (2023), Section V-B."""

    # What to train on
    data: Path | None = setting(None, "pickle in the layout of MMSA (aligned or unaligned); none: the synthetic set")
    dataset: str | None = setting(
        None,
        "sets the defaults of --epochs, --batch-size and --queue-size; default: mosi with --data, synthetic without",
        choices=("mosi", "mosei", "synthetic"),
    )
    text_encoder: str = setting(
        "features",
        "'features' (the file's 'text' array), or a BERT-type model of transformers, by name or local directory",
    )
    max_tokens: int = setting(50, "longest text, in tokens, where raw text is tokenised here; MMSA's files: 50")
    seeds: list[int] = setting([1111], "one run per seed; the paper reports the mean of five runs", many=True)
    device: str = setting("auto", "where to train; auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    out: Path = setting(Path("runs/mtmd"), "folder for results, metrics, predictions, figures and checkpoints")

    # Optimisation
    epochs: int | None = setting(
        None, "most epochs, over which the schedule runs; default: 12 with --data, 30 for synthetic"
    )
    patience: int = setting(8, "epochs without a better validation MAE before a run stops; MMSA: 8")
    batch_size: int | None = setting(
        None, "samples per step; default: 64 for mosi and synthetic, 128 for mosei (paper)"
    )
    bert_lr: float = setting(5e-5, "Adam learning rate of a pretrained text encoder (paper)")
    unimodal_lr: float = setting(5e-3, "Adam learning rate of the audio and vision models (paper)")
    other_lr: float = setting(1e-3, "Adam learning rate of everything else (paper)")
    schedule: str = setting(
        "cosine",
        "learning rates: 'cosine' (linear warm-up over a tenth of the steps, then to zero) or 'constant' (paper)",
        choices=("cosine", "constant"),
    )
    clip: float = setting(1.0, "largest gradient norm, 0 for no limit (paper: does not say)")

    # Model (Section III)
    width: int = setting(128, "common width d of the unimodal representations (paper: does not say)")
    fused_width: int = setting(128, "width d_f of the fused representation (paper: does not say)")
    audio_hidden: int = setting(32, "width of the audio LSTM and Transformer (paper)")
    vision_hidden: int = setting(64, "width of the vision LSTM and Transformer (paper)")
    text_hidden: int = setting(64, "width of the text LSTM and Transformer, for --text-encoder features")
    layers: int = setting(3, "Transformer layers (paper)")
    heads: int = setting(4, "attention heads (paper)")
    dropout: float = setting(0.1, "dropout rate (paper)")
    relu_heads: bool = setting(
        False, "end the heads in a ReLU as Eq. 4 prints: no negative score can then be predicted"
    )

    # Distillation (Eq. 6 to 18)
    gamma_reg: float = setting(0.8, "weight of L_reg in Eq. 18; paper: searched in 0.6, 0.8, 1.0")
    gamma_cls: float = setting(0.8, "weight of L_cls in Eq. 18; paper: searched in 0.6, 0.8, 1.0")
    gamma_feat: float = setting(0.8, "weight of L_feat in Eq. 18; paper: searched in 0.6, 0.8, 1.0")
    gamma_fusion: float = setting(0.8, "weight of L_fusion in Eq. 18; paper: searched in 0.6, 0.8, 1.0")
    alpha: float = setting(0.4, "weight of the momentum targets, 0 to 1; paper: searched in 0.2 to 0.6")
    temperature: float = setting(0.5, "first value of the learned temperature; paper: searched in 0.1 to 0.9")
    decay: float = setting(0.995, "share the momentum models and fusion factors keep at a step (paper)")
    queue_size: int | None = setting(None, "samples in the queue; default: 1024, for mosei 8192 (paper)")
    balanced_queue: bool = setting(False, "give each class its own share of the queue")
    positives: str = setting(
        "outside",
        "how Eq. 8 and 9 are read, see docs/paper_map.md",
        choices=("outside", "inside", "inside_per_positive"),
    )

    def __post_init__(self) -> None:
        """Fill in what depends on the dataset, and refuse what cannot be meant."""
        self.dataset = self.dataset or ("synthetic" if self.data is None else "mosi")
        if self.data is None and self.dataset != "synthetic":
            raise ValueError(f"data: expected a file for dataset {self.dataset!r}, got none")
        if self.data is not None and self.dataset == "synthetic":
            raise ValueError(f"data: expected none for the synthetic set, got {self.data}")
        large, small = self.dataset == "mosei", self.dataset == "synthetic"
        self.epochs = (30 if small else 12) if self.epochs is None else self.epochs
        self.batch_size = (128 if large else 64) if self.batch_size is None else self.batch_size
        self.queue_size = (8192 if large else 1024) if self.queue_size is None else self.queue_size
        for name in ("epochs", "patience", "batch_size", "queue_size", "width", "fused_width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.seeds:
            raise ValueError("seeds: expected at least one, got none")

    def as_json(self) -> dict[str, Any]:
        """All settings as JSON values, for results and checkpoints."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """The inverse of :meth:`as_json`."""
        paths = {name: Path(values[name]) for name in ("data", "out") if values[name] is not None}
        return cls(**{**values, **paths})


def parse_config(arguments: list[str] | None, description: str) -> Config:
    """The configuration that a command line asks for; argparse ends the program on a wrong one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    hints = get_type_hints(Config)
    for entry in dataclasses.fields(Config):
        option = "--" + entry.name.replace("_", "-")
        text = entry.metadata["help"].replace("%", "%%")
        if hints[entry.name] is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=entry.default, help=text)
            continue
        kinds = [kind for kind in (get_args(hints[entry.name]) or (hints[entry.name],)) if kind is not type(None)]
        if entry.metadata["many"]:
            default = entry.default_factory()
            shown = " ".join(str(value) for value in default)
        else:
            default = shown = entry.default
        if default is not None:
            text += f" (default: {shown})"
        parser.add_argument(
            option,
            type=kinds[0],
            default=default,
            help=text,
            choices=entry.metadata["choices"] or None,
            nargs="+" if entry.metadata["many"] else None,
            metavar=None if entry.metadata["choices"] else kinds[0].__name__.upper(),
        )
    try:
        return Config(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
