"""The service as a process: started, used over a real port, and gone with whoever started it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from astuner.cli.environments import listening
from astuner.config.environment import environment_problems
from astuner.config.schema import AstunerConfig
from astuner.env.http import HttpEnvs
from astuner.env.opening import environment_service, open_environments
from astuner.env.service_process import ServiceProcess, exit_code
from astuner.errors import ConfigError, EnvError
from astuner.task_reader import read_tasks
from astuner.types import Task

from .worlds import LIMIT

pytestmark = pytest.mark.timeout(90)
ROOT = Path(__file__).parents[2]
COUNTING = "tests.env.worlds->Counting"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def gone(pid: int) -> bool:
    """Whether no such process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it goes as we read
        return True


def wait_until_gone(pid: int) -> None:
    ends = time.monotonic() + LIMIT
    while not gone(pid):
        assert time.monotonic() < ends
        time.sleep(0.02)


async def test_a_run_with_its_own_service() -> None:
    config = AstunerConfig()
    config.env.service, config.env.params = COUNTING, {"goal": 1}
    config.task_reader.type = "env_service"
    with pytest.raises(ConfigError, match="nobody started it"):
        open_environments(config)
    with environment_service(config):
        assert (config.env.type, config.env.service) == (COUNTING, ""), "nobody starts it again"
        assert list(environment_problems(config)) == []
        tasks = read_tasks(config.task_reader, seed=0)
        assert [task.task_id for task in tasks.train] == ["train-0", "train-1", "train-2"]
        assert [task.task_id for task in tasks.validation] == ["val-0", "val-1", "val-2"]
        pool = open_environments(config)
        assert pool is not None
        env = await asyncio.wait_for(pool.open(tasks.train[0], "e"), LIMIT)
        assert (await env.reset())[0].startswith("train-0: at 0 of 1, seed ")
        assert (await env.step("up"))[:3] == ("at 1", 1.0, True)
        pool.close()
        assert httpx.get(f"{config.env.url}/healthz").text == "OK"
    assert (config.env.type, config.env.service, config.env.url) == ("", COUNTING, "")
    assert config.task_reader.env_service.env_url == ""


async def test_a_service_that_dies_fails_the_step_as_unavailable() -> None:
    with ServiceProcess([COUNTING]) as service:
        envs = HttpEnvs(service.url)
        await envs.create(COUNTING, "t", "i", {})
        assert service.pid is not None
        os.kill(service.pid, signal.SIGKILL)
        wait_until_gone(service.pid)
        with pytest.raises(EnvError) as caught:
            await envs.step("i", "up")
        assert caught.value.cause == "unavailable"
        await envs.aclose()


async def test_one_that_dies_is_started_again_at_the_same_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ServiceProcess([COUNTING], max_instances=1) as service:
        pid, url, envs = service.pid, service.url, HttpEnvs(service.url)
        assert pid is not None
        await envs.create(COUNTING, "t", "i", {})
        with pytest.raises(EnvError, match="There are 1 instances already"):
            await envs.create(COUNTING, "t", "j", {})
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        ends = time.monotonic() + LIMIT
        while True:
            try:
                start = await envs.create(COUNTING, "t", "j", {"seed": 3})
                break
            except EnvError as error:
                assert error.cause == "unavailable"
                assert time.monotonic() < ends
                await asyncio.sleep(0.05)
        assert start.observation == "t: at 0 of 2, seed 3"
        assert (service.url, service.restarts) == (url, 1)
        with pytest.raises(EnvError) as caught:
            await envs.step("i", "up")
        assert caught.value.cause == "gone"
        again = service.pid
        assert again not in (None, pid)
        await envs.aclose()
    assert again is not None
    wait_until_gone(again)
    assert "ended with exit code -9" in caplog.text


def test_one_that_cannot_start_says_why() -> None:
    with pytest.raises(EnvError, match="ended with exit code 2") as caught:
        ServiceProcess(["no_such_world"]).__enter__()
    assert "There is no environment 'no_such_world'" in str(caught.value)


def test_it_ends_with_a_parent_that_was_killed() -> None:
    script = (
        "import time\n"
        "from astuner.env.service_process import ServiceProcess\n"
        f"with ServiceProcess([{COUNTING!r}]) as s:\n"
        "    print(s.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from astuner.cli import main

    assert main(["env", "list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^  toy_text +Gymnasium's toy text games in words", listed, re.MULTILINE)
    assert main(["env", "serve", "no_such_world"]) == 2
    assert "There is no environment 'no_such_world'" in capsys.readouterr().err
    command = [sys.executable, "-m", "astuner.cli", "env", "serve", COUNTING, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    assert httpx.get(f"{url}/healthz", timeout=LIMIT).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) in (0, 130)


def test_numbered_tasks() -> None:
    config = AstunerConfig()
    config.task_reader.type = "environment"
    config.task_reader.environment.size = 2
    config.task_reader.environment.validation_size = 1
    splits = read_tasks(config.task_reader, seed=0)
    assert splits.train == [Task(task_id="train-0"), Task(task_id="train-1")]
    assert splits.validation == [Task(task_id="validation-0")]


def test_keys_that_belong_together() -> None:
    config = AstunerConfig()
    assert list(environment_problems(config)) == []
    config.env.service, config.env.url = COUNTING, "http://127.0.0.1:1"
    assert [keys for keys, _ in environment_problems(config)] == [("env.service", "env.url")]
    config.env.service, config.env.url = "", ""
    for reader in ("environment", "env_service"):
        config.task_reader.type = reader
        assert [keys for keys, _ in environment_problems(config)] == [("task_reader.type",)]


def test_an_ended_child_keeps_its_number_until_its_group_is_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(3)"],
                             stdin=subprocess.PIPE)  # fmt: skip
    assert exit_code(child.pid) is None
    child.communicate()
    assert child.returncode == 3
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as killed:
        killed.kill()
        ends = time.monotonic() + LIMIT
        while exit_code(killed.pid) is None and time.monotonic() < ends:
            time.sleep(0.01)
        assert [exit_code(killed.pid) for _ in range(2)] == [-9, -9]
        assert killed.wait(LIMIT) == -9


def test_answers_are_not_held_back() -> None:
    """Nagle's algorithm is off, or every answer waits 40 ms for an acknowledgement."""
    with (
        listening("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname(), timeout=LIMIT),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize(
    ("env", "keys"),
    [
        ({}, None),
        ({"max_instances": 4}, ("env.max_instances",)),
        ({"params": {"a": 1}, "lease": 9.0}, ("env.params", "env.lease")),
        ({"type": COUNTING, "max_instances": 4, "params": {"a": 1}}, None),
        ({"type": COUNTING, "service": COUNTING, "start_timeout": 9.0}, None),
        ({"type": "toy_text", "service": COUNTING}, ("env.type", "env.service")),
        ({"type": COUNTING, "start_timeout": 9.0}, ("env.start_timeout",)),
        ({"url": "http://127.0.0.1:1", "start_timeout": 9.0}, ("env.start_timeout",)),
    ],
)
def test_keys_without_effect_are_told(env: dict[str, Any], keys: tuple[str, ...] | None) -> None:
    config = AstunerConfig()
    for key, value in env.items():
        setattr(config.env, key, value)
    assert [told for told, _ in environment_problems(config)] == ([keys] if keys else [])


def test_a_configuration_that_points_to_its_service_has_no_problem() -> None:
    """As the processes of a run read it."""
    config = AstunerConfig()
    config.env.service, config.env.start_timeout, config.env.max_instances = COUNTING, 60.0, 2000
    assert list(environment_problems(config)) == []
    with environment_service(config):
        assert list(environment_problems(config)) == []
    assert config.env.start_timeout == 60.0


async def test_hundreds_at_once() -> None:
    config = AstunerConfig()
    config.env.service, config.env.max_instances = COUNTING, 200
    with environment_service(config):
        pool = open_environments(config)
        assert pool is not None
        tasks = [Task(task_id=f"t{i}") for i in range(200)]
        opened = await asyncio.wait_for(asyncio.gather(*(pool.open(t, "e") for t in tasks)), 60)
        assert [env.initial_text.partition(":")[0] for env in opened] == [t.task_id for t in tasks]
        await asyncio.gather(*(env.reset() for env in opened))
        for number in (1, 2):
            steps = await asyncio.wait_for(asyncio.gather(*(e.step("up") for e in opened)), 60)
            assert {step[0] for step in steps} == {f"at {number}"}
        for env in opened:
            pool.release(env)
        await asyncio.to_thread(pool.close)
        assert pool.counters["env/steps"] == 400
        assert not any(name.startswith("env/failed") for name in pool.counters)
