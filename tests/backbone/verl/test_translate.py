"""Our configuration as verl's: every key decided, and literal verl keys and values."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import pytest

from astuner.algorithm import AGGREGATIONS, KLS, find_loss
from astuner.backbone import verl_cpu
from astuner.backbone.spawned.choices import Device, Facts, wanted_device
from astuner.backbone.verl import dataset, learning, sections, table, translate
from astuner.backbone.verl.checkpoints import OnlyWanted
from astuner.backbone.verl.translate import becomes, overridden, warnings
from astuner.config.keys import keys
from tests.backbone.verl.told import (
    ACTOR,
    ASYNC,
    LOSS,
    MODEL,
    OPTIM,
    REF,
    ROLLOUT,
    config,
    told,
)

# ---------------------------------------------------------------- every key is decided


def test_every_key_of_the_schema_is_decided_once() -> None:
    def read_here(name: str) -> bool:
        return any(name == k or (k[-1] == "." and name.startswith(k)) for k in table.READ_HERE)

    for name, key in keys().items():
        ways = [
            name in table.BECOMES,
            read_here(name),
            bool(key.backbones) and "verl" not in key.backbones,
            name == "verl",
        ]
        assert sum(ways) == 1, name
        assert (key.backbones == ("debug",)) == name.startswith("debug.")
    assert set(table.BECOMES) | set(table.UNUSED) | set(table.REMARKS) <= set(keys())
    assert all(any(n == k or n.startswith(k) for n in keys()) for k in table.READ_HERE)


MODES: list[tuple[tuple[str, ...], Device]] = [
    (("trainer_common.use_kl_loss=true",), "cuda"),
    (("trainer_common.use_kl_loss=true", *ASYNC), "cpu"),
    (ASYNC, "cuda"),
    (("rollout.engine=vllm",), "cpu"),
]


def test_what_explain_says_a_key_becomes_is_really_set_somewhere() -> None:
    everywhere = {key for overrides, device in MODES for key in told(*overrides, device=device)}
    named = {key for of_key in table.BECOMES.values() for key in of_key}
    assert named <= everywhere


def test_what_is_set_in_any_case_depends_on_no_key() -> None:
    """Two configurations that differ in every number give the same for unnamed verl keys."""
    other = config(
        "seed=7", "data.max_response_length=77", "data.train_batch_size=24", "rollout.top_k=0",
        "rollout.num_repeat=3", "rollout.temperature=0.7", "model.lora.enable=false",
        "trainer_common.use_kl_loss=true", "trainer_common.mini_batch_num=3",
        f"{LOSS}.loss=gspo", f"{LOSS}.tis_cap=0", f"{LOSS}.loss_agg_mode=constant",
        "trainer_common.optim.warmup_steps=4", "trainer_common.save_freq=0",
        "trainer_common.gradient_checkpointing=true",
    )  # fmt: skip
    ours, theirs = translate.translation(config()).always, translate.translation(other).always
    assert dict(ours) == dict(theirs)
    assert ours["algorithm.use_kl_in_reward"] is False


# ---------------------------------------------------------------- the table

TABLE: list[tuple[tuple[str, ...], Device, dict[str, Any]]] = [
    (
        (),
        "cuda",
        {
            "trainer.device": "cuda",
            "trainer.nnodes": 1,
            "trainer.n_gpus_per_node": 8,
            "trainer.v1.trainer_mode": "sync",
            "trainer.v1.sampler.sync_refill_failed_groups": True,
            f"{ROLLOUT}.name": "vllm",
            f"{ROLLOUT}.n": 8,
            f"{ROLLOUT}.temperature": 1.0,
            f"{ROLLOUT}.top_p": 1.0,
            f"{ROLLOUT}.top_k": -1,
            f"{ROLLOUT}.max_model_len": 4096,
            f"{ROLLOUT}.max_num_seqs": 128,
            f"{ROLLOUT}.gpu_memory_utilization": 0.5,
            f"{ROLLOUT}.dtype": "bfloat16",
            f"{ROLLOUT}.load_format": "safetensors",
            f"{ROLLOUT}.agent.num_workers": 8,
            f"{ROLLOUT}.agent.default_agent_loop": "astuner",
            f"{ROLLOUT}.calculate_log_probs": True,
            f"{MODEL}.lora_rank": 16,
            f"{MODEL}.lora_alpha": 32,
            f"{MODEL}.target_modules": "all-linear",
            f"{MODEL}.lora.merge": False,
            f"{MODEL}.use_remove_padding": True,
            "data.train_batch_size": 8,
            "data.max_prompt_length": 2048,
            "data.max_response_length": 2048,
            "data.custom_cls.path": "pkg://astuner.backbone.verl.dataset",
            "algorithm.adv_estimator": "astuner",
            "algorithm.rollout_correction.rollout_is": "token",
            "algorithm.rollout_correction.rollout_is_threshold": 2.0,
            "algorithm.rollout_correction.bypass_mode": False,
            f"{ACTOR}.policy_loss.loss_mode": "vanilla",
            f"{ACTOR}.clip_ratio_low": 0.2,
            f"{ACTOR}.clip_ratio_high": 0.2,
            f"{ACTOR}.clip_ratio_c": 1e9,
            f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
            f"{ACTOR}.loss_scale_factor": None,
            f"{ACTOR}.ppo_mini_batch_size": 8,
            f"{ACTOR}.ppo_epochs": 1,
            f"{OPTIM}.lr": 1e-5,
            f"{OPTIM}.weight_decay": 0.0,
            f"{OPTIM}.clip_grad": 1.0,
            f"{OPTIM}.lr_scheduler_type": "constant",
            "trainer.total_epochs": 1,
            "trainer.total_training_steps": None,
            "trainer.save_freq": 1,
            "trainer.test_freq": 20,
            "trainer.val_before_train": True,
            "trainer.resume_mode": "disable",
            "trainer.default_local_dir": "/runs/x/checkpoints",
            "critic.enable": False,
            "reward.num_workers": 0,
        },
    ),
    (
        (),
        "cpu",
        {
            "trainer.device": "cpu",
            "trainer.n_gpus_per_node": 1,
            f"{ROLLOUT}.name": verl_cpu.ROLLOUT,
            f"{ROLLOUT}.engine_kwargs.embedded.kv_cache_tokens": 0,
            f"{ROLLOUT}.dtype": "float32",
            f"{ROLLOUT}.agent.num_workers": 1,
            f"{MODEL}.lora.merge": True,
            f"{MODEL}.use_remove_padding": False,
            f"{MODEL}.override_config.attn_implementation": "sdpa",
            f"{ACTOR}.use_torch_compile": False,
            f"{ACTOR}.fsdp_config.mixed_precision": {
                "param_dtype": "fp32",
                "reduce_dtype": "fp32",
                "buffer_dtype": "fp32",
            },
        },
    ),
    (
        (*ASYNC, "rollout.nnodes=2", "rollout.n_gpus_per_node=4", "trainer_common.nnodes=4"),
        "cuda",
        {
            "trainer.v1.trainer_mode": "separate_async",
            "trainer.v1.separate_async.parameter_sync_step": 1,
            "trainer.v1.separate_async.num_warmup_batches": 2,
            "trainer.v1.sampler.max_off_policy_threshold": 3,
            "trainer.v1.sampler.max_off_policy_strategy": "drop",
            f"{ROLLOUT}.nnodes": 2,
            f"{ROLLOUT}.n_gpus_per_node": 4,
            f"{ROLLOUT}.checkpoint_engine.backend": "nccl",
            f"{MODEL}.lora.merge": True,
            "trainer.nnodes": 4,
        },
    ),
    (
        (*ASYNC, "trainer_common.mini_batch_num=4"),
        "cpu",
        {
            "trainer.v1.separate_async.parameter_sync_step": 4,
            f"{ACTOR}.ppo_mini_batch_size": 2,
            f"{ROLLOUT}.nnodes": 1,
            f"{ROLLOUT}.checkpoint_engine.backend": verl_cpu.WEIGHT_SYNC,
            f"{ROLLOUT}.checkpoint_engine.custom_backend_module": verl_cpu.WEIGHT_SYNC_MODULE,
            "actor_rollout_ref.hybrid_engine": False,
        },
    ),
    (
        ("rollout.engine=vllm",),
        "cpu",
        {
            f"{ROLLOUT}.name": "vllm",
            f"{ROLLOUT}.enforce_eager": True,
            f"{ROLLOUT}.free_cache_engine": False,
            f"{ROLLOUT}.enable_sleep_mode": False,
            f"{ROLLOUT}.load_format": "auto",
        },
    ),
    (
        ("model.lora.enable=false", "model.dtype=float32", "trainer_common.device=cuda"),
        "cuda",
        {
            f"{MODEL}.lora_rank": 0,
            f"{ROLLOUT}.dtype": "float32",
            f"{REF}.fsdp_config.mixed_precision": {
                "param_dtype": "fp32",
                "reduce_dtype": "fp32",
                "buffer_dtype": "fp32",
            },
        },
    ),
    (
        ("model.lora.target_modules=q_proj, v_proj",),
        "cuda",
        {f"{MODEL}.target_modules": ["q_proj", "v_proj"]},
    ),
    (
        ("rollout.top_k=5", "rollout.top_p=0.9", "rollout.allow_biased_sampling=true"),
        "cuda",
        {f"{ROLLOUT}.top_k": 5, f"{ROLLOUT}.top_p": 0.9},
    ),
    (
        ("rollout.val_kwargs.temperature=0.6", "rollout.val_kwargs.num_repeat=4"),
        "cuda",
        {
            f"{ROLLOUT}.val_kwargs.temperature": 0.6,
            f"{ROLLOUT}.val_kwargs.do_sample": True,
            f"{ROLLOUT}.val_kwargs.n": 4,
            f"{ROLLOUT}.val_kwargs.top_k": -1,
        },
    ),
    (
        ("rollout.max_model_len=3000", "trainer_common.micro_batch_tokens=1000"),
        "cuda",
        {
            f"{ROLLOUT}.max_model_len": 3000,
            f"{ACTOR}.use_dynamic_bsz": True,
            f"{ACTOR}.ppo_max_token_len_per_gpu": 3000,
            f"{ROLLOUT}.log_prob_max_token_len_per_gpu": 3000,
            f"{REF}.log_prob_max_token_len_per_gpu": 3000,
        },
    ),
    (
        ("rollout.max_model_len=9000", "trainer_common.micro_batch_tokens=16384"),
        "cuda",
        {f"{ROLLOUT}.max_model_len": 4096, f"{ACTOR}.ppo_max_token_len_per_gpu": 16384},
    ),
    (
        ("data.max_prompt_length=16", "data.max_response_length=16",
         "trainer_common.micro_batch_tokens=32"),
        "cuda",
        {f"{ACTOR}.ppo_max_token_len_per_gpu": 128},
    ),
    (
        (f"{LOSS}.loss=gspo", f"{LOSS}.clip_ratio_high=0.001"),
        "cuda",
        {
            f"{ACTOR}.policy_loss.loss_mode": "gspo",
            f"{ACTOR}.clip_ratio_low": 3e-4,
            f"{ACTOR}.clip_ratio_high": 1e-3,
        },
    ),
    (
        (f"{LOSS}.loss=cispo", f"{LOSS}.loss_agg_mode=token-mean"),
        "cuda",
        {
            f"{ACTOR}.policy_loss.loss_mode": "cispo",
            f"{ACTOR}.clip_ratio_low": 1.0,
            f"{ACTOR}.clip_ratio_high": 0.2,
            f"{ACTOR}.loss_agg_mode": "token-mean",
        },
    ),
    (
        (f"{LOSS}.loss=importance_sampling", f"{LOSS}.clip_ratio_low=0.1"),
        "cuda",
        {
            f"{ACTOR}.policy_loss.loss_mode": "vanilla",
            f"{ACTOR}.clip_ratio_low": 1e9,
            f"{ACTOR}.clip_ratio_high": 1e9,
        },
    ),
    (
        (f"{LOSS}.loss=policy_gradient",),
        "cuda",
        {
            f"{ACTOR}.policy_loss.loss_mode": "gpg",
            "algorithm.rollout_correction.rollout_is": None,
            "algorithm.rollout_correction.bypass_mode": False,
        },
    ),
    (
        (f"{LOSS}.tis_cap=0",),
        "cuda",
        {
            "algorithm.rollout_correction.rollout_is": None,
            "algorithm.rollout_correction.bypass_mode": True,
        },
    ),
    (
        (f"{LOSS}.tis_cap=5",),
        "cuda",
        {"algorithm.rollout_correction.rollout_is_threshold": 5.0},
    ),
    (
        (f"{LOSS}.loss_agg_mode=constant",),
        "cuda",
        {
            f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm",
            f"{ACTOR}.loss_scale_factor": 2048,
        },
    ),
    (
        ("trainer_common.use_kl_loss=true", "trainer_common.kl_loss_type=k1"),
        "cuda",
        {
            f"{ACTOR}.use_kl_loss": True,
            f"{ACTOR}.kl_loss_coef": 0.002,
            f"{ACTOR}.kl_loss_type": "k1+",
        },
    ),
    (
        ("trainer_common.optim.warmup_steps=10", "trainer_common.optim.max_grad_norm=0"),
        "cuda",
        {
            f"{OPTIM}.lr_warmup_steps": 10,
            f"{OPTIM}.lr_scheduler_type": "cosine",
            f"{OPTIM}.num_cycles": 0.0,
            f"{OPTIM}.zero_indexed_step": False,
            f"{OPTIM}.clip_grad": 1e9,
        },
    ),
    (
        ("trainer_common.optim.lr_schedule=cosine",),
        "cuda",
        {
            f"{OPTIM}.lr_scheduler_type": "cosine",
            f"{OPTIM}.num_cycles": 0.5,
            f"{OPTIM}.zero_indexed_step": True,
        },
    ),
    (
        ("trainer_common.save_freq=20", "trainer_common.resume_freq=5"),
        "cuda",
        {"trainer.save_freq": 5},
    ),
    (
        ("trainer_common.save_freq=20", "trainer_common.resume_freq=0"),
        "cuda",
        {"trainer.save_freq": 20},
    ),
    (
        ("trainer_common.save_freq=0", "trainer_common.resume_freq=0",
         "trainer_common.test_freq=0"),
        "cuda",
        {"trainer.save_freq": 1_000_000_000, "trainer.test_freq": 1_000_000_000},
    ),
    (
        ("data.train_batch_size=2", "rollout.max_env_worker=1", "rollout.num_repeat=4"),
        "cuda",
        {f"{ROLLOUT}.agent.num_workers": 1},
    ),
    (("trainer_common.total_steps=7",), "cuda", {"trainer.total_training_steps": 7}),
    (
        ("verl.actor_rollout_ref.actor.entropy_coeff=0.01", "verl.trainer.nnodes=9"),
        "cuda",
        {f"{ACTOR}.entropy_coeff": 0.01, "trainer.nnodes": 9},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "device", "expected"), TABLE)
def test_table(overrides: tuple[str, ...], device: Device, expected: dict[str, Any]) -> None:
    settings = told(*overrides, device=device)
    assert {key: settings.get(key, "absent") for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "device", "workers"),
    [
        ((), "cuda", 8),
        (("data.train_batch_size=10",), "cuda", 5),
        (("data.train_batch_size=7", "trainer_common.n_gpus_per_node=1"), "cuda", 7),
        (("data.train_batch_size=16", "rollout.max_env_worker=6"), "cuda", 4),
        (("data.train_batch_size=32", "trainer_common.nnodes=2", "trainer_common.ray_address=auto"),
         "cuda", 16),
        (("data.train_batch_size=11", "trainer_common.n_gpus_per_node=1"), "cuda", 1),
        ((), "cpu", 1),
    ],
)  # fmt: skip
def test_each_process_gets_as_many_groups(
    overrides: tuple[str, ...], device: Device, workers: int
) -> None:
    assert told(*overrides, device=device)[f"{ROLLOUT}.agent.num_workers"] == workers


def test_facts_of_machine_and_data() -> None:
    facts = Facts("/models/x", model_context=1000, total_steps=12, validation=False)
    settings = told("trainer_common.total_steps=7", facts=facts, resume=True)
    assert settings[f"{MODEL}.path"] == "/models/x"
    assert settings[f"{ROLLOUT}.max_model_len"] == 1000
    assert settings["trainer.total_training_steps"] == 12
    assert (settings["trainer.test_freq"], settings["trainer.val_before_train"]) == (-1, False)
    assert settings["trainer.resume_mode"] == "auto"


def test_without_flash_attention_the_trainer_does_not_ask_for_it() -> None:
    key = f"{MODEL}.override_config.attn_implementation"
    assert key not in told(device="cuda")  # verl's default: flash_attention_2
    without = Facts(flash_attention=False)
    assert told(device="cuda", facts=without)[key] == "sdpa"
    own = told(f"verl.{key}=eager", device="cuda", facts=without)
    assert own[key] == "eager"


def test_the_dataset_is_where_verl_is_told() -> None:
    assert getattr(dataset, sections.DATASET[1]).__module__ == sections.DATASET[0][len("pkg://") :]
    assert f"{OnlyWanted.__module__}.{OnlyWanted.__name__}" == sections.CHECKPOINT_CALLBACK


def test_clip_ranges_are_those_of_our_losses() -> None:
    for loss, (_, low, high) in learning.LOSSES.items():
        parameters = inspect.signature(find_loss(loss)).parameters
        if loss in learning.UNCLIPPED:
            assert "clip_low" not in parameters
        else:
            assert (parameters["clip_low"].default, parameters["clip_high"].default) == (low, high)
        assert ("tis_cap" in parameters) == (loss not in learning.UNCORRECTED)
    assert set(learning.AGGREGATIONS) == set(AGGREGATIONS)
    assert set(learning.KLS) == set(KLS)


# ---------------------------------------------------------------- the device


@pytest.mark.parametrize(
    ("overrides", "device"),
    [
        ((), "auto"),
        (("trainer_common.device=cpu",), "cpu"),
        (("model.device=cpu",), "cpu"),
        (("model.device=cuda",), "cuda"),
    ],
)
def test_the_wanted_device(overrides: tuple[str, ...], device: str) -> None:
    assert wanted_device(config(*overrides)) == device


# ---------------------------------------------------------------- refusals


def test_the_embedded_engine_reads_its_cache_size() -> None:
    settings = told("rollout.kv_cache_tokens=100", device="cpu")
    assert settings[f"{ROLLOUT}.engine_kwargs.embedded.kv_cache_tokens"] == 100


# ---------------------------------------------------------------- in words


def test_explain_names_key_and_value() -> None:
    words = becomes(config("trainer_common.mini_batch_num=2"))
    assert words["rollout.num_repeat"] == f"verl: {ROLLOUT}.n=8"
    assert words["trainer_common.mini_batch_num"].startswith(
        f"verl: {ACTOR}.ppo_mini_batch_size=4 (verl takes a further optimizer step for every"
    )
    assert words["rollout.episode_timeout"] == "read by astuner itself"
    assert words["task_reader.jsonl_dataset_file.training.file_path"] == "read by astuner itself"
    assert words[f"{LOSS}.dynamic_sampling"] == "read by astuner itself"
    assert words["rollout.max_staleness"].startswith("not used (verl takes turns")
    assert words["debug.train_step"] == ""
    assert words["verl"] == "nothing"


def test_a_raw_setting_wins_visibly() -> None:
    raw = config(f"verl.{OPTIM}.lr=1e-3", f"verl.{ACTOR}.calculate_entropy=true", "verl.a.b=1")
    assert overridden(raw) == {f"{OPTIM}.lr": (1e-5, 1e-3)}
    assert becomes(raw)["trainer_common.optim.lr"] == (
        f"verl: {OPTIM}.lr=0.001 (astuner.verl, instead of 1e-05)"
    )
    assert warnings(raw) == [f"`astuner.verl` sets {OPTIM}.lr=0.001 instead of 1e-05."]
    assert warnings(config()) == []


def test_explain_says_whether_verl_knows_the_raw_settings() -> None:
    told = translate.translation(config("verl.trainer.sav_freq=1"))
    if find_spec("verl") is None:
        assert told.notes[-1].endswith("shows where it is installed.") and told.problems == ()
    else:
        [problem] = told.problems
        assert problem.endswith("Did you mean `astuner.verl.trainer.save_freq`?")
    assert translate.translation(config()).notes == ()
