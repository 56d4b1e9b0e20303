"""The distributions: what they hold, that the wheel works from an empty folder, and the page that a registry shows."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = (".cpp", ".yaml", ".jinja", ".css", ".js", ".json", ".typed", ".safetensors")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder with the source distribution and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions):
    [path] = distributions.glob("*.whl")
    return path


def test_the_source_distribution_holds_what_its_tests_and_docs_need(distributions):
    [path] = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("src", "tests", "docs", "benchmarks"):
        ours = {
            str(file.relative_to(ROOT))
            for file in (ROOT / folder).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in str(file)
        }
        assert ours <= held
    assert {"main.py", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE", "Makefile", "constraints.txt"} <= held


def test_the_wheel_holds_the_packages_with_their_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [file for file in (ROOT / "src").rglob("*") if file.suffix in DATA]
    assert {file.suffix for file in data} >= {".yaml", ".safetensors"}
    assert {str(file.relative_to(ROOT / "src")) for file in data} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "benchmarks"))]


def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True, timeout=100)
    program = (
        "import localvit, torch; print(localvit.__file__); "
        "print(*localvit.create_model('localvit_nano_patch4_32', pretrained=True)(torch.zeros(1, 3, 32, 32)).shape); "
        "from localvit_cli import main; main(['train', '--recipe', 'digits', '--help'])"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    package, shape, *shown = run.stdout.splitlines()
    assert (package, shape) == (str(site / "localvit" / "__init__.py"), "1 10")
    assert any("localvit_nano_patch4_32" in line for line in shown)  # the recipe's own default: its file was found


def test_the_description_has_no_link_into_the_repository(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    description = metadata.get_payload()
    assert "# localvit" in description
    links = re.findall(r"\]\(([^)\s]+)\)", description)
    assert links
    assert all(link.startswith("https://") for link in links), links
    assert "docs/localize.md" in description
    assert metadata["Author"] == "localvit maintainers"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
