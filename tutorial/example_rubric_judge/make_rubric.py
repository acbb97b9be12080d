"""Has a judging model write the rubric, from a few replies that people scored.

`python -m tutorial.example_rubric_judge.make_rubric --base-url URL --model NAME > rubric.txt`
asks any OpenAI-compatible endpoint once. The rubric is text to read and to edit before it
is used; nothing is trained here.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import openai

EXAMPLES = Path(__file__).parent / "examples.jsonl"
ASK = (
    "These replies were scored by people from 0 (bad) to 1 (good). Write the rubric they "
    "follow: at most five criteria, one a line, each one that a reply alone can be checked for."
)


def request(examples: list[dict[str, object]]) -> list[dict[str, str]]:
    """The messages that ask for a rubric."""
    shown = "\n\n".join(
        f"Question: {e['question']}\nReply: {e['answer']}\nScore: {e['score']}" for e in examples
    )
    return [{"role": "system", "content": ASK}, {"role": "user", "content": shown}]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--examples", type=Path, default=EXAMPLES)
    args = parser.parse_args()
    examples = [json.loads(line) for line in args.examples.read_text().splitlines() if line]
    key = os.environ.get("OPENAI_API_KEY") or "none"
    client = openai.OpenAI(base_url=args.base_url, api_key=key)
    reply = client.chat.completions.create(
        model=args.model,
        messages=request(examples),  # type: ignore[arg-type]
        temperature=0.0,
    )
    print((reply.choices[0].message.content or "").strip())


if __name__ == "__main__":
    main()
