"""What ESPO costs on the bundled masked-diffusion model, in seconds of the processor, and what coupled masks save.

    python -m bench.espo_cost --output bench/results/espo_cost.json

`step`: the embedded recipe for some optimiser steps, without evaluations and records. Counted as the model's own
are its forward passes, in decoding and scoring, its output layer, and backward. `decode`: tokens per second of
`hapo.samplers.diffusion.decode` and of a plain loop, row by row over all logits, in turns. `variance`: of one
draw's estimate of the ELBO, averaged over responses; coupled masks take two forward passes a draw, so two
independent masks stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

import hapo.masked
from hapo.assets import diffusion_model_path
from hapo.cli.recipe import read_recipe
from hapo.masked import masked_scores
from hapo.parts.elbo import Elbo, contributions
from hapo.samplers.diffusion import Unmasking, decode
from hapo.tasks.addition import addition_reward, load_addition
from hapo.trl import DiffusionConfig, DiffusionTrainer

from .paired import machine, seconds, summary

LENGTH = 14
DRAWS = 64
OF_TASK = {"dataset", "train_size", "eval_size", "model_name_or_path", "threads", "evaluate_every", "output_dir"}


class Spent:
    """Seconds of the processor inside some functions; one inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began
                self._inside = False

        return timed


def step(steps: int) -> dict[str, float]:
    """Share of the optimiser steps of the embedded recipe that the model itself takes."""
    told = {k: v for k, v in read_recipe("diffusion").items() if k not in OF_TASK}
    told |= {"max_steps": steps, "save_strategy": "no", "run_records": False, "disable_tqdm": True}
    train, _ = load_addition(0, 4096, 0)
    with tempfile.TemporaryDirectory() as folder:
        args = DiffusionConfig(folder, **told)
        trainer = DiffusionTrainer(str(diffusion_model_path()), addition_reward, args, train_dataset=train)
        spent, real = Spent(), hapo.masked.score_states
        trainer.model.forward = spent.around(trainer.model.forward)
        trainer.accelerator.backward = spent.around(trainer.accelerator.backward)
        hapo.masked.score_states = spent.around(real)
        try:
            began = time.process_time()
            trainer.train()
            whole = time.process_time() - began
        finally:
            hapo.masked.score_states = real
    return {"steps": steps, "seconds": whole, "of the model": spent.seconds, "share": spent.seconds / whole}


def plain(net: Any, ids: Tensor, how: Unmasking, mask_id: int) -> Tensor:
    """Row by row, all logits, one token a pass: what `decode` is for these settings."""
    rows, never = [], torch.tensor([mask_id])
    for prompt in ids:
        row = torch.cat([prompt, prompt.new_full((how.length,), mask_id)])
        for _ in range(how.length):
            with torch.no_grad():
                logp = net(input_ids=row[None]).logits[0].float().index_fill(1, never, -torch.inf)
            sure, token = logp.log_softmax(-1).max(-1)
            at = sure.masked_fill(row != mask_id, -torch.inf).argmax()
            row[at] = token[at]
        rows.append(row[len(prompt) :])
    return torch.stack(rows)


def decoding(net: Any, tokenizer: Any, rows: int, pairs: int) -> dict[str, Any]:
    """Tokens per second of both, and the ratio of pairs of turns."""
    _, held = load_addition(0, 0, rows)
    ids = tokenizer(list(held["prompt"]), return_tensors="pt").input_ids
    how, mask_id = Unmasking(length=LENGTH, temperature=0.0), tokenizer.mask_token_id
    ours = lambda: decode(net, ids, torch.ones_like(ids), how, mask_id=mask_id)  # noqa: E731
    theirs = lambda: plain(net, ids, how, mask_id)  # noqa: E731
    if not torch.equal(ours().ids, theirs()):
        raise RuntimeError("the plain loop decodes other tokens: nothing to compare")
    times: list[tuple[float, float]] = []
    for turn in range(pairs):
        first, second = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        one, other = seconds(first)[0], seconds(second)[0]
        times.append((one, other) if turn % 2 == 0 else (other, one))
    tokens = rows * LENGTH
    return {
        "rows": rows,
        "tokens per second": summary([tokens / a for a, _ in times]),
        "of the plain loop": summary([tokens / b for _, b in times]),
        "ratio": summary([b / a for a, b in times]),
    }


@torch.no_grad()
def variance(net: Any, tokenizer: Any, rows: int) -> dict[str, float]:
    """Of the estimate, nats squared, averaged over sampled responses."""
    _, held = load_addition(0, 0, rows)
    prompts = tokenizer(list(held["prompt"]), return_tensors="pt").input_ids
    generator, mask_id = torch.Generator().manual_seed(0), tokenizer.mask_token_id
    how = Unmasking(length=LENGTH)
    answers = decode(net, prompts, torch.ones_like(prompts), how, mask_id=mask_id, generator=generator).ids
    ids = torch.cat([prompts, answers], 1)

    def estimates(likelihood: Elbo) -> Tensor:
        drawn = []
        for _ in range(DRAWS):
            noise = likelihood.draw(rows, LENGTH, generator)
            hidden, weight = likelihood.views(noise, torch.ones_like(prompts).bool(), LENGTH)
            b, w, _ = hidden.shape
            tokens, wanted = ids.unsqueeze(1).expand_as(hidden).flatten(0, 1), hidden.flatten(0, 1)
            shown = tokens.masked_fill(wanted, mask_id)
            logp, _ = masked_scores(net, net, shown, torch.ones_like(shown), tokens, wanted, shifted=False)
            drawn.append(contributions(logp[:, -LENGTH:].view(b, w, LENGTH), weight).sum(1))
        return torch.stack(drawn)

    coupled, one, two = (estimates(Elbo(m, c)) for m, c in ((1, True), (1, False), (2, False)))
    figures = {"responses": rows, "draws": DRAWS, "mean ELBO": coupled.mean().item()}
    for name, values in (("coupled, one draw", coupled), ("one mask", one), ("two masks", two)):
        figures[f"variance, {name}"] = values.var(0).mean().item()
    figures["two masks over coupled"] = figures["variance, two masks"] / figures["variance, coupled, one draw"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    net = AutoModelForMaskedLM.from_pretrained(diffusion_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(diffusion_model_path())
    found = {
        "machine": machine(),
        "decode": decoding(net, tokenizer, given.rows, given.pairs),
        "variance": variance(net, tokenizer, given.rows),
        "step": step(given.steps),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
