"""The four decoding modes against slow references, and what they cost."""

import itertools
import math

import pytest
import torch
from transformers import Ministral3ForCausalLM
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nld_train.checkpoint.hf_repo import modeling_nemotron_labs_diffusion as modeling

MASK, BLOCK = 5, 4
SPECULATION = ["linear_spec_generate", "quadratic_spec_generate"]
METHODS = ["ar_generate", "generate", *SPECULATION]


def prompt_of(length, seed=0, batch=1):
    return torch.randint(6, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def reference_of(model):
    """transformers' own causal model with the same weights."""
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    reference = Ministral3ForCausalLM(Ministral3ForCausalLM.config_class(**fields)).eval()
    reference.model.load_state_dict(model.encoder.state_dict())
    reference.lm_head.load_state_dict(model.diffusion_head.state_dict())
    return reference


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


def reference_quadratic(model, prompt, num_new, block_length, diffusion_weight=0.0):
    """No cache, and each speculative token's masks in a sequence of their own: (tokens, forwards that were needed)."""

    def draft(tokens):
        """Logits of ``block_length`` masks behind ``tokens``."""
        num_clean, num_rows = len(tokens), len(tokens) + block_length
        allowed = torch.ones(num_rows, num_rows, dtype=torch.bool).tril()
        allowed[num_clean:, num_clean:] = True
        with torch.no_grad():
            logits = model(torch.tensor([tokens + [MASK] * block_length]), attention_mask=allowed[None, None]).logits[0]
        logits[:, MASK] = -math.inf
        return logits[num_clean:]

    def verify(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        logits[MASK] = -math.inf
        if diffusion_weight:
            both = (1 - diffusion_weight) * logits.log_softmax(-1)
            logits = both + diffusion_weight * draft(tokens)[0].log_softmax(-1)
        return int(logits.argmax())

    tokens, num_forwards, drafts = prompt[0].tolist(), 0, []
    num_end = len(tokens) + num_new
    while len(tokens) < num_end:
        num_forwards += 1
        tokens.append(verify(tokens))
        while drafts and len(tokens) < num_end and drafts[0] == tokens[-1]:
            drafts.pop(0)
            tokens.append(verify(tokens))
        drafts = draft(tokens[:-1])[1:].argmax(-1).tolist()
    return tokens, num_forwards


@pytest.mark.parametrize("diffusion_weight", [0.0, 0.6])
@pytest.mark.parametrize(
    ("seed", "num_prompt", "num_new", "block_length"), [(0, 1, 9, 4), (1, 7, 22, 4), (2, 5, 13, 8), (3, 4, 5, 1)]
)
def test_quadratic_equals_uncached(make_model, seed, num_prompt, num_new, block_length, diffusion_weight):
    model, prompt = make_model(seed), prompt_of(num_prompt, seed)
    expected, num_expected = reference_quadratic(model, prompt, num_new, block_length, diffusion_weight)
    counter = Counter(model)
    output_ids, num_forwards = model.quadratic_spec_generate(
        prompt, num_new, block_length, diffusion_weight=diffusion_weight
    )
    assert output_ids.tolist() == [expected]
    assert num_forwards == counter.num_calls == num_expected
    if diffusion_weight and block_length > 1:
        assert expected != reference_ar(model, prompt, num_new)  # the ensemble does have a say


@pytest.fixture
def half_agreeing_model(make_model):
    """Drafts and AR agree often, not always: an attention that moves little."""
    model = make_model(3)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
        model.encoder.embed_tokens.weight[MASK] = 0.02
    return model


@pytest.mark.parametrize("block_length", [2, 4, 8])
def test_quadratic_takes_what_the_reference_takes(half_agreeing_model, block_length):
    model = half_agreeing_model
    accepted = set()
    for seed in range(8):
        prompt = prompt_of(4, seed)
        expected, num_expected = reference_quadratic(model, prompt, 30, block_length)
        counts = []
        output_ids, num_forwards = model.quadratic_spec_generate(
            prompt, 30, block_length, on_update=lambda new_ids, _, counts=counts: counts.append(new_ids.shape[1])
        )
        assert (output_ids.tolist(), num_forwards) == ([expected], num_expected)
        accepted |= {after - before for before, after in itertools.pairwise(counts)}
    assert {1, 2} <= accepted


@pytest.mark.parametrize("method", SPECULATION)
@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("seed", range(10))
def test_speculation_equals_ar(make_model, method, seed, std):
    """240 prompts in all; with a repetition penalty half of the time."""
    model = make_model(seed, std)
    penalty = 1.0 + 0.3 * (seed % 2)
    for trial, (num_prompt, num_new, block_length) in enumerate(
        [(1, 1, 4), (2, 2, 4), (9, 40, 4), (5, 33, 16), (4, 7, 1), (17, 25, 32)]
    ):
        prompt = prompt_of(num_prompt, 10 * seed + trial)
        expected, _ = model.ar_generate(prompt, num_new, repetition_penalty=penalty)
        counter = Counter(model)
        output_ids, num_forwards = getattr(model, method)(prompt, num_new, block_length, repetition_penalty=penalty)
        counter.handle.remove()
        assert torch.equal(output_ids, expected)
        assert num_forwards == counter.num_calls <= (2 if method == "linear_spec_generate" else 1) * num_new


@pytest.mark.long
def test_speculation_equals_ar_on_200_distinct_prompts(half_agreeing_model):
    """fp32, one model, of whose drafts some are right; forwards are counted from outside."""
    model, counter = half_agreeing_model, Counter(half_agreeing_model)
    prompts = [prompt_of(2 + i % 12, 1000 + i) for i in range(200)]
    assert len({tuple(prompt[0].tolist()) for prompt in prompts}) == 200
    assert model.dtype == torch.float32
    total = dict.fromkeys(SPECULATION, 0)
    for prompt in prompts:
        expected, _ = model.ar_generate(prompt, 12)
        for method in SPECULATION:
            counter.num_calls = 0
            output_ids, num_forwards = getattr(model, method)(prompt, 12)
            assert torch.equal(output_ids, expected)
            assert num_forwards == counter.num_calls
            total[method] += num_forwards
    print(f"forwards for {200 * 12} tokens: {total}")
    # Without a single draft kept it would be 2 N - 1 and N for each prompt.
    assert total["linear_spec_generate"] < 200 * 23
    assert total["quadratic_spec_generate"] < 200 * 12


class Uncached(modeling._Session):
    """Compares every evaluation with one of the whole sequence, without a cache, row by row what each may see."""

    num_compared = 0

    def __init__(self, model, attention_mask):
        super().__init__(model, attention_mask)
        self._read = None  # the tokens in the cache, int64 [B, K]

    def _compare(self, actual, extra, last_seen, owners, places):
        """``extra`` int64 [B, E] rows, of which row r sees the tokens up to place ``last_seen[r]`` and the rows with
        its owner (-1: itself alone)."""
        batch, num_read = len(extra), 0 if self._read is None else self._read.shape[1]
        rows = extra if self._read is None else torch.cat([self._read, extra], dim=1)
        padding = (
            torch.zeros(batch, dtype=torch.int64) if isinstance(self._num_padding, int) else self._num_padding[:, 0]
        )
        allowed = torch.zeros(batch, 1, rows.shape[1], rows.shape[1], dtype=torch.bool)
        for b in range(batch):
            for q in range(rows.shape[1]):
                r = q - num_read
                for k in range(rows.shape[1]):
                    if k < padding[b] and k != q:
                        continue
                    if r < 0 or (owners[r] == -1 and k < num_read):
                        allowed[b, 0, q, k] = k <= q
                    elif k < num_read:
                        allowed[b, 0, q, k] = True
                    elif owners[k - num_read] == -1:
                        allowed[b, 0, q, k] = places[k - num_read] <= last_seen[r]
                    else:
                        allowed[b, 0, q, k] = owners[k - num_read] == owners[r]
        positions = torch.cat([torch.arange(num_read), torch.tensor(places)])[None] - padding[:, None]
        expected = self.model(rows, attention_mask=allowed, position_ids=positions.clamp_min(0)).logits
        expected = expected[:, -actual.shape[1] :] if actual.shape[1] else expected[:, :0]
        is_answer = torch.arange(expected.shape[-1]) != MASK
        torch.testing.assert_close(actual[..., is_answer], expected[..., is_answer], rtol=1e-4, atol=1e-4)
        Uncached.num_compared += actual.numel()

    def _num_read(self):
        return 0 if self._read is None else self._read.shape[1]

    def causal(self, tokens, num_logits):
        actual = super().causal(tokens, num_logits)
        places = [self._num_read() + i for i in range(tokens.shape[1])]
        self._compare(actual, tokens, places, [-1] * len(places), places)
        self._read = tokens if self._read is None else torch.cat([self._read, tokens], dim=1)
        return actual

    def bidirectional(self, tokens, is_draft=False):
        before = self._read
        self._read = None if before is None else torch.cat([before, tokens], dim=1)  # crop() takes them off again
        actual = super().bidirectional(tokens, is_draft)
        assert torch.equal(self._read, before)
        places = [self._num_read() + i for i in range(tokens.shape[1])]
        self._compare(actual, tokens, [places[0] - 1] * len(places), [0] * len(places), places)
        return actual

    def speculate(self, tokens, num_read, num_groups, group_length):
        if num_groups == 0:
            return super().speculate(tokens, num_read, num_groups, group_length)  # through causal()
        logits, group_logits = super().speculate(tokens, num_read, num_groups, group_length)
        places = [self._num_read() + i for i in range(tokens.shape[1])]
        last_seen, owners = list(places), [-1] * len(places)
        for g in range(num_groups):
            owner = last_seen[tokens.shape[1] - num_read + g]
            places += [owner + 1 + i for i in range(group_length)]
            last_seen += [owner] * group_length
            owners += [g] * group_length
        masks = torch.full((1, num_groups * group_length), MASK)
        both = torch.cat([logits, group_logits.flatten(0, 1)])[None]
        self._compare(both, torch.cat([tokens, masks], dim=1), last_seen, owners, places)
        parts = [tokens, masks] if self._read is None else [self._read, tokens, masks]
        self._read = torch.cat(parts, dim=1)
        return logits, group_logits

    def crop(self, num_rows):
        super().crop(num_rows)
        self._read = self._read[:, : self._read.shape[1] - num_rows]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_batch", [False, True])
def test_cached_logits_equal_uncached(half_agreeing_model, monkeypatch, method, is_batch):
    if is_batch and method in SPECULATION:
        pytest.skip("one sequence at a time")
    expected = getattr(half_agreeing_model, method)(prompt_of(5), 14)
    monkeypatch.setattr(modeling, "_Session", Uncached)
    Uncached.num_compared = 0
    prompt, attention_mask = prompt_of(5), None
    if is_batch:
        prompt, attention_mask = prompt_of(5, batch=2), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
        getattr(half_agreeing_model, method)(prompt, 14, attention_mask=attention_mask)
    else:
        output_ids, num_forwards = getattr(half_agreeing_model, method)(prompt, 14)
        assert torch.equal(output_ids, expected[0])
        assert num_forwards == expected[1]
    assert Uncached.num_compared >= 14 * half_agreeing_model.config.vocab_size


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
    output_ids, num_forwards = constant_model.quadratic_spec_generate(prompt, 33, block_length=block_length)
    assert output_ids[0, 5:].tolist() == [9] * 33
    assert num_forwards == 1 + 32 // length
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


def chi_square_of_sampling(model, method, num_samples, block_length, **sampling):
    """(statistic, its 1e-4 quantile under AR's own distribution) of 3 sampled tokens.

    The statistic is infinite if AR cannot give what was found.
    """
    prompt = torch.tensor([[0, 3, 1]])
    ids = [i for i in range(model.config.vocab_size) if i != model.config.mask_token_id]

    def next_probabilities(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1]
        logits[:, model.config.mask_token_id] = -math.inf
        for processor in transformers_processors(**sampling):
            logits = processor(torch.tensor([tokens]), logits)
        return logits[0].softmax(-1).tolist()

    expected = {}
    for first, chance in enumerate(next_probabilities(prompt[0].tolist())):
        for second, next_chance in enumerate(next_probabilities([*prompt[0].tolist(), first])):
            for third, last_chance in enumerate(next_probabilities([*prompt[0].tolist(), first, second])):
                expected[first, second, third] = chance * next_chance * last_chance
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-5)
    assert all(expected[triple] == 0 for triple in expected if model.config.mask_token_id in triple)
    assert len(ids) ** 3 >= sum(chance > 0 for chance in expected.values())
    counts = dict.fromkeys(expected, 0)
    torch.manual_seed(0)
    for _ in range(num_samples):
        output_ids, _ = getattr(model, method)(prompt, 3, block_length, **sampling)
        counts[tuple(output_ids[0, 3:].tolist())] += 1
    is_possible = not any(counts[triple] for triple, chance in expected.items() if chance == 0)
    # Rare outcomes are pooled, so that each cell expects at least 5.
    cells = [(counts[t], num_samples * chance) for t, chance in expected.items() if num_samples * chance >= 5]
    pooled = num_samples - sum(c for c, _ in cells), num_samples - sum(e for _, e in cells)
    if pooled[1] > 1e-2:
        cells.append(pooled)
    statistic = sum((count - expectation) ** 2 / expectation for count, expectation in cells)
    freedom = len(cells) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return (statistic if is_possible else math.inf), quantile


def transformers_processors(temperature, top_k=None, top_p=None, repetition_penalty=1.0):
    found = [RepetitionPenaltyLogitsProcessor(repetition_penalty), TemperatureLogitsWarper(temperature)]
    found += [TopKLogitsWarper(top_k)] if top_k else []
    return found + ([TopPLogitsWarper(top_p)] if top_p else [])


def test_a_draft_behind_a_refused_one_is_not_kept():
    """The rule where chance has nothing to say: p 0 refuses, and what q has too much of does not come instead."""
    torch.manual_seed(0)
    q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    p = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = [modeling._speculative_sample(torch.tensor([0, 1]), q, p) for _ in range(40)]
    assert {num_kept for num_kept, _ in found} == {0}
    assert {int(following) for _, following in found} == {1, 2}
    p[0] = torch.tensor([0.5, 0.5, 0.0])
    found = {
        (n, int(following))
        for n, following in (modeling._speculative_sample(torch.tensor([0, 1]), q, p) for _ in range(40))
    }
    assert found == {(0, 1), (2, 2)}


@pytest.mark.parametrize("method", SPECULATION)
def test_drafts_are_drawn_from_what_they_are_held_against(half_agreeing_model, monkeypatch, method):
    """Processed drafts and verifier alike: with top-k no draft and no target lies outside of the two best."""
    honest, num_drafts = modeling._speculative_sample, 0

    def watched(drafts, q, p):
        nonlocal num_drafts
        num_drafts += len(drafts)
        assert (q > 0).sum(dim=1).tolist() == [2] * len(drafts)
        assert (p > 0).sum(dim=1).tolist() == [2] * (len(drafts) + 1)
        assert (q.gather(1, drafts[:, None]) > 0).all()
        return honest(drafts, q, p)

    monkeypatch.setattr(modeling, "_speculative_sample", watched)
    torch.manual_seed(0)
    getattr(half_agreeing_model, method)(prompt_of(5), 30, temperature=3.0, top_k=2)
    assert num_drafts > 20


def keep_every_draft(drafts, q, p):
    return len(drafts), p[len(drafts)].multinomial(1)[0]


def draw_again_from_the_target(drafts, q, p):
    """The right acceptance, but a refused draft is replaced by a draw from p, not from max(p - q, 0)."""
    chances = p[: len(drafts)].gather(1, drafts[:, None])[:, 0] / q.gather(1, drafts[:, None])[:, 0]
    num_kept = int((torch.rand_like(chances) < chances).cumprod(dim=0).sum())
    return num_kept, p[num_kept].multinomial(1)[0]


CHI_SQUARE_CASES = [
    ("linear_spec_generate", {"temperature": 1.0}),
    ("quadratic_spec_generate", {"temperature": 1.0}),
    ("linear_spec_generate", {"temperature": 1.2, "top_k": 3, "repetition_penalty": 1.5}),
    ("quadratic_spec_generate", {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.5}),
]


def check_sampling(make_model, monkeypatch, num_samples, method, sampling, *wrong_rules):
    model = make_model(4, std=0.25, vocab_size=5, mask_token_id=4, num_hidden_layers=1)
    statistic, quantile = chi_square_of_sampling(model, method, num_samples, 3, **sampling)
    assert statistic < quantile
    # The test must be able to fail.
    for wrong in wrong_rules:
        monkeypatch.setattr(modeling, "_speculative_sample", wrong)
        wrong_statistic, quantile = chi_square_of_sampling(model, method, num_samples, 3, **sampling)
        print(f"{method} {sampling}: {statistic:.1f}, {wrong.__name__} {wrong_statistic:.1f}, 1e-4 at {quantile:.1f}")
        assert wrong_statistic > (2 * quantile if wrong is keep_every_draft else quantile)


@pytest.mark.parametrize(("method", "sampling"), CHI_SQUARE_CASES[:2])
def test_speculative_sampling_has_the_distribution_of_ar(make_model, monkeypatch, method, sampling):
    check_sampling(make_model, monkeypatch, 800, method, sampling, keep_every_draft)


@pytest.mark.long
@pytest.mark.timeout(1800)  # three times 20000 runs
@pytest.mark.parametrize(("method", "sampling"), CHI_SQUARE_CASES)
def test_20000_speculative_samples_have_the_distribution_of_ar(make_model, monkeypatch, method, sampling):
    check_sampling(make_model, monkeypatch, 20_000, method, sampling, keep_every_draft, draw_again_from_the_target)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.7},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4},
    ],
)
def test_processed_scores_are_those_of_transformers(make_model, arguments):
    """What its own ``generate`` draws from, taken from there."""
    model, prompt = make_model(2), prompt_of(7, batch=2)
    reference = reference_of(model)
    torch.manual_seed(1)
    generated = reference.generate(
        prompt,
        max_new_tokens=6,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        **{"top_k": 0, "top_p": 1.0, **arguments},
    )
    full = {"temperature": 1.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0, **arguments}
    sampling = modeling._Sampling(**full)
    for step, expected in enumerate(generated.scores):
        history = generated.sequences[:, : 7 + step]
        with torch.no_grad():
            logits = model(history).logits[:, -1]
        torch.testing.assert_close(sampling.scores(logits, history), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_greedy_ar_equals_transformers_generate(make_model, penalty):
    model, prompt = make_model(2), prompt_of(7, batch=3)
    with torch.no_grad():
        model.diffusion_head.weight[MASK] = 0.0  # its logit is 0: transformers does not leave it out
    reference = reference_of(model)
    expected = reference.generate(
        prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, repetition_penalty=penalty
    )
    assert not (expected == MASK).any()
    output_ids, _ = model.ar_generate(prompt, 30, repetition_penalty=penalty)
    assert torch.equal(output_ids, expected)
    if penalty > 1:
        assert not torch.equal(output_ids, model.ar_generate(prompt, 30)[0])
        # Padding is no part of what was said before.
        padded = torch.nn.functional.pad(prompt, (4, 0), value=int(output_ids[0, 9]))
        attention_mask = torch.nn.functional.pad(torch.ones_like(prompt), (4, 0))
        again, _ = model.ar_generate(padded, 30, repetition_penalty=penalty, attention_mask=attention_mask)
        assert torch.equal(again[:, 4:], output_ids)


def test_a_penalty_counts_the_committed_tokens_of_a_block(constant_model):
    with torch.no_grad():
        constant_model.diffusion_head.weight[9] = 0.1  # not sure enough to be committed everywhere at once
        constant_model.diffusion_head.weight[11:21] = 0.01
    output_ids, _ = constant_model.generate(torch.tensor([[22]]), 8, 4, threshold=1.0)
    assert output_ids[0, 1:].tolist() == [9] * 8
    output_ids, _ = constant_model.generate(torch.tensor([[22]]), 8, 4, threshold=1.0, repetition_penalty=1e6)
    assert output_ids[0, 1:].tolist() == [9, *range(11, 18)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k: 0"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0"),
    ],
)
def test_sampling_arguments_refused(make_model, method, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(make_model(), method)(prompt_of(4), 4, temperature=1.0, **changes)


@pytest.mark.parametrize("method", METHODS)
def test_updates_lead_to_the_output(half_agreeing_model, method):
    seen = []
    output_ids, num_forwards = getattr(half_agreeing_model, method)(
        prompt_of(5), 13, on_update=lambda new_ids, forwards: seen.append((new_ids[0].tolist(), forwards))
    )
    assert seen[-1] == (output_ids[0, 5:].tolist(), num_forwards)
    for (before, forwards_before), (after, forwards_after) in itertools.pairwise(seen):
        assert forwards_after > forwards_before
        assert len(after) >= len(before)
        settled = [(b, a) for b, a in zip(before, after, strict=False) if b != MASK]
        assert all(b == a for b, a in settled)
        assert sum(token != MASK for token in after) > len(settled)


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
        for method in SPECULATION:
            output_ids, _ = getattr(constant_model, method)(prompt_of(5), block_length=8, **arguments)
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
        for method in SPECULATION:
            again_ids, num_forwards = getattr(model, method)(prompt, **arguments)
            assert torch.equal(again_ids, output_ids)
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
        ("linear_spec_generate", {"prompt_ids": prompt_of(4, batch=2)}, "prompt_ids: 2 sequences; linear"),
        ("quadratic_spec_generate", {"prompt_ids": prompt_of(4, batch=2)}, "prompt_ids: 2 sequences; quadratic"),
        ("quadratic_spec_generate", {"block_length": 0}, "block_length: 0"),
        ("quadratic_spec_generate", {"diffusion_weight": 1.0}, r"diffusion_weight: 1\.0"),
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
