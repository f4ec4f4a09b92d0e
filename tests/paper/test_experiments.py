"""Tables and figures as lists of experiments: what each row runs, and which number of the paper stands beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rella.backbones import BACKBONES
from rella.cli import resolve
from rella.errors import InputError
from rella.paper.experiments import MADE, Maker, Run, exhibits, paper_scale
from rella.paper.numbers import numbers
from rella.report_config import EXHIBITS, ReportConfig, check_report, chosen_exhibits


def maker(dataset: str = "ml-1m", model: str = "vicuna-13b", **values: object) -> Maker:
    resolved = resolve({"dataset": dataset, "model": model, **values})
    scale = paper_scale(dataset)
    return Maker(resolved.experiment, scale if scale.backbones else replace(scale, backbones=(model,)))


def line(name: str, title: str, group: str = "", **kind: str):
    (exhibit,) = exhibits([name], maker(**kind))
    (found,) = [one for one in exhibit.lines if one.title == title and one.group == group]
    return found


def test_every_number_of_tables_2_to_8_stands_beside_a_run_on_movielens_1m() -> None:
    made = {e.name: e for e in exhibits(MADE, maker())}
    beside = {
        name: [p for one in made[name].lines for p in one.paper if p is not None] for name in made if "table" in name
    }
    known = numbers()
    assert len(beside["table2"]) == sum(map(len, known["table2"]["ml-1m"].values()))
    assert len(beside["table3"]) == len(known["table3"]["ml-1m"])
    assert len(beside["table4"]) == sum(map(len, known["table4"].values()))
    assert len(beside["table5"]) == sum(map(len, known["table5"].values()))
    for name in ("table7", "table8"):
        assert len(beside[name]) == sum(map(len, known[name].values()))


@pytest.mark.parametrize("dataset", ["bookcrossing", "ml-25m"])
def test_tables_2_and_3_on_the_other_data_sets(dataset: str) -> None:
    two, three = exhibits(["table2", "table3"], maker(dataset))
    assert sum(one.paper[0] is not None for one in two.lines) == sum(map(len, numbers()["table2"][dataset].values()))
    assert [one.paper[0].auc for one in three.lines] == [row[0] for row in numbers()["table3"][dataset].values()]


def test_the_paper_s_values_of_the_runs() -> None:
    sim = line("table2", "SIM", "Full-shot").runs[0]
    assert sim.baseline
    assert (sim.experiment.baseline.model, sim.experiment.shots, sim.experiment.k) == ("sim", "all", 30)
    few = line("table2", "ReLLa (<10%, N = 65,536)", "Few-shot").runs[0].experiment
    assert (few.shots, few.mix, few.history, few.adapter) == (65_536, "mixed", "retrieved", "auto")
    base = line("table2", "Vicuna-13B", "Zero-shot").runs[0].experiment
    assert (base.adapter, base.history) == ("none", "recent")
    zero = line("table2", "ReLLa (Ours)", "Zero-shot").runs[0].experiment
    assert (zero.adapter, zero.history) == ("none", "retrieved")
    half = line("table3", "ReLLa (½N-shot)").runs[0].experiment
    assert half.shots == 4096
    p5 = line("table2", "P5", "Full-shot").runs[0].experiment
    assert (p5.textctr.base, p5.textctr.batch_size) == ("t5-base", 32)
    mistral = line("table5", "with ReiT (<1%, N = 8,192)", "Mistral-7B").runs[0].experiment
    assert (mistral.model, mistral.shots) == ("mistral-7b", 8192)
    assert line("table7", "64", "Zero-shot").runs[0].experiment.pca_dim == 64
    assert line("table8", "L1", "Few-shot, N = 8,192").runs[0].experiment.distance == "l1"


def test_curves_over_k_and_n() -> None:
    six, seven = exhibits(["figure6", "figure7"], maker())
    assert six.x == (5, 10, 15, 20, 25, 30)
    assert seven.x == (512, 1024, 2048, 4096, 8192, 65536)
    for one in six.lines:
        assert [run.experiment.k for run in one.runs] == list(six.x)
    for one in seven.lines:
        assert [run.experiment.shots for run in one.runs] == list(seven.x)
    assert seven.level is not None
    assert seven.level.runs[0].experiment.shots == "all"
    # Where the paper prints the number in a table.
    assert seven.lines[1].paper[-2:] == (0.7352, 0.7414)
    assert six.lines[1].paper == tuple(numbers()["table4"]["Vicuna-13B"])


def test_the_largest_backbone_is_scored_on_the_rows_of_the_paper_unless_the_user_says() -> None:
    (four,) = exhibits(["table4"], maker())
    last = four.lines[-1].runs[0].experiment
    assert (last.model, last.test_rows) == ("llama-2-70b-chat", 10_000)
    base = resolve({"dataset": "ml-1m", "model": "vicuna-13b", "test_rows": 500}).experiment
    (four,) = exhibits(["table4"], Maker(base, paper_scale("ml-1m"), frozenset({"test_rows"})))
    assert four.lines[-1].runs[0].experiment.test_rows == 500


def test_one_run_serves_all_tables_that_show_it() -> None:
    made = exhibits(MADE, maker())
    everything = [run for e in made for run in e.runs()]
    assert len(set(everything)) < len(everything) - 20
    ours = line("table2", "ReLLa (<1%, N = 8,192)", "Few-shot").runs[0]
    # Table 7's row of 512 dimensions is the same artifact by its key: there `auto` is resolved.
    for name in ("table3", "table5", "table8", "figure6", "figure7"):
        (exhibit,) = exhibits([name], maker())
        assert ours in list(exhibit.runs()), name


def test_seeds_are_runs_of_their_own_but_for_zero_shot() -> None:
    made = maker(seeds=3, seed=5)
    assert [r.experiment.seed for r in made.few(512).by_seed()] == [5, 6, 7]
    assert len(made.fitted("din").by_seed()) == 3
    assert len(made.zero("vicuna-13b", "recent").by_seed()) == 1


def test_a_small_scale_has_every_row_too() -> None:
    names = [f"backbone{n}" for n in range(4)]
    base = resolve({}).experiment
    made = exhibits(MADE, Maker(base, replace(paper_scale("sample"), backbones=(*names, "tiny"))))
    assert [len(e.lines) for e in made if e.name in ("table2", "table3", "table4", "table8")] == [15, 6, 5, 6]
    assert not any(p for e in made for one in e.lines for p in one.paper), "the paper knows nothing of `sample`"


def test_an_adapter_from_elsewhere_is_refused() -> None:
    with pytest.raises(InputError, match="a report tunes its adapters"):
        Maker(replace(resolve({}).experiment, adapter="/some/where"), paper_scale("sample"))


def test_names_of_tables_and_figures() -> None:
    assert chosen_exhibits(ReportConfig()) == EXHIBITS
    assert chosen_exhibits(ReportConfig(what=("figure7", "Table 2"))) == ("table2", "figure7")
    with pytest.raises(InputError, match="unknown table10; there are table1"):
        chosen_exhibits(ReportConfig(what=("table10",)))


def test_the_paper_s_backbones_are_known_ones() -> None:
    assert set(paper_scale("ml-1m").backbones) == set(BACKBONES)
    assert isinstance(maker().zero("falcon-7b", "recent"), Run)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"few": (1, 2, 3)}, "--report.few \\[1, 2, 3\\]: takes one or two values"),
        ({"few": ()}, "--report.few"),
        ({"lengths": ()}, "--report.lengths \\[\\]: takes a list of at least one value"),
        ({"curve": (0, 5)}, "numbers above 0"),
        ({"text_bases": ("a", "b", "c")}, "--report.text-bases"),
    ],
)
def test_lists_that_make_no_table_are_refused(values: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_report(ReportConfig(**values))


def test_one_few_shot_setting_is_enough() -> None:
    scale = replace(paper_scale("sample"), few=(64,), backbones=("tiny",))
    made = exhibits(MADE, Maker(resolve({}).experiment, scale))
    assert {r.experiment.shots for e in made if e.name == "table3" for r in e.runs()} == {64, 32}
