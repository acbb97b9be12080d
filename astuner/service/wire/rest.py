"""The REST client's questions: runs, sessions and checkpoints, and changes to the last.

Lists show what the caller owns; the SDK's access_scope "accessible" adds nothing here.
Published checkpoints are read by their path (`weights_info`), by whoever knows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from astuner.errors import RequestError
from astuner.service.names import CheckpointPath, checkpoint_path, parse_path
from astuner.service.records import CheckpointRecord, RunRecord
from astuner.service.service import Service
from astuner.service.wire import requests as wire

T = TypeVar("T")
MAX_PAGE = 1000
_TYPES = {"weights": "training", "sampler_weights": "sampler"}
_CHECKPOINT = "/training_runs/{run_id}/checkpoints/{kind}/{name}"


class RestEndpoints:
    """See the module."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limit = service.limits.max_request_bytes

    def routes(self) -> Iterator[tuple[str, str, Any]]:
        yield "GET", "/training_runs", self.runs
        yield "GET", "/training_runs/{run_id}", self.run
        yield "GET", "/training_runs/{run_id}/checkpoints", self.run_checkpoints
        yield "DELETE", _CHECKPOINT, self.delete
        yield "POST", f"{_CHECKPOINT}/publish", self.publish
        yield "DELETE", f"{_CHECKPOINT}/publish", self.unpublish
        yield "PUT", f"{_CHECKPOINT}/ttl", self.set_ttl
        yield "GET", "/checkpoints", self.checkpoints
        yield "POST", "/weights_info", self.weights_info
        yield "GET", "/sessions", self.sessions
        yield "GET", "/sessions/{session_id}", self.session

    # ------------------------------------------------------------ runs and sessions

    async def runs(self, request: Request, tenant: str) -> Response:
        page, cursor = _page(request, self._service.runs.of_tenant(tenant))
        return JSONResponse({"training_runs": [self._run(r) for r in page], "cursor": cursor})

    async def run(self, request: Request, tenant: str) -> Response:
        return JSONResponse(self._run(self._find_run(request, tenant)))

    async def run_checkpoints(self, request: Request, tenant: str) -> Response:
        run = self._find_run(request, tenant)
        found = self._service.checkpoints.of_run(run.run_id)
        return JSONResponse({"checkpoints": [_checkpoint(c) for c in found]})

    async def sessions(self, request: Request, tenant: str) -> Response:
        page, _ = _page(request, self._service.sessions.of_tenant(tenant))
        return JSONResponse({"sessions": [s.session_id for s in page]})

    async def session(self, request: Request, tenant: str) -> Response:
        record = self._service.sessions.find(request.path_params["session_id"], tenant)
        runs = self._service.runs.of_session(record.session_id)
        samplers = self._service.samplers.of_session(record.session_id)
        return JSONResponse(
            {
                "training_run_ids": [r.run_id for r in runs],
                "sampler_ids": [s.sampler_id for s in samplers],
                "user_metadata": _texts(record.user_metadata),
                "display_name": record.display_name,
            }
        )

    def _find_run(self, request: Request, tenant: str) -> RunRecord:
        return self._service.runs.find(request.path_params["run_id"], tenant)

    def _run(self, run: RunRecord) -> dict[str, Any]:
        last: dict[str, CheckpointRecord] = {}
        for checkpoint in self._service.checkpoints.of_run(run.run_id):
            last[checkpoint.kind] = checkpoint
        return {
            "training_run_id": run.run_id,
            "base_model": run.base_model,
            "model_owner": run.tenant,
            "is_lora": True,
            "lora_rank": run.shape.rank,
            "corrupted": False,
            "last_request_time": _time(run.last_request_at),
            "last_checkpoint": _checkpoint(last["weights"]) if "weights" in last else None,
            "last_sampler_checkpoint": (
                _checkpoint(last["sampler_weights"]) if "sampler_weights" in last else None
            ),
            "user_metadata": _texts(run.user_metadata),
        }

    # ------------------------------------------------------------ checkpoints

    async def checkpoints(self, request: Request, tenant: str) -> Response:
        page, cursor = _page(request, self._service.checkpoints.of_tenant(tenant))
        return JSONResponse({"checkpoints": [_checkpoint(c) for c in page], "cursor": cursor})

    async def weights_info(self, request: Request, tenant: str) -> Response:
        asked = await wire.parse(wire.TinkerPath, request, self._limit)
        path = parse_path(asked.tinker_path)
        record = self._service.checkpoints.find(path, tenant, reading=True)
        return JSONResponse(
            {
                "base_model": record.base_model,
                "is_lora": True,
                "lora_rank": record.shape.rank,
                "train_mlp": record.shape.train_mlp,
                "train_attn": record.shape.train_attn,
                "train_unembed": record.shape.train_unembed,
                "optimizer_config": {"type": "adamw"},
            }
        )

    async def delete(self, request: Request, tenant: str) -> Response:
        await self._service.checkpoints.delete(_path(request), tenant)
        return JSONResponse({})

    async def publish(self, request: Request, tenant: str) -> Response:
        self._service.checkpoints.publish(_path(request), tenant, True)
        return JSONResponse({})

    async def unpublish(self, request: Request, tenant: str) -> Response:
        self._service.checkpoints.publish(_path(request), tenant, False)
        return JSONResponse({})

    async def set_ttl(self, request: Request, tenant: str) -> Response:
        asked = await wire.parse(wire.Ttl, request, self._limit)
        self._service.checkpoints.set_ttl(_path(request), tenant, asked.ttl_seconds)
        return JSONResponse({})


def _path(request: Request) -> CheckpointPath:
    p = request.path_params
    return checkpoint_path(p["run_id"], p["kind"], p["name"])


def _page(request: Request, items: Sequence[T]) -> tuple[Sequence[T], dict[str, int]]:
    """The items that limit and offset ask for. Raises RequestError (400)."""
    try:
        limit = int(request.query_params.get("limit", "20"))
        offset = int(request.query_params.get("offset", "0"))
    except ValueError:
        limit = offset = -1
    if not 0 <= limit <= MAX_PAGE or offset < 0:
        raise RequestError(
            f"limit must be 0 to {MAX_PAGE} and offset at least 0.", code="invalid_page"
        )
    cursor = {"offset": offset, "limit": limit, "total_count": len(items)}
    return items[offset : offset + limit], cursor


def _checkpoint(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "checkpoint_id": record.path.checkpoint_id,
        "checkpoint_type": _TYPES[record.kind],
        "time": _time(record.created_at),
        "tinker_path": str(record.path),
        "size_bytes": record.size_bytes,
        "public": record.public,
        "user_metadata": record.user_metadata,
        "expires_at": None if record.expires_at is None else _time(record.expires_at),
    }


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _texts(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    return None if metadata is None else {k: str(v) for k, v in metadata.items()}
