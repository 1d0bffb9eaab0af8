// Curves over the denoising steps: the chosen trajectory strong, the prompt's others thin.
"use strict";

const SVG = document.querySelector("svg").namespaceURI;
const MARGIN = { top: 14, bottom: 22, left: 36 };

function svg(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const CURVES = [
  { name: "reward", title: "Reward", unit: "relaxed; dots: final texts", format: signed, zero: false },
  { name: "entropy", title: "Entropy", unit: "mean over masked, nats", format: plain, zero: true },
  { name: "weight", title: "Entropy weight", unit: "mean over masked", format: plain, zero: true },
];

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 2.5, 5, 10].find((m) => m * unit >= rough * 0.999);
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) result.push(i * step);
  return { step, values: result };
}

// As many decimals as tell neighbouring ticks apart.
function tickLabel(x, step) {
  const decimals = [0, 1, 2, 3, 4].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6) ?? 4;
  return (x < 0 ? "−" : "") + Math.abs(x).toFixed(decimals);
}

function chart(curve, prompt, trajectory, goTo) {
  const drawing = svg("svg", { role: "img" });
  const reading = element("div", { class: "reading" });
  const node = element(
    "div",
    { class: "chart", "data-curve": curve.name },
    element("header", {}, element("h2", {}, curve.title, " ", element("span", { class: "unit" }, curve.unit)), reading),
    drawing,
  );
  const series = runs.map((run) => ({
    run,
    lines: Array.from({ length: header.copies }, (_, k) =>
      track(run, prompt, k).records.filter((r) => r[curve.name] !== null).map((r) => [r.time, r[curve.name]])),
    final: curve.name === "reward" ? finalReward(run, prompt, trajectory) : null,
  }));
  const values = series.flatMap(({ lines, final }) => [...lines.flat().map(([, y]) => y), ...(final === null ? [] : [final])]);
  if (!values.length) return null;
  const right = curve.name === "reward" ? 46 : 16; // rewards of the final texts are written there
  let x, y, cursor, marks, size = {};

  function layout() {
    const width = Math.max(160, drawing.clientWidth), height = drawing.clientHeight || 168;
    size = { width, height };
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    let low = Math.min(...values, ...(curve.zero ? [0] : [])), high = Math.max(...values);
    if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
    const scale = ticks(low, high, 4);
    low = Math.min(low, scale.values[0]);
    if (!curve.zero) low -= (high - low) * 0.04;
    high += (high - low) * 0.04;
    x = (time) => MARGIN.left + (time / total) * (width - MARGIN.left - right);
    y = (value) => height - MARGIN.bottom - ((value - low) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);

    drawing.replaceChildren();
    for (const value of scale.values) {
      drawing.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - right, y1: y(value), y2: y(value) }));
      drawing.append(svg("text", { x: MARGIN.left - 7, y: y(value) + 4, "text-anchor": "end" }, tickLabel(value, scale.step)));
    }
    for (const value of ticks(0, total, width > 420 ? 8 : 4).values.filter((t) => Number.isInteger(t) && x(t) < width - 30)) {
      drawing.append(svg("text", { x: x(value), y: height - 5, "text-anchor": "middle" }, String(value)));
    }
    drawing.append(svg("text", { x: width, y: height - 5, "text-anchor": "end", class: "axis" }, "step"));
    const path = (points) => points.map(([time, value], i) => `${i ? "L" : "M"}${x(time).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    for (const { run, lines } of series) {
      lines.forEach((points, k) => {
        if (points.length && k !== trajectory) drawing.append(svg("path", { class: "curve other", d: path(points), style: `stroke:${run.color}` }));
      });
    }
    for (const { run, lines } of series) {
      if (lines[trajectory].length) drawing.append(svg("path", { class: "curve", d: path(lines[trajectory]), style: `stroke:${run.color}` }));
    }
    finals();
    cursor = svg("line", { class: "cursor", y1: MARGIN.top - 6, y2: height - MARGIN.bottom });
    marks = series.map(({ run }) => svg("circle", { r: 3.5, style: `fill:${run.color}` }));
    drawing.append(cursor, ...marks);
  }

  // Rewards of the final texts, labelled at the right; labels that would touch are moved apart.
  function finals() {
    const ends = series.filter(({ final }) => final !== null).sort((a, b) => b.final - a.final);
    let last = -Infinity;
    const spots = ends.map(({ final }) => (last = Math.max(y(final) + 4, last + 13)));
    const over = Math.max(0, (spots.at(-1) ?? 0) - (size.height - MARGIN.bottom + 4));
    ends.forEach(({ run, final, lines }, i) => {
      if (!lines[trajectory].length) {
        drawing.append(svg("line", { class: "level", x1: x(0), x2: x(total), y1: y(final), y2: y(final), style: `stroke:${run.color}` }));
      }
      drawing.append(svg("circle", { class: "final", cx: x(total), cy: y(final), r: 4.5, style: `fill:${run.color}` }));
      drawing.append(svg("text", { class: "value", x: x(total) + 9, y: spots[i] - over, style: `fill:${run.color}` }, signed(final)));
    });
  }

  function update(time) {
    cursor.setAttribute("x1", x(time));
    cursor.setAttribute("x2", x(time));
    const numbers = series.map(({ run, lines }, i) => {
      const points = lines[trajectory].filter(([t]) => t <= time);
      const value = points.length ? points.at(-1)[1] : null;
      marks[i].setAttribute("visibility", value === null ? "hidden" : "visible");
      if (value !== null) marks[i].setAttribute("cx", x(Math.min(time, lines[trajectory].at(-1)[0])));
      if (value !== null) marks[i].setAttribute("cy", y(value));
      return [run, value];
    });
    const known = numbers.filter(([run]) => series[run.index].lines[trajectory].length);
    reading.replaceChildren(...known.map(([run, value]) =>
      element("span", { "--run": run.color, title: run.name }, element("i", { class: "dot" }), curve.format(value))));
    const spoken = known.map(([run, value]) => `${run.name} ${curve.format(value)}`).join(", ");
    drawing.setAttribute("aria-label", `${curve.title} at step ${time}: ${spoken}`);
  }

  const seek = (event) => {
    const share = (event.clientX - drawing.getBoundingClientRect().left - MARGIN.left) / (size.width - MARGIN.left - right);
    goTo(share * total);
  };
  drawing.addEventListener("pointerdown", (event) => {
    drawing.setPointerCapture(event.pointerId);
    seek(event);
  });
  drawing.addEventListener("pointermove", (event) => event.buttons && seek(event));
  return { node, layout, update };
}
