"""A stand-in for the tokenizer class that llama.cpp's converter loads from a HunYuan checkpoint.

It has what that converter asks for and no more: tiktoken over hy.tiktoken, the special tokens in the published
order, and text in NFC before it is encoded.
"""

from __future__ import annotations

import base64
import unicodedata
from pathlib import Path
from typing import Any

import tiktoken

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = (
    *("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
    *(f"<|extra_{i}|>" for i in range(205)),
)


class HYTokenizer:
    """Ranks, special tokens and `encode`."""

    def __init__(self, folder: Path) -> None:
        lines = (line.split() for line in (folder / "hy.tiktoken").read_bytes().splitlines())
        self.mergeable_ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        self.special_tokens = {token: len(self.mergeable_ranks) + i for i, token in enumerate(SPECIALS)}
        self.vocab_size = len(self.mergeable_ranks) + len(SPECIALS)
        self._encoding = tiktoken.Encoding(
            "hy", pat_str=PATTERN, mergeable_ranks=self.mergeable_ranks, special_tokens=self.special_tokens
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **__: Any) -> HYTokenizer:
        """Read the checkpoint in `folder`."""
        return cls(Path(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens recognised."""
        return self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    @classmethod
    def register_for_auto_class(cls) -> None:
        """transformers calls this on every class that it loads from a checkpoint."""
