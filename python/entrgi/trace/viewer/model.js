// The trace as the page needs it: for every run, prompt and trajectory what each column of the window holds, and when.
"use strict";

const [header, ...rest] = JSON.parse(document.getElementById("trace").textContent);

const runs = header.runs.map(({ name, config }, index) => ({
  name,
  config,
  index,
  color: `var(--run-${index % 4})`,
  steps: rest.filter((line) => line.kind === "step" && line.run === name),
  end: rest.find((line) => line.kind === "end" && line.run === name),
  tracks: new Map(),
}));
const guided = (run) => run.config.guidance !== "none";
const total = Math.max(...runs.map((run) => run.config.steps), ...runs.flatMap((run) => run.steps.map((s) => s.step + 1)));
// The page's time counts steps done: 0, and then the steps in which anything happened.
const times = [0, ...new Set(runs.flatMap((run) => run.steps.map((s) => s.step + 1)))].sort((a, b) => a - b);

const mean = (values) => {
  const real = (values ?? []).filter((x) => x !== null);
  return real.length ? real.reduce((a, b) => a + b, 0) / real.length : null;
};

// cells[column]: {piece, given, time, weight, entropy}; time is null while masked at the end of the file.
// records: one per step of this trajectory: {time, reward, entropy, weight, at: Map column -> {entropy, weight}}.
function track(run, prompt, trajectory) {
  const key = `${prompt} ${trajectory}`;
  if (run.tracks.has(key)) return run.tracks.get(key);
  const { width, given } = header.prompts[prompt];
  const cells = Array.from({ length: width }, () => ({ piece: null, given: false, time: null, weight: null, entropy: null }));
  for (const [column, piece] of given) Object.assign(cells[column], { piece, given: true, time: 0 });
  const records = [];
  for (const step of run.steps) {
    const part = step.trajectories.find((t) => t.prompt === prompt && t.trajectory === trajectory);
    if (!part) continue;
    const at = new Map(part.columns.map((c, i) => [c, { entropy: part.entropy[i], weight: part.weight?.[i] ?? null }]));
    for (const [column, piece] of part.commits) Object.assign(cells[column], { piece, time: step.step + 1, ...at.get(column) });
    records.push({ time: step.step + 1, reward: part.reward, entropy: mean(part.entropy), weight: mean(part.weight), at });
  }
  const result = { cells, records };
  run.tracks.set(key, result);
  return result;
}

// The last record of a trajectory that is not after `time`.
function recordAt({ records }, time) {
  let found = null;
  for (const record of records) {
    if (record.time > time) break;
    found = record;
  }
  return found;
}

const finalReward = (run, prompt, trajectory) => run.end.results[prompt].rewards[trajectory];
const signed = (x) => (x === null || x === undefined ? "–" : (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2));
const plain = (x) => (x === null || x === undefined ? "–" : x.toFixed(2));

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
