"""Scoring: a hand-worked pair of logits, a plain float64 computation, and transformers' own logits."""

import copy
import inspect
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from hapo import head
from hapo.parts.entropy import EntropyStats
from hapo.parts.rank import expected_rank, target_rank
from hapo.parts.temperature import bounded_factor
from hapo.scoring import attach_scoring, score_hidden, score_tokens

STATS = EntropyStats(pivot=0.3, sigma=0.5, h_max=0.4, h_min=-0.9)


def factor(entropy):
    return bounded_factor(entropy, STATS, tau=0.3)


def plain(logits, tokens, t_base=1.0):
    """log p, H and sampler log p in float64 from all logits at once."""

    def taken(log_p):
        return log_p.gather(-1, tokens[..., None]).squeeze(-1)

    log_p = (logits.double() / t_base).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    tempered = (logits.double() / t_base / factor(entropy)[..., None]).log_softmax(-1)
    return taken(log_p), entropy, taken(tempered).detach()


def inputs(n=7, d=5, v=11, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((n, d), (v, d), (v,))
    )
    return hidden, weight, bias, torch.randint(v, (n,), generator=g)


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def test_worked_example():
    # p = (3/4, 1/4); the temperature factor 1/2 squares it to (9/10, 1/10)
    scores = score_hidden(
        torch.tensor([[math.log(3.0)]]),
        torch.tensor([[1.0], [0.0]]),
        torch.tensor([1]),
        factor=lambda entropy: torch.full_like(entropy, 0.5),
    )
    torch.testing.assert_close(scores.logp, torch.tensor([-1.3862944]))
    torch.testing.assert_close(scores.entropy, torch.tensor([0.5623351]))
    torch.testing.assert_close(scores.sampler_logp, torch.tensor([-2.3025851]))


@pytest.mark.parametrize(
    ("t_base", "softcap", "scale", "with_bias", "chunk"),
    list(itertools.product((1.0, 0.7), (None, 2.0), (1.0, 0.4), (False, True), (None, 3, 1))),
)
def test_values_and_gradients_are_those_of_a_plain_float64_computation(t_base, softcap, scale, with_bias, chunk):
    hidden, weight, bias, tokens = inputs()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    scores = score_hidden(
        hidden,
        weight,
        tokens,
        bias=bias if with_bias else None,
        t_base=t_base,
        factor=factor,
        logit_scale=scale,
        softcap=softcap,
        chunk_tokens=chunk,
    )
    x = scale * (hidden.double() @ weight.double().T + (bias.double() if with_bias else 0.0))
    logp, entropy, sampler_logp = plain(
        x if softcap is None else softcap * torch.tanh(x / softcap), tokens, t_base
    )

    for got, want in ((scores.logp, logp), (scores.entropy, entropy), (scores.sampler_logp, sampler_logp)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    assert not scores.sampler_logp.requires_grad

    a, b = torch.randn(2, len(tokens), generator=torch.Generator().manual_seed(1)).unbind()
    for got, want in (
        (scores.logp @ a, logp @ a.double()),
        (scores.entropy @ b, entropy @ b.double()),
        (scores.logp @ a + scores.entropy @ b, logp @ a.double() + entropy @ b.double()),
    ):
        got_grads = torch.autograd.grad(got, leaves, retain_graph=True)
        want_grads = torch.autograd.grad(want, leaves, retain_graph=True)
        assert max(map(relative, got_grads, want_grads)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 3])
def test_ranks_are_those_of_all_logits_in_float64(dtype, chunk, monkeypatch):
    monkeypatch.setitem(head.SORTED, "cpu", 700)  # two rows a sort
    hidden, weight, bias, tokens = inputs(n=9, v=300, dtype=dtype)
    with torch.no_grad():
        weight[7] = weight[8]  # ties, of the bias too
        bias[7] = bias[8]
    tokens[0], tokens[1] = 7, 8
    asked = {"bias": bias, "factor": factor, "softcap": 4.0, "t_base": 0.7, "chunk_tokens": chunk}
    scores = score_hidden(hidden, weight, tokens, rank=True, expected_rank=True, **asked)
    x = hidden.double() @ weight.double().T + bias.double()
    logits = 4.0 * torch.tanh(x / 4.0) / 0.7
    assert torch.equal(scores.rank.double(), target_rank(logits, tokens))
    expected = {torch.float64: 1e-12}.get(dtype, 5e-6)
    torch.testing.assert_close(scores.expected_rank.double(), expected_rank(logits), rtol=expected, atol=0)
    assert scores.rank.dtype == scores.logp.dtype and not scores.rank.requires_grad
    assert not scores.expected_rank.requires_grad
    plain_scores = score_hidden(hidden, weight, tokens, **asked)
    assert plain_scores.rank is None and plain_scores.expected_rank is None
    for name in ("logp", "entropy", "sampler_logp"):
        assert torch.equal(getattr(scores, name), getattr(plain_scores, name))


def test_ranks_of_a_masked_vocabulary_and_of_an_impossible_target():
    bias = torch.tensor([0.0, -math.inf, 1.0, -math.inf])
    hidden, weight = torch.zeros(2, 1), torch.zeros(4, 1)
    scores = score_hidden(hidden, weight, torch.tensor([0, 1]), bias=bias, rank=True, expected_rank=True)
    assert scores.rank.tolist() == [2, 4]
    torch.testing.assert_close(scores.expected_rank, torch.full((2,), 1 + 1 / (1 + math.e)))


def test_gradients_agree_with_finite_differences():
    hidden, weight, bias, tokens = inputs(n=3, d=2, v=4, dtype=torch.float64)

    def run(*leaves):
        scores = score_hidden(*leaves[:2], tokens, bias=leaves[2], t_base=0.7, logit_scale=0.8, softcap=1.5)
        return scores.logp, scores.entropy

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    hidden, weight, _, tokens = inputs(d=32, dtype=dtype)
    scores = score_hidden(hidden, weight, tokens, factor=factor, chunk_tokens=2)
    logp, entropy, sampler_logp = plain(hidden.double() @ weight.double().T, tokens)
    for got, want in ((scores.logp, logp), (scores.entropy, entropy), (scores.sampler_logp, sampler_logp)):
        # The rounding of float32 is 3e-6 here, by the processor; that of half precision 1e-3 and more.
        torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=0)
    got_grads = torch.autograd.grad(scores.logp.sum() + scores.entropy.sum(), (hidden, weight))
    want_grads = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    for got, want in zip(got_grads, want_grads, strict=True):
        assert got.dtype == dtype
        # Both are rounded to the input's dtype once, so to the same number or to neighbours; a sum over chunks in
        # it would be off by many such steps.
        torch.testing.assert_close(got, want, atol=1e-6, rtol=torch.finfo(dtype).eps)


class Products(TorchDispatchMode):
    """The precision in which each product of float32 matrices was asked for."""

    def __init__(self):
        super().__init__()
        self.precisions = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "addmm_":
            self.precisions.append(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [None, 50, 8])
def test_under_autocast_a_cpu_rounds_the_operands_of_products_and_nothing_else(chunk):
    """Sums are float32, over chunks too; a processor without AMX rounds nothing."""
    hidden, weight, bias, tokens = inputs(n=200, d=64, v=500, dtype=torch.float32)
    states = hidden.detach().bfloat16().requires_grad_()  # as a layer under autocast leaves them
    before = torch.backends.mkldnn.matmul.fp32_precision

    def run(chunk):
        with torch.autocast("cpu", torch.bfloat16):
            scores = score_hidden(states, weight, tokens, bias=bias, factor=factor, chunk_tokens=chunk)
        return scores, torch.autograd.grad(scores.logp.sum() + scores.entropy.sum(), (states, weight, bias))

    with Products() as seen:
        scores, got = run(chunk)
    assert set(seen.precisions) == {"bf16"} and len(seen.precisions) == 4 * math.ceil(200 / (chunk or 200))
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert scores.logp.dtype == torch.float32 and [x.dtype for x in got] == [torch.bfloat16, *[torch.float32] * 2]

    def near(w):
        """Whether scores and gradients are those of the products with these weights."""
        leaves = [x.detach().double().requires_grad_() for x in (states, w, bias)]
        want = plain(leaves[0] @ leaves[1].T + leaves[2], tokens)
        found = scores.logp, scores.entropy, scores.sampler_logp
        same = all((x - y).abs().max() <= 2e-4 for x, y in zip(found, want, strict=True))
        return (
            same and max(map(relative, got, torch.autograd.grad(want[0].sum() + want[1].sum(), leaves))) <= 2**-8
        )

    assert near(weight) or near(weight.bfloat16())
    # As gradients of any other slices; a slice of at most 16 positions does not round its part of the weight's.
    assert max(map(relative, got[1:], run(40)[1][1:])) <= (2e-6 if chunk != 8 else 2**-8)


def test_two_threads_that_round_leave_the_setting_as_it_was():
    hidden, weight, _, tokens = inputs(n=64, d=64, v=500)
    before = torch.backends.mkldnn.matmul.fp32_precision

    def score(_):
        with torch.autocast("cpu", torch.bfloat16):
            return score_hidden(hidden.detach(), weight.detach(), tokens, chunk_tokens=4).logp

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(score, range(16))
    assert all(torch.equal(first, other) for other in others)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_no_positions_give_no_scores_and_a_zero_gradient():
    hidden, weight, bias, tokens = inputs(n=0)
    scores = score_hidden(hidden, weight, tokens, bias=bias, factor=factor)
    assert scores.logp.shape == scores.entropy.shape == scores.sampler_logp.shape == (0,)
    (scores.logp.sum() + scores.entropy.sum()).backward()
    assert not any(leaf.grad.any() for leaf in (weight, bias))


class Recorder(TorchDispatchMode):
    """Names of the operations that ran, and elements of the largest tensor that one returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_memory_does_not_grow_with_positions_times_vocabulary():
    hidden, weight, bias, tokens = inputs(n=4096, d=4, v=1024)
    with Recorder() as seen:
        scores = score_hidden(hidden, weight, tokens, bias=bias, factor=factor, softcap=5.0, chunk_tokens=64)
        (scores.logp.sum() + scores.entropy.sum()).backward()
    assert seen.largest == 64 * 1024  # of 4096 * 1024

    hidden, weight, _, tokens = inputs(n=300, d=1, v=2**16)
    with Recorder() as seen, torch.no_grad():
        score_hidden(hidden, weight, tokens, rank=True, expected_rank=True)
    assert seen.largest == 2**24  # the default budget; 300 * 2**16 is larger


def test_only_what_the_gradient_needs_is_kept_and_computed():
    hidden, weight, bias, tokens = inputs(n=50, v=40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        with torch.no_grad():
            score_hidden(hidden, weight, tokens, bias=bias)
        assert saved == []
        scores = score_hidden(hidden, weight, tokens, bias=bias)
        assert saved == [hidden.numel(), weight.numel(), bias.numel(), 50, 50]
    for output, needs_log_p_and_p in ((scores.logp, False), (scores.entropy, True)):
        with Recorder() as seen:
            output.sum().backward(retain_graph=True)
        assert ({"log_softmax", "exp"} <= seen.names) == needs_log_p_and_p


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_masked_vocabulary_is_one_without_these_tokens(dtype):
    """Biases of -inf: scores, and gradients through log-prob and entropy, are those of the rows that are left."""
    hidden, weight, bias, tokens = inputs(dtype=dtype)
    bias = bias.detach().clone()
    bias[3:6] = -torch.inf
    kept = [0, 1, 2, *range(6, len(bias))]
    taken = tokens.masked_fill((tokens >= 3) & (tokens < 6), 7)
    results = []
    for w, b, t in ((weight, bias, taken), (weight[kept], bias[kept], torch.where(taken > 5, taken - 3, taken))):
        scores = score_hidden(hidden, w, t, bias=b, factor=factor, chunk_tokens=3)
        total = scores.logp.sum() + 2 * scores.entropy.sum()
        results.append((scores, *torch.autograd.grad(total, (hidden, weight))))
    (masked, *gradients), (without, *expected) = results
    for name in ("logp", "entropy", "sampler_logp"):
        torch.testing.assert_close(getattr(masked, name), getattr(without, name), atol=1e-5, rtol=0)
    for x, y in zip(gradients, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, atol=1e-5 if dtype != torch.bfloat16 else 2e-2, rtol=1e-5)


def test_bad_arguments_are_named():
    hidden, weight, _, tokens = inputs()
    with pytest.raises(ValueError, match="t_base must be positive, got 0"):
        score_hidden(hidden, weight, tokens, t_base=0.0)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        score_hidden(hidden, weight, tokens, chunk_tokens=0)


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=1.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.2)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


def tiny(name="llama"):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch():
    """Two prompts (the first left-padded), then four response columns with a hole and a padded tail."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 32, (2, 7), generator=g)
    attention = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    response = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    return ids, attention, response


def assert_scores_match(model, **options):
    ids, attention, response = batch()
    scores = score_tokens(model, ids, attention, response, factor=factor, **options)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, 2:-1]
    wanted = plain(logits, ids[:, 3:], **options)
    for got, want in zip((scores.logp, scores.entropy, scores.sampler_logp), wanted, strict=True):
        assert not got[~response].any()
        # Two float32 passes through the model: they differ by 5e-6, by the processor, and a wrong token by 0.1.
        torch.testing.assert_close(got[response].double(), want[response], atol=1e-4, rtol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got_grads = torch.autograd.grad(scores.logp.sum() + scores.entropy.sum(), parameters)
    want_grads = torch.autograd.grad((wanted[0] + wanted[1])[response].sum(), parameters)
    largest = max(g.abs().max() for g in want_grads)
    for got, want in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4 * largest.item(), rtol=1e-5)


@pytest.mark.parametrize("t_base", [1.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_model_scores_are_those_of_its_own_logits(name, t_base):
    model = tiny(name)
    attach_scoring(model)
    assert_scores_match(model, t_base=t_base)


def test_attaching_keeps_generate_and_forward():
    model = tiny()
    ids, attention, _ = batch()
    prompt = {"input_ids": ids[:, :3], "attention_mask": attention[:, :3], "max_new_tokens": 4, "do_sample": False}
    before, logits = model.generate(**prompt), model(ids).logits
    signature = inspect.signature(model.forward)
    attach_scoring(model)
    forward = model.forward
    attach_scoring(model)
    assert model.forward == forward
    assert inspect.signature(forward) == signature
    assert torch.equal(model.generate(**prompt), before)
    assert torch.equal(model(ids).logits, logits)


def test_a_deep_copy_scores_and_runs_with_its_own_weights():
    model = tiny()
    attach_scoring(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1.0)
    assert_scores_match(other)
    assert torch.equal(other(batch()[0]).logits, -model(batch()[0]).logits)


def test_what_stands_at_masked_positions_changes_nothing():
    model = tiny()
    attach_scoring(model)
    ids, attention, response = batch()
    garbage = torch.where(attention.bool(), ids, 31 - ids)
    clean = score_tokens(model, ids, attention, response, factor=factor)
    found = score_tokens(model, garbage, attention, response, factor=factor)
    for name in ("logp", "entropy", "sampler_logp"):
        assert torch.equal(getattr(clean, name), getattr(found, name))


def test_an_all_masked_batch_is_a_differentiable_zero():
    model = tiny()
    attach_scoring(model)
    ids, attention, response = batch()
    scores = score_tokens(model, ids, attention, torch.zeros_like(response), factor=factor)
    assert not any(getattr(scores, name).any() for name in ("logp", "entropy", "sampler_logp"))
    (scores.logp.sum() + scores.entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("trl_first", [True, False])
def test_scoring_and_the_fused_head_of_trl_share_a_model(trl_first):
    model = tiny()
    heads = [add_fused_lm_head, attach_scoring]
    for attach in heads if trl_first else reversed(heads):
        attach(model)
    assert_scores_match(model)
    ids, attention, response = batch()
    labels = torch.cat([torch.full((2, 3), -100), ids[:, 3:].masked_fill(~response, -100)], 1)
    fused = model(input_ids=ids, attention_mask=attention, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(score_tokens(model, ids, attention, response).logp, fused[:, 2:])


# PEFT asks transformers for a name that transformers deprecates.
uses_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(model, targets):
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    )


@uses_peft
@pytest.mark.parametrize("peft_first", [True, False])
def test_lora_scores_are_those_of_the_adapted_model(peft_first):
    model = tiny()
    if not peft_first:
        attach_scoring(model)
    model = lora(model, ["q_proj", "v_proj"]).eval()
    attach_scoring(model)
    assert_scores_match(model)


@uses_peft
def test_models_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        attach_scoring(LlamaModel(LlamaConfig(**SIZES)))
    with pytest.raises(ValueError, match="not a plain linear layer: leave it out of target_modules"):
        attach_scoring(lora(tiny(), ["q_proj", "lm_head"]))
    ids, attention, response = batch()
    with pytest.raises(ValueError, match=r"call attach_scoring\(model\) first"):
        score_tokens(tiny(), ids, attention, response)
    with pytest.raises(ValueError, match="at least one prompt token"):
        score_tokens(tiny(), ids[:, 3:], attention[:, 3:], response)


@pytest.mark.xdist_group("two_ranks")
def test_ddp_and_fsdp_give_the_mean_gradient_of_their_ranks(two_ranks):
    """`check_gradients_over_two_ranks` ran there, on both."""
    assert (two_ranks / "scored").is_file()


def check_gradients_over_two_ranks():
    """A row twice on each rank; without valid tokens on the second rank too; a head sharded on its own too."""
    mesh = init_device_mesh("cpu", (2,))
    ids, attention, response = (x.repeat_interleave(2, 0) for x in batch())
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)

    def gradients(model, rows, mask):
        scores = score_tokens(model, ids[rows], attention[rows], mask[rows])
        (scores.logp.sum() + scores.entropy.sum()).backward()
        grads = (p.grad for p in model.parameters())
        return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]

    def attached():
        model = tiny()
        attach_scoring(model)
        return model

    def sharded(*groups):
        model = attached()
        for name in groups:
            fully_shard(model.get_submodule(name), mesh=mesh)
        return fully_shard(model, mesh=mesh)

    for mask in (response, response & torch.tensor([[True], [True], [False], [False]])):
        want = [g / 2 for g in gradients(attached(), slice(0, 4), mask)]
        for model in (DistributedDataParallel(attached()), sharded("model.layers.0"), sharded("lm_head")):
            for a, b in zip(gradients(model, mine, mask), want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
