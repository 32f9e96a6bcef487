// ---------------------------------------------------------------- how: the matrix of paths

const INPUTS = { q: "queries", k: "keys", v: "values" };
const pathId = ({ sender, receiver, into }) => `path-${sender}-${receiver}-${into}`;
const unique = values => [...new Set(values)];

/** "L0H3 → keys of L1H3: +6.20 nats (5.9–6.5) without this path" */
const describePath = ({ sender, receiver, into, rise }) =>
  `${sender} → ${INPUTS[into]} of ${receiver}: ${nats(rise)} without this path`;

function buildHow() {
  const mechanism = view.evidence?.mechanism;
  const paths = (mechanism?.paths ?? []).filter(path => path.rise?.value != null
    && [path.sender, path.receiver].every(name => headNamed(name) !== undefined));
  $("how").hidden = !mechanism;
  $("how").classList.toggle("without-paths", !paths.length);
  $("paths-part").hidden = $("pair-part").hidden = !paths.length;
  state.path = paths.reduce((best, path) =>
    !best || Math.abs(path.rise.value) > Math.abs(best.rise.value) ? path : best, null);
  if (!mechanism) return;
  for (const part of document.querySelectorAll(".examined"))
    part.textContent = view.evidence.step == null ? ""
      : `at step ${view.evidence.step.toLocaleString("en")}`;
  buildPaths(paths);
  buildBars(mechanism);
  $("findings").replaceChildren(...findings(mechanism).map(text => make("li", {}, text)));
}

/** Senders as rows, receivers as columns, a cell for each input of the receiver. */
function buildPaths(paths) {
  const receivers = unique(paths.map(path => path.receiver)), inputs = Object.keys(INPUTS);
  const senders = unique(paths.map(path => path.sender))
    .sort((a, b) => headNamed(a) - headNamed(b));
  const top = Math.max(...paths.map(path => Math.abs(path.rise.value)), 1e-9);
  const header = (text, span, group) => make("div", {
    role: "columnheader", class: group ? "column group" : "column",
    style: `grid-column: span ${span}` }, text);
  const cellOf = (sender, receiver, into) => {
    const path = paths.find(path =>
      path.sender === sender && path.receiver === receiver && path.into === into);
    return path ? pathCell(path, top) : make("div", { role: "gridcell" }, "");
  };
  const rows = senders.map(sender => make("div", { role: "row" },
    make("div", { role: "rowheader", class: "name" }, sender),
    ...receivers.flatMap(receiver => inputs.map(into => cellOf(sender, receiver, into)))));
  $("paths").style.gridTemplateColumns = `auto repeat(${3 * receivers.length}, minmax(28px, 1fr))`;
  $("paths").replaceChildren(
    make("div", { role: "row" }, make("div"), ...receivers.map(name => header(name, 3, true))),
    make("div", { role: "row" }, make("div"),
         ...receivers.flatMap(() => inputs.map(into => header(into, 1)))), ...rows);
  $("paths").onkeydown = moveInPaths;
  if (paths.length) drawScale($("path-scale"), top, paths.some(path => path.rise.value < 0));
}

function pathCell(path, top) {
  const { value } = path.rise;
  const text = minus(fixed(value, Math.abs(value) < 0.995 ? 2 : 1)).replace("0.", ".");
  const cell = make("div", { role: "gridcell", id: pathId(path), title: describePath(path),
                             "aria-label": describePath(path) }, text === ".00" ? "0" : text);
  paint(cell, value < 0 ? "query" : "key", Math.abs(value) / top);
  const tell = path => { $("path-readout").textContent = path ? describePath(path) : ""; };
  cell.onclick = () => choosePath(path);
  cell.onpointerenter = cell.onfocus = () => tell(path);
  cell.onpointerleave = cell.onblur = () => tell(null);
  cell.onkeydown = event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choosePath(path);
  };
  return cell;
}

/** Show a path's sender and receiver; the page follows the receiver. */
function choosePath(path) {
  state.path = path;
  choose({ head: headNamed(path.receiver) });
}

function moveInPaths(event) {
  const rows = [...$("paths").children].slice(2).map(row => [...row.children].slice(1));
  const row = rows.findIndex(cells => cells.includes(event.target));
  const column = rows[row]?.indexOf(event.target);
  const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0],
                          ArrowDown: [1, 0] }[event.key] ?? [];
  const to = rows[row + down]?.[column + right];
  if (down === undefined) return;
  event.preventDefault();
  if (to?.id) to.focus();
}

/** The patterns of the selected path's sender and receiver, at the selected time. */
function drawPair() {
  if (!state.path) return;
  for (const cell of $("paths").querySelectorAll("[id]")) {
    const selected = cell.id === pathId(state.path);
    cell.setAttribute("aria-selected", selected);
    cell.tabIndex = selected ? 0 : -1;
  }
  $("pair-caption").textContent = describePath(state.path);
  const size = Math.min(shown.tokens.length, Math.round(220 * devicePixelRatio));
  $("pair").replaceChildren(...["sender", "receiver"].map(part => {
    const name = state.path[part], head = headNamed(name);
    const button = make("button", { "aria-label": `pattern of the ${part} ${name}` },
                        picture(head, size), make("span", {}, `${part} ${name}`));
    button.onclick = () => choose({ head });
    return button;
  }));
}

// ---------------------------------------------------------------- how: what removing costs

/** What is removed: its name, and the fraction of the repeat gain that goes with it, behind the
 *  begin token and without it, or on both kinds of rows together. */
function removals({ knockout, knockout_all_heads: everywhere, ablation }) {
  const each = (pair, what) => pair && KINDS.map(([kind]) => pair[kind]?.[what] ?? null);
  return [["without these heads' induction edges", each(knockout, "gain_removed")],
          ["without as many random edges", each(knockout, "by_random")],
          ["reading other tokens over them", each(knockout, "by_misreading")],
          ["without all heads' induction edges", each(everywhere, "gain_removed")],
          ...knockout ? [] : [["without as many random edges", each(everywhere, "by_random")]],
          ["these heads mean-ablated", ablation && [ablation.gain_removed ?? null]]]
    .filter(([, values]) => values?.some(n => n?.value != null));
}

/** Bars from 0 to 100%, with the interval as a whisker. Beyond a quarter outside they are cut; the
 *  number says how far they reach. */
function buildBars(mechanism) {
  const rows = removals(mechanism);
  const ends = rows.flatMap(([, values]) => values).filter(Boolean)
    .flatMap(n => [n.value, n.low ?? n.value, n.high ?? n.value]);
  const low = Math.max(-0.25, Math.min(0, ...ends)), high = Math.min(1.25, Math.max(1, ...ends));
  const at = value => 100 * (Math.min(Math.max(value, low), high) - low) / (high - low);
  const tick = value => make("i", { class: "tick", style: `left: ${at(value)}%` });
  const bar = (n, kind) => {
    const ends = [at(0), at(n.value)].sort((a, b) => a - b);
    const track = make("div", { class: "track" }, tick(0), tick(0.5), tick(1), make("i", {
      class: `bar ${kind}${n.value < 0 ? " negative" : ""}`,
      style: `left: ${ends[0]}%; width: ${ends[1] - ends[0]}%` }));
    if (n.low != null && n.high != null) track.append(make("i", {
      class: "whisker", style: `left: ${at(n.low)}%; width: ${at(n.high) - at(n.low)}%` }));
    return [track, make("span", { class: "number" }, percent(n))];
  };
  $("bars").replaceChildren(...rows.flatMap(([name, values]) =>
    values.flatMap((n, i) => {
      const kind = values.length === 1 ? "both" : KINDS[i][0];
      const title = make("span", { class: "name" }, i === 0 ? name : "");
      return n?.value == null ? [] : [title, ...bar(n, kind)];
    })));
  const legend = [...KINDS, ["both", "both together"]]
    .filter(([kind]) => $("bars").querySelector(`.${kind}`))
    .map(([kind, name]) => make("span", {}, make("i", { class: `swatch ${kind}` }), name));
  $("bars").append(make("p", { class: "caption" }, ...legend));
  const { knockout, knockout_all_heads: everywhere } = mechanism;
  const gains = KINDS.filter(([kind]) => (knockout ?? everywhere)?.[kind]?.gain)
    .map(([kind, name]) => `${fixed((knockout ?? everywhere)[kind].gain.value)} nats ${name}`);
  if (gains.length)
    $("bars").append(make("p", { class: "caption" }, `of a gain of ${gains.join(", ")}`));
  // Little is lost of a gain that is hardly there.
  const answer = view.evidence.answers?.behaviour;
  $("bars").classList.toggle("faint", ["no", "weak", "not shown"].includes(answer));
  $("bars").hidden = !rows.length;
}

/** The rest of the evidence in words: the heads, where they attend, what feeds them. */
function findings({ heads, peak, knockout, ablation, uniform, previous_token_heads: before }) {
  const lines = [];
  if (heads?.length) lines.push(`Attend to induction targets: ${heads.map(describeRole).join("; ")}`
    + (uniform == null ? "" : ` (uniform attention: ${fixed(uniform)})`));
  if (peak) {
    const side = peak.offset < 0 ? "before" : "after", distance = Math.abs(peak.offset);
    const place = distance === 0 ? "on the induction target"
      : `${distance} token${distance > 1 ? "s" : ""} ${side} it`;
    lines.push(`${peak.head} attends most ${place} (${fixed(peak.weight)})`);
  }
  const known = KINDS.filter(([kind]) => knockout?.[kind]?.known)
    .map(([kind, name]) => `${nats(knockout[kind].known)} ${name}`);
  if (known.length) lines.push(`Known tokens without these edges: ${known.join(", ")}`);
  if (ablation?.known) lines.push(
    `These heads mean-ablated: known tokens ${nats(ablation.known)}`
    + (ablation.first_copy ? `, first copy ${nats(ablation.first_copy)}` : ""));
  if (before?.heads?.length) {
    const into = Object.entries(before.into ?? {})
      .map(([part, n]) => `${INPUTS[part] ?? part} ${nats(n)}`);
    lines.push(
      `Previous-token heads ${before.heads.join(", ")} mean-ablated: ${nats(before.total)}; with `
      + `all patterns fixed ${nats(before.patterns_kept)}`
      + (into.length ? `; only on the direct path into their ${into.join(", ")}` : ""));
  }
  return lines;
}
