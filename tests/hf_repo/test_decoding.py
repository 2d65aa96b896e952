"""The three decoding modes against slow references, and what they cost."""

import itertools
import math

import pytest
import torch

from nld_train.checkpoint.hf_repo import modeling_nemotron_labs_diffusion as modeling

MASK, BLOCK = 5, 4
METHODS = ["ar_generate", "generate", "linear_spec_generate"]


def prompt_of(length, seed=0, batch=1):
    return torch.randint(6, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


class Counter:
    """Calls of the decoder stack, seen from outside."""

    def __init__(self, model):
        self.num_calls = 0
        self.handle = model.encoder.register_forward_hook(self)

    def __call__(self, *_):
        self.num_calls += 1


def reference_ar(model, prompt, num_new):
    """No cache: the whole sequence again for each token."""
    tokens = prompt[0].tolist()
    for _ in range(num_new):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[MASK] = -math.inf
        tokens.append(int(logits.argmax()))
    return tokens


def reference_diffusion(model, prompt, num_new, block_length, threshold, eos=None):
    """No cache: [noisy block | clean prefix] under the training mask, one position after the other.

    Returns (tokens, denoising steps, blocks).
    """
    clean = prompt[0].tolist()
    num_prompt, num_end = len(clean), len(clean) + num_new
    num_steps = 0
    while len(clean) < num_end:
        block = [MASK] * block_length
        is_open = [len(clean) + i < num_end for i in range(block_length)]
        while any(is_open):
            num_rows, num_clean = block_length + len(clean), len(clean)
            allowed = torch.zeros(num_rows, num_rows, dtype=torch.bool)
            allowed[:block_length, :] = True
            for query in range(num_clean):
                for key in range(query + 1):
                    allowed[block_length + query, block_length + key] = True
            positions = [num_clean + i for i in range(block_length)] + list(range(num_clean))
            with torch.no_grad():
                rows, positions = torch.tensor([block + clean]), torch.tensor([positions])
                logits = model(rows, attention_mask=allowed[None, None], position_ids=positions).logits[
                    0, :block_length
                ]
            logits[:, MASK] = -math.inf
            confidence, tokens = logits.softmax(-1).max(-1)
            surest = max((i for i in range(block_length) if is_open[i]), key=lambda i: float(confidence[i]))
            for i in range(block_length):
                if is_open[i] and (i == surest or float(confidence[i]) >= threshold):
                    block[i], is_open[i] = int(tokens[i]), False
            num_steps += 1
            num_settled = is_open.index(True) if True in is_open else block_length
            if eos in block[:num_settled]:
                end = len(clean) + block.index(eos) + 1
                return clean + block[: block.index(eos) + 1], num_steps, math.ceil((end - num_prompt) / block_length)
        clean += block[: num_end - len(clean)]
    return clean, num_steps, math.ceil(num_new / block_length)


@pytest.mark.parametrize("seed", range(4))
def test_ar_equals_uncached(make_model, seed):
    model, prompt = make_model(seed), prompt_of(3 + seed, seed)
    counter = Counter(model)
    output_ids, num_forwards = model.ar_generate(prompt, max_new_tokens=30)
    assert num_forwards == counter.num_calls == 30
    assert output_ids.tolist() == [reference_ar(model, prompt, 30)]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("seed", "num_prompt", "num_new", "block_length"), [(0, 1, 8, 4), (1, 7, 22, 4), (2, 5, 11, 8)]
)
def test_diffusion_equals_uncached(make_model, seed, num_prompt, num_new, block_length, threshold):
    model, prompt = make_model(seed), prompt_of(num_prompt, seed)
    expected, num_steps, num_blocks = reference_diffusion(model, prompt, num_new, block_length, threshold)
    counter = Counter(model)
    output_ids, num_forwards = model.generate(
        prompt, max_new_tokens=num_new, block_length=block_length, threshold=threshold
    )
    assert output_ids.tolist() == [expected]
    # One for the prompt, the denoising steps, one for each block but the last.
    assert num_forwards == counter.num_calls == 1 + num_steps + num_blocks - 1
    assert num_forwards <= num_new + num_blocks + 1


@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_linear_equals_ar(make_model, seed, std):
    model = make_model(seed, std)
    for trial, (num_prompt, num_new, block_length) in enumerate(
        [(1, 1, 4), (2, 2, 4), (9, 40, 4), (5, 33, 16), (4, 7, 1), (17, 25, 32)]
    ):
        prompt = prompt_of(num_prompt, 10 * seed + trial)
        expected, _ = model.ar_generate(prompt, max_new_tokens=num_new)
        counter = Counter(model)
        output_ids, num_forwards = model.linear_spec_generate(prompt, max_new_tokens=num_new, block_length=block_length)
        counter.handle.remove()
        assert torch.equal(output_ids, expected)
        assert num_forwards == counter.num_calls <= 2 * num_new


@pytest.fixture
def constant_model(make_model):
    """Says the same everywhere: each draft is right and each position sure of itself."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)  # a uniform hidden state
        model.diffusion_head.weight.zero_()
        model.diffusion_head.weight[9] = 1.0
    return model


@pytest.mark.parametrize("block_length", [None, 4, 8])
def test_agreeing_drafts_and_sure_positions_are_taken_together(constant_model, block_length):
    length = block_length or BLOCK  # the configuration's by default
    prompt = prompt_of(5)
    output_ids, num_forwards = constant_model.linear_spec_generate(prompt, 33, block_length=block_length)
    assert output_ids[0, 5:].tolist() == [9] * 33
    assert num_forwards == 1 + 2 * 32 // length  # one token from the prompt, then rounds of a whole block
    output_ids, num_forwards = constant_model.generate(prompt, 32, block_length=block_length)
    assert output_ids[0, 5:].tolist() == [9] * 32
    assert num_forwards == 2 * 32 // length  # the prompt, then one to denoise and one to read each block but the last


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_mask_token_is_never_produced(make_model, method, temperature):
    model = make_model()
    with torch.no_grad():  # a row of large equal weights wins wherever the hidden state's sum is positive
        model.diffusion_head.weight[MASK] = model.diffusion_head.weight.abs().max() * 10
    tokens = prompt_of(3)
    raw = model(tokens.repeat(1, 30)).logits.argmax(-1)
    assert (raw == MASK).float().mean() > 0.2
    torch.manual_seed(0)
    output_ids, _ = getattr(model, method)(tokens, max_new_tokens=60, temperature=temperature)
    assert output_ids.shape == (1, 63)
    assert not (output_ids == MASK).any()


@pytest.mark.parametrize("method", METHODS)
def test_eos_cuts_the_same_output(make_model, method):
    model, prompt = make_model(3), prompt_of(6, 3)
    full = getattr(model, method)(prompt, max_new_tokens=40)[0][0].tolist()
    for eos in sorted(set(full[6:])):
        end = full.index(eos, 6) + 1
        output_ids, num_forwards = getattr(model, method)(prompt, max_new_tokens=40, eos_token_id=[eos, 0])
        if 0 in full[6:end]:
            end = full.index(0, 6) + 1
        assert output_ids[0].tolist() == full[:end]
        assert num_forwards <= 2 * (end - 6) + BLOCK
    unused = next(i for i in range(6, 64) if i not in full)
    assert getattr(model, method)(prompt, max_new_tokens=40, eos_token_id=unused)[0][0].tolist() == full


@pytest.mark.parametrize("method", ["ar_generate", "generate"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padded_batch_equals_single_runs(make_model, method, implementation):
    model = make_model(1)
    model.set_attn_implementation(implementation)
    prompts = [prompt_of(length, length) for length in (3, 9, 5)]
    batch = torch.cat([torch.nn.functional.pad(p, (9 - p.shape[1], 0), value=7) for p in prompts])
    attention_mask = torch.tensor([[0] * (9 - p.shape[1]) + [1] * p.shape[1] for p in prompts])
    output_ids, num_forwards = getattr(model, method)(batch, max_new_tokens=14, attention_mask=attention_mask)
    singles = [getattr(model, method)(prompt, max_new_tokens=14) for prompt in prompts]
    for row, (single, _) in zip(output_ids, singles, strict=True):
        assert row[9:].tolist() == single[0, -14:].tolist()
    assert num_forwards >= max(forwards for _, forwards in singles)
    # Ended rows are filled up with eos, and the batch ends with its last row.
    eos = int(singles[0][0][0, 3 + 4])
    ends = [single[0, -14:].tolist() for single, _ in singles]
    ends = [row[: row.index(eos) + 1] if eos in row else row for row in ends]
    longest = max(map(len, ends))
    output_ids, _ = getattr(model, method)(batch, max_new_tokens=14, attention_mask=attention_mask, eos_token_id=eos)
    assert output_ids[:, 9:].tolist() == [row + [eos] * (longest - len(row)) for row in ends]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_steps_per_block_bounds_the_forwards(make_model, steps):
    model, prompt = make_model(2), prompt_of(5)
    output_ids, num_forwards = model.generate(prompt, max_new_tokens=24, threshold=1.0, steps_per_block=steps)
    assert output_ids.shape == (1, 29)
    assert num_forwards == 1 + 6 * steps + 5
    if steps == BLOCK:
        assert torch.equal(output_ids, model.generate(prompt, max_new_tokens=24, threshold=1.0)[0])


def test_sampling_follows_the_seed(make_model):
    model, prompt = make_model(), prompt_of(5)
    for method in METHODS:
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(getattr(model, method)(prompt, max_new_tokens=20, temperature=1.0)[0].tolist())
        assert runs[0] == runs[1] != runs[2]


def chi_square_of_linear_sampling(model, num_samples):
    """(statistic, its 1e-4 quantile under AR's own distribution) of 3 sampled tokens."""
    prompt, temperature = torch.tensor([[0, 3, 1]]), 1.2
    ids = [i for i in range(model.config.vocab_size) if i != model.config.mask_token_id]

    def next_probabilities(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[model.config.mask_token_id] = -math.inf
        return (logits / temperature).softmax(-1)

    expected = {}
    for triple in itertools.product(ids, repeat=3):
        chance, tokens = 1.0, prompt[0].tolist()
        for token in triple:
            chance *= float(next_probabilities(tokens)[token])
            tokens.append(token)
        expected[triple] = chance
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-5)
    counts = dict.fromkeys(expected, 0)
    torch.manual_seed(0)
    for _ in range(num_samples):
        output_ids, _ = model.linear_spec_generate(prompt, max_new_tokens=3, block_length=3, temperature=temperature)
        counts[tuple(output_ids[0, 3:].tolist())] += 1
    # Rare outcomes are pooled, so that each cell expects at least 5.
    cells = [(counts[t], num_samples * chance) for t, chance in expected.items() if num_samples * chance >= 5]
    cells.append((num_samples - sum(c for c, _ in cells), num_samples - sum(e for _, e in cells)))
    statistic = sum((count - expectation) ** 2 / expectation for count, expectation in cells)
    freedom = len(cells) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic, quantile


def test_linear_sampling_has_the_distribution_of_ar(make_model, monkeypatch):
    model = make_model(4, std=0.25, vocab_size=5, mask_token_id=4, num_hidden_layers=1)
    statistic, quantile = chi_square_of_linear_sampling(model, 1500)
    assert statistic < quantile
    # The test must be able to fail: keep every draft.
    monkeypatch.setattr(
        modeling, "_speculative_sample", lambda drafts, q, p: (len(drafts), p[len(drafts)].multinomial(1)[0])
    )
    statistic, quantile = chi_square_of_linear_sampling(model, 1500)
    assert statistic > 2 * quantile


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_diffusion_stops_in_the_middle_of_a_block(make_model, threshold):
    """What stands behind an eos token is not denoised any further."""
    model, prompt = make_model(3), prompt_of(6, 3)
    full, _, _ = reference_diffusion(model, prompt, 24, 8, threshold)
    num_saved = 0
    for eos in sorted(set(full[6:])):
        expected, num_steps, num_blocks = reference_diffusion(model, prompt, 24, 8, threshold, eos)
        output_ids, num_forwards = model.generate(prompt, 24, 8, threshold, eos_token_id=eos)
        assert output_ids.tolist() == [expected]
        assert num_forwards == 1 + num_steps + num_blocks - 1
        num_saved += len(expected) - 6 < 8 * num_blocks
    assert num_saved


def test_thinking_budget_inside_agreeing_drafts(constant_model):
    for budget in range(12):
        arguments = {"max_new_tokens": 20, "max_thinking_tokens": budget, "end_think_token_id": 62}
        expected, _ = constant_model.ar_generate(prompt_of(5), **arguments)
        assert expected[0, 5:].tolist() == [9] * budget + [62] + [9] * (19 - budget)
        output_ids, _ = constant_model.linear_spec_generate(prompt_of(5), block_length=8, **arguments)
        assert torch.equal(output_ids, expected)


def test_thinking_budget(make_model):
    model, prompt, end_think = make_model(6), prompt_of(5, 6), 62
    for budget in (0, 1, 4, 6, 9):
        arguments = {"max_new_tokens": 20, "max_thinking_tokens": budget, "end_think_token_id": end_think}
        free = model.ar_generate(prompt, max_new_tokens=20)[0][0, 5:].tolist()
        assert end_think not in free
        output_ids, num_forwards = model.ar_generate(prompt, **arguments)
        new_ids = output_ids[0, 5:].tolist()
        assert num_forwards == 20
        assert new_ids[: budget + 1] == [*free[:budget], end_think]
        linear_ids, num_forwards = model.linear_spec_generate(prompt, **arguments)
        assert torch.equal(linear_ids, output_ids)
        assert num_forwards <= 41
        free = model.generate(prompt, max_new_tokens=20)[0][0, 5:].tolist()
        assert end_think not in free
        place = math.ceil(budget / BLOCK) * BLOCK  # the first block after the budget
        new_ids = model.generate(prompt, **arguments)[0][0, 5:].tolist()
        assert len(new_ids) == 20
        assert new_ids[: place + 1] == [*free[:place], end_think]
    # A sequence that closes its thinking in time is left alone.
    free, _ = model.ar_generate(prompt, max_new_tokens=20)
    kept, _ = model.ar_generate(prompt, max_new_tokens=20, max_thinking_tokens=3, end_think_token_id=int(free[0, 7]))
    assert torch.equal(free, kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": torch.zeros(3, dtype=torch.int64)}, r"prompt_ids: torch.int64 of shape \(3,\)"),
        ({"prompt_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"prompt_ids: .* \(1, 0\)"),
        ({"prompt_ids": torch.zeros(1, 3)}, "prompt_ids: torch.float32"),
        ({"prompt_ids": torch.tensor([[7, 64]])}, "prompt_ids: largest id 64"),
        ({"prompt_ids": torch.tensor([[7, -1]])}, "prompt_ids: smallest id -1"),
        ({"prompt_ids": torch.tensor([[7, MASK]])}, "prompt_ids: holds the mask token 5"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"eos_token_id": 64}, "eos_token_id: 64"),
        ({"eos_token_id": []}, r"eos_token_id: \[\]"),
        ({"max_thinking_tokens": 3}, "end_think_token_id: None"),
        ({"max_thinking_tokens": -1, "end_think_token_id": 3}, "max_thinking_tokens: -1"),
        ({"max_thinking_tokens": 1, "end_think_token_id": 64}, "end_think_token_id: 64"),
    ],
)
def test_arguments_refused_by_all(make_model, method, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_model(), method)(**{"prompt_ids": prompt_of(4), "max_new_tokens": 4, **changes})


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("generate", {"block_length": 0}, "block_length: 0"),
        ("linear_spec_generate", {"block_length": -1}, "block_length: -1"),
        ("generate", {"threshold": 1.1}, "threshold: 1.1"),
        ("generate", {"threshold": math.nan}, "threshold: nan"),
        ("generate", {"steps_per_block": 0}, "steps_per_block: 0"),
        ("linear_spec_generate", {"prompt_ids": prompt_of(4, batch=2)}, "prompt_ids: 2 sequences"),
        ("generate", {"attention_mask": torch.ones(1, 3)}, r"attention_mask: shape \(1, 3\)"),
        ("ar_generate", {"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "attention_mask: padding"),
        ("ar_generate", {"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "attention_mask: padding"),
    ],
)
def test_arguments_refused_by_one(make_model, method, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_model(), method)(**{"prompt_ids": prompt_of(4), "max_new_tokens": 4, **changes})


def test_decoding_restores_the_model(make_model):
    model = make_model().train()
    model.encoder.norm.eval()
    for method in METHODS:
        getattr(model, method)(prompt_of(4), max_new_tokens=5)
        assert model.training
        assert not model.encoder.norm.training
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", METHODS)
def test_bf16(make_model, method):
    model = make_model().to(torch.bfloat16)
    output_ids, num_forwards = getattr(model, method)(prompt_of(4), max_new_tokens=12)
    assert output_ids.shape == (1, 16)
    assert 0 < num_forwards <= 25


def test_adapters_serve_the_draft_only(make_model, tmp_path):
    """As in the published way of use: PeftModel.from_pretrained(model, folder, subfolder=...), base = model.model."""
    peft = pytest.importorskip("peft")
    plain = make_model(7)
    prompt = prompt_of(6)
    expected = {method: getattr(plain, method)(prompt, max_new_tokens=30) for method in METHODS}
    lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["o_proj"], task_type="CAUSAL_LM")
    source = peft.get_peft_model(make_model(7), lora)
    for name, parameter in source.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    source.save_pretrained(tmp_path / "linear_spec_lora")

    wrapped = peft.PeftModel.from_pretrained(make_model(7), tmp_path, subfolder="linear_spec_lora")
    base = wrapped.model
    with torch.no_grad():
        assert not torch.allclose(base(prompt).logits, plain(prompt).logits)  # the adapter does change the model
    states = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    num_adapted = []
    layer = base.encoder.layers[0].self_attn.o_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: num_adapted.append(1))
    for method in ("ar_generate", "generate"):
        output_ids, num_forwards = getattr(base, method)(prompt, max_new_tokens=30)
        assert torch.equal(output_ids, expected[method][0])
        assert num_forwards == expected[method][1]
        assert not num_adapted
    output_ids, num_forwards = base.linear_spec_generate(prompt, max_new_tokens=30)
    assert torch.equal(output_ids, expected["ar_generate"][0])
    # Each round is a draft and a verification, after the prompt; the last round may need no draft.
    assert len(num_adapted) == (num_forwards - 1) // 2
    assert states == {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    assert not layer.disable_adapters
    with pytest.raises(ValueError, match="max_new_tokens"):
        base.ar_generate(prompt, max_new_tokens=0)
    assert not layer.disable_adapters
