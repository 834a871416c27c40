"""Build the site.

    python docs/build.py              into site/
    python docs/build.py --out FOLDER

The tool that makes HTML works on a copy, in which whatever a page links to is a page itself. Some files of the
repository are pages as they stand, the changelog for one, or the notebook with what it printed and drew. Any other that
is linked to, say `../examples/mtmd_mosi.py`, gets a page that shows it. So every link leads somewhere both in the
repository and on the site.
"""

import argparse
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/tour.ipynb": "tour.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/<])[^)#\s]+")  # to a file: neither another site nor a place in the page
LANGUAGES = {".py": "py", ".toml": "toml", ".sh": "sh", ".yml": "yaml"}


# ---------------------------------------------------------------------------------------------------- before: pages


def gather(work: Path) -> None:
    """Copy what the site is made of into a folder, pages of files outside `docs/` included."""
    docs = work / "docs"
    shutil.copy(ROOT / "mkdocs.yml", work)
    for folder in ("src", "docs"):
        shutil.copytree(ROOT / folder, work / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        (docs / page).write_text(_cells(content) if source.endswith(".ipynb") else content, encoding="utf-8")
    texts = {path.relative_to(docs).as_posix(): path.read_text(encoding="utf-8") for path in docs.rglob("*.md")}
    shown = {target for page, text in texts.items() for target in _targets(page, text)}
    texts |= {_page_of(target): _show(target) for target in shown if _page_of(target).startswith("files/")}
    for page, text in texts.items():
        path = docs / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if page.startswith("files/") else _lead_to_pages(page, text, docs, set(texts)), "utf-8")


def _targets(page: str, text: str) -> Iterator[str]:
    """The files that a page links to, from the root of the repository."""
    for link in LINK.findall(text):
        target = _resolve(page, link)
        if (ROOT / target).is_file():
            yield target


def _lead_to_pages(page: str, text: str, docs: Path, pages: set[str]) -> str:
    """Let the links of a page lead to pages; what is not there is left, for the tool to say so."""

    def change(link: re.Match[str]) -> str:
        target = _page_of(_resolve(page, link[0]))
        if target not in pages and not (docs / target).is_file():
            return link[0]
        return posixpath.relpath(target, posixpath.dirname(page) or ".")

    return LINK.sub(change, text)


def _resolve(page: str, link: str) -> str:
    """The file, from the root of the repository, that a link of a page leads to."""
    home = posixpath.dirname(SOURCES.get(page, posixpath.join("docs", page)))
    return posixpath.normpath(posixpath.join(home, link))


def _page_of(file: str) -> str:
    """The page, or another file below `docs/`, that a file of the repository is on the site."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return PAGES.get(file, f"files/{file.replace('.', '_')}.md")


def _show(file: str) -> str:
    """A file as a page; the search is to find what explains it, not its code."""
    content = (ROOT / file).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(file).suffix, "text")
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {Path(file).name}\n\n`{file}`\n\n"
    return f"{head}````{language}\n{content}````\n"


def _cells(notebook: str) -> str:
    """A notebook as a page, its stored outputs included."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"````py\n{source}\n````" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"````text\n{''.join(output['text'])}````")
            else:
                picture = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f'<img alt="what the cell above draws" src="data:image/png;base64,{picture}">')
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------- after: search

SOURCE = re.compile(r"Source code in <code>.*?</pre>", flags=re.DOTALL)
FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", flags=re.DOTALL)  # \( … \) or \[ … \]
WORDS = {"log": "log", "ge": "≥", "to": "→", "infty": "∞", ",": " "}  # and Greek letters


def clean_search(site: Path) -> None:
    """Let the search leave source code out, and show a formula as text, or as three dots where it needs more."""
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for item in index["items"]:
        for part in ("title", "text"):
            item[part] = FORMULA.sub(lambda found: _plain(found[1] or found[2]), SOURCE.sub("", item[part]))
    text = json.dumps(index)
    (site / "search.json").write_text(text, encoding="utf-8")
    (site / "search.js").write_text(f"var __index = {text}", encoding="utf-8")  # where the site is opened as a file


def _plain(formula: str) -> str:
    r"""`\tau`, `\log K` and `2^{14}` as τ, log K and 2^14."""
    text = re.sub(r"\\([A-Za-z]+|.)", lambda found: _symbol(found[1]), formula)
    return "…" if "\\" in text else text.replace("{", "").replace("}", "")


def _symbol(name: str) -> str:
    try:
        return unicodedata.lookup(f"GREEK SMALL LETTER {name}")
    except KeyError:
        return WORDS.get(name, "\\")


# ----------------------------------------------------------------------------------------------------------- build


def addresses() -> dict[str, str]:
    """Where the project lives, if anywhere, as mkdocs.yml asks for it."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    keys = {"REPOSITORY_URL": "repository-code", "SITE_URL": "url"}
    return {name: cited.get(key, "").rstrip("/") for name, key in keys.items()}


def build(out: Path) -> None:
    """Pages, HTML, search."""
    with TemporaryDirectory() as work:
        gather(Path(work))
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        subprocess.run(command, cwd=work, env=addresses() | os.environ, check=True)
        clean_search(Path(work, "site"))
        if out == SITE:
            shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(work, "site"), out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=SITE, help="a new folder (default: site/, made anew)")
    build(parser.parse_args(arguments).out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
