"""`localvit check-data`: what goes to standard output and standard error, and the exit status."""

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
from waiting_images import waiting_format


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 41, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set without problems."""
    for number, path in enumerate(("train/ape/1", "train/ape/2", "train/bat/3", "val/ape/4", "val/bat/5")):
        save(tmp_path / "data" / f"{path}.png", number)
    return tmp_path / "data"


def check(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["check-data", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_data_set_without_problems(root, capsys):
    status, out, err = check(capsys, root, "--workers", 0)
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["class", "train", "val"],
        ["ape", "2", "1"],
        ["bat", "1", "1"],
        ["2", "classes", "3", "2"],
        [],
        ["size", "in", "pixels:", "width", "41;", "height", "37"],
        [],
        ["no", "problems", "found"],
    ]
    assert "5 of 5 images" in err


def test_warnings_do_not_change_the_exit_status(root, capsys):
    save(root / "train" / "cat" / "1.png", 99)
    status, out, _ = check(capsys, root, "--workers", 0)
    assert status == 0
    assert out.endswith("0 errors, 1 warning\n")


def test_errors_come_first_and_set_the_exit_status(root, capsys):
    save(root / "train" / "a cat" / "1.png", 99)
    for number in range(7):
        (root / "val" / "ape" / f"broken_{number}.jpg").write_bytes(b"")
    status, out, _ = check(capsys, root)
    assert status == 1
    lines = out.splitlines()
    table = lines.index("severity  count  finding")
    assert [line.split()[:3] for line in lines[table + 1 : table + 3]] == [
        ["error", "7", "unreadable"],
        ["warning", "1", "not-in-val"],
    ]
    assert "    train/a cat" in lines
    assert [line for line in lines if "broken" in line] == [
        f"    val/ape/broken_{number}.jpg: an empty file" for number in range(5)
    ]
    assert "    and 2 more; --json lists all of them" in lines
    assert lines[-1] == "7 errors of 1 kind, 1 warning"
    assert max(map(len, lines)) <= 80


def test_json_contains_all_locations(root, capsys):
    for number in range(7):
        (root / "val" / "ape" / f"broken_{number}.jpg").write_bytes(b"")
    status, out, _ = check(capsys, root, "--json", "--workers", 2)
    assert status == 1
    report = json.loads(out)
    assert report == json.loads(json.dumps(check_folder(root).to_dict()))
    assert report["folder"] == str(root)
    assert report["images"] == {"train": 3, "val": 9}
    assert report["classes"] == {"train": {"ape": 2, "bat": 1}, "val": {"ape": 8, "bat": 1}}
    assert report["width"] == {"smallest": 41, "median": 41, "largest": 41}
    assert report["height"] == {"smallest": 37, "median": 37, "largest": 37}
    assert (report["errors"], report["warnings"]) == (1, 0)
    (finding,) = report["findings"]
    assert (finding["severity"], finding["name"], finding["count"]) == ("error", "unreadable", 7)
    assert finding["locations"] == [
        {"paths": [f"val/ape/broken_{number}.jpg"], "note": "an empty file"} for number in range(7)
    ]


def test_of_many_classes_only_the_largest_and_smallest_are_shown(tmp_path, capsys):
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


def test_a_folder_without_images(tmp_path, capsys):
    status, out, _ = check(capsys, tmp_path)
    assert status == 1
    assert "has no class folders" in out
    assert out.endswith("1 error, 0 warnings\n")


def test_no_readable_image(tmp_path, capsys):
    for name in ("ape", "bat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    assert check(capsys, tmp_path, "--json")[0] == 1
    status, out, _ = check(capsys, tmp_path)
    assert status == 1
    assert "no image could be read" in out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_control_characters_in_names_are_escaped(root, capfd, flags):
    name = os.fsdecode(b"caf\xe9\x1b[31m\n.png")
    try:
        (root / "train" / "ape" / name).write_bytes(b"")
    except OSError:
        pytest.skip("this file system only supports UTF-8 names")
    status, text, _ = check(capfd, root, "--workers", 0, *flags)
    assert status == 1
    assert "\x1b" not in text
    if flags:
        (location,) = json.loads(text)["findings"][0]["locations"]
        assert os.fsencode(location["paths"][0]) == os.fsencode(f"train/ape/{name}")
    else:
        assert r"caf\udce9\x1b[31m\n.png" in text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["@/none"], 1, "no folder"),
        (["@/file"], 1, "is a file"),
        (["@", "--workers", "-1"], 2, "--workers -1"),
    ],
)
def test_each_error_is_one_clear_line(tmp_path, capsys, arguments, status, message):
    (tmp_path / "file").write_text("")
    exit_status, out, err = check(capsys, *(argument.replace("@", str(tmp_path)) for argument in arguments))
    assert (exit_status, out) == (status, "")
    (line,) = [line for line in err.splitlines() if line.startswith("localvit: error: ")]
    assert message in line
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["a", "--nonsense"], ["a", "b"], ["a", "--workers", "many"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["check-data", *arguments])
    assert exit_.value.code == 2


# Ctrl-C may come between opening a file and the block that closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_is_one_line(root, tmp_path, capsys):
    """Ctrl-C comes while the main process decodes an image."""
    pipe = tmp_path / "pipe"

    def interrupt() -> None:
        writer = os.open(pipe, os.O_WRONLY)  # returns once the pipe is read
        os.kill(os.getpid(), signal.SIGINT)
        os.close(writer)

    with waiting_format(pipe) as content:
        (root / "train" / "ape" / "waits.png").write_bytes(content)
        thread = threading.Thread(target=interrupt)
        thread.start()
        status, out, err = check(capsys, root, "--workers", 0)
        thread.join()
    assert (status, out) == (130, "")
    assert err.splitlines() == [f"checking {root}", "localvit: interrupted"]
