"""Summaries, distributions, pictures and audits; the HTML page is in test_report_page.py."""

import base64
import inspect
import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_scores import moe_mask, scores

from safekern import Mask, Scores, names, plots
from safekern.distribution import Distribution
from safekern.errors import InvalidArgumentError, MaskMismatchError, MissingDependencyError, NonFiniteError
from safekern.overlap import Comparison, Overlap
from safekern.report import Audit, Ranking


class TestExperts:
    def test_fused_tensors_and_modules_count_alike(self):
        fused = moe_mask(fused=True).expert_summary()
        assert [(row.layer, row.expert, row.selected, row.numel) for row in fused] == [
            (0, 0, 0, 20),
            (0, 1, 1, 20),
            (0, 2, 2, 20),
            (1, 0, 0, 20),
            (1, 1, 2, 20),
            (1, 2, 4, 20),
        ]
        single = moe_mask(fused=False).expert_summary()
        assert [(row.layer, row.expert, row.selected, row.numel) for row in single] == [
            (row.layer, row.expert, row.selected, row.numel) for row in fused if row.selected
        ]

    def test_tensors_of_one_expert_add_up(self):
        shapes = {f"layers.0.mlp.experts.{name}": (2, 3, 2) for name in ("gate_up_proj", "down_proj")}
        mask = Mask.from_indices(
            {"layers.0.mlp.experts.gate_up_proj": [0, 6], "layers.0.mlp.experts.down_proj": [11]}, shapes
        )
        assert [(row.expert, row.selected, row.numel) for row in mask.expert_summary()] == [(0, 1, 12), (1, 2, 12)]
        assert [row.share for row in mask.expert_summary()] == pytest.approx([1 / 3, 2 / 3])

    def test_the_layer_summary_aggregates_them(self):
        for fused in (True, False):
            cells = {(row.layer, row.component): row.selected for row in moe_mask(fused).summary()}
            assert cells[1, "experts.down_proj" if fused else "experts.w1"] == 6

    def test_a_dense_model_has_none(self):
        assert not scores().top(0.1).expert_summary()
        stacked = Mask.from_indices({"blocks.0.ffn.experts.mlp.w1": [0]}, {"blocks.0.ffn.experts.mlp.w1": (12, 5)})
        assert not stacked.expert_summary()

    def test_table(self):
        assert str(moe_mask(fused=True).expert_summary()).split()[:3] == ["layer", "expert", "selected"]

    @pytest.mark.parametrize(
        ("name", "expert"),
        [
            ("module.layers.1.experts.12.w1.base_layer.weight", 12),
            ("layers.1.experts.down_proj", None),
            ("layers.1.experts", None),
            ("layers.1.shared_experts.0.weight", None),
            ("layers.1.q_proj.weight", None),
        ],
    )
    def test_number_in_a_name(self, name, expert):
        assert names.expert(name) == expert

    def test_a_number_of_thousands_of_digits_is_just_a_name(self):
        assert names.layer(f"layers.{'9' * 5000}.weight") is None


class TestSummaryTables:
    def test_merged_by_component_and_layer(self):
        mask = scores().top(0.2)
        for by in ("component", "layer"):
            lines = mask.summary().table(by).records()
            keys = [line[by] for line in lines]
            assert keys == (["q_proj", "up_proj", "lm_head"] if by == "component" else [0, 1, 2, None])
            for line in lines:
                parts = [name for name in mask if getattr(names, by)(name) == line[by]]
                assert line["selected"] == sum(mask[name].numel() for name in parts)
                assert line["numel"] == sum(mask.shapes[name].numel() for name in parts)
                assert line["density"] == line["selected"] / line["numel"]
                assert line["enrichment"] == pytest.approx(line["density"] / mask.density)
            assert sum(line["share"] for line in lines) == pytest.approx(1)

    def test_nothing_selected(self):
        empty = Mask.from_indices({}, {"w": (4,)}).summary()
        assert empty.table("component").records() == empty.table("layer").records() == []

    def test_heat_map_has_a_row_per_component_and_a_column_per_layer(self):
        shapes = {f"layers.{i}.self_attn.{kind}_proj.weight": (10, 10) for i in range(3) for kind in "qv"}
        indices = {
            "layers.0.self_attn.q_proj.weight": range(50),
            "layers.2.self_attn.q_proj.weight": range(13),
            "layers.1.self_attn.v_proj.weight": range(1),
        }
        shown = Mask.from_indices({name: list(r) for name, r in indices.items()}, shapes).summary().heat_map()
        assert shown.splitlines() == [
            "        layer 0 to 2",
            "q_proj  █ ▒           98.4% of the mask, 31.50% of its weights",
            "v_proj   ░            1.6% of the mask, 1.00% of its weights",
        ]
        outside = Mask.from_indices({"lm_head.weight": [0]}, {"lm_head.weight": (2, 2)}).summary().heat_map()
        assert "lm_head" in outside
        assert Mask.from_indices({}, {"w": (4,)}).summary().heat_map() == ""

    def test_heat_map_adds_up_the_experts_of_a_layer(self):
        shapes = {f"layers.{i}.mlp.experts.down_proj": (2, 2, 2) for i in range(2)}
        # In layer 0 all of the first expert and nothing of the last.
        mask = Mask.from_indices({name: [0, 1, 2, 3] if "0" in name else [7] for name in shapes}, shapes)
        for summary in (mask.summary(), mask.expert_summary()):
            _, line = summary.heat_map().splitlines()
            assert "  █░ " in line and line.endswith("100.0% of the mask, 31.25% of its weights")


class TestDistribution:
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=50),
        st.floats(0, 1),
    )
    def test_quantiles_are_within_half_a_percent(self, values, q):
        seen = Distribution()
        seen.add(torch.tensor(values))
        exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
        assert seen.quantile(q) == pytest.approx(exact, rel=0.004, abs=0)
        assert (seen.numel, seen.smallest, seen.largest) == (len(values), min(values), max(values))
        assert seen.total == pytest.approx(math.fsum(values))

    def test_in_parts_and_merged(self, monkeypatch):
        values = torch.rand(1001, generator=torch.Generator().manual_seed(0)) ** 9
        whole, left, right = Distribution(), Distribution(), Distribution()
        whole.add(values)
        monkeypatch.setattr("safekern.distribution._CHUNK", 64)
        left.add(values[:300])
        right.add(values[300:].view(-1, 1))
        left.merge(right)
        edges = np.logspace(-20, 0, 30)
        assert (left.numel, left.smallest, left.largest) == (whole.numel, whole.smallest, whole.largest)
        assert left.total == pytest.approx(whole.total)
        assert (left.histogram(edges) == whole.histogram(edges)).all()
        assert whole.histogram(edges).sum() == int((values > 1e-20).sum())

    def test_zeros_are_counted_apart(self):
        seen = Distribution()
        seen.add(torch.tensor([0.0, -0.0, 1e-45, 1.0]).abs())
        assert seen.zeros == 3
        assert seen.quantile(0.5) == 0.0

    def test_nothing(self):
        seen = Distribution()
        seen.add(torch.empty(0, 3))
        assert (seen.numel, seen.total, seen.quantile(0.5), seen.largest) == (0, 0.0, 0.0, 0.0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_refuses_what_is_not_finite(self, value):
        with pytest.raises(NonFiniteError):
            Distribution().add(torch.tensor([1.0, value]))


class TestScoresReport:
    def test_rows(self, poisoned_memory):
        ranked = scores()
        report = ranked.report()
        total = sum(ranked[name].double().sum().item() for name in ranked)
        assert [(row.layer, row.component) for row in report] == [
            *((layer, part) for layer in range(3) for part in ("q_proj", "up_proj")),
            (None, "lm_head"),
        ]
        for row, name in zip(report, ranked, strict=True):
            values = ranked[name].flatten().double()
            assert row.numel == values.numel()
            assert row.share == pytest.approx(values.sum().item() / total)
            assert row.largest == values.max().item()
            assert row.sigma == pytest.approx(ranked.sigma[name].item())
            for shown, q in ((row.median, 0.5), (row.p90, 0.9), (row.p99, 0.99)):
                exact = torch.quantile(values, q, interpolation="higher").item()
                near = torch.quantile(values, q, interpolation="lower").item()
                assert near * 0.996 <= shown <= exact * 1.004
        assert report.distribution.numel == ranked.numel
        assert report.distribution.total == pytest.approx(total)

    def test_merged_tables(self):
        ranked = scores()
        lines = ranked.report().table("component").records()
        assert [line["component"] for line in lines] == ["q_proj", "up_proj", "lm_head"]
        assert sum(line["share"] for line in lines) == pytest.approx(1)
        q = [name for name in ranked if "q_proj" in name]
        assert lines[0]["numel"] == 3 * 77
        assert lines[0]["largest"] == max(ranked[name].max().item() for name in q)
        variance = sum(ranked.sigma[name].item() ** 2 for name in q) / 3
        assert lines[0]["sigma"] == pytest.approx(math.sqrt(variance))
        assert [line["layer"] for line in ranked.report().table("layer").records()] == [0, 1, 2, None]
        assert str(ranked.report()).splitlines()[0].split()[:3] == ["layer", "component", "weights"]

    def test_one_pass_in_parts_changes_nothing(self, monkeypatch):
        whole = scores().report()
        monkeypatch.setattr("safekern.scores._PART", 10)
        parts = scores().report()
        assert [(row.numel, row.median, row.largest) for row in parts] == [
            (row.numel, row.median, row.largest) for row in whole
        ]

    def test_all_zero(self):
        ranked = Scores({"w": torch.zeros(3, 2)}, {"w": torch.tensor(0.0)}, num_batches=1, model_numel=6, meta={})
        row = ranked.report()[0]
        assert (row.share, row.median, row.largest) == (0.0, 0.0, 0.0)

    def test_nan_names_the_parameter(self):
        broken = {"model.layers.1.mlp.up_proj.weight": torch.full((13, 7), math.nan)}
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj"):
            scores(**broken).report()

    def test_selected(self):
        ranked = scores()
        mask = ranked.top(0.1)
        values = torch.cat([ranked[name].flatten()[mask[name]] for name in mask])
        found = ranked.selected(mask)
        assert (found.numel, found.smallest, found.largest) == (100, values.min().item(), values.max().item())
        wrapped = Mask.from_indices(
            {f"module.{n}": mask[n] for n in mask}, {f"module.{n}": s for n, s in mask.shapes.items()}
        )
        assert ranked.selected(wrapped).total == found.total
        with pytest.raises(MaskMismatchError):
            ranked.selected(Mask.from_indices({"absent": [0]}, {"absent": (2,)}))


class TestComparison:
    def test_counts_and_chance(self):
        a, b = scores(0).top(0.1), scores(1).top(0.2)
        found = Comparison(a, b)
        assert not found.equal
        assert found.total.jaccard == a.jaccard(b)
        assert (found.total.a, found.total.b, found.total.shared) == (100, 200, (a & b).numel)
        for part in ("component", "layer"):
            cells = found.by(part).values()
            for field in ("a", "b", "shared", "numel"):
                assert sum(getattr(cell, field) for cell in cells) == getattr(found.total, field)

    def test_expected_is_what_random_masks_have(self):
        ranked = scores()
        pairs = [(ranked.random(0.1, seed=2 * i), ranked.random(0.2, seed=2 * i + 1)) for i in range(60)]
        mean = sum(a.jaccard(b) for a, b in pairs) / len(pairs)
        found = Comparison(*pairs[0]).total
        assert found.numel == ranked.numel
        assert found.expected_jaccard == pytest.approx(mean, rel=0.06)

    def test_equal_and_empty(self):
        mask = scores().top(0.1)
        assert Comparison(mask, mask).equal
        assert Comparison(mask, mask).total.jaccard == 1.0
        empty = Mask.from_indices({}, {})
        assert Comparison(empty, empty).total == Overlap()
        assert Comparison(empty, empty).total.jaccard == Comparison(empty, empty).total.expected_jaccard == 1.0
        assert Comparison(empty, mask).total.jaccard == 0.0

    def test_wrapped_names_are_the_same(self):
        mask = scores().top(0.1)
        wrapped = Mask.from_indices(
            {f"_orig_mod.{name}": mask[name] for name in mask},
            {f"_orig_mod.{name}": shape for name, shape in mask.shapes.items()},
            model_numel=mask.model_numel,
        )
        assert Comparison(mask, wrapped).equal

    def test_another_model(self):
        with pytest.raises(MaskMismatchError, match="shape"):
            Comparison(Mask.from_indices({"w": [0]}, {"w": (2, 2)}), Mask.from_indices({"w": [0]}, {"w": (4,)}))

    def test_models_of_other_sizes(self):
        plain = Mask.from_indices({"w": [0]}, {"w": (4,)}, model_numel=4)
        # PEFT's adapters are weights of the model, too.
        adapted = Mask.from_indices({"base_model.model.w": [0]}, {"base_model.model.w": (4,)}, model_numel=9)
        assert Comparison(plain, adapted).equal
        other = Mask.from_indices({"w": [0], "v": [1]}, {"w": (4,), "v": (5,)}, model_numel=9)
        with pytest.raises(MaskMismatchError, match="of different models, of 4 and 9 weights"):
            Comparison(plain, other)


class TestAudit:
    def audit(self, mask, ranked=None, compare=()):
        ranking = Ranking.of(mask, ranked) if ranked else None
        return Audit(mask, [], ranking, {f"other{i}": Comparison(mask, other) for i, other in enumerate(compare)})

    def test_the_exact_top_is_recognised(self):
        ranked = scores()
        for ratio in (0.0001, 0.01, 0.1, 0.5, 1.0):
            mask = ranked.top(ratio)
            assert self.audit(mask, ranked).checks()[-2].holds is True
        for mask in (ranked.bottom(0.1), ranked.random(0.1), ranked.top(0.1, per="tensor"), scores(1).top(0.1)):
            assert self.audit(mask, ranked).checks()[-2].holds is False

    def test_share_of_the_impact(self):
        ranked = scores()
        everything = self.audit(ranked.top(1.0), ranked).ranking
        top = self.audit(ranked.top(0.1), ranked).ranking
        assert everything.share == pytest.approx(1)
        assert ranked.top(0.1).numel / ranked.numel < top.share < 1

    def test_a_ratio_that_is_not_the_files(self):
        mask = scores().top(0.1)
        assert [check.holds for check in self.audit(mask).checks()] == [True, True, None, None]
        for ratio, holds in ((0.2, False), (0.1, True)):
            said = Mask.from_indices(
                dict(mask.items()), mask.shapes, model_numel=1000, meta={"ratio": ratio, "per": "model"}
            )
            assert self.audit(said).checks()[1].holds is holds
        assert self.audit(scores().top(1.0)).checks()[1].holds is True
        for odd in (
            {"ratio": "0.1", "per": "model"},
            {"ratio": 0.3, "per": "tensor"},
            {"ratio": True, "per": "model"},
            {},
        ):
            said = Mask.from_indices(dict(mask.items()), mask.shapes, model_numel=1000, meta=odd)
            assert len(self.audit(said).checks()) == 3

    @pytest.mark.parametrize(
        ("counts", "core"),
        [
            ({0: 1, 1: 1, 2: 1, 3: 1}, (0, 1, 0.5)),
            ({0: 1, 1: 0, 2: 5, 3: 3}, (2, 2, 5 / 9)),
            ({3: 4}, (3, 3, 1.0)),
            ({0: 4, 5: 1, 6: 3, 7: 2}, (6, 7, 0.5)),
            ({}, None),
        ],
    )
    def test_core(self, counts, core):
        shapes = {f"layers.{layer}.q_proj.weight": (10,) for layer in counts}
        indices = {f"layers.{layer}.q_proj.weight": list(range(count)) for layer, count in counts.items()}
        assert self.audit(Mask.from_indices(indices, shapes)).core() == core

    def test_json(self):
        ranked = scores()
        found = self.audit(ranked.top(0.1), ranked, [scores(1).top(0.1)]).to_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["scores"]["is_exact_top"]
        assert found["compared"][0]["components"]


class TestPictures:
    pytest.importorskip("matplotlib")

    HOSTILE = "layers.0.<script>$\\frac{$\x00\ud800\u202e名" + "x" * 500 + ".weight"

    def test_matplotlib_is_imported_only_to_draw(self):
        code = "import sys, safekern.cli, safekern.report_page; assert 'matplotlib' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert "pyplot" not in inspect.getsource(plots)

    def svg(self, figure):
        uri = plots.data_uri(figure)
        head, _, content = uri.partition(",")
        assert head == "data:image/svg+xml;base64"
        text = base64.b64decode(content).decode()
        ElementTree.fromstring(text)
        return text

    @pytest.mark.parametrize("theme", [plots.LIGHT, plots.DARK])
    def test_each_is_well_formed_and_has_its_labels(self, theme):
        ranked = scores()
        mask, experts = ranked.top(0.1), moe_mask(fused=True)
        ranking = Ranking.of(mask, ranked)
        rows = {"other_mask": [("q_proj", 0.5, 0.01), ("up_proj", 0.1, 0.01)], "third": [("lm_head", 1.0, 0.2)]}
        for figure, labels in (
            (plots.component_map(mask.summary(), theme), ("q_proj", "lm_head", "none", "layer")),
            (plots.expert_map(experts.expert_summary(), theme), ("expert", "layer")),
            (plots.mask_figure(experts, theme), ("expert", "experts.down_proj")),
            (
                plots.esi_histogram(ranking.report.distribution, ranking.selected, ranking.selected.smallest, theme),
                ("all scored", "smallest selected"),
            ),
            (plots.overlap(rows, theme), ("other_mask", "third", "lm_head", "by chance")),
        ):
            text = self.svg(figure)
            assert theme.background in text
            for label in labels:
                assert label in text

    def test_the_same_content_gives_the_same_bytes(self):
        mask = scores().top(0.1)
        first, second = (plots.data_uri(plots.component_map(mask.summary())) for _ in range(2))
        assert first == second

    def test_names_that_would_break_a_picture(self):
        mask = Mask.from_indices({self.HOSTILE: [0]}, {self.HOSTILE: (2, 2)})
        self.svg(plots.mask_figure(mask))
        self.svg(plots.overlap({self.HOSTILE: [(self.HOSTILE, 0.5, 0.1)]}))

    def test_many_of_everything(self):
        shapes = {f"layers.{i}.part{i % 90}.weight": (10,) for i in range(180)}
        wide = Mask.from_indices({name: [1] for name in shapes}, shapes)
        assert self.svg(plots.component_map(wide.summary())).count("part") >= 40
        shapes = {f"layers.{i}.mlp.experts.down_proj": (128, 2, 2) for i in range(40)}
        large = Mask.from_indices({name: list(range(0, 512, 3)) for name in shapes}, shapes)
        # Stored as pixels: a path for each of the cells would take a megabyte.
        assert len(self.svg(plots.expert_map(large.expert_summary()))) < 300_000
        many = {f"mask{i}": [("q_proj", i / 10, 0.01)] for i in range(9)}
        self.svg(plots.overlap(many))

    def test_one_value_and_many_zeros(self):
        one, most_zero = Distribution(), Distribution()
        one.add(torch.full((5,), 0.25))
        most_zero.add(torch.cat([torch.zeros(100_000), torch.ones(1)]))
        for every in (one, most_zero):
            self.svg(plots.esi_histogram(every, one, 0.25))

    def test_plot_draws_the_experts_too(self, tmp_path):
        moe_mask(fused=True).plot(tmp_path / "moe.svg")
        scores().top(0.1).plot(tmp_path / "dense.svg")
        assert "<!-- expert -->" in (tmp_path / "moe.svg").read_text()
        assert "<!-- expert -->" not in (tmp_path / "dense.svg").read_text()

    def test_nothing_to_draw(self):
        with pytest.raises(InvalidArgumentError, match="nothing to plot"):
            plots.mask_figure(Mask.from_indices({}, {}))

    def test_without_matplotlib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(MissingDependencyError, match=r"safekern\[plot\]"):
            plots.component_map(scores().top(0.1).summary())
