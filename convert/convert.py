"""From a checkpoint folder to a GGUF: read the config, plan, then write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hymoe import console
from hymoe.convert import architectures, metadata
from hymoe.convert.architectures import Architecture
from hymoe.convert.checkpoint import Checkpoint, open_checkpoint
from hymoe.convert.config import Config
from hymoe.convert.plan import NEEDS_NO_ENGINE, QUANTS, Plan, make_plan
from hymoe.convert.vocab import Vocabulary, read_vocabulary
from hymoe.convert.writer import check_disk, write_gguf
from hymoe.errors import CheckpointError, OutputError, UnsupportedError


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert: `quant` is one of plan.QUANTS; an existing `out` is replaced only with `overwrite`."""

    model_dir: Path
    out: Path
    quant: str = "BF16"
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """A checked checkpoint: nothing of it is left to be wrong but the weights themselves."""

    checkpoint: Checkpoint
    arch: Architecture
    vocabulary: Vocabulary
    plan: Plan
    keys: tuple[architectures.Key, ...]


def prepare(model_dir: Path, quant: str) -> Conversion:
    """Read and check everything but the weights. Raises CheckpointError or UnsupportedError."""
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}", got="no such folder", expected="the folder of a HunYuan checkpoint")
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"{model_dir}", got="no config.json", expected="the folder of a HunYuan checkpoint")
    config = Config.load(model_dir / "config.json")
    generation = model_dir / "generation_config.json"
    generated = Config.load(generation) if generation.is_file() else Config({}, generation.name)
    if config.has("quantization_config"):
        method = config.sub("quantization_config").data.get("quant_method")
        raise UnsupportedError(
            f"{config.source}: quantization_config", got=f"quant_method {method}", expected="the BF16 checkpoint"
        )
    arch = architectures.load(config, generated)
    checkpoint = open_checkpoint(model_dir)
    if quant not in NEEDS_NO_ENGINE:
        from hymoe import engine

        engine.find()
    plan = make_plan(checkpoint, arch, quant)
    vocabulary = read_vocabulary(model_dir, arch.n_vocab, arch.n_extra)
    keys = (
        *metadata.general(model_dir, arch, plan),
        *arch.metadata,
        *metadata.sampling(generated),
        *metadata.tokenizer(vocabulary, arch, model_dir),
    )
    return Conversion(checkpoint, arch, vocabulary, plan, keys)


def convert(options: ConvertOptions) -> int:
    """Convert a checkpoint folder to one GGUF file; give its size in bytes.

    Raises a HyError for anything wrong with the input (before a weight is read) or the output; then, and when
    interrupted, no file is left.
    """
    check_output(options)
    conversion = prepare(options.model_dir, options.quant)
    plan = conversion.plan
    check_disk(options.out, plan.data_bytes)
    for ref in plan.dropped:
        console.detail(f"dropped {ref.name}: a copy of the embeddings")
    with conversion.checkpoint, console.progress(options.out.name, plan.source_bytes) as tick:
        return write_gguf(
            options.out, conversion.checkpoint, plan, arch=conversion.arch.name, keys=conversion.keys, tick=tick
        )


def check_output(options: ConvertOptions) -> None:
    """Raise OutputError where the output exists (without overwrite), or cannot."""
    out = options.out
    if out.is_dir():
        raise OutputError(f"{out}", got="a folder", expected="a file name such as model.gguf")
    if out.exists() and not options.overwrite:
        raise OutputError(f"{out} exists", fix="choose another name, or pass --overwrite")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder", fix="make it first")
    if out.suffix != ".gguf":
        raise OutputError(f"{out.name}", got=f"the ending {out.suffix!r}", expected=".gguf")
    assert options.quant in QUANTS
