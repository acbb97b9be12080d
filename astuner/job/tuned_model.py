"""`TunedModel`: what `tune()` returns, and what a run folder is opened as.

Chat with it, merge it into a plain transformers folder, or serve it; of a run whose
targets have adapters of their own, one of them at a time. The model is loaded at the
first use. All methods block and work in a notebook too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from astuner.backbone.context import RunResult
from astuner.config.load import load_config
from astuner.config.schema import AstunerConfig
from astuner.config.targets import targets_of
from astuner.errors import CheckpointError
from astuner.launcher import in_own_thread

if TYPE_CHECKING:
    from astuner.chat import ChatCodec
    from astuner.engine.embedded.model import EmbeddedModel


class TunedModel:
    """A base model with the weights of a run."""

    def __init__(self, path: Path, config: AstunerConfig, metrics: Mapping[str, Any]) -> None:
        self.path = path
        """The adapter's folder in PEFT format (a transformers folder for full weights, and for
        whatever `verl` trained)."""
        self.metrics = metrics
        """The content of `summary.json`."""
        self._config = config
        self._model: EmbeddedModel | None = None
        self._codec: ChatCodec | None = None

    @classmethod
    def of(cls, result: RunResult, config: AstunerConfig) -> TunedModel:
        """What a run produced. Raises CheckpointError when it trained nothing."""
        if result.model_dir is None:
            raise CheckpointError(
                f"The run in {result.run_dir} has no tuned weights: the {config.backbone} "
                "backbone trained nothing, or it was stopped before its first step."
            )
        return cls(result.model_dir, config, result.summary)

    @classmethod
    def load(cls, run_dir: str | Path, target: str = "") -> TunedModel:
        """Open a run's folder; `target` is the tag whose adapter is meant, where the targets
        have their own. Raises CheckpointError or ConfigError."""
        import json

        from astuner.backbone.report import checkpoint_of

        run_dir = Path(run_dir)
        config = run_dir / "config.yaml"
        if not config.is_file():
            raise CheckpointError(f"{run_dir} is not a run folder: it has no config.yaml.")
        summary = run_dir / "summary.json"
        metrics = json.loads(summary.read_text()) if summary.is_file() else {}
        model = cls(checkpoint_of(run_dir), load_config(config).config, metrics)
        return model.of_target(target) if target else model

    # ---------------------------------------------------------------- several targets

    @property
    def targets(self) -> tuple[str, ...]:
        """The tags that have trained an adapter of their own."""
        from astuner.engine.team import trained_members

        return tuple(sorted(tag for tag in trained_members(self.path) if tag))

    def of_target(self, tag: str) -> TunedModel:
        """The model of this tag alone. Raises CheckpointError."""
        from astuner.engine.team import TARGETS

        if tag not in self.targets:
            raise CheckpointError(
                f"{self.path} has no target {tag!r} with an adapter of its own; it has "
                f"{', '.join(self.targets) or 'none'}."
            )
        own = targets_of(self._config)[tag].lora
        assert own is not None
        config = replace(self._config, model=replace(self._config.model, lora=own, targets={}))
        return TunedModel(self.path / TARGETS / tag, config, self.metrics)

    def _one(self) -> TunedModel:
        """Itself, or the only adapter that was trained."""
        from astuner.engine.team import SHARED, trained_members

        if not self.targets or SHARED in trained_members(self.path):
            return self
        if len(self.targets) > 1:
            raise CheckpointError(
                f"{self.path} has several adapters: {', '.join(map(repr, self.targets))}. Choose "
                "one: TunedModel.load(run_dir, target=...), or --target on the command line."
            )
        return self.of_target(next(iter(self.targets)))

    # ---------------------------------------------------------------- using it

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
    ) -> str:
        """The reply's text. `messages` in OpenAI form, or one question."""
        from astuner.chat import normalise
        from astuner.engine.protocol import SamplingParams, generate

        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        model, codec = self._open()
        prompt = codec.render(normalise(messages))
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, stop_token_ids=codec.stop_token_ids
        )
        done = in_own_thread(lambda: generate(model, prompt.tolist(), params))
        return codec.parse(done.token_ids, prompt).content

    def merge(self, to: str | Path) -> Path:
        """Write base and adapter as one plain transformers folder, which vLLM loads too.

        Raises CheckpointError when `to` is not empty or cannot be written.
        """
        from astuner.backbone.report import is_whole_model
        from astuner.engine.embedded.export import merge
        from astuner.engine.model_source import resolve_model

        one = self._one().path
        base = one if is_whole_model(one) else resolve_model(self._config.model.path)
        return merge(one, base, to)

    def serve(self, port: int = 8000, *, host: str = "127.0.0.1") -> None:
        """Serve an OpenAI-compatible endpoint until Ctrl-C. Raises ConfigError when the
        port is taken."""
        from astuner.model_tuner import SessionSampling, SessionSpec, TunerServer

        model, codec = self._open()
        name = Path(self._config.experiment_name).name
        with TunerServer(model, codec, model_name=name, host=host, port=port) as server:
            sampling = SessionSampling(temperature=0.0, max_tokens=1024, override=False)
            session = server.open_session(SessionSpec("serve", sampling=sampling, record=False))
            endpoint = session.tuner.as_oai_baseurl_apikey()
            print(f"Serving {name}. Ctrl-C stops.")
            print(f"  base_url {endpoint.base_url}\n  api_key  {endpoint.api_key}")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                print("stopped")

    def close(self) -> None:
        """Free the model. It is loaded again at the next use."""
        if self._model is not None:
            self._model.close()
            self._model, self._codec = None, None

    def _open(self) -> tuple[EmbeddedModel, ChatCodec]:
        if self._model is None or self._codec is None:
            from astuner.backbone.assembly import open_codec
            from astuner.backbone.local import open_tuned

            one = self._one()
            model: EmbeddedModel = in_own_thread(lambda: open_tuned(one._config, one.path))
            self._model, self._codec = model, open_codec(self._config, model.tokenizer)
        return self._model, self._codec
