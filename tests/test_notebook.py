"""The notebook: it runs, in small, and the outputs that it keeps are those of a whole execution."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import release_check  # noqa: E402


def plain(notebook: dict[str, Any]) -> str:
    """The code of a notebook as Python alone: nothing is installed, and commands are run with this Python."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = re.sub(r"(?m)^(\s*)%pip .*$", r"\1pass", "\n".join(sources))
    command = r"import subprocess, sys; subprocess.run([sys.executable, '-m', *'\1'.split()], check=True)"
    return re.sub(r"(?m)^!(.*)$", command, code)


def test_the_notebook_keeps_the_outputs_of_an_execution_from_top_to_bottom() -> None:
    notebook = json.loads(release_check.NOTEBOOK.read_text())
    assert release_check.NOTEBOOK.stat().st_size < 100_000
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert "Of the tilt that was asked for it has" in json.dumps(outputs)
    assert ast.parse(plain(notebook))


@pytest.mark.slow  # two trainings; `make release-check` runs it too, by Jupyter and from the wheel
def test_the_notebook_runs_in_small(tmp_path: Path) -> None:
    notebook = release_check.small_notebook()
    assert notebook != json.loads(release_check.NOTEBOOK.read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import matplotlib; matplotlib.use('agg')\n" + plain(notebook)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/demo/report.html").exists()
    assert "Of the tilt that was asked for it has" in done.stdout
