"""Decoding statistics: counts, agreement and quality against what the outputs say."""

import itertools
import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from nld_train.errors import DataError
from nld_train.evaluation import modes
from nld_train.evaluation.modes import ALL, measure_ways, standard_ways
from nld_train.evaluation.prompts import CATEGORIES, Prompt, load_prompts
from nld_train.testing.exports import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_rows(make_model, monkeypatch):
    model = make_model(2, std=0.2)
    ticks = itertools.count()
    monkeypatch.setattr(modes.time, "perf_counter", lambda: next(ticks) / 4)  # an output takes a quarter of a second
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(name, "", torch.randint(6, 64, (5,), generator=generator)) for name in ("a", "b", "a")]
    ways = standard_ways(4, (0.2, 0.9))
    assert [way.name for way in ways] == [
        "ar",
        "diffusion, threshold 0.2",
        "diffusion, threshold 0.9",
        "diffusion, 2 steps",
        "diffusion, 1 step",
        "linear",
        "quadratic",
    ]
    done = []
    rows = measure_ways(model, prompts, ways, max_new_tokens=12, on_output=done.append)
    assert len(done) == 3 * 7
    assert [row["category"] for row in rows] == [ALL] * 7 + ["a"] * 7 + ["b"] * 7
    found = {(row["category"], row["way"]): row for row in rows}
    for row in rows:
        assert row["num_prompts"] == {ALL: 3, "a": 2, "b": 1}[row["category"]]
        assert row["num_tokens"] == 12 * row["num_prompts"]
        assert row["tokens_per_forward"] == row["num_tokens"] / row["num_forwards"]
        assert row["tokens_per_second"] == 12 * 4
        settled = sum(int(length) * count for length, count in row["histogram"].items())
        # A speculative mode's first token comes with the prompt, not in a round.
        assert settled == row["num_tokens"] - row["num_prompts"] * (row["mode"] in ("linear", "quadratic"))
        assert row["acceptance"] == pytest.approx(settled / sum(row["histogram"].values()))
        if row["mode"] in ("ar", "linear", "quadratic"):
            assert row["agreement"] == row["equals_ar"] == 1.0
            assert row["ar_nats_per_token"] == pytest.approx(found[row["category"], "ar"]["ar_nats_per_token"])
        else:
            assert row["agreement"] < 1.0
            assert row["ar_nats_per_token"] > found[row["category"], "ar"]["ar_nats_per_token"]
        if row["mode"] == "diffusion":  # of each prompt's forwards, one reads the prompt and two read blocks
            assert sum(row["histogram"].values()) == row["num_forwards"] - 3 * row["num_prompts"]
    for mode, method in (("linear", model.linear_spec_generate), ("quadratic", model.quadratic_spec_generate)):
        assert found["b", mode]["num_forwards"] == method(prompts[1].token_ids[None], 12, 4)[1]
    assert found["b", "linear"]["num_forwards"] != found["b", "quadratic"]["num_forwards"]
    assert found["b", "diffusion, 1 step"]["num_forwards"] == 1 + 3 + 2
    assert found["b", "diffusion, 1 step"]["histogram"] == {"4": 3}
    # Quality and agreement of one output, by hand.
    prompt = prompts[1].token_ids
    output_ids, _ = model.generate(prompt[None], 12, 4, threshold=0.2)
    with torch.no_grad():
        logits = model(output_ids).logits[0]
    logits[:, 5] = -math.inf
    nats = torch.nn.functional.cross_entropy(logits[4:-1], output_ids[0, 5:]).item()
    row = found["b", "diffusion, threshold 0.2"]
    assert row["ar_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    ar_ids, _ = model.ar_generate(prompt[None], 12)
    assert row["agreement"] == (ar_ids == output_ids)[0, 5:].double().mean().item()
    with pytest.raises(ValueError, match="AR must come first"):
        measure_ways(model, prompts, ways[1:], max_new_tokens=4)


def test_agreement(make_model):
    """Diffusion says in part what AR says, and where they stop at different tokens, agreement is of the longer one."""
    model = make_model(3)
    with torch.no_grad():  # an attention that moves little
        for layer in model.encoder.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
        model.encoder.embed_tokens.weight[5] = 0.02
    compared = 0
    for seed in range(12):
        prompt = torch.randint(6, 64, (5,), generator=torch.Generator().manual_seed(seed))
        eos = int(model.ar_generate(prompt[None], 6)[0][0, -1])
        ar_ids = model.ar_generate(prompt[None], 12, eos_token_id=eos)[0][0, 5:].tolist()
        output_ids = model.generate(prompt[None], 12, 4, threshold=0.2, eos_token_id=eos)[0][0, 5:].tolist()
        ways = standard_ways(4, (0.2,))[:2]
        rows = measure_ways(model, [Prompt("a", "", prompt)], ways, max_new_tokens=12, eos_token_id=eos)[:2]
        assert [row["num_tokens"] for row in rows] == [len(ar_ids), len(output_ids)]
        for row in rows:
            assert sum(int(length) * count for length, count in row["histogram"].items()) == row["num_tokens"]
        agreeing = sum(a == b for a, b in zip(ar_ids, output_ids, strict=False))
        assert rows[1]["agreement"] == agreeing / max(len(ar_ids), len(output_ids))
        assert rows[1]["equals_ar"] == (ar_ids == output_ids)
        compared += agreeing > 0 and len(ar_ids) != len(output_ids)
    assert compared


def test_forwards_are_counted_from_outside(make_model, monkeypatch):
    """A method that reports fewer forwards than it makes is found out."""
    model = make_model(2)
    honest = type(model).linear_spec_generate
    monkeypatch.setattr(
        type(model), "linear_spec_generate", lambda *a, **k: (lambda ids, n: (ids, n - 1))(*honest(*a, **k))
    )
    with pytest.raises(AssertionError, match="linear reports"):
        measure_ways(model, [Prompt("a", "", torch.tensor([7, 8]))], standard_ways(4), max_new_tokens=6)


def test_shipped_prompts(tokenizer):
    prompts = load_prompts(tokenizer)
    assert [prompts[i].category for i in range(0, 48, 12)] == list(CATEGORIES)
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 48
    assert load_prompts(tokenizer, limit=1)[3].text.endswith("?\n\n")  # no chat template: the message alone
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}>"
    assert load_prompts(tokenizer, limit=1)[3].text.startswith("<user>")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2.*not JSON"),
        ('{"text": "x"}', "line 2.*neither"),
        ('{"messages": [{"role": "user"}]}', "line 2.*neither"),
        ('{"messages": []}', "line 2.*neither"),
        ('{"messages": [{"role": "clown", "content": "x"}]}', "mine.jsonl: line 2: the chat template.* no clowns"),
        ('{"prompt": ""}', "line 2.*no tokens"),
    ],
)
def test_bad_prompts_are_refused(tokenizer, tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + line + "\n")
    tokenizer.chat_template = "{{ raise_exception('no clowns') }}"
    with pytest.raises(DataError, match=message):
        load_prompts(tokenizer, [path])
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl: cannot be read as UTF-8 text"):
        load_prompts(tokenizer, [path])
    with pytest.raises(DataError, match="is not a file"):
        load_prompts(tokenizer, [tmp_path / "none.jsonl"])
