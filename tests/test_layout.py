"""Arrows point one way: who imports whom, inside functions too."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import tiltflow

PACKAGE = Path(tiltflow.__file__).parent
MODULES = {
    ".".join(("tiltflow", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# the mathematics, and what sits above it
OUTSIDE = {
    f"tiltflow.{name}"
    for name in (
        "__main__",
        "cli",
        "describe",
        "entry",
        "model",
        "plots",
        "pretrain",
        "recipe",
        "report",
        "run",
        "sweep",
        "verify",
        "verify_lqg",
    )
}
CORE = [
    f"tiltflow.{name}"
    for name in (
        "interpolant",
        "flow",
        "sampler",
        "reward",
        "adjoint",
        "problems",
        "evaluation",
        "trainer",
        "value",
        "lqg",
        "timesteps",
        "chain_optimum",
    )
]
CORE += [name for name in MODULES if name.startswith("tiltflow.methods")]


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


GRAPH = {module: imports(module) & set(MODULES) for module in MODULES}
GRAPH["tiltflow"] = set()  # it imports a name when that name is first used


def reach(module: str) -> set[str]:
    """Everything of ours that is loaded with a module."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        new = GRAPH[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_imports_have_no_cycle() -> None:
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(MODULES)


def test_the_mathematics_knows_nothing_of_recipes_files_and_the_screen() -> None:
    screen = {"PIL", "matplotlib", "pathlib", "rich", "typer"}
    for module in CORE:
        assert not reach(module) & OUTSIDE, module
        assert not {name.split(".")[0] for name in imports(module)} & screen, module


def test_the_order_of_the_core() -> None:
    """Interpolants know nothing of networks, samplers nothing of rewards, adjoints nothing of methods."""
    order = ["interpolant", "flow", "sampler", "adjoint", "methods.adjoint_matching"]
    for i, name in enumerate(order):
        assert not reach(f"tiltflow.{name}") & {f"tiltflow.{later}" for later in order[i + 1 :]}
    for name in ("interpolant", "flow", "sampler"):
        assert "tiltflow.reward" not in reach(f"tiltflow.{name}")
    assert not any(name.startswith("tiltflow.methods") for name in reach("tiltflow.trainer"))


def test_methods_know_nothing_of_each_other_or_of_rewards_and_networks() -> None:
    for module in (name for name in MODULES if name.startswith("tiltflow.methods.")):
        others = {name for name in MODULES if name.startswith(("tiltflow.methods.", "tiltflow.rewards", "tiltflow.networks"))}
        assert not reach(module) & (others - {module})


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
