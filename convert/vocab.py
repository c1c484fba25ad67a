"""The vocabulary: tokens and types from hy.tiktoken, hunyuan.tiktoken, tokenizer.model or tokenizer.json.

No Python of the checkpoint is run: the ranks are in the file, and the special tokens follow them in the layout
of Tencent's HYTokenizer. Text forms use GPT-2's byte alphabet, in which every byte is one printable character.

A SentencePiece tokenizer.model comes only with checkpoints that others have derived. The engine does what that
library does for byte-pair models without normalisation; others are refused by the name of the setting.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from hymoe.convert.config import Config, read_json
from hymoe.errors import CheckpointError, UnsupportedError

TIKTOKEN_NAMES = ("hy.tiktoken", "hunyuan.tiktoken")
TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
VOCABULARY_FILES = (*TIKTOKEN_NAMES, SENTENCEPIECE, TOKENIZER_JSON)
ADDED_TOKENS = "added_tokens.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# Tencent's HYTokenizer: these follow the ranks, then <|extra_0|> and on.
SPECIALS = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>")

# Score of tokens that no merge makes.
ADDED_SCORE = -1000.0

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
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SentencePiece:
    """What a SentencePiece model says besides its tokens; ids are None where it has no such token."""

    scores: list[float]
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    bos: int | None
    unk: int | None
    pad: int | None


@dataclass(frozen=True)
class Vocabulary:
    """n_vocab tokens in GGUF's text form, their types, and the BPE merges ("left right") in order of rank.

    A SentencePiece vocabulary has scores instead of merges.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    source: str
    sentencepiece: SentencePiece | None = None

    def id(self, token: str) -> int:
        """Give the id of a token by its text. Raises CheckpointError where the vocabulary has none."""
        try:
            return self.tokens.index(token)
        except ValueError:
            raise CheckpointError(f"{self.source}: no token {token}", fix="is this a HunYuan vocabulary?") from None


def read_vocabulary(
    folder: Path, n_vocab: int, n_extra: int, *, padded: bool = False, merges: bool = True
) -> Vocabulary:
    """Read the checkpoint's vocabulary of exactly n_vocab tokens, n_extra of them <|extra_N|> tokens.

    padded: with fewer tokens the rest are unused ones, as embeddings with spare rows have them.
    merges: False leaves out what takes seconds to find in a tiktoken file and a look at the plan does not need.
    Raises CheckpointError where no vocabulary file is there, or where it disagrees with n_vocab.
    """
    vocabulary = _read(folder, n_extra, merges=merges)
    n_spare = n_vocab - len(vocabulary.tokens)
    if n_spare > 0 and (padded or vocabulary.sentencepiece):
        return _padded(vocabulary, n_spare)
    if n_spare:
        raise CheckpointError(
            f"{vocabulary.source}",
            got=f"{len(vocabulary.tokens)} tokens with the special ones",
            expected=f"vocab_size {n_vocab} of config.json",
            fix="take both files from the same repository",
        )
    return vocabulary


def _read(folder: Path, n_extra: int, *, merges: bool) -> Vocabulary:
    for name in TIKTOKEN_NAMES:
        if (folder / name).is_file():
            return _from_ranks(read_ranks(folder / name), n_extra, name, merges=merges)
    if (folder / SENTENCEPIECE).is_file():
        return _from_sentencepiece(folder)
    if (folder / TOKENIZER_JSON).is_file():
        return _from_tokenizer_json(folder / TOKENIZER_JSON)
    raise CheckpointError(f"{folder}: vocabulary", got="none", expected=f"one of {', '.join(VOCABULARY_FILES)}")


def _padded(vocabulary: Vocabulary, n_spare: int) -> Vocabulary:
    """Add unused tokens [PAD1], [PAD2], …, as llama.cpp's converter names them."""
    pieces = vocabulary.sentencepiece
    return replace(
        vocabulary,
        tokens=[*vocabulary.tokens, *(f"[PAD{i + 1}]" for i in range(n_spare))],
        types=[*vocabulary.types, *[int(TokenType.UNUSED)] * n_spare],
        sentencepiece=pieces and replace(pieces, scores=[*pieces.scores, *[ADDED_SCORE] * n_spare]),
    )


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


def _from_ranks(ranks: list[bytes], n_extra: int, source: str, *, merges: bool) -> Vocabulary:
    text = text_form()
    specials = [*SPECIALS, *(f"<|extra_{i}|>" for i in range(n_extra))]
    return Vocabulary(
        tokens=[*map(text, ranks), *specials],
        types=[int(TokenType.NORMAL)] * len(ranks) + [int(TokenType.CONTROL)] * len(specials),
        merges=[f"{text(left)} {text(right)}" for left, right in merges_of(ranks)] if merges else [],
        source=source,
    )


def _from_tokenizer_json(path: Path) -> Vocabulary:
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UnsupportedError(f"{path.name}: model", got=_kind(model), expected="a BPE model with a vocab")
    _check_pattern(data.get("pre_tokenizer"), path.name)
    entries = [(token_id, token, TokenType.NORMAL) for token, token_id in model["vocab"].items()]
    entries += [_added(item, path.name) for item in _list(data.get("added_tokens"), path.name, "added_tokens")]
    tokens: dict[int, str] = {}
    types: dict[int, int] = {}
    for token_id, token, kind in entries:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise CheckpointError(f"{path.name}: id of {token!r}", got=_short(token_id), expected="an integer")
        tokens[token_id], types[token_id] = token, int(kind)
    if sorted(tokens) != list(range(len(tokens))):
        raise CheckpointError(f"{path.name}: token ids", got="gaps", expected="0, 1, 2, …")
    merges = [_merge(item, path.name) for item in _list(model.get("merges"), path.name, "merges")]
    ids = range(len(tokens))
    return Vocabulary([tokens[i] for i in ids], [types[i] for i in ids], merges, path.name)


def _list(value: Any, source: str, key: str) -> list[Any]:
    if value is None or isinstance(value, list):
        return value or []
    raise CheckpointError(f"{source}: {key}", got=_short(value), expected="a list")


def _added(item: Any, source: str) -> tuple[Any, str, TokenType]:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str):
        raise CheckpointError(f"{source}: added_tokens", got=_short(item), expected='objects with "id" and "content"')
    return item.get("id"), item["content"], TokenType.CONTROL if item.get("special") else TokenType.USER_DEFINED


def _merge(item: Any, source: str) -> str:
    parts = item.split(" ") if isinstance(item, str) else item
    if isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts):
        return " ".join(parts)
    raise CheckpointError(f"{source}: merges", got=_short(item), expected="pairs of tokens")


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _check_pattern(pre_tokenizer: Any, source: str) -> None:
    patterns = [node.get("pattern") for node in _nodes(pre_tokenizer)]
    found = [pattern.get("Regex") for pattern in patterns if isinstance(pattern, dict)]
    if found != [PATTERN]:
        raise UnsupportedError(f"{source}: pre_tokenizer", got=json.dumps(found)[:80], expected="HunYuan's pattern")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield node
            inner = node.get("pretokenizers")
            left += inner if isinstance(inner, list) else []


def _kind(model: Any) -> str:
    return str(model.get("type")) if isinstance(model, dict) else type(model).__name__


# --- SentencePiece ---------------------------------------------------------------------------------------------------

# sentencepiece_model.proto: what of the model's settings the engine's tokenizer does, and what it is called there.
IMPLEMENTED: tuple[tuple[str, str, Any], ...] = (
    ("trainer_spec", "model_type", 2),  # BPE; the engine would merge a unigram model greedily
    ("trainer_spec", "byte_fallback", True),
    ("trainer_spec", "treat_whitespace_as_suffix", False),
    ("normalizer_spec", "precompiled_charsmap", b""),  # "identity": the engine has no normalisation
    ("normalizer_spec", "remove_extra_whitespaces", False),
    ("normalizer_spec", "escape_whitespaces", True),
)
# Piece types of the proto are those of GGUF (NORMAL 1 … BYTE 6).


def _from_sentencepiece(folder: Path) -> Vocabulary:
    """Read tokenizer.model and the tokens added to it. Raises UnsupportedError for settings the engine lacks."""
    model = _sentencepiece_model(folder / SENTENCEPIECE)
    for part, key, implemented in IMPLEMENTED:
        value = getattr(getattr(model, part), key)
        if value != implemented:
            got = f"{len(value)} bytes of normalisation rules" if isinstance(value, bytes) else value
            raise UnsupportedError(f"{SENTENCEPIECE}: {part}.{key}", got=got, expected=implemented or "none")
    tokens = [piece.piece for piece in model.pieces]
    types = [int(piece.type) for piece in model.pieces]
    scores = [float(piece.score) for piece in model.pieces]
    for i, kind in enumerate(types):
        if kind == TokenType.USER_DEFINED:
            tokens[i] = tokens[i].replace("▁", " ")  # matched against the text itself
    settings = folder / TOKENIZER_CONFIG
    config = Config.load(settings) if settings.is_file() else Config({}, settings.name)
    for token_id, token, kind in _added_pieces(folder, config):
        if token_id > len(tokens):
            raise CheckpointError(
                f"{folder.name}: added token {token}", got=f"id {token_id}", expected=f"at most {len(tokens)}"
            )
        here = slice(token_id, token_id + 1)  # one in the model, or the next one
        tokens[here], types[here], scores[here] = [token], [int(kind)], [ADDED_SCORE]
    return Vocabulary(tokens, types, [], SENTENCEPIECE, _settings(model, scores, config))


def _sentencepiece_model(path: Path) -> Any:
    """Parse the file, and load it as the library does, which checks more than the format."""
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        raw = path.read_bytes()
        model.ParseFromString(raw)
        if not model.pieces:
            raise RuntimeError("no pieces")
        SentencePieceProcessor(model_proto=raw)
    except (OSError, DecodeError, RuntimeError) as exc:
        raise CheckpointError(f"{path.name}: not a SentencePiece model ({exc})", fix="download the file again") from exc
    return model


def _added_pieces(folder: Path, config: Config) -> list[tuple[int, str, TokenType]]:
    """Give the tokens that the checkpoint adds to the model or changes in it, by id: the later files win."""
    found: dict[int, tuple[str, TokenType]] = {}
    file = folder / ADDED_TOKENS
    if file.is_file():
        for token, token_id in read_json(file).items():
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise CheckpointError(f"{file.name}: {token}", got=token_id, expected="an id")
            found[token_id] = token, TokenType.USER_DEFINED
    decoder = config.sub("added_tokens_decoder")
    for key in decoder.data:
        entry = decoder.sub(key)
        content = entry.data.get("content")
        if not key.isascii() or not key.isdigit() or not isinstance(content, str) or not content:
            raise CheckpointError(f"{decoder.source}: {key}", got=content, expected="an id with a content")
        kind = TokenType.CONTROL if entry.flag("special", default=False) else TokenType.USER_DEFINED
        found[int(key)] = content, kind
    return [
        (token_id, token if kind == TokenType.CONTROL else token.replace("▁", " "), kind)
        for token_id, (token, kind) in sorted(found.items())
    ]


def _settings(model: Any, scores: list[float], config: Config) -> SentencePiece:
    """Read the special ids and what is put around a text."""

    def token_id(name: str) -> int | None:
        value = int(getattr(model.trainer_spec, f"{name}_id"))
        return value if 0 <= value < len(scores) else None

    return SentencePiece(
        scores=scores,
        add_space_prefix=bool(model.normalizer_spec.add_dummy_prefix),
        # What transformers' LlamaTokenizer does where the config is silent.
        add_bos=config.flag("add_bos_token", default=True),
        add_eos=config.flag("add_eos_token", default=False),
        bos=token_id("bos"),
        unk=token_id("unk"),
        pad=token_id("pad"),
    )
