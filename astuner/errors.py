"""Every error astuner raises on purpose, in one tree.

    AstunerError
    ├── ConfigError            a key, a value or a file of the configuration
    ├── UserCodeError          a workflow, judge or dataset that cannot be used
    │   ├── LoadingError       "pkg.mod->Name" does not lead to an object
    │   ├── DataError          a dataset is empty, or one of its rows is bad
    │   └── RewardError        a judge or workflow gave something that is no finite reward
    ├── MissingDependency      an optional package is not installed
    ├── ModelError             the model's folder, weights, tokenizer or template
    ├── EngineError            the engine could not answer
    │   ├── ContextLengthError the prompt leaves no room in the model's context
    │   └── EngineClosed       the engine was stopped while the call was waiting
    ├── EnvError               an environment could not be made, or failed
    ├── RequestError           a client's request is wrong (a 4xx of the proxy)
    ├── DeadlineExceeded       something outside did not answer in time
    ├── BackboneError          the trainer that a backbone started has failed
    └── CheckpointError        a checkpoint cannot be written or read

Each message says what was wrong, which value was seen, and what to do. A bad
episode is not an exception: it is an `astuner.types.Failure`.
"""

from __future__ import annotations


class AstunerError(Exception):
    """Base of everything raised on purpose; the CLI prints it without a traceback."""

    exit_code = 1


class ConfigError(AstunerError):
    """A configuration key, value or file is wrong. Nothing has been started yet."""

    exit_code = 2


class UserCodeError(AstunerError):
    """The user's workflow, judge or dataset cannot be used as it is."""

    exit_code = 3


class LoadingError(UserCodeError):
    """A dotted path such as `pkg.mod->Name` does not lead to a usable object."""


class DataError(UserCodeError):
    """A dataset is missing, empty, or has a bad row; names file, line and field."""


class RewardError(UserCodeError, ValueError):
    """A reward is NaN, infinite or no number at all; fails the episode, never the run."""


class MissingDependency(AstunerError):
    """An optional package is missing; the message is the line that installs it."""

    exit_code = 4

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(
            f"{why} needs the package {package!r}, which is not installed. "
            f'Install it with: pip install "astuner[{extra}]"'
        )
        self.package = package
        self.extra = extra


class ModelError(AstunerError):
    """The model's folder, weights, tokenizer or chat template cannot be used."""

    exit_code = 5


class EngineError(AstunerError):
    """The engine failed to answer a call; infrastructure, so worth a retry."""

    exit_code = 6


class ContextLengthError(EngineError):
    """The prompt alone is as long as the model's context, or longer."""

    def __init__(self, prompt_tokens: int, limit: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, but the context limit is {limit} tokens. "
            "Shorten the messages, or raise data.max_prompt_length / rollout.max_model_len."
        )
        self.prompt_tokens = prompt_tokens
        self.limit = limit


class EngineClosed(EngineError):
    """The engine was stopped while a call was still waiting for it."""


class EnvError(AstunerError):
    """An environment could not be made, or failed. `cause` is what it is counted by:

    unavailable (no connection, overloaded), timeout, crashed (its own code raised), gone (the
    service no longer knows the instance), reply (nothing one could read), refused (the request
    was wrong), misuse (a step before reset or after the end). `retriable` is false for the last
    two: trying again would not help.
    """

    exit_code = 9

    def __init__(self, message: str, *, cause: str, traceback: str = "") -> None:
        super().__init__(message)
        self.cause = cause
        self.traceback = traceback
        """Where the environment's own code raised, if it told."""

    @property
    def retriable(self) -> bool:
        return self.cause not in ("refused", "misuse")


class RequestError(AstunerError):
    """A client's request is wrong. `status` and `code` follow OpenAI's error JSON."""

    def __init__(
        self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class DeadlineExceeded(AstunerError):
    """Something outside (engine, environment, judge, user code) did not answer in time."""


class BackboneError(AstunerError):
    """The processes of a distributed backbone failed; names their log and its last lines."""

    exit_code = 8


class CheckpointError(AstunerError):
    """A checkpoint cannot be written (disk full?) or read back."""

    exit_code = 7
