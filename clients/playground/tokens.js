// How a token's text is shown: white space, control and direction characters become visible,
// so that " is" differs from "is" and no token can disturb the page.

const HIDDEN =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u200b\u200c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/gu;
const SYMBOL = { "\n": "↵", "\t": "⇥", "\r": "␍" };
const escape = (c) => SYMBOL[c] ?? `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`;

export function visibleToken(text, id) {
  if (typeof text !== "string" || text === "") return id === undefined ? "∅" : `#${id}`;
  return text.replace(HIDDEN, escape).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
}

export const percent = (weight) => {
  const value = 100 * weight;
  if (value < 0.005) return "< 0.01 %";
  return value >= 99.95 ? "100 %" : value >= 10 ? `${value.toFixed(1)} %` : `${value.toFixed(2)} %`;
};

export const nats = (entropy) => (Number.isFinite(entropy) ? entropy.toFixed(2) : "NaN");

// What a step did, in the words of the legend. `kind` is more exact where the server sends it.
export function kindOf(step) {
  if (step.kind === "forced" || step.forced === true) return "forced";
  if (step.kind === "blend" || (step.soft && step.sampled)) return "blend";
  return step.soft ? "soft" : "sampled";
}

export const KIND_LABEL = {
  soft: "mixture fed",
  sampled: "sampled token fed",
  blend: "mixture and sampled token fed",
  forced: "forced token fed",
};
