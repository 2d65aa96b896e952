"""Corpora that need no download: real text that is already on every machine."""

import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nld_train.errors import DataError

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text and the name it is known by (for a file: its path below the corpus's root, with forward slashes)."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusText:
    """A corpus as text.

    Args:
        name: as in ``data.corpus``.
        source: where the text comes from, for people and for the manifest.
        documents: in a fixed order; none is empty.
        num_skipped: files left out because they are empty or cannot be decoded.
    """

    name: str
    source: str
    documents: tuple[Document, ...]
    num_skipped: int

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


CORPORA: dict[str, Callable[[], CorpusText]] = {"stdlib": read_stdlib}
"""The shipped corpora, by their name in ``data.corpus``."""
