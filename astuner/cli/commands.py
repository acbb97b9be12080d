"""What the `astuner` commands do, once their arguments are parsed.

Each takes the parsed arguments and returns the exit code; errors are raised and
turned into exit codes by the caller.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from astuner.config.load import LoadedConfig, check_complete, load_config
from astuner.errors import ConfigError, DataError

INTERRUPTED = 130


def tune(args: argparse.Namespace) -> int:
    """Run a configuration to its end."""
    _log_to_console()
    loaded = _load(args)
    from astuner.launcher import launch

    return INTERRUPTED if launch(loaded, resume=args.resume).stopped else 0


def explain(args: argparse.Namespace) -> int:
    """Print every key with its value, origin and meaning for the backbone. What would keep
    the run from starting is printed too, and makes the exit code that of ConfigError."""
    from astuner.backbone.translation import translation_of
    from astuner.config.explain import explain as rows_of

    loaded = _load(args)
    backbone = loaded.config.backbone
    told = translation_of(loaded.config, backbone)
    rows = rows_of(loaded, backbone, told.becomes)
    rows = [row for row in rows if not (args.set_only and row.origin == "default")]
    width = max((len(row.key) for row in rows), default=0)
    console = Console()
    console.print(Text(f"backbone {backbone}: key = value  [origin] what becomes of it", "bold"))
    if told.machine:
        console.print(Text(told.machine), soft_wrap=True)
    for row in rows:
        line = Text.assemble(f"{row.key:<{width}} = ", (repr(row.value), "cyan"))
        line.append(f"  [{row.origin}] {row.becomes}", "dim")
        console.print(line, style="" if row.used else "dim", soft_wrap=True)
    if told.always and not args.set_only:
        console.print(Text(f"set for {backbone} in any case", "bold"))
        for key, value in told.always.items():
            console.print(Text.assemble(f"{key} = ", (repr(value), "cyan")), soft_wrap=True)
    for note in told.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    for problem in told.problems:
        print(f"astuner: {problem}", file=sys.stderr)
    return ConfigError.exit_code if told.problems else 0


def evaluate(args: argparse.Namespace) -> int:
    """Score the held-out tasks and print the score."""
    _log_to_console()
    loaded = _load(args)
    from astuner.backbone.context import RunContext
    from astuner.backbone.local import evaluate as evaluate_local
    from astuner.backbone.report import checkpoint_of
    from astuner.env import environment_service
    from astuner.launcher import in_own_thread

    adapter = checkpoint_of(Path(args.adapter)) if args.adapter else None
    check_complete(loaded)
    context = RunContext(loaded, Path(loaded.config.experiment_dir))
    with environment_service(loaded.config):
        result = in_own_thread(lambda: evaluate_local(context, adapter))
    which = str(adapter) if adapter else f"{loaded.config.model.path} without an adapter"
    if not result.num:
        raise DataError("There are no validation tasks to score. See `astuner.task_reader`.")
    Console().print(
        f"{which}: held-out score [bold]{result.score:.3f}[/] (mean of {result.num} episodes)",
        soft_wrap=True,
    )
    return 0


def chat(args: argparse.Namespace) -> int:
    """A conversation with the model of a run, or one question."""
    from astuner.job import TunedModel

    model = TunedModel.load(args.run_dir, target=args.target or "")
    if args.message is not None:
        print(model.chat(args.message))
        return 0
    print(f"Talking to {model.path}. An empty line or Ctrl-D ends.")
    messages: list[dict[str, str]] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        reply = model.chat(messages)
        messages.append({"role": "assistant", "content": reply})
        print(reply)
    return 0


def serve(args: argparse.Namespace) -> int:
    """Run the fine-tuning service until it is told to stop."""
    _log_to_console()
    from astuner.config.service import load_service_config

    overrides = [*([f"model.path={args.model}"] if args.model else []), *args.overrides]
    config = load_service_config(args.conf, overrides)
    from astuner.service.serve import serve as run

    run(config, lambda line: print(line, flush=True))
    return 0


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _load(args: argparse.Namespace) -> LoadedConfig:
    overrides = list(args.overrides)
    if args.ray_address is not None:
        overrides.append(f"trainer_common.ray_address={args.ray_address}")
    return load_config(args.conf, overrides, backbone=args.backbone, experiment_dir=args.exp_dir)


def _log_to_console() -> None:
    """Warnings of ours, readable; other libraries stay quiet unless it is serious."""
    handler = RichHandler(show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
