"""The chat template in the GGUF: repaired, kept by choice, or ours; and what -v says of what is left out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from chat_templates.conversations import vendor_template
from gguf import GGUFReader

from convert import quantized
from hymoe.chat_templates import fallback, repair
from hymoe.convert.cli import main
from hymoe.convert.pieces import n_workers

ODD = "{% set d = {'a': 1} %}{% set _ = d.update({'a': 2}) %}{{ d.a }}"


def converted(mini: Path, tmp_path: Path, template: str | None, *options: str) -> dict[str, str]:
    """Convert the miniature with this template; give the template's keys."""
    folder = Path(shutil.copytree(mini, tmp_path / "in"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    assert main([str(folder), str(tmp_path / "out.gguf"), *options]) == 0
    fields = GGUFReader(tmp_path / "out.gguf").fields
    return {key: fields[key].contents() for key in ("tokenizer.chat_template", "hymoe.chat_template")}


def both(text: str, origin: str) -> dict[str, str]:
    return {"tokenizer.chat_template": text, "hymoe.chat_template": origin}


@pytest.mark.data
@pytest.mark.parametrize("folder", ["a13b", "large"])
def test_the_vendors_is_repaired(
    data: Path, mini: Path, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vendor = vendor_template(data, folder)
    repaired = repair(vendor)
    assert converted(mini, tmp_path, vendor, "-v") == both(repaired.text, "repaired")
    assert "chat template repaired (empty first message, " in capsys.readouterr().err


@pytest.mark.data
def test_keep_template_carries_it_unchanged(data: Path, mini: Path, tmp_path: Path) -> None:
    vendor = vendor_template(data)
    assert converted(mini, tmp_path, vendor, "--keep-template") == both(vendor, "vendor")


def test_without_one_it_is_ours(mini: Path, tmp_path: Path) -> None:
    assert converted(mini, tmp_path, None, "--keep-template") == both(fallback(), "plain")


def test_an_unknown_one_is_kept_with_a_warning_where_it_cannot_be_rendered(
    mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converted(mini, tmp_path / "odd", ODD) == both(ODD, "vendor")
    assert "warning: the chat template changes a dict in place" in capsys.readouterr().err
    assert converted(mini, tmp_path / "plain", "{{ messages }}") == both("{{ messages }}", "vendor")
    assert capsys.readouterr().err.count("\n") == 1


def test_thousands_of_scales_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = quantized.write(tmp_path / "in", quantized.SCHEMES["fp8"])
    assert main([str(folder), str(tmp_path / "out.gguf"), "-v"]) == 0
    dropped = [line for line in capsys.readouterr().err.splitlines() if "dropped" in line]
    assert any("dropped 2 of model.layers.*.self_attn.q_proj.input_scale" in line for line in dropped)
    assert len(dropped) < 20


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors cannot be chosen here")
def test_workers_are_the_processors_that_may_be_used() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert n_workers() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert n_workers() <= len(before)
