"""The documentation site: what its pages are made of, and where their links lead."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import tiltflow

ROOT = Path(__file__).parent.parent
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "pages.py"))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(SCRIPT["pages"]())


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page(pages: dict[str, str]) -> None:
    assert SCRIPT["in_navigation"]() == {name for name in pages if not name.startswith("source/")}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(pages)


def test_the_api_has_every_public_name_once(pages: dict[str, str]) -> None:
    named = [line[4:] for text in pages.values() for line in text.splitlines() if line.startswith("::: ")]
    assert len(named) == len(set(named))
    assert {f"tiltflow.{name}" for name in tiltflow.__all__} < set(named)


def test_links_lead_from_page_to_page() -> None:
    """From a page of docs to another one, to the README, and to a file of the code; not what only looks like a link."""
    other = " [d](https://a.b) `[e](nothing.md)`\n```\n[f](no.md)\n```\n"
    text = "[a](laws.md#x) [b](../README.md) [c](../src/tiltflow/errors.py)" + other
    found, linked = SCRIPT["with_links"](text, ROOT / "docs" / "methods.md")
    assert found == "[a](laws.md#x) [b](index.md) [c](source/src/tiltflow/errors.py.md)" + other
    assert linked == {ROOT / "docs/laws.md", ROOT / "README.md", ROOT / "src/tiltflow/errors.py"}
    with pytest.raises(SystemExit, match=r"docs/methods.md: there is no nothing.md"):
        SCRIPT["with_links"]("[a](nothing.md)", ROOT / "docs" / "methods.md")


class Links(HTMLParser):
    """What a page of HTML links to or loads, and where it can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors.add(given.get("id") or "")
        if tag == "a":
            self.targets.add(given.get("href") or "")
        elif tag != "meta":
            self.loaded |= {given.get("href") or "", given.get("src") or ""}


@pytest.mark.slow  # half a minute
def test_the_built_site_has_no_link_that_leads_nowhere_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "scripts/pages.py"], cwd=ROOT, env=environment, check=True)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=ROOT, env=environment, check=True)
    site = ROOT / "build" / "site"
    built = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(built) > 50
    for page, links in built.items():
        assert not [target for target in links.loaded if urlsplit(target).netloc]
        for target in links.targets | links.loaded:
            to = urlsplit(target)
            if not to.scheme:
                file = (page.parent / unquote(to.path)).resolve() if to.path else page
                file = file / "index.html" if file.is_dir() else file
                assert file.exists(), (page.name, target)
                assert file not in built or unquote(to.fragment) in built[file].anchors, (page.name, target)
