"""Records in JSON that come from files, which anybody may have written: read by a schema, and refused in one line.

A schema looks like what it allows:

    {"name": .., "other?": ..}    an object that has these keys, the other one perhaps; more of them are let through
    [schema]                      a list of up to 100,000 of these
    (schema, schema, ..)          any of these
    range(1, 10)                  an integer of these;  str, bool, float: a text, a truth, a finite number
    None, "text"                  this very value
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

MOST_ENTRIES = 100_000
_LARGEST_FILE = 1 << 24  # bytes: what is made of them takes some thirty times as much
_SHOWN = 200  # letters of a value or message that is passed on
_KINDS = {str: "a text", bool: "true or false", float: "a finite number"}

Schema = Any


def read_record(path: str | Path, schema: Schema, what: str) -> Any:
    """The record in a JSON file. Raises FileNotFoundError, or ValueError saying that it is not `what`, and why."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ValueError(f"larger than {_LARGEST_FILE} bytes")
        return parse_record(text, schema)
    except ValueError as error:
        raise ValueError(f"{path}: not {what} ({error})") from None


def parse_record(text: str | bytes, schema: Schema) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or not as the schema has it."""
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    fault = _fault(value, schema, "")
    if fault is not None:
        raise ValueError(fault)
    return value


def short(value: Any) -> str:
    """A value in a message."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.."


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def _fault(value: Any, schema: Schema, at: str) -> str | None:
    """What is wrong with the value at this place; None: nothing."""
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, own in schema.items():
            name = key.removesuffix("?")
            if name not in value and name == key:
                return f"{at or 'it'} has no {name!r}"
            if name in value and (fault := _fault(value[name], own, f"{at}.{name}".lstrip("."))) is not None:
                return fault
        return None
    if isinstance(schema, list) and isinstance(value, list):
        if len(value) > MOST_ENTRIES:
            return f"{at} has {len(value)} entries, and may have {MOST_ENTRIES}"
        return next((f for i, one in enumerate(value) if (f := _fault(one, schema[0], f"{at}[{i}]"))), None)
    options = schema if isinstance(schema, tuple) else (schema,)
    if any(_is(value, option) for option in options):
        return None
    return f"{at or 'it'} must be {' or '.join(map(_in_words, options))}, got {short(json.dumps(value))}"


def _is(value: Any, schema: Schema) -> bool:
    if isinstance(schema, (dict, list, tuple)):
        return type(value) is type(schema) and _fault(value, schema, "") is None
    if isinstance(schema, range):
        return type(value) is int and value in schema
    if isinstance(schema, type):
        if schema is float:
            return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)
        return type(value) is schema
    return type(value) is type(schema) and bool(value == schema)


def _in_words(schema: Schema) -> str:
    if isinstance(schema, range):
        return f"an integer from {schema.start} to {schema.stop - 1}"
    if isinstance(schema, (dict, list)):
        return "an object" if isinstance(schema, dict) else "a list"
    return _KINDS[schema] if isinstance(schema, type) else json.dumps(schema)
