"""What the configs of all HunYuan checkpoints share: head size, counts, rope base, trained context, end tokens."""

from __future__ import annotations

from collections.abc import Mapping

from hymoe.convert.config import Config
from hymoe.errors import CheckpointError, UnsupportedError


def head_dim(config: Config, n_embd: int, n_head: int) -> int:
    """Give the size of a head. Raises UnsupportedError for one that cannot be rotated in halves."""
    size = config.integer("head_dim", "attention_head_dim", default=max(n_embd // n_head, 1))
    if size % 2 or size < 4:
        raise UnsupportedError(f"{config.source}: head_dim", got=size, expected="an even number of at least 4")
    return size


def check_counts(config: Config, n_head: int, n_head_kv: int, n_expert: int, n_expert_used: int) -> None:
    """Raise CheckpointError or UnsupportedError for counts that do not go together."""
    if n_head % n_head_kv:
        raise CheckpointError(f"{config.source}: num_key_value_heads", got=n_head_kv, expected=f"a divisor of {n_head}")
    if n_expert < 2:
        raise UnsupportedError(
            f"{config.source}: num_experts",
            got=n_expert,
            expected="at least 2",
            fix="a dense HunYuan model is another architecture",
        )
    if n_expert_used > n_expert:
        raise CheckpointError(
            f"{config.source}: moe_topk", got=n_expert_used, expected=f"at most num_experts {n_expert}"
        )


def rope_base(config: Config, head_dim: int) -> float:
    """theta * alpha^(D/(D-2)): with alpha the "dynamic" base is a constant, not a function of length.

    head_dim: more than 2. Raises UnsupportedError for another kind of scaling, CheckpointError for a base that float32
    cannot hold.
    """
    theta = (config if config.has("rope_theta") else _rope(config)).number("rope_theta")
    alpha = _alpha(config)
    base = theta if alpha is None else theta * alpha ** (head_dim / (head_dim - 2))
    return Config({"base": base}, f"{config.source}: rope_theta with alpha").number("base")


def trained_context(config: Config, by_alpha: Mapping[float, int]) -> int:
    """Give max_position_embeddings, or what the vendor says of the rope's alpha where that is more."""
    written = config.integer("max_position_embeddings")
    alpha = _alpha(config)
    return max(written, by_alpha.get(alpha, 0)) if alpha else written


def end_tokens(*places: tuple[Config, str]) -> tuple[int, ...]:
    """Give every id that ends an answer, from these keys in order: <|eos|> first and, as published, <|extra_5|>."""
    found: list[int] = []
    for source, key in places:
        value = source.data.get(key)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and token not in found:
                found.append(token)
    return tuple(found)


def _rope(config: Config) -> Config:
    """The rope settings: `rope_scaling` as published, `rope_parameters` as transformers 5 saves them."""
    rope = config.sub("rope_scaling", "rope_parameters")
    kind = rope.data.get("type", rope.data.get("rope_type", "default"))
    if kind not in ("default", "dynamic"):
        raise UnsupportedError(f"{rope.source}: type", got=kind, expected='"dynamic" with alpha, or none')
    if kind == "dynamic":
        rope.expect("factor", 1.0, 1)
    return rope


def _alpha(config: Config) -> float | None:
    rope = _rope(config)
    if rope.data.get("type", rope.data.get("rope_type")) != "dynamic" or not rope.data.get("alpha"):
        return None
    return rope.number("alpha")
