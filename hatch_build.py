"""What the package's metadata say of where the project lives; `CITATION.cff` is the one place that knows."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s]+)\)")  # to a file of the repository


class Addresses(MetadataHookInterface):
    """Give the metadata a README and, where there is a repository, its addresses."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Change the table `project` of `pyproject.toml` in place."""
        known = address_of(Path(self.root, "CITATION.cff").read_text(encoding="utf-8"))
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = known.get("repository-code")
        metadata["urls"] = {}
        if repository:
            metadata["urls"] = {
                "Repository": repository,
                "Documentation": known.get("url", f"{repository}/tree/main/docs"),
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            }
            readme = absolute(readme, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}


def address_of(citation: str) -> dict[str, str]:
    """`repository-code`, and the `url` of the site, of a CITATION.cff; neither, while it names none."""
    return dict(re.findall(r"^(repository-code|url): *\"?(https://[^\"\s]+?)/*\"?$", citation, flags=re.MULTILINE))


def absolute(readme: str, repository: str, tag: str) -> str:
    """Let links and pictures lead to the repository at a tag: a package index shows a README without its files."""

    def change(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}{link[2]}({repository}/{kind}/{tag}/{link[3]})"

    return LINK.sub(change, readme)
