"""A whole training step of MTMD against the same multi-task step without distillation, and inference with either.

    python benchmarks/bench_step.py                              text as features of 768 numbers per token
    python benchmarks/bench_step.py --text-encoder DIRECTORY     text as tokens for a BERT-type model of transformers

The model is that of `examples/mtmd`, at the paper's sizes for CMU-MOSI: batch 64, 50 steps, queue 1024. Without
distillation, the loss is that of the ground truth in all four tasks. A profile of the step with distillation follows;
the backward pass of the distillation terms is in its row "backward".
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from common import (
    CLOCKS,
    ROOT,
    Case,
    Contender,
    Options,
    Run,
    clock_name,
    num_threads,
    parse_options,
    print_rows,
    run_cases,
    summary,
    synchronize,
    write_results,
)

sys.path.insert(0, str(ROOT / "examples"))

from mtmd.data.batches import Batch
from mtmd.model import MTMD, Outputs
from mtmd.objective import Objective, ground_truth_loss
from mtmd.settings.config import MODALITIES, STUDENTS, Config

WIDTHS = {"text": 768, "audio": 5, "vision": 20}  # as in CMU-MOSI
SMALL_MODEL = {"width": 16, "fused_width": 16, "audio_hidden": 8, "vision_hidden": 8, "text_hidden": 8, "layers": 1}
FIRST_WORD, LAST_WORD = 1000, 30000  # ids that are words in the vocabulary of uncased BERT
ROUNDS = {"quick": 2, "small": 10, "full": 20}


def make_config(*, queue: int, text_encoder: str, small_model: bool) -> Config:
    return Config(queue_size=queue, text_encoder=text_encoder, **(SMALL_MODEL if small_model else {}))


def make_batch(config: Config, rows: int, steps: int, device: str) -> Batch:
    """Random numbers in the shapes of a batch; a tenth of audio and vision is missing."""
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.rand(rows, generator=generator) - 3
    present = {name: torch.ones(rows, dtype=torch.bool) for name in MODALITIES}
    for name in STUDENTS:
        present[name] = torch.rand(rows, generator=generator) > 0.1
    features = {
        name: torch.randn(rows, steps, width, generator=generator) * present[name][:, None, None]
        for name, width in WIDTHS.items()
        if name != "text" or config.text_encoder == "features"
    }
    tokens = None
    if config.text_encoder != "features":
        # Lengths as of speech: most texts are short, few reach the limit, and a CPU is spared their padding.
        lengths = (4 + torch.empty(rows).exponential_(1 / 11, generator=generator)).clamp(max=steps)
        attention = (torch.arange(steps) < lengths[:, None]).long()
        words = torch.randint(FIRST_WORD, LAST_WORD, (rows, steps), generator=generator) * attention
        tokens = torch.stack([words, attention, torch.zeros_like(words)], dim=1)
    return Batch(
        index=torch.arange(rows),
        scores=scores,
        labels=(scores > 0.5).long() + (scores > -0.5).long(),
        tokens=tokens,
        features=features,
        lengths={name: steps * present[name].long() for name in features},
        present=present,
        total=rows,
    ).to(device)


@dataclasses.dataclass
class Training:
    """What a training loop holds."""

    model: MTMD
    objective: Objective
    optimizer: torch.optim.Optimizer
    batch: Batch


def make_training(*, rows: int, steps: int, device: str, **settings: Any) -> Training:
    """A model, its objective with a full queue, and Adam."""
    torch.manual_seed(0)
    config = make_config(**settings)
    model = MTMD(config, WIDTHS).to(device).train()
    objective = Objective(config, model).to(device)
    groups = model.parameter_groups(config)
    groups.append({"params": list(objective.contrast.parameters()), "lr": config.other_lr})
    past = {
        name: F.normalize(torch.randn(config.queue_size, config.width), dim=1).to(device)
        for name in objective.queue.streams
    }
    objective.queue.enqueue(torch.randint(3, (config.queue_size,)).to(device), past)
    batch = make_batch(config, rows, steps, device)
    return Training(model, objective, torch.optim.Adam(groups), batch)


# ------------------------------------------------------------------------------------------------ training step


def build_with(**parameters: Any) -> Run:
    training = make_training(**parameters)
    model, objective, optimizer = training.model, training.objective, training.optimizer

    def run() -> None:
        loss, _ = objective(model, training.batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(model)

    return run


def build_without(**parameters: Any) -> Run:
    training = make_training(**parameters)
    optimizer = training.optimizer

    def run() -> None:
        loss = all_ground_truth(training)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def all_ground_truth(training: Training) -> torch.Tensor:
    """Forward pass, and the loss of all four tasks."""
    return ground_truth(training.model(training.batch), training.batch)


def ground_truth(outputs: Outputs, batch: Batch) -> torch.Tensor:
    """The loss of all four tasks (Eq. 17)."""
    losses = [ground_truth_loss(outputs.unimodal[name], batch, name) for name in MODALITIES]
    return sum(losses) + ground_truth_loss(outputs.fused, batch, None)


# ---------------------------------------------------------------------------------------------------- inference


def build_inference_with(**parameters: Any) -> Run:
    """The model after a step with distillation."""
    training = make_training(**parameters)
    loss, _ = training.objective(training.model, training.batch)
    loss.backward()
    training.optimizer.step()
    training.objective.after_step(training.model)
    return inference(training)


def build_inference_without(**parameters: Any) -> Run:
    """The model after a step on the ground truth alone."""
    training = make_training(**parameters)
    all_ground_truth(training).backward()
    training.optimizer.step()
    return inference(training)


def inference(training: Training) -> Run:
    """A run that returns how many parameters the model has."""
    model = training.model.eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())

    @torch.no_grad()
    def run() -> int:
        model.predict(training.batch)
        return parameters

    return run


def count_parameters(contender: Contender, parameters: dict[str, Any], value: object) -> dict[str, Any]:
    del contender, parameters
    return {"model_parameters": value}


# ------------------------------------------------------------------------------------------------------ profile


def profile(case: Case, options: Options) -> list[dict[str, Any]]:
    """Rows of the parts of a step with distillation, each as a ratio to the whole."""
    with num_threads(options.threads):
        training = make_training(**case.parameters)
        rounds = [one_profiled_step(training, options.device) for _ in range(ROUNDS[options.size] + 1)][1:]
    whole = [sum(parts.values()) for parts in rounds]
    rows = []
    for part in rounds[0]:
        seconds = [parts[part] for parts in rounds]
        rows.append(
            {
                "case": case.name.replace("training step", "profile"),
                "parameters": case.parameters,
                "contender": part,
                "role": "part",
                "computes": "",
                **summary(seconds, whole),
                "peak_extra_mib": None,
            }
        )
    return rows


def one_profiled_step(training: Training, device: str) -> dict[str, float]:
    """Seconds of each part; the same calls as in `Objective.forward` and `Objective.after_step`."""
    model, objective, batch = training.model, training.objective, training.batch
    seconds: dict[str, float] = {}
    clock = CLOCKS[clock_name(device, torch.get_num_threads())]

    def timed(part: str, call: Callable[[], Any]) -> Any:
        synchronize(device)
        started = clock()
        value = call()
        synchronize(device)
        seconds[part] = clock() - started
        return value

    def momentum_forward() -> dict[str, Any]:
        return {name: objective.momentum[name](*model.inputs(batch, name)) for name in STUDENTS}

    def backward() -> None:
        training.optimizer.zero_grad()
        terms = {**response, **contrast, "fusion": fusion}
        (truth + sum(gamma * terms[name] for name, gamma in objective.gammas.items())).backward()

    def move_averages() -> None:
        for name in STUDENTS:
            objective.momentum[name].update(model.branches[name])
        model.fusion.factors.update()

    def enqueue() -> None:
        features = {name: outputs.unimodal[name].features for name in MODALITIES}
        features |= {f"{name}_momentum": momentum[name].features for name in STUDENTS}
        valid = {stream: batch.present[stream.removesuffix("_momentum")] for stream in features}
        objective.queue.enqueue(batch.labels, features, valid=valid)

    outputs = timed("forward", lambda: model(batch))
    truth = timed("ground truth losses", lambda: ground_truth(outputs, batch))
    momentum = timed("momentum forward *", momentum_forward)
    contrast = timed("contrastive terms, forward *", lambda: objective.feature_terms(outputs, momentum, batch))
    response = timed("response terms, forward *", lambda: objective.response_terms(outputs, momentum, batch))
    fusion = timed("fusion term, forward *", lambda: objective.fusion_term(outputs, batch))
    timed("backward, distillation included", backward)
    timed("optimizer", training.optimizer.step)
    timed("EMA *", move_averages)
    timed("queue *", enqueue)
    return seconds


# --------------------------------------------------------------------------------------------------------- main


def describe(encoder: str) -> str:
    """A text encoder by its size."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(encoder)
    return f"text encoder {config.model_type} of {config.num_hidden_layers} layers, width {config.hidden_size}"


def make_cases(options: Options) -> list[Case]:
    quick = options.size == "quick"
    rows, steps, queue = (8, 6, 32) if quick else (64, 50, 1024)
    encoder = options.rest.text_encoder
    parameters = {
        "rows": rows,
        "steps": steps,
        "queue": queue,
        "text_encoder": encoder,
        "small_model": quick,
        "device": options.device,
    }
    text = "text features" if encoder == "features" else describe(encoder)
    step = (
        Contender("without distillation", build_without, role="bound"),
        Contender("with distillation", build_with, role="ours"),
    )
    inference = (
        Contender("trained without distillation", build_inference_without, role="bound"),
        Contender("trained with distillation", build_inference_with, role="ours"),
    )
    return [
        Case(
            f"training step, {text}, batch {rows}, {steps} steps, Q={queue}",
            step,
            parameters,
            rounds=ROUNDS[options.size],
        ),
        Case(
            f"inference, {text}, batch {rows}, {steps} steps",
            inference,
            parameters,
            count_parameters,
            rounds=ROUNDS[options.size],
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(
        __doc__ or "",
        arguments,
        lambda parser: parser.add_argument(
            "--text-encoder", default="features", help="name or directory of a BERT-type model (default: text features)"
        ),
    )
    cases = make_cases(options)
    results, skipped = run_cases(cases, options)
    parts = profile(cases[0], options)
    print_rows(f"{parts[0]['case']} (* what distillation adds, x bound: share of the step)", parts)
    for row in (*results, *parts):  # where the encoder lies says nothing elsewhere
        row["parameters"] = {name: value for name, value in row["parameters"].items() if name != "text_encoder"}
    block = "step" if options.rest.text_encoder == "features" else "step_encoder"
    write_results(block, results + parts, skipped, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
