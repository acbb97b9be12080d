"""A client of the fine-tuning service as thin as can be, and a server of one's own for it.

What `benchmarks/service.py` measures with: plain requests, so that no SDK is timed along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from tinker.proto import tinker_public_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
RANK = 8
PROTO = {"Content-Type": "application/x-protobuf"}


# ---------------------------------------------------------------- a client


@dataclass
class Client:
    """One tenant: a session, and a run in it."""

    http: httpx.AsyncClient
    model: str
    session: str = ""
    run: str = ""
    seq: int = 0
    samplers: int = 0

    async def post(self, path: str, body: Any) -> Any:
        content = {"content": body, "headers": PROTO} if isinstance(body, bytes) else {"json": body}
        while True:
            response = await self.http.post(path, **content)
            if response.status_code != 429:  # "not now"
                break
            await asyncio.sleep(0.2)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text}")
        return response.json()

    async def done(self, future: Any) -> Any:
        """The result of a future: JSON, or the bytes of a protobuf message."""
        while True:
            asked = {"request_id": future["request_id"]}
            response = await self.http.post("/retrieve_future", json=asked)
            if response.status_code != 408:  # "not yet"
                break
        if "protobuf" in response.headers["content-type"]:
            return response.content
        body = response.json()
        if response.status_code != 200 or "error" in body:
            raise RuntimeError(f"{future['request_id']}: {response.status_code} {body}")
        return body

    async def open(self) -> None:
        self.session = (await self.post("/create_session", {}))["session_id"]
        wish = {"session_id": self.session, "model_seq_id": 0, "base_model": self.model}
        wish["lora_config"] = {"rank": RANK, "seed": 0}
        self.run = (await self.done(await self.post("/create_model", wish)))["model_id"]

    async def train(self, sequences: Sequence[Sequence[int]], *, forward: bool = False) -> Any:
        """The logprobs of every sequence's tokens but the first, as one array."""
        self.seq += 1
        message = pb.ForwardBackwardRequest(
            model_id=self.run, seq_id=self.seq, loss_fn="cross_entropy", forward_only=forward
        )
        for ids in sequences:
            datum = message.data.add()
            chunk = datum.model_input.add()
            chunk.encoded_text.tokens = np.asarray(ids[:-1], "<i4").tobytes()
            target = datum.loss_fn_inputs["target_tokens"]
            target.dense, target.dtype = np.asarray(ids[1:], "<i8").tobytes(), pb.DTYPE_INT64
        body = await self.done(await self.post("/forward_backward", message.SerializeToString()))
        record = pb.ForwardBackwardOutput.FromString(body).loss_fn_outputs[0]
        return np.frombuffer(record.fields["logprobs"].data, "<f4")

    async def step(self, lr: float = 1e-3) -> None:
        self.seq += 1
        body = {"model_id": self.run, "seq_id": self.seq, "adam_params": {"learning_rate": lr}}
        await self.done(await self.post("/optim_step", body))

    async def sampler(self) -> str:
        self.seq, self.samplers = self.seq + 1, self.samplers + 1
        body = {"model_id": self.run, "seq_id": self.seq, "sampling_session_seq_id": self.samplers}
        made = await self.post("/save_weights_for_sampler", body | {"kind": "snapshot"})
        return (await self.done(made))["sampling_session_id"]

    async def sample(self, sampler: str, seq: int, prompt: Sequence[int], length: int) -> Any:
        """(token ids, logprobs) of one sequence."""
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {"max_tokens": length, "temperature": 1.0, "seed": seq, "stop": []},
        }
        answer = await self.done(await self.post("/asample", body))
        (found,) = pb.SampleResponse.FromString(answer).sequences
        return np.frombuffer(found.tokens, "<i4"), np.frombuffer(found.logprobs, "<f4")


# ---------------------------------------------------------------- a server


@dataclass
class Server:
    url: str
    process: psutil.Process
    model: str

    @asynccontextmanager
    async def client(self, number: int) -> AsyncGenerator[Client]:
        async with httpx.AsyncClient(
            base_url=f"{self.url}/api/v1", headers={"X-API-Key": key(number)}, timeout=300
        ) as http:
            yield Client(http, self.model)


def key(number: int) -> str:
    return f"tml-benchmark-{number}"


@contextlib.contextmanager
def serve(model: str, dtype: str, tenants: int):
    """`astuner serve` with nothing on disk, until the block ends."""
    command = [sys.executable, "-m", "astuner.cli", "serve", "--model", model, "port=0"]
    command += [f"model.dtype={dtype}", "persistence=none", "model.name=it"]
    command += [f"keys.t{i}={key(i)}" for i in range(tenants + 1)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.match(r"Serving \S+ at (\S+) for", line):
                yield Server(found[1], psutil.Process(process.pid), "it")
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(60)
