"""Which keys of the `env` section belong together.

A rule for `check.value_problems`, of the same form as its others.
"""

from __future__ import annotations

from collections.abc import Iterator

from astuner.config.keys import full
from astuner.config.schema import AstunerConfig

Problem = tuple[tuple[str, ...], str]


def environment_problems(config: AstunerConfig) -> Iterator[Problem]:
    """One service, and an environment where the tasks come from one."""
    env = config.env
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
