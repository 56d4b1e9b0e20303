"""Damaged image files: is each read, or reported in one line that names it, without a crash and within a time?

Writes an image in each format that PIL can both write and read, changes copies of the file at random (bytes changed,
removed, inserted, repeated, cut off; sizes in headers are hit too), and reads each with `PreparedImages`, as every
command does. A decoder runs in a process of its own, because it may crash or never end; the parent notices either, and
keeps the file.

    python benchmarks/fuzz_images.py --count 30000          # per format; a minute or two each
    python benchmarks/fuzz_images.py --count 300 --formats AVIF JPEG

Prints a row per format: files read, files reported, the exceptions behind the reports, and faults. Exits with 1 if
there was a fault: an exception that passed, an unclear message, a crash, or more than --seconds for one file.

2026-11-26, Pillow 13.0.0, Linux x86-64: 30,000 files each of AVIF, BLP, BMP, DDS, DIB, GIF, ICO, IM, JPEG, JPEG2000,
MPO, MSP, PNG, PPM and TIFF, 1,500 of ICNS, and 300 each of QOI, SGI, SPIDER, TGA, WEBP and XBM: no fault.
"""

import argparse
import io
import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from localvit.data.images import FileImages, PreparedImages
from localvit.data.preprocessing import Preprocessing
from localvit.utils.tables import format_table

NOT_PIXELS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "PDF"}
"""Formats that PIL only recognizes, or gives to another program."""


def whole_files() -> dict[str, list[bytes]]:
    """Undamaged files of each format, in several modes and settings, without those that PIL cannot read back."""
    Image.init()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 19, 3), dtype=np.uint8)).resize((67, 53))
    files: dict[str, list[bytes]] = {}
    for name in sorted(Image.SAVE.keys() - NOT_PIXELS):
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "F"):
            packed = io.BytesIO()
            try:
                photo.convert("L" if mode in ("I;16", "F") else mode).convert(mode).save(packed, name)
                with Image.open(io.BytesIO(packed.getvalue())) as again:
                    again.load()
            except Exception:  # a mode that the format does not have
                continue
            files.setdefault(name, []).append(packed.getvalue())
    return files


def damaged(content: bytes, seed: int) -> bytes:
    """A copy of a file with a few random changes, most of them in its first bytes, where headers are."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = int(len(data) * rng.random() ** rng.choice((1, 3)))
        length = rng.choice((1, 1, 2, 4, 16))
        change = rng.randrange(6)
        if change == 0:
            data[place : place + length] = rng.randbytes(length)
        elif change == 1:
            data[place : place + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
        elif change == 2 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change == 3:
            del data[place : place + length]
        elif change == 4:
            data[place:place] = data[place : place + length * 4]
        elif rng.random() < 0.3:
            del data[place:]
    return bytes(data)


def read_all(name: str, contents: list[bytes], seeds: range, path: Path, parent: Connection) -> None:
    """Read damaged files one after another; send the seed before each, and its outcome after it."""
    warnings.simplefilter("ignore")
    images = FileImages(path.parent, [(path.name, 0)], ["a"])
    prepared = PreparedImages(images, Preprocessing(input_size=(32, 32)).transform())
    for seed in seeds:
        path.write_bytes(damaged(contents[seed % len(contents)], seed))
        parent.send(seed)
        try:
            _, result = prepared[0]
        except BaseException as error:
            parent.send((f"passed: {type(error).__name__}: {error}", True))
            continue
        if isinstance(result, Tensor):
            parent.send(("", False))
        elif result.startswith(f"{path}: ") and "\n" not in result:
            parent.send((result.split(" (", 1)[1].split(" '")[0].split(":")[0][:40], False))
        else:
            parent.send((f"unclear: {result!r}", True))
    parent.send(None)


def fuzz(
    name: str, contents: list[bytes], count: int, seconds: float, keep: Path
) -> tuple[int, Counter[str], list[str]]:
    """Read `count` damaged files of a format. Returns how many were read, the reasons of the others, and faults."""
    num_read, reasons, faults, first = 0, Counter[str](), [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x.{name.lower()}")
        while first < count:
            ours, theirs = multiprocessing.Pipe()
            seeds = range(first, count)
            worker = multiprocessing.Process(target=read_all, args=(name, contents, seeds, path, theirs), daemon=True)
            worker.start()
            theirs.close()
            seed, fault = first, ""
            while True:
                try:
                    message = ours.recv() if ours.poll(seconds) else "slow"
                except EOFError:
                    message = "crash"
                if message is None:
                    first = count
                    break
                if isinstance(message, int):
                    seed = message
                elif isinstance(message, tuple):
                    reason, is_fault = message
                    num_read += not reason
                    reasons[reason] += bool(reason)
                    fault = reason if is_fault else ""
                else:
                    fault, first = message, seed + 1
                if fault:
                    kept = keep / f"{name.lower()}-{seed}"
                    kept.write_bytes(damaged(contents[seed % len(contents)], seed))
                    faults.append(f"{kept}: {fault}")
                    fault = ""
                if isinstance(message, str):
                    break
            worker.kill()
            worker.join()
    return num_read, +reasons, faults


def main() -> int:
    """Fuzz the formats and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30_000, help="damaged files per format")
    parser.add_argument("--formats", nargs="*", help="PIL's names; by default all that it writes and reads")
    parser.add_argument("--seconds", type=float, default=20, help="time after which a file is a fault")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()), help="folder for files with a fault")
    arguments = parser.parse_args()
    rows, all_faults = [], []
    for name, contents in whole_files().items():
        if arguments.formats and name not in arguments.formats:
            continue
        started = time.monotonic()
        num_read, reasons, faults = fuzz(name, contents, arguments.count, arguments.seconds, arguments.keep)
        common = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common(4))
        seconds = time.monotonic() - started
        rows.append((name, f"{num_read:,}", f"{reasons.total():,}", f"{len(faults)}", f"{seconds:.0f} s", common))
        print(*rows[-1], flush=True, file=sys.stderr)
        all_faults += faults
    print(format_table(rows, headings=("format", "read", "reported", "faults", "time", "commonest reasons")))
    print("\n".join(all_faults))
    return 1 if all_faults else 0


if __name__ == "__main__":
    sys.exit(main())
