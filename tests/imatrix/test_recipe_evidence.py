"""What a recipe rests on: errors by type, and what they cost, each against another way to know."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, quants
from tiny_recipe_model import write_imatrix

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.engine import bindings
from hymoe.engine.evaluator import Evaluator
from hymoe.engine.quant_types import ModelShape, Tensor, choose
from hymoe.errors import ModelFileError
from hymoe.imatrix import distortion, files, heldout, sensitivity
from hymoe.imatrix.divergence import Reference, Tally
from hymoe.imatrix.files import Entry
from hymoe.imatrix.weights import GgufWeights, matrices

Q8_0, Q4_K = GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K
DOWN = "blk.1.ffn_down_exps.weight"

pytestmark = pytest.mark.engine


def test_rows_are_those_that_gguf_py_reads(gguf: Path) -> None:
    reader = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    with GgufWeights(gguf) as weights:
        assert list(weights.tensors) == list(reader)
        for name in ("token_embd.weight", DOWN, "blk.0.attn_norm.weight"):
            whole = quants.dequantize(reader[name].data, reader[name].tensor_type)
            tensor = weights.tensors[name]
            by_slice = whole.reshape(tensor.n_slice, tensor.n_rows, -1)
            last = tensor.n_slice - 1
            np.testing.assert_array_equal(weights.rows(name, last, range(tensor.n_rows)), by_slice[last])


def test_errors_are_what_gguf_py_computes(gguf: Path, imatrix: Path) -> None:
    """Q8_0 is made the same by gguf-py, with or without importance."""
    importance = files.read(imatrix)
    with GgufWeights(gguf) as weights:
        found = distortion.measure(weights, [DOWN], [Q8_0, Q4_K], importance, lambda _n: None, n_threads=1)[DOWN]
        squares = energy = 0.0
        entry = importance.entries[DOWN]
        columns = importance.importance(DOWN).reshape(len(entry.counts), -1).astype(np.float64)
        for index, rows in distortion.sampled(DOWN, weights.tensors[DOWN]):
            values = weights.rows(DOWN, index, rows)
            decoded = quants.dequantize(quants.quantize(values, Q8_0), Q8_0)
            usage = entry.counts[index] / entry.counts.sum()
            squares += usage * float((np.square((decoded - values).astype(np.float64)) @ columns[index]).sum())
            energy += usage * float((np.square(values.astype(np.float64)) @ columns[index]).sum())
    assert found["Q8_0"] == pytest.approx(squares / energy, rel=1e-3)
    assert found["Q4_K"] > 50 * found["Q8_0"]


def test_the_types_that_need_importance_are_the_engines() -> None:
    """Those for which llama-quantize asks, and among them what ggml does not quantize without."""
    types = [qtype for qtype in GGMLQuantizationType if qtype.name not in ("Q8_1", "Q8_K")]  # never in a file
    asked = [Tensor(DOWN, (1, 256), qtype, fixed=True) for qtype in types]
    shape = ModelShape("hunyuan-moe", n_embd=256, n_ff=256, n_layer=2, n_head=1, n_head_kv=1, n_expert=1, head_dim=256)
    answers = choose(shape, LlamaFileType.MOSTLY_Q8_0, asked, imatrix=False).tensors
    needing = {qtype.name for qtype, answer in zip(types, answers, strict=True) if answer.requires_imatrix}
    assert needing == set(distortion.NEED_IMPORTANCE)
    assert {qtype.name for qtype in types if bindings.requires_importance(qtype)} <= needing


def test_an_imatrix_of_another_model_is_refused_by_its_first_tensor(gguf: Path, tmp_path: Path) -> None:
    with GgufWeights(gguf) as weights:
        wide = write_imatrix(tmp_path / "wide.gguf", weights, n_more=1)
        with pytest.raises(ModelFileError, match=r"another model: got 257 values for blk\.0\.attn_q\.weight"):
            distortion.importance_of(files.read(wide), weights.tensors)
        deep = write_imatrix(tmp_path / "deep.gguf", weights, also="blk.7.attn_q.weight")
        with pytest.raises(ModelFileError, match=r"got an entry for blk\.7.attn_q.weight"):
            distortion.importance_of(files.read(deep), weights.tensors)


def test_a_sensitivity_tells_what_a_file_loses(
    mini_checkpoint: Path, gguf: Path, imatrix: Path, tmp_path: Path
) -> None:
    """A file with one coarse tensor loses what sensitivity × error says of it, and measuring leaves no trace."""
    importance = files.read(imatrix)
    names = ["blk.0.attn_v.weight", DOWN]
    with GgufWeights(gguf) as weights:
        texts = heldout.documents((), weights.chat_template)
        errors = distortion.measure(weights, names, [Q4_K], importance, lambda _n: None, n_threads=1)
        with Evaluator(gguf, n_ctx=256, n_threads=1, repack=False) as model:
            reference = Reference(heldout.tokens(model, texts, 512), model.n_vocab)
            assert sum(reference.record(model)) == reference.n_tokens
            costs = sensitivity.measure(model, weights, names, reference, imatrix=importance, tick=lambda _n: None)
            again = Tally()
            sum(reference.compare(model, again, "again"))
        assert again.quality().largest == 0.0
        for name in names:
            recipe = tmp_path / "recipe"
            recipe.write_text(f"^{name}$ = Q4_K\n. = BF16\n")
            out = tmp_path / "out.gguf"
            convert(ConvertOptions(mini_checkpoint, out, "Q4_K_M", True, imatrix, recipe))
            tally = Tally()
            with Evaluator(out, n_ctx=256, n_threads=1) as model:
                sum(reference.compare(model, tally, out.name))
            predicted = costs[name] * errors[name]["Q4_K"]
            assert abs(math.log(tally.quality().mean / predicted)) < math.log(2), name
        reference.__exit__()


def test_errors_and_what_they_cost_count_experts_alike(
    gguf: Path, imatrix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever experts met the tokens: error × cost is the divergence that was measured."""
    monkeypatch.setattr(distortion, "N_SAMPLE", 1 << 20)
    probe, even = sensitivity.PROBES[0], files.read(imatrix)
    losses, errors = [], []
    with GgufWeights(gguf) as weights, Evaluator(gguf, n_ctx=256, n_threads=1, repack=False) as model:
        texts = heldout.documents((), weights.chat_template)
        with Reference(heldout.tokens(model, texts, 300), model.n_vocab) as reference:
            sum(reference.record(model))
            for counts in ((1, 1, 1, 1), (997, 1, 1, 1)):
                # The same importance, so the same quantization.
                means, tokens = even.importance(DOWN).reshape(4, -1), np.array(counts)
                entry = Entry((means * tokens[:, None]).astype(np.float32).reshape(-1), tokens)
                other = replace(even, entries={**even.entries, DOWN: entry})
                found = distortion.measure(weights, [DOWN], [probe], other, lambda _n: None, n_threads=1)
                costs = sensitivity.measure(model, weights, [DOWN], reference, imatrix=other, tick=lambda _n: None)
                errors.append(found[DOWN][probe.name])
                losses.append(errors[-1] * costs[DOWN])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert errors[0] != pytest.approx(errors[1], rel=5e-3)


def test_the_shipped_table_speaks_of_every_kind(gguf: Path) -> None:
    table = sensitivity.shipped()
    with GgufWeights(gguf) as weights:
        names = matrices(weights)
        assert {sensitivity.kind_of(name)[0] for name in names} == set(table["sensitivity"]) == set(table["error"])
        found = sensitivity.assumed(names, 2, table["sensitivity"])
    assert min(found.values()) > 0
    for kind, errors in table["error"].items():
        assert errors["Q8_0"] < errors["Q6_K"] < errors["Q4_K"] < errors["Q3_K"] < errors["Q2_K"], kind
    assert table["origin"]


def test_the_table_gives_back_what_it_was_made_of() -> None:
    measured = {f"blk.{layer}.attn_q.weight": 1.0 + layer for layer in range(8)} | {"token_embd.weight": 5.0}
    table = sensitivity.summarized(measured, 8)
    assert sensitivity.assumed(list(measured), 8, table) == pytest.approx(measured)
    twice = sensitivity.assumed([f"blk.{layer}.attn_q.weight" for layer in range(16)], 16, table)
    assert sum(twice.values()) == pytest.approx(sum(measured.values()) - 5.0, rel=0.02)
