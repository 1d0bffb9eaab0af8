// One card for each run: its text at this step, every column of the window a token or a gap as wide as what will fill it.
"use strict";

const special = new Set(header.special);
const GAP = "····"; // stands in a gap whose token the file does not know

// Characters that would not be seen, or would move others: control characters, line separators, marks of direction.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const escaped = (char) => {
  const code = char.charCodeAt(0).toString(16);
  return code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`;
};

// What is seen of a piece: [space before, text, line breaks after].
function face(piece) {
  const breaks = (piece.match(/\n/g) ?? []).length;
  const space = /^ +(?=\S)/.exec(piece)?.[0] ?? "";
  let text = piece.slice(space.length).replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(HIDDEN, escaped);
  if (/^ *$/.test(text)) text = "␣".repeat(Math.max(1, text.length));
  return [space, text, breaks];
}

function card(run, prompt, trajectory) {
  const { cells } = track(run, prompt, trajectory);
  const text = element("p", { class: "text" });
  const lead = leadingText(run, prompt, trajectory);
  if (lead) text.append(element("span", { class: "given" }, lead));
  let specials = 0;
  const slots = cells.map((cell, column) => {
    const [space, shown, breaks] = cell.piece === null ? [" ", GAP, 0] : face(cell.piece);
    const isSpecial = special.has(cell.piece);
    if (isSpecial) specials += 1;
    // A response's end is filled with one and the same token: name it once.
    const label = isSpecial && specials > 1 ? "∎" : shown;
    const node = element("span", { "data-column": column });
    const isFirst = column === 0 && !lead;
    text.append(isFirst ? "" : isSpecial && !space ? " " : space, node, ..."\n".repeat(breaks));
    return { node, cell, label, isSpecial };
  });
  const score = element("b");
  const kind = element("span");
  const state = element("div", { class: "state" });
  const node = element(
    "article",
    { class: "run", "--run": run.color, "data-run": run.name },
    element(
      "header",
      {},
      element("h2", {}, element("span", { class: "dot" }), run.name),
      element("span", { class: "about" }, about(run)),
      run.end.complete ? null : element("span", { class: "badge" }, "interrupted"),
      element("span", { class: "score" }, kind, score),
    ),
    text,
    state,
  );
  return { node, update: (time, colour) => updateCard({ run, prompt, trajectory, slots, score, kind, state }, time, colour) };
}

// The prompt stands before the response where the text that was scored continues it.
function leadingText(run, prompt, trajectory) {
  const { prompt: given, given: cells } = header.prompts[prompt];
  const text = run.end.results[prompt].texts[trajectory];
  return typeof given === "string" && !cells.length && given && text.startsWith(given) ? given : "";
}

function about({ name, config }) {
  if (config.guidance === "none") return name === "unguided" ? "" : "unguided";
  const optimizer = { adam: "Adam", sgd: "SGD" }[config.optimizer];
  const method = config.guidance === name ? "" : `${config.guidance}, `;
  return `${method}${config.guidance_steps} ${optimizer} step${config.guidance_steps === 1 ? "" : "s"}, lr ${config.guidance_lr}`;
}

function updateCard({ run, prompt, trajectory, slots, score, kind, state }, time, colour) {
  const record = recordAt(track(run, prompt, trajectory), time);
  let filled = 0, open = 0;
  for (const { node, cell, label, isSpecial } of slots) {
    const done = cell.time !== null && cell.time <= time;
    if (!cell.given) done ? (filled += 1) : (open += 1);
    if (done) {
      const known = paint(node, cell.given ? null : colour.of(cell), colour);
      const kinds = ["token", !known && !cell.given && "plain", isSpecial && "special", cell.time === time && !cell.given && "new"];
      node.className = kinds.filter(Boolean).join(" ");
      if (/^[↵⇥␣]+$/.test(label)) node.classList.add("control");
      node.textContent = label;
      node.removeAttribute("data-ghost");
      node.removeAttribute("aria-label");
    } else {
      const known = colour === COLOURS.order ? false : paint(node, colour.of(record?.at.get(Number(node.dataset.column)) ?? {}), colour);
      if (!known) paint(node, null, colour);
      node.className = known ? "mask" : "mask none";
      node.textContent = "";
      node.dataset.ghost = label;
      node.setAttribute("aria-label", "masked");
    }
  }
  const over = time >= times.at(-1) && run.end.complete;
  const reward = over ? finalReward(run, prompt, trajectory) : (record?.reward ?? null);
  kind.textContent = reward === null ? "" : over ? "reward" : "relaxed reward";
  score.textContent = reward === null ? "" : signed(reward);
  state.replaceChildren(
    element("span", {}, `${filled} of ${filled + open} tokens`),
    ...(record && open ? [element("span", {}, `entropy ${plain(record.entropy)} nats`)] : []),
    ...(record && open && record.weight !== null ? [element("span", {}, `weight ${plain(record.weight)}`)] : []),
  );
}

// What the trace knows of one token, for the note beside the pointer.
function note(run, prompt, trajectory, column, time) {
  const cell = track(run, prompt, trajectory).cells[column];
  const done = cell.time !== null && cell.time <= time;
  const at = done ? cell : (recordAt(track(run, prompt, trajectory), time)?.at.get(column) ?? {});
  const rows = [`position ${column}`];
  if (cell.given) rows.push("from the prompt");
  else rows.push(done ? `committed in step ${cell.time}` : "masked");
  if (at.entropy !== null && at.entropy !== undefined) rows.push(`entropy ${at.entropy.toFixed(3)} nats`);
  if (at.weight !== null && at.weight !== undefined) rows.push(`weight ${at.weight.toFixed(3)}`);
  return { title: done ? JSON.stringify(cell.piece) : "masked", rows };
}
