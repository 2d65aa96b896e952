"""Compiling C++ of the project: once, for all processes, and what is said where it cannot be done."""

import fcntl
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nld_train.platform import native
from nld_train.platform.native import NativeError, native_library
from nld_train.testing.native import needs_native

ANSWER = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of C++, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native_library.cache_clear()
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    return path


@needs_native
def test_a_library_is_compiled_once_and_again_when_its_text_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native_library(source).answer() == 42
    [kept] = (tmp_path / "cache" / "nld_train").glob("*.so")
    before = kept.stat().st_mtime_ns
    native_library.cache_clear()
    assert native_library(source).answer() == 42
    assert kept.stat().st_mtime_ns == before
    native_library.cache_clear()
    source.write_text(ANSWER.replace("42", "43"))
    assert native_library(source).answer() == 43
    assert len([*kept.parent.glob("*.so")]) == 2
    assert [*kept.parent.glob("*.tmp")] == []


@needs_native
def test_processes_that_start_together_compile_once(source: Path, tmp_path: Path) -> None:
    """The compiler is a script that counts its calls and takes its time."""
    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$1" in --version) ;; *) echo call >> {tmp_path}/calls; sleep 1;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(stat.S_IRWXU)
    code = (
        "import sys; from pathlib import Path; from nld_train.platform.native import native_library; "
        "assert native_library(Path(sys.argv[1])).answer() == 42"
    )
    environment = {**os.environ, "CXX": str(compiler)}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(source)], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "calls").read_text().split() == ["call"]


def test_no_compiler_is_said_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(NativeError, match=r"there is no C\+\+ compiler '/nowhere/c\+\+'"):
        native_library(source)


@pytest.mark.parametrize("says", ["Debian clang version 19.1.7 (3+b1)", "Intel(R) oneAPI DPC++/C++ Compiler 2025.0.4"])
def test_a_compiler_for_another_openmp_library_is_not_taken(
    says: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho '{says}'\n")
    compiler.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeError, match=re.escape(f"is {says}, not GCC")):
        native_library(source)


@needs_native
def test_what_the_compiler_says_is_passed_on_and_nothing_is_kept(source: Path, tmp_path: Path) -> None:
    source.write_text("int answer( { }\n")
    with pytest.raises(NativeError, match=r"answer\.cpp.* ended with 1: [\s\S]*error"):
        native_library(source)
    assert [*(tmp_path / "cache" / "nld_train").glob("*.so")] == []
    native_library.cache_clear()
    source.write_text(ANSWER)
    assert native_library(source).answer() == 42


@needs_native
def test_a_library_that_lacks_a_symbol_is_refused_at_once(source: Path) -> None:
    """Not when the function is called: a compiler may ask for an OpenMP library other than torch's."""
    source.write_text('extern "C" { int other(); int answer() { return other(); } }\n')
    with pytest.raises(NativeError, match=r"cannot be loaded: .*other"):
        native_library(source)


@needs_native
def test_a_cache_that_cannot_be_written_is_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    assert native_library(source).answer() == 42
    [folder] = tmp_path.glob("nld_train-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@needs_native
@pytest.mark.parametrize("damage", [b"", b"something else"])
def test_a_damaged_library_is_compiled_again(source: Path, tmp_path: Path, damage: bytes) -> None:
    # A process of its own: one that has loaded a library is given it again, whatever the file has become.
    code = (
        "import sys; from pathlib import Path; from nld_train.platform.native import native_library; "
        "assert native_library(Path(sys.argv[1])).answer() == 42"
    )
    command = [sys.executable, "-c", code, str(source)]
    subprocess.run(command, check=True)
    [kept] = (tmp_path / "cache" / "nld_train").glob("*.so")
    whole = kept.stat().st_size
    kept.write_bytes(damage)
    subprocess.run(command, check=True)
    assert kept.stat().st_size == whole


@needs_native
def test_a_file_system_without_locks_will_do(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert native_library(source).answer() == 42


@needs_native
def test_whatever_the_file_system_says_is_a_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary folder that cannot be made, a lock of somebody else, a user without a home."""
    with monkeypatch.context() as patch:
        (tmp_path / "cache").write_text("a file")
        patch.setattr(native.tempfile, "gettempdir", lambda: "/proc")
        with pytest.raises(NativeError, match=r"answer\.cpp cannot be compiled: .*/proc/nld_train"):
            native_library(source)
    (tmp_path / "cache").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(native, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")), raising=False)
        with pytest.raises(NativeError, match=r"answer\.cpp cannot be compiled: .*no"):
            native_library(source)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    with pytest.raises(NativeError, match="no home directory"):
        native_library(source)


@needs_native
def test_a_temporary_folder_of_somebody_else_is_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    somebody = os.getuid() + 1
    (tmp_path / f"nld_train-{somebody}").mkdir()
    monkeypatch.setattr(native.os, "getuid", lambda: somebody)
    with pytest.raises(NativeError, match="belongs to somebody else"):
        native_library(source)


@needs_native
def test_torch_without_openmp_is_said_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.torch, "__file__", str(source))
    with pytest.raises(NativeError, match="brings no libgomp"):
        native_library(source)


@pytest.mark.parametrize("folder", ["torch/lib", "torch.libs"])
def test_openmp_is_found_where_torch_has_it(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / folder / "libgomp-a49a47f9.so.1.0.0"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(native.torch, "__file__", str(tmp_path / "torch/__init__.py"))
    assert native._openmp_library() == library
