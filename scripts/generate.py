"""Continue a prompt with an exported model: ``generate.py --model runs/tiny/hf --prompt "def main(" --mode all``,
or talk to it: ``generate.py --model runs/tiny/hf --chat``."""

import argparse
import sys

import torch
from rich.console import Console

from nld_train.errors import NLDError
from nld_train.evaluation.chat import ChatSession
from nld_train.evaluation.decoding import DecodingMode, continue_prompt, format_continuation, load_export

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="exported Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to continue")
    what.add_argument("--chat", action="store_true", help="an interactive session; /help lists its commands")
    parser.add_argument(
        "--mode",
        choices=[*(mode.value for mode in DecodingMode), "all"],
        help="decoding mode; all: one after the other (default: all; with --chat diffusion)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--block-length", type=int, help="tokens per block or draft (default: the model's block size)")
    parser.add_argument("--threshold", type=float, default=0.9, help="diffusion: commit from this probability on")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-k", type=int, help="temperature > 0: draw among so many tokens")
    parser.add_argument("--top-p", type=float, help="temperature > 0: draw among the fewest tokens of this probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="as in transformers; 1: none")
    parser.add_argument(
        "--eos", default="none", metavar="none|auto|ID", help="stop token: never, the tokenizer's own, or an id"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--seed", type=int, default=1234, help="of the random numbers, for temperature > 0")
    parsed = parser.parse_args(arguments)
    if parsed.eos not in ("none", "auto") and not parsed.eos.isdecimal():
        parser.error(f"argument --eos: {parsed.eos!r}; give none, auto or a token id")
    if parsed.chat and parsed.mode == "all":
        parser.error("argument --mode: 'all' is for --prompt; a session has one mode at a time")
    parsed.mode = parsed.mode or ("diffusion" if parsed.chat else "all")
    try:
        torch.empty(0, device=parsed.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(
            f"argument --device: {parsed.device!r} cannot be used ({str(error).splitlines()[0]}); give cpu or cuda"
        )
    return parsed


def main() -> int:
    arguments = parse_arguments()
    try:
        model, tokenizer = load_export(arguments.model, arguments.device, DTYPES.get(arguments.dtype))
        if arguments.eos == "none":
            eos_token_id = None
        elif arguments.eos == "auto":
            eos_token_id = tokenizer.eos_token_id
            if eos_token_id is None:
                raise ValueError("--eos auto: the tokenizer of this model has no end-of-sequence token; give its id")
        else:
            eos_token_id = int(arguments.eos)
        settings = {
            "max_new_tokens": arguments.max_new_tokens,
            "block_length": arguments.block_length,
            "threshold": arguments.threshold,
            "temperature": arguments.temperature,
            "top_k": arguments.top_k,
            "top_p": arguments.top_p,
            "repetition_penalty": arguments.repetition_penalty,
            "eos_token_id": eos_token_id,
        }
        if arguments.chat:
            torch.manual_seed(arguments.seed)
            ChatSession(model, tokenizer, arguments.mode, Console(), **settings).run()
            return 0
        for mode in DecodingMode if arguments.mode == "all" else [arguments.mode]:
            torch.manual_seed(arguments.seed)  # each mode draws the same numbers, alone or among the others
            result = continue_prompt(model, tokenizer, arguments.prompt, mode, **settings)
            print(format_continuation(result), flush=True)
            print()
    except (NLDError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
