"""The wheel and the sdist: the same bytes whenever and wherever they are built, only what belongs there, and enough."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
WHEEL, SDIST = f"momentum_distill-{VERSION}-py3-none-any.whl", f"momentum_distill-{VERSION}.tar.gz"


def build(tree: Path, *, umask: int, **environment: str) -> dict[str, bytes]:
    """What `make dist` makes of a source tree: content by file name."""
    out = tree.with_name("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree],
        check=True,
        capture_output=True,
        umask=umask,
        env=os.environ | environment,
    )
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Two, in different folders, of files of different age and rights, under another umask and in another time zone."""
    first = tmp_path_factory.mktemp("first") / "tree"
    first.mkdir()
    included = [path.removeprefix("/") for path in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    for name in (".gitignore", "pyproject.toml", *included):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, first / name)
    second = shutil.copytree(first, tmp_path_factory.mktemp("second") / "another name")
    for number, path in enumerate(sorted(second.rglob("*"))):
        path.chmod(0o700 if path.is_dir() else 0o600)
        os.utime(path, (10**9 + number, 10**9 + number))
    return build(first, umask=0o022, TZ="UTC"), build(second, umask=0o077, TZ="Asia/Tokyo", PYTHONHASHSEED="1")


@pytest.mark.long
def test_two_builds_are_the_same_to_the_last_bit(builds):
    first, second = builds
    assert set(first) == {WHEEL, SDIST}
    for name, content in first.items():
        assert second[name] == content, name


def test_the_wheel_holds_the_package_and_nothing_else(builds):
    names = set(zipfile.ZipFile(io.BytesIO(builds[0][WHEEL])).namelist())
    package = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    assert names == {
        *package,
        "momentum_distill/py.typed",
        *(f"momentum_distill-{VERSION}.dist-info/{name}" for name in about),
    }


def test_the_sdist_holds_what_building_and_testing_need(builds):
    with tarfile.open(fileobj=io.BytesIO(builds[0][SDIST])) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "SECURITY.md",
        "CITATION.cff",
        "CODE_OF_CONDUCT.md",
        "Makefile",
        "constraints.txt",
        "hatch_build.py",
    } <= names
    assert {f"src/momentum_distill/{name}" for name in ("__init__.py", "py.typed")} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")} <= names
    assert [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".log"))] == []


def test_every_file_has_the_version():
    """Under the workflow that a tag starts, the tag too, and a release has a day."""
    tag = os.environ.get("GITHUB_REF_NAME") if os.environ.get("GITHUB_REF_TYPE") == "tag" else None
    assert tag in (None, f"v{VERSION}")
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(\S+)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert [name for name, _ in headings[:2]] == ["Unreleased", VERSION]
    assert tag is None or headings[1][1]


def test_the_classifiers_name_the_pythons_that_the_workflows_run():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not workflows:
        pytest.skip("no .github: an sdist")
    run = {found for path in workflows for found in re.findall(r'python-version: "?([\d.]+)', path.read_text())}
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)\b", "\n".join(PROJECT["project"]["classifiers"]))
    assert run == set(named)
    assert PROJECT["project"]["requires-python"] == f">={min(named, key=lambda name: int(name.partition('.')[2]))}"


def about(tree: Path, addresses: str) -> tuple[dict[str, Any], list[str]]:
    """With these lines in CITATION.cff: the metadata, and the addresses that the site is built with.

    What the site makes of them: test_docs_site.py.
    """
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "src").symlink_to(ROOT / "src")
    others = re.sub(r"^(repository-code|url):.*\n", "", (ROOT / "CITATION.cff").read_text("utf-8"), flags=re.MULTILINE)
    (tree / "CITATION.cff").write_text(others + addresses, encoding="utf-8")
    said = run(sys.executable, "-m", "hatchling", "metadata", folder=tree).stdout
    (tree / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "build.py", tree / "docs")
    show = "import build, json; print(json.dumps([*build.addresses().values()]))"
    return json.loads(said), json.loads(run(sys.executable, "-c", show, folder=tree / "docs").stdout)


def test_without_an_address_nothing_names_one(tmp_path):
    metadata, site = about(tmp_path, "")
    assert not metadata.get("urls")
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text(encoding="utf-8")
    assert site == ["", ""]


@pytest.mark.parametrize("written", ["{}", "{}/", '"{}"'])
def test_an_address_stands_once_and_metadata_readme_and_site_have_it(written, tmp_path):
    addresses = [repository, _] = ["https://host.example/owner/name", "https://pages.example/name"]
    metadata, site = about(tmp_path, f"repository-code: {written}\nurl: {written}\n".format(*addresses))
    assert site == addresses
    assert [metadata["urls"][name] for name in ("Repository", "Documentation")] == addresses
    assert all(metadata["urls"][name].startswith(f"{repository}/") for name in ("Issues", "Changelog"))

    links = r"\]\((?!https?:)([^)]+)\)"
    here = re.findall(links, (ROOT / "README.md").read_text(encoding="utf-8"))
    kinds = ["raw" if target.endswith(".svg") else "blob" for target in here]
    there = [f"{repository}/{kind}/v{VERSION}/{target}" for kind, target in zip(kinds, here, strict=True)]
    assert "raw" in kinds
    assert all(f"]({target})" in metadata["readme"]["text"] for target in there)
    assert re.findall(links, metadata["readme"]["text"]) == []


def closure(name: str) -> list[Distribution]:
    """An installed package and all that it requires."""
    found, wanted = set(), [(name, "")]  # with an extra
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) not in found:
            found.add((name, extra))
            required = map(Requirement, distribution(name).requires or ())
            needed = [each for each in required if not each.marker or each.marker.evaluate({"extra": extra})]
            wanted += [(each.name, extra) for each in needed for extra in ("", *each.extras)]
    return [distribution(name) for name in {name for name, _ in found}]


@pytest.fixture(scope="module")
def installed(builds, tmp_path_factory) -> Path:
    """The Python of a new environment that holds torch, what it requires, and the wheel; links spare the download."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    for package in closure("torch"):
        for name in {path.parts[0] for path in package.files} - {"..", "__pycache__"}:
            if not (site / name).exists():  # NVIDIA's packages share a folder
                (site / name).symlink_to(package.locate_file(name))
    (folder / WHEEL).write_bytes(builds[0][WHEEL])
    # What the wheel requires beyond torch's own is an error here, for nothing can be fetched: no index, and no settings
    # that name another place. Else pip could replace what the links lead to.
    arguments = ["--quiet", "--disable-pip-version-check", "install", "--no-index", folder / WHEEL]
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *arguments], env=environment, check=True)
    return python


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user would give it, whatever is set for the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MYPY"))}
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_wheel_works_beside_torch_alone(installed, tmp_path):
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    where = run(installed, "-c", "import momentum_distill as md; print(md.__file__, md.__version__)", folder=tmp_path)
    assert where.stdout.split() == [str(next(installed.parents[1].rglob("momentum_distill/__init__.py"))), VERSION]
    assert run(installed, "-c", "import numpy", folder=tmp_path).returncode == 1
    assert run(installed, "-m", "momentum_distill", folder=tmp_path).returncode == 0
    quickstart = run(installed, "quickstart.py", "--epochs", "2", folder=tmp_path)
    assert quickstart.returncode == 0, quickstart.stderr
    assert "MomentumFusionFactors" in quickstart.stdout


@pytest.mark.long
def test_type_checkers_see_the_types_of_the_wheel(installed, tmp_path):
    shutil.copy(ROOT / "examples" / "quickstart.py", tmp_path)
    wrong = [
        "md.ClassQueue('64', {'text': 8})",
        "md.EMAWrapper(torch.nn.Linear(2, 2), decay='slow')",
        "md.SupConDistillLoss(positives='everywhere')",
        "md.SupConDistillLoss().terms(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2)).mean()",
        "md.functional.normalize(torch.eye(2))",
        "md.EMAWrapper(torch.nn.Linear(2, 2))('text')",
        "a: md.EMAWrapper[torch.nn.ReLU] = md.EMAWrapper(torch.nn.Linear(2, 2))",
        "md.EMADict(torch.nn.Linear(2, 2), {'slow': 0.99})['slow']('text')",
        "md.SupConDistillLoss()(torch.eye(2), torch.eye(2), torch.arange(2))",
        "md.SigmoidDistillLoss()(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2), alpah=1)",
        "b: int = md.ResponseDistillLoss(task='regression')(torch.ones(2), torch.ones(2))",
        "md.HardSampleFusionLoss()(torch.ones(2), torch.ones(2))",
        "md.MomentumFusionFactors(['text'])(torch.ones(2))",
    ]
    (tmp_path / "wrong.py").write_text("\n".join(["import torch", "import momentum_distill as md", *wrong, ""]))
    # A few functions of torch have no types.
    strict = [sys.executable, "-m", "mypy", "--python-executable", installed, "--strict", "--allow-untyped-calls"]
    shutil.copy(ROOT / "tests" / "ema" / "typed_average.py", tmp_path)
    pyright = [sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", installed]
    for right in (
        run(*strict, "quickstart.py", "typed_average.py", folder=tmp_path),
        run(*pyright, "typed_average.py", folder=tmp_path),
    ):
        assert right.returncode == 0, right.stdout
    lines = run(*strict, "wrong.py", folder=tmp_path).stdout.splitlines()
    assert [line.split(":")[1] for line in lines if ": error:" in line] == [str(3 + i) for i in range(len(wrong))]


@pytest.mark.long
def test_every_public_type_is_known(installed, tmp_path):
    verify = [sys.executable, "-m", "basedpyright", "--ignoreexternal", "--verifytypes", "momentum_distill"]
    path = f"{installed.parent}{os.pathsep}{os.environ['PATH']}"
    frameworks = sysconfig.get_path("purelib")  # from which the callbacks have their base classes
    done = run(*verify, folder=tmp_path, PATH=path, PYTHONPATH=frameworks)
    assert "Type completeness score: 100%" in done.stdout, done.stdout
