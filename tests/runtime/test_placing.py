"""What hy-serve does with a plan: when it makes one, what of the user's wins, what follows too little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
from served import free_port
from tiny_model import TRAINED, write_model

from hymoe.errors import ModelFileError, PlacementError
from hymoe.runtime import placing
from hymoe.runtime.server import ServerOptions

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context can be chosen."""
    return write_model(tmp_path_factory.mktemp("model") / "long.gguf", trained=65536)


@pytest.mark.parametrize("flag", sorted(placing.PLACING))
def test_who_places_the_model_gets_no_plan(
    llama_server: Path, tiny: Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ServerOptions(tiny, extra=("--temp", "0", flag, "1"))
    assert placing.place(options) == options
    assert capsys.readouterr().err == f"placed as {flag} says, without a plan\n"


def test_what_is_asked_for_is_planned(llama_server: Path, long: Path) -> None:
    extra = ("--ubatch-size", "256", "-np", "2", "-fa", "off", "--temp", "0")
    plan = placing.place(ServerOptions(long, ctx=8192, threads=3, extra=extra)).plan
    assert plan is not None
    assert (plan.setting.n_ctx, plan.setting.n_ubatch, plan.wish.n_parallel) == (8192, 256, 2)
    assert (plan.setting.threads, plan.setting.threads_batch) == (3, 3)
    assert not plan.setting.flash


def test_what_is_not_asked_for_is_chosen(llama_server: Path, tiny: Path, long: Path) -> None:
    for model, n_ctx in ((tiny, TRAINED), (long, 32768)):
        plan = placing.place(ServerOptions(model)).plan
        assert plan is not None
        assert plan.setting.n_ctx == n_ctx
        assert placing.summary(plan).startswith(f"plan: context {n_ctx}, f16 cache, about ")


def test_less_of_what_was_too_small(llama_server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's kill leaves no word: it is RAM then."""
    for name, value in {"N_LAYER": 1, "N_HEAD": 64, "N_HEAD_KV": 64, "HEAD_DIM": 128}.items():
        monkeypatch.setattr(tiny_model, name, value)
    wide = write_model(tmp_path / "wide.gguf", trained=32768)  # its cache takes 1 GiB
    options = placing.place(ServerOptions(wide, extra=("-ctk", "f16")))
    found = placing.smaller(options, [])
    assert options.plan is not None
    assert found is not None
    assert found.plan is not None
    assert found.plan.ram.used <= placing.LESS * options.plan.ram.used
    assert found.plan.setting.n_ctx < options.plan.setting.n_ctx == 32768
    assert replace(found, plan=None) == replace(options, plan=None)


def test_a_context_that_was_asked_for_is_kept(llama_server: Path, long: Path) -> None:
    options = placing.place(ServerOptions(long, ctx=512, extra=("-ctk", "f16", "-ub", "512")))
    found = placing.smaller(options, [])
    assert found is None or (found.plan is not None and found.plan.setting.n_ctx == 512)
    assert placing.smaller(ServerOptions(long), []) is None  # there was no plan


def test_a_worker_that_is_away_leaves_no_smaller_plan(llama_server: Path, long: Path) -> None:
    """The next start says that it is away, and waits for it."""
    options = placing.place(ServerOptions(long))
    assert placing.smaller(replace(options, rpc=(f"127.0.0.1:{free_port()}",)), []) is None


def test_a_type_that_no_cache_has_is_one_line(llama_server: Path, long: Path) -> None:
    with pytest.raises(PlacementError, match=r"^KV type: got q9, expected one of "):
        placing.place(ServerOptions(long, extra=("-ctk", "q9")))


@pytest.mark.parametrize(
    ("extra", "types"),
    [
        (("-ctv", "q8_0"), "q8_0 for values, f16 for keys"),
        (("-ctk", "q8_0", "-ctv", "f16"), "f16 for values, q8_0 for keys"),
    ],
)
def test_values_of_another_type_are_one_line(
    llama_server: Path, long: Path, extra: tuple[str, ...], types: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlacementError, match=rf"^KV type: got {types}, expected one for both; .* --fit on too$"):
        placing.place(ServerOptions(long, extra=extra))
    assert placing.place(ServerOptions(long, extra=(*extra, "--fit", "on"))).plan is None


def test_values_of_the_keys_type_are_planned(llama_server: Path, long: Path) -> None:
    plan = placing.place(ServerOptions(long, extra=("-ctv", "f16"))).plan
    assert plan is not None
    assert plan.setting.kv_type == "f16"
    with pytest.raises(PlacementError, match="got q8_0, expected one of f16; heads of 16"):  # the plan's own word
        placing.place(ServerOptions(long, extra=("--cache-type-v", "q8_0", "--cache-type-k", "q8_0")))


def test_a_download_that_was_cut_short_is_one_line(llama_server: Path, tiny: Path, tmp_path: Path) -> None:
    """By what the head says, before anything is planned or loaded."""
    content = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(ModelFileError, match=rf"cut\.gguf: cut short: got {size - 1} bytes, expected {size}; "):
        placing.place(ServerOptions(cut))
