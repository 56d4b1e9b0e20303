"""The layers: a package imports from those above it in this list, and `locality.py` from torch and ops alone."""

import ast
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

LAYERS = (
    "utils",
    "ops",
    "locality",
    "tokens",
    "surgery",
    "models",
    "checkpoints",
    "data",
    "inference",
    "hub",
    "dataset_check",
    "evaluation",
    "train",
    "bench",
    "exporters",
    "web_page",
    "explanations",
)
FILES = sorted((SRC / "localvit").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(SRC / "localvit").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_only_from_the_layers_above(path):
    layer = layer_of(path)
    if layer in ("__init__", "__main__"):
        return
    assert layer in LAYERS, f"{layer} is not in the list of layers: add it where it belongs"
    for name in imported_modules(path):
        parts = name.split(".")
        assert parts[0] != "localvit_cli", f"{path.name} imports the command line"
        if parts[0] == "localvit" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= LAYERS.index(layer), f"{path.name} imports {name} from a layer below"


def test_every_layer_exists():
    assert set(LAYERS) - {layer_of(path) for path in FILES} == set()


def test_the_papers_file_imports_torch_and_ops_only():
    for name in imported_modules(SRC / "localvit" / "locality.py"):
        parts = name.split(".")
        assert parts[0] == "torch" or parts[0] in sys.stdlib_module_names or parts[:2] == ["localvit", "ops"], name


@pytest.mark.parametrize("package", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_a_package_opens_with_its_contract(package):
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text()))
