// What a colour stands for. One ramp, monotone in lightness, so that it also reads in grey and with any colour vision.
"use strict";

const RAMPS = {
  light: ["#f5f0e2", "#dce8dc", "#b4d6dc", "#86bce0", "#5f9bd9", "#4a7cc9"],
  dark: ["#2b2d2c", "#2b4148", "#2f5a72", "#3a7ba6", "#5ea3dc", "#a6d2ff"],
};

const dark = () => document.documentElement.dataset.theme === "dark";
const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function rampColour(share) {
  const stops = RAMPS[dark() ? "dark" : "light"].map(channels);
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (place - low)));
}

const css = (rgb) => `rgb(${rgb.join(" ")})`;

// Whichever of the two inks has more contrast.
const INKS = [channels("#14161a"), channels("#ffffff")];
function inkOn(rgb) {
  const l = luminance(rgb);
  const contrast = (ink) => (Math.max(l, luminance(ink)) + 0.05) / (Math.min(l, luminance(ink)) + 0.05);
  return css(contrast(INKS[0]) >= contrast(INKS[1]) ? INKS[0] : INKS[1]);
}

function roundUp(x) {
  const unit = 10 ** Math.floor(Math.log10(x || 1));
  return unit * [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].find((m) => m * unit >= x * (1 - 1e-9));
}

function largest(name) {
  let top = 0;
  for (const run of runs) for (const step of run.steps) for (const part of step.trajectories) {
    for (const x of part[name] ?? []) if (x !== null && x > top) top = x;
  }
  return top;
}

// name -> {label, of(cell), top, unit}; only those for which the trace has numbers.
const COLOURS = {};
if (largest("weight") > 0) {
  COLOURS.weight = { label: "Entropy weight", of: (cell) => cell.weight, top: Math.min(1, roundUp(largest("weight"))), from: 0, unit: "" };
}
if (largest("entropy") > 0) {
  COLOURS.entropy = { label: "Entropy", of: (cell) => cell.entropy, top: roundUp(largest("entropy")), from: 0, unit: " nats" };
}
COLOURS.order = { label: "Commit step", of: (cell) => cell.time ?? null, top: total, from: 0, unit: "" };

function paint(node, value, colour) {
  const known = value !== null && value !== undefined;
  if (known) {
    const rgb = rampColour((value - colour.from) / (colour.top - colour.from));
    node.style.setProperty("--fill", css(rgb));
    node.style.setProperty("--text", inkOn(rgb));
  } else {
    node.style.removeProperty("--fill");
    node.style.removeProperty("--text");
  }
  return known;
}

function drawScale(colour) {
  const canvas = document.getElementById("scale");
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = css(rampColour(x / (canvas.width - 1)));
    context.fillRect(x, 0, 1, 1);
  }
  document.getElementById("scale-from").textContent = String(colour.from);
  document.getElementById("scale-to").textContent = `${Number(colour.top.toPrecision(3))}${colour.unit}`;
}
