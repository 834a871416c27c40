"""Pages below docs/, for tests that hold their tables and figures against the results beside them."""

import re

from conftest import ROOT


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """What stands below a heading of a page, up to the next of two hashes."""
    return page(name).split(f"{heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table, without what makes them bold."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip(" *") for cell in line.split("|")] for line in lines]
