import copy
import functools
import math
import operator
import pickle
import re
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from safekern import files
from safekern.errors import (
    FileAccessError,
    FileFormatError,
    InvalidArgumentError,
    MaskMismatchError,
    MissingDependencyError,
    UnknownNameError,
)
from safekern.mask import Mask

SHAPES = {"a.weight": (4, 5), "b.weight": (2, 3, 2), "b.bias": (7,), "c": ()}


@st.composite
def index_sets(draw):
    """For some of the parameters in SHAPES, a set of flat indices."""
    chosen = draw(st.sets(st.sampled_from(sorted(SHAPES))))
    return {name: draw(st.sets(st.integers(0, math.prod(SHAPES[name]) - 1))) for name in chosen}


def make(index_sets, **kwargs):
    return Mask.from_indices({name: list(values) for name, values in index_sets.items()}, SHAPES, **kwargs)


def as_sets(mask):
    return {name: set(mask[name].tolist()) for name in mask}


def nonempty(index_sets):
    return {name: values for name, values in index_sets.items() if values}


def one(indices, numel=100, name="w"):
    return Mask.from_indices({name: indices}, {name: (numel,)})


def linears(**sizes):
    return nn.ModuleDict({name: nn.Linear(size[1], size[0], bias=False) for name, size in sizes.items()})


class TestReading:
    @settings(max_examples=50, deadline=None)
    @given(index_sets())
    def test_indices(self, sets):
        mask = make(sets)
        assert as_sets(mask) == nonempty(sets)
        assert len(mask) == len(nonempty(sets))
        assert mask.numel == sum(map(len, sets.values()))
        assert mask.model_numel == 20 + 12 + 7 + 1
        assert mask.density == mask.numel / 40
        assert mask.shapes == {name: torch.Size(SHAPES[name]) for name in nonempty(sets)}
        for name in mask:
            indices = mask[name]
            assert indices.dtype == torch.int64
            assert indices.device.type == "cpu"
            assert indices.tolist() == sorted(sets[name])
            assert mask.compact(name).dtype == torch.int32
            assert mask.compact(name).tolist() == sorted(sets[name])

    @settings(max_examples=50, deadline=None)
    @given(index_sets())
    def test_bool_round_trip(self, sets):
        mask = make(sets)
        dense = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
        for name in mask:
            dense[name] = mask.bool(name)
            assert dense[name].dtype == torch.bool
            assert dense[name].shape == torch.Size(SHAPES[name])
            assert dense[name].flatten().nonzero().flatten().tolist() == sorted(sets[name])
        again = Mask.from_bool(dense)
        assert again == mask
        assert again.model_numel == mask.model_numel

    def test_is_a_mapping(self):
        mask = make({"a.weight": {3, 1}, "c": {0}})
        assert isinstance(mask, Mapping)
        assert list(mask) == list(mask.keys()) == ["a.weight", "c"]
        assert [indices.tolist() for indices in mask.values()] == [[1, 3], [0]]
        assert {name: indices.tolist() for name, indices in mask.items()} == {"a.weight": [1, 3], "c": [0]}
        assert "c" in mask
        assert "b.weight" not in mask
        assert 3 not in mask
        assert mask.get("c").tolist() == [0]
        assert mask.get("absent") is None
        assert mask.get("absent", 5) == 5

    @pytest.mark.parametrize("access", [Mask.__getitem__, Mask.compact, Mask.bool])
    def test_unknown_name(self, access):
        mask = Mask.from_indices({"model.layers.0.q_proj.weight": [1]}, {"model.layers.0.q_proj.weight": (2, 2)})
        with pytest.raises(KeyError, match=r"model\.layers\.1\.q_proj\.weight") as caught:
            access(mask, "model.layers.1.q_proj.weight")
        assert isinstance(caught.value, UnknownNameError)
        assert "Did you mean 'model.layers.0.q_proj.weight'?" in str(caught.value)
        assert "1 parameter." in str(caught.value)
        with pytest.raises(UnknownNameError, match=r"list\(mask\)"):
            access(mask, "zzz")

    def test_what_it_hands_out_are_copies(self):
        source = torch.tensor([1, 2], dtype=torch.int32)
        meta = {"list": [1]}
        mask = Mask.from_indices({"w": source}, {"w": (4,)}, meta=meta)
        before = copy.deepcopy(mask)
        source.zero_()
        meta["list"].append(2)
        mask["w"].zero_()
        mask.bool("w").fill_(True)
        mask.meta["list"].append(3)
        mask.meta["new"] = 1
        mask.shapes.clear()
        assert mask == before
        assert mask.meta == {"list": [1]}
        assert mask.compact("w") is mask.compact("w")

    def test_wide_indices_are_handed_out_as_copies_too(self):
        mask = one([2**32], 2**33)
        assert mask.compact("w").dtype == torch.int64
        mask["w"].zero_()
        assert mask["w"].tolist() == [2**32]

    @pytest.mark.parametrize(("numel", "dtype"), [(2**31 - 1, torch.int32), (2**31, torch.int64), (2**33, torch.int64)])
    def test_stored_as_int32_below_two_to_the_31(self, numel, dtype):
        mask = one([0, numel - 1], numel)
        assert mask.compact("w").dtype == dtype
        assert mask["w"].tolist() == [0, numel - 1]

    def test_repr(self):
        assert repr(make({"a.weight": {1, 2}})) == "Mask(2 of 40 weights, 5%, in 1 parameter)"
        assert repr(make({})) == "Mask(0 of 40 weights, 0%, in 0 parameters)"
        assert repr(Mask.from_indices({}, {})) == "Mask(0 of 0 weights, 0%, in 0 parameters)"


class TestMaking:
    @pytest.mark.parametrize(
        "values",
        [
            [3, 0, 2],
            (3, 0, 2),
            np.array([3, 0, 2]),
            np.array([2, 0, 3])[::-1],
            np.array([3, 0, 2], dtype=np.uint16),
            torch.tensor([3, 0, 2]),
            torch.tensor([3, 9, 0, 9, 2, 9], dtype=torch.int32)[::2],
            torch.tensor([3, 0, 2], dtype=torch.uint8),
            torch.tensor([3, 0, 2], dtype=torch.uint64),
        ],
    )
    def test_any_integers_in_any_order(self, values):
        assert one(values, 4)["w"].tolist() == [0, 2, 3]

    def test_read_only_arrays(self):
        values = np.array([1, 2])
        values.flags.writeable = False
        assert one(values)["w"].tolist() == [1, 2]

    @pytest.mark.parametrize("values", [[], torch.empty(0), np.empty(0, np.int8), torch.empty(0, dtype=torch.bool)])
    def test_parameters_without_indices_are_left_out(self, values):
        mask = Mask.from_indices({"w": values, "v": [0]}, {"w": (2,), "v": (1,)})
        assert list(mask) == ["v"]
        assert list(mask.shapes) == ["v"]
        assert mask.model_numel == 3

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([0.0, 1.0], "integer indices are needed, got torch.float32"),
            ([True, False], r"Mask\.from_bool"),
            (torch.zeros(3, dtype=torch.complex64), "complex64"),
            ([[0, 1]], r"1-D.*\(1, 2\)"),
            (torch.tensor(3), "1-D"),
            (["x"], "not integers"),
            ([0, None], "not integers"),
            ([2**70], "not integers"),
            ([0, -1], "index -1 is outside"),
            ([5, 100], r"index 100 is outside the shape \(100,\)"),
            (torch.tensor([2**64 - 1], dtype=torch.uint64), "outside"),
            ([7, 3, 7], "index 7 is given more than once"),
            ([3, 3], "index 3 is given more than once"),
        ],
    )
    def test_bad_indices_name_the_parameter(self, values, message):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            one(values)
        assert str(caught.value).startswith("'w'")

    @pytest.mark.parametrize("shape", [None, 3, "ab", (-1, 2), (2.0,), (2**40, 2**40), (2**63,), (2**70, 0)])
    def test_bad_shapes_name_the_parameter(self, shape):
        with pytest.raises(InvalidArgumentError, match="'w'"):
            Mask.from_indices({"w": [0]}, {"w": shape})

    def test_a_parameter_without_a_shape(self):
        with pytest.raises(InvalidArgumentError, match=r"No shape is given for 'v', 'x'"):
            Mask.from_indices({"w": [0], "v": [0], "x": []}, {"w": (1,)})

    def test_a_parameter_without_elements(self):
        with pytest.raises(InvalidArgumentError, match="outside"):
            Mask.from_indices({"w": [0]}, {"w": (0, 3)})

    def test_model_numel(self):
        shapes = {"w": (2, 2), "v": (10,)}
        assert Mask.from_indices({"w": [0]}, shapes).model_numel == 14
        assert Mask.from_indices({"w": [0]}, shapes, model_numel=4).density == 0.25
        with pytest.raises(InvalidArgumentError, match="model_numel is 3"):
            Mask.from_indices({"w": [0]}, shapes, model_numel=3)

    def test_meta(self):
        assert make({}).meta == {}
        assert make({}, meta={"ratio": 0.01, "shape": (1, 2)}).meta == {"ratio": 0.01, "shape": [1, 2]}
        with pytest.raises(InvalidArgumentError, match="JSON"):
            make({}, meta={"x": torch.zeros(1)})

    def test_from_bool_of_views_and_of_other_dtypes(self):
        dense = torch.zeros(3, 4, dtype=torch.bool)
        dense[1, 2] = True
        assert Mask.from_bool({"w": dense.t()})["w"].tolist() == [2 * 3 + 1]
        assert Mask.from_bool({"w": torch.tensor(True)})["w"].tolist() == [0]
        assert Mask.from_bool({"w": dense}, meta={"a": 1}).meta == {"a": 1}
        for other in (torch.zeros(2), torch.zeros(2, dtype=torch.uint8)):
            with pytest.raises(InvalidArgumentError, match="'w': a bool tensor"):
                Mask.from_bool({"w": other})


class TestSets:
    @settings(max_examples=100, deadline=None)
    @given(index_sets(), index_sets())
    def test_against_python_sets(self, left, right):
        operations = {
            "&": (lambda a, b: a & b, set.intersection),
            "|": (lambda a, b: a | b, set.union),
            "-": (lambda a, b: a - b, set.difference),
        }
        for symbol, (on_masks, on_sets) in operations.items():
            result = on_masks(make(left), make(right, model_numel=50))
            expected = {name: on_sets(left.get(name, set()), right.get(name, set())) for name in SHAPES}
            assert as_sets(result) == nonempty(expected)
            assert all(result.compact(name).dtype == torch.int32 for name in result)
            assert all(result[name].tolist() == sorted(expected[name]) for name in result)
            assert result.shapes == {name: torch.Size(SHAPES[name]) for name in nonempty(expected)}
            assert result.model_numel == 50
            assert result.meta["operation"] == symbol

        pairs = [{(name, index) for name in sets for index in sets[name]} for sets in (left, right)]
        union = pairs[0] | pairs[1]
        expected = len(pairs[0] & pairs[1]) / len(union) if union else 1.0
        assert make(left).jaccard(make(right)) == expected
        assert (make(left) == make(right)) == (pairs[0] == pairs[1])
        assert (make(left) != make(right)) == (pairs[0] != pairs[1])
        assert (make(left).fingerprint == make(right).fingerprint) == (pairs[0] == pairs[1])

    def test_long_chains(self, tmp_path):
        masks = [Mask.from_indices({"w": [i]}, {"w": (5000,)}, meta={"number": i}) for i in range(2000)]
        for operate in (operator.or_, operator.sub, lambda chain, mask: mask | chain):
            chain = functools.reduce(operate, masks)
            chain.save(tmp_path / "mask")
            loaded = Mask.load(tmp_path / "mask")
            assert loaded == chain and loaded.meta == chain.meta
        assert chain.numel == 2000
        assert chain.meta["left"] == {"number": 1999}
        assert chain.meta["right"]["right"]["left"] == {"number": 1997}

    def test_meta_that_only_looks_like_an_operation(self):
        metas = {"operation": "x", "left": 3, "right": [1]}, {"left": {"left": {}}, "a": {"b": 1}}
        both = functools.reduce(operator.or_, [make({}, meta=meta) for meta in metas])
        assert both.meta == {"operation": "|", "left": metas[0], "right": metas[1]}

    def test_operands_stay_as_they_were(self):
        left, right = one([1, 2, 3]), one([3, 4])
        _ = left & right, left | right, left - right
        assert left["w"].tolist() == [1, 2, 3]
        assert right["w"].tolist() == [3, 4]

    def test_wide_indices(self):
        left, right = one([1, 2**32, 2**33 - 1], 2**33), one([2**32], 2**33)
        assert (left & right)["w"].tolist() == [2**32]
        assert (left - right)["w"].tolist() == [1, 2**33 - 1]
        assert (left | right) == left

    def test_masks_over_disjoint_parts_of_a_model(self):
        both = one([1, 2], 10, "a") | one([3], 20, "b")
        assert both.model_numel == 30
        assert list(both) == ["a", "b"]

    @pytest.mark.parametrize("wrapper", ["module.{}", "_orig_mod.{}", "base_model.model.{}"])
    def test_wrapped_names_are_the_same_parameters(self, wrapper, tmp_path):
        shapes = {"a": (2, 3), "b": (4,), "c": (5,)}
        left, right = {"a": [0, 1], "b": [3]}, {"b": [2, 3], "a": [1, 5], "c": [4]}
        plain = Mask.from_indices(right, shapes)
        wrapped = Mask.from_indices(
            {wrapper.format(name): values for name, values in right.items()},
            {wrapper.format(name): shape for name, shape in shapes.items()},
        )
        wrapped.save(tmp_path / "mask")
        mask = Mask.from_indices(left, shapes)
        for other in (wrapped, Mask.load(tmp_path / "mask")):
            assert mask & other == mask & plain
            assert mask - other == mask - plain
            assert as_sets(mask | other) == {"a": {0, 1, 5}, "b": {2, 3}, wrapper.format("c"): {4}}
            assert mask.jaccard(other) == mask.jaccard(plain)
            assert list(other & mask) == [wrapper.format("b"), wrapper.format("a")]
            assert other != plain

    def test_a_name_of_both_masks_is_no_wrapped_one(self):
        both = Mask.from_indices({"w": [0], "module.w": [1]}, {"w": (2,), "module.w": (2,)})
        assert as_sets(one([0], 2) & both) == {"w": {0}}
        assert as_sets(both - one([0], 2)) == {"module.w": {1}}

    @pytest.mark.parametrize("use", [Mask.__and__, Mask.__or__, Mask.__sub__, Mask.jaccard])
    def test_ambiguous_names(self, use):
        both = Mask.from_indices({"_orig_mod.w": [0], "module.w": [1]}, {"_orig_mod.w": (2,), "module.w": (2,)})
        for left, right in ((one([0], 2), both), (both, one([0], 2))):
            with pytest.raises(MaskMismatchError, match=r"Keep one of them|Use the full name"):
                use(left, right)

    @pytest.mark.parametrize("use", [Mask.__and__, Mask.__or__, Mask.__sub__, Mask.jaccard])
    def test_other_shapes(self, use):
        left = Mask.from_indices({"w": [0]}, {"w": (2, 3)})
        for name in ("w", "module.w"):
            right = Mask.from_indices({name: [0]}, {name: (3, 2)})
            with pytest.raises(MaskMismatchError, match=r"'w' has shape \(2, 3\) in one mask and \(3, 2\)"):
                use(left, right)

    def test_other_types(self):
        mask = one([1])
        for operate in (lambda: mask & {1}, lambda: mask | {"w": [1]}, lambda: mask - 1):
            with pytest.raises(TypeError):
                operate()
        assert mask != {"w": mask["w"]}
        assert mask != 1

    def test_equality_is_of_indices_and_shapes_only(self):
        mask = Mask.from_indices({"w": [1], "v": [0]}, {"w": (4,), "v": (1,)}, meta={"a": 1})
        same = Mask.from_indices({"v": [0], "w": [1]}, {"w": (4,), "v": (1,)}, model_numel=99)
        assert mask == same
        assert mask.fingerprint == same.fingerprint
        others = [
            Mask.from_indices({"w": [1], "v": [0]}, {"w": (2, 2), "v": (1,)}),
            Mask.from_indices({"w": [2], "v": [0]}, {"w": (4,), "v": (1,)}),
            Mask.from_indices({"w": [1]}, {"w": (4,)}),
            Mask.from_indices({"x": [1], "v": [0]}, {"x": (4,), "v": (1,)}),
        ]
        assert all(mask != other for other in others)
        assert len({other.fingerprint for other in [mask, *others]}) == 5

    def test_unhashable_like_every_mapping(self):
        with pytest.raises(TypeError, match="unhashable"):
            hash(one([1]))

    def test_fingerprint_is_a_sha256_and_stays_the_same_across_versions(self):
        mask = Mask.from_indices({"a": [0, 3], "b": [2**32]}, {"a": (2, 2), "b": (2**33,)})
        assert mask.fingerprint == "5202df27797f1808631786c58d494371c39c175ffb7ca56acbec747ba5b33366"

    def test_fingerprint_does_not_know_wrappers(self):
        indices, shapes = {"a.weight": [0], "b.weight": [1]}, {"a.weight": (2,), "b.weight": (2,)}
        # In the other order by name.
        wrapping = {"a.weight": "module.a.weight", "b.weight": "_orig_mod.b.weight"}
        wrapped = Mask.from_indices(
            {wrapping[name]: values for name, values in indices.items()},
            {wrapping[name]: shape for name, shape in shapes.items()},
        )
        assert wrapped.fingerprint == Mask.from_indices(indices, shapes).fingerprint
        assert wrapped != Mask.from_indices(indices, shapes)


class TestFitting:
    def test_a_model_that_fits(self):
        model = linears(a=(2, 3), b=(4, 5))
        mask = Mask.from_indices({"b.weight": [19], "a.weight": [0]}, {"a.weight": (2, 3), "b.weight": (4, 5)})
        mask.check(model)
        assert mask.resolve(dict(model.named_parameters())) == {"a.weight": "a.weight", "b.weight": "b.weight"}
        assert mask.resolve(mask.shapes) == {"a.weight": "a.weight", "b.weight": "b.weight"}

    def test_every_missing_and_every_misshapen_parameter_is_named(self):
        model = linears(a=(2, 3), b=(4, 5), c=(1, 1))
        shapes = {"a.weight": (3, 2), "b.weight": (4, 5), "q.weight": (1, 1), "zzz": (1,)}
        mask = Mask.from_indices({name: [0] for name in shapes}, shapes)
        with pytest.raises(MaskMismatchError) as caught:
            mask.check(model)
        first, *lines, last = str(caught.value).splitlines()
        assert "3 of its 4 parameters" in first
        assert lines[0] == "  a.weight: shape (2, 3), in the mask (3, 2)"
        assert lines[1].startswith("  q.weight: missing. Did you mean ")
        assert lines[2] == "  zzz: missing."
        assert "b.weight:" not in str(caught.value)
        assert last.startswith("Use a mask made for this model")

    def test_a_long_list_is_cut_to_lines_but_names_all(self):
        shapes = {f"layers.{number}.weight": (2,) for number in range(300)}
        mask = Mask.from_indices({name: [0] for name in shapes}, shapes)
        with pytest.raises(MaskMismatchError) as caught:
            mask.check(linears(a=(1, 1)))
        message = str(caught.value)
        assert "and 290 more: " in message
        assert all(re.search(rf"\b{re.escape(name)}\b", message) for name in shapes)
        assert len(message.splitlines()) == 13

    def test_same_number_of_elements_is_not_enough(self):
        with pytest.raises(MaskMismatchError, match="shape"):
            Mask.from_indices({"weight": [0]}, {"weight": (6,)}).check(nn.Linear(2, 3))

    def test_an_empty_mask(self):
        for mask in (make({}), one([1]) & one([2])):
            with pytest.raises(MaskMismatchError, match="selects nothing"):
                mask.check(nn.Linear(2, 2))
            with pytest.raises(MaskMismatchError, match="selects nothing"):
                mask.resolve({})

    def test_wrapped_models(self):
        model = linears(a=(2, 3))
        mask = Mask.from_indices({"a.weight": [0]}, {"a.weight": (2, 3)})
        for wrapped, name in [
            (nn.ModuleDict({"module": model}), "module.a.weight"),
            (torch.compile(model), "_orig_mod.a.weight"),
            (nn.ModuleDict({"module": torch.compile(model)}), "module._orig_mod.a.weight"),
        ]:
            mask.check(wrapped)
            assert mask.resolve(dict(wrapped.named_parameters())) == {"a.weight": name}
            wrapped_mask = Mask.from_indices({name: [0]}, {name: (2, 3)})
            wrapped_mask.check(model)

    def test_peft_models(self):
        peft = pytest.importorskip("peft")
        model = linears(q_proj=(2, 3), other=(4, 4))
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        mask = Mask.from_indices({name: [0] for name in shapes}, shapes)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        mask.check(wrapped)
        found = mask.resolve(dict(wrapped.named_parameters()))
        assert found["q_proj.weight"] == "base_model.model.q_proj.base_layer.weight"
        assert found["other.weight"] == "base_model.model.other.weight"

    def test_a_wrapped_name_of_another_shape_shows_both_names(self):
        with pytest.raises(MaskMismatchError, match=r"w \(here module\.w\): shape \(3,\), in the mask \(2,\)"):
            one([0], 2).resolve({"module.w": torch.Size([3])})

    def test_ambiguous_names(self):
        with pytest.raises(MaskMismatchError, match="ambiguous"):
            one([0], 2).resolve({"module.w": torch.zeros(2), "_orig_mod.w": torch.zeros(2)})

    def test_either_name_of_a_tied_weight(self):
        model = linears(embed=(5, 2), head=(5, 2))
        model["head"].weight = model["embed"].weight
        for name in ("embed.weight", "head.weight"):
            Mask.from_indices({name: [0]}, {name: (5, 2)}).check(model)


class TestParameters:
    def test_first_names_and_wrappers(self):
        model = linears(a=(3, 2), b=(2, 2))
        found = Mask.from_indices({"b.weight": [3, 1], "a.weight": [0]}, {"a.weight": (3, 2), "b.weight": (2, 2)})
        found = found.parameters(torch.nn.DataParallel(model))
        assert list(found) == ["module.b.weight", "module.a.weight"]
        assert found["module.b.weight"][0] is model["b"].weight
        assert found["module.b.weight"][1].tolist() == [1, 3]

    def test_a_tied_parameter_once_with_the_indices_of_all_its_names(self):
        model = linears(embed=(5, 2), head=(5, 2))
        model["head"].weight = model["embed"].weight
        shapes = {"embed.weight": (5, 2), "head.weight": (5, 2)}
        both = Mask.from_indices({"head.weight": [9, 4], "embed.weight": [0, 4]}, shapes).parameters(model)
        assert list(both) == ["embed.weight"] and both["embed.weight"][1].tolist() == [0, 4, 9]
        one = Mask.from_indices({"head.weight": [9]}, shapes).parameters(model)
        assert list(one) == ["embed.weight"] and one["embed.weight"][1].tolist() == [9]

    def test_refuses_what_check_refuses(self):
        with pytest.raises(MaskMismatchError, match="missing"):
            Mask.from_indices({"c.weight": [0]}, {"c.weight": (1,)}).parameters(linears(a=(3, 2)))


def gaps_to_indices(gaps):
    return (np.cumsum(np.asarray(gaps, dtype=np.int64)) - 1).tolist()


def reference_codes(indices):
    """In bytes where they take no more space than 16-bit numbers."""
    narrow, wide, previous = [], [], -1
    for index in indices:
        gap = index - previous
        narrow += [255] * (gap // 255) + [gap % 255]
        wide += [65535] * (gap // 65535) + [gap % 65535]
        previous = index
    if len(narrow) <= 2 * len(wide):
        return torch.tensor(narrow, dtype=torch.uint8)
    return torch.tensor(wide, dtype=torch.uint16)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "mask.safetensors"

    def round_trip(self, mask, path):
        mask.save(path)
        loaded = Mask.load(path)
        assert loaded == mask
        assert list(loaded) == list(mask)
        assert loaded.model_numel == mask.model_numel
        assert loaded.meta == mask.meta
        assert loaded.fingerprint == mask.fingerprint
        for name in mask:
            assert loaded.compact(name).dtype == mask.compact(name).dtype
        return loaded

    @settings(max_examples=50, deadline=None)
    @given(sets=index_sets())
    def test_round_trip(self, sets, tmp_path_factory):
        self.round_trip(make(sets, meta={"ratio": 0.01, "ü": [None]}), tmp_path_factory.mktemp("mask") / "mask")

    def test_odd_names_and_their_order(self, path):
        shapes = {"z": (2,), "": (2,), "ü.ñ\n": (2,), 'a"b': (2,)}
        self.round_trip(Mask.from_indices({name: [1] for name in shapes}, shapes), path)

    @settings(max_examples=100, deadline=None)
    @given(
        gaps=st.lists(
            st.one_of(
                st.integers(1, 10),
                st.sampled_from([253, 254, 255, 256, 257, 509, 510, 511]),
                st.sampled_from([65533, 65534, 65535, 65536, 65537, 131069, 131070, 131071, 196605]),
                st.integers(1, 300_000),
            ),
            min_size=1,
            max_size=20,
        ),
        spare=st.sampled_from([0, 1, 2**33]),
    )
    def test_gaps_of_every_size(self, gaps, spare, tmp_path_factory):
        indices = gaps_to_indices(gaps)
        mask = one(indices, indices[-1] + 1 + spare)
        path = tmp_path_factory.mktemp("mask") / "mask"
        assert self.round_trip(mask, path)["w"].tolist() == indices
        codes, want = files.read(path, "mask", 2)[0]["w"], reference_codes(indices)
        assert codes.dtype == want.dtype and torch.equal(codes, want)

    @pytest.mark.parametrize("gap", [1, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 131069, 131070, 131071])
    def test_gaps_around_a_code(self, path, gap):
        indices = gaps_to_indices([gap, gap, 1, gap])
        assert self.round_trip(one(indices, indices[-1] + 1), path)["w"].tolist() == indices

    def test_first_and_last_of_the_widest_int32_parameter(self, path):
        last = 2**31 - 2
        assert self.round_trip(one([0, last], 2**31 - 1), path)["w"].tolist() == [0, last]
        assert self.round_trip(one([last], 2**31 - 1), path)["w"].tolist() == [last]

    def test_few_indices_in_a_huge_parameter(self, path):
        shape = (8, 2**30)
        indices = [0, 1, 2**31 - 1, 2**31, 2**32 + 5, 2**33 - 1]
        mask = Mask.from_indices({"experts": indices}, {"experts": shape})
        assert self.round_trip(mask, path)["experts"].tolist() == indices
        assert path.stat().st_size < 2**33 // 32000

    def test_bytes_per_index_at_one_percent(self, path):
        generator = torch.Generator().manual_seed(0)
        shapes = {f"model.layers.{number}.mlp.gate_proj.weight": (1500, 500) for number in range(150)}
        dense = {name: torch.rand(shape, generator=generator) < 0.01 for name, shape in shapes.items()}
        mask = Mask.from_bool(dense, meta={"ratio": 0.01})
        assert mask.numel > 1_000_000
        self.round_trip(mask, path)
        assert path.stat().st_size / mask.numel <= 1.2

    def test_every_truncation_and_a_bit_flip_in_every_byte(self, path):
        Mask.from_indices({"w": [3, 70000], "v": [0]}, {"w": (300, 300), "v": (2,)}).save(path)
        content = path.read_bytes()
        damaged = [content[:length] for length in range(len(content))]
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            damaged.append(bytes(flipped))
        for wrong in damaged:
            path.write_bytes(wrong)
            with pytest.raises(FileFormatError, match=re.escape(path.name)):
                Mask.load(path)

    def craft(self, path, codes=(1,), shapes=None, model_numel=10, meta=None, dtype=torch.uint16, **extra):
        """A file with a right checksum and any content."""
        tensor = codes if isinstance(codes, torch.Tensor) else torch.tensor(codes, dtype=dtype)
        description = {"shapes": {"w": [10]} if shapes is None else shapes, "model_numel": model_numel}
        files.write(path, "mask", 1, {"w": tensor}, description | {"meta": {} if meta is None else meta} | extra)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
    def test_a_crafted_file_that_is_right(self, path, dtype):
        self.craft(path, codes=[1, 2, 7], dtype=dtype)
        assert Mask.load(path)["w"].tolist() == [0, 2, 9]

    @pytest.mark.parametrize(
        "content",
        [
            {"codes": []},
            {"codes": [0]},
            {"codes": [0, 1]},
            {"codes": [1, 0]},
            {"codes": [11]},
            {"codes": [5, 6]},
            {"codes": [65535]},
            {"codes": [255], "dtype": torch.uint8},
            {"codes": [1, 255], "dtype": torch.uint8, "shapes": {"w": [2**20]}, "model_numel": 2**20},
            {"codes": [1, 0, 2], "dtype": torch.uint8},
            {"codes": [1, 65535], "shapes": {"w": [2**20]}, "model_numel": 2**20},
            {"codes": [65535] * 10, "shapes": {"w": [2**20]}, "model_numel": 2**20},
            {"codes": [65534] * 40000, "shapes": {"w": [2**31 - 1]}, "model_numel": 2**31},
            {"codes": torch.ones(1, 1, dtype=torch.uint16)},
            {"codes": [1], "dtype": torch.int16},
            {"codes": [1], "dtype": torch.int64},
            {"shapes": {}},
            {"shapes": {"v": [10]}},
            {"shapes": {"w": [10], "v": [10]}, "model_numel": 20},
            {"shapes": [["w", [10]]]},
            {"shapes": {"w": 10}},
            {"shapes": {"w": "10"}},
            {"shapes": {"w": [10.0]}},
            {"shapes": {"w": [-10]}},
            {"shapes": {"w": [0, 10]}},
            {"shapes": {"w": [2**40, 2**40]}, "model_numel": 2**90},
            {"model_numel": 9},
            {"model_numel": None},
            {"model_numel": True},
            {"model_numel": 10.0},
            {"model_numel": "10"},
            {"meta": []},
            {"meta": "x"},
        ],
    )
    def test_impossible_content_with_a_right_checksum(self, path, content):
        self.craft(path, **content)
        with pytest.raises(FileFormatError, match=re.escape(path.name)):
            Mask.load(path)

    def test_meta_nested_too_deeply(self, tmp_path):
        path, meta = tmp_path / "mask.safetensors", {}
        innermost = meta
        for _ in range(900):
            innermost["x"] = innermost = {}
        limit = sys.getrecursionlimit()
        try:
            sys.setrecursionlimit(20_000)
            codes, description = one([1]).pack()
            files.write(path, "mask", 2, codes, description | {"meta": meta})
        finally:
            sys.setrecursionlimit(limit)
        with pytest.raises(FileFormatError, match=re.escape(path.name)):
            Mask.load(path)

    def test_other_files(self, path):
        with pytest.raises(FileAccessError, match="no such file"):
            Mask.load(path)
        files.write(path, "delta", 1, {}, {})
        with pytest.raises(FileFormatError, match="holds 'delta', not 'mask'"):
            Mask.load(path)
        files.write(path, "mask", 3, {}, {})
        with pytest.raises(FileFormatError, match="upgrade"):
            Mask.load(path)


class TestSummary:
    def mask(self):
        shapes = {
            "lm_head.weight": (10, 10),
            "layers.1.v_proj.weight": (5, 4),
            "layers.0.norm.weight": (4,),
            "layers.0.q_proj.weight": (4, 10),
            "layers.0.q_proj.bias": (10,),
            "layers.10.q_proj.weight": (4, 10),
            "layers.10.k_proj.weight": (4, 10),
        }
        indices = {name: [0, 1] for name in shapes if name != "layers.10.k_proj.weight"}
        return Mask.from_indices(indices | {"layers.1.v_proj.weight": list(range(10))}, shapes, model_numel=400)

    def test_rows(self):
        mask = self.mask()
        rows = mask.summary()
        assert [(row.layer, row.component, row.selected, row.numel) for row in rows] == [
            (0, "q_proj", 4, 50),
            (0, "norm", 2, 4),
            (1, "v_proj", 10, 20),
            (10, "q_proj", 2, 40),
            (None, "lm_head", 2, 100),
        ]
        assert sum(row.selected for row in rows) == mask.numel
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert rows[2].share == 10 / 20
        assert rows[2].density == 10 / 20
        assert rows[2].enrichment == pytest.approx((10 / 20) / (20 / 400))

    def test_table(self):
        lines = str(self.mask().summary()).splitlines()
        assert lines[0].split() == ["layer", "component", "selected", "of", "density", "share", "enrichment"]
        assert lines[3].split() == ["1", "v_proj", "10", "20", "50.00%", "50.00%", "10.00x"]
        assert lines[5].split() == ["-", "lm_head", "2", "100", "2.00%", "10.00%", "0.40x"]
        assert len({len(line) for line in lines}) == 1

    def test_empty(self):
        assert list(make({}).summary()) == []
        assert "enrichment" in str(make({}).summary())

    @settings(max_examples=30, deadline=None)
    @given(index_sets())
    def test_rows_add_up_to_the_mask(self, sets):
        mask = make(sets)
        rows = mask.summary()
        assert sum(row.selected for row in rows) == mask.numel
        assert sum(row.numel for row in rows) == sum(shape.numel() for shape in mask.shapes.values())
        assert all(0 < row.density <= 1 and row.enrichment >= row.density for row in rows)


class TestPlot:
    pytest.importorskip("matplotlib")

    def test_written(self, tmp_path):
        path = tmp_path / "mask.png"
        TestSummary().mask().plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        TestSummary().mask().plot(tmp_path / "mask.svg")
        svg = (tmp_path / "mask.svg").read_text()
        assert "<svg" in svg
        for text in ("q_proj", "v_proj", "lm_head", "norm", "none", "layer", "%"):
            assert f"<!-- {text}" in svg or text in svg
        TestSummary().mask().plot(str(tmp_path / "no_suffix"))
        assert (tmp_path / "no_suffix").read_bytes().startswith(b"\x89PNG")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mask.png", "mask.svg", "no_suffix"]

    def test_many_layers_and_only_layers(self, tmp_path):
        shapes = {f"layers.{number}.q_proj.weight": (10,) for number in range(130)}
        Mask.from_indices({name: [1] for name in shapes}, shapes).plot(tmp_path / "wide.png")
        one([1], name="lm_head.weight").plot(tmp_path / "none.png")
        assert (tmp_path / "wide.png").stat().st_size > 0
        assert (tmp_path / "none.png").stat().st_size > 0

    def test_refusals(self, tmp_path):
        with pytest.raises(InvalidArgumentError, match="nothing to plot"):
            make({}).plot(tmp_path / "mask.png")
        with pytest.raises(InvalidArgumentError, match=r"'xyz'.*\.png"):
            one([1]).plot(tmp_path / "mask.xyz")
        with pytest.raises(FileAccessError, match="folder"):
            one([1]).plot(tmp_path / "absent" / "mask.png")
        assert list(tmp_path.iterdir()) == []

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MissingDependencyError, match=r'pip install "safekern\[plot\]"'):
            one([1]).plot(tmp_path / "mask.png")


def test_what_is_no_name_and_no_model():
    mask = Mask.from_indices({"w": [0]}, {"w": (2, 2)})
    with pytest.raises(KeyError, match="3 is not in this mask"):
        mask[3]
    for use in (mask.check, mask.parameters):
        with pytest.raises(InvalidArgumentError, match=r"A model is a torch\.nn\.Module, got dict"):
            use({"w": torch.zeros(2, 2)})
    with pytest.raises(InvalidArgumentError, match="by must be 'cell', 'component' or 'layer', got 'name'"):
        mask.summary().table("name")


def test_a_model_is_no_larger_than_tensors_can_be():
    with pytest.raises(InvalidArgumentError, match="model_numel is 1000"):
        Mask.from_indices({"w": [0]}, {"w": (2, 2)}, model_numel=10**400)
    codes, description = Mask.from_indices({"w": [0]}, {"w": (2, 2)}).pack()
    with pytest.raises(InvalidArgumentError, match="The model's size"):
        Mask.unpack(codes, {**description, "model_numel": 2**63})


def test_a_mask_from_a_file_is_pickled(tmp_path):
    # Few of many, which files keep in codes of 16 bits.
    mask = Mask.from_indices({"w": [3, 70_000], "v": range(0, 90, 2)}, {"w": (300, 300), "v": (90,)}, meta={"a": 1})
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    for copied in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert copied == mask and copied.meta == mask.meta and copied.fingerprint == mask.fingerprint


def test_a_quantised_parameter_is_said_to_be():
    mask = Mask.from_indices({"w": [3]}, {"w": (4, 4)})
    with pytest.raises(MaskMismatchError, match=r"w: shape \(8, 1\), in the mask \(4, 4\) \(torch.uint8: quantised\)"):
        mask.resolve({"w": torch.zeros(8, 1, dtype=torch.uint8)})
