"""What a finished run leaves behind and shows, whatever backbone trained it.

The score of a validation, `summary.json`, the learning curve, the table with the
commands to type next, and where in a run's folder its checkpoints and its model are.
Trains nothing and starts nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from astuner.backbone.context import RunContext, RunResult
from astuner.config.loaded import COMMAND_LINE
from astuner.errors import CheckpointError
from astuner.tracking import learning_curve, next_commands, summary_table, write_summary
from astuner.trainer import Checkpoints, EvalResult, TrainResult
from astuner.trainer.checkpoints import STATE_FILE
from astuner.trainer.metrics import target_totals
from astuner.types import Episode

CHECKPOINTS = "checkpoints"
MODEL = "model"
"""Where a run that trained outside this process leaves its plain transformers folder."""
SERVICE_STATE = "service_state.json"
"""In a checkpoint whose weights a service keeps: their name there."""
VERL_LATEST = "latest_checkpointed_iteration.txt"


def eval_result(episodes: Sequence[Episode]) -> EvalResult:
    """The score is the success rate where every scored episode says whether it succeeded,
    else the mean reward; failed episodes count as 0, also for each target."""
    if not episodes:
        return EvalResult(0.0, 0)
    scored = [e for e in episodes if e.ok]
    failed = len(episodes) - len(scored)
    reward = sum(e.reward or 0.0 for e in scored) / len(episodes)
    metrics = {"reward": reward, "failed": float(failed)}
    metrics |= {
        f"reward/{tag}": sum(got) / (len(got) + failed)
        for tag, got in target_totals(scored).items()
    }
    if not scored or any(e.is_success is None for e in scored):
        return EvalResult(reward, len(episodes), metrics)
    success = sum(bool(e.is_success) for e in scored) / len(episodes)
    return EvalResult(success, len(episodes), {**metrics, "success_rate": success})


def summarise(context: RunContext, result: TrainResult) -> dict[str, Any]:
    """The content of `summary.json`."""
    totals, config = result.totals, context.config
    before, after = result.eval_before, result.eval_after
    return {
        "backbone": config.backbone,
        "model": config.model.path,
        "steps": result.steps,
        "stopped": result.stopped,
        "eval_before": before.score if before and before.num else None,
        "eval_after": after.score if after and after.num else None,
        "evals": {str(step): e.score for step, e in result.evals.items() if e.num},
        "eval_episodes": after.num if after else before.num if before else 0,
        "train_seconds": round(totals.train_seconds, 3),
        "tokens_sampled": totals.tokens_sampled,
        "tokens_trained": totals.tokens_trained,
        "tokens_masked_by_reason": dict(totals.tokens_masked_by_reason),
        "episodes": totals.episodes,
        "episodes_failed": totals.episodes_failed,
        "steps_skipped": totals.steps_skipped,
        "checkpoint": str(result.checkpoint) if result.checkpoint else None,
        "run_dir": str(context.run_dir),
    }


def finish(
    context: RunContext, result: TrainResult, *, model_dir: Path | None, what: str
) -> RunResult:
    """Write the summary and the curve, show the table. `what` names what is in `model_dir`."""
    run_dir = context.run_dir
    summary = summarise(context, result)
    write_summary(run_dir, summary)
    places: dict[str, object] = {}
    if curve := learning_curve(run_dir):
        places["learning curve"] = curve
    if model_dir:
        places[what] = model_dir
    places["all facts"] = run_dir / "summary.json"
    places["episodes"] = run_dir / "episodes"
    console = Console()
    console.print(summary_table(summary, places=places))
    console.print(next_commands(_commands(context, result)), soft_wrap=True)
    return RunResult(run_dir, summary, model_dir, result.stopped)


def _commands(context: RunContext, result: TrainResult) -> list[tuple[str, str]]:
    conf = context.loaded.path
    if conf is None or COMMAND_LINE in context.loaded.set_by_user().values():
        conf = context.run_dir / "config.yaml"  # what was overridden is only there
    astuner = executable()
    if result.stopped:
        return [("go on where it stopped", f"{astuner} --conf {conf} --resume")]
    return [
        ("talk to the tuned model", f"{astuner} chat {context.run_dir}"),
        ("score it again", f"{astuner} eval --conf {conf} --adapter {context.run_dir}"),
        ("watch episodes token by token", f"{astuner} --conf {conf} --backbone debug"),
    ]


def executable() -> str:
    """How to type `astuner` here: its path where the environment is not activated, the whole
    line where one with a name was asked for (scripts/named_env.py tells it)."""
    if line := os.environ.get("ASTUNER_COMMAND"):
        return line
    ours = Path(sys.executable).parent / "astuner"
    found = shutil.which("astuner")
    if (found is not None and Path(found) == ours) or not ours.exists():
        return "astuner"
    with suppress(ValueError):
        return str(ours.relative_to(Path.cwd()))
    return str(ours)


# ---------------------------------------------------------------- where things are


def checkpoint_of(path: Path) -> Path:
    """The tuned weights: those of a run folder, or the folder itself if it holds some.

    A run of verl whose model is not merged yet is merged now. Raises CheckpointError when
    there are none.
    """
    if is_whole_model(path / MODEL) or is_checkpoint(path / MODEL):
        return path / MODEL
    if (path / CHECKPOINTS).is_dir():
        latest = Checkpoints(path / CHECKPOINTS).latest()
        if latest is not None:
            return latest.path
        if verl_checkpoint(path) is not None:
            from astuner.backbone.verl.merge import merge_run

            return merge_run(path)
    elif any(
        (path / name).exists() for name in (STATE_FILE, "adapter_config.json")
    ) or is_whole_model(path):
        return path
    raise CheckpointError(
        f"{path} is neither a run folder with a checkpoint nor a checkpoint folder. "
        "Give the folder that the run's final table names."
    )


def is_checkpoint(path: Path) -> bool:
    """A checkpoint of the local backbone, or an adapter in PEFT format."""
    return any((path / name).exists() for name in (STATE_FILE, "adapter_config.json"))


def is_whole_model(path: Path) -> bool:
    """A folder that transformers loads by itself, without a base model."""
    has_weights = any(path.glob("*.safetensors"))
    return (path / "config.json").is_file() and has_weights and not (path / STATE_FILE).exists()


def saved_step(run_dir: Path, backbone: str) -> int | None:
    """The step from which the backbone can resume the run, if it has a checkpoint of it."""
    if backbone == "verl":
        checkpoint = verl_checkpoint(run_dir)
        return None if checkpoint is None else int(checkpoint.name.rpartition("_")[2])
    if backbone == "trinity":
        checkpoint = trinity_checkpoint(run_dir)
        return None if checkpoint is None else int(checkpoint.name.rpartition("_")[2])
    latest = Checkpoints(run_dir / CHECKPOINTS).latest()
    if latest is None or (latest.path / SERVICE_STATE).is_file() != (backbone == "tinker"):
        return None
    return latest.state.step


def verl_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that verl finished, `checkpoints/global_step_N`."""
    return _newest_step(run_dir / CHECKPOINTS)


def trinity_checkpoint(run_dir: Path) -> Path | None:
    """The newest that Trinity finished, `checkpoints/trinity/global_step_N`."""
    return _newest_step(run_dir / CHECKPOINTS / "trinity")


def _newest_step(folder: Path) -> Path | None:
    """By the file that both keep beside the folders of their steps."""
    try:
        step = int((folder / VERL_LATEST).read_text())
    except (OSError, ValueError):
        return None
    checkpoint = folder / f"global_step_{step}"
    return checkpoint if checkpoint.is_dir() else None
