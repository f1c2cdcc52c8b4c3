"""The list of scenarios, with their sizes."""

from __future__ import annotations

from functools import partial

from . import cluster, commits, database, endurance, headline, kills, outages, relays, rewind
from .run import Scenario

SCENARIOS = [
    Scenario("relay-killed", kills.relay_killed, {"kills": 12}, {"kills": 200}),
    Scenario(
        "relay-killed-postgresql",
        partial(kills.relay_killed, database="postgresql"),
        {"kills": 3},
        {"kills": 200},
    ),
    Scenario("relay-killed-late", kills.relay_killed_late, {"kills": 3}, {"kills": 50}),
    Scenario("worker-killed", kills.worker_killed, {"kills": 12}, {"kills": 200}),
    Scenario(
        "worker-killed-postgresql",
        partial(kills.worker_killed, database="postgresql"),
        {"kills": 3},
        {"kills": 200},
    ),
    Scenario(
        "worker-killed-without-inbox",
        kills.worker_killed_without_inbox,
        {"kills": 2},
        {"kills": 20},
    ),
    Scenario("two-copies", kills.two_copies, {"messages": 200}, {"messages": 5000}),
    Scenario(
        "two-copies-postgresql",
        partial(kills.two_copies, database="postgresql"),
        {"messages": 500},
        {"messages": 5000},
    ),
    Scenario("commits-killed", commits.commits_killed, {"kills": 20}, {"kills": 100}),
    Scenario(
        "many-relays",
        relays.many_relays,
        {"relays": 4, "rows": 5_000},
        {"relays": 10, "rows": 100_000},
    ),
    Scenario(
        "stream-rewound",
        rewind.stream_rewound,
        {"rounds": 1, "messages": 200},
        {"rounds": 20, "messages": 5_000},
        limit=3600.0,
    ),
    Scenario("nats-down", outages.nats_down, {"requests": 100}, {"requests": 5_000}),
    Scenario(
        "cluster-leaders",
        cluster.leaders_killed,
        {"rounds": 1, "down_s": 0},
        {"rounds": 40, "down_s": 60},
    ),
    Scenario("idle-restarts", outages.idle_restarts, {"restarts": 3}, {"restarts": 100}),
    Scenario(
        "end-to-end",
        outages.end_to_end,
        {"messages": 500, "kills": 6},
        {"messages": 20_000, "kills": 100},
    ),
    Scenario(
        "headline",
        headline.headline,
        {"messages": 2_000, "kills": 4, "cuts": 1},
        {"messages": 100_000, "kills": 200, "cuts": 50},
        limit=3600.0,
    ),
    Scenario(
        "database-down",
        database.database_down,
        {"rounds": 1, "down_s": 2},
        {"rounds": 5, "down_s": 60},
    ),
    Scenario("soak", endurance.soak, {"messages": 20_000}, {"messages": 1_000_000}),
    Scenario("forks", endurance.forks, {"forks": 10}, {"forks": 1_000}),
]
