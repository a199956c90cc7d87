"""ComplexBench without a judge: rules, data, prompts, dependencies and the paper's columns."""

import json
from pathlib import Path

import pytest

from trl_miso.evaluation.complexbench import rules
from trl_miso.evaluation.complexbench.instances import Instance, Question, load_answers, load_instances
from trl_miso.evaluation.complexbench.prompts import judge_prompt, read_answer
from trl_miso.evaluation.complexbench.rules import parse_rule
from trl_miso.evaluation.complexbench.scores import COLUMNS, PAPER, Count, counts, outcomes

REAL = Path(__file__).parents[3] / "shared/data/complexbench"
EXAMPLE = REAL / "example_instance.json"

# Per rule: parts that pass, and parts that fail. The published checker agrees, except on keyword with forbidden_word, where it breaks.

NONE = []
RULES = {
    "keyword:[图书馆,a.b]": ([["在图书馆，a。b"], ["“在图书馆a.b”", "其他"]], [["图书馆"], ["图书馆a.b None"], [""], NONE]),
    "forbidden_word:[图书馆,a.b]": ([["图书", "图书馆"], ["图书馆None"], [""], NONE], [["a。b"], ["“图书馆”"]]),
    "keyword:[甲]\nforbidden_word:[乙]": ([["甲丙"]], [["甲乙"], ["丙"], NONE]),
    "match:请重新输入": ([["请重新输入"], ["请重新输入."], ["“请重新输入”"]], [["请重新输入！"], ["请 重新输入"], NONE]),
    "constraint_punc:[。,，]": ([["一，二三。"], ["“一,二.”"]], [["一；二"], [""], NONE]),
    "startswith:以下:": ([["以下：是"], ["\n`以下:`"]], [["是以下："], ["以下是"], NONE]),
    "endswith:完成": ([["已完成"], ["完成."], ["完成?"], ["“已完成”"]], [["完成！"], ["完成了"], NONE]),
    "not endswith:完成": ([["完成！"], ["None"], NONE], [["完成"], ["完成。"]]),
    "startswith:甲\nendswith:乙": ([["甲乙"], ["`甲丙乙`"]], [["甲"], ["乙甲"], NONE]),
    "length:[2,3]": ([["一二"], ["“一二三”"], ["\n一二三"]], [["一"], ["一二三四"], ["“一”二三四"], NONE]),
    "length_word:[2,3]": ([["one two"], ["“one two”"]], [["one"], ["a b c d"], NONE]),
    'Json:["a","b"]': ([['Here: {"b": 1, "a": {}} and {}']], [['{"a": 1}'], ['{"a": 1, "b": 2, "c": 3}'], ["{a: 1}"], ["]"], NONE]),
    "Json:[]": ([["{}"], ['{"a": 1}']], [["[]"], ['{"a": "}"}'], ["{"], NONE]),
    "model_keyword:[甲,乙]": ([["乙甲"]], [["甲"], ["丙", "甲乙"], NONE]),
    "model_keyword:[甲.]": ([["甲。"]], [["甲."]]),
    "model_keyword_each:[甲.]": ([["甲."], ["甲.", "", "甲。"]], [["甲。", "乙"], [""], NONE]),
    "model_keyword_num:[1,2, 甲,乙,丙]": ([["甲"], ["乙丙"]], [["甲乙丙"], ["丁"], NONE]),
    "model_keyword_num_each:[1,1,甲,乙]": ([["甲", "乙"]], [["甲", "甲乙"], ["甲", "丙"], NONE]),
    "model_keyword_num_each:[1,1,甲,乙]\nmodel_forbidden_word_each:[丙]": ([["甲", "乙"]], [["甲", "乙丙"], ["甲乙"], NONE]),
    "model_forbidden_word:[甲]": ([["乙", "甲"], NONE], [["甲"]]),
    "model_forbidden_word:[甲.]": ([["甲."]], [["甲。"]]),
    "model_forbidden_word_each:[甲.]": ([["甲"], NONE], [["乙", "甲."]]),
    "model_number_each:[2,3]": ([["一", "二"], ["一", ""]], [["一"], ["一", "二", "三", "四"], NONE]),
    "model_length:[2,3]": ([["一二"], ["“一二三”"], ["一二三", "一"]], [["一"], ["一二三四"], [""], NONE]),
    "model_length_each:[2,3]": ([["一二", "", "“一二三”"]], [["一二", "一"], NONE]),
    "model_length_word:[2,3]": ([["one two"], ["` one`two three"]], [["one"], NONE]),
    "model_length_word_each:[2,3]": ([["one two", "a b c"]], [["one two", "one"], NONE]),
    "model_startswith:第一,": ([["第一，二"]], [["二", "第一，"], NONE]),
    "model_startswith:一\n二": ([["一\n二三"]], [["一二"], NONE]),
    "model_startswith_each:场景": ([["场景1", "", "场景2"]], [["场景1", "2"], NONE]),
    "model_starts_with_list_each:[一,二]": ([["一。", "二。"], ["", "二"]], [["二", "一"], ["一"], ["一", "二", "三"], NONE]),
    "model_not_startswith:好的": ([["不好"], NONE], [["好的，"]]),
    "model_endswith:谢谢": ([["谢谢。"], ["谢谢"]], [["谢谢！"], ["“谢谢”"], NONE]),
    "model_endswith_each:;": ([["一；", "二;", "三"], ["一;"], ["“一;”", "二"]], [["一", "二；"], ["一"], NONE]),
    "model_not_endswith:谢谢": ([["谢谢！"], NONE], [["谢谢。"]]),
    "model_not_endswith_each:谢谢": ([["你好", "好"], NONE], [["好", "谢谢"]]),
    "model_startswith:甲\nmodel_endswith:乙": ([["甲乙"]], [["甲"], ["乙"], NONE]),
    "model_constraint_punc:[。]": ([["一二。"], ["一,二."], ["“一二”"]], [["一，二。"], ["一“二”；"], NONE]),
    "model_constraint_punc_each:[。]": ([["一。", "“二。”"]], [["一。", "二,"], NONE]),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules_pass_and_fail_as_published(rule):
    passes, fails = RULES[rule]
    parsed = parse_rule(rule)
    assert [parsed.holds(spans) for spans in passes] == [True] * len(passes)
    assert [parsed.holds(spans) for spans in fails] == [False] * len(fails)
    assert parsed.each == rule.partition(":")[0].endswith("_each")


def test_every_kind_of_rule_is_shown():
    shown = {line.partition(":")[0] for rule in RULES for line in rule.split("\n") if ":" in line}
    assert shown == set(rules.KINDS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("model_rhymes:[2,3]", "expected NAME:ARGUMENT with one of .*model_length"),
        ("not startswith:a", "expected NAME:ARGUMENT"),
        ("length", "expected NAME:ARGUMENT"),
        ("length:[1,2]\nkeyword:[a]", "expected NAME:ARGUMENT"),
        ("keyword:[a]\nlength:[1,2]", "expected NAME:ARGUMENT"),
        ("length:[1]", "argument cannot be read"),
        ("length:[a,2]", "argument cannot be read"),
        ('length:["1",2]', "argument cannot be read"),
        ("keyword:a", "expected a list in brackets"),
        ("model_keyword_num:[a,2,b]", "argument cannot be read"),
        ("Json:[a", "argument cannot be read"),
    ],
)
def test_rules_of_an_unknown_kind_are_refused(rule, message):
    with pytest.raises(ValueError, match=f"(?s)^Got rule .*{message}.*Fix: "):
        parse_rule(rule)


# Data


def question(number=0, rule=None, dep=(), text="?"):
    return {"point_id": number, "question": text, "question_en": f"{text}en", "rule": rule, "dep": list(dep)}


def row(main_id=0, category="And", questions=None, instruction="做。"):
    asked = [question()] if questions is None else questions
    texts = {"instruction": instruction, "instruction_en": f"{instruction}en"}
    return {"main_id": main_id, "category": category, "scoring_questions": asked} | texts


def write(file, rows):
    file.write_text(json.dumps(rows, ensure_ascii=False))
    return file


def write_lines(file, rows):
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


def test_data_are_read_in_both_languages(tmp_path):
    data = write(tmp_path / "data.json", [row(7, "Selection_2", [question(), question(1, "length:[1,2]", [0])])])
    (chinese,) = load_instances(data, "zh")
    assert (chinese.main_id, chinese.composition, chinese.instruction) == (7, ("Selection", 2), "做。")
    assert [(each.text, each.dependencies) for each in chinese.questions] == [("?", ()), ("?", (0,))]
    assert chinese.questions[0].rule is None and chinese.questions[1].rule.holds(["ab"])
    (english,) = load_instances(data, "en")
    assert (english.instruction, english.questions[0].text) == ("做。en", "?en")


BAD = {
    "no list": ({}, "without a list of instances"),
    "empty": ([], "without a list of instances"),
    "no object": (["a"], "element 0 of .* with main_id='a'"),
    "no instruction": ([{"main_id": 1}], "element 0 of .* with instruction='nothing'"),
    "twice": ([row(3), row(4), row(3)], "main_id 3 twice"),
    "category": ([row(category="Or_1")], "category 'Or_1'"),
    "no question": ([row(questions=[])], "and 0 questions"),
    "no dep": ([row(questions=[{"question": "?", "rule": None}])], "question 0 of main_id 0 with dep='nothing'"),
    "dep": (
        [row(questions=[question(dep=[1])])],
        r"question 0 of main_id 0 with dep=\[1\], but the instance has 1 questions",
    ),
    "dep that is not a number": ([row(questions=[question(dep=["0"])])], r"dep=\['0'\]"),
    "dep from the end": ([row(questions=[question(dep=[-1])])], r"dep=\[-1\]"),
    "rule": ([row(), row(5, questions=[question(rule="model_rhymes:[1,2]")])], "In question 0 of main_id 5: Got rule"),
}


@pytest.mark.parametrize(("rows", "message"), BAD.values(), ids=BAD)
def test_data_that_are_not_complexbenchs_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*[Ee]xpected .*Fix: "):
        load_instances(write(tmp_path / "data.json", rows), "zh")


def test_data_that_are_not_json_are_refused(tmp_path):
    (tmp_path / "data.json").write_text("[{")
    with pytest.raises(ValueError, match="which is not JSON.*Fix: "):
        load_instances(tmp_path / "data.json", "zh")


def test_dependencies_are_positions_and_other_point_ids_are_warned_of(tmp_path, caplog):
    asked = [question(1), question(2, dep=[0])]
    (instance,) = load_instances(write(tmp_path / "data.json", [row(questions=asked)]), "zh")
    assert instance.questions[1].dependencies == (0,)
    assert "1 instances, the first with main_id 0, have questions whose point_id is not their position" in caplog.text


def test_the_benchmarks_own_responses_are_joined_by_main_id(tmp_path):
    instances = [Instance(main_id, "做。", "And", (Question("?", None, ()),)) for main_id in (4, 2)]
    rows = [{"main_id": at, "generated": f"answer {at}"} for at in range(6)]
    file = write_lines(tmp_path / "r.jsonl", rows)
    assert load_answers(file, instances) == ["answer 4", "answer 2"]
    assert load_answers(write_lines(file, [*rows[:4], {"main_id": 4, "generated": None}]), instances) == [
        "",
        "answer 2",
    ]
    for bad, message in (
        (rows[:3], "no response in .* to main_id 4"),
        (rows[:5] + rows[:1], "line 6 .* main_id=0"),
        ([{"generated": "a"}], "main_id=None"),
        ([{"main_id": 4, "generated": ["a"]}], "a list generated"),
    ):
        with pytest.raises(ValueError, match=f"Got .*{message}.*xpected .*Fix: "):
            load_answers(write_lines(file, bad), instances)


def test_responses_of_standard_inference_are_joined_by_prompt_or_main_id_or_row(tmp_path):
    instances = [Instance(main_id, f"做{main_id}。", "And", (Question("?", None, ()),)) for main_id in (4, 2)]
    for columns in ([{"main_id": 2}, {"main_id": 4}], [{"prompt": "做2。"}, {"prompt": "做4。"}]):
        rows = [{"response": text} | each for text, each in zip("ba", columns, strict=True)]
        for order in (rows, rows[::-1]):
            assert load_answers(write_lines(tmp_path / "r.jsonl", order), instances) == ["a", "b"]
    file = write_lines(tmp_path / "r.jsonl", [{"response": "a"}, {"response": "b"}])
    assert load_answers(file, instances) == ["a", "b"]
    with pytest.raises(ValueError, match="Got 2 responses .* to 1 prompts"):
        load_answers(file, instances[:1])


def test_the_benchmarks_example_is_read():
    if not EXAMPLE.exists():
        pytest.skip("needs ComplexBench's example instance")
    (instance,) = load_instances(EXAMPLE, "zh")
    assert instance.composition == ("Selection", 2) and len(instance.questions) == 9
    assert [each.dependencies for each in instance.questions] == [(), (), *[(0,)] * 4, *[(1,)] * 3]
    assert [number for number, each in enumerate(instance.questions) if each.rule] == [4, 8]
    assert load_instances(EXAMPLE, "en")[0].instruction.startswith("Sequentially determine")
    assert len(load_answers(REAL / "llama3_8b.jsonl", [instance])) == 1


# Prompts for a judge, and its answers


ASKED = Instance(0, "指" * 6001, "And", (Question("成立吗？", None, ()),))


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("rule", [None, "model_length:[1,2]", "model_length_each:[1,2]"])
def test_the_judge_sees_as_much_as_the_published_one(rule, language):
    """The instruction's first 6,000 characters, the response's first 4,000, the question, never the rule."""
    asked = Question("成立吗？", rule and parse_rule(rule), ())
    prompt = judge_prompt(ASKED, asked, "回{0}" * 1001, language)
    assert prompt.count("指" * 6000) == 1 and "指" * 6001 not in prompt
    assert "<response>\n" + "回{0}" * 1000 + "\n</response>" in prompt
    assert prompt.endswith("<question>\n成立吗？\n</question>") and "model_" not in prompt
    assert ("<answer>" in prompt) == (rule is None) and ("||" in prompt) == bool(rule and "each" in rule)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("理由。\n<answer>是</answer>", True),
        ("Because.\n<answer> No </answer>\n", False),
        ("<answer>yes</answer> indeed <answer>yes</answer>", True),
        ("<think>maybe <answer>no</answer></think><answer>yes</answer>", True),
        ("<answer>是</answer>或<answer>否</answer>", None),
        ("<answer>不是</answer>", None),
        ("<answer>是/否</answer>", None),
        ("yes", None),
        ("<answer>yes", None),
        ("", None),
    ],
)
def test_verdicts_are_yes_or_no_or_none(answer, verdict):
    assert read_answer(Question("?", None, ()), "", answer) is verdict


@pytest.mark.parametrize(
    ("answer", "spans"),
    [
        ("题目是第一段。<extract>\n第一段\n</extract>", ["第一段"]),
        ("<extract>一 || 二||三</extract>", ["一", "二", "三"]),
        ("<extract>all</extract>", ["\n回复 "]),
        ('<extract>"All".</extract>', ["\n回复 "]),
        ("<extract>None</extract>", []),
        ("<extract>None of them</extract>", ["None of them"]),
        ("<extract>allow</extract>", ["allow"]),
        ("<extract></extract>", [""]),
        ("<extract>cut off", None),
        ("第一段", None),
        ("<extract>一</extract><extract>二</extract>", None),
        ("</extract>一<extract>", None),
    ],
)
def test_rules_check_the_extracted_parts(answer, spans):
    asked = Question("?", rules.Rule("", False, lambda parts: parts == spans), ())
    assert read_answer(asked, "\n回复 ", answer) is (None if spans is None else True)


# Dependencies and columns


def instance(main_id, category, *dependencies):
    return Instance(main_id, "", category, tuple(Question("?", None, tuple(each)) for each in dependencies))


def test_dependencies_go_one_step():
    """The second question fails, since it depends on the first; the third passes, since the second's own verdict is a pass."""
    chain = instance(1, "Chain_1", [], [0], [1], [0, 1])
    assert outcomes(chain, {(1, 0): False, (1, 1): True, (1, 2): True, (1, 3): True}) == [False, False, True, False]
    assert outcomes(chain, {(1, at): True for at in range(4)}) == [True] * 4


def test_a_question_that_depends_on_a_missing_verdict_is_open_unless_it_fails_anyway():
    chain = instance(1, "Chain_1", [], [0], [0], [0, 4], [])
    assert outcomes(chain, {(1, 1): True, (1, 2): False, (1, 3): True, (1, 4): False}) == [
        None,
        None,
        False,
        False,
        False,
    ]
    assert outcomes(chain, {}) == [None] * 5


# Instances with verdicts, such that all columns differ, and every other way to aggregate gives another share than the published one.
CONSTRUCTED = [
    (instance(0, "And", [], [], []), [True, True, False]),
    (instance(1, "Chain_1", [], [0], [1]), [False, True, True]),
    (instance(2, "Chain_2", [], []), [True, True]),
    (instance(3, "Selection_1", [], [], [], [], []), [True, True, True, True, False]),
    (instance(4, "Selection_2", [], [0], [1], [2]), [False, True, True, True]),
    (instance(5, "Selection_3", *[[]] * 7), [True] + [False] * 6),
    (instance(6, "Selection_4", []), [True]),
    (instance(7, "Selection_and_Chain_2", *[[]] * 10), [True] + [False] * 9),
    (instance(8, "Selection_and_Chain_3", *[[]] * 11), [True] * 10 + [False]),
]


def constructed():
    instances = [each for each, _ in CONSTRUCTED]
    return instances, {(each.main_id, at): value for each, verdicts in CONSTRUCTED for at, value in enumerate(verdicts)}


def test_columns_are_the_papers():
    scored = counts(*constructed())
    assert {column: (count.passed, count.questions) for column, count in scored.items()} == {
        "And 1": (2, 3),
        "Chain 1": (1, 3),
        "Chain 2": (2, 2),
        "Chain Avg.": (3, 5),
        "Selection 1": (4, 5),
        "Selection 2": (2, 4),
        "Selection ≥3": (2, 8),
        "Selection Avg.": (19, 38),
        "Selection & Chain 2": (1, 10),
        "Selection & Chain ≥3": (10, 11),
        "All Avg.": (24, 46),
    }
    unmerged = [scored[f"Selection {depth}"] for depth in ("1", "2", "≥3")]
    assert sum(each.passed for each in unmerged) / sum(each.questions for each in unmerged) == 8 / 17 != 19 / 38
    # With transitive dependencies no question of the second and the fifth instance would pass: their first question failed.
    assert scored["Chain 1"].passed == 1 and scored["Selection 2"].passed == 2


def test_unjudged_questions_make_bounds():
    instances, passed = constructed()
    del passed[4, 0], passed[3, 4]
    scored = counts(instances, passed)
    assert scored["Selection 2"] == Count(2, 2, 4) and scored["Selection 1"] == Count(4, 1, 5)
    assert scored["Selection 2"].bounds() == (50, 100) and scored["And 1"].bounds()[0] == scored["And 1"].bounds()[1]
    assert scored["All Avg."] == Count(24, 3, 46)
    assert counts(instances[:1], passed)["Chain Avg."].bounds() is None


def test_the_papers_rows_need_the_merged_average():
    """An average lies between its terms: MISO-succ's "Selection Avg." does only if Selection & Chain is among them."""
    for figures in PAPER.values():
        column = dict(zip(COLUMNS, figures, strict=True))
        own = [column[f"Selection {depth}"] for depth in ("1", "2", "≥3")]
        both = own + [column[f"Selection & Chain {depth}"] for depth in ("2", "≥3")]
        assert min(both) <= column["Selection Avg."] <= max(both)
        assert column["Chain 1"] <= column["Chain Avg."] <= column["Chain 2"]
    assert PAPER["MISO-succ"][7] < min(PAPER["MISO-succ"][4:7])
