"""Sessions: whose key it is, what may be sampled with it, and what was recorded.

One session is one episode. It mints a key for each agent and target, seeds and
numbers their calls, keeps the answered ones, and forgets everything still in the
air when it closes. It is called from the server's thread and from the episode's;
one lock guards it. It neither samples nor speaks HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Literal

from astuner.chat.history import History
from astuner.errors import RequestError
from astuner.model_tuner.attempts import Attempts
from astuner.types import Call, FailureKind, TokenIds

if TYPE_CHECKING:
    from astuner.model_tuner.server import ProxyServer
    from astuner.model_tuner.tuner import ModelTuner

MAX_PROBLEMS = 100
"""A workflow that swallows errors in a loop must not fill the memory."""
KEY_PREFIX = "sk-astuner-"
REMEMBERED_KEYS = 10_000
"""Dead keys that still get an answer naming their episode."""


@dataclass(frozen=True, slots=True)
class SessionSampling:
    """How this session's replies are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    """Tokens one call may sample when the request names no limit, and at most."""
    override: bool = True
    """Use these instead of what the client asks for (counted as `overridden_sampling`):
    what is trained must be what the run says. False: only where the client is silent."""


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What the runner decides about one episode's calls."""

    episode_id: str
    seed: int = 0
    sampling: SessionSampling = SessionSampling()
    max_prompt_tokens: int | None = None
    """Longest first prompt of an agent, in tokens."""
    max_total_tokens: int | None = None
    """Longest prompt + reply of any call, in tokens."""
    max_calls_per_agent: int = 0
    """0 means no limit."""
    trainable_targets: frozenset[str] | None = None
    """None means all."""
    untrained_targets: frozenset[str] = frozenset()
    """Not trained whatever `trainable_targets` says."""
    record: bool = True
    """False only answers, e.g. to serve a tuned model for days: no calls are kept, and
    replies are drawn with fresh seeds."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error that a client was told, and may have swallowed."""

    kind: FailureKind
    """ENGINE and TIMEOUT: infrastructure. WORKFLOW: the request was at fault."""
    code: str
    status: int
    message: str
    agent_name: str
    target_tag: str
    at: float = 0.0
    """When, as `time.time()`; the session sets it."""


@dataclass(eq=False, slots=True)
class AgentKey:
    """One (session, agent, target): what an API key stands for."""

    session: Session
    agent_name: str
    target_tag: str
    api_key: str
    history: History = field(default_factory=History)
    attempts: Attempts = field(default_factory=Attempts)
    calls_recorded: int = 0


class Flight:
    """One call in the air, which the session or the client's leaving may stop.

    Made in the task that answers the call; `stop` may be called from any thread.
    """

    def __init__(self) -> None:
        self.reason: Literal["ended", "disconnected"] | None = None
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._landed = False

    def stop(self, reason: Literal["ended", "disconnected"]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._cancel, reason)
        except RuntimeError:  # its loop is closed: nothing is in the air any more
            return

    def land(self) -> None:
        self._landed = True

    def _cancel(self, reason: Literal["ended", "disconnected"]) -> None:
        if not self._landed and self.reason is None and self._task is not None:
            self.reason = reason
            self._task.cancel()


class Session:
    """One episode's keys, calls, limits and counters. Made by `open_session`."""

    def __init__(self, spec: SessionSpec, server: ProxyServer, place: int = 0) -> None:
        """`place` is its number among the server's sessions."""
        self.spec = spec
        self.server = server
        self.place = place
        self._lock = threading.Lock()
        self._agents: dict[tuple[str, str], AgentKey] = {}
        self._admitted: Counter[str] = Counter()
        self._counters: Counter[str] = Counter()
        self._calls: list[tuple[int, Call]] = []
        self._numbers = itertools.count()
        self._occurrences: dict[bytes, _Occurrences] = {}
        self._flights: set[Flight] = set()
        self._problems: list[Problem] = []
        self._closed = False

    # ------------------------------------------------------------ for the runner

    @property
    def tuner(self) -> ModelTuner:
        """What the workflow gets."""
        from astuner.model_tuner.tuner import ModelTuner

        return ModelTuner(self)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The answered calls so far, in order of their start."""
        with self._lock:
            return tuple(call for _, call in sorted(self._calls, key=lambda pair: pair[0]))

    @property
    def counters(self) -> Mapping[str, int]:
        """`calls`, `overridden_sampling`, `tool_choice_unmet`, `refused`, `engine_errors`,
        `disconnected`, `ended_in_flight`, `answered_again`; only those that happened."""
        with self._lock:
            return dict(self._counters)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Errors that clients were told, oldest first (the last 100)."""
        with self._lock:
            return tuple(self._problems)

    @property
    def in_flight(self) -> int:
        """Calls being answered now."""
        with self._lock:
            return len(self._flights)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> tuple[Call, ...]:
        """End the episode: its keys die, calls in the air are cancelled and not recorded."""
        with self._lock:
            self._closed = True
            flights = tuple(self._flights)
            keys = [agent.api_key for agent in self._agents.values()]
        self.server.sessions.forget(self, keys)
        for flight in flights:
            flight.stop("ended")
        return self.calls

    # ------------------------------------------------------------ for the endpoints

    def agent(self, agent_name: str, target_tag: str) -> AgentKey:
        """The key of this agent and target; the same arguments give the same key.

        Raises RequestError when the episode has ended."""
        with self._lock:
            self._check_open()
            agent = self._agents.get((agent_name, target_tag))
            if agent is None:
                key = f"{KEY_PREFIX}{secrets.token_urlsafe(24)}"
                agent = AgentKey(self, agent_name, target_tag, key)
                self._agents[agent_name, target_tag] = agent
                self.server.sessions.remember(agent)
            return agent

    def take_off(self, agent: AgentKey) -> Flight:
        """A call of this agent begins. Raises RequestError when it may not."""
        limit = self.spec.max_calls_per_agent
        with self._lock:
            self._check_open()
            if limit and self._admitted[agent.agent_name] >= limit:
                raise _too_many_calls(agent, limit)
            self._admitted[agent.agent_name] += 1
            flight = Flight()
            self._flights.add(flight)
            return flight

    def land(self, agent: AgentKey, flight: Flight, *, answered: bool) -> None:
        """The call is over. One that was not answered does not count against the limit."""
        flight.land()
        with self._lock:
            self._flights.discard(flight)
            if not answered:
                self._admitted[agent.agent_name] -= 1

    def number(self) -> int:
        """The next call's number in the episode."""
        return next(self._numbers)

    def occurrence(self, prompt: bytes) -> int:
        """How often the prompt of this digest has been, or is being, answered: the
        smallest free number."""
        if not self.spec.record:
            return 0
        with self._lock:
            return self._occurrences.setdefault(prompt, _Occurrences()).take()

    def release(self, prompt: bytes, occurrence: int) -> None:
        """This occurrence was not answered: a retry gets the same number, so the same seed."""
        with self._lock:
            if prompt in self._occurrences:
                heappush(self._occurrences[prompt].released, occurrence)

    def record(self, agent: AgentKey, calls: Sequence[tuple[int, Call]]) -> None:
        """Keep answered calls. Raises RequestError when the episode has ended meanwhile."""
        with self._lock:
            self._check_open()
            self._counters["calls"] += len(calls)
            if self.spec.record:
                self._calls.extend(calls)
                agent.calls_recorded += len(calls)

    def count(self, name: str) -> None:
        with self._lock:
            self._counters[name] += 1

    def note(self, problem: Problem) -> None:
        """Remember an error the client is told."""
        infrastructure = problem.kind in (FailureKind.ENGINE, FailureKind.TIMEOUT)
        with self._lock:
            self._counters["engine_errors" if infrastructure else "refused"] += 1
            self._problems.append(replace(problem, at=time.time()))
            del self._problems[:-MAX_PROBLEMS]

    def _check_open(self) -> None:
        if self._closed:
            raise episode_ended(self.spec.episode_id)


class SessionBook:
    """Which key belongs to whom, for all open sessions of a server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agents: dict[str, AgentKey] = {}
        self._dead: OrderedDict[str, str] = OrderedDict()
        self._open: dict[int, Session] = {}
        self._places = itertools.count(1)

    def open(self, spec: SessionSpec, server: ProxyServer) -> Session:
        session = Session(spec, server, next(self._places))
        with self._lock:
            self._open[id(session)] = session
        return session

    def remember(self, agent: AgentKey) -> None:
        with self._lock:
            self._agents[agent.api_key] = agent

    def forget(self, session: Session, keys: Sequence[str]) -> None:
        """The session is over; its keys still name its episode when somebody uses them."""
        with self._lock:
            self._open.pop(id(session), None)
            for key in keys:
                self._agents.pop(key, None)
                self._dead[key] = session.spec.episode_id
            while len(self._dead) > REMEMBERED_KEYS:
                self._dead.popitem(last=False)

    def find(self, api_key: str | None) -> AgentKey:
        """Whose key this is. Raises RequestError (401)."""
        agent = self._agents.get(api_key or "")
        if agent is not None:
            return agent
        with self._lock:
            episode_id = self._dead.get(api_key or "")
        if episode_id is not None:
            raise episode_ended(episode_id)
        raise RequestError(_unknown_key(api_key), status=401, code="invalid_api_key")

    @property
    def sessions(self) -> tuple[Session, ...]:
        """The open ones."""
        with self._lock:
            return tuple(self._open.values())


@dataclass(slots=True)
class _Occurrences:
    """Hands out 0, 1, 2, ... and what was given back."""

    next: int = 0
    released: list[int] = field(default_factory=list[int])

    def take(self) -> int:
        if self.released:
            return heappop(self.released)
        self.next += 1
        return self.next - 1


def prompt_digest(prompt_ids: TokenIds) -> bytes:
    """Tells prompts apart."""
    return blake2b(prompt_ids.tobytes(), digest_size=16).digest()


def call_seed(session_seed: int, prompt: bytes, occurrence: int) -> int:
    """A seed in [0, 2**63) from the session's seed, the prompt's digest and how often it
    came: the order in which parallel calls arrive does not matter."""
    text = f"{session_seed}:{occurrence}:".encode() + prompt
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1


def episode_ended(episode_id: str) -> RequestError:
    return RequestError(
        f"Episode {episode_id} has ended, and its API key with it. A call made after "
        "`execute` returned (a forgotten background task?) cannot be answered.",
        status=401,
        code="episode_ended",
    )


def _too_many_calls(agent: AgentKey, limit: int) -> RequestError:
    # Not a 429: every SDK would wait and ask again, and the answer will not change.
    return RequestError(
        f"Agent {agent.agent_name!r} has made its {limit} calls of episode "
        f"{agent.session.spec.episode_id}. Raise rollout.multi_turn.max_steps, or let the "
        "workflow stop earlier.",
        status=403,
        code="max_calls_exceeded",
    )


def _unknown_key(api_key: str | None) -> str:
    way_out = "Use `.base_url` and `.api_key` of tuner.as_oai_baseurl_apikey(...)."
    if not api_key:
        return f"No API key in the request (`Authorization: Bearer` or `x-api-key`). {way_out}"
    return f"Incorrect API key: {api_key[:14]}... belongs to no episode of this run. {way_out}"
