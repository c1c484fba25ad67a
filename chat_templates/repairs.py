"""Our repairs of the vendors' templates: small edits of their text, each with its reason.

A template's long prose is the vendor's and stays in the checkpoint; here is only what must be found and what is put in
its place. A repair applies where every one of its patterns is in the text, letter for letter; so a template that the
vendor has mended meanwhile, or one of another model, is kept as it is. Wherever the vendor's template renders a
conversation, the repaired one renders the same bytes: tests/chat_templates/test_repairs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

# Kept thoughts: what the model wrote itself, tags and newlines included, so that a cached prompt goes on matching.
_WITH_THOUGHT = (
    r"(('<think>\n' + message['reasoning_content'] + '\n</think>\n<answer>\n' + content + '\n</answer>')"
    r" if keep_thoughts and message['reasoning_content'] else content)"
)


@dataclass(frozen=True)
class Repair:
    """Edits that belong together: (pattern, replacement), each made wherever its pattern stands.

    needs: a text that says that the repair is meant for this template.
    """

    name: str
    reason: str
    edits: tuple[tuple[str, str], ...]
    needs: str = ""

    def applies(self, template: str) -> bool:
        """Whether every pattern is there."""
        return self.needs in template and all(pattern in template for pattern, _ in self.edits)

    def apply(self, template: str) -> str:
        """Give the mended text."""
        for pattern, replacement in self.edits:
            template = template.replace(pattern, replacement)
        return template


REPAIRS = (
    Repair(
        "empty first message",
        "It is remembered through dict.update, which transformers' sandbox forbids and the engine's template language"
        " lacks: clients that send an empty system prompt get an error.",
        (
            ("{% set context = {'has_head': true} %}", "{% set context = namespace(has_head=true) %}"),
            ("{% set _ = context.update({'has_head': false}) %}", "{% set context.has_head = false %}"),
        ),
    ),
    Repair(
        "one start token",
        "After an empty first message the user's would get a start token from here and a second one two lines below.",
        (
            (
                "{% if loop.index0 == 1 and not context.has_head %}\n"
                "                {% set content = '<|startoftext|>' + content %}\n"
                "            {% endif %}\n            ",
                "",
            ),
        ),
    ),
    Repair(
        "one start token, template on one line",
        "As above.",
        (
            (
                "{% if loop.index0 == 1 and not context.has_head %}"
                "{% set content = '<|startoftext|>' + content %}{% endif %}",
                "",
            ),
        ),
    ),
    Repair(
        "null content",
        "An assistant that only calls tools has the content null, which cannot be added to a text.",
        (("{% if 'content' in message %}", "{% if 'content' in message and message['content'] is not none %}"),),
    ),
    Repair(
        "null content, template on one line",
        "As above; this template does not expect a message without content either.",
        (
            (
                "{% set content = message['content'] %}{% if loop.index0 == 0 %}",
                "{% set content = message['content'] if 'content' in message and message['content'] is not none"
                " else '' %}{% if loop.index0 == 0 %}",
            ),
        ),
    ),
    Repair(
        "null tool calls",
        "Clients that send back what the openai library gave them send tool_calls: null with every plain answer.",
        (
            (
                "{% if 'tool_calls' in message %}",
                "{% if 'tool_calls' in message and message['tool_calls'] is not none %}",
            ),
        ),
    ),
    Repair(
        "tool results that are no text",
        "The vendor's line for them lacks its percent signs, so it is printed instead of done, and what follows fails.",
        (("{set content = content | tojson }", "{% set content = content | tojson %}"),),
    ),
    Repair(
        "tool results that are no text, without tools",
        "The branch for requests without tools has no such line at all.",
        (
            (
                "{% elif message['role'] == 'tool' %}\n            {% set content = content + '<|extra_0|>' %}",
                "{% elif message['role'] == 'tool' %}\n            {% set content = "
                "(content if content is string else content | tojson) + '<|extra_0|>' %}",
            ),
        ),
    ),
    Repair(
        "past thoughts by choice",
        "They are dropped, as the vendor does; keep_thoughts=true in chat_template_kwargs keeps them.",
        (("{% set content = content + '<|eos|>' %}", "{% set content = " + _WITH_THOUGHT + " + '<|eos|>' %}"),),
        needs="enable_thinking",
    ),
)


@dataclass(frozen=True)
class Repaired:
    """A template's text after its repairs, and their names."""

    text: str
    applied: tuple[str, ...]

    @property
    def still_mutates(self) -> bool:
        """Whether it changes a dict in place, which neither the engine nor transformers renders."""
        return ".update(" in self.text


def repair(template: str) -> Repaired:
    """Apply every repair that this template needs; what is repaired already stays as it is."""
    applied = []
    for each in REPAIRS:
        if each.applies(template):
            template = each.apply(template)
            applied.append(each.name)
    return Repaired(template, tuple(applied))
