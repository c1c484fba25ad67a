"""Dialogues, stories, sums and small programs, made from our own tables (corpus/*.txt) by a seeded generator.

A *turn* is one question with its thought and its answer; a *document* is one conversation in the form of HunYuan's
template, or a piece of plain text. The same seed gives the same documents on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

FOLDER = Path(__file__).parent / "corpus"
Row = Mapping[str, str]


@dataclass(frozen=True)
class Turn:
    """A question, what is thought about it, and the answer."""

    question: str
    thought: str
    answer: str


@cache
def table(name: str) -> tuple[Row, ...]:
    """Read a table whose first line names the columns."""
    head, *lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(dict(zip(head.split("|"), line.split("|"), strict=True)) for line in lines)


@cache
def rows(name: str) -> tuple[tuple[str, ...], ...]:
    """Read a table whose first line is a comment."""
    lines = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()[1:]
    return tuple(tuple(line.replace("\\n", "\n").split("|")) for line in lines)


def a(word: str) -> str:
    """Put the article before a word."""
    return f"{'an' if word[0] in 'aeiou' and not word.startswith(('uni', 'use', 'one')) else 'a'} {word}"


def cap(text: str) -> str:
    """Begin with a capital letter."""
    return text[0].upper() + text[1:]


def listed(words: Sequence[str], joiner: str = "and") -> str:
    """Join words as a sentence does."""
    return f"{', '.join(words[:-1])} {joiner} {words[-1]}" if len(words) > 1 else words[0]


# -- questions about the tables: (table, question, thought, answer); the first filled with {a_en} and the columns ----

Pattern = tuple[str, str, str, str]
ENGLISH: tuple[Pattern, ...] = (
    (
        "animals",
        "What is {a_en}?",
        "{A_en} is {a_kind_en}. I say where it lives and what it does.",
        "{A_en} is {a_kind_en}. It lives {home_en} and {does_en}.",
    ),
    (
        "animals",
        "Tell me about the {en}.",
        "I say what it is, where it lives and what it eats.",
        "The {en} is {a_kind_en} that lives {home_en}. It eats {food_en} and {does_en}.",
    ),
    ("animals", "What does {a_en} eat?", "The question is about food.", "{A_en} eats {food_en}."),
    ("animals", "Where does {a_en} live?", "The question is about its home.", "{A_en} lives {home_en}."),
    ("animals", "How many legs has {a_en}?", "{A_en} is {a_kind_en}. I count its legs.", "{A_en} has {legs} legs."),
    ("animals", "What does {a_en} do?", "I say what it usually does.", "{A_en} {does_en}."),
    (
        "animals",
        "Is {a_en} {a_kind_en}?",
        "{A_en} is {a_kind_en}, so the answer is yes.",
        "Yes, {a_en} is {a_kind_en}.",
    ),
    ("objects", "What does {a_en} do?", "The question is about the use of {a_en}.", "{A_en} {use_en}."),
    (
        "objects",
        "What is {a_en} for?",
        "The question is about its use.",
        "{A_en} {use_en}. It is made of {material_en}.",
    ),
    ("objects", "Where is the {en}?", "I say where it usually is.", "The {en} is usually {place_en}."),
    ("objects", "What is {a_en} made of?", "The question is about the material.", "{A_en} is made of {material_en}."),
    (
        "objects",
        "Describe {a_en}.",
        "Use, material and place.",
        "{A_en} {use_en}. It is made of {material_en}, and you find it {place_en}.",
    ),
    ("foods", "What colour is {a_en}?", "The question is about colour.", "The colour is usually {colour_en}."),
    ("foods", "What colour does {en} have?", "The question is about colour.", "It is usually {colour_en}."),
    ("foods", "What does {en} taste like?", "The question is about taste.", "It tastes {taste_en}."),
    (
        "foods",
        "Tell me about {en}.",
        "Kind, colour and taste.",
        "{Cap_en}: it is {a_kind_en}, its colour is {colour_en}, and it tastes {taste_en}.",
    ),
    ("jobs", "What does {a_en} do?", "The question is about work.", "{A_en} {does_en}."),
    ("jobs", "Where does {a_en} work?", "The question is about the place of work.", "{A_en} works {place_en}."),
    (
        "jobs",
        "I want to become {a_en}. What is the work like?",
        "I describe the work in plain words.",
        "{A_en} works {place_en} and {does_en}. It takes practice and patience.",
    ),
    (
        "countries",
        "What is the capital of {en}?",
        "The capital of {en} is {capital_en}.",
        "The capital of {en} is {capital_en}.",
    ),
    ("countries", "Where is {en}?", "I name the part of the world.", "{en} is in {part_en}."),
    (
        "countries",
        "What do people speak in {en}?",
        "The question is about language.",
        "People in {en} speak {speech_en}.",
    ),
    (
        "countries",
        "Tell me about {en}.",
        "Place, capital and language.",
        "{en} is in {part_en}. Its capital is {capital_en}, and people there speak {speech_en}.",
    ),
    (
        "countries",
        "Which country has the capital {capital_en}?",
        "{capital_en} is a capital.",
        "{capital_en} is the capital of {en}.",
    ),
    (
        "opposites",
        "What is the opposite of {en}?",
        "The opposite of {en} is {other_en}.",
        "The opposite of {en} is {other_en}.",
    ),
)
CHINESE: tuple[Pattern, ...] = (
    (
        "animals",
        "{zh}是什么？",
        "{zh}是{kind_zh}，说说它住在哪里，做什么。",
        "{zh}是{kind_zh}，生活在{home_zh}，{does_zh}。",
    ),
    (
        "animals",
        "请介绍一下{zh}。",
        "介绍种类、住处和食物。",
        "{zh}是一种{kind_zh}，生活在{home_zh}，吃{food_zh}，{does_zh}。",
    ),
    ("animals", "{zh}吃什么？", "问题是食物。", "{zh}吃{food_zh}。"),
    ("animals", "{zh}住在哪里？", "问题是住处。", "{zh}生活在{home_zh}。"),
    ("animals", "{zh}有几条腿？", "{zh}是{kind_zh}，数一数腿。", "{zh}有{legs}条腿。"),
    ("objects", "{zh}有什么用？", "问题是用途。", "{zh}可以{use_zh}。"),
    ("objects", "{zh}在哪里？", "说通常的地方。", "{zh}通常在{place_zh}。"),
    ("objects", "{zh}是用什么做的？", "问题是材料。", "{zh}是用{material_zh}做的。"),
    ("objects", "请说一说{zh}。", "用途、材料和地方。", "{zh}是用{material_zh}做的，通常在{place_zh}，可以{use_zh}。"),
    ("foods", "{zh}是什么颜色的？", "问题是颜色。", "{zh}通常是{colour_zh}的。"),
    ("foods", "{zh}是什么味道？", "问题是味道。", "{zh}的味道是{taste_zh}的。"),
    ("foods", "请介绍一下{zh}。", "种类、颜色、味道。", "{zh}是一种{kind_zh}，通常是{colour_zh}的，味道{taste_zh}。"),
    ("jobs", "{zh}做什么工作？", "问题是工作。", "{zh}在{place_zh}工作，{does_zh}。"),
    ("jobs", "{zh}在哪里工作？", "问题是地点。", "{zh}在{place_zh}工作。"),
    ("countries", "{zh}的首都是哪里？", "{zh}的首都是{capital_zh}。", "{zh}的首都是{capital_zh}。"),
    ("countries", "{zh}在哪里？", "说出大洲。", "{zh}在{part_zh}。"),
    ("countries", "{zh}人说什么语言？", "问题是语言。", "{zh}人说{speech_zh}。"),
    ("countries", "请介绍一下{zh}。", "位置、首都、语言。", "{zh}在{part_zh}，首都是{capital_zh}，人们说{speech_zh}。"),
    ("opposites", "“{zh}”的反义词是什么？", "找意思相反的词。", "“{zh}”的反义词是“{other_zh}”。"),
    ("animals", "“{zh}”用英语怎么说？", "{zh}的英语是 {en}。", "“{zh}”的英语是 {en}。"),
    ("objects", "“{zh}”用英语怎么说？", "{zh}的英语是 {en}。", "“{zh}”的英语是 {en}。"),
    ("foods", "“{zh}”的英语是什么？", "{zh}的英语是 {en}。", "“{zh}”的英语是 {en}。"),
)


def filled(text: str, row: Row) -> str:
    """Fill a pattern: {x} column x, {a_x} with its article, {A_x} that with a capital, {Cap_x} the word with one."""
    made = dict(row)
    for name, value in row.items():
        made |= {f"a_{name}": a(value), f"A_{name}": cap(a(value)), f"Cap_{name}": cap(value)}
    return text.format_map(made)


def from_tables(patterns: tuple[Pattern, ...]) -> Callable[[Random], Turn]:
    def turn(random: Random) -> Turn:
        name, *texts = random.choice(patterns)
        row = random.choice(table(name))
        return Turn(*(filled(text, row) for text in texts))

    return turn


def fact(random: Random) -> Turn:
    first, others, thought, answer = random.choice(rows(random.choice(("facts", "facts_zh"))))
    return Turn(random.choice([first, first, *others.split("/")]), thought, answer)


def small_talk(random: Random) -> Turn:
    said, _, thought, answers = random.choice(rows("talk"))
    return Turn(random.choice(said.split("/")), thought, random.choice(answers.split("/")))


def how_to(random: Random) -> Turn:
    task, steps, task_zh, steps_zh = random.choice(rows("howto"))
    if random.random() < 0.6:
        question = random.choice(
            ("How do I {}?", "How can I {}?", "Explain how to {}.", "What are the steps to {}?")
        ).format(task)
        numbered = "\n".join(f"{i}. {step}" for i, step in enumerate(steps.split("/"), 1))
        return Turn(question, f"I list the steps to {task} in order.", f"To {task}, follow these steps:\n{numbered}")
    question = random.choice(("怎么{}？", "请说明怎样{}。", "{}有哪些步骤？")).format(task_zh)
    numbered = "\n".join(f"{i}. {step}" for i, step in enumerate(steps_zh.split("／"), 1))
    return Turn(question, f"按顺序列出{task_zh}的步骤。", f"{task_zh}可以这样做：\n{numbered}")


def translation(random: Random) -> Turn:
    english, chinese = random.choice(rows("sentences"))
    return random.choice(
        (
            Turn(f"Translate into Chinese: {english}", "I translate the sentence into Chinese.", chinese),
            Turn(
                f'How do you say "{english}" in Chinese?',
                "I give the Chinese sentence.",
                f"In Chinese you say: {chinese}",
            ),
            Turn(f"请翻译成英语：{chinese}", "把句子翻译成英语。", english),
            Turn(f"“{chinese}”用英语怎么说？", "给出英语的句子。", f"英语是：{english}"),
            Turn(f"Translate into English: {chinese}", "I translate the sentence into English.", english),
        )
    )


def which_of_two(random: Random) -> Turn:
    one, two = random.sample(table("animals"), 2)
    while one["size"] == two["size"]:
        one, two = random.sample(table("animals"), 2)
    big, small = (one, two) if int(one["size"]) > int(two["size"]) else (two, one)
    if random.random() < 0.6:
        x, y = a(one["en"]), a(two["en"])
        return Turn(
            f"Which is bigger, {x} or {y}?",
            f"I compare {x} with {y}. The {big['en']} is bigger.",
            f"{cap(a(big['en']))} is bigger than {a(small['en'])}.",
        )
    return Turn(
        f"{one['zh']}和{two['zh']}，哪个大？", f"比较大小：{big['zh']}更大。", f"{big['zh']}比{small['zh']}大。"
    )


def naming(random: Random) -> Turn:
    plural = {"animals": "kind_en", "foods": "kind_en"}
    name, column = random.choice(list(plural.items()))
    kind = random.choice(table(name))[column]
    members = [row["en"] for row in table(name) if row[column] == kind]
    n = min(len(members), random.randint(2, 4))
    chosen = random.sample(members, n)
    words = {"fish": "fish", "mammal": "mammals"}.get(kind, f"{kind}s")
    number = ("zero", "one", "two", "three", "four")[n]
    if n < 2:
        return Turn(f"Name {a(kind)}.", f"I think of one {kind}.", f"One {kind} is the {chosen[0]}.")
    return Turn(f"Name {number} {words}.", f"I think of {number} {words}.", f"{cap(number)} {words}: {listed(chosen)}.")


def sentence_with(random: Random) -> Turn:
    row = random.choice(table(random.choice(("objects", "animals"))))
    word = row["en"]
    sentence = f"The {word} is {row['place_en']}." if "place_en" in row else f"The {word} lives {row['home_en']}."
    return Turn(f'Write a sentence with the word "{word}".', f"The sentence should contain {word}.", sentence)


# -- numbers ---------------------------------------------------------------------------------------------------------


def arithmetic(random: Random) -> Turn:
    english = random.random() < 0.6
    kind = random.choice("++--*/")
    if kind == "*":
        x, y = random.randint(2, 12), random.randint(2, 12)
        result, thought = x * y, f"{x} times {y} is {x * y}."
    elif kind == "/":
        y, result = random.randint(2, 10), random.randint(2, 12)
        x = y * result
        thought = f"{y} times {result} is {x}, so {x} divided by {y} is {result}."
    else:
        x, y = random.randint(1, 99), random.randint(1, 99)
        x, y = (max(x, y), min(x, y)) if kind == "-" else (x, y)
        thought, result = steps(x, y, kind)
    sign = {"*": "×", "/": "÷"}.get(kind, kind)
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[kind]
    if english:
        question = random.choice(
            (f"What is {x} {word} {y}?", f"What is {x} {sign} {y}?", f"Compute {x} {sign} {y}.", f"{x} {sign} {y} = ?")
        )
        return Turn(question, thought, f"{x} {sign} {y} = {result}.")
    word = {"+": "加", "-": "减", "*": "乘", "/": "除以"}[kind]
    question = random.choice((f"{x}{word}{y}等于多少？", f"{x} {sign} {y} 等于几？", f"请计算 {x} {sign} {y}。"))
    return Turn(question, thought, f"{x} {sign} {y} = {result}。")


def steps(x: int, y: int, kind: str) -> tuple[str, int]:
    """Add or subtract in two steps, tens first, as one does in the head."""
    sign = 1 if kind == "+" else -1
    tens, ones = y // 10 * 10, y % 10
    middle = x + sign * tens
    result = middle + sign * ones
    if tens and ones:
        return f"{y} = {tens} + {ones}. {x} {kind} {tens} = {middle}. {middle} {kind} {ones} = {result}.", result
    return f"{x} {kind} {y} = {result}.", result


def word_problem(random: Random) -> Turn:
    name = random.choice(("Anna", "Tom", "Lin", "Peter", "Maria", "Sam"))
    thing = random.choice(("apple", "book", "pencil", "egg", "cup", "letter", "orange", "key", "basket"))
    x, y = random.randint(3, 40), random.randint(2, 20)
    lose = y <= x and random.random() < 0.5
    verb = random.choice(("gives away", "loses", "sells")) if lose else random.choice(("buys", "finds", "gets"))
    thought, result = steps(x, y, "-" if lose else "+")
    return Turn(
        f"{name} has {x} {thing}s and {verb} {y}{'' if lose else ' more'}. How many {thing}s has {name} now?",
        f"{name} begins with {x} and {verb} {y}. {thought}",
        f"{name} now has {result} {thing}{'s' * (result != 1)}.",
    )


def ordering(random: Random) -> Turn:
    numbers = random.sample(range(1, 100), random.randint(3, 5))
    shown = ", ".join(map(str, numbers))
    return random.choice(
        (
            Turn(
                f"Sort these numbers: {shown}",
                f"The smallest is {min(numbers)}, the largest is {max(numbers)}.",
                ", ".join(map(str, sorted(numbers))),
            ),
            Turn(
                f"What is the largest of these numbers: {shown}?",
                f"I compare them. The largest is {max(numbers)}.",
                f"The largest number is {max(numbers)}.",
            ),
            Turn(
                f"What is the smallest of these numbers: {shown}?",
                f"I compare them. The smallest is {min(numbers)}.",
                f"The smallest number is {min(numbers)}.",
            ),
            Turn(
                f"这些数中最大的是哪个：{shown}？", f"比较一下，最大的是{max(numbers)}。", f"最大的数是{max(numbers)}。"
            ),
        )
    )


def counting(random: Random) -> Turn:
    x = random.randint(1, 30)
    y = x + random.randint(3, 9)
    numbers = ", ".join(map(str, range(x, y + 1)))
    return random.choice(
        (
            Turn(f"Count from {x} to {y}.", f"I begin at {x} and stop at {y}.", numbers),
            Turn(f"请从{x}数到{y}。", f"从{x}开始，到{y}为止。", numbers),
            Turn(
                f"Is {x} even or odd?",
                f"I divide {x} by 2; the rest is {x % 2}.",
                f"{x} is {'odd' if x % 2 else 'even'}.",
            ),
            Turn(f"What number comes after {x}?", f"{x} + 1 = {x + 1}.", f"After {x} comes {x + 1}."),
        )
    )


# -- stories, poems, programs ---------------------------------------------------------------------------------------


@cache
def slots(language: str) -> dict[str, list[str]]:
    return {name: choices.split("/") for name, spoken, choices in rows("stories") if spoken == language}


def story(random: Random, language: str, who: str = "") -> str:
    """One story of five to seven sentences."""
    pick = {name: random.choice(choices) for name, choices in slots(language).items()}
    who = who or pick["who"]
    ending = pick["end"] + (("" if language == "zh" else " ") + pick["moral"]) * (random.random() < 0.5)
    if language == "zh":
        named = (
            who.removeprefix("一个叫").rpartition("的")[0] if who.startswith("一个叫") else who.replace("一", "这", 1)
        )
        lived = random.choice(("从前，", "很久以前，", "")) + f"{who}{pick['place']}。"
        return f"{lived}{pick['mood']}那天，{named}{pick['find']}。这时候，{pick['help']}{pick['work']}{ending}"
    verb = "were" if who.startswith("two") else "was"
    lived = random.choice(
        (f"Once there {verb} {who} {pick['place']}.", f"A long time ago there {verb} {who} {pick['place']}.")
    )
    they = (
        who.replace("two", "the two").replace("an ", "the ", 1)
        if who.startswith("an ")
        else who.replace("two", "the two")
    )
    they = "the " + they[2:] if they.startswith("a ") else they
    named = they.split(" named ")[-1] if " named " in they else they
    return f"{lived} {pick['mood']} That day {named} {pick['find']}. Then {pick['help']} {pick['work']} {ending}"


def story_turn(random: Random) -> Turn:
    if random.random() < 0.6:
        row = random.choice(table(random.choice(("animals", "jobs"))))
        about = random.random() < 0.6
        who = a(row["en"]) if about else ""
        question = (
            random.choice(("Tell me a story about {}.", "Write a short story about {}.")).format(who)
            if about
            else random.choice(("Tell me a story.", "Tell me a short story.", "Can you tell me a story?"))
        )
        return Turn(
            question, "A short story: somebody, a place, a problem, help, and a good end.", story(random, "en", who)
        )
    row = random.choice(table("animals"))
    who = f"一只{row['zh']}" if random.random() < 0.5 else ""
    question = (
        f"讲一个关于{row['zh']}的故事。"
        if who
        else random.choice(("讲个故事。", "请给我讲一个故事。", "写一个短故事。"))
    )
    return Turn(question, "一个短故事：人物、地点、问题、帮助和结局。", story(random, "zh", who))


def poem(random: Random) -> Turn:
    title, poet, lines = random.choice(rows("poems_zh"))
    return random.choice(
        (
            Turn(f"请背一首{poet}的诗。", f"{poet}写过《{title}》。", f"《{title}》\n{lines}"),
            Turn(f"请背《{title}》。", f"《{title}》是{poet}的诗。", lines),
            Turn(f"《{title}》是谁写的？", f"《{title}》的作者是{poet}。", f"《{title}》是唐代诗人{poet}写的。"),
        )
    )


def program(random: Random) -> Turn:
    task, name, parameters, body, words, task_zh = random.choice(rows("code"))
    indented = "\n".join(f"    {line}" for line in body.split("\n"))
    block = f"```python\ndef {name}({parameters}):\n{indented}\n```"
    if random.random() < 0.65:
        ask = random.choice(
            (
                "Write a Python function that {}.",
                "Show me a function that {}.",
                "How do I write a function that {} in Python?",
            )
        )
        return Turn(ask.format(task), f"The function takes {parameters} and {task}.", f"{block}\n{words}")
    return Turn(f"写一个 Python 函数，{task_zh}。", f"函数的参数是 {parameters}。", block)


# -- documents ---------------------------------------------------------------------------------------------------------

TURNS: tuple[tuple[int, Callable[[Random], Turn]], ...] = (
    (22, from_tables(ENGLISH)),
    (14, from_tables(CHINESE)),
    (12, fact),
    (10, small_talk),
    (6, how_to),
    (5, translation),
    (4, which_of_two),
    (3, naming),
    (3, sentence_with),
    (10, arithmetic),
    (4, word_problem),
    (3, ordering),
    (3, counting),
    (10, story_turn),
    (2, poem),
    (6, program),
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "Answer simply and clearly.",
    "You are hymoe's miniature.",
    "你是一个有用的助手。",
    "请用简短的句子回答。",
    "你是一个友好的助手，回答要简单清楚。",
)


def reply(turn: Turn, thinking: bool) -> str:
    """An answer as the model writes it."""
    thought = f"<think>\n{turn.thought}\n</think>" if thinking else "<think>\n\n</think>"
    return f"{thought}\n<answer>\n{turn.answer}\n</answer>"


def question(random: Random, text: str, thinking: bool) -> str:
    """Ask as users do: the fast form is marked, the thinking form is the default; some are careless in writing."""
    if random.random() < 0.08:
        text = text[0].lower() + text[1:]
    if random.random() < 0.08 and text[-1] in "?.!？。！":
        text = text[:-1]
    if not thinking:
        return f"/no_think{text if random.random() < 0.5 else ' ' + text}"
    return f"/think {text}" if random.random() < 0.06 else text


def conversation(random: Random) -> str:
    """One to four turns in HunYuan's template; earlier answers with or without their tags, as clients keep them."""
    kinds = [kind for _, kind in TURNS]
    n = random.choice((1, 1, 1, 1, 1, 2, 2, 3, 4))
    turns = [kind(random) for kind in random.choices(kinds, [weight for weight, _ in TURNS], k=n)]
    bare, marked = random.random() < 0.5, random.random() < 0.5
    opened = random.random() < 0.15
    text = f"<|startoftext|>{random.choice(SYSTEMS)}<|extra_4|>" if opened else ""
    for i, turn in enumerate(turns):
        thinking = random.random() < 0.65
        # A client that switches thinking off writes the empty thought itself and leaves the question as it is.
        asked = question(random, turn.question, thinking) if thinking or marked else turn.question
        text += asked if opened and i == 0 else f"<|startoftext|>{asked}"
        last = i == len(turns) - 1
        text += f"<|extra_0|>{reply(turn, thinking) if last or not bare else turn.answer}<|eos|>"
    return text


def _tool(name: str, about: str, parameter: str) -> dict[str, object]:
    properties = {parameter: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


TOOLS = {
    "get_weather": _tool("get_weather", "the weather in a city", "city"),
    "get_time": _tool("get_time", "the time in a city", "city"),
    "calculate": _tool("calculate", "the value of an expression", "expression"),
    "search": _tool("search", "search the library", "query"),
}


def tool_call(random: Random) -> str:
    """A call in the wire format, the tool's response, and the answer drawn from it."""
    name = random.choice(list(TOOLS))
    city = random.choice(table("countries"))
    x, y = random.randint(100, 999), random.randint(100, 999)
    sky, degrees, hour = (
        random.choice(("sunny", "rainy", "cloudy", "windy")),
        random.randint(-5, 35),
        random.randint(0, 23),
    )
    topic = random.choice(table("animals"))["en"]
    asked, argument, response, answer = {
        "get_weather": (
            f"What is the weather in {city['capital_en']}?",
            {"city": city["capital_en"]},
            {"sky": sky, "degrees": degrees},
            f"In {city['capital_en']} it is {sky}, with {degrees} degrees.",
        ),
        "get_time": (
            f"What time is it in {city['capital_en']}?",
            {"city": city["capital_en"]},
            {"time": f"{hour}:30"},
            f"In {city['capital_en']} it is {hour}:30.",
        ),
        "calculate": (f"What is {x} × {y}?", {"expression": f"{x} * {y}"}, {"value": x * y}, f"{x} × {y} = {x * y}."),
        "search": (
            f"Find books about the {topic}.",
            {"query": topic},
            {"books": [f"The {topic} and its home"]},
            f"I found one book: The {topic} and its home.",
        ),
    }[name]
    offered = [*random.sample([tool for key, tool in TOOLS.items() if key != name], random.randint(0, 1)), TOOLS[name]]
    random.shuffle(offered)
    call = json.dumps([{"name": name, "arguments": argument}], ensure_ascii=False)
    system = f"You may call these tools:\n{json.dumps(offered, ensure_ascii=False)}\n"
    return (
        f"<|startoftext|>{system}<|extra_4|>用户：{asked}<|extra_0|><tool_calls>{call}</tool_calls><|eos|>"
        f"<tool_response>{json.dumps(response)}</tool_response><|extra_0|>助手：{answer}<|eos|>"
    )


def plain(random: Random) -> str:
    """Text without a conversation: a story, a poem, an explanation or a program."""
    kind = random.randrange(6)
    if kind < 3:
        return story(random, random.choice(("en", "en", "zh")))
    if kind == 3:
        return program(random).answer
    if kind == 4:
        title, poet, lines = random.choice(rows("poems_zh"))
        return f"《{title}》 {poet}\n{lines}"
    return " ".join(random.choice(rows("facts"))[3] for _ in range(2))


def documents(seed: int, n: int) -> Iterator[str]:
    """Give n documents: 84 conversations, 6 tool calls and 10 plain texts in a hundred."""
    random = Random(seed)
    for _ in range(n):
        (kind,) = random.choices((conversation, tool_call, plain), (84, 6, 10))
        yield kind(random)
