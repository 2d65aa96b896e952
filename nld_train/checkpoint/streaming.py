"""Parameters of a distributed checkpoint, one at a time: how conversions read and write models larger than memory.

Reading maps the files, so that a parameter stored whole is a view of its file and one stored in shards (by tensor
parallel ranks) costs its own size. Writing hands each piece to the disk at once: a conversion of any size leaves the
machine's page cache to others, and the final sync has little left to wait for.
"""

import mmap
import os
import pickle
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from nld_train.checkpoint.checksums import Checksum
from nld_train.errors import CheckpointError

_PIECE = 64 << 20  # bytes written between two requests to the disk
# Megatron's linear layers keep an (empty) object beside their weight and want it back when they load.
_EXTRA_STATE_OF = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


class StreamedFile:
    """A file written once, from start to end; on disk when the ``with`` block ends without an error.

    The kernel is asked to write each piece out as soon as it is there and to forget what is on disk already
    (``posix_fadvise(2)``): new pieces take the pages of old ones.

    Args:
        path: does not exist, or is replaced.
        has_checksum: compute the CRC-32 of what is written.
    """

    def __init__(self, path: Path, *, has_checksum: bool = False) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self.size = 0
        self._has_checksum = has_checksum
        self._crc32 = 0

    @property
    def checksum(self) -> Checksum:
        """Of a file written with ``has_checksum``."""
        assert self._has_checksum
        return Checksum(self._crc32, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: Any) -> int:
        """Append ``data``, any contiguous buffer."""
        rest = memoryview(data).cast("B")
        num_bytes = rest.nbytes
        while rest.nbytes:
            written = self._file.write(rest[:_PIECE]) or 0
            if self._has_checksum:
                self._crc32 = zlib.crc32(rest[:written], self._crc32)
            before, self.size = self.size, self.size + written
            if before // _PIECE != self.size // _PIECE and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, self.size, os.POSIX_FADV_DONTNEED)
            rest = rest[written:]
        return num_bytes

    def flush(self) -> None:
        """Nothing is held back."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


class ObjectWriter:
    """Appends objects in ``torch.save``'s form; keeps the cause of a failed write, which torch hides."""

    def __init__(self, file: StreamedFile) -> None:
        self._file = file
        self._cause: OSError | None = None

    def write(self, data: Any) -> int:
        if self._cause is None:
            try:
                self._file.write(data)
            except OSError as error:
                # Not raised here: torch's writer would end the process when it is torn down half-way.
                self._cause = error
        return len(data)

    def flush(self) -> None:
        pass

    def save(self, value: Any) -> _StorageInfo:
        """Append one object; where it lies in the file."""
        start = self._file.size
        torch.save(value, self)  # type: ignore[arg-type]
        return self._place(start)

    def append(self, saved: bytes) -> _StorageInfo:
        """Append what ``torch.save`` made of an object; where it lies in the file."""
        start = self._file.size
        self.write(saved)
        return self._place(start)

    def _place(self, start: int) -> _StorageInfo:
        if self._cause is not None:
            raise self._cause
        return _StorageInfo(self._file.path.name, start, self._file.size - start)


def write_parameters(
    folder: Path, parameters: Iterable[tuple[str, Tensor]], num_layers: int, checksums: dict[str, Checksum]
) -> Iterator[int]:
    """Write whole parameters as a distributed checkpoint that every parallel layout loads.

    torch's own writer keeps all tensors of a file until it is closed, so the file is laid out here: objects of
    ``torch.save`` one after another, and ``.metadata``, which says where each begins.

    Args:
        folder: exists already and is empty.
        parameters: (Megatron's name in the whole model, parameter on the CPU), each once; one in memory at a time.
        num_layers: of the model.
        checksums: those of the files come in here, by their names.

    Yields:
        bytes of each parameter, after it was written.

    Raises:
        OSError: the disk is full, say.
    """
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    with _summed(folder / "__0_0.distcp", checksums) as file:
        objects = ObjectWriter(file)
        for layer in range(num_layers):
            for module in _EXTRA_STATE_OF:
                name = f"decoder.layers.{layer}.{module}._extra_state/shard_0_1"
                entries[name] = BytesStorageMetadata()
                storage[MetadataIndex(name)] = objects.save([None])
        for name, tensor in parameters:
            offsets = torch.Size([0] * tensor.dim())
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=tensor.size())
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), [chunk])
            # torch.save writes a tensor's whole storage, which may be all of a mapped file: this one ends where it does
            alone = torch.frombuffer(tensor_bytes(tensor), dtype=tensor.dtype).view(tensor.shape)
            storage[MetadataIndex(name, offsets)] = objects.save(alone)
            yield tensor.nbytes
            del tensor, alone  # before the next one is made
    metadata = Metadata(state_dict_metadata=entries, planner_data=None, storage_data=storage)
    with _summed(folder / ".metadata", checksums) as file:
        file.write(pickle.dumps(metadata))
    with _summed(folder / "common.pt", checksums) as file:
        ObjectWriter(file).save({})
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    checksums["metadata.json"] = Checksum.of(folder / "metadata.json")


@contextmanager
def _summed(path: Path, checksums: dict[str, Checksum]) -> Iterator[StreamedFile]:
    with StreamedFile(path, has_checksum=True) as file:
        yield file
    checksums[path.name] = file.checksum


def _read_ahead(mapped: mmap.mmap, start: int, length: int) -> None:
    """Ask the kernel for these bytes, in large pieces, before they are touched one page at a time."""
    if hasattr(mmap, "MADV_WILLNEED"):
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, page, min(start + length, len(mapped)) - page)


def _is_tiling(entry: TensorStorageMetadata) -> bool:
    """The shards lie inside of the tensor, side by side, and leave nothing out."""
    boxes = [
        [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        for chunk in entry.chunks
    ]
    are_inside = all(
        0 <= start <= end <= size for box in boxes for (start, end), size in zip(box, entry.size, strict=True)
    )
    overlap = any(
        all(
            start < other_end and other_start < end for (start, end), (other_start, other_end) in zip(a, b, strict=True)
        )
        for a, b in combinations(boxes, 2)
    )
    return are_inside and not overlap and sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel()


class StoredParameters:
    """The tensors of a distributed checkpoint, whatever parallel layout wrote them.

    Args:
        checkpoint: a complete one.

    Raises:
        CheckpointError: ``.metadata`` is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._folder = checkpoint
        try:
            metadata = FileSystemReader(checkpoint).read_metadata()
            self._entries = dict(metadata.state_dict_metadata)
            self._places: dict[MetadataIndex, Any] = dict(metadata.storage_data)
        except Exception as error:  # unpickling damaged bytes may raise anything, or give anything
            raise self._refuse(".metadata", f"is not readable: {type(error).__name__}: {error}") from error
        self._maps: dict[str, mmap.mmap] = {}

    def _refuse(self, name: str, reason: str) -> CheckpointError:
        return CheckpointError(str(self._folder / name), reason, "use a complete checkpoint of this model")

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One whole parameter, to be read and not written to.

        Raises:
            CheckpointError: it is missing or of another shape, or its file is missing or damaged.
        """
        try:
            whole = self._whole(name)
        except CheckpointError:
            raise
        except Exception as error:  # damaged metadata lead anywhere
            raise self._refuse(
                ".metadata", f"the entry of tensor {name} is damaged: {type(error).__name__}: {error}"
            ) from error
        if whole.shape != shape:
            raise CheckpointError(
                str(self._folder),
                f"tensor {name} has shape {tuple(whole.shape)}, expected {shape}",
                "checkpoint.json and weights do not belong together; use a complete checkpoint of this model",
            )
        return whole

    def _whole(self, name: str) -> Tensor:
        entry = self._entries.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                str(self._folder), f"tensor {name} is missing", "use a complete checkpoint of this model"
            )
        if not _is_tiling(entry):
            raise self._refuse(".metadata", f"the shards of tensor {name} do not make up its shape {tuple(entry.size)}")
        if len(entry.chunks) == 1:
            return self._shard(name, entry.chunks[0], entry.properties.dtype)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = self._shard(name, chunk, whole.dtype)
        return whole

    def _shard(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        place = self._places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise self._refuse(".metadata", f"does not say where the shard of {name} at {tuple(chunk.offsets)} lies")
        try:
            tensor = self._mapped(place)
        except Exception as error:  # a cut or damaged file makes torch raise anything
            raise self._refuse(
                place.relative_path, f"tensor {name} is not readable: {type(error).__name__}: {error}"
            ) from error
        if tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise self._refuse(
                place.relative_path,
                f"tensor {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(chunk.sizes)} {dtype}",
            )
        return tensor

    def _mapped(self, place: _StorageInfo) -> Tensor:
        """The tensor of one ``torch.save`` object, its values left where they are in the mapped file."""
        path = self._folder / place.relative_path
        with path.open("rb") as file:
            if place.relative_path not in self._maps:
                self._maps[place.relative_path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            part: Any = _create_file_view(file, place.offset, place.length)
            shape_only = torch.load(part, map_location="meta", weights_only=True)
            storage = shape_only.untyped_storage()
            offset = getattr(storage, "_checkpoint_offset", None)
            if offset is None or not shape_only.is_contiguous():
                part.seek(0)
                return torch.load(part, map_location="cpu", weights_only=True)
        start = place.offset + offset + shape_only.storage_offset() * shape_only.element_size()
        if start + shape_only.nbytes > place.offset + place.length:
            raise ValueError("its values lie outside of its place in the file")
        mapped = self._maps[place.relative_path]
        _read_ahead(mapped, start, shape_only.nbytes + _PIECE)
        flat = torch.frombuffer(mapped, dtype=shape_only.dtype, count=shape_only.numel(), offset=start)
        return flat.view(shape_only.shape)
