"""An environment of an OpenEnv server, through its WebSocket (`/ws`).

`params["url"]` names the server; every instance is a connection, which is a session with an
environment of its own there. What a model writes becomes the action's field
`params["action"]` (default "message"), unless it is a JSON object already; the observation's
field `params["observation"]` is shown, or all of it as JSON. This is the protocol of
openenv-core 0.3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from astuner.env.protocol import Action, Info, Observation, action_text
from astuner.errors import EnvError, MissingDependency

MAX_MESSAGE = 64 * 2**20
"""Bytes of one answer."""


class OpenEnv:
    """One session."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        """Raises EnvError when there is no connection."""
        if not params.get("url"):
            raise EnvError("env.params.url must name the OpenEnv server.", cause="refused")
        self._url = websocket_url(str(params["url"]))
        self._field = str(params.get("action", "message"))
        self._shown = str(params.get("observation", ""))
        self._timeout = float(params.get("timeout", 60.0))
        self._options = dict(params.get("reset") or {})
        self._score = 0.0
        self._session = ExitStack()
        self._socket: Any = self._connect()

    def reset(self, *, seed: int | None = None) -> tuple[Observation, Info]:
        data = self._options if seed is None else {**self._options, "seed": seed}
        self._score = 0.0
        reply = self._ask("reset", data)
        return self._observation(reply), {"observation": reply["observation"]}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, Info]:
        reply = self._ask("step", self._action(action))
        reward = float(reply.get("reward") or 0.0)
        self._score += reward
        shown, raw = self._observation(reply), reply["observation"]
        return shown, reward, bool(reply.get("done")), False, {"observation": raw}

    def evaluate(self) -> float:
        return self._score

    def get_info(self) -> Any:
        """The environment's state, e.g. episode_id and step_count."""
        return self._ask("state", None)

    def close(self) -> None:
        self._session.close()

    def _action(self, action: Action) -> dict[str, Any]:
        if isinstance(action, Mapping) and "role" not in action:
            return dict(action)
        text = action_text(action)
        try:
            given = json.loads(text)
        except ValueError:
            given = None
        return given if isinstance(given, dict) else {self._field: text}

    def _observation(self, reply: Mapping[str, Any]) -> str:
        observation = reply["observation"]
        if self._shown:
            observation = observation.get(self._shown)
        return observation if isinstance(observation, str) else json.dumps(observation)

    def _connect(self) -> Any:
        try:
            from websockets.exceptions import InvalidHandshake, InvalidURI
            from websockets.sync.client import connect
        except ImportError:
            raise MissingDependency("websockets", "env", "The environment openenv") from None
        try:
            session = connect(self._url, open_timeout=self._timeout, max_size=MAX_MESSAGE)
            return self._session.enter_context(session)
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
            raise EnvError(
                f"No connection to the OpenEnv server at {self._url}: {error}. Is it running?",
                cause="unavailable",
            ) from None

    def _ask(self, kind: str, data: dict[str, Any] | None) -> dict[str, Any]:
        from websockets.exceptions import ConnectionClosed

        try:
            message = {"type": kind} if data is None else {"type": kind, "data": data}
            self._socket.send(json.dumps(message))
            reply: dict[str, Any] = json.loads(self._socket.recv(timeout=self._timeout))
        except TimeoutError:
            raise EnvError(
                f"The OpenEnv server did not answer {kind} within {self._timeout:g} s.",
                cause="timeout",
            ) from None
        except ConnectionClosed as error:
            raise EnvError(f"The OpenEnv server ended the session: {error}", cause="gone") from None
        except ValueError as error:
            raise EnvError(
                f"The OpenEnv server did not answer JSON: {error}", cause="reply"
            ) from None
        return _data(reply, kind)


def make(task_id: str, params: dict[str, Any]) -> OpenEnv:
    """One session with the server at `params["url"]`."""
    return OpenEnv(params)


def websocket_url(url: str) -> str:
    """ "http://host:8000" as "ws://host:8000/ws"."""
    scheme, _, rest = url.rstrip("/").rpartition("://")
    return f"{'wss' if scheme in ('https', 'wss') else 'ws'}://{rest.removesuffix('/ws')}/ws"


def _data(reply: dict[str, Any], kind: str) -> dict[str, Any]:
    data = reply.get("data") or {}
    if reply.get("type") == "error":
        code = data.get("code", "UNKNOWN")
        told = f"The OpenEnv server refused {kind}: {data.get('message')} ({code})"
        if code == "VALIDATION_ERROR":
            raise EnvError(told, cause="refused")
        raise EnvError(told, cause="unavailable" if code == "CAPACITY_REACHED" else "crashed")
    if kind != "state" and "observation" not in data:
        raise EnvError(f"The OpenEnv server answered {kind} with {reply!r:.200}", cause="reply")
    return dict(data)
