"""Nemotron-Labs-Diffusion: one set of weights that decodes in four modes.

* :meth:`~NemotronLabsDiffusionModel.ar_generate`: one token per forward, left to right.
* :meth:`~NemotronLabsDiffusionModel.generate`: block diffusion, several tokens of a block per forward.
* :meth:`~NemotronLabsDiffusionModel.linear_spec_generate`: diffusion drafts a block, AR verifies it.
* :meth:`~NemotronLabsDiffusionModel.quadratic_spec_generate`: each forward verifies one draft and makes the next.

Each returns the ids with the prompt and the number of forward evaluations (calls of ``model.encoder``). This file needs
torch and transformers >= 5.4, nothing else: before, transformers scales queries by their row, not by ``position_ids``.

Dimensions: B sequences, P prompt tokens, N new tokens, Q rows of one forward, K cached rows and Q, V vocabulary.
"""

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, Ministral3Model, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig

OnUpdate = Callable[[Tensor, int], None]
"""Called whenever tokens were settled, with the new tokens so far, int64 [B, n], the mask token where a position is
still open, and the number of forwards so far."""

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""transformers' own name of the cache among arguments and outputs: ``cache`` from 5.24 on."""


class NemotronLabsDiffusionModel(PreTrainedModel, GenerationMixin):
    """A Ministral3 decoder stack (``encoder``) and its output head (``diffusion_head``), causal by default.

    Attention is computed by torch's scaled_dot_product_attention (or ``attn_implementation="eager"``). The kernels that
    take no 4-D mask are refused, because a block that attends in both directions needs one.

    PEFT adapters serve the drafting pass of :meth:`linear_spec_generate` and nothing else: while one of the four
    decoding methods runs they are switched off for every other forward, so that attaching a drafter changes no
    token. An adapter that is meant to change the model itself has to be merged first.

    The decoding methods share these arguments: ``temperature``, 0 for the most probable token, above 0 for a draw from
    softmax(logits / temperature) by torch's global random numbers; ``top_k``, draw among so many most probable tokens;
    ``top_p``, among the fewest that hold this much probability; ``repetition_penalty``, by which the logits of tokens
    of the prompt (padding left out) and of the output are divided where positive and multiplied where negative, at
    temperature 0 as well. They are transformers' own processors in the order of its ``generate``. ``on_update`` is told
    of every step: see ``OnUpdate``.

    Of transformers' ``GenerationMixin`` only the bookkeeping is used (``generation_config``, and
    ``prepare_inputs_for_generation``, which PEFT asks for); ``generate`` is this model's own.
    """

    config_class = NemotronLabsDiffusionConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Ministral3DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__(config)
        self.encoder = Ministral3Model(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.diffusion_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.diffusion_head = new_embeddings

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # `model.to(torch.bfloat16)` casts buffers, too. Rotary frequencies rounded to 8 bits turn far positions by
        # the wrong angle, so they stay as they were and only follow the device.
        rotary = self.encoder.rotary_emb
        exact = {name: getattr(rotary, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(rotary, name)
            if after.dtype != before.dtype:
                setattr(rotary, name, before.to(device=after.device))
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One evaluation of the network. The mask token's logit is left as the head gives it.

        Args:
            input_ids: int64 [B, Q]; or give ``inputs_embeds``.
            attention_mask: None: causal. [B, K]: causal, 1 where a row is a token and 0 where it is padding.
                [B or 1, 1, Q, K]: exactly this mask, bool (True where a query may look) or additive float;
                for a noisy block or the doubled training sequence.
            position_ids: int64 [B, Q], absolute (query scaling depends on them); default: after the cached rows.
            cache: keys and values of earlier rows; the rows of this call are appended to it.
            inputs_embeds: float [B, Q, hidden_size], instead of ``input_ids``.
            labels: int64 [B, Q]: the tokens themselves; ``loss`` is then the mean next-token cross-entropy (-100 is
                left out). This is the AR loss, not the joint training objective.
            use_cache: return the cache; default: the configuration's ``use_cache``.
            logits_to_keep: number of last rows whose logits are computed; 0: all.
            past_key_values: another name of ``cache``, which not every caller knows; give one of them.
            **kwargs: handed to the decoder stack (``output_hidden_states`` ...).

        Returns:
            ``logits`` [B, Q or logits_to_keep, V] in the head's dtype, ``loss`` and so on; the cache under the name
            that the installed transformers gives it, ``cache`` or (before 5.24) ``past_key_values``.
        """
        if past_key_values is not None:
            if cache is not None:
                raise ValueError("cache, past_key_values: both were given; they are one argument, give one name")
            cache = past_key_values
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = self._kernel_mask(attention_mask)
        outputs = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{_CACHE: cache},
            **kwargs,
        )
        logits = self.diffusion_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError(f"logits_to_keep: {logits_to_keep}; labels need the logits of all rows, set it to 0")
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
            )
        returned_cache: dict[str, Any] = {_CACHE: getattr(outputs, _CACHE)}
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **returned_cache,
        )

    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        attention_mask: Tensor | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        on_update: OnUpdate | None = None,
    ) -> tuple[Tensor, int]:
        """Continue left to right: one forward per new token.

        Args:
            prompt_ids: int64 [B, P], P >= 1; without the mask token.
            max_new_tokens: at most this many new tokens.
            temperature: see the class; also top_k, top_p, repetition_penalty and on_update.
            eos_token_id: a sequence ends after this token (or one of these); None: never. In a batch an ended
                sequence is filled up with the (first) eos token.
            top_k: see the class.
            top_p: see the class.
            repetition_penalty: see the class.
            attention_mask: bool or 0/1 [B, P], 0 on padding, which must stand on the left; None: no padding.
            max_thinking_tokens: when this many new tokens hold no ``end_think_token_id``, it is made the next one.
            end_think_token_id: the token that closes the thinking part; needed with ``max_thinking_tokens``.

        Returns:
            (int64 [B, P + N]: prompt and new tokens, N <= ``max_new_tokens``; number of forward evaluations = N)

        Raises:
            ValueError: an argument is out of its range; the message names it and its value.
        """
        budget = _ThinkingBudget(max_thinking_tokens, end_think_token_id, self.config.vocab_size)
        sampling = _Sampling(temperature, top_k, top_p, repetition_penalty)
        stop_ids = self._check_arguments(prompt_ids, attention_mask, max_new_tokens, eos_token_id)
        output_ids = prompt_ids
        known_ids = _without_padding(prompt_ids, attention_mask)
        num_prompt = prompt_ids.shape[1]
        is_finished = torch.zeros(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
        with _Session(self, attention_mask) as session:
            rows = prompt_ids
            for _ in range(max_new_tokens):
                history = torch.cat([known_ids, output_ids[:, num_prompt:]], dim=1)
                token = sampling.choose(sampling.scores(session.causal(rows, num_logits=1)[:, 0], history))
                token = budget.enforce(output_ids[:, num_prompt:], token)
                if stop_ids is not None:
                    token = torch.where(is_finished, stop_ids[0], token)
                    is_finished |= torch.isin(token, stop_ids)
                rows = token[:, None]
                output_ids = torch.cat([output_ids, rows], dim=1)
                if on_update is not None:
                    on_update(output_ids[:, num_prompt:], session.num_forwards)
                if stop_ids is not None and is_finished.all():
                    break
            return output_ids, session.num_forwards

    def generate(  # type: ignore[override]
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float = 0.9,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        steps_per_block: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        attention_mask: Tensor | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        on_update: OnUpdate | None = None,
    ) -> tuple[Tensor, int]:
        """Continue by block diffusion.

        A block of mask tokens is appended and denoised: each forward sees the cached prefix and the whole block in
        both directions, and every masked position whose token is sure enough is committed, the surest one always.
        A full block is read once causally, which leaves its clean keys and values in the cache; the last block is
        not. So there are at most N + (number of blocks) forwards: one for the prompt, at most one per token, one per
        block but the last.

        Blocks are counted from the end of the prompt, as public decoders do, although training cuts blocks at
        multiples of ``block_size``: a block then never holds prompt tokens. The last block is as long as the others,
        as in training; its positions beyond ``max_new_tokens`` stay masked and are never committed.

        Args:
            prompt_ids: int64 [B, P], P >= 1; without the mask token.
            max_new_tokens: at most this many new tokens.
            block_length: tokens denoised together; None: the configuration's ``block_size``.
            threshold: 0..1, the probability from which on a position is committed.
            temperature: see the class; each position's candidate is chosen so. What is held against ``threshold`` is
                the candidate's probability in softmax(logits), before temperature and all else.
            eos_token_id: a sequence ends after this token (or one of these) once everything before it is committed;
                None: never. In a batch an ended sequence is filled up with the (first) eos token.
            steps_per_block: fill each block in at most this many forwards: beside the positions that pass the
                threshold, each forward commits the surest ones up to its even share. None: no limit.
            top_k: see the class.
            top_p: see the class.
            repetition_penalty: see the class; the committed tokens of the block count, too.
            attention_mask: bool or 0/1 [B, P], 0 on padding, which must stand on the left; None: no padding.
            max_thinking_tokens: when this many new tokens hold no ``end_think_token_id``, it is made the first token of
                the next block.
            end_think_token_id: the token that closes the thinking part; needed with ``max_thinking_tokens``.

        Returns:
            (int64 [B, P + N]: prompt and new tokens, N <= ``max_new_tokens``; number of forward evaluations)

        Raises:
            ValueError: an argument is out of its range; the message names it and its value.
        """
        budget = _ThinkingBudget(max_thinking_tokens, end_think_token_id, self.config.vocab_size)
        block_length = self.config.block_size if block_length is None else block_length
        _check_integer("block_length", block_length, 1)
        if steps_per_block is not None:
            _check_integer("steps_per_block", steps_per_block, 1)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold: {threshold}; it is a probability, between 0 and 1")
        sampling = _Sampling(temperature, top_k, top_p, repetition_penalty)
        stop_ids = self._check_arguments(prompt_ids, attention_mask, max_new_tokens, eos_token_id)
        output_ids = prompt_ids
        known_ids = _without_padding(prompt_ids, attention_mask)
        num_prompt = prompt_ids.shape[1]
        is_finished = torch.zeros(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
        with _Session(self, attention_mask) as session:
            session.causal(prompt_ids, num_logits=0)
            num_new = 0
            while num_new < max_new_tokens:
                block = prompt_ids.new_full((len(prompt_ids), block_length), self.config.mask_token_id)
                is_open = torch.zeros_like(block, dtype=torch.bool)
                is_open[:, : max_new_tokens - num_new] = True
                is_forced = budget.is_spent(output_ids[:, num_prompt:])
                if is_forced is not None:
                    block[is_forced, 0] = budget.end_think_token_id
                    is_open[is_forced, 0] = False
                if stop_ids is not None:
                    block[is_finished] = stop_ids[0]
                    is_open[is_finished] = False
                steps_left = block_length if steps_per_block is None else steps_per_block
                while is_open.any():
                    history = torch.cat([known_ids, output_ids[:, num_prompt:], block], dim=1)
                    candidates, confidence = _candidates(session.bidirectional(block), sampling, history)
                    is_committed = _commit(confidence, is_open, threshold, steps_left, steps_per_block is not None)
                    block = torch.where(is_committed, candidates, block)
                    is_open &= ~is_committed
                    steps_left -= 1
                    if stop_ids is not None:
                        is_finished |= _end_rows(block, is_open, stop_ids)
                    if on_update is not None:
                        shown = torch.cat([output_ids[:, num_prompt:], block[:, : max_new_tokens - num_new]], dim=1)
                        on_update(shown, session.num_forwards)
                output_ids = torch.cat([output_ids, block[:, : max_new_tokens - num_new]], dim=1)
                num_new += block_length
                if stop_ids is not None:
                    # An eos token that was forced, not denoised, has not been seen yet.
                    is_finished |= torch.isin(output_ids[:, num_prompt:], stop_ids).any(dim=1)
                    if is_finished.all():
                        break
                if num_new < max_new_tokens:
                    session.causal(block, num_logits=0)
            if stop_ids is not None:
                output_ids = output_ids[:, : num_prompt + _longest(output_ids[:, num_prompt:], stop_ids)]
            return output_ids, session.num_forwards

    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        on_update: OnUpdate | None = None,
    ) -> tuple[Tensor, int]:
        """Continue by linear self-speculation: diffusion drafts a block, one causal forward verifies it.

        The next token is known from AR. A round drafts [known token, mask, mask, ...] in both directions, without
        leaving a trace in the cache, then reads the filled block causally. The longest prefix of drafts that AR agrees
        with is kept, and AR's own token after it: 1 to ``block_length`` tokens per two forwards. PEFT adapters are
        active in the draft only.

        At temperature 0 the tokens are those of :meth:`ar_generate`. Both compute the same numbers in matrix
        products of different height, so their logits may differ in the last bits: where the two best tokens are closer
        than that (in fp32 practically never; in bf16 equal logits do occur), either may be chosen. Above 0 each
        draft is a draw from its own distribution q and is kept with probability min(1, p/q), p being AR's; the
        first refused one is replaced by a draw from max(p - q, 0) normalised; p and q are what is left after top_k,
        top_p and the penalty. The output's distribution is then that of AR sampling with the same arguments.

        Args:
            prompt_ids: int64 [1, P], P >= 1; one sequence, since sequences would accept different lengths. Without
                the mask token.
            max_new_tokens: at most this many new tokens.
            block_length: rows of a draft, the known token included; None: the configuration's ``block_size``.
            temperature: see the class; also top_k, top_p, repetition_penalty and on_update.
            eos_token_id: the sequence ends after this token (or one of these); None: never.
            top_k: see the class.
            top_p: see the class.
            repetition_penalty: see the class.
            max_thinking_tokens: when this many new tokens hold no ``end_think_token_id``, it is made the next one.
            end_think_token_id: the token that closes the thinking part; needed with ``max_thinking_tokens``.

        Returns:
            (int64 [1, P + N]: prompt and new tokens, N <= ``max_new_tokens``; number of forward evaluations, at most
            2 N)

        Raises:
            ValueError: an argument is out of its range; the message names it and its value.
        """
        budget = _ThinkingBudget(max_thinking_tokens, end_think_token_id, self.config.vocab_size)
        block_length = self.config.block_size if block_length is None else block_length
        _check_integer("block_length", block_length, 1)
        sampling = _Sampling(temperature, top_k, top_p, repetition_penalty)
        stop_ids = self._check_arguments(prompt_ids, None, max_new_tokens, eos_token_id, method="linear_spec_generate")
        new_ids = prompt_ids[:, :0]
        with _Session(self, None) as session:
            # The cache holds every token but the last known one.
            known = sampling.choose(sampling.scores(session.causal(prompt_ids, num_logits=1)[:, 0], prompt_ids))
            found = budget.enforce(new_ids, known)[:, None]
            while True:
                new_ids, is_finished = _append(new_ids, found, stop_ids)
                if on_update is not None:
                    on_update(new_ids, session.num_forwards)
                num_left = budget.limit(new_ids, max_new_tokens - new_ids.shape[1])
                if is_finished or num_left == 0:
                    break
                num_rows = min(block_length, num_left)  # each row verified may give one token
                known = new_ids[:, -1:]
                history = torch.cat([prompt_ids, new_ids], dim=1)
                drafts, draft_scores = known[:, :0], None
                if num_rows > 1:
                    masks = known.new_full((1, block_length - 1), self.config.mask_token_id)
                    draft_logits = session.bidirectional(torch.cat([known, masks], dim=1), is_draft=True)[0, 1:num_rows]
                    draft_scores = sampling.scores(draft_logits, history)
                    drafts = sampling.choose(draft_scores)[None]
                logits = session.causal(torch.cat([known, drafts], dim=1), num_logits=num_rows)[0]
                num_kept, following = _verify(sampling, history, drafts, draft_scores, logits)
                session.crop(drafts.shape[1] - num_kept)
                following = budget.enforce(torch.cat([new_ids, drafts[:, :num_kept]], dim=1), following)
                found = torch.cat([drafts[:, :num_kept], following[:, None]], dim=1)
            return torch.cat([prompt_ids, new_ids], dim=1), session.num_forwards

    def quadratic_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        *,
        diffusion_weight: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        on_update: OnUpdate | None = None,
    ) -> tuple[Tensor, int]:
        """Continue by quadratic self-speculation: every forward verifies one draft and makes the next.

        A forward reads k speculative tokens (the known one and k - 1 drafts), and after each of them k masks, the draft
        for the case that this token is the last one accepted: k (k + 1) rows. The speculative tokens see the cache and
        one another causally, so their logits are AR's; a group of masks sees the cache, the speculative tokens up to
        its own, and itself in both directions, as a noisy block of training sees its clean prefix. AR's own token
        after the accepted ones takes the place of the group's first mask, the others' tokens are the next drafts: 1 to
        ``block_length`` tokens per forward, the prompt's included.

        At temperature 0 the tokens are those of :meth:`ar_generate`, above 0 their distribution is: see
        :meth:`linear_spec_generate`, also on last bits. PEFT adapters stay off, since one forward does both jobs.

        Args:
            prompt_ids: int64 [1, P], P >= 1; one sequence, since sequences would accept different lengths. Without
                the mask token. The first forward has a dense mask of (P + k) x (P + k).
            max_new_tokens: at most this many new tokens.
            block_length: k; None: the configuration's ``block_size``.
            temperature: see the class; also top_k, top_p, repetition_penalty and on_update.
            eos_token_id: the sequence ends after this token (or one of these); None: never.
            diffusion_weight: w, 0 <= w < 1. Above 0 an ensemble verifies: log p = (1 - w) log p_AR + w log p_diffusion,
                normalised, p_diffusion being what the first mask after a token says of the same position. The output
                is then that of decoding with the ensemble, not AR's.
            top_k: see the class.
            top_p: see the class.
            repetition_penalty: see the class.
            max_thinking_tokens: when this many new tokens hold no ``end_think_token_id``, it is made the next one.
            end_think_token_id: the token that closes the thinking part; needed with ``max_thinking_tokens``.

        Returns:
            (int64 [1, P + N]: prompt and new tokens, N <= ``max_new_tokens``; number of forward evaluations, at most N)

        Raises:
            ValueError: an argument is out of its range; the message names it and its value.
        """
        budget = _ThinkingBudget(max_thinking_tokens, end_think_token_id, self.config.vocab_size)
        block_length = self.config.block_size if block_length is None else block_length
        _check_integer("block_length", block_length, 1)
        if not 0.0 <= diffusion_weight < 1.0:
            raise ValueError(f"diffusion_weight: {diffusion_weight}; it must be at least 0 (AR verifies) and below 1")
        sampling = _Sampling(temperature, top_k, top_p, repetition_penalty)
        stop_ids = self._check_arguments(
            prompt_ids, None, max_new_tokens, eos_token_id, method="quadratic_spec_generate"
        )
        new_ids = prompt_ids[:, :0]
        with _Session(self, None) as session:
            # The cache holds every token but those of `known`: the prompt at first, then the last token.
            known, drafts, draft_scores = prompt_ids, prompt_ids[:, :0], None
            while True:
                num_rows = drafts.shape[1] + 1  # each row verified may give one token
                num_left = max_new_tokens - new_ids.shape[1]
                # A group is laid out where its drafts would have room behind the token that takes its first place.
                num_groups = num_rows if diffusion_weight > 0.0 else max(0, min(num_rows, num_left - 2))
                logits, group_logits = session.speculate(
                    torch.cat([known, drafts], dim=1), num_rows, num_groups, block_length
                )
                if diffusion_weight > 0.0:
                    logits = (1.0 - diffusion_weight) * logits.log_softmax(-1)
                    logits = logits + diffusion_weight * group_logits[:, 0].log_softmax(-1)
                history = torch.cat([prompt_ids, new_ids], dim=1)
                num_kept, following = _verify(sampling, history, drafts, draft_scores, logits)
                session.crop(drafts.shape[1] - num_kept + num_groups * block_length)
                following = budget.enforce(torch.cat([new_ids, drafts[:, :num_kept]], dim=1), following)
                found = torch.cat([drafts[:, :num_kept], following[:, None]], dim=1)
                new_ids, is_finished = _append(new_ids, found, stop_ids)
                if on_update is not None:
                    on_update(new_ids, session.num_forwards)
                num_left = budget.limit(new_ids, max_new_tokens - new_ids.shape[1])
                if is_finished or num_left == 0:
                    break
                known, drafts, draft_scores = new_ids[:, -1:], new_ids[:, :0], None
                num_drafts = min(block_length, num_left) - 1
                if num_drafts > 0:
                    history = torch.cat([prompt_ids, new_ids], dim=1)
                    draft_scores = sampling.scores(group_logits[num_kept, 1 : num_drafts + 1], history)
                    drafts = sampling.choose(draft_scores)[None]
            return torch.cat([prompt_ids, new_ids], dim=1), session.num_forwards

    def _kernel_mask(self, attention_mask: Tensor) -> Tensor:
        """A bool mask [B or 1, 1, Q, K] in the form the attention kernel takes; an additive one as it is."""
        if attention_mask.dtype != torch.bool or self.config._attn_implementation != "eager":
            return attention_mask
        dtype = self.encoder.embed_tokens.weight.dtype
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)

    def _check_arguments(
        self,
        prompt_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None,
        method: str | None = None,
    ) -> Tensor | None:
        """Refuse what cannot be decoded; the eos tokens as int64 [number of them], or None.

        ``method`` names the caller where that takes one sequence only.
        """
        if prompt_ids.dim() != 2 or prompt_ids.dtype != torch.int64 or prompt_ids.numel() == 0:
            raise ValueError(
                f"prompt_ids: {prompt_ids.dtype} of shape {tuple(prompt_ids.shape)}; "
                "it must be int64 [sequences, tokens] with at least one token"
            )
        for name, token_id in (("smallest", int(prompt_ids.min())), ("largest", int(prompt_ids.max()))):
            if not 0 <= token_id < self.config.vocab_size:
                raise ValueError(f"prompt_ids: {name} id {token_id}; ids lie in 0..{self.config.vocab_size - 1}")
        if (prompt_ids == self.config.mask_token_id).any():
            raise ValueError(
                f"prompt_ids: holds the mask token {self.config.mask_token_id}; a prompt has no open positions"
            )
        if method is not None and len(prompt_ids) != 1:
            raise ValueError(f"prompt_ids: {len(prompt_ids)} sequences; {method} continues one at a time")
        _check_integer("max_new_tokens", max_new_tokens, 1)
        if attention_mask is not None:
            if attention_mask.shape != prompt_ids.shape:
                raise ValueError(
                    f"attention_mask: shape {tuple(attention_mask.shape)}; "
                    f"it must be that of prompt_ids, {tuple(prompt_ids.shape)}"
                )
            is_token = attention_mask.bool()
            if not is_token[:, -1].all() or (is_token[:, :-1] & ~is_token[:, 1:]).any():
                raise ValueError(
                    "attention_mask: padding inside or right of a prompt; pad on the left (padding_side='left')"
                )
        if eos_token_id is None:
            return None
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        if not ids or not all(isinstance(i, int) and 0 <= i < self.config.vocab_size for i in ids):
            raise ValueError(
                f"eos_token_id: {eos_token_id}; it must be ids in 0..{self.config.vocab_size - 1}, or None"
            )
        return torch.tensor(ids, device=prompt_ids.device)


class _Session:
    """One decoding call: its cache, its padding, its count of forwards, and the model put into decoding state.

    As a context it runs without gradients, in evaluation mode and with adapters off; what it changed it restores.
    """

    def __init__(self, model: NemotronLabsDiffusionModel, attention_mask: Tensor | None) -> None:
        self.model = model
        self.num_forwards = 0
        self._cache = DynamicCache(config=model.config)
        # [B, K] of what is cached; None where no row is padding, which saves the kernel a mask.
        self._is_token = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        self._num_padding = 0 if self._is_token is None else (~self._is_token).sum(dim=1, keepdim=True)
        self._no_grad = torch.no_grad()
        self._was_training = [module for module in model.modules() if module.training]
        self._adapters = _active_adapters(model)
        self._trained = [p for layer in self._adapters for p in layer.parameters() if p.requires_grad]
        self._frozen = [p for layer in self._adapters for p in layer.parameters() if not p.requires_grad]

    def __enter__(self) -> Self:
        self._no_grad.__enter__()
        self.model.eval()
        self._enable_adapters(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._enable_adapters(True)
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for parameter in self._frozen:  # peft makes adapters trainable when it switches them on
            parameter.requires_grad_(False)
        for module in self._was_training:
            module.training = True
        self._no_grad.__exit__(kind, error, trace)

    def causal(self, tokens: Tensor, num_logits: int) -> Tensor:
        """Read ``tokens`` int64 [B, Q] left to right and keep them in the cache; fp32 logits of the last rows.

        The first call reads the prompt, the one with padding. Returns [B, num_logits, V]; with 0 the head is not run.
        """
        is_token = self._is_token
        if is_token is not None and self._cache.get_seq_length() > 0:
            is_token = torch.cat([is_token, is_token.new_ones(tokens.shape)], dim=1)
        logits = self._evaluate(tokens, is_token, num_logits)
        self._is_token = is_token
        return logits

    def bidirectional(self, tokens: Tensor, is_draft: bool = False) -> Tensor:
        """Evaluate a block int64 [B, Q] that sees the cache and all of itself; the cache stays as it was.

        Returns fp32 logits [B, Q, V]: row i predicts position i itself (no shift). ``is_draft`` switches adapters on.
        """
        num_cached = self._cache.get_seq_length()
        num_rows = tokens.shape[1]
        if self._is_token is None:
            allowed = torch.ones(1, 1, num_rows, num_cached + num_rows, dtype=torch.bool, device=tokens.device)
        else:
            is_token = torch.cat([self._is_token, self._is_token.new_ones(tokens.shape)], dim=1)
            allowed = is_token[:, None, None, :].expand(-1, 1, num_rows, -1)
        if is_draft:
            self._enable_adapters(True)
        logits = self._evaluate(tokens, self.model._kernel_mask(allowed), num_rows)
        if is_draft:
            self._enable_adapters(False)
        self.crop(num_rows)
        return logits

    def speculate(self, tokens: Tensor, num_read: int, num_groups: int, group_length: int) -> tuple[Tensor, Tensor]:
        """Read ``tokens`` int64 [1, Q] left to right, and groups of masks after some of them, in one forward.

        Group g stands behind row Q - num_read + g: its masks take the places after that row, and see the cache, the
        tokens up to that row, and one another. Tokens and groups are all left in the cache, the groups last.

        Returns:
            fp32 logits of the last ``num_read`` tokens [num_read, V] and of the groups [num_groups, group_length, V]
        """
        num_tokens, device = tokens.shape[1], tokens.device
        if num_groups == 0:
            return self.causal(tokens, num_read)[0], tokens.new_zeros(0, group_length, 0, dtype=torch.float32)
        num_cached = self._cache.get_seq_length()
        rows = torch.arange(num_tokens, device=device)
        owners = torch.arange(num_groups, device=device).repeat_interleave(group_length)
        last_seen = torch.cat([rows, owners + (num_tokens - num_read)])
        offsets = torch.arange(1, group_length + 1, device=device).repeat(num_groups)
        places = num_cached + last_seen + torch.cat([torch.zeros_like(rows), offsets])
        of_group = torch.cat([torch.full_like(rows, -1), owners])
        allowed = torch.cat(
            [
                torch.ones(len(last_seen), num_cached, dtype=torch.bool, device=device),
                rows[None, :] <= last_seen[:, None],
                of_group[:, None] == owners[None, :],
            ],
            dim=1,
        )
        masks = tokens.new_full((1, len(owners)), self.model.config.mask_token_id)
        logits = self._evaluate(
            torch.cat([tokens, masks], dim=1),
            self.model._kernel_mask(allowed[None, None]),
            num_read + len(owners),
            places[None],
        )[0]
        return logits[:num_read], logits[num_read:].unflatten(0, (num_groups, group_length))

    def crop(self, num_rows: int) -> None:
        """Forget the last ``num_rows`` rows of the cache."""
        if num_rows:
            self._cache.crop(-num_rows)  # negative: the form all transformers 5 share
            if self._is_token is not None:
                self._is_token = self._is_token[:, : self._cache.get_seq_length()]

    def _evaluate(
        self, tokens: Tensor, attention_mask: Tensor | None, num_logits: int, position_ids: Tensor | None = None
    ) -> Tensor:
        if position_ids is None:
            num_cached = self._cache.get_seq_length()
            position_ids = torch.arange(num_cached, num_cached + tokens.shape[1], device=tokens.device)[None]
            position_ids = (position_ids - self._num_padding).clamp_min(0)
        self.num_forwards += 1
        hidden = self.model.encoder(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{_CACHE: self._cache},
        ).last_hidden_state
        logits = self.model.diffusion_head(hidden[:, hidden.shape[1] - num_logits :]).float()
        logits[..., self.model.config.mask_token_id] = -torch.inf  # the mask token is never an answer
        return logits

    def _enable_adapters(self, enabled: bool) -> None:
        for layer in self._adapters:
            layer.enable_adapters(enabled)


class _ThinkingBudget:
    """Closes the thinking part after ``max_thinking_tokens`` new tokens; does nothing when that is None."""

    def __init__(self, max_thinking_tokens: int | None, end_think_token_id: int | None, vocab_size: int) -> None:
        if (max_thinking_tokens is None) != (end_think_token_id is None):
            raise ValueError(
                f"max_thinking_tokens: {max_thinking_tokens}, end_think_token_id: {end_think_token_id}; "
                "give both or none"
            )
        if max_thinking_tokens is not None:
            _check_integer("max_thinking_tokens", max_thinking_tokens, 0)
        if end_think_token_id is not None and not 0 <= end_think_token_id < vocab_size:
            raise ValueError(f"end_think_token_id: {end_think_token_id}; ids lie in 0..{vocab_size - 1}")
        self.max_thinking_tokens = max_thinking_tokens
        self.end_think_token_id = -1 if end_think_token_id is None else end_think_token_id  # -1: is never looked at

    def is_spent(self, new_ids: Tensor) -> Tensor | None:
        """bool [B]: thinking is still open and ``new_ids`` [B, N] use the budget up; None: nowhere."""
        if self.max_thinking_tokens is None or new_ids.shape[1] < self.max_thinking_tokens:
            return None
        return new_ids.ne(self.end_think_token_id).all(dim=1)

    def enforce(self, new_ids: Tensor, token: Tensor) -> Tensor:
        """``token`` [B], which would follow ``new_ids`` [B, N], or the closing token where the budget is spent."""
        is_spent = self.is_spent(new_ids)
        return token if is_spent is None else token.masked_fill(is_spent, self.end_think_token_id)

    def limit(self, new_ids: Tensor, num_left: int) -> int:
        """How many tokens may follow before the budget has to be looked at again, at most ``num_left``."""
        if self.max_thinking_tokens is None or new_ids.shape[1] > self.max_thinking_tokens:
            return num_left
        return min(num_left, self.max_thinking_tokens - new_ids.shape[1] + 1)


def _active_adapters(model: nn.Module) -> list[Any]:
    """The layers of ``model`` with a PEFT adapter that is switched on."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # never imported: nothing can be attached
    if tuners is None:
        return []
    return [
        layer for layer in model.modules() if isinstance(layer, tuners.BaseTunerLayer) and not layer.disable_adapters
    ]


def _check_integer(name: str, value: int, smallest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{name}: {value!r}; it must be an integer of at least {smallest}")


class _Sampling:
    """How a token is chosen from logits: transformers' processors, in the order in which its ``generate`` applies them.

    At temperature 0 only the repetition penalty plays a part.
    """

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature: {temperature}; it must be 0 (greedy) or a positive number")
        if top_k is not None:
            _check_integer("top_k", top_k, 1)
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p: {top_p}; it must be above 0 and at most 1, or None")
        if not 0.0 < repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty: {repetition_penalty}; it must be a positive number, 1 for none")
        self.is_greedy = temperature == 0.0
        self._processors: list[Any] = []
        if repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        if self.is_greedy:
            return
        self._processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            self._processors.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            self._processors.append(TopPLogitsWarper(top_p))

    def scores(self, logits: Tensor, history: Tensor) -> Tensor:
        """Processed logits fp32 [rows, V]; ``history`` int64 [rows or 1, T]: the tokens a penalty is for."""
        history = history.expand(len(logits), -1)
        for processor in self._processors:
            logits = processor(history, logits)
        return logits

    def choose(self, scores: Tensor) -> Tensor:
        """int64 [rows]: the best token of each row of ``scores`` [rows, V], or a draw."""
        return scores.argmax(dim=-1) if self.is_greedy else scores.softmax(dim=-1).multinomial(1)[:, 0]


def _without_padding(prompt_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``prompt_ids`` with the row's last token in place of padding: a history in which padding does not count."""
    return prompt_ids if attention_mask is None else torch.where(attention_mask.bool(), prompt_ids, prompt_ids[:, -1:])


def _append(new_ids: Tensor, found: Tensor, stop_ids: Tensor | None) -> tuple[Tensor, bool]:
    """``new_ids`` [1, N] and ``found`` [1, n] behind them, up to the first eos token; whether there is one."""
    new_ids = torch.cat([new_ids, found], dim=1)
    if stop_ids is None or not torch.isin(found, stop_ids).any():
        return new_ids, False
    return new_ids[:, : _longest(new_ids, stop_ids)], True


def _candidates(logits: Tensor, sampling: _Sampling, history: Tensor) -> tuple[Tensor, Tensor]:
    """A token for each position, int64 [B, Q], and its probability in softmax(``logits``), fp32 [B, Q]."""
    history = history.repeat_interleave(logits.shape[1], dim=0)
    tokens = sampling.choose(sampling.scores(logits.flatten(0, 1), history)).view(logits.shape[:2])
    log_probability = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)
    return tokens, log_probability.exp()


def _commit(confidence: Tensor, is_open: Tensor, threshold: float, steps_left: int, is_limited: bool) -> Tensor:
    """bool [B, Q]: the open positions that pass ``threshold``, and in each row at least the surest.

    With ``is_limited`` at least so many of the surest that ``steps_left`` equal shares fill the block.
    """
    ranked = confidence.masked_fill(~is_open, -1.0)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    share: int | Tensor = 1
    if is_limited:
        share = (is_open.sum(dim=1, keepdim=True) + steps_left - 1) // steps_left
    return is_open & ((confidence >= threshold) | (rank < share))


def _end_rows(block: Tensor, is_open: Tensor, stop_ids: Tensor) -> Tensor:
    """bool [B]: rows with an eos token behind which nothing matters any more; fills and closes what follows it.

    ``block`` int64 and ``is_open`` bool [B, Q] are changed in place.
    """
    is_end = torch.isin(block, stop_ids) & (is_open.cumsum(dim=1) == 0)
    is_after = is_end.cumsum(dim=1) - is_end.long() > 0
    block[is_after] = stop_ids[0]
    is_open &= ~is_after
    return is_end.any(dim=1)


def _longest(new_ids: Tensor, stop_ids: Tensor) -> int:
    """Columns of ``new_ids`` [B, N] up to and including the first eos token, of the row where that is furthest."""
    is_before = torch.isin(new_ids, stop_ids).cumsum(dim=1) == 0
    return int((is_before.sum(dim=1) + 1).clamp_max(new_ids.shape[1]).max())


def _verify(
    sampling: _Sampling, history: Tensor, drafts: Tensor, draft_scores: Tensor | None, logits: Tensor
) -> tuple[int, Tensor]:
    """How many drafts the verifier takes, and its own token after them.

    Args:
        sampling: the verifier's; at temperature 0 drafts are compared, above 0 kept by the rejection rule.
        history: int64 [1, T], the tokens before the drafts.
        drafts: int64 [1, n].
        draft_scores: fp32 [n, V], what the drafts were drawn from; None where n = 0.
        logits: fp32 [n + 1, V], the verifier's, after each prefix of drafts.

    Returns:
        (number of drafts kept, int64 [1])
    """
    num_drafts = drafts.shape[1]
    # Row i has seen i drafts; a token that is in the history anyway stands for the others.
    steps = torch.arange(num_drafts + 1, device=drafts.device)
    seen = torch.where(steps[None, :num_drafts] < steps[:, None], drafts, history[:, -1:])
    scores = sampling.scores(logits, torch.cat([history.expand(num_drafts + 1, -1), seen], dim=1))
    if sampling.is_greedy or draft_scores is None:
        target = sampling.choose(scores)
        num_kept = int((drafts[0] == target[:-1]).cumprod(dim=0).sum())
        return num_kept, target[num_kept : num_kept + 1]
    num_kept, following = _speculative_sample(drafts[0], draft_scores.softmax(-1), scores.softmax(-1))
    return num_kept, following[None]


def _speculative_sample(
    drafts: Tensor, draft_probabilities: Tensor, target_probabilities: Tensor
) -> tuple[int, Tensor]:
    """Keep or refuse drafts so that what comes out is distributed as the target.

    Args:
        drafts: int64 [n], drawn from ``draft_probabilities``.
        draft_probabilities: fp32 [n, V], q.
        target_probabilities: fp32 [n + 1, V], p after each prefix of drafts.

    Returns:
        (number of drafts kept, int64 []: the token that follows them)
    """
    num_drafts = len(drafts)
    p = target_probabilities[:num_drafts].gather(1, drafts[:, None])[:, 0]
    q = draft_probabilities.gather(1, drafts[:, None])[:, 0]
    is_kept = torch.rand_like(q) * q < p
    num_kept = int(is_kept.cumprod(dim=0).sum())
    remainder = target_probabilities[num_kept]
    if num_kept < num_drafts:
        difference = (remainder - draft_probabilities[num_kept]).clamp_min(0.0)
        if difference.sum() > 0:  # 0 only where p and q are equal up to rounding: then p is the right distribution
            remainder = difference
    return num_kept, remainder.multinomial(1)[0]


__all__ = ["NemotronLabsDiffusionModel"]
