"""Raw option values (text, YAML) to the types that a dataclass declares, and the dataclass made of them."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rime_fast.cli.options import _FALSE, _TRUE, UsageError

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
    options = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    optional = type(None) in options
    options = [one for one in options if one is not type(None)]
    text = str in options
    if value is None or (isinstance(value, str) and value.lower() == "null") or _is_none(value, text):
        if optional:
            return None
        raise UsageError(f"{name} is none; expected {describe(hint)}")
    for one in sorted(options, key=_rank):
        if one is bool and text and str(value).lower() not in ("true", "false"):
            continue  # beside text, "no" and "on" are words
        found = _as(value, one, name)
        if found is not _NO:
            return found
    raise UsageError(f"{name} is {value!r}; expected {describe(hint)}")


_NO = object()


def _is_none(value: Any, text: bool) -> bool:
    return not text and isinstance(value, str) and value.lower() == "none"


def _rank(hint: Any) -> int:
    """Narrow types are tried before wide ones; text takes anything, so it comes last."""
    order = [bool, int, float]
    return order.index(hint) if hint in order else (9 if hint is str else 5)


def _as(value: Any, hint: Any, name: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if hint is bool:
        if isinstance(value, bool):
            return value
        word = str(value).lower()
        return word in _TRUE if isinstance(value, str) and word in _TRUE | _FALSE else _NO
    if hint in (int, float):
        return _number(value, hint)
    if hint is str:
        return _text(value)
    if hint is list or origin is list:
        inner = (get_args(hint) or (Any,))[0]
        return [coerce(one, inner, name) for one in value] if isinstance(value, (list, tuple)) else _NO
    if hint is dict or origin is dict:
        return _mapping(value)
    if origin is Literal:
        return next((one for one in get_args(hint) if one == value), _NO)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return next((one for one in hint if value in (one.value, one.name)), _NO)
    return _NO


def _text(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else _NO


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return _NO
    try:
        if kind is float:
            return float(value)
        number = float(value) if isinstance(value, float) else int(value)
        return int(number) if number == int(number) else _NO
    except (ValueError, OverflowError):
        return _NO


def _mapping(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise UsageError(f"{value!r} is not JSON: {error}") from None
    return _NO


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
