"""Event files for TensorBoard, written here: the ``tensorboard`` package is only needed to look at them.

A file is a sequence of records: length (8 bytes), its masked CRC-32C (4), an ``Event`` message, its masked CRC-32C (4).
"""

import os
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from nld_train.training.callbacks.base import Callback, RunInfo
from nld_train.training.metrics import finite_values

_SESSION_START = 1


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli, bits reversed
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32 of Castagnoli."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    value = crc32c(data)
    return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes, text or a message."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _event(step: int, content: bytes) -> bytes:
    """``Event``: wall_time = 1 (double), step = 2 (int64), then its content."""
    return b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content


def _summary(values: Iterable[tuple[str, float]]) -> bytes:
    """``Event.summary`` = 5, of values with ``tag`` = 1 and ``simple_value`` = 2 (float)."""
    return _field(5, b"".join(_field(1, _field(1, tag.encode()) + b"\x15" + struct.pack("<f", v)) for tag, v in values))


class TensorboardWriter(Callback):
    """Writes each number of each record, under its name in ``metrics.jsonl``, to a new file in ``run.dir/tensorboard``.

    Each start says that a session begins with its first step: TensorBoard then drops what a killed process wrote for
    this step and later ones, so the curve stays one line.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None

    def on_run_start(self, info: RunInfo) -> None:
        if info.start_step >= info.num_steps:
            return  # a finished run was started again: nothing will be logged
        self._folder.mkdir(parents=True, exist_ok=True)
        # Files are read in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (self._folder / name).open("wb")
        self._write(0, _field(3, b"brain.Event:2"))
        self._write(info.start_step + 1, _field(7, b"\x08" + _varint(_SESSION_START)))

    def _write(self, step: int, content: bytes) -> None:
        if self._file is None:
            raise RuntimeError(
                "TensorboardWriter is used outside of a run: on_run_start first, nothing after on_run_end"
            )
        event = _event(step, content)
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))
        self._file.flush()

    def _log(self, record: dict[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in finite_values(record).items()
            if name not in ("step", "stage") and isinstance(value, (int, float))
        }
        self._write(record["step"], _summary(numbers.items()))

    def on_step(self, record: dict[str, Any]) -> None:
        self._log(record)

    def on_validation(self, record: dict[str, Any]) -> None:
        self._log(record)

    def on_run_end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
