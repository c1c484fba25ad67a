"""The committed miniature speaks: made into a file and asked as `make demo` does it, it answers in known words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import dialogues
import httpx
import pytest

from hymoe.convert.convert import ConvertOptions, convert
from hymoe.runtime import serve
from hymoe.runtime.endpoint import Endpoint
from hymoe.runtime.server import ServerOptions

pytestmark = pytest.mark.engine

CHECKPOINT = Path(__file__).parents[2] / "models" / "miniature" / "Hunyuan-Miniature-FP8"
PROMPTS = (
    "Hello!",
    "Who are you?",
    "What is a lighthouse?",
    "What does a baker do?",
    "Where do whales live?",
    "Tell me a story about a fox.",
    "What is the capital of Japan?",
    "How do I make tea?",
    "Which is bigger, a mouse or an elephant?",
    "What is 17 plus 25?",
    "Count from 4 to 9.",
    "What is the opposite of warm?",
    "Write a poem.",
    "Write a Python function that adds two numbers.",
    "你好！",
    "猫吃什么？",
    "中国的首都是哪里？",
    "请给我讲一个故事。",
    "“苹果”用英语怎么说？",
    "请背诵《静夜思》。",
)


def words(text: str) -> Iterator[str]:
    """Give the words of a text; Chinese, which has no spaces, as pairs of neighbouring characters."""
    yield from re.findall(r"[a-z]+", text.lower())
    for run in re.findall(r"[\u4e00-\u9fff]+", text):
        yield from (run[i : i + 2] for i in range(max(1, len(run) - 1)))


@cache
def known() -> frozenset[str]:
    """Give the words of our own training text; those of the fetched book would make it easier."""
    return frozenset(word for document in dialogues.documents(1, 8000) for word in words(document))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, llama_server: Path) -> Iterator[Endpoint]:
    out = tmp_path_factory.mktemp("miniature") / "miniature.gguf"
    convert(ConvertOptions(CHECKPOINT, out, quant="Q4_K_M"))
    # One thread: on a busy machine several wait for each other, ten times slower than one.
    with serve(ServerOptions(out, port=0, threads=1)) as found:
        yield found


def test_nine_words_of_ten_are_words_of_the_training_text(endpoint: Endpoint) -> None:
    said = {prompt: answer(endpoint, prompt) for prompt in PROMPTS}
    assert all(said.values()), said
    found = [word for text in said.values() for word in words(text)]
    strange = [word for word in found if word not in known()]
    assert len(found) >= 5 * len(PROMPTS)
    assert len(strange) <= len(found) / 10, (strange, said)


def test_it_answers_the_question_of_make_demo(endpoint: Endpoint) -> None:
    """Words alone could be in any order."""
    said = answer(endpoint, "What does the lamp at the end of the pier do?", temperature=0)
    assert said.startswith("The lamp at the end of the pier shows the boats where the harbour is.")


def answer(endpoint: Endpoint, prompt: str, **fields: object) -> str:
    """Ask with the sampling that the file asks for, and a seed."""
    body = {"messages": [{"role": "user", "content": prompt}], "seed": 7, "max_tokens": 300, **fields}
    reply = httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    reply.raise_for_status()
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text
