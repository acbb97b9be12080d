"""Training data as it arrives: datums of the Tinker API, and the Samples made of them.

A datum has input tokens x[T], target tokens y[T] and per-position numbers; position t
asks for log p(y[t] | x[0..t]). A sample is a sequence whose position i is the target of
the positions before it: x followed by the last target, and position t of the datum is
position t+1 of the sample. Targets that are not x shifted by one go along apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from astuner.engine.protocol import LossSpec
from astuner.errors import RequestError
from astuner.types import Sample

Floats = NDArray[np.float32]
Value = float | str


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One sequence. Arrays have shape [T]."""

    tokens: NDArray[np.int32]
    inputs: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True, eq=False)
class TrainRequest:
    """A forward or forward_backward request, decoded."""

    run_id: str
    seq: int
    data: Sequence[Datum]
    loss: str
    config: Mapping[str, Value]
    forward_only: bool

    def digest(self) -> str:
        """Equal for equal requests, whatever the order of fields on the wire."""
        h = blake2b(digest_size=16)
        h.update(repr((self.loss, sorted(self.config.items()), self.forward_only)).encode())
        for datum in self.data:
            h.update(datum.tokens.tobytes())
            for name, values in sorted(datum.inputs.items()):
                h.update(name.encode() + values.tobytes())
        return h.hexdigest()

    @property
    def nbytes(self) -> int:
        arrays = (a for d in self.data for a in (d.tokens, *d.inputs.values()))
        return sum(array.nbytes for array in arrays)

    @property
    def num_tokens(self) -> int:
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True, slots=True)
class _Loss:
    """How a loss of the API becomes one of ours."""

    name: str
    needs: tuple[str, ...]
    params: Mapping[str, tuple[str, float, float]] = field(default_factory=dict)
    """Their parameter -> ours = offset + factor * theirs."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """In their terms."""
    takes: tuple[str, ...] = ()
    """Inputs that it can do without."""


RATIO_MASK = "sequence_ratio_mask"
"""Of gspo: where it is not 0, a token belongs to the sequence whose ratio is taken."""

_RL = ("logprobs", "advantages")
_CLIP = {
    "clip_low_threshold": ("clip_low", 1.0, -1.0),
    "clip_high_threshold": ("clip_high", -1.0, 1.0),
}
LOSSES: dict[str, _Loss] = {
    "cross_entropy": _Loss("cross_entropy", ("weights",)),
    "importance_sampling": _Loss("importance_sampling", _RL),
    "ppo": _Loss("ppo", _RL, _CLIP, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": _Loss("cispo", _RL, _CLIP, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": _Loss("dro", _RL, {"beta": ("beta", 0.0, 1.0)}, {"beta": 0.05}),
    "gspo": _Loss("gspo", _RL, _CLIP, takes=(RATIO_MASK,)),
}
"""Thresholds bound the ratio itself, e.g. 0.8 and 1.2; our clip ranges its distance from 1."""

OPTIONAL = ("weights", "mask", "proximal_logprobs")
"""Inputs beyond the API's that every loss takes: per-token weights of the sum (`mask` is
another name for them), and logprobs at the start of the step."""


def loss_spec(request: TrainRequest) -> LossSpec:
    """The loss to take. Raises RequestError (400) for one that is not known here.

    Beyond the API's own parameters: `temperature` of the sampler, `kl_coef` and `kl_type`
    for a KL term to the base model, and any parameter of our loss function by its name.
    """
    loss = LOSSES.get(request.loss)
    if loss is None:
        raise _bad(
            f"The loss {request.loss!r} is not offered here. Choose one of: "
            f"{', '.join(LOSSES)}; or compute your own with forward_backward_custom.",
            "loss_fn",
        )
    params: dict[str, float] = {}
    extra: dict[str, Value] = {}
    for name, value in {**loss.defaults, **request.config}.items():
        if name in loss.params:
            ours, offset, factor = loss.params[name]
            params[ours] = offset + factor * _number(name, value)
        elif name in ("temperature", "kl_coef", "kl_type"):
            extra[name] = value
        elif name in _OURS:
            params[name] = _number(name, value)
        else:
            raise _bad(
                f"The loss {request.loss!r} has no parameter {name!r}. It has: "
                f"{', '.join([*loss.params, 'temperature', 'kl_coef', 'kl_type'])}.",
                "loss_fn_config",
            )
    return LossSpec(
        loss.name,
        params,
        kl_coef=_number("kl_coef", extra.get("kl_coef", 0.0)),
        kl_type=str(extra.get("kl_type", "k3")),
        temperature=_number("temperature", extra.get("temperature", 1.0)),
    )


_OURS = ("clip_low", "clip_high", "dual_clip", "tis_cap")


def samples(request: TrainRequest, *, max_context: int, vocab_size: int) -> list[Sample]:
    """One Sample a datum, in their order. Raises RequestError (400) naming the datum."""
    if not request.data:
        raise _bad("The request has no data: give at least one datum.", "data")
    loss = LOSSES.get(request.loss, _Loss(request.loss, ()))
    return [
        _sample(datum, i, request, loss, max_context, vocab_size)
        for i, datum in enumerate(request.data)
    ]


def _sample(
    datum: Datum,
    index: int,
    request: TrainRequest,
    loss: _Loss,
    max_context: int,
    vocab_size: int,
) -> Sample:
    ids = _sequence(datum, index, max_context, vocab_size)
    _check_inputs(datum, index, loss, request.forward_only)
    weights = _weights(datum, index, request.loss)
    total = len(ids)
    proximal = datum.inputs.get("proximal_logprobs")
    targets = np.concatenate([ids[:1], datum.inputs["target_tokens"]]).astype(np.int32)
    return Sample(
        sample_id=f"datum {index}",
        episode_id=request.run_id,
        group_id=str(request.seq),
        task_id="",
        agent_name="",
        target_tag="",
        token_ids=ids,
        loss_mask=np.arange(total) > 0,
        logprobs=_shifted(datum, index, "logprobs"),
        advantages=_shifted(datum, index, "advantages"),
        weights=np.concatenate([np.zeros(1, np.float32), weights]),
        proximal_logprobs=None if proximal is None else _shifted(datum, index, "proximal_logprobs"),
        target_ids=None if np.array_equal(targets, ids) else targets,
    )


def _check_inputs(datum: Datum, index: int, loss: _Loss, forward_only: bool) -> None:
    """Weights may be left out, and what a loss needs where no loss is taken."""
    missing = [n for n in loss.needs if n not in datum.inputs and n != "weights"]
    if missing and not forward_only:
        raise _bad(
            f"Datum {index} lacks {' and '.join(missing)}, which the loss {loss.name!r} reads.",
            "loss_fn_inputs",
        )
    known = ("target_tokens", *loss.needs, *loss.takes)
    unknown = set(datum.inputs) - {*known, *OPTIONAL}
    if unknown:
        raise _bad(
            f"Datum {index} has {', '.join(sorted(unknown))}, which the loss {loss.name!r} does "
            f"not read. It reads: {', '.join(known)}.",
            "loss_fn_inputs",
        )


def _sequence(datum: Datum, index: int, max_context: int, vocab_size: int) -> NDArray[np.int32]:
    """The input tokens followed by the last target, [T + 1]; all targets are checked."""
    tokens = datum.tokens
    targets = datum.inputs.get("target_tokens")
    if targets is None:
        raise _bad(f"Datum {index} has no target_tokens.", "loss_fn_inputs")
    if targets.shape != tokens.shape or not len(tokens):
        raise _bad(
            f"Datum {index} has {len(tokens)} input tokens but target_tokens of shape "
            f"{list(targets.shape)}: give one target for each input token, and at least one.",
            "target_tokens",
        )
    if len(tokens) > max_context:
        raise _bad(
            f"Datum {index} has {len(tokens)} tokens; the model's context is {max_context}.",
            "model_input",
        )
    ids = np.concatenate([tokens, targets]).astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise _bad(
            f"Datum {index} has the token id {bad}; the model's ids are 0 to {vocab_size - 1}. "
            "Is the tokenizer that of this model?",
            "model_input",
        )
    return np.concatenate([tokens, targets[-1:]]).astype(np.int32)


def _weights(datum: Datum, index: int, loss: str) -> Floats:
    for name in ("weights", "mask"):
        if name in datum.inputs:
            return _floats(datum, index, name)
    if loss == "gspo" and "advantages" in datum.inputs:
        return _sequence_of_gspo(datum, index)
    return np.ones(len(datum.tokens), np.float32)


def _sequence_of_gspo(datum: Datum, index: int) -> Floats:
    """1 for the tokens of the sequence: those that are marked, or else have an advantage."""
    advantages = _floats(datum, index, "advantages")
    if RATIO_MASK not in datum.inputs:
        return (advantages != 0).astype(np.float32)
    marked = _floats(datum, index, RATIO_MASK) != 0
    if not marked.any() or (advantages[~marked] != 0).any():
        raise _bad(
            f"Datum {index}: {RATIO_MASK} must mark the sampled tokens: at least one, and every "
            "token that has an advantage.",
            RATIO_MASK,
        )
    return marked.astype(np.float32)


def _shifted(datum: Datum, index: int, name: str) -> Floats:
    """[T + 1] with a 0 before; all 0 when the datum has no such input."""
    values = np.zeros(len(datum.tokens) + 1, np.float32)
    if name in datum.inputs:
        values[1:] = _floats(datum, index, name)
    return values


def _floats(datum: Datum, index: int, name: str) -> Floats:
    values = datum.inputs[name]
    if values.shape != datum.tokens.shape:
        raise _bad(
            f"Datum {index} has {len(datum.tokens)} tokens but {name} of shape "
            f"{list(values.shape)}.",
            name,
        )
    numbers = values.astype(np.float32)
    if not np.isfinite(numbers).all():
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise _bad(f"Datum {index}: {name}[{at}] is {numbers[at]}, not a finite number.", name)
    return numbers


def _number(name: str, value: Value) -> float:
    if isinstance(value, str) or not math.isfinite(value):
        raise _bad(f"The loss parameter {name!r} must be a finite number, not {value!r}.", name)
    return float(value)


def _bad(message: str, param: str) -> RequestError:
    return RequestError(message, code="invalid_data", param=param)
