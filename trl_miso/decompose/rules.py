"""Rules that find the constraints in an instruction: items of lists, and clauses that state a requirement on the answer.

    found = find_constraints("Name a river. The answer must end with a period and contain at most 5 words.")
    [c.text for c in found]  # ["The answer must end with a period", "contain at most 5 words"]

Nothing is rewritten: a constraint is a part of the text, given by its characters. Examples with answers that precede the instruction
are left alone.
"""

import re
from typing import NamedTuple

from trl_miso.decompose.checkers import find_checkers


class Found(NamedTuple):
    """A constraint: the characters `text[begin:end]` of the instruction, and the rule that found it (`"list"` or `"clause"`)."""

    begin: int
    end: int
    text: str
    rule: str


# A worked example's question and answer, as prompts with demonstrations mark them.
_QUESTION = re.compile(r"^\W{0,4}(?:question|instruction|input|query|q)\W{0,4}:\W{0,4}", re.IGNORECASE | re.MULTILINE)
_ANSWER = re.compile(r"^\W{0,4}(?:answer|output|response|a)\W{0,4}:\W*\Z", re.IGNORECASE | re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:\d{1,2}[.)]|[-*•])[ \t]+(?P<text>\S.*)$", re.MULTILINE)
_INTRODUCES = re.compile(
    r"\b(?:rules?|requirements?|constraints?|conditions?|guidelines?|criteria|restrictions?|instructions?)\b[^.\n]*:\s*\Z",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])(?P<closing>[\"')\]]*)\s+(?=[A-Z\"'(\[])|\n+")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|Mr|Mrs|Ms|Dr|St|No)\.$")

# What states a requirement.
_REQUIRES = re.compile(
    r"\b(?:must|should|shall|needs? to|ha(?:s|ve) to|(?:is|are) to|ensur(?:e|ing)|mak(?:e|ing) sure|(?:is|are) "
    r"(?:required|necessary|essential|important|crucial|imperative|vital|limited)|do not|don't|avoid|refrain|limit(?:ed)? |"
    r"requir(?:es?|ed|ing)|remember to|be sure to|at least|at most|no more than|no (?:fewer|less) than|not exceed(?:ing)?|without "
    r"(?:using|exceeding))\b",
    re.IGNORECASE,
)
# What of an answer a requirement is about: its length, form, words, case, punctuation.
_FORM = re.compile(
    r"\b(?:words?|sentences?|paragraphs?|characters?|letters|capital letter|the letter|lines?|bullet|list(?:s|ed)? of exactly|items?|sections?|headings?|"
    r"headers?|title|level \d|markdown|json|xml|html|yaml|csv|latex|tables?|rows?|columns?|nest(?:ed|ing)|attributes?|block ?quotes?|"
    r"keywords?|phrases?|terms? ['\"]|includes? the (?:word|name|term|phrase|software|topic)s?|capital(?:s|ized|ised|ization|ize|ise)?|"
    r"uppercase|upper case|lowercase|lower case|period|comma|commas|question mark|exclamation(?: mark| point)?|punctuation|ending with|"
    r"ends? with|conclud(?:e|es|ing) with|begins? with|starts? with|format(?:ted|ting)?|bold|italic|language|English|French|Spanish|"
    r"German|Chinese|tone|style|at (?:least|most) (?:an?\b|one|two|three|four|five|six|seven|eight|nine|ten|\w+teen|\w+ty|\d)|no more than|maximum|minimum|exactly|exceed(?:ing)?|not exceed|limit(?:ed|s)?|"
    r"separat(?:ed|or)|quotation|emojis?|placeholders?|postscript|examples?)\b",
    re.IGNORECASE,
)
_IMPERATIVE = re.compile(
    r"^(?:please\s+)?(?:include|use|keep|limit|format|present|structure|organi[sz]e|capitali[sz]e|begin|start|end|conclude|finish|"
    r"mention|highlight|avoid|separate|wrap|do not|don't|incorporate|employ|contain|maintain|restrict|refrain|divide)\b",
    re.IGNORECASE,
)
_VAGUE = {
    "style",
    "tone",
    "language",
    "example",
    "examples",
    "title",
    "item",
    "items",
    "format",
    "section",
    "sections",
    "english",
    "term",
    "terms",
}
# Requests, which are requirements only with a limit.
_ASKS = re.compile(
    r"^(?:please\s+)?(?:provide|list|write|give|put|create|respond|answer|reply|add|make)\b.*"
    r"\b(?:at least|at most|no more than|maximum|minimum|exactly|not exceed|json|markdown|capital\w*|keywords?)\b",
    re.IGNORECASE | re.DOTALL,
)
# The beginning of a sentence whose main clause is the request.
_INTRODUCTION = re.compile(
    r"^\W*(?:given|using|for|to|in|from|with|based on|considering|after|when|if|as)\b", re.IGNORECASE
)
# A second thing asked for, or what is said of the thing asked for; without a limit no restriction of the answer's form.
_SECOND_REQUEST = re.compile(
    r"^(?:(?:provide|write|give|use it|use the|name|list|create|return|output|is|are|ends?|starts?|begins?|has|have)\b|the \w+ (?:\w+ )?(?:is|are)\b)"
    r"(?!.*\b(?:at least|at most|no more than|maximum|minimum|exactly|not exceed))",
    re.IGNORECASE | re.DOTALL,
)
# What an instruction hands over: quoted text, what a label announces, somebody's words.
_MATERIAL = re.compile(r"""^\W*(?:["\u201c].{25,}["\u201d]\W*\Z|(?:I|[Ww]e|[Hh]e|[Ss]he|[Tt]hey) )""", re.DOTALL)
# A label in front of it, which makes material of the rest of the line.
_LABEL = re.compile(
    r"^\W*(?!(?:rule|requirement|constraint|condition|guideline|note|format|important|please)s?\b)[A-Z][\w-]*(?: \w+)?:\s",
    re.IGNORECASE,
)
# How a limit at the end of a request begins.
_LIMIT_LEAD = re.compile(
    r"\b(?:of|with|in|using|under|that (?:has|have|uses?|contains?|includes?|consists? of))\s+(?:only\s+)?\Z",
    re.IGNORECASE,
)
_LIMIT_START = re.compile(r"(?:in|with|without|using|do not|don't|end|finish|wrap|include)\b", re.IGNORECASE)
# Sentences about the requirements, which add none.
_ABOUT_REQUIREMENTS = re.compile(
    r"^(?:these|this|that|such|all of these|adhering)\b[^,.]{0,40}\b(?:requirements?|constraints?|limitations?|elements?|restrictions?|guidelines?|structured format|"
    r"means|will|ensures|helps?|allows)\b",
    re.IGNORECASE,
)
# A reason behind a requirement, without a requirement of its own.
_REASON = re.compile(
    r",\s+(?:as\b|which\b|since\b|because\b|so that\b|in order to\b|(?:thereby |thus )?(?:ensuring|maintaining|balancing|allowing|providing|making it|adhering|"
    r"enhancing|emphasizing|reflecting|helping|keeping)\b)[^,;]*(?:,[^,;]*)?\Z|:\s+[\"\u201c].{40,}\Z",
    re.IGNORECASE | re.DOTALL,
)

# Words that join a sentence to the one before; they stay outside of the constraint.
_CONNECTIVE = re.compile(
    r"^(?:(?:additionally|furthermore|moreover|also|finally|lastly|importantly|in addition|besides|further|next|then|and|but|"
    r"(?:when|while|in) (?:crafting|writing|answering|providing|formulating|responding|creating|composing|preparing|developing|"
    r"presenting|drafting|organizing|considering)[^,]{0,60}|(?:to|for) [^,]{3,50}|specifically),\s+|and\s+|but\s+|while\s+|also\s+|"
    r"(?:please |it is (?:important|essential|crucial|necessary) to |remember )(?:note |remember |be aware )?that\s+)+",
    re.IGNORECASE,
)
_VERBS = (
    r"(?:not )?(?:includes?|contains?|uses?|ends?|begins?|starts?|exceeds?|consists? of|ha(?:ve|s)|follows?|presents?|formats?|concludes?|"
    r"capitali[sz]es?|incorporates?|employs?|features?|limits?|avoids?|provides?|maintains?|adheres?|be|is|are|mentions?|highlights?|keeps?|writes?)"
)
_JOINTS = re.compile(
    rf"(?:,\s+(?:and\s+|while\s+|but\s+)?|;\s+(?:and\s+)?|\s+and\s+|\s+while\s+|\s+but\s+)"
    rf"(?=(?:also\s+)?(?:must|should|needs? to|ensur(?:e|ing)|mak(?:e|ing) sure|"
    rf"(?:the|each|every|all|any|it|your|this)\b[^,;]{{0,50}}?\b(?:must|should|needs? to|is|are|ha(?:s|ve))\b|{_VERBS}\b|"
    rf"(?:containing|including (?:the |an? |at |no )?(?:keywords?|terms?|table|heading|least|more)|structured|using|ending|beginning|starting|consisting|limiting|keeping|avoiding|concluding|capitalizing|not exceeding|"
    rf"presenting|maintaining|incorporating|following|formatted|written|presented|limited)\b|"
    rf"(?:remember )?that (?:the|each|every|all|any|it|your|this)\b|(?:it is|it's) (?:important|necessary|essential|crucial|required)|at (?:least|most)\b|no (?:more|fewer|less) than\b))"
    rf"|\s+(?=ensuring\b|making sure\b)|(?:,\s+(?:and|but)|\s+(?:and|but))\s+(?=if\b|does not exceed\b)",
    re.IGNORECASE,
)


_PLAIN_REASON = re.compile(r":|, as (?:this|these|it|they)\b|, making sure these\b", re.IGNORECASE)
_LEAD = re.compile(
    r"(?:(?:additionally|furthermore|moreover|also|finally|lastly|please|and|but|then|so|thus|however|(?:when|while|in) \w+ing\b[^.]*|"
    r"\d{1,2}[.)]|[-*\u2022]|(?:to|for|in your (?:response|answer|reply|output|text|entire response))[^.]*|specifically|importantly|(?:please |it is \w+ to |remember )?(?:note|remember|be aware)? ?that)[\s,]*)+",
    re.IGNORECASE,
)
# A condition belongs to the requirement behind it, and what is said of a table to the requirement of a table.
_CONDITION = re.compile(r"\W*(?:\w+, )?(?:if|when|where|whenever)\b[^,]*\Z", re.IGNORECASE)
_SAME_OBJECT = re.compile(
    r"(?:ensuring (?:that )?|making sure (?:that )?)?(?:the|this) (?:table|json|list)\b", re.IGNORECASE
)


def find_constraints(text: str) -> list[Found]:
    """The constraints that stand in an instruction, in order; they do not overlap."""
    begin, end = last_request(text)
    lists = _list_items(text, begin, end)
    found, at = [], begin
    first = True
    for item_begin, item_end, stated in [*lists, (end, end, None)]:
        if stated is None or at < item_begin:
            found += _clauses(text, at, item_begin, first)
            first = False
        if stated is not None:
            found.append(_found(text, *stated, "list"))
        at = item_end
    return [c for c in found if c.begin < c.end]


def last_request(text: str) -> tuple[int, int]:
    """The characters of the instruction after worked examples, and before a marker of the answer at the end."""
    questions = list(_QUESTION.finditer(text))
    begin = questions[-1].end() if questions else 0
    answer = _ANSWER.search(text, begin)
    return begin, answer.start() if answer else len(text)


def _list_items(text: str, begin: int, end: int) -> list[tuple[int, int, tuple[int, int]]]:
    """Items of lists that state requirements: the characters of the line, and of the item's text."""
    groups: list[list[re.Match[str]]] = []
    for match in _ITEM.finditer(text, begin, end):
        if groups and not text[groups[-1][-1].end() : match.start()].strip():
            groups[-1].append(match)
        else:
            groups.append([match])
    items = []
    for group in groups:
        introduced = _INTRODUCES.search(text[begin : group[0].start()])
        stating = [
            m for m in group if _REQUIRES.search(m["text"]) or _IMPERATIVE.search(m["text"]) and _FORM.search(m["text"])
        ]
        stating = [m for m in stating if not _MATERIAL.match(m["text"])]
        short = all(len(sentences(text, *m.span("text"))) <= 2 for m in group)  # others are tasks of their own
        if short and (introduced or len(stating) > len(group) / 2):
            items += [(m.start(), m.end(), m.span("text")) for m in group]
    return items


def _clauses(text: str, begin: int, end: int, has_request: bool) -> list[Found]:
    """Clauses of the text between two positions that state a requirement on the answer's form."""
    found = []
    labelled, before = False, begin
    for number, (start, stop) in enumerate(sentences(text, begin, end)):
        sentence = text[start:stop]
        new_line = "\n" in text[before:start]
        labelled, before = new_line and bool(_LABEL.match(sentence)) or labelled and not new_line, stop
        if labelled:
            continue
        if sentence.rstrip().endswith("?") and not (has_request and number == 0) or _MATERIAL.match(sentence):
            continue
        checked = [(a, b) for a, b, _ in find_checkers(text, start, stop)]
        if not (checked or _FORM.search(sentence)) or _ABOUT_REQUIREMENTS.search(_stripped(sentence)):
            continue
        is_request = has_request and number == 0
        pieces = _pieces(text, start, stop, checked)
        with_checker = [i for i, (a, b) in enumerate(pieces) if any(a <= c < b for c, _ in checked)]
        stating = [i for i, (a, b) in enumerate(pieces) if i in with_checker or _states(text[a:b], i > 0)]
        if is_request:
            # The first clause of the first sentence asks for something, in words that may be those of a style.
            head = text[slice(*pieces[0])].rstrip(" ,")
            first = 2 if _INTRODUCTION.match(head) and "," not in head else 1
            stating = [i for i in stating if i >= first and _adds(text[slice(*pieces[i])], i in with_checker)]
            limit = _limit_at_end(text, *pieces[0], checked)
            found += [_found(text, *limit, "clause")] if limit else []
        elif not checked and not _demands(_stripped(sentence)) and not _REQUIRES.search(sentence):
            continue
        found += [_found(text, *pieces[i], "clause") for i in stating]
    return found


def _limit_at_end(text: str, start: int, stop: int, checked: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The characters at the end of a request that a checker checks, such as "with at most 50 words"."""
    for begin, end in checked:
        if start <= begin < end <= stop and not re.search(r"\w", text[end:stop]):
            lead = _LIMIT_LEAD.search(text, start, begin)
            if lead or _LIMIT_START.match(text, begin):
                begin = lead.start() if lead else begin
                # What is left has to be a request: "Answer in at most 50 words" is none.
                stop = start + len(text[start:stop].rstrip(" ?"))  # a question mark is the request's
                return (begin, stop) if len(re.findall(r"\w+", text[start:begin])) >= 3 else None
    return None


def _states(clause: str, follows: bool) -> bool:
    """Whether a clause is about the form of the answer. `follows`: a requirement may have been stated by the clause before."""
    bare = _stripped(clause)
    return bool(_FORM.search(bare)) and (follows or _demands(bare))


def _adds(clause: str, has_checker: bool) -> bool:
    """Whether a clause behind a request restricts it, rather than asks for a second thing."""
    definite = any(match[0].lower() not in _VAGUE for match in _FORM.finditer(clause))
    return has_checker or definite and not _SECOND_REQUEST.match(_stripped(clause))


def _demands(clause: str) -> bool:
    """Whether a clause states a requirement, by a verb that does so or by what it tells to do."""
    return any(pattern.search(clause) for pattern in (_REQUIRES, _IMPERATIVE, _ASKS))


def _pieces(text: str, start: int, stop: int, checked: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A sentence cut where clauses are joined, as far as each piece has a form of its own; what one checker checks stays together."""
    cuts = [start]
    for joint in _JOINTS.finditer(text, start, stop):
        piece = text[cuts[-1] : joint.start()]
        if (
            any(a < joint.end() and joint.start() < b for a, b in checked)
            or _quoted(text[start : joint.start()])
            or _CONDITION.match(piece)
            or _SAME_OBJECT.match(text, joint.end(), stop)
        ):
            continue
        if _FORM.search(text, joint.end(), stop) and (cuts[-1] == start or _FORM.search(text, cuts[-1], joint.start())):
            cuts.append(joint.end())
    pieces: list[tuple[int, int]] = []
    for a, b in zip(cuts, [*cuts[1:], stop], strict=True):
        if pieces and not _FORM.search(text, a, b):
            pieces[-1] = pieces[-1][0], b
        else:
            pieces.append((a, b))
    return pieces


def _quoted(before: str) -> bool:
    """Whether a position is within a quotation or brackets, by what precedes it in its sentence."""
    opened = len(re.findall(r"(?<!\w)['\u2018]", before)) - len(re.findall(r"(?<=[\w.!?])['\u2019](?!\w)", before))
    return before.count('"') % 2 == 1 or opened > 0 or before.count("(") > before.count(")")


def sentences(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """The sentences and lines between two positions. Sentences that describe one constraint together (`find_checkers`) are one."""
    together = [(a, b) for a, b, _ in find_checkers(text, begin, end)]
    sentences, start = [], begin
    for gap in _SENTENCE.finditer(text, begin, end):
        before = text[start : gap.start()]
        if "\n" not in gap[0] and _ABBREVIATION.search(before) or re.fullmatch(r"\s*\d{1,2}\.", before):
            continue
        if any(a < gap.start() and gap.end() < b for a, b in together):
            continue
        sentences.append((start, gap.end("closing") if gap["closing"] else gap.start()))
        start = gap.end()
    sentences.append((start, end))
    return [(a, b) for a, b in sentences if text[a:b].strip()]


def is_lead(head: str) -> bool:
    """Whether the beginning of a sentence only leads to the requirement behind it."""
    return not re.search(r"\w", _stripped(head + " ")) or bool(_LEAD.fullmatch(head.strip()))


def is_about_requirements(sentence: str, before_list: bool) -> bool:
    """Whether a sentence speaks of the requirements and adds none: it announces a list of them, or calls for them to be met."""
    if before_list and _INTRODUCES.search(sentence):
        return True
    return bool(_ABOUT_REQUIREMENTS.search(_stripped(sentence)))


def _stripped(clause: str) -> str:
    return _CONNECTIVE.sub("", clause.strip())


def _found(text: str, begin: int, end: int, rule: str) -> Found:
    """The constraint without spaces, joining words before it, and commas behind it."""
    clause = text[begin:end]
    begin += len(clause) - len(clause.lstrip())
    clause = clause.strip()
    joining = _CONNECTIVE.match(clause) if rule == "clause" else None
    if joining and len(clause) - joining.end() > 10:
        begin += joining.end()
        clause = clause[joining.end() :]
    reason = _REASON.search(clause) if rule == "clause" else None
    if reason and reason.start() > 10 and (_PLAIN_REASON.match(reason[0]) or not _FORM.search(reason[0])):
        clause = clause[: reason.start()]
    clause = re.sub(r"(?:[,;]\s*(?:and|but|while)?|\s+(?:and|but|while))$", "", clause.rstrip())
    return Found(begin, begin + len(clause), clause, rule)
