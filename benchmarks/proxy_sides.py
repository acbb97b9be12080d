"""What `benchmarks/proxy.py` puts around a proxy: the callers, and a model that is none.

Callers speak the openai SDK's requests, byte for byte, over kept-alive connections, and read
as little of the answers as HTTP allows, so that what is measured is the proxy. As a program:
`load` (a job as JSON on standard input, figures as JSON on standard output) or `fake` (an
endpoint that answers every request with the same completion; prints its port).
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

TEXT = "The answer is seven, as always."
QUESTION = [{"role": "user", "content": "why? " * 60}]
Ask = Callable[[], Awaitable[None]]


# ---------------------------------------------------------------- callers


async def load(asks: Sequence[Ask], seconds: float, engine_ms: float) -> dict[str, float]:
    """Let every `ask` run again and again for so long; latencies in ms. Episodes start
    spread over one call of the engine, or they would all answer in the same instant."""
    await asyncio.gather(*(ask() for ask in asks))
    end = time.perf_counter() + seconds
    latencies: list[float] = []

    async def episode(index: int, ask: Ask) -> None:
        await asyncio.sleep(engine_ms / 1000 * index / len(asks))
        while (start := time.perf_counter()) < end:
            await ask()
            latencies.append(time.perf_counter() - start)

    started = time.perf_counter()
    await asyncio.gather(*(episode(i, ask) for i, ask in enumerate(asks)))
    elapsed = time.perf_counter() - started
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {"calls": len(latencies) / elapsed, "p50": float(p50), "p99": float(p99)}


def sdk_request(base_url: str, key: str) -> bytes:
    """What the openai SDK would send for the question."""
    import httpx
    import openai

    seen: list[httpx.Request] = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=json.loads(answer_body()))

    client = openai.OpenAI(
        base_url=base_url,
        api_key=key,
        http_client=httpx.Client(transport=httpx.MockTransport(note)),
    )
    client.chat.completions.create(model="m", messages=QUESTION)  # type: ignore[arg-type]
    (request,) = seen
    head = f"POST {request.url.path} HTTP/1.1\r\n".encode()
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in request.headers.raw)
    return head + lines + b"\r\n" + request.content


async def bare_http(base_url: str, key: str) -> Ask:
    """POST on one kept-alive connection."""
    request = sdk_request(base_url, key)
    host, port = base_url.removeprefix("http://").partition("/")[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def ask() -> None:
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError((answer + await reader.read(2000)).decode())
        length = next(x for x in answer.lower().split(b"\r\n") if x.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))

    return ask


async def load_http(job: dict[str, Any]) -> dict[str, float]:
    asks = [await bare_http(base_url, key) for base_url, key in job["endpoints"]]
    return await load(asks, job["seconds"], job["engine_ms"])


# ---------------------------------------------------------------- a model that is none


def answer_body() -> bytes:
    completion = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 300, "completion_tokens": 32, "total_tokens": 332},
    }
    return json.dumps(completion).encode()


async def fake(engine_ms: float) -> None:
    """Serve until standard input ends."""
    body = answer_body()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    answer = head.encode() + b"\r\n" + body

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = request.partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                if engine_ms:
                    await asyncio.sleep(engine_ms / 1000)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    if sys.argv[1] == "fake":
        asyncio.run(fake(float(sys.argv[2])))
    else:
        print(json.dumps(asyncio.run(load_http(json.load(sys.stdin)))))
