"""What the project runs and installs: nothing that makes code of a file, nothing that is not pinned."""

import ast
import importlib.metadata
import mmap
import pickle
import pickletools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT
from mtmd.files import safe_pickle

SOURCES = sorted(path for folder in ("src", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# What makes code of data: builtins, and names with all that lies below them.
BUILTINS = {"eval", "exec", "compile", "__import__", "globals", "breakpoint"}
NAMES = (
    *("builtins", "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "jsonpickle", "pandas.read_pickle"),
    *("marshal", "shelve", "dbm", "yaml", "runpy", "code", "codeop", "imp", "pty", "os.system", "os.popen"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "numpy.f2py", "numpy.ctypeslib", "numpy.testing"),
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.hub", "torch.package", "torch.serialization"),
    "torch.utils.cpp_extension",
)
# Arguments that may have one value, written out.
SAFE = {"weights_only": True, "allow_pickle": False, "shell": False, "trust_remote_code": False, "verify": True}
OPCODES = {f"pickle.{name}" for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes)}
ALLOWED = {
    # It is about the opcodes, and takes the unpickler whose table of them it replaces.
    "safe_pickle.py": {"pickle", "pickle._Unpickler", "pickle._Unpickler.dispatch", *OPCODES},
    # It looks up four names in a table of its own.
    "watch_data.py": {"pickle", "pickle.Unpickler"},
    # It reads what it has written the moment before.
    "export.py": {"torch.export.load"},
    # The loops that everybody knows, with weights_only=True: see SAFE.
    "plain_loop.py": {"torch.load"},
    "quickstart.py": {"torch.load"},
    # Snapshots of averages, file by file, with weights_only=True as well.
    "schedules.py": {"torch.load"},
}


def references(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of what is imported, and of every use of it: `np.load` is numpy.load."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                known[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else ""
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        below = node
        while isinstance(below, ast.Attribute):
            parts.insert(0, below.attr)
            below = below.value
        if isinstance(below, ast.Name) and below.id in known:
            yield node.lineno, ".".join([known[below.id] or below.id, *parts])


def findings(source: str, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """What is in the source of a file that should not be."""
    tree = ast.parse(source)
    found = [
        f"line {line}: {name}"
        for line, name in references(tree)
        if name not in allowed and any(f"{name}.".startswith(f"{bad}.") for bad in NAMES)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILTINS:
            found.append(f"line {node.lineno}: {node.id}")
        if isinstance(node, ast.keyword) and node.arg in SAFE and ast.unparse(node.value) != str(SAFE[node.arg]):
            found.append(f"line {node.lineno}: {node.arg}={ast.unparse(node.value)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_makes_code_of_a_file(path):
    assert findings(path.read_text(encoding="utf-8"), ALLOWED.get(path.name, frozenset())) == []


@pytest.mark.parametrize(
    "source",
    [
        *("eval(x)", "exec(x)", "f = eval", "compile(x, '', 'exec')", "__import__('os')", "from builtins import eval"),
        *("import torch\ntorch.load(x)", "import torch as t\nt.load(x)", "from torch import load", "import torch.hub"),
        *("import pickle", "from pickle import loads as f", "import cPickle", "import shelve", "import marshal"),
        *("import yaml", "import numpy as np\nnp.load(x, allow_pickle=True)", "f(x, weights_only=False)"),
        *("f(x, weights_only=wanted)", "import os\nos.system(x)", "run(x, shell=True)", "f(trust_remote_code=True)"),
        *("from torch.utils import cpp_extension", "import torch.jit\ntorch.jit.load(x)", "import runpy"),
    ],
)
def test_what_makes_code_of_a_file_is_found(source):
    assert findings(source)


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile(x)", "self.load(x)", "f(weights_only=True)", "code = 1"]
)
def test_what_does_not_is_left_alone(source):
    assert findings(source) == []


# The reader of pickles


def test_the_reader_of_pickles_says_what_is_allowed_and_refuses_the_rest():
    with mmap.mmap(-1, 1) as nothing:
        reader = safe_pickle._Reader(nothing)
    cores = ("numpy.core", "numpy._core")
    assert set(reader._names) == {
        *((f"{core}.multiarray", name) for core in cores for name in ("_reconstruct", "scalar")),
        *((f"{core}.numeric", "_frombuffer") for core in cores),
        *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict")),
        *(("builtins", "bytes"), ("__builtin__", "bytes")),
    }
    # None leads to the thing of that name.
    for value in reader._names.values():
        assert getattr(value, "__module__", "mtmd.files.safe_pickle") == "mtmd.files.safe_pickle"
    for module, name in (
        ("numpy", "load"),
        ("numpy.core.multiarray", ""),
        ("", ""),
        ("collections", "OrderedDict.pop"),
    ):
        with pytest.raises(safe_pickle.UnsafePickleError, match="asks for"):
            reader.find_class(module, name)


def test_every_opcode_that_is_not_allowed_is_refused():
    allowed = set(safe_pickle._OPCODES.split())
    names = {opcode.name for opcode in pickletools.opcodes}
    assert allowed < names
    assert len(safe_pickle._Reader.dispatch) == len(names)
    for opcode in pickletools.opcodes:
        if opcode.name not in allowed:
            with pytest.raises(safe_pickle.UnsafePickleError, match=opcode.name):
                safe_pickle._Reader.dispatch[ord(opcode.code)](None)


def test_the_reader_of_pickles_has_no_list_of_what_is_forbidden():
    """Such a list is never complete. What the source knows by name is what it allows."""
    source = Path(safe_pickle.__file__).read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    modules = {text for text in texts if isinstance(text, str) and re.fullmatch(r"[a-z_]\w*(\.\w+)*", text)}
    assert modules & {"os", "posix", "sys", "subprocess", "builtins.eval", "eval", "exec", "system", "open"} == set()
    assert re.search(r"deny|block_?list|black_?list|forbidden|banned", source, re.IGNORECASE) is None


# What is installed


def project() -> dict[str, Any]:
    """What pyproject.toml says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    """Version by name, as constraints.txt has them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.!+]+)", line) for line in lines]
    assert None not in pairs, lines[pairs.index(None)]
    names = [canonicalize_name(pair[1]) for pair in pairs if pair is not None]
    assert len(set(names)) == len(names)
    return dict(zip(names, (pair[2] for pair in pairs if pair is not None), strict=True))


def asked_for() -> set[Requirement]:
    """What `make` installs: the package with its example, and every group."""
    texts = [
        *project()["build-system"]["requires"],
        *project()["project"]["dependencies"],
        *project()["project"]["optional-dependencies"]["examples"],
        *(entry for group in project()["dependency-groups"].values() for entry in group if isinstance(entry, str)),
        *re.findall(r'"(pip>=[\d.]+)"', (ROOT / "Makefile").read_text(encoding="utf-8")),
    ]
    return {Requirement(text) for text in texts}


def with_theirs(requirements: set[Requirement]) -> dict[str, str]:
    """Names with who asks for them; of what is installed also all that it requires here, unless it comes alone."""
    asking, waiting = {}, [(requirement, "pyproject.toml") for requirement in requirements]
    seen = {(canonicalize_name(Requirement(text).name), "") for text in project()["dependency-groups"]["peers"]}
    while waiting:
        requirement, by = waiting.pop()
        name = canonicalize_name(requirement.name)
        asking.setdefault(name, by)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                theirs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            below = [Requirement(text) for text in theirs]
            waiting += [(one, name) for one in below if one.marker is None or one.marker.evaluate({"extra": extra})]
    return asking


def test_everything_that_make_installs_is_pinned():
    pinned = pins()
    assert {name: by for name, by in with_theirs(asked_for()).items() if name not in pinned} == {}


def test_every_pin_fits_what_is_asked_for():
    pinned = pins()
    assert [str(one) for one in asked_for() if pinned[canonicalize_name(one.name)] not in one.specifier] == []


# Workflows


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))  # none in an sdist


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_of_the_makefile_and_actions_of_one_commit(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    runs = re.findall(r"\brun: *(.*)", text)
    assert [command for command in runs if command.removeprefix("make ") not in targets] == []
    actions = re.findall(r"\buses: *(.*)", text)
    assert [use for use in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", use)] == []
    assert runs
    assert actions
    assert "secrets." not in text
    assert re.search(r"^permissions:\n  contents: read\n", text, flags=re.MULTILINE)


@pytest.mark.skipif(not WORKFLOWS, reason="no .github: an sdist")
def test_what_is_published_is_what_was_tested_and_attested():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    build, publish = text.split("\n  publish:\n")
    assert re.findall(r"run: make (\w+)", build) == ["check", "test", "dist"]
    assert "needs: build" in publish
    assert "id-token: write" in publish
    assert "id-token" not in build
    assert "attestations: true" in publish


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist has no history")
def test_no_large_file_is_kept():
    """Such as a wheel that was downloaded among the sources."""
    git = shutil.which("git")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    large = {name: size for name in listed.split("\0") if name and (size := (ROOT / name).stat().st_size) > 500_000}
    assert large == {}
