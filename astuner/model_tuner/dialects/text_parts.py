"""Content of other dialects as text parts of a chat message.

The model reads text only: anything else is refused by its path in the request. Joining
parts is left to `chat.messages`, so that all dialects join alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, cast

from astuner.errors import RequestError


def text_parts(content: object, kinds: Mapping[str, str], where: str) -> str | list[dict[str, Any]]:
    """Content as a text or chat text parts. `kinds` maps the types of part that hold text to
    the field it is in. Raises RequestError."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        refuse(where, f"must be text or a list of parts, not {type(content).__name__}")
    return [
        text_part(part, kinds, f"{where}[{i}]")
        for i, part in enumerate(cast("list[object]", content))
    ]


def text_part(part: object, kinds: Mapping[str, str], where: str) -> dict[str, Any]:
    """One part. Raises RequestError."""
    fields = fields_of(part, where)
    kind = str(fields.get("type"))
    if kind not in kinds:
        refuse(where, f"has type {kind!r}, but the model reads text only", "unsupported_content")
    return {"type": "text", "text": string(fields, kinds[kind], where)}


def fields_of(value: object, where: str) -> Mapping[str, Any]:
    """A JSON object. Raises RequestError."""
    if not isinstance(value, Mapping):
        refuse(where, f"must be an object, not {type(value).__name__}")
    return cast("Mapping[str, Any]", value)


def string(fields: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be text. Raises RequestError."""
    value = fields.get(name)
    if not isinstance(value, str):
        refuse(f"{where}.{name}", f"must be a string, not {type(value).__name__}")
    return value


def refuse(param: str, problem: str, code: str = "invalid_value") -> NoReturn:
    raise RequestError(f"{param} {problem}.", code=code, param=param)
