"""Why a configuration does not compose: every unknown key, wrong type and unknown option, not only the first.

Hydra stops at the first error, and its advice ("to append to your config use +...") does not fit a typed schema. Here
each override is looked at by itself, and the whole is composed once more without the schema, so that the values of
YAML files can be compared with the schema one by one.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from nld_train.config.command_help import find_key, is_section, suggest
from nld_train.config.schema import Config
from nld_train.errors import Problem

SCHEMA_NAME = "schema"
LIST_OF_KEYS = "`python train.py --help` lists every key"
# A YAML file may be damaged, and Hydra raises ValueError for some overrides (model=null).
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)

Compose = Callable[[Sequence[str]], DictConfig]
GroupOptions = Callable[[str], Sequence[str]]


@dataclass(slots=True, kw_only=True)
class Diagnosis:
    """``problems``: all that were found. ``accepted``: the overrides without one; None where a group's option is
    unknown, so that the rest of the configuration is not known either."""

    problems: list[Problem] = field(default_factory=list)
    accepted: list[str] | None = None


def register_schema(typed: bool = True) -> None:
    """Make the schema known to Hydra under the name that configs/config.yaml uses; untyped: an empty one."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=Config if typed else {})


def diagnose(overrides: Sequence[str], compose: Compose, group_options: GroupOptions) -> Diagnosis:
    """Look for what keeps ``overrides`` from composing.

    Args:
        overrides: as on the command line.
        compose: composes a list of overrides, inside an initialised Hydra; raises one of COMPOSITION_ERRORS.
        group_options: the options of a group, wherever its files are.
    """
    result = Diagnosis()
    parsed = _parse(overrides, result.problems)
    groups = [override for override in parsed if _is_group(override)]
    values = [override for override in parsed if override not in groups]

    good_groups = [
        override for override in groups if not _note(_option_problem(override, group_options), result.problems)
    ]
    groups_known = len(good_groups) == len(groups)
    base = _compose_untyped([_line(o) for o in good_groups], compose)
    # A stage is known when the groups bring it, or when the command line adds it by a value.
    stage_names = list(base.get("stages") or {}) if base is not None else []
    added = {o.key_or_group.split(".")[1] for o in values if o.is_add() and o.key_or_group.startswith("stages.")}
    stages_known = groups_known and base is not None

    good_values = [
        override
        for override in values
        if not _note(_key_problem(override, [*stage_names, *sorted(added)], stages_known), result.problems)
    ]
    # "++" sets a value whether or not a YAML file mentions it, which is what the schema would have allowed.
    forced = [f"++{_line(o).lstrip('+')}" if not o.is_delete() else _line(o) for o in good_values]
    untyped = _compose_untyped([*map(_line, good_groups), *forced], compose)
    bad_paths: list[str] = []
    if untyped is not None:
        found = type_problems(untyped)
        bad_paths = [problem.location for problem in found]
        result.problems += found
    accepted = [_line(o) for o in [*good_groups, *good_values] if not _touches(o, bad_paths)]
    if not result.problems or untyped is None:
        accepted = _one_by_one(accepted, compose, result.problems)
    result.accepted = accepted if groups_known else None
    return result


def type_problems(config: DictConfig) -> list[Problem]:
    """Unknown keys, values of a wrong type and broken interpolations, everywhere in a composed configuration.

    Missing values (``???``) are no problem here.
    """
    problems: list[Problem] = []
    stages = config.get("stages") if not OmegaConf.is_missing(config, "stages") else None
    _check_node(config, "", list(stages) if isinstance(stages, DictConfig) else [], problems)
    return problems


def missing_paths(config: DictConfig) -> list[str]:
    """Keys that still hold ``???``. (OmegaConf's own function stops at an interpolation that cannot be resolved.)"""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from walk(value, f"{prefix}.{name}" if prefix else str(name))
        elif node == MISSING:
            yield prefix

    return list(walk(OmegaConf.to_container(config, resolve=False), ""))


def _check_node(node: DictConfig, prefix: str, stage_names: list[str], problems: list[Problem]) -> None:
    for name in node:
        path = f"{prefix}{name!s}"
        if OmegaConf.is_missing(node, name):
            continue
        try:
            value = node[name]
        except InterpolationToMissingValueError:
            continue  # the missing value is reported at its own key
        except OmegaConfBaseException as error:
            problems.append(
                Problem(path, f"its value cannot be worked out: {_first_line(error)}", "give the value itself")
            )
            continue
        if is_section(path) or path == "stages":
            if isinstance(value, DictConfig):
                _check_node(value, f"{path}.", stage_names, problems)
            else:
                problems.append(
                    Problem(path, f"{value!r} is given for a whole section", f"set single keys; {LIST_OF_KEYS}")
                )
            continue
        problem = _value_problem(path, value, stage_names)
        if problem is not None:
            problems.append(problem)


def _value_problem(path: str, value: Any, stage_names: list[str]) -> Problem | None:
    key = find_key(path)
    if key is None:
        return unknown_key(path, f"{path}={value}", stage_names)
    try:
        _probe(key.section)[key.name] = value
    except OmegaConfBaseException:
        remedy = f"give {key.expected}"
        if key.type is int and isinstance(value, float) and value.is_integer():
            remedy = f"write it as an integer: {path}={int(value)}"
        elif matches := difflib.get_close_matches(
            str(value).lower(), key.expected.removeprefix("one of ").split(", "), cutoff=0.8
        ):
            remedy += f"; did you mean {path}={matches[0]}?"
        return Problem(path, f"{_shown(value)} is not {key.expected}", remedy)
    return None


@cache
def _probe(section: type) -> DictConfig:
    """An object of the section's type, to try values on; what it holds does not matter."""
    return OmegaConf.structured(section)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def unknown_key(path: str, given: str, stage_names: list[str]) -> Problem:
    """The problem of a key that does not exist, with the nearest one that does."""
    guess = suggest(path, stage_names)
    remedy = f"did you mean {guess}? {LIST_OF_KEYS[0].upper()}{LIST_OF_KEYS[1:]}" if guess else LIST_OF_KEYS
    return Problem(path, f"there is no such key (given: {given})", remedy)


def _parse(overrides: Sequence[str], problems: list[Problem]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except COMPOSITION_ERRORS as error:
            problems.append(
                Problem(text, f"cannot be read: {_first_line(error)}", "write key=value; quote text: 'key=\"a, b\"'")
            )
            continue
        if override.is_sweep_override():
            problems.append(
                Problem(
                    override.key_or_group,
                    f"{text} lists several values for one run",
                    "add --multirun for one run per value, or quote a single text: 'key=\"a,b\"'",
                )
            )
        else:
            parsed.append(override)
    return parsed


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _note(problem: Problem | None, problems: list[Problem]) -> bool:
    if problem is not None:
        problems.append(problem)
    return problem is not None


def _is_group(override: Override) -> bool:
    """``model=ministral3_8b`` chooses a file, although ``model`` is a section too; ``model.num_layers=2`` does not."""
    name = override.key_or_group
    if name.startswith("hydra"):
        return True
    return "." not in name and name in GlobalHydra.instance().config_loader().list_groups("")


def _option_problem(override: Override, group_options: GroupOptions) -> Problem | None:
    name, value = override.key_or_group, override.value()
    if name.startswith("hydra") or override.is_delete():
        return None
    options = sorted(group_options(name))
    if value in options:
        return None
    remedy = f"use one of {', '.join(f'{name}={option}' for option in options)}"
    if matches := difflib.get_close_matches(str(value).lower(), options, n=1):
        remedy = f"did you mean {name}={matches[0]}? Else {remedy}"
    return Problem(name, f"{_shown(value)} is not in the group", remedy)


def _key_problem(override: Override, stage_names: list[str], stages_known: bool) -> Problem | None:
    path = override.key_or_group
    parts = path.split(".")
    in_stages = parts[0] == "stages" and len(parts) > 1
    if in_stages and stages_known and parts[1] not in stage_names:
        guess = difflib.get_close_matches(parts[1], stage_names, n=1)
        names = ", ".join(stage_names) or "none"
        remedy = f"the stages of this run: {names}; a new one: +stage@stages.{parts[1]}=joint"
        if guess:
            remedy = f"did you mean {'.'.join(['stages', guess[0], *parts[2:]])}? Else, {remedy}"
        return Problem(path, f"there is no stage {parts[1]!r} (given: {_line(override)})", remedy)
    if find_key(path) is None and not is_section(path) and path != "stages":
        return unknown_key(path, _line(override), stage_names)
    return None


def _touches(override: Override, paths: list[str]) -> bool:
    own = override.key_or_group
    return any(path == own or path.startswith(f"{own}.") for path in paths) and not _is_group(override)


def _compose_untyped(overrides: list[str], compose: Compose) -> DictConfig | None:
    register_schema(typed=False)
    try:
        return compose(overrides)
    except COMPOSITION_ERRORS:
        return None
    finally:
        register_schema()


def _one_by_one(overrides: list[str], compose: Compose, problems: list[Problem]) -> list[str]:
    """The last resort: add one override after the other and report those that Hydra refuses, in its own words."""
    accepted: list[str] = []
    try:
        compose(accepted)
    except COMPOSITION_ERRORS as error:
        problems.append(Problem("configs", _all_lines(error), "mend the file that is named"))
        return accepted
    for override in overrides:
        try:
            compose([*accepted, override])
        except COMPOSITION_ERRORS as error:
            plain = override.lstrip("+")
            if blend := re.match(r"data\.blend|stages\.[^.=]+\.blend", plain):
                empty = "data=blend " if plain.startswith("data.") else ""
                remedy = f"name parts together: {empty}'++{blend[0]}={{NAME: {{corpus: FOLDER, weight: 1}}}}'"
            elif override.startswith("+"):
                remedy = f"without the plus sign: {plain}"
            elif "@" in override and not override.startswith("~"):
                remedy = f"to add it: +{plain}"
            else:
                remedy = "see `python train.py --help` for how to set values"
            problems.append(Problem(override, _all_lines(error), remedy))
        else:
            accepted.append(override)
    return accepted


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].strip()


def _all_lines(error: BaseException) -> str:
    """Hydra's message and its causes in one line: the cause holds the full key."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts += [line.strip() for line in str(cause).splitlines() if line.strip()]
        cause = cause.__cause__
    return "; ".join(dict.fromkeys(texts))
