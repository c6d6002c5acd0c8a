"""The Triton kernel, run by Triton's interpreter on CPU, against float64 and against the torch path."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from hapo.batch import EntropyStats
from hapo.methods._options import TemperatureOptions
from hapo.parts.entropy import entropy_from_logits
from hapo.samplers.rule import TemperatureRule, temper_

RULE = TemperatureRule(
    TemperatureOptions(tau=0.3), EntropyStats(pivot=0.0, sigma=1.0, h_max=math.log(12.0), h_min=-3.0)
)
# The interpreter is chosen before Triton is imported, hence a process of its own.
INTERPRETED = """
import sys, torch
from hapo.kernels import _compared
from hapo.kernels import temperature as kernel
from hapo.samplers.rule import TemperatureRule
cases, args = torch.load(sys.argv[1], weights_only=True)
rule = TemperatureRule.from_args(args)
for case in cases.values():
    def factor(entropy):
        case["entropy"] = entropy
        return rule.factor(entropy)
    kernel.temper_(case["logits"], factor, case["t_base"], case["rows"], case["block"])
torch.save(cases, sys.argv[1])
assert {form[0] for form in _compared} == {"entropy", "divide"}  # each was compared with torch, and agreed
"""

# Prints how many logits a thread reads at once, as compiled for an H100 with a vocabulary divisible by 16.
COMPILED = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hapo.kernels import temperature as kernel
types = dict.fromkeys(["logits", "t_base", "entropy", "factor"], "*fp32") | {"rows": "*i64", "block": "constexpr"}
widths = {}
for function in (kernel._entropy, kernel._divide):
    names = function.arg_names
    signature = {n: types.get(n, "i32") for n in names} | {"column_stride": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr"}
    source = ASTSource(function, signature, {"block": kernel.BLOCK, "column_stride": 1}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    widths[function.__name__] = max(int(n) for n in re.findall(r"ld.global.v(\\d)", ptx))
print(json.dumps(widths))
"""


def _case(logits, t_base=1.0, rows=None, block=64):
    t_base = torch.as_tensor(t_base).expand(len(logits)).clone()
    return {"logits": logits, "t_base": t_base, "rows": rows, "block": block}


def _cases():
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 300)  # no multiple of the block
    masked = logits.clone()
    masked[0, :200] = -math.inf  # the first blocks hold no finite logit
    masked[1, :299] = -math.inf
    masked[2, 64:] = -math.inf
    masked[3, ::2] = -math.inf
    masked[4] = -math.inf
    masked[4, 150] = -1e30
    rising = torch.linspace(-400, 400, 300).repeat(2, 1)  # the maximum moves in every block
    t_base = torch.tensor([0.3, 0.7, 1.0, 1.3, 2.0])
    return {
        "float32": _case(logits, t_base),
        "bfloat16": _case(logits.bfloat16(), t_base),
        "float16": _case(logits.half(), t_base),
        "offset": _case(logits + 1e3, t_base),
        "masked": _case(masked, t_base),
        "rising": _case(torch.cat([rising, rising.flip(1)]), 50.0),
        "rows": _case(logits.clone(), t_base, torch.tensor([3, 0])),
        "strided": _case((3 * torch.randn(5, 600))[:, ::2], t_base),
        "one block": _case(logits.clone(), t_base, block=512),
        "152k": _case(torch.randn(1, 151_936) + 1e3, 0.7, block=8192),
        "nan": _case(torch.tensor([[0.0, math.nan, 1.0], [-math.inf] * 3, [0.0, math.inf, 1.0]])),
        "no rows": _case(logits.clone(), t_base, torch.tensor([], dtype=torch.long)),
    }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "cases.pt"
    torch.save((_cases(), RULE.to_args()), path)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", [name for name in _cases() if name not in ("nan", "no rows")])
def test_kernel_agrees_with_float64_and_with_torch(interpreted, name):
    case, got = _cases()[name], interpreted[name]
    logits, rows = case["logits"], case["rows"]
    chosen = slice(None) if rows is None else rows
    exact = torch.distributions.Categorical(
        logits=(logits[chosen].double() / case["t_base"][chosen, None].double())
    )
    logp = exact.logits
    entropy = -torch.where(logp == -math.inf, 0.0, logp.exp() * logp).sum(-1)
    torch.testing.assert_close(got["entropy"].double(), entropy, rtol=0, atol=5e-6)
    plain = entropy_from_logits(logits[chosen], case["t_base"][chosen])
    torch.testing.assert_close(plain.double(), entropy, rtol=0, atol=5e-6)

    before = logits.clone()
    temper_(logits, RULE, case["t_base"], rows)
    assert not torch.equal(logits, before)
    # One unit in the last place of the short formats: the interpreter truncates where a GPU rounds.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[logits.dtype]
    torch.testing.assert_close(got["logits"], logits, rtol=tolerance, atol=0)
    if rows is not None:
        others = [row for row in range(len(logits)) if row not in rows]
        assert torch.equal(got["logits"][others], before[others])


def test_kernel_hands_nan_on_as_torch_does(interpreted):
    assert interpreted["nan"]["entropy"].isnan().all()
    case = _cases()["nan"]
    temper_(case["logits"], RULE, case["t_base"], None)
    assert case["logits"].isnan().all()


def test_kernel_leaves_all_rows_where_none_is_chosen(interpreted):
    assert torch.equal(interpreted["no rows"]["logits"], _cases()["no rows"]["logits"])


def test_kernel_compiles_for_a_gpu(tmp_path):
    # The interpreter accepts what the compiler refuses. No GPU is needed to compile, again in its own process.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"_entropy": 4, "_divide": 4}
