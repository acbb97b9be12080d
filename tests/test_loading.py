"""Paths to objects and back; one test for each message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from astuner.errors import LoadingError
from astuner.loading import load_object, object_path


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch) -> Path:
    """A working directory of one's own, and no trace of it afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(name: str, text: str) -> Path:
    path = Path(name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))
    return path


def refusal(path: str, what: str = "workflow") -> str:
    with pytest.raises(LoadingError) as caught:
        load_object(path, what)
    return str(caught.value)


def test_a_class_of_a_package_in_the_working_directory() -> None:
    write("lt_pkg/__init__.py", "")
    write("lt_pkg/flow.py", "class Flow:\n    class Inner: pass\n")
    flow = load_object("lt_pkg.flow->Flow", "workflow")
    assert flow.__name__ == "Flow"
    assert load_object(" lt_pkg.flow -> Flow.Inner ", "workflow") is flow.Inner
    assert object_path(flow) == "lt_pkg.flow->Flow"
    assert object_path(flow.Inner) == "lt_pkg.flow->Flow.Inner"


def test_a_file_with_a_neighbour_is_loaded_once() -> None:
    write("sub/lt_neighbour.py", "NUMBER = 3")
    path = write("sub/my-flow.py", "from lt_neighbour import NUMBER\nclass Flow: n = NUMBER\n")
    flow = load_object("sub/my-flow.py->Flow", "workflow")
    assert flow.n == 3
    assert load_object(f"{path}->Flow", "workflow") is flow
    assert object_path(flow) == f"{path}->Flow"
    assert load_object(object_path(flow), "workflow") is flow


def test_a_script_names_its_own_classes_and_is_not_run_twice() -> None:
    write(
        "script.py",
        """
        from astuner.loading import load_object, object_path
        print("running")
        class Flow: pass
        path = object_path(Flow)
        print(path)
        print(load_object(path, "workflow") is Flow)
        """,
    )
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["running", f"{Path('script.py').resolve()}->Flow", "True"]


def test_a_class_of_a_notebook_has_no_path() -> None:
    code = (
        "from astuner.loading import object_path\n"
        "class Flow: pass\n"
        "try: object_path(Flow)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == (
        "LoadingError Flow is defined in a notebook or an interactive session, so no path leads "
        "to it. Move it into a .py file and import it from there.\n"
    )


def test_objects_without_a_path() -> None:
    class Local: ...

    for obj, part in [
        (Local, "is defined inside a function, so no path leads to it. Move it to the top level"),
        (lambda: 0, "is defined inside a function"),
        (Path("x"), "PosixPath('x') is no class or function"),
    ]:
        with pytest.raises(LoadingError) as caught:
            object_path(obj)
        assert part in str(caught.value)


def test_an_object_that_was_replaced_has_no_path() -> None:
    write("lt_twice.py", "class Flow: pass\nOld = Flow\nclass Flow: pass\n")
    with pytest.raises(LoadingError, match=r"lt_twice->Flow leads to .*, not to the object given"):
        object_path(load_object("lt_twice->Old", "workflow"))


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("a.b.Flow", " Did you mean a.b->Flow?"),
        ("a.b:Flow", " Did you mean a.b->Flow?"),
        ("Flow", ""),
        ("a.b->", ""),
        ("->Flow", ""),
    ],
)
def test_malformed(path: str, hint: str) -> None:
    assert refusal(path) == (
        f"The workflow {path!r} is not of the form package.module->Name or "
        f"path/to/file.py->Name.{hint}"
    )


def test_no_such_module() -> None:
    write("lt_pkg2/__init__.py", "")
    write("lt_pkg2/flow.py", "")
    told = refusal("lt_pgk2.flow->Flow")
    assert "there is no module 'lt_pgk2' from" in told
    assert "Did you mean lt_pkg2?" in told
    assert "Run from the project's folder" in told
    told = refusal("lt_pkg2.flwo->Flow")
    assert "there is no module 'lt_pkg2.flwo' in the package lt_pkg2. Did you mean flow?" in told
    told = refusal("lt_pkg2.flow.deeper->Flow")
    assert "no module 'lt_pkg2.flow.deeper'" in told


def test_no_such_file() -> None:
    write("lt_flow.py", "")
    told = refusal("lt_flwo.py->Flow")
    assert f"there is no file {Path('lt_flwo.py').resolve()}. Did you mean lt_flow.py?" in told


def test_a_file_that_is_not_python() -> None:
    write("sub/flow.txt", "")
    assert "is no Python file (.py)" in refusal("sub/flow.txt->Flow")


def test_no_such_name() -> None:
    file = write("lt_names.py", "class MathFlow: pass\n_hidden = 1\n")
    told = refusal("lt_names->MathFlwo", "judge")
    assert told == (
        f"The judge 'lt_names->MathFlwo': {file} has no 'MathFlwo'. Did you mean MathFlow?"
    )
    assert "has no 'zzz'. It has: MathFlow." in refusal("lt_names->zzz")


def test_an_error_inside_the_module_shows_the_users_frames_only() -> None:
    write("lt_deep.py", "def fail():\n    raise ValueError('broken setting')\n")
    file = write("lt_raises.py", "import lt_deep\nlt_deep.fail()\n")
    for path in ("lt_raises->Flow", "./lt_raises.py->Flow"):
        told = refusal(path)
        assert f"The workflow {path!r} cannot be imported; its own code raised:" in told
        assert f'File "{file}", line 2, in <module>' in told
        assert 'lt_deep.py", line 2, in fail' in told
        assert told.endswith("ValueError: broken setting")
        assert "importlib" not in told
        assert "loading.py" not in told


def test_a_missing_package_inside_the_module() -> None:
    write("lt_needs.py", "import lt_absent_package\n")
    told = refusal("lt_needs->Flow")
    assert "ModuleNotFoundError: No module named 'lt_absent_package'" in told
    assert "Install the missing package 'lt_absent_package', or mend the import." in told


def test_a_syntax_error() -> None:
    file = write("lt_syntax.py", "class Flow\n")
    told = refusal("lt_syntax->Flow")
    assert f'File "{file}", line 1' in told
    assert "SyntaxError: expected ':'" in told


def test_a_module_that_exits() -> None:
    write("lt_exits.py", "import sys\nsys.exit(3)\n")
    told = refusal("lt_exits->Flow")
    assert "SystemExit: 3" in told
    assert 'Guard the script part with: if __name__ == "__main__":' in told


def test_a_failed_file_can_be_mended_and_loaded() -> None:
    write("lt_mend.py", "1 / 0\n")
    assert "ZeroDivisionError" in refusal("./lt_mend.py->Flow")
    write("lt_mend.py", "class Flow: pass\n")
    assert load_object("./lt_mend.py->Flow", "workflow").__name__ == "Flow"
