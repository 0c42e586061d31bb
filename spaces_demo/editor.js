// The editor of an expert's map. The server sets `props.value` (JSON, see drawings.editor_value). The event "edit" sends
// each finished change: strokes to paint, or the boxes of objects and words. All positions are between 0 and 1.
const find = (name) => element.querySelector(name);
const make = (tag, attributes = {}, text = "") => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
};

let state = null;
let sending = null;

function send() {
  clearTimeout(sending);
  sending = setTimeout(() => {
    const edit = state.tool === "paint" ? { strokes: state.strokes } : { boxes: state.boxes };
    trigger("edit", { name: state.name, edit });
  }, 350);
}

// ---- drawing ----

function draw() {
  const canvas = find("canvas");
  const pen = canvas.getContext("2d");
  const { width, height } = canvas;
  pen.clearRect(0, 0, width, height);
  pen.drawImage(state.image, 0, 0, width, height);
  if (state.tool === "paint") {
    for (const stroke of [...state.strokes, ...(state.stroke ? [state.stroke] : [])]) {
      const known = state.values.find((each) => String(each.value) === String(stroke.value));
      pen.strokeStyle = pen.fillStyle = known ? known.color : "#888";
      pen.lineWidth = stroke.width * Math.max(width, height);
      pen.lineCap = pen.lineJoin = "round";
      pen.beginPath();
      const [first, ...rest] = stroke.points;
      pen.moveTo(first[0] * width, first[1] * height);
      if (!rest.length) pen.lineTo(first[0] * width + 0.1, first[1] * height);
      for (const [x, y] of rest) pen.lineTo(x * width, y * height);
      pen.stroke();
    }
    if (state.cursor && document.activeElement === canvas) {
      pen.lineWidth = 2;
      pen.strokeStyle = "#fff";
      pen.beginPath();
      pen.arc(state.cursor[0] * width, state.cursor[1] * height, (state.size * Math.max(width, height)) / 2, 0, 7);
      pen.stroke();
      pen.strokeStyle = "#000";
      pen.setLineDash([4, 4]);
      pen.stroke();
      pen.setLineDash([]);
    }
    return;
  }
  state.boxes.forEach((item, index) => {
    const [left, top, right, bottom] = place(item.box, width, height);
    const chosen = index === state.chosen;
    pen.lineWidth = chosen ? 4 : 2;
    pen.strokeStyle = "#000";
    pen.strokeRect(left, top, right - left, bottom - top);
    pen.lineWidth = chosen ? 2 : 1;
    pen.strokeStyle = chosen ? "#ffd60a" : "#fff";
    pen.strokeRect(left, top, right - left, bottom - top);
    const name = state.tool === "words" ? item.text : state.classes[item.class];
    pen.font = "600 13px system-ui, sans-serif";
    const length = pen.measureText(name).width + 8;
    const above = top > 18 ? top - 18 : top;
    pen.fillStyle = chosen ? "#ffd60a" : "#fff";
    pen.fillRect(left, above, length, 18);
    pen.fillStyle = "#111";
    pen.fillText(name, left + 4, above + 13);
    if (chosen) {
      pen.fillStyle = "#ffd60a";
      pen.fillRect(right - 7, bottom - 7, 14, 14);
    }
  });
}

const place = (box, width, height) => [box[0] * width, box[1] * height, box[2] * width, box[3] * height];
const within = (number) => Math.round(Math.min(1, Math.max(0, number)) * 10000) / 10000;

// ---- tools ----

function tools() {
  const group = find(".editor-tools");
  group.replaceChildren();
  if (state.tool === "paint") {
    const value = make("select", { "aria-label": "Paint with" });
    state.values.forEach((each, index) => value.append(make("option", { value: index }, each.label)));
    const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
    const show = () => {
      state.value = state.values[Number(value.value)].value;
      swatch.style.background = state.values[Number(value.value)].color;
    };
    value.addEventListener("change", show);
    const size = make("input", { type: "range", min: 1, max: 30, value: 8, "aria-label": "Width of the brush" });
    size.addEventListener("input", () => {
      state.size = Number(size.value) / 100;
      draw();
    });
    const undo = make("button", { type: "button" }, "Undo");
    undo.addEventListener("click", () => {
      if (!state.strokes.pop()) return;
      draw();
      send();
    });
    const field = (text, input) => {
      const label = make("label", {}, text);
      label.append(input);
      return label;
    };
    const paint = field("Paint", value);
    paint.prepend(swatch);
    group.append(paint, field("Brush", size), undo);
    show();
    state.size = 0.08;
  } else {
    const add = make("button", { type: "button" }, state.tool === "words" ? "Add a word" : "Add an object");
    add.addEventListener("click", () => {
      const box = [0.4, 0.42, 0.6, state.tool === "words" ? 0.52 : 0.62];
      state.boxes.push(state.tool === "words" ? { box, text: "word" } : { box, class: 0 });
      state.chosen = state.boxes.length - 1;
      items();
      draw();
      send();
    });
    group.append(add);
  }
  const reset = make("button", { type: "button" }, "Restore");
  reset.addEventListener("click", () => {
    if (state.tool === "paint") state.strokes = [];
    else state.boxes = structuredClone(state.original);
    state.chosen = -1;
    items();
    draw();
    clearTimeout(sending);
    trigger("reset", { name: state.name });
  });
  group.append(reset);
}

function items() {
  const list = find(".editor-items");
  list.replaceChildren();
  if (state.tool === "paint") return;
  state.boxes.forEach((item, index) => {
    const row = make("li", { class: index === state.chosen ? "chosen" : "" });
    const what = state.tool === "words" ? "Word" : "Object";
    let input;
    if (state.tool === "words") {
      input = make("input", { type: "text", maxlength: 40, "aria-label": `${what} ${index + 1}` });
      input.value = item.text;
      input.addEventListener("input", () => {
        item.text = input.value;
        draw();
        send();
      });
    } else {
      input = make("select", { "aria-label": `${what} ${index + 1}` });
      state.classes.forEach((name, number) => input.append(make("option", { value: number }, name)));
      input.value = String(item.class);
      input.addEventListener("change", () => {
        item.class = Number(input.value);
        draw();
        send();
      });
    }
    input.addEventListener("focus", () => choose(index));
    const remove = make("button", { type: "button", "aria-label": `Remove ${what.toLowerCase()} ${index + 1}` }, "×");
    remove.addEventListener("click", () => {
      state.boxes.splice(index, 1);
      state.chosen = -1;
      items();
      draw();
      send();
    });
    row.append(input, remove);
    list.append(row);
  });
}

function choose(index) {
  state.chosen = index;
  [...find(".editor-items").children].forEach((row, number) => row.classList.toggle("chosen", number === index));
  draw();
}

// ---- pointer ----

function where(event) {
  const bounds = find("canvas").getBoundingClientRect();
  return [within((event.clientX - bounds.left) / bounds.width), within((event.clientY - bounds.top) / bounds.height)];
}

function down(event) {
  if (!state || event.button > 0) return;
  event.preventDefault();
  const canvas = find("canvas");
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  const [x, y] = where(event);
  if (state.tool === "paint") {
    state.stroke = { value: state.value, width: state.size, points: [[x, y]] };
  } else {
    const near = 14 / canvas.getBoundingClientRect().width;
    const current = state.boxes[state.chosen];
    if (current && Math.abs(x - current.box[2]) < near && Math.abs(y - current.box[3]) < near) {
      state.drag = { index: state.chosen, corner: true, from: [x, y], box: [...current.box] };
    } else {
      const area = ({ box }) => (box[2] - box[0]) * (box[3] - box[1]);
      const hit = state.boxes
        .map((item, index) => ({ item, index }))
        .filter(({ item: { box } }) => x >= box[0] && x <= box[2] && y >= box[1] && y <= box[3])
        .sort((a, b) => area(a.item) - area(b.item))[0];
      choose(hit ? hit.index : -1);
      state.drag = hit ? { index: hit.index, from: [x, y], box: [...hit.item.box] } : null;
    }
  }
  draw();
}

function move(event) {
  if (!state) return;
  const [x, y] = where(event);
  if (state.stroke) {
    const last = state.stroke.points.at(-1);
    if (Math.hypot(x - last[0], y - last[1]) > 0.004) state.stroke.points.push([x, y]);
    draw();
  } else if (state.drag) {
    shift(state.drag.index, x - state.drag.from[0], y - state.drag.from[1], state.drag.corner, state.drag.box);
    state.drag.moved = true;
    draw();
  }
}

function up() {
  if (!state) return;
  if (state.stroke) {
    state.strokes.push(state.stroke);
    state.stroke = null;
    send();
  } else if (state.drag) {
    if (state.drag.moved) send();
    state.drag = null;
  }
  draw();
}

function shift(index, dx, dy, corner, from) {
  const item = state.boxes[index];
  const box = from || item.box;
  if (corner) {
    item.box = [box[0], box[1], within(Math.max(box[0] + 0.02, box[2] + dx)), within(Math.max(box[1] + 0.02, box[3] + dy))];
  } else {
    dx = Math.min(1 - box[2], Math.max(-box[0], dx));
    dy = Math.min(1 - box[3], Math.max(-box[1], dy));
    item.box = [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy].map(within);
  }
}

// ---- keys ----

function keys(event) {
  if (!state) return;
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (state.tool === "paint") {
    state.cursor = state.cursor || [0.5, 0.5];
    if (steps) {
      const from = [...state.cursor];
      state.cursor = [within(from[0] + 0.03 * steps[0]), within(from[1] + 0.03 * steps[1])];
      if (event.shiftKey) {
        state.strokes.push({ value: state.value, width: state.size, points: [from, [...state.cursor]] });
        send();
      }
    } else if (event.key === " " || event.key === "Enter") {
      state.strokes.push({ value: state.value, width: state.size, points: [[...state.cursor]] });
      send();
    } else return;
  } else {
    if (steps && state.boxes[state.chosen]) {
      shift(state.chosen, 0.02 * steps[0], 0.02 * steps[1], event.shiftKey, null);
      send();
    } else if (event.key === " " || event.key === "Enter") {
      choose((state.chosen + 1) % Math.max(1, state.boxes.length));
    } else if (event.key === "Delete" && state.boxes[state.chosen]) {
      state.boxes.splice(state.chosen, 1);
      state.chosen = -1;
      items();
      send();
    } else return;
  }
  event.preventDefault();
  draw();
}

// ---- a new map ----

function start() {
  if (!props.value) {
    state = null;
    return;
  }
  const content = JSON.parse(props.value);
  const image = new Image();
  image.onload = () => {
    state = { chosen: -1, stroke: null, drag: null, cursor: null, ...content, image };
    const canvas = find("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.setAttribute("aria-label", `${content.title}: drawing area`);
    find(".editor-title").textContent = `Edit “${content.title}”`;
    find(".editor-help").textContent =
      content.tool === "paint"
        ? "Paint over the map; the answer is then computed again. Keys: arrows move the brush, space paints, shift and arrows draw."
        : `Drag a box or its corner. ${content.tool === "words" ? "Type another word" : "Choose another class"} below. ` +
          "Keys: space chooses a box, arrows move it, shift and arrows move its corner, delete removes it.";
    tools();
    items();
    draw();
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    element.scrollIntoView({ block: "center", behavior: calm ? "auto" : "smooth" });
    canvas.focus({ preventScroll: true });
  };
  image.src = content.image;
}

const canvas = find("canvas");
canvas.addEventListener("pointerdown", down);
canvas.addEventListener("pointermove", move);
canvas.addEventListener("pointerup", up);
canvas.addEventListener("pointercancel", up);
canvas.addEventListener("keydown", keys);
canvas.addEventListener("focus", () => state && draw());
canvas.addEventListener("blur", () => state && draw());
watch("value", start);
start();
