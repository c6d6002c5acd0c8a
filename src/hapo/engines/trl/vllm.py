"""TRL's vLLM rollouts: the temperature rule goes out with every request, sampler log-probs come back.

vLLM applies the rule in `hapo.samplers.vllm`, which its entry point loads. TRL asks for `processed_logprobs`,
those of the distribution that drew the token, so that the truncated correction knows the temperature. An engine
made with `return_sampling_mask` also tells the tokens that top-k and top-p left to each draw: by `generate()` in
this process, and by a server's /inference/v1/generate; /v1/completions, which TRL asks, does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list
from trl import GRPOConfig

from ...batch import EntropyStats
from ...method import Method
from ...samplers.decoding import Draws
from ...samplers.rule import HARMLESS, PREFIX, rule_of, temperature_of
from ...versions import MASKS, SCALE_OUT, minor
from .support import LogpOver

FINAL_ONLY = 2
"""vLLM's output kind: all samples of a prompt once they are finished."""

GENERATE = "/inference/v1/generate"
"""Where a server tells supports."""

MOST_REQUESTS = 64
"""Prompts that a server is asked for at a time."""


def check_rule(method: Method) -> None:
    """Raise a ValueError unless the method's temperature rule can be told to vLLM: by `TemperatureOptions`."""
    if method.temperature_rule is None or temperature_of(method) is not None:
        return
    raise ValueError(
        f"method {method.name!r} adapts the sampling temperature by a function of its own, and requests to vLLM "
        'carry numbers only: build it with temperature={...} or components="ABCD", or set use_vllm=False'
    )


@contextmanager
def sampling_masks(wanted: bool) -> Iterator[None]:
    """Inside the block TRL makes its engine with `return_sampling_mask`, for which it has no option.

    Raises:
        ValueError: vLLM says that this engine returns none.
    """
    if not wanted:
        yield
        return
    from trl.generation import vllm_generation as trls

    made = trls.LLM
    trls.LLM = partial(made, return_sampling_mask=True)
    try:
        yield
    except ValueError as error:
        if "sampling distribution replay" not in str(error):
            raise
        raise ValueError(
            f"top-k or top-p is set, and vLLM does not tell what they leave ({error}): set sampling_support=False"
        ) from error
    finally:
        trls.LLM = made


def take_supports(generation: Any) -> None:
    """Let the log-probs that TRL reads of its engine be `LogpOver`."""
    if generation.mode == "server":
        generation.vllm_client.generate = partial(_ask_with_supports, generation.vllm_client)
        return
    generate = generation.llm.generate

    def marked(*args: Any, **kwargs: Any) -> Any:
        outputs = generate(*args, **kwargs)
        for drawn in (completion for output in outputs for completion in output.outputs):
            sets = drawn.sampling_mask.token_ids
            for token, logps, support in zip(drawn.token_ids, drawn.logprobs, sets, strict=True):
                logps[token].logprob = LogpOver(logps[token].logprob, support)
        return outputs

    generation.llm.generate = marked


def _ask_with_supports(
    client: Any,
    *,
    prompts: list[list[int]],
    n: int,
    structured_outputs_regex: str | None = None,
    generation_kwargs: dict[str, Any] | None = None,
    features: None = None,
    **params: Any,
) -> dict[str, Any]:
    """What `VLLMClient.generate` answers, asked where the server tells supports: one request a prompt."""
    params |= {"n": n, "output_kind": FINAL_ONLY, **(generation_kwargs or {})}
    if structured_outputs_regex is not None:
        params["structured_outputs"] = {"regex": structured_outputs_regex}

    def ask(prompt: list[int]) -> list[dict[str, Any]]:
        request = {"model": client.model, "token_ids": prompt, "sampling_params": params}
        answer: dict[str, Any] = client._post(client.base_url + GENERATE, json=request)
        return answer["choices"]

    with ThreadPoolExecutor(MOST_REQUESTS) as pool:
        choices = [choice for answer in pool.map(ask, prompts) for choice in answer]
    logps = []
    for choice in choices:
        entries = zip(choice["logprobs"]["content"], choice["sampling_mask"], strict=True)
        logps.append([[None if (x := e["logprob"]) is None else LogpOver(x, support)] for e, support in entries])
    tokens = [choice["token_ids"] for choice in choices]
    return {"prompt_ids": prompts, "completion_ids": tokens, "logprobs": logps, "logprob_token_ids": None}


def against_engine(args: GRPOConfig) -> Iterator[str]:
    """Why the engine in this process will not tell supports, as far as can be known before there is a model."""
    if not args.use_vllm or args.vllm_mode != "colocate" or importlib.util.find_spec("vllm") is None:
        return
    import vllm
    from vllm import envs
    from vllm.platforms import current_platform

    told: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    if minor(vllm.__version__) < (0, 31):
        yield f"vLLM {vllm.__version__} does not tell it beside hapo: take 0.31 or newer"
    elif not (current_platform.is_cuda_alike() if told is None else told):
        yield "vLLM tells it in Model Runner V2 alone, which is not in use here (VLLM_USE_V2_MODEL_RUNNER=1)"


def against_server(generation: Any, is_main: bool) -> Iterator[str]:
    """Why the server does not tell supports; the same on all ranks."""
    if generation.mode != "server":
        return
    lacking = [_flags_lacking(generation.vllm_client) if is_main else []]
    if flags := broadcast_object_list(lacking, from_process=0)[0]:
        yield f"the server does not tell it: start it with {' '.join(flags)} (vLLM 0.31 or newer, Runner V2)"


def _flags_lacking(client: Any) -> list[str]:
    """What a server was not started with that supports are told by: masks, and where they are asked for."""
    flags = [] if client.get_server_info()["model_config"].get("return_sampling_mask") else [MASKS]
    # The request is wrong, so that nothing is drawn: 400 where there is somebody to read it.
    answer = client.session.post(client.base_url + GENERATE, json={})
    return flags if answer.status_code == 400 else [*flags, SCALE_OUT]


def check_images(generation: Any, method: Method) -> None:
    """Raise a ValueError where TRL would send images without the rule: to a server, asked in another way."""
    if generation.mode == "server" and method.temperature_rule is not None:
        raise ValueError(
            'TRL\'s requests with images to a vLLM server carry no temperature rule: set vllm_mode="colocate", or '
            "take a method without an adaptive temperature"
        )


def send_rule(generation: Any, method: Method, stats: EntropyStats | None, *, support: bool = False) -> None:
    """Give the method's rule with these statistics to the following requests; without statistics, T_base.

    `support`: a server is asked by `take_supports`, which names it as the engine does.
    """
    rule = rule_of(method, stats)
    key = "vllm_xargs" if generation.mode == "server" and not support else "extra_args"
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


def generate_logged(
    llm: Any, generate: Callable[[], tuple[Any, Any]], prompt_ids: list[list[int]], *, support: bool = False
) -> tuple[list[list[int]], list[list[float]], Draws | None]:
    """What `generate` gives, and what the engine knew of each token at its draw; None where that is not whole.

    `support`: log-probs come with supports, and the policy's are over them.
    """
    from ...samplers.vllm import logging_draws

    with logging_draws(llm) as log:
        completion_ids, logps = generate()
    supports = [[getattr(x, "support", ()) for x in row] for row in logps] if support else None
    return completion_ids, logps, log.draws(prompt_ids, completion_ids, logps, supports)


def _check_engine(llm: Any) -> None:
    """The engine in this process has the processor, in Model Runner V1 or V2, and takes a rule."""
    from vllm import SamplingParams

    from ...samplers.vllm import NOT_LOADED, AdaptiveTemperature, processor_of

    AdaptiveTemperature.validate_params(SamplingParams(extra_args=HARMLESS.to_args()))
    if processor_of(llm) is None:
        raise RuntimeError(f"{NOT_LOADED}; the adaptive temperature would not act")


def _check_server(client: Any) -> None:
    """The server refuses a wrong rule, as one without the processor does not, and takes a right one."""

    def ask(args: dict[str, Any]) -> Any:
        # A server that tells supports refuses what has no top_k.
        request = {"model": client.model, "prompt": [0], "max_tokens": 1, "top_k": 1, "vllm_xargs": args}
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
