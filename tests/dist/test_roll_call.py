"""Ranks that are at different places are named, with the collective, the line and the step, before they go wrong."""

import re
import time

import torch

from megascratch.dist import comm
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.roll_call import join_roll_call
from megascratch.dist.testing import RankPool
from megascratch.errors import CollectiveError

CPU = torch.device("cpu")


def _mesh(**sizes: int) -> Mesh:
    mesh = Mesh.create(MeshSpec(**sizes), CPU, join_roll_call(timeout_s=20))
    assert mesh.roll_call is not None
    mesh.roll_call.step = 7
    return mesh


def _said(act: object, *args: object) -> str:
    """Return the message of the error that a rank ends with, or nothing."""
    try:
        act(*args)  # type: ignore[operator]
    except CollectiveError as error:
        return str(error)
    return ""


def _forward_sum(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    return comm.all_reduce(x, mesh.tp)


def _forward_gather(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    return comm.all_gather(x, mesh.tp)


def _run_everything() -> None:
    """Every kind of collective passes, again and again, and leaves nothing behind."""
    mesh = _mesh(tp=2)
    assert mesh.roll_call is not None
    for _ in range(2):
        x = torch.ones(2, 2, requires_grad=True)
        y = comm.all_to_all(comm.gather(comm.scatter(comm.copy(x, mesh.tp), mesh.tp), mesh.tp), mesh.tp, 0, 1)
        y = comm.reduce_scatter(comm.all_gather(y, mesh.tp), mesh.tp)
        y.sum().backward()
        send, receive = ([1, 2], [1, 3]) if mesh.rank == 0 else ([3, 1], [2, 1])
        assert len(comm.all_to_all_rows(torch.ones(sum(send), 2), send, receive, mesh.tp)) == sum(receive)
        comm.broadcast(comm.max_over(comm.sum_over(torch.ones(3), mesh.tp), mesh.tp), mesh.tp)
        assert comm.gather_bytes(b"x" * mesh.rank, mesh.tp) == [b"", b"x"]
        assert comm.pass_on(torch.full((2,), mesh.rank), mesh.tp)().tolist() == [1 - mesh.rank] * 2
        buffer, part = torch.ones(4), torch.ones(2)
        for work in (
            comm.start_all_reduce(buffer, mesh.tp),
            comm.start_reduce_scatter(buffer, part, mesh.tp),
            comm.start_all_gather(buffer, part, mesh.tp),
        ):
            assert work is not None
            work.wait()
        move = comm.isend if mesh.rank else comm.irecv
        move(torch.ones(1), mesh.tp, 1 - mesh.rank, 3).wait()
        comm.barrier(mesh.tp)
    comm.barrier(mesh.world)
    left = [
        name
        for group in ("tp", "world")
        for n in range(200)
        for name in [f"{group}/{n}"]
        if mesh.roll_call.store.check([f"{name}/left"])
    ]
    assert not left


def _swapped() -> str:
    """Rank 1 sums and gathers in the other order; the sum's bytes would be taken for the gather's."""
    mesh, x = _mesh(tp=2), torch.ones(2)
    order = (_forward_sum, _forward_gather) if mesh.rank == 0 else (_forward_gather, _forward_sum)
    comm.barrier(mesh.tp)
    return _said(lambda: [act(x, mesh) for act in order])


def _skipped_in_backward() -> str:
    """Rank 1 does not give its gradient to a sum, and goes on to the next collective."""
    mesh = _mesh(tp=2)
    x = torch.ones(2, requires_grad=True)

    def entered(x: torch.Tensor) -> torch.Tensor:
        return comm.copy(x, mesh.tp)

    y = entered(x).sum()
    return _said(lambda: (mesh.rank == 0 and y.backward(), comm.sum_over(x, mesh.tp)))


def _crossed() -> str:
    """0 waits over dp for 2, 2 over tp for 3, 3 over dp for 1, and 1 over tp for 0."""
    mesh, x = _mesh(tp=2, dp=2), torch.ones(2)
    axes = (mesh.dp, mesh.tp) if mesh.rank in (0, 3) else (mesh.tp, mesh.dp)
    return _said(lambda: [comm.sum_over(x, axis) for axis in axes])


def _other_transfer() -> str:
    """The receiver expects another shape."""
    mesh = _mesh(pp=2)
    move = comm.isend if mesh.pp.is_first else comm.irecv
    return _said(lambda: move(torch.ones(2 + mesh.rank), mesh.pp, 1 - mesh.rank, 5).wait())


def _never_comes() -> str:
    """Rank 1 does something else for longer than the time-out."""
    mesh = Mesh.create(MeshSpec(tp=2), CPU, join_roll_call(timeout_s=1))
    if mesh.rank == 1:
        time.sleep(3)
        return ""
    return _said(lambda: comm.barrier(mesh.tp))


def test_everything_passes_that_is_alike(pool: RankPool) -> None:
    pool.run(2, _run_everything)


def test_a_swapped_order_is_named_by_all_ranks(pool: RankPool) -> None:
    messages = pool.run(2, _swapped)
    assert messages[0] == messages[1]
    assert re.search(
        r"rank 0  step 7: all_reduce over tp of ranks \(0, 1\) of \[2\] float32"
        r" at test_roll_call\.py:\d+ _forward_sum ← .*\n"
        r" +rank 1  step 7: all_gather over tp of ranks \(0, 1\) of \[2\] float32"
        r" at test_roll_call\.py:\d+ _forward_gather ← .*\n"
        r" +before that, all of them  step 7: barrier .* _swapped",
        messages[0],
    )


def test_a_skipped_gradient_is_named_by_the_line_of_its_forward(pool: RankPool) -> None:
    for message in pool.run(2, _skipped_in_backward):
        assert re.search(r"rank 0 .*all_reduce .* at backward of test_roll_call\.py:\d+ entered", message)
        assert re.search(r"rank 1 .*all_reduce .* at test_roll_call\.py:\d+ <lambda>", message)


def test_ranks_that_wait_over_different_axes_are_all_named(pool: RankPool) -> None:
    messages = pool.run(4, _crossed)
    assert all("wait for each other" in message for message in messages)
    for axis, ranks, rank in (("tp", "2, 3", 2), ("dp", "1, 3", 3)):
        line = rf"rank {rank}  step 7: all_reduce over {axis} of ranks \({ranks}\) of \[2\] float32 at test_roll_call"
        assert all(re.search(line, message) for message in messages)


def test_a_transfer_of_another_shape_and_a_rank_that_never_comes(pool: RankPool) -> None:
    for message in pool.run(2, _other_transfer):
        assert re.search(r"rank 0 .*send to rank 1 under tag 5 of \[2\] float32", message)
        assert re.search(r"rank 1 .*receive from rank 0 under tag 5 of \[3\] float32", message)
    message, _ = pool.run(2, _never_comes)
    assert re.search(r"rank\(s\) \[1\] did not come within 1 s\n +rank 0 .*barrier over tp", message)
