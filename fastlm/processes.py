"""The processes of a training run: one, or several that torchrun started.

Each takes its share of every batch and holds the model whole (DDP) or a shard of it (FSDP2,
arXiv:2304.11277). Gradients are means over the batch, so that a step of several processes is that of
one to rounding. What a run reads, writes and prints, the first process does alone; the others wait, and
where it fails, all end. Collectives on tensors of the model run on NCCL on GPUs, the rest on gloo.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

# DistributedDataParallel's word for buffers that are broadcast before every forward.
_SYNC_BUFFERS = "forward_sync_buffers"  # torch 2.13 and later
if _SYNC_BUFFERS not in inspect.signature(nn.parallel.DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"

# How long one process waits for another: in a step, and while one works alone for all (encodes a corpus,
# writes a checkpoint). One that was killed is noticed at once, since its connections close.
STEP_TIMEOUT = timedelta(minutes=10)
ALONE_TIMEOUT = timedelta(hours=12)


class Elsewhere(ValueError):
    """Another process of the run failed, and reports why."""


class Lost(RuntimeError):
    """A process of the run ended or answers no more."""


class Alone:
    """A run of one process, and what a run of several can do too."""

    rank, size = 0, 1

    def device(self, name: str) -> torch.device:
        """The device of this process, for the one that a run was given."""
        return torch.device(name)

    # What is done once, and told

    def every(self, function: Callable[[], T]) -> T:
        """function() on every process; where one fails, all do."""
        return function()

    def first(self, function: Callable[[], T]) -> T | None:
        """function() on the first process, None on the others; where it fails, all do."""
        return function()

    def each_machine(self, function: Callable[[], T]) -> T:
        """What function() gives on the first process of this machine; the others don't call it."""
        return function()

    def tell(self, value: T) -> T:
        """The first process's value."""
        return value

    def check_same(self, what: str, value: object) -> None:
        """``ValueError`` unless every process has the same value."""

    def sum(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over the processes."""
        return values

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raises :class:`Lost` where a collective fails for want of a process."""
        yield

    def leave(self) -> None:
        """To be called by all at the end."""

    # Training

    def share(self, count: int) -> tuple[int, int]:
        """This process's part of a batch of ``count``: where it begins, and how many it is."""
        return 0, count

    def seed(self, seed: int, step: int) -> None:
        """Sets the random state of a step, where it isn't just carried on."""

    def wrap(self, model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
        """Puts the model on the device; gives what to call for a loss to differentiate."""
        return model.to(device)

    @contextmanager
    def gradients(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around the forward and backward of a pass: the gradients of a step's passes are summed over
        the processes in its last one."""
        yield

    def release(self, model: nn.Module) -> None:
        """Lets go of what a forward that no backward follows has gathered."""

    # Tensors, by name

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may hold a shard."""
        return tensor

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them whole, on the first process; none on the others."""
        return tensors

    def spread(self, tensors: dict[str, Tensor] | None, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of the first process on all, each sharded as the one of its name in ``like``."""
        return tensors


class Group(Alone):
    """Several processes, as torchrun's environment describes them."""

    def __init__(self):
        self.owned = not dist.is_initialized()
        if self.owned:
            gpus = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=STEP_TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.control = dist.new_group(backend="gloo", timeout=ALONE_TIMEOUT)

    def device(self, name: str) -> torch.device:
        device = torch.device(name)
        if device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(f"device is {name}, but each process takes its own GPU: give cuda")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def every(self, function):
        return self._settle(function, True)

    def first(self, function):
        return self._settle(function, self.rank == 0)

    def each_machine(self, function):
        result = self._settle(function, self.local_rank == 0)
        return self._all(result)[self.rank - self.local_rank]

    def _settle(self, function, mine: bool):
        result = error = None
        if mine:
            try:
                result = function()
            except Exception as caught:
                error = caught
        messages = self._all(None if error is None else str(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed and failed[0] == self.rank:
            raise error
        if failed:
            raise Elsewhere(f"process {failed[0]}: {messages[failed[0]]}") from error
        return result

    # Objects between a run's own processes are pickled on the way; what lies in files never is.

    def _all(self, value) -> list:
        values = [None] * self.size
        with self.watched():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def tell(self, value):
        box = [value]
        with self.watched():
            dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def check_same(self, what, value):
        values = self._all(value)
        others = [rank for rank, v in enumerate(values) if v != values[0]]
        if others:
            message = f"processes 0 and {others[0]} of this run have different {what}"
            raise (Elsewhere if self.rank else ValueError)(message)

    def sum(self, *values):
        total = torch.tensor(values, dtype=torch.float64)
        with self.watched():
            dist.all_reduce(total)
        return tuple(total.tolist())

    @contextmanager
    def watched(self):
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
            if isinstance(error, Lost) or not known:
                raise
            reason = str(error).strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0]
            raise Lost(f"process {self.rank} lost another process of this run: {reason}") from error

    def leave(self):
        if self.owned:
            dist.destroy_process_group()

    def share(self, count):
        if count < self.size:
            raise ValueError(f"batch_size is {count}: {self.size} processes need a sequence each")
        begin, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return begin, end - begin

    def seed(self, seed, step):
        state = np.random.SeedSequence([seed, step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def wrap(self, model, parallel, device):
        if parallel == "fsdp":
            return _shard(model, device, self.size)
        return nn.parallel.DistributedDataParallel(
            model.to(device),
            device_ids=None if device.index is None else [device.index],
            gradient_as_bucket_view=True,
            **{_SYNC_BUFFERS: False},  # they are constants
        )

    @contextmanager
    def gradients(self, wrapped, last):
        if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.set_requires_gradient_sync(last)
            yield
        elif last:
            yield
        else:
            with wrapped.no_sync():
                yield

    def release(self, model):
        if hasattr(model, "reshard"):
            model.reshard()

    def whole(self, tensor):
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def gather(self, tensors):
        kept = {}
        for name, tensor in tensors.items():  # one at a time: a GPU may not hold all of them whole
            whole = self.whole(tensor.detach())
            if self.rank == 0:
                kept[name] = whole.cpu()
        return kept

    def spread(self, tensors, like):
        mine = {} if tensors is None else tensors
        spread = {}
        for name, shape, dtype in self.tell([(n, t.shape, t.dtype) for n, t in mine.items()]):
            model = like.get(name)
            device = torch.device("cpu") if model is None else model.device
            whole = (
                mine[name].to(device) if self.rank == 0 else torch.empty(shape, dtype=dtype, device=device)
            )
            with self.watched():
                dist.broadcast(whole, 0)
            spread[name] = _sharded_as(model, whole)
        return spread


def _shard(model: nn.Module, device: torch.device, size: int) -> nn.Module:
    """The model with its parameters sharded: those of each block are gathered when it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size,))
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh).to(device)


def _sharded_as(model: Tensor | None, whole: Tensor) -> Tensor:
    """This process's shard, where ``model`` is a sharded tensor of that shape."""
    if not hasattr(model, "full_tensor") or model.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, model.device_mesh, model.placements, src_data_rank=None)


def join() -> Alone:
    """The run that this process belongs to: several where torchrun started it or a process group is there
    already, else this one alone."""
    if not dist.is_available():
        return Alone()
    if dist.is_initialized() or dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return Group()
    return Alone()
