"""The diffusion bound against every masked set written out, AR against transformers, and bytes."""

import itertools
import math
import statistics

import pytest
import torch

from nld_train.errors import DataError
from nld_train.evaluation.likelihood import Text, measure_likelihood, sample_bound, tokenize
from nld_train.evaluation.reader import CleanPrefix
from nld_train.testing.exports import write_tokenizer

MASK = 5


def block_losses(model, clean, block, masked):
    """Cross-entropy of the masked tokens of ``block``, by transformers' mask and no cache: [clean prefix, block]."""
    tokens = [MASK if i in masked else int(clean[i]) for i in block]
    rows = torch.cat([clean[: block[0]], torch.tensor(tokens)])
    allowed = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    allowed[block[0] :, block[0] :] = True
    with torch.no_grad():
        logits = model(rows[None], attention_mask=allowed[None, None]).logits[0, block[0] :]
    logits[:, MASK] = -math.inf
    losses = -logits.log_softmax(-1)
    return {i: losses[i - block[0], clean[i]].item() for i in masked}


def enumerated_bound(model, clean, block_size, first=0, num_given=1):
    """For each block: sum over counts k of the mean over all sets of k of (sum of losses) / k."""
    bounds = []
    for start in range(first, len(clean), block_size):
        block = list(range(start, min(start + block_size, len(clean))))
        maskable = [i for i in block if i >= num_given]
        bound = 0.0
        for k in range(1, len(maskable) + 1):
            sets = list(itertools.combinations(maskable, k))
            bound += sum(sum(block_losses(model, clean, block, s).values()) for s in sets) / len(sets) / k
        bounds.append(bound)
    return bounds


@pytest.mark.parametrize(("block_size", "first", "num_given"), [(4, 0, 1), (3, 0, 1), (4, 3, 3), (1, 0, 1)])
def test_the_estimate_is_the_enumerated_bound(make_model, block_size, first, num_given):
    model = make_model(3)
    clean = torch.randint(6, 64, (11,), generator=torch.Generator().manual_seed(1))
    expected = enumerated_bound(model, clean, block_size, first, num_given)
    prefix = CleanPrefix(model)
    prefix.read(clean)
    generator = torch.Generator().manual_seed(0)
    sample = sample_bound(model, prefix, clean, block_size, 64, generator, first=first, num_given=num_given)
    errors = (sample.nats.var(dim=0) / 64).sqrt()
    for estimate, error, exact in zip(sample.nats.mean(dim=0).tolist(), errors.tolist(), expected, strict=True):
        assert abs(estimate - exact) <= 3 * error + 1e-4
        assert error < 0.1 * exact + 1e-9
    total_error = errors.square().sum().sqrt().item()
    assert abs(sample.nats.mean(dim=0).sum().item() - sum(expected)) <= 3 * total_error + 1e-4
    # Each sweep masks each maskable token in every count: 1 + 2 + ... + n tokens of a block of n.
    sizes = [min(start + block_size, 11) - max(start, num_given) for start in range(first, 11, block_size)]
    assert sample.bucket_counts.sum().item() == 64 * sum(n * (n + 1) // 2 for n in sizes)


def test_result(make_model):
    model = make_model(3)
    generator = torch.Generator().manual_seed(2)
    texts = [Text(source, torch.randint(6, 64, (length,), generator=generator), 3 * length) for source, length in
             ((0, 9), (0, 6), (1, 12), (2, 2))]  # fmt: skip
    result = measure_likelihood(model, texts, block_sizes=[4, 2], num_sweeps=8, seed=3)
    nats = 0.0
    for text in texts:
        with torch.no_grad():
            logits = model(text.token_ids[None]).logits[0, :-1]
        logits[:, MASK] = -math.inf
        nats += torch.nn.functional.cross_entropy(logits, text.token_ids[1:], reduction="sum").item()
    num_tokens, num_bytes = 8 + 5 + 11 + 1, 3 * 29
    assert (result["num_sources"], result["num_texts"], result["num_tokens"], result["num_bytes"]) == (3, 4, 25, 87)
    ar = result["ar"]
    assert ar["nats_per_token"] == pytest.approx(nats / num_tokens, rel=1e-5)
    assert ar["bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    assert ar["error_of_estimate"] == 0.0 < ar["error_over_texts"]
    assert [part["block_size"] for part in result["diffusion"]] == [4, 2]
    for part in result["diffusion"]:
        exact = sum(sum(enumerated_bound(model, text.token_ids, part["block_size"])) for text in texts)
        assert abs(part["nats_per_token"] - exact / num_tokens) <= 3 * part["error_of_estimate"]
        assert 0 < part["error_of_estimate"] < 0.1 * part["nats_per_token"]
    assert [bucket["high"] for bucket in result["diffusion"][1]["buckets"]] == [0.5, 1.0]
    for part in (ar, *result["diffusion"]):
        assert part["nats_per_byte"] == pytest.approx(part["nats_per_token"] * num_tokens / num_bytes, rel=1e-12)
        for unit in ("token", "byte"):
            assert part[f"bits_per_{unit}"] == pytest.approx(part[f"nats_per_{unit}"] / math.log(2), rel=1e-12)
    assert result == measure_likelihood(model, texts, block_sizes=[4, 2], num_sweeps=8, seed=3)
    with pytest.raises(ValueError, match="num_sweeps: 1"):
        measure_likelihood(model, texts, block_sizes=[4], num_sweeps=1)


def test_means_and_errors_are_those_of_the_samples(make_model):
    """The same draws, summed up by hand: of three sweeps, each text's blocks of each size in turn."""
    model = make_model(3)
    texts = [
        Text(source, torch.randint(6, 64, (length,), generator=torch.Generator().manual_seed(source)), 2 * length)
        for source, length in enumerate((7, 5))
    ]
    result = measure_likelihood(model, texts, block_sizes=[4, 2], num_sweeps=3, seed=11)
    generator = torch.Generator().manual_seed(11)
    samples = {4: [], 2: []}
    for text in texts:
        prefix = CleanPrefix(model)
        prefix.read(text.token_ids)
        for size in samples:
            samples[size].append(sample_bound(model, prefix, text.token_ids, size, 3, generator))
    for part in result["diffusion"]:
        mean, variance, sums, counts = 0.0, 0.0, [0.0] * 10, [0] * 10
        for sample in samples[part["block_size"]]:
            for estimates in sample.nats.T.tolist():  # of one block, in each sweep
                mean += statistics.mean(estimates)
                variance += statistics.variance(estimates) / 3
            for index in range(10):
                sums[index] += sample.bucket_sums[index].item()
                counts[index] += int(sample.bucket_counts[index])
        assert part["nats_per_token"] == pytest.approx(mean / 10, rel=1e-9)
        assert part["error_of_estimate"] == pytest.approx(math.sqrt(variance) / 10, rel=1e-9)
        found = [(b["low"], b["high"], b["nats_per_masked_token"], b["num_masked"]) for b in part["buckets"]]
        assert found == [
            (index / 10, (index + 1) / 10, pytest.approx(sums[index] / counts[index]), counts[index])
            for index in range(10)
            if counts[index]
        ]


def test_one_sample_by_hand(make_model, monkeypatch):
    """What is masked is seen from outside; sums, counts and buckets follow from it and from losses without a cache."""
    model = make_model(3)
    clean = torch.randint(6, 64, (7,), generator=torch.Generator().manual_seed(4))
    shown = []
    denoise = CleanPrefix.denoise
    monkeypatch.setattr(
        CleanPrefix,
        "denoise",
        lambda self, tokens, *layout: (shown.append(tokens.clone()), denoise(self, tokens, *layout))[1],
    )
    prefix = CleanPrefix(model)
    prefix.read(clean)
    sample = sample_bound(model, prefix, clean, 4, 2, torch.Generator().manual_seed(5))
    # Of the first block one token is given, the second one is cut short: three maskable tokens in both.
    blocks, num_maskable = ([0, 1, 2, 3], [4, 5, 6]), 3
    assert len(shown) == 2 * num_maskable
    nats = [[0.0, 0.0], [0.0, 0.0]]
    bucket_sums, bucket_counts = [0.0] * 10, [0] * 10
    counts_seen = {(sweep, number): [] for sweep in range(2) for number in range(2)}
    for forward, tokens in enumerate(shown):
        for number, block in enumerate(blocks):
            masked = [i for i in block if tokens[i] == MASK]
            losses = sum(block_losses(model, clean, block, masked).values())
            nats[forward // num_maskable][number] += losses / len(masked)
            bucket = {1: 3, 2: 6, 3: 9}[len(masked)]  # shares 1/3, 2/3 and 1
            bucket_sums[bucket] += losses
            bucket_counts[bucket] += len(masked)
            counts_seen[forward // num_maskable, number].append(len(masked))
    assert all(sorted(counts) == [1, 2, 3] for counts in counts_seen.values())
    assert sample.nats == pytest.approx(torch.tensor(nats, dtype=torch.float64), rel=1e-5)
    assert sample.bucket_sums.tolist() == pytest.approx(bucket_sums, rel=1e-5)
    assert sample.bucket_counts.tolist() == bucket_counts == [0, 0, 0, 4, 0, 0, 8, 0, 0, 12]


def test_the_error_over_texts_is_that_of_a_jackknife(make_model):
    model = make_model(3)
    generator = torch.Generator().manual_seed(2)
    texts = [Text(i, torch.randint(6, 64, (30 + i % 5,), generator=generator), 10) for i in range(30)]

    def mean(chosen):
        return measure_likelihood(model, chosen, block_sizes=[])["ar"]["nats_per_token"]

    without = torch.tensor([mean(texts[:i] + texts[i + 1 :]) for i in range(30)], dtype=torch.float64)
    jackknife = math.sqrt(29 / 30 * (without - without.mean()).square().sum().item())
    found = measure_likelihood(model, texts, block_sizes=[])["ar"]["error_over_texts"]
    assert found == pytest.approx(jackknife, rel=0.03)


def test_bytes_and_windows(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = tokenize(tokenizer, ["abcdefghij", "x", "12"], max_length=4)
    assert [(text.source, len(text.token_ids), text.num_bytes) for text in texts] == [
        (0, 4, 3),
        (0, 4, 3),
        (0, 2, 1),
        (2, 2, 1),
    ]
    assert len(tokenize(tokenizer, ["abcdefghij"], 4, max_windows=1)) == 1
    assert tokenize(tokenizer, ["aé漢"], 100)[0].num_bytes == 5
    with pytest.raises(DataError, match="two tokens"):
        tokenize(tokenizer, ["x"], 4)
