"""One file per architecture, with the same sections in the same order: HPARAMS, NAMES, METADATA.

An architecture is a module with `load(config, generation) -> Architecture`; the registry maps config.json's name to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, cast

from hymoe.convert.config import Config
from hymoe.errors import CheckpointError, UnsupportedError

# `architectures` of config.json -> module; resolved when met, so that a new one costs one line here.
REGISTRY = {
    "HunYuanMoEV1ForCausalLM": "hymoe.convert.architectures.hunyuan_a13b",
}

Precision = Literal["target", "f32"]


class Row(NamedTuple):
    """One kind of tensor. `{l}` and `{e}` in the names stand for layer and expert.

    hf:        its name in the checkpoint
    gguf:      its name in the GGUF, or None where it is dropped on purpose; experts share one name and are stacked
    shape:     row-major sizes in symbols of the Architecture's `sizes` ([out, in] for a matrix)
    precision: "target" follows --quant; "f32" always stays F32, as every llama.cpp tool has it
    """

    hf: str
    gguf: str | None
    shape: tuple[str, ...]
    precision: Precision = "target"
    optional: bool = False


class Key(NamedTuple):
    """One metadata entry; `kind` is the name of a GGUFValueType."""

    key: str
    value: Any
    kind: Literal["UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"]


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint's config says, checked: all that planning needs.

    n_layer and n_expert unroll the rows' {l} and {e}; `sizes` gives the symbols of their shapes;
    n_extra is the number of <|extra_N|> tokens after the vocabulary's ranks; end_tokens are the ids that end an answer.
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
    return cast(Architecture, import_module(module).load(config, generation))
