"""Which prompts a rollout batch is of: the order of an epoch, and dynamic sampling. Plumbing only."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import TrainerState
from trl.trainer.utils import RepeatSampler

from ...parts.select import mixed_groups
from .config import HAPOConfig
from .gather import TensorDict, concat_rows, gather_rows
from .stages import Stages

LOG = logging.getLogger(__name__)

NEWEST = 0.2
"""Weight of the last rollout batch in the share of mixed groups: the policy moves slowly, single batches vary."""


class EpochSampler(RepeatSampler):
    """TRL's sampler, its order a function of seed and epoch alone, so that a resumed run sees the same order."""

    def __init__(self, *args: Any, trainer_state: Callable[[], TrainerState], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = trainer_state

    @classmethod
    def like(cls, template: RepeatSampler, trainer_state: Callable[[], TrainerState]) -> EpochSampler:
        """TRL's, but for the order."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(**{name: getattr(template, name) for name in names}, trainer_state=trainer_state)

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + int(self._state().epoch or 0))
        return super().__iter__()


class FreshPrompts:
    """An endless, seeded order of the training prompts for dynamic sampling; its state is one counter.

    With stages, `take` is told of which prompts are asked for, and the order is one of its rows.
    """

    def __init__(self, dataset: Dataset, seed: int, position: int = 0, stages: Stages | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.position = position
        self._rows = [range(len(dataset))] if stages is None else stages.rows
        self._counted: Counter[str] | None = None
        self._order: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def take(self, n: int, used: Counter[str], stage: int = 0) -> list[dict[str, Any]]:
        """The next n prompts that are not in `used` (and adds them), then those that stand in further equal rows.

        Fewer once a whole pass gave nothing: all rows are used.
        """
        taken: list[dict[str, Any]] = []
        for most in (None, self._copies):
            for _ in range(2 * len(self._rows[stage])):
                if len(taken) == n:
                    return taken
                row = self.dataset[self._index(stage)]
                key = prompt_key(row)
                if used[key] < (1 if most is None else most()[key]):
                    used[key] += 1
                    taken.append(row)
        return taken

    def _copies(self) -> Counter[str]:
        """How many rows of the data set are equal to each: an environment may own all prompts."""
        if self._counted is None:
            self._counted = Counter(map(prompt_key, self.dataset))
        return self._counted

    def _index(self, stage: int) -> int:
        rows = self._rows[stage]
        epoch, offset = divmod(self.position, len(rows))
        self.position += 1
        if self._order[0] != (stage, epoch):
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = (stage, epoch), torch.randperm(len(rows), generator=generator).tolist()
        return rows[self._order[1][offset]]


def prompt_key(row: dict[str, Any]) -> str:
    """Identity of a problem: its prompt and all its other columns."""
    return json.dumps(row, sort_keys=True, default=str)


def prompts_to_draw(groups: int, share: float, unit: int) -> int:
    """Prompts that give so many mixed groups, most likely, where `share` of all groups are mixed; in whole units.

    Of n prompts n share give a mixed group, with a standard deviation of sqrt(n share (1 - share)), one of which
    is added: a round more takes as long as its longest response.
    """
    wanted = (groups + math.sqrt(groups * (1 - share))) / share
    return math.ceil(wanted / unit) * unit


def check_prompts(dataset: Dataset, args: HAPOConfig) -> None:
    """Raise a ValueError where there are too few prompts for one rollout batch, or whole groups with images."""
    images = {"image", "images"} & set(getattr(dataset, "column_names", None) or ())
    if args.whole_groups and images:
        raise ValueError(
            f"whole_groups=True moves rows between the steps of a rollout batch, images (the column "
            f"{', '.join(sorted(images))}) cannot: leave it out"
        )
    prompts = args.generation_batch_size // args.num_generations
    if hasattr(dataset, "__len__") and len(dataset) < prompts:
        raise ValueError(
            f"{len(dataset)} training prompts do not fill one rollout batch of {prompts} "
            f"({args.generation_batch_size} responses, {args.num_generations} a prompt): lower "
            "steps_per_generation or per_device_train_batch_size, or raise num_generations"
        )


class DynamicSampling:
    """Fresh prompts in place of groups with equal verdicts, up to a number of rounds (DAPO, eq. 11).

    With stages, fresh prompts are of the stage of those that they join, all of which are of one. With `draw_ahead`
    the first round holds further prompts, as many as the last rollout batches let expect that
    will be needed, at most as many again.

    Raises:
        ValueError: the training data is a stream, or a rollout holds images.
    """

    def __init__(
        self, dataset: Dataset, args: HAPOConfig, accelerator: Accelerator, stages: Stages | None = None
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "dynamic sampling (max_num_gen_batches > 1) draws further prompts by index, and an iterable "
                "data set has none: use a map-style data set, or max_num_gen_batches=1"
            )
        self.accelerator = accelerator
        self.group_size = args.num_generations
        self.most_rounds = args.max_num_gen_batches
        self.draw_ahead = args.draw_ahead
        self.stages = stages
        self.prompts = FreshPrompts(dataset, args.seed + 1, stages=stages)
        self._said = False
        self.share: float | None = None
        """Mixed groups among all that the last rollout batches drew, an exponential average."""

    def rollout(
        self, inputs: list[dict[str, Any]], draw: Callable[[list[dict[str, Any]]], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """A rollout with as many mixed groups as these prompts are, or as many as the rounds gave; its metrics.

        `inputs` are this rank's rows; `draw` makes TRL's rollout of such, with a verdict each. Kept groups come
        first, in the order drawn; what is missing is filled with groups that prepare() drops.
        """
        size, world, rank = self.group_size, self.accelerator.num_processes, self.accelerator.process_index
        self._stage = 0 if self.stages is None else self.stages.of(inputs[0])
        rows_of = Counter(gather_object([prompt_key(row) for row in inputs]))
        used = Counter({key: rows // size for key, rows in rows_of.items()})
        most = len(inputs) * world // size
        further = 0
        if self.draw_ahead and self.share is not None and len(inputs) % size == 0:  # no group on two ranks
            further = min(prompts_to_draw(most, self.share, world) - most, most)
        rollout = draw(inputs + self._rows(further, world, used))
        if "num_images" in rollout:
            raise ValueError("dynamic sampling moves rows between ranks, images cannot: set max_num_gen_batches=1")
        pool = [self._gather(rollout)]
        mixed = self._mixed(pool[0])
        unit = world // math.gcd(world, size)  # every rank gets equally many rows
        while (have := int(mixed.sum())) < most and len(pool) < self.most_rounds:
            share = max(have, 1) / len(mixed)
            rows = self._rows(min(prompts_to_draw(most - have, share, unit), most), unit, used)
            if not rows:
                break
            pool.append(self._gather(draw(rows)))
            mixed = torch.cat([mixed, self._mixed(pool[-1])])
        share = max(have, 1) / len(mixed)
        self.share = share if self.share is None else self.share + NEWEST * (share - self.share)
        everything = concat_rows(pool)
        order = torch.argsort((~mixed).int(), stable=True)[:most]
        index = (order.unsqueeze(1) * size + torch.arange(size, device=order.device)).flatten()
        index = index[rank * len(inputs) :][: len(inputs)]
        if have < most and not self._said:
            self._said = True
            why = "max_num_gen_batches" if len(pool) == self.most_rounds else "all prompts were drawn"
            LOG.warning(
                f"dynamic sampling ended after {len(pool)} rounds ({why}) with {have} of {most} groups to learn "
                "from: the others have equal verdicts and are dropped. Said once; see dynamic_sampling/kept"
            )
        metrics: dict[str, float] = {}
        metrics["dynamic_sampling/rounds"] = len(pool)
        metrics["dynamic_sampling/drawn"] = len(mixed) / most
        metrics["dynamic_sampling/kept"] = min(have, most) / most
        return {**rollout, **{name: x[index] for name, x in everything.items()}}, metrics

    def _rows(self, prompts: int, unit: int, used: Counter[str]) -> list[dict[str, Any]]:
        """This rank's rows of so many fresh prompts, or of the whole units of them that are left."""
        taken = self.prompts.take(prompts, used, self._stage)
        taken = taken[: len(taken) // unit * unit]
        rows = [dict(row) for row in taken for _ in range(self.group_size)]
        share = len(rows) // self.accelerator.num_processes
        return rows[self.accelerator.process_index * share :][:share]

    def _gather(self, rollout: dict[str, Any]) -> TensorDict:
        rows = len(rollout["verdict"])
        tensors = {k: v for k, v in rollout.items() if isinstance(v, Tensor) and v.ndim and len(v) == rows}
        return gather_rows(self.accelerator, tensors)

    def _mixed(self, tensors: TensorDict) -> Tensor:
        """Groups to learn from: their scored verdicts differ, and some response has a token left."""
        verdict = tensors["verdict"]
        group = torch.arange(len(verdict), device=verdict.device) // self.group_size
        mixed = mixed_groups(verdict, group, ~verdict.isnan()) & tensors["completion_mask"].any(1)
        return mixed.view(-1, self.group_size).any(1)
