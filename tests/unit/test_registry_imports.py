"""Modules with subscribers: found, imported, reloaded."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flask_natspubsub.config.settings import Settings
from flask_natspubsub.errors import ConfigurationError
from flask_natspubsub.subscribing.registry import Registry

SETTINGS = Settings(env="test", app_name="shop")


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Write modules that can be imported; forget them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    # Two versions of a module within a second would share one cached compilation.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()

    yield write
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", None)):
            del sys.modules[name]
            vars(module).clear()
    gc.collect()  # or the unbound classes in them would be found by other tests


def test_packages_are_imported_with_all_their_modules(
    registry: Registry, modules: Callable[..., None]
) -> None:
    modules(
        {
            "warehouse/__init__.py": "",
            "warehouse/__main__.py": "raise SystemExit('the program was run')",
            "warehouse/orders.py": "",
            "warehouse/inner/__init__.py": "",
            "warehouse/inner/deep.py": "",
            "lone.py": "",
            "unlisted.py": "",
        }
    )
    registry.import_all(["warehouse", "lone"])
    assert {"warehouse.orders", "warehouse.inner.deep", "lone"} <= set(sys.modules)
    assert not {"warehouse.__main__", "unlisted"} & set(sys.modules)


def test_an_entry_that_does_not_exist_is_named(registry: Registry) -> None:
    with pytest.raises(ConfigurationError) as caught:
        registry.import_all(["no_such_module_anywhere"])
    assert str(caught.value).startswith(
        "NATSPUBSUB_SUBSCRIBERS: 'no_such_module_anywhere' cannot be imported "
        "(No module named 'no_such_module_anywhere')."
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_failing_import_inside_a_package_names_the_entry_and_the_cause(
    registry: Registry, modules: Callable[..., None]
) -> None:
    modules({"warehouse/__init__.py": "", "warehouse/orders.py": "import no_such_library"})
    with pytest.raises(
        ConfigurationError, match=r"'warehouse' .*No module named 'no_such_library'"
    ):
        registry.import_all(["warehouse"])


def test_other_errors_in_a_module_pass_unchanged(
    registry: Registry, modules: Callable[..., None]
) -> None:
    modules({"broken.py": "1 / 0"})
    with pytest.raises(ZeroDivisionError):
        registry.import_all(["broken"])


def test_a_reloaded_module_replaces_its_handlers_groups_and_classes(
    registry: Registry, modules: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
from types import SimpleNamespace
from flask_natspubsub.subscribing.registry import SubscriberGroup
from flask_natspubsub.subscribing.subscriber import Subscriber
import registry_of_the_test

registry = registry_of_the_test.registry
group = SubscriberGroup("group")
registry.add_group(group)

@registry.subscriber("{topic}")
def plain(message): ...

@group.subscriber("{topic}")
def grouped(message): ...

class Bound(Subscriber, pubsub=SimpleNamespace(registry=registry)):
    topics = "{topic}"
    def handle(self, message): ...

class Unbound(Subscriber):
    topics = "{topic}"
    def handle(self, message): ...
"""
    monkeypatch.setitem(
        sys.modules,
        "registry_of_the_test",
        SimpleNamespace(registry=registry),
    )
    modules({"reloaded.py": source.format(topic="old")})
    module = importlib.import_module("reloaded")
    modules({"reloaded.py": source.format(topic="new")})
    importlib.reload(module)
    assert {s.name: s.topics for s in registry.resolve(SETTINGS)} == {
        "plain": ("new",),
        "group-grouped": ("new",),
        "bound": ("new",),
        "unbound": ("new",),
    }


def test_a_class_of_a_listed_module_is_for_the_apps_that_list_it(
    registry: Registry, modules: Callable[..., None]
) -> None:
    source = """
from flask_natspubsub.subscribing.subscriber import Subscriber

class Listed(Subscriber):
    topics = ["order.created"]
    def handle(self, message): ...
"""
    modules({"listed/__init__.py": "", "listed/subscribers.py": source})
    registry.import_all(["listed"])
    theirs = Settings(app_name="listing", subscribers=("listed",))
    assert [one.name for one in registry.resolve(theirs)] == ["listed"]
    assert registry.resolve(Settings(app_name="other")) == []
