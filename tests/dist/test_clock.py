import time

import pytest
import torch

from megascratch.dist import comm
from megascratch.dist.clock import StepClock
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed

CPU = torch.device("cpu")


def test_every_moment_counts_once_for_the_innermost_region() -> None:
    clock = StepClock(CPU)
    start = time.perf_counter()
    with clock.region("backward"):
        time.sleep(0.02)
        with clock.region("communication"):
            time.sleep(0.05)
        with clock.region("communication"):
            time.sleep(0.01)
        time.sleep(0.01)
    with clock.region("optimizer"):
        pass
    whole = time.perf_counter() - start
    seconds = clock.read()
    assert seconds["backward"] >= 0.03 and seconds["communication"] >= 0.06
    assert 0 <= seconds["optimizer"] < 0.01
    assert 0.8 * whole < sum(seconds.values()) <= whole
    assert clock.read() == {}, "a reading begins anew"


def test_a_region_that_fails_is_left() -> None:
    clock = StepClock(CPU)
    with pytest.raises(ValueError, match="inside"), clock.region("forward"):
        raise ValueError("inside")
    assert clock.read().keys() == {"forward"}


def test_reading_inside_a_region_is_our_mistake() -> None:
    clock = StepClock(CPU)
    with clock.region("forward"), pytest.raises(AssertionError, match="forward"):
        clock.read()


@distributed(world=2)
def test_the_time_of_collectives_is_communication() -> None:
    """The rank that comes early waits for the other: that is what communication costs it."""
    mesh = Mesh.create(MeshSpec(tp=2), CPU)
    comm.barrier(mesh.tp)
    mesh.clock.read()
    if mesh.rank == 1:
        time.sleep(0.2)
    with mesh.clock.region("forward"):
        comm.all_reduce(torch.ones(3), mesh.tp)
    waited = mesh.clock.read()["communication"]
    assert waited > 0.1 if mesh.rank == 0 else waited < 0.1
