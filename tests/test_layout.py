"""Arrows point one way: who imports whom, inside functions too."""

from __future__ import annotations

import ast
import re
import runpy
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import tiltflow

PACKAGE = Path(tiltflow.__file__).parent
MODULES = {
    ".".join(("tiltflow", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
FLOORS = [
    "chemistry",
    "policies",
    "flows",
    "samplers",
    "networks",
    "conditions",
    "models",
    "rewards",
    "evaluation",
    "laws",
    "utilities",
    "control",
    "training",
    "methods",
    "steering",
    "testing",
    "problems",
    "reports",
    "runs",
    "pretraining",
    "view",
    "commands",
]
"""The folders, each of which imports only from those before it, and from the files beside them."""
SCREEN = {"PIL", "matplotlib", "rich", "typer"}
MATHEMATICS = ("flows", "samplers", "laws", "control", "methods")


def imports(module: str) -> set[str]:
    """Everything that a module imports, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from tiltflow import x` is the module x, or a name in the package itself
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & set(MODULES)) or {str(node.module)}
    return found


@cache
def graph() -> dict[str, set[str]]:
    """What of ours each module imports."""
    found = {module: imports(module) & set(MODULES) for module in MODULES}
    return found | {"tiltflow": set()}  # it imports a name when that name is first used


def reach(module: str) -> set[str]:
    """Everything of ours that is loaded with a module."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        new = graph()[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_imports_have_no_cycle() -> None:
    assert len(list(TopologicalSorter(graph()).static_order())) == len(MODULES)


def folder(module: str) -> str:
    """The folder in which a module is; none for a file beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


def test_every_folder_has_its_floor() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(FLOORS)


def test_a_folder_imports_only_what_is_below_it() -> None:
    """The doors, `tiltflow.api` and `__main__`, import from all."""
    for module in set(MODULES) - {"tiltflow", "tiltflow.api", "tiltflow.__main__"}:
        own = FLOORS.index(folder(module)) if folder(module) else -1
        for imported in graph()[module]:
            door = imported == "tiltflow.api" and folder(module) in ("runs", "view", "commands")
            assert door or not folder(imported) or FLOORS.index(folder(imported)) <= own, f"{module} imports {imported}"


def test_the_mathematics_knows_nothing_of_the_screen_and_of_runs() -> None:
    for module in (module for module in MODULES if folder(module) in MATHEMATICS):
        assert not {name.split(".")[0] for name in imports(module)} & SCREEN, module
        assert not any(folder(name) in ("runs", "reports", "commands") for name in reach(module)), module


def test_methods_know_nothing_of_each_other_or_of_networks() -> None:
    """What several share lies in a folder of its own, and knows none of them."""
    methods = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    forbidden = {f"tiltflow.methods.{name}" for name in methods} | {name for name in MODULES if "tiltflow.networks" in name}
    for module in (name for name in MODULES if name.startswith("tiltflow.methods.")):
        assert not reach(module) & (forbidden - {module})


def test_a_file_with_formulas_says_which_tests_notice_a_mistake_in_them() -> None:
    """In a line `# Mutation tests: test_this.py`, for scripts/mutants.py; `# Mutation tests: none: why` where it has none."""
    for name, path in MODULES.items():
        text = path.read_text(encoding="utf-8")
        marker = re.search(r"^# Mutation tests: (.+)$", text, re.MULTILINE)
        products = sum(
            isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Pow)) for node in ast.walk(ast.parse(text))
        )
        assert marker or products < 8, (
            f"{name} has {products} products and powers, and no line '# Mutation tests: test_this.py ..'"
        )
        for file in marker[1].split() if marker and not marker[1].startswith("none: ") else ():
            assert (Path(__file__).parent / file).exists(), f"{name} names {file}, which is not in tests/"


def test_the_readme_of_the_package_has_every_file() -> None:
    """By `python scripts/tree.py --write`."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "tree.py"))
    assert script["page"]() == (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_the_readme_of_the_package_has_the_folders_in_their_order() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    assert ", ".join(FLOORS) in " ".join(text.split())
