"""Mutation testing of the maths: change one operator at a time and see whether the tests notice.

    python scripts/mutants.py                            every mutant of every file that asks for it
    python scripts/mutants.py --file samplers/chain.py --sample 20

A file of src/tiltflow asks for it by a line `# Mutation tests: test_this.py test_that.py`, the tests that must notice, the
fastest first, beside its doctests; `# Mutation tests: none: ..` says why it does not.

Each mutant runs in a forked child that compiles the changed syntax tree in place of the module, so nothing on disk
changes and PyTorch is imported only once. First come the tests that run the changed line, as a trace of the unchanged code
has found, the fastest first; what they let live meets all the others. A mutant is killed if a test fails or if the tests run
far longer than they should. The exit code is 1 if fewer than 95% are killed. Needs a system with fork: Linux or macOS.
"""

from __future__ import annotations

import argparse
import ast
import copy
import doctest
import importlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

# one thread per child, and none in the parent: a process with threads must not fork
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
# a file that holds formulas names, in a line of its own, the tests that must notice a mistake in them; the fastest first
MARKER = re.compile(r"^# Mutation tests: (?!none)(.+)$", re.MULTILINE)
ENOUGH = 0.95
UNUSED = 99  # exit code of a child whose tests passed without importing the module

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.USub: ast.UAdd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclass(frozen=True)
class Mutant:
    """One operator of `node` to swap: its only one, or number `index` of a chain of comparisons."""

    node: Any
    index: int | None = None

    def apply(self) -> None:
        node = self.node
        if self.index is None:
            node.op = SWAPS[type(node.op)]()
        else:
            node.ops[self.index] = SWAPS[type(node.ops[self.index])]()

    def __str__(self) -> str:
        after = copy.deepcopy(self)
        after.apply()
        return f"{self.node.lineno}: {ast.unparse(self.node)}  ->  {ast.unparse(after.node)}"


def mutants(node: ast.AST) -> Iterator[Mutant]:
    """The mutants below `node`, leaving out code that computes nothing: types, messages and strings."""
    children = list(ast.iter_child_nodes(node))
    if type(getattr(node, "op", None)) in SWAPS and not any(map(_is_text, children)):
        yield Mutant(node)
    for index, operator in enumerate(getattr(node, "ops", [])):
        if type(operator) in SWAPS:
            yield Mutant(node, index)
    types = {getattr(node, "annotation", None), getattr(node, "returns", None)}
    for child in children:
        if child not in types and not isinstance(child, ast.Raise) and not _is_text(child) and not _is_type(child):
            yield from mutants(child)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("Annotated", "Literal")


def marked() -> dict[str, list[str]]:
    """The files that ask for mutation, below src/tiltflow, and the test files that each names."""
    package = SOURCE / "tiltflow"
    found = {path: MARKER.search(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    return {path.relative_to(package).as_posix(): match[1].split() for path, match in found.items() if match}


class Loader(SourceFileLoader):
    """Finds and loads one module, from `tree` instead of its file. Every other import is left alone."""

    def __init__(self, name: str, path: Path, tree: ast.Module):
        super().__init__(name, str(path))
        self.tree, self.used = tree, False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> CodeType:
        self.used = True
        code: CodeType = compile(self.tree, self.path, "exec", dont_inherit=True)
        return code


@dataclass
class Trace:
    """A pytest plugin: which lines of `path` each test runs, and how long it takes."""

    path: str
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, list[int]] = field(default_factory=dict)
    """Of each test; under "" what is run in an import or a fixture, and so may matter to every test."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_runtest_call(self, item: Any) -> None:
        self.found = set[int]()
        item.addfinalizer(lambda found=self.found: self.lines.update({item.nodeid: sorted(found)}))

    def pytest_runtest_teardown(self) -> None:
        self.found = self.elsewhere

    def __post_init__(self) -> None:
        self.elsewhere = self.found = set[int]()
        threading.settrace(self._calls)
        sys.settrace(self._calls)

    def _calls(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._lines if frame.f_code.co_filename == self.path else None

    def _lines(self, frame: FrameType, event: str, argument: object) -> Any:
        self.found.add(frame.f_lineno)
        return self._lines

    def write(self, to: Path) -> None:
        to.write_text(json.dumps({"seconds": self.seconds, "lines": self.lines | {"": sorted(self.elsewhere)}}))


@dataclass
class Module:
    path: Path
    tests: list[str]
    scratch: Path

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.path.read_text(encoding="utf-8"))
        self.name = ".".join(self.path.relative_to(SOURCE).with_suffix("").parts)

    def start(self, mutant: Mutant | None, tests: list[str]) -> int:
        """Fork a child that runs `tests` on the mutant, or on the code as it is. Returns its process id."""
        pid = os.fork()
        if pid:
            os.setpgid(pid, pid)  # a group of its own: killing it takes along whatever its tests started
            return pid
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            if mutant:
                mutant.apply()  # only in this process
            loader = Loader(self.name, self.path, self.tree)
            sys.meta_path.insert(0, loader)
            import pytest

            scratch = f"--basetemp={self.scratch / str(os.getpid())}"
            trace = None if mutant else Trace(str(self.path))
            options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", scratch, *tests]
            code = int(pytest.main(options, plugins=[trace] if trace else []))
            if trace:
                sys.settrace(None)
                trace.write(self.scratch / "trace.json")
            code = UNUSED if code == 0 and not loader.used else code
            if code == 0:
                code = int(doctest.testmod(sys.modules[self.name]).failed > 0)
        finally:
            os._exit(code)

    def baseline(self) -> float:
        """Seconds that the tests take on the code as it is, traced. Exits if they are not green or never import the module."""
        began = time.monotonic()
        _, status = os.waitpid(self.start(None, self.tests), 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            problem = "never import it" if code == UNUSED else f"are not green (exit code {code})"
            sys.exit(f"{self.path.relative_to(ROOT)}: {' '.join(self.tests)} {problem}; fix that first")
        trace = json.loads((self.scratch / "trace.json").read_text())
        self.seconds, self.lines = trace["seconds"], {test: set(lines) for test, lines in trace["lines"].items()}
        return time.monotonic() - began

    def nearest(self, mutant: Mutant) -> list[str]:
        """The tests that run its lines, the fastest first; none if it is run outside of tests."""
        lines = set(range(mutant.node.lineno, mutant.node.end_lineno + 1))
        if lines & self.lines[""]:
            return []
        tests = [test for test, found in self.lines.items() if found & lines]
        return sorted(tests, key=self.seconds.__getitem__)

    def survivors(self, todo: list[Mutant], jobs: int) -> list[Mutant]:
        """Run the tests on every mutant, `jobs` at a time. Returns those that no test noticed, in the order of the file."""
        limit = max(20.0, 5 * self.baseline())
        waiting = [(mutant, self.nearest(mutant) or self.tests) for mutant in reversed(todo)]
        running, survived, done = dict[int, tuple[Mutant, list[str], float]](), list[Mutant](), 0
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    mutant, tests = waiting.pop()
                    running[self.start(mutant, tests)] = mutant, tests, time.monotonic()
                for pid, (mutant, tests, began) in list(running.items()):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if not ended and time.monotonic() - began < limit:
                        continue
                    if not ended:
                        os.killpg(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    del running[pid]
                    if ended and os.waitstatus_to_exitcode(status) == 0:
                        if tests is not self.tests:  # a test may see it though another one ran the line, and kept the result
                            waiting.append((mutant, self.tests))
                            continue
                        survived.append(mutant)
                        print(f"\rsurvived: {self.path.name}:{mutant}", file=sys.stderr)
                    done += 1
                    print(f"\r{self.name} {done}/{len(todo)}, {len(survived)} survived ", end="", file=sys.stderr, flush=True)
                time.sleep(0.02)
        finally:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
        print(file=sys.stderr)
        return sorted(survived, key=todo.index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", action="append", help="only this file of src/tiltflow; may be repeated")
    parser.add_argument("--line", type=int, action="append", help="only what stands on this line; may be repeated")
    parser.add_argument("--tests", nargs="+", help="test files to use instead of those that the file names")
    parser.add_argument("--sample", type=int, help="this many mutants of each file, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="children at a time")
    options = parser.parse_args()

    os.chdir(ROOT)
    sys.path.insert(0, str(SOURCE))
    for package in ("matplotlib", "numpy", "ot", "pydantic", "pytest", "torch"):  # slow to import, never mutated
        importlib.import_module(package)

    rows, report, files = [], [], marked()
    with tempfile.TemporaryDirectory() as scratch:
        for file in options.file or files:
            path = SOURCE / "tiltflow" / file
            if not path.exists() or not (options.tests or file in files):
                sys.exit(f"{file}: {'give its tests with --tests' if path.exists() else 'not in src/tiltflow'}")
            tests = options.tests or [f"tests/{test}" for test in files[file]]
            module = Module(path, tests, Path(scratch))
            todo = [mutant for mutant in mutants(module.tree) if options.line is None or mutant.node.lineno in options.line]
            if options.sample is not None and options.sample < len(todo):
                chosen = set(random.Random(options.seed).sample(range(len(todo)), options.sample))
                todo = [mutant for i, mutant in enumerate(todo) if i in chosen]
            survived = module.survivors(todo, options.jobs)
            rows.append((file, len(todo), len(todo) - len(survived)))
            report += [f"src/tiltflow/{file}:{mutant}" for mutant in survived]

    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    print(f"{'file':<30}{'mutants':>9}{'killed':>9}{'share':>9}")
    for file, count, killed in rows:
        print(f"{file:<30}{count:>9}{killed:>9}{killed / max(count, 1):>9.1%}")
    if report:
        print("\nSurvived:", *report, sep="\n")
    return int(rows[-1][2] < ENOUGH * rows[-1][1])


if __name__ == "__main__":
    sys.exit(main())
