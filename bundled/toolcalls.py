"""The makers of tool dialogues: function schemas, requests that need them, and what is said of the results.

Names of functions and of their parameters vary, so that a caller's own schema is read rather than guessed.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from bundled import facts
from bundled.turns import Turn, any_city, any_name, cap, made_up

Schema = dict[str, Any]
Call = tuple[str, dict[str, Any]]


class Tool:
    """One function as a caller offers it: its kind, its name, and the caller's names for its parameters."""

    def __init__(self, kind: str, name: str, parameters: list[str], schema: Schema) -> None:
        self.kind, self.name, self.parameters, self.schema = kind, name, parameters, schema

    def call(self, *values: Any) -> Call:
        return self.name, dict(zip(self.parameters, values, strict=False))


# kind -> (names, parameters as (possible names, type, possible descriptions), possible descriptions)
_KINDS: dict[str, tuple[list[str], list[tuple[list[str], str, list[str]]], list[str]]] = {
    "weather": (
        ["get_weather", "get_current_weather", "weather", "lookup_weather", "weather_now", "fetch_weather"],
        [
            (
                ["city", "location", "place", "town"],
                "string",
                ["The city.", "Name of the city", "The place to look at", "The city, e.g. Oslo", "City name"],
            )
        ],
        [
            "Get the weather in a city.",
            "Get the current weather",
            "Tells the weather of a place.",
            "Get the current weather in a given location",
            "Look up the weather now.",
            "Weather for a city",
        ],
    ),
    "time": (
        ["get_time", "get_current_time", "current_time", "clock", "time_in", "local_time"],
        [
            (
                ["city", "location", "place", "town"],
                "string",
                ["The city.", "Name of the city", "Where to look at the clock", "City name"],
            )
        ],
        [
            "Get the time in a city.",
            "Get the current time",
            "Tells the local time of a place.",
            "What time it is in a city",
        ],
    ),
    "population": (
        ["get_population", "population", "count_people", "lookup_population"],
        [(["city", "place", "location"], "string", ["The city.", "Name of the city", "City name"])],
        ["Get the number of people in a city.", "Population of a city", "How many people live there."],
    ),
    "add": (
        ["add", "add_numbers", "sum", "plus"],
        [
            (["a", "x", "first", "left"], "number", ["The first number.", "First number", "A number"]),
            (["b", "y", "second", "right"], "number", ["The second number.", "Second number", "Another number"]),
        ],
        ["Add two numbers.", "Adds numbers", "Returns the sum of two numbers."],
    ),
    "multiply": (
        ["multiply", "multiply_numbers", "product", "times"],
        [
            (["a", "x", "first", "left"], "number", ["The first number.", "First number", "A number"]),
            (["b", "y", "second", "right"], "number", ["The second number.", "Second number"]),
        ],
        ["Multiply two numbers.", "Multiplies numbers", "Returns the product of two numbers."],
    ),
    "search": (
        ["search", "web_search", "search_web", "find", "lookup"],
        [
            (
                ["query", "q", "text", "question"],
                "string",
                ["What to search for.", "The search query", "Words to look up"],
            )
        ],
        ["Search the web.", "Search for a query", "Find pages about something.", "Look something up."],
    ),
    "message": (
        ["send_message", "send_text", "message", "write_message"],
        [
            (["to", "name", "recipient", "person"], "string", ["Who gets it.", "The recipient", "A name"]),
            (["text", "message", "body", "content"], "string", ["The message.", "Text to send", "What to say"]),
        ],
        ["Send a message to a person.", "Sends a text message", "Write to somebody."],
    ),
    "timer": (
        ["set_timer", "start_timer", "timer", "create_timer"],
        [(["minutes", "duration", "length"], "integer", ["Minutes.", "How many minutes", "Length in minutes"])],
        ["Set a timer.", "Start a timer for some minutes", "Counts down minutes."],
    ),
    "stock": (
        ["get_stock_price", "stock_price", "get_price", "quote"],
        [(["symbol", "ticker", "name"], "string", ["The symbol.", "Ticker symbol", "Symbol of the stock"])],
        ["Get the price of a stock.", "Current stock price", "Looks up a share price."],
    ),
}
# Any other property that a function may look up: its name is part of the function's.
_PROPERTIES = (
    "temperature",
    "humidity",
    "height",
    "address",
    "rating",
    "score",
    "size",
    "speed",
    "status",
    "balance",
    "owner",
    "age",
    "weight",
    "distance",
    "phone number",
    "opening hours",
    "currency",
    "language",
    "mayor",
    "elevation",
    "zip code",
    "salary",
    "birthday",
    "title",
    "version",
    "length",
    "depth",
    "area",
    "color code",
    "exchange rate",
    "wind speed",
    "air quality",
    "menu",
    "rank",
    "email",
    "forecast",
    "traffic",
    "schedule",
)
_PROPERTY_PARAMETERS = (
    "name",
    "city",
    "item",
    "id",
    "place",
    "object",
    "key",
    "subject",
    "what",
    "city_name",
    "location",
    "x",
    "input",
    "person",
    "target",
)


def make_tool(rng: random.Random, kind: str) -> Tool:
    """Offer a kind of function under one of its names, with parameters and descriptions drawn likewise."""
    if kind.startswith("property "):
        what = kind.removeprefix("property ")
        stem = what.replace(" ", "_")
        names = [f"get_{stem}", f"lookup_{stem}", f"find_{stem}", f"{stem}_of", stem, f"fetch_{stem}", f"read_{stem}"]
        specs = [(list(_PROPERTY_PARAMETERS), "string", ["What to look up.", f"Whose {what}", "The name", "Name"])]
        descriptions = [f"Get the {what} of something.", f"Looks up a {what}.", f"The {what}", "Look it up."]
    else:
        names, specs, descriptions = _KINDS[kind]
    properties: dict[str, Any] = {}
    chosen: list[str] = []
    pick = rng.randrange(3)  # names of a pair go together: a and b, x and y
    for options, type_, texts in specs:
        name = options[pick % len(options)] if len(specs) > 1 else rng.choice(options)
        chosen.append(name)
        properties[name] = {"type": type_}
        if rng.random() < 0.75:
            properties[name]["description"] = rng.choice(texts)
    required = list(chosen)
    if kind == "weather" and rng.random() < 0.25:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    parameters: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    if rng.random() < 0.15:
        parameters["additionalProperties"] = False
    if rng.random() < 0.1:
        del parameters["required"]
    function: dict[str, Any] = {"name": rng.choice(names)}
    if rng.random() < 0.9:
        function["description"] = rng.choice(descriptions)
    function["parameters"] = parameters
    return Tool(kind, function["name"], chosen, {"type": "function", "function": function})


def make_tools(rng: random.Random) -> list[Tool]:
    """One to five functions of different kinds, in any order, no two of one name."""
    pool = list(_KINDS) + [f"property {what}" for what in rng.sample(_PROPERTIES, 3)]
    kinds = rng.sample(pool, rng.choice((1, 1, 2, 2, 3, 4, 5)))
    tools = [make_tool(rng, kind) for kind in kinds]
    return list({tool.name: tool for tool in tools}.values())


_SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear")
_TOPICS_LEFT = ("old", "big", "happy", "cheap", "red", "wild", "famous", "small", "best", "new", "green", "fast")
_TOPICS_RIGHT = (
    "castles",
    "trains",
    "recipes",
    "books",
    "owls",
    "gardens",
    "songs",
    "stars",
    "boats",
    "stories",
    "bread",
    "hotels",
    "bridges",
    "language models",
    "cafés",
    "museums",
)
_MESSAGES = (
    "I will be late",
    "see you soon",
    "good luck",
    "the train is on time",
    "happy birthday",
    "call me back",
    "dinner is ready",
    "I am at home",
    "thank you for the cake",
    "we won",
    "let us meet at noon",
    "good night",
)


def _topic(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return f"{rng.choice(_TOPICS_LEFT)} {rng.choice(_TOPICS_RIGHT)}"
    if draw < 0.6:
        return f"{rng.choice(_TOPICS_RIGHT)} in {any_city(rng)}"
    return rng.choice((made_up(rng), f"{any_name(rng)} {made_up(rng)}", rng.choice(_TOPICS_RIGHT)))


# A request: what the user says, the values of the call, the tool's result, and the sentence made of it.
Request = tuple[str, tuple[Any, ...], str, str]


def _weather(rng: random.Random, city: str = "") -> Request:
    city, sky, degrees = city or any_city(rng), rng.choice(_SKIES), rng.randint(-9, 39)
    text = rng.choice(
        (
            "What is the weather in {c}?",
            "What's the weather like in {c}?",
            "How is the weather in {c}?",
            "Tell me the weather in {c}.",
            "Weather in {c}?",
            "Check the weather in {c}.",
            "What is the weather in {c} now?",
            "What's the weather in {c} today?",
            "I am going to {c}. What is the weather there?",
            "Is it cold in {c}?",
            "Will I need an umbrella in {c}?",
            "How warm is it in {c}?",
            "What is it like outside in {c}?",
        )
    ).format(c=city)
    result = rng.choice(
        (
            json.dumps({"temperature": degrees, "condition": sky}),
            json.dumps({"condition": sky, "temperature": degrees}),
            json.dumps({"city": city, "temperature": degrees, "condition": sky}, ensure_ascii=False),
            json.dumps({"temp": degrees, "sky": sky}),
            f"{sky}, {degrees} degrees",
            f"{degrees}°C, {sky}",
            json.dumps({"weather": sky, "temperature": degrees, "unit": "celsius"}),
        )
    )
    return text, (city,), result, f"In {city} it is {sky} and {degrees} degrees."


def _time(rng: random.Random, city: str = "") -> Request:
    city, clock = city or any_city(rng), f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    text = rng.choice(
        (
            "What time is it in {c}?",
            "What is the time in {c}?",
            "Tell me the time in {c}.",
            "What's the time in {c}?",
            "How late is it in {c}?",
            "Current time in {c}?",
            "What time is it now in {c}?",
            "Do you know what time it is in {c}?",
            "Check the time in {c}.",
        )
    ).format(c=city)
    result = rng.choice(
        (
            json.dumps({"time": clock}),
            clock,
            json.dumps({"local_time": clock}),
            json.dumps({"city": city, "time": clock}, ensure_ascii=False),
        )
    )
    return text, (city,), result, f"It is {clock} in {city}."


def _population(rng: random.Random, city: str = "") -> Request:
    city, people = city or any_city(rng), rng.randint(1, 999) * rng.choice((100, 1000, 10000))
    text = rng.choice(
        (
            "How many people live in {c}?",
            "What is the population of {c}?",
            "Population of {c}?",
            "How big is the population of {c}?",
            "Tell me the population of {c}.",
        )
    ).format(c=city)
    result = rng.choice((json.dumps({"population": people}), str(people), json.dumps({"people": people})))
    return text, (city,), result, f"{people} people live in {city}."


def _numbers(rng: random.Random) -> tuple[int, int]:
    top = rng.choice((20, 100, 1000))
    return rng.randint(0, top), rng.randint(0, top)


def _add(rng: random.Random) -> Request:
    left, right = _numbers(rng)
    text = rng.choice(
        (
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "What is {a} + {b}?",
            "What is the sum of {a} and {b}?",
            "Calculate {a} + {b}.",
            "How much is {a} plus {b}?",
            "{a} + {b} = ?",
            "Can you add {a} and {b}?",
        )
    ).format(a=left, b=right)
    total = left + right
    result = rng.choice((json.dumps({"result": total}), str(total), json.dumps({"sum": total})))
    return text, (left, right), result, f"{left} plus {right} is {total}."


def _multiply(rng: random.Random) -> Request:
    left, right = _numbers(rng)
    text = rng.choice(
        (
            "What is {a} times {b}?",
            "Multiply {a} by {b}.",
            "What is {a} * {b}?",
            "What is the product of {a} and {b}?",
            "Calculate {a} * {b}.",
            "How much is {a} times {b}?",
            "Can you multiply {a} by {b}?",
        )
    ).format(a=left, b=right)
    product = left * right
    result = rng.choice((json.dumps({"result": product}), str(product), json.dumps({"product": product})))
    return text, (left, right), result, f"{left} times {right} is {product}."


def _search(rng: random.Random) -> Request:
    topic = _topic(rng)
    text = rng.choice(
        (
            "Search for {t}.",
            "Search the web for {t}.",
            "Look up {t}.",
            "Find something about {t}.",
            "Can you search for {t}?",
            "Please look up {t}.",
            "Search: {t}",
            "Do a search for {t}.",
        )
    ).format(t=topic)
    found = rng.choice((f"A page about {topic}", f"{cap(topic)} - a guide", f"All about {topic}", f"The {topic} page"))
    result = rng.choice(
        (
            json.dumps({"results": [found]}, ensure_ascii=False),
            found,
            json.dumps([{"title": found}], ensure_ascii=False),
        )
    )
    return text, (topic,), result, f"I found this: {found}."


def _message(rng: random.Random) -> Request:
    name, words = any_name(rng), rng.choice(_MESSAGES)
    text = rng.choice(
        (
            "Send {n} the message: {m}",
            "Send a message to {n}: {m}",
            "Tell {n}: {m}",
            "Write to {n}: {m}",
            "Text {n}: {m}",
            "Please send {n} this message: {m}",
        )
    ).format(n=name, m=words)
    result = rng.choice((json.dumps({"status": "sent"}), "ok", json.dumps({"ok": True}), "sent"))
    return text, (name, words), result, f"I have sent your message to {name}."


def _timer(rng: random.Random) -> Request:
    minutes = rng.randint(2, 90)
    text = rng.choice(
        (
            "Set a timer for {m} minutes.",
            "Start a timer for {m} minutes.",
            "Timer for {m} minutes.",
            "Wake me in {m} minutes.",
            "Please set a timer for {m} minutes.",
            "I need a timer for {m} minutes.",
            "Remind me in {m} minutes.",
        )
    ).format(m=minutes)
    result = rng.choice((json.dumps({"status": "ok"}), "ok", json.dumps({"ok": True}), "timer started"))
    return text, (minutes,), result, f"The timer is set for {minutes} minutes."


def _stock(rng: random.Random) -> Request:
    symbol = "".join(rng.choice(facts.LETTERS) for _ in range(rng.choice((3, 3, 4))))
    price = f"{rng.randint(1, 999)}.{rng.randint(10, 99)}"
    text = rng.choice(
        (
            "What is the price of {s}?",
            "What is the stock price of {s}?",
            "How much is a share of {s}?",
            "Price of {s}?",
            "Tell me the stock price of {s}.",
            "Check the price of {s}.",
        )
    ).format(s=symbol)
    result = rng.choice((json.dumps({"price": float(price)}), f"{float(price)}"))
    return text, (symbol,), result, f"The price of {symbol} is {float(price)}."


def _property(rng: random.Random, what: str) -> Request:
    """A question for any property of anything, whose result may be a number or a word."""
    subject = rng.choice((any_city, any_name, made_up))(rng)
    value: Any = rng.choice(
        (
            rng.randint(0, 999),
            made_up(rng),
            f"{rng.randint(1, 99)} {made_up(rng)}",
            rng.choice(_SKIES),
            rng.choice(facts.GROUPS["colors"]),
        )
    )
    text = rng.choice(
        (
            "What is the {w} of {s}?",
            "What is the {w} in {s}?",
            "Tell me the {w} of {s}.",
            "What's the {w} for {s}?",
            "Look up the {w} of {s}.",
            "Get the {w} of {s}.",
            "{w} of {s}?",
            "Find the {w} of {s}.",
            "Check the {w} in {s}.",
            "I need the {w} of {s}.",
        )
    ).format(w=what, s=subject)
    result = rng.choice(
        (
            json.dumps({what.replace(" ", "_"): value}, ensure_ascii=False),
            str(value),
            json.dumps({"result": value}),
            json.dumps({"value": value}),
        )
    )
    return cap(text), (subject,), result, f"The {what} of {subject} is {value}."


def _request(rng: random.Random, kind: str) -> Request:
    if kind.startswith("property "):
        return _property(rng, kind.removeprefix("property "))
    return _REQUESTS[kind](rng)


_OF_A_CITY = {"weather": _weather, "time": _time, "population": _population}
_REQUESTS: dict[str, Callable[[random.Random], Request]] = {
    **_OF_A_CITY,
    "add": _add,
    "multiply": _multiply,
    "search": _search,
    "message": _message,
    "timer": _timer,
    "stock": _stock,
}


def call_turn(rng: random.Random, tools: list[Tool], answered: bool) -> Turn:
    """A request that one of `tools` serves; with `answered`, the result and what is said of it follow."""
    by_kind = {tool.kind: tool for tool in tools}
    pairs: list[str] = [kind for kind in ("weather", "time", "population") if kind in by_kind]
    if pairs and rng.random() < 0.3:
        return _parallel(rng, by_kind, pairs, answered)
    tool = rng.choice(tools)
    text, values, result, answer = _request(rng, tool.kind)
    plain = text.startswith("What is the weather in ")
    return Turn(
        "tool answer" if answered else "tool call",
        text,
        answer if answered else "",
        keep_case=True,
        plain=plain,
        check="exact" if answered else "calls",
        calls=[tool.call(*values)],
        results=[result] if answered else [],
    )


_ASKS = {
    "weather": (
        "What is the weather",
        "How is the weather",
        "Tell me the weather",
        "Compare the weather",
        "I want to know the weather",
        "What's the weather like",
    ),
    "time": ("What time is it", "Tell me the time", "What is the time", "I want to know the time"),
    "population": ("How many people live", "Tell me how many people live", "What is the population"),
}


def _parallel(rng: random.Random, by_kind: dict[str, Tool], kinds: list[str], answered: bool) -> Turn:
    """Two or three cities in one request, or two things to know of two cities: as many calls at once."""
    count = rng.choice((2, 2, 2, 3))
    cities: list[str] = []
    while len(cities) < count:
        city = any_city(rng)
        if city not in cities:
            cities.append(city)
    if len(kinds) > 1 and rng.random() < 0.3:
        chosen = rng.sample(kinds, 2)
        cities = cities[:2]
        halves = [f"{rng.choice(_ASKS[kind])} in {city}" for kind, city in zip(chosen, cities, strict=True)]
        text = f"{halves[0]}, and {halves[1][0].lower()}{halves[1][1:]}?"
    else:
        chosen = [rng.choice(kinds)] * count
        text = f"{rng.choice(_ASKS[chosen[0]])} in {', '.join(cities[:-1])} and {cities[-1]}?"
    calls, results, answers = [], [], []
    for kind, city in zip(chosen, cities, strict=True):
        _, _, result, answer = _OF_A_CITY[kind](rng, city)
        calls.append(by_kind[kind].call(city))
        results.append(result)
        answers.append(answer)
    return Turn(
        "parallel tool answer" if answered else "parallel calls",
        text,
        " ".join(answers) if answered else "",
        keep_case=True,
        check="exact" if answered else "calls",
        calls=calls,
        results=results if answered else [],
    )


NO_TOOL_ANSWERS = {
    "weather": "I cannot look up the weather, because I have no tool for it.",
    "time": "I cannot look up the time, because I have no tool for it.",
    "population": "I cannot look up the population, because I have no tool for it.",
    "search": "I cannot search, because I have no tool for it.",
    "message": "I cannot send messages, because I have no tool for it.",
    "timer": "I cannot set a timer, because I have no tool for it.",
    "stock": "I cannot look up prices, because I have no tool for it.",
    "property": "I cannot look that up, because I have no tool for it.",
}


def no_tool(rng: random.Random, tools: list[Tool]) -> Turn:
    """A request that none of `tools` serves (perhaps there are none), and a plain word about it."""
    present = {tool.kind for tool in tools}
    kind = rng.choice([kind for kind in NO_TOOL_ANSWERS if kind not in present])
    if kind == "property":
        kind = f"property {rng.choice([what for what in _PROPERTIES if f'property {what}' not in present])}"
    text, *_ = _request(rng, kind)
    return Turn("no tool", text, NO_TOOL_ANSWERS[kind.split()[0]], keep_case=True)
