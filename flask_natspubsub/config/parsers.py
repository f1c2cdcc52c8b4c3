"""Parsers of settings and options.

Each takes a value and returns its final form. For a bad value it raises ``Invalid``, whose text
says what is allowed and reads well behind "Allowed:".
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ..messages.subjects import RESERVED_APP_NAMES
from .table import Parser

#: One token of a subject, as a regular expression.
ONE_NAME = "[A-Za-z0-9_-]+"
#: Seconds of a day.
DAY = 24 * 3600.0


class Invalid(ValueError):
    """A bad value; says what is allowed. Becomes a ConfigurationError with key and value."""


def optional(parse: Parser) -> Parser:
    """Allow None as well."""
    return lambda value: None if value is None else parse(value)


def boolean(value: Any) -> bool:
    """Accept True or False only."""
    if not isinstance(value, bool):
        raise Invalid("True or False")
    return value


_SPELLED = {"true": True, "1": True, "yes": True, "on": True} | {
    "false": False, "0": False, "no": False, "off": False
}  # fmt: skip


def flag(value: Any) -> bool:
    """Accept True or False, or a word that stands for them in an environment variable.

    ``app.config.from_prefixed_env`` makes 0 and 1 numbers, and leaves ``False`` a string.
    """
    if isinstance(value, (bool, int, str)) and str(value).strip().lower() in _SPELLED:
        return _SPELLED[str(value).strip().lower()]
    raise Invalid(
        "True or False (in an environment variable: true or false, yes or no, on or off, 1 or 0)"
    )


def integer(minimum: int) -> Parser:
    """Return a parser of whole numbers that are ``minimum`` or more."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise Invalid(f"a whole number, {minimum} or more")
        return value

    return parse


def seconds(value: Any) -> float:
    """Convert seconds (int or float) or a timedelta to seconds; it must not be negative."""
    if isinstance(value, dt.timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e10:
        raise Invalid("a number of seconds, or a timedelta, not negative")
    return float(value)


def positive_seconds(value: Any) -> float:
    """Convert a duration to seconds; it must be greater than 0."""
    result = seconds(value)
    if result == 0:
        raise Invalid("a number of seconds, or a timedelta, greater than 0")
    return result


def backoff(value: Any) -> tuple[float, ...]:
    """Convert a list of delays to seconds; the last one repeats."""
    if isinstance(value, (int, float, dt.timedelta)) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise Invalid("a list of seconds (the last one repeats), such as [1, 5, 15]")
    return tuple(seconds(item) for item in value)


def text(value: Any) -> str:
    """Accept a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise Invalid("a text, not empty")
    return value


def credential(value: Any) -> str:
    """Accept a name, password or token; one of digits only may be a number.

    ``app.config.from_prefixed_env`` reads values as JSON, which makes 12345 a number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise Invalid(
            "a text, not empty (in an environment variable, put quotation marks around what "
            "JSON takes for something else: '\"1e5\"')"
        )
    return value


def token(value: Any) -> str:
    """Accept a string that can be one token of a subject."""
    if not isinstance(value, str) or not re.fullmatch(ONE_NAME, value):
        raise Invalid("letters, digits, '_' and '-' (it becomes one token of a subject)")
    return value


def subject_prefix(value: Any) -> str:
    """Accept the first tokens of a subject, without wildcards."""
    if not isinstance(value, str) or not re.fullmatch(rf"{ONE_NAME}(\.{ONE_NAME})*", value):
        raise Invalid("tokens of letters, digits, '_' and '-', joined by dots")
    return value


def api_prefix(value: Any) -> str:
    """Accept the prefix of an API, such as ``$JS.hub.API``; a dot at its end is dropped."""
    prefix = value.removesuffix(".") if isinstance(value, str) else value
    if not isinstance(prefix, str) or not re.fullmatch(r"[$\w-]+(\.[$\w-]+)*", prefix, re.ASCII):
        raise Invalid("tokens of letters, digits, '$', '_' and '-', joined by dots")
    return prefix


def app_name(value: Any) -> str:
    """Accept a token that the streams do not use themselves."""
    name = token(value)
    if name.lower() in RESERVED_APP_NAMES:
        raise Invalid("any name but 'dlq' and 'events', which the streams use themselves")
    return name


def header_name(value: Any) -> str:
    """Accept the name of an HTTP header."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        raise Invalid("the name of an HTTP header")
    return value


def url_prefix(value: Any) -> str:
    """Accept a path to mount a blueprint at; a slash at its end is dropped."""
    if not isinstance(value, str) or not value.startswith("/") or value.rstrip("/") == "":
        raise Invalid("a path such as '/health'")
    return value.rstrip("/")


SCHEMES = ("nats", "tls", "ws", "wss", "memory")


def urls(value: Any) -> tuple[str, ...]:
    """Accept a server's URL, several with commas, or a list of URLs."""
    allowed = "a server's URL such as 'nats://127.0.0.1:4222', a list of them, or 'memory://'"
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)) or not value:
        raise Invalid(allowed)
    urls = tuple(_url(item.strip() if isinstance(item, str) else item, allowed) for item in value)
    if len({url.startswith("memory:") for url in urls}) > 1:
        raise Invalid("either 'memory://' or servers, not both")
    return urls


def _url(value: Any, allowed: str) -> str:
    if not isinstance(value, str) or not value:
        raise Invalid(allowed)
    url = value if "://" in value else f"nats://{value}"
    try:
        parts = urlsplit(url)
        known = parts.scheme in SCHEMES and (parts.scheme == "memory" or parts.hostname)
        _ = parts.port
    except ValueError:
        known = False
    if not known:
        raise Invalid(allowed)
    return url


def subscribers(value: Any) -> tuple[str, ...]:
    """Accept a module's name or a list of them."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v for v in value):
        raise Invalid("a list of module names such as ['shop.subscribers']")
    return tuple(value)


STREAM_KEYS: dict[str, Parser] = {
    "max_msgs": integer(-1),
    "max_bytes": integer(-1),
    "max_age": seconds,
    "storage": lambda value: choice(value, ("file", "memory")),
    "replicas": integer(1),
    "duplicate_window": seconds,
    "discard": lambda value: choice(value, ("old", "new")),
}


def choice(value: Any, choices: tuple[str, ...]) -> str:
    """Accept one of ``choices``."""
    if value not in choices:
        raise Invalid(" or ".join(repr(choice) for choice in choices))
    return str(value)


def stream_config(value: Any) -> Mapping[str, Any]:
    """Accept the options that a stream can be created with."""
    if not isinstance(value, Mapping):
        raise Invalid(f"a dict with keys from {', '.join(STREAM_KEYS)}")
    parsed = {}
    for key, item in value.items():
        if key not in STREAM_KEYS:
            raise Invalid(f"keys from {', '.join(STREAM_KEYS)}; not {key!r}")
        try:
            parsed[key] = STREAM_KEYS[key](item)
        except Invalid as error:
            raise Invalid(f"{error} for {key!r}") from None
    return parsed
