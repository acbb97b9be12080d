"""Pages as text, commands, and tasks solved in a real Chromium, which may also die."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from astuner.env.local import LocalEnvs
from astuner.env.pool import EnvPool, PoolSettings
from astuner.env.registry import find_environment
from astuner.errors import EnvError
from astuner.types import Task

pytest.importorskip("miniwob", reason="the environment's own requirements.txt")

from envs.miniwob.browser import find_chromium
from envs.miniwob.page import Command, as_text, read_command, refs

pytestmark = pytest.mark.timeout(180)
LIMIT = 60.0


def has_chromium() -> bool:
    try:
        find_chromium("", "")
    except EnvError:
        return False
    return True


chromium = pytest.mark.skipif(not has_chromium(), reason="apt-get install chromium chromium-driver")


# ---------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("click(6)", Command("click", ref=6)),
        ("I would click(3), but rather\nCLICK( 12 )", Command("click", ref=12)),
        ('type(7, "hello, world")', Command("type", ref=7, text="hello, world")),
        ("type(7, 'it\\'s \"so\"')", Command("type", ref=7, text='it\'s "so"')),
        ("type(7, hello)", Command("type", ref=7, text="hello")),
        ('type(7, "f(x)")', Command("type", ref=7, text="f(x)")),
        ('type(7, "")', Command("type", ref=7)),
        ('select(4, "Nigeria")', Command("type", ref=4, text="Nigeria")),
        ('press("Enter")', Command("press", text="Enter")),
        ("click_at(80, 100)", Command("click_at", point=(80, 100))),
        ("wait()", Command("wait")),
        ("click(button)", None),
        ("click(99999999)", None),
        ("submit it", None),
        ("", None),
    ],
)
def test_commands(text: str, command: Command | None) -> None:
    assert read_command(text) == command


def node(tag: str, ref: int, *children: Any, **more: Any) -> dict[str, Any]:
    place = {"left": 1, "top": 2, "width": 3, "height": 4, "bgColor": "rgba(0, 0, 0, 0)"}
    return {"tag": tag, "ref": ref, "children": list(children), **place, **more}


def test_a_page_as_text() -> None:
    label = node("LABEL", 3, node("INPUT_checkbox", 4, value=True, text=""),
                 node("t", -1, text="  yes\n please "))  # fmt: skip
    page = node("BODY", 1,
                node("DIV", 2, label, node("SELECT", 5), classes="outer"),
                node("INPUT_text", 6, value="so far", text="", focused=True),
                node("BUTTON", 7, text="Submit"),
                node("SPAN", 8, id="bin", classes="trash", text=""),
                node("DIV", 9, bgColor="rgb(0, 255, 0)", classes={}),
                focused=True)  # fmt: skip
    assert as_text(page, {"5": ["one", "two"]}).splitlines() == [
        "[4] input checkbox checked",
        "yes please",
        "[5] select of: one | two",
        "[6] input text holds 'so far' (focused)",
        '[7] button "Submit"',
        "[8] span bin trash at (1, 2) size 3 x 4",
        "[9] div at (1, 2) size 3 x 4 rgb(0, 255, 0)",
    ]
    assert refs(page) == set(range(1, 10))


def test_without_chromium_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MINIWOB_CHROME_BINARY", raising=False)
    with pytest.raises(EnvError, match="apt-get install chromium chromium-driver") as caught:
        make("click-test")
    assert not caught.value.retriable
    with pytest.raises(EnvError, match="/no/chrome"):
        make("click-test", chrome="/no/chrome")


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"task": "click-tset"}, "no task 'click-tset'. Did you mean click-test"),
        ({"task": []}, "no task"),
        ({"task": "click-test", "reward": "huge"}, "{'reward': 'huge'}"),
        ({"task": "click-test", "moons": 2}, "{'moons': 2}"),
    ],
)
def test_what_does_not_exist_is_refused(params: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvError) as caught:
        make(**params)
    assert told in str(caught.value)
    assert not caught.value.retriable


# ---------------------------------------------------------------- in the browser


def make(task: Any, **params: Any) -> Any:
    return find_environment("miniwob")("t", {"task": task, **params})


TASKS = ["click-test", "click-checkboxes", "enter-text", "choose-list", "login-user"]


@pytest.fixture(scope="module")
def world() -> Generator[Any]:
    """One browser for all tasks: a seed chooses one."""
    env = make(TASKS, max_steps=8)
    yield env
    env.close()


def begin(env: Any, task: str, round_: int = 3) -> str:
    shown, info = env.reset(seed=round_ * len(TASKS) + TASKS.index(task))
    assert info == {"task": task}
    assert shown.startswith("Task: ")
    return shown


def number(shown: str, pattern: str) -> str:
    found = re.search(rf"^\[(\d+)\] {pattern}", shown, re.MULTILINE)
    assert found, shown
    return found[1]


@chromium
def test_a_click(world: Any) -> None:
    shown = begin(world, "click-test")
    assert shown == 'Task: Click the button.\n[4] button "Click Me!"'
    assert begin(world, "click-test") == shown
    reply = world.step("<action>click(4)</action>")
    assert reply[1:4] == (1.0, True, False)
    assert reply[4]["raw_reward"] == 1


@chromium
def test_checkboxes(world: Any) -> None:
    shown = begin(world, "click-checkboxes", 3)
    wanted = shown.partition("Select ")[2].partition(" and click")[0].split(", ")
    other = begin(world, "click-checkboxes", 4)
    assert other.splitlines()[0] != shown.splitlines()[0], "another seed, another task"
    assert begin(world, "click-checkboxes", 3) == shown, "the same seed, the same task"
    lines = shown.splitlines()
    for words in wanted:
        box = lines[lines.index(words) - 1].partition("]")[0].removeprefix("[")
        shown, reward, ended, _, _ = world.step(f"click({box})")
        assert f"[{box}] input checkbox checked" in shown
        assert (reward, ended) == (0.0, False)
    assert world.step(f"click({number(shown, 'button')})")[1:4] == (1.0, True, False)


@chromium
def test_typing_replaces_what_is_there(world: Any) -> None:
    shown = begin(world, "enter-text")
    word = shown.partition('"')[2].partition('"')[0]
    field, button = number(shown, "input text"), number(shown, "button")
    shown = world.step(f'type({field}, "nonsense")')[0]
    assert f"[{field}] input text holds 'nonsense' (focused)" in shown
    shown = world.step(f'type({field}, "{word}x")')[0]
    assert f"holds '{word}x'" in shown
    assert f"holds '{word}'" in world.step('press("Backspace")')[0]
    assert world.step(f"click({button})")[1:3] == (1.0, True)


@chromium
def test_a_wrong_end_costs(world: Any) -> None:
    shown = begin(world, "enter-text")
    assert world.step(f"click({number(shown, 'button')})")[1:3] == (-1.0, True)


@chromium
def test_a_list(world: Any) -> None:
    shown = begin(world, "choose-list")
    wanted = shown.partition("Select ")[2].partition(" from the list")[0]
    field = number(shown, "select of: ")
    assert wanted in shown.splitlines()[1].partition(" of: ")[2].split(" | ")
    assert world.step(f'select({field}, "Nowhere at all")')[4] == {"invalid_action": True}
    world.step(f'select({field}, "{wanted}")')
    assert world.step(f"click({number(shown, 'button')})")[1:3] == (1.0, True)


@chromium
def test_what_is_no_action_changes_nothing_and_steps_are_limited(world: Any) -> None:
    shown = begin(world, "login-user")
    for text in ("hm", "click(77)", 'press("Everything")'):
        told, *rest, info = world.step(text)
        assert told.startswith("That is no action here. An action is click(number)")
        assert told.endswith(shown)
        assert rest == [0.0, False, False]
        assert info == {"invalid_action": True}
    assert [world.step("wait()")[3] for _ in range(5)] == [False] * 4 + [True]


# ---------------------------------------------------------------- trouble


def alive(pids: list[int]) -> list[int]:
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


async def until_gone(pids: list[int]) -> None:
    async with asyncio.timeout(LIMIT):
        while alive(pids):
            await asyncio.sleep(0.05)


def processes(env: Any) -> list[int]:
    driver = psutil.Process(env.browser._service.process.pid)
    return [driver.pid, *(child.pid for child in driver.children(recursive=True))]


@chromium
async def test_a_browser_that_dies_fails_its_episode_alone() -> None:
    client = LocalEnvs(find_environment, step_timeout=LIMIT)
    pool = EnvPool(client, PoolSettings(env_type="miniwob", params={"task": "click-test"}))
    opened = await asyncio.gather(*(pool.open(Task(task_id=n), n) for n in ("dies", "lives")))
    worlds: list[Any] = [client._instances[env.instance_id].env for env in opened]
    started = [pid for world in worlds for pid in processes(world)]
    assert len(alive(started)) >= 4
    profiles = [Path(world.browser._profile.name) for world in worlds]
    for env in opened:
        await env.reset()
    os.kill(worlds[0].browser.pid, signal.SIGKILL)
    await until_gone([worlds[0].browser.pid])
    with pytest.raises(EnvError) as caught:
        await opened[0].step("click(4)")
    assert caught.value.cause == "crashed"
    assert caught.value.retriable
    assert (await opened[1].step("click(4)"))[1:3] == (1.0, True)
    for env in opened:
        pool.release(env)
    await asyncio.to_thread(pool.close)
    assert pool.counters["env/failed/crashed"] == 1
    assert "env/release_failed" not in pool.counters
    await until_gone(started)
    assert not any(profile.exists() for profile in profiles)


@chromium
async def test_a_browser_that_answers_nothing_is_given_up_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = LocalEnvs(find_environment, step_timeout=5.0, create_timeout=LIMIT)
    pool = EnvPool(client, PoolSettings(env_type="miniwob", params={"task": "click-test"}))
    env = await pool.open(Task(task_id="t"), "e")
    world: Any = client._instances[env.instance_id].env
    world.browser._driver.command_executor.client_config.timeout = 10.0
    started = processes(world)
    await env.reset()
    os.kill(started[0], signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EnvError) as caught:
        await env.step("click(4)")
    assert caught.value.cause == "timeout"
    assert time.monotonic() - began < LIMIT / 2
    pool.release(env)
    await asyncio.to_thread(pool.close)
    assert pool.counters["env/failed/timeout"] == 1
    await until_gone(started)


@chromium
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="ties it to its parent: util-linux")
async def test_it_ends_with_a_process_that_was_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="w-", ignore_cleanup_errors=True) as left_behind:
        await killed_process(left_behind)


async def killed_process(left_behind: str) -> None:
    """A killed process leaves its browser's profile; a short path, for Chromium's sockets."""
    script = (
        "import time\n"
        "from envs.miniwob.test_miniwob import make, processes\n"
        "print(*processes(make('click-test')), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": left_behind},
    )
    assert parent.stdout is not None
    started = [int(pid) for pid in (await asyncio.to_thread(parent.stdout.readline)).split()]
    assert len(alive(started)) >= 4
    parent.kill()
    parent.wait()
    await until_gone(started)
