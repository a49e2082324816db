"""The makers of single questions, one a category: each draws a question of its kind and knows the answer.

Facts are asked about in many phrasings, so that a phrasing can be held out for one fact and known from
others.
"""

import json
import random
from collections.abc import Callable

from bundled import facts, stories
from bundled.turns import Turn, any_city, any_name, ask, cap, made_up


def _said(name: str) -> str:
    return f"Hello, {name}! How can I help you?"


def capital(rng: random.Random) -> Turn:
    country, city, _ = rng.choice(facts.COUNTRIES)
    if rng.random() < 0.25:
        text, plain = ask(
            rng,
            (
                "Which country has the capital {x}?",
                "{x} is the capital of which country?",
                "Of which country is {x} the capital?",
                "What country is {x} the capital of?",
                "Name the country whose capital is {x}.",
            ),
            x=city,
        )
        return Turn("capital", text, f"{city} is the capital of {country}.", short=cap(country), plain=plain)
    text, plain = ask(
        rng,
        (
            "What is the capital of {x}?",
            "What's the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "Tell me the capital of {x}.",
            "Do you know the capital of {x}?",
            "What is the capital city of {x}?",
            "Capital of {x}?",
            "What is {x}'s capital?",
            "The capital of {x} is which city?",
            "Give me the capital of {x}.",
            "What city is the capital of {x}?",
        ),
        x=country,
    )
    return Turn("capital", text, f"The capital of {country} is {city}.", short=city, plain=plain)


def capital_check(rng: random.Random) -> Turn:
    country, city, _ = rng.choice(facts.COUNTRIES)
    other = city if rng.random() < 0.5 else rng.choice(facts.COUNTRIES)[1]
    text, _ = ask(
        rng,
        (
            "Is {c} the capital of {x}?",
            "Is the capital of {x} {c}?",
            "Is it true that {c} is the capital of {x}?",
            "{c} is the capital of {x}, right?",
            "Would you say that {c} is the capital of {x}?",
            "Am I right that {c} is the capital of {x}?",
        ),
        c=other,
        x=country,
    )
    right = other == city
    yes, no = f"Yes, {city} is the capital of {country}.", f"No, the capital of {country} is {city}."
    answer = yes if right else no
    return Turn("capital check", text, answer, short="Yes" if right else "No", plain=False)


def continent(rng: random.Random) -> Turn:
    country, _, place = rng.choice(facts.COUNTRIES)
    text, plain = ask(
        rng,
        (
            "Where is {x}?",
            "On which continent is {x}?",
            "Which continent is {x} in?",
            "What continent is {x} part of?",
            "In which part of the world is {x}?",
            "Tell me where {x} is.",
            "Where can I find {x}?",
            "Where in the world is {x}?",
            "On what continent does {x} lie?",
            "Where does {x} lie?",
        ),
        x=country,
    )
    return Turn("continent", text, f"{cap(country)} is in {place}.", short=place, plain=plain)


def color(rng: random.Random) -> Turn:
    thing, shade = rng.choice(facts.COLORS)
    text, plain = ask(
        rng,
        (
            "What color is {x}?",
            "What is the color of {x}?",
            "Which color is {x}?",
            "What color does {x} have?",
            "Tell me the color of {x}.",
            "Do you know what color {x} is?",
            "Name the color of {x}.",
            "What colour is {x}?",
            "Which color does {x} have?",
            "{x} has which color?",
            "If I paint {x}, which color do I need?",
        ),
        x=thing,
    )
    return Turn("color", text, f"{cap(thing)} is {shade}.", short=cap(shade), plain=plain)


def opposite(rng: random.Random) -> Turn:
    left, right = rng.choice(facts.OPPOSITES)
    if rng.random() < 0.5:
        left, right = right, left
    text, plain = ask(
        rng,
        (
            "What is the opposite of {x}?",
            "What's the opposite of {x}?",
            "Name the opposite of {x}.",
            "Give me the opposite of {x}.",
            "Which word is the opposite of {x}?",
            "Opposite of {x}?",
            "Tell me the opposite of {x}.",
            "Which word means the opposite of {x}?",
            "The opposite of {x} is what?",
            "What is the opposite of the word {x}?",
        ),
        x=left,
    )
    return Turn("opposite", text, f"The opposite of {left} is {right}.", short=cap(right), plain=plain)


def animal(rng: random.Random) -> Turn:
    name, sound, legs, young, kind, home = rng.choice(facts.ANIMALS)
    the = stories.with_article(name)
    topic = rng.choice(
        ("sound", "legs", "young", "kind", "home") if sound != "-" else ("legs", "young", "kind", "home")
    )
    templates: tuple[str, ...]
    if topic == "sound":
        templates = (
            "What sound does {a} make?",
            "What does {a} say?",
            "Which sound does {a} make?",
            "What noise does {a} make?",
            "How does {a} sound?",
            "Tell me the sound of {a}.",
            "Which noise do you hear from {a}?",
        )
        answer, short = f"{cap(the)} says {sound}.", sound
    elif topic == "legs":
        templates = (
            "How many legs does {a} have?",
            "What number of legs does {a} have?",
            "Tell me how many legs {a} has.",
            "On how many legs does {a} walk?",
            "Do you know how many legs {a} has?",
            "How many legs has {a}?",
        )
        answer, short = f"{cap(the)} has {legs} legs.", legs
    elif topic == "young":
        templates = (
            "What is a baby {n} called?",
            "What do you call a baby {n}?",
            "What is a young {n} called?",
            "How is a baby {n} called?",
            "What is the young of {a} called?",
            "Name the young of {a}.",
            "What is the word for a baby {n}?",
        )
        answer, short = f"A baby {name} is called {stories.with_article(young)}.", young
    elif topic == "kind":
        templates = (
            "What kind of animal is {a}?",
            "Which kind of animal is {a}?",
            "What sort of animal is {a}?",
            "Is {a} a mammal, a bird, a fish or something else?",
            "What type of animal is {a}?",
            "To which group of animals does {a} belong?",
        )
        answer, short = f"{cap(the)} is {stories.with_article(kind)}.", kind
    else:
        templates = (
            "Where does {a} live?",
            "What is the home of {a}?",
            "Where is {a} at home?",
            "Where can you find {a}?",
            "Tell me where {a} lives.",
            "In what place does {a} live?",
        )
        answer, short = f"{cap(the)} lives {home}.", home
    text, plain = ask(rng, templates, a=the, n=name)
    return Turn("animal", text, answer, short=cap(short), plain=plain)


_CYCLES = (
    ("day", facts.DAYS, True),
    ("month", facts.MONTHS, True),
    ("season", facts.SEASONS, True),
    ("letter", facts.LETTERS, False),
    ("planet", facts.PLANETS, False),
)


def order(rng: random.Random) -> Turn:
    what, items, cyclic = rng.choice(_CYCLES)
    after = rng.random() < 0.6
    index = rng.randrange(len(items)) if cyclic else rng.randrange(len(items) - 1) + (0 if after else 1)
    here, there = items[index], items[(index + (1 if after else -1)) % len(items)]
    word = "after" if after else "before"
    text, plain = ask(
        rng,
        (
            "Which {w} comes {d} {x}?",
            "What comes {d} {x}?",
            "What {w} comes {d} {x}?",
            "Which {w} is {d} {x}?",
            "What is the {w} {d} {x}?",
            "Name the {w} {d} {x}.",
            "Tell me the {w} that comes {d} {x}.",
            "Do you know which {w} comes {d} {x}?",
            "{w} {d} {x}?",
        ),
        w=what,
        d=word,
        x=here,
    )
    answer = f"{cap(there)} comes {word} {here}."
    return Turn("order", text, answer, short=cap(there), plain=plain, keep_case=what == "letter")


def days_later(rng: random.Random) -> Turn:
    what, items, _ = rng.choice(_CYCLES[:2])
    start, steps = rng.randrange(len(items)), rng.choice((2, 3, 4))
    number = {2: "two", 3: "three", 4: "four"}[steps]
    walk = [items[(start + step) % len(items)] for step in range(steps + 1)]
    text, _ = ask(
        rng,
        (
            "Which {w} is {n} {w}s after {x}?",
            "What {w} comes {n} {w}s after {x}?",
            "Name the {w} {n} {w}s after {x}.",
            "{n} {w}s after {x}, which {w} is it?",
            "It is {x}. Which {w} will it be in {n} {w}s?",
            "If it is {x} now, what {w} is it {n} {w}s later?",
        ),
        w=what,
        n=number,
        x=walk[0],
    )
    thinking = f"I start at {walk[0]} and go on {number} times: {', '.join(walk[1:])}."
    answer = f"{cap(number)} {what}s after {walk[0]} comes {walk[-1]}."
    return Turn("days later", text, answer, thinking, walk[-1])


def word_form(rng: random.Random) -> Turn:
    if rng.random() < 0.5:
        base, form = rng.choice(facts.PLURALS)
        kind, templates = (
            "plural",
            (
                "What is the plural of {x}?",
                "What's the plural of {x}?",
                "Give me the plural of {x}.",
                "One {x}, two what?",
                "Which word is the plural of {x}?",
                "Plural of {x}?",
                "Tell me the plural of {x}.",
                "How do you say {x} in the plural?",
                "What is the plural form of {x}?",
            ),
        )
    else:
        base, form = rng.choice(facts.PASTS)
        kind, templates = (
            "past tense",
            (
                "What is the past tense of {x}?",
                "What's the past tense of {x}?",
                "Give me the past tense of {x}.",
                "Which word is the past tense of {x}?",
                "Past tense of {x}?",
                "Tell me the past tense of {x}.",
                "What is the past of the verb {x}?",
                "What is {x} in the past tense?",
                "Today I {x}. What is the past tense of that verb?",
            ),
        )
    text, plain = ask(rng, templates, x=base)
    return Turn("word form", text, f"The {kind} of {base} is {form}.", short=cap(form), plain=plain)


def _worked(left: int, sign: str, right: int, value: int) -> str:
    """A sum as it is worked out: tens and ones apart where that helps."""
    whole = f"{left} {sign} {right} = {value}."
    if sign == "*" or max(left, right) <= 20:
        return whole
    ones, tens = right % 10, right - right % 10
    if not (ones and tens):
        return whole
    middle = left + tens if sign == "+" else left - tens
    return f"{left} {sign} {tens} = {middle}, {middle} {sign} {ones} = {value}."


def arithmetic(rng: random.Random) -> Turn:
    operation = rng.choice(("plus", "plus", "minus", "times"))
    if operation == "times":
        left, right = rng.randint(0, 10), rng.randint(0, 10)
        value, sign = left * right, "*"
        extra = ("Multiply {a} by {b}.", "What is {a} multiplied by {b}?", "What is the product of {a} and {b}?")
    else:
        top = 20 if rng.random() < 0.6 else 99
        left, right = rng.randint(0, top), rng.randint(0, top)
        sign = "+"
        extra = ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "What do you get when you add {a} and {b}?")
        if operation == "minus":
            left, right, sign = max(left, right), min(left, right), "-"
            extra = ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is left when you take {b} from {a}?")
        value = left + right if sign == "+" else left - right
    text, _ = ask(
        rng,
        (
            "What is {a} {o} {b}?",
            "What's {a} {o} {b}?",
            "What is {a} {s} {b}?",
            "{a} {s} {b} = ?",
            "How much is {a} {o} {b}?",
            "What is {a}{s}{b}?",
            "{a}{s}{b}=?",
            "Calculate {a} {s} {b}.",
            "Can you work out {a} {o} {b}?",
            "{a} {o} {b}?",
            *extra,
        ),
        a=left,
        b=right,
        o=operation,
        s=sign,
    )
    thinking = f"I have to work out {left} {operation} {right}. {_worked(left, sign, right, value)}"
    return Turn("arithmetic", text, f"{left} {operation} {right} is {value}.", thinking, str(value))


_GOODS = ("apples", "books", "coins", "eggs", "stones", "cakes", "keys", "flowers", "pencils", "cards", "stars")


def word_problem(rng: random.Random) -> Turn:
    name, goods = any_name(rng), rng.choice(_GOODS)
    left, right = rng.randint(2, 20), rng.randint(1, 12)
    if rng.random() < 0.5:
        tale, sign = (
            rng.choice(
                (
                    "{n} has {a} {g} and gets {b} more.",
                    "{n} has {a} {g}. A friend gives {n} {b} more.",
                    "{n} finds {a} {g} and then {b} more.",
                    "{n} buys {a} {g} on one day and {b} on the next.",
                )
            ),
            "+",
        )
        value = left + right
    else:
        right = min(right, left)
        tale, sign = (
            rng.choice(
                (
                    "{n} has {a} {g} and loses {b} of them.",
                    "{n} has {a} {g} and gives {b} away.",
                    "{n} has {a} {g}. {b} of them are sold.",
                    "There are {a} {g} with {n}, but {b} get lost.",
                )
            ),
            "-",
        )
        value = left - right
    question = rng.choice(
        ("How many {g} does {n} have now?", "How many {g} are there now?", "How many {g} does that make?")
    )
    text = f"{tale} {question}".format(n=name, a=left, b=right, g=goods)
    turned = "more" if sign == "+" else "fewer"
    thinking = f"There are {left} {goods}, then {right} {turned}. {left} {sign} {right} = {value}."
    return Turn("word problem", text, f"{name} has {value} {goods} now.", thinking, str(value), keep_case=True)


def compare(rng: random.Random) -> Turn:
    left, right = rng.sample(range(101), 2)
    if rng.random() < 0.5:
        word, other, best = "bigger", "smaller", max(left, right)
    else:
        word, other, best = "smaller", "bigger", min(left, right)
    text, _ = ask(
        rng,
        (
            "Which is {w}, {a} or {b}?",
            "What is {w}: {a} or {b}?",
            "Which number is {w}, {a} or {b}?",
            "Is {a} or {b} {w}?",
            "Tell me which is {w}, {a} or {b}.",
            "{a} or {b}: which is {w}?",
            "Compare {a} and {b}. Which one is {w}?",
        ),
        w=word,
        a=left,
        b=right,
    )
    rest = left + right - best
    result = f"{best} is {word} than {rest}, and {rest} is {other} than {best}."
    thinking = f"I compare {left} and {right}. {result}"
    return Turn("compare", text, f"{best} is {word} than {rest}.", thinking, str(best))


def sort_numbers(rng: random.Random) -> Turn:
    numbers = rng.sample(range(1, 31), rng.choice((3, 3, 4)))
    ordered = sorted(numbers)
    listed, sorted_list = (", ".join(map(str, items)) for items in (numbers, ordered))
    if rng.random() < 0.5:
        text, _ = ask(
            rng,
            (
                "Sort the numbers {x}.",
                "Sort these numbers: {x}.",
                "Put {x} in order.",
                "Sort {x} from small to big.",
                "Put the numbers {x} in order, smallest first.",
                "Order these numbers: {x}.",
            ),
            x=listed,
        )
        answer, short = f"In order: {sorted_list}.", sorted_list
    else:
        word, index = rng.choice((("biggest", -1), ("smallest", 0)))
        text, _ = ask(
            rng,
            (
                "Which is the {w} of {x}?",
                "What is the {w} number of {x}?",
                "Find the {w} of these numbers: {x}.",
                "Which of the numbers {x} is the {w}?",
                "Tell me the {w} of {x}.",
            ),
            x=listed,
            w=word,
        )
        answer, short = f"The {word} is {ordered[index]}.", str(ordered[index])
    thinking = f"The smallest is {ordered[0]}, then comes {', then '.join(map(str, ordered[1:]))}."
    return Turn("sort", text, answer, thinking, short)


def spelling(rng: random.Random) -> Turn:
    word = rng.choice(facts.SPELLING)
    topic = rng.choice(("spell", "spell", "first", "last"))
    if topic == "spell":
        text, plain = ask(
            rng,
            (
                "Spell {x}.",
                "How do you spell {x}?",
                "Spell the word {x}.",
                "How is {x} spelled?",
                "Can you spell {x}?",
                "Please spell {x} for me.",
                "Give me the letters of {x}.",
            ),
            x=word,
        )
        return Turn("spelling", text, "-".join(word) + ".", short="-".join(word), plain=plain)
    letter = word[0] if topic == "first" else word[-1]
    text, plain = ask(
        rng,
        (
            "What is the {t} letter of {x}?",
            "Which letter comes {t} in {x}?",
            "Tell me the {t} letter of {x}.",
            "What is the {t} letter of the word {x}?",
            "Which is the {t} letter in the word {x}?",
        ),
        t=topic,
        x=word,
    )
    answer = f"The {topic} letter of {word} is {letter}."
    return Turn("spelling", text, answer, short=letter, plain=plain)


def count_letters(rng: random.Random) -> Turn:
    word = rng.choice(facts.SPELLING)
    text, plain = ask(
        rng,
        (
            "How many letters are in {x}?",
            "How many letters does {x} have?",
            "Count the letters of {x}.",
            "How many letters are there in the word {x}?",
            "How long is the word {x}?",
            "What is the number of letters in {x}?",
            "Count the letters in the word {x}.",
            "How many letters has {x}?",
        ),
        x=word,
    )
    counted = ", ".join(f"{letter} {index}" for index, letter in enumerate(word, 1))
    answer = f"The word {word} has {len(word)} letters."
    return Turn("count letters", text, answer, f"I count the letters: {counted}.", str(len(word)), plain=plain)


def counting(rng: random.Random) -> Turn:
    if rng.random() < 0.15:
        end = rng.randint(2, 20)
        text, _ = ask(
            rng,
            ("Count to {b}.", "Please count to {b}.", "Can you count to {b}?", "Count up to {b}."),
            b=end if rng.random() < 0.5 else facts.NUMBERS[end],
        )
        return Turn("counting", text, ", ".join(map(str, range(1, end + 1))))
    start, length = rng.randint(0, 60), rng.randint(3, 30 if rng.random() < 0.3 else 12)
    end = start + length
    templates: tuple[str, ...]
    if rng.random() < 0.3:
        start, end = end, start
        templates = (
            "Count down from {a} to {b}.",
            "Count backwards from {a} to {b}.",
            "Please count down from {a} to {b}.",
            "Count from {a} down to {b}.",
        )
    else:
        templates = (
            "Count from {a} to {b}.",
            "Count up from {a} to {b}.",
            "Please count from {a} to {b}.",
            "Write the numbers from {a} to {b}.",
            "List the numbers from {a} to {b}.",
            "Say the numbers from {a} to {b}.",
        )
    text, _ = ask(rng, templates, a=start, b=end)
    step = 1 if end > start else -1
    return Turn("counting", text, ", ".join(map(str, range(start, end + step, step))))


_SMALL = {2: "two", 3: "three", 4: "four", 5: "five"}


def name_some(rng: random.Random) -> Turn:
    group = rng.choice(list(facts.GROUPS))
    items = facts.GROUPS[group]
    count = rng.choice([number for number in _SMALL if number <= len(items)])
    chosen = rng.sample(items, count)
    text, plain = ask(
        rng,
        (
            "Name {n} {g}.",
            "Tell me {n} {g}.",
            "Give me {n} {g}.",
            "List {n} {g}.",
            "Can you name {n} {g}?",
            "What are {n} {g}?",
            "Give me a list of {n} {g}.",
            "I need the names of {n} {g}.",
            "Say {n} {g}.",
        ),
        n=_SMALL[count] if rng.random() < 0.7 else count,
        g=group,
    )
    if rng.random() < 0.1:
        text = text.rstrip(".?") + ", one per line."
        return Turn("lists", text, "\n".join(f"- {item}" for item in chosen), check="list", need=(str(count), *items))
    answer = cap(", ".join(chosen[:-1]) + f" and {chosen[-1]}.")
    return Turn("lists", text, answer, check="list", need=(str(count), *items), plain=plain)


def whole_list(rng: random.Random) -> Turn:
    what, items = rng.choice(
        (
            ("days of the week", facts.DAYS),
            ("months of the year", facts.MONTHS),
            ("four seasons", facts.SEASONS),
            ("letters of the alphabet", facts.LETTERS),
            ("planets", facts.PLANETS),
        )
    )
    text, plain = ask(
        rng,
        (
            "List the {x}.",
            "Name the {x}.",
            "What are the {x}?",
            "Tell me the {x}.",
            "Say the {x} in order.",
            "Which are the {x}?",
            "Give me the {x}.",
            "List all the {x}.",
            "Can you list the {x}?",
            "Name all the {x}.",
        ),
        x=what,
    )
    return Turn("whole lists", text, f"The {what} are {', '.join(items[:-1])} and {items[-1]}.", plain=plain)


def definition(rng: random.Random) -> Turn:
    word, meaning = rng.choice(facts.DEFINITIONS)
    bare = word in ("rain", "snow", "wind", "breakfast", "dinner")
    the = word if bare else stories.with_article(word)
    text, plain = ask(
        rng,
        (
            "What is {x}?",
            "What's {x}?",
            "What does the word {w} mean?",
            "Explain what {x} is.",
            "Define {w}.",
            "Can you explain what {x} is?",
            "What do you call {w}, in other words?",
            "Tell me what {x} is.",
            "Describe {x}.",
            "Do you know what {x} is?",
            "What is the meaning of {w}?",
        ),
        x=the,
        w=word,
    )
    return Turn("definition", text, f"{cap(the)} is {meaning}.", plain=plain)


def translation(rng: random.Random) -> Turn:
    language = rng.choice(list(facts.LANGUAGES))
    word = rng.choice(list(facts.LANGUAGES[language]))
    foreign = facts.LANGUAGES[language][word]
    text, plain = ask(
        rng,
        (
            "How do you say {w} in {l}?",
            "Say {w} in {l}.",
            "What is {w} in {l}?",
            "What is the {l} word for {w}?",
            "Translate {w} into {l}.",
            "How do people say {w} in {l}?",
            "Tell me the {l} word for {w}.",
            "What does {w} mean in {l}?",
            "{w} in {l}?",
            "Write {w} in {l}.",
        ),
        w=word,
        l=language,
    )
    return Turn("translation", text, f"{cap(word)} in {language} is {foreign}.", short=foreign, plain=plain)


def emoji(rng: random.Random) -> Turn:
    if rng.random() < 0.06:
        text, _ = ask(
            rng,
            (
                "Give me a smiley.",
                "Send me a smiley.",
                "Show me a smiley.",
                "A smiley, please.",
                "I want a smiley.",
                "Can you smile?",
                "Smile!",
            ),
        )
        return Turn("emoji", text, "Here you are: 🙂", short="🙂", plain=True)
    name, sign = rng.choice(facts.EMOJI)
    text, plain = ask(
        rng,
        (
            "Give me the emoji for {x}.",
            "Which emoji shows {x}?",
            "Show me a {x} emoji.",
            "What is the emoji for {x}?",
            "Send me a {x} emoji.",
            "Emoji for {x}?",
            "Do you have a {x} emoji?",
            "Draw a {x} as an emoji.",
            "I want a {x} emoji.",
            "Type the {x} emoji.",
        ),
        x=name,
    )
    return Turn("emoji", text, f"Here you are: {sign}", short=sign, plain=plain)


_PHRASES = (
    "the fox is asleep",
    "good night, moon",
    "café au lait",
    "naïve Zoë",
    "I like tea",
    "two plus two",
    "über alles schön",
    "日本",
    "hello world",
    "a b c",
    "crème brûlée",
    "piñata",
    "smile 🙂",
    "Ça va?",
    "this is a test",
    "I am here",
    "good morning",
    "all is well",
    "one two three",
    "the quick brown fox",
    "yes",
    "thank you",
)


def repeat(rng: random.Random) -> Turn:
    draw = rng.random()
    if draw < 0.4:
        phrase = " ".join(
            rng.choice(
                (
                    made_up(rng),
                    rng.choice(facts.SPELLING),
                    str(rng.randint(0, 999)),
                    rng.choice(facts.EMOJI)[1],
                    any_city(rng),
                    any_name(rng),
                )
            )
            for _ in range(rng.randint(1, 4))
        )
    elif draw < 0.8:
        language = facts.LANGUAGES[rng.choice(list(facts.LANGUAGES))]
        phrase = " ".join(rng.choice(list(language.values())) for _ in range(rng.randint(1, 3)))
    else:
        phrase = rng.choice(_PHRASES)
    text, _ = ask(
        rng,
        (
            "Repeat after me: {x}",
            "Say this: {x}",
            "Repeat: {x}",
            "Echo: {x}",
            "Please repeat: {x}",
            "Say: {x}",
            "Say {x}",
            'Say "{x}"',
            "Write exactly this: {x}",
            "Copy this text: {x}",
        ),
        x=phrase,
    )
    return Turn("repeat", text, phrase, keep_case=True)


def make_json(rng: random.Random) -> Turn:
    name, age, city = any_name(rng), rng.randint(1, 99), any_city(rng)
    fields: dict[str, object] = {"name": name, "age": age, "city": city}
    keys = rng.choice((["name", "age"], ["name", "city"], ["name", "age", "city"], ["city", "age"], ["name"]))
    chosen = {key: fields[key] for key in keys}
    listed = ", ".join(f"{key} {value}" for key, value in chosen.items())
    text, _ = ask(
        rng,
        (
            "Give me a JSON object with {x}.",
            "Write a JSON object with {x}.",
            "Make JSON from this: {x}.",
            "As JSON: {x}.",
            "Turn this into JSON: {x}.",
            "Return a JSON object with the fields {x}.",
        ),
        x=listed,
    )
    return Turn("json", text, json.dumps(chosen, ensure_ascii=False), keep_case=True)


# what is told -> (ways to tell it, acknowledgement, ways to ask for it, answer, where the value comes from)
_MEMORIES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], str]] = {
    "name": (
        (
            "My name is {x}.",
            "I am {x}.",
            "Hi, I'm {x}.",
            "Hello, my name is {x}.",
            "Call me {x}.",
            "People call me {x}.",
            "You can call me {x}.",
        ),
        "Hello, {x}! How can I help you?",
        (
            "What is my name?",
            "Do you remember my name?",
            "Who am I?",
            "What's my name?",
            "How am I called?",
            "Tell me my name.",
            "Can you say my name?",
        ),
        "Your name is {x}.",
    ),
    "city": (
        ("I live in {x}.", "My home is in {x}.", "My city is {x}.", "I come from {x}.", "I am from {x}."),
        "{x} sounds nice. I will remember it.",
        (
            "Where do I live?",
            "Which city am I from?",
            "In which city do I live?",
            "Where am I from?",
            "What city do I come from?",
            "Where is my home?",
        ),
        "You live in {x}.",
    ),
    "pet": (
        ("I have a {x}.", "My pet is a {x}.", "At home I have a {x}.", "I own a {x}.", "There is a {x} at my home."),
        "Your {x} must be lovely.",
        (
            "What pet do I have?",
            "Which pet do I have?",
            "Which animal do I have?",
            "What is my pet?",
            "Do you remember my pet?",
            "What animal lives with me?",
        ),
        "You have a {x}.",
    ),
    "color": (
        (
            "My favorite color is {x}.",
            "I like the color {x} best.",
            "The color I love is {x}.",
            "{x} is my favorite color.",
        ),
        "I like {x} too.",
        (
            "What is my favorite color?",
            "Which color do I like best?",
            "What color do I love?",
            "Do you remember my favorite color?",
            "Tell me my favorite color.",
        ),
        "Your favorite color is {x}.",
    ),
    "number": (
        (
            "My lucky number is {x}.",
            "Remember the number {x}.",
            "The secret number is {x}.",
            "Please remember this number: {x}.",
        ),
        "I will remember the number {x}.",
        (
            "What was the number?",
            "Which number did I tell you?",
            "What number did I tell you?",
            "Do you remember the number?",
            "Tell me the number again.",
        ),
        "The number is {x}.",
    ),
    "word": (
        (
            "The secret word is {x}.",
            "Remember the word {x}.",
            "The password is {x}.",
            "Please remember this word: {x}.",
        ),
        "I will remember the word {x}.",
        (
            "What was the word?",
            "Which word did I tell you?",
            "What is the secret word?",
            "Do you remember the word?",
            "Tell me the word again.",
        ),
        "The word is {x}.",
    ),
}
MEMORY_KINDS = tuple(_MEMORIES)


def recall(rng: random.Random, what: str | None = None) -> Turn:
    """A fact that the user told, asked for in a later turn (or, one time in four, at once)."""
    what = what or rng.choice(MEMORY_KINDS)
    tellings, reply, questions, answer = _MEMORIES[what]
    value = {
        "name": lambda: any_name(rng),
        "city": lambda: any_city(rng),
        "pet": lambda: rng.choice([row[0] for row in facts.ANIMALS if row[0][0] not in "aeiou"]),
        "color": lambda: rng.choice(facts.GROUPS["colors"]),
        "number": lambda: str(rng.randint(0, 9999)),
        "word": lambda: made_up(rng).lower() if rng.random() < 0.6 else rng.choice(facts.SPELLING),
    }[what]()
    telling = rng.choice(tellings).format(x=value)
    telling = cap(telling)
    question = rng.choice(questions)
    if rng.random() < 0.25:
        text = f"{telling} {question}"
        return Turn("recall", text, answer.format(x=value), short=cap(value), keep_case=True)
    first = Turn("recall", telling, cap(reply.format(x=value)), keep_case=True)
    return Turn(
        "recall",
        question,
        answer.format(x=value),
        short=cap(value),
        keep_case=True,
        key=f"{telling} / {question}",
        before=[first],
        distance=True,
    )


def not_told(rng: random.Random) -> Turn:
    """A question for something that the user has never told: only for conversations of one turn."""
    _, _, asking, _ = _MEMORIES[rng.choice(MEMORY_KINDS)]
    return Turn("not told", rng.choice(asking), "I do not know. You have not told me.", plain=True)


def follow_up(rng: random.Random) -> Turn:
    """A question that leaves out what the one before it said: "And of Spain?"."""
    topic = rng.choice(("capital", "color", "opposite", "plural"))
    if topic == "capital":
        (left, city_left, _), (right, city_right, _) = rng.sample(facts.COUNTRIES, 2)
        first = Turn("capital", f"What is the capital of {left}?", f"The capital of {left} is {city_left}.")
        answer = f"The capital of {right} is {city_right}."
    elif topic == "color":
        (left, shade_left), (right, shade_right) = rng.sample(facts.COLORS, 2)
        first = Turn("color", f"What color is {left}?", f"{cap(left)} is {shade_left}.")
        answer = f"{cap(right)} is {shade_right}."
    elif topic == "opposite":
        (left, other_left), (right, other_right) = rng.sample(facts.OPPOSITES, 2)
        first = Turn("opposite", f"What is the opposite of {left}?", f"The opposite of {left} is {other_left}.")
        answer = f"The opposite of {right} is {other_right}."
    else:
        (left, form_left), (right, form_right) = rng.sample(facts.PLURALS, 2)
        first = Turn("word form", f"What is the plural of {left}?", f"The plural of {left} is {form_left}.")
        answer = f"The plural of {right} is {form_right}."
    text, _ = ask(
        rng,
        (
            "And {x}?",
            "And what about {x}?",
            "What about {x}?",
            "And for {x}?",
            "Now {x}.",
            "Same for {x}, please.",
            "And how about {x}?",
        ),
        x=right,
    )
    return Turn("follow-up", text, answer, key=f"{topic}: {left} / {text}", before=[first])


ABOUT_ME = (
    (
        (
            "Who are you?",
            "What are you?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Who am I talking to?",
            "Can you introduce yourself?",
            "Describe yourself.",
        ),
        (
            "I am Tiny, the small language model bundled with mini-vLLM. I know a few simple things and I like to "
            "tell stories."
        ),
    ),
    (
        ("What is your name?", "What's your name?", "Do you have a name?", "How are you called?", "Tell me your name."),
        "My name is Tiny.",
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "What can I ask you?",
            "Help!",
            "What are you good at?",
        ),
        "I can answer simple questions, do small sums, call tools, and tell short stories.",
    ),
    (
        ("How big are you?", "How many parameters do you have?", "How large are you?", "Are you a big model?"),
        "I am very small: I have fewer than four million parameters.",
    ),
    (
        ("Who made you?", "Where do you come from?", "Who trained you?", "How were you made?"),
        "I was trained from scratch by a script of the mini-vLLM repository, on text that the script makes.",
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?"),
        "I am fine, thank you! How can I help you?",
    ),
    (
        (
            "What is mini-vLLM?",
            "What's mini-vLLM?",
            "Tell me about mini-vLLM.",
            "Do you know mini-vLLM?",
            "Explain mini-vLLM.",
        ),
        "mini-vLLM is a small and fast engine that serves language models. I am the model that comes with it.",
    ),
    (
        ("Are you ChatGPT?", "Are you a human?", "Are you a robot?", "Are you a real person?", "Are you Qwen?"),
        "No, I am Tiny, a small language model.",
    ),
    (
        ("Are you sure?", "Is that true?", "Really?", "Are you certain?", "Is that right?", "Can I trust you?"),
        "I think so, but I am only a tiny model and can be wrong.",
    ),
)


def about_me(rng: random.Random) -> Turn:
    questions, answer = rng.choice(ABOUT_ME)
    opening = rng.choice(("", "", "Hello! ", "Hi. ", "Hey! ", "Good morning. ", "Welcome! ", "Nice to meet you. "))
    index = rng.randrange(len(questions))
    return Turn("about me", opening + questions[index], answer, plain=not opening, keep_case=index == 0)


def greeting(rng: random.Random) -> Turn:
    hello = rng.choice(
        (
            "Hello",
            "Hi",
            "Hey",
            "Good morning",
            "Good evening",
            "Good afternoon",
            "Hello there",
            "Hi there",
            "Greetings",
            "Hi Tiny",
            "Hello Tiny",
        )
    )
    end = rng.choice(("!", ".", "", "! 🙂"))
    draw = rng.random()
    if draw < 0.4:
        return Turn("greeting", hello + end, "Hello! How can I help you?", plain=True)
    if draw < 0.8:
        name = any_name(rng)
        tail = rng.choice(("I am {n}.", "My name is {n}.", "I'm {n}.", "This is {n}.", "{n} here.")).format(n=name)
        return Turn("greeting", f"{hello}{end if end in ('!', '.') else '!'} {tail}", _said(name), keep_case=True)
    thanks = rng.choice(("Thank you", "Thanks", "Thanks a lot", "Many thanks", "Thank you very much", "Thx"))
    if draw < 0.83:
        good = rng.choice(("OK", "Great", "Cool", "Nice", "Good", "Well done", "Perfect", "Very good", "Wow"))
        return Turn("greeting", good + end, "I am glad to hear that.", plain=True)
    if draw < 0.92:
        return Turn("greeting", thanks + end, "You are welcome!", plain=True)
    bye = rng.choice(("Goodbye", "Bye", "See you", "Good night", "Bye bye", "See you later", "Farewell"))
    return Turn("greeting", bye + end, "Goodbye! See you soon. 🙂", plain=True)


_JOKES = (
    "Why did the bee get married? Because it found its honey!",
    "What do you call a bear with no teeth? A gummy bear!",
    "Why was the math book sad? It had too many problems!",
    "What do you call a sleeping dinosaur? A dino-snore!",
    "Why did the clock go to school? To learn how to tell the time!",
    "What is a cat's favorite color? Purrple!",
    "Why can a tree never leave? Because it would have to bring its trunk!",
    "What did the sea say to the beach? Nothing, it just waved!",
    "Why did the token cross the road? It was next in the sequence!",
    "How does the moon cut its hair? Eclipse it!",
)


def joke(rng: random.Random) -> Turn:
    text, _ = ask(
        rng,
        (
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Say something funny.",
            "Can you tell me a joke?",
            "I want to hear a joke.",
            "Another joke, please.",
            "Tell me something funny.",
        ),
    )
    return Turn("joke", text, rng.choice(_JOKES), check="contains", need=("!",), plain=True)


_RHYMES = (
    ("The {x} is quiet, the night is deep,", "The stars are awake while the children sleep."),
    ("I saw a {x} in the morning light,", "It danced all day and it dreamed all night."),
    ("Oh little {x}, so far away,", "Come here to us and stay all day."),
    ("A {x} and a song, a song and a tune,", "They travel together from here to the moon."),
    ("The wind tells the {x} of lands unknown,", "Of rivers of silver and hills of stone."),
    ("Soft as a feather, bright as a flame,", "The {x} has no riches and asks for no fame."),
    ("When winter is over and spring is near,", "The {x} will sing so that all can hear."),
    ("Under the bridge and over the hill,", "The {x} keeps going and never is still."),
)


_NOUNS = [*stories.THINGS, *stories.PLACES, *(kind.noun for kind in stories.HEROES), "moon", "sea", "rain", "sun"]
_SENTENCES = (
    "The {x} is waiting for the spring.",
    "A {x} can make a long day short.",
    "Nobody had seen a {x} like that before.",
    "In the evening the {x} looks bigger than it is.",
    "My friend once drew a {x} on the wall.",
    "There was a {x} behind the old house.",
    "I would like to see a {x} one day.",
)


def sentence(rng: random.Random) -> Turn:
    thing = rng.choice(_NOUNS)
    text, plain = ask(
        rng,
        (
            "Write a sentence about {x}.",
            "Write one sentence about {x}.",
            "Make a sentence with {x}.",
            "Give me a sentence about {x}.",
            "Tell me a sentence with {x} in it.",
            "Say something about {x}.",
            "I need a sentence about {x}.",
        ),
        x=stories.with_article(thing),
    )
    return Turn("sentence", text, rng.choice(_SENTENCES).format(x=thing), check="contains", need=(thing,), plain=plain)


def about(rng: random.Random) -> Turn:
    """All that is known of a country, a capital or an animal."""
    draw = rng.random()
    country, city, place = rng.choice(facts.COUNTRIES)
    name, _, legs, _, kind, home = rng.choice(facts.ANIMALS)
    if draw < 0.4:
        what, answer = country, f"{cap(country)} is in {place}, and its capital is {city}."
    elif draw < 0.7:
        what, answer = city, f"{city} is the capital of {country}."
    else:
        what = stories.with_article(name)
        answer = f"{cap(what)} is {stories.with_article(kind)}. It has {legs} legs and lives {home}."
    text, plain = ask(
        rng,
        (
            "Tell me about {x}.",
            "What do you know about {x}?",
            "Tell me something about {x}.",
            "What can you tell me about {x}?",
            "Give me a fact about {x}.",
            "Do you know anything about {x}?",
            "I want to learn about {x}.",
        ),
        x=what,
    )
    return Turn("about", text, answer, plain=plain)


_HAIKU = (
    ("A {x} at dawn.", "The {x}, once more.", "Look, a small {x}.", "Here is a {x}.", "A {x} in spring."),
    (
        "The wind has nothing to say.",
        "Cold rain falls on the gray stones.",
        "A bird sings and flies away.",
        "Slow clouds are passing above.",
        "The old pond does not answer.",
    ),
    (
        "Then all is quiet.",
        "Night comes on soft feet.",
        "The moon smiles at us.",
        "Summer is over.",
        "I breathe and go on.",
    ),
)


def poem(rng: random.Random) -> Turn:
    thing = rng.choice(_NOUNS)
    if rng.random() < 0.25:
        text, plain = ask(
            rng,
            (
                "Write a haiku about {x}.",
                "A haiku about {x}, please.",
                "Tell me a haiku about {x}.",
                "Can you write a haiku about {x}?",
                "Make a haiku about {x}.",
            ),
            x=rng.choice((stories.with_article(thing), f"the {thing}")),
        )
        haiku = "\n".join(rng.choice(lines).format(x=thing) for lines in _HAIKU)
        return Turn("poem", text, haiku, check="contains", need=(thing, "\n"), plain=plain)
    text, plain = ask(
        rng,
        (
            "Write a poem about {x}.",
            "Write a short poem about {x}.",
            "Tell me a poem about {x}.",
            "A poem about {x}, please.",
            "Can you write a poem about {x}?",
            "Make a little poem about {x}.",
            "I want a poem about {x}.",
        ),
        x=rng.choice((stories.with_article(thing), f"the {thing}")),
    )
    lines = [line.format(x=thing) for couplet in rng.sample(_RHYMES, 2) for line in couplet]
    return Turn("poem", text, "\n".join(lines), check="contains", need=(thing, "\n"), plain=plain)


def story(rng: random.Random) -> Turn:
    draw = rng.random()
    long = draw < 0.1
    kind = "long story" if long else rng.choice(("story", "short story", "tale", "fairy tale"))
    name = any_name(rng) if rng.random() < 0.25 else None
    subject = stories.draw_subject(rng, name)
    hero, second = subject.hero.phrase, stories.with_article(subject.second)
    about: tuple[str, ...]
    need: tuple[str, ...]
    if name:
        about, need = ("{h} named {n}", "{h} called {n}", "{h} with the name {n}"), (subject.hero.noun, name)
    elif draw < 0.75:
        about, need = ("{h} and {s}",), (subject.hero.noun, subject.second)
    elif draw < 0.95:
        if rng.random() < 0.5:
            about, need = ("{h}",), (subject.hero.noun,)
        else:
            about, need = ("{s}",), (subject.second,)
    else:
        text = rng.choice(("Tell me a {k}.", "Do you know a {k}?", "I want to hear a {k}.", "A {k}, please."))
        return Turn("story", text.format(k=kind), stories.tell(rng, subject, long), check="story", plain=True)
    text, plain = ask(
        rng,
        (
            "Tell me a {k} about {x}.",
            "Write a {k} about {x}.",
            "Can you tell me a {k} about {x}?",
            "I want to hear a {k} about {x}.",
            "Tell a {k} with {x} in it.",
            "Make up a {k} about {x}.",
            "Please write me a {k} about {x}.",
            "A {k} about {x}, please.",
            "Do you know a {k} about {x}?",
        ),
        k=kind,
        x=rng.choice(about).format(h=hero, s=second, n=name),
    )
    return Turn(
        "story", text, stories.tell(rng, subject, long), check="story", need=need, plain=plain, keep_case=bool(name)
    )


_UNKNOWN = (
    "Who wrote {w}?",
    "Who is the president of {c}?",
    "How tall is {n}?",
    "When was {n} born?",
    "What is {w}?",
    "How far is it from {c} to {d}?",
    "Who won the game yesterday?",
    "What is the meaning of life?",
    "Write a program that sorts a list.",
    "Explain quantum physics.",
    "What did {n} do last year?",
    "How do I fix my computer?",
    "What is the square root of {k}?",
    "Who invented the telephone?",
    "How old is the universe?",
    "What is the capital of {w}?",
    "Where is {w}?",
    "What language do they speak in {w}?",
    "Who was {n} {w}?",
    "Write a Python function for {w}.",
    "What are the laws of {w}?",
    "How do you cook {w}?",
    "What is the best {w} in {c}?",
    "Can you explain {w} to me?",
    "What happened in the year {y}?",
    "Who painted {w}?",
    "How much does a {w} cost?",
    "How does a {w} work?",
    "What is the history of {c}?",
    "Summarize the book {w}.",
    "Why is {n} famous?",
    "Give me the news of today.",
    "What day is it today?",
    "What is the date?",
    "Why is the sky blue?",
    "Explain gravity.",
    "What is {w} {n}?",
    "Fix my code.",
    "Why do {w} people {w}?",
    "When did {n} leave {c}?",
    "Is {n} older than {w}?",
    "Compare {c} and {d}.",
)
UNKNOWN_ANSWER = "I do not know that. I am only a tiny model."


def unknown(rng: random.Random) -> Turn:
    index = rng.randrange(len(_UNKNOWN))
    text = _UNKNOWN[index].format(
        w=made_up(rng),
        c=any_city(rng),
        d=any_city(rng),
        n=any_name(rng),
        k=rng.randint(1000, 9999),
        y=rng.randint(1000, 2000),
    )
    return Turn("unknown", text, UNKNOWN_ANSWER, plain="{" not in _UNKNOWN[index], keep_case=True)


# category -> (maker, weight in training)
MAKERS: dict[str, tuple[Callable[[random.Random], Turn], float]] = {
    "capital": (capital, 6),
    "capital check": (capital_check, 3),
    "continent": (continent, 2),
    "color": (color, 3),
    "opposite": (opposite, 3.5),
    "animal": (animal, 5),
    "order": (order, 4),
    "days later": (days_later, 3),
    "word form": (word_form, 4),
    "arithmetic": (arithmetic, 8),
    "word problem": (word_problem, 5),
    "compare": (compare, 3.5),
    "sort": (sort_numbers, 3),
    "spelling": (spelling, 3.5),
    "count letters": (count_letters, 3.5),
    "counting": (counting, 3),
    "lists": (name_some, 3.5),
    "whole lists": (whole_list, 1.5),
    "definition": (definition, 3),
    "translation": (translation, 4.5),
    "emoji": (emoji, 2),
    "repeat": (repeat, 4),
    "json": (make_json, 3),
    "sentence": (sentence, 1.5),
    "about": (about, 2.5),
    "recall": (recall, 7),
    "follow-up": (follow_up, 4),
    "about me": (about_me, 2),
    "greeting": (greeting, 2.5),
    "joke": (joke, 0.7),
    "poem": (poem, 1.5),
    "story": (story, 8),
    "unknown": (unknown, 3),
}
