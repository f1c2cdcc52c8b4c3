"""The group of commands, and the parts that all commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click
from flask import current_app
from flask.cli import AppGroup, with_appcontext

from ..app.state import EXTENSION, AppState
from ..brokers.base import Broker
from ..errors import NatsPubsubError

Command = Callable[..., Any]


class Misused(click.ClickException):
    """The command cannot be run like this; exit code 2."""

    exit_code = 2


class Group(AppGroup):
    """Commands that get the app's ``AppState`` as their first argument.

    Errors of this package become one line on stderr and exit code 1.
    """

    def command(  # type: ignore[override]  # as in AppGroup
        self, name: str, *, examples: Sequence[str]
    ) -> Callable[[Command], click.Command]:
        """Add the decorated function as a command; its help ends with the examples."""
        decorate = super().command(name, epilog=_epilog(examples))
        return lambda function: decorate(_with_state(function))

    def group(  # type: ignore[override]  # as in AppGroup
        self, name: str, *, examples: Sequence[str], runs_alone: bool = False
    ) -> Callable[[Command], click.Group]:
        """Add a group of such commands.

        :param runs_alone: without a subcommand, the group runs as a command itself.
        """
        decorate = super().group(
            name, cls=Group, epilog=_epilog(examples), invoke_without_command=runs_alone
        )
        if not runs_alone:
            return decorate
        return lambda function: decorate(_alone(with_appcontext(_with_state(function))))

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and print errors of this package as one line."""
        try:
            return super().invoke(ctx)
        except NatsPubsubError as error:
            raise click.ClickException(str(error)) from error


def _epilog(examples: Sequence[str]) -> str:
    title = "Example:" if len(examples) == 1 else "Examples:"
    # \b keeps click from joining the lines.
    return "\n  ".join([f"\b\n{title}", *examples])


def _alone(function: Command) -> Command:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if click.get_current_context().invoked_subcommand is None:
            return function(*args, **kwargs)
        return None

    return run


def _with_state(function: Command) -> Command:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        state = current_app.extensions.get(EXTENSION)
        if not isinstance(state, AppState):
            raise Misused(
                f"The Flask app {current_app.name!r} has no NatsPubsub extension. Add "
                "'NatsPubsub(app)', or call 'pubsub.init_app(app)' in your application factory."
            )
        return function(state, *args, **kwargs)

    return run


@contextmanager
def onlooker(state: AppState, *, connect: bool = True) -> Iterator[Broker]:
    """Connect without creating streams, for commands that only look.

    A broker that the app has already (in a test) is used as it is, and left open.

    :raises NotConnected: there is no server.
    """
    is_ours = not state.has_broker
    broker = state.broker(auto_setup=False)
    try:
        if connect:
            broker.connect(state.settings.connect_timeout)
        yield broker
    finally:
        if is_ours:
            state.close()


def end(code: int) -> NoReturn:
    """End the command with an exit code."""
    raise click.exceptions.Exit(code)


@click.group("natspubsub", cls=Group, epilog=_epilog(["flask --app shop natspubsub worker"]))
def natspubsub() -> None:
    """Publish and subscribe over NATS JetStream."""
