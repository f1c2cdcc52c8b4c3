"""``publish`` and ``tail``: publish one message, and watch those that are published."""

from __future__ import annotations

import base64
import datetime as dt
import itertools
import queue
import sys
from collections.abc import Iterator
from typing import Any

import click
import msgspec

from ..app.state import AppState
from ..errors import DecodingError
from ..messages.codec import decode_object, encode_value
from ..messages.headers import for_json
from ..messages.message import Message, StoredMessage
from ..messages.received import Received, read_or_none
from ..messages.subjects import filter_for, topic_of
from ..publishing.draft import Draft
from ..text import printable
from .group import natspubsub, onlooker
from .output import cut, json_option, print_fields, print_json, width

#: Limit of messages that wait to be printed; beyond it, the oldest are dropped.
TAIL_BUFFER = 10_000


def _message(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    data = sys.stdin.buffer.read() if value == "-" else value.encode()
    try:
        return decode_object(data)
    except DecodingError as error:
        raise click.BadParameter(f"{error} Give an object such as '{{\"id\": 1}}'.") from None


def _headers(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE.")
        headers[name] = text
    return headers


@natspubsub.command(
    "publish",
    examples=[
        """flask natspubsub publish order.created '{"order_id": 1}'""",
        "flask natspubsub publish order.created - < order.json",
    ],
)
@click.argument("topic")
@click.argument("message", metavar="JSON", callback=_message)
@click.option("--event-id", help="Id by which a second copy is known.  [default: a new UUID]")
@click.option(
    "--header",
    "headers",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_headers,
    help="A header to send along; may be repeated.",
)
@click.option("--trace-id", help="Trace id of the message.  [default: none]")
@json_option
def publish_command(
    state: AppState,
    topic: str,
    message: dict[str, Any],
    event_id: str | None,
    headers: dict[str, str],
    trace_id: str | None,
    as_json: bool,
) -> None:
    """Publish one message and wait until it is stored.

    JSON is an object; "-" reads it from stdin.
    """
    draft = Draft(topic, message, event_id=event_id, headers=headers, trace_id=trace_id)
    receipt = state.publisher.publish(draft)
    if as_json:
        print_json(msgspec.structs.asdict(receipt))
        return
    again = " (the stream had this event id already)" if receipt.duplicate else ""
    print_fields(
        [
            ("subject", receipt.subject),
            ("stream", receipt.stream),
            ("sequence", f"{receipt.sequence}{again}"),
            ("event id", receipt.event_id),
        ]
    )


@natspubsub.command(
    "tail", examples=["flask natspubsub tail", "flask natspubsub tail 'order.*' --count 10 --json"]
)
@click.argument("topic", default=">")
@click.option(
    "--producer", default="*", show_default=True, help="App whose messages to show; * for all."
)
@click.option(
    "--count",
    "-n",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N messages.  [default: never]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def tail_command(
    state: AppState, topic: str, producer: str, count: int | None, as_json: bool
) -> None:
    """Show messages as they are published, from now on, until Ctrl-C.

    TOPIC may have wildcards: * is one word, > any number of them at the end. Messages are
    only watched: their subscribers get them all the same.
    """
    subject = filter_for(state.settings.env, producer, topic)
    dead_letters = f"{state.settings.env}.dlq."
    show = _print_json_line if as_json else _print_line
    waiting: queue.Queue[Message] = queue.Queue(TAIL_BUFFER)

    def keep(message: Message) -> None:
        if producer == "dlq" or not message.subject.startswith(dead_letters):
            try:
                waiting.put_nowait(message)
            except queue.Full:
                waiting.get_nowait()
                waiting.put_nowait(message)

    with onlooker(state) as broker:
        broker.listen(subject, keep)
        broker.stream_info(state.settings.stream)  # its answer shows that the subscription is there
        try:
            where = state.settings.safe_urls
            click.echo(f"Listening to {subject} at {where}; Ctrl-C ends.", err=True)
            for message in itertools.islice(_received(waiting), count):
                show(message)
        except KeyboardInterrupt:
            click.echo(err=True)


def _received(waiting: queue.Queue[Message]) -> Iterator[Message]:
    while True:
        yield waiting.get()


def _read(message: Message) -> Received | None:
    return read_or_none(StoredMessage(message.subject, message.data, message.headers, "-", 0, 0.0))


def _print_line(message: Message) -> None:
    known = _read(message)
    topic = known.topic if known else topic_of(message.subject)
    body = encode_value(known.message) if known else message.data
    line = "  ".join(
        [
            f"{dt.datetime.now().astimezone():%H:%M:%S}",
            printable(topic).ljust(24),
            printable(known.event_id if known else "-")[-8:].ljust(8),
            printable((known and known.producer) or "-").ljust(12),
            "" if known else "(not a message)",
            printable(body.decode("utf-8", "backslashreplace")),
        ]
    )
    click.echo(cut(line, width()))


def _print_json_line(message: Message) -> None:
    known = _read(message)
    fields: dict[str, Any] = {"subject": message.subject, "headers": for_json(message.headers)}
    if known is None:
        fields |= {"topic": topic_of(message.subject), "message": None}
        fields["raw_base64"] = base64.b64encode(message.data).decode()
    else:
        fields |= {
            "topic": known.topic,
            "event_id": known.event_id,
            "producer": known.producer,
            "trace_id": known.trace_id,
            "message": known.message,
        }
    print_json(fields, indent=None)
