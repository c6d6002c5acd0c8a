"""TRL's vLLM rollouts: the temperature rule goes out with every request, sampler log-probs come back.

vLLM applies the rule in `hapo.samplers.vllm`, which its entry point loads. TRL asks for `processed_logprobs`,
those of the distribution that drew the token, so that the truncated correction knows the temperature.
"""

from __future__ import annotations

from typing import Any

from ...batch import EntropyStats
from ...method import Method
from ...samplers.rule import HARMLESS, PREFIX, rule_of, temperature_of


def check_rule(method: Method) -> None:
    """Raise a ValueError unless the method's temperature rule can be told to vLLM: by `TemperatureOptions`."""
    if method.temperature_rule is None or temperature_of(method) is not None:
        return
    raise ValueError(
        f"method {method.name!r} adapts the sampling temperature by a function of its own, and requests to vLLM "
        'carry numbers only: build it with temperature={...} or components="ABCD", or set use_vllm=False'
    )


def check_images(generation: Any, method: Method) -> None:
    """Raise a ValueError where TRL would send images without the rule: to a server, asked in another way."""
    if generation.mode == "server" and method.temperature_rule is not None:
        raise ValueError(
            'TRL\'s requests with images to a vLLM server carry no temperature rule: set vllm_mode="colocate", or '
            "take a method without an adaptive temperature"
        )


def send_rule(generation: Any, method: Method, stats: EntropyStats | None) -> None:
    """Give the method's rule with these statistics to the following requests; without statistics, T_base."""
    rule = rule_of(method, stats)
    key = "vllm_xargs" if generation.mode == "server" else "extra_args"
    others = {k: v for k, v in generation.generation_kwargs.items() if k != key}
    given = (generation.generation_kwargs.get(key) or {}).items()
    args = {k: v for k, v in given if not k.startswith(PREFIX)} | ({} if rule is None else rule.to_args())
    # A new mapping: TRL's is the caller's own, and goes into the records of the run.
    generation.generation_kwargs = {**others, key: args} if args else others


def attach(generation: Any, method: Method, is_main: bool) -> None:
    """After TRL has made its engine: check that vLLM will apply a rule; sync weights on CPUs.

    Args:
        generation: TRL's `vllm_generation`.
        method: whose rule it is.
        is_main: whether this process is the one that asks a server.

    Raises:
        ValueError: the server returns log-probs of another distribution than the one that drew the tokens.
        RuntimeError: vLLM does not run the processor of `hapo.samplers.vllm`.
    """
    if generation.mode == "server":
        if is_main:
            mode = generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if mode != "processed_logprobs":
                raise ValueError(
                    f"the vLLM server returns {mode}, not those of the distribution that drew the tokens: "
                    "start it with --logprobs-mode processed_logprobs"
                )
            if method.temperature_rule is not None:
                _check_server(generation.vllm_client)
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        generation.sync_weights = lambda: _reload_weights(generation)
    if method.temperature_rule is not None:
        _check_engine(generation.llm)


def _check_engine(llm: Any) -> None:
    """The engine in this process has the processor, in Model Runner V1 or V2, and takes a rule."""
    from vllm import SamplingParams

    from ...samplers.vllm import AdaptiveTemperature as Processor

    Processor.validate_params(SamplingParams(extra_args=HARMLESS.to_args()))
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    batch = getattr(runner, "input_batch", None)
    loaded = batch.logitsprocs.all if batch is not None else runner.sampler.logits_processors
    if not any(isinstance(processor, Processor) for processor in loaded):
        raise RuntimeError(
            "vLLM did not load the processor of the adaptive temperature, so it would not act: install hapo where "
            "vLLM finds its entry point (group vllm.logits_processors), and leave speculative decoding off"
        )


def _check_server(client: Any) -> None:
    """The server refuses a wrong rule, as one without the processor does not, and takes a right one."""

    def ask(args: dict[str, Any]) -> Any:
        request = {"model": client.model, "prompt": [0], "max_tokens": 1, "vllm_xargs": args}
        return client.session.post(f"{client.base_url}/v1/completions", json=request)

    wrong = ask({f"{PREFIX}tau": 2.0})
    if wrong.status_code != 400 or "tau must be" not in wrong.text:
        raise RuntimeError(
            "the vLLM server takes a temperature that cannot be without a word, so it has no adaptive "
            "temperature: install hapo beside its vLLM"
        )
    right = ask(HARMLESS.to_args())
    if right.status_code != 200:
        raise RuntimeError(f"the vLLM server refuses adaptive temperatures: {right.text}")


def _reload_weights(generation: Any) -> None:
    """vLLM packs weights for the CPU when it loads them, so single tensors cannot be loaded again: all at once."""
    # Copies, since TRL takes a LoRA adapter out of the weights again once it has gone through them.
    weights = [(name, weight.clone()) for name, weight in generation._iter_named_params()]
    generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    generation.llm.reset_prefix_cache()
