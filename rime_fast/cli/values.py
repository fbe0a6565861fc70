"""Raw option values (text, YAML) to the types that a dataclass declares, and the dataclass made of them."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rime_fast.cli.options import FLAGS, UsageError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make an instance of dataclass ``cls`` from the entries of ``values`` that are its fields.

    Raises UsageError naming the option for a value that does not fit and for a missing required one; a ValueError of
    the class itself (its own checks) is passed on as a UsageError.
    """
    hints = get_type_hints(cls)
    own = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for name, field in own.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UsageError(f"--{name} is required")
    chosen = {name: coerce(value, hints[name], f"--{name}") for name, value in values.items() if name in own}
    try:
        return cls(**chosen)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Turn ``value`` (text of the command line, or what YAML made of it) into type ``hint``. Raises UsageError."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    word = value.lower() if isinstance(value, str) else None
    if value is None or word == "null" or (word == "none" and str not in kinds):
        if type(None) in kinds:
            return None
        raise UsageError(f"{name} is none; expected {describe(hint)}")
    for kind in sorted(kinds, key=_rank):
        if kind is bool and str in kinds and word not in (None, "true", "false"):
            continue  # beside text, "no" and "on" are words
        try:
            return _as(value, kind, name)
        except (LookupError, OverflowError, TypeError, ValueError):
            continue
    raise UsageError(f"{name} is {value!r}; expected {describe(hint)}")


def _rank(kind: Any) -> int:
    """Narrow types are tried before wide ones; text takes anything, so it comes last."""
    order = [bool, int, float]
    return order.index(kind) if kind in order else (9 if kind is str else 5)


def _as(value: Any, kind: Any, name: str) -> Any:
    """``value`` as this one type; raises what ``coerce`` catches where it is none of it."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (kind is bool and isinstance(value, bool)):
        return value
    if kind is bool and isinstance(value, str):
        return FLAGS[value.lower()]
    if origin is Literal:
        return inner[inner.index(value)]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {key: one for one in kind for key in (one.value, one.name)}[value]
    if origin is list and isinstance(value, (list, tuple)):
        return [coerce(one, inner[0] if inner else Any, name) for one in value]
    if origin is dict:
        return _mapping(value)
    if kind is str and isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if kind not in (int, float, str) or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    return kind(value)


def _mapping(value: Any) -> dict:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        raise TypeError
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UsageError(f"{value!r} is not JSON: {error}") from None


def describe(hint: Any) -> str:
    """Say what a type is in words, for messages and the help."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    if hint in names:
        return names[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        words = [describe(one) for one in inner]
        return " or ".join(dict.fromkeys(words))
    if origin is list or hint is list:
        return "a list" + (f" of {describe(inner[0])}" if inner and inner[0] is not Any else "")
    if origin is dict or hint is dict:
        return "a mapping"
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(one.value) for one in hint)
    return str(getattr(hint, "__name__", hint))
