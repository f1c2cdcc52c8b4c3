"""The doctor: each fault that is put into sound facts is found, and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from flask_natspubsub import ConfigurationError, TopologyError
from flask_natspubsub.brokers.base import StreamConfig, StreamInfo
from flask_natspubsub.brokers.topology import refuse_volatile
from flask_natspubsub.config.parsers import DAY
from flask_natspubsub.config.settings import Settings
from flask_natspubsub.doctor.checks import examine, version_of
from flask_natspubsub.doctor.facts import (
    ConsumerFacts,
    Facts,
    OutboxFacts,
    ServerFacts,
    StreamFacts,
)
from flask_natspubsub.doctor.gathering import gather, server_facts
from flask_natspubsub.inspection import OrphanFacts

SOUND = Facts(
    server=ServerFacts(
        version="2.12.4", sync_interval=120.0, sync_always=True, cluster_size=3, monitor_problem=""
    ),
    streams=(
        StreamFacts(name="main", replicas=3, discard="new", max_age=7 * DAY),
        StreamFacts(name="main-dlq", replicas=3, is_main=False),
    ),
    consumers=(ConsumerFacts(name="mailer", exists=True),),
    outbox=OutboxFacts(),
)


def but(part: str, **values: Any) -> Facts:
    """Sound facts but for some values of one part."""
    if part == "facts":
        return msgspec.structs.replace(SOUND, **values)
    found: Any = getattr(SOUND, part)
    if isinstance(found, tuple):
        changed: Any = (msgspec.structs.replace(found[0], **values), *found[1:])
    else:
        changed = msgspec.structs.replace(found, **values)
    return msgspec.structs.replace(SOUND, **{part: changed})


FAULTS = [
    (but("server", version="2.10.22"), "server-old", "error", "D"),
    (but("server", version="2.9.0"), "server-old", "error", "D"),
    (but("server", version="2.10.26"), "server-cve", "warning", "A"),
    (but("server", version="2.11.0"), "server-cve", "warning", "A"),
    (but("server", monitor_problem="refused"), "monitor", "warning", "A"),
    (but("server", sync_always=None), "sync-unknown", "info", "B"),
    (
        but("consumers", missing_subjects=("a.b",), extra_subjects=()),
        "consumer-differs",
        "warning",
        "A",
    ),
    (but("consumers", extra_subjects=("a.b",)), "consumer-shared", "info", "A"),
    (
        but("facts", orphans=(OrphanFacts(stream="main", durable="shop-x", subscriber="x"),)),
        "consumer-orphaned",
        "warning",
        "A",
    ),
    (
        but(
            "facts",
            orphans=(
                OrphanFacts(stream="main", durable="shop-x", subscriber="x", is_certain=False),
            ),
        ),
        "consumer-orphaned",
        "info",
        "A",
    ),
    (but("streams", exists=False), "stream-missing", "error", "D"),
    (but("streams", storage="memory"), "memory-storage", "error", "D"),
    (but("streams", persist_mode="async"), "persist-async", "error", "D"),
    (but("streams", replicas=2), "replicas", "warning", "B"),
    (but("streams", retention="workqueue"), "retention", "warning", "A"),
    (but("streams", discard="old"), "discard-old", "info", "A"),
    (but("streams", duplicate_window=10.0), "duplicate-window", "warning", "A"),
    (but("facts", setup_problem="taken"), "setup", "error", "A"),
    (but("facts", setup=(("add_subjects", "main", "a.>"),)), "subjects-missing", "error", "A"),
    (but("facts", setup=(("differs", "main", "storage"),)), "stream-differs", "warning", "A"),
    (but("facts", unbound=("a.b",)), "subject-unbound", "error", "A"),
    (but("consumers", exists=False), "consumer-missing", "info", "A"),
    (but("consumers", missing_subjects=("a.b",)), "consumer-differs", "warning", "A"),
    (but("consumers", ack_wait=1.0), "ack-wait", "warning", "A"),
    (but("consumers", inbox=False), "no-inbox", "info", "A"),
    (but("facts", outbox=None), "no-outbox", "info", "A"),
    (but("outbox", retention=3600.0), "outbox-retention", "warning", "A"),
    (but("outbox", retention=7 * DAY), "inbox-retention", "warning", "A"),
    (but("streams", max_age=0.0), "inbox-stream", "info", "A"),
    (but("outbox", rewound=(("main", "it is gone"),)), "rewound", "error", "D"),
    (but("outbox", parked=2), "parked", "error", "A"),
    (but("outbox", oldest_pending=60.0), "stuck", "error", "A"),
    (but("outbox", has_relay=False), "no-relay", "warning", "A"),
    (but("outbox", savepoints=False), "sqlite-savepoints", "warning", "A"),
]


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    diagnosis = examine(SOUND)

    assert diagnosis.findings == ()
    assert diagnosis.grade == "A"
    assert not diagnosis.has_errors


@pytest.mark.parametrize(("facts", "code", "severity", "grade"), FAULTS, ids=lambda v: str(v)[:20])
def test_a_fault_is_found(facts: Facts, code: str, severity: str, grade: str) -> None:
    diagnosis = examine(facts)

    assert [(one.code, one.severity) for one in diagnosis.findings] == [(code, severity)]
    assert diagnosis.grade == grade
    assert diagnosis.has_errors == (severity == "error")
    assert diagnosis.findings[0].what.strip()


def test_one_server_with_default_settings() -> None:
    alone = msgspec.structs.replace(
        but("streams", replicas=1),
        server=ServerFacts(version="2.12.4", sync_interval=120.0, sync_always=False),
    )
    diagnosis = examine(alone)

    assert diagnosis.grade == "C"
    assert [one.code for one in diagnosis.findings] == ["sync-interval"]
    assert "120 s" in diagnosis.findings[0].what
    assert diagnosis.is_under("B")
    assert not diagnosis.is_under("C")


def test_one_server_that_writes_before_it_acknowledges() -> None:
    alone = msgspec.structs.replace(
        but("streams", replicas=1), server=ServerFacts(version="2.12.4", sync_always=True)
    )
    assert examine(alone).grade == "B"


def test_the_worst_comes_first() -> None:
    facts = msgspec.structs.replace(but("streams", storage="memory", discard="old"), unbound=("a",))
    severities = [one.severity for one in examine(facts).findings]
    assert severities == ["error", "error", "info"]


@pytest.mark.parametrize("fault", [{"storage": "memory"}, {"persist_mode": "async"}])
def test_what_is_allowed_is_a_warning_and_no_better(fault: dict[str, str]) -> None:
    facts = msgspec.structs.replace(but("streams", **fault), allow_volatile=True)
    diagnosis = examine(facts)
    assert [one.severity for one in diagnosis.findings] == ["warning"]
    assert diagnosis.grade == "D"


def test_versions() -> None:
    assert version_of("2.10.23") == version_of("v2.10.23-RC.1") == (2, 10, 23)
    assert version_of("") == version_of("new") == ()


# --- what the monitoring says


def test_monitoring_of_one_server() -> None:
    config = {"sync_interval": 120_000_000_000, "store_dir": "/data"}
    found = server_facts({"version": "2.12.1", "jetstream": {"config": config}}, {}, "2.0.0")
    assert found == ServerFacts(
        version="2.12.1", sync_interval=120.0, sync_always=False, cluster_size=1
    )


def test_monitoring_of_a_cluster() -> None:
    found = server_facts(
        {"cluster": {"urls": ["a", "b"]}},
        {"config": {"sync_always": True}, "meta_cluster": {"cluster_size": 3}},
        "2.12.1",
    )
    assert found == ServerFacts(version="2.12.1", sync_always=True, cluster_size=3)


def test_a_monitoring_address_must_be_one_of_http() -> None:
    settings = Settings.from_config({"NATSPUBSUB_PRESET": "testing"}, "shop")
    with pytest.raises(ConfigurationError, match="no HTTP address"):
        gather(_NoBroker(), settings, (), (), None, "file:///etc/passwd")  # type: ignore[arg-type]


class _NoBroker:
    server_version = ""

    def setup(self, *_: object, **__: object) -> list[Any]:
        return []


# --- refused from the start


def test_memory_is_refused_for_the_outbox() -> None:
    values = {"NATSPUBSUB_USE_OUTBOX": True, "NATSPUBSUB_STREAM_CONFIG": {"storage": "memory"}}
    with pytest.raises(ConfigurationError, match="storage 'memory'"):
        Settings.from_config(values, "shop")
    Settings.from_config(values | {"NATSPUBSUB_ALLOW_VOLATILE_STREAMS": True}, "shop")
    Settings.from_config(values | {"NATSPUBSUB_URLS": "memory://"}, "shop")
    Settings.from_config(values | {"NATSPUBSUB_USE_OUTBOX": False}, "shop")


@pytest.mark.parametrize("fault", ["memory", "async"])
def test_an_existing_stream_that_does_not_keep_is_refused(fault: str) -> None:
    storage, mode = ("memory", "default") if fault == "memory" else ("file", "async")
    info = StreamInfo(
        config=StreamConfig(name="main", subjects=("a.>",), storage=storage), persist_mode=mode
    )
    strict = Settings.from_config({}, "shop")
    with pytest.raises(TopologyError, match=fault):
        refuse_volatile(info, strict)
    refuse_volatile(None, strict)
    refuse_volatile(info, Settings.from_config({"NATSPUBSUB_ALLOW_VOLATILE_STREAMS": True}, "shop"))
