"""transformers.Trainer, TRL, accelerate and PEFT, each doing with a masked optimizer what it does with any other."""

import pytest
import torch
import transformers
from exact import bits
from language_models import byte_tokenizer, tiny_gpt2, tiny_llama, with_adapter
from trainer_runs import (
    STEPS,
    assert_only_the_mask_moved,
    assert_only_the_rest_moved,
    assert_same_weights,
    random_mask,
    rows,
    train,
    training_arguments,
    weights,
)

import safekern
from safekern import Mask
from safekern.errors import InvalidArgumentError, MaskMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:fan_in_fan_out is set to False")


# transformers.Trainer and TRL

pytest.importorskip("accelerate")


# Renamed in transformers 5.24, with a warning under the old name.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)
OPTIMIZERS = {
    "dense": lambda model, mask: safekern.SETAdamW(model.named_parameters(), mask, lr=1e-3),
    "in_backward": lambda model, mask: safekern.SETAdamW(model.named_parameters(), mask, lr=1e-3, in_backward=True),
}
SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {CHECKPOINTING: True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trainer_updates_the_mask_only(kind, setting, tmp_path):
    model = tiny_llama()
    mask, before = random_mask(model), weights(model)
    train(model, tmp_path, optimizer=OPTIMIZERS[kind](model, mask), **SETTINGS[setting])
    assert_only_the_mask_moved(model, before, mask)


@pytest.mark.parametrize("setting", SETTINGS)
def test_trainer_gives_the_same_weights_in_both_modes(setting, tmp_path):
    models = [tiny_llama(), tiny_llama()]
    for model, make in zip(models, OPTIMIZERS.values(), strict=True):
        # Clipping by the Trainer would measure all gradients in one mode and the selected ones in the other.
        train(model, tmp_path, optimizer=make(model, random_mask(model)), max_grad_norm=0.0, **SETTINGS[setting])
    assert_same_weights(*models)


def test_trainer_clips_by_the_selected_entries_in_backward_mode(tmp_path):
    """Its own clipping acts on what backward left of the gradients, as the optimizer's clip_grad_norm_ would."""
    model, other = tiny_llama(), tiny_llama()
    mask = random_mask(model)
    optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-3, in_backward=True)
    trainer = train(model, tmp_path, optimizer=optimizer, max_grad_norm=1e-3, logging_strategy="steps", logging_steps=1)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == STEPS and all(norm > 1e-3 for norm in norms)
    unclipped = safekern.SETAdamW(other.named_parameters(), mask, lr=1e-3, in_backward=True)
    train(other, tmp_path, optimizer=unclipped, max_grad_norm=0.0)
    clipped, full = (
        sum(float(state["exp_avg_sq"].sum()) for state in opt.state.values() if "exp_avg_sq" in state)
        for opt in (optimizer, unclipped)
    )
    assert 0 < clipped < 1e-6 * full


@pytest.mark.parametrize("in_backward", [False, True])
def test_trainer_builds_the_optimizer_by_factory(in_backward, tmp_path):
    model = tiny_llama()
    mask, before = random_mask(model), weights(model)
    factory = safekern.integrations.for_trainer(safekern.SETAdamW)
    trainer = train(model, tmp_path, factory=(factory, {"mask": mask, "lr": 1e-3, "in_backward": in_backward}))
    assert isinstance(trainer.optimizer.optimizer, safekern.SETAdamW)
    assert_only_the_mask_moved(model, before, mask)


def test_trainer_with_spa(tmp_path):
    model = tiny_llama()
    mask, before = random_mask(model), weights(model)
    factory = safekern.integrations.for_trainer(safekern.SPAAdamW)
    train(model, tmp_path, factory=(factory, {"mask": mask, "lr": 1e-3}))
    assert_only_the_rest_moved(model, before, mask)


def test_trainer_with_protection_around_its_own_optimizer(tmp_path):
    model = tiny_llama()
    mask, before = random_mask(model), weights(model)
    trainer = transformers.Trainer(model=model, args=training_arguments(tmp_path), train_dataset=rows())
    with safekern.protect(trainer.create_optimizer(), mask, model.named_parameters()) as handle:
        trainer.train()
        handle.verify()
    assert_only_the_rest_moved(model, before, mask)


@pytest.mark.parametrize("kind", ["dense", "in_backward", "spa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_resumes_from_a_checkpoint_bit_for_bit(kind, dtype, tmp_path):
    def make(model):
        mask = random_mask(model)
        if kind == "spa":
            return safekern.SPAAdamW(model.named_parameters(), mask, lr=1e-3)
        return OPTIMIZERS[kind](model, mask)

    whole, resumed = tiny_llama().to(dtype), tiny_llama().to(dtype)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    train(whole, tmp_path / "whole", optimizer=make(whole), **options)
    train(
        resumed, tmp_path / "new", optimizer=make(resumed), resume=str(tmp_path / "whole" / "checkpoint-3"), **options
    )
    assert_same_weights(whole, resumed)


@pytest.mark.parametrize("in_backward", [False, True])
def test_sft_trainer(in_backward, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, tokenizer = tiny_llama(), byte_tokenizer()
    mask, before = random_mask(model), weights(model)
    data = datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"{i}?"}], "completion": [{"role": "assistant", "content": "No."}]}
            for i in range(8)
        ]
    )
    arguments = training_arguments(tmp_path).to_dict()
    config = trl.SFTConfig(
        **{key: arguments[key] for key in ("output_dir", "max_steps", "learning_rate", "report_to", "disable_tqdm")},
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        max_length=64,
    )
    optimizer = safekern.SETAdamW(model.named_parameters(), mask, lr=1e-3, in_backward=in_backward)
    trl.SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None)
    ).train()
    assert_only_the_mask_moved(model, before, mask)


# accelerate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_backward", [False, True])
def test_accelerate_equals_a_plain_loop(in_backward, dtype):
    accelerate = pytest.importorskip("accelerate")
    batch = {name: tensor[None] for name, tensor in rows(1)[0].items()}
    models = [tiny_llama().to(dtype), tiny_llama().to(dtype)]
    optimizers = [
        safekern.SETAdamW(model.named_parameters(), random_mask(model), lr=1e-3, in_backward=in_backward)
        for model in models
    ]
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(models[1], optimizers[1])
    for _ in range(STEPS):
        (models[0](**batch).loss / 2).backward()
        (models[0](**batch).loss / 2).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        for _ in range(2):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert_same_weights(*models)


# PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "targets"), [(tiny_llama, ["q_proj", "down_proj"]), (tiny_gpt2, ["c_attn", "c_proj"])]
)
def test_merged_adapters_spare_the_mask(make, targets, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    masks = {name: torch.rand(param.shape) < 0.1 for name, param in model.named_parameters() if param.ndim > 1}
    mask, before = Mask.from_bool(masks), weights(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = make().to(dtype)
    plain.load_state_dict(state)

    torch.manual_seed(1)
    adapted = with_adapter(model, targets)
    torch.manual_seed(1)
    reference = with_adapter(plain, targets).merge_and_unload()
    merged = safekern.merge_lora(adapted, mask)

    violations = 0
    for name, param in merged.named_parameters():
        protected = mask.bool(name) if name in mask else torch.zeros(param.shape, dtype=torch.bool)
        want = torch.where(protected, before[name], reference.get_parameter(name))
        assert torch.equal(bits(param), bits(want)), name
        violations += int((bits(reference.get_parameter(name)) != bits(before[name]))[protected].sum())
    # The adapter did move protected weights where nothing was done about it.
    assert violations > 100
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_merging_keeps_the_base_of_a_module_that_was_trained_whole():
    model = tiny_llama()
    mask = Mask.from_indices(
        {"lm_head.weight": [0, 5], "model.layers.0.self_attn.q_proj.weight": [3]},
        {"lm_head.weight": (259, 32), "model.layers.0.self_attn.q_proj.weight": (32, 32)},
    )
    before = weights(model)
    adapted = with_adapter(model, ["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, param in adapted.named_parameters():
            if "modules_to_save" in name:
                param.add_(1.0)
    merged = safekern.merge_lora(adapted, mask)
    for name, param in merged.named_parameters():
        if name in mask:
            assert torch.equal(param.flatten()[mask[name]], before[name].flatten()[mask[name]])
    assert torch.equal(merged.lm_head.weight.flatten()[1:5], before["lm_head.weight"].flatten()[1:5] + 1)


def test_a_plain_mask_does_not_say_which_copy_of_a_module_trained_whole_it_means():
    model = tiny_llama()
    mask = Mask.from_indices({"lm_head.weight": [0, 5]}, {"lm_head.weight": (259, 32)})
    adapted = with_adapter(model, ["q_proj"], modules_to_save=["lm_head"]).requires_grad_(True)
    optimizer = torch.optim.AdamW(adapted.parameters())
    for use in (
        lambda: safekern.protect(optimizer, mask, adapted.named_parameters()),
        lambda: safekern.SPAAdamW(adapted.named_parameters(), mask),
        lambda: safekern.SETAdamW(adapted.named_parameters(), mask),
        lambda: safekern.integrations.leave_to_set(adapted, mask),
        safekern.perturb(adapted, mask).__enter__,
    ):
        with pytest.raises(MaskMismatchError, match=r"ambiguous.*original_module.*modules_to_save.*merge the"):
            use()
    # What the message says to do.
    mask.check(adapted.merge_and_unload())


def test_merging_refuses_before_anything_is_changed():
    model = tiny_llama()
    with pytest.raises(InvalidArgumentError, match="LlamaForCausalLM"):
        safekern.merge_lora(model, random_mask(model))
    adapted = with_adapter(model, ["q_proj"])
    before = weights(adapted)
    with pytest.raises(MaskMismatchError, match="missing"):
        safekern.merge_lora(adapted, Mask.from_indices({"another.weight": [0]}, {"another.weight": (2, 2)}))
    assert all(torch.equal(param, before[name]) for name, param in adapted.named_parameters())
    mask = Mask.from_indices({"model.embed_tokens.weight": [0]}, {"model.embed_tokens.weight": (259, 32)})
    adapted.merge_adapter()
    with pytest.raises(InvalidArgumentError, match="merged already"):
        safekern.merge_lora(adapted, mask)


@pytest.mark.parametrize("made_by", ["pissa", "olora"])
def test_adapters_that_took_their_part_out_of_the_weights_are_refused(made_by):
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    mask = random_mask(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=made_by)
    adapted = peft.get_peft_model(model, config)
    before = weights(adapted)
    with pytest.raises(InvalidArgumentError, match=f"default was made by {made_by}.*path_initial_model"):
        safekern.merge_lora(adapted, mask)
    assert all(torch.equal(param, before[name]) for name, param in adapted.named_parameters())


def test_a_trainer_hands_on_no_learning_rate(tmp_path):
    model = tiny_llama()
    factory = safekern.integrations.for_trainer(safekern.SETAdamW)
    with pytest.raises(InvalidArgumentError, match="does not hand on the learning_rate"):
        train(model, tmp_path, factory=(factory, {"mask": random_mask(model)}))
