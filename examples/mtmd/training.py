"""One run from a seed: train, choose the epoch on validation MAE, score the test fold once."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtmd.config import Config
from mtmd.data import Dataset, Fold, Standardizer, batches, tokenize
from mtmd.metrics import msa_metrics
from mtmd.model import MTMD, TEACHER
from mtmd.objective import Objective

WARM_UP = 0.1  # share of the steps of a cosine schedule in which the rates rise


@dataclass
class Run:
    """What a seed gave."""

    seed: int
    model: MTMD
    best_epoch: int = 0
    seconds: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)  # one record of metrics.jsonl each
    steps: list[dict[str, float]] = field(default_factory=list)  # the terms of Eq. 18 and the fusion factors
    predictions: dict[str, np.ndarray] = field(default_factory=dict)  # fused scores of valid and test
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # of valid and test


def prepare(dataset: Dataset, config: Config) -> tuple[dict[str, Fold], Standardizer]:
    """The folds as the model reads them: features standardised with training statistics, texts as tokens."""
    standardizer = Standardizer.fit(dataset.folds["train"])
    folds = {name: standardizer.apply(fold) for name, fold in dataset.folds.items()}
    if config.text_encoder != "features":
        folds = with_tokens(folds, config)
    elif TEACHER not in dataset.widths:
        raise ValueError(
            "--text-encoder: expected a BERT-type model (its name or directory), got 'features', but the file "
            "has no 'text' array"
        )
    return folds, standardizer


def with_tokens(folds: dict[str, Fold], config: Config) -> dict[str, Fold]:
    """The folds with token ids for the chosen encoder.

    MMSA's files hold those of uncased BERT. Another vocabulary needs the raw text, tokenised here.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.text_encoder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            "--text-encoder: expected the name or the directory of a BERT-type model, "
            f"got {config.text_encoder}: {reason}"
        ) from error
    words = ["[CLS]", "[SEP]", "movie", "##s", "good"]
    is_uncased_bert = tokenizer.convert_tokens_to_ids(words) == [101, 102, 3185, 2015, 2204]
    tokenised = {}
    for name, fold in folds.items():
        tokens = fold.text_bert
        if tokens is None or not is_uncased_bert:
            if fold.raw_text is None:
                raise ValueError(
                    f"--text-encoder: expected a model with the vocabulary of uncased BERT, got {config.text_encoder}: "
                    f"the {name} fold has 'text_bert' but no 'raw_text' to tokenise"
                )
            tokens = tokenize(fold.raw_text, tokenizer, config.max_tokens)
        features = {key: value for key, value in fold.features.items() if key != TEACHER}
        tokenised[name] = replace(fold, text_bert=tokens, features=features)
    return tokenised


def train(
    config: Config,
    folds: dict[str, Fold],
    widths: dict[str, int],
    seed: int,
    device: torch.device,
    on_step: Callable[[dict[str, float]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Train one model; its weights at the end are those of the epoch with the lowest validation MAE.

    `on_step` gets the terms of Eq. 18 and the fusion factors of each step, `on_epoch` the record of each epoch.
    """
    torch.manual_seed(seed)
    shuffler = torch.Generator().manual_seed(seed)
    model = MTMD(config, widths).to(device)
    objective = Objective(config, model).to(device)

    groups = model.parameter_groups(config)
    groups.append({"params": list(objective.contrast.parameters()), "lr": config.other_lr})  # the temperature
    optimizer = torch.optim.Adam(groups)
    steps_per_epoch = math.ceil(len(folds["train"]) / config.batch_size)
    schedule = make_schedule(optimizer, config, steps_per_epoch * config.epochs)

    run = Run(seed, model)
    best_mae, best_weights = math.inf, None
    started = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        model.train()
        records = []
        for batch in batches(folds["train"], config.batch_size, generator=shuffler, device=device):
            loss, terms = objective(model, batch)
            optimizer.zero_grad()
            loss.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            schedule.step()
            objective.after_step(model)

            # One transfer for all terms: each one that waits for the device costs a step its head start.
            record = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
            record["temperature"] = objective.contrast.temperature.item()
            record |= {f"factor_{name}": value for name, value in model.fusion.factors.factors().items()}
            records.append(record)
            if on_step is not None:
                on_step(record)
        run.steps += records

        predictions = predict(model, folds["valid"], config.batch_size, device)
        valid = msa_metrics(predictions, folds["valid"].scores)
        means = {name: float(np.mean([record[name] for record in records])) for name in records[0]}
        seconds = time.perf_counter() - started
        run.epochs.append({"seed": seed, "epoch": epoch, "seconds": seconds, **means, "valid": valid})
        if on_epoch is not None:
            on_epoch(run.epochs[-1])
        if valid["mae"] < best_mae:
            best_mae, run.best_epoch = valid["mae"], epoch
            best_weights = copy.deepcopy(model.state_dict())
        elif epoch - run.best_epoch >= config.patience:
            break
    if best_weights is None:
        raise FloatingPointError(f"seed {seed}: the validation MAE was NaN in every epoch")
    model.load_state_dict(best_weights)
    for name in ("valid", "test"):
        run.predictions[name] = predict(model, folds[name], config.batch_size, device)
        run.metrics[name] = msa_metrics(run.predictions[name], folds[name].scores)
    run.seconds = time.perf_counter() - started
    return run


def make_schedule(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Factor of all learning rates by step."""
    warm_up = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if config.schedule == "constant":
            return 1.0
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def predict(model: MTMD, fold: Fold, batch_size: int, device: torch.device) -> np.ndarray:
    """Fused scores of a fold, in its order, float32 (n,)."""
    model.eval()
    scores = [model.predict(batch).scores.cpu() for batch in batches(fold, batch_size, device=device)]
    return torch.cat(scores).numpy()


def save_checkpoint(path: Path, run: Run, config: Config, standardizer: Standardizer, dataset: Dataset) -> None:
    """The model and its feature scaling as safetensors, what is needed to read them as JSON beside."""
    tensors: dict[str, Tensor] = {
        f"model.{name}": value.detach().cpu().contiguous() for name, value in run.model.state_dict().items()
    }
    tensors |= {
        f"standardizer.{name}": torch.from_numpy(np.ascontiguousarray(value))
        for name, value in standardizer.state().items()
    }
    save_file(tensors, path.with_suffix(".safetensors"))
    about = {
        "config": config.as_json(),
        "seed": run.seed,
        "best_epoch": run.best_epoch,
        "widths": dataset.widths,
        "encoder": run.model.encoder_config(),
        "dataset": dataset.name,
        "synthetic": dataset.synthetic,
        "data_sha256": dataset.fingerprint,
        "valid": finite_or_none(run.metrics["valid"]),
    }
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(path: Path) -> tuple[MTMD, Standardizer, dict[str, Any]]:
    """What :func:`save_checkpoint` wrote: the model in eval mode, the feature scaling, and the JSON beside them."""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    tensors = load_file(path.with_suffix(".safetensors"))

    def section(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    model = MTMD(Config.from_json(about["config"]), about["widths"], encoder_config=about["encoder"])
    model.load_state_dict(section("model."))
    scaling = {name: value.numpy() for name, value in section("standardizer.").items()}
    return model.eval(), Standardizer.from_state(scaling), about


def finite_or_none(value: Any) -> Any:
    """The value for JSON, which has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: finite_or_none(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def prediction_rows(run: Run, folds: dict[str, Fold]) -> Iterator[tuple[int, str, str, float, float]]:
    """The lines of predictions.csv: seed, split, id, target, score."""
    for split in ("valid", "test"):
        fold = folds[split]
        for name, target, score in zip(fold.ids, fold.scores, run.predictions[split], strict=True):
            yield run.seed, split, name, float(target), float(score)
