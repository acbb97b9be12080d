"""From datums of the API to Samples: alignment, weights, losses and their parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from astuner.errors import RequestError
from astuner.service.datums import Datum, TrainRequest, loss_spec, samples


def request(loss: str = "cross_entropy", config: Any = None, **inputs: Any) -> TrainRequest:
    """One datum that reads [1, 2, 3] and predicts [2, 3, 4], unless told otherwise."""
    arrays = {"target_tokens": np.int64([2, 3, 4])}
    arrays |= {name: np.asarray(values) for name, values in inputs.items()}
    data = [Datum(np.int32([1, 2, 3]), arrays)]
    return TrainRequest("run", 7, data, loss, config or {}, forward_only=False)


def sample(loss: str = "cross_entropy", **inputs: Any) -> Any:
    (found,) = samples(request(loss, **inputs), max_context=8, vocab_size=10)
    return found


def rl(**inputs: Any) -> dict[str, Any]:
    return {"logprobs": [-1.0, -2.0, -3.0], "advantages": [0.0, 5.0, -5.0], **inputs}


def test_positions_move_by_one() -> None:
    s = sample(weights=[0.0, 0.5, -2.0])
    assert s.token_ids.tolist() == [1, 2, 3, 4]
    assert s.loss_mask.tolist() == [False, True, True, True]
    assert s.weights.tolist() == [0, 0, 0.5, -2]
    assert s.target_ids is None


def test_targets_of_their_own_go_along() -> None:
    s = sample(target_tokens=[9, 8, 7])
    assert s.token_ids.tolist() == [1, 2, 3, 7]
    assert s.target_ids.tolist() == [1, 9, 8, 7]
    assert s.weights.tolist() == [0, 1, 1, 1]


def test_what_was_sampled_is_where_it_was() -> None:
    s = sample("ppo", **rl())
    assert s.logprobs.tolist() == [0, -1, -2, -3]
    assert s.advantages.tolist() == [0, 0, 5, -5]
    assert s.weights.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("mask", "weights"), [([1.0, 1.0, 1.0], [0, 1, 1, 1]), ([0.0, 0.3, 1.0], [0, 0, 1, 1])]
)
def test_the_sequence_of_gspo_is_what_is_marked(mask: list[float], weights: list[int]) -> None:
    """A sampled token whose advantage is 0 still counts in the ratio, when it is marked."""
    assert sample("gspo", **rl(sequence_ratio_mask=mask)).weights.tolist() == weights


def test_the_sequence_of_gspo_is_else_what_has_an_advantage() -> None:
    assert sample("gspo", **rl()).weights.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("mask", [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
def test_a_mask_that_leaves_out_what_is_trained_is_refused(mask: list[float]) -> None:
    with pytest.raises(RequestError, match="sequence_ratio_mask must mark the sampled tokens"):
        sample("gspo", **rl(sequence_ratio_mask=mask))


def test_only_gspo_reads_that_mask() -> None:
    with pytest.raises(RequestError, match=r"does not read\. It reads: target_tokens, logprobs"):
        sample("ppo", **rl(sequence_ratio_mask=[0.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("loss", "config", "params"),
    [
        ("ppo", {}, {"clip_low": 0.2, "clip_high": 0.2}),
        ("ppo", {"clip_high_threshold": 1.3}, {"clip_low": 0.2, "clip_high": 0.3}),
        ("cispo", {}, {"clip_low": 1.0, "clip_high": 3.0}),
        ("dro", {"beta": 0.5}, {"beta": 0.5}),
        ("gspo", {}, {}),
        ("importance_sampling", {"tis_cap": 2.0}, {"tis_cap": 2.0}),
    ],
)
def test_thresholds_are_of_the_ratio_itself(loss: str, config: Any, params: Any) -> None:
    spec = loss_spec(request(loss, config))
    assert spec.name == loss
    assert spec.params == pytest.approx(params)
