"""Scores and masks of models that several processes hold, against those of one process."""

import functools
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run
from torch import Tensor, nn

import safekern
from safekern import ranking
from safekern.scores import Scores

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


KINDS = ("normal", "ties", "one place", "zeros")


def gradients(kind: str) -> dict[str, Tensor]:
    """Accumulators with ties, zeros, -0.0 and denormals; the largest may all lie in one process."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (37, 8), "experts.w": (6, 5, 12), "c": (1, 64), "d": (50, 4)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if kind == "ties":
        found = {name: (grad * 2).round() / 2 for name, grad in found.items()}
        found["a"][:3] = -0.0
        found["d"][7] = 1e-42
    if kind == "one place":
        found = {name: grad * 1e-3 for name, grad in found.items()}
        found["a"][:5] *= 1e6
    if kind == "zeros":
        found = {name: grad * 0 for name, grad in found.items()}
        found["experts.w"][1, 2, 3] = 1
    return found


def scores_of(found: dict[str, Tensor]) -> Scores:
    # One of its own for each expert of a fused tensor.
    experts = torch.linspace(0.1, 2, 6).view(6, 1, 1)
    sigma = {"a": torch.tensor(0.5), "experts.w": experts, "c": torch.tensor(0.25), "d": torch.tensor(0.7)}
    return Scores(found, sigma, num_batches=1, model_numel=2000, meta={})


def masks_of(scores: Scores) -> dict[str, safekern.Mask]:
    masks = {
        f"{ranked} {ratio}": getattr(scores, ranked)(ratio)
        for ranked, ratio in (("top", 0.0001), ("top", 0.2), ("top", 1.0), ("bottom", 0.2))
    }
    # Of either sign, and sharded as these are.
    other = {name: 0.5 - scores.gradient(name).abs() for name in scores}
    conflict = scores.in_conflict_with(Scores(other, scores.sigma, num_batches=1, model_numel=2000, meta={}))
    masks |= {"top per tensor": scores.top(0.05, per="tensor"), "random": scores.random(0.1)}
    return masks | {"in conflict": conflict.top(0.1)}


def rank_in_every_way(world: int, kinds: tuple[str, ...]) -> dict[str, int]:
    """How many masks differ from those of one process, per way of sharding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (world,))
    ways: list[tuple[str, Any, tuple[Any, ...]]] = [("rows", line, (Shard(0),)), ("columns", line, (Shard(1),))]
    ways += [("copies", line, (Replicate(),))]
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        ways += [
            ("rows x columns", square, (Shard(0), Shard(1))),
            ("columns x rows", square, (Shard(1), Shard(0))),
            ("rows twice", square, (Shard(0), Shard(0))),
            ("copies of rows", square, (Replicate(), Shard(0))),
            ("copies of columns", square, (Shard(1), Replicate())),
        ]
    wrong = {}
    for kind in kinds:
        whole = gradients(kind)
        expected = masks_of(scores_of(whole))
        for label, mesh, placements in ways:
            sharded = {name: distribute_tensor(grad, mesh, placements) for name, grad in whole.items()}
            if label == "rows":
                # Not everything has to be sharded.
                sharded["c"] = whole["c"]
            found = masks_of(scores_of(sharded))
            wrong[f"{kind}, {label}"] = sum(found[key] != mask for key, mask in expected.items())
    return wrong


# Four processes share fewer cores, in many ways: the other kinds with --full only.
@pytest.mark.parametrize(
    ("world", "kinds"), [(2, KINDS), (3, KINDS), (4, KINDS[1:3]), pytest.param(4, KINDS, marks=pytest.mark.full)]
)
def test_masks_do_not_depend_on_how_equal_accumulators_are_sharded(world: int, kinds: tuple[str, ...]) -> None:
    for wrong in run(world, rank_in_every_way, world, kinds):
        assert not any(wrong.values()), wrong


class Experts(nn.Module):
    """Fused, of different scales; the last one never gets a token."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(5, 10, 10) * torch.arange(1, 6).view(5, 1, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("btj,eij->bti", hidden, self.down_proj[:4])


class Net(nn.Module):
    """Tied, frozen and oddly sized weights, and a layer that is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 10)
        self.inner = nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])
        self.thin = nn.Linear(10, 1)
        self.wide = nn.Linear(1, 10)
        self.twin = self.inner[0]
        self.experts = Experts()
        self.inner[1].weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.inner:
            hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False).tanh()
        return self.twin(hidden + self.wide(self.thin(hidden)) + self.experts(hidden)).square().mean()


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(13, (2, 5), generator=generator) for _ in range(12)]


def score_alone(reduction: str = "mean", size: int = 1) -> Scores:
    """The scores of one process; ``size`` batches go together as one, as processes that share a model take them."""
    grouped = [torch.cat(batches()[start : start + size]) for start in range(0, 12, size)]
    return safekern.score(net(), [(batch,) for batch in grouped], reduction=reduction, sigma_per="expert")


def compare(found: Scores, expected: Scores) -> tuple[float, float]:
    """The largest relative error of ESI, and the overlap of masks."""
    error = 0.0
    for name, esi in expected.items():
        got = found[name]
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        error = max(error, float((got - esi).abs().max() / esi.abs().max()))
    return error, found.top(0.3).jaccard(expected.top(0.3))


def sharded_net(kind: str, world: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    options: dict[str, Any] = {}
    if kind == "compiled":
        for layer in model.inner:
            layer.compile(backend="aot_eager")
    if kind in ("hsdp", "tensor parallel"):
        names = ("replicate", "shard") if kind == "hsdp" else ("data", "tensor")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        options["mesh"] = mesh if kind == "hsdp" else mesh["data"]
        if kind == "tensor parallel":
            whole = Replicate()
            plan = {
                "inner.0": RowwiseParallel(input_layouts=whole),
                "inner.2": ColwiseParallel(output_layouts=whole),
                "wide": ColwiseParallel(output_layouts=whole),
            }
            parallelize_module(model, mesh["tensor"], plan)
    if kind == "offloaded parameters":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model.inner:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def score_sharded(kind: str, world: int) -> tuple[float, float, bool]:
    rank = dist.get_rank()
    mine = batches()[rank::world]
    if kind == "tensor parallel":
        mine = batches()[rank // 2 :: 2]
    model = sharded_net(kind, world)
    before = {name: param.full_tensor().clone() for name, param in model.named_parameters()}
    marked = model.embed.weight
    marked.grad = torch.zeros_like(marked)
    with torch.no_grad():
        # FSDP2 keeps the parameters of the root whole after it.
        model(batches()[0])
    scores = safekern.score(
        model, [(batch,) for batch in mine], sigma_per="expert", offload=kind == "offloaded accumulators"
    )
    together = 2 if kind == "tensor parallel" else world
    expected = score_alone(size=together)
    assert scores.num_batches == expected.num_batches and scores.model_numel == expected.model_numel
    report, selected = scores.report(), scores.selected(expected.top(0.3))
    assert report.distribution.numel == expected.numel
    assert abs(report.distribution.total / expected.report().distribution.total - 1) < 1e-5
    assert abs(selected.total / expected.selected(expected.top(0.3)).total - 1) < 1e-5
    with pytest.raises(safekern.InvalidArgumentError, match="mask"):
        scores.save("unused.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(param.full_tensor(), before[name])
        assert param.requires_grad == (name != "inner.1.weight")
        assert (param.grad is None) == (param is not marked)
    same_sigma = all(torch.equal(sigma, expected.sigma[name]) for name, sigma in scores.sigma.items())
    return (*compare(scores, expected), same_sigma)


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("plain", 2),
        ("plain", 3),
        ("compiled", 2),
        ("offloaded parameters", 2),
        ("offloaded accumulators", 2),
        ("hsdp", 4),
        ("tensor parallel", 4),
    ],
)
def test_sharded_models_score_as_whole_ones(kind: str, world: int) -> None:
    for error, overlap, same_sigma in run(world, score_sharded, kind, world):
        assert error < 1e-5 and overlap >= 0.995 and same_sigma


def score_replicated(reduction: str) -> tuple[float, float]:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(net())
    # A training step before, which leaves DDP's own hooks in use.
    model(batches()[rank]).backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    # Five batches here and seven there.
    mine = batches()[:5] if rank == 0 else batches()[5:]
    scores = safekern.score(model, [(batch,) for batch in mine], reduction=reduction, sigma_per="expert")
    assert all(torch.equal(grads[name], param.grad) for name, param in model.named_parameters() if name in grads)
    model(batches()[rank]).backward()
    expected = score_alone(reduction)
    assert scores.num_batches == expected.num_batches
    return compare(scores, expected)


@pytest.mark.parametrize("reduction", ["mean", "abs"])
def test_replicas_score_their_batches_together(reduction: str) -> None:
    for error, overlap in run(2, score_replicated, reduction):
        assert error < 1e-5 and overlap >= 0.995


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def score_wrapped_replicas() -> tuple[float, float]:
    replicas = nn.parallel.DistributedDataParallel(net())
    mine = [(batch,) for batch in batches()[dist.get_rank() :: 2]]
    with pytest.raises(safekern.InvalidArgumentError, match="inner is in DistributedDataParallel"):
        safekern.score(Around(replicas), mine)
    compiled: Any = torch.compile(replicas, backend="eager")
    return compare(safekern.score(compiled, mine, sigma_per="expert"), score_alone("mean"))


def test_replicas_in_a_wrapper_are_found_or_refused() -> None:
    for error, overlap in run(2, score_wrapped_replicas):
        assert error < 1e-5 and overlap >= 0.995


def score_replicated_in_sweeps() -> bool:
    model = nn.parallel.DistributedDataParallel(net())
    mine = [(batch,) for batch in batches()[dist.get_rank() :: 2]]
    whole = safekern.score(model, mine)
    parts = safekern.score(model, mine, memory=3150, keep=0.05)
    return type(parts) is not type(whole) and parts.top(0.05) == whole.top(0.05)


def test_sweeps_of_replicas_give_the_mask_of_one_sweep() -> None:
    assert all(run(2, score_replicated_in_sweeps))


class Loader:
    """Batches, of which process 1 cannot make the third."""

    def __iter__(self) -> Any:
        for index, batch in enumerate(batches()):
            if index == 2 and dist.get_rank() == 1:
                raise OSError("of this process alone")
            yield (batch,)


def fail(how: str, wrap: str) -> None:
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(net()) if wrap == "replicated" else sharded_net("plain", 2)
    mine: Any = [(batch,) for batch in batches()]
    seen = 0

    def objective(model: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        seen += 1
        if how == "before forward" and rank == 1 and seen == 3:
            raise TypeError("of this process alone")
        loss: Tensor = model(*batch)
        if how in ("loss", "caught", "endless") and rank == 1 and seen == 3:
            raise ValueError("of this process alone")
        if how == "interrupt" and rank == 1 and seen == 3:
            raise KeyboardInterrupt
        if how == "infinite loss" and rank == 1 and seen == 3:
            return loss + torch.inf
        # Infinite in the gradient of one row, which one process holds.
        return loss * torch.inf if how == "infinite" else loss

    if how == "batches" and rank == 1:
        del mine[2:]
    if how == "loader":
        mine = Loader()
    if how == "endless" and rank == 0:
        mine = itertools.cycle(mine)
    if how == "memory":
        safekern.score(model, mine, memory=1000)
    if how == "caught" and rank == 1:
        with pytest.raises(ValueError, match="of this process alone"):
            safekern.score(model, mine, objective)
        # It stays, and the others cannot hear that it is gone.
        time.sleep(6)
        raise KeyError("later")
    if how == "interrupt" and rank == 1:
        with pytest.raises(KeyboardInterrupt):
            safekern.score(model, mine, objective)
        raise KeyError("later")
    safekern.score(model, mine, objective)


ALONE = "of this process alone"


@pytest.mark.parametrize(
    ("how", "wrap", "here", "there"),
    [
        (
            "batches",
            "sharded",
            "ScoringError: 1 of 2 processes had no batch 2",
            "ScoringError: 1 of 2 processes had no",
        ),
        ("infinite", "sharded", "NonFiniteError", "NonFiniteError"),
        (
            "infinite loss",
            "sharded",
            "NonFiniteError: batch 2: the loss or a gradient in another process",
            "NonFiniteError: batch 2: the loss is NaN",
        ),
        ("infinite loss", "replicated", "ScoringError: process 1 failed", "NonFiniteError: batch 2: the loss is NaN"),
        ("memory", "sharded", "InvalidArgumentError: memory=", "InvalidArgumentError: memory="),
        ("loader", "sharded", f"ScoringError: process 1 failed: OSError: {ALONE}", f"OSError: {ALONE}"),
        # The other one waits in a collective of the model, and hears that process 1 is gone.
        ("before forward", "sharded", f"ScoringError: process 1 failed: TypeError: {ALONE}", f"TypeError: {ALONE}"),
        ("loss", "sharded", f"ScoringError: process 1 failed: ValueError: {ALONE}", f"ValueError: {ALONE}"),
        # Or that it did not come in time.
        ("caught", "sharded", f"ScoringError: process 1 failed: ValueError: {ALONE}", "KeyError: 'later'"),
        ("interrupt", "sharded", "ScoringError: process 1 failed: KeyboardInterrupt", "KeyError: 'later'"),
        ("loss", "replicated", f"ScoringError: process 1 failed: ValueError: {ALONE}", f"ValueError: {ALONE}"),
        # Processes with batches of their own do not go on to the end of them.
        ("endless", "replicated", f"ScoringError: process 1 failed: ValueError: {ALONE}", f"ValueError: {ALONE}"),
        ("loader", "replicated", f"ScoringError: process 1 failed: OSError: {ALONE}", f"OSError: {ALONE}"),
        ("caught", "replicated", f"ScoringError: process 1 failed: ValueError: {ALONE}", "KeyError: 'later'"),
    ],
)
def test_a_process_that_fails_takes_the_others_with_it(how: str, wrap: str, here: str, there: str) -> None:
    errors = run(2, fail, how, wrap, fail_ok=True, timeout=4 if how == "caught" else 30)
    assert here in errors[0] and there in errors[1], errors
    assert "process 0 failed" not in errors[1]


class LateAndEmpty:
    def __iter__(self) -> Any:
        # The other process has no batch left after which it would look for a note.
        time.sleep(0.5)
        return iter(())


class Unstartable:
    def __iter__(self) -> Any:
        raise OSError(ALONE)


@contextmanager
def refused(error: str, message: str) -> Iterator[None]:
    """What process 1 alone does wrong, both raise, and neither has to end for it: they are in step afterwards."""
    told = f"process 1 failed: {error}: .*{message}" if dist.get_rank() == 0 else message
    with pytest.raises(Exception, match=told) as caught:
        yield
    # Not also the other's kind of error: that would say that the fault was here.
    assert caught.typename == ("ScoringError" if dist.get_rank() == 0 else error)
    dist.barrier()


@contextmanager
def both_refused(message: str) -> Iterator[None]:
    with pytest.raises(safekern.InvalidArgumentError, match=message):
        yield
    dist.barrier()


def refuse_what_fully_shard_left_out() -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(fully_shard(nn.Linear(4, 4)), nn.Linear(4, 1))
    mine = [torch.ones(2, 4)] * 3

    def score(**options: Any) -> Scores:
        return safekern.score(model, mine, lambda model, batch: model(batch).mean(), **options)

    with both_refused(r"fully_shard \(FSDP2\) has left out 1\.weight"):
        score()
    assert list(score(select=lambda name, param: name == "0.weight")) == ["0.weight"]


def refuse_packed_parameters() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    # As transformers spreads fused gate and up projections of experts.
    packed = _StridedShard(1, split_factor=2)
    param = distribute_tensor(torch.randn(4, 64, 8), init_device_mesh("cpu", (2,)), [packed])
    with both_refused("in pieces, as fused gate and up projections are"):
        Scores({"w": param}, {"w": torch.tensor(1.0)}, num_batches=1, model_numel=param.numel(), meta={}).top(0.1)
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(param))
    with both_refused(r"w: a parameter of shape \(4, 64, 8\) .*select= of score"):
        safekern.score(model, [()], lambda model, batch: model.w.sum())
    with both_refused("in pieces"):
        safekern.SETAdamW(model.named_parameters(), safekern.Mask.from_indices({"w": [0]}, {"w": (4, 64, 8)}))


def refuse_to_score(wrap: str) -> None:
    alone = dist.get_rank() == 1
    model = nn.parallel.DistributedDataParallel(net()) if wrap == "replicated" else sharded_net("plain", 2)
    mine = [(batch,) for batch in batches()[dist.get_rank() :: 2]]

    def score(loader: Any = mine, **options: Any) -> Scores:
        return safekern.score(model, loader if alone else mine, **(options if alone else {}))

    with refused("InvalidArgumentError", "reduction must be"):
        score(reduction="median")
    with refused("InvalidArgumentError", "no parameter of the model is eligible"):
        score(select=lambda name, param: False)
    with refused("InvalidArgumentError", "loader must yield"):
        score(mine[0][0])
    with pytest.MonkeyPatch.context() as patch, refused("OutOfMemoryError", "out of memory"):
        zeros = torch.zeros

        def full(*shape: Any, **options: Any) -> Tensor:
            if alone and options.get("dtype") is torch.float32:
                raise torch.OutOfMemoryError("out of memory")
            return zeros(*shape, **options)

        patch.setattr(torch, "zeros", full)
        score()
    for other in ({"reduction": "abs"}, {"sigma_per": "expert"}, {"select": lambda name, param: "inner" in name}):
        with both_refused("process 1 was called with other arguments"):
            score(**other)
    if wrap == "sharded":
        with refused("OSError", ALONE):
            score(Unstartable())
        refuse_what_fully_shard_left_out()
        refuse_packed_parameters()
    else:
        with refused("InvalidArgumentError", "the loader yielded no batch"):
            score(LateAndEmpty())
        with both_refused("process 1 was called with other arguments"):
            score(memory=3150)
        weight = model.module.thin.weight.detach()
        before = weight.clone()
        with refused("NonFiniteError", "thin.weight holds NaN"):
            weight[0, 0] = torch.nan if alone else weight[0, 0]
            score()
        weight.copy_(before)
        groups = [dist.new_group([rank]) for rank in range(2)]
        with both_refused("averages over 1 of 2 processes"):
            safekern.score(nn.parallel.DistributedDataParallel(net(), process_group=groups[dist.get_rank()]), mine)
    error, overlap = compare(score(), safekern.score(net(), [(batch,) for batch in batches()]))
    assert error < 1e-5 and overlap >= 0.995


@pytest.mark.parametrize("wrap", ["sharded", "replicated"])
def test_what_one_process_cannot_begin_none_does(wrap: str) -> None:
    run(2, refuse_to_score, wrap)


def refuse_to_rank() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    alone = dist.get_rank() == 1
    mesh = init_device_mesh("cpu", (2,))
    whole = gradients("normal")
    scores = scores_of({name: distribute_tensor(grad, mesh, (Shard(0),)) for name, grad in whole.items()})
    expected = scores_of(whole)
    for per in ("model", "tensor"):
        with refused("InvalidArgumentError", "ratio must be"):
            scores.top(7 if alone else 0.1, per=per)
        with both_refused("process 1 was called with other arguments"):
            scores.top(0.2 if alone else 0.1, per=per)
        with both_refused("process 1 was called with other arguments"):
            (scores.bottom if alone else scores.top)(0.1, per=per)
        assert scores.top(0.1, per=per) == expected.top(0.1, per=per)
    with both_refused("process 1 was called with other arguments"):
        scores.top(0.1, per="tensor" if alone else "model")
    if alone:
        scores.gradient("d").to_local()[0, 0] = torch.nan
    everything = expected.top(1.0)
    for look in (scores.report, functools.partial(scores.selected, everything)):
        with refused("NonFiniteError", "a score is NaN or infinite"):
            look()
    for per in ("model", "tensor"):
        with pytest.raises(safekern.ScoringError, match="of d hold NaN" if alone else "process 1 failed: .*is NaN"):
            scores.top(0.1, per=per)
        dist.barrier()


def test_what_one_process_cannot_rank_none_does() -> None:
    run(2, refuse_to_rank)


SCRIPT = """
import datetime, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import safekern

def loss(model, batch):
    if dist.get_rank() == int(sys.argv[1]):
        raise ValueError("of this process alone")
    return model(batch).mean()

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
safekern.score(fully_shard(nn.Linear(4, 4)), [torch.ones(2, 4)], loss)
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_no_process_of_a_script_hangs_when_one_fails(failing: int) -> None:
    """Nothing is caught, and nobody leaves the group in an orderly way; process 0 keeps the store."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(failing)],
            env={**os.environ, **where, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # Less than the group's timeout.
        written = [process.communicate(timeout=45)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    # Not always 1: on its way out torch may abort a process whose group is gone.
    assert all(process.returncode for process in started), written
    assert "ValueError: of this process alone" in written[failing]
    # The store went with process 0, unless that was still busy going.
    told = "process 1 failed: ValueError" if failing == 1 else r"another process ended|process 0 failed: ValueError"
    assert re.search(rf"ScoringError: ({told})", written[1 - failing]), written


def leave_a_process_out() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])][dist.get_rank() // 2]
    sharded = {name: distribute_tensor(grad, mesh, (Shard(0),)) for name, grad in gradients("normal").items()}
    with pytest.raises(safekern.InvalidArgumentError, match="2 of 4 processes"):
        scores_of(sharded).top(0.1)


def test_a_mesh_over_some_processes_is_refused() -> None:
    run(4, leave_a_process_out)


def test_scores_on_several_devices_rank_as_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {kind: masks_of(scores_of(gradients(kind))) for kind in KINDS}
    # As if every second tensor were on another device.
    monkeypatch.setattr(ranking, "by_device", lambda tensors: [list(range(len(tensors)))[part::2] for part in (0, 1)])
    assert {kind: masks_of(scores_of(gradients(kind))) for kind in KINDS} == expected
