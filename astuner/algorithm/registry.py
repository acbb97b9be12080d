"""Names that a config may use for advantages, losses, KL estimators and aggregations.

A registry is a plain dict from a name to "module:attribute"; nothing is imported
before it is asked for, so listing the names costs no torch. To add an algorithm of
your own without touching this file, write "package.module->function" as the name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from astuner.errors import ConfigError

_HERE = "astuner.algorithm"

ADVANTAGES: dict[str, str] = {
    "grpo": f"{_HERE}.advantages:grpo",
    "dr_grpo": f"{_HERE}.advantages:dr_grpo",
    "rloo": f"{_HERE}.advantages:rloo",
    "reinforce": f"{_HERE}.advantages:reinforce",
    "reinforce_plus_plus": f"{_HERE}.advantages:reinforce_plus_plus",
    "reinforce_plus_plus_baseline": f"{_HERE}.advantages:reinforce_plus_plus_baseline",
}
LOSSES: dict[str, str] = {
    "ppo": f"{_HERE}.losses:ppo",
    "gspo": f"{_HERE}.losses:gspo",
    "cispo": f"{_HERE}.losses:cispo",
    "dro": f"{_HERE}.losses:dro",
    "importance_sampling": f"{_HERE}.losses:importance_sampling",
    "policy_gradient": f"{_HERE}.losses:policy_gradient",
    "cross_entropy": f"{_HERE}.losses:cross_entropy",
}
KLS: dict[str, str] = {
    "k1": f"{_HERE}.kl:k1",
    "k2": f"{_HERE}.kl:k2",
    "k3": f"{_HERE}.kl:k3",
    "low_var_kl": f"{_HERE}.kl:k3",
}
AGGREGATIONS: dict[str, str] = {
    "episode-mean": f"{_HERE}.aggregation:episode_mean",
    "token-mean": f"{_HERE}.aggregation:token_mean",
    "constant": f"{_HERE}.aggregation:constant",
}


def resolve(registry: Mapping[str, str], name: str, what: str = "algorithm") -> Callable[..., Any]:
    """The function behind `name`; `what` says in errors what kind of thing it is.

    Raises ConfigError for an unknown name (listing the choices) and LoadingError for a
    "package.module->function" that leads nowhere.
    """
    if "->" in name:
        from astuner.loading import load_object

        return load_object(name, what)
    if name not in registry:
        near = get_close_matches(name, registry, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"Unknown {what} {name!r}.{hint} Choose one of: {', '.join(sorted(registry))}; "
            'or name your own function as "package.module->function".'
        )
    module, attribute = registry[name].split(":")
    return getattr(import_module(module), attribute)


def find_loss(name: str) -> Callable[..., Any]:
    """The loss function of this name (see `losses`)."""
    return resolve(LOSSES, name, "loss")


def find_kl(name: str) -> Callable[..., Any]:
    """The KL estimator of this name (see `kl`)."""
    return resolve(KLS, name, "KL estimator")


def accepted(function: Callable[..., Any], offered: Mapping[str, float]) -> dict[str, float]:
    """Those of the offered keyword arguments that the function has a parameter for.

    So that one set of config keys (clip range, cap, ...) serves every loss, and the
    caller need not know which loss reads which.
    """
    names = inspect.signature(function).parameters
    return {key: value for key, value in offered.items() if key in names}
