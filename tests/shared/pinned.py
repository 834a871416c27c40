"""Tables that the tests hold the package to: files that a command writes, which stands at their beginning."""

import json
from pathlib import Path
from typing import Any

HEAD = "written by"


def read(path: Path) -> dict[str, Any]:
    """What `write` was given."""
    table = json.loads(path.read_text(encoding="utf-8"))
    del table[HEAD]
    return table


def write(path: Path, table: dict[str, Any], *, command: str, indent: int = 0) -> None:
    text = json.dumps({HEAD: command} | table, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """What `write_lines` was given."""
    return path.read_text(encoding="utf-8").splitlines()[1:]


def write_lines(path: Path, lines: list[str], *, command: str) -> None:
    path.write_text("\n".join([f"# {HEAD}: {command}", *lines]) + "\n", encoding="utf-8")
