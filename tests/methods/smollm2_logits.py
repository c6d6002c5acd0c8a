"""Logits of SmolLM2 at real positions, kept small: sorted, in float16, as differences.

    python scripts/fetch_smollm2.py && python -m tests.methods.smollm2_logits

makes the file again. What is checked with them does not depend on the order of the vocabulary.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_suffix(".npz")
TEXT = (
    "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How "
    "many clips did she sell altogether?\nAnswer: In May she sold 48 / 2 = 24 clips. Altogether she sold 48 + 24 = "
    "72 clips.\nThe capital of France is Paris, a city on the Seine whose name nobody can quite explain."
)
POSITIONS = 16


@cache
def smollm2_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (16, 49152) in increasing order, and the place (16,) of the token that the text goes on with."""
    kept = np.load(FILE)
    bits = kept["steps"].cumsum(1, dtype=np.int32)  # the order of float16 is that of these integers
    sixteen = np.where(bits < 0, ~bits | 0x8000, bits).astype(np.uint16).view(np.float16)
    return torch.from_numpy(sixteen.astype(np.float64)), torch.from_numpy(kept["targets"])


def main(model: str) -> None:
    """Write the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0, :-1]
    chosen = torch.linspace(0, len(logits) - 1, POSITIONS).round().long()
    values, order = logits[chosen].half().sort(dim=1, stable=True)
    targets = (order == ids[0, 1:][chosen][:, None]).int().argmax(1)
    bits = values.numpy().view(np.uint16).astype(np.int32)
    bits = np.where(bits & 0x8000, ~(bits & 0x7FFF), bits)
    np.savez_compressed(FILE, steps=np.diff(bits, axis=1, prepend=0), targets=targets.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:] or ["models/SmolLM2-135M-Instruct"])
