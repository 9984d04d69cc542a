"""The compiled operations, one module each: schema, plain-torch reference, fake, cases.

All of them take lists of tensors, so that one call serves a whole model. On a GPU only `select` waits for the device,
for the sizes of its results.
"""

import itertools
import sys
from pathlib import Path

from safekern.errors import BackendError
from safekern.ops.accumulate import accumulate_
from safekern.ops.count_changed import count_changed
from safekern.ops.gather import gather_
from safekern.ops.perturb import perturb_
from safekern.ops.registry import cpu_capability, load_kernels
from safekern.ops.restore import restore_
from safekern.ops.select import select
from safekern.ops.set_adamw import set_adamw_
from safekern.ops.sigma import sigma
from safekern.ops.spa_adamw import spa_adamw_

__all__ = [
    "BACKENDS",
    "accumulate_",
    "count_changed",
    "cpu_capability",
    "gather_",
    "perturb_",
    "restore_",
    "select",
    "set_adamw_",
    "sigma",
    "spa_adamw_",
]


def _is_command() -> bool:
    """Whether this process is the ``safekern`` command: the script of that name, or ``python -m safekern``."""
    return Path(*sys.argv[:1]).stem == "safekern" or ("-m", "safekern") in itertools.pairwise(sys.orig_argv)


try:
    BACKENDS = load_kernels()
except BackendError as error:
    if not _is_command():
        raise
    # The command cannot explain it, because it is imported only now.
    print(f"safekern: {error}", file=sys.stderr)
    sys.exit(2)
