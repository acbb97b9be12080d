"""A store in Redis (`persistence: redis`): one hash a table, under a common prefix.

How much survives the death of the Redis server is that server's configuration
(appendonly). Checkpoints stay in the data folder: Redis holds records and results.
While Redis does not answer nothing is asked of it but by a thread that looks for its return,
so that all tenants wait for it once, and not with every write.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from astuner.errors import CheckpointError, ConfigError, MissingDependency
from astuner.service.store.protocol import Row

TIMEOUT_SECONDS = 1.0
LOOK_SECONDS = 1.0
"""How often a Redis that did not answer is looked at."""


class RedisStore:
    """See `protocol.Store`."""

    def __init__(self, url: str, prefix: str) -> None:
        """Raises MissingDependency, and ConfigError when the server does not answer."""
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise MissingDependency("redis", "service-redis", "persistence: redis") from error
        self._errors = (redis.RedisError, OSError)
        self._silence = (redis.ConnectionError, redis.TimeoutError, OSError)
        self._prefix = prefix
        self._is_away = False
        self._closed = threading.Event()
        try:
            self._redis: Any = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),  # its own would make everybody wait for seconds
            )
            self._redis.ping()
        except (*self._errors, ValueError) as error:
            raise ConfigError(
                f"service.redis_url: no Redis server answers at {url!r} ({error}). Start one, or "
                "set service.persistence=file."
            ) from error

    def write(self, rows: Sequence[Row]) -> None:
        with self._told():
            pipe = self._redis.pipeline(transaction=True)
            for row in rows:
                if row.value is None:
                    pipe.hdel(self._hash(row.table), row.key)
                else:
                    pipe.hset(self._hash(row.table), row.key, row.value)
            pipe.execute()

    def read(self, table: str, key: str) -> bytes | None:
        with self._told():
            return cast("bytes | None", self._redis.hget(self._hash(table), key))

    def scan(self, table: str) -> Iterator[tuple[str, bytes]]:
        with self._told():
            for key, value in self._redis.hscan_iter(self._hash(table)):
                yield key.decode(), value

    def close(self) -> None:
        self._closed.set()
        with suppress(*self._errors):
            self._redis.close()

    def _hash(self, table: str) -> str:
        return f"{self._prefix}:{table}"

    @contextmanager
    def _told(self) -> Generator[None]:
        if self._is_away:
            raise _failed("it did not answer a moment ago")
        try:
            yield
        except self._errors as error:
            if isinstance(error, self._silence):
                self._is_away = True
                threading.Thread(target=self._look_out, name="astuner-redis", daemon=True).start()
            raise _failed(str(error)) from error

    def _look_out(self) -> None:
        try:
            while not self._closed.wait(LOOK_SECONDS):
                try:
                    self._redis.set(f"{self._prefix}:looked-at", 1, ex=60)
                except self._silence:
                    continue
                except self._errors:
                    pass  # a refusal is an answer too
                return
        finally:  # also where a bug ends it: whoever writes next finds out
            self._is_away = self._closed.is_set()


def _failed(why: str) -> CheckpointError:
    return CheckpointError(
        f"The service's records in Redis cannot be read or written: {why}. Is the Redis server up, "
        "and has it memory left?"
    )
