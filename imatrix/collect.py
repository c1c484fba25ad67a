"""Collecting importance: text in the model's template through the engine, into a file that says what it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hymoe import __version__, chat_templates, console
from hymoe.errors import OutputError, UnsupportedError
from hymoe.imatrix import conversations, files, model, passes
from hymoe.imatrix.files import Imatrix, Note
from hymoe.imatrix.model import Model

CALIBRATION: Final = f"hymoe {__version__} calibration set"
N_EXPERT_USED: Final = "hymoe.imatrix.expert_used_count"


@dataclass(frozen=True)
class Text:
    """What is fed to the model: the whole text, the names of what it was made from, and the template it stands in."""

    content: str
    names: tuple[str, ...]
    template: str

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class CollectOptions:
    """What to collect. text: files instead of the calibration set; n_chunks None: all; extra: for llama-imatrix."""

    model: Path
    out: Path
    text: tuple[Path, ...] = ()
    n_ctx: int = 512
    n_chunks: int | None = None
    threads: int | None = None
    use_template: bool = True
    overwrite: bool = False
    restart: bool = False
    extra: tuple[str, ...] = ()


def collect(options: CollectOptions) -> Imatrix:
    """Collect importance and write it to `options.out`; what was interrupted goes on.

    Raises what passes.run does, ModelFileError for the model, UnsupportedError for the text, OutputError for an output
    that is there already.
    """
    check_output(options.out, overwrite=options.overwrite)
    found = model.read(options.model)
    text = prepare(found, options.text, use_template=options.use_template)
    todo = passes.Pass(
        model=options.model,
        text=text.content,
        out=options.out,
        n_ctx=options.n_ctx,
        n_chunks=options.n_chunks,
        threads=options.threads,
        extra=options.extra,
        identity=identity(found, text, options.n_ctx, options.n_chunks, options.extra),
    )
    with passes.run(todo, restart=options.restart) as sums:
        imatrix = replace(sums, datasets=text.names, notes=notes(found, text))
        files.save(options.out, imatrix)
    return imatrix


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError for an output that exists, or has no folder to lie in."""
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists", fix="pass --overwrite to replace it, or name another file")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: no folder {out.parent}", fix="make it first")


def prepare(found: Model, paths: Sequence[Path], *, use_template: bool = True) -> Text:
    """Give the text of these files, or our calibration set, in the model's template or ours.

    Without a template files are joined as they are; the calibration set is conversations and cannot be.
    """
    if not use_template:
        if not paths:
            raise UnsupportedError("--no-template is for text of your own", fix="pass --text FILE as well")
        return Text("".join(map(conversations.read_text, paths)), tuple(path.name for path in paths), "none")
    own = found.chat_template
    if own is None:
        console.status(f"{found.path.name} has no chat template: using the family's plain one")
    sources = [conversations.read(path) for path in paths] if paths else conversations.calibration_set()
    names = tuple(source.name for source in sources) if paths else (CALIBRATION,)
    content = conversations.rendered(sources, own or chat_templates.fallback())
    return Text(content, names, "plain" if own is None else "model")


def identity(
    found: Model, text: Text, n_ctx: int, n_chunks: int | None, extra: Sequence[str], **more: str
) -> dict[str, str]:
    """Give what decides the sums, by the words that an error uses."""
    return {
        "model": f"{found.path.name} ({found.fingerprint()[:16]})",
        "text": f"{', '.join(text.names)} ({text.sha256[:16]})",
        "--ctx": str(n_ctx),
        "--chunks": "all" if n_chunks is None else str(n_chunks),
        "engine argument": " ".join(extra) or "none",
        **more,
    }


def notes(found: Model, text: Text) -> dict[str, Note]:
    """Metadata that say what a matrix was collected from."""
    return {
        "hymoe.imatrix.version": __version__,
        "hymoe.imatrix.model": found.name,
        "hymoe.imatrix.model_file": found.path.name,
        "hymoe.imatrix.model_fingerprint": found.fingerprint(),
        "hymoe.imatrix.text_sha256": text.sha256,
        "hymoe.imatrix.template": text.template,
        N_EXPERT_USED: found.n_expert_used,
    }
