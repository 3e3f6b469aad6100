// Entropy along the chain: the whole chain at the width of the column, with hard steps ticked
// and a frame around what the strip below shows. x counts steps, y is nats.

import { perFrame, svg } from "./dom.js";
import { kindOf } from "./tokens.js";

export class EntropyChart {
  constructor(host) {
    this.scale = 1; // nats at the top edge; the page gives all columns the same
    this.svg = svg("svg", {
      preserveAspectRatio: "none",
      class: "chart-svg",
      "aria-hidden": "true",
    });
    this.view = svg("rect", { class: "chart-view", y: 0, height: 1, x: 0, width: 0 });
    this.area = svg("path", { class: "chart-area" });
    this.line = svg("path", { class: "chart-line" });
    this.hard = svg("path", { class: "chart-hard" });
    this.cursor = svg("path", { class: "chart-cursor" });
    this.svg.append(this.view, this.area, this.line, this.hard, this.cursor);
    host.prepend(this.svg);
    this.render = perFrame(() => this.flush());
    this.reset([]);
  }

  // Show another list of steps, which its owner goes on appending to.
  reset(steps) {
    this.steps = steps;
    this.drawn = 0;
    this.linePath = "";
    this.hardPath = "";
    this.hardSteps = 0;
    this.mark(-1);
    this.render();
  }

  // Paths only ever grow: y is kept in nats and flipped by the view box of each flush.
  flush() {
    for (; this.drawn < this.steps.length; this.drawn += 1) {
      const step = this.steps[this.drawn];
      const entropy = Number.isFinite(step.entropy) ? step.entropy : 0;
      this.linePath += `${this.drawn ? "L" : "M"}${this.drawn + 0.5} ${(-entropy).toFixed(4)}`;
      if (kindOf(step) === "sampled") {
        this.hardPath += `M${this.drawn} 0h1`;
        this.hardSteps += 1;
      }
    }
    const count = Math.max(this.drawn, 1);
    this.svg.setAttribute("viewBox", `0 ${-this.scale} ${count} ${this.scale}`);
    this.line.setAttribute("d", this.linePath);
    this.area.setAttribute("d", this.linePath && `${this.linePath}V0H0.5Z`);
    const mixed = this.hardSteps < this.drawn; // a chain of hard steps only needs no ticks
    this.hard.setAttribute("d", mixed ? this.hardPath : "");
    this.view.setAttribute("y", -this.scale);
    this.view.setAttribute("height", this.scale);
  }

  setScale(scale) {
    if (scale === this.scale) return;
    this.scale = scale;
    this.mark(this.marked);
    this.render();
  }

  setView(first, end) {
    const all = first <= 0 && end >= this.steps.length;
    this.view.setAttribute("x", Math.max(first, 0));
    this.view.setAttribute("width", all ? 0 : Math.max(end - Math.max(first, 0), 0));
  }

  mark(index) {
    this.marked = index;
    this.cursor.setAttribute("d", index < 0 ? "" : `M${index + 0.5} ${-this.scale}V0`);
  }

  indexAt(clientX) {
    const box = this.svg.getBoundingClientRect();
    const index = Math.floor(((clientX - box.left) / box.width) * this.steps.length);
    return Math.min(Math.max(index, 0), this.steps.length - 1);
  }
}

// A calm top edge: the next of 1, 2, 3, 4, 6, 8, 12 nats.
export function topEdge(entropy) {
  return [1, 2, 3, 4, 6, 8].find((edge) => entropy <= edge) ?? 12;
}
