"""Every kind of file that safekern reads: one of each, and what it is for."""

import contextlib
import signal

import safetensors.torch
import torch
from torch import nn

from safekern import Mask, Scores, SETAdamW, apply_delta, resume, save_delta
from safekern.scores import TopScores

KINDS = ("mask", "scores", "top scores", "expert scores", "delta", "training run", "checkpoint")
SIGMA = {"w": torch.tensor(0.5), "v": torch.tensor(2.0)}
META = {"objective": "refusal", "reduction": "mean", "nested": {"list": [1, None, 0.5]}}


def base_model():
    model = nn.ParameterDict({"w": torch.arange(12.0).view(3, 4), "b": torch.ones(2)})
    return model.bfloat16()


def mask_of_base():
    return Mask.from_indices({"w": [0, 3, 11]}, {"w": (3, 4)}, model_numel=14, meta=META)


def tuned_model():
    model = base_model()
    with torch.no_grad():
        model["w"].view(-1)[[0, 3, 11]] += 1
    return model


def trained():
    model = base_model()
    optimizer = SETAdamW(model.named_parameters(), mask_of_base(), lr=0.1)
    model["w"].sum().backward()
    optimizer.step()
    return resume.Weights(mask_of_base().parameters(model)), optimizer


def scores():
    gradients = {"w": torch.arange(12.0).view(3, 4), "v": torch.ones(5)}
    return Scores(gradients, SIGMA, num_batches=3, model_numel=20, meta=META)


def expert_scores():
    gradients = {"layers.0.experts.up_proj": torch.arange(12.0).view(3, 2, 2), "v": torch.ones(5)}
    sigma = {"layers.0.experts.up_proj": torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1), "v": torch.tensor(2.0)}
    return Scores(gradients, sigma, num_batches=3, model_numel=20, meta=META)


def top_scores():
    # The top 6 of 20: the five of `v`, and the last of `w`.
    candidates = {"w": torch.tensor([11.0]), "v": torch.ones(5)}
    indices = {"w": torch.tensor([11], dtype=torch.int32), "v": torch.arange(5, dtype=torch.int32)}
    shapes = {"w": torch.Size((3, 4)), "v": torch.Size((5,))}
    return TopScores(candidates, indices, shapes, SIGMA, keep=0.3, num_batches=3, model_numel=20, meta=META)


def write(kind, path):
    if kind == "mask":
        mask_of_base().save(path)
    elif kind == "scores":
        scores().save(path)
    elif kind == "top scores":
        top_scores().save(path)
    elif kind == "expert scores":
        expert_scores().save(path)
    elif kind == "delta":
        save_delta(tuned_model(), mask_of_base(), path, base=base_model())
    elif kind == "training run":
        weights, optimizer = trained()
        resume.save(path, weights.read(), optimizer, [0.5, 0.25], {"seed": 1})
    else:
        state = {name: value.detach().clone() for name, value in base_model().state_dict().items()}
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})


def use(kind, path):
    """Reads a file and does with it what it is for."""
    if kind == "mask":
        mask = Mask.load(path)
        mask.check(base_model())
        assert str(mask.summary()) and mask.fingerprint and mask | mask_of_base()
    elif kind.endswith("scores"):
        loaded = Scores.load(path)
        assert loaded.top(0.05).numel and repr(loaded)
        loaded.save(path.with_name("again"))
    elif kind == "delta":
        model = base_model()
        apply_delta(model, path)
        assert all(torch.equal(value, tuned_model()[name]) for name, value in model.items())
    elif kind == "training run":
        run = resume.load(path, {"seed": 1})
        weights, optimizer = trained()
        weights.write(run.weights)
        run.restore(optimizer)
    else:
        delta = path.with_name("delta_for_it")
        write("delta", delta)
        apply_delta(path, delta)
        changed = safetensors.torch.load_file(path)
        assert all(torch.equal(changed[name], value) for name, value in tuned_model().items())


@contextlib.contextmanager
def at_most(seconds):
    """Ends what hangs."""

    def give_up(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
