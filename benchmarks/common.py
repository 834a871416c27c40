"""What every benchmark here does alike: how it times, what counts as memory, what it writes.

- Time: the contenders of a case take turns, in rounds of changing order, so that a busy moment hits all alike. A round
  times enough calls to last ten milliseconds; reported are median, interquartile range and best of the rounds, per
  call. On the CPU with one thread it is the time that the processor gives to the process, which is what the wall clock
  shows where nothing else runs, and stays the same where something does; else it is the wall clock, on CUDA with the
  device waited for inside the timed region. First calls are not timed.
- Bound: the least that the same work can cost on this machine, timed in the same rounds, or reckoned from what is.
  `ratio_to_bound` is the median over the rounds of the ratio within a round.
- Memory: what a call needs beyond its inputs at the worst moment. CPU: peak resident set, in a process of its own, of a
  second call after freed memory went back to the system; CUDA: `torch.cuda.max_memory_allocated`.
- One thread and fixed seeds unless asked otherwise. A library that is not installed is skipped by name.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

# Compile in this process: a memory measurement cannot fork a pool of compilers.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
RIVALS = ("pytorch-metric-learning", "lightly", "timm", "ema-pytorch")

SECONDS = {"quick": 0.01, "small": 0.5, "full": 2.0}  # spent on each contender of a case
ROUND_SECONDS = 0.01
MAX_ROUNDS = 100
MIB = 2**20
FEW_BYTES = 64 * 1024  # allocations above this go back to the system when freed

TENSOR_CORES = {  # dense FLOP/s of the makers' data sheets: in bfloat16 and float16, in TF32
    "NVIDIA H200": (989e12, 495e12),
    "NVIDIA H100 80GB HBM3": (989e12, 495e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 156e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 156e12),
}

Run = Callable[[], object]
Check = Callable[["Contender", dict[str, Any], object], dict[str, Any]]
"""Of a contender, the parameters of the case and what a run returned, to further fields of a row."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case."""

    name: str
    build: Callable[..., Run]  # a module-level function, so that another process can call it; gets the parameters
    role: str = "rival"  # "ours", "bound", "reference" (a few lines of torch) or "rival" (a library)
    computes: str = ""  # where it does not compute the same as the others
    needs: str | None = None  # the package to import
    reckon: Callable[..., float] | None = None  # bound only: its seconds, `reckon(seconds of the run, **parameters)`
    memory: bool = True  # whether a call takes what it needs; a CUDA graph has it already
    compiler: bool = False  # needs one that works, which is no fault of ours where there is none


@dataclass(frozen=True)
class Case:
    """One problem and who takes part."""

    name: str
    contenders: tuple[Contender, ...]
    parameters: dict[str, Any]  # JSON values: what `build` gets
    check: Check | None = None
    rounds: int = 3  # at least so many


@dataclass
class Options:
    """The command line."""

    size: str
    device: str
    threads: int
    out: Path
    only: list[str]
    cases: re.Pattern[str] = re.compile("")
    seconds: float = SECONDS["small"]
    rest: argparse.Namespace = field(default_factory=argparse.Namespace)


# ------------------------------------------------------------------------------------------------ command line


def parse_options(
    description: str, arguments: Sequence[str] | None, extra: Callable[[Any], None] | None = None
) -> Options:
    """The options that all scripts share; `extra` may add arguments of its own to the parser."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_const", const="full", dest="size", help="the large sizes too: hours")
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="tiny sizes: only to see it work"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file (default: results/)")
    parser.add_argument(
        "--only", nargs="+", default=[], help="contenders whose name contains one of these; bounds stay"
    )
    parser.add_argument("--cases", type=re.compile, default=re.compile(""), help="cases in whose name this is found")
    parser.add_argument("--seconds", type=float, help="for each contender of a case (default: by size, 0.01 to 2)")
    if extra is not None:
        extra(parser)
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch can use, got none")
    size = given.size or "small"
    seconds = SECONDS[size] if given.seconds is None else given.seconds
    return Options(size, given.device, given.threads, given.out, given.only, given.cases, seconds, given)


# ------------------------------------------------------------------------------------------------------ running


def run_cases(cases: Iterable[Case], options: Options) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """All rows, and who was skipped where and why."""
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with num_threads(options.threads):
        for case in cases:
            if not options.cases.search(case.name):
                continue
            torch._dynamo.reset()  # here alone: it forgets what every contender so far has compiled
            rows, left_out = run_case(case, options)
            results += rows
            skipped += left_out
            print_rows(case.name, rows)
            for entry in left_out:
                print(f"skipped: {entry['contender']} ({entry['reason']})")
            print(flush=True)
    return results, skipped


def run_case(case: Case, options: Options) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Memory of each contender, then the times of all together."""
    runs: dict[str, Run] = {}
    values: dict[str, object] = {}
    memory: dict[str, float | None] = {}
    skipped = []
    chosen = [c for c in case.contenders if c.role == "bound" or _is_chosen(c.name, options.only)]
    for contender in chosen:
        try:
            if contender.needs is not None and importlib.util.find_spec(contender.needs) is None:
                raise ModuleNotFoundError("not installed")
            if contender.reckon is not None or not contender.memory:
                memory[contender.name] = None  # that of other work, or at another time
            elif options.device == "cpu":
                memory[contender.name] = cpu_peak_extra_mib(contender.build, case.parameters, options.threads)
            run = contender.build(**case.parameters)
            values[contender.name] = run()
            if contender.name not in memory:
                memory[contender.name] = cuda_peak_extra_mib(run)
            runs[contender.name] = run
        except Exception as error:
            if contender.role in ("ours", "bound") and not contender.compiler:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            skipped.append({"case": case.name, "contender": contender.name, "reason": reason})

    times = measure(runs, options.seconds, case.rounds, options.device)
    bounds = [c for c in chosen if c.role == "bound"]
    floor: list[float] | None = None
    if bounds:
        bound = bounds[0]
        floor = times[bound.name]
        if bound.reckon is not None:
            floor = times[bound.name] = [bound.reckon(seconds, **case.parameters) for seconds in floor]

    rows = []
    for contender in chosen:
        if contender.name not in runs:
            continue
        row = {
            "case": case.name,
            "parameters": case.parameters,
            "contender": contender.name,
            "role": contender.role,
            "computes": contender.computes,
            **summary(times[contender.name], floor),
            "peak_extra_mib": memory[contender.name],
        }
        if case.check is not None:
            row |= case.check(contender, case.parameters, values[contender.name])
        rows.append(row)
    return rows, skipped


def summary(seconds: list[float], floor: list[float] | None) -> dict[str, Any]:
    """The statistics of the rounds of one contender."""
    quarters = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    ratio = None
    if floor is not None:
        ratio = statistics.median(mine / least for mine, least in zip(seconds, floor, strict=True))
    return {
        "median_s": statistics.median(seconds),
        "iqr_s": quarters[2] - quarters[0],
        "best_s": min(seconds),
        "rounds": len(seconds),
        "ratio_to_bound": ratio,
    }


def _is_chosen(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


@contextlib.contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """torch's threads, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------- time


def measure(runs: dict[str, Run], seconds: float, at_least: int, device: str) -> dict[str, list[float]]:
    """Seconds per call, one entry per round, of contenders that take turns; each was called before."""
    calls = {
        name: math.ceil(ROUND_SECONDS / min(time_calls(run, 1, device) for _ in range(3))) for name, run in runs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffler = random.Random(0)
    started = time.perf_counter()
    for rounds in range(MAX_ROUNDS):
        if rounds >= at_least and time.perf_counter() - started > seconds * len(runs):
            break
        shuffler.shuffle(order)
        for name in order:
            times[name].append(time_calls(runs[name], calls[name], device))
    return times


def time_calls(run: Run, calls: int, device: str) -> float:
    """Seconds per call."""
    clock = CLOCKS[clock_name(device, torch.get_num_threads())]
    synchronize(device)
    started = clock()
    for _ in range(calls):
        run()
    synchronize(device)
    return (clock() - started) / calls


CLOCKS = {"processor time": time.process_time, "wall clock": time.perf_counter}


def clock_name(device: str, threads: int) -> str:
    """Which clock counts."""
    return "processor time" if device == "cpu" and threads == 1 else "wall clock"


def synchronize(device: str) -> None:
    """Wait for an accelerator."""
    if device != "cpu":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------- memory


def cuda_peak_extra_mib(run: Run) -> float:
    """MiB that a call allocates at the worst moment, beyond what was allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def cpu_peak_extra_mib(build: Callable[..., Run], parameters: dict[str, Any], threads: int) -> float | None:
    """The same on the CPU, in a fresh process; None where the system does not tell (it is Linux that does).

    Raises:
        MemoryError: If the process was ended by the system.
        RuntimeError: With the message of what the process raised.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    # Processes are forked from one that has these imported and ran nothing: a fork after a backward pass is refused.
    context.set_forkserver_preload(["torch", "momentum_distill", "pytorch_metric_learning.losses"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_memory, args=(sender, build, parameters, threads), daemon=True)
    process.start()
    sender.close()
    try:
        peak, error = receiver.recv()
    except EOFError:
        raise MemoryError("ended by the system, out of memory?") from None
    finally:
        process.join()
    if error is not None:
        raise RuntimeError(error)
    return peak


def _report_memory(sender: Connection, build: Callable[..., Run], parameters: dict[str, Any], threads: int) -> None:
    """Send (peak MiB, None), or (None, message)."""
    try:
        torch.set_num_threads(threads)
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, FEW_BYTES)  # M_MMAP_THRESHOLD; setting it also stops glibc from raising it
        run = build(**parameters)
        run()  # what is needed once: libraries' buffers, compilation, lists that are kept
        gc.collect()
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status_kib("VmRSS")
        run()
        sender.send(((_status_kib("VmHWM") - before) / 1024, None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}"))


def _status_kib(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match[1])


# ------------------------------------------------------------------------------------------------------- rivals


def import_part(name: str, *, bare: Sequence[str]) -> ModuleType:
    """Import one module of a library; where torchvision is missing, without what the library wants it for.

    timm and lightly import torchvision at their top, and none of it is used by what is measured here. Then the packages
    named in `bare` are entered without running their `__init__`.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchvision":
            raise
    root, *_ = name.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    for package in bare:
        bare_spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
        bare_spec.submodule_search_locations = [str(folder.joinpath(*package.split(".")[1:]))]
        sys.modules[package] = importlib.util.module_from_spec(bare_spec)
    stand_in = ModuleType("torchvision.ops")
    stand_in.StochasticDepth = nn.Identity  # lightly.models.utils takes it from there
    sys.modules |= {"torchvision": ModuleType("torchvision"), "torchvision.ops": stand_in}
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["torchvision"], sys.modules["torchvision.ops"]


# ------------------------------------------------------------------------------------------------------- output


def write_results(block: str, results: list[dict[str, Any]], skipped: list[dict[str, str]], options: Options) -> Path:
    """`results/<block>-<device>-<size>.json`: what was measured, when, where and with what."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{block}-{options.device}-{options.size}.json"
    content = {"metadata": metadata(block, options) | {"skipped": skipped}, "results": results}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def metadata(block: str, options: Options) -> dict[str, Any]:
    """When, where and with what."""
    return {
        "block": block,
        "size": options.size,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {name: _version(name) for name in ("momentum-distill", *RIVALS)},
        "device": device_name(options.device),
        "threads": options.threads,
        "clock": clock_name(options.device, options.threads),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def commit() -> str | None:
    """The commit, with a "+" if something was changed since; None without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        if match is not None:
            return match[1]
    return platform.processor() or platform.machine()


def peak_rate(device_name: str, dtype: str) -> float | None:
    """FLOP/s of the tensor cores, float32 as three products of TF32; None where the data sheet is not at hand."""
    half, tf32 = TENSOR_CORES.get(device_name, (None, None))
    return half if half is None or dtype != "float32" else tf32 / 3


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """A plain table."""
    headings = ("contender", "median", "IQR", "best", "x bound", "extra MiB")
    lines = [headings]
    for row in rows:
        ratio, memory = row["ratio_to_bound"], row["peak_extra_mib"]
        lines.append(
            (
                row["contender"] + (f" [{row['computes']}]" if row["computes"] else ""),
                show_seconds(row["median_s"]),
                show_seconds(row["iqr_s"]),
                show_seconds(row["best_s"]),
                "" if ratio is None else f"{ratio:.2f}",
                "" if memory is None else f"{memory:.1f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    print(title)
    for line in lines:
        print(
            "  "
            + "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        )


def show_seconds(seconds: float) -> str:
    """Milliseconds to three digits."""
    milliseconds = 1000 * seconds
    digits = max(0, 2 - math.floor(math.log10(milliseconds))) if milliseconds > 0 else 0
    return f"{milliseconds:.{min(digits, 5)}f} ms"
