"""``checksums.txt``: what a checkpoint's files have to be, written last, and compared before a run goes on from it.

One line per file, ``crc32 bytes name``; the last line holds the CRC-32 of the lines above, so that this file is covered
itself.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nld_train.platform.failures import is_of_the_machine

CHECKSUM_FILE = "checksums.txt"
_PIECE = 16 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True)
class Checksum:
    """CRC-32 and length of a file."""

    crc32: int
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> "Checksum":
        """Read a file."""
        crc32 = num_bytes = 0
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                crc32, num_bytes = zlib.crc32(piece, crc32), num_bytes + len(piece)
        return cls(crc32, num_bytes)


def write_checksums(folder: Path, checksums: Mapping[str, Checksum]) -> None:
    """Write the file, and wait until it is on disk."""
    lines = "".join(f"{entry.crc32:08x} {entry.num_bytes} {name}\n" for name, entry in sorted(checksums.items()))
    with (folder / CHECKSUM_FILE).open("w") as file:
        file.write(f"{lines}{zlib.crc32(lines.encode()):08x}\n")
        file.flush()
        os.fsync(file.fileno())


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """What the files have to be, by their names.

    Raises:
        ValueError: the file is damaged.
        OSError: it is missing, or cannot be read.
    """
    data = (folder / CHECKSUM_FILE).read_bytes()
    *lines, last = data.removesuffix(b"\n").split(b"\n")
    body = b"".join(line + b"\n" for line in lines)
    if not lines or data != body + f"{zlib.crc32(body):08x}\n".encode() or not last:
        raise ValueError("does not have its own checksum")
    found = {}
    for line in body.decode().splitlines():
        crc32, num_bytes, name = line.split(" ", 2)
        found[name] = Checksum(int(crc32, 16), int(num_bytes))
    return found


def damage(path: Path, expected: Checksum) -> str | None:
    """What is wrong with a file, in words; None: nothing.

    Raises:
        OSError: the file system has failed, which says nothing of the file.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes != expected.num_bytes:
            return f"{path.name} has {num_bytes} bytes, it had {expected.num_bytes}"
        if Checksum.of(path) != expected:
            return f"{path.name} has another checksum than when it was written"
    except OSError as error:
        if is_of_the_machine(error):
            raise
        return f"{path.name} cannot be read ({error.strerror})"
    return None
