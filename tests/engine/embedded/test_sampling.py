"""Draws: frequencies, truncation by hand, independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from astuner.engine.embedded.sampling import NUCLEUS, Draw, _inverse_cdf, sample, uniforms
from astuner.engine.protocol import SamplingParams

P = [0.5, 0.3, 0.15, 0.05]
LOGITS = torch.tensor(P).log()[None]


def draw(seed: int = 0, position: int = 0, **params: Any) -> Draw:
    return Draw(SamplingParams(**{"max_tokens": 1, **params}), seed, position)


def frequencies(count: int, **params: Any) -> tuple[list[int], dict[int, float]]:
    """How often each of the four tokens came, and the logprob it came with."""
    drawn = sample(LOGITS.expand(count, -1), [draw(7, i, **params) for i in range(count)])
    logprobs = dict(zip(drawn.tokens, drawn.logprobs, strict=True))
    return np.bincount(drawn.tokens, minlength=4).tolist(), logprobs


def chi_square(seen: list[int], expected: list[float]) -> float:
    total = sum(seen)
    pairs = zip(seen, expected, strict=True)
    return sum((s - e * total) ** 2 / (e * total) for s, e in pairs if e > 0)


def test_frequencies_at_temperature_1() -> None:
    seen, logprobs = frequencies(20_000)
    assert chi_square(seen, P) < 11.3  # 3 degrees of freedom, 1 %
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(math.log(P[token]), abs=1e-6)


def test_frequencies_when_tempered() -> None:
    tempered = np.array(P) ** 2 / np.sum(np.array(P) ** 2)
    seen, logprobs = frequencies(20_000, temperature=0.5)
    assert chi_square(seen, tempered.tolist()) < 11.3
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(math.log(tempered[token]), abs=1e-6)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_p": 0.8}, {0: 0.5 / 0.8, 1: 0.3 / 0.8}),
        ({"top_p": 0.81}, {0: 0.5 / 0.95, 1: 0.3 / 0.95, 2: 0.15 / 0.95}),
        ({"top_p": 0.01}, {0: 1.0}),
        ({"top_k": 2}, {0: 0.5 / 0.8, 1: 0.3 / 0.8}),
        ({"top_k": 1}, {0: 1.0}),
        ({"top_k": 9}, {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}),
        # top_p is of what top_k has left: 0.5 / 0.8 = 0.625
        ({"top_k": 2, "top_p": 0.6}, {0: 1.0}),
        ({"top_k": 2, "top_p": 0.63}, {0: 0.5 / 0.8, 1: 0.3 / 0.8}),
    ],
)
def test_truncation(params: dict[str, Any], kept: dict[int, float]) -> None:
    # 0.8 is not a float32: a hair below keeps the boundary case exact
    params = {**params, "top_p": params["top_p"] - 1e-6} if "top_p" in params else params
    seen, logprobs = frequencies(4_000, **params)
    assert {token for token, n in enumerate(seen) if n} == set(kept)
    for token, p in kept.items():
        assert logprobs[token] == pytest.approx(math.log(p), abs=1e-5)
    assert chi_square(seen, [kept.get(token, 0.0) for token in range(4)]) < 11.3


def test_a_flat_distribution_needs_more_than_the_nucleus() -> None:
    vocab = 3 * NUCLEUS
    logits = torch.zeros(1, vocab)
    tokens = set()
    for position in range(0, 4000, 400):
        rows = [draw(1, position + i, top_p=0.9) for i in range(400)]
        drawn = sample(logits.expand(400, -1), rows)
        tokens.update(drawn.tokens)
        kept = math.ceil(0.9 * vocab)
        assert drawn.logprobs == pytest.approx([-math.log(kept)] * 400, abs=2e-3)
    assert len(tokens) > 2 * NUCLEUS


def test_top_k_above_the_nucleus() -> None:
    logits = -0.001 * torch.arange(2048.0)[None]
    k = NUCLEUS + 100
    drawn = sample(logits.expand(3000, -1), [draw(2, i, top_k=k) for i in range(3000)])
    assert max(drawn.tokens) == k - 1 or max(drawn.tokens) > NUCLEUS
    assert max(drawn.tokens) < k
    expected = logits[0, :k].log_softmax(-1)
    assert drawn.logprobs[0] == pytest.approx(float(expected[drawn.tokens[0]]), abs=1e-5)


def test_greedy_reports_the_untempered_logprob() -> None:
    drawn = sample(LOGITS, [draw(temperature=0, top_p=0.1, top_k=1)])
    assert drawn.tokens == [0]
    assert drawn.logprobs == [pytest.approx(math.log(0.5), abs=1e-6)]


def test_top_logprobs() -> None:
    rows = [
        draw(top_logprobs=2),
        draw(top_logprobs=0),
        draw(top_logprobs=3, top_k=2),
        draw(top_logprobs=9),
    ]
    top = sample(LOGITS.expand(4, -1), rows).top
    assert top[0] == {0: pytest.approx(math.log(0.5)), 1: pytest.approx(math.log(0.3))}
    assert top[1] == {}
    assert top[2] == {0: pytest.approx(math.log(0.625)), 1: pytest.approx(math.log(0.375))}
    assert list(top[3]) == [0, 1, 2, 3]


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.99, "temperature": 1.5},
    {"top_k": 600},
    {"top_k": 40, "top_p": 0.5, "top_logprobs": 3},
]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_draw_does_not_depend_on_the_others(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("astuner.engine.embedded.sampling.CHUNK_ELEMENTS", chunk * 1000)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(20, 1000, generator=generator) * 3).bfloat16()
    draws = [draw(i, i, **KINDS[i % len(KINDS)]) for i in range(60)]
    some = np.random.default_rng(0).integers(0, 20, 60).tolist()
    for rows in (some, [i // 3 for i in range(60)]):
        together = sample(logits, draws, rows)
        for i, row in enumerate(rows):
            alone = sample(logits[row : row + 1], draws[i : i + 1])
            assert alone.tokens == [together.tokens[i]]
            assert alone.logprobs == [together.logprobs[i]]
            assert alone.top == [together.top[i]]


def test_draws_from_one_row_ask_for_as_many_alternatives_as_they_like() -> None:
    drawn = sample(LOGITS, [draw(i, top_logprobs=i) for i in range(4)], [0] * 4)
    assert [list(top) for top in drawn.top] == [[], [0], [0, 1], [0, 1, 2]]


def test_rows_beyond_the_draws_are_ignored() -> None:
    padded = torch.cat([LOGITS, torch.full((7, 4), float("nan"))])
    assert sample(padded, [draw(3)]) == sample(LOGITS, [draw(3)])


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_give_nan(params: dict[str, Any]) -> None:
    broken = torch.tensor([[0.0, float("nan"), 1.0]])
    drawn = sample(torch.cat([broken, torch.zeros(1, 3)]), [draw(**params), draw(**params)])
    assert math.isnan(drawn.logprobs[0])
    assert math.isfinite(drawn.logprobs[1])
    assert 0 <= drawn.tokens[0] < 3


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, 20] = 0.0
    drawn = sample(logits.expand(500, -1), [draw(5, i) for i in range(500)])
    assert set(drawn.tokens) == {20}
    assert set(drawn.logprobs) == {0.0}


@pytest.mark.parametrize("vocab", [3, 256, 257, 3000])
def test_a_draw_inverts_the_cumulative_distribution(vocab: int) -> None:
    """Against one sum in float64, but for numbers a rounding error from where a token ends."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator) * 4
    logits[torch.rand(vocab, generator=generator) < 0.3] = float("-inf")
    draws = [draw(11, position) for position in range(2000)]
    cdf = logits.double().softmax(-1).cumsum(-1)
    uniform = torch.from_numpy(uniforms(draws)).double()
    expected = torch.searchsorted(cdf, uniform, right=True)
    clear = (uniform[:, None] - cdf).abs().amin(1) > 1e-5
    for rows in ([0] * len(draws), list(range(len(draws)))):  # of one row, and of one each
        drawn = torch.tensor(sample(logits.expand(len(draws), -1), draws, rows).tokens)
        assert torch.equal(drawn[clear], expected[clear])
        assert torch.isfinite(logits[drawn]).all()
    assert clear.sum() > 1900


@pytest.mark.parametrize("seed", range(12))
def test_no_number_draws_what_has_no_probability(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for vocab, sharpness in ((5, 1), (128, 200), (129, 10), (1000, 60), (3000, 1)):
        logits = torch.randn(4, vocab, generator=generator) * sharpness
        logits[torch.rand(4, vocab, generator=generator) < 0.9] = float("-inf")
        logits[:, int(torch.randint(0, vocab, (1,), generator=generator))] = 0
        logits[0, 0] = logits[1, -1] = float("-inf")
        logits[0, -1] = logits[1, 0] = 0
        probs = logits.softmax(-1)
        ends = torch.tensor([0, 2**-24, 0.5, 1 - 2**-24]).expand(4, -1)
        some = torch.rand(4, 30, generator=generator)
        # and just where tokens begin
        begins = probs.cumsum(-1).gather(1, torch.randint(0, vocab, (4, 30), generator=generator))
        uniform = torch.cat([ends, some, begins.clamp(max=1 - 2**-24)], 1)
        assert (probs.gather(1, _inverse_cdf(probs, uniform)) > 0).all()


def test_uniforms() -> None:
    u = uniforms([draw(s, p) for s in range(100) for p in range(100)])
    assert u.dtype == np.float32
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert len(set(u.tolist())) > 9_990  # 24 bits: a few collide
    counts, _ = np.histogram(u, 10, (0, 1))
    assert chi_square(counts.tolist(), [0.1] * 10) < 21.7  # 9 degrees of freedom, 1 %
    rows = u.reshape(100, 100)
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.03
    assert uniforms([draw(5, 9)]) == u[509]
    assert uniforms([draw(-1, 0)]) != uniforms([draw(2**63 - 1, 0)])
