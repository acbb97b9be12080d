"""From the configuration to settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from astuner.algorithm.advantages import rloo
from astuner.algorithm.aggregation import token_mean
from astuner.config.schema import AstunerConfig
from astuner.errors import ConfigError
from astuner.trainer import TrainSettings
from astuner.trainer.settings import config_hash


def test_everything_is_resolved() -> None:
    config = AstunerConfig()
    config.rollout.temperature = 0.8
    trainer = config.trainer_common
    trainer.total_epochs = 3
    trainer.algorithm.adv_estimator = "rloo"
    trainer.algorithm.loss_agg_mode = "token-mean"
    trainer.algorithm.clip_ratio_high = 0.28
    trainer.use_kl_loss = True
    trainer.optim.lr_schedule = "linear"
    settings = TrainSettings.from_config(config, steps_per_epoch=10)
    assert settings.total_steps == 30
    assert settings.estimator is rloo
    assert settings.aggregation is token_mean
    assert settings.loss.name == "ppo"
    # clip_ratio_low is left to the loss
    assert settings.loss.params == {"clip_high": 0.28, "tis_cap": 2.0}
    assert (settings.loss.kl_coef, settings.loss.kl_type) == (0.002, "k3")
    assert settings.loss.temperature == 0.8
    assert settings.adam(16).lr == pytest.approx(0.5e-5)
    # 64 episodes at once fit 128 workers: 2 * (600 + 120) s * 3 attempts
    assert settings.rollout_deadline == 4320


def test_a_loss_gets_only_the_parameters_it_reads() -> None:
    config = AstunerConfig()
    config.trainer_common.algorithm.loss = "importance_sampling"
    settings = TrainSettings.from_config(config, 1)
    assert settings.loss.params == {"tis_cap": 2.0}
    assert settings.loss.kl_coef == 0.0


def test_total_steps_wins_over_epochs() -> None:
    config = AstunerConfig()
    config.trainer_common.total_steps = 7
    assert TrainSettings.from_config(config, steps_per_epoch=10).total_steps == 7


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("algorithm", "adv_estimator", "gppo", "Unknown advantage estimator 'gppo'"),
        ("algorithm", "loss", "pppo", "Unknown loss 'pppo'"),
        ("algorithm", "loss_agg_mode", "mean", "Unknown aggregation 'mean'"),
        ("algorithm", "tis_cap", -1.0, "algorithm.tis_cap is -1.0; it must be at least 0"),
        ("optim", "betas", [0.9], "optim.betas is \\[0.9\\]; it needs two"),
        ("optim", "lr_schedule", "exp", "lr_schedule is 'exp'"),
        ("", "mini_batch_num", 0, "trainer_common.mini_batch_num is 0; it must be at least 1"),
        ("", "kl_loss_type", "k4", "Unknown KL estimator 'k4'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    section: str, key: str, value: object, message: str
) -> None:
    config = AstunerConfig()
    trainer = config.trainer_common
    setattr(getattr(trainer, section) if section else trainer, key, value)
    with pytest.raises(ConfigError, match=message):
        TrainSettings.from_config(config, 1)


def test_the_hash_ignores_what_changes_nothing_that_is_learnt() -> None:
    config = AstunerConfig()
    same = replace(config, trainer_common=replace(config.trainer_common, total_steps=99))
    other = replace(config, data=replace(config.data, train_batch_size=99))
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash(other)
