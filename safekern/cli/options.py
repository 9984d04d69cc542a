"""What several subcommands share: options of the same name and meaning, and how their values are checked."""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safekern import files
from safekern._version import __version__
from safekern.chat import require_template
from safekern.checkpoint import fingerprint
from safekern.eligibility import own_numel
from safekern.errors import FileAccessError, InvalidArgumentError, MaskMismatchError
from safekern.evaluation import is_refusal
from safekern.faults import first_line
from safekern.mask import Mask
from safekern.models import left_out, load
from safekern.names import listed
from safekern.products import in_float32, multiplies_slowly
from safekern.prompts import Pairs
from safekern.prompts import load as load_pairs
from safekern.tables import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(text: str) -> int:
    """A whole number from 1 on that may be written as 64e6, as far as 64 bits reach."""
    value = float(text)
    if not (1 <= value < 2**63 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"a whole number from 1 to 9e18 is needed, got {text}")
    return int(value)


def even(text: str) -> int:
    """A whole number that halves."""
    value = number(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"a multiple of 2 is needed, for half of each kind, got {text}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is needed, got {text}")
    return value


def less_than_all(text: str) -> float:
    """A share in [0, 1)."""
    value = share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to less than 1 is needed, got {text}")
    return value


def ratio(text: str) -> float:
    """A share in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 1 is needed, such as 0.01 for 1%, got {text}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, got {text}")
    return value


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of at least 0 is needed, such as 0.1, got {text}")
    return value


def seed(text: str) -> int:
    """What a random generator of PyTorch takes."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2^63 - 1 is needed, got {text}")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is loaded, and how: what `load_model` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="a folder that save_pretrained wrote, a .gguf file, a name on the Hugging Face hub, or smollm2 (the model "
        "of safekern demo)",
    )
    group.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="of the weights (default: the checkpoint's; float32 for GGUF)"
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="get a model of the hub from there; without it, nothing touches the network",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the checkpoint brings; read it first"
    )
    group.add_argument("--device", help="where to run, such as cpu or cuda:0 (default: cuda where there is one)")


def load_model(args: argparse.Namespace, *, chats: bool = True) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The model on its device and its tokenizer, from the options of `add_model`.

    Args:
        args: the parsed options.
        chats: whether the tokenizer must have a chat template.

    Raises:
        SafekernError: the device or the model is not there, or has no chat template.
    """
    where = device(args.device)
    with stage(f"load {printable(args.model)}"):
        model, tokenizer = load(
            args.model, dtype=_DTYPES[args.dtype], download=args.download, trust_remote_code=args.trust_remote_code
        )
        if chats:
            require_template(tokenizer)
        model.to(where)  # type: ignore[arg-type]
    # One that does not chat is not run.
    if chats and where.type == "cpu":
        _multiply_quickly(model)
    return model, tokenizer


def _multiply_quickly(model: "PreTrainedModel") -> None:
    slow = {dtype for dtype in {param.dtype for param in model.parameters()} if multiplies_slowly(dtype)}
    if not slow:
        return
    # Or it would take ten times as long as in fp32.
    model.forward = in_float32()(model.forward)
    layers = (torch.nn.Linear, torch.nn.Embedding)
    others = [module for module in model.modules() if not isinstance(module, layers)]
    left = {param.dtype for module in others for param in module.parameters(recurse=False) if param.ndim > 1}
    for dtype in slow & left:
        print(
            f"note: this processor has no instructions for products of {str(dtype).removeprefix('torch.')} numbers, "
            "which in some layers of this model take several times as long as those of float32: --dtype float32, for "
            "every command on this model, is faster, for 2 bytes more per weight and per gradient that is held",
            file=sys.stderr,
        )


def note_other_weights(mask: Mask, model_fingerprint: str) -> None:
    """Says on stderr if a mask was ranked on other weights than the model has, which may be meant."""
    ranked_on: Any = mask.meta.get("model_fingerprint")
    if isinstance(ranked_on, str) and ranked_on != model_fingerprint:
        print(
            "note: the mask was ranked on other weights than these (another checkpoint, dtype, or before tuning). A "
            "model that was tuned has another ranking: score it again if that is not meant",
            file=sys.stderr,
        )


def note_left_out(model: "PreTrainedModel") -> None:
    """Says on stderr if the model that is to be written lacks something that its checkpoint has."""
    if names := left_out(model):
        print(
            f"note: the checkpoint also holds {printable(listed(names, 2))}, which the language model that was loaded "
            "has no place for: the one that is written is without them",
            file=sys.stderr,
        )


def check_savable(model: "PreTrainedModel") -> None:
    """Makes sure that what goes beside the weights can be written: some versions of transformers refuse settings.

    Raises:
        InvalidArgumentError: it cannot.
    """
    if not model.can_generate() or (settings := model.generation_config) is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings.save_pretrained(folder)
        except ValueError as error:
            raise InvalidArgumentError(
                "transformers would refuse to save the tuned model, for its generation_config.json: correct that file, "
                f"or update transformers: {error}"
            ) from error


def load_refusals(option: str, path: Path) -> Pairs:
    """Reads harmful prompts with refusals, and says on stderr if most responses are none.

    Raises:
        SafekernError: the file is not as `safekern.prompts.load` wants it.
    """
    pairs = load_pairs(path)
    refused = sum(map(is_refusal, pairs.responses))
    if 2 * refused < len(pairs):
        print(
            f"note: {option} {printable(path.name)}: {refused:,} of {len(pairs):,} responses have a usual phrase of a "
            "refusal. They are what the model should say to a harmful prompt: make sure that none does what it asks "
            "for, as 'output' in the original circuit-breakers data does",
            file=sys.stderr,
        )
    return pairs


def check_mask(mask: Mask, model: "PreTrainedModel") -> str:
    """Makes sure that a mask fits the model, and returns the fingerprint of the model's weights.

    Raises:
        MaskMismatchError: it does not fit, or was ranked on a model of another size, whose names and shapes may be
            among these: of the layers that only one of them has, nothing would be said.
    """
    mask.check(model)
    if "model_fingerprint" in mask.meta and mask.model_numel != (numel := own_numel(model)):
        raise MaskMismatchError(
            f"the mask was ranked on another model, of {mask.model_numel:,} weights where this one has {numel:,}: "
            "score this one"
        )
    found = fingerprint(model)
    note_other_weights(mask, found)
    return found


def device(name: str | None) -> torch.device:
    """The device of that name, or the one that is there.

    Raises:
        InvalidArgumentError: it is not available here.
    """
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found)
        if found.type == "meta":
            raise InvalidArgumentError(f"--device {name}: holds no values to compute with; give another, such as cpu")
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(
            f"--device {name or 'cuda'}: not available here ({first_line(error)}); give another, such as cpu"
        ) from error
    return found


def prepare_folder(folder: Path, file: str, kind: str | None = None) -> None:
    """Creates an output folder, and makes sure that a file can be written in it.

    Args:
        folder: the folder.
        file: a name in it.
        kind: as for `files.check_writable`.

    Raises:
        FileAccessError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileAccessError(f"{folder}: cannot be created: {error.strerror}; give another folder") from error
    files.check_writable(folder / file, kind)


def check_output(option: str, path: Path, inputs: Iterable[Path | str | None], mark: bytes | None = None) -> None:
    """Makes sure that a file can be written, and takes the place of nothing but what the command wrote there before.

    Args:
        option: which names the file.
        path: the file.
        inputs: files, and folders with files, that the command reads; None and what is not there are passed over.
        mark: what stands in the first 8 KiB of every file that the command writes there; without it, of any.

    Raises:
        InvalidArgumentError: it is one that the command reads.
        FileAccessError: it is something else, or cannot be written.
    """
    given = [Path(source) for source in inputs if source is not None]
    files_in = [file for source in given for file in (source.iterdir() if source.is_dir() else [source])]
    for file in files_in if path.exists() else ():
        if file.exists() and file.samefile(path):
            raise InvalidArgumentError(
                f"{option} {path}: would overwrite {file}, which the command reads; give another"
            )
    files.check_writable(path)
    if mark is not None and path.exists():
        with files.reading(path) as old:
            start = old.read(8192)
        if start and mark not in start:
            raise FileAccessError(
                f"{path}: exists already and is nothing that this command wrote, so it is not replaced; give another "
                f"{option}, or move it away"
            )


def check_replaceable(path: Path, report: Path) -> None:
    """Makes sure that what stands where a result goes may be replaced: nothing, or what the command wrote there before.

    Args:
        path: where the model, a picture, or the report itself goes.
        report: the JSON file that the command writes there, too; under ``"written"`` it lists what it wrote.

    Raises:
        FileAccessError: it is something else.
    """
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if (f"{path.name}/" if path.is_dir() else path.name) not in written_before(report):
        says = "it" if path == report else report
        raise FileAccessError(
            f"{path}: exists already, and {says} does not say that this command wrote it, so it is not replaced; "
            "give another --out, or move it away"
        )


def written_before(report: Path) -> list[Any]:
    """What a report says that the command which wrote it has written; nothing if it is none, or not there."""
    try:
        written = json.loads(report.read_text())["written"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return written if isinstance(written, list) else []


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Says on stderr what a command is doing, and how long it took."""
    start = time.perf_counter()
    print(f"{name} ...", file=sys.stderr, flush=True)
    yield
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def without_folders(source: Path | str) -> str:
    """How files and reports name a model or a file of this machine: they are passed on, and its folders are private."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a report, atomically."""
    with files.replacing(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def versions() -> dict[str, str]:
    """Of what decides a result, for reports."""
    return {"safekern": __version__, "torch": str(torch.__version__)}
