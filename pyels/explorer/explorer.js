"use strict";

// ---- What the page holds -------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const said = JSON.parse($("said").textContent);
const ARRAYS = {F32: Float32Array, I32: Int32Array, I16: Int16Array, U8: Uint8Array};
let tensors, steps, height, width;
let sheet, places; // pictures of training images, and where in it that of an image is

// A safetensors file, deflated and in base64, as {name: {data, shape}}.
async function unpacked(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(inflated).arrayBuffer();
  const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
  return Object.fromEntries(Object.entries(header).map(([name, {dtype, shape, data_offsets: [from, to]}]) =>
    [name, {shape, data: new ARRAYS[dtype](buffer.slice(start + from, start + to))}]));
}

// What a tensor holds at its first few indices.
function at(name, ...indices) {
  const {data, shape} = tensors[name];
  let size = data.length, from = 0;
  indices.forEach((index, axis) => from += index * (size /= shape[axis]));
  return data.subarray(from, from + size);
}

// ---- What is shown -------------------------------------------------------------------------------------------------

const state = {step: 0, row: 0, column: 0, map: "source", image: null};
let held = false; // a pixel that was clicked stays

const COLOURS = "A colour for every training image; the paler, the less its share.";
const SHARES = "Share of the chosen image, as far as the sources shown tell.";
const MAPS = { // numbers of all pixels, or images and their shares
  source: {name: "heaviest source", key: COLOURS, images: () => ["image", "weight"].map(heaviest)},
  owner: {name: "heaviest, all steps", key: COLOURS, images: () => [at("owner"), at("owner_share")]},
  entropy: {name: "entropy", key: "In nats; high where many sources share a pixel.", numbers: ofStep("entropy")},
  disagreement: {name: "disagreement", key: "Of network and machine, root mean square.", numbers: disagreement},
  evidence: {name: "log-evidence", key: "In nats; low where patches are unlike.", numbers: ofStep("log_evidence")},
  made: {name: "chosen image", key: SHARES, numbers: () => madeBy(state.image, [state.step])},
  made_all: {name: "chosen, all steps", key: SHARES, numbers: () => madeBy(state.image, at("counts").keys())},
};

function ofStep(name) {
  return () => at(name, state.step);
}

function pixels(of) {
  const top = tensors.weight.shape[3];
  return Array.from({length: height * width}, (_, pixel) => of(pixel, top));
}

const heaviest = (name) => pixels((pixel, top) => at(name, state.step)[pixel * top]);

// Root mean square over the channels.
function disagreement() {
  const [one, other] = [at("x0", state.step), at("network_x0", state.step)], size = height * width;
  return pixels((p) => {
    let sum = 0;
    for (let i = p; i < one.length; i += size) sum += (one[i] - other[i]) ** 2;
    return Math.sqrt(sum / (one.length / size));
  });
}

// The share of every pixel that is an image's, among the sources that were kept; of several steps, as they count.
function madeBy(image, which) {
  const shares = pixels(() => 0), all = [...which], counts = at("counts"), top = tensors.weight.shape[3];
  for (const step of all) {
    const images = at("image", step), weights = at("weight", step), count = all.length > 1 ? counts[step] : 1;
    for (let i = 0; i < images.length; i++) {
      if (images[i] === image) shares[Math.floor(i / top)] += count * weights[i];
    }
  }
  return shares;
}

// Changes what is shown; what cannot be is brought to what can.
function show(change) {
  Object.assign(state, change);
  const within = (number, count) => Math.min(Math.max(Math.trunc(number) || 0, 0), count - 1);
  state.step = within(state.step, steps);
  state.row = within(state.row, height);
  state.column = within(state.column, width);
  state.image = state.image === null ? null : within(state.image, said.bank);
  if (!mapsThatAre().includes(state.map)) state.map = "source";
  draw();
  remember();
}

function mapsThatAre() {
  const without = [...(tensors.network_x0?.shape[1] === tensors.x0.shape[1] ? [] : ["disagreement"]),
    ...(state.image === null ? ["made", "made_all"] : [])];
  return Object.keys(MAPS).filter((name) => !without.includes(name));
}

// ---- Numbers and names ---------------------------------------------------------------------------------------------

const number = (value) => value.toFixed(3);
const percent = (share) => `${(100 * share).toPrecision(3)} %`;
const told = () => Object.entries({x: "noisy", network_x0: "network", x0: "machine"})
  .filter(([name]) => tensors[name]);
const whole = (count) => count.toLocaleString("en");
const digits = (count) => count < 999.5 ? count.toPrecision(3) : whole(Math.round(count));

function nameOf(image) {
  const place = places.get(image), label = place === undefined ? undefined : tensors.kept_label?.data[place];
  return label === undefined ? `#${image}` : `#${image} ${said.names?.[label] ?? `class ${label}`}`;
}

// ---- Drawing -------------------------------------------------------------------------------------------------------

const RAMP = [[18, 20, 60], [42, 72, 138], [38, 132, 142], [110, 186, 110], [250, 230, 110]];

function ramp(share) {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[i].map((from, channel) => from + (place - i) * (RAMP[i + 1][channel] - from));
}

// Its own colour for every image: hues a golden angle apart, in three lightnesses.
function colourOf(image) {
  if (image < 0) return [128, 128, 128];
  return [0, 2, 4].map((third) => [125, 155, 95][image % 3] + 85 * Math.cos(image * 2.39996 + third * Math.PI / 3));
}

// The red, green and blue of pixels of (C, H, W), from numbers in [-1, 1]; what is beyond is clipped.
function colours(image) {
  const size = height * width, channels = image.length / size, value = (i) => (image[i] + 1) * 127.5;
  return (p) => channels === 1 ? [value(p), value(p), value(p)]
    : [value(p), value(p + size), channels > 2 ? value(p + 2 * size) : 0];
}

// An image of the sample's size that begins at a place of a picture, in whole squares: browsers have nothing to smooth.
function enlarge(canvas, picture, size, x = 0, y = 0) {
  const side = Math.max(1, Math.floor(size / Math.max(height, width))), context = canvas.getContext("2d");
  canvas.width = side * width;
  canvas.height = side * height;
  context.imageSmoothingEnabled = false;
  if (picture) context.drawImage(picture, x, y, width, height, 0, 0, canvas.width, canvas.height);
}

// Pixels by their red, green, blue and opacity, up to 255.
function paint(canvas, colour) {
  const small = paint.small ??= new OffscreenCanvas(width, height), image = new ImageData(width, height);
  for (let p = 0; p < height * width; p++) {
    const [red, green, blue, opacity = 255] = colour(p);
    image.data.set([red, green, blue, opacity], 4 * p);
  }
  small.getContext("2d").putImageData(image, 0, 0);
  enlarge(canvas, small, 640);
}

// A training image, where its picture was kept.
function paintImage(canvas, image) {
  const place = places.get(image), columns = Math.ceil(Math.sqrt(places.size));
  const tile = (length) => 8 * Math.ceil(length / 8); // whole blocks of a JPEG
  if (place === undefined) return enlarge(canvas, null, 400);
  enlarge(canvas, sheet, 400, (place % columns) * tile(width), Math.floor(place / columns) * tile(height));
}

// The parts of an axis that a window covers: one that is clipped, or two where it wraps around.
function spans(centre, side, length, wraps) {
  const from = centre - (side >> 1), to = from + side;
  if (!wraps || side >= length) return [[Math.max(from, 0), Math.min(to, length)]];
  if (from < 0) return [[0, to], [from + length, length]];
  return to > length ? [[from, length], [0, to - length]] : [[from, to]];
}

// A pixel and the window around it.
function outline(canvas, row, column, line) {
  const context = canvas.getContext("2d"), scale = canvas.width / width, side = said.sides[state.step];
  const boxes = [[[row, row + 1], [column, column + 1]]];
  if (side !== null) {
    for (const down of spans(row, side, height, said.wraps)) {
      for (const along of spans(column, side, width, said.wraps)) boxes.push([down, along]);
    }
  }
  const edge = (place, most) => Math.min(Math.max(place, line), most - line); // around it, within the picture
  for (const [colour, thick] of [["#000c", 2 * line], ["#ffa34d", line]]) {
    context.strokeStyle = colour;
    context.lineWidth = thick;
    for (const [[top, bottom], [left, right]] of boxes) {
      const x = edge(left * scale - line, canvas.width), y = edge(top * scale - line, canvas.height);
      const wide = edge(right * scale + line, canvas.width) - x, high = edge(bottom * scale + line, canvas.height) - y;
      context.strokeRect(x, y, wide, high);
    }
  }
}

// A bar for every step, relative to the largest; those of other steps are paler.
function bars(canvas, values) {
  const context = canvas.getContext("2d"), most = Math.max(...values) || 1;
  canvas.width = 16 * steps;
  canvas.height = 64;
  context.fillStyle = getComputedStyle(canvas).color;
  values.forEach((value, step) => {
    const long = Math.max(60 * value / most, 2);
    context.globalAlpha = step === state.step ? 1 : 0.35;
    context.fillRect(16 * step + 2, 64 - long, 12, long);
  });
}

function draw() {
  const {step, row, column} = state;
  $("step").value = step + 1;
  const [t, alpha, sigma] = ["t", "alpha", "sigma"].map((name) => number(at(name)[step]));
  $("level").textContent = `Step ${step + 1} of ${steps} · t ${t} · α ${alpha} · σ ${sigma}`
    + ` · window ${said.windows[step]}`;
  $("step").setAttribute("aria-valuetext", $("level").textContent);
  for (const [name, who] of told()) {
    paint($(name), colours(at(name, step)));
    $(name).setAttribute("aria-label", `${who} picture at step ${step + 1}`);
  }
  drawMap();
  for (const canvas of document.querySelectorAll("#pictures > figure > canvas")) outline(canvas, row, column, 4);
  drawPixel();
  drawImages();
}

function drawMap() {
  for (const option of $("map").options) option.disabled = option.hidden = !mapsThatAre().includes(option.value);
  $("map").value = state.map;
  const {name, key, numbers, images} = MAPS[state.map], here = state.row * width + state.column;
  $("drawn").setAttribute("aria-label", `Map at step ${state.step + 1}: ${name}`);
  $("scale").style.visibility = numbers ? "visible" : "hidden";
  if (images) {
    const [image, share] = images();
    $("key").textContent = `${key} Here ${nameOf(image[here])}, ${percent(share[here])}.`;
    return paint($("drawn"), (p) => [...colourOf(image[p]), 40 + 215 * Math.sqrt(share[p])]);
  }
  const values = numbers(), short = (value) => value.toPrecision(3);
  let least = state.map === "evidence" ? Infinity : 0, most = -Infinity;
  for (const value of values) [least, most] = [Math.min(least, value), Math.max(most, value)];
  [$("least").textContent, $("most").textContent] = [least, most].map(short);
  $("key").textContent = `${key} Here ${short(values[here])}.`;
  paint($("drawn"), (p) => ramp((values[p] - least) / (most - least || 1)));
}

function drawPixel() {
  const {step, row, column} = state, pixel = row * width + column, entropy = at("entropy", step)[pixel];
  const weights = at("weight", step, row, column), images = at("image", step, row, column);
  const rows = at("row", step, row, column), columns = at("column", step, row, column);
  const values = (name) => Array.from({length: tensors[name].shape[1]}, (_, channel) => at(name, step, channel)[pixel]);

  $("entropy").textContent = `${number(entropy)} nats`;
  $("effective").textContent = digits(Math.exp(entropy));
  $("shown").textContent = percent(weights.reduce((sum, weight) => sum + weight, 0));
  $("evidence").textContent = `${number(at("log_evidence", step)[pixel])} nats`;
  const words = told().slice(1).map(([name, who]) => `the ${who} says ${values(name).map(number).join(", ")}`);
  $("summary").textContent = `Row ${row}, column ${column}${held ? " (held)" : ""}: ${words.join(", ")}. `
    + `Its heaviest source is ${nameOf(images[0])}, with ${percent(weights[0])}.`;
  $("values").replaceChildren(...told().map(([name, who]) => {
    const line = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = who;
    line.append(head, ...values(name).map((value) => {
      const cell = document.createElement("td");
      cell.textContent = number(value);
      return cell;
    }));
    return line;
  }));
  bars($("course"), Array.from({length: steps}, (_, i) => at("entropy", i)[pixel]));
  drawCards($("sources"), [...images].filter((image) => image >= 0), (i, card) => {
    card.querySelector("strong").textContent = percent(weights[i]);
    card.querySelector("span").textContent = `${nameOf(images[i])}\nrow ${rows[i]}, col ${columns[i]}`;
    outline(card.querySelector("canvas"), rows[i], columns[i], 5);
  });
}

function drawImages() {
  const images = at("listed"), influence = at("listed_influence");
  drawCards($("images"), images, (i, card) => {
    card.querySelector("strong").textContent = percent(at("listed_share")[i]);
    card.querySelector("span").textContent = nameOf(images[i]);
    const course = card.querySelector(".bars") ?? card.firstChild.appendChild(document.createElement("canvas"));
    course.className = "bars";
    bars(course, Array.from({length: steps}, (_, step) => influence[step * images.length + i]));
  });
}

// A button for each of some training images, with its picture, where that was kept; `finish` says what else is on it.
function drawCards(list, images, finish) {
  while (list.children.length > images.length) list.lastChild.remove();
  images.forEach((image, i) => {
    let card = list.children[i];
    if (!card) {
      card = list.appendChild(document.createElement("li"));
      card.innerHTML = '<button type="button"><canvas role="img"></canvas><strong></strong><span></span></button>';
    }
    const canvas = card.querySelector("canvas"), button = card.firstChild;
    paintImage(canvas, image);
    canvas.style.borderColor = `rgb(${colourOf(image)})`;
    canvas.setAttribute("aria-label", `Training image ${image}${places.has(image) ? "" : " (no picture)"}`);
    button.setAttribute("aria-pressed", image === state.image);
    button.onclick = () => show(image === state.image ? {image: null} : {image, map: list.dataset.map});
    finish(i, card);
  });
}

// ---- The address, which holds the state ----------------------------------------------------------------------------

let waiting;

function remember() {
  const parts = [`step=${state.step + 1}`, `pixel=${state.row},${state.column}`, `map=${state.map}`];
  if (state.image !== null) parts.push(`image=${state.image}`);
  if (location.protocol === "about:") return; // within a notebook it has none of its own
  clearTimeout(waiting); // browsers allow few changes of the address a second
  waiting = setTimeout(() => history.replaceState(null, "", `#${parts.join("&")}`), 150);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1)), change = {};
  if (parts.has("step")) change.step = parts.get("step") - 1;
  if (parts.has("map")) change.map = parts.get("map");
  if (location.hash) change.image = parts.has("image") ? parts.get("image") : null;
  if (parts.has("pixel")) {
    [change.row, change.column] = parts.get("pixel").split(",");
    held = true;
  }
  show(change);
}

// ---- What the reader does ------------------------------------------------------------------------------------------

function pixelAt(event) {
  const box = event.target.getBoundingClientRect();
  return {
    row: Math.floor((event.clientY - box.top) / box.height * height),
    column: Math.floor((event.clientX - box.left) / box.width * width),
  };
}

const isHere = ({row, column}) => row === state.row && column === state.column;

function listen() {
  for (const canvas of document.querySelectorAll("#pictures > figure > canvas")) {
    canvas.addEventListener("pointermove", (event) => {
      const pixel = pixelAt(event);
      if (!held && event.pointerType !== "touch" && !isHere(pixel)) show(pixel);
    });
    canvas.addEventListener("click", (event) => {
      const pixel = pixelAt(event);
      held = !(held && isHere(pixel));
      show(pixel);
    });
  }
  const by = (change) => () => show({step: state.step + change});
  $("step").addEventListener("input", () => show({step: $("step").value - 1}));
  $("before").addEventListener("click", by(-1));
  $("after").addEventListener("click", by(1));
  $("map").addEventListener("change", () => show({map: $("map").value}));
  $("theme").addEventListener("click", () => {
    root.theme = otherTheme();
    dress();
  });
  system.addEventListener("change", dress);
  addEventListener("hashchange", recall);

  const keys = {"[": by(-1), "]": by(1), PageUp: by(-1), PageDown: by(1)};
  const arrows = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("map")) return;
    const arrow = [$("pictures"), document.body].includes(event.target) ? arrows[event.key] : undefined;
    if (arrow) {
      held = true;
      show({row: state.row + arrow[0], column: state.column + arrow[1]});
    } else if (keys[event.key]) {
      keys[event.key]();
    } else {
      return;
    }
    event.preventDefault();
  });
}

const system = matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement.dataset;
const otherTheme = () => (root.theme ?? (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark";

function dress() {
  $("theme").textContent = otherTheme();
  draw(); // bars have the colour of the text
}

// ---- Begin ---------------------------------------------------------------------------------------------------------

async function begin() {
  tensors = await unpacked($("tensors").textContent);
  [steps, , height, width] = tensors.x.shape;
  sheet = await createImageBitmap(new Blob([at("sheet")], {type: said.sheet.type}));
  places = new Map(Array.from(at("kept"), (image, place) => [image, place]));
  $("of-network").hidden = !tensors.network_x0;
  $("about").textContent = `${said.machine} · ${whole(said.bank)} training images`
    + (said.counted < said.bank ? `, of which ${whole(said.counted)} count` : "")
    + (tensors.network_x0 ? " · along the network's way" : " · along its own way");
  $("kept").textContent = places.size < said.sheet.of
    ? `Of the ${whole(said.sheet.of)} training images that are named, the page keeps pictures of the `
      + `${whole(places.size)} of the most weight, slightly blurred; of the others it says where they count.` : "";
  $("step").max = steps;
  $("map").append(...Object.entries(MAPS).map(([value, {name}]) => new Option(name, value)));
  $("theme").textContent = otherTheme();
  const context = $("ramp").getContext("2d");
  $("ramp").width = 256;
  $("ramp").height = 1;
  for (let i = 0; i < 256; i++) {
    context.fillStyle = `rgb(${ramp(i / 255)})`;
    context.fillRect(i, 0, 1, 1);
  }
  Object.assign(state, {step: steps >> 1, row: height >> 1, column: width >> 1});
  listen();
  recall();
}

begin().catch((error) => {
  const words = document.createElement("p");
  words.className = "failure";
  words.textContent = `The page could not be drawn; it needs a browser of 2024 or later. (${error})`;
  document.querySelector("main").replaceWith(words);
  throw error;
});
