"""The table of settings: defaults, checks, masks, presets, and where a value came from."""

from __future__ import annotations

import datetime as dt
import warnings
from typing import Any

import pytest
from flask import Flask

from flask_natspubsub import ConfigurationError, NatsPubsub
from flask_natspubsub.config import settings
from flask_natspubsub.config.settings import PREFIX, Settings, mask_url
from tests.support.secrets import SECRET

SECONDS = ["soon", -1, True, float("nan"), float("inf"), dt.timedelta(seconds=-1)]
POSITIVE_SECONDS = [*SECONDS, 0, dt.timedelta(0)]
TEXT = ["", 5, ["a"]]
FLAG = ["maybe", 2, -1, 0.0, ""]
SPELLED = [
    *((value, True) for value in (True, "true", "True", "TRUE", "yes", "on", "1", 1)),
    *((value, False) for value in (False, "false", "False", "no", "Off", "0", 0, " no ")),
]

# key: default, values that are taken (given, then as it is kept), values that are refused,
# and words of the error.
TABLE: dict[str, tuple[Any, list[tuple[Any, Any]], list[Any], str]] = {
    "urls": (
        ("nats://127.0.0.1:4222",),
        [
            ("nats://a:1", ("nats://a:1",)),
            ("a:1, b:2", ("nats://a:1", "nats://b:2")),
            (["tls://a", "b"], ("tls://a", "nats://b")),
            ("memory://", ("memory://",)),
            ("nats://[::1]:4222", ("nats://[::1]:4222",)),
        ],
        ["", [], 5, ["memory://", "nats://a"], "http://a", "nats://", "nats://a:port", [None]],
        "URL",
    ),
    "env": ("development", [("prod-1_A", "prod-1_A")], ["", "a.b", "a b", "*", 5], "letters"),
    "app_name": ("my_shop", [("Shop-1", "Shop-1")], ["a.b", "dlq", "Events", "", 5], ""),
    "preset": (None, [("testing", "testing")], ["", "dev", 5], "'production'"),
    "user": (None, [("u", "u"), (12345, "12345")], ["", 1.5, True, ["a"]], "text"),
    "password": (None, [("p", "p"), (12345, "12345")], ["", 1.5, True, ["a"]], "text"),
    "token": (None, [("t", "t"), (12345, "12345")], ["", 1.5, True, ["a"]], "text"),
    "nkey_seed_file": (None, [("f", "f")], TEXT, "text"),
    "credentials_file": (None, [("f", "f")], TEXT, "text"),
    "tls_ca_file": (None, [("f", "f")], TEXT, "text"),
    "tls_cert_file": (None, [], TEXT, "text"),
    "tls_key_file": (None, [], TEXT, "text"),
    "tls_hostname": (None, [("h", "h")], TEXT, "text"),
    "reply_prefix": ("_INBOX", [("a.b-1_", "a.b-1_")], ["", "a.", "a.>", "*", "a b", 1], "tokens"),
    "connect_timeout": (2.0, [(1, 1.0), (0.5, 0.5)], POSITIVE_SECONDS, "seconds"),
    "publish_timeout": (5.0, [(1, 1.0)], POSITIVE_SECONDS, "seconds"),
    "publish_in_flight": (4_000, [(1, 1)], [0, -1, "4", True], "whole number, 1 or more"),
    "publish_queue": (10_000, [(1, 1)], [0, -1, "4", True], "whole number, 1 or more"),
    "publish_queue_bytes": (
        64 * 1024 * 1024,
        [(1, 1)],
        [0, -1, "4", True],
        "whole number, 1 or more",
    ),
    "stream_name": (None, [("events", "events")], ["", "a.b", "a b", 5], "letters"),
    "stream_config": (
        {},
        [
            ({"max_age": dt.timedelta(hours=1)}, {"max_age": 3600.0}),
            (
                {"max_msgs": -1, "max_bytes": 5, "storage": "memory", "replicas": 3},
                {"max_msgs": -1, "max_bytes": 5, "storage": "memory", "replicas": 3},
            ),
            (
                {"duplicate_window": 60, "discard": "new"},
                {"duplicate_window": 60, "discard": "new"},
            ),
        ],
        [
            5,
            "x",
            {"max_message": 1},
            {"max_age": "long"},
            {"storage": "disk"},
            {"replicas": 0},
            {"max_msgs": -2},
            {"discard": None},
        ],
        "",
    ),
    "dlq_stream_config": (
        {},
        [({"max_bytes": 5}, {"max_bytes": 5})],
        [5, {"max_message": 1}, {"replicas": 0}],
        "",
    ),
    "jetstream_domain": (None, [("hub", "hub")], ["", "a.b", "a b", "*", 5], "letters"),
    "jetstream_api_prefix": (
        None,
        [("$JS.hub.API", "$JS.hub.API"), ("JS.shared.", "JS.shared")],
        ["", ".", "a..b", "a b", "a.>", "a.*", 5, ["a"]],
        "joined by dots",
    ),
    "auto_setup": (True, SPELLED, FLAG, "True or False"),
    "concurrency": (10, [(1, 1)], [0, -1, 1.5, "4", True], "whole number, 1 or more"),
    "prefetch": (1_000, [(1, 1)], [0, -1, "4", True], "whole number, 1 or more"),
    "max_deliver": (5, [(1, 1)], [0, "5", 2.0], "whole number"),
    "ack_wait": (30.0, [(dt.timedelta(minutes=1), 60.0)], POSITIVE_SECONDS, "seconds"),
    "backoff": (
        (1.0, 5.0, 15.0, 30.0, 60.0),
        [([1, dt.timedelta(seconds=2)], (1.0, 2.0)), (3, (3.0,)), ((0,), (0.0,))],
        [[], "1,2", [1, "x"], [-1], True, None or {}],
        "seconds",
    ),
    "handler_timeout": (60.0, [(1, 1.0)], POSITIVE_SECONDS, "seconds"),
    "heartbeat_timeout": (30.0, [(3, 3.0)], POSITIVE_SECONDS, "seconds"),
    "shutdown_timeout": (30.0, [(0, 0.0)], SECONDS, "seconds"),
    "use_dlq": (True, SPELLED, FLAG, "True or False"),
    "use_outbox": (False, SPELLED, FLAG, "True or False"),
    "use_inbox": (False, SPELLED, FLAG, "True or False"),
    "outbox_retention": (86400.0, [(dt.timedelta(days=2), 172800.0)], SECONDS, "seconds"),
    "outbox_batch_size": (500, [(1, 1)], [0, "5"], "whole number"),
    "outbox_poll_interval": (1.0, [(0.1, 0.1)], POSITIVE_SECONDS, "seconds"),
    "outbox_partitions": (1, [(8, 8)], [0, "5"], "whole number"),
    "outbox_max_attempts": (10, [(1, 1)], [0, "5"], "whole number"),
    "outbox_resend_on_rewind": (False, SPELLED, FLAG, "True or False"),
    "allow_volatile_streams": (False, SPELLED, FLAG, "True or False"),
    "inbox_retention": (604800.0, [(60, 60.0)], SECONDS, "seconds"),
    "bind_key": (None, [("events", "events")], TEXT, "text"),
    "monitor_url": (None, [("http://a:8222", "http://a:8222")], TEXT, "text"),
    "breaker_threshold": (10, [(0, 0)], [-1, 1.5, "x"], "whole number, 0 or more"),
    "breaker_reset": (5.0, [(1, 1.0)], POSITIVE_SECONDS, "seconds"),
    "subscribers": (
        (),
        [("shop.subscribers", ("shop.subscribers",)), (["a", "b"], ("a", "b"))],
        [5, [5], [""], {"a": 1}],
        "list of module names",
    ),
    "trace_header": ("X-Trace-ID", [("Trace", "Trace")], ["", "a b", "a:b", "a\r\nb", 5], "header"),
    "health_url_prefix": (None, [("/health/", "/health")], ["", "/", "health", 5], "'/health'"),
}


def read(name: str = "my.shop", **values: Any) -> Settings:
    return Settings.from_config({PREFIX + key.upper(): v for key, v in values.items()}, name)


def test_the_table_of_this_test_has_every_setting() -> None:
    assert set(settings.TABLE) == set(TABLE)


@pytest.mark.parametrize("key", TABLE)
def test_a_setting_that_is_not_given_has_its_default(key: str) -> None:
    settings = read()

    assert getattr(settings, key) == TABLE[key][0]
    assert settings.sources[key] == "default"


@pytest.mark.parametrize("key", TABLE)
def test_none_means_not_given(key: str) -> None:
    assert getattr(read(**{key: None}), key) == TABLE[key][0]


@pytest.mark.parametrize(
    ("key", "given", "kept"), [(key, *pair) for key, row in TABLE.items() for pair in row[1]]
)
def test_a_good_value_is_taken(key: str, given: Any, kept: Any) -> None:
    settings = read(**{key: given})

    assert getattr(settings, key) == kept
    assert type(getattr(settings, key)) is type(kept)
    assert settings.sources[key] == "config"


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, row in TABLE.items() for value in row[2]]
)
def test_a_bad_value_is_refused_by_key_value_and_what_is_allowed(key: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(**{key: value})

    message = str(caught.value)
    assert message.startswith(f"NATSPUBSUB_{key.upper()} is ")
    assert "Allowed: " in message
    assert TABLE[key][3] in message
    if not settings.TABLE[key].secret:
        assert repr(value) in message


@pytest.mark.parametrize("name", settings.TABLE)
def test_every_setting_has_a_help_text(name: str) -> None:
    assert settings.TABLE[name].help.rstrip().endswith((".", ")."))


def test_the_error_of_a_stream_option_names_the_option() -> None:
    with pytest.raises(ConfigurationError, match="1 or more for 'replicas'"):
        read(stream_config={"replicas": 0})
    with pytest.raises(ConfigurationError, match=r"max_age.*; not 'max_ages'"):
        read(stream_config={"max_ages": 1})


# --- values that belong together


def test_a_domain_is_short_for_a_prefix() -> None:
    assert read().api_prefix == "$JS.API"
    assert read(jetstream_domain="hub").api_prefix == "$JS.hub.API"
    assert read(jetstream_api_prefix="JS.shared").api_prefix == "JS.shared"
    with pytest.raises(ConfigurationError, match="both set"):
        read(jetstream_domain="hub", jetstream_api_prefix="JS.shared")


def test_a_client_certificate_needs_its_key() -> None:
    assert read(tls_cert_file="c", tls_key_file="k").tls_key_file == "k"
    for lonely in ({"tls_cert_file": "c"}, {"tls_key_file": "k"}):
        with pytest.raises(ConfigurationError, match="belong together"):
            read(**lonely)


def test_two_ways_to_sign_in_are_one_too_many() -> None:
    with pytest.raises(ConfigurationError, match="NATSPUBSUB_USER and NATSPUBSUB_TOKEN"):
        read(user="u", token="secret")


# --- names


@pytest.mark.parametrize(
    ("app_name", "slugged"),
    [("my.shop app", "my_shop_app"), ("shop", "shop"), ("...", "app"), ("größe", "gr_e")],
)
def test_the_app_name_is_slugged_from_the_app(app_name: str, slugged: str) -> None:
    assert read(app_name).app_name == slugged


def test_an_app_with_a_name_in_another_script_has_to_choose_another() -> None:
    with pytest.raises(ConfigurationError, match="Set NATSPUBSUB_APP_NAME"):
        read("商店")


def test_an_app_whose_own_name_is_reserved_has_to_choose_another() -> None:
    with pytest.raises(ConfigurationError, match="NATSPUBSUB_APP_NAME is 'events'"):
        read("events")


def test_the_streams_are_named_after_the_environment_or_as_told() -> None:
    assert read(env="prod").stream == "prod-events-stream"
    assert read(env="prod").dead_letter_stream == "prod-events-stream-dlq"
    assert read(stream_name="mine").stream == "mine"
    assert read(stream_name="mine").dead_letter_stream == "mine-dlq"


# --- presets and sources


def test_a_preset_gives_defaults_and_explicit_keys_win() -> None:
    settings = read(preset="testing", env="mine")

    assert settings.urls == ("memory://",)
    assert settings.env == "mine"
    assert settings.sources["urls"] == "preset testing"
    assert settings.sources["env"] == "config"
    assert settings.sources["ack_wait"] == "default"


@pytest.mark.parametrize("preset", ["development", "testing", "production"])
def test_a_preset_holds_values_that_a_user_could_give(preset: str) -> None:
    settings = read(preset=preset)
    from_preset = [key for key, source in settings.sources.items() if source == f"preset {preset}"]

    assert from_preset
    given = {key: getattr(settings, key) for key in from_preset}
    assert {key: getattr(read(**given), key) for key in from_preset} == given


# --- secrets


@pytest.mark.parametrize(
    "url",
    [
        f"nats://user:{SECRET}@host:4222",
        f"nats://{SECRET}@host:4222",
        f"nats://user:a@{SECRET}@host",
        f"tls://us%20er:{SECRET}%40@[::1]:4222",
    ],
)
def test_the_user_information_of_a_url_is_masked(url: str) -> None:
    settings = read(urls=url)

    assert SECRET not in settings.safe_urls
    assert "***@" in settings.safe_urls
    assert settings.urls == (url,)
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.rows())


def test_a_url_without_secrets_is_shown_as_it_is() -> None:
    assert mask_url("nats://host:4222") == "nats://host:4222"


@pytest.mark.parametrize(
    "url",
    [
        f"nats://user:{SECRET}@host:port",
        f"user:{SECRET}@host:99999999",
        f"nats://a:b@one,nats://user:{SECRET}@two:port",
        f"nats://user:{SECRET}/x@host",
        f"nats://user:{SECRET}#x@host",
        f"http://user:{SECRET}@host",
        [f"nats://user:{SECRET}@host:port"],
        f"nats://[user:{SECRET}@host",
    ],
    ids=str,
)
def test_a_bad_url_is_refused_without_showing_its_password(url: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(urls=url)

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("key", ["password", "token"])
def test_a_secret_is_never_shown(key: str) -> None:
    settings = read(**{key: SECRET})
    with pytest.raises(ConfigurationError) as caught:
        read(**{key: [SECRET]})

    assert getattr(settings, key) == SECRET
    assert (f"NATSPUBSUB_{key.upper()}", "***", "config") in settings.rows()
    assert SECRET not in repr(settings)
    assert SECRET not in str(caught.value)


def test_rows_show_key_value_and_source() -> None:
    rows = read(concurrency=3).rows()

    assert ("NATSPUBSUB_CONCURRENCY", "3", "config") in rows
    assert ("NATSPUBSUB_PASSWORD", "None", "default") in rows
    assert [key for key, _, _ in rows] == [PREFIX + name.upper() for name in settings.TABLE]


# --- unknown keys


def test_an_unknown_key_warns_with_the_nearest_name() -> None:
    with pytest.warns(UserWarning, match="NATSPUBSUB_PUBLISH_TIMOUT.*NATSPUBSUB_PUBLISH_TIMEOUT"):
        read(publish_timout=1)


def test_an_unknown_key_like_no_other_warns_too() -> None:
    with pytest.warns(UserWarning, match="NATSPUBSUB_QQQQQQQQQQQQQQQQQQQQQQQQQQQQQQ"):
        read(qqqqqqqqqqqqqqqqqqqqqqqqqqqqqq=1)


def test_other_keys_of_the_config_are_nobodys_business() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings.from_config({"SECRET_KEY": 1, "natspubsub_env": 2, "NATS_URL": 3}, "shop")


# --- from Flask


def test_from_prefixed_env(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "URLS": '["nats://a:1", "nats://b:2"]',
        "ENV": "prod",
        "CONCURRENCY": "3",
        "USE_DLQ": "false",
        "ACK_WAIT": "1.5",
        "BACKOFF": "[1, 2]",
        "STREAM_CONFIG__max_age": "60",
        "STREAM_CONFIG__discard": "new",
        "SUBSCRIBERS": '["shop.subscribers"]',
    }.items():
        monkeypatch.setenv(f"FLASK_NATSPUBSUB_{key}", value)
    app = Flask("shop")
    app.config.from_prefixed_env()

    settings = Settings.from_config(app.config, app.name)

    assert settings.urls == ("nats://a:1", "nats://b:2")
    assert settings.env == "prod"
    assert settings.concurrency == 3
    assert settings.use_dlq is False
    assert settings.ack_wait == 1.5
    assert settings.backoff == (1.0, 2.0)
    assert settings.stream_config == {"max_age": 60.0, "discard": "new"}
    assert settings.subscribers == ("shop.subscribers",)


def test_two_apps_have_settings_of_their_own() -> None:
    one, two = Flask("one"), Flask("two")
    one.config["NATSPUBSUB_STREAM_CONFIG"] = {"max_msgs": 1}
    pubsub = NatsPubsub()
    pubsub.init_app(one)
    pubsub.init_app(two)

    assert pubsub.state(one).settings.app_name == "one"
    assert pubsub.state(two).settings.app_name == "two"
    assert pubsub.state(one).settings.stream_config == {"max_msgs": 1}
    assert pubsub.state(two).settings.stream_config == {}


def test_a_later_change_of_the_config_is_not_seen() -> None:
    app = Flask("shop")
    app.config["NATSPUBSUB_STREAM_CONFIG"] = {"max_msgs": 1}
    pubsub = NatsPubsub(app)

    app.config["NATSPUBSUB_ENV"] = "other"
    app.config["NATSPUBSUB_STREAM_CONFIG"]["max_msgs"] = 2

    assert pubsub.state(app).settings.env == "development"
    assert pubsub.state(app).settings.stream_config == {"max_msgs": 1}


def test_a_bad_value_fails_in_init_app_and_leaves_the_app_as_it_was() -> None:
    app = Flask("shop")
    app.config["NATSPUBSUB_CONCURRENCY"] = 0

    with pytest.raises(ConfigurationError):
        NatsPubsub(app)

    assert "natspubsub" not in app.extensions
    app.config["NATSPUBSUB_CONCURRENCY"] = 1
    NatsPubsub(app)


# --- the environment


def test_what_is_set_in_the_environment_and_not_read_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASK_NATSPUBSUB_URLS", f"nats://a:{SECRET}@b")
    monkeypatch.setenv("FLASK_NATSPUBSUB_STREAM_CONFIG__max_age", "60")
    app = Flask("shop")

    with pytest.warns(UserWarning, match="from_prefixed_env") as caught:
        NatsPubsub(app)

    (warning,) = caught
    assert "FLASK_NATSPUBSUB_STREAM_CONFIG__max_age, FLASK_NATSPUBSUB_URLS" in str(warning.message)
    assert SECRET not in str(warning.message)
    assert warning.filename == __file__


def test_what_is_read_from_the_environment_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_NATSPUBSUB_ENV", "live")
    monkeypatch.setenv("FLASK_NATSPUBSUB_STREAM_CONFIG__max_age", "60")
    monkeypatch.setenv("FLASK_NATSPUBSUB_USE_DLQ", "False")
    app = Flask("shop")
    app.config.from_prefixed_env()
    app.config["NATSPUBSUB_ENV"] = "other"

    found = NatsPubsub(app).state(app).settings

    assert (found.env, found.use_dlq, found.stream_config) == ("other", False, {"max_age": 60.0})
