// The page: shared settings, the row of columns, running, stopping, sharing.

import { apiKey, getInfo, getModels } from "./api.js";
import { topEdge } from "./chart.js";
import { Column } from "./column.js";
import { announce, copyText, el } from "./dom.js";
import { SHARED, makeField } from "./fields.js";
import {
  FALLBACK_INFO,
  MAX_COLUMNS,
  completeInfo,
  decode,
  encode,
  newColumn,
  newShared,
} from "./settings.js";

const $ = (id) => document.getElementById(id);

let shared = newShared();
let info = FALLBACK_INFO;
let columns = [];
let fields = [];

const page = {
  shared: () => shared,
  info: () => info,
  changed: updateButtons,
  removed(column) {
    column.run?.stop();
    const index = columns.indexOf(column);
    columns.splice(index, 1);
    column.root.remove();
    updateButtons();
    (columns[Math.min(index, columns.length - 1)]?.part.remove ?? $("add")).focus();
  },
  copied(column) {
    const { policy_params: params, ...rest } = column.state;
    addColumn({ ...rest, policy_params: { ...params } }, column);
    updateButtons();
  },
  markShared(wire, message) {
    if (wire === "api_key") return markKey(message);
    if (wire === "messages") return markPrompt(message);
    for (const field of fields) if (field.spec.wire === wire) field.mark(message);
  },
  // All charts share one scale, so that heights compare across columns.
  rescale() {
    const edge = topEdge(Math.max(...columns.map((column) => column.run?.maxEntropy ?? 0), 0));
    for (const column of columns) column.browser?.chart.setScale(edge);
    for (const column of columns) column.part.chartTop.textContent = `${edge}`;
  },
};

// ---- the form ----

function showShared() {
  $("prompt").value = shared.prompt;
  $("system").value = shared.system;
  $("system-box").open = shared.system !== "";
  fields = SHARED.map((spec) => makeField(spec, shared));
  $("shared-fields").replaceChildren(...fields.map((field) => field.root));
  showPlaceholders();
}

function showPlaceholders() {
  const defaults = { ...info.defaults?.[info.default_mode ?? "soft"], ...info.recipe };
  for (const field of fields) {
    const value = { seed: "random", end_strings: (defaults.end_strings ?? []).join("\n") }[
      field.spec.name
    ];
    field.placeholder(value ?? defaults[field.spec.name] ?? "default");
    const limit = {
      max_think_tokens: info.limits?.max_think_tokens,
      max_tokens: info.limits?.max_model_len,
    };
    field.limit(limit[field.spec.name]);
  }
}

function markPrompt(message) {
  $("prompt-error").textContent = message;
  if (message) $("prompt").setAttribute("aria-invalid", "true");
  else $("prompt").removeAttribute("aria-invalid");
}

function markKey(message) {
  $("key-error").textContent = message;
  if (message) $("key").setAttribute("aria-invalid", "true");
  else $("key").removeAttribute("aria-invalid");
  if (message) $("connection").open = true;
}

function clearSharedErrors() {
  for (const field of fields) field.mark("");
  markPrompt("");
  markKey("");
}

// ---- columns ----

function addColumn(state, after = null) {
  const column = new Column(page, state);
  if (after) {
    columns.splice(columns.indexOf(after) + 1, 0, column);
    after.root.after(column.root);
  } else {
    columns.push(column);
    $("columns").append(column.root);
  }
  return column;
}

function showColumns(states) {
  for (const column of columns) {
    column.run?.stop();
    column.root.remove();
  }
  columns = [];
  for (const state of states) addColumn(state);
  updateButtons();
}

function updateButtons() {
  const active = columns.some((column) => column.active);
  $("run").disabled = active || columns.length === 0;
  $("stop").disabled = !active;
  $("add").disabled = columns.length >= MAX_COLUMNS;
  for (const column of columns) column.part.duplicate.disabled = columns.length >= MAX_COLUMNS;
  $("columns").style.setProperty("--count", Math.max(columns.length, 1));
  $("no-columns").hidden = columns.length > 0;
}

const nextMode = () =>
  (info.modes ?? []).find((mode) => !columns.some((c) => c.state.mode === mode)) ?? "soft";

// ---- run, stop, share ----

async function run() {
  if ($("run").disabled) return;
  clearSharedErrors();
  history.replaceState(null, "", currentHash()); // a reload keeps what was run
  announce(`Running ${columns.length} ${columns.length === 1 ? "column" : "columns"}.`);
  await Promise.all(columns.map((column) => column.start()));
  updateButtons();
  const wrong = document.querySelector('[aria-invalid="true"]');
  if (wrong) wrong.focus();
}

function stop() {
  for (const column of columns) column.run?.stop();
}

const currentHash = () =>
  encode(
    shared,
    columns.map((column) => column.state),
  );

function share() {
  history.replaceState(null, "", currentHash());
  copyText(location.href, "link");
}

function load(state) {
  shared = state?.shared ?? newShared();
  showShared();
  showModels();
  showColumns(state?.columns ?? [newColumn("hard"), newColumn("soft")]);
}

// ---- the server ----

let models = [];

function showModels() {
  const names = shared.model && !models.includes(shared.model) ? [...models, shared.model] : models;
  if (!shared.model && names.length) shared.model = names[0];
  $("model").replaceChildren(
    ...names.map((name) =>
      el("option", {
        value: name,
        text: shortName(name),
        title: name,
        selected: name === shared.model,
      }),
    ),
  );
  $("model").disabled = names.length === 0;
}

const shortName = (name) => name.replace(/\/+$/, "").split("/").slice(-2).join("/");

async function connect() {
  const [gotModels, gotInfo] = await Promise.allSettled([getModels(), getInfo()]);
  if (gotModels.status === "fulfilled") models = gotModels.value;
  if (gotInfo.status === "fulfilled") info = completeInfo(gotInfo.value);
  showModels();
  showPlaceholders();
  for (const column of columns) column.form.refresh();
  const failure = gotModels.reason ?? gotInfo.reason;
  $("server").classList.toggle("bad", Boolean(failure || info.refusal));
  $("server").textContent = failure
    ? failureText(failure, gotInfo.reason && !gotModels.reason)
    : (info.refusal ?? versions());
  if (failure?.status === 401) markKey("This server wants an API key.");
  else markKey("");
}

const failureText = (failure, onlyInfo) =>
  onlyInfo && failure.status === 404
    ? "This server has no /v1/cot/info: it may not be softvllm."
    : `${failure.title}. ${failure.remedy}`;

function versions() {
  const known = [
    ["softvllm", info.softvllm],
    ["vLLM", info.vllm],
  ].filter(([, version]) => version);
  return known.map(([name, version]) => `${name} ${version}`).join(" · ") || "connected";
}

// ---- events ----

$("prompt").addEventListener("input", () => {
  shared.prompt = $("prompt").value;
  markPrompt("");
});
$("system").addEventListener("input", () => (shared.system = $("system").value));
$("model").addEventListener("change", () => (shared.model = $("model").value));
$("key").addEventListener("input", () => apiKey.set($("key").value.trim()));
$("key").addEventListener("change", connect);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
$("run").addEventListener("click", run);
$("stop").addEventListener("click", stop);
$("share").addEventListener("click", share);
$("reset").addEventListener("click", () => {
  history.replaceState(null, "", location.pathname + location.search);
  load(null);
  announce("Everything is back to the defaults.");
});
$("add").addEventListener("click", () => {
  addColumn(newColumn(nextMode()));
  updateButtons();
  columns.at(-1).part.mode.focus();
});
$("copy-close").addEventListener("click", () => $("copy-dialog").close());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && !$("copy-dialog").open) {
    stop();
  }
});
window.addEventListener("hashchange", () => {
  const state = decode(location.hash);
  if (state) load(state);
});

$("key").value = apiKey.get();
load(decode(location.hash));
connect();
