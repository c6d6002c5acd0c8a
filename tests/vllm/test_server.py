"""The real HTTP server, in its own processes, asked by the OpenAI client."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from transformers import AutoTokenizer

from hapo.assets import tiny_model_path

from .reference import BOUNDED, FORWARD, ZSCORE, largest_error, logps
from .serving import serving
from .test_engine import BAD, NAME

# Prompt, rule, T_base, top-p, n, tokens.
MIXED = [
    ("12+34=", BOUNDED, 1.0, 1.0, 1, 24),
    ("907+1=", BOUNDED, 0.7, 1.0, 4, 9),
    ("1+2=", ZSCORE, 1.3, 1.0, 1, 30),
    ("33+44=", BOUNDED, 1.0, 0.9, 1, 26),
    ("250+250=", None, 0.7, 1.0, 1, 12),
    ("8+", BOUNDED, 0.0, 1.0, 1, 12),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server that names the processor besides the entry point."""
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--max-logprobs=98", f"--logits-processors={NAME}", "--served-model-name=tiny"]
    with serving(log, *flags) as url:
        yield url


def ask(url, prompt, rule, t_base=1.0, top_p=1.0, n=1, tokens=24, **xargs):
    """One completion request, with its rule in vllm_xargs."""
    args = ({} if rule is None else rule.to_args()) | xargs
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    return client.completions.create(
        model="tiny",
        prompt=prompt,
        temperature=t_base,
        top_p=top_p,
        n=n,
        max_tokens=tokens,
        logprobs=98,
        seed=7,
        extra_body={"vllm_xargs": args, "return_tokens_as_token_ids": True, "ignore_eos": True},
    )


def check(request, answer):
    """The answer's log-probs against the reference."""
    prompt, rule, t_base, top_p, n, tokens = request
    ids = AutoTokenizer.from_pretrained(tiny_model_path())(prompt).input_ids
    number = lambda token: int(token.removeprefix("token_id:"))  # noqa: E731
    assert len(answer.choices) == n
    for choice in answer.choices:
        drawn = [number(t) for t in choice.logprobs.tokens]
        assert len(drawn) == tokens
        expected, t = logps(ids, drawn, rule, t_base, top_p)
        found = torch.full(expected.shape, -torch.inf)
        for row, step in enumerate(choice.logprobs.top_logprobs):
            for token, logp in step.items():
                found[row, number(token)] = logp
        assert largest_error(found, expected, t) <= FORWARD
        if rule is not None and t_base > 0:
            plain, _ = logps(ids, drawn, None, t_base, top_p)
            both = plain.isfinite() & expected.isfinite()
            assert (found.double() - plain)[both].abs().max() > 0.05


def test_a_batch_with_bad_requests_in_it(url):
    """Each bad one is answered 400 with the reason, the others as if it had not come."""
    bad = [
        (c | {"hapo_pivot": "nan"}, "must be a number, got 'nan'") if "hapo_pivot" in c else (c, r) for c, r in BAD
    ]
    with ThreadPoolExecutor(len(MIXED) + len(bad)) as pool:
        good = [pool.submit(ask, url, *request) for request in MIXED]
        refused = [(pool.submit(ask, url, "1+1=", BOUNDED, **change), reason) for change, reason in bad]
        for request, answer in zip(MIXED, good, strict=True):
            check(request, answer.result())
        for answer, reason in refused:
            with pytest.raises(openai.BadRequestError) as error:
                answer.result()
            assert error.value.status_code == 400 and reason in str(error.value)
    check(MIXED[0], ask(url, *MIXED[0]))


def test_nan_as_a_literal(url):
    """Not JSON, but Python's parser takes it; the OpenAI client does not send it."""
    body = {"model": "tiny", "prompt": "1+1=", "vllm_xargs": BOUNDED.to_args() | {"hapo_pivot": float("nan")}}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    assert error.value.code == 400
    assert "hapo_pivot is NaN" in error.value.read().decode()
    error.value.close()
