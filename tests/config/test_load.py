"""Loading: values, origins, and one test for each message a wrong file gets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astuner.config.load import (
    dump_config,
    from_python,
    load_config,
)
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

MINIMAL = """\
astuner:
  rollout:
    user_workflow: my.mod->Flow
    num_repeat: 4
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return write


def refusal(path: Path | None, *overrides: str, **options: str) -> str:
    """The message, with the temporary folder taken out of it."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, **options)
    return str(caught.value).replace(f"{path.parent}/" if path else "\0", "")


# ---------------------------------------------------------------- what is loaded


def test_values_and_origins(write) -> None:
    path = write(MINIMAL, "math.yaml")
    loaded = load_config(path, ["seed=7"], backbone="debug", experiment_dir="out")
    config = loaded.config
    assert (config.rollout.num_repeat, config.seed, config.backbone) == (4, 7, "debug")
    assert (config.experiment_dir, config.experiment_name) == ("out", "math")
    assert config.rollout.user_workflow == "my.mod->Flow"
    assert str(loaded.origins["rollout.num_repeat"]) == f"{path}:4"
    assert loaded.origins["rollout.num_repeat"].kind == "file"
    assert str(loaded.origins["seed"]) == "command line"
    assert str(loaded.origins["backbone"]) == "command line"
    assert str(loaded.origins["data.train_batch_size"]) == "default"
    assert loaded.path == path


def test_without_a_file_all_is_default() -> None:
    loaded = load_config(None)
    assert loaded.config == AstunerConfig()
    assert set(map(str, loaded.origins.values())) == {"default"}


def test_empty_sections_and_an_empty_root_are_fine(write) -> None:
    assert load_config(write("astuner:\n")).config.seed == 0
    path = write("astuner:\n  rollout:\n    # num_repeat: 4\n  seed: 3\n")
    assert load_config(path).config.seed == 3


def test_a_number_with_an_exponent_and_a_text_of_digits(write) -> None:
    path = write("""\
        astuner:
          experiment_name: 007
          project_name: yes
          trainer_common: {optim: {lr: 1e-4}}
          task_reader: {reasoning_gym: {params: {p: 2e-3}}}
    """)
    config = load_config(path).config
    assert config.experiment_name == "007"
    assert config.project_name == "yes"
    assert config.trainer_common.optim.lr == 1e-4
    assert config.task_reader.reasoning_gym.params == {"p": 0.002}


def test_environment_and_cross_references(write, monkeypatch) -> None:
    monkeypatch.setenv("ASTUNER_TEST_REPEAT", "6")
    path = write("""\
        astuner:
          seed: ${oc.env:ASTUNER_TEST_SEED,5}
          project_name: p-${astuner.backbone}
          rollout: {num_repeat: "${oc.env:ASTUNER_TEST_REPEAT}"}
    """)
    config = load_config(path).config
    assert (config.seed, config.project_name, config.rollout.num_repeat) == (5, "p-local", 6)


def test_yaml_anchors_and_merge_keys(write) -> None:
    path = write("""\
        astuner:
          rollout:
            val_kwargs: &v {temperature: 0.5, top_k: 3}
          task_reader:
            reasoning_gym: {params: {<<: *v, top_k: 9}}
    """)
    config = load_config(path).config
    assert config.task_reader.reasoning_gym.params == {"temperature": 0.5, "top_k": 9}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rollout.num_repeat=3", "rollout.num_repeat", 3),
        ("astuner.rollout.num_repeat=3", "rollout.num_repeat", 3),
        ("+rollout.num_repeat=3", "rollout.num_repeat", 3),
        ("++rollout.num_repeat = 3", "rollout.num_repeat", 3),
        ("trainer_common.logger=[console, wandb]", "trainer_common.logger", ["console", "wandb"]),
        ("trainer_common.optim.lr=1e-3", "trainer_common.optim.lr", 1e-3),
        ("trainer_common.val_before_train=false", "trainer_common.val_before_train", False),
        ("task_judge.regex.pattern=[0-9]+=#x", "task_judge.regex.pattern", "[0-9]+=#x"),
        ("task_judge.regex.pattern='a b'", "task_judge.regex.pattern", "a b"),
        ("task_reader.fields.task_id=", "task_reader.fields.task_id", ""),
        ("model.template_kwargs.enable_thinking=false", "model.template_kwargs",
         {"enable_thinking": False}),
        ("model.template_kwargs={a: {b: [1, x]}}", "model.template_kwargs", {"a": {"b": [1, "x"]}}),
        ("rollout={num_repeat: 3, multi_turn: {max_steps: 2}}", "rollout.multi_turn.max_steps", 2),
    ],
)  # fmt: skip
def test_overrides(override: str, key: str, value: object) -> None:
    loaded = load_config(None, [override])
    found: object = loaded.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert str(loaded.origins[key]) == "command line"


def test_the_last_override_wins_and_open_mappings_are_merged(write) -> None:
    path = write("astuner: {seed: 1, model: {template_kwargs: {a: 1}}}")
    loaded = load_config(path, ["seed=2", "seed=3", "model.template_kwargs.b=2"])
    assert loaded.config.seed == 3
    assert loaded.config.model.template_kwargs == {"a": 1, "b": 2}


# ---------------------------------------------------------------- what is refused


def test_missing_file_names_its_neighbours(write, tmp_path: Path) -> None:
    write(MINIMAL, "math.yaml")
    message = refusal(tmp_path / "mth.yaml")
    assert "no configuration file mth.yaml" in message
    assert "math.yaml" in message


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_empty_file(write, text: str) -> None:
    message = refusal(write(text))
    assert message.startswith("x.yaml has no root key `astuner` (it is empty).")
    assert "astuner:\n      model: {path: smollm2-135m}" in message


def test_missing_root(write) -> None:
    message = refusal(write("rollout: {num_repeat: 4}\nseed: 1\n"))
    assert "x.yaml has no root key `astuner` (its root has: rollout, seed)." in message
    assert "user_workflow: my_package.my_module->MyWorkflow" in message


def test_a_second_root(write) -> None:
    message = refusal(write("astuner: {seed: 1}\nhydra: {searchpath: []}\n"))
    assert message.startswith("x.yaml:2: unknown root key `hydra`.")


def test_root_that_is_no_mapping(write) -> None:
    assert refusal(write("astuner: 3\n")).startswith("x.yaml:1: `astuner` must hold a mapping")


def test_broken_yaml(write) -> None:
    message = refusal(write("astuner:\n  seed: 1\n   rollout: 2\n"))
    assert message.startswith("x.yaml:3:11: not valid YAML: mapping values are not allowed here")


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"astuner: \xff\xfe")
    assert "x.yaml is not UTF-8 text" in refusal(path)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").mkdir()
    assert "x.yaml cannot be read: Is a directory." in refusal(tmp_path / "x.yaml")


def test_duplicate_key(write) -> None:
    message = refusal(write("astuner:\n  seed: 1\n  backbone: local\n  seed: 2\n"))
    assert message == "x.yaml:4: `seed` is already set on line 2. Keep one of the two."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout: {num_repeats: 3}",
         "x.yaml:2: unknown key `astuner.rollout.num_repeats`; did you mean "
         "`astuner.rollout.num_repeat`?"),
        ("trainer_common: {lr: 1}",
         "x.yaml:2: unknown key `astuner.trainer_common.lr`; did you mean "
         "`astuner.trainer_common.optim.lr`?"),
        ("task_judge: {type: llm}",
         "x.yaml:2: unknown key `astuner.task_judge.type`; did you mean "
         "`astuner.task_judge.judge_type`?"),
        ("rollout: {max_steps: 3}",
         "x.yaml:2: unknown key `astuner.rollout.max_steps`; did you mean "
         "`astuner.rollout.multi_turn.max_steps`?"),
        ("rolout: {num_repeat: 3}",
         "x.yaml:2: unknown key `astuner.rolout`; did you mean `astuner.rollout`?"),
        ("data: {zzz: 3}",
         "x.yaml:2: unknown key `astuner.data.zzz`. `astuner.data` has: max_prompt_length, "
         "max_response_length, train_batch_size."),
        ("model: smollm2",
         "x.yaml:2: `astuner.model` is a section, not a value, but 'smollm2' was given. "
         "Its keys are: path, device, dtype, renderer, template_kwargs, lora, targets."),
        ("seed: many", "x.yaml:2: `astuner.seed` must be a whole number, but is 'many' (str)."),
        ("seed: 1.5", "x.yaml:2: `astuner.seed` must be a whole number, but is 1.5 (float)."),
        ("seed: true", "x.yaml:2: `astuner.seed` must be a whole number, but is True (bool)."),
        ("seed:", "x.yaml:2: `astuner.seed` must be a whole number, but is nothing."),
        ("seed: {a: 1}",
         "x.yaml:2: `astuner.seed` must be a whole number, but is {'a': 1} (dict)."),
        ("backbone: [local]",
         "x.yaml:2: `astuner.backbone` must be text, but is ['local'] (list)."),
        ("trainer_common: {logger: console}",
         "x.yaml:2: `astuner.trainer_common.logger` must be a list of texts, e.g. [a, b], "
         "but is 'console' (str)."),
        ("trainer_common: {optim: {betas: [a, b]}}",
         "x.yaml:2: `astuner.trainer_common.optim.betas` must be a list of numbers, "
         "e.g. [0.9, 0.999], but is ['a', 'b'] (list)."),
        ("model: {template_kwargs: 3}",
         "x.yaml:2: `astuner.model.template_kwargs` must be a mapping, e.g. {name: value}, "
         "but is 3 (int)."),
        ("seed: ???", "x.yaml:2: `astuner.seed` has no value ('???')."),
    ],
)  # fmt: skip
def test_wrong_keys_and_types(write, text: str, message: str) -> None:
    assert refusal(write(f"astuner:\n  {text}\n")) == message


def test_unset_variable_and_malformed_interpolation(write, monkeypatch) -> None:
    monkeypatch.delenv("ASTUNER_TEST_UNSET", raising=False)
    message = refusal(write("astuner:\n  seed: ${oc.env:ASTUNER_TEST_UNSET}\n"))
    assert message.startswith("x.yaml:2: `astuner.seed` (must be a whole number) has an interp")
    assert "Environment variable 'ASTUNER_TEST_UNSET' not found" in message
    message = refusal(write("astuner:\n  project_name: 'a${'\n"))
    assert message.startswith("x.yaml:2: `astuner.project_name` has a malformed interpolation")


def test_an_interpolation_of_the_wrong_type(write, monkeypatch) -> None:
    monkeypatch.setenv("ASTUNER_TEST_SEED", "many")
    message = refusal(write("astuner:\n  seed: ${oc.env:ASTUNER_TEST_SEED}\n"))
    assert "`astuner.seed` (must be a whole number)" in message
    assert "Value 'many' of type 'str' could not be converted to Integer" in message


def test_all_problems_at_once(write) -> None:
    message = refusal(write("astuner:\n  sed: 1\n  seed: x\n"), "nope=1")
    assert message.splitlines() == [
        "The configuration has 3 problems:",
        "  - x.yaml:2: unknown key `astuner.sed`; did you mean `astuner.seed`?",
        "  - command line: unknown key `astuner.nope`. `astuner` has: project_name, "
        "experiment_name, experiment_dir, backbone, seed, model, data, rollout, task_reader, "
        "task_judge, env, context_tracker, model_tuner, debug, trainer_common, service, verl, "
        "trinity.",
        "  - x.yaml:3: `astuner.seed` must be a whole number, but is 'x' (str).",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_repeat", "The override 'rollout.num_repeat' is malformed. Write key=value"),
        ("=3", "The override '=3' is malformed."),
        ("rollout..n=3", "The override 'rollout..n=3' is malformed."),
        ("~seed", "wants to delete a key. Every key has a value; set it instead: seed=VALUE."),
        ("trainer_common.logger=[a", "is not valid YAML"),
        ("rollout.num_repaet=3", "command line: unknown key `astuner.rollout.num_repaet`; did you "
         "mean `astuner.rollout.num_repeat`?"),
        ("seed=x", "command line: `astuner.seed` must be a whole number, but is 'x' (str)."),
        ("seed=", "command line: `astuner.seed` must be a whole number, but is nothing."),
        ("rollout=3", "command line: `astuner.rollout` is a section, not a value"),
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, message: str) -> None:
    assert message in refusal(None, override)


def test_an_unknown_backbone_option() -> None:
    message = refusal(None, backbone="veral")
    assert message == (
        "command line: `astuner.backbone` is 'veral', but must be one of local, debug, verl, "
        "trinity, tinker. Did you mean 'verl'?"
    )


# ---------------------------------------------------------------- python and back


def test_from_python_is_checked_and_knows_its_origins() -> None:
    config = AstunerConfig()
    config.rollout.num_repeat = 2
    config.project_name = "costs ${5}"
    loaded = from_python(config)
    assert loaded.config == config
    assert {k: str(o) for k, o in loaded.set_by_user().items()} == {
        "rollout.num_repeat": "python",
        "project_name": "python",
    }
    config.rollout.num_repeat = "two"  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"python: `astuner.rollout.num_repeat` must be a whole"):
        from_python(config)


def test_dump_writes_only_what_differs(tmp_path: Path) -> None:
    config = AstunerConfig()
    config.rollout.user_workflow = "a.b->C"
    config.trainer_common.optim.lr = 3e-4
    dump_config(config, tmp_path / "new" / "x.yaml")
    assert (tmp_path / "new" / "x.yaml").read_text() == dedent("""\
        astuner:
          backbone: local
          model:
            path: smollm2-135m
          rollout:
            user_workflow: a.b->C
          task_reader:
            type: jsonl_dataset_file
          trainer_common:
            optim:
              lr: 0.0003
        """)


def test_dump_to_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        dump_config(AstunerConfig(), tmp_path / "file" / "x.yaml")


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12) | (
    st.sampled_from(["1e-4", "yes", "null", "~", "${x}", "\\${x}", "a\\\\${", "$", "a: b", "007",
                     "#", "'", '"', " x ", "2024-01-01", "a\nb", "{answer}", "\x85", "\\"])
)  # fmt: skip
LEAVES = TEXTS | st.integers(-(10**9), 10**9) | st.booleans() | st.none()
LEAVES |= st.floats(allow_nan=False)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, params=st.dictionaries(TEXTS, VALUES, max_size=3), rate=st.floats(1e-9, 1e3))
def test_dump_and_load_round_trip(tmp_path_factory, text, params, rate) -> None:
    config = AstunerConfig(experiment_name="fixed")
    config.project_name = text
    config.task_reader.reasoning_gym.params = params
    config.debug.fake_replies = [text, "b"]
    config.trainer_common.optim.lr = rate
    path = tmp_path_factory.mktemp("dump") / "x.yaml"
    dump_config(config, path)
    assert load_config(path).config == config


# ---------------------------------------------------------------- lightness


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; import astuner.config.load, astuner.config.explain, astuner.loading;"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'numpy', 'pydantic', 'openai', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
