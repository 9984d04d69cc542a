"""``select`` in Triton: the algorithm of the CPU kernel.

A sample gives a low guess of the k-th key, one streaming pass keeps what reaches it, and a histogram per 8-bit digit
over those candidates finds the exact key. The sample decides only how much is kept: when it guessed badly, or very many
are selected, the same histograms run over all the data instead, in bounded memory. Only integers are added up, so the
result does not depend on the order in which programs run. The host waits once, for the sizes of the results; once more
after a bad guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from safekern.indices import index_dtype
from safekern.ops.triton.common import (
    LAUNCH,
    THREADS,
    WARP_SIZE,
    Spec,
    aligned,
    check_dtype,
    check_numel,
    check_tensor,
    find,
    first_at_least,
    first_blocks,
    launch_options,
    load_run,
    on,
    pointer,
    table,
)

# A position inside a block fits 16 bits. A tile is what a program looks at together: of everything, or of the few
# candidates of a block, for which one warp need not wait for another.
BLOCK, TILE = 8192, 1024
KEPT_TILE, KEPT_THREADS = 64, 32
# How many runs of how many elements the sample takes, and how many times as large the whole must be to be sampled.
SAMPLE_RUNS, SAMPLE_RUN, SAMPLED_FROM = 1 << 16, 16, 4
# Runs per program that takes the sample.
SAMPLE_EACH = 64
# How many more candidates there is room for than one in 80 elements, or 5/4 k.
SLACK = 8 * BLOCK
# Of more than one element in so many, the candidates would take up to as much memory as the scores.
CANDIDATE_SHARE = 8
# Programs that share the work when a histogram is made: more of them would add to the same counters more often.
HISTOGRAM_PROGRAMS = 2048
HISTOGRAM_TILE, HISTOGRAM_THREADS = 2048, 128

_KEY_MASK = 0x7FFFFFFF
_INFINITY_KEY = tl.constexpr(0x7F800000)


@dataclass(frozen=True)
class _Problem:
    """The tensors that have elements, as columns of a table.

    Its rows: first block, address, size, position in `grads`, number of elements before.
    """

    grads: Sequence[Tensor]
    sigma: Tensor
    numel: int
    k: int
    flip: int
    present: list[int]
    first: list[int]
    entries: Tensor
    is_aligned: bool
    nan: Tensor

    @property
    def blocks(self) -> int:
        return self.first[-1]


@dataclass(frozen=True)
class _Candidates:
    """Keys and positions (in their block) of what was kept; where each block's begin, how many; how many in all."""

    keys: Tensor
    positions: Tensor
    starts: Tensor
    counts: Tensor
    total: Tensor


def select(grads: Sequence[Tensor], sigma: Tensor, k: int, largest: bool) -> list[Tensor]:
    """See :func:`safekern.ops.select.reference`."""
    device = sigma.device
    check_dtype(sigma, torch.float32, "sigma")
    check_tensor(sigma, device, "sigma")
    check_numel(sigma, len(grads), "sigma")
    for grad in grads:
        check_dtype(grad, torch.float32, "an accumulator")
        check_tensor(grad, device, "an accumulator")
    numel = sum(grad.numel() for grad in grads)
    if not 1 <= k <= numel:
        raise RuntimeError(f"safekern: cannot select {k} of {numel} elements")
    present = [t for t, grad in enumerate(grads) if grad.numel()]
    first = first_blocks((grads[t].numel() for t in present), BLOCK)
    with on(device):
        problem = _Problem(
            grads,
            sigma,
            numel,
            k,
            0 if largest else _KEY_MASK,
            present,
            first,
            table(
                [
                    first[:-1],
                    [grads[t].data_ptr() for t in present],
                    [grads[t].numel() for t in present],
                    present,
                    first_blocks((grads[t].numel() for t in present), 1)[:-1],
                ],
                device,
            ),
            aligned(*grads),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        guess = _guess_cutoff(problem)
        if guess is not None:
            candidates = _filter(problem, guess)
            selected = _emit(problem, candidates)
            if selected is not None:
                return selected
        selected = _emit(problem, None)
    assert selected is not None
    return selected


def _guess_cutoff(problem: _Problem) -> Tensor | None:
    """A key that, going by a sample, somewhat more than k elements reach; None of few elements, or if k is large."""
    size = SAMPLE_RUNS * SAMPLE_RUN
    if problem.numel < SAMPLED_FROM * size or problem.k > problem.numel // CANDIDATE_SHARE:
        return None
    rank = sample_rank(problem.k, problem.numel)
    keys = torch.empty(size, dtype=torch.int32, device=problem.sigma.device)
    sample_kernel[(triton.cdiv(SAMPLE_RUNS, SAMPLE_EACH),)](
        problem.entries,
        len(problem.present),
        problem.sigma,
        keys,
        problem.numel,
        FLIP=problem.flip,
        RUN=SAMPLE_RUN,
        RUNS=SAMPLE_RUNS,
        EACH=SAMPLE_EACH,
        **LAUNCH,
    )
    return keys.sort(descending=True).values[rank : rank + 1]


def sample_rank(k: int, numel: int) -> int:
    """Where in the sample, sorted from the largest, the guess is."""
    expected = k / numel * SAMPLE_RUNS * SAMPLE_RUN
    # The elements of a run are correlated: eight standard deviations of an independent sample leave room for that.
    return int(1.1 * expected + 8 * expected**0.5 + 16)


def capacity(k: int, numel: int) -> int:
    """How many candidates there is room for. Small ratios are guessed least well: at 0.1% take 1.36 k."""
    return max(numel // 80, k + k // 4) + SLACK


def _filter(problem: _Problem, guess: Tensor) -> _Candidates:
    room = capacity(problem.k, problem.numel)

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=problem.sigma.device)

    candidates = _Candidates(
        keys=empty(room, torch.int32),
        positions=empty(room, torch.int16),
        starts=empty(problem.blocks, torch.int64),
        counts=empty(problem.blocks, torch.int32),
        total=torch.zeros_like(problem.nan),
    )
    filter_kernel[(problem.blocks,)](
        problem.entries,
        len(problem.present),
        problem.sigma,
        guess,
        candidates.keys,
        candidates.positions,
        candidates.starts,
        candidates.counts,
        candidates.total,
        problem.nan,
        room,
        FLIP=problem.flip,
        ALIGNED=problem.is_aligned,
        BLOCK=BLOCK,
        **LAUNCH,
    )
    return candidates


def _emit(problem: _Problem, candidates: _Candidates | None) -> list[Tensor] | None:
    """The result, ranked among the candidates or else among everything; None when there are not enough candidates."""
    device = problem.sigma.device
    tensors = (problem.entries, len(problem.present), problem.sigma)
    source = (
        *tensors,
        # Unused addresses, where everything is the source.
        candidates.keys if candidates else problem.nan,
        candidates.positions if candidates else problem.nan,
        candidates.starts if candidates else problem.nan,
        candidates.counts if candidates else problem.nan,
    )
    layout = {"FLIP": problem.flip, "ALIGNED": problem.is_aligned, "BLOCK": BLOCK}
    constants = {
        "CANDIDATES": candidates is not None,
        **layout,
        "TILE": KEPT_TILE if candidates else TILE,
        **launch_options(WARP_SIZE, KEPT_THREADS if candidates else THREADS),
    }
    # The digits of the k-th key found so far, and its rank among the keys that begin with them.
    state = torch.stack([torch.zeros_like(problem.nan[0]), torch.full_like(problem.nan[0], problem.k)])
    histogram = torch.zeros(256, dtype=torch.int64, device=device)
    for shift in (24, 16, 8, 0):
        if candidates:
            room = candidates.keys.numel()
            programs = min(triton.cdiv(room, HISTOGRAM_TILE), HISTOGRAM_PROGRAMS)
            kept_histogram_kernel[(programs,)](
                candidates.keys,
                candidates.total,
                state,
                histogram,
                room,
                programs,
                SHIFT=shift,
                TILE=HISTOGRAM_TILE,
                **launch_options(WARP_SIZE, HISTOGRAM_THREADS),
            )
        else:
            programs = min(problem.blocks, HISTOGRAM_PROGRAMS)
            histogram_kernel[(programs,)](
                *tensors, state, histogram, problem.blocks, programs, SHIFT=shift, **layout, TILE=TILE, **LAUNCH
            )
        digit_kernel[(1,)](histogram, state, **LAUNCH)

    above, tied = (torch.empty(problem.blocks, dtype=torch.int64, device=device) for _ in range(2))
    count_kernel[(problem.blocks,)](*source, state, above, tied, problem.nan, **constants)
    # Ties go to the earlier elements.
    ties = (state[1] - (tied.cumsum(0) - tied)).clamp_(min=0).minimum(tied)
    chosen = above + ties
    ends = chosen.cumsum(0)

    last = table([[block - 1 for block in problem.first[1:]]], device)[0]
    total = candidates.total if candidates else state[1:]
    *reached, total_kept, has_nan = torch.cat([ends[last], total, problem.nan]).tolist()
    if has_nan:
        raise RuntimeError("safekern: a score is NaN")
    if candidates and not problem.k <= total_kept <= candidates.keys.numel():
        return None

    outputs = [
        torch.empty(0, dtype=torch.int32 if _fits(grad) else torch.int64, device=device) for grad in problem.grads
    ]
    bases = [0, *reached[:-1]]
    for t, base, end in zip(problem.present, bases, reached, strict=True):
        outputs[t] = outputs[t].new_empty(end - base)
    out = table(
        [
            [outputs[t].data_ptr() for t in problem.present],
            bases,
            [_fits(problem.grads[t]) for t in problem.present],
        ],
        device,
    )
    emit_kernel[(problem.blocks,)](*source, state, chosen, ties, ends, out, **constants)
    return outputs


def _fits(grad: Tensor) -> bool:
    return index_dtype(grad.numel()) == torch.int32


@triton.jit
def _key(grad, sigma):
    """The bits of ``|grad| * sigma``: non-negative floats order as their bits do."""
    return (tl.abs(grad) * sigma).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["tensors", "numel"])
def sample_kernel(
    table,
    tensors: tl.int32,
    sigma,
    keys,
    numel: tl.int64,
    FLIP: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    EACH: tl.constexpr,
):
    """Reads and writes 4 MB: the keys of RUNS runs of RUN elements, EACH of them per program; -1 past a tensor's end.

    One run per stride of the whole, at a place in it that does not repeat, since weights repeat with the period of a
    matrix row: multiples of the golden ratio.
    """
    run = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    jitter = (run * 0x9E3779B1 & 0xFFFFFFFF) >> 8
    position = (run * numel + (jitter * numel >> 24)) // RUNS
    # The last tensor with at most as many elements before it.
    t = first_at_least(table + 4 * tensors, tl.zeros((EACH,), tl.int32) + tensors, position + 1) - 1
    base = tl.load(table + tensors + t).to(tl.pointer_type(tl.float32))
    scale = tl.load(sigma + tl.load(table + 3 * tensors + t))
    places = (position - tl.load(table + 4 * tensors + t))[:, None] + tl.arange(0, RUN)[None, :]
    inside = places < tl.load(table + 2 * tensors + t)[:, None]
    grad = tl.load(base[:, None] + places, mask=inside, other=0.0)
    key = tl.where(inside, _key(grad, scale[:, None]) ^ FLIP, -1)
    tl.store(keys + run[:, None] * RUN + tl.arange(0, RUN)[None, :], key, mask=(run < RUNS)[:, None])


@triton.jit(do_not_specialize=["tensors", "capacity"])
def filter_kernel(
    table,
    tensors: tl.int32,
    sigma,
    guess,
    keys,
    positions,
    starts,
    counts,
    total,
    nan,
    capacity: tl.int64,
    FLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Must move, and moves, 4 bytes per element; also 6 per candidate and 12 per block of 8192 elements.

    One word has a bit for each of 32 elements that is kept. Few are: programs store them in rounds, one per word, and
    read them again, from the cache. Stores of all elements under a mask would first move everything between threads.
    """
    block = tl.program_id(0).to(tl.int64)
    t = find(table, tensors, block)
    scale = tl.load(sigma + tl.load(table + 3 * tensors + t))
    begin = (block - tl.load(table + t)) * BLOCK
    size = tl.minimum(tl.load(table + 2 * tensors + t) - begin, BLOCK).to(tl.int32)
    base = pointer(table + tensors + t, tl.float32, ALIGNED) + begin
    word = tl.arange(0, BLOCK // 32)
    bit = tl.arange(0, 32)[None, :]
    place = word[:, None] * 32 + bit
    key = _key(load_run(base, place, place < size, size == BLOCK), scale)
    # Zeros were read past the end.
    if tl.max(key) > _INFINITY_KEY:
        tl.store(nan, 1)
    left = tl.sum(tl.where((key ^ FLIP) >= tl.load(guess), 1 << bit, 0), axis=1)
    exist = tl.minimum(tl.maximum(size - word * 32, 0), 32)
    left = left & tl.where(exist < 32, (1 << (exist & 31)) - 1, -1)
    # The words go through the scan to be laid out as its result is, one per thread.
    reached, left = tl.associative_scan((_ones(left), left), 0, _add_first)
    ones = _ones(left)
    count = tl.sum(ones, axis=0)
    rounds = tl.max(ones, axis=0)
    # Which block comes first depends on chance; every block knows its place, so nothing else does.
    start = tl.atomic_add(total, count.to(tl.int64), sem="relaxed")
    # Past the capacity the total alone counts.
    fits = start + count <= capacity
    tl.store(starts + block, start)
    tl.store(counts + block, tl.where(fits, count, 0))
    if fits:
        slot = reached - ones
        for _ in range(rounds):
            present = left != 0
            lowest = left & -left
            position = word * 32 + _ones(lowest - 1)
            grad = tl.load(base + position, mask=present, other=0.0)
            tl.store(keys + start + slot, _key(grad, scale) ^ FLIP, mask=present)
            tl.store(positions + start + slot, position.to(tl.int16), mask=present)
            left = left ^ lowest
            slot += 1


@triton.jit
def _ones(word):
    """The number of bits that are set, by adding neighbours."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 63).to(tl.int32)


@triton.jit
def _add_first(count, word, other_count, other_word):
    return count + other_count, other_word


@triton.jit
def _block_of(table, tensors, sigma, starts, counts, block, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr):
    """Tensor, sigma, where the block's first element lies in it or in the candidates, and the number of elements."""
    t = find(table, tensors, block)
    scale = tl.load(sigma + tl.load(table + 3 * tensors + t))
    origin = (block - tl.load(table + t)) * BLOCK
    if CANDIDATES:
        begin = tl.load(starts + block)
        count = tl.load(counts + block)
    else:
        begin = origin
        count = tl.minimum(tl.load(table + 2 * tensors + t) - origin, BLOCK).to(tl.int32)
    return t, scale, origin, begin, count


@triton.jit
def _tile_of(
    table,
    tensors,
    keys,
    t,
    scale,
    begin,
    count,
    tile,
    CANDIDATES: tl.constexpr,
    FLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Keys from the tile's first element on, and which of them exist."""
    place = tile + tl.arange(0, TILE)
    inside = place < count
    if CANDIDATES:
        key = tl.load(keys + begin + place, mask=inside, other=0)
    else:
        base = pointer(table + tensors + t, tl.float32, ALIGNED)
        key = _key(load_run(base + begin, place, inside, tile + TILE <= count), scale) ^ FLIP
    return key, inside


@triton.jit
def _digits(key, exists, prefix, SHIFT: tl.constexpr):
    """Counts the 8-bit digits at SHIFT of the keys whose digits before that are those found so far."""
    if SHIFT < 24:
        exists = exists & ((key >> (SHIFT + 8)) == prefix)
    # What does not count goes to bins that nobody reads.
    return tl.histogram(tl.where(exists, (key >> SHIFT) & 255, 256), 512)


@triton.jit
def _add_digits(histogram, digits):
    bins = tl.arange(0, 512)
    tl.atomic_add(histogram + bins, digits.to(tl.int64), mask=(bins < 256) & (digits > 0), sem="relaxed")


@triton.jit(do_not_specialize=["tensors", "blocks", "programs"])
def histogram_kernel(
    table,
    tensors: tl.int32,
    sigma,
    state,
    histogram,
    blocks: tl.int64,
    programs: tl.int64,
    SHIFT: tl.constexpr,
    FLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One digit of all elements. Moves 4 bytes per element."""
    prefix = tl.load(state)
    digits = tl.zeros((512,), tl.int32)
    block = tl.program_id(0).to(tl.int64)
    while block < blocks:
        t, scale, _, begin, count = _block_of(table, tensors, sigma, table, table, block, False, BLOCK)
        tile = count * 0
        while tile < count:
            key, exists = _tile_of(table, tensors, table, t, scale, begin, count, tile, False, FLIP, ALIGNED, TILE)
            digits += _digits(key, exists, prefix, SHIFT)
            tile += TILE
        block += programs
    _add_digits(histogram, digits)


@triton.jit(do_not_specialize=["capacity", "programs"])
def kept_histogram_kernel(
    keys,
    total,
    state,
    histogram,
    capacity: tl.int64,
    programs: tl.int64,
    SHIFT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One digit of the candidates, whatever their blocks. Moves 4 bytes per candidate.

    Where there were more than fit, some of what it reads was never written; then nobody reads its result.
    """
    prefix = tl.load(state)
    size = tl.minimum(tl.load(total), capacity)
    digits = tl.zeros((512,), tl.int32)
    begin = tl.program_id(0).to(tl.int64) * TILE
    place = tl.arange(0, TILE)
    while begin < size:
        exists = place < tl.minimum(size - begin, TILE).to(tl.int32)
        key = load_run(keys + begin, place, exists, begin + TILE <= size)
        digits += _digits(key, exists, prefix, SHIFT)
        begin += programs * TILE
    _add_digits(histogram, digits)


@triton.jit
def digit_kernel(histogram, state):
    """Finds the digit that the wanted rank falls on, and clears the histogram. Moves 4 KB."""
    rank = tl.load(state + 1)
    bins = 255 - tl.arange(0, 256)
    reached = tl.cumsum(tl.load(histogram + bins), axis=0)
    short = reached < rank
    digit = 255 - tl.sum(short.to(tl.int64), axis=0)
    tl.store(state, tl.load(state) * 256 + digit)
    tl.store(state + 1, rank - tl.max(tl.where(short, reached, 0), axis=0))
    tl.store(histogram + bins, tl.zeros((256,), tl.int64))


@triton.jit(do_not_specialize=["tensors"])
def count_kernel(
    table,
    tensors: tl.int32,
    sigma,
    keys,
    positions,
    starts,
    counts,
    state,
    above,
    tied,
    nan,
    CANDIDATES: tl.constexpr,
    FLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many keys of each block are above the cutoff and equal to it.

    Moves 4 bytes per element of its source, and 12 per block of candidates.
    """
    block = tl.program_id(0).to(tl.int64)
    cutoff = tl.load(state)
    t, scale, _, begin, count = _block_of(table, tensors, sigma, starts, counts, block, CANDIDATES, BLOCK)
    larger = count * 0
    equal = count * 0
    tile = count * 0
    while tile < count:
        key, inside = _tile_of(table, tensors, keys, t, scale, begin, count, tile, CANDIDATES, FLIP, ALIGNED, TILE)
        larger += tl.sum((inside & (key > cutoff)).to(tl.int32), axis=0)
        equal += tl.sum((inside & (key == cutoff)).to(tl.int32), axis=0)
        if tl.max((inside & ((key ^ FLIP) > _INFINITY_KEY)).to(tl.int32), axis=0) > 0:
            tl.store(nan, 1)
        tile += TILE
    tl.store(above + block, larger.to(tl.int64))
    tl.store(tied + block, equal.to(tl.int64))


@triton.jit(do_not_specialize=["tensors"])
def emit_kernel(
    table,
    tensors: tl.int32,
    sigma,
    keys,
    positions,
    starts,
    counts,
    state,
    chosen,
    ties,
    ends,
    out,
    CANDIDATES: tl.constexpr,
    FLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes what is selected in ascending order.

    Moves what `count_kernel` does, and 2 bytes per candidate and 4 (or 8) per selected element.
    """
    block = tl.program_id(0).to(tl.int64)
    cutoff = tl.load(state)
    quota = tl.load(ties + block)
    t, scale, origin, begin, count = _block_of(table, tensors, sigma, starts, counts, block, CANDIDATES, BLOCK)
    done = tl.load(ends + block) - tl.load(chosen + block) - tl.load(out + tensors + t)
    address = tl.load(out + t)
    short = tl.load(out + 2 * tensors + t).to(tl.int32)
    seen = quota * 0
    tile = count * 0
    while tile < count:
        key, inside = _tile_of(table, tensors, keys, t, scale, begin, count, tile, CANDIDATES, FLIP, ALIGNED, TILE)
        equal = (inside & (key == cutoff)).to(tl.int32)
        early = (equal > 0) & (seen + tl.cumsum(equal, axis=0) <= quota)
        taken = (early | (inside & (key > cutoff))).to(tl.int32)
        place = done + tl.cumsum(taken, axis=0) - 1
        position = tile + tl.arange(0, TILE)
        if CANDIDATES:
            position = tl.load(positions + begin + position, mask=inside, other=0).to(tl.int32)
        index = origin + position
        tl.store(address.to(tl.pointer_type(tl.int32)) + place, index.to(tl.int32), mask=taken * short > 0)
        tl.store(address.to(tl.pointer_type(tl.int64)) + place, index, mask=taken * (1 - short) > 0)
        seen += tl.sum(equal, axis=0)
        done += tl.sum(taken, axis=0)
        tile += TILE


_SOURCE = {"table": "*i64", "tensors": "i32", "sigma": "*fp32"}
_CANDIDATES = {"keys": "*i32", "positions": "*i16", "starts": "*i64", "counts": "*i32"}
SPECS = [
    Spec(
        sample_kernel,
        {**_SOURCE, "keys": "*i32", "numel": "i64"},
        {"FLIP": 0, "RUN": SAMPLE_RUN, "RUNS": SAMPLE_RUNS, "EACH": SAMPLE_EACH},
    ),
    *(
        Spec(
            filter_kernel,
            {
                **_SOURCE,
                "guess": "*i32",
                **_CANDIDATES,
                "total": "*i64",
                "nan": "*i64",
                "capacity": "i64",
            },
            {"FLIP": flip, "ALIGNED": True, "BLOCK": BLOCK},
            loads=BLOCK * 4,
        )
        for flip in (0, _KEY_MASK)
    ),
    *(
        Spec(
            histogram_kernel,
            {**_SOURCE, "state": "*i64", "histogram": "*i64", "blocks": "i64", "programs": "i64"},
            {"SHIFT": shift, "FLIP": _KEY_MASK, "ALIGNED": True, "BLOCK": BLOCK, "TILE": TILE},
            loads=TILE * 4,
        )
        for shift in (24, 0)
    ),
    *(
        Spec(
            kept_histogram_kernel,
            {
                "keys": "*i32",
                "total": "*i64",
                "state": "*i64",
                "histogram": "*i64",
                "capacity": "i64",
                "programs": "i64",
            },
            {"SHIFT": shift, "TILE": HISTOGRAM_TILE},
            loads=HISTOGRAM_TILE * 4,
            threads=HISTOGRAM_THREADS,
        )
        for shift in (24, 0)
    ),
    Spec(digit_kernel, {"histogram": "*i64", "state": "*i64"}, {}),
    *(
        Spec(
            kernel,
            {**_SOURCE, **_CANDIDATES, "state": "*i64", **signature},
            {
                "CANDIDATES": candidates,
                "FLIP": _KEY_MASK,
                "ALIGNED": True,
                "BLOCK": BLOCK,
                "TILE": KEPT_TILE if candidates else TILE,
            },
            loads=0 if candidates else TILE * 4,
            threads=KEPT_THREADS if candidates else THREADS,
        )
        for candidates in (True, False)
        for kernel, signature in (
            (count_kernel, {"above": "*i64", "tied": "*i64", "nan": "*i64"}),
            (emit_kernel, {"chosen": "*i64", "ties": "*i64", "ends": "*i64", "out": "*i64"}),
        )
    ),
]
