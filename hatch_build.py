"""Metadata that depend on the address of the repository: project.urls, and the page that a package index shows.

The address is `repository` of `[tool.hatch.metadata.hooks.custom]` in pyproject.toml. Below it a release is expected as on
GitHub, GitLab and Gitea: its pages at blob/v0.2.0/FILE, its pictures at raw/v0.2.0/FILE.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

CODE = re.compile(r"(```.*?```)", re.DOTALL)
OURS = r"(?!https?://|mailto:)"
PICTURE = re.compile(rf"(!\[[^\]]*\]\(){OURS}([^)\s]+)(\))\n*")
LINK = re.compile(rf"(?<!!)(\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\(){OURS}([^)\s]+)(\))")
IMAGE_TAG = re.compile(rf'(<(?:img|source)\b[^>]*?\bsrc(?:set)?="){OURS}([^"]+)("[^>]*>)\n*')
LINK_TAG = re.compile(rf'(<a\b[^>]*?\bhref="){OURS}([^"]+)("[^>]*>)(.*?</a>)', re.DOTALL)


def without_address(text: str) -> str:
    """A piece of README.md without pictures and links that lead into the repository; the words of links stay."""
    text = IMAGE_TAG.sub("", PICTURE.sub("", text))
    return LINK_TAG.sub(lambda tag: tag[4].removesuffix("</a>"), LINK.sub(r"\2", text))


def with_address(text: str, repository: str, version: str) -> str:
    """A piece of README.md with pictures and links that lead to a release in the repository."""
    raw, blob = f"{repository}/raw/v{version}/", f"{repository}/blob/v{version}/"

    def page(target: str) -> str:
        return f"{blob}README.md{target}" if target.startswith("#") else f"{blob}{target}"

    for pattern in (PICTURE, IMAGE_TAG):
        text = pattern.sub(lambda found: found[0].replace(found[2], raw + found[2], 1), text)
    text = LINK.sub(lambda link: f"{link[1]}{page(link[3])}{link[4]}", text)
    return LINK_TAG.sub(lambda tag: f"{tag[1]}{page(tag[2])}{tag[3]}{tag[4]}", text)


class Metadata(MetadataHookInterface):
    """What hatchling asks for the fields that pyproject.toml calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository, version = str(self.config["repository"]).rstrip("/"), str(metadata["version"])
        pieces = CODE.split((Path(self.root) / "README.md").read_text(encoding="utf-8"))
        for i in range(0, len(pieces), 2):
            pieces[i] = with_address(pieces[i], repository, version) if repository else without_address(pieces[i])
        metadata["readme"] = {"content-type": "text/markdown", "text": "".join(pieces)}
        at = {
            "Source": "",
            "Documentation": f"/tree/v{version}/docs",
            "Changelog": f"/blob/v{version}/CHANGELOG.md",
            "Issues": "/issues",
        }
        metadata["urls"] = {label: repository + path for label, path in at.items()} if repository else {}
