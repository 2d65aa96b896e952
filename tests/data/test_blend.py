"""Blends: proportions at every prefix, one order however a run is cut, stopped or long, and what is refused."""

import hashlib
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from nld_train.config.blends import exact_weights
from nld_train.config.schema import (
    BlendPart,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    StageConfig,
    TrainConfig,
)
from nld_train.data.blend import (
    Blend,
    BlendOrder,
    BlendStream,
    check_readable_together,
    prepare_blend,
    train_stream,
    validation_samples,
)
from nld_train.data.dataset import TrainStream, validation_position
from nld_train.data.loader import LoaderBatch, TrainLoader
from nld_train.data.prepared import PreparedCorpus
from nld_train.data.progress import PrepareProgress
from nld_train.errors import DataError
from nld_train.objective.noise import Corruption, NoiseSpec
from nld_train.training.data import build_indices, open_data, prepare_blends
from nld_train.training.stages import plan_stages

L = 16
SEED = 5
MASK = 3
EOS = 2
VOCAB_SIZE = 100
NUM_SAMPLES = 10_000  # one epoch of the 0.7 / 0.3 blend
G = 80

WriteCorpus = Callable[..., PreparedCorpus]


def _documents(num_tokens: int, seed: int) -> list[list[int]]:
    """Random documents of 5 to 60 tokens with exactly ``num_tokens`` in all."""
    rng = np.random.default_rng(seed)
    text = rng.integers(5, VOCAB_SIZE, num_tokens)
    ends = np.unique(np.append(np.cumsum(rng.integers(5, 60, num_tokens // 5)), num_tokens))
    ends = ends[ends <= num_tokens]
    text[ends - 1] = EOS
    return [piece.tolist() for piece in np.split(text, ends[:-1])]


@pytest.fixture
def write_two(write_corpus: WriteCorpus) -> tuple[PreparedCorpus, PreparedCorpus]:
    """7,000 and 3,000 training samples of L tokens, 70 and 30 held-out ones."""
    found = [
        write_corpus(
            _documents(count * L + 1, seed=count), validation=_documents(count // 100 * L + 1, seed=1), folder=name
        )
        for name, count in (("code", 7_000), ("prose", 3_000))
    ]
    return found[0], found[1]


def _blend(parts: dict[str, tuple[object, float]], key: str = "data.blend") -> Blend:
    named = {name: BlendPart(corpus=str(corpus), weight=weight) for name, (corpus, weight) in parts.items()}
    return prepare_blend(key, named, DataConfig(corpus=None), VOCAB_SIZE, mask_token_id=MASK)


def _stream(blend: Blend, cache_dir: Path, *, length: int = L, first_position: int = 0) -> TrainStream | BlendStream:
    return train_stream(
        blend,
        sequence_length=length,
        seed=SEED,
        mask_token_id=MASK,
        cache_dir=cache_dir,
        document_mask=True,
        first_position=first_position,
    )


# ---------------------------------------------------------------------------------------------- the order


def test_the_order_of_seven_tenths_and_three_tenths() -> None:
    """round(0.7 * n) of the first n samples are of the first part, each part in its own order."""
    order = BlendOrder([Fraction(7, 10), Fraction(3, 10)])
    assert [order.locate(index)[0] for index in range(20)] == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0] * 2
    assert [order.locate(index)[1] for index in range(10)] == [0, 0, 1, 2, 3, 1, 4, 5, 2, 6]
    assert order.largest_error == 0.5


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [0.7, 0.3],
        [0.999, 0.001],
        [1 / 3, 1 / 3, 1 / 3],
        [0.5, 0.3, 0.2],
        [0.4, 0.3, 0.2, 0.1],
        [5, 2, 2, 1, 1, 3],
    ],
    ids=str,
)
@pytest.mark.parametrize("start", [0, 300_000_000, 10**9])
def test_every_prefix_has_the_proportions(weights: Sequence[float], start: int) -> None:
    """And every part's own samples come in order, each once, from wherever one begins."""
    parts = {str(number): BlendPart(corpus="", weight=weight) for number, weight in enumerate(weights)}
    shares = list(exact_weights(parts).values())
    order = BlendOrder(shares)
    counts = order.counts(start)
    assert sum(counts) == start
    worst = Fraction(0)
    for index in range(start, start + 3_000):
        part, own = order.locate(index)
        assert own == counts[part]
        counts[part] += 1
        assert order.counts(index + 1) == counts
        worst = max(worst, *(abs(count - share * (index + 1)) for count, share in zip(counts, shares, strict=True)))
    assert worst <= order.largest_error
    if len(weights) <= 4:
        assert worst < 1
        assert order.largest_error < 1
    if len(weights) == 2:
        assert worst <= Fraction(1, 2)


@pytest.mark.parametrize("num_parts", [3, 4, 7, 40])
def test_random_blends_keep_their_bound(num_parts: int) -> None:
    """The bound is below 1 up to four parts, and true for many."""
    rng = random.Random(num_parts)
    for _ in range(10):
        numbers = [rng.randint(1, 10 ** rng.randint(1, 4)) for _ in range(num_parts)]
        shares = [Fraction(number, sum(numbers)) for number in numbers]
        order = BlendOrder(shares)
        assert order.largest_error < (1 if num_parts <= 4 else 1.6)
        for total in (rng.randrange(10**9) for _ in range(200)):
            counts = order.counts(total)
            assert sum(counts) == total
            worst = max(abs(count - share * total) for count, share in zip(counts, shares, strict=True))
            assert worst <= order.largest_error


def test_weights_are_exact_and_normalised() -> None:
    def weights(*values: float) -> list[Fraction]:
        return list(exact_weights({str(i): BlendPart(corpus="", weight=v) for i, v in enumerate(values)}).values())

    assert weights(0.7, 0.3) == weights(7, 3) == weights(1.4, 0.6) == [Fraction(7, 10), Fraction(3, 10)]
    assert weights(1e-9) == [1]
    for wrong in ([Fraction(1, 2)], [Fraction(3, 2), Fraction(-1, 2)], [], [Fraction(1), Fraction(0)]):
        with pytest.raises(ValueError, match="must be positive and add up to 1"):
            BlendOrder(wrong)


# ---------------------------------------------------------------------------------------------- samples


def test_a_blend_deals_out_its_corpora(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    code, prose = write_two
    blend = _blend({"code": (code.folder, 0.7), "prose": (prose.folder, 0.3)})
    stream = _stream(blend, tmp_path / "a")
    alone = {}
    for corpus in write_two:
        seed = SEED + int(corpus.part_hash("train")[:8], 16)
        options = {"mask_token_id": MASK, "cache_dir": tmp_path / "b", "document_mask": True}
        alone[corpus.name] = TrainStream(corpus, sequence_length=L, seed=seed % 2**31, **options)  # type: ignore[arg-type]
    names = [entry.name for entry in blend.entries]
    order = BlendOrder([entry.weight for entry in blend.entries])
    for index in [*range(50), *range(24_980, 25_020)]:
        part, own = order.locate(index)
        sample, expected = stream[index], alone[names[part]][own]
        assert sample["tokens"].tolist() == expected["tokens"].tolist()
        assert sample["labels"].tolist() == expected["labels"].tolist()
        assert sample["stream_position"] == index  # the place in the blend: no two samples share their noise
    with pytest.raises(IndexError, match="-1"):
        stream[-1]
    assert _stream(blend, tmp_path / "a", first_position=1 << 60)[7]["stream_position"] == (1 << 60) + 7


def test_a_blend_of_one_is_the_corpus(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    code, _ = write_two
    plain = TrainStream(
        code, sequence_length=L, seed=SEED, mask_token_id=MASK, cache_dir=tmp_path / "index", document_mask=True
    )
    for name in (code.folder, code.folder / "manifest.json", code.folder.parent / "cod*"):
        blend = _blend({"corpus": (name, 0.3)}, key="data")
        later = _stream(blend, tmp_path / "index", first_position=4096)
        for index in (0, 1, 6_999, 7_000, 70_123):
            assert _stream(blend, tmp_path / "index")[index]["tokens"].tolist() == plain[index]["tokens"].tolist()
            assert later[index]["tokens"].tolist() == plain[index]["tokens"].tolist()
            assert later[index]["stream_position"] == 4096 + index


def test_an_index_is_built_ahead(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    """Every epoch of every corpus that the samples touch, and no other."""
    blend = _blend({"code": (write_two[0].folder, 0.5), "prose": (write_two[1].folder, 0.5)})
    stream = _stream(blend, tmp_path)
    stream.build_index(0, 10_000)  # 5,000 each: one epoch of 7,000, two of 3,000
    built = sorted(path.name for path in (tmp_path / "index").iterdir() if not path.name.startswith("."))
    assert len(built) == 3
    [stream[index] for index in range(0, 10_000, 7)]
    assert sorted(path.name for path in (tmp_path / "index").iterdir() if not path.name.startswith(".")) == built


NOISE = NoiseSpec(
    mask_token_id=MASK,
    eps=1e-3,
    seed=11,
    block_size=8,
    sampler="power_count",
    stratify="batch",
    noisy_fraction=0.5,
    global_batch_size=G,
)


def _digests(batch: LoaderBatch) -> list[bytes]:
    """Of each sample: of everything about it that does not depend on its neighbours in the micro-batch."""
    assert batch.corruption is not None
    assert batch.document_starts is not None
    found = []
    for j in range(len(batch.tokens)):
        digest = hashlib.sha256()
        for values in (
            batch.tokens, batch.labels, batch.loss_mask, batch.is_supervised, batch.document_starts,
            batch.stream_positions,
        ):  # fmt: skip
            digest.update(values[j].numpy().tobytes())
        rows = batch.corruption.places[j] >= 0  # padding rows depend on the longest sequence of the micro-batch
        for item in fields(Corruption):
            values = getattr(batch.corruption, item.name)[j]
            digest.update(values[rows].numpy().tobytes() if values.ndim else values.numpy().tobytes())
        found.append(digest.digest())
    return found


def _read(
    stream: TrainStream | BlendStream,
    *,
    first: int = 0,
    num_samples: int = NUM_SAMPLES,
    run_samples: int = NUM_SAMPLES,
    dp: int = 1,
    mbs: int = G // 2,
    workers: int = 0,
) -> list[bytes]:
    """Digests of samples first .. first + num_samples - 1, as all ranks together read them in a run that goes on to
    ``run_samples``."""
    found: dict[int, bytes] = {}
    for rank in range(dp):
        loader = TrainLoader(
            stream,
            micro_batch_size=mbs,
            global_batch_size=G,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            consumed_samples=first,
            num_steps=-(-(run_samples - first) // G),
            noise=NOISE,
            num_workers=workers,
        )
        for batch in loader:
            if int(batch.stream_positions[0]) >= first + num_samples:
                break
            found.update(zip(batch.stream_positions.tolist(), _digests(batch), strict=True))
    return [found[index] for index in range(first, first + num_samples)]


FAST_CUTS = [(1, 4, 2), (2, 1, 4), (4, 4, 0)]
ALL_CUTS = [(dp, mbs, workers) for dp in (1, 2, 4) for mbs in (1, 4) for workers in (0, 2, 4)]


@pytest.fixture
def blend(write_two: tuple[PreparedCorpus, PreparedCorpus]) -> Blend:
    return _blend({"code": (write_two[0].folder, 0.7), "prose": (write_two[1].folder, 0.3)})


def test_the_order_does_not_depend_on_how_a_run_is_cut(blend: Blend, tmp_path: Path) -> None:
    _check_cuts(blend, tmp_path, FAST_CUTS, num_samples=2_000)


@pytest.mark.long
def test_the_first_ten_thousand_samples_are_the_same_for_every_cut(blend: Blend, tmp_path: Path) -> None:
    _check_cuts(blend, tmp_path, ALL_CUTS, num_samples=NUM_SAMPLES)


def _check_cuts(blend: Blend, cache_dir: Path, cuts: list[tuple[int, int, int]], num_samples: int) -> None:
    expected = _read(_stream(blend, cache_dir), num_samples=num_samples)
    assert len(set(expected)) == num_samples
    for dp, mbs, workers in cuts:
        found = _read(_stream(blend, cache_dir), num_samples=num_samples, dp=dp, mbs=mbs, workers=workers)
        assert found == expected, f"{dp} ranks, micro-batches of {mbs}, {workers} workers"


def test_ten_thousand_samples_do_not_depend_on_the_length_of_the_run(blend: Blend, tmp_path: Path) -> None:
    """One epoch and five, each with an index of its own that is built ahead for the whole run; and resumed anywhere."""
    short, long = _stream(blend, tmp_path / "short"), _stream(blend, tmp_path / "long")
    short.build_index(0, NUM_SAMPLES)
    long.build_index(0, 5 * NUM_SAMPLES)
    assert len(list((tmp_path / "short" / "index").glob("[!.]*"))) == 2
    assert len(list((tmp_path / "long" / "index").glob("[!.]*"))) == 10
    expected = _read(short)
    assert _read(long, run_samples=5 * NUM_SAMPLES) == expected
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    for first in random.Random(seed).sample(range(NUM_SAMPLES - 400), 3):
        resumed = _read(_stream(blend, tmp_path / "long"), first=first, num_samples=400, workers=first % 3)
        assert resumed == expected[first : first + 400], f"seed {seed}, resumed at sample {first}"


# ---------------------------------------------------------------------------------------------- what is blended


def test_the_hash_follows_from_the_contents(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    """Not from names, folders, the order of the parts, or the scale of the weights."""
    code, prose = write_two
    blend = _blend({"code": (code.folder, 0.7), "prose": (prose.folder, 0.3)})
    moved = shutil.copytree(prose.folder, tmp_path / "elsewhere" / "zzz")
    same = _blend({"a": (moved / "manifest.json", 3), "b": (code.folder, 7)})
    assert same.content_hash == blend.content_hash
    streams = [_stream(each, tmp_path) for each in (blend, same)]
    for index in range(30):
        assert streams[0][index]["tokens"].tolist() == streams[1][index]["tokens"].tolist()
    others = [
        _blend({"code": (code.folder, 0.6), "prose": (prose.folder, 0.4)}),
        _blend({"code": (code.folder, 0.3), "prose": (prose.folder, 0.7)}),
        _blend({"corpus": (code.folder, 1)}),
        _blend({"corpus": (prose.folder, 1)}),
    ]
    assert len({each.content_hash for each in (blend, *others)}) == 5
    parts = blend.describe()["parts"]
    assert {name: part["weight"] for name, part in parts.items()} == {"code": "7/10", "prose": "3/10"}
    assert parts["code"]["folders"] == [str(code.folder)]


def test_a_pattern_is_one_part_of_several_corpora(write_corpus: WriteCorpus, tmp_path: Path) -> None:
    """Read in proportion to their tokens: one pass over the part is one pass over each."""
    sizes = {"web-0": 50, "web-1": 150, "web-2": 300, "books": 40}
    folders = {name: write_corpus(_documents(n * L + 1, seed=n), folder=name).folder for name, n in sizes.items()}
    blend = _blend({"web": (tmp_path / "web-*", 0.8), "books": (folders["books"], 0.2)})
    by_name = {entry.name: entry for entry in blend.entries}
    assert sorted(corpus.name for corpus in by_name["web"].corpora) == ["web-0", "web-1", "web-2"]
    stream = _stream(blend, tmp_path / "cache")
    texts = [stream[index]["tokens"].numpy().tobytes() for index in range(625)]  # 500 of web, 125 of books
    stream = _stream(_blend({"corpus": (tmp_path / "web-*" / "manifest.json", 1)}, key="data"), tmp_path / "cache")
    alone = [stream[index]["tokens"].numpy().tobytes() for index in range(500)]
    assert len(set(alone)) == 500  # no sample twice, so each corpus was read exactly once
    assert set(alone) <= set(texts)


def test_what_cannot_be_blended_is_refused(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    code, prose = write_two
    (tmp_path / "codex").mkdir()
    cases: list[tuple[dict[str, tuple[object, float]], str]] = [
        ({"a": (code.folder, 1), "b": (tmp_path / "no_*", 1)}, r"b\.corpus: the pattern .* matches nothing"),
        ({"a": (code.folder, 1), "b": (tmp_path / "cod*", 1)}, r"b\.corpus: .* matches .*codex, which is not"),
        ({"a": (tmp_path / "x" / "manifest.json", 1)}, r"data\.blend\.a\.corpus: .*manifest\.json does not exist"),
        ({"a": (tmp_path / "x", 1)}, r"data\.blend\.a\.corpus: .* neither a shipped corpus nor a folder"),
        ({"a": (code.folder, 1), "b": (f"{code.folder}/manifest.json", 1)}, r"a.*part b.* the same training tokens"),
    ]  # fmt: skip
    for parts, message in cases:
        with pytest.raises(DataError, match=message):
            _blend(parts)
    shutil.rmtree(tmp_path / "codex")
    with pytest.raises(DataError, match="the same training tokens"):
        _blend({"a": (tmp_path / "*", 1), "b": (prose.folder, 1)})


def test_tokenizers_must_be_the_same(write_corpus: WriteCorpus) -> None:
    """The vocabulary, the end token, and the files that make ids of text."""
    one, two, smaller = (
        write_corpus(
            [[min(token, vocab_size - 1) for token in document] for document in _documents(100, seed=seed)],
            folder=folder,
            vocab_size=vocab_size,
        )
        for seed, folder, vocab_size in ((0, "one", VOCAB_SIZE), (1, "two", VOCAB_SIZE), (2, "smaller", VOCAB_SIZE - 1))
    )
    check_readable_together([one, two, one])
    with pytest.raises(
        DataError, match=r"was prepared with another tokenizer than .*: vocabulary (99|100) and (99|100)\n"
    ):
        _blend({"a": (one.folder, 1), "b": (smaller.folder, 1)})
    for corpus, text in ((one, "{}"), (two, "{} ")):
        (corpus.folder / "tokenizer").mkdir()
        (corpus.folder / "tokenizer" / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"one.*two") as caught:
        check_readable_together([one, two])
    assert "the files of" in str(caught.value)
    (two.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    check_readable_together([one, two])


def test_one_share_is_held_out_of_all_corpora(write_corpus: WriteCorpus) -> None:
    one, two = (write_corpus(_documents(100, seed=seed), folder=name) for seed, name in enumerate(("one", "two")))
    options = (
        replace(one.manifest, options={"validation_fraction": 0.02}),
        replace(two.manifest, options={"validation_fraction": 0.2}),
    )
    one, two = (replace(corpus, manifest=manifest) for corpus, manifest in zip((one, two), options, strict=True))
    with pytest.raises(
        DataError, match=r"two: holds out 0\.2 of its sources, .*one, which the run reads as well, 0\.02"
    ):
        check_readable_together([one, two])


def test_weights_of_any_size() -> None:
    """Corpora of a pattern are weighted by their tokens: exact fractions with hundreds of digits."""
    rng = random.Random(5)
    weights = [Fraction(rng.randrange(10**11, 10**12), rng.randrange(10**11, 10**12)) for _ in range(40)]
    order = BlendOrder([weight / sum(weights) for weight in weights])
    assert 0 < order.largest_error < 2


# ---------------------------------------------------------------------------------------------- validation


def test_validation_has_the_proportions(blend: Blend, write_two: tuple[PreparedCorpus, PreparedCorpus]) -> None:
    """The first held-out samples of each corpus, in the order of the files."""
    validation = validation_samples(blend, sequence_length=L, num_samples=50, mask_token_id=MASK, document_mask=False)
    assert len(validation) == 50
    found = [validation[index] for index in range(50)]
    assert [sample["stream_position"] for sample in found] == [validation_position(i, 50) for i in range(50)]
    expected = []
    for corpus, count in zip(write_two, (35, 15), strict=True):
        text = corpus.tokens("validation").astype(np.int64)
        expected += [text[index * L : (index + 1) * L].tolist() for index in range(count)]
    assert sorted(sample["tokens"].tolist() for sample in found) == sorted(expected)
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            validation[outside]


def test_too_few_held_out_samples_are_refused(write_two: tuple[PreparedCorpus, PreparedCorpus]) -> None:
    code, prose = write_two  # 70 and 30 held-out samples
    blend = _blend({"code": (code.folder, 0.5), "prose": (prose.folder, 0.5)})
    options = {"sequence_length": L, "mask_token_id": MASK, "document_mask": False}
    with pytest.raises(DataError, match=r"train\.validation_samples: 64 .* of them from corpus .*prose") as caught:
        validation_samples(blend, num_samples=64, **options)  # type: ignore[arg-type]
    most = int(caught.value.problems[0].remedy.split("at most ")[1].split(",")[0])
    assert most in (60, 61)
    assert len(validation_samples(blend, num_samples=most, **options)) == most  # type: ignore[arg-type]
    with pytest.raises(DataError):
        validation_samples(blend, num_samples=most + 1, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- a run


def _run(write_two: tuple[PreparedCorpus, PreparedCorpus], cache_dir: Path) -> Config:
    """10 steps of 100 samples of code alone, 5 of a blend of the stage's own, 10 more of code."""
    code, prose = (BlendPart(corpus=str(corpus.folder), weight=1) for corpus in write_two)

    def stage(num_steps: int, **options: object) -> StageConfig:
        tokens = num_steps * 100 * L
        return StageConfig(diffusion_loss_weight=0.3, tokens=tokens, lr=1e-3, min_lr=0.0, **options)  # type: ignore[arg-type]

    return Config(
        model=ModelConfig(vocab_size=VOCAB_SIZE),
        objective=ObjectiveConfig(mask_token_id=MASK),
        data=DataConfig(corpus=code.corpus, sequence_length=L, cache_dir=str(cache_dir)),
        train=TrainConfig(global_batch_size=100, validation_samples=20),
        stages={"first": stage(10), "own": stage(5, blend={"a": code, "b": prose}), "last": stage(10)},
    )


def test_stages_read_their_blends_and_share_the_runs(
    write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path
) -> None:
    config = _run(write_two, tmp_path)
    blends = prepare_blends(config, is_main=False)
    assert blends.of_stages["first"] is blends.of_stages["last"] is blends.of_run
    assert [entry.name for entry in blends.of_run.entries] == ["corpus"]
    assert {entry.name for entry in blends.of_stages["own"].entries} == {"a", "b"}
    stages = plan_stages(config)
    sources, validation, _ = open_data(config, blends, {}, stages)
    assert sources["first"] is sources["last"]
    assert [stage.consumed_samples(stage.first_step) for stage in stages] == [0, 0, 1000]
    assert sources["own"][3]["stream_position"] == stages[1].first_position + 3 > 2**59
    held_out = write_two[0].tokens("validation").astype(np.int64)  # the run's blend, whatever stages read
    assert validation[1]["tokens"].tolist() == held_out[L : 2 * L].tolist()


def test_the_indices_of_a_run_are_built_ahead(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    config = _run(write_two, tmp_path)
    said: list[str] = []

    class Progress(PrepareProgress):
        def message(self, text: str) -> None:
            said.append(text)

    build_indices(config, Progress())
    built = {path.name for path in (tmp_path / "index").glob("[!.]*")}
    assert len(built) == 3  # of code by itself, and of code and prose in the blend, where their seeds are their own
    assert any("stage last: samples 1,000 to 1,999" in line for line in said)
    stages = plan_stages(config)
    sources, _, _ = open_data(config, prepare_blends(config, is_main=False), {}, stages)
    for stage in stages:
        for step in (stage.first_step, stage.last_step):
            sources[stage.name][stage.consumed_samples(step)]
    assert {path.name for path in (tmp_path / "index").glob("[!.]*")} == built


def test_stages_must_share_the_runs_tokenizer(write_two: tuple[PreparedCorpus, PreparedCorpus], tmp_path: Path) -> None:
    config = _run(write_two, tmp_path)
    config.stages["own"].blend = {"b": config.stages["own"].blend["b"]}
    prepare_blends(config, is_main=False)
    (write_two[1].folder / "tokenizer").mkdir()
    (write_two[1].folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"prose: was prepared with another tokenizer than .*code"):
        prepare_blends(config, is_main=False)
