"""What Trinity cannot do as astuner means it: errors before anything starts, and notes.

An error where the run would compute something else than the configuration says; a note
where it is the same in most cases, or only slower. All are found at once. No Trinity here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from astuner.algorithm import LOSSES
from astuner.backbone.lora_parts import PARTS, unknown_parts
from astuner.backbone.spawned.choices import Device, Problem, assumed, two_devices
from astuner.backbone.spawned.refusals import (
    cache_size,
    estimator,
    estimator_of_groups,
    no_staleness,
    one_port,
    refuse,
)
from astuner.backbone.trinity.processes import runners
from astuner.backbone.trinity.reserved import reserved
from astuner.backbone.trinity.sections import (
    is_async,
    is_colocated,
    raw,
    route,
    trainer_gpus,
)
from astuner.config.keys import full
from astuner.config.schema import AstunerConfig

REFILL_ROUNDS = 3
"""The schema's default."""

LIFTED_BY: Mapping[str, str] = {
    "trainer_common.algorithm.adv_estimator": "algorithm.advantage_fn",
    "trainer_common.algorithm.loss": "algorithm.policy_loss_fn",
    "trainer_common.optim.lr_schedule": "algorithm.optimizer.lr_scheduler_type",
    "trainer_common.optim.warmup_steps": "algorithm.optimizer.lr_warmup_steps",
}
"""Whoever sets this key of Trinity's himself has taken the choice over."""


def check(config: AstunerConfig, device: Device | None = None) -> None:
    """Raises ConfigError with everything that Trinity cannot honour."""
    refuse(problems(config, device))


def problems(config: AstunerConfig, device: Device | None = None) -> list[Problem]:
    device = device or assumed(config)
    taken = raw(config)
    rules: tuple[Callable[[AstunerConfig, Device], Iterator[Problem]], ...] = (
        _devices,
        _pools,
        _service,
        _batch,
        _algorithm,
        _learning_rate,
        _asynchronous,
        _memory,
    )
    found = [problem for rule in rules for problem in rule(config, device)]
    found = [(key, message) for key, message in found if LIFTED_BY.get(key) not in taken]
    return [*found, *reserved(taken)]


def _devices(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    if config.model.device not in ("auto", "cuda", "cpu"):
        yield (
            "model.device",
            f"is {config.model.device!r}, but Trinity takes the GPUs that it sees: leave it at "
            "auto, and choose GPUs with CUDA_VISIBLE_DEVICES.",
        )
    yield from two_devices(config)
    engine = config.rollout.engine
    if engine in ("sglang", "embedded"):
        yield (
            "rollout.engine",
            f"is {engine!r}, which is not for Trinity: vllm is Trinity's own on GPUs, and with "
            "service astuner's own service samples and trains, on any machine.",
        )
    if engine == "vllm" and device == "cpu":
        yield (
            "rollout.engine",
            "is 'vllm', which needs GPUs, but the device is cpu. With service (or auto) "
            "astuner's own service samples and trains.",
        )


def _pools(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    yield from one_port(config, runners(config, route(config, device)))
    if route(config, device) == "service" or is_colocated(config):
        return
    own, trainer = config.rollout, config.trainer_common
    if not is_async(config):
        yield (
            "rollout.mode",
            f"is 'sync', but Trinity's own engines take turns on one GPU only, and "
            f"`{full('trainer_common.n_gpus_per_node')}` is {trainer.n_gpus_per_node}. Set it to "
            "1, or the mode to async.",
        )
    pool, size = own.nnodes * own.n_gpus_per_node, own.tensor_model_parallel_size
    if pool % size:
        yield (
            "rollout.tensor_model_parallel_size",
            f"is {size}, but the inference engines have {pool} GPUs (rollout.nnodes * "
            f"n_gpus_per_node), which {size} does not divide.",
        )
    if max(own.nnodes, trainer.nnodes) > 1 and own.n_gpus_per_node != trainer.n_gpus_per_node:
        yield (
            "rollout.n_gpus_per_node",
            f"is {own.n_gpus_per_node}, but `{full('trainer_common.n_gpus_per_node')}` is "
            f"{trainer.n_gpus_per_node}: Trinity's machines are all alike.",
        )
    episodes = config.data.train_batch_size * own.num_repeat
    if episodes % trainer_gpus(config):
        yield (
            "data.train_batch_size",
            f"gives {episodes} episodes a step (times rollout.num_repeat), which "
            f"{trainer_gpus(config)} GPUs cannot share evenly. Choose a multiple.",
        )


def _service(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    """What the Tinker API has no words for."""
    if route(config, device) != "service":
        return
    lora = config.model.lora
    if not lora.enable:
        yield (
            "model.lora.enable",
            "is false, but a service trains adapters. Set it to true, or train all weights "
            "with Trinity's own engines (rollout.engine=vllm, which needs GPUs).",
        )
    if lora.enable and (unknown := unknown_parts(lora.target_modules)):
        yield (
            "model.lora.target_modules",
            f"names {', '.join(unknown)}, but a service can be told only whole parts of a model: "
            f"{', '.join(PARTS)}.",
        )
    if config.rollout.temperature != 1:
        yield (
            "rollout.temperature",
            f"is {config.rollout.temperature}, but Trinity's trainer on a service takes "
            "logprobs at temperature 1, so that every ratio would be wrong. Set it to 1.",
        )


def _batch(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    number = config.trainer_common.mini_batch_num
    if number > 1:
        yield (
            "trainer_common.mini_batch_num",
            f"is {number}, but Trinity takes one optimizer step for each batch. Make "
            f"`{full('data.train_batch_size')}` smaller instead.",
        )


def _algorithm(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    own = config.trainer_common.algorithm
    yield from estimator(config)
    if own.loss not in LOSSES:
        yield (
            "trainer_common.algorithm.loss",
            f"is {own.loss!r}, but must be one of {', '.join(LOSSES)}.",
        )
    if own.dynamic_sampling:
        yield (
            "trainer_common.algorithm.dynamic_sampling",
            "is true, but Trinity does not replace groups; those whose rewards are all equal "
            "are skipped. Set it to false.",
        )
    elif own.max_refill_rounds != REFILL_ROUNDS:
        yield (
            "trainer_common.algorithm.max_refill_rounds",
            f"is {own.max_refill_rounds}, but Trinity does not replace groups. Remove it.",
        )


def _learning_rate(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    own = config.trainer_common.optim
    service = route(config, device) == "service"
    if own.lr_schedule == "linear":
        yield (
            "trainer_common.optim.lr_schedule",
            "is 'linear', which Trinity's trainers do not have. Use constant"
            f"{'' if service else ' or cosine'}.",
        )
    elif own.lr_schedule == "cosine" and service:
        yield (
            "trainer_common.optim.lr_schedule",
            "is 'cosine', but Trinity's on a service is one step ahead of ours: its last step "
            "has rate 0. Use constant, or take Trinity's own with "
            "trinity.algorithm.optimizer.lr_scheduler_type=cosine.",
        )
    elif own.lr_schedule == "cosine" and own.warmup_steps:
        yield (
            "trainer_common.optim.warmup_steps",
            f"is {own.warmup_steps}, but verl's cosine with a warm-up is one step ahead of "
            "ours: its last (or first) step has rate 0. Set it to 0, use a constant schedule, "
            "or take verl's own with trinity.algorithm.optimizer.lr_warmup_steps="
            f"{own.warmup_steps}.",
        )


def _asynchronous(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    yield from no_staleness(config, ", or leave the mode at auto, which takes 1")


def _memory(config: AstunerConfig, device: Device) -> Iterator[Problem]:
    if route(config, device) == "vllm":
        yield from cache_size(config, "vllm")


# ---------------------------------------------------------------- notes


def notes(config: AstunerConfig, device: Device | None = None) -> list[str]:
    """What is worth knowing before the run, and no error."""
    device = device or assumed(config)
    return [note for rule in (_of_pace, _of_learning) for note in rule(config, device)]


def _of_pace(config: AstunerConfig, device: Device) -> Iterator[str]:
    if config.rollout.mode == "auto" and config.rollout.max_staleness == 0:
        yield (
            "`astuner.rollout.mode` auto is async for trinity: rollouts go on while the trainer "
            "works, one version behind it. rollout.mode=sync takes turns; "
            "rollout.max_staleness=N allows more."
        )
    if config.rollout.max_staleness and not is_async(config):
        yield (
            f"`{full('rollout.max_staleness')}` = {config.rollout.max_staleness} allows "
            "rollouts to run ahead, but `astuner.rollout.mode` is sync."
        )


def _of_learning(config: AstunerConfig, device: Device) -> Iterator[str]:
    yield from estimator_of_groups(config)
    if route(config, device) == "service":
        return
    if config.model.lora.enable:
        yield (
            "`astuner.model.lora`: adapters with Trinity's own engines have not been tried by "
            "astuner's makers, and reach vLLM through checkpoints on disk."
        )
