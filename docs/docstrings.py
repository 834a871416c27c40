"""Docstrings as this project writes them, in the words that mkdocstrings knows."""

import re
from pathlib import Path
from typing import Any

import griffe
from markdown.extensions.toc import slugify

HERE = Path(__file__).resolve().parent


class Docstrings(griffe.Extension):
    """Cross-references, sections and formulas, changed before mkdocstrings parses them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401 - whatever else griffe passes
        """Change one docstring in place."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        text = re.sub(r"^\n?( *)(\$\$.+?\$\$)\n?$", r"\n\1\2\n", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`docs/(\w+)\.md`", lambda page: _link_to_page(page[1]), text)
        text = re.sub(r":\w+:`~?([\w.]+)`", lambda role: _link_to_name(obj, role[1]), text)
        obj.docstring.value = text


def _link_to_page(name: str) -> str:
    """A link to the heading of a page."""
    title = re.findall(r"^# (.+)$", (HERE / f"{name}.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    return f"[{title}][{slugify(title, '-')}]"


def _link_to_name(obj: griffe.Object, name: str) -> str:
    """A link to what `name` means where the docstring of `obj` stands: a member beside or below it, or a full path."""
    short = name.rpartition(".")[2]
    scope: griffe.Object | griffe.Module | None = obj
    while scope is not None:
        if name in scope.members:
            return f"[`{short}`][{scope.path}.{name}]"
        scope = scope.parent
    return f"[`{short}`][{name}]"
