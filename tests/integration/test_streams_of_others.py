"""Streams, consumers and limits that others own, on real servers."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from flask_natspubsub import TopologyError
from flask_natspubsub.brokers.jetstream import pull as pull_module
from flask_natspubsub.doctor.checks import examine
from flask_natspubsub.doctor.gathering import gather
from tests.support.servers import NatsServer
from tests.support.waiting import eventually

from .conftest import MakeShop
from .helpers import api
from .shop import Shop

pytestmark = pytest.mark.real_server

NANO = 1_000_000_000


def make_stream(shop: Shop, name: str | None = None, **config: Any) -> str:
    """Create a stream as somebody else does."""
    name = name or shop.settings.stream
    subjects = [] if "mirror" in config else [f"{shop.settings.env}.shop.>"]
    answer = api(
        shop.settings.urls[0],
        f"STREAM.CREATE.{name}",
        {"name": name, "subjects": subjects, **config},
    )
    assert "error" not in answer, answer
    return name


def make_consumer(shop: Shop, stream: str, durable: str, **config: Any) -> None:
    wanted = {"durable_name": durable, "name": durable, "ack_policy": "explicit", **config}
    answer = api(
        shop.settings.urls[0],
        f"CONSUMER.CREATE.{stream}.{durable}",
        {"stream_name": stream, "config": wanted},
    )
    assert "error" not in answer, answer


def config_of(shop: Shop, stream: str, durable: str) -> dict[str, Any]:
    found: dict[str, Any] = api(shop.settings.urls[0], f"CONSUMER.INFO.{stream}.{durable}")
    return found["config"]  # type: ignore[no-any-return]


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)


# --- limits


def test_a_stream_that_limits_max_ack_pending_is_kept_to(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    stream = make_stream(shop, consumer_limits={"max_ack_pending": 7})
    mailer = shop.record("order.created")
    shop.work()
    shop.publish("order.created", *range(50))
    mailer.wait_for_numbers(range(50))
    assert config_of(shop, stream, "shop-mailer")["max_ack_pending"] == 7
    assert "max_ack_pending is 7, not 1000000: consumer_limits of the stream" in warnings(caplog)
    assert warnings(caplog).count("max_ack_pending is") == 1


@pytest.fixture
def limited() -> Iterator[NatsServer]:
    """A server that limits what consumers and streams may have."""
    server = NatsServer(jetstream=False)
    server.config = f"""jetstream {{
        store_dir: {json.dumps(str(server.folder / "data"))}
        limits {{ max_ack_pending: 20, max_request_batch: 3, duplicate_window: 5s }}
    }}"""
    with server:
        yield server


def test_limits_of_the_server_are_kept_to(
    limited: NatsServer, make_shop: MakeShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(urls=limited.url)
    mailer = shop.record("order.created", concurrency=10)
    shop.publish("order.created", *range(100))
    shop.work()
    mailer.wait_for_numbers(range(100))
    shop.wait_until_settled()
    config = config_of(shop, shop.settings.stream, "shop-mailer")
    assert config["max_ack_pending"] == 20
    info = shop.state.broker().stream_info(shop.settings.stream)
    assert info is not None
    assert info.config.duplicate_window == 5.0
    said = warnings(caplog)
    assert "max_ack_pending is 20, not 1000000" in said
    assert "was made with duplicate_window 5" in said
    assert "Exceeded" not in said
    assert "fell silent" not in said


def test_pulls_keep_to_the_limits_of_a_consumer(shop: Shop) -> None:
    stream = make_stream(shop)
    make_consumer(
        shop,
        stream,
        "shop-mailer",
        filter_subject=shop.subject("order.created"),
        max_batch=2,
        max_expires=2 * NANO,
    )
    mailer = shop.record("order.created", concurrency=10)
    worker = shop.work()
    shop.publish("order.created", *range(60))
    mailer.wait_for_numbers(range(60))
    shop.wait_until_settled()
    assert worker.is_healthy


def test_no_room_for_a_consumer_is_an_error_that_names_the_limit(shop: Shop) -> None:
    stream = make_stream(shop, max_consumers=1)
    make_consumer(shop, stream, "somebody", filter_subject=shop.subject("x"))
    shop.record("order.created")
    with pytest.raises(TopologyError, match=r"no room.*shop-mailer.*max_consumers"):
        shop.work()


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Iterator[NatsServer]:
    """A server with one account, whose limits are the parameter."""
    users = "users: [{user: a, password: a}]"
    with NatsServer(f"accounts {{ A {{ {users}, jetstream: {{ {request.param} }} }} }}") as server:
        yield server


def account_url(server: NatsServer) -> str:
    return server.url.replace("//", "//a:a@")


@pytest.mark.parametrize(
    "account", ["max_mem: 64MB, max_file: 1GB, max_bytes_required: true"], indirect=True
)
def test_an_account_that_wants_max_bytes(
    account: NatsServer, make_shop: MakeShop, caplog: pytest.LogCaptureFixture
) -> None:
    given = make_shop(
        urls=account_url(account),
        env="given",
        stream_config={"max_bytes": 5_000_000},
        dlq_stream_config={"max_bytes": 1_000_000, "max_age": 60},
    )
    given.publish("order.created", 1)
    sizes = {
        name: given.state.broker().stream_info(name)
        for name in (given.settings.stream, given.settings.dead_letter_stream)
    }
    assert [info and info.config.max_bytes for info in sizes.values()] == [5_000_000, 1_000_000]
    assert [info and info.config.max_age for info in sizes.values()] == [7 * 86400.0, 60.0]

    url = account_url(account)
    taken = make_shop(urls=url, env="taken", stream_config={"max_bytes": 3_000_000})
    taken.publish("order.created", 1)
    letters = taken.state.broker().stream_info(taken.settings.dead_letter_stream)
    assert letters is not None
    assert letters.config.max_bytes == 3_000_000
    assert "NATSPUBSUB_DLQ_STREAM_CONFIG" in warnings(caplog)

    missing = make_shop(urls=account_url(account), env="missing")
    with pytest.raises(TopologyError, match=r"max_bytes in NATSPUBSUB_STREAM_CONFIG"):
        missing.state.broker().setup(missing.state.streams())


@pytest.mark.parametrize("account", ["max_mem: 64MB, max_file: 1GB, max_streams: 2"], indirect=True)
def test_the_lock_of_setup_does_not_take_the_last_place(
    account: NatsServer, make_shop: MakeShop
) -> None:
    shop = make_shop(urls=account_url(account))
    shop.state.broker().setup(shop.state.streams())
    names = api(account_url(account), "STREAM.NAMES")["streams"]
    assert sorted(names) == sorted([shop.settings.stream, shop.settings.dead_letter_stream])
    other = make_shop(urls=account_url(account), env="other")
    with pytest.raises(TopologyError, match="max_streams"):
        other.state.broker().setup(other.state.streams())


# --- work queues


def test_a_deleted_consumer_of_a_work_queue_is_made_anew(shop: Shop) -> None:
    stream = make_stream(shop, retention="workqueue")
    mailer = shop.record("order.created")
    worker = shop.work()
    shop.publish("order.created", *range(20))
    mailer.wait_for_numbers(range(20))
    shop.wait_until_settled()
    (consumer,) = worker._consumers
    pull: Any = consumer._consumption
    pull._floor_seen = -pull_module.TIMING.look * 100  # look now: it knows of a floor then
    eventually(lambda: pull._floor.sequence == 20)
    assert api(shop.settings.urls[0], f"CONSUMER.DELETE.{stream}.shop-mailer")["success"]
    shop.publish("order.created", *range(20, 40))
    mailer.wait_for_numbers(range(40))
    assert worker.is_healthy


def test_a_work_queue_whose_subject_has_a_consumer_is_a_clear_error(shop: Shop) -> None:
    stream = make_stream(shop, retention="workqueue")
    make_consumer(shop, stream, "somebody", filter_subject=shop.subject("order.>"))
    shop.record("order.created")
    with pytest.raises(TopologyError, match="is a work queue, and another consumer"):
        shop.work()


@pytest.mark.parametrize("retention", ["limits", "interest"])
def test_doctor_names_a_consumer_whose_subscriber_is_gone(
    make_shop: MakeShop, retention: str
) -> None:
    before = make_shop()
    make_stream(before, retention=retention)
    gone, kept = before.record("order.created", name="gone"), before.record("order.created")
    worker = before.work()
    before.publish("order.created", 1)
    gone.wait(1)
    kept.wait(1)
    worker.stop()
    make_consumer(before, before.settings.stream, "else-where", filter_subject=before.subject("a"))
    now = make_shop()
    now.record("order.created")
    now.publish("order.created", 2, 3)

    facts = gather(
        now.state.broker(),
        now.settings,
        now.state.streams(),
        now.state.subscriptions(),
        None,
    )

    (orphan,) = facts.orphans
    assert (orphan.durable, orphan.subscriber, orphan.is_certain) == ("shop-gone", "gone", True)
    assert (orphan.waiting, orphan.retains) == (2, retention == "interest")
    (finding,) = [one for one in examine(facts).findings if one.code == "consumer-orphaned"]
    assert "subscribers delete gone" in finding.fix
    assert ("keeps 2 messages for it" in finding.what) == (retention == "interest")


# --- mirrors and other streams


def test_a_mirror_is_read_as_the_stream_of_an_app(make_shop: MakeShop) -> None:
    shop = make_shop()
    shop.publish("order.created", 1)
    copy = f"{shop.settings.stream}-copy"
    make_stream(shop, copy, mirror={"name": shop.settings.stream})
    reader = make_shop("reports", env=shop.settings.env, stream_name=copy, use_dlq=False)
    count = reader.record("order.created", producer="shop", name="count")
    worker = reader.work()
    count.wait_for_numbers([1])
    shop.publish("order.created", 2)
    count.wait_for_numbers([1, 2])
    assert worker.is_healthy


def test_a_mirror_is_read_beside_the_stream_of_the_app(make_shop: MakeShop) -> None:
    shop = make_shop()
    shop.publish("order.created", 1)
    copy = f"{shop.settings.stream}-copy"
    make_stream(shop, copy, mirror={"name": shop.settings.stream})
    count = shop.record("order.created", name="count", stream=copy)
    mailer = shop.record("order.created")
    shop.work()
    count.wait_for_numbers([1])
    mailer.wait_for_numbers([1])
    assert count.contexts[0].stream == copy
    durable = f"{shop.settings.env}-shop-count"
    assert shop.state.broker().consumer_info(copy, durable) is not None


def test_the_stream_of_another_team(make_shop: MakeShop) -> None:
    """Found by its subjects, its messages without an envelope, a consumer for each environment."""
    first = make_shop()
    second = make_shop(env=f"{first.settings.env}-b")
    name = f"ORDERS-{first.settings.env}"
    make_stream(first, name, subjects=[f"{name}.>"])
    recorders = [shop.record(subject=f"{name}.>", name="foreign") for shop in (first, second)]
    for shop in (first, second):
        shop.work()
    first.publish_by_hand(
        (f".{name}.new", b'{"id": 1, "total": "9.90"}', {"Nats-Msg-Id": "o-1"}),
        (f".{name}.list", b"[1, 2]", None),
        (f".{name}.blob", b"\xff\x00", None),
        (f".{name}.enveloped", b'{"event_id": "e1", "topic": "t.u", "message": {"n": 3}}', None),
    )
    for recorder in recorders:
        recorder.wait(4)
        assert sorted(map(repr, recorder.messages)) == sorted(
            map(repr, [{"id": 1, "total": "9.90"}, [1, 2], b"\xff\x00", {"n": 3}])
        )
        by_subject = {context.subject: context for context in recorder.contexts}
        new = by_subject[f"{name}.new"]
        assert (new.event_id, new.topic, new.producer) == ("o-1", f"{name}.new", None)
        assert (new.stream, dict(new.envelope), new.raw) == (
            name, {}, b'{"id": 1, "total": "9.90"}'
        )  # fmt: skip
        assert by_subject[f"{name}.enveloped"].topic == "t.u"


def test_a_subject_that_no_stream_has_is_still_an_error(shop: Shop) -> None:
    shop.record(subject=f"nowhere-{shop.settings.env}.>")
    with pytest.raises(TopologyError, match="would get nothing"):
        shop.work()


# --- consumers that we may not change


@pytest.fixture
def infrastructure() -> Iterator[NatsServer]:
    """A server whose worker may neither make nor change a stream or a consumer."""
    with NatsServer(
        """authorization { users: [
          { user: admin, password: a }
          { user: worker, password: a, permissions: {
              publish: ["prod.>", "$JS.API.STREAM.INFO.*", "$JS.API.CONSUMER.INFO.*.*",
                        "$JS.API.CONSUMER.MSG.NEXT.*.*", "$JS.ACK.>",
                        "natspubsub.consumers.prod.shop"]
              subscribe: ["_INBOX.>", "natspubsub.consumers.prod.shop"] } }
        ] }"""
    ) as server:
        yield server


@pytest.fixture
def users(infrastructure: NatsServer, make_shop: MakeShop) -> tuple[Shop, Shop]:
    """An admin and a worker of the same app."""
    url, password = infrastructure.url, "a"
    settings = {"env": "prod", "auto_setup": False, "use_dlq": False, "password": password}
    admin = make_shop(urls=url.replace("//", "//admin:a@"), **{**settings, "password": None})
    worker = make_shop(urls=url.replace("//", "//worker:a@"), **{**settings, "password": None})
    make_stream(admin)
    return admin, worker


def test_a_consumer_that_fits_is_used_as_it_is(
    users: tuple[Shop, Shop], caplog: pytest.LogCaptureFixture
) -> None:
    admin, shop = users
    filters = [shop.subject("order.*"), shop.subject("user.created")]
    make_consumer(
        admin, shop.settings.stream, "shop-mailer", filter_subjects=filters, ack_wait=3 * NANO,
        max_deliver=9,
    )  # fmt: skip
    hold = threading.Event()
    mailer = shop.record("order.created", then=lambda *_: hold.wait(5))
    worker = shop.work()
    admin.publish("order.created", 1)
    mailer.wait_for_numbers([1])  # in hand for longer than the server's ack_wait
    shop.wait_until_settled()
    mailer.wait(1)
    assert worker.is_healthy
    said = warnings(caplog)
    assert "used as it is: ack_wait is 3, not 30" in said
    assert "max_deliver is 9, not -1" in said
    assert said.count("$js.api.consumer.create") == 1, said


def test_what_does_not_fit_is_said(users: tuple[Shop, Shop]) -> None:
    admin, shop = users
    shop.record("order.created", name="none")
    with pytest.raises(TopologyError, match=r"no consumer 'shop-none'.*cannot be made"):
        shop.work()
    stream = shop.settings.stream
    make_consumer(admin, stream, "shop-lacks", filter_subject=shop.subject("order.paid"))
    shop.record("order.created", "order.paid", name="lacks")
    with pytest.raises(TopologyError, match=r"does not get prod\.shop\.order\.created"):
        shop.work(only=["lacks"])
    make_consumer(
        admin, stream, "shop-push", filter_subject=shop.subject("a"), deliver_subject="there"
    )
    shop.record("a", name="push")
    with pytest.raises(TopologyError, match="pushes to a subject"):
        shop.work(only=["push"])
    make_consumer(
        admin, stream, "shop-none", filter_subject=shop.subject("order.created"), ack_policy="none"
    )
    with pytest.raises(TopologyError, match="ack_policy 'none'"):
        shop.work(only=["none"])


# --- domains


@pytest.fixture
def leaf() -> Iterator[NatsServer]:
    """A leaf node with a JetStream of its own; the one of the hub is in the domain ``hub``."""
    accounts = """accounts { A { jetstream: enabled, users: [{user: a, password: a}] },
        SYS { users: [{user: s, password: s}] } }
        system_account: SYS"""
    with ExitStack() as stack:
        hub = NatsServer(jetstream=False, name="hub")
        folder = json.dumps(str(hub.folder / "data"))
        hub.config = (
            f"jetstream {{ domain: hub, store_dir: {folder} }}\n"
            f"leafnodes {{ listen: '127.0.0.1:-1' }}\n{accounts}"
        )
        stack.enter_context(hub)
        port = hub.leafnode_port()
        edge = NatsServer(jetstream=False, name="edge")
        folder = json.dumps(str(edge.folder / "data"))
        edge.config = (
            f"jetstream {{ domain: edge, store_dir: {folder} }}\n"
            f"leafnodes {{ remotes: [{{ url: 'nats://a:a@127.0.0.1:{port}', account: A }}] }}\n"
            f"{accounts}"
        )
        yield stack.enter_context(edge)


@pytest.mark.parametrize(
    "setting", [{"jetstream_domain": "hub"}, {"jetstream_api_prefix": "$JS.hub.API"}]
)
def test_streams_in_the_domain_of_the_hub(
    leaf: NatsServer, make_shop: MakeShop, setting: dict[str, str]
) -> None:
    shop = make_shop(urls=leaf.url.replace("//", "//a:a@"), **setting)
    mailer = shop.record("order.created")
    shop.record("order.refused", name="fails", max_deliver=1, then=lambda *_: 1 / 0)
    eventually(lambda: _is_there(shop), 20, "the leaf node is not connected")
    worker = shop.work()
    shop.publish("order.created", *range(20))
    shop.publish("order.refused", 1)
    mailer.wait_for_numbers(range(20))
    shop.wait_until_settled()
    (letter,) = shop.wait_for_dead_letters(1)
    assert letter.subscriber == "fails"
    assert worker.is_healthy
    here = api(shop.settings.urls[0], "STREAM.NAMES")["streams"]
    assert here is None


def _is_there(shop: Shop) -> bool:
    try:
        shop.state.broker().setup(shop.state.streams())
    except Exception:
        return False
    return True
