"""Several adapters in one pass: each as if it were alone, to the last bit, and harmless."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from astuner.engine.embedded import scheduler
from astuner.engine.embedded.host import EmbeddedHost
from astuner.engine.embedded.packed import ROWS
from astuner.engine.embedded.sampling import Draw, Drawn, sample
from astuner.engine.embedded.together import Term, bundles, products
from astuner.engine.protocol import LoraSpec, SamplingParams, generate
from astuner.errors import EngineError

from .test_host import From, held, open_host, same
from .tiny import prompt, tiny_model
from .tiny_training import save_tiny

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")
SPECS = (
    LoraSpec(rank=8, alpha=32),
    LoraSpec(rank=8, alpha=32),
    LoraSpec(rank=16, alpha=16),
    LoraSpec(rank=1, alpha=3),
    LoraSpec(rank=4, alpha=8, target_modules=["attn", "unembed"]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and layers as wide as those of real models take the same CPU kernels."""
    folder = save_tiny(tmp_path_factory.mktemp("llama"))
    tiny_model(hidden_size=64, intermediate_size=96, head_dim=32).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 8, 16])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (1536, 576), (576, 1536)])
def test_a_product_has_the_bits_of_one_adapter_in_a_long_row(
    inputs: int, outputs: int, rank: int, dtype: torch.dtype
) -> None:
    """At the shapes of a real model, whatever the number of adapters."""
    torch.manual_seed(rank)
    rows = torch.randn(256, inputs).to(dtype)
    for count in (2, 64):
        a = [(torch.randn(rank, inputs) / 24).to(dtype) for _ in range(count)]
        b = [torch.randn(outputs, rank).to(dtype) for _ in range(count)]
        x = torch.randn(count, ROWS, inputs).to(dtype)
        seen = products(products(x, a), b)
        for number in range(0, count, 9):
            row = torch.cat([x[number], rows])
            alone = F.linear(F.linear(row, a[number]), b[number])
            assert torch.equal(seen[number], alone[:ROWS])


def test_each_token_gets_the_term_of_its_adapter_and_padding_none() -> None:
    spans = [("x", 2), (None, 1), ("y", 1), ("x", 1), ("z", 9)]
    found = list(bundles(spans, {"x": "kind", "y": "kind", "z": "kind"}.__getitem__, CPU))
    assert [b.adapters for b in found] == [("x", "y"), ("z",)]  # z fills more rows
    assert found[0].rows.tolist() == [0, 1, 4, 3]
    assert found[0].gather.tolist() == [0, 1, 4, 0, 0, 0, 0, 0] + [3] * 8
    assert found[0].kept.tolist() == [0, 1, 2, 8]
    assert found[1].rows.tolist() == list(range(5, 14)) and len(found[1].gather) == 16
    output, inputs = torch.zeros(1, 16, 1), torch.ones(1, 16, 1)
    values = {"x": 1.0, "y": float("nan"), "z": 3.0}
    for bundle in found:
        a = [torch.tensor([[values[name]]]) for name in bundle.adapters]
        Term(bundle, a, [torch.ones(1, 1)] * len(a), 2.0).add(inputs, output)
    assert output[0, :5, 0].nan_to_num(nan=-1).tolist() == [2, 2, 0, -1, 2]
    assert output[0, 5:, 0].tolist() == [6.0] * 9 + [0, 0]
    term = Term(found[1], [torch.ones(1, 1)], [torch.ones(1, 1)], 1.0)
    term.add(inputs[:, :0], output[:, :0])  # no logits are asked for
    with pytest.raises(EngineError, match="sees 3 of 16 tokens"):
        term.add(inputs[:, :3], output[:, :3])


# ---------------------------------------------------------------- a host


async def several(host: EmbeddedHost, specs: Sequence[LoraSpec] = SPECS) -> list[str]:
    """The base and a snapshot of each, with noise for weights."""
    names = [""]
    for number, spec in enumerate(specs):
        await host.create(f"a{number}", spec, seed=number)
        names.append(await host.snapshot(f"a{number}"))
        flat = host._bank.snapshots[names[-1]].adapter.flat
        generator = torch.Generator().manual_seed(number)
        with torch.inference_mode():
            flat.copy_(0.1 * torch.randn(flat.shape, generator=generator))
    return names


def poison(host: EmbeddedHost, name: str, value: float) -> None:
    with torch.inference_mode():
        host._bank.snapshots[name].adapter.flat[::7] = value


async def drawn(host: EmbeddedHost, asked: Sequence[tuple[str, int, int]]) -> list:
    """Of (weights, seed, tokens), at once."""
    async with held(host):
        drawing = asyncio.gather(
            *(
                generate(
                    From(host, name),
                    prompt(seed % 7, 3 + 9 * (seed % 5)),
                    SamplingParams(max_tokens=count, temperature=1.0, seed=seed),
                )
                for name, seed, count in asked
            ),
            return_exceptions=True,
        )
    return await drawing


def only_lost(
    name: str, asked: Sequence[tuple[str, int, int]], seen: list, expected: list, message: str
) -> None:
    """Those under the weights `name` ended with this error, all others as expected."""
    for (weights, _, _), one, before in zip(asked, seen, expected, strict=True):
        if weights == name:
            assert isinstance(one, EngineError) and message in str(one)
        else:
            assert same(one, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_mixed_batch_is_bitwise_each_alone(folder: Path, dtype: str) -> None:
    """Ranks, scales, targets and the base, in prefill and in decoding, few and many of each."""
    host = open_host(folder, dtype=dtype)
    names = await several(host)
    counts = (2, 10, 1, 3, 2, 1)
    asked = [(n, 10 * i + k, 4 + k) for i, n in enumerate(names) for k in range(counts[i])]
    together = await drawn(host, asked)
    for name in names:
        host._scheduler.weights_changed(name)  # nothing is found in the cache
    for one, (name, seed, count) in zip(together, asked, strict=True):
        (alone,) = await drawn(host, [(name, seed, count)])
        assert same(one, alone)
    assert len({tuple(c.token_ids) for c in together}) == len(asked)
    host.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_an_adapter_that_is_not_finite_ends_its_own_requests_only(
    folder: Path, value: float
) -> None:
    host = open_host(folder, dtype="float32")
    names = await several(host, SPECS[:3])
    asked = [(name, seed, 12) for name in names for seed in range(3)]
    expected = await drawn(host, asked)
    poison(host, names[1], value)
    for name in names:
        host._scheduler.weights_changed(name)
    for _ in range(2):  # the second time in places where the diverged ones were
        seen = await drawn(host, asked)
        only_lost(names[1], asked, seen, expected, "not finite")
    host.close()


async def test_a_pass_that_breaks_ends_those_whose_fault_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = open_host(folder, dtype="float32")
    names = await several(host, SPECS[:3])
    asked = [(name, seed, 12) for name in names for seed in range(2)]
    expected = await drawn(host, asked)
    ready = host._bank._ready

    def broken(name: str) -> object:
        if name == names[2]:
            raise RuntimeError("cannot be brought back")
        return ready(name)

    monkeypatch.setattr(host._bank, "_ready", broken)
    seen = await drawn(host, asked)
    only_lost(names[2], asked, seen, expected, "cannot be brought back")
    assert host.stats().running == 0
    host.close()


async def test_a_fault_in_drawing_ends_only_those_it_was_drawn_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = open_host(folder, dtype="float32")
    names = await several(host, SPECS[:3])
    asked = [(name, 10 * i + seed, 12) for i, name in enumerate(names) for seed in range(2)]
    expected = await drawn(host, asked)

    def broken(logits: Any, draws: Sequence[Draw], rows: Sequence[int]) -> Drawn:
        if any(20 <= draw.seed < 30 for draw in draws):
            raise RuntimeError("drawn badly")
        return sample(logits, draws, rows)

    monkeypatch.setattr(scheduler, "sample", broken)
    seen = await drawn(host, asked)
    only_lost(names[2], asked, seen, expected, "drawn badly")
    host.close()


async def test_releasing_one_of_a_mixed_batch_leaves_the_others(folder: Path) -> None:
    host = open_host(folder, dtype="float32")
    names = await several(host, SPECS[:3])
    asked = [(name, seed, 25) for name in names for seed in range(2)]
    expected = await drawn(host, asked)
    longer = [(name, seed, 400 if name == names[1] else 25) for name, seed, _ in asked]
    passes: list[int] = []
    in_the_middle, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        passes.append(1)
        if len(passes) == 10:
            in_the_middle.set()
            assert go_on.wait(20)

    host._bank._layers.model.register_forward_pre_hook(hold)
    running = asyncio.create_task(drawn(host, longer))
    assert await asyncio.to_thread(in_the_middle.wait, 20)
    assert host.stats().running == len(asked)
    releasing = asyncio.create_task(host.release(names[1]))
    await asyncio.sleep(0)
    go_on.set()
    await releasing
    seen = await running
    only_lost(names[1], asked, seen, expected, "were released")
    host.close()


async def test_more_adapters_than_fit_take_turns_and_change_nothing(folder: Path) -> None:
    roomy = open_host(folder, dtype="float32")
    names = await several(roomy)
    asked = [(name, seed, 10) for name in names for seed in range(2)]
    expected = await drawn(roomy, asked)
    size = max(s.nbytes for s in roomy._bank.snapshots.values())
    tight = open_host(folder, dtype="float32", adapter_bytes=int(1.5 * size))
    assert await several(tight) == names
    assert not tight._bank.fits(names) and tight._bank.fits(["", names[3], names[4]])
    seen = await drawn(tight, asked)
    assert all(same(a, b) for a, b in zip(seen, expected, strict=True))
    stats = tight.stats()
    assert stats.swaps > 0 and stats.resident_bytes <= 1.5 * size
    for host in (roomy, tight):
        host.close()


async def test_sequences_of_all_adapters_take_as_many_passes_as_one(folder: Path) -> None:
    host = open_host(folder, dtype="float32")
    names = await several(host)
    passes: list[int] = []
    model = host._bank._layers.model
    model.register_forward_hook(lambda *_: passes.append(1))
    await drawn(host, [(names[1], seed, 10) for seed in range(6)])
    of_one = len(passes)
    await drawn(host, [(name, seed, 10) for seed, name in enumerate(names)])
    assert len(passes) - of_one <= of_one + 2
    host.close()
