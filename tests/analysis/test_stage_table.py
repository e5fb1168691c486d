"""The table of stages gives the same differences as the runs that it was made from."""
import json
import re
import shutil

import pytest

import report
from analysis.measures import DECREASE, LEARNING
from analysis.pair_answer import has_equal_flops
from analysis.pairs import Study
from analysis.results import read_runs
from analysis.stage_table import COLUMNS, read_stage_table, stage_table
from common.files import UserError, read_json
from report import ReportConfig
from tests.analysis.studies import RATES, write_study
from tests.analysis.test_pair_report import first_lines
from tests.analysis.test_report import make_report

MODELS = "llm", "stack", "llm-level"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A study that no test changes: it has 700 files."""
    return write_study(tmp_path_factory.mktemp("study") / "runs", models=MODELS)


@pytest.fixture(scope="module")
def table_text(runs):
    return stage_table(read_runs(runs))


@pytest.fixture
def table(table_text, tmp_path):
    path = tmp_path / "stages.csv"
    path.write_text(table_text)
    return path


def test_all_differences_are_those_of_the_runs(runs, table):
    ours, expected = (Study(stages, "stack", "llm") for stages in (read_stage_table(table), read_runs(runs)))
    assert (ours.pairs, ours.rates, ours.stages) == (expected.pairs, expected.rates, expected.stages)
    assert ours.measures.keys() == expected.measures.keys()
    assert len(ours.contrasts) == len(expected.contrasts) == 2
    compared = 0
    for contrast in expected.contrasts:
        starts, own = expected.start_losses(contrast), ours.start_losses(contrast)
        assert own == {pair: pytest.approx(starts[pair]) for pair in (1, 2, 3, 4)}
        for name in expected.measures:
            for number in (1, 2):
                for setting in (LEARNING, DECREASE, *RATES):
                    one, other = (study.difference(contrast, name, number, setting) for study in (ours, expected))
                    assert (one is None) == (other is None)
                    if one:
                        assert one.estimate.values == pytest.approx(other.estimate.values, rel=1e-8, abs=1e-8)
                        compared += 1
    assert compared > 100


def test_a_report_from_the_table_has_the_same_answer(runs, table, tmp_path):
    text = make_report(tmp_path / "one", runs=runs)
    again = make_report(tmp_path / "two", results=table)
    items = re.compile(r"24 items, | The sample of items explains \d+% of the variance between pairs\.")
    assert first_lines(again) == [items.sub("", line) for line in first_lines(text)]
    assert "## Items that flipped" in text
    assert "## Items that flipped" not in again
    tables = [page.split("## Differences between the models")[1].split("## ")[0] for page in (text, again)]
    assert tables[0] == tables[1]
    assert (tmp_path / "one/stages.csv").read_text() == (tmp_path / "two/stages.csv").read_text() == table.read_text()
    assert not (tmp_path / "two/items.jsonl").exists()


@pytest.fixture(scope="module")
def of_methods(tmp_path_factory):
    """The report on a model with three methods, a single run of each at every rate."""
    folder = tmp_path_factory.mktemp("methods")
    runs = write_study(folder / "runs", pairs=(0,), models=("llm",))
    for method, source in (("ewc", "stack"), ("finetune", "llm"), ("lora", "base")):
        for chain in (write_study(folder / method, pairs=(0,), models=(source,)) / source).glob("rate-*"):
            for path in chain.glob("m*/run.json"):
                record = read_json(path)
                path.write_text(json.dumps(record | {"settings": record["settings"] | {"method": method}}))
            shutil.copytree(chain, runs / "llm" / method / chain.name)
    for chain in (runs / "llm").glob("rate-*"):
        shutil.rmtree(chain)
    make_report(folder / "report", runs=runs)
    return folder / "report"


@pytest.fixture
def tables(of_methods, tmp_path):
    """Its stages.csv and items.jsonl, in a folder of their own."""
    (tmp_path / "tables").mkdir()
    for name in ("stages.csv", "items.jsonl"):
        shutil.copy(of_methods / name, tmp_path / "tables")
    return tmp_path / "tables"


def differences(page):
    """{method: difference to finetune, with its interval} of a report."""
    section = page.split("## Learned and forgotten: llm")[1].split("## ")[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in section.splitlines()]
    return {row[1]: row[4] for row in cells if len(row) > 4 and row[1] in ("ewc", "lora")}


def test_with_the_items_beside_it_the_table_gives_the_same_intervals(of_methods, tables, tmp_path):
    """Also after both files were put together from two reports."""
    items = tables / "items.jsonl"
    lines = items.read_text().splitlines(keepends=True)
    assert len(lines) == 3 * (1 + 2 * 3 * 3)  # three sets of items: m0, and two stages of three chains at three rates
    items.write_text("\n".join([*lines[5:], *lines[:9]]))
    expected = differences((of_methods / "report.md").read_text())
    assert all(re.fullmatch(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]", text) for text in expected.values())
    assert len(expected) == 2
    assert differences(make_report(tmp_path / "again", results=tables / "stages.csv")) == expected
    assert sorted((tmp_path / "again/items.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    items.unlink()
    make_report(tmp_path / "again", results=tables / "stages.csv")
    assert not (tmp_path / "again/items.jsonl").exists()


def test_where_the_items_of_a_stage_are_missing_means_are_compared(of_methods, tables, tmp_path):
    """The other methods keep their intervals."""
    table = (tables / "stages.csv").read_text().splitlines()
    rows = [dict(zip(COLUMNS, line.split(","))) for line in table]
    lost, = (row["checkpoint"] for row in rows if (row["method"], row["rate"], row["stage"], row["name"])
             == ("ewc", RATES[1], "m2-empd", "text"))
    items = tables / "items.jsonl"
    items.write_text("".join(line for line in items.read_text().splitlines(keepends=True)
                             if (json.loads(line)["checkpoint"], json.loads(line)["name"]) != (lost, "text")))
    expected = differences((of_methods / "report.md").read_text())
    page = make_report(tmp_path / "again", results=tables / "stages.csv")
    assert "- items.jsonl has the items of 56 of the 57 losses in the table: differences of single runs" in page
    again = differences(page)
    assert again["lora"] == expected["lora"]
    assert float(again["ewc"]) == pytest.approx(float(expected["ewc"].split(" [")[0]), abs=1e-3)


@pytest.mark.parametrize(("change", "message"), [
    (lambda row: row | {"nll": [2 * value for value in row["nll"]]},
     "has another loss of empd after m1-simp of llm than the table next to it"),
    (lambda row: row | {"tokens": [1 + value for value in row["tokens"]]}, "another number of tokens of empd after"),
    (lambda row: row | {"kl": [5 * value for value in row["kl"]]}, "has another KL of empd after m1-simp of llm than"),
    (lambda row: row | {"kl": None}, "has another KL of empd after m1-simp of llm than"),
    (lambda row: row | {"nll": row["nll"][1:]}, "an item has no tokens or no loss"),
    (lambda row: row | {"nll": ["1", *row["nll"][1:]]}, "a value is not a number of at least 0"),
    (lambda row: row | {"kl": [-1.0, *row["kl"][1:]]}, "a value is not a number of at least 0"),
    (lambda row: row | {"tokens": [0, *row["tokens"][1:]]}, "a value is not a number of at least 1"),
    (lambda row: {}, "line 1, is damaged or not the losses of items, as a report writes them (KeyError: 'tokens')")])
def test_damaged_items(tables, refusal, tmp_path, change, message):
    items = tables / "items.jsonl"
    first, *others = items.read_text().splitlines(keepends=True)
    items.write_text("".join([json.dumps(change(json.loads(first))) + "\n", *others]))
    line = refusal((ReportConfig, report.main), "--results", tables / "stages.csv", "--out", tmp_path / "out")
    assert "items.jsonl" in line
    assert message in line


def test_a_report_is_not_replaced_by_that_of_its_table(refusal, runs, tmp_path):
    make_report(tmp_path / "out", runs=runs)
    before = (tmp_path / "out/report.md").read_text()
    line = refusal((ReportConfig, report.main), "--results", tmp_path / "out/stages.csv", "--out", tmp_path / "out")
    assert "stages.csv lies in the report that it came from, which has more than its table: choose another" in line
    assert (tmp_path / "out/report.md").read_text() == before


def test_tables_of_several_machines_make_one(runs, tmp_path):
    lines = []
    for pairs in ((1, 2), (3, 4)):
        text = stage_table(read_runs(write_study(tmp_path / f"runs-{pairs[0]}", pairs=pairs)))
        lines += text.splitlines(keepends=True)[bool(lines):]
    path = tmp_path / "all.csv"
    path.write_text("".join(lines))
    found = Study(read_stage_table(path), "stack", "llm").main_difference("rise of held-out loss")
    expected = Study(read_runs(runs), "stack", "llm").main_difference("rise of held-out loss")
    assert found.estimate.values == pytest.approx(expected.estimate.values)


def test_what_cannot_be_compared_is_known_from_the_table(table):
    lines = table.read_text().splitlines(keepends=True)
    beginning = "2,stack,,0.001,42,m2-empd,,losses,text,"
    place = next(index for index, line in enumerate(lines) if line.startswith(beginning))
    row = lines[place].split(",")
    for column, value, message in (("start", "0123456789ab", "was measured from another checkpoint than m0"),
                                   ("conditions", "0123456789ab", "under other conditions, not used: digest"),
                                   ("tokens", "7", "other tokens")):
        changed = [*row]
        changed[COLUMNS.index(column)] = value
        table.write_text("".join([*lines[:place], ",".join(changed), *lines[place + 1:]]))
        study = Study(read_stage_table(table), "stack", "llm")
        assert any(message in line and "pair 2, stack" in line for line in study.left_out), column


def test_a_limit_matters_only_where_the_number_of_items_is_unknown(runs, tmp_path):
    """Also in the table, which tells a digest of the conditions; and FLOPs are told."""
    runs = shutil.copytree(runs, tmp_path / "runs")
    for path in runs.glob("pair-2/*/**/losses-*.json"):
        found = read_json(path)
        path.write_text(json.dumps(found | {"run": found["run"] | {"limit": 24}}))
    for model, flops in (("llm", 1e13), ("stack", 2e13)):
        for path in runs.glob(f"pair-*/{model}/m0/run.json"):
            path.write_text(json.dumps(read_json(path) | {"lineage": {"flops": flops}}))
    path = tmp_path / "stages.csv"
    path.write_text(stage_table(read_runs(runs)))
    for stages in (read_runs(runs), read_stage_table(path)):
        study = Study(stages, "stack", "llm")
        assert list(study.main_difference("rise of held-out loss").by_pair) == [1, 2, 3, 4]
        assert study.start_flops("stack", study.pairs) == 2e13
        assert not has_equal_flops(study, study.pairs)


def test_flops_are_equal_if_they_are_in_each_pair(runs, tmp_path):
    """Not if those of one model are larger in one pair and smaller in another."""
    runs = shutil.copytree(runs, tmp_path / "runs")
    for swapped, expected in (((), True), ((2, 4), False)):
        for path in runs.glob("pair-*/*/m0/run.json"):
            pair, model = path.parts[-4], path.parts[-3]
            larger = (model == "stack") != (int(pair.removeprefix("pair-")) in swapped)
            flops = 2e13 if swapped and larger else 1e13
            path.write_text(json.dumps(read_json(path) | {"lineage": {"flops": flops}}))
        study = Study(read_runs(runs), "stack", "llm")
        assert study.start_flops("stack", study.pairs) == study.start_flops("llm", study.pairs)
        assert has_equal_flops(study, study.pairs) == expected


def test_a_table_that_a_spreadsheet_has_saved(table):
    expected = read_stage_table(table)
    lines = table.read_text().splitlines()
    empty = "," * lines[0].count(",")
    table.write_bytes(("\ufeff" + "\r\n".join([*lines, empty, ""])).encode())
    assert [stage.name for stage in read_stage_table(table)] == [stage.name for stage in expected]
    table.write_text(table.read_text().replace(",", ";"))
    with pytest.raises(UserError, match="is not a table of stages with commas between its columns"):
        read_stage_table(table)


def test_tables_may_be_put_together(table):
    """As by `cat`, with the head of each."""
    head, *rows = table.read_text().splitlines(keepends=True)
    expected = read_stage_table(table)
    table.write_text("".join([head, *rows[:9], head, *rows]))  # some rows are in both
    assert [stage.name for stage in read_stage_table(table)] == [stage.name for stage in expected]


def test_a_kl_of_this_start_is_used(runs, table):
    for stages in (read_runs(runs), read_stage_table(table)):
        assert not any("another checkpoint" in line for line in Study(stages, "stack", "llm").left_out)


@pytest.mark.parametrize(("change", "message"), [
    (lambda lines: [lines[0].replace(",tokens,", ",words,"), *lines[1:]], "the column tokens is missing"),
    (lambda lines: [*lines, lines[-1].replace(",1.6", ",1.7")],
     r"has two rows for benchmarks quiz of stack m2-empd, pair 4: remove one"),
    (lambda lines: [lines[0], re.sub(r"(losses,\w+,,,\w+,)\d+", r"\1nan", lines[1])], "nan is not a finite number"),
    (lambda lines: [lines[0], re.sub(r"(losses,\w+,,,\w+,[\d.]+,)", r"\1-", lines[1])],
     r"loss is -\d.\d, expected 0 to"),
    (lambda lines: [lines[0], re.sub(r"(losses,\w+,,,\w+,[\d.]+,)", r"\g<1>9999999", lines[1])], "expected 0 to 1e"),
    (lambda lines: [lines[0], lines[1].replace(",m0,", ",start,")], "unknown stage 'start'"),
    (lambda lines: [line.replace(",0.003,", ",fast,") for line in lines], "could not convert string to float: 'fast'"),
    (lambda lines: [lines[0], lines[1].replace(",losses,", ",gains,")], "unknown kind 'gains'"),
    (lambda lines: [lines[0], lines[1], lines[2][:40]], r"csv, line 3, does not have the \d+ columns of the first"),
    (lambda lines: [lines[0], lines[1], lines[2].replace(",m", ",x")], "csv, line 3, is damaged or not a row of"),
    (lambda lines: lines[:1], "has no rows")])
def test_damaged_tables(table, change, message):
    table.write_text("".join(change(table.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=message):
        read_stage_table(table)
