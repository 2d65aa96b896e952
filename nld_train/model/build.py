"""Build the model: Megatron's GPTModel with our attention core, norm and loss head, and its initial weights."""

import hashlib
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nld_train.config.schema import (
    FP8_MULTIPLE,
    AttentionBackend,
    LayerSpec,
    ModelConfig,
    ParallelConfig,
    Precision,
    Recompute,
)
from nld_train.model.embedding import TokenEmbedding
from nld_train.model.head import LossHead, WeightedRows, padded_to_multiple
from nld_train.model.layer_spec import DecoderAttention, DecoderRows, LocalModules, decoder_layer_spec, decoder_spec
from nld_train.model.linear import fast_rows
from nld_train.model.pointwise import DecoderConfig, compiles_pointwise
from nld_train.model.rope import RotaryEmbedding
from nld_train.objective.sequence import SequenceLayout


def row_multiple(parallel: ParallelConfig, precision: Precision = Precision.bf16) -> int:
    """What the number of rows must be a multiple of: tensor-parallel ranks share them equally, and FP8 products take a
    rank's share in units of :data:`~nld_train.config.schema.FP8_MULTIPLE`."""
    return _row_multiple(parallel.tensor_model_parallel_size, parallel.sequence_parallel, precision is Precision.fp8)


def row_multiple_of(config: TransformerConfig) -> int:
    """:func:`row_multiple` of a model that has been built."""
    return _row_multiple(config.tensor_model_parallel_size, config.sequence_parallel, config.fp8 is not None)


def _row_multiple(tensor_parallel_size: int, shares_rows: bool, is_fp8: bool) -> int:
    return (tensor_parallel_size if shares_rows else 1) * (FP8_MULTIPLE if is_fp8 else 1)


def fuses_gradients(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Apex' kernel adds the gradients of Megatron's own linear layers to ``main_grad`` inside the matrix product.
    (Transformer Engine's layers do so by themselves, and the head has a way of its own.)"""
    is_there: bool = megatron_layers._grad_accum_fusion_available  # Megatron has imported it
    return is_there and device.type == "cuda" and dtype is not torch.float64 and model.layer_spec is LayerSpec.local


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    is_fp8: bool = False,
    gradient_accumulation_fusion: bool = False,
    compile_pointwise: bool = False,
) -> DecoderConfig:
    """Megatron's configuration of a Ministral3-shaped decoder.

    Args:
        dtype: of parameters and activations: bfloat16, float32, or float64 (float64 for verification only: Megatron's
            optimizer does not take it).
        is_fp8: the layers' matrix products read FP8 (with Transformer Engine's layers).
        gradient_accumulation_fusion: see :func:`fuses_gradients`; every parameter must then have a ``main_grad``.
        compile_pointwise: see :func:`~nld_train.model.pointwise.compiles_pointwise`.
    """
    fp8: dict[str, Any] = {}
    if is_fp8:
        from nld_train.model.transformer_engine import FP8_RECIPE

        fp8 = {"fp8": "hybrid", "fp8_recipe": FP8_RECIPE}  # e4m3, and e5m2 for gradients
    recompute: dict[str, Any] = {}
    if parallel.recompute_granularity is Recompute.selective:
        # Norms and SwiGLU keep their inputs alone in any case.
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif parallel.recompute_granularity is Recompute.full:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return DecoderConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.initializer_range,
        perform_initialization=False,  # initialize_weights draws them, the same in every parallel layout
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        autocast_dtype=dtype,
        # The only divisor of the losses is the global token count, applied once in finalize_model_grads.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        # With interleaved stages the batched default confuses two messages between the same two ranks (at two pipeline
        # ranks the next one is also the one before), without any error.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        **recompute,
        **fp8,
        # These name CUDA extensions of Apex; without them Megatron raises when it builds a layer.
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        compile_pointwise=compile_pointwise,
    )


class NLDModel(GPTModel):
    """Megatron's GPTModel whose decoder reads a :class:`SequenceLayout` and whose head returns losses.

    Rotary embedding and block mask depend on the layout, so both are applied inside the attention core; GPTModel's
    own position embedding is off.

    Of the rows with weight only, the last layer computes what follows its attention, then the final norm and the head.

    Args:
        modules: what local layers are made of; None: this project's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        model: ModelConfig,
        backend: AttentionBackend,
        *,
        vp_stage: int | None,
        modules: LocalModules | None = None,
    ) -> None:
        pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        modules, causal = modules or LocalModules(), None
        if model.layer_spec is LayerSpec.transformer_engine:
            from nld_train.model import transformer_engine

            modules, causal = transformer_engine.TransformerEngineModules(), transformer_engine.causal_attention(config)
        attention = ModuleSpec(
            module=DecoderAttention,
            params={
                "rotary": RotaryEmbedding(model.rope, model.head_dim, is_compiled=config.compile_pointwise),
                "backend": backend,
                "causal": causal,
            },
        )
        layers = decoder_layer_spec(attention, modules)
        super().__init__(
            config,
            decoder_spec(layers, get_num_layers_to_build(config, vp_stage), modules),  # type: ignore[arg-type]
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="none",
            vp_stage=vp_stage,
        )
        if pre_process:
            stock = self.embedding.word_embeddings
            self.embedding.word_embeddings = TokenEmbedding(
                num_embeddings=stock.num_embeddings,
                embedding_dim=stock.embedding_dim,
                init_method=config.init_method,
                reduce_scatter_embeddings=stock.reduce_scatter_embeddings,
                config=config,
                tp_group=stock.tp_group,
            )
        if post_process:
            self.output_layer = LossHead(config, model.vocab_size)

    def forward(self, tokens: Tensor, layout: SequenceLayout, selected: WeightedRows | None = None) -> Any:
        """One micro-batch through the layers of this pipeline stage.

        Args:
            tokens: int64 [B, S] (read on the first pipeline stage only).
            layout: what each of the S rows is; with sequence parallelism S is a multiple of the tensor-parallel size.
            selected: rows that enter the loss (read on the last stage only); None asks the last stage for logits.

        Returns:
            hidden states [S, B, H] on every stage but the last (with sequence parallelism this rank's share of the S
            rows); there what :meth:`LossHead.forward` returns.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens, position_ids=None)
        rows = None
        if selected is not None and self.post_process:
            rows = selected.rows
            multiple = math.lcm(row_multiple_of(self.config), fast_rows(self.config.params_dtype, rows.device))
            if multiple > 1:
                rows = padded_to_multiple(rows, multiple)
        hidden = self.decoder(
            hidden_states=hidden, attention_mask=None, attention_bias=DecoderRows(layout=layout, selected=rows)
        )
        return self.output_layer(hidden, selected) if self.post_process else hidden


def global_parameter_name(model: NLDModel, local_name: str) -> str:
    """Name of a parameter in the whole model: pipeline stages count their own layers from 0."""
    parts = local_name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def tensor_parallel_slice(name: str, full: Tensor, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's part of a whole parameter.

    Rows for column-parallel layers, embedding and head; columns for row-parallel layers; the gated ``linear_fc1``
    holds [gate; up], and every rank takes its rows of both. Norm weights are on every rank.
    """
    if size == 1 or full.dim() == 1:
        return full
    if name.endswith("mlp.linear_fc1.weight"):
        gate, up = full.chunk(2, dim=0)
        return torch.cat([gate.chunk(size, dim=0)[rank], up.chunk(size, dim=0)[rank]])
    return full.chunk(size, dim=partition_dim(name))[rank]


def partition_dim(name: str) -> int:
    """Dimension in which a matrix is cut over tensor-parallel ranks: 1 for row-parallel layers, else 0."""
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


@torch.no_grad()
def initialize_weights(model: NLDModel, *, seed: int, std: float) -> None:
    """Draw N(0, std) for every matrix and 1 for every norm, as a pure function of (seed, parameter name).

    Every rank draws the whole tensor and keeps its part, so all parallel layouts start from the same weights.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for local_name, parameter in model.named_parameters():
        name = global_parameter_name(model, local_name)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        dim = partition_dim(name)
        # Megatron 0.16 sets these only where it draws the weights itself (0.19 always); without them the gradient norm
        # would count the first tensor-parallel rank alone.
        if not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device=parameter.device).manual_seed(int.from_bytes(digest[:8], "little"))
        shape = list(parameter.shape)
        shape[dim] *= size
        full = torch.empty(shape, dtype=torch.float32, device=parameter.device).normal_(0.0, std, generator=generator)
        parameter.copy_(tensor_parallel_slice(name, full, rank, size))


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    is_fp8: bool = False,
) -> list[NLDModel]:
    """This rank's part of the model, on ``device``, with weights drawn from ``seed``.

    Args:
        is_fp8: see :func:`transformer_config`.

    Returns:
        one chunk, or with interleaved pipeline stages as many as are configured, in the order of their layers. They
        share one TransformerConfig, which Megatron's schedule reads.
    """
    config = transformer_config(
        model,
        parallel,
        dtype,
        is_fp8=is_fp8,
        gradient_accumulation_fusion=fuses_gradients(model, dtype, device),
        compile_pointwise=compiles_pointwise(model.compile_pointwise, device),
    )
    num_chunks = parallel.virtual_pipeline_model_parallel_size
    stages = [None] if num_chunks is None else range(num_chunks)
    chunks = [NLDModel(config, model, model.attention_backend, vp_stage=stage).to(device) for stage in stages]
    for chunk in chunks:
        initialize_weights(chunk, seed=seed, std=model.initializer_range)
    return chunks


def build_model(
    model: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype, device: torch.device, seed: int
) -> NLDModel:
    """:func:`build_chunks` of a layout without interleaved stages."""
    (chunk,) = build_chunks(model, parallel, dtype=dtype, device=device, seed=seed)
    return chunk
