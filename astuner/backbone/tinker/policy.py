"""A training run of a service as a Policy.

Samples go out as datums, see `datums`; gradients are those of our own losses, see
`gradients`. A checkpoint is a state that the service keeps; on our side it is one small
file that names it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astuner.backbone.report import SERVICE_STATE as STATE_FILE
from astuner.backbone.tinker.connection import Connection, Refused
from astuner.backbone.tinker.datums import datums, logprobs_of, result_of
from astuner.backbone.tinker.engine import TinkerEngine
from astuner.backbone.tinker.gradients import Remote, remote_loss
from astuner.backbone.tinker.loss_here import Taken, check_ready, take_loss
from astuner.engine.embedded.losses import KlFn
from astuner.engine.protocol import AdamParams, ForwardBackwardResult, LossFn, LossSpec
from astuner.errors import AstunerError, CheckpointError, EngineError
from astuner.types import Sample

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
NOT_THERE = ("not offered", "not supported", "unsupported", "unknown", "not implemented")
"""What services say of a loss that they lack."""


@dataclass(frozen=True)
class Adapter:
    """What is asked for."""

    base_model: str
    rank: int
    seed: int
    parts: Mapping[str, bool]
    """train_attn, train_mlp, train_unembed."""


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint folder says."""

    path: str
    """tinker://RUN/weights/NAME"""
    base_url: str
    base_model: str
    version: int

    @classmethod
    def read(cls, folder: Path) -> SavedState:
        """Raises CheckpointError."""
        try:
            return cls(**json.loads((folder / STATE_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder} is no checkpoint of the tinker backbone: {STATE_FILE} cannot be read "
                f"({error}). Resume with the backbone that wrote it, or start without --resume."
            ) from error


class TinkerPolicy:
    """A `Policy`. One caller at a time."""

    def __init__(
        self,
        connection: Connection,
        engine: TinkerEngine,
        adapter: Adapter,
        *,
        losses: Callable[[str], LossFn],
        kls: Callable[[str], KlFn],
        in_turns: bool = False,
    ) -> None:
        """`in_turns`: nothing samples while weights are published, so the service need not
        keep those that are replaced."""
        self.engine = engine
        self.adapter = adapter
        self.connection = connection
        self._losses = losses
        self._kls = kls
        self._in_turns = in_turns
        self._training: Any = None
        self._base_sampler: Any = None
        self._proven: set[str] = {"cross_entropy"}
        self._refused: set[str] = set()
        """Losses of the API that this service has, and has not."""
        self._states: list[str] = []
        """Saved by us and, as far as we know, still there."""

    async def begin(self) -> None:
        """A new adapter, which changes nothing yet, so the base samples."""
        a = self.adapter
        self._training = await self.connection.create(a.base_model, a.rank, a.seed, a.parts)
        self.engine.use(await self._base(), 0)

    async def tokenizer_id(self) -> str | None:
        """What the service says its tokenizer is."""
        info = await self.connection.ask("About the model", self._training.get_info)
        return getattr(info.model_data, "tokenizer_id", None)

    # ------------------------------------------------------------ training

    async def forward(
        self, samples: Sequence[Sample], *, temperature: float = 1.0
    ) -> tuple[Floats, ...]:
        """See `Policy.forward`. The API's temperature is 1."""
        _only_at_one(temperature)
        zeros = [np.zeros(len(s.token_ids), np.float32) for s in samples]
        data = datums(self.connection.sdk.types, samples, {"weights": zeros})
        output = await self.connection.ask(
            "forward", lambda: self._training.forward(data, "cross_entropy")
        )
        return logprobs_of(output, samples)

    async def forward_backward(
        self, samples: Sequence[Sample], loss: LossSpec
    ) -> ForwardBackwardResult:
        """See `Policy.forward_backward`."""
        _only_at_one(loss.temperature)
        check_ready(samples)
        remote = remote_loss(samples, loss)
        if remote is not None and remote.loss not in self._refused:
            try:
                output = await self._backward(samples, remote)
            except Refused as error:
                if remote.loss in self._proven or not _lacks_loss(error, remote.loss):
                    raise
                log.warning("Gradients are computed here from now on. %s", error)
                self._refused.add(remote.loss)
            else:
                self._proven.add(remote.loss)
                logprobs = logprobs_of(output, samples)
                taken = self._taken(samples, logprobs, None, loss)
                return result_of(taken, logprobs, output, samples)
        logprobs = await self.forward(samples)
        reference = await self._reference(samples) if loss.kl_coef > 0 else None
        taken = self._taken(samples, logprobs, reference, loss)
        weights = [-gradient for gradient in taken.gradient]
        output = await self._backward(samples, Remote("cross_entropy", {"weights": weights}))
        return result_of(taken, logprobs, output, samples)

    async def optim_step(self, params: AdamParams) -> dict[str, float]:
        """See `Policy.optim_step`. `grad_norm` is NaN where the service does not tell it."""
        wire = self.connection.sdk.types.AdamParams(
            learning_rate=params.lr,
            beta1=params.betas[0],
            beta2=params.betas[1],
            eps=params.eps,
            weight_decay=params.weight_decay,
            grad_clip_norm=params.max_grad_norm,
        )
        answer = await self.connection.ask("optim_step", lambda: self._training.optim_step(wire))
        metrics = {k.partition(":")[0]: float(v) for k, v in (answer.metrics or {}).items()}
        return {"grad_norm": metrics.get("grad_norm", math.nan), "lr": params.lr}

    async def publish(self) -> int:
        """See `Policy.publish`. Streams that have begun end with the weights they began with."""
        version = self.engine.version + 1
        self.engine.use(await self._sampler(), version)
        return version

    # ------------------------------------------------------------ checkpoints

    async def save(self, path: Path, *, optimizer: bool) -> None:
        """See `Policy.save`. The state holds the optimizer in any case. States of ours that
        no checkpoint beside `path` names any more are deleted."""
        name = f"v{self.engine.version:06d}-{uuid.uuid4().hex[:8]}"
        answer = await self.connection.ask("save_state", lambda: self._training.save_state(name))
        state = SavedState(
            str(answer.path),
            self.connection.base_url,
            self.adapter.base_model,
            self.engine.version,
        )
        path.mkdir(parents=True, exist_ok=True)
        (path / STATE_FILE).write_text(json.dumps(asdict(state), indent=2))
        self._states.append(state.path)
        await self._forget(path.parent)

    async def load(self, path: Path, *, optimizer: bool) -> int:
        """See `Policy.load`."""
        state = SavedState.read(path)
        if state.base_model != self.adapter.base_model:
            raise CheckpointError(
                f"{path} was trained on {state.base_model!r}, not {self.adapter.base_model!r}: set "
                "service.base_model to it, or start without --resume."
            )
        try:
            self._training = await self.connection.resume(state.path, optimizer=optimizer)
        except EngineError as error:
            raise CheckpointError(
                f"The run cannot go on from {state.path}, which {path} names. {error} It was saved "
                f"at {state.base_url}."
            ) from error
        self._states = [state.path]
        self.engine.use(await self._sampler(), state.version)
        return state.version

    async def save_for_sampler(self, name: str) -> str:
        """Keep the weights to be downloaded; returns their path."""
        answer = await self.connection.ask(
            "save_weights_for_sampler", lambda: self._training.save_weights_for_sampler(name)
        )
        return str(answer.path)

    async def _forget(self, checkpoints: Path) -> None:
        folders = [f for f in checkpoints.iterdir() if (f / STATE_FILE).is_file()]
        named = {SavedState.read(folder).path for folder in folders}
        for old in [state for state in self._states if state not in named]:
            self._states.remove(old)
            try:
                await self.connection.delete(old)
            except AstunerError as error:
                log.warning("An old state stays on the service. %s", error)

    # ------------------------------------------------------------ inside

    async def _base(self) -> Any:
        if self._base_sampler is None:
            self._base_sampler = await self.connection.base_sampler(self.adapter.base_model)
        return self._base_sampler

    async def _sampler(self) -> Any:
        """Of the weights as they are now."""

        async def publish(**how: str) -> Any:
            return await self.connection.ask(
                "Publishing", lambda: self._training.save_weights_and_get_sampling_client(**how)
            )

        if self._in_turns:
            try:
                return await publish(kind="inflight")
            except (TypeError, EngineError) as error:  # SDK 0.25 and older services lack it
                log.info("Every published set of weights is kept by the service. %s", error)
                self._in_turns = False
        return await publish()

    async def _reference(self, samples: Sequence[Sample]) -> tuple[Floats, ...]:
        """Logprobs of the base model."""
        base, types = await self._base(), self.connection.sdk.types

        async def of(sample: Sample) -> Floats:
            prompt = types.ModelInput.from_ints(sample.token_ids.tolist())
            found = await self.connection.ask(
                "Reference logprobs", lambda: base.compute_logprobs(prompt), blocks=False
            )
            return np.asarray([0.0 if v is None else v for v in found], np.float32)

        return tuple(await asyncio.gather(*(of(sample) for sample in samples)))

    def _taken(
        self,
        samples: Sequence[Sample],
        logprobs: Sequence[Floats],
        reference: Sequence[Floats] | None,
        loss: LossSpec,
    ) -> Taken:
        return take_loss(samples, logprobs, reference, loss, self._losses, self._kls)

    async def _backward(self, samples: Sequence[Sample], remote: Remote) -> Any:
        data = datums(self.connection.sdk.types, samples, remote.inputs)
        config = dict(remote.config) or None
        return await self.connection.ask(
            f"forward_backward ({remote.loss})",
            lambda: self._training.forward_backward(data, remote.loss, config),
        )


def _lacks_loss(error: Refused, loss: str) -> bool:
    """Whether a service says that it has no such loss, in its own words."""
    said = str(error).lower()
    return "loss_fn" in said or (loss in said and any(word in said for word in NOT_THERE))


def _only_at_one(temperature: float) -> None:
    if temperature != 1:
        raise EngineError(f"The Tinker API trains at temperature 1, not {temperature}.")
