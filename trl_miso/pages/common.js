"use strict";
// Shared by both pages. A page defines facts(token), pairs of a name and a value or null, and related(token), elements to highlight.

const main = document.querySelector("main"), tip = document.getElementById("tip");
const HUES = [212, 28, 280, 186, 340, 50, 245, 4, 310, 75];
let active = null; // the token that the tooltip describes

// All text reaches the page here, as text nodes: markup within a row stays text.
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

/* Tokens */

// Controls, direction overrides and the like. Joiners only where they stand alone: between other characters they build emoji.
const UNSEEN = /(\n|[\0-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]|^[\u200c\u200d\ufe0f]+$)/;

/** A token's text, with visible marks for invisible characters. */
function glyphs(text, cls) {
  const e = el("span", cls), mark = (sign) => el("span", "mark", sign);
  if (!text) e.append(mark("◌"));
  text.split(UNSEEN).forEach((piece, i) => {
    if (i % 2 === 0) e.append(piece);
    else if (piece === "\n" || piece === "\t") e.append(mark(piece === "\n" ? "↵" : "⇥"), piece);
    else e.append(mark(Array.from(piece, (c) => `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(2, "0")}⟩`).join("")));
  });
  return e;
}

/** A text in quotes, with escapes for invisible characters, at most 200 characters of it. */
function repr(text) {
  const quoted = JSON.stringify(text.slice(0, 200)).replace(/[\p{C}\p{Z}\ufe0f]/gu, (c) => (c === " " ? c : `\\u{${c.codePointAt(0).toString(16)}}`));
  return text.length > 200 ? `${quoted} … ${num(text.length)} characters` : quoted;
}

/** A block of text that takes the keyboard's focus, so that arrow keys can move from token to token. */
function tokenGroup(label, ...kids) {
  const e = el("div", "tokens", ...kids);
  e.tabIndex = 0;
  e.setAttribute("role", "group");
  e.setAttribute("aria-label", `${label}: arrow keys move from token to token`);
  return e;
}

/* The tooltip */

/** Show the facts about a token and highlight what is related to it; null hides the tooltip. */
function point(t) {
  if (t === active) return;
  const pairs = t && facts(t);
  if (t && !pairs) return;
  active?.classList.remove("on");
  active?.removeAttribute("aria-describedby");
  for (const e of main.querySelectorAll(".glow")) e.classList.remove("glow");
  active = t;
  tip.hidden = !t;
  if (!t) return;
  t.classList.add("on");
  t.setAttribute("aria-describedby", "tip");
  for (const e of related(t)) e.classList.add("glow");
  tip.replaceChildren(el("dl", "", ...pairs.flatMap(([name, value]) => {
    const dd = el("dd", "", value);
    dd.dataset.name = name;
    return [el("dt", "", name), dd];
  })));
  place();
}

/** Move the tooltip below its token, or above where there is no room. */
function place() {
  if (!active) return;
  const box = active.getClientRects()[0], width = document.documentElement.clientWidth, below = box.bottom + 8;
  const top = below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 8 : below;
  tip.style.transform = `translate(${Math.max(8, Math.min(box.left, width - tip.offsetWidth - 8))}px, ${Math.max(8, top)}px)`;
}

function focusToken(t) {
  t.tabIndex = -1; // set late: thousands of tokens in the tab order would trap the keyboard
  t.focus({preventScroll: true});
  t.scrollIntoView({block: "nearest"});
  point(t);
}

/** One listener per event for all tokens. */
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
