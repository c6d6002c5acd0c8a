"""Masked-diffusion decoding: against a plain loop, greedy steps, a batch against its rows, early ends, both layouts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hapo.masked import mask_token, masked_logits, predicts_next
from hapo.samplers.diffusion import Unmasking, decode

VOCABULARY, MASK, EOS = 24, 23, 1


@cache
def bert() -> BertForMaskedLM:
    """Absolute positions: padding must not move them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    net = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # spread the probabilities
    return net


@cache
def llama() -> LlamaForCausalLM:
    """Llama with full attention."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, is_causal=False,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return net


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 5, 3 and 4 tokens, padded on the left."""
    ids = torch.randint(2, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) >= torch.tensor([0, 2, 1])[:, None]).long()
    return ids * mask, mask


def plain_loop(net, prompt: list[int], how: Unmasking, *, shifted: bool) -> list[int]:
    """One prompt without padding, all logits, token by token in plain Python; greedy."""
    ids = prompt + [MASK] * how.length
    steps = how.all_steps // how.blocks
    for block in range(how.blocks):
        places = [len(prompt) + block * how.block_length + i for i in range(how.block_length)]
        for step in range(steps):
            with torch.no_grad():
                logits = net(input_ids=torch.tensor([ids])).logits[0]
            found = {}
            for place in places:
                if ids[place] == MASK:
                    row = logits[place - shifted].clone()
                    row[MASK] = -torch.inf
                    p = row.softmax(-1)
                    best = int(p.argmax())
                    sure = p[best] if how.order == "confidence" else (p * p.clamp_min(1e-30).log()).sum()
                    found[place] = (float(sure), best)
            left = len(found)
            count = -(-left // (steps - step))  # what is left, over the steps that are left, rounded up
            for place in sorted(found, key=lambda k: -found[k][0])[:count]:
                ids[place] = found[place][1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("shifted", [False, True], ids=["at-k", "before-k"])
@pytest.mark.parametrize("order", ["confidence", "entropy"])
@pytest.mark.parametrize(
    ("block", "steps"), [(None, 12), (None, 5), (4, 6), (4, 12), (3, 4)], ids=lambda x: str(x)
)
def test_a_batch_is_what_a_plain_loop_makes_of_each_row(block, steps, order, shifted):
    how = Unmasking(length=12, block=block, steps=steps, order=order, temperature=0.0)
    ids, mask = prompts()
    for net in (bert(), llama()):
        out = decode(net, ids, mask, how, mask_id=MASK, shifted=shifted)
        for row, prompt, kept in zip(out.ids.tolist(), ids, mask, strict=True):
            assert row == plain_loop(net, prompt[kept.bool()].tolist(), how, shifted=shifted)
        assert (out.ids != MASK).all()
        assert len(set(map(tuple, out.ids.tolist()))) == 3
    counts = [int((out.step == i).sum(1).unique()) for i in range(steps)]
    assert counts == how.counts * how.blocks


def test_a_step_a_token_is_the_step_by_step_argmax():
    """Steps = L, greedy: each pass unmasks the one position with the highest probability of all."""
    ids, mask = prompts()
    how = Unmasking(length=6, temperature=0.0)
    out = decode(llama(), ids, mask, how, mask_id=MASK)
    shown = torch.cat([ids, torch.full((3, 6), MASK)], 1)
    attention = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    for i in range(6):
        p = masked_logits(llama(), shown, attention, 5, 11, shifted=False)
        p[..., MASK] = -torch.inf
        p = torch.where((shown[:, 5:] == MASK)[..., None], p.softmax(-1), 0.0)
        best = p.flatten(1).argmax(1)
        place, token = best // VOCABULARY, best % VOCABULARY
        assert torch.equal(out.ids[range(3), place], token)
        assert (out.step[range(3), place] == i).all()
        torch.testing.assert_close(out.confidence[range(3), place], p.flatten(1).amax(1))
        shown[range(3), 5 + place] = token


def test_a_batch_equals_its_rows_alone():
    ids, mask = prompts()
    how = Unmasking(length=8, block=4, steps=4, temperature=0.0)
    for net in (bert(), llama()):
        together = decode(net, ids, mask, how, mask_id=MASK)
        for i in range(3):
            keep = mask[i].bool()
            alone = decode(net, ids[i : i + 1, keep], mask[i : i + 1, keep], how, mask_id=MASK)
            assert torch.equal(alone.ids[0], together.ids[i])
            assert torch.equal(alone.step[0], together.step[i])


def test_draws_follow_the_model_at_the_temperature():
    ids, mask = prompts()
    many = ids[:1].expand(4000, -1), mask[:1].expand(4000, -1)
    for temperature in (1.0, 0.5):
        how = Unmasking(length=1, temperature=temperature)
        generator = torch.Generator().manual_seed(0)
        drawn = decode(bert(), *many, how, mask_id=MASK, generator=generator).ids[:, 0]
        shown = torch.cat([ids[:1], torch.tensor([[MASK]])], 1)
        logits = masked_logits(bert(), shown, torch.ones_like(shown), 5, 6, shifted=False)[0, 0]
        logits[MASK] = -torch.inf
        expected = (logits / temperature).softmax(-1)
        share = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
        assert (share - expected).abs().max() < 0.03
        again = decode(bert(), *many, how, mask_id=MASK, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again.ids[:, 0], drawn)


class Ends(torch.nn.Module):
    """Says end of sequence everywhere, but token 5 in the first `talk` positions of prompts that begin with 9."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.head.weight.data = torch.eye(VOCABULARY)
        self.config = LlamaConfig()
        self.rows: list[int] = []

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask):
        self.rows.append(len(input_ids))
        says = torch.full(input_ids.shape, EOS)
        says[input_ids[:, 0] == 9, :10] = 5
        return type("Out", (), {"logits": self.head(10.0 * torch.nn.functional.one_hot(says, VOCABULARY).float())})


def test_a_row_whose_block_is_all_end_of_sequence_is_run_no_further():
    net, how = Ends(), Unmasking(length=12, block=4, steps=6, temperature=0.0)
    ids = torch.tensor([[9, 2], [3, 2]])
    out = decode(net, ids, torch.ones_like(ids), how, mask_id=MASK, eos_ids=[EOS])
    assert out.ids.tolist() == [[5] * 8 + [EOS] * 4, [EOS] * 12]
    assert net.rows == [2, 2, 1, 1, 1, 1]
    assert (out.step[1, 4:] == -1).all() and (out.step[0] >= 0).all()
    both = decode(Ends(), ids[1:], torch.ones_like(ids[1:]), how, mask_id=MASK, eos_ids=[EOS])
    assert both.ids.tolist() == [[EOS] * 12]
    never = Ends()
    decode(never, ids[1:], torch.ones_like(ids[1:]), how, mask_id=MASK)
    assert len(never.rows) == 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"length": 10, "block": 4}, "blocks of 4 do not fill a response of 10"),
        ({"length": 8, "block": 4, "steps": 3}, "3 steps cannot be spread over 2 blocks of 4"),
        ({"length": 8, "steps": 9}, "a multiple of 1 up to 8"),
        ({"length": 8, "temperature": -1.0}, "temperature must be >= 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Unmasking(**given)


def test_what_a_model_is():
    assert predicts_next(type("Config", (), {"model_type": "Dream"})())
    assert predicts_next(LlamaConfig(predicts_next=True)) and not predicts_next(LlamaConfig())
    assert mask_token(LlamaConfig(mask_token_id=7), object()) == 7
    with pytest.raises(ValueError, match="has no mask token"):
        mask_token(LlamaConfig(), object())
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        masked_logits(bert(), torch.tensor([[MASK]]), torch.tensor([[1]]), 0, 1, shifted=True)
