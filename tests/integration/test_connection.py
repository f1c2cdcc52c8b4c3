"""The connection to a real nats-server: made, lost, refused, secured, shared and closed."""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from pathlib import Path
from typing import Any

import nkeys
import pytest

from flask_natspubsub import (
    BrokerError,
    ConfigurationError,
    NatsPubsub,
    NotConnected,
    PublishError,
    TopologyError,
)
from flask_natspubsub.brokers.jetstream import client, link
from flask_natspubsub.brokers.topology import wanted_streams
from tests.conftest import MakePubsub
from tests.support.fake_server import FakeServer
from tests.support.proxy import Proxy
from tests.support.secrets import SECRET
from tests.support.servers import NatsServer, free_port
from tests.support.waiting import eventually, for_seconds

from .helpers import api, at_most, count, event_ids, refusal, stored, up

pytestmark = pytest.mark.real_server


# --- no server


def test_without_a_server_a_publish_ends_in_time_and_names_the_address(
    make_pubsub: MakePubsub, no_secret_in_the_log: None
) -> None:
    port = free_port()
    pubsub = make_pubsub(urls=f"nats://user:{SECRET}@127.0.0.1:{port}")

    with at_most(1.5), pytest.raises(NotConnected) as caught:
        pubsub.publish("a", {}, timeout=1)

    assert f"nats://***@127.0.0.1:{port}" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.outcome == "not_sent"
    assert caught.value.temporary
    assert not up(pubsub)


def test_is_connected_waits_no_longer_than_the_connect_timeout(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls=f"nats://127.0.0.1:{free_port()}", connect_timeout=0.3)

    with at_most(1.0):
        assert not pubsub.is_connected


def test_a_name_that_does_not_exist_is_no_server_either(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls="nats://no-such-host.invalid:4222")

    with at_most(3), pytest.raises(NotConnected, match=r"no-such-host\.invalid"):
        pubsub.publish("a", {}, timeout=2)


def test_a_server_that_says_nothing_is_given_up(make_pubsub: MakePubsub) -> None:
    with FakeServer(b"") as mute:
        pubsub = make_pubsub(urls=mute.url, connect_timeout=0.3)

        with at_most(2), pytest.raises(NotConnected, match="does not answer"):
            pubsub.publish("a", {}, timeout=1)


@pytest.mark.parametrize("greeting", [b"220 smtp.example.com\r\n", b"INFO {oops\r\n", b"\x00" * 64])
def test_something_else_than_a_nats_server(make_pubsub: MakePubsub, greeting: bytes) -> None:
    with FakeServer(greeting) as other:
        pubsub = make_pubsub(
            urls=other.url, connect_timeout=0.3, user="u", password=SECRET, breaker_threshold=0
        )

        with at_most(2), pytest.raises(NotConnected):
            pubsub.publish("a", {}, timeout=1)

        assert b"CONNECT" not in other.received


def test_a_server_that_is_too_old_is_refused_by_its_version(make_pubsub: MakePubsub) -> None:
    with FakeServer({"version": "2.9.25"}) as old:
        pubsub = make_pubsub(urls=old.url)

        assert "nats-server 2.9.25 is too old, 2.10.23 or newer is needed" in refusal(pubsub)


def test_a_server_without_jetstream_is_named_as_such(make_pubsub: MakePubsub) -> None:
    with NatsServer(jetstream=False) as server:
        pubsub = make_pubsub(urls=server.url)

        with at_most(3), pytest.raises(PublishError) as caught:
            pubsub.publish("a", {})
        assert caught.value.outcome == "not_sent"


def test_of_several_servers_one_is_enough(make_pubsub: MakePubsub, nats_server: NatsServer) -> None:
    urls = [f"nats://127.0.0.1:{free_port()}", nats_server.url, "nats://no-such-host.invalid"]
    pubsub = make_pubsub(urls=urls)

    assert pubsub.publish("a", {}).sequence == 1


# --- a server that appears, goes and comes back


def test_a_server_that_appears_later_is_found(make_pubsub: MakePubsub) -> None:
    with NatsServer() as server:
        server.stop()
        pubsub = make_pubsub(urls=server.url)
        future = pubsub.publish_nowait("a", {}, timeout=20)
        assert not up(pubsub)
        assert not future.done()

        server.start()

        assert future.result(10).sequence == 1
        assert up(pubsub)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_after_a_restart_the_connection_is_back(make_pubsub: MakePubsub, how: str) -> None:
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url)
        pubsub.publish("a", {})

        for round_number in range(3):
            getattr(server, how)()
            eventually(lambda: not up(pubsub))
            server.start()
            with at_most(5):
                eventually(lambda: up(pubsub))
            assert pubsub.publish("a", {}).sequence == round_number + 2


def test_streams_that_a_restart_has_lost_are_made_anew(make_pubsub: MakePubsub) -> None:
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url, stream_config={"storage": "memory"})
        pubsub.publish("a", {})
        server.kill()
        server.start()

        assert pubsub.publish("a", {}, timeout=10).sequence == 1


def test_it_never_stops_trying(make_pubsub: MakePubsub, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried = link.TIMING._replace(first_pause=0.001, longest_pause=0.001)
    monkeypatch.setattr(link, "TIMING", hurried)
    tries = []
    dial = client.dial

    async def counting(*arguments: Any) -> Any:
        tries.append(arguments)
        return await dial(*arguments)

    monkeypatch.setattr(client, "dial", counting)
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url)
        pubsub.publish("a", {})
        server.stop()
        eventually(lambda: len(tries) > 100, 20)

        server.start()

        assert pubsub.publish("a", {}).sequence == 2


def test_pauses_between_tries_grow_and_differ(
    make_pubsub: MakePubsub, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    dial = client.dial

    async def timed(*arguments: Any) -> Any:
        times.append(time.monotonic())
        return await dial(*arguments)

    monkeypatch.setattr(client, "dial", timed)
    pubsub = make_pubsub(urls=f"nats://127.0.0.1:{free_port()}")
    pubsub.publish_nowait("a", {}, timeout=0.1)
    eventually(lambda: len(times) >= 6)

    pauses = [after - before for before, after in pairwise(times)]
    assert len(times) < 20
    assert pauses[4] > 2 * pauses[0]
    assert all(pause < 1.5 * link.TIMING.longest_pause + 0.5 for pause in pauses)


def test_a_server_that_hangs_up_at_once_is_not_called_without_pause(
    make_pubsub: MakePubsub,
) -> None:
    with NatsServer() as server, Proxy(server.port) as proxy:
        server.stop()
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish_nowait("a", {}, timeout=0.1)

        for_seconds(1.5, lambda: None)

        assert 3 <= proxy.accepted <= 15


def test_the_log_has_one_line_now_and_then_while_the_server_is_away(
    make_pubsub: MakePubsub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert link.TIMING.log_interval >= 10
    hurried = link.TIMING._replace(log_interval=0.5, longest_pause=0.02)
    monkeypatch.setattr(link, "TIMING", hurried)
    with NatsServer() as server:
        pubsub = make_pubsub(urls=server.url)
        pubsub.publish("a", {})
        caplog.clear()
        server.stop()
        for_seconds(2.2, lambda: None)
        lines = [r for r in caplog.records if r.name == "flask_natspubsub.broker"]

    assert lines[0].getMessage() == "lost the connection to NATS; reconnecting"
    assert 2 <= len(lines) <= 6
    assert all("Still trying" in line.getMessage() for line in lines[1:])


@pytest.mark.parametrize("kilobytes", [0, 900])
def test_a_link_that_has_gone_dead_is_found_and_replaced(
    make_pubsub: MakePubsub,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kilobytes: int,
) -> None:
    assert client.PING_INTERVAL * (client.UNANSWERED_PINGS + 1) < 30
    monkeypatch.setattr(client, "PING_INTERVAL", 0.3)
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish("a", {})
        proxy.hold()
        caplog.clear()

        # 18 MB, so that the buffers of both ends are full and the socket takes no more.
        futures = [
            pubsub.publish_nowait("a", {"x": "y" * kilobytes * 1000}, event_id=f"e{n}", timeout=15)
            for n in range(20)
        ]

        with at_most(5):
            wait(futures, 10)
        assert proxy.accepted == 2
        assert [future.result(0).sequence for future in futures] == list(range(2, 22))
        assert up(pubsub)
        pubsub.shutdown()
        gc.collect()  # a task that failed unseen is logged when it is collected
    assert caplog.messages == ["lost the connection to NATS; reconnecting"]


def test_a_subscription_that_was_given_up_does_no_harm_to_the_connection(
    make_pubsub: MakePubsub, nats_server: NatsServer, env: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py would read no more once the answer to its ping comes after all."""
    monkeypatch.setattr(link, "TIMING", link.TIMING._replace(subscribing=0.2))
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        broker = pubsub.state().broker()
        pubsub.publish("a", {})
        heard: list[bytes] = []
        kept = broker.listen(f"{env}.kept", lambda message: heard.append(message.data))
        proxy.hold()
        with pytest.raises(BrokerError, match=f"Could not listen to {env}.given.up"):
            broker.listen(f"{env}.given.up", lambda message: None)
        kept.stop()
        proxy.release()

        assert pubsub.publish("a", {}, timeout=3).sequence == 2
        assert broker.stream_info(f"{env}-events-stream") is not None
        broker.listen(f"{env}.more", lambda message: heard.append(message.data))
        broker.send(f"{env}.more", b"more")
        eventually(lambda: heard == [b"more"])
        assert proxy.accepted == 1
        pubsub.shutdown()


# --- signing in


def sign_in(kind: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Configuration of a server, and the settings that fit it."""
    if kind == "user":
        text = f"authorization {{ user: shop, password: {SECRET} }}"
        return text, {"user": "shop", "password": SECRET}
    if kind == "token":
        return f"authorization {{ token: {SECRET} }}", {"token": SECRET}
    if kind == "nkey":
        public, seed = user_nkey()
        file = folder / "user.nk"
        file.write_bytes(seed)
        text = f"authorization {{ users: [ {{ nkey: {public} }} ] }}"
        return text, {"nkey_seed_file": str(file)}
    text, credentials = operator_mode()
    file = folder / "user.creds"
    file.write_text(credentials)
    return text, {"credentials_file": str(file)}


def user_nkey() -> tuple[str, bytes]:
    seed = bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    return nkeys.from_seed(bytearray(seed)).public_key.decode(), seed


def operator_mode() -> tuple[str, str]:
    """Configuration of a server that trusts an operator, and a user's credentials file."""

    def pair(prefix: int) -> Any:
        return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))

    def text(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    def jwt(signer: Any, subject: Any, claims: dict[str, Any]) -> str:
        head = text(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
        body = {
            "jti": os.urandom(8).hex(),
            "iat": int(time.time()),
            "iss": signer.public_key.decode(),
            "name": "test",
            "sub": subject.public_key.decode(),
            "nats": {"version": 2, **claims},
        }
        signed = f"{head}.{text(json.dumps(body).encode())}"
        return f"{signed}.{text(signer.sign(signed.encode()))}"

    operator = pair(nkeys.PREFIX_BYTE_OPERATOR)
    account, system = pair(nkeys.PREFIX_BYTE_ACCOUNT), pair(nkeys.PREFIX_BYTE_ACCOUNT)
    seed = bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    user = nkeys.from_seed(bytearray(seed))
    limits = dict.fromkeys(["subs", "data", "payload", "imports", "exports", "conn", "leaf"], -1)
    limits |= dict.fromkeys(["mem_storage", "disk_storage", "streams", "consumer"], -1)
    account_claims = {"type": "account", "limits": {**limits, "wildcards": True}}
    system_claims = {"type": "account", "limits": {**limits, "mem_storage": 0, "disk_storage": 0}}
    user_jwt = jwt(account, user, {"type": "user", "subs": -1, "data": -1, "payload": -1})
    operator_jwt = jwt(operator, operator, {"type": "operator"})
    preload = "\n".join(
        f"{one.public_key.decode()}: {jwt(operator, one, claims)}"
        for one, claims in ((account, account_claims), (system, system_claims))
    )
    config = (
        f"operator: {operator_jwt}\nsystem_account: {system.public_key.decode()}\n"
        f"resolver: MEMORY\nresolver_preload: {{\n{preload}\n}}\n"
    )
    credentials = (
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n------END USER NKEY SEED------\n"
    )
    return config, credentials


KINDS = ["user", "token", "nkey", "credentials"]


@pytest.mark.parametrize("kind", KINDS)
def test_signing_in(
    make_pubsub: MakePubsub, tmp_path: Path, kind: str, no_secret_in_the_log: None
) -> None:
    config, settings = sign_in(kind, tmp_path)
    with NatsServer(config) as server:
        pubsub = make_pubsub(urls=server.url, **settings)

        assert pubsub.publish("a", {}).sequence == 1


@pytest.mark.parametrize("kind", KINDS)
def test_signing_in_with_the_wrong_thing_is_refused_at_once_and_nothing_is_told(
    make_pubsub: MakePubsub, tmp_path: Path, kind: str, no_secret_in_the_log: None, caplog: Any
) -> None:
    config, _ = sign_in(kind, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, settings = sign_in(kind, other)
    for key in ("password", "token"):
        if key in settings:
            settings[key] = SECRET + "!"
    with NatsServer(config) as server:
        pubsub = make_pubsub(urls=server.url, **settings)

        text = refusal(pubsub)

        assert f"{server.url} refused the connection: wrong or missing credentials" in text
        assert SECRET not in text
        assert not up(pubsub)
        assert not pubsub.is_connected
        with at_most(0.5), pytest.raises(NotConnected):
            pubsub.publish("a", {})
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_signing_in_without_anything_is_refused(make_pubsub: MakePubsub, tmp_path: Path) -> None:
    config, _ = sign_in("user", tmp_path)
    with NatsServer(config) as server:
        assert "wrong or missing credentials" in refusal(make_pubsub(urls=server.url))


@pytest.mark.parametrize(
    ("config", "user_information"),
    [
        (f"user: shop, password: {SECRET}", f"shop:{SECRET}"),
        (f"token: {SECRET}", SECRET),
        ('user: "a b", password: "p@ss/w:rd"', "a%20b:p%40ss%2Fw%3Ard"),
    ],
)
def test_signing_in_by_way_of_the_url(
    make_pubsub: MakePubsub, config: str, user_information: str, no_secret_in_the_log: None
) -> None:
    with NatsServer(f"authorization {{ {config} }}") as server:
        pubsub = make_pubsub(urls=f"nats://{user_information}@127.0.0.1:{server.port}")

        assert pubsub.publish("a", {}).sequence == 1


def test_who_was_refused_is_let_in_when_the_server_has_changed_its_mind(
    make_pubsub: MakePubsub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert link.TIMING.refused_pause >= 30
    monkeypatch.setattr(link, "TIMING", link.TIMING._replace(refused_pause=0.2))
    with NatsServer("authorization { token: other }") as server:
        pubsub = make_pubsub(urls=server.url, token=SECRET)
        assert "refused" in refusal(pubsub)
        server.stop()
        server.config = f"authorization {{ token: {SECRET} }}"
        server.start()

        eventually(lambda: up(pubsub))
        assert pubsub.publish("a", {}).sequence == 1


def test_who_is_thrown_out_while_publishing_fails_at_once(make_pubsub: MakePubsub) -> None:
    with NatsServer(f"authorization {{ token: {SECRET} }}") as server:
        pubsub = make_pubsub(urls=server.url, token=SECRET)
        pubsub.publish("a", {})
        server.stop()
        server.config = "authorization { token: other }"
        server.start()

        assert "wrong or missing credentials" in refusal(pubsub)


@pytest.mark.parametrize(
    "key", ["nkey_seed_file", "credentials_file", "tls_ca_file", "tls_cert_file"]
)
def test_a_file_that_is_not_there_is_named_at_the_first_use(
    make_pubsub: MakePubsub, key: str, tmp_path: Path
) -> None:
    settings = {key: str(tmp_path / "missing")}
    if key == "tls_cert_file":
        settings["tls_key_file"] = str(tmp_path / "key")
    pubsub = make_pubsub(**settings)

    with pytest.raises(ConfigurationError, match=f"NATSPUBSUB_{key.upper()} is .*missing"):
        pubsub.publish("a", {})


@pytest.mark.parametrize("key", ["nkey_seed_file", "credentials_file", "tls_ca_file"])
def test_a_file_full_of_nonsense_is_an_error_without_its_content(
    make_pubsub: MakePubsub, key: str, tmp_path: Path, no_secret_in_the_log: None
) -> None:
    file = tmp_path / "nonsense"
    file.write_text(f"{SECRET}\n")
    with NatsServer("authorization { token: x }") as server:
        pubsub = make_pubsub(urls=server.url, **{key: str(file)})

        text = refusal(pubsub)

    assert SECRET not in text


# --- streams


def test_apps_that_start_at_once_on_an_empty_server_all_find_their_subjects(
    make_pubsub: MakePubsub, env: str
) -> None:
    names = [f"app{number}" for number in range(8)]
    with NatsServer() as server:
        extensions = [make_pubsub(name, urls=server.url) for name in names]
        barrier = threading.Barrier(8)

        def start(pubsub: NatsPubsub) -> Any:
            barrier.wait(10)
            return pubsub.publish("a", {}, timeout=10)

        with ThreadPoolExecutor(8) as pool:
            receipts = list(pool.map(start, extensions))

        assert sorted(receipt.sequence for receipt in receipts) == list(range(1, 9))
        info = api(server.url, f"STREAM.INFO.{env}-events-stream")
        assert set(info["config"]["subjects"]) == {f"{env}.{name}.>" for name in ["events", *names]}
        assert info["state"]["messages"] == 8
        streams = api(server.url, "STREAM.NAMES")["streams"]
        assert sorted(streams) == [f"{env}-events-stream", f"{env}-events-stream-dlq"]


def make_stream(server: NatsServer, name: str, *subjects: str, **more: Any) -> None:
    body = {"name": name, "subjects": subjects, "retention": "limits", "storage": "file", **more}
    answer = api(server.url, f"STREAM.CREATE.{name}", body)
    assert "error" not in answer, answer


def test_a_workqueue_stream_of_the_ruby_package(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream = f"{env}-events-stream"
    make_stream(nats_server, stream, f"{env}.events.>", retention="workqueue", max_age=10**9 * 60)

    assert pubsub.publish("a", {}).sequence == 1

    config = api(nats_server.url, f"STREAM.INFO.{stream}")["config"]
    assert config["retention"] == "workqueue"
    assert config["max_age"] == 10**9 * 60
    assert config["subjects"] == [f"{env}.events.>", f"{env}.shop.>"]
    state = pubsub.state()
    changes = state.broker().setup(wanted_streams(state.settings), dry_run=True)
    assert [change.action for change in changes] == ["differs", "ok"]
    assert "workqueue" in changes[0].detail


def test_a_main_stream_that_takes_everything_also_the_dead_letters(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_stream(nats_server, f"{env}-events-stream", f"{env}.>")

    assert pubsub.publish("a", {}).sequence == 1

    names = api(nats_server.url, "STREAM.NAMES", {"subject": f"{env}.>"})["streams"]
    assert names == [f"{env}-events-stream"]
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_options_that_we_do_not_know_survive_an_added_subject(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str
) -> None:
    stream = f"{env}-events-stream"
    make_stream(
        nats_server,
        stream,
        f"{env}.events.>",
        max_msg_size=12345,
        description="theirs",
        metadata={"team": "billing"},
        allow_rollup_hdrs=True,
    )

    pubsub.publish("a", {})

    config = api(nats_server.url, f"STREAM.INFO.{stream}")["config"]
    assert (config["max_msg_size"], config["description"]) == (12345, "theirs")
    assert config["metadata"]["team"] == "billing"
    assert config["allow_rollup_hdrs"] is True


def test_a_stream_of_others_in_the_way_is_named(
    pubsub: NatsPubsub, nats_server: NatsServer, env: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_stream(nats_server, f"{env}-legacy", f"{env}.shop.orders.*")
    state = pubsub.state()
    state.broker().connect(5)

    with pytest.raises(TopologyError) as caught:
        state.broker().setup(wanted_streams(state.settings))

    for name in (f"{env}-legacy", f"{env}-events-stream"):
        assert repr(name) in str(caught.value)
        assert repr(name) in caplog.text  # also said when it was tried at the connection
    assert pubsub.publish("orders.created", {}).stream == f"{env}-legacy"


# --- threads and the end


def test_a_dead_loop_fails_what_waits_and_is_replaced(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        broker: Any = pubsub.state().broker()
        pubsub.publish("a", {})
        loop = broker._session.loop
        proxy.hold()
        waiting = [pubsub.publish_nowait("a", {}, event_id=f"e{n}", timeout=30) for n in range(5)]

        loop.loop.call_soon_threadsafe(loop.loop.stop)

        with at_most(3):
            wait(waiting, 5)
        assert {type(future.exception(0)) for future in waiting} == {PublishError}
        assert not up(pubsub)
        with at_most(1):
            assert pubsub.publish("a", {}, event_id="e5").stream
        assert up(pubsub)
        assert broker._session.loop is not loop


def test_shutdown_sends_what_is_waiting_and_ends_the_thread(
    pubsub: NatsPubsub, nats_server: NatsServer
) -> None:
    before = threading.active_count()
    futures = [pubsub.publish_nowait("a", {}) for _ in range(2_000)]

    pubsub.shutdown()

    assert threading.active_count() == before
    assert [future.result(0).sequence for future in futures] == list(range(1, 2_001))
    assert pubsub.publish("a", {}).sequence == 2_001
    assert count(pubsub) == 2_001


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing to count them by here")
def test_apps_that_come_and_go_leave_no_file_open(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    def come_and_go(number: int) -> int:
        pubsub = make_pubsub(f"app{number}", urls=nats_server.url)
        pubsub.publish("a", {})
        pubsub.shutdown()
        return len(list(Path("/proc/self/fd").iterdir()))

    first, *others = [come_and_go(number) for number in range(100)]

    assert max(others) <= first


def test_shutdown_does_not_wait_for_a_server_that_is_away(make_pubsub: MakePubsub) -> None:
    pubsub = make_pubsub(urls=f"nats://127.0.0.1:{free_port()}")
    future = pubsub.publish_nowait("a", {}, timeout=30)

    with at_most(2):
        pubsub.shutdown()

    assert isinstance(future.exception(0), PublishError)


def test_shutdown_does_not_hang_on_a_link_that_has_gone_dead(
    make_pubsub: MakePubsub, nats_server: NatsServer
) -> None:
    with Proxy(nats_server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        pubsub.publish("a", {})
        proxy.hold()
        futures = [pubsub.publish_nowait("a", {"x": "y" * 900_000}, timeout=30) for _ in range(20)]

        with at_most(4):
            pubsub.shutdown(timeout=1)

        assert all(isinstance(future.exception(0), PublishError) for future in futures)


def test_a_closed_broker_says_so(pubsub: NatsPubsub) -> None:
    broker = pubsub.state().broker()
    pubsub.publish("a", {})
    pubsub.shutdown()

    with pytest.raises(NotConnected, match="closed"):
        broker.submit([], 1)


def test_each_app_has_one_connection_which_the_server_knows_by_name(
    make_pubsub: MakePubsub,
) -> None:
    with NatsServer() as server, Proxy(server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda n: pubsub.publish("a", {"n": n}), range(64)))

        assert proxy.accepted == 1
        assert f'"name": "shop-{os.getpid()}"'.encode() in proxy.from_clients
        assert len(set(event_ids(stored(pubsub)))) == 64
