"""Training of masked-diffusion models: what is refused, the gradient for any split, resume, what meets the head."""

from __future__ import annotations

import pytest

import hapo
from tests.engines import tiny


@pytest.mark.parametrize("name", ["espo", "diffu_grpo"])
@pytest.mark.parametrize("by", ["name", "object"])
def test_the_trainer_of_autoregressive_models_refuses_methods_of_diffusion_models(name, by, tmp_path):
    given = {"method": name, "beta": 0.0} if by == "name" else {"method_object": hapo.method(name, kl_coef=0.0)}
    with pytest.raises(ValueError, match=f"'{name}' is one of masked-diffusion models.*hapo.trl.DiffusionTrainer"):
        tiny.trainer(tmp_path, **given)
