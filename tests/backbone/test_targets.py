"""Whole runs with several targets: who learns, who does not, who answers, what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from astuner import TunedModel
from astuner.backbone.context import RunContext
from astuner.backbone.local import evaluate
from astuner.backbone.report import checkpoint_of
from astuner.backbone.translation import translation_of
from astuner.chat.byte_codec import ByteCodec
from astuner.config.load import load_config
from astuner.engine.fake import FakeEngine
from astuner.errors import CheckpointError, ConfigError
from astuner.launcher import in_own_thread
from astuner.model_tuner import SessionSampling, SessionSpec, TunerServer
from astuner.task_reader import TaskSplits
from astuner.tracking import read_episodes
from tests.tiny_run import tasks

from .two_agents import OneTrained, Opposites, early_share, late_share, two_agent_job

pytestmark = pytest.mark.timeout(200)
OWN: dict[str, Any] = {"lora": {}}


def rows(run: Path, split: str = "train") -> list[dict[str, Any]]:
    return [r for r in read_episodes(run).to_pylist() if r["split"] == split]


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if "reward/mean" in m]


def weights(run: Path, step: int, *parts: str) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"checkpoint-{step:06d}"
    file = folder.joinpath(*parts, "adapter_model.safetensors")
    return {name: weight.tobytes() for name, weight in load_file(file).items()}


@pytest.fixture(scope="module")
def opposites(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which both agents learn, each with an adapter of its own."""
    runs = tmp_path_factory.mktemp("runs")
    job = two_agent_job(
        tiny_model_dir, runs, {"early": OWN, "late": OWN}, total_steps=12, val_before_train=False
    )
    job.config.rollout.num_repeat = 16
    job.config.rollout.max_response_length_in_one_turn = 3
    job.config.model.lora.rank, job.config.model.lora.alpha = 8, 32
    job.config.trainer_common.optim.lr = 0.06
    job.tune()
    return runs / "tiny"


def test_two_agents_learn_opposite_things_at_the_same_time(opposites: Path) -> None:
    steps = metrics(opposites)
    first, last = steps[0], steps[-3:]
    assert first["reward/early/mean"] < 0.35 and first["reward/late/mean"] < 0.35
    assert max(m["reward/early/mean"] for m in last) > 0.6
    assert max(m["reward/late/mean"] for m in last) > 0.5
    assert first["tokens/early/trained"] == first["tokens/late/trained"] == 96.0
    assert first["policy/early/lr"] == 0.06
    replies = {tag: [r for r in rows(opposites) if r["target_tag"] == tag and r["step"] > 9]
               for tag in ("early", "late")}  # fmt: skip
    for tag, share in (("early", early_share), ("late", late_share)):
        for row in replies[tag]:
            said = json.loads(row["messages"])[-1]["content"]
            assert row["sample_reward"] == pytest.approx(share(said))
            assert json.loads(row["target_rewards"])[tag] == [row["sample_reward"]]


def test_each_target_of_a_run_can_be_opened_and_merged(opposites: Path, tmp_path: Path) -> None:
    assert TunedModel.load(opposites).targets == ("early", "late")
    with pytest.raises(CheckpointError, match=r"several adapters: .early., .late."):
        TunedModel.load(opposites).chat("say 1")
    said = {}
    for tag in ("early", "late"):
        model = TunedModel.load(opposites, target=tag)
        said[tag] = model.chat("say 1", max_tokens=3)
        model.close()
        merged = model.merge(tmp_path / tag)
        assert (merged / "model.safetensors").is_file()
    validated = {r["target_tag"]: json.loads(r["messages"]) for r in rows(opposites, "validation")
                 if r["task_id"] == "1"}  # fmt: skip
    assert {tag: m[-1]["content"] for tag, m in validated.items()} == said
    with pytest.raises(CheckpointError, match=r"no target 'seer'.*early, late"):
        TunedModel.load(opposites, target="seer")


def test_a_run_is_scored_again_with_all_its_adapters(opposites: Path) -> None:
    loaded = load_config(opposites / "config.yaml")
    splits = TaskSplits(tasks(4), tasks(2))
    context = RunContext(loaded, opposites, Opposites, None, splits)
    result = in_own_thread(lambda: evaluate(context, checkpoint_of(opposites)))
    summary = json.loads((opposites / "summary.json").read_text())
    assert result.score == summary["eval_after"]
    assert set(result.metrics) == {"reward", "failed", "reward/early", "reward/late"}


def test_rollouts_may_run_ahead(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Asynchronously: tokens lag by at most one version, also beside an old opponent."""
    targets = {"early": OWN, "late": {"version": -3, "of": "early"}}
    job = two_agent_job(tiny_model_dir, tmp_path, targets, OneTrained, total_steps=5)
    job.config.rollout.max_staleness = 1
    job.config.trainer_common.val_before_train = False
    job.tune()
    lags = [m["staleness/max"] for m in metrics(tmp_path / "tiny")]
    assert len(lags) == 5 and max(lags) <= 1.0
    assert not any("groups_too_stale" in name for m in metrics(tmp_path / "tiny") for name in m)


def test_a_run_goes_on_bitwise(tiny_model_dir: Path, tmp_path: Path) -> None:
    targets = {"early": {"lora": {"rank": 2}, "lr": 0.02}, "late": {"version": -1, "of": "early"}}

    def job(where: str, steps: int) -> Any:
        made = two_agent_job(tiny_model_dir, tmp_path / where, targets, total_steps=steps)
        made.config.trainer_common.val_before_train = False
        return made

    job("whole", 4).tune()
    job("parts", 2).tune()
    job("parts", 4).tune(resume=True)
    whole, parts = tmp_path / "whole" / "tiny", tmp_path / "parts" / "tiny"
    assert weights(whole, 4) == weights(parts, 4)  # the shared one
    assert weights(whole, 4, "targets", "early") == weights(parts, 4, "targets", "early")
    told = [(r["step"], r["sample_id"], r["token_ids"], r["logprobs"], r["weight_versions"])
            for r in rows(whole)]  # fmt: skip
    again = [(r["step"], r["sample_id"], r["token_ids"], r["logprobs"], r["weight_versions"])
             for r in rows(parts)]  # fmt: skip
    assert told == again


def test_self_play_and_a_frozen_partner_are_not_trained(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    targets = {"late": {"version": -2}}
    two_agent_job(tiny_model_dir, tmp_path, targets, OneTrained, total_steps=4).tune()
    run = tmp_path / "tiny"
    for row in rows(run):
        sampled = [v for v in row["weight_versions"] if v >= 0]
        newest = row["step"] - 1
        if row["target_tag"] == "late":
            assert set(sampled) == {max(0, newest - 2)}
            assert row["num_trained"] == 0
            assert json.loads(row["masked"])["not_a_target"] == len(sampled)
        else:
            assert set(sampled) == {newest}
            assert row["num_trained"] == len(sampled)
    assert metrics(run)[-1]["staleness/max"] == 0.0
    assert "tokens/late/trained" not in metrics(run)[-1]
    assert metrics(run)[-1]["tokens/late/sampled"] > 0


def test_a_frozen_partner_changes_nothing_for_who_is_trained(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With a frozen or an unlisted partner, the one that is trained ends with the same weights:
    the partner's replies are no part of its samples."""
    for where, targets in (("frozen", {"late": {"frozen": True}}), ("plain", {})):
        two_agent_job(tiny_model_dir, tmp_path / where, targets, OneTrained).tune()
    frozen, plain = tmp_path / "frozen" / "tiny", tmp_path / "plain" / "tiny"
    assert weights(frozen, 2) == weights(plain, 2)
    assert {v for r in rows(frozen) if r["target_tag"] == "late" for v in r["weight_versions"]} == {
        -1,
        0,
    }
    assert sum(r["num_trained"] for r in rows(frozen) if r["target_tag"] == "late") == 0


# ---------------------------------------------------------------- somebody else's endpoint


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, Any], FakeEngine]]:
    """A server that always says "late!", and how a configuration names it."""
    codec = ByteCodec()
    engine = FakeEngine([[*codec.encode("xyz!").tolist(), codec.stop_token_ids[0]]])
    with TunerServer(engine, codec, model_name="other") as server:
        sampling = SessionSampling(override=False)
        session = server.open_session(SessionSpec("other", sampling=sampling, record=False))
        found = session.tuner.as_oai_baseurl_apikey()
        monkeypatch.setenv("OTHERS_KEY", found.api_key)
        form = {"base_url": found.base_url, "model": "other", "api_key_env": "OTHERS_KEY"}
        yield {"endpoint": form}, engine


def test_an_endpoint_answers_for_a_target(
    tiny_model_dir: Path, tmp_path: Path, endpoint: tuple[dict[str, Any], FakeEngine]
) -> None:
    form, engine = endpoint
    job = two_agent_job(tiny_model_dir, tmp_path, {"late": form}, total_steps=1)
    job.config.trainer_common.val_before_train = False
    job.tune()
    run = tmp_path / "tiny"
    late = [r for r in rows(run) if r["target_tag"] == "late"]
    assert len(late) == 8 and len(engine.prompts) == 8 + 2  # and the validation
    assert {json.loads(r["messages"])[-1]["content"] for r in late} == {"xyz!"}
    assert {(r["num_tokens"], r["num_trained"]) for r in late} == {(0, 0)}
    assert {r["sample_reward"] for r in late} == {0.75}
    early = [r for r in rows(run) if r["target_tag"] == "early"]
    assert sum(r["num_trained"] for r in early) == metrics(run)[0]["tokens/trained"]
    # the rollout's own temperature and length are not forced upon it
    assert {(p.temperature, p.max_tokens) for p in engine.params} == {(1.0, 6), (0.0, 6)}
    assert not (run / "checkpoints" / "checkpoint-000001" / "team.json").exists()


def test_debug_asks_the_endpoint_too(
    tiny_model_dir: Path,
    tmp_path: Path,
    endpoint: tuple[dict[str, Any], FakeEngine],
    capsys: pytest.CaptureFixture[str],
) -> None:
    form, engine = endpoint
    job = two_agent_job(tiny_model_dir, tmp_path, {"late": form, "early": OWN})
    job.config.backbone = "debug"
    job.config.debug.debug_first_n_tasks = 1
    with pytest.raises(CheckpointError, match="no tuned weights"):
        job.tune()
    assert len(engine.prompts) == 1
    assert "reward" in capsys.readouterr().out


# ---------------------------------------------------------------- what contradicts itself


@pytest.mark.parametrize("backbone", ["local", "debug"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            {"early": {"frozen": True}},
            "targets.early` says that it is the frozen base, not trained, but the workflow's "
            "trainable_targets names it.",
        ),
        (
            {"late": OWN},
            r"targets.late` has an adapter of its own, but the workflow's trainable_targets is "
            r"\['early'\], so nothing would train it.",
        ),
        (
            {"early": OWN, "late": {"version": -1}},
            "targets.late` plays past weights of the shared adapter, but every trained target has",
        ),
    ],
)
def test_configuration_and_workflow_may_not_contradict(
    tiny_model_dir: Path, tmp_path: Path, targets: dict[str, Any], message: str, backbone: str
) -> None:
    job = two_agent_job(tiny_model_dir, tmp_path, targets, OneTrained)
    job.config.backbone, job.config.debug.model = backbone, "fake"
    with pytest.raises(ConfigError, match=message):
        job.tune()


def test_explain_says_in_words_who_answers() -> None:
    text = "model.targets={wolf: {lora: {rank: 4}, lr: 0.01}, old: {version: -2, of: wolf}}"
    loaded = load_config(None, [text])
    assert translation_of(loaded.config, "local").becomes["model.targets"] == (
        "wolf: an adapter of its own (rank 4, lr 0.01); old: wolf 2 versions ago, not trained; "
        "all other tags: the shared adapter"
    )
    debug = load_config(None, [text], backbone="debug").config
    assert (
        translation_of(debug, "debug").becomes["model.targets"].endswith("all other tags: the base")
    )
    assert translation_of(load_config(None).config, "local").becomes == {}
