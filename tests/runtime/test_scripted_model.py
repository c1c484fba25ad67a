"""The scripted model itself: what a script says is what a server gets."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from scripted_model import NEWLINE, STOP_2, VENDOR_SAMPLING, Script, cut, write_scripted

from hymoe.runtime.server import ServerOptions, serve

THOUGHT = "<think>\nThe user says hello.\n</think>\n<answer>\nHello! 你好。\n</answer>"


def test_a_script_is_said_piece_by_piece_chosen_by_its_marker(tmp_path: Path, llama_server: Path) -> None:
    scripts = [
        Script(first := cut(THOUGHT)),
        Script(cut("It rains.", taken=frozenset(first)), when="weather", stop=STOP_2),
        Script(["Fast", " reply"], after=NEWLINE),
        Script(["one", " two"], when="count", then="one", doubts={" two": " deux"}),
        Script([b"\xe4\xbd", b"\xa0!"], when="halves"),
    ]
    model = write_scripted(tmp_path / "m.gguf", scripts, sampling=VENDOR_SAMPLING)
    with serve(ServerOptions(model, port=0, threads=1)) as endpoint:

        def say(prompt: str, n_predict: int = 64, **more: object) -> dict[str, object]:
            body = {"prompt": prompt, "n_predict": n_predict, "seed": 1, **more}
            answer: dict[str, object] = httpx.post(f"{endpoint.url}/completion", json=body, timeout=60).json()
            return answer

        assert say("<|startoftext|>hi<|extra_0|>")["content"] == THOUGHT
        assert say("<|startoftext|>" + "a long question " * 40 + "weather" + "?<|extra_0|>")["content"] == "It rains."
        assert say("weather halves<|extra_0|>")["content"] == "你!"
        assert say("x<|extra_0|><think>\n\n</think>\n")["content"] == "Fast reply"
        counted = say("count<|extra_0|>", 5, n_probs=2, temperature=0, repeat_penalty=1)
        assert counted["content"] == "one twoone twoone"
        second = counted["completion_probabilities"][1]  # type: ignore[index]
        assert [entry["token"] for entry in second["top_logprobs"]] == [" two", " deux"]
        assert second["top_logprobs"][1]["logprob"] == pytest.approx(-1.0, abs=0.32)


def test_pieces_in_two_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two places"):
        write_scripted(tmp_path / "m.gguf", [Script(["a b", "c", "a b"])])
