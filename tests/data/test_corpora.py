"""Corpora as text: what is read, what is left out, in which order."""

import ast
import os
import re
from pathlib import Path

import pytest

from nld_train.config.schema import DataConfig
from nld_train.data import corpora
from nld_train.data.corpora import (
    SHARED_TEXT_CHARACTERS,
    CorpusText,
    Document,
    code_documents,
    prose_documents,
    read_python_files,
    read_stdlib,
)
from nld_train.data.prepare import prepare
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus
from nld_train.data.tokenizer import load_tokenizer
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


# --- code and prose ---


def _module(name: str, text: str) -> Document:
    return Document(name=name, text=text)


LONG = "Return the number of things that are in the box, or None where there is no box to look into at all."


def test_prose_is_the_docstrings_in_order_without_indentation() -> None:
    text = (
        '"""Module."""\n'
        'class A:\n    """Class.\n\n    Indented:\n      More.\n    """\n    def f(self):\n        "Method."\n'
        '    async def g(self): "Async."\n'
        'def h():\n    """   """\n'
    )
    documents = prose_documents((_module("a.py", text), _module("b.py", "x = 1\n"), _module("c.py", "def broken(:\n")))
    assert [(document.name, document.text) for document in documents] == [
        ("a.py", "Module.\n\nClass.\n\nIndented:\n  More.\n\nMethod.\n\nAsync.\n")
    ]
    assert documents[0].source == text


def test_topics_are_prose_and_not_code() -> None:
    topics = _module("pydoc_data/topics.py", "topics = {'b': 'about b\\n', 'a': 'about a', 'c': ' '}\n")
    module = _module("m.py", '"""M."""\n')
    assert [document.name for document in code_documents((module, topics))] == ["m.py"]
    assert [(document.name, document.text) for document in prose_documents((module, topics))] == [
        ("m.py", "M.\n"),
        ("pydoc_data/topics.py/a", "about a\n"),
        ("pydoc_data/topics.py/b", "about b\n"),
    ]


def test_modules_that_share_a_docstring_are_held_out_together() -> None:
    wrapped = LONG.replace("box, ", "box,\n        ")
    modules = (
        _module("a.py", f'def f():\n    """{LONG}"""\n'),
        _module("b.py", f'class B:\n    def g(self):\n        """{wrapped}\n\n        More of it."""\n'),
        _module("c.py", '"""Return the number of things."""\n'),
        _module("d.py", '"""Return the number of things."""\nx = 1\n'),
        _module("e.py", f"# {LONG}\n"),
        _module("pydoc_data/topics.py", f"topics = {{'t': 'So: {LONG}'}}\n"),
    )
    sources = {document.name: document.source for document in (*code_documents(modules), *prose_documents(modules))}
    first = modules[0].text
    assert sources["a.py"] == sources["b.py"] == sources["e.py"] == sources["pydoc_data/topics.py/t"] == first
    assert (sources["c.py"], sources["d.py"]) == (modules[2].text, modules[3].text)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, PreparedCorpus]]:
    cache_dir = tmp_path_factory.mktemp("cache")
    data = DataConfig(corpus="", cache_dir=str(cache_dir))
    return cache_dir, {name: prepare(name, data, 8192, mask_token_id=3) for name in ("python_prose", "python_code")}


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text))


def test_no_held_out_docstring_is_in_a_training_text(shipped: tuple[Path, dict[str, PreparedCorpus]]) -> None:
    """The real thing, read back from the token files, at the letter and word by word."""
    _, corpora_ = shipped
    tokenizer = load_tokenizer(corpora_["python_code"].tokenizer_folder)

    def texts(name: str, part: str) -> list[str]:
        documents = corpora_[name].documents(part)
        return [tokenizer.decode(documents.get(number)[:-1].tolist()) for number in range(len(documents))]

    train = "\n\n\n".join([*texts("python_code", TRAIN), *texts("python_prose", TRAIN)])
    train_words = _words(train)
    held_out = texts("python_code", VALIDATION)
    docstrings = set()
    for text in held_out:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstrings |= {ast.get_docstring(node, clean=False) or "", ast.get_docstring(node) or ""}
    topics = [text for text in texts("python_prose", VALIDATION) if not any(text[:60] in other for other in docstrings)]
    long = sorted(text for text in [*docstrings, *topics] if len(text.strip()) >= SHARED_TEXT_CHARACTERS)
    print(
        f"{len(held_out)} modules held out, with {len(long)} docstrings and topics of {SHARED_TEXT_CHARACTERS} or more"
    )
    assert len(held_out) > 5
    assert len(long) > 50
    assert not [text for text in long if text.strip() in train]
    assert not [text for text in long if len(text.split()) >= 8 and _words(text) in train_words]
    # What the check looks for is found where it is.
    assert all(text.strip() in "\n\n\n".join([*held_out, *texts("python_prose", VALIDATION)]) for text in topics)


def test_code_and_prose_share_a_tokenizer_whichever_is_first(
    shipped: tuple[Path, dict[str, PreparedCorpus]], tmp_path: Path
) -> None:
    cache_dir, first = shipped
    assert first["python_code"].manifest.tokenizer_hash == first["python_prose"].manifest.tokenizer_hash
    assert len([path for path in cache_dir.iterdir() if path.name.startswith("tokenizer-")]) == 1
    second = prepare("python_code", DataConfig(corpus="", cache_dir=str(tmp_path)), 8192, mask_token_id=3)
    assert second.folder.name == first["python_code"].folder.name
    for name in first["python_code"].manifest.files:
        assert (second.folder / name).read_bytes() == (first["python_code"].folder / name).read_bytes()


def test_cached_corpora_are_found_without_reading_docstrings(
    shipped: tuple[Path, dict[str, PreparedCorpus]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_dir, first = shipped
    monkeypatch.setattr(corpora, "_docstrings", None)
    monkeypatch.setattr(corpora, "_sources", None)
    for name, corpus in first.items():
        assert prepare(name, DataConfig(corpus="", cache_dir=str(cache_dir)), 8192, mask_token_id=3) == corpus
