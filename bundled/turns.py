"""What one turn of a training conversation is, and the small tools its makers share.

A turn is one user message with the answers that follow it. It knows nothing of tokens or of the chat
template.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from bundled import facts

Message = dict[str, Any]


@dataclass
class Turn:
    """One question with its answer.

    `key` names the question apart from its wrapping: the split into training and held-out questions goes by
    it. `thinking` is what stands between the think tags when thinking is on; empty for questions answered at
    once. `short` is the answer in a word, for users who ask for one. `check` says how an answer is marked:
    "exact" (equal to `answer`), "contains" (every string of `need` occurs), "list" (`need` holds the count
    and the allowed items), "story" (as "contains", and of a story's length), "calls" (the tool calls of
    `calls`, in order).
    """

    category: str
    question: str
    answer: str
    thinking: str = ""
    short: str = ""
    check: str = "exact"
    need: tuple[str, ...] = ()
    plain: bool = False  # the plainest phrasing of its question: always trained on
    keep_case: bool = False  # the answer copies from the question, so its letters must not be changed
    key: str = ""
    before: list["Turn"] = field(default_factory=list)  # turns that this one refers back to
    distance: bool = False  # whether other turns may come between `before` and this one
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)  # what the called tools returned; `answer` then follows

    def __post_init__(self) -> None:
        self.key = self.key or self.question


def ask(rng: random.Random, templates: tuple[str, ...] | list[str], **slots: object) -> tuple[str, bool]:
    """Fill a random template; the second value says whether it was the first, which is the plainest."""
    index = rng.randrange(len(templates))
    return cap(templates[index].format(**slots)), index == 0


def cap(text: str) -> str:
    """Upper-case the first letter and leave the rest."""
    return text[:1].upper() + text[1:]


def made_up(rng: random.Random) -> str:
    """A name that does not exist, of one to three syllables, so that copying it cannot be learnt by heart."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    name = "".join(rng.choice(facts.ONSETS) + rng.choice(facts.VOWELS) for _ in range(syllables))
    return cap(name + (rng.choice(facts.CODAS) if rng.random() < 0.7 or syllables == 1 else ""))


def any_name(rng: random.Random) -> str:
    """A known name or, one time in three, a made-up one."""
    return made_up(rng) if rng.random() < 0.33 else rng.choice(facts.NAMES)


def any_city(rng: random.Random) -> str:
    """A capital, another city or, one time in four, a made-up one."""
    draw = rng.random()
    if draw < 0.25:
        return made_up(rng)
    return rng.choice(facts.OTHER_CITIES) if draw < 0.45 else rng.choice(facts.COUNTRIES)[1]


_BEFORE = (
    "Please tell me: ",
    "Hi! ",
    "Hello. ",
    "Can you tell me: ",
    "I have a question. ",
    "Quick question: ",
    "Hey Tiny, ",
    "Hello Tiny! ",
    "OK. ",
    "Now another question. ",
    "I wonder: ",
    "Next: ",
)
BRIEF = (
    "Answer in one word.",
    "Answer with one word.",
    "One word, please.",
    "Just the answer, please.",
    "Be brief.",
    "Short answer, please.",
)
CAREFUL = ("Think carefully.", "Think step by step.", "Think first.", "Take your time and think.")


def dress(rng: random.Random, turn: Turn) -> Turn:
    """Wrap a question the way users do: a greeting before it, no capital letters, no question mark."""
    if rng.random() < 0.25:
        turn.question = rng.choice(_BEFORE) + turn.question
    if not turn.keep_case:
        if rng.random() < 0.1:
            turn.question = turn.question.lower()
        if rng.random() < 0.1:
            turn.question = turn.question.rstrip("?.!")
    return turn
