// What the form holds, its way into a request and into a shared link.

import { COLUMN, SHARED, parse } from "./fields.js";

const MODES = ["hard", "soft", "fuzzy", "mixed"];
export const MAX_COLUMNS = 6;

// What the page assumes of a server that does not say it.
export const FALLBACK_INFO = {
  modes: MODES,
  defaults: {},
  limits: {},
  policies: { blend: ["weight"], interleave: ["p"], entropy: ["low", "high", "soft_above"] },
};

// What the server told, with the page's assumptions where it is silent. `modes` is empty where
// the engine refuses think phases; the select still needs its options.
export function completeInfo(told) {
  const info = { ...FALLBACK_INFO };
  for (const [name, value] of Object.entries(told))
    if (value !== null && value !== undefined) info[name] = value;
  if (!Array.isArray(info.modes) || info.modes.length === 0) info.modes = MODES;
  return info;
}

const EXAMPLE =
  "Mia has 3 boxes with 12 pencils each. She gives away 7 pencils. How many are left?";

export const newShared = () => ({
  model: "",
  prompt: EXAMPLE,
  system: "",
  seed: "",
  max_think_tokens: "192",
  max_tokens: "448",
  temperature: "0",
  end_strings: "",
});

export const newColumn = (mode) => ({ mode, policy: "", policy_params: {}, ...blank(COLUMN) });

const blank = (specs) => Object.fromEntries(specs.map((spec) => [spec.name, ""]));

// The body of a column's request and what keeps it from being sent: [[wire name, message], ...].
export function buildRequest(shared, column) {
  const problems = [];
  const read = (spec, store) => {
    try {
      return parse(spec.kind, store[spec.name]);
    } catch (error) {
      problems.push([spec.wire, error.message]);
      return undefined;
    }
  };

  const cot = { record: "top", record_top: 8 };
  const top = {};
  for (const [specs, store] of [
    [SHARED, shared],
    [COLUMN, column],
  ]) {
    for (const spec of specs) {
      if (spec.modes && !spec.modes[column.mode]) continue;
      const value = read(spec, store);
      if (value === undefined) continue;
      if (spec.kind === "json") Object.assign(cot, value);
      else if (spec.wire.startsWith("cot.")) cot[spec.wire.slice(4)] = value;
      else top[spec.wire] = value;
    }
  }
  if (column.mode === "mixed" && column.policy) {
    cot.policy = column.policy;
    const given = {};
    for (const [name, text] of Object.entries(column.policy_params)) {
      const value = read(
        { name, kind: "float", wire: `cot.policy_params.${name}` },
        column.policy_params,
      );
      if (value !== undefined) given[name] = value;
    }
    if (Object.keys(given).length) cot.policy_params = given;
  }
  if (!shared.prompt.trim()) problems.push(["messages", "Enter a question."]);

  const messages = [{ role: "user", content: shared.prompt }];
  if (shared.system.trim()) messages.unshift({ role: "system", content: shared.system });
  const body = {
    model: shared.model || undefined, // without one the server takes its own
    messages,
    ...top,
    stream: true,
    stream_options: { include_usage: true },
    cot_mode: column.mode,
    cot,
  };
  return { body, problems };
}

// ---- shared links: everything but the API key, in the part of the URL that is never sent ----

export function encode(shared, columns) {
  const bytes = new TextEncoder().encode(
    JSON.stringify({ v: 1, shared, columns: columns.map(compact) }),
  );
  let binary = "";
  for (const byte of bytes) binary += String.fromCharCode(byte);
  return `#s=${btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "")}`;
}

const compact = (column) =>
  Object.fromEntries(Object.entries(column).filter(([, value]) => value !== ""));

// {shared, columns} of a link, or null. A link is a stranger's text: only known fields are taken.
export function decode(hash) {
  if (!hash.startsWith("#s=")) return null;
  try {
    const binary = atob(hash.slice(3).replaceAll("-", "+").replaceAll("_", "/"));
    const raw = JSON.parse(
      new TextDecoder().decode(Uint8Array.from(binary, (c) => c.charCodeAt(0))),
    );
    const columns = raw.columns.slice(0, MAX_COLUMNS).map((column) => ({
      ...take(newColumn("soft"), column),
      policy_params: take({}, column.policy_params ?? {}, true),
    }));
    return columns.length ? { shared: take(newShared(), raw.shared), columns } : null;
  } catch {
    return null;
  }
}

function take(into, from, anyName = false) {
  for (const [name, value] of Object.entries(from)) {
    if (typeof value === "string" && (anyName ? /^\w{1,40}$/.test(name) : name in into))
      into[name] = value;
  }
  return into;
}

// {name: {low, high, default}} of a policy, whichever way the server lists its parameters.
export function policyParams(info, policy) {
  const listed = info.policies?.[policy] ?? [];
  const entries = Array.isArray(listed)
    ? listed.map((item) => (typeof item === "string" ? [item, {}] : [item.name, item]))
    : Object.entries(listed).map(([name, spec]) => [
        name,
        Array.isArray(spec) ? { low: spec[0], high: spec[1], default: spec[2] } : (spec ?? {}),
      ]);
  return Object.fromEntries(entries);
}
