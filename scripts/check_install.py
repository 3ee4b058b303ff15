"""Can every extra be installed, beside the exact set of constraints.txt, on every Python that pyproject.toml declares?

    python scripts/check_install.py [STAMP]     # part of `make lint`; half a minute. STAMP is touched where all is well

uv resolves all extras together for each Python, whether or not that interpreter is here: what can be installed together can be
installed alone. Nothing is installed, and only wheels count. All that the extras bring must be pinned, or one could silently
fall back to an old release; CUDA's own packages come with torch. Without a network it says so and passes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = re.compile("nvidia-|cuda-|triton$")
UNREACHABLE = ("Failed to fetch", "error sending request", "network was disabled")


def declared() -> tuple[list[str], list[str]]:
    """The Pythons of the classifiers, and what the package and all of its extras require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"])
    required = [line for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines]
    return [match[1] for match in found if match], [line for line in required if not line.startswith("tiltflow")]


def pinned(constraints: Path) -> set[str]:
    """The names in a file of constraints."""
    lines = constraints.read_text(encoding="utf-8").splitlines()
    return {normal(line.split("==")[0]) for line in lines if line.strip() and not line.startswith("#")}


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name.strip()).lower()


def check(python: str, requirements: Iterable[str], constraints: Path) -> str:
    """What is wrong, empty if all can be installed. Raises ConnectionError without a network."""
    command = ["uv", "pip", "compile", "-", "--quiet", "--no-header", "--no-annotate", "--no-config", "--only-binary", ":all:"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--python-version", python, "--constraints", str(constraints)],
        input="\n".join(requirements), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if any(sign in done.stderr for sign in UNREACHABLE):
        raise ConnectionError(done.stderr.strip().splitlines()[-1].strip())
    if done.returncode:
        return " ".join(done.stderr.split())
    brought = {normal(line.split("==")[0]) for line in done.stdout.splitlines() if "==" in line}
    loose = sorted(name for name in brought - pinned(constraints) if not OF_TORCH.match(name))
    return f"constraints.txt does not pin {', '.join(loose)}" if loose else ""


def main() -> None:
    pythons, requirements = declared()
    try:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda python: check(python, requirements, ROOT / "constraints.txt"), pythons))
    except ConnectionError as error:
        print(f"check_install: skipped, the package index cannot be reached ({error})")
        return
    for python, problem in zip(pythons, found, strict=True):
        print(f"Python {python}: {problem or 'every extra can be installed'}")
    if any(found):
        sys.exit(1)
    for stamp in sys.argv[1:]:
        Path(stamp).touch()


if __name__ == "__main__":
    main()
