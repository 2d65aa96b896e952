"""From the command line to a checked, typed configuration.

``train.py`` calls :func:`main`; tests and scripts call :func:`compose`. Nothing here imports torch or megatron: a
refused configuration costs well under a second.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nld_train.config.command_help import find_key
from nld_train.config.diagnose import (
    COMPOSITION_ERRORS,
    diagnose,
    missing_paths,
    register_schema,
    type_problems,
)
from nld_train.config.schema import Config
from nld_train.config.validate import validate
from nld_train.errors import ConfigError, NLDError, Problem

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
EXIT_OK, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_INTERRUPTED = 0, 1, 2, 130

register_schema()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the YAML files are: Hydra's --config-path, --config-name and --config-dir."""

    config_path: Path = CONFIG_DIR
    config_name: str = "config"
    extra_dir: Path | None = None


# For tests and scripts -----------------------------------------------------------------------------------------------


def compose_unlaunched(overrides: Sequence[str], *, source: Source | None = None) -> Config:
    """As :func:`compose`, but nothing of a launch is checked (ranks, files), and folders need not be named yet."""
    config = _compose_checked(overrides, source or Source(), world_size=None, partial=True)
    if config is None:
        missing = Problem("configuration", "a number is missing", "give it; `python train.py --help` lists every key")
        raise ConfigError([missing])
    return config


def compose(overrides: Sequence[str], *, world_size: int | None = None, source: Source | None = None) -> Config:
    """Compose, type and validate a configuration, as ``python train.py OVERRIDES`` does.

    Args:
        overrides: as on the command line, for example ``["experiment=tiny", "stages.joint.tokens=4096"]``.
        world_size: ranks it is meant for; None: as launched (environment variable WORLD_SIZE, else 1).
        source: where the YAML files are; None: the project's ``configs/``.

    Raises:
        ConfigError: with every problem that was found.
    """
    config = _compose_checked(
        overrides, source or Source(), launched_world_size() if world_size is None else world_size, partial=False
    )
    assert config is not None
    return config


def launched_world_size() -> int:
    """Ranks of this launch: WORLD_SIZE as torchrun sets it, else 1."""
    return _environment_number("WORLD_SIZE", default=1)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain dictionaries, numbers and text (enumerations by name), for logs, checkpoints and YAML."""
    result = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def save_resolved(config: Config, path: Path | str) -> None:
    """Write the whole configuration as YAML, atomically; :func:`load_resolved` reads it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_resolved(path: Path | str) -> Config:
    """Read what :func:`save_resolved` wrote. Types are checked; rules between values are not.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError([Problem(str(path), "there is no such file", "give the config.yaml of a run")]) from None
    except Exception as error:  # the YAML library's errors have no common base with OmegaConf's
        first_line = str(error).partition("\n")[0]
        raise ConfigError([Problem(str(path), f"is not YAML: {first_line}", "restore the file")]) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError([Problem(str(path), "holds no sections", "give the config.yaml of a run")])
    problems = type_problems(loaded)
    if not problems:
        merged = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        assert isinstance(merged, DictConfig)
        problems = _missing_problems(merged)
        if not problems:
            return _typed(merged)
    raise ConfigError([Problem(f"{path}: {p.location}", p.message, p.remedy) for p in problems])


# The command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str], run: Callable[[Config], int]) -> int:
    """The command line of ``train.py``.

    A plain run is composed and checked, then handed to ``run`` outside of Hydra. ``--help``, ``--cfg``, ``--info`` and
    shell completion are Hydra's own; ``--multirun`` starts one process for each job, because Megatron's process
    groups belong to a process.

    Args:
        argv: arguments without the program's name.
        run: trains, and returns the exit status; called once at most, with a validated configuration.

    Returns:
        The exit status: 0, 1 (a run failed), 2 (the configuration is refused), 75 (start it again), 130 (interrupted).
    """
    configs: list[Config] = []
    failed_jobs: list[str] = []

    def task(composed: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            failed_jobs.extend(_run_job(composed, source))
        else:
            configs.append(_typed(composed))

    try:
        arguments = get_args_parser().parse_args(list(argv))
        source = _source(arguments)
        _check_command_line(arguments, source)
        with _as_command_line(argv):
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(task)()
    except ConfigError as error:
        if _environment_number("RANK", default=0) == 0:  # every rank finds the same; one of them says so
            print(error, file=sys.stderr)
        return EXIT_BAD_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    for config in configs:
        return _guarded(run, config)
    if failed_jobs:
        print("failed: " + "; ".join(failed_jobs), file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _guarded(run: Callable[[Config], int], config: Config) -> int:
    """Run, and turn the errors that a user can act on into text and an exit status."""
    try:
        return run(config)
    except NLDError as error:
        # Unlike a refused command line, this can be the trouble of one rank: a missing GPU, a damaged file.
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ and launched_world_size() > 1 else ""
        print(f"{rank}{error}", file=sys.stderr)
        return EXIT_BAD_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def _source(arguments: Any) -> Source:
    return Source(
        # Hydra takes --config-path relative to the file that declares @hydra.main, which is not what a user sees.
        config_path=Path(arguments.config_path).absolute() if arguments.config_path else CONFIG_DIR,
        config_name=arguments.config_name or "config",
        extra_dir=Path(arguments.config_dir).absolute() if arguments.config_dir else None,
    )


def _check_command_line(arguments: Any, source: Source) -> None:
    """Find every problem before Hydra, which would stop at the first one, looks at the command line."""
    folders = {"--config-path": source.config_path, "--config-dir": source.extra_dir}
    missing = [(flag, path) for flag, path in folders.items() if path is not None and not path.is_dir()]
    if missing:
        raise ConfigError([Problem(flag, f"{path} is not a folder", "give a folder") for flag, path in missing])
    if arguments.hydra_help or arguments.shell_completion or arguments.info:
        return
    if arguments.help or arguments.cfg:
        _compose_checked(arguments.overrides, source, world_size=None, partial=True, rules=not arguments.help)
        return
    world_size = launched_world_size()
    if not arguments.multirun:
        _compose_checked(arguments.overrides, source, world_size, partial=False)
        return
    if world_size > 1:
        remedy = "start one torchrun for each job, with its own run.dir"
        raise ConfigError([Problem("--multirun", f"cannot be used with {world_size} launched ranks", remedy)])
    problems: dict[Problem, None] = {}
    for job in _jobs(arguments.overrides):
        try:
            _compose_checked(job, source, world_size, partial=False)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError(list(problems))


@contextmanager
def _as_command_line(argv: Sequence[str]) -> Iterator[None]:
    saved = sys.argv
    sys.argv = [saved[0], *_with_absolute_config_path(argv)]
    try:
        yield
    finally:
        sys.argv = saved


def _with_absolute_config_path(argv: Sequence[str]) -> list[str]:
    result = list(argv)
    for index, argument in enumerate(result):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config-path", "-cp"):
            continue
        if equals:
            result[index] = f"{flag}={Path(value).absolute()}"
        elif index + 1 < len(result):
            result[index + 1] = str(Path(result[index + 1]).absolute())
    return result


def _jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job of a sweep (Hydra's basic sweeper: the product of all lists)."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    except COMPOSITION_ERRORS:
        return [list(overrides)]  # which names what cannot be read


def _run_job(composed: DictConfig, source: Source) -> list[str]:
    """One job of a sweep, in a process of its own and a folder of its own. Returns what failed."""
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("run.dir=")]
    name = re.sub(r"[^\w.=,+@~-]+", "_", ",".join(overrides))
    if len(name) > 200:  # names of files end at 255 bytes
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    folder = str(Path(composed.run.dir) / name)
    quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
    flags = [f"--config-path={source.config_path}", f"--config-name={source.config_name}"]
    if source.extra_dir is not None:
        flags.append(f"--config-dir={source.extra_dir}")
    print(f"{folder}: starts", file=sys.stderr, flush=True)
    finished = subprocess.run(
        [sys.executable, sys.argv[0], *flags, *overrides, f"run.dir='{quoted}'"], check=False, stdin=subprocess.DEVNULL
    )
    return [f"{folder} (exit status {finished.returncode})"] if finished.returncode else []


# Composition ---------------------------------------------------------------------------------------------------------


def _compose_checked(
    overrides: Sequence[str], source: Source, world_size: int | None, *, partial: bool, rules: bool = True
) -> Config | None:
    """Compose and check; the configuration, or None where numbers are missing in a partial one.

    Args:
        partial: values may be missing, and nothing of the launch is checked (to print a configuration).
        rules: False: only names and types are checked.
    """
    if not source.config_path.is_dir():
        remedy = "install the project from its folder (pip install -e .)"
        raise ConfigError([Problem(str(source.config_path), "the folder of the YAML files is missing", remedy)])
    problems: list[Problem] = []
    extra = [f"hydra.searchpath=['file://{source.extra_dir}']"] if source.extra_dir is not None else []
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(source.config_path), job_name="train"):

        def composed_by_hydra(lines: Sequence[str]) -> DictConfig:
            return hydra.compose(config_name=source.config_name, overrides=[*lines, *extra])

        def group_options(group: str) -> list[str]:
            search = [line for line in overrides if line.startswith("hydra.searchpath=")]
            loader = GlobalHydra.instance().config_loader()
            settings = (source.config_name, [*search, *extra])
            found: list[str] = loader.get_group_options(group, ObjectType.CONFIG, *settings)
            for inner in loader.get_group_options(group, ObjectType.GROUP, *settings):
                found += [f"{inner}/{option}" for option in group_options(f"{group}/{inner}")]
            return found

        composed: DictConfig | None
        try:
            composed = composed_by_hydra(overrides)
        except COMPOSITION_ERRORS:
            diagnosis = diagnose(overrides, composed_by_hydra, group_options)
            problems += diagnosis.problems
            composed = None
            if diagnosis.accepted is not None:
                try:
                    composed = composed_by_hydra(diagnosis.accepted)
                except COMPOSITION_ERRORS:
                    composed = None  # its problems are already known

    config: Config | None = None
    if composed is not None:
        found = type_problems(composed)  # "+section.unknown=1" composes, so this is looked at in any case
        problems += [problem for problem in found if problem not in problems]
        known = {problem.location for problem in problems}
        missing = [problem for problem in _missing_problems(composed) if problem.location not in known]
        problems += missing if not partial else []
        if rules and not found:
            known |= {problem.location for problem in missing}
            config, by_rules = _by_rules(composed, world_size)
            problems += [problem for problem in by_rules if problem.location not in known]
            config = None if missing and not partial else config
    if problems:
        raise ConfigError(problems)
    return config


def _by_rules(composed: DictConfig, world_size: int | None) -> tuple[Config | None, list[Problem]]:
    """The rules of :mod:`validate`, on a configuration in which text may be missing (a folder to be named)."""
    filled = composed.copy()
    for path in missing_paths(filled):
        key = find_key(path)
        if key is None or not isinstance("", key.type):
            return None, []  # a number that is not there yet: rules about others would be about a guess
        OmegaConf.update(filled, path, "<missing>")
    config = _typed(filled)
    return config, validate(config, world_size)


def _missing_problems(composed: DictConfig) -> list[Problem]:
    problems = []
    for path in missing_paths(composed):
        key = find_key(path)
        comment = f" ({key.comment})" if key is not None and key.comment else ""
        expected = key.expected if key is not None else "a value"
        problems.append(
            Problem(path, f"??? stands for a value that you have to give{comment}", f"{path}=VALUE, {expected}")
        )
    return problems


def _typed(composed: DictConfig) -> Config:
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(
            [Problem(error.full_key or "configuration", str(error).partition("\n")[0], "give the value itself")]
        ) from error
    assert isinstance(config, Config)
    assert all(is_dataclass(stage) for stage in config.stages.values())
    return config


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        remedy = f"unset {name}, or start with torchrun, which sets it"
        raise ConfigError([Problem(f"environment variable {name}", f"{text!r} is not a number", remedy)])
    return int(text)
