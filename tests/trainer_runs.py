"""Runs of transformers.Trainer, and which weights they may have moved."""

import torch
import transformers
from exact import bits
from language_models import byte_tokenizer

from safekern import Mask
from safekern.objectives import encode

STEPS = 4


def rows(count=8):
    tokenizer = byte_tokenizer()
    pairs = [encode(tokenizer, f"Question number {i}?", f"Answer {i}.") for i in range(count)]
    return [{name: tensor[0, -24:] for name, tensor in pair.items()} for pair in pairs]


def random_mask(model, share=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(param.shape, generator=generator) < share
        for name, param in model.named_parameters()
        if "proj" in name
    }
    return Mask.from_bool(masks)


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_only_the_mask_moved(model, before, mask):
    moved = 0
    for name, param in model.named_parameters():
        changed = (bits(param) != bits(before[name])).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(mask[name].tolist() if name in mask else [])
        moved += len(changed)
    assert moved > 0.9 * mask.numel


def assert_only_the_rest_moved(model, before, mask):
    for name, param in model.named_parameters():
        if name in mask:
            chosen = mask[name]
            assert torch.equal(bits(param).flatten()[chosen], bits(before[name]).flatten()[chosen])
            assert (param != before[name]).flatten().sum() > 0.9 * (param.numel() - len(chosen))


def assert_same_weights(one, other):
    for name, param in one.named_parameters():
        assert torch.equal(bits(param), bits(other.get_parameter(name))), name


def training_arguments(folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "use_cpu": True,
            "seed": 0,
            "logging_strategy": "no",
            **options,
        },
    )


def train(model, folder, *, optimizer=None, factory=None, resume=None, **options):
    trainer = transformers.Trainer(
        model=model,
        args=training_arguments(folder, **options),
        train_dataset=rows(),
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=factory,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer
