"""The contract's own checks run where jaxtyping is not installed as a hook: in a user's process."""

import subprocess
import sys

import pytest
import torch

from hapo.batch import masked

CASES = {
    "mask=torch.ones(2, 3)": "mask must be a bool tensor",
    "old_logp=torch.zeros(2, 4)": "old_logp has shape (2, 4), expected (2, 3)",
    "reward=torch.zeros(3)": "reward has shape (3,), expected (2,)",
    "group=torch.zeros(2)": "group holds prompt ids and must be an integer tensor",
    "old_entropy=torch.zeros(2, 3, dtype=torch.long)": "old_entropy must be a floating-point tensor",
}
SCRIPT = """
import torch, hapo
ok = dict(mask=torch.ones(2, 3, dtype=torch.bool), old_logp=torch.zeros(2, 3),
          reward=torch.zeros(2), group=torch.zeros(2, dtype=torch.long))
for case in {cases!r}:
    try:
        hapo.TokenBatch(**{{**ok, **eval(f"dict({{case}})")}})
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def messages():
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(cases=list(CASES))], capture_output=True, text=True, check=True
    )
    return out.stdout.splitlines()


@pytest.mark.parametrize("i", range(len(CASES)), ids=list(CASES))
def test_a_broken_field_is_named(messages, i):
    assert messages[i].startswith(list(CASES.values())[i])


def test_masked_keeps_every_bit_of_what_is_valid():
    x = torch.tensor([[1.5, torch.nan, -0.0], [torch.inf, torch.nan, -2.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    found = masked(x, mask)
    assert found.tolist() == [[1.5, 0.0, -0.0], [torch.inf, 0.0, 0.0]]
    assert masked(x.double(), mask).dtype == torch.float64
    assert masked(x.half(), mask).dtype == torch.float32
    column = torch.tensor([[3.0], [torch.nan]])
    assert masked(column, mask & torch.tensor([[True], [False]])).tolist() == [[3, 0, 3], [0, 0, 0]]
