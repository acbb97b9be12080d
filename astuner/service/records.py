"""What the service remembers about sessions, runs, checkpoints, samplers and futures.

Frozen dataclasses and their JSON, one store table for each. No behaviour: who may see
what, and what happens when, is decided by the modules that hold these records.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from astuner.engine.protocol import LoraSpec
from astuner.service.names import CheckpointPath, Kind
from astuner.service.store.protocol import Row

R = TypeVar("R")
Category = Literal["user", "server"]
"""Who is to blame for a failed request, as the SDK reports it."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """One `ServiceClient` of one tenant."""

    session_id: str
    tenant: str
    created_at: float
    """Unix seconds, like all times here."""
    sdk_version: str = ""
    display_name: str | None = None
    tags: tuple[str, ...] = ()
    user_metadata: dict[str, Any] | None = None
    ended: str = ""
    """Why it is over; empty while it lives."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides whether a checkpoint fits into an adapter."""

    rank: int
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = False

    def lora(self, alpha: float) -> LoraSpec:
        """The adapter the engine is to make."""
        parts = {"attn": self.train_attn, "mlp": self.train_mlp, "unembed": self.train_unembed}
        return LoraSpec(self.rank, alpha, tuple(part for part, on in parts.items() if on))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One adapter being trained ("model" in the protocol)."""

    run_id: str
    session_id: str
    tenant: str
    base_model: str
    shape: Shape
    seed: int
    created_at: float
    last_request_at: float
    user_metadata: dict[str, Any] | None = None
    next_seq: int = 1
    """The first operation that is not answered yet."""
    last_state: str = ""
    """Path of the state that the adapter was last saved to, or made from."""
    last_save: str = ""
    """Which save under that path it was."""
    last_state_optimizer: bool = True
    """Whether the optimizer's moments came from there, or went there, too."""
    changed: bool = False
    """Whether steps were taken since `last_state` (or since it was made)."""
    gradient: bool = False
    """Whether it has a gradient that no step has applied yet; no checkpoint holds that."""
    steps: int = 0
    """Optimizer steps taken."""

    @property
    def has_gone_on(self) -> bool:
        """Whether it has anything that is not in `last_state`."""
        return self.changed or self.gradient


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A folder of weights. Its name may be saved again, its folder is never written again."""

    run_id: str
    kind: Kind
    name: str
    save: str
    """Of this save under the name; part of the folder's name."""
    tenant: str
    base_model: str
    shape: Shape
    created_at: float
    size_bytes: int
    expires_at: float | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None

    @property
    def path(self) -> CheckpointPath:
        return CheckpointPath(self.run_id, self.kind, self.name)

    @property
    def weights(self) -> str:
        """Key of the weights in `snapshots.SnapshotShelf`; another one once overwritten."""
        return f"{self.path}@{self.save}"


@dataclass(frozen=True, slots=True)
class SamplerRecord:
    """One sampling session: the base model, a checkpoint, or weights kept only for it."""

    sampler_id: str
    session_id: str
    tenant: str
    base_model: str
    created_at: float
    model_path: str | None = None
    weights: str = ""
    """Key of the weights in `snapshots.SnapshotShelf`; empty for the base model."""
    run_id: str = ""
    """The run that made the weights; empty for the base model."""


@dataclass(frozen=True, slots=True)
class FutureRecord:
    """A request that is answered later. Its result is in a table of its own."""

    request_id: str
    tenant: str
    session_id: str
    owner: str
    """The run or sampler it belongs to."""
    kind: str
    digest: str
    """Of what was asked, to tell a repeated request from another one of the same number."""
    created_at: float
    status: Literal["pending", "done", "failed", "lost"] = "pending"
    """"lost": a server that was stopped did not get to it, and it may be sent again."""
    answered_at: float = 0.0
    content_type: str = ""
    error: str = ""
    category: Category = "server"


TABLES: dict[type, str] = {
    SessionRecord: "sessions",
    RunRecord: "runs",
    CheckpointRecord: "checkpoints",
    SamplerRecord: "samplers",
    FutureRecord: "futures",
}
RESULTS = "results"


def key_of(record: Any) -> str:
    """The record's key in its table."""
    match record:
        case SessionRecord():
            return record.session_id
        case RunRecord():
            return record.run_id
        case CheckpointRecord():
            return str(record.path)
        case SamplerRecord():
            return record.sampler_id
        case FutureRecord():
            return record.request_id
        case _:
            raise TypeError(f"{type(record).__name__} is no record")


def row(record: Any) -> Row:
    """The record as a store keeps it."""
    kind = type(record)
    return Row(TABLES[kind], key_of(record), _adapter(kind).dump_json(record))


def parse(kind: type[R], value: bytes) -> R:
    """The inverse of `row`."""
    return _adapter(kind).validate_json(value)


@cache
def _adapter(kind: type[R]) -> TypeAdapter[R]:
    return TypeAdapter(kind)
