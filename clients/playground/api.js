// The server's routes, relative to the page, so that any prefix in front works.

import { cutOff, fromBody, offline, unreadable, RequestError } from "./errors.js";
import { eventData } from "./sse.js";

const KEY_ENTRY = "softvllm.api_key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY_ENTRY) ?? "",
  set: (key) =>
    key ? sessionStorage.setItem(KEY_ENTRY, key) : sessionStorage.removeItem(KEY_ENTRY),
};

export const baseUrl = () => new URL(".", document.baseURI);

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  let response;
  try {
    response = await fetch(new URL(path, baseUrl()), { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : offline();
  }
  if (response.ok) return response;
  throw fromBody(response.status, await response.json().catch(() => null));
}

export const getInfo = async () => (await request("v1/cot/info")).json();

export async function getModels() {
  const list = await (await request("v1/models")).json();
  return (list.data ?? []).map((model) => String(model.id));
}

// Yields the chunks of one streamed chat completion; throws RequestError or AbortError.
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let finished = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") {
        finished = true;
        break;
      }
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch {
        throw unreadable(data);
      }
      if (chunk.error) throw fromBody(chunk.error.code ?? 500, chunk);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw cutOff();
  }
  if (!finished) throw cutOff();
}
