"""Nothing that was started outlives us: the guard with children that would like to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from astuner.backbone.spawned.files import STOP
from astuner.backbone.spawned.supervise import Child, Silence, temporary_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl, as verl itself does")
SECONDS = 20.0

STUBBORN = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
sleeper = "import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
if os.fork() == 0:  # a daemon: its own session, its parent gone
    os.setsid()
    daemon = subprocess.Popen([sys.executable, "-c", sleeper])
    (folder / "daemon.tmp").write_text(str(daemon.pid))
    (folder / "daemon.tmp").rename(folder / "daemon")
    os._exit(0)
child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
while not (folder / "daemon").exists():
    time.sleep(0.01)
Path(os.environ["RAY_TMPDIR"], "socket").touch()
(folder / "pids.tmp").write_text(f"{os.getpid()} {child.pid} {(folder / 'daemon').read_text()}")
(folder / "pids.tmp").rename(folder / "pids")
if sys.argv[2] == "stay":
    time.sleep(600)
print("bye")
sys.exit(int(sys.argv[2]))
"""


def eventually(true: Callable[[], bool], seconds: float = SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def command(folder: Path, then: str) -> list[str]:
    return [sys.executable, "-c", STUBBORN, str(folder), then]


def pids(folder: Path) -> list[int]:
    assert eventually((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_what_a_command_leaves_behind_is_killed_at_its_end(tmp_path: Path) -> None:
    with Child(command(tmp_path, "7"), tmp_path, log="child.log") as child:
        started = pids(tmp_path)
        assert eventually(lambda: child.ended() is not None)
        assert child.ended() == 7
        assert [gone(pid) for pid in started] == [True, True, True]
        assert not child.temporary.exists()
    assert (tmp_path / "child.log").read_text().splitlines() == ["bye"]


def test_closing_kills_daemons_too(tmp_path: Path) -> None:
    child = Child(command(tmp_path, "stay"), tmp_path, log="child.log")
    started = pids(tmp_path)
    assert child.ended() is None and not any(gone(pid) for pid in started)
    child.close()
    assert [gone(pid) for pid in started] == [True, True, True]
    assert not child.temporary.exists()
    child.close()


LAUNCHER = """
import sys, time
from pathlib import Path
from astuner.backbone.spawned.supervise import Child
child = Child(sys.argv[2:], Path(sys.argv[1]), log="child.log")
written = Path(sys.argv[1], "guard.tmp")
written.write_text(f"{child.pid} {child.temporary}")
written.rename(Path(sys.argv[1], "guard"))
time.sleep(600)
"""


@pytest.mark.parametrize("victim", ["launcher", "guard"])
def test_a_killed_launcher_leaves_no_process(tmp_path: Path, victim: str) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), *command(tmp_path, "stay")]
    )
    try:
        driver, child, daemon = pids(tmp_path)
        assert eventually((tmp_path / "guard").exists)
        guard, temporary = (tmp_path / "guard").read_text().split()
        os.kill(launcher.pid if victim == "launcher" else int(guard), signal.SIGKILL)
        if victim == "launcher":
            doomed = [int(guard), driver, child, daemon]
        else:  # then only the command itself: Ray's servers end with it by themselves
            doomed = [int(guard), driver]
        assert eventually(lambda: all(gone(pid) for pid in doomed))
        if victim == "launcher":
            assert eventually(lambda: not Path(temporary).exists())
    finally:
        launcher.kill()
        launcher.wait(SECONDS)
        for pid in pids(tmp_path):
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree((tmp_path / "guard").read_text().split()[1], ignore_errors=True)


def test_a_signal_is_told_as_a_shell_does(tmp_path: Path) -> None:
    with Child(command(tmp_path, "stay"), tmp_path, log="child.log") as child:
        os.kill(pids(tmp_path)[0], signal.SIGSEGV)
        assert eventually(lambda: child.ended() is not None)
        assert child.ended() == 128 + 11


def test_a_wish_to_stop_is_a_file(tmp_path: Path) -> None:
    with Child([sys.executable, "-c", "pass"], tmp_path, log="child.log") as child:
        child.ask_to_stop()
    assert (tmp_path / STOP).exists()


def test_the_temporary_folder_leaves_room_for_socket_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + 80 * "x")
    folder = temporary_folder()
    folder.rmdir()
    sockets = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    assert len(f"{folder}{sockets}") < 107


def test_silence_is_the_time_since_anything_changed() -> None:
    now = [0.0]
    silence = Silence(10.0, lambda: now[0])
    silence.note("a")
    now[0] = 9.0
    silence.note("a")
    assert not silence.too_long
    silence.note("b")
    now[0] = 18.9
    assert not silence.too_long
    now[0] = 19.0
    assert silence.too_long and silence.seconds == 10.0
    assert not Silence(0.0, lambda: 1e9).too_long
