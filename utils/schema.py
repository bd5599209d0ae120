"""Is stored JSON what this program writes? What somebody has touched is named, and nothing fails later.

    fault({"id": "q", "c": "x"}, {"id": str, "c": float})           # "c is 'x' where a number is expected"

A schema is a type, a tuple of alternatives (None for null), [schema, ...] for a list of any length, a list of
schemas for one of that length, a dict of the keys that must be there, or `Each(schema)` for any keys.
"""
import math
from dataclasses import dataclass, fields

WORDS = {str: "text", float: "a number", int: "a whole number", bool: "true or false", list: "a list",
         dict: "an object", None: "null"}


@dataclass(frozen=True)
class Each:
    """A dict whose values all have this schema."""
    value: object


def of(record):
    """The schema of a dataclass whose fields have plain types."""
    return {f.name: f.type for f in fields(record)}


def fault(value, schema, name="it"):
    """Where a value is not what a schema says, in words; None where it fits. Keys beyond the schema's are
    left alone."""
    if isinstance(schema, tuple):
        return None if any(fault(value, one, name) is None for one in schema) else _not(value, name, schema)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return _not(value, name, (list,))
        schemas = [schema[0]] * len(value) if schema[-1] is ... else schema
        if len(value) != len(schemas):
            return f"{name[:80]} has {len(value)} entries where {len(schemas)} are expected"
        faults = (fault(item, one, f"{name}[{i}]") for i, (item, one) in enumerate(zip(value, schemas)))
        return next(filter(None, faults), None)
    if isinstance(schema, dict | Each):
        if not isinstance(value, dict):
            return _not(value, name, (dict,))
        prefix = "" if name == "it" else f"{name}."
        if isinstance(schema, Each):
            schema = dict.fromkeys(value, schema.value)
        missing = next((key for key in schema if key not in value), None)
        if missing is not None:
            return f"{prefix}{missing} is missing"
        faults = (fault(value[key], one, f"{prefix}{key}") for key, one in schema.items())
        return next(filter(None, faults), None)
    return None if _fits(value, schema) else _not(value, name, (schema,))


def _fits(value, kind):
    if kind in (float, int):                    # true is no number, and infinity none either
        is_integer = type(value) is int and abs(value) < 2**63
        return is_integer or kind is float and type(value) is float and math.isfinite(value)
    return value is None if kind is None else isinstance(value, kind)


def _not(value, name, kinds):
    plain = [type(kind) if isinstance(kind, list | dict) else dict if isinstance(kind, Each) else kind
             for kind in kinds]
    words = " or ".join(WORDS[kind] for kind in plain)
    return f"{name[:80]} is {str(value)[:40]!r} where {words} is expected"
