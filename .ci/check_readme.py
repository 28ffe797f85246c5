"""The README's file tree must be the repository: every top-level entry, and every file directly in seuf_ray/.

    <!-- tree -->
    ```
    seuf_ray/            the package
      config.py          everything a job file may say
    tests/               ...
    ```
    <!-- /tree -->

One entry per line, a description after at least two spaces, folders with a slash, the insides of `seuf_ray/`
indented. Entries whose name starts with a dot may be left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "seuf_ray/"
UNREMARKABLE = ("__init__.py", "py.typed")
BLOCK = re.compile(r"<!-- tree -->\s*```\w*\n(.*?)```\s*<!-- /tree -->", re.DOTALL)
LINE = re.compile(r"(?P<indent> *)(?P<name>[\w.-]+/?)(?:\s{2,}(?P<text>\S.*))?\s*")


def main() -> int:
    """Print what is wrong, one line each; the exit status says whether anything is."""
    problems = check(ROOT)
    for problem in problems:
        print(f"README.md: {problem}", file=sys.stderr)
    if not problems:
        print("README.md: the tree is the repository's")
    return 1 if problems else 0


def check(root: Path) -> list[str]:
    """Everything that is wrong with the tree in `root`'s README."""
    readme = root / "README.md"
    if not readme.exists():
        return ["no such file"]
    block = BLOCK.search(readme.read_text(encoding="utf-8"))
    if block is None:
        return ["no file tree: put it in a ``` block between <!-- tree --> and <!-- /tree -->"]
    shown, problems = _shown(block[1])
    actual = _actual(root)
    required = {name for name in actual if not name.startswith(".")}
    problems += [f"{name} is missing from the tree" for name in sorted(required - shown)]
    problems += [f"{name} is in the tree, but not in the repository" for name in sorted(shown - actual)]
    return problems


def _shown(block: str) -> tuple[set[str], list[str]]:
    """The paths that the tree names, and the lines of it that cannot be read."""
    shown: set[str] = set()
    problems: list[str] = []
    parent = ""
    for line in filter(str.strip, block.splitlines()):
        match = LINE.fullmatch(line)
        if match is None or not match["text"]:
            problems.append(f"expected `name  description`, found {line.strip()!r}")
        if match is None:
            continue
        if not match["indent"]:
            parent = match["name"]
        name = parent + match["name"] if match["indent"] else match["name"]
        if name in shown:
            problems.append(f"{name} is in the tree twice")
        shown.add(name)
    return shown, problems


def _actual(root: Path) -> set[str]:
    """Top-level entries and the package's own, folders with a slash, as git tracks them (or would)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    files = [name for name in listing if (root / name).exists() and Path(name).name not in UNREMARKABLE]
    entries = {_entry("", name) for name in files}
    return entries | {PACKAGE + _entry(PACKAGE, name) for name in files if name.startswith(PACKAGE)}


def _entry(folder: str, name: str) -> str:
    """What a listing of `folder` shows of the file `name`: itself, or the folder that it is in."""
    first, slash, _ = name.removeprefix(folder).partition("/")
    return first + slash


if __name__ == "__main__":
    sys.exit(main())
