"""Do the tests catch a line gone wrong? One line of a copy of the library is changed, and its tests must fail.

    python scripts/mutations.py            # all, about half an hour on a core
    python scripts/mutations.py advantage  # those in files with this word in their path

Each entry names the tests that prove the claim of its line. Where code has moved on, its entry moves with it: a
line that is not found once is an error. Run it when tests are taken out or thinned.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAWS = "tests/test_laws.py"
RUNS = "tests/engines/test_trl_runs.py"
EXACT = "tests/engines/test_trl_exactness.py"
WORK = "tests/engines/test_trl_work.py"
SCORES = "tests/test_scoring.py"
HYBRID = "tests/engines/test_trl_hybrid.py"

MUTATIONS: list[tuple[str, str, str, str]] = [
    # parts
    ("parts/advantage.py", "/ (n - 1).clamp_min(1)).sqrt()\n    return centred.masked_fill", "/ n).sqrt()\n    return centred.masked_fill", "tests/methods/test_grpo.py"),
    ("parts/advantage.py", "torch.zeros_like(group) if scale == \"batch\" else group", "group", "tests/parts"),
    ("parts/advantage.py", "total = total.masked_fill(r.isnan().all(1), torch.nan)\n", "", "tests/parts"),
    ("parts/advantage.py", "centred * n / (n - 1).clamp_min(1)", "centred", "tests/methods/test_rloo.py"),
    ("parts/advantage.py", "mean = group_sum(length * r, index, k) / n\n", "mean = group_sum(r, index, k) / n\n", "tests/methods/test_hapo.py"),
    ("parts/advantage.py", "counted = ~reward.isnan()\n    r = ", "counted = torch.ones_like(reward, dtype=torch.bool)\n    r = ", "tests/test_masked_rows.py"),
    ("parts/surrogate.py", "clipped_low = negative & (ratio < lower)", "clipped_low = negative & (ratio <= lower)", "tests/parts tests/methods"),
    ("parts/surrogate.py", "beyond = (advantage < 0) & (ratio > dual_clip)\n        effective", "beyond = ratio > dual_clip\n        effective", "tests/parts tests/methods"),
    ("parts/surrogate.py", "torch.where(low, beta1 * lower, torch.where(high, beta2 * upper, r))", "torch.where(low, beta2 * lower, torch.where(high, beta1 * upper, r))", "tests/methods/test_ce_gppo.py"),
    ("parts/surrogate.py", "return Surrogate(-weight * advantage * logp, r < lower, r > upper)", "return Surrogate(-weight * advantage * logp.exp(), r < lower, r > upper)", "tests/methods/test_cispo.py"),
    ("parts/surrogate.py", "flipped = torch.where(negative, ratio, ratio / r.square())", "flipped = torch.where(negative, ratio, 1 / ratio)", "tests/methods/test_aspo.py"),
    ("parts/bounds.py", "low - low * alpha * s.clamp(max=0)", "low + low * alpha * s.clamp(max=0)", "tests/methods/test_hapo.py"),
    ("parts/reduce.py", "return _on(loss, mask).sum() / max(totals.kept, 1)", "return _on(loss, mask).sum() / max(int(mask.sum()), 1)", LAWS + " -k split"),
    ("parts/reduce.py", "per_sequence = _on(loss, mask).sum(-1) / mask.sum(-1).clamp_min(1)", "per_sequence = _on(loss, mask).mean(-1)", LAWS + " -k padding_width"),
    ("parts/ratio.py", ".clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()", ".exp()", "tests/parts"),
    ("parts/penalty.py", "return d.exp() - d - 1.0", "return d.exp() + d - 1.0", "tests/methods/test_grpo.py"),
    ("parts/shaping.py", "return -factor * over.clamp(0.0, 1.0)", "return -factor * over.clamp_min(0.0)", "tests/parts"),
    ("parts/shaping.py", "applies: Bool[Tensor, \"B T\"] = inside ^ (signal > 0)", "applies: Bool[Tensor, \"B T\"] = inside == (signal > 0)", "tests/methods/test_hapo.py"),
    ("parts/select.py", "return mask & ~(candidate & (h < threshold))", "return mask & ~(candidate & (h <= threshold))", "tests/methods/test_stapo.py"),
    ("parts/select.py", "return (advantage >= 0) | (away <= threshold)", "return away <= threshold", "tests/parts"),
    ("parts/select.py", "for key in reversed(keys):", "for key in keys:", "tests/methods/test_sent.py"),
    ("methods/sent.py", "over = certain if cov_mean == \"low\" else mask", "over = mask", "tests/methods/test_sent.py"),
    ("methods/sent.py", "if not len(of) or bool((of == of[0]).all()):", "if not len(of):", "tests/methods/test_sent.py"),
    ("parts/entropy.py", "down = max(-stats.h_min, SCALE_FLOOR) * (1 if variant == \"paper\" else -1)", "down = max(-stats.h_min, SCALE_FLOOR)", "tests/methods/test_hapo.py"),
    ("parts/temperature.py", "return 1.0 + tau * entropy_signal(entropy, stats, variant).clamp(-1.0, 1.0)", "return 1.0 + tau * entropy_signal(entropy, stats, variant)", "tests/parts tests/methods/test_hapo.py tests/samplers"),
    # methods and the core call
    ("methods/vespo.py", "decay * (1.0 - log_w.exp())", "-decay * log_w.exp()", "tests/methods/test_vespo.py"),
    ("methods/egspo.py", "undecided(logp.detach().clamp_max(0.0))", "undecided(logp.detach())", LAWS + " -k test_edges_are_finite"),
    ("methods/egspo.py", "torch.where(gate > 0, advantage, factor * advantage)", "torch.where(gate > 0, advantage, factor * advantage.clamp_min(0.0))", "tests/methods/test_egspo.py"),
    ("parts/select.py", "k = max(1, math.floor(rho * n + 1e-9))", "k = max(1, math.ceil(rho * n - 1e-9))", "tests/methods/test_egspo.py"),
    ("methods/gspo.py", "eps_high: float = 4e-4", "eps_high: float = 4e-3", "tests/methods/test_gspo.py"),
    ("methods/hapo.py", '**over_tokens) if "B" in on else', '**over_tokens) if "B" not in on else', LAWS + " -k test_limits"),
    ("method.py", "used = mixed_groups(rollout.verdict, group, scored)", "used = mixed_groups(reward, group, scored)", "tests/methods/test_dapo.py tests/parts " + RUNS),
    ("method.py", "loss = surrogate.loss if batch.weight is None else surrogate.loss * record.weight", "loss = surrogate.loss", LAWS + " -k sampler"),
    ("method.py", "everywhere = replace(totals, kept=totals.tokens)", "everywhere = totals", "tests/methods/test_forking_tokens.py"),
    ("method.py", "record.ratio = torch.where(mask, self.ratio(record), 1.0)", "record.ratio = self.ratio(record)", "tests/test_autograd.py -k forgets"),
    ("batch.py", "return torch.where(mask, x.to(working_dtype(x)), 0.0)", "return x.to(working_dtype(x)) * mask", LAWS + " -k test_mask"),
    ("tasks/semantic.py", "same(one, other) or same(other, one)", "same(one, other)", "tests/tasks/test_semantic.py"),
    ("engines/trl/stages.py", "seed + 1_000_003 * stage + turn", "seed + 1_000_003 * stage", "tests/engines/test_stages.py"),
    ("engines/trl/rollout.py", "0 if self.stages is None else self.stages.of(inputs[0])", "0", "tests/cli/test_curriculum.py"),
    # scoring
    ("head.py", "gain = self.scale / (self.softcap or self.t_base)", "gain = self.scale / self.t_base", SCORES),
    ("scoring.py", "return (scaling if config.model_type == \"hyperclovax\" else 1.0 / scaling), softcap", "return scaling, softcap", SCORES),
    ("head.py", "cooler = 1 / factor(entropy[rows])", "cooler = factor(entropy[rows])", SCORES),
    ("scoring.py", "return parameter.full_tensor(grad_placements=[Partial(\"avg\")] * parameter.device_mesh.ndim)", "return parameter.full_tensor()", SCORES + " -k ddp"),
    # the TRL engine
    ("engines/trl/entropy_term.py", "float(add_up(self._sum))", "float(self._sum)", "tests/engines/test_trl_parts.py"),
    ("engines/trl/entropy_term.py", "if self._sum is None else self._sum + value.detach()", "", "tests/engines/test_trl_parts.py"),
    ("engines/trl/auxiliary.py", "loss = loss * ranks\n", "loss = loss * 1\n", EXACT + " -k ranks"),
    ("engines/trl/auxiliary.py", "loss = loss + weight * value * ranks", "loss = loss + weight * value", EXACT + " -k ranks"),
    ("engines/trl/auxiliary.py", "value / micro_batches", "value", "tests/engines/test_trl_parts.py -k router"),
    ("engines/trl/scorer.py", 'layer.disable_adapters or "ref" in layer.active_adapters', '"ref" in layer.active_adapters', "tests/engines/test_trl_parts.py"),
    ("engines/trl/rows.py", "group = torch.arange(len(reward), device=reward.device) // group_size\n", "group = torch.arange(len(reward), device=reward.device) // 2\n", RUNS + " -k dynamic"),
    ("engines/trl/scorer.py", "parts.append(score_tokens(model, ids, attention, mask, t_base=self.t_base))", "parts.append(score_tokens(model, ids, attention, mask))", EXACT + " -k core"),
    ("engines/trl/trainer.py", "self._sampled_with = self.temperature_stats  # None at the first step", "pass", RUNS + " -k adaptive"),
    ("engines/trl/trainer.py", "loss = self._pass_loss(model, *last, records) + before", "loss = self._pass_loss(model, *last, records)", WORK),
    ("engines/trl/rollout.py", "self.generator.manual_seed(self.seed + int(self._state().epoch or 0))", "pass", RUNS + " -k order_of_an_epoch"),
    ("engines/trl/rows.py", "totals = StepTotals(*accelerator.reduce(local, \"sum\").tolist())", "totals = StepTotals(*local.tolist())", EXACT + " -k ranks"),
    ("engines/trl/rollout.py", "order = torch.argsort((~mixed).int(), stable=True)[:most]", "order = torch.argsort(mixed.int(), stable=True)[:most]", RUNS + " -k dynamic"),
    ("engines/trl/trainer.py", "self._dynamic.prompts.position, self._dynamic.share = state.fresh_prompts, state.mixed_share", "self._dynamic.share = state.mixed_share", RUNS + " -k bit_for_bit"),
    ("engines/trl/trainer.py", "self.temperature_stats, self._sampled_with = state.stats, state.sampled_with", "self.temperature_stats = state.stats", RUNS + " -k bit_for_bit"),
    ("engines/trl/trainer.py", "loss = (1 - mu) * loss", "pass", HYBRID),
    ("engines/trl/trainer.py", "self._backward(mu * out.loss * ranks)", "self._backward(out.loss * ranks)", HYBRID),
    ("engines/trl/demonstrations.py", "totals=self.totals(step),", "totals=None,", HYBRID),
    ("engines/trl/demonstrations.py", "if self._order[0] != epoch:", "if self._order[0] < 0:", HYBRID),
    ("engines/trl/demonstrations.py", "places = range(step * self.per_step, (step + 1) * self.per_step)", "places = range(self.per_step)", HYBRID),
    ("engines/trl/drawn.py", "if drawn is None or _drops_out(net):", "if drawn is None:", WORK),
    ("engines/trl/passes.py", "> most:", "> 2 * most:", WORK),
    # samplers and commands
    ("samplers/decoding.py", "scores = logits if factor is None else logits / factor(entropy).unsqueeze(-1)", "scores = logits if factor is None else logits * factor(entropy).unsqueeze(-1)", "tests/samplers/test_transformers.py"),
    ("samplers/decoding.py", "squeeze(-1) / t_base - normaliser", "squeeze(-1) - normaliser", "tests/samplers tests/engines/test_trl_work.py"),
]  # fmt: skip


def survives(file: str, old: str, new: str, tests: str, home: Path) -> bool:
    """Whether the tests pass with the line changed."""
    target = home / "hapo" / file
    source = target.read_text()
    if source.count(old) != 1:
        sys.exit(f"src/hapo/{file} has this {source.count(old)} times, not once: {old!r}")
    target.write_text(source.replace(old, new))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        target.write_text(source)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{file}: {' '.join(new.split())[:60]}: {failed[0][:150] if failed else 'SURVIVES'}", flush=True)
    return not failed


def main() -> None:
    """Every chosen mutation in turn."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in MUTATIONS if word in m[0]]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shutil.copytree(ROOT / "src" / "hapo", home / "hapo")
        alive = sum(survives(*mutation, home) for mutation in chosen)
    print(f"{len(chosen) - alive} of {len(chosen)} caught")
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
