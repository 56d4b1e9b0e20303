"""Draw docs/figures/architecture.svg: the packages of localvit as layers, each with those that it imports.

Run `python docs/make_architecture.py` after a package was added or its imports changed; a test compares the file.
"""

import ast
import re
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "architecture.svg"
ROW, LEFT, TOP = 46, 160, 112


def imports(package: Path) -> set[str]:
    """Names of the packages of localvit that a package, or a module, imports."""
    found = set()
    for path in package.rglob("*.py") if package.is_dir() else [package.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("localvit.")}
    return found - {package.name}


def contract(package: Path) -> str:
    """The first sentence of what a package says about itself."""
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def layers(source: Path) -> list[Path]:
    """The packages in the order of CONTRIBUTING's list.

    Raises:
        ValueError: for a package that is not in the list.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", text.partition("src/localvit/")[2].partition("```")[0], re.M)
    present = {path.stem for path in source.iterdir() if path.is_dir() or path.suffix == ".py"}
    if unknown := sorted(name for name in present - {*listed} if not name.startswith("__") and name != "py"):
        raise ValueError(f"not in CONTRIBUTING's list of packages: {', '.join(unknown)}")
    return [source / name for name in listed if name in present]


def draw(source: Path) -> str:
    """The figure: a row for each package, a column for each that it may import, a dot where it does."""
    order = layers(source)
    names = [path.name for path in order]
    text_at = LEFT + 26 * len(order) + 24
    width, height = text_at + 620, TOP + ROW * len(order) + 24
    font = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
    label = "The packages of localvit, each with those that it imports"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{font}" role="img" '
        f'aria-label="{label}">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
    ]
    for column, name in enumerate(names):
        x = LEFT + 26 * column + 13
        turned = f'transform="rotate(-45 {x + 4} {TOP - 10})"'
        parts.append(f'<text x="{x + 4}" y="{TOP - 10}" font-size="14" fill="#57606a" {turned}>{name}</text>')
    for row, path in enumerate(order):
        y = TOP + ROW * row
        used = imports(path)
        if row % 2 == 0:
            parts.append(f'<rect x="12" y="{y}" width="{width - 24}" height="{ROW}" rx="4" fill="#f6f8fa"/>')
        parts.append(f'<text x="24" y="{y + 28}" font-size="16" font-weight="600" fill="#1a4fc4">{path.name}</text>')
        for column, name in enumerate(names[:row]):
            x = LEFT + 26 * column + 13
            if name in used:
                parts.append(f'<circle cx="{x}" cy="{y + 23}" r="6" fill="#2f6feb"/>')
            else:
                parts.append(f'<circle cx="{x}" cy="{y + 23}" r="2" fill="#d0d7de"/>')
        lines = textwrap.wrap(contract(path).replace("`", ""), 74)[:2]
        for number, line in enumerate(lines):
            baseline = y + (28 if len(lines) == 1 else 19 + 19 * number)
            parts.append(f'<text x="{text_at}" y="{baseline}" font-size="15.5" fill="#24292f">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(draw(ROOT / "src" / "localvit"), encoding="utf-8")
