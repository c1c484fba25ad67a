"""Training the miniature: the same model as the float64 reference, the same curve again, the same after a stop."""

from __future__ import annotations

import json
from pathlib import Path

import dialogues
import numpy as np
import pytest
import reference
import text

from hymoe.convert.miniature import SPECIAL_TOKENS, trained

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

N_RANK = 700


def test_logits_are_the_reference_s(tmp_path: Path) -> None:
    import torch
    from model import Model, ModelConfig, whole
    from safetensors.torch import save_file

    config = ModelConfig(500, n_layer=2)
    model = Model(config).start(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # lively, so that every part counts
            weight.mul_(4) if weight.dim() > 1 else weight.add_(0.2 * torch.randn(weight.shape))
            assert weight.abs().max() > 0, name
    save_file({name: weight.contiguous() for name, weight in model.published()}, tmp_path / "model.safetensors")
    content = {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head_kv,
        "moe_topk": config.n_expert_used,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "dynamic", "alpha": config.alpha},
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 500, 120)]
    with torch.no_grad():
        got = model(whole(torch.tensor([ids]))).logits[0].numpy()
    assert reference.kl(reference.logits(tmp_path, ids), got) <= 1e-9


def test_packed_documents_do_not_see_each_other() -> None:
    import torch
    from model import Batch, Model, ModelConfig, whole

    model = Model(ModelConfig(300, n_layer=2)).start(0)
    one, two = torch.randint(0, 300, (1, 20)), torch.randint(0, 300, (1, 30))
    document = torch.tensor([[0] * 20 + [1] * 30])
    both = Batch(torch.cat([one, two], dim=1), document, torch.from_numpy(text.positions(document.numpy())))
    with torch.no_grad():
        packed = model(both).logits[0]
        apart = torch.cat([model(whole(one)).logits[0], model(whole(two)).logits[0]])
    assert torch.allclose(packed, apart, atol=1e-5)


def losses(out: Path, stops: tuple[int, ...]) -> list[float]:
    """Train 12 steps of a small model, stopped and taken up again at `stops`; the loss of each step."""
    import torch
    from miniature import Recipe, Run
    from model import ModelConfig

    torch.set_num_threads(1)
    out.mkdir()
    tokenizer = text.encoding(trained(list(dialogues.documents(1, 500)), N_RANK))
    rows = text.packed(text.tokens(tokenizer, dialogues.documents(1, 300)))
    found: list[float] = []
    for stop in stops:
        config = ModelConfig(N_RANK + len(SPECIAL_TOKENS), n_layer=2, n_embd=64, n_ff=64)
        run = Run(out, Recipe(n_step=12, n_row=2, n_warmup=4), config, rows, rows)
        while run.step < stop:
            found.append(run.advance()["loss"])
        run.save()
    return found


def test_training_lowers_the_loss_and_repeats(tmp_path: Path) -> None:
    once = losses(tmp_path / "once", (12,))
    assert once == losses(tmp_path / "again", (12,))
    assert once == losses(tmp_path / "stopped", (5, 12))
    assert once[-1] < once[0] - 0.3
