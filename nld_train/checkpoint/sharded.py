"""What one rank writes of a distributed checkpoint: its pieces of weights and optimizer state, on its own.

Megatron's own ``fully_reshardable`` save first gathers the optimizer state of a model-parallel rank on all of its
data-parallel ranks. Here every rank writes the range that the distributed optimizer gave it, cut into rectangles of the
whole parameter: no communication, no second copy, and a file that Megatron's loader reads at any layout.
"""

import io
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nld_train.checkpoint.checksums import Checksum
from nld_train.checkpoint.streaming import ObjectWriter, StreamedFile, tensor_bytes

METADATA_FILE = ".metadata"
SHARDING_TYPE = "fully_reshardable"


@dataclass(slots=True)
class Piece:
    """A rectangle of a stored tensor.

    Args:
        key: of the tensor in the checkpoint.
        offsets: of the rectangle's first element in the whole tensor.
        size: of the whole tensor.
        values: the rectangle itself.
    """

    key: str
    offsets: tuple[int, ...]
    size: tuple[int, ...]
    values: Tensor


@dataclass(slots=True)
class RankState:
    """What a rank stores: rectangles of tensors, and small objects (already pickled) by their keys.

    ``common`` is what every rank has alike (step counts, hyperparameters); rank 0 stores it.
    """

    pieces: list[Piece]
    objects: dict[str, bytes]
    common: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        return sum(piece.values.nbytes for piece in self.pieces)

    def copied(self) -> "RankState":
        """The same values in host memory, out of reach of the next step."""
        copies = [
            # Not pinned: a pinned copy of everything would have to be kept between saves.
            Piece(piece.key, piece.offsets, piece.size, torch.empty(piece.values.shape, dtype=piece.values.dtype))
            for piece in self.pieces
        ]
        for copy, piece in zip(copies, self.pieces, strict=True):
            copy.values.copy_(piece.values)
        return RankState(copies, self.objects, pickle.loads(pickle.dumps(self.common)))


def rank_state(weights: dict[str, Any], optimizer: MegatronOptimizer | None) -> RankState:
    """This rank's share of a checkpoint, as views of what is trained.

    Args:
        weights: sharded state of the model chunks, by their number; the data are the parameters themselves.
        optimizer: its state is stored beside the weights; None: weights only.
    """
    by_parameter = {
        id(item.data): item for item in nested_values(weights) if isinstance(item, ShardedTensor | ShardedTensorFactory)
    }
    pieces, common = [], {}
    if optimizer is not None:
        part = _distributed_optimizer(optimizer)
        pieces = list(_optimizer_pieces(part, by_parameter))
        common["optimizer"] = {**part.state_dict(), "param_state_sharding_type": SHARDING_TYPE}
    stored, rest = save_preprocess({"model": weights}, validate_access_integrity=False)
    objects = {}
    for item in nested_values(stored):
        if not is_main_replica(item.replica_id):
            continue
        if isinstance(item, ShardedObject):
            buffer = io.BytesIO()
            torch.save([item.data], buffer)
            objects[item.unique_key] = buffer.getvalue()
        else:
            pieces.append(Piece(item.key, tuple(item.global_offset), tuple(item.global_shape), item.data.detach()))
    return RankState(pieces, objects, {**rest, **common})


def stored_keys(state: dict[str, Any]) -> list[str]:
    """Keys in a checkpoint of all that a sharded state consists of."""
    return [
        item.unique_key if isinstance(item, ShardedObject) else item.key
        for item in nested_values(state)
        if isinstance(item, ShardedTensor | ShardedTensorFactory | ShardedObject)
    ]


def absent_keys(folder: Path, keys: Iterable[str]) -> list[str]:
    """Those of which a checkpoint's index has nothing; none where the index cannot be read."""
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
        return [key for key in keys if key not in found]
    except Exception:  # unpickling damaged bytes may raise anything, or give anything
        return []


def _distributed_optimizer(optimizer: Any) -> Any:
    """The one optimizer of a dense model: Megatron wraps it in a chain."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(parts) != 1:
        raise ValueError(f"a chain of {len(parts)} optimizers cannot be saved; a dense model has one")
    return parts[0]


def _optimizer_pieces(part: Any, by_parameter: Mapping[int, Any]) -> Iterator[Piece]:
    """Main parameters and moments of this data-parallel rank's range of each parameter."""
    data_parallel_rank = dist.get_rank(part.data_parallel_group)
    ranges = [
        (parameter, place["param"])
        for of_dtypes in part.gbuf_ranges
        for of_buckets in of_dtypes.values()
        for bucket in of_buckets
        for parameter, place in bucket["param_map"].items()
    ]
    for parameter, place in ranges:
        sharded = by_parameter[id(parameter)]
        *outer, of_data_parallel = sharded.replica_id
        if of_data_parallel != data_parallel_rank:
            raise ValueError(f"{sharded.key}: replica {sharded.replica_id} on data-parallel rank {data_parallel_rank}")
        if any(outer):
            continue  # held by several tensor-parallel ranks (norms): the first one stores it
        whole = sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded
        for name, values in part._get_main_param_and_optimizer_states(parameter).items():
            flat = values.detach().view(-1)
            for tensor in nested_values(whole) if not isinstance(whole, ShardedTensor) else [whole]:
                # Where the stored tensor lies in the parameter; a SwiGLU's matrix is stored as two halves.
                begin = (tensor.data.data_ptr() - parameter.data_ptr()) // parameter.element_size()
                first, end = max(place.start, begin), min(place.end, begin + tensor.data.numel())
                for offsets, shape, start in rectangles(tuple(tensor.data.shape), first - begin, end - begin):
                    start += begin - place.start
                    yield Piece(
                        f"optimizer.state.{name}.{tensor.key}",
                        tuple(a + b for a, b in zip(tensor.global_offset, offsets, strict=True)),
                        tuple(tensor.global_shape),
                        flat[start : start + shape.numel()].view(shape),
                    )


def rectangles(shape: tuple[int, ...], first: int, end: int) -> Iterator[tuple[tuple[int, ...], torch.Size, int]]:
    """Cut elements ``first <= i < end`` of a contiguous tensor into rectangles: (offsets, shape, first element).

    Of a matrix at most three: the rest of a row, whole rows, the beginning of a row.
    """
    if first >= end:
        return
    if len(shape) == 1:
        yield (first,), torch.Size([end - first]), first
        return
    row = 1
    for length in shape[1:]:
        row *= length
    while first < end:
        index, inside = divmod(first, row)
        num_rows = (end - first) // row if inside == 0 else 0
        if num_rows:
            zeros = (0,) * (len(shape) - 1)
            yield (index, *zeros), torch.Size([num_rows, *shape[1:]]), first
            first += num_rows * row
            continue
        stop = min(end, (index + 1) * row)
        for offsets, size, start in rectangles(shape[1:], inside, inside + stop - first):
            yield (index, *offsets), torch.Size([1, *size]), index * row + start
        first = stop


@dataclass(slots=True)
class Written:
    """What a rank tells rank 0 of its file: where everything lies, its checksum, or why it could not be written."""

    entries: list[tuple[MetadataIndex, Any, torch.dtype | None, tuple[int, ...], torch.Size]] = field(
        default_factory=list
    )
    checksums: dict[str, Checksum] = field(default_factory=dict)
    error: str | None = None


class FileWriting:
    """One rank's file of a checkpoint, written by a thread or at once.

    Never by a forked process, which would outlive a killed run and, with several gigabytes of pages to copy on write,
    take long to start.

    Args:
        folder: made here.
        state: not changed until the file is written.
        in_background: True: returns at once.
        progress: called after each piece, from whichever thread writes.
    """

    def __init__(self, folder: Path, state: RankState, *, in_background: bool, progress: Callable[[], None]) -> None:
        self._folder = folder
        self._state: RankState | None = state
        self._progress = progress
        self._written = Written()
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        if in_background:
            self._thread.start()
        else:
            self._thread.run()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Written:
        """Waits until the file is written."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._written

    def _write(self) -> None:
        assert self._state is not None
        path = self._folder / f"__{dist.get_rank()}_0.distcp"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._state.pieces or self._state.objects:
                self._write_file(path, self._state)
        except Exception as error:  # handed to rank 0, which tells all of them
            self._written = Written(error=f"{path.name}: {type(error).__name__}: {error}")
            path.unlink(missing_ok=True)  # a full disk is needed by others
        finally:
            self._state = None  # the copy is freed

    def _write_file(self, path: Path, state: RankState) -> None:
        with StreamedFile(path, has_checksum=True) as file:
            writer = ObjectWriter(file)
            for key, value in state.objects.items():
                place = writer.append(value)
                self._written.entries.append((MetadataIndex(key), place, None, (), torch.Size()))
            for piece in state.pieces:
                index = MetadataIndex(piece.key, torch.Size(piece.offsets))
                # torch.save writes a tensor's whole storage; a view of the CPU's memory is cut out without a copy.
                data = tensor_bytes(piece.values.cpu())
                alone = torch.frombuffer(data, dtype=piece.values.dtype).view(piece.values.shape)
                place = writer.save(alone)
                self._written.entries.append((index, place, alone.dtype, piece.size, alone.shape))
                self._progress()
        self._written.checksums[path.name] = file.checksum


def write_common_files(folder: Path, common: Mapping[str, Any], of_ranks: Iterable[Written]) -> dict[str, Checksum]:
    """``.metadata``, ``common.pt`` and ``metadata.json``, by rank 0 when the files of all ranks are there.

    Returns:
        checksums of these files.

    Raises:
        ValueError: the pieces of a tensor do not make it up; nothing that was written could be loaded.
        OSError: the disk is full, say.
    """
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for written in of_ranks:
        for index, place, dtype, size, shape in written.entries:
            if index in storage:
                raise ValueError(f"{index.fqn} at {index.offset} was written twice")
            storage[index] = place
            if dtype is None:
                entries[index.fqn] = BytesStorageMetadata()
                continue
            entry = entries.setdefault(
                index.fqn, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
            )
            assert index.offset is not None
            entry.chunks.append(ChunkStorageMetadata(offsets=index.offset, sizes=shape))
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            found = sum(chunk.sizes.numel() for chunk in entry.chunks)
            if found != entry.size.numel():
                raise ValueError(f"{key}: {found} elements were written, it has {entry.size.numel()}")
    checksums = {}
    with StreamedFile(folder / METADATA_FILE, has_checksum=True) as file:
        file.write(pickle.dumps(Metadata(state_dict_metadata=entries, planner_data=None, storage_data=storage)))
    checksums[METADATA_FILE] = file.checksum
    with StreamedFile(folder / "common.pt", has_checksum=True) as file:
        ObjectWriter(file).save(dict(common))
    checksums["common.pt"] = file.checksum
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    with (folder / "metadata.json").open("rb") as config_file:
        os.fsync(config_file.fileno())
    checksums["metadata.json"] = Checksum.of(folder / "metadata.json")
    return checksums
