# mypy: disallow-subclassing-any=False
"""HunYuan's mixture of experts as a torch module to train on a CPU, in float32 and under the published names.

The definition is the one that tests/reference.py states in float64: RoPE before the per-head norms of queries and keys,
the k most probable experts with weights that sum to 1, a shared expert, tied embeddings. Source:
Tencent-Hunyuan/Hunyuan-A13B models/modeling_hunyuan.py; its capacity limit is left out, as in every runtime.

Shapes: B rows of T positions, n_head and n_head_kv heads of width D, E experts of which k answer, N = B·T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes; the defaults are the miniature's. `alpha` is the NTK constant of the rope base."""

    n_vocab: int
    n_layer: int = 8
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 256
    n_expert: int = 12
    n_expert_used: int = 3
    alpha: float = 1000.0
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5


@dataclass(frozen=True)
class Batch:
    """Packed documents, [B, T]: tokens, the number of each one's document in its row, its position there."""

    ids: Tensor
    document: Tensor
    position: Tensor


class Norm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention; queries and keys are normed per head after the rotation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, q, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv, bias=False)
        self.o_proj = nn.Linear(q, config.n_embd, bias=False)
        self.query_layernorm = Norm(config.head_dim, config.rms_eps)
        self.key_layernorm = Norm(config.head_dim, config.rms_eps)
        self.head_dim, self.group = config.head_dim, config.n_head // config.n_head_kv

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[B, T, n_embd] with cos and sin [B, 1, T, D] and mask [B, 1, T, T], true where a key may be seen."""

        def heads(projection: nn.Linear) -> Tensor:
            return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q = self.query_layernorm(rotate(heads(self.q_proj), cos, sin))
        k = self.key_layernorm(rotate(heads(self.k_proj), cos, sin)).repeat_interleave(self.group, dim=1)
        v = heads(self.v_proj).repeat_interleave(self.group, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Shared(nn.Module):
    """The expert that answers every token: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Mixture(nn.Module):
    """Shared and routed experts. The routed ones are stacked, [E, n_ff, n_embd]; on disk each is a matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shared_mlp = Shared(config)
        self.wg = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.gate = nn.Parameter(torch.empty(config.n_expert, config.n_ff, config.n_embd))
        self.up = nn.Parameter(torch.empty(config.n_expert, config.n_ff, config.n_embd))
        self.down = nn.Parameter(torch.empty(config.n_expert, config.n_embd, config.n_ff))
        self.n_expert, self.n_used = config.n_expert, config.n_expert_used
        self.seen: dict[str, float] | None = None  # largest input of each expert's matrices, where one asks for it

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the answer [N, n_embd], the balance loss (1: all experts alike), and pairs per expert [E]."""
        p = F.softmax(self.wg(x).float(), dim=-1)
        weight, chosen = p.topk(self.n_used, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        count = torch.bincount(chosen.flatten(), minlength=self.n_expert)
        # Pairs of (token, expert) in the order of the experts, so that each expert multiplies one block of rows.
        order = chosen.flatten().argsort(stable=True)
        token = order // self.n_used
        blocks = x.index_select(0, token).split(count.tolist())
        answers = torch.cat([self._expert(i, block) for i, block in enumerate(blocks)])
        answers = answers * weight.flatten()[order, None]
        routed = torch.zeros_like(x).index_add(0, token, answers.to(x.dtype))
        share = count.to(p.dtype) / chosen.numel()
        balance = self.n_expert * (share * p.mean(dim=0)).sum()
        return self.shared_mlp(x) + routed, balance, count

    def _expert(self, i: int, x: Tensor) -> Tensor:
        inner = F.silu(F.linear(x, self.gate[i])) * F.linear(x, self.up[i])
        if self.seen is not None and len(x):
            for name, values in {"gate": x, "up": x, "down": inner}.items():
                key = f"experts.{i}.{name}_proj"
                self.seen[key] = max(self.seen.get(key, 0.0), float(values.abs().max()))
        return F.linear(inner, self.down[i])


class Layer(nn.Module):
    """One layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.n_embd, config.rms_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.n_embd, config.rms_eps)
        self.mlp = Mixture(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        y, balance, count = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + y.view_as(x), balance, count


@dataclass(frozen=True)
class Output:
    """Logits [B, T, n_vocab], the mean balance loss of the layers, and how many pairs each expert took [n_layer, E]."""

    logits: Tensor
    balance: Tensor
    usage: Tensor


class Model(nn.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.n_vocab, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = Norm(config.n_embd, config.rms_eps)
        base = config.rope_theta * config.alpha ** (config.head_dim / (config.head_dim - 2))
        half = torch.arange(config.head_dim // 2, dtype=torch.float64)
        self.register_buffer("frequency", (base ** (-2 * half / config.head_dim)).float(), persistent=False)

    def start(self, seed: int) -> Model:
        """Draw the weights: std 0.02, smaller by sqrt(2 n_layer) where a matrix adds to the residual stream."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                adds = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.down"))
                std = 0.02 / sqrt(2 * self.config.n_layer) if adds else 0.02
                nn.init.normal_(weight, std=std, generator=generator)
        return self

    def forward(self, batch: Batch) -> Output:
        angle = batch.position[:, None, :, None] * self.get_buffer("frequency").repeat(2)
        cos, sin = angle.cos(), angle.sin()
        n = batch.ids.shape[1]
        same = batch.document[:, :, None] == batch.document[:, None, :]
        mask = (same & torch.ones(n, n, dtype=torch.bool).tril())[:, None]
        x = self.embed_tokens(batch.ids)
        balances, counts = [], []
        for layer in self.layers:
            x, balance, count = layer(x, cos, sin, mask)
            balances.append(balance)
            counts.append(count)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return Output(logits, torch.stack(balances).mean(), torch.stack(counts))

    def published(self) -> Iterator[tuple[str, Tensor]]:
        """Give every weight under the name it has in a published checkpoint, the experts one by one."""
        for name, weight in self.state_dict().items():
            head, _, last = name.rpartition(".")
            if last in {"gate", "up", "down"}:
                for i, matrix in enumerate(weight):
                    yield f"model.{head}.experts.{i}.{last}_proj.weight", matrix
            else:
                yield f"model.{name.replace('mlp.wg.', 'mlp.gate.wg.')}", weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head, its first half against its second (NEOX)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def whole(ids: Tensor) -> Batch:
    """Make a batch of rows [B, T] that are one document each."""
    return Batch(ids, torch.zeros_like(ids), torch.arange(ids.shape[1]).expand_as(ids))
