"""Several experiments, one after the other or at the same time."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from rich.console import Console

from mtmd.runs.experiment import run_experiment
from mtmd.settings.config import Config

LOG = "log.txt"


def run_many(
    configs: Mapping[str, Config], console: Console, *, jobs: int = 1, quiet: bool = False, keep_going: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each experiment into its own `config.out`.

    Args:
        configs: By name.
        console: Where a single job shows its progress. Several jobs, and a quiet one, write to a log in their folders.
        jobs: Processes that train at the same time; they share the threads.
        quiet: Show nothing of the experiments themselves.
        keep_going: Where data or settings of an experiment are wrong, that is its outcome, and the others go on.

    Yields:
        Name and contents of results.json as each one finishes; `{"error": why}` for one that did not train.

    Raises:
        ValueError: If data or settings of an experiment are wrong, unless `keep_going`; the message begins with its
            name.
        OSError: If a file cannot be read or written, or a process ended before its experiment did.
    """

    def outcome_of(name: str, run: Callable[[], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        try:
            return name, run()
        except ValueError as error:
            if not keep_going:
                raise ValueError(f"{name}: {error}") from error
            return name, {"error": str(error)}

    if jobs == 1:
        for name, config in configs.items():
            job = (run_logged, config) if quiet else (run_or_say_why, config, console)
            yield outcome_of(name, functools.partial(*job))
        return
    threads = max(1, torch.get_num_threads() // jobs)
    # Spawned, not forked: a fork of a process whose torch threads have started can hang.
    with ProcessPoolExecutor(
        min(jobs, len(configs) or 1),
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    ) as pool:
        futures = {pool.submit(run_logged, config): name for name, config in configs.items()}
        try:
            for future in as_completed(futures):
                yield outcome_of(futures[future], future.result)
        except BrokenProcessPool as error:
            raise OSError(
                f"--jobs: a process ended before its experiment did, out of memory perhaps with {jobs} at a time; "
                "the same command goes on where it stopped"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def run_logged(config: Config) -> dict[str, Any]:
    """One experiment; what it has to say goes to a file in its folder."""
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / LOG).open("a", encoding="utf-8") as file:
        return run_or_say_why(config, Console(file=file, width=120))


def run_or_say_why(config: Config, console: Console) -> dict[str, Any]:
    """A run whose loss became NaN is a result too; wrong data or settings are not."""
    try:
        return run_experiment(config, console)
    except FloatingPointError as error:
        return {"error": str(error)}
