"""SETAdamW, SPAAdamW and protect where several processes hold the model together, against one process."""

import copy
import functools
import gc
import os
import sys
import weakref

import processes
import pytest
import torch
import torch.distributed as dist
from exact import bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import safekern
from safekern import InvalidArgumentError, Mask, NonFiniteError, ProtectionError, SETAdamW, SPAAdamW, StepError
from safekern.optim.selected_grad import SelectedGrad
from safekern.sharding import is_sharded, local

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

ROWS, STEPS = 8, 3


class Block(nn.Module):
    """Three and six rows, of which one of four processes gets none; eight, of which three get uneven parts."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.narrow = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh()) + self.narrow(x).sum(-1, keepdim=True)


class Model(nn.Module):
    """A tied head, a frozen layer, and layers that are checkpointed."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.tie_weights()
        self.to(dtype)

    def tie_weights(self):
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(self.frozen(x))


MASKED = (
    "embed.weight",
    "frozen.weight",
    *(f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down", "narrow")),
)


def mask_of(share=0.4, seed=1):
    generator, shapes = torch.Generator().manual_seed(seed), {n: p.shape for n, p in Model().named_parameters()}
    return Mask.from_bool({name: torch.rand(shapes[name], generator=generator) < share for name in MASKED})


def loss_of(model, step, part=0, parts=1):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (ROWS, 4), generator=generator)
    targets = torch.randint(11, (ROWS, 4), generator=generator)
    logits = model(tokens[part::parts]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets[part::parts].flatten())


def mine():
    """Which part of a batch this process takes, of how many."""
    return dist.get_rank(), dist.get_world_size()


def set_optimizer(model, **options):
    return SETAdamW(model.named_parameters(), mask_of(), lr=1e-2, eps=1e-5, weight_decay=0.1, **options)


def spa_optimizer(model, **options):
    return SPAAdamW(model.named_parameters(), mask_of(), lr=1e-2, eps=1e-5, weight_decay=0.1, **options)


def protected_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    safekern.protect(optimizer, mask_of(), model.named_parameters())
    return optimizer


def train(model, optimizer, steps=range(STEPS), part=0, parts=1, micro_batches=1, clip=None):
    for step in steps:
        for micro_batch in range(micro_batches):
            (loss_of(model, 10 * step + micro_batch, part, parts) / micro_batches).backward()
        if clip is not None:
            clip(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor):
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().clone()


def weights(model):
    return {name.replace("module.", ""): whole(param) for name, param in model.named_parameters()}


def assert_close(got, wanted):
    """The same weights up to the order of sums."""
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        difference = float((value - wanted[name]).abs().max())
        assert difference < 5e-6, (name, difference)


def assert_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        if isinstance(value, dict):
            assert_equal(value, wanted[name])
        else:
            assert value.dtype == wanted[name].dtype and torch.equal(bits(value), bits(wanted[name])), name


def assert_kept(got, before, *, masked):
    """The bits of every weight in the mask, or of every other, are what they were; the rest moved."""
    mask, moved, free = mask_of(), 0, 0
    for name, value in got.items():
        chosen = mask.bool(name) if name in mask else torch.zeros(value.shape, dtype=torch.bool)
        kept = chosen if masked else ~chosen
        changed = bits(value) != bits(before[name])
        assert not changed[kept].any(), name
        if name != "frozen.weight":
            moved, free = moved + int(changed[~kept].sum()), free + int((~kept).sum())
    assert moved > 0.8 * free


def fsdp(model, mesh=None, compiled=False):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        if compiled:
            layer.compile(backend="aot_eager")
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def hsdp(model):
    from torch.distributed.device_mesh import init_device_mesh

    return fsdp(model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "shard")))


def tensor_parallel(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fsdp(model, mesh["dp"])


def agreed(message, act, kind):
    """Every process raises this, and says so to the others."""
    with pytest.raises(kind, match=message):
        act()
    dist.barrier()


# One process, for comparison


@functools.cache
def reference(kind, micro_batches=1, clip=None, dtype=torch.float32):
    model = Model(dtype)
    if kind == "protect":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
        safekern.protect(optimizer, mask_of(), model.named_parameters())
    else:
        optimizer = {"set": set_optimizer, "spa": spa_optimizer}[kind](model)
    train(model, optimizer, micro_batches=micro_batches, clip=clip)
    return weights(model), optimizer.state_dict()


def clip_selected(model, optimizer):
    assert optimizer.clip_grad_norm_(0.05) > 0.05


def clip_by_torch(model, optimizer):
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    assert float(whole(norm)) > 0.05


# FSDP2


def follow_one_process(shard, part_of):
    """Trajectories of all optimizers of a model sharded one way."""
    before = weights(Model())

    def run(make, **options):
        model = shard(Model())
        optimizer = make(model)
        train(model, optimizer, part=part_of[0], parts=part_of[1], **options)
        return weights(model)

    for in_backward in (False, True):
        make = functools.partial(set_optimizer, in_backward=in_backward)
        for options in ({}, {"micro_batches": 2}, {"clip": clip_selected}):
            got = run(make, **options)
            assert_close(got, reference("set", **options)[0])
            assert_kept(got, before, masked=False)
    if shard is not tensor_parallel:
        # Torch's clipping sees the selected entries too, but cannot take parameters on different meshes together.
        got = run(functools.partial(set_optimizer, in_backward=True), clip=clip_by_torch)
        assert_close(got, reference("set", clip=clip_selected)[0])

    got = run(spa_optimizer)
    assert_close(got, reference("spa")[0])
    assert_kept(got, before, masked=True)

    model = shard(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    with safekern.protect(optimizer, mask_of(), model.named_parameters()) as handle:
        train(model, optimizer, part=part_of[0], parts=part_of[1])
        handle.verify()
    assert_close(weights(model), reference("protect")[0])
    assert_kept(weights(model), before, masked=True)


def check_16_bit_parameters():
    """Masters make up for small steps, and survive being saved and loaded."""
    models = [Model(torch.bfloat16), fsdp(Model(torch.bfloat16))]
    optimizers = [SETAdamW(model.named_parameters(), mask_of(), lr=1e-5) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        # The same batch in every process, so that gradients are the same in spite of their rounding.
        train(model, optimizer)
    assert_equal(weights(models[1]), weights(models[0]))
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert_equal(states[1], states[0])
    assert (states[0][0]["master"] != models[0].embed.weight.detach()[mask_of().bool("embed.weight")]).any()


def check_refusals():
    rank = dist.get_rank()
    for in_backward in (False, True):
        model = fsdp(Model())
        optimizer = set_optimizer(model, in_backward=in_backward)
        train(model, optimizer, range(1))
        before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
        agreed("no selected weight received a gradient", optimizer.step, StepError)
        agreed("no selected weight received a gradient", functools.partial(optimizer.clip_grad_norm_, 1.0), StepError)
        loss_of(model, 1).backward()
        grad = local(model.layers[0].up.weight.grad)
        assert isinstance(grad, SelectedGrad) == in_backward
        if rank == 1:
            (grad.selected if in_backward else grad).fill_(float("nan"))
        agreed(r"layers\.0\.up\.weight holds NaN", optimizer.step, NonFiniteError)
        assert_equal(weights(model), before)
        assert_equal(optimizer.state_dict()["state"], state)
        optimizer.zero_grad()
        train(model, optimizer, range(2, 3))

    model = Model()
    early = set_optimizer(model, in_backward=True)
    fsdp(model)
    loss_of(model, 0).backward()
    agreed(r"make the optimizer after fully_shard", early.step, StepError)

    # What torch would do with a gradient that is not there raises, and is not done to this process's part alone.
    model = fsdp(Model())
    optimizer = set_optimizer(model, in_backward=True)
    loss_of(model, 0).backward()
    grad = model.layers[0].up.weight.grad
    for operation in (grad.full_tensor, grad.abs, lambda: grad + grad, lambda: grad.isfinite().all(), grad.clone):
        agreed("SelectedGrad", operation, InvalidArgumentError)
    agreed("SelectedGrad", torch.optim.SGD([model.layers[0].up.weight]).step, InvalidArgumentError)


def check_protection():
    model = fsdp(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = safekern.protect(optimizer, mask_of(), model.named_parameters())
    train(model, optimizer, range(1))
    before = weights(model)
    param = model.layers[0].up.weight
    with torch.no_grad():
        param.add_(1)
    mask = mask_of().bool("layers.0.up.weight")
    assert int(mask.sum()) > 3
    agreed(r"layers\.0\.up\.weight \(\d+\)", handle.verify, ProtectionError)
    agreed(r"layers\.0\.up\.weight \(\d+\)", optimizer.step, ProtectionError)
    handle.restore()
    handle.verify()
    got = whole(param)
    assert torch.equal(got[mask], before["layers.0.up.weight"][mask])
    assert (got != before["layers.0.up.weight"])[~mask].all()


def check_scaler():
    """A scaler skips a step in every process, and scales the others away."""
    model, plain = fsdp(Model()), Model()
    optimizer, other = set_optimizer(model, in_backward=True), set_optimizer(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train(plain, other, range(2))
    for step in range(3):
        scaler.scale(loss_of(model, 10 * min(step, 1))).backward()
        if step == 1 and dist.get_rank() == 0:
            local(model.embed.weight.grad).selected[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 4.0
    assert_close(weights(model), weights(plain))


def check_compiled_layers():
    model = fsdp(Model(), compiled=True)
    train(model, set_optimizer(model, in_backward=True), part=mine()[0], parts=mine()[1])
    assert_close(weights(model), reference("set")[0])


def check_state_is_sharded():
    """Each process keeps the state of its own weights."""
    model, mask = fsdp(Model()), mask_of()
    optimizer = set_optimizer(model)
    held = torch.tensor(sum(state["exp_avg"].numel() for state in optimizer.state.values() if "exp_avg" in state))
    assert held < 0.7 * mask.numel
    dist.all_reduce(held)
    assert held == mask.numel


def save_checkpoints(folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for kind, make in (("set", set_optimizer), ("spa", spa_optimizer)):
        model = fsdp(Model())
        optimizer = make(model)
        train(model, optimizer, range(2), *mine())
        if kind == "set":
            # A bit that adding zeros would lose.
            optimizer.state[model.embed.weight]["exp_avg"][:1] = -0.0
            torch.save(optimizer.state_dict(), f"{folder}/plain{dist.get_rank()}")
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{kind}")
        result = weights(model), moments(model, optimizer)
        if dist.get_rank() == 0:
            torch.save(result, f"{folder}/{kind}.pt")


def moments(model, optimizer):
    """The whole state by name."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    return {
        names[key]: {field: whole(value) for field, value in entry.items()} for key, entry in state["state"].items()
    }


def load_checkpoints(folder, shard):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    for kind, make in (("set", set_optimizer), ("spa", spa_optimizer)):
        model = shard(Model(seed=3))
        optimizer = make(model)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=f"{folder}/{kind}")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        saved_weights, saved_state = torch.load(f"{folder}/{kind}.pt")
        assert_equal(weights(model), saved_weights)
        assert_equal(moments(model, optimizer), saved_state)
        assert any(bool((entry["step"] == 2).all()) for entry in saved_state.values())
        # And on it goes, as one process would from there.
        other = Model()
        other.load_state_dict({**saved_weights, "head.weight": saved_weights["embed.weight"]})
        reference = make(other)
        reference.load_state_dict(by_number(reference, saved_state))
        assert_equal(moments(other, reference), saved_state)
        for each, its in ((model, optimizer), (other, reference)):
            train(each, its, range(2, 4))
        assert_close(weights(model), weights(other))


def by_number(optimizer, state):
    empty = optimizer.state_dict()
    names = [name for group in empty["param_groups"] for name in group["param_names"]]
    return {**empty, "state": {key: state[name] for key, name in enumerate(names) if name in state}}


def load_full_checkpoints(folder):
    """Whole states: of one process, into sharded optimizers, and through DCP's full state dicts."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for kind, make in (("set", set_optimizer), ("spa", spa_optimizer)):
        _, saved = reference(kind)
        model = fsdp(Model())
        optimizer = make(model)
        optimizer.load_state_dict(copy.deepcopy(saved))
        names = saved["param_groups"][0]["param_names"]
        assert_equal(moments(model, optimizer), {names[key]: entry for key, entry in saved["state"].items()})
        for broadcast in (False, True):
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, cpu_offload=broadcast)
            full = get_optimizer_state_dict(model, optimizer, options=options)
            other = fsdp(Model(seed=4))
            theirs = make(other)
            set_optimizer_state_dict(other, theirs, full, options=options)
            assert_equal(moments(other, theirs), moments(model, optimizer))
    one, two = (torch.load(f"{folder}/plain{rank}", weights_only=True) for rank in range(2))
    assert_equal(one["state"], two["state"])


def two_processes(folder):
    follow_one_process(fsdp, mine())
    check_16_bit_parameters()
    check_refusals()
    check_protection()
    check_scaler()
    check_compiled_layers()
    check_state_is_sharded()
    save_checkpoints(folder)
    load_full_checkpoints(folder)


def three_processes(folder):
    load_checkpoints(folder, fsdp)


def four_processes(folder):
    follow_one_process(fsdp, mine())
    follow_one_process(hsdp, mine())
    follow_one_process(tensor_parallel, (dist.get_rank() // 2, 2))
    assert local(fsdp(Model()).layers[0].narrow.weight).numel() in (0, 6)
    load_checkpoints(folder, tensor_parallel)


def test_sharded_models(tmp_path):
    """Checkpoints saved by two processes are loaded by three, by four on a mesh of two dimensions, and by one."""
    processes.run(2, two_processes, str(tmp_path))
    processes.run(3, three_processes, str(tmp_path))
    processes.run(4, four_processes, str(tmp_path))
    load_checkpoints(str(tmp_path), lambda model: model)


# DistributedDataParallel


def ddp_follows_one_process():
    from torch.nn.parallel import DistributedDataParallel

    rank, world_size = mine()

    def run(in_backward, wrap, make=set_optimizer, **options):
        # Process 0 tells the others what the weights are.
        model = Model(seed=0 if wrap else rank)
        if wrap:
            model = Model(seed=rank)
            if in_backward:
                safekern.integrations.leave_to_set(model, mask_of())
        else:
            model = Model()
        optimizer = make(model, **({"in_backward": True} if in_backward else {}))
        wrapped = DistributedDataParallel(model) if wrap else model
        train(wrapped, optimizer, part=rank, parts=world_size, **options)
        return weights(model)

    before = weights(Model())
    for options in ({}, {"micro_batches": 2}, {"clip": clip_selected}):
        for in_backward, wrap in ((False, True), (True, True), (True, False)):
            got = run(in_backward, wrap, **options)
            assert_close(got, reference("set", **options)[0])
            assert_kept(got, before, masked=False)
    # Torch's clipping looks at gradients before step() averages them: they are averaged for it.
    clip_masked = lambda model, optimizer: nn.utils.clip_grad_norm_(  # noqa: E731
        [model.get_parameter(name) for name in MASKED if name != "frozen.weight"], 0.05
    )
    assert_close(run(True, False, clip=clip_masked), reference("set", clip=clip_selected)[0])
    got = run(False, True, make=spa_optimizer)
    assert_close(got, reference("spa")[0])
    assert_kept(got, before, masked=True)


def ddp_accumulates_without_sync(monkeypatch):
    """Micro-batches under DDP.no_sync(), each process with its own, step like one process with all of them."""
    from torch.nn.parallel import DistributedDataParallel

    rank, world_size = mine()
    reductions = []
    reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: reductions.append(reduce(*args, **options)))

    def run(kind, clip=None, **options):
        model = Model(seed=rank)
        if kind == "in_backward":
            safekern.integrations.leave_to_set(model, mask_of())
        make = spa_optimizer if kind == "spa" else set_optimizer
        optimizer = make(model, **({"in_backward": True} if kind == "in_backward" else {}))
        wrapped = DistributedDataParallel(model, **options)
        reductions.clear()
        for step in range(STEPS):
            with wrapped.no_sync():
                (loss_of(wrapped, 10 * step, rank, world_size) / 2).backward()
            (loss_of(wrapped, 10 * step + 1, rank, world_size) / 2).backward()
            assert len(reductions) == step * (kind == "in_backward")
            if clip is not None:
                clip(model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        for value in weights(model).values():
            theirs = value.clone()
            dist.broadcast(theirs, src=0)
            assert torch.equal(bits(theirs), bits(value))
        return weights(model)

    before = weights(Model())
    # As the Trainer sets it unless told otherwise, and as torch recommends it.
    for options in ({"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        for kind, clip in (("dense", None), ("in_backward", None), ("in_backward", clip_selected), ("spa", None)):
            got = run(kind, clip, **options)
            assert_close(got, reference("spa" if kind == "spa" else "set", micro_batches=2, clip=clip)[0])
            assert_kept(got, before, masked=kind == "spa")


def ddp_refusals():
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    model = Model()
    optimizer = set_optimizer(model, in_backward=True)
    agreed("no selected weight received a gradient", optimizer.step, StepError)
    # A gradient that one process does not have counts as zero there.
    if rank == 0:
        loss_of(model, 0).backward()
    read = model.embed.weight.grad.norm if rank == 0 else optimizer._average_to_read
    agreed("in some processes only", read, StepError)
    optimizer.step()
    other = Model()
    reference = set_optimizer(other)
    (loss_of(other, 0) / 2).backward()
    reference.step()
    assert_close(weights(model), weights(other))

    before = weights(model)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    if rank == 1:
        model.embed.weight.grad.selected[0] = float("inf")
    agreed(r"embed\.weight holds NaN", optimizer.step, NonFiniteError)
    assert_equal(weights(model), before)

    def forgot(early):
        model = Model()
        optimizer = set_optimizer(model, in_backward=True) if early else None
        wrapped = DistributedDataParallel(model)
        optimizer = optimizer or set_optimizer(model, in_backward=True)
        loss_of(wrapped, 0).backward()
        optimizer.step()

    for early in (True, False):
        agreed("leave_to_set", functools.partial(forgot, early), (StepError, InvalidArgumentError))

    # Dense gradients that DDP leaves alone are averaged by nobody, until it is told that it need not.
    for make in (set_optimizer, spa_optimizer, protected_optimizer):
        model = Model(seed=rank)
        left = safekern.integrations.leave_to_set(model, mask_of())
        run = functools.partial(train, DistributedDataParallel(model), make(model), part=rank, parts=2)
        before = weights(model)
        agreed(r"leave parameter \S+ alone, so nobody averages", run, StepError)
        assert_equal(weights(model), before)
        left.remove()
        left.remove()
        model.zero_grad()
        train(DistributedDataParallel(model), make(model), part=rank, parts=2)
        for value in weights(model).values():
            theirs = value.clone()
            dist.broadcast(theirs, src=0)
            assert torch.equal(bits(theirs), bits(value))


def two_replicas():
    ddp_follows_one_process()
    with pytest.MonkeyPatch.context() as monkeypatch:
        ddp_accumulates_without_sync(monkeypatch)
    ddp_refusals()


def test_replicated_models():
    processes.run(2, two_replicas)


# accelerate and transformers


def accelerator(**options):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        **{"state_dict_type": "SHARDED_STATE_DICT", "transformer_cls_names_to_wrap": ["Block"], **options},
    )
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    force_fsdp(made, plugin)
    assert made.is_fsdp2 and made.num_processes == dist.get_world_size()
    return made


def force_fsdp(accelerate, plugin):
    """Accelerate ignores FSDP on the CPU, without a word."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # Where every later look at the state starts from: without it, half of accelerate sees plain processes again after
    # prepare, and one of them waits for the others to load a full state dict.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerate.state.distributed_type = DistributedType.FSDP
    accelerate.state.fsdp_plugin = plugin


def keep_as(plugin, state_dict_type):
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(state_dict_type)


def accelerated(folder):
    from accelerate.utils.fsdp_utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer

    before = weights(Model())
    rank, world_size = mine()
    for number, (kind, make) in enumerate(
        (
            ("set", set_optimizer),
            ("set", functools.partial(set_optimizer, in_backward=True)),
            ("spa", spa_optimizer),
            ("protect", None),
        )
    ):
        accelerate = accelerator()
        plugin = accelerate.state.fsdp_plugin
        model = Model()
        optimizer = make(model) if make else torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
        unsharded = weakref.ref(model.layers[0].up.weight)
        model, optimizer = accelerate.prepare(model, optimizer)
        assert all(is_sharded(param) for param in model.parameters())
        # Nothing holds on to the memory of the whole model.
        gc.collect()
        assert unsharded() is None
        if make is None:
            safekern.protect(optimizer, mask_of(), model.named_parameters())
        train(model, optimizer, part=rank, parts=world_size)
        assert_close(weights(model), reference(kind)[0])
        assert_kept(weights(model), before, masked=kind != "set")
        if make is None:
            continue
        for state in optimizer.state.values():
            assert all(is_sharded(value) or value.numel() < 40 for value in state.values())
        # Its own checkpoints of both kinds, as the Trainer writes them, into a model and an optimizer made anew.
        saved = weights(model), moments(model, optimizer)
        for state_dict_type in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
            keep_as(plugin, state_dict_type)
            path = f"{folder}/{number}/{state_dict_type}"
            save_fsdp_model(plugin, accelerate, model, path)
            save_fsdp_optimizer(plugin, accelerate, optimizer, model, path)
            again = Model(seed=7)
            again, theirs = accelerate.prepare(again, make(again))
            load_fsdp_model(plugin, accelerate, again, path)
            load_fsdp_optimizer(plugin, accelerate, theirs, again, path)
            assert_equal(weights(again), saved[0])
            assert_equal(moments(again, theirs), saved[1])


def accelerated_in_mixed_precision():
    """The optimizer follows where accelerate makes fp32 parameters of 16-bit ones."""
    accelerate = accelerator(cpu_ram_efficient_loading=True)
    accelerate.state._mixed_precision = "bf16"
    model = Model(torch.bfloat16)
    # It leaves what does not train in bf16, which would then meet fp32.
    model.frozen.requires_grad_(True)
    before = {name: value.float() for name, value in weights(model).items()}
    model, optimizer = accelerate.prepare(model, set_optimizer(model))
    assert model.embed.weight.dtype == torch.float32
    train(model, optimizer)
    assert "master" not in optimizer.state[model.embed.weight]
    assert_kept(weights(model), before, masked=False)


def trained_by_trainer(folder):
    transformers = pytest.importorskip("transformers")
    from language_models import tiny_llama
    from trainer_runs import assert_only_the_mask_moved, random_mask, rows

    wrapped = {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    plugin = accelerator(**wrapped).state.fsdp_plugin

    class Trainer(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            force_fsdp(self.accelerator, plugin)
            self.is_fsdp_enabled = True

    for in_backward, state_dict_type in ((False, "SHARDED_STATE_DICT"), (True, "FULL_STATE_DICT")):
        keep_as(plugin, state_dict_type)
        model = tiny_llama()
        mask, before = random_mask(model), {name: param.detach().clone() for name, param in model.named_parameters()}
        factory = safekern.integrations.for_trainer(SETAdamW)
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            report_to=[],
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=2,
            use_cpu=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows(16),
            optimizer_cls_and_kwargs=(factory, {"mask": mask, "lr": 1e-3, "in_backward": in_backward}),
        )
        trainer.train()
        assert all(is_sharded(param) for param in trainer.model.parameters())
        full = tiny_llama()
        full.load_state_dict(weights(trainer.model))
        assert_only_the_mask_moved(full, before, mask)
        resumed = Trainer(
            model=tiny_llama(),
            args=arguments,
            train_dataset=rows(16),
            optimizer_cls_and_kwargs=(factory, {"mask": mask, "lr": 1e-3, "in_backward": in_backward}),
        )
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        assert_equal(weights(resumed.model), weights(trainer.model))


def forget_the_group():
    """As torchrun leaves it to a script: what to connect to is in the environment, and nobody has connected yet."""
    port = [processes.free_port()]
    dist.broadcast_object_list(port, src=0)
    rank, world_size = mine()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port[0]))


TRAINER_KINDS = {
    "dense": {},
    "in_backward": {"in_backward": True},
    "factory": {},
    "factory in_backward": {"in_backward": True},
    "spa": {},
}
# Two processes take as many rows per step with half as many micro-batches; two steps are an epoch.
TRAINER_OPTIONS = {"max_steps": 4, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3}


def trained(kind, folder, accumulation, resume=None):
    from language_models import tiny_llama
    from trainer_runs import random_mask, train

    # Weights of its own in each process, for DDP and leave_to_set to make the same.
    model = tiny_llama(dist.get_rank() if dist.is_initialized() else 0)
    mask, options = random_mask(tiny_llama()), TRAINER_KINDS[kind]
    if dist.is_initialized() and options:
        safekern.integrations.leave_to_set(model, mask)
    make = SPAAdamW if kind == "spa" else SETAdamW
    if kind.startswith("factory"):
        how = {"factory": (safekern.integrations.for_trainer(make), {"mask": mask, "lr": 1e-3, **options})}
    else:
        how = {"optimizer": make(model.named_parameters(), mask, lr=1e-3, **options)}
    steps = {**TRAINER_OPTIONS, "gradient_accumulation_steps": accumulation}
    trainer = train(model, f"{folder}/{kind}", resume=resume, **how, **steps)
    replicated = isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert replicated == dist.is_initialized() and isinstance(trainer.optimizer.optimizer, make)
    return trainer.model


def trained_in_ddp(folder):
    from language_models import tiny_llama
    from trainer_runs import (
        assert_only_the_mask_moved,
        assert_only_the_rest_moved,
        assert_same_weights,
        random_mask,
        training_arguments,
    )

    forget_the_group()
    start = tiny_llama()
    mask, before = random_mask(start), weights(start)
    with pytest.raises(InvalidArgumentError, match="process group"):
        safekern.integrations.leave_to_set(start, mask)
    training_arguments(folder, ddp_backend="gloo", ddp_timeout=30)
    assert dist.get_world_size() == 2
    for kind in TRAINER_KINDS:
        model = trained(kind, folder, 2)
        (assert_only_the_rest_moved if kind == "spa" else assert_only_the_mask_moved)(model, before, mask)
        assert_close(weights(model), torch.load(f"{folder}/{kind}.pt"))
        for value in weights(model).values():
            theirs = value.clone()
            dist.broadcast(theirs, src=0)
            assert torch.equal(bits(theirs), bits(value))
        resumed = trained(kind, f"{folder}/again", 2, f"{folder}/{kind}/checkpoint-3")
        assert_same_weights(resumed, model)


def test_trainer_in_ddp(tmp_path):
    """Two processes of the Trainer do what one does with all rows, and go on from their checkpoints bit for bit."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    for kind in TRAINER_KINDS:
        torch.save(weights(trained(kind, tmp_path / "one", 4)), tmp_path / f"{kind}.pt")
    processes.run(2, trained_in_ddp, str(tmp_path))


def run_accelerate(folder):
    # In this order: what accelerate finds in the environment, it leaves there.
    trained_by_trainer(f"{folder}/trainer")
    accelerated(folder)
    accelerated_in_mixed_precision()


def test_accelerate(tmp_path):
    pytest.importorskip("accelerate")
    processes.run(2, run_accelerate, str(tmp_path))
