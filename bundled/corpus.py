"""Makes the bundled model's training text and its held-out questions from a seed, without any download.

Conversations are put together from the turns of questions.py and toolcalls.py; plain documents, for text
completion, are stories, statements and sequences. A question is held out by the hash of its text, so the two
sets cannot meet.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bundled import facts, questions, stories, toolcalls
from bundled.template import render
from bundled.turns import BRIEF, CAREFUL, Message, Turn, any_city, any_name, cap, dress

HELD_OUT_SHARE = 16  # one question in so many is held out
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"


@dataclass
class Conversation:
    """Messages as the API has them, and what is known about each assistant message."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool = True
    keys: list[str] = field(default_factory=list)  # the questions asked, for the split

    @property
    def completion(self) -> str:
        """What the assistant's last message looks like as generated text."""
        return completion_of(self.messages[-1], self.enable_thinking)


def completion_of(message: Message, enable_thinking: bool) -> str:
    """An assistant message as the model writes it, with its end-of-turn token."""
    text = message.get("content") or ""
    thought = message.get("reasoning_content", "")
    if thought and enable_thinking:
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    calls = [
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", "arguments": '
        f"{json.dumps(call['function']['arguments'], ensure_ascii=False)}}}\n</tool_call>"
        for call in message.get("tool_calls", [])
    ]
    return "\n".join(([text] if text else []) + calls) + END_OF_TURN


def is_held_out(turn: Turn) -> bool:
    """Whether a question belongs to the held-out set. The plainest phrasings are all trained on."""
    if turn.plain:
        return False
    digest = hashlib.blake2b(split_key(turn).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def split_key(turn: Turn) -> str:
    """The text the split goes by: one family of questions and one question, in lower case."""
    return f"{turn.category.split()[0]}: {turn.key.lower()}"


def draw(rng: random.Random, make: Callable[[], Turn], held_out: bool = False) -> Turn:
    """Draw turns until one is of the wanted side of the split, and wrap it as users do."""
    while True:
        turn = make()
        if is_held_out(turn) == held_out:
            return dress(rng, turn)


_SYSTEMS = (
    "You are a helpful assistant.",
    "You are Tiny, a small and friendly model.",
    "Be kind and helpful.",
    "You are an assistant. Answer the questions of the user.",
    "You are a teacher for children.",
    "Answer as well as you can.",
    "You are a bot on a web page.",
    "You help people.",
)
_SHORT_SYSTEMS = (*BRIEF[:2], "Always answer in one word.", "Only give the answer, nothing else.")


def _style(rng: random.Random, turn: Turn, brief: bool) -> None:
    """Ask for a short answer (if `brief`, the system prompt already does) or for careful thought."""
    if turn.check != "exact" or turn.results:
        return
    draw_ = rng.random()
    if brief or (turn.short and draw_ < 0.06):
        if not brief:
            turn.question += " " + rng.choice(BRIEF)
        turn.answer = turn.short or turn.answer
    elif draw_ > 0.95 and turn.short and not turn.thinking and not turn.before:
        turn.question += " " + rng.choice(CAREFUL)
        turn.thinking = f"Let me remember. {turn.answer}"


def messages_of(turn: Turn) -> list[Message]:
    """The user message of a turn and what follows it."""
    messages: list[Message] = [{"role": "user", "content": turn.question}]
    if turn.calls:
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": name, "arguments": arguments}}
                    for name, arguments in turn.calls
                ],
            }
        )
        messages += [{"role": "tool", "content": result} for result in turn.results]
        if not turn.results:
            return messages
    answer: Message = {"role": "assistant", "content": turn.answer}
    if turn.thinking:
        answer["reasoning_content"] = turn.thinking
    return [*messages, answer]


_NAMES = list(questions.MAKERS)
_WEIGHTS = [weight for _, weight in questions.MAKERS.values()]
_ALONE = ("story",)  # too long to stand in the middle of a long conversation often


def question_turn(rng: random.Random, category: str, held_out: bool = False) -> Turn:
    return draw(rng, lambda: questions.MAKERS[category][0](rng), held_out)


def _any_turn(rng: random.Random, tools: list[toolcalls.Tool], short: bool, memories: list[str]) -> Turn:
    """A turn to train on, of any category that fits the conversation so far."""
    kinds = {tool.kind for tool in tools}
    draw_ = rng.random()
    if tools and draw_ < 0.72:
        return draw(rng, lambda: toolcalls.call_turn(rng, tools, answered=True))
    if draw_ < (0.8 if tools else 0.03):
        return draw(rng, lambda: toolcalls.no_tool(rng, tools))
    while True:
        category = rng.choices(_NAMES, _WEIGHTS)[0]
        if category == "arithmetic" and kinds & {"add", "multiply"}:
            continue  # those tools would be called
        if short and category in _ALONE and rng.random() < 0.8:
            continue
        if category == "recall":
            free = [what for what in questions.MEMORY_KINDS if what not in memories]
            if not free:
                continue
            # Told once in a conversation, or the answer would not be unique.
            memories.append(rng.choice(free))
            return draw(rng, lambda: questions.recall(rng, memories[-1]))
        if category == "greeting" and memories:
            continue  # it may tell another name
        return question_turn(rng, category)


def conversation(rng: random.Random) -> Conversation:
    """One training conversation of one to twenty turns."""
    talk = Conversation(enable_thinking=rng.random() < 0.72)
    tools = toolcalls.make_tools(rng) if rng.random() < 0.24 else []
    talk.tools = [tool.schema for tool in tools] or None
    brief = not tools and rng.random() < 0.03
    if brief or rng.random() < 0.25:
        talk.messages.append({"role": "system", "content": rng.choice(_SHORT_SYSTEMS if brief else _SYSTEMS)})
    draw_ = rng.random()
    length = 1 if draw_ < 0.5 else rng.randint(2, 4) if draw_ < 0.85 else rng.randint(5, 20)
    room = 2600 - sum(len(json.dumps(schema)) for schema in talk.tools or [])
    if length == 1 and rng.random() < 0.015:
        turn = dress(rng, questions.not_told(rng))
        talk.keys.append(split_key(turn))
        talk.messages += messages_of(turn)
        return talk
    turns: list[Turn] = []
    waiting: list[Turn] = []  # questions about something told, to be asked some turns later
    memories: list[str] = []

    def add(turn: Turn) -> None:
        nonlocal room
        turns.append(turn)
        talk.keys.append(split_key(turn))
        room -= len(turn.question) + len(turn.answer) + 40 + 100 * len(turn.calls)

    while len(turns) < length and room > 0:
        if waiting and rng.random() < 0.3:
            add(waiting.pop(0))
            continue
        turn = _any_turn(rng, tools, length > 4, memories)
        _style(rng, turn, brief)
        for earlier in turn.before:
            if earlier.category != "recall":
                _style(rng, earlier, brief)
            add(earlier)
        if turn.distance and rng.random() < 0.6:
            waiting.append(turn)
        else:
            add(turn)
    for turn in waiting:
        add(turn)
    if turns[-1].results and rng.random() < 0.5:
        turns[-1].results = []  # the conversation ends with the call, whose results are still to come
    for turn in turns:
        talk.messages += messages_of(turn)
    return talk


@dataclass(frozen=True)
class Sample:
    """A text to train on, with the spans (start, end) of characters that the loss counts."""

    text: str
    spans: tuple[tuple[int, int], ...]


_ASSISTANT = "<|im_start|>assistant\n"


def chat_sample(talk: Conversation) -> Sample:
    """Render a conversation as served, and count the loss on what the assistant writes.

    Answers to earlier questions that are thought about stand in the history without their thoughts. They are
    not counted, since the model is not to give them so.
    """
    prompt = render(talk.messages[:-1], talk.tools, talk.enable_thinking)
    text = prompt + talk.completion
    answers = [message for message in talk.messages if message["role"] == "assistant"]
    spans = []
    start = 0
    for message in answers[:-1]:
        start = text.index(_ASSISTANT, start) + len(_ASSISTANT)
        end = text.index(END_OF_TURN, start) + len(END_OF_TURN)
        if not message.get("reasoning_content"):
            spans.append((start, end))
    return Sample(text, (*spans, (len(prompt), len(text))))


def _statement(rng: random.Random) -> str:
    draw_ = rng.random()
    if draw_ < 0.3:
        country, city, _ = rng.choice(facts.COUNTRIES)
        return f"The capital of {country} is {city}." if rng.random() < 0.7 else f"{city} is the capital of {country}."
    if draw_ < 0.5:
        category = rng.choice(("color", "opposite", "animal", "word form", "continent", "order"))
        return questions.MAKERS[category][0](rng).answer
    if draw_ < 0.6:
        return questions.definition(rng).answer
    if draw_ < 0.7:
        return questions.arithmetic(rng).answer
    category = rng.choice(("color", "opposite", "translation", "animal"))
    return questions.MAKERS[category][0](rng).answer


def _statements(rng: random.Random, count: int) -> list[str]:
    """Different statements: repeating oneself is easily learnt."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_statement(rng)] = None
    return list(found)


_LIKES = ("books", "music", "the sea", "long walks", "old maps", "tea", "cakes", "the stars", "rainy days", "trains")


def _introduction(rng: random.Random) -> str:
    """A few sentences in which somebody tells who they are."""
    name, (animal, *_), shade = any_name(rng), rng.choice(facts.ANIMALS), rng.choice(facts.GROUPS["colors"])
    more = [
        f"I am {rng.randint(5, 90)} years old.",
        f"I live in {any_city(rng)}.",
        f"I have {stories.with_article(animal)}.",
        f"My favorite color is {shade}.",
        f"I like {' and '.join(rng.sample(_LIKES, 2))}.",
        f"My best friend is called {any_name(rng)}.",
    ]
    rng.shuffle(more)
    hello = rng.choice(("Hello, my name is {n}.", "My name is {n}.", "Hi, I am {n}.", "I am {n}.")).format(n=name)
    return " ".join([hello, *more[: rng.randint(2, 6)]])


def statement_prompt(rng: random.Random) -> tuple[str, str]:
    """A few statements, the last one broken off before its last word, and that word."""
    before = _statements(rng, rng.randint(0, 3))
    country, city, _ = rng.choice(facts.COUNTRIES)
    left, right = rng.choice(facts.OPPOSITES)
    thing, shade = rng.choice(facts.COLORS)
    start, word = rng.choice(
        ((f"The capital of {country} is", city), (f"The opposite of {left} is", right), (f"{cap(thing)} is", shade))
    )
    return " ".join([*before, start]), f" {word}."


_ASKED = ("capital", "color", "opposite", "animal", "continent", "order", "word form", "definition")


def document(rng: random.Random) -> str:
    """A plain text for completion: a story, statements, a sequence or questions with answers."""
    draw_ = rng.random()
    if draw_ < 0.5:
        return stories.tell(rng, stories.draw_subject(rng), rng.random() < 0.2)
    if draw_ < 0.8:
        while True:
            start, end = statement_prompt(rng)
            if not _prompt_held_out(start):
                break
        more = [text for text in _statements(rng, rng.randint(0, 6)) if text not in start + end]
        return " ".join([start + end, *more])
    if draw_ < 0.84:
        return _introduction(rng)
    if draw_ < 0.92:
        items = rng.choice((facts.DAYS, facts.MONTHS, facts.LETTERS, facts.PLANETS, None))
        if items is None:
            first = rng.randint(0, 20)
            items = [str(number) for number in range(first, first + rng.randint(10, 60))]
        return ", ".join(items) + "."
    turns = [question_turn(rng, category) for category in rng.sample(_ASKED, rng.randint(2, 5))]
    return "\n".join(f"Question: {turn.question}\nAnswer: {turn.answer}" for turn in turns)


def _prompt_held_out(prompt: str) -> bool:
    """Statements are always trained on alone; one in sixteen combinations of several is held out."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    return ". " in prompt and int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def samples(seed: int, count: int, keys: set[str] | None = None) -> Iterator[Sample]:
    """Training samples. `keys`, if given, collects the questions they ask."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.12:
            text = document(rng) + END_OF_TEXT
            # The first token has nothing before it and the loss cannot count it.
            yield Sample(text, ((0, len(text)),))
        else:
            talk = conversation(rng)
            if keys is not None:
                keys.update(talk.keys)
            yield chat_sample(talk)


@dataclass
class HeldOut:
    """One question of the held-out set, with the prompt to give and what to expect."""

    category: str
    prompt: str
    answer: str
    check: str
    need: tuple[str, ...]
    calls: list[tuple[str, dict[str, Any]]]
    thinks: bool
    key: str


_TOOL_CATEGORIES = ("tool call", "parallel calls", "tool answer", "no tool", "tools unused")


def _held_out_turn(rng: random.Random, category: str) -> tuple[Turn, list[toolcalls.Tool]]:
    if category in ("tool call", "tool answer", "parallel calls"):
        while True:
            tools = toolcalls.make_tools(rng)
            turn = draw(
                rng,
                lambda tools=tools: toolcalls.call_turn(  # type: ignore[misc]
                    rng, tools, answered=category == "tool answer"
                ),
                held_out=True,
            )
            if (turn.category == "parallel calls") == (category == "parallel calls"):
                return turn, tools
    if category == "no tool":
        tools = toolcalls.make_tools(rng) if rng.random() < 0.5 else []
        return draw(rng, lambda: toolcalls.no_tool(rng, tools), held_out=True), tools
    if category == "tools unused":
        other = rng.choice(("capital", "color", "opposite", "animal", "order", "translation", "definition"))
        return question_turn(rng, other, held_out=True), toolcalls.make_tools(rng)
    return question_turn(rng, category, held_out=True), []


def held_out(per_category: int = 24, seed: int = 20_000) -> list[HeldOut]:
    """The held-out questions: `per_category` different ones of each category that has any."""
    rng = random.Random(seed)
    items: list[HeldOut] = []
    # Greetings and jokes have few phrasings, nearly all of them trained on; the rest has plenty to hold out.
    for category in [name for name in _NAMES if name != "joke"] + list(_TOOL_CATEGORIES):
        seen: set[str] = set()
        repeats = 0
        while len(seen) < per_category and repeats < 100:  # some categories hold out only a few
            turn, tools = _held_out_turn(rng, category)
            if turn.key in seen:
                repeats += 1
                continue
            seen.add(turn.key)
            talk = Conversation(tools=[tool.schema for tool in tools] or None, enable_thinking=rng.random() < 0.75)
            _style(rng, turn, brief=False)
            for earlier in turn.before:
                talk.messages += messages_of(earlier)
            if turn.distance:  # something else is asked in between
                between = question_turn(rng, rng.choice(("capital", "color", "opposite", "definition")))
                talk.messages += messages_of(between)
            talk.messages += messages_of(turn)
            thinks = bool(turn.thinking) and talk.enable_thinking
            items.append(
                HeldOut(
                    category,
                    render(talk.messages[:-1], talk.tools, talk.enable_thinking),
                    turn.answer,
                    turn.check,
                    turn.need,
                    turn.calls,
                    thinks,
                    split_key(turn),
                )
            )
    found: set[str] = set()
    while len(found) < per_category:
        prompt, answer = statement_prompt(rng)
        if _prompt_held_out(prompt) and prompt not in found:
            found.add(prompt)
            items.append(HeldOut("completion", prompt, answer, "begins", (), [], False, "text: " + prompt))
    return items
