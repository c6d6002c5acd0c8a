"""How weights reach the vLLM server: through a folder, and with the label that its answers then carry."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from safetensors.torch import save_file
from torch import Tensor
from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol
from trl.experimental.async_grpo.vllm_client import VLLMClient

from .worker import GENERATE

LOG = logging.getLogger(__name__)

SECONDS = 300
"""For a request that moves weights."""


class DiskWeightTransfer:
    """Weights go to the server as a checkpoint in a folder that both can read: no NCCL, so also on a CPU.

    For TRL's argument `weight_transfer`. The server needs `VLLM_SERVER_DEV_MODE=1`, and loads the folder by its
    own `reload_weights`. Requests in flight are held, as TRL holds them, and go on with the new weights.

    Args:
        url: of the server, `vllm_server_base_url`.
        folder: for the checkpoint; made where it is not there.
        timeout: seconds to wait for the server to come up.
    """

    def __init__(self, url: str, folder: str | Path, timeout: float = 240.0) -> None:
        self.client = VLLMClient(url, timeout)
        self.folder = Path(folder).absolute()

    def init_weight_transfer(self) -> None:
        """Wait for the server."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.client.wait_for_server_ready()

    def pause(self) -> None:
        """Hold the requests in flight."""
        self.client.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Write the weights and have the server load them.

        Raises:
            RuntimeError: it did not.
        """
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in iterator}
        save_file(weights, self.folder / "model.safetensors", metadata={"format": "pt"})
        request = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        ask(self.client.server_url, "/collective_rpc", request)
        ask(self.client.server_url, "/reset_prefix_cache")

    def resume(self) -> None:
        """Let the requests go on."""
        self.client.resume()

    def destroy(self) -> None:
        """Nothing is held: the last checkpoint stays."""


class LabelledTransfer:
    """Another transfer, after which the server knows its weights by the version that the trainer counts.

    Args:
        transfer: what moves the weights.
        url: of the server.
        next_version: the version that the weights sent now will have.
        found: told at the beginning whether the server's answers have labels (vLLM 0.32, `--enable-scale-out`).
    """

    def __init__(
        self,
        transfer: WeightTransferProtocol,
        url: str,
        next_version: Callable[[], int],
        found: Callable[[bool], None],
    ) -> None:
        self.transfer, self.url = transfer, url.rstrip("/")
        self.next_version, self.found = next_version, found
        self.labelled = False

    def init_weight_transfer(self) -> None:
        """As the transfer does, then ask the server."""
        self.transfer.init_weight_transfer()
        request: dict[str, Any] = {"token_ids": [1], "sampling_params": {"max_tokens": 1, "detokenize": False}}
        answer = requests.post(self.url + GENERATE, json=request, timeout=SECONDS)
        self.labelled = answer.status_code == 200 and bool(answer.json()["choices"][0].get("weight_versions"))
        if not self.labelled:
            LOG.warning(
                "the vLLM server does not say which weights drew each token: a token's version is the newest when "
                "its turn was asked for. vLLM 0.32 or newer says it with --enable-scale-out"
            )
        self.found(self.labelled)

    def pause(self) -> None:
        """As the transfer does."""
        self.transfer.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        """As the transfer does, then the label: no token is drawn between the two, the server is held."""
        self.transfer.send_weights(iterator)
        if self.labelled:
            ask(self.url, "/update_weight_version", {"new_version": str(self.next_version())})

    def resume(self) -> None:
        """As the transfer does."""
        self.transfer.resume()

    def destroy(self) -> None:
        """As the transfer does."""
        self.transfer.destroy()


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> requests.Response:
    """The answer to a request, which must be 200.

    Raises:
        RuntimeError: it is not.
    """
    answer = requests.post(url + path, json=body, timeout=SECONDS)
    if answer.status_code != 200:
        raise RuntimeError(
            f"the vLLM server at {url} answered {path} with {answer.status_code}: {answer.text[:500]}. Start it "
            "with VLLM_SERVER_DEV_MODE=1 in its environment"
        )
    return answer
