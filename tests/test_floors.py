"""The house's floors: a module imports from its own floor and those below, and the ground floor imports torch alone."""

import ast
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

FLOORS = [
    {"locality", "fused", "training_form", "tokens", "kernels", "activations", "hooks"}
    | {"weight_files", "files", "columns", "devices", "distributed", "_torchvision"},
    {"surgery", "last_block", "fuse"},
    {"models"},
    {"zoo", "weights_fit", "checkpoints"},
    {"data", "inference", "evaluate", "predict", "cost", "real_labels", "calibration", "per_class"}
    | {"report", "report_page", "report_elements", "report_template"}
    | {"bench", "bench_models", "bench_result", "bench_report", "bench_plot"},
    {"train"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((SRC / "localvit").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name}


def room(path: Path) -> str:
    return path.relative_to(SRC / "localvit").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_only_downward(path):
    if room(path) == "__init__":
        return
    assert room(path) in FLOOR_OF, f"{path.name} stands on no floor: give it one in this test"
    for name in imported_modules(path):
        parts = name.split(".")
        assert parts[0] != "localvit_cli", f"{path.name} imports the command line"
        if parts[0] == "localvit" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[room(path)], f"{path.name} imports {name} from a floor above"


def test_every_floor_is_lived_on():
    rooms = {room(path) for path in FILES}
    assert {name for floor in FLOORS for name in floor} - rooms == set()


@pytest.mark.parametrize("name", ["locality", "tokens"])
def test_the_ground_floor_imports_torch_alone(name):
    roots = {module.split(".")[0] for module in imported_modules(SRC / "localvit" / f"{name}.py")}
    assert roots <= {"torch", "localvit"} | sys.stdlib_module_names
