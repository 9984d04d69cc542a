import re

import pytest

from safekern.evaluation import is_degenerate, is_refusal
from safekern.prompts import builtin

KINDS, SPLITS = ("harmful", "benign"), ("tune", "eval")


def words(prompt):
    return frozenset(re.findall(r"[a-z']+", prompt.lower()))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_breadth(kind):
    tune, held_out = builtin(kind, "tune"), builtin(kind, "eval")
    assert len(tune) >= 160
    assert len(held_out) >= 60
    assert len(set(tune.categories)) >= 12
    assert set(held_out.categories) == set(tune.categories)
    # Any first part covers the categories evenly.
    assert len(set(held_out[:16].categories)) >= 12


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_is_held_out_and_trained_on(kind):
    prompts = [words(prompt) for split in SPLITS for prompt in builtin(kind, split).prompts]
    assert len(set(prompts)) == len(prompts)
    for i, one in enumerate(prompts):
        for other in prompts[:i]:
            assert len(one & other) / len(one | other) < 0.75, (sorted(one), sorted(other))


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_short_and_harmful_prompts_are_refused(split):
    harmful, benign = (builtin(kind, split) for kind in KINDS)
    for pairs in (harmful, benign):
        assert all(10 < len(prompt) <= 120 for prompt in pairs.prompts)
        assert all(5 < len(response) <= 400 for response in pairs.responses)
        assert not any(map(is_degenerate, pairs.responses))
    assert all(map(is_refusal, harmful.responses))
    assert not any(map(is_refusal, benign.responses))
    # A refusal learnt by heart would be no more than one sentence.
    assert len(set(harmful.responses)) > 0.9 * len(harmful)


def test_slicing_keeps_pairs_together():
    pairs = builtin("benign", "eval")
    part = pairs[3:5]
    assert (part.prompts, part.responses, part.categories) == (
        pairs.prompts[3:5],
        pairs.responses[3:5],
        pairs.categories[3:5],
    )
