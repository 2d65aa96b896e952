"""Corpora that need no download: real text that is already on every machine.

``python_code`` is the source of the interpreter's standard library, ``python_prose`` its documentation strings and the
topics of ``help()``. A module is held out of both or of neither. Modules that share a longer docstring count as one, so
that no held-out docstring is in a training text, and so do a topic and a module that repeats it.
"""

import ast
import hashlib
import inspect
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from nld_train.errors import DataError

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TOPICS = "pydoc_data/topics.py"

SHARED_TEXT_CHARACTERS = 80
"""Docstrings from this length on must not be on both sides; shorter ones are phrases that anybody writes."""

_SHINGLE_WORDS = 6
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, the name it is known by (for a file: its path below the corpus's root, with forward slashes), and the
    text that it is taken from, by which it is held out (None: it is that text itself)."""

    name: str
    text: str
    source: str | None = None


class CorpusSource(Protocol):
    """Where a corpus comes from. Its hash is had at once, its text may take seconds."""

    @property
    def name(self) -> str: ...

    @property
    def content_hash(self) -> str: ...

    @property
    def tokenizer_corpora(self) -> tuple[str, ...]: ...

    def read(self) -> "CorpusText": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusText:
    """A corpus as text.

    Args:
        name: as in ``data.corpus``.
        source: where the text comes from, for people and for the manifest.
        documents: in a fixed order; none is empty.
        num_skipped: files left out because they are empty or cannot be decoded.
        tokenizer_corpora: shipped corpora on whose training text the tokenizer is trained; none: on this one's.
    """

    name: str
    source: str
    documents: tuple[Document, ...]
    num_skipped: int
    tokenizer_corpora: tuple[str, ...] = ()

    def read(self) -> "CorpusText":
        return self

    @property
    def content_hash(self) -> str:
        """sha256 over names and texts, in order. Lengths go in as well, so that no two corpora read the same."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                encoded = part.encode("utf-8")
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()


def read_stdlib() -> CorpusText:
    """The running interpreter's standard library, without its tests (PSF licence; differs by interpreter).

    Raises:
        DataError: the interpreter has no standard library on disk (a frozen or zipped one).
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents, num_skipped = read_python_files(root)
    if not documents:
        raise DataError(
            "data.corpus",
            f"'stdlib' is empty: no readable .py files under {root}",
            "use an interpreter that has its standard library as files, or set data.corpus to a prepared folder",
        )
    source = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return CorpusText(name="stdlib", source=source, documents=documents, num_skipped=num_skipped)


def read_python_files(root: Path) -> tuple[tuple[Document, ...], int]:
    """Every ``.py`` file under ``root`` but tests and installed packages, sorted by name.

    A file is decoded by its coding cookie or byte-order mark (PEP 263), with newlines as ``\\n``.

    Returns:
        the documents, and the number of files left out because they are empty or cannot be decoded.
    """
    documents = []
    num_skipped = 0
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _TEST_FOLDERS | _FOREIGN_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            try:
                with tokenize.open(path) as stream:
                    text = stream.read()
                # A lone surrogate can be decoded (from utf-7, say), yet never written as UTF-8.
                text.encode("utf-8")
            except (SyntaxError, UnicodeError, OSError):
                text = ""
            if text:
                documents.append(Document(name=path.relative_to(root).as_posix(), text=text))
            else:
                num_skipped += 1
    return tuple(sorted(documents, key=lambda document: document.name)), num_skipped


# ---------------------------------------------------------------------------------------------- code and prose


@dataclass(frozen=True, slots=True, kw_only=True)
class _StdlibPart:
    """``python_code`` or ``python_prose``; keyed by the modules alone, so that a cached one is found without reading
    docstrings."""

    name: str
    modules: CorpusText
    texts: Callable[[tuple[Document, ...]], tuple[Document, ...]] = field(repr=False)
    version: int = 1  # raised whenever the same modules give other documents
    tokenizer_corpora: tuple[str, ...] = ("python_code", "python_prose")

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(f"{self.name} {self.version} {self.modules.content_hash}".encode()).hexdigest()

    def read(self) -> CorpusText:
        return replace(
            self.modules,
            name=self.name,
            documents=self.texts(self.modules.documents),
            tokenizer_corpora=self.tokenizer_corpora,
        )


def code_documents(modules: tuple[Document, ...]) -> tuple[Document, ...]:
    """The modules, each with the source by which it is held out; without the topics of ``help()``."""
    sources = _sources(modules)
    return tuple(replace(module, source=sources[module.name]) for module in modules if module.name != _TOPICS)


def prose_documents(modules: tuple[Document, ...]) -> tuple[Document, ...]:
    """The docstrings of each module as one document, then the topics of ``help()``."""
    sources = _sources(modules)
    documents = []
    for module in modules:
        if module.name != _TOPICS and (docstrings := _docstrings(module)):
            text = "\n\n".join(docstrings) + "\n"
            documents.append(Document(name=module.name, text=text, source=sources[module.name]))
    for topic in _topics(modules):
        documents.append(replace(topic, source=sources[topic.name]))
    return tuple(documents)


@cache
def _docstrings(module: Document) -> tuple[str, ...]:
    """The docstrings of a module, its classes and functions, in the order of the text, without their indentation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(module.text)
    except (SyntaxError, ValueError):  # templates with the suffix of a module
        return ()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return tuple(text for raw in found if raw is not None and (text := inspect.cleandoc(raw).strip()))


def _topics(modules: Iterable[Document]) -> Iterator[Document]:
    """The entries of ``pydoc_data.topics``: one dictionary of literals."""
    for module in modules:
        if module.name != _TOPICS:
            continue
        for node in ast.walk(ast.parse(module.text)):
            if isinstance(node, ast.Dict):
                for name, text in sorted(ast.literal_eval(node).items()):
                    if text.strip():
                        yield Document(name=f"{_TOPICS}/{name}", text=text.strip() + "\n")


@cache
def _sources(modules: tuple[Document, ...]) -> dict[str, str]:
    """The text by which each module and topic is held out: that of the first one of its group.

    Two are of a group if the words of a docstring (or topic) of the one, ``SHARED_TEXT_CHARACTERS`` long or longer,
    stand in the text of the other, and if both are of a group with a third.
    """
    topics = tuple(_topics(modules))
    texts = {document.name: document.text for document in (*modules, *topics) if document.name != _TOPICS}
    passages: dict[tuple[str, ...], list[tuple[str, list[str]]]] = defaultdict(list)
    for name, passage in [
        *((module.name, text) for module in modules if module.name != _TOPICS for text in _docstrings(module)),
        *((topic.name, topic.text) for topic in topics),
    ]:
        words = _WORD.findall(passage)
        if len(passage) >= SHARED_TEXT_CHARACTERS and len(words) >= _SHINGLE_WORDS:
            passages[tuple(words[:_SHINGLE_WORDS])].append((name, words))
    leader = {name: name for name in texts}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for name, text in texts.items():
        words = _WORD.findall(text)
        shingles = zip(*(words[place:] for place in range(_SHINGLE_WORDS)), strict=False)
        for place, shingle in enumerate(shingles):
            for owner, passage_words in passages.get(shingle, ()):
                if owner != name and words[place : place + len(passage_words)] == passage_words:
                    first, second = sorted((find(owner), find(name)))
                    leader[second] = first
    return {name: texts[find(name)] for name in texts}


def _stdlib_part(name: str, texts: Callable[[tuple[Document, ...]], tuple[Document, ...]]) -> CorpusSource:
    return _StdlibPart(name=name, modules=read_stdlib(), texts=texts)


CORPORA: dict[str, Callable[[], CorpusSource]] = {
    "python_code": partial(_stdlib_part, "python_code", code_documents),
    "python_prose": partial(_stdlib_part, "python_prose", prose_documents),
    "stdlib": read_stdlib,
}
"""The shipped corpora, by their name in ``data.corpus``."""
