// ---------------------------------------------------------------- the text

function layTokens(run, passage) {
  Object.assign(shown, { run, passage });
  shown.tokens = view.passages[passage].tokens;
  state.token ??= Math.floor(shown.tokens.length / 2);
  $("tokens").replaceChildren(...shown.tokens.map((token, i) => {
    // A newline is shown as a character and breaks the line.
    const text = token.replace(/\n/g, "↵\n").replace(/\r/g, "␍") || "∅";
    return make("span", { role: "option", id: `token-${i}`, "data-i": i,
                          class: token.includes("\n") ? "lines" : "" }, text);
  }));
  reveal(state.token);
}

function select(token) {
  Object.assign(state, { token, hovered: null });
  drawFocus();
  reveal(token);
}

/** Scroll the text (not the page) to a token that is out of sight. */
function reveal(token) {
  const list = $("tokens"), top = $(`token-${token}`)?.offsetTop;
  if (top < list.scrollTop || top + 22 > list.scrollTop + list.clientHeight)
    list.scrollTop = top - list.clientHeight / 2;
}

/** Draw what depends on the token in focus. */
function drawFocus() {
  if (!shown.patterns) return;                      // the pointer moves before they are inflated
  const i = focus();
  const byLoss = state.colour === "loss" && shown.losses !== null;
  [...$("tokens").children].forEach((span, j) => {
    if (byLoss) paint(span, "query", lossStrength(j));
    else {
      const seen = i === null ? 0 : j > i ? weight(state.head, j, i) : weight(state.head, i, j);
      paint(span, j > i ? "query" : "key", strengthOf(seen));
    }
    span.classList.toggle("right", byLoss && j > 0 && shown.right[j - 1] === 1);
    span.classList.toggle("focus", j === i);
    span.setAttribute("aria-selected", j === state.token);
  });
  if (state.token === null) $("tokens").removeAttribute("aria-activedescendant");
  else $("tokens").setAttribute("aria-activedescendant", `token-${state.token}`);
  drawCost(i, byLoss);
  drawStrongest(i);
  drawReadout();
  drawMatrix();
}

function drawStrongest(i) {
  if (i === null) return $("strongest").replaceChildren();
  const keys = range(i + 1).map(k => [k, weight(state.head, i, k)]);
  const queries = range(shown.tokens.length).slice(i + 1).map(q => [q, weight(state.head, q, i)]);
  const name = label(shown.tokens[i]).slice(0, 12);
  $("strongest").replaceChildren(strongest("key", `'${name}' (${i}) attends to`, keys),
                                 strongest("query", "is attended to by", queries));
}

/** The five strongest of some pairs [token, weight], without those that would read 0.00. */
function strongest(colour, title, pairs) {
  const listed = pairs.filter(([, w]) => w > 0.005).sort((a, b) => b[1] - a[1]).slice(0, 5);
  const items = listed.map(([i, w]) => make("li", { style: `--share: ${100 * w}%`, "data-i": i },
    make("bdi", {}, label(shown.tokens[i])), make("span", { class: "soft" }, String(i)),
    make("span", {}, w.toFixed(2))));
  return make("div", { class: colour, style: `--colour: var(--${colour})` },
    make("h3", {}, title), make("ol", {}, ...items));
}

// ---------------------------------------------------------------- what each token costs

/** "2.31 nats, predicted right"; "" for the first token, which nothing predicts. */
function costOf(i) {
  if (!shown.losses || i === 0) return "";
  return `${fixed(shown.losses[i - 1])} nats, predicted ${shown.right[i - 1] ? "right" : "wrong"}`;
}

/** The loss that is drawn at full strength: that of guessing among all tokens, or without that the
 *  highest of this passage. */
function fullLoss() {
  const { vocab_size } = view.passages[state.passage];
  return vocab_size ? Math.log(vocab_size) : Math.max(1, ...shown.losses);
}

function lossStrength(i) {
  if (i === 0) return 0;
  const loss = shown.losses[i - 1];
  return Number.isFinite(loss) ? Math.min(1, Math.max(0, loss / fullLoss())) : 1;
}

/** Say on hover, and to screen readers, what each token is and costs at the selected time. */
function nameTokens() {
  [...$("tokens").children].forEach((span, i) => {
    const cost = costOf(i);
    span.title = cost;
    span.setAttribute("aria-label", `${label(shown.tokens[i])} (${i})${cost && `, ${cost}`}`);
  });
}

/** The cost of the token in focus, and what the colours mean. */
function drawCost(i, byLoss) {
  $("colour-choice").hidden = $("cost").hidden = shown.losses === null;
  $("cost-legend").hidden = !byLoss;
  if (shown.losses === null) return;
  const named = i !== null && [make("bdi", {}, label(shown.tokens[i]).slice(0, 12)), `' (${i}): `];
  $("cost").replaceChildren(...named ? ["'", ...named, costOf(i) || "not predicted"] : []);
  if (!byLoss) return;
  const { vocab_size } = view.passages[state.passage], most = fixed(fullLoss(), 1);
  drawTicks($("loss-scale"), ["0", `${most} nats${vocab_size ? ", as guessing" : ""}`], [0, 1]);
}
