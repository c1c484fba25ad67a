"""One file per architecture, with the same sections in the same order: HPARAMS, NAMES, METADATA.

An architecture is a module with `load(config, generation) -> Architecture`; the registry maps config.json's name to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, cast

from hymoe.convert.config import Config
from hymoe.errors import CheckpointError, UnsupportedError

# `architectures` of config.json -> module; resolved when met, so that a new one costs one line here.
REGISTRY = {
    "HunYuanMoEV1ForCausalLM": "hymoe.convert.architectures.hunyuan_a13b",
    "HunYuanForCausalLM": "hymoe.convert.architectures.hunyuan_large",
}

# llama.cpp's limits (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS); a plan of two thousand million experts would not end.
MAX_LAYERS = 512
MAX_EXPERTS = 1024

Precision = Literal["target", "f32"]


class Row(NamedTuple):
    """One kind of tensor. `{l}` and `{e}` in the names stand for layer and expert.

    hf:        its name in the checkpoint
    gguf:      its name in the GGUF, or None where it is dropped on purpose; experts share one name and are stacked
    shape:     row-major sizes in symbols of the Architecture's `sizes` ([out, in] for a matrix)
    precision: "target" follows --quant; "f32" always stays F32, as every llama.cpp tool has it
    every:     symbol of a step in `sizes`: only layers 0, step, 2·step, … have the tensor
    """

    hf: str
    gguf: str | None
    shape: tuple[str, ...]
    precision: Precision = "target"
    optional: bool = False
    every: str | None = None


class Key(NamedTuple):
    """One metadata entry; `kind` is the name of a GGUFValueType."""

    key: str
    value: Any
    kind: Literal["UINT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"]


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's config says, checked: all that planning needs.

    n_layer and n_expert unroll the rows' {l} and {e}; `sizes` gives the symbols of their shapes;
    n_extra is the number of <|extra_N|> tokens after the vocabulary's ranks; end_tokens are the ids that end an answer.
    padded: the embeddings have rows that no token names, after the vocabulary's.
    """

    name: str
    n_layer: int
    n_expert: int
    n_vocab: int
    n_extra: int
    sizes: dict[str, int]
    rows: tuple[Row, ...]
    metadata: tuple[Key, ...]
    end_tokens: tuple[int, ...]
    begin_token: str
    padded: bool = False

    def unrolled(self) -> Iterator[tuple[Row, int]]:
        """Every row with every layer that has it: rows without a layer first, then layer by layer.

        What a layer needs lies together in the file.
        """
        for row in self.rows:
            if "{l}" not in row.hf:
                yield row, 0
        layered = [row for row in self.rows if "{l}" in row.hf]
        for layer in range(self.n_layer):
            yield from ((row, layer) for row in layered if row.every is None or layer % self.sizes[row.every] == 0)

    def stored_names(self, row: Row, layer: int) -> list[str]:
        """Give the row's names in the checkpoint: one, or one for each expert."""
        experts = range(self.n_expert) if "{e}" in row.hf else (0,)
        return [row.hf.format(l=layer, e=expert) for expert in experts]

    def shape(self, row: Row) -> tuple[int, ...]:
        """Give the shape of one stored tensor of the row."""
        return tuple(self.sizes[symbol] for symbol in row.shape)


def load(config: Config, generation: Config) -> Architecture:
    """Find the architecture that config.json names and read it. Raises UnsupportedError for unknown ones."""
    names = config.data.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{config.source}: architectures", got=repr(names), expected=f"one of {', '.join(REGISTRY)}"
        )
    module = REGISTRY.get(names[0])
    if module is None:
        raise UnsupportedError(f"{config.source}: architecture", got=names[0], expected=f"one of {', '.join(REGISTRY)}")
    arch = cast(Architecture, import_module(module).load(config, generation))
    for what, n, limit in (("layers", arch.n_layer, MAX_LAYERS), ("experts", arch.n_expert, MAX_EXPERTS)):
        if n > limit:
            raise UnsupportedError(f"{config.source}: number of {what}", got=n, expected=f"at most {limit}")
    return arch
