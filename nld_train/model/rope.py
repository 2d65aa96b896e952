"""YaRN rotary position embedding and the query scaling of Ministral3, bit-equal to transformers' tables.

Positions count inside each half: with a noisy half, rows l and L + l share position l. With a row table each row brings
its position in its document.

Dimensions: S rows of the model's input (L, 2L or N + L), L clean tokens, B sequences, H query heads, K key-value heads,
D head dimension.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from nld_train.config.schema import RopeConfig
from nld_train.objective.sequence import RowTable, SequenceLayout
from nld_train.platform.compilation import run_compiled


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """Tables for positions 0..L-1, in the dtype of the queries; of a row table for its rows, [S, B] in place of [L].

    ``cos``, ``sin`` [L, D]; both halves of D hold the same numbers. ``query_scale`` [L]; None where it is 1 throughout.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


class _RowAngles(NamedTuple):
    """What the compiled rotation reads, one row for each of its rows: [rows, D / 2] each."""

    cos: Tensor
    sin: Tensor
    minus_sin: Tensor


class RotaryEmbedding:
    """Rotates queries and keys, then scales queries by 1 + beta * log(1 + floor(position / original maximum)).

    A plain object, shared by all layers: it has no parameters, and nothing of it belongs in a checkpoint.

    Args:
        config: ``rope_parameters`` of the checkpoint.
        head_dim: D, even.
        is_compiled: on the CPU, by torch's compiler.
    """

    def __init__(self, config: RopeConfig, head_dim: int, *, is_compiled: bool = False) -> None:
        if head_dim <= 0 or head_dim % 2:
            raise ValueError(f"model.head_dim {head_dim}: rotary embedding needs a positive even head dimension")
        self.config = config
        self.head_dim = head_dim
        self.is_compiled = is_compiled
        self.inverse_frequencies = _yarn_inverse_frequencies(config, head_dim)
        self.attention_factor = _attention_factor(config)
        self._tables: dict[tuple[int, torch.device, torch.dtype], RotaryTables] = {}
        self._row_tables = WeakIdKeyDictionary()  # position_ids -> dtype -> tables; a micro-batch's go with it
        self._row_angles = WeakIdKeyDictionary()  # cos of tables -> halves -> angles; with the tables

    def tables(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTables:
        """Tables for ``length`` positions; built on first use, then shared (do not write to them)."""
        key = (length, device, dtype)
        if key not in self._tables:
            self._tables[key] = self._build_tables(length, device, dtype)
        return self._tables[key]

    def row_tables(self, table: RowTable, length: int, dtype: torch.dtype) -> RotaryTables:
        """Tables for the rows of a row table over L = ``length`` clean tokens, on its device; shared by all layers."""
        by_dtype = self._row_tables.setdefault(table.position_ids, {})
        if dtype not in by_dtype:
            by_dtype[dtype] = self._gather_tables(table, length, dtype)
        return by_dtype[dtype]

    @torch.inference_mode(False)  # a cached inference tensor could not be saved for a later backward pass
    @torch.no_grad()
    def _gather_tables(self, table: RowTable, length: int, dtype: torch.dtype) -> RotaryTables:
        positions = table.position_ids.t()
        tables = self.tables(length, positions.device, dtype)
        query_scale = None if tables.query_scale is None else tables.query_scale[positions]
        # Whole rows at a time: on the CPU several times as fast as indexing.
        cos, sin = (F.embedding(positions, x) for x in (tables.cos, tables.sin))
        return RotaryTables(cos, sin, query_scale)

    @torch.inference_mode(False)  # a cached inference tensor could not be saved for a later backward pass
    @torch.no_grad()
    def _build_tables(self, length: int, device: torch.device, dtype: torch.dtype) -> RotaryTables:
        positions = torch.arange(length, device=device).to(torch.float32)
        angles = positions[:, None] * self.inverse_frequencies.to(device)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        periods = torch.floor(positions / self.config.original_max_position_embeddings)
        query_scale = 1 + self.config.llama_4_scaling_beta * torch.log(1 + periods)
        # Told from the configuration: on a GPU the host would wait for the numbers.
        is_one = self.config.llama_4_scaling_beta == 0 or length <= self.config.original_max_position_embeddings
        return RotaryTables(cos.to(dtype), sin.to(dtype), None if is_one else query_scale.to(dtype))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _angles(self, tables: RotaryTables, num_halves: int) -> _RowAngles:
        """Of all rows that a layout with these tables has, shared by all layers."""
        by_halves = self._row_angles.setdefault(tables.cos, {})
        if num_halves not in by_halves:
            cos, sin = (
                x[..., : self.head_dim // 2].flatten(0, -2).repeat(num_halves, 1) for x in (tables.cos, tables.sin)
            )
            by_halves[num_halves] = _RowAngles(cos, sin, -sin)
        return by_halves[num_halves]

    def apply(self, query: Tensor, key: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Rotated and scaled query, rotated key, both contiguous in Megatron's order.

        Args:
            query: [S, B, H, D].
            key: [S, B, K, D].
            layout: what the S rows are.
        """
        if query.shape[0] != layout.num_rows or query.shape[-1] != self.head_dim:
            raise ValueError(
                f"query {list(query.shape)} does not fit S = {layout.num_rows} rows and head dimension {self.head_dim}"
            )
        if layout.table is None:
            tables, num_halves = self.tables(layout.clean_length, query.device, query.dtype), layout.num_halves
            cos, sin = tables.cos[:, None], tables.sin[:, None]
        else:
            tables, num_halves = self.row_tables(layout.table, layout.clean_length, query.dtype), 1
            cos, sin = tables.cos, tables.sin
        if self.is_compiled and not query.is_cuda:
            angles = self._angles(tables, num_halves)
            query, key = (_RotateCompiled.apply(x, *angles) for x in (query, key))
        else:
            query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
        return self.scale(query, layout), key

    def scale(self, query: Tensor, layout: SequenceLayout) -> Tensor:
        """Query [S, B, H, D], scaled; itself where all factors are 1."""
        if layout.table is None:
            query_scale = self.tables(layout.clean_length, query.device, query.dtype).query_scale
            if query_scale is not None:
                query_scale = query_scale.repeat(layout.num_halves)[:, None]
        else:
            query_scale = self.row_tables(layout.table, layout.clean_length, query.dtype).query_scale
        return query if query_scale is None else query * query_scale[:, :, None, None]


class _Rotate(torch.autograd.Function):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the two halves of D.

    Its gradient is the rotation by the opposite angle, so no activation has to be kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors  # type: ignore[attr-defined]  # torch's stub lacks it
        return _rotated(grad, cos, sin, backward=True), None, None


class _RotateCompiled(torch.autograd.Function):
    """The same in one pass over memory, by torch's compiler for the CPU.

    With tables for positions [S, B * heads, D] is turned, with a row table's [S * B, heads, D]: one graph for both, for
    queries and keys, and for both directions.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor, minus_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, minus_sin)
        return _rotate_rows(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _rotate_rows(grad, *ctx.saved_tensors), None, None, None  # type: ignore[attr-defined]


def _rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Contiguous [S, B, heads, D] of the same; cos and sin [S, D / 2] or [S * B, D / 2]."""
    return run_compiled(_rotate_as_one, x.reshape(len(cos), -1, x.shape[-1]), cos, sin).view(x.shape)


def _rotate_as_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[rows, any, D] by [rows, D / 2], without writing into parts, which a compiler does not follow."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """:func:`_rotate`, on a GPU as one kernel. (Not by torch.compile, which would want contiguous rows, or a graph for
    every kind of strides.)"""
    if not x.is_cuda or x.dtype is torch.float64:
        return _rotate(x, cos, -sin if backward else sin)
    from nld_train.model import rope_kernel

    return rope_kernel.rotate(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, backward=backward)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Contiguous [S, B, heads, D]; products are rounded before they are added.

    Args:
        x: [S, B, heads, D].
        cos, sin: [L, 1, D], the same in every half and sequence, or [S, B, D].
    """
    length, _, dim = cos.shape
    cos, sin = cos[:, :, None, : dim // 2], sin[:, :, None, : dim // 2]
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x1, x2 = x.unflatten(0, (-1, length)).chunk(2, dim=-1)
    y1, y2 = rotated.unflatten(0, (-1, length)).chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).sub_(x2 * sin)
    torch.mul(x2, cos, out=y2).add_(x1 * sin)
    return rotated


def _yarn_inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """float32 [D / 2] on the CPU: angle per position.

    Fast frequencies keep their value, slow ones are divided by ``factor``, and between the dimensions where a
    wavelength fits ``beta_fast`` and ``beta_slow`` times into the original context the two are mixed. The bounds of
    that range are rounded outwards to whole dimensions; unrounded ones give other frequencies.
    """

    def dimension_with(rotations: float) -> float:
        wavelengths = config.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (head_dim * math.log(wavelengths)) / (2 * math.log(config.rope_theta))

    low: float = max(math.floor(dimension_with(config.beta_fast)), 0)
    high: float = min(math.ceil(dimension_with(config.beta_slow)), head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    powers = config.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    # Mixed in this order, with 1 - keep rather than ramp, to round as transformers does.
    return 1.0 / (config.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by; 1 where mscale equals mscale_all_dim."""

    def magnitude(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return magnitude(1.0)
