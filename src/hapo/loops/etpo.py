"""ETPO: entropy-regularised token-level policy optimisation of language agents (arXiv 2402.06700), the whole loop.

    repeat  every agent takes some turns                                           `hapo.loops.turns.collect`
            values V of all states and Bellman targets y of all tokens, constants  `hapo.parts.soft_q`
            policy step    towards pi* = rho exp(q / beta) / Z
            critic step    q(s, a) towards y
            target step    theta_t <- polyak theta_t + (1 - polyak) theta

Policy, critic, target critic and reference are language models; the logits of the critics are their Q values. The
data are dropped after an update.

Over several processes each has some of the agents; losses are divided by the tokens of all, and gradients added
up, so that the update does not depend on the number of processes. Every process holds the whole networks.

The authors take Lion; this loop takes AdamW. See docs/methods/etpo.md for what else is ours.

Shapes: R segments of episodes, C columns, S turns, L tokens of a turn; N states, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..engines.trl.finite import check
from ..outputs import write_whole
from ..parts import soft_q
from ..tasks.environments import EnvironmentTask
from .networks import (
    Name,
    Networks,
    SharedNetworks,
    WholeNetworks,
    follow,
    hidden_states,
    load_networks,
    save_networks,
)
from .options import ETPOConfig
from .packed import Packed, pack
from .turns import Agent, Sampling, Segment, Speech, collect, play

STATE = "etpo_state.json"
"""Written last into a checkpoint: a folder without it is incomplete."""


class States(NamedTuple):
    """What an update made of each state of some segments, for metrics and records; nothing has a gradient."""

    target: Float[Tensor, " N"]
    """y; 0 in a state that no token was taken in."""
    value: Float[Tensor, " N"]
    kl: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    logp: Float[Tensor, " N"]
    ref_logp: Float[Tensor, " N"]
    q: Float[Tensor, " N"]
    """Of the taken token, by the critic that learns."""
    other: Int[Tensor, " N"]
    """The best token beside it."""
    q_other: Float[Tensor, " N"]
    push: Float[Tensor, " N"]
    """-N dL_pi / dz of the taken token."""


def update(
    networks: Networks,
    optimisers: dict[str, torch.optim.Optimizer],
    segments: Sequence[Segment],
    args: ETPOConfig,
    accelerator: Accelerator,
    *,
    pad: int,
    step: int = 1,
    see: See | None = None,
) -> dict[str, float]:
    """One update of policy, critic and target critic from these segments, and the segments of the other processes.

    Args:
        networks: the four.
        optimisers: of "policy" and "critic".
        segments: of this process; there may be none.
        pad: token id of padding.
        step: for messages, from 1.
        see: called with each pass's segments, tensors and states.

    Returns:
        Means over the tokens of all processes: losses, value, kl, entropy, q; and the gradient norms.

    Raises:
        NotFiniteError: a gradient is not finite.
    """
    device, size = accelerator.device, args.per_device_train_batch_size
    tokens = torch.tensor([sum(len(turn.ids) for one in segments for turn in one.turns)], device=device)
    count = max(int(accelerator.reduce(tokens, "sum").item()), 1)
    sums = torch.zeros(len(MEANS), dtype=torch.float64, device=device)
    for start in range(0, len(segments), size):
        part = list(segments[start : start + size])
        packed = pack(part, pad, device)
        states, losses = _pass(networks, packed, args, count)
        if see is not None:
            see(part, packed, states)
        means = (states.value, states.kl, states.entropy, states.q, states.target)
        sums += torch.stack([*losses, *(x[packed.taken].sum() / count for x in means)]).double()
    norms = {}
    for name in LEARNING:
        norms[name] = _step(networks.parameters(name), optimisers[name], args.max_grad_norm, accelerator, step)
    follow(networks.parameters("target"), networks.parameters("critic"), args.polyak)
    found = dict(zip(MEANS, accelerator.reduce(sums, "sum").tolist(), strict=True))
    return {
        **found,
        "loss": found["loss/policy"],
        "grad_norm": norms["policy"],
        "grad_norm/critic": norms["critic"],
    }


See = Callable[[list[Segment], Packed, States], None]
"""Is shown the segments of a pass and what was made of them."""
LEARNING: tuple[Name, ...] = ("policy", "critic")
MEANS = ("loss/policy", "loss/critic", "value", "kl", "entropy", "q", "target")
"""Of the tokens of an update."""


def _pass(networks: Networks, packed: Packed, args: ETPOConfig, count: int) -> tuple[States, list[Tensor]]:
    """The forward passes over some segments, and the backward passes of policy and critic."""
    inputs = packed.ids, packed.attention, packed.at
    with torch.no_grad():
        with networks.use("target") as net:
            slow = hidden_states(net, *inputs)
        with networks.use("reference") as net:
            rho = hidden_states(net, *inputs)
        with networks.use("critic") as net:
            fast = hidden_states(net, *inputs)
    chunk = soft_q.chunk_size(networks.logits("reference", rho[:1]).shape[-1], rho.device)
    chunks = partial(soft_q.in_chunks, size=chunk)
    q_of = partial(_q, networks, args.critic)
    taken, action = packed.taken, packed.action.unsqueeze(-1)
    with networks.use("policy") as net:
        pi = hidden_states(net, *inputs)
        with torch.no_grad():
            value, kl, *more = chunks(partial(_see, networks, q_of, args), [action, slow, fast, rho, pi])
            states = States(_targets(packed, value, kl, args), value, kl, *more)
        (terms,) = chunks(partial(_policy, networks, q_of, args), [fast[taken], rho[taken], pi[taken]])
        policy_loss = terms.sum() / count
        policy_loss.backward()
    with networks.use("critic") as net:  # a second time, so that two networks' activations are never held at once
        fast = hidden_states(net, *inputs)
        (q,) = chunks(partial(_taken, q_of), [action[taken], rho[taken], fast[taken]])
        critic_loss = soft_q.huber(states.target[taken] - q, args.huber_delta).sum() / count
        critic_loss.backward()
    return states, [policy_loss.detach(), critic_loss.detach()]


def _q(networks: Networks, critic: str, name: Any, hidden: Tensor, rho: Tensor) -> Tensor:
    q = networks.logits(name, hidden)
    return q if critic == "logits" else q - networks.logits("reference", rho).detach()


def _see(
    networks: Networks,
    q_of: Any,
    args: ETPOConfig,
    action: Tensor,
    slow: Tensor,
    fast: Tensor,
    rho: Tensor,
    pi: Tensor,
) -> tuple[Tensor, ...]:
    logits, ref_logits = networks.logits("policy", pi), networks.logits("reference", rho)
    value, kl = soft_q.soft_value(q_of("target", slow, rho), logits, ref_logits, args.beta)
    q = q_of("critic", fast, rho)
    logp, ref_logp = (x.log_softmax(-1).clamp(min=soft_q.LOWEST) for x in (logits, ref_logits))
    p = logits.softmax(-1)
    f = args.beta * (logp - (ref_logp if args.target == "kl_ref" else 0.0)) - q.masked_fill(p == 0, 0.0)
    best, other = q.scatter(-1, action, -torch.inf).max(-1)
    pushes = p * ((p * f).sum(-1, keepdim=True) - f)
    if args.target == "released":
        pushes = args.beta * (p - 1 / p.shape[-1])
    of_taken = [x.gather(-1, action).squeeze(-1) for x in (pushes, logp, ref_logp, q)]
    entropy = -(p * logp).sum(-1)
    push, logp, ref_logp, q = of_taken
    return value, kl, entropy, logp, ref_logp, q, other, best, push


def _policy(
    networks: Networks, q_of: Any, args: ETPOConfig, fast: Tensor, rho: Tensor, pi: Tensor
) -> tuple[Tensor]:
    logits, ref_logits = networks.logits("policy", pi), networks.logits("reference", rho).detach()
    q = q_of("critic", fast, rho).detach()
    return (soft_q.policy_terms(logits, q, ref_logits, beta=args.beta, target=args.target),)


def _taken(q_of: Any, action: Tensor, rho: Tensor, fast: Tensor) -> tuple[Tensor]:
    return (q_of("critic", fast, rho).gather(-1, action).squeeze(-1),)


def _targets(packed: Packed, value: Tensor, kl: Tensor, args: ETPOConfig) -> Float[Tensor, " N"]:
    """y of each state that a token was taken in; 0 elsewhere."""
    segments, turns, length = packed.mask.shape
    place = tuple(packed.place)
    value, kl = (x.new_zeros(segments, turns + 1, length).index_put(place, x) for x in (value, kl))
    target = soft_q.lambda_targets(
        value, kl, packed.reward, packed.goes_on, packed.mask, beta=args.beta, gamma=args.gamma, lam=args.lam
    )
    target = nn.functional.pad(target, (0, 0, 0, 1))
    return target[place]


def _step(
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    limit: float,
    accelerator: Accelerator,
    step: int,
) -> float:
    """Add the gradients of all processes up, clip them, and step; the norm before clipping."""
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes > 1:
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])  # type: ignore[union-attr]
        flat = accelerator.reduce(flat, "sum")
        for parameter, grad in zip(
            parameters.values(), flat.split([p.numel() for p in parameters.values()]), strict=True
        ):
            parameter.grad = grad.view_as(parameter)
    norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), limit))
    check("gradient norm", norm, step)
    optimiser.step()
    optimiser.zero_grad()
    return norm


class ETPO:
    """A run: networks, agents, updates, and the folder that they are recorded in.

    Args:
        model: a causal language model on one device; it becomes the policy.
        tokenizer: its.
        task: environment and rows.
        args: the options.
        peft_config: LoRA for policy and critics on one base; whole models where None.
        accelerator: one of its own unless given.

    Raises:
        ValueError: more processes than agents; adapters that cannot be shared; prompts that leave no room.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        task: EnvironmentTask,
        args: ETPOConfig,
        peft_config: Any = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.args, self.task, self.tokenizer = args, task, tokenizer
        self.accelerator = Accelerator(cpu=args.use_cpu) if accelerator is None else accelerator
        if self.accelerator.num_processes > args.environments:
            raise ValueError(
                f"{self.accelerator.num_processes} processes and {args.environments} environments: every process "
                "needs one; raise environments"
            )
        torch.manual_seed(args.seed)  # of the adapters
        model = model.to(self.accelerator.device).eval()
        self.networks: Networks = (
            WholeNetworks(model) if peft_config is None else SharedNetworks(model, peft_config)
        )
        rates = dict(
            zip(LEARNING, (args.learning_rate, args.critic_learning_rate or args.learning_rate), strict=True)
        )
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.AdamW(
                self.networks.parameters(name).values(), lr=rate, weight_decay=args.weight_decay
            )
            for name, rate in rates.items()
        }
        self.sampling = Sampling.of(model, tokenizer, args, getattr(task.environment, "stop", ()))
        self.speech = Speech(tokenizer, self.sampling.ends)
        mine = range(self.accelerator.process_index, args.environments, self.accelerator.num_processes)
        self.agents = [
            Agent(i, task.make(), self.speech, partial(self._row, i), self.sampling.context) for i in mine
        ]
        self.step, self.num_tokens, self.seconds = 0, 0, 0.0

    def _row(self, agent: int, episode: int) -> dict[str, Any]:
        """The row of an agent's n-th episode: the data in an order of the seed's, a new one each time round."""
        number = agent + self.args.environments * episode
        again, place = divmod(number, len(self.task.train))
        order = np.random.default_rng([self.args.seed, again]).permutation(len(self.task.train))
        row: dict[str, Any] = self.task.train[int(order[place])]
        return row

    def steps(self, see: See | None = None) -> Iterator[dict[str, float]]:
        """Update until `max_steps`; after each update its metrics. `see`: as in `update`."""
        while self.step < self.args.max_steps:
            began = time.perf_counter()
            with self.networks.use("policy") as net:
                segments = collect(net, self.agents, self.args.turns_per_update, self.sampling, self.args.seed)
            self.step += 1
            made = update(
                self.networks,
                self.optimisers,
                segments,
                self.args,
                self.accelerator,
                pad=self.sampling.pad,
                step=self.step,
                see=see,
            )
            made |= self._count(segments)
            self.seconds += time.perf_counter() - began
            yield made

    def _count(self, segments: Sequence[Segment]) -> dict[str, float]:
        """What the turns of all processes were like."""
        turns = [turn for one in segments for turn in one.turns]
        # as TRL counts: prompts and what the model wrote, not what the environment said
        tokens = sum(len(turn.ids) for turn in turns)
        tokens += sum(one.turns[0].start for one in segments if not one.begun)
        cut = sum(not turn.ids or turn.ids[-1] not in self.sampling.ends for turn in turns)
        ended = [turn.reward for turn in turns if not turn.goes_on]
        mine = [len(turns), sum(turn.reward for turn in turns), sum(len(turn.ids) for turn in turns), cut]
        sums = torch.tensor([*mine, tokens, len(ended), sum(ended)], dtype=torch.float64)
        n, reward, length, cut, tokens, episodes, last = self.accelerator.reduce(
            sums.to(self.accelerator.device), "sum"
        ).tolist()
        self.num_tokens += round(tokens)
        return {
            **({"reward": last / episodes} if episodes else {}),
            "reward/turn": reward / n,
            "episodes": episodes,
            "completions/mean_length": length / n,
            "completions/clipped_ratio": cut / n,
            "num_tokens": self.num_tokens,
        }

    def measure(self, temperature: float, samples: int = 1, batch: int = 64) -> list[list[float]]:
        """The last reward of held-out episodes: `samples` of each row, at a temperature; in the order of the
        rows."""
        sampling, world = self.sampling._replace(temperature=temperature), self.accelerator.num_processes
        asked = [(i, k) for i in range(len(self.task.eval)) for k in range(samples)]
        mine = asked[self.accelerator.process_index :: world]
        found: list[tuple[int, int, float]] = []
        with self.networks.use("policy") as net:
            for start in range(0, len(mine), batch):
                part = mine[start : start + batch]
                agents = [
                    Agent(i * samples + k, self.task.make(), self.speech, self._held_out(i), self.sampling.context)
                    for i, k in part
                ]
                play(net, agents, sampling, self.args.seed)
                found += [(i, k, float(a.environment.reward)) for (i, k), a in zip(part, agents, strict=True)]
        scores: list[list[float]] = [[0.0] * samples for _ in range(len(self.task.eval))]
        for i, k, score in gather_object(found):
            scores[i][k] = score
        return scores

    def _held_out(self, i: int) -> Callable[[int], dict[str, Any]]:
        return lambda _: self.task.eval[i]

    def save(self, folder: Path) -> None:
        """Write a checkpoint; called on all processes."""
        agents = gather_object([(agent.number, agent.state()) for agent in self.agents])
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_networks(self.networks, folder)
            for name, optimiser in self.optimisers.items():
                torch.save(optimiser.state_dict(), folder / f"optimiser-{name}.pt")
            done = {"step": self.step, "num_tokens": self.num_tokens, "seconds": self.seconds}
            state = {**done, "agents": dict(agents)}
            write_whole(folder / STATE, json.dumps({**state, "options": bound(self.args)}))
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, bit for bit on as many processes as wrote it.

        Raises:
            ValueError: it is incomplete, of another model or of other options, or an environment answers
            otherwise.
        """
        if not (folder / STATE).is_file():
            raise ValueError(f"{folder} has no {STATE}: it is no checkpoint of ETPO, or its writing was cut short")
        state = json.loads((folder / STATE).read_text())
        now = bound(self.args)
        if wrong := [name for name in now if state["options"].get(name) != now[name]]:
            was = state["options"].get(wrong[0])
            raise ValueError(
                f"{folder} was written with {wrong[0]}={was!r}, not {now[wrong[0]]!r}: resume with the same"
            )
        load_networks(self.networks, folder)
        device = self.accelerator.device
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(torch.load(folder / f"optimiser-{name}.pt", device, weights_only=True))
        self.step, self.num_tokens, self.seconds = state["step"], state["num_tokens"], state["seconds"]
        for agent in self.agents:
            agent.restore(state["agents"][str(agent.number)])


def bound(args: ETPOConfig) -> dict[str, Any]:
    """The options that a resumed run shares with the run before."""
    free = (
        *("output_dir", "max_steps", "use_cpu", "logging_steps", "save_steps", "save_total_limit"),
        *("record_tokens_every", "record_tokens_rows", "eval_size"),
    )
    return {name: value for name, value in asdict(args).items() if name not in free}
