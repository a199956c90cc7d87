const {statistics: stats, rows} = JSON.parse(document.getElementById("preview").textContent);

const times = (x) => "×\u202f" + x.toFixed(2);
const sum = (xs) => xs.reduce((a, b) => a + b, 0);
const span = (from, length) => (length > 1 ? `${from}–${from + length - 1}` : `${from}`);

/** [1, 4, 5, 6] as "1, 4–6" */
function ranges(xs) {
  const runs = [];
  for (const x of xs) {
    if (runs.length && runs.at(-1)[1] === x - 1) runs.at(-1)[1] = x;
    else runs.push([x, x]);
  }
  return runs.map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(", ");
}

/** ["full", "constraint 1", "constraint 2"] as "full, constraints 1–2" */
function named(names) {
  const words = new Map();
  for (const name of names) {
    const [, word, number] = name.match(/^(.*?)(?: (\d+))?$/);
    words.set(word, [...(words.get(word) || []), ...(number ? [+number] : [])]);
  }
  return [...words].map(([word, xs]) => (xs.length ? `${word}${xs.length > 1 ? "s" : ""} ${ranges(xs)}` : word)).join(", ");
}

/* Statistics */

function histogram(counts, keyed, counted) {
  let keys = Object.keys(counts).map(Number);
  const low = Math.min(...keys), high = Math.max(...keys), most = Math.max(...Object.values(counts));
  if (high - low < 32) keys = Array.from({length: high - low + 1}, (_, i) => low + i);
  const e = el("div", "bars"), texts = keys.map((key) => `${count(key, keyed)}: ${count(counts[key] || 0, counted)}`);
  keys.forEach((key, k) => {
    const n = counts[key] || 0, column = el("div", "", el("span", "", n && keys.length < 15 ? num(n) : ""), el("i"), el("span", "", num(key)));
    column.style.setProperty("--share", n / most);
    column.title = texts[k];
    e.append(column);
  });
  e.setAttribute("role", "img");
  e.setAttribute("aria-label", texts.join("; "));
  return e;
}

function statistics() {
  const {tokens, cost, bins, lengths, cut} = stats, dropped = Object.entries(stats.dropped), statuses = Object.entries(stats.statuses);
  const notes = Object.entries(stats.notes), contexts = Object.entries(stats.contexts_per_answer), lost = sum(dropped.map(([, d]) => d.rows));
  const several = stats.answers > stats.examples;
  const tile = (label, value, note, bad) => el("div", "tile", el("dt", "", label), el("dd", bad ? "value bad" : "value", value), el("dd", "note", note));
  const panel = (...pairs) => el("section", "panel", ...pairs.flatMap(([title, ...kids]) => [el("h2", "", title), ...kids]));
  const tiles = [
    tile("Examples", num(stats.examples), [...Object.entries(stats.modes).map(([mode, n]) => `${num(n)} ${mode}`), several && count(stats.answers, "answer")].filter(Boolean).join(", ")),
    tile("Contexts", num(sum(contexts.map(([k, n]) => k * n)) / Math.max(1, stats.answers)), "per answer, on average"),
    tile("Unique tokens", num(tokens.unique), `${num(tokens.unshared)} if every context had its own copy`),
    tile("Saved by sharing", percent(tokens.saved), "of the unshared tokens"),
    tile("Tokens with loss", num(tokens.labelled), `${percent(tokens.labelled / Math.max(1, tokens.unique))} of the unique tokens`),
    tile("Cut rows", num(cut.rows), cut.rows ? `${count(cut.tokens, "token")} beyond max_length` : "all answers are complete", cut.rows),
    tile("Dropped rows", num(lost), `of ${num(stats.rows)} read`, lost),
  ];
  const percentiles = lengths.percentiles.map((p, i) => [{0: "shortest", 50: "median", 100: "longest"}[p] ?? `${p}\u202f%`,
    lengths.unique_tokens[i], lengths.longest_path[i], lengths.longest_context[i], lengths.output[i]]);
  const bars = [["Contexts per answer", contexts.length ? histogram(stats.contexts_per_answer, "context", "answer") : "no answer"]];
  if (several) bars.push(["Answers per example", histogram(stats.answers_per_example, "answer", "example")]);
  const panels = [panel(...bars),
    panel(["Lengths in tokens", table(["percentile", "unique tokens", "longest path", "longest context", "output"], percentiles)])];
  const work = [], sources = [];
  if (cost) {
    tiles.push(tile("Estimated cost", times(cost.flops), "compute relative to plain SFT"));
    work.push(["Estimated cost relative to SFT", table(["plain SFT on the same full prompts", "×\u202f1"],
      [["tokens", times(cost.tokens)], ["attention scores", times(cost.score_pairs)], [`compute (${cost.model})`, times(cost.flops)]])]);
  }
  if (bins) work.push(["Packing", table(["bins", num(bins.bins)], [["tokens per bin (max_length)", bins.max_length], ["filled", percent(bins.filled)], ["examples per bin", bins.examples_per_bin]])]);
  for (const [title, found] of [["Dropped rows", dropped], ["Notes", notes]]) {
    if (found.length) sources.push([title, table(["reason", "rows", "first row"], found.map(([reason, d]) => [reason, d.rows, String(d.first_row)]))]);
  }
  if (statuses.length) sources.push(["Status given by the source", table(["status", "rows"], statuses)]);
  const read = stats.complete ? `${count(stats.rows, "row")} read` : `only the first ${count(stats.rows, "row")} read`;
  return [
    el("header", "", el("p", "", "Preview of training rows"), el("h1", "", stats.dataset), el("p", "", `${stats.model} · mode ${stats.mode} · ${read}`),
      el("p", "", `train_turns ${stats.train_turns}`), ...stats.warnings.map((warning) => el("p", "bad", `Warning: ${warning}`))),
    el("dl", "tiles", ...tiles), el("div", "panels", ...panels, ...[work, sources].filter((p) => p.length).map((p) => panel(...p))),
  ];
}

function legend() {
  const sample = (s, cls, token, text) => {
    const e = el("span", `s ${cls}`, el("span", `t ${token}`, text));
    if (s !== null) e.dataset.s = s;
    e.style.setProperty("--hue", HUES[0]);
    return el("span", "tokens", e);
  };
  const items = [
    [sample(0, "", "", "colour"), "a segment: a run of tokens that begins with its number and belongs to one or more contexts"],
    [sample(0, "shared", "", "dim"), "tokens that an earlier context or answer shows: computed once"],
    [sample(null, "plain", "loss", "green"), "a token with loss"],
    [sample(null, "plain", "", "plain"), "the head of the output, without loss"],
    [sample(null, "plain", "cut", "struck"), "cut at max_length, not trained on"],
    [el("span", "mark", "↵ ⇥ ⟨1B⟩ ◌"), "line break, tab, invisible character, token without text"],
  ];
  return el("section", "panel legend", el("h2", "", "How to read the rows"), el("ul", "", ...items.map(([mark, text]) => el("li", "", mark, ` ${text}`))),
    el("p", "soft", "A row has one or more answers, each with what it sees: one context, which is the text before it, or several. Each context is a path of segments, read independently of the other contexts. The output of several contexts follows every one of them and mixes them by their weights. " +
      "The output is stored once, after the longest context; its offset moves it to follow another context. Point at a token, tap it, or move with the arrow keys " +
      "to see its id, position and label."));
}

/* Rows */

const SHARED = 60, LONG = 1200; // longer stretches are folded in the middle: those shown before, segments shown first
const trees = new Map();

/** Derived from a row's segments: where each begins, its path, and the answer whose output it is. */
function tree(r) {
  if (!trees.has(r)) {
    const {segments, answers} = rows[r], begins = [0];
    const path = (s) => (s < 0 ? [] : [...path(segments[s].parent), s]);
    for (const {length} of segments) begins.push(begins.at(-1) + length);
    const outputs = new Map(answers.filter((a) => a.contexts.length).map((a) => [a.segment, a]));
    trees.set(r, {begins, path, outputs, length: (s) => sum(path(s).map((k) => segments[k].length))});
  }
  return trees.get(r);
}

const labelled = (labels) => `${num(labels.filter((label) => label !== -100).length)} with loss`;

const each = (make) => (a, b) => Array.from({length: b - a}, (_, i) => make(a + i));

/** The elements `some(from, to)`, the tokens from `head` to `tail` behind a button. */
function folded(some, from, to, head, tail, text) {
  if (head >= tail) return some(from, to);
  const fold = el("button", "fold", text(count(tail - head, "token")));
  fold.onclick = (event) => {
    const hidden = some(head, tail);
    fold.replaceWith(...hidden);
    if (!event.detail) focusToken(hidden[0].matches(".t") ? hidden[0] : hidden[0].querySelector(".t")); // opened by keyboard, whose focus goes with the button
  };
  return [...some(from, head), fold, ...some(tail, to)];
}

/** The tokens from `from` to `to` of segment `s`. */
function segment(r, s, from, to, shared) {
  const row = rows[r], {begins, outputs} = tree(r);
  const [head, tail] = !shared && to - from > LONG ? [from + LONG / 2, to - LONG / 4] : [to, to];
  const make = (i) => {
    const e = glyphs(row.texts[i], row.labels[i] === -100 || shared ? "t" : "t loss");
    e.dataset.i = i;
    return e;
  };
  const plain = outputs.has(s) || row.segments.length === 1;
  const e = el("span", `s${shared ? " shared" : ""}${plain ? " plain" : ""}${from > begins[s] ? " rest" : ""}`,
    ...folded(each(make), from, to, head, tail, (n) => `show ${n} more`));
  e.dataset.s = s;
  e.style.setProperty("--hue", HUES[s % HUES.length]);
  return e;
}

function part(cls, title, about, ...kids) {
  return el("section", `part ${cls}`, el("h3", "", title), el("p", "about", about.filter(Boolean).join(" · ")), tokenGroup(title, ...kids));
}

/** The first `length` tokens of the path to `leaf`, dim where an earlier part showed them. `shown` names the part that showed a token. */
function pathTokens(r, leaf, length, name, shown) {
  const {begins, path} = tree(r), known = [], fresh = [];
  let again = 0, from = "";
  for (const s of path(leaf)) {
    const begin = begins[s], end = Math.min(begins[s + 1], begin + length);
    let middle = begin; // paths are shown from their roots, so what was shown comes first
    while (middle < end && shown[middle]) middle++;
    if (middle > begin) {
      known.push([s, begin, middle, again]);
      again += middle - begin;
      from = shown[middle - 1];
    }
    if (middle < end) fresh.push(segment(r, s, middle, end, false));
    length -= end - begin;
    shown.fill(name, middle, end);
  }
  const some = (a, b) => known.flatMap(([s, begin, end, at]) => {
    const [first, last] = [begin + Math.max(0, a - at), Math.min(end, begin + b - at)];
    return first < last ? [segment(r, s, first, last, true)] : [];
  });
  const [head, tail] = again > SHARED ? [16, again - 12] : [again, again];
  return [[...folded(some, 0, again, head, tail, (n) => `${n} computed once, above`), ...fresh], again && `${num(again)} shared with ${from}`];
}

/** The parts of one answer: its contexts and the output, or the one run in which it stands. `name` is empty for a row's only answer. */
function answerParts(r, answer, name, shown) {
  const row = rows[r], {begins, path, length} = tree(r), {segment: s, start, contexts, cut: texts} = answer, n = texts.length;
  const make = (i) => {
    const e = glyphs(texts[i], "t cut");
    e.dataset.cut = texts[i];
    return e;
  };
  const cut = n ? [el("span", "s plain", ...folded(each(make), 0, n, SHARED, n, (more) => `show ${more} more`))] : [];
  const end = start + answer.length, loss = labelled(row.labels.slice(start, end)), lost = n && `${count(n, "token")} cut`;
  const capital = (text) => text[0].toUpperCase() + text.slice(1);
  if (!contexts.length) {
    const before = length(s) - row.segments[s].length + start - begins[s], all = before + answer.length + answer.tail;
    const [tokens, shared] = pathTokens(r, s, all, name, shown);
    if (!name) return [part("", "One run, context and output", [count(all, "token"), loss, `positions ${span(0, all)}`, lost], ...tokens, ...cut)];
    return [part("output", capital(name), [loss, `sees ${count(before, "token")}`, `positions ${span(before, answer.length)}`, shared, lost], ...tokens, ...cut)];
  }
  const stored = row.segments[s].start;
  const seen = contexts.map(({segment: leaf, weight, offset, name: own}) => {
    const title = name ? `${name}, ${own}` : own, size = length(leaf), [tokens, shared] = pathTokens(r, leaf, size, title, shown);
    const section = part("context", capital(title), [`weight ${+weight.toFixed(3)}`, count(size, "token"), shared], ...tokens);
    section.querySelector(".about").title = `positions ${span(row.segments[path(leaf)[0]].start, size)}, output from ${stored + offset}` +
      (offset ? ` (offset ${num(offset)})` : "");
    return section;
  });
  const about = [count(answer.length, "token"), loss, `positions ${span(stored, answer.length)}`, lost];
  return [el("div", "mixed", el("div", "contexts", ...seen), part("output", capital(name || "output"), about, segment(r, s, start, end, false), ...cut))];
}

function fill(body) {
  const r = +body.parentElement.dataset.r, row = rows[r], {answers} = row, shown = Array(row.ids.length);
  if (body.children.length) return;
  if (row.dropped) return body.append(el("div", "dropped", el("p", "bad", `Dropped: ${row.dropped}`), glyphs(row.raw, "tokens")));
  body.append(...row.notes.map((note) => el("p", "about", `Note: ${note}`)));
  // a row's only run has no name, but its tokens are shown
  answers.forEach((answer, a) => body.append(...answerParts(r, answer, answers.length > 1 ? `answer ${a + 1}` : "", shown)));
}

function details(row, r) {
  const head = [["mode", row.mode], ["", row.status]], {answers} = row, contexts = sum(answers.map((a) => a.contexts.length));
  if (row.dropped) head.push(["bad", `dropped: ${row.dropped}`]);
  else head.push(["", answers.length > 1 && count(answers.length, "answer")],
    ["", (contexts || answers.length === 1) && count(Math.max(1, contexts), "context")], ["", count(row.ids.length, "unique token")],
    ["", row.saved && `${count(row.saved, "repeated token")} saved`], ["", labelled(row.labels)], ["bad", row.cut && `${num(row.cut)} cut`]);
  const texts = head.filter(([, text]) => text).map(([cls, text]) => el("span", cls, text));
  const e = el("details", "row", el("summary", "", el("b", "", `Row ${row.index}`), ...texts), el("div", "body"));
  e.dataset.r = r;
  return e;
}

/* Facts about a token */

/** "38 (35 in context 2)": the stored position, then the positions to which offsets move it. */
function positions(r, s, i) {
  const {begins, outputs} = tree(r), stored = rows[r].segments[s].start + i - begins[s], moved = new Map();
  if (!outputs.has(s)) return `${stored}`;
  for (const {offset, name} of outputs.get(s).contexts) if (offset) moved.set(offset, [...(moved.get(offset) || []), name]);
  if (!moved.size) return `${stored} in every context`;
  const groups = [...moved].sort(([a], [b]) => b - a), rest = groups.splice(groups.length > 5 ? 4 : 5);
  const texts = groups.map(([offset, names]) => `${stored + offset} in ${named(names)}`);
  if (rest.length) texts.push(`${stored + rest.at(-1)[0]} to ${stored + rest[0][0]} in ${sum(rest.map(([, names]) => names.length))} others`);
  return `${stored} (${texts.join("; ")})`;
}

/** The segment's number and where it stands. */
function whereabouts(r, s) {
  const {segments} = rows[r], {outputs} = tree(r), {parent} = segments[s];
  if (outputs.has(s)) return `${s}, the output`;
  if (segments.length === 1) return `${s}`;
  return parent < 0 ? `${s}, begins its path` : `${s}, after segment ${parent}`;
}

/** Which answers see a token, and in which contexts: "all 3 contexts", "full, bare (2 of 3)", "answers 1–2; full (1 of 3) of answer 3". */
function seenBy(r, s, i) {
  const {answers} = rows[r], {path} = tree(r), whole = [], some = [];
  answers.forEach(({segment: own, start, length, contexts}, a) => {
    const names = contexts.filter(({segment: leaf}) => path(leaf).includes(s)).map(({name}) => name), of = answers.length > 1 ? ` of answer ${a + 1}` : "";
    if (!contexts.length ? path(own).includes(s) && (own !== s || i < start + length) : own === s || names.length === contexts.length) whole.push(a + 1);
    else if (names.length) some.push(`${named(names)} (${names.length} of ${contexts.length})${of}`);
  });
  if (answers.length === 1) return some[0] ?? `all ${count(answers[0].contexts.length, "context")}`;
  const first = whole.length ? [`answer${whole.length > 1 ? "s" : ""} ${ranges(whole)}`] : [];
  return [...first, ...some].join("; ") || "no answer";
}

/** Pairs of a name and a value; null for the tokens of the legend. */
function facts(t) {
  if (!t.closest(".row")) return null;
  const r = +t.closest(".row").dataset.r, row = rows[r], i = +t.dataset.i, {outputs} = tree(r), {answers} = row;
  if (t.classList.contains("cut")) return [["token", repr(t.dataset.cut)], ["label", "no loss: cut at max_length"]];
  const s = +t.closest(".s").dataset.s;
  const pairs = [["token", repr(row.texts[i])], ["id", String(row.ids[i])], ["segment", whereabouts(r, s)],
    ["position", positions(r, s, i)], ["label", row.labels[i] === -100 ? "no loss" : "loss"]];
  if (outputs.has(s)) pairs.push(["follows", `all ${count(outputs.get(s).contexts.length, "context")}`]);
  else if (answers.length > 1 || answers[0].contexts.length) pairs.push([answers.length > 1 ? "seen by" : "seen in", seenBy(r, s, i)]);
  return pairs;
}

/** The token's segment wherever the row shows it. */
const related = (t) => t.closest(".row").querySelectorAll(`.s[data-s="${t.closest(".s").dataset.s}"]`);

/* The page */

listen();

// Rows are filled when they come near the window, so that hundreds of unread rows cost nothing.
const all = rows.map(details), near = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) fill(entry.target);
}, {rootMargin: "600px"});
const buttons = [["Open all", true], ["Close all", false]].map(([text, open]) => {
  const button = el("button", "", text);
  button.onclick = () => all.forEach((e) => (e.open = open));
  return button;
});
main.append(...statistics(), legend(), el("div", "bar", el("h2", "", count(rows.length, "row")), ...buttons), ...all);
document.title = `${stats.dataset} · preview`;
let budget = 4000; // tokens of the rows that are open at first
all.forEach((e, r) => {
  e.open = (budget -= rows[r].ids.length) > 0 || r === 0;
  near.observe(e.lastChild);
});
addEventListener("beforeprint", () => all.filter((e) => e.open).forEach((e) => fill(e.lastChild)));
