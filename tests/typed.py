"""Commands as they are typed, several in one new process: to start one takes longer than what most of them do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EACH = """
import contextlib, io, json, sys
from tiltflow.commands.terminal.app import main
said = []
for words in json.loads(sys.argv[1]):
    sys.argv, out, err, code = ["tiltflow", *words], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    said.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Said:
    """What a command has come to."""

    returncode: int
    stdout: str
    stderr: str


def typed(*commands: Sequence[str], site: Path | None = None) -> list[Said]:
    """Run these commands one after the other, with the packages that are installed in `site`."""
    path = os.pathsep.join(str(part) for part in (site, os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Said(*said) for said in json.loads(done.stdout.splitlines()[-1])]
