"""A store in Redis (`persistence: redis`): one hash a table, under a common prefix.

How much survives the death of the Redis server is that server's configuration
(appendonly). Checkpoints stay in the data folder: Redis holds records and results.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from astuner.errors import CheckpointError, ConfigError, MissingDependency
from astuner.service.store.protocol import Row

TIMEOUT_SECONDS = 1.0
PAUSE_SECONDS = 5.0
"""After a failure nothing is tried for so long: all tenants wait while Redis does not answer."""


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
        self._prefix = prefix
        self._paused_until = 0.0
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
        with suppress(*self._errors):
            self._redis.close()

    def _hash(self, table: str) -> str:
        return f"{self._prefix}:{table}"

    @contextmanager
    def _told(self) -> Generator[None]:
        if time.monotonic() < self._paused_until:
            raise _failed("it did not answer a moment ago")
        try:
            yield
        except self._errors as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            raise _failed(str(error)) from error


def _failed(why: str) -> CheckpointError:
    return CheckpointError(
        f"The service's records in Redis cannot be read or written: {why}. Is the Redis server up, "
        "and has it memory left?"
    )
