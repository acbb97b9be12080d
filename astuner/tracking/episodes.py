"""Every episode of a run as Parquet: `pandas.read_parquet(run_dir / "episodes")`.

One row per sample (timeline), with the fields of its episode repeated; an episode
without samples has one row with those fields empty. One file per step and split,
`step-000012-train.parquet`, written under a hidden name and renamed, so that a kill
leaves whole files only and a repeated step replaces its file.

    step, split            finished steps at a validation, else the step itself; train or validation
    group_id, episode_id, task_id, repeat_index, attempts
    task, output           JSON of the Task and of the WorkflowOutput
    reward, turn_rewards, is_success
    target_rewards         JSON: target tag -> its rewards, where they were given by target
    failure_kind, failure_message, failure_traceback      empty when all went well
    started_at, ended_at   Unix seconds
    num_calls              of the episode
    sample_id, agent_name, target_tag
    sample_reward          what the sample's target got in the episode
    messages, tools        JSON: the timeline's conversation, with its last reply
    text                   the tokens decoded, special tokens included
    token_ids, loss_mask, logprobs, weight_versions, turns    lists, one entry per token
    num_tokens, num_trained
    masked                 JSON: tokens that are not trained, by reason
    call_seconds, finish_reasons      lists, one entry per call of the timeline
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from astuner.types import Call, Episode, Sample

Decode = Callable[[Sequence[int]], str]


class EpisodeStore:
    """Writes episodes of a run. Nothing on disk is touched before the first `append`."""

    def __init__(
        self, run_dir: Path, *, resume_step: int | None = None, decode: Decode | None = None
    ) -> None:
        """`resume_step` is the last step of a resumed run that counts: files of later ones
        are deleted. None is a new run: an existing folder is put aside as `episodes.old`.
        `decode` fills the column `text`; without it, the column is empty."""
        self._folder = run_dir / "episodes"
        self._resume_step = resume_step
        self._decode = decode
        self._prepared = False

    def append(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write all episodes of a step; a second call for the same step and split replaces
        the first. Raises OSError when the disk is full."""
        self._prepare()
        for split, of_split in groupby(
            sorted(episodes, key=lambda e: e.split), key=lambda e: e.split
        ):
            rows = [row for episode in of_split for row in self._rows(step, episode)]
            _write(self._folder / f"step-{step:06d}-{split}.parquet", rows)

    def _prepare(self) -> None:
        if self._prepared:
            return
        self._prepared = True
        if self._resume_step is None and self._folder.exists():
            aside = self._folder.with_name("episodes.old")
            shutil.rmtree(aside, ignore_errors=True)
            self._folder.rename(aside)
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(".step-*.tmp"):
            path.unlink()
        for path in self._folder.glob("step-*.parquet"):
            number = re.match(r"step-(\d+)-", path.name)
            if number and self._resume_step is not None and int(number[1]) > self._resume_step:
                path.unlink()

    def _rows(self, step: int, episode: Episode) -> Iterator[dict[str, Any]]:
        shared = {"step": step, **_episode_fields(episode)}
        for sample in episode.samples or (None,):
            yield shared | (self._sample_fields(sample, episode.calls) if sample else {})

    def _sample_fields(self, sample: Sample, calls: Sequence[Call]) -> dict[str, Any]:
        turns = sorted(set(sample.spans[:, 2].tolist()))
        own = [calls[turn] for turn in turns] or _without_tokens(sample, calls)
        last = own[-1] if own else None
        return {
            "sample_id": sample.sample_id,
            "agent_name": sample.agent_name,
            "target_tag": sample.target_tag,
            "sample_reward": sample.reward,
            "messages": last and _json([*last.request.get("messages", ()), dict(last.response)]),
            "tools": last and _json(last.request.get("tools") or []),
            "text": self._decode(sample.token_ids.tolist()) if self._decode else None,
            "token_ids": sample.token_ids,
            "loss_mask": sample.loss_mask,
            "logprobs": sample.logprobs,
            "weight_versions": sample.weight_versions,
            "turns": sample.turns,
            "num_tokens": len(sample.token_ids),
            "num_trained": sample.num_trained,
            "masked": _json({str(reason): count for reason, count in sample.masked.items()}),
            "call_seconds": [call.ended_at - call.started_at for call in own],
            "finish_reasons": [call.finish_reason for call in own],
        }


def _without_tokens(sample: Sample, calls: Sequence[Call]) -> list[Call]:
    """The calls of a timeline that another endpoint answered in text alone."""
    if len(sample.token_ids):
        return []
    return [
        c
        for c in calls
        if (c.agent_name, c.target_tag) == (sample.agent_name, sample.target_tag)
        and not len(c.completion_ids)
    ]


def read_episodes(run_dir: Path) -> Any:
    """All episodes of a run as a pyarrow.Table; `.to_pandas()` makes a DataFrame."""
    import pyarrow.parquet as pq

    return pq.read_table(run_dir / "episodes", schema=schema())


def schema() -> Any:
    """The pyarrow.Schema of every file; see the module's docstring for what they mean."""
    import pyarrow as pa

    text, real = pa.string(), pa.float64()
    types: dict[str, Any] = {
        "step": pa.int32(),
        "split": text,
        "group_id": text,
        "episode_id": text,
        "task_id": text,
        "repeat_index": pa.int32(),
        "attempts": pa.int32(),
        "task": text,
        "output": text,
        "reward": real,
        "turn_rewards": pa.list_(real),
        "target_rewards": text,
        "is_success": pa.bool_(),
        "failure_kind": text,
        "failure_message": text,
        "failure_traceback": text,
        "started_at": real,
        "ended_at": real,
        "num_calls": pa.int32(),
        "sample_id": text,
        "agent_name": text,
        "target_tag": text,
        "sample_reward": real,
        "messages": text,
        "tools": text,
        "text": text,
        "token_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "logprobs": pa.list_(pa.float32()),
        "weight_versions": pa.list_(pa.int32()),
        "turns": pa.list_(pa.int32()),
        "num_tokens": pa.int32(),
        "num_trained": pa.int32(),
        "masked": text,
        "call_seconds": pa.list_(real),
        "finish_reasons": pa.list_(text),
    }
    return pa.schema(list(types.items()))


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema()), temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _episode_fields(episode: Episode) -> dict[str, Any]:
    failure = episode.failure
    return {
        "split": episode.split,
        "group_id": episode.group_id,
        "episode_id": episode.episode_id,
        "task_id": _utf8(episode.task.task_id),
        "repeat_index": episode.repeat_index,
        "attempts": episode.attempts,
        "task": _json(episode.task.model_dump()),
        "output": episode.output and _json(episode.output.model_dump()),
        "reward": episode.reward,
        "turn_rewards": episode.turn_rewards and list(episode.turn_rewards),
        "target_rewards": episode.target_rewards and _json(dict(episode.target_rewards)),
        "is_success": episode.is_success,
        "failure_kind": failure and str(failure.kind),
        "failure_message": failure and _utf8(failure.message),
        "failure_traceback": failure and _utf8(failure.traceback),
        "started_at": episode.started_at,
        "ended_at": episode.ended_at,
        "num_calls": len(episode.calls),
    }


def _json(value: object) -> str:
    """As JSON that any file can hold; what users put in their metadata may be no JSON at
    all (keys that are tuples, an object within itself), and is then shown as Python does."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(repr(value), ensure_ascii=False)
    return _utf8(text)


def _utf8(text: str) -> str:
    """Half a surrogate pair cannot be written; it becomes its escape."""
    return text.encode(errors="backslashreplace").decode()
