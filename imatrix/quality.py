"""What a quantization lost, measured: its predictions against those of the full-precision file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hymoe import console
from hymoe.engine.evaluator import Evaluator
from hymoe.errors import ModelFileError
from hymoe.imatrix import heldout
from hymoe.imatrix.divergence import Quality, Reference, Tally
from hymoe.imatrix.weights import SOURCES, GgufWeights, matrices

if TYPE_CHECKING:
    from rich.table import Table

N_CTX: Final = 2048


@dataclass(frozen=True)
class QualityOptions:
    """What to compare. text: files instead of hymoe's held-out set; n_tokens: at most so many of it.

    folder: where the reference's logits lie meanwhile (4 bytes for each token and entry of the vocabulary).
    """

    reference: Path
    files: tuple[Path, ...]
    text: tuple[Path, ...] = ()
    n_tokens: int = 4096
    n_threads: int = 1
    folder: Path | None = None


@dataclass(frozen=True)
class Measured:
    """One file: its bytes of tensors, bits per weight, and what it lost."""

    file: str
    n_bytes: int
    bits_per_weight: float
    quality: Quality

    def to_json(self) -> dict[str, Any]:
        """Give the numbers by name."""
        return {**asdict(self), "quality": self.quality._asdict()}


def measure(options: QualityOptions) -> list[Measured]:
    """Evaluate the reference once and every other file against it, one model in memory at a time.

    Raises ModelFileError for a file of another model or vocabulary, naming what differs, UnsupportedError for too
    little text.
    """
    with ExitStack() as stack:
        first = stack.enter_context(GgufWeights(options.reference))
        others = [stack.enter_context(GgufWeights(path)) for path in options.files]
        for path, other in zip(options.files, others, strict=True):
            _require_same(path, first, other)
        _warn_of_coarse(options.reference, first)
        texts = heldout.documents(options.text, first.chat_template)
        reference = stack.enter_context(_recorded(options, texts))
        return [
            Measured(str(path), other.n_bytes, other.bits_per_weight, _compared(options, path, texts, reference))
            for path, other in zip(options.files, others, strict=True)
        ]


def _recorded(options: QualityOptions, texts: Sequence[str]) -> Reference:
    with Evaluator(options.reference, n_ctx=N_CTX, n_threads=options.n_threads) as model:
        ids = heldout.tokens(model, texts, options.n_tokens)
        reference = Reference(ids, model.n_vocab, options.folder)
        with ExitStack() as failed:
            failed.enter_context(reference)
            with console.progress(options.reference.name, reference.n_tokens, unit="%") as tick:
                for n in reference.record(model):
                    tick(n)
            failed.pop_all()
    return reference


def _compared(options: QualityOptions, path: Path, texts: Sequence[str], reference: Reference) -> Quality:
    tally = Tally()
    with Evaluator(path, n_ctx=N_CTX, n_threads=options.n_threads) as model:
        if model.n_vocab != reference.n_vocab:
            raise ModelFileError(f"{path}: vocabulary", got=model.n_vocab, expected=reference.n_vocab)
        if heldout.tokens(model, texts, options.n_tokens) != reference.texts:
            raise ModelFileError(f"{path}: another vocabulary", expected=f"that of {options.reference}")
        with console.progress(path.name, reference.n_tokens, unit="%") as tick:
            for n in reference.compare(model, tally, str(path)):
                tick(n)
    return tally.quality()


def _warn_of_coarse(path: Path, reference: GgufWeights) -> None:
    """Files in the wrong order give numbers, too."""
    found = {reference.tensors[name].qtype.name for name in matrices(reference)} - set(SOURCES)
    if found:
        console.warn(f"{path.name} has {', '.join(sorted(found))}: what a reference lost itself does not show")


def _require_same(path: Path, first: GgufWeights, other: GgufWeights) -> None:
    """Raise ModelFileError, naming the first tensor that differs, for another model."""
    for name, tensor in first.tensors.items():
        found = other.tensors.get(name)
        if found is None or found.shape != tensor.shape:
            got = "none" if found is None else f"{list(found.shape)}"
            raise ModelFileError(f"{path}: another model: {name}", got=got, expected=list(tensor.shape))
    # Fewer layers of the same shapes. A quantization may have an output of its own where embeddings were tied.
    for name, tensor in other.tensors.items():
        if name.startswith("blk.") and name not in first.tensors:
            raise ModelFileError(f"{path}: another model: {name}", got=list(tensor.shape), expected="none")


def table(rows: Sequence[Measured], *, perplexity: bool) -> Table:
    """One line per file."""
    from rich.table import Table

    result = Table(box=None, header_style="", pad_edge=False)
    columns = ("file", "size", "bits/weight", "mean KL", "±", "99 %", "max", "top-1")
    for column in (*columns, *(("perplexity",) if perplexity else ())):
        result.add_column(column, justify="left" if column == "file" else "right")
    for row in rows:
        q = row.quality
        cells = (f"{q.mean:.5f}", f"{q.error:.5f}", f"{q.p99:.4f}", f"{q.largest:.3f}", f"{100 * q.top1:.2f} %")
        last = (f"{q.perplexity:.3f}",) if perplexity else ()
        size = console.format_bytes(row.n_bytes)
        result.add_row(Path(row.file).name, size, f"{row.bits_per_weight:.3f}", *cells, *last)
    return result
