// One streamed run of a column: what has arrived so far and how fast. No DOM here.

import { streamChat } from "./api.js";
import { kindOf } from "./tokens.js";

export class Run {
  constructor(body) {
    this.body = body;
    this.blends = body.cot_mode === "mixed" && (body.cot.policy ?? "blend") === "blend";
    this.steps = [];
    this.kinds = new Set(); // of the steps
    this.maxEntropy = 0;
    this.sumEntropy = 0;
    this.reasoning = "";
    this.content = "";
    this.report = null; // the whole cot block, with the last chunk
    this.finishReason = null;
    this.usage = null;
    this.phase = "waiting"; // thinking, answering, done, stopped, failed
    this.error = null;
    this.started = performance.now();
    this.firstAt = null;
    this.endedAt = null;
    this.controller = new AbortController();
  }

  get active() {
    return this.phase === "waiting" || this.phase === "thinking" || this.phase === "answering";
  }

  stop() {
    this.controller.abort();
  }

  // Resolves when the run is over, however it ended; `onProgress` after every chunk.
  async start(onProgress) {
    try {
      for await (const chunk of streamChat(this.body, this.controller.signal)) {
        this.take(chunk);
        onProgress();
      }
      this.phase = "done";
    } catch (error) {
      if (error.name === "AbortError") this.phase = "stopped";
      else {
        this.phase = "failed";
        this.error = error;
      }
    }
    this.endedAt = performance.now();
    onProgress();
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { delta = {}, cot } = choice;
    const reasoning = delta.reasoning ?? delta.reasoning_content ?? "";
    const steps = cot?.steps ?? [];
    if (this.firstAt === null && (steps.length || reasoning || delta.content))
      this.firstAt = performance.now();
    // Every chunk, the last one too, brings the steps not sent before. A last block that holds all
    // steps, as the one of an answer in one piece does, adds only those that are new.
    const whole = choice.finish_reason && cot?.think_tokens === steps.length;
    for (const step of whole ? steps.slice(this.steps.length) : steps) {
      this.push(step);
    }
    if (choice.finish_reason) {
      this.finishReason = choice.finish_reason;
      this.report = cot ?? null;
    }
    this.reasoning += reasoning;
    this.content += delta.content ?? "";
    if (delta.content) this.phase = "answering";
    else if (steps.length || reasoning) this.phase = "thinking";
  }

  push(step) {
    if (this.blends && step.soft) step.kind ??= "blend";
    this.steps.push(step);
    this.kinds.add(kindOf(step));
    if (Number.isFinite(step.entropy)) {
      this.maxEntropy = Math.max(this.maxEntropy, step.entropy);
      this.sumEntropy += step.entropy;
    }
  }

  get meanEntropy() {
    return (
      this.report?.mean_entropy ?? (this.steps.length ? this.sumEntropy / this.steps.length : null)
    );
  }

  // Tokens a second between the first and the last chunk, as this page received them.
  get tokensPerSecond() {
    if (this.firstAt === null) return null;
    const { think_tokens, forced_tokens = 0, answer_tokens = 0 } = this.report ?? {};
    const tokens =
      this.usage?.completion_tokens ??
      (think_tokens ?? this.steps.length) + forced_tokens + answer_tokens;
    const seconds = ((this.endedAt ?? performance.now()) - this.firstAt) / 1000;
    return tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
  }
}

// Where two finished runs first differ: null if nowhere, else words.
export function difference(before, after) {
  const shared = Math.min(before.steps.length, after.steps.length);
  for (let i = 0; i < shared; i += 1) {
    if (before.steps[i].id !== after.steps[i].id) return `think step ${i + 1}`;
  }
  if (before.steps.length !== after.steps.length) return `think step ${shared + 1}`;
  if (before.reasoning !== after.reasoning) return "the reasoning text";
  return before.content === after.content ? null : "the answer";
}
