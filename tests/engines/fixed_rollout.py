"""One training run on fixed completions, with the gradients of each optimiser step."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import TrainerCallback

from hapo.engines.trl.support import LogpOver
from tests.engines import tiny


def rollout(prompts: list[str], trainer: Any) -> dict[str, list[list[Any]]]:
    """Completions that depend on the global row alone: lengths 1 to 8, every second one ended by eos."""
    first = trainer.accelerator.process_index * len(prompts)
    completions = []
    for row in range(first, first + len(prompts)):
        g = torch.Generator().manual_seed(row)
        n = int(torch.randint(1, 9, (), generator=g))
        ids = torch.randint(2, len(tiny.ALPHABET) + 2, (n,), generator=g).tolist()
        completions.append([*ids[:-1], 1] if row % 2 else ids)
    encode = tiny.tokenizer()
    return {
        "prompt_ids": [encode(p)["input_ids"] for p in prompts],
        "completion_ids": completions,
        # Log-probs of an imaginary sampler, so that the importance weights are not 1.
        "logprobs": [[-2.0 - 0.1 * (t % 3) for t in c] for c in completions],
    }


class Supported:
    """The same, drawn from 3 to 6 tokens each, for runs with a top_k."""

    draws_with_trainer = True

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[list[Any]]]:
        """The completions, and log-probs with the tokens that they are over."""
        drawn = rollout(prompts, trainer)
        others = len(tiny.ALPHABET) + 2
        drawn["logprobs"] = [
            [LogpOver(x, [(t + 5 * k) % others for k in range(3 + t % 4)]) for x, t in zip(row, ids, strict=True)]
            for row, ids in zip(drawn["logprobs"], drawn["completion_ids"], strict=True)
        ]
        return drawn


class Gradients(TrainerCallback):
    """Keeps what the optimiser is about to be given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        module = getattr(model, "module", model)
        self.steps.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
        self.weights.append({n: p.detach().clone() for n, p in module.named_parameters()})


def run(
    per_device: int, accumulation: int, per_generation: int, iterations: int, **options: Any
) -> tuple[Any, Any]:
    """A short run; what it gave the optimiser, and the trainer. `watch` sees each micro-batch's log-probs."""
    keep = Gradients()
    watch = options.pop("watch", None)
    if options.get("method", "hapo") == "hapo":  # a rollout function samples by itself, without component A
        options["method_options"] = {"components": "BCD", **(options.get("method_options") or {})}
    with tempfile.TemporaryDirectory() as folder:
        t = tiny.trainer(
            folder,
            rollout_func=Supported() if options.get("top_k") else rollout,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=per_generation,
            num_iterations=iterations,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            beta=0.0,
            **{"max_steps": 2, "learning_rate": 0.005, **options},
        )
        t.add_callback(keep)
        if watch is not None:
            score = t.scorer.current

            def watched(*args: Any) -> Any:
                scored = score(*args)
                watch(scored.logp)
                return scored

            t.scorer.current = watched
        t.train()
    return keep, t
