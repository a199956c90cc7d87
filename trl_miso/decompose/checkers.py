"""IFEval's checkers (arXiv 2311.07911) for constraints in words: which of them checks a constraint, and with which values.

    checker_of("Answer with at most 50 words.")  # Checker("length_constraints:number_words", {"relation": "less than", "num_words": 51})
    checker_of("Be kind to the reader.")         # None

A text gets a checker only if it says what the checker checks: IFEval's own descriptions do, and so do common wordings. A number
that no checker can test ("exactly 50 words") gives none, and so does a text that states two such things.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

Match = re.Match[str]


class Checker(NamedTuple):
    """An IFEval instruction: its id, and the keyword arguments of its checker."""

    id: str
    kwargs: dict[str, Any]


_NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_WORDS = {word: number for number, word in enumerate(_NUMBERS.split(), start=1)}
_OFTEN = {"once": 1, "twice": 2}
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]
_N = rf"(?:\d[\d,]*|{'|'.join(_WORDS)})"
_LANGUAGES = {
    "arabic": "ar", "bengali": "bn", "bulgarian": "bg", "english": "en", "finnish": "fi", "french": "fr", "german": "de", "gujarati": "gu",
    "hebrew": "he", "hindi": "hi", "italian": "it", "japanese": "ja", "kannada": "kn", "korean": "ko", "malayalam": "ml", "marathi": "mr",
    "nepali": "ne", "persian": "fa", "polish": "pl", "portuguese": "pt", "punjabi": "pa", "russian": "ru", "spanish": "es",
    "swahili": "sw", "tamil": "ta", "telugu": "te", "thai": "th", "ukrainian": "uk", "urdu": "ur", "vietnamese": "vi",
}  # fmt: skip
# A limit and its number. The name of the group says by how much "at least" or "less than" of IFEval is off.
_LIMIT = (
    rf"(?:(?:at least|(?:a )?minimum(?: of)?|no (?:fewer|less) than|not (?:fewer|less) than) (?P<least>{_N})|(?:more than|over|above) (?P<more>{_N})"
    rf"|(?:less than|fewer than|under|below) (?P<less>{_N})|(?P<plus>{_N})(?:\+| or more)"
    rf"|(?:at most|(?:a )?maximum(?: of)?|no more than|not more than|not (?:to )?exceed(?:ing)?|up to|within|limit(?:ed)? to) (?P<most>{_N}))"
)
_TIMES = rf"(?:(?P<after>{_N}) (?:or more times|times or more)|{_LIMIT} times?\b|at least (?P<once>once|twice)|at most (?P<never>once|twice))"
_QUOTED = re.compile(
    r"\"([^\"]+)\"|(?<!\w)'([^']+)'(?!\w)|\u201c([^\u201d]+)\u201d|\u2018([^\u2019]+)\u2019|`([^`]+)`|\*\*([^*]+)\*\*"
)
_OPEN, _CLOSE = r"[\"'\u201c\u2018`{]?", r"[\"'\u201d\u2019`}]?"
_ITEM = r"(?:\"[^\"\n]+\"|'[^'\n]+'(?!\w)|\u201c[^\u201d\n]+\u201d|\u2018[^\u2019\n]+\u2019)"
_TERMS = (
    rf"(?:key)?words?:? (?P<terms>\[[^\]\n]*\]|{_ITEM}(?: ?(?:,? (?:and|or)|,)? ?{_ITEM})*"
    r"|[\w-]+(?:(?:, and|, or|,| and| or) [\w-]+)*(?= (?:in|into|anywhere) |[.\n]|\Z))"
)
_ENDING = r"(?:[^.\n]*\bno other (?:words?|phrases?|text)\b[^.\n]*\.?|\s+No (?:other|additional) (?:words?|phrases?|text)\b[^.\n]*\.?)?"


def _number(text: str) -> int:
    return (_WORDS | _OFTEN).get(text.lower()) or int(text.replace(",", ""))


def _relation(match: Match) -> tuple[str, int]:
    """IFEval's relation and number of a limit."""
    given = {name: _number(text) for name, text in match.groupdict().items() if text and name in _OFFSETS}
    ((name, number),) = given.items()
    relation, offset = _OFFSETS[name]
    return relation, number + offset


_OFFSETS = {
    "least": ("at least", 0),
    "plus": ("at least", 0),
    "after": ("at least", 0),
    "once": ("at least", 0),
    "more": ("at least", 1),
    "less": ("less than", 0),
    "most": ("less than", 1),
    "never": ("less than", 1),
}


def _limit(number: str, relation: str = "relation", **copied: str) -> Callable[[Match], dict[str, Any]]:
    """Keyword arguments of a checker with a limit; `copied` are other groups of the pattern."""

    def build(match: Match) -> dict[str, Any]:
        stated, count = _relation(match)
        return {name: match[group].lower() for name, group in copied.items()} | {relation: stated, number: count}

    return build


def _count(name: str) -> Callable[[Match], dict[str, Any]]:
    return lambda match: {name: _number(match["n"])}


def _nothing(_: Match) -> dict[str, Any]:
    return {}


def _terms(text: str) -> list[str]:
    """The words of a list: those in quotation marks or, without any, what commas and "and" separate."""
    quoted = ["".join(groups).strip(" .,") for groups in _QUOTED.findall(text)]
    if quoted:
        return quoted
    parts = re.split(r"\s*(?:,\s*(?:and|or)?|\band\b|\bor\b|\n)\s*", text.strip(" :.[]\n"))
    terms = [part.strip(" .'\"") for part in parts]
    return [] if any(len(term.split()) > 3 for term in terms) else [term for term in terms if term]


def _list_of(name: str) -> Callable[[Match], dict[str, Any]]:
    return lambda match: {name: _terms(match["terms"])}


def _sections(match: Match) -> dict[str, Any]:
    return {"section_spliter": match["splitter"], "num_sections": _number(match["n"])}


def _first_word(match: Match) -> dict[str, Any]:
    place = match["nth"].lower()
    nth = _ORDINALS.index(place) + 1 if place in _ORDINALS else _number(re.sub(r"(?:st|nd|rd|th)$", "", place))
    return {"num_paragraphs": _number(match["n"]), "nth_paragraph": nth, "first_word": match["word"].lower()}


def _language(match: Match) -> dict[str, Any]:
    return {"language": _LANGUAGES[match["language"].lower()]}


def _postscript(match: Match) -> dict[str, Any]:
    return {"postscript_marker": "P.P.S" if "P.P.S" in match.string else "P.S."}


def _end_phrase(match: Match) -> dict[str, Any]:
    return {"end_phrase": next(filter(None, match.group("double", "single", "exact", "plain"))).strip()}


_NTH = rf"(?P<nth>\d+(?:st|nd|rd|th)?|{'|'.join(_ORDINALS)})"
_TONGUE = rf"(?P<language>{'|'.join(_LANGUAGES)})\b(?: language)?"
_NO_OTHER = r",? (?:and )?no other languages? (?:is|are) allowed(?: throughout your \w+)?"
_NOT = r"(?:(?:do|does|should|must|can|will) ?not|(?:do|does|should|must|ca|wo)n't|never)"
_UPPER = r"(?:capital(?:ized)? letters|caps|upper-?\s?case(?: letters)?)"
_LOWER = r"lower-?\s?case(?: letters)?"
_NONE_CAPITAL = r"(?:capital|upper-?\s?case) letters(?: (?:are )?allowed)?"

_NO_CHECKER = ""  # what a later pattern would take for something else

# Instruction, pattern, keyword arguments of its checker. A pattern spans all sentences of IFEval's description. Of patterns that overlap in
# a text the first counts.
_PATTERNS: list[tuple[str, str, Callable[[Match], dict[str, Any]]]] = [
    (
        "combination:repeat_prompt",
        r"\brepeat the (?:exact )?(?:request|sentence|prompt|question)\b(?:(?! below)[^.\n])*, then give your (?:answer|response)"
        r"(?: \(1\.[\s\S]*?this sentence\)|\.(?: Do not say any[^.\n]*\.)?)?",
        _nothing,
    ),
    (
        "detectable_format:constrained_response",
        r"\bMy answer is yes\b[\s\S]{0,20}\bMy answer is no\b[\s\S]{0,20}\bMy answer is maybe\b[.'\")]*",
        _nothing,
    ),
    ("combination:two_responses", r"\btwo (?:different )?responses\b[^*]{0,90}\*{6}(?!\*)", _nothing),
    (
        "detectable_format:multiple_sections",
        rf"\b(?P<n>{_N}) sections?\b[^.]{{0,40}}\.? ?(?:mark|label|with)[^.]{{0,60}}?\b(?:with|by|as) {_OPEN}(?P<splitter>[A-Za-z]+) X\b{_CLOSE}"
        r"(?:, such as:\s(?P=splitter) 1\s\[content of section 1\]\s(?P=splitter) 2\s\[content of section 2\])?",
        _sections,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        rf"\b(?P<n>{_N}) paragraphs?\b[\s\S]{{0,160}}?(?:two|double) (?:new ?lines|line ?breaks)[\s\S]{{0,80}}?\b{_NTH}(?: paragraph)?"
        rf"(?: (?:must|should))?(?: starts?)? with (?:the )?(?:word )?{_OPEN}(?P<word>[\w-]+)",
        _first_word,
    ),
    (
        "length_constraints:number_paragraphs",
        rf"\b(?P<n>{_N}) (?:paragraphs|sections)\b[^*]{{0,80}}(?<!\*)\*\*\*(?!\*)",
        _count("num_paragraphs"),
    ),
    (
        "detectable_format:number_bullet_lists",
        rf"\bexactly (?P<n>{_N}) (?:markdown )?bullet[- ]?points?\b"
        r"(?:\. Use the markdown bullet points such as:\s\* This is point 1\. ?\s\* This is point 2|[^.*\n]{0,40}\. Use [^.\n]*bullet points? (?:such as|like):(?:\s\* [^\n]*)+)?",
        _count("num_bullets"),
    ),
    (
        "detectable_format:number_highlighted_sections",
        rf"\bhighlight(?:ing)? at least (?P<n>{_N}) (?:text )?(?:sections?|phrases?|words?|parts?)\b",
        _count("num_highlights"),
    ),
    (
        "detectable_format:number_highlighted_sections",
        rf"\bat least (?P<n>{_N}) highlighted (?:text )?(?:sections?|parts?)\b",
        _count("num_highlights"),
    ),
    (
        "detectable_content:number_placeholders",
        rf"\b(?:at least|a minimum of|no (?:fewer|less) than) (?P<n>{_N}) placeholders?\b(?:[^.\n]*\])?",
        _count("num_placeholders"),
    ),
    ("detectable_content:postscript", r"\bpostscript\b[^.\n]{0,40}(?:P\.S\.|P\.P\.S\.?)", _postscript),
    ("detectable_format:title", r"\btitle\b[^.\n]{0,60}(?:double angular brackets(?:, (?:such as|i\.e\.) <<[^>\n]*>>)?|<<[^>\n]*>>)", _nothing),
    (
        "detectable_format:json_format",
        r"\b(?:entire (?:output|response|answer|reply)|output|response|answer|reply|wrap)\b[^.\n]{0,40}\b(?:in|as|using|valid) (?:valid )?JSON\b"
        r"(?:[^.\n]{0,20}\. You can use markdown ticks such as ```)?",
        _nothing,
    ),
    (
        "startend:end_checker",
        rf"\b(?:finish|end)(?:(?: your| the)?(?: entire| whole)? \w+)? with (?:this|the) (?:exact )?(?:phrase|sentence)(?: of)?:? ?"
        rf"(?:\"(?P<double>[^\"\n]+)\"|'(?P<single>[^\n]+?)'(?!\w)|(?P<exact>[^\n\"]+?)\. No other words should follow this phrase\.|(?P<plain>[^\n.?!\"']+[.?!]?)){_ENDING}",
        _end_phrase,
    ),
    (
        "startend:quotation",
        r"\b(?:wrap|put|enclose|surround)(?:ped|d)?\b[^.\n]{0,50}\bdouble (?:quotation marks?|quotes?)(?: around your (?:entire|whole) \w+)?",
        _nothing,
    ),
    ("language:response_language", rf"(?:\b(?:entire|whole) \w+ (?:should|must|has to) be (?:written |entirely |only )*)?\b(?:only )?in (?:the |entirely )?{_TONGUE}(?: only)?{_NO_OTHER}", _language),
    ("language:response_language", rf"\b(?:entire|whole) \w+ (?:should|must|has to) be (?:written |entirely |only )*in (?:the )?(?!English\b){_TONGUE}", _language),
    ("language:response_language", rf"\b(?:only in|entirely in|in only|use only|using only|only using) (?:the )?{_TONGUE}(?:{_NO_OTHER})?", _language),
    (
        "change_case:capital_word_frequency",
        rf"\bwords?\b[^.\n]{{0,25}}\b(?:all[- ]caps|all[- ]capital(?: letters)?|capital letters)[^.\n]{{0,60}}?\b{_TIMES}",
        _limit("capital_frequency", "capital_relation"),
    ),
    (
        "change_case:capital_word_frequency",
        rf"\b{_LIMIT} words?\b[^.\n]{{0,25}}\b(?:in|with) (?:all )?(?:caps|capital letters)",
        _limit("capital_frequency", "capital_relation"),
    ),
    (_NO_CHECKER, r"\b(?:words?|phrases?|title|heading|name)s?\b[^.\n]{0,40}\b(?:all[- ])(?:caps|capital(?: letters)?|upper-?\s?case)", _nothing),
    ("change_case:english_lowercase", rf"\b(?:in|use|using|with) (?:only |all )*{_LOWER}(?:(?:\.|,? and|,)? no {_NONE_CAPITAL})?", _nothing),
    ("change_case:english_lowercase", rf"\b(?:all {_LOWER}|(?:no|without(?: using)?(?: any)?|not (?:use|contain)(?: any)?) {_NONE_CAPITAL})", _nothing),
    ("change_case:english_capital", rf"\b(?:(?:in|use|using|with) )?(?:only |all )+{_UPPER}(?:,? no lowercase letters(?: (?:are )?allowed)?)?", _nothing),
    (
        "punctuation:no_comma",
        rf"\b(?:no|without|avoid|{_NOT} (?:use|contain|include|have)|not (?:allowed to )?(?:use|contain|include)|refrain from|free of)"
        r"(?: using| the use of)?(?: any)?(?: of)?(?: the)? commas?\b(?![- ]separated)",
        _nothing,
    ),
    ("keywords:letter_frequency", rf"\bletter {_OPEN}(?P<letter>[a-z])\b{_CLOSE}[^.\n]{{0,40}}?\b{_TIMES}", _limit("let_frequency", "let_relation", letter="letter")),
    ("keywords:frequency", rf"\b(?:the )?(?:key)?word {_OPEN}(?P<term>[\w-]+){_CLOSE}[^.\n]{{0,40}}?\b{_TIMES}", _limit("frequency", keyword="term")),
    (
        "keywords:forbidden_words",
        rf"\b(?:{_NOT}|not|without|avoid) (?:us(?:e|ing)|includ(?:e|ing)|mention(?:ing)?|contain|say(?:ing)?|have)(?: any)?(?: of)?(?: the)?(?: following)? {_TERMS}",
        _list_of("forbidden_words"),
    ),
    ("keywords:existence", rf"\b(?:include|contain|mention|use)s?(?: the)?(?: following)? {_TERMS}", _list_of("keywords")),
    ("length_constraints:number_words", rf"\b{_LIMIT}[- ]words?\b(?! (?:in|with) all)(?! per)", _limit("num_words")),
    ("length_constraints:number_sentences", rf"\b{_LIMIT}[- ]sentences?\b(?! per)", _limit("num_sentences")),
]  # fmt: skip
# These checkers look at the whole response: not at what a clause asks of a part of it.
_OF_THE_WHOLE = (
    "length_constraints:number_words",
    "length_constraints:number_sentences",
    "keywords:existence",
    "change_case:english_capital",
    "change_case:english_lowercase",
)
_OF_A_PART = re.compile(
    r"\b(?:each|every|any|per|all|(?:the|a|an|your|its|one|two|three) (?:first|second|last|final|opening|closing|new)? ?(?:title|heading|header|line|item|bullet|"
    r"point|row|column|cell|table|paragraph|section|stanza|verse|caption|tag|keyword|name|sentence|summary|introduction|conclusion))s?\b[^.!?\n]*\Z",
    re.IGNORECASE,
)
_COMPILED = [(name, re.compile(pattern, re.IGNORECASE), build) for name, pattern, build in _PATTERNS]


def find_checkers(text: str, begin: int = 0, end: int | None = None) -> list[tuple[int, int, Checker]]:
    """Each part of the text that a checker checks: its first character, the one after its last, and the checker; in order, apart."""
    found: list[tuple[int, int, Checker]] = []
    for name, pattern, build in _COMPILED:
        for match in pattern.finditer(text, begin, len(text) if end is None else end):
            is_apart = all(match.end() <= a or b <= match.start() for a, b, _ in found)
            if is_apart and not (name in _OF_THE_WHOLE and _OF_A_PART.search(text, begin, match.start())):
                kwargs = build(match)
                if all(value not in ("", []) for value in kwargs.values()):
                    found.append((*match.span(), Checker(name, kwargs)))
    return sorted((part for part in found if part[2].id != _NO_CHECKER), key=lambda part: part[0])


def checker_of(text: str) -> Checker | None:
    """The checker of a constraint; None if there is none, or if it states more than one thing that is checked."""
    found = find_checkers(text)
    return found[0][2] if len(found) == 1 else None
