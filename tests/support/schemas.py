"""JSON Schemas that between them use every keyword which structured outputs claim, by name.

Most answers to them are short, so that a model that writes nonsense ends them too. Those that differ only in a number
or a format are made in a loop; what is combined with what is written out.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

SHORT = {"type": "string", "maxLength": 6}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = (
    r"^[a-z]{2,5}$",
    r"^\d{3}-\d{4}$",
    r"^(red|green|blue)$",
    r"^[A-Z][a-z]{1,6}( [A-Z][a-z]{1,6})?$",
    r"^(0|[1-9]\d{0,2})\.\d{1,2}$",
    r"^#[0-9a-f]{6}$",
    r"^v\d\.\d(-rc\d)?$",
    r"^a+b{2}$",
    r"^\w{1,4}@\w{1,4}\.(com|org)$",
    r"^[^a-z]{1,3}$",
    "^[äöü]{1,3}$",
    r"^\s?x\s?$",
)


def record(properties: dict[str, Any], *optional: str, **more: Any) -> Schema:
    """A closed object, all of whose properties but the optional ones are required."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def schemas() -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    for group in (_scalars, _numbers, _strings, _arrays, _objects, _combined, _references, _nested):
        for name, schema in group().items():
            assert name not in found
            found[name] = schema
    return found


def _scalars() -> dict[str, Schema]:
    values = (0, -3, 2.5, "a", "", 'é\n"q"', True, False, None, [], {}, [1, "b", None], {"a": {"b": [1]}})
    cases: dict[str, Schema] = {f"const {value!r}": {"const": value} for value in values}
    cases |= {f"enum of {count}": {"enum": list(values[:count])} for count in range(1, len(values) + 1)}
    cases |= {f"type {name}": {"type": name} for name in ("boolean", "null", "integer")}
    cases["several types"] = {"type": ["boolean", "null"]}
    cases["several types with limits"] = {
        "type": ["string", "integer", "null"],
        "maxLength": 3,
        "maximum": 9,
        "minimum": 0,
    }
    cases["enum and type"] = {"type": "string", "enum": ["north", "south", 5]}
    cases["annotations"] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:x", "title": "A switch",
        "description": "on or off", "default": False, "examples": [True], "type": "boolean", "deprecated": True,
        "readOnly": True, "writeOnly": False, "$comment": "none",
    }  # fmt: skip
    return cases


def _numbers() -> dict[str, Schema]:
    cases: dict[str, Schema] = {}
    for low, high in ((0, 9), (-5, 5), (17, 23), (-120, -80), (1000, 1000), (99, 10001), (0, 1)):
        cases[f"integer {low}..{high}"] = {"type": "integer", "minimum": low, "maximum": high}
        cases[f"integer above {low} below {high + 2}"] = {
            "type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2,
        }  # fmt: skip
        cases[f"number {low}..{high}"] = {"type": "number", "minimum": low, "maximum": high}
    for low, high in ((0.5, 0.75), (-1.25, 1.25), (3.14, 3.15)):
        cases[f"number {low}..{high}"] = {"type": "number", "minimum": low, "maximum": high}
        cases[f"number above {low} below {high}"] = {
            "type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high,
        }  # fmt: skip
    for step in (2, 5, 7, 10, 25):
        cases[f"multiple of {step}"] = {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": 100}
    cases["at least 10"] = {"type": "integer", "minimum": 10}
    cases["at most -10"] = {"type": "integer", "maximum": -10}
    cases["any number"] = {"type": "number"}
    return cases


def _strings() -> dict[str, Schema]:
    cases: dict[str, Schema] = {}
    for low, high in ((0, 0), (0, 1), (1, 1), (3, 3), (2, 8), (0, 20), (12, 15)):
        cases[f"string of {low} to {high}"] = {"type": "string", "minLength": low, "maxLength": high}
    cases["string of at least 4"] = {"type": "string", "minLength": 4}
    cases |= {f"pattern {pattern}": {"type": "string", "pattern": pattern} for pattern in PATTERNS}
    cases |= {f"format {name}": {"type": "string", "format": name} for name in FORMATS}
    cases["pattern and length"] = {"type": "string", "pattern": "^[ab]*$", "minLength": 2, "maxLength": 4}
    cases["a pattern that is not anchored"] = {"type": "string", "pattern": "[0-9]", "maxLength": 5}
    return cases


def _arrays() -> dict[str, Schema]:
    cases: dict[str, Schema] = {}
    for low, high in ((0, 0), (0, 2), (1, 1), (2, 3), (4, 4), (0, 5)):
        for name, item in (("digits", DIGIT), ("words", SHORT), ("flags", {"type": "boolean"})):
            cases[f"{low} to {high} {name}"] = {"type": "array", "items": item, "minItems": low, "maxItems": high}
    cases["tuple"] = {"type": "array", "prefixItems": [SHORT, DIGIT, {"type": "null"}], "items": False, "minItems": 3}
    cases["tuple that may stop early"] = {"type": "array", "prefixItems": [DIGIT, DIGIT, DIGIT], "items": False}
    cases["tuple and more"] = {
        "type": "array", "prefixItems": [{"const": "x"}], "items": DIGIT, "minItems": 2, "maxItems": 4,
    }  # fmt: skip
    cases["tuple and anything"] = {"type": "array", "prefixItems": [DIGIT], "minItems": 1, "maxItems": 1}
    cases["matrix"] = {
        "type": "array", "minItems": 2, "maxItems": 2,
        "items": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 2},
    }  # fmt: skip
    cases["array of enums"] = {"type": "array", "items": {"enum": ["a", 1, None]}, "maxItems": 4}
    cases["array of objects"] = {"type": "array", "items": record({"a": DIGIT, "b": SHORT}, "b"), "maxItems": 2}
    cases["array of either"] = {"type": "array", "items": {"anyOf": [DIGIT, SHORT]}, "minItems": 1, "maxItems": 3}
    cases["no items"] = {"type": "array", "items": False}
    return cases


def _objects() -> dict[str, Schema]:
    cases: dict[str, Schema] = {}
    fields = {"a": DIGIT, "b": {"type": "boolean"}, "c": SHORT, "d": {"type": "null"}, "e": {"enum": ["x", "y"]}}
    for count in range(1, 6):
        some = dict(list(fields.items())[:count])
        cases[f"{count} required"] = record(some)
        cases[f"{count} optional"] = record(some, *some)
        cases[f"{count}, the first required"] = record(some, *list(some)[1:])
        cases[f"{count}, the last required"] = record(some, *list(some)[:-1])
    cases["no properties"] = record({})
    cases["required but not described"] = {
        "type": "object", "properties": {"a": DIGIT}, "required": ["a", "z"], "additionalProperties": DIGIT,
    }  # fmt: skip
    cases["names with signs"] = record({"a b": DIGIT, 'q"': DIGIT, "ü/\\": DIGIT, "": DIGIT})
    cases["open with small values"] = {
        "type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": {"type": "boolean"},
    }  # fmt: skip
    for low, high in ((0, 1), (1, 2), (2, 2)):
        cases[f"{low} to {high} properties"] = {
            "type": "object", "additionalProperties": DIGIT, "minProperties": low, "maxProperties": high,
        }  # fmt: skip
    cases["names by pattern"] = {
        "type": "object", "patternProperties": {"^x_[a-z]{1,3}$": DIGIT}, "additionalProperties": False,
    }  # fmt: skip
    return cases


def _combined() -> dict[str, Schema]:
    cat = record({"kind": {"const": "cat"}, "lives": DIGIT})
    dog = record({"kind": {"const": "dog"}, "name": SHORT})
    named = record({"name": SHORT, "age": DIGIT}, "age")
    aged = {"type": "object", "properties": {"age": {"minimum": 5}}, "required": ["age"]}
    return {
        "anyOf scalars": {"anyOf": [DIGIT, {"type": "boolean"}, {"type": "null"}]},
        "anyOf objects": {"anyOf": [cat, dog]},
        "anyOf beside properties": record({"pet": {"anyOf": [cat, dog, {"type": "null"}]}, "ok": {"type": "boolean"}}),
        "oneOf constants": {"oneOf": [{"const": "a"}, {"const": "b"}]},
        "oneOf types": {"oneOf": [DIGIT, SHORT]},
        "oneOf told apart by a constant": {"oneOf": [cat, dog]},
        "allOf bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 6}]},
        "allOf objects": {"allOf": [named, aged]},
        "allOf with properties beside": {**named, "allOf": [aged]},
        "allOf length": {"type": "string", "allOf": [{"minLength": 2}, {"maxLength": 4}]},
        "allOf of anyOf": {"allOf": [{"anyOf": [DIGIT, SHORT]}, {"type": "integer"}]},
        "anyOf of anyOf": {"anyOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"enum": ["x"]}]},
        "nullable": record({"a": {"type": ["integer", "null"], "minimum": 0, "maximum": 9}}),
        "anything short": {"type": "array", "items": {"enum": [1, "a", None, True, [], {}]}, "maxItems": 3},
    }


def _references() -> dict[str, Schema]:
    point, digit_or_end = record({"x": DIGIT, "y": DIGIT}), {"anyOf": [{"type": "null"}, {"$ref": "#"}]}
    defs = {"p": point, "n": {"type": "null"}}
    p, n, node = {"$ref": "#/$defs/p"}, {"$ref": "#/$defs/n"}, {"$ref": "#/$defs/node"}
    chain = {"anyOf": [{"type": "null"}, record({"value": DIGIT, "next": node})]}
    return {
        "$defs": {"$defs": defs, "$ref": "#/$defs/p"},
        "definitions": {"definitions": {"p": point}, **record({"p": {"$ref": "#/definitions/p"}})},
        "a reference used twice": {"$defs": defs, **record({"a": p, "b": p})},
        "a reference in a reference": {"$defs": {**defs, "line": record({"a": p, "b": p})}, "$ref": "#/$defs/line"},
        "a reference to a property": record({"a": DIGIT, "b": {"$ref": "#/properties/a"}}),
        "references in anyOf": {"$defs": defs, "anyOf": [p, n]},
        "a chain": {"$defs": {"node": chain}, "$ref": "#/$defs/node"},
        "a tree": {"$defs": {"node": record({"v": DIGIT, "l": node, "r": node}, "l", "r")}, **node},
        "itself": record({"v": DIGIT, "more": digit_or_end}),
    }


def _nested() -> dict[str, Schema]:
    """Objects in objects: of every depth, and with every pair of kinds of leaves."""
    leaves: dict[str, Schema] = {
        "digit": DIGIT,
        "word": SHORT,
        "date": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}\\d$"},
        "list": {"type": "array", "items": DIGIT, "minItems": 1, "maxItems": 2},
        "choice": {"enum": ["on", "off", None]},
        "percent": {"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 5},
    }
    cases: dict[str, Schema] = {}
    for depth in range(1, 6):
        schema: Schema = DIGIT
        for level in range(depth):
            schema = record({f"level{level}": schema})
        cases[f"{depth} deep"] = schema
    for first, one in leaves.items():
        for second, other in leaves.items():
            if first != second:
                inner = record({first: one, second: other}, second)
                cases[f"{first} and perhaps {second}"] = record(
                    {"inner": inner, "items": {"type": "array", "items": one, "maxItems": 1}}
                )
    return cases
