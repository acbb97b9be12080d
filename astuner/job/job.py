"""`AstunerJob`: a configuration built in Python, and `tune()`.

Everything a job says can be written to YAML and run by `astuner --conf`, except
objects that have no importable name (a class defined in a notebook, a list of
tasks); those run here all the same, and `dump_job_as_yaml` says what is in the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from astuner.config.load import dump_config, from_python, load_config
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError, LoadingError
from astuner.job.tuned_model import TunedModel
from astuner.launcher import launch
from astuner.loading import object_path
from astuner.task_reader import TaskSplits
from astuner.types import Task

ALGORITHMS: dict[str, Mapping[str, Any]] = {
    "grpo": {"adv_estimator": "grpo"},
    "dr_grpo": {"adv_estimator": "dr_grpo", "loss_agg_mode": "constant"},
    "dapo": {
        "adv_estimator": "grpo",
        "clip_ratio_high": 0.28,
        "loss_agg_mode": "token-mean",
        "dynamic_sampling": True,
    },
    "rloo": {"adv_estimator": "rloo"},
    "reinforce_plus_plus": {"adv_estimator": "reinforce_plus_plus", "loss_agg_mode": "token-mean"},
    "gspo": {"adv_estimator": "grpo", "loss": "gspo"},
    "cispo": {"adv_estimator": "grpo", "loss": "cispo", "loss_agg_mode": "token-mean"},
}
"""What the names of whole algorithms mean in `trainer_common.algorithm`."""

READERS = {
    "hf": "huggingface_dat_repo",
    "huggingface": "huggingface_dat_repo",
    "jsonl": "jsonl_dataset_file",
    "dummy": "random_dummy",
}


class AstunerJob:
    """A tuning job. `job.config` is the whole configuration (see docs/config.md); a
    misspelt attribute of it is an error."""

    def __init__(
        self,
        backbone: str = "local",
        model: str = "smollm2-135m",
        n_gpu: int | None = None,
        algorithm: str = "grpo",
        *,
        experiment_name: str = "astuner_job",
        experiment_dir: str | Path = "runs",
    ) -> None:
        """`n_gpu` 0 is the CPU, 1 one GPU, None whatever this machine has. The backbone verl
        takes more of them, on each machine; there None is 8, or the CPU where no GPU is."""
        self.config = cast(AstunerConfig, OmegaConf.structured(AstunerConfig))
        self.config.backbone = backbone
        self.config.model.path = str(model)
        self.config.experiment_name = experiment_name
        self.config.experiment_dir = str(experiment_dir)
        self._workflow: type | None = None
        self._judge: Any = None
        self._tasks: TaskSplits | None = None
        self._unnamed: dict[str, str] = {}
        self._set_devices(backbone, n_gpu)
        self._set_algorithm(algorithm)

    def _set_devices(self, backbone: str, n_gpu: int | None) -> None:
        if backbone in ("verl", "trinity"):
            if n_gpu is not None:
                self.config.trainer_common.device = "cuda" if n_gpu else "cpu"
            if n_gpu:
                self.config.trainer_common.n_gpus_per_node = n_gpu
            return
        if n_gpu is not None and n_gpu > 1:
            raise ConfigError(
                f"n_gpu={n_gpu}: the {backbone} backbone uses one device. Use n_gpu=1, or a "
                "distributed backbone."
            )
        if n_gpu is not None:
            self.config.model.device = "cuda" if n_gpu else "cpu"

    def _set_algorithm(self, name: str) -> None:
        if name not in ALGORITHMS:
            raise ConfigError(f"algorithm={name!r}: choose one of {', '.join(ALGORITHMS)}")
        for key, value in ALGORITHMS[name].items():
            setattr(self.config.trainer_common.algorithm, key, value)

    # ---------------------------------------------------------------- describing

    def set_workflow(self, workflow: type | str) -> AstunerJob:
        """Your `Workflow` subclass, or its path "package.module->Class"."""
        self._unnamed.pop("the workflow", None)
        if isinstance(workflow, str):
            self._workflow = None
            self.config.rollout.user_workflow = workflow
        else:
            self._workflow = workflow
            self.config.rollout.user_workflow = self._name("the workflow", workflow)
        return self

    def set_judge(self, judge: Any) -> AstunerJob:
        """A judge type ("math_verify", "number_match", ...), a path "package.module->Name", or
        a judge: anything with `compute_reward(task, output)`, or such a function."""
        self._judge = None
        self._unnamed.pop("the judge", None)
        if isinstance(judge, str) and "->" not in judge:
            self.config.task_judge.judge_type = judge
            self.config.task_judge.judge_protocol = ""
            return self
        self.config.task_judge.judge_type = "customized_protocol"
        if isinstance(judge, str):
            self.config.task_judge.judge_protocol = judge
        else:
            self._judge = judge
            self.config.task_judge.judge_protocol = self._name("the judge", judge)
        return self

    def set_data(
        self,
        type: str | Sequence[Task],
        dataset_path: str | Path = "",
        *,
        validation: str | Path | Sequence[Task] = (),
        training_split: str = "train",
        validation_split: str = "test",
        dataset_name: str = "",
        params: Mapping[str, Any] | None = None,
    ) -> AstunerJob:
        """Where the tasks come from.

        `type` is "hf" (`dataset_path` is a hub name or local folder), "jsonl" (a file;
        `validation` another), "reasoning_gym" (`dataset_path` is the generator, `params`
        its settings), "random_dummy", or simply a list of Tasks (`validation` another).
        """
        if not isinstance(type, str):
            held_out = [] if isinstance(validation, str | Path) else list(validation)
            self._tasks = TaskSplits(list(type), held_out)
            self._unnamed["the tasks"] = "a list of Tasks has no place in a YAML file"
            return self
        reader = self.config.task_reader
        reader.type = READERS.get(type, type)
        self._tasks = None
        self._unnamed.pop("the tasks", None)
        if reader.type == "huggingface_dat_repo":
            hub = reader.huggingface_dat_repo
            hub.dataset_path, hub.dataset_name = str(dataset_path), dataset_name
            hub.training_split, hub.validation_split = training_split, validation_split
        elif reader.type == "jsonl_dataset_file":
            reader.jsonl_dataset_file.training.file_path = str(dataset_path)
            reader.jsonl_dataset_file.validation.file_path = str(validation or "")
        elif reader.type == "reasoning_gym":
            reader.reasoning_gym.dataset = str(dataset_path)
            reader.reasoning_gym.params = dict(params or {})
        return self

    def _name(self, what: str, obj: object) -> str:
        """The object's importable path; remembered as missing where there is none."""
        try:
            return object_path(obj)
        except LoadingError as error:
            self._unnamed[what] = str(error)
            return f"__python__->{getattr(obj, '__name__', obj.__class__.__name__)}"

    # ---------------------------------------------------------------- YAML

    def dump_job_as_yaml(self, path: str | Path) -> Path:
        """Write the job so that `astuner --conf` can run it. Raises ConfigError if a part
        of it exists only in this Python process."""
        if self._unnamed:
            what, why = next(iter(self._unnamed.items()))
            raise ConfigError(f"{path}: {what} cannot be written to YAML: {why}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_config(from_python(_plain(self.config)).config, path)
        return path

    def load_job_from_yaml(self, path: str | Path) -> AstunerJob:
        """Take everything from the file; objects set before are forgotten."""
        self.config = _typed(load_config(path).config)
        self._workflow, self._judge, self._tasks = None, None, None
        self._unnamed.clear()
        return self

    # ---------------------------------------------------------------- running

    def tune(self, *, resume: bool = False) -> TunedModel:
        """Run the job to its end: the same as `astuner --conf` on its YAML.

        Works in a script, in a notebook and under pytest. Raises AstunerError.
        """
        loaded = from_python(_plain(self.config))
        result = launch(
            loaded, workflow=self._workflow, judge=self._judge, tasks=self._tasks, resume=resume
        )
        return TunedModel.of(result, loaded.config)


def _plain(config: AstunerConfig) -> AstunerConfig:
    return cast(AstunerConfig, OmegaConf.to_object(cast(Any, config)))


def _typed(config: AstunerConfig) -> AstunerConfig:
    return cast(AstunerConfig, OmegaConf.structured(config))
