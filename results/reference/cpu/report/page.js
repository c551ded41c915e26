// Interactive curves: plain SVG from the JSON in each figure. Without this script the figures' images are shown.
"use strict";

const svg = (name, attributes = {}, parent = null) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
};
const html = (name, properties = {}, parent = null) => {
  const node = Object.assign(document.createElement(name), properties);
  if (parent) parent.append(node);
  return node;
};
const show = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());

// Round numbers from low to high, about `count` of them; decades and their halves on a logarithmic axis.
function ticks(low, high, count, log) {
  if (log) {
    const found = [];
    const ratio = high / low, steps = ratio > 1e3 ? [1] : ratio > 10 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 6, 8];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of steps) if (m * 10 ** e >= low && m * 10 ** e <= high) found.push(m * 10 ** e);
    if (found.length > 1) return found;
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
}

class Panel {
  constructor(chart, spec) {
    Object.assign(this, { chart, spec });
    this.root = html("div", { className: "panel" }, chart.panels);
    html("h4", { textContent: spec.label }, this.root);
    this.svg = svg("svg", { role: "img" }, this.root);
    this.tip = html("div", { className: "tip", hidden: true }, this.root);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
  }

  draw() {
    const { axis, visible } = this.chart, width = Math.max(this.root.clientWidth, 240), height = 280;
    this.box = { left: 46, right: width - 8, top: 8, bottom: height - 40 };
    this.svg.replaceChildren();
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("aria-label", this.words());
    const first = Math.max(...visible.map((m) => m[this.spec.key][0][0] ?? -Infinity));
    const floor = this.spec.floor ?? -Infinity;
    const within = (y) => y !== null && y >= floor && (!this.spec.loss || !(y > first * 1.05));
    const ys = visible.flatMap((m) => m[this.spec.key].flat()).filter(within);
    const xs = visible.flatMap((m) => m[axis]);
    if (!ys.length) return;
    let low = Math.min(...ys), high = Math.max(...ys);
    const log = this.spec.loss && low > 0 && high / low > 3;
    const room = log ? (high / low) ** 0.04 : (high - low) * 0.04 || Math.abs(high) * 0.05 || 1;
    [low, high] = log ? [low / room, high * room] : [low - room, high + room];
    const end = Math.min(Math.max(...xs), this.chart.data.ends[axis]) || 1, b = this.box, level = log ? Math.log : (v) => v;
    this.x = (v) => b.left + (v / end) * (b.right - b.left);
    this.y = (v) => {
      const place = b.bottom - ((level(v) - level(low)) / (level(high) - level(low))) * (b.bottom - b.top);
      return Math.min(Math.max(place, b.top - 30), b.bottom + 400);
    };
    this.frame(low, high, end, log);
    const clip = svg("clipPath", { id: `clip-${this.chart.data.task}-${this.spec.key}` }, this.svg);
    svg("rect", { x: b.left, y: 0, width: b.right - b.left, height: b.bottom }, clip);
    const area = svg("g", { "clip-path": `url(#${clip.id})` }, this.svg);
    for (const method of [...visible].sort((p, q) => p.bold - q.bold)) this.curve(area, method, axis);
    this.cursor = svg("line", { class: "cursor", y1: b.top, y2: b.bottom, visibility: "hidden" }, this.svg);
  }

  frame(low, high, end, log) {
    const b = this.box;
    for (const value of ticks(low, high, 5, log)) {
      svg("line", { class: "grid", x1: b.left, x2: b.right, y1: this.y(value), y2: this.y(value) }, this.svg);
      svg("text", { x: b.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, this.svg).textContent = show(value);
    }
    svg("line", { class: "axis", x1: b.left, x2: b.right, y1: b.bottom, y2: b.bottom }, this.svg);
    for (const value of ticks(0, end, Math.min(6, (b.right - b.left) / 60), false))
      svg("text", { x: this.x(value), y: b.bottom + 16, "text-anchor": "middle" }, this.svg).textContent = show(value);
    const label = svg("text", { x: (b.left + b.right) / 2, y: b.bottom + 34, "text-anchor": "middle" }, this.svg);
    label.textContent = this.chart.data.axes[this.chart.axis];
  }

  curve(parent, method, axis) {
    const group = svg("g", { "data-method": method.name }, parent);
    const [mean, low, high] = method[this.spec.key];
    const points = (values) => method[axis].map((x, i) => [x, values[i]]).filter(([, y]) => y !== null)
      .map(([x, y]) => `${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`);
    svg("polygon", { class: "band", points: [...points(low), ...points(high).reverse()].join(" "), fill: method.color }, group);
    svg("polyline", {
      class: "curve", points: points(mean).join(" "), stroke: method.color, "stroke-width": method.width, "stroke-dasharray": method.dash,
    }, group);
  }

  // The evaluations nearest to the pointer, of at most eight methods, best first.
  point(event) {
    if (!this.x) return;
    const { axis, visible } = this.chart, b = this.box, bounds = this.svg.getBoundingClientRect();
    const px = Math.min(Math.max(event.clientX - bounds.left, b.left), b.right);
    const rows = visible.map((method) => {
      const i = method[axis].reduce((best, x, j, all) => (Math.abs(this.x(x) - px) < Math.abs(this.x(all[best]) - px) ? j : best), 0);
      return { method, x: method[axis][i], y: method[this.spec.key][0][i] };
    }).filter((row) => row.y !== undefined && row.y !== null);
    const away = (row) => Math.abs(this.y(row.y) - event.clientY + bounds.top);
    rows.sort((p, q) => away(p) - away(q));
    const nearest = rows[0], told = rows.slice(0, 8).sort((p, q) => (this.spec.loss ? p.y - q.y : q.y - p.y));
    this.tip.replaceChildren();
    for (const { method, x, y } of told) {
      const line = html("div", {}, this.tip);
      html("span", { className: "swatch" }, line).style.background = method.color;
      line.append(`${method.label} ${show(y)} at ${show(x)}`);
    }
    this.tip.hidden = !rows.length;
    const room = bounds.width - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(0, Math.min(px < bounds.width / 2 ? px + 14 : px - this.tip.offsetWidth - 14, room))}px`;
    this.cursor.setAttribute("x1", px);
    this.cursor.setAttribute("x2", px);
    this.cursor.setAttribute("visibility", "visible");
    this.chart.highlight(nearest && away(nearest) < 14 ? nearest.method.name : null);
  }

  leave() {
    this.tip.hidden = true;
    if (this.cursor) this.cursor.setAttribute("visibility", "hidden");
    this.chart.highlight(null);
  }

  words() {
    const ends = this.chart.visible.map((m) => `${m.label} ${show(m[this.spec.key][0].at(-1) ?? null)}`);
    const against = this.chart.data.axes[this.chart.axis].toLowerCase();
    return `${this.spec.label} against ${against} on ${this.chart.data.task}. Last values: ${ends.join(", ")}.`;
  }
}

class Chart {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(root.querySelector("script").textContent);
    this.panels = root.querySelector(".panels");
    this.hidden = new Set();
    this.chips();
    this.parts = this.data.panels.map((spec) => new Panel(this, spec));
    root.classList.add("live");
    root.querySelectorAll(".axes input").forEach((input) => input.addEventListener("change", () => this.draw()));
    new ResizeObserver(() => this.draw()).observe(this.panels);
    this.draw();
  }

  get axis() {
    return this.root.querySelector(".axes input:checked").value;
  }

  get visible() {
    return this.data.methods.filter((method) => !this.hidden.has(method.name));
  }

  chips() {
    const row = html("div", { className: "chips" });
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "Methods shown");
    this.buttons = new Map();
    for (const kind of new Set(this.data.methods.map((method) => method.kind))) {
      const line = html("div", {}, row);
      this.only(kind, line);
      for (const method of this.data.methods.filter((m) => m.kind === kind)) this.chip(method, line);
    }
    this.panels.before(row);
  }

  // A group's name shows it alone beside the layer-wise methods; pressed again, all.
  only(kind, line) {
    const button = html("button", { type: "button", className: "kind", textContent: kind, title: `Only ${kind.toLowerCase()}` }, line);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      const all = button.getAttribute("aria-pressed") === "true";
      this.root.querySelectorAll(".chips .kind").forEach((other) => other.setAttribute("aria-pressed", "false"));
      button.setAttribute("aria-pressed", String(!all));
      this.hidden = new Set(all ? [] : this.data.methods.filter((m) => m.kind !== kind && !m.bold).map((m) => m.name));
      for (const [name, chip] of this.buttons) chip.setAttribute("aria-pressed", String(!this.hidden.has(name)));
      this.draw();
    });
  }

  chip(method, line) {
    const button = html("button", { type: "button", className: "chip" }, line);
    const sample = svg("svg", { width: 24, height: 10, "aria-hidden": "true" }, button);
    svg("line", { x1: 1, x2: 23, y1: 5, y2: 5, stroke: method.color, "stroke-width": method.width, "stroke-dasharray": method.dash }, sample);
    button.append(method.label);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      if (!this.hidden.delete(method.name)) this.hidden.add(method.name);
      button.setAttribute("aria-pressed", String(!this.hidden.has(method.name)));
      this.draw();
    });
    for (const [on, off] of [["pointerenter", "pointerleave"], ["focus", "blur"]]) {
      button.addEventListener(on, () => this.highlight(method.name));
      button.addEventListener(off, () => this.highlight(null));
    }
    this.buttons.set(method.name, button);
  }

  highlight(name) {
    this.panels.classList.toggle("some", name !== null && !this.hidden.has(name));
    this.panels.querySelectorAll("[data-method]").forEach((g) => g.classList.toggle("on", g.dataset.method === name));
  }

  draw() {
    this.root.querySelectorAll("[data-axis]").forEach((node) => node.classList.toggle("current", node.dataset.axis.split(" ").includes(this.axis)));
    this.parts.forEach((panel) => panel.draw());
  }
}

// A claim that is linked to is opened.
const open = () => document.getElementById(location.hash.slice(1))?.querySelector("details")?.setAttribute("open", "");
addEventListener("hashchange", open);
open();
document.querySelectorAll(".chart").forEach((root) => new Chart(root));
