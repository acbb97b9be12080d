"""How much one tenant, one run and one request may take.

Plain numbers with the defaults of a server on one machine; the configuration fills them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    max_sessions: int = 100
    """Living sessions of one tenant."""
    max_runs: int = 64
    """Adapters of one tenant in the engine at a time."""
    max_rank: int = 256
    max_adapter_bytes: int = 0
    """Of one tenant's adapters in the engine, with their optimizers; 0 means no limit."""
    max_waiting_operations: int = 1000
    """Of one run; more are refused for now (429)."""
    max_waiting_run_bytes: int = 256 * 2**20
    """Of the data of one run's operations that wait; more is refused for now (429)."""
    max_waiting_bytes: int = 2**30
    """The same of all runs; and of request bodies that are being read or answered, of which one
    tenant may have half."""
    max_waiting_samples: int = 4096
    """Sequences of one tenant that wait to be drawn; more are refused for now (429)."""
    max_samples: int = 1024
    """Sequences of one request."""
    max_running_samples: int = 128
    """Sequences of all tenants that are drawn at a time."""
    max_snapshots: int = 64
    """Sampling weights that the engine holds; others wait on disk."""
    max_run_samplers: int = 8
    """Sets of sampling weights without a checkpoint that one run keeps; the samplers of those
    used longest ago are closed."""
    max_request_bytes: int = 64 * 2**20
    max_checkpoint_bytes: int = 0
    """Of one tenant's checkpoints; 0 means no limit."""
    operation_timeout: float = 3600.0
    """Seconds that the engine may have one operation or sample request in hand; then it is
    failed, and named in the log."""
    stuck_timeout: float = 600.0
    """Seconds that the engine may be at one and the same thing; then everything is failed."""
    session_timeout: float = 600.0
    """Seconds without a heartbeat after which a session is over."""
    gap_timeout: float = 60.0
    """Seconds that operations wait for one that is missing before them."""
    poll_seconds: float = 30.0
    """How long an answer to "is it done?" may take; the SDK gives up at 45."""
    result_ttl: float = 3600.0
    """Seconds that an answer can be fetched."""
