"""Who answers the calls of each target tag: `model.targets`, read and checked.

A workflow with several agents names their parts by target tags. A tag that
`model.targets` does not name is answered by the shared adapter, `model.lora`; one that
it names has an adapter of its own, or is played by somebody who is not trained. Only
words: nothing is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from astuner.config.keys import full, nearest_choice
from astuner.config.schema import AstunerConfig, LoraConfig

KEY = "model.targets"
Kind = Literal["own", "frozen", "past", "endpoint"]

_FORMS: Mapping[Kind, frozenset[str]] = {
    "own": frozenset({"lora", "lr"}),
    "frozen": frozenset({"frozen"}),
    "past": frozenset({"version", "of"}),
    "endpoint": frozenset({"endpoint"}),
}
_WRITE = (
    "Write {lora: {rank: 8}, lr: 1e-4} for an adapter of its own, {frozen: true} for the base, "
    "{version: -1} for past weights, or {endpoint: {base_url: ..., model: ...}}."
)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENDPOINT = ("base_url", "model", "api_key_env")
_LORA: Mapping[str, type | tuple[type, ...]] = {
    "rank": int,
    "alpha": int,
    "target_modules": str,
}


@dataclass(frozen=True, slots=True)
class TargetEndpoint:
    """An OpenAI-compatible endpoint that answers a target's calls."""

    base_url: str
    model: str
    api_key_env: str = ""
    """"" sends no key."""


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers the calls of one tag."""

    tag: str
    kind: Kind
    lora: LoraConfig | None = None
    """With "own": what it does not say is as in `model.lora`."""
    lr: float | None = None
    """With "own"; None is `trainer_common.optim.lr`."""
    back: int = 0
    """With "past": how many publishes ago the weights were made."""
    of: str = ""
    """With "past": the tag whose adapter it was; "" is the shared one."""
    endpoint: TargetEndpoint | None = None

    def __str__(self) -> str:
        if self.lora is not None:
            rate = "" if self.lr is None else f", lr {self.lr:g}"
            return f"an adapter of its own (rank {self.lora.rank}{rate})"
        if self.endpoint is not None:
            return f"{self.endpoint.model} at {self.endpoint.base_url}, not trained"
        if self.kind == "past":
            return f"{self.of or 'the shared adapter'} {self.back} versions ago, not trained"
        return "the frozen base, not trained"


def targets_of(config: AstunerConfig) -> dict[str, Target]:
    """The targets that the configuration names; it must be free of `target_problems`."""
    return {tag: _target(tag, form, config) for tag, form in config.model.targets.items()}


def own_targets(config: AstunerConfig) -> frozenset[str]:
    """The tags with an adapter of their own."""
    return frozenset(t.tag for t in targets_of(config).values() if t.kind == "own")


def untrained_targets(config: AstunerConfig) -> frozenset[str]:
    """The tags that nobody trains, whatever the workflow says."""
    return frozenset(t.tag for t in targets_of(config).values() if t.kind != "own")


def needs_host(config: AstunerConfig) -> bool:
    """Whether more weights than one adapter sample: endpoints alone need none of ours."""
    return any(t.kind != "endpoint" for t in targets_of(config).values())


def target_problems(config: AstunerConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Everything that is wrong with `model.targets`."""
    forms: Mapping[Any, Any] = config.model.targets
    for tag, form in forms.items():
        for problem in _problems(tag, form, forms, config):
            yield (KEY,), f"`{full(KEY)}.{tag}` {problem}"
    others = [tag for tag, form in forms.items() if _kind(form) not in ("endpoint", None)]
    if others and not config.model.lora.enable:
        yield (
            (KEY,),
            f"`{full(KEY)}.{others[0]}` needs adapters over one base, but "
            f"`{full('model.lora.enable')}` is false. With full weights name endpoints only.",
        )


# ---------------------------------------------------------------- inside


def _target(tag: str, form: Mapping[str, Any], config: AstunerConfig) -> Target:
    kind = _kind(form)
    if kind == "own":
        lora = replace(config.model.lora, **(form.get("lora") or {}))
        return Target(tag, "own", lora=lora, lr=form.get("lr"))
    if kind == "past":
        return Target(tag, "past", back=-form["version"], of=form.get("of", ""))
    if kind == "endpoint":
        return Target(tag, "endpoint", endpoint=_endpoint(**form["endpoint"]))
    return Target(tag, "frozen")


def _endpoint(base_url: str, model: str, api_key_env: str | None = None) -> TargetEndpoint:
    """Who is not OpenAI is not sent OpenAI's key unasked."""
    if api_key_env is None:
        openai = urlsplit(base_url).netloc == "api.openai.com"
        api_key_env = "OPENAI_API_KEY" if openai and base_url.startswith("https:") else ""
    return TargetEndpoint(base_url, model, api_key_env)


def _kind(form: Any) -> Kind | None:
    """Which of the forms it is meant to be, if any."""
    names = frozenset(cast("dict[str, Any]", form)) if isinstance(form, dict) else frozenset[str]()
    kinds: list[Kind] = [kind for kind, known in _FORMS.items() if names & known]
    return kinds[0] if len(kinds) == 1 else None


def _problems(
    tag: Any, form: Any, forms: Mapping[Any, Any], config: AstunerConfig
) -> Iterator[str]:
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        yield "is not a tag: use letters, digits, '_', '-' and '.', for it also names a folder."
        return
    kind = _kind(form)
    if kind is None:
        yield f"is {form!r}, which says nothing or two things at once. {_WRITE}"
        return
    for name in form:
        if name not in _FORMS[kind]:
            near = nearest_choice(str(name), tuple(_FORMS[kind]))
            hint = f" Did you mean {near!r}?" if near else f" {_WRITE}"
            yield f"has the unknown entry {name!r} beside {sorted(set(form) & _FORMS[kind])}.{hint}"
    if kind == "own":
        yield from _own_problems(form)
    elif kind == "past":
        yield from _past_problems(tag, form, forms, config)
    elif kind == "endpoint":
        yield from _endpoint_problems(form["endpoint"])
    elif form["frozen"] is not True:
        yield f"has frozen: {form['frozen']!r}; write frozen: true, or leave the target out."


def _own_problems(form: Mapping[str, Any]) -> Iterator[str]:
    lr = form.get("lr", 1.0)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < float("inf"):
        yield f"has lr: {lr!r}; it must be a number above 0."
    lora = form.get("lora")
    if lora is not None and not isinstance(lora, dict):
        yield f"has lora: {lora!r}; it must be a mapping such as {{rank: 8}}, or empty."
        return
    for name, value in cast("dict[str, Any]", lora or {}).items():
        if name not in _LORA:
            yield f"has the unknown entry lora.{name}; it may have {', '.join(_LORA)}."
        elif not isinstance(value, _LORA[name]) or isinstance(value, bool):
            yield f"has lora.{name}: {value!r}, which has the wrong type."
        elif isinstance(value, int) and value < 1:
            yield f"has lora.{name}: {value}; it must be at least 1."


def _past_problems(
    tag: str, form: Mapping[str, Any], forms: Mapping[Any, Any], config: AstunerConfig
) -> Iterator[str]:
    version, of = form.get("version"), form.get("of", "")
    if isinstance(version, bool) or not isinstance(version, int) or version > 0:
        yield f"has version: {version!r}; it must be 0 (the newest) or -k (k publishes ago)."
    if of and _kind(forms.get(of)) != "own":
        own = sorted(t for t, form in forms.items() if _kind(form) == "own")
        yield (
            f"has of: {of!r}, which has no adapter of its own. It must be one of {own}, or left "
            "out for the shared adapter."
        )


def _endpoint_problems(endpoint: Any) -> Iterator[str]:
    known = {f.name for f in fields(TargetEndpoint)}
    given: dict[str, Any] = cast("dict[str, Any]", endpoint) if isinstance(endpoint, dict) else {}
    if not given.get("base_url") or not given.get("model"):
        yield f"has endpoint: {endpoint!r}; it needs base_url and model."
    for name, value in given.items():
        if name not in known:
            yield f"has the unknown entry endpoint.{name}; it may have {', '.join(_ENDPOINT)}."
        elif not isinstance(value, str):
            yield f"has endpoint.{name}: {value!r}, which must be a text."
