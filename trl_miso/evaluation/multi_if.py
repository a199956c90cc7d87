"""Multi-IF (arXiv 2410.15553): conversations of up to three user turns, each with further instructions of IFEval's kinds.

All verdicts come from lm-eval's checkers, which count words and sentences of English text, so that only the English conversations are
scored. Multi-IF's own checkers differ in three places: they accept typographic quotation marks as quotes, let blank responses follow some
instructions strictly, and count words and sentences by the language of the response, if that is Chinese, Japanese, Thai or Hindi. Key
1122:18:en asks for a "letter" that is a punctuation mark, as IFEval's 1122.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import release_memory
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from trl_miso.evaluation.ifeval import IFEvalPrompt, Scorer, check_known, load_checkers
from trl_miso.evaluation.ifeval import load_scorer as load_ifeval_scorer
from trl_miso.evaluation.inference import ModelRequest, respond
from trl_miso.evaluation.responses import Questions, load_responses, note_of

DATASET = "facebook/Multi-IF"
LANGUAGE = "English"
TURNS = (1, 2, 3)
_BUILDERS = {".csv": "csv", ".parquet": "parquet", ".jsonl": "json"}
_FIX = f"Fix: take the file of {DATASET} on the Hub"

Conversation = list[IFEvalPrompt]  # the user turns, each with all instructions that hold by then


def load_conversations(file: str | Path | None) -> tuple[list[Conversation], Counter[str]]:
    """Read the English conversations, in order: from a file as the Hub has it, or from the Hub if `file` is None.

    Returns:
        The user turns of each conversation, and the number of conversations in each other language.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the Hub cannot be reached, there is no English conversation, or a row does not have Multi-IF's columns.
    """
    rows = _load_rows(file)
    names = {f"turn_{turn}_{name}" for turn in TURNS for name in ("prompt", "instruction_id_list", "kwargs")}
    missing = sorted({"key", "language", *names} - set(rows.column_names))
    if missing:
        raise ValueError(f"Got {file or DATASET} without the columns {missing}, expected Multi-IF's columns. {_FIX}.")
    conversations = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        if row["language"] == LANGUAGE:
            conversations.append(_user_turns(row, number))
        else:
            left_out[str(row["language"])] += 1
    if not conversations:
        raise ValueError(
            f"Got no conversation in {file or DATASET} whose language is {LANGUAGE!r}, expected some: lm-eval's checkers are made for "
            f"English. {_FIX}."
        )
    return conversations, left_out


def load_scorer(conversations: Sequence[Conversation]) -> Scorer:
    """Return IFEval's scorer, after a check that it knows all instructions.

    Raises:
        ImportError, ValueError: As `ifeval.load_checkers`. ValueError if an instruction has no checker.
    """
    checkers, _ = load_checkers()
    for conversation in conversations:
        for prompt in conversation:
            check_known(prompt, checkers)
    return load_ifeval_scorer()


def answer_turns(
    conversations: Sequence[Conversation], file: str | Path, request: ModelRequest | None
) -> tuple[list[list[tuple[IFEvalPrompt, str]]], str]:
    """Ask for missing responses turn by turn, each after the model's own earlier responses, and read them.

    A turn is asked once the turn before has all responses. Its rows name the whole conversation up to the turn, so that responses that
    follow other responses are refused.

    Args:
        conversations: The user turns of each conversation.
        file: File of the responses to turn 1; those to the later turns are in `turn_file`.
        request: The model to ask, or None to read the files as they are.

    Returns:
        For each turn the prompts and responses of the conversations that reach the turn; and the note that a score table needs, empty
        or a space and a sentence.

    Raises:
        OSError, ImportError, ValueError: As `respond` and `load_responses`.
    """
    dialogues: list[list[dict[str, str]]] = [[] for _ in conversations]
    answered = []
    note = ""
    for turn in TURNS:
        reached = [number for number, conversation in enumerate(conversations) if len(conversation) >= turn]
        if not reached:
            break
        prompts = [conversations[number][turn - 1] for number in reached]
        for number, prompt in zip(reached, prompts, strict=True):
            dialogues[number] = [*dialogues[number], {"role": "user", "content": prompt["prompt"]}]
        questions = Questions([dialogues[number] for number in reached], [prompt["key"] for prompt in prompts])
        kept = turn_file(file, turn)
        respond(questions.prompts, kept, request)
        release_memory()  # the next turn loads the model again
        responses = load_responses(kept, questions)
        note = note or note_of(kept, questions)
        for number, response in zip(reached, responses, strict=True):
            dialogues[number] = [*dialogues[number], {"role": "assistant", "content": response}]
        answered.append(list(zip(prompts, responses, strict=True)))
    return answered, note


def turn_file(file: str | Path, turn: int) -> str:
    """Return the file of the responses to a turn: FILE, FILE.turn2, FILE.turn3."""
    return str(file) if turn == 1 else f"{file}.turn{turn}"


def _load_rows(file: str | Path | None) -> Dataset:
    if file is None:
        try:
            return load_dataset(DATASET, split="train")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"Got no data set {DATASET} from the Hub: {error}. Expected the Hub or its cache. Fix: try again with a connection, or give "
                "--data with the data set's file."
            ) from error
    suffix = Path(file).suffix
    if suffix not in _BUILDERS:
        raise ValueError(f"Got {file}, expected a file whose name ends with {', '.join(_BUILDERS)}. {_FIX}.")
    try:
        return load_dataset(_BUILDERS[suffix], data_files=str(file), split="train")
    except DatasetGenerationError as error:
        raise ValueError(
            f"Got {file}, which cannot be read: {error.__cause__ or error}. Expected {suffix[1:]} with rows. {_FIX}."
        ) from error


def _user_turns(row: Mapping[str, Any], number: int) -> Conversation:
    """Return a row's user turns. A turn without a prompt ends the conversation."""
    turns: Conversation = []
    for turn in TURNS:
        prompt, names, options = (row[f"turn_{turn}_{name}"] for name in ("prompt", "instruction_id_list", "kwargs"))
        if turns and prompt in (None, "", "None"):
            continue
        try:
            message, ids = json.loads(prompt), json.loads(names)
            kwargs = [json.loads(each) for each in json.loads(options)]
            if len(turns) != turn - 1 or message["role"] != "user" or not isinstance(message["content"], str):
                raise ValueError("the prompt is not a user's next message")
            if not ids or len(ids) != len(kwargs):
                raise ValueError(f"it has {len(ids)} instructions and {len(kwargs)} kwargs")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"Got turn {turn} in row {number} of the data (key {row['key']}), which cannot be read: {error}. Expected JSON of a user's "
                f"message, and of equal numbers of instructions and kwargs. {_FIX}."
            ) from error
        turns.append(
            {"key": str(row["key"]), "prompt": message["content"], "instruction_id_list": ids, "kwargs": kwargs}
        )
    return turns
