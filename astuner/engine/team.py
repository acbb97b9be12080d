"""Several adapters over one base, trained as one `Policy` and sampled side by side.

A `Team` lays the training loop's verbs over an `AdapterHost`: each sample trains the
adapter of its target tag, each publish freezes a snapshot of every adapter, and each tag
is played by a snapshot, by an older one, or by the base. Versions count publishes, as
everywhere; old snapshots are kept as long as somebody plays them. Computes nothing.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from astuner.engine.protocol import (
    AdamParams,
    AdapterHost,
    ForwardBackwardResult,
    HostStats,
    LoraSpec,
    LossSpec,
    SamplingParams,
    TokenChunk,
)
from astuner.errors import CheckpointError, EngineError
from astuner.types import Sample

SHARED = ""
"""The member that trains every tag without an adapter of its own."""
BASE = ""
"""The host's name of the base without an adapter."""
STATE = "team.json"
TARGETS, PAST = "targets", "past"
"""Folders of a checkpoint: adapters of single tags, and weights that opponents play."""
COUNTS = ("packed_tokens", "sample_tokens", "trained_tokens", "micro_batches")


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter that is trained."""

    tag: str
    """Of the samples that train it; SHARED for all that have no member."""
    lora: LoraSpec
    seed: int = 0
    rate: float = 1.0
    """Its learning rate, as a multiple of the step's."""

    @property
    def name(self) -> str:
        """In metrics."""
        return self.tag or "shared"

    @property
    def adapter(self) -> str:
        """At the host."""
        return f"target {self.tag}"

    def folder(self, checkpoint: Path) -> Path:
        return checkpoint / TARGETS / self.tag if self.tag else checkpoint


@dataclass(frozen=True, slots=True)
class Seat:
    """Whose weights answer a tag."""

    of: str | None = SHARED
    """A member's tag; None is the base."""
    back: int = 0
    """How many publishes ago; before the first one it is the start."""


class Host(AdapterHost, Protocol):
    def close(self) -> None: ...


class Team:
    """The adapters of one run. May be used from any thread and loop, as its host."""

    def __init__(self, host: Host, members: Sequence[Member], seats: Mapping[str, Seat]) -> None:
        """Use `Team.open`. `seats` are the tags that are not simply played by the newest
        weights of their member; a seat's member must exist."""
        self._host = host
        self._members = {m.tag: m for m in members}
        self._seats = {m.tag: Seat(m.tag) for m in members if m.tag} | dict(seats)
        self._default = Seat(SHARED if SHARED in self._members else None)
        self.max_context = host.max_context
        self.version = 0
        self.players: Mapping[str, Player] = {
            tag: Player(self, seat, host.max_context) for tag, seat in self._seats.items()
        }
        """Who answers the tags that are named; all others are answered by the team itself."""
        self._lock = threading.Lock()
        self._kept: dict[str, dict[int, str]] = {tag: {} for tag in self._members}
        """Member -> version -> snapshot."""
        self._streams: Counter[str] = Counter()
        self._retired: list[str] = []
        self._trained: set[str] = set()
        """Members that have taken a step."""

    @classmethod
    async def open(cls, host: Host, members: Sequence[Member], seats: Mapping[str, Seat]) -> Team:
        """Make the adapters. Raises ModelError when one does not fit the base."""
        team = cls(host, members, seats)
        for member in members:
            await host.create(member.adapter, member.lora, seed=member.seed)
        await team._freeze(0)
        return team

    # ------------------------------------------------------------ about

    @property
    def tokenizer(self) -> Any:
        return self._host.tokenizer

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def stats(self) -> HostStats:
        return self._host.stats()

    def close(self) -> None:
        self._host.close()

    # ------------------------------------------------------------ Engine

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk]:
        """See `Engine.stream`; for a tag that is not named."""
        return self.play(self._default, prompt_ids, params)

    async def play(
        self, seat: Seat, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk]:
        """Answer as this seat; a stream goes on under the weights it began with."""
        with self._held(seat) as (weights, version):
            stream: Any = self._host.stream(prompt_ids, params, weights=weights)
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield replace(chunk, weight_version=version)

    @contextmanager
    def _held(self, seat: Seat) -> Generator[tuple[str, int]]:
        """The seat's weights and their version; they are not released meanwhile."""
        with self._lock:
            version, weights = 0, BASE
            if seat.of is not None:
                kept = self._kept[seat.of]
                # A resumed run that now wants older weights than it kept gets the oldest.
                version = min(v for v in kept if v >= max(0, self.version - seat.back))
                weights = kept[version]
            self._streams[weights] += 1
        try:
            yield weights, version
        finally:
            with self._lock:
                self._streams[weights] -= 1

    # ------------------------------------------------------------ Policy

    async def forward(
        self, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[NDArray[np.float32], ...]:
        """See `Policy.forward`."""
        logprobs: dict[int, NDArray[np.float32]] = {}
        for member, indices in self._split(samples):
            own = [samples[i] for i in indices]
            found = await self._host.forward(member.adapter, own, temperature=temperature)
            logprobs |= dict(zip(indices, found, strict=True))
        return tuple(logprobs[i] for i in range(len(samples)))

    async def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        """See `Policy.forward_backward`: each member on its own samples. The loss is the sum;
        with several members the metrics are also told for each, as NAME/..."""
        logprobs: dict[int, NDArray[np.float32]] = {}
        results: dict[str, ForwardBackwardResult] = {}
        for member, indices in self._split(samples):
            own = [samples[i] for i in indices]
            result = await self._host.forward_backward(member.adapter, own, loss)
            results[member.name] = result
            logprobs |= dict(zip(indices, result.logprobs, strict=True))
        metrics = _together([r.metrics for r in results.values()])
        if len(self._members) > 1:
            for name, result in results.items():
                metrics |= {f"{name}/{k}": v for k, v in result.metrics.items()}
                metrics[f"{name}/loss"] = result.loss
        return ForwardBackwardResult(
            sum(r.loss for r in results.values()),
            tuple(logprobs[i] for i in range(len(samples))),
            metrics,
        )

    async def optim_step(self, params: AdamParams) -> dict[str, float]:
        """See `Policy.optim_step`: each member that has a gradient, by its own optimizer and at
        its own rate; `grad_norm` is that of all gradients together."""
        told: dict[str, float] = {}
        norms: list[float] = []
        skipped = 1.0
        for member in self.members:
            own = params if member.rate == 1.0 else replace(params, lr=params.lr * member.rate)
            step = await self._host.optim_step(member.adapter, own)
            if step["skipped"]:
                continue
            skipped = 0.0
            self._trained.add(member.tag)
            norms.append(step["grad_norm"])
            if len(self._members) > 1:
                told |= {f"{member.name}/{k}": step[k] for k in ("grad_norm", "lr")}
        norm = norms[0] if len(norms) == 1 else float(np.linalg.norm(norms))
        return {"grad_norm": norm, "lr": params.lr, "skipped": skipped} | told

    async def publish(self) -> int:
        """See `Policy.publish`. Running streams end under the weights they began with."""
        await self._freeze(self.version + 1)
        return self.version

    async def save(self, path: Path, *, optimizer: bool) -> None:
        """See `Policy.save`: the shared adapter in `path` itself, others in targets/TAG, and in
        past/ the weights that opponents play. Raises CheckpointError."""
        for member in self.members:
            await self._host.export(member.adapter, member.folder(path), optimizer=optimizer)
        past: dict[str, list[int]] = {}
        for tag, kept in self._kept.items():
            past[tag] = sorted(version for version in kept if version < self.version)
            for version in past[tag]:
                await self._host.export(kept[version], _past_folder(path, tag, version))
        state = {"version": self.version, "trained": sorted(self._trained), "past": past}
        try:
            (path / STATE).write_text(json.dumps(state))
        except OSError as error:
            raise CheckpointError(f"{path / STATE} could not be written: {error}.") from error

    async def load(self, path: Path, *, optimizer: bool) -> int:
        """See `Policy.load`; publishes. Past weights come back too. Raises CheckpointError."""
        state = _read_state(path)
        for member in self.members:
            await self._host.restore(member.adapter, member.folder(path), optimizer=optimizer)
        past: dict[str, dict[int, str]] = {}
        for tag in self._members:
            past[tag] = {
                version: await self._host.open_snapshot(_past_folder(path, tag, version))
                for version in state["past"].get(tag, ())
            }
        with self._lock:
            self._retired += [s for kept in self._kept.values() for s in kept.values()]
            self._kept = past
        self._trained = set(state["trained"])
        await self._freeze(int(state["version"]))
        return self.version

    # ------------------------------------------------------------ inside

    async def _freeze(self, version: int) -> None:
        """From now on this is the newest version, made of the adapters as they are now."""
        latest = {m.tag: await self._host.snapshot(m.adapter) for m in self.members}
        with self._lock:
            self.version = version
            for tag, snapshot in latest.items():
                kept = self._kept[tag]
                kept[version] = snapshot
                for old in [v for v in kept if v < version - self._furthest_back(tag)]:
                    self._retired.append(kept.pop(old))
        await self._release()

    def _furthest_back(self, tag: str) -> int:
        return max((s.back for s in self._seats.values() if s.of == tag), default=0)

    async def _release(self) -> None:
        """Give back what nobody plays any more; what still streams has its turn next time."""
        with self._lock:
            idle = [s for s in self._retired if not self._streams[s]]
            self._retired = [s for s in self._retired if self._streams[s]]
        for snapshot in idle:
            await self._host.release(snapshot)

    def _split(self, samples: Sequence[Sample]) -> Iterable[tuple[Member, list[int]]]:
        """Each member with the places of its samples."""
        places: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            tag = sample.target_tag if sample.target_tag in self._members else SHARED
            if tag not in self._members:
                raise EngineError(
                    f"Sample {sample.sample_id!r} is of target {sample.target_tag!r}, for which "
                    f"there is no adapter to train; there are {sorted(self._members)}."
                )
            places.setdefault(tag, []).append(i)
        return [(self._members[tag], indices) for tag, indices in places.items()]


@dataclass(slots=True)
class Player:
    """The `Engine` of one seat."""

    team: Team
    seat: Seat
    max_context: int

    def stream(
        self, prompt_ids: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[TokenChunk]:
        """See `Engine.stream`."""
        return self.team.play(self.seat, prompt_ids, params)


def _together(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counts are summed; all else is averaged over trained tokens."""
    if len(parts) == 1:
        return dict(parts[0])
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        there = [part for part in parts if name in part]
        values = [part[name] for part in there]
        if name in COUNTS:
            merged[name] = float(sum(values))
        else:
            tokens = [part["trained_tokens"] for part in there]
            merged[name] = float(np.average(values, weights=tokens))
    return merged


def _past_folder(path: Path, tag: str, version: int) -> Path:
    return path / PAST / (tag or "_shared") / f"{version:06d}"


def trained_members(path: Path) -> tuple[str, ...]:
    """Of a checkpoint, the tags whose adapter has learnt something, SHARED among them; of any
    other folder SHARED alone. Raises CheckpointError."""
    return tuple(_read_state(path)["trained"]) if (path / STATE).exists() else (SHARED,)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        return {
            "version": int(state["version"]),
            "trained": list(state["trained"]),
            "past": dict(state["past"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} was not written by a run with model.targets: {STATE} cannot be read "
            f"({error}). Use the run's own configuration."
        ) from error
