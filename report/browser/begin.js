// ---------------------------------------------------------------- begin

/** Move from `at` by an arrow key, Home or End. */
function stepTo(event, at, last, follow) {
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  follow(Math.min(Math.max(to, 0), last));
}

function listen() {
  $("colour").onchange = event => { state.colour = event.target.value; drawFocus(); };
  $("score").onchange = event => choose({ score: event.target.value });
  $("matrix").onpointermove = overMatrix;
  $("matrix").onpointerleave = () => {
    Object.assign(state, { cell: null, hovered: null });
    drawFocus();
  };
  $("matrix").onclick = () => { if (state.cell) select(state.cell.q); };
  $("tokens").onpointerover = event => {
    state.hovered = event.target.dataset.i ? +event.target.dataset.i : null;
    drawFocus();
  };
  $("tokens").onpointerleave = () => { state.hovered = null; drawFocus(); };
  $("tokens").onclick = event => { if (event.target.dataset.i) select(+event.target.dataset.i); };
  $("tokens").onkeydown = event => {
    if (event.key === "Escape") select(null);
    else stepTo(event, state.token ?? -1, shown.tokens.length - 1, select);
  };
  const moveTo = snapshot => show({ snapshot, playing: null });
  $("slider").onkeydown = event => stepTo(event, state.snapshot, LAST, moveTo);
  for (const id of ["slider", "plots"]) $(id).onpointerdown = $(id).onpointermove = dragTime;
  $("play").onclick = play;
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { readColours(); show(); };
  new ResizeObserver(() => choose()).observe($("plots"));
}

/** Select a run: everything but the table of answers and the time axis is its own. */
function selectRun(run) {
  openRun(run);
  for (const id of ["title", "subtitle"]) $(id).textContent = view[id];
  $("notes").replaceChildren(
    make("p", {}, "Attention weights show what was averaged, not what was used."),
    ...view.notes.map(note => make("p", {}, note)));
  $("score").replaceChildren(...Object.keys(view.scores).map(name =>
    make("option", { value: name }, spoken(name))));
  if (state.score) $("score").value = state.score;
  namePassages();
  $("slider").hidden = $("play").hidden = LAST === 0;
  $("slider").setAttribute("aria-valuemax", LAST);
  $("pointed").hidden = !view.evidence;
  $("head").classList.toggle("two-lines", Boolean(view.evidence));  // so that nothing moves below it
  drawAnswers();
  buildGrid();
  buildHow();
  choose();
}

function namePassages() {
  if (view.passages.length === 1) {
    $("passage-title").textContent = view.passages[0].title;
    return;
  }
  const options = view.passages.map(({ title }, i) => make("option", { value: i }, title));
  const select = make("select", { id: "passage", "aria-label": "Passage" }, ...options);
  select.value = state.passage;
  select.onchange = () => show({ passage: +select.value, token: null });
  $("passage-title").replaceChildren(select);
}

function begin() {
  document.title = page.runs.map(nameOfRun).join(", ");
  const weights = [0, 0.01, 0.1, 0.25, 0.5, 1];
  drawTicks($("legend"), weights.map(String), weights.map(strengthOf));
  readColours();
  openRun(0);
  listen();
  buildAnswers();
  selectRun(0);
}

begin();
