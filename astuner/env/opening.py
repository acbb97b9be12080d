"""From the `env` section of a configuration to environments that episodes can have.

`environment_service` starts the service that a configuration names and stops it;
`open_environments` makes the pool that a run's episodes share. Nothing is decided here
about episodes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from astuner.config.schema import AstunerConfig, EnvConfig
from astuner.env.local import LocalEnvs
from astuner.env.pool import EnvPool, PoolSettings
from astuner.env.protocol import EnvClient
from astuner.env.registry import find_environment
from astuner.env.service_process import ServiceProcess
from astuner.errors import ConfigError


def open_environments(config: AstunerConfig) -> EnvPool | None:
    """The run's environments; None when its configuration names none.

    Raises ConfigError, LoadingError or MissingDependency for one that cannot be found. The
    caller closes the pool.
    """
    env = config.env
    if not (env.type or env.service or env.url):
        return None
    settings = PoolSettings(
        env_type=env.type or env.service,
        params=env.params,
        max_instances=env.max_instances,
        seed=config.seed,
        heartbeat=env.lease / 3,
    )
    return EnvPool(_client(config), settings)


def _client(config: AstunerConfig) -> EnvClient:
    env = config.env
    if env.url:
        from astuner.env.http import HttpEnvs

        return HttpEnvs(
            env.url,
            create_timeout=env.create_timeout,
            step_timeout=env.step_timeout,
            lease=env.lease,
        )
    if env.service:
        raise ConfigError(
            f"astuner.env.service is {env.service!r}, but nobody started it. Start it with: "
            f"astuner env serve {env.service}; then set env.url in place of env.service."
        )
    if env.type:
        find_environment(env.type)  # so that a misspelt name shows at once
    return LocalEnvs(
        find_environment, create_timeout=env.create_timeout, step_timeout=env.step_timeout
    )


@contextmanager
def environment_service(config: AstunerConfig) -> Generator[None]:
    """While this is open, the service that `env.service` names runs, and `env.url` and the task
    reader lead to it. Does nothing where none is named.

    Raises EnvError when it does not start in time.
    """
    env, listed = config.env, config.task_reader.env_service
    if not env.service or env.url:
        with _pointed(config, env.url, listed.env_url or env.url):
            yield
        return
    with (
        ServiceProcess(
            [env.service],
            start_timeout=env.start_timeout,
            step_timeout=env.step_timeout,
            create_timeout=env.create_timeout,
            max_instances=env.max_instances,
        ) as service,
        _pointed(config, service.url, listed.env_url or service.url),
    ):
        yield


@contextmanager
def _pointed(config: AstunerConfig, url: str, list_url: str) -> Generator[None]:
    """The configuration as processes of the run need it: a service that runs, not one to start."""
    env, listed = config.env, config.task_reader.env_service
    before = env.type, env.service, env.url, env.start_timeout
    listed_before = listed.env_url, listed.env_type
    env.type = env.type or env.service
    env.service, env.url, env.start_timeout = "", url, EnvConfig.start_timeout
    listed.env_url, listed.env_type = list_url, listed.env_type or env.type
    try:
        yield
    finally:
        env.type, env.service, env.url, env.start_timeout = before
        listed.env_url, listed.env_type = listed_before
