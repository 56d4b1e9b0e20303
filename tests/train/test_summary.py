"""The result of a run against closed forms, and the commands and settings in its report."""

import math
import shlex
from pathlib import Path

import pytest
import torch
import tyro
import yaml

from localvit.train.config import TrainConfig
from localvit.train.summary import RunResult, summary_rows, write_summary
from localvit_cli.eval import Eval
from run_folders import SETTINGS, log_row

CPU = torch.device("cpu")


def measured(epoch, acc1, seconds, rate, memory, skipped):
    values = {"seconds": seconds, "images_per_second": rate, "peak_memory_mb": memory, "skipped_steps": skipped}
    return log_row(epoch, acc1) | values


METRICS = [
    measured(0, 40.0, 3600.0, 11.0, 300.0, 2),
    measured(1, 71.25, 61.5, 1013.0, 700.0, 2),
    measured(2, 71.25, 0.5, 17.0, 500.0, 5),
]
RESULT = RunResult.of(METRICS)


def test_result_of_a_run():
    result = RunResult.of(METRICS)
    assert (result.best, result.last) == (METRICS[1], METRICS[2])  # the first of two equal ones
    assert (result.seconds, result.images_per_second, result.peak_memory_mb) == (3662.0, 17.0, 700.0)
    assert result.skipped_steps == 5


def test_numbers_that_were_not_measured_are_none():
    result = RunResult.of([METRICS[0], log_row(1, 30.0)])
    assert result.seconds is result.images_per_second is result.peak_memory_mb is result.skipped_steps is None
    rows = dict(summary_rows(TrainConfig(), RunResult.of([log_row(0, 30.0)]), CPU))
    assert rows.keys() == {"model", "data", "epochs", "best epoch", "last epoch", "device"}


def config(folder, **settings):
    return TrainConfig(**SETTINGS | {"output_dir": str(folder)} | settings)


def test_summary_rows_have_units_and_epochs_from_1(tmp_path):
    rows = dict(summary_rows(config(tmp_path, data_path="digits"), RESULT, CPU))
    assert rows["model"] == "localvit_nano_patch4_32, 731,074 parameters trained"
    assert rows["data"] == "DIGITS, digits"
    assert rows["epochs"] == "3 of 3"
    assert rows["best epoch"] == "2: Acc@1 71.250 %, Acc@5 97.000 %, validation loss 1.2500, training loss 1.7500"
    assert rows["time"] == "1:01:02 (h:mm:ss), without evaluation"
    assert (rows["speed"], rows["peak memory"], rows["skipped steps"]) == ("17.0 images/s", "700 MB", "5")
    assert rows["device"].startswith("cpu (")


def test_accuracies_have_the_interval_of_their_number_of_images(tmp_path):
    rows = [log_row(0, 100 * 15 / 18) | {"test_images": 18.0}]
    text = dict(summary_rows(config(tmp_path), RunResult.of(rows), CPU))["best epoch"]
    assert text.startswith("1: Acc@1 83.333 % (95 % interval 60.8 to 94.2), Acc@5")


def tables(text):
    """The cells of each table's rows, headings and rule left out."""
    lines = [line for block in text.split("\n\n") if block.startswith("|") for line in block.splitlines()[2:]]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_settings_in_the_report_are_those_of_the_run(tmp_path):
    asked = config(tmp_path, ema_decay=None, lr=2e-5, input_size=[28, 36], model_args={"local_blocks": []}, seed=7)
    text = write_summary(asked, RESULT, CPU).read_text()
    in_report = {name: (value, default) for name, value, default in (row for row in tables(text) if len(row) == 3)}
    # Values in the report are valid YAML; reading them gives the same settings.
    values = {name: yaml.safe_load(value) for name, (value, _) in in_report.items()}
    assert float(values.pop("lr")) == 2e-5  # YAML 1.1 reads 2e-05 as text
    assert TrainConfig(**values | {"lr": 2e-5, "output_dir": str(tmp_path)}) == asked
    defaults = TrainConfig().to_dict()
    assert {name: yaml.safe_load(default) for name, (_, default) in in_report.items() if name != "lr"} == {
        name: defaults[name] for name in in_report if name != "lr"
    }


def commands(text):
    return [shlex.split(part.split("\n", 1)[0]) for part in text.split("```bash\n")[1:]]


def test_the_command_evaluates_this_run(tmp_path):
    folder, data_path = tmp_path / "a run", tmp_path / "the data"
    asked = config(folder, data_set="INAT", data_path=str(data_path), inat_category="order")
    folder.mkdir()
    (folder / "curves.png").touch()
    text = write_summary(asked, RESULT, CPU).read_text()
    (command,) = commands(text)
    assert command[:2] == ["localvit", "eval"]
    evaluation = tyro.cli(Eval, args=command[2:])
    assert (evaluation.model, evaluation.data_set) == (str(folder / "best.safetensors"), "INAT")
    assert (evaluation.data_path, evaluation.inat_category) == (data_path, "order")
    assert "(curves.png)" in text


def test_the_report_of_an_unfinished_run_has_a_command_to_resume(tmp_path):
    text = write_summary(config(tmp_path, epochs=4), RESULT, CPU).read_text()
    assert commands(text)[1] == ["localvit", "train", "--resume", "auto", "--output-dir", str(tmp_path)]
    assert "3 of 4" in text
    assert "curves.png" not in text


@pytest.mark.parametrize("val", [True, False])
def test_training_images_are_not_suggested_for_evaluation(tmp_path, val):
    if val:
        (tmp_path / "val").mkdir()
    asked = config(tmp_path / "run", data_set="FOLDER", data_path=str(tmp_path))
    text = write_summary(asked, RESULT, CPU).read_text()
    (command,) = commands(text)
    assert Path(command[-1]) == (tmp_path if val else Path("OTHER_IMAGES"))
    assert ("were used for training" in text) is not val


def test_special_characters_do_not_break_the_table(tmp_path):
    result = RunResult.of([METRICS[0] | {"test_loss": math.nan}])
    text = write_summary(config(tmp_path, finetune="a|b.pth"), result, CPU).read_text()
    assert r"| finetune | a\|b.pth | null |" in text
    assert "validation loss nan" in text
