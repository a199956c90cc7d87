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

/* Statistics */

function histogram(counts) {
  let keys = Object.keys(counts).map(Number);
  const low = Math.min(...keys), high = Math.max(...keys), most = Math.max(...Object.values(counts));
  if (high - low < 32) keys = Array.from({length: high - low + 1}, (_, i) => low + i);
  const e = el("div", "bars"), texts = keys.map((key) => `${count(key, "context")}: ${count(counts[key] || 0, "example")}`);
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
  const contexts = Object.entries(stats.contexts_per_example), lost = sum(dropped.map(([, d]) => d.rows));
  const tile = (label, value, note, bad) => el("div", "tile", el("dt", "", label), el("dd", bad ? "value bad" : "value", value), el("dd", "note", note));
  const panel = (...pairs) => el("section", "panel", ...pairs.flatMap(([title, ...kids]) => [el("h2", "", title), ...kids]));
  const tiles = [
    tile("Examples", num(stats.examples), Object.entries(stats.modes).map(([mode, n]) => `${num(n)} ${mode}`).join(", ")),
    tile("Contexts", num(sum(contexts.map(([k, n]) => k * n)) / Math.max(1, stats.examples)), "per example, on average"),
    tile("Unique tokens", num(tokens.unique), `${num(tokens.unshared)} if every context had its own copy`),
    tile("Saved by sharing", percent(tokens.saved), "of the unshared tokens"),
    tile("Tokens with loss", num(tokens.labelled), `${percent(tokens.labelled / Math.max(1, tokens.unique))} of the unique tokens`),
    tile("Cut outputs", num(cut.rows), cut.rows ? `${count(cut.tokens, "token")} beyond max_length` : "all outputs are complete", cut.rows),
    tile("Dropped rows", num(lost), `of ${num(stats.rows)} read`, lost),
  ];
  const percentiles = lengths.percentiles.map((p, i) => [{0: "shortest", 50: "median", 100: "longest"}[p] ?? `${p}\u202f%`,
    lengths.unique_tokens[i], lengths.longest_context[i], lengths.output[i]]);
  const panels = [panel(["Contexts per example", contexts.length ? histogram(stats.contexts_per_example) : "no example"]),
    panel(["Lengths in tokens", table(["percentile", "unique tokens", "longest context", "output"], percentiles)])];
  const work = [], sources = [];
  if (cost) {
    tiles.push(tile("Estimated cost", times(cost.flops), "compute relative to plain SFT"));
    work.push(["Estimated cost relative to SFT", table(["plain SFT on the same full prompts", "×\u202f1"],
      [["tokens", times(cost.tokens)], ["attention scores", times(cost.score_pairs)], [`compute (${cost.model})`, times(cost.flops)]])]);
  }
  if (bins) work.push(["Packing", table(["bins", num(bins.bins)], [["tokens per bin (max_length)", bins.max_length], ["filled", percent(bins.filled)], ["examples per bin", bins.examples_per_bin]])]);
  if (dropped.length) sources.push(["Dropped rows", table(["reason", "rows", "first row"], dropped.map(([reason, d]) => [reason, d.rows, String(d.first_row)]))]);
  if (statuses.length) sources.push(["Status given by the source", table(["status", "rows"], statuses)]);
  const read = stats.complete ? `${count(stats.rows, "row")} read` : `only the first ${count(stats.rows, "row")} read`;
  return [
    el("header", "", el("p", "", "Preview of training rows"), el("h1", "", stats.dataset), el("p", "", `${stats.model} · mode ${stats.mode} · ${read}`)),
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
    [sample(0, "shared", "", "dim"), "a segment that an earlier context shows: computed once"],
    [sample(null, "plain", "loss", "green"), "a token with loss"],
    [sample(null, "plain", "", "plain"), "the head of the output, without loss"],
    [sample(null, "plain", "cut", "struck"), "cut at max_length, not trained on"],
    [el("span", "mark", "↵ ⇥ ⟨1B⟩ ◌"), "line break, tab, invisible character, token without text"],
  ];
  return el("section", "panel legend", el("h2", "", "How to read the rows"), el("ul", "", ...items.map(([mark, text]) => el("li", "", mark, ` ${text}`))),
    el("p", "soft", "Each context is a path of segments, read independently of the other contexts. The output follows every context and mixes them by their weights. " +
      "The output is stored once, after the longest context; its offset moves it to follow another context. Point at a token, tap it, or move with the arrow keys " +
      "to see its id, position and label."));
}

/* Rows */

const SHARED = 60, LONG = 1200; // longer segments are folded in the middle: those shown before, those shown first
const trees = new Map();

/** Derived from a row's segments: where each begins, the path of each context, and the contexts (from 1) that see each segment. */
function tree(r) {
  if (!trees.has(r)) {
    const {segments, contexts, ids} = rows[r], output = contexts.length ? segments.length - 1 : -1;
    const path = (s) => (s < 0 ? [] : [...path(segments[s].parent), s]);
    const paths = contexts.map((context) => path(context.segment)), begins = [0];
    for (const {length} of segments) begins.push(begins.at(-1) + length);
    const seen = segments.map((_, s) => paths.flatMap((p, c) => (s === output || p.includes(s) ? [c + 1] : [])));
    const lengths = paths.map((p) => sum(p.map((s) => segments[s].length)));
    trees.set(r, {paths, begins, seen, output, lengths, saved: output < 0 ? 0 : sum(lengths) + segments[output].length - ids.length});
  }
  return trees.get(r);
}

const labelled = (row) => `${num(row.labels.filter((label) => label !== -100).length)} with loss`;

/** The tokens `make(from) ... make(to - 1)`, those from `head` to `tail` behind a button. */
function folded(make, from, to, head, tail, text) {
  const some = (a, b) => Array.from({length: b - a}, (_, i) => make(a + i));
  if (head >= tail) return some(from, to);
  const fold = el("button", "fold", text(count(tail - head, "token")));
  fold.onclick = (event) => {
    const hidden = some(head, tail);
    fold.replaceWith(...hidden);
    if (!event.detail) focusToken(hidden[0]); // opened by keyboard, whose focus goes with the button
  };
  return [...some(from, head), fold, ...some(tail, to)];
}

function segment(r, s, shared) {
  const row = rows[r], {begins, output} = tree(r), [from, to] = [begins[s], begins[s + 1]];
  let [head, tail] = [to, to];
  if (shared && to - from > SHARED) [head, tail] = [from + 16, to - 12];
  if (!shared && to - from > LONG) [head, tail] = [from + LONG / 2, to - LONG / 4];
  const make = (i) => {
    const e = glyphs(row.texts[i], row.labels[i] === -100 ? "t" : "t loss");
    e.dataset.i = i;
    return e;
  };
  const e = el("span", `s${shared ? " shared" : ""}${s === output || output < 0 ? " plain" : ""}`,
    ...folded(make, from, to, head, tail, (n) => (shared ? `${n} computed once, above` : `show ${n} more`)));
  e.dataset.s = s;
  e.style.setProperty("--hue", HUES[s % HUES.length]);
  return e;
}

function part(cls, title, about, ...kids) {
  return el("section", `part ${cls}`, el("h3", "", title), el("p", "about", about.filter(Boolean).join(" · ")), tokenGroup(title, ...kids));
}

function fill(body) {
  const r = +body.parentElement.dataset.r, row = rows[r], {paths, output, lengths, seen} = tree(r), n = row.cut.length;
  if (body.children.length) return;
  if (row.dropped) return body.append(el("div", "dropped", el("p", "bad", `Dropped: ${row.dropped}`), glyphs(row.raw, "tokens")));
  const make = (i) => {
    const e = glyphs(row.cut[i], "t cut");
    e.dataset.cut = i;
    return e;
  };
  const cut = n ? [el("span", "s plain", ...folded(make, 0, n, SHARED, n, (more) => `show ${more} more`))] : [];
  const {start, length} = row.segments.at(-1), about = [count(length, "token"), labelled(row), `positions ${span(start, length)}`, n && `${count(n, "token")} cut`];
  if (output < 0) return body.append(part("", "One run, context and output", about, segment(r, 0, false), ...cut));
  const shown = new Set();
  const contexts = row.contexts.map(({weight, offset}, c) => {
    const again = paths[c].filter((s) => shown.has(s)), shared = sum(again.map((s) => row.segments[s].length));
    const e = part("context", `Context ${c + 1}`, [`weight ${+weight.toFixed(3)}`, count(lengths[c], "token"),
      `positions ${span(row.segments[paths[c][0]].start, lengths[c])}`, `output from ${start + offset}${offset ? ` (offset ${num(offset)})` : ""}`,
      shared && `${num(shared)} shared with context ${seen[again.at(-1)][0]}`], ...paths[c].map((s) => segment(r, s, shown.has(s))));
    paths[c].forEach((s) => shown.add(s));
    return e;
  });
  body.classList.add("mixed");
  body.append(el("div", "contexts", ...contexts), part("output", "Output", about, segment(r, output, false), ...cut));
}

function details(row, r) {
  const {saved} = tree(r), head = [["mode", row.mode], ["", row.status]];
  if (row.dropped) head.push(["bad", `dropped: ${row.dropped}`]);
  else head.push(["", count(Math.max(1, row.contexts.length), "context")], ["", count(row.ids.length, "unique token")],
    ["", saved && `${count(saved, "repeated token")} saved`], ["", labelled(row)], ["bad", row.cut.length && `${num(row.cut.length)} cut`]);
  const texts = head.filter(([, text]) => text).map(([cls, text]) => el("span", cls, text));
  const e = el("details", "row", el("summary", "", el("b", "", `Row ${row.index}`), ...texts), el("div", "body"));
  e.dataset.r = r;
  return e;
}

/* Facts about a token */

/** "38 (35 in context 2)": the stored position, then the positions to which offsets move it. */
function positions(r, s, i) {
  const {segments, contexts} = rows[r], {begins, output} = tree(r), stored = segments[s].start + i - begins[s], moved = new Map();
  if (s !== output) return `${stored}`;
  contexts.forEach(({offset}, c) => offset && moved.set(offset, [...(moved.get(offset) || []), c + 1]));
  if (!moved.size) return `${stored} in every context`;
  const groups = [...moved].sort(([a], [b]) => b - a), rest = groups.splice(groups.length > 5 ? 4 : 5);
  const texts = groups.map(([offset, cs]) => `${stored + offset} in context${cs.length > 1 ? "s" : ""} ${ranges(cs)}`);
  if (rest.length) texts.push(`${stored + rest.at(-1)[0]} to ${stored + rest[0][0]} in ${sum(rest.map(([, cs]) => cs.length))} others`);
  return `${stored} (${texts.join("; ")})`;
}

/** The segment's number and where it stands. */
function whereabouts(row, s, output) {
  const {parent} = row.segments[s];
  if (s === output) return `${s}, the output`;
  if (!row.contexts.length) return `${s}`;
  return parent < 0 ? `${s}, begins its path` : `${s}, after segment ${parent}`;
}

/** Pairs of a name and a value; null for the tokens of the legend. */
function facts(t) {
  if (!t.closest(".row")) return null;
  const r = +t.closest(".row").dataset.r, row = rows[r], i = +t.dataset.i, {output, seen} = tree(r), n = row.contexts.length;
  if (t.dataset.cut) return [["token", repr(row.cut[t.dataset.cut])], ["label", "no loss: cut at max_length"]];
  const s = +t.closest(".s").dataset.s;
  const pairs = [["token", repr(row.texts[i])], ["id", String(row.ids[i])], ["segment", whereabouts(row, s, output)],
    ["position", positions(r, s, i)], ["label", row.labels[i] === -100 ? "no loss" : "loss"]];
  const contexts = seen[s].length === n ? `all ${count(n, "context")}` : `${seen[s].length} of ${count(n, "context")}: ${ranges(seen[s])}`;
  if (n) pairs.push([s === output ? "follows" : "seen in", contexts]);
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
