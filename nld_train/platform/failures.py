"""Errors that are the machine's fault: started again, perhaps elsewhere, a run may go on."""

import errno
import re

import torch
import torch.distributed as dist

from nld_train.errors import NLDError

_FILE_SYSTEM = frozenset({
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ENODEV,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
})  # fmt: skip
"""What a network file system answers whose server, or connection, is gone."""
_WORDS = re.compile(r"\[[^]]*gloo/|\b(gloo|Gloo|NCCL)\b|CUDA error|DataLoader worker")


def is_of_the_machine(error: BaseException) -> bool:
    """A machine, its GPU, its file system or its network has failed."""
    if isinstance(error, NLDError):
        return False
    if isinstance(error, OSError):
        return error.errno in _FILE_SYSTEM or isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    words = str(error)
    return _WORDS.search(words) is not None and "device-side assert" not in words  # which would be there again
