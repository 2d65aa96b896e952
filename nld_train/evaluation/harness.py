"""lm-evaluation-harness on exported models: the model ``nld``, for all ways of decoding.

Needs lm-eval, which is an optional dependency (``pip install 'nld-train[eval]'``). Importing this module registers the
model, for ``lm_eval.simple_evaluate(model="nld", model_args={"pretrained": FOLDER, "mode": "linear"}, ...)``.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nld_train.errors import DataError
from nld_train.evaluation.decoding import DecodingMode, decode, load_export
from nld_train.evaluation.likelihood import sample_bound
from nld_train.evaluation.reader import CleanPrefix

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise DataError(
        "lm-eval", f"cannot be imported: {error}", "pip install 'nld-train[eval]', or leave out the harness suite"
    ) from error


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks give the number of new tokens."""


@register_model("nld")
class NLDHarnessModel(LM):  # type: ignore[misc]
    """An exported model in lm-eval.

    Likelihoods are AR's in the modes ar, linear and quadratic, which decode the same distribution; in the mode
    diffusion they are the diffusion bound, estimated in ``num_sweeps`` sweeps over all counts, with blocks counted from
    the end of the context as in decoding. Requests are answered one at a time.

    Args:
        pretrained: exported folder; or give ``model`` and ``tokenizer``.
        mode: a :class:`~nld_train.evaluation.decoding.DecodingMode`.
        block_length: tokens per block or draft; None: the model's block size.
        threshold: of the mode diffusion.
        num_sweeps: of the bound.
        max_length: longest text, context and continuation; longer contexts lose their beginning. None: what the model's
            configuration allows.
        max_gen_toks: new tokens where the task does not say.
        seed: of the bound's masks and of sampling.
        device, dtype: of ``pretrained``; dtype ``fp32`` or ``bf16``, None: as stored.
        batch_size, max_batch_size: lm-eval passes them; only 1.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        mode: str = "ar",
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        block_length: int | None = None,
        threshold: float = 0.9,
        num_sweeps: int = 2,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if str(batch_size or 1) != "1" or (max_batch_size or 1) != 1:
            raise ValueError(f"batch_size: {batch_size}, max_batch_size: {max_batch_size}; only 1 is supported")
        if dtype not in (None, "fp32", "bf16"):
            raise ValueError(f"dtype: {dtype!r}; give fp32 or bf16, or leave it out")
        if model is None or tokenizer is None:
            if pretrained is None:
                raise ValueError("pretrained: not given; name an exported folder")
            chosen = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[dtype]
            model, tokenizer = load_export(pretrained, device or "cpu", chosen)
        self.mode = DecodingMode(mode)
        self.tokenizer = tokenizer
        self._model = model
        self._block_length = block_length or model.config.block_size
        self._threshold = threshold
        self._num_sweeps = num_sweeps
        self._max_length = max_length or model.config.max_position_embeddings
        self._max_gen_toks = max_gen_toks
        self._seed = seed

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p of the latter, and whether greedy decoding in this mode gives it."""
        return [self._score(*self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each whole text, in windows of ``max_length``."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self._encode(request.args[0]),
                prefix_token=self._prefix_token(),
                max_seq_len=self._max_length - 1,
                context_len=1,
            )
            totals.append(math.fsum(self._score(*pair)[0] for pair in map(make_disjoint_window, windows)))
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continue each context up to the first of its stop strings."""
        torch.manual_seed(self._seed)
        return [self._continue(context, dict(arguments)) for context, arguments in (r.args for r in requests)]

    def _continue(self, context: str, arguments: dict[str, Any]) -> str:
        until = arguments.pop("until", None) or []
        stops = [until] if isinstance(until, str) else list(until)
        lengths = {name: int(arguments.pop(name)) for name in _LENGTHS if name in arguments}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"generation_kwargs: {lengths} contradict one another; give one of them")
        max_new_tokens = next(iter(lengths.values()), self._max_gen_toks)
        temperature = float(arguments.pop("temperature", None) or 0.0)
        if not arguments.pop("do_sample", temperature > 0.0):
            temperature = 0.0
        known = {name: arguments.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in arguments}
        if arguments:
            raise ValueError(f"generation_kwargs: {', '.join(arguments)} are not supported by the model nld")
        if max_new_tokens >= self._max_length:
            raise ValueError(f"max_gen_toks: {max_new_tokens}; it must be below max_length, {self._max_length}")
        prompt = (self._encode(context) or [self._prefix_token()])[-(self._max_length - max_new_tokens) :]
        output_ids, _ = decode(
            self._model,
            torch.tensor([prompt], device=self._model.device),
            self.mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=self.tokenizer.eos_token_id,
            block_length=self._block_length,
            threshold=self._threshold,
            **known,
        )
        text = str(self.tokenizer.decode(output_ids[0, len(prompt) :].tolist(), skip_special_tokens=True))
        ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _prefix_token(self) -> int:
        """What stands before a text without context."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise DataError("tokenizer", "has neither bos nor eos for a text without context", "export with one that has")

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both; they are tokenised together, and spaces at the end of the context go with the continuation."""
        if not context:
            return [self._prefix_token()], self._encode(continuation)
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        context_ids = self._encode(stripped)
        both = self._encode(stripped + continuation)
        return both[: len(context_ids)] or [self._prefix_token()], both[len(context_ids) :]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        context = context[-max(1, self._max_length - len(continuation)) :]
        token_ids = torch.tensor(context + continuation, device=self._model.device)
        wanted = token_ids[len(context) :]
        prefix = CleanPrefix(self._model)
        log_p = prefix.read(token_ids)[len(context) - 1 : -1]
        if self.mode is not DecodingMode.diffusion:
            total = log_p.gather(1, wanted[:, None]).double().sum().item()
            return total, bool((log_p.argmax(dim=-1) == wanted).all())
        sample = sample_bound(
            self._model,
            prefix,
            token_ids,
            self._block_length,
            self._num_sweeps,
            torch.Generator().manual_seed(self._seed),
            first=len(context),
            num_given=len(context),
        )
        output_ids, _ = decode(
            self._model,
            token_ids[None, : len(context)],
            self.mode,
            max_new_tokens=len(continuation),
            block_length=self._block_length,
            threshold=self._threshold,
        )
        return -sample.nats.mean(dim=0).sum().item(), bool((output_ids[0, len(context) :] == wanted).all())


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    mode: str,
    task_folder: Path | None = None,
    limit: int | None = None,
    **model_arguments: Any,
) -> dict[str, dict[str, Any]]:
    """Evaluate tasks in one mode: {task: {metric: value}}.

    Args:
        tasks: names that lm-eval knows, or that YAML files in ``task_folder`` define.
        task_folder: with it only tasks from there are looked for, which needs no network.
        limit: documents of a task; None: all.
        **model_arguments: of :class:`NLDHarnessModel`.

    Raises:
        DataError: no task is named, or one is unknown.
    """
    if not tasks:
        raise DataError("--tasks", "the harness suite needs at least one task", "name tasks, e.g. --tasks hellaswag")
    manager = TaskManager(
        include_path=None if task_folder is None else str(task_folder), include_defaults=task_folder is None
    )
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        where = "lm-eval" if task_folder is None else str(task_folder)
        raise DataError("--tasks", f"{where} has no task {', '.join(unknown)}", "check the names, or --task-folder")
    adapter = NLDHarnessModel(model=model, tokenizer=tokenizer, mode=mode, **model_arguments)
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    return {
        task: {metric: value for metric, value in metrics.items() if metric not in ("alias", "name", "sample_len")}
        for task, metrics in found["results"].items()
    }
