"""A tiny HunYuan model that says what a test wants: its weights are set so that one chosen token follows another.

Each token has a random code of ±1 as its embedding, and the output row of a script's token is the code of the token
before it: current token in, next token out. One attention head with zero queries averages over the whole prompt, which
tells whether a script's marker word is in it; the shared expert hands that on where an answer starts. The routed
experts add nothing. So a script is a chain of different pieces; a piece may stand in one place only (`cut` sees to
that), and a chain may end in a circle.

    write_scripted(path, [Script(cut("<think>\\nHm.\\n</think>\\n<answer>\\nYes.\\n</answer>"))], template=fallback())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray
from tiny_model import SPECIAL, add_hparams, byte_letters

N_EMBD, HEAD_DIM, N_FF, N_EXPERT = 512, 64, 64, 2
# Dimensions beyond the codes: which marker a token is, which ones the prompt holds, the same where an answer starts,
# and whether it starts.
MARKER, SEEN, CHOSEN, STARTS = 0, HEAD_DIM, 2 * HEAD_DIM, 3 * HEAD_DIM
CODES = 3 * HEAD_DIM + 1
# Logits: of the next token in a script, of its alternative, of the first one of a script with a marker, and what the
# marker adds to that.
SURE, DOUBT, HANDICAPPED, MARKED = 300.0, 299.0, 250.0, 100.0
N_RANKS = 127957  # of Hunyuan-A13B's vocabulary; its special tokens follow
# A marker once in a prompt of 1000 tokens must still be felt.
ATTENTION_GAIN = 100.0

START, NEWLINE, STOP, STOP_2 = "<|extra_0|>", "Ċ", "<|eos|>", "<|extra_5|>"
# generation_config.json of Hunyuan-A13B-Instruct.
VENDOR_SAMPLING = (("temp", 0.7), ("top_k", 20), ("top_p", 0.8), ("penalty_repeat", 1.05), ("penalty_last_n", -1))


@dataclass(frozen=True)
class Script:
    """One answer: `pieces` are tokens in order, text or bytes; after the last comes `stop`, or `then` for a circle.

    when: a word of the prompt that chooses this script; a later script's word outdoes an earlier one's.
    after: the last token of the prompt that it follows: START of an ordinary one, NEWLINE where the template or a
        budget has closed a thought in advance.
    doubts: piece -> what nearly came in its place (a logit less by one), and goes on the same way.
    """

    pieces: Sequence[str | bytes]
    when: str = ""
    after: str = START
    stop: str = STOP
    then: str | bytes | None = None
    doubts: Mapping[str | bytes, str | bytes] = field(default_factory=dict)


def cut(text: str, size: int = 4, taken: frozenset[str] = frozenset()) -> list[str]:
    """Cut `text` into pieces of about `size` characters, no two alike and none of `taken`; a single newline is none."""
    pieces: list[str] = []
    while text:
        length = size
        while text[:length] in taken or text[:length] in pieces or text[:length] == "\n":
            length += 1
            if length > len(text):
                return [*pieces[:-1], *_whole(pieces[-1] + text, {*taken, *pieces[:-1]})]
        pieces.append(text[:length])
        text = text[length:]
    return pieces


def _whole(text: str, taken: set[str]) -> list[str]:
    if text in taken:
        raise ValueError(f"{text!r} cannot be cut into pieces of its own")
    return [text]


def write_scripted(
    path: Path,
    scripts: Sequence[Script],
    *,
    template: str | None = None,
    end_tokens: Sequence[str] = (STOP, STOP_2),
    sampling: Sequence[tuple[str, float]] = (("temp", 0.0),),
    trained: int = 4096,
    name: str = "scripted",
    full_vocabulary: bool = False,
) -> Path:
    """Write the model; `end_tokens` go to eos and eot, `sampling` to general.sampling.*.

    full_vocabulary: as many tokens as Hunyuan-A13B has, the special ones in their places; weights are F16 then.
    """
    markers = [script.when for script in scripts if script.when]
    normal = [*byte_letters(), *_words(scripts)]
    special = SPECIAL
    if full_vocabulary:
        normal += [f"filler{i}" for i in range(N_RANKS - len(markers) - len(normal))]
        special = [*SPECIAL[:5], *(f"<|extra_{i}|>" for i in range(205))]
    tokens = [*normal, *markers, *special]
    if len(set(tokens)) != len(tokens) or len(markers) > HEAD_DIM:
        raise ValueError("a piece or a marker twice")
    kinds = [TokenType.NORMAL] * len(normal) + [TokenType.USER_DEFINED] * len(markers)
    writer = GGUFWriter(path, "hunyuan-moe")
    writer.add_name(name)
    writer.add_context_length(trained)
    add_hparams(writer, 1, N_EMBD, N_FF, heads=(1, 1, HEAD_DIM), experts=(N_EXPERT, 1))
    writer.add_expert_weights_norm(True)
    for key, value in sampling:
        whole = key in ("top_k", "penalty_last_n")
        (writer.add_int32 if whole else writer.add_float32)(f"general.sampling.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("hunyuan")
    writer.add_token_list(tokens)
    writer.add_token_types([*kinds, *[TokenType.CONTROL] * len(special)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tokens.index("<|startoftext|>"))
    for key, token in zip(("eos", "eot"), end_tokens, strict=False):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", tokens.index(token))
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    for tensor, values in _tensors(tokens, markers, scripts).items():
        writer.add_tensor(tensor, values.astype(np.float16) if full_vocabulary and values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _entry(piece: str | bytes) -> str:
    """The vocabulary entry of a piece: one printable character for each byte."""
    if piece in SPECIAL or piece == NEWLINE:
        return str(piece)
    letters = byte_letters()
    return "".join(letters[byte] for byte in (piece.encode() if isinstance(piece, str) else piece))


def _words(scripts: Sequence[Script]) -> list[str]:
    """Entries that the scripts need beside the single bytes; raises ValueError where one stands in two places."""
    used = [_entry(piece) for script in scripts for piece in (*script.pieces, *script.doubts.values())]
    if len(set(used)) != len(used):
        raise ValueError(f"pieces in two places: {sorted({piece for piece in used if used.count(piece) > 1})}")
    there = {*byte_letters(), *SPECIAL}
    return [piece for piece in used if piece not in there]


def _tensors(tokens: list[str], markers: list[str], scripts: Sequence[Script]) -> dict[str, NDArray[np.float32]]:
    embd = np.zeros((len(tokens), N_EMBD), np.float32)
    width = N_EMBD - CODES
    embd[:, CODES:] = np.random.default_rng(11).choice(np.array([-1, 1], np.float32), (len(tokens), width))
    for j, marker in enumerate(markers):
        embd[tokens.index(marker), MARKER + j] = 1
    output = np.zeros_like(embd)
    embd[[tokens.index(START), tokens.index(NEWLINE)], STARTS] = 1
    # The final norm divides by the root mean square of a code.
    scale = float(np.sqrt(width / N_EMBD)) / width
    for script in scripts:
        _chain(script, tokens, embd, output, scale)
        if script.when:
            first = tokens.index(_entry(script.pieces[0]))
            output[first, CHOSEN + markers.index(script.when)] = MARKED * 4 ** markers.index(script.when)
    gate, down = np.zeros((N_FF, N_EMBD), np.float32), np.zeros((N_EMBD, N_FF), np.float32)
    up = np.zeros((N_FF, N_EMBD), np.float32)
    gate[:, STARTS] = 1000
    up[:, SEEN : SEEN + HEAD_DIM] = down[CHOSEN : CHOSEN + HEAD_DIM] = np.eye(HEAD_DIM)
    value, attn_output = np.zeros((HEAD_DIM, N_EMBD), np.float32), np.zeros((N_EMBD, HEAD_DIM), np.float32)
    value[:, MARKER : MARKER + HEAD_DIM] = np.eye(HEAD_DIM)
    attn_output[SEEN : SEEN + HEAD_DIM] = ATTENTION_GAIN * np.eye(HEAD_DIM)
    return {
        "token_embd.weight": embd,
        "output.weight": output,
        "output_norm.weight": np.ones(N_EMBD, np.float32),
        "blk.0.attn_v.weight": value,
        "blk.0.attn_output.weight": attn_output,
        "blk.0.ffn_gate_shexp.weight": gate,
        "blk.0.ffn_up_shexp.weight": up,
        "blk.0.ffn_down_shexp.weight": down,
        **{f"blk.0.{name}.weight": np.ones(N_EMBD, np.float32) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}.weight": np.ones(HEAD_DIM, np.float32) for name in ("attn_q_norm", "attn_k_norm")},
        **{f"blk.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in _SILENT.items()},
    }


def _chain(
    script: Script, tokens: list[str], embd: NDArray[np.float32], output: NDArray[np.float32], scale: float
) -> None:
    """Add the codes that make each piece follow the one before it."""
    last = _entry(script.stop if script.then is None else script.then)
    chain = [_entry(script.after), *map(_entry, script.pieces), last]
    doubts = {_entry(piece): _entry(other) for piece, other in script.doubts.items()}
    for before, after in pairwise(chain):
        for start in filter(None, (before, doubts.get(before))):
            code = np.where(np.arange(N_EMBD) >= CODES, embd[tokens.index(start)], 0) * scale
            sure = HANDICAPPED if script.when and start == _entry(script.after) else SURE
            output[tokens.index(after)] += sure * code
            if after in doubts:
                output[tokens.index(doubts[after])] += (sure + DOUBT - SURE) * code


_SILENT = {
    "attn_q": (HEAD_DIM, N_EMBD),
    "attn_k": (HEAD_DIM, N_EMBD),
    "ffn_gate_inp": (N_EXPERT, N_EMBD),
    "ffn_gate_exps": (N_EXPERT, N_FF, N_EMBD),
    "ffn_up_exps": (N_EXPERT, N_FF, N_EMBD),
    "ffn_down_exps": (N_EXPERT, N_EMBD, N_FF),
}
