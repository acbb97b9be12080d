"""What verl cannot do as astuner means it: refused, or said."""

from __future__ import annotations

import pytest

from astuner.backbone.spawned.choices import Device
from astuner.backbone.verl import limits, reserved
from astuner.backbone.verl.translate import warnings
from astuner.config.keys import keys
from tests.backbone.verl.told import ACTOR, ASYNC, LOSS, OPTIM, ROLLOUT, config, refusal, told


@pytest.mark.parametrize(
    ("overrides", "device", "message"),
    [
        (("model.device=mps",), "cuda", "`astuner.model.device` is 'mps', but verl knows only"),
        (("model.device=cpu", "trainer_common.device=cuda"), "cuda",
         "`astuner.model.device` is 'cpu', but `astuner.trainer_common.device` is 'cuda'."),
        (("rollout.engine=embedded",), "cuda",
         "`astuner.rollout.engine` is 'embedded', which runs on the CPU only, but the device is "
         "cuda."),
        (("rollout.engine=sglang",), "cpu", "is 'sglang', which needs GPUs, but the device is"),
        (("rollout.tensor_model_parallel_size=3",), "cuda",
         "is 3, but the inference engines share 8 GPUs"),
        ((*ASYNC, "rollout.tensor_model_parallel_size=2"), "cuda",
         "share 1 GPUs (rollout.nnodes * n_gpus_per_node)"),
        (("model_tuner.port=8000",), "cuda", "but episodes run in 8 processes with a proxy each"),
        (("trainer_common.mini_batch_num=3",), "cuda", "is 3, which does not divide the 8 groups"),
        (("trainer_common.mini_batch_num=4", "rollout.num_repeat=2"), "cuda",
         "`astuner.data.train_batch_size` gives 4 episodes an optimizer step"),
        ((f"{LOSS}.adv_estimator=reinforce_plus_plus",), "cuda", "which needs the whole batch"),
        ((f"{LOSS}.adv_estimator=gae",), "cuda", "is 'gae', but must be one of grpo, dr_grpo"),
        ((f"{LOSS}.loss=cross_entropy",), "cuda",
         "is 'cross_entropy', which verl's trainer does not have. It has: ppo, gspo, cispo"),
        (("trainer_common.optim.lr_schedule=linear",), "cuda", "is 'linear', which verl's FSDP"),
        (("trainer_common.optim.lr_schedule=cosine", "trainer_common.optim.warmup_steps=3"),
         "cuda", "is 3, but verl's cosine with a warm-up is one step ahead of ours"),
        ((*ASYNC, "trainer_common.mini_batch_num=2", "trainer_common.optim.warmup_steps=2"),
         "cuda", "verl moves the learning rate's schedule at every optimizer step"),
        (("rollout.mode=async",), "cuda", "is 0, which is synchronous"),
        (("rollout.kv_cache_tokens=100",), "cuda",
         "is 100, but vllm sizes its cache by `astuner.rollout.gpu_memory_utilization`."),
    ],
)  # fmt: skip
def test_what_verl_cannot_honour_is_refused(
    overrides: tuple[str, ...], device: Device, message: str
) -> None:
    assert message in refusal(*overrides, device=device)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("data.custom_cls.path=mine.py",
         "is not for setting: tasks, lengths and the batch are `astuner.task_reader` and"),
        ("data.shuffle=true", "is not for setting: tasks, lengths and the batch"),
        ("custom_reward_function.path=mine.py", "use `astuner.task_judge` with judge_type"),
        (f"{ROLLOUT}.agent.default_agent_loop=tool_agent",
         "is not for setting: episodes are those of your workflow, `astuner.rollout.user_work"),
        (f"{ROLLOUT}.multi_turn.enable=true", "turns and tools are your workflow's own"),
        (f"{ROLLOUT}.calculate_log_probs=false", "is False, but has to be True: a token is"),
        ("algorithm.use_kl_in_reward=true", "Use `astuner.trainer_common.use_kl_loss`."),
        ("algorithm.filter_groups.enable=true", "algorithm.dynamic_sampling`."),
        ("trainer.v1.trainer_mode=colocate_async", "use `astuner.rollout.mode`."),
        ("trainer.logger=[console]", "is not for setting: verl's metrics are read from its"),
        ("ray_kwargs.ray_init.runtime_env={}",
         "would replace a whole section of verl's: name the settings below it."),
        ("trainer.save_freq=10", "use `astuner.trainer_common.save_freq` and `.resume_freq`."),
        (f"{ROLLOUT}.logprobs_mode=raw_logprobs", "the distribution that tokens were drawn from."),
        (f"{ROLLOUT}.top_p=0.9", "is 0.9, which cuts the distribution that samples, while the"),
        (f"{ROLLOUT}.top_k=20", "or accept the bias with `astuner.rollout.allow_biased_sampling"),
        (f"{ROLLOUT}.temperature=0", "must be above 0 for training"),
        ("trainer.default_hdfs_dir=hdfs://x", "where the run's folder is."),
        (f"{ACTOR}.checkpoint.async_save=true", "checkpoints are whole, and read by astuner."),
        (f"{ACTOR}.strategy=megatron", "reads and merges checkpoints of fsdp2."),
        ("trainer.v1.sampler.custom_sampler.path=mine.py", "which groups a step was trained on."),
        ("trainer=null", "would replace a whole section of verl's"),
    ],
)  # fmt: skip
def test_what_astuner_stands_on_is_not_for_setting(raw: str, message: str) -> None:
    key = raw.partition("=")[0]
    assert refusal(f"verl.{raw}").startswith(f"`astuner.verl.{key}` ")
    assert message in refusal(f"verl.{raw}")


def test_next_to_what_is_reserved_all_is_free() -> None:
    free = ("data.trust_remote_code=true", f"{ROLLOUT}.calculate_log_probs=true")
    free += ("trainer.nnodes=2", "trainer.logger_x=1", "ray_kwargs.ray_init.num_cpus=4")
    free += (f"{ROLLOUT}.top_p=1", f"{ROLLOUT}.top_k=-1", f"{ROLLOUT}.temperature=0.7")
    settings = told(*(f"verl.{one}" for one in free))
    assert settings["data.trust_remote_code"] is True
    own = (
        f"verl.{key}" for key in ("algorithm.use_kl_in_reward=true", "algorithm.adv_estimator=gae")
    )
    assert told(*own)["algorithm.use_kl_in_reward"] is True


def test_a_raw_setting_may_bias_sampling_where_the_user_accepts_it() -> None:
    settings = told(f"verl.{ROLLOUT}.top_p=0.9", "rollout.allow_biased_sampling=true")
    assert settings[f"{ROLLOUT}.top_p"] == 0.9


def test_what_is_reserved_and_set_is_set_to_what_is_needed() -> None:
    """The table is of keys that verl has and we set; a value that is needed is the one set."""
    settings = told() | told(*ASYNC)
    for key, (value, _) in reserved.NEEDED.items():
        assert settings[key] is value


def test_all_refusals_come_at_once() -> None:
    message = refusal("trainer_common.optim.lr_schedule=linear", f"{LOSS}.loss=cross_entropy")
    assert message.startswith("The configuration has 2 problems:")


def test_a_loss_of_verls_own_has_verls_own_clip_range() -> None:
    settings = told(f"{LOSS}.loss=cross_entropy", f"verl.{ACTOR}.policy_loss.loss_mode=vanilla")
    assert settings[f"{ACTOR}.policy_loss.loss_mode"] == "vanilla"
    assert not any(key.startswith(f"{ACTOR}.clip_ratio") for key in settings)


def test_who_sets_the_verl_key_himself_is_let_through() -> None:
    raw = f"verl.{OPTIM}.lr_scheduler_type=cosine"
    settings = told("trainer_common.optim.lr_schedule=linear", raw)
    assert settings[f"{OPTIM}.lr_scheduler_type"] == "cosine"
    ours = {*keys(), *(f"verl.{key}" for key in reserved.NEEDED)}
    assert limits.LIFTED_BY.keys() <= ours


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("rollout.max_staleness=2",), "verl takes turns unless `astuner.rollout.mode` is async"),
        (("trainer_common.use_kl_loss=true", "trainer_common.kl_loss_type=k2"),
         "in verl's KL term each timeline counts alike"),
        (("trainer_common.use_kl_loss=true", f"{LOSS}.loss_agg_mode=token-mean"),
         "verl cuts the estimate at 10 a token"),
        ((f"{LOSS}.adv_estimator=a.b->c",), "a.b->c is given one group at a time"),
        (("trainer_common.device=cpu", "model.lora.enable=false"),
         "verl's trainer runs on the CPU"),
        (("verl.algorithm.adv_estimator=rloo",), "an episode that falls into several counts as"),
        (ASYNC, "as one set of weights, rounded to bfloat16"),
    ],
)  # fmt: skip
def test_what_is_a_little_otherwise_is_said(overrides: tuple[str, ...], part: str) -> None:
    [note, *others] = warnings(config(*overrides))
    assert part in note
    assert all(other.startswith("`astuner.verl` sets ") for other in others)


def test_algorithms_by_name() -> None:
    """AstunerJob's names: all but the one that needs the whole batch."""
    from astuner.job.job import ALGORITHMS

    for name, values in ALGORITHMS.items():
        overrides = [f"{LOSS}.{key}={value}" for key, value in values.items()]
        found = [key for key, _ in limits.problems(config(*overrides), "cuda")]
        wanted = [f"{LOSS}.adv_estimator"] if name == "reinforce_plus_plus" else []
        assert found == wanted, name
