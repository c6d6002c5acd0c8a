"""On a CUDA device: the kernels, which are opt-in, and the CPU's numbers with and without them. `make test-gpu`."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import hapo
from hapo import kernels as opt_in
from hapo.batch import EntropyStats
from hapo.kernels import plain
from hapo.kernels import scores as kernels
from hapo.methods._options import TemperatureOptions
from hapo.parts.entropy import entropy_from_logits
from hapo.samplers.rule import TemperatureRule, temper_
from hapo.samplers.transformers import sampling
from hapo.scoring import attach_scoring, score_hidden, score_tokens

DEVICE = torch.device("cuda")
RULE = TemperatureRule(TemperatureOptions(tau=0.3), EntropyStats(pivot=0.3, sigma=1.0, h_max=2.0, h_min=-8.0))


@pytest.fixture(params=["0", "1"], ids=["torch", "triton"])
def path(monkeypatch, request):
    """HAPO_TRITON, as in a new process; gives the names of the kernels that were compared with torch so far."""
    monkeypatch.setenv("HAPO_TRITON", request.param)
    monkeypatch.setattr(opt_in, "_compared", set())
    opt_in._wanted.cache_clear()
    yield lambda *names: {form[0] for form in opt_in._compared} == (set(names) if request.param == "1" else set())
    opt_in._wanted.cache_clear()


def logits_of(n: int, v: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(n + v)
    z = 4 * torch.randn(n, v, generator=g) + 30 * torch.randn(n, 1, generator=g)
    z[0, ::3] = -torch.inf
    z[1] = -torch.inf
    z[1, 5] = 2.0
    return z.to(dtype)


def exact(z: torch.Tensor, tokens: torch.Tensor, scale: torch.Tensor | None = None):
    z = z.double() if scale is None else z.double() * scale.double()[:, None]
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(-1e4)).sum(-1)
    return log_p.gather(-1, tokens[:, None]).squeeze(-1), entropy, z.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [7, 4096, 49_152, 151_937])
def test_scores_kernel(v, dtype):
    z = logits_of(9, v, dtype)
    tokens = torch.randint(1, 6, (9,))
    tokens[1] = 5
    scale = 0.5 + torch.rand(9)
    for s in (None, scale):
        found = kernels.scores(z.to(DEVICE), tokens.to(DEVICE), None if s is None else s.to(DEVICE))
        for got, want in zip(found, exact(z, tokens, s), strict=True):
            torch.testing.assert_close(got.cpu().double(), want, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("v", [7, 49_152, 151_937])
def test_gradient_kernel(v):
    z = logits_of(9, v, torch.float32)
    tokens = torch.full((9,), 5)
    a, b = torch.randn(9), torch.randn(9)
    _, entropy, normaliser = exact(z, tokens)
    whole = z.double().log_softmax(-1)
    p = whole.exp()
    onehot = torch.nn.functional.one_hot(tokens, v).double()
    for b_or_none in (None, b):
        want = a.double()[:, None] * (onehot - p)
        if b_or_none is not None:
            want = want - b.double()[:, None] * torch.where(p > 0, p * (whole + entropy[:, None]), 0.0)
        on = [x.float().to(DEVICE) for x in (normaliser, entropy, a)]
        args = (z.to(DEVICE), tokens.to(DEVICE), *on, None if b_or_none is None else b.to(DEVICE))
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            out = torch.full((9, v), torch.nan, dtype=dtype, device=DEVICE)
            kernels.gradient(*args, out=out)
            torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_score_hidden(dtype, softcap, path):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=g).to(dtype)
    weight = (torch.randn(5000, 64, generator=g) / 4).to(dtype)
    bias = torch.randn(5000, generator=g).to(dtype)
    tokens = torch.randint(0, 5000, (300,), generator=g)
    results = []
    for device, to in ((DEVICE, dtype), ("cpu", torch.float64)):
        leaves = [x.to(device, to).requires_grad_() for x in (hidden, weight, bias)]
        found = score_hidden(
            leaves[0], leaves[1], tokens.to(device), bias=leaves[2], t_base=0.7, factor=lambda h: 1 + 0.1 * h,
            softcap=softcap, chunk_tokens=128,
        )  # fmt: skip
        (found.logp.sum() + 0.3 * found.entropy.square().sum()).backward()
        results.append([found.logp, found.entropy, found.sampler_logp, *(x.grad for x in leaves)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        loose = dtype == torch.bfloat16 and i > 2
        scale = want.abs().max().item()
        assert (got.detach().cpu().double() - want.detach()).abs().max() <= (2e-2 if loose else 2e-5) * max(
            scale, 1
        )
    assert path("scores", "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temper(dtype, path):
    z = logits_of(33, 50_001, dtype)
    t_base = torch.full((33,), 0.7)
    rows = torch.arange(0, 33, 2)
    found = z.to(DEVICE)
    temper_(found, RULE, t_base.to(DEVICE), rows.to(DEVICE))
    want = z.clone()
    factor = RULE.factor(entropy_from_logits(z[rows].double(), 0.7).float())
    want[rows] = (want[rows].float() / factor[:, None]).to(dtype)
    torch.testing.assert_close(found.cpu(), want, atol=1e-4, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5)
    assert path("entropy", "divide")


def test_a_wrong_kernel_stops_the_run_and_a_right_one_waits_once(monkeypatch):
    real = plain.scores
    z, tokens = logits_of(9, 4096, torch.float32).to(DEVICE), torch.full((9,), 5, device=DEVICE)
    monkeypatch.setattr(opt_in, "_compared", set())
    with monkeypatch.context() as wrong:
        wrong.setattr(plain, "scores", lambda *given: tuple(x + 1e-3 for x in real(*given)))
        with pytest.raises(RuntimeError, match=r"'scores' differs from torch by up to 0.001 on cuda:0 .* unset"):
            kernels.scores(z, tokens)
    kernels.scores(z, tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.scores(z, tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", hapo.methods("policy"))
def test_methods_compute_what_they_do_on_a_cpu(name):
    method = hapo.method(name)
    g = torch.Generator().manual_seed(1)
    shape = (32, 50)
    old = -2 * torch.rand(shape, generator=g)
    batch = hapo.TokenBatch(
        mask=torch.arange(50) < torch.randint(1, 51, (32, 1), generator=g),
        old_logp=old,
        logp=old + 0.3 * torch.randn(shape, generator=g),
        ref_logp=old + 0.1,
        sampler_logp=old - 0.1,
        old_entropy=torch.rand(shape, generator=g) * 3,
        entropy=torch.rand(shape, generator=g) * 3,
        reward=torch.randint(0, 2, (32,), generator=g).float(),
        group=torch.arange(32) // 8,
    )
    results = []
    for device in ("cpu", DEVICE):
        moved = {k: x.to(device) for k, x in vars(batch).items() if isinstance(x, torch.Tensor)}
        moved["logp"] = moved["logp"].requires_grad_()
        prepared = method.step(method.prepare(hapo.TokenBatch(**moved)))
        out = method.loss(prepared)
        out.loss.backward()
        results.append([out.loss.detach().cpu(), moved["logp"].grad.cpu(), prepared.advantage.cpu()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_what_is_drawn_and_what_is_scored(path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, eos_token_id=[1, 2, 3, 4, 5], bos_token_id=None,
        )
    ).to(DEVICE)  # fmt: skip
    attach_scoring(model)
    prompts = torch.randint(6, 500, (3, 7), device=DEVICE).repeat_interleave(8, 0)
    config = GenerationConfig(
        do_sample=True, max_new_tokens=40, temperature=0.7, top_k=0, pad_token_id=0, eos_token_id=[1, 2, 3, 4, 5]
    )
    with sampling(model, RULE) as record:
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    tokens = out[:, 7:]
    ended = torch.isin(tokens, torch.arange(1, 6, device=DEVICE))
    mask = ended.cumsum(1) - ended.long() == 0
    attention = torch.cat([torch.ones_like(prompts), mask.long()], 1)
    found = score_tokens(model, out, attention, mask, t_base=0.7, factor=RULE.factor)
    for drawn, scored in (
        (record.draws.policy_logp, found.logp),
        (record.draws.entropy, found.entropy),
        (record.draws.logp, found.sampler_logp),
    ):
        torch.testing.assert_close(drawn[mask], scored[mask].detach(), atol=2e-4, rtol=0)
    assert path("scores")


@pytest.mark.parametrize("half", [False, True])
def test_a_trainer(tmp_path, half, path):
    """Four optimiser steps of two rollout batches; generation and scoring agree about the policy that drew."""
    from datasets import Dataset

    from hapo.assets import tiny_model_path
    from hapo.trl import HAPOConfig, HAPOTrainer

    data = Dataset.from_list([{"prompt": f"{a}+{a + 7}="} for a in range(100, 164)])

    def digits(completions, **_):
        return [float(sum(c.isdigit() for c in text) % 2) for text in completions]

    args = HAPOConfig(
        str(tmp_path), method="hapo", max_steps=8, max_completion_length=24, learning_rate=1e-5, bf16=half,
        per_device_train_batch_size=32, num_generations=8, tokens_per_pass=512, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = HAPOTrainer(str(tiny_model_path()), digits, args=args, train_dataset=data)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 8 and all(abs(line["loss"]) < 10 for line in lines)
    assert lines[0]["sampling/sampling_logp_difference/mean"] < (0.05 if half else 1e-4)
    assert lines[4]["sampling/sampling_logp_difference/mean"] > 1e-3  # the adaptive temperature
    assert path("scores", "gradient")
