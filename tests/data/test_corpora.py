"""Corpora as text: what is read, what is left out, in which order."""

import os
from pathlib import Path

import pytest

from nld_train.data import corpora
from nld_train.data.corpora import CorpusText, Document, read_python_files, read_stdlib
from nld_train.errors import DataError


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_python_files_are_read_by_their_coding_and_sorted(tmp_path: Path) -> None:
    _write(tmp_path / "b.py", "# naïve\n".encode())
    _write(tmp_path / "a.py", "# -*- coding: latin-1 -*-\n# naïve\r\n".encode("latin-1"))
    _write(tmp_path / "package" / "c.py", "\ufeffx = 1\n".encode())
    _write(tmp_path / "B.py", b"y = 2\n")
    documents, num_skipped = read_python_files(tmp_path)
    assert {document.name: document.text for document in documents} == {
        "B.py": "y = 2\n",
        "a.py": "# -*- coding: latin-1 -*-\n# naïve\n",
        "b.py": "# naïve\n",
        "package/c.py": "x = 1\n",
    }
    assert [document.name for document in documents] == ["B.py", "a.py", "b.py", "package/c.py"]
    assert num_skipped == 0


def test_tests_and_installed_packages_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path / "json" / "decoder.py", b"pass\n")
    for folder in ("test", "json/tests", "idlelib/idle_test", "lib2to3/tests", "site-packages/x", "dist-packages/y"):
        _write(tmp_path / folder / "z.py", b"pass\n")
    _write(tmp_path / "notes.txt", b"no Python\n")
    documents, num_skipped = read_python_files(tmp_path)
    assert [document.name for document in documents] == ["json/decoder.py"]
    assert num_skipped == 0


@pytest.mark.parametrize(
    "content", [b"", b"# \xff\xfe broken\n", b"# -*- coding: no-such-codec -*-\n", b"# coding: utf-7\n# +2AA-\n"]
)
def test_files_without_text_are_counted(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path / "bad.py", content)
    _write(tmp_path / "good.py", b"pass\n")
    documents, num_skipped = read_python_files(tmp_path)
    assert [document.name for document in documents] == ["good.py"]
    assert num_skipped == 1


def test_content_hash_depends_on_names_texts_and_order() -> None:
    def content_hash(*pairs: tuple[str, str]) -> str:
        documents = tuple(Document(name=name, text=text) for name, text in pairs)
        return CorpusText(name="x", source="", documents=documents, num_skipped=0).content_hash

    hashes = {
        content_hash(("a", "bc"), ("d", "e")),
        content_hash(("ab", "c"), ("d", "e")),
        content_hash(("d", "e"), ("a", "bc")),
        content_hash(("a", "bcd"), ("", "e")),
        content_hash(("a", "bc")),
    }
    assert len(hashes) == 5
    assert content_hash(("a", "bc")) == content_hash(("a", "bc"))


def test_stdlib_is_the_running_interpreters() -> None:
    corpus = read_stdlib()
    names = [document.name for document in corpus.documents]
    assert names == sorted(names)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert next(d.text for d in corpus.documents if d.name == "os.py") == Path(os.__file__).read_text(encoding="utf-8")
    assert sum(len(document.text) for document in corpus.documents) > 5e6
    assert corpus.content_hash == read_stdlib().content_hash


def test_interpreter_without_library_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"data\.corpus: 'stdlib' is empty"):
        read_stdlib()
