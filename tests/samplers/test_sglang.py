"""The processor under SGLang's calling convention, and what a client sends and checks, without SGLang.

SGLang is not installed here: `apply` is its `apply_custom_logit_processor` (0.5.23, layers/sampler.py) and
`request_of` what its `Req` puts into the parameters, written out from reading them.
"""

from __future__ import annotations

import json
import pickle
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch

from hapo.batch import EntropyStats
from hapo.methods import TemperatureOptions
from hapo.samplers.decoding_rules import EDT, DynamicTemperature
from hapo.samplers.rule import TemperatureRule
from hapo.samplers.sglang import AdaptiveTemperatureLogitProcessor, check_server, request_args

VOCAB = 500
STATS = EntropyStats(pivot=0.4, sigma=0.9, h_max=1.1, h_min=-3.0)
RULES = {
    "bounded": TemperatureRule(TemperatureOptions(tau=0.4), STATS),
    "zscore": TemperatureRule(TemperatureOptions(rule="zscore", tau=0.3), STATS),
    "dynatemp": TemperatureRule(DynamicTemperature(tau=0.5, vocabulary=VOCAB)),
    "edt": TemperatureRule(EDT(theta=0.3)),
}
ALL_TOKENS = 1 << 30  # top_k of a request that does not restrict it


def request_of(custom_params: dict | None, temperature: float) -> dict | None:
    """Parameters of a row, through JSON as from a client, with the request under "__req__" where it has any.

    Temperature 0 becomes 1 with top_k 1.
    """
    if custom_params is None:
        return None
    greedy = temperature == 0
    sampling = SimpleNamespace(temperature=1.0 if greedy else temperature, top_k=1 if greedy else ALL_TOKENS)
    request = SimpleNamespace(sampling_params=sampling, to_finish=None)
    return json.loads(json.dumps(custom_params)) | {"__req__": request}


def apply(logits: torch.Tensor, batch: list[dict | None], rows: list[int]) -> None:
    """The rows that named the processor are selected, processed and written back."""
    processor = pickle.loads(bytes.fromhex(json.loads(AdaptiveTemperatureLogitProcessor.to_str())["callable"]))()
    indices = torch.tensor(rows)
    result = processor(logits.index_select(0, indices), [batch[i] for i in rows])
    logits.index_copy_(0, indices, result.to(logits.dtype))


def some_logits(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator) * torch.linspace(0.5, 9, rows).unsqueeze(1)
    return logits.masked_fill(torch.rand(rows, VOCAB, generator=generator) < 0.3, -torch.inf)  # a grammar


def expected(logits: torch.Tensor, rule: TemperatureRule, t_base: float) -> torch.Tensor:
    """log softmax(logits / T), T = T_base x the core's factor, in float64."""
    entropy = torch.distributions.Categorical(logits=logits.double() / t_base).entropy()
    return (logits.double() / (t_base * rule.factor(entropy).double().unsqueeze(-1))).log_softmax(-1)


@pytest.mark.parametrize("name", RULES)
def test_a_batch_of_one_rule_follows_the_core(name):
    logits, t_base = some_logits(16), 0.8
    batch = [request_of(request_args(RULES[name])["custom_params"], t_base) for _ in range(16)]
    drawn = logits.clone()
    apply(drawn, batch, list(range(16)))
    target = expected(logits, RULES[name], t_base)
    torch.testing.assert_close((drawn / t_base).log_softmax(-1).exp().double(), target.exp(), atol=1e-5, rtol=0)
    assert (target.exp() - (logits.double() / t_base).softmax(-1)).abs().max() > 0.01


def test_every_row_of_a_mixed_batch_has_its_own_rule_and_temperature():
    plan = [
        ("bounded", 0.7),
        ("zscore", 1.0),
        (None, 0.9),
        ("edt", 1.3),
        ("bounded", 1.2),
        ("dynatemp", 0.5),
        ("bounded", 0),
    ]
    batch = [request_of(RULES[name].to_args() if name else {"other": 1}, t) for name, t in plan]
    batch += [request_of(None, 1.0), request_of(RULES["edt"].to_args(), 1.0)]
    logits = some_logits(len(batch))
    drawn = logits.clone()
    apply(drawn, batch, [0, 1, 2, 3, 4, 5, 6, 7])
    for row, (name, t_base) in enumerate(plan):
        if name and t_base:
            found = (drawn[row : row + 1] / t_base).softmax(-1).double()
            torch.testing.assert_close(
                found, expected(logits[row : row + 1], RULES[name], t_base).exp(), atol=1e-5, rtol=0
            )
    untouched = [2, 6, 7, 8]  # parameters of another's, greedy, no parameters, and a row that named no processor
    assert torch.equal(drawn[untouched], logits[untouched])
    assert not torch.isclose(drawn[0], logits[0]).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"hapo_tau": 1.5}, "tau must be in"),
        ({"hapo_pivot": float("nan")}, "hapo_pivot is NaN"),
        ({"hapo_sigma": "0.9"}, "hapo_sigma must be a number"),
        ({"hapo_pivot": [0.1]}, "hapo_pivot must be a number"),
        ({"hapo_strength": 0.1}, "no option 'strength'"),
    ],
)
def test_a_bad_request_is_aborted_alone(monkeypatch, bad, message):
    class FinishAbort:
        def __init__(self, message, status_code, err_type):
            self.message, self.status_code, self.err_type = message, status_code, err_type

    module = SimpleNamespace(FINISH_ABORT=FinishAbort)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", module)
    good = RULES["bounded"].to_args()
    logits = some_logits(3)
    drawn, batch = logits.clone(), [request_of(args, 1.0) for args in (good, good | bad, good)]
    apply(drawn, batch, [0, 1, 2])
    reason = batch[1]["__req__"].to_finish
    assert (reason.status_code, reason.err_type) == (400, "BadRequestError")
    assert message in reason.message
    assert torch.equal(drawn[1], logits[1])
    for row in (0, 2):
        assert batch[row]["__req__"].to_finish is None
        found = drawn[row : row + 1].softmax(-1).double()
        torch.testing.assert_close(
            found, expected(logits[row : row + 1], RULES["bounded"], 1.0).exp(), atol=1e-5, rtol=0
        )


GOOD = {"version": "0.5.23", "enable_custom_logit_processor": True, "speculative_algorithm": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_custom_logit_processor": False}, "start it with --enable-custom-logit-processor"),
        ({"speculative_algorithm": "EAGLE"}, "EAGLE.*start it without --speculative-algorithm"),
        ({"version": "0.6.0"}, "SGLang 0.6.0, and the processor was tested with 0.5.23"),
    ],
)
def test_a_server_that_would_skip_the_processor_is_refused(change, message):
    check_server(GOOD)
    with pytest.raises(RuntimeError, match=message):
        check_server({**GOOD, **change})


def test_the_check_asks_the_server():
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({**GOOD, "speculative_algorithm": "NGRAM"}).encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(RuntimeError, match="speculatively"):
            check_server(f"{url}/v1/", "secret")
        thread.join()
    assert asked == [("/server_info", "Bearer secret")]
    with pytest.raises(ConnectionError, match=f"no SGLang server answers at {url}/server_info"):
        check_server(url)
