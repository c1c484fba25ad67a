"""Plans: within every budget by an account of their own arguments, never worse with more memory, honest without one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import paper
import pytest

from hymoe.errors import PlacementError
from hymoe.runtime import layout, plan
from hymoe.runtime.bandwidth import Pace
from hymoe.runtime.layout import Layout, Role
from hymoe.runtime.machine import Device, Machine
from hymoe.runtime.planned import PURPOSES, RAM, Plan, Wish
from hymoe.runtime.roofline import PRODUCTS
from hymoe.runtime.tune import Tuned

GIB = 1 << 30
TUNED = Tuned(repack=False, threads=3, threads_batch=5, ubatch=1024, flash=False)
PER_LAYER = re.compile(r"blk\.(\d+)\.")


@pytest.fixture(scope="module")
def a13b(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout.read(paper.write(tmp_path_factory.mktemp("paper") / "a13b.gguf", paper.A13B))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return layout.read(paper.write(tmp_path_factory.mktemp("paper") / "large.gguf", paper.LARGE))


def machine(*vram: float, ram: float = 64) -> Machine:
    return Machine.paper(vram=[size * GIB for size in vram], ram=ram * GIB)


def option(found: Plan, name: str, default: str = "") -> str:
    arguments = found.arguments()
    return arguments[arguments.index(name) + 1] if name in arguments else default


def homes(found: Plan) -> Mapping[str, str]:
    """Where every tensor goes, by the engine's rules for these arguments; "output" is the output matrix."""
    n_layer = found.layout.shape.n_layer
    on_devices = min(int(option(found, "--gpu-layers", "0")), n_layer + 1)
    names = [name for name in option(found, "--device").split(",") if name not in ("", "none")]
    counts = [float(n) for n in option(found, "--tensor-split", "1").split(",")]
    splits = [sum(counts[: i + 1]) / sum(counts) for i in range(len(counts))]
    pattern, _, target = option(found, "--override-tensor").partition("=")

    def device_of(index: int) -> str:
        """The output counts as a layer after the last."""
        first = n_layer + 1 - on_devices
        if not names or index < first:
            return RAM
        return names[sum((index - first) / on_devices >= split for split in splits)]

    def home(name: str, layer: int | None) -> str:
        if pattern and re.search(pattern, name):
            assert target == "CPU"
            return RAM
        if layer is None:
            return RAM if name.startswith("token_embd") else device_of(n_layer)
        return device_of(layer)

    return {t.name: home(t.name, t.layer) for t in found.layout.tensors} | {"output": device_of(n_layer)}


def account(found: Plan) -> dict[str, int]:
    """Bytes of weights and cache in each memory, from nothing but the arguments and the table of tensors."""
    where = homes(found)
    used = dict.fromkeys([memory.name for memory in found.memories], 0)
    tied = not any(t.role is Role.OUTPUT for t in found.layout.tensors)
    for tensor in found.layout.tensors:
        used[where[tensor.name]] += tensor.n_bytes
        if tied and tensor.role is Role.EMBEDDING and (where["output"] != RAM or found.setting.repack):
            used[where["output"]] += tensor.n_bytes
    n_ctx, kv_type = int(option(found, "--ctx-size")), option(found, "--cache-type-k")
    assert kv_type == option(found, "--cache-type-v")
    for index in range(0, found.layout.shape.n_layer, found.layout.shape.shared_kv_factor):
        used[where[f"blk.{index}.attn_output.weight"]] += found.layout.kv_bytes(n_ctx, kv_type)
    return used


def check(found: Plan) -> None:
    """Every budget holds, margins included, and what the plan says it puts somewhere is what its arguments do."""
    used = account(found)
    for memory in found.memories:
        weights_and_kv = memory.used - memory.compute - memory.process
        assert weights_and_kv == used[memory.name], memory.name
        assert memory.used + memory.margin <= memory.n_bytes, memory.name
        assert memory.margin > 0
    where = homes(found)
    for index in range(found.layout.shape.n_layer):
        own = {where[t.name] for t in found.layout.tensors if t.layer == index and t.role is Role.EXPERTS}
        rest = {where[t.name] for t in found.layout.tensors if t.layer == index and t.role is not Role.EXPERTS}
        assert len(own) == len(rest) == 1
        assert own in (rest, {RAM})
    assert option(found, "--fit") == "off"
    saved = int(option(found, "--cache-ram")) << 20
    assert found.ram.used + found.ram.margin + saved <= found.ram.n_bytes


MACHINES = [
    ((24,), 32, 32768),
    ((24,), 64, 65536),
    ((24,), 96, 131072),
    ((16,), 64, 32768),
    ((12,), 48, 32768),
    ((8,), 64, 16384),
    ((24, 24), 64, 131072),
    ((24, 12), 64, 65536),
    ((80,), 64, 131072),
    ((), 64, 32768),
    ((2,), 64, 8192),
]


@pytest.mark.parametrize(("vram", "ram", "n_ctx"), MACHINES, ids=str)
def test_every_budget_holds(vram: tuple[float, ...], ram: float, n_ctx: int, a13b: Layout) -> None:
    found = plan.make(a13b, machine(*vram, ram=ram), Wish(n_ctx))
    check(found)
    assert found.setting.n_ctx == n_ctx


@pytest.mark.parametrize("vram", [(48,), (24, 24), (24, 48, 24)], ids=str)
def test_every_budget_holds_for_large(vram: tuple[float, ...], large: Layout) -> None:
    found = plan.make(large, machine(*vram, ram=384), Wish(32768))
    check(found)
    assert found.setting.kv_type == "f16"
    # layers that share a cache stay together
    assert all(run.first % 2 == 0 for run in found.runs)


def random_machines(count: int) -> Iterator[Machine]:
    rng = random.Random(11)
    kinds = {"gpu": (300e9, 1000e9), "igpu": (60e9, 60e9), "rpc": (50e9, 900e9)}
    for _ in range(count):
        devices = []
        for index in range(rng.randint(1, 3)):
            kind = rng.choice(["gpu", "gpu", "igpu", "rpc"])
            free = int(rng.uniform(1, 40) * GIB)
            link = {"gpu": 24e9, "igpu": 24e9, "rpc": rng.choice([1.1e8, 1.2e9])}[kind]
            devices.append(Device(f"X{index}", "", kind, free, free, rng.uniform(*kinds[kind]), link))
        usable = int(rng.uniform(45, 120) * GIB)
        yield Machine(tuple(devices), usable, usable, 8, 8, 60e9)


@pytest.mark.parametrize("number", range(12))
def test_any_machine(number: int, a13b: Layout) -> None:
    somewhere = list(random_machines(12))[number]
    wish = Wish(16384, rpc=("worker:50052",))
    try:
        found = plan.make(a13b, somewhere, wish)
    except PlacementError:
        assert not plan.fits(a13b, somewhere, wish)
        return
    assert plan.fits(a13b, somewhere, wish)
    check(found)
    if any(device.kind == "rpc" for device in found.devices):
        assert option(found, "--rpc") == "worker:50052"
        # devices of workers have no names before that
        assert found.arguments().index("--rpc") < found.arguments().index("--device")


def seconds(found: Plan) -> float:
    return found.use.n_prompt / found.speeds.prefill + found.use.n_answer / found.speeds.generation


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("purpose", list(PURPOSES))
def test_more_vram_is_never_slower(kv_type: str, purpose: str, a13b: Layout) -> None:
    wish = Wish(32768, purpose, kv_type)
    times = [seconds(plan.make(a13b, machine(vram, ram=64), wish)) for vram in (2, 4, 6, 8, 11, 12, 16, 20, 24, 32, 48)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < 0.75 * times[0]


def test_more_ram_is_never_slower(a13b: Layout) -> None:
    times = [seconds(plan.make(a13b, machine(24, ram=ram), Wish(32768))) for ram in (32, 33, 34, 36, 40, 48, 96)]
    assert times == sorted(times, reverse=True)


def test_a_second_card_is_never_slower(a13b: Layout) -> None:
    one, two = (plan.make(a13b, machine(*vram), Wish(32768, kv_type="f16")) for vram in ((24,), (24, 24)))
    assert seconds(two) <= seconds(one)
    assert len(two.devices) == 2


def test_generation_is_bytes_over_bandwidth(a13b: Layout) -> None:
    """Without a device: every byte that a token reads, at the share of the RAM's bandwidth that is stated."""
    found = plan.make(a13b, machine(ram=96), Wish(32768, kv_type="f16"))
    routed = sum(t.n_bytes for t in a13b.tensors if t.role is Role.EXPERTS) * 8 // 64
    dense = sum(t.n_bytes for t in a13b.tensors if t.role is not Role.EXPERTS)  # tied: the embeddings are the output
    kv = (found.use.n_prompt + found.use.n_answer / 2) * 128 * 1024
    assert found.speeds.read[RAM] == pytest.approx(routed + dense + kv, rel=1e-6)
    assert found.speeds.generation == pytest.approx(0.85 * found.machine.bandwidth / (routed + dense + kv), rel=1e-6)


def test_attention_takes_what_it_was_measured_to_take(a13b: Layout) -> None:
    """Beyond its bytes, of which several heads share each: by operations, for a token and for a prompt."""
    here = replace(machine(ram=96), stored=Pace(20e9, 400e9))
    shape, wish = a13b.shape, Wish(32768, kv_type="f16", n_ubatch=512)
    usual = plan.make(a13b, here, wish)
    found = plan.make(a13b, replace(here, attention_token=8e9, attention_prompt=60e9), wish)
    depth = found.use.n_prompt + found.use.n_answer / 2
    width = shape.n_layer * shape.n_head * shape.head_dim
    less = depth * 128 * 1024 / (PRODUCTS * 20e9)
    expected = 1 / usual.speeds.generation - less + 4 * width * depth / 8e9
    assert 1 / found.speeds.generation == pytest.approx(expected)
    slow = plan.make(a13b, replace(here, attention_token=2e9), wish)
    for limited, limit in ((usual, "reading RAM ("), (found, "reading RAM ("), (slow, "attention on the processor (")):
        assert limited.speeds.generation_limit.startswith(limit)
    prompt = 2 * width * found.use.n_prompt**2 * (1 / 60e9 - 1 / (PRODUCTS * 400e9))
    assert found.use.n_prompt / found.speeds.prefill == pytest.approx(
        usual.use.n_prompt / usual.speeds.prefill + prompt
    )
    fast = plan.make(a13b, replace(here, attention_token=1e15), wish)
    assert fast.speeds.generation == pytest.approx(usual.speeds.generation), "its bytes have to be read in any case"


def test_a_prompt_needs_the_last_layers_attention_alone(a13b: Layout) -> None:
    """All other weights are used for every token."""
    here = replace(machine(ram=96), stored=Pace(1e15, 400e9))  # nothing but operations counts
    found = plan.make(a13b, here, Wish(32768, kv_type="f16", n_ubatch=512))
    share = a13b.shape.n_expert_used / a13b.shape.n_expert
    of_all = {t: share if t.role is Role.EXPERTS else 1.0 for t in a13b.tensors if t.layer is not None}
    last = a13b.shape.n_layer - 1
    n_params = sum(part * t.n_params for t, part in of_all.items() if t.layer != last or t.role is Role.ATTENTION)
    n_prompt = found.use.n_prompt
    attended = 2 * a13b.shape.n_layer * a13b.shape.n_head * a13b.shape.head_dim * n_prompt**2
    seconds_of_all = (2 * n_params * n_prompt + attended) / (PRODUCTS * 400e9)
    assert n_prompt / found.speeds.prefill == pytest.approx(seconds_of_all, rel=1e-3)


def test_repacking_is_what_is_faster(a13b: Layout) -> None:
    """By what the machine did with experts in both layouts, as far as they would be repacked, and for the use."""
    reads, works = Pace(30e9, 200e9), Pace(20e9, 400e9)
    for purpose, repack in (("prefill", False), ("chat", True)):
        here = replace(machine(ram=96), stored=works, repacked=reads)
        assert plan.make(a13b, here, Wish(32768, purpose)).setting.repack is repack
        assert (
            plan.make(a13b, replace(here, stored=reads, repacked=works), Wish(32768, purpose)).setting.repack
            is not repack
        )
    assert plan.make(a13b, replace(machine(ram=96), stored=works), Wish(32768)).setting.repack


def test_an_integrated_gpu_takes_from_the_ram(a13b: Layout) -> None:
    usable = 60 * GIB
    igpu = Device("Vulkan0", "", "igpu", usable, usable, 60e9, 24e9)
    found = plan.make(a13b, Machine((igpu,), usable, usable, 8, 8, 60e9), Wish(32768))
    total = sum(memory.used for memory in found.memories)
    assert total + found.ram.margin <= usable
    with pytest.raises(PlacementError):
        plan.make(a13b, Machine((igpu,), usable, 40 * GIB, 8, 8, 60e9), Wish(32768))


def test_no_gpu(a13b: Layout) -> None:
    found = plan.make(a13b, machine(ram=96))
    assert (found.devices, found.runs) == ((), ())
    assert "--gpu-layers" not in found.arguments()
    assert found.environment() == {"GOMP_SPINCOUNT": "30000"}
    assert option(found, "--load-mode") == "mmap"


def test_experts_in_ram_are_sent_from_256_tokens_on(a13b: Layout) -> None:
    found = plan.make(a13b, machine(24))
    assert found.environment() == {"GGML_OP_OFFLOAD_MIN_BATCH": "256", "GOMP_SPINCOUNT": "30000"}
    assert found.setting.n_ubatch > 512
    # from memory that the card reads by itself
    assert option(found, "--load-mode") == "none"
    assert "--no-op-offload" not in found.arguments()


def test_all_on_the_card(a13b: Layout) -> None:
    found = plan.make(a13b, machine(96))
    check(found)
    assert found.host_experts == ()
    assert "--override-tensor" not in found.arguments()
    assert found.setting.kv_type == "f16"


def test_what_is_wished_is_done(a13b: Layout) -> None:
    wish = Wish(20000, kv_type="q4_0", n_ubatch=768, n_parallel=3)
    found = plan.make(a13b, machine(24), wish)
    asked = {"--ctx-size": "20000", "--cache-type-k": "q4_0", "--ubatch-size": "768", "--parallel": "3"}
    assert {name: option(found, name) for name in asked} == asked
    assert "--kv-unified" in found.arguments()
    check(found)


def test_whole_prompts_need_a_large_ubatch(a13b: Layout) -> None:
    found = plan.make(a13b, machine(24), Wish(16384, whole_prompts=True))
    assert (option(found, "--ubatch-size"), option(found, "--batch-size")) == ("8192", "8192")
    assert option(found, "--cache-ram") == "0"
    check(found)


def test_what_was_tuned_counts(a13b: Layout) -> None:
    found = plan.make(a13b, machine(ram=96), Wish(8192, lockable=1 << 62), TUNED)
    asked = {"--threads": "3", "--threads-batch": "5", "--ubatch-size": "1024", "--flash-attn": "off"}
    assert {name: option(found, name) for name in asked} == asked
    assert "--no-repack" in found.arguments()
    assert option(found, "--load-mode") == "mmap+mlock"
    # it was measured without a card
    beside = plan.make(a13b, machine(24), Wish(8192), TUNED)
    assert (option(beside, "--threads"), option(beside, "--flash-attn")) == ("3", "on")
    assert "--no-repack" not in beside.arguments()


def test_the_context_shrinks_only_where_none_was_asked_for(a13b: Layout) -> None:
    small = machine(24, ram=32)
    wished = PURPOSES["long-context"][1]
    found = plan.make(a13b, small, Wish(purpose="long-context"))
    assert found.setting.n_ctx < wished
    assert not plan.fits(a13b, small, Wish(2 * found.setting.n_ctx, kv_type=found.setting.kv_type))
    with pytest.raises(PlacementError):
        plan.make(a13b, small, Wish(wished))


def test_the_trained_context_is_the_most(a13b: Layout) -> None:
    assert plan.make(a13b, machine(80, ram=96), Wish(0)).setting.n_ctx == 262144
    assert plan.make(a13b, machine(80, ram=96), Wish(300_000)).setting.n_ctx == 262144


def test_what_would_do_does(a13b: Layout) -> None:
    """Every way out that the error names is one, and less of it is none."""
    somewhere, wish = machine(12, ram=32), Wish(65536)
    with pytest.raises(PlacementError) as caught:
        plan.make(a13b, somewhere, wish)
    text = str(caught.value)
    more = re.search(r"with ([\d.]+) GB more RAM", text)
    assert more is not None
    missing = float(more[1]) * 1e9
    for change, expected in ((1.02, True), (0.98, False)):
        enough = replace(somewhere, ram_usable=somewhere.ram_usable + int(change * missing))
        assert plan.fits(a13b, enough, wish) is expected
    smaller = re.search(r"with experts as (\w+) \(", text)
    assert smaller is not None
    assert plan.fits(a13b.with_experts(smaller[1]), somewhere, wish)


def test_a_smaller_context_is_named(a13b: Layout) -> None:
    somewhere = machine(24, ram=32)
    with pytest.raises(PlacementError, match="with a context of 32768") as caught:
        plan.make(a13b, somewhere, Wish(131072))
    assert "does not fit: got 31.1 GB of RAM and 25.2 GB on GPU0 free" in str(caught.value)
    assert plan.fits(a13b, somewhere, Wish(32768))
    assert not plan.fits(a13b, somewhere, Wish(65536))


def test_a_cache_that_the_engine_refuses_is_refused(large: Layout) -> None:
    with pytest.raises(PlacementError, match="KV type: got q8_0, expected one of f16; heads of 80"):
        plan.make(large, machine(24, ram=384), Wish(kv_type="q8_0"))


def test_another_cache_is_a_matter_without_a_plan(a13b: Layout) -> None:
    with pytest.raises(PlacementError, match=r"KV type: got q5_1, expected one of f16, q8_0, q4_0; .* --fit on too$"):
        plan.make(a13b, machine(24), Wish(kv_type="q5_1"))


def test_without_flash_attention_the_cache_is_exact(a13b: Layout) -> None:
    """A coarser one could not be read: without a word from the user, this machine gets q8_0."""
    assert plan.make(a13b, machine(24), Wish(32768)).setting.kv_type == "q8_0"
    found = plan.make(a13b, machine(24), Wish(32768, flash=False))
    check(found)
    assert (found.setting.kv_type, found.setting.flash) == ("f16", False)
    with pytest.raises(PlacementError, match="does not fit") as caught:
        plan.make(a13b, machine(12, ram=24), Wish(32768, flash=False))
    assert "cache" not in str(caught.value)
    with pytest.raises(PlacementError, match="without flash attention: got q8_0, expected f16"):
        plan.make(a13b, machine(24), Wish(32768, flash=False, kv_type="q8_0"))


def test_json_has_the_whole_plan(a13b: Layout) -> None:
    import json

    found = plan.make(a13b, machine(24), Wish(32768))
    said = json.loads(json.dumps(found.to_json()))
    assert said["arguments"] == found.arguments()
    assert said["environment"] == found.environment()
    assert [memory["name"] for memory in said["memories"]] == ["GPU0", RAM]
    assert (
        sum(said["memories"][0][part] for part in ("layers", "experts", "output", "kv", "compute"))
        == (said["memories"][0]["used"])
    )
    experts = set(range(32)) - set(said["layers"]["experts_in_ram"])
    assert experts == set(said["layers"]["devices"][0]["experts"])


def test_a_plan_of_a_real_file_is_a_matter_of_the_head(tmp_path: Path) -> None:
    """Nothing but the head is read: a file that ends after it gives the same plan."""
    whole = paper.write(tmp_path / "whole.gguf", paper.A13B)
    cut = tmp_path / "cut.gguf"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(16 << 20))
    one, other = (plan.make(layout.read(file), machine(24), Wish(8192)) for file in (whole, cut))
    assert one.arguments() == other.arguments()
