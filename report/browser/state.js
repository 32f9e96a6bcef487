// ---------------------------------------------------------------- the data, and the selection

const page = JSON.parse(document.getElementById("view").textContent);

// The selected run, and what follows from it: see `openRun`.
let view, H, N_HEADS, GROUP, TIMES, LAST;
let DENSE;              // narrow cells: numbers get three characters, as .92, 1.0, -.5

const state = { run: 0, passage: 0, snapshot: null, score: null, head: 0, token: null,
                hovered: null, cell: null, path: null, colour: "attention", playing: null };
// What is on the page: follows `state` as soon as its patterns are inflated.
const shown = { run: null, passage: null, tokens: [], patterns: null, losses: null, right: null };

const $ = id => document.getElementById(id);
const layerOf = head => Math.floor(head / H);
const nameOf = head => `L${layerOf(head)}H${head % H}`;
const headNamed = name => range(N_HEADS).find(head => nameOf(head) === name);
const focus = () => state.hovered ?? state.token;
const spoken = name => name.replaceAll("_", " ");
const range = n => Array.from({ length: n }, (_, i) => i);
const nearest = (times, t) => times.reduce(
  (best, time, i) => Math.abs(time - t) <= Math.abs(times[best] - t) ? i : best, 0);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const label = token =>
  token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍").replace(/ /g, "·") || "∅";

/** Whether the evidence was measured at the selected time. Else its scores are not shown. */
const examinedNow = () => view.evidence?.step === view.snapshots[state.snapshot].step;

/** The selected score of a head at the selected time; null if it was not measured then. Where the
 *  heads were examined, on more rows, it is that measurement, to which the interval belongs. */
function scoreOf(head) {
  const examined = view.evidence?.heads?.[nameOf(head)]?.[state.score];
  if (examinedNow() && examined != null) return examined;
  const score = view.scores[state.score];
  const measurement = score?.tokens.indexOf(view.snapshots[state.snapshot].tokens) ?? -1;
  return measurement < 0 ? null : score.values[measurement][layerOf(head)][head % H];
}

/** The interval [low, high] of one of a head's scores at the selected time, if it is known. */
const intervalOf = (head, score) =>
  (examinedNow() && view.evidence.intervals?.[nameOf(head)]?.[score]) || null;

const triangle = n => n * (n + 1) / 2;

/** The attention weight of query q on key k ≤ q. */
const weight = (head, q, k) =>
  shown.patterns[head * triangle(shown.tokens.length) + triangle(q) + k] / 255;

/** Show another run, from now on: at about the same time, with its own best head. */
function openRun(run) {
  const time = view && state.snapshot < LAST ? TIMES[state.snapshot] : null;
  view = page.runs[run];
  H = view.n_heads;
  N_HEADS = view.n_layers * H;
  GROUP = H / view.n_kv_heads;
  DENSE = H > 8;
  TIMES = view.snapshots.map(snapshot => snapshot.tokens);
  LAST = TIMES.length - 1;
  const passage = state.passage < view.passages.length ? state.passage : 0;
  const score = [state.score, "prefix_matching", ...Object.keys(view.scores)]
    .find(name => name in view.scores) ?? null;
  Object.assign(state, { run, passage, score, token: null, hovered: null, cell: null,
                         snapshot: time === null ? LAST : nearest(TIMES, time), playing: null });
  state.head = range(N_HEADS).reduce(
    (best, head) => scoreOf(head) > scoreOf(best) ? head : best, 0);
}

/** Change the head or the score, on which the whole page depends. */
function choose(changes) {
  Object.assign(state, changes);
  drawPlots();
  show();
}

/** Change the time, the passage or the token, on which the plots do not depend. */
async function show(changes) {
  Object.assign(state, changes);
  drawGrid();
  drawTime();
  const { run, passage, snapshot } = state;
  $("pattern").setAttribute("aria-busy", "true");
  const bytes = await inflatedChunk(`r${run}p${passage}s${snapshot}`);
  const outdated = run !== state.run || passage !== state.passage || snapshot !== state.snapshot;
  if (outdated) return;                             // the selection has changed meanwhile
  readChunk(bytes, view.passages[passage].tokens.length);
  if (shown.run !== run || shown.passage !== passage) layTokens(run, passage);
  nameTokens();
  drawSiblings();
  drawPair();
  drawFocus();
  $("pattern").setAttribute("aria-busy", "false");
}

// ---------------------------------------------------------------- snapshots, inflated when needed

const inflated = new Map();

function inflatedChunk(id) {
  if (!inflated.has(id)) inflated.set(id, chunk(id).then(inflate));
  if (inflated.size > 8) inflated.delete(inflated.keys().next().value);
  return inflated.get(id);
}

/** The text of a chunk. While the file is still loading, the chunk may be missing or incomplete; it
 *  is complete when something follows it. */
async function chunk(id) {
  while (document.readyState === "loading" && !$(id)?.nextSibling)
    await new Promise(resume => setTimeout(resume, 20));
  return $(id).textContent;
}

async function inflate(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Take a chunk of T tokens apart: all patterns, then the losses of tokens 1 … T − 1 and whether
 *  each was the likeliest. Earlier versions have only patterns. */
function readChunk(bytes, T) {
  const losses = N_HEADS * triangle(T), right = losses + 4 * (T - 1);
  shown.patterns = bytes;
  shown.losses = bytes.length > losses ? new Float32Array(bytes.slice(losses, right).buffer) : null;
  shown.right = bytes.length > losses ? bytes.subarray(right) : null;
}

// ---------------------------------------------------------------- colour: mixed in OKLab

const colours = {};
let ramp;               // pixels, by weight · 255

/** For a canvas. Mixed in OKLab, so that equal steps of strength look equal. */
const shade = (colour, strength) =>
  `color-mix(in oklab, ${colours[colour]} ${100 * strength}%, ${colours.page})`;

/** How strongly a weight is drawn: its square root, so that a weight of 0.01 is visible beside a
 *  weight of 1. */
const strengthOf = weight => Math.sqrt(weight);

function readColours() {
  for (const name of ["page", "ink", "soft", "line", "key", "query"])
    colours[name] = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
  const pen = make("canvas", { width: 256, height: 1 }).getContext("2d");
  for (const i of range(256)) {
    pen.fillStyle = shade("key", strengthOf(i / 255));
    pen.fillRect(i, 0, 1, 1);
  }
  ramp = new Uint32Array(pen.getImageData(0, 0, 256, 1).data.buffer);
}

// ---------------------------------------------------------------- elements

/** An element. Strings among its children become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Colour an element, in light and in dark. */
function paint(element, colour, strength) {
  element.style.backgroundColor = strength
    ? `color-mix(in oklab, var(--${colour}) ${100 * strength}%, var(--page))` : "";
  element.classList.toggle("strong", strength > 0.6);
}

/** Ticks below a scale, evenly spaced or at given fractions of it. */
function drawTicks(scale, texts, at = texts.map((_, i) => i / (texts.length - 1))) {
  scale.replaceChildren(...texts.map((text, i) =>
    make("span", { style: `left: ${100 * at[i]}%` }, text)));
}

// ---------------------------------------------------------------- numbers and their intervals

/** A number to some decimals; what rounds to 0 has no sign. */
const fixed = (value, digits = 2) => value.toFixed(digits).replace(/^-(?=[0.]+$)/, "");
const minus = text => text.replace("-", "−");
const signed = (value, digits = 2) => {
  const text = fixed(value, digits);
  return Number(text) > 0 ? `+${text}` : minus(text);
};

/** " (0.92–0.96)"; nothing if a bound is unknown. */
function between(low, high, write) {
  if (low == null || high == null) return "";
  const [from, to] = [low, high].map(bound => minus(write(bound)));
  return from.startsWith("−") ? ` (${from} to ${to})` : ` (${from}–${to})`;
}

/** { value, low, high } as "93% (91–95)", or "–" if it was not measured. */
function percent(n, withInterval = true) {
  if (n?.value == null) return "–";
  const whole = value => fixed(100 * value, 0);
  return `${minus(whole(n.value))}%${withInterval ? between(n.low, n.high, whole) : ""}`;
}

/** { value, low, high } as "+6.20 nats (5.9–6.5)". */
function nats(n, write = signed) {
  if (n?.value == null) return "–";
  const digits = n.high - n.low < 0.2 ? 2 : 1;
  return `${write(n.value)} nats${between(n.low, n.high, value => fixed(value, digits))}`;
}
