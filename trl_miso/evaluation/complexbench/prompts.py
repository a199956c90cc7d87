"""Prompts for a judge, and how its answers are read. The criteria are the benchmark's, the wording is this package's."""

import re

from trl_miso.evaluation.complexbench.instances import Instance, Question

# Characters of an instruction and of a response that the published judge sees.
_INSTRUCTION_LIMIT, _RESPONSE_LIMIT = 6000, 4000

_VERDICT = {
    "zh": """\
下面有一条指令、一个模型对它的回复，以及关于这个回复的一个问题。请你当评审，判断问题所问的这一点是否成立。

- 只看所问的这一点；回复是否做到了指令的其他要求，与答案无关。
- 这一点要完全做到。只做到一大半、只在部分情况下做到、有差错或含糊之处，以及回复中没有可以据以判断的内容，都答“否”。
- 问题说到“每个”“都”“所有”时，其中一个没有做到就答“否”。
- 问是否分点时，有项目符号或编号才算；“首先”“其次”这样的词不算。
- 问是否使用某种语言时，只要混入别的语言的词就不算，除非指令要求使用多种语言。
- 问是否正确判断了某个条件时，看回复走的是不是指令为该条件规定的那一支：走对了就答“是”，走错了就答“否”。

先简短说明理由，再在最后一行写 <answer>是</answer> 或 <answer>否</answer>。""",
    "en": """\
Here are an instruction, a model's response to it, and a question about this response. As a referee, decide whether the one point
that the question asks about holds.

- Look at that point only. Whether the response does what else the instruction wants has no part in the answer.
- The point must hold entirely. If it holds for the most part or in some cases only, if there is a mistake or an ambiguity in it, or if
the response has nothing to decide it by, answer "no".
- Where the question says "each", "every" or "all", a single failure makes it "no".
- Bullet points need a bullet or a number; words such as "first" and "next" are none.
- A response in some language must not have words of another one in it, unless the instruction wants several languages.
- Where the question asks whether a condition was judged rightly, see which branch of the instruction the response follows: "yes" if it is
the branch for this condition, "no" if it is another.

Give your reasons in short, then write <answer>yes</answer> or <answer>no</answer> as the last line.""",
}
_EXTRACT = {
    "zh": """\
下面有一条指令、一个模型对它的回复，以及关于这个回复的一个问题。这个问题会由程序来检查，你只需找出它要检查的是回复的{part}。

- 从回复中逐字抄录：不改写、不增删、不拼接。不要管它合不合要求，不合要求也照样抄录。
- 只抄这部分本身，不抄引出它的名称或说明。
- 要检查开头，就抄第一句；要检查结尾，就抄最后一句。
- 要检查的是整个回复，就写 all。
- 回复中没有要检查的内容，就写 None。

先用一两句话说明要检查的是什么，再把抄录的内容写在 <extract> 与 </extract> 之间{each}。""",
    "en": """\
Here are an instruction, a model's response to it, and a question about this response. A program will check what the question asks; your
part is to find what of the response it has to check: {part}.

- Copy it from the response word for word: nothing reworded, added, left out or joined. Whether it is as wanted is not your concern: copy
it also where it is not.
- Copy the thing itself, without a name or remark that introduces it.
- If a beginning is to be checked, copy the first sentence; if an end, the last one.
- If the whole response is to be checked, write all.
- If the response has nothing of the kind, write None.

Say in a sentence or two what is to be checked, then write the copy between <extract> and </extract>{each}.""",
}
_PARTS = {
    ("zh", False): {"part": "哪一部分", "each": ""},
    ("zh", True): {"part": "哪几个部分", "each": "，按先后顺序，各部分之间用 || 隔开"},
    ("en", False): {"part": "one part", "each": ""},
    ("en", True): {"part": "several parts", "each": ", one part after the other with || between them"},
}
_MATERIAL = """

<instruction>
{instruction}
</instruction>

<response>
{response}
</response>

<question>
{question}
</question>"""
_ANSWERS = {"是": True, "yes": True, "否": False, "no": False}


def judge_prompt(instance: Instance, question: Question, response: str, language: str) -> str:
    """Ask the judge for a verdict, or, if the question has a rule, for the parts of the response that the rule is about."""
    if question.rule is None:
        task = _VERDICT[language]
    else:
        task = _EXTRACT[language].format(**_PARTS[language, question.rule.each])
    return task + _MATERIAL.format(
        instruction=instance.instruction[:_INSTRUCTION_LIMIT],
        response=response[:_RESPONSE_LIMIT],
        question=question.text,
    )


def read_answer(question: Question, response: str, answer: str) -> bool | None:
    """Return whether the question passes by the judge's answer; None if the answer has no clear yes or no, or no complete extract."""
    answer = answer.rpartition("</think>")[2]
    if question.rule is None:
        verdicts = {_ANSWERS.get(word.lower()) for word in re.findall(r"<answer>\s*(.*?)\s*</answer>", answer)}
        return verdicts.pop() if len(verdicts) == 1 else None
    before, opened, rest = answer.partition("<extract>")
    extract, closed, after = rest.partition("</extract>")
    if not (opened and closed) or "<extract>" in rest or "</extract>" in before + after:
        return None
    return question.rule.holds(_spans(extract.strip(), response))


def _spans(extract: str, response: str) -> list[str]:
    """Split an extract into parts of the response: `all` means the whole response, `None` no part."""
    word = extract.strip("\"'“”`.。 ").lower()
    if word == "all":
        return [response]
    if word == "none":
        return []
    return [part.strip() for part in extract.split("||")]
