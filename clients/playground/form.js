// The settings of one column: mode, its fields, the policy of mode mixed.

import { el } from "./dom.js";
import { COLUMN, makeField } from "./fields.js";
import { policyParams } from "./settings.js";

export class ColumnForm {
  constructor(part, state, page) {
    this.part = part;
    this.state = state;
    this.page = page;
    this.policyFields = [];
    const changed = () => this.update();
    this.fields = COLUMN.map((spec) => makeField(spec, state, changed));
    part.fields.append(...this.fields.map((field) => field.root));
    part.mode.addEventListener("change", () => {
      state.mode = part.mode.value;
      this.clearErrors();
      this.update();
      page.changed();
    });
    part.policy.addEventListener("change", () => {
      state.policy = part.policy.value;
      state.policy_params = {};
      this.update();
    });
    this.refresh();
  }

  get title() {
    return this.state.mode;
  }

  // After the server's info arrived: modes, policies, defaults as placeholders.
  refresh() {
    const info = this.page.info();
    options(this.part.mode, withCurrent(info.modes, this.state.mode), this.state.mode);
    const policies = Object.keys(info.policies ?? {});
    if (!this.state.policy) this.state.policy = policies[0] ?? "";
    options(this.part.policy, withCurrent(policies, this.state.policy), this.state.policy);
    this.shownPolicy = null;
    this.update();
  }

  update() {
    const { mode } = this.state;
    const info = this.page.info();
    const defaults = { ...SUPPORT, ...info.defaults?.[mode], ...info.recipe }; // the recipe holds the server's own
    for (const field of this.fields) {
      const { name, modes } = field.spec;
      field.visible(!modes || Boolean(modes[mode]));
      if (name === "seed" || name === "max_think_tokens") field.placeholder("shared");
      else if (name !== "extra") field.placeholder(defaults[name] ?? "default");
    }
    this.part.policyField.hidden = this.part.policyParams.hidden = mode !== "mixed";
    if (mode === "mixed" && this.shownPolicy !== this.state.policy) this.showPolicy(info);
    this.part.summary.textContent = this.summary(defaults);
    this.part.mode.closest(".column").setAttribute("aria-label", `Column ${mode}`);
    for (const [part, what] of [
      ["remove", "Remove"],
      ["duplicate", "Duplicate"],
    ]) {
      this.part[part].setAttribute("aria-label", `${what} column ${mode}`);
      this.part[part].title = `${what} column`;
    }
  }

  showPolicy(info) {
    this.shownPolicy = this.state.policy;
    const params = Object.entries(policyParams(info, this.state.policy));
    this.policyFields = params.map(([name, spec]) => {
      if (this.state.policy_params[name] === undefined) {
        this.state.policy_params[name] = String(spec.default ?? PARAM_START[name] ?? "");
      }
      const range =
        spec.low !== undefined && spec.high !== undefined ? `${spec.low} to ${spec.high}` : "";
      const shape = {
        name,
        wire: `cot.policy_params.${name}`,
        label: name.replaceAll("_", " "),
        kind: "float",
        hint: range,
      };
      return makeField(shape, this.state.policy_params, () => this.update());
    });
    this.part.policyParams.replaceChildren(...this.policyFields.map((field) => field.root));
  }

  // One line for a closed panel: what differs from the server's defaults, else what they are.
  summary(defaults) {
    const { state } = this;
    const words = [];
    if (state.mode === "mixed") {
      const params = Object.entries(state.policy_params);
      words.push(state.policy, ...params.map((pair) => pair.join(" ").replaceAll("_", " ")));
    }
    const show = (label, name) => {
      const value = state[name] || defaults[name];
      if (value !== undefined && value !== "") words.push(`${label} ${value}`);
    };
    show("τ", "temperature");
    if (state.mode !== "hard") show("noise", "noise_scale");
    for (const [label, name] of [
      ["top k", "top_k"],
      ["top p", "top_p"],
      ["min p", "min_p"],
      ["seed", "seed"],
      ["budget", "max_think_tokens"],
    ]) {
      if (state[name]) words.push(`${label} ${state[name]}`);
    }
    if (state.extra.trim()) words.push("…");
    return words.join(" · ") || "defaults";
  }

  setSeed(seed) {
    this.fields.find((field) => field.spec.name === "seed").set(seed);
    this.update();
  }

  // Marks the field with this wire name, if the column has it and set it; returns whether.
  mark(wire, message) {
    const own = this.fields.filter(
      (field) =>
        field.spec.wire === wire && !(SHARED_TOO.has(wire) && !this.state[field.spec.name].trim()),
    );
    const policy = this.policyFields.filter(
      (field) =>
        this.state.mode === "mixed" && (wire === field.spec.wire || wire === "cot.policy_params"),
    );
    const marked = [...own, ...policy];
    if (!marked.length && this.state.extra.includes(`"${wire.replace("cot.", "")}"`)) {
      marked.push(this.fields.find((field) => field.spec.name === "extra"));
    }
    for (const field of marked) field.mark(message);
    if (marked.length) this.part.settings.open = true;
    return marked.length > 0;
  }

  clearErrors() {
    for (const field of [...this.fields, ...this.policyFields]) field.mark("");
  }
}

// Where a policy has no default: half a nat and a nat part sure from unsure steps well enough.
const PARAM_START = { low: "0.5", high: "1", weight: "0.5", p: "0.5", soft_above: "1" };
const SUPPORT = { top_k: 0, top_p: 1, min_p: 0 }; // the whole vocabulary
const SHARED_TOO = new Set(["cot.seed", "cot.max_think_tokens"]);

const withCurrent = (names, current) =>
  names.includes(current) || !current ? names : [...names, current];

function options(select, names, chosen) {
  select.replaceChildren(
    ...names.map((name) => el("option", { value: name, text: name, selected: name === chosen })),
  );
}
