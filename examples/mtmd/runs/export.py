"""`export`: the model with its feature scaling as a torch.export program, which needs none of this code."""

import argparse
import io
import json
import warnings
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from mtmd.data.batches import Batch
from mtmd.files.writing import check_writable, replacing
from mtmd.runs.trained import CHECKPOINT, Trained, load_trained
from mtmd.settings.cli import say
from mtmd.settings.options import a_path

try:
    from torch.export._patches import register_lstm_while_loop_decomposition
except ImportError:  # torch 2.13 has it, 2.9 does not
    register_lstm_while_loop_decomposition = None


class Deployed(nn.Module):
    """The model with its feature scaling: what a program outside this code is fed is the data as they are."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.model = trained.model
        self.modalities = list(trained.modalities)
        self.scaled = list(trained.read_widths)
        for name in self.scaled:
            self.register_buffer(f"{name}_mean", torch.from_numpy(np.array(trained.standardizer.mean[name])))
            self.register_buffer(f"{name}_std", torch.from_numpy(np.array(trained.standardizer.std[name])))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scores (N,) and logits (N, 3).

        Args:
            inputs: `audio` (N, T, d) float32 and `audio_lengths` (N,) int64, 0 for missing, likewise `vision` and
                `text`; in place of the latter `tokens` (N, 3, L) int64 where the model has a text encoder.
        """
        features, lengths, present = {}, {}, {}
        for name in self.scaled:
            values, lengths[name] = inputs[name].double(), inputs[f"{name}_lengths"]
            scaled = (values - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")
            inside = torch.arange(values.shape[1], device=values.device) < lengths[name][:, None]
            kept = inside[:, :, None] & torch.isfinite(values)
            features[name] = torch.where(kept, scaled, 0.0).float()
            present[name] = lengths[name] > 0
        tokens = inputs.get("tokens")
        if tokens is not None:
            present["text"] = (tokens[:, 1] > 0).any(dim=1)
        n = present[self.modalities[0]].shape[0]
        nothing = torch.zeros(n, dtype=torch.int64, device=present[self.modalities[0]].device)
        batch = Batch(nothing, nothing.float(), nothing, tokens, features, lengths, present, total=n)
        fused = self.model.predict(batch)
        return {"scores": fused.scores, "logits": fused.logits}


def example_inputs(trained: Trained, *, samples: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Made-up inputs of :class:`Deployed`, at least two steps; the last of several samples misses audio and vision."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, width in trained.read_widths.items():
        lengths = torch.randint(1, steps + 1, (samples,), generator=generator)
        if name != "text" and samples > 1:
            lengths[-1] = 0
        inputs[name] = torch.randn(samples, steps, width, generator=generator)
        inputs[f"{name}_lengths"] = lengths
    if trained.reads_tokens:
        tokens = torch.zeros(samples, 3, steps, dtype=torch.int64)
        lengths = torch.randint(2, steps + 1, (samples, 1), generator=generator)
        tokens[:, 1] = torch.arange(steps) < lengths
        words = trained.model.branches["text"].encoder.bert.config.vocab_size
        tokens[:, 0] = torch.randint(words, (samples, steps), generator=generator) * tokens[:, 1]
        inputs["tokens"] = tokens
    return inputs


def export_program(trained: Trained) -> torch.export.ExportedProgram:
    """The deployed model as a program for any number of samples and steps."""
    if register_lstm_while_loop_decomposition is None:
        raise ValueError(f"export: expected a torch that exports an LSTM of any length, got torch {torch.__version__}")
    deployed = Deployed(trained).eval()
    inputs = example_inputs(trained, samples=3, steps=7)
    dynamic = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {}
    for name in inputs:
        shapes[name] = {0: dynamic} if name.endswith("_lengths") else {0: dynamic, 1: dynamic}
    if "tokens" in inputs:
        shapes["tokens"] = {0: dynamic, 2: dynamic}
    # The usual way to trace an LSTM writes out its steps, as many as there are in the example.
    with torch.no_grad(), register_lstm_while_loop_decomposition(), warnings.catch_warnings():
        # An LSTM keeps its weights in a list beside its parameters, which tracing swaps and puts back.
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights")
        warnings.filterwarnings("ignore", message="_check_is_size", category=FutureWarning)  # torch's own use of it
        return torch.export.export(deployed, (inputs,), dynamic_shapes=(shapes,))


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("model").add_argument("checkpoint", type=a_path, help=CHECKPOINT)
    parser.add_argument_group("output").add_argument(
        "target", type=a_path, metavar="OUT.pt2", help="where to write the program"
    )


def run_export(arguments: argparse.Namespace, console: Console) -> None:
    """Write the program, read it again, and compare with the model."""
    target = arguments.target
    if target.suffix != ".pt2":
        raise ValueError(f"target: expected a file name that ends in .pt2, got {target}")
    check_writable(target)
    trained = load_trained(arguments.checkpoint)
    program = export_program(trained)
    about = {
        "inputs": list(example_inputs(trained, samples=1, steps=2)),
        "widths": trained.read_widths,
        "classes": list(trained.classes),
        "text_encoder": trained.config.text_encoder if trained.reads_tokens else None,
        "max_tokens": trained.config.max_tokens if trained.reads_tokens else None,
        "context": trained.config.context if trained.reads_tokens else None,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as part:
        written = io.BytesIO()  # on a full disk torch ends the process
        torch.export.save(program, written, extra_files={"about.json": json.dumps(about)})
        part.write_bytes(written.getbuffer())
        with part.open("rb") as file:
            again = torch.export.load(file).module()
        deployed = Deployed(trained).eval()
        largest = 0.0
        for samples, steps in ((1, 4), (5, 12)):
            inputs = example_inputs(trained, samples=samples, steps=steps, seed=samples)
            with torch.no_grad():
                expected, got = deployed(inputs), again(inputs)
            largest = max(largest, *(float((got[key] - expected[key]).abs().max()) for key in expected))
        if not largest < 1e-4:
            raise ValueError(f"{target}: expected the outputs of the model, got others, by up to {largest:.2g}")
    say(console, f"Written: {target.resolve()}; its outputs differ from the model's by at most {largest:.2g}")
