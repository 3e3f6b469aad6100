// The plain `openai` package for Node.js: our fields go beside OpenAI's own.
//
//   npm install openai
//   SOFTVLLM_URL=http://127.0.0.1:8000 node openai_node.mjs

import OpenAI from "openai";

const url = (process.env.SOFTVLLM_URL ?? "http://127.0.0.1:8000").replace(/\/$/, "");
const client = new OpenAI({
  baseURL: `${url}/v1`,
  apiKey: process.env.SOFTVLLM_API_KEY ?? "EMPTY",
});
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What is 7 plus 5?" }];

const reply = await client.chat.completions.create({
  model,
  messages,
  max_tokens: 96,
  cot_mode: "soft",
  cot: { max_think_tokens: 48 },
});
const [choice] = reply.choices;
console.log("thought: ", choice.message.reasoning);
console.log("answered:", choice.message.content);
console.log("how:     ", choice.cot);

// The same sample once more, streamed: its seed repeats it.
const stream = await client.chat.completions.create({
  model,
  messages,
  max_tokens: 96,
  stream: true,
  cot_mode: "soft",
  cot: { max_think_tokens: 48, seed: choice.cot.seed, record: "top", record_top: 3 },
});
for await (const chunk of stream) {
  for (const part of chunk.choices) {
    for (const step of part.cot?.steps ?? []) {
      const top = step.top.map(([token, , weight]) => `${JSON.stringify(token)} ${weight.toFixed(2)}`);
      console.log(`  entropy ${step.entropy.toFixed(2)}  ${top.join("  ")}`);
    }
    process.stdout.write(part.delta.content ?? "");
  }
}
console.log();
