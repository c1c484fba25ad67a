"""Write a trained miniature as Tencent publishes its models: a BF16 checkpoint, and FP8 with static scales.

FP8 is as in the A13B-FP8 release: `X.weight` F8_E4M3, `X.weight_scale` F32 (W = weight · weight_scale) and
`X.input_scale` F32 for every matrix of attention, shared expert and routed experts; the rest stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import text
import torch
from miniature import batch, validate
from model import Mixture, Model, ModelConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from hymoe.convert import miniature

FP8_MAX = 448.0
LONGEST = 2048  # positions promised; documents of the training text have at most 512
QUANTIZATION = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


def write(out: Path) -> Iterator[str]:
    """Write both checkpoints into `out` from its last save; say where, how large, and the loss of each."""
    state = torch.load(out / "state.pt", weights_only=True)
    model = Model(ModelConfig(text.N_VOCAB))
    model.load_state_dict({name: rounded(name, weight) for name, weight in state["model"].items()})
    with_rows = text.prepare(out, out / "fetched", **_begun(out))[1]
    losses = {"Hunyuan-Miniature": validate(model, with_rows)["validation"]}
    weights = dict(model.published())
    _write(out / "Hunyuan-Miniature", out, dict(weights), {})
    small, restored = quantized(weights, input_scales(model, with_rows))
    _write(out / "Hunyuan-Miniature-FP8", out, small, {"quantization_config": QUANTIZATION})
    load_published(model, restored)
    losses["Hunyuan-Miniature-FP8"] = validate(model, with_rows)["validation"]
    for name, loss in losses.items():
        size = (out / name / "model.safetensors").stat().st_size
        yield f"{out / name}: step {state['step']}, {size / 1e6:.2f} MB, validation loss {loss:.5f}"


def _begun(out: Path) -> dict[str, int]:
    recipe = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    return {"seed": recipe["seed"], "n_rows": recipe["n_step"] * recipe["n_row"]}


def rounded(name: str, weight: Tensor) -> Tensor:
    """Round to BF16 what is stored so, all but the routers."""
    return weight if ".wg." in name else weight.bfloat16().float()


def stored(name: str, weight: Tensor) -> Tensor:
    """Give the type in the file: routers F32, everything else BF16."""
    return weight.float() if ".gate.wg." in name else weight.bfloat16()


def is_quantized(name: str) -> bool:
    """Say whether FP8 holds this tensor: the projections."""
    return name.endswith("_proj.weight")


def quantized(weights: dict[str, Tensor], inputs: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give the tensors of the FP8 checkpoint, and the weights that a reader gets back from it."""
    small: dict[str, Tensor] = {}
    restored: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not is_quantized(name):
            small[name], restored[name] = weight, weight
            continue
        scale = (weight.abs().max() / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        small[name] = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        small[f"{name}_scale"] = scale
        small[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(inputs[name] / FP8_MAX)
        restored[name] = small[name].float() * scale
    return small, restored


def input_scales(model: Model, rows: text.Rows) -> dict[str, float]:
    """Measure the largest input of every projection on validation rows."""
    largest: dict[str, float] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(arguments[0].abs().max()))

        hooks.append(module.register_forward_pre_hook(see))

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            watch(f"model.{name}.weight", module)
        if isinstance(module, Mixture):
            module.seen = {}
    with torch.no_grad():
        model(batch(rows, 0, 8)[0])
    for hook in hooks:
        hook.remove()
    for name, module in model.named_modules():
        if isinstance(module, Mixture) and module.seen is not None:
            largest |= {f"model.{name}.{key}.weight": value for key, value in module.seen.items()}
            module.seen = None
    # An expert that these rows did not reach gets the largest input of any.
    anything = max(largest.values())
    return {name: largest.get(name, anything) for name, _ in model.published() if is_quantized(name)}


def load_published(model: Model, weights: dict[str, Tensor]) -> None:
    """Put weights back under the module's own names."""
    with torch.no_grad():
        for name, target in model.published():
            target.copy_(weights[name])


def _write(folder: Path, out: Path, weights: dict[str, Tensor], extra: dict[str, object]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = ModelConfig(0)
    spec = miniature.Spec(
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_head_kv=config.n_head_kv,
        head_dim=config.head_dim,
        n_ff=config.n_ff,
        n_expert=config.n_expert,
        n_expert_used=config.n_expert_used,
        alpha=config.alpha,
        rope_theta=config.rope_theta,
        rms_eps=config.rms_eps,
        vocab=out / "hy.tiktoken",
    )
    miniature.write_descriptions(folder, spec)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"max_position_embeddings": LONGEST, **extra}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, weight in weights.items():
        as_is = weight.dtype == torch.float8_e4m3fn or name.endswith("_scale")
        weights[name] = (weight if as_is else stored(name, weight)).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
