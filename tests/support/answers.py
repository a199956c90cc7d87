"""Random rows of several answers, whose contexts and runs often have tokens in common."""

from hypothesis import strategies as st

from trl_miso.segments import Answer


@st.composite
def answers(draw, positions=("successive", "after_longest", "chunks"), most=4):
    """One to `most` answers: causal runs, para and succ, with histories that continue each other."""
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=4)
    history = draw(tokens)
    made = []
    for _ in range(draw(st.integers(1, most))):
        history = draw(st.sampled_from([history, history[: 1 + len(history) // 2]])) + draw(tokens)
        head, body = draw(tokens), draw(tokens)
        labels = [-100] * len(head) + [token if draw(st.booleans()) else -100 for token in body[:-1]] + body[-1:]
        where = draw(st.sampled_from(["run", "run", *positions]))
        contexts, weights = [history], []
        if where == "chunks" and len(history) > 1:
            cut = draw(st.integers(1, len(history) - 1))
            contexts, weights = [history[:cut], history[cut:]], [0.5, 0.5]
        elif where in ("successive", "after_longest"):
            contexts = [history, *(history[:1] + part for part in draw(st.lists(tokens, min_size=1, max_size=3)))]
            shares = [draw(st.floats(0.05, 1.0)) for _ in contexts]
            weights = [share / sum(shares) for share in shares]
        made.append(Answer(contexts, head + body, labels, weights, where if len(contexts) > 1 else "successive"))
        if draw(st.integers(0, 3)) == 0:  # another completion
            made.append(made[-1]._replace(output=[*head, *body, 2], labels=[*labels, 2]))
        if draw(st.booleans()):
            history = history + head + body
    return made
