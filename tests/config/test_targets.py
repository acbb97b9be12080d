"""Who answers which target tag: what `model.targets` may say, and what it means."""

from __future__ import annotations

from pathlib import Path

import pytest

from astuner.config.load import check_backbone, dump_config, load_config
from astuner.config.targets import (
    TargetEndpoint,
    needs_host,
    own_targets,
    targets_of,
    untrained_targets,
)
from astuner.errors import ConfigError

FOUR = (
    "model.targets={wolf: {lora: {rank: 4}, lr: 0.01}, villager: {frozen: true}, "
    "old: {version: -2, of: wolf}, user: {endpoint: {base_url: 'http://x/v1', model: m}}}"
)


def test_each_form_says_who_answers() -> None:
    config = load_config(None, [FOUR, "model.lora.alpha=7"]).config
    targets = targets_of(config)
    wolf, old = targets["wolf"], targets["old"]
    assert wolf.lora is not None
    assert (wolf.kind, wolf.lora.rank, wolf.lora.alpha, wolf.lr) == ("own", 4, 7, 0.01)
    assert (old.kind, old.back, old.of) == ("past", 2, "wolf")
    assert targets["villager"].kind == "frozen"
    assert targets["user"].endpoint == TargetEndpoint("http://x/v1", "m", "")
    assert own_targets(config) == {"wolf"}
    assert untrained_targets(config) == {"villager", "old", "user"}
    assert needs_host(config)
    assert [str(t) for t in targets.values()] == [
        "an adapter of its own (rank 4, lr 0.01)",
        "the frozen base, not trained",
        "wolf 2 versions ago, not trained",
        "m at http://x/v1, not trained",
    ]


@pytest.mark.parametrize(
    ("endpoint", "variable"),
    [
        ("base_url: 'https://api.openai.com/v1'", "OPENAI_API_KEY"),
        ("base_url: 'http://api.openai.com/v1'", ""),
        ("base_url: 'https://api.openai.com.example.org/v1'", ""),
        ("base_url: 'http://10.0.0.7:8000/v1'", ""),
        ("base_url: 'http://10.0.0.7:8000/v1', api_key_env: MINE", "MINE"),
        ("base_url: 'https://api.openai.com/v1', api_key_env: ''", ""),
    ],
)
def test_openais_key_is_for_openai_unless_it_is_named(endpoint: str, variable: str) -> None:
    given = f"model.targets={{user: {{endpoint: {{{endpoint}, model: m}}}}}}"
    target = targets_of(load_config(None, [given]).config)["user"]
    assert target.endpoint is not None
    assert target.endpoint.api_key_env == variable


def test_without_targets_nothing_is_special() -> None:
    config = load_config(None).config
    assert (targets_of(config), own_targets(config), needs_host(config)) == ({}, frozenset(), False)


def test_endpoints_alone_need_no_second_adapter() -> None:
    text = "model.targets={u: {endpoint: {base_url: 'http://x', model: m}}}"
    assert not needs_host(load_config(None, [text, "model.lora.enable=false"]).config)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{w: {lora: {rnk: 4}}}", "targets.w` has the unknown entry lora.rnk; it may have rank"),
        ("{w: {lora: {rank: 0}}}", "has lora.rank: 0; it must be at least 1."),
        ("{w: {lora: {rank: '4'}}}", "has lora.rank: '4', which has the wrong type."),
        ("{w: {lr: 0}}", "has lr: 0; it must be a number above 0"),
        ("{w: {frozen: false}}", "has frozen: False; write frozen: true, or leave"),
        ("{w: {frozen: true, lr: 1}}", "which says nothing or two things at once. Write {lora:"),
        ("{w: {}}", "is {}, which says nothing or two things"),
        ("{w: {version: 1}}", "has version: 1; it must be 0 (the newest) or -k"),
        ("{w: {version: -1, of: v}}", "has of: 'v', which has no adapter of its own."),
        ("{w: {version: -1, oft: v}}", "the unknown entry 'oft' beside ['version']. Did you mean"),
        ("{w: {endpoint: {base_url: x}}}", "it needs base_url and model."),
        ("{w: {endpoint: {base_url: x, model: m, key: k}}}", "the unknown entry endpoint.key"),
        ("{a/b: {frozen: true}}", "is not a tag: use letters, digits"),
    ],
)
def test_what_cannot_be_meant_is_refused(form: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"model.targets={form}"])
    assert message in str(caught.value)
    assert "`astuner.model.targets." in str(caught.value)


def test_full_weights_have_no_second_adapter() -> None:
    with pytest.raises(ConfigError, match=r"needs adapters over one base.*lora\.enable"):
        load_config(None, ["model.targets={v: {frozen: true}}", "model.lora.enable=false"])


@pytest.mark.parametrize("backbone", ["verl", "trinity"])
def test_other_backbones_refuse_targets(backbone: str) -> None:
    loaded = load_config(None, [FOUR], backbone=backbone)
    with pytest.raises(ConfigError, match=r"model\.targets.*only local and debug read it"):
        check_backbone(loaded, backbone)
    assert check_backbone(loaded, "local") == []


def test_they_survive_a_file(tmp_path: Path) -> None:
    config = load_config(None, [FOUR]).config
    dump_config(config, tmp_path / "x.yaml")
    assert load_config(tmp_path / "x.yaml").config.model.targets == config.model.targets
