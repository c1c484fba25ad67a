"""A recipe as the text that `hy-convert --recipe` reads and a person can follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from hymoe import console
from hymoe.imatrix.sensitivity import kind_of

if TYPE_CHECKING:
    from hymoe.imatrix.recommend import Recommendation

# File types by bits per weight, for the label that hy-convert wants.
LABELS: Final = ((7.5, "Q8_0"), (6.1, "Q6_K"), (5.3, "Q5_K_M"), (4.4, "Q4_K_M"), (3.4, "Q3_K_M"), (0, "Q2_K"))


def recipe_text(found: Recommendation) -> str:
    """Write the file that `hy-convert --recipe` reads: comments, then one line for each kind of tensor and type."""
    label = next(name for bits, name in LABELS if found.bits >= bits)
    imatrix = f" --imatrix {found.imatrix}" if found.imatrix else ""
    how = "measured by running this model" if found.is_measured else "assumed from those of hymoe's miniature"
    lines = [
        f"# {found.name}: {found.bits:.3f} bits per weight, {console.format_bytes(found.n_bytes)}",
        f"# Predicted loss: {found.loss:.4g} nats per token (mean KL divergence); sensitivities {how}.",
        *_memory_lines(found),
        "# Around it:",
        *(f"#   {console.format_bytes(n):>9}  {bits:.3f} bits  loss {loss:.4g}" for n, bits, loss in found.around),
        f"# hy-convert CHECKPOINT OUT.gguf --quant {label}{imatrix} --recipe THIS",
        "",
        *_rules(found.types),
    ]
    return "\n".join(lines) + "\n"


def _memory_lines(found: Recommendation) -> list[str]:
    if found.budget is None:
        return []
    kv = f"{console.format_bytes(found.budget.kv_bytes)} of {found.budget.kv_type} keys and values"
    lines = [f"# On the card: all but the experts, {kv}, and the experts of {found.n_card} of {found.n_layer} layers."]
    if found.speed:
        lines.append(f"# The experts in RAM alone would give {found.speed:.1f} tokens per second.")
    return lines


def _rules(types: Mapping[str, GGMLQuantizationType]) -> list[str]:
    grouped: dict[str, dict[GGMLQuantizationType, list[int]]] = {}
    lines = []
    for name, qtype in types.items():
        kind, layer = kind_of(name)
        if layer is None:
            lines.append(f"^{kind}\\.weight$ = {qtype.name}")
        else:
            grouped.setdefault(kind, {}).setdefault(qtype, []).append(layer)
    for kind, by_type in grouped.items():
        for qtype, layers in sorted(by_type.items(), key=lambda entry: -_bits(entry[0])):
            which = r"\d+" if len(by_type) == 1 else f"({'|'.join(map(str, layers))})"
            lines.append(f"^blk\\.{which}\\.{kind}\\.weight$ = {qtype.name}")
    return lines


def _bits(qtype: GGMLQuantizationType) -> float:
    block, n_bytes = GGML_QUANT_SIZES[qtype]
    return 8 * float(n_bytes) / float(block)
