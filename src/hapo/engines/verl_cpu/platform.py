"""The platform "cpu" of verl. Ray schedules its workers on GPUs that are only said to be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class CPUDevice:
    """`torch.cpu`, with the calls of `torch.cuda` that verl makes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        """It is."""
        return True

    def get_device_name(self) -> str:
        """As verl's table of speeds knows it."""
        return "CPU"

    def empty_cache(self) -> None:
        """There is none."""

    def ipc_collect(self) -> None:
        """Nothing to collect."""

    def max_memory_allocated(self) -> int:
        """Resident bytes of this process."""
        return psutil.Process().memory_info().rss

    max_memory_reserved = memory_allocated = memory_reserved = max_memory_allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Of the CPU's generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Of the CPU's generator."""
        torch.set_rng_state(state)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """gloo, float32, no accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CPUDevice()

    def is_available(self) -> bool:
        """It is."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Only when asked for by name: never in the place of an accelerator that was not found."""
        return False

    def current_device(self) -> Any:
        """What tensors are moved to."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """One."""
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing is pending."""

    def manual_seed(self, seed: int) -> None:
        """Seed the generator."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings: str) -> None:
        """There are none."""

    def empty_cache(self) -> None:
        """There is none."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """None."""
        return None, None

    def communication_backend_name(self) -> str:
        """gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Read by nobody."""
        return "CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No ranges."""
        yield

    def profiler_start(self) -> None:
        """No profiler."""

    def profiler_stop(self) -> None:
        """No profiler."""

    def ray_resource_name(self) -> str:
        """verl counts GPUs before it starts: ray_kwargs.ray_init.num_gpus says how many ranks there are."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """None."""
        return []

    def is_ipc_supported(self) -> bool:
        """Weights go through shared memory."""
        return False

    def cudart(self) -> Any:
        """None."""
        return None
