"""The schema read as text: every key with its type, default and comment, for ``--help`` and for error messages."""

import ast
import difflib
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nld_train.config import schema

ANY_NAME = "*"  # stands for the name of a stage or of a part of a blend in a key: stages.*.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One settable value. ``path`` is dotted, ``section`` the dataclass that holds the field ``name``."""

    path: str
    section: type
    name: str
    type: Any
    comment: str

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        kinds = [kind for kind in get_args(self.type) or (self.type,) if kind is not NoneType]
        words = " or ".join(map(_type_in_words, kinds))
        return f"{words} or null" if NoneType in get_args(self.type) else words


def _type_in_words(kind: Any) -> str:
    if issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


@cache
def _comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment at the end of the field's line in schema.py."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        (node.name, statement.target.id): by_line.get(statement.end_lineno or 0, "")
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def _walk(section: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section)
    for item in fields(section):
        kind, path = hints[item.name], f"{prefix}{item.name}"
        if is_dataclass(kind):
            yield from _walk(kind, f"{path}.")  # type: ignore[arg-type]
        elif get_origin(kind) is dict:
            yield from _walk(get_args(kind)[1], f"{path}.{ANY_NAME}.")
        else:
            comment = _comments()[section.__name__, item.name]
            yield Key(path=path, section=section, name=item.name, type=kind, comment=comment)


@cache
def all_keys() -> dict[str, Key]:
    """Dotted path -> key; names of stages and of parts of a blend are ``*``."""
    return {key.path: key for key in _walk(schema.Config, "")}


def general_path(path: str) -> str:
    """``stages.joint.lr`` -> ``stages.*.lr``, ``data.blend.code.weight`` -> ``data.blend.*.weight``."""
    parts = path.split(".")
    places = {"stages": (1, 3), "data": (2,)}.get(parts[0], ())  # of names; a stage itself may be called "blend"
    for place in places:
        if len(parts) > place and (place == 1 or parts[place - 1] == "blend"):
            parts[place] = ANY_NAME
    return ".".join(parts)


def find_key(path: str) -> Key | None:
    """The settable value at a dotted path; None for a section and for what does not exist."""
    return all_keys().get(general_path(path))


def is_section(path: str) -> bool:
    """Does the path name a group of keys (``model``, ``model.rope``, ``stages.joint``)?"""
    return any(known.startswith(f"{general_path(path)}.") for known in all_keys())


def suggest(path: str, stage_names: list[str]) -> str | None:
    """The existing key that was probably meant by ``path``."""
    parts = path.split(".")
    # A part of a blend is only known by its name here.
    part_names = [parts[place + 1] for place, section in enumerate(parts[:-1]) if section == "blend"]
    known = []
    for key in all_keys():
        paths = [key]
        if key.startswith("stages."):
            paths = [key.replace(ANY_NAME, name, 1) for name in stage_names]
        if f".blend.{ANY_NAME}" in key:
            paths = [each.replace(ANY_NAME, name) for each in paths for name in part_names]
        known += paths
    section, _, name = path.rpartition(".")
    # The right name in the right section, then the right name elsewhere, then anything that looks like it.
    in_section = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    for match in difflib.get_close_matches(name, in_section, n=1):
        return in_section[match]
    by_name = {key.rpartition(".")[2]: key for key in reversed(known)}
    if name in by_name:
        return by_name[name]
    sections = {key.rpartition(".")[0] for key in known}
    for match in difflib.get_close_matches(path, [*known, *sections], n=1, cutoff=0.8):
        return match
    for match in difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        return by_name[match]
    return None


def key_table(config: DictConfig) -> str:
    """Every key with the value that ``config`` gives it, its type and its comment; one line each.

    Args:
        config: composed, possibly with missing values.
    """
    rows = []
    plain = [(key.path, key) for key in all_keys().values() if not key.path.startswith("stages.")]
    of_stages = [
        (key.path.replace(ANY_NAME, str(name), 1), key)
        for name in config.stages
        for key in all_keys().values()
        if key.path.startswith("stages.")
    ]
    for path, key in _with_part_names([*plain, *of_stages], config):
        rows.append((f"{path}={_shown(config, path)}", _short_type(key.type), key.comment))
    widths = [min(48, max(len(row[column]) for row in rows)) for column in (0, 1)]
    lines = []
    for assignment, kind, comment in rows:
        lines.append(f"  {assignment:<{widths[0]}}  {kind:<{widths[1]}}  {comment}".rstrip())
    return "\n".join(lines)


def _with_part_names(keys: list[tuple[str, Key]], config: DictConfig) -> Iterator[tuple[str, Key]]:
    """Keys of a blend's parts, once for each part; what an empty blend would take stays as it is."""
    for path, key in keys:
        blend, has_parts, _ = path.partition(f".{ANY_NAME}.")
        names = list(OmegaConf.select(config, blend) or {}) if has_parts else []
        for name in names or [ANY_NAME]:
            yield path.replace(ANY_NAME, str(name)), key


def _shown(config: DictConfig, path: str) -> str:
    if ANY_NAME in path:
        return "???"
    try:
        value = OmegaConf.select(config, path, throw_on_missing=True)
    except OmegaConfBaseException:
        return "???"
    if isinstance(value, Enum):
        return value.name
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short_type(kind: Any) -> str:
    kinds = get_args(kind) or (kind,)
    return "|".join(
        "null"
        if part is NoneType
        else "|".join(member.name for member in part)
        if issubclass(part, Enum)
        else part.__name__
        for part in kinds
    )


def _help_resolver(*, _root_: DictConfig) -> str:
    # Hydra's help is a string.Template, where "$" starts a name.
    return key_table(_root_).replace("$", "$$")


OmegaConf.register_new_resolver("nld_train.key_table", _help_resolver, replace=True)
