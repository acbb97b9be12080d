"""The one base model of a server: its engine, and how clients know it."""

from __future__ import annotations

from dataclasses import dataclass

from astuner.engine.protocol import AdapterHost
from astuner.errors import RequestError


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that everything here is an adapter of."""

    name: str
    """As clients name it."""
    host: AdapterHost
    vocab_size: int
    lora_alpha: float = 32.0
    tokenizer_id: str | None = None
    """What the SDK's `get_tokenizer` loads."""
    arch: str = ""

    def check_name(self, name: str) -> None:
        """Raises RequestError (400) for a model that is not served."""
        if name != self.name:
            raise RequestError(
                f"The model {name!r} is not served here; {self.name!r} is.",
                code="unknown_model",
                param="base_model",
            )
