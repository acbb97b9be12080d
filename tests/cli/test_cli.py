"""The command line: what it prints, what it imports, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from astuner.cli import main
from tests.tiny_run import tiny_job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def conf(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A YAML of the tiny job, with its tasks in a file."""
    rows = tmp_path / "tasks.jsonl"
    rows.write_text("".join(f'{{"question": "say {i}"}}\n' for i in range(4)))
    job = tiny_job(tiny_model_dir, tmp_path / "runs", total_steps=1)
    job.set_data("jsonl", rows, validation=rows)
    job._unnamed.clear()
    return job.dump_job_as_yaml(tmp_path / "tiny.yaml")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom astuner.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'omegaconf', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "astuner explain" in done.stdout


def test_tune_then_eval_then_chat(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--conf", str(conf), "trainer_common.val_before_train=false"]) == 0
    out = capsys.readouterr().out
    assert "held-out score" in out
    assert "astuner chat" in out
    run_dir = tmp_path / "runs" / "tiny"
    # The override is in the run's own configuration only.
    assert f"eval --conf {run_dir / 'config.yaml'} --adapter {run_dir}" in out
    assert main(["eval", "--conf", str(conf), "--adapter", str(run_dir)]) == 0
    assert "held-out score" in capsys.readouterr().out
    assert main(["chat", str(run_dir), "--message", "hello"]) == 0


def test_a_typo_in_a_key_names_line_and_nearest_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  rollout:\n    num_repeats: 4\n")
    assert main(["--conf", str(path)]) == 2
    err = capsys.readouterr().err
    assert "x.yaml:3" in err
    assert "astuner.rollout.num_repeat" in err


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["--backbone", "lokal"], 2, "local"),
        (["rollout.user_workflow=no.such.module->X"], 3, "no.such.module"),
        (["rollout.user_workflow=tests.tiny_run->NoSuch"], 3, "NoSuch"),
        (["model.path=/no/such/folder"], 5, "/no/such/folder"),
        (["task_reader.jsonl_dataset_file.training.file_path=/no/file.jsonl"], 3, "/no/file"),
        (["model_tuner.port=99999"], 2, "port"),
    ],
)
def test_trouble_has_a_message_and_an_exit_code(
    conf: Path, overrides: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--conf", str(conf), *overrides]) == code
    assert said in capsys.readouterr().err


def test_resume_without_a_run_says_so(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conf", str(conf), "--resume"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_explain_prints_the_whole_translation_to_verl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  verl: {trainer: {log_val_generations: 5}}\n")
    asked = ["explain", "--conf", str(path), "--backbone", "verl", "--ray-address", "10.0.0.1:6379"]
    assert main([*asked, "rollout.num_repeat=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("as on a machine with GPUs; where none is visible")
    told = {line.split(" = ")[0].strip(): line for line in lines if " = " in line}
    assert (
        "[command line] verl: actor_rollout_ref.rollout.n=4" in told["astuner.rollout.num_repeat"]
    )
    assert "'10.0.0.1:6379'  [command line]" in told["astuner.trainer_common.ray_address"]
    assert told["algorithm.use_kl_in_reward"] == "algorithm.use_kl_in_reward = False"
    assert "note: `astuner.verl` sets trainer.log_val_generations=5 instead of 0." in lines


def test_explain_names_what_keeps_verl_from_starting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner: {trainer_common: {optim: {lr_schedule: linear}}}\n")
    assert main(["explain", "--conf", str(path)]) == 0
    on_cpu = ["trainer_common.device=cpu"]
    assert main(["explain", "--conf", str(path), "--backbone", "verl", *on_cpu]) == 2
    assert "as on a machine" not in capsys.readouterr().out
    assert main(["explain", "--conf", str(path), "--backbone", "verl"]) == 2
    assert "`astuner.trainer_common.optim.lr_schedule` is 'linear'" in capsys.readouterr().err


def test_explain_for_verl_needs_no_verl(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner: {backbone: verl}\n")
    code = (
        "import sys\nfrom astuner.cli import main\n"
        f"assert main(['explain', '--conf', {str(path)!r}]) == 0\n"
        "heavy = {'torch', 'ray', 'verl', 'hydra'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_explain_shows_origin(conf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--conf", str(conf), "--set-only", "seed=3"]) == 0
    out = capsys.readouterr().out
    assert "seed" in out
    assert "command line" in out


@pytest.mark.parametrize(
    ("packages", "num_gpus", "runs", "types"),
    [
        ((), 0, "no", "scripts/install.py --env verl"),
        (("verl", "ray"), 0, "to try out", "local trains better"),
        ((), 8, "no", 'pip install "astuner\\[verl]"'),
        (("verl", "ray"), 8, "no", 'pip install "astuner\\[verl]"'),
        (("verl", "ray", "vllm"), 8, "yes", "n_gpus_per_node=8"),
        (("verl", "ray", "sglang"), 1, "yes", "n_gpus_per_node=1"),
    ],
)
def test_doctor_knows_what_verl_needs(
    packages: tuple[str, ...], num_gpus: int, runs: str, types: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from astuner.cli import doctor

    monkeypatch.setattr(doctor, "installed", lambda name: "1" if name in packages else None)
    said = doctor.verl_here(num_gpus)
    assert said[0] == runs
    assert types in said[1]


@pytest.mark.parametrize(
    ("packages", "num_gpus", "runs", "types"),
    [
        ((), 0, "no", "scripts/install.py --env trinity"),
        ((), 8, "no", 'pip install "astuner\\[trinity]"'),
        (("trinity-rft", "ray", "tinker"), 0, "yes", "over astuner's own service"),
        (("trinity-rft", "ray", "tinker", "vllm"), 8, "yes", "never tried"),
    ],
)
def test_doctor_knows_what_trinity_needs(
    packages: tuple[str, ...], num_gpus: int, runs: str, types: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from astuner.cli import doctor

    monkeypatch.setattr(doctor, "installed", lambda name: "1" if name in packages else None)
    said = doctor.trinity_here(num_gpus)
    assert said[0] == runs
    assert types in said[1]


def test_explain_prints_the_whole_translation_to_trinity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("astuner:\n  trinity: {algorithm: {optimizer: {min_lr_ratio: 0.5}}}\n")
    asked = ["explain", "--conf", str(path), "--backbone", "trinity"]
    assert main([*asked, "rollout.engine=service", "rollout.mode=sync"]) == 0
    out = capsys.readouterr().out
    assert 'trinity: synchronizer.sync_style="fixed"' in out
    assert "sets algorithm.optimizer.min_lr_ratio=0.5 instead of 0.0." in out
    assert main([*asked, "rollout.engine=service", "rollout.temperature=0.5"]) == 2


def test_doctor_says_that_local_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "local" in capsys.readouterr().out
