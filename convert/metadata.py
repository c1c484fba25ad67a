"""Everything a reader of the GGUF needs beside the tensors: vocabulary, end tokens, sampling, template, provenance."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from gguf import GGML_QUANT_VERSION, size_label

import hymoe
from hymoe import console
from hymoe.chat_templates import fallback, repair
from hymoe.convert.architectures import Architecture, Key
from hymoe.convert.config import Config, read_json
from hymoe.convert.plan import Plan
from hymoe.convert.vocab import SentencePiece, TokenType, Vocabulary
from hymoe.errors import CheckpointError

# generation_config.json -> general.sampling.*, which llama.cpp uses where a client sends nothing.
SAMPLING = (
    ("temperature", "general.sampling.temp", "FLOAT32"),
    ("top_k", "general.sampling.top_k", "INT32"),
    ("top_p", "general.sampling.top_p", "FLOAT32"),
    ("min_p", "general.sampling.min_p", "FLOAT32"),
    ("repetition_penalty", "general.sampling.penalty_repeat", "FLOAT32"),
)

MAX_TEMPLATE_BYTES = 4 << 20


class Provenance(NamedTuple):
    """Where a checkpoint folder came from, as far as the hub's own files in it tell."""

    name: str
    organization: str | None = None
    revision: str | None = None


def general(folder: Path, arch: Architecture, plan: Plan) -> Iterator[Key]:
    """Keys that describe the file itself and its source."""
    origin = provenance(folder)
    n_routed = sum(prod(tensor.shape) for tensor in plan.tensors if len(tensor.shape) == 3)
    yield Key("general.type", "model", "STRING")
    yield Key("general.name", origin.name.replace("-", " "), "STRING")
    yield Key("general.basename", origin.name, "STRING")
    yield Key(
        "general.size_label",
        size_label(plan.n_params, plan.n_params - n_routed, n_routed // arch.n_expert, arch.n_expert),
        "STRING",
    )
    if origin.organization:
        yield Key("general.organization", origin.organization, "STRING")
        yield Key("general.source.repo_url", f"https://huggingface.co/{origin.organization}/{origin.name}", "STRING")
    if origin.revision:
        yield Key("hymoe.source.revision", origin.revision, "STRING")
    yield Key("general.file_type", int(plan.file_type), "UINT32")
    yield Key("general.quantization_version", GGML_QUANT_VERSION, "UINT32")
    yield Key("hymoe.version", hymoe.__version__, "STRING")
    formats = {source.format for tensor in plan.tensors for source in tensor.sources}
    yield Key("hymoe.source.format", "+".join(sorted(formats)), "STRING")


def sampling(generation: Config) -> Iterator[Key]:
    """The vendor's sampling defaults. The vendor penalises repetition over the whole context, hence -1."""
    for key, gguf_key, kind in SAMPLING:
        if generation.has(key):
            value = generation.integer(key, minimum=0) if kind == "INT32" else generation.number(key, zero=True)
            yield Key(gguf_key, value, kind)  # type: ignore[arg-type]
            if key == "repetition_penalty":
                yield Key("general.sampling.penalty_last_n", -1, "INT32")


def tokenizer(vocabulary: Vocabulary, arch: Architecture, folder: Path, *, keep_template: bool) -> Iterator[Key]:
    """The vocabulary with its begin and end tokens, and the chat template, repaired unless it is to be kept."""
    n_vocab = len(vocabulary.tokens)
    for token in arch.end_tokens:
        if not 0 <= token < n_vocab:
            raise CheckpointError("eos_token_id", got=token, expected=f"an id below vocab_size {n_vocab}")
        if vocabulary.types[token] != TokenType.CONTROL:
            raise CheckpointError(
                "eos_token_id",
                got=f"{token}, which is {vocabulary.tokens[token]!r}",
                expected="a special token",
                fix="take config and vocabulary from the same repository",
            )
    if not arch.end_tokens:
        raise CheckpointError(
            "eos_token_id", got="none in config.json and generation_config.json", expected="an end token"
        )
    yield Key("tokenizer.ggml.tokens", vocabulary.tokens, "ARRAY")
    yield Key("tokenizer.ggml.token_type", vocabulary.types, "ARRAY")
    if vocabulary.sentencepiece:
        yield from _sentencepiece(vocabulary.sentencepiece)
    else:
        yield from _byte_pairs(vocabulary, arch)
    # llama.cpp knows one "end of sequence" and one "end of turn" by id; both end an answer.
    for key, token in zip(("eos", "eot", "eom"), arch.end_tokens, strict=False):
        yield Key(f"tokenizer.ggml.{key}_token_id", token, "UINT32")
    yield from template(vendors_template(folder), keep=keep_template)


def _byte_pairs(vocabulary: Vocabulary, arch: Architecture) -> Iterator[Key]:
    yield Key("tokenizer.ggml.model", "gpt2", "STRING")
    yield Key("tokenizer.ggml.pre", "hunyuan", "STRING")
    yield Key("tokenizer.ggml.merges", vocabulary.merges, "ARRAY")
    yield Key("tokenizer.ggml.bos_token_id", vocabulary.id(arch.begin_token), "UINT32")
    yield Key("tokenizer.ggml.padding_token_id", vocabulary.id("<|pad|>"), "UINT32")
    yield Key("tokenizer.ggml.add_bos_token", False, "BOOL")
    yield Key("tokenizer.ggml.add_eos_token", False, "BOOL")


def _sentencepiece(model: SentencePiece) -> Iterator[Key]:
    yield Key("tokenizer.ggml.model", "llama", "STRING")
    yield Key("tokenizer.ggml.pre", "default", "STRING")
    yield Key("tokenizer.ggml.scores", model.scores, "ARRAY")
    for key, token in (("bos", model.bos), ("unknown", model.unk), ("padding", model.pad)):
        if token is not None:
            yield Key(f"tokenizer.ggml.{key}_token_id", token, "UINT32")
    yield Key("tokenizer.ggml.add_space_prefix", model.add_space_prefix, "BOOL")
    # Without a begin token there is none to add; llama.cpp would fall back to id 1.
    yield Key("tokenizer.ggml.add_bos_token", model.add_bos and model.bos is not None, "BOOL")
    yield Key("tokenizer.ggml.add_eos_token", model.add_eos, "BOOL")


def template(vendors: str | None, *, keep: bool) -> Iterator[Key]:
    """The chat template, and where it is from.

    "vendor": as published, by choice or because no repair applies; "repaired"; "plain": ours, where there is none.
    """
    text, origin = (vendors, "vendor") if vendors else (fallback(), "plain")
    if vendors and not keep:
        repaired = repair(vendors)
        if repaired.applied:
            text, origin = repaired.text, "repaired"
            console.detail(f"chat template repaired ({', '.join(repaired.applied)}); --keep-template leaves it")
        if repaired.still_mutates:
            console.warn("the chat template changes a dict in place, which the engine refuses; no known repair fits it")
    yield Key("tokenizer.chat_template", text, "STRING")
    yield Key("hymoe.chat_template", origin, "STRING")


def vendors_template(folder: Path) -> str | None:
    """Read the checkpoint's template: chat_template.jinja, else tokenizer_config.json's; None where it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{file.name}: size", got=file.stat().st_size, expected=f"at most {MAX_TEMPLATE_BYTES} bytes"
            )
        try:
            return file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as exc:
            raise CheckpointError(f"{file.name}: not UTF-8 text ({exc.reason})", fix="download the file again") from exc
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # transformers also stores several, by name
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{config.name}: chat_template", got=type(found).__name__, expected="a string")
    return found or None


def provenance(folder: Path) -> Provenance:
    """Read name and revision from the hub's cache layout, or from the notes it leaves in a download folder."""
    folder = folder.resolve()
    cached = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    if folder.parent.name == "snapshots" and cached:
        return Provenance(cached[2], cached[1], folder.name)
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    revision = note.read_text(encoding="ascii", errors="replace").split("\n", 1)[0].strip() if note.is_file() else ""
    return Provenance(folder.name or "model", None, revision if re.fullmatch(r"[0-9a-f]{40}", revision) else None)
