"""What vLLM knew of its draws, without a scoring pass: entropies and the policy's log-probs are those of a forward."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from hapo.samplers.vllm import AdaptiveTemperature, logging_draws

from .reference import BOUNDED, ZSCORE, model, tempered
from .runners import CPU, needs_v2
from .test_engine import engine, shut

# Prompt, rule, T_base, tokens: equal prompts are told apart by what was drawn.
ASKED = [
    ("12+34=", BOUNDED, 0.7, 20),
    ("12+34=", BOUNDED, 0.7, 20),
    ("907+1=", None, 1.0, 5),
    ("5+5=", ZSCORE, 1.3, 24),
    ("12+34=", None, 1.0, 20),
]


@torch.no_grad()
def policy(prompt, drawn, t_base):
    """Log-probs of the drawn tokens and entropies under softmax(logits / T_base), float64."""
    logits = model()(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
    logp = (logits.double() / t_base).log_softmax(-1)
    entropy = torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(1, torch.tensor(drawn).unsqueeze(1)).squeeze(1), entropy


@pytest.fixture(scope="module")
def drawn():
    """Two calls of one engine: (request, completion, draws of it), and outputs without a log."""
    llm = engine()
    params = [
        SamplingParams(
            temperature=t, max_tokens=tokens, logprobs=0, ignore_eos=True, seed=seed,
            extra_args=None if rule is None else rule.to_args(),
        )
        for seed, (_, rule, t, tokens) in enumerate(ASKED)
    ]  # fmt: skip
    found = []
    for _ in range(2):
        with logging_draws(llm) as log:
            outputs = llm.generate([a[0] for a in ASKED], params, use_tqdm=False)
        prompts = [list(output.prompt_token_ids) for output in outputs]
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        logps = [
            [step[t].logprob for step, t in zip(output.outputs[0].logprobs, row, strict=True)]
            for output, row in zip(outputs, tokens, strict=True)
        ]
        found.append((prompts, tokens, log.draws(prompts, tokens, logps)))
        lost = log.draws(prompts, [[*row[:-2], 3, row[-1]] for row in tokens], logps)
    plain = [list(o.outputs[0].token_ids) for o in llm.generate([a[0] for a in ASKED], params, use_tqdm=False)]
    shut(llm)
    return found, plain, lost


def test_the_policy_s_log_probs_and_entropies(drawn):
    """Under the temperature rule and without one; T_base of each request."""
    for prompts, tokens, draws in drawn[0]:
        for b, (_, _, t_base, length) in enumerate(ASKED):
            logp, entropy = policy(prompts[b], tokens[b], t_base)
            assert len(logp) == length
            assert (draws.policy_logp[b, :length] - logp).abs().max() < 1e-4
            assert (draws.entropy[b, :length] - entropy).abs().max() < 1e-4
            assert not draws.entropy[b, length:].any() and not draws.policy_logp[b, length:].any()


def test_a_log_changes_no_draw(drawn):
    """With the same seeds the same tokens."""
    assert [tokens for _, tokens, _ in drawn[0]] == [drawn[1], drawn[1]]


def test_other_tokens_than_those_drawn_are_not_in_the_log(drawn):
    assert drawn[2] is None


@needs_v2
def test_runner_v2_tells_rows_by_their_slots():
    """Two slots whose rows change places, a part of a prompt before the first token, and a request that came back."""
    buffers = SimpleNamespace(
        prompt_len=SimpleNamespace(np=np.array([2, 3])),
        all_token_ids=SimpleNamespace(gpu=torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]])),
    )
    llm, processor = fake(buffers)
    logits = torch.randn(4, 2, 50, generator=torch.Generator().manual_seed(0)) * 2

    def step(which, slots, seen, fed):
        index = torch.tensor(slots)
        ctx = SimpleNamespace(
            idx_mapping_np=index.numpy(), expanded_idx_mapping=index, input_ids=torch.tensor(fed),
            seq_lens_upper_bound_np=np.array(seen),
        )  # fmt: skip
        return processor.apply(logits[which].clone(), ctx)

    with logging_draws(llm) as log:
        for slot, rule in ((0, BOUNDED), (1, None)):
            assert processor.add_request(slot, params(rule))
        first = step(0, [0, 1], [2, 2], [6, 8])  # slot 1 has read 2 of its 3 tokens
        second = step(1, [1, 0], [3, 3], [9, 11])
        third = step(2, [0, 1], [4, 4], [12, 21])
    assert torch.allclose(first[0].double(), tempered(logits[0, :1], BOUNDED, 1.0)[0], atol=1e-5)
    assert torch.equal(second[0], logits[1, 0])

    def q(tokens, rows):
        return [row.log_softmax(-1)[t].item() for t, row in zip(tokens, rows, strict=True)]

    answers = [[11, 12, 13], [21, 22]]
    logps = [q(answers[0], (first[0], second[1], third[0])), q(answers[1], (second[0], third[1]))]
    draws = log.draws([[5, 6], [7, 8, 9]], answers, logps)
    expected = [
        q(answers[0], (logits[0, 0], logits[1, 1], logits[2, 0])),
        q(answers[1], (logits[1, 0], logits[2, 1])),
    ]
    assert draws.policy_logp[0].tolist() == pytest.approx(expected[0], abs=1e-5)
    assert draws.policy_logp[1].tolist() == pytest.approx([*expected[1], 0.0], abs=1e-5)

    with logging_draws(llm) as log:
        processor.add_request(0, params(None))
        step(3, [0, 1], [4, 4], [12, 21])  # begins at its third token
    assert log.draws([[5, 6]], [[11, 12, 13]], [[-1.0] * 3]) is None


def params(rule):
    return SamplingParams(temperature=1.0, extra_args=None if rule is None else rule.to_args())


def fake(states):
    """What `logging_draws` reads of an engine with Runner V2, around a processor."""
    config = SimpleNamespace(speculative_config=None)
    processor = AdaptiveTemperature(config, states)
    runner = SimpleNamespace(sampler=SimpleNamespace(logits_processors=[processor]), device=CPU)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor, vllm_config=config)), processor
