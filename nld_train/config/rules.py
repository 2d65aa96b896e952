"""What the rules of :mod:`nld_train.config.validate` and :mod:`nld_train.config.layouts` are written with."""

import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from nld_train.config.schema import AttentionBackend, CompilePointwise, Config, StageConfig
from nld_train.errors import Problem


def at_least(config: Config, minimum: float, *keys: str, why: str = "") -> list[Problem]:
    """``key >= minimum`` for each dotted key."""
    return [
        Problem(key, f"{value} is too small{why}", f"use {key}={minimum} or more")
        for key in keys
        if is_number(value := value_at(config, key)) and value < minimum
    ]


def above_zero(config: Config, *keys: str) -> list[Problem]:
    return [
        Problem(key, f"{value} must be greater than 0", f"give a positive number, as in {key}={example}")
        for key, example in zip(keys, map(schema_default, keys), strict=True)
        if is_number(value := value_at(config, key)) and value <= 0
    ]


def is_number(value: Any) -> bool:
    """Not-finite numbers are reported once, by ``finite``; the other rules pass over them."""
    return isinstance(value, int | float) and math.isfinite(value)


def value_at(config: Config, key: str) -> Any:
    """Attribute by dotted key; ``stages.NAME.field`` goes through the dict."""
    return reduce(
        lambda node, name: node[name] if isinstance(node, dict) else getattr(node, name), key.split("."), config
    )


def schema_default(key: str) -> Any:
    """Of a number that the schema has by default; 1 where it has none."""
    parent = StageConfig() if key.startswith("stages.") else value_at(Config(), key.rpartition(".")[0])
    default = getattr(parent, key.rpartition(".")[2])
    return default if is_number(default) else 1


def finite(node: Any, prefix: str) -> Iterable[Problem]:
    """No NaN and no infinity anywhere."""
    if isinstance(node, float) and not math.isfinite(node):
        yield Problem(prefix, f"{node} is not a finite number", "give a finite number")
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from finite(value, f"{prefix}.{name}")
    elif is_dataclass(node):
        for item in fields(node):
            yield from finite(getattr(node, item.name), f"{prefix}.{item.name}".lstrip("."))


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest(value: float, candidates: Iterable[int]) -> int:
    """The candidate closest to ``value``; of two equally close ones the smaller."""
    return min(candidates, key=lambda candidate: (abs(candidate - value), candidate))


def multiple_of(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` nearest to ``value``."""
    return max(1, (2 * value + unit) // (2 * unit)) * unit


def cxx_compiler() -> str:
    """The C++ compiler as torch's compiler finds it: $CXX, or else g++ (clang++ on macOS)."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def missing_compiler() -> tuple[str, str] | None:
    """That there is no C++ compiler on this machine, and the remedy; None: there is one."""
    if shutil.which(compiler := cxx_compiler()) is None:
        return f"there is no C++ compiler {compiler!r}", "install one, or name it in the environment variable CXX"
    return None


def missing_for_compilation() -> tuple[str, str] | None:
    """What torch's compiler lacks on this machine to make code for the CPU, and the remedy; None: nothing.

    It runs :func:`cxx_compiler`, and the code includes Python.h.
    """
    if missing := missing_compiler():
        return missing
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"{headers} holds no Python.h", "install this interpreter's headers (python3-dev)"
    return None


def compilation_problems(config: Config) -> Iterable[Problem]:
    """Of what is compiled on a CPU: ``model.compile_pointwise`` and ``model.attention_backend``."""
    key = "model.compile_pointwise"
    if config.model.compile_pointwise is CompilePointwise.always and (missing := missing_for_compilation()):
        what, remedy = missing
        yield Problem(key, f"always, but {what}", f"{remedy}, or use {key}=auto")
    key = "model.attention_backend"
    if config.model.attention_backend is AttentionBackend.native and (missing := missing_compiler()):
        what, remedy = missing
        yield Problem(key, f"native, but {what}", f"{remedy}, or use {key}=auto")
