"""The quickstart's own configuration, workflow, dataset and judge, with Trinity and the real model.

Only what Trinity cannot do is set otherwise (its trainers know no linear schedule), and it is
made short: four small steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from astuner.tracking import read_episodes, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.trinity,
    pytest.mark.timeout(1200),
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(sys.platform != "linux", reason="Trinity runs on Linux"),
]
STEPS, TASKS, REPEATS, VALIDATED = 4, 2, 8, 8


def test_the_quickstart_with_nothing_but_another_backbone(tmp_path: Path) -> None:
    options = [
        "trainer_common.optim.lr_schedule=constant",
        f"trainer_common.total_steps={STEPS}",
        "trainer_common.test_freq=0",
        f"data.train_batch_size={TASKS}",
        f"rollout.num_repeat={REPEATS}",
        f"rollout.val_kwargs.max_tasks={VALIDATED}",
        f"experiment_dir={tmp_path}",
    ]
    command = ["astuner.cli", "--conf", "configs/quickstart.yaml", "--backbone", "trinity"]
    with (tmp_path / "said").open("w+") as said:
        code = subprocess.run(
            [sys.executable, "-m", *command, *options],
            env={**os.environ, "RAY_TMPDIR": "/tmp"},
            stdout=said,
            stderr=subprocess.STDOUT,
            timeout=1000,
            check=False,
        ).returncode
        said.seek(0)
        assert code == 0, said.read()[-6000:]
    run = tmp_path / "quickstart"
    metrics = read_metrics(run / "metrics.jsonl")
    assert list(metrics) == list(range(STEPS + 1))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["stopped"], summary["episodes_failed"]) == (STEPS, False, 0)
    assert summary["episodes"] == STEPS * TASKS * REPEATS
    for step in range(1, STEPS + 1):
        assert metrics[step]["staleness/max"] <= 1
        if not metrics[step]["staleness/max"]:  # sampler and trainer agree
            assert metrics[step]["policy/logprob_gap"] < 1e-3
        assert metrics[step]["policy/grad_norm"] > 0
    rows = read_episodes(run).to_pylist()
    assert Counter(row["split"] for row in rows) == {
        "train": STEPS * TASKS * REPEATS,
        "validation": 2 * VALIDATED,
    }
    assert {0.0, 0.1} <= {row["reward"] for row in rows} <= {0.0, 0.1, 1.0}
    assert (run / "model" / "adapter_model.safetensors").stat().st_size > 1_000_000
