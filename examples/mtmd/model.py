"""The MTMD model: one branch per modality, and their fusion (Section III-C and III-F; Eq. 1-4, 12, 13).

The method begins at `Heads`; before it stand the encoders of text and of sequences.
"""

import importlib
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import momentum_distill as md
from mtmd.data.batches import Batch
from mtmd.files.checks import unknown
from mtmd.settings.config import STUDENTS, TEACHER, Config

CLASSES = 3  # negative, neutral, positive
ROWS_AT_A_TIME = 8  # texts that the encoder reads together on a CPU


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


def load_transformers() -> None:
    """Import what transformers imports when a model is made: with torch 2.8 that fails under `torch.device("meta")`."""
    importlib.import_module("transformers").GenerationMixin  # noqa: B018  asked for, it is imported


class PretrainedTextEncoder(nn.Module):
    """A BERT-type model; the state of its [CLS] token represents the text (Eq. 1), or the mean over all tokens."""

    def __init__(
        self,
        name_or_directory: str,
        config: dict[str, Any] | None = None,
        *,
        pooling: str = "cls",
        max_tokens: int | None = None,
    ) -> None:
        """Load a pretrained model; with `config`, build one like it whose weights a checkpoint will fill.

        Raises:
            ValueError: If the model has no positions for a text of `max_tokens`.
        """
        super().__init__()
        from transformers import AutoConfig, AutoModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would fall into the one of the training
        if config is None:
            self.bert = AutoModel.from_pretrained(name_or_directory)
        else:
            self.bert = AutoModel.from_config(AutoConfig.for_model(**config))
        self.bert.float()  # a model may be stored in 16 bits, in which Adam's small steps would be lost
        if getattr(self.bert, "pooler", None) is not None:
            self.bert.pooler = None  # works on [CLS] alone and is not used here
        longest = text_positions(self.bert)
        if None not in (max_tokens, longest) and max_tokens > longest:
            raise ValueError(
                f"max_tokens: expected at most {longest}, the positions of {name_or_directory}, got {max_tokens}"
            )
        self.pooling = pooling
        self.width = self.bert.config.hidden_size
        self.has_segments = getattr(self.bert.config, "type_vocab_size", 0) > 1

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, 3, L) of ids, attention mask and segment ids to (N, hidden)."""
        ids, attention, segments = tokens.unbind(dim=1)
        # A missing text attends to one step of padding, for a softmax over nothing is NaN; the fusion leaves it out.
        attention = torch.cat([attention.new_ones(attention.shape[0], 1), attention[:, 1:]], dim=1)
        words = self.bert.get_input_embeddings()(ids)
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return self.encode(words, attention, segments)
        # On a CPU padding costs as much as words. Texts of like lengths go together and lose what all of them lack;
        # on CMU-MOSI, with 50 tokens at most and 12 in the median, a step takes half the time.
        lengths = (attention * torch.arange(1, attention.shape[1] + 1)).amax(dim=1)
        order = lengths.argsort(stable=True)
        encoded = []
        for rows in order.split(ROWS_AT_A_TIME):
            steps = slice(int(lengths[rows[-1]]))
            encoded.append(self.encode(words[rows, steps], attention[rows, steps], segments[rows, steps]))
        return torch.cat(encoded)[order.argsort()]

    def encode(self, words: Tensor, attention: Tensor, segments: Tensor) -> Tensor:
        """(N, L, hidden) of word embeddings, attention mask and segment ids (N, L) to (N, hidden)."""
        extra = {"token_type_ids": segments} if self.has_segments else {}
        states = self.bert(inputs_embeds=words, attention_mask=attention, **extra).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        # Behind its context (segment 0) a text is segment 1, and the mean is over the text alone.
        own = attention * (segments == segments.amax(dim=1, keepdim=True))
        weights = own[:, :, None].to(states.dtype)
        return (weights * states).sum(dim=1) / weights.sum(dim=1)

    def parameter_groups(self, rate: float, decay: float) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters with learning rates: `rate` in the top layer, `decay` of it in the next, embeddings the least."""
        if decay == 1:
            return [(list(self.parameters()), rate)]
        layers: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            found = re.search(r"\blayers?\.(\d+)\.", name)
            layers.setdefault(int(found[1]) if found else -1, []).append(parameter)
        top = max(layers)
        return [(parameters, rate * decay ** (top - layer)) for layer, parameters in sorted(layers.items())]


def text_positions(bert: nn.Module) -> int | None:
    """How many tokens a BERT-type model can tell apart by place; None where it has no table of places."""
    table = getattr(getattr(bert, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None  # relative or rotary positions, which have no end
    # RoBERTa's texts begin behind the place of the padding, so 2 of its 514 rows are not used.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


# Encoders of the text's features, (N, T, width) and lengths (N,) to (N, hidden), by what --text-encoder calls them. A
# name of one more begins with "features:"; names that do not are those of BERT-type models.
FEATURE_ENCODERS = {"features": SequenceEncoder}


def text_encoder(name: str) -> type[nn.Module]:
    """The class of an encoder of text features."""
    if name not in FEATURE_ENCODERS:
        raise ValueError(f"--text-encoder: {unknown(name, FEATURE_ENCODERS)}")
    return FEATURE_ENCODERS[name]


class Heads(nn.Module):
    """A regression and a three-class head (Eq. 4)."""

    def __init__(self, width: int, *, relu: bool) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.classes = nn.Linear(width, CLASSES)
        self.end = nn.ReLU() if relu else nn.Identity()

    def forward(self, features: Tensor) -> Prediction:
        # In 16 bits, scores around 2.5 would stand 0.016 apart.
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(self.score.weight.dtype)
            return Prediction(features, self.end(self.score(wide))[:, 0], self.end(self.classes(wide)))


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

    def __init__(self, config: Config, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.factors = None
        if "fusion_factors" not in config.without:
            decay = 0.0 if "momentum_mfd" in config.without else config.decay  # 0: the learned weights themselves
            self.factors = md.MomentumFusionFactors(modalities, init=1.0, decay=decay)
        width = len(modalities) * config.width
        self.mix = nn.Sequential(nn.Linear(width, config.fused_width), nn.ReLU(), nn.Dropout(config.dropout))
        self.heads = Heads(config.fused_width, relu=config.relu_heads)

    @torch.no_grad()
    def start_from(self, place: int, heads: Heads) -> None:
        """Say what the branch in this place says: its features, which are not negative, pass, and the others do not."""
        linear = self.mix[0]
        linear.weight.zero_(), linear.bias.zero_()
        columns = slice(place * linear.out_features, (place + 1) * linear.out_features)
        linear.weight[:, columns].fill_diagonal_(1.0)
        self.heads.load_state_dict(heads.state_dict())

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Prediction:
        # A missing modality is zeros: it adds nothing, whatever its branch made of the padding.
        kept = {name: torch.where(present[name][:, None], rows, 0.0) for name, rows in features.items()}
        weighted = kept if self.factors is None else self.factors(kept)
        return self.heads(self.mix(torch.cat(list(weighted.values()), dim=1)))


class MTMD(nn.Module):
    """The online model. Inference is this and nothing else: what distillation adds lives in the objective."""

    def __init__(self, config: Config, widths: dict[str, int], *, encoder_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.modalities = config.used
        self.reads_tokens = config.reads_tokens
        self.branches = nn.ModuleDict()
        for name in self.modalities:
            if name == TEACHER and self.reads_tokens:
                encoder = PretrainedTextEncoder(
                    config.text_encoder, encoder_config, pooling=config.pooling, max_tokens=config.max_tokens
                )
            else:
                kind = text_encoder(config.text_encoder) if name == TEACHER else SequenceEncoder
                hidden = getattr(config, f"{name}_hidden")
                encoder = kind(widths[name], hidden, layers=config.layers, heads=config.heads, dropout=config.dropout)
            self.branches[name] = Branch(encoder, config)
        # A single modality is its own prediction.
        self.fusion = Fusion(config, self.modalities) if len(self.modalities) > 1 else None
        if self.fusion is not None and config.fusion_start == "text" and TEACHER in self.modalities:
            self.fusion.start_from(self.modalities.index(TEACHER), self.branches[TEACHER].heads)

    def inputs(self, batch: Batch, name: str) -> tuple[Tensor, ...]:
        """What the branch of this modality reads."""
        if name == "text" and self.reads_tokens:
            return (batch.tokens,)
        return batch.features[name], batch.lengths[name]

    def forward(self, batch: Batch) -> Outputs:
        """All predictions, for training."""
        unimodal = {name: branch(*self.inputs(batch, name)) for name, branch in self.branches.items()}
        if self.fusion is None:
            return Outputs(unimodal, unimodal[self.modalities[0]])
        features = {name: prediction.features for name, prediction in unimodal.items()}
        return Outputs(unimodal, self.fusion(features, batch.present))

    def predict(self, batch: Batch) -> Prediction:
        """The fused prediction alone, for inference."""
        if self.fusion is None:
            return self(batch).fused
        features = {name: branch.features(*self.inputs(batch, name)) for name, branch in self.branches.items()}
        return self.fusion(features, batch.present)

    def encoder_config(self) -> dict[str, Any] | None:
        """The configuration of the pretrained text encoder, for checkpoints."""
        if not self.reads_tokens or TEACHER not in self.modalities:
            return None
        return self.branches[TEACHER].encoder.bert.config.to_dict()

    def parameter_groups(self, config: Config) -> list[dict]:
        """The three learning rates of Section V-B."""
        students = [branch for name, branch in self.branches.items() if name in STUDENTS]
        text = self.branches[TEACHER].encoder if TEACHER in self.modalities and self.reads_tokens else None
        pretrained = [] if text is None else text.parameter_groups(config.bert_lr, config.layer_decay)
        unimodal = [parameter for branch in students for parameter in branch.parameters()]
        groups = [*pretrained, (unimodal, config.unimodal_lr)]
        special = {id(parameter) for parameters, _ in groups for parameter in parameters}
        rest = [parameter for parameter in self.parameters() if id(parameter) not in special]
        groups.append((rest, config.other_lr))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]
