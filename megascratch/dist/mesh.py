"""How ranks are arranged: `MeshSpec` is the arithmetic, `Axis` one direction of it, `Mesh` a running rank's own view.

Rank order is (pp, dp, cp, tp) with tp fastest, so a tensor-parallel group lies inside a node. By hand, for
pp=2, dp=1, cp=1, tp=2:

    rank   pp dp cp tp        tp groups  [0, 1] [2, 3]
    0      0  0  0  0         pp groups  [0, 2] [1, 3]
    1      0  0  0  1         dp groups  [0] [1] [2] [3]   (size 1: no process group, collectives are the identity)
    2      1  0  0  0
    3      1  0  0  1

Expert parallelism lies inside dp: `ep` neighbours along dp hold different experts, and `expert_data`, the other dp × cp
ranks, hold the same ones. So dp = 4 with ep = 2 has ep groups (0, 1) (2, 3), and experts are replicated over (0, 2)
(1, 3).

Six more derived axes are used by gradients: `data` = dp × cp, over which every gradient is summed; `shard` and
`replicas`, into which ZeRO takes it apart: consecutive ranks, which divide what ZeRO divides, and those that hold the
same part; `stage` = dp × cp × tp,
which together hold whole layers; `ends` = the first and the last pipeline rank, which hold the two copies of a tied
embedding; and `mirror` = ranks i and pp − 1 − i, which hold the same two stages where a schedule runs two copies of the
model in opposite directions.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from megascratch.config import Config, ParallelConfig
from megascratch.dist.clock import StepClock
from megascratch.dist.roll_call import RollCall, join_roll_call
from megascratch.errors import LayoutError, Problem

AXES = ("pp", "dp", "cp", "tp")  # slowest to fastest


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes, and the arithmetic between ranks and coordinates. No process group is involved."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1  # divides dp
    shard: int | None = None  # consecutive ranks of dp × cp that divide what ZeRO divides; all of them when None

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "MeshSpec":
        """Take the sizes from a resolved `[parallel]` section."""
        return cls(
            pp=parallel.pp,
            dp=parallel.dp or 1,
            cp=parallel.cp,
            tp=parallel.tp,
            ep=parallel.ep,
            shard=parallel.zero_ranks,
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in (*AXES, "ep")}

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def coords(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank along each axis."""
        assert 0 <= rank < self.world_size
        coords = {}
        for axis in reversed(AXES):
            rank, coords[axis] = divmod(rank, getattr(self, axis))
        return {**coords, "ep": coords["dp"] % self.ep}

    def rank(self, coords: Mapping[str, int]) -> int:
        """Return the rank at the given coordinates; axes left out are 0."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coords.get(axis, 0)
        return rank

    def group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Return, in order, the ranks that differ from `rank` only along `axes`: of `AXES`, or ep, or edp = dp/ep."""
        free = {part for axis in axes for part in (("edp", "ep") if axis == "dp" else (axis,))}
        own = self._parts(rank)
        return tuple(
            other
            for other in range(self.world_size)
            if all(c == own[axis] for axis, c in self._parts(other).items() if axis not in free)
        )

    def _parts(self, rank: int) -> dict[str, int]:
        """Return coordinates with dp taken apart into edp and ep."""
        coords = self.coords(rank)
        coords["edp"] = coords.pop("dp") // self.ep
        return coords

    def groups(self, axes: tuple[str, ...]) -> Iterator[tuple[int, ...]]:
        """Yield every group along `axes`, in the order of its first rank."""
        for rank in range(self.world_size):
            group = self.group(rank, axes)
            if group[0] == rank:
                yield group


@dataclass(frozen=True)
class Axis:
    """One mesh axis as one rank sees it.

    Attributes:
        name: of the axis, as `ParamSpec` uses it.
        size: number of ranks along it.
        rank: this rank's coordinate, 0 ≤ rank < size.
        ranks: global ranks along it, in order.
        group: process group, or None when size is 1: then every collective is the identity.
        clock: of this rank, which counts the time of collectives.
        roll_call: of this rank, which compares where ranks are before a collective; None outside of debug mode.
    """

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)
    clock: StepClock | None = field(default=None, compare=False, repr=False)
    roll_call: RollCall | None = field(default=None, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    def waiting(self, operation: str) -> AbstractContextManager[None]:
        """Count the body as time of communication along this axis; `operation` names it in a trace."""
        if self.clock is None:
            return nullcontext()
        return self.clock.region("communication", f"{operation} {self.name}")


@dataclass(frozen=True)
class Mesh:
    """A running rank's place: its coordinates, its axes and its device. Made once by the verb and passed down."""

    spec: MeshSpec
    rank: int
    device: torch.device
    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    data: Axis  # dp × cp
    ends: Axis  # first and last pipeline rank; size 1 elsewhere
    world: Axis
    mirror: Axis  # pipeline ranks i and pp − 1 − i
    ep: Axis  # neighbours along dp, which hold different experts
    expert_data: Axis  # the others along dp × cp, which hold the same
    stage: Axis  # dp × cp × tp: the ranks that hold the same layers
    shard: Axis  # consecutive ranks of data
    replicas: Axis  # ranks of data at the same place of their shard
    clock: StepClock  # the same one as its axes'

    def axis(self, name: str) -> Axis:
        """Return an axis by the name that a `ParamSpec` uses."""
        axis = getattr(self, name)
        assert isinstance(axis, Axis)
        return axis

    @property
    def coords(self) -> dict[str, int]:
        return self.spec.coords(self.rank)

    @property
    def roll_call(self) -> RollCall | None:
        return self.world.roll_call

    @classmethod
    def serial(cls, device: torch.device | None = None) -> "Mesh":
        """Return the mesh of one rank, without any process group: the serial model is the parallel model."""
        names = (
            "pp",
            "dp",
            "cp",
            "tp",
            "data",
            "ends",
            "world",
            "mirror",
            "stage",
            "shard",
            "replicas",
            "ep",
            "expert_data",
        )
        device = device or torch.device("cpu")
        return cls(MeshSpec(), 0, device, **{name: Axis(name) for name in names}, clock=StepClock(device))

    @classmethod
    def planned(cls, spec: MeshSpec, rank: int) -> "Mesh":
        """Return a rank's place in a mesh that does not run: sizes and coordinates, on the meta device, no groups."""

        def axis(name: str, axes: tuple[str, ...]) -> Axis:
            ranks = spec.group(rank, axes)
            return Axis(name, len(ranks), ranks.index(rank), ranks)

        derived = {"data": ("dp", "cp"), "stage": ("dp", "cp", "tp"), "ep": ("ep",), "expert_data": ("edp", "cp")}
        whole = {"world": AXES, **{name: (name,) for name in AXES}, **derived}
        axes = {name: axis(name, over) for name, over in whole.items()}
        data, n = axes["data"], spec.shard or axes["data"].size
        axes["shard"] = Axis("shard", n, data.rank % n)
        axes["replicas"] = Axis("replicas", data.size // n, data.rank // n)
        device = torch.device("meta")
        return cls(spec, rank, device, **axes, ends=Axis("ends"), mirror=Axis("mirror"), clock=StepClock(device))

    @classmethod
    def of(cls, config: Config, device: torch.device) -> "Mesh":
        """Make the mesh that a resolved recipe describes; see `create`."""
        debug = config.train.debug_collectives and dist.is_initialized()
        roll_call = join_roll_call(config.train.timeout_s) if debug else None
        return cls.create(MeshSpec.of(config.parallel), device, roll_call)

    @classmethod
    def create(cls, spec: MeshSpec, device: torch.device, roll_call: RollCall | None = None) -> "Mesh":
        """Make the process groups of every axis. Every rank of the default group must call this, at the same point.

        Args:
            spec: sizes of the axes.
            device: of this rank.
            roll_call: to compare where ranks are before each collective; on every rank, or on none.

        Raises: LayoutError: if the world has another size than the mesh.
        """
        if spec.world_size == 1 and not dist.is_initialized():
            return cls.serial(device)
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if world_size != spec.world_size:
            raise LayoutError(
                Problem(
                    f"world size = {world_size}",
                    f"must be pp {spec.pp} × dp {spec.dp} × cp {spec.cp} × tp {spec.tp} = {spec.world_size}",
                    f"start {spec.world_size} ranks",
                )
            )

        clock = StepClock(device)
        own_axis = partial(_own_axis, rank=rank, clock=clock, roll_call=roll_call)

        def make(name: str, axes: tuple[str, ...]) -> Axis:
            return own_axis(name, list(spec.groups(axes)))

        single = {axis: make(axis, (axis,)) for axis in AXES}
        ends = [tuple(dict.fromkeys((group[0], group[-1]))) for group in spec.groups(("pp",))]
        mirror = [
            tuple(dict.fromkeys((group[i], group[-1 - i])))
            for group in spec.groups(("pp",))
            for i in range((spec.pp + 1) // 2)
        ]
        data = make("data", ("dp", "cp"))
        n = spec.shard or data.size
        assert data.size % n == 0, f"shard {n} must divide dp × cp = {data.size}"
        if n == data.size:
            shard, replicas = data, Axis("replicas", ranks=(rank,))
        else:
            groups = list(spec.groups(("dp", "cp")))
            shard = own_axis("shard", [g[i : i + n] for g in groups for i in range(0, len(g), n)])
            replicas = own_axis("replicas", [g[i::n] for g in groups for i in range(n)])
        return cls(
            spec,
            rank,
            device,
            **single,
            data=data,
            shard=shard,
            replicas=replicas,
            stage=make("stage", ("dp", "cp", "tp")),
            ends=own_axis("ends", ends),
            mirror=own_axis("mirror", mirror),
            ep=make("ep", ("ep",)),
            expert_data=make("expert_data", ("edp", "cp")),
            world=make("world", AXES),
            clock=clock,
        )


def _own_axis(
    name: str, groups: list[tuple[int, ...]], rank: int, clock: StepClock, roll_call: RollCall | None
) -> Axis:
    """Create the process group of every group in `groups`, and return the one that holds this rank.

    Creating a group is collective over the whole world, so every rank walks through all of them in the same order.
    """
    own = Axis(name, ranks=(rank,))
    for ranks in groups:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks))
        if rank in ranks:
            assert group is not None
            own = Axis(name, len(ranks), ranks.index(rank), ranks, group, clock, roll_call)
    return own
