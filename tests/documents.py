"""What a page in Markdown contains: its code blocks, its commands, its links and its anchors."""

import ast
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from localvit_cli import COMMANDS
from localvit_cli.published import parse as parse_published
from localvit_cli.published import to_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))
ANY_SETTINGS = str(ROOT / "src" / "localvit" / "train" / "recipes" / "digits.yaml")
"""A file of settings, in the place of one that a run would have written."""
_FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it is not run, if it is not."""

    kind: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(found["kind"], found["text"], found["reason"]) for found in _FENCE.finditer(text_of(page))]


def text_of(page: Path) -> str:
    """The Markdown of a page or of a notebook's cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".py":
        ast.parse(text)
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines() if line[:1] == "#")
    return text


def command_lines(text: str) -> list[list[str]]:
    """The words of each command of a block for a shell, without comments."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(_with_options(line), comments=True))]


def _with_options(command: str) -> str:
    """With what stands in brackets, which may be left out."""
    return re.sub(r"\[(--.*?)\](?= |$)", r"\1", command)


def inline_commands(page: Path) -> list[list[str]]:
    """The words of each command in the prose of a page."""
    prose = _FENCE.sub("", text_of(page))
    codes = re.findall(r"`((?:localvit|python -m localvit) [a-z][^`]*)`", prose)
    commands = (code.replace("\n", " ").replace("python -m localvit", "localvit") for code in codes)
    return [shlex.split(_with_options(command)) for command in commands]


def check_command(words: list[str]) -> None:
    """Parse a command as the program does, without running it. Raises AssertionError if it does not parse."""
    if words[0] == "torchrun":
        program = next(word for word in words if word in ("main.py", "localvit"))
        words = ["python"] * (program == "main.py") + words[words.index(program) :]
    try:
        if words[:2] == ["python", "main.py"]:
            to_config(parse_published(words[2:]))
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "localvit" and words[1] != "--version":
            assert words[1] in COMMANDS, f"there is no command {words[1]}"
            module = importlib.import_module(f"localvit_cli.{words[1].replace('-', '_')}")
            if words[1] == "train":
                module.parse([ANY_SETTINGS if word.endswith("config.yaml") else word for word in words[2:]])
            else:
                tyro.cli(getattr(module, words[1].title().replace("-", "")), args=words[2:])
    except SystemExit as end:
        raise AssertionError(f"does not parse: {shlex.join(words)}") from end


def links(page: Path) -> list[str]:
    """The targets of relative links and images."""
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Zensical and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
