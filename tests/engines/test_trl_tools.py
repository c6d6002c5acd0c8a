"""An environment as TRL's own tools: `environment_factory`, for models whose chat template knows tool calls."""

import json
import string

import pytest
import torch
import trl.chat_template_utils
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hapo.engines.trl.rows import RolloutRows
from hapo.engines.trl.sampler import Turn
from hapo.parts.turns import turn_index
from hapo.trl import HAPOTrainer, Sampler
from tests.engines import tiny

CALL = '<tool_call>\n{{"name": "answer", "arguments": {}}}\n</tool_call><|im_end|>'


class Double:
    """Done where the answer is twice the number of the row."""

    max_turns = 2

    def __init__(self):
        self.reward, self.done, self.turns = 0.0, True, 0

    def reset(self, **row):
        self.number, self.reward, self.done, self.turns = row["i"], 0.0, False, 0

    def answer(self, text: str) -> str:
        """Answer.

        Args:
            text: The number.

        Returns:
            Whether it is right.
        """
        self.turns += 1
        self.reward = float(text == str(2 * self.number))
        self.done = bool(self.reward) or self.turns == self.max_turns
        return "right" if self.reward else "wrong"

    def get_reward(self) -> float:
        """Of the last turn."""
        return self.reward


def speaking() -> PreTrainedTokenizerFast:
    """Characters, the marks of a chat, and a template with tools."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<|im_end|>", "<|im_start|>", *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", padding_side="left",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = trl.chat_template_utils.qwen2_5_chat_template
    return tokenizer


class Scripted(Sampler):
    """Even rows call the tool at once with the right number, odd ones first with a wrong one; then all say bye."""

    def __init__(self, encode):
        super().__init__(None)
        self.encode, self.turn = encode, 0

    def _draw(self, asked):
        self.turn += 1
        rows = range(8) if self.turn == 1 else range(len(asked.prompt_ids))
        if self.turn == 1:
            said = [CALL.format(json.dumps({"text": "0" if row % 2 == 0 else "7"})) for row in rows]
        elif self.turn == 2:
            said = ["bye<|im_end|>" if row % 2 == 0 else CALL.format(json.dumps({"text": "0"})) for row in rows]
        else:
            said = ["bye<|im_end|>" for _ in rows]
        return Turn([self.encode(text)["input_ids"] for text in said], None)


class Trainer(HAPOTrainer):
    def make_sampler(self):
        return Scripted(self._tokenizer)


@pytest.mark.parametrize("advantage", ["outcome", "turn_reward"])
def test_what_tools_say_is_masked_and_the_environment_rewards(tmp_path, advantage):
    """Rows: i = 0, so that 0 is right. Odd rows are right in their second call. Reward: the environment's own."""
    tokenizer = speaking()
    rows = {"prompt": [[{"role": "user", "content": "double"}]] * 8, "i": [0] * 8}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    trainer = Trainer(
        tiny.model(**sizes),
        None,
        tiny.config(
            tmp_path, method="grpo", method_options={"advantage": advantage}, beta=0.0, max_completion_length=600
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        environment_factory=Double,
    )
    trainer.model.train()
    output = trainer._rollout([dict(trainer.train_dataset[0]) for _ in range(8)])
    trainer._prepare(output)
    batch = RolloutRows.of(output).batch
    assert output["verdict"].tolist() == [1.0] * 8
    assert [e.turns for e in trainer.environments] == [1, 2] * 4
    for i in range(8):
        ids, mask = output["completion_ids"][i], batch.mask[i]
        own = tokenizer.decode(ids[mask], skip_special_tokens=True)
        heard = tokenizer.decode(ids[output["completion_mask"][i].bool() & ~mask], skip_special_tokens=True)
        assert own.count("</tool_call>") == 1 + i % 2 and own.endswith("bye")
        assert ("wrong" in heard) == bool(i % 2) and "right" in heard and "right" not in own
        assert int(turn_index(batch.mask)[i].max()) == 1 + i % 2
    assert torch.equal(batch.advantage, torch.zeros_like(batch.advantage))  # all are right
