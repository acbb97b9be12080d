"""Every configuration key, its type, its default and what it means.

The schema is plain dataclasses, so that OmegaConf can check a YAML against it
and an IDE can complete it; nothing heavy is imported. The docstring under each
field is its documentation: the reference page and `astuner explain` are made
from it. `only(...)` marks keys that only some backbones read; setting one for
another backbone is an error that says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BACKBONES = ("local", "debug", "verl", "trinity", "tinker")


def only(*backbones: str, default: Any) -> Any:
    """A field that only these backbones read."""
    return field(default=default, metadata={"backbones": backbones})


@dataclass
class LoraConfig:
    """The adapter that is trained."""

    enable: bool = True
    """Train low-rank adapters (Hu et al. 2021) instead of all weights."""
    rank: int = 16
    """The adapter's inner width; more learns more and costs more."""
    alpha: int = 32
    """The adapter's output is scaled by alpha / rank."""
    target_modules: str = "all-linear"
    """PEFT's choice of layers: "all-linear", or comma-separated module names."""


@dataclass
class ModelConfig:
    """The model that is tuned."""

    path: str = "smollm2-135m"
    """A transformers folder, a hub name such as "Qwen/Qwen2.5-0.5B-Instruct", or
    "smollm2-135m", which also comes from the package registry where no hub is reachable."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "mps"."""
    dtype: str = "auto"
    """Of weights and activations: "auto" (bfloat16 where it is fast), "bfloat16", "float32".
    The optimizer and the loss are always float32."""
    renderer: str = "auto"
    """Chat format: "auto", "template" (the tokenizer's own chat template), or a family
    name of the `renderers` library such as "qwen3"."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    targets: dict[str, Any] = field(
        default_factory=dict, metadata={"backbones": ("local", "debug")}
    )
    """Who answers the calls of a target tag, in workflows with several agents. Tags that are
    not named share the adapter `model.lora`. A tag's value is one of: {lora: {rank: 8}, lr:
    0.0001}, an adapter of its own (what it leaves out is as for the shared one); {frozen:
    true}, the base; {version: -k, of: TAG}, the weights of k publishes ago (of the shared
    adapter without `of`); {endpoint: {base_url: ..., model: ..., api_key_env: ...}}."""


@dataclass
class DataConfig:
    """Lengths and the batch."""

    max_prompt_length: int = 2048
    """Longest first prompt of an episode, in tokens; longer tasks are refused with a 400."""
    max_response_length: int = 2048
    """Everything after the first prompt, in tokens: replies, tool results, later turns."""
    train_batch_size: int = 8
    """Tasks (groups) per training step."""


@dataclass
class MultiTurnConfig:
    """Limits of an episode with several turns."""

    max_steps: int = 30
    """LLM calls one agent may make in an episode; the next one is refused with an
    error (403). 0 means no limit."""


@dataclass
class ValKwargs:
    """How validation samples, in place of `rollout`'s own settings."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """1 samples from the whole distribution."""
    top_k: int = 0
    """0 means all tokens."""
    num_repeat: int = 1
    """Episodes per validation task; the score is their mean."""
    max_tasks: int = 0
    """Use only the first N validation tasks; 0 means all."""


@dataclass
class RolloutConfig:
    """How episodes are run and sampled."""

    user_workflow: str = ""
    """The workflow class, "package.module->ClassName"."""
    num_repeat: int = 8
    """Episodes per task: the group size G of GRPO."""
    temperature: float = 1.0
    """Of training rollouts; the training loss divides by the same one."""
    top_p: float = 1.0
    """Below 1 the policy that samples is not the one that is trained: needs
    `allow_biased_sampling`."""
    top_k: int = 0
    """Above 0 likewise."""
    allow_biased_sampling: bool = False
    """Train on truncated distributions (top_p, top_k) all the same."""
    max_response_length_in_one_turn: int = 512
    """Tokens one LLM call may sample when the request names no limit, and at most."""
    max_model_len: int = 0
    """Context limit in tokens; 0, or anything above it, takes min(the model's own,
    max_prompt_length + max_response_length)."""
    max_num_seqs: int = 128
    """Sequences the engine decodes at once."""
    kv_cache_tokens: int = 0
    """Tokens the prefix cache keeps after their sequence has ended; 0 chooses by free memory."""
    max_env_worker: int = 128
    """Episodes running at once, each in a thread of its own."""
    max_staleness: int = 0
    """How many weight versions an episode's tokens may lag behind the trainer. 0 is
    synchronous: rollout and training take turns, exactly on-policy."""
    episode_timeout: float = 600.0
    """Seconds a workflow may take before its episode is counted as failed."""
    call_timeout: float = 300.0
    """Seconds the engine may take for one call."""
    judge_timeout: float = 120.0
    """Seconds a judge may take for one episode."""
    max_retries: int = 2
    """Further attempts after an infrastructure failure (never after a workflow's own bug)."""
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    val_kwargs: ValKwargs = field(default_factory=ValKwargs)
    tensor_model_parallel_size: int = only("verl", "trinity", default=1)
    """GPUs per inference engine."""
    mode: str = only("verl", "trinity", default="auto")
    """"sync": rollouts and training take turns on the same GPUs; "async": rollouts have GPUs of
    their own and go on during training, up to `rollout.max_staleness` versions behind; "auto" is
    sync for verl and async for trinity."""
    engine: str = only("verl", "trinity", default="auto")
    """Who samples. For verl: "vllm", "sglang", "embedded" (CPU only), or "auto": vllm on GPUs,
    embedded on the CPU. For trinity: "vllm" (on GPUs, with verl's trainer), "service" (astuner's
    own fine-tuning service samples and trains, on any machine), or "auto": vllm on GPUs,
    service elsewhere."""
    nnodes: int = only("verl", "trinity", default=1)
    """With `rollout.mode: async`: machines of the rollouts' own pool, besides
    `trainer_common.nnodes`."""
    n_gpus_per_node: int = only("verl", "trinity", default=1)
    """With `rollout.mode: async`: GPUs taken on each of these."""
    gpu_memory_utilization: float = only("verl", "trinity", default=0.5)
    """Fraction of a GPU's memory that its inference engine takes, weights and cache."""


@dataclass
class SplitFile:
    """One split of a JSON Lines dataset."""

    file_path: str = ""
    """One JSON object a line. Relative paths are taken from the working directory."""


@dataclass
class JsonlConfig:
    """With `type: jsonl_dataset_file`: files with one JSON object a line."""

    training: SplitFile = field(default_factory=SplitFile)
    validation: SplitFile = field(default_factory=SplitFile)
    """May stay empty: then `task_reader.validation_fraction` of the training rows is held out."""


@dataclass
class HuggingfaceConfig:
    """With `type: huggingface_dat_repo`: anything the `datasets` library reads."""

    dataset_path: str = ""
    """A hub name such as "openai/gsm8k", or a local folder or file that `datasets` reads."""
    dataset_name: str = ""
    """The dataset's configuration, e.g. "main" for openai/gsm8k; empty takes its only one."""
    training_split: str = "train"
    """A slice works too: "train[:1000]"."""
    validation_split: str = "test"
    """Where the dataset has no split "test", or this is empty,
    `task_reader.validation_fraction` of the training rows is held out."""


@dataclass
class ReasoningGymConfig:
    """With `type: reasoning_gym`: generated tasks with scorers of their own."""

    dataset: str = "chain_sum"
    """A generator of the `reasoning-gym` package."""
    params: dict[str, Any] = field(default_factory=dict)
    """The generator's own settings, e.g. {min_terms: 2, max_digits: 1}."""
    size: int = 1000
    """Training tasks."""
    validation_size: int = 64
    """Held-out tasks, generated from another seed; none of them is in the training set."""
    prompt_suffix: str = ""
    """Appended to each question, e.g. how the answer should look."""


@dataclass
class TracesConfig:
    """With `type: traces`: what an agent was asked before, what it answered, how users liked it."""

    log_path: str = ""
    """A file of JSON Lines, one logged conversation a line, or a folder of such files."""
    messages: str = "messages"
    """The field with the conversation, a list of {role, content}; dots lead inside:
    "request.messages"."""
    reply: str = ""
    """The field with the logged reply, a text or a message: "response.choices.0.message".
    Empty: the last assistant message of the conversation."""
    feedback: str = "feedback"
    """The field with what the user thought of it: a number (above 0 is good), true or false,
    or a word such as up, down, positive, negative."""
    require_feedback: bool = True
    """Leave out what nobody rated."""
    filters: list[str] = field(default_factory=list)
    """Functions "package.module->name"; each gets a Trace and says whether to keep it."""
    deduplicate: str = "exact"
    """none, exact (same conversation but for case, spaces and punctuation) or near (as alike as
    `similarity`). Feedback on what counts as one is added up."""
    similarity: float = 0.9
    """With near: the share of characters (rapidfuzz's ratio) from which two are one."""


@dataclass
class RandomDummyConfig:
    """With `type: random_dummy`: small sums, for trying things out."""

    size: int = 32
    """Training tasks."""
    validation_size: int = 8
    """Held-out tasks."""


@dataclass
class EnvironmentTasksConfig:
    """With `type: environment`: the tasks of a world that makes them up from a seed."""

    size: int = 256
    """Training tasks: "train-0", "train-1", ...; the environment gets a seed made from the name."""
    validation_size: int = 32
    """Held-out tasks: "validation-0", ..."""


@dataclass
class EnvServiceConfig:
    """With `type: env_service`: the task ids that an environment service lists."""

    env_url: str = ""
    """The service; empty takes `env.url`, or the one that `env.service` starts."""
    env_type: str = ""
    """What the service calls the environment; empty takes `env.type`, or `env.service`."""
    training_split: str = "train"
    """The service's name of the training tasks."""
    validation_split: str = "val"
    """Where the service has none, `task_reader.validation_fraction` is held out."""


@dataclass
class FieldMapping:
    """Which fields of a row mean what. All others go to `Task.metadata`."""

    task_id: str = "task_id"
    """The row's field that becomes `Task.task_id`; the row number where it is missing."""
    main_query: str = ""
    """The row's field that becomes `Task.main_query`; empty tries main_query, question,
    query, prompt, problem, instruction in this order."""
    init_messages: str = "init_messages"
    """The row's field that becomes `Task.init_messages`: a list of {role, content}."""
    env_type: str = "env_type"
    """The row's field that becomes `Task.env_type`."""
    answer: str = ""
    """The row's field that becomes `metadata["answer"]`; empty takes "answer" as it is."""


@dataclass
class TaskReaderConfig:
    """Where the tasks come from."""

    type: str = "jsonl_dataset_file"
    """jsonl_dataset_file, huggingface_dat_repo, reasoning_gym, environment, env_service,
    traces or random_dummy."""
    jsonl_dataset_file: JsonlConfig = field(default_factory=JsonlConfig)
    huggingface_dat_repo: HuggingfaceConfig = field(default_factory=HuggingfaceConfig)
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    environment: EnvironmentTasksConfig = field(default_factory=EnvironmentTasksConfig)
    env_service: EnvServiceConfig = field(default_factory=EnvServiceConfig)
    traces: TracesConfig = field(default_factory=TracesConfig)
    random_dummy: RandomDummyConfig = field(default_factory=RandomDummyConfig)
    fields: FieldMapping = field(default_factory=FieldMapping)
    """Which fields of a row mean what. All others go to `Task.metadata`."""
    shuffle: bool = True
    """A new seeded order every epoch; the same after a resume."""
    validation_fraction: float = 0.05
    """Held out from the training rows when the source has no validation split."""
    max_train_tasks: int = 0
    """Use only the first N training rows; 0 means all."""


@dataclass
class RegexJudgeConfig:
    """With `judge_type: regex`."""

    pattern: str = ""
    """Must match the final answer; `{answer}` in it stands for the escaped reference."""


@dataclass
class LlmJudgeConfig:
    """With `judge_type: llm`: another model gives the score."""

    base_url: str = ""
    """Any OpenAI-compatible endpoint."""
    model: str = ""
    """The judging model's name at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; the key itself is never in a config."""
    rubric: str = "Is the answer correct? Compare it with the reference answer."
    """What the judging model is asked; it sees question, reference and answer."""
    max_retries: int = 3
    """Further attempts after a connection error, a 429 or a 5xx, with growing pauses."""
    timeout: float = 60.0
    """Seconds for one attempt."""
    on_parse_failure: str = "fail"
    """When no score can be read: "fail" (the episode is dropped and counted) or "zero"."""


@dataclass
class TaskJudgeConfig:
    """Who gives the reward."""

    judge_type: str = "none"
    """none (the workflow returns its reward), customized_protocol, exact_match,
    number_match, math_verify, reasoning_gym, regex or llm."""
    judge_protocol: str = ""
    """With customized_protocol: "package.module->Name", a class or function with
    `compute_reward(task, output)`."""
    answer_key: str = "answer"
    """Where the reference is in `Task.metadata`."""
    output_key: str = "final_answer"
    """Where the workflow put its answer in `WorkflowOutput.metadata`; where it is missing
    the text of the last LLM reply is judged."""
    wrong_reward: float = 0.0
    """Of an answer that is well-formed but wrong."""
    regex: RegexJudgeConfig = field(default_factory=RegexJudgeConfig)
    llm: LlmJudgeConfig = field(default_factory=LlmJudgeConfig)


@dataclass
class ContextTrackerConfig:
    """How recorded calls become training samples."""

    merge: str = "prefix"
    """"prefix" merges calls that share their history into one sample; "none" makes every
    call a sample of its own (slower; for comparison)."""


@dataclass
class EnvConfig:
    """The environment that tasks are played in, as `workflow_task.gym_env`. With `type`, `service`
    or `url` set, every episode gets an instance of its own, which is released after it."""

    type: str = ""
    """Which environment: a folder of envs/ such as "toy_text", an id of gymnasium.make such as
    "FrozenLake-v1", "package.module->Class", or what the service calls it. A task's own `env_type`
    wins over it."""
    service: str = ""
    """An environment (as in `env.type`) that is started as a service of its own for this run, and
    stopped with it. Empty runs `env.type` inside the run's process."""
    url: str = ""
    """An environment service that runs already, e.g. "http://10.0.0.1:8080"."""
    params: dict[str, Any] = field(default_factory=dict)
    """Given to every instance, e.g. {map_name: 4x4, is_slippery: false}; `metadata["env_params"]`
    of a task win over them. All episodes of a task get the same "seed" unless it is set here."""
    max_instances: int = 128
    """Instances at once; episodes beyond it wait."""
    create_timeout: float = 60.0
    """Seconds the environment may take to make or reset an instance."""
    step_timeout: float = 60.0
    """Seconds it may take for one step or score."""
    start_timeout: float = 120.0
    """With `env.service`: seconds until it must be ready."""
    lease: float = 60.0
    """Seconds without a sign of life from this run after which a service frees its instances."""


@dataclass
class DebugEndpoint:
    """With `debug.model: endpoint`."""

    base_url: str = ""
    """Any OpenAI-compatible endpoint."""
    model: str = ""
    """The model's name at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""


@dataclass
class DebugConfig:
    """What `backbone: debug` runs."""

    debug_first_n_tasks: int = only("debug", default=2)
    """Tasks to run, from the start of the training set."""
    debug_max_parallel: int = only("debug", default=1)
    """Episodes at once; 1 runs them in order in the main thread, so that breakpoints stop."""
    num_repeat: int = only("debug", default=1)
    """Episodes per task."""
    model: str = only("debug", default="embedded")
    """embedded (`model.path`), endpoint (`debug.endpoint`) or fake (`debug.fake_replies`)."""
    endpoint: DebugEndpoint = field(
        default_factory=DebugEndpoint, metadata={"backbones": ("debug",)}
    )
    fake_replies: list[str] = field(
        default_factory=lambda: ["This is a scripted reply."], metadata={"backbones": ("debug",)}
    )
    """What the fake answers, one after the other, again from the start at the end."""
    train_step: bool = only("debug", default=False)
    """Also compute the loss and the gradient norm on the episodes, and throw them away."""


@dataclass
class AlgorithmConfig:
    """Advantages and the loss."""

    adv_estimator: str = "grpo"
    """A name of the advantage registry: grpo, dr_grpo, rloo, reinforce_plus_plus, ..."""
    loss: str = "ppo"
    """A name of the loss registry: ppo, gspo, cispo, importance_sampling, ..."""
    clip_ratio_low: float = -1.0
    """The probability ratio is clipped at 1 - this; -1 takes the loss's own value: 0.2 for ppo,
    3e-4 for gspo, none for cispo."""
    clip_ratio_high: float = -1.0
    """Likewise upwards (-1: 0.2 for ppo, 4e-4 for gspo, 0.2 for cispo). Above clip_ratio_low
    this is DAPO's clip-higher (Yu et al. 2025)."""
    loss_agg_mode: str = "episode-mean"
    """How token losses are weighed: episode-mean (GRPO), token-mean (DAPO) or
    constant (Dr.GRPO: divided by max_response_length)."""
    tis_cap: float = 2.0
    """Truncated importance sampling between sampler and trainer: weights are cut at this
    value (Yao et al. 2025); 0 switches it off."""
    dynamic_sampling: bool = False
    """Replace groups whose rewards are all equal by new ones (DAPO) instead of only
    skipping them."""
    max_refill_rounds: int = 3
    """With dynamic_sampling: give up and train on what there is after so many rounds."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-5
    """Learning rate after the warm-up."""
    lr_schedule: str = "constant"
    """constant, linear or cosine, over the run's steps."""
    warmup_steps: int = 0
    """Steps over which the rate grows from 0 to `lr`."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW (Loshchilov & Hutter 2019)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches it off."""


@dataclass
class TrainerConfig:
    """The training loop."""

    total_epochs: int = 1
    """Passes over the training tasks."""
    total_steps: int = 0
    """Stop after so many steps, whatever the epochs say; 0 leaves it to total_epochs."""
    save_freq: int = 20
    """Steps between checkpoints (the last step is always saved); 0 saves only the last."""
    resume_freq: int = 1
    """Steps between rolling checkpoints, of which only the newest is kept: `--resume` goes on
    from it. 1 loses nothing; raise it when weights are large and steps are short."""
    keep_checkpoints: int = 2
    """Older ones are deleted; 0 keeps all."""
    test_freq: int = 20
    """Steps between validations (the last step is always validated); 0 only the last."""
    val_before_train: bool = True
    """Validate once before the first step: the "before" of the final table."""
    logger: list[str] = field(default_factory=lambda: ["console"])
    """Where metrics go besides metrics.jsonl: console, tensorboard, wandb, swanlab,
    trackio, mlflow."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mini_batch_num: int = 1
    """Optimizer steps per batch."""
    micro_batch_tokens: int = 4096
    """Packed tokens that go through the model at once in training: bounds its memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    use_kl_loss: bool = False
    """Add `kl_loss_coef` times the KL to the reference model to the loss."""
    kl_loss_coef: float = 0.002
    """Weight of that KL."""
    kl_loss_type: str = "k3"
    """k1, k2 or k3 (Schulman 2020); low_var_kl is another name of k3."""
    nnodes: int = only("verl", "trinity", default=1)
    """Machines in the Ray cluster."""
    n_gpus_per_node: int = only("verl", "trinity", default=8)
    """GPUs taken on each."""
    device: str = only("verl", "trinity", default="auto")
    """"cuda", "cpu" (slow, for trying out and for tests), or "auto": cuda if a GPU is visible."""
    ray_address: str = only("verl", "trinity", default="")
    """The Ray cluster to run on, e.g. "auto" or "10.0.0.1:6379"; empty starts one on this machine
    and ends it with the run."""
    stall_timeout: float = only("verl", "trinity", default=3600.0)
    """Seconds without any sign of life from the trainer after which the run ends with an error
    instead of waiting on."""


@dataclass
class ModelTunerConfig:
    """The proxy that the workflow's model calls go to."""

    host: str = "127.0.0.1"
    """Address the proxy listens on."""
    port: int = 0
    """0 takes a free one."""


@dataclass
class ServiceClientConfig:
    """With `backbone: tinker`: the service that samples and trains (see docs/tinker.md)."""

    base_url: str = only("tinker", default="")
    """Where it is, e.g. "http://127.0.0.1:8765" for `astuner serve`. Any service that speaks the
    Tinker API will do."""
    base_model: str = only("tinker", default="")
    """The model as the service names it; empty takes `model.path` as it is written, or else the
    only one there is."""
    api_key_env: str = only("tinker", default="TINKER_API_KEY")
    """The environment variable that holds the key; the key itself is never in a config."""
    timeout: float = only("tinker", default=3600.0)
    """Seconds one training request may take, its turn in the service's queue included."""
    outage_timeout: float = only("tinker", default=120.0)
    """Seconds the service may be away; requests are repeated until then."""
    download: bool = only("tinker", default=True)
    """At the end fetch the adapter into the run's folder, in PEFT format."""


@dataclass
class AstunerConfig:
    """Everything below the root key."""

    project_name: str = "astuner"
    """The project under which trackers such as wandb file the run."""
    experiment_name: str = "auto"
    """"auto" takes the name of the YAML file."""
    experiment_dir: str = "runs"
    """A run's folder is experiment_dir/experiment_name."""
    backbone: str = "local"
    """local, debug, verl, trinity or tinker."""
    seed: int = 0
    """Of the task order, the sampling and the adapter's start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    task_reader: TaskReaderConfig = field(default_factory=TaskReaderConfig)
    task_judge: TaskJudgeConfig = field(default_factory=TaskJudgeConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    context_tracker: ContextTrackerConfig = field(default_factory=ContextTrackerConfig)
    model_tuner: ModelTunerConfig = field(default_factory=ModelTunerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    trainer_common: TrainerConfig = field(default_factory=TrainerConfig)
    service: ServiceClientConfig = field(default_factory=ServiceClientConfig)
    verl: dict[str, Any] = field(default_factory=dict, metadata={"backbones": ("verl",)})
    """verl's own settings, as its configuration names them, e.g. {actor_rollout_ref: {actor:
    {entropy_coeff: 0.01}}}. They win over what astuner's keys become, and the run says so."""
    trinity: dict[str, Any] = field(default_factory=dict, metadata={"backbones": ("trinity",)})
    """Trinity-RFT's own settings, as its configuration names them, e.g. {synchronizer:
    {sync_interval: 2}}. They win over what astuner's keys become, and the run says so."""


@dataclass
class RootConfig:
    """A YAML file has one key, `astuner`."""

    astuner: AstunerConfig = field(default_factory=AstunerConfig)
