"""A workflow of a real framework over the proxy, with a scripted model, as an Episode.

The codec writes bytes, so the lengths in the tests can be counted by hand: a reply of n
characters is n + 1 sampled tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from astuner import ModelTuner, Task, Workflow, WorkflowOutput, WorkflowTask
from astuner.chat.byte_codec import ByteCodec, ids
from astuner.chat.protocol import ParsedReply, Tool
from astuner.engine.fake import FakeEngine
from astuner.engine.protocol import SamplingParams, TokenChunk
from astuner.errors import ContextLengthError
from astuner.model_tuner import SessionSampling, TunerServer
from astuner.task_runner.runner import EpisodeRunner, RunnerSettings
from astuner.types import Episode, MaskReason, TokenIds, token_ids
from tutorial.frameworks.sums import graded

QUESTION = "What is 17 + 25, and what is 12 * 12?"
TASK = Task(task_id="t", main_query=QUESTION, metadata={"answer": "42 and 144"})


def call(name: str, **arguments: Any) -> str:
    """A tool call as the scripted model writes it."""
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{text}</tool_call>"


BOTH = "Both at once." + call("add", a=17, b=25) + call("multiply", a=12, b=12)
DONE = "42 and 144."
SOLVED = (BOTH, DONE)
"""Two tools in parallel, then the answer."""


class Codec(ByteCodec):
    """With tool-call ids that differ from turn to turn, as those of the real codecs do."""

    def parse(
        self, completion_ids: TokenIds, prompt_ids: TokenIds, tools: Sequence[Tool] = ()
    ) -> ParsedReply:
        parsed = super().parse(completion_ids, prompt_ids, tools)
        seed = hashlib.blake2b(prompt_ids.tobytes() + completion_ids.tobytes()).hexdigest()
        calls = tuple(
            {**found, "id": f"call{i}{seed[:8]}"} for i, found in enumerate(parsed.tool_calls)
        )
        return replace(parsed, tool_calls=calls)


class StuckOnce(FakeEngine):
    """The first call never gets a token; who asks again is answered."""

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        if not self.prompts:
            self.prompts.append(tuple(prompt_ids))
            self.params.append(params)
            await asyncio.sleep(3600)
        async for chunk in super().stream(prompt_ids, params):
            yield chunk


class FullOnce(FakeEngine):
    """The second prompt is too long."""

    async def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk, None]:
        if len(self.prompts) == 1 and self.max_context > 100_000:
            self.max_context = 100_000
            raise ContextLengthError(len(prompt_ids), self.max_context)
        async for chunk in super().stream(prompt_ids, params):
            yield chunk


class Line(NamedTuple):
    """What became of a timeline's tokens."""

    agent: str
    calls: int
    """How many calls sampled some of them."""
    trained: int
    context: int
    elsewhere: int = 0
    not_a_target: int = 0


@dataclass(frozen=True)
class Ran:
    """One episode, and what the proxy counted."""

    episode: Episode
    engine: FakeEngine
    counters: dict[str, int]

    @property
    def answer(self) -> str:
        assert self.episode.failure is None, self.episode.failure
        assert self.episode.output is not None
        return str(self.episode.output.metadata["final_answer"])

    @property
    def lines(self) -> list[Line]:
        """The timelines, in order of their first call."""
        return [
            Line(
                sample.agent_name,
                len({int(t) for t in sample.turns if t >= 0}),
                sample.num_trained,
                sample.masked.get(MaskReason.CONTEXT, 0),
                sample.masked.get(MaskReason.TRAINED_ELSEWHERE, 0),
                sample.masked.get(MaskReason.NOT_A_TARGET, 0),
            )
            for sample in self.episode.samples
        ]

    @property
    def reasons(self) -> list[str | None]:
        """Of each call: why it began a timeline, or None where it goes on with one."""
        return [c.new_timeline_reason for c in self.episode.calls]

    @property
    def prompts(self) -> list[str]:
        """Of each call, with ⟦ and ⟧ for the ends of turns."""
        return [text_of(c.prompt_ids) for c in self.episode.calls]


def text_of(tokens: TokenIds) -> str:
    marked = ByteCodec().decode(tokens, skip_special=False)
    return marked.replace("<|im_start|>", "⟦").replace("<|im_end|>", "⟧")


Execute = Callable[[WorkflowTask, ModelTuner], Awaitable[Any]]


def workflow(execute: Execute, targets: Sequence[str] | None = None) -> type[Workflow]:
    """A Workflow whose `execute` is this function; what it returns is the answer."""

    class OfFunction(Workflow):
        trainable_targets: list[str] | None = None if targets is None else list(targets)

        async def execute(self, workflow_task: WorkflowTask, tuner: ModelTuner) -> WorkflowOutput:
            return graded(await execute(workflow_task, tuner), workflow_task)

    return OfFunction


async def run(
    what: type[Workflow],
    *replies: str,
    engine: type[FakeEngine] = FakeEngine,
) -> Ran:
    """One episode over a real socket, with these replies one after the other. Every sampled
    token must be trained in one timeline at most."""
    fake = engine([ids(f"{reply}⟧") for reply in replies], max_context=200_000)
    with served(what, fake) as runner:
        episode = await play(runner, "e")
        return Ran(episode, fake, dict(runner.counters))


async def run_many(what: type[Workflow], first: str, last: str) -> list[Ran]:
    """Two episodes one after the other and then four at once: what a framework keeps from
    one episode to the next must not disturb it. The tools' results are answered with `last`."""

    def answer(prompt: Sequence[int]) -> list[int]:
        solved = "⟧\n⟦tool\n" in text_of(token_ids(prompt)) or "Observation:\n42" in text_of(
            token_ids(prompt)
        )
        return ids(f"{last if solved else first}⟧")

    fake = FakeEngine(answer, max_context=200_000)
    with served(what, fake) as runner:
        episodes = [await play(runner, f"e{n}") for n in range(2)]
        episodes += await asyncio.gather(*(play(runner, f"e{n}") for n in range(2, 6)))
        return [Ran(episode, fake, dict(runner.counters)) for episode in episodes]


@contextmanager
def served(what: type[Workflow], engine: FakeEngine) -> Generator[EpisodeRunner]:
    with TunerServer(engine, Codec(), call_timeout=60.0) as server:
        runner = EpisodeRunner(what, None, server, RunnerSettings(episode_timeout=100.0))
        yield runner
        runner.close()


async def play(runner: EpisodeRunner, episode_id: str) -> Episode:
    task = WorkflowTask(task=TASK, task_id="t", episode_id=episode_id)
    sampling = SessionSampling(max_tokens=2000)
    episode = await runner.run(task, group_id="g", seed=1, sampling=sampling)
    trained = sum(s.num_trained for s in episode.samples)
    assert trained <= sum(len(c.completion_ids) for c in episode.calls)
    return episode


def sampled(*replies: str) -> int:
    """Tokens of these replies."""
    return sum(len(ids(f"{reply}⟧")) for reply in replies)
