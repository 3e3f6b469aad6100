// The same request for a shell and for Python. Strings are quoted so that any prompt survives.

import { apiKey, baseUrl } from "./api.js";

// What the page adds for itself (streaming, recorded steps) is left out.
function plain(body) {
  const { stream, stream_options, cot, ...rest } = body;
  const { record, record_top, ...fields } = cot;
  return { ...rest, cot: fields };
}

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function asCurl(body) {
  const lines = [`curl ${shellQuote(new URL("v1/chat/completions", baseUrl()).href)}`];
  if (apiKey.get()) lines.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  lines.push("-H 'Content-Type: application/json'");
  lines.push(`-d ${shellQuote(JSON.stringify(plain(body), null, 2))}`);
  return lines.join(" \\\n  ") + "\n";
}

// JSON strings are Python strings, too; only the constants differ.
export function pythonLiteral(value, indent = "") {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}    `;
  const list = Array.isArray(value);
  const items = list
    ? value.map((item) => pythonLiteral(item, deeper))
    : Object.entries(value).map(
        ([key, item]) => `${JSON.stringify(key)}: ${pythonLiteral(item, deeper)}`,
      );
  const [open, close] = list ? "[]" : "{}";
  return items.length
    ? `${open}\n${deeper}${items.join(`,\n${deeper}`)},\n${indent}${close}`
    : open + close;
}

export function asPython(body) {
  const { cot_mode, cot, model, ...standard } = plain(body);
  const lines = [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(new URL("v1", baseUrl()).href)}, api_key=os.environ.get("OPENAI_API_KEY", "none"))`,
    "response = client.chat.completions.create(",
    `    model=${model ? JSON.stringify(model) : "client.models.list().data[0].id"},`,
    ...Object.entries(standard).map(
      ([name, value]) => `    ${name}=${pythonLiteral(value, "    ")},`,
    ),
    `    extra_body=${pythonLiteral({ cot_mode, cot }, "    ")},`,
    ")",
    "choice = response.choices[0]",
    'print("reasoning:", getattr(choice.message, "reasoning", None))',
    'print("answer:", choice.message.content)',
    'print("cot:", choice.model_dump().get("cot"))',
  ];
  return lines.join("\n") + "\n";
}
