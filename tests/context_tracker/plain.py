"""`build_samples` as one would write it without a thought for time or memory: token by token.

What the tracker makes must equal this, whatever the episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from astuner.types import Call, MaskReason

Kept = tuple[int, bool, float, int, int]
"""Token id, trained, logprob, weight version, turn."""


@dataclass
class Token:
    token_id: int
    fate: str = "context"
    logprob: float = 0.0
    version: int = -1
    turn: int = -1


@dataclass
class Plain:
    agent: tuple[str, str]
    tokens: list[Token]
    end: int
    """The call it ends with."""
    opening: int
    """The call at the root of its tree."""

    def kept(self, limit: int | None) -> list[Kept]:
        return [
            (t.token_id, t.fate == "trained", t.logprob, t.version, t.turn)
            for t in self.tokens[:limit]
        ]

    def masked(self, limit: int | None) -> dict[MaskReason, int]:
        keep = len(self.tokens) if limit is None else limit
        reasons = [t.fate for t in self.tokens[:keep]] + ["too_long"] * len(self.tokens[keep:])
        return {r: reasons.count(r) for r in MaskReason if r in reasons}


def plain_samples(
    calls: Sequence[Call],
    *,
    targets: frozenset[str] | None,
    max_prompt: int | None,
    merge: str,
) -> list[Plain]:
    """The timelines, uncut, in order of their first call."""
    ordered = sorted(calls, key=lambda c: c.started_at)
    timelines: list[Plain] = []
    home: list[Plain] = []
    for i, call in enumerate(ordered):
        parent, agent = parent_of(ordered, i), (call.agent_name, call.target_tag)
        timeline = None if parent is None else home[parent]
        if timeline is None or parent is None:
            timeline = Plain(agent, [], i, i)
            timelines.append(timeline)
        elif merge == "none" or timeline.end != parent or timeline.agent != agent:
            shared = timeline.tokens[: len(ids_of(ordered[parent]))]
            timeline = Plain(agent, [elsewhere(t) for t in shared], i, timeline.opening)
            timelines.append(timeline)
        timeline.end = i
        home.append(timeline)
        new = ids_of(call)[len(timeline.tokens) : len(call.prompt_ids)]
        timeline.tokens += [Token(token_id) for token_id in new]
        fate = fate_of(ordered, timeline, targets, max_prompt)
        for t in range(len(call.completion_ids)):
            timeline.tokens.append(
                Token(
                    int(call.completion_ids[t]),
                    "context" if fate == "trained" and not timeline.tokens else fate,
                    float(call.logprobs[t]),
                    int(call.weight_versions[t]),
                    i,
                )
            )
    return timelines


def ids_of(call: Call) -> list[int]:
    return [*call.prompt_ids.tolist(), *call.completion_ids.tolist()]


def parent_of(ordered: Sequence[Call], i: int) -> int | None:
    """The recorded one, else the agent's previous one, else the longest and latest."""
    prompt, call = ordered[i].prompt_ids.tolist(), ordered[i]
    able = [j for j in range(i) if prompt[: len(ids_of(ordered[j]))] == ids_of(ordered[j])]
    same = (call.agent_name, call.target_tag)
    previous = [j for j in range(i) if (ordered[j].agent_name, ordered[j].target_tag) == same][-1:]
    for j in able:
        if ordered[j].call_id == call.parent_id:
            return j
    if previous and previous[0] in able:
        return previous[0]
    some = [j for j in able if ids_of(ordered[j])]
    return max(some, key=lambda j: (len(ids_of(ordered[j])), j), default=None)


def elsewhere(token: Token) -> Token:
    fate = "trained_elsewhere" if token.fate == "trained" else token.fate
    return Token(token.token_id, fate, token.logprob, token.version, token.turn)


def fate_of(
    ordered: Sequence[Call], timeline: Plain, targets: frozenset[str] | None, limit: int | None
) -> str:
    if targets is not None and timeline.agent[1] not in targets:
        return "not_a_target"
    root = ordered[timeline.opening]
    firsts = {(c.agent_name, c.target_tag): c for c in reversed(ordered)}
    is_first = firsts[root.agent_name, root.target_tag] is root
    long = limit is not None and len(root.prompt_ids) > limit
    return "too_long" if is_first and long else "trained"
