"""What `mkdocs build` does beside its plugins: pages of files that lie outside `docs/`.

Some files of the repository are pages as they stand, the changelog for one. Any other that a page links to, say
`../examples/mtmd_mosi.py`, gets a page that shows it. So every link leads somewhere both in the repository and here.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|[#/<])[^)#\s]+")  # to a file: neither another site nor a place in the page
LANGUAGES = {".py": "py", ".toml": "toml", ".sh": "sh", ".yml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of PAGES, and one for each other file outside `docs/` that a page links to."""
    root = Path(config.docs_dir).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(root / source).read_text(encoding="utf-8")))
    for target in sorted({target for page in files.documentation_pages() for target in _targets(page)}):
        if _page_of(target).startswith("files/") and (root / target).is_file():
            files.append(File.generated(config, _page_of(target), content=_show(root, target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages."""
    del config

    def change(link: re.Match[str]) -> str:
        target = _page_of(_resolve(page.file.src_uri, link[0]))
        if files.get_file_from_path(target) is None:
            return link[0]  # not there: mkdocs says so
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(change, markdown)


def _targets(page: File) -> Iterator[str]:
    """The files that a page links to, from the root of the repository."""
    for link in LINK.findall(page.content_string):
        yield _resolve(page.src_uri, link)


def _resolve(page: str, link: str) -> str:
    """The file, from the root of the repository, that a link of a page leads to."""
    home = "" if page in PAGES.values() else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(home, link))


def _page_of(file: str) -> str:
    """The page, or another file below `docs/`, that a file of the repository is on the site."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return PAGES.get(file, f"files/{file.replace('.', '_')}.md")


def _show(root: Path, file: str) -> str:
    """A file as a page; the search is to find what explains it, not its code."""
    content = (root / file).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(file).suffix, "text")
    head = f"---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {Path(file).name}\n\n`{file}`\n\n"
    return f"{head}````{language}\n{content}````\n"
