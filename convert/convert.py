"""From a checkpoint folder to a GGUF: read the config, plan, then write."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hymoe import console
from hymoe.convert import architectures, metadata
from hymoe.convert.architectures import Architecture
from hymoe.convert.checkpoint import INDEX_NAME, PICKLES, Checkpoint, Files, Folder, open_checkpoint, read_index
from hymoe.convert.config import Config
from hymoe.convert.hub import located
from hymoe.convert.identity import identify
from hymoe.convert.plan import Plan, make_plan
from hymoe.convert.quants import Quant, Wanted
from hymoe.convert.quants import metadata as quant_keys
from hymoe.convert.sources import Gathered, Source, gather
from hymoe.convert.split import lay_out
from hymoe.convert.verify import Tally, find_gguf, verify_gguf
from hymoe.convert.vocab import VOCABULARY_FILES, read_vocabulary
from hymoe.convert.writer import Output, journal_of, write
from hymoe.errors import CheckpointError, OutputError


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert: `quant` names a quants.Quant; an existing `out` is replaced only with `overwrite`.

    model: a folder, or a repository of the hub, "org/name" or "org/name@revision" (or with `revision`). keep_shards:
    leave what was downloaded beside the output.
    imatrix: an importance matrix for the quantizer; recipe: types for single tensors (hymoe.imatrix.files and .recipe).
    restart: begin again where an interrupted conversion could be continued. split_max_bytes: of each file, where the
    output is to be split. verify: compare what is written with its source. keep_template: carry the vendor's chat
    template unchanged.
    """

    model: str | Path
    out: Path
    quant: str = "BF16"
    overwrite: bool = False
    imatrix: Path | None = None
    recipe: Path | None = None
    restart: bool = False
    split_max_bytes: int | None = None
    verify: bool = False
    revision: str | None = None
    keep_shards: bool = False
    keep_template: bool = False


@dataclass(frozen=True)
class Conversion:
    """A checked checkpoint: nothing of it is left to be wrong but the weights themselves.

    unseen: what was not there to be looked at; a plan can be shown then, and nothing be converted.
    inputs: what tells the content of every file with weights from any other, by name.
    """

    checkpoint: Checkpoint
    arch: Architecture
    plan: Plan
    keys: tuple[architectures.Key, ...]
    inputs: Mapping[str, str]
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What a conversion wrote: the files, their bytes together, and their errors by kind of tensor if verified."""

    files: tuple[Path, ...]
    n_bytes: int
    tally: Tally | None = None


def prepare(
    files: Files | Path,
    quant: str,
    imatrix: Path | None = None,
    recipe: Path | None = None,
    *,
    look: bool = False,
    keep_template: bool = False,
) -> Conversion:
    """Read and check everything but the weights. Raises a HyError that names what is wrong.

    look: for a look at the plan only; weights and vocabulary may then be absent. keep_template: see ConvertOptions.
    """
    files = Folder(files) if isinstance(files, Path) else files
    if "config.json" not in files.sizes():
        raise CheckpointError(f"{files.folder}", got="no config.json", expected="the folder of a HunYuan checkpoint")
    config = Config.load(files.folder / "config.json")
    generation = files.folder / "generation_config.json"
    generated = Config.load(generation) if generation.is_file() else Config({}, generation.name)
    arch = architectures.load(config, generated)
    unseen = _unseen(files) if look else ()
    checkpoint = files.checkpoint({}) if "weights" in unseen else open_checkpoint(files)
    gathered = _expected(files, arch, config) if "weights" in unseen else gather(checkpoint, config)
    wanted = _wanted(quant, imatrix, recipe)
    plan = make_plan(gathered, arch, wanted)
    keys = (
        *metadata.general(files.folder, arch, plan),
        *quant_keys(wanted),
        *arch.metadata,
        *metadata.sampling(generated),
    )
    if "vocabulary" not in unseen:
        vocabulary = read_vocabulary(files.folder, arch.n_vocab, arch.n_extra, padded=arch.padded, merges=not look)
        keys += (*metadata.tokenizer(vocabulary, arch, files.folder, keep_template=keep_template),)
    names = sorted({ref.file.name for ref in checkpoint.tensors.values()})
    return Conversion(checkpoint, arch, plan, keys, {name: files.identity(name) for name in names}, unseen)


def _unseen(files: Files) -> tuple[str, ...]:
    """Say what is absent as a whole. Where some shards are there and others not, something went wrong."""
    present = set(files.sizes())
    shards = set(read_index(files).values()) if INDEX_NAME in present else present
    absent = {
        "weights": not any(name in present and name.endswith((".safetensors", *PICKLES)) for name in shards),
        "vocabulary": present.isdisjoint(VOCABULARY_FILES),
    }
    return tuple(what for what, is_absent in absent.items() if is_absent)


def _expected(files: Files, arch: Architecture, config: Config) -> Gathered:
    from hymoe.convert.sources import expected

    return expected.gather(arch, config, read_index(files) if INDEX_NAME in files.sizes() else None)


def _wanted(quant: str, imatrix: Path | None, recipe: Path | None) -> Wanted:
    from hymoe.imatrix import files
    from hymoe.imatrix import recipe as recipes

    return Wanted(Quant(quant), files.read(imatrix) if imatrix else None, recipes.read(recipe) if recipe else None)


def preview(
    model: str | Path,
    quant: str,
    imatrix: Path | None = None,
    recipe: Path | None = None,
    revision: str | None = None,
) -> Conversion:
    """Prepare a conversion to look at its plan; what is fetched for that is gone at the end, weights may be absent."""
    with located(model, revision, None) as files:
        return prepare(files, quant, imatrix, recipe, look=True)


def convert(options: ConvertOptions) -> Result:
    """Convert a checkpoint folder to a GGUF, in one file or split, or go on where an interrupted conversion stopped.

    Raises a HyError for anything wrong with the input (before a weight is read, but for the weights themselves) or the
    output. Wrong input leaves no file; what else ends the work leaves what the next call continues.
    """
    check_output(options)
    tally = Tally() if options.verify else None
    with located(
        options.model, options.revision, options.out, keep=options.keep_shards, restart=options.restart
    ) as files:
        conversion = prepare(files, options.quant, options.imatrix, options.recipe, keep_template=options.keep_template)
        _say_dropped(conversion.plan)
        output = _output(options, conversion)
        with conversion.checkpoint:
            write(output, conversion.checkpoint, tally)
    return Result(tuple(part.path for part in output.parts), output.n_bytes, tally)


def _say_dropped(plan: Plan) -> None:
    """With -v, one line for each kind: a quantized checkpoint has thousands of scales that are no weights."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for item in plan.dropped:
        why = "a copy of the embeddings" if isinstance(item, Source) else "no part of the weights"
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", item.name), why), []).append(item.name)
    for (kind, why), names in kinds.items():
        console.detail(f"dropped {names[0]}: {why}" if len(names) == 1 else f"dropped {len(names)} of {kind}: {why}")


def verify(model: str | Path, gguf: Path, revision: str | None = None) -> Tally:
    """Compare the tensors of an existing GGUF (or of the first of its parts) with the checkpoint it was made from.

    Any tool may have written it. Raises ModelFileError where it is none of this checkpoint, or its weights cannot come
    from there, naming the first such tensor; CheckpointError as `convert` does.
    """
    with located(model, revision, gguf) as files:
        conversion = prepare(files, "F32")
        with conversion.checkpoint:
            return verify_gguf(gguf, conversion.checkpoint, conversion.plan)


def finished(out: Path) -> Path | None:
    """Give the GGUF that lies at `out` finished, or the first of its parts; None where there is none."""
    return None if journal_of(out).exists() else find_gguf(out)


def _output(options: ConvertOptions, conversion: Conversion) -> Output:
    """Say which bytes go where, and what makes them these and no others."""
    plan, keys = conversion.plan, conversion.keys
    parts = lay_out(options.out, plan, conversion.arch.name, keys, options.split_max_bytes)
    for part in parts:
        if options.split_max_bytes is not None and part.n_bytes > options.split_max_bytes:
            console.warn(
                f"{part.path.name} has {console.format_bytes(part.n_bytes)}: "
                f"{part.tensors[0].name} with the file's head is larger than --split-max-size by itself"
            )
    identity = identify(plan, keys, conversion.inputs, split_max_bytes=options.split_max_bytes)
    return Output(options.out, parts, identity, options.overwrite, options.restart)


def check_output(options: ConvertOptions) -> None:
    """Raise OutputError where the output exists (without overwrite), or cannot."""
    out = options.out
    if out.is_dir():
        raise OutputError(f"{out}", got="a folder", expected="a file name such as model.gguf")
    if out.exists() and not options.overwrite and not journal_of(out).exists():
        raise OutputError(f"{out} exists", fix="choose another name, or pass --overwrite")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder", fix="make it first")
    if out.suffix != ".gguf":
        raise OutputError(f"{out.name}", got=f"the ending {out.suffix!r}", expected=".gguf")
