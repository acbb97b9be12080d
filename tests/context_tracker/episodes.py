"""Calls for tests: literal ones, and random call trees as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from astuner.types import Call, FinishReason, token_ids


def call(
    number: int,
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    agent: str = "default",
    target: str = "default",
    parent: int | None = None,
    started_at: float | None = None,
    finish: FinishReason = "stop",
    versions: Sequence[int] | None = None,
) -> Call:
    """Token t of call n has logprob -(n + t / 100) and weight version n, if no `versions` are
    given, so that any misplaced number shows."""
    n = len(completion)
    return Call(
        call_id=f"c{number}",
        episode_id="e",
        agent_name=agent,
        target_tag=target,
        prompt_ids=token_ids(prompt),
        completion_ids=token_ids(completion),
        logprobs=np.float32([-(number + t / 100) for t in range(n)]),
        weight_versions=token_ids([number] * n if versions is None else versions),
        finish_reason=finish,
        request={},
        response={},
        started_at=float(number if started_at is None else started_at),
        ended_at=float(number) + 0.5,
        parent_id=None if parent is None else f"c{parent}",
    )


@dataclass
class Tree:
    """Grows an episode as a client would make it."""

    calls: list[Call] = field(default_factory=list[Call])

    def grow(self, draw: st.DrawFn) -> None:
        earlier = draw(st.sampled_from(self.calls)) if self.calls else None
        kind = draw(st.sampled_from(["turn", "turn", "retry", "edit", "root"]))
        some = st.lists(st.integers(0, 3), max_size=3)
        if earlier is None or kind == "root":
            prompt = [draw(st.integers(0, 1)), *draw(some)]
        elif kind == "retry":
            prompt = earlier.prompt_ids.tolist()
        else:
            prompt = [*earlier.prompt_ids.tolist(), *earlier.completion_ids.tolist(), *draw(some)]
            if kind == "edit":
                prompt[draw(st.integers(0, len(prompt) - 1))] = 7
        completion = draw(some)
        # Weights may be updated within a call.
        versions = [draw(st.integers(0, 1)) for _ in completion]
        # Sometimes the recorded parent is missing, sometimes it is plainly wrong.
        parent = draw(st.sampled_from([None, *range(len(self.calls))]))
        self.calls.append(
            call(
                len(self.calls),
                prompt,
                completion,
                agent=draw(st.sampled_from(["a", "a", "b"])),
                target=draw(st.sampled_from(["x", "x", "y"])),
                parent=parent,
                finish=draw(st.sampled_from(["stop", "length"])),
                versions=versions,
            )
        )


@st.composite
def episodes(draw: st.DrawFn) -> list[Call]:
    """Forks, retries, parallel calls, truncated replies, edited histories, several agents;
    few distinct tokens, so that unrelated calls share prefixes by chance."""
    tree = Tree()
    for _ in range(draw(st.integers(1, 9))):
        tree.grow(draw)
    return draw(st.permutations(tree.calls))
