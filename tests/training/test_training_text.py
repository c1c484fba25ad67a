"""The miniature's training text: every file is named and ours, the generator is seeded, rows hold the documents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

import dialogues
import numpy as np
import pytest
import text

from hymoe.convert.miniature import trained


@pytest.fixture(scope="module")
def ranks() -> Sequence[bytes]:
    return trained(list(dialogues.documents(1, 2000)), 1200, max_bytes=text.MAX_TOKEN_BYTES)


def test_every_text_is_in_the_manifest_with_its_hash() -> None:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in text.FOLDER.glob("*.txt")}
    assert files == text.committed(text.manifest())


def test_every_fetched_text_is_pinned_and_has_a_ground() -> None:
    for entry in text.manifest()["fetched"]:
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
        assert entry["version"]
        assert entry["ground"].startswith("public domain")


def test_the_same_seed_gives_the_same_documents() -> None:
    first, again, other = (list(dialogues.documents(seed, 300)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) > 250


def test_conversations_have_the_form_of_the_template() -> None:
    form = re.compile(
        r"(<\|startoftext\|>[^<]+<\|extra_4\|>[^<]+|<\|startoftext\|>[^<]+)<\|extra_0\|>"
        r"(<think>\n[^<]*\n</think>\n<answer>\n[^<]+\n</answer>|[^<]+)<\|eos\|>"
        r"(<\|startoftext\|>[^<]+<\|extra_0\|>(<think>\n[^<]*\n</think>\n<answer>\n[^<]+\n</answer>|[^<]+)<\|eos\|>)*"
    )
    found = [document for document in dialogues.documents(5, 2000) if document.startswith("<|startoftext|>")]
    talks = [document for document in found if "<tool_calls>" not in document and "<" not in comparisons(document)]
    assert len(talks) > 1200
    assert [document for document in talks if not form.fullmatch(document)] == []


def comparisons(document: str) -> str:
    """What is left without tags: a program may compare with `<`."""
    return re.sub(r"<\|\w+\|>|</?(think|answer)>", "", document)


def test_tool_calls_are_json() -> None:
    found = [document for document in dialogues.documents(5, 2000) if "<tool_calls>" in document]
    assert len(found) > 50
    for document in found:
        (call,) = json.loads(document.partition("<tool_calls>")[2].partition("</tool_calls>")[0])
        (offered,) = re.findall(r"tools:\n(.*)\n<\|extra_4\|>", document)
        assert call["name"] in [tool["function"]["name"] for tool in json.loads(offered)]


def test_vocabulary_gives_back_what_it_is_given(ranks: Sequence[bytes]) -> None:
    tokenizer = text.encoding(ranks)
    for document in [*dialogues.documents(9, 200), "naïve 🙂 ﬁ\r\n\t 1234 龘"]:
        assert tokenizer.decode(tokenizer.encode(document, allowed_special="all")) == document
    assert max(map(len, ranks)) <= text.MAX_TOKEN_BYTES
    assert tokenizer.encode("<|startoftext|>", allowed_special="all") == [len(ranks) + 1]


def test_rows_hold_every_document_once_and_whole(ranks: Sequence[bytes]) -> None:
    pieces = list(text.tokens(text.encoding(ranks), dialogues.documents(3, 400)))
    rows = text.packed(pieces)
    back = [
        tuple(ids[document == number])
        for ids, document in zip(rows.ids, rows.document, strict=True)
        for number in range(document.max() + 1)
    ]
    assert sorted(back) == sorted(map(tuple, pieces))
    assert np.mean(rows.document == text.PADDING) < 0.15


def test_positions_begin_again_with_each_document() -> None:
    assert text.positions(np.array([[0, 0, 0, 1, 1, -1]])).tolist() == [[0, 1, 2, 0, 1, 0]]
