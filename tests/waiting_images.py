"""An image file whose decoder waits, for tests of what happens to a program that is decoding."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


@contextmanager
def waiting_format(pipe: Path) -> Iterator[bytes]:
    """Content for an image file that makes its decoder, an additional one of PIL's, wait for a named pipe's data."""
    content = b"an image whose decoder waits"

    def decode(file: object, name: object) -> None:
        pipe.read_bytes()
        raise SyntaxError

    os.mkfifo(pipe)
    Image.register_open("WAITING", decode, content.startswith)
    try:
        yield content
    finally:
        Image.ID.remove("WAITING")
        del Image.OPEN["WAITING"]
