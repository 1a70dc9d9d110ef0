"""Checks of single settings, with one wording for all that have them."""

from __future__ import annotations

from .errors import ConfigError

__all__ = ["check_flag", "check_integer", "check_share"]


def check_flag(name: str, value: object) -> bool:
    """`value`, or `ConfigError` where it is no bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value


def check_integer(name: str, value: object, least: int) -> int:
    """`value`, or `ConfigError` where it is no integer or below `least`; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def check_share(name: str, value: object) -> float:
    """`value`, or `ConfigError` where it is no number from 0 to 1; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be a number from 0 to 1, got {value!r}")
    return value
