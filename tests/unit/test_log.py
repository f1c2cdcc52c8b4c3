"""The worker's log on stderr: complete, in order, cheap, and never in the way."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import pickle
import threading

import pytest

from flask_natspubsub.cli import log
from flask_natspubsub.cli.log import LineWriter
from flask_natspubsub.worker.outcome import Outcome, OutcomeRecord, report
from tests.support.waiting import eventually

WORKER = logging.getLogger("flask_natspubsub.worker")
HANDLED = Outcome("handled", "order.created", "e1", 2, 0.00342, subscriber="mailer")
LINE = "order.created e1 mailer #2 3.4 ms handled"


@pytest.fixture
def attach(monkeypatch):
    """Make a writer the only one that gets the package's records."""
    writers = []

    def attach(stream, **options):
        writer = LineWriter(stream, **options)
        writers.append(writer)
        package = logging.getLogger("flask_natspubsub")
        monkeypatch.setattr(package, "handlers", [writer])
        monkeypatch.setattr(package, "propagate", False)
        monkeypatch.setattr(WORKER, "level", logging.DEBUG)
        return writer

    # What is kept stays until a test has it written.
    monkeypatch.setattr(log, "HOLD", 60.0)
    WORKER.manager._clear_cache()
    yield attach
    for writer in writers:
        writer.close()
    WORKER.manager._clear_cache()


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", 0) as reader, os.fdopen(writing, "w") as writer:
        yield reader, writer


# --- the record


def test_the_record_of_a_message_has_what_all_records_have():
    usual = WORKER.makeRecord(WORKER.name, logging.INFO, "x.py", 1, "%s", (1,), None)

    record = OutcomeRecord(HANDLED)

    assert set(vars(usual)) <= set(vars(record))
    assert record.getMessage() == record.line() == LINE
    assert (record.levelno, record.levelname, record.name) == (20, "INFO", WORKER.name)
    assert (record.event_id, record.result, record.subscriber) == ("e1", "handled", "mailer")
    assert record.process == os.getpid()
    assert record.threadName == threading.current_thread().name
    assert record.filename == "outcome.py"
    assert record.msecs == int(record.created * 1000) % 1000
    assert abs(record.relativeCreated - usual.relativeCreated) < 5000


def test_a_record_that_another_thread_formats_keeps_its_own():
    made = []
    thread = threading.Thread(target=lambda: made.append(OutcomeRecord(HANDLED)), name="other")
    thread.start()
    thread.join()

    assert made[0].thread == thread.ident
    assert logging.Formatter("%(threadName)s").format(made[0]) != threading.current_thread().name


@pytest.mark.parametrize("again", [copy.copy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_record_can_be_copied_and_sent_on(again):
    record = again(OutcomeRecord(HANDLED))

    assert (
        logging.Formatter("%(levelname)s %(message)s %(lineno)d")
        .format(record)
        .startswith(f"INFO {LINE} ")
    )


def test_a_record_takes_what_filters_add():
    record = OutcomeRecord(HANDLED)
    record.trace_id = "t1"

    assert logging.Formatter("%(trace_id)s %(message)s").format(record) == f"t1 {LINE}"
    with pytest.raises(AttributeError, match="unknown"):
        _ = record.unknown


def test_a_factory_of_the_application_makes_the_records(caplog):
    class Own(logging.LogRecord):
        pass

    caplog.set_level(logging.INFO, WORKER.name)
    logging.setLogRecordFactory(Own)
    try:
        report(HANDLED)
    finally:
        logging.setLogRecordFactory(logging.LogRecord)

    assert [type(record) for record in caplog.records] == [Own]
    assert caplog.messages == [LINE]


def test_a_log_handler_that_fails_does_not_decide_on_the_message(monkeypatch):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("no room")

    monkeypatch.setattr(WORKER, "handlers", [Broken()])

    report(HANDLED)


def test_a_filter_of_the_application_may_change_the_line(attach, monkeypatch):
    def redact(record):
        record.msg, record.args = "redacted", ()
        return True

    stream = io.StringIO()
    writer = attach(stream)
    for owner in (WORKER, writer):
        monkeypatch.setattr(owner, "filters", [*owner.filters, redact])
        report(HANDLED)
        owner.filters.remove(redact)
        report(HANDLED)
    writer.flush()

    lines = [line.split("INFO    ")[1] for line in stream.getvalue().splitlines()]
    assert lines == ["redacted", LINE, "redacted", LINE]


def test_after_its_end_each_line_is_written_at_once(attach):
    stream = io.StringIO()
    attach(stream).close()

    report(HANDLED)

    assert LINE in stream.getvalue()


# --- when it is written


def test_lines_of_messages_are_written_together_and_look_like_others(attach):
    stream = io.StringIO()
    writer = attach(stream, with_pid=True)
    for _ in range(3):
        report(HANDLED)
    assert stream.getvalue() == ""

    writer.flush_before()

    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    record = OutcomeRecord(HANDLED)
    writer._kept.append(record)
    writer.flush()
    assert stream.getvalue().splitlines()[-1] == writer.format(record)


def test_any_other_line_is_written_at_once_after_those_before_it(attach):
    stream = io.StringIO()
    attach(stream)
    report(HANDLED)

    WORKER.info("stopped")
    report(Outcome("retried", "order.created", "e2", 1, 0.1, "KeyError: 'id'", "mailer"))

    assert [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()] == [
        f"INFO    {LINE}",
        "INFO    stopped",
        "WARNING order.created e2 mailer #1 100.0 ms retried: KeyError: 'id'",
    ]


def test_a_line_is_written_soon_by_itself(attach, monkeypatch):
    monkeypatch.setattr(log, "HOLD", 0.01)
    stream = io.StringIO()
    attach(stream)

    for count in (1, 2):
        report(HANDLED)
        eventually(lambda count=count: stream.getvalue().count(LINE) == count)


def test_what_is_kept_is_bounded(attach, monkeypatch):
    monkeypatch.setattr(log, "BUFFER_LIMIT", 10)
    stream = io.StringIO()
    attach(stream)

    for _ in range(11):
        report(HANDLED)

    assert stream.getvalue().count(LINE) == 11


def test_lines_of_processes_that_share_a_pipe_are_not_cut(attach, pipe):
    reader, stream = pipe
    writer = attach(stream)
    for _ in range(200):
        report(HANDLED)
    while writer._kept:
        writer._write_some()
        part = reader.read(65_536)
        assert part.endswith(b"handled\n")
        assert len(part) <= log.PIPE_CHUNK


def test_a_pipe_that_nobody_reads_does_not_hold_up_the_acknowledgements(attach, pipe):
    reader, stream = pipe
    writer = attach(stream)
    os.set_blocking(stream.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(stream.fileno(), b"x" * 4096)
    os.set_blocking(stream.fileno(), True)
    report(HANDLED)

    writer.flush_before()
    blocked = threading.Thread(target=writer.flush, daemon=True)
    blocked.start()
    eventually(lambda: writer._is_writing)
    writer.flush_before()

    while LINE.encode() not in reader.read(65_536):
        pass
    blocked.join(10)


def test_whoever_logs_while_it_writes_does_not_wait_for_himself(attach):
    class Stream(io.StringIO):
        def write(self, text):
            if "first" in text:
                WORKER.info("second")
            return super().write(text)

    stream = Stream()
    attach(stream)

    thread = threading.Thread(target=WORKER.info, args=("first",), daemon=True)
    thread.start()
    thread.join(5)

    assert not thread.is_alive()
    assert "second" in stream.getvalue()
    assert "first" in stream.getvalue()


def test_a_stream_that_is_closed_is_no_error(attach):
    stream = io.StringIO()
    writer = attach(stream)
    report(HANDLED)
    stream.close()

    writer.flush_before()

    assert not writer._kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_write_what_its_parent_keeps(attach, tmp_path):
    with (tmp_path / "log").open("w") as stream:
        writer = attach(stream)
        report(HANDLED)
        child = os.fork()
        if not child:
            writer.flush()
            report(HANDLED)
            writer.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        writer.flush()

    assert (tmp_path / "log").read_text().count(LINE) == 2


def test_what_others_have_sent_writes_no_line_of_its_own(attach):
    stream = io.StringIO()
    writer = attach(stream)
    report(Outcome("handled", "a\x1b[2J\nb", "e\r1", 1, 0.001, subscriber="s"))

    writer.flush()

    assert stream.getvalue().endswith("a\\x1b[2J\\nb e\\r1 s #1 1.0 ms handled\n")
