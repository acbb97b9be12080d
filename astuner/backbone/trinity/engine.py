"""What samples in a run with Trinity, as an Engine: tokens in, tokens out.

Trinity's own model objects take messages, or fix the seed; so tokens go straight to what
they stand on: to a Tinker service with the SDK, to vLLM's completions endpoint with token
ids. Which weights are served is asked before each call. Everything is awaited on the loop
of Trinity's runner.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from astuner.backbone.spawned.answers import Answer, AnswerEngine
from astuner.backbone.trinity.served_weights import SECONDS_BETWEEN, TRIES, ServedWeights
from astuner.engine.protocol import SamplingParams
from astuner.errors import EngineError

SAMPLERS = 2
"""Clients that are kept: of the newest weights, and of those just before."""
_VERSION = re.compile(r"-sampler-(\d+)$")


class Sampler(Protocol):
    """Samples with the newest weights that Trinity has brought to the explorer."""

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer: ...


class TrinityEngine(AnswerEngine):
    """An `Engine` over a sampler; usable from any thread and loop."""

    def __init__(
        self,
        sampler: Sampler,
        loop: asyncio.AbstractEventLoop,
        *,
        max_context: int,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(loop, max_context=max_context, on_answer=on_answer)
        self._sampler = sampler

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        answer = await self._sampler.sample(prompt_ids, params, limit)
        check(answer, limit)
        return answer


def check(answer: Answer, limit: int) -> None:
    """Raises EngineError for what cannot be trained on: no tokens, or no logprobs."""
    count = len(answer.token_ids)
    if not 0 < count <= limit or len(answer.logprobs) != count:
        raise EngineError(
            f"Trinity's model answered {count} tokens with {len(answer.logprobs)} logprobs; "
            f"1 to {limit}, with a logprob each, were due."
        )


# ---------------------------------------------------------------- a Tinker service


class ServiceSampler:
    """Over the `tinker` SDK, with the sampler checkpoint whose turn it is."""

    def __init__(self, weights: ServedWeights, client: Any, *, open_seconds: float) -> None:
        """`client` is a ServiceClient, which may take `open_seconds` to open a checkpoint."""
        self._weights = weights
        self._client = client
        self._open_seconds = open_seconds
        self._samplers: OrderedDict[str, Any] = OrderedDict()
        self._opening = asyncio.Lock()

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        path, client = await self._newest()
        return await sampled(client, prompt_ids, params, limit, version_of(path))

    async def _newest(self) -> tuple[str, Any]:
        """Trinity's trainer deletes the checkpoint before the newest
        (trainer/tinker/tinker_trainer.py:393): then the explorer is about to have another."""
        from tinker import NotFoundError  # pyright: ignore[reportMissingImports]

        path = ""
        for _ in range(TRIES):
            path = await self._weights.path()
            try:
                return path, await self._opened(path)
            except NotFoundError:
                await asyncio.sleep(SECONDS_BETWEEN)
        raise EngineError(f"The service has no weights {path} any more, and Trinity no newer ones.")

    async def _opened(self, path: str) -> Any:
        """The SDK itself would ask a service that is gone for ever."""
        try:
            async with asyncio.timeout(self._open_seconds), self._opening:
                return await self._sampler_of(path)
        except TimeoutError:
            raise EngineError(
                f"The run's service has not opened the weights {path} within "
                f"{self._open_seconds:g} s (rollout.call_timeout)."
            ) from None

    async def _sampler_of(self, path: str) -> Any:
        if path not in self._samplers:
            where = {"model_path": path} if "://" in path else {"base_model": path}
            self._samplers[path] = await self._client.create_sampling_client(**where)
            while len(self._samplers) > SAMPLERS:
                self._samplers.popitem(last=False)
        return self._samplers[path]


async def sampled(
    client: Any, prompt_ids: list[int], params: SamplingParams, limit: int, version: int
) -> Answer:
    """One completion of a SamplingClient, of weights of this version."""
    from tinker import types  # pyright: ignore[reportMissingImports]

    response = await client.sample(
        prompt=types.ModelInput.from_ints(prompt_ids),
        num_samples=1,
        sampling_params=types.SamplingParams(
            max_tokens=limit,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            stop=list(params.stop_token_ids) or None,
            seed=params.seed,
        ),
    )
    [sequence] = response.sequences
    return Answer(list(sequence.tokens), list(sequence.logprobs or ()), version, version)


def version_of(path: str) -> int:
    """Of weights that Trinity's trainer has named (tinker_trainer.py:384); the base is 0."""
    match = _VERSION.search(path)
    return int(match[1]) if match else 0


# ---------------------------------------------------------------- vLLM


class VllmSampler:
    """Over the completions endpoint of Trinity's vLLM server, which takes and returns ids."""

    def __init__(self, model: Any, url: str, name: str, http: Any) -> None:
        """`model` is the Ray actor of Trinity's vLLM model, `http` an httpx.AsyncClient."""
        self._model = model
        self._url = f"{url}/v1/completions"
        self._name = name
        self._http = http

    async def sample(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> Answer:
        oldest = max(0, await self._model.get_model_version.remote())
        response = await self._http.post(self._url, json=self._wire(prompt_ids, params, limit))
        response.raise_for_status()
        [choice] = response.json()["choices"]
        newest = max(oldest, await self._model.get_model_version.remote())
        return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"], oldest, newest)

    def _wire(self, prompt_ids: list[int], params: SamplingParams, limit: int) -> dict[str, Any]:
        return {
            "model": self._name,
            "prompt": prompt_ids,
            "max_tokens": limit,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "stop_token_ids": list(params.stop_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }
