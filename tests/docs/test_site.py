"""The site builds without a warning, every page is in its navigation, and every link and anchor leads somewhere."""

import importlib.util
import shutil
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from documents import NOTEBOOKS, ROOT

SOURCES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "zensical.toml")


@pytest.fixture(scope="module")
def make_site():
    for needed in ("zensical", "jupytext", "mkdocstrings", "matplotlib"):
        pytest.importorskip(needed, reason="the site needs the extra docs")
    path = ROOT / "docs" / "make_site.py"
    spec = importlib.util.spec_from_file_location("make_site", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_in(nav: list) -> list[str]:
    """The pages of a navigation, in order."""
    found = []
    for entry in nav:
        for value in entry.values():
            found += [value] if isinstance(value, str) else pages_in(value)
    return found


class Page(HTMLParser):
    """The ids of a page in HTML, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def test_every_page_is_in_the_navigation():
    nav = pages_in(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    pages += [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]
    assert sorted(nav) == sorted([*pages, "index.md", "contributing.md", "changelog.md"])


def test_the_site_builds_without_warnings_and_its_links_hold(make_site, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    for name in SOURCES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.setattr(make_site, "run_cell", lambda source, names, file: "")  # test_pages.py runs the notebooks
    assert make_site.main(tmp_path) == 0, capfd.readouterr().out
    site = tmp_path / "build" / "site"
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 20
    assert "localvit.localize" in pages[site / "api.html"].ids
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if "://" in target or target.startswith(("mailto:", "data:")):
                assert not target.endswith((".js", ".css")), f"{path.name} loads {target} from the network"
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if "notebooks" in file.parts and file.suffix == ".png":  # the notebooks were not run
                continue
            assert file.is_file(), f"{path.name}: {link}"
            if anchor and file in pages:
                assert anchor in pages[file].ids, f"{path.name}: {link}"


def test_a_broken_link_fails_the_build(make_site, tmp_path, capfd):
    for name in SOURCES:
        (tmp_path / name).write_text("# Page\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "zensical.toml").write_text(
        '[project]\nsite_name = "x"\ndocs_dir = "build/docs"\nsite_dir = "build/site"\n'
    )
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n[home](../README.md#page)\n")
    assert make_site.main(tmp_path) == 0, capfd.readouterr()
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n[home](../README.md#nothing)\n")
    assert make_site.main(tmp_path) == 1


def test_a_cell_gives_what_it_prints_and_its_last_value(make_site):
    names = {}
    assert make_site.run_cell("x = 3\nprint('a')\nx + 4", names, "cell") == "a\n7"
    assert make_site.run_cell("y = x", names, "cell") == ""
    assert names["y"] == 3
    assert "matplotlib" in sys.modules or list(make_site.save_figures(Path(), "none")) == []


def test_the_figure_of_the_architecture_shows_the_imports(tmp_path):
    spec = importlib.util.spec_from_file_location("make_architecture", ROOT / "docs" / "make_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = ROOT / "src" / "localvit"
    assert module.FIGURE.read_text() == module.draw(source), "run python docs/make_architecture.py"
    assert module.imports(source / "locality") == {"ops"}
    (tmp_path / "unheard").mkdir()
    with pytest.raises(ValueError, match="unheard"):
        module.layers(tmp_path)
