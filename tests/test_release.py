"""The wheel and the sdist: the same bytes whenever and wherever they are built, and only what belongs there."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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


def test_two_builds_are_the_same_to_the_last_bit(builds):
    first, second = builds
    assert set(first) == {WHEEL, SDIST}
    for name, content in first.items():
        assert second[name] == content, name


def test_the_wheel_holds_the_package_and_nothing_else(builds):
    names = set(zipfile.ZipFile(io.BytesIO(builds[0][WHEEL])).namelist())
    package = {f"momentum_distill/{path.name}" for path in (ROOT / "src" / "momentum_distill").glob("*.py")}
    about = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    assert names == {
        *package,
        "momentum_distill/py.typed",
        *(f"momentum_distill-{VERSION}.dist-info/{name}" for name in about),
    }


def test_the_sdist_holds_what_building_and_testing_need(builds):
    with tarfile.open(fileobj=io.BytesIO(builds[0][SDIST])) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"pyproject.toml", "README.md", "LICENSE", "SECURITY.md", "Makefile", "constraints.txt"} <= names
    assert {f"src/momentum_distill/{name}" for name in ("__init__.py", "py.typed")} <= names
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= names
    assert [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".log"))] == []
