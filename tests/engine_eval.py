"""Logits and token ids from an engine, in a process of its own: one process can hold only one libllama.

`evaluate`, `nodes` and `tokenize` start this file as a script; which engine answers is up to HYMOE_ENGINE.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# one thread: tests run side by side, and threads that wait for each other spin
N_THREADS = 1

OVERRIDE_TAGS: dict[str, tuple[int, str, Callable[[str], Any]]] = {
    "int": (0, "val_i64", int),
    "float": (1, "val_f64", float),
    "bool": (2, "val_bool", "true".__eq__),
    "str": (3, "val_str", str.encode),
}
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q5_1": 7, "q8_0": 8, "bf16": 30}


class EngineRunError(Exception):
    """The engine's process failed; the message ends with what it printed last."""


def evaluate(
    gguf: Path,
    prompts: Sequence[Sequence[int]],
    *,
    engine: Path | None = None,
    flash_attn: bool = False,
    kv: str = "f32",
    n_threads: int = N_THREADS,
    n_ubatch: int = 512,
    n_prompt: int = 0,
    first_pos: int = 0,
    n_seq: int = 1,
    repack: bool = True,
    watched: bool = False,
    together: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> list[NDArray[np.float32]]:
    """Give the logits [n_tokens, n_vocab] of each prompt, each evaluated in an empty context.

    `engine` is a folder of libraries (None: the one hymoe finds). Tokens from `n_prompt` on, where it is not 0, are
    decoded one by one. The first token is at `first_pos`, and every token belongs to `n_seq` sequences. `watched`:
    a callback is told of every operation, as when an imatrix is collected. `together`: prompts of one length, each a
    sequence of its own in one cache, all their first tokens before the second ones. `overrides` are metadata keys as
    llama.cpp's --override-kv writes them, "type:value". Raises EngineRunError where the process fails.
    """
    options = [f"--flash-attn={'on' if flash_attn else 'off'}", f"--kv={kv}", f"--n-threads={n_threads}"]
    options += [f"--n-ubatch={n_ubatch}", f"--repack={'on' if repack else 'off'}"]
    options += [f"--first-pos={first_pos}", f"--n-seq={n_seq}"]
    options += [f"--n-prompt={n_prompt}", *(["--watched"] if watched else []), *(["--together"] if together else [])]
    options += [f"--override={key}={value}" for key, value in (overrides or {}).items()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npz"
        _run(["logits", str(gguf), str(out), *options], [list(map(int, prompt)) for prompt in prompts], engine)
        with np.load(out) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(prompts))]


def nodes(gguf: Path, ids: Sequence[int], *, engine: Path | None = None, n_prompt: int = 0) -> list[str]:
    """Give the operations of all graphs that compute `ids`, in order: what, which tensor, how many values.

    Tokens from `n_prompt` on, where it is not 0, are decoded one by one. Flash attention is off.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "nodes.json"
        _run(["nodes", str(gguf), str(out), f"--n-prompt={n_prompt}", "--watched"], [list(map(int, ids))], engine)
        found: list[str] = json.loads(out.read_text(encoding="utf-8"))
        return found


def tokenize(gguf: Path, strings: Sequence[str], *, engine: Path | None = None) -> list[list[int]]:
    """Give the token ids of each string, special tokens read as plain text, nothing added around."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ids.json"
        _run(["tokenize", str(gguf), str(out)], list(strings), engine)
        ids: list[list[int]] = json.loads(out.read_text(encoding="utf-8"))
        return ids


def _run(arguments: list[str], work: list[Any], engine: Path | None) -> None:
    environment = os.environ | ({"HYMOE_ENGINE": str(engine)} if engine else {})
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, input=json.dumps(work).encode(), env=environment, capture_output=True, check=False)
    if done.returncode:
        tail = done.stderr.decode(errors="replace")[-2000:]
        raise EngineRunError(f"{' '.join(arguments[:2])}: exit status {done.returncode}\n{tail}")


# -- inside the process ----------------------------------------------------------------------------------------------


def main() -> None:
    options = _parse()
    from hymoe.engine import bindings

    llama = bindings.load()
    llama.llama_backend_init()
    work = json.load(sys.stdin)
    if options.job == "tokenize":
        model = _load(llama, options, vocab_only=True)
        ids = [_ids(llama, llama.llama_model_get_vocab(model), text.encode()) for text in work]
        options.out.write_text(json.dumps(ids), encoding="utf-8")
        return
    seen: list[str] = []
    logits = _logits(llama, _load(llama, options), work, options, seen)
    if options.job == "nodes":
        options.out.write_text(json.dumps(seen), encoding="utf-8")
    else:
        np.savez(options.out, *logits)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["logits", "nodes", "tokenize"], help="stdin: JSON, prompts or strings")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path, help="logits: an .npz of [n_tokens, n_vocab] each; else JSON")
    parser.add_argument("--flash-attn", choices=["on", "off"], default="off")
    parser.add_argument("--kv", choices=sorted(KV_TYPES), default="f32")
    parser.add_argument("--n-threads", type=int, default=N_THREADS)
    parser.add_argument("--n-ubatch", type=int, default=512)
    parser.add_argument("--n-prompt", type=int, default=0)
    parser.add_argument("--first-pos", type=int, default=0)
    parser.add_argument("--n-seq", type=int, default=1)
    parser.add_argument("--watched", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--repack", choices=["on", "off"], default="on")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=TYPE:VALUE")
    return parser.parse_args()


def _load(llama: Any, options: argparse.Namespace, *, vocab_only: bool = False) -> Any:
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    params.use_extra_bufts = options.repack == "on"
    if options.override:
        # the list ends with an entry whose key is empty
        params.kv_overrides = (llama.llama_model_kv_override * (len(options.override) + 1))()
        for slot, text in zip(params.kv_overrides, options.override, strict=False):
            _fill(slot, *text.split("=", 1))
    model = llama.llama_model_load_from_file(os.fsencode(options.gguf), params)
    if not model:
        raise SystemExit(f"{options.gguf} does not load")
    return model


def _fill(slot: Any, key: str, value: str) -> None:
    kind, text = value.split(":", 1)
    slot.tag, field, parse = OVERRIDE_TAGS[kind]
    slot.key = key.encode()
    setattr(slot.value, field, parse(text))


def _ids(llama: Any, vocab: Any, text: bytes) -> list[int]:
    size = len(text) + 8
    buffer = (llama.llama_token * size)()
    n = llama.llama_tokenize(vocab, text, len(text), buffer, size, False, False)
    if n < 0:
        raise SystemExit(f"llama_tokenize gave {n} for {text!r}")
    return list(buffer[:n])


def _watch(llama: Any, seen: list[str]) -> Any:
    """Make a callback that puts every operation into `seen` before it is computed."""
    from hymoe.engine import installed

    ggml = ctypes.CDLL(str(installed.find().library("ggml-base")))
    ggml.ggml_op_desc.restype = ggml.ggml_get_name.restype = ctypes.c_char_p
    ggml.ggml_nelements.restype = ctypes.c_int64

    def watch(tensor: int, ask: bool, _data: Any) -> bool:
        if ask:
            given = ctypes.c_void_p(tensor)
            words = ggml.ggml_op_desc(given).decode(), ggml.ggml_get_name(given).decode(), ggml.ggml_nelements(given)
            seen.append(" ".join(map(str, words)))
        return True

    return llama.ggml_backend_sched_eval_callback(watch)


def _logits(
    llama: Any, model: Any, prompts: list[list[int]], options: argparse.Namespace, seen: list[str]
) -> list[NDArray[np.float32]]:
    """Logits of all prompts; where they are watched, `seen` gets every operation."""
    longest = max(map(len, prompts))
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    params = llama.llama_context_default_params()
    n_seq = len(prompts) if options.together else options.n_seq
    params.n_ctx = params.n_batch = longest * len(prompts) if options.together else longest
    params.n_seq_max, params.kv_unified = n_seq, n_seq > 1
    params.n_ubatch = min(options.n_ubatch, params.n_batch)
    params.n_threads = params.n_threads_batch = options.n_threads
    params.type_k = params.type_v = KV_TYPES[options.kv]
    params.flash_attn_type = int(options.flash_attn == "on")
    watch = _watch(llama, seen)
    if options.watched:
        params.cb_eval = watch
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("no context")
    if options.together:
        return _together(llama, context, prompts, n_vocab)
    batch = llama.llama_batch_init(longest, 0, options.n_seq)
    found = []
    for ids in prompts:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        n_first = options.n_prompt or len(ids)
        pieces = [ids[:n_first], *([token] for token in ids[n_first:])]
        starts = [0, *range(n_first, len(ids))]
        rows = []
        for piece, start in zip(pieces, starts, strict=True):
            _decode(llama, context, batch, piece, options.first_pos + start, n_seq=options.n_seq)
            flat = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(piece) * n_vocab,))
            rows.append(flat.reshape(len(piece), n_vocab).copy())
        found.append(np.concatenate(rows))
    return found


def _together(llama: Any, context: Any, prompts: list[list[int]], n_vocab: int) -> list[NDArray[np.float32]]:
    n_seq = len(prompts)
    batch = llama.llama_batch_init(sum(map(len, prompts)), 0, 1)
    for pos, tokens in enumerate(zip(*prompts, strict=True)):
        for seq, token in enumerate(tokens):
            i = pos * n_seq + seq
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, True
            batch.seq_id[i][0] = seq
            batch.n_tokens = i + 1
    if status := llama.llama_decode(context, batch):
        raise SystemExit(f"llama_decode gave {status} for {n_seq} sequences")
    flat = np.ctypeslib.as_array(llama.llama_get_logits(context), (batch.n_tokens * n_vocab,))
    found = flat.reshape(-1, n_seq, n_vocab)
    return [found[:, seq].copy() for seq in range(n_seq)]


def _decode(llama: Any, context: Any, batch: Any, ids: list[int], start: int, *, n_seq: int) -> None:
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, n_seq, True
        for seq in range(n_seq):
            batch.seq_id[i][seq] = seq
    if status := llama.llama_decode(context, batch):
        raise SystemExit(f"llama_decode gave {status} for {len(ids)} tokens")


if __name__ == "__main__":
    main()
