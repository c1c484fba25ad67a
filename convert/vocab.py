"""The vocabulary: tokens, types and merges from hy.tiktoken, hunyuan.tiktoken or tokenizer.json.

No Python of the checkpoint is run: the ranks are in the file, and the special tokens follow them in the layout
of Tencent's HYTokenizer. Text forms use GPT-2's byte alphabet, in which every byte is one printable character.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from hymoe.convert.config import read_json
from hymoe.errors import CheckpointError, UnsupportedError

TIKTOKEN_NAMES = ("hy.tiktoken", "hunyuan.tiktoken")
TOKENIZER_JSON = "tokenizer.json"

# Tencent's HYTokenizer: these follow the ranks, then <|extra_0|> and on.
SPECIALS = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")

# The pre-tokenizer that GGUF calls "hunyuan" (HYTokenizer's PAT_STR).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Generous: the released vocabulary has 2.1 MB and no token above 128 bytes.
MAX_RANKS_BYTES = 64 << 20
MAX_TOKEN_BYTES = 1024


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type` values."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True)
class Vocabulary:
    """n_vocab tokens in GGUF's text form, their types, and the BPE merges ("left right") in order of rank."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    source: str

    def id(self, token: str) -> int:
        """Give the id of a token by its text. Raises CheckpointError where the vocabulary has none."""
        try:
            return self.tokens.index(token)
        except ValueError:
            raise CheckpointError(f"{self.source}: no token {token}", fix="is this a HunYuan vocabulary?") from None


def read_vocabulary(folder: Path, n_vocab: int, n_extra: int) -> Vocabulary:
    """Read the checkpoint's vocabulary of exactly n_vocab tokens, n_extra of them <|extra_N|> tokens.

    Raises CheckpointError where no vocabulary file is there, or where it disagrees with n_vocab.
    """
    for name in TIKTOKEN_NAMES:
        if (folder / name).is_file():
            vocabulary = _from_ranks(read_ranks(folder / name), n_extra, name)
            break
    else:
        if not (folder / TOKENIZER_JSON).is_file():
            wanted = ", ".join([*TIKTOKEN_NAMES, TOKENIZER_JSON])
            raise CheckpointError(f"{folder}: vocabulary", got="none", expected=f"one of {wanted}")
        vocabulary = _from_tokenizer_json(folder / TOKENIZER_JSON)
    if len(vocabulary.tokens) != n_vocab:
        raise CheckpointError(
            f"{vocabulary.source}",
            got=f"{len(vocabulary.tokens)} tokens with the special ones",
            expected=f"vocab_size {n_vocab} of config.json",
            fix="take both files from the same repository",
        )
    return vocabulary


def read_ranks(path: Path) -> list[bytes]:
    """Read a tiktoken file: a line "base64 rank" per token, in order of rank. Returns the tokens' bytes."""
    ranks: list[bytes] = []
    try:
        if path.stat().st_size > MAX_RANKS_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        for i, line in enumerate(path.read_bytes().splitlines()):
            token, rank = line.split()
            if int(rank) != i:
                raise ValueError(f"line {i + 1} has rank {int(rank)}")
            ranks.append(base64.b64decode(token, validate=True))
            if len(ranks[-1]) > MAX_TOKEN_BYTES:
                raise ValueError(f"line {i + 1} has {len(ranks[-1])} bytes")
    except (ValueError, binascii.Error, OSError) as exc:
        raise CheckpointError(f"{path.name}: not a tiktoken file ({exc})", expected='lines of "base64 rank"') from exc
    distinct = set(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in distinct]
    if len(distinct) != len(ranks) or b"" in distinct or missing:
        what = f"no token for byte {missing[0]}" if missing else "an empty token or one that is there twice"
        raise CheckpointError(f"{path.name}: {what}", fix="download the file again")
    return ranks


def byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable ones stand for themselves, others move to U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]


def text_form() -> Callable[[bytes], str]:
    """Give a function from a token's bytes to its text form."""
    table = dict(enumerate(byte_alphabet()))
    return lambda token: token.decode("latin-1").translate(table)


def merges_of(ranks: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Recover, in order of rank, the two tokens that byte-pair encoding joins last to make each token.

    Each token is encoded from its bytes as tiktoken does, with the token itself unknown; what is left is the pair.
    Merges of higher rank take part: one real token (rank 124142) is only ever made from a later one. A token that is
    left in more than two pieces can only be met as a whole word, and is skipped.
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    for token in ranks:
        if len(token) > 1:
            pieces = _encode_without_itself(token, rank_of)
            if len(pieces) == 2:
                yield pieces[0], pieces[1]


def _encode_without_itself(token: bytes, rank_of: dict[bytes, int]) -> list[bytes]:
    pieces = [token[i : i + 1] for i in range(len(token))]
    unknown = len(rank_of)
    while len(pieces) > 2:
        best, at = unknown, 0
        left = pieces[0]
        for i in range(1, len(pieces)):
            right = pieces[i]
            rank = rank_of.get(left + right, unknown)
            if rank < best:
                best, at = rank, i
            left = right
        if best == unknown:
            break
        pieces[at - 1 : at + 1] = [pieces[at - 1] + pieces[at]]
    return pieces


def _from_ranks(ranks: list[bytes], n_extra: int, source: str) -> Vocabulary:
    text = text_form()
    specials = [*SPECIALS, *(f"<|extra_{i}|>" for i in range(n_extra))]
    return Vocabulary(
        tokens=[*map(text, ranks), *specials],
        types=[int(TokenType.NORMAL)] * len(ranks) + [int(TokenType.CONTROL)] * len(specials),
        merges=[f"{text(left)} {text(right)}" for left, right in merges_of(ranks)],
        source=source,
    )


def _from_tokenizer_json(path: Path) -> Vocabulary:
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedError(f"{path.name}: model", got=_kind(model), expected="a BPE model with a vocab")
    _check_pattern(data.get("pre_tokenizer"), path.name)
    entries = [(token_id, token, TokenType.NORMAL) for token, token_id in model["vocab"].items()]
    for added in _list(data, "added_tokens", path):
        if not isinstance(added, dict) or not isinstance(added.get("content"), str):
            raise CheckpointError(
                f"{path.name}: added_tokens", got=repr(added)[:60], expected="objects with id and content"
            )
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        entries.append((added.get("id"), added["content"], kind))
    if wrong := [token_id for token_id, _, _ in entries if type(token_id) is not int]:
        raise CheckpointError(f"{path.name}: a token id", got=repr(wrong[0])[:60], expected="an integer")
    # An added token may repeat one of the vocabulary; it is later in the list and wins.
    by_id = {token_id: (token, int(kind)) for token_id, token, kind in entries}
    ids = range(len(by_id))
    if set(by_id) != set(ids):
        raise CheckpointError(f"{path.name}: token ids", got="gaps", expected="0, 1, 2, …")
    vocabulary = Vocabulary([by_id[i][0] for i in ids], [by_id[i][1] for i in ids], _merges(model, path), path.name)
    try:
        "".join((*vocabulary.tokens, *vocabulary.merges)).encode("utf-8")
    except UnicodeEncodeError as exc:
        raise CheckpointError(
            f"{path.name}: a token or merge", got="half a surrogate pair", expected="Unicode"
        ) from exc
    return vocabulary


def _merges(model: dict[str, Any], path: Path) -> list[str]:
    """Merges are stored as "left right", or by newer versions as [left, right]."""
    merges = [" ".join(m) if _is_pair(m) else m for m in _list(model, "merges", path)]
    for merge in merges:
        if not isinstance(merge, str) or merge.count(" ") != 1:
            raise CheckpointError(f"{path.name}: merges", got=repr(merge)[:60], expected='"left right"')
    return merges


def _is_pair(merge: object) -> bool:
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def _list(data: dict[str, Any], key: str, path: Path) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise CheckpointError(f"{path.name}: {key}", got=type(value).__name__, expected="a list")
    return value


def _check_pattern(pre_tokenizer: Any, source: str) -> None:
    patterns = [node.get("pattern") for node in _nodes(pre_tokenizer)]
    found = [pattern.get("Regex") for pattern in patterns if isinstance(pattern, dict)]
    if found != [PATTERN]:
        raise UnsupportedError(f"{source}: pre_tokenizer", got=json.dumps(found)[:80], expected="HunYuan's pattern")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        inner = value.get("pretokenizers")
        for item in inner if isinstance(inner, list) else []:
            yield from _nodes(item)


def _kind(model: Any) -> str:
    return str(model.get("type")) if isinstance(model, dict) else type(model).__name__
