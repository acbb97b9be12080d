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
    except FileNotFoundError:
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
    config.env.service = config.env.url = ""
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
