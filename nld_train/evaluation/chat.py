"""An interactive session with an exported model: modes can be switched, and decoding is shown as it goes on."""

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nld_train.evaluation.decoding import DecodingMode, decode

HELP = """/mode ar|diffusion|linear|quadratic   how to decode
/set NAME VALUE                       max_new_tokens, block_length, threshold, temperature, top_k, top_p,
                                      repetition_penalty (none: the default)
/reset                                forget the conversation
/help                                 this
/quit                                 leave (or end of input)"""

OPEN = "░"
"""Stands for a position that is not settled yet."""

_SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int,
    "block_length": int,
    "threshold": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
}


class ChatSession:
    """A conversation, and the mode and settings that the next answer is decoded with.

    Where the tokenizer has a chat template, turns go through it; where it has none, the model continues what stands
    there so far: what was typed and what it answered.

    Args:
        model, tokenizer: of :func:`~nld_train.evaluation.decoding.load_export`.
        mode: to begin with.
        console: on a terminal the answer is drawn while it is decoded; elsewhere it is printed when it is there.
        **settings: arguments of :func:`~nld_train.evaluation.decoding.decode`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        mode: DecodingMode | str,
        console: Console,
        **settings: Any,
    ) -> None:
        self.mode = DecodingMode(mode)
        self.settings = settings
        self.messages: list[dict[str, str]] = []
        self._model = model
        self._tokenizer = tokenizer
        self._console = console

    def run(self, read: Callable[[str], str] = input) -> None:
        """Read lines until /quit or the end of the input; a wrong line is answered with what is wrong."""
        self._console.print(f"{HELP}\n", markup=False, highlight=False)
        while True:
            try:
                line = read(f"[{self.mode.value}] > ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._say(self.command(line))
                elif line:
                    self.answer(line)
            except ValueError as error:
                self._say(f"error: {error}")
            except KeyboardInterrupt:
                self._say("(stopped)")

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; what to tell the user.

        Raises:
            ValueError: there is no such command, or its value is wrong.
        """
        name, *values = line.split()
        if name == "/help" and not values:
            return HELP
        if name == "/reset" and not values:
            self.messages.clear()
            return "a new conversation"
        if name == "/mode" and len(values) == 1:
            self.mode = DecodingMode(values[0])
            return f"mode {self.mode.value}"
        if name == "/set" and len(values) == 2 and values[0] in _SETTINGS:
            if values[1] == "none":
                self.settings.pop(values[0], None)
            else:
                self.settings[values[0]] = _SETTINGS[values[0]](values[1])
            return " ".join(f"{key}={value}" for key, value in self.settings.items() if value is not None)
        raise ValueError(f"{line!r}: no such command; /help lists them")

    def answer(self, text: str) -> str:
        """Answer one turn, shown as it is decoded, and keep both in the conversation.

        Raises:
            ValueError: a setting is out of its range; the conversation is then as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        prompt_ids = self._tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with Live(console=self._console, auto_refresh=False, transient=True) as live:

            def show(new_ids: Tensor, num_forwards: int) -> None:
                if self._console.is_terminal:
                    live.update(self._picture(new_ids[0].tolist(), num_forwards), refresh=True)

            output_ids, num_forwards = decode(
                self._model,
                prompt_ids.to(device=self._model.device, dtype=torch.int64),
                self.mode,
                on_update=show,
                **{name: value for name, value in self.settings.items() if value is not None},
            )
        token_ids = output_ids[0, prompt_ids.shape[1] :].tolist()
        answer = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._say(answer)
        self._say(self._status(len(token_ids), num_forwards))
        return answer

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        if self._tokenizer.chat_template is None:
            return "".join(message["content"] for message in messages)
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _picture(self, token_ids: list[int], num_forwards: int) -> Text:
        """The answer so far, open positions as :data:`OPEN`, and what it cost."""
        mask_token_id = self._model.config.mask_token_id
        picture = Text()
        settled: list[int] = []
        for token_id in [*token_ids, mask_token_id]:
            if token_id != mask_token_id:
                settled.append(token_id)
                continue
            picture.append(str(self._tokenizer.decode(settled, skip_special_tokens=True)))
            picture.append(OPEN, style="dim")
            settled = []
        picture.right_crop(1)  # the one behind the last token only ends the loop
        num_settled = sum(token_id != mask_token_id for token_id in token_ids)
        picture.append(f"\n{self._status(num_settled, num_forwards)}", style="dim")
        return picture

    def _status(self, num_tokens: int, num_forwards: int) -> str:
        rate = num_tokens / num_forwards
        return f"[{self.mode.value}] {num_tokens} tokens, {num_forwards} forwards, {rate:.2f} tokens per forward"

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
