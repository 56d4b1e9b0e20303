"""Worker processes start whatever the folder for temporary files is, or are refused in one line."""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from localvit.data import workers


@pytest.fixture
def no_folder_yet(monkeypatch):
    """A process without a folder for sockets, as at its start."""
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.timeout(60)
def test_workers_start_with_a_long_folder_for_temporary_files(tmp_path, monkeypatch, no_folder_yet):
    """The path of a socket has at most 107 bytes; a worker that cannot create its socket sends nothing, for ever."""
    long = tmp_path / ("é" * 40) / ("y" * 100)
    long.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    loader = DataLoader(torch.arange(8.0), batch_size=4, num_workers=2, timeout=20)
    assert [batch.tolist() for batch in workers.iterate_batches(loader)] == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    assert tempfile.gettempdir() == str(long)


def test_workers_without_a_folder_for_sockets_are_refused(monkeypatch, no_folder_yet):
    """As where TMPDIR is long and nothing else can be written."""
    monkeypatch.setattr(workers, "_LONGEST_SOCKET_PATH", 5)
    with pytest.raises(OSError, match=r"too long a path.*set TMPDIR to a shorter one, or use --workers 0"):
        list(workers.iterate_batches(DataLoader([1, 2], num_workers=1)))
    assert [batch.tolist() for batch in workers.iterate_batches(DataLoader([1, 2], num_workers=0))] == [[1], [2]]


def test_a_removed_folder_of_sockets_is_created_again(no_folder_yet):
    """Cleaners of old temporary files remove it during long runs."""
    # A new folder: an old one may hold the socket of the server that other tests start processes from.
    list(workers.iterate_batches(DataLoader([1, 2], num_workers=1)))
    folder = Path(workers.get_temp_dir())
    folder.rmdir()
    assert [batch.tolist() for batch in workers.iterate_batches(DataLoader([1, 2], num_workers=1))] == [[1], [2]]
    assert folder.is_dir()
