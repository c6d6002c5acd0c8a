"""`HAPOTrainer`: TRL's GRPO trainer with the advantage, loss, scoring and sampling of a `Method`.

What is overridden, and nothing else: generation of one turn (the temperature rule, and the log-probs of what was
sampled), scoring (hapo.scoring), rewards (kept for the method), the rollout batch (dynamic sampling, prepare),
the loss, the sampler's order (resume), checkpoints (statistics, rollout in progress) and the run records. The work
is done by the other files of this folder, which are handed what they use.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing

import hapo

from ...method import Method
from ...parts.shaping import soft_overlong_punishment
from ...samplers.decoding import Draws
from ...samplers.transformers import say_what_model_asked
from ...scoring import attach_scoring
from ..metrics import rollout_metrics, sampler_gap
from ..records import check_writable
from . import finite, passes, vllm
from .arguments import check_arguments, resolve_method
from .auxiliary import AuxiliaryLoss, router_losses, total
from .checkpoint import OnceAtBegin, RunState
from .config import HAPOConfig
from .demonstrations import Demonstrations, Encoder, check_given, demonstrations_of
from .drawn import DrawnScores
from .entropy_term import EntropyTerm
from .episodes import EPISODE_TURNS, turn_numbers
from .gates import gate_losses
from .metrics import MetricLog, PhaseClock, times
from .recorded import RecordedTrainer
from .recorder import Recorder
from .rollout import DynamicSampling, check_prompts
from .rows import RolloutRows, prepare_rows, scored_tokens, step_rows, valid_tokens, whole_groups
from .sampler import Request, Sampler, VLLMSampler
from .scorer import Scored, Scorer, Sequences, is_reference
from .stages import Stages
from .support import RolloutSupport, before_model, decide, of_model
from .token_rewards import TokenRewards

LOG = logging.getLogger(__name__)

LEAST_WEIGHT = 0.5
"""Mean importance weight of the sampler below which a word is due."""


class HAPOTrainer(RecordedTrainer):
    """A drop-in for `trl.GRPOTrainer` that trains with any `hapo.Method`.

    ```python
    from hapo.trl import HAPOConfig, HAPOTrainer
    trainer = HAPOTrainer(model, reward_funcs, args=HAPOConfig("out", method="hapo"), train_dataset=data)
    ```

    Entropies and log-probs of the rollout policy are taken in one pass at T_base; group means, statistics and
    token counts over the whole rollout batch on all ranks, frozen. Each optimiser step is normalised by its
    exact token count, so the gradient does not depend on the micro-batch size, the accumulation or the ranks.

    A subclass may override three methods: `make_scorer` (what gives log-probs and entropies), `make_sampler` (what
    draws the responses) and `auxiliary_losses` (what is added to the method's loss).

    Args:
        method: a `Method` object, in the place of `args.method` and `args.method_options`.
        optimizer_cls_and_kwargs: class and options of an optimiser, in the place of `args.optim`; an argument of
            transformers' `Trainer` that `GRPOTrainer` does not hand on.
        demonstrations: a data set with `prompt` and `completion`, or `messages`, that is learnt from beside the
            rollouts: L = (1 - mu) L_RL + mu L_E, as the options `demonstration_*` of `args` say.
        model, reward_funcs, args, ...: as in `GRPOTrainer`; `args` is a `HAPOConfig`. A reward function may return
            a list for a completion, a number for each of its tokens.

    Raises:
        ValueError: the method cannot honour an option (HAPOConfig), or `resume_from_checkpoint` names a
            checkpoint of another method, or an incomplete one.
        FileExistsError: `args.run_records` and the output folder holds another run.
    """

    _buffered_inputs: Any
    """TRL's: the micro-batches of the rollout batch."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: HAPOConfig | None = None,
        *trl_args: Any,
        method: Method | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        demonstrations: Any = None,
        **trl_kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = HAPOConfig(f"{str(name).split('/')[-1] or 'model'}-HAPO")
        if not isinstance(args, HAPOConfig):
            raise TypeError(
                f"args must be a HAPOConfig, got {type(args).__name__}; from hapo.trl import HAPOConfig"
            )
        args = args.filled_in()  # a copy: the caller's stays as it is
        self.method = resolve_method(method, args)
        names = list(inspect.signature(super().__init__).parameters)[3:]  # after model, rewards and config
        given = dict(zip(names, trl_args, strict=False)) | trl_kwargs
        check_arguments(self.method, args, model, given)
        check_given(demonstrations, args)
        self._support_asked, rollout = args.sampling_support, given.get("rollout_func")
        samples = rollout is not None and not getattr(rollout, "draws_with_trainer", False)
        args.sampling_support = decide(
            self._support_asked, args, (*before_model(args, samples), *vllm.against_engine(args))
        )
        if args.run_records:
            check_writable(Path(args.output_dir))
        self._tag_names = ["trl", "hapo"]
        self.temperature_stats: hapo.EntropyStats | None = None
        self._sampled_with: hapo.EntropyStats | None = None
        self._rewards_per_func: Tensor | None = None
        self._turns: list[Draws | None] = []
        self.rollout_rows: list[dict[str, Any]] = []
        """Rows of the data set that the rollout at work is of, one for each response of this process."""
        self._old: Scored | None = None
        self._supports = RolloutSupport()
        self.clock = PhaseClock()
        """Seconds by phase; pause it around what is no training."""
        self.recipe = {}
        with vllm.sampling_masks(bool(args.sampling_support) and args.use_vllm and args.vllm_mode == "colocate"):
            super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        self._token_rewards = TokenRewards(self.accelerator)
        given_rewards: list[Any] = self.reward_funcs  # type: ignore[has-type]
        self.reward_funcs = self._token_rewards.watched(given_rewards, self.reward_func_names)
        if optimizer_cls_and_kwargs is not None:
            if self.optimizer is not None:
                raise ValueError("optimizers and optimizer_cls_and_kwargs are both given: leave one out")
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        attach_scoring(self.model)
        if self.ref_model is not None:
            attach_scoring(self.accelerator.unwrap_model(self.ref_model))
        if said := say_what_model_asked(self.accelerator.unwrap_model(self.model).generation_config):
            warnings.warn(f"{said}; generation_kwargs takes them", stacklevel=2)
        if self.args.sampling_support:
            self.args.sampling_support = decide(self._support_asked, args, self._against_support())
        self.scorer = self.make_scorer()
        self.sampler = self.make_sampler()
        self._step_metrics = MetricLog(self.accelerator, self._log_value)
        self._said_far = False
        self._entropy_term = EntropyTerm(args)
        self._sharded = passes.is_sharded(self.accelerator.distributed_type)
        self._demonstrations = None if demonstrations is None else self._make_demonstrations(demonstrations)
        check_prompts(self.train_dataset, args)
        if args.stage_column not in (None, "none"):
            self._stages = Stages(self.train_dataset, args.stage_column)
        self._dynamic: DynamicSampling | None = None
        if self.method.filter_groups and args.max_num_gen_batches > 1:
            self._dynamic = DynamicSampling(self.train_dataset, args, self.accelerator, self._stages)

    # -- what a subclass may override -----------------------------------------------------------------------

    def make_scorer(self) -> Scorer:
        """What gives log-probs and entropies of response tokens; called once, when model and accelerator exist."""
        trl_pass = super()._get_per_token_logps_and_entropies
        drawn = DrawnScores(self.accelerator, trusted=not self.args.score_rollouts)
        return Scorer(self.temperature, self.accelerator.autocast, drawn, trl_pass)

    def make_sampler(self) -> Sampler:
        """What draws the responses; called once, when model and vLLM exist. A `rollout_func` goes before it."""
        if self.use_vllm:
            is_main, support = self.accelerator.is_main_process, bool(self.args.sampling_support)
            log = not self.args.score_rollouts
            return VLLMSampler(self.method, self.vllm_generation, is_main, support, log)
        return Sampler(self.method.temperature_rule, bool(self.args.sampling_support))

    def auxiliary_losses(self, batch: hapo.TokenBatch, scored: Scored) -> list[AuxiliaryLoss]:
        """What is added to the method's loss on some rows of an optimiser step; each is logged under its name.

        A mixture of experts has one, `aux_loss`, with the weight `router_aux_loss_coef`. The entropy term of TRL
        is another, `entropy_term`. So are the gates of a GateRA adapter, `gate_entropy`. Keep them; add others.

        Args:
            batch: the rows as the method's loss reads them; `totals` are of the whole step. Tokens outside `mask`,
                dropped groups among them, are in no count.
            scored: their log-probs and entropies (B,T) with gradients (none in an evaluation).
        """
        micro_batches = self.current_gradient_accumulation_steps if self.model.training else 1
        micro_batches *= self.accelerator.num_processes
        losses = router_losses(scored.router_loss, self.router_aux_loss_coef, micro_batches)
        if self._entropy_term.acts:
            assert scored.entropy is not None
            losses.append(self._entropy_term.share(batch, scored.entropy, train=self.model.training))
        return losses + gate_losses(scored.gates, batch, self.accelerator.unwrap_model(self.model))

    def _make_demonstrations(self, dataset: Any) -> Demonstrations:
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        template = {"chat_template": self.chat_template, "tools": self.tools or None, **self.chat_template_kwargs}
        encode = Encoder(self._tokenizer, getattr(config, "max_position_embeddings", None), **template)
        ranks = self.accelerator.num_processes
        return demonstrations_of(dataset, self.args, encode, ranks=ranks, sharded=self._sharded)

    # -- rollout --------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: Any, images: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        generate = partial(super()._generate_single_turn, prompt_ids, images, *args, **kwargs)
        net, train = self.accelerator.unwrap_model(self.model), self.model.training
        if train:
            self._sampled_with = self.temperature_stats  # None at the first step
        stats = self._sampled_with if train else None
        with self.clock.phase("generate"):
            turn = self.sampler.draw(Request(net, prompt_ids, images, generate, train, stats))
        if not train:
            self.model.eval()  # TRL leaves it in training mode after continuous batching
        self._turns.append(turn.draws)
        return turn.completion_ids, turn.logps

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        # An evaluation of transformers records no draws, and neither does a generate() of the user's own.
        if self.args.sampling_support and found[4] is not None:
            self._supports.take(logps=found[4], own=found[2])
        elif self._support_asked and self.model.training:
            raise ValueError(
                "sampling_support=True, and generation told nothing of its draws: leave generate() as "
                "transformers has it, or set sampling_support=False"
            )
        return found

    def _against_support(self) -> Iterator[str]:
        config, router = self.model.config.get_text_config(), self.aux_loss_enabled
        yield from of_model(self.args, vocabulary=config.vocab_size, images=self._is_vlm, router_loss=router)
        if self.use_vllm:
            yield from vllm.against_server(self.vllm_generation, self.accelerator.is_main_process)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What TRL asks for while it makes a rollout: the policy that drew it, and the reference."""
        images = {name: value for name, value in multimodal.items() if value is not None}
        mask = attention_mask[:, -logits_to_keep:].bool()
        support = self._supports.of(input_ids[:, -logits_to_keep:])
        rows = Sequences(input_ids, attention_mask, mask, images, support)
        if self.beta and is_reference(model, self.accelerator.unwrap_model(model), self.ref_model):
            return self.scorer.reference(model, rows, batch_size)[:3]
        self._old = self.scorer.old(model, rows, batch_size, self._turns)
        return self._old[:3]

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self._token_rewards.begin()
        with self.clock.phase("reward"):
            self._rewards_per_func = super()._calculate_rewards(*args)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        train = self.model.training
        with self.clock.rollout() if train else self.clock.pause():
            if self._dynamic is not None and train:
                rollout, metrics = self._dynamic.rollout(inputs, self._rollout)
                self._log_values(metrics)
            else:
                rollout = self._rollout(inputs)
            self._prepare(rollout)
        if train:
            self._log_values(times(self.clock))
        return rollout

    def _rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout of these prompts, with rollout entropies and the verdict of each response."""
        self._turns, self._old, self.rollout_rows = [], None, inputs
        self._supports = RolloutSupport()
        output = super()._generate_and_score_completions(inputs)
        if (support := self._supports.of(output["completion_ids"])) is not None:
            output["support"] = support
        if self._old is None:  # TRL takes every ratio for 1, and has not asked
            train, args = self.model.training, self.args
            size = args.per_device_train_batch_size if train else args.per_device_eval_batch_size
            self._old = self.scorer.old(self.model, Sequences.of(output), size, self._turns)
        output["old_per_token_logps"], output["old_entropies"] = self._old.logp, self._old.entropy
        self._turns, self._old = [], None
        per_func = self._rewards_per_func
        assert per_func is not None
        verdict = (per_func * self.reward_weights.to(per_func.device)).nansum(1)
        verdict[per_func.isnan().all(1)] = torch.nan
        rows = len(inputs)
        mine = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        output["verdict"], output["rewards_per_func"] = verdict[mine], per_func[mine]
        weights, reads = self.reward_weights.to(per_func.device), self.method.credit is not None
        per_token = self._token_rewards.of(per_func[mine], weights, valid_tokens(output), wanted=reads)
        if per_token is not None:
            output["token_reward"] = per_token
        if inputs and EPISODE_TURNS in inputs[0]:
            output["turn"] = turn_numbers([row[EPISODE_TURNS] for row in inputs], output["completion_mask"])
        return output

    def _prepare(self, rollout: dict[str, Any]) -> None:
        """Method.prepare over the rollout batch of all ranks; this rank's rows go into `rollout`."""
        train, args = self.model.training, self.args
        punish = partial(
            soft_overlong_punishment,
            max_length=self.max_completion_length,
            buffer=args.overlong_buffer,
            factor=args.overlong_factor,
        )
        prepared = prepare_rows(
            self.method,
            rollout,
            self.accelerator,
            group_size=self.num_generations if train else self.num_generations_eval,
            punish=punish if args.overlong_buffer else None,
            one_step=not train,
        )
        prepared.rows.put(rollout)
        if not train:
            return
        batch, rule = prepared.batch, self.method.temperature_rule
        self._log_values(rollout_metrics(batch, prepared.scored, rule, self._sampled_with, self.temperature))
        if not self.use_vllm:  # with vLLM, TRL logs the same
            self._log_values(sampler_gap(batch))
        if batch.stats is not None:  # a rollout of which every group was dropped leaves the former ones
            self.temperature_stats = batch.stats

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            if self.args.whole_groups and self._buffered_inputs is not before:
                steps = self.args.steps_per_generation // self.args.gradient_accumulation_steps
                self._buffered_inputs = whole_groups(self._buffered_inputs, steps)
            first, per_step = self._step % len(self._buffered_inputs), self.args.gradient_accumulation_steps
            inputs = self._buffered_inputs[first]
            if first % per_step == 0:
                self._begin_step(self._buffered_inputs[first : first + per_step])
        return inputs

    def _begin_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """Method.step over the optimiser step of all ranks; what it makes goes into the micro-batches."""
        rows = [RolloutRows.of(inputs) for inputs in micro_batches]

        def score(i: int) -> tuple[Tensor, Tensor]:
            with (
                torch.no_grad(),
                disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            ):
                scored = self.scorer.current(
                    self.model, self.scorer.sequences(micro_batches[i], rows[i].batch.mask)
                )
            assert scored.entropy is not None
            return scored.logp, scored.entropy

        made = step_rows(self.method, rows, self.accelerator, self.temperature_stats, score)
        for inputs, of_step in zip(micro_batches, made, strict=True):
            of_step.put(inputs)

    # -- loss -----------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The micro-batch's share of the step's loss; all of its passes but the last have gone backward."""
        train, step = self.model.training, self.state.global_step + 1
        records = self._records if self._records and train and self._records.takes_tokens(step) else None
        # Tokens of dropped groups count nowhere, but records show them.
        mask = RolloutRows.of(inputs).batch.mask if records is None else scored_tokens(inputs)
        *earlier, last = self._passes(inputs, mask)
        if records is not None:
            records.add_rewards(step, inputs)
        before = torch.zeros((), device=mask.device)
        if train:
            before += self._learn_from_demonstrations(model, mask.device)
        for part in earlier:
            with self.accelerator.no_sync(model) if train else nullcontext():
                loss = self._pass_loss(model, *part, records)
                if train:
                    self._backward(loss)
            before += loss.detach()
        loss = self._pass_loss(model, *last, records) + before
        if train:
            finite.check("loss", loss.detach(), step)
        if not train or self.accelerator.gradient_state.sync_gradients:
            self._step_metrics.flush()
            if train and self._demonstrations is not None:
                self._log_value("demonstration_weight", self._mu)
            if train and self._entropy_term.acts:
                self._entropy_term.end_of_step(partial(self.accelerator.reduce, reduction="sum"))
                self.entropy_coef = self._entropy_term.coef  # where TRL keeps it
                self._log_value("entropy_coef", self.entropy_coef)
            self._say_if_far_from_policy()
            if records is not None:
                records.write_tokens(step)
        return loss

    def _passes(self, inputs: dict[str, Any], mask: Tensor) -> list[tuple[dict[str, Any], Tensor]]:
        """Inputs and mask of each pass over a micro-batch."""
        whole = self._sharded or self.aux_loss_enabled or "split" in self.method.breaks
        return passes.split(inputs, mask, 0 if whole else self.args.tokens_per_pass)

    def _pass_loss(
        self, model: nn.Module, inputs: dict[str, Any], mask: Tensor, records: Recorder | None
    ) -> Tensor:
        """Of some rows, scored at the tokens of `mask` (B,T)."""
        router = self.aux_loss_enabled and torch.is_grad_enabled()
        scored = self.scorer.current(model, self.scorer.sequences(inputs, mask), router)
        assert scored.entropy is not None
        batch = RolloutRows.of(inputs).batch.replace(logp=scored.logp, entropy=scored.entropy.detach())
        out = self.method.loss(batch)
        auxiliary = self.auxiliary_losses(batch, scored)
        loss = total(out.loss, auxiliary, self.accelerator.num_processes)
        mu = self._mu if self.model.training else 0.0
        if mu:
            loss = (1 - mu) * loss
        self._step_metrics.add(out, batch, auxiliary, mixed=mu > 0)
        if records is not None:
            beside = self._recorded_beside(inputs, scored)
            records.add_tokens(self.state.global_step + 1, inputs, batch, out, self._sampled_with, beside)
        return loss

    def _recorded_beside(self, inputs: dict[str, Any], scored: Scored) -> dict[str, Tensor]:
        """What records have of each token (B,T) beside its scores and what the method made of it."""
        return {} if scored.gates is None else {"gate": scored.gates.mean}

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)

    @property
    def _mu(self) -> float:
        """Weight of the demonstrations in this optimiser step."""
        return 0.0 if self._demonstrations is None else self._demonstrations.weight.at(self.state.global_step)

    def _learn_from_demonstrations(self, model: nn.Module, device: torch.device) -> Tensor:
        """Of this micro-batch's demonstrations, in passes that go backward; their share of the step's loss."""
        learnt, of_all, mu = torch.zeros((), device=device), self._demonstrations, self._mu
        if of_all is None or not mu:
            return learnt
        args, step, ranks = self.args, self.state.global_step, self.accelerator.num_processes
        micro_batches = args.gradient_accumulation_steps
        part = self._step % micro_batches * ranks + self.accelerator.process_index
        shares = {name: torch.zeros((), device=device) for name in of_all.metrics.values()}
        for rows, mask in of_all.passes(step, part, micro_batches * ranks, args.tokens_per_pass, device):
            with self.accelerator.no_sync(model):
                scores = self.scorer.targets(model, Sequences.of(rows, mask), of_all.method.reads)
                out = of_all.loss(scores, mask, step)
                self._backward(mu * out.loss * ranks)
            learnt += mu * out.loss.detach() * ranks
            for theirs, name in of_all.metrics.items():
                shares[name] = shares[name] + out.metrics[theirs]
        self._step_metrics.add_shares(shares)
        return learnt

    def _layout(self) -> dict[str, Any]:
        of_all = self._demonstrations
        return {**super()._layout(), **({} if of_all is None else of_all.identity)}

    def _say_if_far_from_policy(self) -> None:
        weights = self._metrics["train"].get("sampler_weight/mean")
        if self._said_far or not weights or weights[-1] >= LEAST_WEIGHT:
            return
        self._said_far = True
        plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        if self.args.sampling_support:
            plain = {"repetition_penalty": 1.0}
        given = {name: getattr(self.args, name) for name in plain}
        causes = [f"{name}={value}" for name, value in given.items() if value != plain[name]]
        causes += [f"generation_kwargs={self.args.generation_kwargs}"] if self.args.generation_kwargs else []
        causes += ["the temperature rule"] if self._sampled_with is not None else []
        causes += ["vLLM, whose weights or precision differ"] if self.use_vllm else []
        LOG.warning(
            f"the mean importance weight of sampled tokens is {weights[-1]:.2f} at optimiser step "
            f"{self.state.global_step + 1}: they are drawn from another distribution than the trained policy "
            f"({', '.join(causes) or 'by what is not known'}). Below {LEAST_WEIGHT} little of the gradient is "
            "left. Said once; see sampler_weight/mean"
        )

    # -- log and checkpoints --------------------------------------------------------------------------------

    def _log_value(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_values(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._log_value(name, value)

    def _run_state(self) -> RunState:
        inside = self._step % (self.args.steps_per_generation * self.num_iterations)
        dynamic = self._dynamic
        return RunState(
            stats=self.temperature_stats,
            sampled_with=self._sampled_with,
            micro_step=self._step,
            fresh_prompts=0 if dynamic is None else dynamic.prompts.position,
            mixed_share=None if dynamic is None else dynamic.share,
            metrics=self._metrics["train"],
            loss=self._loss_sums(),
            entropy_term=self._entropy_term.state(),
            rollout=self._buffered_inputs if inside else None,
        )

    def _take_up(self, state: RunState) -> None:
        """Put the trainer where a checkpoint left it."""
        self.temperature_stats, self._sampled_with = state.stats, state.sampled_with
        self._step = state.micro_step
        self._metrics["train"] = defaultdict(list, state.metrics)
        self._entropy_term.take_up(state.entropy_term)
        self.entropy_coef = self._entropy_term.coef
        if self._dynamic is not None:
            self._dynamic.prompts.position, self._dynamic.share = state.fresh_prompts, state.mixed_share
        if state.rollout is not None:
            self._buffered_inputs = state.rollout
        self.add_callback(OnceAtBegin(partial(self._restore_loss, state.loss)))
