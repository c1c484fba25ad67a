"""Files made elsewhere: what a HunYuan GGUF of another tool lacks, and the engine's options that make up for it.

The engine takes metadata from the command line (`--override-kv KEY=TYPE:VALUE`), a template from a file and sampling
defaults as flags; so a file on disk need not be written again to be served right.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hymoe.errors import OutputError
from hymoe.published import BY_VOCABULARY, Published
from hymoe.runtime.header import Header, token_ids

# general.sampling.* -> llama-server's flag for the same default
SAMPLING_FLAGS = {
    "temp": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "penalty_repeat": "--repeat-penalty",
    "penalty_last_n": "--repeat-last-n",
}
END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
ADDED_KEYS = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
# Where hy-convert says whose template it wrote; "vendor" is there by choice.
TEMPLATE_ORIGIN = "hymoe.chat_template"
TEMPLATE_FLAGS = ("--chat-template", "--chat-template-file")


@dataclass(frozen=True)
class Override:
    """One thing that a file lacks: in words, and the llama-server arguments that give it."""

    what: str
    arguments: tuple[str, ...]


def find(header: Header, n_ctx: int, extra: Sequence[str] = ()) -> list[Override]:
    """Say what the file lacks of what hy-convert writes; the user's own arguments, `extra`, are left alone.

    n_ctx: tokens of context that will be served.

    Raises OutputError where a repaired template cannot be put into the cache folder.
    """
    found = []
    model = BY_VOCABULARY.get((header.architecture, header.n_vocab))
    if model is not None:
        found += [*_end_tokens(header, model), *_nothing_added(header), *_sampling(header, model, n_ctx)]
    if not any(argument.split("=", 1)[0] in TEMPLATE_FLAGS for argument in extra):
        found += _template(header)
    return found


def arguments(found: Sequence[Override]) -> list[str]:
    """Give the llama-server arguments of all of them."""
    return [argument for override in found for argument in override.arguments]


def line(header: Header, found: Sequence[Override]) -> str:
    """Say all of it in one line."""
    *most, last = [override.what for override in found]
    what = f"{', '.join(most)} and {last}" if most else last
    origin = "lacks some metadata" if "hymoe.version" in header.scalars else "is from another tool"
    return f"{header.path.name} {origin}: served with {what}; hy-convert --repair makes a file with these"


def _end_tokens(header: Header, model: Published) -> Iterator[Override]:
    ids = token_ids(header, model.end)
    present = {header.scalars.get(key) for key in END_KEYS}
    if len(ids) == len(model.end) and not present.issuperset(ids.values()):
        pairs = zip(END_KEYS, model.end, strict=False)
        yield Override("both end tokens", tuple(_key_values((key, f"int:{ids[token]}") for key, token in pairs)))


def _nothing_added(header: Header) -> Iterator[Override]:
    added = [(key, "bool:false") for key in ADDED_KEYS if header.scalars.get(key)]
    if added:
        yield Override("no tokens added to prompts", tuple(_key_values(added)))


def _sampling(header: Header, model: Published, n_ctx: int) -> Iterator[Override]:
    missing = [name for name in model.sampling if f"general.sampling.{name}" not in header.scalars]
    if missing:
        # As metadata -1 is the whole context; the flag refuses negative numbers.
        values = {name: n_ctx if model.sampling[name] == -1 else model.sampling[name] for name in missing}
        flags = ((SAMPLING_FLAGS[name], str(value)) for name, value in values.items())
        yield Override("the vendor's sampling defaults", tuple(word for pair in flags for word in pair))


def _template(header: Header) -> Iterator[Override]:
    template = header.chat_template
    if template is None or header.scalars.get(TEMPLATE_ORIGIN) == "vendor":
        return
    from hymoe.chat_templates.repairs import repair

    repaired = repair(template)
    if repaired.applied:
        yield Override("a repaired chat template", ("--chat-template-file", str(_kept(repaired.text))))


def _key_values(pairs: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> Iterator[str]:
    for key, value in pairs:
        yield "--override-kv"
        yield f"{key}={value}"


def cache() -> Path:
    """Name the folder of repaired templates (HYMOE_CACHE moves it)."""
    from hymoe.engine.installed import engine_root

    return engine_root().parent / "templates"


def _kept(text: str) -> Path:
    """Put a template into the cache folder under its own hash, where it is not there yet, and give its path."""
    raw = text.encode()
    file = cache() / f"{hashlib.sha256(raw).hexdigest()[:32]}.jinja"
    try:
        if file.is_file() and file.read_bytes() == raw:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, raw)
    except OSError as exc:
        raise OutputError(
            f"{file}: cannot write the repaired template", got=exc.strerror or exc, fix="set HYMOE_CACHE to a folder"
        ) from exc
    return file


def _replace(file: Path, raw: bytes) -> None:
    """Write beside the file and rename, so that a server never reads half of it; nothing is left where that fails."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    temporary = Path(name)
    try:
        with open(handle, "wb") as stream:
            stream.write(raw)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
