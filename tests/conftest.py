"""JAX as every test sees it: on the CPU, with eight virtual devices, set before any backend exists.

JAX_PLATFORMS goes through the environment, so that subprocesses inherit it; the device count does not: a command that a
test starts sees one CPU device, as a reader's does, unless the test sets JAX_NUM_CPU_DEVICES for it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py: the eight virtual devices would silently be one")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub; without this each attempt costs its time-out
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences the warning of every fork after a first encode
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

import pytest  # noqa: E402
from extras import finished, running  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("any machine", deadline=None)  # two shared cores stall now and then
settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # ignored under nohup and by background jobs; children inherit that
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    if jax.device_count() != 8:
        raise pytest.UsageError(f"eight virtual CPU devices were asked for, jax sees {jax.devices()}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with running(item.nodeid, marked=item.get_closest_marker("extra") is not None):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    with running(f"{fixturedef.baseid}::{fixturedef.argname}"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    result = yield
    if item.get_closest_marker("extra") is not None:
        defined = [one for name in item.fixturenames for one in item._fixtureinfo.name2fixturedefs.get(name, ())]
        finished(item.nodeid, [f"{one.baseid}::{one.argname}" for one in defined])
    return result
