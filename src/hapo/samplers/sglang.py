"""Adaptive temperature inside SGLang: a custom logit processor, what a request says, and a check of the server.

SGLang hands the processor the logits of the requests that name it, after penalties, bias and grammar and before
it divides by the temperature; with each row come the request's `custom_params`, and under "__req__" the request
itself, whose temperature is T_base. Nothing of SGLang is imported here but to abort a request, so a client that
has no SGLang can use this module; on the server `hapo` must be installed. Tested with SGLang 0.5.23.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from jaxtyping import Float
from torch import Tensor

from .rule import PREFIX, TemperatureRule, temper_

TESTED = "0.5."
"""Versions of SGLang that are known to call the processor as described above."""


class AdaptiveTemperatureLogitProcessor:
    """SGLang's `CustomLogitProcessor` that divides each row by the factor of the rule in its request.

    Greedy rows, and requests without a parameter of ours, are left as they are. A request with bad parameters is
    aborted with the reason (HTTP 400); the other rows of the batch are not touched by that. SGLang asks for no
    base class.
    """

    def __call__(
        self, logits: Float[Tensor, "N V"], custom_param_list: Sequence[Mapping[str, Any] | None]
    ) -> Float[Tensor, "N V"]:
        """The logits, divided in place; one entry of parameters a row."""
        t_base = [1.0] * len(logits)
        groups: dict[TemperatureRule, list[int]] = {}
        for row, params in enumerate(custom_param_list):
            ours = [(k, v) for k, v in (params or {}).items() if k.startswith(PREFIX)]
            if not params or not ours:
                continue
            request = params["__req__"]
            try:  # what is no scalar goes on as text, which can be hashed and is refused as well
                rule = _rule(tuple((k, v if isinstance(v, (int, float)) else str(v)) for k, v in ours))
            except ValueError as error:
                _abort(request, str(error))
                continue
            if request.sampling_params.top_k > 1:  # 1 is greedy, and what SGLang makes of temperature 0
                t_base[row] = request.sampling_params.temperature
                groups.setdefault(rule, []).append(row)
        t = _on(logits, t_base)
        for rule, rows in groups.items():
            temper_(logits, rule, t, None if len(rows) == len(logits) else _on(logits, rows))
        return logits

    @classmethod
    def to_str(cls) -> str:
        """The processor as SGLang takes it: pickled by its name, so that the server imports it from `hapo`."""
        return json.dumps({"callable": pickle.dumps(cls).hex()})


def request_args(rule: TemperatureRule) -> dict[str, Any]:
    """`custom_logit_processor` and `custom_params` of a request that is to be drawn by this rule.

    OpenAI's API takes both as they are, in `extra_body`; of `/generate` and `Engine.generate`, `custom_params`
    belongs into `sampling_params`. The temperature of the request is T_base.
    """
    return {
        "custom_logit_processor": AdaptiveTemperatureLogitProcessor.to_str(),
        "custom_params": rule.to_args(),
    }


def check_server(server: str | Mapping[str, Any], api_key: str | None = None) -> None:
    """Find out whether this server takes the processor and skips it nowhere, before anything is drawn from it.

    Whether `hapo` is installed beside the server it cannot see: without it the server ends at the first request.

    Args:
        server: its address, such as "http://localhost:30000"; or the answer of `/server_info` or of
            `Engine.get_server_info()`.
        api_key: what the server was started with, if anything.

    Raises:
        ConnectionError: nothing answers there.
        RuntimeError: the server would refuse the processor or skip it, with the remedy.
    """
    info = _server_info(server, api_key) if isinstance(server, str) else server
    version, speculative = str(info.get("version")), info.get("speculative_algorithm")
    if not version.startswith(TESTED):
        raise RuntimeError(
            f"the server runs SGLang {version}, and the processor was tested with {TESTED}23: where it is called "
            f"may differ; use a server of {TESTED}x"
        )
    if not info.get("enable_custom_logit_processor"):
        raise RuntimeError(
            "the server takes no custom logit processor; start it with --enable-custom-logit-processor"
        )
    if speculative is not None and speculative.upper() != "NONE":
        raise RuntimeError(
            f"the server decodes speculatively ({speculative}), and SGLang verifies drafts without custom logit "
            "processors (sglang#21724); start it without --speculative-algorithm"
        )


@lru_cache(maxsize=4096)
def _rule(given: tuple[tuple[str, int | float | str], ...]) -> TemperatureRule:
    """The rule of a request, parsed once and not at every token."""
    rule = TemperatureRule.from_args(dict(given))
    assert rule is not None  # as some parameter is given
    return rule


def _abort(request: Any, reason: str) -> None:
    """End the request at this token, as SGLang does with requests that it refuses itself."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    request.to_finish = FINISH_ABORT(f"adaptive temperature: {reason}", 400, "BadRequestError")


def _on(logits: Tensor, values: list[Any]) -> Tensor:
    """The values beside the logits, without waiting for the device."""
    return torch.tensor(values, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)


def _server_info(url: str, api_key: str | None) -> dict[str, Any]:
    address = url.rstrip("/").removesuffix("/v1") + "/server_info"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urlopen(Request(address, headers=headers), timeout=30) as answer:
            return json.load(answer)
    except HTTPError as error:
        raise ConnectionError(f"the server at {address} answers {error.code} {error.reason}; api_key=?") from error
    except (URLError, TimeoutError, json.JSONDecodeError) as error:
        raise ConnectionError(f"no SGLang server answers at {address} ({error})") from error
