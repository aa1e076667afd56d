// Pictures and words that can be chosen: the script of pages, of the report and of the explorer in JupyterLab.
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const make = (parent, tag, className = "") =>
  parent.appendChild(Object.assign(document.createElement(tag), { className, draggable: false }));

// A figure with its caption, which says where it is clicked, in 0..1
function figure(parent, name, clicked) {
  const whole = make(parent, "figure", name), picture = make(whole, "div", "ultra-picture");
  picture.onclick = (event) => clicked(...placeOn(picture, event));
  return { picture, caption: make(whole, "figcaption") };
}

function placeOn(element, event) {
  const box = element.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function onArrows(element, step) {
  element.onkeydown = (event) => {
    if (!ARROWS[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    step(...ARROWS[event.key]);
  };
}

// ---- pages: everything is in the file

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// Calls draw with what the form says, now and whenever it changes; the address says the same, so that it can be shared
function follow(form, draw) {
  const said = () => Object.fromEntries(new FormData(form));
  const changed = () => {
    form.querySelectorAll(".ultra-value").forEach((text) => {
      text.textContent = text.previousElementSibling.control.value;
    });
    draw(said());
  };
  const fromAddress = () => {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      const control = form.elements.namedItem(name);
      if (control) control.value = value;
    }
    changed();
  };
  form.oninput = () => {
    changed();
    history.replaceState(null, "", `#${new URLSearchParams(said())}`);
  };
  form.onsubmit = (event) => event.preventDefault();
  addEventListener("hashchange", fromAddress);
  fromAddress();
}

function set(form, name, value) {
  form.elements.namedItem(name).value = value;
  form.dispatchEvent(new Event("input"));
}

// Runs a slider from where it stands, or from its start, to its end
function playable(button, slider) {
  let timer = 0;
  const stop = () => { timer = clearInterval(timer); button.textContent = "Play"; };
  const next = () => {
    slider.value = +slider.value + 1;
    slider.form.dispatchEvent(new Event("input"));
    if (slider.value === slider.max) stop();
  };
  button.onclick = () => {
    if (timer) return stop();
    if (slider.value === slider.max) set(slider.form, slider.name, slider.min);
    button.textContent = "Pause";
    timer = setInterval(next, 600);
  };
}

// Values on a grid, interpolated to `zoom` times its size, as torch.nn.functional.interpolate does
function upsampled(values, [h, w], zoom) {
  const out = new Float32Array(h * w * zoom * zoom), line = new Float32Array(w);
  const along = (i, size) => {
    const at = Math.max(0, (i + 0.5) / zoom - 0.5), low = Math.floor(at);
    return [low, Math.min(low + 1, size - 1), at - low];
  };
  const columns = Array.from({ length: w * zoom }, (_, i) => along(i, w));
  for (let row = 0, i = 0; row < h * zoom; row++) {
    const [up, down, y] = along(row, h);
    for (let x = 0; x < w; x++) line[x] = values[up * w + x] * (1 - y) + values[down * w + x] * y;
    for (const [left, right, x] of columns) out[i++] = line[left] * (1 - x) + line[right] * x;
  }
  return out;
}

function paint(canvas, colour) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colour(i);
  context.putImageData(image, 0, 0);
}

// k clusters of a tree of n leaves (the pairs that were merged, in order): the last merge is undone first, and the
// larger part keeps the colour, so that no colour changes its place as k grows
function cut(tree, k) {
  const n = tree.length / 2 + 1;
  const leaves = (node) => node < n ? [node] : [...leaves(tree[2 * (node - n)]), ...leaves(tree[2 * (node - n) + 1])];
  const parts = [{ node: 2 * n - 2, colour: 0 }];
  while (parts.length < k) {
    const last = parts.reduce((a, b) => b.node > a.node ? b : a), at = 2 * (last.node - n);
    const [large, small] = [tree[at], tree[at + 1]].sort((a, b) => leaves(b).length - leaves(a).length);
    last.node = large;
    parts.push({ node: small, colour: parts.length });
  }
  return parts.map(({ node, colour }) => ({ colour, leaves: leaves(node) }));
}

// For each pixel the colour of the cluster whose maps sum to most there (eq. 7-8)
function segments(map, clusters, prefix, grid, zoom) {
  const best = new Float32Array(grid[0] * grid[1] * zoom * zoom).fill(-1), labels = new Uint8Array(best.length);
  for (const { leaves, colour } of clusters) {
    const sum = new Float32Array(grid[0] * grid[1]);
    for (const leaf of leaves) map(prefix + leaf).forEach((value, i) => { sum[i] += value; });
    upsampled(sum, grid, zoom).forEach((value, i) => { if (value > best[i]) [best[i], labels[i]] = [value, colour]; });
  }
  return labels;
}

async function showPicture(root, page) {
  const [h, w] = page.grid, n = h * w, tokens = page.prefix + n, zoom = Math.ceil(224 / Math.max(h, w));
  const maps = new Uint8Array(await unpacked(page.maps)), trees = new Uint16Array(await unpacked(page.trees));
  const form = root.querySelector("form"), group = root.querySelector(".ultra-pictures");
  const last = {};
  const at = (x, y) => page.prefix + Math.min(h - 1, Math.floor(y * h)) * w + Math.min(w - 1, Math.floor(x * w));
  const shown = Object.fromEntries(["photo", "map", "mask", "segments"].map((name) => {
    const { picture, caption } = figure(group, name, (x, y) => set(form, "token", at(x, y)));
    const image = make(picture, "img");
    [image.src, image.alt] = [page.photo, name === "photo" ? page.title : ""];
    const canvas = name === "photo" ? null : make(picture, "canvas");
    if (canvas) [canvas.width, canvas.height] = [w * zoom, h * zoom];
    picture.onpointermove = (event) => {
      if (event.pointerType === "mouse") drawToken({ ...last.said, token: at(...placeOn(picture, event)) });
    };
    picture.onpointerleave = () => drawToken(last.said);
    return [name, { canvas, caption, square: make(picture, "span", "ultra-square") }];
  }));
  const place = (i) => `row ${Math.floor(i / w) + 1}, column ${i % w + 1}`;
  const block = ({ scalar, layer }) => page.scalars.indexOf(scalar) * page.layers.length + page.layers.indexOf(+layer);
  const mapOf = (said, token) => maps.subarray((block(said) * tokens + token) * n, (block(said) * tokens + token + 1) * n);

  function drawSquare(token) {
    for (const { square } of Object.values(shown)) {
      const patch = token - page.prefix;
      square.hidden = patch < 0;
      Object.assign(square.style, { left: `${patch % w / w * 100}%`, top: `${Math.floor(patch / w) / h * 100}%`,
                                    width: `${100 / w}%`, height: `${100 / h}%` });
    }
  }

  function drawToken(said) {
    const token = +said.token, map = mapOf(said, token), heat = upsampled(map, page.grid, zoom);
    const level = 255 * said.threshold, inside = heat.filter((value) => value >= level).length / heat.length;
    const name = page.names[token] ?? `token ${token}, ${place(token - page.prefix)}`;
    drawSquare(token);
    paint(shown.map.canvas, (i) => page.heat[Math.round(heat[i])]);
    paint(shown.mask.canvas, (i) => heat[i] >= level ? 0 : 0xcc000000);
    shown.photo.caption.textContent = name;
    const most = map.findIndex((value, i) => value === 255 && i !== token - page.prefix);
    shown.map.caption.textContent =
      `its map, ${said.scalar}, layer ${said.layer}${most < 0 ? "" : `: most in ${place(most)}`}`;
    shown.mask.caption.textContent = `map ≥ ${(+said.threshold).toFixed(2)}: ${Math.round(100 * inside)} % of the picture`;
  }

  function drawSegments(said) {
    const asked = [said.scalar, said.layer, said.clusters].join();
    if (asked === last.asked) return;
    const size = 2 * (n - 1), clusters = cut(trees.subarray(block(said) * size, (block(said) + 1) * size), +said.clusters);
    const labels = segments((token) => mapOf(said, token), clusters, page.prefix, page.grid, zoom);
    const seen = new Set(labels).size;
    paint(shown.segments.canvas, (i) => page.colours[labels[i]]);
    shown.segments.caption.textContent =
      `${said.clusters} cluster${said.clusters > 1 ? "s" : ""}${seen < said.clusters ? `, ${seen} with pixels` : ""}`;
    last.asked = asked;
  }

  onArrows(group, (right, down) => {
    const patch = Math.max(0, last.said.token - page.prefix), clamp = (i, size) => Math.min(Math.max(i, 0), size - 1);
    set(form, "token", page.prefix + clamp(Math.floor(patch / w) + down, h) * w + clamp(patch % w + right, w));
  });
  root.querySelectorAll("[data-token]").forEach((b) => { b.onclick = () => set(form, "token", b.dataset.token); });
  follow(form, (said) => { last.said = said; drawToken(said); drawSegments(said); });
}

async function showWords(root, page) {
  const form = root.querySelector("form"), marks = [...root.querySelectorAll("mark")];
  const shares = new Uint8Array(await unpacked(page.shares)), told = root.querySelector("[aria-live]");
  const draw = (said) => {
    const row = (page.scalars.indexOf(said.scalar) * page.layers.length + page.layers.indexOf(+said.layer)) * page.words.length;
    const start = (row + +said.word) * marks.length, top = page.tops[row + +said.word];
    const own = shares.subarray(start, start + marks.length);
    marks.forEach((mark, i) => {
      mark.style.setProperty("--s", own[i] / 255);
      mark.title = (top * own[i] / 255).toPrecision(2);
    });
    const most = [...own.keys()].sort((a, b) => own[b] - own[a]).slice(0, 3).map((i) => `“${marks[i].textContent}”`);
    told.textContent = `${page.words[said.word]}: most from ${most.join(", ")}`;
  };
  form.onpointerover = ({ target }) => {
    const choice = target.closest("label")?.querySelector("[name=word]");
    draw({ ...Object.fromEntries(new FormData(form)), ...choice && { word: choice.value } });
  };
  form.onpointerleave = () => draw(Object.fromEntries(new FormData(form)));
  follow(form, draw);
}

for (const root of document.querySelectorAll(".ultra-explorer:not(.live)")) {
  const page = JSON.parse(root.querySelector("[type='application/json']").textContent);
  const button = root.querySelector(".ultra-play");
  if (button) playable(button, root.querySelector("[name=layer]"));
  await (page.maps ? showPicture : showWords)(root, page);
  root.classList.add("live");
}

// ---- JupyterLab: pictures come from the kernel, and clicks go there

export default { render({ model, el }) {
  el.classList.add("ultra-pictures");
  el.tabIndex = 0;
  el.dataset.lmSuppressShortcuts = "true"; // JupyterLab keeps its arrow keys to itself otherwise
  el.setAttribute("role", "group");
  el.setAttribute("aria-label", "Four pictures: click a patch, or go to the next one with the arrow keys");
  const shown = model.get("panels").map((_, i) => {
    const { picture, caption } = figure(el, "", (...at) => model.send({ at }));
    if (i === 0) caption.setAttribute("aria-live", "polite");
    return { image: make(picture, "img"), caption };
  });
  const draw = () => model.get("panels").forEach(([title, png], i) => {
    URL.revokeObjectURL(shown[i].image.src);
    shown[i].image.src = URL.createObjectURL(new Blob([png], { type: "image/png" }));
    shown[i].image.alt = shown[i].caption.textContent = title;
  });
  onArrows(el, (...step) => model.send({ step }));
  model.on("change:panels", draw);
  draw();
  return () => { model.off("change:panels", draw); shown.forEach(({ image }) => URL.revokeObjectURL(image.src)); };
} };
