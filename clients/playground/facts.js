// The answer with its forced beginning set apart, and the numbers of a run.

import { el } from "./dom.js";
import { nats } from "./tokens.js";

const END_CAUSE = {
  end_sequence: "end string found",
  budget: "budget used up",
  eos: "end-of-text token",
  cold_stop: "cold stop: low entropy",
  unfinished: "unfinished: cut while thinking",
};

// The text that was forced before the answer, if it can be told from the content.
function forcedText(run, info) {
  if (!run.report?.forced_tokens) return "";
  const name = run.report.end_cause === "end_sequence" ? "force_after_end" : "force_after_cut";
  const text = run.body.cot[name] ?? info.recipe?.[name];
  if (typeof text !== "string") return "";
  return [text, text.trimStart()].find((start) => start && run.content.startsWith(start)) ?? "";
}

// The contents of the first \boxed{...}; the answer may end before its brace closes.
export function boxed(content) {
  const start = content.indexOf("\\boxed{");
  if (start < 0) return null;
  let depth = 1;
  for (let i = start + 7; i < content.length; i += 1) {
    if (content[i] === "{") depth += 1;
    else if (content[i] === "}") depth -= 1;
    if (depth === 0) return content.slice(start + 7, i);
  }
  return null;
}

export function showAnswer(part, run, info) {
  const { answer, boxed: chip, answerNote } = part;
  const forced = forcedText(run, info);
  const own = run.content.slice(forced.length);
  const shown = `${forced.length} ${run.content.length}`;
  if (answer.dataset.shown !== shown) {
    answer.dataset.shown = shown;
    answer.textContent = forced ? own : own.trimStart();
    if (forced)
      answer.prepend(
        el("span", {
          class: "forced-text",
          title: "forced text, not the model's own",
          text: forced.trimStart(),
        }),
      );
  }
  const inside = run.active ? null : boxed(run.content);
  chip.hidden = inside === null || inside.trim() === "";
  chip.textContent = chip.hidden ? "" : inside.trim();
  answerNote.textContent =
    run.finishReason === "length"
      ? "Cut at max tokens."
      : run.phase === "stopped"
        ? "Stopped."
        : run.phase === "done" && !run.content
          ? "The answer is empty."
          : "";
}

export function showFacts(list, run) {
  const { report } = run;
  const speed = run.tokensPerSecond;
  const seconds = run.endedAt === null ? null : (run.endedAt - run.started) / 1000;
  const first = run.firstAt === null ? null : (run.firstAt - run.started) / 1000;
  const rows = [
    ["Thinking ended", report && (END_CAUSE[report.end_cause] ?? report.end_cause)],
    ["Think tokens", thinkTokens(run)],
    ["Forced, answer", report && `${report.forced_tokens ?? 0}, ${report.answer_tokens ?? 0}`],
    ["Mean entropy", run.meanEntropy !== null && `${nats(run.meanEntropy)} nats`],
    ["τ, σ", report && `${number(report.tau)}, ${number(report.sigma)}`],
    ["Seed", report?.seed],
    ["Weights", report?.weight_version],
    ["Speed", speed !== null && `${speed.toFixed(1)} tokens/s`],
    ["First token", first !== null && `${first.toFixed(2)} s`],
    ["Total", seconds !== null && `${seconds.toFixed(2)} s`],
  ].filter(([, value]) => value !== null && value !== undefined && value !== false);
  const nodes = list.children;
  if (nodes.length !== rows.length) {
    list.replaceChildren(...rows.map(() => el("div", {}, el("dt"), el("dd"))));
  }
  rows.forEach(([name, value], i) => {
    const [term, data] = nodes[i].children;
    if (term.textContent !== name) term.textContent = name;
    if (data.textContent !== String(value)) data.textContent = value;
  });
}

function thinkTokens(run) {
  const { think_tokens: all, soft_steps: soft, hard_steps: hard } = run.report ?? {};
  if (all === undefined) return run.steps.length || null;
  return soft && hard ? `${all} (${soft} soft, ${hard} hard)` : `${all}`;
}

// Four significant digits, so that 0.0413 and 0.0001 both read well.
const number = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "–");
