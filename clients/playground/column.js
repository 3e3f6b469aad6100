// One column: a setting of the think phase, and what came back for it.

import { announce, copyText, parts, perFrame } from "./dom.js";
import { RequestError } from "./errors.js";
import { asCurl, asPython } from "./export.js";
import { showAnswer, showFacts } from "./facts.js";
import { ColumnForm } from "./form.js";
import { Run, difference } from "./run.js";
import { StepBrowser } from "./steps.js";
import { buildRequest } from "./settings.js";

const PHASE_TEXT = {
  waiting: "waiting",
  thinking: "thinking",
  answering: "answering",
  done: "done",
  stopped: "stopped",
  failed: "error",
};

export class Column {
  // `page` gives: shared(), info(), changed(), removed(column), copied(column), markShared(...).
  constructor(page, state) {
    this.page = page;
    this.state = state;
    this.run = null;
    this.root = document
      .getElementById("column-template")
      .content.firstElementChild.cloneNode(true);
    this.part = parts(this.root);
    this.form = new ColumnForm(this.part, state, page);
    this.browser = new StepBrowser(this.part, page.rescale);
    this.render = perFrame(() => this.flush());
    const on = (name, action) => this.part[name].addEventListener("click", action);
    on("stop", () => this.run?.stop());
    on("remove", () => page.removed(this));
    on("duplicate", () => page.copied(this));
    on("rerun", () => this.rerun());
    on("lock", () => this.lockSeed());
    on("curl", () => copyText(asCurl(this.exportBody()), "curl command"));
    on("python", () => copyText(asPython(this.exportBody()), "Python code"));
    this.flush();
  }

  get active() {
    return this.run?.active ?? false;
  }

  // A fresh run with what the form says; resolves when it is over.
  async start() {
    this.form.clearErrors();
    const { body, problems } = buildRequest(this.page.shared(), this.state);
    if (!problems.length) return this.launch(body, null);
    for (const [wire, message] of problems) this.markField(wire, message);
    const [wire, message] = problems[0];
    this.part.verdict.textContent = "";
    this.showError(
      new RequestError({
        title: `Not sent: ${wire}`,
        message,
        remedy: "Change the marked field and run again.",
        field: wire,
      }),
    );
  }

  // The last request again with the seed that the server reported.
  rerun() {
    const { body, report } = this.run;
    return this.launch({ ...body, cot: { ...body.cot, seed: report.seed } }, this.run);
  }

  async launch(body, before) {
    this.form.clearErrors();
    this.run?.stop();
    const run = new Run(body);
    this.run = run;
    this.browser.reset(run);
    this.part.reasoning.textContent = "";
    this.part.answer.dataset.shown = ""; // another run's answer may be as long
    this.part.verdict.textContent = "";
    this.textShown = 0;
    this.render();
    this.page.changed();
    await run.start(this.render);
    if (this.run !== run) return; // another run took the column meanwhile
    this.finish(before);
    this.page.changed();
  }

  finish(before) {
    const run = this.run;
    const name = this.form.title;
    if (run.phase === "failed") {
      if (run.error.field) this.markField(run.error.field, run.error.detail || run.error.title);
      announce(`${name}: ${run.error.title}.`);
    } else if (run.phase === "stopped") {
      announce(`${name}: stopped after ${run.steps.length} think tokens.`);
    } else {
      announce(`${name}: done, ${run.steps.length} think tokens.`);
      if (before) this.showVerdict(difference(before, run));
    }
  }

  showVerdict(where) {
    this.part.verdict.textContent = where
      ? `Differs from the run before, first at ${where}. Another batch may round differently.`
      : "Identical to the run before.";
    this.part.verdict.classList.toggle("differs", Boolean(where));
  }

  lockSeed() {
    this.form.setSeed(String(this.run.report.seed));
    announce(`${this.form.title}: seed ${this.run.report.seed} locked.`);
    this.page.changed();
  }

  // What was run, with the reported seed, or else what the form says.
  exportBody() {
    const body = this.run?.body ?? buildRequest(this.page.shared(), this.state).body;
    const seed = this.run?.report?.seed;
    return seed === undefined ? body : { ...body, cot: { ...body.cot, seed } };
  }

  markField(wire, message) {
    if (!this.form.mark(wire, message)) this.page.markShared(wire, message);
  }

  showError(error) {
    const { error: box, errorTitle, errorDetail, errorRemedy } = this.part;
    box.hidden = !error;
    errorTitle.textContent = error ? error.title : "";
    errorDetail.textContent = error ? error.detail : "";
    errorRemedy.textContent = error ? error.remedy : "";
  }

  flush() {
    const { part, run } = this;
    const phase = run?.phase ?? "idle";
    this.root.dataset.phase = phase;
    this.root.setAttribute("aria-busy", String(this.active));
    part.phase.textContent = PHASE_TEXT[phase] ?? "";
    part.stop.hidden = !this.active;
    const seeded = Boolean(run?.report && run.report.seed !== undefined) && !this.active;
    part.rerun.disabled = part.lock.disabled = !seeded;
    if (!run) return this.browser.renderEmpty();
    this.showError(run.error);
    this.browser.render();
    if (run.reasoning.length > (this.textShown ?? 0)) {
      appendTail(part.reasoning, run.reasoning.slice(this.textShown ?? 0));
      this.textShown = run.reasoning.length;
    }
    showAnswer(part, run, this.page.info());
    showFacts(part.facts, run);
  }
}

// Appends text and keeps the end in view, unless the reader scrolled back.
function appendTail(box, text) {
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
  box.append(box.firstChild ? text : text.trimStart());
  if (atEnd) box.scrollTop = box.scrollHeight;
}
