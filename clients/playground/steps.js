// Chart and strip of a chain as one control: hover shows a step, click or arrow keys choose one.
// To assistive technology the chart is a slider over the steps whose value text is the step.

import { el } from "./dom.js";
import { EntropyChart } from "./chart.js";
import { Strip, rowsOf } from "./strip.js";
import { KIND_LABEL, kindOf, nats, percent, visibleToken } from "./tokens.js";

const END_TEXT = {
  end_sequence: "end string",
  budget: "budget",
  eos: "end of text",
  cold_stop: "cold stop",
  unfinished: "unfinished",
};

const MOVES = {
  ArrowLeft: -1,
  ArrowRight: 1,
  ArrowDown: -1,
  ArrowUp: 1,
  PageUp: -10,
  PageDown: 10,
};

export class StepBrowser {
  constructor(part, rescale) {
    this.part = part;
    this.rescale = rescale;
    this.run = null;
    this.chosen = -1;
    this.hovered = -1;
    this.chart = new EntropyChart(part.chart);
    this.strip = new Strip(part.strip, (first, end) => this.chart.setView(first, end));
    part.steps.addEventListener("keydown", (event) => this.key(event));
    const hover = (index) => {
      if (this.hovered === index) return;
      this.hovered = index;
      this.show();
    };
    const inChart = (event) => (this.count ? this.chart.indexAt(event.clientX) : -1);
    const inStrip = (event) => Number(event.target.closest("[data-index]")?.dataset.index ?? -1);
    for (const [node, at] of [
      [part.chart, inChart],
      [part.strip, inStrip],
    ]) {
      node.addEventListener("pointermove", (event) => hover(at(event)));
      node.addEventListener("pointerleave", () => hover(-1));
      node.addEventListener("click", (event) => this.choose(at(event)));
    }
  }

  get count() {
    return this.run?.steps.length ?? 0;
  }

  reset(run) {
    this.run = run;
    this.chosen = this.hovered = -1;
    this.closed = false;
    this.chart.reset(run.steps);
    this.strip.reset(run.steps);
    this.rowsSeen = 0;
    this.render();
  }

  renderEmpty() {
    const { part } = this;
    part.steps.hidden = part.legend.hidden = part.detail.hidden = true;
    part.noSteps.textContent = noStepsText(null);
  }

  render() {
    const { part, count, run } = this;
    part.steps.hidden = part.legend.hidden = part.detail.hidden = count === 0;
    part.noSteps.hidden = count > 0;
    part.noSteps.textContent = noStepsText(run);
    if (!this.closed && run.report) {
      this.closed = true;
      const { end_cause: cause, forced_tokens: forced } = run.report;
      this.strip.close([
        END_TEXT[cause] ?? cause ?? "end",
        ...(forced ? [`${forced} forced`] : []),
      ]);
    }
    this.chart.render();
    this.strip.render();
    part.chart.setAttribute("aria-valuemax", String(Math.max(count, 1)));
    for (const key of part.legend.querySelectorAll("[data-kind]")) {
      const { kind } = key.dataset;
      key.hidden = kind === "forced" ? !run.report?.forced_tokens : !run.kinds.has(kind);
    }
    part.count.textContent = count ? (count === 1 ? "1 step" : `${count} steps`) : "";
    part.mean.textContent = run.meanEntropy === null ? "" : `mean ${nats(run.meanEntropy)} nats`;
    this.rescale();
    this.show();
  }

  choose(index) {
    if (index < 0 || index >= this.count) return;
    this.chosen = index;
    this.hovered = -1;
    this.strip.reveal(index);
    this.show();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.count) return;
    const from = this.chosen < 0 ? this.count - 1 : this.chosen;
    const target =
      { Home: 0, End: this.count - 1 }[event.key] ??
      (event.key in MOVES ? from + MOVES[event.key] : null);
    if (target === null) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(target, 0), this.count - 1));
  }

  // Details of the step under the pointer, else of the chosen one, else of the newest.
  show() {
    const index =
      this.hovered >= 0 ? this.hovered : this.chosen >= 0 ? this.chosen : this.count - 1;
    const pinned = this.hovered >= 0 || this.chosen >= 0;
    this.chart.mark(pinned ? index : -1);
    this.strip.mark(pinned ? index : -1);
    const step = this.run?.steps[index];
    if (!step || this.shownStep === step) return;
    this.shownStep = step;
    const { chart, detailHead, detailRows } = this.part;
    const kind = KIND_LABEL[kindOf(step)];
    const rows = rowsOf(step);
    detailHead.textContent = `Step ${index + 1} · ${nats(step.entropy)} nats · ${kind}`;
    detailRows.replaceChildren(...rows.map(detailRow));
    chart.setAttribute("aria-valuenow", String(index + 1));
    const spoken = rows.map((row) => `${visibleToken(row.token, row.id)} ${weightText(row)}`);
    chart.setAttribute(
      "aria-valuetext",
      `Step ${index + 1}, ${kind}, entropy ${nats(step.entropy)} nats. ${spoken.join(", ")}`,
    );
  }
}

const weightText = (row) => (row.weight === null ? "not among the top" : percent(row.weight));

function detailRow(row) {
  const item = el("li", { class: row.shown ? "shown" : "", title: `token id ${row.id}` });
  item.append(el("span", { class: "token", text: visibleToken(row.token, row.id) }));
  item.append(
    el("span", { class: "weight", text: row.weight === null ? "–" : percent(row.weight) }),
  );
  return item;
}

function noStepsText(run) {
  if (!run) return "Run to see the top tokens of every step.";
  if (run.phase === "waiting") return "Waiting for the first think step …";
  if (run.phase === "failed") return "";
  return run.report || run.content ? "No think steps." : "";
}
