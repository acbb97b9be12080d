"""What verl cannot do as astuner means it: errors before anything starts, and notes.

An error where the run would compute something else than the configuration says; a note
where it is the same in most cases, or only slower. All are found at once. No verl here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from astuner.backbone.spawned.choices import Device, Problem, assumed, two_devices
from astuner.backbone.spawned.refusals import (
    cache_size,
    estimator,
    estimator_of_groups,
    no_staleness,
    one_port,
    refuse,
)
from astuner.backbone.verl.learning import LOSSES
from astuner.backbone.verl.reserved import reserved
from astuner.backbone.verl.sections import (
    ACTOR,
    EMBEDDED,
    ESTIMATOR,
    ROLLOUT,
    agent_workers,
    engine_name,
    is_async,
    merges,
    processes,
    raw,
)
from astuner.config.keys import full
from astuner.config.schema import AstunerConfig

OF_EPISODES = "grpo"
"""The one of verl's estimators that compares episodes, by their last timelines
(trainer/ppo/v1/utils.py:167)."""


def check(config: AstunerConfig, device: Device | None = None) -> None:
    """Raises ConfigError with everything that verl cannot honour."""
    refuse(problems(config, device))


LIFTED_BY: Mapping[str, str] = {
    "trainer_common.algorithm.adv_estimator": "algorithm.adv_estimator",
    "trainer_common.algorithm.loss": f"{ACTOR}.policy_loss.loss_mode",
    "trainer_common.optim.lr_schedule": f"{ACTOR}.optim.lr_scheduler_type",
    "trainer_common.optim.warmup_steps": f"{ACTOR}.optim.lr_warmup_steps",
    "verl.algorithm.use_kl_in_reward": "algorithm.adv_estimator",
}
"""Whoever sets this verl key himself has taken the choice over."""


def problems(config: AstunerConfig, device: Device | None = None) -> list[Problem]:
    device = device or assumed(config)
    taken = raw(config)
    rules: tuple[Callable[[AstunerConfig, Device], Iterator[Problem]], ...] = (
        _devices,
        _pools,
        _batch,
        _algorithm,
        _sampling,
        _learning_rate,
        _asynchronous,
        _memory,
    )
    found = [problem for rule in rules for problem in rule(config, device)]
    found += reserved(taken)
    return [(key, message) for key, message in found if LIFTED_BY.get(key) not in taken]


def _devices(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    if config.model.device not in ("auto", "cuda", "cpu"):
        yield (
            "model.device",
            f"is {config.model.device!r}, but verl knows only cuda and cpu, and takes the GPUs "
            "that it sees: leave it at auto, and choose GPUs with CUDA_VISIBLE_DEVICES.",
        )
    yield from two_devices(config)
    engine = config.rollout.engine
    if engine == "service":
        yield ("rollout.engine", "is 'service', which is for trinity. Use vllm, sglang or auto.")
    if (engine == EMBEDDED) != (device == "cpu") and engine in (EMBEDDED, "sglang"):
        where = "runs on the CPU only" if engine == EMBEDDED else "needs GPUs"
        yield ("rollout.engine", f"is {engine!r}, which {where}, but the device is {device}.")


def _pools(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    size = config.rollout.tensor_model_parallel_size
    pool = processes(config, device)
    where = "trainer_common.nnodes * n_gpus_per_node"
    if is_async(config) and device == "cuda":
        pool = config.rollout.nnodes * config.rollout.n_gpus_per_node
        where = "rollout.nnodes * n_gpus_per_node"
    if pool % size:
        yield (
            "rollout.tensor_model_parallel_size",
            f"is {size}, but the inference engines share {pool} GPUs ({where}), which {size} "
            "does not divide.",
        )
    yield from one_port(config, agent_workers(config, device))


def _batch(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    size, number = config.data.train_batch_size, config.trainer_common.mini_batch_num
    if size % number:
        yield (
            "trainer_common.mini_batch_num",
            f"is {number}, which does not divide the {size} groups of "
            f"`{full('data.train_batch_size')}`; verl's mini-batches are of equal size.",
        )
        return
    episodes = size // number * config.rollout.num_repeat
    if episodes % processes(config, device):
        yield (
            "data.train_batch_size",
            f"gives {episodes} episodes an optimizer step (times rollout.num_repeat, divided by "
            f"trainer_common.mini_batch_num), which {processes(config, device)} GPUs cannot "
            "share evenly. Choose a multiple.",
        )


def _algorithm(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    own = config.trainer_common.algorithm
    its_own = ", or verl's own with verl.algorithm.adv_estimator=reinforce_plus_plus"
    yield from estimator(config, its_own)
    if own.loss not in LOSSES:
        yield (
            "trainer_common.algorithm.loss",
            f"is {own.loss!r}, which verl's trainer does not have. It has: {', '.join(LOSSES)}.",
        )


def _sampling(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    """As `config.check` wants it of astuner's own keys, in whose place these come."""
    taken = raw(config)
    if taken.get(f"{ROLLOUT}.temperature") == 0:
        yield (
            f"verl.{ROLLOUT}.temperature",
            "must be above 0 for training: greedy episodes of one task are all alike.",
        )
    for name, whole in (("top_p", (1,)), ("top_k", (0, -1))):
        value = taken.get(f"{ROLLOUT}.{name}", whole[0])
        if value not in whole and not config.rollout.allow_biased_sampling:
            yield (
                f"verl.{ROLLOUT}.{name}",
                f"is {value!r}, which cuts the distribution that samples, while the whole one is "
                "trained. Remove it, or accept the bias with "
                f"`{full('rollout.allow_biased_sampling')}: true`.",
            )


def _learning_rate(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    own = config.trainer_common.optim
    if own.lr_schedule == "linear":
        yield (
            "trainer_common.optim.lr_schedule",
            "is 'linear', which verl's FSDP trainer does not have. Use constant or cosine.",
        )
    if own.lr_schedule == "cosine" and own.warmup_steps:
        yield (
            "trainer_common.optim.warmup_steps",
            f"is {own.warmup_steps}, but verl's cosine with a warm-up is one step ahead of ours: "
            "its last (or first) step has rate 0. Set it to 0, use a constant schedule, or take "
            "verl's own with verl.actor_rollout_ref.actor.optim.lr_warmup_steps="
            f"{own.warmup_steps}.",
        )
    varies = own.lr_schedule != "constant" or own.warmup_steps > 0
    if is_async(config) and config.trainer_common.mini_batch_num > 1 and varies:
        yield (
            "trainer_common.mini_batch_num",
            f"is {config.trainer_common.mini_batch_num}, but with rollout.mode async verl moves "
            "the learning rate's schedule at every optimizer step, not every batch. Use a "
            "constant rate without a warm-up, or one mini-batch.",
        )


def _asynchronous(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    yield from no_staleness(config)


def _memory(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    if (engine := engine_name(config, device)) != EMBEDDED:
        yield from cache_size(config, engine)


# ---------------------------------------------------------------- notes


def notes(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What is worth knowing before the run, and no error."""
    device = device or assumed(config)
    return [note for rule in (_of_pace, _of_weights, _of_loss) for note in rule(config, device)]


def _of_pace(config: AstunerConfig, device: Device) -> Iterator[str]:
    if config.rollout.max_staleness and not is_async(config):
        yield (
            f"`{full('rollout.max_staleness')}` = {config.rollout.max_staleness} allows rollouts "
            "to run ahead, but verl takes turns unless `astuner.rollout.mode` is async (which "
            "needs GPUs for rollouts alone)."
        )
    if device == "cpu":
        yield (
            "verl's trainer runs on the CPU: one process, very slow. It is for trying out; "
            "`--backbone local` is the way to train on a CPU."
        )


def _of_weights(config: AstunerConfig, device: Device) -> Iterator[str]:
    if config.model.lora.enable and merges(config, device) and device == "cuda":
        yield (
            "`astuner.model.lora`: verl sends base and adapter to the rollouts as one set of "
            "weights, rounded to bfloat16 (engine/fsdp/transformer_impl.py:1082), so that small "
            "changes of the adapter reach them late. model.lora.enable=false is not rounded more "
            "than model.dtype says, and neither is an adapter in sync mode on GPUs."
        )


def _of_loss(config: AstunerConfig, device: Device) -> Iterator[str]:
    own = config.trainer_common
    if own.use_kl_loss and own.algorithm.loss_agg_mode == "episode-mean":
        yield (
            "`astuner.trainer_common.use_kl_loss` with loss_agg_mode episode-mean: in verl's KL "
            "term each timeline counts alike, so an episode that falls into several counts more "
            "than with the local backbone. token-mean and constant are exact."
        )
    if own.use_kl_loss and own.kl_loss_type in ("k3", "low_var_kl"):
        yield (
            f"`astuner.trainer_common.kl_loss_type` = {own.kl_loss_type}: verl cuts the estimate "
            "at 10 a token, so that tokens far from the reference are not pulled back; k2 has no "
            "such cut."
        )
    yield from estimator_of_groups(config)
    verls = raw(config).get("algorithm.adv_estimator", ESTIMATOR)
    if verls not in (ESTIMATOR, OF_EPISODES):
        yield (
            f"`astuner.verl.algorithm.adv_estimator` = {verls}: verl computes it over timelines, "
            "so that an episode that falls into several counts as often. Only astuner's own and "
            f"verl's {OF_EPISODES} count episodes."
        )
