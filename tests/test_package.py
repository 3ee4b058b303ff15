"""What is installed, from where: the Pythons that are promised, what an index would show, what the archives hold."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
sys.path.insert(0, str(ROOT / "scripts"))

import check_install  # noqa: E402


def test_the_same_pythons_are_promised_everywhere() -> None:
    pythons, _ = check_install.declared()
    first, last = pythons[0], pythons[-1]
    assert pythons == [f"3.{minor}" for minor in range(int(first[2:]), int(last[2:]) + 1)]
    assert PROJECT["project"]["requires-python"] == f">={first}"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + first.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == first
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert matrix is not None
    assert re.findall(r"3\.\d+", matrix[1]) == pythons
    for name in ("README.md", "CONTRIBUTING.md"):
        assert f"Python {first} to {last}" in (ROOT / name).read_text(), name
    makefile = (ROOT / "Makefile").read_text()
    assert f"sys.version_info < ({first.replace('.', ', ')})" in makefile
    assert f"needs Python {first} or newer" in makefile


def test_an_extra_that_is_advised_exists() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py"))]
    advised = {name for text in texts for name in re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", text)}
    assert advised - {"extra"} <= set(extras)
    assert not any(re.search(r"pip install '?tiltflow", text) for text in texts), "tiltflow is on no index"
    named = {match for text in texts for match in re.findall(r'not_installed\([^)]*, "(\w+)"\)', text)}
    assert named
    assert named <= set(extras)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str], bytes]:
    """The names in the source archive and in the wheel, and the wheel's metadata."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    out = tmp_path_factory.mktemp("dist")
    code = "import sys, hatchling.build as b; b.build_sdist(sys.argv[1]); b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT, check=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA")))
        return sources, set(wheel.namelist()), metadata


def test_the_archives_hold_what_belongs_in_them(built: tuple[set[str], set[str], bytes]) -> None:
    sources, wheel, _ = built
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"} <= sources
    for folder, pattern in (
        ("docs", "*.md"),
        ("docs", "*.png"),
        ("tests", "*.py"),
        ("benchmarks", "*.py"),
        ("scripts", "*.py"),
    ):
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)} <= sources, folder
    package = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/tiltflow").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert {name for name in wheel if not name.startswith("tiltflow-")} == package
    assert {f"src/{name}" for name in package} <= sources


def test_an_index_shows_no_link_that_leads_nowhere(built: tuple[set[str], set[str], bytes]) -> None:
    message = message_from_bytes(built[2])
    text = message.get_payload()
    assert message["Description-Content-Type"] == "text/markdown"
    assert isinstance(text, str)
    assert "make demo" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert [target for target in targets if not target.startswith("https://")] == []
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert all((ROOT / link).exists() for link in links if not link.startswith("https://"))  # in the repository they lead on


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in a link, as repositories make it."""
    heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), (page.name, target)
            assert not anchor or anchor in anchors(other), (page.name, target)


@pytest.mark.slow
def test_the_check_of_the_extras_sees_a_pin_that_an_extra_cannot_have(tmp_path: Path) -> None:
    """trackio takes no Pillow 13: without a lower bound and a complete set of pins, an old one of it would be installed."""
    pytest.importorskip("uv")
    pythons, requirements = check_install.declared()
    known = ROOT / "constraints.txt"
    loose, wrong = tmp_path / "loose.txt", tmp_path / "wrong.txt"
    loose.write_text(re.sub(r"(?m)^trackio==.*\n", "", known.read_text()))
    wrong.write_text(re.sub(r"(?m)^pillow==.*$", "pillow==13.0.0", known.read_text()))
    try:
        assert check_install.check(pythons[-1], requirements, known) == ""
        assert check_install.check(pythons[-1], requirements, loose) == "constraints.txt does not pin trackio"
        assert "trackio" in check_install.check(pythons[-1], requirements, wrong)
    except ConnectionError as error:
        pytest.skip(str(error))
