"""docs/trust.md and docs/study.md: their commands are read, their study is one, and what they say of files is so."""

import re
import shlex
from pathlib import Path

import pytest
import tyro
import yaml

from localvit.evaluation.report.files import COLUMNS
from localvit.train.study import Study, study_names
from localvit.utils.intervals import interval_text
from localvit_cli.eval import Eval
from localvit_cli.export import Export
from localvit_cli.predict import Predict
from localvit_cli.study import Study as StudyCommand

DOCS = Path(__file__).parents[2] / "docs"
CLASSES = {"eval": Eval, "predict": Predict, "export": Export, "study": StudyCommand}
TEXTS = {name: (DOCS / name).read_text() for name in ("trust.md", "study.md")}
COMMANDS = [
    shlex.split(line, comments=True)
    for text in TEXTS.values()
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_are_read(words):
    assert words[0] == "localvit"
    command = tyro.cli(CLASSES[words[1]], args=words[2:])
    if isinstance(command, StudyCommand) and command.source:
        assert command.source in (*study_names(), "my_study.yaml")


def test_the_study_is_one():
    [block] = re.findall(r"^```yaml\n(.*?)^```", TEXTS["study.md"], flags=re.MULTILINE | re.DOTALL)
    assert Study(**yaml.safe_load(block)).baseline == "plain"
    assert all(f"`{name}`" in TEXTS["study.md"] for name in study_names())


def test_what_is_said_of_intervals_and_columns():
    assert f"83.3 %, and the interval is {interval_text(100 * 15 / 18, 18)}" in " ".join(TEXTS["trust.md"].split())
    assert {"accuracy_low", "accuracy_high"} <= set(COLUMNS)
    assert interval_text(86.9, 2000) in TEXTS["trust.md"]
