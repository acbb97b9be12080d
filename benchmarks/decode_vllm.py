"""vLLM's side of `benchmarks/decode.py`, in an environment of its own: a round for each line read.

Reads the prompts as JSON from a file, prints {"ready": ...} once it has warmed up, then samples
all of them for each line on standard input and prints the seconds. Between two it waits.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

from astuner.backbone.verl_cpu import vllm_alias  # it tells vLLM that it is built for the CPU

vllm_alias.install()

from vllm import LLM, SamplingParams  # noqa: E402


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    out, sys.stdout = sys.stdout, sys.stderr
    model = LLM(
        job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=128,
        disable_log_stats=True,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def sample(tokens: int) -> float:
        params = SamplingParams(
            n=job["repeats"],
            temperature=1.0,
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
        )
        begun = time.perf_counter()
        found = model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        assert all(len(o.token_ids) == tokens for request in found for o in request.outputs)
        return seconds

    sample(4)
    print(json.dumps({"ready": True}), file=out, flush=True)
    while sys.stdin.readline():
        print(json.dumps({"seconds": sample(job["tokens"])}), file=out, flush=True)


if __name__ == "__main__":
    main()
