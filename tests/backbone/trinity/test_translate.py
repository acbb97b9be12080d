"""Our configuration as Trinity's: every key decided, and literal keys of Trinity and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from astuner.backbone.spawned import devices
from astuner.backbone.spawned.choices import Device, Facts
from astuner.backbone.translation import translation_of
from astuner.backbone.trinity import limits, requirements, table, translate
from astuner.backbone.trinity.translate import becomes, overridden, to_trinity, warnings
from astuner.config.keys import keys
from astuner.config.load import load_config
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError, MissingDependency

RUN_DIR = Path("/runs/x")
URL = "http://127.0.0.1:8765"
LOSS, OPTIM = "trainer_common.algorithm", "trainer_common.optim"
ENGINE, ARGS = "explorer.rollout_model", "algorithm.policy_loss_fn_args"
VALIDATION = "buffer.explorer_input.eval_tasksets.0"
VERL = "trainer.trainer_config"
FULL = ("model.lora.enable=false",)


def config(*overrides: str) -> AstunerConfig:
    return load_config(None, overrides, backbone="trinity").config


def told(*overrides: str, device: Device = "cpu", **more: Any) -> dict[str, Any]:
    url = URL if device == "cpu" else None
    return to_trinity(config(*overrides), run_dir=RUN_DIR, service_url=url, device=device, **more)


def refusal(*overrides: str, device: Device = "cpu") -> str:
    with pytest.raises(ConfigError) as caught:
        told(*overrides, device=device)
    return str(caught.value)


# ---------------------------------------------------------------- every key is decided


def decided(name: str) -> list[bool]:
    def read_here(name: str) -> bool:
        return any(name == k or (k[-1] == "." and name.startswith(k)) for k in table.READ_HERE)

    return [
        name in table.BECOMES,
        read_here(name),
        name in table.UNUSED,
        name == "trinity",
    ]


def test_every_key_of_the_schema_is_decided_once() -> None:
    """Keys for other backbones alone are refused before anything here is asked."""
    for name, key in keys().items():
        ours = not key.backbones or "trinity" in key.backbones
        assert sum(decided(name)) == ours, name
    known = set(keys())
    tables = {*table.BECOMES, *table.UNUSED, *table.REMARKS}
    assert tables | set(table.BY_THE_SERVICE) <= known
    assert {k for k in table.READ_HERE if k[-1] != "."} <= known
    assert set(table.BY_THE_SERVICE) <= set(table.BECOMES)


MODES: list[tuple[tuple[str, ...], Device]] = [
    (("trainer_common.use_kl_loss=true",), "cpu"),
    (("rollout.mode=sync", "model.lora.target_modules=attn"), "cpu"),
    ((), "cuda"),
    (("rollout.mode=sync", "trainer_common.n_gpus_per_node=1", *FULL), "cuda"),
    ((f"{OPTIM}.warmup_steps=3", *FULL), "cuda"),
]


def test_what_explain_says_a_key_becomes_is_really_set_somewhere() -> None:
    everywhere = {key for overrides, device in MODES for key in told(*overrides, device=device)}
    named = {key for of_key in table.BECOMES.values() for key in of_key}
    assert named <= everywhere


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_set_in_any_case_depends_on_no_key(device: str) -> None:
    """Two configurations that differ in every number give the same for unnamed keys."""
    other = config(
        f"trainer_common.device={device}",
        "seed=7", "data.max_response_length=77", "data.train_batch_size=24",
        "rollout.num_repeat=3", "rollout.max_model_len=90", "rollout.max_staleness=5",
        "rollout.episode_timeout=7", "rollout.val_kwargs.temperature=0.5",
        "trainer_common.use_kl_loss=true", "trainer_common.kl_loss_coef=0.1",
        f"{LOSS}.loss=gspo", f"{LOSS}.tis_cap=0", f"{LOSS}.loss_agg_mode=constant",
        f"{OPTIM}.warmup_steps=4", f"{OPTIM}.betas=[0.8,0.9]", "trainer_common.save_freq=0",
        "trainer_common.gradient_checkpointing=true", "trainer_common.stall_timeout=5",
    )  # fmt: skip
    ours = translate.translation(config(f"trainer_common.device={device}")).always
    assert dict(ours) == dict(translate.translation(other).always)
    assert ours["algorithm.algorithm_type"] == "multi_step_grpo"
    assert ours["algorithm.kl_loss_fn"] == "none"


# ---------------------------------------------------------------- the table

TABLE: list[tuple[tuple[str, ...], Device, dict[str, Any]]] = [
    (
        (),
        "cpu",
        {
            "mode": "both",
            "project": "checkpoints",
            "name": "trinity",
            "checkpoint_root_dir": "/runs/x",
            "ray_namespace": "astuner-runs-x",
            "continue_from_checkpoint": False,
            "model.model_path": "smollm2-135m",
            "model.max_model_len": 4096,
            "model.max_prompt_tokens": 3584,
            "model.max_response_tokens": 512,
            "model.enable_prompt_truncation": False,
            "model.temperature": 1.0,
            "model.tinker.enable": True,
            "model.tinker.base_url": URL,
            "model.tinker.rank": 16,
            "model.tinker.seed": 0,
            "model.tinker.train_mlp": True,
            "model.tinker.train_attn": True,
            "model.tinker.train_unembed": False,
            "model.lora_configs.0.lora_rank": "absent",
            "buffer.batch_size": 8,
            "buffer.train_batch_size": 64,
            "buffer.total_steps": 1_000_000_000,
            "buffer.explorer_input.taskset.path": "/runs/x/trinity/tasks/train",
            "buffer.explorer_input.taskset.default_workflow_type": (
                "astuner.backbone.trinity.workflow.EpisodeWorkflow"
            ),
            "buffer.explorer_input.taskset.workflow_args.folder": "/runs/x/trinity",
            f"{VALIDATION}.path": "/runs/x/trinity/tasks/validation",
            f"{VALIDATION}.repeat_times": 1,
            f"{VALIDATION}.rollout_args.temperature": 0.0,
            f"{VALIDATION}.rollout_args.top_k": -1,
            "explorer.runner_per_model": 2,
            "explorer.concurrent_mode": "asynchronous",
            "explorer.max_timeout": 2460,
            "explorer.max_retry_times": 0,
            "explorer.eval_interval": 20,
            "explorer.eval_on_startup": True,
            f"{ENGINE}.engine_type": "tinker",
            "trainer.trainer_type": "tinker",
            "trainer.total_steps": None,
            "trainer.save_interval": 1,
            "trainer.grad_clip": 1.0,
            "trainer.fix_actor_microbatch_loss_scale": True,
            "synchronizer.sync_method": "memory",
            "synchronizer.sync_style": "explorer_driven",
            "synchronizer.sync_interval": 1,
            "synchronizer.sync_timeout": 3600,
            "algorithm.algorithm_type": "multi_step_grpo",
            "algorithm.repeat_times": 8,
            "algorithm.advantage_fn": "astuner.backbone.trinity.advantage.GroupAdvantage",
            "algorithm.advantage_fn_args": "absent",
            "algorithm.policy_loss_fn": "astuner.backbone.trinity.loss.PolicyLoss",
            f"{ARGS}.loss": "ppo",
            f"{ARGS}.clip_low": -1.0,
            f"{ARGS}.clip_high": -1.0,
            f"{ARGS}.tis_cap": 2.0,
            f"{ARGS}.kl_type": "",
            f"{ARGS}.processes": 1,
            "algorithm.sample_strategy": "astuner.backbone.trinity.batches.WholeBatches",
            "algorithm.sample_strategy_args.max_staleness": 1,
            "algorithm.sample_strategy_args.multiple_of": 0,
            "algorithm.loss_agg_mode": "token-mean",
            "algorithm.optimizer.lr": 1e-5,
            "algorithm.optimizer.betas": [0.9, 0.999],
            "algorithm.optimizer.weight_decay": 0.0,
            "algorithm.optimizer.lr_scheduler_type": "constant",
            "algorithm.optimizer.lr_warmup_steps": 0,
            "algorithm.optimizer.min_lr_ratio": 0.0,
        },
    ),
    (
        (),
        "cuda",
        {
            "mode": "both",
            "cluster.node_num": 1,
            "cluster.gpu_per_node": 9,
            "model.tinker.enable": "absent",
            "model.lora_configs.0.lora_rank": 16,
            "model.lora_configs.0.lora_alpha": 32,
            "model.lora_configs.0.target_modules": "all-linear",
            "explorer.runner_per_model": 8,
            f"{ENGINE}.engine_type": "vllm",
            f"{ENGINE}.engine_num": 1,
            f"{ENGINE}.tensor_parallel_size": 1,
            f"{ENGINE}.gpu_memory_utilization": 0.5,
            f"{ENGINE}.dtype": "bfloat16",
            f"{ENGINE}.enable_openai_api": True,
            f"{ENGINE}.extra_engine_args.max_num_seqs": 128,
            "trainer.trainer_type": "verl",
            "trainer.trainer_strategy": "fsdp2",
            "trainer.use_dynamic_bsz": True,
            "trainer.max_token_len_per_gpu": 4096,
            f"{VERL}.model.enable_gradient_checkpointing": False,
            f"{VERL}.actor.fsdp_config.mixed_precision.param_dtype": "bf16",
            f"{VERL}.actor.optim.zero_indexed_step": True,
            f"{VERL}.actor.optim.lr_scheduler_type": "absent",
            "synchronizer.sync_method": "checkpoint",
            f"{ARGS}.processes": 8,
            "algorithm.sample_strategy_args.multiple_of": 64,
        },
    ),
    (FULL, "cuda", {"model.lora_configs.0.name": "absent", "synchronizer.sync_method": "nccl"}),
    (
        ("rollout.mode=sync", "trainer_common.n_gpus_per_node=1", *FULL),
        "cuda",
        {
            "mode": "colocate",
            "cluster.gpu_per_node": 1,
            "synchronizer.sync_method": "memory",
            "synchronizer.sync_style": "fixed",
            "algorithm.sample_strategy_args.max_staleness": 0,
        },
    ),
    (
        ("rollout.nnodes=2", "rollout.n_gpus_per_node=8", "trainer_common.nnodes=3",
         "rollout.tensor_model_parallel_size=4", "data.train_batch_size=12"),
        "cuda",
        {
            "cluster.node_num": 5,
            "cluster.gpu_per_node": 8,
            f"{ENGINE}.engine_num": 4,
            f"{ENGINE}.tensor_parallel_size": 4,
            "explorer.runner_per_model": 3,
            f"{ARGS}.processes": 24,
        },
    ),
    (
        ("rollout.engine=service",),
        "cuda",
        {"trainer.trainer_type": "tinker", f"{ENGINE}.engine_type": "tinker"},
    ),
    (
        ("rollout.mode=sync",),
        "cpu",
        {
            "mode": "both",
            "synchronizer.sync_style": "fixed",
            "synchronizer.sync_interval": 1,
            "algorithm.sample_strategy_args.max_staleness": 0,
        },
    ),
    (
        ("rollout.mode=async", "rollout.max_staleness=3", "trainer_common.test_freq=5"),
        "cpu",
        {
            "synchronizer.sync_interval": 2,
            "algorithm.sample_strategy_args.max_staleness": 3,
            "explorer.eval_interval": 6,
        },
    ),
    (
        ("rollout.max_staleness=4",),
        "cpu",
        {"synchronizer.sync_interval": 2, "algorithm.sample_strategy_args.max_staleness": 4},
    ),
    (
        ("rollout.max_model_len=1000", "rollout.max_response_length_in_one_turn=2000"),
        "cpu",
        {
            "model.max_model_len": 1000,
            "model.max_prompt_tokens": 1,
            "model.max_response_tokens": 999,
        },
    ),
    (
        ("rollout.top_k=5", "rollout.top_p=0.9", "rollout.allow_biased_sampling=true"),
        "cpu",
        {"model.top_k": 5, "model.top_p": 0.9},
    ),
    (
        ("rollout.val_kwargs.temperature=0.6", "rollout.val_kwargs.num_repeat=4",
         "rollout.val_kwargs.top_k=3"),
        "cpu",
        {
            f"{VALIDATION}.repeat_times": 4,
            f"{VALIDATION}.rollout_args.temperature": 0.6,
            f"{VALIDATION}.rollout_args.top_k": 3,
        },
    ),
    (
        ("rollout.episode_timeout=10", "rollout.judge_timeout=2.5", "rollout.call_timeout=1",
         "rollout.max_retries=0"),
        "cpu",
        {"explorer.max_timeout": 14},
    ),
    (
        ("rollout.episode_timeout=10", "rollout.judge_timeout=2.5", "rollout.call_timeout=1",
         "rollout.max_retries=0", "rollout.mode=sync", "trainer_common.stall_timeout=6"),
        "cpu",
        {"explorer.max_timeout": 20},
    ),
    (
        ("data.train_batch_size=1", "rollout.num_repeat=4", "rollout.max_env_worker=2"),
        "cpu",
        {"explorer.runner_per_model": 1, "buffer.train_batch_size": 4},
    ),
    (("model.lora.target_modules=attn",), "cpu",
     {"model.tinker.train_mlp": False, "model.tinker.train_attn": True}),
    (("model.lora.target_modules=mlp", "model.lora.rank=4"), "cpu",
     {"model.tinker.train_mlp": True, "model.tinker.train_attn": False, "model.tinker.rank": 4}),
    (("model.lora.target_modules='attn, unembed'",), "cpu",
     {"model.tinker.train_mlp": False, "model.tinker.train_attn": True,
      "model.tinker.train_unembed": True}),
    (
        ("model.dtype=float32", "trainer_common.micro_batch_tokens=9000"),
        "cuda",
        {
            f"{ENGINE}.dtype": "float32",
            f"{VERL}.ref.fsdp_config.mixed_precision.param_dtype": "fp32",
            "trainer.max_token_len_per_gpu": 9000,
        },
    ),
    (
        (f"{LOSS}.loss=gspo", f"{LOSS}.clip_ratio_high=0.001", f"{LOSS}.tis_cap=0",
         f"{LOSS}.adv_estimator=rloo"),
        "cpu",
        {
            f"{ARGS}.loss": "gspo",
            f"{ARGS}.clip_low": -1.0,
            f"{ARGS}.clip_high": 0.001,
            f"{ARGS}.tis_cap": 0.0,
        },
    ),
    (
        ("trainer_common.use_kl_loss=true", "trainer_common.kl_loss_type=k2"),
        "cpu",
        {f"{ARGS}.kl_type": "k2", f"{ARGS}.kl_coef": 0.002, "algorithm.kl_loss_fn": "none"},
    ),
    (
        (f"{OPTIM}.warmup_steps=10", f"{OPTIM}.max_grad_norm=0"),
        "cpu",
        {"algorithm.optimizer.lr_warmup_steps": 10, "trainer.grad_clip": 0.0},
    ),
    (
        (f"{OPTIM}.warmup_steps=10", f"{OPTIM}.max_grad_norm=0"),
        "cuda",
        {
            f"{VERL}.actor.optim.lr_scheduler_type": "cosine",
            f"{VERL}.actor.optim.num_cycles": 0.0,
            f"{VERL}.actor.optim.zero_indexed_step": False,
            "trainer.grad_clip": 1e9,
            "algorithm.optimizer.clip_grad": 1e9,
        },
    ),
    (
        (f"{OPTIM}.lr_schedule=cosine",),
        "cuda",
        {
            "algorithm.optimizer.lr_scheduler_type": "cosine",
            f"{VERL}.actor.optim.zero_indexed_step": True,
        },
    ),
    (
        ("trainer_common.save_freq=20", "trainer_common.resume_freq=5"),
        "cpu",
        {"trainer.save_interval": 5},
    ),
    (
        ("trainer_common.save_freq=0", "trainer_common.resume_freq=0",
         "trainer_common.test_freq=0"),
        "cpu",
        {"trainer.save_interval": 1_000_000_000, "explorer.eval_interval": 1_000_000_000},
    ),
    (("trainer_common.total_steps=7",), "cpu", {"trainer.total_steps": 7}),
    (
        ("trainer_common.ray_address=10.0.0.1:6379", "trainer_common.stall_timeout=9.5"),
        "cpu",
        {
            "cluster.ray_address": "10.0.0.1:6379",
            "synchronizer.sync_timeout": 10,
            "buffer.trainer_input.experience_buffer.max_read_timeout": 9.5,
        },
    ),
    (
        ("trinity.synchronizer.sync_interval=3", "trinity.log.level=DEBUG",
         f"trinity.{ARGS}.tis_cap=9.0"),
        "cpu",
        {"synchronizer.sync_interval": 3, "log.level": "DEBUG", f"{ARGS}.tis_cap": 9.0},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "device", "expected"), TABLE)
def test_table(overrides: tuple[str, ...], device: Device, expected: dict[str, Any]) -> None:
    settings = told(*overrides, device=device)
    assert {key: settings.get(key, "absent") for key in expected} == expected


def test_facts_of_machine_and_data() -> None:
    facts = Facts("/models/x", model_context=1000, total_steps=12, validation=False)
    settings = told("trainer_common.total_steps=7", facts=facts, resume=True)
    assert settings["model.model_path"] == "/models/x"
    assert settings["model.max_model_len"] == 1000
    assert settings["trainer.total_steps"] == 12
    assert settings["continue_from_checkpoint"] is True
    assert settings["explorer.eval_on_startup"] is False
    assert not any(key.startswith(VALIDATION) for key in settings)


def test_without_flash_attention_the_trainer_does_not_ask_for_it() -> None:
    key = f"{VERL}.model.override_config.attn_implementation"
    assert key not in told(device="cuda")
    without = told(device="cuda", facts=Facts(flash_attention=False))
    assert (without[key], without["trainer.use_remove_padding"]) == ("sdpa", False)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (("model.device=mps",), "cuda", "`astuner.model.device` is 'mps', but Trinity takes the"),
        (("model.device=cpu", "trainer_common.device=cuda"), "cuda",
         "`astuner.model.device` is 'cpu', but `astuner.trainer_common.device` is 'cuda'."),
        (("rollout.engine=sglang",), "cuda", "is 'sglang', which is not for Trinity"),
        (("rollout.engine=vllm",), "cpu", "is 'vllm', which needs GPUs, but the device is cpu."),
        (("rollout.n_gpus_per_node=3", "rollout.tensor_model_parallel_size=2"), "cuda",
         "is 2, but the inference engines have 3 GPUs"),
        (("rollout.nnodes=2",), "cuda", "is 1, but `astuner.trainer_common.n_gpus_per_node` is 8"),
        (("data.train_batch_size=3", "rollout.num_repeat=3"), "cuda",
         "`astuner.data.train_batch_size` gives 9 episodes a step"),
        (("rollout.mode=sync",), "cuda",
         "`astuner.rollout.mode` is 'sync', but Trinity's own engines take turns on one GPU only"),
        (FULL, "cpu", "`astuner.model.lora.enable` is false, but a service trains adapters"),
        (("model.lora.target_modules=q_proj,v_proj",), "cpu",
         "names q_proj, v_proj, but a service can be told only whole parts of a model: all-linear, "
         "attn, mlp, unembed."),
        (("model_tuner.port=8000",), "cpu", "but episodes run in 2 processes with a proxy each"),
        (("rollout.temperature=0.7",), "cpu",
         "`astuner.rollout.temperature` is 0.7, but Trinity's trainer on a service takes"),
        (("trainer_common.mini_batch_num=2",), "cpu",
         "is 2, but Trinity takes one optimizer step for each batch."),
        ((f"{LOSS}.adv_estimator=gae",), "cpu", "is 'gae', but must be one of grpo, dr_grpo"),
        ((f"{LOSS}.adv_estimator=reinforce_plus_plus",), "cpu",
         "is 'reinforce_plus_plus', which needs the whole batch"),
        ((f"{LOSS}.loss=cispoo",), "cpu", "is 'cispoo', but must be one of"),
        ((f"{LOSS}.dynamic_sampling=true",), "cpu", "is true, but Trinity does not replace"),
        ((f"{LOSS}.max_refill_rounds=5",), "cpu", "is 5, but Trinity does not replace groups."),
        ((f"{OPTIM}.lr_schedule=linear",), "cpu", "is 'linear', which Trinity's trainers do not"),
        ((f"{OPTIM}.lr_schedule=cosine",), "cpu", "one step ahead of ours: its last step has"),
        ((f"{OPTIM}.lr_schedule=cosine", f"{OPTIM}.warmup_steps=3"), "cuda",
         "is 3, but verl's cosine with a warm-up is one step ahead"),
        (("rollout.mode=async",), "cpu", "is 0, which is synchronous"),
        (("rollout.kv_cache_tokens=100",), "cuda",
         "is 100, but vllm sizes its cache by `astuner.rollout.gpu_memory_utilization`."),
        (("trinity.trainer.total_steps=3",), "cpu",
         "`astuner.trinity.trainer.total_steps` is not for setting: use `astuner.trainer_common."),
        (("trinity.buffer.explorer_input.taskset.path=x",), "cpu", "is not for setting: tasks and"),
        (("trinity.model.temperature=0.5",), "cpu",
         "`astuner.trinity.model.temperature` is not for setting: episodes are sampled with"),
        (("trinity.model.top_p=0.5",), "cpu", "sampled with `astuner.rollout.top_p`"),
        (("trinity.model.top_k=5",), "cuda", "sampled with `astuner.rollout.top_k`"),
        (("trinity.model.max_response_tokens=5",), "cpu",
         "use `astuner.rollout.max_response_length_in_one_turn`"),
        (("trinity.algorithm.repeat_times=2",), "cpu", "use `astuner.rollout.num_repeat`"),
        (("trinity.algorithm.advantage_fn_args.estimator=rloo",), "cpu",
         "`astuner.trinity.algorithm.advantage_fn_args.estimator` is not for setting: use"),
        (("trinity.mode=explore",), "cpu", "is not for setting: use `astuner.rollout.mode`"),
    ],
)  # fmt: skip
def test_what_trinity_cannot_honour_is_refused(
    overrides: tuple[str, ...], device: Device, message: str
) -> None:
    assert message in refusal(*overrides, device=device)


def test_all_problems_come_at_once() -> None:
    everything = refusal(
        "rollout.temperature=0.5", "trainer_common.mini_batch_num=2", "model.device=mps"
    )
    assert everything.startswith("The configuration has 3 problems:")


def test_whoever_sets_trinitys_own_key_has_taken_the_choice_over() -> None:
    raw = "trinity.algorithm.optimizer.lr_scheduler_type=cosine"
    settings = told(f"{OPTIM}.lr_schedule=cosine", raw)
    assert settings["algorithm.optimizer.lr_scheduler_type"] == "cosine"


def test_an_advantage_function_of_ones_own_takes_its_arguments() -> None:
    own = ("trinity.algorithm.advantage_fn=my.Advantage",)
    settings = told(*own, "trinity.algorithm.advantage_fn_args.power=2")
    assert settings["algorithm.advantage_fn_args.power"] == 2


def test_what_one_route_cannot_do_is_no_problem_on_the_other() -> None:
    warm, cache = config("rollout.temperature=0.7"), config("rollout.kv_cache_tokens=100")
    assert limits.problems(warm, "cuda") == limits.problems(cache, "cpu") == []
    assert limits.problems(config(f"{OPTIM}.lr_schedule=cosine", *FULL), "cuda") == []


# ---------------------------------------------------------------- in words


def test_explain_says_what_becomes_of_a_key() -> None:
    words = becomes(config("trainer_common.device=cpu", "rollout.num_repeat=4"))
    assert words["trainer_common.optim.lr"].startswith(
        "trinity: algorithm.optimizer.lr=1e-05 (Adam"
    )
    assert words["rollout.num_repeat"] == (
        "trinity: algorithm.repeat_times=4, buffer.train_batch_size=32, "
        "algorithm.sample_strategy_args.multiple_of=0, explorer.runner_per_model=2"
    )
    assert words["model.lora.alpha"] == "of the service that is started with the run"
    assert words["trainer_common.nnodes"].startswith("trinity: cluster.node_num=1")
    assert words["rollout.gpu_memory_utilization"].startswith("not used (the service")
    assert words["trainer_common.mini_batch_num"].startswith("not used (Trinity takes one")
    for key in ("task_reader.type", f"{LOSS}.adv_estimator", f"{LOSS}.loss_agg_mode"):
        assert words[key] == "read by astuner itself"
    assert (words["trinity"], words["verl"]) == ("nothing", "")


def test_raw_settings_win_and_are_told() -> None:
    chosen = config(
        "trainer_common.device=cpu", "trinity.algorithm.optimizer.lr=0.5", "trinity.log.level=DEBUG"
    )
    assert overridden(chosen) == {"algorithm.optimizer.lr": (1e-5, 0.5)}
    words = becomes(chosen)
    assert "algorithm.optimizer.lr=0.5 (astuner.trinity, instead of 1e-05)" in words[f"{OPTIM}.lr"]
    assert "; log.level" not in words["trinity"] and 'log.level="DEBUG"' in words["trinity"]
    assert "`astuner.trinity` sets algorithm.optimizer.lr=0.5 instead of 1e-05." in warnings(chosen)


def test_the_default_is_asynchronous_and_says_so() -> None:
    told_of_auto = "`astuner.rollout.mode` auto is async for trinity"
    assert any(told_of_auto in note for note in warnings(config()))
    assert not any(told_of_auto in note for note in warnings(config("rollout.mode=sync")))
    note = warnings(config("rollout.mode=sync", "rollout.max_staleness=2"))
    assert any("allows rollouts to run ahead, but" in line for line in note)


def test_explain_finds_the_translation_and_its_problems() -> None:
    found = translation_of(
        config("trainer_common.device=cpu", "rollout.temperature=0.5"), "trinity"
    )
    assert found.becomes["rollout.temperature"].startswith("trinity: model.temperature=0.5")
    assert len(found.problems) == 1 and "`astuner.rollout.temperature`" in found.problems[0]


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("overrides", "visible", "device"),
    [
        ((), 0, "cpu"),
        ((), 9, "cuda"),
        (("trainer_common.device=cpu",), 9, "cpu"),
        (("rollout.engine=service",), 9, "cpu"),
        (("trainer_common.ray_address=auto",), 0, "cuda"),
        (("rollout.mode=sync", "trainer_common.n_gpus_per_node=1"), 1, "cuda"),
    ],
)
def test_the_device(overrides: tuple[str, ...], visible: int, device: str) -> None:
    warned: list[str] = []
    assert requirements.choose_device(config(*overrides), warned.append, visible) == device
    assert bool(warned) == (overrides == () and visible == 0)


@pytest.mark.parametrize(
    ("overrides", "visible", "message"),
    [
        ((), 8, "asks for 9 GPUs, but 8 are visible here"),
        (("trainer_common.device=cuda",), 0, "is cuda, but no GPU is visible"),
        (("rollout.nnodes=2",), 16, "need a Ray cluster"),
    ],
)
def test_too_few_gpus(overrides: tuple[str, ...], visible: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        requirements.choose_device(config(*overrides), print, visible)


def test_a_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None if name == "ray" else object())
    with pytest.raises(MissingDependency, match=r"astuner\[trinity\]") as caught:
        requirements.need_trinity("service")
    assert "--env trinity" in str(caught.value)
