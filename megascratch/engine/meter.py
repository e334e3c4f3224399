"""What a step cost: tokens a second, utilisation in both conventions, where the time went, and memory."""

import resource
import sys

import torch

from megascratch.config import Config
from megascratch.dist.mesh import Mesh
from megascratch.engine.flops import peak_flops, token_flops

# Kinds of time that the engine, the pipeline and the collectives tell the clock; together a little less than the step.
PHASES = ("data", "forward", "backward", "optimizer", "communication")


class Meter:
    """Turns the time of a step into what is logged of it.

    Args:
        config: resolved.
        mesh: this rank's place; its clock says where the time went.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.mesh, self.n_devices = mesh, mesh.spec.world_size
        self.seq_length = config.data.seq_length
        self.flops = token_flops(config.model, config.data.seq_length)
        self.peak = None if config.log.peak_tflops is None else config.log.peak_tflops * 1e12
        if self.peak is None and mesh.device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(mesh.device))

    def values(self, n_samples: int, step_s: float, phases: dict[str, float]) -> dict[str, float | None]:
        """Return what is logged of a step.

        Args:
            n_samples: of the global batch.
            step_s: from asking for its data to the end of its update.
            phases: seconds of this rank, from `StepClock.read`.
        """
        tokens_per_s = n_samples * self.seq_length / step_s
        causal, palm = (tokens_per_s * flops / self.n_devices for flops in (self.flops.causal, self.flops.palm))
        return {
            "tokens_per_s": tokens_per_s,
            "tflops": causal / 1e12,  # a device
            "tflops_palm": palm / 1e12,
            "mfu": None if self.peak is None else causal / self.peak,
            "mfu_palm": None if self.peak is None else palm / self.peak,
            "step_s": step_s,
            **{f"{phase}_s": phases.get(phase, 0.0) for phase in (*PHASES, *(phases.keys() - PHASES))},
        }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held so far: of a GPU, what torch allocated; of a CPU, resident pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
