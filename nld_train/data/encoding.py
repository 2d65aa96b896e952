"""Text to token ids, as fast as the tokenizer allows: what looks like a special token in a text stays text.

Tokenizers of the Tekken kind (a regular expression, then byte-level BPE by rank) are run by tiktoken, several times as
fast as by the tokenizers library; all others by the latter. Where tiktoken is used, the
tokenizers library stays the reference: :func:`check_encoder` compares the two before anything is written.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer

from nld_train.errors import DataError

# tiktoken's regular expressions overflow their stack in a run of about a million characters of white space. A text that
# could hold one is searched first; the reference has no such limit.
_LONG_TEXT = 100_000
_LONG_SPACE = re.compile(r"\s{50000}")

HARD_CASES = (
    "",
    " ",
    "\n\n \t\r\n",
    "\x00\x1f\x7f",
    "naïve café, ŁÓDŹ ǅ ʰ 日本語のテキスト 한국어 עברית العربية हिन्दी",
    "e\u0301 \u200d\u00ad\ufeff 🙂👩‍👩‍👧‍👦 🇩🇪 𝕏 \U000e0041",
    "don't DON'T I'll camelCaseWORDS snake_case __init__ 12345 1.5e-3 ½ ² Ⅳ",
    "    def f(x):\n\treturn x  # ...\n\n\n\n/// --- ===\r\n\r\n",
    "a" * 3000,
    " " * 3000,
    "ab " * 1000,
    "\n" * 3000,
    "=-" * 1500,
    "x/\n/\n//\n",
)
"""Texts on which tokenizers like to differ."""


class TextEncoder:
    """The encoder of a tokenizer.json.

    Args:
        tokenizer_json: its content.
        location: of the tokenizer, for messages.
    """

    def __init__(self, tokenizer_json: str, location: str) -> None:
        self._json = tokenizer_json
        self.location = location
        raw = json.loads(tokenizer_json)
        added = raw.get("added_tokens") or []
        self.special_ids = {token["content"]: int(token["id"]) for token in added if token["special"]}
        """Special tokens by their text."""
        ids = [*_vocabulary_ids(raw), *(int(token["id"]) for token in added)]
        self.vocab_size = max(ids) + 1
        self._reference: Tokenizer | None = None
        self._fast = _tekken_encoding(raw)
        # Ids of ordinary tokens begin behind the special ones in this kind of tokenizer.
        self._first_id = 0 if self._fast is None else self._fast[1]

    def __getstate__(self) -> dict[str, Any]:
        # Another process makes the reference when it needs one: it would travel as text, and be parsed again.
        return self.__dict__ | {"_reference": None}

    @classmethod
    def from_folder(cls, folder: Path) -> "TextEncoder":
        """Raises DataError: the folder has no tokenizer.json, or it is no JSON."""
        path = folder / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                str(path), f"cannot be read: {error}", "name a Hugging Face tokenizer folder with a tokenizer.json"
            ) from error

    def end_token_id(self, folder: Path) -> int:
        """Id of the end-of-text token that the folder's configuration names.

        Raises:
            DataError: it names none, or one that the tokenizer does not have.
        """
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name
            if not path.is_file():
                continue
            try:
                token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            except (ValueError, AttributeError) as error:
                raise DataError(str(path), f"cannot be read: {error}", "repair the tokenizer folder") from error
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                number = self.special_ids.get(token)
                if number is None:
                    raise DataError(
                        str(path),
                        f"names the end token {token!r}, which is none of its special tokens",
                        'correct the name, or make it "special": true in the added_tokens of tokenizer.json: a text '
                        "that spells it would end its document",
                    )
                return int(number)
        raise DataError(
            str(folder),
            "the tokenizer has no end-of-text token, which has to end every document",
            'name one as "eos_token" in its tokenizer_config.json',
        )

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken does the work."""
        return self._fast is not None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [tokens]; nothing is added before or behind."""
        if self._fast is None:
            return self.encode_reference(texts)
        return [self._encode_fast(text) for text in texts]

    def encode_reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same by the tokenizers library."""
        if self._reference is None:
            self._reference = Tokenizer.from_str(self._json)
            self._reference.no_truncation()
            self._reference.no_padding()
            self._reference.encode_special_tokens = True  # "encode them as ordinary text"
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _encode_fast(self, text: str) -> np.ndarray:
        assert self._fast is not None
        if len(text) > _LONG_TEXT and _LONG_SPACE.search(text):
            return self.encode_reference([text])[0]
        ids = self._fast[0].encode_ordinary(text)
        tokens = np.fromiter(ids, dtype=np.int64, count=len(ids))
        tokens += self._first_id
        return tokens


def check_encoder(encoder: TextEncoder, sample: Sequence[str]) -> None:
    """Compare the fast path with the reference on ``sample`` and hard cases; see that text never becomes special.

    Raises:
        DataError: they differ, or a special token that a text spells out becomes its id; says where.
    """
    spelled = [text for token in encoder.special_ids for text in (token, f"a{token}b {token}\n")]
    texts = [*sample, *HARD_CASES, *spelled]
    encoded = encoder.encode(texts)
    is_special = np.zeros(encoder.vocab_size, dtype=np.bool_)
    is_special[list(encoder.special_ids.values())] = True
    for text, ids in zip(texts, encoded, strict=True):
        found = ids[is_special[ids]]
        if len(found):
            raise DataError(
                encoder.location,
                f"the text {_shortened(text)} becomes the special token {int(found[0])}: a corpus could end its own "
                "documents",
                "use a tokenizer whose special tokens can be split in text",
            )
    if not encoder.is_fast:
        return
    for text, ids, expected in zip(texts, encoded, encoder.encode_reference(texts), strict=True):
        if not np.array_equal(ids, expected):
            length = min(len(ids), len(expected))
            differs = np.flatnonzero(ids[:length] != expected[:length])
            place = int(differs[0]) if len(differs) else length
            raise DataError(
                encoder.location,
                f"the fast path and the tokenizers library differ in {_shortened(text)} from token {place} on: "
                f"{ids[place : place + 5].tolist()} and {expected[place : place + 5].tolist()}",
                "the installed versions of tiktoken and tokenizers read this tokenizer differently; install those that "
                "the project was tested with",
            )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")


def _vocabulary_ids(raw: dict[str, Any]) -> list[int]:
    vocabulary = raw["model"]["vocab"]
    # A unigram model lists pieces with scores; the place is the id.
    return list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]


def _tekken_encoding(raw: dict[str, Any]) -> tuple[tiktoken.Encoding, int] | None:
    """tiktoken's form of a tokenizer.json that was converted from a tekken.json, and the id of its first ordinary
    token; None: the tokenizer is of another kind.

    Its marks: whole words are looked up before merges (``ignore_merges``), one regular expression splits the text,
    bytes are spelled as letters, nothing is normalised, special tokens have the first ids and all others follow in the
    order of their ranks, the 256 bytes first.
    """
    model, splitter = raw["model"], raw.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", []) if splitter.get("type") == "Sequence" else []
    if model.get("type") != "BPE" or not model.get("ignore_merges") or raw.get("normalizer") is not None:
        return None
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, bytes_ = steps
    pattern = split["pattern"].get("Regex")
    if pattern is None or split["behavior"] != "Isolated" or split["invert"] or bytes_["use_regex"]:
        return None
    if bytes_["add_prefix_space"] or model.get("dropout") or model.get("byte_fallback"):
        return None
    special = {int(token["id"]) for token in raw.get("added_tokens") or []}
    if any(not token["special"] for token in raw.get("added_tokens") or []) or special != set(range(len(special))):
        return None
    ordinary = {token: number for token, number in model["vocab"].items() if number not in special}
    letters = _byte_of_letter()
    if not letters.keys() >= set("".join(ordinary)):
        return None
    table = str.maketrans({letter: chr(byte) for letter, byte in letters.items()})
    ranks = {token.translate(table).encode("latin-1"): number - len(special) for token, number in ordinary.items()}
    if sorted(ranks.values()) != list(range(len(ordinary))) or any(bytes([byte]) not in ranks for byte in range(256)):
        return None
    encoding = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding, len(special)


def _byte_of_letter() -> dict[str, int]:
    """Byte-level tokenizers spell a byte as a visible letter: printable ones of Latin-1 as themselves, the others, in
    order, as the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    letters.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return letters
