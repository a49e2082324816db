"""A grammar of short fairy stories: a hero, a place, a thing or a friend, a trouble and its end.

Every call of `tell` draws its sentences anew, so that a model trained on them learns the way such stories go
rather than one story by heart.
"""

import random
from dataclasses import dataclass

from bundled.facts import NAMES, WOMEN


@dataclass(frozen=True)
class Kind:
    """What a hero or friend is: the noun with its article, and words that suit it."""

    noun: str
    adjectives: tuple[str, ...]

    @property
    def phrase(self) -> str:
        return with_article(self.noun)


def with_article(noun: str) -> str:
    """`fox` -> `a fox`, `owl` -> `an owl`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


_ANIMAL_ADJECTIVES = ("small", "brave", "young", "clever", "gentle", "curious", "shy", "kind", "lonely", "merry")
HEROES = [
    Kind(noun, _ANIMAL_ADJECTIVES)
    for noun in (
        "fox",
        "rabbit",
        "bear",
        "owl",
        "mouse",
        "frog",
        "cat",
        "dog",
        "wolf",
        "lion",
        "duck",
        "hedgehog",
        "squirrel",
        "turtle",
        "goat",
        "horse",
        "penguin",
        "elephant",
        "bee",
        "crow",
        "dragon",
        "robot",
        "king",
        "queen",
        "princess",
        "prince",
        "farmer",
        "baker",
        "sailor",
        "wizard",
        "girl",
        "boy",
        "giant",
        "painter",
        "shepherd",
    )
]

_LADIES = ("queen", "princess", "girl")
_MEN = ("king", "prince", "boy")

# place -> how it looks
PLACES: dict[str, tuple[str, ...]] = {
    "river": ("wide", "cold", "silver"),
    "forest": ("dark", "deep", "old"),
    "mountain": ("high", "snowy", "steep"),
    "castle": ("gray", "lonely", "great"),
    "lake": ("still", "blue", "round"),
    "village": ("quiet", "little", "old"),
    "island": ("green", "far", "sunny"),
    "garden": ("secret", "lovely", "wild"),
    "cave": ("dark", "deep", "cold"),
    "bridge": ("narrow", "wooden", "old"),
    "lighthouse": ("white", "tall", "lonely"),
    "meadow": ("green", "soft", "wide"),
    "tower": ("tall", "crooked", "stone"),
    "market": ("busy", "loud", "bright"),
    "café": ("little", "warm", "cosy"),
    "library": ("dusty", "great", "quiet"),
    "mill": ("old", "creaky", "small"),
    "harbor": ("busy", "foggy", "small"),
    "desert": ("hot", "wide", "golden"),
    "beach": ("sandy", "long", "windy"),
}
THINGS: dict[str, tuple[str, ...]] = {
    "lantern": ("golden", "little", "bright"),
    "key": ("silver", "rusty", "tiny"),
    "map": ("old", "torn", "strange"),
    "bell": ("brass", "small", "shiny"),
    "book": ("thick", "magic", "dusty"),
    "ring": ("golden", "magic", "lost"),
    "boat": ("small", "wooden", "red"),
    "drum": ("big", "old", "painted"),
    "kite": ("red", "paper", "bright"),
    "star": ("fallen", "tiny", "bright"),
    "clock": ("old", "broken", "tall"),
    "seed": ("tiny", "strange", "golden"),
    "flute": ("wooden", "silver", "old"),
    "crown": ("golden", "lost", "heavy"),
    "hat": ("tall", "green", "funny"),
    "cake": ("sweet", "huge", "round"),
    "letter": ("secret", "blue", "lost"),
    "egg": ("blue", "huge", "spotted"),
    "mirror": ("magic", "round", "old"),
    "umbrella": ("yellow", "big", "old"),
}

_HOBBIES = (
    "sing songs",
    "count the stars",
    "walk in the sun",
    "dance in the rain",
    "tell jokes",
    "watch the clouds",
    "collect shiny stones",
    "dream of far lands",
    "climb high hills",
    "play with the wind",
)
_OPENINGS = (
    "Once upon a time, there was {akind} named {N}.",
    "Once upon a time, {akind} named {N} lived in a little house by the road.",
    "Long ago, in a land far away, there lived {akind} called {N}.",
    "In a quiet valley there lived {akind}, and {his} name was {N}.",
    "There once was {akind} called {N}, who had a good heart.",
    "Many years ago, when the world was young, {akind} named {N} lived under a big tree.",
)
_HABITS = (
    "Every morning {N} liked to {hobby}.",
    "More than anything, {N} loved to {hobby}.",
    "{He} liked to {hobby}, and {he} did so every day.",
    "All day long {he} would {hobby}, and at night {he} slept well.",
    "{N} had no riches, but {he} knew how to {hobby}.",
)
_PLACE_MEETINGS = (
    "Near the house there was {aplace}, and nobody dared to go there.",
    "One day {N} came to {aplace}.",
    "One bright morning {N} set out to see {aplace}.",
    "Not far away there was {aplace}, and {N} often looked at it.",
    "A bird told {N} about {aplace} where the wind sings.",
)
_PLACE_TROUBLES = (
    "But a great storm came, and the path to the {place} was gone.",
    "But the {place} was far bigger than {N} had thought, and soon {he} was lost.",
    "When night fell over the {place}, {N} could not find the way home.",
    "But at the {place} {he} heard somebody crying.",
    "But the people said that no one ever came back from the {place}.",
)
_PLACE_DEEDS = (
    "So {N} walked around the {place}, step by step, and was not afraid.",
    "So {N} went back to the {place} with a light, and there {he} saw a tiny door.",
    "{N} took a deep breath and went straight to the {place}.",
    "So {N} sat down by the {place} and sang until the moon came up.",
    "With a rope and a smile, {N} found a safe way to the {place}.",
)
_PLACE_ENDS = (
    "At last {N} saw the whole {place} shining in the sun.",
    "In the end the {place} became the place that {N} loved most.",
    "There, by the {place}, {N} found new friends and a warm fire.",
    "After that, everyone could visit the {place} without fear.",
)
_THING_MEETINGS = (
    "One day {N} found {athing} under a stone.",
    "One evening an old woman gave {N} {athing}.",
    "One morning {athing} lay in front of the door.",
    "On the way home {N} saw {athing} in the grass.",
    "In the attic {N} discovered {athing} that nobody had seen for years.",
)
_THING_TROUBLES = (
    "But in the night the {thing} was gone.",
    "But a greedy crow took the {thing} and flew away.",
    "But nobody knew what the {thing} was for.",
    "But the {thing} was so precious that everyone began to quarrel about it.",
    "But the {thing} did not work, and {N} did not know why.",
)
_THING_DEEDS = (
    "So {N} looked for the {thing} in every corner of the land.",
    "So {N} asked everyone {he} met about the {thing}.",
    "So {N} cleaned the {thing} with care and held it up to the sun.",
    "{N} thought about the {thing} all night, and in the morning {he} had a plan.",
    "Then {N} put the {thing} on a table for all to see.",
)
_THING_ENDS = (
    "At last the {thing} began to shine, and everybody cheered.",
    "In the end {N} had the {thing} back, and {he} shared it with everyone.",
    "From then on the {thing} brought luck to the whole village.",
    "So the {thing} found its home, and {N} was proud.",
)
_FRIEND_MEETINGS = (
    "One day {N} met {afriend} named {F}.",
    "One morning {afriend} called {F} knocked at the door.",
    "On the road {N} saw {afriend} who was called {F}.",
    "Next door lived {afriend} named {F}, but the two had never talked.",
    "One rainy day {N} shared a dry spot with {afriend} named {F}.",
)
_FRIEND_TROUBLES = (
    "But {F} was sad, because all the food was gone.",
    "But {F} the {friend} had lost the way home.",
    "But {N} and {F} could not agree on anything.",
    "But soon {F} fell into a deep hole and could not get out.",
    "But winter came early, and the {friend} had no place to sleep.",
)
_FRIEND_DEEDS = (
    "So {N} gave half of everything to {F}.",
    "So {N} took a long rope and helped the {friend}.",
    "So {N} and {F} sat down and made a plan together.",
    '{N} said to the {friend}, "Do not worry, I will help you."',
    "Together {N} and {F} walked all night under the stars.",
)
_FRIEND_ENDS = (
    "After that, {N} and {F} were the best of friends.",
    "In the end {F} laughed again, and {N} laughed too.",
    "Since that day nobody has seen {N} without {F}.",
    "And the {friend} never forgot what {N} had done.",
)
_HELPERS = ("snail", "raven", "toad", "beaver", "badger", "stork", "miller", "grandmother", "fisherman", "moth")
_ADVICE = (
    "Slow steps are steps too",
    "Listen to the wind",
    "Look with your heart",
    "Ask, and you will learn",
    "Nobody has to be brave alone",
    "The smallest light is still a light",
    "Try once more",
)
_HELPS = (
    'Then an old {helper} came by and said, "{advice}."',
    '"{advice}," said an old {helper} who was sitting nearby.',
    'At that moment {ahelper} looked up and said, "{advice}."',
    'A wise {helper} heard about it and said, "{advice}."',
)
_TRIES = (
    "{N} tried and tried, but nothing helped.",
    "{He} sat down and thought for a long time.",
    "First {he} cried a little, and then {he} dried {his} tears.",
    "{N} asked the clouds and the trees, but they were silent.",
    "For three days {he} could not sleep.",
    "",
)
_CLOSINGS = (
    "And they all lived happily ever after.",
    "That night {N} slept well and smiled in {his} dreams.",
    "And if you listen closely, you can still hear {N} laugh.",
    "{N} had learned that a kind heart is worth more than gold.",
    "And so the day ended, quiet and warm.",
    "From that day on, {N} was never lonely again.",
)


@dataclass(frozen=True)
class Subject:
    """What a story is asked to be about: the hero's kind and perhaps a second noun."""

    hero: Kind
    second: str
    name: str


def fits(hero: Kind, name: str) -> bool:
    """Whether a name suits a hero: a queen is no Boris. Names made up for the occasion suit everyone."""
    if name not in NAMES:
        return True
    return hero.noun not in (_MEN if name in WOMEN else _LADIES)


def draw_subject(rng: random.Random, name: str | None = None) -> Subject:
    """Draw a hero, and a second noun that is not the hero."""
    name = name or rng.choice(NAMES)
    hero = rng.choice([kind for kind in HEROES if fits(kind, name)])
    friends = [kind.noun for kind in HEROES if kind is not hero]
    second = rng.choice((rng.choice(list(PLACES)), rng.choice(list(THINGS)), rng.choice(friends)))
    return Subject(hero, second, name)


def _episode(rng: random.Random, noun: str, slots: dict[str, str]) -> list[str]:
    """Meeting, trouble, perhaps a try, help, deed and end of one adventure with `noun`."""
    if noun in PLACES:
        groups = (_PLACE_MEETINGS, _PLACE_TROUBLES, _TRIES, _HELPS, _PLACE_DEEDS, _PLACE_ENDS)
        slots |= {"place": noun, "aplace": with_article(f"{rng.choice(PLACES[noun])} {noun}")}
    elif noun in THINGS:
        groups = (_THING_MEETINGS, _THING_TROUBLES, _TRIES, _HELPS, _THING_DEEDS, _THING_ENDS)
        slots |= {"thing": noun, "athing": with_article(f"{rng.choice(THINGS[noun])} {noun}")}
    else:
        groups = (_FRIEND_MEETINGS, _FRIEND_TROUBLES, _TRIES, _HELPS, _FRIEND_DEEDS, _FRIEND_ENDS)
        friend = next(kind for kind in HEROES if kind.noun == noun)
        name = rng.choice([name for name in NAMES if name != slots["N"] and fits(friend, name)])
        slots |= {"friend": noun, "F": name, "afriend": with_article(f"{rng.choice(friend.adjectives)} {noun}")}
    helper = rng.choice(_HELPERS)
    slots |= {"helper": helper, "ahelper": with_article(helper), "advice": rng.choice(_ADVICE)}
    return [rng.choice(group).format(**slots) for group in groups]


def tell(rng: random.Random, subject: Subject, long: bool = False) -> str:
    """Tell a story of about 70 to 120 words, or, when `long`, one of two adventures and about twice that."""
    he, his = ("she", "her") if subject.name in WOMEN else ("he", "his")
    if subject.hero.noun in _LADIES:
        he, his = "she", "her"
    slots = {
        "N": subject.name,
        "he": he,
        "He": he.capitalize(),
        "his": his,
        "hobby": rng.choice(_HOBBIES),
        "akind": with_article(f"{rng.choice(subject.hero.adjectives)} {subject.hero.noun}"),
    }
    sentences = [rng.choice(_OPENINGS).format(**slots), rng.choice(_HABITS).format(**slots)]
    sentences += _episode(rng, subject.second, slots)
    if long:
        more = rng.choice([noun for noun in (*PLACES, *THINGS) if noun != subject.second])
        sentences.append(rng.choice(("But that was not all.", "Then came the spring.", "Some time passed.")))
        sentences += _episode(rng, more, slots)
    sentences.append(rng.choice(_CLOSINGS).format(**slots))
    if rng.random() < 0.3:
        sentences.append("The end.")
    paragraphs = (
        [" ".join(sentence for sentence in part if sentence) for part in (sentences[:4], sentences[4:])]
        if rng.random() < 0.3
        else [" ".join(sentence for sentence in sentences if sentence)]
    )
    return "\n\n".join(paragraphs)
