"""`AsyncHAPOTrainer`: TRL's asynchronous trainer with the advantage, loss and temperature of a `Method`.

What is overridden, and nothing else: the data loader (whole groups), the beginning of an optimiser step (prepare),
the loss, checkpoints and log lines. The rollout worker is TRL's, with `VersionedLoop` in its process.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import (
    DataCollatorForRollout,
    RolloutQueueDataset,
    _EmptyIterableDataset,
)
from trl.models.utils import disable_gradient_checkpointing

import hapo

from ....method import Method
from ....samplers.rule import HARMLESS, PREFIX, rule_of
from ...metrics import rollout_metrics
from ...records import check_writable
from .. import finite
from ..auxiliary import router_losses, total
from ..checkpoint import OnceAtBegin, RunState
from ..metrics import MetricLog
from ..passes import CPU_TOKENS, DEVICE_TOKENS
from ..recorded import Recorded, length
from ..recorder import open_records
from ..scorer import Scored
from .config import AsyncHAPOConfig, check_arguments, resolve_method
from .cpu import no_gpu_asked, take_plain_attention
from .records import AsyncRecorder
from .rows import Inputs, Step, Terms, make_step, score_row
from .steps import Collator, SeenQueue, WholeGroups
from .weights import LabelledTransfer, ask
from .worker import VersionedLoop


class AsyncHAPOTrainer(Recorded, AsyncGRPOTrainer):
    """A drop-in for `trl.experimental.async_grpo.AsyncGRPOTrainer` that trains with any `hapo.Method`.

    ```python
    from hapo.trl import AsyncHAPOConfig, AsyncHAPOTrainer
    args = AsyncHAPOConfig("out", method="gspo", per_device_train_batch_size=16, num_generations=8)
    AsyncHAPOTrainer("my/model", reward_funcs=reward, args=args, train_dataset=data).train()
    ```

    Generation, rewards, the queue, weight sync and packing are TRL's. An optimiser step holds whole groups:
    `Method.prepare` takes advantages, statistics and totals over all of it, on all ranks, so that the loss depends
    neither on the accumulation nor on the packing.

    Without a GPU, attention over TRL's packed rows is plain torch; weights then reach a server by
    `DiskWeightTransfer`.

    Args:
        model, reward_funcs, args, ...: as in `AsyncGRPOTrainer`; `args` is an `AsyncHAPOConfig`.
        method: a `Method` object, in the place of `args.method` and `args.method_options`.

    Raises:
        ValueError: the trainer cannot honour an option, an argument or the method; or `resume_from_checkpoint`
            names a checkpoint of another method or schedule.
        FileExistsError: `args.run_records` and the output folder holds another run.
    """

    args: AsyncHAPOConfig
    method: Method
    weight_transfer: Any
    rollout_worker: Any
    _records: AsyncRecorder | None = None

    def __init__(
        self,
        model: str,
        reward_funcs: Any = None,
        args: AsyncHAPOConfig | None = None,
        *trl_args: Any,
        method: Method | None = None,
        **trl_kwargs: Any,
    ) -> None:
        if args is None:
            args = AsyncHAPOConfig(f"{model.split('/')[-1]}-AsyncHAPO")
        if not isinstance(args, AsyncHAPOConfig):
            raise TypeError(
                f"args must be an AsyncHAPOConfig, got {type(args).__name__}; from hapo.trl import AsyncHAPOConfig"
            )
        self.method = resolve_method(method, args)
        names = list(inspect.signature(super().__init__).parameters)[3:]  # after model, rewards and config
        given = dict(zip(names, trl_args, strict=False)) | trl_kwargs
        check_arguments(self.method, args, given)
        if args.run_records:
            check_writable(Path(args.output_dir))
        self._tag_names = ["trl", "hapo"]
        self.recipe = {}
        self.temperature_stats: hapo.EntropyStats | None = None
        with no_gpu_asked():
            super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self._is_vlm:
            raise ValueError(
                f"{model} reads images, and rollouts of images were not run: train it with HAPOTrainer"
            )
        if self.accelerator.device.type != "cuda":
            take_plain_attention(self.accelerator.unwrap_model(self.model))
        self._step_metrics = MetricLog(self.accelerator, self._log_value)
        self._at_work: Step | None = None
        self._rule_file: Path | None = None
        if given.get("rollout_worker") is None and self.accelerator.is_main_process:
            self._tell_worker()

    def _tell_worker(self) -> None:
        """Have TRL's own worker tell versions and send rules; label the weights that the server gets."""
        worker = self.rollout_worker
        worker._loop_cls = VersionedLoop
        if self.method.temperature_rule is not None:
            self._rules = tempfile.TemporaryDirectory()
            self._rule_file = Path(self._rules.name) / "rule.json"
            worker._loop_kwargs["rule_file"] = str(self._rule_file)
        if self.weight_transfer is not None:  # adapters carry their version in their name

            def found(labelled: bool) -> None:
                worker._loop_kwargs["labelled"] = labelled
                self._check_server()

            url = self.args.vllm_server_base_url
            self.weight_transfer = LabelledTransfer(
                self.weight_transfer, url, lambda: self.model_version + 1, found
            )
        else:
            self._check_server()

    def _check_server(self) -> None:
        """The server returns log-probs of what it draws from, and applies the method's rule."""
        url = self.vllm_client.server_url
        # Of the one token that top_k=1 leaves, which is drawn with probability 1, whatever the policy says of it.
        forced = {"prompt": [1, 2, 3], "max_tokens": 1, "temperature": 1.0, "top_k": 1, "logprobs": 0}
        (choice,) = ask(url, "/v1/completions", forced).json()["choices"]
        if choice["logprobs"]["token_logprobs"][0] < -1e-4:
            raise ValueError(
                "the vLLM server returns log-probs of another distribution than the one that drew the tokens: "
                "start it with --logprobs-mode processed_logprobs"
            )
        if self._rule_file is None:
            return
        request = {"prompt": [0], "max_tokens": 1, "vllm_xargs": {f"{PREFIX}tau": 2.0}}
        try:
            ask(url, "/v1/completions", request)
        except RuntimeError as error:
            if "tau must be" not in str(error):
                raise
        else:
            raise RuntimeError(
                "the vLLM server takes a temperature that cannot be without a word, so it has no adaptive "
                "temperature: install hapo beside its vLLM"
            )
        ask(url, "/v1/completions", request | {"vllm_xargs": HARMLESS.to_args()})

    # -- data -----------------------------------------------------------------------------------------------

    @property
    def _budget(self) -> int:
        """Tokens of a pass; 0: no limit."""
        if "split" in self.method.breaks:
            return 0
        if self.args.token_budget is None:
            return CPU_TOKENS if self.accelerator.device.type == "cpu" else DEVICE_TOKENS
        return max(self.args.token_budget, 0)

    def get_train_dataloader(self) -> DataLoader:
        """As in TRL, of whole groups."""
        ranks, args = self.accelerator.num_processes, self.args
        dataset: Any = _EmptyIterableDataset()
        if self.accelerator.is_main_process:
            seen = SeenQueue(self.rollout_queue)
            self._rollout_dataset = RolloutQueueDataset(
                rollout_queue=seen,
                model_version_fn=lambda: self.model_version,
                check_health_fn=self.rollout_worker.check_health,
                stale_after_s=args.heartbeat_stale_after_s,
                metrics=self._metrics["train"],
                max_staleness=args.max_staleness,
                report_to=args.report_to,
            )
            dataset = WholeGroups(
                self._rollout_dataset,
                seen,
                group_size=args.num_generations,
                groups=args.groups_per_step(ranks),
                micro_batches=args.gradient_accumulation_steps,
                ranks=ranks,
                budget=self._budget,
            )
        # Groups count as trained when their step begins, not when they are collated, which is a micro-batch
        # earlier.
        collator = DataCollatorForRollout(
            self.processing_class.pad_token_id, metrics=self._metrics["train"], token_budget=self._budget
        )
        self._collator = Collator(collator, ranks)
        return self.accelerator.prepare(
            DataLoader(dataset, batch_size=1, collate_fn=self._collator, num_workers=0)
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The micro-batches of an optimiser step, prepared."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._begin_step(batches)
        return batches, None

    def _begin_step(self, micro_batches: list[Inputs]) -> None:
        number = self.state.global_step + 1
        recorded = self._records is not None and self._records.takes(number)

        def score(inputs: Inputs, row: int) -> Scored:
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                return self._score(self.model, inputs, row)

        assert self.args.old_policy is not None
        step = make_step(
            self.method,
            micro_batches,
            self.accelerator,
            score,
            old_policy=self.args.old_policy,
            score_first=recorded,
        )
        self._at_work = step
        newest = broadcast(torch.tensor(self.model_version, device=self.accelerator.device))
        stale = newest - step.everyone["version"]
        for i, (inputs, rows) in enumerate(zip(micro_batches, step.rows, strict=True)):
            inputs |= {"hapo_batch": step.batch.rows(rows), "hapo_stale": stale[rows], "hapo_micro_batch": i}
        if self._records is not None:
            self._records.responses = int(step.batch.scored.sum())
        self._trained_groups.update(step.everyone["group"].tolist())
        self._log_step(step, stale)
        if step.batch.stats is not None:
            self._take_stats(step.batch.stats)

    def _take_stats(self, stats: hapo.EntropyStats) -> None:
        """Statistics for the temperature of the requests that are made from now on."""
        self.temperature_stats = stats
        rule = rule_of(self.method, stats)
        if self._rule_file is not None and rule is not None:
            rule.save(self._rule_file)

    def _log_step(self, step: Step, stale: Tensor) -> None:
        mask = step.everyone["mask"]
        self._log_value("reward", step.everyone["reward"].nanmean().item())
        for i, name in enumerate(self._collator.names):  # known to the main process, whose log it is
            self._log_value(name, step.everyone["rewards"][:, i].nanmean().item())
        valid = mask & step.batch.scored.unsqueeze(1)
        for name, value in rollout_metrics(step.batch, valid, None, None, self.temperature).items():
            self._log_value(name, value)
        if mask.any():
            self._log_value("staleness/token_mean", stale[mask].float().mean().item())
            self._log_value("staleness/token_max", float(stale[mask].max()))
            split = (stale != stale.masked_fill(~mask, -1).amax(1, keepdim=True)) & mask
            self._log_value("staleness/split_responses", split.any(1).float().mean().item())

    def _log_value(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    # -- loss -----------------------------------------------------------------------------------------------

    def _score(self, model: nn.Module, inputs: Inputs, row: int) -> Scored:
        began = time.time()
        with self.accelerator.autocast():
            scored = score_row(model, inputs, row, router_loss=self.aux_loss_enabled and torch.is_grad_enabled())
        self._step_forward_s += time.time() - began
        return scored

    def compute_loss(
        self, model: nn.Module, inputs: Inputs, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The micro-batch's share of the step's loss; all of its passes but the last have gone backward."""
        *earlier, last = range(len(inputs["input_ids"]))
        before = torch.zeros((), device=inputs["input_ids"].device)
        for row in earlier:
            with self.accelerator.no_sync(model):
                loss = self._pass_loss(model, inputs, row)
                self.accelerator.backward(loss)
            before += loss.detach()
        loss = self._pass_loss(model, inputs, last) + before
        finite.check("loss", loss.detach(), self.state.global_step + 1)
        self._count(inputs)
        if self.accelerator.gradient_state.sync_gradients:
            self._step_metrics.flush()
            if self._records is not None:
                self._records.records.write_tokens(self.state.global_step + 1)
        return loss

    def _pass_loss(self, model: nn.Module, inputs: Inputs, row: int) -> Tensor:
        """Of the responses of one packed row."""
        scored, terms = self._score(model, inputs, row), Terms.of(inputs, row)
        assert scored.entropy is not None
        whole: hapo.TokenBatch = inputs["hapo_batch"]
        shape = (len(whole.mask), whole.mask.shape[1])
        here = terms.spread(torch.ones_like(terms.place), shape).bool()
        logp, entropy = (terms.spread(x.float(), shape) for x in (scored.logp, scored.entropy))
        rows = here.any(1).nonzero().squeeze(1)
        if not len(rows):  # a row of context alone: its loss is 0, and still connected to the model
            rows = torch.zeros(1, dtype=torch.long, device=here.device)
        batch = whole.replace(mask=whole.mask & here, logp=logp, entropy=entropy).rows(rows)
        out = self.method.loss(batch)
        ranks = self.accelerator.num_processes
        passes = self.current_gradient_accumulation_steps * ranks * len(inputs["input_ids"])
        auxiliary = router_losses(scored.router_loss, self.router_aux_loss_coef, passes)
        self._step_metrics.add(out, batch, auxiliary)
        step = self.state.global_step + 1
        if self._records is not None and self._records.takes(step) and here.any():
            self._records.add(step, inputs, row, rows, batch, out, here[rows], inputs["hapo_stale"][rows])
        return total(out.loss, auxiliary, ranks)

    def _count(self, inputs: Inputs) -> None:
        """What TRL adds up over the micro-batches of a step."""
        tokens, each = float(inputs["global_n_forward_tokens"][0]), float(inputs["mean_seq_len"][0])
        self._step_forward_tokens += tokens
        self._step_trained_tokens += float(inputs["global_n_tokens"][0])
        self._step_seq_len_weighted += each * tokens
        self._step_samples += tokens / each

    # -- records and checkpoints ----------------------------------------------------------------------------

    def _open_records(self, checkpoint: str | None) -> None:
        net = self.accelerator.unwrap_model(self.model)
        self._run_folder = open_records(self.args, self.method, self.recipe, net, self.train_dataset, checkpoint)
        tempered = self.method.temperature_rule is not None
        decode = self.processing_class.batch_decode
        self._records = AsyncRecorder(self._run_folder, self.args, tempered, decode)

    def _card(self) -> tuple[dict[str, Any], dict[str, Any]]:
        data = {"training prompts": length(self.train_dataset)}
        return data, {"ratios against": self.args.old_policy, "most staleness": self.args.max_staleness}

    def _layout(self) -> dict[str, Any]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "old_policy")
        return {"processes": self.accelerator.num_processes, **{n: getattr(self.args, n) for n in names}}

    def _run_state(self) -> RunState:
        return RunState(metrics={}, loss=self._loss_sums(), stats=self.temperature_stats)

    def _take_up(self, state: RunState) -> None:
        if state.stats is not None:
            self._take_stats(state.stats)
        self.add_callback(OnceAtBegin(partial(self._restore_loss, state.loss)))
