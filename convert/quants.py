"""--quant: the types a file can have, and the type of every tensor in it.

Imports nothing heavy at the top: --help lists the types from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from hymoe import console
from hymoe.convert.architectures import Key
from hymoe.errors import ModelFileError, UnsupportedError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, LlamaFileType

    from hymoe.convert.architectures import Architecture
    from hymoe.engine.quant_types import Choice, ModelShape
    from hymoe.imatrix.files import Floats, Imatrix
    from hymoe.imatrix.recipe import Recipe


FLOATS = ("F32", "F16", "BF16")


class Quant(StrEnum):
    """File types by llama.cpp's names, largest first."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q6_K = "Q6_K"
    Q5_K_M = "Q5_K_M"
    Q5_K_S = "Q5_K_S"
    Q4_K_M = "Q4_K_M"
    Q4_K_S = "Q4_K_S"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    MXFP4_MOE = "MXFP4_MOE"
    Q3_K_L = "Q3_K_L"
    Q3_K_M = "Q3_K_M"
    Q3_K_S = "Q3_K_S"
    IQ3_M = "IQ3_M"
    IQ3_S = "IQ3_S"
    IQ3_XS = "IQ3_XS"
    IQ3_XXS = "IQ3_XXS"
    Q2_K = "Q2_K"
    Q2_K_S = "Q2_K_S"
    IQ2_M = "IQ2_M"
    IQ2_S = "IQ2_S"
    IQ2_XS = "IQ2_XS"
    IQ2_XXS = "IQ2_XXS"
    IQ1_M = "IQ1_M"
    IQ1_S = "IQ1_S"

    @property
    def file_type(self) -> LlamaFileType:
        """What general.file_type says."""
        from gguf import LlamaFileType

        return LlamaFileType.ALL_F32 if self is Quant.F32 else LlamaFileType[f"MOSTLY_{self.value}"]

    @property
    def is_float(self) -> bool:
        """Whether all matrices have this one type, so that there is nothing to choose."""
        return self.value in FLOATS


class Matrix(NamedTuple):
    """A tensor of the output to be; row-major shape. Norms and routers keep F32, as every llama.cpp tool has it."""

    name: str
    shape: tuple[int, ...]
    keeps_f32: bool


class Target(NamedTuple):
    """A tensor's type, and the importance of its columns [n_expert or 1, n_per_row] where there is data."""

    qtype: GGMLQuantizationType
    importance: Floats | None = None


@dataclass(frozen=True)
class Wanted:
    """What the user asks of the types: a file type, and optionally an importance matrix and a recipe."""

    quant: Quant = Quant.BF16
    imatrix: Imatrix | None = None
    recipe: Recipe | None = None


# The rules ask which architecture it is only for others than this family; a name that llama.cpp lacks is refused.
ENGINE_ARCHITECTURE = "hunyuan-moe"
MAKE_ONE = (
    "make one with `hy-imatrix collect MODEL-Q8_0.gguf -o imatrix.gguf` and pass --imatrix imatrix.gguf, or choose a "
    "larger type"
)


def targets(arch: Architecture, wanted: Wanted, matrices: Sequence[Matrix]) -> list[Target]:
    """Choose type and importance of every tensor, as llama-quantize does from the model's BF16 GGUF.

    Raises UnsupportedError for a type that needs importance data where there is none and for a recipe that does not
    fit, ModelFileError for the imatrix of another model, EngineError where the engine is needed and missing.
    """
    choices = _choices(arch, wanted, matrices)
    data = _importance(wanted.imatrix, matrices) if wanted.imatrix else {}
    if wanted.imatrix and wanted.recipe:
        data |= _alike(matrices, data)
    result = []
    for matrix, (qtype, requires_imatrix) in zip(matrices, choices, strict=True):
        importance = data.get(matrix.name) if _is_quantized(qtype) else None
        if importance is None and _is_quantized(qtype) and (requires_imatrix or _requires_importance(qtype)):
            raise _needs_imatrix(wanted, matrix, qtype)
        result.append(Target(qtype, importance))
    if wanted.imatrix:
        _warn_of_gaps(wanted.imatrix, matrices, result)
    return result


def metadata(wanted: Wanted) -> Iterator[Key]:
    """Keys that say how the types were chosen; those of the imatrix as llama-quantize writes them."""
    if imatrix := wanted.imatrix:
        yield Key("quantize.imatrix.file", imatrix.name, "STRING")
        if imatrix.datasets:
            yield Key("quantize.imatrix.dataset", imatrix.datasets[0], "STRING")
        yield Key("quantize.imatrix.entries_count", len(imatrix.entries), "UINT32")
        if imatrix.n_chunks > 0:
            yield Key("quantize.imatrix.chunks_count", imatrix.n_chunks, "UINT32")
        yield Key("hymoe.imatrix.sha256", imatrix.sha256, "STRING")
    if recipe := wanted.recipe:
        yield Key("hymoe.recipe.file", recipe.name, "STRING")
        yield Key("hymoe.recipe.text", recipe.text, "STRING")
        yield Key("hymoe.recipe.sha256", recipe.sha256, "STRING")


def _choices(arch: Architecture, wanted: Wanted, matrices: Sequence[Matrix]) -> Sequence[Choice]:
    """Ask the engine, but where every matrix has the same plain type. What the recipe names is fixed."""
    from gguf import GGMLQuantizationType

    from hymoe.engine.quant_types import Choice, Tensor, choose

    f32, bf16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16
    if wanted.quant.is_float and not wanted.recipe:
        plain = GGMLQuantizationType[wanted.quant.value]
        return [Choice(f32 if matrix.keeps_f32 else plain, False) for matrix in matrices]
    free = {matrix.name: matrix.shape for matrix in matrices if not matrix.keeps_f32}
    fixed = wanted.recipe.choose(free) if wanted.recipe else {}
    tensors = [
        Tensor(name, shape, fixed.get(name, f32 if keeps_f32 else bf16), name in fixed)
        for name, shape, keeps_f32 in matrices
    ]
    chosen = choose(_shape(arch), wanted.quant.file_type, tensors, imatrix=wanted.imatrix is not None)
    if chosen.n_fallback:
        console.warn(
            f"{chosen.n_fallback} of {len(free)} matrices have rows that do not fill the blocks of the wanted type: "
            "they get the types that llama.cpp falls back to (--dry-run lists them)"
        )
    return chosen.tensors


def _shape(arch: Architecture) -> ModelShape:
    from hymoe.engine.quant_types import ModelShape

    head_dim = arch.sizes["head_dim"]
    return ModelShape(
        architecture=ENGINE_ARCHITECTURE,
        n_embd=arch.sizes["n_embd"],
        n_ff=arch.sizes["n_ff_exp"],
        n_layer=arch.n_layer,
        n_head=arch.sizes["n_embd_q"] // head_dim,
        n_head_kv=arch.sizes["n_embd_kv"] // head_dim,
        n_expert=arch.n_expert,
        head_dim=head_dim,
    )


def _importance(imatrix: Imatrix, matrices: Sequence[Matrix]) -> dict[str, Floats]:
    """Take what the imatrix has for these tensors, [n_slice, n_per_row] each. Raises ModelFileError for another's."""
    other = f"{imatrix.name}: the importance matrix of another model"
    known = {matrix.name for matrix in matrices}
    for name in imatrix.entries:
        if name.startswith("blk.") and name not in known:
            raise ModelFileError(other, got=f"an entry for {name}", expected="the tensors of this one")
    found = {}
    for name, shape, _ in matrices:
        if name not in imatrix.entries:
            continue
        n_slice = shape[0] if len(shape) > 2 else 1
        values = imatrix.importance(name)
        if values.size == n_slice * shape[-1]:
            found[name] = values.reshape(n_slice, -1)
        elif name != "token_embd.weight":  # which llama-quantize makes without, then
            expected = f"{n_slice * shape[-1]} = {n_slice} × {shape[-1]}"
            raise ModelFileError(other, got=f"{values.size} values for {name}", expected=expected)
    if not found:
        raise ModelFileError(other, got="no entry for any tensor of this one")
    return found


def _alike(matrices: Sequence[Matrix], data: Mapping[str, Floats]) -> dict[str, Floats]:
    """Give ones for what llama-imatrix leaves out: ggml's search with importance finds smaller errors than without.

    Only with a recipe, which counts on it: a plain file type stays llama-quantize's, byte for byte.
    """
    import numpy as np

    from hymoe.imatrix.files import WITHOUT_DATA

    return {
        name: np.ones((1, shape[-1]), np.float32)
        for name, shape, _ in matrices
        if name in WITHOUT_DATA and name not in data
    }


def _is_quantized(qtype: GGMLQuantizationType) -> bool:
    return qtype.name not in FLOATS


def _requires_importance(qtype: GGMLQuantizationType) -> bool:
    from hymoe.engine.bindings import requires_importance

    return requires_importance(qtype)


def _needs_imatrix(wanted: Wanted, matrix: Matrix, qtype: GGMLQuantizationType) -> UnsupportedError:
    what = f"--quant {wanted.quant.value}: {matrix.name} as {qtype.name} needs importance data"
    if wanted.imatrix:
        return UnsupportedError(what, got=f"no entry for it in {wanted.imatrix.name}", fix="collect the imatrix again")
    return UnsupportedError(what, fix=MAKE_ONE)


def _warn_of_gaps(imatrix: Imatrix, matrices: Sequence[Matrix], chosen: Sequence[Target]) -> None:
    """Warn of slices without data and of matrices without an entry: to both, all columns are alike."""
    from hymoe.imatrix.files import WITHOUT_DATA

    pairs = list(zip(matrices, chosen, strict=True))
    used = [matrix for matrix, target in pairs if target.importance is not None]
    used = [matrix for matrix in used if matrix.name in imatrix.entries]
    n_slices = sum(matrix.shape[0] if len(matrix.shape) > 2 else 1 for matrix in used)
    n_empty = sum(imatrix.n_empty(matrix.name) for matrix in used)
    if n_empty:
        console.warn(
            f"{imatrix.name}: {n_empty} of {n_slices} experts' and other matrices met no token: all their columns "
            "count the same (hy-imatrix can repair that)"
        )
    bare = [
        matrix.name
        for matrix, target in pairs
        if target.importance is None and _is_quantized(target.qtype) and matrix.name not in WITHOUT_DATA
    ]
    if bare:
        console.warn(f"{imatrix.name}: no entry for {len(bare)} matrices, such as {bare[0]}: quantized without")
