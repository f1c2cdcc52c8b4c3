"""What the pages do not repeat by hand: the settings, the commands."""

from __future__ import annotations

import re
import textwrap

import click

from flask_natspubsub.cli import natspubsub
from flask_natspubsub.config import groups, settings


def settings_text() -> str:
    """Describe every setting in reStructuredText, in the order of the table."""
    return "\n".join(_setting(name) for name in settings.TABLE)


def presets_text() -> str:
    """Describe what each preset sets."""
    lines = []
    for preset in groups.PRESETS:
        one = settings.Settings.from_config({"NATSPUBSUB_PRESET": preset}, "shop")
        changed = [
            f":confval:`{key}` ``{value}``"
            for key, value, source in one.rows()
            if source.startswith("preset")
        ]
        lines.append(f"``{preset}``\n   {', '.join(changed)}\n")
    return "\n".join(lines)


def commands_text() -> str:
    """Show the help of every command, each under a heading."""
    return "\n".join(_commands(natspubsub, click.Context(natspubsub, info_name="flask natspubsub")))


def _commands(group: click.Group, context: click.Context) -> list[str]:
    texts = []
    for name in group.list_commands(context):
        command = group.commands[name]
        inner = click.Context(command, context, info_name=name, terminal_width=88)
        if isinstance(command, click.Group):
            texts += _commands(command, inner)
        else:
            title = inner.command_path.removeprefix("flask natspubsub ")
            help_text = textwrap.indent(command.get_help(inner), "   ")
            texts.append(f"{title}\n{'-' * len(title)}\n\n.. code-block:: text\n\n{help_text}\n")
    return texts


def _setting(name: str) -> str:
    help_text = re.sub(r"`([^`]+)`", r"``\1``", settings.TABLE[name].help)
    return (
        f".. confval:: {settings.PREFIX}{name.upper()}\n"
        f"\n   {help_text}\n\n"
        f"   *Default:* {_default(name)}. *Allowed:* {_allowed(name)}.\n"
    )


def _default(name: str) -> str:
    value = getattr(settings.Settings(), name)
    if value in (None, ""):
        return "none"
    return f"``{list(value) if isinstance(value, tuple) else value!r}``"


def _allowed(name: str) -> str:
    """What is allowed, in the words of the error that any other value gets."""
    try:
        settings.TABLE[name].parse(object())
    except ValueError as error:
        return str(error).replace("*", "\\*")
    raise AssertionError(f"{name} allows anything")
