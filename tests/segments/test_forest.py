"""Rows of several answers: the forest holds every answer with what it sees, and every label once."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.answers import answers
from trl_miso.segments import ROOT, Answer, Example, Segment, lay_out, single, unshare_row

bounded = settings(max_examples=300, deadline=None)


def literal(made):
    """What is trained: for each label its value, what it sees in each branch with distances, and the branches' weights."""
    trained = Counter()
    for answer in made:
        lengths = [len(context) for context in answer.contexts]
        end = sum(lengths) if answer.positions == "chunks" else max(lengths)
        for t, label in enumerate(answer.labels):
            if label == -100:
                continue
            views, begin = [], 0
            for context, weight in zip(answer.contexts, answer.weights or [1.0], strict=True):
                gap = {"successive": 0, "after_longest": end - len(context), "chunks": end - begin - len(context)}
                begin += len(context)
                seen = tuple(context), tuple(answer.output[:t])
                views.append((seen, gap[answer.positions], weight))
            trained[label, tuple(views)] += 1
    return trained


def laid_out(ids, labels, example):
    """The same as `literal`, read from an example by walking up its segments."""
    bounds = [0]
    for segment in example.segments:
        bounds.append(bounds[-1] + segment.length)
    outputs = {output.segment: output.branches for output in example.outputs}

    def above(s):
        tokens = []
        while s != ROOT:
            tokens = ids[bounds[s] : bounds[s + 1]] + tokens
            s = example.segments[s].parent
        return tokens

    trained = Counter()
    for s, segment in enumerate(example.segments):
        own = ids[bounds[s] : bounds[s + 1]]
        assert labels[bounds[s]] == -100, "the first token of a segment is not predicted within it"
        for t, label in enumerate(labels[bounds[s] : bounds[s + 1]]):
            if label == -100:
                continue
            views = []
            for branch in outputs.get(s, ()):
                gap = segment.start + branch.offset - example.end(branch.segment)
                views.append(((tuple(above(branch.segment)), tuple(own[:t])), gap, branch.weight))
            if s not in outputs:
                views.append(((tuple(above(segment.parent) + own[:t]),), 0, 1.0))
            trained[label, tuple(views)] += 1
    return trained


def joined(trained):
    """Runs seen as one list of tokens, since a forest does not say where their context ends."""
    whole = Counter()
    for (label, views), count in trained.items():
        if len(views) == 1:
            (((*parts,), gap, weight),) = views
            views = ((sum(parts, ()),), gap, weight)
        whole[label, views] += count
    return whole


@bounded
@given(answers())
def test_the_forest_trains_every_answer_once_with_what_it_sees(made):
    ids, labels, example = lay_out(made)
    assert len(ids) == len(labels) == example.num_tokens
    assert joined(laid_out(ids, labels, example)) == joined(literal(made))


@bounded
@given(answers())
def test_without_sharing_the_same_is_trained(made):
    ids, labels, example = lay_out(made)
    unshared, copied_ids, copied_labels = unshare_row(example, ids, labels)
    assert all(segment.parent == ROOT for segment in unshared.segments)
    assert len(copied_ids) == unshared.num_tokens == example.num_unshared_tokens
    assert joined(laid_out(copied_ids, copied_labels, unshared)) == joined(literal(made))


@bounded
@given(answers())
def test_sharing_never_adds_tokens(made):
    """At most each context and each output once, never a segment without tokens, and no longer path than before."""
    example = lay_out(made)[2]
    assert example.num_tokens <= sum(sum(map(len, answer.contexts)) + len(answer.output) for answer in made)
    assert all(segment.length for segment in example.segments)
    assert example.longest == max(max(map(len, answer.contexts)) + len(answer.output) for answer in made)


def run(context, output):
    return Answer([context], output, [-100, *output[1:]])


def test_a_conversation_is_one_causal_run():
    """Each turn's history holds the turns before it: `[1 2 | 3 4 | 5 | 6 7]`, answers `3 4` and `6 7`."""
    ids, labels, example = lay_out([run([1, 2], [3, 4]), run([1, 2, 3, 4, 5], [6, 7])])
    assert example == single(7)
    assert ids == [1, 2, 3, 4, 5, 6, 7]
    assert labels == [-100, -100, -100, 4, -100, -100, 7]


def test_a_turn_that_later_turns_see_otherwise_is_a_leaf():
    """The first answer is `3 9 4`, of which later turns see `3 4` (its thinking 9 is stripped)."""
    ids, labels, example = lay_out([run([1, 2], [3, 9, 4]), run([1, 2, 3, 4, 5], [6, 7])])
    assert ids == [1, 2, 3, 9, 4, 3, 4, 5, 6, 7]
    assert labels == [-100] * 3 + [9, 4] + [-100] * 4 + [7]
    assert example == Example((Segment(2, ROOT, 0), Segment(3, 0, 2), Segment(5, 0, 2)))


def test_equal_answers_count_twice():
    ids, labels, example = lay_out([run([1, 2], [3, 4]), run([1, 2], [3, 4])])
    assert ids == [1, 2, 3, 4, 3, 4]
    assert [label for label in labels if label != -100] == [4, 4]


def test_answers_of_one_prompt_share_it():
    example = lay_out([run(list(range(50)), [50, i]) for i in range(60, 64)])[2]
    assert example.num_tokens == 50 + 4 * 2


def test_mixed_answers_share_their_history():
    """A demonstration's answer is labelled in the prefix that the contexts of the row have in common."""
    history = [1, 2, 3, 4]
    mixed = Answer([[*history, 5, 6], [*history, 5], [*history, 6]], [7, 8], [-100, 8], [0.5, 0.25, 0.25])
    ids, labels, example = lay_out([run([1, 2], [3, 4]), mixed])
    assert ids == [1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert labels == [-100, -100, -100, 4, -100, -100, -100, -100, 8]
    assert [output.segment for output in example.outputs] == [4]
    assert len(example.branches) == 3


def test_completions_share_the_contexts_that_hold_a_demonstration():
    """The first context takes over the labels of the demonstration, and stays a context beside its equal."""
    contexts = [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    mixed = [Answer(contexts, [7, last], [-100, last], [0.5, 0.5]) for last in (8, 9)]
    ids, labels, example = lay_out([run([1, 2], [3, 4]), *mixed])
    assert ids == [1, 2, 3, 4, 5, 7, 8, 7, 9]
    assert labels == [-100, -100, -100, 4, -100, -100, 8, -100, 9]
    assert [branch.segment for branch in example.branches] == [1, 0, 1, 0]


@bounded
@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.lists(st.integers(1, 3), min_size=2, max_size=5))
def test_one_answer_is_one_run(context, output):
    assert lay_out([run(context, output)])[2] == single(len(context) + len(output))
