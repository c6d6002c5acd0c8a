"""Token dumps of other trainers as run folders, so that the report and the token microscope open them.

Read are prime-rl's token exports (`enable_token_export`, schema 1: `token_exports/step_N/rank_R.jsonl`) and the
rollout dumps of slime and miles (`--save-debug-rollout-data`: .pt files with `samples`). What was measured is
taken over: tokens, log-probs in nats, entropies, rewards. What is done with it is a method's of hapo.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hapo

from ..outputs import write_whole
from .run import parse_arm

if TYPE_CHECKING:
    from ..method import Method

Decode = Callable[[Sequence[Sequence[int]]], list[str]]
METHOD = "grpo:kl_coef=0.0"
"""Near to what those trainers do by default; no penalty, as no dump has log-probs of a reference policy."""


@dataclass(frozen=True)
class ForeignResponse:
    """One response; every list has an entry a token, from the first that was drawn."""

    group: str
    """Responses of one prompt share it."""
    prompt: list[int]
    ids: list[int]
    mask: list[bool]
    """Whether the token was drawn by the policy and is trained on."""
    reward: float
    """NaN where there is none."""
    old_logp: list[float]
    """Log-prob of the engine that drew the token, nats."""
    logp: list[float] | None
    """Of the trainer's pass over it; None where the dump has none."""
    entropy: list[float] | None
    """Of that pass, nats."""


Step = tuple[int, list[ForeignResponse]]


def read_dumps(source: Path) -> tuple[str, Iterator[Step]]:
    """The trainer that wrote a folder, and its steps one by one, in the trainer's own numbers.

    Raises:
        FileNotFoundError: the folder holds no dump of a known form.
        ValueError: while a step is read, a file that is broken or of another form.
    """
    exports = source if source.name == "token_exports" else source / "token_exports"
    steps = {int(m[1]): f for f in exports.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", f.name))}
    if steps:
        return "prime-rl", ((step, _exported(steps[step])) for step in sorted(steps))
    dumps = [file for file in source.glob("*.pt") if not file.name.startswith("eval")]
    if dumps:
        return "slime or miles", map(_dumped, sorted(dumps, key=_last_number))
    raise FileNotFoundError(
        f"{source} holds neither prime-rl's token_exports/step_N/rank_R.jsonl nor rollout dumps (*.pt) of slime "
        "or miles"
    )


def convert(source: Path, output: Path, decode: Decode, method: str = METHOD) -> int:
    """Write the dumps of `source` as a run folder, and return the number of steps.

    A step of the dump is a rollout batch and an optimiser step in one. The columns that a method makes (advantage,
    ratio, bounds, kept) are those of a method of hapo. Where the dump has no log-probs of the trainer, those of
    the draw stand in: every ratio is then 1. prime-rl's entropies are of the trainer's policy, and stand for both.

    Args:
        source: prime-rl's output folder, or the folder of the .pt files.
        output: the run folder, which must not hold a run.
        decode: lists of token ids -> texts, such as a tokenizer's `batch_decode`.
        method: a policy method as `NAME[:option=value,...]`; one that reads entropies needs a dump that has them.

    Raises:
        FileNotFoundError: no dump of a known form is there.
        FileExistsError: `output` holds a run.
        ValueError: a file is broken, or the dump lacks what the method reads.
    """
    from ..engines.records import BEGUN, RunRecords, manifest
    from ..methods import policy

    trainer, steps = read_dumps(source)
    name, options = parse_arm(method)
    built = policy(name, **options)
    config = {"engine": trainer, "source": str(source), "method": name, "method_options": options}
    records = RunRecords.create(output, config, manifest(seed=0, source=str(source)))
    count = 0
    try:
        for step, responses in steps:
            _record(records, step, responses, decode, built)
            count += 1
    except BaseException:  # a part of a run is none: the next try shall find the folder free
        for name in BEGUN:
            part = output / name
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
        raise
    write_whole(output / "finished.json", json.dumps({"steps": count, "why": "converted"}) + "\n")
    return count


def _record(records: Any, step: int, responses: list[ForeignResponse], decode: Decode, method: Method) -> None:
    import torch

    width = max(len(one.ids) for one in responses)

    def padded(rows: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)

    known = {name: number for number, name in enumerate(dict.fromkeys(one.group for one in responses))}
    old_logp = padded([one.old_logp for one in responses], torch.float32)
    logp = padded([one.old_logp if one.logp is None else one.logp for one in responses], torch.float32)
    fields: dict[str, Any] = {}
    entropies = [one.entropy for one in responses if one.entropy is not None]
    if len(entropies) == len(responses):
        fields = dict.fromkeys(("entropy", "old_entropy"), padded(entropies, torch.float32))
    batch = hapo.TokenBatch(
        mask=padded([one.mask for one in responses], torch.bool),
        reward=torch.tensor([one.reward for one in responses]),
        group=torch.tensor([known[one.group] for one in responses]),
        old_logp=old_logp,
        logp=logp,
        **fields,
    )
    batch = method.step(method.prepare(batch))
    out = method.loss(batch)
    ids = padded([one.ids for one in responses], torch.int64)
    everything = torch.arange(len(responses))
    mask = padded([one.mask for one in responses], torch.bool) & batch.scored.unsqueeze(1)
    made = (batch, mask, everything, len(responses))
    records.add_rewards(step, *made)
    records.add_tokens(
        step,
        step,
        batch,
        out.tokens,
        mask=mask,
        response=everything,
        responses=int(batch.scored.sum()),
        ids=ids,
        texts=[decode([[token] for token in row]) for row in ids.tolist()],
        prompts=decode([one.prompt for one in responses]),
        temperature=None,
    )
    records.write_tokens(step)
    assert batch.reward is not None
    line = {"step": step, "loss": out.loss.item(), "reward": batch.reward.nanmean().item()}
    if fields:
        line["entropy"] = fields["entropy"][mask].mean().item()
    records.add_metrics(line)


def _exported(folder: Path) -> list[ForeignResponse]:
    """prime-rl: a line a packed sequence, in files of the ranks; all lists are of the whole sequence."""
    found = []
    for file in sorted(folder.glob("rank_*.jsonl"), key=lambda file: int(file.stem.removeprefix("rank_"))):
        for number, text in enumerate(file.read_text().splitlines(), 1):
            where = f"{file}, line {number}"
            try:
                line = json.loads(text)
                found.append(_sequence(line, where))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{where} is no token export of prime-rl: {error!r}") from error
    if not found:
        raise ValueError(f"{folder} holds no sequence")
    return found


def _sequence(line: dict[str, Any], where: str) -> ForeignResponse:
    if line["schema_version"] != 1:
        raise ValueError(f"{where} has schema_version {line['schema_version']}, and 1 is what can be read")
    mask = [bool(m) for m in line["loss_mask"]]
    if not any(mask):
        raise ValueError(f"{where} has no token in its loss_mask")
    first = mask.index(True)
    numbers = {}
    for name in ("inference_logprobs", "trainer_logprobs", "entropy"):
        values = line[name][first:]
        if any(m and x is None for m, x in zip(mask[first:], values, strict=True)):
            raise ValueError(f"{where}: {name} is null at a token of the loss_mask")
        numbers[name] = [0.0 if x is None else float(x) for x in values]
    reward = next((x for x in line["rewards"][first:] if x is not None), math.nan)
    prompt = line["token_ids"][:first]
    return ForeignResponse(
        group=f"{line['env_name']} {prompt}",
        prompt=prompt,
        ids=line["token_ids"][first:],
        mask=mask[first:],
        reward=float(reward),
        old_logp=numbers["inference_logprobs"],
        logp=numbers["trainer_logprobs"],
        entropy=numbers["entropy"],
    )


def _last_number(file: Path) -> int:
    """The name is the user's pattern, with the number of the rollout in it."""
    return int((re.findall(r"\d+", file.stem) or ["0"])[-1])


def _dumped(file: Path) -> Step:
    """slime and miles: the samples of one rollout, before training."""
    import torch

    try:
        pack = torch.load(file, map_location="cpu", weights_only=True)  # a pickle runs code, unless told not to
        samples = [_sample(sample, f"{file}, sample {i}") for i, sample in enumerate(pack["samples"])]
        step = int(pack["rollout_id"])
    except ValueError:
        raise
    except Exception as error:  # of the pickle or of its content
        raise ValueError(f"{file} is no rollout dump of slime or miles that holds plain data: {error}") from error
    if not samples:
        raise ValueError(f"{file} holds no samples")
    return step, samples


def _sample(sample: dict[str, Any], where: str) -> ForeignResponse:
    length, reward = sample["response_length"], sample["reward"]
    if isinstance(reward, dict):
        raise ValueError(f"{where}: the reward has several parts ({', '.join(reward)}), and one number is needed")
    if length == 0 or sample.get("rollout_log_probs") is None:
        raise ValueError(f"{where} has no tokens with rollout_log_probs")
    cut = len(sample["tokens"]) - length
    mask = sample.get("loss_mask") or [1] * length
    return ForeignResponse(
        group=str(sample["group_index"]),
        prompt=sample["tokens"][:cut],
        ids=sample["tokens"][cut:],
        mask=[bool(m) and not sample.get("remove_sample") for m in mask],
        reward=math.nan if reward is None else float(reward),
        old_logp=[float(x) for x in sample["rollout_log_probs"]],
        logp=None,
        entropy=None,
    )
