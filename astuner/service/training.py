"""What a run's operations do: the verbs of the engine, from requests to answers.

One function for each operation: it gets the run as it is, calls the engine, and returns
the answer and the run as it has become. Order, fairness, idempotency and what happens
after a crash are not its business.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from astuner.engine.protocol import AdamParams
from astuner.errors import EngineError, RequestError
from astuner.service import datums
from astuner.service.base_model import BaseModel
from astuner.service.cancelling import undone_if_cancelled
from astuner.service.checkpoints import CheckpointBook, Export
from astuner.service.datums import Floats, TrainRequest
from astuner.service.futures import Answer
from astuner.service.names import CheckpointPath, Kind, check_name, parse_path
from astuner.service.protobuf import train_answer
from astuner.service.records import CheckpointRecord, RunRecord, SamplerRecord, Shape
from astuner.service.snapshots import SnapshotShelf
from astuner.types import Sample

if TYPE_CHECKING:
    from astuner.service.samplers import SamplerBook

logger = logging.getLogger(__name__)

Done = tuple[Answer, RunRecord]
_OF_SAMPLER = ("sampler_kl", "logprob_gap")


@dataclass(frozen=True, slots=True)
class Save:
    """A request to keep a run's weights."""

    name: str | None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


class Trainer:
    """The operations."""

    def __init__(
        self,
        base: BaseModel,
        checkpoints: CheckpointBook,
        shelf: SnapshotShelf,
        samplers: SamplerBook,
    ) -> None:
        self._base = base
        self._host = base.host
        self._checkpoints = checkpoints
        self._shelf = shelf
        self._samplers = samplers

    # ------------------------------------------------------------ coming and going

    async def create(self, run: RunRecord) -> Done:
        """Make its adapter."""
        await self._host.create(run.run_id, run.shape.lora(self._base.lora_alpha), seed=run.seed)
        return as_json({"model_id": run.run_id, "type": "create_model"}), run

    async def create_from(self, run: RunRecord, path: str, *, optimizer: bool) -> Done:
        """Make its adapter as a checkpoint has it."""
        _, run = await self.create(run)
        try:
            return await self.load(run, path, optimizer=optimizer)
        except BaseException:
            await self._host.release(run.run_id)
            raise

    async def bring_back(self, run: RunRecord) -> None:
        """Make its adapter again after a restart, as it was last saved.

        Raises RequestError when it had gone on since."""
        if run.has_gone_on:
            where = (
                f"its last saved state is {run.last_state}: go on from there with "
                "create_training_client_from_state_with_optimizer, or load it into this run"
                if run.last_state
                else "it was never saved with save_state: begin again"
            )
            raise RequestError(
                f"The server was restarted, and run {run.run_id} had gone on since it was saved; "
                f"{where}.",
                code="run_interrupted",
            )
        if not run.last_state:
            await self.create(run)
            return
        state = self._checkpoints.find(parse_path(run.last_state), run.tenant, reading=True)
        if state.save != run.last_save:
            raise RequestError(
                f"The server was restarted, and {run.last_state}, which run {run.run_id} was at, "
                "has been saved again since. Load it, or another state, into this run to go on "
                "from there.",
                code="run_interrupted",
            )
        await self.create_from(run, run.last_state, optimizer=run.last_state_optimizer)

    async def load(self, run: RunRecord, path: str, *, optimizer: bool) -> Done:
        """Take over a checkpoint's weights, and with `optimizer` its moments."""
        state = self._readable(path, run.tenant, run.shape)
        if optimizer and parse_path(path).kind != "weights":
            raise RequestError(
                f"{path} holds weights for sampling, without the optimizer. Load a state saved "
                "with save_state, or load the weights only.",
                code="no_optimizer_state",
                param="path",
            )
        folder = self._checkpoints.folder(state)
        await self._host.restore(run.run_id, folder, optimizer=optimizer)
        run = replace(
            run,
            last_state=path,
            last_save=state.save,
            last_state_optimizer=optimizer,
            changed=False,
            gradient=False,
        )
        return as_json({"path": path, "type": "load_weights"}), run

    def _readable(self, path: str, tenant: str, shape: Shape) -> CheckpointRecord:
        record = self._checkpoints.find(parse_path(path), tenant, reading=True)
        if (record.base_model, record.shape) != (self._base.name, shape):
            raise RequestError(
                f"{path} is of another kind: {record.shape} of {record.base_model!r}, where the "
                f"run has {shape} of {self._base.name!r}. Create the run from the checkpoint.",
                code="shape_mismatch",
                param="path",
            )
        return record

    # ------------------------------------------------------------ training

    async def forward_backward(self, run: RunRecord, request: TrainRequest) -> Done:
        """Logprobs of every target, the loss, and (unless forward only) its gradient."""
        spec = datums.loss_spec(request)
        samples = await asyncio.to_thread(
            datums.samples,
            request,
            max_context=self._host.max_context,
            vocab_size=self._base.vocab_size,
        )
        if request.forward_only:
            logprobs = await self._host.forward(run.run_id, samples, temperature=spec.temperature)
            metrics: dict[str, float] = {}
            if request.loss == "cross_entropy":
                metrics["loss:sum"] = _cross_entropy(samples, logprobs)
        else:
            result = await self._host.forward_backward(run.run_id, samples, spec)
            logprobs = result.logprobs
            measured = dict(result.metrics)
            if request.loss == "cross_entropy":  # it has no sampler to be compared with
                measured = {k: v for k, v in measured.items() if k not in _OF_SAMPLER}
            metrics = {"loss:sum": result.loss} | _named(measured)
            run = replace(run, gradient=True)
        return train_answer([values[1:] for values in logprobs], metrics), run

    async def optim_step(self, run: RunRecord, params: AdamParams) -> Done:
        """Apply the gradient."""
        metrics = await self._host.optim_step(run.run_id, params)
        run = replace(run, gradient=False)
        if not metrics.get("skipped"):  # as it is where there was no gradient
            run = replace(run, changed=True, steps=run.steps + 1)
        return as_json({"metrics": _named(metrics), "type": "optim_step"}), run

    async def drop_gradient(self, run: RunRecord) -> RunRecord:
        """After a failure: no step must be of a part of a batch."""
        try:
            await self._host.discard(run.run_id)
        except EngineError as error:
            logger.debug("no gradient of %s to drop: %s", run.run_id, error)
        return replace(run, gradient=False)

    # ------------------------------------------------------------ keeping

    async def save_state(self, run: RunRecord, save: Save, seq: int) -> Done:
        """A checkpoint to go on from."""
        path = self._path(run, "weights", save.name, seq)

        async def export(folder: Path) -> None:
            await self._host.export(run.run_id, folder, optimizer=True)

        state = await self._keep(path, run, save, export)
        run = replace(
            run,
            last_state=str(path),
            last_save=state.save,
            last_state_optimizer=True,
            changed=False,
        )
        return as_json({"path": str(path), "type": "save_weights"}), run

    async def save_for_sampler(self, run: RunRecord, save: Save, seq: int) -> Done:
        """A checkpoint to sample from."""
        path = self._path(run, "sampler_weights", save.name, seq)
        snapshot = await self._snapshot(run)

        async def export(folder: Path) -> None:
            await self._host.export(snapshot, folder, optimizer=False)

        try:
            await self._keep(path, run, save, export)
        finally:
            await self._host.release(snapshot)
        return as_json({"path": str(path), "type": "save_weights_for_sampler"}), run

    async def open_sampler(self, run: RunRecord, sampler: SamplerRecord) -> Done:
        """The weights as they are now, for one sampler, on no disk."""
        if self._samplers.known(sampler.sampler_id):
            raise RequestError(
                f"The sampler {sampler.sampler_id} exists already; its number belongs to it.",
                code="number_reused",
                param="sampling_session_seq_id",
            )
        self._checkpoints.check_quota(run.tenant)
        snapshot = await self._snapshot(run)
        try:
            await self._shelf.put(sampler.weights, sampler.sampler_id, snapshot, run.tenant)
            self._samplers.add(sampler)
        except BaseException:
            await self._shelf.let_go(sampler.weights, sampler.sampler_id)
            raise
        body = {"sampling_session_id": sampler.sampler_id, "type": "save_weights_for_sampler"}
        return as_json(body), run

    async def _snapshot(self, run: RunRecord) -> str:
        return await undone_if_cancelled(self._host.snapshot(run.run_id), self._host.release)

    async def _keep(
        self, path: CheckpointPath, run: RunRecord, save: Save, export: Export
    ) -> CheckpointRecord:
        return await self._checkpoints.save(
            path,
            run,
            export,
            ttl_seconds=save.ttl_seconds,
            overwrite=save.overwrite,
            user_metadata=save.user_metadata,
        )

    def _path(self, run: RunRecord, kind: Kind, name: str | None, seq: int) -> CheckpointPath:
        return CheckpointPath(run.run_id, kind, check_name(f"{seq:06d}" if name is None else name))


def adam(fields: Mapping[str, float]) -> AdamParams:
    """The API's names and values. Raises RequestError (400) for numbers that cannot be."""
    lr, beta1, beta2 = (fields[n] for n in ("learning_rate", "beta1", "beta2"))
    eps, decay, clip = (fields[n] for n in ("eps", "weight_decay", "grad_clip_norm"))
    ranges = {
        "learning_rate": math.isfinite(lr) and lr >= 0,
        "beta1": 0 <= beta1 < 1,
        "beta2": 0 <= beta2 < 1,
        "eps": math.isfinite(eps) and eps >= 0,
        "weight_decay": math.isfinite(decay) and decay >= 0,
        "grad_clip_norm": math.isfinite(clip),
    }
    for name, fine in ranges.items():
        if not fine:
            raise RequestError(
                f"The optimizer cannot use {name}={fields[name]!r}.",
                code="invalid_optim_params",
                param=name,
            )
    return AdamParams(lr, (beta1, beta2), eps, decay, max(clip, 0.0))


def as_json(body: Mapping[str, Any]) -> Answer:
    return Answer(json.dumps(body).encode())


def _cross_entropy(samples: Sequence[Sample], logprobs: Sequence[Floats]) -> float:
    return -sum(
        float(np.dot(np.asarray(s.weights, np.float64), values))
        for s, values in zip(samples, logprobs, strict=True)
    )


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The SDK reduces the metrics of chunks by the suffix of their names."""
    counts = ("packed_tokens", "sample_tokens", "trained_tokens", "micro_batches")
    return {f"{k}:{'sum' if k in counts else 'mean'}": float(v) for k, v in metrics.items()}
