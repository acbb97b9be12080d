"""Whatever the `datasets` library reads: a hub name, a local folder, or a local file.

The dataset's configuration is chosen where it is obvious ("main" or "default"); a
missing "test" split falls back to held-out training rows. Nothing is downloaded
by this module itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from astuner.config.schema import HuggingfaceConfig, TaskReaderConfig
from astuner.errors import DataError, MissingDependency
from astuner.task_reader.reader import TaskSplits
from astuner.task_reader.rows import tasks_from_rows

logger = logging.getLogger(__name__)

_KEY = "astuner.task_reader.huggingface_dat_repo"
_DEFAULT_VALIDATION = "test"
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_OBVIOUS = ("default", "main")


def read(config: TaskReaderConfig, seed: int) -> TaskSplits:
    """Both splits as Tasks. Raises DataError, with a way out where no hub is reachable."""
    source = config.huggingface_dat_repo
    if not source.dataset_path:
        raise DataError(f"No dataset is set: give {_KEY}.dataset_path.")
    train = _split(source, "training_split", source.training_split)
    validation: Any = ()
    if source.validation_split:
        try:
            validation = _split(source, "validation_split", source.validation_split)
        except _NoSuchSplit:
            if source.validation_split != _DEFAULT_VALIDATION:
                raise
            logger.info(
                "%s has no split %r; a fraction of %s of the training rows is held out.",
                source.dataset_path, _DEFAULT_VALIDATION, config.validation_fraction,
            )  # fmt: skip
    return TaskSplits(
        tasks_from_rows(_rows(train, source, source.training_split), config.fields),
        tasks_from_rows(_rows(validation, source, source.validation_split), config.fields),
    )


class _NoSuchSplit(DataError):
    """The dataset is there, the split is not."""


def _rows(split: Any, source: HuggingfaceConfig, name: str) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(split):
        yield f"{source.dataset_path}[{name}] row {index}", row


def _split(source: HuggingfaceConfig, key: str, split: str) -> Any:
    """The rows of one split."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "datasets", "datasets", "task_reader.type: huggingface_dat_repo"
        ) from error
    try:
        return _load(source, split, datasets)
    except ValueError as error:
        told = str(error).partition("\n")[0]
        if not told.startswith("Unknown split"):
            raise DataError(f"{source.dataset_path} cannot be read: {told}.") from error
        held_out = ' ("" holds out training rows)' if key == "validation_split" else ""
        raise _NoSuchSplit(f"{source.dataset_path}: {told} Set {_KEY}.{key}{held_out}.") from None
    except (OSError, RuntimeError, DatasetsError) as error:
        raise DataError(_failed(source, error)) from error


def _load(source: HuggingfaceConfig, split: str, datasets: Any) -> Any:
    path = Path(source.dataset_path).expanduser()
    if path.is_file():
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise DataError(
                f"{_KEY}.dataset_path: {path} must be one of {', '.join(_BUILDERS)}, or a folder."
            )
        return datasets.load_dataset(builder, data_files=str(path), split=split)
    if not path.exists() and (
        source.dataset_path[:1] in "./~" or source.dataset_path.count("/") > 1
    ):
        raise DataError(f"{_KEY}.dataset_path: there is no file or folder {path.absolute()}.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(datasets.load_from_disk(str(path)), split)
    return _load_repo(source, str(path) if path.exists() else source.dataset_path, split, datasets)


def _saved(dataset: Any, split: str) -> Any:
    """A folder that `save_to_disk` wrote: several splits, or a single one called "train"."""
    splits = dict(dataset) if hasattr(dataset, "keys") else {"train": dataset}
    if split not in splits:
        raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
    return splits[split]


def _load_repo(source: HuggingfaceConfig, path: str, split: str, datasets: Any) -> Any:
    try:
        return datasets.load_dataset(path, source.dataset_name or None, split=split)
    except ValueError as error:
        if source.dataset_name or "Config name is missing" not in str(error):
            raise
    names = datasets.get_dataset_config_names(path)
    name = next((name for name in _OBVIOUS if name in names), None)
    if name is None:
        raise DataError(
            f"{source.dataset_path} has several configurations: {', '.join(names)}. "
            f"Choose one with {_KEY}.dataset_name."
        )
    return datasets.load_dataset(path, name, split=split)


def _failed(source: HuggingfaceConfig, error: BaseException) -> str:
    if Path(source.dataset_path).expanduser().exists():
        return f"{source.dataset_path} cannot be read as a dataset: {error.__cause__ or error}"
    return (
        f"The dataset {source.dataset_path!r} cannot be fetched from the hub: {error}. Check the "
        "name and the network (behind a mirror, set HF_ENDPOINT). Without a network, download it "
        f"elsewhere and set {_KEY}.dataset_path to the local folder or file "
        "(.jsonl, .json, .csv, .parquet)."
    )
