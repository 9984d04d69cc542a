"""The scores as a mapping, the masks ranked from them against a full stable sort, and their file."""

import copy
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safekern import files
from safekern.errors import (
    FileAccessError,
    FileFormatError,
    InvalidArgumentError,
    MaskMismatchError,
    NonFiniteError,
    SafekernError,
    UnknownNameError,
)
from safekern.mask import Mask
from safekern.scores import Scores

META = {"objective": "refusal", "reduction": "mean", "versions": {"safekern": "0", "torch": "0"}}
DENORMAL = 1e-41

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make(gradients, sigma=None, *, others=0, **options):
    """Scores over the gradients (lists or tensors), in a model that has ``others`` weights besides."""
    tensors = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in gradients.items()}
    values = torch.ones(len(tensors)) if sigma is None else torch.as_tensor(sigma, dtype=torch.float32)
    return Scores(
        tensors,
        dict(zip(tensors, values.unbind(), strict=True)),
        model_numel=sum(tensor.numel() for tensor in tensors.values()) + others,
        **{"num_batches": 3, "meta": META, **options},
    )


def some(seed=0):
    torch.manual_seed(seed)
    return make({"z": torch.randn(6, 5), "m.weight": torch.randn(2, 3, 4), "a": torch.randn(11)}, [0.5, 1.0, 2.0])


def bits(tensor):
    return tensor.view(torch.int32).tolist()


class TestConstruction:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gradients": {}}, "nothing to rank"),
            ({"gradients": {"w": torch.zeros(0, 3)}}, "nothing to rank"),
            ({"gradients": {"w": [1.0, 2.0]}}, r"gradient of w must be an fp32 tensor, got \[1.0"),
            ({"gradients": {"w": torch.ones(4, 2, dtype=torch.bfloat16)}}, "gradient of w .* got torch.bfloat16"),
            ({"gradients": {"w": torch.ones(4, 2, device="meta")}}, "gradient of w .* on meta"),
            ({"gradients": {"w": torch.ones(4, 2).to_sparse()}}, "gradient of w .*sparse"),
            ({"sigma": {}}, "sigma of w, its standard deviation, must be .* got None"),
            ({"sigma": {"w": 0.5}}, r"shape \(\) on the CPU, got 0.5"),
            ({"sigma": {"w": torch.ones(1)}}, r"shape \(\) on the CPU, got torch.float32 of shape \(1,\)"),
            ({"sigma": {"w": torch.ones((), dtype=torch.float64)}}, "sigma of w.*float64"),
            ({"sigma": {"w": torch.tensor(-1.0)}}, "finite and not negative, got -1.0"),
            ({"sigma": {"w": torch.tensor(math.nan)}}, "finite and not negative, got nan"),
            ({"num_batches": 0}, "num_batches is 0, but must be"),
            ({"model_numel": 7}, "model_numel is 7, but must be a whole number of at least 8"),
            ({"model_numel": 8.0}, "model_numel"),
        ],
    )
    def test_what_cannot_be_scores_is_refused(self, change, message):
        right = {"gradients": {"w": torch.ones(4, 2)}, "sigma": {"w": torch.ones(())}, "num_batches": 1}
        right |= {"model_numel": 8, "meta": {}}
        assert Scores(**right).top(0.5).numel == 4
        with pytest.raises(InvalidArgumentError, match=message):
            Scores(**right | change)

    def test_a_tensor_without_elements_has_none_to_rank(self):
        scores = make({"none": torch.zeros(0, 3), "w": torch.arange(4.0)})
        for mask in (scores.top(0.5), scores.top(0.5, per="tensor"), scores.bottom(1.0, per="tensor")):
            assert set(mask) == {"w"}


class TestConflict:
    def test_keeps_what_the_other_objective_would_undo(self):
        tiny = 1e-30
        safety = make({"w": [1.0, -2.0, 3.0, tiny, 0.0, -0.0], "v": [5.0]}, [0.5, 2.0], others=3)
        task = make({"v": [4.0], "w": [1.0, 1.0, -1.0, -tiny, -1.0, 1.0]}, [7.0, 7.0])
        conflict = safety.in_conflict_with(task)
        assert conflict.gradient("w").tolist() == make({"w": [0.0, -2.0, 3.0, tiny, 0.0, 0.0]}).gradient("w").tolist()
        assert conflict.gradient("v").tolist() == [0.0]
        assert conflict["w"].tolist()[:3] == [0.0, 1.0, 1.5]
        assert (list(conflict), conflict.model_numel, conflict.num_batches) == (["w", "v"], 10, 3)
        assert safety.gradient("w").tolist()[0] == 1.0
        assert conflict.top(0.2)["w"].tolist() == [1, 2]
        assert conflict.top(0.2).meta["in_conflict_with"] == META

    def test_what_is_to_be_maximised_is_no_loss(self):
        gradients = {"w": [1.0, -2.0, 3.0, 0.0]}
        safety, task = make(gradients, meta={"maximised": True}), make({"w": [1.0, 1.0, -1.0, 1.0]})
        # A step against the task's gradient takes the first one down.
        assert safety.in_conflict_with(task).gradient("w").tolist() == [1.0, 0.0, 0.0, 0.0]
        assert task.in_conflict_with(safety).gradient("w").tolist() == [1.0, 0.0, 0.0, 0.0]
        assert safety.in_conflict_with(make({"w": [-1.0] * 4}, meta={"maximised": True})).gradient("w")[0] == 1.0

    def test_names_may_be_wrapped(self):
        safety, task = make({"w": [1.0, 1.0]}), make({"_orig_mod.w": [1.0, -1.0]})
        assert safety.in_conflict_with(task).gradient("w").tolist() == [0.0, 1.0]

    @pytest.mark.parametrize(
        ("other", "error", "message"),
        [
            ({"w": torch.tensor([1.0, -1.0])}, InvalidArgumentError, "other must be Scores, .* got dict"),
            (make({"v": [1.0, -1.0]}), MaskMismatchError, "w has no scores for the other objective"),
            (make({"w": [1.0]}), MaskMismatchError, "w is of another shape"),
            (make({"w": [1.0, math.nan]}), NonFiniteError, "a gradient of w is NaN"),
            (make({"w": [0.0, 1.0]}), InvalidArgumentError, "nothing is in conflict"),
            (make({"w": [1.0, -1.0]}, meta={"reduction": "abs"}), InvalidArgumentError, 'reduction="mean"'),
        ],
    )
    def test_what_cannot_be_compared(self, other, error, message):
        with pytest.raises(error, match=message):
            make({"w": [1.0, 1.0]}).in_conflict_with(other)
        if isinstance(other, Scores) and error is not MaskMismatchError:
            with pytest.raises(error, match=message):
                other.in_conflict_with(make({"w": [1.0, 1.0]}))


class TestMapping:
    def test_reads_like_a_mapping(self):
        scores = some()
        assert isinstance(scores, Mapping)
        assert len(scores) == 3
        assert list(scores) == list(scores.keys()) == ["z", "m.weight", "a"]
        assert [name for name, _ in scores.items()] == list(scores)
        for name, esi in scores.items():
            assert esi.dtype == torch.float32
            assert esi.shape == scores.gradient(name).shape
            assert torch.equal(esi, scores.gradient(name).abs() * scores.sigma[name])
            assert torch.equal(esi, scores[name])
        assert scores.get("absent") is None
        assert scores.numel == 30 + 24 + 11
        assert some().model_numel == 65
        assert make({"w": [1.0]}, others=9).model_numel == 10

    def test_what_it_computes_is_a_copy_and_what_it_stores_is_not(self):
        scores = some()
        before = scores["a"].clone()
        scores["a"].zero_()
        assert torch.equal(scores["a"], before)
        assert scores.gradient("a") is scores.gradient("a")

    def test_asking_for_a_name_computes_nothing(self, monkeypatch):
        def computed(self, name):
            raise AssertionError(name)

        monkeypatch.setattr(Scores, "__getitem__", computed)
        scores = some()
        assert "z" in scores
        assert "z" in scores.keys()  # noqa: SIM118
        assert "absent" not in scores
        assert 3 not in scores

    @pytest.mark.parametrize("access", [Scores.__getitem__, Scores.gradient])
    def test_unknown_name(self, access):
        with pytest.raises(KeyError, match=r"^no scores for parameter 'b': list\(scores\)") as caught:
            access(some(), "b")
        assert isinstance(caught.value, UnknownNameError)
        assert isinstance(caught.value, SafekernError)

    def test_compares_by_identity(self):
        scores, other = some(), some()
        assert scores == scores
        assert scores != other
        assert len({scores, other}) == 2
        assert copy.deepcopy(scores).top(0.5) == scores.top(0.5)

    def test_repr(self):
        text = repr(make({"w": torch.zeros(40, 40)}, others=400))
        assert text == "Scores(1,600 of 2,000 weights in 1 tensors, 3 batches, reduction='mean')"


def stable_sort(scores, ratio, per, *, largest):
    """The selection as its definition says, from the values that the mapping gives out."""

    def best(values, k):
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[torch.sort(values, stable=True, descending=largest).indices[:k]] = True
        return chosen

    flat = {name: esi.flatten() for name, esi in scores.items()}
    if per == "model":
        k = min(max(1, int(ratio * scores.model_numel)), scores.numel)
        parts = best(torch.cat(list(flat.values())), k).split([values.numel() for values in flat.values()])
    else:
        parts = [best(values, max(1, int(ratio * values.numel()))) for values in flat.values()]
    chosen = {name: part.nonzero().flatten() for name, part in zip(scores, parts, strict=True)}
    return {name: indices for name, indices in chosen.items() if indices.numel()}


def assert_ranks_as_a_stable_sort(scores, ratio):
    for per in ("model", "tensor"):
        for largest, ranked in ((True, scores.top), (False, scores.bottom)):
            mask, want = ranked(ratio, per=per), stable_sort(scores, ratio, per, largest=largest)
            assert list(mask) == list(want)
            for name in want:
                assert torch.equal(mask[name], want[name])
                assert mask.shapes[name] == scores.gradient(name).shape
            assert mask.model_numel == scores.model_numel


SPECIAL = [0.0, -0.0, DENORMAL, -DENORMAL, 2e-45, 1e-38, 1.0, -1.0, 1.0000001, 0.5, 3e38, -3e38, 1e-30]
SIGMAS = [1.0, 0.5, 0.02, 1e-8, 0.0, 3.0]


class TestRanking:
    @settings(max_examples=120, deadline=None)
    @given(data=st.data())
    def test_equals_a_stable_sort(self, data):
        numbers = st.sampled_from(SPECIAL) | st.floats(width=32, allow_nan=False, allow_infinity=False)
        lists = data.draw(st.lists(st.lists(numbers, min_size=1, max_size=30), min_size=1, max_size=5))
        sigma = data.draw(st.lists(st.sampled_from(SIGMAS), min_size=len(lists), max_size=len(lists)))
        scores = make({f"t{i}": values for i, values in enumerate(lists)}, sigma, others=data.draw(st.integers(0, 50)))
        ratio = data.draw(st.sampled_from([1e-9, 0.01, 0.1, 0.5, 0.99, 1.0]) | st.floats(0, 1, exclude_min=True))
        assert_ranks_as_a_stable_sort(scores, ratio)

    @pytest.mark.parametrize("ratio", [1e-4, 0.01, 0.3, 1.0])
    @pytest.mark.parametrize("kind", ["normal", "ties", "mostly_zero", "denormal", "zero"])
    @pytest.mark.parametrize("shapes", [[(1,)], [(257, 129), (3,), (5, 7, 11)], [(70_001,), (1, 2), (300, 1, 100)]])
    def test_equals_a_stable_sort_on_many_shapes(self, shapes, kind, ratio):
        torch.manual_seed(0)
        gradients = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
        for values in gradients.values():
            if kind == "ties":
                values.copy_(values.bfloat16())
            elif kind == "mostly_zero":
                values[values.abs() < 3] = -0.0
            elif kind == "denormal":
                values.mul_(1e-40)
            elif kind == "zero":
                values.zero_()
        assert_ranks_as_a_stable_sort(make(gradients, torch.rand(len(shapes)), others=17), ratio)

    def test_ties_go_to_the_earlier_weight(self):
        scores = make({"z": [[1.0, 1.0], [2.0, 1.0]], "a": [-2.0, 1.0]})
        assert scores.top(0.5)["z"].tolist() == [0, 2]
        assert scores.top(0.5)["a"].tolist() == [0]
        assert scores.bottom(0.5)["z"].tolist() == [0, 1, 3]
        assert list(scores.bottom(0.5)) == ["z"]
        assert scores.bottom(0.9)["a"].tolist() == [1]

    @pytest.mark.parametrize(
        ("ratio", "numel", "others", "count"),
        [
            (0.01, 250, 750, 10),
            (0.01, 250, 9_750, 100),
            (0.01, 50, 9_950, 50),
            (1e-9, 50, 0, 1),
            (0.29, 100, 0, 28),  # 0.29 * 100 is 28.999999999999996
            (1.0, 50, 450, 50),
            (1, 50, 450, 50),
            (np.float64(0.5), 8, 0, 4),
            (np.float32(0.5), 8, 0, 4),
            (Fraction(1, 4), 8, 0, 2),
        ],
    )
    def test_how_many(self, ratio, numel, others, count):
        scores = make({"w": torch.arange(numel).float()}, others=others)
        for mask in (scores.top(ratio), scores.bottom(ratio), scores.random(ratio)):
            assert mask.numel == count
            assert mask.density == count / (numel + others)
            assert mask.meta["ratio"] == float(ratio)
        assert scores.top(ratio)["w"].tolist() == list(range(numel - count, numel))
        assert scores.bottom(ratio)["w"].tolist() == list(range(count))

    def test_everything_is_everything_eligible(self):
        scores = make({"a": torch.zeros(3, 3), "b": torch.ones(5)}, others=1_000_000)
        for per in ("model", "tensor"):
            mask = scores.top(1.0, per=per)
            assert mask.numel == scores.numel
            assert mask == scores.bottom(1.0, per=per) == scores.random(1.0, per=per)

    def test_per_tensor_counts_each_tensor_by_itself(self):
        scores = make({"a": torch.randn(100), "b": torch.randn(7, 3), "c": torch.randn(1)}, others=10_000)
        for mask in (scores.top(0.1, per="tensor"), scores.random(0.1, per="tensor")):
            assert {name: len(indices) for name, indices in mask.items()} == {"a": 10, "b": 2, "c": 1}

    def test_sigma_ranks_between_tensors(self):
        scores = make({"a": [3.0, 1.0], "b": [2.0, 4.0]}, [0.1, 1.0])
        assert dict(scores.top(0.5)).keys() == {"b"}
        scores.sigma["a"] = torch.tensor(10.0)
        assert dict(scores.top(0.5)).keys() == {"a"}
        assert torch.equal(scores["a"], torch.tensor([30.0, 10.0]))

    @pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, True, False, "1", None, 1j])
    @pytest.mark.parametrize("ranking", [Scores.top, Scores.bottom, Scores.random])
    def test_wrong_ratio(self, ranking, ratio):
        with pytest.raises(InvalidArgumentError, match=r"ratio must be a number in \(0, 1\]"):
            ranking(some(), ratio)

    @pytest.mark.parametrize("per", ["layer", None, "", 1])
    @pytest.mark.parametrize("ranking", [Scores.top, Scores.bottom, Scores.random])
    def test_wrong_per(self, ranking, per):
        with pytest.raises(InvalidArgumentError, match="per must be 'model' or 'tensor'"):
            ranking(some(), 0.1, per=per)

    @pytest.mark.parametrize("per", ["model", "tensor"])
    def test_nan_is_an_error_that_names_the_tensor(self, per):
        scores = make({"a": torch.ones(4), "b": [1.0, math.nan]})
        for ranked in (scores.top, scores.bottom):
            with pytest.raises(NonFiniteError, match="scores of b hold NaN"):
                ranked(0.5, per=per)

    def test_infinite_scores_rank_highest(self):
        scores = make({"a": [1.0, 3e38], "b": [3e38, 2.0]}, [1.0, 1e10])
        assert {name: indices.tolist() for name, indices in scores.top(0.25).items()} == {"b": [0]}

    @pytest.mark.usefixtures("threads")
    def test_does_not_depend_on_threads(self):
        torch.manual_seed(0)
        scores = make({"a": torch.randn(400_001).bfloat16(), "b": torch.randn(300, 7).bfloat16()}, [0.5, 0.25])
        masks = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masks.append((scores.top(0.01), scores.bottom(0.01)))
        assert masks[0] == masks[1] == masks[2]


class TestRandom:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(1, 40), min_size=1, max_size=5),
        st.floats(0, 1, exclude_min=True),
        st.integers(0, 60),
        st.integers(0, 2**70),
        st.sampled_from(["model", "tensor"]),
    )
    def test_draws_as_many_as_top_without_repetition(self, sizes, ratio, others, seed, per):
        scores = make({f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}, others=others)
        mask, top = scores.random(ratio, per=per, seed=seed), scores.top(ratio, per=per)
        assert mask.numel == top.numel
        if per == "tensor":
            assert {name: len(indices) for name, indices in mask.items()} == {
                name: len(indices) for name, indices in top.items()
            }
        for name, indices in mask.items():
            assert indices.unique().numel() == indices.numel()
            assert indices.min() >= 0
            assert indices.max() < scores.gradient(name).numel()
        assert mask == scores.random(ratio, per=per, seed=seed)

    @pytest.mark.parametrize("per", ["model", "tensor"])
    @pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.8])
    def test_draws_evenly(self, ratio, per):
        scores = make({"a": torch.zeros(4, 5), "b": torch.zeros(40), "c": torch.zeros(20)})
        rounds = 600
        counts = {name: torch.zeros(scores.gradient(name).numel()) for name in scores}
        for seed in range(rounds):
            for name, indices in scores.random(ratio, per=per, seed=seed).items():
                counts[name][indices] += 1
        drawn = torch.cat(list(counts.values()))
        assert drawn.sum() == rounds * int(ratio * 80)
        # Every weight is drawn with probability `ratio`: 5 standard deviations of the binomial distribution.
        assert ((drawn - rounds * ratio).abs() < 5 * math.sqrt(rounds * ratio * (1 - ratio))).all()

    def test_seeds(self):
        scores = make({"a": torch.zeros(1000)})
        masks = [scores.random(0.1, seed=seed) for seed in range(20)]
        assert len({mask.fingerprint for mask in masks}) == 20
        assert scores.random(0.1) == masks[0]
        assert scores.random(0.1, seed=np.int64(3)) == masks[3]
        assert scores.random(0.1, seed=np.int64(3)).meta["seed"] == 3
        for seed in (-1, None, 1.5, "0"):
            with pytest.raises(InvalidArgumentError, match=r"seed is .* whole number of at least 0"):
                scores.random(0.1, seed=seed)
        assert scores.random(0.1, seed=np.int64(1)) == scores.random(0.1, seed=1)

    def test_ignores_the_scores(self):
        assert make({"a": torch.randn(90)}).random(0.1) == make({"a": torch.zeros(90)}).random(0.1)


def test_masks_say_where_they_come_from():
    scores = some()
    common = {**META, "batches": 3, "per": "model", "ratio": 0.25}
    assert scores.top(0.25).meta == {**common, "ranking": "top"}
    assert scores.bottom(0.25).meta == {**common, "ranking": "bottom"}
    assert scores.random(0.25, seed=4).meta == {**common, "ranking": "random", "seed": 4}
    assert scores.top(0.25, per="tensor").meta == {**common, "ranking": "top", "per": "tensor"}
    assert scores.meta == META


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "scores.safetensors"

    def test_round_trip_keeps_every_bit(self, path):
        specials = torch.tensor([0.0, -0.0, DENORMAL, -DENORMAL, 3.4e38, 1.1754944e-38, -1e-3])
        torch.manual_seed(0)
        scores = make(
            {"z.weight": specials, "b": torch.randn(5, 3), "a": torch.randn(1, 2, 2)},
            [DENORMAL, 0.1, 1 / 3],
            others=1000,
            meta={**META, "note": "é"},
        )
        scores.save(path)
        loaded = Scores.load(str(path))
        assert list(loaded) == list(scores)
        for name in scores:
            assert loaded.gradient(name).shape == scores.gradient(name).shape
            assert bits(loaded.gradient(name)) == bits(scores.gradient(name))
            assert bits(loaded[name]) == bits(scores[name])
            assert loaded.sigma[name].dtype == torch.float32
            assert bits(loaded.sigma[name]) == bits(scores.sigma[name])
        assert loaded.num_batches == 3
        assert loaded.model_numel == scores.model_numel
        assert loaded.meta == scores.meta
        loaded.save(path.with_name("again"))
        assert path.with_name("again").read_bytes() == path.read_bytes()

    def test_the_order_of_parameters_survives_since_it_decides_ties(self, path):
        scores = make({name: torch.ones(10) for name in ("z", "m", "a", "x")})
        scores.save(path)
        mask = Scores.load(path).top(0.25)
        assert list(mask) == ["z"]
        assert mask == scores.top(0.25)
        assert Scores.load(path).bottom(0.6) == scores.bottom(0.6)
        assert Scores.load(path).random(0.3) == scores.random(0.3)

    def test_non_contiguous_gradients(self, path):
        scores = make({"w": torch.randn(4, 3).t()})
        scores.save(path)
        assert torch.equal(Scores.load(path)["w"], scores["w"])

    def test_others_can_read_it_without_pickle(self, path):
        from safetensors.torch import load_file

        scores = some()
        scores.save(path)
        tensors = load_file(path)
        assert set(tensors) == set(scores)
        assert all(torch.equal(tensors[name], scores.gradient(name)) for name in scores)

    def test_missing_and_unwritable(self, path, tmp_path):
        with pytest.raises(FileAccessError, match=r"scores\.safetensors"):
            Scores.load(path)
        with pytest.raises(FileAccessError, match="absent"):
            some().save(tmp_path / "absent" / "scores.safetensors")
        with pytest.raises(FileAccessError, match="directory"):
            some().save(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_stored_leaves_the_old_file(self, path):
        some().save(path)
        before = path.read_bytes()
        with pytest.raises(InvalidArgumentError, match="meta"):
            make({"w": [1.0]}, meta={"model": torch.zeros(1)}).save(path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("length", [0, 4, 8, 100, -40, -1])
    def test_truncated(self, path, length):
        some().save(path)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(FileFormatError, match=r"scores\.safetensors"):
            Scores.load(path)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 0.99])
    def test_one_flipped_bit(self, path, share):
        some().save(path)
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 1
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"scores\.safetensors"):
            Scores.load(path)

    def test_foreign_files(self, path):
        from safetensors.torch import save_file

        some().top(0.5).save(path)
        with pytest.raises(FileFormatError, match=r"scores\.safetensors.*'mask', not 'scores'"):
            Scores.load(path)
        with pytest.raises(FileFormatError, match="'scores', not 'mask'"):
            some().save(path)
            Mask.load(path)
        save_file({"w": torch.zeros(2)}, path)
        with pytest.raises(FileFormatError, match="not one that safekern wrote"):
            Scores.load(path)
        torch.save({"w": torch.zeros(2)}, path)
        with pytest.raises(FileFormatError, match=r"scores\.safetensors"):
            Scores.load(path)
        files.write(path, "scores", 3, {"w": torch.zeros(2)}, {})
        with pytest.raises(FileFormatError, match="newer"):
            Scores.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"sigma": {"w": 1.0}},
            {"sigma": {"w": 1.0, "v": 1.0, "u": 1.0}},
            {"sigma": [1.0, 1.0]},
            {"sigma": {"w": 1.0, "v": "wide"}},
            {"sigma": {"w": 1.0, "v": -1.0}},
            {"sigma": {"w": 1.0, "v": 1e300}},
            {"sigma": {"w": 1.0, "v": None}},
            {"sigma": {}},
            {"num_batches": 0},
            {"num_batches": None},
            {"model_numel": 6},
            {"model_numel": "many"},
            {"meta": 3},
            {"meta": None},
        ],
        ids=str,
    )
    def test_contradictions_inside_an_intact_file(self, path, change):
        tensors = {"w": torch.ones(2, 2), "v": torch.ones(3)}
        meta = {"sigma": {"w": 1.0, "v": 2.0}, "num_batches": 2, "model_numel": 7, "meta": {}}
        files.write(path, "scores", 1, tensors, meta)
        assert Scores.load(path).numel == 7
        files.write(path, "scores", 1, tensors, {**meta, **change})
        with pytest.raises(FileFormatError, match=r"scores\.safetensors is not a valid scores file"):
            Scores.load(path)
        del meta[next(iter(change))]
        files.write(path, "scores", 1, tensors, meta)
        with pytest.raises(FileFormatError, match=r"scores\.safetensors is not a valid scores file"):
            Scores.load(path)

    def test_gradients_of_another_dtype(self, path):
        meta = {"sigma": {"w": 1.0}, "num_batches": 2, "model_numel": 7, "meta": {}}
        files.write(path, "scores", 1, {"w": torch.ones(2, dtype=torch.float64)}, meta)
        with pytest.raises(FileFormatError, match="is not a valid scores file"):
            Scores.load(path)


def test_gradients_may_be_expanded():
    gradients = {"w": torch.tensor([[1.0], [3.0]]).expand(2, 3)}
    scores = Scores(gradients, {"w": torch.tensor(0.5)}, num_batches=1, model_numel=6, meta={})
    assert scores.top(0.5)["w"].tolist() == [3, 4, 5]
    assert torch.equal(scores["w"], torch.tensor([[0.5] * 3, [1.5] * 3]))
