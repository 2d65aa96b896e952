"""The typed configuration: one dataclass per section, every default in one place.

Hydra composes YAML files onto these classes (``configs/``), so an unknown key or a wrong type is refused by name.
Rules that involve several values live in :mod:`nld_train.config.validate`. Units are part of the field's comment, and
the comment is what ``train.py --help`` prints. No torch and no megatron here: the configuration is checked before
anything heavy is imported.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Precision(Enum):
    """Arithmetic of parameters and activations. bf16 keeps fp32 main parameters in the optimizer.

    ``fp8`` is bf16 whose layers' matrix products read FP8 (``model.layer_spec=transformer_engine``); attention, head,
    norms, parameters and gradients stay as they are in bf16.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"


FP8_MULTIPLE = 16
"""Rows and widths of an FP8 matrix product are multiples of it (16 bytes, by which the kernels read)."""


class Device(Enum):
    """Where to run. ``auto``: CUDA where a GPU is visible, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class AttentionBackend(Enum):
    """How the block-masked attention is computed (all give the same values).

    ``dense`` materialises the mask (reference). On the CPU ``native`` and ``chunked`` compute only what the mask keeps:
    a kernel of the project's own, which is compiled when first used and needs a C++ compiler, or torch's kernel on
    parts of the rows. ``flex`` is torch's flex_attention (GPU). ``auto``: flex on CUDA; on the CPU native, or chunked
    where nothing compiles.
    """

    auto = "auto"
    dense = "dense"
    native = "native"
    chunked = "chunked"
    flex = "flex"


class LayerSpec(Enum):
    """Whose linear layers and norms a decoder layer is made of; parameters and checkpoints are the same.

    ``local``: Megatron-Core's linear layers and this project's norm. ``transformer_engine``: those of NVIDIA's
    Transformer Engine, and its FlashAttention in AR stages.
    """

    local = "local"
    transformer_engine = "transformer_engine"


class CompilePointwise(Enum):
    """Where norm, SwiGLU and rotary embedding are compiled by torch, each into one pass over memory.

    ``auto``: on CUDA, not on the CPU, where a first step would wait for a C++ compiler. ``always``: on the CPU, too.
    ``never``: nowhere. Values differ in the last bits. (On CUDA the rotary embedding is one kernel in any case.)
    """

    auto = "auto"
    always = "always"
    never = "never"


class Sampler(Enum):
    """How tokens of the noisy copy are chosen (:mod:`nld_train.objective.noise`).

    ``bernoulli``: a noise level per sequence, the published recipe. ``bernoulli_per_block``: one per block.
    ``uniform_count``, ``power_count``: a number of masked tokens per block, every subset of that size as likely; these
    four estimate the same loss. ``position_weighted``: later tokens more often (Efficient-DLM), a loss of its own.
    """

    bernoulli = "bernoulli"
    bernoulli_per_block = "bernoulli_per_block"
    uniform_count = "uniform_count"
    power_count = "power_count"
    position_weighted = "position_weighted"


class Stratify(Enum):
    """``batch``: noise levels are spread evenly over all blocks of the global batch. ``none``: drawn independently."""

    none = "none"
    batch = "batch"


class DocumentMask(Enum):
    """``boundary``: attention, positions and blocks begin anew at each document of a sequence. ``none``: one text."""

    none = "none"
    boundary = "boundary"


class Normalization(Enum):
    """The divisor of the summed losses of a global batch.

    ``tokens``: both terms by the number of supervised clean tokens (NLD technical report, Eq. 5).
    ``contributing``: the number of AR tokens plus the number of masked tokens (public Megatron recipe).
    ``sequence``: each sequence by its own AR tokens and masked tokens, then the mean over sequences (Eq. 4).
    """

    tokens = "tokens"
    contributing = "contributing"
    sequence = "sequence"


class Recompute(Enum):
    """What the backward pass computes again instead of keeping it in memory.

    ``none``: nothing. ``selective``: attention cores and norms, a few percent more work. ``full``: whole layers, of
    which only the input is kept; a third more work.
    """

    none = "none"
    selective = "selective"
    full = "full"


class DecayStyle(Enum):
    """Shape of the decay phase of the warmup-stable-decay learning-rate schedule."""

    linear = "linear"
    cosine = "cosine"


class WandbMode(Enum):
    """``offline`` writes a run folder that ``wandb sync`` uploads later."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    dir: str = MISSING  # folder of everything that belongs to the run; an existing run there is continued
    seed: int = 1234  # of weights, data order and noise


@dataclass(slots=True, kw_only=True)
class RopeConfig:
    """YaRN rotary embedding and query scaling of Ministral3; names as in a checkpoint's ``rope_parameters``."""

    rope_theta: float = 1e6  # base of the rotary frequencies
    factor: float = 16.0  # YaRN: how much longer than the original context
    original_max_position_embeddings: int = 16384  # tokens; YaRN and query scaling start here
    beta_fast: float = 32.0  # YaRN: rotations above which a frequency is kept
    beta_slow: float = 1.0  # YaRN: rotations below which a frequency is divided by factor
    mscale: float = 1.0  # YaRN: attention factor, numerator
    mscale_all_dim: float = 1.0  # YaRN: attention factor, denominator
    llama_4_scaling_beta: float = 0.1  # query scaling: q * (1 + beta * log(1 + floor(position / original))); 0: off


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """A Ministral3-shaped decoder. The output head is never tied to the embedding."""

    num_layers: int = MISSING  # decoder layers
    hidden_size: int = MISSING  # width of the residual stream
    ffn_hidden_size: int = MISSING  # width inside the SwiGLU
    num_attention_heads: int = MISSING  # query heads
    num_key_value_heads: int = MISSING  # shared by groups of query heads
    head_dim: int = MISSING  # of queries, keys and values; even
    vocab_size: int = MISSING  # entries of the embedding and of the head
    max_position_embeddings: int = 262144  # tokens; longest sequence the model is declared for
    rms_norm_eps: float = 1e-5  # added to the mean square
    initializer_range: float = 0.02  # standard deviation of random weights
    rope: RopeConfig = field(default_factory=RopeConfig)
    attention_backend: AttentionBackend = AttentionBackend.auto  # auto: flex (GPU); native, or chunked (CPU)
    compile_pointwise: CompilePointwise = CompilePointwise.auto  # norm, SwiGLU, rotary; always: on the CPU, too
    layer_spec: LayerSpec = LayerSpec.local  # transformer_engine: its kernels, on a GPU; not yet measured there


@dataclass(slots=True, kw_only=True)
class ObjectiveConfig:
    """L = L_AR + diffusion_loss_weight * L_diff."""

    diffusion_loss_weight: float = 0.3  # alpha of the joint stages
    block_size: int = 32  # tokens
    mask_token_id: int = 100  # refused in data, never predicted
    sampler: Sampler = Sampler.power_count  # how tokens of the noisy copy are chosen; the recipe: bernoulli
    eps: float = 1e-3  # smallest masking probability: p = (1 - eps) * t + eps
    stratify: Stratify = Stratify.batch  # batch: noise levels spread evenly over the global batch; the recipe: none
    shared_noise_level: bool = False  # of bernoulli: one level for all sequences of a step (ablation)
    complementary: bool = False  # True: two noisy copies, masked where the other is not
    noisy_fraction: float = 0.5  # share of the blocks that get a noisy copy, weighted by its inverse; the recipe: 1
    half_life_ratio: float = 0.25  # of position_weighted: share of a block over which the weight doubles
    normalization: Normalization = Normalization.tokens  # divisor of both sums


@dataclass(slots=True, kw_only=True)
class BlendPart:
    """One corpus of a blend."""

    corpus: str = MISSING  # shipped name, folder or manifest.json of a prepared one, or a glob of such folders
    weight: float = MISSING  # share of the samples; the weights of a blend need not add up to 1


@dataclass(slots=True, kw_only=True)
class DataConfig:
    corpus: str | None = MISSING  # shipped name ("stdlib"), prepared folder, its manifest.json, a glob; null: blend
    blend: dict[str, BlendPart] = field(default_factory=dict)  # several corpora, by names of your own
    sequence_length: int = 4096  # tokens, L
    cache_dir: str = "data/cache"  # prepared corpora and their indices
    validation_fraction: float = 0.03  # share of documents held out (shipped corpora)
    document_mask: DocumentMask = DocumentMask.none  # boundary: documents of a sequence do not see each other
    num_workers: int = 2  # loader processes per rank


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    global_batch_size: int = 512  # sequences
    micro_batch_size: int = 1  # sequences per rank and forward pass
    precision: Precision = Precision.bf16  # of parameters and activations; fp8: of layer products
    device: Device = Device.auto  # auto: CUDA where a GPU is visible
    log_interval: int = 1  # steps
    validation_interval: int = 100  # steps; also at the first and the last step of every stage
    validation_samples: int = 64  # sequences, the same ones each time
    term_norm_interval: int = 0  # steps between gradient norms of each loss term, at twice a step's cost; 0: never
    max_skipped_steps: int = 10  # of 1000 steps, whose loss or gradient was not finite; one more ends the run
    spike_threshold: float = 8.0  # spreads above the running median at which a loss is marked as a spike; 0: never
    peak_tflops: float | None = None  # 1e12 operations a second of a device, for mfu; null: of a known GPU in bf16
    stall_timeout: float = 900.0  # seconds without progress of a rank until the run is ended; 0: never
    stop_timeout: float = 300.0  # seconds without progress between a signal and the end of the step; then no save


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """What the ranks share; ranks that are left over share the batch (data parallel)."""

    auto: bool = False  # True: the rest of this section is chosen when the run starts (config.plan)
    memory_gb: float | None = None  # 2^30 bytes of a GPU, for auto; null: as the device has
    tensor_model_parallel_size: int = 1  # ranks that share every layer
    sequence_parallel: bool = False  # True: tensor-parallel ranks also share the rows between the matrices
    pipeline_model_parallel_size: int = 1  # ranks that hold consecutive layers
    context_parallel_size: int = 1  # ranks that share a sequence; twice as many chunks of whole blocks make it up
    virtual_pipeline_model_parallel_size: int | None = None  # model chunks of a pipeline rank (interleaved); null: one
    num_layers_in_first_pipeline_stage: int | None = None  # layers of the first pipeline rank; null: as many as others
    num_layers_in_last_pipeline_stage: int | None = None  # layers of the last pipeline rank; null: as many as others
    recompute_granularity: Recompute = Recompute.none  # what the backward pass computes again: none, selective, full
    overlap_grad_reduce: bool | None = None  # reduce gradients during the backward pass; null: on GPUs
    overlap_param_gather: bool | None = None  # gather updated weights during the next forward pass; null: on GPUs


@dataclass(slots=True, kw_only=True)
class MachineConfig:
    """What parallel=auto and scripts/plan.py assume of the machines: figures of an H100, on paper."""

    gpus_per_node: int = 8  # GPUs that NVLink joins
    peak_tflops: float = 989.0  # dense bf16, 1e12 operations a second
    mfu: float = 0.4  # share of the peak that computation reaches while it does not wait for other GPUs; an assumption
    split_cost: float = 0.03  # of the computation, for each halving of a rank's matrices (TP, CP): smaller kernels
    nvlink_gb_per_s: float = 350.0  # 1e9 bytes a GPU sends inside a node (450 on paper)
    network_gb_per_s: float = 40.0  # 1e9 bytes a GPU sends to other nodes (50 on paper: one 400 Gb/s adapter each)
    hbm_gb_per_s: float = 2500.0  # 1e9 bytes the optimizer's step reads and writes (3350 on paper)
    reserved_gb: float = 4.0  # 2^30 bytes: CUDA context and kernels about 1, cuBLAS, NCCL buffers of some communicators
    fragmentation: float = 0.05  # of what is allocated: pieces between blocks of torch's allocator


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; not on norms
    clip_grad: float = 1.0  # global norm; 0 turns clipping off


@dataclass(slots=True, kw_only=True)
class StageConfig:
    """One stage of a run: its objective, its length and its warmup-stable-decay learning rate."""

    diffusion_loss_weight: float = MISSING  # alpha; 0 runs the clean tokens alone (length L, not 2L)
    ar_loss_weight: float = 1.0  # 1 in the recipe; 0 trains the diffusion loss alone
    tokens: int = MISSING  # clean tokens, rounded up to whole steps of global_batch_size * sequence_length
    lr: float = MISSING  # after the warm-up
    min_lr: float = MISSING  # at the last step of the stage
    warmup_fraction: float = 0.01  # of the stage's steps: 0 -> lr
    decay_fraction: float = 0.1  # of the stage's steps, at its end: lr -> min_lr
    decay_style: DecayStyle = DecayStyle.linear  # shape of lr -> min_lr
    reset_optimizer: bool = False  # True: moments start from zero when the stage begins
    blend: dict[str, BlendPart] = field(default_factory=dict)  # of this stage, from its first sample; empty: the run's
    chat: str | None = None  # JSONL of messages, or stdlib_chat: answers are supervised; null: the run's corpus
    chat_validation_samples: int = 0  # sequences of held-out conversations in each validation; 0: none
    chat_validation_fraction: float = 0.05  # share of the conversations held out where there is such a validation
    sequence_length: int | None = None  # tokens, of a stage with chat; null: data.sequence_length
    global_batch_size: int | None = None  # sequences, of a stage with chat; null: train.global_batch_size


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    interval_steps: int = 1000  # save at least this often; 0: not by steps
    interval_seconds: float = 0.0  # and at least this often by the clock; 0: not by time
    asynchronous: bool = True  # a step waits only for the copy to host memory (as much as a rank stores)
    keep_last: int = 2  # complete checkpoints kept
    keep_interval: int = 0  # steps; those of multiples are kept as well; 0: none
    keep_best: int = 0  # as well, of those with a validation in their own step, that many with the lowest best_metric
    best_metric: str = "val_ar_loss"  # of validation records


@dataclass(slots=True, kw_only=True)
class InitConfig:
    hf_path: str | None = None  # folder of a Ministral3 or NLD checkpoint; null: random


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """The Hugging Face folder written at the end of a run, and the prompt continued from it."""

    enabled: bool = True  # write the Hugging Face folder at the end of the run
    prompt: str | None = None  # continued in all modes after the export; null: not
    max_new_tokens: int = 64  # tokens that continue the prompt


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    mode: WandbMode = WandbMode.disabled  # offline writes below run.dir
    project: str = "nld-train"  # of Weights & Biases
    name: str | None = None  # null: the name of the run's folder


@dataclass(slots=True, kw_only=True)
class TensorboardConfig:
    enabled: bool = False  # write event files into run.dir/tensorboard


@dataclass(slots=True, kw_only=True)
class DebugConfig:
    replay_step: int | None = None  # run this step again and print every quantity of it; nothing is written


@dataclass(slots=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)  # run in this order
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init: InitConfig = field(default_factory=InitConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
