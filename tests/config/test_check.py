"""What values may be, what a run needs, and what a backbone does not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from astuner.config import check
from astuner.config.explain import explain
from astuner.config.keys import get, keys, nearest, sections
from astuner.config.load import check_backbone, check_complete, from_python, load_config
from astuner.config.reference import render, render_service
from astuner.config.schema import AstunerConfig
from astuner.config.service import SERVICE
from astuner.errors import ConfigError

REPO = Path(__file__).parents[2]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_repeat=0",
         "command line: `astuner.rollout.num_repeat` must be at least 1, but is 0."),
        ("trainer_common.optim.lr=0", "`astuner.trainer_common.optim.lr` must be above 0, but is"),
        ("trainer_common.optim.lr=.nan", "must be above 0, but is nan."),
        ("trainer_common.optim.lr=.inf", "must be above 0, but is inf."),
        ("task_judge.wrong_reward=-.inf", "must be a finite number, but is -inf."),
        ("seed=-1", "`astuner.seed` must be 0 or more, but is -1."),
        ("rollout.temperature=-1", "`astuner.rollout.temperature` must be 0 or more, but is -1.0."),
        ("rollout.val_kwargs.top_p=0", "must be above 0 and at most 1, but is 0.0."),
        ("task_reader.validation_fraction=1", "must be from 0 to below 1, but is 1.0."),
        (
            "trainer_common.algorithm.clip_ratio_low=1.5",
            "must be from 0 to 1, or -1 for the loss's own, but is 1.5.",
        ),
        ("trainer_common.optim.betas=[0.9]", "must be two numbers from 0 to below 1, but is [0.9]"),
        ("model_tuner.port=70000", "must be from 0 to 65535, but is 70000."),
        ("experiment_name=a/b", "must be the name of one folder, without slashes, but is 'a/b'."),
        ("backbone=locl", "`astuner.backbone` is 'locl', but must be one of local, debug, verl, "
         "trinity, tinker. Did you mean 'local'?"),
        ("model.device=gpu", "must be one of auto, cpu, cuda, mps."),
        ("model.dtype=bfloat", "Did you mean 'bfloat16'?"),
        ("task_reader.type=jsonl", "must be one of jsonl_dataset_file, huggingface_dat_repo"),
        ("task_judge.judge_type=exact", "Did you mean 'exact_match'?"),
        ("task_judge.llm.on_parse_failure=skip", "must be one of fail, zero."),
        ("context_tracker.merge=prefx", "Did you mean 'prefix'?"),
        ("debug.model=endpont", "Did you mean 'endpoint'?"),
        ("trainer_common.algorithm.loss_agg_mode=token", "Did you mean 'token-mean'?"),
        ("trainer_common.optim.lr_schedule=cosin", "Did you mean 'cosine'?"),
        ("rollout.mode=asynk", "must be one of auto, sync, async. Did you mean 'async'?"),
        ("rollout.engine=vlm", "Did you mean 'vllm'?"),
        ("trainer_common.device=gpu", "must be one of auto, cuda, cpu."),
        ("rollout.gpu_memory_utilization=1", "must be above 0 and below 1, but is 1.0."),
        ("rollout.n_gpus_per_node=0", "must be at least 1, but is 0."),
        ("trainer_common.stall_timeout=0", "must be above 0, but is 0.0."),
        ("trainer_common.kl_loss_type=kl", "must be one of k1, k2, k3, low_var_kl."),
        ("trainer_common.logger=[console, wanb]", "`astuner.trainer_common.logger` is 'wanb', but "
         "must be one of console, tensorboard, wandb, swanlab, trackio, mlflow. "
         "Did you mean 'wandb'?"),
        ("rollout.temperature=0", "must be above 0 for training, but is 0: greedy episodes"),
        ("task_judge.regex.pattern=(", "is not a regular expression: missing ), unterminated"),
    ],
)  # fmt: skip
def test_wrong_values(override: str, message: str) -> None:
    told = refusal(override)
    assert message in told
    assert told.startswith("command line: `astuner.")


def test_truncated_sampling_is_refused_unless_asked_for() -> None:
    told = refusal("rollout.top_p=0.9", "rollout.top_k=5")
    assert "`astuner.rollout.top_p` = 0.9 and `astuner.rollout.top_k` = 5 cut the distribut" in told
    assert "`astuner.rollout.allow_biased_sampling: true`" in told
    load_config(None, ["rollout.top_p=0.9", "rollout.allow_biased_sampling=true"])
    load_config(None, ["rollout.val_kwargs.top_p=0.9"])


def test_debug_without_a_training_step_may_sample_as_it_likes() -> None:
    load_config(None, ["rollout.top_p=0.9", "rollout.temperature=0"], backbone="debug")
    with pytest.raises(ConfigError):
        load_config(None, ["rollout.top_p=0.9", "debug.train_step=true"], backbone="debug")


def test_good_values_at_the_borders() -> None:
    load_config(None, [
        "model.device=cuda:1", "task_judge.regex.pattern=^{answer}$", "rollout.max_staleness=0",
        "task_reader.validation_fraction=0", "trainer_common.save_freq=0",
        "task_judge.wrong_reward=-1",
    ])  # fmt: skip


def test_the_tables_name_keys_that_exist() -> None:
    named = {*check.CHOICES, *check._RANGES} | {n for ns in check._NEEDS.values() for n in ns}
    assert named <= set(keys())
    assert not set(check._AT_LEAST_ONE) & set(check._NOT_NEGATIVE)


def test_every_number_has_a_range() -> None:
    numbers = {name for name, key in keys().items() if key.type in (int, float)}
    assert numbers - set(check._RANGES) == set()


# ---------------------------------------------------------------- completeness


def missing(*overrides: str, **given: bool) -> str:
    with pytest.raises(ConfigError) as caught:
        check_complete(load_config(None, overrides), **given)
    return str(caught.value)


def test_a_run_needs_a_workflow_and_data() -> None:
    told = missing()
    assert "no workflow is set. Give the class that runs your agent" in told
    assert (
        "`astuner.task_reader.jsonl_dataset_file.training.file_path` must be set, because "
        "`astuner.task_reader.type` is jsonl_dataset_file." in told
    )
    check_complete(load_config(None), workflow=True, tasks=True)
    check_complete(load_config(None, ["task_reader.type=random_dummy"]), workflow=True)


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("task_judge.judge_type=customized_protocol", ["task_judge.judge_protocol"]),
        ("task_judge.judge_type=regex", ["task_judge.regex.pattern"]),
        ("task_judge.judge_type=llm", ["task_judge.llm.base_url", "task_judge.llm.model"]),
    ],
)
def test_a_judge_needs_its_settings(override: str, needed: list[str]) -> None:
    told = missing(override, workflow=True, tasks=True)
    assert told.count("must be set, because `astuner.task_judge.judge_type` is") == len(needed)
    assert all(f"`astuner.{name}`" in told for name in needed)
    check_complete(load_config(None, [override]), workflow=True, tasks=True, judge=True)


def test_debugging_an_endpoint_needs_one() -> None:
    settings = ["debug.model=endpoint", "backbone=debug", "debug.endpoint.model=m"]
    told = missing(*settings, workflow=True, tasks=True)
    assert "`astuner.debug.endpoint.base_url` must be set" in told
    check_complete(load_config(None, settings[:1]), workflow=True, tasks=True)  # not debugging


# ---------------------------------------------------------------- backbones


def test_a_key_of_another_backbone_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  trainer_common: {n_gpus_per_node: 4}\n")
    loaded = load_config(path)
    with pytest.raises(ConfigError) as caught:
        check_backbone(loaded, "local")
    assert str(caught.value) == (
        f"{path}:2: `astuner.trainer_common.n_gpus_per_node` = 4 has no effect with the backbone "
        "local; only verl and trinity read it. Remove it, or choose --backbone verl."
    )
    assert check_backbone(loaded, "verl") == []


def test_raw_settings_are_verls_alone_and_any_key_may_be_named() -> None:
    loaded = load_config(None, ["verl.actor_rollout_ref.actor.entropy_coeff=0.01"])
    assert loaded.config.verl == {"actor_rollout_ref": {"actor": {"entropy_coeff": 0.01}}}
    assert check_backbone(loaded, "verl") == []
    with pytest.raises(ConfigError, match=r"`astuner\.verl` .* only verl read it"):
        check_backbone(loaded, "local")


def test_the_rollouts_own_pool_is_read_in_asynchronous_mode_only() -> None:
    pool = "rollout.n_gpus_per_node=4"
    (warning,) = check_backbone(load_config(None, [pool]), "verl")
    assert warning.endswith("is set but not read: astuner.rollout.mode is auto.")
    assert check_backbone(load_config(None, [pool, "rollout.mode=async"]), "verl") == []


def test_a_file_for_training_runs_unchanged_in_debug(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  trainer_common: {optim: {lr: 1e-3}, total_steps: 4}\n")
    assert check_backbone(load_config(path, backbone="debug"), "debug") == []
    loaded = load_config(path, ["trainer_common.n_gpus_per_node=4"], backbone="debug")
    (warning,) = check_backbone(loaded, "debug")
    assert "n_gpus_per_node` = 4 has no effect with the backbone debug" in warning


def test_a_debug_section_is_fine_in_a_file_but_not_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  debug: {debug_first_n_tasks: 4}\n")
    assert check_backbone(load_config(path), "local") == []
    with pytest.raises(ConfigError, match="only debug read it"):
        check_backbone(load_config(None, ["debug.num_repeat=4"]), "local")


def test_a_section_that_is_not_selected_is_warned_of() -> None:
    loaded = load_config(None, ["task_reader.reasoning_gym.size=5"])
    assert check_backbone(loaded, "local") == [
        "command line: `astuner.task_reader.reasoning_gym.size` is set but not read: "
        "astuner.task_reader.type is jsonl_dataset_file."
    ]


def test_keys_that_another_key_switches_on_are_warned_of_without_it() -> None:
    kl = "trainer_common.kl_loss_coef=0.1"
    (warning,) = check_backbone(load_config(None, [kl]), "local")
    assert warning.endswith("is set but not read: astuner.trainer_common.use_kl_loss is False.")
    assert check_backbone(load_config(None, [kl, "trainer_common.use_kl_loss=true"]), "local") == []


def test_debug_warns_of_what_was_typed_for_it_and_is_not_read(tmp_path: Path) -> None:
    (warning,) = check_backbone(load_config(None, ["rollout.num_repeat=4"]), "debug")
    assert warning.endswith("is set but not read: debug reads debug.num_repeat.")
    path = tmp_path / "x.yaml"
    path.write_text("astuner:\n  rollout: {num_repeat: 4}\n")
    assert check_backbone(load_config(path), "debug") == []


def test_a_value_that_equals_the_default_still_counts_as_set() -> None:
    with pytest.raises(ConfigError):
        check_backbone(load_config(None, ["trainer_common.nnodes=1"]), "local")


# ---------------------------------------------------------------- explain


def test_explain_has_a_row_for_every_key() -> None:
    loaded = load_config(None, ["rollout.num_repeat=4"])
    rows = {row.key: row for row in explain(loaded, "local")}
    assert list(rows) == [f"astuner.{name}" for name in keys()]
    row = rows["astuner.rollout.num_repeat"]
    assert (row.value, row.origin, row.becomes, row.used) == (
        4, "command line", "read as is", True,
    )  # fmt: skip
    assert row.doc == "Episodes per task: the group size G of GRPO."
    unread = rows["astuner.trainer_common.nnodes"]
    assert (unread.becomes, unread.used) == ("not used (only verl and trinity read it)", False)
    unread = rows["astuner.task_judge.llm.model"]
    assert unread.becomes == "not used (astuner.task_judge.judge_type is none)"


def test_explain_translates() -> None:
    rows = explain(
        load_config(None),
        "verl",
        {"rollout.num_repeat": "actor_rollout_ref.rollout.n", "rollout.max_num_seqs": ""},
    )
    becomes = {row.key: (row.becomes, row.used) for row in rows}
    assert becomes["astuner.rollout.num_repeat"] == ("actor_rollout_ref.rollout.n", True)
    assert becomes["astuner.rollout.max_num_seqs"] == (
        "not used (the backbone verl has nothing like it)", False,
    )  # fmt: skip
    assert becomes["astuner.debug.num_repeat"] == ("not used (only debug read it)", False)


def test_explain_knows_that_debug_does_not_train() -> None:
    lr = "astuner.trainer_common.optim.lr"
    for step, used in ((False, False), (True, True)):
        config = AstunerConfig(backbone="debug")
        config.debug.train_step = step
        rows = {row.key: row.used for row in explain(from_python(config), "debug")}
        assert rows[lr] is used


def test_explain_names_what_debug_reads_instead() -> None:
    rows = {row.key: row.becomes for row in explain(load_config(None), "debug")}
    assert rows["astuner.rollout.num_repeat"] == "not used (debug reads debug.num_repeat)"
    assert rows["astuner.rollout.val_kwargs.top_p"] == "not used (debug runs no validation)"
    assert rows["astuner.rollout.temperature"] == "read as is"


# ---------------------------------------------------------------- the table of keys


def test_every_key_and_section_is_documented() -> None:
    assert [name for name, key in keys().items() if not key.doc] == []
    assert [name for name, section in sections().items() if not section.doc] == []


def test_the_reference_page_is_up_to_date() -> None:
    page = (REPO / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == render(), "run: python -m astuner.config.reference > docs/config.md"
    assert page.count("\n| `") == len(keys())


def test_the_service_s_reference_page_is_up_to_date() -> None:
    page = (REPO / "docs" / "service_config.md").read_text(encoding="utf-8")
    command = "python -m astuner.config.reference service > docs/service_config.md"
    assert page == render_service(), f"run: {command}"
    assert page.count("\n| `") == len(SERVICE.keys)


def test_defaults_in_the_table_are_those_of_the_schema() -> None:
    assert all(get(AstunerConfig(), name) == key.default for name, key in keys().items())
    assert keys()["debug.endpoint.model"].backbones == ("debug",)
    assert keys()["rollout.num_repeat"].backbones == ()


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("lr", "trainer_common.optim.lr"),
        ("rollout.max_steps", "rollout.multi_turn.max_steps"),
        ("data.batch_size", "data.train_batch_size"),
        ("task_reader.file_path", "task_reader.jsonl_dataset_file.training.file_path"),
        ("nope", None),
    ],
)
def test_nearest(typo: str, meant: str | None) -> None:
    assert nearest(typo) == meant
