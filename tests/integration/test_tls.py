"""TLS with a real nats-server: what cannot be trusted is refused before anything is told."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import MakePubsub
from tests.support.certificates import Authority, KeyPair
from tests.support.fake_server import FakeServer
from tests.support.proxy import Proxy
from tests.support.secrets import SECRET
from tests.support.servers import NatsServer

from .helpers import refusal, up

pytestmark = pytest.mark.real_server


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("strangers"), "strangers")


def tls(pair: KeyPair, more: str = "") -> str:
    return f'tls {{ cert_file: "{pair.certificate}", key_file: "{pair.key}", {more} }}'


@pytest.mark.parametrize("scheme", ["tls", "nats"])
def test_with_the_right_certificate(
    make_pubsub: MakePubsub, authority: Authority, scheme: str
) -> None:
    with NatsServer(tls(authority.sign())) as server, Proxy(server.port) as proxy:
        pubsub = make_pubsub(
            urls=f"{scheme}://127.0.0.1:{proxy.port}", tls_ca_file=str(authority.file)
        )

        assert pubsub.publish("a", {}).sequence == 1
        assert b"CONNECT" not in proxy.from_clients


def test_a_certificate_for_another_name_that_is_expected(
    make_pubsub: MakePubsub, authority: Authority
) -> None:
    with NatsServer(tls(authority.sign("nats.example"))) as server:
        pubsub = make_pubsub(
            urls=f"tls://127.0.0.1:{server.port}",
            tls_ca_file=str(authority.file),
            tls_hostname="nats.example",
        )

        assert pubsub.publish("a", {}).sequence == 1


def test_with_a_certificate_of_the_client(make_pubsub: MakePubsub, authority: Authority) -> None:
    own = authority.sign("client")
    verify = f'verify: true, ca_file: "{authority.file}"'
    with NatsServer(tls(authority.sign(), verify)) as server:
        settings = {"urls": server.url, "tls_ca_file": str(authority.file)}
        pubsub = make_pubsub(
            **settings, tls_cert_file=str(own.certificate), tls_key_file=str(own.key)
        )
        assert pubsub.publish("a", {}).sequence == 1


def test_without_the_certificate_that_the_server_asks_for(
    make_pubsub: MakePubsub,
    authority: Authority,
    stranger: Authority,
    no_secret_in_the_log: None,
) -> None:
    more = f'verify: true, ca_file: "{authority.file}"'
    unknown = stranger.sign("client")
    with NatsServer(tls(authority.sign(), more)) as server, Proxy(server.port) as proxy:
        settings = {"urls": proxy.url, "token": SECRET, "tls_ca_file": str(authority.file)}
        for own in ({}, {"tls_cert_file": unknown.certificate, "tls_key_file": unknown.key}):
            pubsub = make_pubsub(**settings, **{key: str(path) for key, path in own.items()})

            text = refusal(pubsub)

            assert "TLS failed" in text
            assert "NATSPUBSUB_TLS_CERT_FILE" in text
            assert SECRET not in text
            assert not up(pubsub)
        assert b"CONNECT" not in proxy.from_clients


FAULTS = {
    "wrong CA": ("issuer", "NATSPUBSUB_TLS_CA_FILE"),
    "no CA": ("issuer", "NATSPUBSUB_TLS_CA_FILE"),
    "wrong address": ("mismatch", "NATSPUBSUB_TLS_HOSTNAME"),
    "wrong name": ("mismatch", "NATSPUBSUB_TLS_HOSTNAME"),
    "expired": ("expired", "renew it"),
    "not yet valid": ("not yet valid", "clocks"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_certificate_is_refused_and_nothing_is_told(
    make_pubsub: MakePubsub,
    authority: Authority,
    stranger: Authority,
    fault: str,
    no_secret_in_the_log: None,
) -> None:
    host = "nats.example" if fault.startswith("wrong ") and "CA" not in fault else "127.0.0.1"
    days = {"expired": (-2, -1), "not yet valid": (1, 2)}.get(fault, (-2, 1))
    trusted = {"wrong CA": str(stranger.file), "no CA": None}.get(fault, str(authority.file))
    expected = "nats.other" if fault == "wrong name" else None
    with (
        NatsServer(tls(authority.sign(host, days=days))) as server,
        Proxy(server.port) as proxy,
    ):
        pubsub = make_pubsub(
            urls=f"tls://127.0.0.1:{proxy.port}",
            token=SECRET,
            tls_ca_file=trusted,
            tls_hostname=expected,
        )

        text = refusal(pubsub)

        assert "refused the connection: TLS failed" in text
        assert all(words in text for words in FAULTS[fault])
        assert SECRET not in text
        assert SECRET.encode() not in proxy.from_clients
        assert b"CONNECT" not in proxy.from_clients
        assert proxy.accepted == 1
        assert not up(pubsub)


@pytest.mark.parametrize("asked_by", ["scheme", "CA", "certificate", "hostname"])
def test_a_server_without_tls_gets_no_credentials(
    make_pubsub: MakePubsub, authority: Authority, asked_by: str
) -> None:
    own = authority.sign("client")
    settings: dict[str, Any] = {
        "scheme": {},
        "CA": {"tls_ca_file": str(authority.file)},
        "certificate": {"tls_cert_file": str(own.certificate), "tls_key_file": str(own.key)},
        "hostname": {"tls_hostname": "nats.example"},
    }[asked_by]
    with FakeServer({"auth_required": True}) as plain:
        scheme = "tls" if asked_by == "scheme" else "nats"
        pubsub = make_pubsub(urls=f"{scheme}://127.0.0.1:{plain.port}", token=SECRET, **settings)

        assert "it offers no TLS, and TLS is asked for" in refusal(pubsub)
        assert plain.accepted == 1
        assert bytes(plain.received) == b""


def test_a_server_whose_certificate_nobody_vouches_for_gets_no_credentials(
    make_pubsub: MakePubsub, authority: Authority
) -> None:
    """TLS because the server insists on it, not because it was asked for."""
    with NatsServer(tls(authority.sign())) as server, Proxy(server.port) as proxy:
        pubsub = make_pubsub(urls=proxy.url, token=SECRET)

        assert "TLS failed" in refusal(pubsub)
        assert b"CONNECT" not in proxy.from_clients


def test_tls_survives_a_restart(make_pubsub: MakePubsub, authority: Authority) -> None:
    with NatsServer(tls(authority.sign())) as server:
        pubsub = make_pubsub(urls=server.url, tls_ca_file=str(authority.file))
        pubsub.publish("a", {})
        server.kill()
        server.start()

        assert pubsub.publish("a", {}).sequence == 2
