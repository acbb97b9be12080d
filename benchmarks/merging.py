"""What merging shared history saves: tokens trained and seconds an update.

    python benchmarks/merging.py [--workflows chat forked] [--turns 2 5 15 50] [--write]

Compares, for one task's group of 4 episodes, three ways of training on the same calls:
"each call" is a sample of its own, as without merging; "prefix" is the samples that the
context tracker merges, none sharing anything with another; "tree" is these samples as the
trainer takes them, every shared prefix computed once, also between the group's episodes.
All go through the real tracker and the embedded model's own forward_backward, packed
without padding (for the first two, every sample's first token is made another one, so that
there is nothing to share): without padding-free packing the left column would be slower
still. The workflows: a chat (40 tokens of prompt, then 12 sampled and 8 given a turn);
tool use (150 of schemas, 10 sampled and 20 of results a turn); three agents who speak in
turns, each with a history of its own; and a chat in which every turn is sampled twice and
one of the two continued ("forked").

Where one way has more than `--at-most` tokens, evenly chosen samples of about so many are
timed and their time is multiplied; such seconds are marked with ~. Token counts are exact.
Where all three take less than 15 s they take turns three times, and seconds are medians.

Does not show: the time of sampling, which merging leaves as it is; what merging does to
what is learnt (nothing: the trained tokens and their contexts are the same); other models,
where attention over long histories weighs more and merging saves more.
"""

from __future__ import annotations

import astuner  # noqa: F401 - first: it tells OpenMP not to spin, which torch reads when loaded

# isort: split
import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from record import Report

from astuner.algorithm import find_kl, find_loss
from astuner.context_tracker import build_samples
from astuner.engine.embedded.model import EmbeddedModel
from astuner.engine.embedded.weights import LoraSpec
from astuner.engine.model_source import resolve_model
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.types import Call, Sample, TokenIds

EPISODES = 4
TABLE = "Tokens and seconds"
SHORT = 15.0
"""Seconds; what takes less is measured three times."""
Ids = list[int]


# ---------------------------------------------------------------- workflows


@dataclass
class Recorder:
    """Grows one episode's calls. The task's own tokens are the same in all its episodes."""

    episode: int
    calls: list[Call] = field(default_factory=list[Call])

    def __post_init__(self) -> None:
        self._task = np.random.default_rng(0)
        self._own = np.random.default_rng(self.episode + 1)

    def given(self, tokens: int) -> Ids:
        """A prompt of the task."""
        return self._task.integers(100, 20_000, tokens).tolist()

    def new(self, tokens: int) -> Ids:
        """What only this episode has."""
        return self._own.integers(100, 20_000, tokens).tolist()

    def call(self, prompt: Ids, sampled: int, agent: str = "a", parent: int | None = None) -> Ids:
        """Record one; prompt and completion together."""
        number, completion = len(self.calls), self.new(sampled)
        self.calls.append(
            Call(
                call_id=f"{self.episode}.{number}",
                episode_id=str(self.episode),
                agent_name=agent,
                target_tag="default",
                prompt_ids=np.array(prompt, np.int32),
                completion_ids=np.array(completion, np.int32),
                logprobs=np.full(sampled, -5.0, np.float32),
                weight_versions=np.zeros(sampled, np.int32),
                finish_reason="stop",
                request={},
                response={},
                started_at=float(number),
                ended_at=float(number) + 0.5,
                parent_id=None if parent is None else f"{self.episode}.{parent}",
            )
        )
        return prompt + completion


def chat(record: Recorder, turns: int) -> None:
    history = record.given(40)
    for turn in range(turns):
        history = record.call(history, 12, parent=turn - 1 if turn else None) + record.new(8)


def tools(record: Recorder, turns: int) -> None:
    history = record.given(150)
    for turn in range(turns):
        history = record.call(history, 10, parent=turn - 1 if turn else None) + record.new(20)


def agents(record: Recorder, turns: int) -> None:
    """Each hears what the other two said since its own last turn."""
    task = record.given(30)
    histories = {name: record.given(40) + task for name in ("planner", "worker", "critic")}
    for turn in range(turns):
        speaker = list(histories)[turn % len(histories)]
        before = histories[speaker]
        said = record.call(before, 12, speaker)
        for name in histories:
            histories[name] = said if name == speaker else histories[name] + said[len(before) :]


def forked(record: Recorder, turns: int) -> None:
    history, parent = record.given(40), None
    for turn in range(turns):
        record.call(history, 12, parent=parent)
        continued = record.call(history, 12, parent=parent)
        history, parent = continued + record.new(8), 2 * turn + 1


WORKFLOWS: dict[str, Callable[[Recorder, int], None]] = {
    "chat": chat,
    "tool use": tools,
    "multi-agent": agents,
    "forked": forked,
}


# ---------------------------------------------------------------- samples


def group(workflow: Callable[[Recorder, int], None], turns: int, merge: str) -> list[Sample]:
    samples: list[Sample] = []
    for number in range(EPISODES):
        episode = Recorder(number)
        workflow(episode, turns)
        samples += build_samples(
            episode.calls,
            group_id="g",
            task_id="t",
            reward=0.0,
            trainable_targets=None,
            max_prompt_tokens=None,
            max_total_tokens=None,
            merge=merge,
        )
    total = sum(s.num_trained for s in samples)
    return [
        replace(
            sample,
            advantages=np.full(len(sample.token_ids), np.sin(i + 1), np.float32),
            weights=np.full(len(sample.token_ids), 1 / total, np.float32),
        )
        for i, sample in enumerate(samples)
    ]


def apart(samples: Sequence[Sample]) -> list[Sample]:
    """The same work with nothing in common: another first token each."""
    return [
        replace(s, token_ids=np.concatenate([[20_000 + i], s.token_ids[1:]]).astype(np.int32))
        for i, s in enumerate(samples)
    ]


def tokens(samples: Sequence[Sample]) -> int:
    return sum(len(s.token_ids) for s in samples)


def some(samples: Sequence[Sample], at_most: int) -> list[Sample]:
    """Evenly chosen by length, of about so many tokens."""
    whole: TokenIds = np.cumsum([len(s.token_ids) for s in samples])
    if whole[-1] <= at_most:
        return list(samples)
    ordered = sorted(samples, key=lambda s: len(s.token_ids))
    count = max(1, round(len(samples) * at_most / whole[-1]))
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]


# ---------------------------------------------------------------- measuring


async def update(model: EmbeddedModel, samples: Sequence[Sample]) -> tuple[float, int]:
    """Seconds of forward, backward and optimizer step; tokens that were computed."""
    begun = time.perf_counter()
    result = await model.forward_backward(samples, LossSpec("ppo"))
    await model.optim_step(AdamParams(lr=1e-6))
    return time.perf_counter() - begun, int(result.metrics["packed_tokens"])


async def measure(model: EmbeddedModel, name: str, turns: int, at_most: int) -> dict[str, object]:
    calls = apart(group(WORKFLOWS[name], turns, "none"))
    merged = group(WORKFLOWS[name], turns, "prefix")
    row: dict[str, object] = {"workflow": name, "turns": turns}
    ways = {"each call": calls, "prefix": apart(merged), "tree": merged}
    timed = {way: s if way == "tree" else some(s, at_most) for way, s in ways.items()}
    rounds = [{way: await update(model, samples) for way, samples in timed.items()}]
    if sum(taken for taken, _ in rounds[0].values()) < SHORT:
        for _ in range(2):
            rounds.append({way: await update(model, samples) for way, samples in timed.items()})
    seconds: dict[str, float] = {}
    for way, samples in ways.items():
        scale = tokens(samples) / tokens(timed[way])
        seconds[way] = median(found[way][0] for found in rounds) * scale
        row[f"{way}: tokens"] = rounds[0][way][1] if way == "tree" else tokens(samples)
        row[f"{way}: s"] = f"{'~' if scale > 1 else ''}{seconds[way]:.2f}"
    row["prefix: times faster"] = seconds["each call"] / seconds["prefix"]
    row["tree: times faster"] = seconds["each call"] / seconds["tree"]
    return row


def plot(rows: Sequence[dict[str, object]]) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for color, name in enumerate(dict.fromkeys(str(r["workflow"]) for r in rows)):
        of = [r for r in rows if r["workflow"] == name]
        for way, style in (("tree", "-o"), ("prefix", "--x")):
            values = [float(str(r[f"{way}: times faster"])) for r in of]
            turns = [int(str(r["turns"])) for r in of]
            axes.plot(turns, values, style, color=f"C{color}", label=f"{name}, {way}")
    axes.set(xscale="log", yscale="log", xlabel="turns", ylabel="times faster than each call alone")
    every = sorted({int(str(r["turns"])) for r in rows})
    axes.set_xticks(every, map(str, every))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


async def run(args: argparse.Namespace, report: Report) -> None:
    model = EmbeddedModel.open(
        resolve_model(args.model),
        lora=LoraSpec(),
        micro_batch_tokens=4096,
        losses=find_loss,
        kls=find_kl,
    )
    await update(model, group(chat, 2, "prefix"))  # warm up
    for turns in args.turns:
        for name in args.workflows:
            report.row(TABLE, await measure(model, name, turns, args.at_most))  # type: ignore[arg-type]
            report.plot(TABLE, plot(report.rows(TABLE)))  # type: ignore[arg-type]
    model.close()
    gains = [float(str(r["tree: times faster"])) for r in report.rows(TABLE)]
    report.figure(TABLE, "an update by tree against each call alone, least", min(gains))
    report.figure(TABLE, "an update by tree against each call alone, most", max(gains))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--workflows", nargs="+", choices=WORKFLOWS, default=[*WORKFLOWS])
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 5, 15, 50])
    parser.add_argument("--at-most", type=int, default=2500)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    asyncio.run(run(args, Report("merging", __doc__, write=args.write)))


if __name__ == "__main__":
    main()
