"""Episodes on disk, read back with pandas in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from astuner.tracking import EpisodeStore, read_episodes
from astuner.types import WorkflowOutput

from .records import call, episode, failed, sample

pandas = pytest.importorskip("pandas")


def test_a_row_per_sample_with_everything_in_it(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path, decode=lambda ids: " ".join(map(str, ids)))
    store.append(12, [episode(), failed()])
    frame = pandas.read_parquet(tmp_path / "episodes")
    assert len(frame) == 2
    row, bad = frame.iloc[0], frame.iloc[1]
    assert (row["step"], row["split"], row["episode_id"], row["task_id"]) == (
        12,
        "train",
        "e0",
        "q0",
    )
    assert row["token_ids"].tolist() == [1, 2, 7, 8]
    assert row["loss_mask"].tolist() == [False, False, True, True]
    assert row["logprobs"].tolist() == [0.0, 0.0, -0.5, -0.25]
    assert row["weight_versions"].tolist() == [-1, -1, 3, 3]
    assert row["turns"].tolist() == [-1, -1, 0, 0]
    assert (row["text"], row["num_tokens"], row["num_trained"]) == ("1 2 7 8", 4, 2)
    assert (row["reward"], row["is_success"], row["attempts"]) == (1.0, True, 1)
    assert json.loads(row["messages"]) == [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "5"},
    ]
    assert json.loads(row["task"])["metadata"] == {"answer": "5"}
    assert json.loads(row["output"])["metadata"] == {"final_answer": "5"}
    assert json.loads(row["masked"]) == {"context": 2}
    assert (row["call_seconds"].tolist(), row["finish_reasons"].tolist()) == ([0.5], ["stop"])
    assert (bad["episode_id"], bad["failure_kind"], bad["failure_traceback"]) == (
        "e1",
        "workflow",
        "line 3",
    )
    assert bad["token_ids"] is None
    assert np.isnan(bad["reward"])


def test_whatever_users_put_into_an_episode_can_be_written(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["self"] = endless
    outputs = [
        WorkflowOutput(metadata={"board": {(0, 1): "x"}}),
        WorkflowOutput(metadata={"loop": endless}),
        WorkflowOutput(metadata={"half": "\ud800"}),
    ]
    store = EpisodeStore(tmp_path)
    store.append(1, [episode(episode_id=f"e{i}", output=o) for i, o in enumerate(outputs)])
    read = [json.loads(o) for o in pandas.read_parquet(tmp_path / "episodes")["output"]]
    assert "(0, 1): 'x'" in read[0]
    assert "{...}" in read[1]
    assert read[2]["metadata"] == {"half": "\ud800"}


def test_each_timeline_shows_its_own_conversation(tmp_path: Path) -> None:
    second = call(
        call_id="c1",
        request={"messages": [{"role": "user", "content": "other"}], "tools": [{"type": "x"}]},
        response={"role": "assistant", "content": "reply"},
    )
    spans = np.array([[2, 4, 1, 3]], np.int32)
    two = episode(
        calls=(call(), second),
        samples=(sample(), sample(sample_id="e0/1", spans=spans)),
        turn_rewards=(0.25, 0.75),
        output=WorkflowOutput(reward=[0.25, 0.75]),
    )
    EpisodeStore(tmp_path).append(1, [two])
    frame = pandas.read_parquet(tmp_path / "episodes")
    assert [json.loads(m)[0]["content"] for m in frame["messages"]] == ["2+3?", "other"]
    assert json.loads(frame["tools"][1]) == [{"type": "x"}]
    assert frame["turn_rewards"][0].tolist() == [0.25, 0.75]
    assert frame["text"].isna().all()


def test_one_file_for_each_step_and_split(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    store.append(0, [episode(split="validation")])
    store.append(1, [episode(), episode(split="validation")])
    store.append(1, [episode(episode_id="again")])  # replaces, never duplicates
    assert sorted(p.name for p in (tmp_path / "episodes").iterdir()) == [
        "step-000000-validation.parquet",
        "step-000001-train.parquet",
        "step-000001-validation.parquet",
    ]
    frame = pandas.read_parquet(tmp_path / "episodes")
    assert frame[frame["split"] == "train"]["episode_id"].tolist() == ["again"]


def test_a_resumed_run_deletes_later_steps_and_leftovers(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    for step in (1, 2, 3):
        store.append(step, [episode()])
    (tmp_path / "episodes" / ".step-000004-train.parquet.tmp").write_text("torn")
    resumed = EpisodeStore(tmp_path, resume_step=1)
    assert len(list((tmp_path / "episodes").glob("*.parquet"))) == 3  # nothing before `append`
    resumed.append(2, [failed()])
    assert pandas.read_parquet(tmp_path / "episodes")["episode_id"].tolist() == ["e0", "e1"]
    assert not list((tmp_path / "episodes").glob(".*"))


def test_a_new_run_puts_the_old_folder_aside(tmp_path: Path) -> None:
    EpisodeStore(tmp_path).append(7, [episode()])
    EpisodeStore(tmp_path).append(1, [episode()])
    assert [p.name for p in (tmp_path / "episodes").iterdir()] == ["step-000001-train.parquet"]
    assert [p.name for p in (tmp_path / "episodes.old").iterdir()] == ["step-000007-train.parquet"]


def test_steps_without_samples_fit_the_same_schema(tmp_path: Path) -> None:
    store = EpisodeStore(tmp_path)
    store.append(1, [failed()])
    store.append(2, [episode()])
    table = read_episodes(tmp_path)
    assert table.num_rows == 2
    assert table.column("token_ids").to_pylist() == [None, [1, 2, 7, 8]]


def test_what_is_not_json_is_written_as_text(tmp_path: Path) -> None:
    odd = episode(output=WorkflowOutput(metadata={"path": Path("/a/b")}))
    EpisodeStore(tmp_path).append(1, [odd])
    first = pandas.read_parquet(tmp_path / "episodes").iloc[0]
    assert json.loads(first["output"])["metadata"] == {"path": "/a/b"}


def test_rewards_by_target_are_in_the_store(tmp_path: Path) -> None:
    mine = episode(target_rewards={"main": (1.0,), "other": (0.5, -1.0)}, samples=(sample(),))
    EpisodeStore(tmp_path).append(1, [mine])
    [row] = read_episodes(tmp_path).to_pylist()
    assert json.loads(row["target_rewards"]) == {"main": [1.0], "other": [0.5, -1.0]}
    assert (row["target_tag"], row["sample_reward"]) == ("main", 1.0)
    EpisodeStore(tmp_path).append(1, [episode(samples=(sample(),))])
    assert read_episodes(tmp_path).to_pylist()[0]["target_rewards"] is None
