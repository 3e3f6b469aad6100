// Form fields: which there are, how they are drawn, read and marked as wrong.

import { el, uniqueId } from "./dom.js";

const POSITIVE = { soft: 1, fuzzy: 1, mixed: 1 };

// `wire`: the name in the request, which is also what the server's errors name.
export const SHARED = [
  {
    name: "seed",
    wire: "cot.seed",
    label: "Seed",
    kind: "int",
    hint: "Empty: drawn by the server and reported.",
  },
  {
    name: "max_think_tokens",
    wire: "cot.max_think_tokens",
    label: "Think budget",
    kind: "int",
    hint: "Think tokens.",
  },
  {
    name: "max_tokens",
    wire: "max_tokens",
    label: "Max tokens",
    kind: "int",
    hint: "Thinking, forced text and answer.",
  },
  {
    name: "temperature",
    wire: "temperature",
    label: "Answer temperature",
    kind: "float",
    hint: "0: greedy answer. Shapes the answer only.",
  },
  {
    name: "end_strings",
    wire: "cot.end_strings",
    label: "End strings",
    kind: "lines",
    hint: "What ends thinking, one a line. Empty: the server's.",
  },
];

export const COLUMN = [
  {
    name: "temperature",
    wire: "cot.temperature",
    label: "Temperature τ",
    kind: "float",
    hint: "Of the thinking distribution.",
  },
  {
    name: "noise_scale",
    wire: "cot.noise_scale",
    label: "Noise scale",
    kind: "float",
    modes: POSITIVE,
    hint: "σ as a share of the embeddings' RMS.",
  },
  {
    name: "max_think_tokens",
    wire: "cot.max_think_tokens",
    label: "Think budget",
    kind: "int",
    hint: "Empty: the shared one.",
  },
  { name: "top_k", wire: "cot.top_k", label: "Top k", kind: "int", hint: "0: whole vocabulary." },
  { name: "top_p", wire: "cot.top_p", label: "Top p", kind: "float" },
  { name: "min_p", wire: "cot.min_p", label: "Min p", kind: "float" },
  {
    name: "seed",
    wire: "cot.seed",
    label: "Seed",
    kind: "int",
    wide: true,
    hint: "Empty: the shared one.",
  },
  {
    name: "extra",
    wire: "cot",
    label: "More cot fields",
    kind: "json",
    hint: 'A JSON object, such as {"min_think_tokens": 8}.',
  },
];

// Reads what was typed; returns undefined for an empty field, throws Error for what is no value.
export function parse(kind, text) {
  const trimmed = text.trim();
  if (trimmed === "") return undefined;
  if (kind === "int") {
    const value = Number(trimmed);
    if (!/^[+-]?\d+$/.test(trimmed) || !Number.isSafeInteger(value))
      throw new Error("Enter a whole number.");
    return value;
  }
  if (kind === "float") {
    const value = Number(trimmed);
    if (!Number.isFinite(value)) throw new Error("Enter a number, such as 0.5.");
    return value;
  }
  if (kind === "lines") return text.split("\n").filter((line) => line !== "");
  if (kind === "json") {
    let value;
    try {
      value = JSON.parse(trimmed);
    } catch {
      throw new Error("Enter a JSON object.");
    }
    if (value === null || typeof value !== "object" || Array.isArray(value))
      throw new Error("Enter a JSON object.");
    return value;
  }
  return trimmed;
}

// A labelled input whose text lives in `store[spec.name]`.
export function makeField(spec, store, onInput) {
  const errorId = uniqueId("error");
  const hintId = uniqueId("hint");
  const long = spec.kind === "lines" || spec.kind === "json";
  const input = el(long ? "textarea" : "input", {
    ...(long ? { rows: "2" } : { type: "text" }),
    inputmode: spec.kind === "int" ? "numeric" : spec.kind === "float" ? "decimal" : undefined,
    autocomplete: "off",
    spellcheck: "false",
    "data-field": spec.wire,
    "aria-describedby": spec.hint ? `${hintId} ${errorId}` : errorId,
  });
  input.value = store[spec.name] ?? "";
  const hint = spec.hint ? el("span", { class: "hint", id: hintId, text: spec.hint }) : "";
  const error = el("span", { class: "field-error", id: errorId });
  const root = el(
    "label",
    { class: long || spec.wide ? "field wide" : "field" },
    el("span", { class: "label", text: spec.label }),
    input,
    hint,
    error,
  );

  const field = {
    spec,
    root,
    input,
    set(value) {
      input.value = store[spec.name] = value;
      field.mark("");
    },
    mark(message) {
      error.textContent = message;
      if (message) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
    },
    placeholder(value) {
      input.placeholder = value === undefined || value === null ? "" : String(value);
    },
    limit(most) {
      if (most) hint.textContent = `${spec.hint.replace(/\.$/, "")}, at most ${most}.`;
    },
    visible(on) {
      root.hidden = !on;
    },
  };
  input.addEventListener("input", () => {
    store[spec.name] = input.value;
    field.mark("");
    onInput?.();
  });
  return field;
}
