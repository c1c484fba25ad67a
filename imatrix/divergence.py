"""How far a model's predictions are from a reference's: Kullback-Leibler divergence and agreement, token by token.

For every token of a text, p are the reference's probabilities of the next one and q the other model's:
KL = Σ p (ln p - ln q), in nats. Logits are the engine's float32; what is computed from them is float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import IO, TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hymoe.errors import ModelFileError, OutputError

if TYPE_CHECKING:
    from hymoe.engine.evaluator import Evaluator

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


class Quality(NamedTuple):
    """What was lost: KL in nats per token (mean, its standard error, 99th percentile, maximum), top-1 agreement.

    perplexity: of the text itself, under the other model.
    """

    mean: float
    error: float
    p99: float
    largest: float
    top1: float
    perplexity: float
    n_tokens: int


@dataclass
class Tally:
    """Divergences of tokens so far, how many had the same first choice, and the text's own surprise."""

    divergence: list[Doubles] = field(default_factory=list)
    n_same: int = 0
    surprise: float = 0.0
    n_predicted: int = 0

    def add(self, reference: Floats, logits: Floats, following: Sequence[int]) -> None:
        """Count tokens: both models' logits [n, n_vocab], and the ids that followed (one fewer at a text's end)."""
        log_p, log_q = log_softmax(reference), log_softmax(logits)
        self.n_same += int((log_p.argmax(1) == log_q.argmax(1)).sum())
        n = len(following)
        self.surprise -= float(log_q[np.arange(n), list(following)].sum())
        self.n_predicted += n
        self.divergence.append(_divergence(log_p, log_q))

    def quality(self) -> Quality:
        """Sum up."""
        values = np.concatenate(self.divergence)
        n = len(values)
        return Quality(
            mean=float(values.mean()),
            error=float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
            p99=float(np.quantile(values, 0.99)),
            largest=float(values.max()),
            top1=self.n_same / n,
            perplexity=float(np.exp(self.surprise / max(1, self.n_predicted))),
            n_tokens=n,
        )


def log_softmax(logits: Floats) -> Doubles:
    """Give ln of the probabilities, [n, n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _divergence(log_p: Doubles, log_q: Doubles) -> Doubles:
    np.subtract(log_p, log_q, out=log_q)
    # Rounding leaves -1e-17 where the two are the same.
    result: Doubles = np.maximum(np.einsum("ij,ij->i", np.exp(log_p), log_q), 0.0)
    return result


class Reference:
    """The logits of a reference on a text, kept in a file of its own: a vocabulary of 128,000 is 0.5 MB per token.

    texts: token ids of documents, each evaluated in an empty context. A context manager. Raises OutputError for a
    folder that takes no file.
    """

    def __init__(self, texts: Sequence[Sequence[int]], n_vocab: int, folder: Path | None = None) -> None:
        self.texts = [list(ids) for ids in texts]
        self.n_vocab = n_vocab
        try:
            self._file: IO[bytes] = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as exc:
            raise OutputError(f"{folder or gettempdir()}: no place for the logits", got=exc.strerror or exc) from exc

    @property
    def n_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    def record(self, model: Evaluator) -> Iterator[int]:
        """Evaluate the reference on the texts; gives the number of tokens done at a time.

        Raises ModelFileError for logits that are no numbers, OutputError where there is no room for them.
        """
        for ids in self.texts:
            for logits in model.logits(ids):
                require_finite(logits, "the reference")
                try:
                    self._file.write(logits.data)
                except OSError as exc:
                    raise OutputError("no room for the reference's logits", got=exc.strerror) from exc
                yield len(logits)
        self._file.flush()

    def compare(self, model: Evaluator, tally: Tally, name: str) -> Iterator[int]:
        """Evaluate another model and count into `tally`; gives the number of tokens done at a time.

        Raises ModelFileError for logits that are no numbers.
        """
        self._file.seek(0)
        for ids in self.texts:
            start = 0
            for logits in model.logits(ids):
                require_finite(logits, name)
                n = len(logits)
                raw = self._file.read(4 * n * self.n_vocab)
                reference = np.frombuffer(raw, np.float32).reshape(n, self.n_vocab)
                tally.add(reference, logits, ids[start + 1 : start + n + 1])
                start += n
                yield n


def require_finite(logits: Floats, name: str) -> None:
    """Raise ModelFileError for logits that are no numbers."""
    if not np.isfinite(logits).all():
        raise ModelFileError(f"{name}: NaN or infinity in its logits", fix="its weights are damaged: make it again")
