"""`localvit recipes`: what it prints is in the recipes, and the commands it prints are ones that train."""

import json
import shlex

import pytest
import yaml

from localvit.train.recipe import RECIPES, read_recipe, recipe_names
from localvit.train.recipe_facts import read_facts
from localvit_cli import main
from localvit_cli.train import parse


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_states_what_to_expect_and_a_command_that_is_read(name):
    facts = read_facts(name)
    comments = " ".join((RECIPES / f"{name}.yaml").read_text().replace("\n#", " ").replace("\\", " ").split())
    for text in (facts.summary, facts.expected, facts.hardware):
        assert text
        assert " ".join(text.split()) in comments
        assert not any(heading in text for heading in ("Expected:", "Hardware:", "Command:", "Arms"))
    words = shlex.split(facts.command)
    config = parse(words[words.index("train") + 1 :]).to_config()
    assert config.output_dir.parts[0] == "runs"
    recipe = read_recipe(name)
    assert {key: config.to_dict()[key] for key in recipe if key not in ("model_args", "epochs")} == {
        key: value for key, value in recipe.items() if key not in ("model_args", "epochs")
    }


def test_the_list_has_every_recipe_with_its_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipe_names())
    assert "Acc@1 99.4 to 100.0 (seeds 0 to 2)" in text
    assert "\n  localvit train --recipe digits --output-dir runs/digits\n" in text


def test_a_recipe_is_printed_as_a_settings_file(capsys, tmp_path):
    assert main(["recipes", "cifar10"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text) == read_recipe("cifar10")
    assert "# Expected: Acc@1" in text
    assert main(["recipes", "cifar10", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["settings"]) == ("cifar10", read_recipe("cifar10"))


def test_an_unknown_recipe_is_one_line(capsys):
    assert main(["recipes", "cifar"]) == 2
    assert capsys.readouterr().err.startswith("localvit: error: there is no recipe 'cifar'; the recipes are ablation_")
