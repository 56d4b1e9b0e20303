"""The environment of a launcher: it counts only when it is whole and consistent."""

import json

import pytest
import torch
import torch.distributed as dist
from tiny import STILL, tiny_config, write_some_digits

from localvit.utils import devices
from localvit.utils.distributed import Launch, is_main, process_group, read_launch
from localvit_cli import main

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.fixture
def launcher(monkeypatch):
    """A function that sets the variables of a launcher, and unsets all others."""

    def set_environment(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def without(*names, **changes):
    return {name: value for name, value in (WHOLE | changes).items() if name not in names}


LEFTOVERS = [
    ({"RANK": "1"}, "RANK=1, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but not RANK, MASTER_ADDR, MASTER_PORT"),
    ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3, but not RANK"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "but not MASTER_ADDR, MASTER_PORT"),
    ({"RANK": "one"}, "RANK=one, but not"),
    (without("MASTER_PORT"), "but not MASTER_PORT"),
    (without("RANK"), "but not RANK"),
    (without("WORLD_SIZE", MASTER_ADDR=""), "but not WORLD_SIZE, MASTER_ADDR"),
    (without(WORLD_SIZE="1"), "RANK=1, WORLD_SIZE=1, MASTER_ADDR=127.0.0.1, MASTER_PORT=29400, LOCAL_RANK=1, which do"),
    (without(RANK="-1"), "RANK=-1, WORLD_SIZE=2,"),
    (without(RANK="2"), "RANK=2, WORLD_SIZE=2,"),
    (without(MASTER_PORT="here"), "which do not fit together"),
    (without(LOCAL_RANK="x"), "which do not fit together"),
]


@pytest.mark.parametrize(("environment", "words"), LEFTOVERS, ids=[" ".join(each) for each, _ in LEFTOVERS])
def test_a_leftover_of_a_launcher_leaves_a_single_process(launcher, caplog, monkeypatch, environment, words):
    launcher(**environment, TORCHELASTIC_RESTART_COUNT="1")
    assert is_main()
    with process_group(torch.device("cpu")):
        assert not dist.is_initialized()
    (message,) = caplog.messages
    assert message.startswith("running as a single process: the environment has ")
    assert words in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices.choose_device(None) == (torch.device("cuda", 0), None)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "host"}])
def test_a_single_process_is_no_reason_for_a_warning(launcher, caplog, environment):
    launcher(**environment)
    assert read_launch() == (None, None)
    with process_group(torch.device("cpu")):
        assert is_main()
    assert caplog.messages == []


def test_a_whole_environment_counts(launcher, monkeypatch):
    launcher(**WHOLE, TORCHELASTIC_RESTART_COUNT="2")
    assert read_launch() == (Launch(rank=1, world_size=2, local_rank=1, restarts=2), None)
    assert not is_main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices.choose_device("cuda") == (torch.device("cuda", 1), None)


@pytest.mark.parametrize("environment", [{"RANK": "1"}, without("RANK"), {"TORCHELASTIC_RESTART_COUNT": "1"}])
def test_training_with_a_leftover_saves_its_work(launcher, tmp_path, capsys, environment):
    data = write_some_digits(tmp_path, classes=2, train=4, val=1)
    config = tiny_config(data, tmp_path / "run", epochs=1, warmup_epochs=0, batch_size=4, **STILL)
    settings = tmp_path / "settings.yaml"
    settings.write_text(str(config))
    launcher(**environment)
    assert main(["train", "--config", str(settings)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Acc@1 ")
    assert ("running as a single process" in printed.err) == ("TORCHELASTIC_RESTART_COUNT" not in environment)
    assert "starting a new run" not in printed.err  # not resumed
    assert json.loads((tmp_path / "run" / "log.txt").read_text())["epoch"] == 0
    assert {"last.safetensors", "best.safetensors", "checkpoint.pth"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
