// The page's state (step, prompt, trajectory, colour, theme), its address, and everything that changes it.
"use strict";

const find = (id) => document.getElementById(id);
const SPEEDS = [0.25, 0.5, 1, 2, 4];
const view = { frame: times.length - 1, prompt: 0, trajectory: 0, colour: Object.keys(COLOURS)[0], theme: null, speed: 1 };
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let cards = [], charts = [], timer = null;

// Steps between which nothing happened show what was there before.
const frameOf = (time) => Math.max(0, times.findLastIndex((t) => t <= time));
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const integer = (name, low, high) => {
    const value = Number.parseInt(given.get(name) ?? "", 10);
    return Number.isNaN(value) ? null : clamp(value, low, high);
  };
  const step = integer("step", 0, total);
  if (step !== null) view.frame = frameOf(step);
  view.prompt = (integer("prompt", 1, header.prompts.length) ?? view.prompt + 1) - 1;
  view.trajectory = (integer("trajectory", 1, header.copies) ?? view.trajectory + 1) - 1;
  if (Object.hasOwn(COLOURS, given.get("colour") ?? "")) view.colour = given.get("colour");
  if (["light", "dark"].includes(given.get("theme"))) view.theme = given.get("theme");
}

function writeAddress() {
  const parts = { step: times[view.frame] };
  if (view.prompt) parts.prompt = view.prompt + 1;
  if (view.trajectory) parts.trajectory = view.trajectory + 1;
  if (view.colour !== Object.keys(COLOURS)[0]) parts.colour = view.colour;
  if (view.theme) parts.theme = view.theme;
  try {
    history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
  } catch {
    // A page without an address of its own (an embedded one) has none to keep.
  }
}

function showCaption() {
  const { source } = header;
  const { config } = runs.find(guided) ?? runs[0];
  const parts = [
    source.denoiser,
    source.rewards?.length ? `reward ${source.rewards.map((reward) => reward.name ?? reward).join(" + ")}` : null,
    `K = ${header.copies}`,
    `L = ${config.max_new_tokens}`,
    `T = ${config.steps}`,
    `τ = ${config.temperature}`,
    source.seed === undefined ? null : `seed ${source.seed}`,
  ];
  find("caption").textContent = parts.filter(Boolean).join("  ·  ");
  const first = header.prompts[0].prompt;
  document.title = `entrgi · ${(typeof first === "string" ? first : first.at(-1).content).slice(0, 60)}`;
}

function segments(node, labels, current, choose) {
  node.replaceChildren(...labels.map(([value, label]) =>
    element("button", { type: "button", "aria-pressed": String(value === current), onclick: () => choose(value) }, label)));
}

function promptLabel({ prompt }) {
  const text = typeof prompt === "string" ? prompt : prompt.filter((m) => m.role === "user").at(-1)?.content ?? prompt.at(-1).content;
  const line = text.replace(/\s+/g, " ").trim() || "(empty)";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

function showChoices() {
  find("prompt-choice").hidden = header.prompts.length < 2;
  find("prompt").replaceChildren(...header.prompts.map((p, i) => element("option", { value: i }, `${i + 1}  ${promptLabel(p)}`)));
  find("prompt").value = String(view.prompt);
  find("trajectory").parentElement.hidden = header.copies < 2;
  const all = Array.from({ length: header.copies }, (_, k) => [k, String(k + 1)]);
  segments(find("trajectory"), all, view.trajectory, (k) => set({ trajectory: k }));
  segments(find("colour"), Object.entries(COLOURS).map(([k, c]) => [k, c.label]), view.colour, (colour) => set({ colour }));
  find("scale").parentElement.title = COLOURS[view.colour].label;
}

// The prompt above the texts, where it does not stand in them.
function showMessages() {
  const { prompt } = header.prompts[view.prompt];
  const shown = typeof prompt !== "string" ? prompt : leadingText(runs[0], view.prompt, view.trajectory) || !prompt ? [] : [{ role: "prompt", content: prompt }];
  find("messages").hidden = !shown.length;
  find("messages").replaceChildren(...shown.map(({ role, content }) =>
    element("div", { class: "message" }, element("span", { class: "role" }, role), element("span", {}, content))));
}

function showResults() {
  const best = (run) => Math.max(...run.end.results[view.prompt].rewards.filter((x) => x !== null));
  const average = (run) => mean(run.end.results[view.prompt].rewards);
  const top = (run) => (Number.isFinite(best(run)) ? best(run) : null);
  const headings = runs.flatMap((run) => [
    element("th", { scope: "col", "--run": run.color }, element("i", { class: "dot" }), ` ${run.name}`),
    element("th", { scope: "col", class: "number" }, "reward"),
  ]);
  const rows = Array.from({ length: header.copies }, (_, k) =>
    element(
      "tr",
      { "aria-selected": String(k === view.trajectory), onclick: () => set({ trajectory: k }) },
      element("td", {}, element("button", { type: "button", "aria-label": `Trajectory ${k + 1}` }, String(k + 1))),
      ...runs.flatMap((run) => {
        const reward = finalReward(run, view.prompt, k);
        const isBest = reward !== null && reward === best(run);
        return [
          element("td", { class: "text" }, run.end.results[view.prompt].texts[k]),
          element("td", { class: isBest ? "number best" : "number" }, signed(reward)),
        ];
      }),
    ));
  const summary = [[`Avg@${header.copies}`, average], ["Top@1", top]].map(([label, of]) =>
    element("tr", {}, element("td"), ...runs.flatMap((run) => [
      element("th", { scope: "row" }, label), element("td", { class: "number" }, signed(of(run))),
    ])));
  find("results").replaceChildren(
    element("thead", {}, element("tr", {}, element("th"), ...headings)),
    element("tbody", {}, ...rows),
    element("tfoot", {}, ...summary),
  );
}

// Everything that a prompt or a trajectory changes.
function rebuild() {
  cards = runs.map((run) => card(run, view.prompt, view.trajectory));
  find("runs").replaceChildren(...cards.map(({ node }) => node));
  const seek = (time) => { pause(); set({ frame: frameOf(clamp(Math.round(time), 0, total)) }); };
  charts = CURVES.map((curve) => chart(curve, view.prompt, view.trajectory, seek)).filter(Boolean);
  find("charts").replaceChildren(...charts.map(({ node }) => node));
  charts.forEach((each) => each.layout());
  showMessages();
  showResults();
}

function showStep() {
  const time = times[view.frame];
  cards.forEach(({ update }) => update(time, COLOURS[view.colour]));
  charts.forEach(({ update }) => update(time));
  find("slider").value = String(view.frame);
  find("slider").setAttribute("aria-valuetext", `step ${time} of ${total}`);
  find("step").replaceChildren("step ", element("b", {}, String(time)), ` of ${total}`);
  hideNote();
}

function showTheme() {
  document.documentElement.dataset.theme = view.theme ?? (systemDark.matches ? "dark" : "light");
  drawScale(COLOURS[view.colour]);
}

function set(change) {
  const isNew = (name) => name in change && change[name] !== view[name];
  const other = isNew("prompt") || isNew("trajectory");
  Object.assign(view, change);
  if (other || "colour" in change) showChoices();
  if ("theme" in change || "colour" in change) showTheme();
  if (other) rebuild();
  showStep();
  writeAddress();
}

// A whole playback at speed 1 takes about ten seconds, whatever the number of steps.
const interval = () => clamp(10000 / times.length, 40, 450) / view.speed;

function tick() {
  if (view.frame >= times.length - 1) return pause();
  set({ frame: view.frame + 1 });
  timer = setTimeout(tick, interval());
}

function play() {
  if (view.frame >= times.length - 1) set({ frame: 0 });
  document.body.classList.add("playing");
  find("play-icon").setAttribute("d", "M6 4h3v12H6zM11.5 4h3v12h-3z");
  find("play").setAttribute("aria-label", "Pause");
  timer = setTimeout(tick, interval());
}

function pause() {
  clearTimeout(timer);
  timer = null;
  document.body.classList.remove("playing");
  find("play-icon").setAttribute("d", "M6 4l10 6-10 6z");
  find("play").setAttribute("aria-label", "Play");
}

function move(frames) {
  pause();
  set({ frame: clamp(view.frame + frames, 0, times.length - 1) });
}

const next = (name, by, count) => set({ [name]: (view[name] + by + count) % count });
const KEYS = {
  " ": () => (timer === null ? play() : pause()),
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  PageUp: () => move(-10),
  PageDown: () => move(10),
  Home: () => move(-Infinity),
  End: () => move(Infinity),
  "[": () => next("trajectory", -1, header.copies),
  "]": () => next("trajectory", 1, header.copies),
  "{": () => next("prompt", -1, header.prompts.length),
  "}": () => next("prompt", 1, header.prompts.length),
  c: () => {
    const names = Object.keys(COLOURS);
    set({ colour: names[(names.indexOf(view.colour) + 1) % names.length] });
  },
  d: () => set({ theme: dark() ? "light" : "dark" }),
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("select")) return;
  // Space on a focused button is the button's, but for the one that plays anyway.
  if (event.key === " " && event.target.closest?.("button")) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function hideNote() {
  find("tip").hidden = true;
}

function showNote(event) {
  const slot = event.target.closest?.("[data-column]");
  const owner = slot?.closest("[data-run]");
  if (!owner) return hideNote();
  const run = runs.find(({ name }) => name === owner.dataset.run);
  const { title, rows } = note(run, view.prompt, view.trajectory, Number(slot.dataset.column), times[view.frame]);
  const tip = find("tip");
  tip.replaceChildren(element("b", {}, title), ...rows.map((row) => `\n${row}`));
  tip.hidden = false;
  const box = slot.getBoundingClientRect(), own = tip.getBoundingClientRect();
  tip.style.left = `${clamp(box.left, 8, innerWidth - own.width - 8)}px`;
  tip.style.top = `${box.top > own.height + 12 ? box.top - own.height - 6 : box.bottom + 6}px`;
}

function start() {
  readAddress();
  showCaption();
  showTheme();
  showChoices();
  rebuild();
  find("slider").max = String(times.length - 1);
  find("speed").append(...SPEEDS.map((speed) => element("option", { value: speed }, `${speed}×`)));
  find("speed").value = "1";
  showStep();

  find("play").addEventListener("click", () => (timer === null ? play() : pause()));
  find("back").addEventListener("click", () => move(-1));
  find("forward").addEventListener("click", () => move(1));
  find("slider").addEventListener("input", (event) => { pause(); set({ frame: Number(event.target.value) }); });
  find("speed").addEventListener("change", (event) => { view.speed = Number(event.target.value); });
  find("prompt").addEventListener("change", (event) => set({ prompt: Number(event.target.value) }));
  find("theme").addEventListener("click", () => set({ theme: dark() ? "light" : "dark" }));
  systemDark.addEventListener("change", () => set({ theme: view.theme }));
  find("runs").addEventListener("pointerover", showNote);
  find("runs").addEventListener("pointerleave", hideNote);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => { readAddress(); showTheme(); showChoices(); rebuild(); showStep(); });
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width === width) return;
    width = contentRect.width;
    charts.forEach((each) => each.layout());
    charts.forEach((each) => each.update(times[view.frame]));
  }).observe(find("charts"));
}

start();
