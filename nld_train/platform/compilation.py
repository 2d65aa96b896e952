"""Parts of a step on the CPU, compiled by torch into one pass over memory.

torch makes code from the first arguments it sees: whether threads share a loop, and with that the last bits that a sum
may have, depends on their number of rows. Here every graph is made from rows of the same number, which counts as
variable. So a result depends on the arguments alone, not on what came before or what lies in torch's cache on disk, and
no other number of rows compiles again.
"""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

_EXAMPLE_ROWS, _EXAMPLE_PARTS = 1024, 8
"""Of what each graph is made from: as large as so many rows of a micro-batch, while it is made."""


def run_compiled(passes: Callable[..., Any], *arguments: Any) -> Any:
    """``passes(*arguments)``, compiled, without gradients; as it is for less than two rows, which are no loop.

    The first call for other dtypes, widths or threads compiles: seconds, or a part of one from torch's cache on disk.

    Args:
        passes: a function without closure from tensors to one tensor or several, which torch's compiler follows to its
            end.
        arguments: tensors on the CPU, made contiguous; of those with more than one dimension all but the last may
            differ from call to call. Other values are constants of the code.
    """
    if any(isinstance(x, Tensor) and x.dim() > 1 and len(x) < 2 for x in arguments):
        return passes(*arguments)
    # Whatever torch would tell one call from another by is taken away: gradients, inference, strides, and the
    # redirections of platform.cpu, which it would have to follow into the code as well.
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        given = [_plain(x) if isinstance(x, Tensor) else x for x in arguments]
        kinds = tuple((x.dtype, _sizes(x)) if isinstance(x, Tensor) else x for x in given)
        return _compiled(passes, kinds, torch.get_num_threads())(*map(_marked, given))


def _plain(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format) if x.is_inference() else x.detach().contiguous()


def _sizes(x: Tensor) -> tuple[int | None, ...]:
    """None: any above one, which may differ from call to call."""
    return tuple(None if dim < x.dim() - 1 and size != 1 else size for dim, size in enumerate(x.shape))


def _marked(x: Any) -> Any:
    if isinstance(x, Tensor):
        for dim, size in enumerate(_sizes(x)):
            if size is None:
                torch._dynamo.mark_dynamic(x, dim)
    return x


@functools.cache
def _compiled(passes: Callable[..., Any], kinds: tuple[Any, ...], num_threads: int) -> Callable[..., Any]:
    """Made from, and run once with, the example of these kinds: (dtype, sizes) of tensors, other values themselves."""
    _say_that_no_gpu_is_used()
    # The number of threads is written into the code; said here, it is part of what torch looks for in its cache.
    # Processes that compile beside this one would only take memory: a function is one or two small kernels.
    options: dict[str, Any] = {"cpp.threads": num_threads, "compile_threads": 1}
    # torch looks through all graphs of a code object in turn, and refuses the ninth.
    function: Any = passes
    alone = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled: Callable[..., Any] = torch.compile(alone, dynamic=False, fullgraph=True, options=options)
    usual = (_EXAMPLE_ROWS, *[_EXAMPLE_PARTS] * 8)
    example = []
    for kind in kinds:
        if isinstance(kind, tuple):
            dtype, sizes = kind
            sizes = [usual[dim] if size is None else size for dim, size in enumerate(sizes)]
            example.append(_marked(torch.zeros(sizes, dtype=dtype)))
        else:
            example.append(kind)
    compiled(*example)
    return compiled


@functools.cache
def _say_that_no_gpu_is_used() -> None:
    """torch's compiler asks, once, for the properties of ``torch.cuda.current_device()``, which is the CPU after
    :func:`nld_train.platform.cpu.enter`; it expects that there may be none, but not that."""
    from torch._inductor.codecache import CacheBase

    def refuse(*_: Any) -> None:
        raise RuntimeError("no GPU is in use")

    cuda: Any = torch.cuda
    get_device_properties, cuda.get_device_properties = cuda.get_device_properties, refuse
    try:
        CacheBase.get_system()
    finally:
        cuda.get_device_properties = get_device_properties
