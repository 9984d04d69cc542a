"""Tiny models of every family that transformers builds alike, and what is expected of each."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {**SIZES, **TOKENS, "intermediate_size": 24, "num_key_value_heads": 2}
ROUTED = {"num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
SHARED = {"n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}

# Shapes by component.
HEAD = {"lm_head": (37, 16)}
ATTENTION = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
MLP = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
EXPERTS = {"experts.gate_up_proj": (4, 48, 16), "experts.down_proj": (4, 16, 24)}
SMALL_EXPERTS = {"experts.gate_up_proj": (4, 16, 16), "experts.down_proj": (4, 16, 8)}
TRANSPOSED_EXPERTS = {"experts.gate_up_proj": (4, 16, 48), "experts.down_proj": (4, 24, 16)}
MLA = {
    "q_a_proj": (6, 16),
    "q_b_proj": (24, 6),
    "kv_a_proj_with_mqa": (10, 16),
    "kv_b_proj": (32, 8),
    "o_proj": (16, 16),
}
NEOX_MLP = {"dense_h_to_4h": (64, 16), "dense_4h_to_h": (16, 64)}


def prefixed(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


@dataclass
class Family:
    """A tiny model's configuration and what is expected of its last layer and of what lies outside of layers."""

    config: dict[str, Any]
    scored: dict[str, tuple[int, ...]]
    left_out: set[str] = field(default_factory=set)
    """Components with parameters of two or more dimensions that are not scored, besides embeddings."""
    buffers: set[str] = field(default_factory=set)
    model: str = "{}ForCausalLM"
    configuration: str = "{}Config"

    @property
    def is_moe(self):
        return any(name.startswith("experts.") for name in self.scored)


SHARED_MLP = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}

FAMILIES = {
    "Llama": Family(COMMON, ATTENTION | MLP | HEAD),
    "Qwen2": Family(COMMON, ATTENTION | MLP | HEAD),
    "Qwen3": Family({**COMMON, "head_dim": 4}, ATTENTION | MLP | HEAD),
    "Gemma3": Family({**COMMON, "head_dim": 4}, ATTENTION | MLP, configuration="{}TextConfig"),
    "Phi3": Family(
        COMMON,
        {"qkv_proj": (32, 16), "o_proj": (16, 16), "gate_up_proj": (48, 16), "down_proj": (16, 24)} | HEAD,
    ),
    "Mixtral": Family({**COMMON, **ROUTED, "num_local_experts": 4}, ATTENTION | EXPERTS | HEAD, {"gate"}),
    "Olmoe": Family({**COMMON, **ROUTED, "num_experts": 4}, ATTENTION | EXPERTS | HEAD, {"gate"}),
    "Qwen2Moe": Family(
        {
            **COMMON,
            **ROUTED,
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        ATTENTION | SMALL_EXPERTS | prefixed("shared_expert", SHARED_MLP) | HEAD,
        {"gate", "shared_expert_gate"},
    ),
    "Qwen3Moe": Family(
        {**COMMON, **ROUTED, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8},
        ATTENTION | SMALL_EXPERTS | HEAD,
        {"gate"},
    ),
    "DeepseekV2": Family(
        {**COMMON, **ROUTED, **LATENT, **SHARED, "topk_method": "greedy"},
        MLA | SMALL_EXPERTS | prefixed("shared_experts", SHARED_MLP) | HEAD,
        {"gate"},
    ),
    "DeepseekV2 lite": Family(
        {**COMMON, **ROUTED, **LATENT, **SHARED, "topk_method": "greedy", "q_lora_rank": None},
        {"q_proj": (24, 16), **{name: MLA[name] for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}}
        | SMALL_EXPERTS
        | prefixed("shared_experts", SHARED_MLP)
        | HEAD,
        {"gate"},
    ),
    "DeepseekV3": Family(
        {**COMMON, **ROUTED, **LATENT, **SHARED, "n_group": 2, "topk_group": 1},
        MLA | SMALL_EXPERTS | prefixed("shared_experts", SHARED_MLP) | HEAD,
        {"gate"},
        {"e_score_correction_bias"},
    ),
    "Glm4Moe": Family(
        {**COMMON, **ROUTED, **SHARED, "head_dim": 4},
        ATTENTION | SMALL_EXPERTS | prefixed("shared_experts", SHARED_MLP) | HEAD,
        {"gate"},
        {"e_score_correction_bias"},
    ),
    "GraniteMoe": Family({**COMMON, **ROUTED, "num_local_experts": 4}, ATTENTION | EXPERTS | HEAD, {"router"}),
    "GptOss": Family(
        {**COMMON, **ROUTED, "head_dim": 4, "num_local_experts": 4},
        ATTENTION | TRANSPOSED_EXPERTS | HEAD,
        {"router", "experts.gate_up_proj_bias", "experts.down_proj_bias"},
    ),
    "Llama4": Family(
        {
            **COMMON,
            "num_experts_per_tok": 1,
            "head_dim": 4,
            "num_local_experts": 4,
            "intermediate_size_mlp": 24,
            "interleave_moe_layer_step": 2,
        },
        ATTENTION | TRANSPOSED_EXPERTS | prefixed("shared_expert", MLP) | HEAD,
        {"router"},
        configuration="{}TextConfig",
    ),
    "GPT2": Family(
        {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **TOKENS},
        {"c_attn": (16, 48), "attn.c_proj": (16, 16), "c_fc": (16, 64), "mlp.c_proj": (64, 16)},
        model="{}LMHeadModel",
    ),
    "GPTNeoX": Family(
        {**SIZES, **TOKENS, "intermediate_size": 64},
        {"query_key_value": (48, 16), "attention.dense": (16, 16)} | NEOX_MLP | HEAD,
    ),
    "Falcon": Family(
        {**SIZES, **TOKENS, "multi_query": True},
        {"query_key_value": (24, 16), "self_attention.dense": (16, 16)} | NEOX_MLP,
    ),
    "Falcon new": Family(
        {**SIZES, **TOKENS, "new_decoder_architecture": True, "num_kv_heads": 2},
        {"query_key_value": (32, 16), "self_attention.dense": (16, 16)} | NEOX_MLP,
    ),
    "OPT": Family(
        {**SIZES, **TOKENS, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (16, 16)) | {"fc1": (24, 16), "fc2": (16, 24)},
    ),
}
MOE = [name for name, family in FAMILIES.items() if family.is_moe]


def build(name):
    family, prefix = FAMILIES[name], name.split()[0]
    torch.manual_seed(0)
    config = getattr(transformers, family.configuration.format(prefix))(**family.config)
    model = getattr(transformers, family.model.format(prefix))(config).eval()
    if family.is_moe:
        # Grouped matrix products want strides that models this small do not have.
        model.set_experts_implementation("eager")
    return model
