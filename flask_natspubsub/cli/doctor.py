"""``doctor``: the findings, and the grade of durability."""

from __future__ import annotations

import textwrap

import click
import msgspec

from ..app.state import AppState
from ..doctor.checks import GRADES, Diagnosis, Finding, Grade, examine
from ..doctor.facts import Facts
from ..doctor.gathering import gather
from ..text import printable
from .group import end, natspubsub, onlooker
from .output import json_option, print_fields, print_json

_COLOURS = {"error": "red", "warning": "yellow", "info": None}


@natspubsub.command(
    "doctor",
    examples=[
        "flask natspubsub doctor",
        "flask natspubsub doctor --monitor-url http://127.0.0.1:8222 --fail-under B --json",
    ],
)
@click.option(
    "--monitor-url", metavar="URL",
    help="The server's monitoring address.  [default: NATSPUBSUB_MONITOR_URL]",
)  # fmt: skip
@click.option(
    "--fail-under", type=click.Choice(GRADES), metavar="GRADE",
    help="Fail if the durability is worse than this grade, A to D.",
)  # fmt: skip
@json_option
def doctor_command(
    state: AppState, monitor_url: str | None, fail_under: Grade | None, as_json: bool
) -> None:
    """Look for problems, and grade how durable acknowledged messages are.

    A: replicas that write before they acknowledge. B: one server that does, or replicas that do
    not. C: one server with default settings. D: less. The exit code is 1 if there is an error, or
    the grade is under the one asked for. Nothing is changed.
    """
    persistence = state.persistence
    with onlooker(state) as broker:
        facts = gather(
            broker,
            state.settings,
            state.streams(),
            state.subscriptions(),
            persistence.store if persistence else None,
            monitor_url or state.settings.monitor_url,
        )
    diagnosis = examine(facts)
    if as_json:
        print_json({**msgspec.to_builtins(diagnosis), "facts": msgspec.to_builtins(facts)})
    else:
        _print(diagnosis, facts)
    if diagnosis.has_errors or (fail_under is not None and diagnosis.is_under(fail_under)):
        end(1)


def _print(diagnosis: Diagnosis, facts: Facts) -> None:
    server = facts.server
    print_fields(
        [
            ("durability", diagnosis.grade),
            ("server", server.version or None),
            ("writes", _sync(facts)),
            ("streams", ", ".join(f"{one.name} (R{one.replicas})" for one in facts.streams)),
        ]
    )
    for finding in diagnosis.findings:
        click.echo()
        _print_finding(finding)
    if not diagnosis.findings:
        click.echo("\nNothing to complain of.")


def _sync(facts: Facts) -> str:
    if facts.server.sync_always is None:
        return "not known"
    if facts.server.sync_always:
        return "before it acknowledges"
    return f"every {facts.server.sync_interval or 120:g} s"


def _print_finding(finding: Finding) -> None:
    click.secho(f"{finding.severity}: {printable(finding.what)}", fg=_COLOURS[finding.severity])
    if finding.fix:
        click.echo(textwrap.indent(printable(finding.fix), "  "))
