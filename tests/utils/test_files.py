"""Folders that appear whole or not at all, and their hashes."""

import hashlib
from pathlib import Path

import pytest

from localvit.utils.files import check_writable, put_in_place, sha256_of, size_of


def folder_of(path: Path, **files: str) -> Path:
    """A folder with files of these names and contents, those with `_` in folders of it."""
    for name, text in files.items():
        file = path / name.replace("_", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def test_a_folder_takes_the_place_of_another_one(tmp_path):
    written = folder_of(tmp_path / "made" / "new", a="new", b_c="more")
    path = folder_of(tmp_path / "package", a="old", d="old")
    put_in_place(written, path)
    assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == {"a", "b/c"}
    assert (path / "a").read_text() == "new"
    assert {each.name for each in tmp_path.iterdir()} == {"made", "package"}


def test_a_folder_stays_if_nothing_can_take_its_place(tmp_path):
    (tmp_path / "made").mkdir()
    path = folder_of(tmp_path / "package", a="old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "made" / "never_written", path)
    assert (path / "a").read_text() == "old"
    assert list((tmp_path / "made").iterdir()) == []


def test_a_folder_is_written_over_folders_and_a_file_over_files_only(tmp_path):
    folder, file = folder_of(tmp_path / "folder", a=""), folder_of(tmp_path, file="") / "file"
    check_writable(folder, folder=True)
    check_writable(tmp_path / "new", folder=True)
    check_writable(file)
    with pytest.raises(OSError, match="it is a folder"):
        check_writable(folder)
    with pytest.raises(OSError, match="it is a file, and a folder is to be written"):
        check_writable(file, folder=True)


def test_the_hash_of_a_folder_is_that_of_the_lines_of_sha256sum(tmp_path):
    """As `find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum` in the folder."""
    path = folder_of(tmp_path / "package", b="two", a_z="one", A="three")
    lines = [
        f"{hashlib.sha256(text).hexdigest()}  {name}\n"
        for name, text in (("A", b"three"), ("a/z", b"one"), ("b", b"two"))
    ]
    assert sha256_of(path) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert sha256_of(path / "b") == hashlib.sha256(b"two").hexdigest()
    assert (size_of(path), size_of(path / "b")) == (11, 3)
