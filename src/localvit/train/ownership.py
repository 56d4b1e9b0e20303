"""A run's folder belongs to one run, and to one process at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localvit.train.run_folder import LOG, states
from localvit.utils.file_lock import locked

LOCK = ".lock"


class Ownership:
    """The folder of a run, as it was when the run was built."""

    def __init__(self, directory: Path, run_id: str, source: Path) -> None:
        """
        Args:
            directory: the output folder, which contains this run or none.
            run_id: tells the run from others, also from those resumed from its checkpoints in other folders.
            source: folder of the checkpoint that the run was resumed from.
        """
        self.directory = directory
        self.run_id = run_id
        self.source = source
        self._seen = _stamp(directory)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing to the folder, which must exist.

        Raises FileExistsError if another process does, or did since the run was built, and OSError if the folder cannot
        be written.
        """
        try:
            with locked(self.directory / LOCK):
                if _stamp(self.directory) != self._seen:
                    raise FileExistsError(
                        f"another process has trained in {self.directory} since this run was prepared: start again "
                        "with --resume auto, or choose another --output-dir"
                    )
                try:
                    yield
                finally:
                    self._seen = _stamp(self.directory)
        except BlockingIOError as error:
            raise FileExistsError(
                f"another process is training in {self.directory}: wait for its end, or choose another --output-dir"
            ) from error


def _stamp(directory: Path) -> list[tuple[str, int, int]]:
    """What changes whenever a run writes to its folder."""
    files = [(path.name, path.stat()) for path in (*states(directory), directory / LOG) if path.exists()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
