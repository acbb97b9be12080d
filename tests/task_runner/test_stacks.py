"""Which frames are the user's, and what is shown of the others."""

from __future__ import annotations

import json
import sysconfig
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import astuner
from astuner.task_runner.stacks import is_users, raised_at, user_traceback, waiting_at


@pytest.mark.parametrize(
    ("filename", "users"),
    [
        (__file__, True),
        (str(Path(astuner.__file__).parent / "task_runner" / "runner.py"), False),
        (sysconfig.get_path("stdlib") + "/json/decoder.py", False),
        ("/home/me/project/.venv/lib/python3.12/site-packages/openai/_client.py", False),
        ("/home/me/project/agent.py", True),
        ("<frozen importlib._bootstrap>", False),
        ("<ipython-input-3-abc>", True),
    ],
)
def test_whose_file_it_is(filename: str, users: bool) -> None:
    assert is_users(filename) is users


def caught(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError


def parse() -> None:
    json.loads("{")


def wrap() -> None:
    try:
        parse()
    except ValueError as error:
        raise RuntimeError("no plan") from error


def test_library_frames_are_left_out_and_own_causes_stay() -> None:
    shown = user_traceback(caught(wrap))
    assert "decoder.py" not in shown
    assert shown.count("Traceback") == 2
    assert 'json.loads("{")' in shown
    assert shown.endswith("RuntimeError: no plan")
    assert raised_at(caught(wrap)).startswith("test_stacks.py:")


def test_causes_inside_libraries_are_left_out() -> None:
    def client() -> None:
        with ThreadPoolExecutor() as pool:
            inner = pool.submit(json.loads, "{").exception()
        raise ConnectionError("refused") from inner

    shown = user_traceback(caught(client))
    assert shown.count("Traceback") == 1
    assert "JSONDecodeError" not in shown


def test_where_no_frame_is_the_users_the_innermost_are_shown() -> None:
    with ThreadPoolExecutor() as pool:
        error = pool.submit(json.loads, "{").exception()
    assert error is not None
    shown = user_traceback(error)
    assert shown.count("File ") == 3
    assert "decoder.py" in shown
    assert raised_at(error) == ""


def test_all_of_an_exception_group() -> None:
    def both() -> None:
        raise ExceptionGroup("two went wrong", [caught(parse), caught(wrap)])

    shown = user_traceback(caught(both))
    assert "RuntimeError: no plan" in shown
    assert shown.count('json.loads("{")') == 2
    assert "decoder.py" not in shown


def test_where_a_thread_blocks() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(20)  # here

    thread = threading.Thread(target=hang, daemon=True)
    thread.start()
    shown = waiting_at(thread.ident or 0)
    release.set()
    thread.join(20)
    assert "release.wait(20)  # here" in shown
    assert "threading.py" in shown  # the innermost frame, as a hint
    assert waiting_at(thread.ident or 0) == ""
