"""docs/localize.md: its snippets and commands run, and its table lists every family."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from localvit.surgery.localize import locality_modules
from localvit.tokens.mlp import LocalityMlp
from localvit_cli import main
from localvit_cli.train import parse

DOCUMENT = (Path(__file__).parents[2] / "docs" / "localize.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


def test_every_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for kind, block in BLOCKS:
        if kind == "python":
            if "import peft" in block:
                pytest.importorskip("peft", reason="PEFT is not installed")
            if "import ViT" in block:
                pytest.importorskip("transformers", reason="Hugging Face transformers is an extra")
            exec(compile(block, "localize.md", "exec"), names)
        for line in block.splitlines() if kind == "bash" else ():
            program, *words = shlex.split(line)
            if program == "python":  # a benchmark
                continue
            assert program == "localvit"
            if words[0] == "train":
                assert parse(words[1:]).to_config().localize == {"gate": "se"}
            else:
                assert main(words) == 0
    assert [kind for kind, _ in BLOCKS].count("python") == 7
    assert "12 feed-forwards" in capsys.readouterr().out
    assert isinstance(names["model"], torch.nn.Module)
    assert len(locality_modules(names["again"])) == 12
    assert not any(isinstance(module, LocalityMlp) for module in names["again"].modules())
    assert len(locality_modules(names["restored"])) == 2
    assert names["features"].shape == (2, 1 + 3 * 5, 32)
    assert len(locality_modules(names["own"])) == 2


def test_the_table_lists_every_family_and_no_output_changed():
    table = re.search(r"<!-- support table -->\n(.*?)\n<!-- end of support table -->", DOCUMENT, re.DOTALL)
    assert table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]
    libraries = [row[1].strip("`").partition(":")[0] for row in rows]
    assert (libraries.count("timm"), libraries.count("transformers")) == (36, 11)
    assert all(int(row[2]) > 0 for row in rows)
    assert all(float(row[4]) <= 1e-12 for row in rows)
