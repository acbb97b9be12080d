"""One contract, three stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astuner.errors import CheckpointError, ConfigError
from astuner.service.store.memory import MemoryStore
from astuner.service.store.protocol import Row, Store
from astuner.service.store.redis import RedisStore
from astuner.service.store.sqlite import SqliteStore
from tests.service.redis_server import redis_server


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    elif request.param == "sqlite":
        found = SqliteStore(tmp_path / "deep" / "records.sqlite")
        yield found
        found.close()
    else:
        with redis_server(tmp_path) as redis:
            yield RedisStore(redis.url, "test")


def test_what_is_written_is_read(store: Store) -> None:
    store.write([Row("a", "x", b"1"), Row("a", "y", b"\x00\xff"), Row("b", "x", b"")])
    assert store.read("a", "x") == b"1"
    assert store.read("a", "y") == b"\x00\xff"
    assert store.read("b", "x") == b""
    assert store.read("b", "y") is None
    assert sorted(store.scan("a")) == [("x", b"1"), ("y", b"\x00\xff")]
    assert list(store.scan("c")) == []


def test_a_row_is_replaced_and_deleted(store: Store) -> None:
    store.write([Row("a", "x", b"1"), Row("a", "y", b"2")])
    store.write([Row("a", "x", b"3"), Row("a", "y", None), Row("a", "none", None)])
    assert list(store.scan("a")) == [("x", b"3")]


def test_sqlite_keeps_what_a_killed_process_wrote(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from astuner.service.store.protocol import Row\n"
        "from astuner.service.store.sqlite import SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "store.write([Row('a', 'x', b'kept')])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    file = tmp_path / "records.sqlite"
    done = subprocess.run([sys.executable, "-c", code, str(file)], timeout=60)
    assert done.returncode == -9
    store = SqliteStore(file)
    assert store.read("a", "x") == b"kept"
    store.close()


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "records.sqlite")
    with pytest.raises(ConfigError, match="in use by another server"):
        SqliteStore(tmp_path / "records.sqlite")
    first.close()
    SqliteStore(tmp_path / "records.sqlite").close()


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "records.sqlite").write_bytes(b"something else entirely, and long enough" * 9)
    with pytest.raises(CheckpointError, match=r"records\.sqlite cannot be read"):
        SqliteStore(tmp_path / "records.sqlite")


def test_a_redis_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="no Redis server answers"):
        RedisStore("redis://127.0.0.1:1/0", "x")


def test_a_redis_that_dies_is_told(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        store = RedisStore(redis.url, "x")
        store.write([Row("a", "x", b"1")])
    with pytest.raises(CheckpointError, match="Redis"):
        store.write([Row("a", "x", b"2")])


class Asked:
    """How often the store waits for Redis."""

    def __init__(self, store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by: list[str] = []
        client = store._redis  # pyright: ignore[reportPrivateUsage]
        for verb in ("pipeline", "hget", "set"):
            monkeypatch.setattr(client, verb, self._counting(getattr(client, verb)))

    def _counting(self, verb: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            self.by.append(threading.current_thread().name)
            return verb(*args, **more)

        return call


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that does not answer is looked for often."""
    monkeypatch.setattr("astuner.service.store.redis.LOOK_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_redis_that_hangs_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards only a thread of the store's own waits, and finds it when it is back."""
    with redis_server(tmp_path) as redis:
        store = RedisStore(redis.url, "x")
        asked = Asked(store, monkeypatch)
        redis.hang()
        deadline = time.monotonic() + 60
        while asked.by.count("astuner-redis") < 2:
            assert time.monotonic() < deadline
            with pytest.raises(CheckpointError, match="Is the Redis server up"):
                store.write([Row("a", "x", b"1")])
            with pytest.raises(CheckpointError, match="did not answer a moment ago"):
                store.read("a", "x")
            time.sleep(0.01)
        assert asked.by.count("MainThread") == 1
        redis.go_on()
        while True:
            assert time.monotonic() < deadline
            try:
                store.write([Row("a", "x", b"2")])
                break
            except CheckpointError:
                time.sleep(0.01)
        assert store.read("a", "x") == b"2"
        store.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_redis_is_asked_again_where_the_look_out_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of anything that is no error of Redis or of the network."""
    with redis_server(tmp_path) as redis:
        store = RedisStore(redis.url, "x")
        broken = threading.Event()

        def look(*_: object, **__: object) -> None:
            broken.set()
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(store._redis, "set", look)  # pyright: ignore[reportPrivateUsage]
        redis.hang()
        with pytest.raises(CheckpointError):
            store.write([Row("a", "x", b"1")])
        assert broken.wait(20)
        redis.go_on()
        deadline = time.monotonic() + 60
        while True:
            try:
                store.write([Row("a", "x", b"2")])
                break
            except CheckpointError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert store.read("a", "x") == b"2"
        store.close()


def test_a_redis_that_refuses_is_asked_again_at_once(tmp_path: Path) -> None:
    """It answers, so nobody waits."""
    with redis_server(tmp_path) as redis:
        store = RedisStore(redis.url, "x")
        store._redis.config_set("maxmemory", "1")  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(CheckpointError, match="maxmemory"):
            store.write([Row("a", "x", b"1")])
        store._redis.config_set("maxmemory", "0")  # pyright: ignore[reportPrivateUsage]
        store.write([Row("a", "x", b"1")])
        assert store.read("a", "x") == b"1"
        store.close()
