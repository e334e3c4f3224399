"""What a GPU says of itself, through NVML: utilisation, memory, power, energy, temperature, throttling, ECC errors."""

from collections.abc import Callable
from typing import Any

import torch


class GpuMonitor:
    """Reads one GPU's sensors; silent where there is no GPU, no driver, or no such sensor.

    Args:
        device: whose sensors are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type != "cuda":
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError:
            self._handle = None

    def read(self) -> dict[str, float]:
        """Return the sensors' values now; units are in the names."""
        if self._handle is None:
            return {}
        import pynvml

        handle, values = self._handle, {}
        sensors: dict[str, Callable[[], float]] = {
            "gpu/utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu/memory_used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
            "gpu/power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "gpu/energy_j": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            "gpu/temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "gpu/throttle_reasons": lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
            "gpu/ecc_uncorrected": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            ),
        }
        for name, sensor in sensors.items():
            try:
                values[name] = float(sensor())
            except pynvml.NVMLError:  # a board without this sensor
                continue
        return values
