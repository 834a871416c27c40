"""Mutation testing: would a test notice if a line of `src/` were wrong?

    make mutants                          # begin, or go on
    python tests/mutation/mutants.py --again       # tests were added: try those that lived once more

[mutmut](https://mutmut.readthedocs.io) writes the mutants, each one change to one function, into `mutants/`. This file
runs them: the tests are imported once, and every mutant gets a fork of that process, in which the tests that reach its
function run, the cheapest first, until one fails or `--seconds` of tests have passed. What survives one group of tests
goes on to the next. It takes hours and can be interrupted: it goes on where it was. `survivors.toml` says of
those that survive all why they are the same program, or no program's concern; the others are in
`mutants/survivors.txt`, to be read.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mutants"
VERDICTS = FOLDER / "verdicts.jsonl"
EXPLAINED = Path(__file__).with_name("survivors.toml")

BLOCKS = ("blocks", "contrast", "ema", "fusion", "hard_sample", "queue", "response", "sigmoid")  # folders of tests/
OF_RANKS = ["tests/blocks/test_distributed_blocks.py", "tests/blocks/test_distributed.py"]
ELSEWHERE = ("compile", "cuda", "docstrings", "integrations", "triton")  # slow, or not about a line of src/


def of_one_process() -> list[str]:
    files = sorted(path for block in BLOCKS for path in (ROOT / "tests" / block).glob("test_*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in files if not any(name in path.name for name in ELSEWHERE)]
    return [name for name in names if name not in OF_RANKS] + ["tests/project/test_docs_parity.py", "src"]


# What one process shows, what takes several ranks, and what takes Triton's interpreter. Files of the example are left
# out: they test the example.
GROUPS = {"one process": of_one_process(), "ranks": OF_RANKS, "triton": ["tests/contrast/triton_cases.py"]}
# Compilation takes longer than all else together.
OPTIONS = ["--rootdir=.", "--tb=native", "-q", "-p", "no:cacheprovider", "-k", "not compile"]


def make() -> None:
    """Write `mutants/`: the sources with all mutants in them, and what the tests need. Tests are copied each time."""
    from mutmut.__main__ import create_mutants
    from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths

    sources = sorted((ROOT / "src").rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    FOLDER.mkdir(exist_ok=True)
    made_of = FOLDER / "sources.sha256"
    if made_of.exists() and made_of.read_text(encoding="utf-8") != digest:
        sys.exit(f"src/ is not what {FOLDER.name}/ was made of. Remove the folder to begin anew.")
    made_of.write_text(digest, encoding="utf-8")
    copy_src_dir()
    copy_also_copy_files()
    setup_source_paths()
    create_mutants(os.cpu_count() or 1)


def mutants() -> list[str]:
    """Names of all mutants."""
    names = []
    for path in sorted((FOLDER / "src").rglob("*.meta")):
        names += json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return names


def verdicts() -> dict[str, dict[str, str]]:
    """How each mutant left each group that it has met: "killed", "killed by time", "lives" or "not reached"."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    if VERDICTS.exists():
        for line in VERDICTS.read_text(encoding="utf-8").splitlines():
            verdict = json.loads(line)
            found[verdict["mutant"]][verdict["group"]] = verdict["how"]
    return found


def survivors() -> list[str]:
    """Names of the mutants that no group has killed."""
    found = verdicts()
    return [name for name in mutants() if not any(how.startswith("killed") for how in found[name].values())]


def forget() -> None:
    """Keep the verdicts on the killed, drop the others and the coverage."""
    lines = VERDICTS.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["how"].startswith("killed")]
    VERDICTS.write_text("".join(kept), encoding="utf-8")
    for path in FOLDER.glob("coverage *.json"):
        path.unlink()


def report() -> None:
    """Print how many were killed by what, and write the changes of those that live."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    found, total, alive = verdicts(), len(mutants()), survivors()
    for group in GROUPS:
        counts = defaultdict(int)
        for met in found.values():
            counts[met.get(group, "not run")] += 1
        print(f"{group}: " + ", ".join(f"{count} {how}" for how, count in sorted(counts.items())))
    print(f"{total - len(alive)} of {total} killed, {100 * (1 - len(alive) / total):.1f} %")
    reasons = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))["reason"]
    counts, unexplained = defaultdict(int), 0
    with (FOLDER / "survivors.txt").open("w", encoding="utf-8") as file:
        for name in alive:
            changed = [line for line in get_diff_for_mutant(name).splitlines()[2:] if line[:1] in ("+", "-")]
            before, after = (" ".join(line[1:].strip() for line in changed if line[0] == sign) for sign in "-+")
            why = reason(reasons, function_of(name), before, after)
            if why is None:
                unexplained += 1
                file.write("\n".join([name, *changed, ""]))
            else:
                counts[why] += 1
    print(f"{len(alive)} live, {unexplained} of them without a reason in {EXPLAINED.name}:")
    for why, count in sorted(counts.items(), key=lambda entry: -entry[1]):
        print(f"{count:5} {why}")


def function_of(mutant: str) -> str:
    """`tiles._Sums.add` of `momentum_distill._contrast.tiles.xǁ_Sumsǁadd__mutmut_3`."""
    *_, module, function = mutant.split(".")
    *owner, name = function.rpartition("__mutmut_")[0].removeprefix("x").removeprefix("ǁ").split("ǁ")
    return ".".join([module, *owner, name if owner else name.removeprefix("_")])


def reason(reasons: list[dict], function: str, before: str, after: str) -> str | None:
    """Why it is no matter that a line of this function was another, or None."""
    for entry in reasons:
        if any(re.fullmatch(pattern, f"{before} => {after}") for pattern in entry.get("patterns", ())):
            return entry["why"]
        for change in entry.get("changes", ()):
            where, _, what = change.partition(": ")
            if where == function and what in after:
                return entry["why"]
    return None


class Coverage:
    """Notes which tests reach which function, also in the processes of `ranks`, and how long each takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, set[str]] = defaultdict(set)
        folder.mkdir(exist_ok=True)

    def pytest_runtest_makereport(self, item, call) -> None:
        self.seconds[item.nodeid] += call.duration

    def pytest_runtest_teardown(self, item) -> None:
        from mutmut.state import state

        reached = set(state()._stats)
        state()._stats.clear()
        for note in self.folder.iterdir():
            reached |= set(json.loads(note.read_text(encoding="utf-8")))
            note.unlink()
        for function in reached:
            self.tests[function].add(item.nodeid)

    def tell(self, work):
        """`ranks._work`, which tells before each answer what its process has reached."""

        class Pipe:
            def __init__(self, pipe) -> None:
                self.recv = pipe.recv
                self._send = pipe.send

            def send(pipe, answer) -> None:
                from mutmut.state import state

                (self.folder / str(os.getpid())).write_text(json.dumps(sorted(state()._stats)), encoding="utf-8")
                state()._stats.clear()
                pipe._send(answer)

        return lambda pipe: work(Pipe(pipe))


class Executioner:
    """In the place of pytest's loop over tests: for every mutant a fork, and in it the loop over its own tests."""

    def __init__(self, group: str, names: list[str], seconds: float) -> None:
        self.group, self.names, self.budget = group, names, seconds
        cover = json.loads((FOLDER / f"coverage {group}.json").read_text(encoding="utf-8"))
        self.seconds, self.tests = cover["seconds"], cover["tests"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        from mutmut.utils.format_utils import mangled_name_from_mutant_name

        items = {item.nodeid: item for item in session.items}
        for name in self.names:
            tests = [test for test in self.tests.get(mangled_name_from_mutant_name(name), []) if test in items]
            how = (
                self.run(session, name, [items[test] for test in self.chosen(name, tests)]) if tests else "not reached"
            )
            with VERDICTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"mutant": name, "group": self.group, "how": how}) + "\n")
        return True

    def chosen(self, name: str, tests: list[str]) -> list[str]:
        """The cheapest tests that fit the budget: first a few at random, as neighbours are alike, then by cost."""
        tests = sorted(tests, key=self.seconds.__getitem__)
        total, fitting = 0.0, []
        for test in tests:
            total += self.seconds[test]
            if fitting and total > self.budget:
                break
            fitting.append(test)
        few = random.Random(name).sample(fitting, min(12, len(fitting)))
        few = [test for test in few if self.seconds[test] < 0.5]
        return few + [test for test in fitting if test not in few]

    def run(self, session, name: str, items: list) -> str:
        from _pytest.main import pytest_runtestloop
        from mutmut.mutation.trampoline import set_mutant_under_test

        deadline = time.monotonic() + 30 + 5 * sum(self.seconds[item.nodeid] for item in items)
        process = os.fork()
        if process == 0:
            os.setpgid(0, 0)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            set_mutant_under_test(name)
            failed = True
            try:
                session.items = items
                pytest_runtestloop(session)
                failed = bool(session.testsfailed)
            finally:
                os._exit(int(failed))
        while time.monotonic() < deadline:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.end(process)
                return "killed" if status else "lives"
            time.sleep(0.005)
        self.end(process)
        os.waitpid(process, 0)
        return "killed by time"

    def end(self, process: int) -> None:
        """The fork, and the ranks that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def work(group: str, part: int, parts: int, seconds: float) -> None:
    """Measure the coverage of a group, or run the tests of this group for a part of the mutants that live."""
    import torch
    from mutmut.mutation.trampoline import set_mutant_under_test

    sys.path.insert(0, str(FOLDER / "tests"))
    import ranks

    torch.set_num_threads(1)
    ranks._context = multiprocessing.get_context("fork")  # a rank knows by its memory which mutant it is
    if part < 0:
        set_mutant_under_test("stats")
        coverage = Coverage(FOLDER / "reached")
        ranks._work = coverage.tell(ranks._work)
        if pytest.main([*OPTIONS, *GROUPS[group]], plugins=[coverage]) != 0:
            sys.exit("The tests fail without a mutant.")
        tests = {function: sorted(reached) for function, reached in coverage.tests.items()}
        text = json.dumps({"seconds": coverage.seconds, "tests": tests})
        (FOLDER / f"coverage {group}.json").write_text(text, encoding="utf-8")
        return
    set_mutant_under_test("")
    ranks.Ranks.run.__kwdefaults__["limit"] = 12.0  # a mutant that hangs its ranks has been noticed by then
    found = verdicts()
    names = [name for name in survivors() if group not in found[name]]
    random.Random(0).shuffle(names)
    pytest.main([*OPTIONS, "-x", *GROUPS[group]], plugins=[Executioner(group, names[part::parts], seconds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests in each group for one mutant")
    parser.add_argument("--parts", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--again", action="store_true", help="run those that lived once more: tests were added")
    parser.add_argument("--work", nargs=2, metavar=("GROUP", "PART"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work[0], int(given.work[1]), given.parts, given.seconds)
        return
    os.chdir(ROOT)
    make()
    if given.again:
        forget()
    for group in GROUPS:
        environment = os.environ | {"PYTHONPATH": str(FOLDER / "src"), "OMP_NUM_THREADS": "1"}
        if group == "triton":
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, str(Path(__file__).resolve()), "--parts", str(given.parts)]
        command += ["--seconds", str(given.seconds), "--work", group]

        def start(part: int, command=command, environment=environment) -> subprocess.Popen:
            return subprocess.Popen([*command, str(part)], cwd=FOLDER, env=environment)

        if not (FOLDER / f"coverage {group}.json").exists() and start(-1).wait():
            sys.exit(1)
        for process in [start(part) for part in range(given.parts)]:
            process.wait()
    report()


if __name__ == "__main__":
    main()
