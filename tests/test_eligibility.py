"""Which parameters are scored by default, on the real module structures of transformers and PEFT."""

import pytest
import torch
import transformers
from torch import nn

from safekern.eligibility import check_plain, eligible_parameters, own_numel
from safekern.errors import InvalidArgumentError

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
MLP = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def build(family, **config):
    config_class = getattr(transformers, f"{family}Config")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{family}{head}")(config_class(**config))


def last_two(name):
    return ".".join(name.split(".")[-2:])


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("Llama", SIZES, [*ATTENTION, *MLP, "lm_head.weight"]),
        ("Llama", {**SIZES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, [*ATTENTION, *MLP]),
        ("Cohere", {**SIZES, "use_qk_norm": True, "pad_token_id": 0, "eos_token_id": 1}, [*ATTENTION, *MLP]),
        ("Mixtral", {**SIZES, "num_local_experts": 4}, [*ATTENTION, *EXPERTS, "lm_head.weight"]),
        (
            "Qwen2Moe",
            {**SIZES, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
            [*ATTENTION, *EXPERTS, *MLP, "lm_head.weight"],
        ),
        ("GptOss", {**SIZES, "num_local_experts": 4, "head_dim": 4}, [*ATTENTION, *EXPERTS, "lm_head.weight"]),
        ("GraniteMoe", {**SIZES, "num_local_experts": 4}, [*ATTENTION, *EXPERTS, "lm_head.weight"]),
        (
            "GPT2",
            {"vocab_size": 37, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1},
            ["c_attn.weight", "c_proj.weight", "c_fc.weight", "c_proj.weight"],
        ),
        (
            "RobertaPreLayerNorm",
            {
                "vocab_size": 37,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "is_decoder": True,
            },
            ["query.weight", "key.weight", "value.weight", *["dense.weight"] * 4],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_default_choice(family, config, expected):
    model = build(family, **config)
    chosen = eligible_parameters(model)
    assert [last_two(name) for name in chosen] == expected
    named = dict(model.named_parameters())
    assert list(chosen) == [name for name in named if name in chosen]
    for name, param in chosen.items():
        assert param is named[name]


def test_frozen_parameters_are_chosen_too():
    model = build("Llama", **SIZES)
    expected = list(eligible_parameters(model))
    model.requires_grad_(False)
    assert list(eligible_parameters(model)) == expected


class Block(nn.Module):
    """A module with the given children and parameters."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def matrix(*shape):
    return nn.Parameter(torch.randn(shape or (3, 4)))


def chosen_of(**parts):
    return list(eligible_parameters(Block(**parts)))


def named(class_name, base=nn.Module, **parts):
    """An instance of a module class of that name."""
    module = type(class_name, (base,), {"__init__": lambda self: nn.Module.__init__(self)})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def test_low_dimensional_integer_and_empty_parameters_are_left_out():
    assert chosen_of(
        scale=matrix(3),
        zero=nn.Parameter(torch.tensor(1.0)),
        packed=nn.Parameter(torch.zeros(3, 2, dtype=torch.uint8), requires_grad=False),
        empty=matrix(0, 4),
        weight=matrix(),
        kernel=matrix(2, 1, 3),
    ) == ["weight", "kernel"]


def test_a_quantised_model_is_refused():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InvalidArgumentError, match=r"most weights .* integers \(0.weight is torch.uint8\).* quantised"):
        eligible_parameters(model)
    assert list(eligible_parameters(model, lambda name, param: name == "1.weight")) == ["1.weight"]


@pytest.mark.parametrize(("dtype", "shape"), [(torch.uint8, (32, 24)), (torch.int32, (32, 6)), (torch.int8, (64, 24))])
def test_integers_that_hold_several_weights_count_as_those(dtype, shape):
    packed = torch.zeros(shape, dtype=dtype)
    head = nn.Linear(32, 40, bias=False)
    kept = Block(weight=nn.Parameter(packed, requires_grad=False))
    buffered = nn.Module()
    buffered.register_buffer("qweight", packed)
    for quantised in (kept, buffered):
        with pytest.raises(InvalidArgumentError, match=rf"most weights .* is {dtype}\).* quantised"):
            eligible_parameters(Block(layer=quantised, head=head))


def test_integers_that_are_not_packed_count_once():
    layer = Block(weight=matrix(8, 8), table=nn.Parameter(torch.zeros(8, 7, dtype=torch.int64), requires_grad=False))
    assert list(eligible_parameters(layer)) == ["weight"]
    layer.table = nn.Parameter(torch.zeros(8, 9, dtype=torch.bool), requires_grad=False)
    with pytest.raises(InvalidArgumentError, match=r"most weights .* is torch.bool\).* quantised"):
        eligible_parameters(layer)


def test_masks_and_positions_in_buffers_are_no_weights():
    model = nn.Linear(8, 8, bias=False)
    model.register_buffer("causal", torch.ones(1, 1, 64, 64, dtype=torch.uint8))
    model.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool))
    model.register_buffer("positions", torch.arange(512).reshape(2, 256))
    assert list(eligible_parameters(model)) == ["weight"]


def test_embeddings_are_left_out():
    assert chosen_of(
        tokens=nn.Embedding(3, 4),
        bag=nn.EmbeddingBag(3, 4),
        scaled=named("ScaledEmbedding", nn.Embedding, weight=matrix()),
        position_embeddings=matrix(1, 3, 4),
        proj=nn.Linear(3, 4),
    ) == ["proj.weight"]


def test_biases_of_any_shape_are_left_out():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    assert chosen_of(attention=attention, gate_up_proj_bias=matrix(), debiased=matrix()) == [
        "debiased",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    ]


def test_norms_are_left_out_but_not_what_norm_modules_contain():
    assert chosen_of(
        two_dimensional=nn.LayerNorm((3, 4)),
        per_head=named("CohereLayerNorm", weight=matrix()),
        gated=named("MambaRMSNormGated", weight=matrix()),
        pre=named("PreNorm", norm=nn.LayerNorm(4), fn=nn.Linear(4, 4)),
        conv=named("ConvNormLayer", convolution=nn.Conv1d(2, 3, 1), normalization=nn.BatchNorm1d(3)),
    ) == ["pre.fn.weight", "conv.convolution.weight"]


def test_routers_are_left_out_but_not_gates_of_other_kinds():
    assert chosen_of(
        switch=Block(
            router=named("Top1Router", classifier=nn.Linear(4, 2)), experts=nn.ModuleDict({"0": nn.Linear(4, 4)})
        ),
        hunyuan=Block(gate=Block(wg=nn.Linear(4, 2)), experts=nn.ModuleList([nn.Linear(4, 4)])),
        jet=Block(router=Block(layer=nn.Linear(4, 2)), input_linear=Block(weight=matrix(2, 4, 4))),
        any=Block(route=named("SpecialTopKRouter", weight=matrix())),
        shared=Block(shared_expert_gate=nn.Linear(4, 1), shared_expert=nn.Linear(4, 4)),
        dense=Block(gate=nn.Linear(4, 4), gate_proj=nn.Linear(4, 4), router_loss=nn.Linear(4, 4)),
    ) == [
        "switch.experts.0.weight",
        "hunyuan.experts.0.weight",
        "jet.input_linear.weight",
        "shared.shared_expert.weight",
        "dense.gate.weight",
        "dense.gate_proj.weight",
        "dense.router_loss.weight",
    ]


def test_a_gate_at_the_root_is_a_router_only_beside_experts():
    assert list(eligible_parameters(Block(gate=nn.Linear(4, 2), experts=nn.Linear(4, 4)))) == ["experts.weight"]
    assert list(eligible_parameters(Block(gate=nn.Linear(4, 2), up=nn.Linear(4, 4)))) == ["gate.weight", "up.weight"]


def test_adapters_are_left_out():
    adapted = Block(
        base_layer=nn.Linear(4, 4),
        oft_R=nn.ParameterDict({"default": matrix()}),
        vera=nn.ModuleDict({"default": nn.Linear(4, 2)}),
    )
    adapted.adapter_layer_names = ("oft_R", "vera", "absent")
    assert chosen_of(
        q_proj=adapted,
        direct=Block(weight=matrix(), lora_A=matrix(), lora_B=matrix()),
        modules=Block(weight=matrix(), lora_a=nn.Linear(4, 2), lora_b=nn.Linear(2, 4)),
    ) == ["q_proj.base_layer.weight", "direct.weight", "modules.weight"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for what has another name by now
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_peft_leaves_the_choice_as_it_is_without(options):
    peft = pytest.importorskip("peft")
    expected = list(eligible_parameters(build("Llama", **SIZES)))
    model = build("Llama", **SIZES)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj", "embed_tokens"], **options)
    wrapped = peft.get_peft_model(model, config)
    names = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in eligible_parameters(wrapped)]
    assert names == expected
    # A ratio is of the model, whatever is trained beside it.
    plain = sum(param.numel() for param in build("Llama", **SIZES).parameters())
    assert own_numel(wrapped) == plain < sum(param.numel() for param in wrapped.parameters())


def test_a_tied_parameter_appears_once_under_its_first_name():
    shared = matrix(4, 4)
    model = Block(first=Block(weight=shared), second=Block(weight=shared), third=Block(weight=matrix()))
    assert list(eligible_parameters(model)) == ["first.weight", "third.weight"]


def test_a_head_tied_to_the_embedding_is_left_out_wherever_it_comes():
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    for model in (Block(embed=embed, head=head, w=matrix()), Block(head=head, w=matrix(), embed=embed)):
        assert list(eligible_parameters(model)) == ["w"]


def test_select_replaces_the_default():
    model = build("Llama", **SIZES)
    seen = {}

    def norms_and_embeddings(name, param):
        seen[name] = param
        return "norm" in name or "embed" in name

    chosen = eligible_parameters(model, norms_and_embeddings)
    assert seen == dict(model.named_parameters())
    assert [last_two(name) for name in chosen] == [
        "embed_tokens.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "norm.weight",
    ]
    assert list(eligible_parameters(Block(w=matrix(), empty=matrix(0, 2)), lambda name, param: True)) == ["w"]


@pytest.mark.parametrize("select", [None, lambda name, param: False])
def test_nothing_eligible(select):
    with pytest.raises(InvalidArgumentError, match=r"no parameter .* select=lambda"):
        eligible_parameters(nn.ModuleList([nn.Embedding(3, 4), nn.LayerNorm(4)]), select)


def test_parameters_that_cannot_be_scored_are_refused():
    with torch.device("meta"):
        offloaded = Block(proj=nn.Linear(3, 4))
    with pytest.raises(InvalidArgumentError, match=r"proj\.weight is on the meta device"):
        eligible_parameters(offloaded)

    integers = Block(w=nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False))
    with pytest.raises(InvalidArgumentError, match=r"w has dtype torch\.int8"):
        eligible_parameters(integers, lambda name, param: True)
    small = Block(w=nn.Parameter(torch.zeros(3, 4).to(torch.float8_e4m3fn), requires_grad=False))
    with pytest.raises(InvalidArgumentError, match=r"w has dtype torch\.float8_e4m3fn.*unquantised"):
        eligible_parameters(small)

    with torch.inference_mode():
        untracked = Block(w=matrix())
    with pytest.raises(InvalidArgumentError, match=r"w was made under torch\.inference_mode"):
        eligible_parameters(untracked)


def test_wrapped_tensors_are_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(InvalidArgumentError, match="w is a TwoTensor, not a plain tensor"):
        check_plain("w", TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_plain_parameters_pass_in_any_layout(dtype):
    check_plain("w", torch.zeros(3, 4, dtype=dtype).t())


def test_what_norms_are_part_of_is_scored():
    class NormHead(nn.Linear):
        pass

    class LayerNormLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm_weight, self.weight = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(8, 4))

    class GroupedRMSNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    model = nn.ModuleList([NormHead(4, 3), LayerNormLinear(), GroupedRMSNorm2d(), nn.LayerNorm([2, 4])])
    assert list(eligible_parameters(model)) == ["0.weight", "1.weight"]


def test_parameters_that_share_memory_are_refused():
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 4)])
    assert list(eligible_parameters(model)) == ["1.weight", "2.weight"]
    model[1].weight.data = model[0].weight.data
    with pytest.raises(InvalidArgumentError, match=r"0\.weight and 1\.weight share memory"):
        eligible_parameters(model)
    assert list(eligible_parameters(model, lambda name, _: name == "2.weight")) == ["2.weight"]
    model[1].weight = model[0].weight
    assert list(eligible_parameters(model)) == ["2.weight"]


def test_what_modules_to_save_replace_is_not_scored():
    peft = pytest.importorskip("peft")
    model = build("Llama", **SIZES)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert not [name for name in eligible_parameters(adapted) if "lm_head" in name]
    with adapted.disable_adapter():
        assert [name for name in eligible_parameters(adapted) if "lm_head" in name] == [
            "base_model.model.lm_head.original_module.weight"
        ]
