"""examples/rag.py: what it retrieves, that the order of passages means nothing, and that generation mixes as training does."""

import json
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from tests.support.processes import REPOSITORY, run_python
from trl_miso import MISOSFTTrainer, miso_generate
from trl_miso.recipe import load_tokenizer
from trl_miso.sources.synthetic import build_model

bm25s = pytest.importorskip("bm25s", reason="the extra rag is not installed")

SCRIPT = REPOSITORY / "examples" / "rag.py"
if not (SCRIPT.parent / "rag" / "corpus.jsonl").exists():
    pytest.skip("the passages are not in the source distribution", allow_module_level=True)
K = 4


@pytest.fixture(scope="module")
def rag():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def passages(rag):
    return [row["text"] for row in rag.read(rag.SHIPPED / "corpus.jsonl", {"text": str})]


@pytest.fixture(scope="module")
def questions(rag):
    return rag.read(rag.SHIPPED / "questions.jsonl", {"question": str, "answers": list})


@pytest.fixture(scope="module")
def retrieved(rag, passages, questions):
    return rag.retrieve(passages, [question["question"] for question in questions], K)


@pytest.fixture(scope="module")
def row(rag, questions, retrieved):
    """A row whose weights are all of some size, so that each passage counts."""
    return max(map(rag.make_row, questions, *zip(*retrieved, strict=True)), key=lambda row: min(row["context_weights"]))


@pytest.fixture(scope="module")
def toy(row):
    """Tokenizer and model, in float64. Their loss and the logits of `generate` are float32."""
    tokenizer = load_tokenizer(Dataset.from_list([row]), None, SimpleNamespace(model_name_or_path=None))
    return tokenizer, build_model(tokenizer).double()


def permuted(row, *columns):
    """The row with the items of these columns in another order, in which none stays in its place."""
    return row | {name: [row[name][i] for i in (2, 0, 3, 1)] for name in columns}


def loss_and_gradients(toy, row, make_config):
    tokenizer, model = toy
    model.zero_grad()
    trainer = MISOSFTTrainer(model, make_config(), train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    loss = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def generated(toy, row, **options):
    tokenizer, model = toy
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        **options,
    }
    out = miso_generate(model, tokenizer, row["contexts"], weights=row.get("context_weights"), **options)
    return out.sequences, torch.cat(out.logits)


def bm25(passages, question):
    """BM25 from its definition (Lucene's variant, k1 = 1.5, b = 0.75)."""
    *documents, query = bm25s.tokenize([*passages, question], return_ids=False, show_progress=False)
    length = sum(map(len, documents)) / len(documents)
    frequency = Counter(word for document in documents for word in set(document))
    scores = []
    for document in documents:
        score, counts = 0, Counter(document)
        for word in query:
            idf = math.log(1 + (len(documents) - frequency[word] + 0.5) / (frequency[word] + 0.5))
            score += idf * counts[word] / (counts[word] + 1.5 * (0.25 + 0.75 * len(document) / length))
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float64)


def test_passages_and_weights_follow_the_scores(passages, questions, retrieved):
    for question, (texts, weights) in list(zip(questions, retrieved, strict=True))[::10]:
        scores, best = bm25(passages, question["question"]).topk(K)
        assert texts == [passages[i] for i in best]
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), scores.softmax(0), rtol=1e-4, atol=0)


def test_retrieval_is_surer_where_it_is_right(rag, questions, retrieved):
    """The table of docs/rag.md, by the rank of a passage, and the recall that the example prints."""
    weights, holds = torch.empty(2, len(questions), K)
    for i, (question, (texts, row)) in enumerate(zip(questions, retrieved, strict=True)):
        weights[i] = torch.tensor(row)
        holds[i] = torch.tensor([rag.holds(text, question) for text in texts])
    table = torch.stack([weights.mean(0), holds.mean(0)])
    expected = torch.tensor([[0.66, 0.17, 0.10, 0.07], [0.77, 0.30, 0.12, 0.15]])
    torch.testing.assert_close(table, expected, rtol=0, atol=0.005)
    assert holds.any(1).sum() == 95
    right = holds[:, 0] == 1
    assert weights[right, 0].mean() > weights[~right, 0].mean() + 0.2


@pytest.mark.parametrize("columns", [["contexts"], ["contexts", "context_weights"]])
def test_the_order_of_passages_means_nothing(columns, row, toy, make_config):
    """Under uniform weights, and with the weights of the retrieval in the order of their passages."""
    row = {name: row[name] for name in ["completion", *columns]}
    (loss, gradients), (sequences, logits) = loss_and_gradients(toy, row, make_config), generated(toy, row)
    other = permuted(row, *columns)
    other_loss, other_gradients = loss_and_gradients(toy, other, make_config)
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
    for gradient, other_gradient in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-6 * gradient.abs().max())
    other_sequences, other_logits = generated(toy, other)
    assert torch.equal(other_sequences, sequences)
    torch.testing.assert_close(other_logits, logits, rtol=0, atol=1e-6 * logits.abs().max())


def test_each_weight_belongs_to_its_passage(row, toy, make_config):
    """Passages in another order than their weights are another row."""
    loss, _ = loss_and_gradients(toy, row, make_config)
    other_loss, _ = loss_and_gradients(toy, permuted(row, "contexts"), make_config)
    assert abs(other_loss - loss) > 1e-4


def test_generation_mixes_as_training_does(row, toy, make_config):
    """The loss of an answer is its mean negative log likelihood under `miso_generate` with the row's weights."""
    tokenizer, _ = toy
    answer = [*tokenizer(row["completion"][0]["content"])["input_ids"], tokenizer.eos_token_id]
    loss, _ = loss_and_gradients(toy, row, make_config)

    def likelihood(row):
        steps = iter(answer)
        forced = {"prefix_allowed_tokens_fn": lambda *_: [next(steps)], "max_new_tokens": len(answer)}
        sequences, logits = generated(toy, row, **forced)
        assert sequences[0].tolist() == answer
        return torch.nn.functional.cross_entropy(logits, sequences[0])

    torch.testing.assert_close(likelihood(row), loss, rtol=1e-6, atol=0)
    assert abs(likelihood(row | {"context_weights": None}) - loss) > 1e-4  # uniform


def test_without_arguments(tmp_path):
    """In a new interpreter, with fewer steps and questions."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(SCRIPT), "--max_steps", "3", "--per_device_train_batch_size", "4", "--held_out", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recall@1: 0.77\n" in done.stdout and "recall@4: 0.96\n" in done.stdout
    assert "100% with several contexts (4.0 on average)" in done.stderr
    assert "  rag-miso: " in done.stdout and "standard inference: '" in done.stdout and "\nMISO: '" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "rag-miso.jsonl").read_text().splitlines()]
    assert len(rows) == 93 and all(abs(sum(row["context_weights"]) - 1) < 1e-12 for row in rows)


def test_files_of_ones_own(rag, passages, questions, toy, tmp_path):
    """A model, a corpus and questions, with a weighting of the setting's in place of the scores."""
    tokenizer, model = toy
    for saved in (tokenizer, build_model(tokenizer)):
        saved.save_pretrained(tmp_path / "base")
    Dataset.from_list([{"text": text} for text in passages[:8]]).to_parquet(tmp_path / "corpus.parquet")
    Dataset.from_list(questions[:18:3]).to_json(tmp_path / "questions.jsonl")
    printed, log = run_python(
        *(SCRIPT, "--corpus", "corpus.parquet", "--questions", "questions.jsonl", "--model", "base"),
        *("--context_weighting", "fid", "--top_k", 2, "--held_out", 2, "--max_steps", 1, "--max_new_tokens", 2),
        *("--output_dir", "out", "--report_to", "none"),
        cwd=tmp_path,
    )
    assert "(2.0 on average)" in log
    assert "  base: " in printed and "  out: " in printed
    assert "context_weights" not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize("row", [{"question": "Where?"}, {"question": "Where?", "answers": "There"}])
def test_questions_without_a_list_of_answers_are_refused(rag, row, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"Got .* in column 'answers', row 0 of .*, expected a list"):
        rag.read(file, {"question": str, "answers": list})
