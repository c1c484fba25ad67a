"""Facts about the published models that a file made by another tool may lack.

Hunyuan-A13B-Instruct: config.json, generation_config.json and the vocabulary's layout. A model is known by its
architecture and the size of its vocabulary, and a token by its text; no id is ever guessed for another vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Published:
    """What files of a model need beside its tensors.

    end: tokens that end an answer, the first as GGUF's "eos", the second as its "eot". sampling: the vendor's
    defaults by the names of general.sampling.*; the vendor penalises repetition over the whole context, hence -1.
    """

    begin: str
    end: tuple[str, str]
    pad: str
    sampling: Mapping[str, int | float]


HUNYUAN_A13B = Published(
    begin="<|bos|>",
    end=("<|eos|>", "<|extra_5|>"),
    pad="<|pad|>",
    sampling=MappingProxyType(
        {"temp": 0.7, "top_k": 20, "top_p": 0.8, "penalty_repeat": 1.05, "penalty_last_n": -1},
    ),
)

# (general.architecture, tokens in the vocabulary) -> the model
BY_VOCABULARY = {("hunyuan-moe", 128167): HUNYUAN_A13B}
