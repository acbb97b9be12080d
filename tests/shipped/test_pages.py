"""README, docs and tutorial pages keep their word: commands, code, links, packages."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from astuner.cli import main

from .artefacts import (
    PAGES,
    PROBLEMS,
    ROOT,
    SIDE_PAGES,
    blocks,
    commands,
    gsm8k_folder,
    name_of,
    offline_datasets,
    tiny,
)

README = ROOT / "README.md"
ELSEWHERE = [
    ROOT / "docs" / f"{name}.md"
    for name in ("verl", "trinity", "tinker", "service", "service_users")
]
"""What can be run of these is run by a test of their own beside this one."""
WITH_COMMANDS = [page for page in PAGES if commands(page, "astuner") and page not in ELSEWHERE]


def test_every_page_with_commands_is_found() -> None:
    assert README in WITH_COMMANDS
    assert len(WITH_COMMANDS) >= 3


# ---------------------------------------------------------------- the user's folder


def named_block(language: str, file: str) -> str:
    """The README's code block that begins with the file's name as a comment."""
    (found,) = [b for b in blocks(README, language) if b.startswith(f"# {file}\n")]
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files of the README, and the project's own beside them."""
    for language, file in (("python", "my_agent.py"), ("yaml", "my_agent.yaml")):
        (tmp_path / file).write_text(named_block(language, file))
    (tmp_path / "tasks.jsonl").write_text(tasks_file())
    for shipped in ("configs", "tutorial"):
        (tmp_path / shipped).symlink_to(ROOT / shipped)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_agent", None)


def tasks_file() -> str:
    """`tasks.jsonl` with the row that the README shows, several times."""
    (row,) = re.findall(r"`tasks\.jsonl` has .* such as `(\{.*?\})`", README.read_text())
    json.loads(row)
    return f"{row}\n" * 40


def as_typed(command: str, overrides: list[str]) -> int:
    """Run one `astuner` line; overrides go where the command takes a configuration."""
    arguments = shlex.split(command)[1:]
    return main(arguments + (overrides if "--conf" in arguments else []))


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_commands_work_in_their_order(
    page: Path,
    folder: Path,
    tiny_model_dir: Path,
    judge_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offline_datasets(folder / "cache", monkeypatch)
    overrides = tiny(tiny_model_dir)
    if "gsm8k" in page.read_text():
        overrides += gsm8k_folder(folder / "rows", PROBLEMS)
    if "scripted_judge" in page.read_text():
        overrides += [f"task_judge.llm.base_url={judge_url}"]
    for command in commands(page, "astuner"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
        code = as_typed(command, overrides)
        said = capsys.readouterr()
        assert code == 0, f"{command}\n{said.out}{said.err}"


def test_the_first_screen_is_short() -> None:
    """A workflow and a judge of one's own are about twenty lines."""
    code = named_block("python", "my_agent.py")
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


# ---------------------------------------------------------------- the Python block


def python_script(model: Path, data: Path, port: int) -> str:
    """The README's job, with a tiny model and a local dataset in the places of the real ones."""
    (script,) = [b for b in blocks(README, "python") if "AstunerJob" in b]
    small = (
        'job.config.model.dtype = "float32"\n'
        "job.config.data.train_batch_size = job.config.rollout.num_repeat = 2\n"
        "job.config.rollout.max_response_length_in_one_turn = 6\n"
        "job.config.trainer_common.total_steps = 1\n"
    )
    for old, new in {
        'model="smollm2-135m"': f'model="{model}"',
        'dataset_path="openai/gsm8k"': f'dataset_path="{data}"',
        "tuned = job.tune()": f"{small}tuned = job.tune()",
        "tuned.serve(8000)": f"tuned.serve({port})",
    }.items():
        assert script.count(old) == 1, f"the README's Python block has no {old} any more"
        script = script.replace(old, new)
    return script


@pytest.mark.timeout(180)
def test_the_python_block_runs_as_a_script(folder: Path, tiny_model_dir: Path) -> None:
    gsm8k_folder(folder / "rows", PROBLEMS)
    (folder / "script.py").write_text(python_script(tiny_model_dir, folder / "rows", 0))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, endpoint = wait_for_endpoint(process)
        assert endpoint, said
        client = openai.OpenAI(**endpoint, timeout=60, max_retries=0)
        reply = client.chat.completions.create(
            model="anything", messages=[{"role": "user", "content": "hello"}], max_tokens=3
        )
        assert reply.usage is not None
        assert 1 <= reply.usage.completion_tokens <= 3
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
    finally:
        process.kill()
        process.wait(timeout=30)
    assert (folder / "my-model" / "model.safetensors").is_file()


def wait_for_endpoint(process: subprocess.Popen[str]) -> tuple[str, dict[str, str]]:
    """What was printed, and the base URL and key of the endpoint once both are."""
    said, endpoint = "", dict[str, str]()
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if found := re.match(r"\s*(base_url|api_key)\s+(\S+)", line):
            endpoint[found[1]] = found[2]
        if len(endpoint) == 2:
            return said, endpoint
    return said, {}


# ---------------------------------------------------------------- make, links, packages


def make_targets() -> list[str]:
    """Targets named on the pages, in bash blocks or in the text, and in `make help`."""
    named = [c.split()[1] for page in PAGES for c in commands(page, "make")]
    for text in [page.read_text() for page in PAGES]:
        named += re.findall(r"`make ([\w-]+)`", text)
    named += re.findall(r'@echo "make ([\w-]+)', (ROOT / "Makefile").read_text())
    return sorted(set(named))


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize("target", make_targets())
def test_make_target(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, *SIDE_PAGES], ids=name_of)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:astuner|configs|tutorial|benchmarks)/[\w/.-]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_leads_to_everything() -> None:
    """Every page, every example and every target that sets up and tests."""
    text = README.read_text()
    pages = [
        name_of(page) for page in (*ROOT.glob("docs/*.md"), *ROOT.glob("tutorial/*/README.md"))
    ]
    assert [page for page in pages if f"({page})" not in text] == []
    targets = re.findall(r'@echo "make (test[\w-]*|lint)', (ROOT / "Makefile").read_text())
    assert [target for target in targets if f"`make {target}`" not in text] == []


def test_extras_are_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = [
        extra
        for page in PAGES
        for extras in re.findall(r"astuner\[([\w,-]+)\]", page.read_text())
        for extra in extras.split(",")
    ]
    assert named
    assert set(named) - set(declared) == {"x"} & set(named)
