"""Every reader: what it gives, and what it says when there is nothing to give."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from astuner.config.check import CHOICES
from astuner.config.schema import TaskReaderConfig
from astuner.errors import ConfigError, DataError, MissingDependency
from astuner.task_reader import READERS, TaskSplits, read_tasks

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K at {GSM8K}")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch) -> None:
    """No test waits for a hub, and none leaves anything in the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_rows(path: Path, *queries: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"question": q, "answer": q}) + "\n" for q in queries))
    return path


def jsonl(train: Path | str, validation: Path | str = "", **more: object) -> TaskReaderConfig:
    config = TaskReaderConfig(type="jsonl_dataset_file", **more)  # type: ignore[arg-type]
    config.jsonl_dataset_file.training.file_path = str(train)
    config.jsonl_dataset_file.validation.file_path = str(validation)
    return config


def hub(path: Path | str, **more: str) -> TaskReaderConfig:
    config = TaskReaderConfig(type="huggingface_dat_repo")
    config.huggingface_dat_repo.dataset_path = str(path)
    for name, value in more.items():
        setattr(config.huggingface_dat_repo, name, value)
    return config


def gym(dataset: str = "chain_sum", **more: object) -> TaskReaderConfig:
    config = TaskReaderConfig(type="reasoning_gym", validation_fraction=0.0)
    config.reasoning_gym.dataset = dataset
    for name, value in more.items():
        setattr(config.reasoning_gym, name, value)
    return config


def queries(splits: TaskSplits) -> tuple[list[str], list[str]]:
    return [t.main_query for t in splits.train], [t.main_query for t in splits.validation]


def refusal(config: TaskReaderConfig) -> str:
    with pytest.raises(DataError) as caught:
        read_tasks(config, 0)
    return str(caught.value)


def test_the_schema_offers_exactly_these_readers() -> None:
    assert set(READERS) == set(CHOICES["task_reader.type"])
    with pytest.raises(ConfigError, match="must be one of jsonl_dataset_file, huggingface"):
        read_tasks(TaskReaderConfig(type="csv"), 0)


# ---------------------------------------------------------------- jsonl


def test_jsonl_splits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("t.jsonl"), "a", "b")
    write_rows(Path("v.jsonl"), "c")
    splits = read_tasks(jsonl("t.jsonl", "v.jsonl"), 0)
    assert queries(splits) == (["a", "b"], ["c"])
    assert splits.train[1].task_id == "1"
    assert splits.train[1].metadata == {"answer": "b"}


def test_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff{"question": "a"}\n\n{"question": "b"}\n', encoding="utf-8")
    assert queries(read_tasks(jsonl(path, path), 0))[0] == ["a", "b"]


def test_rows_are_held_out_and_the_training_set_is_cut(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", *"abcdefghij")
    config = jsonl(path, validation_fraction=0.3)
    train, validation = queries(read_tasks(config, 0))
    assert (len(train), len(validation)) == (7, 3)
    assert sorted(train + validation) == list("abcdefghij")
    assert train == sorted(train)
    assert queries(read_tasks(config, 0)) == (train, validation)
    assert queries(read_tasks(config, 1)) != (train, validation)
    config.max_train_tasks = 2
    assert queries(read_tasks(config, 0)) == (train[:2], validation)
    config.validation_fraction = 0.0
    assert queries(read_tasks(config, 0)) == (["a", "b"], [])


def test_the_last_training_task_is_not_held_out(tmp_path: Path) -> None:
    one = jsonl(write_rows(tmp_path / "t.jsonl", "a"))
    assert queries(read_tasks(one, 0)) == (["a"], [])
    two = jsonl(write_rows(tmp_path / "t.jsonl", "a", "b"), validation_fraction=0.01)
    assert [len(split) for split in queries(read_tasks(two, 0))] == [1, 1]


def test_jsonl_refusals(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "No training file is set" in refusal(jsonl(""))
    write_rows(Path("train.jsonl"), "a")
    told = refusal(jsonl("trian.jsonl"))
    assert told == (
        f"There is no dataset file {tmp_path / 'trian.jsonl'}. Did you mean train.jsonl?"
    )
    Path("empty.jsonl").write_text("\n")
    assert refusal(jsonl("empty.jsonl")).startswith("empty.jsonl has no rows.")
    assert refusal(jsonl("train.jsonl", "empty.jsonl")).startswith("empty.jsonl has no rows.")
    Path("bad.jsonl").write_text('{"question": "a"}\n{"question": }\n')
    assert refusal(jsonl("bad.jsonl")) == (
        "bad.jsonl:2: not valid JSON at column 14 (Expecting value): '{\"question\": }'; "
        "one JSON object must stand on each line."
    )
    Path("doc.jsonl").write_text('[\n{"question": "a"}]')
    assert "this looks like one JSON document over many lines" in refusal(jsonl("doc.jsonl"))
    Path("row.jsonl").write_text('{"question": "a"}\n{"label": "a"}\n')
    assert refusal(jsonl("row.jsonl")).startswith("row.jsonl:2: no field holds the query")
    Path("latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    assert "latin.jsonl is not UTF-8 text" in refusal(jsonl("latin.jsonl"))
    assert refusal(jsonl(tmp_path)).endswith("cannot be read: Is a directory.")


@needs_gsm8k
def test_gsm8k_as_jsonl() -> None:
    splits = read_tasks(jsonl(GSM8K / "train.jsonl", GSM8K / "test.jsonl"), 0)
    assert (len(splits.train), len(splits.validation)) == (7473, 1319)
    assert splits.train[0].main_query.startswith("Natalia sold clips to 48")
    assert splits.train[0].metadata["answer"].endswith("#### 72")


# ---------------------------------------------------------------- datasets


def test_a_local_folder_and_a_slice(tmp_path: Path) -> None:
    write_rows(tmp_path / "d" / "train.jsonl", "a", "b", "c")
    write_rows(tmp_path / "d" / "test.jsonl", "v")
    assert queries(read_tasks(hub(tmp_path / "d"), 0)) == (["a", "b", "c"], ["v"])
    config = hub(tmp_path / "d", training_split="train[:2]", validation_split="train[2:]")
    assert queries(read_tasks(config, 0)) == (["a", "b"], ["c"])


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet"])
def test_a_local_file_and_held_out_rows(tmp_path: Path, name: str) -> None:
    import pandas

    frame = pandas.DataFrame({"question": list("abcd"), "answer": ["#### 1"] * 4})
    path = str(tmp_path / name)
    if name.endswith("jsonl"):
        frame.to_json(path, orient="records", lines=True)
    else:
        getattr(frame, f"to_{name[2:]}")(path, index=False)
    splits = read_tasks(hub(path), 0)
    assert (len(splits.train), len(splits.validation)) == (3, 1)
    assert splits.train[0].metadata == {"answer": "#### 1"}


def test_folders_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"question": ["a", "b"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, dev=rows).save_to_disk(str(tmp_path / "two"))
    config = hub(tmp_path / "one", validation_split="")
    assert [len(split) for split in queries(read_tasks(config, 0))] == [1, 1]
    config = hub(tmp_path / "two", validation_split="dev")
    assert queries(read_tasks(config, 0)) == (["a", "b"], ["a", "b"])
    told = refusal(hub(tmp_path / "two", training_split="trian"))
    assert "Unknown split \"trian\". Should be one of ['train', 'dev']." in told


def test_the_obvious_configuration_is_chosen(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", "a")
    write_rows(tmp_path / "b.jsonl", "b")
    head = "---\nconfigs:\n- config_name: {}\n  data_files: a.jsonl\n- config_name: socratic\n"
    card = tmp_path / "README.md"
    card.write_text(head.format("main") + "  data_files: b.jsonl\n---\n")
    assert queries(read_tasks(hub(tmp_path), 0)) == (["a"], [])
    assert queries(read_tasks(hub(tmp_path, dataset_name="socratic"), 0)) == (["b"], [])
    card.write_text(head.format("plain") + "  data_files: b.jsonl\n---\n")
    assert refusal(hub(tmp_path)) == (
        f"{tmp_path} has several configurations: plain, socratic. Choose one with "
        "astuner.task_reader.huggingface_dat_repo.dataset_name."
    )


def test_dataset_refusals(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "d" / "train.jsonl", "a").parent
    assert "No dataset is set" in refusal(hub(""))
    assert refusal(hub(tmp_path / "nope")).endswith(
        f"there is no file or folder {tmp_path / 'nope'}."
    )
    assert "there is no file or folder" in refusal(hub("./nope"))
    told = refusal(hub(folder, validation_split="dev"))
    assert "Unknown split \"dev\". Should be one of ['train']." in told
    assert 'huggingface_dat_repo.validation_split ("" holds out training rows).' in told
    assert "cannot be read: Unrecognized instruction format" in refusal(
        hub(folder, training_split="train[:1")
    )
    write_rows(tmp_path / "d.txt", "a")
    assert "must be one of .json, .jsonl, .csv, .parquet" in refusal(hub(tmp_path / "d.txt"))
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refusal(hub(tmp_path / "empty"))
    (tmp_path / "bad.jsonl").write_text("{")
    assert "bad.jsonl cannot be read as a dataset" in refusal(hub(tmp_path / "bad.jsonl"))
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n')
    assert f"{tmp_path / 'odd.jsonl'}[train] row 0: no field holds" in refusal(
        hub(tmp_path / "odd.jsonl")
    )


def test_no_hub_gives_the_way_out() -> None:
    told = refusal(hub("openai/gsm8k"))
    assert "The dataset 'openai/gsm8k' cannot be fetched from the hub: Couldn't reach" in told
    assert "set HF_ENDPOINT" in told
    assert "dataset_path to the local folder or file (.jsonl, .json, .csv, .parquet)." in told


@needs_gsm8k
def test_gsm8k_as_a_local_dataset() -> None:
    splits = read_tasks(hub(GSM8K, training_split="train[:8]", validation_split="test[:4]"), 0)
    assert (len(splits.train), len(splits.validation)) == (8, 4)
    assert splits.train[0].metadata["answer"].endswith("#### 72")


# ---------------------------------------------------------------- reasoning-gym and dummy

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_one_digit_sums_are_split_over_distinct_questions(caplog) -> None:
    config = gym(params=ONE_DIGIT, size=1000, validation_size=64, prompt_suffix=" Number only.")
    with caplog.at_level(logging.WARNING):
        splits = read_tasks(config, 0)
    train, validation = queries(splits)
    assert (len(train), len(validation)) == (136, 64)
    assert len(set(train) | set(validation)) == 200
    assert "has only 200 different questions: 136 train and 64 validate" in caplog.text
    task = splits.train[0]
    assert task.main_query.endswith("= Number only.")
    entry = task.metadata["reasoning_gym"]
    assert (entry["dataset"], entry["params"]) == ("chain_sum", ONE_DIGIT)
    assert entry["entry"]["answer"] == task.metadata["answer"]
    assert queries(read_tasks(config, 0)) == (train, validation)
    assert queries(read_tasks(config, 1)) != (train, validation)


def test_a_seed_among_the_params_pins_the_data() -> None:
    config = gym(params={"seed": 5}, size=3, validation_size=2)
    assert queries(read_tasks(config, 0)) == queries(read_tasks(config, 1))
    assert "seed" not in read_tasks(config, 0).train[0].metadata["reasoning_gym"]["params"]


def test_reasoning_gym_refusals() -> None:
    assert "reasoning-gym has no 'chain_sums'. Did you mean chain_sum" in refusal(gym("chain_sums"))
    told = refusal(gym(params={"digits": 1}))
    assert "chain_sum does not take {'digits': 1}" in told
    assert "Its settings are: min_terms, max_terms, min_digits, max_digits" in told
    assert "chain_sum does not take {'min_terms': 0}" in refusal(gym(params={"min_terms": 0}))
    told = refusal(gym(params=ONE_DIGIT, size=5, validation_size=500))
    assert "has only 200 different questions, and validation took them all." in told


def test_missing_packages(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[reasoning-gym\]"'):
        read_tasks(gym(), 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r'pip install "astuner\[datasets\]"'):
        read_tasks(hub("openai/gsm8k"), 0)


def test_random_dummy() -> None:
    config = TaskReaderConfig(type="random_dummy")
    splits = read_tasks(config, 0)
    train, validation = queries(splits)
    assert (len(train), len(validation), len(set(train + validation))) == (32, 8, 40)
    a, b = splits.train[0].main_query.removeprefix("What is ").split("?")[0].split(" + ")
    assert splits.train[0].metadata["answer"] == str(int(a) + int(b))
    assert queries(read_tasks(config, 0)) == (train, validation)
    config.random_dummy.size = 10_000
    assert "has 10000 different tasks, but size + validation_size is 10008." in refusal(config)
