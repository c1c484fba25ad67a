"""A tiny model whose router looks at one thing only, so that a text reaches the experts that a test chooses.

Column 0 of the hidden state is +2 for the letters a to m and -2 for all other tokens, in every layer; the first half of
the experts wants it positive, the second half negative. Columns and rows differ in scale, as in a trained model, so
that there is something to predict.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader
from tiny_model import LETTERS, N_EXPERT, write_model

FIRST, SECOND = LETTERS[:13].decode(), LETTERS[13:26].decode()


def write_reaching(path: Path) -> Path:
    write_model(path)
    noise = np.random.default_rng(1)
    for tensor in GGUFReader(path, "r+").tensors:
        name, data = tensor.name, tensor.data
        if name == "token_embd.weight":
            data[:, 0] = -2
            data[list(FIRST.encode()), 0] = 2
        elif "ffn_gate_inp" in name:
            data[:] = noise.standard_normal(data.shape) / 8
            data[:, 0] = np.where(np.arange(N_EXPERT) < N_EXPERT // 2, 10, -10)
        elif "attn_output" in name or "ffn_down_shexp" in name:
            data[0] = 0  # nothing else writes to the column
        elif "ffn_down_exps" in name:
            data[:, 0] = 0
        elif "ffn_norm" in name:
            data[1:] = np.exp(noise.standard_normal(data.shape[0] - 1) / 2)
        elif "ffn_up_exps" in name:
            data *= np.exp(noise.standard_normal((*data.shape[:2], 1)))
    return path


def text(letters: str, n: int, seed: int = 0) -> str:
    """Give n random letters."""
    return "".join(np.random.default_rng(seed).choice(list(letters), n))
