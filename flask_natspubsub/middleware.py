"""Functions around a handler, or around a publish.

A middleware is ``def mw(subject, call_next)``. ``subject`` is the ``MessageContext`` of the
message being handled, or the draft of the message being published. ``call_next()`` runs the next
middleware, or the handler or publish, and returns its result; ``call_next(other)`` passes
``other`` on instead. Not calling it skips the rest.

An async handler's result is an awaitable: plain middleware returns it untouched, ``async def``
middleware awaits it. What ``async def`` middleware calls next can be awaited even if it is
plain, so one such middleware serves all handlers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

#: ``def mw(subject, call_next)``.
Middleware = Callable[[Any, Callable[..., Any]], Any]


def compose(
    middleware: Iterable[Middleware], handler: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """Wrap ``handler`` (one argument) in ``middleware``; the first is the outermost."""
    for function in reversed(tuple(middleware)):
        handler = functools.partial(_call, function, is_async(function), handler)
    return handler


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling ``function``, a partial or a callable object returns a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - the method itself is wanted
    )


def _call(function: Middleware, awaits: bool, inner: Callable[[Any], Any], subject: Any) -> Any:
    def call_next(replacement: Any = None) -> Any:
        return inner(subject if replacement is None else replacement)

    async def call_next_async(replacement: Any = None) -> Any:
        result = call_next(replacement)
        return await result if inspect.isawaitable(result) else result

    return function(subject, call_next_async if awaits else call_next)
