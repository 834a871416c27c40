"""The MTMD model: one branch per modality, and their fusion (Section III-C and III-F; Eq. 1-4, 12, 13)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import momentum_distill as md
from mtmd.config import Config
from mtmd.data import Batch

CLASSES = 3  # negative, neutral, positive
MODALITIES = ("text", "audio", "vision")
TEACHER = "text"
STUDENTS = ("audio", "vision")


class Prediction(NamedTuple):
    """What a branch, or the fusion, says about a batch."""

    features: Tensor  # F, (N, d)
    scores: Tensor  # ŷ, (N,)
    logits: Tensor  # p̂, (N, 3)


class Outputs(NamedTuple):
    """What the model says about a batch."""

    unimodal: dict[str, Prediction]
    fused: Prediction


class SequenceEncoder(nn.Module):
    """An LSTM and a Transformer over time; the first step represents the whole (Eq. 2)."""

    def __init__(self, width: int, hidden: int, *, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        layer = nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.width = hidden

    def forward(self, steps: Tensor, lengths: Tensor) -> Tensor:
        """(N, T, width) and (N,) to (N, hidden). A missing sample (length 0) counts as one step of padding."""
        hidden, _ = self.lstm(steps)  # one direction, so padding at the end reaches no step before it
        padding = torch.arange(steps.shape[1], device=steps.device) >= lengths.clamp(min=1)[:, None]
        return self.transformer(hidden, src_key_padding_mask=padding)[:, 0]


class PretrainedTextEncoder(nn.Module):
    """A BERT-type model; the state of its [CLS] token represents the text (Eq. 1)."""

    def __init__(self, name_or_directory: str, config: dict[str, Any] | None = None) -> None:
        """Load a pretrained model; with `config`, build one like it whose weights a checkpoint will fill."""
        super().__init__()
        from transformers import AutoConfig, AutoModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would fall into the one of the training
        if config is None:
            self.bert = AutoModel.from_pretrained(name_or_directory)
        else:
            self.bert = AutoModel.from_config(AutoConfig.for_model(**config))
        if getattr(self.bert, "pooler", None) is not None:
            self.bert.pooler = None  # works on [CLS] alone and is not used here
        self.width = self.bert.config.hidden_size
        self.has_segments = getattr(self.bert.config, "type_vocab_size", 0) > 1

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, 3, L) of ids, attention mask and segment ids to (N, hidden)."""
        ids, attention, segments = tokens.unbind(dim=1)
        extra = {"token_type_ids": segments} if self.has_segments else {}
        return self.bert(input_ids=ids, attention_mask=attention, **extra).last_hidden_state[:, 0]


class Heads(nn.Module):
    """A regression and a three-class head (Eq. 4)."""

    def __init__(self, width: int, *, relu: bool) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.classes = nn.Linear(width, CLASSES)
        self.end = nn.ReLU() if relu else nn.Identity()

    def forward(self, features: Tensor) -> Prediction:
        return Prediction(features, self.end(self.score(features))[:, 0], self.end(self.classes(features)))


class Branch(nn.Module):
    """One modality: encoder, projection to the common width (Eq. 3), heads."""

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(nn.Linear(encoder.width, config.width), nn.ReLU())
        self.heads = Heads(config.width, relu=config.relu_heads)

    def features(self, *inputs: Tensor) -> Tensor:
        """The representation F_u, (N, d)."""
        return self.projection(self.encoder(*inputs))

    def forward(self, *inputs: Tensor) -> Prediction:
        return self.heads(self.features(*inputs))


class Fusion(nn.Module):
    """Weighted concatenation, Linear + ReLU, heads (Eq. 12, 13)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.factors = md.MomentumFusionFactors(MODALITIES, init=1.0, decay=config.decay)
        width = len(MODALITIES) * config.width
        self.mix = nn.Sequential(nn.Linear(width, config.fused_width), nn.ReLU(), nn.Dropout(config.dropout))
        self.heads = Heads(config.fused_width, relu=config.relu_heads)

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Prediction:
        # A missing modality is zeros: it adds nothing, whatever its branch made of the padding.
        kept = {name: torch.where(present[name][:, None], features[name], 0.0) for name in MODALITIES}
        return self.heads(self.mix(torch.cat(list(self.factors(kept).values()), dim=1)))


class MTMD(nn.Module):
    """The online model. Inference is this and nothing else: what distillation adds lives in the objective."""

    def __init__(self, config: Config, widths: dict[str, int], *, encoder_config: dict[str, Any] | None = None) -> None:
        super().__init__()

        def sequence_encoder(name: str, hidden: int) -> SequenceEncoder:
            return SequenceEncoder(
                widths[name], hidden, layers=config.layers, heads=config.heads, dropout=config.dropout
            )

        self.reads_tokens = config.text_encoder != "features"
        text = PretrainedTextEncoder(config.text_encoder, encoder_config) if self.reads_tokens else None
        self.branches = nn.ModuleDict(
            {
                "text": Branch(text or sequence_encoder("text", config.text_hidden), config),
                "audio": Branch(sequence_encoder("audio", config.audio_hidden), config),
                "vision": Branch(sequence_encoder("vision", config.vision_hidden), config),
            }
        )
        self.fusion = Fusion(config)

    def inputs(self, batch: Batch, name: str) -> tuple[Tensor, ...]:
        """What the branch of this modality reads."""
        if name == "text" and self.reads_tokens:
            return (batch.tokens,)
        return batch.features[name], batch.lengths[name]

    def forward(self, batch: Batch) -> Outputs:
        """All predictions, for training."""
        unimodal = {name: self.branches[name](*self.inputs(batch, name)) for name in MODALITIES}
        features = {name: prediction.features for name, prediction in unimodal.items()}
        return Outputs(unimodal, self.fusion(features, batch.present))

    def predict(self, batch: Batch) -> Prediction:
        """The fused prediction alone, for inference."""
        features = {name: self.branches[name].features(*self.inputs(batch, name)) for name in MODALITIES}
        return self.fusion(features, batch.present)

    def encoder_config(self) -> dict[str, Any] | None:
        """The configuration of the pretrained text encoder, for checkpoints."""
        return self.branches[TEACHER].encoder.bert.config.to_dict() if self.reads_tokens else None

    def parameter_groups(self, config: Config) -> list[dict]:
        """The three learning rates of Section V-B."""
        pretrained = list(self.branches["text"].encoder.parameters()) if self.reads_tokens else []
        unimodal = [parameter for name in STUDENTS for parameter in self.branches[name].parameters()]
        special = {id(parameter) for parameter in pretrained + unimodal}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in special]
        groups = [(pretrained, config.bert_lr), (unimodal, config.unimodal_lr), (rest, config.other_lr)]
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]
