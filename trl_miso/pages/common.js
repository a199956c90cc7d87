// What the pages of the preview and of the report have in common. Each has a function `point` of its own, which shows a token.
const main = document.querySelector("main"), tip = document.getElementById("tip");
let active = null; // the token that is shown

// Text reaches the page through here alone, as text nodes: whatever a row holds, none of it is markup.
const el = (tag, cls, ...kids) => {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  e.append(...kids);
  return e;
};

const num = (x) => x.toLocaleString("en-US", {maximumFractionDigits: 2}).replace("-", "−");
const percent = (x) => (100 * x).toLocaleString("en-US", {maximumFractionDigits: 1}) + "\u202f%";
const count = (n, noun) => `${num(n)} ${noun}${n === 1 ? "" : "s"}`;

function table(head, lines) {
  const line = (cells, tag) => el("tr", "", ...cells.map((cell, i) => {
    const e = el(i ? tag : "th", "", typeof cell === "number" ? num(cell) : cell);
    if (e.tagName === "TH") e.scope = tag === "th" ? "col" : "row";
    return e;
  }));
  return el("table", "", el("thead", "", line(head, "th")), el("tbody", "", ...lines.map((cells) => line(cells, "td"))));
}

// Controls, direction overrides and the like; joiners only where nothing stands beside them: in between they make emoji.
const UNSEEN = /(\n|[\0-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]|^[\u200c\u200d\ufe0f]+$)/;

function glyphs(text, cls) {
  const e = el("span", cls), mark = (shown) => el("span", "mark", shown);
  if (!text) e.append(mark("◌"));
  text.split(UNSEEN).forEach((piece, i) => {
    if (i % 2 === 0) e.append(piece);
    else if (piece === "\n" || piece === "\t") e.append(mark(piece === "\n" ? "↵" : "⇥"), piece);
    else e.append(mark(Array.from(piece, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}⟩`).join("")));
  });
  return e;
}

function repr(text) {
  const quoted = JSON.stringify(text.slice(0, 200)).replace(/[\p{C}\p{Z}\ufe0f]/gu, (c) => (c === " " ? c : `\\u{${c.codePointAt(0).toString(16)}}`));
  return text.length > 200 ? `${quoted} … ${num(text.length)} characters` : quoted;
}

function place() {
  if (!active) return;
  const box = active.getClientRects()[0], width = document.documentElement.clientWidth, below = box.bottom + 8;
  const top = below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 8 : below;
  tip.style.transform = `translate(${Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8))}px, ${Math.max(8, top)}px)`;
}

function focusToken(t) {
  t.tabIndex = -1; // only now: thousands of tokens that can be tabbed to would trap the keyboard
  t.focus({preventScroll: true});
  t.scrollIntoView({block: "nearest"});
  point(t);
}

function listen() {
  main.addEventListener("pointerover", (event) => point(event.target.closest(".t")));
  main.addEventListener("pointerleave", () => point(null));
  main.addEventListener("click", (event) => point(event.target.closest(".t")));
  main.addEventListener("focusout", () => point(null));
  addEventListener("scroll", place, {passive: true, capture: true});
  main.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key], group = event.target.closest(".tokens");
    if (event.key === "Escape") point(null);
    if (!step || !group) return;
    const all = [...group.querySelectorAll(".t")], at = all.indexOf(event.target), next = at < 0 && step < 0 ? all.at(-1) : all[at + step];
    if (next) focusToken(next);
    event.preventDefault();
  });
}
