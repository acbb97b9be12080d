"""What users of the official SDK do works with a real server, in both versions of it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ports import held_port
from tests.service.sdk.conftest import KEYS, Sdk, keys
from tests.service.server import Server, tiny_server

pytestmark = [pytest.mark.tinker, pytest.mark.timeout(240)]
ALICE = KEYS["alice"]
FP32 = 1e-5


def close(a: Any, b: Any) -> float:
    """The largest difference."""
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())


def test_quick_start(sdk: Sdk, server: Server) -> None:
    seen = sdk.do("quick_start", server.url, key=ALICE)
    assert seen["sdk"].startswith(sdk.version) and not seen["aborts_at_exit"]
    assert (seen["model"], seen["context"], seen["info"]) == ("tiny", 1024, ["tiny", True, 8])
    assert seen["losses"][0] > seen["losses"][1] > seen["losses"][2] > 0
    run, kind, name = seen["state"].removeprefix("tinker://").split("/")
    assert (kind, name) == ("weights", "after-3")
    assert seen["weights"] == f"tinker://{run}/sampler_weights/after-3"
    assert [len(tokens) for tokens in seen["sampled"]] == [8, 8, 8]
    assert seen["sampled_again"] == seen["sampled"]
    assert len({tuple(tokens) for tokens in seen["sampled"]}) == 3
    assert seen["stop_reasons"] == ["length"] * 3
    # The same numbers from the sampler, from scoring, and from the trainer.
    assert seen["scored"][0] is None and len(seen["scored"]) == 14
    assert close(seen["scored"][6:], seen["sample_logprobs"]) < FP32
    assert close(seen["scored"][1:], seen["trainer_logprobs"]) < FP32
    assert close(seen["base_scored"][1:], seen["scored"][1:]) > 0.1
    assert seen["prompt_logprobs"] == seen["scored"][:6]
    for row, logprob in zip(seen["topk"][1:], seen["scored"][1:6], strict=True):
        assert len(row) == 2 and row[0][1] >= row[1][1]
        assert row[0][1] >= logprob - FP32
    assert seen["direct"] == seen["sampled"][0]
    assert seen["base_model"] == "tiny"


def test_it_connects_as_the_server_says(sdk: Sdk, server: Server) -> None:
    """With the line for its version, and no warning that it is old."""
    told = [line.strip() for line in server.output().splitlines() if line.startswith("    ")]
    command = told[2 if sdk.version == "0.25" else 1]
    python = f"{shlex.quote(str(sdk.python))} -W error:DEPRECATED"
    lines = [
        told[0].replace("TINKER_API_KEY=...", f"TINKER_API_KEY={ALICE}"),
        command.replace("python", python, 1),
    ]
    done = subprocess.run(
        ["sh", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "model_name='tiny', max_context_length=1024" in done.stdout


def test_every_loss_is_what_the_api_says_it_is(sdk: Sdk, server: Server) -> None:
    gspo = sdk.version != "0.25"  # that version does not know it
    seen = sdk.do("losses", server.url, key=ALICE, gspo=gspo)["pairs"]
    assert len(seen) == (10 if gspo else 8)
    for name, (ours, documented) in seen.items():
        assert ours == pytest.approx(documented, rel=1e-4), name


def test_a_custom_loss_has_the_gradient_of_the_built_in_one(sdk: Sdk, server: Server) -> None:
    seen = sdk.do("custom_loss", server.url, key=ALICE)
    assert seen["own"]["own"] == pytest.approx(2 * seen["built_in"], rel=1e-5)
    for built_in, own in zip(seen["after_built_in"], seen["after_own"], strict=True):
        assert close(built_in, own) < FP32


def test_supervised_fine_tuning_lowers_the_loss(sdk: Sdk, server: Server) -> None:
    losses = sdk.do("supervised", server.url, key=ALICE)["losses"]
    assert losses[-1] < 0.2 * losses[0]


def test_grpo_raises_the_reward(sdk: Sdk, server: Server) -> None:
    rewards = sdk.do("grpo", server.url, key=ALICE, steps=12)["rewards"]
    assert np.mean(rewards[:2]) < 0.7 and np.mean(rewards[-2:]) > 0.9


def test_the_rest_client(sdk: Sdk, server: Server) -> None:
    seen = sdk.do("rest", server.url, key=ALICE)
    assert all(seen[name] for name in ("run", "runs", "session", "sessions"))
    assert (seen["by_path"], seen["info"]) == ("tiny", 8)
    assert seen["listed"] == [["sampler_weights/two", "sampler"], ["weights/one", "training"]]
    assert all(size > 1000 for size in seen["sizes"])
    assert (seen["public"], seen["expires"]) == (True, True)
    assert (seen["public_later"], seen["expires_later"]) == (False, False)
    assert seen["user_checkpoints"] == seen["paths"] and len(seen["paths"]) == 2
    assert seen["left"] == 0


def test_tenants_at_once_have_weights_of_their_own(sdk: Sdk, server: Server) -> None:
    tokens = [50, 60, 71]
    seen = sdk.do("tenants", server.url, keys=KEYS, tokens=tokens)
    runs = [set(seen[name]["runs"]) for name in KEYS]
    assert not (runs[0] & runs[1] or runs[0] & runs[2] or runs[1] & runs[2])
    for name, token in zip(KEYS, tokens, strict=True):
        of = seen[name]
        assert of["losses"][-1] < 0.05 * of["losses"][0]
        assert of["base"] == pytest.approx(-of["losses"][0], abs=1e-4)  # untouched by all three
        learned = of["own"].pop(str(token))
        assert learned > -0.1
        assert all(other < -5 for other in of["own"].values()), of["own"]
    seconds, _, message = seen["foreign"]
    assert seconds < 20 and "404" in message and "There is no checkpoint" in message


# ---------------------------------------------------------------- a server that is killed


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as port:
        yield port


def test_training_goes_on_bitwise_after_sigkill(
    sdk: Sdk, tiny_model_dir: Path, tmp_path: Path, port: int
) -> None:
    """A new client resumes from the saved state; one that lived through it just goes on."""
    alive = None
    overrides = [*keys(), f"port={port}"]
    try:
        with tiny_server(tiny_model_dir, tmp_path, *overrides) as server:
            kept = sdk.do("keep", server.url, key=ALICE)
            alive = sdk.start("live_through", server.url, key=ALICE)
            assert alive.stdout is not None and alive.stdin is not None
            assert alive.stdout.readline() == "saved\n"
            server.kill()
        with tiny_server(tiny_model_dir, tmp_path, *overrides) as server:
            alive.stdin.write("go on\n")
            alive.stdin.flush()
            assert sdk.finish(alive)["next"] == kept["next"]
            resumed = sdk.do("resume", server.url, key=ALICE, state=kept["state"])
    finally:
        if alive is not None:
            alive.kill()
            alive.wait(10)
    assert resumed["with_optimizer"] == kept["next"]
    assert resumed["without"][0] == kept["next"][0]  # the same weights,
    assert resumed["without"][1] != kept["next"][1]  # but not the same step from there
    assert kept["run"] in resumed["runs"]


# ---------------------------------------------------------------- trouble

SHOWN = {
    "key": "The API key is not known here",
    "model": "'gpt-9' is not served here; 'tiny' is",
    "rank": "The LoRA rank must be from 1 to 256",
    "no model": "'gpt-9' is not served here",
    "no state": "There is no checkpoint tinker://",
    "no weights": "There is no checkpoint tinker://",
    "not a path": "is no checkpoint path of this service",
    "nan": "Datum 0: weights[1] is nan, not a finite number.",
    "overflow": "on the samples ['datum 0']. The gradient since the last step was dropped.",
    "token": "Datum 0 has the token id 1000000; the model's ids are 0 to",
    "long": "Datum 0 has 1029 tokens; the model's context is 1024.",
    "lacks": "Datum 0 lacks logprobs and advantages, which the loss 'ppo' reads.",
    "config": "The loss 'ppo' has no parameter 'clip'. It has: clip_low_threshold,",
    "lr": "The optimizer cannot use learning_rate=-1.0",
    "name": "'../../escape' cannot name a checkpoint: use letters, digits,",
    "prompt": "The prompt has 1024 tokens; the model's context is 1024",
    "temperature": "The sampler cannot use temperature=-1.0.",
}


def test_what_is_wrong_is_shown_at_once(sdk: Sdk, server: Server) -> None:
    """And not after minutes, as it is with errors that the SDK takes for the server's."""
    seen = sdk.do("trouble", server.url, key=KEYS["bob"])
    assert seen.pop("fine afterwards")[1] == ""
    assert set(seen) == set(SHOWN)
    for name, (seconds, kind, message) in seen.items():
        assert kind, f"{name} was accepted: {message}"
        assert SHOWN[name] in message, f"{name}: {message}"
        assert seconds < 20, f"{name} took {seconds:.1f} s"
