"""Trains the two tiny vocabularies that the chat tests put their special tokens on.

    python tests/chat/tokenizers/build.py

`bytes.json`: byte-level BPE as in Qwen, Llama-3, SmolLM2 and DeepSeek. `metaspace.json`:
SentencePiece-like BPE with byte fallback and a prepended space, as in Llama-2. The corpus
is the sentences below, so that the result is the same every time and free of licences.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent
CORPUS = [
    "You are a helpful assistant. Answer the question and think step by step.",
    "What is the weather in Paris today? It is sunny, 21 degrees.\n\n",
    'user\nassistant\nsystem\ntool\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n',
    '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}',
    "The sum of 12 and 30 is 42. The result of 7 times 6 is 42 too.  \n  Done.\n",
    "I do not know. Let me see. First, then, next; finally the answer is here!\n\n\n",
    "Grüße aus München, façade, naïve, 你好, 世界, привет.",
]
# How Qwen and Llama-3 cut text before merging: letters, single digits, punctuation with the
# line breaks after it, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # No pre-tokenizer: pieces may cross spaces, which is what makes seams delicate.
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    content = json.loads(tokenizer.to_str())
    # The byte pieces are part of the vocabulary, not tokens to be found in a text.
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


if __name__ == "__main__":
    for name, tokenizer in {"bytes": byte_level(), "metaspace": metaspace()}.items():
        content = json.loads(tokenizer.to_str())
        path = HERE / f"{name}.json"
        path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
        print(path, path.stat().st_size, "bytes")
