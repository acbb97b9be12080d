"""Samples as datums of the API, and its answers as ours.

Position t of a sample is position t - 1 of its datum: the tokens but the last go out, and
for each of them a target, the tokens but the first, with its numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from astuner.backbone.tinker.loss_here import Taken
from astuner.engine.protocol import ForwardBackwardResult
from astuner.errors import EngineError
from astuner.types import Sample

Floats = NDArray[np.float32]


def datums(
    types: Any, samples: Sequence[Sample], inputs: Mapping[str, Sequence[Floats]]
) -> list[Any]:
    """`types` are the SDK's; inputs have shape [T] for each sample."""
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(sample.token_ids[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(sample.token_ids[1:].astype(np.int64)),
                **{
                    name: types.TensorData.from_numpy(values[i][1:].astype(np.float32))
                    for name, values in inputs.items()
                },
            },
        )
        for i, sample in enumerate(samples)
    ]


def logprobs_of(output: Any, samples: Sequence[Sample]) -> tuple[Floats, ...]:
    """[T] for each sample, 0 where the loss mask is false."""
    if len(output.loss_fn_outputs) != len(samples):
        raise EngineError(
            f"The service answered {len(output.loss_fn_outputs)} of {len(samples)} samples."
        )
    found: list[Floats] = []
    for record, sample in zip(output.loss_fn_outputs, samples, strict=True):
        values = np.asarray(record["logprobs"].to_numpy(), np.float32).reshape(-1)
        if len(values) != len(sample.token_ids) - 1:
            raise EngineError(
                f"The service gave {len(values)} logprobs for {len(sample.token_ids) - 1} targets."
            )
        found.append(np.where(sample.loss_mask, np.concatenate([[0], values]), 0).astype("f4"))
    return tuple(found)


def result_of(
    taken: Taken, logprobs: tuple[Floats, ...], output: Any, samples: Sequence[Sample]
) -> ForwardBackwardResult:
    """The loss and metrics of ours, with what only the service knows."""
    counts = ("packed_tokens", "sample_tokens", "micro_batches")
    told = {k.partition(":")[0]: float(v) for k, v in (output.metrics or {}).items()}
    metrics = taken.metrics | {name: told[name] for name in counts if name in told}
    metrics["trained_tokens"] = float(sum(s.num_trained for s in samples))
    return ForwardBackwardResult(taken.loss, logprobs, metrics)
