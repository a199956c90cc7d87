const {report, figures} = JSON.parse(document.getElementById("report").textContent);
const {models, shown, rows: read} = report;
const compares = models.length > 1;

const KIND = {output: "the output itself", constraint: "constraint", base: "base instruction", system: "system", earlier: "earlier turn", rest: "markup and the rest"};

/** A share as a percentage: two significant digits below 0.1 %. */
function share(x) {
  let digits = (100 * x).toFixed(Math.abs(x) < .01 ? 2 : 1);
  if (Math.abs(x) < .001) digits = (100 * x).toPrecision(2);
  return (x === 0 ? "0" : digits).replace("-", "−") + "\u202f%";
}
const range = (xs) => (xs ? `${xs[0].toFixed(2)} (${xs[1].toFixed(2)} to ${xs[2].toFixed(2)})` : "too few");
const short = (name) => (name.length > 40 ? "…" + name.slice(-40) : name);

/** The parts of the row, each with a short mark and a name; constraints are numbered. */
const parts = shown.parts.map(({kind, text}, p) => {
  const number = shown.parts.slice(0, p + 1).filter((other) => other.kind === "constraint").length;
  return {kind, text, hue: HUES[p % HUES.length], mark: kind === "constraint" ? `${number}` : kind[0].toUpperCase() + kind.slice(1),
    name: kind === "constraint" ? `constraint ${number}` : KIND[kind]};
});

/* All rows */

const names = models.map((m) => short(m.name));
const panel = (title, note, heads, lines) => el("section", "panel", el("h2", "", title), el("div", "scroll", table(heads, lines)), el("p", "note", note));

/** Attention by part of the prompt. */
function kindsPanel() {
  const kinds = Object.keys(KIND).filter((kind) => models.some((m) => m.kinds[kind]));
  const points = (x) => (100 * x).toFixed(1).replace(/^-0\.0$/, "0.0").replace("-", "−");
  const change = ({mean, interval}) => `${points(mean)}${interval ? ` (${interval.map(points).join(" to ")})` : ""}`;
  const plural = {...KIND, constraint: "all constraints", earlier: "earlier turns"};
  const lines = kinds.map((kind) => {
    const line = [plural[kind], ...models.map((m) => share(m.kinds[kind]))];
    if (report.compared) line.push(change(report.compared[kind]));
    return line;
  });
  let note = "Means over rows, layers, heads and the tokens of the answers, each measured where it is predicted. Every token is in one part, so that the shares " +
    "of a model sum to one. The output begins with the generation prompt.";
  if (report.compared) note += " The change is computed per row, with the 95\u202f% interval of a bootstrap over rows. What MISO is after: more attention on the " +
    "constraints, each of which should lose little as others are added. Attention alone is no result: what counts is how many constraints are followed.";
  return panel("Where attention goes", note, ["mean share of attention", ...names, ...(report.compared ? ["change, points"] : [])], lines);
}

function constraintsPanel() {
  const numbers = [...new Set(models.flatMap((m) => m.by_constraints.map((line) => line.constraints)))].filter(Boolean).sort((a, b) => a - b);
  if (!numbers.length) return [];
  const known = models.some((m) => m.by_constraints.some((line) => line.known));
  const columns = (cells) => (known ? cells : cells.slice(0, 2)); // no answer was checked
  const heads = names.flatMap((name) => columns([compares ? `each, ${name}` : "attention on each", "if alone", "followed"]));
  const lines = numbers.map((n) => {
    const groups = models.map((m) => m.by_constraints.find((line) => line.constraints === n));
    const cells = groups.flatMap((line) => {
      if (!line) return columns(["", "", ""]);
      return columns([share(line.mass_each), share(line.mass_alone), line.known ? `${line.followed} of ${line.known}` : "unknown"]);
    });
    return [String(n), Math.max(...groups.map((line) => line?.rows ?? 0)), ...cells];
  });
  return [panel("By number of constraints", "If alone: the attention on a constraint that is the only one in the prompt, before the same answer.", ["constraints", "rows", ...heads], lines)];
}

function followedPanel() {
  const mean = (x, n) => (x === null ? `n\u00a0=\u00a0${n}` : `${share(x)} (n\u00a0=\u00a0${n})`);
  const lines = [];
  for (const m of models) {
    for (const [measure, r] of Object.entries(m.relation)) {
      if (!r.constraints) continue;
      const label = `${short(m.name)}, ${measure === "mass" ? "attention" : "attention per token"}`;
      lines.push([label, mean(r.mean_followed, r.followed), mean(r.mean_others, r.constraints - r.followed), range(r.auc), range(r.auc_in_row)]);
    }
  }
  if (!lines.length) return [];
  return [panel("Attention on constraints that are followed, and on others", "AUC: how often a followed constraint has more attention than one that is not followed; " +
    "0.5 is no relation. In brackets the 95\u202f% interval of a bootstrap over rows. A correlation, not a cause: easy constraints may also be the long ones, for any model.",
    ["", "followed", "not followed", "AUC", "AUC within rows"], lines)];
}

function contextsPanel() {
  const mixed = models.filter((m) => m.contexts);
  if (!mixed.length) return [];
  const label = {full: "the full context", constraint: "a constraint's context", bare: "the bare request", context: "a context"};
  const contexts = [...new Set(mixed.flatMap((m) => Object.keys(m.contexts.mass)))];
  const lines = contexts.map((name) => [`mass of ${label[name]}`, ...mixed.map((m) => (name in m.contexts.mass ? share(m.contexts.mass[name]) : ""))]);
  lines.push(["the output's share in the mixture", ...mixed.map((m) => share(m.contexts.output_share))]);
  return [panel("Under several contexts", "A context's mass is the attention that an output token would give to the context if it were the only one: sigmoid(l\u1d62 − l\u2092\u1d64\u209c).",
    ["mean over rows", ...mixed.map((m) => short(m.name))], lines)];
}

function heading() {
  const left = Object.entries(read.skipped).map(([reason, {rows: n, first_row}]) => el("p", "soft", `${count(n, "row")} left out (first: row ${first_row}): ${reason}`));
  const of = `${num(read.measured)} of ${count(read.read, "row")} · ${report.answers === "generated" ? "the models' own answers" : "the rows' answers"} · standard attention`;
  return el("header", "", el("p", "", "Attention to sub-contexts"), el("h1", "", names.join(" → ")), el("p", "", `${read.dataset} · ${of}`), ...left);
}

/* One row */

const DIFFERENCE = models.length; // the view after those of the models
let view = 0, layer = 0; // layer 0: mean over layers

/** The model of the view; the difference shows the answer of the last one. */
const viewed = () => Math.min(view, models.length - 1);

/** A mass per token of the prompt, or its change. */
function values() {
  if (view < DIFFERENCE) return shown.models[view].layers[layer];
  return shown.models[1].layers[layer].map((x, i) => x - shown.models[0].layers[layer][i]);
}

/** The value of the darkest colour: the largest of the instruction's tokens, since markup often has more and would hide all others. */
function darkest() {
  const owners = shown.models[0].owners, instruction = new Set(["base", "constraint"]);
  const lists = view < DIFFERENCE ? shown.models.map((m) => m.layers[layer]) : [values().map(Math.abs)];
  let top = 1e-12;
  for (const xs of lists) {
    xs.forEach((x, i) => {
      if (instruction.has(parts[owners[i]].kind)) top = Math.max(top, x);
    });
  }
  return top;
}

const tint = (x, top) => {
  const level = Math.sqrt(Math.min(1, Math.abs(x) / top));
  return `color-mix(in srgb, var(${x < 0 ? "--less" : "--heat"}) ${(100 * level).toFixed(0)}%, transparent)`;
};

/** Tokens in runs of one part; each run begins with the part's mark. */
function runs(texts, owners, where) {
  const spans = [];
  texts.forEach((text, i) => {
    const owner = owners[i], {kind, hue, mark} = parts[owner];
    if (!i || owners[i - 1] !== owner) {
      const s = el("span", `s ${kind === "rest" ? "plain rest" : ""}`);
      if (kind !== "rest") s.dataset.s = mark;
      s.dataset.p = owner;
      s.style.setProperty("--hue", hue);
      spans.push(s);
    }
    const t = glyphs(text, "t");
    t.dataset.i = i;
    t.dataset.where = where;
    spans.at(-1).append(t);
  });
  return tokenGroup(`The ${where}`, ...spans);
}

function verdict(kind, followed) {
  if (followed === null) return el("span", "soft", kind === "constraint" ? "?" : "");
  return el("span", followed ? "followed" : "broken", followed ? "✓" : "✗");
}

function partsTable() {
  const measured = models.map((m) => m.rows[0].parts), top = Math.max(...measured.flat().map((p) => p.mass));
  // Given answers have one verdict for all models, in the last column.
  const judged = models.map((_, k) => k === models.length - 1 || report.answers !== "given");
  const lines = parts.map(({kind, text, hue, mark, name}, p) => {
    const chip = el("span", `chip ${kind === "rest" ? "rest" : ""}`, mark), words = text.trim().replace(/\s+/g, " ");
    chip.style.setProperty("--hue", hue);
    const verbatim = kind === "constraint" || kind === "base";
    const head = el("span", "", chip, verbatim ? glyphs(words.length > 64 ? `${words.slice(0, 64)} …` : words, "quote") : name);
    const line = [head, measured[0][p].tokens];
    measured.forEach((ofModel, k) => {
      const {mass, tokens, followed} = ofModel[p], gauge = el("span", "gauge", el("i"), el("b", "", share(mass)));
      gauge.style.setProperty("--share", mass / top);
      gauge.title = `${share(mass / Math.max(1, tokens))} per token`;
      line.push(gauge);
      if (judged[k]) line.push(verdict(kind, followed));
    });
    return line;
  });
  const heads = models.flatMap((m, k) => [compares ? short(m.name) : "attention", ...(judged[k] ? ["followed"] : [])]);
  const e = table(["part", "tokens", ...heads], lines);
  e.classList.add("parts");
  return el("div", "scroll", e);
}

/** Pairs of a name and a value. */
function facts(t) {
  const i = +t.dataset.i, model = shown.models[viewed()];
  if (t.dataset.where === "prompt") {
    const masses = shown.models.map((m, k) => [compares ? names[k] : "attention", share(m.layers[layer][i])]);
    if (compares) masses.push(["change", share(shown.models[1].layers[layer][i] - shown.models[0].layers[layer][i])]);
    return [["token", repr(model.prompt[i])], ["part", parts[model.owners[i]].name], ["place", `${i + 1} of ${model.prompt.length}`], ...masses];
  }
  const looks = model.looks[i].map((x, p) => [parts[p].name, share(x), x]).sort((a, b) => b[2] - a[2]).slice(0, 12);
  return [["token", repr(model.answer[i])], ["place", `${i + 1} of ${model.answer.length}`], ...looks];
}

/** All tokens of the same part. */
const related = (t) => main.querySelectorAll(`.s[data-p="${t.closest(".s").dataset.p}"]`);

const promptTokens = runs(shown.models[0].prompt, shown.models[0].owners, "prompt"), answer = el("div"), scale = el("p", "soft");

function colour() {
  const xs = values(), top = darkest(), model = shown.models[viewed()];
  promptTokens.querySelectorAll(".t").forEach((t) => t.style.setProperty("--fill", tint(xs[+t.dataset.i], top)));
  const meaning = view < DIFFERENCE ? "the attention that the answer gives to a token" : "the attention that a token gains (orange) or loses (blue)";
  scale.textContent = `Colour: ${meaning}, darkest at ${share(top)} or more, ${layer ? `layer ${layer}` : "mean over layers"}, mean over heads and the tokens of the answer.`;
  const tokens = runs(model.answer, model.answer.map(() => 0), "answer");
  const onConstraints = model.looks.map((look) => look.reduce((total, x, p) => total + (parts[p].kind === "constraint" ? x : 0), 0));
  const highest = Math.max(1e-12, ...onConstraints);
  tokens.querySelectorAll(".t").forEach((t) => t.style.setProperty("--fill", tint(onConstraints[+t.dataset.i] ** 2 / highest, highest)));
  answer.replaceChildren(el("h3", "", compares ? `The answer (${names[viewed()]})` : "The answer"),
    el("p", "about", `Colour: the attention on constraints where a token is predicted, darkest at ${share(highest)}, mean over all layers and heads.`), tokens);
}

function controls() {
  const e = el("div", "controls");
  if (compares) {
    const views = el("div", "group");
    const buttons = [...names, "difference"].map((name, v) => {
      const button = el("button", "", name);
      button.onclick = () => {
        view = v;
        buttons.forEach((other, k) => other.setAttribute("aria-pressed", String(k === v)));
        point(null);
        colour();
      };
      button.setAttribute("aria-pressed", String(v === view));
      return button;
    });
    views.append(...buttons);
    e.append(views);
  }
  const choose = el("select"), label = el("label", "", "layer ", choose);
  shown.models[0].layers.forEach((_, l) => {
    const option = el("option", "", l ? String(l) : "all");
    option.value = l;
    choose.append(option);
  });
  choose.onchange = () => { layer = +choose.value; point(null); colour(); };
  e.append(label, el("span", "soft", "Point at a token, tap it, or move with the arrow keys."));
  return e;
}

/* The page */

listen();

const pictures = figures.filter(({file}) => !["row.png", "constraints.png"].includes(file)).map(({title, about, data}) => {
  const image = el("img");
  image.src = `data:image/png;base64,${data}`;
  image.alt = title;
  return el("section", "panel", el("h2", "", title), el("p", "note", about), image);
});
const overview = el("div", "panels", kindsPanel(), ...constraintsPanel(), ...followedPanel(), ...contextsPanel());
main.append(heading(), el("div", "bar"), overview, el("div", "bar"), el("div", "bar", el("h2", "", `Row ${shown.row}`)),
  el("section", "panel", controls(), el("div", "reading", el("div", "", el("h3", "", "The prompt"), scale, promptTokens, answer), el("div", "", el("h3", "", "Its parts"), partsTable()))),
  el("div", "figures", ...pictures));
colour();
document.title = `${names.join(" → ")} · report`;
