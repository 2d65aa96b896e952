"""Megatron-Core without a GPU: the one place that makes its CUDA names mean the CPU.

Megatron-Core names CUDA in some hundreds of places but hardly depends on it: with the few redirections below its real
engine (GPTModel, DistributedDataParallel, DistributedOptimizer, pipeline schedules, dist_checkpointing) runs on the
CPU over gloo, with no patched source. :func:`enter` is called once per process by
:func:`nld_train.platform.device.initialize_device`, before Megatron modules are built, and only where there is no GPU
in use.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_CPU = torch.device("cpu")

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_active: "_CudaMeansCpu | None" = None


def _to_cpu(device: Any) -> Any:
    """Map any spelling of a CUDA device to the CPU; leave everything else alone."""
    is_cuda = (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )
    return _CPU if is_cuda else device


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites CUDA devices in torch calls to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer sorts parameters by this string: "torch.FloatTensor" -> "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
        if func is Tensor.to and len(args) > 1:
            args = (args[0], _to_cpu(args[1]), *args[2:])
        return func(*args, **kwargs)


class _Stream:
    """Stands in for a CUDA stream: on the CPU everything is in order already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None: ...


def _no_operation() -> Callable[..., None]:
    # One function per name: torch.compile keeps a rule per function object and refuses one object under two names.
    def nothing(*args: Any, **kwargs: Any) -> None: ...

    return nothing


def _run_now(callable_: Callable[[], Any], **kwargs: Any) -> None:
    callable_()


def enter() -> None:
    """Make CUDA names mean the CPU for the rest of this process. Idempotent."""
    global _active
    if _active is not None:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _no_operation())
    cuda.Stream = _Stream
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.default_generators = {_CPU: torch.default_generator}
    # Megatron defers RNG writes until CUDA is initialised; here that never happens, so they run at once.
    megatron_random._lazy_call = _run_now  # type: ignore[assignment]
    _active = _CudaMeansCpu()
    _active.__enter__()


class CPUInfo(NamedTuple):
    """What Linux says of the first processor; empty elsewhere.

    ``flags``: what it can do. On aarch64, where Linux knows no names, ``vendor`` and ``model`` are numbers.
    """

    vendor: str
    name: str
    model: str
    flags: frozenset[str]


@functools.cache
def cpu_info() -> CPUInfo:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def first_of(*names: str) -> str:
        return next((values[name] for name in names if values.get(name)), "")

    return CPUInfo(
        first_of("vendor_id", "CPU implementer"),
        values.get("model name", ""),
        first_of("model", "CPU part"),
        frozenset(first_of("flags", "Features").split()),
    )


def keep_freed_memory() -> bool:
    """Have glibc's allocator keep what is freed, for the next step to use; False: it is another one, or is set already.

    By default a large block is mapped anew each time, and the system clears each of its pages when it is first touched:
    a third of a bf16 step. The process does not give its peak back before it ends. Variables ``MALLOC_*`` win.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block below 1 GiB is mapped, nothing is given back, and the heap grows by 64 MiB at a time.
    settings = ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all(mallopt(name, value) == 1 for name, value in settings)


@contextlib.contextmanager
def bf16_operands() -> Iterator[None]:
    """fp32 products on the CPU may read their operands as bf16; products and sums stay fp32.

    Where the operands hold bf16 values nothing is lost, and the product is twice as fast on a CPU with bf16
    instructions; elsewhere this changes nothing.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def direct_calls() -> contextlib.AbstractContextManager[Any]:
    """Where torch's functions are called directly, not by way of :func:`enter`'s redirections, if those are in force:
    for code that builds no tensor on a device by name. Some thousand calls of a step are a hundredth of a small one."""
    return contextlib.nullcontext() if _active is None else torch._C.DisableTorchFunction()


def unredirected(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function inside which torch's functions are called directly, not by way of :func:`enter`'s redirections: a
    third of the time of a call that does little, which long loops of them feel."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return called
