"""Names and arguments that users call: a change here is a change for them, and a line in the CHANGELOG."""

import inspect
import re
import runpy
import subprocess
import sys
from typing import get_type_hints

import pytest

import momentum_distill as md
from conftest import ROOT
from pinned import read_lines
from public_names import PINNED, found


def test_names_and_arguments_are_those_that_were_promised():
    promised = [line for line in read_lines(PINNED) if ".integrations." not in line]
    assert found() == promised, "if that is meant: `python tests/pin.py`, and read the difference"


def test_tables_say_at_their_beginning_who_writes_them():
    tables = [path for kind in ("json", "txt", "toml") for path in (ROOT / "tests").rglob(f"*.{kind}")]
    assert len(tables) > 3
    for path in tables:
        head = path.read_text(encoding="utf-8")[:120]
        said = re.search(r"[Ww]ritten by[\": ]*(?:(hand)|python (tests/[\w/]+\.py))", head)
        assert said, path
        assert said[1] or (ROOT / said[2]).is_file(), path


def test_importing_the_package_does_not_load_what_few_need():
    """`torch.compiler.disable` at the top of a module, say, loads the compiler, which takes seconds."""
    code = "import torch, sys; before = set(sys.modules); import momentum_distill; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {".".join(name.split(".")[:2]) for name in done.stdout.split()}
    assert not loaded & {
        "torch._dynamo",
        "torch._inductor",
        "triton",
        "sympy",
        "lightning",
        "transformers",
        "accelerate",
    }


def test_version_is_that_of_the_package():
    assert md.__version__.count(".") == 2


def test_what_a_bug_report_says(capsys):
    """As a process it runs in test_release.py, beside torch alone, with `make test-long`."""
    runpy.run_module("momentum_distill", run_name="__main__")
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["momentum-distill"].strip() == md.__version__
    assert {"torch", "python", "devices", "distributed", "contrastive loss", "Triton kernel"} <= lines.keys()
    assert "cpu" in lines["devices"]


@pytest.mark.parametrize("name", md.__all__)
def test_everything_public_is_documented(name):
    assert inspect.getdoc(getattr(md, name))


def functions() -> list[object]:
    found = []
    for module in (md, md.functional, md.diagnostics, md.schedules):
        public = [getattr(module, name) for name in module.__all__]
        found += [item for item in public if inspect.isfunction(item)]
        found += [each for item in public if inspect.isclass(item) for each in vars(item).values()]
    return [each for each in found if inspect.isfunction(each)]


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__qualname__)
def test_types_can_be_asked_at_run_time(function):
    asked = get_type_hints(function)
    assert asked.keys() == function.__annotations__.keys()
