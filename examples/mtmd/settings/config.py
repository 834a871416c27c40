"""Every setting of a run, in one place: name, default, unit or reason. Options and TOML files are made from this."""

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mtmd.files.checks import did_you_mean, is_number, is_text, shown, unknown

# Each has its settings below, NAME_hidden and drop_NAME; a fold of data has its features at the key NAME.
MODALITIES = ("text", "audio", "vision")
TEACHER = "text"
STUDENTS = tuple(name for name in MODALITIES if name != TEACHER)

# What `without` can switch off, the rows of the paper's Table II, and all of them at once.
PARTS = {
    "reg": "scores that follow the text's",
    "cls": "classes that follow the text's",
    "feat": "the contrastive loss",
    "queue": "its queue",
    "momentum_dmd": "momentum models of audio and vision",
    "fusion_factors": "weights of the modalities in the fusion",
    "hard_attention": "more weight for hard samples in L_fusion",
    "fusion": "L_fusion, by which branches follow the fused prediction",
    "momentum_mfd": "the moving average of the weights of the modalities",
    **{f"{name}_task": f"the {name} branch" for name in MODALITIES},
    "distillation": "everything but the ground truth",
}
TERMS = ("reg", "cls", "feat", "fusion")  # of the loss beside the ground truth; each has its weight gamma_NAME

# Settings that say where and how far, not what: runs that differ in them alone are the same experiment.
NOT_IDENTITY = ("out", "format", "seeds", "resume", "device", "save_every")
FORMATS = ("svg", "pdf", "png")


SYNTHETIC = ("signal_text", "signal_audio", "signal_vision", "wrong_text")  # shares of the synthetic set

# Numbers that are no counts, with what they have to be. NaN is in no range.
RANGES = (
    ((*SYNTHETIC, *(f"drop_{name}" for name in MODALITIES)), "a share in [0, 1]", lambda value: 0 <= value <= 1),
    (("alpha", "decay"), "a finite number in [0, 1]", lambda value: 0 <= value <= 1),
    (("layer_decay",), "a finite number above 0, at most 1", lambda value: 0 < value <= 1),
    (("dropout", "average"), "a share in [0, 1)", lambda value: 0 <= value < 1),
    (("unimodal_lr", "other_lr", "score_width"), "a finite number above 0", lambda value: 0 < value < math.inf),
    (
        ("bert_lr", "clip", "gamma_reg", "gamma_cls", "gamma_feat", "gamma_fusion", "hardness"),
        "a finite number of at least 0",
        lambda value: 0 <= value < math.inf,
    ),
    # Where the learned temperature of momentum_distill.SupConDistillLoss may go.
    (("temperature",), "a number in [0.01, 10]", lambda value: 0.01 <= value <= 10),
)


def setting(
    default: Any, text: str, *, choices: tuple[str, ...] = (), many: bool = False, group: str | None = None
) -> Any:
    """A field with the text that `--help` shows; `group` begins a group of them there, or goes on with one."""
    metadata = {"help": text, "choices": choices, "many": many, "group": group}
    if many:
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Settings; "paper" marks those of Lin and Hu (2023), Section V-B."""

    data: Path | None = setting(
        None,
        "pickle in the layout of MMSA (aligned or unaligned) or folder in the own format; none: the synthetic set",
        group="data",
    )
    dataset: str | None = setting(
        None,
        "sets the defaults of --epochs, --batch-size and --queue-size; default: mosi with --data, synthetic without",
        choices=("mosi", "mosei", "sims", "other", "synthetic"),
    )
    synthetic_seed: int = setting(0, "seed of the synthetic set", group="synthetic set")
    signal_text: float = setting(0.8, "share of the opinion's variance that text can explain")
    signal_audio: float = setting(0.45, "share of the opinion's variance that audio can explain")
    signal_vision: float = setting(0.35, "share of the opinion's variance that vision can explain")
    wrong_text: float = setting(0.0, "share of samples whose text says nothing true (a wrong teacher)")
    max_tokens: int = setting(
        50, "longest text, in tokens, where raw text is tokenised here; MMSA's files: 50", group="data"
    )
    context: int = setting(0, "how many texts of the same video, before its own, the text encoder reads with a text")
    drop_text: float = setting(0.0, "share of the training samples that lose their text, drawn anew each epoch")
    drop_audio: float = setting(0.0, "share of the training samples that lose their audio, drawn anew each epoch")
    drop_vision: float = setting(0.0, "share of the training samples that lose their vision, drawn anew each epoch")

    text_encoder: str = setting(
        "features",
        "'features' (the file's 'text' array), or a BERT-type model of transformers, by name or local directory",
        group="model (Section III)",
    )
    modalities: list[str] = setting(
        MODALITIES, "modalities of the model; 'text' alone is the text-only baseline", choices=MODALITIES, many=True
    )
    pooling: str = setting(
        "mean",
        "what represents a text of a BERT-type model: the mean of its tokens or the first of them (paper)",
        choices=("cls", "mean"),
    )
    width: int = setting(128, "common width d of the unimodal representations (paper: does not say)")
    fused_width: int = setting(128, "width d_f of the fused representation (paper: does not say)")
    audio_hidden: int = setting(32, "width of the audio LSTM and Transformer (paper)")
    vision_hidden: int = setting(64, "width of the vision LSTM and Transformer (paper)")
    text_hidden: int = setting(64, "width of the text LSTM and Transformer, for --text-encoder features")
    layers: int = setting(3, "Transformer layers (paper)")
    heads: int = setting(4, "attention heads (paper)")
    dropout: float = setting(0.1, "dropout rate (paper)")
    fusion_start: str = setting(
        "random",
        "weights with which the fusion begins: random ones, or 'text': it says what the text branch says",
        choices=("random", "text"),
    )
    relu_heads: bool = setting(
        False, "end the heads in a ReLU as Eq. 4 prints: no negative score can then be predicted"
    )

    gamma_reg: float = setting(
        0.8,
        "weight of L_reg in Eq. 18, by which scores follow those of the text; paper: searched in 0.6, 0.8, 1.0",
        group="distillation (Eq. 6 to 18)",
    )
    gamma_cls: float = setting(0.8, "weight of L_cls, by which classes follow those of the text; paper: as gamma_reg")
    gamma_feat: float = setting(0.8, "weight of L_feat, the contrastive loss; paper: as gamma_reg")
    gamma_fusion: float = setting(
        0.8,
        "weight of L_fusion, by which branches follow the fused prediction, most on hard samples; paper: as gamma_reg",
    )
    alpha: float = setting(0.4, "weight of the momentum targets, 0 to 1; paper: searched in 0.2 to 0.6")
    temperature: float = setting(0.5, "first value of the learned temperature; paper: searched in 0.1 to 0.9")
    decay: float = setting(0.995, "share the momentum models and fusion factors keep at a step (paper)")
    queue_size: int | None = setting(None, "samples in the queue; default: 1024, for mosei 8192 (paper)")
    detach_text: bool = setting(
        False, "L_feat moves audio and vision alone, not the text that teaches them (paper: does not say)"
    )
    balanced_queue: bool = setting(False, "give each class its own share of the queue")
    positives: str = setting(
        "outside",
        "how Eq. 8 and 9 are read, see docs/paper_map.md",
        choices=("outside", "inside", "inside_per_positive"),
    )
    sampling: str = setting(
        "class",
        "positives of the contrast: samples of the same class (paper), the same sample alone (Table III), or every "
        "sample, weighed by the distance of the scores",
        choices=("class", "instance", "distance"),
    )
    score_width: float = setting(
        1.0, "with --sampling distance: standard deviation of the Gaussian; scores so far apart weigh 0.61"
    )
    hardness: float = setting(0.0, "how much more the negatives of the contrast weigh that are similar; 0: no more")
    without: list[str] = setting(
        (),
        f"parts to switch off: {', '.join(f'{name} ({what})' for name, what in PARTS.items())}",
        choices=tuple(PARTS),
        many=True,
    )

    seeds: list[int] = setting(
        [1111], "one run per seed; the paper reports the mean of five runs", many=True, group="training"
    )
    device: str = setting("auto", "where to train; auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    epochs: int | None = setting(
        None, "most epochs, over which the schedule runs; default: 12 with --data, 30 for synthetic"
    )
    patience: int = setting(8, "epochs without a better validation MAE before a run stops; MMSA: 8")
    batch_size: int | None = setting(
        None, "samples per step; default: 64 for mosi and synthetic, 128 for mosei (paper)"
    )
    bert_lr: float = setting(
        1e-4,
        "Adam learning rate of a pretrained text encoder, 0: frozen; the default is best on validation with MiniLM "
        "(paper, BERT-base: 5e-5)",
        group="learning rates",
    )
    layer_decay: float = setting(
        1.0, "learning rate of a layer of a pretrained text encoder, as a share of that of the layer above"
    )
    unimodal_lr: float = setting(5e-3, "Adam learning rate of the audio and vision models (paper)")
    other_lr: float = setting(1e-3, "Adam learning rate of everything else (paper)")
    schedule: str = setting(
        "cosine",
        "learning rates: 'cosine' (linear warm-up over a tenth of the steps, then to zero) or 'constant' (paper)",
        choices=("cosine", "constant"),
    )
    clip: float = setting(1.0, "largest gradient norm, 0 for no limit (paper: does not say)", group="training")
    accumulate: int = setting(1, "batches whose gradients are averaged for one optimiser step")
    average: float = setting(
        0.0, "share that a moving average of the model keeps at a step; it is what is validated and kept; 0: none"
    )
    amp: bool = setting(
        False,
        "train in bfloat16 where that is safe (autocast); evaluation stays in float32, and so does training on a device"
        " that cannot, with a note",
        group="speed and precision",
    )
    compile: bool = setting(False, "compile the model with torch.compile; needs a C++ compiler, or Triton on CUDA")
    deterministic: bool = setting(False, "only operations that give the same bits each time; slower on CUDA")

    out: Path = setting(
        Path("runs/mtmd"), "folder for results, metrics, predictions, figures and checkpoints", group="output"
    )
    format: str = setting("svg", "of the figures: svg for a page, pdf for a paper", choices=FORMATS)
    resume: bool | None = setting(
        None,
        "go on with what --out holds: finished seeds are kept, an interrupted one goes on where it was saved; "
        "--no-resume deletes it and begins anew. Without either, ablate and search go on, and training refuses a "
        "folder that holds an experiment",
    )
    save_every: int = setting(0, "optimiser steps between saves for --resume; 0: at the end of each epoch only")

    def __post_init__(self) -> None:
        """Fill in what depends on the dataset, and refuse what cannot be meant."""
        self.dataset = self.dataset or ("synthetic" if self.data is None else "mosi")
        if self.data is None and self.dataset != "synthetic":
            raise ValueError(f"data: expected a file for dataset {shown(self.dataset)}, got none")
        if self.data is not None and self.dataset == "synthetic":
            raise ValueError(f"data: expected none for the synthetic set, got {self.data}")
        large, small = self.dataset == "mosei", self.dataset == "synthetic"
        self.epochs = (30 if small else 12) if self.epochs is None else self.epochs
        self.batch_size = (128 if large else 64) if self.batch_size is None else self.batch_size
        self.queue_size = (8192 if large else 1024) if self.queue_size is None else self.queue_size
        for name in (
            *("epochs", "patience", "batch_size", "accumulate", "queue_size", "max_tokens"),
            *("width", "fused_width", *(f"{name}_hidden" for name in MODALITIES), "layers", "heads"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("save_every", "synthetic_seed", "context"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for names, expected, fits in RANGES:
            for name in names:
                if not fits(getattr(self, name)):
                    raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")
        for entry in dataclasses.fields(self):
            value, allowed = getattr(self, entry.name), entry.metadata["choices"]
            for one in value if entry.metadata["many"] else [value]:
                if allowed and one not in allowed:
                    raise ValueError(f"{entry.name}: {unknown(one, allowed)}")
            if entry.metadata["many"] and len(set(value)) < len(value):
                raise ValueError(f"{entry.name}: expected each once, got {' '.join(map(str, value))[:80]}")
        if not self.seeds or min(self.seeds) < 0:
            got = shown(self.seeds) if self.seeds else "none"
            raise ValueError(f"seeds: expected at least one, none below 0, got {got}")
        if not self.modalities:
            raise ValueError("modalities: expected at least one, got none")
        # One order, so that what means the same is the same: to a checkpoint, and to --resume.
        self.modalities = [name for name in MODALITIES if name in self.modalities]
        self.without = [name for name in PARTS if name in self.without]
        if not self.used:
            raise ValueError(
                f"modalities: expected at least one that is left, got {' '.join(self.modalities)} "
                f"without {' '.join(self.without)}"
            )
        for name in self.used:
            hidden = getattr(self, f"{name}_hidden")
            if (name != "text" or not self.reads_tokens) and hidden % self.heads:
                raise ValueError(f"{name}_hidden: expected a multiple of heads ({self.heads}), got {hidden}")
        if self.fusion_start == "text" and self.fused_width != self.width:
            raise ValueError(
                f"fused_width: expected width ({self.width}) with fusion_start 'text', got {self.fused_width}"
            )
        if self.sampling == "distance" and self.positives == "inside_per_positive":
            raise ValueError(
                "positives: expected 'outside' or 'inside' with sampling 'distance', which counts no positives, got "
                "'inside_per_positive'"
            )
        if self.balanced_queue and self.sampling == "instance":
            raise ValueError(
                "balanced_queue: expected sampling 'class', for it shares the queue among the classes, got 'instance'"
            )

    @property
    def reads_tokens(self) -> bool:
        """Whether text is read as tokens by a BERT-type model; if not, as features, by an encoder of model.py."""
        return self.text_encoder.partition(":")[0] != "features"

    @property
    def used(self) -> tuple[str, ...]:
        """The modalities of the model, in a fixed order: `modalities` less the subtasks of `without` (Table II).

        The paper's row without the text subtask (MAE 1.42) is that of a model that sees no text: a subtask goes with
        its branch.
        """
        return tuple(name for name in self.modalities if f"{name}_task" not in self.without)

    @property
    def off(self) -> set[str]:
        """The parts that are not there: those of `without`, and those that have nothing to work on beside it.

        A term needs its teacher and at least one student: a model of text alone minimises its ground-truth loss.
        """
        off = set(self.without)
        if len(self.used) < 2:
            off |= {"distillation", "fusion_factors"}
        if TEACHER not in self.used:
            off |= {"reg", "cls", "feat"}
        if "distillation" in off:
            off |= set(TERMS)
        for part, users in {
            "queue": {"feat"},
            "momentum_dmd": {"reg", "cls", "feat"},
            "hard_attention": {"fusion"},
            "momentum_mfd": {"fusion_factors"},
            "distillation": set(TERMS),
        }.items():
            if users <= off:
                off.add(part)
        return off

    def as_json(self) -> dict[str, Any]:
        """All settings as JSON values, for results and checkpoints."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def identity(self) -> dict[str, Any]:
        """What must agree before results are reused or a run goes on: all but `NOT_IDENTITY`."""
        return {name: value for name, value in self.as_json().items() if name not in NOT_IDENTITY}

    @classmethod
    def from_values(cls, values: Mapping[str, Any], *, source: str) -> "Config":
        """Settings by name, as TOML and :meth:`as_json` hold them; those that are not named keep their defaults.

        Raises:
            ValueError: If a name is unknown, or a value of the wrong kind or out of range; the message begins with
                `source`.
        """
        hints = get_type_hints(cls)
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: expected settings by name, got {shown(values)}")
        for name in values:
            if name not in hints:
                raise ValueError(f"{source}: unknown setting {shown(name)}{did_you_mean([name], hints)}")
        typed = {name: _typed(value, hints[name], f"{source}: {name}") for name, value in values.items()}
        try:
            return cls(**typed)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as the field's type, where nothing is lost by it."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {shown(value)}")
        return [_typed(one, get_args(hint)[0], where) for one in value]
    if isinstance(hint, types.UnionType):  # T | None
        if value is None:
            return None
        hint = get_args(hint)[0]
    if hint is Path and isinstance(value, Path):
        return value
    if hint in (Path, str) and is_text(value) and "\0" not in value:
        return hint(value)
    if hint is float and (isinstance(value, float) or is_number(value)):  # NaN is out of every range
        return float(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and type(value) is int and abs(value) < 2**63:
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, "text")
    raise ValueError(f"{where}: expected {kind}, got {shown(value)}")
