// What went wrong, in words with a remedy, and the field of the form it concerns.

export class RequestError extends Error {
  constructor({ title, message = "", remedy = "", field = null, status = 0 }) {
    super(message || title);
    Object.assign(this, { title, remedy, field, status });
    this.detail = message;
  }
}

// vLLM's shape is {"error": {message, type, param, code}}; its key check answers {"error": "..."}.
export function fromBody(status, body) {
  const error = body?.error ?? body?.detail ?? body;
  const message = typeof error === "string" ? error : (error?.message ?? "");
  const field = fieldOf(error?.param, message);
  if (status === 400 || status === 422) {
    return new RequestError({
      title: field ? `The server refused ${field}` : "The server refused the request",
      message,
      remedy: field
        ? "Change the marked field and run again."
        : "Change the request and run again.",
      field,
      status,
    });
  }
  if (status === 401 || status === 403) {
    return new RequestError({
      title: "The server wants an API key",
      message: message === "Unauthorized" ? "" : message,
      remedy: "Enter the key it was started with at the top of the page and run again.",
      field: "api_key",
      status,
    });
  }
  if (status === 404) {
    return new RequestError({
      title: "Not found",
      message,
      remedy: "Choose another model. If there is none, this may not be a softvllm server.",
      field: "model",
      status,
    });
  }
  if (status === 429 || status === 503) {
    return new RequestError({
      title: "The server takes no requests now",
      message,
      remedy: "It is busy, paused or still loading. Wait a little and run again.",
      status,
    });
  }
  return new RequestError({
    title: `The server failed (status ${status})`,
    message,
    remedy: "The reason is in the server's log.",
    status,
  });
}

export function offline() {
  return new RequestError({
    title: "The server does not answer",
    remedy: `Check that softvllm serve runs and can be reached at ${location.host}, then run again.`,
  });
}

export function cutOff() {
  return new RequestError({
    title: "The answer was cut off",
    message: "The connection closed before the server said that it was done.",
    remedy: "The server may have stopped, or a proxy closed the connection. Run again.",
  });
}

export function unreadable(text) {
  return new RequestError({
    title: "The server sent something this page cannot read",
    message: text.slice(0, 300),
    remedy: "Page and server may be of different versions: reload the page.",
  });
}

// "body.cot.top_k" or "cot.top_k: must be ..." -> "cot.top_k"
export function fieldOf(param, message) {
  if (typeof param === "string" && param) return param.replace(/^body\./, "");
  const match = /^((?:cot\.)?[a-z_]+): /.exec(message);
  return match ? match[1] : null;
}
