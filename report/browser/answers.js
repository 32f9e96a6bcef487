// ---------------------------------------------------------------- did induction heads form?

const YES = ["yes", "only with begin token", "only without begin token"];

/** A control that cannot form induction heads, and still does what they do. */
const failing = run => run.evidence?.control && YES.includes(run.evidence.answers?.behaviour);
const gated = run => page.runs.some(failing) && !run.evidence?.control;

// The columns of the table: the header of their group, their own header, and what a run says there:
// [text, text on hover], or only a text. Words may be broken into lines.
const RIGHT_TOKENS = "behaviour: known tokens right", LOST = "mechanism: gain lost without";
const COLUMNS = [
  ["run", "", run => nameOfRun(run) + (run.evidence?.control ? " (control)" : "")],
  ["formed", "", formed, "words"],
  [RIGHT_TOKENS, "", run => answer(run, "behaviour"), "words"],
  [RIGHT_TOKENS, "behind begin token", run => percent(run.evidence?.behaviour?.begun?.accuracy)],
  [RIGHT_TOKENS, "without it", run => percent(run.evidence?.behaviour?.bare?.accuracy)],
  [RIGHT_TOKENS, "by chance", run => percent({ value: run.evidence?.behaviour?.begun?.chance })],
  [LOST, "", run => answer(run, "mechanism"), "words"],
  [LOST, "heads", headsOf, "words"],
  [LOST, "their edges", run => removed(run, "gain_removed")],
  [LOST, "random edges", run => removed(run, "by_random")],
  ["transfer", "periods", run => [answer(run, "transfer_periods"), periodsOf(run)]],
  ["transfer", "tokens", run => [answer(run, "transfer_tokens"), unseenOf(run)]],
  ["onset", "tokens seen", onset],
];

const answer = (run, question) => run.evidence?.answers?.[question] ?? "–";

function formed(run) {
  if (failing(run)) return "control fails";
  if (gated(run) && run.evidence)
    return ["not shown", `a control fails (by itself: ${answer(run, "formed")})`];
  return run.evidence ? answer(run, "formed") : "not examined";
}

/** The heads that attend to induction targets; on hover what each does. */
function headsOf(run) {
  const heads = run.evidence?.mechanism?.heads ?? [];
  const more = heads.length > 4 ? ` + ${heads.length - 4}` : "";
  return [heads.slice(0, 4).map(({ head }) => head).join(" ") + more || "–",
          heads.map(describeRole).join("\n")];
}

/** "L1H3 0.94 (0.92–0.96), copies" */
function describeRole({ head, role, prefix_matching: score }) {
  const value = score?.value == null ? ""
    : ` ${fixed(score.value)}${between(score.low, score.high, fixed)}`;
  return `${head}${value}, ${role}`;
}

const KINDS = [["begun", "behind the begin token"], ["bare", "without it"]];

/** "101% / 98%": behind the begin token and without it; the intervals on hover. */
function removed(run, what) {
  const knockout = run.evidence?.mechanism?.knockout;
  if (!knockout) return "–";
  return [KINDS.map(([kind]) => percent(knockout[kind]?.[what], false)).join(" / "),
          KINDS.map(([kind, name]) => `${name}: ${percent(knockout[kind]?.[what])}`).join("\n")];
}

function periodsOf(run) {
  const { by_period: periods = {}, trained } = run.evidence?.transfer ?? {};
  const parts = Object.entries(periods ?? {}).map(([period, n]) => `${period}: ${percent(n)}`);
  if (trained) parts.push(`trained periods: ${percent(trained)}`);
  return parts.join(", ");
}

function unseenOf(run) {
  const unseen = run.evidence?.transfer?.unseen_tokens;
  return !unseen ? "" : KINDS.map(([kind, name]) =>
    `${percent(unseen[kind]?.accuracy)} ${name}`).join(", ");
}

function onset(run) {
  const transition = run.evidence?.transition;
  if (transition?.onset?.value == null) return "–";
  const { value, low, high } = transition.onset;
  const faded = transition.faded == null ? "" : `, faded at ${compact.format(transition.faded)}`;
  return compact.format(value) + between(low, high, compact.format) + faded;
}

/** The table: one row per run. With several runs a row can be selected. */
function buildAnswers() {
  const several = page.runs.length > 1;
  $("answers").hidden = !several && !view.evidence;
  const groups = COLUMNS.map(([group]) => group);
  const first = make("tr"), second = make("tr");
  groups.forEach((group, c) => {
    const width = groups.filter(other => other === group).length;
    if (groups.indexOf(group) === c)
      first.append(make("th", { scope: "colgroup", colspan: width, class: "group" }, group));
    second.append(make("th", { scope: "col", class: groups.indexOf(group) === c ? "group" : "" },
                       COLUMNS[c][1]));
  });
  const rows = page.runs.map((run, r) => {
    const row = make("tr", several ? { role: "row", id: `run-${r}` } : {});
    COLUMNS.forEach(([group, , read, words = ""], c) => {
      const [text, hint = ""] = [read(run)].flat();
      const style = `${words} ${groups.indexOf(group) === c ? "group" : ""}`;
      row.append(make(c ? "td" : "th", { class: style, title: hint || text,
                                         ...c ? {} : { scope: "row" } }, text));
    });
    row.classList.toggle("failing", Boolean(failing(run)));
    if (several) row.onclick = () => selectRun(r);
    return row;
  });
  $("runs").replaceChildren(make("thead", {}, first, second), make("tbody", {}, ...rows));
  if (!several) return;
  $("runs").setAttribute("role", "grid");
  $("runs").setAttribute("aria-label", "Runs: arrow keys select one");
  $("runs").onkeydown = event => {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key], to = state.run + step;
    if (step === undefined) return;
    event.preventDefault();
    if (!(to in page.runs)) return;
    selectRun(to);
    $(`run-${to}`).focus();
  };
}

/** What the table says of the selected run, and the rest of its evidence in words. */
function drawAnswers() {
  page.runs.forEach((run, r) => {
    const row = $(`run-${r}`);
    row?.setAttribute("aria-selected", r === state.run);
    row?.setAttribute("tabindex", r === state.run ? 0 : -1);
  });
  const alarms = page.runs.filter(failing).map(nameOfRun);
  $("alarm").hidden = !alarms.length;
  $("alarm").textContent = `A control fails: ${alarms.join(", ")} cannot form induction heads, and `
    + "still predicts repeated tokens. So nothing is claimed of the other runs.";
  const summary = view.evidence?.summary ?? "";
  $("summary").textContent = summary && gated(view)
    ? `Not shown, because a control fails. Taken by itself: ${summary}` : summary;
  $("detail").textContent = details(view);
}

function details(run) {
  const { losses, transfer, step } = run.evidence ?? {}, parts = [];
  if (losses?.gain) {
    const plain = n => nats(n, value => fixed(value));
    parts.push(`Loss of the first copy ${plain(losses.first)}, of the second `
               + `${plain(losses.second)}; gain ${plain(losses.gain)}`);
  }
  if (periodsOf(run)) parts.push(`Known tokens right by period ${periodsOf(run)}`);
  if (unseenOf(run)) parts.push(`Of tokens never repeated in training: ${unseenOf(run)}`);
  if (transfer?.text) {
    const { matched, by_random } = transfer.text;
    parts.push(`On text, without the same edges, tokens that follow an earlier copy: `
               + `${nats(matched)}, without random edges ${nats(by_random)}`);
  }
  if (run.evidence && step != null) parts.push(`Examined at step ${step.toLocaleString("en")}`);
  return parts.map(part => `${part}.`).join(" ");
}
