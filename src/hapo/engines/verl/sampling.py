"""The temperature rule on its way to verl's rollout servers, in every request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from verl.experimental.agent_loop import AgentLoopManager
from verl.workers.rollout.llm_server import LLMServerClient

from ...samplers.rule import HARMLESS, PREFIX, TemperatureRule

BOARD = "hapo_rule_board"
"""The Ray actor of a run's rule."""

Args = dict[str, float | str]
"""A rule as parameters of a request."""


class RuleBoard:
    """Holds the rule of the current rollout. The trainer sets it, the clients in the agent loops read it."""

    def __init__(self) -> None:
        self._args: Args = {}

    def set(self, args: Args) -> None:
        """The rule of the requests that follow; empty: T_base."""
        self._args = args

    def get(self) -> Args:
        """The rule to send."""
        return self._args


class TemperedClient(LLMServerClient):
    """verl's client of its rollout servers, with the rule added to the sampling parameters of each request."""

    board: Any

    @classmethod
    def of(cls, client: LLMServerClient, board: Any) -> TemperedClient:
        """The same client, with the rule of this board."""
        made = cls.__new__(cls)
        made.__dict__ |= {**vars(client), "board": board}
        return made

    async def generate(self, request_id: Any, *, sampling_params: dict[str, Any], **others: Any) -> Any:
        """As verl's."""
        args = await self.board.get.remote()
        if args:
            given = sampling_params.get("extra_args") or {}
            sampling_params = {**sampling_params, "extra_args": {**given, **args}}
        return await super().generate(request_id, sampling_params=sampling_params, **others)


class TemperedAgentLoopManager(AgentLoopManager):
    """verl's manager of agent loops, which get the tempered client: for the trainer that makes both itself."""

    def __init__(self, config: Any, llm_client: LLMServerClient, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, TemperedClient.of(llm_client, ray.get_actor(BOARD)), *args, **kwargs)


class Tempering:
    """The trainer's side: one board for all clients."""

    def __init__(self) -> None:
        self.board = ray.remote(RuleBoard).options(num_cpus=0, name=BOARD).remote()

    def send(self, rule: TemperatureRule | None) -> None:
        """Set the rule of the following requests; returns when it is set."""
        ray.get(self.board.set.remote({} if rule is None else rule.to_args()))


def check_rollout(servers: Sequence[Any], prompt: list[int]) -> None:
    """Each rollout server takes a right rule, and refuses a wrong one, as one that applies no rule does not.

    Raises:
        RuntimeError: one would sample without the adaptive temperature.
    """

    def ask(server: Any, args: Args) -> None:
        params = {"max_tokens": 1, "temperature": 1.0, "extra_args": args}
        ray.get(server.generate.remote(prompt, params, "hapo-check"))

    for server in servers:
        ask(server, HARMLESS.to_args())
        try:
            ask(server, {f"{PREFIX}tau": 2.0})
        except Exception as error:
            if "tau must be" in str(error):
                continue
            raise
        raise RuntimeError(
            "a rollout server takes a temperature rule that cannot be without a word, so it would apply none: "
            "install hapo in its environment, where vLLM finds the entry point (group vllm.logits_processors)"
        )
