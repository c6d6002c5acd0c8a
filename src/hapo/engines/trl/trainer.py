"""`HAPOTrainer`: TRL's GRPO trainer with the advantage, loss, scoring and sampling of a `Method`.

What is overridden, and nothing else: generation of one turn (the temperature rule, and the log-probs of what was
sampled), scoring (hapo.scoring), rewards (kept for the method), the rollout batch (dynamic sampling, prepare),
the loss, the sampler's order (resume), checkpoints (statistics, rollout in progress) and the run records.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer

import hapo

from ...method import Method
from ...parts.shaping import soft_overlong_punishment
from ...samplers.transformers import sampling
from ...scoring import attach_scoring, score_tokens
from ..records import check_writable
from . import vllm
from .card import model_card
from .checkpoint import check_checkpoint, load_state, save_state
from .config import HAPOConfig, check_arguments, resolve_method
from .drawn import DrawnScores
from .metrics import MetricLog
from .passes import of_inputs
from .recorder import Recorder
from .rollout import DynamicSampling, EpochSampler, begin_step, gather_rows

PREPARED = ("mask", "advantage", "signal", "weight", "keep")
"""What Method.prepare makes of a rollout batch, kept with its rows as hapo_mask, ..."""


class HAPOTrainer(GRPOTrainer):
    """A drop-in for `trl.GRPOTrainer` that trains with any `hapo.Method`.

    ```python
    from hapo.trl import HAPOConfig, HAPOTrainer
    trainer = HAPOTrainer(model, reward_funcs, args=HAPOConfig("out", method="hapo"), train_dataset=data)
    ```

    Entropies and log-probs of the rollout policy are taken in one pass at T_base; group means, statistics and
    token counts over the whole rollout batch on all ranks, frozen. Each optimiser step is normalised by its
    exact token count, so the gradient does not depend on the micro-batch size, the accumulation or the ranks.

    Args:
        method: a `Method` object, in the place of `args.method` and `args.method_options`.
        model, reward_funcs, args, ...: as in `GRPOTrainer`; `args` is a `HAPOConfig`.

    Raises:
        ValueError: the method cannot honour an option (HAPOConfig), or `resume_from_checkpoint` names a
            checkpoint of another method, or an incomplete one.
        FileExistsError: `args.run_records` and the output folder holds another run.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: HAPOConfig | None = None,
        *trl_args: Any,
        method: Method | None = None,
        **trl_kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = HAPOConfig(f"{str(name).split('/')[-1] or 'model'}-HAPO")
        if not isinstance(args, HAPOConfig):
            raise TypeError(
                f"args must be a HAPOConfig, got {type(args).__name__}; from hapo.trl import HAPOConfig"
            )
        args = copy.copy(args)  # the caller's stays as it is
        self.method = resolve_method(method, args)
        check_arguments(self.method, args, model, trl_kwargs)
        if args.run_records:
            check_writable(Path(args.output_dir))
        self._tag_names = ["trl", "hapo"]
        self.temperature_stats: hapo.EntropyStats | None = None
        self._sampled_with: hapo.EntropyStats | None = None
        self._rewards_per_func: Tensor | None = None
        self._rollout_scores: list[Tensor] | None = None
        self._scores_rollout = False
        self._drawn = DrawnScores(self)
        self._step_metrics = MetricLog(self)
        self.clock = self._step_metrics.clock
        """Seconds by phase; pause it around what is no training."""
        self._records: Recorder | None = None
        self.recipe: dict[str, Any] = {}
        """What beside `args` the run was told (model, task); written to config.yaml."""
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self.use_vllm:
            vllm.attach(self)
        attach_scoring(self.model)
        if self.ref_model is not None:
            attach_scoring(self.accelerator.unwrap_model(self.ref_model))
        prompts = args.generation_batch_size // args.num_generations
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) < prompts:
            raise ValueError(
                f"{len(self.train_dataset)} training prompts do not fill one rollout batch of {prompts} "
                f"({args.generation_batch_size} responses, {args.num_generations} a prompt): lower "
                "steps_per_generation or per_device_train_batch_size, or raise num_generations"
            )
        self._dynamic = None
        if self.method.filter_groups and args.max_num_gen_batches > 1:
            self._dynamic = DynamicSampling(self)

    # -- sampling -------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.model.training:
            self._sampled_with = self.temperature_stats  # None at the first step
        with self.clock.phase("generate"):
            return self._turn(prompt_ids, *args, **kwargs)

    def _turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.use_vllm:
            if args and args[0] is not None:
                vllm.check_images(self)
            vllm.send_rule(self, self._sampled_with if self.model.training else None)
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if not self.model.training:
            turn = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            self.model.eval()  # TRL leaves it in training mode after continuous batching
            return turn
        with sampling(self.accelerator.unwrap_model(self.model), self._temperature_factor()) as record:
            completion_ids, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._drawn.add(record.draws)
        return completion_ids, record.logps(completion_ids)

    def _temperature_factor(self) -> Callable[[Tensor], Tensor] | None:
        """The rule with the last rollout's statistics; None at the first step."""
        factor, stats = self.method.temperature_rule, self._sampled_with
        if factor is None or stats is None:
            return None
        return lambda entropy: factor(entropy, stats)

    # -- scoring --------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if compute_aux_loss or any(v is not None for v in multimodal.values()):
            # Images and router losses: TRL's own pass, which computes the same two quantities.
            logps, entropies, aux = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy=model is not self.ref_model,  # TRL's head on the reference has none
                compute_aux_loss=compute_aux_loss,
                **multimodal,
            )
        else:
            aux = None
            response = attention_mask[:, -logits_to_keep:].bool()
            score = partial(self._text_scores, model, input_ids, attention_mask, response, batch_size)
            # The first scores that a rollout asks for are those of the policy that drew it.
            of_rollout = self._rollout_scores == [] and self._scores_rollout
            drawn_ids = input_ids[:, -logits_to_keep:]
            logps, entropies = self._drawn.scores(drawn_ids, response, score) if of_rollout else score()
        if self._rollout_scores is not None and entropies is not None:
            self._rollout_scores.append(entropies.detach())
        return logps, entropies, aux

    def _text_scores(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, response: Tensor, batch_size: int | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (B,T) of the response tokens, `batch_size` rows at a time."""
        size = batch_size or len(input_ids)
        parts = []
        for ids, attention, mask in zip(
            *(x.split(size) for x in (input_ids, attention_mask, response)), strict=True
        ):
            with self.accelerator.autocast():
                parts.append(score_tokens(model, ids, attention, mask, t_base=self.temperature))
        return torch.cat([p.logp for p in parts]), torch.cat([p.entropy for p in parts])

    # -- rollout --------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any) -> Tensor:
        with self.clock.phase("reward"):
            self._rewards_per_func = super()._calculate_rewards(*args)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.rollout() if self.model.training else self.clock.pause():
            if self._dynamic is not None and self.model.training:
                rollout = self._dynamic.rollout(inputs)
            else:
                rollout = self._rollout(inputs)
            rollout = self._prepare(rollout)
        if self.model.training:
            self._step_metrics.add_times()
        return rollout

    def _rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout of these prompts, with rollout entropies and the verdict of each response."""
        updates = self.args.steps_per_generation * self.num_iterations
        # TRL scores the old policy first, unless it takes the ratio for 1.
        self._scores_rollout = self.use_vllm or self.args.gradient_accumulation_steps % updates != 0
        self._rollout_scores = []
        self._drawn.begin()
        output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in output:
            output["old_entropies"] = self._rollout_scores[0]
        else:
            with torch.no_grad():
                logps, entropies = self._drawn.scores(
                    output["completion_ids"],
                    output["completion_mask"].bool(),
                    lambda: self._score(self.model, output, self._micro_batch)[:2],
                )
            output["old_per_token_logps"], output["old_entropies"] = logps, entropies
        self._rollout_scores = None
        per_func = self._rewards_per_func
        assert per_func is not None
        verdict = (per_func * self.reward_weights.to(per_func.device)).nansum(1)
        verdict[per_func.isnan().all(1)] = torch.nan
        rows = len(inputs)
        output["verdict"] = verdict[self.accelerator.process_index * rows :][:rows]
        return output

    def _score(self, model: Any, inputs: dict[str, Any], batch_size: int | None = None) -> Any:
        """Scores of the completions in `inputs`, with whatever images and tiles belong to them."""
        names = (
            "pixel_values",
            "image_grid_thw",
            "num_images",
            "pixel_attention_mask",
            "spatial_shapes",
            "num_tiles",
            "image_sizes",
            "token_type_ids",
            "mm_token_type_ids",
            "image_position_ids",
        )
        multimodal = {name: inputs[name] for name in names if inputs.get(name) is not None}
        aux_loss = self.aux_loss_enabled and torch.is_grad_enabled()
        completion = inputs["completion_ids"]
        ids = torch.cat([inputs["prompt_ids"], completion], 1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        if not multimodal and not aux_loss:
            needed = inputs.get("hapo_needed", inputs["completion_mask"].bool())
            return *self._text_scores(model, ids, attention, needed, batch_size), None
        return self._get_per_token_logps_and_entropies(
            model,
            ids,
            attention,
            completion.shape[1],
            batch_size,
            compute_entropy=True,
            compute_aux_loss=aux_loss,
            **multimodal,
        )

    @property
    def _micro_batch(self) -> int:
        train = self.model.training
        return self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size

    def scored_tokens(self, rollout: dict[str, Any]) -> Tensor:
        """Valid response tokens (B,T) of what a reward function could score; other responses are in no count."""
        mask = rollout["completion_mask"]
        mask = (mask if "tool_mask" not in rollout else mask * rollout["tool_mask"]).bool()
        return mask & ~rollout["verdict"].isnan().unsqueeze(1)

    def _prepare(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """Method.prepare over the rollout batch of all ranks; this rank keeps its rows."""
        train = self.model.training
        mask = self.scored_tokens(rollout)
        local: dict[str, Any] = {
            "mask": mask,
            "old_logp": rollout["old_per_token_logps"],
            "old_entropy": rollout["old_entropies"],
            "verdict": rollout["verdict"],
        }
        if "ref_per_token_logps" in rollout:
            local["ref_logp"] = rollout["ref_per_token_logps"]
        if "sampling_per_token_logps" in rollout:
            # Where vLLM has no log-prob for a token, it counts as drawn from the old policy.
            sampler = rollout["sampling_per_token_logps"]
            local["sampler_logp"] = torch.where(sampler.isnan(), local["old_logp"], sampler)
        everyone: dict[str, Any] = gather_rows(self.accelerator, local)
        n = self.num_generations if train else self.num_generations_eval
        reward = everyone["verdict"]
        if self.args.overlong_buffer:
            length = everyone["mask"].sum(1)
            reward = reward + soft_overlong_punishment(
                length, self.max_completion_length, self.args.overlong_buffer, self.args.overlong_factor
            )
        group = torch.arange(len(reward), device=reward.device) // n
        batch = self.method.prepare(hapo.TokenBatch(reward=reward, group=group, **everyone))
        rows = slice(self.accelerator.process_index * len(mask), (self.accelerator.process_index + 1) * len(mask))
        width = mask.shape[1]
        for name in PREPARED:
            x = getattr(batch, name)
            if x is not None:
                rollout[f"hapo_{name}"] = x[rows, :width]
        rollout["hapo_reward"], rollout["hapo_group"] = reward[rows], group[rows]
        rollout["hapo_response"] = torch.arange(len(reward), device=reward.device)[rows]
        # All that count: where some have no tokens, and so no record, the records are not whole.
        rollout["hapo_responses"] = batch.scored.sum()
        rollout["advantages"] = rollout["hapo_advantage"]
        if train:
            self._step_metrics.add_rollout(batch, everyone["mask"])
            if batch.stats is not None:  # a rollout of which every group was dropped leaves the former ones
                self.temperature_stats = batch.stats
        else:  # one step, of the policy that drew it
            step = self.method.step(batch.replace(logp=batch.old_logp, entropy=batch.old_entropy))
            rollout["hapo_totals"], rollout["hapo_stats"] = step.totals, step.stats
            for name in ("signal", "keep"):
                x = getattr(step, name)
                if x is not None:
                    rollout[f"hapo_{name}"] = x[rows, :width]
        return rollout

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            first, per_step = self._step % self.args.steps_per_generation, self.args.gradient_accumulation_steps
            if first % per_step == 0:
                begin_step(self, self._buffered_inputs[first : first + per_step])
        return inputs

    # -- loss -----------------------------------------------------------------------------------------------

    def _batch(self, inputs: dict[str, Any], logp: Tensor | None, entropy: Tensor | None) -> hapo.TokenBatch:
        """A micro-batch as the core reads it, with the current policy's scores."""
        made: dict[str, Any] = {name: inputs.get(f"hapo_{name}") for name in (*PREPARED, "totals")}
        return hapo.TokenBatch(
            **made,
            logp=logp,
            entropy=entropy,
            old_logp=inputs["old_per_token_logps"],
            old_entropy=inputs["old_entropies"],
            ref_logp=inputs.get("ref_per_token_logps"),
            sampler_logp=inputs.get("sampling_per_token_logps"),
            reward=inputs["hapo_reward"],
            verdict=inputs["verdict"],
            group=inputs["hapo_group"],
            stats=inputs.get("hapo_stats", self.temperature_stats),
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The micro-batch's share of the step's loss; all of its passes but the last have gone backward."""
        train = self.model.training
        recorded = self._records is not None and train and self._records.takes_tokens()
        # Tokens of dropped groups count nowhere, but records show them.
        mask = self.scored_tokens(inputs) if recorded else inputs["hapo_mask"]
        *earlier, last = of_inputs(self, {**inputs, "hapo_needed": mask}, mask)
        before = torch.zeros((), device=mask.device)
        for part in earlier:
            with self.accelerator.no_sync(model) if train else nullcontext():
                loss = self._pass_loss(model, part, recorded)
                if train:
                    with torch.autocast(mask.device.type, enabled=False):
                        self.accelerator.backward(loss)
            before += loss.detach()
        loss = self._pass_loss(model, last, recorded) + before
        if not train or self.accelerator.gradient_state.sync_gradients:
            self._step_metrics.flush()
            if recorded:
                assert self._records is not None
                self._records.write_tokens()
        return loss

    def _pass_loss(self, model: Any, inputs: dict[str, Any], recorded: bool) -> Tensor:
        logps, entropies, aux_loss = self._score(model, inputs)
        batch = self._batch(inputs, logps, entropies.detach())
        out = self.method.loss(batch)
        self._step_metrics.add(out, batch)
        if recorded:
            assert self._records is not None
            self._records.add_tokens(inputs, batch, out)
        # Data-parallel engines average gradients over ranks; the totals already count all of them.
        loss = out.loss * self.accelerator.num_processes
        if aux_loss is not None:
            windows = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / windows
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return loss

    # -- order, checkpoints, records ------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        template = super()._get_train_sampler(dataset)
        return EpochSampler(
            data_source=template.data_source,
            mini_repeat_count=template.mini_repeat_count,
            batch_size=template.batch_size,
            repeat_count=template.repeat_count,
            shuffle=template.shuffle,
            seed=template.seed,
            trainer_state=lambda: self.state,
        )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """As in TRL. A checkpoint is checked before any work; the run folder is opened for records."""
        checkpoint = check_checkpoint(self, resume_from_checkpoint)
        if self.args.run_records:
            self._records = Recorder(self, checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL; the line goes to metrics.jsonl too."""
        super().log(logs, start_time)
        if self._records is not None:
            self._records.records.add_metrics(self.state.log_history[-1])

    def create_model_card(
        self, model_name: Any = None, dataset_name: Any = None, tags: Any = None, weights: str | None = None
    ) -> None:
        """Write the card of the model as it is now to README.md of the output folder; each checkpoint does.

        Args:
            model_name, dataset_name, tags: TRL's, not read: the card knows them from the run.
            weights: folder of the weights, seen from the output folder; the repository on the Hub, if the model
                goes to one, or else the checkpoint of this step.
        """
        if not self.is_world_process_zero():
            return
        folder, checkpoints = Path(self.args.output_dir), Path(self._get_output_dir(None))
        last = checkpoints.relative_to(folder) / f"checkpoint-{self.state.global_step}"
        model_card(self, self.hub_model_id or weights or last.as_posix()).save(folder / "README.md")

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / "checkpoints") if self.args.run_records else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        save_state(self, folder / f"checkpoint-{self.state.global_step}")
        if self.args.should_save:  # older ones go only now that this one is complete
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), limit, best_model_checkpoint=best, use_mtime=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self, Path(checkpoint))
