"""Oracles on blocks: what they reproduce, their order, and that nothing beats an exhaustive search."""

import itertools

import pytest
import torch

from nld_train.evaluation import speed_of_light as light
from nld_train.evaluation.reader import CleanPrefix

MASK = 5


class TableBlock(light.Block):
    """A block whose answers come from a table of random numbers, not from a model: rougher than any model's."""

    def __init__(self, length, seed, num_tokens=2):
        self.table = torch.Generator().manual_seed(seed)
        self.num_tokens = num_tokens
        super().__init__(prefix=None, length=length, mask_token_id=-1, device=torch.device("cpu"))

    def look(self, state):
        if state not in self._seen:
            tokens = torch.randint(self.num_tokens, (self.length,), generator=self.table).tolist()
            self._seen[state] = tokens, torch.rand(self.length, generator=self.table).tolist()
            self.num_forwards += 1
        return self._seen[state]


def slow_serial(model, prompt, length):
    """One token per step, no cache."""
    block = [MASK] * length
    order = []
    while MASK in block:
        rows = torch.cat([prompt, torch.tensor(block)])
        allowed = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        allowed[len(prompt) :, len(prompt) :] = True
        with torch.no_grad():
            logits = model(rows[None], attention_mask=allowed[None, None]).logits[0, len(prompt) :]
        logits[:, MASK] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        surest = max((i for i in range(length) if block[i] == MASK), key=lambda i: float(confidence[i]))
        block[surest] = int(tokens[surest])
        order.append(surest)
    return block, order


def block_of(model, prompt, length):
    prefix = CleanPrefix(model)
    prefix.read(prompt)
    return light.Block(prefix, length, MASK, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(4))
def test_target_is_that_of_serial_denoising(make_model, seed):
    model = make_model(seed)
    prompt = torch.randint(6, 64, (7,), generator=torch.Generator().manual_seed(seed))
    expected, order = slow_serial(model, prompt, 6)
    block = block_of(model, prompt, 6)
    assert block.target == expected
    assert block.num_forwards == block.prefix.num_forwards - 1 == 6
    output_ids, _ = model.generate(prompt[None], 6, 6, threshold=1.0)
    assert output_ids[0, 7:].tolist() == expected
    state = 0
    for place in order:
        assert block.ranked(state)[0] == place
        state |= 1 << place
    assert light.confidence_sampler(block, 1.0) == (expected, [1] * 6)


def paths_that_reproduce(block):
    """Steps of samplers that only commit matches: each takes some rank pattern of the confidence-ranked matches."""
    for pattern in itertools.product((1, 2, 3), repeat=block.length):
        state, steps = 0, 0
        for count in pattern:
            if state == block.full:
                break
            chosen = block.matches(state)[:count]
            if not chosen:
                break
            state |= sum(1 << i for i in chosen)
            steps += 1
        if state == block.full:
            yield steps


def check_block(block, best):
    greedy, compact = light.greedy_oracle(block), light.compaction(block)
    for path in (greedy, compact):
        assert sum(path["commits"]) == block.length
        assert best <= len(path["commits"]) <= block.length
    assert compact["num_violations"] == 0
    assert not compact["is_exhausted"]
    return greedy, compact


@pytest.mark.parametrize("length", [1, 2, 4, 6])
def test_exhaustive_search_is_never_beaten(length):
    num_violations = better_than_greedy = better_than_compaction = greedy_loses = 0
    for seed in range(40):
        block = TableBlock(length, seed)
        best = light.exhaustive(block)
        greedy, compact = check_block(block, best)
        assert all(best <= steps for steps in paths_that_reproduce(block))
        num_violations += greedy["num_violations"]
        better_than_greedy += best < len(greedy["commits"])
        better_than_compaction += best < len(compact["commits"])
        greedy_loses += len(compact["commits"]) < len(greedy["commits"])
    if length == 6:
        assert min(num_violations, better_than_greedy, better_than_compaction, greedy_loses) > 0


def test_compaction_ends_at_the_target_by_serial_denoising():
    """From every state it was in, serial denoising arrives at the target; and no longer prefix would have."""

    def arrives(block, state):
        while state != block.full:
            surest = block.ranked(state)[0]
            if block.look(state)[0][surest] != block.target[surest]:
                return False
            state |= 1 << surest
        return True

    for seed in range(40):
        block = TableBlock(7, seed)
        state = 0
        for count in light.compaction(block)["commits"]:
            matches = block.matches(state)
            for longer in range(count + 1, len(matches) + 1):
                assert not arrives(block, state | sum(1 << i for i in matches[:longer]))
            state |= sum(1 << i for i in matches[:count])
            assert arrives(block, state)
        assert state == block.full


def test_the_budget_is_kept_and_the_target_still_reached():
    seen = set()
    for seed in range(20):
        free = light.compaction(TableBlock(8, seed))
        for budget in (8, 10, 14):
            path = light.compaction(TableBlock(8, seed), budget)
            # Beyond the budget each serial step still looks at its own state.
            assert path["num_forwards"] <= budget + len(path["commits"])
            assert sum(path["commits"]) == 8
            assert path["is_exhausted"] or path["commits"] == free["commits"]
            seen.add(path["is_exhausted"])
    assert seen == {True, False}


def test_exhaustive_refuses_long_blocks():
    with pytest.raises(ValueError, match="13 tokens"):
        light.exhaustive(TableBlock(13, 0))


@pytest.mark.parametrize(("budget", "num_exhausted"), [(9, 2), (5000, 0)])
def test_limits_on_a_model(make_model, budget, num_exhausted):
    """Every field of every row, from blocks of our own."""
    model = make_model(3, std=0.5)
    prompts = [torch.randint(6, 64, (4,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    done = []
    rows = light.measure_limits(
        model,
        prompts,
        block_lengths=[3, 6],
        num_blocks=2,
        threshold=0.4,
        budget=budget,
        on_block=lambda: done.append(1),
    )
    assert len(done) == 2 * 4 * 2
    expected = []
    for length in (3, 6):
        steps = dict.fromkeys(("serial", "confidence 0.4", "greedy oracle", "compaction"), 0)
        hits = violations = exhausted = 0
        for prompt in prompts:
            tokens = prompt
            for _ in range(2):
                block = block_of(model, tokens, length)
                best = light.exhaustive(block)
                check_block(block, best)
                compact = light.compaction(block_of(model, tokens, length), budget)
                greedy = light.greedy_oracle(block)
                output_ids, num_forwards = model.generate(tokens[None], length, length, threshold=0.4)
                steps["serial"] += length
                steps["confidence 0.4"] += num_forwards - 1  # one reads the prompt
                steps["greedy oracle"] += len(greedy["commits"])
                steps["compaction"] += len(compact["commits"])
                hits += output_ids[0, len(tokens) :].tolist() == block.target
                violations += greedy["num_violations"]
                exhausted += compact["is_exhausted"]
                tokens = torch.cat([tokens, torch.tensor(block.target)])
        for name, num_steps in steps.items():
            expected.append(
                {
                    "block_length": length,
                    "sampler": name,
                    "num_blocks": 8,
                    "num_steps": num_steps,
                    "acceptance": 8 * length / num_steps,
                    "tokens_per_forward": 8 * length / (num_steps + 8),  # one reads each block into the cache
                    "target_share": hits / 8 if name == "confidence 0.4" else 1.0,
                    "violations_per_block": violations / 8 if name == "greedy oracle" else 0.0,
                    "num_exhausted": exhausted if name == "compaction" else 0,
                }
            )
    assert rows == expected
    # The samplers differ here, and so does what is counted of them.
    assert exhausted == num_exhausted
    assert 0 < hits < 8
    assert violations > 0
    assert len(set(steps.values())) == 4
