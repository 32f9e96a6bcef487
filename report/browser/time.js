// ---------------------------------------------------------------- time: slider and plots

const LEFT = 44, RIGHT = 132;
// One axis for all runs, so that their curves can be compared.
const END = Math.max(1, ...page.runs.flatMap(run => [run.snapshots.at(-1).tokens,
  ...Object.values(run.curves).map(curve => curve.tokens.at(-1) ?? 0)]));
const plotWidth = () => $("plots").clientWidth;
const xOf = tokens => LEFT + tokens / END * (plotWidth() - LEFT - RIGHT);

/** 1, 2 or 5 times a power of ten, at least `step`. */
function niceStep(step) {
  const power = 10 ** Math.floor(Math.log10(step));
  return [1, 2, 5, 10].find(factor => factor * power >= step) * power;
}

// What the aperiodic probe says, each between 0 and 1, in one plot.
const FRACTIONS = { "aperiodic/accuracy": "right", "knockout/gain_removed": "lost without edges",
                    "aperiodic/accuracy_without_begin": "right, no begin token",
                    "knockout/gain_removed_random": "without random ones" };

function drawPlots() {
  // Losses share a plot, fractions another; other curves do not.
  const losses = [], fractions = [], others = [];
  for (const [name, curve] of Object.entries(view.curves))
    if (name in FRACTIONS)
      fractions.push({ name: FRACTIONS[name], style: `line-${fractions.length % 4}`, ...curve });
    else if (name.includes("loss"))
      losses.push({ name, style: `line-${losses.length % 4}`, ...curve });
    else others.push([spoken(name), [{ name: "", style: "line-1", ...curve }]]);
  const plots = [["loss, nats per token", losses], [spoken(state.score ?? ""), scoreLines()],
                 ["aperiodic probe: known tokens right; gain lost", fractions], ...others];
  if (page.runs.length > 1) plots.unshift(...comparisons());
  const drawn = plots.filter(([, lines]) => lines.some(line => line.tokens.length > 1))
    .map(([title, lines]) => {
      const named = lines.filter(line => line.name).length;
      return plot(title, lines, Math.max(lines === fractions ? 96 : 78, 12 * named + 18));
    });
  $("plots").replaceChildren(...drawn.length ? [markNames(), ...drawn, timeAxis()] : []);
  $("slider").replaceChildren(sliderTrack());
}

/** One line per run, never a mean over seeds; the selected run on top. Runs of one condition share
 *  a colour and a dash. */
function comparisons() {
  const conditions = [...new Set(page.runs.map(conditionOf))];
  const order = range(page.runs.length).sort((a, b) => (a === state.run) - (b === state.run));
  const lines = curveOf => order.map(r => {
    const curve = curveOf(page.runs[r]) ?? { tokens: [], values: [] };
    const condition = conditions.indexOf(conditionOf(page.runs[r])) % 4;
    return { name: shortened(nameOfRun(page.runs[r])), ...curve,
             style: `condition-${condition}${r === state.run ? " selected" : ""}` };
  });
  return [["prefix matching, best head of each run", lines(bestHead)],
          ["aperiodic probe: known tokens right", lines(run => run.curves["aperiodic/accuracy"])]];
}

const nameOfRun = run => run.evidence?.run ?? run.title;
const conditionOf = run => run.evidence?.condition ?? run.title.replace(/[-_]?s(eed)?\d+$/, "");

function bestHead(run) {
  const score = run.scores.prefix_matching;
  return score && { tokens: score.tokens,
                    values: score.values.map(heads => Math.max(...heads.flat())) };
}

/** A name that fits beside a plot; seeds differ at the end, so it is cut in the middle. */
const shortened = name => name.length <= 20 ? name : `${name.slice(0, 8)}…${name.slice(-11)}`;

/** The selected score over time, one line per head, the selected head on top. */
function scoreLines() {
  const score = view.scores[state.score];
  if (!score) return [];
  return range(N_HEADS).sort((a, b) => (a === state.head) - (b === state.head)).map(head => ({
    name: head === state.head ? nameOf(head) : "",
    style: head === state.head ? "chosen" : "thin", tokens: score.tokens,
    values: score.values.map(value => value[layerOf(head)][head % H]) }));
}

function plot(title, lines, height) {
  const values = lines.flatMap(line => line.values).filter(value => value !== null);
  let least = 0, most = 0;
  for (const value of values) {
    least = Math.min(least, value);
    most = Math.max(most, value);
  }
  const step = niceStep((most - least || 1) / 4);
  const low = Math.floor(least / step) * step, high = Math.ceil(most / step) * step;
  const y = value => height - 6 - (value - low) / (high - low || 1) * (height - 26);
  const svg = make("svg", { height, role: "img", "aria-label": `${title} over tokens seen` });
  for (const n of range(Math.round((high - low) / step) + 1)) {
    const tick = low + n * step, number = String(+tick.toFixed(9));             // 0, not 2.8e-17
    svg.append(make("line", { class: "axis", x1: LEFT, x2: plotWidth() - RIGHT,
                              y1: y(tick), y2: y(tick) }),
               make("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, number));
  }
  svg.append(make("text", { x: LEFT + 4, y: 11 }, title), ...markLines(0, height));
  for (const { style, tokens, values } of lines) {
    const points = [];
    tokens.forEach((t, i) => {
      if (values[i] !== null) points.push(`${xOf(t).toFixed(1)} ${y(values[i]).toFixed(1)}`);
    });
    if (points.length) svg.append(make("path", { class: style, d: `M${points.join("L")}` }));
  }
  svg.append(...endLabels(lines, y), make("line", { class: "cursor", y1: 0, y2: height }));
  return svg;
}

/** Names at the right ends of their lines, pushed apart so that they do not overlap. */
function endLabels(lines, y) {
  const labels = lines.filter(line => line.name && line.values.at(-1) != null)
    .map(({ name, style, values }) => ({ name, style, at: y(values.at(-1)) }))
    .sort((a, b) => b.at - a.at);
  labels.forEach((label, i) => {                                // up, from the lowest …
    label.at = Math.min(label.at, (labels[i - 1]?.at ?? Infinity) - 12);
  });
  labels.reverse().forEach((label, i) => {                      // … then down from the upper edge
    label.at = Math.max(label.at, (labels[i - 1]?.at ?? -6) + 12);
  });
  return labels.map(({ name, style, at }) =>
    make("text", { class: style, x: plotWidth() - RIGHT + 8, y: at + 4 }, name));
}

function sliderTrack() {
  const axis = make("line", { class: "axis", x1: LEFT, x2: plotWidth() - RIGHT, y1: 12, y2: 12 });
  const svg = make("svg", { height: 38 }, axis);
  svg.append(...TIMES.map(tokens => upright("axis", tokens, 8, 16)));
  svg.append(make("line", { class: "cursor", y1: 12, y2: 38 }),
             make("circle", { class: "knob", cy: 12, r: 6 }));
  return svg;
}

/** A vertical line at a moment. */
const upright = (style, tokens, y1, y2) =>
  make("line", { class: style, x1: xOf(tokens), x2: xOf(tokens), y1, y2 });
const markLines = (y1, y2) =>
  Object.values(view.marks).map(tokens => upright("mark", tokens, y1, y2));

/** The names of the marks, above the plots; to the left of its line if the next mark is near. */
function markNames() {
  const svg = make("svg", { height: 14 }, make("line", { class: "cursor", y1: 0, y2: 14 }));
  const marks = Object.entries(view.marks).sort((a, b) => a[1] - b[1]);
  marks.forEach(([name, tokens], i) => {
    const near = i + 1 < marks.length && xOf(marks[i + 1][1]) - xOf(tokens) < 90;
    svg.append(make("text", { x: xOf(tokens) + (near ? -4 : 4), y: 11,
                              "text-anchor": near ? "end" : "start" }, name));
  });
  svg.append(...markLines(2, 14));
  return svg;
}

function timeAxis() {
  const step = niceStep(END / 8), svg = make("svg", { height: 18 });
  for (let tokens = 0; tokens <= END; tokens += step)
    svg.append(make("text", { x: xOf(tokens), y: 13, "text-anchor": "middle" },
                    compact.format(tokens)));
  svg.append(make("text", { x: plotWidth() - RIGHT + 8, y: 13 }, "tokens seen"));
  return svg;
}

function drawTime() {
  const { step, tokens } = view.snapshots[state.snapshot], x = xOf(tokens);
  $("now").textContent = `step ${step.toLocaleString("en")}\n${compact.format(tokens)} tokens`;
  $("slider").setAttribute("aria-valuenow", state.snapshot);
  $("slider").setAttribute("aria-valuetext", $("now").textContent);
  document.querySelector("#slider .knob").setAttribute("cx", x);
  for (const cursor of document.querySelectorAll(".cursor")) {
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
  $("play").textContent = state.playing ? "Pause" : "Play";
}

function dragTime(event) {
  if (event.type === "pointermove" && !event.buttons) return;
  if (event.type === "pointerdown") event.currentTarget.setPointerCapture(event.pointerId);
  const x = event.clientX - event.currentTarget.getBoundingClientRect().left;
  const tokens = (x - LEFT) / (plotWidth() - LEFT - RIGHT) * END;
  show({ snapshot: nearest(TIMES, tokens), playing: null });
}

async function play() {
  if (state.playing) return show({ playing: null });
  const mine = state.playing = {};                  // a token of this loop: a stopped loop stays so
  if (state.snapshot === LAST) state.snapshot = -1;
  while (state.playing === mine && state.snapshot < LAST) {
    await show({ snapshot: state.snapshot + 1 });
    await new Promise(resume => setTimeout(resume, 150));
  }
  if (state.playing === mine) show({ playing: null });
}
