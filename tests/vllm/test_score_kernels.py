"""The scoring kernels, run by Triton's interpreter on CPU, against float64; and compiled for an H100.

`make test-gpu` runs them on a GPU.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

# The interpreter is chosen before Triton is imported, hence a process of its own.
INTERPRETED = """
import sys, torch
from hapo.kernels import _compared
from hapo.kernels import scores as kernels
cases = torch.load(sys.argv[1], weights_only=True)
for case in cases.values():
    z, tokens, block = case["logits"], case["tokens"], case["block"]
    case["scores"] = kernels.scores(z, tokens, case["scale"], block)
    if case["scale"] is None:
        _, entropy, normaliser = case["scores"]
        case["out"] = torch.full_like(z, torch.nan)
        kernels.gradient(z, tokens, normaliser, entropy, case["a"], case["b"], case["out"], block)
        kernels.gradient(z, tokens, normaliser, entropy, case["a"], case["b"], z, block)  # in place
torch.save(cases, sys.argv[1])
assert {form[0] for form in _compared} == {"scores", "gradient"}  # each was compared with torch, and agreed
"""

COMPILED = """
import json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hapo.kernels import scores as kernels
types = dict.fromkeys(["logits", "scale", "normaliser", "entropy", "to_logp", "to_entropy", "out"], "*fp32")
types |= {"tokens": "*i64"} | dict.fromkeys(["has_scale", "has_entropy", "block"], "constexpr")
constants = {"has_scale": True, "has_entropy": True, "block": kernels.BLOCK}
widths = {}
for function in (kernels._scores, kernels._gradient):
    names = function.arg_names
    signature = {n: types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] != "constexpr"}
    given = {n: x for n, x in constants.items() if n in names}
    source = ASTSource(function, signature, given, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    widths[function.__name__] = max(int(n) for n in re.findall(r"ld.global.v(\\d)", compiled.asm["ptx"]))
print(json.dumps(widths))
"""


def _cases():
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 300)  # no multiple of the block
    masked = logits.clone()
    masked[0, :200] = -torch.inf  # the first blocks hold no finite logit
    masked[1, ::2] = -torch.inf
    masked[2, 64:] = -torch.inf
    rising = torch.linspace(-400, 400, 300).repeat(5, 1)  # the maximum moves in every block
    made = {
        "float32": (logits, None, 64),
        "bfloat16": (logits.bfloat16(), None, 64),
        "offset": (logits + 1e3, None, 64),
        "masked": (masked, None, 64),
        "rising": (rising, None, 64),
        "one block": (logits.clone(), None, 512),
        "scaled": (logits.clone(), torch.tensor([0.3, 0.7, 1.0, 1.3, 2.0]), 64),
    }
    return {
        name: {
            "logits": z,
            "tokens": torch.tensor([251, 3, 17, 299, 0]),
            "scale": scale,
            "block": block,
            "a": torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0]),
            "b": torch.tensor([0.5, 0.0, 1.0, -1.0, 2.0]),
        }
        for name, (z, scale, block) in made.items()
    }


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "cases.pt"
    torch.save(_cases(), path)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", _cases())
def test_kernels_agree_with_float64(interpreted, name):
    case, got = _cases()[name], interpreted[name]
    z = case["logits"].double() * (1.0 if case["scale"] is None else case["scale"].double()[:, None])
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    logp = log_p.gather(-1, case["tokens"][:, None]).squeeze(-1)
    for found, want in zip(got["scores"], (logp, entropy, z.logsumexp(-1)), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=5e-6)
    if case["scale"] is not None:
        return
    a, b = case["a"].double()[:, None], case["b"].double()[:, None]
    onehot = torch.nn.functional.one_hot(case["tokens"], 300).double()
    want = a * (onehot - p) - b * torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
    # The interpreter truncates bfloat16 where a GPU rounds.
    tolerance = {"rtol": 2**-7, "atol": 1e-5} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got["out"].double(), want, **tolerance)
    assert torch.equal(got["out"], got["logits"])  # in place


def test_kernels_compile_for_a_gpu(tmp_path):
    # The interpreter accepts what the compiler refuses. No GPU is needed to compile, again in its own process.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"_scores": 4, "_gradient": 4}
