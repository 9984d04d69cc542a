"""The cases of ``safekern bench`` under pytest-benchmark: a group per case, a row per contender.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736 pytest benchmarks --benchmark-only

Contenders are interleaved: before each timed round of one, all others run once. Nothing is asserted on time.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from safekern.bench import baselines, measure, results
from safekern.bench.cases import DTYPES, OPS, Contender, Setting

ROUNDS = 7


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each op, the dtypes and ratios that matter to it, numbers of threads, and contender."""
    option = metafunc.config.getoption
    compiling = not option("--no-compiled") and baselines.why_not_compile() is None
    found = []
    for op, kind in OPS.items():
        names = [c.name for c in kind.build(Setting(elements=100_000, compile=compiling)).contenders]
        size = int(option("--model-params" if kind.whole_model else "--elements"))
        for dtype in DTYPES if kind.dtypes else ["float32"]:
            for ratio in (0.001, 0.01, 0.05) if kind.ratios else (0.01,):
                setting = Setting(dtype, size, ratio, compile=compiling)
                label = "-".join(filter(None, (op, dtype * kind.dtypes, f"{ratio:g}" * kind.ratios)))
                for threads in sorted({1, torch.get_num_threads()}):
                    for name in names:
                        case = (op, setting, threads, name)
                        found.append(pytest.param(*case, id=f"{label}-{threads}t-{name}"))
    metafunc.parametrize(("op", "setting", "threads", "name"), found)


@lru_cache(maxsize=1)
def ready(op: str, setting: Setting) -> dict[str, Contender]:
    """The contenders of a case whose result was checked, each after its first run."""
    case = OPS[op].build(setting)
    case.check()
    contenders = {contender.name: contender for contender in case.contenders}
    for contender in contenders.values():
        contender.run()
    return contenders


@lru_cache
def bandwidth(threads: int, numel: int) -> measure.Bandwidth:
    """Of this machine, by the threads now set."""
    return measure.bandwidth(numel)


def test_op(op: str, setting: Setting, threads: int, name: str, benchmark: Any) -> None:
    """Times one contender among the others; figures beyond time are in ``extra_info``."""
    contenders = ready(op, setting)
    mine = contenders[name]
    others = [contender.run for contender in contenders.values() if contender is not mine]

    def interleave() -> None:
        for run in others:
            run()

    benchmark.group = f"{op} {setting.dtype} {setting.elements:,} {setting.ratio:g} {threads}t"
    with measure.threads(threads):
        peak = measure.peak_memory(mine.run)
        benchmark.pedantic(mine.run, setup=interleave, rounds=ROUNDS, warmup_rounds=measure.WARM_UPS)
        known = bandwidth(threads, setting.elements)
    rate = (mine.bytes or 0) / benchmark.stats.stats.median / 1e9 if benchmark.stats else 0.0
    benchmark.extra_info.update(
        {
            "what": mine.what,
            "gb_per_s": rate,
            "of_copy": rate / known.copy,
            "of_read": rate / known.read,
            "peak_bytes": peak,
            "state_bytes": mine.state(),
            "ours": name == results.SAFEKERN,
            **measure.environment(),
        }
    )
