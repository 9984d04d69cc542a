"""Progress on stderr: a bar on a terminal, and in a log a line now and then."""

import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

_SECONDS_PER_LINE = 60.0


class Progress:
    """A bar where stderr is a terminal, and elsewhere a plain line about once a minute.

    Args:
        label: what is going on.
        unit: what is counted.
        total: how many there are, where that is known.
        initial: how many are done.
        shown: True for a bar in any case, False for nothing at all.
        leave: whether the bar stays when all is done.

    Example:
        >>> with Progress("tuning", "step", 100) as bar:  # doctest: +SKIP
        ...     bar.update(loss=2.5)
    """

    def __init__(
        self,
        label: str,
        unit: str,
        total: int | None,
        *,
        initial: int = 0,
        shown: bool | None = None,
        leave: bool = True,
    ) -> None:
        disable = None if shown is None else not shown
        self._bar = tqdm(desc=label, unit=unit, total=total, initial=initial, disable=disable, leave=leave)
        # A bar that was told nothing disables itself where there is no terminal.
        self._in_lines = shown is None and self._bar.disable
        self._label, self._unit, self._total, self._done = label, unit, total, initial
        self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, count: int = 1, loss: float | None = None) -> None:
        """Counts on; ``loss`` is the last step's, where there is one."""
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
        self._bar.update(count)
        self._done += count
        if self._in_lines and time.monotonic() - self._said >= _SECONDS_PER_LINE:
            self._said = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}"
            at = "" if loss is None else f", loss {loss:.2f}"
            print(f"{self._label}: {self._unit} {self._done:,}{of}{at}", file=sys.stderr, flush=True)
