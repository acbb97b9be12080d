"""Which frames of a stuck process are shown."""

from __future__ import annotations

from astuner.backbone.spawned.stacks import innermost

ENVIRONMENT = "/home/me/.cache/astuner/envs/verl-1/lib/python3.11/site-packages"
DUMP = f"""Thread 0x01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "{ENVIRONMENT}/ray/a.py", line 1 in one
  File "{ENVIRONMENT}/ray/b.py", line 2 in two
  File "{ENVIRONMENT}/ray/c.py", line 3 in three
  File "{ENVIRONMENT}/ray/d.py", line 4 in four

Current thread 0x02 (most recent call first):
  File "{ENVIRONMENT}/ray/worker.py", line 5 in get
  File "{ENVIRONMENT}/verl/checkpoint_engine/base.py", line 519 in update_weights
  File "/usr/lib/python3.11/asyncio/events.py", line 80 in _run
  File "{ENVIRONMENT}/verl/trainer/main_ppo.py", line 155 in run
  File "/work/astuner/backbone/verl/task_runner.py", line 36 in run
"""


def test_frames_of_trainer_and_ours_wherever_the_environment_lies() -> None:
    assert innermost(DUMP, 3) == (
        f"  update_weights ({ENVIRONMENT}/verl/checkpoint_engine/base.py:519)\n"
        f"  run ({ENVIRONMENT}/verl/trainer/main_ppo.py:155)\n"
        "  run (/work/astuner/backbone/verl/task_runner.py:36)"
    )
    assert innermost("", 3) == ""
