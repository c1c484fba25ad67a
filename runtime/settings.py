"""What /set and /think choose, and the fields of a request that it becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hymoe.errors import HyError


@dataclass(frozen=True)
class Setting:
    """A number that a request may carry, from `low` to `high`, both allowed."""

    kind: type[int] | type[float]
    low: float
    high: float
    what: str


SETTINGS = {
    "temperature": Setting(float, 0, 100, "0 takes the likeliest token always"),
    "top_k": Setting(int, 0, 10**6, "only the k likeliest tokens; 0: all"),
    "top_p": Setting(float, 0, 1, "only the likeliest tokens that make up this share"),
    "min_p": Setting(float, 0, 1, "only tokens with this share of the likeliest one's"),
    "typical_p": Setting(float, 0, 1, "locally typical sampling; 1: off"),
    "repeat_penalty": Setting(float, 0.01, 10, "1: off"),
    "repeat_last_n": Setting(int, -1, 10**7, "tokens that the penalties look back; -1: all"),
    "presence_penalty": Setting(float, -2, 2, "0: off"),
    "frequency_penalty": Setting(float, -2, 2, "0: off"),
    "dry_multiplier": Setting(float, 0, 10, "penalty of repeated phrases; 0: off"),
    "xtc_probability": Setting(float, 0, 1, "chance to leave out the likeliest tokens; 0: off"),
    "xtc_threshold": Setting(float, 0, 1, "how likely a token must be for that"),
    "seed": Setting(int, 0, 2**32 - 2, "the same answer again"),
    "max_tokens": Setting(int, 1, 10**7, "longest answer, thought included"),
}


@dataclass
class Settings:
    """What the user chose; what is not chosen is left to the server.

    think: None leaves thinking to the model's default. budget: longest thought in tokens, None for no limit.
    """

    values: dict[str, float] = field(default_factory=dict)
    think: bool | None = None
    budget: int | None = None

    @classmethod
    def restored(cls, saved: Mapping[str, Any], name: str) -> Settings:
        """Take up what a conversation was saved with; `name` is the file in errors. Raises HyError."""
        settings, sampling = cls(), saved.get("sampling") or {}
        if not isinstance(sampling, dict):
            raise HyError(f"{name}: sampling", got=sampling, expected="names and values")
        for key, value in sampling.items():
            settings.set(str(key), str(value))
        if saved.get("think"):
            settings.set_thinking(str(saved["think"]))
        return settings

    def fields(self) -> dict[str, Any]:
        """Give the fields of a request."""
        fields: dict[str, Any] = dict(self.values)
        if self.think is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.think}
        if self.budget is not None:
            fields["thinking_budget_tokens"] = self.budget
        return fields

    def set(self, name: str, text: str) -> None:
        """Choose a value; "default" takes it back. Raises HyError for an unknown name and a value out of range."""
        setting = SETTINGS.get(name)
        if setting is None:
            raise HyError(f"/set {name}", got="an unknown name", expected=f"one of {', '.join(SETTINGS)}")
        if text == "default":
            self.values.pop(name, None)
            return
        try:
            value = setting.kind(text)
        except ValueError:
            value = math.nan
        if not setting.low <= value <= setting.high:
            kind = "a whole number" if setting.kind is int else "a number"
            raise HyError(
                f"/set {name}", got=text, expected=f"{kind} from {setting.low:g} to {setting.high:g}, or default"
            )
        self.values[name] = value

    def set_thinking(self, words: str) -> None:
        """Read what follows /think: "on", "off", "budget N" or "default". Raises HyError for anything else."""
        match words.split():
            case ["on"]:
                self.think, self.budget = True, None
            case ["off"]:
                self.think, self.budget = False, None
            case ["default"]:
                self.think = self.budget = None
            case ["budget", number] if number.isascii() and number.isdecimal():
                self.think, self.budget = True, int(number)
            case _:
                raise HyError("/think", got=words or "nothing", expected="on, off, budget N or default")

    def take(self, other: Settings) -> None:
        """Choose what `other` has chosen."""
        self.values |= other.values
        if other.think is not None:
            self.think, self.budget = other.think, other.budget

    def thinking(self) -> str:
        """Say how thinking is set: "on", "off", "budget 200", "default"."""
        if self.budget is not None:
            return f"budget {self.budget}"
        return {None: "default", True: "on", False: "off"}[self.think]

    def lines(self, server: Mapping[str, Any]) -> list[str]:
        """List every setting with its value; `server` holds the server's own defaults, as far as they are known."""
        width = max(map(len, SETTINGS))
        return [
            f"{name:{width}}  {self._shown(name, server):>10}  {setting.what}" for name, setting in SETTINGS.items()
        ]

    def _shown(self, name: str, server: Mapping[str, Any]) -> str:
        if name in self.values:
            return f"{self.values[name]:g}*"
        value = server.get(name)
        unlimited = name == "max_tokens" or (name == "seed" and value == 2**32 - 1)
        return f"{value:g}" if isinstance(value, int | float) and not unlimited else "-"
