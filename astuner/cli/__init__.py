"""The `astuner` command: parses arguments, calls one function, maps errors to exit codes.

Nothing heavy is imported until a command runs, so that `--help` answers at
once. Exit codes: 0 done, 1 unexpected, 2 configuration, 3 the user's code or
data, 4 a missing package, 5 the model, 6 the engine, 7 a checkpoint or a full disk,
8 a distributed backbone's processes, 9 an environment, 130 interrupted (what was finished is
saved).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

EPILOG = """\
key=value arguments override the configuration, e.g. rollout.num_repeat=16

other commands:
  astuner explain --conf FILE [--backbone B]    every key: value, origin, meaning for the backbone
  astuner eval --conf FILE [--adapter DIR]      score the held-out tasks, with or without an adapter
  astuner chat RUN_DIR                          talk to the model of a finished run
  astuner serve [--conf FILE | --model NAME]    a fine-tuning service that many share (Tinker API)
  astuner env serve NAME [--port P]             an environment as an HTTP service
  astuner env list                              the environments there are
  astuner doctor                                what this machine has and which backbones can run

exit codes: 0 done, 2 configuration, 3 your workflow, judge or data, 4 missing package, 5 model,
6 engine, 7 checkpoint or full disk, 8 a distributed backbone's processes, 9 environment,
130 interrupted (go on with --resume)
"""

SERVE_EPILOG = """\
It listens on this machine only (host, port: 127.0.0.1, 8765), makes a key on its first start,
keeps records and checkpoints in ./service-data, and prints how to connect. Ctrl-C stops it.

  astuner serve --model smollm2-135m
  astuner serve --model Qwen/Qwen2.5-0.5B-Instruct port=9000 data_dir=/srv/tuning
  astuner serve --conf service.yaml             keys of several tenants, limits, Redis, telemetry

docs/service.md is for who runs it, docs/service_users.md for its users, and
docs/service_config.md has every key.
"""


def _parser(
    command: str, description: str, *, epilog: str | None = None
) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"astuner {command}".strip(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conf", metavar="FILE", required=True, help="the YAML configuration")
    parser.add_argument(
        "--backbone", metavar="B", help="local (default), debug, verl, trinity, tinker"
    )
    parser.add_argument("--exp-dir", metavar="D", help="where run folders go (default: runs)")
    parser.add_argument(
        "--ray-address",
        metavar="A",
        help="a running Ray cluster for verl, e.g. auto or 10.0.0.1:6379 (default: start one)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")


def _tune(argv: Sequence[str]) -> int:
    parser = _parser("", "Tune the model behind an agent workflow.", epilog=EPILOG)
    _add_config(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last completed step")
    args = parser.parse_intermixed_args(argv)
    from astuner.cli.commands import tune

    return tune(args)


def _explain(argv: Sequence[str]) -> int:
    parser = _parser("explain", "Print every key, its value, its origin and what becomes of it.")
    _add_config(parser)
    parser.add_argument(
        "--set-only", action="store_true", help="only keys that differ from default"
    )
    args = parser.parse_intermixed_args(argv)
    from astuner.cli.commands import explain

    return explain(args)


def _eval(argv: Sequence[str]) -> int:
    parser = _parser("eval", "Score the held-out tasks.")
    _add_config(parser)
    parser.add_argument("--adapter", metavar="DIR", help="a run folder or checkpoint to evaluate")
    args = parser.parse_intermixed_args(argv)
    from astuner.cli.commands import evaluate

    return evaluate(args)


def _chat(argv: Sequence[str]) -> int:
    parser = _parser("chat", "Talk to the model of a finished run.")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--message", metavar="TEXT", help="ask one thing, print the reply and leave"
    )
    parser.add_argument(
        "--target", metavar="TAG", help="whose adapter, where the targets have their own"
    )
    args = parser.parse_args(argv)
    from astuner.cli.commands import chat

    return chat(args)


def _doctor(argv: Sequence[str]) -> int:
    _parser("doctor", "What this machine has, and which backbones can run here.").parse_args(argv)
    from astuner.cli.doctor import doctor

    return doctor()


def _serve(argv: Sequence[str]) -> int:
    about = "Share one model: many fine-tune it and sample from it at once, over the Tinker API."
    parser = _parser("serve", about, epilog=SERVE_EPILOG)
    parser.add_argument("--conf", metavar="FILE", help="the service's YAML configuration")
    parser.add_argument(
        "--model", metavar="NAME", help="the base model: a folder, a hub name or smollm2-135m"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")
    args = parser.parse_intermixed_args(argv)
    from astuner.cli.commands import serve

    return serve(args)


def _env(argv: Sequence[str]) -> int:
    parser = _parser("env", "The worlds that agents act in.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve|list")
    serve = commands.add_parser("serve", help="offer environments over HTTP")
    serve.add_argument("names", nargs="+", metavar="NAME", help="as `astuner env list` shows them")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8080, help="default 8080; 0 takes a free one")
    serve.add_argument("--max-instances", type=int, default=1024)
    serve.add_argument("--create-timeout", type=float, default=60.0, metavar="SECONDS")
    serve.add_argument("--step-timeout", type=float, default=60.0, metavar="SECONDS")
    serve.add_argument(
        "--with-parent", action="store_true", help="end when the standard input is closed"
    )
    commands.add_parser("list", help="show the environments there are")
    args = parser.parse_args(argv)
    from astuner.cli.environments import list_environments, serve_environments

    return serve_environments(args) if args.command == "serve" else list_environments()


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "explain": _explain,
    "eval": _eval,
    "chat": _chat,
    "serve": _serve,
    "env": _env,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(arguments[0]) if arguments else None
    if not arguments:
        arguments = ["--help"]
    from astuner.errors import AstunerError

    try:
        return command(arguments[1:]) if command else _tune(arguments)
    except AstunerError as error:
        print(f"astuner: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def script() -> None:
    """What the installed `astuner` command runs."""
    sys.exit(main())
