"""What users of the official SDK do with a server.

    PYTHON scenarios.py NAME URL '{"key": "tml-...", ...}'

PYTHON is one in whose environment the SDK is, and nothing of ours; the last line printed is
a JSON object of what was seen. Nothing is judged here. What differs between versions of the
SDK is in `now` and `rest_client`.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tinker
from tinker import types

MODEL = "tiny"
TEXTS = ["the cat sat on the mat", "a stitch in time saves nine", "to be or not to be"]


def now(thing: Any) -> Any:
    """A client: newer SDKs give a future of one, older ones the client itself."""
    return thing.result() if hasattr(thing, "result") else thing


def connect(url: str, key: str) -> Any:
    return tinker.ServiceClient(base_url=url, api_key=key)


def rest_client(url: str, key: str) -> Any:
    """Newer SDKs have one without a session, which an older one's service client makes."""
    if hasattr(tinker, "RestClient"):
        return tinker.RestClient(base_url=url, api_key=key)
    return connect(url, key).create_rest_client()


def prompt(ids: Sequence[int]) -> Any:
    return types.ModelInput.from_ints(list(ids))


def datum(ids: Sequence[int], **inputs: Any) -> Any:
    """Position i predicts token i + 1."""
    arrays = {name: np.asarray(values, np.float32) for name, values in inputs.items()}
    targets = np.asarray(ids[1:], np.int64)
    return types.Datum(
        model_input=prompt(ids[:-1]), loss_fn_inputs={"target_tokens": targets, **arrays}
    )


def logprobs_of(output: Any, index: int = 0) -> np.ndarray:
    return np.asarray(output.loss_fn_outputs[index]["logprobs"].tolist(), np.float64)


def adam(lr: float = 1e-2) -> Any:
    return types.AdamParams(learning_rate=lr)


def params(**more: Any) -> Any:
    return types.SamplingParams(**{"max_tokens": 8, "temperature": 1.0, "seed": 7, **more})


def new_run(client: Any, seed: int = 1, rank: int = 8) -> Any:
    return now(client.create_lora_training_client(base_model=MODEL, rank=rank, seed=seed))


def texts(training: Any) -> list[Any]:
    tokenizer = training.get_tokenizer()
    return [datum(ids, weights=np.ones(len(ids) - 1)) for ids in map(tokenizer.encode, TEXTS)]


def train(training: Any, data: list[Any], steps: int) -> list[float]:
    """The loss before each step. Both requests of a step are on their way before it waits."""
    losses: list[float] = []
    for _ in range(steps):
        forward = training.forward_backward(data, "cross_entropy")
        step = training.optim_step(adam())
        losses.append(forward.result().metrics["loss:sum"])
        step.result()
    return losses


# ---------------------------------------------------------------- the quick start


def quick_start(url: str, given: dict[str, Any]) -> dict[str, Any]:
    client = connect(url, given["key"])
    asked = rest_client(url, given["key"]) if hasattr(tinker, "RestClient") else client
    model = now(asked.get_server_capabilities()).supported_models[0]
    training = new_run(client)
    info = training.get_info()
    tokenizer = training.get_tokenizer()
    ids = tokenizer.encode("hello world, how are you?")
    losses = train(training, [datum(ids, weights=np.ones(len(ids) - 1))], 3)
    seen: dict[str, Any] = {
        "sdk": tinker.__version__,
        "aborts_at_exit": "pyqwest" in sys.modules,
        "model": model.model_name,
        "context": model.max_context_length,
        "info": [info.model_data.model_name, info.is_lora, info.lora_rank],
        "losses": losses,
        "state": training.save_state("after-3").result().path,
        "weights": training.save_weights_for_sampler("after-3").result().path,
    }
    sampler = now(client.create_sampling_client(model_path=seen["weights"]))
    drawn = sampler.sample(prompt(ids[:6]), num_samples=3, sampling_params=params()).result()
    again = sampler.sample(prompt(ids[:6]), num_samples=3, sampling_params=params()).result()
    seen["sampled"] = [list(s.tokens) for s in drawn.sequences]
    seen["sampled_again"] = [list(s.tokens) for s in again.sequences]
    seen["stop_reasons"] = [str(s.stop_reason) for s in drawn.sequences]
    whole = [*ids[:6], *drawn.sequences[0].tokens]
    seen["sample_logprobs"] = list(drawn.sequences[0].logprobs)
    seen["scored"] = sampler.compute_logprobs(prompt(whole)).result()
    seen["trainer_logprobs"] = logprobs_of(
        training.forward([datum(whole, weights=np.ones(len(whole) - 1))], "cross_entropy").result()
    ).tolist()
    detailed = sampler.sample(
        prompt(ids[:6]),
        num_samples=1,
        sampling_params=params(),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
    ).result()
    seen["prompt_logprobs"] = detailed.prompt_logprobs
    seen["topk"] = detailed.topk_prompt_logprobs
    direct = now(training.save_weights_and_get_sampling_client())
    seen["direct"] = list(direct.sample(prompt(ids[:6]), 1, params()).result().sequences[0].tokens)
    base = now(client.create_sampling_client(base_model=MODEL))
    seen["base_scored"] = base.compute_logprobs(prompt(whole)).result()
    seen["base_model"] = base.get_base_model()
    return seen


# ---------------------------------------------------------------- losses


def expected(loss: str, lp: np.ndarray, old: np.ndarray, a: np.ndarray, low: float, high: float):
    """The loss as the API's documentation writes it, over one sequence."""
    ratio = np.exp(lp - old)
    if loss == "gspo":
        ratio = np.full_like(ratio, np.exp((lp - old)[a != 0].mean()))
    if loss in ("ppo", "gspo"):
        return -np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum()
    if loss == "cispo":
        return -(np.clip(ratio, low, high) * a * lp).sum()
    if loss == "dro":
        return -(a * lp - 0.5 * low * (lp - old) ** 2).sum()
    assert loss == "importance_sampling"
    return -(ratio * a).sum()


CASES: list[tuple[str, dict[str, float], float, float]] = [
    ("importance_sampling", {}, 0, 0),
    ("ppo", {}, 0.8, 1.2),
    ("ppo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.02}, 0.95, 1.02),
    ("cispo", {}, 0.0, 4.0),
    ("cispo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, 0.9, 1.1),
    ("dro", {}, 0.05, 0),
    ("dro", {"beta": 0.5}, 0.5, 0),
    ("gspo", {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01}, 0.99, 1.01),
]


def losses(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every loss: what the server says, and what the logprobs that it gives come to here."""
    client = connect(url, given["key"])
    training = new_run(client)
    ids = training.get_tokenizer().encode(TEXTS[1])
    n = len(ids) - 1
    forward = training.forward([datum(ids, weights=np.ones(n))], "cross_entropy").result()
    lp = logprobs_of(forward)
    noise = 0.3 * np.sin(np.arange(n))
    a = np.where(np.arange(n) < 3, 0, np.cos(np.arange(n)))
    weights = np.linspace(-1, 2, n)  # negative ones too
    ce = training.forward_backward([datum(ids, weights=weights)], "cross_entropy").result()
    pairs = {"cross_entropy": [ce.metrics["loss:sum"], float(-(weights * lp).sum())]}
    data = [datum(ids, logprobs=lp + noise, advantages=a)]
    marked = [
        datum(ids, logprobs=lp + noise, advantages=a, sequence_ratio_mask=(a != 0).astype(float))
    ]
    for loss, config, low, high in CASES:
        if loss == "gspo" and not given["gspo"]:
            continue
        for which in [data, marked] if loss == "gspo" else [data]:
            done = training.forward_backward(which, loss, config or None).result()
            name = f"{loss} {config} {len(which[0].loss_fn_inputs)}"
            pairs[name] = [
                done.metrics["loss:sum"],
                float(expected(loss, lp, lp + noise, a, low, high)),
            ]
            assert np.allclose(logprobs_of(done), lp, atol=1e-4), name
    return {"pairs": pairs}


def custom_loss(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """A loss of the user's own against a built-in one that is the same."""
    client = connect(url, given["key"])
    built_in, own = new_run(client, seed=3), new_run(client, seed=3)
    data = texts(built_in)
    weights = [np.linspace(0.5, 1.5, d.model_input.length) for d in data]
    ids = [[*d.model_input.to_ints(), int(d.loss_fn_inputs["target_tokens"].tolist()[-1])]
           for d in data]  # fmt: skip
    weighted = [datum(i, weights=w) for i, w in zip(ids, weights, strict=True)]

    def loss(data: Any, logprobs: Any) -> Any:
        import torch

        total = -sum(
            (torch.tensor(w, dtype=lp.dtype) * lp).sum()
            for w, lp in zip(weights, logprobs, strict=True)
        )
        return total, {"own": float(total) * 2}

    first = built_in.forward_backward(weighted, "cross_entropy").result()
    second = own.forward_backward_custom(weighted, loss).result()
    after: list[Any] = []
    for training in (built_in, own):
        training.optim_step(adam()).result()
        out = training.forward(weighted, "cross_entropy").result()
        after.append([logprobs_of(out, i).tolist() for i in range(len(data))])
    return {
        "built_in": first.metrics["loss:sum"],
        "own": second.metrics,
        "after_built_in": after[0],
        "after_own": after[1],
    }


# ---------------------------------------------------------------- learning


def supervised(url: str, given: dict[str, Any]) -> dict[str, Any]:
    training = new_run(connect(url, given["key"]))
    return {"losses": train(training, texts(training), 10)}


def grpo(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """The share of tokens with an even id is the reward. Returns its mean before each step."""
    client = connect(url, given["key"])
    training = new_run(client)
    ids = training.get_tokenizer().encode("say something even")
    rewards: list[float] = []
    for step in range(given["steps"]):
        sampler = now(training.save_weights_and_get_sampling_client())
        request = params(max_tokens=6, seed=step)
        drawn = sampler.sample(prompt(ids), 16, request).result().sequences
        scores = np.array([np.mean([t % 2 == 0 for t in s.tokens]) for s in drawn])
        rewards.append(float(scores.mean()))
        advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
        data = [rollout(ids, s, a) for s, a in zip(drawn, advantages, strict=True)]
        training.forward_backward(data, "importance_sampling")
        training.optim_step(adam(3e-2)).result()
    return {"rewards": rewards}


def rollout(ids: Sequence[int], sequence: Any, advantage: float) -> Any:
    """Prompt and reply as one datum; only the reply has advantages."""
    before = np.zeros(len(ids) - 1)
    return datum(
        [*ids, *sequence.tokens],
        logprobs=np.concatenate([before, sequence.logprobs]),
        advantages=np.concatenate([before, np.full(len(sequence.tokens), advantage)]),
    )


# ---------------------------------------------------------------- what is kept


def keep(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """Train, save, and go on for one step, which is what a resumed run will be held to."""
    client = connect(url, given["key"])
    training = new_run(client)
    data = texts(training)
    train(training, data, 3)
    state = training.save_state("kept").result().path
    return {"state": state, "next": train(training, data, 2), "run": training.model_id}


def resume(url: str, given: dict[str, Any]) -> dict[str, Any]:
    client = connect(url, given["key"])
    whole = now(client.create_training_client_from_state_with_optimizer(given["state"]))
    bare = now(client.create_training_client_from_state(given["state"]))
    return {
        "with_optimizer": train(whole, texts(whole), 2),
        "without": train(bare, texts(bare), 2),
        "runs": own_runs(client),
    }


def live_through(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """One client all along while the server is killed and started again; it says when it has
    saved, and goes on when it is told to."""
    training = new_run(connect(url, given["key"]))
    data = texts(training)
    train(training, data, 3)
    training.save_state("kept").result()
    print("saved", flush=True)
    sys.stdin.readline()
    return {"next": train(training, data, 2)}


def rest(url: str, given: dict[str, Any]) -> dict[str, Any]:
    client = connect(url, given["key"])
    training = new_run(client)
    train(training, texts(training), 1)
    state = training.save_state("one").result().path
    weights = training.save_weights_for_sampler("two").result().path
    rest = rest_client(url, given["key"])
    run = training.model_id
    listed = rest.list_checkpoints(run).result().checkpoints
    seen: dict[str, Any] = {
        "run": rest.get_training_run(run).result().training_run_id == run,
        "by_path": rest.get_training_run_by_tinker_path(state).result().base_model,
        "runs": run in own_runs(client),
        "info": rest.get_weights_info_by_tinker_path(state).result().lora_rank,
        "listed": sorted([c.checkpoint_id, c.checkpoint_type] for c in listed),
        "sizes": [c.size_bytes for c in listed],
    }
    session = run.split(":")[0]
    seen["session"] = rest.get_session(session).result().training_run_ids == [run]
    seen["sessions"] = session in rest.list_sessions().result().sessions
    rest.set_checkpoint_ttl_from_tinker_path(weights, 3600).result()
    rest.publish_checkpoint_from_tinker_path(weights).result()
    seen["public"] = checkpoint(rest, run, "sampler_weights/two").public
    seen["expires"] = checkpoint(rest, run, "sampler_weights/two").expires_at is not None
    rest.unpublish_checkpoint_from_tinker_path(weights).result()
    rest.set_checkpoint_ttl_from_tinker_path(weights, None).result()
    seen["public_later"] = checkpoint(rest, run, "sampler_weights/two").public
    seen["expires_later"] = checkpoint(rest, run, "sampler_weights/two").expires_at is not None
    everything = rest.list_user_checkpoints().result().checkpoints
    seen["user_checkpoints"] = sorted(c.tinker_path for c in everything if run in c.tinker_path)
    seen["paths"] = sorted([state, weights])
    rest.delete_checkpoint_from_tinker_path(state).result()
    rest.delete_checkpoint(run, "sampler_weights/two").result()
    seen["left"] = len(rest.list_checkpoints(run).result().checkpoints)
    return seen


def own_runs(client: Any) -> list[str]:
    found = client.create_rest_client().list_training_runs().result().training_runs
    return [r.training_run_id for r in found]


def checkpoint(rest: Any, run: str, name: str) -> Any:
    (found,) = [
        c for c in rest.list_checkpoints(run).result().checkpoints if c.checkpoint_id == name
    ]
    return found


# ---------------------------------------------------------------- many


def tenants(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """Each teaches a model of theirs their own token, all at once, under the same names."""
    seen: dict[str, Any] = {}
    start = threading.Barrier(len(given["keys"]))

    def one(name: str, key: str, token: int) -> None:
        client = connect(url, key)
        training = new_run(client, rank=4 + token % 4)
        ids = [5, 6, 7, token]
        base = now(client.create_sampling_client(base_model=MODEL))
        start.wait(60)
        losses = train(training, [datum(ids, weights=[0, 0, 1])], 12)
        path = training.save_weights_for_sampler("mine").result().path
        sampler = now(client.create_sampling_client(model_path=path))
        seen[name] = {
            "losses": losses,
            "path": path,
            "runs": own_runs(client),
            "own": {
                t: sampler.compute_logprobs(prompt([5, 6, 7, t])).result()[-1]
                for t in given["tokens"]
            },
            "base": base.compute_logprobs(prompt(ids)).result()[-1],
        }

    threads = [
        threading.Thread(target=one, args=(name, key, token))
        for (name, key), token in zip(given["keys"].items(), given["tokens"], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = list(given["keys"])
    stranger = connect(url, given["keys"][names[0]])
    path = seen[names[1]]["path"]
    seen["foreign"] = attempt(lambda: now(stranger.create_sampling_client(model_path=path)))
    return seen


# ---------------------------------------------------------------- trouble


def attempt(action: Callable[[], Any]) -> list[Any]:
    """How long it took to fail, and what its user is shown."""
    begun = time.monotonic()
    try:
        found = action()
    except Exception as error:
        return [time.monotonic() - begun, type(error).__name__, str(error)]
    return [time.monotonic() - begun, "", repr(found)]


def trouble(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """Things that go wrong, each with a client that nothing went wrong with before."""
    client = connect(url, given["key"])
    seen: dict[str, Any] = {}

    def with_run(name: str, action: Callable[[Any], Any]) -> None:
        training = new_run(client)
        seen[name] = attempt(lambda: action(training))

    def backward(loss: str, *data: Any, **config: float) -> Callable[[Any], Any]:
        return lambda training: training.forward_backward(list(data), loss, config or None).result()

    fine = datum([1, 2, 3], weights=[1, 1])
    drawn = datum([1, 2, 3], logprobs=[-1, -1], advantages=[1, -1])
    seen["key"] = attempt(lambda: connect(url, "tml-nobody-has-this").get_server_capabilities())
    seen["model"] = attempt(
        lambda: now(client.create_lora_training_client(base_model="gpt-9", rank=8))
    )
    seen["rank"] = attempt(
        lambda: now(client.create_lora_training_client(base_model=MODEL, rank=100_000))
    )
    seen["no model"] = attempt(lambda: now(client.create_sampling_client(base_model="gpt-9")))
    gone = f"tinker://{'0' * 32}:train:0/weights/x"
    seen["no state"] = attempt(lambda: now(client.create_training_client_from_state(gone)))
    seen["no weights"] = attempt(lambda: now(client.create_sampling_client(model_path=gone)))
    seen["not a path"] = attempt(
        lambda: now(client.create_sampling_client(model_path="tinker://../../etc/passwd"))
    )
    with_run("nan", backward("cross_entropy", datum([1, 2, 3], weights=[1, float("nan")])))
    with_run("overflow", backward("cross_entropy", datum([1, 2, 3], weights=[3e38, 3e38])))
    with_run("token", backward("cross_entropy", datum([1, 2, 10**6], weights=[1, 1])))
    with_run("long", backward("cross_entropy", datum([1] * 1030, weights=[1] * 1029)))
    with_run("lacks", backward("ppo", fine))
    with_run("config", backward("ppo", drawn, clip=1.0))
    with_run("lr", lambda training: training.optim_step(adam(-1.0)).result())
    with_run("name", lambda training: training.save_state("../../escape").result())
    base = now(client.create_sampling_client(base_model=MODEL))
    seen["prompt"] = attempt(lambda: base.sample(prompt([1] * 1024), 1, params()).result())
    seen["temperature"] = attempt(
        lambda: base.sample(prompt([1]), 1, params(temperature=-1.0)).result()
    )
    with_run("fine afterwards", backward("cross_entropy", fine))
    return seen


def arithmetic(url: str, given: dict[str, Any]) -> dict[str, Any]:
    """GRPO on sums, over and over: the quickstart with nothing of ours in the client."""
    import re

    client = connect(url, given["key"])
    training = now(client.create_lora_training_client(base_model=MODEL, rank=16, seed=0))
    tokenizer = training.get_tokenizer()

    def encode(question: str) -> list[int]:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)

    def reward(tokens: Sequence[int], answer: str) -> float:
        said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if said == answer:
            return 1.0
        return 0.1 if re.fullmatch(r"-?\d+", said) else 0.0

    tasks = [(encode(question), answer) for question, answer in given["tasks"]]
    means: list[float] = []
    for step in range(given["steps"]):
        sampler = now(training.save_weights_and_get_sampling_client())
        chosen = [tasks[(step * given["batch"] + i) % len(tasks)] for i in range(given["batch"])]
        futures = [
            sampler.sample(prompt(ids), given["repeat"], params(seed=step * 1000 + i))
            for i, (ids, _) in enumerate(chosen)
        ]
        data: list[Any] = []
        seen: list[float] = []
        for (ids, answer), future in zip(chosen, futures, strict=True):
            drawn = future.result().sequences
            scores = np.array([reward(s.tokens, answer) for s in drawn])
            seen += scores.tolist()
            if scores.std() > 0:
                advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
                share = 1 / (given["batch"] * given["repeat"])
                data += [
                    rollout(ids, s, a * share / len(s.tokens))
                    for s, a in zip(drawn, advantages, strict=True)
                ]
        means.append(float(np.mean(seen)))
        if data:
            training.forward_backward(data, "importance_sampling")
        training.optim_step(types.AdamParams(learning_rate=3e-4, eps=1e-8)).result()
        print(f"step {step}: reward {means[-1]:.3f}", flush=True)
    return {"rewards": means}


SCENARIOS = (
    quick_start, losses, custom_loss, supervised, grpo, keep, resume, live_through, rest,
    tenants, trouble, arithmetic,
)  # fmt: skip


def main() -> None:
    name, url, given = sys.argv[1:]
    found = {f.__name__: f for f in SCENARIOS}[name]
    print(json.dumps(found(url, json.loads(given))), flush=True)


if __name__ == "__main__":
    main()
