"""`localvit check-data` as a person and as a program meet it: what is printed where, and the exit status."""

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localvit.dataset_check.report import check_folder
from localvit_cli import main


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 41, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set that nothing is wrong with."""
    for number, path in enumerate(("train/ape/1", "train/ape/2", "train/bat/3", "val/ape/4", "val/bat/5")):
        save(tmp_path / "data" / f"{path}.png", number)
    return tmp_path / "data"


def check(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["check-data", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_nothing_wrong(root, capsys):
    status, out, err = check(capsys, root, "--workers", 0)
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["class", "train", "val"],
        ["ape", "2", "1"],
        ["bat", "1", "1"],
        ["2", "classes", "3", "2"],
        [],
        ["pixels:", "width", "41;", "height", "37"],
        [],
        ["nothing", "found", "that", "would", "hurt"],
    ]
    assert "5 of 5 images" in err


def test_warnings_alone_are_no_failure(root, capsys):
    save(root / "train" / "cat" / "1.png", 99)
    status, out, _ = check(capsys, root, "--workers", 0)
    assert status == 0
    assert out.endswith("0 errors, 1 warning\n")


def test_errors_are_told_first_and_fail(root, capsys):
    save(root / "train" / "a cat" / "1.png", 99)
    for number in range(7):
        (root / "val" / "ape" / f"broken_{number}.jpg").write_bytes(b"")
    status, out, _ = check(capsys, root)
    assert status == 1
    lines = out.splitlines()
    table = lines.index("severity  count  name        finding")
    assert [line.split()[:3] for line in lines[table + 1 : table + 3]] == [
        ["error", "7", "unreadable"],
        ["warning", "1", "not-in-val"],
    ]
    assert "    train/a cat" in lines
    assert [line for line in lines if "broken" in line] == [
        f"    val/ape/broken_{number}.jpg: an empty file" for number in range(5)
    ]
    assert "    and 2 more; --json has them all" in lines
    assert lines[-1] == "1 error, 1 warning"
    assert max(map(len, lines)) <= 110


def test_json_has_everything(root, capsys):
    for number in range(7):
        (root / "val" / "ape" / f"broken_{number}.jpg").write_bytes(b"")
    status, out, _ = check(capsys, root, "--json", "--workers", 2)
    assert status == 1
    told = json.loads(out)
    assert told == json.loads(json.dumps(check_folder(root).to_dict()))
    assert told["folder"] == str(root)
    assert told["images"] == {"train": 3, "val": 9}
    assert told["classes"] == {"train": {"ape": 2, "bat": 1}, "val": {"ape": 8, "bat": 1}}
    assert told["width"] == {"smallest": 41, "median": 41, "largest": 41}
    assert told["height"] == {"smallest": 37, "median": 37, "largest": 37}
    assert (told["errors"], told["warnings"]) == (1, 0)
    (finding,) = told["findings"]
    assert (finding["severity"], finding["name"], finding["count"]) == ("error", "unreadable", 7)
    assert finding["places"] == [
        {"paths": [f"val/ape/broken_{number}.jpg"], "note": "an empty file"} for number in range(7)
    ]


def test_of_many_classes_the_ends(tmp_path, capsys):
    for number in range(23):
        for image in range(2 if number == 11 else 1):
            save(tmp_path / f"c{number:02}" / f"{image}.png", 100 * number + image)
    status, out, _ = check(capsys, tmp_path, "--workers", 0)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["class,", "largest", "first", "all"]
    assert lines[1].split() == ["c11", "2"]
    assert lines[11].strip() == "... 3 more ..."
    assert lines[21].split() == ["c22", "1"]
    assert lines[22].split() == ["23", "classes", "24"]


def test_a_folder_without_an_image(tmp_path, capsys):
    status, out, _ = check(capsys, tmp_path)
    assert status == 1
    assert "has no class folders" in out
    assert out.endswith("1 error, 0 warnings\n")


def test_no_image_can_be_read(tmp_path, capsys):
    for name in ("ape", "bat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    assert check(capsys, tmp_path, "--json")[0] == 1
    status, out, _ = check(capsys, tmp_path)
    assert status == 1
    assert "no image could be read" in out


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_names_that_upset_a_terminal(root, capfd, form):
    name = os.fsdecode(b"caf\xe9\x1b[31m\n.png")
    try:
        (root / "train" / "ape" / name).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    status, text, _ = check(capfd, root, "--workers", 0, *form)
    assert status == 1
    assert "\x1b" not in text
    if form:
        (place,) = json.loads(text)["findings"][0]["places"]
        assert os.fsencode(place["paths"][0]) == os.fsencode(f"train/ape/{name}")
    else:
        assert r"caf\udce9\x1b[31m\n.png" in text


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["@/none"], 1, "no folder"),
        (["@/file"], 1, "is a file"),
        (["@", "--workers", "-1"], 2, "--workers -1"),
    ],
)
def test_one_clear_line_for_what_is_wrong(tmp_path, capsys, arguments, status, says):
    (tmp_path / "file").write_text("")
    told, out, err = check(capsys, *(argument.replace("@", str(tmp_path)) for argument in arguments))
    assert (told, out) == (status, "")
    (line,) = [line for line in err.splitlines() if line.startswith("localvit: error: ")]
    assert says in line
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["a", "--nonsense"], ["a", "b"], ["a", "--workers", "many"]])
def test_bad_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["check-data", *arguments])
    assert exit_.value.code == 2


# Ctrl-C may fall between the opening of a file and the block that closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_is_one_line(root, capsys):
    """The main process waits for a pipe that is called an image when Ctrl-C comes."""
    pipe = root / "train" / "ape" / "waits.png"
    os.mkfifo(pipe)

    def interrupt() -> None:
        writer = os.open(pipe, os.O_WRONLY)  # returns once the pipe is read
        os.kill(os.getpid(), signal.SIGINT)
        os.close(writer)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status, out, err = check(capsys, root, "--workers", 0)
    thread.join()
    assert (status, out) == (130, "")
    assert err.splitlines() == [f"looking through {root}", "localvit: interrupted"]
