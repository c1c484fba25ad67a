"""The engine's tokenizer against tiktoken: same vocabulary file, the vendor's pattern, no normalisation."""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiktoken
from engine_eval import tokenize

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write

# HYTokenizer's PAT_STR, spelled out here and not imported, as the other side of the comparison.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_DECODABLE = 126994
N_RANDOM = 10000

Span = tuple[int, int]  # first and last code point


def spans(text: str) -> list[Span]:
    """Read "41-5A 640": first and last code point in hexadecimal, or one alone."""
    ends = ((part.split("-")[0], part.split("-")[-1]) for part in text.split())
    return [(int(first, 16), int(last, 16)) for first, last in ends]


PLANES = spans("0-10FFFF 0-FFFF 10000-1FFFF 1E000-1FFFF E0000-E01FF E000-F8FF 10FFF0-10FFFF")
SCRIPTS = spans(
    "41-5A 61-7A C0-24F 370-3FF 400-52F 5D0-5EA 620-6D3 900-97F E00-E5B 10A0-10FF 1100-11FF 1E00-1FFF 3040-30FF "
    "4E00-9FFF AC00-D7A3 20000-2A6DF"
)
SPACES = spans("9-D 1C-20 20 20 85 A0 1680 180E 2000-200D 2028-2029 202F 205F-2060 3000 FEFF")
NUMBERS = spans("30-39 660-669 966-96F 2150-218B 2460-249B BC-BE FF10-FF19 3021-3029 1D7CE-1D7FF")
MARKS = spans("300-36F 1AB0-1AFF 20D0-20FF 93A-94F E31-E3A FE00-FE0F")
EMOJI = spans("1F300-1FAFE 2600-27BF 200D FE0F 1F3FB-1F3FF 1F1E6-1F1FF")
CONTROLS = spans("0-1F 7F-9F 200B-206F")
ASCII = spans("20-7E")
# Letters and numbers of Unicode 16, which older tables take for symbols, and what then goes wrong beside them.
UNICODE_16 = spans(
    "1C89-1C8A A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D65 10D6F-10D85 10EC2-10EC4 11380-11389 11390-113B5 113D1 "
    "116D0-116E3 11BC0-11BE0 11BF0-11BF9 13460-143FA 16100-1611D 16130-16139 16D40-16D6C 16D70-16D79 18CFF "
    "1CCF0-1CCF9 1E5D0-1E5ED 1E5F0-1E5FA"
)
NEIGHBOURS = ["'s", "'T", "'LL", ".a", "..", "\n", "\n \n", " ", "  ", "a", "1", "(", "\t", "中"]
# U+017F and U+212A fold to s and k, U+0130 to i with a dot.
CONTRACTIONS = ["'", "'", "’", *"sStTrReEvVmMlLdDſKkıİ", "it", "We", " ", "中", "1", "\n", ".", "the"]
# Pieces around the three tokens that no two-part merge of lower rank makes.
UNMERGED = ["▁", "∴", "▁∴", "Abst", "▁Abst", "')", "|", "('", "')|('", "Ab", "st", "ract"]

Maker = Callable[[random.Random], str]


def points(*choices: Sequence[Span], words: Sequence[str] = (), longest: int = 20) -> Maker:
    """Make strings of random code points: each from a random span of a random choice, or one of `words`."""

    def make(rng: random.Random) -> str:
        drawn: list[str] = []
        for _ in range(rng.randint(1, longest)):
            kind = rng.randrange(len(choices) + bool(words))
            drawn.append(rng.choice(words) if kind == len(choices) else _point(rng, *rng.choice(choices[kind])))
        return "".join(drawn)

    return make


def runs(rng: random.Random) -> str:
    """Words in random scripts, one script to a word."""
    words = []
    for _ in range(rng.randint(1, 6)):
        span = rng.choice(SCRIPTS)
        words.append("".join(_point(rng, *span) for _ in range(rng.randint(1, 8))))
        words.append(rng.choice(["", " ", "  ", "-", "\n", "."]))
    return "".join(words)


def _point(rng: random.Random, first: int, last: int) -> str:
    while 0xD800 <= (code := rng.randint(first, last)) <= 0xDFFF:
        pass
    return chr(code)


def makers(pieces: Sequence[str]) -> dict[str, Maker]:
    return {
        "all planes": points(PLANES),
        "scripts": runs,
        "white space": points(SPACES, words=["a", "b", "1", ".", "é", "中", "'"]),
        "numbers": points(NUMBERS, ASCII),
        "contractions": points(words=CONTRACTIONS),
        "combining marks": points(MARKS, SCRIPTS),
        "emoji": points(EMOJI, EMOJI, words=[" ", "!"]),
        "control characters": points(CONTROLS, words=["a", "b ", "1", "\0"]),
        "ASCII": points(ASCII, longest=60),
        "vocabulary pieces": points(words=pieces, longest=8),
        "Unicode 16": points(UNICODE_16, words=NEIGHBOURS, longest=12),
        "tokens without a merge": points(words=UNMERGED, longest=6),
    }


def random_strings(pieces: Sequence[str], n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Give n (distribution, string), the distributions in turn."""
    rng = random.Random(seed)
    table = list(makers(pieces).items())
    return [(name, make(rng)) for i in range(n) for name, make in [table[i % len(table)]]]


def read_ranks(path: Path) -> dict[bytes, int]:
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def reference_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("hy", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def decodable(ranks: dict[bytes, int]) -> list[str]:
    """Every token that is valid UTF-8 by itself."""
    lenient = (token.decode(errors="ignore") for token in ranks)
    return [text for token, text in zip(ranks, lenient, strict=True) if text.encode() == token]


@pytest.mark.data
@pytest.mark.engine
def test_real_vocabulary(data: Path, tmp_path: Path) -> None:
    vocab = data / "a13b" / "hy.tiktoken"
    spec = Spec(
        vocab=vocab, n_layer=1, n_embd=32, n_head=1, n_head_kv=1, head_dim=32, n_ff=32, n_expert=2, n_expert_used=2
    )
    write(tmp_path / "checkpoint", spec)
    gguf = tmp_path / "vocabulary.gguf"
    convert(ConvertOptions(tmp_path / "checkpoint", gguf))

    ranks = read_ranks(vocab)
    pieces = decodable(ranks)
    assert len(pieces) == N_DECODABLE
    assert_same_ids(gguf, ranks, [("vocabulary", piece) for piece in pieces] + random_strings(pieces, N_RANDOM))


@pytest.mark.engine
def test_embedded_vocabulary(mini: Path, mini_gguf: Path) -> None:
    ranks = read_ranks(mini / "hy.tiktoken")
    pieces = decodable(ranks)
    assert_same_ids(
        mini_gguf, ranks, [("vocabulary", piece) for piece in pieces] + random_strings(pieces, 3000, seed=1)
    )


def assert_same_ids(gguf: Path, ranks: dict[bytes, int], strings: list[tuple[str, str]]) -> None:
    encoding = reference_encoding(ranks)
    got = tokenize(gguf, [text for _, text in strings])
    wrong = [
        (name, text, wanted, ids)
        for (name, text), ids in zip(strings, got, strict=True)
        if ids != (wanted := encoding.encode_ordinary(text))
    ]
    assert not wrong, f"{len(wrong)} differ: {dict(Counter(name for name, *_ in wrong))}, the first: {wrong[0]}"
