"""What `buffers.measure` says a model takes of each memory, against what a server that allocates it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import paper
import pytest
from children import child
from rpc_worker import rpc_worker

from hymoe import engine
from hymoe.errors import EngineError, ModelFileError
from hymoe.runtime import buffers, layout, measuring, process
from hymoe.runtime.buffers import HOST, Breakdown

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("own_cache")]

# A13B and Large with all their widths, and less of what only multiplies: layers and experts.
A13B = replace(paper.A13B, n_layer=2, n_expert=16)
LARGE = replace(paper.LARGE, n_layer=2, n_expert=2)
SMALL = replace(paper.A13B, n_layer=2, n_embd=512, n_head=8, n_head_kv=2, head_dim=64, n_ff=512, n_vocab=3000)
SMALL_LARGE = replace(SMALL, architecture="hunyuan-large", n_expert_used=1, share=2, n_head=16, head_dim=80, n_expert=4)
MODELS = {"a13b": A13B, "large": LARGE, "small": SMALL, "small-large": SMALL_LARGE}

TOLERANCE = 0.03  # of a device's total
LOADED = "sched_reserve: reserve took"  # its last buffer is there
LINE = re.compile(r": +(\S+) +(model|KV|compute) buffer size = +([\d.]+) MiB")
KINDS = {"model": "weights", "KV": "kv", "compute": "compute"}
ROUNDING = 0.01 * 2**20  # MiB with two digits after the point
EXPERTS_IN_RAM = ("--gpu-layers", "99", "--override-tensor", "exps=CPU")


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    device: str  # cpu, vulkan or rpc
    model: str
    kv: str
    ubatch: int
    n_ctx: int = 8192
    more: tuple[str, ...] = EXPERTS_IN_RAM

    @property
    def arguments(self) -> list[str]:
        asked = ["--ctx-size", str(self.n_ctx), "--batch-size", str(self.ubatch), "--ubatch-size", str(self.ubatch)]
        asked += ["--cache-type-k", self.kv, "--cache-type-v", self.kv, "--no-repack", "--load-mode", "none"]
        return [*asked, "--fit", "off", *(self.more if self.device != "cpu" else ())]

    def __str__(self) -> str:
        return f"{self.device}-{self.model}-{self.kv}-{self.ubatch}"


KINDS_OF_KV = (("f16", 512), ("q8_0", 1024), ("q4_0", 2048), ("q8_0", 4096), ("f16", 4096))
MATRIX = [
    Case(device, *row)
    for device in ("cpu", "vulkan", "rpc")
    for row in [
        *(("a13b", kv, ubatch) for kv, ubatch in KINDS_OF_KV),
        *(("large", "f16", n) for n in (512, 2048, 4096)),
    ]
]
QUICK = [
    Case("cpu", "small", "f16", 512),
    Case("cpu", "small-large", "f16", 1024),
    Case("rpc", "small", "q8_0", 512),
    Case("rpc", "small-large", "f16", 512, more=("--gpu-layers", "99")),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("paper")
    return {name: paper.write(folder / f"{name}.gguf", model) for name, model in MODELS.items()}


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def device_arguments(case: Case, undo: ExitStack) -> tuple[str, ...]:
    """What a case's device needs on the command line; a visible skip where there is no such device."""
    if case.device == "rpc":
        return ("--rpc", undo.enter_context(rpc_worker()))
    names = [device["name"] for device in measuring.ask("devices")["devices"]]
    if case.device == "vulkan":
        if "Vulkan0" not in names:
            pytest.skip("no Vulkan device, or an engine without that backend")
        return ("--device", "Vulkan0")
    return ("--device", "none") if names else ()


def allocated(model: Path, arguments: Sequence[str]) -> dict[str, Breakdown]:
    """Load the model as a server does, and add up what it reports; the names of buffers become those of memories."""
    port = process.free_port("127.0.0.1")
    command: list[str | Path] = [engine.find().tool("llama-server"), "--model", model, "--port", str(port)]
    command += ["--no-warmup", "--verbosity", "4", *arguments]
    found: dict[str, dict[str, float]] = {}
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout
        lines = []
        for line in server.stdout:
            lines.append(line)
            if row := LINE.search(line):
                name = row[1].split("[")[0]
                memory = HOST if name.startswith("CPU") or name.endswith("_Host") else name
                sums = found.setdefault(memory, dict.fromkeys(KINDS.values(), 0.0))
                sums[KINDS[row[2]]] += float(row[3]) * 2**20
            if LOADED in line:
                break
        assert LOADED in lines[-1], "".join(lines)[-3000:]
    return {name: Breakdown(**{kind: round(size) for kind, size in sums.items()}) for name, sums in found.items()}


def compare(files: dict[str, Path], case: Case, undo: ExitStack) -> None:
    arguments = [*device_arguments(case, undo), *case.arguments]
    said = buffers.measure(files[case.model], arguments)
    really = allocated(files[case.model], arguments)
    assert {name for name, memory in said.items() if memory.total} == really.keys()
    for name, memory in really.items():
        # each line of the log is rounded; no memory has more than three of a kind
        assert abs(said[name].weights - memory.weights) <= 3 * ROUNDING, (name, said, really)
        assert abs(said[name].kv - memory.kv) <= 3 * ROUNDING, (name, said, really)
        assert said[name].total == pytest.approx(memory.total, rel=TOLERANCE), (name, said, really)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_what_is_allocated(files: dict[str, Path], case: Case, undo: ExitStack) -> None:
    compare(files, case, undo)


@pytest.mark.long
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_what_is_allocated_at_real_widths(files: dict[str, Path], case: Case, undo: ExitStack) -> None:
    compare(files, case, undo)


@pytest.mark.parametrize("case", [Case("rpc", "small", "f16", 512), Case("rpc", "a13b", "f16", 2048)], ids=str)
def test_a_card_on_paper_is_a_device(files: dict[str, Path], case: Case, undo: ExitStack) -> None:
    """An RPC worker takes every operation and offloads none: a card that offloads none must come to the same."""
    worker = device_arguments(case, undo)
    there = buffers.measure(files[case.model], [*worker, *case.arguments])
    on_paper = buffers.measure(files[case.model], case.arguments, cards={"GPU0": 24 << 30}, min_batch=1 << 20)
    for name, other in (("RPC0", "GPU0"), (HOST, HOST)):
        for kind in ("weights", "kv", "compute"):
            # alignments are 32 and 128 bytes
            assert getattr(on_paper[other], kind) == pytest.approx(getattr(there[name], kind), rel=1e-4), (name, kind)


def test_experts_pass_through_the_compute_buffer(files: dict[str, Path]) -> None:
    """A card that offloads holds the largest stack of a layer's experts for a while, and the host holds no scores."""
    largest = max(size for name, size in stacks(A13B) if "_exps" in name)
    case = Case("paper", "a13b", "f16", 512)
    kept = buffers.measure(files["a13b"], case.arguments, cards={"GPU0": 24 << 30}, min_batch=513)
    sent = buffers.measure(files["a13b"], case.arguments, cards={"GPU0": 24 << 30}, min_batch=512)
    assert sent["GPU0"].compute > kept["GPU0"].compute
    assert largest <= sent["GPU0"].compute <= largest + kept["GPU0"].compute + (256 << 20)
    assert sent["GPU0"].weights == kept["GPU0"].weights
    assert sent[HOST].compute < kept[HOST].compute


def stacks(model: paper.Paper) -> Iterator[tuple[str, int]]:
    from hymoe.sizes import tensor_bytes

    for name, kind, shape in paper.tensors(model):
        yield name, tensor_bytes(shape, kind)


@pytest.mark.parametrize("model", MODELS)
def test_weights_by_arithmetic(files: dict[str, Path], model: str) -> None:
    about = layout.read(files[model])
    cards = {"GPU0": 24 << 30}
    case = Case("paper", model, "f16", 512)
    on_host = buffers.measure(files[model], [*case.arguments, "--device", "none"])
    shared = buffers.measure(files[model], case.arguments, cards=cards)
    experts = sum(layer.experts for layer in about.layers)
    dense = sum(layer.dense for layer in about.layers)
    # a tensor's size is rounded up to 32 bytes, on cards to 128; rows of a card's matrices are padded
    assert on_host[HOST].weights == pytest.approx(about.n_bytes, abs=32 * len(about.tensors))
    assert shared[HOST].weights == pytest.approx(experts + about.embedding, abs=32 * len(about.tensors))
    assert shared["GPU0"].weights == pytest.approx(dense + about.output, abs=1024 * len(about.tensors))


@pytest.mark.parametrize("model", ["a13b", "large"])
@pytest.mark.parametrize("n_ctx", [32768, 131072, 262144])
def test_keys_and_values_by_arithmetic(files: dict[str, Path], model: str, n_ctx: int) -> None:
    shape = MODELS[model]
    owners, about = -(-shape.n_layer // shape.share), layout.read(files[model])
    for kv, per_block in (("f16", (2, 1)), ("q8_0", (34, 32)), ("q4_0", (18, 32))):
        if shape.head_dim % 32 and kv != "f16":
            continue
        found = buffers.measure(files[model], Case("cpu", model, kv, 512, n_ctx).arguments, cards={"GPU0": 24 << 30})
        values = 2 * owners * n_ctx * shape.n_head_kv * shape.head_dim
        expected = values * per_block[0] // per_block[1]
        assert sum(memory.kv for memory in found.values()) == expected
        assert about.n_kv_layers * about.kv_bytes(n_ctx, kv) == expected


@pytest.mark.parametrize("model", [paper.A13B, paper.LARGE], ids=["a13b", "large"])
def test_a_whole_model_without_its_weights(tmp_path: Path, model: paper.Paper) -> None:
    """80 and 389 billion parameters: more than any disk or memory here."""
    file = paper.write(tmp_path / "whole.gguf", model)
    assert file.stat().st_blocks * 512 < 16 << 20 < 40 << 30 < file.stat().st_size
    found = buffers.measure(file, ["--gpu-layers", "99"], cards={"GPU0": 80 << 30, "GPU1": 24 << 30})
    assert list(found) == ["GPU0", "GPU1", HOST]
    embedding = next(size for name, size in stacks(model) if name == "token_embd.weight")
    total = sum(size for _, size in stacks(model))
    # tied embeddings are there twice; rows are padded on cards
    assert sum(memory.weights for memory in found.values()) == pytest.approx(total + embedding, rel=1e-5)


def test_answers_are_remembered_by_what_was_asked(files: dict[str, Path], own_cache: Path) -> None:
    case = Case("cpu", "small", "f16", 512, n_ctx=1024)
    before = set(own_cache.glob("measured/buffers-*.json"))
    first = buffers.measure(files["small"], case.arguments)
    assert buffers.measure(paper.write(files["small"].with_name("again.gguf"), SMALL), case.arguments) == first
    assert len(set(own_cache.glob("measured/buffers-*.json")) - before) == 1
    wider = buffers.measure(files["small"], replace(case, ubatch=1024).arguments)
    assert wider[HOST].compute > first[HOST].compute
    file = files["small"].with_name("other.gguf")
    paper.write(file, replace(SMALL, n_layer=3))
    assert buffers.measure(file, case.arguments)[HOST].weights > first[HOST].weights


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache-type-k", "q8_0", "--cache-type-v", "q8_0"], "heads of 80 values"),
        (["--override-tensor", "exps=GPU7"], "unknown buffer type"),
        (["--ctx-size", "many"], 'argument "--ctx-size"'),
    ],
)
def test_the_engine_says_why_not(files: dict[str, Path], arguments: list[str], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        buffers.measure(files["small-large"], arguments)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        buffers.measure(tmp_path / "absent.gguf", [])
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(ModelFileError, match="not a GGUF"):
        buffers.measure(tmp_path / "text.gguf", [])


def test_when_experts_are_worth_sending() -> None:
    assert buffers.offload_batch(64, 8) == 256  # Hunyuan-A13B
    assert buffers.offload_batch(16, 1) == 512  # Hunyuan-Large
    assert buffers.offload_batch(1, 1) == 32  # as the engine's own for what every token reads
