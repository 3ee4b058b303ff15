"""The pages of the documentation site, in build/pages: docs/, the READMEs, the API from its docstrings, and what they link to.

`make docs` builds the site from them.

    python scripts/pages.py

In docs/ and the READMEs links are as a repository shows them. Here a link to a page leads to that page of the site, and a link
to a file or folder of the code to a page with its text, so that the site needs no other host.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiltflow
from tiltflow import testing

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "pages"
NAMED = {"README.md": "index.md", "src/tiltflow/README.md": "glossary.md", "CONTRIBUTING.md": "contributing.md"}
NAMED |= {"CHANGELOG.md": "changelog.md"}
"""Pages from outside of docs/, by their files."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "sh"}
LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]*`)|\]\((?P<target>(?!https?:|mailto:|#)[^)\s#]+)", re.MULTILINE | re.DOTALL)
PARTS = {
    "functions": "Functions",
    "models": "Models, flows and settings",
    "methods": "Methods",
    "steering": "Steering",
    "checks": "Checks of your own parts",
    "errors": "Errors",
}


def place(source: Path) -> Path:
    """Where a page, a picture, or a file or folder of the code is on the site."""
    name = str(source.relative_to(ROOT))
    return OUTPUT / (source.name if source.parent == ROOT / "docs" else NAMED.get(name, f"source/{name}.md"))


def with_links(text: str, source: Path) -> tuple[str, set[Path]]:
    """A page's text with its links as they are on the site, and the files that they lead to."""
    linked: set[Path] = set()

    def replaced(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target = Path(os.path.normpath(source.parent / match["target"]))
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: there is no {match['target']}")
        linked.add(target)
        return "](" + os.path.relpath(place(target), place(source).parent)

    return LINK.sub(replaced, text), linked


def listing(path: Path) -> str:
    """The page of a file or a folder of the code."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return f"# {path.relative_to(ROOT)}\n\n" + "\n".join(block(file, f"## {file.relative_to(path)}") for file in files)
    return block(path, f"# {path.relative_to(ROOT)}")


def block(path: Path, head: str) -> str:
    return f"{head}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}````\n"


def part_of(name: str) -> str:
    """The page of the API that a public name is on."""
    folder = getattr(tiltflow, name).__module__.split(".")[1]
    if folder in PARTS:
        return folder if folder != "models" or name[0].isupper() else "functions"
    return "models" if name[0].isupper() else "functions"


def api() -> Iterator[tuple[str, str]]:
    """The pages of the API: their names and texts."""
    names = {part: [f"tiltflow.{name}" for name in tiltflow.__all__ if part_of(name) == part] for part in PARTS}
    names["checks"] = [f"tiltflow.testing.{name}" for name in testing.__all__]
    for part, title in PARTS.items():
        yield f"api/{part}.md", f"# {title}\n\n" + "\n".join(f"::: {name}\n" for name in names[part])


def in_navigation() -> set[str]:
    """The pages that zensical.toml names in its navigation."""

    def named(tree: Any) -> Iterator[str]:
        if isinstance(tree, str):
            yield tree
        else:
            for part in tree.values() if isinstance(tree, dict) else tree:
                yield from named(part)

    return set(named(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))


def pages() -> Iterator[tuple[str, str]]:
    """All pages of the site: their names and texts."""
    yield from api()
    sources = {*(ROOT / name for name in NAMED), *(ROOT / "docs").glob("*.md")}
    linked: set[Path] = set()
    for source in sorted(sources):
        text, more = with_links(source.read_text(encoding="utf-8"), source)
        linked |= more
        yield str(place(source).relative_to(OUTPUT)), text
    for path in sorted(linked - sources):
        if path.suffix != ".png":
            yield str(place(path).relative_to(OUTPUT)), listing(path)


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    written = set()
    for name, text in pages():
        (OUTPUT / name).parent.mkdir(parents=True, exist_ok=True)
        (OUTPUT / name).write_text(text, encoding="utf-8")
        written |= {name} if not name.startswith("source/") else set()
    if wrong := written ^ in_navigation():
        sys.exit(f"zensical.toml: nav and the pages differ in {', '.join(sorted(wrong))}")
    for picture in (ROOT / "docs").glob("*.png"):
        shutil.copy(picture, OUTPUT / picture.name)


if __name__ == "__main__":
    main()
