// The think phase as a strip: each step a column of its top tokens. Only the steps in view are
// in the document, so that a chain of thousands scrolls as one of ten.

import { el, perFrame } from "./dom.js";
import { kindOf, nats, visibleToken } from "./tokens.js";

export const STEP_WIDTH = 68; // px
const OVERSCAN = 4; // steps kept on either side of the view

export class Strip {
  // onView(first, end): which steps are in view, in fractions of a step.
  constructor(viewport, onView) {
    this.viewport = viewport;
    this.steps = [];
    this.onView = onView;
    this.track = el("div", { class: "strip-track" });
    this.shown = new Map(); // index -> element
    this.marked = -1;
    this.follow = true; // keep the newest step in view until the reader scrolls back
    viewport.style.setProperty("--step-width", `${STEP_WIDTH}px`);
    viewport.replaceChildren(this.track);
    this.render = perFrame(() => this.flush());
    viewport.addEventListener("scroll", () => {
      const end = this.viewport.scrollWidth - this.viewport.clientWidth;
      this.follow = this.viewport.scrollLeft >= end - STEP_WIDTH;
      this.render();
    });
    new ResizeObserver(() => this.render()).observe(viewport);
  }

  // Show another list of steps, which its owner goes on appending to.
  reset(steps) {
    this.steps = steps;
    this.end?.remove();
    this.end = null;
    for (const node of this.shown.values()) node.remove();
    this.shown.clear();
    this.marked = -1;
    this.follow = true;
    this.setRows(1);
    this.render();
  }

  // The strip is as tall as the step with the most rows so far.
  setRows(rows) {
    this.rows = rows;
    this.viewport.style.setProperty("--rows", rows);
  }

  // After the last step: how thinking ended and what was forced then.
  close(lines) {
    this.end?.remove();
    this.end = el(
      "div",
      { class: "step forced end" },
      el("div", { class: "step-head" }, el("i", { class: "mark" })),
    );
    for (const line of lines) this.end.append(el("div", { class: "end-line", text: line }));
    this.end.style.left = `${this.steps.length * STEP_WIDTH}px`;
    this.track.append(this.end);
    this.render();
  }

  flush() {
    const count = this.steps.length;
    const length = (count + (this.end ? 1 : 0)) * STEP_WIDTH;
    this.track.style.width = `${length}px`;
    const width = this.viewport.clientWidth;
    if (this.follow) this.viewport.scrollLeft = length - width;
    const left = this.viewport.scrollLeft;
    const first = Math.max(0, Math.floor(left / STEP_WIDTH) - OVERSCAN);
    const end = Math.min(count, Math.ceil((left + width) / STEP_WIDTH) + OVERSCAN);
    for (const [index, node] of this.shown) {
      if (index < first || index >= end) {
        node.remove();
        this.shown.delete(index);
      }
    }
    for (let index = first; index < end; index += 1) {
      if (this.shown.has(index)) continue;
      const rows = rowsOf(this.steps[index]);
      if (rows.length > this.rows) this.setRows(rows.length);
      const node = stepElement(this.steps[index], index, rows);
      node.classList.toggle("marked", index === this.marked);
      this.shown.set(index, node);
      this.track.append(node);
    }
    this.onView(left / STEP_WIDTH, (left + width) / STEP_WIDTH);
  }

  mark(index) {
    this.shown.get(this.marked)?.classList.remove("marked");
    this.marked = index;
    this.shown.get(index)?.classList.add("marked");
  }

  reveal(index) {
    this.follow = false;
    const left = index * STEP_WIDTH;
    const { scrollLeft, clientWidth } = this.viewport;
    if (left < scrollLeft) this.viewport.scrollLeft = left;
    else if (left + STEP_WIDTH > scrollLeft + clientWidth) {
      this.viewport.scrollLeft = left + STEP_WIDTH - clientWidth;
    }
    this.render();
  }
}

// The token that was shown may be missing from the top: a hard step can draw any token.
export function rowsOf(step) {
  const rows = (step.top ?? []).map(([token, id, weight]) => ({
    token,
    id,
    weight: Number(weight) || 0,
    shown: id === step.id,
  }));
  if (!rows.some((row) => row.shown))
    rows.push({ token: step.token, id: step.id, weight: null, shown: true });
  return rows;
}

function stepElement(step, index, rows) {
  const node = el("div", { class: `step ${kindOf(step)}`, "data-index": index });
  node.style.left = `${index * STEP_WIDTH}px`;
  node.append(
    el(
      "div",
      { class: "step-head" },
      el("i", { class: "mark" }),
      el("span", { text: nats(step.entropy) }),
    ),
  );
  for (const row of rows) {
    const cell = el("div", {
      class: row.shown ? "cell shown" : "cell",
      text: visibleToken(row.token, row.id),
    });
    cell.style.setProperty("--w", row.weight ?? 0);
    node.append(cell);
  }
  node.append(el("div", { class: "step-foot", text: index + 1 }));
  return node;
}
