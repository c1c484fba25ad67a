"""The engine's router modes against the float64 reference, and what they must not change."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from engine_eval import EngineRunError, evaluate
from gguf import GGUFReader
from numpy.typing import NDArray
from reference import Adaptive, Gating
from router_cases import (
    CLEAR_TOKENS,
    FLASH_MARGIN,
    NARROW,
    WIDE,
    Case,
    Models,
    Shape,
    clear,
    clear_models,
    close_tokens,
    models,
    overrides,
)

from hymoe import engine

pytestmark = pytest.mark.engine

# F32 weights and F32 KV: what is left is the rounding of float32 sums, 3e-12 here.
F32_BOUND = 1e-9
# Flash attention rounds K and V to F16: 6e-7 here at most where no choice turns over.
FLASH_BOUND = 1e-5
# One choice turned over costs this much, as a mean over a prompt: 3e-3 here at most.
FLIPPED_BOUND = 1e-2

MODES: list[tuple[Shape, Gating]] = [
    *((shape, gating) for shape in (WIDE, NARROW) for gating in ("capacity", Adaptive(1, 0.5), Adaptive(2, 0.1))),
    *((WIDE, Adaptive(4, 0.3)), (NARROW, Adaptive(2, 0.3))),
]
CASES = [Case(shape, n, gating) for n in (8, 64, 200, 1000) for shape, gating in MODES]
# Of a random model, clear for float32, but the rounding to F16 turns a choice of experts over. Each has a choice
# closer than FLASH_MARGIN, as nearly every prompt of this length has.
FLIPPED = [
    Case(WIDE, 200, Adaptive(1, 0.5)),
    Case(WIDE, 200, Adaptive(2, 0.1)),
    Case(WIDE, 1000, "capacity"),
    Case(WIDE, 1000, Adaptive(1, 0.5)),
    Case(WIDE, 1000, Adaptive(2, 0.1)),
    Case(NARROW, 1000, Adaptive(2, 0.1)),
]


def tiers(cases: Sequence[Case]) -> list[Any]:
    """Give parameters of a test, those of long prompts in the long tier."""
    return [pytest.param(case, id=str(case), marks=[pytest.mark.long] * (case.n_tokens > 200)) for case in cases]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Both miniatures, as checkpoint and as F32 file."""
    return models(tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def clear_made(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Both with routers that decide nothing narrowly."""
    return clear_models(tmp_path_factory.mktemp("clear"))


@pytest.mark.parametrize("case", tiers(CASES))
def test_modes(made: Models, case: Case) -> None:
    checkpoint, gguf = made[case.shape]
    truth = clear(checkpoint, case)
    (got,) = evaluate(gguf, [truth.ids], n_ubatch=case.n_tokens, overrides=overrides(case.gating))
    assert reference.kl(truth.logits, got) <= F32_BOUND


@pytest.mark.parametrize("case", tiers([replace(case, tokens=CLEAR_TOKENS) for case in CASES]))
def test_modes_with_flash_attention(clear_made: Models, case: Case) -> None:
    checkpoint, gguf = clear_made[case.shape]
    truth = clear(checkpoint, case, margin=FLASH_MARGIN)
    (got,) = evaluate(gguf, [truth.ids], n_ubatch=case.n_tokens, overrides=overrides(case.gating), flash_attn=True)
    assert reference.kl(truth.logits, got) <= FLASH_BOUND


@pytest.mark.parametrize("case", tiers(FLIPPED))
def test_flash_attention_turns_close_choices_over(made: Models, case: Case) -> None:
    checkpoint, gguf = made[case.shape]
    truth = clear(checkpoint, case)
    (got,) = evaluate(gguf, [truth.ids], n_ubatch=case.n_tokens, overrides=overrides(case.gating), flash_attn=True)
    assert reference.kl(truth.logits, got) <= FLIPPED_BOUND
    if case.gating != "capacity":  # there a choice has a part in what other tokens get, earlier ones too
        n_sure = int(np.argmax(close_tokens(truth.probabilities, case, FLASH_MARGIN)))
        assert n_sure > 8
        assert reference.kl(truth.logits[:n_sure], got[:n_sure]) <= FLASH_BOUND


@pytest.mark.parametrize("gating", ["capacity", Adaptive(4, 0.3), Adaptive(2, 0.1)], ids=str)
def test_the_modes_differ(made: Models, clear_made: Models, gating: Gating) -> None:
    """By far more than the bounds, so that plain top-k does not pass for another mode."""
    random, decided = Case(WIDE, 64, gating), Case(WIDE, 64, gating, tokens=CLEAR_TOKENS)
    for models_of, case, bound in ((made, random, F32_BOUND), (clear_made, decided, FLASH_BOUND)):
        checkpoint, _ = models_of[WIDE]
        topk = reference.logits(checkpoint, case.ids)
        assert reference.kl(topk, reference.logits(checkpoint, case.ids, gating=gating)) > 100 * bound


def test_decoding_after_a_prompt_drops_nothing(made: Models) -> None:
    checkpoint, gguf = made[WIDE]
    truth = clear(checkpoint, Case(WIDE, 64, "capacity"), n_prompt=40)
    (got,) = evaluate(gguf, [truth.ids], n_prompt=40, overrides=overrides("capacity"))
    assert reference.kl(truth.logits, got) <= F32_BOUND


@pytest.mark.parametrize("gating", ["capacity", Adaptive(4, 0.3)], ids=["capacity", "adaptive"])
def test_threads(made: Models, gating: Gating) -> None:
    checkpoint, gguf = made[WIDE]
    truth = clear(checkpoint, Case(WIDE, 64, gating))
    (got,) = evaluate(gguf, [truth.ids], n_threads=3, overrides=overrides(gating))
    assert reference.kl(truth.logits, got) <= F32_BOUND


@pytest.mark.parametrize("n_ubatch", [1, 7, 64])
def test_adaptive_does_not_depend_on_the_batch(made: Models, n_ubatch: int) -> None:
    checkpoint, gguf = made[WIDE]
    gating = Adaptive(4, 0.3)
    truth = clear(checkpoint, Case(WIDE, 64, gating))
    (got,) = evaluate(gguf, [truth.ids], n_ubatch=n_ubatch, overrides=overrides(gating))
    assert reference.kl(truth.logits, got) <= F32_BOUND


def quantized(gguf: Path, folder: Path, name: str) -> Path:
    out = folder / f"{name}.gguf"
    if not out.exists():
        run: list[str | Path] = [engine.find().tool("llama-quantize"), "--pure", gguf, out, name, "1"]
        subprocess.run(run, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def q4(made: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the wide miniature in a type whose experts the CPU repacks."""
    return quantized(made[WIDE][1], tmp_path_factory.mktemp("q4"), "Q4_0")


@pytest.mark.parametrize("repack", [True, False], ids=["repacked", "as stored"])
@pytest.mark.parametrize("n_ubatch", [1, 64])
def test_threshold_0_is_topk_bit_for_bit(q4: Path, repack: bool, n_ubatch: int) -> None:
    ids = Case(WIDE, 64, "topk").ids
    (topk,) = evaluate(q4, [ids], repack=repack, n_ubatch=n_ubatch)
    (zero,) = evaluate(q4, [ids], repack=repack, n_ubatch=n_ubatch, overrides=overrides(Adaptive(1, 0.0)))
    assert topk.tobytes() == zero.tobytes()
    (half,) = evaluate(q4, [ids], repack=repack, n_ubatch=n_ubatch, overrides=overrides(Adaptive(1, 0.5)))
    assert topk.tobytes() != half.tobytes()


@pytest.mark.parametrize("repack", [True, False], ids=["repacked", "as stored"])
@pytest.mark.parametrize("n_ubatch", [1, 64])
@pytest.mark.parametrize("gating", ["capacity", Adaptive(1, 0.5)], ids=["capacity", "adaptive"])
def test_stand_ins_weigh_nothing(q4: Path, repack: bool, n_ubatch: int, gating: reference.Gating) -> None:
    """Where others look at the operations a dropped slot holds a real expert, weighted 0: the same bits."""
    if gating == "capacity" and n_ubatch == 1:
        pytest.skip("a prompt in pieces is refused")
    ids = Case(WIDE, 64, gating).ids
    runs = [
        evaluate(q4, [ids], repack=repack, n_ubatch=n_ubatch, watched=watched, overrides=overrides(gating))[0]
        for watched in (False, True)
    ]
    assert runs[0].tobytes() == runs[1].tobytes()


REFUSED = {
    "unknown mode": ({"mode": "str:topp"}, 'hunyuan-moe.router.mode is "topp": expected topk, capacity or adaptive'),
    "mode of another type": ({"mode": "int:1"}, "hunyuan-moe.router.mode has another type: expected a string"),
    "no experts": ({"min_experts": "int:0"}, "hunyuan-moe.router.min_experts is 0: expected 1 to 8"),
    "too many": ({"min_experts": "int:9"}, "hunyuan-moe.router.min_experts is 9: expected 1 to 8"),
    "beyond 32 bits": ({"min_experts": f"int:{2**32 + 2}"}, "is 4294967298: expected 1 to 8"),
    "number of another type": ({"min_experts": "float:4"}, "min_experts has another type: expected an integer"),
    "negative threshold": ({"threshold": "float:-0.1"}, "hunyuan-moe.router.threshold is -0.1: expected 0 to 1"),
    "threshold above 1": ({"threshold": "float:1.5"}, "hunyuan-moe.router.threshold is 1.5: expected 0 to 1"),
    "no number": ({"threshold": "float:nan"}, "hunyuan-moe.router.threshold is nan: expected 0 to 1"),
    "threshold of another type": ({"threshold": "int:0"}, "threshold has another type: expected a number"),
    "misspelt key": ({"treshold": "float:0.1"}, "hunyuan-moe.router.treshold: unknown"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_it_refuses(made: Models, keys: dict[str, str], message: str) -> None:
    values = {f"hunyuan-moe.router.{key}": value for key, value in keys.items()}
    with pytest.raises(EngineRunError) as error:
        evaluate(made[WIDE][1], [[1]], overrides=values)
    assert message in str(error.value)


def test_a_prompt_in_pieces_is_refused(made: Models) -> None:
    ids = Case(WIDE, 64, "capacity").ids
    with pytest.raises(EngineRunError, match=r"a prompt of 64 tokens: at most 63 \(n_ubatch\) at once"):
        evaluate(made[WIDE][1], [ids], n_ubatch=63, overrides=overrides("capacity"))


def test_a_prompt_that_begins_later_is_refused(made: Models) -> None:
    ids = Case(WIDE, 8, "capacity").ids
    with pytest.raises(EngineRunError, match="the prompt of sequence 0 begins at position 3: expected 0"):
        evaluate(made[WIDE][1], [ids], first_pos=3, overrides=overrides("capacity"))


def test_a_prompt_of_two_sequences_is_refused(made: Models) -> None:
    ids = Case(WIDE, 8, "capacity").ids
    with pytest.raises(EngineRunError, match="a token of 2 sequences among 8 tokens"):
        evaluate(made[WIDE][1], [ids], n_seq=2, overrides=overrides("capacity"))


def collected(model: Path, out: Path, text: Path, *arguments: str) -> dict[str, NDArray[np.float32]]:
    """Run llama-imatrix and give what it wrote."""
    tool = engine.find().tool("llama-imatrix")
    run: list[str | Path] = [tool, "-m", model, "-f", text, "-o", out, "-c", "64", "-t", "1", "--no-ppl", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert not done.returncode, done.stderr[-2000:]
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(out).tensors}


def test_an_imatrix_sees_all_experts(made: Models, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lamp at the end of the pier was lit. " * 60, encoding="utf-8")
    gguf = made[WIDE][1]
    plain = collected(gguf, tmp_path / "plain.gguf", text)
    few = ",".join(f"{key}={value}" for key, value in overrides(Adaptive(1, 0.9)).items())
    asked = collected(gguf, tmp_path / "asked.gguf", text, "--override-kv", few)
    assert plain.keys() == asked.keys()
    for name, values in plain.items():
        assert np.array_equal(values, asked[name]), name
