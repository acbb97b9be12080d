"""The three states of the weights, which models are refused, and what a resume restores."""

from __future__ import annotations

import resource
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, MambaConfig

from astuner.engine.embedded import compatible
from astuner.engine.embedded.weights import LoraSpec, Weights
from astuner.engine.protocol import AdamParams, LossSpec
from astuner.errors import CheckpointError, ModelError

from .test_learner import group, one_step, plain_logits
from .tiny import VOCAB, tiny_model
from .tiny_training import drain, learner, load_tiny, save_tiny

pytestmark = pytest.mark.timeout(60)

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])
LORA = LoraSpec(rank=4, alpha=8)
MODES = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


def logits(state: Any) -> torch.Tensor:
    with state as model:
        return plain_logits(model, IDS).detach().clone()


# ---------------------------------------------------------------- states


def test_facts_of_the_model(folder: Path) -> None:
    weights = load_tiny(folder)
    assert (weights.num_layers, weights.num_kv_heads, weights.head_dim) == (2, 2, 8)
    assert (weights.vocab_size, weights.max_context, weights.version) == (VOCAB, 512, 0)
    assert (weights.device.type, weights.dtype) == ("cpu", torch.float32)
    assert weights.tokenizer.eos_token_id == 2


@MODES
def test_training_shows_in_sampling_only_once_published(
    folder: Path, lora: LoraSpec | None
) -> None:
    weights = load_tiny(folder, lora=lora)
    mine = learner(weights)
    start = logits(weights.sampling())
    assert torch.equal(start, logits(weights.training()))
    assert torch.equal(start, logits(weights.reference()))
    one_step(mine, group())
    trained = logits(weights.training())
    assert (trained - start).abs().max() > 1e-3
    assert torch.equal(start, logits(weights.sampling()))
    assert weights.publish() == weights.version == 1
    assert torch.equal(trained, logits(weights.sampling()))
    assert torch.equal(start, logits(weights.reference()))


def test_the_reference_is_the_base_without_adapter(folder: Path) -> None:
    weights = load_tiny(folder)
    one_step(learner(weights), group())
    base = tiny_model(attention="sdpa")(input_ids=IDS).logits[0]
    torch.testing.assert_close(logits(weights.reference()), base, atol=1e-4, rtol=1e-4)


def test_states_set_the_mode_of_autograd_and_nest(folder: Path) -> None:
    weights = load_tiny(folder)
    one_step(learner(weights), group())
    trained, published = logits(weights.training()), logits(weights.sampling())
    with weights.training() as model:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        with weights.sampling():
            assert torch.is_inference_mode_enabled()
            assert torch.equal(plain_logits(model, IDS), published)
        with weights.reference():
            assert not torch.is_grad_enabled()
        assert torch.equal(plain_logits(model, IDS), trained)


def test_the_seed_decides_the_adapter(folder: Path) -> None:
    def adapter(seed: int) -> torch.Tensor:
        weights = Weights.load(folder, device="cpu", dtype="float32", lora=LORA, seed=seed)
        return torch.cat([p.flatten() for p in weights.states.trained().values()])

    torch.manual_seed(99)
    first = adapter(1)
    assert torch.equal(first, adapter(1))
    assert not torch.equal(first, adapter(2))


def test_target_modules_by_name(folder: Path) -> None:
    weights = load_tiny(folder, lora=LoraSpec(rank=2, alpha=2, target_modules="q_proj, v_proj"))
    names = {n.split(".")[-3] for n in weights.states.trained()}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match=r"target_modules does not fit .*nonsense"):
        load_tiny(folder, lora=LoraSpec(target_modules="nonsense"))


def test_parameters_are_in_the_compute_dtype_and_masters_in_float32(folder: Path) -> None:
    weights = Weights.load(folder, device="cpu", dtype="bfloat16", lora=LORA, seed=0)
    mine = learner(weights)
    start = {n: v.clone() for n, v in mine.masters.values().items()}
    for _ in range(4):  # far smaller than a bfloat16 step of A: only a master keeps it
        drain(mine.forward_backward(group(), LossSpec("pg")))
        mine.optim_step(AdamParams(lr=1e-6))
    with weights.training() as model:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    moved = [n for n, v in mine.masters.values().items() if not torch.equal(v, start[n])]
    assert {v.dtype for v in mine.masters.values().values()} == {torch.float32}
    assert len(moved) == len(start)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sliding_window": 256}, r"sliding_attention over 256 tokens, fewer than its context"),
        ({"sliding_window": 512}, None),
        ({"sliding_window": 256, "use_sliding_window": False}, None),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "sliding"),
        ({"layer_types": ["full_attention", "linear_attention"]}, r"\['linear_attention'\]"),
        ({"attention_chunk_size": 64, "layer_types": ["chunked_attention"] * 2}, "chunked"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0"),
    ],
)
def test_attention_that_the_plans_do_not_compute(
    fields: dict[str, Any], reason: str | None
) -> None:
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=512)
    for name, value in fields.items():
        setattr(config, name, value)
    if reason is None:
        compatible.check_config(config, Path("x"))
    else:
        with pytest.raises(ModelError, match=reason):
            compatible.check_config(config, Path("x"))


def test_a_config_without_a_context_length() -> None:
    with pytest.raises(ModelError, match="names no context length"):
        compatible.check_config(MambaConfig(), Path("x"))


def test_longrope_keeps_to_the_context_in_which_its_frequencies_are_fixed() -> None:
    config = LlamaConfig(max_position_embeddings=512)
    assert compatible.context_length(config) == 512
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert compatible.context_length(config) == 64


def test_sinks_and_models_with_attention_of_their_own() -> None:
    model = tiny_model()
    compatible.check_model(model, Path("x"))
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ModelError, match="attention sinks"):
        compatible.check_model(model, Path("x"))
    with pytest.raises(ModelError, match="Linear does not use transformers' attention"):
        compatible.check_model(torch.nn.Linear(1, 1), Path("x"))


def test_a_folder_that_does_not_load(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="transformers cannot load the model"):
        load_tiny(tmp_path)


def test_device_and_dtype_by_name() -> None:
    cpu = torch.device("cpu")
    assert compatible.choose_device("cpu") == cpu
    assert compatible.choose_dtype("float32", cpu) == torch.float32
    assert compatible.choose_dtype("auto", cpu) in {torch.float32, torch.bfloat16}
    with pytest.raises(ModelError, match="'half'"):
        compatible.choose_dtype("half", cpu)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match=r"model\.device is 'cuda'"):
            compatible.choose_device("cuda")
    with pytest.raises(ModelError, match=r"model\.device is 'toaster'"):
        compatible.choose_device("toaster")


# ---------------------------------------------------------------- save, load, resume


@MODES
def test_resumed_steps_are_bitwise_those_of_an_uninterrupted_run(
    folder: Path, lora: LoraSpec | None, tmp_path: Path
) -> None:
    straight = learner(load_tiny(folder, lora=lora))
    weights = load_tiny(folder, lora=lora)
    first = learner(weights)
    for _ in range(2):
        one_step(straight, group())
        one_step(first, group())
        weights.publish()
    drain(first.forward_backward(group(), LossSpec("pg")))  # a gradient that is not saved
    first.save(tmp_path, optimizer=True)
    resumed_weights = load_tiny(folder, lora=lora)
    resumed = learner(resumed_weights)
    one_step(resumed, group())  # forgotten by loading
    resumed.load(tmp_path, optimizer=True)
    assert resumed_weights.version == weights.version == 2
    assert torch.equal(logits(resumed_weights.sampling()), logits(resumed_weights.training()))
    for mine in (straight, resumed):
        for _ in range(2):
            one_step(mine, group())
    expected = straight.masters.values()
    assert all(torch.equal(v, expected[n]) for n, v in resumed.masters.values().items())
    assert resumed.masters.moments()["step"] == 4


def test_peft_loads_what_is_saved(folder: Path, tmp_path: Path) -> None:
    weights = load_tiny(folder)
    mine = learner(weights)
    one_step(mine, group())
    mine.save(tmp_path, optimizer=False)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {v.dtype for v in saved.values()} == {torch.float32}
    tuned = PeftModel.from_pretrained(tiny_model(attention="sdpa"), str(tmp_path))
    torch.testing.assert_close(
        tuned(input_ids=IDS).logits[0], logits(weights.training()), atol=1e-4, rtol=1e-4
    )


def test_full_weights_are_saved_as_a_transformers_folder(folder: Path, tmp_path: Path) -> None:
    weights = load_tiny(folder, lora=None)
    mine = learner(weights)
    one_step(mine, group())
    mine.save(tmp_path, optimizer=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert saved.config._attn_implementation == "sdpa"
    torch.testing.assert_close(
        saved(input_ids=IDS).logits[0], logits(weights.training()), atol=1e-4, rtol=1e-4
    )
    again = load_tiny(folder, lora=None)
    learner(again).load(tmp_path, optimizer=False)
    assert again.version == 1
    assert torch.equal(logits(again.sampling()), logits(weights.training()))


def test_loading_without_the_optimizer_forgets_its_moments(folder: Path, tmp_path: Path) -> None:
    mine = learner(load_tiny(folder))
    one_step(mine, group())
    mine.save(tmp_path, optimizer=False)
    mine.load(tmp_path, optimizer=False)
    assert mine.masters.moments() == {}


def test_a_checkpoint_of_other_settings_says_so(folder: Path, tmp_path: Path) -> None:
    learner(load_tiny(folder)).save(tmp_path, optimizer=True)
    other = learner(load_tiny(folder, lora=LoraSpec(rank=2, alpha=8)))
    with pytest.raises(CheckpointError, match=r"should be \(2, 32\), but it holds \(4, 32\)"):
        other.load(tmp_path, optimizer=True)
    fewer = learner(load_tiny(folder))
    learner(load_tiny(folder, lora=LoraSpec(4, 8, "q_proj"))).save(tmp_path, optimizer=False)
    with pytest.raises(CheckpointError, match="but it holds nothing"):
        fewer.load(tmp_path, optimizer=False)


def test_a_checkpoint_that_is_missing_or_cut_off(folder: Path, tmp_path: Path) -> None:
    mine = learner(load_tiny(folder))
    with pytest.raises(CheckpointError, match="cannot be read"):
        mine.load(tmp_path / "nowhere", optimizer=True)
    mine.save(tmp_path, optimizer=True)
    file = tmp_path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        mine.load(tmp_path, optimizer=True)


@contextmanager
def files_end_after(size: int) -> Generator[None]:
    """A full disk: every write beyond `size` bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@MODES
def test_a_full_disk_leaves_the_old_checkpoint_whole(
    folder: Path, lora: LoraSpec | None, tmp_path: Path
) -> None:
    mine = learner(load_tiny(folder, lora=lora))
    one_step(mine, group())
    mine.save(tmp_path, optimizer=True)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    one_step(mine, group())
    with files_end_after(10_000), pytest.raises(CheckpointError, match=r"MB are free .* Make room"):
        mine.save(tmp_path, optimizer=True)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_family_with_other_layers_and_learned_positions(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)
    ).save_pretrained(tmp_path)
    weights = load_tiny(tmp_path)
    one_step(learner(weights), group())
    assert (weights.num_kv_heads, weights.head_dim, weights.max_context) == (4, 8, 64)
