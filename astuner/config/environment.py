"""Which keys of the `env` section belong together.

A rule for `check.value_problems`, of the same form as its others.
"""

from __future__ import annotations

from collections.abc import Iterator

from astuner.config.keys import full
from astuner.config.schema import AstunerConfig, EnvConfig

Problem = tuple[tuple[str, ...], str]


def environment_problems(config: AstunerConfig) -> Iterator[Problem]:
    """One service, an environment where the tasks come from one, and no key without effect."""
    env = config.env
    yield from _without_effect(env)
    if env.service and env.url:
        yield (
            ("env.service", "env.url"),
            (
                f"`{full('env.service')}` starts a service and `{full('env.url')}` names one that "
                "runs already: set one of the two."
            ),
        )
    reader = config.task_reader
    if reader.type == "environment" and not (env.type or env.service or env.url):
        yield (
            ("task_reader.type",),
            (
                f"`{full('task_reader.type')}` is environment, but no environment is set. Set "
                f"`{full('env.type')}`, e.g. FrozenLake-v1."
            ),
        )
    if reader.type == "env_service" and not (reader.env_service.env_url or env.url or env.service):
        yield (
            ("task_reader.type",),
            (
                f"`{full('task_reader.type')}` is env_service, but there is no service. Set "
                f"`{full('env.url')}`, or `{full('env.service')}` to start one."
            ),
        )


def _without_effect(env: EnvConfig) -> Iterator[Problem]:
    changed = [key for key, value in vars(EnvConfig()).items() if getattr(env, key) != value]
    if changed and not (env.type or env.service or env.url):
        names = [f"env.{key}" for key in changed]
        yield (
            tuple(names),
            (
                f"{', '.join(f'`{full(name)}`' for name in names)}: there is no environment that "
                f"could have it. Set `{full('env.type')}`, `{full('env.service')}` or "
                f"`{full('env.url')}`."
            ),
        )
    if env.type and env.service and env.type != env.service:
        yield (
            ("env.type", "env.service"),
            (
                f"`{full('env.type')}` is {env.type}, which the service that "
                f"`{full('env.service')}` = {env.service} starts does not have. Set one of the two."
            ),
        )
    if "start_timeout" in changed and not env.service and (env.type or env.url):
        yield (
            ("env.start_timeout",),
            (
                f"`{full('env.start_timeout')}` is for `{full('env.service')}`, which is not set: "
                "nothing is started."
            ),
        )
