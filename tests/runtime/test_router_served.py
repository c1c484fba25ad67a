"""Router modes through the real server: what others do changes nothing, and what is used shows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
import reference
from reference import Adaptive
from router_cases import (
    CLEAR_TOKENS,
    FLASH_MARGIN,
    MARGIN,
    N_VOCAB,
    NARROW,
    WIDE,
    Case,
    Models,
    Shape,
    clear,
    clear_models,
    models,
)

from hymoe.errors import ServerError
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.router import Mode, Router, mean_experts, parse
from hymoe.runtime.server import ServerExitError, ServerOptions, serve

pytestmark = pytest.mark.engine

TIMEOUT = 300.0
MAX_FLOOD = 40  # prompts of each client: an end for an answer that gets no turn
N_SLOTS = 4
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--parallel", str(N_SLOTS))
FlashAttn = Literal["on", "off"]
# Of the mean KL, and of the closest decision of a prompt, as for a prompt by itself.
BOUNDS: dict[FlashAttn, float] = {"off": 1e-9, "on": 1e-5}
MARGINS: dict[FlashAttn, float] = {"off": MARGIN, "on": FLASH_MARGIN}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return models(tmp_path_factory.mktemp("router"))


@pytest.fixture(scope="module")
def clear_made(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return clear_models(tmp_path_factory.mktemp("clear"))


def running(gguf: Path, router: Router | None, *extra: str, ctx: int = 8192, flash_attn: FlashAttn = "off") -> Any:
    flags = ("--flash-attn", flash_attn, *EXACT, *extra)
    return serve(ServerOptions(gguf, port=0, ctx=ctx, threads=1, router=router, extra=flags))


def complete(endpoint: Endpoint, ids: list[int], **more: Any) -> httpx.Response:
    body = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "id_slot": -1, **more}
    return httpx.post(f"{endpoint.url}/completion", json=body, trust_env=False, timeout=TIMEOUT)


def next_logits(endpoint: Endpoint, ids: list[int], n_vocab: int) -> reference.Array:
    """Give the logarithm of every token's probability after a prompt, [n_vocab]."""
    url = f"{endpoint.url}/tokenize"
    letter = httpx.post(url, json={"content": "a"}, trust_env=False, timeout=TIMEOUT).json()["tokens"]
    # The row shows the model's own probabilities, but only beside a token that is whole text: have one chosen.
    answer = complete(endpoint, ids, n_probs=n_vocab, logit_bias=[[letter[0], 1000.0]])
    assert answer.status_code == httpx.codes.OK, answer.text
    tops = answer.json()["completion_probabilities"][0]["top_logprobs"]
    found = np.full(n_vocab, np.nan)
    found[[top["id"] for top in tops]] = [top["logprob"] for top in tops]
    assert np.isfinite(found).all()
    return found


@contextmanager
def busy(endpoint: Endpoint, n_clients: int = N_SLOTS - 1) -> Iterator[list[int]]:
    """Keep other slots at work for the length of a block; gives how many answers each of the clients has had so far."""
    stop = threading.Event()
    n_answers = [0] * n_clients

    def work(number: int) -> None:
        random = np.random.default_rng(100 + number)
        while not stop.is_set():
            ids = [int(token) for token in random.integers(0, N_VOCAB, int(random.integers(2, 90)))]
            assert complete(endpoint, ids, n_predict=40, ignore_eos=True).status_code == httpx.codes.OK
            n_answers[number] += 1

    with ThreadPoolExecutor(n_clients) as pool:
        clients = [pool.submit(work, number) for number in range(n_clients)]
        try:
            yield n_answers
        finally:
            stop.set()
    for client in clients:
        client.result()  # raises what went wrong there


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metric(endpoint: Endpoint, name: str) -> float:
    """Read one of the server's metrics."""
    text = httpx.get(f"{endpoint.url}/metrics", trust_env=False, timeout=TIMEOUT).text
    values = [line.split()[1] for line in text.splitlines() if line.startswith(f"llamacpp:{name} ")]
    return float(values[0])


def check_with_others_busy(
    made: Models, cases: list[Case], router: Router, *extra: str, flash_attn: FlashAttn = "off"
) -> None:
    checkpoint, gguf = made[cases[0].shape]
    prompts = [clear(checkpoint, case, margin=MARGINS[flash_attn]) for case in cases]
    with running(gguf, router, *extra, flash_attn=flash_attn) as endpoint, busy(endpoint) as n_answers:
        for _ in range(3):
            for ids, logits, _p in prompts:
                got = next_logits(endpoint, ids, logits.shape[1])
                assert reference.kl(logits[-1:], got[None]) <= BOUNDS[flash_attn], len(ids)
        # the others had answers meanwhile, in decodes that they shared
        wait_for(lambda: all(n_answers))
        assert metric(endpoint, "n_busy_slots_per_decode") > 1


def test_a_flood_of_prompts_stops_no_answer(made: Models) -> None:
    """In the mode capacity each prompt is a turn of its own; the slot that generates has every second turn."""
    ids = Case(WIDE, 500, "capacity").ids
    stop = threading.Event()
    n_prompts = [0] * (2 * N_SLOTS)  # some always wait

    def flood(number: int) -> None:
        body = {"prompt": ids, "n_predict": 1}
        with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=TIMEOUT) as client:
            while not stop.is_set() and n_prompts[number] < MAX_FLOOD:
                assert client.post("/completion", json=body).status_code == httpx.codes.OK
                n_prompts[number] += 1

    with running(made[WIDE][1], Router("capacity")) as endpoint, ThreadPoolExecutor(len(n_prompts)) as pool:
        clients = [pool.submit(flood, number) for number in range(len(n_prompts))]
        try:
            wait_for(lambda: all(n_prompts))
            answer = complete(endpoint, ids[:8], n_predict=40, ignore_eos=True)
            flooding = not any(client.done() for client in clients)
        finally:
            stop.set()
        for client in clients:
            client.result()  # raises what went wrong there
    assert answer.json()["timings"]["predicted_n"] == 40
    assert flooding  # the answer ended first


@pytest.mark.parametrize(("shape", "kv"), [(WIDE, "--kv-unified"), (NARROW, "--no-kv-unified")])
def test_capacity_while_others_are_busy(made: Models, shape: Shape, kv: str) -> None:
    check_with_others_busy(made, [Case(shape, n, "capacity") for n in (8, 64, 200)], Router("capacity"), kv)


@pytest.mark.long
@pytest.mark.parametrize("shape", [WIDE, NARROW], ids=str)
def test_capacity_of_a_long_prompt_while_others_are_busy(made: Models, shape: Shape) -> None:
    check_with_others_busy(made, [Case(shape, 1000, "capacity")], Router("capacity"))


@pytest.mark.long
@pytest.mark.parametrize("shape", [WIDE, NARROW], ids=str)
def test_capacity_with_flash_attention_while_others_are_busy(clear_made: Models, shape: Shape) -> None:
    cases = [Case(shape, n, "capacity", tokens=CLEAR_TOKENS) for n in (8, 64, 200, 1000)]
    check_with_others_busy(clear_made, cases, Router("capacity"), flash_attn="on")


def test_adaptive_while_others_are_busy(made: Models) -> None:
    cases = [Case(WIDE, n, Adaptive(4, 0.3)) for n in (8, 200)]
    check_with_others_busy(made, cases, Router("adaptive", 4, 0.3))


def test_capacity_reuses_no_prefix(made: Models) -> None:
    case = Case(WIDE, 200, "capacity")
    with running(made[WIDE][1], Router("capacity")) as endpoint:
        for n_tokens in (150, 200, 200):
            timings = complete(endpoint, case.ids[:n_tokens], id_slot=0, cache_prompt=True).json()["timings"]
            assert (timings["prompt_n"], timings["cache_n"]) == (n_tokens, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_limit_is_refused(made: Models, stream: bool) -> None:
    ids = Case(WIDE, 200, "capacity").ids
    with running(made[WIDE][1], Router("capacity"), "--ubatch-size", "199") as endpoint:
        answer = complete(endpoint, ids, stream=stream)
        assert answer.status_code == httpx.codes.BAD_REQUEST
        assert "a prompt of 200 tokens: at most 199 with the router mode capacity" in answer.text
        assert complete(endpoint, ids[:199]).status_code == httpx.codes.OK


def usage(endpoint: Endpoint, ids: list[int]) -> dict[str, Any]:
    answer = complete(endpoint, ids, n_predict=8, ignore_eos=True, expert_usage=True)
    found: dict[str, Any] = answer.json()["timings"]["expert_usage"]
    return found


def test_usage_of_topk(made: Models) -> None:
    with running(made[WIDE][1], None) as endpoint:
        assert mean_experts(endpoint) is None
        told = usage(endpoint, Case(WIDE, 64, "topk").ids)
        assert told == {"mode": "topk", "prompt": 8, "predicted": 8, "layers": [8, 8]}
        assert mean_experts(endpoint) == 8
        assert "expert_usage" not in complete(endpoint, [1, 2, 3]).json()["timings"]


def test_usage_is_what_the_reference_keeps(made: Models) -> None:
    checkpoint, gguf = made[WIDE]
    case = Case(WIDE, 64, Adaptive(4, 0.3))
    probabilities: list[reference.Array] = []
    reference.logits(checkpoint, case.ids, gating=case.gating, probabilities=probabilities)
    kept = [(reference.route(p, 8, case.gating) > 0).sum(axis=-1) for p in probabilities]
    kept[-1] = kept[-1][-1:]  # past the last attention only the token that is asked for goes on
    with running(gguf, Router("adaptive", 4, 0.3)) as endpoint:
        told = usage(endpoint, case.ids)
        assert told["mode"] == "adaptive"
        assert told["prompt"] == pytest.approx(np.concatenate(kept).mean())
        assert 4 <= told["predicted"] < 8
        assert len(told["layers"]) == 2
        seven = 7 * told["predicted"] * 2
        n_tokens = sum(map(len, kept)) + 7 * 2
        assert mean_experts(endpoint) == pytest.approx((np.concatenate(kept).sum() + seven) / n_tokens, rel=1e-4)


def test_the_engine_refuses_more_experts_than_there_are(made: Models) -> None:
    with (
        pytest.raises(ServerExitError, match=r"router\.min_experts is 9: expected 1 to 8"),
        running(made[WIDE][1], Router("adaptive", 9, 0.1)),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "router"),
    [
        ("topk", Router("topk")),
        ("capacity", Router("capacity")),
        ("adaptive", Router("adaptive")),
        ("adaptive:4,0.1", Router("adaptive", 4, 0.1)),
        ("adaptive:1,.5", Router("adaptive", 1, 0.5)),
        ("adaptive:8,1", Router("adaptive", 8, 1.0)),
    ],
)
def test_what_router_reads(text: str, router: Router) -> None:
    assert parse(text) == router
    assert parse(str(router)) == router


REFUSED = (
    *("", "TopK", "topp", "topk:1", "capacity:1,2", "adaptive:", "adaptive:4", "adaptive:0,0.1", "adaptive:4,1.1"),
    *("adaptive:4,-0.1", "adaptive:4,nan", "adaptive:4,0.1,", "adaptive:4, 0.1"),
)


@pytest.mark.parametrize(
    ("mode", "minimum", "threshold"),
    [("adaptive", 4, None), ("adaptive", None, 0.1), ("topk", 4, 0.1), ("capacity", None, 0.1), ("topk", 4, None)],
)
def test_numbers_come_together_and_with_adaptive(mode: Mode, minimum: int | None, threshold: float | None) -> None:
    with pytest.raises(ServerError, match="minimum and threshold together"):
        Router(mode, minimum, threshold)


@pytest.mark.parametrize("text", REFUSED)
def test_what_router_refuses(text: str) -> None:
    with pytest.raises(ServerError, match="--router"):
        parse(text)
