import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safekern import names
from safekern.errors import MaskMismatchError

PARTS = ["module", "_orig_mod", "base_layer", "base_model", "model", "layers", "0", "weight", "w"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weight", "weight"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("module.model.norm.weight", "model.norm.weight"),
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.module.x.weight", "x.weight"),
        ("model.layers.0._orig_mod.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("model.layers.0._checkpoint_wrapped_module.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("module.base_model.model.x.weight", "x.weight"),
        ("base_model.model.base_model.model.x.base_layer.base_layer.weight", "x.weight"),
        # Only whole components are wrappers, and base_model.model only at the start.
        ("submodule.x_orig_mod.weight", "submodule.x_orig_mod.weight"),
        ("encoder.base_model.model.weight", "encoder.base_model.model.weight"),
        ("base_model.weight", "base_model.weight"),
        # The last component is the parameter itself.
        ("module", "module"),
        ("module.module", "module"),
        ("x.base_layer", "x.base_layer"),
    ],
)
def test_canonical(name, expected):
    assert names.canonical(name) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map(".".join))
def test_canonical_twice_is_canonical_once(name):
    assert names.canonical(names.canonical(name)) == names.canonical(name)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["model", "layers", "0", "1", "q"]), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["module", "_orig_mod", "base_layer"])), max_size=4),
    st.booleans(),
)
def test_wrapping_does_not_change_the_canonical_name(parts, wrappers, peft):
    wrapped = list(parts)
    for position, wrapper in wrappers:
        wrapped.insert(min(position, len(wrapped)), wrapper)
    name = ".".join([*(["base_model", "model"] if peft else []), *wrapped, "weight"])
    assert names.canonical(name) == ".".join([*parts, "weight"])


class TestResolve:
    def test_exact_names(self):
        assert names.resolve(["a", "b"], ["b", "c", "a"]) == {"a": "a", "b": "b"}

    def test_missing_names_are_left_out(self):
        assert names.resolve(["a", "x"], ["module.a"]) == {"a": "module.a"}
        assert names.resolve([], ["a"]) == {}
        assert names.resolve(["a"], []) == {}

    def test_either_side_may_be_wrapped(self):
        assert names.resolve(["module.a.w"], ["a.w"]) == {"module.a.w": "a.w"}
        assert names.resolve(["module.a.w"], ["_orig_mod.a.w"]) == {"module.a.w": "_orig_mod.a.w"}

    def test_an_exact_match_wins_over_wrapped_ones(self):
        assert names.resolve(["a.w"], ["module.a.w", "a.w", "_orig_mod.a.w"]) == {"a.w": "a.w"}

    def test_several_candidates(self):
        with pytest.raises(MaskMismatchError, match=r"'a\.w' is ambiguous.*'module\.a\.w' or '_orig_mod\.a\.w'"):
            names.resolve(["a.w"], ["module.a.w", "_orig_mod.a.w"])

    def test_a_candidate_that_is_taken_still_makes_it_ambiguous(self):
        with pytest.raises(MaskMismatchError, match="ambiguous"):
            names.resolve(["module.a.w", "a.w"], ["module.a.w", "_orig_mod.a.w"])

    @pytest.mark.parametrize("wanted", [["a.w", "module.a.w"], ["module.a.w", "a.w"], ["module.a.w", "_orig_mod.a.w"]])
    def test_two_names_for_one_parameter(self, wanted):
        with pytest.raises(MaskMismatchError, match=r"both name the parameter 'a\.w'"):
            names.resolve(wanted, ["a.w"])

    def test_repeated_names_and_iterators(self):
        assert names.resolve(iter(["a", "a"]), iter(["module.a", "module.a"])) == {"a": "module.a"}

    def test_peft(self):
        available = [
            "base_model.model.model.layers.0.q_proj.base_layer.weight",
            "base_model.model.model.layers.0.q_proj.lora_A.default.weight",
            "base_model.model.model.norm.weight",
        ]
        wanted = ["model.layers.0.q_proj.weight", "model.norm.weight"]
        assert list(names.resolve(wanted, available).values()) == [available[0], available[2]]

    def test_a_module_that_peft_trains_whole(self):
        original, copy = (
            "base_model.model.head.original_module.weight",
            "base_model.model.head.modules_to_save.a.weight",
        )
        kept = [original, copy, "base_model.model.norm.weight"]
        for wanted in ("head.weight", "_orig_mod.head.weight"):
            with pytest.raises(
                MaskMismatchError, match=f"'{wanted}' is ambiguous.*'{original}' or '{copy}'.*merge the adapter"
            ):
                names.resolve([wanted], kept)
        assert names.resolve(["norm.weight"], kept) == {"norm.weight": kept[2]}
        # Names that say which.
        assert names.resolve(kept, kept) == dict(zip(kept, kept, strict=True))
        wrapped = [f"_orig_mod.{name}" for name in kept]
        assert list(names.resolve(kept, wrapped).values()) == wrapped
        assert list(names.resolve(wrapped, kept).values()) == kept
        assert names.resolve(["weight"], ["original_module.weight"]) == {"weight": "original_module.weight"}
        with pytest.raises(MaskMismatchError, match="ambiguous"):
            names.resolve(["weight"], ["original_module.weight", "modules_to_save.a.weight"])

    @settings(max_examples=100, deadline=None)
    @given(
        st.sets(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join), max_size=6),
        st.sets(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join), max_size=6),
    )
    def test_what_is_found_is_one_to_one_and_fits(self, wanted, available):
        try:
            found = names.resolve(wanted, available)
        except MaskMismatchError:
            return
        assert len(set(found.values())) == len(found)
        assert set(found) <= wanted
        assert set(found.values()) <= available
        assert all(names.canonical(left) == names.canonical(right) for left, right in found.items())
        for name in wanted - set(found):
            assert all(names.canonical(name) != names.canonical(other) for other in available)


@pytest.mark.parametrize(
    ("name", "layer", "component"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "q_proj"),
        ("model.layers.3.self_attn.q_proj.bias", 3, "q_proj"),
        ("model.layers.3.self_attn.k_proj.weight", 3, "k_proj"),
        ("model.layers.3.self_attn.v_proj.weight", 3, "v_proj"),
        ("model.layers.3.self_attn.o_proj.weight", 3, "o_proj"),
        ("model.layers.31.mlp.gate_proj.weight", 31, "gate_proj"),
        ("model.layers.31.mlp.up_proj.weight", 31, "up_proj"),
        ("model.layers.31.mlp.down_proj.weight", 31, "down_proj"),
        ("model.layers.0.mlp.gate_up_proj.weight", 0, "gate_up_proj"),
        ("model.layers.0.self_attn.qkv_proj.weight", 0, "qkv_proj"),
        ("model.layers.0.self_attn.q_norm.weight", 0, "q_norm"),
        ("model.layers.0.self_attn.sinks", 0, "sinks"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 0, "kv_a_proj_with_mqa"),
        ("model.layers.5.mlp.experts.gate_up_proj", 5, "experts.gate_up_proj"),
        ("model.layers.5.mlp.experts.down_proj", 5, "experts.down_proj"),
        ("model.layers.5.mlp.experts.gate_up_proj_bias", 5, "experts.gate_up_proj_bias"),
        ("model.layers.5.block_sparse_moe.experts.7.w1.weight", 5, "experts.w1"),
        ("experts.7.w1.weight", None, "experts.w1"),
        ("model.layers.5.mlp.gate.weight", 5, "gate"),
        ("model.layers.5.mlp.router.weight", 5, "router"),
        ("model.layers.5.mlp.shared_expert.up_proj.weight", 5, "shared_expert.up_proj"),
        ("model.layers.5.mlp.shared_experts.up_proj.weight", 5, "shared_experts.up_proj"),
        ("model.layers.5.mlp.shared_expert_gate.weight", 5, "shared_expert_gate"),
        ("model.layers.5.feed_forward.shared_expert.down_proj.weight", 5, "shared_expert.down_proj"),
        ("lm_head.weight", None, "lm_head"),
        ("embed_out.weight", None, "lm_head"),
        ("model.embed_tokens.weight", None, "embed"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", None, "patch_embedding"),
        ("model.decoder.embed_positions.weight", None, "embed"),
        ("gpt_neox.embed_in.weight", None, "embed"),
        ("transformer.word_embeddings.weight", None, "embed"),
        ("transformer.wte.weight", None, "embed"),
        ("transformer.wpe.weight", None, "embed"),
        ("transformer.h.11.attn.c_attn.weight", 11, "c_attn"),
        ("transformer.h.11.attn.c_proj.weight", 11, "attn.c_proj"),
        ("transformer.h.11.mlp.c_proj.weight", 11, "mlp.c_proj"),
        ("gpt_neox.layers.2.attention.dense.weight", 2, "attention.dense"),
        ("gpt_neox.layers.2.mlp.dense_h_to_4h.weight", 2, "dense_h_to_4h"),
        ("model.decoder.layers.1.fc1.weight", 1, "fc1"),
        ("model.norm.weight", None, "norm"),
        ("base_model.model.model.layers.3.self_attn.q_proj.base_layer.weight", 3, "q_proj"),
        ("module._orig_mod.model.layers.3.self_attn.q_proj.weight", 3, "q_proj"),
        ("blocks.4.mlp.0.weight", 4, "mlp.0"),
        ("blocks.4.mlp.2.weight", 4, "mlp.2"),
        ("layers.4.weight", 4, "layers"),
        ("0.weight", 0, "weight"),
        ("weight", None, "weight"),
        ("w", None, "w"),
        ("a.w", None, "w"),
        ("7", None, "7"),
    ],
)
def test_layer_and_component(name, layer, component):
    assert names.layer(name) == layer
    assert names.component(name) == component


@pytest.mark.parametrize(
    ("name", "shape", "experts"),
    [
        ("model.layers.5.mlp.experts.down_proj", (8, 4, 2), 8),
        ("module.base_model.model.layers.5.mlp.experts.base_layer.gate_up_proj", (8, 4, 2), 8),
        ("experts.w", (3, 4, 2), 3),
        ("model.layers.5.mlp.experts.down_proj_bias", (8, 4), None),
        ("blocks.0.ffn.experts.mlp.w1", (32, 2), None),
        ("layers.5.experts.7.conv.weight", (8, 4, 2), None),
        ("layers.5.shared_experts.conv.weight", (8, 4, 2), None),
        ("layers.5.conv.weight", (8, 4, 2), None),
        ("experts", (8, 4, 2), 8),
    ],
)
def test_fused_experts(name, shape, experts):
    assert names.fused_experts(name, shape) == experts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PARTS, "experts", "shared_expert", "²", ""]), min_size=1, max_size=6).map(".".join))
def test_every_name_has_a_place(name):
    layer = names.layer(name)
    assert layer is None or layer >= 0
    assert isinstance(names.component(name), str)


def test_a_component_has_the_same_name_in_every_layer():
    for template in ("model.layers.{}.self_attn.q_proj.weight", "layers.{}.weight", "h.{}.mlp.3.weight"):
        assert len({names.component(template.format(number)) for number in range(20)}) == 1
