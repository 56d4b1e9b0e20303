"""Build the site in build/site: `make docs`.

It puts the pages together in build/docs (those of docs/, the README as the home page, CONTRIBUTING and CHANGELOG, the
notebooks with their outputs), and lets Zensical render them. Any warning fails the build.
"""

import ast
import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)")
# griffe, which reads the docstrings, puts no level in front of its messages.
WARNING = re.compile(r"\bwarning\b|^griffe:", re.IGNORECASE | re.MULTILINE)


def main(root: Path = ROOT) -> int:
    """Write build/docs and build/site of the repository `root`. Returns the exit status: 1 if there are warnings."""
    pages = root / "build" / "docs"
    shutil.rmtree(pages, ignore_errors=True)
    put_pages_together(root, pages)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    run = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(run.stdout, end="")
    if run.returncode or WARNING.search(run.stdout):
        print("make_site: the build has warnings or failed", file=sys.stderr)
        return 1
    print(f"the site: {root / 'build' / 'site' / 'index.html'}")
    return 0


def put_pages_together(root: Path, pages: Path) -> None:
    """Copy every page and figure to `pages`, with links that hold there, and run the notebooks."""
    docs = root / "docs"
    shutil.copytree(docs, pages, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in docs.rglob("*.md"):
        (pages / path.relative_to(docs)).write_text(on_the_site(path.read_text(), path.parent, root), encoding="utf-8")
    for name, page in OUTSIDE.items():
        (pages / page).write_text(on_the_site((root / name).read_text(), root, root), encoding="utf-8")
    (pages / "notebooks").mkdir(exist_ok=True)
    for path in sorted((docs / "notebooks").glob("*.py")):
        text = on_the_site(notebook_page(path, pages / "notebooks"), path.parent, root)
        (pages / "notebooks" / f"{path.stem}.md").write_text(text, encoding="utf-8")


def on_the_site(text: str, folder: Path, root: Path) -> str:
    """The page `text` of `folder`, with its relative links as they are on the site."""
    docs = root / "docs"
    depth = len(folder.relative_to(docs).parts) if folder.is_relative_to(docs) else 0

    def moved(match: re.Match[str]) -> str:
        opening, target = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        file = Path(os.path.normpath(folder / target))
        if file.parent == root:  # one of OUTSIDE; anything else is not on the site, which Zensical then reports
            target = OUTSIDE.get(file.name, target)
        elif file.is_relative_to(docs):
            target = file.relative_to(docs).as_posix()
        if target.endswith(".py"):
            target = target.removesuffix(".py") + ".md"
        return f"{opening}{'../' * depth}{target}"

    return LINK.sub(moved, text)


def notebook_page(path: Path, folder: Path) -> str:
    """A notebook (jupytext's percent format) as a page: its text, its code, and what the code prints and draws.

    Figures are written to `folder`.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    parts = []
    for number, cell in enumerate(jupytext.read(path)["cells"]):
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
            continue
        parts.append(f"```python\n{cell['source']}\n```")
        output = run_cell(cell["source"], names, str(path))
        if output:
            parts.append(f"```text\n{output}\n```")
        parts += [
            f"![Figure drawn by the code above]({name})" for name in save_figures(folder, f"{path.stem}_{number}")
        ]
    parts.append(
        f"The source of this page is `docs/notebooks/{path.name}`: open it with Jupyter and jupytext, or run it."
    )
    return "\n\n".join(parts) + "\n"


def run_cell(source: str, names: dict[str, Any], file: str) -> str:
    """Run a cell as Jupyter does: what it prints, and the value of its last expression."""
    *statements, last = ast.parse(source, file).body
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(statements, []), file, "exec"), names)
            value = eval(compile(ast.Expression(last.value), file, "eval"), names)
            if value is not None:
                print(value)
        else:
            exec(compile(source, file, "exec"), names)
    return printed.getvalue().rstrip()


def save_figures(folder: Path, name: str) -> Iterator[str]:
    """Save and close matplotlib's open figures; the names of their files."""
    if "matplotlib.pyplot" not in sys.modules:
        return
    pyplot = sys.modules["matplotlib.pyplot"]
    for number in pyplot.get_fignums():
        file = f"{name}_{number}.png"
        pyplot.figure(number).savefig(folder / file, dpi=150, bbox_inches="tight")
        pyplot.close(number)
        yield file


if __name__ == "__main__":
    sys.exit(main())
