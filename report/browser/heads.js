// ---------------------------------------------------------------- the grid of heads

function buildGrid() {
  const grid = $("grid");
  grid.replaceChildren();
  grid.style.gridTemplateColumns = `auto repeat(${H}, minmax(20px, 1fr))`;
  grid.classList.toggle("dense", DENSE);
  for (const layer of range(view.n_layers).reverse()) {         // layer 0 at the bottom
    const cells = range(H).map(h =>
      make("div", { role: "gridcell", id: nameOf(layer * H + h), tabindex: -1 }));
    cells.forEach((cell, h) => {
      cell.onclick = () => choose({ head: layer * H + h });
      cell.onpointerenter = cell.onfocus = () => { $("pointed").textContent = cell.title; };
      cell.onpointerleave = cell.onblur = () => { $("pointed").textContent = ""; };
    });
    const name = make("div", { role: "rowheader", class: "name" }, `L${layer}`);
    grid.append(make("div", { role: "row" }, name, ...cells));
  }
  const header = (attributes, text) => make("div", { role: "columnheader", ...attributes }, text);
  const names = range(H).map(h => header({ class: "column" }, `H${h}`));
  grid.append(make("div", { role: "row" }, make("div"), ...names));
  if (GROUP > 1) {
    const groups = range(view.n_kv_heads).map(k => header({
      class: "group", style: `grid-column: span ${GROUP}`,
      title: `these ${GROUP} heads share key/value head ${k}` }, `kv ${k}`));
    grid.append(make("div", { role: "row" }, make("div"), ...groups));
  }
  grid.onkeydown = moveInGrid;
}

function moveInGrid(event) {
  const head = headNamed(event.target.id);
  const to = head + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: H, ArrowDown: -H }[event.key];
  if (event.key === "Enter" || event.key === " ") choose({ head });
  else if (to >= 0 && to < N_HEADS) $(nameOf(to)).focus();
  else return;
  event.preventDefault();
}

function drawGrid() {
  const score = view.scores[state.score];
  const values = score ? score.values.flat(2) : [];             // one scale for all times
  const top = values.reduce((top, value) => Math.max(top, Math.abs(value)), 1);
  for (const head of range(N_HEADS)) {
    const cell = $(nameOf(head)), value = scoreOf(head);
    const number = value === null ? "–" : fixed(value, top > 10 ? 0 : top > 1 ? 1 : 2);
    cell.textContent = DENSE ? number.replace("0.", ".").slice(0, 3) : number;
    cell.setAttribute("aria-label", describe(head));
    cell.title = describe(head);
    cell.setAttribute("aria-selected", head === state.head);
    cell.tabIndex = head === state.head ? 0 : -1;
    paint(cell, value < 0 ? "query" : "key", Math.abs(value ?? 0) / top);
  }
  $("scale").hidden = !score;
  drawScale($("scale"), top, values.some(value => fixed(value ?? 0) < 0));
  const explanation = page.explanations[state.score];
  const { step } = view.snapshots[state.snapshot];
  $("explanation").textContent = !score ? ""
    : `Scores on ${view.scored}, step ${step.toLocaleString("en")}.`
      + (explanation ? ` ${spoken(state.score)}: ${explanation}` : "");
  const name = nameOf(state.head), rest = describe(state.head).slice(name.length);
  $("head").replaceChildren(name, make("span", { class: "caption" }, rest));
}

/** What the colours of a grid mean: from 0 to `top`, or from −top to top if some are negative. */
function drawScale(scale, top, signed) {
  const most = String(+top.toFixed(1));
  scale.classList.toggle("signed", signed);
  scale.setAttribute("aria-label", signed ? `Colour: −${most} orange, 0 neutral, ${most} blue`
    : `Colour: 0 to ${most}`);
  drawTicks(scale, signed ? [`−${most}`, "0", most] : ["0", most]);
}

/** "L1H3 · prefix matching 0.94 (0.92–0.96) · ablated: second copy +2.10 nats (1.9–2.3)" */
function describe(head) {
  const value = scoreOf(head);
  const ablated = view.snapshots[state.snapshot].step === view.causal_step;
  const rise = ablated ? view.causal[nameOf(head)] : undefined;
  const parts = [nameOf(head)];
  if (value !== null) {
    const [low, high] = intervalOf(head, state.score) ?? [];
    parts.push(`${spoken(state.score)} ${fixed(value)}${between(low, high, fixed)}`);
  }
  if (rise !== undefined) {
    const [low, high] = intervalOf(head, "alone") ?? [];
    parts.push(`ablated: ${view.causal_loss} ${nats({ value: rise, low, high })}`);
  }
  return parts.join(" · ");
}

// ---------------------------------------------------------------- patterns as pictures

/** A head's pattern on a canvas of size × size. If there are more tokens than pixels, a pixel shows
 *  its strongest weight, so that thin stripes survive. */
function picture(head, size, canvas = make("canvas")) {
  const T = shown.tokens.length, strongest = new Uint8Array(size * size);
  let at = head * triangle(T);
  for (let q = 0; q < T; q++)
    for (let k = 0; k <= q; k++, at++) {
      const pixel = Math.floor(q * size / T) * size + Math.floor(k * size / T);
      if (shown.patterns[at] > strongest[pixel]) strongest[pixel] = shown.patterns[at];
    }
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = ramp[strongest[i]];
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function drawSiblings() {
  const layer = layerOf(state.head);
  const size = Math.min(shown.tokens.length, Math.round(110 * devicePixelRatio));
  $("layer").textContent = `All heads of layer ${layer}`;
  const drawn = `${state.run} ${layer}`;
  if ($("siblings").dataset.drawn !== drawn) {
    $("siblings").dataset.drawn = drawn;
    $("siblings").replaceChildren(...range(H).map(h => {
      const button = make("button", {}, make("canvas"), `H${h}`);
      button.onclick = () => choose({ head: layer * H + h });
      return button;
    }));
  }
  [...$("siblings").children].forEach((button, h) => {
    button.setAttribute("aria-pressed", layer * H + h === state.head);
    button.setAttribute("aria-label", `pattern of ${nameOf(layer * H + h)}`);
    picture(layer * H + h, size, button.firstChild);
  });
}

// ---------------------------------------------------------------- the matrix

const GUTTER = 52, TOP = 6;         // room for labels: left and below, and half a line above

function matrixSize() {
  const T = shown.tokens.length, scale = devicePixelRatio;
  const pixels = Math.max(1, Math.floor(($("matrix").clientWidth - GUTTER) * scale));
  // Cells of whole pixels, if there are enough pixels.
  const side = (pixels >= T ? pixels - pixels % T : pixels) / scale;
  return { T, scale, side, cell: side / T, pixels };
}

function drawMatrix() {
  const { T, scale, side, cell, pixels } = matrixSize();
  const canvas = $("matrix"), width = canvas.clientWidth;
  canvas.style.height = `${TOP + side + GUTTER}px`;
  canvas.width = width * scale;
  canvas.height = (TOP + side + GUTTER) * scale;
  canvas.setAttribute("aria-label",
    `Attention pattern of ${nameOf(state.head)}: rows are ${T} queries, columns ${T} keys`);
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.translate(GUTTER, TOP);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(picture(state.head, Math.min(T, pixels)), 0, 0, side, side);
  pen.fillStyle = colours.line;
  pen.fillRect(-1, 0, 1, side);
  pen.fillRect(-1, side, side + 1, 1);
  if (focus() !== null) drawCross(pen, focus(), cell, T);
  drawLabels(pen, side, cell, T);
}

/** Row i, the keys that token i attends to, and column i, the queries that attend to it. */
function drawCross(pen, i, cell, T) {
  for (let q = i + 1; q < T; q++) {
    pen.fillStyle = shade("query", strengthOf(weight(state.head, q, i)));
    pen.fillRect(i * cell, q * cell, Math.max(cell, 1), Math.max(cell, 1));
  }
  const edge = (colour, x, y, width, height) => {   // just outside, so that it hides no small cell
    pen.strokeStyle = colours[colour];
    pen.strokeRect(x - 0.5, y - 0.5, width + 1, height + 1);
  };
  edge("query", i * cell, (i + 1) * cell, cell, (T - i - 1) * cell);
  edge("key", 0, i * cell, (i + 1) * cell, cell);
  if (state.cell) edge("ink", state.cell.k * cell, state.cell.q * cell, cell, cell);
}

/** Labels: every token if there is room, else some positions; always the tokens in focus. */
function drawLabels(pen, side, cell, T) {
  const every = cell >= 9 ? 1 : niceStep(T / 7);
  const bold = { rows: focus(), columns: state.cell?.k ?? focus() };
  const far = (i, focused) =>
    focused === null || i === focused || Math.abs(i - focused) * cell >= 13;
  const write = (i, focused, colour, x, y) => {
    const spelled = every === 1 || i === focused;
    const text = spelled ? label(shown.tokens[i]) : String(i);
    pen.fillStyle = i === focused ? colours[colour] : colours.soft;
    const family = spelled ? "ui-monospace, monospace" : "system-ui, sans-serif";
    pen.font = `${i === focused ? 600 : 400} 11px ${family}`;
    pen.fillText(text.length > 7 ? `${text.slice(0, 6)}…` : text, x, y);
  };
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const i of range(T))
    if ((i % every === 0 || i === bold.rows) && far(i, bold.rows))
      write(i, bold.rows, "key", -7, (i + 0.5) * cell);
  pen.rotate(-Math.PI / 2);
  for (const i of range(T))
    if ((i % every === 0 || i === bold.columns) && far(i, bold.columns))
      write(i, bold.columns, state.cell ? "key" : "query", -side - 7, (i + 0.5) * cell);
}

function overMatrix(event) {
  const { side, cell } = matrixSize();
  const k = Math.floor((event.offsetX - GUTTER) / cell);
  const q = Math.floor((event.offsetY - TOP) / cell);
  const inside = k >= 0 && k <= q && event.offsetY < TOP + side;
  Object.assign(state, { cell: inside ? { q, k } : null, hovered: inside ? q : null });
  drawFocus();
}

function drawReadout() {
  const bdi = i => make("bdi", {}, label(shown.tokens[i]));
  if (!state.cell) return $("readout").replaceChildren("rows: queries, columns: keys");
  const { q, k } = state.cell;
  const value = weight(state.head, q, k).toFixed(2);
  $("readout").replaceChildren("query '", bdi(q), `' (${q}) → key '`, bdi(k), `' (${k}): ${value}`);
}
