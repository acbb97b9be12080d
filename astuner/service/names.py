"""Identifiers of the service, and how text from outside becomes one.

Sessions, runs and samplers are named by us; checkpoints by users, under a strict
pattern. Everything that will become part of a file path passes through here, and
nothing that does not match is ever joined to one.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from astuner.errors import RequestError

SCHEME = "tinker://"
Kind = Literal["weights", "sampler_weights"]
"""Of a checkpoint: a state to train on from, or weights that only sample."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN = re.compile(r"[0-9a-f]{32}:train:[0-9]{1,9}")
_KINDS: dict[str, Kind] = {"weights": "weights", "sampler_weights": "sampler_weights"}


def new_session_id() -> str:
    """32 hexadecimal digits that nobody can guess."""
    return uuid.uuid4().hex


def run_id(session_id: str, number: int) -> str:
    """The SDK computes this id too when it creates a run from a checkpoint."""
    return f"{session_id}:train:{number}"


def sampler_id(session_id: str, number: int) -> str:
    return f"{session_id}:sample:{number}"


def new_save_id() -> str:
    """Tells one save under a name from the next."""
    return uuid.uuid4().hex


def request_id(owner: str, number: int) -> str:
    """The same request sent twice gets the same id."""
    return f"{owner}:{number}"


def check_name(name: str) -> str:
    """`name` itself. Raises RequestError (400) when it may not name a checkpoint."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name[:140]!r} cannot name a checkpoint: use letters, digits, '.', '_' and '-', "
            "at most 128 of them, the first a letter or digit (no slashes).",
            code="invalid_name",
            param="path",
        )
    return name


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """tinker://RUN/weights/NAME, in its three parts; all of them checked."""

    run_id: str
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """As the REST API names it within its run: "weights/NAME"."""
        return f"{self.kind}/{self.name}"

    def folder(self, root: Path, save: str) -> Path:
        """Where the files of one save under this name are, below `root`."""
        return root / self.run_id.replace(":", "_") / self.kind / f"{self.name}@{save}"


def checkpoint_path(run: str, kind: str, name: str) -> CheckpointPath:
    """From parts that came from outside. Raises RequestError (400)."""
    if not _RUN.fullmatch(run) or kind not in _KINDS:
        raise _not_a_path(f"{SCHEME}{run}/{kind}/{name}")
    return CheckpointPath(run, _KINDS[kind], check_name(name))


def parse_path(text: str) -> CheckpointPath:
    """From "tinker://RUN/weights/NAME". Raises RequestError (400)."""
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) != 3:
        raise _not_a_path(text)
    return checkpoint_path(*parts)


def _not_a_path(text: str) -> RequestError:
    return RequestError(
        f"{text[:300]!r} is no checkpoint path of this service. They look like "
        "tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME, as `save_state` and "
        "`save_weights_for_sampler` return them.",
        code="invalid_path",
        param="path",
    )
