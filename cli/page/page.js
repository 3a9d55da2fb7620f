// The page of `speed trace --html`: draws the document in #data (speed-trace/1, docs/trace.md). No library, no request.
// Text of the prompt and of the model file reaches the page as text nodes only, never as markup.
"use strict";
(() => {

// ---- the document -------------------------------------------------------------------------------------------------

const D = JSON.parse(document.getElementById("data").textContent);
const S = D.model.shape, L = S.n_layers, M = D.tokens.length, N = D.request.tokens, SPLIT = D.split;
const special = new Set(D.special);
const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

// One policy's run. Rows are tokens, by position; only layers from `from` on are stored, below they are full depth's.
class Run {
  constructor(json) {
    const { attention: a, shares: b, lens: c, same: e, looks, turn, ...rest } = json;
    Object.assign(this, rest);
    this.anchored = this.policy === "speed" && this.bos && this.split > 0;
    this.data = { attention: bytes(a), shares: bytes(b), lens: bytes(c), same: bytes(e) };
    this.starts = [];  // [layer - from] of each stored row: where its attention and shares begin
    let attention = 0, shares = 0;
    for (let l = this.from; l < L; ++l) {
      const starts = [];
      for (let r = this.firstRow(l); r < M; ++r, shares += 3) {
        starts.push([attention, shares]);
        attention += this.dense ? 2 * this.slots(l, r) : 4 * Math.min(16, this.slots(l, r));
      }
      this.starts.push(starts);
    }
  }
  get isFull() { return this.from === 0; }
  firstRow(l) { return this.isFull && l < this.prompt_layers ? 0 : this.split; }
  cachesPrompt(l) { return this.policy !== "speed" || l < this.k; }
  slots(l, r) { return this.cachesPrompt(l) ? r + 1 : r - this.split + 1 + this.anchored; }  // that row r sees
  position(l, slot) {
    if (this.cachesPrompt(l)) return slot;
    return this.anchored && slot === 0 ? 0 : this.split + slot - this.anchored;
  }
  sees(l, r, position) {  // whether row r has a slot for this token in layer l
    if (position > r) return false;
    return this.cachesPrompt(l) || position >= this.split || (this.anchored && position === 0);
  }
  stores(l, r) { return l >= this.from && r >= this.firstRow(l); }
  looks(l, r) {  // where row r looks in layer l: the strongest head's weight on each slot
    const at = this.starts[l - this.from][r - this.firstRow(l)][0], a = this.data.attention, all = [];
    const n = this.dense ? this.slots(l, r) : Math.min(16, this.slots(l, r));
    for (let i = 0; i < n; ++i) {
      const p = at + i * (this.dense ? 2 : 4), slot = this.dense ? i : a[p] + 256 * a[p + 1], q = this.dense ? p : p +
          2;
      all.push({ position: this.position(l, slot), w: (a[q] / 255) ** 2, head: a[q + 1] });
    }
    return all;
  }
  shares(l, r) {
    const at = this.starts[l - this.from][r - this.firstRow(l)][1];
    return [0, 1, 2].map((i) => this.data.shares[at + i] / 255);
  }
  lens(l, r) {
    if (l < this.from || r < this.split) return null;
    const b = this.data.lens, at = ((l - this.from) * (M - this.split) + r - this.split) * 10, words = [];
    for (let i = 0; i < 3; ++i) {
      const word = b[at + 3 * i] + 256 * b[at + 3 * i + 1];
      if (word !== 0xffff) words.push({ word, text: D.words[word], p: (b[at + 3 * i + 2] / 255) ** 2 });
    }
    return { words, next: (b[at + 9] / 255) ** 2 };
  }
  agrees(r) { return r < this.split ? null : this.data.same[r - this.split] === 1; }
  says() { return this.answer.join(); }
}
const full = new Run(D.full);
const runs = D.runs.map((run) => new Run(run));
const titles = { speed: "SPEED", pop: "POP", swiftkv: "SwiftKV", share: "R-CLA" };
const methods = [...new Set(runs.map((run) => run.policy))];
const anchors = new Set(runs.filter((run) => run.policy === "speed").map((run) => run.bos));
const runOf = (method, k, bos) =>
  k >= L && method !== "share" ? full
    : runs.find((run) => run.policy === method && (run.k === k || method === "share") &&
        (method !== "speed" || run.bos === bos));
const ksOf = (method) => method === "share" ? [L] : [...new Set(runs.filter((r) => r.policy === method).map((r) =>
    r.k).concat(L))].sort((a, b) => a - b);

// The token that full depth said after row r, of the answer rows [N - 1, M).
const nextWord = (r) => r >= N - 1 ? D.answer[r - N + 1] : null;

// ---- small things -------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const make = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
};
const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => make(document.createElementNS("http://www.w3.org/2000/svg", tag),
    attributes, children);

// Text from a prompt or a model, so that it shows what it is: no invisible, control or direction-changing character.
// Empty is a token whose bytes are part of a character that a later one completes.
const visible = (text) => text === "" ? "·" : text.replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥")
  .replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/[\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g,
    (c) => "‹" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "›");
const isolated = (text) => "\u2068" + text + "\u2069";  // right-to-left text turns nothing around it
const word = (text) => visible(text).replace(/^ +(?=.)/, "").replace(/^ *$/, "␣");
// The word that a token of the text is part of: a model may read "spaniel" as " span" and "iel".
const wholeWord = (position) => {
  const joins = (a, b) => b < M && a >= 0 && !special.has(a) && !special.has(b) &&
      /[\p{L}\p{N}]$/u.test(D.tokens[a]) && /^[\p{L}\p{N}]/u.test(D.tokens[b]);
  let begin = position, end = position + 1;
  while (joins(begin - 1, begin)) --begin;
  while (joins(end - 1, end)) ++end;
  return D.tokens.slice(begin, end).join("");
};
const quote = (text, attributes) => h("q", attributes, isolated(visible(text.trim() || text)));
const sentence = (text, attributes) => [quote(text, attributes), /[.!?…]$/.test(text.trim()) ? " " : ". "];
    // what somebody said, at a sentence's end
const percent = (x, digits = 0) => (100 * x).toFixed(digits) + " %";
const weight = (w) => w.toFixed(2);
const number = (n) => Math.round(n).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
const scaled = (x, step, units) => {
  let i = 0;
  while (x >= step * 0.9995 && i + 1 < units.length) x /= step, ++i;
  return (i === 0 ? Math.round(x) : x.toPrecision(3)) + " " + units[i];
};
const flops = (x) => scaled(x, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]);
const size = (x) => scaled(x, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
const kl = (x) =>
    x === 0 ? "0" : x < 0.0005 ? "< 0.001" : x < 0.01 ? x.toFixed(3) : x.toPrecision(2);
const count = (n, thing) => n + " " + thing + (n === 1 ? "" : "s");

const measure = document.createElement("canvas").getContext("2d");
const fit = (text, width, font) => {  // cut so that it fits into so many pixels
  measure.font = font + " " + getComputedStyle(document.body).fontFamily;
  if (measure.measureText(text).width <= width) return text;
  const letters = [...text];
  while (letters.length > 1 && measure.measureText(letters.join("") + "…").width > width) letters.pop();
  return letters.join("") + "…";
};

// ---- the five stops, found in the runs ----------------------------------------------------------------------------

const anchorDefault = anchors.size === 0 || anchors.has(true);
const descending = ksOf("speed").filter((k) => k < L).reverse();
const holds = (k) => runOf("speed", k, anchorDefault).says() === full.says();
const failing = descending.find((k) => !holds(k));  // the highest K that says something else
const lowest = failing === undefined ? (descending.at(-1) ?? L) : (descending.filter((k) => k > failing).at(-1) ?? L);

// The row after which two runs' own answers part.
const parts = (run) => {
  let i = 0;
  while (i < run.answer.length && i < full.answer.length && run.answer[i] === full.answer[i]) ++i;
  return Math.min(N - 1 + i, M - 1);
};

// Where row r looks hardest in the prompt, at full depth, in layers [from, to): words, not turn marks.
const strongest = (run, r, from, to) => {
  let best = null;
  for (let l = from; l < to; ++l)
    if (run.stores(l, r))
      for (const look of run.looks(l, r))
        if (look.position > 0 && look.position < SPLIT && !special.has(look.position) && (!best || look.w > best.w))
          best = { ...look, layer: l };
  return best;
};

const story = () => {
  const middle = parts(full) - (full.stopped ? 1 : 0);
  const answerRow = Math.max(N - 1, Math.min(failing === undefined ? middle
      : parts(runOf("speed", failing, anchorDefault)), M - 1));
  const cost = (run) => [run.counts.prefill_flops / full.counts.prefill_flops,
      run.counts.kv_bytes / full.counts.kv_bytes];
  const before = () => nextWord(answerRow) === null ? "" : ["just before ", quote(D.words[nextWord(answerRow)]), ", "];
  const looked = (look) => ["layer " + look.layer + "’s head " + look.head + " looks at ",
      quote(wholeWord(look.position)), " with weight " + weight(look.w)];
  const stops = [];
  const deepest = strongest(full, answerRow, 0, L);
  stops.push({
    title: "Full depth", view: { method: "speed", k: L, bos: anchorDefault, token: answerRow, layer: deepest
        ? deepest.layer : L - 1 },
    text: ["Every prompt token runs all " + L + " layers, and the model says ", sentence(full.text), deepest
        ? [before(), looked(deepest), "."] : ""],
  });
  {
    const run = runOf("speed", lowest, anchorDefault), [work, cache] = cost(run);
    stops.push({
      title: "The lowest K that holds", view: { method: "speed", k: lowest, bos: anchorDefault, token: answerRow,
          layer: Math.max(lowest - 1, 0) },
      text: lowest === L ? ["No K below " + L + " keeps the whole answer."]
        : ["At K = " + lowest + " of " + L + " the answer is the same, word for word, with " + percent(work) +
            " of the work until the first word and " + percent(cache) + " of the cache."],
    });
  }
  if (failing !== undefined) {
    const run = runOf("speed", failing, anchorDefault), row = parts(run), lost = strongest(full, row, failing, lowest);
    const above = runOf("speed", lowest, anchorDefault);
    stops.push({
      title: lowest - failing === 1 ? "One layer less" : "The next lower K",
      view: { method: "speed", k: failing, bos: anchorDefault, token: row, layer: lost ? lost.layer : failing },
      text: ["At K = " + failing + " it says ", sentence(run.text, { class: "differs" }), "What broke? ",
        lost ? ["Layer " + lost.layer + " has lost the prompt. At full depth, ", before(), "its head " + lost.head +
            " looks at ", quote(wholeWord(lost.position)),
          " with weight " + weight(lost.w) + "; now there is no such slot."]
          : "No layer above the line sees the prompt.",
        " KL from full depth goes from " + kl(above.kl_mean) + " to " + kl(run.kl_mean) + " nats a word."],
    });
  } else {
    stops.push({ title: "One layer less", text: null });
  }
  {
    const k = lowest < L ? lowest : failing, run = k !== undefined && anchors.has(true) ? runOf("speed", k, false)
        : undefined;
    const share = k === undefined ? 0 : D.full.looks.slice(k).reduce((sum, look) => sum + look[0], 0) / Math.max(1,
        L - k);
    stops.push(run ? {
      title: "Without the anchor", view: { method: "speed", k, bos: false, token: answerRow, layer: k },
      text: ["Without the anchor, K = " + k + " says ", sentence(run.text, run.says() === full.says() ? {}
          : { class: "differs" }),
        "At full depth the layers above this line give it " + percent(share) + " of their attention" +
        (share > 0.2 ? ": it is where a head looks when there is nothing to find."
            : ", so this model does not miss it.")],
    } : { title: "Without the anchor", text: null });
  }
  {
    const k = failing ?? lowest, run = runOf("pop", k, false);
    if (run && !run.isFull) {
      const [work, cache] = cost(run), found = strongest(run, answerRow, run.from, L);
      stops.push({
        title: "POP, K = " + k, view: { method: "pop", k, bos: anchorDefault, token: answerRow, layer: found
            ? found.layer : k },
        text: ["POP stops the prompt at the same K, but makes keys and values for the layers above from what entered layer " + k + ". It says ",
          quote(run.text, run.says() === full.says() ? {} : { class: "differs" }), ", with " + percent(work) +
              " of the work and " + percent(cache) + " of the cache.",
          found ? [" Here " , looked(found), "."] : ""],
      });
    } else {
      stops.push({ title: "POP", text: null });
    }
  }
  return stops;
};
const stops = story();
const landing = stops[2].text ? 2 : 1;

// ---- the view -----------------------------------------------------------------------------------------------------
// All that the reader can choose. It is kept in the address, so that it can be sent to someone.

let view = { ...stops[landing].view };
let stop = landing;
let covered = true;
let bet = null;
let playing = null;  // { prompt, tail, answer }: how far the animation is

const current = () => runOf(view.method, view.k, view.bos) || full;
const anchorText = () => anchors.size === 2 ? (view.bos ? "1" : "0") : "";
const keep = () => {
  const parameters = new URLSearchParams({ k: view.k, policy: view.method, bos: anchorText(), token: view.token,
      layer: view.layer });
  if (stop !== null) parameters.set("stop", stop + 1);
  try { history.replaceState(null, "", "#" + parameters); } catch { /* some browsers forbid it for local files */ }
};
const restore = () => {
  const p = new URLSearchParams(location.hash.slice(1)), whole = (name, most) => {
    const text = p.get(name), n = Number(text);
    return text !== null && text !== "" && Number.isInteger(n) && n >= 0 && n <= most ? n : undefined;
  };
  const asked = whole("stop", stops.length);
  if (asked && stops[asked - 1].text) stop = asked - 1, view = { ...stops[stop].view };
  else if (p.has("k") || p.has("policy")) stop = null;
  else return false;
  if (methods.includes(p.get("policy"))) view.method = p.get("policy");
  const ks = ksOf(view.method), k = whole("k", L);
  if (k !== undefined) view.k = nearest(ks, k);
  if (anchors.size === 2 && p.get("bos")) view.bos = p.get("bos") === "1";
  view.token = whole("token", M - 1) ?? view.token;
  view.layer = whole("layer", L - 1) ?? view.layer;
  return true;
};
const nearest = (ks, k) => ks.reduce((best, x) => Math.abs(x - k) < Math.abs(best - k) ? x : best, ks[0]);

const change = (changes, at = null) => {
  stopPlaying();
  view = { ...view, ...changes };
  view.k = nearest(ksOf(view.method), view.k);
  stop = at;
  keep();
  draw();
};
const step = (direction) => {  // the next K that was run
  const ks = ksOf(view.method), i = ks.indexOf(view.k) + direction;
  if (i >= 0 && i < ks.length) change({ k: ks[i], layer: Math.min(ks[i], L - 1) });
};
const goTo = (i) => { if (stops[i] && stops[i].text) reveal(), change(stops[i].view, i); };
const switchMethod = (method) => change({ method });
const switchAnchor = () => { if (view.method === "speed" && anchors.size === 2) change({ bos: !view.bos }); };

const reveal = () => {
  if (!covered) return;
  covered = false;
  document.body.classList.remove("covered");
  drawBet();
};

// ---- 1 the bet ----------------------------------------------------------------------------------------------------

const drawBet = () => {
  const ks = ksOf("speed");
  if (ks.length < 2) { $("bet").hidden = true; return; }
  if (!covered) {
    $("bet").classList.add("done");
    $("bet-choices").replaceChildren();
    const verdict = bet === null ? "" : bet === lowest ? "You bet K = " + bet + ", and you are right. "
        : "You bet K = " + bet + ". ";
    $("bet-question").replaceChildren(verdict, ...(lowest === L && failing !== undefined
        ? ["No K below " + L + " still says "] : ["K = ", h("b", {}, String(lowest)),
        " is the lowest that still says "]), quote(full.text, { class: "w" }));
    return;
  }
  $("bet-question").replaceChildren("With all " + L + " layers the model answers ", quote(full.text, { class: "w" }),
      " What is the lowest K that still says so? Place your bet.");
  $("bet-choices").replaceChildren(
    ...ks.map((k) => h("button", { type: "button", onclick: () => { bet = k; reveal(); draw(); } }, String(k))),
    h("button", { type: "button", class: "skip", onclick: () => { reveal(); draw(); } }, "just show me"));
};

// ---- 2, 3 the grid, and each layer beside it ----------------------------------------------------------------------

let geometry = null, printing = false;
const layout = () => {
  const W = printing ? 720 : Math.max(300, $("grid").clientWidth), beside = W >= 900, phone = W < 560;
  const rowHeight = Math.max(beside ? 14 : 12, Math.min(30, Math.round((phone ? 300 : 440) / L)));
  const left = phone ? 46 : 62, table = beside ? 388 : 0, gap = 4, top = 38;
  const width = W - left - (beside ? table + 22 : 2), column = (width - gap) / M;
  const bottom = top + rowHeight * L;
  const tableTop = beside ? top : bottom + 66, tableRow = beside ? rowHeight : Math.max(17, rowHeight);
  return {
    W, beside, phone, rowHeight, left, top, width, column, gap, bottom, tableTop, tableRow,
    tableLeft: beside ? W - table : 0, tableWidth: beside ? table : W,
    H: beside ? bottom + 20 : tableTop + tableRow * L + 6,
    x: (r) => left + r * column + (r >= SPLIT ? gap : 0),
    y: (l) => top + (L - 1 - l) * rowHeight,               // the top of layer l
    tableY: (l) => tableTop + (L - 1 - l) * tableRow,
  };
};

// What a token does in a layer.
const kindOf = (run, l, r) => {
  if (r >= run.split) return r < N ? "header" : "own";
  if (l < run.prompt_layers) return "prompt";
  if (!run.cachesPrompt(l)) return run.anchored && r === 0 ? "anchor" : "none";
  return run.caches[l] === l ? "kv" : "none";
};
const kinds = {
  prompt: ["--prompt", "prompt token, whole layer"],
  kv: ["--kv", "it only leaves keys and values"],
  none: ["--none", "no work, no slot"],
  anchor: ["--anchor", "the anchor, a constant"],
  header: ["--header", D.request.chat ? "the answer’s header" : "last of the prompt, decode-phase"],
  own: ["--own", "answer"],
};
// While it plays: whether this cell has been computed yet.
const reached = (run, l, r) => {
  if (!playing) return true;
  if (r < run.split) return kindOf(run, l, r) === "anchor" || (l < playing.prompt && kindOf(run, l, r) !== "none");
  return r < N ? l < playing.tail : r - N < playing.answer;
};

const drawCells = (run, g) => {
  const cells = [];
  for (let l = 0; l < L; ++l)
    for (let r = 0; r < M;) {  // a run of equal cells is one rectangle
      const kind = kindOf(run, l, r), on = reached(run, l, r), begin = r;
      while (r < M && kindOf(run, l, r) === kind && reached(run, l, r) === on && (r === begin || r !== SPLIT)) ++r;
      cells.push(s("rect", {
        x: g.x(begin), y: g.y(l), width: g.x(r - 1) + g.column - g.x(begin), height: g.rowHeight,
        style: "fill:var(" + (on ? kinds[kind][0] : "--none") + ")",
      }));
    }
  const lines = [];
  for (let l = 0; l <= L; ++l) lines.push("M" + g.left + " " + (g.top + l * g.rowHeight) + "H" + (g.left + g.width));
  if (g.column > 3.5) for (let r = 0; r <= M; ++r) lines.push("M" + (r < M ? g.x(r) : g.left + g.width) + " " +
      g.top + "V" + g.bottom);
  cells.push(s("path", { d: lines.join(""), style: "stroke:var(--grid);fill:none", "stroke-width": g.column > 6 ? 1.2
      : 0.7 }));
  return cells;
};

// The record of row r in layer l under this run, or full depth's where they are the same.
const recordOf = (run, l, r) => l >= run.from ? (run.stores(l, r) ? run : null) : full.stores(l, r) &&
    r >= (r < SPLIT ? 0 : run.split) ? full : null;
const promptRowEnds = (run, l, r) => r < run.split && l >= run.prompt_layers;

const drawDots = (run, g) => {
  const nodes = [], arcs = [], labels = [], r = view.token, most = Math.min(g.rowHeight * 0.36, 7);
  const cx = (position) => g.x(position) + g.column / 2, cy = (l) => g.y(l) + g.rowHeight / 2;
  const label = (l, look, lost) => {
    const size = Math.min(12, Math.max(9.5, g.rowHeight * 0.62)), chosen = l === view.layer;
    const text = word(wholeWord(look.position)) + (chosen ? " " + weight(look.w) + (lost ? ", lost" : "") : "");
    const right = cx(look.position) + most + 3, width = text.length * size * 0.6, left = right + width > g.left +
        g.width - 8;
    labels.push(s("text", {
      x: left ? cx(look.position) - most - 3 : right, y: cy(l) + size * 0.36, "text-anchor": left ? "end" : null,
          "font-size": size,
      "font-weight": chosen ? 700 : 500,
          style: "paint-order:stroke;stroke:var(--paper);stroke-width:3.5px;stroke-linejoin:round;fill:var(" +
          (lost ? "--k" : "--ink") + ")",
    }, isolated(text)));
  };
  for (let l = 0; l < L; ++l) {
    if (promptRowEnds(run, l, r)) continue;
    const from = recordOf(run, l, r), seen = from ? from.looks(l, r) : [];
    const ideal = full.stores(l, r) && l >= run.from ? full.looks(l, r).filter((look) =>
        !run.sees(l, r, look.position)) : [];
    const dot = (look, lost) => {
      if (look.w < 0.02) return;
      const radius = Math.max(0.8, most * Math.sqrt(look.w));
      nodes.push(s("circle", {
        cx: cx(look.position), cy: cy(l), r: lost ? Math.max(1, radius - 0.7) : radius,
        style: lost ? "fill:none;stroke:var(--k);stroke-width:" + Math.min(1.6, radius * 0.55) + "px"
            : "fill:var(--dot);stroke:var(--paper);stroke-width:.8px",
      }));
      if (l === view.layer && look.w >= 0.1 && look.position < r) {
        const x1 = cx(r), x2 = cx(look.position), lift = Math.min(46, 12 + Math.abs(x1 - x2) * 0.12);
        arcs.push(s("path", {
          d: `M${x1} ${cy(l)}C${x1} ${cy(l) - lift} ${x2} ${cy(l) - lift} ${x2} ${cy(l)}`, "stroke-width": 1 +
              2 * look.w,
          style: "fill:none;stroke:var(" + (lost ? "--k" : "--dot") + ")", "stroke-dasharray": lost ? "2 4" : null,
              "stroke-linecap": "round",
        }));
      }
    };
    seen.forEach((look) => dot(look, false));
    ideal.forEach((look) => dot(look, true));
    const strongestOf = (looks) => looks.filter((x) => x.position > 0 && x.position < SPLIT).reduce((a, b) => !a ||
        b.w > a.w ? b : a, null);
    const lost = strongestOf(ideal), found = strongestOf(seen), least = l === view.layer ? 0.1 : 0.45;
    if (lost && lost.w >= least) label(l, lost, true);
    if (found && found.w >= least) label(l, found, false);
  }
  return [...arcs, ...nodes, ...labels];
};

const drawTable = (run, g) => {
  const nodes = [], r = view.token, x = g.tableLeft, narrow = g.tableWidth < 388;
  const cols = narrow ? [20, 128, Math.max(240, g.tableWidth * 0.5)] : [28, 140, 256], barWidth = narrow ? 78 : 100,
      small = 11;
  const size = Math.min(12.5, g.tableRow * 0.8), font = size + "px";
  const y0 = g.tableTop - 22;
  const head = (dx, first, second) => nodes.push(s("text", { x: x + dx, y: y0, "font-size": small,
      style: "fill:var(--soft)" }, first),
    s("text", { x: x + dx, y: y0 + 14, "font-size": small, style: "fill:var(--soft)" }, second));
  head(cols[0], "looks at", "");
  nodes.push(s("text", { x: x + cols[0], y: y0 + 14, "font-size": small },
      s("tspan", { style: "fill:var(--anchor)" }, "anchor "),
    s("tspan", { style: "fill:var(--prompt)" }, "prompt "), s("tspan", { style: "fill:var(--own)" }, "own")));
  head(cols[1], "in the prompt,", "most at");
  head(cols[2], "would say next", "after “" + fit(word(D.tokens[r]), g.tableWidth - cols[2] - 40, small + "px") + "”");
  const next = nextWord(r);
  for (let l = 0; l < L; ++l) {
    const y = g.tableY(l), base = y + g.tableRow / 2 + size * 0.36, secret = l >= run.from && !run.isFull ? "secret"
        : null;
    if (l === view.layer) nodes.push(s("rect", { x: x - 4, y: y + 0.5, width: g.tableWidth + 4,
        height: g.tableRow - 1, rx: 4, style: "fill:var(--panel)" }));
    nodes.push(s("text", { x: x + 12, y: base, "font-size": small, "text-anchor": "end", style: "fill:var(--soft)" },
        String(l)));
    if (promptRowEnds(run, l, r)) continue;
    const record = recordOf(run, l, r);
    if (record) {
      const shares = record.shares(l, r), sum = shares[0] + shares[1] + shares[2] || 1;
      let at = x + cols[0];
      ["--anchor", "--prompt", "--own"].forEach((colour, i) => {
        const width = barWidth * shares[i] / sum;
        if (width > 0) nodes.push(s("rect", { x: at, y: y + g.tableRow / 2 - 4, width, height: 8, style: "fill:var(" +
            colour + ")" }));
        at += width;
      });
    }
    // The strongest word of the prompt: of this run where it sees the prompt, else full depth's, struck out.
    const unseen = !run.cachesPrompt(l), source = unseen ? (full.stores(l, r) ? full : null) : record;
    const best = source && source.looks(l, r).filter((look) => look.position > 0 &&
        look.position < SPLIT).reduce((a, b) => !a || b.w > a.w ? b : a, null);
    if (best) {
      const tail = " " + weight(best.w) + "·h" + best.head;
      const name = fit(word(wholeWord(best.position)), cols[2] - cols[1] - 8 - tail.length * size * 0.56, font);
      nodes.push(s("text", { x: x + cols[1], y: base, "font-size": size },
        s("tspan", { style: unseen ? "fill:var(--k)" : "", "text-decoration": unseen ? "line-through" : null },
            isolated(name)),
        s("tspan", { style: "fill:var(--soft)" }, tail)));
    }
    const lens = r < run.split ? null : l < run.from ? full.lens(l, r) : run.lens(l, r), ideal = full.lens(l, r);
    if (lens && lens.words.length) {
      const top = lens.words[0], room = g.tableWidth - cols[2], other = ideal && ideal.words[0].word !== top.word
          ? word(ideal.words[0].text) : null;
      const name = fit(word(top.text), other ? room * 0.5 : room - 48, font), p = " " + percent(top.p);
      measure.font = font + " " + getComputedStyle(document.body).fontFamily;
      const used = measure.measureText(name + p + "  ").width;
      nodes.push(s("text", { x: x + cols[2], y: base, "font-size": size, class: secret },
        s("tspan", { style: top.word === next ? "fill:var(--good);font-weight:650" : "" }, isolated(name)),
            s("tspan", { style: "fill:var(--soft)" }, p),
        other && room - used > 24 ? [" ", s("tspan", { style: "fill:var(--k)", "text-decoration": "line-through" },
            isolated(fit(other, room - used, font)))] : ""));
    }
  }
  if (SPLIT > r && r < run.split) nodes.push(s("text", { x: x + cols[2], y: g.tableY(L - 1) + g.tableRow / 2 + 4,
      "font-size": size, style: "fill:var(--soft)" }, "nothing reads it"));
  return nodes;
};

const drawGrid = () => {
  const run = current(), g = geometry = layout(), nodes = drawCells(run, g), hasK = view.method !== "share";
  const label = (x, y, text, attributes) => s("text", { x, y, "font-size": 11.5, style: "fill:var(--soft)",
      ...attributes }, text);
  const every = g.rowHeight >= 14 ? 1 : 5;
  for (let l = 0; l < L; ++l) if (l % every === 0) nodes.push(label(g.left - 6, g.y(l) + g.rowHeight / 2 + 4,
      String(l), { "text-anchor": "end" }));
  nodes.push(label(g.left, g.bottom + 15, (g.phone ? "" : "the ") + "prompt, " + count(SPLIT, "token")));
  if (M > SPLIT) nodes.push(label(g.left + g.width, g.bottom + 15, g.phone ? "answer"
      : (D.request.chat ? "header, " : "") + "answer", { "text-anchor": "end" }));
  if (!g.phone) nodes.push(label(0, g.top - 8, "layer"));

  // The strip: is the next word full depth's?
  for (let r = Math.max(SPLIT, run.split); r < M; ++r)
    if (!playing || r < N || r - N < playing.answer)
      nodes.push(s("rect", { x: g.x(r) + 0.6, y: g.top - 11, width: Math.max(1, g.column - 1.2), height: 6, rx: 1,
          class: "secret", style: "fill:var(" + (run.agrees(r) ? "--good" : "--k") + ")" }));
  nodes.push(label(g.x(SPLIT) - 8, g.top - 5, "next word as at full depth?", { "text-anchor": "end" }));

  if (!playing) {
    nodes.push(s("rect", { x: g.left, y: g.y(view.layer), width: g.width, height: g.rowHeight,
        style: "fill:none;stroke:var(--ink);stroke-width:1;stroke-dasharray:1 3" }));
    nodes.push(s("rect", { x: g.x(view.token) - 0.5, y: g.top - 1, width: g.column + 1, height: g.bottom - g.top + 2,
        rx: 3, style: "fill:none;stroke:var(--ink);stroke-width:2" }));
    nodes.push(...drawDots(run, g));
  }
  nodes.push(...drawTable(run, g));

  const kY = g.top + (L - Math.min(run.isFull ? L : run.k, L)) * g.rowHeight;
  if (hasK) {
    const line = (x1, x2, y) => s("line", { x1, x2, y1: y, y2: y, style: "stroke:var(--k);stroke-width:2.5" });
    nodes.push(line(g.left - 14, g.left + g.width, kY));
    nodes.push(line(g.tableLeft, g.tableLeft + g.tableWidth, g.beside ? kY : g.tableTop + (L - view.k) * g.tableRow));
    nodes.push(s("rect", { class: "handle", x: g.left - 14, y: kY - 9, width: g.width + 14, height: 18,
        style: "fill:transparent" }));
    nodes.push(s("g", { class: "pill" }, s("rect", { x: 0, y: kY - 11, width: g.left - 16 + (g.phone ? 4 : 0),
        height: 22, rx: 11, style: "fill:var(--k)" }),
      s("text", { x: (g.left - 16 + (g.phone ? 4 : 0)) / 2, y: kY + 4, "text-anchor": "middle", "font-size": g.phone
          ? 10.5 : 12, "font-weight": 700, style: "fill:var(--paper)" }, g.phone ? "K " + view.k : "K=" + view.k)));
  }
  const description = titles[view.method] + (hasK ? ", K = " + view.k + " of " + L : "") + ": the prompt’s " + SPLIT +
      " tokens run " + run.prompt_layers + " whole layers.";
  $("grid").replaceChildren(s("svg", { viewBox: `0 0 ${g.W} ${g.H}`, role: "img", "aria-label": description },
      ...nodes));
};

const drawWhere = () => {
  const run = current(), r = view.token, l = view.layer, what = r === 0 && special.has(0) ? "the first token, BoS"
      : r < SPLIT ? "of the prompt" : r < N ? (D.request.chat ? "of the answer’s header" : "decode-phase")
      : "of the answer";
  const below = "slot " + r, upper = run.policy === "speed" && run.from < L && !run.isFull;
  const above = r >= run.split ? "slot " + (r - run.split + run.anchored) : r === 0 && run.anchored
      ? "slot 0, the anchor" : "no slot";
  const place = !upper ? "slot " + r + " in every layer" : run.k > 0 ? below + " below the line, " + above +
      " above it" : above;
  const record = recordOf(run, l, r);
  $("where").replaceChildren(quote(D.tokens[r], { class: "w" }), ", " + what + ": position " + r + ", " + place +
      ". In layer " + l + " ",
    promptRowEnds(run, l, r) ? (run.sees(l, M - 1, r) && kindOf(run, l, r) === "kv"
        ? "it only leaves its keys and values." : r === 0 && run.anchored ? "it is a constant, made once per model."
        : "it does nothing.")
      : record ? "it gives " + ((shares) => percent(shares[0]) + " of its attention to the anchor, " +
          percent(shares[1]) + " to the prompt, " + percent(shares[2]) +
          " to decode-phase tokens.")(record.shares(l, r)) : "nothing is stored.");
};

const drawLegend = () => {
  const run = current(), present = new Set();
  for (let l = 0; l < L; ++l) for (let r = 0; r < M; ++r) present.add(kindOf(run, l, r));
  $("legend").replaceChildren(...Object.entries(kinds).filter(([kind]) => present.has(kind)).map(([, [colour, text]]) =>
    h("span", {}, h("i", { style: "background:var(" + colour + ")" }), text)));
};

// ---- 4 the text ---------------------------------------------------------------------------------------------------

const drawText = () => {
  const run = current(), r = view.token, l = view.layer, record = promptRowEnds(run, l, r) ? null : recordOf(run, l, r);
  const weights = new Map(record ? record.looks(l, r).map((look) => [look.position, look]) : []);
  const unseen = (i) => i < r && r >= run.split && !run.sees(l, r, i);
  const box = $("text"), top = box.scrollTop;
  box.replaceChildren(...D.tokens.map((text, i) => {
    const look = weights.get(i), tint = look ? Math.round(100 * Math.sqrt(look.w) * 0.62) : 0;
    const colour = i === 0 ? "--anchor" : i < SPLIT ? "--prompt" : "--own";
    const names = [special.has(i) && "special", unseen(i) && "unseen", i === r && "chosen", i >= N &&
        "answer"].filter(Boolean).join(" ");
    return h("span", {
      class: names || null, style: tint > 2 ? `background:color-mix(in srgb, var(${colour}) ${tint}%, transparent)`
          : null,
      title: look && look.w >= 0.005 ? "weight " + weight(look.w) + ", head " + look.head + " of layer " + l : null,
          onclick: () => change({ token: i }, stop),
    }, visible(text).replace(/⏎+(?!.*⏎)/, "$&\n"));
  }));
  box.scrollTop = top;
};

// Charts are drawn in the pixels they will have, so that their text keeps its size.
const chartWidth = (id) => Math.max(280, Math.min(560, $(id).clientWidth));

// ---- 6 where the answer looks -------------------------------------------------------------------------------------

const drawLooks = () => {
  const W = chartWidth("looks"), H = 270, left = 46, top = 12, bottom = H - 42, width = (W - left - 8) / L, run = current(),
      k = run.isFull ? L : run.k, nodes = [];
  const y = (share) => bottom - share * (bottom - top);
  for (const share of [0, 0.5, 1]) nodes.push(s("text", { x: left - 8, y: y(share) + 4, "font-size": 12,
      "text-anchor": "end", style: "fill:var(--soft)" }, percent(share)));
  D.full.looks.forEach((look, l) => {
    let at = 0;
    [["--prompt", look[1]], ["--anchor", look[0]], ["--own", look[2]]].forEach(([colour, share], i) => {
      const taken = run.policy === "speed" && l >= k && (i === 0 || (i === 1 && !run.anchored));
      nodes.push(s("rect", { x: left + l * width + 0.6, y: y(at + share), width: Math.max(1, width - 1.2),
          height: Math.max(0, y(at) - y(at + share)), style: "fill:var(" + colour + ")", "fill-opacity": taken ? 0.28
          : 1 }));
      at += share;
    });
    const every = L > 16 ? 5 : 1;
    if (l % every === 0) nodes.push(s("text", { x: left + (l + 0.5) * width, y: bottom + 16, "font-size": 12,
        "text-anchor": "middle", style: "fill:var(--soft)" }, String(l)));
  });
  const turns = D.full.turn.map((turn, l) => turn === null ? null
      : [left + (l + 0.5) * width, y(Math.min(1, turn))]).filter(Boolean);
  const path = "M" + turns.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L");
  if (turns.length) nodes.push(s("path", { d: path, style: "fill:none;stroke:var(--paper);stroke-width:4" }),
      s("path", { d: path, style: "fill:none;stroke:var(--dot);stroke-width:2", "stroke-dasharray": "5 4" }));
  const x = left + k * width;
  if (view.method !== "share") nodes.push(s("line", { x1: x, x2: x, y1: top - 8, y2: bottom,
      style: "stroke:var(--k);stroke-width:2.5" }),
    s("text", { x: Math.min(x, W - 8), y: bottom + 33, "font-size": 12.5, "font-weight": 700,
        "text-anchor": x > W - 40 ? "end" : "middle", style: "fill:var(--k)" }, "K=" + k));
  nodes.push(s("text", { x: left, y: bottom + 33, "font-size": 12, style: "fill:var(--soft)" }, x < left + 60 ? ""
      : "layer"));
  $("looks").replaceChildren(s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img",
      "aria-label": "Shares of the answer’s attention by layer" }, ...nodes));

  const mean = (from, to, i) => D.full.looks.slice(from, to).reduce((sum, look) => sum + look[i], 0) / Math.max(1,
      to - from);
  const below = Math.max(1, k), three = (from, to) => [h("span", { class: "prompt-ink" }, "prompt " +
      percent(mean(from, to, 1))), ", the ",
    h("span", { class: "anchor-ink" }, "anchor " + percent(mean(from, to, 0))), ", its ",
        h("span", { class: "own-ink" }, "own tokens " + percent(mean(from, to, 2)))];
  const rest = k < L ? [" Above the line: the ", ...three(k, L), ". ",
    run.policy === "speed" ? "The pale part is what SPEED takes away" +
        (mean(k, L, 1) > 0.5 ? ": much, and yet looking is not needing." : ".") : "POP takes nothing away here."]
        : [" K = " + L + " takes nothing away."];
  $("looks-text").replaceChildren("Below the line the answer gives the ", ...three(0, below), " of its attention.",
      ...rest);
};

// ---- 7 what it saves ----------------------------------------------------------------------------------------------

// The cost of a run in parts, by hand: what is written, and its value.
const q = S.n_heads * S.head_dim, kv = S.n_kv_heads * S.head_dim, d = S.hidden, f = S.mlp;
const rowFlops = { q: 2 * d * q, kv: 4 * d * kv, o: 2 * q * d, mlp: 6 * d * f };
const wholeRow = rowFlops.q + rowFlops.kv + rowFlops.o + rowFlops.mlp;
const byHand = (run) => {
  const n = run.split, t = N - n, parts = [], caching = run.caches.map((c, l) => c === l);
  const add = (text, formula, value) => { if (value) parts.push([text, formula, value]); };
  const layers = (test) => [...Array(L).keys()].filter(test), span = (list) => list.length === 0 ? ""
      : list.length === 1 ? "layer " + list[0] : "layers " + list[0] + "–" + list.at(-1);
  const whole = layers((l) => l < run.prompt_layers), only = layers((l) => l >= run.prompt_layers &&
      run.cachesPrompt(l) && caching[l]);
  const attention = 2 * n * (n + 1) * q, given = count(t, "decode-phase token");
  add("prompt, " + span(whole) + ", whole", `${whole.length} × (${n} × ${number(wholeRow)} + 2·${n}·${n + 1}·${q})`,
      whole.length * (n * wholeRow + attention));
  add("prompt, " + span(only) + ", keys and values", `${only.length} × ${n} × ${number(rowFlops.kv)}`,
      only.length * n * rowFlops.kv);
  const lower = layers((l) => run.cachesPrompt(l)), upper = layers((l) => !run.cachesPrompt(l)), sum = (first) =>
      t * first + t * (t - 1) / 2;
  const rows = (list, first) => list.length * (t * wholeRow + 4 * q * sum(first));
  const written = (list, first) => `${list.length} × (${t} × ${number(wholeRow)} + 4·${q}·${sum(first)})`;
  add(given + ", " + span(lower), written(lower, n + 1), rows(lower, n + 1));
  add(given + ", " + span(upper), written(upper, run.anchored + 1), rows(upper, run.anchored + 1));
  add("the head, one row", `2 × ${d} × ${S.vocab}`, 2 * d * S.vocab);
  const slots = run.caches.reduce((total, c, l) => total + (c === l ? (run.cachesPrompt(l) ? N : t + run.anchored)
      : 0), 0);
  const cacheText = upper.length ? `${lower.length}·${N} + ${upper.length}·(${+run.anchored} + ${t}) = ${slots} slots`
      : `${caching.filter(Boolean).length}·${N} = ${slots} slots`;
  return { parts, slots, cacheText };
};

const drawSaves = () => {
  const run = current(), c = run.counts, p = run.predicted, F = full.counts;
  const card = (title, part, whole, text, extra, equal) => h("div", { class: "card" }, h("h3", {}, title),
    h("div", { class: "bar" }, h("i", { style: "width:" + Math.min(100, 100 * part / whole) + "%" })),
    h("p", {}, h("span", { class: "big" }, percent(part / whole, 1)), " of full depth’s " + text(whole)),
    h("p", { class: "note" }, "counted " + text(part) + ", " + number(part), h("br"), "by formula the same ",
        h("span", { class: equal ? "agrees" : "differs" }, equal ? "=" : "≠"), extra));
  $("saves").replaceChildren(
    card("Work until the first word", c.prefill_flops, F.prefill_flops, flops, " · at best " +
        (F.prefill_flops / c.prefill_flops).toFixed(2) + "× as fast", c.prefill_flops === p.prefill_flops),
    card("Cache after the prompt", c.kv_bytes, F.kv_bytes, size, "", c.kv_bytes === p.kv_bytes),
    card("Read for each further word", c.step_read_bytes, F.step_read_bytes, size, " · of it weights " +
        size(run.weight_bytes), c.step_read_bytes === p.step_read_bytes));

  const hand = byHand(run), plain = run.policy === "full" || run.policy === "speed" || run.policy === "pop";
  const slotBytes = 2 * kv * D.value_bytes;
  $("by-hand").hidden = !plain;
  const row = (...cells) => h("tr", {}, ...cells.map((cell, i) =>
      h("td", { class: i === cells.length - 1 ? "n" : null }, cell)));
  const total = hand.parts.reduce((sum, part) => sum + part[2], 0), check = (a, b) =>
      h("b", { class: a === b ? "agrees" : "differs" }, number(a) + (a === b ? " = counted" : " ≠ counted"));
  $("by-hand-text").replaceChildren(
    h("p", { class: "note" },
        `A row’s products cost two operations a weight. Width d = ${d}, queries ${q}, keys and values ${kv} each, MLP ${f}, vocabulary ${number(S.vocab)}. ` +
      `Whole: queries 2·${d}·${q} + keys and values 4·${d}·${kv} + output 2·${q}·${d} + MLP 6·${d}·${f} = ${number(wholeRow)}. Attention: 4·${q} for each slot that a row sees.`),
    h("div", { class: "scroll" }, h("table", {}, ...hand.parts.map((part) => row(part[0], part[1], number(part[2]))),
        row(h("b", {}, "work until the first word"), "sum, in FLOP", check(total, c.prefill_flops)),
      row("cache after the prompt", `${hand.cacheText} × 2·${kv}·${D.value_bytes} B`,
          check(hand.slots * slotBytes, c.kv_bytes)),
      row("read for a further word", `weights ${number(run.weight_bytes)} + ${hand.slots} slots × ${slotBytes} B`,
          check(run.weight_bytes + hand.slots * slotBytes, c.step_read_bytes)))));
};

// ---- 8 what it would save on a large model ------------------------------------------------------------------------
// The cost model of speed.cu for Llama's shapes, in bf16, one decode-phase token; tests hold it equal to `speed plan`.

const shapes = {
  "Llama-3.1-8B": { L: 32, d: 4096, q: 4096, kv: 1024, f: 14336, V: 128256, tied: false },
  "Llama-3.1-70B": { L: 80, d: 8192, q: 8192, kv: 1024, f: 28672, V: 128256, tied: false },
  "Llama-3.2-1B": { L: 16, d: 2048, q: 2048, kv: 512, f: 8192, V: 128256, tied: true },
  "Llama-3.2-3B": { L: 28, d: 3072, q: 3072, kv: 1024, f: 8192, V: 128256, tied: true },
};
const plan = (m, policy, k, bos, n) => {
  const prompt = n - 1, full = policy === "full" || k === m.L;
  const row = 4 * m.d * m.q + 4 * m.d * m.kv + 6 * m.d * m.f, only = 4 * m.d * m.kv;
  const whole = full ? m.L - 1 : policy === "speed" ? k - 1 : Math.min(k, m.L - 1);
  const leaving = full ? m.L : policy === "speed" ? k : m.L;  // layers with keys and values of the prompt
  const upper = full || policy === "pop" ? 0 : m.L - k, seen = (bos ? 1 : 0) + 1;
  const prefill = whole * (prompt * row + 2 * prompt * (prompt + 1) * m.q) + (leaving - whole) * prompt * only +
    m.L * row + 4 * m.q * ((m.L - upper) * n + upper * seen) + 2 * m.d * m.V;
  const slots = (m.L - upper) * n + upper * seen;
  const weights = 2 * (m.L * (2 * m.d + 2 * m.d * m.q + 2 * m.d * m.kv + 3 * m.d * m.f) + m.d + m.d * m.V);
  return { prefill_flops: prefill, kv_bytes: slots * 4 * m.kv, weight_bytes: weights };
};
window.speedPlan = (shape, policy, k, bos, n) => plan(shapes[shape], policy, k, bos, n);  // for tests and the curious

const drawWould = () => {
  const m = shapes[$("shape").value], tokens = Math.round(2 ** $("length").value), batch = 2 ** $("batch").value,
      run = current();
  const policy = run.policy === "pop" ? "pop" : "speed", depth = run.isFull ? L : run.k,
      k = Math.max(1, Math.min(m.L, Math.round(m.L * depth / L)));
  const ratios = (n) => {
    const a = plan(m, "full", m.L, true, n), b = plan(m, policy, k, run.bos !== false, n);
    return [a.prefill_flops / b.prefill_flops, a.kv_bytes / b.kv_bytes,
        (a.weight_bytes + batch * a.kv_bytes) / (b.weight_bytes + batch * b.kv_bytes)];
  };
  const W = chartWidth("would"), H = 270, left = 46, right = 96, top = 14, bottom = H - 36, x = (n) => left +
      (Math.log2(n) - 6) / 11 * (W - left - right);
  const points = [...Array(45).keys()].map((i) => 2 ** (6 + i / 4)), lines = points.map(ratios),
      most = Math.max(1.05, ...lines.flat()) * 1.02;
  const y = (ratio) => bottom - (ratio - 1) / (most - 1) * (bottom - top), nodes = [];
  for (let i = 0; i <= 4; ++i) {
    const ratio = 1 + (most - 1) * i / 4;
    nodes.push(s("line", { x1: left, x2: W - right, y1: y(ratio), y2: y(ratio), style: "stroke:var(--rule)" }),
        s("text", { x: left - 8, y: y(ratio) + 4, "font-size": 12, "text-anchor": "end", style: "fill:var(--soft)" },
        ratio.toFixed(2)));
  }
  for (const [n, text] of [[64, "64"], [512, "512"], [4096, "4K"], [32768, "32K"], [131072, "128K"]])
    nodes.push(s("text", { x: x(n), y: bottom + 18, "font-size": 12, "text-anchor": "middle",
        style: "fill:var(--soft)" }, text));
  const ends = [["first word", "--prompt", null, 0], ["cache", "--anchor", "7 4", 1],
      ["further words", "--own", "2 4", 2]].map(([text, colour, dash, i]) => {
    nodes.push(s("path", { d: "M" + points.map((n, j) => x(n).toFixed(1) + " " + y(lines[j][i]).toFixed(1)).join("L"),
        style: "fill:none;stroke-width:2.5;stroke:var(" + colour + ")", "stroke-dasharray": dash }));
    return { text, colour, at: y(lines.at(-1)[i]) };
  }).sort((a, b) => a.at - b.at);
  for (let i = 1; i < ends.length; ++i) ends[i].at = Math.max(ends[i].at, ends[i - 1].at + 15);
  const over = ends.at(-1).at - (bottom - 2);
  for (const end of ends) nodes.push(s("text", { x: W - right + 8, y: end.at + 4 - Math.max(0, over),
      "font-size": 12.5, "font-weight": 650, style: "fill:var(" + end.colour + ")" }, end.text));
  nodes.push(s("line", { x1: x(tokens), x2: x(tokens), y1: top - 4, y2: bottom,
      style: "stroke:var(--k);stroke-width:1.5" }));
  $("would").replaceChildren(s("svg", { viewBox: `0 0 ${W} ${H}`, role: "img",
      "aria-label": "Ratios of full depth to this policy by prompt length" }, ...nodes));

  const [first, cache, step] = ratios(tokens), less = (ratio) => " (" +
      (ratio < 1.0005 ? "nothing" : "−" + percent(1 - 1 / ratio)) + ")";
  const requests = batch === 1 ? "one request" : (batch % 1 ? batch.toFixed(1) : batch) + " requests at once";
  $("would-text").replaceChildren($("shape").value + ", " + titles[policy] + " K = " + k + " of " + m.L +
      ", a prompt of ", h("b", {}, number(tokens)), " tokens, " + requests + ". At best: ",
    h("b", { class: "prompt-ink" }, "first word " + first.toFixed(2) + "× as soon"), less(first) + ", ",
        h("b", { class: "anchor-ink" }, "cache " + cache.toFixed(2) + "× smaller"), less(cache) + ", ",
    h("b", { class: "own-ink" }, "each further word " + step.toFixed(2) + "× as fast"), less(step) + ".");
  // The paper's setting, whatever is chosen above.
  const big = shapes["Llama-3.1-8B"], a = plan(big, "full", 32, true, 131072), b = plan(big, "speed", 24, true, 131072);
  const one = (a.weight_bytes + a.kv_bytes) / (b.weight_bytes + b.kv_bytes),
      needed = 0.22 * a.weight_bytes / (a.kv_bytes - 1.22 * b.kv_bytes);
  $("would-note").replaceChildren("By formula, for this share of layers; not measured. “33 % better” at 128K is a ratio of 1.33: with 24 of 32 layers no time can fall by more than a quarter. " +
    "A further word reads all weights, whatever the prompt, so a short prompt gains nothing; a batch reads them once for all. At 131\u202f072 tokens, K = 24 of 32, the bytes allow " + one.toFixed(2) +
    " for one request, and the paper’s 1.22 from " + needed.toFixed(1) + " requests on.");
};

// ---- 9 what it says -----------------------------------------------------------------------------------------------

const drawAnswers = () => {
  const of = (k) => runOf(view.method, k, view.bos), rows = [];
  for (const k of [...ksOf(view.method)].reverse()) {
    const run = of(k), last = rows.at(-1);
    if (!run) continue;
    if (last && !last.runs[0].isFull && !run.isFull && last.runs[0].says() === run.says()) last.runs.push(run),
        last.ks.push(k);
    else rows.push({ runs: [run], ks: [k] });
  }
  if (view.method === "share") rows.unshift({ runs: [full], ks: [L] });
  const range = (values, text) => { const a = text(Math.min(...values)), b = text(Math.max(...values)); return a === b
      ? a : a + "–" + b; };
  const round = (x) => String(Math.round(100 * x));
  const body = rows.map(({ runs, ks }) => {
    const run = runs[0], same = run.says() === full.says(), all = full.text, own = run.text;
    let i = 0;
    while (!same && i < own.length && own[i] === all[i]) ++i;
    while (!same && i > 0 && i < own.length && /\S/.test(own[i - 1])) --i;
    const text = same || run.isFull ? [isolated(visible(own))]
        : [h("span", { class: "same" }, isolated(visible(own.slice(0, i)))),
        h("span", { class: "differs" }, isolated(visible(own.slice(i))))];
    const name = run.isFull ? "full, " + L : view.method === "share" ? "kept " +
        run.caches.filter((c, l) => c === l).length : ks.length === 1 ? String(ks[0]) : ks.at(-1) + "–" + ks[0];
    const now = runs.includes(current());
    return h("tr", { class: now ? "now" : null }, h("td", {}, name),
        h("td", { class: run.isFull ? null : "secret" }, ...text),
      h("td", { class: "n wide secret" }, same ? "–" : "word " + (parts(run) - N + 2)),
          h("td", { class: "n secret" }, run.isFull ? "" : range(runs.map((x) => x.kl_mean), kl)),
      h("td", { class: "n" }, range(runs.map((x) => x.counts.prefill_flops / full.counts.prefill_flops), round) +
          " %"), h("td", { class: "n wide" }, range(runs.map((x) => x.counts.kv_bytes / full.counts.kv_bytes),
          round) + " %"));
  });
  $("answers").replaceChildren(h("thead", {}, h("tr", {}, h("th", {}, "K"),
      h("th", {}, titles[view.method] + (view.method === "speed" && !view.bos ? " without the anchor" : "") +
      ", by itself"), h("th", { class: "n wide" }, "parts at"),
    h("th", { class: "n" }, "KL, nats"), h("th", { class: "n" }, "work"), h("th", { class: "n wide" }, "cache"))),
        h("tbody", {}, ...body));
};

const drawFooter = () => {
  const all = [full, ...runs], worst = (key) => Math.max(...all.map((run) => run[key])).toExponential(0).replace("e-",
      " · 10⁻").replace(/⁻(\d+)$/, (_, n) => "⁻" + [...n].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join(""));
  const equal = runs.every((run) => run.lower_equal), counted = all.every((run) =>
      Object.keys(run.counts).every((key) => run.counts[key] === run.predicted[key]));
  $("answers-note").replaceChildren("Greedy, " + count(D.request.new_tokens, "token") +
      " at most. KL: how far the policy’s next-word probabilities are from full depth’s, mean over the answer, when fed full depth’s own words.");
  $("footer").replaceChildren("Every number and every dot is from a run of the engine: nothing is estimated, nothing drawn by hand (the large model above is by formula, and says so). The columns are full depth’s own words, fed to every policy, so that columns compare; what each says by itself is the text. " +
    "Attention weights are recomputed by definition from a layer’s queries and cached keys; times the values they are the engine’s own output to " + worst("attention_error") + ". “Would say next” is a layer’s state through final norm and output head: early layers are not made to be read so. " +
    "Weight is not importance: a head may look hard at a word and change nothing. ",
    h("b", {}, equal ? "Below the line every policy’s cache was compared with full depth’s: equal, bit for bit."
        : "Below the line some cache differed from full depth’s."), " ",
    counted ? "Every count equals its formula." : "Some count differs from its formula.",
        runs.some((run) => !run.adapted) ? " These weights were not trained for every policy shown." : "",
    h("br"), "Made by ", h("code", {}, "speed trace --html"), " · " + D.program +
        ". The methods: SPEED arXiv 2605.06105, POP arXiv 2602.03295.");
  $("run").replaceChildren(D.model.name + " · " + L + " layers, " + S.n_heads + " heads · " + M + " tokens · " +
      D.program);
  document.title = "How deep must a prompt go? " + D.model.name;
};

// ---- all of it ----------------------------------------------------------------------------------------------------

const drawControls = () => {
  const ks = ksOf(view.method), run = current();
  $("k").max = ks.length - 1, $("k").value = ks.indexOf(view.k), $("k").disabled = ks.length < 2;
  $("k").setAttribute("aria-label", "K"), $("k").setAttribute("aria-valuetext", "K = " + view.k + " of " + L);
  $("k-text").textContent = view.method === "share" ? "R-CLA" : "K = " + view.k + " of " + L;
  $("methods").replaceChildren(...methods.map((method) => h("button",
      { type: "button", role: "radio", "aria-checked": String(method === view.method), onclick: () =>
      switchMethod(method) }, titles[method])));
  const takes = view.method === "speed" && anchors.size === 2;
  $("anchor").disabled = !takes, $("anchor").setAttribute("aria-pressed", String(takes && view.bos));
  $("anchor").textContent = takes && !view.bos ? "anchor off" : "anchor on";
  $("anchor").hidden = anchors.size < 2;
  $("play").textContent = playing ? "■ stop" : "▶ play";
  const same = run.says() === full.says(), shown = playing ? playing.said : run.text;
  $("says").className = "says" + (run.isFull ? "" : " secret");
  $("says").replaceChildren(shown ? h("span", { class: same ? null : "differs" }, isolated(visible(shown))) : "");
  $("stops").replaceChildren(...stops.map((x, i) => h("button",
      { type: "button", disabled: !x.text, "aria-current": i === stop ? "step" : null, onclick: () => goTo(i) }, i +
      1 + " " + x.title)));
  $("story").replaceChildren(...(stop !== null && stops[stop].text ? stops[stop].text.flat(9) : freely(run)));
};
const freely = (run) => {
  const same = run.says() === full.says();
  return [titles[view.method] + (run.isFull ? ", K = " + L + ": full depth." : view.method === "share" ? ""
      : ", K = " + run.k) + (run.policy === "speed" && !run.bos ? ", without the anchor" : "") +
      (run.isFull ? "" : ": it says "),
    ...(run.isFull ? [" It says "] : []), quote(run.text, same ? {} : { class: "differs" }), same
        ? ", as full depth does" : "",
    ", with " + percent(run.counts.prefill_flops / full.counts.prefill_flops) + " of the work and " +
        percent(run.counts.kv_bytes / full.counts.kv_bytes) + " of the cache."];
};
const draw = () => {
  drawControls(), drawGrid(), drawWhere(), drawLegend(), drawText(), drawLooks(), drawSaves(), drawWould(),
      drawAnswers();
};

// ---- play: the prompt rises to K, the header to the top, the answer comes word by word ----------------------------

let timer = null;
const stopPlaying = () => { clearTimeout(timer), playing = null; };
const play = () => {
  if (playing) { stopPlaying(), draw(); return; }
  reveal();
  const run = current(), words = run.answer.slice(0, run.answer.length - (run.stopped ? 1 : 0)).map((i) => D.words[i]);
  playing = { prompt: 0, tail: 0, answer: 0, said: "" };
  const pause = Math.min(160, 2400 / L), tick = () => {
    const rises = Math.max(...[...Array(L).keys()].map((l) => kindOf(run, l, Math.min(1, M - 1)) === "none" ? 0 : l +
        1));
    if (playing.prompt < rises) ++playing.prompt;
    else if (playing.tail < L) ++playing.tail;
    else if (playing.answer < M - N || playing.said !== words.join("")) {
      playing.said = words.slice(0, ++playing.answer).join("");
      if (playing.answer >= words.length) playing.said = words.join("");
    } else { stopPlaying(), draw(); return; }
    drawControls(), drawGrid();
    timer = setTimeout(tick, playing.tail === L ? 420 : pause);
  };
  tick();
};

// ---- what the reader does -----------------------------------------------------------------------------------------

const pointed = (event) => {  // the token and layer under the pointer
  const box = $("grid").getBoundingClientRect(), g = geometry, x = (event.clientX - box.left) * g.W / box.width,
      y = (event.clientY - box.top) * g.W / box.width;
  const r = Math.floor((x - g.left - (x > g.x(SPLIT) ? g.gap : 0)) / g.column);
  const inGrid = y >= g.top - 14 && y <= g.bottom && x >= g.left, inTable = x >= g.tableLeft && y >= g.tableTop &&
      y <= g.tableTop + g.tableRow * L && (g.beside || y > g.bottom + 30);
  const clamp = (v, most) => Math.max(0, Math.min(most, v));
  return {
    token: inGrid && x <= g.left + g.width + 4 ? clamp(r, M - 1) : null,
    layer: inTable ? clamp(L - 1 - Math.floor((y - g.tableTop) / g.tableRow), L - 1) : inGrid
        ? clamp(L - 1 - Math.floor((y - g.top) / g.rowHeight), L - 1) : null,
    k: clamp(Math.round((g.bottom - y) / g.rowHeight), L),
  };
};
let dragging = null;
$("grid").addEventListener("pointerdown", (event) => {
  if (event.button) return;
  const at = pointed(event);
  dragging = event.target.closest(".handle, .pill") ? "k" : "cell";
  if (dragging === "k" || event.pointerType === "mouse") $("grid").setPointerCapture(event.pointerId);
  if (dragging === "k") return;
  if (at.token !== null) change({ token: at.token, layer: at.layer ?? view.layer }, null);
  else if (at.layer !== null) change({ layer: at.layer }, null);
  if (event.pointerType !== "mouse") dragging = null;
});
$("grid").addEventListener("pointermove", (event) => {
  if (!dragging) return;
  const at = pointed(event);
  if (dragging === "k") {
    const k = nearest(ksOf(view.method), Math.max(1, at.k));
    if (k !== view.k) change({ k, layer: Math.min(k, L - 1) });
  } else if (at.token !== null && (at.token !== view.token || at.layer !== view.layer)) change({ token: at.token,
      layer: at.layer ?? view.layer });
});
for (const end of ["pointerup", "pointercancel"]) $("grid").addEventListener(end, () => { dragging = null; });

$("grid").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = {
    ArrowUp: () => step(1), ArrowDown: () => step(-1),
    ArrowLeft: () => change({ token: Math.max(0, view.token - 1) }), ArrowRight: () =>
        change({ token: Math.min(M - 1, view.token + 1) }),
    PageUp: () => change({ layer: Math.min(L - 1, view.layer + 1) }), PageDown: () =>
        change({ layer: Math.max(0, view.layer - 1) }),
    Home: () => change({ token: 0 }), End: () => change({ token: M - 1 }),
  };
  if (moves[event.key]) event.preventDefault(), moves[event.key]();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, summary")) return;
  const key = event.key.toLowerCase();
  if (key >= "1" && key <= "5") goTo(Number(key) - 1);
  else if (key === "b") switchAnchor();
  else if (key === "m") switchMethod(methods[(methods.indexOf(view.method) + 1) % methods.length]);
  else if (key === "p") play();
});
$("k").addEventListener("input", () => { const k = ksOf(view.method)[$("k").value];
    change({ k, layer: Math.min(k, L - 1) }); });
$("anchor").addEventListener("click", switchAnchor);
$("play").addEventListener("click", play);
for (const id of ["length", "batch", "shape"]) $(id).addEventListener("input", drawWould);

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = (name) => { document.documentElement.dataset.theme = name; };
theme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

// A reader who scrolls past the bet has skipped it; paper has no buttons.
addEventListener("scroll", () => { if (covered && scrollY > 0 &&
    $("looks-title").getBoundingClientRect().top < innerHeight * 0.8) reveal(), draw(); }, { passive: true });
addEventListener("beforeprint", () => { printing = true, $("by-hand").open = true, reveal(), stopPlaying(), draw(); });
addEventListener("afterprint", () => { printing = false, draw(); });
addEventListener("hashchange", () => { if (restore()) reveal(), draw(); });
let width = 0;
new ResizeObserver(() => { const now = $("grid").clientWidth; if (now !== width) width = now, draw();
    }).observe($("grid"));

$("shape").replaceChildren(...Object.keys(shapes).map((name) => h("option", { value: name }, name)));
document.body.classList.add("covered");
if (restore()) reveal();
drawBet(), drawFooter(), draw();
})();
