"""Runs whose targets are not all one adapter: `model.targets` made into a team.

The shared adapter is that of a run without targets; every other adapter is drawn from a
seed of its own. Endpoints are for the proxy. The base is loaded once.
"""

from __future__ import annotations

from zlib import crc32

from astuner.algorithm import find_kl, find_loss
from astuner.backbone.assembly import max_context
from astuner.config.keys import full
from astuner.config.schema import AstunerConfig, LoraConfig
from astuner.config.targets import KEY, Target, targets_of
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import LoraSpec
from astuner.engine.team import SHARED, Member, Seat, Team
from astuner.errors import ConfigError


def check_targets(config: AstunerConfig, declared: frozenset[str] | None) -> None:
    """Raises ConfigError where `model.targets` and the workflow's `trainable_targets` (None:
    all) contradict each other."""
    for tag, target in targets_of(config).items():
        where = f"`{full(KEY)}.{tag}`"
        if declared is not None and target.kind != "own" and tag in declared:
            raise ConfigError(
                f"{where} says that it is {target}, but the workflow's trainable_targets names it. "
                "Take it out of one of them."
            )
        if declared is not None and target.kind == "own" and tag not in declared:
            raise ConfigError(
                f"{where} has an adapter of its own, but the workflow's trainable_targets is "
                f"{sorted(declared)}, so nothing would train it. Add it there."
            )
        if target.kind == "past" and not target.of and not _has_shared(config, declared):
            raise ConfigError(
                f"{where} plays past weights of the shared adapter, but every trained target has "
                "an adapter of its own. Say whose weights: {version: -1, of: TAG}."
            )


async def open_team(config: AstunerConfig, declared: frozenset[str] | None) -> Team:
    """The base with all adapters; the caller closes it. Raises ModelError."""
    from astuner.engine.embedded.host import EmbeddedHost  # torch: not for every run

    rollout, trainer = config.rollout, config.trainer_common
    host = EmbeddedHost.open(
        resolve_model(config.model.path),
        device=config.model.device,
        dtype=config.model.dtype,
        max_context=max_context(config),
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_tokens=rollout.kv_cache_tokens,
        micro_batch_tokens=trainer.micro_batch_tokens,
        gradient_checkpointing=trainer.gradient_checkpointing,
        losses=find_loss,
        kls=find_kl,
    )
    try:
        return await Team.open(host, members(config, declared), seats(config))
    except BaseException:
        host.close()
        raise


def members(config: AstunerConfig, declared: frozenset[str] | None) -> list[Member]:
    """The adapters to train. Without a target that would train it, the shared one is left out."""
    own = [
        Member(
            target.tag,
            _spec(target.lora),
            seed=crc32(f"{config.seed} {target.tag}".encode()),
            rate=_rate(target, config),
        )
        for target in targets_of(config).values()
        if target.lora is not None
    ]
    if not _has_shared(config, declared):
        return own
    return [Member(SHARED, _spec(config.model.lora), seed=config.seed), *own]


def seats(config: AstunerConfig) -> dict[str, Seat]:
    """Whose weights answer the targets that are not trained."""
    found: dict[str, Seat] = {}
    for tag, target in targets_of(config).items():
        if target.kind == "frozen":
            found[tag] = Seat(None)
        elif target.kind == "past":
            found[tag] = Seat(target.of, target.back)
    return found


def _has_shared(config: AstunerConfig, declared: frozenset[str] | None) -> bool:
    own = {t.tag for t in targets_of(config).values() if t.kind == "own"}
    return declared is None or bool(declared - own)


def _rate(target: Target, config: AstunerConfig) -> float:
    return 1.0 if target.lr is None else target.lr / config.trainer_common.optim.lr


def _spec(lora: LoraConfig) -> LoraSpec:
    return LoraSpec(lora.rank, lora.alpha, lora.target_modules)
