"""Files to shards: the same bytes however many processes write them and however often they are killed; bad inputs."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from nld_train.data import prepared
from nld_train.data.dataset import ValidationSet
from nld_train.data.inputs import Format, Piece, PieceReader, ReadOptions, SampleBy, find_inputs, plan_shards
from nld_train.data.prepare_files import PrepareOptions, prepare_files
from nld_train.data.prepared import TRAIN, VALIDATION, PreparedCorpus, open_prepared
from nld_train.data.progress import PrepareProgress
from nld_train.data.shards import TokenWriter
from nld_train.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from nld_train.errors import DataError

ROOT = Path(__file__).parents[2]
EOS = 2

MakeTexts = Callable[..., list[str]]


def make_texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Texts of made-up words with line ends, letters beyond ASCII, special tokens spelled out; some are copies."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(300)]
    vocabulary += ["naïve", "日本", "🙂", "</s>", "<mask>", "\n", "\r", "\u2028", "\x0b"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 2 * words))) for _ in range(count)]
    texts[10::10] = [texts[index - 7] for index in range(10, count, 10)]
    return texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        for number, text in enumerate(texts):
            stream.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "small"
    save_tokenizer(train_tokenizer(make_texts(100), vocab_size=400), folder)
    return folder


@pytest.fixture
def prepare(tokenizer: Path, tmp_path: Path) -> Callable[..., PreparedCorpus]:
    def call(
        *inputs: Path | str,
        out: str = "out",
        format_: Format | None = None,
        shard_bytes: int = 10**9,
        workers: int = 1,
        fraction: float = 0.2,
        tokenizer_: str | None = None,
        name: str = "corpus",
        progress: PrepareProgress | None = None,
        **read: object,
    ) -> PreparedCorpus:
        options = PrepareOptions(
            name=name,
            tokenizer=tokenizer_ or str(tokenizer),
            read=ReadOptions(**read),  # type: ignore[arg-type]
            validation_fraction=fraction,
            shard_bytes=shard_bytes,
        )
        files = find_inputs([str(path) for path in inputs], format_)
        return prepare_files(tmp_path / out, files, options, workers=workers, progress=progress)

    return call


Prepare = Callable[..., PreparedCorpus]


def texts_of(corpus: PreparedCorpus, part: str) -> list[str]:
    """The documents of a part, decoded; asserts that each ends with the end-of-text token and holds no special one."""
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    documents = corpus.documents(part)
    found = []
    for number in range(len(documents)):
        ids = documents.get(number)
        assert ids[-1] == EOS
        assert ids[:-1].min() > 4
        found.append(tokenizer.decode(ids[:-1].tolist()))
    return found


def all_texts(corpus: PreparedCorpus) -> list[str]:
    return sorted([*texts_of(corpus, TRAIN), *texts_of(corpus, VALIDATION)])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the same bytes ---


def test_workers_change_no_byte_and_shards_change_no_text(prepare: Prepare, tmp_path: Path) -> None:
    texts = make_texts(400)
    first, second = write_jsonl(tmp_path / "a.jsonl", texts[:250]), write_jsonl(tmp_path / "b.jsonl", texts[250:])
    one = prepare(first, second, out="one", shard_bytes=20_000, workers=1)
    two = prepare(first, second, out="two", shard_bytes=20_000, workers=2)
    assert bytes_of(one.folder) == bytes_of(two.folder)
    assert len(one.manifest.shards[TRAIN]) > 5
    assert {path.name for path in one.folder.iterdir() if path.name.startswith(".")} == set()
    whole = prepare(first, second, out="whole")
    assert len(whole.manifest.shards[TRAIN]) == 1
    assert texts_of(whole, TRAIN) == texts_of(one, TRAIN)  # shards follow the order of the inputs
    assert texts_of(whole, VALIDATION) == texts_of(one, VALIDATION)
    assert all_texts(one) == sorted(text for text in texts if text)
    assert not set(texts_of(one, TRAIN)) & set(texts_of(one, VALIDATION))
    # Megatron reads every shard, and the corpus as a whole is their documents in order.
    documents, place = one.documents(TRAIN), 0
    for number in range(len(one.manifest.shards[TRAIN])):
        shard = IndexedDataset(str(one.prefix(TRAIN, number)))
        for ids in (shard[index] for index in range(len(shard))):
            assert np.array_equal(documents.get(place), ids)
            assert np.array_equal(documents.get(place, 1, 2), ids[1:3])
            place += 1
    assert place == len(documents)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_every_cut_of_a_file_reads_each_line_once(tmp_path: Path, newline: str) -> None:
    """Shards of every size from one byte on: cuts at, before and behind each line end."""
    from nld_train.data.inputs import PieceReader

    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "ü" * count}, ensure_ascii=False) for count in (1, 0, 5, 2)]
    path.write_bytes((newline.join([lines[0], lines[1], "", lines[2], lines[3]])).encode())
    (file,) = find_inputs([str(path)])
    for shard_bytes in range(1, file.size + 2):
        shards = plan_shards([file], ReadOptions(), shard_bytes)
        found = [
            document.text for shard in shards for piece in shard for document in PieceReader(file, piece, ReadOptions())
        ]
        assert found == ["ü", "", "", "ü" * 5, "üü"]


def _command(out: Path, source: Path, tokenizer: Path, workers: int, shard_mb: float = 0.1) -> list[str]:
    return [
        sys.executable, "scripts/prepare_data.py", "prepare", str(out), "--input", str(source),
        "--tokenizer", str(tokenizer), "--workers", str(workers), "--shard-mb", str(shard_mb), "--name", "corpus",
        "--validation-fraction", "0.1",
    ]  # fmt: skip


def _complete_shards(out: Path) -> int:
    return len(list((out / ".preparing").glob("[0-9]*.json")))


def _kill_and_restart(tmp_path: Path, tokenizer: Path, kills: int, documents: int, seed: int) -> None:
    """Kill it a random moment after it has finished a random number of shards, again and again."""
    rng = random.Random(seed)
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(documents, words=200))
    subprocess.run(_command(tmp_path / "calm", source, tokenizer, 2), cwd=ROOT, check=True, capture_output=True)
    out, seen = tmp_path / "out", []
    while sum(status != 0 for _, _, status in seen) < kills:
        # By what is on the disk and not by the clock: a fast machine is past its shards when a slow one has just begun.
        before = _complete_shards(out)
        enough = before + rng.randint(0, 2) if seen else 1
        delay = rng.uniform(0, 1.5 if enough == before else 0.05)
        process = subprocess.Popen(
            _command(out, source, tokenizer, rng.choice([1, 2, 2])),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None and _complete_shards(out) < enough:
            time.sleep(0.002)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            # The main process alone (its workers see that it is gone), or all at once.
            os.kill(process.pid if rng.random() < 0.5 else -process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode in (0, -signal.SIGKILL), process.stderr and process.stderr.read()
        seen.append((round(delay, 2), _complete_shards(out), process.returncode))
        if process.returncode == 0:
            shutil.rmtree(out)  # it was faster than the kill: from the beginning
    print(f"seed {seed}; (delay, complete shards, status) of each kill: {seen}")
    assert any(complete > 0 for _, complete, _ in seen), "no kill came between two shards"
    subprocess.run(_command(out, source, tokenizer, 2), cwd=ROOT, check=True, capture_output=True)
    assert bytes_of(out) == bytes_of(tmp_path / "calm")


def test_killed_three_times(tmp_path: Path, tokenizer: Path) -> None:
    _kill_and_restart(tmp_path, tokenizer, kills=3, documents=2000, seed=1)


@pytest.mark.long
def test_killed_twenty_times(tmp_path: Path, tokenizer: Path) -> None:
    _kill_and_restart(tmp_path, tokenizer, kills=20, documents=6000, seed=random.SystemRandom().randrange(10**6))


class Stop(PrepareProgress):
    """Interrupts after so many bytes of tokenising."""

    def __init__(self, after: int) -> None:
        self._left, self._is_on = after, False

    def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
        self._is_on = name == "tokenising"

    def advance(self, documents: int, num_bytes: int, tokens: int = 0) -> None:
        self._left -= num_bytes if self._is_on else 0
        if self._left < 0:
            raise KeyboardInterrupt


def test_complete_shards_are_kept_and_damaged_ones_written_again(prepare: Prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(300))
    calm = prepare(source, out="calm", shard_bytes=20_000)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, shard_bytes=20_000, progress=Stop(60_000))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"out: is a corpus whose preparation was interrupted"):
        open_prepared(out)
    kept, damaged = out / "train-00000.bin", out / "train-00001.bin"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(bytes(content))
    (out / ".train-00002.bin.tmp-1-dead").write_bytes(b"rest of a killed process")
    before = kept.stat()
    resumed = prepare(source, shard_bytes=20_000)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert bytes_of(resumed.folder) == bytes_of(calm.folder)


def test_a_first_try_without_a_shard_binds_nobody(prepare: Prepare, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    write_jsonl(source, make_texts(40))
    good = source.read_text(encoding="utf-8")
    source.write_text("{}\n" + good, encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.jsonl: line 1"):
        prepare(source, tokenizer_="train:300", name="other")
    assert (tmp_path / "out" / ".preparing" / "plan.json").is_file()
    source.write_text(good, encoding="utf-8")
    (tmp_path / "out" / "notes.txt").write_text("not a part of the corpus")
    corpus = prepare(source, shard_bytes=20_000)
    assert "notes.txt" not in corpus.manifest.files
    (tmp_path / "out" / "notes.txt").unlink()
    assert bytes_of(corpus.folder) == bytes_of(prepare(source, out="calm", shard_bytes=20_000).folder)


def test_a_plan_that_is_replaced_takes_its_tokenizer_with_it(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(60))
    calm = prepare(source, out="calm")
    with pytest.raises(KeyboardInterrupt):
        prepare(source, progress=Stop(0))
    out = tmp_path / "out"
    assert not list((out / ".preparing").glob("[0-9]*.json"))

    def killed(folder: Path, **_: object) -> None:
        assert folder.name == "tokenizer"
        (folder / "tokenizer_config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, name="other")
    (out / "train-00007.bin").write_bytes(b"of the plan before")
    assert bytes_of(prepare(source).folder) == bytes_of(calm.folder)


def test_other_options_and_changed_inputs_are_refused_by_name(prepare: Prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(200))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, shard_bytes=20_000, progress=Stop(30_000))
    with pytest.raises(DataError, match=r"out: was begun with other options: shard_bytes: 20000, not 30000; valid"):
        prepare(source, shard_bytes=30_000, fraction=0.3)
    with pytest.raises(DataError, match=r"other options: text_field: 'text', not 'id'"):
        prepare(source, shard_bytes=20_000, text_field="id")
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("a", "b", 1), encoding="utf-8")
    with pytest.raises(DataError, match=r"out: was begun from other inputs: x\.jsonl has changed"):
        prepare(source, shard_bytes=20_000)
    source.write_text(text, encoding="utf-8")
    finished = prepare(source, shard_bytes=20_000)
    before = bytes_of(finished.folder)
    assert prepare(source, shard_bytes=20_000) == finished
    extra = write_jsonl(tmp_path / "y.jsonl", make_texts(3))
    with pytest.raises(DataError, match=r"out: was prepared from other inputs: y\.jsonl is new"):
        prepare(source, extra, shard_bytes=20_000)
    with pytest.raises(DataError, match=r"out: was prepared with other options: name: 'corpus', not 'other'"):
        prepare(source, shard_bytes=20_000, name="other")
    assert bytes_of(finished.folder) == before


def test_another_tokenizer_under_the_same_name_is_refused(prepare: Prepare, tmp_path: Path, tokenizer: Path) -> None:
    copy = Path(shutil.copytree(tokenizer, tmp_path / "mine"))
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(50))
    prepare(source, tokenizer_=str(copy))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(DataError, match=r"other options: tokenizer: 'tokenizer\.json [0-9a-f]{64}', not"):
        prepare(source, tokenizer_=str(copy))


def test_two_runs_in_one_folder_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(50))

    class Nested(PrepareProgress):
        def phase(self, name: str, *, total_documents: int, total_bytes: int) -> None:
            if name == "tokenising":
                with pytest.raises(DataError, match=r"out: another process is preparing this folder"):
                    prepare(source)
                self.was_here = True

    nested = Nested()
    prepare(source, progress=nested)
    assert nested.was_here


def test_a_folder_of_something_else_is_left_alone(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"out: is not empty, and no corpus"):
        prepare(write_jsonl(tmp_path / "x.jsonl", make_texts(50)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# --- what is read ---


def test_all_formats_give_the_same_documents(prepare: Prepare, tmp_path: Path) -> None:
    import datasets

    texts = [text for text in make_texts(120) if text.strip()]
    content = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(content))
    table = pa.table({"text": texts, "id": list(range(len(texts)))})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=17)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "e"))
    folder = tmp_path / "f"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    hub = tmp_path / "g"
    hub.mkdir()
    shutil.copy(tmp_path / "d.parquet", hub / "train.parquet")
    expected = prepare(tmp_path / "a.jsonl", out="expected")
    assert all_texts(expected) == sorted(texts)
    for number, (source, format_) in enumerate(
        [
            ("b.jsonl.gz", None), ("c.jsonl.zst", None), ("d.parquet", None), ("e/*.arrow", None), ("f", None),
            ("g", Format.hub),
        ]
    ):  # fmt: skip
        found = prepare(tmp_path / source, format_=format_, out=f"out{number}", shard_bytes=5000)
        assert texts_of(found, VALIDATION) == texts_of(expected, VALIDATION), source
        assert texts_of(found, TRAIN) == texts_of(expected, TRAIN), source
        if source in ("d.parquet", "f"):
            assert len(found.manifest.shards[TRAIN]) > 1, "one file, several shards"


def test_lines_of_text_and_empty_ones(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffone\r\n\n two \nthree".encode() + b"\nfour\n" * 20)
    corpus = prepare(tmp_path / "x.txt", sample_by=SampleBy.line, shard_bytes=30)
    assert set(all_texts(corpus)) == {"one", " two ", "three", "four"}
    assert corpus.manifest.num_skipped == 20
    assert corpus.manifest.parts[TRAIN].documents + corpus.manifest.parts[VALIDATION].documents == 23


def test_source_field_decides_what_is_held_out(prepare: Prepare, tmp_path: Path) -> None:
    """Two corpora taken from the same pages: what is held out of one is held out of the other."""
    texts = make_texts(100)
    for name, cut in (("a.jsonl", slice(0, 20)), ("b.jsonl", slice(20, 40))):
        lines = [json.dumps({"text": f"{index} {text[cut]}", "page": text}) for index, text in enumerate(texts)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    one, other = (prepare(tmp_path / f"{name}.jsonl", out=name, source_field="page") for name in "ab")
    held_out = [{text.split()[0] for text in texts_of(corpus, VALIDATION)} for corpus in (one, other)]
    assert held_out[0] == held_out[1] != set()
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: has no field 'url'; it has 'text', 'page'"):
        prepare(tmp_path / "a.jsonl", out="c", source_field="url")


def test_tokenizer_trained_on_the_text(prepare: Prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", make_texts(200))
    one = prepare(source, out="one", tokenizer_="train:350", shard_bytes=9000, workers=2)
    assert (one.vocab_size, one.manifest.dtype) == (350, "uint16")
    assert bytes_of(prepare(source, out="two", tokenizer_="train:350", shard_bytes=9000).folder) == bytes_of(one.folder)


# --- what is refused ---


def good_lines(count: int = 30) -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in make_texts(count)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "a", "n": 1}', r"x\.jsonl: line 18: has no field 'text'; it has 'txt', 'n'"),
        (b'{"text": null}', r"x\.jsonl: line 18: the field 'text' is null, not text"),
        (b'{"text": 7}', r"x\.jsonl: line 18: the field 'text' is a number, not text"),
        (b'["text"]', r"x\.jsonl: line 18: is a list, not an object"),
        (b'{"text": "a"', r"x\.jsonl: line 18: is not JSON: "),
        (b'{"text": "\\ud83d"}', r"x\.jsonl: line 18: character 0 of the text, '\\ud83d', is half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize(("suffix", "workers"), [("", 1), ("", 2), (".gz", 1), (".zst", 1)])
def test_a_bad_line_is_named(
    prepare: Prepare, tmp_path: Path, line: bytes, message: str, suffix: str, workers: int
) -> None:
    if workers == 2 and line[:6] != b'{"txt"':
        pytest.skip("once is enough: processes take a second")
    lines = good_lines()
    lines[17] = line
    write = {"": lambda content: content, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(write(b"\n".join(lines) + b"\n"))
    with pytest.raises(DataError, match=message.replace(r"jsonl:", rf"jsonl{suffix}:".replace(".", r"\."))):
        prepare(path, shard_bytes=2000, workers=workers)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_utf8_is_named_with_its_offset(prepare: Prepare, tmp_path: Path, suffix: str) -> None:
    lines = good_lines()
    lines[20] = b'{"text": "caf\xe9 au lait"}'
    content = b"\n".join(lines)
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    offset = content.index(b"\xe9")
    of = "decompressed text" if suffix else "file"
    with pytest.raises(DataError, match=rf"line 21: is not UTF-8: byte 0xe9 at offset {offset} of the {of}"):
        prepare(path, shard_bytes=300)
    text = tmp_path / "y.txt"
    text.write_bytes(b"one\ntwo\n\xff three\n")
    with pytest.raises(DataError, match=r"y\.txt: line 3: is not UTF-8: byte 0xff at offset 8 of the file"):
        prepare(text, out="text")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [1, 5, 300])
def test_compressed_file_cut_short_is_named(prepare: Prepare, tmp_path: Path, suffix: str, cut: int) -> None:
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    content = compress(b"\n".join(good_lines(200)))
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(content[:-cut])
    with pytest.raises(DataError, match=rf"x\.jsonl\{suffix}: is cut short: .* \(offset {len(content) - cut}, after"):
        prepare(path)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=rf"x\.jsonl\{suffix}: "):
        prepare(path, out="damaged")


def test_columns_and_rows_are_named(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts: list[str | None] = ["good"] * 50
    texts[33] = None
    pq.write_table(pa.table({"text": texts, "n": list(range(50))}), path, row_group_size=10)
    with pytest.raises(DataError, match=r"x\.parquet: has no column 'body'; it has text, n"):
        prepare(path, text_field="body")
    with pytest.raises(DataError, match=r"x\.parquet: row 33: the field 'text' is null, not text"):
        prepare(path, out="null", shard_bytes=1)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"x\.parquet: is no Parquet file"):
        prepare(path, out="cut")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
def test_empty_corpus_is_named(prepare: Prepare, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"out: corpus corpus is empty: no input holds any text"):
        prepare(tmp_path / "x.jsonl")


def test_part_without_documents_is_named(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", ["only one"])
    with pytest.raises(DataError, match=r"data\.validation_fraction: 0\.2 leaves [01] documents .* and [01] for"):
        prepare(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.jsonl", "neither a file, a folder, a pattern nor"),
        ("*.jsonl", "matches no file"),
        (".", "a folder without input files"),
        ("x.doc", "unknown suffix"),
    ],
)
def test_inputs_that_mean_nothing_are_named(tmp_path: Path, name: str, message: str) -> None:
    if name == "x.doc":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        find_inputs([str(tmp_path / name)])


def test_an_input_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(DataError, match=r"x\.jsonl: is given twice"):
        find_inputs([str(path), str(tmp_path)])


@pytest.mark.parametrize(("token", "shown"), [(400, "400"), (-1, "-1"), (70_000, "70000")])
def test_id_outside_the_vocabulary_is_never_written(tmp_path: Path, token: int, shown: str) -> None:
    with (
        pytest.raises(DataError, match=rf"page 7: token 1 of the document is {shown}, the vocabulary has 400 entries"),
        TokenWriter(tmp_path / "x", 400) as writer,
    ):
        writer.add(np.array([5, token, EOS]), "page 7")
    assert list(tmp_path.iterdir()) == []


# --- many shards ---


def test_many_shards_open_quickly_and_are_checked_when_read(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nld_train.data.prepared._EAGER_SHARDS", 3)
    monkeypatch.setattr("nld_train.data.prepared._MAX_OPEN_SHARDS", 2)
    corpus = prepare(write_jsonl(tmp_path / "x.jsonl", make_texts(200)), shard_bytes=9000)
    folder = corpus.folder
    documents = corpus.documents(TRAIN)
    everything = [documents.get(number).tolist() for number in range(len(documents))]
    order = random.Random(0).sample(range(len(documents)), len(documents))
    assert [documents.get(number).tolist() for number in order] == [everything[number] for number in order]
    again = corpus.documents(TRAIN)  # the bound is one for all that a process reads
    assert [again.get(number).tolist() for number in order] == [everything[number] for number in order]
    assert len(prepared._opened) == 2
    # Another shard's index, padded to the size that the manifest lists, is met when its shard is read.
    one, other = folder / "train-00002.idx", folder / "train-00003.idx"
    content = bytearray(one.read_bytes())
    lengths = np.frombuffer(content, dtype=np.int32, offset=34, count=2)
    assert lengths[0] != lengths[1]
    content[34:42] = content[38:42] + content[34:38]
    one.write_bytes(bytes(content))
    reopened = open_prepared(folder)
    first = sum(shard.documents for shard in corpus.manifest.shards[TRAIN][:2])
    assert reopened.documents(TRAIN).get(0).tolist() == everything[0]
    with pytest.raises(DataError, match=r"train-00002\.idx: is the index of another file: its document 0 has"):
        reopened.documents(TRAIN).get(first)
    other.unlink()
    with pytest.raises(DataError, match=r"train-00003\.idx: is missing"):
        open_prepared(folder)


def test_a_changed_byte_is_never_read(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nld_train.data.prepared._EAGER_SHARDS", 0)  # nothing is hashed on opening
    monkeypatch.setattr("nld_train.data.prepared._HASH_LIMIT", 0)
    corpus = prepare(write_jsonl(tmp_path / "x.jsonl", make_texts(300, words=100)), shard_bytes=60_000)
    path = corpus.folder / "train-00001.bin"
    whole = path.read_bytes()
    lengths = corpus.documents(TRAIN).sequence_lengths
    first = corpus.manifest.shards[TRAIN][0].documents
    ends = np.cumsum(lengths[first : first + corpus.manifest.shards[TRAIN][1].documents]) * 2
    assert ends[-1] == len(whole) > 3 * 4096
    for place in (0, 4095, 4096, 9000, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        documents = open_prepared(corpus.folder).documents(TRAIN)
        block = place // 4096 * 4096
        refused = []
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            with contextlib.suppress(DataError):
                documents.get(first + number)
                continue
            refused.append((begin, end))
            with pytest.raises(DataError, match=rf"train-00001\.bin: has changed .* 4096 bytes from offset {block} "):
                documents.get(first + number)
        # All documents that have bytes in the block, and no others.
        assert refused == [(b, e) for b, e in zip([0, *ends], ends, strict=False) if b < block + 4096 and e > block]
        assert documents.get(0).size == lengths[0]
    # A file that is cut at the end of a page after it was opened, and mapped again: what is left of it is right.
    path.write_bytes(whole)
    documents = open_prepared(corpus.folder).documents(TRAIN)
    cut = next(number for number, end in enumerate(ends) if end > 2 * 4096)
    documents.get(first + cut)
    prepared._opened.clear()
    path.write_bytes(whole[: 2 * 4096])
    with pytest.raises(DataError, match=r"train-00001\.bin: has changed .* from offset 8192 "):
        documents.get(first + cut)
    path.write_bytes(whole)
    held = corpus.folder / "validation.bin"
    held_tokens = held.read_bytes()
    held.write_bytes(held_tokens[:300] + bytes([held_tokens[300] ^ 1]) + held_tokens[301:])
    with pytest.raises(DataError, match=r"validation\.bin: has changed .* from offset 0 "):
        ValidationSet(open_prepared(corpus.folder), sequence_length=64, num_samples=4, mask_token_id=3)[2]
    held.write_bytes(held_tokens)
    checksums = np.load(corpus.folder / "train.crc32.npy")
    np.save(corpus.folder / "train.crc32.npy", checksums.view(np.int32))
    with pytest.raises(DataError, match=r"train\.crc32\.npy: holds int32 .*, not uint32"):
        open_prepared(corpus.folder)
    np.save(corpus.folder / "train.crc32.npy", checksums)
    documents = open_prepared(corpus.folder).documents(TRAIN)
    assert sum(documents.get(number).size for number in range(len(documents))) == lengths.sum()
    starts = np.load(corpus.folder / "train.starts.npy")
    starts[first + 1] += 1
    np.save(corpus.folder / "train.starts.npy", starts)
    with pytest.raises(DataError, match=r"train\.starts\.npy: does not agree with train\.lengths\.npy in documents"):
        open_prepared(corpus.folder).documents(TRAIN).get(first)


def _peak_anonymous(command: list[str]) -> float:
    """Largest sum, in MB, of the anonymous memory of a command and its workers, looked at every 50 ms."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        total = 0
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{one.pid}/status").read_text()
                total += int((re.search(r"RssAnon:\s+(\d+)", status) or [0, 0])[1])
        peak = max(peak, total)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak / 1000


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_is_flat(tmp_path: Path, tokenizer: Path, workers: int) -> None:
    """Five times the text, and a shard that is not cut, in the same memory."""
    small = write_jsonl(tmp_path / "small.jsonl", make_texts(10_000, words=100))
    large = tmp_path / "large.jsonl"
    large.write_bytes(small.read_bytes() * 5)
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress(large.read_bytes(), 1))
    peaks = [
        _peak_anonymous(_command(tmp_path / path.name.replace(".", "_"), path, tokenizer, workers, 5))
        for path in (small, large, tmp_path / "large.jsonl.gz")
    ]
    print(f"{workers} workers: {small.stat().st_size / 1e6:.0f} MB, five times that, the same in one shard: {peaks} MB")
    assert max(peaks[1:]) < peaks[0] + 25


# --- what changes behind the back, and what a killed run leaves ---


def test_an_input_that_changed_since_it_was_found_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    """It was hashed as another file: the manifest would speak of a text that is not in the corpus."""
    path = write_jsonl(tmp_path / "x.jsonl", make_texts(50))
    options = PrepareOptions(
        name="x",
        tokenizer=str(prepare(path, out="first").tokenizer_folder),
        read=ReadOptions(),
        validation_fraction=0.2,
    )
    files = find_inputs([str(path)])
    write_jsonl(path, make_texts(50, seed=1))
    with pytest.raises(DataError, match=r"x\.jsonl: was changed while it was prepared"):
        prepare_files(tmp_path / "second", files, options)
    reader = PieceReader(files[0], Piece(file=0, start=0, end=files[0].size, size=files[0].size), ReadOptions())
    with pytest.raises(DataError, match="was changed"):
        list(reader)


def _hub_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "train.parquet")
    return folder


def test_names_on_the_hub_have_one_order_and_are_given_once(prepare: Prepare, tmp_path: Path) -> None:
    a, b = (_hub_folder(tmp_path / name, make_texts(30, seed=seed)) for seed, name in enumerate("ab"))
    one = prepare(a, b, out="one", format_=Format.hub)
    two = prepare(b, a, out="two", format_=Format.hub)
    assert bytes_of(one.folder) == bytes_of(two.folder)
    with pytest.raises(DataError, match="a: is the name of two inputs"):
        prepare(a, a, out="three", format_=Format.hub)
    with pytest.raises(DataError, match="a: is the name of two inputs"):
        prepare(a, _hub_folder(tmp_path / "more" / "a", make_texts(3)), out="three", format_=Format.hub)


def test_a_tokenizer_that_was_being_made_is_cleared_away(prepare: Prepare, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_texts(50))
    left = tmp_path / "out" / ".tokenizer.tmp-elsewhere-123-abc"
    (left / "made").mkdir(parents=True)
    (tmp_path / "out" / ".preparing").mkdir()
    corpus = prepare(path)
    assert not left.exists()
    assert all_texts(corpus) == sorted(filter(None, make_texts(50)))


def test_an_end_token_that_is_missing_can_be_given(prepare: Prepare, tmp_path: Path, tokenizer: Path) -> None:
    """The first try must not keep a copy of the broken tokenizer."""
    path, copy = write_jsonl(tmp_path / "x.jsonl", make_texts(50)), tmp_path / "copy"
    shutil.copytree(tokenizer, copy)
    whole = (copy / "tokenizer_config.json").read_text()
    broken = json.loads(whole)
    del broken["eos_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(broken))
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match="has no end-of-text token"):
        prepare(path, tokenizer_=str(copy))
    (copy / "tokenizer_config.json").write_text(whole)
    assert all_texts(prepare(path, tokenizer_=str(copy)))


def test_an_end_token_that_text_could_spell_is_refused(prepare: Prepare, tmp_path: Path, tokenizer: Path) -> None:
    path, copy = write_jsonl(tmp_path / "x.jsonl", make_texts(50)), tmp_path / "copy"
    shutil.copytree(tokenizer, copy)
    raw = json.loads((copy / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = token["content"] != "</s>"
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="'</s>', which is none of its special tokens"):
        prepare(path, tokenizer_=str(copy))


def test_odd_but_valid_and_odd_and_invalid_files(prepare: Prepare, tmp_path: Path) -> None:
    parquet = tmp_path / "x.parquet"
    schema = pa.schema([("text", pa.string())])
    texts = make_texts(60)
    with pq.ParquetWriter(parquet, schema) as writer:
        for some in (texts[:30], [], texts[30:]):
            writer.write_table(pa.table({"text": some}, schema=schema))
    assert pq.ParquetFile(parquet).num_row_groups == 3
    assert all_texts(prepare(parquet, out="parquet")) == sorted(filter(None, texts))
    (tmp_path / "x.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: is cut short"):
        prepare(tmp_path / "x.jsonl.gz", out="empty")
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=r"deep\.jsonl: line 2: is not JSON"):
        prepare(deep, out="deep")
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"half\.jsonl: line 2: character 0 of the text"):
        prepare(half, out="half", tokenizer_="train:300")


def test_hidden_folders_are_left_out_at_any_depth(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".git/deep/b.jsonl", "deep/c.jsonl", ".d.jsonl"):
        (tmp_path / ".in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".in" / name).write_text("{}")
    assert [file.name for file in find_inputs([str(tmp_path / ".in")])] == ["a.jsonl", "deep/c.jsonl"]
