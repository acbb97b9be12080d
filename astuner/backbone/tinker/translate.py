"""Our configuration as requests of the Tinker API, in words, and what the API cannot say.

Pure and without the SDK. Losses, aggregations and KL terms are not here: their gradient is
exact with every one of them (see `gradients`). What is refused is what a service would
compute otherwise than the configuration says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from astuner.backbone.lora_parts import PARTS, unknown_parts
from astuner.backbone.tinker.gradients import needs_forward_first
from astuner.backbone.translation import Translation
from astuner.config.keys import full
from astuner.config.loaded import joined
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError

Problem = tuple[str, str]
"""A key, and what is wrong with it."""

_CREATE, _ADAM, _SAMPLE = "create_model:", "optim_step: adam_params.", "asample: sampling_params."
BECOMES: Mapping[str, str] = {
    "seed": f"{_CREATE} lora_config.seed; read by astuner too",
    "model.path": "tokenizer and chat template; base_model where service.base_model is empty",
    "model.lora.rank": f"{_CREATE} lora_config.rank",
    "model.lora.target_modules": f"{_CREATE} lora_config.train_attn, train_mlp, train_unembed",
    "rollout.temperature": f"{_SAMPLE}temperature",
    "rollout.top_p": f"{_SAMPLE}top_p",
    "rollout.top_k": f"{_SAMPLE}top_k",
    "rollout.max_response_length_in_one_turn": f"{_SAMPLE}max_tokens",
    "trainer_common.algorithm.loss": "forward_backward: loss_fn",
    "trainer_common.algorithm.clip_ratio_low": "forward_backward: loss_fn_config, or the weights",
    "trainer_common.algorithm.clip_ratio_high": "forward_backward: loss_fn_config, or the weights",
    "trainer_common.algorithm.loss_agg_mode": "forward_backward: folded into the advantages",
    "trainer_common.algorithm.tis_cap": "forward_backward: loss_fn_config, or the weights",
    "trainer_common.kl_loss_coef": "forward_backward: folded into the weights",
    "trainer_common.kl_loss_type": "forward_backward: folded into the weights",
    "trainer_common.optim.lr": f"{_ADAM}learning_rate",
    "trainer_common.optim.betas": f"{_ADAM}beta1, beta2",
    "trainer_common.optim.weight_decay": f"{_ADAM}weight_decay",
    "trainer_common.optim.max_grad_norm": f"{_ADAM}grad_clip_norm",
    "trainer_common.save_freq": "save_weights",
    "trainer_common.resume_freq": "save_weights",
    "service.base_url": "the service's address",
    "service.base_model": f"{_CREATE} base_model",
}
"""All other keys are read by astuner itself."""

OWN = (
    "The adapter's alpha, device, precision and micro-batches are the service's own (for astuner "
    "serve: model.lora_alpha, model.device, model.dtype, model.micro_batch_tokens)."
)


def problems(config: AstunerConfig) -> list[Problem]:
    """Everything that would keep the run from starting."""
    return [problem for rule in (_lora, _temperature) for problem in rule(config)]


def check(config: AstunerConfig) -> None:
    """Raises ConfigError with everything that the API cannot honour."""
    if found := problems(config):
        raise ConfigError(joined([f"`{full(key)}` {message}" for key, message in found]))


def notes(config: AstunerConfig) -> list[str]:
    """What is the same, but slower."""
    why = needs_forward_first(config)
    return [f"Each update makes one more forward pass: {why}."] if why else []


def translation(config: AstunerConfig) -> Translation:
    """For `astuner explain`."""
    told = [f"`{full(key)}` {message}" for key, message in problems(config)]
    if not config.service.base_url:
        told.append(f"`{full('service.base_url')}` must be set, e.g. http://127.0.0.1:8765.")
    return Translation(becomes=BECOMES, notes=(OWN, *notes(config)), problems=tuple(told))


def _lora(config: AstunerConfig) -> Iterator[Problem]:
    lora = config.model.lora
    if not lora.enable:
        yield "model.lora.enable", "is false, but the Tinker API trains LoRA adapters only."
    unknown = unknown_parts(lora.target_modules)
    if lora.enable and unknown:
        yield (
            "model.lora.target_modules",
            f"names {', '.join(unknown)}, but the Tinker API chooses whole parts of a model: "
            f"{', '.join(PARTS)}.",
        )


def _temperature(config: AstunerConfig) -> Iterator[Problem]:
    if config.rollout.temperature != 1:
        yield (
            "rollout.temperature",
            f"is {config.rollout.temperature}, but the Tinker API trains the distribution at "
            "temperature 1, so the ratio of the two would be biased. Set it to 1.",
        )
