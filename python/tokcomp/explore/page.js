"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = data.grid, patches = rows * columns, cell = Math.max(12, Math.floor(896 / Math.max(rows, columns)));
const byId = (id) => document.getElementById(id);
const canvas = byId("picture"), pen = canvas.getContext("2d");
const VIEWS = ["groups", "size", "importance"];
const state = { image: 0, choice: 0, block: 0, view: "groups", patch: null };
const unique = (values) => [...new Set(values)];
const number = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));

canvas.width = columns * cell;
canvas.height = rows * cell;

// What the page says of a block. Block 0 is the input; block b is what b blocks left.
const choice = () => data.choices[state.choice];
const blocks = () => choice().pictures[state.image];
const identity = { source: Array.from({ length: patches }, (_, index) => index), importance: null };
const after = (block) => (block === 0 ? identity : blocks()[block - 1]);
const members = (source, slot) => source.flatMap((own, index) => (own === slot ? [index] : []));
function sizes(source) {
  const found = new Map();
  for (const slot of source) if (slot >= 0) found.set(slot, (found.get(slot) || 0) + 1);
  return found;
}
const summaries = new Map(); // by image, choice and block: pointing at patches asks for them again and again
function summary(block) {
  const key = `${state.image} ${state.choice} ${block}`;
  if (!summaries.has(key)) {
    const source = after(block).source, groups = sizes(source), pruned = source.filter((slot) => slot < 0).length;
    let grouped = 0, largest = 0;
    for (const size of groups.values()) {
      if (size > 1) grouped += size;
      largest = Math.max(largest, size);
    }
    summaries.set(key, { tokens: groups.size + data.prefix, grouped, pruned, largest });
  }
  return summaries.get(key);
}

// Colours
function groupColour(first) {
  return `hsl(${((first * 0.6180339887) % 1) * 360} 85% ${first % 3 === 1 ? 45 : 58}%)`;
}
function heat(share) { // dark blue over magenta to yellow, for colour-blind readers as well
  const stops = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
  return `rgb(${stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (place - low))).join(" ")})`;
}
const HEAT_SCALE = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(heat).join(", ")})`;

// Pictures, and the mean colour of each patch
const pictures = data.images.map(() => ({ image: null, colours: null }));
function load(index) {
  const image = new Image();
  image.onload = () => {
    const small = document.createElement("canvas");
    [small.width, small.height] = [image.naturalWidth, image.naturalHeight];
    const brush = small.getContext("2d");
    brush.drawImage(image, 0, 0);
    const high = image.naturalHeight / rows, wide = image.naturalWidth / columns;
    const colours = identity.source.map((patch) => {
      const left = Math.round((patch % columns) * wide), top = Math.round(Math.floor(patch / columns) * high);
      const { data: pixels } = brush.getImageData(left, top, Math.max(1, Math.round(wide)), Math.max(1, Math.round(high)));
      const sum = [0, 0, 0];
      for (let at = 0; at < pixels.length; at += 4) for (let i = 0; i < 3; i++) sum[i] += pixels[at + i];
      return sum.map((total) => total / (pixels.length / 4));
    });
    pictures[index] = { image, colours };
    if (index === state.image) draw();
  };
  image.src = data.images[index].src;
}

function square(patch) {
  return [(patch % columns) * cell, Math.floor(patch / columns) * cell];
}
function edges(source, slot, patch, inset, width, colour) {
  const [x, y] = square(patch), row = Math.floor(patch / columns), column = patch % columns;
  const differs = (r, c) => r < 0 || c < 0 || r >= rows || c >= columns || source[r * columns + c] !== slot;
  pen.fillStyle = colour;
  const size = cell - 2 * inset;
  if (differs(row - 1, column)) pen.fillRect(x + inset, y + inset, size, width);
  if (differs(row + 1, column)) pen.fillRect(x + inset, y + cell - inset - width, size, width);
  if (differs(row, column - 1)) pen.fillRect(x + inset, y + inset, width, size);
  if (differs(row, column + 1)) pen.fillRect(x + cell - inset - width, y + inset, width, size);
}

// What a patch is covered with, as a colour and its opacity; nothing where the picture itself shows.
function cover(patch, slot, own, importance, largest) {
  if (state.view === "importance" && importance && importance[patch] > 0)
    return [heat(0.5 + Math.log2(importance[patch]) / 6), 0.72];
  if (slot < 0) return ["#000", 1];
  if (state.view === "size") return [heat(Math.log(own.length) / Math.log(largest)), 0.72];
  if (state.view === "importance" || own.length === 1) return null;
  const { colours } = pictures[state.image];
  const mean = [0, 1, 2].map((i) => Math.round(own.reduce((sum, one) => sum + colours[one][i], 0) / own.length));
  return [`rgb(${mean.join(" ")})`, 1];
}

function draw() {
  const { image } = pictures[state.image];
  if (!image) return;
  pen.imageSmoothingEnabled = image.naturalWidth >= 128;
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  const { source, importance } = after(state.block), line = Math.max(2, Math.round(cell / 14)), groups = new Map();
  source.forEach((slot, patch) => groups.set(slot, [...(groups.get(slot) || []), patch]));
  const largest = Math.max(2, summary(state.block).largest);
  for (const [slot, own] of groups) {
    for (const patch of own) {
      const [x, y] = square(patch), [colour, opacity] = cover(patch, slot, own, importance, largest) || [null, 0];
      if (colour === null) continue;
      pen.globalAlpha = opacity;
      pen.fillStyle = colour;
      pen.fillRect(x, y, cell, cell);
      pen.globalAlpha = 1;
      if (slot >= 0 || opacity === 1) continue;
      pen.lineWidth = line; // dropped by this very block
      pen.strokeStyle = "#000";
      pen.beginPath();
      pen.moveTo(x + 3, y + 3);
      pen.lineTo(x + cell - 3, y + cell - 3);
      pen.stroke();
    }
    if (slot >= 0 && own.length > 1 && state.view !== "importance")
      for (const patch of own) edges(source, slot, patch, 0, line, groupColour(own[0]));
  }
  if (state.patch !== null) {
    const slot = source[state.patch], group = slot < 0 ? [state.patch] : members(source, slot);
    const shape = slot < 0 ? source.map((_, index) => (index === state.patch ? -2 : 0)) : source;
    for (const patch of group) {
      edges(shape, slot < 0 ? -2 : slot, patch, 0, line + 2, "#000");
      edges(shape, slot < 0 ? -2 : slot, patch, 1, line, "#fff");
    }
    const [x, y] = square(state.patch), radius = Math.max(3, cell / 8);
    pen.beginPath();
    pen.arc(x + cell / 2, y + cell / 2, radius, 0, 2 * Math.PI);
    pen.fillStyle = "#fff";
    pen.fill();
    pen.lineWidth = 2;
    pen.strokeStyle = "#000";
    pen.stroke();
  }
}

// Words
function prunedIn(patch) {
  return blocks().findIndex((block) => block.source[patch] < 0);
}
function describe() {
  if (state.patch === null) return "No patch is chosen.";
  const { source, importance } = after(state.block), slot = source[state.patch];
  const place = `Row ${Math.floor(state.patch / columns) + 1}, column ${(state.patch % columns) + 1}: `;
  const last = prunedIn(state.patch), share = importance && importance[state.patch];
  const weight = share ? ` Importance here: ${share.toFixed(2)} times the mean.` : "";
  if (slot < 0) return `${place}pruned in block ${last}.${weight}`;
  const size = members(source, slot).length;
  const what = size === 1 ? "a token of its own" : `one of ${size} patches that share token ${slot}`;
  return `${place}${what}.${weight}`;
}
function numbers() {
  const now = summary(state.block), all = patches + data.prefix, { gflops, images_per_second: speed } = choice();
  const tiles = [["Tokens", now.tokens, `of ${all}: ${now.grouped} patches in groups, ${now.pruned} pruned`]];
  if (gflops !== null) {
    const part = data.gflops ? `${((100 * gflops) / data.gflops).toFixed(0)} % of ${number(data.gflops)}` : "";
    tiles.push(["GFLOPs per image", number(gflops), part]);
  }
  if (speed !== null) {
    const ratio = data.speed ? `, ${(speed / data.speed).toFixed(2)} x uncompressed` : "";
    tiles.push(["Images per second", number(speed), `${data.speedKind}${ratio}`]);
  }
  byId("numbers").replaceChildren(...tiles.map(([name, value, note]) => {
    const tile = document.createElement("div"), term = document.createElement("dt"), figure = document.createElement("dd");
    const small = document.createElement("small");
    [term.textContent, figure.textContent, small.textContent] = [name, value, note];
    figure.append(small);
    tile.append(term, figure);
    return tile;
  }));
}
function legend() {
  const scale = (low, high) => {
    const strip = document.createElement("span");
    strip.className = "scale";
    strip.style.background = HEAT_SCALE;
    return [low, strip, high];
  };
  const words = {
    groups: ["Outlined in one colour: patches that share a token, in its mean colour. Black: pruned."],
    size: scale("Patches in a token: 1", `${summary(state.block).largest}. Black: pruned.`),
    importance: after(state.block).importance
      ? scale("Attention to a token, against the mean: 1/8", "8 times. Struck out: pruned here.")
      : ["This block drops nothing, so it ranks nothing."],
  };
  byId("legend").replaceChildren(...words[state.view]);
}
function bars() {
  const depth = blocks().length, all = patches + data.prefix, SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  byId("bars").setAttribute("viewBox", `0 0 ${depth + 1} 1`);
  byId("bars").setAttribute("preserveAspectRatio", "none");
  byId("bars").replaceChildren(...Array.from({ length: depth + 1 }, (_, block) => {
    const high = summary(block).tokens / all, group = make("g", { class: block === state.block ? "here" : "" });
    group.append(make("rect", { x: block + 0.06, y: 0, width: 0.88, height: 1, opacity: 0.35 }),
      make("rect", { class: "filled", x: block + 0.06, y: 1 - high, width: 0.88, height: high }));
    group.addEventListener("click", () => show({ block }));
    return group;
  }));
  byId("table").tBodies[0].replaceChildren(...Array.from({ length: depth + 1 }, (_, block) => {
    const row = document.createElement("tr"), found = summary(block);
    if (block === state.block) row.className = "here";
    for (const value of [block === 0 ? "input" : block - 1, found.tokens, found.grouped, found.pruned, found.largest])
      row.insertCell().textContent = value;
    return row;
  }));
}

// Choices
function radios(id, labels, chosen, picked, pictured) {
  const set = byId(id), old = [...set.querySelectorAll("input")];
  if (old.length === labels.length && old.every((input, index) => input.value === labels[index])) {
    old.forEach((input, index) => (input.checked = index === chosen));
    return;
  }
  set.querySelectorAll("label").forEach((label) => label.remove());
  labels.forEach((text, index) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: id, value: text, checked: index === chosen });
    input.addEventListener("change", () => picked(index));
    label.append(input);
    if (pictured) label.append(Object.assign(document.createElement("img"), { src: data.images[index].src, alt: "" }));
    label.append(text);
    set.append(label);
  });
  set.hidden = labels.length < 2;
}
const methods = unique(data.choices.map((one) => one.method));
const strengthsOf = (method) => data.choices.filter((one) => one.method === method).map((one) => one.strength);
function pick(method, strength) {
  const own = data.choices.map((one, index) => [one, index]).filter(([one]) => one.method === method);
  const [, index] = own.find(([one]) => one.strength === strength) || own[0];
  return index;
}
const pickMethod = (index) => show({ choice: pick(methods[index], choice().strength) });
const pickStrength = (index) => show({ choice: pick(choice().method, strengthsOf(choice().method)[index]) });

function show(change) {
  Object.assign(state, change);
  const depth = blocks().length;
  state.block = Math.min(Math.max(state.block, 0), depth);
  const { method, strength, settings } = choice(), strengths = strengthsOf(method);
  radios("images", data.images.map((one) => one.name), state.image, (image) => show({ image }), true);
  radios("methods", methods, methods.indexOf(method), pickMethod);
  radios("strengths", strengths, strengths.indexOf(strength), pickStrength);
  radios("views", VIEWS, VIEWS.indexOf(state.view), (index) => show({ view: VIEWS[index] }));
  Object.assign(byId("block"), { max: depth, value: state.block });
  const where = state.block === 0 ? "input" : `after block ${state.block - 1}`;
  byId("where").textContent = where;
  byId("block").setAttribute("aria-valuetext", where);
  byId("back").disabled = state.block === 0;
  byId("on").disabled = state.block === depth;
  byId("settings").textContent = settings;
  numbers();
  legend();
  bars();
  point(state.patch);
  const shown = { picture: state.image + 1, method, budget: strength, block: state.block, view: state.view };
  history.replaceState(null, "", `#${new URLSearchParams(shown)}`); // so that the address leads back here
}
// What the address asks for, as far as the page has it.
function asked() {
  const wanted = new URLSearchParams(location.hash.slice(1)), image = Number(wanted.get("picture")) - 1;
  if (data.images[image]) state.image = image;
  if (VIEWS.includes(wanted.get("view"))) state.view = wanted.get("view");
  if (methods.includes(wanted.get("method"))) state.choice = pick(wanted.get("method"), wanted.get("budget"));
  const block = wanted.has("block") ? Number(wanted.get("block")) : NaN;
  return Number.isInteger(block) ? block : Math.ceil((2 * blocks().length) / 3);
}
function point(patch) {
  state.patch = patch;
  byId("patch").textContent = describe();
  draw();
}

byId("block").addEventListener("input", (event) => show({ block: Number(event.target.value) }));
byId("back").addEventListener("click", () => show({ block: state.block - 1 }));
byId("on").addEventListener("click", () => show({ block: state.block + 1 }));
canvas.addEventListener("pointermove", under);
canvas.addEventListener("pointerdown", under);
function under(event) {
  const box = canvas.getBoundingClientRect();
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const patch = Math.min(Math.max(row, 0), rows - 1) * columns + Math.min(Math.max(column, 0), columns - 1);
  if (patch !== state.patch) point(patch);
}
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
canvas.addEventListener("keydown", (event) => {
  const move = MOVES[event.key];
  if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const from = state.patch === null ? Math.floor(rows / 2) * columns + Math.floor(columns / 2) : state.patch;
  const row = (Math.floor(from / columns) + move[0] + rows) % rows, column = ((from % columns) + move[1] + columns) % columns;
  point(row * columns + column);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const next = (list, value) => (list.indexOf(value) + 1) % list.length, strengths = strengthsOf(choice().method);
  if (event.key === "n") show({ block: state.block + 1 });
  if (event.key === "p") show({ block: state.block - 1 });
  if (event.key === "m") pickMethod(next(methods, choice().method));
  if (event.key === "b") pickStrength(next(strengths, choice().strength));
  if (event.key === "v") show({ view: VIEWS[next(VIEWS, state.view)] });
});

data.images.forEach((_, index) => load(index));
show({ block: asked() });
