"""The proxy on a socket: uvicorn in a daemon thread of its own, on loopback by default.

`TunerServer` answers with an engine and a codec; `relay.RelayServer` passes on to
another endpoint. Both open sessions, and both are also reached in process through
`app`, for which nothing need be started.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

from starlette.applications import Starlette

from astuner.chat.protocol import ChatCodec
from astuner.engine.protocol import Engine
from astuner.errors import AstunerError, ConfigError, RequestError
from astuner.model_tuner.app import build_app
from astuner.model_tuner.chat_completions import ChatCompletions
from astuner.model_tuner.completions import Completions
from astuner.model_tuner.dialects.counting import Count
from astuner.model_tuner.own_paths import OwnPaths, own_base_url
from astuner.model_tuner.relayed_chat import ByTarget, NoCompletions, relays
from astuner.model_tuner.serving import Serving
from astuner.model_tuner.session import AgentKey, Session, SessionBook, SessionSpec
from astuner.model_tuner.upstream import Upstream

START_SECONDS = 30.0
KEEP_ALIVE_SECONDS = 120
"""Longer than a tool call usually takes, so that agents keep their connection."""


class ProxyServer:
    """Sessions and an app, and the socket they are reached at once `start` was called."""

    def __init__(
        self,
        app: Starlette,
        sessions: SessionBook,
        *,
        model_name: str,
        host: str,
        port: int,
        call_timeout: float,
        max_context: int,
    ) -> None:
        self.app = app
        self.sessions = sessions
        self.model_name = model_name
        self.call_timeout = call_timeout
        self.max_context = max_context
        self._host = host
        self._port = port
        self._listening: _Listening | None = None

    def open_session(self, spec: SessionSpec) -> Session:
        """A new episode's session. Close it, or its keys live as long as the server."""
        return self.sessions.open(spec, self)

    @property
    def base_url(self) -> str:
        """For OpenAI clients, e.g. "http://127.0.0.1:41234/v1"."""
        if self._listening is None:
            raise AstunerError("The proxy is not started: call start() before using its base_url.")
        return self._listening.base_url

    def base_url_of(self, session: Session) -> str:
        """The address that a session's clients are given: one of its own, if it records."""
        return own_base_url(self.base_url, session.place) if session.spec.record else self.base_url

    def start(self) -> Self:
        """Listen. Raises ConfigError when the address cannot be had."""
        if self._listening is None:
            self._listening = _Listening(OwnPaths(self.app), self._host, self._port)
        return self

    def close(self) -> None:
        """End all sessions and stop listening."""
        for session in self.sessions.sessions:
            session.close()
        if self._listening is not None:
            self._listening.stop()
            self._listening = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class TunerServer(ProxyServer):
    """The proxy in front of an engine."""

    def __init__(
        self,
        engine: Engine,
        codec: ChatCodec,
        *,
        model_name: str = "astuner",
        host: str = "127.0.0.1",
        port: int = 0,
        call_timeout: float = 300.0,
        engines: Mapping[str, Engine] | None = None,
        endpoints: Mapping[str, Upstream] | None = None,
    ) -> None:
        """`port` 0 takes a free one; `call_timeout` is in seconds. Calls of the target tags in
        `engines` and `endpoints` are answered by those instead of `engine`; all engines have
        its codec and its longest context."""
        sessions, elsewhere = SessionBook(), endpoints or {}
        serving = Serving(engine, codec, model_name, sessions, call_timeout, engines or {})
        ours = ChatCompletions(serving)
        app = build_app(
            ByTarget(ours, relays(elsewhere, sessions, call_timeout), sessions),
            ByTarget(
                Completions(serving), dict.fromkeys(elsewhere, NoCompletions(sessions)), sessions
            ),
            sessions,
            model_name,
            _count(ours, elsewhere),
        )
        super().__init__(
            app,
            sessions,
            model_name=model_name,
            host=host,
            port=port,
            call_timeout=call_timeout,
            max_context=engine.max_context,
        )


def _count(chat: ChatCompletions, elsewhere: Mapping[str, object]) -> Count:
    def count(agent: AgentKey, data: dict[str, Any]) -> int:
        if agent.target_tag in elsewhere:
            raise RequestError(
                f"Calls of target {agent.target_tag!r} go to an endpoint whose tokens cannot be "
                "counted here.",
                status=404,
                code="not_found",
            )
        return chat.count(agent, data)

    return count


class _Listening:
    """A running uvicorn."""

    def __init__(self, app: OwnPaths, host: str, port: int) -> None:
        import uvicorn

        bound = _bind(host, port)
        # A server bound to every interface is reached at loopback from here.
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        bracketed = f"[{name}]" if ":" in name else name
        self.base_url = f"http://{bracketed}:{bound.getsockname()[1]}/v1"
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([bound],), name="astuner-proxy", daemon=True
        )
        self._thread.start()
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise AstunerError(f"The proxy did not start listening at {self.base_url}.")
            time.sleep(0.005)

    def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=5.0)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio does not switch Nagle's algorithm off, which makes every
    # answer wait 40 ms for the client's acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _not_to_be_had(host, port, error) from error
    return bound


def _not_to_be_had(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"model_tuner.port: {host}:{port} is already in use by another program. "
            "Stop that program, choose another port, or set model_tuner.port=0 for a free one."
        )
    return ConfigError(
        f"model_tuner.host: cannot listen at {host}:{port} ({error.strerror or error}). "
        "Set model_tuner.host=127.0.0.1 and model_tuner.port=0."
    )
