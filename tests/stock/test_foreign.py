"""A file made by llama.cpp's own converter: repaired it is ours, and served it answers as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from chat_templates.conversations import vendor_template
from convert.foreign import write_foreign
from convert.test_repair import SIZES, check_tensors, contents, essential, with_template
from served import client_of
from stock import peer

from hymoe.chat_templates import repair
from hymoe.convert.cli import main
from hymoe.convert.convert import ConvertOptions, convert
from hymoe.convert.miniature import Spec, write
from hymoe.runtime import overrides

pytestmark = [pytest.mark.stock, pytest.mark.engine, pytest.mark.data]

# A bias that no logit of a random model outweighs.
FORCED = 10_000


@pytest.fixture(scope="module")
def vendor(data: Path) -> str:
    return vendor_template(data)


@pytest.fixture(scope="module")
def checkpoint(data: Path, vendor: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the published vocabulary, template and generation config."""
    folder = write(tmp_path_factory.mktemp("real") / "in", Spec(**SIZES, vocab=data / "a13b" / "hy.tiktoken"))
    (folder / "generation_config.json").write_bytes((data / "a13b" / "generation_config.json").read_bytes())
    return with_template(folder, vendor)


@pytest.fixture(scope="module")
def ours(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "ours.gguf"
    convert(ConvertOptions(checkpoint, out))
    return out


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    peer.convert(checkpoint, folder / "view", folder / "stock.gguf", "bf16")
    return folder / "stock.gguf"


def test_repaired_it_equals_ours(ours: Path, theirs: Path, tmp_path: Path) -> None:
    assert main(["--repair", str(theirs), str(tmp_path / "out.gguf"), "-q"]) == 0
    assert essential(tmp_path / "out.gguf") == essential(ours)
    check_tensors(theirs, tmp_path / "out.gguf")


def test_the_default_tiers_stand_in_is_like_it(ours: Path, theirs: Path, vendor: str, tmp_path: Path) -> None:
    standin = write_foreign(ours, tmp_path / "standin.gguf", template=vendor)
    assert essential(standin) == essential(theirs)
    assert contents(theirs)["tokenizer.chat_template"][1] == vendor


@pytest.fixture(scope="module")
def client(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overrides, "cache", lambda: folder)
        with client_of(theirs, threads=2, ctx=1024) as client:
            yield client


@pytest.mark.parametrize("token", [127960, 127967])
def test_both_end_tokens_end_it(client: httpx.Client, token: int) -> None:
    body = {"prompt": "a", "n_predict": 4, "logit_bias": [[token, FORCED]], "temperature": 0}
    answer = client.post("/completion", json=body).json()
    assert (answer["stop_type"], answer["tokens_predicted"]) == ("eos", 1)


def test_it_has_the_repaired_template_and_the_vendors_sampling(client: httpx.Client, vendor: str, data: Path) -> None:
    props = client.get("/props").json()
    assert props["chat_template"] == repair(vendor).text
    params = props["default_generation_settings"]["params"]
    published = json.loads((data / "a13b" / "generation_config.json").read_text("utf-8"))
    for ours, theirs in {
        "temperature": "temperature",
        "top_p": "top_p",
        "repeat_penalty": "repetition_penalty",
    }.items():
        assert params[ours] == pytest.approx(published[theirs], rel=1e-6)
    assert (params["top_k"], params["repeat_last_n"]) == (published["top_k"], 1024)
