"""The miniature study: checks of the language, bootstrap intervals, a grid that is complete, resumes and repeats.

Accuracies are not tested: a model this small, trained for seconds, has learnt nothing.
"""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.common.folders import exclusive_lock
from benchmarks.common.ledger import Ledger
from benchmarks.common.statistics import Resamples, Sample, instruction_level, prompt_level, with_constraints
from benchmarks.miniature import __main__ as miniature
from benchmarks.miniature import language
from benchmarks.miniature.evaluate import examination
from benchmarks.miniature.grid import Grid, Workshop
from benchmarks.miniature.language import (
    CHECKS,
    TOPICS,
    belongs,
    draw_rows,
    draw_text,
    satisfied,
    true_constraints,
    well_formed,
)
from benchmarks.miniature.report import Report
from benchmarks.miniature.study import METHODS

TEXT = "oak hunts wolf , dark owl finds wolf . deer hides path ?"
TRUE_AND_MUTATED = {
    "mention owl .": "oak hunts wolf .",
    "avoid fern .": TEXT.replace("deer", "fern"),
    "begin with oak .": "owl hunts wolf .",
    "end with path .": TEXT.replace("path", "log"),
    "put wolf before owl .": "owl finds wolf .",
    "join dark and owl .": TEXT.replace("owl", "mossy owl"),
    "repeat wolf .": TEXT.replace("finds wolf", "finds log"),
    "use ten words .": TEXT.replace("dark ", ""),
    "use at least ten words .": TEXT.replace("dark ", ""),
    "use at most ten words .": TEXT.replace("deer", "old deer"),
    "write two sentences .": TEXT.replace(",", "."),
    "close with ? .": TEXT.replace("?", "!"),
    "no commas .": TEXT,
    "one comma .": TEXT.replace(",", "."),
}


def test_checkers_hold_on_the_text_and_fail_on_a_mutated_one():
    assert len(TRUE_AND_MUTATED) == len(CHECKS)
    for constraint, mutated in TRUE_AND_MUTATED.items():
        assert satisfied(constraint, TEXT.replace(",", ".") if constraint == "no commas ." else TEXT), constraint
        assert not satisfied(constraint, mutated), constraint
        assert not satisfied(constraint, ""), constraint
    with pytest.raises(ValueError, match="expected a wording of CHECKS"):
        satisfied("mention owl", TEXT)


def test_texts_are_well_formed_and_mutated_ones_are_not():
    rng = random.Random(0)
    for topic, other in itertools.pairwise([*TOPICS, "forest"]):
        for _ in range(50):
            text = draw_text(rng, topic)
            assert well_formed(text, topic)
            tokens = text.split()
            foreign = [TOPICS[other][0][0], *tokens[1:]]
            for broken in (tokens[:-1], 4 * tokens, tokens[::-1], foreign, []):
                assert not well_formed(" ".join(broken), topic)


def test_rows_are_true_and_splits_are_apart():
    rows = {split: draw_rows(split, "0", [1 + i % 7 for i in range(300)]) for split in language.SPLITS}
    seen: dict[str, set] = {}
    for split, members in rows.items():
        assert [len(row["constraints"]) for row in members] == [1 + i % 7 for i in range(300)]
        for row in members:
            assert all(satisfied(constraint, row["text"]) for constraint in row["constraints"])
            assert belongs(row["text"], split)
            content = " ".join([row["topic"], *sorted(row["constraints"])])
            assert len(row["constraints"]) < 2 or belongs(content, split)
        several = {(row["topic"], *sorted(row["constraints"])) for row in members if len(row["constraints"]) > 1}
        seen[split] = {row["text"] for row in members} | several
    assert all(seen[a].isdisjoint(seen[b]) for a, b in itertools.combinations(seen, 2))
    assert (
        draw_rows("dev", "0", [3, 3])[1] == draw_rows("dev", "0", [7, 3])[1]
    )  # a row depends on its index, not on other rows
    kinds = {
        next(w for w in CHECKS if language.re.fullmatch(w, c)) for row in rows["train"] for c in row["constraints"]
    }
    assert kinds == set(CHECKS)


def test_constraints_without_a_wording_are_not_drawn():
    rng = random.Random(0)
    drawn = [statement for _ in range(200) for statement in true_constraints(rng, "sea", draw_text(rng, "sea"))]
    assert "close with . ." not in drawn and len({s.split()[0] for s in drawn}) > 8


def test_flat_asks_each_constraint_of_ife():
    rows = examination("test", 6, 5)
    flat = [constraint for row in rows["IFE"] for constraint in row["constraints"]]
    assert [row["constraints"] for row in rows["Flat"]] == [[constraint] for constraint in flat]
    assert [len(row["constraints"]) for row in rows["Dense"]] == [3, 4, 5, 6, 7]


def test_levels_are_read_from_verdicts():
    verdicts = [["11", "0", "101"], ["10", "1", "111"]]
    assert instruction_level(verdicts).by_seed.tolist() == [4 / 6, 5 / 6]
    assert prompt_level(verdicts).accuracy == 3 / 6
    assert prompt_level(verdicts).standard_error == pytest.approx(1 / 6)
    assert with_constraints(verdicts, 3) == [["101"], ["111"]]


def test_bootstrap_of_constructed_data():
    rng = np.random.default_rng(1)
    hits, totals = rng.integers(0, 2, (3, 40)), np.full(40, 2)
    drawn = Resamples.draw(500, 3, 40)
    one, better = Sample(hits, totals), Sample(hits + 1, totals)
    assert drawn.interval(one, one) == (0.0, 0.0)
    assert drawn.interval(better, one) == pytest.approx((0.5, 0.5))  # paired: the same on every prompt
    low, high = drawn.interval(better)
    assert low < better.accuracy < high
    base = Sample(hits[:1], totals)  # counts as every seed's
    assert drawn.interval(base, Sample(hits[[0, 0, 0]], totals)) == pytest.approx((0.0, 0.0))


def test_bootstrap_has_the_distribution_of_all_resamples():
    """Two seeds and three prompts have 4 * 27 equally likely resamples."""
    sample = Sample(np.array([[0, 1, 2], [2, 1, 3]]), np.array([2, 1, 3]))
    exact = [
        sum(sample.hits[s, p] for s in seeds for p in prompts) / (2 * sum(sample.totals[p] for p in prompts))
        for seeds in itertools.product(range(2), repeat=2)
        for prompts in itertools.product(range(3), repeat=3)
    ]
    drawn = Resamples.draw(20_000, 2, 3)
    assert drawn.accuracies(sample).mean() == pytest.approx(np.mean(exact), abs=5e-3)
    assert drawn.accuracies(sample).std() == pytest.approx(np.std(exact), rel=0.02)
    assert drawn.interval(sample) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=5e-3)


def test_a_line_half_written_is_written_again(tmp_path):
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(file)
    ledger.add({"key": "a"})
    ledger.add({"key": "b"})
    complete = file.read_bytes()
    file.write_bytes(complete[:-4])
    again = Ledger(file)
    assert set(again.records) == {"a"}
    again.add({"key": "b"})
    assert file.read_bytes() == complete
    with pytest.raises(ValueError, match="a second record b"):
        again.add({"key": "b"})


def test_the_learning_rate_best_on_dev_is_chosen(tmp_path):
    """The score is the mean over seeds and both sets; of equal scores the smallest rate wins; the test split does not count.

    Costs are those of the quickest run.
    """
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    study = replace(miniature.SMOKE, learning_rates=rates, seeds=2, methods={"mix": ("SFT",)})
    grid = Grid(Workshop(study, tmp_path, "cpu"), Ledger(tmp_path / "ledger.jsonl"), 1, print)

    def add(run, split, few, dense, seconds=0):
        sets = {
            name: {"verdicts": v, "malformed": "0" * len(v), "mass": 0.5}
            for name, v in (("IFE", few), ("Dense", dense))
        }
        sets["Flat"] = sets["IFE"]
        grid.ledger.add(
            {"key": grid.workshop.key(run, split), "sets": sets, "work": {"seconds": seconds, "tokens": 10}}
        )

    [runs] = study.groups().values()
    dev = {
        1e-3: ("000", "11", "111", "00"),
        2e-3: ("110", "11", "111", "10"),
        4e-3: ("111", "10", "110", "11"),
        8e-3: ("111", "00", "110", "10"),
    }  # verdicts on IFE and Dense of seed 0, then of seed 1
    for i, run in enumerate(runs):
        few, dense = dev[run.learning_rate][2 * run.seed :][:2]
        add(run, "dev", [few], [dense], 9 - i)
        add(run, "test", ["111" if run.learning_rate == 8e-3 else "000"], ["00"])
    for split, few in (("dev", "111"), ("test", "110")):
        add(None, split, [few], ["00"])
    scores = grid.dev_scores(runs)
    assert scores == pytest.approx({1e-3: 1 / 2, 2e-3: 19 / 24, 4e-3: 19 / 24, 8e-3: 13 / 24})
    assert [(run.learning_rate, run.seed) for run in grid.chosen(runs)] == [(2e-3, 0), (2e-3, 1)]

    report = Report(grid)
    [choices] = [rows for title, _, rows in report.tables() if title.startswith("Mean of dev")]
    assert choices == [["base", "50.0", "", "", "", ""], ["SFT", "", "50.0", "79.2", "79.2", "54.2"]]
    assert [rows for _, _, rows in report.costs()] == [[["SFT", "2.0", "200000"]]]


def command(folder, *more):
    arguments = ["--smoke", "--workers", 1, "--folder", folder, "--markdown", folder.with_suffix(".md")]
    miniature.main([*map(str, arguments), *map(str, more)])
    return folder.with_suffix(".md").read_text().split("### Seconds")[0]


def records(folder):
    """The ledger's records without their seconds."""
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for record in lines:
        record.get("work", {}).pop("seconds", None)
    return lines


def runs_in(records, split):
    return [(r["method"], r["learning_rate"], r["seed"]) for r in records if r["split"] == split and "method" in r]


def test_every_method_is_trained_and_examined_once(tmp_path):
    command(tmp_path / "all", "--json", tmp_path / "numbers.json")
    ledger = records(tmp_path / "all")
    expected = [(method, 1.5e-3, 0) for method in METHODS]
    assert runs_in(ledger, "dev") == runs_in(ledger, "test") == expected  # one learning rate: each run is chosen
    assert len(ledger) == 2 * (len(METHODS) + 1) == len({record["key"] for record in ledger})
    assert not list((tmp_path / "all").glob("run-*"))
    numbers = json.loads((tmp_path / "numbers.json").read_text())["mixes"]["mix"]
    assert set(numbers) == {"base", *METHODS}
    assert numbers["SFT"]["difference_to_sft"]["IFE I"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert all(0 < mass < 1 for figures in numbers.values() for mass in figures["mass"]["Dense"])
    tokens = {method: sum(work["tokens"] for work in figures["work"]) for method, figures in numbers.items()}
    assert tokens["SFT, twice the epochs"] == 2 * tokens["SFT"] < 2 * tokens["MISO-para"]
    assert tokens["SFT"] == tokens["MISO-succ"] <= tokens["para_prob 1/4"] <= tokens["MISO-para"] < tokens["no MISO"]


def test_a_killed_study_resumes_to_the_same_tables(tmp_path, monkeypatch):
    """A run that was killed, and a second run from the beginning, give the same ledger and the same tables bit for bit."""
    study = replace(miniature.SMOKE, learning_rates=(1e-3, 3e-3), seeds=2, methods={"mix": ("SFT", "MISO-para")})
    monkeypatch.setattr(miniature, "SMOKE", study)
    text = command(tmp_path / "complete")
    ledger = records(tmp_path / "complete")
    every = [(method, rate, seed) for method in ("SFT", "MISO-para") for rate in (1e-3, 3e-3) for seed in (0, 1)]
    assert runs_in(ledger, "dev") == every
    assert len(runs_in(ledger, "test")) == 4 and set(runs_in(ledger, "test")) < set(every)

    add, died = Ledger.add, 4

    def dying(self, record):
        if len(self.records) == died:
            raise KeyboardInterrupt
        add(self, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ledger, "add", dying)
        command(tmp_path / "killed")
    assert records(tmp_path / "killed") == ledger[:died]
    assert command(tmp_path / "killed") == text
    assert records(tmp_path / "killed") == ledger
    assert command(tmp_path / "killed") == text  # nothing is left to do
    file = tmp_path / "killed" / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    assert command(tmp_path / "killed") == text  # fine-tuned again for its examination: its checkpoint was removed
    assert records(tmp_path / "killed") == ledger


def test_two_processes_do_not_share_a_folder(tmp_path):
    with exclusive_lock(tmp_path), pytest.raises(SystemExit, match="another run works in"):
        command(tmp_path)
