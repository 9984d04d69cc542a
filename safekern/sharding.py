"""Sharded parameters: which part of a DTensor this process holds, and talking to the processes that hold the rest.

Everything else works on local tensors and row-major positions in the whole parameter, and asks here how they relate.
"""

import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from safekern.errors import InvalidArgumentError, ScoringError
from safekern.indices import index_dtype

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_Done = TypeVar("_Done")

# What almost every tensor is. Optimizers ask in every step, many times for each parameter.
_PLAIN = frozenset({Tensor, nn.Parameter})


def in_process_group() -> bool:
    """Whether this process is one of a group, be it the only one."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor: what FSDP2 and tensor parallelism make of a parameter, sharded or replicated."""
    if type(tensor) in _PLAIN:
        return False
    # Importing the module takes long, and before anybody did there can be none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: the same memory, not a copy; a plain tensor itself."""
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def reshard(model: nn.Module) -> None:
    """Puts FSDP2's sharded parameters back into a model, each process for itself.

    A forward without a backward, such as an evaluation, leaves whole ones in their place, which get no gradient.
    """
    for module in fully_sharded(model):
        module.reshard()


def fully_sharded(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` (FSDP2) was called for."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_gathered(param: Tensor) -> bool:
    """Whether FSDP2 made it of a parameter's shards for a forward, to free it later: nothing that a model keeps.

    A backward puts the sharded parameters back; after a forward alone, such as an evaluation, these stay in the model.
    FSDP2 has no public way to ask, and the tensors bear no mark.
    """
    # Loaded before any module can be sharded.
    module = sys.modules.get("torch.distributed._composable_state")
    if module is None:
        return False
    return any(
        param is getattr(held, temporary, None)
        for state in {ref() for ref in list(module._module_state_mapping.values())}
        for held in _held_by_fsdp(state)
        for temporary in ("_unsharded_param", "_sharded_post_forward_param")
    )


def _held_by_fsdp(state: Any) -> Iterator[Any]:
    """What FSDP2 knows of each parameter that it shards as a group of this state."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        # Earlier versions of torch had but one, and states of other tools are kept in the same place.
        groups = [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        yield from getattr(group, "fsdp_params", ())


def like(tensor: Tensor, piece: Tensor) -> Tensor:
    """A tensor sharded as another one, of which this process holds ``piece``; the piece itself for a plain one.

    The piece may be of a subclass of tensors, and on another device than the mesh's, as with FSDP2's CPU offloading.
    """
    if not is_sharded(tensor):
        return piece
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import TensorMeta

    # DTensor.from_local would move the piece to the mesh's device, and give autograd a view of it.
    meta = TensorMeta(tensor.shape, _dense(tensor.shape), piece.dtype)
    return DTensor(piece, tensor._spec.shallow_copy_with_tensor_meta(meta), requires_grad=False)


def part(tensor: Tensor, param: Tensor) -> Tensor:
    """What belongs to the part of a parameter that this process holds.

    Args:
        tensor: of the parameter's shape, whole or sharded; if in another way than the parameter, all processes have to
            call this together.
        param: plain or sharded.
    """
    if is_sharded(tensor) and is_sharded(param) and tensor.device_mesh == param.device_mesh:
        return local(tensor.redistribute(placements=param.placements))
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor
    shard = Shard.of(param)
    return whole[tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.local_shape, strict=True))]


def _is_packed(param: "DTensor", position: int) -> bool:
    """Whether a mesh dimension takes every so-manieth piece of a parameter, and not for another one to have one run."""
    placement: Any = param.placements[position]
    pieces = getattr(placement, "split_factor", 1)
    if pieces == 1:
        return False
    later = zip(param.device_mesh.shape[position + 1 :], param.placements[position + 1 :], strict=True)
    # As FSDP2 has it over tensor parallelism (torch.distributed.fsdp, FSDPParam).
    runs = math.prod([size for size, other in later if other.is_shard(placement.dim)])
    return bool(pieces != runs)


@dataclass(frozen=True)
class Shard:
    """Where the part of a parameter that this process holds lies in the whole: a box of its elements.

    Attributes:
        shape: of the whole parameter.
        offset: the first element of the box, per dimension.
        local_shape: the size of the box, per dimension; it may be empty.
        owner: False where another process holds the same elements and speaks for them, so that each element is counted
            once over all processes.
    """

    shape: torch.Size
    offset: tuple[int, ...]
    local_shape: tuple[int, ...]
    owner: bool

    @classmethod
    def of(cls, param: Tensor) -> "Shard":
        """The shard of a parameter. A plain tensor is held whole by every process, and the first speaks for it.

        Raises:
            InvalidArgumentError: a DTensor that holds partial sums, or a part that is no box.
        """
        if not is_sharded(param):
            rank = dist.get_rank() if in_process_group() else 0
            return cls(param.shape, (0,) * param.ndim, tuple(param.shape), rank == 0)
        from torch.distributed.tensor import Partial, Replicate
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if any(isinstance(placement, Partial) for placement in param.placements):
            raise InvalidArgumentError(
                f"a parameter with the placements {param.placements} holds partial sums: redistribute it first"
            )
        if any(_is_packed(param, position) for position in range(len(param.placements))):
            raise InvalidArgumentError(
                f"a parameter of shape {tuple(param.shape)} with the placements {param.placements} is spread by tensor "
                "parallelism in pieces, as fused gate and up projections are, which safekern does not follow: leave it "
                "out (select= of score), or shard the model by fully_shard (FSDP2) instead"
            )
        coordinate = param.device_mesh.get_coordinate()
        if coordinate is None:
            return cls(param.shape, (0,) * param.ndim, (0,) * param.ndim, False)
        # Sharded twice along one dimension (FSDP2 over tensor parallelism), it is still one run of rows.
        local_shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
        # A mesh that is a slice of a larger one (FSDP2 beside tensor parallelism) has its like in the other slices.
        first = bool((param.device_mesh.mesh == 0).any()) and all(
            position == 0
            for position, placement in zip(coordinate, param.placements, strict=True)
            if isinstance(placement, Replicate)
        )
        return cls(param.shape, tuple(offset), tuple(local_shape), first)

    @property
    def whole(self) -> bool:
        """Whether the box is the whole parameter."""
        return tuple(self.local_shape) == tuple(self.shape)

    @property
    def numel(self) -> int:
        """How many elements the box has."""
        return math.prod(self.local_shape)

    def inside(self, indices: Tensor) -> "slice | Tensor":
        """Which of some elements of the whole parameter lie in the box.

        Args:
            indices: int32 or int64 [k], ascending row-major positions in the whole parameter.

        Returns:
            Their places in ``indices``, ascending: a slice, or int64 where they are no run.
        """
        if self.whole:
            return slice(0, indices.numel())
        if not self.numel:
            return slice(0, 0)
        first = self._ravel(self.offset, self.shape)
        last = self._ravel([o + n - 1 for o, n in zip(self.offset, self.local_shape, strict=True)], self.shape)
        # Rows before and after the box go at once, so that the rest costs as much as the box has.
        start, end = torch.searchsorted(
            indices, torch.tensor([first, last + 1], dtype=indices.dtype, device="cpu")
        ).tolist()
        if last - first + 1 == self.numel:
            return slice(start, end)
        rest = indices[start:end].long()
        kept = torch.ones(rest.shape, dtype=torch.bool, device=rest.device)
        for size, offset, length in reversed(list(zip(self.shape, self.offset, self.local_shape, strict=True))):
            position = rest % size
            kept &= (position >= offset) & (position < offset + length)
            rest = rest // size
        places: Tensor = kept.nonzero().view(-1) + start
        return places

    def to_local(self, indices: Tensor) -> Tensor:
        """Positions in the box of elements that lie in it.

        Args:
            indices: int32 or int64 [k], row-major positions in the whole parameter, all of them :meth:`inside`.

        Returns:
            [k], row-major positions in the box; int32 unless the box is too large for that.
        """
        return self._moved(indices, self.shape, self.local_shape, [-o for o in self.offset])

    def to_global(self, indices: Tensor) -> Tensor:
        """The inverse of :meth:`to_local`; ascending positions stay ascending."""
        return self._moved(indices, self.local_shape, self.shape, self.offset)

    def _moved(self, indices: Tensor, source: Sequence[int], target: Sequence[int], shift: Sequence[int]) -> Tensor:
        dtype = index_dtype(math.prod(target))
        if self.whole:
            return indices.to(dtype)
        rest = indices.long()
        moved, stride = torch.zeros_like(rest), 1
        for size, other, offset in reversed(list(zip(source, target, shift, strict=True))):
            moved += (rest % size + offset) * stride
            rest = rest // size
            stride *= other
        return moved.to(dtype)

    @staticmethod
    def _ravel(position: Sequence[int], shape: Sequence[int]) -> int:
        index = 0
        for size, coordinate in zip(shape, position, strict=True):
            index = index * size + coordinate
        return index


class Processes:
    """Those that hold a model together; alone, its methods return what they are given.

    Every process has to call the same methods in the same order. Never from a hook of backward: the order in which
    hooks run is not the same everywhere.

    Args:
        device: where the processes can talk: that of the model.
        together: False for a model that this process has to itself, though there may be others.
    """

    def __init__(self, device: torch.device, *, together: bool) -> None:
        self._device = device
        self.size = dist.get_world_size() if together else 1

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> "Processes":
        """Those that hold parts of these parameters: all there are.

        Raises:
            InvalidArgumentError: a device mesh leaves processes out, so that what they hold is unknown here.
        """
        meshes = {param.device_mesh for param in params if is_sharded(param)}
        for mesh in meshes:
            if mesh._get_root_mesh().size() != dist.get_world_size():
                raise InvalidArgumentError(
                    f"a parameter is sharded over {mesh._get_root_mesh().size()} of {dist.get_world_size()} processes: "
                    "slice its device mesh from one over all of them, in which replicas are a dimension too (HSDP)"
                )
        if not meshes:
            return cls(torch.device("cpu"), together=False)
        return cls(torch.device(meshes.pop().device_type), together=True)

    def speaks_for(self, shard: Shard) -> bool:
        """Whether what is counted over all processes counts that shard here."""
        return self.size == 1 or shard.owner

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over processes of a tensor of one shape, on the device of the one given."""
        if self.size == 1:
            return tensor
        summed = tensor.to(self._device, copy=True)
        dist.all_reduce(summed)
        return summed.to(tensor.device)

    def every(self, condition: bool) -> bool:
        """Whether a condition holds in every process."""
        return condition if self.size == 1 else int(self.total(torch.tensor(int(condition), device="cpu"))) == self.size

    def stacked(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, along a new first dimension in the order of their ranks."""
        if self.size == 1:
            return tensor[None]
        mine = tensor.to(self._device).contiguous()
        gathered = mine.new_empty((self.size, *mine.shape))
        dist.all_gather(list(gathered.unbind()), mine)
        return gathered.to(tensor.device)

    def joined(self, values: Tensor) -> Tensor:
        """The 1-D tensors of all processes, of any lengths, one after the other in the order of their ranks."""
        if self.size == 1:
            return values
        lengths = cast(list[int], self.stacked(torch.tensor(values.numel(), device="cpu")).tolist())
        padded = values.new_zeros(max(lengths))
        padded[: values.numel()] = values
        return torch.cat([row[:length] for row, length in zip(self.stacked(padded), lengths, strict=True)])

    def agreed(self, work: Callable[[], _Done], say: Callable[[_Done], int] = lambda _: 0) -> tuple[_Done, list[int]]:
        """Does some work in every process, and fails in all of them if it fails in one; one collective.

        Args:
            work: what each process does by itself: it must not communicate.
            say: what it tells the others of its result.

        Returns:
            The result here, and what every process told.

        Raises:
            ScoringError: the work failed in another process.
        """
        if self.size == 1:
            done = work()
            return done, [say(done)]
        try:
            done = work()
            said = say(done)
        except Exception as error:
            # Where the others are gone, there is nobody to tell.
            with suppress(RuntimeError):
                self._told(0, _told_of(error))
            raise
        return done, self._told(said)

    def alike(self, work: Callable[[], _Done], key: Callable[[_Done], object], advice: str) -> _Done:
        """:meth:`agreed` on what has to be the same in every process, since the collectives to come depend on it.

        Args:
            work: as for :meth:`agreed`.
            key: of its result, what has to be the same: by its ``repr``.
            advice: what to do otherwise.

        Raises:
            InvalidArgumentError: it is not the same, which all processes raise.
            ScoringError: the work failed in another process.
        """
        done, said = self.agreed(work, lambda done: zlib.crc32(repr(key(done)).encode()))
        for rank, other in enumerate(said):
            if other != said[0]:
                raise InvalidArgumentError(f"process {rank} was called with other arguments than process 0: {advice}")
        return done

    def _told(self, said: int, failure: str = "") -> list[int]:
        told, failed = self.stacked(torch.tensor([said, bool(failure)], device="cpu")).unbind(1)
        if failed.any():
            first = int(failed.nonzero()[0])
            mine = failure.encode() if dist.get_rank() == first else b""
            text = self.joined(torch.tensor(list(mine), dtype=torch.uint8, device="cpu"))
            raise _cannot_go_on(bytes(text.tolist()).decode())
        return cast(list[int], told.tolist())


@contextmanager
def failing_together(task: str, *, together: bool) -> Iterator[Callable[[], None]]:
    """Lets no process wait for another that failed in a task of all, and says which one failed and how.

    A process that raises leaves a note in the store by which the processes found each other. A collective could not
    carry it: the others may be in the middle of one that this process never joins. They look for a note when they call
    what is yielded, which raises then, and when a collective fails because a process is gone or did not come in time.
    :meth:`Processes.agreed` does not let them wait; this is for what may fail between collectives that are not ours.

    Args:
        task: its name. Every process has to enter it as often as the others.
        together: False where this process works alone.

    Raises:
        ScoringError: another process failed.
    """
    # torch has no public way to it. Only MPI does without.
    store = dist.distributed_c10d._get_default_store() if together else None
    if store is None:
        yield lambda: None
        return
    rank = dist.get_rank()
    note = f"safekern/{task}/{store.add(f'safekern/{task}/of/{rank}', 1)}"

    def check() -> None:
        said = ""
        # The store may be gone with the process that kept it.
        with suppress(RuntimeError):
            said = store.get(note).decode() if store.check([note]) else ""
        if said:
            raise _cannot_go_on(said)

    try:
        yield check
    except BaseException as error:
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error)):
            check()
            raise ScoringError(
                f"another process ended, or did not come within the process group's timeout, while process {rank} "
                "waited for it: what it wrote last says why"
            ) from error
        with suppress(RuntimeError):
            # Unless another was first: what failed since then failed because of it.
            store.compare_set(note, "", _told_of(error))
        raise


def _told_of(error: BaseException) -> str:
    told = f"process {dist.get_rank()} failed: {type(error).__name__}: {str(error)[:1000]}"
    # A file's name may hold what UTF-8 cannot express.
    return told.encode(errors="replace").decode()


def _cannot_go_on(told: str) -> ScoringError:
    return ScoringError(f"{told} (so this one, process {dist.get_rank()}, cannot go on)")


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
