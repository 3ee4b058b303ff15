"""The tree of the package, one line a file, from the first sentence of each: the second half of src/tiltflow/README.md.

python scripts/tree.py            print it
python scripts/tree.py --write    write it into the README
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "tiltflow"
README = PACKAGE / "README.md"
BEGINS = "## The tree\n"
WIDTH = 44


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"\.\s(?=[A-Z`])", " ".join(text.split("\n\n")[0].split()))[0].removesuffix(".")


def lines(folder: Path = PACKAGE, depth: int = 0) -> Iterator[str]:
    """The files of a folder, then its folders."""
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("__init__.py", "__main__.py"):
            yield f"{'  ' * depth + path.name:<{WIDTH}}{sentence(path)}"
    for path in sorted(folder.glob("*/__init__.py")):
        yield f"{'  ' * depth + path.parent.name + '/':<{WIDTH}}{sentence(path)}"
        yield from lines(path.parent, depth + 1)


def page() -> str:
    """The README with the tree as it is now."""
    head = README.read_text(encoding="utf-8").split(BEGINS)[0]
    return f"{head}{BEGINS}\n```\n" + "\n".join(line.rstrip() for line in lines()) + "\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write it into src/tiltflow/README.md")
    if parser.parse_args().write:
        README.write_text(page(), encoding="utf-8")
    else:
        print("\n".join(lines()))


if __name__ == "__main__":
    main()
