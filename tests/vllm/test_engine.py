"""A real engine: its log-probs are those of the tempered distribution, in every way of registration."""

import importlib.metadata
import re
from types import SimpleNamespace

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import build_logitsprocs, cached_load_custom_logitsprocs

from hapo.assets import tiny_model_path
from hapo.samplers.vllm import AdaptiveTemperature

from .reference import BOUNDED, DRAWN, FORWARD, ZSCORE, largest_error, logps
from .runners import V1_ONLY

NAME = "hapo.samplers.vllm:AdaptiveTemperature"

# Prompt, rule, T_base, top-p, n, tokens: requests leave the batch at different steps, so that rows move.
MIXED = [
    ("12+34=", BOUNDED, 0.0, 1.0, 1, 20),
    ("907+1=", BOUNDED, 0.7, 1.0, 1, 5),
    ("5+5=", BOUNDED, 1.0, 1.0, 1, 24),
    ("250+250=", BOUNDED, 1.3, 1.0, 4, 9),
    ("1+2=", ZSCORE, 1.0, 1.0, 1, 30),
    ("12+34=", None, 0.7, 1.0, 1, 12),
    ("33+44=", BOUNDED, 1.0, 0.9, 1, 26),
    ("8+", ZSCORE, 1.3, 0.9, 4, 17),
]


def engine(**options):
    """The tiny model in an engine in this process."""
    return LLM(
        str(tiny_model_path()),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=16,
        max_logprobs=-1,
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="uni",
        **options,
    )


def params(rule, t_base=1.0, top_p=1.0, n=1, tokens=8, **more):
    """A request, with its rule in extra_args."""
    args = {"extra_args": None if rule is None else rule.to_args()} | more
    return SamplingParams(
        temperature=t_base, top_p=top_p, n=n, max_tokens=tokens, logprobs=-1, ignore_eos=True, seed=7, **args
    )


def check_mixed(llm):
    """The log-probs of all tokens at all steps are the reference's, and with a rule not those of T_base."""
    outputs = llm.generate([m[0] for m in MIXED], [params(*m[1:]) for m in MIXED], use_tqdm=False)
    for (_, rule, t_base, top_p, n, tokens), output in zip(MIXED, outputs, strict=True):
        assert len(output.outputs) == n
        for drawn in output.outputs:
            assert len(drawn.token_ids) == tokens
            found = torch.tensor([[step[v].logprob for v in range(len(step))] for step in drawn.logprobs])
            expected, t = logps(output.prompt_token_ids, list(drawn.token_ids), rule, t_base, top_p)
            assert largest_error(found, expected, t) <= FORWARD
            taken = torch.tensor(drawn.token_ids).unsqueeze(1)
            assert (found.double() - expected).gather(1, taken).abs().max() <= DRAWN
            if rule is not None and t_base > 0:
                plain, _ = logps(output.prompt_token_ids, list(drawn.token_ids), None, t_base, top_p)
                both = plain.isfinite() & expected.isfinite()
                assert (found.double() - plain)[both].abs().max() > 0.05


def shut(llm):
    """Make room for the next engine in this process."""
    llm.llm_engine.engine_core.shutdown()


BAD = [
    ({"hapo_tau": 1.0}, "tau must be in [0, 1)"),
    ({"hapo_pivot": float("nan")}, "hapo_pivot is NaN"),
    ({"hapo_tau": "high"}, "tau must be a number, got 'high'"),
    ({"hapo_taus": 0.1}, "did you mean 'tau'?"),
]


class TestByEntryPoint:
    """As installed: nothing is named."""

    @pytest.fixture(scope="class")
    def llm(self):
        """One engine at a time lives in this process."""
        llm = engine()
        yield llm
        shut(llm)

    def test_log_probs(self, llm):
        """Eight requests in one batch."""
        check_mixed(llm)

    def test_up_to_0_30_vllm_refuses_runner_v2_because_of_it(self, llm):
        """From 0.31 the entry point leaves the choice alone."""
        unsupported = llm.llm_engine.vllm_config._get_v2_model_runner_unsupported_features()
        assert ("custom logits processors" in unsupported) == V1_ONLY

    def test_bad_requests_are_refused_and_the_engine_goes_on(self, llm):
        """Offline: a ValueError of ours, which vLLM raises again as its own."""
        for change, reason in BAD:
            bad = params(None, extra_args=BOUNDED.to_args() | change)
            with pytest.raises(ValueError, match=re.escape(reason)):
                AdaptiveTemperature.validate_params(bad)
            with pytest.raises(VLLMValidationError, match=re.escape(reason)):
                llm.generate(["1+1=", "2+2="], [params(BOUNDED), bad], use_tqdm=False)
        check_mixed(llm)

    def test_statistics_must_be_there(self, llm):
        """The rules of HAPO read them."""
        with pytest.raises(VLLMValidationError, match="reads statistics"):
            llm.generate(["1+1="], params(None, extra_args={"hapo_tau": 0.1}), use_tqdm=False)


@pytest.fixture
def no_entry_point(monkeypatch):
    """As where hapo is only on the import path."""
    real = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **which: [e for e in real(**which) if e.value != NAME],
    )
    cached_load_custom_logitsprocs.cache_clear()
    yield
    cached_load_custom_logitsprocs.cache_clear()


def test_named_only(no_entry_point):
    """By class; by name it is in the next test, and in the server."""
    llm = engine(logits_processors=[AdaptiveTemperature])
    check_mixed(llm)
    shut(llm)


def test_named_besides_the_entry_point_is_not_applied_twice():
    """Three processors are made, and one acts."""
    llm = engine(logits_processors=[NAME, AdaptiveTemperature])
    check_mixed(llm)
    shut(llm)


def test_a_diffusion_model_is_refused():
    """It samples without processors; the admission is stood in for, there being no tiny one."""

    class InputProcessor:
        vllm_config = SimpleNamespace(model_config=SimpleNamespace(is_diffusion=True))

        def admit(self, params):
            AdaptiveTemperature.validate_params(params)

    InputProcessor().admit(params(None))
    with pytest.raises(ValueError, match="diffusion model"):
        InputProcessor().admit(params(BOUNDED))


def test_speculative_decoding_that_would_skip_the_processor_is_refused():
    """Runner V1 makes no custom processor then, and says so only of one that is named.

    Last in this file: the n-gram proposer imports numba, after which vLLM 0.32 starts no engine in this process.
    """
    with pytest.raises(ValueError, match="not supported when speculative decoding"):
        build_logitsprocs(SimpleNamespace(speculative_config=object()), torch.device("cpu"), False, False, [NAME])
    llm = engine(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})
    assert len(llm.generate(["1+1="], params(None), use_tqdm=False)[0].outputs[0].token_ids) == 8
    with pytest.raises(VLLMValidationError, match="switch speculative decoding off"):
        llm.generate(["1+1="], params(BOUNDED), use_tqdm=False)
    shut(llm)
