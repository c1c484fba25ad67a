"""A GGUF without its weights: the head that a conversion would write, and a hole where the data would be.

A hole takes no room on the disk. What only looks at names, shapes and sizes, as placement does and the engine that
allocates nothing, cannot tell it from the real file; the vocabulary is left out.
"""

from __future__ import annotations

from pathlib import Path

from hymoe.convert.architectures import Key
from hymoe.convert.convert import preview
from hymoe.convert.split import lay_out

NO_VOCABULARY = Key("tokenizer.ggml.model", "no_vocab", "STRING")


def write(model: str | Path, out: Path, quant: str, imatrix: Path | None = None, recipe: Path | None = None) -> None:
    """Write what converting a folder or repository would write, with a hole instead of weights. Raises as `preview`."""
    made = preview(model, quant, imatrix, recipe)
    keys = (*(key for key in made.keys if not key.key.startswith("tokenizer.")), NO_VOCABULARY)
    (part,) = lay_out(out, made.plan, made.arch.name, keys)
    with out.open("wb") as file:
        file.write(part.head)
        file.truncate(part.n_bytes)
