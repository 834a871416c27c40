"""The lean kernels on a GPU, step by step: right, fast at small and large sizes, beside what else there is.

    bash benchmarks/gpu_plan.sh            all steps, each in a process of its own, at most eight minutes on an H100
    python benchmarks/gpu_plan.py large    some steps, in this process

Every step prints one line for each thing measured and leaves `gpu_plan-<step>.json` in `--out`, with date, device and
versions. Times are medians, of calls from Python (`eager`) and of a CUDA graph (`graph`); TFLOP/s count the four
products of a loss with momentum targets. `--tiny` runs the same code at small sizes, on the CPU, in Triton's
interpreter (`TRITON_INTERPRET=1`): no figure of that means anything.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bench_supcon
from bench_supcon import ALPHA, DIM, TEMPERATURE, Side, dense_loss, forward_and_backward, make_sides, ours_loss
from common import RESULTS, Options, Run, metadata
from momentum_distill._contrast import lean
from momentum_distill._contrast.lean import Part, Tiling

Row = dict[str, Any]
SECONDS = 0.5  # for each median
TILINGS = [
    Tiling(128, 128, 32, 8, 3),
    Tiling(128, 128, 32, 8, 2),
    Tiling(128, 64, 32, 8, 3),
    Tiling(64, 128, 32, 4, 2),
    Tiling(64, 64, 32, 4, 3),
]
SPLITS = (8, 16, 32)  # of the keys, as the batch of a library's attention


class Plan:
    """Sizes and the device."""

    def __init__(self, *, tiny: bool) -> None:
        self.tiny = tiny
        self.device = "cpu" if tiny else "cuda"
        self.large = (6, 140) if tiny else (512, 262144)
        self.small = (4, 40) if tiny else (64, 1024)

    def side(self, size: tuple[int, int], dtype: str, *, one_class_per_row: bool = False) -> Side:
        """Inputs of one direction: unit keys, as a queue holds them."""
        rows, keys = size
        side = make_sides(rows, keys, 1, self.device, dtype)[0]
        if one_class_per_row:
            labels, key_labels = torch.arange(rows), torch.arange(keys) % rows
            side = side._replace(labels=labels.to(self.device), key_labels=key_labels.to(self.device))
        return side


# -------------------------------------------------------------------------------------------------- contenders


def lean_loss(side: Side, normalize: str | bool = "query") -> tuple[lean.Answer, Tensor]:
    """Terms and the gradient of the queries."""
    parts = [Part(side.keys, side.momentum_keys, side.key_labels)]
    answer = lean.contrast(
        side.query.detach(), side.momentum_query, parts, side.labels, temperature=TEMPERATURE,
        momentum_temperature=TEMPERATURE, alpha=ALPHA, positives="outside", reduction="mean", normalize=normalize,
        ignore_index=-1,
    )  # fmt: skip
    return answer, lean.scale(answer, answer.total, query=side.query.dtype)[0]


def contenders(plan: Plan, side: Side) -> dict[str, Run]:
    """The lean kernels, the present ones, and the dense formula as it is and compiled."""
    compiled = torch.compile(dense_loss, dynamic=False, backend="eager" if plan.tiny else "inductor")
    return {
        "lean": lambda: lean_loss(side),
        "present kernel": forward_and_backward(ours_loss, [side]),
        "dense, eager": forward_and_backward(dense_loss, [side]),
        "dense, compiled": forward_and_backward(compiled, [side]),
    }


# ------------------------------------------------------------------------------------------------------ timing


def synchronize(plan: Plan) -> None:
    if not plan.tiny:
        torch.cuda.synchronize()


def median_ms(plan: Plan, run: Run, calls: int = 1) -> float:
    """Of rounds of some calls, waited for at the end of each round."""
    run()
    times: list[float] = []
    calls = 1 if plan.tiny else calls
    end = time.perf_counter() + (0.0 if plan.tiny else SECONDS)
    while not times or (time.perf_counter() < end and len(times) < 200):
        synchronize(plan)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(plan)
        times.append((time.perf_counter() - started) / calls)
    return 1000 * statistics.median(times)


def captured(plan: Plan, run: Run) -> Run:
    """A replay of one call as a CUDA graph; on the CPU the call itself."""
    if plan.tiny:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(plan: Plan, name: str, build: Callable[[], Run], size: tuple[int, int], **more: Any) -> Row:
    """Both times of a contender, or why there are none."""
    row: Row = {"name": name, "N": size[0], "Q": size[1], **more}
    try:
        run = build()
        row["eager_ms"] = median_ms(plan, run, calls=10 if size == plan.small else 1)
        if not plan.tiny:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["graph_ms"] = median_ms(plan, captured(plan, run), calls=10)
        row["tflops"] = 8 * size[0] * size[1] * DIM / row["graph_ms"] / 1e9
    except Exception as error:  # whatever it is, of a rival too: the other rows of the step are to come
        row["error"] = f"{type(error).__name__}: {error}"[:500]
    return row


# ------------------------------------------------------------------------------------------------------- steps


def correct(plan: Plan) -> Iterator[Row]:
    """Terms and gradient against the formula in float64, by whole tiles with and without tensor descriptors."""
    for dtype in ("bfloat16", "float32", "float16"):
        for size in [plan.small] if plan.tiny else [plan.small, (512, 4096 + 13)]:
            make_sides.cache_clear()
            side = plan.side(size, dtype)
            parameters = {"rows": size[0], "keys": size[1], "directions": 1, "device": plan.device, "dtype": dtype}
            expected, _, (gradient,) = bench_supcon.exact(True, *sorted(parameters.items()))
            for tma in (True, False) if dtype == "bfloat16" else (True,):  # each is compiled anew
                lean.TMA = tma
                answer = lean_loss(side)[0]
                lean.TMA = None
                loss_error = abs(answer.total.item() - expected) / abs(expected)
                error = ((answer.grad_query.double() - gradient).norm() / gradient.norm()).item()
                right = max(loss_error, error) < {"bfloat16": 2e-2, "float16": 5e-3, "float32": 2e-5}[dtype]
                yield {
                    "name": "right" if right else "WRONG", "N": size[0], "Q": size[1], "dtype": dtype, "tma": tma,
                    "loss_error": loss_error, "gradient_error": error,
                }  # fmt: skip


def compared(plan: Plan, size: tuple[int, int], dtype: str, **options: bool) -> Iterator[Row]:
    """All contenders on the same inputs."""
    side = plan.side(size, dtype, **options)
    for name, run in contenders(plan, side).items():
        yield timed(plan, name, lambda run=run: run, size, dtype=dtype)


def kernels(plan: Plan) -> Iterator[Row]:
    """What each launch of the lean way takes at the large size."""
    side = plan.side(plan.large, "bfloat16")
    for _ in range(2):
        lean_loss(side)
    if plan.tiny:
        yield {"name": "no profile of the CPU"}
        return
    calls = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            lean_loss(side)
        torch.cuda.synchronize()
    for event in profile.key_averages():
        yield {"name": event.key, "ms": event.device_time_total / 1000 / calls, "launches": event.count / calls}


def tilings(plan: Plan) -> Iterator[Row]:
    """Other tiles for `attend`, and with and without tensor descriptors."""
    side = plan.side(plan.large, "bfloat16")
    usual = lean.tilings

    def chosen(tiling: Tiling, n: int, part: Part, gpu: int) -> tuple[Tiling, Tiling]:
        return tiling, usual(n, part, gpu)[1]

    for tiling in TILINGS[:1] if plan.tiny else TILINGS:
        for tma in (True, False):
            lean.tilings, lean.TMA = functools.partial(chosen, tiling), tma  # type: ignore[assignment]
            yield timed(plan, "lean", lambda: lambda: lean_loss(side), plan.large, tiling=list(tiling), tma=tma)
            lean.tilings, lean.TMA = usual, None


def yardstick(plan: Plan) -> Iterator[Row]:
    """The same sums by attention from a library, splits of the keys as its batch, merged by their lse: cuDNN, flash."""
    side = plan.side(plan.large, "bfloat16")
    rows, keys = plan.large
    scale = 1 / TEMPERATURE
    queries = [F.normalize(x.detach(), dim=1) for x in (side.query, side.momentum_query)]
    libraries: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"plain": _plain_attention}
    if not plan.tiny:
        aten = torch.ops.aten
        libraries = {
            "cuDNN": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2],
            "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2],
        }

    def run(attention: Callable[..., tuple[Tensor, Tensor]], splits: int) -> tuple[Tensor, Tensor]:
        values = side.keys.view(splits, 1, keys // splits, DIM)
        found = []
        for query, other in zip(queries, (side.keys, side.momentum_keys), strict=True):
            many = query.expand(splits, 1, rows, DIM).contiguous()
            mean, lse = attention(many, other.view(splits, 1, keys // splits, DIM), values)
            lse = lse.reshape(splits, rows)
            total = lse.logsumexp(dim=0)
            found.append(((lse - total).exp()[..., None] * mean.reshape(splits, rows, DIM)).sum(dim=0))
        return found[0], found[1]

    expected = torch.softmax(queries[0][:8].float() @ side.keys.float().T * scale, dim=1) @ side.keys.float()
    for name, attention in libraries.items():
        for splits in (2,) if plan.tiny else SPLITS:
            row = timed(plan, name, lambda a=attention, s=splits: lambda: run(a, s), plan.large, splits=splits)
            if "error" not in row:
                found = run(attention, splits)[0][:8].float()
                row["error_of_mean"] = ((found - expected).norm() / expected.norm()).item()
            yield row


def _plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What the libraries return, for where there are none."""
    logits = query @ keys.transpose(-1, -2) / TEMPERATURE
    return logits.softmax(dim=-1) @ values, logits.logsumexp(dim=-1)


STEPS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "correct": correct,
    "small": lambda plan: compared(plan, plan.small, "bfloat16"),
    "large": lambda plan: compared(plan, plan.large, "bfloat16"),
    "kernels": kernels,
    "yardstick": yardstick,
    "classes": lambda plan: compared(plan, plan.large, "bfloat16", one_class_per_row=True),
    "small32": lambda plan: compared(plan, plan.small, "float32"),
    "large32": lambda plan: compared(plan, plan.large, "float32"),
    "tilings": tilings,
}


def run_step(name: str, plan: Plan, out: Path) -> bool:
    """Run a step; each row is printed and saved at once."""
    options = Options("tiny" if plan.tiny else "full", plan.device, 1, out, [])
    content: dict[str, Any] = {"metadata": metadata("gpu_plan", options) | {"step": name}, "results": []}
    if not plan.tiny:
        from momentum_distill._contrast.kernel import triton

        content["metadata"]["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"gpu_plan-{name}.json"

    def save() -> None:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    try:
        for row in STEPS[name](plan):
            content["results"].append(row)
            save()
            shown = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"{name}: {', '.join(shown)}", flush=True)
    except Exception:  # told and saved; the shell script goes on with the next step
        content["error"] = traceback.format_exc()
        save()
        print(f"{name}: FAILED\n{content['error']}", flush=True)
        return False
    return not any("error" in row or row["name"] == "WRONG" for row in content["results"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU: only to see it work")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_plan", help="folder for the files")
    options = parser.parse_args(arguments)
    os.environ["MOMENTUM_DISTILL_TRITON"] = "1"  # the present kernel
    plan = Plan(tiny=options.tiny)
    well = [run_step(name, plan, options.out) for name in options.steps or STEPS]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
