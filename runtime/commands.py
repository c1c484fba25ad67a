"""What hy-chat does for a line that begins with a slash: a table of commands, and a small function for each."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.text import Text

from hymoe.errors import HyError
from hymoe.runtime.chat import Chat, tokens_of
from hymoe.runtime.conversation import Token
from hymoe.runtime.wrap import printable

# Words for the model that look like commands of ours.
MODEL_WORDS = ("/think", "/no_think")
UNSURE_SHOWN = 10
LEAST_SHOWN = math.log(0.0005)  # what rounds to 0.0 % is no alternative
_CODE_BLOCK = re.compile(r"^ *(`{3,})[^`\n]*\n(.*?)^ *\1`* *$", re.DOTALL | re.MULTILINE)
# Of a token's probability, at least this: its colour.
_SHADES = ((0.9, "green"), (0.6, "yellow"), (0.3, "magenta"), (0.0, "red"))


class Leave(Exception):  # noqa: N818 - no error: /exit
    """The user wants to leave."""


@dataclass(frozen=True)
class Command:
    """A command: what may follow its name, what it does, and the function that does it with what followed."""

    usage: str
    what: str
    run: Callable[[Chat, str], Awaitable[None]]


async def obey(chat: Chat, line: str) -> None:
    """Do what a line asks for: a command, or a question. Raises HyError, and Leave."""
    line = printable(line)
    name, _, argument = line.partition(" ")
    if name == "/think" and argument and not re.fullmatch(r"(on|off|default|budget\b.*)", argument.strip()):
        await chat.ask(line)  # the model's own word
    elif name in COMMANDS:
        await COMMANDS[name].run(chat, argument.strip())
    elif re.fullmatch(r"/[a-z_]+", name) and name not in MODEL_WORDS:
        raise HyError(f"unknown command {name}", fix="/help lists them")
    else:
        await chat.ask(line)


async def _help(chat: Chat, _argument: str) -> None:
    width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.usage}':{width}}  {command.what}" for name, command in COMMANDS.items()]
    chat.display.say("\n".join([*lines, *NOTES]))


async def _again(chat: Chat, _argument: str) -> None:
    await chat.ask_again()


async def _undo(chat: Chat, _argument: str) -> None:
    _exchange_number(chat, "")
    chat.editing = None
    taken = chat.conversation.rewind(len(chat.conversation.exchanges))
    chat.display.note(f"forgotten: {_short(taken[0].question)}")


async def _edit(chat: Chat, argument: str) -> None:
    number, _, text = argument.partition(" ")
    n = _exchange_number(chat, number)
    chat.editing = n
    if text.strip():
        await chat.ask(text.strip())
    elif chat.display.offer(chat.conversation.exchanges[n - 1].question):
        chat.display.note(f"question {n}: change it, Enter sends it and forgets what followed, Ctrl-C leaves it")
    else:
        chat.editing = None
        raise HyError(f"/edit {n}", got="no text", expected="the new question behind the number")


async def _list(chat: Chat, _argument: str) -> None:
    talk = chat.conversation
    lines = [
        f"{n:3} {'(left out) ' if n <= talk.n_left_out else ''}{_short(exchange.question)}"
        for n, exchange in enumerate(talk.exchanges, 1)
    ]
    chat.display.say("\n".join(lines) or "nothing was asked yet")


async def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.conversation.system = None if argument == "none" else argument
    chat.display.note(f"system prompt: {chat.conversation.system or 'none'}")


async def _think(chat: Chat, argument: str) -> None:
    if argument:
        chat.settings.set_thinking(argument)
    chat.display.note(f"thinking: {chat.settings.thinking()}")


async def _set(chat: Chat, argument: str) -> None:
    words = argument.replace("=", " ").split()
    if not words:
        shown = chat.settings.lines(chat.host.defaults)
        chat.display.say("\n".join([*shown, "* chosen here; /set NAME VALUE changes, /set NAME default takes back"]))
        return
    if len(words) != 2:
        raise HyError("/set", got=argument, expected="a name and a value")
    chat.settings.set(*words)
    chat.display.note(f"{words[0]}: {words[1]}")


async def _save(chat: Chat, argument: str) -> None:
    await chat.save(_path("/save", argument))


async def _load(chat: Chat, argument: str) -> None:
    await chat.load(_path("/load", argument))


async def _file(chat: Chat, argument: str) -> None:
    await chat.attach(str(_path("/file", argument)))


async def _copy(chat: Chat, argument: str) -> None:
    text = chat.last.text
    if argument == "code":
        blocks = _CODE_BLOCK.findall(text)
        if not blocks:
            raise HyError("/copy code", got="an answer without a code block")
        text = blocks[-1][1]
    elif argument:
        raise HyError("/copy", got=argument, expected="nothing, or code")
    if not chat.display.copy(text):
        raise HyError("/copy", got="no terminal", expected="one that has a clipboard")
    chat.display.note(f"copied: {len(text)} characters (if the terminal allows it)")


async def _tokens(chat: Chat, argument: str) -> None:
    tokens = chat.last.tokens
    if not tokens:
        raise HyError("the last answer came without probabilities")
    if argument not in ("", "all", "thought"):
        raise HyError("/tokens", got=argument, expected="nothing, all or thought")
    wanted = [token for token in tokens if token.is_thought == (argument == "thought")]
    unsure = sorted(range(len(wanted)), key=lambda i: wanted[i].logprob)[:UNSURE_SHOWN]
    listed = wanted if argument else [wanted[i] for i in sorted(unsure)]
    chat.display.say(shaded(wanted))
    if len(listed) < len(wanted):
        chat.display.note(f"the {len(listed)} least sure of {len(wanted)} tokens; /tokens all lists every one")
    chat.display.say("\n".join(map(_token_line, listed)))


async def _stats(chat: Chat, _argument: str) -> None:
    answer = chat.last
    timings, used = answer.timings, tokens_of(answer)
    held = f" of {chat.host.n_ctx}" if chat.host.n_ctx else ""
    read = f"{timings.get('prompt_n', 0):.0f} tokens, {timings.get('prompt_per_second', 0):.1f} tokens/s"
    speed = timings.get("predicted_per_second", 0)
    lines = [
        f"context     {used}{held} tokens",
        f"read        {read}; {timings.get('cache_n', 0):.0f} were known",
        f"written     {timings.get('predicted_n', 0):.0f} tokens, {speed:.1f} tokens/s",
        f"thought     {answer.thought_tokens} tokens, {answer.thought_seconds:.1f} s",
        f"ended by    {answer.reason or 'nothing'}",
    ]
    if mean := timings.get("experts_predicted"):
        lines.append(
            f"experts     {mean:.2f} per token and layer ({timings.get('experts_prompt', 0):.2f} in the prompt)"
        )
    chat.display.say("\n".join(lines))


async def _thought(chat: Chat, _argument: str) -> None:
    thought = chat.last.thought.strip("\n")
    chat.display.say(Text(thought, "dim") if thought else "there was no thought")


async def _reset(chat: Chat, _argument: str) -> None:
    chat.conversation.reset()
    chat.files, chat.editing = [], None
    chat.display.note("the conversation is forgotten")


async def _exit(_chat: Chat, _argument: str) -> None:
    raise Leave


COMMANDS = {
    "/regen": Command("", "answer the last question again", _again),
    "/edit": Command("[N] [TEXT]", "change question N (the last one) and go on from there", _edit),
    "/undo": Command("", "forget the last question and its answer", _undo),
    "/list": Command("", "the questions with their numbers", _list),
    "/file": Command("PATH", "send a text file with the next question; so does @PATH in it", _file),
    "/think": Command("on|off|budget N|default", "whether to think first, and for how many tokens", _think),
    "/thought": Command("", "the last thought (Ctrl-T too)", _thought),
    "/system": Command("[TEXT|none]", "show or change the system prompt", _system),
    "/set": Command("[NAME VALUE]", "show or change sampling", _set),
    "/tokens": Command("[all|thought]", "how sure the model was of each token, and what else it might say", _tokens),
    "/stats": Command("", "tokens and speed of the last answer", _stats),
    "/copy": Command("[code]", "put the last answer, or its last code block, on the clipboard", _copy),
    "/save": Command("FILE", "write the conversation, readable, and the server's memory of it beside it", _save),
    "/load": Command("FILE", "go on with a saved conversation", _load),
    "/reset": Command("", "forget the conversation, keep the system prompt", _reset),
    "/help": Command("", "this list", _help),
    "/exit": Command("", "leave (Ctrl-D too)", _exit),
}
NOTES = (
    "Ctrl-C stops an answer; what has come of it stays. Alt-Enter or Ctrl-J begins a new line.",
    "/think or /no_think before a question goes to the model: with or without a thought first.",
)


def shaded(tokens: list[Token]) -> Text:
    """Give the text with each token in the colour of its probability."""
    return Text.assemble(*((token.text, _shade(math.exp(token.logprob))) for token in tokens))


def _shade(p: float) -> str:
    return next(style for least, style in _SHADES if p >= least)


def _token_line(token: Token) -> str:
    others = [f"{_quoted(text)} {_percent(p)}" for text, p in token.alternatives if _is_other(token, text, p)]
    shown = _quoted(token.text)
    room = " " * max(14 - cell_len(shown), 0)
    return f"{_percent(token.logprob):>7}  {shown}{room} {'  '.join(others)}".rstrip()


def _is_other(token: Token, text: str, logprob: float) -> bool:
    """Whether an alternative is likely enough to be shown, and not the token itself.

    Of a token that begins or ends in a tag only the rest is its text; among the alternatives it stands whole.
    """
    return logprob > LEAST_SHOWN and not (token.text in text and logprob == token.logprob)


def _quoted(text: str) -> str:
    return repr(text) if text.strip() != text or not text.isprintable() else text


def _percent(logprob: float) -> str:
    return f"{100 * math.exp(min(logprob, 0.0)):.1f} %"


def _exchange_number(chat: Chat, given: str) -> int:
    n = len(chat.conversation.exchanges)
    if not n:
        raise HyError("nothing was asked yet")
    if not given:
        return n
    if not (given.isascii() and given.isdecimal() and 1 <= int(given) <= n):
        raise HyError("question", got=given, expected=f"a number from 1 to {n}", fix="/list shows them")
    return int(given)


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise HyError(name, got="nothing", expected="a file")
    try:
        path = Path(argument.strip('"')).expanduser()
    except RuntimeError as exc:  # ~nobody/
        raise HyError(name, got=argument, expected="a file", fix=str(exc)) from exc
    if not path.name or "\0" in argument:
        raise HyError(name, got=argument, expected="a file")
    return path


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"
