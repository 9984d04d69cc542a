"""Parameters whose memory is freed, as FSDP2 frees those that a forward without a backward left whole in a model."""

import sys

import processes
import pytest
import torch
import torch.distributed as dist
from exact import bits
from torch import nn

import safekern
from safekern import InvalidArgumentError, Mask, SafekernError, SETAdamW, SPAAdamW
from safekern.integrations import leave_to_set
from safekern.sharding import is_sharded

ROOTS, INNER = "head.weight", "layers.0.weight"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def sharded(reshard_after_forward=None):
    from torch.distributed.fsdp import fully_shard

    model = Model()
    for layer in model.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward)
    return fully_shard(model)


def evaluated(model):
    with torch.no_grad():
        model(inputs(0))
    return model


def inputs(step):
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step))


def mask_of(*names):
    shapes = {name: param.shape for name, param in Model().named_parameters()}
    generator = torch.Generator().manual_seed(1)
    return Mask.from_bool({name: torch.rand(shapes[name], generator=generator) < 0.5 for name in names})


def train(model, optimizer):
    for step in range(3):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.full_tensor().detach() for name, param in model.named_parameters()}


def protected_adamw(named_parameters, mask):
    named_parameters = list(named_parameters)
    optimizer = torch.optim.AdamW([param for _, param in named_parameters], lr=1e-2)
    safekern.protect(optimizer, mask, named_parameters)
    return optimizer


def collecting_set(named_parameters, mask):
    return SETAdamW(named_parameters, mask, lr=1e-2, in_backward=True)


OPTIMIZERS = (SETAdamW, collecting_set, SPAAdamW, protected_adamw)
REFUSED = r"head\.weight is what FSDP2 gathered .* call model\.reshard\(\)"


def two_processes(folder):
    from torch.distributed.fsdp import fully_shard

    for make in OPTIMIZERS:
        wanted = train(model := sharded(), make(model.named_parameters(), mask_of(ROOTS, INNER)))
        model = evaluated(sharded())
        assert type(model.head.weight) is nn.Parameter
        kept = list(model.named_parameters())
        with pytest.raises(InvalidArgumentError, match=REFUSED):
            make(model.named_parameters(), mask_of(ROOTS, INNER))
        model.reshard()
        # FSDP2 has freed these.
        with pytest.raises(InvalidArgumentError, match=REFUSED):
            make(kept, mask_of(ROOTS, INNER))
        got = train(model, make(model.named_parameters(), mask_of(ROOTS, INNER)))
        for name, values in wanted.items():
            assert torch.equal(bits(got[name]), bits(values)), name

    # An optimizer made in time, of which the handle would look for other parameters than it trains.
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InvalidArgumentError, match=REFUSED):
        safekern.protect(optimizer, mask_of(ROOTS, INNER), evaluated(model).named_parameters())

    # Outside the mask too: their gradients would never be cleared, nor the weights trained.
    for make in OPTIMIZERS[:3]:
        with pytest.raises(InvalidArgumentError, match=r"head\.(weight|bias) is what FSDP2 gathered"):
            make(evaluated(sharded()).named_parameters(), mask_of(INNER))

    # What works on whole models, which these look like.
    path = f"{folder}/delta{dist.get_rank()}.safetensors"
    safekern.save_delta(Model(), mask_of(ROOTS), path)
    parts = Model()
    fully_shard(parts.head)
    for model in (evaluated(fully_shard(Model())), evaluated(parts)):
        for act in (
            lambda model: safekern.perturb(model, mask_of(ROOTS)).__enter__(),
            lambda model: safekern.save_delta(model, mask_of(ROOTS), f"{path}.other"),
            lambda model: safekern.save_delta(model, mask_of(INNER), f"{path}.other"),
            lambda model: safekern.apply_delta(model, path),
            lambda model: leave_to_set(model, mask_of(ROOTS)),
        ):
            with pytest.raises(InvalidArgumentError, match=r"is what FSDP2 gathered .* whole models"):
                act(model)


def four_processes():
    """What FSDP2 leaves may be DTensors: where it reshards to fewer processes, and over tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for make in OPTIMIZERS:
        model = evaluated(
            fully_shard(parallelize_module(Model(), mesh["tp"], {"head": ColwiseParallel()}), mesh=mesh["dp"])
        )
        assert is_sharded(model.head.weight)
        with pytest.raises(InvalidArgumentError, match=REFUSED):
            make([(ROOTS, model.head.weight)], mask_of(ROOTS))
        model = evaluated(sharded(reshard_after_forward=2))
        model.reshard()
        with pytest.raises(InvalidArgumentError, match=r"layers\.0\.weight is what FSDP2 gathered"):
            make(model.named_parameters(), mask_of(ROOTS, INNER))


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
def test_what_fsdp_frees_is_refused(tmp_path):
    processes.run(2, two_processes, str(tmp_path))
    processes.run(4, four_processes)


@pytest.mark.parametrize("make", [SETAdamW, SPAAdamW, protected_adamw])
def test_a_step_without_the_memory_changes_nothing(make):
    model = Model()
    optimizer = make(model.named_parameters(), mask_of(INNER, ROOTS))
    model(inputs(0)).square().mean().backward()
    model.head.weight.untyped_storage().resize_(0)
    before = [(param, param.detach().clone()) for param in model.parameters() if param is not model.head.weight]
    with pytest.raises(SafekernError, match=r"the memory of (parameter )?head\.weight was freed"):
        optimizer.step()
    for param, values in before:
        assert torch.equal(bits(param), bits(values))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers_of_freed_parameters_are_refused(make):
    model = Model()
    model.head.weight.untyped_storage().resize_(0)
    with pytest.raises(InvalidArgumentError, match=r"the memory of parameter head\.weight was freed"):
        make(model.named_parameters(), mask_of(INNER, ROOTS))
