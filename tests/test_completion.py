"""`tiltflow --install-completion` in an empty home: what it writes is read by a new shell, which then completes.

Where zsh or fish is not installed, bash under its name asks for the completion, and the new shell is left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WRITTEN = {
    "bash": (".bash_completions/tiltflow.sh", ".bashrc"),
    "zsh": (".zfunc/_tiltflow", ".zshrc"),
    "fish": (".config/fish/completions/tiltflow.fish",),
}
NEW_SHELL = {
    "bash": (
        "-ic",
        "COMP_WORDS=(tiltflow train digits-in); COMP_CWORD=2; _tiltflow_completion tiltflow; echo $COMPREPLY; complete -p",
        "digits-ink\ncomplete -o default -F _tiltflow_completion tiltflow\n",
    ),
    "zsh": ("-ic", 'print "$_comps[tiltflow]"; whence -w _tiltflow', "_tiltflow\n_tiltflow: function\n"),
    "fish": ("-c", 'complete -C "tiltflow train digits-in"', "digits-ink\n"),
}
"""A line of each shell as it starts anew, and what it prints; zsh completes in a terminal alone."""


@pytest.mark.slow  # starts the program eight times
@pytest.mark.parametrize("shell", WRITTEN)
def test_completion_is_installed_into_an_empty_home(shell: str, tmp_path: Path) -> None:
    home, programs = tmp_path / "home", tmp_path / "bin"
    home.mkdir()
    programs.mkdir()
    program = programs / "tiltflow"
    program.write_text(f"#!{sys.executable}\nfrom tiltflow.commands.terminal.app import main\n\nmain()\n")
    program.chmod(0o755)
    here = shutil.which(shell)
    if here is None:
        shutil.copy(shutil.which("bash") or pytest.skip("needs bash"), programs / shell)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("_TYPER", "_TILTFLOW", "XDG_"))}
    clean |= {"HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def said(*words: str, **more: str) -> str:
        return subprocess.run(words, env=clean | more, cwd=home, capture_output=True, text=True, check=True).stdout

    assert f"{shell} completion installed in {home}" in said(here or shell, "-c", "tiltflow --install-completion; true")
    made = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and "fish_" not in path.name}
    assert made == set(WRITTEN[shell])
    if here:
        option, line, answer = NEW_SHELL[shell]
        assert said(here, option, line) == answer
    if shell != "bash":
        asked = {"_TILTFLOW_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "tiltflow train digits-in"}
        found = said("tiltflow", **asked, **({"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}))
        assert "digits-ink" in found
