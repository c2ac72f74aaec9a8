"""Ranges and types of settings, and settings out of JSON: a wrong value is one line with its name, rule and flag."""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The numbers that a setting may have, and why."""

    low: float
    high: float = math.inf
    above_low: bool = False
    """`low` itself is out."""
    below_high: bool = False
    why: str = ""

    def holds(self, value: float) -> bool:
        """False for NaN and infinity too."""
        over = value > self.low if self.above_low else value >= self.low
        under = value < self.high if self.below_high else value <= self.high
        return over and under and math.isfinite(value)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"a number above {self.low}" if self.above_low else f"{self.low} or more"
        start = f"a number above {self.low}" if self.above_low else f"a number from {self.low}"
        return f"{start} and below {self.high}" if self.below_high else f"{start} to {self.high}"


ONE_OR_MORE, ZERO_OR_MORE = Rule(low=1), Rule(low=0)
POSITIVE = Rule(low=0, above_low=True)
SHARE = Rule(low=0, high=1)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def flag(name: str) -> str:
    """global_batch_size -> --global-batch-size"""
    return f"--{name.replace('_', '-')}"


def check_settings(settings: Any, rules: Mapping[str, Rule]) -> None:
    """Raise ValueError for a value of `settings` (a dataclass) of the wrong type or that breaks its rule."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        _check_type(field.name, value, hints[field.name])
        rule = rules.get(field.name)
        if rule is not None and value is not None and not rule.holds(value):
            why = f"{rule.why}; " if rule.why else ""
            raise ValueError(f"{field.name}={value}: {why}set {flag(field.name)} to {rule}")


def _check_type(name: str, value: Any, hint: Any) -> None:
    wanted = _wanted(value, hint)
    require(wanted is None, f"{name}={value!r}: use {wanted} for {flag(name)}")


def _wanted(value: Any, hint: Any) -> str | None:
    """What `hint` asks for in words, or None when `value` is that."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None or _wanted(value, parts[0]) is None else _wanted(value, parts[0])
    if origin is typing.Literal:
        return None if value in parts else f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        whole = isinstance(value, tuple) and len(value) == len(parts)
        right = whole and all(_wanted(v, p) is None for v, p in zip(value, parts, strict=True))
        return None if right else f"{len(parts)} numbers"
    is_bool = isinstance(value, bool)
    kinds: dict[Any, tuple[bool, str]] = {
        bool: (is_bool, "true or false"),
        int: (isinstance(value, numbers.Integral) and not is_bool, "a whole number"),
        float: (isinstance(value, numbers.Real) and not is_bool, "a number"),
        str: (isinstance(value, str), "text"),
        Path: (isinstance(value, Path), "a path"),
    }
    right, words = kinds.get(hint, (isinstance(value, hint), f"settings of {getattr(hint, '__name__', hint)}"))
    return None if right else words


def from_record(cls: Any, record: Any) -> Any:
    """Rebuild a dataclass from JSON values: nested dataclasses, Paths and tuples get their types back."""
    require(isinstance(record, Mapping), f"the settings of {cls.__name__} are {type(record).__name__}, not an object")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(record) - {f.name for f in dataclasses.fields(cls)})
    require(not unknown, f"{cls.__name__} has no setting {', '.join(unknown)}; was it written by another version?")
    return cls(**{name: _from_value(hints[name], value) for name, value in record.items()})


def _from_value(hint: Any, value: Any) -> Any:
    """`value` as `hint` wants it; one of a wrong kind stays as it is, for `check_settings` to name."""
    if dataclasses.is_dataclass(hint):
        return from_record(hint, value)
    if isinstance(hint, types.UnionType):
        return None if value is None else _from_value(typing.get_args(hint)[0], value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value
