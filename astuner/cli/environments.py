"""`astuner env serve` and `astuner env list`.

Takes parsed arguments and returns the exit code. The service itself is `astuner.env.server`;
here it gets a socket, says where it listens (one line of JSON), and ends with a signal or,
if asked to, with the process that started it.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading

import uvicorn

from astuner.env.registry import described, environment_folders, find_environment
from astuner.env.server import EnvService, env_app
from astuner.errors import ConfigError, MissingDependency

KEEP_ALIVE_SECONDS = 75
"""More than clients keep an idle connection (httpx: 5 s), or a request meets its closing."""


def serve_environments(args: argparse.Namespace) -> int:
    """Serve until told to stop. Raises ConfigError for an unknown name or a taken port."""
    service = EnvService(
        {name: find_environment(name) for name in args.names},
        create_timeout=args.create_timeout,
        step_timeout=args.step_timeout,
        max_instances=args.max_instances,
    )
    _allow_connections()
    with listening(args.host, args.port) as listener:
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            env_app(service),
            log_level="warning",
            timeout_graceful_shutdown=3,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            access_log=False,
        )
        server = uvicorn.Server(config)
        if args.with_parent:
            threading.Thread(target=_end_with_input, args=(server,), daemon=True).start()
        url = f"http://{host}:{port}"
        print(json.dumps({"url": url, "environments": args.names}), flush=True)
        print(f"serving {', '.join(args.names)} at {url}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    return 0


def list_environments() -> int:
    """Print what `env.type`, `env.service` and `astuner env serve` accept."""
    folders = environment_folders()
    width = max((len(name) for name in folders), default=0)
    print("folders of envs/:")
    for name, folder in sorted(folders.items()):
        print(f"  {name:<{width}}  {described(folder)}")
    print("classes: package.module->Class or path/to/file.py->Class")
    try:
        from astuner.env.gymnasium_text import gymnasium_ids

        ids = gymnasium_ids()
        print(f"gymnasium: {len(ids)} ids, e.g. {', '.join(_well_known(ids))}")
    except MissingDependency as error:
        print(f"gymnasium: {error}")
    return 0


def _well_known(ids: list[str]) -> list[str]:
    known = ("FrozenLake", "Taxi", "Blackjack", "CliffWalking", "CartPole")
    return [name for name in ids if name.startswith(known)]


def listening(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError for an address that cannot be had."""
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"The environment service cannot listen on {host}:{port}: {error}. Choose another "
            "--port, or 0 for a free one."
        ) from None
    # Connections inherit it. asyncio sets it only where the socket names its protocol, and
    # without it an answer of two packets waits 40 ms for the first one's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _allow_connections() -> None:
    """One for each instance: as many open files as the system lets us have."""
    if sys.platform != "win32":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_with_input(server: uvicorn.Server) -> None:
    sys.stdin.read()  # until whoever started us closes it or dies
    server.should_exit = True
