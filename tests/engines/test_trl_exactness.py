"""The TRL engine computes what the core computes, however the batch is split."""

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

import hapo
from hapo.engines.trl.rows import RolloutRows
from tests.engines import fixed_rollout, tiny
from tests.two_ranks import SPLIT

ROUNDING = 1e-5
"""Of the largest entry of a gradient. The same sums in another order, in float32, differ by up to 1.1e-6, by the processor."""


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest entry."""
    scale = max(x.abs().max().item() for x in a.values())
    assert scale > 1e-4, "a gradient of zero shows nothing"
    return max((a[n] - b[n]).abs().max().item() for n in a) / scale


@pytest.mark.parametrize("options", SPLIT.values(), ids=SPLIT)
def test_the_gradient_does_not_depend_on_the_micro_batch(options):
    whole, _ = fixed_rollout.run(16, 1, 2, 1, **options)
    for per_device, accumulation in [(2, 8), (4, 4), (8, 2)]:
        split_run, _ = fixed_rollout.run(per_device, accumulation, 2 * accumulation, 1, **options)
        for reference, split in zip(whole.steps, split_run.steps, strict=True):
            assert difference(reference, split) <= ROUNDING


@pytest.mark.xdist_group("two_ranks")
@pytest.mark.parametrize("name", SPLIT)
def test_the_gradient_does_not_depend_on_the_ranks(name, two_ranks):
    """Twelve rows in groups of four: on two ranks the second group straddles them."""
    ranks = load_file(two_ranks / f"{name}.safetensors")
    reference, _ = fixed_rollout.run(12, 1, 1, 2, **SPLIT[name])
    for i, step in enumerate(reference.steps):
        assert difference(step, {n: ranks[f"{i}.{n}"] for n in step}) <= ROUNDING


OF_TINY_MODEL = {
    "dr_grpo": {"length_limit": 8},
    # The sampler is so far away that the paper's kernel leaves nothing of the gradient.
    "vespo": {"k_pos": 0.1, "k_neg": 0.2, "lambda_pos": 0.01, "lambda_neg": 0.02},
}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hapo", {"variant": "release"}),
        ("hapo", {"components": "BCD", "sampler_cap": None}),
        ("forking_tokens", {"entropy_source": "old"}),
        ("stapo", {"tau_p": 0.5}),
        *[(n, OF_TINY_MODEL.get(n, {})) for n in hapo.methods("policy") if not hapo.method(n).likelihood],
    ],
)
def test_engine_equals_core(method, options):
    """Loss, d loss / d logp and the weights' gradient against the core; log-probs from a plain forward."""
    micro_batches = []

    def watch(logps):
        if logps.requires_grad:
            logps.retain_grad()
            micro_batches.append(logps)

    run, trainer = fixed_rollout.run(
        8, 2, 4, 1, watch=watch, method=method, method_options=options, temperature=0.7
    )
    core = hapo.method(method, **({"components": "BCD"} if method == "hapo" else {}) | options, kl_coef=0.0)
    rows = trainer._buffered_inputs
    ids = torch.cat([_column(rows, "prompt_ids"), _column(rows, "completion_ids")], 1)
    attention = torch.cat([_column(rows, "prompt_mask"), _column(rows, "completion_mask")], 1)
    width = _column(rows, "completion_ids").shape[1]
    net = tiny.model()

    def plain_scores(weights):
        net.load_state_dict(weights)
        logits = net(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1] / 0.7
        logp = logits.log_softmax(-1)
        return logp.gather(-1, ids[:, -width:, None])[..., 0], -(logp.exp() * logp).sum(-1)

    with torch.no_grad():
        old_logp, old_entropy = plain_scores(run.weights[0])
    batch = core.prepare(
        hapo.TokenBatch(
            mask=_column(rows, "completion_mask").bool(),
            old_logp=old_logp,
            old_entropy=old_entropy,
            sampler_logp=_column(rows, "sampling_per_token_logps"),
            reward=_column(rows, "verdict"),
            group=torch.cat([RolloutRows.of(row).batch.group for row in rows]),
        )
    )
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    worst_ratio = 0.0
    for step, (weights, gradient) in enumerate(zip(run.weights, run.steps, strict=True)):
        logp, entropy = plain_scores(weights)
        now = batch.replace(logp=logp, entropy=entropy.detach())
        mini = core.step(now.rows(slice(16 * step, 16 * step + 16)))
        out = core.loss(mini)
        (by_token,) = torch.autograd.grad(out.loss, logp, retain_graph=True)
        net.zero_grad()
        out.loss.backward()
        assert losses[step] == pytest.approx(out.loss.item(), abs=5e-6)
        engine = torch.cat([m.grad for m in micro_batches[2 * step : 2 * step + 2]])
        torch.testing.assert_close(engine, by_token[16 * step : 16 * step + 16], rtol=0, atol=1e-6)
        assert difference({n: p.grad for n, p in net.named_parameters()}, gradient) <= ROUNDING
        worst_ratio = max(worst_ratio, ((mini.logp - mini.old_logp)[mini.mask].exp() - 1).abs().max().item())
        assert out.tokens["clipped"].any() or step == 0 or "bounds" not in core.stages
    assert worst_ratio > 0.3


def test_the_first_update_of_dapo_is_that_of_trls_own_trainer(tmp_path):
    """The same completions: the two gradients differ by their normaliser, which counts other groups, alone."""
    schedule = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "max_steps": 1, "beta": 0.0}
    schedule |= {"learning_rate": 0.005, "optim": "sgd", "max_grad_norm": 0.0}
    gradients = []
    for build in (_ours, _trls):
        keep, trainer = fixed_rollout.Gradients(), build(tmp_path, schedule)
        trainer.add_callback(keep)
        trainer.train()
        gradients.append(torch.cat([g.flatten() for g in keep.steps[0].values()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99999


def _ours(folder, schedule):
    options = {"method": "dapo", "method_options": {"sampler_cap": None}}
    with pytest.warns(UserWarning, match="every importance ratio is 1"):
        return tiny.trainer(folder / "ours", rollout_func=fixed_rollout.rollout, **schedule, **options)


def _trls(folder, schedule):
    config = GRPOConfig(
        str(folder / "theirs"), loss_type="dapo", num_generations=4, max_completion_length=8, use_cpu=True, bf16=False,
        report_to="none", activation_checkpointing=False, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, seed=7, **schedule,
    )  # fmt: skip
    return GRPOTrainer(
        tiny.model(),
        tiny.count_digits,
        config,
        train_dataset=tiny.data(),
        processing_class=tiny.tokenizer(),
        rollout_func=fixed_rollout.rollout,
    )


def _column(rows, name):
    """One field of the micro-batches as one tensor."""
    return torch.cat([row[name] for row in rows])
