"""How few denoising steps a block could take: the limits that real samplers are held against.

*Target* of a block: what serial denoising gives, one token per step, the surest one. A *state* is the set of its
positions that are committed, always to the target's tokens; it is written as a bit mask. In a state a position
*matches* if its most probable token is the target's.

* *greedy oracle*: commit every match. In a state without one it commits the target at the surest position (a
  *violation*: no sampler could know that).
* *recursive dynamic compaction*: of the matches ranked by confidence, commit the longest prefix after which serial
  denoising still arrives at the target. It never meets a state without a match.
* *exhaustive search*: the shortest path through all states, on blocks of a few tokens.

T tokens of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from nld_train.evaluation.reader import CleanPrefix

MAX_EXHAUSTIVE = 12
"""Tokens of a block beyond which an exhaustive search is refused: it looks at 2^T states."""


@dataclass(slots=True)
class Block:
    """One block behind its clean prefix, and what the model says in each state, evaluated once each.

    Attributes:
        target: the tokens of serial denoising.
        num_forwards: states evaluated.
    """

    prefix: CleanPrefix
    length: int
    mask_token_id: int
    device: torch.device
    target: list[int] = field(default_factory=list)
    num_forwards: int = 0
    _seen: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find the target: every state on the way consists of its tokens."""
        found = [self.mask_token_id] * self.length
        state = 0
        while state != self.full:
            self.target = found
            tokens, _ = self.look(state)
            surest = self.ranked(state)[0]
            found[surest] = tokens[surest]
            state |= 1 << surest

    @property
    def full(self) -> int:
        return (1 << self.length) - 1

    def look(self, state: int) -> tuple[list[int], list[float]]:
        """The most probable token of each position, and its probability."""
        if state not in self._seen:
            committed = [self.target[i] if state >> i & 1 else self.mask_token_id for i in range(self.length)]
            rows = torch.tensor(committed, device=self.device)
            start = self.prefix.num_tokens
            log_p = self.prefix.denoise(
                rows,
                torch.arange(start, start + self.length, device=self.device),
                torch.zeros_like(rows),
                torch.full_like(rows, start),
            )
            best, tokens = log_p.max(dim=-1)
            self._seen[state] = tokens.tolist(), best.exp().tolist()
            self.num_forwards += 1
        return self._seen[state]

    def ranked(self, state: int) -> list[int]:
        """The open positions, the surest first; of equals the first."""
        _, confidence = self.look(state)
        return sorted((i for i in range(self.length) if not state >> i & 1), key=lambda i: -confidence[i])

    def matches(self, state: int) -> list[int]:
        """The open positions whose most probable token is the target's, the surest first."""
        tokens, _ = self.look(state)
        return [i for i in self.ranked(state) if tokens[i] == self.target[i]]


class Path(TypedDict):
    """``commits``: how many tokens each step commits. ``num_violations``: steps without a match."""

    commits: list[int]
    num_violations: int


def greedy_oracle(block: Block) -> Path:
    state, path = 0, Path(commits=[], num_violations=0)
    while state != block.full:
        chosen = block.matches(state)
        if not chosen:
            chosen = block.ranked(state)[:1]
            path["num_violations"] += 1
        path["commits"].append(len(chosen))
        state |= sum(1 << i for i in chosen)
    return path


class CompactionPath(Path):
    """``is_exhausted``: the budget ran out, and what was not looked at was taken to fail."""

    num_forwards: int
    is_exhausted: bool


def compaction(block: Block, budget: int = 5000) -> CompactionPath:
    """Recursive dynamic compaction.

    Args:
        budget: states that may be evaluated for this block, the target's and those of other searches included; when it
            is spent, the remaining steps are serial, which always leads to the target.
    """
    leads: dict[int, bool] = {block.full: True}
    path = CompactionPath(commits=[], num_violations=0, num_forwards=0, is_exhausted=False)

    def leads_to_target(state: int) -> bool:
        visited = []
        while state not in leads:
            if block.num_forwards >= budget:
                path["is_exhausted"] = True
                return False
            visited.append(state)
            surest = block.ranked(state)[0]
            if block.look(state)[0][surest] != block.target[surest]:
                leads.update(dict.fromkeys(visited, False))
                return False
            state |= 1 << surest
        leads.update(dict.fromkeys(visited, leads[state]))
        return leads[state]

    state = 0
    while state != block.full:
        chosen = block.matches(state)
        # The surest match is the serial step, which leads to the target from every state that we are in.
        while len(chosen) > 1 and not leads_to_target(state | sum(1 << i for i in chosen)):
            chosen.pop()
        if not chosen:
            raise AssertionError(f"state {state:b} of target {block.target} does not lead to it")
        path["commits"].append(len(chosen))
        state |= sum(1 << i for i in chosen)
    path["num_forwards"] = block.num_forwards
    return path


def exhaustive(block: Block) -> int:
    """The fewest steps from the empty block to the target, where a step commits any matches, or in a state without one
    what the greedy oracle commits."""
    if block.length > MAX_EXHAUSTIVE:
        raise ValueError(f"a block of {block.length} tokens; exhaustive search takes at most {MAX_EXHAUSTIVE}")
    reached, num_steps = {0}, 0
    while block.full not in reached:
        following = set()
        for state in reached:
            allowed = sum(1 << i for i in (block.matches(state) or block.ranked(state)[:1]))
            chosen = allowed
            while chosen:  # every subset but the empty one
                following.add(state | chosen)
                chosen = (chosen - 1) & allowed
        reached, num_steps = following, num_steps + 1
    return num_steps


def confidence_sampler(block: Block, threshold: float) -> tuple[list[int], list[int]]:
    """What decoding with ``threshold`` does with this block: (tokens, how many each step commits)."""
    tokens, commits = [block.mask_token_id] * block.length, []
    start = block.prefix.num_tokens
    places = torch.arange(start, start + block.length, device=block.device)
    while block.mask_token_id in tokens:
        rows = torch.tensor(tokens, device=block.device)
        log_p = block.prefix.denoise(rows, places, torch.zeros_like(rows), torch.full_like(rows, start))
        best, found = log_p.max(dim=-1)
        is_open = rows == block.mask_token_id
        chosen = is_open & (best.exp() >= threshold)
        chosen[best.masked_fill(~is_open, -torch.inf).argmax()] = True
        tokens = torch.where(chosen, found, rows).tolist()
        commits.append(int(chosen.sum()))
    return tokens, commits


class LimitRow(TypedDict):
    """One way of denoising at one block length. ``acceptance``: tokens per denoising step. ``tokens_per_forward``
    counts one more forward a block, which reads it into the cache. ``target_share``: blocks that end as the target."""

    block_length: int
    sampler: str
    num_blocks: int
    num_steps: int
    acceptance: float
    tokens_per_forward: float
    target_share: float
    violations_per_block: float
    num_exhausted: int


def measure_limits(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    block_lengths: Sequence[int],
    num_blocks: int,
    threshold: float = 0.9,
    budget: int = 5000,
    on_block: Callable[[], None] = lambda: None,
) -> list[LimitRow]:
    """Serial denoising, the confidence sampler, greedy oracle and compaction on the blocks that follow each prompt.

    All of them denoise the same blocks: behind the prompt stand the targets of the blocks before.

    Args:
        model: an exported model.
        prompts: int64 [P] each.
        block_lengths: T.
        num_blocks: for each prompt.
        threshold: of the confidence sampler.
        budget: see :func:`compaction`.
        on_block: called after each block.
    """
    rows = []
    for length in block_lengths:
        commits: dict[str, list[int]] = {}
        reproduced: dict[str, int] = {}
        violations = exhausted = 0
        for prompt in prompts:
            prefix = CleanPrefix(model)
            prefix.read(prompt.to(model.device))
            for _ in range(num_blocks):
                block = Block(prefix, length, model.config.mask_token_id, model.device)
                tokens, steps = confidence_sampler(block, threshold)
                # Compaction before the greedy oracle, whose states must not use up its budget.
                compact = compaction(block, budget)
                greedy = greedy_oracle(block)
                for name, taken, is_target in (
                    ("serial", [1] * length, True),
                    (f"confidence {threshold:g}", steps, tokens == block.target),
                    ("greedy oracle", greedy["commits"], True),
                    ("compaction", compact["commits"], True),
                ):
                    commits.setdefault(name, []).extend(taken)
                    reproduced[name] = reproduced.get(name, 0) + is_target
                violations += greedy["num_violations"]
                exhausted += compact["is_exhausted"]
                prefix.read(torch.tensor(block.target, device=model.device))
                on_block()
        total = len(prompts) * num_blocks
        rows += [
            LimitRow(
                block_length=length,
                sampler=name,
                num_blocks=total,
                num_steps=len(taken),
                acceptance=total * length / len(taken),
                tokens_per_forward=total * length / (len(taken) + total),
                target_share=reproduced[name] / total,
                violations_per_block=violations / total if name == "greedy oracle" else 0.0,
                num_exhausted=exhausted if name == "compaction" else 0,
            )
            for name, taken in commits.items()
        ]
    return rows
