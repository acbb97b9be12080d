"""The two protobuf messages of the protocol that we send, and the one that we get.

The message classes are the SDK's own generated ones. Tensors are raw little-endian bytes;
sparse ones are made dense. Malformed bytes and shapes that do not fit are RequestErrors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from astuner.errors import MissingDependency, RequestError
from astuner.service.datums import Datum, Floats, TrainRequest, Value
from astuner.service.futures import Answer
from astuner.service.samplers import Sampled

if TYPE_CHECKING:
    from tinker.proto import tinker_public_pb2 as pb
else:
    try:
        from tinker.proto import tinker_public_pb2 as pb
    except ModuleNotFoundError as error:
        raise MissingDependency("tinker", "service", "The fine-tuning service") from error

CONTENT_TYPE = "application/x-protobuf"
MAX_DENSE = 50_000_000
"""Cells that a sparse tensor may unfold to."""
NO_TOKEN = (0, -99999.0)
"""Fills a row of alternatives that has fewer than k."""

_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
}


def parse_train_request(body: bytes) -> TrainRequest:
    """Raises RequestError (400) when it is not such a message."""
    from google.protobuf.message import DecodeError

    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise _malformed(f"it does not parse as a ForwardBackwardRequest ({error})") from None
    config: dict[str, Value] = dict(message.loss_fn_config.items())
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.HasField("text") else value.number
    return TrainRequest(
        run_id=message.model_id,
        seq=message.seq_id,
        data=[_datum(d, i) for i, d in enumerate(message.data)],
        loss=message.loss_fn,
        config=config,
        forward_only=message.forward_only,
    )


def _datum(message: pb.Datum, index: int) -> Datum:
    parts: list[NDArray[np.int32]] = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("chunk") if chunk.ListFields() else None
        if not chunk.HasField("encoded_text"):
            raise _malformed(
                f"datum {index} has a {kind or 'empty'} chunk, and this service reads text only"
            )
        parts.append(_array(chunk.encoded_text.tokens, np.dtype("<i4"), f"datum {index}"))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return Datum(tokens, {name: _tensor(t, name) for name, t in message.loss_fn_inputs.items()})


def _tensor(message: pb.Tensor, name: str) -> NDArray[np.generic]:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise _malformed(f"{name} has the unknown type {message.dtype}")
    shape = list(message.shape)
    if message.HasField("sparse_csr"):
        return _dense(message.sparse_csr, dtype, shape, name)
    values = _array(message.dense, dtype, name)
    if shape and (min(shape) < 0 or math.prod(shape) != len(values)):
        raise _malformed(f"{name} has {len(values)} values but the shape {shape}")
    return values.reshape(shape) if shape else values


def _dense(
    csr: pb.SparseCsr, dtype: np.dtype[Any], shape: Sequence[int], name: str
) -> NDArray[np.generic]:
    """Zero where nothing is listed."""
    values = _array(csr.values, dtype, name)
    rows = _array(csr.crow_indices, np.dtype("<i8"), name)
    columns = _array(csr.col_indices, np.dtype("<i8"), name)
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > MAX_DENSE:
        raise _malformed(f"{name} is sparse and has the shape {list(shape)}")
    counts = np.diff(rows)
    fits = (
        len(rows) == shape[0] + 1
        and (counts >= 0).all()
        and len(columns) == len(values) == int(rows[-1] - rows[0])
        and (not len(columns) or (columns.min() >= 0 and columns.max() < shape[1]))
    )
    if not fits:
        raise _malformed(f"{name} has sparse indices that do not fit its shape {list(shape)}")
    dense = np.zeros(tuple(shape), dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


def _array(data: bytes, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise _malformed(f"{name} has {len(data)} bytes, which are no whole {dtype.name} values")
    return np.frombuffer(data, dtype)


def _malformed(what: str) -> RequestError:
    return RequestError(f"The request body is malformed: {what}.", code="malformed_body")


# ---------------------------------------------------------------- answers


def train_answer(logprobs: Sequence[Floats], metrics: Mapping[str, float]) -> Answer:
    """A ForwardBackwardOutput: logprobs [T] for each datum; metric names carry how chunks
    are to be reduced, e.g. "loss:sum"."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(logprobs))
    offsets = np.cumsum([0, *(4 * len(values) for values in logprobs)], dtype="<i8")
    tensor = record.fields["logprobs"]
    tensor.data = b"".join(np.asarray(values, "<f4").tobytes() for values in logprobs)
    tensor.offsets = offsets.tobytes()
    tensor.dtype = pb.DTYPE_FLOAT32
    for name, value in metrics.items():
        message.metrics[name] = value
    return Answer(message.SerializeToString(), CONTENT_TYPE)


def sample_answer(sampled: Sampled, *, top_sampled: int, top_prompt: int) -> Answer:
    """A SampleResponse."""
    cached = min((s.cached for s in sampled.sequences), default=0)
    message = pb.SampleResponse(prompt_cache_hit_tokens=cached)
    for sequence in sampled.sequences:
        one = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if sequence.stopped else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(sequence.token_ids, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
        if top_sampled:
            one.topk_sampled_logprobs.CopyFrom(_top(sequence.top, top_sampled))
    if sampled.prompt_logprobs is not None:
        message.prompt_logprobs = np.asarray(sampled.prompt_logprobs, "<f4").tobytes()
    if top_prompt and sampled.prompt_top is not None:
        message.topk_prompt_logprobs.CopyFrom(_top(sampled.prompt_top, top_prompt))
    return Answer(message.SerializeToString(), CONTENT_TYPE)


def _top(rows: Sequence[Mapping[int, float]], k: int) -> pb.TopkLogprobs:
    """[N, k], most probable first."""
    ids = np.full((len(rows), k), NO_TOKEN[0], "<i4")
    logprobs = np.full((len(rows), k), NO_TOKEN[1], "<f4")
    for i, alternatives in enumerate(rows):
        best = sorted(alternatives.items(), key=lambda pair: -pair[1])[:k]
        for j, (token, logprob) in enumerate(best):
            ids[i, j], logprobs[i, j] = token, logprob
    return pb.TopkLogprobs(
        token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows)
    )
