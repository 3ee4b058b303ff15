"""What is installed, from where: the Pythons that are promised, what an index would show, what the archives hold."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

import tiltflow
from tiltflow import shipped
from tiltflow.errors import InputError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
sys.path.insert(0, str(ROOT / "scripts"))

import check_install  # noqa: E402
import release_check  # noqa: E402


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
    assert not any(re.search(r"pip install '?tiltflow(?!\[assets\])", text) for text in texts), "tiltflow is on no index"
    named = {match for text in texts for match in re.findall(r'not_installed\([^)]*, "(\w+)"\)', text)}
    assert named
    assert named <= set(extras)


@dataclass(frozen=True)
class Built:
    """The source archive and the two wheels, as they would be published."""

    sdist: Path
    wheel: Path
    assets: Path

    def sources(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def metadata(self) -> Message:
        with zipfile.ZipFile(self.wheel) as wheel:
            return message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    both = "import sys, hatchling.build as b; b.build_sdist(sys.argv[1]); b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", both, str(out)], cwd=ROOT, check=True)
    code = "import sys, hatchling.build as b; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=ROOT / "src/tiltflow_assets", check=True)
    return Built(*(next(out.glob(name)) for name in ("*.tar.gz", "tiltflow-*.whl", "tiltflow_assets-*.whl")))


def names(wheel: Path) -> set[str]:
    """What a wheel installs, but for its metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def files(folder: str) -> set[str]:
    """The files of a package in src/ that belong in its wheel."""
    paths = (path for path in (ROOT / "src" / folder).rglob("*") if path.is_file() and path.name != "pyproject.toml")
    return {str(path.relative_to(ROOT / "src")) for path in paths if "__pycache__" not in path.parts}


def test_the_archives_hold_what_belongs_in_them(built: Built) -> None:
    sources = built.sources()
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt"} <= sources
    for folder, pattern in (
        ("docs", "*.md"),
        ("docs", "*.png"),
        ("tests", "*.py"),
        ("benchmarks", "*.py"),
        ("scripts", "*.py"),
    ):
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)} <= sources, folder
    assert names(built.wheel) == files("tiltflow")
    assert names(built.assets) == files("tiltflow_assets") | {"tiltflow_assets/LICENSE"}
    assert {f"src/{name}" for name in files("tiltflow") | files("tiltflow_assets")} <= sources


def test_the_wheel_is_small_and_has_the_demo(built: Built) -> None:
    assert built.wheel.stat().st_size < release_check.LARGEST == 8e6
    small = {name.split("/")[2] for name in names(built.wheel) if name.startswith("tiltflow/assets/")}
    assert {"digits-latent-flow", "digits-classifier", "digits-judge", "digits-flow"} <= small
    assert sorted(shipped.LARGE) == sorted(
        path.name for path in (ROOT / "src/tiltflow_assets").iterdir() if path.suffix == "" and path.name[0] != "_"
    )
    assert not small & set(shipped.LARGE)


def test_the_version_is_the_same_everywhere(built: Built) -> None:
    version = tiltflow.__version__
    assert built.metadata()["Version"] == version
    assert built.wheel.name.startswith(f"tiltflow-{version}-")
    assert built.assets.name.startswith(f"tiltflow_assets-{version}-")
    assert PROJECT["project"]["optional-dependencies"]["assets"] == [f"tiltflow-assets=={version}"]
    assert re.search(rf"(?m)^## \[{re.escape(version)}\] - 20\d\d-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text())


USED_ALONE = """
import importlib, json, sys
import tiltflow
from tiltflow.commands.terminal.app import main
from tiltflow.errors import InputError

def command(*words):
    sys.argv = ["tiltflow", *words]
    try:
        main()
    except SystemExit as end:
        return end.code

said = {"from": tiltflow.__file__}
said["demo"] = command("train", "digits-even", "--output", "runs/demo", "--device", "cpu", "--quiet",
    *(f"--set={change}" for change in ("training.max_train_steps=80", "training.train_batch_size=64",
      "method.regression_batch_size=64", "evaluation.num_samples=64", "evaluation.grid=4")))
said["absent"] = command("sample", "digits-diffusion", "-n", "1", "-o", "x.npz", "--quiet", "--device", "cpu")
sys.path.insert(0, sys.argv_assets)
importlib.invalidate_caches()
said["present"] = tiltflow.load("digits-diffusion").event_shape
print(json.dumps(said))
"""


def test_a_wheel_alone_runs_the_demo_and_says_where_the_larger_models_are(built: Built, tmp_path: Path) -> None:
    """From an empty folder, without the site's .pth files, by which a clone would be found."""
    for wheel in (built.wheel, built.assets):
        zipfile.ZipFile(wheel).extractall(tmp_path / wheel.name.split("-")[0])
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", USED_ALONE.replace("sys.argv_assets", repr(str(tmp_path / "tiltflow_assets")))],
        cwd=work, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "tiltflow"), *packages])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["from"].startswith(str(tmp_path))
    assert said["demo"] == 0, done.stderr
    assert (work / "runs/demo/report.html").exists()
    assert said["absent"] == 2
    assert done.stderr.count("digits-diffusion") == 1
    assert (
        "'digits-diffusion' is in the package tiltflow-assets, which is not installed: pip install 'tiltflow[assets]'"
        in done.stderr
    )
    assert not (work / "x.npz").exists()
    assert said["present"] == [1, 28, 28]


def test_a_clone_has_the_larger_models_and_a_wheel_alone_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in shipped.LARGE:
        found = shipped.asset(name, "model", "config.json", "model_index.json")
        assert found is not None
        assert shipped.ships(found)
    assert shipped.asset("qm9-flow", "pipeline", "model_index.json") is None  # it is there, and no pipeline
    monkeypatch.setattr(shipped, "places", lambda: [shipped.ASSETS])
    for name in shipped.LARGE:
        with pytest.raises(InputError, match=f"model '{name}' is in the package tiltflow-assets, which is not installed"):
            tiltflow.load(name)
    assert shipped.asset("digits-flow", "model", "config.json") == shipped.ASSETS / "digits-flow"


def test_an_index_shows_no_link_that_leads_nowhere(built: Built) -> None:
    message = built.metadata()
    text = message.get_payload()
    assert message["Description-Content-Type"] == "text/markdown"
    assert bool(message["Project-URL"]) == bool(PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"])
    assert isinstance(text, str)
    assert "make demo" in text
    assert [target for target in targets(text) if not target.startswith("https://")] == []
    ours = [target for target in targets((ROOT / "README.md").read_text()) if not target.startswith(("https://", "#"))]
    assert ours
    assert all((ROOT / target.partition("#")[0]).exists() for target in ours)  # in the repository they lead on


def targets(text: str) -> list[str]:
    """Where the pictures and links of a page lead, in Markdown and in HTML."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)]*)\)", prose) + re.findall(r'\b(?:href|src|srcset)="([^"]*)"', prose)


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_with_an_address_the_page_of_an_index_leads_into_the_repository() -> None:
    """The one line of pyproject.toml is filled in, and hatchling asked for the metadata."""
    core = pytest.importorskip("hatchling.metadata.core")
    manager = pytest.importorskip("hatchling.plugin.manager")
    address, version = "https://example.org/us/tiltflow", tiltflow.__version__
    project = copy.deepcopy(PROJECT)
    project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"] = f"{address}/"
    found = core.ProjectMetadata(str(ROOT), manager.PluginManager(), project).core
    assert found.urls == {
        "Source": address,
        "Documentation": f"{address}/tree/v{version}/docs",
        "Changelog": f"{address}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    own = [target for target in targets((ROOT / "README.md").read_text()) if not target.startswith("https://")]
    led = [target for target in targets(found.readme) if target.startswith(address)]
    assert len(led) == len(own)
    for target in led:
        name = re.fullmatch(rf"{address}/(?:blob|raw)/v{re.escape(version)}/([^#]+)(?:#.*)?", target)
        assert name is not None, target
        assert (ROOT / name[1]).exists(), target


@pytest.mark.parametrize(
    ("written", "shown", "without"),
    [
        ("![a b](docs/a.png)\n\nx", "![a b](U/raw/v1/docs/a.png)\n\nx", "x"),
        ("[t](docs/a.md#b), [u](#c)", "[t](U/blob/v1/docs/a.md#b), [u](U/blob/v1/README.md#c)", "t, u"),
        ("[![x](a.png)](b.md)", "[![x](U/raw/v1/a.png)](U/blob/v1/b.md)", ""),
        ("[e](https://e.org) ![p](https://e.org/p.png)", "[e](https://e.org) ![p](https://e.org/p.png)", "[e](https://e.org) ![p](https://e.org/p.png)"),
        ('<a href="b.md"><img src="a.png"></a>', '<a href="U/blob/v1/b.md"><img src="U/raw/v1/a.png"></a>', ""),
        ('<source srcset="a.png" media="m">\nx', '<source srcset="U/raw/v1/a.png" media="m">\nx', "x"),
    ],
)  # fmt: skip
def test_pictures_and_links_of_every_kind(hook: ModuleType, written: str, shown: str, without: str) -> None:
    assert hook.with_address(written, "U", "1") == shown
    assert hook.without_address(written) == without


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


def test_the_citation_is_of_this_version_and_of_the_three_papers() -> None:
    citation = YAML(typ="safe", pure=True).load(ROOT / "CITATION.cff")
    assert citation["version"] == tiltflow.__version__
    released = re.search(rf"(?m)^## \[{re.escape(tiltflow.__version__)}\] - (.*)$", (ROOT / "CHANGELOG.md").read_text())
    assert released is not None
    assert str(citation["date-released"]) == released[1]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["authors"] == PROJECT["project"]["authors"]
    for paper, name in zip(citation["references"], ("adjoint-matching", "score-as-action", "orw-cfm-w2"), strict=True):
        page = " ".join((ROOT / "docs" / f"{name}.md").read_text().split())
        assert paper["title"] in page
        assert f"{', '.join(author['family-names'] for author in paper['authors'])}, [arXiv" in page
        assert paper["url"] in page
        assert paper["identifiers"] == [{"type": "other", "value": "arXiv:" + paper["url"].rpartition("/")[2]}]


def test_the_dockerfile_copies_all_that_its_builds_need(tmp_path: Path) -> None:
    """The two wheels are built from nothing but what it copies, and .dockerignore lets through no more."""
    pytest.importorskip("hatchling")
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:] for line in lines if line.startswith("COPY ") and "--from" not in line]
    for *sources, place in copied:
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / place)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == {source for *sources, _ in copied for source in sources}
    code = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
    for folder in (tmp_path, tmp_path / "src/tiltflow_assets"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "dist")], cwd=folder, check=True)
    assert len(list((tmp_path / "dist").glob("tiltflow*.whl"))) == 2


def test_the_dockerfile_runs_as_nobody_special_with_pinned_packages() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1].isdigit()
    assert int(users[-1]) >= 1000
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("constraints.txt" in line and "--no-cache-dir" in line for line in installs)
    pythons, _ = check_install.declared()
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} <= {f"python:{version}-slim" for version in pythons}


@pytest.mark.slow  # fetches the linter and the validator
def test_the_dockerfile_and_the_citation_are_valid_and_mistakes_are_seen(tmp_path: Path) -> None:
    pytest.importorskip("uv")
    try:
        release_check.uv("tool", "run", "--quiet", "--from", release_check.HADOLINT, "hadolint", "--version")
    except subprocess.CalledProcessError:
        pytest.skip("hadolint cannot be had")
    release_check.check_dockerfile()
    release_check.check_citation()
    for name, change, check in (
        ("Dockerfile", ("USER 1000", "USER root"), release_check.check_dockerfile),
        ("CITATION.cff", ("date-released: 20", "date-released: in 20"), release_check.check_citation),
    ):
        text = (ROOT / name).read_text()
        assert change[0] in text
        (tmp_path / name).write_text(text.replace(*change))
        with pytest.raises(subprocess.CalledProcessError):
            check(tmp_path / name)


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
