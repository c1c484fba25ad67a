"""The training text: which documents there are, their tokens, and the rows they are packed into.

manifest.json   every text, its origin and its licence or ground, with a hash
dialogues.py    conversations, stories, sums and programs from our own tables
a book          fetched from the package index by version and hash
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import dialogues
import numpy as np
from numpy.typing import NDArray

from hymoe.convert.miniature import PATTERN, SPECIAL_TOKENS, read_tiktoken, trained, write_tiktoken

if TYPE_CHECKING:
    import tiktoken

FOLDER = Path(__file__).parent / "corpus"
MANIFEST = FOLDER / "manifest.json"
N_RANK = 4096
MAX_TOKEN_BYTES = 18  # six Chinese characters: the tables' phrases must not become tokens
N_VOCAB = N_RANK + len(SPECIAL_TOKENS)
N_CONTEXT = 512
VALIDATION_SEED = 1_000_003
PADDING = -1

Ints = NDArray[np.int64]
Piece = NDArray[np.uint16]


@dataclass(frozen=True)
class Rows:
    """Packed documents, [n, N_CONTEXT + 1]: tokens, and the document's number in the row (PADDING after the last)."""

    ids: NDArray[np.uint16]
    document: NDArray[np.int16]


def manifest() -> dict[str, Any]:
    """Read the manifest."""
    found: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return found


def committed(content: dict[str, Any]) -> dict[str, str]:
    """Give the hash of each committed text by its file name."""
    files: dict[str, str] = content["written"]["files"]
    return files | {name: entry["sha256"] for name, entry in content["public_domain"].items()}


def fingerprint(seed: int) -> str:
    """Give a hash of what decides the text: the manifest, with its hashes, and the first documents of the generator."""
    found = hashlib.sha256(MANIFEST.read_bytes())
    for document in dialogues.documents(seed, 2000):
        found.update(document.encode())
    return found.hexdigest()


def book(entry: dict[str, str], cache: Path) -> list[str]:
    """Give the paragraphs of a fetched book, chapter by chapter. Raises RuntimeError where its hash is another."""
    name = f"{entry['npm'].lstrip('@').replace('/', '-')}-{entry['version']}.tgz"
    archive = cache / name
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pack = ["npm", "pack", "--silent", f"{entry['npm']}@{entry['version']}"]
        subprocess.run(pack, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != entry["sha256"]:
        raise RuntimeError(f"{archive}: sha256 {found}, expected {entry['sha256']}; remove it and start again")
    with tarfile.open(archive) as tar:
        members = fnmatch.filter(tar.getnames(), entry["members"])
        chapters = [json.load(file) for member in members if (file := tar.extractfile(member))]
    chapters.sort(key=lambda chapter: (len(chapter["chapter"]), chapter["chapter"], chapter["title"]))
    return [chapter["text"].replace("\r\n", "\n") for chapter in chapters]


def vocabulary(out: Path, texts: Sequence[str]) -> tiktoken.Encoding:
    """Train the vocabulary into out/hy.tiktoken, or read it from there."""
    path = out / "hy.tiktoken"
    if not path.exists():
        write_tiktoken(path, trained(texts, N_RANK, max_bytes=MAX_TOKEN_BYTES))
    return encoding(read_tiktoken(path))


def encoding(ranks: Sequence[bytes]) -> tiktoken.Encoding:
    """Give the tokenizer of a vocabulary."""
    import tiktoken

    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    by_token = {token: rank for rank, token in enumerate(ranks)}
    return tiktoken.Encoding("miniature", pat_str=PATTERN, mergeable_ranks=by_token, special_tokens=special)


def tokens(tokenizer: tiktoken.Encoding, documents: Iterable[str]) -> Iterator[Piece]:
    """Tokenize each document; text in NFC, as the vendor's tokenizer has it. A long one comes in several pieces."""
    for document in documents:
        ids = np.array(tokenizer.encode(unicodedata.normalize("NFC", document), allowed_special="all"), np.uint16)
        yield from (ids[i : i + N_CONTEXT + 1] for i in range(0, len(ids), N_CONTEXT))


def packed(pieces: Iterable[Piece], n_open: int = 64) -> Rows:
    """Pack pieces into rows, each into the fullest of the open rows that has room: little padding, none is cut."""
    width = N_CONTEXT + 1
    ready: list[list[Piece]] = []
    rows: list[list[Piece]] = []
    room: list[int] = []
    for piece in pieces:
        fits = [i for i, left in enumerate(room) if left >= len(piece)]
        if fits:
            best = min(fits, key=room.__getitem__)
        else:
            if len(rows) == n_open:
                best = min(range(n_open), key=room.__getitem__)
                ready.append(rows.pop(best))
                room.pop(best)
            rows.append([])
            room.append(width)
            best = len(rows) - 1
        rows[best].append(piece)
        room[best] -= len(piece)
    ready += rows
    ids = np.zeros((len(ready), width), np.uint16)
    document = np.full((len(ready), width), PADDING, np.int16)
    for i, row in enumerate(ready):
        at = 0
        for number, piece in enumerate(row):
            ids[i, at : at + len(piece)] = piece
            document[i, at : at + len(piece)] = number
            at += len(piece)
    return Rows(ids, document)


def positions(document: NDArray[Any]) -> Ints:
    """Give each token's position in its document, from the documents' numbers [n, T]."""
    n, width = document.shape
    at = np.broadcast_to(np.arange(width), (n, width))
    starts = np.ones((n, width), bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    first: Ints = np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    return at - first


def prepare(out: Path, cache: Path, seed: int, n_rows: int) -> tuple[Rows, Rows]:
    """Give the rows to train on, n_rows of them, and those to validate on; kept in out/rows.npz.

    One chapter in twenty-five is kept for validation, with dialogues of another seed; the book is read twice.
    """
    path = out / "rows.npz"
    chapters = [text for entry in manifest()["fetched"] for text in book(entry, cache)]
    training = [text for i, text in enumerate(chapters) if i % 25 != 10]
    tokenizer = vocabulary(out, [*dialogues.documents(seed, 20_000), *training])
    if not path.exists():
        prose = [piece for _ in range(2) for piece in tokens(tokenizer, training)]
        pieces = prose + list(_enough(tokenizer, seed, (N_CONTEXT + 1) * n_rows - sum(map(len, prose))))
        Random(seed).shuffle(pieces)
        held_out = list(tokens(tokenizer, chapters[10::25]))[:12]
        held_out += tokens(tokenizer, dialogues.documents(VALIDATION_SEED, 240))
        both = {"train": packed(pieces), "validation": packed(held_out)}
        order = np.random.default_rng(seed).permutation(len(both["train"].ids))
        both["train"] = Rows(both["train"].ids[order], both["train"].document[order])
        arrays = {f"{name}_{part}": getattr(rows, part) for name, rows in both.items() for part in ("ids", "document")}
        np.savez(path.with_suffix(".part.npz"), **arrays)
        path.with_suffix(".part.npz").replace(path)
    with np.load(path) as kept:
        return (
            Rows(kept["train_ids"][:n_rows], kept["train_document"][:n_rows]),
            Rows(kept["validation_ids"], kept["validation_document"]),
        )


def _enough(tokenizer: tiktoken.Encoding, seed: int, n_tokens: int) -> Iterator[Piece]:
    for piece in tokens(tokenizer, dialogues.documents(seed, 10_000_000)):
        yield piece
        n_tokens -= len(piece)
        if n_tokens <= 0:
            return
