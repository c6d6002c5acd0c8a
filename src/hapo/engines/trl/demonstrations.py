"""Demonstrations beside rollouts: which ones an optimiser step takes, their weight, and their share of its loss.

Which ones is a function of seed and step, and so is the weight: a resumed run needs nothing else.
Every rank knows all demonstrations of a step, and so its totals, without a word from the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...batch import LossOutput, StepTotals, TokenBatch
from ...methods import supervised
from ...methods._options import check_number
from ...scoring import Scores
from ...supervised import Supervised
from . import passes

CHORD_WEIGHT = 0.1
"""mu where demonstrations are given and no weight: CHORD-phi's."""

METRICS = {
    "loss": "demonstration_loss",
    "nll": "demonstration_nll",
    "weight": "demonstration_token_weight",
}
"""`LossOutput.metrics` of the method on demonstrations -> the name in the log."""

OPTIONS = {
    "demonstration_weight": None,
    "demonstration_method": "sft",
    "demonstration_method_options": None,
    "demonstrations_per_step": None,
}
"""Options of a `HAPOConfig` that act beside demonstrations alone, and their defaults."""


class Weight:
    """mu of each optimiser step: constant, or linear between given steps and constant outside.

    Raises:
        ValueError: it is no number in [0, 1), nor a mapping of optimiser steps to such numbers.
    """

    def __init__(self, given: Any) -> None:
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                _refuse(given)
        points = given if isinstance(given, Mapping) else {0: given}
        if not points:
            _refuse(given)
        for value in points.values():
            check_number("demonstration_weight", value)
            if not 0 <= value < 1:
                _refuse(given)
        steps = [str(step) for step in points]
        if not all(step.isdecimal() for step in steps):
            _refuse(given)
        self.given: float | dict[str, float] = given
        """As it was given, a mapping or a number."""
        self.points = sorted(zip(map(int, steps), map(float, points.values()), strict=True))

    def at(self, step: int) -> float:
        """mu of an optimiser step, the first of which is 0."""
        earlier = [point for point in self.points if point[0] <= step]
        later = [point for point in self.points if point[0] > step]
        if not earlier or not later:
            return (earlier[-1] if earlier else later[0])[1]
        (a, low), (b, high) = earlier[-1], later[0]
        return low + (high - low) * (step - a) / (b - a)


def _refuse(given: Any) -> None:
    raise ValueError(
        "demonstration_weight must be a number in [0, 1), or a mapping of optimiser steps to such numbers, as in "
        f'{{"0": 0.5, "200": 0.1}}, got {given!r}'
    )


def check_options(args: Any) -> None:
    """Refuse a method or a number of demonstrations that cannot be, before anything is loaded.

    Raises:
        ValueError: which option of the `HAPOConfig`, its value, and what it must be.
    """
    options = args.demonstration_method_options or {}
    if not isinstance(options, dict):
        raise ValueError(
            f"demonstration_method_options must be a mapping of option names to values, got {options!r}"
        )
    try:
        supervised(args.demonstration_method, **options)
    except ValueError as error:
        raise ValueError(f"demonstration_method: {error}") from error
    number = args.demonstrations_per_step
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ValueError(f"demonstrations_per_step must be a whole number of at least 1, got {number!r}")


class Conversation(NamedTuple):
    """A demonstration as it was given: text, or messages, with what the model is to answer."""

    prompt: Any
    completion: Any


def conversations(dataset: Any) -> list[Conversation]:
    """The rows of a data set: its columns `prompt` and `completion`, or `messages` whose last one is the answer.

    Raises:
        ValueError: there are none, columns are missing, or a row is no demonstration; the message names it.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError("demonstrations must be a data set with a length: the order is drawn over all of them")
    if not len(dataset):
        raise ValueError("demonstrations: there are none; leave the data set out, or give one that has rows")
    return [_conversation(row, f"demonstrations, row {number}") for number, row in enumerate(dataset, 1)]


def _conversation(row: Mapping[str, Any], place: str) -> Conversation:
    messages = row.get("messages")
    if messages is not None:
        prompt, completion = messages[:-1], messages[-1:]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
    else:
        raise ValueError(
            f"{place}: no prompt and completion, and no messages; it has {', '.join(map(repr, row))}. Rename the "
            "columns, or make them of yours"
        )
    if isinstance(prompt, list) and isinstance(completion, str) and completion.strip():
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        said = [*prompt, *completion]
        if prompt and completion and completion[-1].get("role") == "assistant" and all(map(_is_text, said)):
            return Conversation(prompt, completion)
        raise ValueError(
            f"{place}: messages of a demonstration are text, begin with what is asked, and end with an answer of "
            f"the assistant, not {said!r:.200}"
        )
    if isinstance(prompt, str) and isinstance(completion, str) and prompt and completion.strip():
        return Conversation(prompt, completion)
    raise ValueError(f"{place}: prompt and completion must both be text, or messages, and not empty: {row!r:.200}")


def _is_text(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("content"), str | None)


class DemonstrationIds(NamedTuple):
    """A demonstration as token ids."""

    prompt: list[int]
    completion: list[int]
    """The targets."""


class Encoder:
    """Demonstrations as rollouts are: prompts as TRL's GRPO trainer writes them, completions with their end.

    Args:
        tokenizer: of the model.
        longest: tokens that the model can read; None: not known.
        template: arguments of `apply_chat_template`, as TRL's trainer has them.
    """

    def __init__(self, tokenizer: Any, longest: int | None, **template: Any) -> None:
        self.tokenizer = tokenizer
        self.longest = longest
        self.template = template

    def __call__(self, one: Conversation) -> DemonstrationIds:
        """Its token ids.

        Raises:
            ValueError: it is too long, or the template writes prompts otherwise where an answer follows.
        """
        encoded = self._text(one) if isinstance(one.prompt, str) else self._messages(one)
        length = len(encoded.prompt) + len(encoded.completion)
        if self.longest is not None and length > self.longest:
            raise ValueError(
                f"a demonstration has {length} tokens, and the model reads at most {self.longest}: leave it "
                f"out of the data. It begins with {one.prompt!r:.200}"
            )
        return encoded

    def _text(self, one: Conversation) -> DemonstrationIds:
        prompt = self.tokenizer(one.prompt)["input_ids"]
        whole = self.tokenizer(one.prompt + one.completion)["input_ids"]
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:  # a token lies across the border, where no rollout can have one
            completion = self.tokenizer(one.completion, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return DemonstrationIds(prompt, completion if completion[-1:] == [end] else [*completion, end])

    def _messages(self, one: Conversation) -> DemonstrationIds:
        prompt = self._templated(one.prompt, add_generation_prompt=True)
        whole = self._templated([*one.prompt, *one.completion])
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                "the chat template writes a prompt otherwise where an answer follows it, so that no rollout could "
                "be this demonstration: give prompt and completion as text that is templated already. It begins "
                f"with {one.prompt!r:.200}"
            )
        return DemonstrationIds(prompt, whole[len(prompt) :])

    def _templated(self, messages: list[Any], **how: Any) -> list[int]:
        how = {"tokenize": True, "return_dict": True, **self.template, **how}
        ids: list[int] = self.tokenizer.apply_chat_template(messages, **how)["input_ids"]
        return ids


class Demonstrations:
    """The demonstrations of a run, and what an optimiser step takes of them.

    Args:
        rows: all of them.
        encode: a demonstration -> its token ids.
        method: the loss on them.
        weight: mu of each step.
        per_step: how many an optimiser step takes, on all ranks together.
        seed: draws their order, a new one for each pass over them.
        padding: id of the padding token.
    """

    def __init__(
        self,
        rows: Sequence[Conversation],
        encode: Callable[[Conversation], DemonstrationIds],
        method: Supervised,
        weight: Weight,
        *,
        per_step: int,
        seed: int,
        padding: int,
    ) -> None:
        self.rows = rows
        self.encode = encode
        self.method = method
        self.weight = weight
        self.per_step = per_step
        self.seed = seed
        self.padding = padding
        self._order: tuple[int, list[int]] = (-1, [])
        self._step: tuple[int, list[DemonstrationIds]] = (-1, [])
        self.of_step(0)  # what cannot be encoded at all is said before any work

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it continues."""
        rows = hashlib.sha256()
        for row in self.rows:
            rows.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return {
            "demonstrations": f"{len(self.rows)} rows, {rows.hexdigest()[:16]}",
            "demonstration_weight": [list(point) for point in self.weight.points],
            "demonstration_method": json.loads(json.dumps({"name": self.method.name, **self.method.options})),
            "demonstrations_per_step": self.per_step,
        }

    def of_step(self, step: int) -> list[DemonstrationIds]:
        """Those of an optimiser step, the first of which is 0, on all ranks."""
        if self._step[0] != step:
            places = range(step * self.per_step, (step + 1) * self.per_step)
            self._step = step, [self.encode(self.rows[self._index(place)]) for place in places]
        return self._step[1]

    def totals(self, step: int) -> StepTotals:
        """Their rows and targets."""
        rows = self.of_step(step)
        tokens = sum(len(row.completion) for row in rows)
        return StepTotals(sequences=len(rows), tokens=tokens, kept=tokens)

    def passes(
        self, step: int, part: int, parts: int, most: int | None, device: torch.device
    ) -> list[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and mask of targets of each pass over the demonstrations of one micro-batch of one rank.

        They are padded as TRL pads rollouts. Empty where there are none for it.

        Args:
            step: the optimiser step, from 0.
            part: which micro-batch, counted over accumulation and ranks.
            parts: how many these are.
            most: tokens of a pass, as `passes.split` takes them.
            device: where to.
        """
        rows = self.of_step(step)[part::parts]
        if not rows:
            return []
        prompts, answers = (max(len(row[i]) for row in rows) for i in (0, 1))
        ids = torch.full((len(rows), prompts + answers), self.padding)
        attention = torch.zeros_like(ids)
        for i, (prompt, completion) in enumerate(rows):
            where = slice(prompts - len(prompt), prompts + len(completion))
            ids[i, where], attention[i, where] = torch.tensor([*prompt, *completion]), 1
        inputs: dict[str, Tensor] = {}
        for name, whole in {"ids": ids.to(device), "mask": attention.to(device)}.items():
            inputs |= {f"prompt_{name}": whole[:, :prompts], f"completion_{name}": whole[:, prompts:]}
        return passes.split(inputs, inputs["completion_mask"].bool(), most)

    def loss(self, scores: Scores, mask: Tensor, step: int) -> LossOutput:
        """The share of some rows of a step in its loss on demonstrations."""
        batch = TokenBatch(
            mask=mask,
            logp=scores.logp,
            entropy=scores.entropy.detach(),
            rank=scores.rank,
            expected_rank=scores.expected_rank,
            totals=self.totals(step),
        )
        return self.method.loss(batch)

    @property
    def metrics(self) -> dict[str, str]:
        """`loss(...).metrics` -> the name in the log; the same on every rank, with demonstrations or without."""
        return {k: name for k, name in METRICS.items() if k != "weight" or self.method.weight is not None}

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.rows))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return self._order[1][offset]


def demonstrations_of(dataset: Any, args: Any, encode: Encoder, *, ranks: int, sharded: bool) -> Demonstrations:
    """What the trainer was given, with the options of its `HAPOConfig`.

    Raises:
        ValueError: see `conversations` and `Encoder`; or ranks hold parts of the weights.
    """
    if sharded:
        raise ValueError(
            "demonstrations take passes of their own, of which sharded ranks (FSDP, DeepSpeed) would run unequal "
            "numbers: train data-parallel, or leave them out"
        )
    options = args.demonstration_method_options or {}
    weight = CHORD_WEIGHT if args.demonstration_weight is None else args.demonstration_weight
    responses = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    return Demonstrations(
        conversations(dataset),
        encode,
        supervised(args.demonstration_method, **options),
        Weight(weight),
        per_step=args.demonstrations_per_step or max(1, responses // args.num_generations),
        seed=args.seed,
        padding=encode.tokenizer.pad_token_id,
    )


def check_given(dataset: Any, args: Any) -> None:
    """Refuse options that act beside demonstrations alone where there are none.

    Raises:
        ValueError: which option, and how demonstrations are given.
    """
    if dataset is not None:
        return
    for name, default in OPTIONS.items():
        if (value := getattr(args, name)) not in (default, 0):
            raise ValueError(
                f"{name}={value!r} and no demonstrations: give them to the trainer, HAPOTrainer(..., "
                "demonstrations=...), or name them, `hapo train --demonstrations SOURCE`"
            )
