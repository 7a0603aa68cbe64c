"""The page of :mod:`.inspect`: a text whose tokens are coloured by one channel at a time, all in one file."""

import json
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em }
#text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace }
#text span { border-radius: 2px } #text span:hover { outline: 1px solid #222 }
#bar { position: sticky; top: 0; background: #fff; padding: .6em 0; border-bottom: 1px solid #ddd }
#told { font: 13px/1.4 ui-monospace, monospace; min-height: 3em; margin: .4em 0 0; white-space: pre-wrap }
#scale { display: inline-block; margin-left: 1em } .key { padding: 0 .5em; margin-right: .3em; border-radius: 2px }
#text span.asked { outline: 2px solid #222 }
#recall { display: none } #curve { display: block; width: 100%; max-width: 760px; height: auto }
#curve text { font: 11px system-ui }
canvas { width: 100%; image-rendering: pixelated; border: 1px solid #ddd; margin-top: .6em; display: none }
"""

SCRIPT = """
const colours = ["#1b6ca8", "#c0392b", "#27884a", "#8e5ea2", "#b9770e", "#16817a", "#7f5539", "#5d6d7e"];
const choose = document.getElementById("channel"), text = document.getElementById("text");
const told = document.getElementById("told"), scale = document.getElementById("scale");
const map = document.getElementById("map");
const colour = m => m < colours.length ? colours[m] : `hsl(${(m * 137.5) % 360} 60% 45%)`;
const fade = (hex, share) => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = hex;
  const value = parseInt(probe.fillStyle.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${share.toFixed(3)})`;
};
let asked = null;
data.channels.forEach((channel, i) => choose.add(new Option(channel.name, i)));
data.tokens.forEach((token, t) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.onmouseenter = () => tell(t);
  span.onclick = () => { asked = t; drawRecall(); };
  text.append(span);
});
const word = x => x === null ? "–" : x.toPrecision(4);
function tell(t) {
  const lines = data.channels.map(c => c.shares
    ? `${c.name}: ${c.shares.map((row, m) => row[t] > 0 ? `${m} (${word(row[t])})` : "").filter(Boolean).join(", ")}`
    : `${c.name}: ${word(c.values[t])}`);
  told.textContent = `token ${t} ${JSON.stringify(data.tokens[t])}   ` + lines.join("   ");
}
function numbers(values) {
  const known = values.filter(x => x !== null).sort((a, b) => a - b);
  const low = known[Math.floor(known.length * 0.02)], high = known[Math.ceil(known.length * 0.98) - 1];
  scale.innerHTML = "";
  for (const [share, x] of [[0, low], [0.5, (low + high) / 2], [1, high]]) {
    const key = document.createElement("span");
    key.className = "key";
    key.style.background = fade("#c0392b", 0.75 * share);
    key.textContent = word(x);
    scale.append(key);
  }
  map.style.display = "none";
  const share = x => Math.min(1, Math.max(0, (x - low) / (high - low || 1)));
  return values.map(x => x === null ? "" : fade("#c0392b", 0.75 * share(x)));
}
function shares(rows, what) {
  scale.innerHTML = "";
  rows.forEach((row, m) => {
    const key = document.createElement("span");
    key.className = "key";
    key.style.background = fade(colour(m), 0.6);
    const count = row.filter(x => x > 0).length;
    key.textContent = `${what} ${m}: ${(100 * count / row.length).toFixed(0)} % of tokens`;
    scale.append(key);
  });
  map.style.display = "block";
  map.width = rows[0].length;
  map.height = rows.length;
  map.style.height = `${14 * rows.length}px`;
  const draw = map.getContext("2d");
  rows.forEach((row, m) => row.forEach((x, t) => {
    draw.fillStyle = fade(colour(m), x);
    draw.fillRect(t, m, 1, 1);
  }));
  return data.tokens.map((_, t) => {
    let best = 0;
    rows.forEach((row, m) => { if (row[t] > rows[best][t]) best = m; });
    return fade(colour(best), 0.2 + 0.5 * rows[best][t]);
  });
}
function paint() {
  const channel = data.channels[choose.value];
  const shown = channel.shares
    ? shares(channel.shares, channel.name.endsWith("/chunks") ? "chunk" : "memory") : numbers(channel.values);
  shown.forEach((background, t) => { text.children[t].style.background = background; });
}
const memory = document.getElementById("memory"), curve = document.getElementById("curve");
const said = document.getElementById("said"), width = 760, height = 300, left = 46, bottom = 44;
const far = Math.max(1, Math.log2(data.tokens.length)), known = Object.keys(data.recall);
const draw = (name, attributes, words) => {
  const made = document.createElementNS(curve.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (words !== undefined) made.textContent = words;
  curve.append(made);
};
// Distance 0 stands for all that is not written yet; then each doubling of the distance is as wide as the one before.
const across = d => left + (d < 1 ? 0.5 : 1.5 + Math.log2(d)) / (far + 2) * (width - left - 12);
function line(points, low, high, look) {
  const up = y => 10 + (high - y) / (high - low) * (height - bottom - 10);
  const later = points.filter(p => p[0] >= 1);
  draw("polyline", {points: later.map(p => `${across(p[0])},${up(p[1])}`).join(" "), fill: "none", ...look});
  points.forEach(p => draw("circle", {cx: across(p[0]), cy: up(p[1]), r: 3, fill: look.stroke}));
}
function mine(found) {  // of the token asked for: before it is written in the mean, then at every later mark
  const before = [], later = [];
  data.marks.forEach((mark, i) => {
    const value = found.cosines[i][asked];
    if (mark > asked) later.push([mark - asked, value]); else before.push(value);
  });
  const mean = before.reduce((a, b) => a + b, 0) / before.length;
  return before.length ? [[0, mean], ...later] : later;
}
function drawRecall() {
  [...text.children].forEach((span, t) => span.classList.toggle("asked", t === asked));
  if (!known.length) return;
  const found = data.recall[memory.value];
  const mean = found.curve.map(p => [p.to < 1 ? 0 : Math.sqrt(Math.max(p.from, 1) * p.to), p.recall]);
  const own = asked === null ? [] : mine(found), all = [...mean, ...own].map(p => p[1]);
  const low = Math.min(0, ...all), high = Math.max(0.1, ...all);
  const up = y => 10 + (high - y) / (high - low) * (height - bottom - 10);
  curve.replaceChildren();
  for (const y of new Set([low, 0, high / 2, high])) {
    draw("line", {x1: left, x2: width - 12, y1: up(y), y2: up(y), stroke: "#ddd"});
    draw("text", {x: left - 6, y: up(y) + 4, "text-anchor": "end"}, y.toFixed(2));
  }
  draw("text", {x: across(0), y: height - bottom + 16, "text-anchor": "middle"}, "before");
  for (let d = 1; Math.log2(d) <= far; d *= 4)
    draw("text", {x: across(d), y: height - bottom + 16, "text-anchor": "middle"}, d.toLocaleString("en"));
  const words = "distance from the token to the place of asking (tokens)";
  draw("text", {x: width / 2, y: height - 8, "text-anchor": "middle"}, words);
  line(mean, low, high, {stroke: "#1b6ca8", "stroke-width": 2.5});
  if (own.length) line(own, low, high, {stroke: "#c0392b", "stroke-width": 1.2});
  said.textContent = "Blue: mean over all tokens. " + (asked === null ? "Click a token for its own."
    : `Red: token ${asked} ${JSON.stringify(data.tokens[asked])}.`);
}
if (known.length) {
  document.getElementById("recall").style.display = "block";
  known.forEach(name => memory.add(new Option(name, name)));
  memory.onchange = drawRecall;
}
choose.onchange = paint;
map.onmousemove = event => tell(Math.min(map.width - 1, Math.floor(event.offsetX / map.clientWidth * map.width)));
choose.value = new URLSearchParams(location.hash.slice(1)).get("channel") || 0;
paint();
tell(0);
asked = Number(new URLSearchParams(location.hash.slice(1)).get("token") ?? NaN);
if (!(asked >= 0 && asked < data.tokens.length)) asked = null;
drawRecall();
"""


def page(found: dict[str, Any]) -> str:
    """The HTML of what :func:`palimpsest.eval.inspect.look` found; a number that is not one is shown as a dash."""
    known = [
        channel | {"values": [None if x != x else x for x in channel["values"]]} if "values" in channel else channel
        for channel in found["channels"]
    ]
    data = json.dumps(found | {"channels": known}, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")
    title = f"Inside {escape(found['run'])}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<div id="bar"><label>Colour by <select id="channel"></select></label><span id="scale"></span>
<canvas id="map"></canvas><p id="told"></p></div>
<p>{len(found["tokens"]):,} tokens. Point at one to read all numbers.</p>
<div id="text"></div>
<div id="recall"><h2>What is remembered</h2>
<p>The cosine of what a memory answers to a token's key, when so many more tokens have been written, with that token's
value. Before: what it answers when the token has not been written yet.</p>
<label>Memory of <select id="memory"></select></label>
<svg id="curve" viewBox="0 0 760 300" role="img" aria-label="recall against distance"></svg><p id="said"></p></div>
<script>const data = {data};{SCRIPT}</script>
</body></html>
"""
