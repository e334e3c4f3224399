"""verl's arithmetic without verl: its wheel asks for Ray, vLLM's neighbours and older transformers, so the one module
that is compared with is loaded by itself, beside stand-ins for what it imports and does not need."""

import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

_NEEDED = ("verl.utils.torch_functional", "verl.utils.groupwise")


@functools.cache
def verl_core_algos() -> Any:
    """Return verl's `core_algos`; skips the test where verl is not installed."""
    found = importlib.util.find_spec("verl")  # does not run the package
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps verl==0.9.1")
    root = Path(found.origin).parent
    names = ["omegaconf", "tensordict", "verl", "verl.utils", "verl.utils.device", "verl.utils.import_utils"]
    names += ["verl.trainer", "verl.trainer.config", "verl.workers", "verl.workers.config"]
    modules: dict[str, Any] = {name: mock.MagicMock(name=name) for name in names}
    modules["verl"].utils = modules["verl.utils"]
    modules["verl.utils.import_utils"].deprecated = lambda *_, **__: lambda function: function
    modules["verl.workers.config"].ActorConfig = types.SimpleNamespace
    modules["verl.trainer.config"].AlgoConfig = type("AlgoConfig", (), {})
    modules["omegaconf"].DictConfig = dict
    modules["tensordict"].TensorDict = dict
    modules["verl.utils.device"].get_device_name = lambda: "cpu"
    with pytest.MonkeyPatch.context() as patched:
        for name, stand_in in modules.items():  # one by one: `patch.dict` would forget what torch imports meanwhile
            patched.setitem(sys.modules, name, stand_in)
        for name in _NEEDED:
            module = _load(name, root)
            patched.setitem(sys.modules, name, module)
            setattr(modules["verl.utils"], name.rpartition(".")[2], module)
            for public in ("as_torch_index", "group_mean_std"):
                if hasattr(module, public):
                    setattr(modules["verl.utils"], public, getattr(module, public))
        return _load("verl.trainer.ppo.core_algos", root)


def _load(name: str, root: Path) -> types.ModuleType:
    path = root.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
