"""``safekern apply``: turns a base model into a tuned one with a delta, exactly."""

import argparse
import contextlib
import fnmatch
import json
import os
import secrets
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from safekern import files
from safekern.cli import options
from safekern.delta import apply_delta, check_delta
from safekern.errors import DeltaDtypeError, DeltaNamesError, FileAccessError, InvalidArgumentError
from safekern.faults import put_back
from safekern.models import save
from safekern.tables import printable

_DESCRIPTION = """\
Writes the values of a delta into the model it was made for: afterwards that is the tuned model, bit for bit. The
weights are compared with the fingerprints in the delta first: with a wrong base, nothing is written.

A checkpoint folder is changed file by file, without loading the model: in a copy with --out, or where it is with
--in-place. Any other model (smollm2, a GGUF file, a name on the hub), a folder with --dtype, and one that stores each
expert of a mixture by itself, is loaded, and saved to --out.
"""
_EPILOG = """\
example: the model that `safekern set` made, from the one it started with

  safekern apply --model ./model run/delta.safetensors --out ./aligned
  safekern apply --model smollm2 run/delta.safetensors --out ./aligned

A delta is exact, so --dtype must be what it was for `safekern set` (set.json tells).
"""
# What folders of models hold beside the safetensors files, by the names that the libraries, and `safekern score`, give.
_OTHERS = (
    *("pytorch_model*.bin", "model.bin", "tf_model.h5", "flax_model.msgpack", "consolidated*", "*.gguf", "*.pth"),
    *("*.onnx", "adapter_*", "mask.safetensors", "scores.safetensors"),
)


def add_parser(commands: Any) -> None:
    """Adds ``apply`` to the subcommands."""
    parser = commands.add_parser(
        "apply",
        help="write a delta into a model or a checkpoint folder",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_model(parser)
    parser.add_argument("delta", type=Path, metavar="DELTA", help="a file that safekern set or save_delta wrote")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the tuned model")
    where.add_argument(
        "--in-place", action="store_true", help="change the checkpoint folder itself; the base is gone then"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Applies a delta.

    Raises:
        SafekernError: a file is missing or damaged, or the delta is not of this model. Nothing was changed.
    """
    folder = Path(args.model)
    on_disk = folder.is_dir() and args.dtype == "auto"
    # Before a model is loaded or copied for nothing.
    with files.reading(args.delta):
        pass
    if args.device is not None:
        options.device(args.device)
    if args.in_place:
        if not on_disk:
            raise InvalidArgumentError(
                f"--in-place needs a checkpoint folder and no --dtype, got {args.model}: give --out DIR"
            )
        with options.stage("apply"):
            apply_delta(folder, args.delta)
        out = folder
    else:
        out = args.out
        if os.path.lexists(out):
            raise FileAccessError(f"{out}: exists already; give a new folder, so that nothing is overwritten")
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise InvalidArgumentError(f"--out {out}: lies inside of --model {folder}; give a folder outside of it")
        options.prepare_folder(out.parent, out.name)
        if on_disk and _names_fit(folder, args.delta):
            with options.stage("copy and apply"):
                _apply_to_copy(folder, args.delta, out)
        else:
            model, tokenizer = options.load_model(args, chats=False)
            options.note_left_out(model)
            with options.stage("apply"):
                apply_delta(model, args.delta)
                save(model, tokenizer, out)
    others = _others(out) if on_disk else []
    if others:
        print(
            f"note: {printable(', '.join(others))} in {printable(str(out))}: perhaps of the base, in another form or "
            "as a ranking, and not changed; remove what could be used in place of the tuned model's own",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps({"model": args.model, "delta": str(args.delta), "written": str(out)}, indent=2))
    else:
        print(f"Applied, and every other weight was checked. The tuned model is in {printable(str(out))}")


def _others(folder: Path) -> list[str]:
    """Files in a checkpoint folder that may hold its weights in another form, which a delta does not change."""
    found = [
        path.relative_to(folder)
        for path in folder.rglob("*")
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _OTHERS)
        or (path.suffix == ".safetensors" and path.parent != folder)
    ]
    return sorted(map(str, found))


def _names_fit(folder: Path, delta: Path) -> bool:
    """Whether a checkpoint's files hold the parameters as the loaded model does, in name and dtype.

    Raises:
        SafekernError: they do, and the delta is not of these weights.
    """
    try:
        with options.stage("check"):
            check_delta(folder, delta)
    except (DeltaNamesError, DeltaDtypeError):
        return False
    return True


def _apply_to_copy(folder: Path, delta: Path, out: Path) -> None:
    # Beside its place, so that no folder of that name is there until it holds the tuned model.
    temporary = out.with_name(f".{out.name}-{secrets.token_hex(4)}.tmp")
    try:
        try:
            # Links are followed: in the cache of the hub, they lead to files that must not change.
            shutil.copytree(folder, temporary)
            # What is read-only there is to be changed here, or removed.
            for path in (temporary, *temporary.rglob("*")):
                path.chmod(path.stat().st_mode | (stat.S_IRWXU if path.is_dir() else stat.S_IRUSR | stat.S_IWUSR))
        except (OSError, shutil.Error) as error:
            raise FileAccessError(f"{folder}: cannot be copied to {out}: {error}") from error
        apply_delta(temporary, delta)
        temporary.replace(out)
    finally:
        put_back(lambda: _remove(temporary))


def _remove(copy: Path) -> None:
    # Out of a folder that is read-only, as copies of such are, nothing can be taken.
    for folder, _, _ in os.walk(copy):
        with contextlib.suppress(OSError):
            Path(folder).chmod(stat.S_IRWXU)
    shutil.rmtree(copy, ignore_errors=True)
