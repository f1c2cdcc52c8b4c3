"""What commands print, and the files that ``--reload`` watches."""

from __future__ import annotations

import io
import logging

import click
import pytest

from flask_natspubsub.cli import log, output
from flask_natspubsub.worker.processes.reloader import watched_files


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1w", 604800), ("90", 90),
     ("1.5h", 5400), (" 5m ", 300)],
)  # fmt: skip
def test_durations(text, seconds):
    assert output.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-1m", "1 m", "1y", "1h30m", "inf", "\u0661m"])
def test_what_is_no_duration(text):
    with pytest.raises(click.BadParameter, match="30s, 10m, 2h or 1d"):
        output.duration(text)


def test_text_is_cut_to_the_terminal():
    assert output.cut("abcdef", 4) == "abc…"
    assert output.cut("abcd", 4) == "abcd"
    assert output.cut("abcdef" * 100, None) == "abcdef" * 100


@pytest.fixture
def logger(monkeypatch):
    """The package's logger without handlers, and level, of its own."""
    logger = logging.getLogger("flask_natspubsub")
    monkeypatch.setattr(logger, "handlers", [])
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


def test_logs_are_shown_if_nobody_else_does(logger, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(logger, "propagate", False)  # pytest has handlers at the root

    log.log_to_stderr(logging.INFO)
    logging.getLogger("flask_natspubsub.worker").info("hello %s", "you")
    log.log_to_stderr(logging.INFO)

    assert stream.getvalue().endswith(" INFO    hello you\n")
    assert len(logger.handlers) == 1


@pytest.mark.parametrize("name", ["root", "flask_natspubsub"])
def test_logs_configured_by_the_application_are_left_alone(logger, name):
    configured = logging.getLogger(name)
    handler = logging.NullHandler()
    configured.addHandler(handler)

    log.log_to_stderr(logging.INFO)
    configured.removeHandler(handler)

    assert logger.handlers == []
    assert logger.level == logging.NOTSET


def test_the_projects_files_are_watched_and_no_others(tmp_path):
    for path in ("app.py", "shop/views.py", "shop/logo.svg", ".venv/a.py", "env/lib/b.py",
                 "node_modules/c.py", "shop/__pycache__/d.py"):  # fmt: skip
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "env" / "pyvenv.cfg").touch()

    below = {path for path in watched_files([str(tmp_path)]) if path.startswith(str(tmp_path))}

    assert below == {str(tmp_path / "app.py"), str(tmp_path / "shop" / "views.py")}


def test_loaded_modules_are_watched_unless_installed():
    files = watched_files([])

    assert __file__ in files
    assert output.__file__ in files
    assert logging.__file__ not in files
    assert click.__file__ not in files
