"""A Chrome trace of one step: what every operator, module, pipeline action and collective did, and when."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megascratch.engine.engine import Engine


@contextmanager
def traced(engine: Engine, path: Path) -> Iterator[None]:
    """Write the trace of the body to a file that chrome://tracing and Perfetto open.

    Its regions are named as the code base names them: `layers.3.attn`, `forward 0F1`, `all_gather tp`, `optimizer`.

    Args:
        engine: whose modules and clock name their regions meanwhile.
        path: the JSON file; folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if engine.mesh.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    hooks = [
        hook
        for stage in engine.stages.values()
        for name, module in stage.named_modules()
        if name
        for hook in _named(name, module)
    ]
    engine.mesh.clock.naming = True
    try:
        with profile(activities=activities) as profiler:
            yield
    finally:
        engine.mesh.clock.naming = False
        for hook in hooks:
            hook.remove()
    profiler.export_chrome_trace(str(path))


def _named(name: str, module: nn.Module) -> list[Any]:
    """Name a module's forward, recomputed ones included."""
    running: list[record_function] = []

    def enter(*_: Any) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
