"""C++ of the project, compiled for the machine that it runs on: once, and kept in the user's cache."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from nld_train.config.rules import cxx_compiler, missing_compiler
from nld_train.platform.cpu import cpu_info

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-Wl,--as-needed")


class NativeError(Exception):
    """What cannot be compiled or loaded here, and why."""


@cache
def native_library(source: Path, machine: str = "native") -> ctypes.CDLL:
    """The library of one C++ file, which needs the standard library alone.

    Compiled when first used on this machine (3 seconds) and kept in ``$XDG_CACHE_HOME/nld_train`` (or
    ``~/.cache``; where that cannot be written, in a folder of temporary files) by what it depends on: text, compiler,
    flags, processor and torch. Processes that start together wait for the first one.

    Args:
        machine: the compiler's ``-march``.

    Raises:
        NativeError: there is no GCC or no cache, it fails, or torch brings no OpenMP library, whose threads are to be
            shared.
    """
    try:
        return _loaded(source, machine)
    except (OSError, RuntimeError) as error:  # of the file system; of a user without a home
        raise NativeError(f"{source.name} cannot be compiled: {error}") from error


def _loaded(source: Path, machine: str) -> ctypes.CDLL:
    if missing := missing_compiler():
        raise NativeError(missing[0])
    compiler = cxx_compiler()
    version = _run([compiler, "--version"])
    first_line = version.partition("\n")[0]
    if "Free Software Foundation" not in version:
        raise NativeError(f"{compiler!r} is {first_line}, not GCC, whose code alone takes torch's OpenMP library")
    openmp = _openmp_library()
    flags = (*_FLAGS, f"-march={machine}")
    # torch's library comes before the compiler's own, which then is not needed.
    command = [compiler, *flags, str(source), str(openmp), f"-Wl,-rpath,{openmp.parent}"]
    cpu = cpu_info()
    here = [first_line, *flags, cpu.vendor, cpu.name, cpu.model, *sorted(cpu.flags), torch.__version__, str(openmp)]
    name = hashlib.sha256(b"\0".join([source.read_bytes(), *map(str.encode, here)])).hexdigest()[:24]
    path = _cache_folder() / f"{source.stem}-{name}.so"
    with open(path.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then each process compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(path))
            path.unlink()  # damaged
        _compile(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink()
        raise NativeError(f"{path} cannot be loaded: {error}") from error


def _compile(command: list[str], path: Path) -> None:
    """All of the library under its name, or none."""
    number, temporary = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".tmp", dir=path.parent)
    try:
        _run([*command, "-o", temporary])
        os.fsync(number)
        os.replace(temporary, path)
    finally:
        os.close(number)
        Path(temporary).unlink(missing_ok=True)


def _openmp_library() -> Path:
    """torch's own: with another beside it each would have its threads, and they would wait for the same cores."""
    package = Path(torch.__file__).parent
    # Wheels for x86-64 have it in the first folder, those for aarch64 in the second.
    folders = (package / "lib", package.parent / "torch.libs")
    found = [path for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    if not found:
        raise NativeError(f"torch {torch.__version__} brings no libgomp")
    return found[0]


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nld_train"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"nld_train-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NativeError(f"{folder} belongs to somebody else")
    return folder


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise NativeError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise NativeError(f"{' '.join(command)} ended with {done.returncode}: " + "\n".join(last))
    return done.stdout
