"""What is logged after a step, as one flat dict of numbers.

Names are `section/name`: reward, episodes, groups, tokens, timelines, reply, policy
(what the update measured), staleness, and `user/` for what workflows log themselves;
the loop adds seconds, speed and total. With several targets also `reward/TARGET/...`,
`tokens/TARGET/...` and `reply/TARGET/...`. A mean of nothing is left out, not logged as 0.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from astuner.trainer.batch import MASKED, Batch
from astuner.trainer.update import Update
from astuner.types import Episode, Sample

MAX_LAG_SHOWN = 8
"""Tokens that are staler than this share one bar of the histogram."""


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Rewards, failures, timelines, replies and user metrics of a set of episodes."""
    usable = [e for e in episodes if e.ok and e.calls]
    calls = [c for e in usable for c in e.calls]
    metrics = _spread("reward", [e.reward for e in usable if e.reward is not None])
    metrics |= _mean(
        "reward/success_rate", (e.is_success for e in usable if e.is_success is not None)
    )
    metrics |= _failures(episodes)
    metrics |= _mean("timelines/mean", (len(e.samples) for e in usable))
    metrics |= _mean("timelines/calls_per_episode", (len(e.calls) for e in usable))
    anew = Counter(c.new_timeline_reason for c in calls if c.new_timeline_reason)
    metrics |= {f"timelines/new_{reason}": float(n) for reason, n in anew.items()}
    lengths = [len(c.completion_ids) for c in calls]
    metrics |= _mean("reply/tokens_mean", lengths)
    metrics["reply/tokens_max"] = float(max(lengths, default=0))
    metrics |= _mean("reply/truncated_fraction", (c.finish_reason == "length" for c in calls))
    prompt = sum(len(c.prompt_ids) for c in calls)
    if prompt:
        metrics["tokens/prompt_cached_fraction"] = sum(c.prefill_cached for c in calls) / prompt
    metrics |= _mean("episodes/seconds_mean", (e.ended_at - e.started_at for e in usable))
    return metrics | _by_target(usable) | _user_metrics(usable)


def _by_target(episodes: Sequence[Episode]) -> dict[str, float]:
    """Of each target, where there are several or the rewards are by target."""
    calls = [c for e in episodes for c in e.calls]
    tags = {c.target_tag for c in calls}
    rewards = target_totals(episodes)
    metrics: dict[str, float] = {}
    for tag, values in rewards.items():
        metrics |= _spread(f"reward/{tag}", values)
    for tag in sorted(tags) if len(tags) > 1 or rewards else ():
        lengths = [len(c.completion_ids) for c in calls if c.target_tag == tag]
        metrics[f"tokens/{tag}/sampled"] = float(sum(lengths))
        metrics |= _mean(f"reply/{tag}/tokens_mean", lengths)
    return metrics


def target_totals(episodes: Sequence[Episode]) -> dict[str, list[float]]:
    """Target tag -> what it got in each episode that rewards it, in the order of names."""
    totals: defaultdict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        for tag, rewards in (episode.target_rewards or {}).items():
            totals[tag].append(sum(rewards))
    return {tag: totals[tag] for tag in sorted(totals)}


def batch_metrics(batch: Batch) -> dict[str, float]:
    """What was trained, and what was left out and why."""
    metrics = {
        "groups/total": float(len(batch.groups)),
        "groups/trained": float(len(batch.trained)),
        "tokens/trained": float(batch.tokens_trained),
        "timelines/trained": float(len(batch.samples)),
    }
    metrics |= {f"groups/skipped_{name}": float(n) for name, n in batch.skipped_groups.items()}
    if len({c.target_tag for e in batch.episodes for c in e.calls}) > 1:
        trained = Counter[str]()
        for sample in batch.samples:
            trained[sample.target_tag] += sample.num_trained
        metrics |= {f"tokens/{tag}/trained": float(n) for tag, n in sorted(trained.items())}
    return metrics | {f"{MASKED}{name}": float(n) for name, n in batch.masked_tokens.items()}


def update_metrics(update: Update, samples: Sequence[Sample], version: int) -> dict[str, float]:
    """Loss, gradient, how far trainer and sampler are apart, and how stale the tokens are."""
    sampled = np.concatenate([s.logprobs[s.loss_mask] for s in samples])
    metrics = {"policy/entropy": float(-sampled.mean())}  # unless the policy measures it
    metrics |= {f"policy/{name}": value for name, value in update.metrics.items()}
    metrics |= {
        "policy/loss": update.loss,
        "policy/grad_norm": update.grad_norm,
        "policy/lr": update.lr,
    }
    return metrics | _sampler_gap(update, samples, sampled) | staleness(samples, version)


def staleness(samples: Sequence[Sample], version: int) -> dict[str, float]:
    """By how many versions the sampler lagged: mean, max, and the fraction at each lag."""
    if not samples:
        return {}
    lags = version - np.concatenate([s.weight_versions[s.loss_mask] for s in samples])
    metrics = {"staleness/mean": float(lags.mean()), "staleness/max": float(lags.max())}
    for lag, count in sorted(Counter(lags.clip(0, MAX_LAG_SHOWN).tolist()).items()):
        more = "_or_more" if lag == MAX_LAG_SHOWN else ""
        metrics[f"staleness/lag_{lag}{more}"] = count / len(lags)
    return metrics


def _sampler_gap(
    update: Update, samples: Sequence[Sample], sampled_N: NDArray[np.float32]
) -> dict[str, float]:
    """KL(sampler || trainer) at the start of the step by Schulman's k3, and the worst token."""
    trained_N = np.concatenate(
        [logprobs[s.loss_mask] for logprobs, s in zip(update.logprobs, samples, strict=True)]
    )
    gap_N = (trained_N - sampled_N).clip(-20, 20).astype(np.float64)
    return {
        "policy/sampler_kl": float((np.exp(gap_N) - 1 - gap_N).mean()),
        "policy/sampler_gap_max": float(np.abs(gap_N).max()),
    }


def _failures(episodes: Sequence[Episode]) -> dict[str, float]:
    kinds = Counter(e.failure.kind for e in episodes if e.failure)
    metrics = {
        "episodes/total": float(len(episodes)),
        "episodes/failed": float(sum(kinds.values())),
        "episodes/without_calls": float(sum(e.ok and not e.calls for e in episodes)),
        "episodes/retries": float(sum(e.attempts - 1 for e in episodes)),
    }
    return metrics | {f"episodes/failed_{kind}": float(n) for kind, n in kinds.items()}


def _user_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Each metric averaged over the episodes that report it."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for episode in episodes:
        reported: Mapping[str, float] = episode.output.log_metrics if episode.output else {}
        for name, value in reported.items():
            values[name].append(float(value))
    return {f"user/{name}": float(np.mean(v)) for name, v in values.items()}


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        f"{name}/mean": float(np.mean(values)),
        f"{name}/std": float(np.std(values)),
        f"{name}/min": float(np.min(values)),
        f"{name}/max": float(np.max(values)),
    }


def _mean(name: str, values: Iterable[float]) -> dict[str, float]:
    listed = [float(v) for v in values]
    return {name: float(np.mean(listed))} if listed else {}
