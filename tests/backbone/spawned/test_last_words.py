"""Which lines of a noisy log a person is shown."""

from __future__ import annotations

from pathlib import Path

from astuner.backbone.spawned.last_words import last_words

RAY = """\
2026-01-01 00:00:00,000\tINFO worker.py:2000 -- Started a local Ray instance.
\x1b[36m(WorkerDict pid=77)\x1b[0m Traceback (most recent call last):
\x1b[36m(WorkerDict pid=77)\x1b[0m   File "/x/verl/workers/a.py", line 1, in outer
\x1b[36m(WorkerDict pid=77)\x1b[0m     inner()
\x1b[36m(WorkerDict pid=77)\x1b[0m   File "/x/torch/b.py", line 2, in inner
\x1b[36m(WorkerDict pid=77)\x1b[0m     raise OutOfMemoryError()
\x1b[36m(WorkerDict pid=77)\x1b[0m torch.OutOfMemoryError: CUDA out of memory.
\x1b[36m(WorkerDict pid=77)\x1b[0m Tried to allocate 2 GiB.
(TaskRunner pid=5) Training Progress:   0%|          | 0/10
Traceback (most recent call last):
  File "/x/driver.py", line 9, in main
    run()
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: create_colocated_worker_cls
(raylet) more noise

"""


def test_the_cause_is_shown_and_not_that_another_process_died_of_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(RAY)
    assert last_words(tmp_path / "log").splitlines() == [
        '  File "/x/verl/workers/a.py", line 1, in outer',
        "    inner()",
        '  File "/x/torch/b.py", line 2, in inner',
        "    raise OutOfMemoryError()",
        "torch.OutOfMemoryError: CUDA out of memory.",
        "Tried to allocate 2 GiB.",
    ]


def test_only_second_hand_news_is_better_than_nothing(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(RAY.partition("0/10\n")[2])
    assert last_words(tmp_path / "log").splitlines() == [
        '  File "/x/driver.py", line 9, in main',
        "    run()",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
        "\tclass_name: create_colocated_worker_cls",
    ]


def test_without_an_exception_the_last_lines_are_shown(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(f"line {i}\n\n" for i in range(30)))
    assert last_words(tmp_path / "log").splitlines() == [f"line {i}" for i in range(22, 30)]
    assert last_words(tmp_path / "none") == ""
