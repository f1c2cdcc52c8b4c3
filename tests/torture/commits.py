"""Scenario 4: the database connection is lost around COMMIT.

Some before, some while PostgreSQL commits, and some when it has committed and has not said so:
a stand-by that nobody runs brings this about, since a synchronous commit waits for it for ever.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from tests.support.databases import PostgresServer
from tests.support.waiting import eventually

from .ledger import Result, count
from .run import Run
from .shop import db, place_order
from .site import Site

CLIENTS = 4
#: Longest time from sending a COMMIT to the kill of its connection; seconds.
AROUND = 0.003
_AFTER = "SET LOCAL synchronous_commit = on"
# Also true of a connection that is gone: a kill that came after its COMMIT found it in the hands of
# another client.
_WAITS = """
    SELECT 1 WHERE NOT EXISTS (
        SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event IS DISTINCT FROM 'SyncRep'
    )
"""
_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name IN ('relay', 'worker') ORDER BY random() LIMIT 1
"""


@dataclass
class Tally:
    """Counts of what the clients saw."""

    attempts: int = 0
    kills: int = 0
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def commits_killed(run: Run) -> Result:
    """Check that every committed event is sent and handled, whatever the client was told."""
    with PostgresServer() as server, Site(_with_waiting_commits(server)) as site:
        site.start_relay()
        site.start_worker()
        site.publish(10)
        site.await_effects()  # they have connections now that can be killed
        tally = Tally()
        with ThreadPoolExecutor(2 * CLIENTS) as pool:
            clients = [pool.submit(_client, run, site, pool, server, tally) for _ in range(CLIENTS)]
            for client in clients:
                client.result()
        site.finish()
        result = count(run.name, site, sent=10 + tally.attempts)
        committed = {event_id for (event_id,) in site.rows('SELECT event_id FROM "order"')}
        unknown = len(committed.intersection(tally.failed))
        result.facts = {
            "kills": tally.kills,
            "not committed": len(tally.failed) - unknown,
            "committed unknown to the client": unknown,
        }
        result.expect(unknown > 0, "no commit ended unknown")
        result.expect(len(tally.failed) > unknown, "no commit was prevented")
        result.expect(site.stored == len(committed), "messages in the stream and rows differ")
    return result


def _with_waiting_commits(server: PostgresServer) -> str:
    """Make a database in which a synchronous commit waits for ever; others do not."""
    url = server.url("torture")
    server.execute("ALTER DATABASE torture SET synchronous_commit = local")
    server.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    server.execute("SELECT pg_reload_conf()")
    return url


def _client(
    run: Run, site: Site, pool: ThreadPoolExecutor, server: PostgresServer, tally: Tally
) -> None:
    kills = run.size["kills"]
    dice = random.Random(run.random.random())
    while tally.kills < kills:
        run.progress("kills", tally.kills, kills)
        with site.app.app_context():
            event_id = place_order(site.pubsub)
            killer = _commit(dice, pool, server, tally, event_id)
        if killer is not None and killer.result():
            with tally.lock:
                tally.kills += 1
                if tally.kills % 10 == 0:
                    server.execute(_OTHERS)


def _commit(
    dice: random.Random,
    pool: ThreadPoolExecutor,
    server: PostgresServer,
    tally: Tally,
    event_id: str,
) -> Future[bool] | None:
    tally.attempts += 1
    killer = None
    try:
        db.session.flush()
        pid = db.session.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        how = dice.choice(["leave", "leave", "before", "around", "after"])
        if how == "after":
            db.session.execute(sa.text(_AFTER))
        if how != "leave":
            killer = pool.submit(_kill, server, pid, how, dice.uniform(0, AROUND))
        if how == "before" and killer is not None:
            killer.result()
        db.session.commit()
    except OperationalError:
        db.session.rollback()
        tally.failed.append(event_id)
    return killer


def _kill(server: PostgresServer, pid: int, how: str, delay: float) -> bool:
    with _superuser(server) as connection:
        try:
            if how == "after":
                eventually(lambda: connection.execute(_WAITS, [pid]).fetchone(), 10, interval=0.001)
            elif how == "around":
                threading.Event().wait(delay)
        finally:  # or it would wait for ever
            killed = connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid]).fetchone()
    return bool(killed and killed[0])


@contextmanager
def _superuser(server: PostgresServer) -> Iterator[psycopg.Connection]:
    url = sa.make_url(server.url())
    with psycopg.connect(
        host=str(url.query["host"]), user="postgres", dbname="postgres", autocommit=True
    ) as connection:
        yield connection
