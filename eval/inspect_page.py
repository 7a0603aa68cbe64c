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
data.channels.forEach((channel, i) => choose.add(new Option(channel.name, i)));
data.tokens.forEach((token, t) => {
  const span = document.createElement("span");
  span.textContent = token;
  span.onmouseenter = () => tell(t);
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
function shares(rows) {
  scale.innerHTML = "";
  rows.forEach((row, m) => {
    const key = document.createElement("span");
    key.className = "key";
    key.style.background = fade(colour(m), 0.6);
    const count = row.filter(x => x > 0).length;
    key.textContent = `memory ${m}: ${(100 * count / row.length).toFixed(0)} % of tokens`;
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
  const shown = channel.shares ? shares(channel.shares) : numbers(channel.values);
  shown.forEach((background, t) => { text.children[t].style.background = background; });
}
choose.onchange = paint;
map.onmousemove = event => tell(Math.min(map.width - 1, Math.floor(event.offsetX / map.clientWidth * map.width)));
choose.value = new URLSearchParams(location.hash.slice(1)).get("channel") || 0;
paint();
tell(0);
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
<script>const data = {data};{SCRIPT}</script>
</body></html>
"""
