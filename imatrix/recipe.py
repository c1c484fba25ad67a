"""Recipes: readable files that give tensors types of their own.

A line is `pattern = TYPE`; `#` begins a comment. The pattern is a regular expression that is searched for in the
tensor's name; the first line that matches decides, as in llama-quantize's --tensor-type-file.

    # attention is small and used for every token
    attn_(q|k|v|output) = Q8_0
    blk\\.(0|1)\\.ffn_down_exps = Q6_K
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from gguf import GGMLQuantizationType

from hymoe.errors import UnsupportedError
from hymoe.sizes import row_bytes

MAX_BYTES: Final = 1 << 20
# What ggml can both make and run.
TYPES: Final = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "Q3_K", "IQ3_S", "IQ3_XXS"),
    *("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)


@dataclass(frozen=True)
class Rule:
    """One line: where it stands (as "file, line 3"), what it says, and what that means."""

    place: str
    text: str
    pattern: re.Pattern[str]
    qtype: GGMLQuantizationType


@dataclass(frozen=True)
class Recipe:
    """A recipe file: its name, its text as it is, and the rules in order."""

    name: str
    text: str
    rules: tuple[Rule, ...]

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return sha256(self.text.encode()).hexdigest()

    def choose(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, GGMLQuantizationType]:
        """Give the types of those tensors (name -> row-major shape) that a rule matches.

        Raises UnsupportedError, naming the line, for a pattern that matches none of them, and for a type whose blocks
        do not fill a row.
        """
        used: set[Rule] = set()
        chosen = {}
        for name, shape in shapes.items():
            matching = [rule for rule in self.rules if rule.pattern.search(name)]
            used.update(matching)
            if not matching:
                continue
            rule = matching[0]
            try:
                row_bytes(shape[-1], rule.qtype)
            except ValueError as exc:
                raise UnsupportedError(f"{rule.place}: {rule.text}", got=f"{name}: {exc}") from exc
            chosen[name] = rule.qtype
        for rule in self.rules:
            if rule not in used:
                example = next(iter(shapes), "token_embd.weight")
                raise UnsupportedError(
                    f"{rule.place}: {rule.text}",
                    got="a pattern that matches no matrix",
                    expected=f"part of a name such as {example} (--dry-run lists them)",
                )
        return chosen


def read(path: Path) -> Recipe:
    """Read a recipe. Raises UnsupportedError, naming the line, for one that cannot be understood."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UnsupportedError(f"{path}: recipe", got=f"more than {MAX_BYTES} bytes", expected="a short text file")
        text = raw.decode("utf-8")
    except OSError as exc:
        raise UnsupportedError(f"{path}: {exc.strerror}", fix="name a recipe file") from exc
    except UnicodeDecodeError as exc:
        raise UnsupportedError(f"{path}: recipe", got="no UTF-8 text", expected="lines of `pattern = TYPE`") from exc
    return parse(path.name, text)


def parse(name: str, text: str) -> Recipe:
    """Understand the text of a recipe. Raises UnsupportedError, naming the line."""
    lines = ((number, line.split("#", 1)[0].strip()) for number, line in enumerate(text.splitlines(), 1))
    rules = tuple(_rule(f"{name}, line {number}", line) for number, line in lines if line)
    if not rules:
        raise UnsupportedError(f"{name}: recipe", got="no rule", expected="lines of `pattern = TYPE`")
    return Recipe(name, text, rules)


def _rule(place: str, line: str) -> Rule:
    # A pattern may hold "=", a type cannot.
    left, equals, right = line.rpartition("=")
    pattern, wanted = left.strip(), right.strip().upper()
    if not equals or not pattern or not wanted:
        raise UnsupportedError(place, got=repr(line), expected="`pattern = TYPE`")
    if wanted not in TYPES:
        raise UnsupportedError(place, got=f"the type {right.strip()}", expected=f"one of {', '.join(TYPES)}")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise UnsupportedError(f"{place}: not a regular expression", got=f"{pattern} ({exc})") from exc
    return Rule(place, line, compiled, GGMLQuantizationType[wanted])
