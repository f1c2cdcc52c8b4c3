"""Introspection of handlers: name, place, arguments, message type."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from ..errors import RegistrationError
from ..messages.codec import build_decoder
from .context import MessageContext

#: A function, bound method, partial or callable object.
AnyHandler = Callable[..., Any]
#: A handler in the form the processor calls.
Handler = Callable[[Any, MessageContext], Any]

_SHAPE = "A handler takes (message, context), or just (message)."


def function_of(handler: AnyHandler) -> AnyHandler:
    """Return the plain function in ``handler``; ``handler`` itself if there is none."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = inspect.unwrap(handler)
    if not inspect.isroutine(handler) and not isinstance(handler, type):
        handler = getattr(type(handler), "__call__", handler)  # noqa: B004 - the method is wanted
    return getattr(handler, "__func__", handler)


def place_of(source: AnyHandler | type) -> str:
    """Return ``module:line`` of a handler or class; just the module where no line is known."""
    if isinstance(source, type):
        line = vars(source).get("__firstlineno__")  # Python 3.13 and newer
        target = function_of(vars(source).get("handle", source))
    else:
        line, target = None, function_of(source)
    if line is None and hasattr(target, "__code__"):
        line = target.__code__.co_firstlineno
    module = getattr(source if isinstance(source, type) else target, "__module__", None)
    return f"{module}:{line}" if line else str(module)


def code_of(source: AnyHandler | type) -> Any:
    """Return the compiled code of a handler, or of a class's ``handle``; None if it has none."""
    function = function_of(getattr(source, "handle") if isinstance(source, type) else source)  # noqa: B009 - of any class
    return getattr(function, "__code__", None)


def execution_of(module: str) -> object:
    """Return an object that differs each time a module is executed; None in a script."""
    return getattr(sys.modules.get(module), "__spec__", None)


def default_name(handler: AnyHandler) -> str:
    """Return the name of the function, or of the object's class in snake case."""
    function = function_of(handler)
    if getattr(function, "__name__", "__call__") == "__call__":
        return snake_case(type(handler).__name__)
    return str(function.__name__)


def snake_case(name: str) -> str:
    """Return ``HTTPAudit`` as ``http_audit``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def check_shape(who: str, handler: AnyHandler) -> None:
    """Check that ``handler`` can be called with a message, or a message and its context.

    :raises RegistrationError: it takes more or fewer arguments, or is a generator.
    """
    function = function_of(handler)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise RegistrationError(
            f"{who} is a generator: calling it would run nothing.", "Return instead of yielding."
        )
    _positional(who, handler)


def with_context(who: str, handler: AnyHandler) -> Handler:
    """Return ``handler`` in the form ``handler(message, context)``."""
    if len(_positional(who, handler)) == 2:
        return handler
    return lambda message, _context: handler(message)


def message_annotation(who: str, handler: AnyHandler) -> Any:
    """Return the annotation of the handler's first parameter; Any where there is none.

    :raises RegistrationError: it names something that cannot be found.
    """
    return _annotation(who, handler, _positional(who, handler)[0])


def message_decoder(who: str, annotation: Any, *, plain: bool = False) -> Callable[[Any], Any]:
    """Build the decoder for the type that a handler asks for.

    :param annotation: see ``message_annotation``.
    :param plain: whether its messages need not be JSON objects.
    :raises RegistrationError: a message cannot be decoded into this type.
    """
    try:
        return build_decoder(annotation, plain=plain)
    except RegistrationError as error:
        raise RegistrationError(f"{who}: {error.message}", error.fix) from error


def _positional(who: str, handler: AnyHandler) -> list[inspect.Parameter]:
    """Return the one or two parameters that a call fills."""
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError):
        raise RegistrationError(f"{who} has no signature that can be read.", _SHAPE) from None
    kinds = inspect.Parameter
    several = [p for p in parameters if p.kind is kinds.VAR_POSITIONAL]
    single = [
        p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    needed = [p for p in single[2:] if p.default is p.empty]
    needed += [p for p in parameters if p.kind is kinds.KEYWORD_ONLY and p.default is p.empty]
    filled = (single + several * 2)[:2]
    if needed or not filled:
        raise RegistrationError(f"{who} takes {inspect.signature(handler)}.", _SHAPE)
    return filled


def _annotation(who: str, handler: AnyHandler, parameter: inspect.Parameter) -> Any:
    """Resolve the annotation of one parameter.

    Only this one: the others may name types that exist for type checkers alone, such as a
    ``MessageContext`` imported under ``TYPE_CHECKING``.
    """
    if parameter.annotation is parameter.empty:
        return Any
    lone = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    scope = getattr(function_of(handler), "__globals__", {})
    try:
        return typing.get_type_hints(lone, scope)[parameter.name]
    except (AttributeError, NameError, SyntaxError, TypeError) as error:
        raise RegistrationError(
            f"{who}: the type {parameter.annotation!r} of {parameter.name!r} cannot be found "
            f"({error}).",
            "Define or import it at the top level of the handler's module, not inside a "
            "function and not under 'if TYPE_CHECKING'.",
        ) from error
